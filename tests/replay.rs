//! The main job on real input: `examples/replay.rs` against the service.
//!
//! The example is run as a process, as a user would; what it prints is what is
//! asserted, and where it matters the service is asked as well.

mod common;

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    process::{Command, Stdio},
    time::Duration,
};

use common::{
    Process, example, free_address,
    redis_server::RedisServer,
    service::{Client, Service},
    wait_until,
};
use groupstate::grpc::proto::{
    self as pb,
    AlertStatus::{Firing, Resolved},
};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

/// A running replay.
struct Replay {
    process: Process,
}

/// How a replay ended and what it printed.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    output: String,
    errors: String,
}

/// One alert of a made-up webhook.
#[derive(Clone, Copy)]
struct Report {
    fingerprint: &'static str,
    status: &'static str,
    minute: u32,
    summary: &'static str,
}

const BUILD: &str = "`cargo test` builds it, and so does `cargo build --example replay`";

#[tokio::test]
async fn three_replicas_share_the_recorded_webhooks_in_memory_and_lose_no_alert() {
    let service = Service::start(&[]);
    Replay::start(service.addr(), &[]).ended().is_whole();
}

#[tokio::test]
async fn three_replicas_meet_in_the_same_groups_on_redis_and_lose_no_alert() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);

    let first = Replay::start(service.addr(), &[]).ended();
    first.is_whole();
    assert!(first.number("conflicts") > 0, "{first:?}");

    let second = Replay::start(service.addr(), &[]).ended();
    second.is_whole();
    assert_eq!(second.number("changes"), 0, "{second:?}");
}

#[tokio::test]
async fn the_service_is_killed_in_the_middle_of_a_replay_and_no_alert_is_lost() {
    let redis = RedisServer::start().await;
    let redis_url = redis.url();
    let settings = ["--redis-url", &redis_url];
    let service = Service::start(&settings);
    let addr = service.addr().to_owned();

    let mut interrupted = Replay::start(&addr, &[]);
    kill_in_the_middle(service, &redis).await;
    assert!(interrupted.is_running(), "it ended before the kill");
    let service = Service::start_on(&addr, &settings);

    // It sits the restart out: what had no answer is tried again.
    let interrupted = interrupted.ended();
    interrupted.is_whole();
    assert!(interrupted.number("failures") > 0, "{interrupted:?}");

    // Nothing is left to do for another: what was answered had been stored.
    let again = Replay::start(service.addr(), &[]).ended();
    again.is_whole();
    assert_eq!(again.number("changes"), 0, "{again:?}");
}

#[tokio::test]
async fn a_replay_fails_when_the_service_stays_away_and_another_one_completes_it() {
    let redis = RedisServer::start().await;
    let redis_url = redis.url();
    let settings = ["--redis-url", &redis_url];
    let service = Service::start(&settings);

    let interrupted = Replay::start(service.addr(), &[]);
    kill_in_the_middle(service, &redis).await;
    let interrupted = interrupted.ended();
    assert_eq!(interrupted.code, Some(1), "{interrupted:?}");
    assert!(
        interrupted.errors.contains("given up after"),
        "{interrupted:?}"
    );

    let service = Service::start(&settings);
    let again = Replay::start(service.addr(), &[]).ended();
    again.is_whole();
    assert!(again.number("changes") > 0, "{again:?}");
}

#[tokio::test]
async fn groups_of_others_are_left_alone() {
    let service = Service::start(&[]);
    let reports = [report("a1", "firing", 1)];
    let others = webhooks(&[webhook(&[("a", "others")], &reports)]);
    Replay::of(&others, &service).ended().is_ok();
    let mut client = service.client().await;
    let before = load(&mut client, "a=others").await;

    let ours = webhooks(&[webhook(&[("a", "ours")], &reports)]);
    let ended = Replay::of(&ours, &service).ended();

    ended.is_ok();
    assert_eq!(ended.number("groups"), 1, "{ended:?}");
    assert_eq!(load(&mut client, "a=others").await, before);
}

