//! The recorded webhooks, and what must come of them.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use groupstate::{
    domain::group::{Alert, AlertGroup, AlertStatus, GroupKey, GroupState, Time},
    manager::{group_keys::GroupKeys, webhook::Webhook},
};

const FILE: &str = include_str!("../data/alertmanager-webhooks.jsonl");

pub const GROUPS: usize = 278;
pub const ALERTS: usize = 1_112;

/// The alerts that each group must hold at the end, by fingerprint.
type Expected = BTreeMap<GroupKey, BTreeMap<String, Alert>>;

/// The webhooks of the file in `lanes` parts, each in the order of the file. All
/// webhooks of a group are in one part: Alertmanager sends them one after
/// another.
pub fn lanes(lanes: usize) -> Vec<Vec<&'static str>> {
    let mut parts = vec![Vec::new(); lanes];
    for line in FILE.lines() {
        let mut hasher = DefaultHasher::new();
        parse(line)
            .key(&GroupKeys::new())
            .unwrap()
            .hash(&mut hasher);
        let part = hasher.finish() as usize % lanes;
        parts[part].push(line);
    }
    parts
}

/// Every way in which the groups are not what the file says. An alert that is
/// missing or out of date is one difference, and so is a group with wrong counts.
pub fn differences(found: &[AlertGroup]) -> Vec<String> {
    let expected = expected();
    let mut differences = Vec::new();
    let found: BTreeMap<_, _> = found.iter().map(|group| (&group.key, group)).collect();
    for key in found.keys() {
        if !expected.contains_key(*key) {
            differences.push(format!("{key}: is not in the file"));
        }
    }
    for (key, alerts) in &expected {
        let Some(group) = found.get(key) else {
            differences.push(format!("{key}: is missing"));
            continue;
        };
        for (fingerprint, alert) in alerts {
            let found = group.alerts.get(fingerprint).map(|found| Alert {
                timestamp: None,
                ..found.clone()
            });
            if found.as_ref() != Some(alert) {
                differences.push(format!("{key}: {fingerprint} is {found:?}, not {alert:?}"));
            }
        }
        let firing = alerts.values();
        let firing = firing.filter(|alert| alert.status == AlertStatus::Firing);
        let firing = firing.count();
        let resolved = alerts.len() - firing;
        let state = match (firing, resolved) {
            (_, 0) => GroupState::Firing,
            (0, _) => GroupState::Resolved,
            _ => GroupState::Mixed,
        };
        let metadata = &group.metadata;
        let counted = (
            metadata.state,
            metadata.firing_count as usize,
            metadata.resolved_count as usize,
            group.alerts.len(),
        );
        if counted != (state, firing, resolved, alerts.len()) {
            differences.push(format!("{key}: {counted:?}, not {firing} and {resolved}"));
        }
    }
    differences
}

/// Of every alert the last report in the file: it is received after the others. The
/// time of its receipt is left out.
fn expected() -> Expected {
    let mut expected = Expected::new();
    for line in FILE.lines() {
        let webhook = parse(line);
        let group = expected.entry(webhook.key(&GroupKeys::new()).unwrap());
        let group = group.or_default();
        for report in webhook.into_reports(Time::now()).0 {
            let report = Alert {
                timestamp: None,
                ..report
            };
            group.insert(report.fingerprint.clone(), report);
        }
    }
    let alerts: usize = expected.values().map(BTreeMap::len).sum();
    assert_eq!((expected.len(), alerts), (GROUPS, ALERTS));
    expected
}

fn parse(line: &str) -> Webhook {
    serde_json::from_str(line).unwrap()
}

/// What is expected is not there by itself, and a difference is seen.
#[test]
fn the_check_sees_what_is_missing_and_what_is_stale() {
    let whole: Vec<AlertGroup> = expected()
        .into_iter()
        .map(|(key, alerts)| {
            let mut group = AlertGroup::empty(key, Vec::new(), Time::now());
            let alerts: Vec<Alert> = alerts.into_values().collect();
            group.add_reports(&alerts, Time::now());
            group
        })
        .collect();
    assert_eq!(differences(&whole), Vec::<String>::new());
    assert_eq!(differences(&whole[1..]).len(), 1);

    let mut less = whole.clone();
    let (fingerprint, _) = less[0].alerts.pop_first().unwrap();
    let seen = differences(&less);
    // The alert, and the count.
    assert_eq!(seen.len(), 2);
    assert!(seen[0].contains(&fingerprint), "{seen:?}");

    let mut stale = whole;
    let alert = stale[5].alerts.first_entry().unwrap().into_mut();
    alert.annotations.clear();
    assert_eq!(differences(&stale).len(), 1);
}
