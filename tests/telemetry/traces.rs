//! A span for each call and for each request to Redis, on their way to a
//! collector; and no harm if that is not there.

use std::{collections::BTreeMap, time::Duration};

use groupstate::grpc::proto as pb;
use opentelemetry_proto::tonic::{
    common::v1::any_value,
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use tonic::Request;

use crate::{
    collector::{Collector, attributes, number, text},
    common::{
        free_address, redis_cluster::RedisCluster, redis_server::RedisServer, service::Service,
        wait_until,
    },
    group, load_request,
    scrape::Scrape,
    store_request,
};

const SERVICE: &str = "groupstate.v1.GroupStateService";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const SAMPLED: &str = "01";
const NOT_SAMPLED: &str = "00";

/// A request with an id, of a caller who is traced.
fn traced<T>(id: &str, flags: &str, message: T) -> Request<T> {
    let mut request = named(id, message);
    let metadata = request.metadata_mut();
    let parent = format!("00-{TRACE}-{CALLER}-{flags}");
    metadata.insert("traceparent", parent.parse().unwrap());
    metadata.insert("tracestate", "vendor=opaque".parse().unwrap());
    request
}

fn named<T>(id: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("x-request-id", id.parse().unwrap());
    request
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn status(span: &Span) -> StatusCode {
    span.status.clone().unwrap_or_default().code()
}

/// Asserts that a span has these attributes and no others, apart from the
/// request id.
#[track_caller]
fn assert_attributes<const N: usize>(span: &Span, expected: [(&str, any_value::Value); N]) {
    let mut found = attributes(&span.attributes);
    found.remove("groupstate.request_id");
    assert_eq!(found, BTreeMap::from(expected), "{}", span.name);
}

/// Asserts that it is the span of an attempt at Redis within `call`.
#[track_caller]
fn assert_below(call: &Span, span: &Span) {
    assert_eq!(span.kind(), SpanKind::Client);
    assert_eq!(span.trace_id, call.trace_id);
    assert_eq!(span.parent_span_id, call.span_id);
    assert!(call.start_time_unix_nano <= span.start_time_unix_nano);
    assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
    assert!(span.end_time_unix_nano <= call.end_time_unix_nano);
}

#[tokio::test]
async fn a_call_is_a_span_below_its_callers_and_redis_one_below_that() {
    let redis = RedisServer::start_with(&["--requirepass", "s3cret"]).await;
    let collector = Collector::start().await;
    let url = format!("redis://:s3cret@{}", redis.addr());
    let service = Service::start(&["--redis-url", &url, "--otlp-endpoint", collector.endpoint()]);
    let mut client = service.client().await;
    // A first write may have to ask Redis for the time.
    let first = traced("the-first", NOT_SAMPLED, store_request("a-secret-key"));
    client.store(first).await.unwrap();
    let store = traced("the-store", SAMPLED, store_request("a-secret-key"));
    client.store(store).await.unwrap();

    let (call, below) = collector.call("the-store").await;
    assert_eq!(hex(&call.trace_id), TRACE);
    assert_eq!(hex(&call.parent_span_id), CALLER);
    assert_eq!(call.trace_state, "vendor=opaque");
    assert_eq!(call.name, format!("{SERVICE}/Store"));
    assert_eq!(call.kind(), SpanKind::Server);
    assert_eq!(status(&call), StatusCode::Unset);
    assert_attributes(
        &call,
        [
            ("rpc.system", text("grpc")),
            ("rpc.service", text(SERVICE)),
            ("rpc.method", text("Store")),
            ("rpc.grpc.status_code", number(0)),
            ("groupstate.backend", text("redis")),
            ("groupstate.result", text("success")),
        ],
    );

    let [write] = &below[..] else {
        panic!("one write: {below:#?}");
    };
    assert_below(&call, write);
    assert_eq!(write.name, "EVALSHA write");
    assert_eq!(write.trace_state, "vendor=opaque");
    assert_eq!(status(write), StatusCode::Unset);
    assert_attributes(
        write,
        [
            ("db.system.name", text("redis")),
            ("db.operation.name", text("EVALSHA")),
            ("db.stored_procedure.name", text("write")),
            ("server.address", text("127.0.0.1")),
            ("server.port", number(redis.addr().port().into())),
        ],
    );

    let sent = collector.requests();
    let resource = sent[0].resource_spans[0].resource.as_ref().unwrap();
    let resource = attributes(&resource.attributes);
    assert_eq!(resource["service.name"], text("groupstate"));
    assert_eq!(resource["service.version"], text(env!("CARGO_PKG_VERSION")));
    let sent = format!("{sent:?}");
    assert!(
        !sent.contains("secret-key") && !sent.contains("s3cret"),
        "{sent}"
    );
}

#[tokio::test]
async fn a_span_says_what_came_of_its_call() {
    let redis = RedisServer::start().await;
    let collector = Collector::start().await;
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--otlp-endpoint",
        collector.endpoint(),
        "--trip-after",
        "20s",
    ]);
    let mut client = service.client().await;
    let mut direct = redis.connect().await;
    let mut command = redis::cmd("SET");
    let command = command.arg("group:bad").arg("no document");
    let _: redis::Value = command.query_async(&mut direct).await.unwrap();

    client
        .load(named("absent", load_request("k")))
        .await
        .unwrap_err();
    client
        .load(named("invalid", load_request("")))
        .await
        .unwrap_err();
    client
        .load(named("unreadable", load_request("bad")))
        .await
        .unwrap_err();
    let swap = pb::CompareAndSwapRequest {
        group: Some(group("k")),
        expected_version: 7,
        expiry: None,
    };
    client
        .compare_and_swap(named("conflict", swap))
        .await
        .unwrap();
    for (id, code, result, backend, is_failure) in [
        ("absent", 5, "not_found", Some("redis"), false),
        ("invalid", 3, "invalid", None, false),
        ("unreadable", 15, "unreadable", Some("redis"), true),
        ("conflict", 0, "conflict", Some("redis"), false),
    ] {
        let (call, below) = collector.call(id).await;
        assert_eq!(hex(&call.parent_span_id), "", "{id} has no caller");
        let found = attributes(&call.attributes);
        assert_eq!(found["rpc.grpc.status_code"], number(code), "{id}");
        assert_eq!(found["groupstate.result"], text(result), "{id}");
        assert_eq!(
            found.get("groupstate.backend"),
            backend.map(text).as_ref(),
            "{id}"
        );
        assert_eq!(status(&call) == StatusCode::Error, is_failure, "{id}");
        assert_eq!(below.is_empty(), backend.is_none(), "{id}: {below:#?}");
    }

    // Redis hangs. Each attempt is a span.
    redis.process().signal("STOP");
    client
        .load(named("hanging", load_request("k")))
        .await
        .unwrap_err();
    redis.process().signal("CONT");
    let (call, below) = collector.call("hanging").await;
    assert!(below.len() > 1, "{below:#?}");
    for attempt in &below {
        assert_below(&call, attempt);
        assert_eq!(status(attempt), StatusCode::Error);
        assert_eq!(
            attributes(&attempt.attributes)["error.type"],
            text("no_answer")
        );
    }
    assert_eq!(
        attributes(&call.attributes)["groupstate.backend"],
        text("memory")
    );
}

