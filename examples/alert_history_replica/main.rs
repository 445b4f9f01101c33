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
//! | `POST /webhook` | adds the alerts of a webhook to their group; says what was stored and what refused |
//! | `POST /api/v2/alerts` | the same for what Prometheus or vmalert posts to an Alertmanager |
//! | `GET /groups?state=&min_alerts=&limit=&offset=&unconfirmed=` | groups that this replica knows, as JSON |
//! | `GET /group?key=` | one group, from the service |
//! | `GET /metrics` | what the manager has done and holds, for Prometheus |
//! | `GET /healthz` | 200 once the groups are restored |
//!
//! What a replica of your own should take from here:
//!
//! - **Answer 503 when a change was not made, or is in no safe place**:
//!   Alertmanager sends the webhook again. Never log and forget. 400 is for what can
//!   never be stored, and only if nothing of a webhook can.
//! - **Say when a webhook was received**, before its body is read ([`intake::Received`]): of two
//!   reports of an alert the later one counts. So replicas need NTP.
//! - **One instance for each key** ([`Instances`]): name all instances, or a
//!   headless Service. Under round robin a Redis outage makes changes lose races
//!   against themselves.
//! - **Deadlines and keepalive** are set by [`RemoteSettings`]: 2 s a call, a
//!   sign of life every 10 s.
//! - **No `retryPolicy` for CompareAndSwap**: a transparent retry of a swap that
//!   succeeded looks like a lost race. The manager repeats changes by itself.
//! - **Run [`AlertGroupManager::deliver_forever`]**: it makes the changes again
//!   that only the memory of an instance has.

mod intake;
mod metrics;
mod options;

use std::{
    io,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Parser;
use groupstate::{
    domain::group::{AlertGroup, GroupKey, GroupState},
    manager::{
        AlertGroupManager,
        affinity::{Instances, ResolveError},
        group_keys::GroupKeys,
        known::Filter,
        pauses::{self, Moment, Pauses},
    },
};
use serde::Deserialize;
use tokio::net::TcpListener;

use crate::{intake::Answers, options::Options};

/// What every request needs.
#[derive(Clone)]
struct Replica {
    manager: AlertGroupManager,
    keys: GroupKeys,
    /// Labels by which alerts are grouped that come without a group.
    group_by: Arc<[String]>,
    restored: Arc<tokio::sync::watch::Sender<bool>>,
    pauses: Arc<Mutex<Pauses>>,
    answers: Arc<Answers>,
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
    #[serde(default)]
    unconfirmed: bool,
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
    #[error("{0}")]
    Setting(&'static str),
}

/// A webhook holds whole alerts, and Alertmanager sets no limit to its size.
const MAX_WEBHOOK_BYTES: usize = 16 << 20;

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
    let (settings, remote, keys) = (options.manager()?, options.remote()?, options.keys());
    let instances = Instances::resolve(options.groupstate, remote).await?;
    let pauses = Pauses::new(options.sender_timeout, Moment::now());
    let replica = Replica {
        manager: AlertGroupManager::new(Arc::new(instances), settings),
        keys,
        group_by: options.group_by.into(),
        restored: Arc::new(tokio::sync::watch::channel(false).0),
        pauses: Arc::new(Mutex::new(pauses)),
        answers: Arc::default(),
    };
    tokio::spawn(replica.manager.clone().deliver_forever());
    tokio::spawn(replica.clone().watch_for_pauses());
    tokio::spawn(
        replica
            .clone()
            .look_around(options.restore_every, options.max_age),
    );

    let router = Router::new()
        .route("/webhook", post(intake::webhook))
        .route("/api/v2/alerts", post(intake::posted))
        .layer(DefaultBodyLimit::max(MAX_WEBHOOK_BYTES))
        .route("/groups", get(groups))
        .route("/group", get(group))
        .route("/metrics", get(metrics::metrics))
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
    /// Whether what is received now may have come before this process was stopped.
    fn is_behind(&self) -> bool {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        pauses.look(Moment::now())
    }

    async fn watch_for_pauses(self) {
        let mut was_behind = false;
        loop {
            tokio::time::sleep(pauses::LOOK_EVERY).await;
            let is_behind = self.is_behind();
            if is_behind && !was_behind {
                tracing::warn!(
                    "this process was stopped for a while: what it had received before is sent back"
                );
            }
            was_behind = is_behind;
        }
    }

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
        unconfirmed: query.unconfirmed,
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
