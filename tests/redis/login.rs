//! Users of Redis and their rights, and that no password is ever said.

use std::time::Duration;

use crate::{
    common::{
        http,
        redis_server::{self, RedisServer},
        service::Service,
    },
    load_request, says_why_not, store_request, works_on_redis,
};

/// Passwords that would be seen if they were said, as they are and as a URL has
/// them.
const SECRETS: [&str; 2] = ["s3cr3t/p@ss", "s3cr3t%2Fp%40ss"];

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_the_rights_is_said_plainly() {
    let redis = RedisServer::start().await;
    let [user, _] = redis_server::login();
    for (rule, refused) in [
        ("-evalsha", "evalsha"),
        ("-ping", "ping"),
        ("resetkeys", "one of the keys"),
    ] {
        let mut connection = redis.connect().await;
        let mut set = async |rule: &str| {
            let () = redis::cmd("ACL")
                .arg(&["SETUSER", user, rule])
                .query_async(&mut connection)
                .await
                .unwrap();
        };
        set(rule).await;
        let service = Service::start(&["--redis-url", &redis.url()]);
        says_why_not(&service, "NOPERM").await;
        says_why_not(&service, refused).await;
        // What is granted later is used without a restart.
        for rule in ["+evalsha", "+ping", "~group:*"] {
            set(rule).await;
        }
        works_on_redis(&service).await;
    }
}

/// Whether Redis takes the password or not, nothing that leaves the service
/// holds it.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_never_said() {
    let redis = RedisServer::start().await;
    let [user, _] = redis_server::login();
    let mut connection = redis.connect().await;
    let () = redis::cmd("ACL")
        .arg(&["SETUSER", user, &format!(">{}", SECRETS[0])])
        .query_async(&mut connection)
        .await
        .unwrap();
    for (user, is_right) in [(user, true), ("nobody", false)] {
        let url = format!("redis://{user}:{}@{}", SECRETS[1], redis.addr());
        let service = Service::start(&["--redis-url", &url, "--log-level", "trace"]);
        let mut client = service.client().await;
        if is_right {
            works_on_redis(&service).await;
        } else {
            says_why_not(&service, "WRONGPASS").await;
        }
        let mut said = service.log();
        let stored = client.store(store_request("k")).await;
        said.push(format!("{stored:?}"));
        said.push(format!("{:?}", client.load(load_request("other")).await));
        for path in ["/health", "/metrics", "/readyz", "/loglevel"] {
            let reply = http::get(service.http_addr(), path, Duration::from_secs(2)).await;
            said.push(reply.unwrap().body);
        }
        for text in &said {
            assert!(
                !SECRETS.iter().any(|secret| text.contains(secret)),
                "{text}"
            );
        }
        // The grep would find it.
        assert!(said.iter().any(|text| text.contains("\"level\":\"INFO\"")));
    }
}
