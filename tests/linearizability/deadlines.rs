//! The proxies find the deadlines of writes: else a Redis without deadlines would
//! be one with them.

use crate::common::resp::{DEADLINES, Requests, count_late, lift_deadlines};

fn request(arguments: &[&str]) -> Vec<u8> {
    let mut request = format!("*{}\r\n", arguments.len());
    for argument in arguments {
        request += &format!("${}\r\n{argument}\r\n", argument.len());
    }
    request.into_bytes()
}

/// A call of a script whose `ARGV` say which they are, but for a document
/// that looks like a request, and the deadline.
fn call(count: usize, deadline: Option<(usize, &str)>) -> Vec<u8> {
    let mut argv: Vec<String> = (1..=count).map(|number| format!("arg {number}")).collect();
    if let Some(first) = argv.first_mut() {
        *first = "*7\r\n$7\r\nEVALSHA\r\n".into();
    }
    if let Some((place, time)) = deadline {
        argv[place - 1] = time.into();
    }
    let before = ["EVALSHA", "sha1", "1", "group:k"].map(String::from);
    let all: Vec<String> = before.into_iter().chain(argv).collect();
    request(&all.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn requests_are_cut_where_they_end_however_they_are_read() {
    let all = [
        request(&["PING"]),
        b"SET typed by-hand\r\n".to_vec(),
        call(8, None),
        request(&["SET", "", "two\r\nlines"]),
    ];
    let sent = all.concat();
    for length in 1..=sent.len() {
        let mut requests = Requests::default();
        let mut ends = Vec::new();
        let mut passed = Vec::new();
        for read in sent.chunks(length) {
            passed.extend(requests.whole(read));
            ends.push(passed.len());
        }
        assert_eq!(passed, sent);
        let mut between = vec![0];
        for request in &all {
            between.push(between[between.len() - 1] + request.len());
        }
        assert!(ends.iter().all(|end| between.contains(end)), "{length}");
    }
}

#[test]
fn only_the_deadlines_of_writes_are_lifted() {
    let all = |time: &str| {
        let calls = DEADLINES.map(|(count, place)| call(count, Some((place, time))));
        let others = [
            call(0, None),
            request(&["SET", "k", "1795558630295776"]),
            b"PING\r\n".to_vec(),
        ];
        [calls.concat(), others.concat(), calls.concat()].concat()
    };
    let mut requests = all("1795558630295776");
    assert_eq!(lift_deadlines(&mut requests), 2 * DEADLINES.len());
    assert_eq!(requests, all("9999999999999999"));
}

#[test]
fn each_script_has_its_deadline_where_it_is_looked_for() {
    let scripts = [
        include_str!("../../src/store/redis/write.lua"),
        include_str!("../../src/store/redis/delete.lua"),
        include_str!("../../src/store/redis/restore.lua"),
    ];
    let deadlines = scripts.map(|script| {
        let numbers = script.split("ARGV[").skip(1);
        let numbers = numbers.map(|rest| rest.split(']').next().unwrap().parse().unwrap());
        let (_, check) = script.split_once("if now > tonumber(ARGV[").unwrap();
        let (deadline, _) = check.split_once("]) then return reply('late')").unwrap();
        (numbers.max().unwrap(), deadline.parse().unwrap())
    });
    let [write, delete, restore] = deadlines;
    assert_eq!([write, delete], DEADLINES);
    assert_eq!(restore, delete);
}

#[test]
fn late_replies_are_counted() {
    let late = "*2\r\n$4\r\nlate\r\n$16\r\n1795558630295776\r\n";
    let replies = format!("+PONG\r\n{late}$4\r\nlast\r\n{late}");
    assert_eq!(count_late(replies.as_bytes()), 2);
}
