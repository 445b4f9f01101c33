//! One event for each call, and nothing that clients can fill the log with.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use groupstate::grpc::proto::{self as pb, group_state_service_client::GroupStateServiceClient};
use serde_json::Value;
use tonic::Request;

use crate::{
    common::{Process, redis_server::RedisServer, service::Service},
    group, load_request, store_request,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// Begins a control sequence; breaks a line, or the direction, in what shows the log.
const UNSEEN: &str = "\u{9b}\u{85}\u{2028}\u{2029}\u{202e}\u{2066}\u{200f}\u{feff}\u{e0041}";

fn is_unseen(c: char) -> bool {
    c.is_control() || UNSEEN.contains(c)
}

fn named<T>(id: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("x-request-id", id.parse().unwrap());
    request
}

/// The only event of a call.
fn event_of(service: &Service, id: &str) -> Value {
    service.wait_for_log(id, Duration::from_secs(2));
    let log = service.log();
    let lines: Vec<_> = log.iter().filter(|line| line.contains(id)).collect();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(!lines[0].contains(is_unseen), "{:?}", lines[0]);
    serde_json::from_str(lines[0]).unwrap()
}

#[tokio::test]
async fn each_call_is_one_event_with_everything_that_is_known_of_it() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url(), "--log-level", "debug"]);
    let mut client = service.client().await;
    let odd_key = format!("a\nb\t\u{1b}[31m\"{UNSEEN}{}", "x".repeat(4_000));

    let mut traced = named("the-store", store_request(&odd_key));
    let traceparent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    traced
        .metadata_mut()
        .insert("traceparent", traceparent.parse().unwrap());
    client.store(traced).await.unwrap();
    let event = event_of(&service, "the-store");
    assert_eq!(event["level"], "DEBUG");
    assert_eq!(event["operation"], "store");
    assert_eq!(event["trace_id"], TRACE);
    assert_eq!(event["key"], odd_key);
    assert_eq!(event["backend"], "redis");
    assert_eq!(event["result"], "success");
    assert!(event["latency_us"].as_u64().unwrap() > 0);

    let mut traced = named("no-load", load_request("nobody"));
    traced
        .metadata_mut()
        .insert("traceparent", "00-12-34-01".parse().unwrap());
    client.load(traced).await.unwrap_err();
    let event = event_of(&service, "no-load");
    assert_eq!(
        (&event["result"], &event["backend"]),
        (&"not_found".into(), &"redis".into())
    );
    assert_eq!(event["trace_id"], Value::Null, "not a valid traceparent");

    let swap = pb::CompareAndSwapRequest {
        group: Some(group(&odd_key)),
        expected_version: 0,
        expiry: None,
    };
    client
        .compare_and_swap(named("lost-swap", swap))
        .await
        .unwrap();
    let event = event_of(&service, "lost-swap");
    assert_eq!(
        (&event["result"], &event["level"]),
        (&"conflict".into(), &"DEBUG".into())
    );

    client
        .store(named("bad-store", store_request(&"€".repeat(5_000))))
        .await
        .unwrap_err();
    let event = event_of(&service, "bad-store");
    assert_eq!(event["result"], "invalid");
    let key = event["key"].as_str().unwrap();
    assert_eq!(key.len(), 4_095, "one that is too long is cut");
    assert_eq!(event["backend"], Value::Null, "no backend was asked");

    let request = named("the-stream", pb::LoadAllRequest::default());
    let mut stream = client.load_all(request).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
    let event = event_of(&service, "the-stream");
    assert_eq!(
        (&event["operation"], &event["result"]),
        (&"load_all".into(), &"success".into())
    );
}

#[tokio::test]
async fn a_key_cannot_forge_a_line_of_the_text_log() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_groupstate"));
    command
        .args(["--grpc-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0"])
        .args(["--log-format", "text", "--log-level", "debug"])
        .env_clear()
        .stderr(Stdio::piped());
    let mut process = Process::spawn(&mut command, "cargo builds it");
    let mut lines = BufReader::new(process.child.stderr.take().unwrap()).lines();
    let mut line_with = |text: &str| {
        let mut lines = lines.by_ref().map_while(Result::ok);
        let found = lines.find(|line| line.contains(text));
        found.unwrap_or_else(|| panic!("the log does not say {text:?}"))
    };
    let serving = line_with("serving gRPC");
    let (_, addr) = serving.split_once("addr=").unwrap();
    let addr = addr.split(' ').next().unwrap();
    let mut client = GroupStateServiceClient::connect(format!("http://{addr}"))
        .await
        .unwrap();
    let key = format!("k\n2026-01-01T00:00:00Z ERROR forged\r\u{1b}[2J{UNSEEN}");
    client
        .load(named("the-load", load_request(&key)))
        .await
        .unwrap_err();
    let line = line_with("the-load");
    assert!(line.contains("DEBUG") && line.contains("forged"), "{line}");
    assert!(!line.contains(is_unseen), "{line:?}");
}

#[tokio::test]
async fn what_clients_cause_does_not_fill_the_log() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let mut client = service.client().await;
    let mut direct = redis.connect().await;
    let before = service.log().len();
    let begin = Instant::now();
    for n in 0..50 {
        let mut command = redis::cmd("SET");
        let command = command.arg(format!("group:{n}")).arg("no document");
        let _: redis::Value = command.query_async(&mut direct).await.unwrap();
        let key = n.to_string();
        client.load(load_request(&key)).await.unwrap_err();
        client.load(load_request("")).await.unwrap_err();
        client.store(store_request(&key)).await.unwrap();
        client.load(load_request("nobody")).await.unwrap_err();
    }
    service.wait_for_log("replaced an unreadable document", Duration::from_secs(2));
    let log = service.log();
    let seconds = begin.elapsed().as_secs() as usize;
    assert!(log.len() - before <= seconds + 1, "{log:#?}");
}
