//! From the proto to the domain. Everything from outside is checked here, and
//! every fault is reported with the path of its field.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    time::Duration,
};

use prost_types::Timestamp;

use super::{proto as pb, status::CallError};
use crate::{
    domain::{
        group::{
            Alert, AlertGroup, AlertStatus, GroupKey, GroupMetadata, GroupState, Time,
            TimerMetadata,
        },
        version::Version,
    },
    store::Expiry,
};

/// What a request may hold.
#[derive(Clone, Debug)]
pub struct Limits {
    /// `--max-key-bytes`
    pub max_key_bytes: usize,
    /// `--max-alerts-per-group`
    pub max_alerts_per_group: usize,
    /// `--max-groups-per-batch`
    pub max_groups_per_batch: usize,
    /// `--default-ttl`
    pub default_ttl: Duration,
    /// `--max-ttl`
    pub max_ttl: Duration,
}

/// The least time to live of a group.
pub const MIN_TTL: Duration = Duration::from_secs(1);

/// Bytes that the keys of a batch may take together: its reply repeats them.
pub const MAX_BATCH_KEY_BYTES: usize = 512 * 1024;

const DEFAULT_PAGE_SIZE: usize = 1_000;
const MAX_PAGE_SIZE: usize = 10_000;

/// What is wrong with a request, field by field.
#[derive(Debug, Default)]
pub struct Violations(Vec<(String, String)>);

/// One group of a batch: its key as it was sent, and the group if it is valid.
pub type BatchEntry = (String, Result<AlertGroup, CallError>);

/// As much of a text as there is room for, while it is being written.
struct Beginning {
    text: String,
    most_bytes: usize,
}

/// The two ways to say when a group expires, as the requests have them.
pub enum ExpiryField {
    Ttl(prost_types::Duration),
    KeepTtl(bool),
}

// === impl Violations ===

impl Violations {
    /// More are not reported: a status must fit into HTTP/2 headers.
    const MAX_REPORTED: usize = 10;
    const MAX_FIELD_BYTES: usize = 200;

    /// Notes a fault. The path is only put together when there is one.
    fn add(&mut self, field: fmt::Arguments<'_>, description: impl Into<String>) {
        if self.0.len() < Self::MAX_REPORTED {
            let field = beginning(field, Self::MAX_FIELD_BYTES);
            self.0.push((field, description.into()));
        }
    }

    /// `value`, if nothing was found wrong.
    pub fn check<T>(self, value: Option<T>) -> Result<T, CallError> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(CallError::invalid(self.0)),
        }
    }
}

// === impl Beginning ===

impl fmt::Write for Beginning {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = self.most_bytes - self.text.len();
        let fitting = &part[..part.floor_char_boundary(room)];
        self.text.push_str(fitting);
        // An error ends the writing.
        (fitting.len() == part.len())
            .then_some(())
            .ok_or(fmt::Error)
    }
}

/// A text, or its beginning and `…`. It is never put together as a whole: escaped, the
/// name of a field may take five times what the request took.
fn beginning(text: fmt::Arguments<'_>, bytes: usize) -> String {
    let mut beginning = Beginning {
        text: String::new(),
        // One more than fits, to see that it does not.
        most_bytes: bytes + char::MAX.len_utf8(),
    };
    let _ = beginning.write_fmt(text);
    let mut text = beginning.text;
    super::status::truncate(&mut text, bytes);
    text
}

// === impl Limits ===

impl Limits {
    /// What a client believes its server.
    const NONE: Self = Self {
        max_key_bytes: usize::MAX,
        max_alerts_per_group: usize::MAX,
        max_groups_per_batch: usize::MAX,
        default_ttl: Duration::MAX,
        max_ttl: Duration::MAX,
    };

    pub fn key(
        &self,
        field: fmt::Arguments<'_>,
        key: String,
        violations: &mut Violations,
    ) -> Option<GroupKey> {
        if key.len() > self.max_key_bytes {
            violations.add(
                field,
                format!(
                    "takes {} bytes, over --max-key-bytes {}",
                    key.len(),
                    self.max_key_bytes
                ),
            );
            return None;
        }
        GroupKey::new(key)
            .map_err(|error| violations.add(field, error.to_string()))
            .ok()
    }

    pub fn prefix(&self, prefix: String) -> Result<String, CallError> {
        let mut violations = Violations::default();
        if prefix.len() > self.max_key_bytes {
            violations.add(
                format_args!("prefix"),
                format!(
                    "takes {} bytes, over --max-key-bytes {}",
                    prefix.len(),
                    self.max_key_bytes
                ),
            );
        }
        violations.check(Some(prefix))
    }

