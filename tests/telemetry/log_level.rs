//! `/loglevel`, and what else the HTTP port answers.

use std::time::Duration;

use crate::{
    common::{
        http::{self, HttpReply},
        service::Service,
        stalls::pass,
    },
    load_request,
};

const BOUND: Duration = Duration::from_secs(2);

async fn send(service: &Service, method: &str, path: &str, body: &str) -> HttpReply {
    let reply = http::send(service.http_addr(), method, path, body, BOUND).await;
    reply.unwrap()
}

async fn level(service: &Service) -> String {
    let reply = send(service, "GET", "/loglevel", "").await;
    assert_eq!(reply.status, 200);
    reply.body
}

/// Makes a call, which the log shows or does not.
async fn call(service: &Service, key: &str, shown: bool) {
    let mut client = service.client().await;
    client.load(load_request(key)).await.unwrap_err();
    if shown {
        service.wait_for_log(key, BOUND);
    } else {
        pass(Duration::from_millis(100)).await;
        let log = service.log();
        assert!(!log.iter().any(|line| line.contains(key)), "{log:#?}");
    }
}

#[tokio::test]
async fn the_level_is_changed_while_the_service_runs() {
    let service = Service::start(&[]);
    assert_eq!(level(&service).await, "info\n");
    call(&service, "first", false).await;

    let reply = send(&service, "PUT", "/loglevel", "debug\n").await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.body, "debug for 15 minutes, then info\n");
    assert_eq!(level(&service).await, "debug\n");
    call(&service, "second", true).await;

    let reply = send(&service, "PUT", "/loglevel", "warn").await;
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.body,
        "warn for 15 minutes, then info
"
    );
    call(&service, "third", false).await;
    let reply = send(&service, "PUT", "/loglevel", "info").await;
    assert_eq!(
        (reply.status, reply.body.as_str()),
        (
            200, "info
"
        )
    );
    let told = service.log();
    let told = told.iter().filter(|line| line.contains("log level"));
    let told = told.count();
    assert!(
        (2..=3).contains(&told),
        "changes are in the log, at most one a second: {told}"
    );
}

#[tokio::test]
async fn what_is_no_level_is_refused_and_changes_nothing() {
    let service = Service::start(&[]);
    for body in ["", "loud", "DEBUG", "debug info"] {
        let reply = send(&service, "PUT", "/loglevel", body).await;
        assert_eq!(reply.status, 400, "{body:?}");
        let names = "error, warn, info, debug, trace";
        assert!(reply.body.contains(names), "{}", reply.body);
    }
    let reply = send(&service, "PUT", "/loglevel", &"x".repeat(10_000)).await;
    assert_eq!(reply.status, 413);
    assert_eq!(level(&service).await, "info\n");
}

#[tokio::test]
async fn unknown_paths_and_methods_are_said_to_be_so() {
    let service = Service::start(&[]);
    for (method, path, status) in [
        ("GET", "/", 404),
        ("GET", "/loglevel/debug", 404),
        ("PUT", "/nothing", 404),
        ("POST", "/loglevel", 405),
        ("DELETE", "/loglevel", 405),
        ("PUT", "/metrics", 405),
        ("POST", "/health", 405),
    ] {
        let reply = send(&service, method, path, "debug").await;
        assert_eq!(reply.status, status, "{method} {path}");
    }
    assert_eq!(level(&service).await, "info\n");
}
