//! Webhooks of Alertmanager and of those who send the same, as reports for a group.
//! Pure.
//!
//! What others leave out or write differently is read all the same, as far as it says
//! what is meant:
//!
//! | what comes | how it is read |
//! |---|---|
//! | any `version`, or none | not looked at: Alertmanager sends `"4"`, Grafana `"1"` |
//! | further fields | passed over |
//! | `null` | absent |
//! | a label or annotation that is a number, `true` or `false` | its JSON text |
//! | no `fingerprint`, or an empty one | what Alertmanager would compute |
//! | no `status` | "resolved" if `endsAt` is over, else "firing" |
//! | a time that is empty or Go's zero time | absent |
//!
//! An alert that cannot be read is refused alone.
//!
//! Prometheus and vmalert do not send webhooks: they post lists of alerts to an
//! Alertmanager. [`Webhook::of_posted`] makes webhooks of such a list.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

use super::{group_keys::GroupKeys, hash::Fnv1a};
use crate::domain::{
    group::{Alert, AlertStatus, GroupKey, Time, null_as_default},
    retention::{Refused, RefusedReason},
};

/// What Alertmanager sends about one of its groups. Fields that a replica does
/// not need are passed over.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Webhook {
    /// The labels by which Alertmanager has formed its group.
    #[serde(deserialize_with = "texts")]
    pub group_labels: BTreeMap<String, String>,
    /// Alertmanager's own name of the group; empty if there is none.
    #[serde(default, deserialize_with = "text")]
    pub group_key: String,
    /// The receiver of Alertmanager that this was sent for.
    #[serde(default, deserialize_with = "text")]
    pub receiver: String,
    /// Alerts that Alertmanager has left out, by its `max_alerts`.
    #[serde(default, deserialize_with = "null_as_default")]
    pub truncated_alerts: u64,
    /// Each to be read by itself.
    #[serde(deserialize_with = "null_as_default")]
    alerts: Vec<Value>,
}

/// An alert as it is reported.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReportedAlert {
    #[serde(default, deserialize_with = "text")]
    fingerprint: String,
    #[serde(default)]
    status: Option<AlertStatus>,
    #[serde(default, deserialize_with = "texts")]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "texts")]
    annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "go_time")]
    starts_at: Option<Time>,
    #[serde(default, deserialize_with = "go_time")]
    ends_at: Option<Time>,
    #[serde(default, rename = "generatorURL", deserialize_with = "text")]
    generator_url: String,
}

// === impl Webhook ===

impl Webhook {
    /// Names of the labels by which the group was formed.
    pub fn group_by(&self) -> Vec<String> {
        self.group_labels.keys().cloned().collect()
    }

    /// What Prometheus and vmalert post to `/api/v2/alerts`: a list of alerts, in groups
    /// of those that have equal labels `group_by`.
    pub fn of_posted(body: &[u8], group_by: &[String]) -> serde_json::Result<Vec<Self>> {
        let alerts: Vec<Value> = serde_json::from_slice(body)?;
        let mut groups: BTreeMap<BTreeMap<String, String>, Vec<Value>> = BTreeMap::new();
        for alert in alerts {
            // What cannot be read is named with those that have none of the labels.
            let labels = read(&alert).map(|alert| alert.labels).unwrap_or_default();
            let labels = labels.into_iter();
            let labels =
                labels.filter(|(name, value)| group_by.contains(name) && !value.is_empty());
            groups.entry(labels.collect()).or_default().push(alert);
        }
        let webhooks = groups.into_iter().map(|(group_labels, alerts)| Self {
            group_labels,
            group_key: String::new(),
            receiver: String::new(),
            truncated_alerts: 0,
            alerts,
        });
        Ok(webhooks.collect())
    }

