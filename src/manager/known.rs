//! The copies that a replica has of groups: for lists and searches, and to go on
//! with when the store does not answer. No I/O.

use lru::LruCache;
use std::{num::NonZeroUsize, time::Duration};

use tokio::time::Instant;

use crate::group::{AlertGroup, GroupKey, GroupState, Time};

/// Copies of groups, the longest unused of which are forgotten when there are
/// too many.
#[derive(Debug)]
pub struct KnownGroups {
    groups: LruCache<GroupKey, Copy>,
    /// Counts what was seen; see [`KnownGroups::mark`].
    seen: u64,
    /// Copies that were forgotten to make room.
    crowded_out: u64,
}

#[derive(Debug)]
struct Copy {
    group: AlertGroup,
    seen: u64,
    /// The store has no more than this.
    forget_at: Instant,
}

/// Which groups to list. The default is all of them.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only groups in this state.
    pub state: Option<GroupState>,
    /// Only groups of at least so many alerts.
    pub min_alerts: usize,
    /// Only groups that were updated within this time.
    pub max_age: Option<Duration>,
    /// Groups to leave out at the beginning.
    pub offset: usize,
    /// No more groups than this.
    pub limit: Option<usize>,
}

/// The known groups, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownStats {
    pub groups: usize,
    pub firing_groups: usize,
    pub resolved_groups: usize,
    pub mixed_groups: usize,
    pub silenced_groups: usize,
    pub firing_alerts: usize,
    pub resolved_alerts: usize,
    /// Copies that were forgotten because there were too many.
    pub crowded_out: u64,
}

// === impl KnownGroups ===

impl KnownGroups {
    /// Keeps at most `max_groups`, and at least one.
    pub fn new(max_groups: usize) -> Self {
        let max_groups = NonZeroUsize::new(max_groups).unwrap_or(NonZeroUsize::MIN);
        Self {
            groups: LruCache::new(max_groups),
            seen: 0,
            crowded_out: 0,
        }
    }

    /// Takes in what the store has said of a group. It is forgotten when it
    /// expires: `expires_at` if the store said when; else when the copy before
    /// would have been, or at `or_else`.
    pub fn saw(&mut self, group: AlertGroup, expires_at: Option<Instant>, or_else: Instant) {
        self.seen += 1;
        let key = group.key.clone();
        let before = self.groups.peek(&key);
        if before.is_some_and(|before| before.group.metadata.version > group.metadata.version) {
            // An answer that was overtaken. Versions only rise, in one store and
            // from one to the next.
            return;
        }
        let forget_at = expires_at
            .or_else(|| before.map(|before| before.forget_at))
            .unwrap_or(or_else);
        let copy = Copy {
            group,
            seen: self.seen,
            forget_at,
        };
        let out = self.groups.push(key.clone(), copy);
        self.crowded_out += u64::from(out.is_some_and(|(out, _)| out != key));
    }

    /// The copy of a group.
    pub fn get(&mut self, key: &GroupKey) -> Option<AlertGroup> {
        let copy = self.groups.get(key)?;
        if copy.forget_at <= Instant::now() {
            self.groups.pop(key);
            return None;
        }
        Some(copy.group.clone())
    }

    pub fn forget(&mut self, key: &GroupKey) {
        self.groups.pop(key);
    }

    /// A moment, for [`KnownGroups::forget_unseen`].
    pub fn mark(&self) -> u64 {
        self.seen
    }

    /// Forgets the groups of which nothing was seen since `mark`. Says how many.
    pub fn forget_unseen(&mut self, mark: u64) -> usize {
        let unseen = self.groups.iter().filter(|(_, copy)| copy.seen <= mark);
        let unseen: Vec<_> = unseen.map(|(key, _)| key.clone()).collect();
        for key in &unseen {
            self.groups.pop(key);
        }
        unseen.len()
    }

    /// Copies of the groups that pass a filter, sorted by key.
    pub fn list(&self, filter: &Filter, now: Time) -> Vec<AlertGroup> {
        let mut groups: Vec<_> = self
            .alive()
            .filter(|group| filter.passes(group, now))
            .collect();
        groups.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        let limit = filter.limit.unwrap_or(usize::MAX);
        let page = groups.into_iter().skip(filter.offset).take(limit);
        page.cloned().collect()
    }

    /// The groups that hold an alert.
    pub fn keys_of(&self, fingerprint: &str) -> Vec<GroupKey> {
        self.alive()
            .filter(|group| group.alerts.contains_key(fingerprint))
            .map(|group| group.key.clone())
            .collect()
    }

    /// The groups that nobody has updated since.
    pub fn keys_not_updated_since(&self, moment: Time) -> Vec<GroupKey> {
        self.alive()
            .filter(|group| group.metadata.updated_at < Some(moment))
            .map(|group| group.key.clone())
            .collect()
    }

    pub fn stats(&self) -> KnownStats {
        let mut stats = KnownStats {
            crowded_out: self.crowded_out,
            ..KnownStats::default()
        };
        for group in self.alive() {
            stats.groups += 1;
            *match group.metadata.state {
                GroupState::Firing => &mut stats.firing_groups,
                GroupState::Resolved => &mut stats.resolved_groups,
                GroupState::Mixed => &mut stats.mixed_groups,
                GroupState::Silenced => &mut stats.silenced_groups,
            } += 1;
            let counts = group.counts();
            stats.firing_alerts += counts.firing;
            stats.resolved_alerts += counts.resolved;
        }
        stats
    }

    fn alive(&self) -> impl Iterator<Item = &AlertGroup> {
        let now = Instant::now();
        let alive = self.groups.iter();
        let alive = alive.filter(move |(_, copy)| copy.forget_at > now);
        alive.map(|(_, copy)| &copy.group)
    }
}

// === impl Filter ===

impl Filter {
    fn passes(&self, group: &AlertGroup, now: Time) -> bool {
        let age = |max_age: Duration| {
            let updated = group.metadata.updated_at.map_or(i64::MIN, Time::millis);
            let age = now.millis().saturating_sub(updated);
            u128::try_from(age).unwrap_or(0) <= max_age.as_millis()
        };
        self.state.is_none_or(|state| group.metadata.state == state)
            && group.alerts.len() >= self.min_alerts
            && self.max_age.is_none_or(age)
    }
}
