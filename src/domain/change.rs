//! The changes that a replica makes to a group, and what each makes of whatever
//! is stored. Pure.
//!
//! A change is never merged into a group as a whole group would be: it is applied
//! again to what is stored by then. So an alert that somebody has removed
//! meanwhile does not come back, and a group that has vanished is begun anew with
//! what this change brings and nothing stale.

use std::cmp::Ordering;

use super::{
    group::{Alert, AlertGroup, GroupKey, Time},
    retention::{Left, Refused, Retention},
    version::Version,
};

/// One change of one group. May be applied any number of times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Adds reports; makes the group if there is none.
    Add {
        group_by: Vec<String>,
        reports: Vec<Alert>,
        at: Time,
    },
    /// Removes an alert; the last one takes the group with it.
    Remove {
        fingerprint: String,
        /// The report that was there when the removal was first made: a newer
        /// one stays. None as long as it has not been made.
        last: Option<Alert>,
        at: Time,
    },
    /// Silences the group, unless it was changed after `at`.
    Silence { at: Time },
    /// Lifts its silence, unless it was changed after `at`.
    LiftSilence { at: Time },
    /// Deletes the group if it was last updated before this.
    Expire { before: Time },
}

/// What a change makes of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    pub step: Step,
    /// Alerts that leave the group along with it.
    pub left: Left,
    /// Reports that are not stored, for want of room.
    pub refused: Vec<Refused>,
}

/// What has to be done to make a change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: what is stored has it already, or it does not apply.
    Nothing,
    /// Put this in the place of what is stored.
    Put(Box<AlertGroup>),
    /// Delete this version.
    Delete(Version),
}

// === impl Change ===

impl Change {
    /// What this change does to what is `stored` at `key`, if it is applied `now`.
    pub fn apply(
        &self,
        key: &GroupKey,
        stored: Option<&AlertGroup>,
        now: Time,
        retention: &Retention,
    ) -> Applied {
        let mut applied = Applied {
            step: Step::Nothing,
            left: Left::default(),
            refused: Vec::new(),
        };
        let mut group = match (self, stored) {
            (_, Some(stored)) => stored.clone(),
            (Self::Add { group_by, at, .. }, None) => {
                AlertGroup::empty(key.clone(), group_by.clone(), *at)
            }
            // There is nothing to take away from.
            (_, None) => return applied,
        };
        let version = stored.and_then(|stored| stored.metadata.version);
        let (at, reports): (Time, &[Alert]) = match self {
            Self::Add { reports, at, .. } => (*at, reports),
            Self::Remove { at, .. } | Self::Silence { at } | Self::LiftSilence { at } => (*at, &[]),
            Self::Expire { before } => {
                if let Some(version) = version
                    && group.metadata.updated_at < Some(*before)
                {
                    applied.step = Step::Delete(version);
                }
                return applied;
            }
        };
        let changed = match self {
            Self::Remove {
                fingerprint, last, ..
            } => group.remove_report(fingerprint, last.as_ref(), at),
            Self::Silence { .. } => group.silence(at),
            Self::LiftSilence { .. } => group.lift_silence(at),
            Self::Add { .. } | Self::Expire { .. } => group.add_reports(reports, at),
        };
        if !changed {
            return applied;
        }
        applied.left = retention.age(&mut group, stored, at, now);
        applied.refused = retention.fit(&mut group, stored, reports, at, &mut applied.left);
        applied.step = match (group.alerts.is_empty(), stored, version) {
            (true, Some(_), Some(version)) => Step::Delete(version),
            (true, None, _) => Step::Nothing,
            // All that was added has left again at once.
            (_, Some(stored), _) if is_same(stored, &group) => Step::Nothing,
            _ => Step::Put(Box::new(group)),
        };
        applied
    }

    /// The change to make again later: of a removal, one that spares what is
    /// newer than what it has removed.
    pub fn again(self, before: Option<&AlertGroup>) -> Self {
        match self {
            Self::Remove {
                fingerprint,
                last: None,
                at,
            } => Self::Remove {
                last: before.and_then(|group| group.alerts.get(&fingerprint).cloned()),
                fingerprint,
                at,
            },
            change => change,
        }
    }

    /// Takes in a later change if one change can say both; else gives it back.
    pub fn absorb(&mut self, later: Self) -> Option<Self> {
        match (self, later) {
            (
                Self::Add { reports, at, .. },
                Self::Add {
                    reports: later,
                    at: later_at,
                    ..
                },
            ) => {
                *at = later_at.max(*at);
                for report in later {
                    let known = reports
                        .iter_mut()
                        .find(|known| known.fingerprint == report.fingerprint);
                    match known {
                        Some(known) if report.report_order(known) == Ordering::Greater => {
                            *known = report;
                        }
                        Some(_) => {}
                        None => reports.push(report),
                    }
                }
                None
            }
            (this, later) if *this == later => None,
            (_, later) => Some(later),
        }
    }

    /// How much there is to remember: reports, and one for any other change.
    pub fn weight(&self) -> usize {
        match self {
            Self::Add { reports, .. } => reports.len(),
            _ => 1,
        }
    }
}

