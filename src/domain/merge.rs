//! The merge of two states of one group.
//!
//! While Redis is down, every instance goes on with its own copy of a group.
//! When it is back and the group was changed both here and there, neither copy
//! may simply win: each may hold alerts that the other has never heard of. So
//! they are merged alert by alert, and the result is swapped in.
//!
//! | field | merged value | why |
//! |---|---|---|
//! | `alerts` | all fingerprints of both sides; of two different reports of one fingerprint, the greater in [`Alert::report_order`] | no alert is lost, and the newest word on each counts |
//! | `firing_count`, `resolved_count` | counted in the merged alerts, at most `i32::MAX` | either side counted only its own |
//! | `updated_at` | the later | the last change counts |
//! | `state` | `Silenced` if the side with the greater (`updated_at`, `state`) is; else what the merged alerts say: `Firing`, `Resolved`, or `Mixed` if there are both; with no alerts, the state of that side | a silence is somebody's decision and not to be seen in the alerts; it stands until a later change lifts it |
//! | `resolved_at` | if all merged alerts are resolved: the latest of their ends, and of `resolved_at` of a side that holds exactly the merged alerts; if one fires: none; with no alerts, that of the side with the greater (`updated_at`, `state`, `resolved_at`) | see below |
//! | `created_at`, `first_firing_at` | the earlier that is known | both are of the first event, and each side may have missed it |
//! | `group_by` | the greater | the sides of one key differ in it only where one does not know it: a list that is not empty beats an empty one |
//! | each timer | the greater by (`last_reset_at`, `version`, `reset_count`, `created_by`, `lock_id`) | the last reset counts; a timer is one value and never mixed from two |
//! | `write_id`, `version` | none | the store sets them when the result is written |
//!
//! An absent time or timer is less than any other; "the earlier that is known"
//! passes over it. The end of an alert is its `ends_at` or, where that is
//! unknown, the `timestamp` of the report that says it is resolved.
//!
//! An alert that was removed on one side only **comes back**. Nothing in a group
//! tells "removed there" from "never heard of there", and an alert too many is
//! resolved or removed again, while one too few may be an outage that nobody is
//! told of: coming back is the safe side.
//!
//! # Why the result does not depend on who merges first
//!
//! After an outage several instances merge into the same key, in any order, and
//! any of them may repeat its merge because an answer was lost. The rule is
//! therefore commutative and associative, and merging a side in again changes
//! nothing: every field is a maximum or a minimum in a total order, or computed
//! from what is such already.
//!
//! The price is that counts, `state` and `resolved_at` that disagree with the
//! group's own alerts do not survive: they are put right. Merged with itself, a
//! group is unchanged if they agree. A rule that kept a wrong count for as long
//! as it can would have to know whether a group has been merged before.
//!
//! This is also why `resolved_at` is not just the later one where the merged
//! state is `Resolved`. Say side A is resolved, B fires, and C has the
//! resolution of B. A and B merge to `Mixed`, which has no `resolved_at`, so
//! that of A is forgotten before C comes; with B and C merged first it would
//! have been kept. The ends of the alerts are never forgotten, so they decide.
//! What a side says beyond them, such as when it noticed the resolution, holds
//! for exactly its own alerts and is kept while the result has just those. In
//! the same way a silenced group has a `resolved_at` only if its alerts are all
//! resolved.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, btree_map::Entry},
};

use super::{
    group::{Alert, AlertGroup, GroupMetadata, Time, TimerMetadata},
    state::{Counts, saturated},
};

/// What came of merging two states of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    pub group: AlertGroup,
    /// Fingerprints, in order, of the alerts of which both sides had a report
    /// and not the same one; the lesser report was dropped.
    pub dropped: Vec<String>,
}

/// The alerts of both sides.
struct Union {
    alerts: BTreeMap<String, Alert>,
    /// See [`Merged::dropped`].
    dropped: Vec<String>,
    /// Whether the alerts are exactly those of the left side.
    is_left: bool,
    /// Whether the alerts are exactly those of the right side.
    is_right: bool,
}

// === impl AlertGroup ===

impl AlertGroup {
    /// Merges two states of one group. Which of the two is `self` makes no
    /// difference. The result has neither write id nor version.
    ///
    /// Both must have the same key.
    pub fn merge(self, other: Self) -> Merged {
        debug_assert_eq!(self.key, other.key, "two groups are not merged");
        let union = Union::of(self.alerts, other.alerts);
        let metadata = merge_metadata(self.metadata, other.metadata, &union);
        Merged {
            group: Self {
                key: self.key,
                alerts: union.alerts,
                metadata,
            },
            dropped: union.dropped,
        }
    }
}

// === impl Alert ===

