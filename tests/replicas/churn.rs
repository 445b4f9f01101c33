//! A group in which alerts come and go, such as those of jobs whose name is new with
//! every run, while others always fire.

use std::{
    fs,
    time::{Duration, Instant},
};

use redis::{AsyncCommands, aio::MultiplexedConnection};
use serde_json::{Value, json};

use crate::{replica::Replica, site::Site};

const KEY: &str = "group:alertname=JobFailed";

/// Alerts that fire all the time.
const ALWAYS: usize = 20;
/// Alerts that come with each webhook; those of the one before are over.
const AT_ONCE: usize = 50;

/// What was seen of a run.
struct Seen {
    /// Bytes of the document, now and then.
    bytes: Vec<usize>,
    /// Memory of the replica, of the first and of the second instance, in KiB.
    resident: Vec<[u64; 3]>,
    took: Duration,
}

/// Lets so many alerts come and go, each webhook after the answer to the one before.
async fn churn(site: &Site, alerts: usize) -> Seen {
    let replica = &site.replicas[0];
    let mut redis = site.redis.connect().await;
    let rounds = alerts / AT_ONCE;
    let begin = Instant::now();
    let mut seen = Seen {
        bytes: Vec::new(),
        resident: Vec::new(),
        took: Duration::ZERO,
    };
    for round in 0..rounds {
        let reply = replica.answer(&webhook(round)).await.unwrap();
        assert_eq!(reply.status, 200, "{}", reply.body);
        let body: Value = serde_json::from_str(&reply.body).unwrap();
        assert_eq!(body["refused"], json!([]), "round {round}");
        if round % (rounds / 20).max(1) == 0 || round + 1 == rounds {
            seen.bytes.push(redis.strlen(KEY).await.unwrap());
            seen.resident.push(memory(site, replica));
            fires_as_it_should(&mut redis, round).await;
        }
    }
    seen.took = begin.elapsed();
    seen
}

async fn fires_as_it_should(redis: &mut MultiplexedConnection, round: usize) {
    let document: String = redis.get(KEY).await.unwrap();
    let group: Value = serde_json::from_str(&document).unwrap();
    assert_eq!(
        group["metadata"]["firing_count"],
        ALWAYS + AT_ONCE,
        "round {round}"
    );
}

fn webhook(round: usize) -> String {
    let now = groupstate::domain::group::Time::now().to_string();
    let alert = |job: String, status: &str| {
        json!({
            "status": status,
            "labels": {"alertname": "JobFailed", "job_name": job, "namespace": "batch"},
            "annotations": {"summary": format!("Job batch/{job} failed to complete."), "runbook_url": "https://runbooks.example/jobfailed"},
            "startsAt": now,
            "endsAt": if status == "resolved" { now.as_str() } else { "0001-01-01T00:00:00Z" },
            "generatorURL": "http://prometheus.example/graph?g0.expr=kube_job_failed",
        })
    };
    let always = (0..ALWAYS).map(|n| alert(format!("always-{n}"), "firing"));
    let job = |round: usize, n: usize| format!("backup-{}", round * AT_ONCE + n);
    let come = (0..AT_ONCE).map(|n| alert(job(round, n), "firing"));
    let over = round.checked_sub(1).into_iter();
    let over = over.flat_map(|before| (0..AT_ONCE).map(move |n| (before, n)));
    let over = over.map(|(before, n)| alert(job(before, n), "resolved"));
    let alerts: Vec<Value> = always.chain(come).chain(over).collect();
    json!({"version": "4", "groupLabels": {"alertname": "JobFailed"}, "alerts": alerts}).to_string()
}

fn memory(site: &Site, replica: &Replica) -> [u64; 3] {
    let processes = [
        replica.process(),
        site.services[0].process(),
        site.services[1].process(),
    ];
    processes.map(|process| {
        let status = fs::read_to_string(format!("/proc/{}/status", process.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        kib.and_then(|kib| kib.parse().ok())
            .expect("Linux says it in KiB")
    })
}

/// With a limit that would be reached after a few webhooks, and a retention that does not
/// help: what is over makes room, and nothing is refused.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_over_makes_room_for_what_fires() {
    let site = Site::start_with(1, &["--max-document-bytes", "65536"]).await;
    let seen = churn(&site, 1_500).await;
    assert!(
        seen.bytes.iter().all(|bytes| *bytes <= 65_536),
        "{:?}",
        seen.bytes
    );
    let replica = &site.replicas[0];
    assert!(
        replica
            .metric(r#"alerts_left_total{reason="crowded_out"}"#)
            .await
            > 1_000
    );
    assert_eq!(replica.metric(r#"webhooks_total{code="503"}"#).await, 0);
}

/// With a short retention the document stays small by itself.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_over_for_long_enough_leaves() {
    let site = Site::start_with(1, &["--resolved-retention", "0s"]).await;
    let seen = churn(&site, 1_000).await;
    let largest = seen.bytes.iter().max().unwrap();
    assert!(*largest < 100_000, "{:?}", seen.bytes);
    let left = site.replicas[0]
        .metric(r#"alerts_left_total{reason="resolved"}"#)
        .await;
    assert!(left > 800, "{left}");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: `make replicas`"]
async fn a_hundred_thousand_alerts_come_and_go() {
    long_churn(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: `make replicas`"]
async fn a_hundred_thousand_alerts_come_and_leave_soon() {
    long_churn(&["--resolved-retention", "5s"]).await;
}

async fn long_churn(arguments: &[&'static str]) {
    let site = Site::start_with(1, arguments).await;
    let seen = churn(&site, 100_000).await;
    println!("{arguments:?}: 100,000 alerts in {:.0?}", seen.took);
    println!("| % of the way | document, KiB | replica, MiB | instances, MiB |");
    println!("|---|---|---|---|");
    for (step, (bytes, resident)) in seen.bytes.iter().zip(&seen.resident).enumerate() {
        let [replica, one, other] = resident.map(|kib| kib / 1_024);
        println!(
            "| {} | {} | {replica} | {one}, {other} |",
            5 * step,
            bytes / 1_024
        );
    }
    // What fires takes less than 64 KiB.
    assert!(seen.bytes.iter().all(|bytes| *bytes <= (256 + 64) << 10));
    // Flat once it is warm: the second half takes no more than the first.
    let half = seen.resident.len() / 2;
    for process in 0..3 {
        let most = |part: &[[u64; 3]]| part.iter().map(|kib| kib[process]).max().unwrap();
        let first = most(&seen.resident[..half]);
        let second = most(&seen.resident[half..]);
        assert!(
            second <= first + first / 4 + 8_192,
            "{first} then {second} KiB"
        );
    }
}
