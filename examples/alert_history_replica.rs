//! A replica of an alert-history service: receives Alertmanager's webhooks and
//! keeps their groups through groupstate. The template for a real one.
//!
//! ```text
//! cargo run --bin groupstate
//! cargo run --example alert_history_replica -- --groupstate 127.0.0.1:50051
//! ```
//!
//! | request | what it does |
//! |---|---|
//! | `POST /webhook` | adds the alerts of a webhook to their group |
//! | `GET /groups?state=&min_alerts=&limit=&offset=` | groups that this replica knows, as JSON |
//! | `GET /group?key=` | one group, from the service |
//! | `GET /metrics` | what the manager has done and holds, for Prometheus |
//! | `GET /healthz` | 200 once the groups are restored |
//!
//! What a replica of your own should take from here:
//!
//! - **Answer 503 when a change was not made, or is in no safe place**:
//!   Alertmanager sends the webhook again. Never log and forget.
//! - **One instance for each key** ([`Instances`]): name all instances, or a
//!   headless Service. Under round robin a Redis outage makes changes lose races
//!   against themselves.
//! - **Deadlines and keepalive** are set by [`RemoteSettings`]: 2 s a call, a
//!   sign of life every 10 s.
//! - **No `retryPolicy` for CompareAndSwap**: a transparent retry of a swap that
//!   succeeded looks like a lost race. The manager repeats changes by itself.
//! - **Run [`AlertGroupManager::deliver_forever`]**: it makes the changes again
//!   that only the memory of an instance has.

use std::{
    fmt::Write, fs, io, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Parser;
use groupstate::{
    group::{AlertGroup, GroupKey, GroupState, Time},
    manager::{
        AlertGroupManager, ManagerSettings,
        affinity::{Instances, ResolveError},
        group_keys::GroupKeys,
        known::Filter,
        remote::RemoteSettings,
        webhook::Webhook,
    },
    reload::Watched,
    telemetry::FileSetting,
};
use serde::Deserialize;
use tokio::net::TcpListener;
use tonic::transport::{Certificate, ClientTlsConfig};

/// Receives Alertmanager webhooks and keeps their alert groups in groupstate.
#[derive(Debug, Parser)]
#[command(name = "alert_history_replica", max_term_width = 100)]
struct Options {
    /// Where to receive webhooks. Port 0 takes a free one, which is logged.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,

    /// An instance of groupstate, or a name that stands for all of them; may be
    /// given several times.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    groupstate: Vec<String>,

    /// Speaks TLS; a file with the CA of the service's certificate.
    #[arg(long, value_name = "FILE", requires = "tls_domain")]
    tls_ca: Option<PathBuf>,

    /// The name in the service's certificate.
    #[arg(long, value_name = "NAME", requires = "tls_ca")]
    tls_domain: Option<String>,

    /// A file with the token for the service, read again when it changes.
    #[arg(long, value_name = "FILE")]
    auth_token_file: Option<PathBuf>,

    /// How long a group lives after its last firing report.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "24h")]
    group_ttl: Duration,

    /// Deletes groups that were not updated for this long.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "24h")]
    max_age: Duration,

    /// How often to learn what other replicas have done.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "30s")]
    restore_every: Duration,
}

/// What every request needs.
#[derive(Clone)]
struct Replica {
    manager: AlertGroupManager,
    keys: GroupKeys,
    restored: Arc<tokio::sync::watch::Sender<bool>>,
}

/// Which groups to list.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupsQuery {
    state: Option<GroupState>,
    #[serde(default)]
    min_alerts: usize,
    limit: Option<usize>,
    #[serde(default)]
    offset: usize,
}

/// Which group to read.
#[derive(Deserialize)]
struct GroupQuery {
    key: String,
}

