//! Large values: they make neither Redis look dead nor anybody else wait, and no
//! more of them is read than a document may have.

use std::time::{Duration, Instant};

use futures::future::join_all;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::*;

/// As a call of the service shows itself after a fault that was none.
async fn assert_nothing_happened(scene: &Scene) {
    let health = scene.service.health().await;
    assert_eq!(health["switch"]["state"], "closed", "{health}");
    for metric in ["degraded_writes_discarded_total", "storage_recovery_total"] {
        assert_eq!(scene.service.metric(metric).await, 0.0, "{metric}");
    }
    let log = scene.service.log();
    let unrest = [
        "Switched to in-memory",
        "no connection to Redis",
        "is replaced",
    ];
    let found = log
        .iter()
        .find(|line| unrest.iter().any(|text| line.contains(text)));
    assert_eq!(found, None);
}

/// A group of about so many bytes.
fn group_of(key: &str, bytes: usize) -> pb::AlertGroup {
    let mut group = group(key, &["a"]);
    for alert in group.alerts.values_mut() {
        alert
            .annotations
            .insert("runbook".into(), "x".repeat(bytes));
    }
    group
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_of_a_large_group_leave_redis_well() {
    loads_beside_a_writer(200).await;
}

/// Run by `make abuse`, since what a build without optimization takes for a document
/// of this size would be all that is measured.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures a build with optimization"]
async fn a_thousand_loads_of_a_large_group_leave_others_quick() {
    let mut writes = loads_beside_a_writer(1_000).await;
    writes.sort();
    let p99 = writes[writes.len() * 99 / 100];
    let most = writes[writes.len() - 1];
    println!(
        "{} honest writes: p99 {p99:?}, longest {most:?}",
        writes.len()
    );
    assert!(p99 < Duration::from_millis(100), "{p99:?}");
}

/// Loads a group of 1 MB so many times at once, on one connection. How long the writes
/// of another client took meanwhile.
async fn loads_beside_a_writer(loads: usize) -> Vec<Duration> {
    let mut scene = Scene::new(&[]).await;
    let request = pb::StoreRequest {
        group: Some(group_of("large", 1_000_000)),
        expiry: None,
    };
    let stored = scene.client.store(request).await.unwrap().into_inner();
    assert_eq!(stored.backend, REDIS);
    // Of a connection of its own, and so on one caller's account.
    let mut greedy = scene
        .service
        .client()
        .await
        .max_decoding_message_size(8 << 20);
    greedy.size(pb::SizeRequest::default()).await.unwrap();
    let loads = tokio::spawn(join_all((0..loads).map(|_| {
        let mut greedy = greedy.clone();
        async move {
            load(&mut greedy, "large")
                .await
                .map(|loaded| loaded.backend)
        }
    })));
    let (mut writes, mut acknowledged) = (Vec::new(), 0);
    while !loads.is_finished() {
        let begin = Instant::now();
        let request = pb::StoreRequest {
            group: Some(group(&format!("small/{}", writes.len()), &["a"])),
            expiry: None,
        };
        match scene.client.store(request).await {
            Ok(stored) => {
                let backend = stored.into_inner().backend;
                assert_eq!(backend, REDIS, "{:#?}", scene.service.log());
                acknowledged += 1;
            }
            // The service had no time for it.
            Err(status) => assert_eq!(reason(&status), "OUTCOME_UNKNOWN", "{status}"),
        }
        writes.push(begin.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for loaded in loads.await.unwrap() {
        match loaded {
            Ok(backend) => assert_eq!(backend, REDIS),
            // Each waits for the others of its own caller.
            Err(status) => assert!(
                ["OVERLOADED", "UNAVAILABLE"].contains(&reason(&status).as_str()),
                "{status}"
            ),
        }
    }
    assert_nothing_happened(&scene).await;
    let size = scene.client.size(pb::SizeRequest::default()).await;
    assert!(size.unwrap().into_inner().count > acknowledged);
    writes
}

/// It takes longer than any call has, and that is no outage.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_group_is_carried_over_a_slow_link() {
    let mut scene = Scene::new(&["--on-recovery", "reconcile"]).await;
    scene.store("small", &["before"]).await;
    scene.cut_off().await;
    let request = pb::StoreRequest {
        group: Some(group_of("large", 700_000)),
        expiry: None,
    };
    let stored = scene.client.store(request).await.unwrap().into_inner();
    assert_eq!(stored.backend, MEMORY);
    scene.store("small", &["after"]).await;
    scene.proxy.limit(Some(1 << 20));
    scene.proxy.accept();
    wait_until("it is carried over", Duration::from_secs(10), async || {
        let health = scene.service.health().await;
        health["switch"]["state"] == "closed" && health["mirror"]["dirty"] == 0
    })
    .await;
    assert_eq!(scene.service.metric("storage_recovery_total").await, 1.0);
    let loaded = scene.load("small").await.unwrap();
    assert_eq!(
        (loaded.backend, fingerprints(&loaded)),
        (REDIS, vec!["after"])
    );
    let mut redis = scene.redis_client().await;
    let size = redis_command(&mut redis, &["STRLEN", "group:large"]).await;
    let size: usize = redis::from_redis_value(size).unwrap();
    assert!(size > 700_000, "{size}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_larger_than_a_document_is_never_read() {
    const VALUE: usize = 20 << 20;
    let mut scene = Scene::new(&[]).await;
    let mut redis = scene.redis_client().await;
    let known = scene.store("was small", &["a"]).await;
    for key in ["group:foreign", "group:was small"] {
        // One that is read to its end shows in what Redis sends.
        redis_command(&mut redis, &["SETRANGE", key, &VALUE.to_string(), "x"]).await;
    }
    let sent_before = sent_by(&mut redis).await;
    for key in ["foreign", "was small"] {
        for _ in 0..3 {
            let loaded = scene.load(key).await;
            assert_too_large(loaded);
            let request = pb::LoadRequest {
                key: key.into(),
                include_expire_time: false,
            };
            assert_too_large(scene.client.load(request).await);
            for expected_version in [0, known.version] {
                let request = pb::CompareAndSwapRequest {
                    group: Some(group(key, &["b"])),
                    expected_version,
                    expiry: None,
                };
                assert_too_large(scene.client.compare_and_swap(request).await);
            }
            let request = pb::DeleteRequest {
                key: key.into(),
                expected_version: Some(known.version),
            };
            assert_too_large(scene.client.delete(request).await);
        }
    }
    let mut all = scene.client.load_all(pb::LoadAllRequest::default()).await;
    let mut problems = 0;
    while let Some(message) = all.as_mut().unwrap().get_mut().message().await.unwrap() {
        problems += message.problems.len();
    }
    assert_eq!(problems, 2);
    assert_nothing_happened(&scene).await;
    let sent = sent_by(&mut redis).await - sent_before;
    assert!(sent < 1 << 20, "Redis has sent {sent} bytes");

    // They can be got rid of.
    assert_eq!(scene.store("foreign", &["a"]).await.backend, REDIS);
    assert_eq!(fingerprints(&scene.load("foreign").await.unwrap()), ["a"]);
    assert!(scene.delete("was small").await.deleted);
    assert_nothing_happened(&scene).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_group_is_written_read_swapped_and_deleted_like_any() {
    let mut scene = Scene::new(&[]).await;
    let (_service, mut other) = scene.other(&[]).await;
    for bytes in [16_000, 17_000, 100_000, 900_000] {
        let request = pb::StoreRequest {
            group: Some(group_of("k", bytes)),
            expiry: None,
        };
        let stored = scene.client.store(request).await.unwrap().into_inner();
        // By one who has never seen it, and by one who has.
        for client in [&mut other, &mut scene.client] {
            for include_expire_time in [true, false] {
                let request = pb::LoadRequest {
                    key: "k".into(),
                    include_expire_time,
                };
                let loaded = client.load(request).await.unwrap().into_inner();
                assert_eq!((loaded.backend, version(&loaded)), (REDIS, stored.version));
            }
        }
        let lost = swap(&mut other, "k", &["b"], stored.version - 16).await;
        let current = lost.current.unwrap().metadata.unwrap();
        assert_eq!((lost.swapped, current.version), (false, stored.version));
        let request = pb::DeleteRequest {
            key: "k".into(),
            expected_version: Some(stored.version),
        };
        assert!(other.delete(request).await.unwrap().into_inner().deleted);
    }
    // What is unreadable is told with the place where parsing stopped.
    let mut redis = scene.redis_client().await;
    let broken = format!("{{\"key\":\"k\",{}", " ".repeat(100_000));
    redis_command(&mut redis, &["SET", "group:k", &broken]).await;
    let request = pb::CompareAndSwapRequest {
        group: Some(group("k", &[])),
        expected_version: 32,
        expiry: None,
    };
    let status = scene.client.compare_and_swap(request).await.unwrap_err();
    assert_eq!(reason(&status), "UNREADABLE_DOCUMENT", "{status}");
    assert_eq!(status.code(), Code::DataLoss);
}

fn assert_too_large<T>(result: Result<T, Status>) {
    let Err(status) = result else {
        panic!("it was read");
    };
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert_eq!(reason(&status), "MESSAGE_TOO_LARGE");
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.metadata["limit"], "max-document-bytes");
}

fn reason(status: &Status) -> String {
    let info = status.get_details_error_info();
    info.unwrap_or_else(|| panic!("{status:?}")).reason
}

/// Bytes that Redis has sent to anybody.
async fn sent_by(redis: &mut MultiplexedConnection) -> u64 {
    let info: String = redis::cmd("INFO")
        .arg("stats")
        .query_async(redis)
        .await
        .unwrap();
    let mut lines = info.lines();
    let sent = lines.find_map(|line| line.strip_prefix("total_net_output_bytes:"));
    sent.unwrap().parse().unwrap()
}
