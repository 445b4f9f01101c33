//! Documents in Redis: those of the Go service, those that nobody can read,
//! and what ours look like to others.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::StreamExt;
use groupstate::{
    domain::{
        group::{AlertGroup, AlertStatus, GroupState, Time},
        version::Version,
    },
    store::{Deadline, Expiry, StoreError, Swap},
};
use redis::{AsyncCommands, aio::MultiplexedConnection};
use serde_json::Value;

use crate::{
    PATIENCE,
    common::{group, redis_server::RedisServer, wall_clock::WallClock},
    redis_store, store_at,
    suite::{HOUR, Store, get, key, put, swap},
};

/// Every line: what lies at which key, as the Go service writes it.
const GO_DOCUMENTS: &str = include_str!("../data/go-group-documents.jsonl");

fn go_documents() -> Vec<(String, String)> {
    let line = |line| {
        let line: Value = serde_json::from_str(line).unwrap();
        let text = |name: &str| line[name].as_str().unwrap().to_owned();
        (text("redis_key"), text("document"))
    };
    GO_DOCUMENTS.lines().map(line).collect()
}

async fn raw(connection: &mut MultiplexedConnection, name: &str) -> String {
    connection.get(format!("group:{name}")).await.unwrap()
}

async fn set_raw(connection: &mut MultiplexedConnection, name: &str, document: &str) {
    let () = connection
        .set(format!("group:{name}"), document)
        .await
        .unwrap();
}

fn error_of<T>(reply: groupstate::store::Reply<T>) -> StoreError {
    match reply {
        Ok(_) => panic!("no error"),
        Err(failure) => failure.error,
    }
}

/// Compares what was read with the document, field by field, as a reader that
/// knows nothing of our types.
fn assert_same(read: &AlertGroup, document: &Value) {
    assert_eq!(read.key.as_str(), document["key"]);
    let alerts = document["alerts"].as_object().cloned().unwrap_or_default();
    assert_eq!(read.alerts.len(), alerts.len());
    for (fingerprint, alert) in &alerts {
        let read = &read.alerts[fingerprint];
        assert_eq!(read.fingerprint, alert["fingerprint"]);
        assert_eq!(read.alert_name, alert["alert_name"]);
        let status = match read.status {
            AlertStatus::Firing => "firing",
            AlertStatus::Resolved => "resolved",
        };
        assert_eq!(status, alert["status"]);
        assert_eq!(read.labels, strings(&alert["labels"]));
        assert_eq!(read.annotations, strings(&alert["annotations"]));
        assert_eq!(
            read.generator_url,
            alert["generator_url"].as_str().unwrap_or_default()
        );
        for (time, name) in [
            (read.starts_at, "starts_at"),
            (read.ends_at, "ends_at"),
            (read.timestamp, "timestamp"),
        ] {
            assert_time(time, &alert[name]);
        }
    }
    let (read, metadata) = (&read.metadata, &document["metadata"]);
    let state = match read.state {
        GroupState::Firing => "firing",
        GroupState::Resolved => "resolved",
        GroupState::Mixed => "mixed",
        GroupState::Silenced => "silenced",
    };
    assert_eq!(state, metadata["state"]);
    for (time, name) in [
        (read.created_at, "created_at"),
        (read.updated_at, "updated_at"),
        (read.first_firing_at, "first_firing_at"),
        (read.resolved_at, "resolved_at"),
    ] {
        assert_time(time, &metadata[name]);
    }
    assert_eq!(read.firing_count, metadata["firing_count"]);
    assert_eq!(read.resolved_count, metadata["resolved_count"]);
    let group_by = metadata["group_by"].as_array().cloned().unwrap_or_default();
    assert_eq!(read.group_by, group_by);
    for (timer, name) in [
        (&read.group_wait_timer, "group_wait_timer"),
        (&read.group_interval_timer, "group_interval_timer"),
        (&read.repeat_interval_timer, "repeat_interval_timer"),
    ] {
        assert_eq!(timer.is_some(), metadata[name].is_object(), "{name}");
        if let Some(timer) = timer {
            let text = |field: &str| metadata[name][field].as_str().unwrap_or_default();
            assert_eq!(timer.version, metadata[name]["version"]);
            assert_eq!(timer.created_by, text("created_by"));
            assert_eq!(timer.reset_count, metadata[name]["reset_count"]);
            assert_eq!(timer.lock_id, text("lock_id"));
            assert_time(timer.last_reset_at, &metadata[name]["last_reset_at"]);
        }
    }
}

