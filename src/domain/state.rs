//! How a group follows from its alerts: the rules by which a replica changes
//! one. Pure: the time of a change is passed in.
//!
//! | field | rule |
//! |---|---|
//! | `firing_count`, `resolved_count` | counted in the alerts |
//! | `state` | `Firing`, `Resolved`, or `Mixed` if there are both; a `Silenced` group stays silenced until somebody lifts it; without alerts, what it was |
//! | `first_firing_at` | the earliest start of a firing report that was ever added |
//! | `resolved_at` | the latest end of the alerts once none fires; none while one does |
//! | `updated_at` | the latest time of a change that changed something |
//! | `created_at` | the time of the change that made the group |
//!
//! Every change may be made twice, and on a group that others have changed
//! meanwhile: what is there already is not added again, and what is newer stays.
//! That is what lets a replica repeat a change whose answer was lost.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, btree_map::Entry},
};

use super::group::{Alert, AlertGroup, AlertStatus, GroupKey, GroupMetadata, GroupState, Time};

/// How many alerts of a group fire, and how many are resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub firing: usize,
    pub resolved: usize,
}

// === impl AlertGroup ===

impl AlertGroup {
    /// A group without alerts, formed by the labels `group_by`, as of `at`.
    pub fn empty(key: GroupKey, group_by: Vec<String>, at: Time) -> Self {
        Self {
            key,
            alerts: BTreeMap::new(),
            metadata: GroupMetadata {
                created_at: Some(at),
                updated_at: Some(at),
                group_by,
                ..GroupMetadata::default()
            },
        }
    }

    /// Adds reports that came at `at`. Of two reports of one alert the greater
    /// in [`Alert::report_order`] stays. Says whether that changed the group.
    pub fn add_reports(&mut self, reports: &[Alert], at: Time) -> bool {
        let mut changed = false;
        for report in reports {
            changed |= match self.alerts.entry(report.fingerprint.clone()) {
                Entry::Vacant(entry) => {
                    entry.insert(report.clone());
                    true
                }
                Entry::Occupied(mut entry) => {
                    let newer = report.report_order(entry.get()) == Ordering::Greater;
                    if newer {
                        entry.insert(report.clone());
                    }
                    newer
                }
            };
            let began = report.starts_at.or(report.timestamp);
            let first = &mut self.metadata.first_firing_at;
            let is_first = began.is_some() && (first.is_none() || began < *first);
            if report.status == AlertStatus::Firing && is_first {
                *first = began;
                changed = true;
            }
        }
        self.follow_alerts(at, changed)
    }

    /// Removes an alert, unless there is a newer report of it than `last`, the
    /// one that was known when its removal was decided. Says whether that
    /// changed the group.
    pub fn remove_report(&mut self, fingerprint: &str, last: Option<&Alert>, at: Time) -> bool {
        let Some(stored) = self.alerts.get(fingerprint) else {
            return false;
        };
        if last.is_some_and(|last| stored.report_order(last) == Ordering::Greater) {
            return false;
        }
        self.alerts.remove(fingerprint);
        self.follow_alerts(at, true)
    }

    /// Keeps the alerts that `stay`, as of a change at `at`. Says whether that changed
    /// the group.
    pub fn retain_alerts(&mut self, at: Time, mut stay: impl FnMut(&str, &Alert) -> bool) -> bool {
        let before = self.alerts.len();
        self.alerts
            .retain(|fingerprint, alert| stay(fingerprint, alert));
        self.alerts.len() < before && self.follow_alerts(at, true)
    }

    /// Silences the group. Says whether that changed it: a change that was made
    /// after `at` stands.
    pub fn silence(&mut self, at: Time) -> bool {
        let changed =
            self.metadata.state != GroupState::Silenced && self.metadata.updated_at <= Some(at);
        if changed {
            self.metadata.state = GroupState::Silenced;
            self.metadata.updated_at = Some(at);
        }
        changed
    }