    pub fn page_size(&self, page_size: i32) -> Result<usize, CallError> {
        let mut violations = Violations::default();
        let size = usize::try_from(page_size).ok();
        if size.is_none() {
            violations.add(format_args!("page_size"), "must not be negative");
        }
        violations.check(size.map(|size| match size {
            0 => DEFAULT_PAGE_SIZE,
            size => size.min(MAX_PAGE_SIZE),
        }))
    }

    /// When a write expires; the default when nothing was said.
    pub fn expiry(
        &self,
        expiry: Option<ExpiryField>,
        violations: &mut Violations,
    ) -> Option<Expiry> {
        match expiry {
            None => Some(Expiry::After(self.default_ttl)),
            Some(ExpiryField::KeepTtl(true)) => Some(Expiry::Keep {
                otherwise: self.default_ttl,
            }),
            Some(ExpiryField::KeepTtl(false)) => {
                violations.add(
                    format_args!("keep_ttl"),
                    "must be true or absent; absent means the default TTL",
                );
                None
            }
            Some(ExpiryField::Ttl(ttl)) => {
                let bounds = MIN_TTL..=self.max_ttl;
                let ttl = duration(ttl).filter(|ttl| bounds.contains(ttl));
                if ttl.is_none() {
                    violations.add(
                        format_args!("ttl"),
                        format!(
                            "must be from 1s to --max-ttl {}",
                            humantime::format_duration(self.max_ttl)
                        ),
                    );
                }
                // Redis counts milliseconds.
                ttl.map(|ttl| Expiry::After(Duration::from_millis(ttl.as_millis() as u64)))
            }
        }
    }

    pub fn group(
        &self,
        field: fmt::Arguments<'_>,
        group: Option<pb::AlertGroup>,
        violations: &mut Violations,
    ) -> Option<AlertGroup> {
        let Some(group) = group else {
            violations.add(field, "must be set");
            return None;
        };
        let key = self.key(format_args!("{field}.key"), group.key, violations);
        if group.alerts.len() > self.max_alerts_per_group {
            violations.add(
                format_args!("{field}.alerts"),
                format!(
                    "holds {} alerts, over --max-alerts-per-group {}",
                    group.alerts.len(),
                    self.max_alerts_per_group
                ),
            );
            return None;
        }
        let mut alerts = BTreeMap::new();
        for (fingerprint, value) in group.alerts {
            let value = alert(
                format_args!("{field}.alerts[{fingerprint:?}]"),
                &fingerprint,
                value,
                violations,
            );
            if let Some(value) = value {
                alerts.insert(fingerprint, value);
            }
        }
        let metadata = metadata(format_args!("{field}.metadata"), group.metadata, violations);
        Some(AlertGroup {
            key: key?,
            alerts,
            metadata: metadata?,
        })
    }

    /// The groups of a batch, each by itself. The batch as a whole fails only
    /// when it is too large.
    pub fn batch(&self, groups: Vec<pb::AlertGroup>) -> Result<Vec<BatchEntry>, CallError> {
        let mut violations = Violations::default();
        if groups.len() > self.max_groups_per_batch {
            violations.add(
                format_args!("groups"),
                format!(
                    "holds {} groups, over --max-groups-per-batch {}; split the batch",
                    groups.len(),
                    self.max_groups_per_batch
                ),
            );
        }
        let key_bytes: usize = groups.iter().map(|group| group.key.len()).sum();
        if key_bytes > MAX_BATCH_KEY_BYTES {
            violations.add(
                format_args!("groups"),
                format!(
                    "has keys of {key_bytes} bytes together, over {MAX_BATCH_KEY_BYTES}; split the batch"
                ),
            );
        }
        violations.check(Some(()))?;

        let mut times_seen: BTreeMap<String, usize> = BTreeMap::new();
        for group in &groups {
            *times_seen.entry(group.key.clone()).or_default() += 1;
        }
        Ok(groups
            .into_iter()
            .enumerate()
            .map(|(at, group)| {
                let key = group.key.clone();
                if times_seen.get(&key).is_some_and(|times| *times > 1) {
                    return (key, Err(CallError::duplicate_key()));
                }
                let mut violations = Violations::default();
                let group = self.group(format_args!("groups[{at}]"), Some(group), &mut violations);
                (key, violations.check(group))
            })
            .collect())
    }
}

