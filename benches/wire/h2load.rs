//! Loads by h2load, of Debian's package nghttp2-client: one request, over and over.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use bytes::{BufMut, Bytes};

use super::sample::{Load, ROUND};

/// A request for a server.
pub struct Shot {
    url: String,
    /// The request, with the head that gRPC gives a message.
    body: PathBuf,
    log: PathBuf,
}

impl Shot {
    pub fn new(folder: &Path, addr: &str, path: &str, message: Bytes) -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // One byte: not compressed. Four: the length.
        let mut framed = vec![0];
        framed.put_u32(message.len() as u32);
        framed.put(message);
        let body = folder.join(format!("{number}.body"));
        fs::write(&body, framed).unwrap();
        Self {
            url: format!("http://{addr}{path}"),
            body,
            log: folder.join(format!("{number}.log")),
        }
    }

    /// Sends it for a round. How long each call took.
    pub fn fire(&self, load: Load) -> Vec<Duration> {
        // It appends to its log.
        let _ = fs::remove_file(&self.log);
        let output = Command::new("h2load")
            .args(["--duration", &ROUND.as_secs().to_string()])
            .args(["--clients", &load.connections.to_string()])
            .args(["--max-concurrent-streams", &load.on_each.to_string()])
            .args(["--header", "content-type: application/grpc"])
            .args(["--header", "te: trailers"])
            .arg("--data")
            .arg(&self.body)
            .arg("--log-file")
            .arg(&self.log)
            .arg(&self.url)
            .output()
            .unwrap_or_else(|error| panic!("h2load: {error}; run `make bench`"));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}");
        let log = fs::read_to_string(&self.log).unwrap();
        // When it began in microseconds, the status of HTTP, how many microseconds.
        let calls = log.lines().map(|line| {
            let mut fields = line.split('\t').skip(1);
            assert_eq!(fields.next(), Some("200"), "{line}: {text}");
            fields.next().and_then(|micros| micros.parse().ok())
        });
        calls
            .map(|micros| Duration::from_micros(micros.expect("a number of microseconds")))
            .collect()
    }
}