    /// Lifts a silence: the state is what the alerts say. Says whether that
    /// changed the group: a change that was made after `at` stands.
    pub fn lift_silence(&mut self, at: Time) -> bool {
        let changed =
            self.metadata.state == GroupState::Silenced && self.metadata.updated_at <= Some(at);
        if changed {
            self.metadata.state = self.counts().state(GroupState::Firing);
            self.metadata.updated_at = Some(at);
        }
        changed
    }

    /// The alerts, counted.
    pub fn counts(&self) -> Counts {
        Counts::of(&self.alerts)
    }

    /// Brings the metadata in line with the alerts, which were `changed` at `at`
    /// or not. Says whether there was anything to do.
    fn follow_alerts(&mut self, at: Time, changed: bool) -> bool {
        let counts = self.counts();
        let metadata = &mut self.metadata;
        let before = (
            metadata.state,
            metadata.resolved_at,
            metadata.firing_count,
            metadata.resolved_count,
        );
        metadata.state = counts.state(metadata.state);
        metadata.resolved_at = match (counts.firing, counts.resolved) {
            (0, 0) => metadata.resolved_at,
            (0, _) => self.alerts.values().filter_map(Alert::end).max(),
            (_, _) => None,
        };
        metadata.firing_count = saturated(counts.firing);
        metadata.resolved_count = saturated(counts.resolved);
        let after = (
            metadata.state,
            metadata.resolved_at,
            metadata.firing_count,
            metadata.resolved_count,
        );
        let changed = changed || before != after;
        if changed {
            metadata.updated_at = metadata.updated_at.max(Some(at));
        }
        changed
    }
}

// === impl Counts ===

impl Counts {
    pub(super) fn of(alerts: &BTreeMap<String, Alert>) -> Self {
        let fires = |alert: &&Alert| alert.status == AlertStatus::Firing;
        let firing = alerts.values().filter(fires).count();
        Self {
            firing,
            resolved: alerts.len() - firing,
        }
    }

    /// The state of a group with these alerts, whose state was `last`: a silence
    /// is somebody's decision and not to be seen in the alerts, so it stays.
    pub fn state(self, last: GroupState) -> GroupState {
        match (last, self.firing, self.resolved) {
            (GroupState::Silenced, _, _) => GroupState::Silenced,
            (last, 0, 0) => last,
            (_, _, 0) => GroupState::Firing,
            (_, 0, _) => GroupState::Resolved,
            (_, _, _) => GroupState::Mixed,
        }
    }
}