/// A group as a service has sent it, with its version and write id. What other
/// writers may store and the service would not take again is put right, so that the
/// group can be changed; a fault beyond that is described.
pub fn stored_group(mut group: pb::AlertGroup) -> Result<AlertGroup, String> {
    mend(&mut group);
    let metadata = group.metadata.as_ref();
    let version = metadata.and_then(|metadata| Version::new(metadata.version));
    let write_id = metadata.map(|metadata| metadata.write_id.clone());
    let mut violations = Violations::default();
    let checked = Limits::NONE.group(format_args!("group"), Some(group), &mut violations);
    let mut group = violations.check(checked).map_err(CallError::into_message)?;
    group.metadata.version = version;
    group.metadata.write_id = write_id.unwrap_or_default();
    Ok(group)
}

/// An alert is who it is by its key in the map; a label without a name says nothing; a
/// count is counted anew with the next change.
fn mend(group: &mut pb::AlertGroup) {
    if let Some(alert) = group.alerts.remove("")
        && !alert.fingerprint.is_empty()
    {
        let key = alert.fingerprint.clone();
        group.alerts.entry(key).or_insert(alert);
    }
    for (key, alert) in &mut group.alerts {
        alert.fingerprint.clone_from(key);
        alert.labels.remove("");
    }
    let Some(metadata) = &mut group.metadata else {
        return;
    };
    metadata.firing_count = metadata.firing_count.max(0);
    metadata.resolved_count = metadata.resolved_count.max(0);
    let timers = [
        &mut metadata.group_wait_timer,
        &mut metadata.group_interval_timer,
        &mut metadata.repeat_interval_timer,
    ];
    for timer in timers.into_iter().flatten() {
        timer.reset_count = timer.reset_count.max(0);
    }
}

/// A time as a service has sent it.
pub fn stored_time(timestamp: Timestamp) -> Option<Time> {
    time(
        format_args!(""),
        Some(timestamp),
        &mut Violations::default(),
    )
}

/// The version that a CompareAndSwap expects; None for "absent".
pub fn expected_version(expected: i64, violations: &mut Violations) -> Option<Option<Version>> {
    if expected < 0 {
        violations.add(
            format_args!("expected_version"),
            "must be a version, or 0 for a group that must be absent",
        );
        return None;
    }
    Some(Version::new(expected))
}

/// The version that a Delete expects; None for any.
pub fn version_to_delete(
    expected: Option<i64>,
    violations: &mut Violations,
) -> Option<Option<Version>> {
    let Some(expected) = expected else {
        return Some(None);
    };
    let version = Version::new(expected);
    if version.is_none() {
        violations.add(
            format_args!("expected_version"),
            "must be greater than 0; absent deletes any version",
        );
        return None;
    }
    Some(version)
}

fn alert(
    field: fmt::Arguments<'_>,
    map_key: &str,
    alert: pb::Alert,
    violations: &mut Violations,
) -> Option<Alert> {
    if alert.fingerprint.is_empty() {
        violations.add(format_args!("{field}.fingerprint"), "must not be empty");
    } else if alert.fingerprint != map_key {
        violations.add(
            format_args!("{field}.fingerprint"),
            "must be equal to its key in the map",
        );
    }
    if alert.labels.contains_key("") {
        violations.add(
            format_args!("{field}.labels"),
            "must not hold an empty name",
        );
    }
    let status = match alert.status() {
        pb::AlertStatus::Firing => Some(AlertStatus::Firing),
        pb::AlertStatus::Resolved => Some(AlertStatus::Resolved),
        pb::AlertStatus::Unspecified => {
            violations.add(
                format_args!("{field}.status"),
                "must be ALERT_STATUS_FIRING or ALERT_STATUS_RESOLVED",
            );
            None
        }
    };
    let starts_at = time(
        format_args!("{field}.starts_at"),
        alert.starts_at,
        violations,
    );
    let ends_at = time(format_args!("{field}.ends_at"), alert.ends_at, violations);
    let timestamp = time(
        format_args!("{field}.timestamp"),
        alert.timestamp,
        violations,
    );
    Some(Alert {
        fingerprint: alert.fingerprint,
        alert_name: alert.alert_name,
        status: status?,
        labels: alert.labels,
        annotations: alert.annotations,
        starts_at,
        ends_at,
        generator_url: alert.generator_url,
        timestamp,
    })
}

