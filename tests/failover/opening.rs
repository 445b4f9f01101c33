//! What opens the switch, what does not, and what callers notice.

use std::time::Duration;

use futures::future::join_all;
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{
    common::stalls::{Bound, undisturbed},
    *,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_redis_is_noticed_without_any_traffic() {
    let scene = Scene::new(&[]).await;
    scene.redis.process().signal("STOP");
    let bound = Bound::of(Duration::from_secs(1));
    scene.wait_for("degraded").await;
    bound.assert_holds("it is noticed");
    let switched = "Switched to in-memory storage due to Redis failure";
    scene.service.wait_for_log(switched, Duration::from_secs(1));
    scene.redis.process().signal("CONT");
    scene.wait_until_back().await;
    let back = "Switched back to Redis storage";
    scene.service.wait_for_log(back, Duration::from_secs(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_is_answered_from_memory_once_redis_is_dead() {
    let mut scene = Scene::new(&[]).await;
    let stored = scene.store("k", &["a"]).await;
    assert_eq!(stored.backend, REDIS);
    scene.redis.kill();

    // The first call is the one that meets the dead Redis.
    let loaded = scene.load("k").await.unwrap();
    assert_eq!((loaded.backend, version(&loaded)), (MEMORY, stored.version));
    let swapped = swap(&mut scene.client, "k", &["a", "b"], stored.version).await;
    assert_eq!((swapped.backend, swapped.swapped), (MEMORY, true));
    assert!(swapped.version > stored.version);
    let lost = swap(&mut scene.client, "k", &["c"], stored.version).await;
    assert_eq!((lost.backend, lost.swapped), (MEMORY, false));
    assert_eq!(lost.version, swapped.version);
    assert_eq!(scene.store("new", &[]).await.backend, MEMORY);
    let batch = pb::StoreAllRequest {
        groups: (0..250)
            .map(|i| group(&format!("batch/{i}"), &[]))
            .collect(),
        expiry: None,
    };
    let batch = scene.client.store_all(batch).await.unwrap().into_inner();
    assert_eq!(batch.backend, MEMORY);
    assert!(batch.results.iter().all(|result| result.error.is_none()));
    let size = scene.client.size(pb::SizeRequest::default()).await;
    let size = size.unwrap().into_inner();
    assert_eq!((size.backend, size.count), (MEMORY, 252));
    let keys = scene.client.list_keys(pb::ListKeysRequest::default()).await;
    assert_eq!(keys.unwrap().into_inner().keys.len(), 252);
    let deleted = scene.delete("k").await;
    assert_eq!((deleted.backend, deleted.deleted), (MEMORY, true));
    assert!(!deleted.authoritative);
    let absent = scene.load("k").await.unwrap_err();
    assert_eq!(absent.code(), Code::NotFound);
    let authoritative = tonic_types::StatusExt::get_details_error_info(&absent);
    assert_eq!(authoritative.unwrap().metadata["authoritative"], "false");

    let mut all = scene
        .client
        .load_all(pb::LoadAllRequest::default())
        .await
        .unwrap()
        .into_inner();
    let mut summary = None;
    while let Some(message) = all.message().await.unwrap() {
        assert_eq!(message.backend, MEMORY);
        summary = message.summary;
    }
    let summary = summary.unwrap();
    assert_eq!((summary.groups, summary.complete), (251, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_wait_for_a_hung_redis_are_answered_within_a_second() {
    let mut scene = Scene::new(&[]).await;
    scene.store("k", &["a"]).await;
    scene.redis.process().signal("STOP");
    // Some begin before the switch opens, and some in the moment in which it
    // does.
    let mut calls = Vec::new();
    for i in 0..60 {
        let mut client = scene.client.clone();
        calls.push(tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(i * 10)).await;
            let bound = Bound::of(Duration::from_millis(1_050));
            let backend = if i % 2 == 0 {
                load(&mut client, "k").await.unwrap().backend
            } else {
                store(&mut client, &format!("k/{i}"), &[]).await.backend
            };
            bound.assert_holds("it is answered");
            backend
        }));
    }
    for answered in join_all(calls).await {
        assert_eq!(answered.unwrap(), MEMORY);
    }
}

/// On a busy machine 300 ms may be 500, for which it opens rightly.
#[tokio::test(flavor = "multi_thread")]
async fn stalls_of_300_ms_do_not_open_it() {
    undisturbed(async || {
        let scene = Scene::new(&[]).await;
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let mut clients = Vec::new();
        for i in 0..4 {
            let (mut client, stop) = (scene.client.clone(), stop.clone());
            clients.push(tokio::spawn(async move {
                let mut backends = Vec::new();
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    // New keys too: whether they were written can only be told by
                    // the answer that came late.
                    let key = format!("k/{i}/{}", backends.len());
                    backends.push(store(&mut client, &key, &["a"]).await.backend);
                    backends.push(load(&mut client, &key).await.unwrap().backend);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                backends
            }));
        }
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(400)).await;
            scene.redis.process().signal("STOP");
            tokio::time::sleep(Duration::from_millis(300)).await;
            scene.redis.process().signal("CONT");
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        let mut by_memory = 0;
        for client in clients {
            let backends = client.await.unwrap();
            assert!(backends.len() > 20);
            by_memory += backends.iter().filter(|one| **one != REDIS).count();
        }
        let state = scene.service.health().await["switch"]["state"].clone();
        let recoveries = scene.service.metric("storage_recovery_total").await;
        if by_memory == 0 && state == "closed" && recoveries == 0.0 {
            Ok(())
        } else {
            Err(format!(
                "memory answered {by_memory} times, the switch is {state} and has closed \
                 {recoveries} times"
            ))
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_calls_in_a_hurry_do_not_open_it() {
    let mut scene = Scene::new(&[]).await;
    scene.store("k", &["a"]).await;
    let connection = scene.service.client().await;
    // No call can be answered in its time.
    scene.proxy.delay(Duration::from_millis(20));
    let calls = (0..1_000).map(|i| {
        let mut client = connection.clone();
        async move {
            let mut load = Request::new(pb::LoadRequest {
                key: "k".into(),
                include_expire_time: false,
            });
            let mut store = Request::new(pb::StoreRequest {
                group: Some(group("k", &[])),
                expiry: None,
            });
            load.set_timeout(Duration::from_millis(1));
            store.set_timeout(Duration::from_millis(1));
            if i % 2 == 0 {
                // Memory may know it.
                client.load(load).await.err()
            } else {
                Some(client.store(store).await.unwrap_err())
            }
        }
    });
    for status in join_all(calls).await.into_iter().flatten() {
        // The client's own clock may be the first to say so.
        let in_a_hurry = [Code::DeadlineExceeded, Code::Aborted, Code::Cancelled];
        assert!(in_a_hurry.contains(&status.code()), "{status:?}");
    }
    assert_eq!(scene.service.health().await["switch"]["state"], "closed");
    assert_eq!(scene.service.metric("storage_recovery_total").await, 0.0);
}

/// Before the switch opens, and without opening it.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_in_a_hurry_is_answered_from_memory_if_it_knows_the_group() {
    undisturbed(async || {
        let mut scene = Scene::new(&[]).await;
        scene.store("k", &["a"]).await;
        scene.redis.process().signal("STOP");
        let load = |key: &str| {
            let mut load = Request::new(pb::LoadRequest {
                key: key.into(),
                include_expire_time: false,
            });
            load.set_timeout(Duration::from_millis(200));
            load
        };
        let loaded = scene.client.load(load("k")).await;
        let loaded = loaded.map_err(|status| status.to_string())?.into_inner();
        assert_eq!((loaded.backend, fingerprints(&loaded)), (MEMORY, vec!["a"]));
        let unknown = scene.client.load(load("unknown")).await.unwrap_err();
        scene.redis.process().signal("CONT");
        tokio::time::sleep(Duration::from_millis(700)).await;
        let recoveries = scene.service.metric("storage_recovery_total").await;
        if unknown.code() == Code::DeadlineExceeded && recoveries == 0.0 {
            Ok(())
        } else {
            Err(format!("{unknown}, {recoveries} recoveries"))
        }
    })
    .await;
}

/// The time that the service has lost says nothing of Redis, so the switch may stay
/// closed; but memory knows the group, and Redis has not answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_the_machine_has_held_up_is_answered_all_the_same() {
    let mut scene = Scene::new(&[]).await;
    scene.store("k", &["a"]).await;
    for _ in 0..3 {
        scene.redis.process().signal("STOP");
        let mut client = scene.client.clone();
        let waiting = tokio::spawn(async move { load(&mut client, "k").await });
        // While the switch is closed.
        tokio::time::sleep(Duration::from_millis(100)).await;
        scene.service.process().signal("STOP");
        tokio::time::sleep(Duration::from_millis(900)).await;
        scene.service.process().signal("CONT");
        let loaded = waiting.await.unwrap();
        scene.redis.process().signal("CONT");
        let loaded = loaded.unwrap_or_else(|status| panic!("{status}"));
        assert_eq!(fingerprints(&loaded), ["a"]);
        scene.wait_until_back().await;
    }
}

/// A throttled container, a virtual machine that moves: nothing of that is Redis's doing.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_was_stopped_itself_does_not_blame_redis() {
    let mut scene = Scene::new(&["--on-recovery", "discard"]).await;
    for round in 0..4 {
        let calls: Vec<_> = (0..4)
            .map(|writer| {
                let mut client = scene.client.clone();
                tokio::spawn(async move {
                    let mut last = None;
                    for i in 0..100 {
                        let request = pb::StoreRequest {
                            group: Some(group(&format!("k/{round}/{writer}/{i}"), &["a"])),
                            expiry: None,
                        };
                        // What was under way when it was stopped may have run out of time.
                        if let Ok(stored) = client.store(request).await {
                            last = Some(stored.into_inner().backend);
                        }
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    last
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(50)).await;
        scene.service.process().signal("STOP");
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        scene.service.process().signal("CONT");
        for call in calls {
            assert_eq!(call.await.unwrap(), Some(REDIS), "{round}");
        }
    }
    assert_eq!(scene.store("k", &["a"]).await.backend, REDIS);
    assert_eq!(scene.service.metric("storage_recovery_total").await, 0.0);
    let discarded = scene.service.metric("degraded_writes_discarded_total");
    assert_eq!(discarded.await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_conflicts_do_not_open_it() {
    let mut scene = Scene::new(&[]).await;
    scene.store("k", &["a"]).await;
    for _ in 0..100 {
        let calls = (0..100).map(|_| {
            let mut client = scene.client.clone();
            async move { swap(&mut client, "k", &[], 1).await }
        });
        for lost in join_all(calls).await {
            assert_eq!((lost.backend, lost.swapped), (REDIS, false));
        }
    }
    assert_eq!(scene.service.health().await["switch"]["state"], "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_answers_ping_and_refuses_writes_keeps_it_open() {
    let mut scene = Scene::new(&["--on-recovery", "reconcile"]).await;
    scene.store("k", &["a"]).await;
    let mut redis = scene.redis_client().await;
    for (refuse, accept) in [
        (
            &["CONFIG", "SET", "maxmemory", "1"][..],
            &["CONFIG", "SET", "maxmemory", "0"][..],
        ),
        (
            &["REPLICAOF", "127.0.0.1", "1"],
            &["REPLICAOF", "NO", "ONE"],
        ),
    ] {
        redis_command(&mut redis, refuse).await;
        assert_eq!(scene.store("k", &["a", "b"]).await.backend, MEMORY);
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert_ne!(scene.service.health().await["switch"]["state"], "closed");
        assert_eq!(scene.load("k").await.unwrap().backend, MEMORY);
        redis_command(&mut redis, accept).await;
        scene.wait_until_back().await;
        let loaded = scene.load("k").await.unwrap();
        assert_eq!(loaded.backend, REDIS);
        assert_eq!(fingerprints(&loaded), ["a", "b"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_refuses_writes_is_noticed_without_any_traffic() {
    let scene = Scene::new(&[]).await;
    let mut redis = scene.redis_client().await;
    redis_command(&mut redis, &["CONFIG", "SET", "maxmemory", "1"]).await;
    scene.wait_for("degraded").await;
    let health = scene.service.health().await;
    let reason = health["switch"]["reason"].as_str().unwrap();
    assert!(reason.contains("OOM"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_connection_is_replaced_and_its_calls_are_answered() {
    let mut scene = Scene::new(&[]).await;
    scene.store("k", &["a"]).await;
    scene.proxy.swallow(common::fault_proxy::Direction::Both);
    scene.wait_for("degraded").await;
    // The connections stay dead; only new ones work.
    scene.proxy.stop_swallowing();
    scene.wait_until_back().await;
    assert_eq!(scene.load("k").await.unwrap().backend, REDIS);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_probes_follow_the_switch() {
    let mut scene = Scene::new(&[]).await;
    let channel =
        tonic::transport::Endpoint::from_shared(format!("http://{}", scene.service.addr()))
            .unwrap()
            .connect()
            .await
            .unwrap();
    let mut health = HealthClient::new(channel);
    let watch = |service: &str| HealthCheckRequest {
        service: service.into(),
    };
    let mut redis = health.watch(watch("redis")).await.unwrap().into_inner();
    let mut statuses = Vec::new();
    statuses.push(redis.message().await.unwrap().unwrap().status());
    assert_eq!(probe(&scene, "/readyz").await, (200, "ok\n".into()));
    scene.cut_off().await;
    statuses.push(redis.message().await.unwrap().unwrap().status());
    let (code, body) = probe(&scene, "/readyz").await;
    assert!(code == 200 && body.starts_with("degraded"), "{body}");
    assert_eq!(probe(&scene, "/livez").await.0, 200);
    let all = health.check(watch("")).await.unwrap().into_inner().status();
    use tonic_health::pb::health_check_response::ServingStatus::{NotServing, Serving};
    assert_eq!(all, Serving, "it can serve, from memory");
    scene.reconnect().await;
    statuses.push(redis.message().await.unwrap().unwrap().status());
    assert_eq!(statuses, [Serving, NotServing, Serving]);
    scene.wait_for("ok").await;
}

async fn probe(scene: &Scene, path: &str) -> (u16, String) {
    let bound = Duration::from_secs(1);
    let reply = common::http::get(scene.service.http_addr(), path, bound)
        .await
        .unwrap();
    (reply.status, reply.body)
}
