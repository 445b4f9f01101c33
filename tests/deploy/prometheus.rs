//! A real Prometheus with our rules scrapes real instances, once a second: every
//! rule and every panel gets an answer, and an outage of Redis is a story that
//! the alerts tell.

use std::time::Duration;

use groupstate::grpc::proto as pb;

use crate::{
    PREFIX,
    common::{
        certificates::{Ca, Valid},
        http,
        prometheus::Prometheus,
        redis_server::RedisServer,
        service::{Client, Service},
        stalls::Bound,
        wait_until,
    },
    dashboard::{self, Query},
    promql, read, rules,
};

/// Some scrapes and evaluations on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// Two instances on one Redis, and the Prometheus that watches them.
struct Scene {
    redis: RedisServer,
    instances: [Service; 2],
    prometheus: Prometheus,
}

// === impl Scene ===

impl Scene {
    /// As `deploy/compose` sets it up, only faster and in another place. With
    /// `at_once`, alerts do not wait for their `for`.
    async fn new(at_once: bool) -> Self {
        let redis = RedisServer::start().await;
        let url = redis.url();
        let arguments = ["--redis-url", &url, "--on-recovery", "reconcile"];
        let instances = [Service::start(&arguments), Service::start(&arguments)];
        let config = replaced(
            &read("deploy/compose/prometheus.yaml"),
            &[
                ("groupstate-1:9090", instances[0].http_addr()),
                ("groupstate-2:9090", instances[1].http_addr()),
                ("/etc/prometheus/rules.yaml", "rules.yaml"),
                ("scrape_interval: 15s", "scrape_interval: 1s"),
                ("evaluation_interval: 15s", "evaluation_interval: 1s"),
            ],
        );
        let mut rules = read("deploy/prometheus/rules.yaml");
        if at_once {
            rules = replaced(&rules, &[("for: 30s", "for: 0s"), ("for: 1m", "for: 0s")]);
        }
        Self {
            prometheus: Prometheus::start(&config, &rules).await,
            redis,
            instances,
        }
    }

