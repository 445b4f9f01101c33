//! Every metric: its name, what it says, its labels; and what counts it.
//!
//! All series exist from the first scrape, so that a rule sees a zero and not a
//! gap. Values of labels are closed lists: the number of series is bounded
//! whatever clients send.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use metrics::{
    Counter, Gauge, Histogram, Label, Unit, counter, describe_counter, describe_gauge,
    describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::rate_limited;
use crate::domain::group::GroupKey;

/// What the memory store holds, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Groups. Of many that expire at once, some count until they are removed.
    pub groups: usize,
    /// Entries that hold no group: tombstones, and what is known of groups in
    /// Redis of which a change was dropped.
    pub traces: usize,
    /// Documents and overhead.
    pub bytes: usize,
    /// The most that `bytes` may be.
    pub max_bytes: usize,
    /// Of the entries those that Redis does not know of.
    pub dirty: usize,
    /// Of the bytes those of these entries.
    pub dirty_bytes: usize,
}

/// Existing dashboards know the metrics by names that begin like this.
const PREFIX: &str = "alert_history_business_grouping_";

/// Upper bounds of the buckets of both histograms, in seconds.
const BUCKETS: [f64; 24] = [
    0.0001, 0.00015, 0.00025, 0.0004, 0.00065, //
    0.001, 0.0015, 0.0025, 0.004, 0.0065, //
    0.01, 0.015, 0.025, 0.04, 0.065, //
    0.1, 0.15, 0.25, 0.4, 0.65, //
    1.0, 2.5, 5.0, 10.0,
];

/// Samples wait in a list until they are put into their buckets: by a scrape, or
/// this often. At 100,000 of 16 bytes a second the list stays below 2 MB.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Declares the values of a label: a closed list.
macro_rules! label {
    ($(#[$doc:meta])* $label:ident { $($(#[$value_doc:meta])* $value:ident = $name:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $label {
            $($(#[$value_doc])* $value,)+
        }

        impl $label {
            pub const ALL: &[Self] = &[$(Self::$value,)+];

            /// The value as it stands in metrics and logs.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name,)+
                }
            }
        }
    };
}

label! {
    /// The calls of the service.
    Operation {
        Store = "store",
        Load = "load",
        Delete = "delete",
        ListKeys = "list_keys",
        LoadAll = "load_all",
        CompareAndSwap = "compare_and_swap",
        StoreAll = "store_all",
        Size = "size",
    }
}

label! {
    /// What came of a call, the worse the later.
    CallResult {
        Success = "success",
        NotFound = "not_found",
        /// Another change came first: a lost swap, a delete by version that found
        /// another version, a listing whose server changed.
        Conflict = "conflict",
        /// The caller's mistake.
        Invalid = "invalid",
        /// Without a valid token. Apart from `invalid`, so that failed logins do not pass
        /// for bad requests; and counted here, so that all results together are all calls.
        Unauthenticated = "unauthenticated",
        /// What is stored is in the way: no readable group, another type, a
        /// version that cannot be raised.
        Unreadable = "unreadable",
        /// Over a limit that leaves room again.
        Shed = "shed",
        /// Its deadline passed, or its caller was gone before.
        Deadline = "deadline",
        Unavailable = "unavailable",
        UnknownOutcome = "unknown_outcome",
        /// A bug.
        Error = "error",
    }
}

label! {
    /// The settings over which calls are shed.
    Limit {
        MaxConcurrentCalls = "max-concurrent-calls",
        MaxInflightBytes = "max-inflight-bytes",
        MaxScans = "max-scans",
        RedisMaxBulkBytes = "redis-max-bulk-bytes",
    }
}

label! {
    /// Why a request was refused for its head alone.
    Refused {
        /// It is not POST.
        Method = "method",
        /// It is not `application/grpc`.
        ContentType = "content_type",
        MetadataTooLarge = "metadata_too_large",
    }
}

label! {
    /// What an attempt asks of Redis.
    RedisCommand {
        Write = "write",
        Delete = "delete",
        Restore = "restore",
        Read = "read",
        /// One step of a listing.
        Scan = "scan",
        /// PING and INFO.
        Other = "other",
    }
}

