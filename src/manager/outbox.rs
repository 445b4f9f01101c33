//! What a replica has been told is in memory only: the changes to make again
//! once Redis answers. A value, without I/O.
//!
//! An instance that falls back to memory may die before it has carried its
//! groups back, or may be set to discard them. So whoever made a change keeps it
//! until a reply says that Redis has it.

use std::collections::{BTreeMap, btree_map::Entry};

use crate::domain::{change::Change, group::GroupKey};

/// Changes by group, in the order in which they were made. Bounded.
#[derive(Debug)]
pub struct Outbox {
    changes: BTreeMap<GroupKey, Vec<Change>>,
    /// What they weigh together.
    weight: usize,
    max_weight: usize,
    counts: OutboxCounts,
}

/// What has gone through an outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutboxCounts {
    /// Changes that were remembered.
    pub remembered: u64,
    /// Changes that Redis has by now.
    pub delivered: u64,
    /// Changes that can never be stored, whoever makes them again.
    pub dropped: u64,
    /// Changes that were not remembered for want of room.
    pub refused: u64,
    /// Groups whose changes wait.
    pub groups: usize,
    /// Reports and other changes that wait.
    pub reports: usize,
}

// === impl Outbox ===

impl Outbox {
    /// Holds at most `max_reports` reports and other changes.
    pub fn new(max_reports: usize) -> Self {
        Self {
            changes: BTreeMap::new(),
            weight: 0,
            max_weight: max_reports,
            counts: OutboxCounts::default(),
        }
    }

    /// Remembers a change. False if there is no room.
    pub fn remember(&mut self, key: &GroupKey, change: Change) -> bool {
        // What is absorbed may weigh less than this, never more.
        if self.weight + change.weight() > self.max_weight {
            self.counts.refused += 1;
            return false;
        }
        let changes = self.changes.entry(key.clone()).or_default();
        let before: usize = changes.iter().map(Change::weight).sum();
        let apart = match changes.last_mut() {
            Some(last) => last.absorb(change),
            None => Some(change),
        };
        changes.extend(apart);
        let after: usize = changes.iter().map(Change::weight).sum();
        self.weight = self.weight - before + after;
        self.counts.remembered += 1;
        true
    }

    /// The group after `last` whose changes wait, in a circle, and its changes.
    pub fn next(&self, last: Option<&GroupKey>) -> Option<(GroupKey, Vec<Change>)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let after = last.and_then(|last| {
            self.changes
                .range::<GroupKey, _>((Excluded(last), Unbounded))
                .next()
        });
        let (key, changes) = after.or_else(|| self.changes.iter().next())?;
        Some((key.clone(), changes.clone()))
    }

    /// Forgets a change that Redis has, the first of those that [`Outbox::next`] gave
    /// and that are not forgotten yet. What has come or was absorbed since stays.
    pub fn delivered(&mut self, key: &GroupKey, change: &Change) {
        self.counts.delivered += u64::from(self.forget(key, change));
    }

    /// The same of a change that can never be stored.
    pub fn dropped(&mut self, key: &GroupKey, change: &Change) {
        self.counts.dropped += u64::from(self.forget(key, change));
    }

    /// False if it has absorbed another one, and has to be made once more.
    fn forget(&mut self, key: &GroupKey, change: &Change) -> bool {
        let Entry::Occupied(mut entry) = self.changes.entry(key.clone()) else {
            return false;
        };
        if entry.get().first() != Some(change) {
            return false;
        }
        self.weight -= entry.get_mut().remove(0).weight();
        if entry.get().is_empty() {
            entry.remove();
        }
        true
    }

    pub fn counts(&self) -> OutboxCounts {
        OutboxCounts {
            groups: self.changes.len(),
            reports: self.weight,
            ..self.counts
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::group::{Alert, Time};

    fn key(name: &str) -> GroupKey {
        GroupKey::new(name).unwrap()
    }

    fn add(fingerprint: &str, second: i64) -> Change {
        let at = Time::from_parts(second, 0).unwrap();
        let report = Alert {
            fingerprint: fingerprint.into(),
            timestamp: Some(at),
            ..Alert::default()
        };
        Change::Add {
            group_by: Vec::new(),
            reports: vec![report],
            at,
        }
    }

    #[test]
    fn what_is_delivered_is_forgotten_and_what_came_since_is_not() {
        let mut outbox = Outbox::new(10);
        assert!(outbox.remember(&key("k"), add("a", 1)));
        let (_, first) = outbox.next(None).unwrap();
        assert!(outbox.remember(&key("k"), Change::Silence { at: Time::now() }));
        outbox.delivered(&key("k"), &first[0]);
        let (_, rest) = outbox.next(None).unwrap();
        assert!(matches!(rest[..], [Change::Silence { .. }]));
        outbox.delivered(&key("k"), &rest[0]);
        assert_eq!(outbox.next(None), None);
        let counts = outbox.counts();
        assert_eq!((counts.remembered, counts.delivered), (2, 2));
        assert_eq!((counts.groups, counts.reports), (0, 0));
    }

    #[test]
    fn a_change_that_has_grown_since_it_was_sent_is_not_delivered() {
        let mut outbox = Outbox::new(10);
        outbox.remember(&key("k"), add("a", 1));
        let (_, sent) = outbox.next(None).unwrap();
        outbox.remember(&key("k"), add("b", 2));
        outbox.delivered(&key("k"), &sent[0]);
        let (_, waits) = outbox.next(None).unwrap();
        assert_eq!(waits[0].weight(), 2);
    }

    #[test]
    fn newer_reports_of_an_alert_take_no_more_room() {
        let mut outbox = Outbox::new(2);
        for second in 0..100 {
            assert!(outbox.remember(&key("k"), add("a", second)));
        }
        assert_eq!(outbox.counts().reports, 1);
    }

    #[test]
    fn a_full_outbox_refuses_and_counts() {
        let mut outbox = Outbox::new(2);
        assert!(outbox.remember(&key("k"), add("a", 1)));
        assert!(outbox.remember(&key("l"), add("a", 1)));
        assert!(!outbox.remember(&key("m"), add("a", 1)));
        assert_eq!(outbox.counts().refused, 1);
    }

    #[test]
    fn groups_come_in_a_circle() {
        let mut outbox = Outbox::new(10);
        for name in ["a", "b", "c"] {
            outbox.remember(&key(name), add("x", 1));
        }
        let mut last = None;
        let mut order = Vec::new();
        for _ in 0..4 {
            let (next, _) = outbox.next(last.as_ref()).unwrap();
            order.push(next.to_string());
            last = Some(next);
        }
        assert_eq!(order, ["a", "b", "c", "a"]);
    }
}
