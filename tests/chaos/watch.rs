//! Watches the instances while a run goes on: their logs, metrics, probes and
//! memory, and how well the machine itself runs.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};

use super::{
    clients::RunClock,
    evidence::{InstanceRecord, Outage, Sample, Stall},
    history::Moment,
};
use crate::common::{http, service::Service, stalls::stalled};

/// What a watcher of an instance has seen.
#[derive(Default)]
pub struct Seen {
    pub samples: Vec<Sample>,
    pub probe_faults: Vec<String>,
    pub peak_resident_bytes: usize,
}

const METRICS_PREFIX: &str = "alert_history_business_grouping_";
/// The pause between two looks at an instance.
const PAUSE: Duration = Duration::from_millis(120);
/// The HTTP port answers within this, whatever Redis does.
const HTTP_BOUND: Duration = Duration::from_secs(1);
/// A shorter stall is nothing unusual.
const STALL: Duration = Duration::from_millis(2);

/// Looks at an instance again and again until told to stop.
pub async fn watch(service: Arc<Service>, stop: Arc<AtomicBool>) -> Seen {
    let mut seen = Seen::default();
    loop {
        let last = stop.load(Ordering::Relaxed);
        let resident = resident_bytes(&service);
        seen.peak_resident_bytes = seen.peak_resident_bytes.max(resident);
        match sample(service.http_addr()).await {
            Ok(sample) => seen.samples.push(sample),
            Err(fault) => seen.probe_faults.push(fault),
        }
        let probed = probe(service.http_addr()).await;
        seen.probe_faults.extend(probed.err());
        if last {
            return seen;
        }
        sleep(PAUSE).await;
    }
}

/// Whether an instance has come to rest: the switch closed and nothing left to
/// carry over. Otherwise what it says of itself.
pub async fn is_settled(service: &Service) -> Result<(), String> {
    let reply = http::get(service.http_addr(), "/health", HTTP_BOUND).await;
    let health = reply.map_err(|error| format!("/health: {error}"))?.body;
    let said: serde_json::Value =
        serde_json::from_str(&health).map_err(|error| format!("/health: {error}: {health}"))?;
    let settled = said["switch"]["state"] == "closed"
        && said["redis"]["status"] == "up"
        && said["mirror"]["dirty"] == 0;
    if settled { Ok(()) } else { Err(health) }
}

async fn sample(addr: &str) -> Result<Sample, String> {
    let reply = http::get(addr, "/metrics", HTTP_BOUND).await;
    let metrics = reply.map_err(|error| format!("/metrics: {error}"))?.body;
    let read =
        |name: &str| metric(&metrics, name).ok_or_else(|| format!("/metrics does not have {name}"));
    Ok(Sample {
        recoveries: read("storage_recovery_total")?,
        discarded: read("degraded_writes_discarded_total")?,
        put_back: read("groups_put_back_total")?,
        mirror_bytes: usize::try_from(read("mirror_bytes")?).unwrap_or(usize::MAX),
    })
}

/// The sum of all series of a metric; None if there is none.
fn metric(metrics: &str, name: &str) -> Option<u64> {
    let values = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(METRICS_PREFIX)?.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        let is_it = labels.is_empty() || labels.starts_with('{');
        is_it.then(|| value.parse::<f64>().ok())?
    });
    // Counters and gauges of these names are whole and not negative.
    values
        .reduce(|sum, value| sum + value)
        .map(|sum| sum.round() as u64)
}

/// The probes say that it lives and can serve, also while degraded.
async fn probe(addr: &str) -> Result<(), String> {
    for path in ["/livez", "/readyz"] {
        let reply = http::get(addr, path, HTTP_BOUND).await;
        let reply = reply.map_err(|error| format!("{path}: {error}"))?;
        let body = reply.body.trim();
        let fits = path == "/livez" || body == "ok" || body.starts_with("degraded");
        if reply.status != 200 || !fits {
            return Err(format!("{path}: {} {body}", reply.status));
        }
    }
    Ok(())
}

