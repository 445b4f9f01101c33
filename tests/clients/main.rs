//! Clients that know the service only from outside: `grpcurl`, which speaks
//! JSON and learns the API by reflection, Python with stubs made from the
//! proto, and the examples in Python and Go.

#[path = "../common/mod.rs"]
mod common;

mod examples;

use std::{
    path::Path,
    process::{Command, Output},
};

use common::{redis_server::RedisServer, service::Service, tool};
use serde_json::{Value, json};

/// `grpcurl` against one service.
struct Grpcurl {
    addr: String,
}

/// What `grpcurl` adds to the code of a status to make its exit code.
const GRPCURL_STATUS_OFFSET: i32 = 64;
const NOT_FOUND: i32 = 5;

#[test]
fn grpcurl_lists_and_describes_what_is_served() {
    let service = Service::start(&[]);
    let grpcurl = Grpcurl::of(&service);

    let services = grpcurl.text(&["list"]);
    for name in ["groupstate.v1.GroupStateService", "grpc.health.v1.Health"] {
        assert!(services.lines().any(|line| line == name), "{services}");
    }
    let methods = grpcurl.text(&["list", "groupstate.v1.GroupStateService"]);
    let methods: Vec<&str> = methods
        .lines()
        .filter_map(|line| line.strip_prefix("groupstate.v1.GroupStateService."))
        .collect();
    assert_eq!(
        methods,
        [
            "CompareAndSwap",
            "Delete",
            "ListKeys",
            "Load",
            "LoadAll",
            "Size",
            "Store",
            "StoreAll"
        ]
    );
    let rpc = grpcurl.text(&["describe", "groupstate.v1.GroupStateService.LoadAll"]);
    assert!(
        rpc.contains(
            "rpc LoadAll ( .groupstate.v1.LoadAllRequest ) \
             returns ( stream .groupstate.v1.LoadAllResponse );"
        ),
        "{rpc}"
    );
    let message = grpcurl.text(&["describe", "groupstate.v1.StoreRequest"]);
    assert!(message.contains("oneof expiry {"), "{message}");
    assert!(
        message.contains(".google.protobuf.Duration ttl = 2;"),
        "{message}"
    );
}

#[test]
fn grpcurl_makes_every_call_in_memory() {
    let service = Service::start(&[]);
    every_call(&Grpcurl::of(&service), "BACKEND_MEMORY");
}

#[tokio::test]
async fn grpcurl_makes_every_call_on_redis() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    every_call(&Grpcurl::of(&service), "BACKEND_REDIS");
}

