//! Two real Prometheus tell a real Alertmanager of the same alert, and one of them is
//! heard late: what is stored is what Alertmanager has, step by step.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, routing::get};
use groupstate::domain::group::AlertStatus;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::{
    alertmanager::Alertmanager,
    common::{prometheus::Prometheus, wait_until},
    site::Site,
};

/// One Prometheus, what it watches, and its way to Alertmanager.
struct Watcher {
    prometheus: Prometheus,
    is_full: Arc<AtomicBool>,
    /// Whether what it says reaches Alertmanager.
    link: watch::Sender<bool>,
}

/// Two watchers of the same disk, and who hears of it in the end.
struct Scene {
    site: Site,
    alertmanager: Alertmanager,
    watchers: [Watcher; 2],
}

/// Some scrapes, evaluations and notifications, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// When Prometheus tells again of an alert; four times as long after the last time,
/// Alertmanager takes it for over.
const RESEND: &str = "--rules.alert.resend-delay=1s";

const RULES: &str = "
groups:
  - name: disks
    rules:
      - alert: DiskFull
        expr: disk_full == 1
";

#[tokio::test(flavor = "multi_thread")]
async fn an_alert_of_two_prometheus_is_stored_as_alertmanager_has_it() {
    let scene = Scene::start().await;
    scene.round(0).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: `make replicas`"]
async fn ten_times_over() {
    let scene = Scene::start().await;
    for round in 0..10 {
        scene.round(round).await;
        println!("round {round}: every step as Alertmanager has it");
    }
}

/// It takes a replica for an Alertmanager.
#[tokio::test(flavor = "multi_thread")]
async fn a_prometheus_that_posts_to_a_replica_is_heard() {
    let site = Site::start(1).await;
    let watcher = Watcher::start(site.replicas[0].addr().parse().unwrap()).await;
    for (is_full, counts) in [(true, (1, 0)), (false, (0, 1))] {
        watcher.set_full(is_full).await;
        wait_until("it is heard", SOON, async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let groups = site.groups().await;
            let group = groups.first().map(|group| &group.metadata);
            group.is_some_and(|group| (group.firing_count, group.resolved_count) == counts)
        })
        .await;
    }
}

// === impl Scene ===

impl Scene {
    async fn start() -> Self {
        let site = Site::start(2).await;
        let addresses: Vec<_> = site.replicas.iter().map(|replica| replica.addr()).collect();
        let alertmanager = Alertmanager::start(&addresses, "2s").await;
        let addr = alertmanager.addr();
        Self {
            watchers: [Watcher::start(addr).await, Watcher::start(addr).await],
            site,
            alertmanager,
        }
    }

    /// The life of the alert, once.
    async fn round(&self, round: usize) {
        // The first fires, and nobody hears of it; then the second.
        self.watchers[0].cut_off();
        self.watchers[0].set_full(true).await;
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        self.watchers[1].set_full(true).await;
        let later = self
            .are_equal("the second fires", |firing| firing.is_some())
            .await;

        // The first is heard: the alert began earlier than it was said to.
        self.watchers[0].connect();
        let earlier = self
            .are_equal("the start goes back", |firing| {
                firing < later && firing.is_some()
            })
            .await;

        // It is cut off for a while, and Alertmanager goes on with the other one.
        self.watchers[0].cut_off();
        tokio::time::sleep(Duration::from_secs(5)).await;
        self.are_equal("one is cut off", |firing| firing.is_some())
            .await;
        self.watchers[0].connect();
        self.are_equal("both are back", |firing| firing.is_some())
            .await;

        for watcher in &self.watchers {
            watcher.set_full(false).await;
        }
        self.are_equal("it is over", |firing| firing.is_none())
            .await;
        let groups = self.site.groups().await;
        let [group] = &groups[..] else {
            panic!("round {round}: {groups:?}");
        };
        assert_eq!(
            (group.metadata.firing_count, group.metadata.resolved_count),
            (0, 1)
        );
        assert!(earlier < later, "round {round}");
    }

    /// Waits until what is stored fires as Alertmanager has it, which is `as_it_should`;
    /// says since when it fires.
    async fn are_equal(
        &self,
        what: &str,
        as_it_should: impl Fn(Option<i64>) -> bool,
    ) -> Option<i64> {
        let mut firing = None;
        let reached = &std::sync::Mutex::new(&mut firing);
        let as_it_should = &as_it_should;
        wait_until(what, SOON, async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let active = self.alertmanager.active().await;
            let since = active.values().next().copied();
            **reached.lock().unwrap() = since;
            as_it_should(since) && self.stored().await == active
        })
        .await;
        firing
    }

    /// What fires by the word of the store: by fingerprint, when it began.
    async fn stored(&self) -> BTreeMap<String, i64> {
        let groups = self.site.groups().await;
        let alerts = groups.iter().flat_map(|group| group.alerts.values());
        let firing = alerts.filter(|alert| alert.status == AlertStatus::Firing);
        let firing = firing.map(|alert| {
            let began = alert.starts_at.unwrap();
            (alert.fingerprint.clone(), began.millis())
        });
        firing.collect()
    }
}

// === impl Watcher ===

impl Watcher {
    async fn start(alertmanager: SocketAddr) -> Self {
        let is_full = Arc::new(AtomicBool::new(false));
        let disk = is_full.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap();
        let metrics = get(async move || {
            let is_full = u8::from(disk.load(Ordering::Relaxed));
            format!("# TYPE disk_full gauge\ndisk_full{{disk=\"db-1\"}} {is_full}\n")
        });
        let exporter = Router::new().route("/metrics", metrics);
        tokio::spawn(async move { axum::serve(listener, exporter).await });

        let (link, addr) = link(alertmanager).await;
        let config = format!(
            "
global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}
rule_files: [rules.yaml]
alerting:
  alertmanagers:
    - timeout: 2s
      static_configs: [{{targets: ['{}']}}]
scrape_configs:
  - job_name: disks
    static_configs: [{{targets: ['{target}']}}]
    # Both see the same disk.
    relabel_configs: [{{target_label: instance, replacement: db-1}}]
",
            addr
        );
        Self {
            prometheus: Prometheus::start_with(&config, RULES, &[RESEND]).await,
            is_full,
            link,
        }
    }

    /// Sets what its Prometheus sees, and waits until that has seen it.
    async fn set_full(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::Relaxed);
        wait_until("Prometheus has seen it", SOON, async || {
            self.prometheus.firing().await.is_empty() != is_full
        })
        .await;
    }

    /// Nothing of it reaches Alertmanager from now on.
    fn cut_off(&self) {
        self.link.send_replace(false);
    }

    fn connect(&self) {
        self.link.send_replace(true);
    }
}

/// A way to a server that can be cut; and where it begins.
async fn link(to: SocketAddr) -> (watch::Sender<bool>, SocketAddr) {
    let (link, is_up) = watch::channel(true);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut is_up = is_up.clone();
            tokio::spawn(async move {
                let carried = async {
                    let mut server = TcpStream::connect(to).await?;
                    copy_bidirectional(&mut client, &mut server).await
                };
                tokio::select! {
                    biased;
                    _ = is_up.wait_for(|is_up| !is_up) => {}
                    _ = carried => {}
                }
            });
        }
    });
    (link, addr)
}
