//! A real Alertmanager sends the webhooks, to every replica.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    net::SocketAddr,
    process::{Command, Stdio},
    time::Duration,
};

use groupstate::domain::group::{AlertGroup, AlertStatus, Time};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    common::{Process, free_address, http, wait_until},
    site::Site,
};

const INSTALL: &str = "run `make tools`, or as root: apt-get install prometheus-alertmanager";

const GROUPS: usize = 36;
const ALERTS_IN_GROUP: usize = 3;

/// Alertmanager tries a receiver that fails again within a second or so.
const ARRIVES_WITHIN: Duration = Duration::from_secs(30);
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A real one, with one receiver for each replica.
pub struct Alertmanager {
    addr: SocketAddr,
    _process: Process,
    _folder: TempDir,
}

/// What groupstate should have: by group and instance, whether it fires.
type Posted = BTreeMap<String, BTreeMap<String, AlertStatus>>;

#[tokio::test(flavor = "multi_thread")]
async fn an_alertmanager_sends_to_three_replicas_and_every_alert_arrives() {
    let mut site = Site::start(3).await;
    let addresses: Vec<_> = site.replicas.iter().map(|replica| replica.addr()).collect();
    let alertmanager = Alertmanager::start(&addresses, "1h").await;
    let mut posted = Posted::new();

    let all: Vec<usize> = (0..GROUPS).collect();
    let (first, second) = all.split_at(GROUPS / 2);
    alertmanager
        .post(first, AlertStatus::Firing, &mut posted)
        .await;
    arrived(&site, &posted).await;

    // A replica and an instance are away while the rest fires, and while some is
    // resolved. Only what was sent as firing is sent as resolved, so wait.
    site.replicas[0].kill();
    site.services[1].kill();
    alertmanager
        .post(second, AlertStatus::Firing, &mut posted)
        .await;
    arrived(&site, &posted).await;
    let some: Vec<usize> = (0..GROUPS).step_by(3).collect();
    alertmanager
        .post(&some, AlertStatus::Resolved, &mut posted)
        .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    site.start_instance_again(1);
    site.replicas[0].launch_again();
    assert!(site.replicas[0].is_ready().await);
    arrived(&site, &posted).await;

    // What the killed replica has missed it is sent again.
    let failed = "alertmanager_notification_requests_failed_total";
    assert!(alertmanager.metric(failed).await > 0.0);
    wait_until(
        "the replica is sent groups again",
        ARRIVES_WITHIN,
        async || site.replicas[0].metric("changes_total").await > 0,
    )
    .await;
    // What was repeated late may have said "firing" once more, after others had
    // said "resolved": the next notification puts that right.
    site.settled().await;
    arrived(&site, &posted).await;
}

/// Alertmanager never says that an alert is over which resolves while it is silenced.
#[tokio::test(flavor = "multi_thread")]
async fn an_alert_that_resolves_while_it_is_silenced_leaves_its_group() {
    let horizon = ["--report-horizon", "6s"];
    let site = Site::start_with(1, &horizon).await;
    let alertmanager = Alertmanager::start(&[site.replicas[0].addr()], "2s").await;
    let mut posted = Posted::new();
    alertmanager
        .post(&[0], AlertStatus::Firing, &mut posted)
        .await;
    arrived(&site, &posted).await;

    let silenced = "10.0.0.1:9100";
    alertmanager.silence(silenced).await;
    let over = alert(0, silenced, AlertStatus::Resolved);
    alertmanager.send("/api/v2/alerts", &json!([over])).await;
    let of_group = posted.values_mut().next().unwrap();
    of_group.remove(silenced);
    // The others are told of again and again, and the silenced one is not.
    arrived(&site, &posted).await;
    let left = r#"alerts_left_total{reason="unreported"}"#;
    // More if the machine was so busy that the others were not told of in time.
    assert!(site.replicas[0].metric(left).await >= 1);
    let [group] = &site.groups().await[..] else {
        panic!("one group");
    };
    assert_eq!(group.metadata.firing_count, 2);
}

async fn arrived(site: &Site, posted: &Posted) {
    wait_until("every alert has arrived", ARRIVES_WITHIN, async || {
        tokio::time::sleep(Duration::from_millis(100)).await;
        found(&site.groups().await) == *posted
    })
    .await;
}

fn found(groups: &[AlertGroup]) -> Posted {
    let groups = groups.iter().map(|group| {
        let alerts = group.alerts.values();
        let alerts = alerts.map(|alert| (alert.labels["instance"].clone(), alert.status));
        (group.key.to_string(), alerts.collect())
    });
    groups.collect()
}

// === impl Alertmanager ===