label! {
    /// The states of the switch between Redis and memory.
    SwitchState {
        Closed = "closed",
        Open = "open",
        HalfOpen = "half_open",
    }
}

label! {
    /// Why somebody was not let in.
    AuthenticationFailure {
        NoToken = "no_token",
        /// Not one `authorization: Bearer TOKEN`.
        MalformedToken = "malformed_token",
        UnknownToken = "unknown_token",
        /// A handshake without one, where clients need one.
        NoCertificate = "no_certificate",
        /// Expired, of another CA, or otherwise of no use.
        BadCertificate = "bad_certificate",
    }
}

label! {
    /// Why a connection of a client was refused or closed.
    ConnectionFailure {
        /// Over the setting.
        MaxConnections = "max-connections",
        /// The TLS handshake failed, or what followed is not HTTP/2.
        Handshake = "handshake",
        /// It did not begin in time.
        Timeout = "timeout",
        /// It held the most of what waits for clients, when there was too much.
        Slow = "slow",
        /// It had passed its age, and its client went on with it.
        Age = "age",
    }
}

label! {
    /// What is read from files and read again when they change, by the name of its
    /// setting.
    FileSetting {
        /// The certificate and its key.
        TlsCert = "tls-cert",
        TlsClientCa = "tls-client-ca",
        AuthTokenFile = "auth-token-file",
        RedisPasswordFile = "redis-password-file",
        RedisCa = "redis-ca",
        /// The certificate and its key.
        RedisCert = "redis-cert",
    }
}

/// What counts. The places of an array are those of the label's `ALL`.
struct Meters {
    /// By operation, then by result.
    operations: Vec<Vec<Counter>>,
    durations: Vec<Histogram>,
    in_flight: Gauge,
    memory_operations: Vec<Counter>,
    shed: Vec<Counter>,
    refused: Vec<Counter>,
    fallbacks: Counter,
    recoveries: Counter,
    /// Only where there is a Redis: a 0 would say that it is down.
    redis_health: LazyLock<Gauge>,
    switch_states: Vec<Gauge>,
    restored: Counter,
    discarded: Counter,
    carried: Counter,
    merged: Counter,
    reports_dropped: Counter,
    put_back: Counter,
    deleted_again: Counter,
    data_losses: Counter,
    mirror_entries: Gauge,
    mirror_tombstones: Gauge,
    mirror_bytes: Gauge,
    mirror_dirty_entries: Gauge,
    mirror_dirty_bytes: Gauge,
    mirror_max_bytes: Gauge,
    redis_durations: Vec<Histogram>,
    redis_retries: Counter,
    redis_may_evict: Gauge,
    tasks: Gauge,
    reload_failures: Vec<Counter>,
    connections: Gauge,
    connection_failures: Vec<Counter>,
    authentication_failures: Vec<Counter>,
    spans_dropped: Counter,
}

/// A connection of a client that is open as long as this is held.
pub struct OpenConnection(());

/// One attempt at Redis; it is measured when this is dropped.
pub struct RedisAttempt {
    command: RedisCommand,
    begun: Instant,
}

/// They belong to the recorder that is set when the first of them is used. A
/// process that uses this library for something else has its own, or none.
static METERS: LazyLock<Meters> = LazyLock::new(Meters::new);

static HANDLE: LazyLock<Option<PrometheusHandle>> = LazyLock::new(|| {
    let mut builder = PrometheusBuilder::new();
    for name in ["storage_duration_seconds", "redis_duration_seconds"] {
        builder = builder
            .set_buckets_for_metric(Matcher::Full(format!("{PREFIX}{name}")), &BUCKETS)
            .ok()?;
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).ok()?;
    Some(handle)
});

/// Counts from the first call on, which has to come before anything that counts.
/// What was counted is rendered by the handle; None if this process counts
/// elsewhere.
pub fn metrics() -> Option<PrometheusHandle> {
    let handle = HANDLE.clone();
    LazyLock::force(&METERS);
    handle
}

/// Keeps what was measured from piling up when nobody scrapes.
pub async fn upkeep_forever() {
    let Some(handle) = metrics() else { return };
    let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        interval.tick().await;
        handle.run_upkeep();
    }
}

// === impl Meters ===