/// Whether two states of a group say the same, whenever it was said.
fn is_same(one: &AlertGroup, other: &AlertGroup) -> bool {
    let mut metadata = other.metadata.clone();
    metadata.updated_at = one.metadata.updated_at;
    one.metadata == metadata && one.alerts == other.alerts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::group::AlertStatus;

    fn at(second: i64) -> Time {
        Time::from_parts(second, 0).unwrap()
    }

    fn key() -> GroupKey {
        GroupKey::new("k").unwrap()
    }

    fn firing(fingerprint: &str, received: i64) -> Alert {
        Alert {
            fingerprint: fingerprint.into(),
            status: AlertStatus::Firing,
            starts_at: Some(at(1)),
            timestamp: Some(at(received)),
            ..Alert::default()
        }
    }

    fn add(fingerprints: &[&str], received: i64) -> Change {
        Change::Add {
            group_by: vec!["alertname".into()],
            reports: fingerprints
                .iter()
                .map(|name| firing(name, received))
                .collect(),
            at: at(received),
        }
    }

    fn remove(fingerprint: &str, second: i64) -> Change {
        Change::Remove {
            fingerprint: fingerprint.into(),
            last: None,
            at: at(second),
        }
    }

    /// What a change does in the tenth second.
    fn step(change: &Change, group: Option<&AlertGroup>) -> Step {
        change
            .apply(&key(), group, at(10), &Retention::default())
            .step
    }

    /// Applies a change as a store would.
    fn stored(change: &Change, group: Option<AlertGroup>) -> Option<AlertGroup> {
        match step(change, group.as_ref()) {
            Step::Nothing => group,
            Step::Put(mut group) => {
                group.metadata.version = Version::new(16);
                Some(*group)
            }
            Step::Delete(_) => None,
        }
    }

    #[test]
    fn the_last_alert_takes_the_group_with_it() {
        let group = stored(&add(&["a", "b"], 2), None);
        let group = stored(&remove("a", 3), group).unwrap();
        assert_eq!(group.alerts.keys().collect::<Vec<_>>(), ["b"]);
        let last = step(&remove("b", 4), Some(&group));
        assert_eq!(last, Step::Delete(Version::new(16).unwrap()));
    }

    #[test]
    fn a_group_that_has_vanished_is_begun_anew() {
        let group = stored(&add(&["a", "b"], 2), None);
        assert!(group.is_some());
        let group = stored(&add(&["c"], 3), None).unwrap();
        assert_eq!(group.alerts.keys().collect::<Vec<_>>(), ["c"]);
        assert_eq!(group.metadata.created_at, Some(at(3)));
    }

    #[test]
    fn only_reports_make_a_group() {
        for change in [
            remove("a", 3),
            Change::Silence { at: at(3) },
            Change::LiftSilence { at: at(3) },
            Change::Expire { before: at(3) },
        ] {
            assert_eq!(step(&change, None), Step::Nothing);
        }
    }

    #[test]
    fn a_removal_made_again_spares_an_alert_that_fires_again() {
        let group = stored(&add(&["a", "b"], 2), None);
        let again = remove("a", 3).again(group.as_ref());
        let group = stored(&add(&["a"], 5), group);
        assert_eq!(step(&again, group.as_ref()), Step::Nothing);
        assert_ne!(step(&remove("a", 3), group.as_ref()), Step::Nothing);
    }

    #[test]
    fn only_a_group_that_was_not_updated_expires() {
        let group = stored(&add(&["a"], 5), None);
        let expire = |second| step(&Change::Expire { before: at(second) }, group.as_ref());
        assert_eq!(expire(5), Step::Nothing);
        assert!(matches!(expire(6), Step::Delete(_)));
    }

    #[test]
    fn a_report_that_is_over_for_long_takes_its_alert_along_and_makes_no_group() {
        let hours = |hours: i64| at(2 + 3_600 * hours);
        let over = Change::Add {
            group_by: Vec::new(),
            reports: vec![Alert {
                status: AlertStatus::Resolved,
                ..firing("a", 3)
            }],
            at: at(3),
        };
        let late =
            |group: Option<&AlertGroup>| over.apply(&key(), group, hours(2), &Retention::default());
        assert_eq!(late(None).step, Step::Nothing);
        let group = stored(&add(&["a"], 2), None);
        assert!(matches!(late(group.as_ref()).step, Step::Delete(_)));
        let group = stored(&add(&["b"], 2), None);
        assert_eq!(late(group.as_ref()).step, Step::Nothing);
        let group = stored(&add(&["a", "b"], 2), None);
        let applied = late(group.as_ref());
        assert_eq!(applied.left.resolved, 1);
        let Step::Put(group) = applied.step else {
            panic!("{applied:?}");
        };
        assert_eq!(group.alerts.keys().collect::<Vec<_>>(), ["b"]);
    }

    fn any_change() -> impl Strategy<Value = Change> {
        prop_oneof![
            4 => (prop::collection::vec("[abc]", 1..4), 2i64..9).prop_map(|(names, received)| {
                add(&names.iter().map(String::as_str).collect::<Vec<_>>(), received)
            }),
            1 => ("[abc]", 1i64..9).prop_map(|(name, second)| remove(&name, second)),
            1 => (1i64..9).prop_map(|second| Change::Silence { at: at(second) }),
            1 => (1i64..9).prop_map(|second| Change::LiftSilence { at: at(second) }),
        ]
    }

    proptest! {
        #[test]
        fn a_change_made_twice_is_made_once(
            before in prop::collection::vec(any_change(), 0..6),
            change in any_change(),
        ) {
            let group = before.iter().fold(None, |group, change| stored(change, group));
            let once = stored(&change, group);
            prop_assert_eq!(step(&change, once.as_ref()), Step::Nothing);
        }

        /// What was absorbed does what both did.
        #[test]
        fn changes_of_one_kind_become_one(
            before in prop::collection::vec(any_change(), 0..6),
            first in any_change(),
            second in any_change(),
        ) {
            let group = before.iter().fold(None, |group, change| stored(change, group));
            let mut both = first.clone();
            if both.absorb(second.clone()).is_none() {
                let alerts = |group: Option<AlertGroup>| group.map(|group| group.alerts);
                let one_by_one = stored(&second, stored(&first, group.clone()));
                prop_assert_eq!(alerts(stored(&both, group)), alerts(one_by_one));
            }
        }
    }
}