impl Alertmanager {
    /// For these replicas. Of what still fires it tells again after `repeat_interval`.
    pub async fn start(replicas: &[&str], repeat_interval: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let file = |name: &str| folder.path().join(name).display().to_string();
        fs::write(file("alertmanager.yaml"), config(replicas, repeat_interval)).unwrap();
        let addr = free_address();
        let mut command = Command::new("prometheus-alertmanager");
        command
            .arg(format!("--config.file={}", file("alertmanager.yaml")))
            .arg(format!("--storage.path={}", file("data")))
            .arg(format!("--web.listen-address={addr}"))
            // It has no peers.
            .arg("--cluster.listen-address=")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let alertmanager = Self {
            _process: Process::spawn(&mut command, INSTALL),
            addr,
            _folder: folder,
        };
        wait_until(
            "Alertmanager is ready",
            Duration::from_secs(20),
            async || {
                let reply = http::get(&addr.to_string(), "/-/ready", ANSWER_WITHIN).await;
                reply.is_ok_and(|reply| reply.status == 200)
            },
        )
        .await;
        alertmanager
    }

    /// Posts all alerts of these groups, as Prometheus does.
    async fn post(&self, groups: &[usize], status: AlertStatus, posted: &mut Posted) {
        let mut alerts = Vec::new();
        for group in groups {
            let key = format!("alertname=A{group},cluster=prod");
            let of_group = posted.entry(key).or_default();
            for number in 0..ALERTS_IN_GROUP {
                let instance = format!("10.0.0.{number}:9100");
                alerts.push(alert(*group, &instance, status));
                of_group.insert(instance, status);
            }
        }
        self.send("/api/v2/alerts", &alerts.into()).await;
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it has that fires and is not silenced: by fingerprint, when it began, in
    /// milliseconds.
    pub async fn active(&self) -> BTreeMap<String, i64> {
        let path = "/api/v2/alerts?active=true&silenced=false&inhibited=false";
        let reply = http::get(&self.addr.to_string(), path, ANSWER_WITHIN).await;
        let alerts: Value = serde_json::from_str(&reply.unwrap().body).unwrap();
        let alerts = alerts.as_array().unwrap().iter();
        let began = |alert: &Value| {
            let starts_at = alert["startsAt"].as_str().unwrap();
            Time::parse_rfc3339(starts_at).unwrap().millis()
        };
        let alerts = alerts.map(|alert| {
            let fingerprint = alert["fingerprint"].as_str().unwrap();
            (fingerprint.to_owned(), began(alert))
        });
        alerts.collect()
    }

    /// Silences all alerts of an instance for an hour.
    async fn silence(&self, instance: &str) {
        let now = Time::now().millis();
        let time = |millis: i64| Time::from_millis(millis).unwrap().to_string();
        let silence = json!({
            "matchers": [{"name": "instance", "value": instance, "isRegex": false, "isEqual": true}],
            "startsAt": time(now),
            "endsAt": time(now + 3_600_000),
            "createdBy": "a test",
            "comment": "made up",
        });
        self.send("/api/v2/silences", &silence).await;
    }

    async fn send(&self, path: &str, body: &Value) {
        let addr = self.addr.to_string();
        let reply = http::send(&addr, "POST", path, &body.to_string(), ANSWER_WITHIN).await;
        let reply = reply.unwrap();
        assert_eq!(reply.status, 200, "{reply:?}");
    }

    /// The sum of a metric over its labels.
    async fn metric(&self, name: &str) -> f64 {
        let reply = http::get(&self.addr.to_string(), "/metrics", ANSWER_WITHIN).await;
        let body = reply.unwrap().body;
        let series = body.lines().filter(|line| line.starts_with(name));
        let values = series.filter_map(|line| line.rsplit_once(' '));
        values.map(|(_, value)| value.parse::<f64>().unwrap()).sum()
    }
}

fn alert(group: usize, instance: &str, status: AlertStatus) -> Value {
    const HOUR: i64 = 3_600_000;
    let now = Time::now().millis();
    let ends = match status {
        AlertStatus::Firing => now + HOUR,
        AlertStatus::Resolved => now - 1,
    };
    let time = |millis: i64| Time::from_millis(millis).unwrap().to_string();
    json!({
        "labels": {"alertname": format!("A{group}"), "cluster": "prod", "instance": instance},
        "annotations": {"summary": "made up"},
        "startsAt": time(now - HOUR),
        "endsAt": time(ends),
        "generatorURL": "http://prometheus.example/graph",
    })
}

fn config(replicas: &[&str], repeat_interval: &str) -> String {
    let mut routes = String::new();
    let mut receivers = String::new();
    for (number, addr) in replicas.iter().enumerate() {
        let _ = write!(
            routes,
            "    - receiver: replica-{number}\n      continue: true\n"
        );
        let _ = write!(
            receivers,
            "  - name: replica-{number}\n    webhook_configs:\n      - url: http://{addr}/webhook\n"
        );
    }
    format!(
        "route:
  receiver: nobody
  group_by: [alertname, cluster]
  group_wait: 200ms
  group_interval: 1s
  repeat_interval: {repeat_interval}
  routes:
{routes}receivers:
  - name: nobody
{receivers}"
    )
}
