//! Use cases of the product, step by step. A third one, of the time that a group
//! lives, is in `tests/manager/main.rs`.

use std::{collections::BTreeMap, process::Command, time::Duration};

use groupstate::domain::group::Time;
use redis::AsyncCommands;
use serde_json::{Value, json};

use crate::{common::wait_until, replica::Replica, site::Site};

const KEY: &str = "alertname=HighCPU,cluster=prod";

/// Longer than anything takes that is not waited for on purpose.
const SOON: Duration = Duration::from_secs(20);

/// Two replicas, one group; one crashes, and its successor restores.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_crashes_and_its_successor_has_the_group() {
    let mut site = Site::start(2).await;
    // Both report at the same moment: one group, not two fragments of it.
    let (one, other) = (webhook("a", "firing"), webhook("b", "firing"));
    let (one, other) = tokio::join!(
        site.replicas[0].receives(&one),
        site.replicas[1].receives(&other)
    );
    assert_eq!((one, other), (Some(200), Some(200)));
    assert_eq!(alerts(&site.replicas[1], KEY).await, ["a", "b"]);

    site.replicas[0].kill();
    let successor = Replica::start(&site.addresses()).await;
    site.replicas[0] = successor;
    // It knows the group before it is sent anything.
    let listed = site.replicas[0].json("/groups").await;
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(fingerprints(&listed[0]), ["a", "b"]);

    let resolved = site.replicas[0].receives(&webhook("a", "resolved")).await;
    assert_eq!(resolved, Some(200));
    let group = site.replicas[1].json(&format!("/group?key={KEY}")).await;
    assert_eq!(group["metadata"]["state"], "mixed");
}

/// Redis is lost and restored. Alerting goes on meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn redis_is_lost_and_restored() {
    let mut site = Site::start(2).await;
    let received = site.replicas[0]
        .receives(&webhook("before", "firing"))
        .await;
    assert_eq!(received, Some(200));

    site.redis.kill();
    let received = site.replicas[0]
        .receives(&webhook("during", "firing"))
        .await;
    assert_eq!(received, Some(200));
    // The other replica sees it: both use the same instance for this group.
    assert_eq!(alerts(&site.replicas[1], KEY).await, ["before", "during"]);
    site.are("degraded").await;
    assert_eq!(site.replicas[0].metric("outbox_reports").await, 1);

    site.redis.restart().await;
    site.settled().await;
    let received = site.replicas[1].receives(&webhook("after", "firing")).await;
    assert_eq!(received, Some(200));
    let mut redis = site.redis.connect().await;
    let document: String = redis.get(format!("group:{KEY}")).await.unwrap();
    let group = serde_json::from_str(&document).unwrap();
    assert_eq!(fingerprints(&group), ["after", "before", "during"]);
}

/// An old "firing" that waited in the sockets of a stopped replica must not come after
/// the "resolved" that the other one got in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_was_stopped_sends_back_what_it_had_received_before() {
    let site = Site::start_with(2, &["--sender-timeout", "2s"]).await;
    let [stopped, other] = &site.replicas[..] else {
        panic!("two replicas");
    };
    stopped.process().signal("STOP");
    let firing = webhook("a", "firing");
    let late = stopped.receives(&firing);
    let meanwhile = async {
        is_taken(other, &firing).await;
        is_taken(other, &webhook("a", "resolved")).await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        stopped.process().signal("CONT");
    };
    let (late, ()) = tokio::join!(late, meanwhile);
    assert_eq!(late, Some(503));
    let group = other.json(&format!("/group?key={KEY}")).await;
    assert_eq!(group["metadata"]["state"], "resolved");
    assert!(stopped.metric(r#"webhooks_total{code="503"}"#).await >= 1);
    // A moment later it takes what it is sent.
    is_taken(stopped, &webhook("b", "firing")).await;
    assert_eq!(alerts(other, KEY).await, ["a", "b"]);
}

/// The block marked `<!-- replica -->`, and what it says.
#[tokio::test(flavor = "multi_thread")]
async fn the_commands_of_the_readme_answer_what_it_shows() {
    let site = Site::start(1).await;
    let folder = env!("CARGO_MANIFEST_DIR");
    let readme = std::fs::read_to_string(format!("{folder}/README.md")).unwrap();
    let (_, marked) = readme.split_once("<!-- replica -->\n```sh\n").unwrap();
    let (commands, rest) = marked.split_once("```").unwrap();
    let (shown, _) = rest
        .trim_start()
        .trim_start_matches("```text\n")
        .split_once("```")
        .unwrap();
    let commands = commands.replace("localhost:8080", site.replicas[0].addr());
    let output = Command::new("bash")
        .args(["-c", &commands])
        .current_dir(folder)
        .output()
        .expect("bash is there: install bash, and curl");
    let output = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output, shown, "{commands}");
}

/// Sends a webhook until it is taken: on a busy machine a replica may be held up for so
/// long that it takes itself for stopped.
async fn is_taken(replica: &Replica, webhook: &str) {
    wait_until("the webhook is taken", SOON, async || {
        replica.receives(webhook).await == Some(200)
    })
    .await;
}

async fn alerts(replica: &Replica, key: &str) -> Vec<String> {
    fingerprints(&replica.json(&format!("/group?key={key}")).await)
}

/// In their order.
fn fingerprints(group: &Value) -> Vec<String> {
    let alerts: BTreeMap<_, _> = group["alerts"].as_object().unwrap().iter().collect();
    alerts.into_keys().cloned().collect()
}

/// A webhook about one alert.
fn webhook(fingerprint: &str, status: &str) -> String {
    let labels = json!({"alertname": "HighCPU", "cluster": "prod"});
    let began = "2026-11-23T05:00:00Z";
    let ends = match status {
        "resolved" => Time::now().to_string(),
        _ => "0001-01-01T00:00:00Z".into(),
    };
    json!({
        "version": "4",
        "groupLabels": labels,
        "alerts": [{
            "fingerprint": fingerprint,
            "status": status,
            "labels": labels,
            "annotations": {},
            "startsAt": began,
            "endsAt": ends,
            "generatorURL": "",
        }],
    })
    .to_string()
}
