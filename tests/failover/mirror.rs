//! What memory knows when it has to stand in, and how much it may take.

use groupstate::grpc::proto::store_request::Expiry;
use tonic::Code;
use tonic_types::StatusExt;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn groups_of_others_are_read_into_the_mirror_at_start_and_after_a_recovery() {
    let redis = RedisServer::start().await;
    let writer = Service::start(&["--redis-url", &redis.url()]);
    let mut writer = writer.client().await;
    for i in 0..50 {
        store(&mut writer, &format!("before/{i}"), &["a"]).await;
    }
    let mut scene = Scene {
        proxy: FaultProxy::start(redis.addr()).await,
        service: Service::start(&["--redis-url", &redis.url()]),
        client: writer.clone(),
        redis,
    };
    scene.service = Service::start(&["--redis-url", &scene.proxy.url()]);
    scene.client = scene.service.client().await;
    scene.wait_for("ok").await;
    let restored = scene.service.metric("groups_restored_total").await;
    assert_eq!(restored, 50.0);
    scene.cut_off().await;
    assert_eq!(scene.load("before/7").await.unwrap().backend, MEMORY);
    store(&mut writer, "meanwhile", &["a"]).await;
    let unknown = scene.load("meanwhile").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);

    scene.reconnect().await;
    scene.wait_for("ok").await;
    assert_eq!(scene.service.metric("groups_restored_total").await, 51.0);
    scene.cut_off().await;
    assert_eq!(scene.load("meanwhile").await.unwrap().backend, MEMORY);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_expires_in_memory_when_it_would_have_in_redis() {
    let mut scene = Scene::new(&[]).await;
    let (_service, mut other) = scene.other(&[]).await;
    for (client, key) in [
        (&mut scene.client, "stored here"),
        (&mut other, "stored elsewhere"),
    ] {
        let request = pb::StoreRequest {
            group: Some(group(key, &[])),
            expiry: Some(Expiry::Ttl(prost_types::Duration {
                seconds: 3,
                nanos: 0,
            })),
        };
        client.store(request).await.unwrap();
    }
    let request = pb::LoadRequest {
        key: "stored elsewhere".into(),
        include_expire_time: false,
    };
    scene.client.load(request).await.unwrap();
    scene.cut_off().await;
    for key in ["stored here", "stored elsewhere"] {
        let loaded = scene.load(key).await.unwrap();
        assert_eq!(loaded.backend, MEMORY);
        assert!(loaded.expire_time.is_some());
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    for key in ["stored here", "stored elsewhere"] {
        assert_eq!(scene.load(key).await.unwrap_err().code(), Code::NotFound);
    }
}

/// The last word of a writer was "gone in a second", while Redis would keep the
/// group it knows for a day.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_expires_while_degraded_does_not_come_back() {
    let mut scene = Scene::new(&["--on-recovery", "reconcile"]).await;
    scene.store("k", &["a"]).await;
    scene.cut_off().await;
    let request = pb::StoreRequest {
        group: Some(group("k", &["b"])),
        expiry: Some(Expiry::Ttl(prost_types::Duration {
            seconds: 1,
            nanos: 0,
        })),
    };
    scene.client.store(request).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    scene.reconnect().await;
    assert_eq!(scene.load("k").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_mirror_forgets_what_redis_has_and_refuses_what_it_would_lose() {
    let limit = ["--mirror-max-bytes", "64KiB", "--on-recovery", "reconcile"];
    let mut scene = Scene::new(&limit).await;
    // Twice what fits.
    for i in 0..200 {
        scene.store(&format!("clean/{i}"), &["a"]).await;
    }
    let bytes = scene.service.health().await["mirror"]["bytes"].clone();
    assert!(bytes.as_u64().unwrap() <= 64 << 10, "{bytes}");
    scene.cut_off().await;
    let mut stored = 0;
    let refused = loop {
        let request = pb::StoreRequest {
            group: Some(group(&format!("dirty/{stored:03}"), &["a"])),
            expiry: None,
        };
        match scene.client.store(request).await {
            Ok(_) => stored += 1,
            Err(status) => break status,
        }
        assert!(stored < 200, "more than fits");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let info = refused.get_details_error_info().unwrap();
    assert_eq!(info.reason, "MEMORY_FULL");
    assert_eq!(info.metadata["limit"], "mirror-max-bytes");
    assert!(stored > 50, "{stored}: clean entries leave first");
    scene.reconnect().await;
    let request = pb::SizeRequest {
        prefix: "dirty/".into(),
    };
    let size = scene.client.size(request).await.unwrap().into_inner();
    assert_eq!((size.backend, size.count), (REDIS, stored));
}