#[tokio::test]
async fn batches_and_streams_are_one_span_with_several_below() {
    let redis = RedisServer::start().await;
    let collector = Collector::start().await;
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--otlp-endpoint",
        collector.endpoint(),
    ]);
    let mut client = service.client().await;
    // A first write may have to ask Redis for the time.
    let first = traced("the-first", NOT_SAMPLED, store_request("a"));
    client.store(first).await.unwrap();
    let batch = pb::StoreAllRequest {
        groups: vec![group("a"), group("b"), group("c")],
        expiry: None,
    };
    client.store_all(named("the-batch", batch)).await.unwrap();
    let all = named("the-stream", pb::LoadAllRequest::default());
    let mut stream = client.load_all(all).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}

    let (_, below) = collector.call("the-batch").await;
    let [batch] = &below[..] else {
        panic!("one pipeline: {below:#?}");
    };
    assert_eq!(batch.name, "PIPELINE EVALSHA write");
    let found = attributes(&batch.attributes);
    assert_eq!(found["db.operation.name"], text("PIPELINE EVALSHA"));
    assert_eq!(found["db.operation.batch.size"], number(3));

    // It reads in a task of its own.
    let (call, below) = collector.call("the-stream").await;
    let names: Vec<_> = below.iter().map(|span| span.name.as_str()).collect();
    for name in ["INFO", "SCAN", "PIPELINE STRLEN", "PIPELINE GETRANGE"] {
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    for span in &below {
        assert_below(&call, span);
    }
}

