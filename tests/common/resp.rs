//! What clients send to Redis, as far as proxies have to understand it: where
//! one request ends and the next begins, and when a write is to be executed at
//! the latest.

use std::ops::Range;

/// Cuts what a client sends into whole requests.
#[derive(Default)]
pub struct Requests {
    /// The beginning of a request whose end has not come yet.
    begun: Vec<u8>,
}

/// Where a request has its arguments and its end.
struct Request {
    /// The name of the command is the first. Empty for a request in one line,
    /// as people type it.
    arguments: Vec<Range<usize>>,
    end: usize,
}

/// The scripts that write, told apart by how many `ARGV` they get at most, and which
/// of these is the deadline.
pub const DEADLINES: [(usize, usize); 2] = [
    (12, 5), // write.lua
    (7, 2),  // delete.lua, restore.lua
];

/// The last `ARGV` are there only where the script has asked for the version of what is
/// stored.
const TOLD: usize = 2;

/// `EVALSHA`, the digest, the number of keys, and the key.
const BEFORE_ARGV: usize = 4;

/// Rewrites the deadlines of all writes in whole requests, so that none is ever
/// too late. Returns how many there were.
pub fn lift_deadlines(requests: &mut [u8]) -> usize {
    let (mut begin, mut lifted) = (0, 0);
    while let Some(request) = Request::first_in(&requests[begin..]) {
        let bytes = &mut requests[begin..];
        if let Some(deadline) = request.deadline(bytes) {
            // Microseconds since 1970; with nines only they end in 2286.
            bytes[deadline].fill(b'9');
            lifted += 1;
        }
        begin += request.end;
    }
    lifted
}

/// How many writes were refused as late, among replies to scripts.
pub fn count_late(replies: &[u8]) -> usize {
    let late = b"\r\n$4\r\nlate\r\n";
    replies
        .windows(late.len())
        .filter(|reply| reply == late)
        .count()
}

// === impl Requests ===

impl Requests {
    /// Takes in what was read. Returns the requests that are whole by now.
    pub fn whole(&mut self, read: &[u8]) -> Vec<u8> {
        self.begun.extend_from_slice(read);
        let mut end = 0;
        while let Some(request) = Request::first_in(&self.begun[end..]) {
            end += request.end;
        }
        let begun = self.begun.split_off(end);
        std::mem::replace(&mut self.begun, begun)
    }
}

// === impl Request ===

impl Request {
    /// None if it is not whole.
    fn first_in(bytes: &[u8]) -> Option<Self> {
        let mut request = Self {
            arguments: Vec::new(),
            end: 0,
        };
        let first = request.line(bytes)?;
        if bytes[first.start] == b'*' {
            for _ in 0..number_after_sign(&bytes[first]) {
                let length = request.line(bytes)?;
                let length = number_after_sign(&bytes[length]);
                let argument = request.end..request.end + length;
                request.end = argument.end + b"\r\n".len();
                if request.end > bytes.len() {
                    return None;
                }
                request.arguments.push(argument);
            }
        }
        Some(request)
    }

    /// The next line, without its end.
    fn line(&mut self, bytes: &[u8]) -> Option<Range<usize>> {
        let rest = &bytes[self.end..];
        let length = rest.iter().position(|byte| *byte == b'\n')?;
        let line = self.end..self.end + length;
        self.end = line.end + 1;
        Some(line)
    }

    /// The deadline, if it is a write.
    fn deadline(&self, bytes: &[u8]) -> Option<Range<usize>> {
        let name = self.arguments.first()?.clone();
        if !bytes[name].eq_ignore_ascii_case(b"EVALSHA") {
            return None;
        }
        let argv = self.arguments.get(BEFORE_ARGV..)?;
        let counts = [argv.len(), argv.len() + TOLD];
        let (_, deadline) = DEADLINES.iter().find(|(most, _)| counts.contains(most))?;
        Some(argv[deadline - 1].clone())
    }
}

/// The number in a line such as `*3` or `$16`.
fn number_after_sign(line: &[u8]) -> usize {
    let digits = String::from_utf8_lossy(&line[1..]);
    let number = digits.trim_end().parse();
    number.expect("clients send arrays of strings, each after its length")
}