fn metadata(
    field: fmt::Arguments<'_>,
    metadata: Option<pb::GroupMetadata>,
    violations: &mut Violations,
) -> Option<GroupMetadata> {
    let Some(metadata) = metadata else {
        violations.add(field, "must be set");
        return None;
    };
    let state = match metadata.state() {
        pb::GroupState::Firing => Some(GroupState::Firing),
        pb::GroupState::Resolved => Some(GroupState::Resolved),
        pb::GroupState::Mixed => Some(GroupState::Mixed),
        pb::GroupState::Silenced => Some(GroupState::Silenced),
        pb::GroupState::Unspecified => {
            violations.add(
                format_args!("{field}.state"),
                "must be GROUP_STATE_FIRING, _RESOLVED, _MIXED or _SILENCED",
            );
            None
        }
    };
    for (name, count) in [
        ("firing_count", metadata.firing_count),
        ("resolved_count", metadata.resolved_count),
    ] {
        if count < 0 {
            violations.add(format_args!("{field}.{name}"), "must not be negative");
        }
    }
    let mut moment = |name, value| time(format_args!("{field}.{name}"), value, violations);
    let created_at = moment("created_at", metadata.created_at);
    let updated_at = moment("updated_at", metadata.updated_at);
    let first_firing_at = moment("first_firing_at", metadata.first_firing_at);
    let resolved_at = moment("resolved_at", metadata.resolved_at);
    let mut any_timer = |name, value| timer(format_args!("{field}.{name}"), value, violations);
    Some(GroupMetadata {
        state: state?,
        created_at,
        updated_at,
        first_firing_at,
        resolved_at,
        firing_count: metadata.firing_count,
        resolved_count: metadata.resolved_count,
        group_by: metadata.group_by,
        group_wait_timer: any_timer("group_wait_timer", metadata.group_wait_timer),
        group_interval_timer: any_timer("group_interval_timer", metadata.group_interval_timer),
        repeat_interval_timer: any_timer("repeat_interval_timer", metadata.repeat_interval_timer),
        // Output only: the store sets them.
        write_id: String::new(),
        version: None,
    })
}

fn timer(
    field: fmt::Arguments<'_>,
    timer: Option<pb::TimerMetadata>,
    violations: &mut Violations,
) -> Option<TimerMetadata> {
    let timer = timer?;
    if timer.reset_count < 0 {
        violations.add(format_args!("{field}.reset_count"), "must not be negative");
    }
    Some(TimerMetadata {
        version: timer.version,
        created_by: timer.created_by,
        reset_count: timer.reset_count,
        last_reset_at: time(
            format_args!("{field}.last_reset_at"),
            timer.last_reset_at,
            violations,
        ),
        lock_id: timer.lock_id,
    })
}

fn time(
    field: fmt::Arguments<'_>,
    timestamp: Option<Timestamp>,
    violations: &mut Violations,
) -> Option<Time> {
    let timestamp = timestamp?;
    u32::try_from(timestamp.nanos)
        .ok()
        .and_then(|nanos| Time::from_parts(timestamp.seconds, nanos).ok())
        .or_else(|| {
            violations.add(field, crate::domain::group::TimeError.to_string());
            None
        })
}

/// None for a negative or malformed duration. prost's own conversion adds
/// seconds and nanoseconds without a check.
fn duration(duration: prost_types::Duration) -> Option<Duration> {
    let seconds = u64::try_from(duration.seconds).ok()?;
    let nanos = u32::try_from(duration.nanos).ok()?;
    (nanos < 1_000_000_000).then(|| Duration::new(seconds, nanos))
}

macro_rules! expiry_field {
    ($($module:ident),*) => {$(
        impl From<pb::$module::Expiry> for ExpiryField {
            fn from(expiry: pb::$module::Expiry) -> Self {
                match expiry {
                    pb::$module::Expiry::Ttl(ttl) => Self::Ttl(ttl),
                    pb::$module::Expiry::KeepTtl(keep) => Self::KeepTtl(keep),
                }
            }
        }
    )*};
}

// The oneof is generated once for each request that has it.
expiry_field!(store_request, compare_and_swap_request, store_all_request);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_name_no_more_is_written_than_is_shown() {
        struct Endless;
        impl fmt::Display for Endless {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                loop {
                    f.write_str("ключ")?;
                }
            }
        }
        let shown = beginning(format_args!("{Endless}"), 21);
        assert_eq!(shown, "ключключк…");
        assert_eq!(beginning(format_args!("ключ{}", "."), 9), "ключ.");
        assert_eq!(beginning(format_args!("ключ{}", ".."), 9), "клю…");
    }
}