#[tokio::test]
async fn in_a_cluster_a_span_names_the_server_it_is_for() {
    let cluster = RedisCluster::start().await;
    let collector = Collector::start().await;
    let service = Service::start(&[
        "--redis-url",
        &cluster.url(),
        "--otlp-endpoint",
        collector.endpoint(),
    ]);
    let mut client = service.client().await;
    // `CLUSTER KEYSLOT` says 10310 of `group:a`.
    let owner = &cluster.primaries[RedisCluster::owner_of(10_310)];
    client
        .load(named("one", load_request("a")))
        .await
        .unwrap_err();
    let batch = pb::StoreAllRequest {
        groups: ["a", "b", "c", "d", "e", "f"].map(group).into(),
        expiry: None,
    };
    client.store_all(named("many", batch)).await.unwrap();

    let (_, below) = collector.call("one").await;
    let found = attributes(&below[0].attributes);
    assert_eq!(found["server.port"], number(owner.addr().port().into()));
    let (_, below) = collector.call("many").await;
    assert!(below[0].name.starts_with("PIPELINE"), "{below:#?}");
    let found = attributes(&below[0].attributes);
    assert_eq!(found.get("server.port"), None, "several servers");
}

#[tokio::test]
async fn only_sampled_calls_are_traced_and_no_others() {
    let redis = RedisServer::start().await;
    let collector = Collector::start().await;
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--otlp-endpoint",
        collector.endpoint(),
        "--otlp-sample-ratio",
        "0",
    ]);
    let mut client = service.client().await;
    for n in 0..20 {
        let quiet = traced("not-sampled", NOT_SAMPLED, load_request("k"));
        client.load(quiet).await.unwrap_err();
        client
            .load(named("unknown", load_request("k")))
            .await
            .unwrap_err();
        if n == 10 {
            let wanted = traced("wanted", SAMPLED, load_request("k"));
            client.load(wanted).await.unwrap_err();
        }
    }
    let (call, below) = collector.call("wanted").await;
    // What comes after it has had the time to come, too.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let all: Vec<_> = collector
        .spans()
        .into_iter()
        .map(|span| span.name)
        .collect();
    // Neither PINGs nor probes: they belong to no call.
    assert_eq!(all.len(), 1 + below.len(), "{all:?}");
    assert_eq!(hex(&call.trace_id), TRACE);
}

#[tokio::test]
async fn without_the_setting_nothing_is_sent() {
    let collector = Collector::start().await;
    // Each of these tells others where to send, and none switches it on.
    let service = Service::start_in(
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.endpoint()),
        ],
        &["--log-level", "debug"],
    );
    let mut client = service.client().await;
    let load = traced("quiet", SAMPLED, load_request("k"));
    client.load(load).await.unwrap_err();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(collector.requests(), []);
    let log = service.log();
    assert!(!log.iter().any(|line| line.contains("traces")), "{log:#?}");
}

