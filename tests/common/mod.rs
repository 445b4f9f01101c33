//! Real servers for the tests: each test starts what it needs on a free port
//! and in a folder of its own, and it ends when the test ends.

#![allow(dead_code, reason = "each test binary uses some of the helpers")]

pub mod certificates;
pub mod condition;
pub mod examples;
pub mod fault_proxy;
pub mod faults;
pub mod http;
pub mod late_requests;
pub mod lossy_proxy;
pub mod prometheus;
pub mod proxy;
pub mod redis_cluster;
pub mod redis_sentinel;
pub mod redis_server;
pub mod redis_tls;
pub mod replicated;
pub mod resp;
pub mod service;
pub mod stalls;
pub mod wall_clock;

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use groupstate::domain::group::{
    Alert, AlertGroup, AlertStatus, GroupKey, GroupMetadata, GroupState, Time,
};
use rustix::process::{Pid, Signal, kill_process};

use self::stalls::Bound;

/// A child process that ends with this value.
pub struct Process {
    pub child: Child,
}

impl Process {
    /// Starts a program that the tests need; `install` is what to do if it is
    /// missing.
    pub fn spawn(command: &mut Command, install: &str) -> Self {
        pass_on_coverage(command);
        let child = command.spawn().unwrap_or_else(|error| {
            panic!(
                "cannot start {:?}: {error}; {install}",
                command.get_program()
            )
        });
        stalls::follow(child.id());
        Self { child }
    }

    /// Sends a signal by its name, such as `STOP`.
    pub fn signal(&self, name: &str) {
        let signal = match name {
            "CONT" => Signal::CONT,
            "HUP" => Signal::HUP,
            "INT" => Signal::INT,
            "STOP" => Signal::STOP,
            "TERM" => Signal::TERM,
            other => panic!("no signal {other} is used"),
        };
        let pid = i32::try_from(self.child.id()).unwrap();
        let sent = kill_process(Pid::from_raw(pid).unwrap(), signal);
        assert!(sent.is_ok(), "{name}: {sent:?}");
    }

    /// Ends the process at once and waits until it is gone.
    pub fn kill(&mut self) {
        stalls::leave(self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Under `make coverage`, what a process has run is written to a file: also when its
/// environment is otherwise its own, and `%c`, while it runs, for most are killed.
fn pass_on_coverage(command: &mut Command) {
    if let Ok(profile) = std::env::var("LLVM_PROFILE_FILE") {
        command.env("LLVM_PROFILE_FILE", profile.replace("%p", "%p%c"));
    }
}

/// An address on which nothing listens at the moment.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// A program that `make tools` has installed.
pub fn tool(path: &str) -> PathBuf {
    let tool = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(".tools")
        .join(path);
    assert!(
        tool.exists(),
        "{} is missing: run `make tools`",
        tool.display()
    );
    tool
}

/// An example of this package, which lies beside the folder of the test that
/// asks. `cargo test --test NAME` alone takes it as it was built last.
pub fn example(name: &str) -> PathBuf {
    let this_test = std::env::current_exe().unwrap();
    let profile = this_test.parent().unwrap().parent().unwrap();
    profile.join("examples").join(name)
}

/// Waits until `condition` holds, at most for a [`Bound`] of this length.
pub async fn wait_until<F: Future<Output = bool>>(
    what: &str,
    bound: Duration,
    mut condition: impl FnMut() -> F,
) {
    let bound = Bound::of(bound);
    while !condition().await {
        bound.assert_holds(what);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A group with one firing alert for each fingerprint.
pub fn group(key: &str, fingerprints: &[&str]) -> AlertGroup {
    AlertGroup {
        key: GroupKey::new(key).unwrap(),
        alerts: fingerprints
            .iter()
            .map(|fingerprint| (fingerprint.to_string(), alert(fingerprint)))
            .collect(),
        metadata: GroupMetadata {
            state: GroupState::Firing,
            created_at: Some(Time::parse_rfc3339("2026-11-23T05:28:03.070212258Z").unwrap()),
            firing_count: fingerprints.len() as i32,
            group_by: vec!["alertname".into()],
            ..GroupMetadata::default()
        },
    }
}

/// A firing alert with all fields set.
pub fn alert(fingerprint: &str) -> Alert {
    Alert {
        fingerprint: fingerprint.into(),
        alert_name: "HighCPU".into(),
        status: AlertStatus::Firing,
        labels: BTreeMap::from([("alertname".into(), "HighCPU".into())]),
        annotations: BTreeMap::from([("summary".into(), "CPU is \"high\" <80%> & rising".into())]),
        starts_at: Some(Time::parse_rfc3339("2026-11-23T05:00:00Z").unwrap()),
        ends_at: None,
        generator_url: "http://prometheus.example/graph?g0.expr=up".into(),
        timestamp: Some(Time::parse_rfc3339("2026-11-23T05:28:05.5Z").unwrap()),
    }
}