fn assert_time(read: Option<Time>, written: &Value) {
    let written = written
        .as_str()
        .map(|text| Time::parse_rfc3339(text).unwrap());
    assert_eq!(read, written);
}

fn strings(value: &Value) -> BTreeMap<String, String> {
    serde_json::from_value::<Option<_>>(value.clone())
        .unwrap()
        .unwrap_or_default()
}

#[tokio::test]
async fn what_go_writes_is_read_exactly() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    let documents = go_documents();
    assert_eq!(documents.len(), 54);
    for (redis_key, document) in &documents {
        let () = connection.set(redis_key, document).await.unwrap();
        let name = redis_key.strip_prefix("group:").unwrap();
        let read = get(&store, name).await.unwrap();
        let document: Value = serde_json::from_str(document).unwrap();
        assert_same(&read, &document);
        let outer = document["version"]
            .as_i64()
            .filter(|version| *version > 0)
            .unwrap_or(1);
        assert_eq!(
            read.metadata.version,
            Version::new(outer),
            "the outer version counts"
        );
    }
    let mut all = store.load_all("", Deadline::NONE).await.unwrap().value;
    let mut count = 0;
    while let Some(batch) = all.next().await {
        let batch = batch.unwrap();
        assert_eq!(batch.problems, []);
        count += batch.groups.len();
    }
    assert_eq!(count, 54);
}

#[tokio::test]
async fn what_go_wrote_is_stored_again_readable_for_go() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    for (redis_key, document) in go_documents() {
        let () = connection.set(&redis_key, &document).await.unwrap();
        let name = redis_key.strip_prefix("group:").unwrap();
        let read = get(&store, name).await.unwrap();
        let expected = read.metadata.version;
        if expected > Version::new(Version::MAX_RAISABLE) {
            continue; // refused: see below
        }
        let Swap::Swapped(written) = swap(&store, &read, expected).await else {
            panic!("lost: {name}");
        };

        let text = raw(&mut connection, name).await;
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_same(&read, &value);
        let version = written.version.get();
        assert_eq!(value["version"], version);
        assert_eq!(value["metadata"]["version"], version);
        assert!(text.ends_with(&format!(
            "\",\"version\":{version}}},\"version\":{version}}}"
        )));
        // Go writes into these maps and would panic on null.
        assert!(value["alerts"].is_object());
        for alert in value["alerts"].as_object().unwrap().values() {
            assert!(alert["labels"].is_object() && alert["annotations"].is_object());
            // Go's time.Time refuses an empty string; absent and RFC 3339 are well.
            for name in ["starts_at", "ends_at", "timestamp"] {
                assert!(
                    alert
                        .get(name)
                        .is_none_or(|time| { Time::parse_rfc3339(time.as_str().unwrap()).is_ok() })
                );
            }
        }
        let again = get(&store, name).await.unwrap();
        assert_same(&again, &value);
    }
}

#[tokio::test]
async fn redis_versions_are_multiples_of_sixteen_close_to_its_clock() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    let (seconds, micros): (i64, i64) = redis_time(&mut connection).await;
    let version = put(&store, &group("k", &[])).await.version.get();
    let (until, more): (i64, i64) = redis_time(&mut connection).await;
    assert_eq!(version % 16, 0);
    // A version is a multiple, rounded up.
    let times = seconds * 1_000_000 + micros..=until * 1_000_000 + more + 16;
    assert!(times.contains(&version), "{version} {times:?}");
}

async fn redis_time(connection: &mut MultiplexedConnection) -> (i64, i64) {
    redis::cmd("TIME").query_async(connection).await.unwrap()
}

#[tokio::test]
async fn a_version_ahead_of_the_clock_is_raised_by_the_least_step() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    let ahead = 9_000_000_000_000_003i64;
    let document = format!(r#"{{"key":"k","metadata":{{"state":"firing"}},"version":{ahead}}}"#);
    set_raw(&mut connection, "k", &document).await;
    let version = put(&store, &group("k", &[])).await.version.get();
    assert_eq!(version, 9_000_000_000_000_016);
}