    /// What an expression selects, once it selects anything; an error or nothing
    /// after a while is said as such.
    async fn answer(&self, expression: &str, bound: Duration) -> Result<(), String> {
        let bound = Bound::of(bound);
        loop {
            if !self.prometheus.query(expression).await?.is_empty() {
                return Ok(());
            }
            if bound.is_over() {
                return Err("no data".into());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn wait_for(&self, alert: &str) {
        wait_until(alert, SOON, async || {
            self.prometheus
                .firing()
                .await
                .iter()
                .any(|firing| firing == alert)
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_has_every_metric_that_a_rule_or_a_panel_uses() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    calls(&mut service.client().await).await;
    // One with a certificate, and one that can be called without.
    let folder = tempfile::tempdir().unwrap();
    let issued = Ca::new("the CA").issue(Valid::Now);
    let (certificate, key) = issued.write(folder.path(), "server");
    let [certificate, key] = [certificate, key].map(|path| path.display().to_string());
    let with_tls = Service::start(&["--tls-cert", &certificate, "--tls-key", &key]);
    let mut exposed = String::new();
    for addr in [service.http_addr(), with_tls.http_addr()] {
        let reply = http::get(addr, "/metrics", Duration::from_secs(2)).await;
        exposed += &reply.unwrap().body;
    }
    let missing: Vec<&str> = promql::METRICS
        .into_iter()
        // Prometheus adds this one.
        .filter(|name| *name != "up")
        .filter(|name| {
            let metric = format!("\n{PREFIX}{name}");
            !["{", " "]
                .iter()
                .any(|end| exposed.contains(&format!("{metric}{end}")))
        })
        .collect();
    assert!(missing.is_empty(), "not exposed: {missing:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rule_and_every_panel_gets_an_answer() {
    let scene = Scene::new(false).await;
    // Rates need two scrapes, with calls in between.
    scene
        .answer(r#"up{job="groupstate"} == 1"#, SOON)
        .await
        .unwrap();
    for instance in &scene.instances {
        calls(&mut instance.client().await).await;
    }

    wait_until("every rule is evaluated", SOON, async || {
        let rules = scene.prometheus.rules().await;
        rules.iter().all(|(_, outcome)| outcome != "unknown")
    })
    .await;
    for (rule, outcome) in scene.prometheus.rules().await {
        assert_eq!(outcome, "ok", "{rule}");
    }

    let rules = rules::rules();
    let recorded = rules::all(&rules).filter_map(|rule| rule["record"].as_str());
    let recorded = recorded.map(|name| (name.to_owned(), name.to_owned()));
    let panels = dashboard::queries()
        .into_iter()
        .map(|Query { panel, expression }| {
            let expression = expression
                .replace("$__rate_interval", "10s")
                .replace("$instance", ".*");
            (panel, expression)
        });
    let mut wrong = Vec::new();
    // The first one without data waits for a while; by then all others should have some.
    let mut bound = SOON;
    for (name, expression) in recorded.chain(panels) {
        if let Err(error) = scene.answer(&expression, bound).await {
            wrong.push(format!("{name}: {error}\n{expression}"));
            bound = Duration::ZERO;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_dies_and_returns_and_the_alerts_say_so() {
    let mut scene = Scene::new(true).await;
    let health = format!(r#"{PREFIX}storage_health{{backend="redis"}}"#);
    let instances_with = |value: u8| format!("count({health} == {value}) == 2");
    scene.answer(&instances_with(1), SOON).await.unwrap();
    assert_eq!(scene.prometheus.firing().await, [""; 0]);

    scene.redis.kill();
    scene.answer(&instances_with(0), SOON).await.unwrap();
    scene.wait_for("GroupstateDegraded").await;
    for instance in &scene.instances {
        instance.wait_for_log("Switched to in-memory storage due to Redis failure", SOON);
        let ready = http::get(instance.http_addr(), "/readyz", Duration::from_secs(2)).await;
        let ready = ready.unwrap();
        assert_eq!(ready.status, 200);
        assert!(ready.body.starts_with("degraded"), "{}", ready.body);
    }
    calls(&mut scene.instances[0].client().await).await;

    scene.redis.restart().await;
    scene.answer(&instances_with(1), SOON).await.unwrap();
    // It came back empty.
    wait_until("no other alert fires", SOON, async || {
        scene.prometheus.firing().await == ["GroupstateRedisLostData"]
    })
    .await;
    for instance in &scene.instances {
        instance.wait_for_log("Switched back to Redis storage", SOON);
        let ready = http::get(instance.http_addr(), "/readyz", Duration::from_secs(2)).await;
        assert!(!ready.unwrap().body.starts_with("degraded"));
    }
    // What was written meanwhile has been carried over, not dropped.
    let carried = format!("sum({PREFIX}degraded_writes_carried_total) > 0");
    scene.answer(&carried, SOON).await.unwrap();
    let dropped = format!("sum({PREFIX}degraded_writes_discarded_total) > 0");
    assert!(scene.prometheus.query(&dropped).await.unwrap().is_empty());
}

/// Three rounds of ordinary calls, over some scrapes.
async fn calls(client: &mut Client) {
    for round in 0..3 {
        let key = format!("alertname=HighCPU,round={round}");
        let group = pb::AlertGroup {
            key: key.clone(),
            metadata: Some(pb::GroupMetadata {
                state: pb::GroupState::Firing.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        client
            .store(pb::StoreRequest {
                group: Some(group),
                expiry: None,
            })
            .await
            .unwrap();
        let load = pb::LoadRequest {
            key,
            include_expire_time: false,
        };
        client.load(load).await.unwrap();
        client.size(pb::SizeRequest::default()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1_100)).await;
    }
}

/// Replaces texts that must be there.
fn replaced(text: &str, replacements: &[(&str, &str)]) -> String {
    replacements
        .iter()
        .fold(text.to_owned(), |text, (from, to)| {
            assert!(text.contains(from), "{from}");
            text.replace(from, to)
        })
}