#[tokio::test]
async fn the_variables_of_opentelemetry_are_heeded() {
    let collector = Collector::start().await;
    let service = Service::start_in(
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()),
            ("OTEL_SERVICE_NAME", "alert-groups"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=pod-1"),
        ],
        &[],
    );
    let mut client = service.client().await;
    client
        .load(named("the-load", load_request("k")))
        .await
        .unwrap_err();
    collector.call("the-load").await;
    let sent = collector.requests();
    let resource = sent[0].resource_spans[0].resource.as_ref().unwrap();
    let resource = attributes(&resource.attributes);
    assert_eq!(resource["service.name"], text("alert-groups"));
    assert_eq!(resource["service.instance.id"], text("pod-1"));
}

// The collector goes on while this waits for the end.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_queued_at_the_end_is_sent() {
    let collector = Collector::start().await;
    let mut service = Service::start(&[
        "--otlp-endpoint",
        collector.endpoint(),
        "--shutdown-delay",
        "0s",
    ]);
    let mut client = service.client().await;
    client
        .load(named("the-last", load_request("k")))
        .await
        .unwrap_err();
    drop(client);
    service.process().signal("TERM");
    assert!(service.wait_for_exit(Duration::from_secs(5)).success());
    let names: Vec<_> = collector
        .spans()
        .into_iter()
        .map(|span| span.name)
        .collect();
    assert_eq!(names, [format!("{SERVICE}/Load")]);
}

#[tokio::test]
async fn a_collector_that_is_down_harms_nobody_and_is_told_of_once() {
    let addr = free_address().to_string();
    let mut service = Service::start(&[
        "--otlp-endpoint",
        &format!("http://{addr}"),
        "--shutdown-delay",
        "0s",
    ]);
    let mut client = service.client().await;
    let dropped = async || {
        Scrape::of(&service)
            .await
            .value("trace_spans_dropped_total")
    };
    assert_eq!(dropped().await, 0.0);
    // In several batches, each of which fails.
    for batch in 1..=3 {
        let before = dropped().await;
        for n in 0..50 {
            client
                .store(store_request(&format!("{batch}-{n}")))
                .await
                .unwrap();
        }
        wait_until("they are dropped", Duration::from_secs(15), async || {
            dropped().await >= before + 50.0
        })
        .await;
    }
    let told = |text| {
        service
            .log()
            .iter()
            .filter(|line| line.contains(text))
            .count()
    };
    assert_eq!(told("traces cannot be sent"), 1, "{:#?}", service.log());

    // It comes, and goes again.
    let collector = Collector::start_on(&addr).await;
    client
        .load(named("the-load", load_request("1-1")))
        .await
        .unwrap();
    collector.call("the-load").await;
    service.wait_for_log("traces are sent again", Duration::from_secs(2));
    drop(collector);
    client.load(load_request("1-1")).await.unwrap();
    drop(client);
    service.process().signal("TERM");
    assert!(service.wait_for_exit(Duration::from_secs(5)).success());
}

#[tokio::test]
async fn a_collector_that_hangs_takes_no_more_than_the_queue() {
    /// More than are queued and on their way.
    const CALLS: usize = 6_000;

    // It takes connections and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let mut service = Service::start(&["--otlp-endpoint", &endpoint, "--shutdown-delay", "0s"]);
    let client = service.client().await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let mut client = client.clone();
        callers.spawn(async move {
            for _ in 0..CALLS / 20 {
                client.load(load_request("k")).await.unwrap_err();
            }
        });
    }
    callers.join_all().await;
    let scrape = Scrape::of(&service).await;
    let calls = scrape.value(r#"storage_operations_total{operation="load",result="not_found"}"#);
    assert_eq!(calls, CALLS as f64, "none has failed otherwise");
    let dropped = scrape.value("trace_spans_dropped_total");
    assert!((1.0..CALLS as f64).contains(&dropped), "{dropped}");
    drop(client);
    service.process().signal("TERM");
    assert!(service.wait_for_exit(Duration::from_secs(5)).success());
}
