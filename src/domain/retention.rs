//! How long alerts stay in a group that lives on, and how many there is room for.
//! Pure: the time is passed in.
//!
//! A group in which something always fires never expires. So its alerts leave one
//! by one, at each change of the group:
//!
//! | alert | leaves | why |
//! |---|---|---|
//! | resolved | `resolved_retention` after its report | it is over |
//! | firing | `report_horizon` after its last report | it may be over: after a silence, an inhibition or a mute interval Alertmanager does not say so |
//! | resolved, and the group would exceed a limit | the longest-resolved first | it makes room for what fires, and a group that is large is slow to change |
//!
//! What does not fit even then is refused alone, and the rest is stored. First come
//! the alerts that the group holds and that fire: a report about one of them always
//! fits, without its annotations if need be. Then come new firing alerts, in the
//! order of their reports, then resolved ones.
//!
//! # When a report was received
//!
//! `timestamp` says it. A report of which that is not known (there is none, or it is
//! the time of its start, as the Go service writes it) was received at the last change
//! of its group at the latest, so the next change sets its `timestamp` to that: else a
//! running alert that only Go replicas report would seem to be as old as its start.
//! Where the group says no time either, the alert stays.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    document::DocumentHead,
    group::{Alert, AlertGroup, AlertStatus, GroupMetadata, GroupState, Time},
};

/// How long alerts stay in a group, and how much it may hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How long a resolved alert stays after its report. Default 1 h.
    pub resolved_retention: Duration,
    /// How long a firing alert stays without a further report. Longer than the
    /// `repeat_interval` and `group_interval` of Alertmanager together, and not longer
    /// than groups live. Default 24 h.
    pub report_horizon: Duration,
    /// Alerts that a group holds at most: `--max-alerts-per-group` of the service.
    /// Default 10,000.
    pub max_alerts: usize,
    /// Bytes that its document takes at most: `--max-document-bytes` of the service.
    /// Default 1 MiB.
    pub max_document_bytes: usize,
    /// Bytes of it that resolved alerts take at most: each change of a group reads and
    /// writes all of them. Default 256 KiB.
    pub max_resolved_bytes: usize,
}

/// Alerts that have left a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Resolved ones, `resolved_retention` after their report.
    pub resolved: usize,
    /// Fingerprints of firing ones that nobody has reported for `report_horizon`.
    pub unreported: Vec<String>,
    /// Resolved ones that have made room.
    pub crowded_out: usize,
    /// Alerts that have stayed, but without annotations and link, for want of room.
    pub shortened: usize,
}

/// A report that was not stored, while others of the same change were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Of its alert; empty where it has none.
    pub fingerprint: String,
    pub reason: RefusedReason,
    /// What is wrong, and what to do about it.
    pub message: String,
}

/// Why a report was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RefusedReason {
    /// It can never be stored: it is no alert, or one without a status, or with an
    /// empty label name.
    Malformed,
    /// It is larger than a group may be.
    TooLarge,
    /// The alerts that fire leave no room for it.
    GroupFull,
    /// The service does not take it.
    Service,
}

// === impl Retention ===

impl Default for Retention {
    fn default() -> Self {
        Self {
            resolved_retention: Duration::from_secs(3_600),
            report_horizon: Duration::from_secs(24 * 3_600),
            max_alerts: 10_000,
            max_document_bytes: 1 << 20,
            max_resolved_bytes: 256 << 10,
        }
    }
}

impl Retention {
    /// Room for what follows from the alerts: state, counts and times of the group. So it
    /// makes no difference for whether it fits which alerts it holds.
    const FOLLOWING_BYTES: usize = 256;