#[tokio::test]
async fn the_check_finds_an_alert_that_is_not_in_the_file() {
    let service = Service::start(&[]);
    let labels = [("a", "x")];
    let one = report("a1", "firing", 1);
    let other = report("a2", "firing", 1);
    let both = webhooks(&[webhook(&labels, &[one, other])]);
    Replay::of(&both, &service).ended().is_ok();

    let only_one = webhooks(&[webhook(&labels, &[one])]);
    let ended = Replay::of(&only_one, &service).ended();

    assert_eq!(ended.code, Some(1), "{ended:?}");
    let differences = "check: 2 differences\n\
        \x20 group \"a=x\": alert a2 is not in the file\n\
        \x20 group \"a=x\": state and counts are (Firing, 2, 0), not (Firing, 1, 0)\n";
    assert!(ended.output.ends_with(differences), "{ended:?}");
}

#[tokio::test]
async fn the_report_that_was_received_last_counts_whenever_its_alert_began() {
    let service = Service::start(&[]);
    let reports = [
        // A second Prometheus that fired earlier is heard later; then it is over.
        report("goes back", "firing", 2),
        report("goes back", "firing", 1),
        report("goes back", "resolved", 1),
        // It ended and fires again.
        report("again", "firing", 1),
        report("again", "resolved", 1),
        report("again", "firing", 2),
        // The same alert twice, with another annotation the second time.
        report("twice", "firing", 1),
        Report {
            summary: "second",
            ..report("twice", "firing", 1)
        },
    ];
    let labels = [("a", "x")];
    let in_turn: Vec<Value> = reports
        .map(|report| webhook(&labels, &[report]))
        .into_iter()
        .collect();
    let file = webhooks(&in_turn);

    Replay::of(&file, &service).ended().is_ok();

    let group = load(&mut service.client().await, "a=x").await;
    let alert = |fingerprint: &str| {
        let alert = &group.alerts[fingerprint];
        let summary = alert.annotations["summary"].as_str();
        (alert.status(), alert.starts_at.unwrap().seconds, summary)
    };
    assert_eq!(alert("goes back"), (Resolved, at_minute(1), "first"));
    assert_eq!(alert("again"), (Firing, at_minute(2), "first"));
    assert_eq!(alert("twice"), (Firing, at_minute(1), "second"));
    let metadata = group.metadata.as_ref().unwrap();
    assert_eq!(metadata.state(), pb::GroupState::Mixed);
    assert_eq!((metadata.firing_count, metadata.resolved_count), (2, 1));
    assert_eq!(metadata.first_firing_at.unwrap().seconds, at_minute(1));
    assert_eq!(metadata.group_by, ["a"]);
}

/// The vectors that the Go service agrees with, as far as a webhook can have
/// them: its group labels are all there.
#[tokio::test]
async fn group_keys_are_those_of_the_go_service() {
    let vectors: [(&[(&str, &str)], &str); 9] = [
        (&[], "{global}"),
        (
            &[("cluster", "prod"), ("alertname", "HighCPU")],
            "alertname=HighCPU,cluster=prod",
        ),
        (&[("a", "")], "a="),
        (&[("a", "<missing>")], "a=<missing>"),
        (&[("a", "10.0.0.1:9100")], "a=10.0.0.1:9100"),
        (&[("a", "50%/path&q")], "a=50%/path&q"),
        (&[("a", "x,y=z")], "a=x%2Cy%3Dz"),
        (&[("a", "café 🔥")], "a=caf%C3%A9+%F0%9F%94%A5"),
        (&[("a", "<b>[c]{d}~_-.")], "a=%3Cb%3E%5Bc%5D%7Bd%7D~_-."),
    ];
    let service = Service::start(&[]);
    let file = webhooks(&vectors.map(|(labels, _)| webhook(labels, &[report("a1", "firing", 1)])));

    Replay::of(&file, &service).ended().is_ok();

    let request = pb::ListKeysRequest::default();
    let reply = service.client().await.list_keys(request).await.unwrap();
    let mut found = reply.into_inner().keys;
    let mut expected = vectors.map(|(_, key)| key.to_owned());
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn without_a_service_the_replay_says_so_in_one_line() {
    let addr = free_address().to_string();
    let ended = Replay::start(&addr, &[]).ended();
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let error = format!("error: --addr {addr}: tcp connect error: Connection refused");
    assert!(ended.errors.starts_with(&error), "{ended:?}");
    assert_eq!(ended.errors.lines().count(), 1, "{ended:?}");
}

// === impl Replay ===

impl Replay {
    fn start(addr: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(example("replay"));
        command
            .args(["--addr", addr])
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self {
            process: Process::spawn(&mut command, BUILD),
        }
    }

    /// With made-up webhooks.
    fn of(file: &NamedTempFile, service: &Service) -> Self {
        let path = file.path().to_str().unwrap();
        Self::start(service.addr(), &["--file", path])
    }

    fn is_running(&mut self) -> bool {
        self.process.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end. It prints less than a pipe holds.
    fn ended(mut self) -> Ended {
        let child = &mut self.process.child;
        let code = child.wait().unwrap().code();
        let (mut output, mut errors) = (String::new(), String::new());
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        stdout.read_to_string(&mut output).unwrap();
        stderr.read_to_string(&mut errors).unwrap();
        Ended {
            code,
            output,
            errors,
        }
    }
}

impl Ended {
    /// The groups are as the file says.
    fn is_ok(&self) {
        assert_eq!(self.code, Some(0), "{self:?}");
        assert!(self.output.ends_with("check: ok\n"), "{self:?}");
    }

    /// All recorded groups hold exactly their alerts.
    fn is_whole(&self) {
        self.is_ok();
        assert_eq!(self.number("groups"), 278, "{self:?}");
        assert_eq!(self.number("alerts"), 1_112, "{self:?}");
    }

    /// What it printed under this name.
    fn number(&self, name: &str) -> u64 {
        let facts: BTreeMap<&str, &str> = self
            .output
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, value)| (name, value.trim()))
            .collect();
        facts
            .get(name)
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("no number {name:?}: {self:?}"))
    }
}