#[tokio::test]
async fn create_only_does_not_overwrite_a_stored_version_zero() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    for document in [
        r#"{"key":"k","metadata":{"state":"firing"},"version":0}"#,
        r#"{"key":"k","metadata":{"state":"firing"}}"#,
        r#"{"key":"k","version":null,"metadata":{"state":"firing"}}"#,
    ] {
        set_raw(&mut connection, "k", document).await;
        let lost = swap(&store, &group("k", &["new"]), None).await;
        let Swap::Lost {
            current: Some(current),
        } = lost
        else {
            panic!("overwritten: {document}");
        };
        assert_eq!(current.metadata.version, Some(Version::FIRST));
        assert_eq!(raw(&mut connection, "k").await, document);
        // As version 1 it can be changed.
        let swapped = swap(&store, &group("k", &["new"]), Some(Version::FIRST)).await;
        assert!(matches!(swapped, Swap::Swapped(_)), "{swapped:?}");
    }
}

#[tokio::test]
async fn a_document_with_another_tail_has_a_version_too() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    for document in [
        r#"{"version":7,"key":"k","metadata":{"state":"firing"}}"#,
        "{\"key\":\"k\",\"metadata\":{\"state\":\"firing\"},\"version\":7}\n",
        r#"{"key":"k","metadata":{"state":"firing"}, "version": 7 }"#,
        // A key of a map that looks like the tail.
        r#"{"key":"k","version":7,"metadata":{"state":"firing"},"x\"version":9}"#,
    ] {
        set_raw(&mut connection, "k", document).await;
        let read = get(&store, "k").await.unwrap();
        assert_eq!(read.metadata.version, Version::new(7), "{document}");
        let lost = swap(&store, &group("k", &[]), Version::new(9)).await;
        assert!(
            matches!(lost, Swap::Lost { current: Some(_) }),
            "{document}"
        );
        let swapped = swap(&store, &group("k", &[]), Version::new(7)).await;
        assert!(matches!(swapped, Swap::Swapped(_)), "{document}");
    }
}

#[tokio::test]
async fn an_unreadable_document_stays_until_it_is_replaced_or_removed() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    for document in [
        "",
        "not JSON",
        "{\"key\":\"k\",\"alerts\":{",
        "[1,2]",
        "5",
        "\"version\":7}",
    ] {
        set_raw(&mut connection, "k", document).await;
        let load = store.load(&key("k"), false, Deadline::NONE).await;
        let StoreError::Unreadable(why) = error_of(load) else {
            panic!("read: {document}");
        };
        assert_eq!(why.bytes, document.len());
        let with_expiry = store.load(&key("k"), true, Deadline::NONE).await;
        assert!(matches!(error_of(with_expiry), StoreError::Unreadable(_)));
        for expected in [None, Version::new(8)] {
            let swapped = store
                .compare_and_swap(&group("k", &[]), expected, HOUR, Deadline::NONE)
                .await;
            assert!(
                matches!(error_of(swapped), StoreError::Unreadable(_)),
                "{document}"
            );
        }
        if document != "\"version\":7}" {
            let deleted = store
                .delete(&key("k"), Version::new(8), Deadline::NONE)
                .await;
            assert!(
                matches!(error_of(deleted), StoreError::Unreadable(_)),
                "{document}"
            );
        }
        assert_eq!(raw(&mut connection, "k").await, document, "left as it is");

        let deleted = store.delete(&key("k"), None, Deadline::NONE).await.unwrap();
        assert!(deleted.value.deleted);
        set_raw(&mut connection, "k", document).await;
        put(&store, &group("k", &["new"])).await;
        assert!(get(&store, "k").await.unwrap().alerts.contains_key("new"));
    }
}

#[tokio::test]
async fn a_value_of_another_type_is_left_alone() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    let () = connection.zadd("group:k", "member", 1).await.unwrap();
    let version = Version::new(7);
    let name = key("k");
    let new = group("k", &[]);
    for error in [
        error_of(store.load(&name, false, Deadline::NONE).await),
        error_of(store.load(&name, true, Deadline::NONE).await),
        error_of(store.store(&new, HOUR, Deadline::NONE).await),
        error_of(
            store
                .compare_and_swap(&new, None, HOUR, Deadline::NONE)
                .await,
        ),
        error_of(
            store
                .compare_and_swap(&new, version, HOUR, Deadline::NONE)
                .await,
        ),
        error_of(store.delete(&name, None, Deadline::NONE).await),
        error_of(store.delete(&name, version, Deadline::NONE).await),
    ] {
        assert_eq!(error, StoreError::ForeignType);
    }
    let members: Vec<String> = connection.zrange("group:k", 0, -1).await.unwrap();
    assert_eq!(members, ["member"]);
    assert_eq!(store.size("", Deadline::NONE).await.unwrap().value, 0);
}