impl Meters {
    fn new() -> Self {
        gauge(
            "build_info",
            "1, with the version of the program.",
            Unit::Count,
            &[("version", env!("CARGO_PKG_VERSION"))],
        )
        .set(1);
        health("memory").set(1);
        Self {
            operations: each(Operation::ALL, |operation| {
                each(CallResult::ALL, |result| {
                    counter(
                        "storage_operations_total",
                        "Calls of the service that are over, by what came of them.",
                        &[("operation", operation.name()), ("result", result.name())],
                    )
                })
            }),
            durations: each(Operation::ALL, |operation| {
                histogram(
                    "storage_duration_seconds",
                    "Time from the arrival of a call to its end, whatever came of it.",
                    &[("operation", operation.name())],
                )
            }),
            in_flight: gauge(
                "storage_operations_in_flight",
                "Calls of the service that are not over.",
                Unit::Count,
                &[],
            ),
            memory_operations: each(Operation::ALL, |operation| {
                counter(
                    "memory_operations_total",
                    "Calls that the memory of this instance has answered, all or in part.",
                    &[("operation", operation.name())],
                )
            }),
            shed: each(Limit::ALL, |limit| {
                counter(
                    "calls_shed_total",
                    "Calls that were refused at once, by the setting over which they were.",
                    &[("limit", limit.name())],
                )
            }),
            refused: each(Refused::ALL, |reason| {
                counter(
                    "requests_refused_total",
                    "Requests that were refused for their head alone, by the reason.",
                    &[("reason", reason.name())],
                )
            }),
            fallbacks: counter(
                "storage_fallback_total",
                "Switches from Redis to memory.",
                &[("reason", "redis_error")],
            ),
            recoveries: counter(
                "storage_recovery_total",
                "Switches from memory back to Redis.",
                &[],
            ),
            redis_health: LazyLock::new(|| health("redis")),
            switch_states: each(SwitchState::ALL, |state| {
                gauge(
                    "switch_state",
                    "1 for the state of the switch between Redis and memory; all 0 without Redis.",
                    Unit::Count,
                    &[("state", state.name())],
                )
            }),
            restored: counter(
                "groups_restored_total",
                "Groups that were read from Redis into the mirror at start and after recoveries.",
                &[],
            ),
            discarded: counter(
                "degraded_writes_discarded_total",
                "Groups whose last acknowledged write or delete was answered by memory and dropped.",
                &[],
            ),
            carried: counter(
                "degraded_writes_carried_total",
                "Groups that were written or deleted in memory and carried over to Redis.",
                &[],
            ),
            merged: counter(
                "degraded_writes_merged_total",
                "Groups that were written in memory and merged with what others wrote to Redis.",
                &[],
            ),
            reports_dropped: counter(
                "merge_reports_dropped_total",
                "Reports of an alert that lost against another one in a merge.",
                &[],
            ),
            put_back: counter(
                "groups_put_back_total",
                "Groups that Redis had lost and that this instance, which had written them, put back.",
                &[],
            ),
            deleted_again: counter(
                "groups_deleted_again_total",
                "Groups that this instance had deleted, that Redis brought back, and that were deleted again.",
                &[],
            ),
            data_losses: counter(
                "redis_data_losses_total",
                "Times that Redis was found to have lost data that it had acknowledged.",
                &[],
            ),
            mirror_entries: gauge(
                "mirror_entries",
                "Groups in memory, tombstones and expired ones left out.",
                Unit::Count,
                &[],
            ),
            mirror_tombstones: gauge(
                "mirror_tombstones",
                "Entries in memory that hold no group: what was deleted, or dropped, and Redis may still hold.",
                Unit::Count,
                &[],
            ),
            mirror_bytes: gauge(
                "mirror_bytes",
                "Memory that groups and tombstones take, overhead included.",
                Unit::Bytes,
                &[],
            ),
            mirror_dirty_entries: gauge(
                "mirror_dirty_entries",
                "Groups in memory that Redis does not know of yet.",
                Unit::Count,
                &[],
            ),
            mirror_dirty_bytes: gauge(
                "mirror_dirty_bytes",
                "Memory that groups take of which Redis does not know yet; they cannot make room.",
                Unit::Bytes,
                &[],
            ),
            mirror_max_bytes: gauge(
                "mirror_max_bytes",
                "Memory that groups may take: --mirror-max-bytes.",
                Unit::Bytes,
                &[],
            ),
            redis_durations: each(RedisCommand::ALL, |command| {
                histogram(
                    "redis_duration_seconds",
                    "Time of one attempt at Redis, whether it succeeds or is given up.",
                    &[("command", command.name())],
                )
            }),
            redis_retries: counter(
                "redis_retries_total",
                "Attempts at Redis beyond the first of a call.",
                &[],
            ),
            redis_may_evict: gauge(
                "redis_may_evict",
                "1 when the maxmemory-policy of Redis lets it throw groups away.",
                Unit::Count,
                &[],
            ),
            tasks: gauge(
                "tokio_tasks",
                "Tasks of this process that are not over, idle ones included.",
                Unit::Count,
                &[],
            ),
            connections: gauge(
                "connections",
                "Connections of gRPC clients that are open.",
                Unit::Count,
                &[],
            ),
            connection_failures: each(ConnectionFailure::ALL, |reason| {
                counter(
                    "connection_failures_total",
                    "Connections of gRPC clients that were refused or closed, by the reason.",
                    &[("reason", reason.name())],
                )
            }),
            authentication_failures: each(AuthenticationFailure::ALL, |reason| {
                counter(
                    "authentication_failures_total",
                    "Calls and handshakes whose client did not show who it is, by the reason.",
                    &[("reason", reason.name())],
                )
            }),
            reload_failures: each(FileSetting::ALL, |file| {
                counter(
                    "reload_failures_total",
                    "Looks at a file that has changed and is of no use; what was read before stays.",
                    &[("file", file.name())],
                )
            }),
            spans_dropped: counter(
                "trace_spans_dropped_total",
                "Spans of traces that the collector did not take, or that came too fast to be sent.",
                &[],
            ),
        }
    }
}