/// Memory that an instance holds; zero when it has ended.
pub fn resident_bytes(service: &Service) -> usize {
    let path = format!("/proc/{}/status", service.process().child.id());
    let status = fs::read_to_string(path).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0) * 1024
}

/// The record of an instance at the end of a run.
pub fn record(
    service: &mut Service,
    seen: Seen,
    first_resident_bytes: usize,
    mirror_max_bytes: usize,
    clock: RunClock,
) -> InstanceRecord {
    let log = service.timed_log().into_iter();
    // What came before the run began came at its very beginning.
    let log: Vec<(Moment, String)> = log
        .map(|(read, line)| (read.saturating_duration_since(clock.began), line))
        .collect();
    let mut crashes: Vec<String> = log
        .iter()
        .filter(|(_, line)| line.contains("panicked"))
        .map(|(_, line)| line.clone())
        .collect();
    if !service.is_running() {
        crashes.push("it has ended by itself".into());
    }
    InstanceRecord {
        outages: outages(&log),
        log: log
            .into_iter()
            .filter(|(moment, _)| *moment > Moment::ZERO)
            .collect(),
        incomplete: None,
        stops: Vec::new(),
        samples: seen.samples,
        unsettled: None,
        worse: Vec::new(),
        crashes,
        probe_faults: seen.probe_faults,
        first_resident_bytes,
        peak_resident_bytes: seen.peak_resident_bytes,
        mirror_max_bytes,
    }
}

/// The outages that a log tells of.
fn outages(log: &[(Moment, String)]) -> Vec<Outage> {
    let mut outages: Vec<Outage> = Vec::new();
    for (moment, line) in log {
        if line.contains("Switched to in-memory storage due to Redis failure") {
            outages.push(Outage {
                opened: *moment,
                closed: None,
                slack: Outage::SLACK,
            });
        } else if line.contains("Switched back to Redis storage")
            && let Some(last) = outages.last_mut()
        {
            last.closed = Some(*moment);
        }
    }
    outages
}

/// Takes down when the machine does not let this process run, nor what it has started.
pub async fn watch_stalls(clock: RunClock, stop: Arc<AtomicBool>) -> Vec<Stall> {
    const TICK: Duration = Duration::from_millis(20);
    let mut stalls = Vec::new();
    let mut before = stalled();
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        sleep(TICK).await;
        // Others may have kept this task from running.
        let late = begin.elapsed().saturating_sub(TICK);
        let (now, so_far) = (clock.now(), stalled());
        let length = late.max(so_far - before);
        before = so_far;
        if length > STALL {
            stalls.push(Stall {
                begin: now.saturating_sub(length),
                end: now,
            });
        }
    }
    stalls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_their_labels_and_not_mixed_up() {
        let text = format!(
            "# TYPE {METRICS_PREFIX}storage_fallback_total counter\n\
             {METRICS_PREFIX}storage_fallback_total{{reason=\"a b\"}} 2\n\
             {METRICS_PREFIX}storage_fallback_total{{reason=\"x\"}} 1\n\
             {METRICS_PREFIX}mirror_bytes 1024\n\
             {METRICS_PREFIX}mirror_bytes_peak 7\n"
        );
        assert_eq!(metric(&text, "storage_fallback_total"), Some(3));
        assert_eq!(metric(&text, "mirror_bytes"), Some(1_024));
        assert_eq!(metric(&text, "mirror"), None);
    }

    #[test]
    fn outages_are_read_from_the_log() {
        let millis = Duration::from_millis;
        let line = |at: u64, message: &str| {
            let line = format!(r#"{{"fields":{{"message":"{message}"}}}}"#);
            (millis(at), line)
        };
        let log = [
            line(0, "serving gRPC"),
            line(100, "Switched to in-memory storage due to Redis failure"),
            line(900, "Switched back to Redis storage"),
            line(1_000, "Switched to in-memory storage due to Redis failure"),
        ];
        let expected = [(millis(100), Some(millis(900))), (millis(1_000), None)];
        let read: Vec<_> = outages(&log)
            .into_iter()
            .map(|outage| (outage.opened, outage.closed))
            .collect();
        assert_eq!(read, expected);
    }
}
