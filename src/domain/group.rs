//! The domain: a group of alerts, its key, its times, and how two states of one
//! group are merged. Values only, no I/O.
//!
//! The types derive the JSON form that `document.rs` reads and writes; its
//! field names and null rules are those of the Go service's structs.

use std::{borrow::Borrow, collections::BTreeMap, fmt, sync::Arc};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use super::version::Version;

pub use super::{merge::Merged, state::Counts};

/// A group of alerts under one key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AlertGroup {
    pub key: GroupKey,
    /// Alerts by fingerprint.
    pub alerts: BTreeMap<String, Alert>,
    pub metadata: GroupMetadata,
}

/// One alert. Empty strings and absent times mean "unknown".
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alert {
    pub fingerprint: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub alert_name: String,
    pub status: AlertStatus,
    #[serde(default, deserialize_with = "null_as_default")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub starts_at: Option<Time>,
    /// Absent while the alert fires.
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub ends_at: Option<Time>,
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub generator_url: String,
    /// When this report was received.
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<Time>,
}

/// Whether an alert fires. The order is that of the merge rule: of two reports
/// that are otherwise as good, the resolved one is the greater.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AlertStatus {
    #[default]
    Firing,
    Resolved,
}

/// What is known of a group besides its alerts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMetadata {
    pub state: GroupState,
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Time>,
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Time>,
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub first_firing_at: Option<Time>,
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub resolved_at: Option<Time>,
    #[serde(default, deserialize_with = "null_as_default")]
    pub firing_count: i32,
    #[serde(default, deserialize_with = "null_as_default")]
    pub resolved_count: i32,
    #[serde(default, deserialize_with = "null_as_default")]
    pub group_by: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_wait_timer: Option<TimerMetadata>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_interval_timer: Option<TimerMetadata>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeat_interval_timer: Option<TimerMetadata>,
    /// The call that wrote this version; empty in documents of other writers.
    /// Set by the store, which writes it into the document's tail.
    #[serde(default, deserialize_with = "null_as_default", skip_serializing)]
    pub write_id: String,
    /// The version under which the group is stored; none before it is. Set by
    /// the store: the document's outer version counts, not this field's.
    #[serde(skip)]
    pub version: Option<Version>,
}

/// State of a group as a whole. The order is that of the merge rule: `Silenced`
/// is the greatest, so that of two changes at the same moment a silence stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupState {
    #[default]
    Firing,
    Resolved,
    Mixed,
    Silenced,
}

/// A timer of a group, kept for the replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerMetadata {
    #[serde(default, deserialize_with = "null_as_default")]
    pub version: i64,
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub created_by: String,
    #[serde(default, deserialize_with = "null_as_default")]
    pub reset_count: i32,
    #[serde(default, with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub last_reset_at: Option<Time>,
    #[serde(
        default,
        deserialize_with = "null_as_default",
        skip_serializing_if = "String::is_empty"
    )]
    pub lock_id: String,
}

/// The key of a group: UTF-8, not empty, not beginning with a control
/// character (keys that do are the service's own, such as probe keys).
///
/// Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct GroupKey(Arc<str>);

/// Why a string is not a group key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum GroupKeyError {
    #[error("must not be empty")]
    Empty,
    #[error("must not begin with a control character (those keys are the service's own)")]
    LeadingControl,
}

/// A moment in UTC, to the nanosecond, in the years 1 to 9999: what both
/// RFC 3339 and `google.protobuf.Timestamp` can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(DateTime<Utc>);

/// A moment outside of the years 1 to 9999, or not a moment at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("must be a time from 0001-01-01T00:00:00Z to 9999-12-31T23:59:59.999999999Z")]
pub struct TimeError;

// === impl GroupKey ===

impl GroupKey {
    /// Checks and wraps a key.
    pub fn new(key: impl Into<String>) -> Result<Self, GroupKeyError> {
        let key = key.into();
        match key.chars().next() {
            None => Err(GroupKeyError::Empty),
            Some(first) if first.is_control() => Err(GroupKeyError::LeadingControl),
            Some(_) => Ok(Self(key.into())),
        }
    }

    /// A key under which an instance probes whether Redis takes writes and keeps
    /// them. It is no group's: it begins with a control character. `name` is one
    /// that no other instance has; `ending` tells those of several servers apart.
    pub fn probe(name: &str, ending: &str) -> Self {
        Self(format!("\u{1}probe:{name}{ending}").into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for GroupKey {
    type Error = GroupKeyError;

    fn try_from(key: String) -> Result<Self, Self::Error> {
        Self::new(key)
    }
}

impl Serialize for GroupKey {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0)
    }
}

impl Borrow<str> for GroupKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// === impl Time ===

impl Time {
    const MIN_SECONDS: i64 = -62_135_596_800; // 0001-01-01T00:00:00Z
    const MAX_SECONDS: i64 = 253_402_300_799; // 9999-12-31T23:59:59Z