/// One meter for each value of a label.
fn each<L: Copy, M>(label: &[L], meter: impl Fn(L) -> M) -> Vec<M> {
    label.iter().copied().map(meter).collect()
}

fn health(backend: &'static str) -> Gauge {
    gauge(
        "storage_health",
        "1 while the backend can answer, otherwise 0.",
        Unit::Count,
        &[("backend", backend)],
    )
}

fn counter(name: &str, help: &'static str, labels: &[(&'static str, &'static str)]) -> Counter {
    let name = format!("{PREFIX}{name}");
    describe_counter!(name.clone(), Unit::Count, help);
    counter!(name, labels_of(labels))
}

fn gauge(
    name: &str,
    help: &'static str,
    unit: Unit,
    labels: &[(&'static str, &'static str)],
) -> Gauge {
    let name = format!("{PREFIX}{name}");
    describe_gauge!(name.clone(), unit, help);
    gauge!(name, labels_of(labels))
}

/// Of seconds.
fn histogram(name: &str, help: &'static str, labels: &[(&'static str, &'static str)]) -> Histogram {
    let name = format!("{PREFIX}{name}");
    describe_histogram!(name.clone(), Unit::Seconds, help);
    histogram!(name, labels_of(labels))
}

fn labels_of(labels: &[(&'static str, &'static str)]) -> Vec<Label> {
    labels.iter().map(Label::from).collect()
}

// === what happens ===

pub fn call_begins() {
    METERS.in_flight.increment(1);
}

/// A call is over. `memory`: whether memory has answered it, all or in part.
pub fn call_ends(operation: Operation, result: CallResult, memory: bool, took: Duration) {
    let at = operation as usize;
    METERS.in_flight.decrement(1);
    METERS.operations[at][result as usize].increment(1);
    METERS.durations[at].record(took);
    if memory {
        METERS.memory_operations[at].increment(1);
    }
}

/// A call was refused at once.
pub fn call_shed(limit: Limit) {
    METERS.shed[limit as usize].increment(1);
}

/// A request was refused for its head alone.
pub fn request_refused(reason: Refused) {
    METERS.refused[reason as usize].increment(1);
}

pub fn switched_to_memory() {
    METERS.fallbacks.increment(1);
}

pub fn switched_to_redis() {
    METERS.recoveries.increment(1);
}