#[tokio::test]
async fn a_version_beyond_two_to_the_53_is_read_and_not_raised() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    for stored in [9_007_199_254_740_993i64, i64::MAX] {
        let document =
            format!(r#"{{"key":"k","metadata":{{"state":"firing"}},"version":{stored}}}"#);
        set_raw(&mut connection, "k", &document).await;
        let expected = Version::new(stored);
        assert_eq!(get(&store, "k").await.unwrap().metadata.version, expected);

        let new = group("k", &["new"]);
        let refused = StoreError::VersionOutOfRange(stored.to_string());
        let stored_error = store.store(&new, HOUR, Deadline::NONE).await;
        assert_eq!(error_of(stored_error), refused);
        let swapped = store
            .compare_and_swap(&new, expected, HOUR, Deadline::NONE)
            .await;
        assert_eq!(error_of(swapped), refused);
        // Nothing is rounded: its neighbour is another version.
        let neighbour = Version::new(stored - 1);
        let lost = swap(&store, &new, neighbour).await;
        assert!(matches!(lost, Swap::Lost { current: Some(_) }), "{lost:?}");
        let deletion = store.delete(&key("k"), neighbour, Deadline::NONE).await;
        assert!(!deletion.unwrap().value.deleted);
        assert_eq!(raw(&mut connection, "k").await, document);
        let deletion = store.delete(&key("k"), expected, Deadline::NONE).await;
        assert!(deletion.unwrap().value.deleted);
    }
}

/// Versions of a group that is written often run ahead of the clock; a group
/// that is created after a delete must not begin below that.
#[tokio::test]
async fn a_version_that_is_ahead_of_the_clock_does_not_come_back_after_a_delete() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    for _ in 0..20 {
        let time: (i64, i64) = redis::cmd("TIME")
            .query_async(&mut connection)
            .await
            .unwrap();
        let ahead = (time.0 * 1_000_000 + time.1) / 16 * 16 + 16_000;
        let document =
            format!(r#"{{"key":"k","metadata":{{"state":"firing"}},"version":{ahead}}}"#);
        set_raw(&mut connection, "k", &document).await;
        let deletion = store.delete(&key("k"), None, Deadline::NONE).await.unwrap();
        assert_eq!(deletion.value.version, Version::new(ahead));
        let created = put(&store, &group("k", &[])).await;
        assert!(created.version.get() > ahead, "{created:?}");
    }
}

#[tokio::test]
async fn versions_do_not_go_back_with_the_clock_of_redis() {
    let clock = Arc::new(WallClock::new());
    let server = RedisServer::start_by(&clock, &[]).await;
    let store = store_at(&server.url(), PATIENCE).await;
    let before = put(&store, &group("k", &[])).await;
    for round in 0..5 {
        clock.move_by(-500);
        store.delete(&key("k"), None, Deadline::NONE).await.unwrap();
        let created = put(&store, &group("k", &[])).await;
        assert!(created.version > before.version, "{round}: {created:?}");
    }
}

#[tokio::test]
async fn time_to_live_is_exact_to_the_millisecond() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    for millis in [1_000, 1_234, 86_400_001] {
        let expiry = Expiry::After(Duration::from_millis(millis));
        let begin = std::time::Instant::now();
        let written = store.store(&group("k", &[]), expiry, Deadline::NONE).await;
        let told = written.unwrap().value.expires.unwrap().at.millis();
        // `PEXPIRETIME`, which Redis 6 does not have.
        let real: i64 = redis::cmd("EVAL")
            .arg(
                "local time = redis.call('TIME')
                 local now = time[1] * 1000 + math.floor(time[2] / 1000)
                 return now + redis.call('PTTL', KEYS[1])",
            )
            .arg(&["1", "group:k"])
            .query_async(&mut connection)
            .await
            .unwrap();
        // Scripts read the clock at another moment than Redis does.
        assert!((-1..=1).contains(&(real - told)), "{}", real - told);
        let left: u64 = connection.pttl("group:k").await.unwrap();
        let passed = begin.elapsed().as_millis() as u64;
        assert!((millis - passed - 1..=millis).contains(&left), "{left}");
    }
}

