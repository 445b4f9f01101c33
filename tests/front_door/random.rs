//! A client that sends anything: `random_client.py`, a few seconds of it on every run and
//! a minute by `make random-client`.

use std::{process::Command, time::Duration};

use crate::common::{http, redis_server::RedisServer, service::Service, tool};

/// How long the ordinary tests take, in seconds.
const SHORT: &str = "4";

#[tokio::test]
async fn whatever_is_sent_to_memory_is_answered_as_the_contract_says() {
    send_anything(&[], SHORT, "1").await;
}

#[tokio::test]
async fn whatever_is_sent_to_redis_is_answered_as_the_contract_says() {
    let redis = RedisServer::start().await;
    send_anything(&on(&redis.url()), SHORT, "2").await;
}

#[tokio::test]
#[ignore = "takes minutes: `make random-client`"]
async fn for_a_long_time() {
    let setting = |name, default: &str| std::env::var(name).unwrap_or(default.to_owned());
    let seconds = setting("RANDOM_CLIENT_SECONDS", "60");
    let seed = setting("RANDOM_CLIENT_SEED", "1");
    println!("in memory");
    send_anything(&[], &seconds, &seed).await;
    println!("on Redis");
    let redis = RedisServer::start().await;
    send_anything(&on(&redis.url()), &seconds, &seed).await;
}

/// The settings with which a machine that is busy is not taken for a Redis that fails.
fn on(redis_url: &str) -> [&str; 6] {
    [
        "--redis-url",
        redis_url,
        "--redis-timeout",
        "10s",
        "--trip-after",
        "20s",
    ]
}

async fn send_anything(settings: &[&str], seconds: &str, seed: &str) {
    let mut arguments = settings.to_vec();
    // Whatever is stored, it does not take much.
    arguments.extend(["--mirror-max-bytes", "16MiB", "--log-level", "debug"]);
    let mut service = Service::start(&arguments);
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/front_door/random_client.py"
    );
    let pid = service.process().child.id().to_string();
    let mut client = Command::new(tool("venv/bin/python"));
    client.args([script, service.addr(), &pid, seconds, seed]);
    let output = tokio::task::spawn_blocking(move || client.output().unwrap())
        .await
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    println!("{printed}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "seed {seed}: {said}");

    assert!(service.is_running());
    let panicked = |line: &&String| line.contains("panic");
    assert_eq!(service.log().iter().find(panicked), None);
    // What the client cannot see, on its malformed connections.
    let metrics = http::get(service.http_addr(), "/metrics", Duration::from_secs(5)).await;
    let metrics = metrics.unwrap().body;
    let is_error = |line: &&str| line.contains(r#"result="error""#) && !line.ends_with(" 0");
    assert_eq!(metrics.lines().find(is_error), None);
}