// === made-up webhooks ===

/// A report on an alert that began to fire at this minute of a day.
fn report(fingerprint: &'static str, status: &'static str, minute: u32) -> Report {
    Report {
        fingerprint,
        status,
        minute,
        summary: "first",
    }
}

/// A webhook as Alertmanager sends it, as far as the replay reads it.
fn webhook(group_labels: &[(&str, &str)], reports: &[Report]) -> Value {
    let group_labels: BTreeMap<_, _> = group_labels.iter().copied().collect();
    let alerts = reports.iter().map(|report| {
        let mut labels = group_labels.clone();
        labels.insert("instance", report.fingerprint);
        json!({
            "fingerprint": report.fingerprint,
            "status": report.status,
            "labels": labels,
            "annotations": {"summary": report.summary},
            "startsAt": format!("2026-11-23T00:{:02}:00Z", report.minute),
            "endsAt": match report.status {
                "resolved" => "2026-11-23T01:00:00Z",
                _ => "0001-01-01T00:00:00Z",
            },
            "generatorURL": "",
        })
    });
    json!({
        "version": "4",
        "groupLabels": group_labels,
        "alerts": alerts.collect::<Vec<_>>(),
    })
}

/// A file of webhooks.
fn webhooks(webhooks: &[Value]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    for webhook in webhooks {
        writeln!(file, "{webhook}").unwrap();
    }
    file
}

/// That minute in seconds since 1970.
fn at_minute(minute: i64) -> i64 {
    1_795_392_000 + 60 * minute
}

// === calls ===

/// Kills the service as soon as 100 of the 278 groups are stored.
async fn kill_in_the_middle(mut service: Service, redis: &RedisServer) {
    let client = service.client().await;
    wait_until("100 groups", Duration::from_secs(60), || {
        let mut client = client.clone();
        async move { size(&mut client).await >= 100 }
    })
    .await;
    service.kill();

    let mut redis = redis.connect().await;
    let stored: i64 = redis::cmd("DBSIZE").query_async(&mut redis).await.unwrap();
    assert!((100..278).contains(&stored), "{stored} groups");
}

async fn load(client: &mut Client, key: &str) -> pb::AlertGroup {
    let request = pb::LoadRequest {
        key: key.into(),
        include_expire_time: false,
    };
    client
        .load(request)
        .await
        .unwrap()
        .into_inner()
        .group
        .unwrap()
}

async fn size(client: &mut Client) -> i64 {
    let request = pb::SizeRequest::default();
    client.size(request).await.unwrap().into_inner().count
}
