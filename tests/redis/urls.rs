//! Forms of URL that no other test uses.

use std::time::Duration;

use crate::{
    common::{
        redis_sentinel::Sentinel,
        redis_server::{self, RedisServer},
        service::Service,
    },
    works_on_redis,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("redis.sock").display().to_string();
    let _redis = RedisServer::start_with(&["--unixsocket", &socket]).await;
    let [user, password] = redis_server::login();
    let password_file = folder.path().join("password");
    std::fs::write(&password_file, password).unwrap();
    let service = Service::start(&[
        "--redis-url",
        &format!("redis+unix://{socket}"),
        "--redis-username",
        user,
        "--redis-password-file",
        password_file.to_str().unwrap(),
    ]);
    works_on_redis(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_lie_in_the_database_of_the_url() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &format!("{}/3", redis.url())]);
    works_on_redis(&service).await;
    let mut connection = redis.connect().await;
    for (database, expected) in [(0, false), (3, true)] {
        let () = redis::cmd("SELECT")
            .arg(database)
            .query_async(&mut connection)
            .await
            .unwrap();
        let exists: bool = redis::cmd("EXISTS")
            .arg("group:k")
            .query_async(&mut connection)
            .await
            .unwrap();
        assert_eq!(exists, expected, "database {database}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_ipv6_is_used() {
    let redis = RedisServer::start_with(&["--bind", "127.0.0.1 ::1"]).await;
    let [user, password] = redis_server::login();
    let url = format!("redis://{user}:{password}@[::1]:{}", redis.addr().port());
    let service = Service::start(&["--redis-url", &url]);
    works_on_redis(&service).await;
}

/// As the usual charts set them up.
#[tokio::test(flavor = "multi_thread")]
async fn a_sentinel_that_wants_a_password_gets_that_of_redis() {
    let redis = RedisServer::start_with(&["--requirepass", "s3cret"]).await;
    let settings = "requirepass s3cret\nsentinel auth-pass groups s3cret";
    let sentinel = Sentinel::start_with(redis.addr(), Duration::from_secs(30), settings).await;
    let url = format!("redis-sentinel://:s3cret@{}", sentinel.asked());
    works_on_redis(&Service::start(&["--redis-url", &url])).await;
}
