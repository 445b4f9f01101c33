//! Webhooks of Alertmanager (version 4), as reports for a group. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use super::group_keys::GroupKeys;
use crate::group::{Alert, AlertStatus, GroupKey, Time};

/// What Alertmanager sends about one of its groups. Fields that a replica does
/// not need are passed over.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Webhook {
    /// Format of the webhook; `"4"` is known here.
    pub version: Version,
    /// The labels by which Alertmanager has formed its group.
    pub group_labels: BTreeMap<String, String>,
    pub alerts: Vec<ReportedAlert>,
    /// Alerts that Alertmanager has left out, by its `max_alerts`.
    #[serde(default)]
    pub truncated_alerts: u64,
}

/// The one format that is known.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
pub enum Version {
    #[serde(rename = "4")]
    V4,
}

/// An alert as Alertmanager reports it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct ReportedAlert {
    pub fingerprint: String,
    pub status: AlertStatus,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "go_time")]
    pub starts_at: Option<Time>,
    #[serde(default, deserialize_with = "go_time")]
    pub ends_at: Option<Time>,
    #[serde(default, rename = "generatorURL")]
    pub generator_url: String,
}

/// How Go writes the absence of a time.
const GO_ZERO_TIME: &str = "0001-01-01T00:00:00Z";

// === impl Webhook ===

impl Webhook {
    /// Names of the labels by which the group was formed.
    pub fn group_by(&self) -> Vec<String> {
        self.group_labels.keys().cloned().collect()
    }

    /// The group that its alerts belong to; None if it has no alert.
    pub fn key(&self, keys: &GroupKeys) -> Option<GroupKey> {
        // All of its alerts have the labels that the group was formed by.
        let alert = self.alerts.first()?;
        Some(keys.key(&alert.labels, &self.group_by()))
    }

    /// Its alerts as reports that came at `received`.
    pub fn into_reports(self, received: Time) -> Vec<Alert> {
        let reports = self.alerts.into_iter();
        reports.map(|alert| alert.into_report(received)).collect()
    }
}

impl ReportedAlert {
    fn into_report(self, received: Time) -> Alert {
        Alert {
            alert_name: self.labels.get("alertname").cloned().unwrap_or_default(),
            fingerprint: self.fingerprint,
            status: self.status,
            labels: self.labels,
            annotations: self.annotations,
            starts_at: self.starts_at,
            // Of one that fires, it says when it would count as resolved.
            ends_at: self
                .ends_at
                .filter(|_| self.status == AlertStatus::Resolved),
            generator_url: self.generator_url,
            timestamp: Some(received),
        }
    }
}

/// Reads a time as Go writes it; the zero time stands for "none".
fn go_time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Time>, D::Error> {
    let text = String::deserialize(from)?;
    let time = Time::parse_rfc3339(&text).map_err(serde::de::Error::custom)?;
    Ok(Some(time).filter(|_| text != GO_ZERO_TIME))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const RECORDED: &str = include_str!("../../tests/data/alertmanager-webhooks.jsonl");

    #[test]
    fn recorded_webhooks_are_read_whole() {
        let webhooks = RECORDED.lines();
        let webhooks: Vec<Webhook> = webhooks
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(webhooks.len(), 456);
        let keys: BTreeSet<_> = webhooks
            .iter()
            .map(|webhook| webhook.key(&GroupKeys::new()).unwrap())
            .collect();
        assert_eq!(keys.len(), 278);
        let received = Time::now();
        let mut alerts = BTreeSet::new();
        for webhook in webhooks {
            let key = webhook.key(&GroupKeys::new()).unwrap();
            for report in webhook.into_reports(received) {
                assert!(!report.fingerprint.is_empty() && !report.alert_name.is_empty());
                assert_eq!(
                    report.ends_at.is_some(),
                    report.status == AlertStatus::Resolved
                );
                assert!(report.starts_at.is_some());
                alerts.insert((key.clone(), report.fingerprint));
            }
        }
        assert_eq!(alerts.len(), 1_112);
    }

    #[test]
    fn what_is_no_webhook_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "EOF"),
            ("{}", "missing field"),
            (
                r#"{"version":"3","groupLabels":{},"alerts":[]}"#,
                "unknown variant",
            ),
            (
                r#"{"version":"4","groupLabels":{},"alerts":[{"fingerprint":"a","status":"odd"}]}"#,
                "unknown variant",
            ),
            (
                r#"{"version":"4","groupLabels":{},"alerts":[{"fingerprint":"a","status":"firing","startsAt":"now"}]}"#,
                "must be a time",
            ),
        ] {
            let error = serde_json::from_str::<Webhook>(text)
                .unwrap_err()
                .to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