fn every_call(grpcurl: &Grpcurl, backend: &str) {
    let key = "alertname=HighCPU,cluster=prod";
    let one = group(key, &["a1"]);
    let two = group(key, &["a1", "a2"]);

    let created = grpcurl.call("CompareAndSwap", json!({"group": one, "ttl": "86400s"}));
    assert_eq!(created["swapped"], true, "{created}");
    assert_eq!(created["backend"], backend, "{created}");
    let first = version(&created);

    let lost = grpcurl.call("CompareAndSwap", json!({"group": two}));
    assert_eq!(lost["swapped"], false, "{lost}");
    assert_eq!(version(&lost), first, "{lost}");
    assert_eq!(lost["expireTime"], Value::Null, "{lost}");
    assert_eq!(alerts(&lost["current"]), ["a1"], "{lost}");
    assert_eq!(version(&lost["current"]["metadata"]), first, "{lost}");

    let won = grpcurl.call(
        "CompareAndSwap",
        json!({"group": two, "expectedVersion": first.to_string()}),
    );
    assert_eq!(won["swapped"], true, "{won}");
    assert_eq!(won["current"], Value::Null, "{won}");
    assert!(version(&won) > first, "{won}");

    let stored = grpcurl.call("Store", json!({"group": one, "ttl": "86400s"}));
    assert_eq!(stored["backend"], backend, "{stored}");
    assert!(version(&stored) > version(&won), "{stored}");

    let loaded = grpcurl.call("Load", json!({"key": key, "includeExpireTime": true}));
    assert_eq!(loaded["group"]["key"], key, "{loaded}");
    assert_eq!(loaded["group"]["alerts"], one["alerts"], "{loaded}");
    assert_eq!(version(&loaded["group"]["metadata"]), version(&stored));
    assert!(
        loaded["expireTime"]
            .as_str()
            .is_some_and(|time| time.ends_with('Z')),
        "{loaded}"
    );

    let batch = json!({"groups": [group("k1", &["a1"]), group("k2", &["a1"])], "ttl": "60s"});
    let batch = grpcurl.call("StoreAll", batch);
    let results = batch["results"].as_array().unwrap();
    assert_eq!(results.len(), 2, "{batch}");
    for (result, key) in results.iter().zip(["k1", "k2"]) {
        assert_eq!(result["key"], key, "{batch}");
        assert_eq!(result["error"], Value::Null, "{batch}");
        assert!(version(result) > 0, "{batch}");
    }

    let listed = grpcurl.call("ListKeys", json!({"prefix": "k", "pageSize": 10}));
    let mut keys = strings(&listed["keys"]);
    keys.sort_unstable();
    assert_eq!(keys, ["k1", "k2"], "{listed}");
    assert_eq!(listed["nextPageToken"], "", "{listed}");

    let size = grpcurl.call("Size", json!({}));
    assert_eq!(size, json!({"count": "3", "backend": backend}));

    let messages = grpcurl.stream("LoadAll", json!({"prefix": "k"}));
    let (last, _) = messages.split_last().unwrap();
    assert_eq!(
        last["summary"],
        json!({"groups": "2", "problems": "0", "complete": true})
    );
    let mut keys: Vec<&str> = messages
        .iter()
        .flat_map(|message| message["groups"].as_array().unwrap())
        .map(|group| group["key"].as_str().unwrap())
        .collect();
    keys.sort_unstable();
    assert_eq!(keys, ["k1", "k2"], "{messages:?}");

    let kept = grpcurl.call(
        "Delete",
        json!({"key": key, "expectedVersion": first.to_string()}),
    );
    assert_eq!(kept["deleted"], false, "{kept}");
    assert_eq!(version(&kept), version(&stored), "{kept}");
    let gone = grpcurl.call("Delete", json!({"key": key}));
    assert_eq!(gone["deleted"], true, "{gone}");
    let absent = grpcurl.call("Delete", json!({"key": key}));
    assert_eq!(
        absent,
        json!({
            "deleted": false,
            "version": "0",
            "backend": backend,
            "authoritative": backend == "BACKEND_REDIS",
        })
    );
}

