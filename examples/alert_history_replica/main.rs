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
//! - **Say when a webhook was received**, before its body is read ([`Received`]): of two
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

mod metrics;
mod options;

use std::{
    io,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, FromRequestParts, Query, State},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Parser;
use groupstate::{
    group::{AlertGroup, GroupKey, GroupState, Time},
    manager::{
        AlertGroupManager, ManagerError,
        affinity::{Instances, ResolveError},
        group_keys::GroupKeys,
        known::Filter,
        pauses::{self, Moment, Pauses},
        webhook::Webhook,
    },
    retention::Refused,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::options::Options;

/// What every request needs.
#[derive(Clone)]
struct Replica {
    manager: AlertGroupManager,
    keys: GroupKeys,
    restored: Arc<tokio::sync::watch::Sender<bool>>,
    pauses: Arc<Mutex<Pauses>>,
    answers: Arc<Answers>,
}

/// Webhooks by what they were answered.
#[derive(Default)]
struct Answers {
    stored: AtomicU64,
    never: AtomicU64,
    again: AtomicU64,
}

/// When a request came, before its body was read.
struct Received(Time);

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
        .route("/webhook", post(webhook))
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

// === impl Received ===

impl FromRequestParts<Replica> for Received {
    type Rejection = Response;

    async fn from_request_parts(_: &mut Parts, replica: &Replica) -> Result<Self, Response> {
        let received = Time::now();
        if replica.is_behind() {
            let text = "this replica was stopped for a while and does not know when this was sent";
            return Err(replica.answers.again(text.into()));
        }
        Ok(Self(received))
    }
}

// === impl Answers ===

impl Answers {
    /// 200: what can be stored is.
    fn stored(&self, stored: usize, refused: &[Refused]) -> Response {
        self.stored.fetch_add(1, Ordering::Relaxed);
        Json(json!({"stored": stored, "refused": named(refused)})).into_response()
    }

    /// 400: nothing can be stored, now or later.
    fn never(&self, message: String, refused: &[Refused]) -> Response {
        self.never.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(message, "a webhook can never be stored");
        let body = json!({"stored": 0, "refused": named(refused), "message": message});
        (StatusCode::BAD_REQUEST, Json(body)).into_response()
    }

    /// 503: it may be stored when it is sent again.
    fn again(&self, message: String) -> Response {
        self.again.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(message, "a webhook was not stored");
        (StatusCode::SERVICE_UNAVAILABLE, message).into_response()
    }
}

fn named(refused: &[Refused]) -> Vec<Value> {
    let named = refused.iter().map(|refused| {
        json!({
            "fingerprint": refused.fingerprint,
            "reason": refused.reason.as_str(),
            "message": refused.message,
        })
    });
    named.collect()
}

/// Adds the alerts of a webhook. Alertmanager sends it again if it is answered 503, and
/// drops it if it is answered 400.
async fn webhook(
    State(replica): State<Replica>,
    Received(received): Received,
    body: Bytes,
) -> Response {
    let answers = &replica.answers;
    let webhook: Webhook = match serde_json::from_slice(&body) {
        Ok(webhook) => webhook,
        Err(error) => return answers.never(format!("this is no webhook: {error}"), &[]),
    };
    if webhook.truncated_alerts > 0 {
        let left_out = webhook.truncated_alerts;
        tracing::warn!(
            left_out,
            "Alertmanager has left out alerts: raise max_alerts"
        );
    }
    let alerts = webhook.len();
    let keys = &replica.keys;
    match replica.manager.receive(webhook, keys, received).await {
        Ok(None) => answers.stored(0, &[]),
        Ok(Some(changed)) if changed.safe => {
            for refused in &changed.refused {
                tracing::warn!(
                    fingerprint = refused.fingerprint,
                    reason = refused.reason.as_str(),
                    message = refused.message,
                    "an alert was refused"
                );
            }
            answers.stored(alerts - changed.refused.len().min(alerts), &changed.refused)
        }
        Ok(Some(_)) => answers.again(
            "stored in the memory of one groupstate instance only, and the outbox is full".into(),
        ),
        Err(error) => match &error {
            ManagerError::AllRefused(refused) => answers.never(error.to_string(), refused),
            ManagerError::Invalid(_) => answers.never(error.to_string(), &[]),
            _ => answers.again(error.to_string()),
        },
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