    /// Lets alerts leave a group whose time is up, as of `now`. `before` is the group
    /// as it was before the change that is made at `at`.
    pub fn age(
        &self,
        group: &mut AlertGroup,
        before: Option<&AlertGroup>,
        at: Time,
        now: Time,
    ) -> Left {
        if let Some(before) = before {
            date_reports(group, before);
        }
        let mut left = Left::default();
        group.retain_alerts(at, |fingerprint, alert| {
            let Some(received) = alert.received() else {
                return true;
            };
            let limit = match alert.status {
                AlertStatus::Firing => self.report_horizon,
                AlertStatus::Resolved => self.resolved_retention,
            };
            let age = now.millis().saturating_sub(received.millis());
            let stays = u128::try_from(age).unwrap_or(0) <= limit.as_millis();
            match alert.status {
                _ if stays => {}
                AlertStatus::Firing => left.unreported.push(fingerprint.to_owned()),
                AlertStatus::Resolved => left.resolved += 1,
            }
            stays
        });
        left
    }

    /// Makes a group fit the limits after `reports` were added to what was there
    /// `before`, at `at`. Adds to what has `left`, and says what is refused.
    pub fn fit(
        &self,
        group: &mut AlertGroup,
        before: Option<&AlertGroup>,
        reports: &[Alert],
        at: Time,
        left: &mut Left,
    ) -> Vec<Refused> {
        if self.fits(group) {
            return Vec::new();
        }
        let held = |fingerprint: &str| {
            before.is_some_and(|before| before.alerts.contains_key(fingerprint))
        };
        let mut room = Room::of(self, group);
        let whole = room.bytes;

        // What fires already stays, as small as it has to be.
        let firing = |alert: &Alert| alert.status == AlertStatus::Firing;
        let reported: BTreeSet<&str> = reports
            .iter()
            .map(|report| report.fingerprint.as_str())
            .collect();
        let mut staying: BTreeMap<String, usize> = group
            .alerts
            .iter()
            .filter(|(fingerprint, alert)| firing(alert) && held(fingerprint))
            .map(|(fingerprint, alert)| (fingerprint.clone(), bytes_of(alert)))
            .collect();
        let mut largest_first: Vec<(bool, Reverse<usize>, String)> = staying
            .iter()
            .map(|(fingerprint, bytes)| {
                let is_new = reported.contains(fingerprint.as_str());
                (!is_new, Reverse(*bytes), fingerprint.clone())
            })
            .collect();
        largest_first.sort_unstable();
        let mut largest_first = largest_first.into_iter();
        let mut used: usize = staying.values().sum();
        while used > room.bytes
            && let Some((_, Reverse(bytes), fingerprint)) = largest_first.next()
        {
            let Some(alert) = group.alerts.get_mut(&fingerprint) else {
                continue;
            };
            if alert.annotations.is_empty() && alert.generator_url.is_empty() {
                continue;
            }
            alert.annotations.clear();
            alert.generator_url.clear();
            let less = bytes_of(alert);
            used -= bytes - less;
            staying.insert(fingerprint, less);
            left.shortened += 1;
        }
        room.take(staying.len(), used);

        // New ones that fire, as they come; then the latest resolved.
        let mut refused = Vec::new();
        let mut is_refused = |alert: &Alert, bytes: usize| {
            let (reason, message) = self.why_refused(bytes, whole);
            refused.push(Refused {
                fingerprint: alert.fingerprint.clone(),
                reason,
                message,
            });
        };
        for report in reports {
            let Some(alert) = group.alerts.get(&report.fingerprint) else {
                continue;
            };
            if !firing(alert)
                || held(&alert.fingerprint)
                || staying.contains_key(&alert.fingerprint)
            {
                continue;
            }
            let bytes = bytes_of(alert);
            if room.has(bytes) {
                room.take(1, bytes);
                staying.insert(alert.fingerprint.clone(), bytes);
            } else {
                is_refused(alert, bytes);
            }
        }
        let resolved = group.alerts.iter().filter(|(_, alert)| !firing(alert));
        let mut resolved: Vec<(&String, &Alert)> = resolved.collect();
        resolved.sort_by(|(_, one), (_, other)| other.report_order(one));
        let mut for_resolved = self.max_resolved_bytes;
        for (fingerprint, alert) in resolved {
            let bytes = bytes_of(alert);
            let has_room = room.has(bytes);
            if has_room && bytes <= for_resolved {
                room.take(1, bytes);
                for_resolved -= bytes;
                staying.insert(fingerprint.clone(), bytes);
            } else if has_room || held(fingerprint) {
                left.crowded_out += 1;
            } else {
                is_refused(alert, bytes);
            }
        }
        group.retain_alerts(at, |fingerprint, _| staying.contains_key(fingerprint));
        // An alert that was reported twice is refused once.
        let mut named = BTreeSet::new();
        refused.retain(|one: &Refused| named.insert(one.fingerprint.clone()));
        refused
    }