/// Why a replica could not run.
#[derive(Debug, thiserror::Error)]
enum ReplicaError {
    #[error("--groupstate {0}")]
    Resolve(#[from] ResolveError),
    #[error("--listen: {0}")]
    Listen(#[from] io::Error),
    #[error("{0}")]
    File(String),
}

/// A webhook holds whole alerts, and Alertmanager sets no limit to its size.
const MAX_WEBHOOK_BYTES: usize = 16 << 20;

/// How often the token file is looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).init();
    match run(Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves until it is told to stop.
async fn run(options: Options) -> Result<(), ReplicaError> {
    let remote = remote_settings(&options)?;
    let instances = Instances::resolve(options.groupstate, remote).await?;
    let settings = ManagerSettings {
        group_ttl: options.group_ttl,
        ..ManagerSettings::default()
    };
    let replica = Replica {
        manager: AlertGroupManager::new(Arc::new(instances), settings),
        keys: GroupKeys::new(),
        restored: Arc::new(tokio::sync::watch::channel(false).0),
    };
    tokio::spawn(replica.manager.clone().deliver_forever());
    tokio::spawn(
        replica
            .clone()
            .look_around(options.restore_every, options.max_age),
    );

    let router = Router::new()
        .route("/webhook", post(webhook))
        .layer(DefaultBodyLimit::max(MAX_WEBHOOK_BYTES))
        .route("/groups", get(groups))
        .route("/group", get(group))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .with_state(replica.clone());
    let listener = TcpListener::bind(options.listen).await?;
    tracing::info!(addr = %listener.local_addr()?, "receiving webhooks");
    axum::serve(listener, router)
        .with_graceful_shutdown(stopped())
        .await?;

    let waiting = replica.manager.deliver().await;
    if waiting > 0 {
        tracing::warn!(
            waiting,
            "stopped; these changes are only in the memory of groupstate"
        );
    }
    Ok(())
}

/// How to call the service.
fn remote_settings(options: &Options) -> Result<RemoteSettings, ReplicaError> {
    let mut settings = RemoteSettings::default();
    if let (Some(ca), Some(domain)) = (&options.tls_ca, &options.tls_domain) {
        let pem = fs::read(ca).map_err(|error| ReplicaError::File(format!("--tls-ca: {error}")))?;
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
        settings.tls = Some(tls.domain_name(domain));
    }
    if let Some(file) = &options.auth_token_file {
        let parse = |contents: &[Vec<u8>]| {
            let token = String::from_utf8(contents.concat()).map_err(|_| "is not a text")?;
            Ok(token.trim().to_owned())
        };
        let (token, watcher) = Watched::open(FileSetting::AuthTokenFile, vec![file.clone()], parse)
            .map_err(ReplicaError::File)?;
        tokio::spawn(watcher.watch_forever(RELOAD_INTERVAL));
        settings.token = Some(token);
    }
    Ok(settings)
}

/// Until SIGTERM or Ctrl-C.
async fn stopped() {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .expect("a handler of SIGTERM can be installed");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

// === impl Replica ===

impl Replica {
    /// Restores the groups, at start and again and again, and cleans up.
    async fn look_around(self, every: Duration, max_age: Duration) {
        loop {
            match self.manager.restore().await {
                Ok(restored) => {
                    for problem in &restored.problems {
                        tracing::warn!(key = problem.key, error = %problem.error, "unreadable group");
                    }
                    if !self.restored.send_replace(true) {
                        let groups = restored.groups;
                        tracing::info!(groups, complete = restored.complete, "restored");
                    }
                }
                Err(error) => tracing::warn!(%error, "not restored, trying again"),
            }
            match self.manager.clean_up_expired(max_age).await {
                Ok(0) => {}
                Ok(deleted) => tracing::info!(deleted, "cleaned up"),
                Err(error) => tracing::warn!(%error, "not cleaned up, trying again"),
            }
            let pause = if *self.restored.borrow() {
                every
            } else {
                Duration::from_millis(500)
            };
            tokio::time::sleep(pause).await;
        }
    }
}

/// Adds the alerts of a webhook. Anything but 200 makes Alertmanager send it
/// again, but for 4xx: that webhook will never do.
async fn webhook(State(replica): State<Replica>, body: Bytes) -> Response {
    let received = Time::now();
    let webhook: Webhook = match serde_json::from_slice(&body) {
        Ok(webhook) => webhook,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    if webhook.truncated_alerts > 0 {
        let left_out = webhook.truncated_alerts;
        tracing::warn!(
            left_out,
            "Alertmanager has left out alerts: raise max_alerts"
        );
    }
    let Some(key) = webhook.key(&replica.keys) else {
        return StatusCode::OK.into_response();
    };
    let group_by = webhook.group_by();
    let reports = webhook.into_reports(received);
    match replica.manager.add_alerts(&key, group_by, reports).await {
        Ok(changed) if changed.safe => StatusCode::OK.into_response(),
        Ok(_) => {
            let text =
                "stored in the memory of one groupstate instance only, and the outbox is full";
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
        Err(error) => {
            tracing::warn!(%error, "a webhook was not stored");
            (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response()
        }
    }
}

/// The groups that this replica knows.
async fn groups(
    State(replica): State<Replica>,
    Query(query): Query<GroupsQuery>,
) -> Json<Vec<AlertGroup>> {
    Json(replica.manager.list(&Filter {
        state: query.state,
        min_alerts: query.min_alerts,
        limit: query.limit,
        offset: query.offset,
        ..Filter::default()
    }))
}

/// One group.
async fn group(State(replica): State<Replica>, Query(query): Query<GroupQuery>) -> Response {
    let key = match GroupKey::new(query.key) {
        Ok(key) => key,
        Err(error) => return (StatusCode::BAD_REQUEST, format!("key: {error}")).into_response(),
    };
    match replica.manager.get(&key).await {
        Ok(Some(found)) => Json(found.group).into_response(),
        Ok(None) => StatusCode::NOT_FOUND.into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response(),
    }
}

async fn healthz(State(replica): State<Replica>) -> StatusCode {
    if *replica.restored.borrow() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

/// In the text format of Prometheus.
async fn metrics(State(replica): State<Replica>) -> String {
    let stats = replica.manager.stats();
    let counters = [
        (
            "changes",
            "Changes of groups that were made.",
            stats.changes,
        ),
        (
            "changes_unchanged",
            "Changes that found nothing to do.",
            stats.unchanged,
        ),
        (
            "changes_failed",
            "Changes that failed; their callers were told.",
            stats.failed,
        ),
        ("attempts", "Attempts to make a change.", stats.attempts),
        ("conflicts", "Attempts that lost a race.", stats.conflicts),
        (
            "retried_failures",
            "Attempts without an answer.",
            stats.retried_failures,
        ),
        (
            "outbox_remembered",
            "Changes that only memory had.",
            stats.outbox.remembered,
        ),
        (
            "outbox_delivered",
            "Of these, changes that Redis has.",
            stats.outbox.delivered,
        ),
        (
            "outbox_dropped",
            "Of these, changes that can never be stored.",
            stats.outbox.dropped,
        ),
        (
            "outbox_refused",
            "Changes for which the outbox was full.",
            stats.outbox.refused,
        ),
        (
            "known_crowded_out",
            "Copies forgotten to make room.",
            stats.known.crowded_out,
        ),
    ];
    let most_attempts = usize::try_from(stats.most_attempts).unwrap_or(usize::MAX);
    let gauges = [
        (
            "most_attempts",
            "Attempts of the change that took the most.",
            most_attempts,
        ),
        (
            "outbox_groups",
            "Groups whose changes wait.",
            stats.outbox.groups,
        ),
        ("outbox_reports", "Reports that wait.", stats.outbox.reports),
        (
            "known_groups",
            "Groups of which there is a copy.",
            stats.known.groups,
        ),
        (
            "firing_alerts",
            "Firing alerts in known groups.",
            stats.known.firing_alerts,
        ),
        (
            "resolved_alerts",
            "Resolved alerts in known groups.",
            stats.known.resolved_alerts,
        ),
    ];
    let mut text = String::new();
    for (name, help, value) in counters {
        let name = format!("alert_history_replica_{name}_total");
        // A string takes everything.
        let _ = write!(
            text,
            "# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n"
        );
    }
    for (name, help, value) in gauges {
        let name = format!("alert_history_replica_{name}");
        let _ = write!(
            text,
            "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n"
        );
    }
    text
}