    /// How many alerts it has, those that cannot be read included.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.alerts.len()
    }

    /// The group that its alerts belong to, or why that cannot be told.
    pub fn key(&self, keys: &GroupKeys) -> Result<GroupKey, &'static str> {
        if keys.are_alertmanagers() {
            if self.group_key.is_empty() {
                return Err("the webhook has no groupKey, by which this replica groups alerts");
            }
            return Ok(keys.alertmanagers_key(&self.receiver, &self.group_key));
        }
        // All of its alerts have the labels that the group was formed by. Where there
        // are none, an alert without any label has a group of its own.
        if self.group_labels.is_empty() {
            let alert = self.alerts.iter().find_map(|alert| read(alert).ok());
            let labels = alert.map(|alert| alert.labels).unwrap_or_default();
            return Ok(keys.key::<&str>(&labels, &[]));
        }
        Ok(keys.key(&self.group_labels, &self.group_by()))
    }

    /// Its alerts as reports that came at `received`, and what cannot be read.
    pub fn into_reports(self, received: Time) -> (Vec<Alert>, Vec<Refused>) {
        let mut reports = Vec::with_capacity(self.alerts.len());
        let mut refused = Vec::new();
        for (position, alert) in self.alerts.iter().enumerate() {
            match read(alert) {
                Ok(alert) => reports.push(alert.into_report(received)),
                Err(error) => {
                    let fingerprint = alert.get("fingerprint").and_then(Value::as_str);
                    refused.push(Refused {
                        fingerprint: fingerprint.unwrap_or_default().into(),
                        reason: RefusedReason::Malformed,
                        message: format!("alerts[{position}]: {error}"),
                    });
                }
            }
        }
        (reports, refused)
    }
}

fn read(alert: &Value) -> Result<ReportedAlert, serde_json::Error> {
    ReportedAlert::deserialize(alert)
}

// === impl ReportedAlert ===

impl ReportedAlert {
    fn into_report(self, received: Time) -> Alert {
        let is_over = self.ends_at.is_some_and(|ends_at| ends_at <= received);
        let status = self.status.unwrap_or(match is_over {
            true => AlertStatus::Resolved,
            false => AlertStatus::Firing,
        });
        let fingerprint = match self.fingerprint.is_empty() {
            true => fingerprint(&self.labels),
            false => self.fingerprint,
        };
        Alert {
            alert_name: self.labels.get("alertname").cloned().unwrap_or_default(),
            fingerprint,
            status,
            labels: self.labels,
            annotations: self.annotations,
            starts_at: self.starts_at,
            // Of one that fires, it says when it would count as resolved.
            ends_at: self.ends_at.filter(|_| status == AlertStatus::Resolved),
            generator_url: self.generator_url,
            timestamp: Some(received),
        }
    }
}

/// What Alertmanager computes of labels: FNV-1a over each name and value in the order
/// of the names, each followed by a byte that no text has. A label without a value is
/// none.
pub fn fingerprint(labels: &BTreeMap<String, String>) -> String {
    let mut hash = Fnv1a::new();
    for (name, value) in labels.iter().filter(|(_, value)| !value.is_empty()) {
        for text in [name, value] {
            hash.write(text.as_bytes());
            hash.write(&[0xff]);
        }
    }
    format!("{:016x}", hash.finish())
}

/// Reads a map of texts; see the module's table.
fn texts<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    let values: Option<BTreeMap<String, Value>> = Option::deserialize(from)?;
    let mut texts = BTreeMap::new();
    for (name, value) in values.unwrap_or_default() {
        match as_text(value) {
            Ok(text) => texts.extend(text.map(|text| (name, text))),
            Err(value) => return Err(D::Error::custom(format!("{name:?}: {value}"))),
        }
    }
    Ok(texts)
}

/// Reads a text; `null` is an empty one.
fn text<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = as_text(Value::deserialize(from)?).map_err(D::Error::custom)?;
    Ok(text.unwrap_or_default())
}

/// None for `null`.
fn as_text(value: Value) -> Result<Option<String>, &'static str> {
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text)),
        Value::Number(_) | Value::Bool(_) => Ok(Some(value.to_string())),
        Value::Array(_) | Value::Object(_) => Err("must be a text, and not a list or an object"),
    }
}

/// Reads a time as Go writes it; the zero time stands for "none".
fn go_time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Time>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let time = Time::parse_rfc3339(&text)
        .map_err(|error| D::Error::custom(format!("{text:?} {error}")))?;
    Ok(Some(time).filter(|time| *time != Time::GO_ZERO))
}

#[cfg(test)]
mod tests;