    fn fits(&self, group: &AlertGroup) -> bool {
        let (mut firing, mut resolved) = (0, 0);
        for alert in group.alerts.values() {
            match alert.status {
                AlertStatus::Firing => firing += bytes_of(alert),
                AlertStatus::Resolved => resolved += bytes_of(alert),
            }
        }
        group.alerts.len() <= self.max_alerts
            && resolved <= self.max_resolved_bytes
            && firing + resolved <= Room::of(self, group).bytes
    }

    /// Why an alert of so many bytes has no room, where a group has `whole` for all of
    /// them.
    fn why_refused(&self, bytes: usize, whole: usize) -> (RefusedReason, String) {
        if bytes > whole {
            let message = format!(
                "the alert takes {bytes} bytes, and the alerts of a group at most {whole} together; shorten its annotations, or raise --max-document-bytes here and at the service"
            );
            return (RefusedReason::TooLarge, message);
        }
        let message = format!(
            "the group is full of alerts that fire: at most {} of them (--max-alerts-per-group) in {} bytes (--max-document-bytes); group by more labels, or raise the limit here and at the service",
            self.max_alerts, self.max_document_bytes
        );
        (RefusedReason::GroupFull, message)
    }
}

/// What is left for alerts.
struct Room {
    alerts: usize,
    bytes: usize,
}

// === impl Room ===

impl Room {
    /// That of an empty group with the metadata of this one.
    fn of(retention: &Retention, group: &AlertGroup) -> Self {
        let frame = AlertGroup {
            key: group.key.clone(),
            alerts: BTreeMap::new(),
            metadata: GroupMetadata {
                state: GroupState::default(),
                updated_at: None,
                first_firing_at: None,
                resolved_at: None,
                firing_count: 0,
                resolved_count: 0,
                ..group.metadata.clone()
            },
        };
        let frame = DocumentHead::new(&frame).stored_bytes() + Retention::FOLLOWING_BYTES;
        Self {
            alerts: retention.max_alerts,
            bytes: retention.max_document_bytes.saturating_sub(frame),
        }
    }

    fn has(&self, bytes: usize) -> bool {
        self.alerts > 0 && self.bytes >= bytes
    }

    fn take(&mut self, alerts: usize, bytes: usize) {
        self.alerts = self.alerts.saturating_sub(alerts);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

// === impl RefusedReason ===

impl RefusedReason {
    /// All of them, so that each is counted from the first scrape on.
    pub const ALL: [Self; 4] = [
        Self::Malformed,
        Self::TooLarge,
        Self::GroupFull,
        Self::Service,
    ];

    /// As a label of a metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::TooLarge => "too_large",
            Self::GroupFull => "group_full",
            Self::Service => "service",
        }
    }
}

/// See the module's text: sets the times of receipt that are not known.
fn date_reports(group: &mut AlertGroup, before: &AlertGroup) {
    let Some(last_change) = before.metadata.updated_at else {
        return;
    };
    for (fingerprint, alert) in &mut group.alerts {
        let is_unknown = alert.timestamp.is_none() || alert.timestamp == alert.starts_at;
        if is_unknown && before.alerts.get(fingerprint) == Some(alert) {
            alert.timestamp = alert.timestamp.max(Some(last_change));
        }
    }
}

/// Bytes that an alert takes in a document: `"fingerprint":{…},`.
fn bytes_of(alert: &Alert) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(2);
    serde_json::to_writer(&mut count, &alert.fingerprint)
        .and_then(|()| serde_json::to_writer(&mut count, alert))
        .expect("strings, times and maps with string keys always serialize");
    count.0
}

#[cfg(test)]
mod tests;
