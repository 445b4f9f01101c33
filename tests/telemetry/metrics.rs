//! Every series exists from the first scrape, and counts what it says.

use std::{
    io::Write,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use groupstate::{grpc::proto as pb, store::StoreError, telemetry};
use tonic::{Code, Request};

use crate::{
    common::{
        redis_server::RedisServer,
        service::{Client, Service},
        wait_until,
    },
    double::{Behaviour, Double, InProcess},
    group, load_request,
    scrape::Scrape,
    store_request,
};

const OPERATIONS: [&str; 8] = [
    "store",
    "load",
    "delete",
    "list_keys",
    "load_all",
    "compare_and_swap",
    "store_all",
    "size",
];

const RESULTS: [&str; 11] = [
    "success",
    "not_found",
    "conflict",
    "invalid",
    "unauthenticated",
    "unreadable",
    "shed",
    "deadline",
    "unavailable",
    "unknown_outcome",
    "error",
];

const FILES: [&str; 6] = [
    "tls-cert",
    "tls-client-ca",
    "auth-token-file",
    "redis-password-file",
    "redis-ca",
    "redis-cert",
];

const COMMANDS: [&str; 6] = ["write", "delete", "restore", "read", "scan", "other"];

const BUCKETS: [&str; 25] = [
    "0.0001", "0.00015", "0.00025", "0.0004", "0.00065", "0.001", "0.0015", "0.0025", "0.004",
    "0.0065", "0.01", "0.015", "0.025", "0.04", "0.065", "0.1", "0.15", "0.25", "0.4", "0.65", "1",
    "2.5", "5", "10", "+Inf",
];

/// What dashboards and rules are written against: name and type.
const METRICS: [(&str, &str); 34] = [
    ("authentication_failures_total", "counter"),
    ("build_info", "gauge"),
    ("calls_shed_total", "counter"),
    ("connection_failures_total", "counter"),
    ("connections", "gauge"),
    ("degraded_writes_carried_total", "counter"),
    ("degraded_writes_discarded_total", "counter"),
    ("degraded_writes_merged_total", "counter"),
    ("groups_deleted_again_total", "counter"),
    ("groups_put_back_total", "counter"),
    ("groups_restored_total", "counter"),
    ("memory_operations_total", "counter"),
    ("merge_reports_dropped_total", "counter"),
    ("mirror_bytes", "gauge"),
    ("mirror_dirty_bytes", "gauge"),
    ("mirror_dirty_entries", "gauge"),
    ("mirror_entries", "gauge"),
    ("mirror_max_bytes", "gauge"),
    ("mirror_tombstones", "gauge"),
    ("redis_data_losses_total", "counter"),
    ("redis_duration_seconds", "histogram"),
    ("redis_may_evict", "gauge"),
    ("redis_retries_total", "counter"),
    ("reload_failures_total", "counter"),
    ("requests_refused_total", "counter"),
    ("storage_duration_seconds", "histogram"),
    ("storage_fallback_total", "counter"),
    ("storage_health", "gauge"),
    ("storage_operations_in_flight", "gauge"),
    ("storage_operations_total", "counter"),
    ("storage_recovery_total", "counter"),
    ("switch_state", "gauge"),
    ("tokio_tasks", "gauge"),
    ("trace_spans_dropped_total", "counter"),
];

/// Asserts that every series is there whose value is 0 at first.
fn assert_all_zero(scrape: &Scrape) {
    let zero = |series: &str| assert_eq!(scrape.value(series), 0.0, "{series}");
    for operation in OPERATIONS {
        for result in RESULTS {
            zero(&format!(
                r#"storage_operations_total{{operation="{operation}",result="{result}"}}"#
            ));
        }
        zero(&format!(
            r#"memory_operations_total{{operation="{operation}"}}"#
        ));
        assert_histogram(scrape, "storage_duration_seconds", "operation", operation);
        zero(&format!(
            r#"storage_duration_seconds_count{{operation="{operation}"}}"#
        ));
    }
    for command in COMMANDS {
        assert_histogram(scrape, "redis_duration_seconds", "command", command);
    }
    for limit in ["max-concurrent-calls", "max-inflight-bytes", "max-scans"] {
        zero(&format!(r#"calls_shed_total{{limit="{limit}"}}"#));
    }
    for reason in ["max-connections", "handshake", "timeout", "slow", "age"] {
        zero(&format!(
            r#"connection_failures_total{{reason="{reason}"}}"#
        ));
    }
    for reason in [
        "no_token",
        "malformed_token",
        "unknown_token",
        "no_certificate",
        "bad_certificate",
    ] {
        zero(&format!(
            r#"authentication_failures_total{{reason="{reason}"}}"#
        ));
    }
    for reason in ["method", "content_type", "metadata_too_large"] {
        zero(&format!(r#"requests_refused_total{{reason="{reason}"}}"#));
    }
    for file in FILES {
        zero(&format!(r#"reload_failures_total{{file="{file}"}}"#));
    }
    for series in [
        "connections",
        "storage_operations_in_flight",
        "storage_recovery_total",
        "groups_restored_total",
        "degraded_writes_discarded_total",
        "degraded_writes_carried_total",
        "degraded_writes_merged_total",
        "merge_reports_dropped_total",
        "groups_put_back_total",
        "groups_deleted_again_total",
        "redis_data_losses_total",
        "mirror_entries",
        "mirror_tombstones",
        "mirror_bytes",
        "mirror_dirty_entries",
        "mirror_dirty_bytes",
        "redis_retries_total",
        "redis_may_evict",
        "trace_spans_dropped_total",
        r#"storage_fallback_total{reason="redis_error"}"#,
    ] {
        zero(series);
    }
}

fn assert_histogram(scrape: &Scrape, name: &str, label: &str, value: &str) {
    let label = format!(r#"{label}="{value}""#);
    for le in BUCKETS {
        scrape.value(&format!(r#"{name}_bucket{{{label},le="{le}"}}"#));
    }
    scrape.value(&format!("{name}_sum{{{label}}}"));
    scrape.value(&format!("{name}_count{{{label}}}"));
}

#[tokio::test]
async fn without_redis_every_series_exists_from_the_first_scrape() {
    let service = Service::start(&["--mirror-max-bytes", "3MiB"]);
    let scrape = Scrape::of(&service).await;
    assert_eq!(scrape.names(), METRICS.map(|(name, _)| name));
    for (name, kind) in METRICS {
        assert_eq!(scrape.about("TYPE", name), kind, "{name}");
        assert!(scrape.about("HELP", name).ends_with('.'), "{name}");
    }
    assert_all_zero(&scrape);
    for state in ["closed", "open", "half_open"] {
        let series = format!(r#"switch_state{{state="{state}"}}"#);
        assert_eq!(scrape.value(&series), 0.0);
    }
    assert_eq!(scrape.value(r#"storage_health{backend="memory"}"#), 1.0);
    assert!(
        !scrape.has(r#"storage_health{backend="redis"}"#),
        "there is no Redis that could be down"
    );
    assert_eq!(scrape.value("mirror_max_bytes"), f64::from(3 << 20));
    let version = env!("CARGO_PKG_VERSION");
    let build = format!(r#"build_info{{version="{version}"}}"#);
    assert_eq!(scrape.value(&build), 1.0);
}

#[tokio::test]
async fn with_redis_every_series_exists_from_the_first_scrape() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let scrape = Scrape::of(&service).await;
    assert_eq!(scrape.names(), METRICS.map(|(name, _)| name));
    assert_all_zero(&scrape);
    assert_switch(&scrape, "closed");
    // The service has looked for Redis and written its probe key.
    for command in ["write", "other"] {
        let series = format!(r#"redis_duration_seconds_count{{command="{command}"}}"#);
        assert!(scrape.value(&series) > 0.0, "{}", scrape.text);
    }
}

#[track_caller]
fn assert_switch(scrape: &Scrape, state: &str) {
    let series = format!(r#"switch_state{{state="{state}"}}"#);
    assert_eq!(
        scrape
            .non_zero("switch_state")
            .into_iter()
            .collect::<Vec<_>>(),
        [(series, 1.0)]
    );
    let healthy = if state == "closed" { 1.0 } else { 0.0 };
    assert_eq!(scrape.value(r#"storage_health{backend="redis"}"#), healthy);
}

#[tokio::test]
async fn promtool_finds_nothing_to_say() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let mut client = service.client().await;
    client.store(store_request("k")).await.unwrap();
    client.load(load_request("k")).await.unwrap();
    client.load(load_request("nobody")).await.unwrap_err();
    client.size(pb::SizeRequest::default()).await.unwrap();
    let scrape = Scrape::of(&service).await;
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("cannot start promtool: {error}; run `make tools`, or as root: apt-get install prometheus")
        });
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(scrape.text.as_bytes()).unwrap();
    drop(stdin);
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert_eq!(String::from_utf8_lossy(&said), "", "{}", scrape.text);
    assert!(output.status.success());
}

/// The calls that were counted, as `operation/result`.
fn counted(scrape: &Scrape) -> Vec<(String, f64)> {
    let series = scrape.non_zero("storage_operations_total").into_iter();
    let short = |series: String| {
        let parts: Vec<_> = series.split('"').collect();
        format!("{}/{}", parts[1], parts[3])
    };
    series
        .map(|(series, count)| (short(series), count))
        .collect()
}

async fn load_all(client: &mut Client) {
    let request = pb::LoadAllRequest::default();
    let mut stream = client.load_all(request).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
}

fn swap_request(key: &str, expected_version: i64) -> pb::CompareAndSwapRequest {
    pb::CompareAndSwapRequest {
        group: Some(group(key)),
        expected_version,
        expiry: None,
    }
}

#[tokio::test]
async fn each_call_counts_once_by_what_came_of_it() {
    let redis = RedisServer::start().await;
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--max-concurrent-calls",
        "1",
        // Redis is not given up while it hangs below.
        "--redis-timeout",
        "5s",
        "--trip-after",
        "20s",
    ]);
    let mut client = service.client().await;
    let mut direct = redis.connect().await;
    for (command, key) in [("SET", "group:bad"), ("LPUSH", "group:list")] {
        let mut command = redis::cmd(command);
        let _: redis::Value = command
            .arg(key)
            .arg("x")
            .query_async(&mut direct)
            .await
            .unwrap();
    }

    let stored = client.store(store_request("k")).await.unwrap().into_inner();
    client.store(store_request("")).await.unwrap_err();
    client.load(load_request("k")).await.unwrap();
    client.load(load_request("nobody")).await.unwrap_err();
    client.load(load_request("bad")).await.unwrap_err();
    client.load(load_request("list")).await.unwrap_err();
    let lost = client.compare_and_swap(swap_request("k", 0)).await.unwrap();
    assert!(!lost.into_inner().swapped);
    let swap = swap_request("k", stored.version);
    let swapped = client.compare_and_swap(swap).await.unwrap().into_inner();
    assert!(swapped.swapped);
    for (key, expected_version) in [
        ("k", Some(stored.version)),
        ("nobody", Some(1)),
        ("k", None),
    ] {
        let key = key.into();
        let request = pb::DeleteRequest {
            key,
            expected_version,
        };
        client.delete(request).await.unwrap();
    }
    for groups in [vec![group("a"), group("b")], vec![group("c"), group("")]] {
        let request = pb::StoreAllRequest {
            groups,
            expiry: None,
        };
        client.store_all(request).await.unwrap();
    }
    client.size(pb::SizeRequest::default()).await.unwrap();
    let keys = client
        .list_keys(pb::ListKeysRequest::default())
        .await
        .unwrap();
    assert_eq!(keys.into_inner().keys.len(), 4, "a, b, c and bad");
    // Two things that are stored are no groups.
    load_all(&mut client).await;

    redis.process().signal("STOP");
    let mut hanging = client.clone();
    let hanging = tokio::spawn(async move {
        let mut request = Request::new(load_request("unknown to memory"));
        request.set_timeout(Duration::from_millis(800));
        hanging.load(request).await
    });
    wait_until("a call hangs", Duration::from_secs(5), async || {
        Scrape::of(&service)
            .await
            .value("storage_operations_in_flight")
            == 1.0
    })
    .await;
    client.store(store_request("k")).await.unwrap_err();
    let status = hanging.await.unwrap().unwrap_err();
    redis.process().signal("CONT");
    // The client may be faster than the service.
    assert!(matches!(
        status.code(),
        Code::DeadlineExceeded | Code::Cancelled
    ));
    wait_until("no call is in flight", Duration::from_secs(5), async || {
        Scrape::of(&service)
            .await
            .value("storage_operations_in_flight")
            == 0.0
    })
    .await;

    let scrape = Scrape::of(&service).await;
    let expected = [
        ("compare_and_swap/conflict", 1.0),
        ("compare_and_swap/success", 1.0),
        ("delete/conflict", 1.0),
        ("delete/success", 2.0),
        ("list_keys/success", 1.0),
        ("load/deadline", 1.0),
        ("load/not_found", 1.0),
        ("load/success", 1.0),
        ("load/unreadable", 2.0),
        ("load_all/unreadable", 1.0),
        ("size/success", 1.0),
        ("store/invalid", 1.0),
        ("store/shed", 1.0),
        ("store/success", 1.0),
        ("store_all/invalid", 1.0),
        ("store_all/success", 1.0),
    ];
    let expected = expected.map(|(call, count)| (call.to_owned(), count));
    assert_eq!(counted(&scrape), expected);
    let count = |operation| {
        scrape.value(&format!(
            r#"storage_duration_seconds_count{{operation="{operation}"}}"#
        ))
    };
    assert_eq!(
        OPERATIONS.map(count),
        [3.0, 5.0, 3.0, 1.0, 1.0, 2.0, 2.0, 1.0]
    );
    let slow = r#"storage_duration_seconds_bucket{operation="load",le="0.4"}"#;
    assert_eq!(scrape.value(slow), 4.0, "one took as long as it could");
    let shed = r#"calls_shed_total{limit="max-concurrent-calls"}"#;
    assert_eq!(scrape.value(shed), 1.0);
    assert!(scrape.non_zero("memory_operations_total").is_empty());
    for command in ["write", "delete", "read", "scan"] {
        let series = format!(r#"redis_duration_seconds_count{{command="{command}"}}"#);
        assert!(scrape.value(&series) > 0.0, "{series}");
    }
}

#[tokio::test]
async fn what_memory_answers_is_counted_apart() {
    let service = Service::start(&[]);
    let mut client = service.client().await;
    client.store(store_request("k")).await.unwrap();
    client.load(load_request("k")).await.unwrap();
    client.load(load_request("nobody")).await.unwrap_err();
    // Of this one memory was never asked.
    client.load(load_request("")).await.unwrap_err();
    load_all(&mut client).await;
    wait_until("the stream is over", Duration::from_secs(5), async || {
        Scrape::of(&service)
            .await
            .value("storage_operations_in_flight")
            == 0.0
    })
    .await;
    let scrape = Scrape::of(&service).await;
    let series = |operation| format!(r#"memory_operations_total{{operation="{operation}"}}"#);
    let counted: Vec<_> = scrape
        .non_zero("memory_operations_total")
        .into_iter()
        .collect();
    let expected = [("load", 2.0), ("load_all", 1.0), ("store", 1.0)];
    assert_eq!(
        counted,
        expected.map(|(operation, count)| (series(operation), count))
    );
    assert_eq!(scrape.value("mirror_entries"), 1.0);
    assert!(scrape.value("mirror_bytes") > 0.0);
    assert_eq!(
        scrape.value("mirror_dirty_entries"),
        0.0,
        "nobody is to be told"
    );
    assert_eq!(scrape.value("mirror_dirty_bytes"), 0.0);
}

#[tokio::test]
async fn while_redis_is_down_the_switch_and_what_is_dirty_show() {
    let mut redis = RedisServer::start_with(&["--maxmemory-policy", "allkeys-lru"]).await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let mut client = service.client().await;
    assert_eq!(Scrape::of(&service).await.value("redis_may_evict"), 1.0);
    redis.kill();
    client.store(store_request("k")).await.unwrap();
    let scrape = Scrape::of(&service).await;
    assert!(
        scrape.non_zero("switch_state").len() == 1,
        "{}",
        scrape.text
    );
    assert_eq!(scrape.value(r#"storage_health{backend="redis"}"#), 0.0);
    assert_eq!(
        scrape.value(r#"storage_fallback_total{reason="redis_error"}"#),
        1.0
    );
    assert_eq!(
        scrape.value(r#"memory_operations_total{operation="store"}"#),
        1.0
    );
    assert_eq!(scrape.value("mirror_dirty_entries"), 1.0);
    assert_eq!(
        scrape.value("mirror_dirty_bytes"),
        scrape.value("mirror_bytes")
    );
    assert_eq!(scrape.value("mirror_entries"), 1.0);
    assert_eq!(scrape.value("mirror_tombstones"), 0.0);
    // Now with a policy that keeps what is stored.
    redis.launch_again(&["--maxmemory-policy", "noeviction"]);
    wait_until("back on Redis", Duration::from_secs(5), async || {
        let scrape = Scrape::of(&service).await;
        scrape.value(r#"switch_state{state="closed"}"#) == 1.0
    })
    .await;
    let scrape = Scrape::of(&service).await;
    assert_switch(&scrape, "closed");
    assert_eq!(scrape.value("storage_recovery_total"), 1.0);
    assert_eq!(scrape.value("degraded_writes_discarded_total"), 1.0);
    assert_eq!(scrape.value("mirror_dirty_bytes"), 0.0);
    assert_eq!(scrape.value("redis_may_evict"), 0.0);
}

#[tokio::test]
async fn mirror_entries_are_groups_and_neither_tombstones_nor_what_has_expired() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let mut client = service.client().await;
    for key in ["kept", "deleted"] {
        client.store(store_request(key)).await.unwrap();
    }
    let mut fleeting = store_request("fleeting");
    fleeting.expiry = Some(pb::store_request::Expiry::Ttl(prost_types::Duration {
        seconds: 1,
        nanos: 0,
    }));
    client.store(fleeting).await.unwrap();
    let scrape = Scrape::of(&service).await;
    assert_eq!(scrape.value("mirror_tombstones"), 0.0);
    let request = pb::DeleteRequest {
        key: "deleted".into(),
        expected_version: None,
    };
    assert!(client.delete(request).await.unwrap().into_inner().deleted);
    let scrape = Scrape::of(&service).await;
    assert_eq!(scrape.value("mirror_tombstones"), 1.0);
    wait_until("only one is left", Duration::from_secs(5), async || {
        Scrape::of(&service).await.value("mirror_entries") == 1.0
    })
    .await;
    assert_eq!(service.health().await["mirror"]["entries"], 1);
}

#[tokio::test]
async fn a_policy_that_is_set_while_redis_runs_is_noticed() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let mut direct = redis.connect().await;
    let warning = "maxmemory-policy is not noeviction";
    for (policy, may_evict) in [
        ("noeviction", 0.0),
        ("allkeys-lru", 1.0),
        ("noeviction", 0.0),
    ] {
        let mut command = redis::cmd("CONFIG");
        let command = command.arg("SET").arg("maxmemory-policy").arg(policy);
        let _: redis::Value = command.query_async(&mut direct).await.unwrap();
        wait_until("it is noticed", Duration::from_secs(20), async || {
            Scrape::of(&service).await.value("redis_may_evict") == may_evict
        })
        .await;
    }
    let log = service.log();
    let warnings = log.iter().filter(|line| line.contains(warning));
    assert_eq!(warnings.count(), 1, "{log:#?}");
    let switched = Scrape::of(&service).await;
    assert_eq!(switched.value("storage_recovery_total"), 0.0);
}

#[tokio::test]
async fn attempts_beyond_the_first_are_counted() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url(), "--trip-after", "20s"]);
    let mut client = service.client().await;
    client.store(store_request("k")).await.unwrap();
    assert_eq!(Scrape::of(&service).await.value("redis_retries_total"), 0.0);
    redis.process().signal("STOP");
    client.load(load_request("k")).await.unwrap();
    redis.process().signal("CONT");
    assert!(Scrape::of(&service).await.value("redis_retries_total") >= 1.0);
}

/// The only test in this process that counts: others start processes.
#[tokio::test]
async fn failures_and_calls_that_nobody_waits_for_count_as_well() {
    let scrape = || Scrape::parse(telemetry::metrics().unwrap().render());
    let count = |operation: &str, result: &str| {
        scrape().value(&format!(
            r#"storage_operations_total{{operation="{operation}",result="{result}"}}"#
        ))
    };
    for (behaviour, result) in [
        (
            Behaviour::Fail(StoreError::Unavailable("down".into())),
            "unavailable",
        ),
        (
            Behaviour::Fail(StoreError::OutcomeUnknown),
            "unknown_outcome",
        ),
        (Behaviour::Fail(StoreError::ListingRestarted), "conflict"),
        (Behaviour::Fail(StoreError::MemoryFull { limit: 1 }), "shed"),
        (Behaviour::Fail(StoreError::Bug("bug".into())), "error"),
        (Behaviour::Panic, "error"),
    ] {
        let server = InProcess::serve(Arc::new(Double::new(behaviour)), &[]).await;
        let mut client = server.client().await;
        let before = count("load", result);
        client.load(load_request("k")).await.unwrap_err();
        assert_eq!(count("load", result), before + 1.0, "{result}");
    }

    // In the middle of a stream.
    let gone = StoreError::Unavailable("gone".into());
    for (behaviour, result) in [
        (Behaviour::FailMidway(gone), "unavailable"),
        (Behaviour::PanicMidway, "error"),
    ] {
        let server = InProcess::serve(Arc::new(Double::new(behaviour)), &[]).await;
        let mut client = server.client().await;
        let request = pb::LoadAllRequest::default();
        let mut stream = client.load_all(request).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_some());
        stream.message().await.unwrap_err();
        wait_until("it is counted", Duration::from_secs(5), async || {
            count("load_all", result) == 1.0
        })
        .await;
    }
    assert_eq!(count("load_all", "success"), 0.0);

    // The caller leaves.
    let double = Double::new(Behaviour::Hang);
    let server = InProcess::serve(Arc::new(double), &["--max-scans", "1"]).await;
    let mut client = server.client().await;
    let mut leaving = client.clone();
    let call = tokio::spawn(async move { leaving.size(pb::SizeRequest::default()).await });
    wait_until("the call hangs", Duration::from_secs(5), async || {
        scrape().value("storage_operations_in_flight") == 1.0
    })
    .await;
    client.size(pb::SizeRequest::default()).await.unwrap_err();
    assert_eq!(count("size", "shed"), 1.0);
    assert_eq!(
        scrape().value(r#"calls_shed_total{limit="max-scans"}"#),
        1.0
    );
    call.abort();
    wait_until("it is counted", Duration::from_secs(5), async || {
        count("size", "deadline") == 1.0
    })
    .await;
    assert_eq!(scrape().value("storage_operations_in_flight"), 0.0);
}

#[test]
fn the_readme_has_every_metric() {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let (_, section) = readme.split_once("\n## Metrics\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    let mut told: Vec<_> = rows
        .filter_map(|row| row.split_once("` | "))
        .map(|(name, rest)| (name, rest.split(' ').next().unwrap()))
        .filter(|(_, kind)| ["counter", "gauge", "histogram"].contains(kind))
        .collect();
    told.sort_unstable();
    let mut expected = METRICS.to_vec();
    // Only there with TLS; see the tests of the front door.
    expected.push(("certificate_expiry_timestamp_seconds", "gauge"));
    expected.sort_unstable();
    assert_eq!(told, expected);
}