#[test]
fn grpcurl_shows_the_reason_of_a_status_in_clear_text() {
    let service = Service::start(&[]);
    let refused = Grpcurl::of(&service).run(
        &["-d", r#"{"key":"absent"}"#],
        &["groupstate.v1.GroupStateService/Load"],
    );
    assert_eq!(
        refused.status.code(),
        Some(GRPCURL_STATUS_OFFSET + NOT_FOUND),
        "{refused:?}"
    );
    let text = String::from_utf8(refused.stderr).unwrap();
    for part in [
        "Code: NotFound",
        r#""reason":"GROUP_NOT_FOUND""#,
        r#""domain":"groupstate""#,
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn grpcurl_checks_health() {
    let service = Service::start(&[]);
    let grpcurl = Grpcurl::of(&service);
    for name in ["", "groupstate.v1.GroupStateService"] {
        let request = json!({"service": name});
        let replies = grpcurl.invoke("grpc.health.v1.Health/Check", &request);
        assert_eq!(replies, [json!({"status": "SERVING"})]);
    }
}

#[test]
fn a_python_client_makes_every_call_in_memory() {
    let service = Service::start(&[]);
    python_client(service.addr(), "memory");
}

#[tokio::test]
async fn a_python_client_makes_every_call_on_redis() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    python_client(service.addr(), "redis");
}

#[tokio::test]
async fn a_python_client_is_answered_though_redis_hangs() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    redis.process().signal("STOP");
    python_client(service.addr(), "hung");
}

/// Runs `clients/client.py`, which fails at the first answer that is not as it
/// should be.
fn python_client(addr: &str, state: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/client.py");
    let output = Command::new(tool("venv/bin/python"))
        .arg(script)
        .args([addr, state])
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && printed.ends_with("ok\n"),
        "{}\n{printed}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

// === impl Grpcurl ===

impl Grpcurl {
    fn of(service: &Service) -> Self {
        Self {
            addr: service.addr().to_owned(),
        }
    }

    /// Makes a call of the service; the reply is one message.
    fn call(&self, method: &str, request: Value) -> Value {
        let mut replies = self.stream(method, request);
        assert_eq!(replies.len(), 1, "{replies:?}");
        replies.remove(0)
    }

    fn stream(&self, method: &str, request: Value) -> Vec<Value> {
        self.invoke(
            &format!("groupstate.v1.GroupStateService/{method}"),
            &request,
        )
    }

    /// Makes any call; every message of the reply is shown with its defaults.
    fn invoke(&self, method: &str, request: &Value) -> Vec<Value> {
        let output = self.run(&["-emit-defaults", "-d", &request.to_string()], &[method]);
        assert!(output.status.success(), "{method} {request}: {output:?}");
        serde_json::Deserializer::from_slice(&output.stdout)
            .into_iter()
            .map(|message| message.unwrap())
            .collect()
    }

    /// What a verb such as `list` prints.
    fn text(&self, verb: &[&str]) -> String {
        let output = self.run(&[], verb);
        assert!(output.status.success(), "{verb:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn run(&self, flags: &[&str], verb: &[&str]) -> Output {
        Command::new(tool("bin/grpcurl"))
            .args(["-plaintext", "-max-time", "20"])
            .args(flags)
            .arg(&self.addr)
            .args(verb)
            .output()
            .unwrap()
    }
}

/// A group in which these alerts fire, as grpcurl shows it with its defaults.
fn group(key: &str, fingerprints: &[&str]) -> Value {
    let alert = |fingerprint: &&str| {
        let alert = json!({
            "fingerprint": fingerprint,
            "alertName": "HighCPU",
            "status": "ALERT_STATUS_FIRING",
            "labels": {"alertname": "HighCPU", "cluster": "prod"},
            "annotations": {"summary": "CPU is \"high\" <80%> & rising"},
            "startsAt": "2026-11-23T05:00:00.123456789Z",
            "endsAt": null,
            "generatorUrl": "",
            "timestamp": "2026-11-23T05:28:05.500Z",
        });
        ((*fingerprint).to_owned(), alert)
    };
    let alerts: serde_json::Map<_, _> = fingerprints.iter().map(alert).collect();
    json!({
        "key": key,
        "alerts": alerts,
        "metadata": {
            "state": "GROUP_STATE_FIRING",
            "firingCount": fingerprints.len(),
            "groupBy": ["alertname", "cluster"],
        },
    })
}

/// The version of a reply. JSON has it as a string, as every int64.
fn version(reply: &Value) -> i64 {
    let version = reply["version"].as_str();
    version
        .and_then(|version| version.parse().ok())
        .unwrap_or_else(|| panic!("no quoted version: {reply}"))
}

/// The fingerprints of a group.
fn alerts(group: &Value) -> Vec<&str> {
    let alerts = group["alerts"].as_object().unwrap();
    alerts.keys().map(String::as_str).collect()
}

fn strings(list: &Value) -> Vec<&str> {
    let list = list.as_array().unwrap();
    list.iter().map(|text| text.as_str().unwrap()).collect()
}
