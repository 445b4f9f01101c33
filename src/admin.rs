//! The HTTP port, for probes, operators and Prometheus:
//!
//! | path | what it says |
//! |---|---|
//! | `/livez` | 200 as long as the process works |
//! | `/readyz` | 200 while calls are served, from memory too; 503 while stopping |
//! | `/health` | what answers, since when and why, as JSON |
//! | `/metrics` | what was counted, for Prometheus |

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use tokio::net::TcpListener;

use crate::{
    store::{
        failover::Failover,
        memory::{MemoryStore, Usage},
    },
    telemetry,
    version::InstanceId,
};

/// The text format of Prometheus.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the HTTP port shows.
pub struct Admin {
    memory: MemoryStore,
    /// None without Redis.
    failover: Option<Failover>,
    instance: InstanceId,
    phase: AtomicU8,
    metrics: Option<PrometheusHandle>,
}

/// Where the process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    Starting,
    Serving,
    Stopping,
}

/// The body of `/health`.
#[derive(Debug, Serialize)]
struct Health {
    status: Status,
    instance: String,
    version: &'static str,
    redis: RedisHealth,
    switch: SwitchHealth,
    mirror: MirrorHealth,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Starting,
    Ok,
    /// Redis answers, and the mirror is still being filled.
    Warming,
    /// Memory stands in for Redis.
    Degraded,
    Stopping,
}

#[derive(Debug, Serialize)]
struct RedisHealth {
    /// `up`, `down`, or `none` without `--redis-url`.
    status: &'static str,
    /// Of the last PING that was answered, in milliseconds.
    ping_ms: Option<f64>,
}

#[derive(Debug, Serialize)]
struct SwitchHealth {
    /// `closed` (Redis answers), `open` or `half_open` (memory does), or `none`.
    state: &'static str,
    /// RFC 3339.
    since: Option<String>,
    /// Why it is not closed.
    reason: String,
}

#[derive(Debug, Serialize)]
struct MirrorHealth {
    entries: usize,
    bytes: usize,
    dirty: usize,
}

// === impl Admin ===

impl Admin {
    /// Of a process without Redis.
    pub fn of_memory(memory: MemoryStore, instance: &InstanceId) -> Self {
        Self::new(memory, None, instance)
    }

    pub fn of_failover(failover: Failover, instance: &InstanceId) -> Self {
        Self::new(failover.memory().clone(), Some(failover), instance)
    }

    fn new(memory: MemoryStore, failover: Option<Failover>, instance: &InstanceId) -> Self {
        Self {
            memory,
            failover,
            instance: instance.clone(),
            phase: AtomicU8::new(Phase::Starting as u8),
            metrics: telemetry::metrics(),
        }
    }

    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    /// Serves until it is dropped.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let app = Router::new()
            .route("/livez", get(async || "ok\n"))
            .route("/readyz", get(readyz))
            .route("/health", get(health))
            .route("/metrics", get(metrics))
            .with_state(self);
        if let Err(error) = axum::serve(listener, app).await {
            tracing::error!(%error, "the HTTP server failed");
        }
    }

    fn status(&self) -> Status {
        match self.phase.load(Ordering::SeqCst) {
            phase if phase == Phase::Starting as u8 => return Status::Starting,
            phase if phase == Phase::Stopping as u8 => return Status::Stopping,
            _ => {}
        }
        match &self.failover {
            None => Status::Ok,
            Some(failover) if failover.switch().redis_period().is_none() => Status::Degraded,
            Some(failover) if failover.recovery().bring_back().is_warming() => Status::Warming,
            Some(_) => Status::Ok,
        }
    }

    fn health(&self) -> Health {
        let usage = self.usage();
        let (redis, switch) = match &self.failover {
            None => (
                RedisHealth {
                    status: "none",
                    ping_ms: None,
                },
                SwitchHealth {
                    state: "none",
                    since: None,
                    reason: String::new(),
                },
            ),
            Some(failover) => {
                let status = failover.switch().status();
                let latency = failover.recovery().ping_latency();
                (
                    RedisHealth {
                        status: if status.closed { "up" } else { "down" },
                        ping_ms: latency.map(|latency| latency.as_micros() as f64 / 1_000.0),
                    },
                    SwitchHealth {
                        state: status.state,
                        since: Some(status.since.to_string()),
                        reason: status.reason,
                    },
                )
            }
        };
        Health {
            status: self.status(),
            instance: self.instance.as_str().to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            redis,
            switch,
            mirror: MirrorHealth {
                entries: usage.entries,
                bytes: usage.bytes,
                dirty: usage.dirty,
            },
        }
    }

    fn usage(&self) -> Usage {
        let mut usage = self.memory.usage();
        if self.failover.is_none() {
            // Without Redis there is nobody to be told.
            (usage.dirty, usage.dirty_bytes) = (0, 0);
        }
        usage
    }
}

async fn readyz(State(admin): State<Arc<Admin>>) -> (StatusCode, &'static str) {
    match admin.status() {
        Status::Ok | Status::Warming => (StatusCode::OK, "ok\n"),
        Status::Degraded => (StatusCode::OK, "degraded: memory stands in for Redis\n"),
        Status::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
        Status::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n"),
    }
}

async fn health(State(admin): State<Arc<Admin>>) -> Json<Health> {
    Json(admin.health())
}

async fn metrics(State(admin): State<Arc<Admin>>) -> Response {
    telemetry::mirror(admin.usage());
    match &admin.metrics {
        Some(metrics) => ([(CONTENT_TYPE, EXPOSITION)], metrics.render()).into_response(),
        None => (
            StatusCode::SERVICE_UNAVAILABLE,
            "this process does not count\n",
        )
            .into_response(),
    }
}