/// A count as the documents have it.
pub(super) fn saturated(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Time {
        Time::from_parts(second, 0).unwrap()
    }

    fn report(fingerprint: &str, status: AlertStatus, starts: i64, received: i64) -> Alert {
        Alert {
            fingerprint: fingerprint.into(),
            status,
            starts_at: Some(at(starts)),
            ends_at: (status == AlertStatus::Resolved).then(|| at(received)),
            timestamp: Some(at(received)),
            ..Alert::default()
        }
    }

    fn firing(fingerprint: &str, starts: i64, received: i64) -> Alert {
        report(fingerprint, AlertStatus::Firing, starts, received)
    }

    fn resolved(fingerprint: &str, starts: i64, received: i64) -> Alert {
        report(fingerprint, AlertStatus::Resolved, starts, received)
    }

    fn group() -> AlertGroup {
        AlertGroup::empty(GroupKey::new("k").unwrap(), vec!["alertname".into()], at(0))
    }

    #[test]
    fn a_group_fires_is_mixed_and_resolves_with_its_alerts() {
        let mut group = group();
        assert!(group.add_reports(&[firing("a", 10, 11), firing("b", 5, 11)], at(11)));
        assert_eq!(group.metadata.state, GroupState::Firing);
        assert_eq!(group.metadata.first_firing_at, Some(at(5)));
        assert_eq!(group.metadata.firing_count, 2);

        assert!(group.add_reports(&[resolved("a", 10, 20)], at(21)));
        assert_eq!(group.metadata.state, GroupState::Mixed);
        assert_eq!(group.metadata.resolved_at, None);

        assert!(group.add_reports(&[resolved("b", 5, 30)], at(31)));
        assert_eq!(group.metadata.state, GroupState::Resolved);
        assert_eq!(group.metadata.resolved_at, Some(at(30)));
        assert_eq!(group.metadata.updated_at, Some(at(31)));
        assert_eq!(group.metadata.resolved_count, 2);

        assert!(group.add_reports(&[firing("a", 40, 41)], at(41)));
        assert_eq!(group.metadata.state, GroupState::Mixed);
        assert_eq!(group.metadata.resolved_at, None);
        assert_eq!(group.metadata.first_firing_at, Some(at(5)));
    }

    #[test]
    fn an_older_report_changes_nothing() {
        let mut group = group();
        group.add_reports(&[resolved("a", 10, 20)], at(20));
        let before = group.clone();
        // First firing is known now; it was not before.
        assert!(group.add_reports(&[firing("a", 10, 11)], at(30)));
        assert_eq!(group.alerts, before.alerts);
        assert!(!group.add_reports(&[firing("a", 10, 11)], at(40)));
        assert!(!group.add_reports(&[firing("a", 10, 15)], at(40)));
        assert!(!group.add_reports(&[firing("a", 18, 19)], at(40)));
    }

    /// A second Prometheus that fired earlier is heard later.
    #[test]
    fn a_start_that_moves_backwards_is_followed_until_the_alert_is_over() {
        let mut group = group();
        group.add_reports(&[firing("a", 13, 13)], at(13));
        assert!(group.add_reports(&[firing("a", 10, 20)], at(20)));
        assert_eq!(group.alerts["a"].starts_at, Some(at(10)));
        assert_eq!(group.metadata.first_firing_at, Some(at(10)));
        assert!(group.add_reports(&[resolved("a", 10, 40)], at(40)));
        assert_eq!(group.metadata.state, GroupState::Resolved);
        assert_eq!(group.metadata.firing_count, 0);
    }

    #[test]
    fn a_silence_stays_until_it_is_lifted() {
        let mut group = group();
        group.add_reports(&[firing("a", 10, 11)], at(11));
        assert!(group.silence(at(12)));
        assert!(!group.silence(at(13)));
        group.add_reports(&[firing("b", 20, 21)], at(21));
        assert_eq!(group.metadata.state, GroupState::Silenced);
        assert_eq!(group.metadata.firing_count, 2);
        assert!(
            !group.lift_silence(at(20)),
            "decided before the last change"
        );
        assert!(group.lift_silence(at(22)));
        assert_eq!(group.metadata.state, GroupState::Firing);
    }

    #[test]
    fn a_removal_spares_an_alert_that_fires_again() {
        let mut group = group();
        let first = firing("a", 10, 11);
        group.add_reports(std::slice::from_ref(&first), at(11));
        group.add_reports(&[firing("a", 30, 31)], at(31));
        assert!(!group.remove_report("a", Some(&first), at(40)));
        assert!(!group.remove_report("b", None, at(40)));
        assert!(group.remove_report("a", None, at(40)));
        assert_eq!(group.metadata.updated_at, Some(at(40)));
        assert_eq!(group.metadata.firing_count, 0);
        assert!(group.alerts.is_empty());
    }

    /// A change, as a replica makes it.
    #[derive(Clone, Debug)]
    enum Change {
        Add(Vec<Alert>, i64),
        Remove(String, Option<Alert>, i64),
        Silence(i64),
        Lift(i64),
    }

    impl Change {
        fn apply(&self, group: &mut AlertGroup) -> bool {
            match self {
                Self::Add(reports, second) => group.add_reports(reports, at(*second)),
                Self::Remove(fingerprint, last, second) => {
                    group.remove_report(fingerprint, last.as_ref(), at(*second))
                }
                Self::Silence(second) => group.silence(at(*second)),
                Self::Lift(second) => group.lift_silence(at(*second)),
            }
        }
    }

    fn any_report() -> impl Strategy<Value = Alert> {
        ("[abc]", any::<bool>(), 0i64..4, 0i64..6).prop_map(|(fingerprint, fires, starts, more)| {
            let status = if fires {
                AlertStatus::Firing
            } else {
                AlertStatus::Resolved
            };
            report(&fingerprint, status, starts, starts + more)
        })
    }

    fn any_change() -> impl Strategy<Value = Change> {
        prop_oneof![
            6 => (prop::collection::vec(any_report(), 1..4), 0i64..12)
                .prop_map(|(reports, second)| Change::Add(reports, second)),
            2 => (any_report(), 0i64..12).prop_map(|(report, second)| {
                Change::Remove(report.fingerprint.clone(), Some(report), second)
            }),
            1 => ("[abc]", 0i64..12)
                .prop_map(|(fingerprint, second)| Change::Remove(fingerprint, None, second)),
            1 => (0i64..12).prop_map(Change::Silence),
            1 => (0i64..12).prop_map(Change::Lift),
        ]
    }

    proptest! {
        /// The metadata follows from the alerts, whatever was done to them.
        #[test]
        fn metadata_follows_the_alerts(changes in prop::collection::vec(any_change(), 0..20)) {
            let mut group = group();
            let mut silenced = false;
            for change in &changes {
                let before = group.clone();
                let changed = change.apply(&mut group);
                prop_assert_eq!(changed, group != before, "{:?}", change);
                match change {
                    Change::Silence(_) => silenced |= changed,
                    Change::Lift(_) => silenced &= !changed,
                    _ => {}
                }
                let counts = group.counts();
                let metadata = &group.metadata;
                prop_assert_eq!(metadata.firing_count as usize, counts.firing);
                prop_assert_eq!(metadata.resolved_count as usize, counts.resolved);
                prop_assert_eq!(metadata.state == GroupState::Silenced, silenced);
                if !silenced && counts.firing + counts.resolved > 0 {
                    let expected = match (counts.firing, counts.resolved) {
                        (_, 0) => GroupState::Firing,
                        (0, _) => GroupState::Resolved,
                        _ => GroupState::Mixed,
                    };
                    prop_assert_eq!(metadata.state, expected);
                }
                if counts.firing > 0 {
                    prop_assert_eq!(metadata.resolved_at, None);
                    let starts = group.alerts.values().filter(|a| a.status == AlertStatus::Firing);
                    let first = starts.filter_map(|alert| alert.starts_at).min();
                    prop_assert!(metadata.first_firing_at <= first);
                }
                prop_assert!(metadata.updated_at >= before.metadata.updated_at);
                prop_assert_eq!(metadata.created_at, Some(at(0)));
            }
        }

        /// A change that is made again at once finds nothing to do.
        #[test]
        fn a_change_made_twice_is_made_once(
            before in prop::collection::vec(any_change(), 0..8),
            change in any_change(),
        ) {
            let mut group = group();
            for change in &before {
                change.apply(&mut group);
            }
            change.apply(&mut group);
            prop_assert!(!change.apply(&mut group));
        }

        /// Reports may be added in any order, by anybody, any number of times.
        #[test]
        fn the_order_of_reports_makes_no_difference(
            reports in prop::collection::vec(any_report(), 1..10),
            order in any::<prop::sample::Index>(),
        ) {
            let mut turned = reports.clone();
            turned.rotate_left(order.index(reports.len()));
            turned.extend(reports.iter().cloned().rev());
            let (mut one, mut other) = (group(), group());
            for report in &reports {
                one.add_reports(std::slice::from_ref(report), at(50));
            }
            other.add_reports(&turned, at(50));
            prop_assert_eq!(one, other);
        }
    }
}
