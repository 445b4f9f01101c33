//! Logs and metrics: where they go, what they look like, and every metric name.

use std::{
    io::IsTerminal,
    panic,
    sync::{LazyLock, Mutex, PoisonError},
    time::{Duration, Instant},
};

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::{
    config::{LogFormat, LogLevel},
    group::GroupKey,
    store::memory::Usage,
};

/// Writes events of this process to standard error from now on. Events of
/// libraries are written from WARN on.
pub fn init(level: LogLevel, format: LogFormat) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let filter = Targets::new()
        .with_target("groupstate", level)
        .with_default(level.min(LevelFilter::WARN));
    let terminal = std::io::stderr().is_terminal();
    let json = match format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !terminal,
    };
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = if json {
        lines.json().flatten_event(true).boxed()
    } else {
        lines.with_ansi(terminal).boxed()
    };
    // Fails only if another subscriber was set before, which then stays.
    let _ = Registry::default()
        .with(lines.with_filter(filter))
        .try_init();

    panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(location, message, "panic");
    }));
}

// === metrics ===

const FALLBACKS: &str = "alert_history_business_grouping_storage_fallback_total";
const RECOVERIES: &str = "alert_history_business_grouping_storage_recovery_total";
const HEALTH: &str = "alert_history_business_grouping_storage_health";
const RESTORED: &str = "alert_history_business_grouping_groups_restored_total";
const DISCARDED: &str = "alert_history_business_grouping_degraded_writes_discarded_total";
const CARRIED: &str = "alert_history_business_grouping_degraded_writes_carried_total";
const MERGED: &str = "alert_history_business_grouping_degraded_writes_merged_total";
const REPORTS_DROPPED: &str = "alert_history_business_grouping_merge_reports_dropped_total";
const PUT_BACK: &str = "alert_history_business_grouping_groups_put_back_total";
const MIRROR_ENTRIES: &str = "alert_history_business_grouping_mirror_entries";
const MIRROR_BYTES: &str = "alert_history_business_grouping_mirror_bytes";
const MIRROR_DIRTY: &str = "alert_history_business_grouping_mirror_dirty_entries";

/// Counts from the first call on. What was counted is rendered by the handle;
/// None if this process counts elsewhere.
pub fn metrics() -> Option<PrometheusHandle> {
    static HANDLE: LazyLock<Option<PrometheusHandle>> = LazyLock::new(init_metrics);
    HANDLE.clone()
}

fn init_metrics() -> Option<PrometheusHandle> {
    let recorder = PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).ok()?;
    describe_counter!(FALLBACKS, Unit::Count, "Switches from Redis to memory.");
    describe_counter!(
        RECOVERIES,
        Unit::Count,
        "Switches from memory back to Redis."
    );
    describe_gauge!(
        HEALTH,
        Unit::Count,
        "1 while the backend can answer, otherwise 0."
    );
    describe_counter!(
        RESTORED,
        Unit::Count,
        "Groups that were read from Redis into the mirror at start and after recoveries."
    );
    describe_counter!(
        DISCARDED,
        Unit::Count,
        "Groups whose last acknowledged write or delete was answered by memory and dropped."
    );
    describe_counter!(
        CARRIED,
        Unit::Count,
        "Groups that were written or deleted in memory and carried over to Redis."
    );
    describe_counter!(
        MERGED,
        Unit::Count,
        "Groups that were written in memory and merged with what others wrote to Redis."
    );
    describe_counter!(
        REPORTS_DROPPED,
        Unit::Count,
        "Reports of an alert that lost against another one in a merge."
    );
    describe_counter!(
        PUT_BACK,
        Unit::Count,
        "Groups that Redis had lost and that were put back from the mirror."
    );
    describe_gauge!(MIRROR_ENTRIES, Unit::Count, "Groups in memory.");
    describe_gauge!(
        MIRROR_BYTES,
        Unit::Bytes,
        "Memory that groups take, overhead included."
    );
    describe_gauge!(
        MIRROR_DIRTY,
        Unit::Count,
        "Groups in memory that Redis does not know of yet."
    );
    counter!(FALLBACKS, "reason" => "redis_error").absolute(0);
    for name in [
        RECOVERIES,
        RESTORED,
        DISCARDED,
        CARRIED,
        MERGED,
        REPORTS_DROPPED,
        PUT_BACK,
    ] {
        counter!(name).absolute(0);
    }
    gauge!(HEALTH, "backend" => "memory").set(1);
    mirror(Usage::default());
    Some(handle)
}

pub fn switched_to_memory() {
    counter!(FALLBACKS, "reason" => "redis_error").increment(1);
}

pub fn switched_to_redis() {
    counter!(RECOVERIES).increment(1);
}

pub fn redis_health(answers: bool) {
    gauge!(HEALTH, "backend" => "redis").set(if answers { 1 } else { 0 });
}

pub fn groups_restored(count: usize) {
    counter!(RESTORED).increment(count as u64);
}

pub fn degraded_writes_discarded(count: usize) {
    counter!(DISCARDED).increment(count as u64);
}

pub fn degraded_writes_carried(count: usize) {
    counter!(CARRIED).increment(count as u64);
}

pub fn degraded_writes_merged(count: usize) {
    counter!(MERGED).increment(count as u64);
}

pub fn groups_put_back(count: usize) {
    counter!(PUT_BACK).increment(count as u64);
}

/// What memory holds; told when somebody asks.
pub fn mirror(usage: Usage) {
    gauge!(MIRROR_ENTRIES).set(usage.entries as f64);
    gauge!(MIRROR_BYTES).set(usage.bytes as f64);
    gauge!(MIRROR_DIRTY).set(usage.dirty as f64);
}

/// A merge has kept one of two reports of each of these alerts.
pub fn reports_dropped(key: &GroupKey, fingerprints: &[String]) {
    /// A recovery may merge thousands of groups.
    const LOG_PAUSE: Duration = Duration::from_millis(100);
    static LAST_LOGGED: Mutex<Option<Instant>> = Mutex::new(None);

    counter!(REPORTS_DROPPED).increment(fingerprints.len() as u64);
    let mut last = LAST_LOGGED.lock().unwrap_or_else(PoisonError::into_inner);
    if last.is_none_or(|last| last.elapsed() >= LOG_PAUSE) {
        *last = Some(Instant::now());
        tracing::info!(
            %key, ?fingerprints,
            "merged a group: of two reports of these alerts the later one was kept"
        );
    }
}