    /// How Go writes the absence of a time.
    pub const GO_ZERO: Self =
        Self(DateTime::from_timestamp(Self::MIN_SECONDS, 0).expect("year 1 is a time of chrono"));

    /// From seconds since 1970 and nanoseconds of that second.
    pub fn from_parts(seconds: i64, nanos: u32) -> Result<Self, TimeError> {
        if !(Self::MIN_SECONDS..=Self::MAX_SECONDS).contains(&seconds) || nanos >= 1_000_000_000 {
            return Err(TimeError);
        }
        DateTime::from_timestamp(seconds, nanos)
            .map(Self)
            .ok_or(TimeError)
    }

    /// From milliseconds since 1970.
    pub fn from_millis(millis: i64) -> Result<Self, TimeError> {
        let nanos = millis.rem_euclid(1_000) as u32 * 1_000_000;
        Self::from_parts(millis.div_euclid(1_000), nanos)
    }

    /// The present, by this machine's clock.
    pub fn now() -> Self {
        Self(Utc::now())
    }

    /// Seconds since 1970.
    pub fn seconds(self) -> i64 {
        self.0.timestamp()
    }

    /// Nanoseconds of the second.
    pub fn nanos(self) -> u32 {
        self.0.timestamp_subsec_nanos()
    }

    /// Milliseconds since 1970, rounded down.
    pub fn millis(self) -> i64 {
        self.0.timestamp_millis()
    }

    /// Reads RFC 3339 in any time zone, to the nanosecond.
    pub fn parse_rfc3339(text: &str) -> Result<Self, TimeError> {
        let time = DateTime::parse_from_rfc3339(text).map_err(|_| TimeError)?;
        // chrono holds a leap second as nanoseconds past one second.
        let nanos = time.timestamp_subsec_nanos();
        Self::from_parts(
            time.timestamp() + i64::from(nanos / 1_000_000_000),
            nanos % 1_000_000_000,
        )
    }
}

/// RFC 3339 in UTC with as many fractional digits as are needed in steps of
/// three.
impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_rfc3339_opts(SecondsFormat::AutoSi, true))
    }
}

/// Serde of an optional [`Time`]; `null` reads as absent.
mod rfc3339 {
    use super::{Time, TimeError};
    use serde::{Deserializer, Serializer, de};
    use std::fmt;

    pub fn serialize<S: Serializer>(time: &Option<Time>, to: S) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => to.collect_str(time),
            None => to.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Time>, D::Error> {
        from.deserialize_option(Visitor)
    }

    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Option<Time>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an RFC 3339 time or null")
        }

        fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
            from.deserialize_str(self)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            Time::parse_rfc3339(text)
                .map(Some)
                .map_err(|TimeError| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
}

/// Go writes `null` for an empty map or list; it reads as the default.
pub(crate) fn null_as_default<'de, D, T>(from: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_hold_anything_but_a_leading_control_character() {
        for key in ["a", " ", "a\tb\n", "{}*?[", "ключ", "index"] {
            assert_eq!(GroupKey::new(key).unwrap().as_str(), key);
        }
        assert_eq!(GroupKey::new(""), Err(GroupKeyError::Empty));
        for key in ["\u{1}probe:x", "\n", "\u{7f}", "\u{85}"] {
            assert_eq!(GroupKey::new(key), Err(GroupKeyError::LeadingControl));
        }
    }

    #[test]
    fn times_are_read_in_any_zone_and_written_in_utc() {
        for (read, written) in [
            ("2025-11-04T10:05:00.5+03:00", "2025-11-04T07:05:00.500Z"),
            (
                "2025-11-04T10:00:00.123456789Z",
                "2025-11-04T10:00:00.123456789Z",
            ),
            ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
            (
                "9999-12-31T23:59:59.999999999Z",
                "9999-12-31T23:59:59.999999999Z",
            ),
            ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"),
        ] {
            assert_eq!(Time::parse_rfc3339(read).unwrap().to_string(), written);
        }
        for bad in [
            "",
            "now",
            "2025-11-04",
            "0001-01-01T00:00:00+03:00",
            "10000-01-01T00:00:00Z",
        ] {
            assert_eq!(Time::parse_rfc3339(bad), Err(TimeError), "{bad}");
        }
    }
}
