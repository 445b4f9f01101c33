//! Redis says no: to one command, to all that the service needs, or by closing each
//! connection.

use std::time::Duration;

use tokio::net::TcpListener;
use tonic::Code;
use tonic_types::StatusExt;

use super::*;

/// Takes a right from the user of the service, or gives it back.
async fn change_rights(redis: &mut MultiplexedConnection, rights: &[&str]) {
    let [user, _] = common::redis_server::login();
    redis_command(redis, &[&["ACL", "SETUSER", user], rights].concat()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_without_the_right_to_scan_fails_alone() {
    let mut scene = Scene::new(&[]).await;
    scene.store("k", &["a"]).await;
    let mut redis = scene.redis_client().await;
    for right in ["scan", "info"] {
        change_rights(&mut redis, &[&format!("-{right}")]).await;
        for _ in 0..3 {
            let size = scene.client.size(pb::SizeRequest::default()).await;
            let keys = scene.client.list_keys(pb::ListKeysRequest::default()).await;
            let mut refusals = vec![size.unwrap_err(), keys.unwrap_err()];
            match scene.client.load_all(pb::LoadAllRequest::default()).await {
                Ok(all) => refusals.push(all.into_inner().message().await.unwrap_err()),
                Err(status) => refusals.push(status),
            }
            for status in refusals {
                assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
                let info = status.get_details_error_info().unwrap();
                assert_eq!(info.reason, "COMMAND_REFUSED");
                let name = right.to_uppercase();
                assert!(status.message().contains(&name), "{status}");
            }
            assert_eq!(scene.store("k", &["a"]).await.backend, REDIS);
        }
        change_rights(&mut redis, &[&format!("+{right}")]).await;
    }
    assert_eq!(scene.service.metric("storage_recovery_total").await, 0.0);
    let size = scene.client.size(pb::SizeRequest::default()).await;
    assert_eq!(size.unwrap().into_inner().count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_right_that_calls_need_memory_answers_and_the_log_says_why() {
    for right in ["evalsha", "info", "set", "pttl", "strlen"] {
        let redis = RedisServer::start().await;
        let mut admin = redis.connect().await;
        change_rights(&mut admin, &[&format!("-{right}")]).await;
        let service = Service::start(&["--redis-url", &redis.url()]);
        let patience = Duration::from_secs(10);
        let names_it = format!("'{right}'");
        let line = service.wait_for_log(&names_it, patience);
        assert!(line.contains("WARN"), "{line}");
        let mut client = service.client().await;
        assert_eq!(store(&mut client, "k", &["a"]).await.backend, MEMORY);
        let health = service.health().await;
        let reason = health["switch"]["reason"].as_str().unwrap();
        assert!(reason.contains(&names_it), "{health}");

        change_rights(&mut admin, &[&format!("+{right}")]).await;
        wait_until("Redis answers", patience, async || {
            service.health().await["switch"]["state"] == "closed"
        })
        .await;
        assert_eq!(store(&mut client, "k", &["a"]).await.backend, REDIS);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_accepts_and_closes_does_not_fill_the_log() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let (accepted, mut count) = tokio::sync::watch::channel(0);
    let proxy = tokio::spawn(async move {
        loop {
            drop(listener.accept().await);
            accepted.send_modify(|count| *count += 1);
        }
    });
    let service = Service::start(&["--redis-url", &url]);
    let begin = std::time::Instant::now();
    count.wait_for(|count| *count >= 100).await.unwrap();
    let seconds = begin.elapsed().as_secs() + 2;
    let log = service.log();
    for text in ["no connection to Redis", "Redis is still not used"] {
        let lines = log.iter().filter(|line| line.contains(text)).count() as u64;
        assert!(lines <= seconds, "{lines} lines in {seconds} s: {log:#?}");
    }
    assert!(log.len() as u64 <= 10 + 2 * seconds, "{log:#?}");
    proxy.abort();
}
