//! The service as a process: the binary that is shipped.

use std::{
    io::{BufRead, BufReader},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use groupstate::grpc::proto::group_state_service_client::GroupStateServiceClient;
use tonic::transport::{Channel, Endpoint};

use super::{Process, http, stalls::Bound};

pub type Client = GroupStateServiceClient<Channel>;

/// A running service on a free port, and its log.
pub struct Service {
    process: Process,
    addr: String,
    http_addr: String,
    /// When each line was read, and the line.
    log: Arc<Mutex<Vec<(Instant, String)>>>,
    /// Reads the log until the process has ended.
    reading: Option<std::thread::JoinHandle<()>>,
}

impl Service {
    /// Starts the service with these settings and waits until it serves.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_on("127.0.0.1:0", arguments)
    }

    /// The same with these variables in its environment, which has no others.
    pub fn start_in(environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        Self::launch("127.0.0.1:0", environment, arguments)
    }

    /// The same on an address of one's own choice.
    pub fn start_on(addr: &str, arguments: &[&str]) -> Self {
        Self::launch(addr, &[], arguments)
    }

    fn launch(addr: &str, environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_groupstate"));
        command
            .args(["--grpc-addr", addr, "--http-addr", "127.0.0.1:0"])
            .args(["--log-format", "json"])
            .args(arguments)
            .env_clear()
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut process = Process::spawn(&mut command, "cargo builds it");
        let stderr = BufReader::new(process.child.stderr.take().unwrap());
        let log: Arc<Mutex<Vec<(Instant, String)>>> = Arc::default();
        let lines = log.clone();
        let reading = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                lines.lock().unwrap().push((Instant::now(), line));
            }
        });
        let mut service = Self {
            process,
            addr: String::new(),
            http_addr: String::new(),
            log,
            reading: Some(reading),
        };
        service.addr = service.wait_for_addr("serving gRPC");
        service.http_addr = service.wait_for_addr("serving HTTP");
        service
    }

    /// The address in the log line that says so.
    fn wait_for_addr(&self, line: &str) -> String {
        let serving = self.wait_for_log(line, Duration::from_secs(20));
        let event: serde_json::Value = serde_json::from_str(&serving).unwrap();
        event["addr"].as_str().unwrap().to_owned()
    }

    /// `host:port` of the gRPC server.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// `host:port` of the HTTP server.
    pub fn http_addr(&self) -> &str {
        &self.http_addr
    }

    /// What `/health` says.
    pub async fn health(&self) -> serde_json::Value {
        let reply = http::get(&self.http_addr, "/health", Duration::from_secs(2)).await;
        serde_json::from_str(&reply.unwrap().body).unwrap()
    }

    /// The value of a metric without labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let reply = http::get(&self.http_addr, "/metrics", Duration::from_secs(2)).await;
        let body = reply.unwrap().body;
        let name = format!("alert_history_business_grouping_{name}");
        let mut lines = body.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = lines
            .find(|(series, _)| *series == name)
            .unwrap_or_else(|| panic!("no {name} in {body}"));
        value.parse().unwrap()
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Whether the process is still there.
    pub fn is_running(&mut self) -> bool {
        self.process.child.try_wait().unwrap().is_none()
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// A client on a connection of its own.
    pub async fn client(&self) -> Client {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.addr)).unwrap();
        Client::new(endpoint.connect().await.unwrap())
    }

    /// The log so far.
    pub fn log(&self) -> Vec<String> {
        let log = self.log.lock().unwrap();
        log.iter().map(|(_, line)| line.clone()).collect()
    }

    /// The same with the moments at which the lines came: timestamps are of a clock that
    /// may have been moved.
    pub fn timed_log(&self) -> Vec<(Instant, String)> {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a line that contains `text`, and returns it.
    pub fn wait_for_log(&self, text: &str, bound: Duration) -> String {
        let bound = Bound::of(bound);
        loop {
            if let Some(line) = self.log().iter().find(|line| line.contains(text)) {
                return line.clone();
            }
            assert!(
                !bound.is_over(),
                "the log does not say {text:?} within {bound:?}: {:#?}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the process has ended and its log has been read to the end.
    pub fn wait_for_exit(&mut self, bound: Duration) -> ExitStatus {
        let bound = Bound::of(bound);
        loop {
            if let Some(status) = self.process.child.try_wait().unwrap() {
                if let Some(reading) = self.reading.take() {
                    reading.join().unwrap();
                }
                return status;
            }
            assert!(
                !bound.is_over(),
                "still running after {bound:?}: {:#?}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Memory that the process holds, in bytes (its resident set size).
    pub fn resident_bytes(&self) -> usize {
        self.memory("VmRSS:")
    }

    /// The most that it has held.
    pub fn most_resident_bytes(&self) -> usize {
        self.memory("VmHWM:")
    }

    fn memory(&self, what: &str) -> usize {
        let path = format!("/proc/{}/status", self.process.child.id());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find(|line| line.starts_with(what));
        let kib: usize = line
            .and_then(|line| line.split_whitespace().nth(1))
            .and_then(|kib| kib.parse().ok())
            .expect("Linux says it in KiB");
        kib * 1024
    }
}