#[tokio::test]
async fn a_group_that_another_writer_stored_without_expiry_gets_the_default() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    let (redis_key, document) = go_documents().remove(0);
    let name = redis_key.strip_prefix("group:").unwrap();
    set_raw(&mut connection, name, &document).await;
    let stored = store.load(&key(name), true, Deadline::NONE).await.unwrap();
    let stored = stored.value.unwrap();
    assert_eq!(stored.expires, None, "it never expires");
    let keep = Expiry::Keep {
        otherwise: Duration::from_secs(100),
    };
    store
        .store(&stored.group, keep, Deadline::NONE)
        .await
        .unwrap();
    let left: i64 = connection.ttl(redis_key).await.unwrap();
    assert!((90..=100).contains(&left), "{left}");
}

#[tokio::test]
async fn a_version_does_not_come_back_after_a_flush() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    let before = put(&store, &group("k", &["a"])).await.version;
    let () = redis::cmd("FLUSHALL")
        .query_async(&mut connection)
        .await
        .unwrap();
    let after = put(&store, &group("k", &["b"])).await.version;
    assert!(after > before);
    let stale = swap(&store, &group("k", &["stale"]), Some(before)).await;
    assert!(
        matches!(stale, Swap::Lost { current: Some(_) }),
        "{stale:?}"
    );
}

#[tokio::test]
async fn forgotten_scripts_are_loaded_again() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    let flush = async |connection: &mut MultiplexedConnection| {
        let () = redis::cmd("SCRIPT")
            .arg("FLUSH")
            .query_async(connection)
            .await
            .unwrap();
    };
    put(&store, &group("k", &["a"])).await;
    flush(&mut connection).await;
    put(&store, &group("k", &["b"])).await;
    flush(&mut connection).await;
    let groups: Vec<_> = (0..150).map(|i| group(&format!("k/{i}"), &[])).collect();
    for reply in store.store_all(&groups, HOUR, Deadline::NONE).await {
        reply.unwrap();
    }
    flush(&mut connection).await;
    assert!(
        store
            .delete(&key("k"), None, Deadline::NONE)
            .await
            .unwrap()
            .value
            .deleted
    );
    flush(&mut connection).await;
    assert!(
        store
            .load(&key("k/1"), true, Deadline::NONE)
            .await
            .unwrap()
            .value
            .is_some()
    );
}

#[tokio::test]
async fn load_all_reports_what_it_cannot_read_and_reads_the_rest() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    put(&store, &group("good", &["a"])).await;
    set_raw(&mut connection, "bad", "{").await;
    set_raw(&mut connection, "", "x").await;
    set_raw(&mut connection, "large", &"x".repeat(2 << 20)).await;
    set_raw(&mut connection, "\u{1}probe:x", "ours").await;
    let () = connection.set(b"group:\xff", "x").await.unwrap();
    let () = connection.zadd("group:index", "member", 1).await.unwrap();

    let (groups, mut problems) = load_all(&store).await;
    assert_eq!(groups.len(), 1);
    problems.sort_by(|a, b| a.0.cmp(&b.0));
    let names: Vec<_> = problems.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["", "bad", "large", "\u{fffd}"]);
    assert!(matches!(problems[1].1, StoreError::Unreadable(_)));
    assert!(matches!(
        problems[2].1,
        StoreError::StoredValueTooLarge { .. }
    ));
}

async fn load_all(store: &Store) -> (Vec<AlertGroup>, Vec<(String, StoreError)>) {
    let mut all = store.load_all("", Deadline::NONE).await.unwrap().value;
    let (mut groups, mut problems) = (Vec::new(), Vec::new());
    while let Some(batch) = all.next().await {
        let batch = batch.unwrap();
        groups.extend(batch.groups);
        problems.extend(
            batch
                .problems
                .into_iter()
                .map(|problem| (problem.key, problem.error)),
        );
    }
    (groups, problems)
}
