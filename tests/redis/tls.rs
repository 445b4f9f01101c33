//! TLS to Redis: who is believed, and who believes us.

use std::time::Duration;

use crate::{
    common::{
        certificates::Valid,
        redis_cluster::RedisCluster,
        redis_sentinel::Sentinel,
        redis_server::{login, url},
        redis_tls::{Authority, tls_server},
        service::Service,
    },
    says_why_not, works_on_redis,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_with_a_certificate_of_the_authority_is_used() {
    let authority = Authority::new("ours");
    let issued = authority.ca.issue(Valid::Now);
    let (_redis, addr) = tls_server(&authority, &issued, false).await;
    let settings = [
        "--redis-url",
        &url("rediss", addr),
        "--redis-ca",
        &authority.ca(),
    ];
    works_on_redis(&Service::start(&settings)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_asks_who_we_are_is_shown_our_certificate() {
    let authority = Authority::new("ours");
    let issued = authority.ca.issue(Valid::Now);
    let (_redis, addr) = tls_server(&authority, &issued, true).await;
    let anonymous = [
        "--redis-url",
        &url("rediss", addr),
        "--redis-ca",
        &authority.ca(),
    ];
    says_why_not(&Service::start(&anonymous), "CertificateRequired").await;
    let [cert, key] = authority.files("us", &authority.ca.issue(Valid::Now));
    let identity = ["--redis-cert", &cert, "--redis-key", &key];
    works_on_redis(&Service::start(&[anonymous, identity].concat())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_not_believed_is_not_used_and_the_reason_is_said() {
    let (authority, foreign) = (Authority::new("ours"), Authority::new("foreign"));
    let issue = |valid| authority.ca.issue(valid);
    let elsewhere = authority.ca.issue_for("redis.example");
    for (issued, ca, reason) in [
        (issue(Valid::Now), Some(foreign.ca()), "UnknownIssuer"),
        // Of the authorities of the system.
        (issue(Valid::Now), None, "UnknownIssuer"),
        (issue(Valid::Once), Some(authority.ca()), "Expired"),
        (elsewhere, Some(authority.ca()), "NotValidForName"),
    ] {
        let (_redis, addr) = tls_server(&authority, &issued, false).await;
        let url = url("rediss", addr);
        let mut settings = vec!["--redis-url", &url];
        if let Some(ca) = &ca {
            settings.extend(["--redis-ca", ca]);
        }
        says_why_not(&Service::start(&settings), reason).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_at_only_one_end_is_said() {
    let authority = Authority::new("ours");
    let (redis, tls_addr) = tls_server(&authority, &authority.ca.issue(Valid::Now), false).await;
    let plain = url("rediss", redis.addr());
    let service = Service::start(&["--redis-url", &plain, "--redis-ca", &authority.ca()]);
    says_why_not(&service, "Request timed out.").await;
    let service = Service::start(&["--redis-url", &url("redis", tls_addr)]);
    says_why_not(&service, "not connected: ").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_server_of_a_cluster_is_reached_by_tls() {
    let authority = Authority::new("ours");
    let settings = authority.server_settings(&authority.ca.issue(Valid::Now));
    let cluster = RedisCluster::start_with_tls(&settings).await;
    let url = cluster.tls_url().await;
    let service = Service::start(&["--redis-url", &url, "--redis-ca", &authority.ca()]);
    works_on_redis(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sentinel_and_its_primary_are_reached_by_tls() {
    let authority = Authority::new("ours");
    let issued = authority.ca.issue(Valid::Now);
    let (_redis, addr) = tls_server(&authority, &issued, false).await;
    let settings = authority.server_settings(&issued);
    let mut lines: String = settings
        .chunks(2)
        .map(|setting| format!("{} {}\n", setting[0].trim_start_matches("--"), setting[1]))
        .collect();
    lines.push_str("tls-auth-clients no\ntls-replication yes\n");
    let sentinel = Sentinel::start_with(addr, Duration::from_secs(30), &lines).await;
    let [user, password] = login();
    let url = format!("rediss-sentinel://{user}:{password}@{}", sentinel.asked());
    let service = Service::start(&["--redis-url", &url, "--redis-ca", &authority.ca()]);
    works_on_redis(&service).await;
}