/// The state of the switch; Redis answers when it is closed.
pub fn switch_state(state: SwitchState) {
    METERS
        .redis_health
        .set(u8::from(state == SwitchState::Closed));
    for &each in SwitchState::ALL {
        METERS.switch_states[each as usize].set(u8::from(each == state));
    }
}

pub fn groups_restored(count: usize) {
    METERS.restored.increment(count as u64);
}

pub fn degraded_writes_discarded(count: usize) {
    METERS.discarded.increment(count as u64);
}

pub fn degraded_writes_carried(count: usize) {
    METERS.carried.increment(count as u64);
}

pub fn degraded_writes_merged(count: usize) {
    METERS.merged.increment(count as u64);
}

pub fn groups_put_back(count: usize) {
    METERS.put_back.increment(count as u64);
}

pub fn groups_deleted_again(count: usize) {
    METERS.deleted_again.increment(count as u64);
}

/// Redis has lost data that it had acknowledged.
pub fn redis_lost_data() {
    METERS.data_losses.increment(1);
}

/// What memory holds; told when somebody asks.
pub fn mirror(usage: MemoryUsage) {
    METERS.mirror_entries.set(usage.groups as f64);
    METERS.mirror_tombstones.set(usage.traces as f64);
    METERS.mirror_bytes.set(usage.bytes as f64);
    METERS.mirror_dirty_entries.set(usage.dirty as f64);
    METERS.mirror_dirty_bytes.set(usage.dirty_bytes as f64);
    METERS.mirror_max_bytes.set(usage.max_bytes as f64);
}

/// A merge has kept one of two reports of each of these alerts.
pub fn reports_dropped(key: &GroupKey, fingerprints: &[String]) {
    /// Fingerprints that one event names.
    const NAMED: usize = 10;

    METERS.reports_dropped.increment(fingerprints.len() as u64);
    rate_limited!(
        info,
        key = key.as_str(),
        reports = fingerprints.len(),
        fingerprints = ?&fingerprints[..fingerprints.len().min(NAMED)],
        "merged a group: of two reports of these alerts the later one was kept"
    );
}

/// Measures an attempt at Redis for as long as the answer is held.
#[must_use]
pub fn redis_attempt(command: RedisCommand) -> RedisAttempt {
    RedisAttempt {
        command,
        begun: Instant::now(),
    }
}

/// An attempt at Redis is not the first of its call.
pub fn redis_retries() {
    METERS.redis_retries.increment(1);
}

/// Whether Redis throws groups away when its memory is full.
pub fn redis_may_evict(may: bool) {
    METERS.redis_may_evict.set(u8::from(may));
}

/// Tasks that are not over; told when somebody asks.
pub fn tasks(count: usize) {
    METERS.tasks.set(count as f64);
}

/// A client has connected.
#[must_use]
pub fn connection_opens() -> OpenConnection {
    METERS.connections.increment(1);
    OpenConnection(())
}

/// A connection of a client was refused or closed.
pub fn connection_failed(reason: ConnectionFailure) {
    METERS.connection_failures[reason as usize].increment(1);
}

/// Somebody was not let in.
pub fn authentication_failed(reason: AuthenticationFailure) {
    METERS.authentication_failures[reason as usize].increment(1);
}

/// The files of a setting have changed and are of no use, now or still.
pub fn reload_failed(setting: FileSetting) {
    METERS.reload_failures[setting as usize].increment(1);
}

/// A certificate that is in use ends at this time, in seconds of the Unix epoch.
/// Only of certificates that there are: a 0 would say that they have expired.
pub fn certificate_expires(setting: FileSetting, at: i64) {
    gauge(
        "certificate_expiry_timestamp_seconds",
        "When the certificate in use expires, of CAs the last; in seconds of the Unix epoch.",
        Unit::Seconds,
        &[("file", setting.name())],
    )
    .set(at as f64);
}

/// Spans of traces are lost.
pub(super) fn spans_dropped(count: usize) {
    METERS.spans_dropped.increment(count as u64);
}

// === impl OpenConnection ===

impl Drop for OpenConnection {
    fn drop(&mut self) {
        METERS.connections.decrement(1);
    }
}

// === impl RedisAttempt ===

impl Drop for RedisAttempt {
    fn drop(&mut self) {
        METERS.redis_durations[self.command as usize].record(self.begun.elapsed());
    }
}
