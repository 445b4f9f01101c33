//! TLS to Redis: who is believed, and who believes us.

use std::net::SocketAddr;

use crate::{
    common::{
        authority::{Authority, text},
        free_address,
        redis_cluster::RedisCluster,
        redis_server::{RedisServer, url},
        service::Service,
    },
    says_why_not, works_on_redis,
};

/// A Redis with a certificate for `name`, and its address for TLS. Clients must
/// show one of the same authority if `mutual`.
async fn tls_server(authority: &Authority, name: &str, mutual: bool) -> (RedisServer, SocketAddr) {
    let addr = free_address();
    let issued = authority.issue(name);
    let redis = RedisServer::start_with(&[
        "--tls-port",
        &addr.port().to_string(),
        "--tls-cert-file",
        text(&issued.cert),
        "--tls-key-file",
        text(&issued.key),
        "--tls-ca-cert-file",
        text(&authority.ca()),
        "--tls-auth-clients",
        if mutual { "yes" } else { "no" },
    ])
    .await;
    (redis, addr)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_with_a_certificate_of_the_authority_is_used() {
    let authority = Authority::new();
    let (_redis, addr) = tls_server(&authority, "127.0.0.1", false).await;
    let url = url("rediss", addr);
    let service = Service::start(&["--redis-url", &url, "--redis-ca", text(&authority.ca())]);
    works_on_redis(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_asks_who_we_are_is_shown_our_certificate() {
    let authority = Authority::new();
    let (_redis, addr) = tls_server(&authority, "127.0.0.1", true).await;
    let (url, ca, ours) = (
        url("rediss", addr),
        authority.ca(),
        authority.issue("groupstate"),
    );
    let anonymous = ["--redis-url", &url, "--redis-ca", text(&ca)];
    let service = Service::start(&anonymous);
    says_why_not(&service, "CertificateRequired").await;
    let identity = [
        "--redis-cert",
        text(&ours.cert),
        "--redis-key",
        text(&ours.key),
    ];
    let service = Service::start(&[&anonymous[..], &identity[..]].concat());
    works_on_redis(&service).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_not_believed_is_not_used_and_the_reason_is_said() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let (_redis, addr) = tls_server(&authority, "127.0.0.1", false).await;
    let (_other, other_addr) = tls_server(&authority, "redis.example", false).await;
    for (addr, ca, reason) in [
        (addr, Some(foreign.ca()), "UnknownIssuer"),
        // Of the authorities of the system.
        (addr, None, "UnknownIssuer"),
        (other_addr, Some(authority.ca()), "NotValidForName"),
    ] {
        let url = url("rediss", addr);
        let ca = ca.map_or_else(Vec::new, |ca| {
            vec!["--redis-ca".into(), text(&ca).to_owned()]
        });
        let ca = ca.iter().map(String::as_str);
        let settings: Vec<&str> = ["--redis-url", &url].into_iter().chain(ca).collect();
        says_why_not(&Service::start(&settings), reason).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_at_only_one_end_is_said() {
    let authority = Authority::new();
    let (redis, tls_addr) = tls_server(&authority, "127.0.0.1", false).await;
    let ca = authority.ca();
    let plain = url("rediss", redis.addr());
    let service = Service::start(&["--redis-url", &plain, "--redis-ca", text(&ca)]);
    says_why_not(&service, "Request timed out.").await;
    let service = Service::start(&["--redis-url", &url("redis", tls_addr)]);
    says_why_not(&service, "not connected: ").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_server_of_a_cluster_is_reached_by_tls() {
    let authority = Authority::new();
    let cluster = RedisCluster::start_with_tls(&authority).await;
    let url = cluster.tls_url().await;
    let service = Service::start(&["--redis-url", &url, "--redis-ca", text(&authority.ca())]);
    works_on_redis(&service).await;
}