impl Alert {
    /// Orders two reports of one alert: the greater one is the one to believe.
    ///
    /// By, in this order:
    ///
    /// 1. `timestamp`: the report that was received last. One without comes before
    ///    all that have one; of two without, the later `ends_at`, or `starts_at`
    ///    where there is none, counts;
    /// 2. `status`: at the same moment, resolved over firing;
    /// 3. `starts_at`: the later start;
    /// 4. the bytes of its JSON: without meaning, but the same everywhere.
    ///
    /// The start does not decide first, since that of a running alert moves
    /// backwards: Alertmanager does so when it hears late of a second Prometheus
    /// that fired earlier. An order by start would ignore every report from then
    /// on, "resolved" included. Alertmanager's own merge goes by receipt, too.
    ///
    /// An absent time is before any other. The order is total, and two reports
    /// are equal in it only if they are equal.
    pub fn report_order(&self, other: &Self) -> Ordering {
        fn rank(report: &Alert) -> impl Ord {
            // With a `timestamp`, its second part is that again and decides nothing.
            let received = (report.timestamp, report.received());
            (received, report.status, report.starts_at)
        }
        rank(self).cmp(&rank(other)).then_with(|| {
            // Most reports that come this far are one and the same: no
            // need to write them as JSON.
            if self == other {
                Ordering::Equal
            } else {
                self.json().cmp(&other.json())
            }
        })
    }

    fn json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings, times and maps with string keys always serialize")
    }

    /// When this report was received, or else when its alert ended or began: the
    /// nearest that is known.
    pub fn received(&self) -> Option<Time> {
        self.timestamp.or(self.ends_at).or(self.starts_at)
    }

    /// When this alert ended, as far as it is known; of a resolved one.
    pub(super) fn end(&self) -> Option<Time> {
        self.ends_at.or(self.timestamp)
    }
}

// === impl Union ===

impl Union {
    fn of(left: BTreeMap<String, Alert>, right: BTreeMap<String, Alert>) -> Self {
        let right_len = right.len();
        let mut union = Self {
            alerts: left,
            dropped: Vec::new(),
            is_left: true,
            is_right: true,
        };
        for (fingerprint, report) in right {
            match union.alerts.entry(fingerprint) {
                Entry::Vacant(entry) => {
                    entry.insert(report);
                    union.is_left = false;
                }
                Entry::Occupied(mut entry) => match entry.get().report_order(&report) {
                    Ordering::Equal => {}
                    Ordering::Less => {
                        union.dropped.push(entry.key().clone());
                        entry.insert(report);
                        union.is_left = false;
                    }
                    Ordering::Greater => {
                        union.dropped.push(entry.key().clone());
                        union.is_right = false;
                    }
                },
            }
        }
        // More alerts than the right side had: the left one brought some.
        union.is_right &= union.alerts.len() == right_len;
        union
    }
}

/// No `..` in the result: whoever adds a field has to say how it is merged.
fn merge_metadata(left: GroupMetadata, right: GroupMetadata, union: &Union) -> GroupMetadata {
    let counts = Counts::of(&union.alerts);
    let left_says = (left.updated_at, left.state, left.resolved_at);
    let right_says = (right.updated_at, right.state, right.resolved_at);
    let (updated_at, last_state, last_resolved_at) = left_says.max(right_says);
    let state = counts.state(last_state);
    let resolved_at = match (counts.firing, counts.resolved) {
        (0, 0) => last_resolved_at,
        (0, _) => {
            let ends = union.alerts.values().filter_map(Alert::end);
            let left = left.resolved_at.filter(|_| union.is_left);
            let right = right.resolved_at.filter(|_| union.is_right);
            ends.chain(left).chain(right).max()
        }
        (_, _) => None,
    };

    GroupMetadata {
        state,
        created_at: earlier_known(left.created_at, right.created_at),
        updated_at,
        first_firing_at: earlier_known(left.first_firing_at, right.first_firing_at),
        resolved_at,
        firing_count: saturated(counts.firing),
        resolved_count: saturated(counts.resolved),
        group_by: left.group_by.max(right.group_by),
        group_wait_timer: greater_timer(left.group_wait_timer, right.group_wait_timer),
        group_interval_timer: greater_timer(left.group_interval_timer, right.group_interval_timer),
        repeat_interval_timer: greater_timer(
            left.repeat_interval_timer,
            right.repeat_interval_timer,
        ),
        write_id: String::new(),
        version: None,
    }
}

/// The earlier time, where an absent one is unknown and not early.
fn earlier_known(left: Option<Time>, right: Option<Time>) -> Option<Time> {
    left.into_iter().chain(right).min()
}

fn greater_timer(
    left: Option<TimerMetadata>,
    right: Option<TimerMetadata>,
) -> Option<TimerMetadata> {
    left.into_iter().chain(right).max_by(timer_order)
}

/// Total: all fields of a timer take part, those that say when it was reset
/// first.
fn timer_order(left: &TimerMetadata, right: &TimerMetadata) -> Ordering {
    fn rank(timer: &TimerMetadata) -> (Option<Time>, i64, i32, &str, &str) {
        // No `..`: a field that is left out would let two timers tie.
        let TimerMetadata {
            version,
            created_by,
            reset_count,
            last_reset_at,
            lock_id,
        } = timer;
        (*last_reset_at, *version, *reset_count, created_by, lock_id)
    }
    rank(left).cmp(&rank(right))
}

#[cfg(test)]
mod tests;
