//! Start and stop, whatever Redis does.

use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_starts_before_redis_serves_from_memory_until_redis_is_there() {
    let mut redis = RedisServer::start().await;
    redis.kill();
    let service = Service::start(&["--redis-url", &redis.url(), "--on-recovery", "reconcile"]);
    let mut client = service.client().await;
    assert_eq!(store(&mut client, "k", &["a"]).await.backend, MEMORY);
    assert_eq!(service.health().await["status"], "degraded");
    redis.restart().await;
    wait_until("Redis is used", BACK_WITHIN, async || {
        let loaded = load(&mut client.clone(), "k").await.unwrap();
        loaded.backend == REDIS
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_said_plainly_and_never_printed() {
    let redis = RedisServer::start_with(&["--requirepass", "right"]).await;
    let url = format!("redis://:wr0ngpass@{}", redis.addr());
    let service = Service::start(&["--redis-url", &url, "--log-level", "trace"]);
    service.wait_for_log("WRONGPASS", Duration::from_secs(2));
    let mut client = service.client().await;
    let status = load(&mut client, "k").await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let health = service.health().await;
    let reason = health["switch"]["reason"].as_str().unwrap();
    assert!(reason.contains("WRONGPASS"), "{reason}");
    assert!(service.log().iter().all(|line| !line.contains("wr0ngpass")));
    assert!(!format!("{status:?}{health}").contains("wr0ngpass"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_evicts_is_warned_of() {
    let redis = RedisServer::start_with(&["--maxmemory-policy", "allkeys-lru"]).await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    service.wait_for_log("allkeys-lru", Duration::from_secs(2));
}

/// Asked to stop with a health Watch open, which never ends by itself.
async fn stops_at_once(scene: &mut Scene) -> String {
    let endpoint = format!("http://{}", scene.service.addr());
    let channel = tonic::transport::Endpoint::from_shared(endpoint).unwrap();
    let mut health = HealthClient::new(channel.connect().await.unwrap());
    let mut watch = health
        .watch(HealthCheckRequest {
            service: "redis".into(),
        })
        .await
        .unwrap()
        .into_inner();
    watch.message().await.unwrap();
    scene.service.process().signal("TERM");
    let status = scene.service.wait_for_exit(Duration::from_secs(2));
    assert_eq!(status.code(), Some(0), "{:#?}", scene.service.log());
    scene
        .service
        .log()
        .into_iter()
        .rfind(|line| line.contains("\"unsaved\""))
        .expect("the last line counts what could not be saved")
}

#[tokio::test(flavor = "multi_thread")]
async fn it_stops_while_redis_answers() {
    let mut scene = Scene::new(&[]).await;
    scene.store("k", &["a"]).await;
    let last = stops_at_once(&mut scene).await;
    assert!(last.contains("\"unsaved\":0"), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_stops_while_redis_is_dead_and_counts_what_it_could_not_save() {
    let mut scene = Scene::new(&["--on-recovery", "reconcile"]).await;
    scene.redis.kill();
    scene.wait_for("degraded").await;
    for key in ["a", "b", "a"] {
        scene.store(key, &[]).await;
    }
    let last = stops_at_once(&mut scene).await;
    assert!(last.contains("\"unsaved\":2"), "{last}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_stops_while_redis_hangs() {
    let mut scene = Scene::new(&["--on-recovery", "reconcile"]).await;
    scene.redis.process().signal("STOP");
    scene.wait_for("degraded").await;
    scene.store("k", &[]).await;
    let last = stops_at_once(&mut scene).await;
    assert!(last.contains("\"unsaved\":1"), "{last}");
    scene.redis.process().signal("CONT");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_last_try_saves_what_redis_can_take() {
    let mut scene = Scene::new(&["--on-recovery", "reconcile"]).await;
    let mut redis = scene.redis_client().await;
    redis_command(&mut redis, &["CONFIG", "SET", "maxmemory", "1"]).await;
    scene.wait_for("degraded").await;
    scene.store("k", &["a"]).await;
    // Sooner than the next probe.
    redis_command(&mut redis, &["CONFIG", "SET", "maxmemory", "0"]).await;
    let last = stops_at_once(&mut scene).await;
    assert!(last.contains("\"unsaved\":0"), "{last}");
    let saved = redis_command(&mut redis, &["EXISTS", "group:k"]).await;
    assert_eq!(saved, redis::Value::Int(1));
}
