//! A replica as a process: `examples/alert_history_replica`.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;

use crate::common::{
    Process, example, free_address,
    http::{self, HttpReply},
    stalls::Bound,
};

/// A running replica.
pub struct Replica {
    process: Process,
    addr: String,
    services: Vec<String>,
    arguments: Vec<String>,
}

const BUILD: &str = "`cargo test` builds it, and so does `cargo build --examples`";

/// How long an answer may take. A change gets 10 s.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(15);

// === impl Replica ===

impl Replica {
    /// Starts a replica that knows these instances, and waits until it has
    /// restored its groups.
    pub async fn start(services: &[String]) -> Self {
        Self::start_with(services, &[]).await
    }

    /// The same with further arguments.
    pub async fn start_with(services: &[String], arguments: &[&str]) -> Self {
        let arguments: Vec<String> = arguments.iter().map(|&one| one.into()).collect();
        // Another process may take the port before the replica does.
        for _ in 0..10 {
            let addr = free_address().to_string();
            let mut replica = Self {
                process: spawn(&addr, services, &arguments),
                addr,
                services: services.to_vec(),
                arguments: arguments.clone(),
            };
            if replica.is_ready().await {
                return replica;
            }
        }
        panic!("the replica does not start");
    }

    /// `host:port` of its HTTP server.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// Ends it as by `kill -9`.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Ends it as Kubernetes would, and waits until it is gone.
    pub fn stop(&mut self) {
        self.process.signal("TERM");
        let status = self.process.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Starts it again at the same address.
    pub fn launch_again(&mut self) {
        self.process.kill();
        self.process = spawn(&self.addr, &self.services, &self.arguments);
    }

    /// Waits until it has restored its groups; false if it ended instead.
    pub async fn is_ready(&mut self) -> bool {
        let bound = Bound::of(Duration::from_secs(20));
        while !bound.is_over() {
            if self.process.child.try_wait().unwrap().is_some() {
                return false;
            }
            let reply = http::get(&self.addr, "/healthz", ANSWER_WITHIN).await;
            if reply.is_ok_and(|reply| reply.status == 200) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// Sends it a webhook, once; says with which status it answered, if it did.
    pub async fn receives(&self, webhook: &str) -> Option<u16> {
        let answer = self.answer(webhook).await;
        answer.map(|reply| reply.status)
    }

    /// What it answers to a webhook, if it does.
    pub async fn answer(&self, webhook: &str) -> Option<HttpReply> {
        let sent = http::send(&self.addr, "POST", "/webhook", webhook, ANSWER_WITHIN).await;
        sent.ok()
    }

    /// The process, to stop it or to see what it takes.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// What it answers on this path.
    pub async fn json(&self, path: &str) -> Value {
        let reply = http::get(&self.addr, path, ANSWER_WITHIN).await.unwrap();
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        serde_json::from_str(&reply.body).unwrap()
    }

    /// The value of a metric, by its name without the prefix, and its label if it has one.
    pub async fn metric(&self, name: &str) -> u64 {
        let reply = http::get(&self.addr, "/metrics", ANSWER_WITHIN).await;
        let body = reply.unwrap().body;
        let name = format!("alert_history_replica_{name}");
        let mut series = body.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = series
            .find(|(found, _)| *found == name)
            .unwrap_or_else(|| panic!("no {name} in {body}"));
        value.parse().unwrap()
    }
}

fn spawn(addr: &str, services: &[String], arguments: &[String]) -> Process {
    let mut command = Command::new(example("alert_history_replica"));
    command.args(["--listen", addr]).args(arguments);
    for service in services {
        command.args(["--groupstate", service]);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Process::spawn(&mut command, BUILD)
}
