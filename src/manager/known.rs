//! The copies that a replica has of groups: for lists and searches, and to go on
//! with when the store does not answer. No I/O.

use lru::LruCache;
use std::{num::NonZeroUsize, time::Duration};

use tokio::time::Instant;

use crate::domain::group::{AlertGroup, GroupKey, GroupState, Time};

/// Copies of groups, the longest unused of which are forgotten when there are
/// too many.
#[derive(Debug)]
pub struct KnownGroups {
    groups: LruCache<GroupKey, Copy>,
    /// The number of the last of what was seen.
    seen: u64,
    /// How long a copy is shown that the store has not shown again.
    max_copy_age: Duration,
    /// Copies that were forgotten to make room.
    crowded_out: u64,
}

/// A moment, by the clock and by the number of what was seen until then.
#[derive(Clone, core::marker::Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    seen: u64,
    at: Instant,
}

#[derive(Debug)]
struct Copy {
    group: AlertGroup,
    seen: u64,
    /// When the store was asked that has shown it last.
    asked_at: Instant,
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
    /// Also groups that the store has not shown for
    /// [`max_copy_age`](super::ManagerSettings::max_copy_age), which may be gone by now:
    /// to look at while the service does not answer.
    pub unconfirmed: bool,
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
    /// Keeps at most `max_groups`, and at least one. Shows none that the store has not
    /// shown for `max_copy_age`.
    pub fn new(max_groups: usize, max_copy_age: Duration) -> Self {
        let max_groups = NonZeroUsize::new(max_groups).unwrap_or(NonZeroUsize::MIN);
        Self {
            groups: LruCache::new(max_groups),
            seen: 0,
            max_copy_age,
            crowded_out: 0,
        }
    }

    /// Takes in what the store has said of a group when it was asked at `asked`. It
    /// is forgotten when it expires: `expires_at` if the store said when; else when
    /// the copy before would have been, or at `or_else`.
    ///
    /// `is_last_word`: Redis said so. What it holds is what there is, also when that is
    /// older than the copy: a failover has lost the last write then. Versions rise
    /// otherwise, in one store and from one to the next.
    pub fn saw(
        &mut self,
        group: AlertGroup,
        asked: Mark,
        is_last_word: bool,
        expires_at: Option<Instant>,
        or_else: Instant,
    ) {
        let key = group.key.clone();
        let before = self.groups.peek(&key);
        let is_older = |before: &Copy| before.group.metadata.version > group.metadata.version;
        if before
            .is_some_and(|before| is_older(before) && !(is_last_word && before.seen <= asked.seen))
        {
            // An answer that was overtaken, or one of a memory that lags behind.
            return;
        }
        let forget_at = expires_at
            .or_else(|| before.map(|before| before.forget_at))
            .unwrap_or(or_else);
        self.seen += 1;
        let copy = Copy {
            group,
            seen: self.seen,
            asked_at: asked.at,
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

    /// The group was deleted.
    pub fn forget(&mut self, key: &GroupKey) {
        self.groups.pop(key);
    }

    /// The store has no such group, as it said when it was asked at `asked`. What was
    /// seen since stays. Says whether a copy was forgotten.
    pub fn saw_none(&mut self, key: &GroupKey, asked: Mark) -> bool {
        let copy = self.groups.peek(key);
        let is_gone = copy.is_some_and(|copy| copy.seen <= asked.seen);
        is_gone && self.groups.pop(key).is_some()
    }

    /// Now, by what was seen: to be drawn before the store is asked.
    pub fn mark(&self) -> Mark {
        Mark {
            seen: self.seen,
            at: Instant::now(),
        }
    }

    /// The groups of which nothing was seen since `mark`.
    pub fn unseen_since(&self, mark: Mark) -> Vec<GroupKey> {
        let unseen = self
            .groups
            .iter()
            .filter(|(_, copy)| copy.seen <= mark.seen);
        unseen.map(|(key, _)| key.clone()).collect()
    }

    /// Whether the store has shown a group lately enough for its copy to be shown.
    pub fn is_confirmed(&self, key: &GroupKey) -> bool {
        let now = Instant::now();
        let copy = self.groups.peek(key);
        copy.is_some_and(|copy| self.is_fresh(copy, now))
    }

    fn is_fresh(&self, copy: &Copy, now: Instant) -> bool {
        now.saturating_duration_since(copy.asked_at) <= self.max_copy_age
    }

    /// Copies of the groups that pass a filter, sorted by key.
    pub fn list(&self, filter: &Filter, now: Time) -> Vec<AlertGroup> {
        let mut groups: Vec<_> = self
            .alive(filter.unconfirmed)
            .filter(|group| filter.passes(group, now))
            .collect();
        groups.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        let limit = filter.limit.unwrap_or(usize::MAX);
        let page = groups.into_iter().skip(filter.offset).take(limit);
        page.cloned().collect()
    }

    /// The groups that hold an alert, or did when they were seen last.
    pub fn keys_of(&self, fingerprint: &str) -> Vec<GroupKey> {
        self.alive(true)
            .filter(|group| group.alerts.contains_key(fingerprint))
            .map(|group| group.key.clone())
            .collect()
    }

    /// The groups that nobody has updated since.
    pub fn keys_not_updated_since(&self, moment: Time) -> Vec<GroupKey> {
        self.alive(true)
            .filter(|group| group.metadata.updated_at < Some(moment))
            .map(|group| group.key.clone())
            .collect()
    }

    pub fn stats(&self) -> KnownStats {
        let mut stats = KnownStats {
            crowded_out: self.crowded_out,
            ..KnownStats::default()
        };
        for group in self.alive(false) {
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

    fn alive(&self, unconfirmed: bool) -> impl Iterator<Item = &AlertGroup> {
        let now = Instant::now();
        let alive = self.groups.iter();
        let alive = alive.filter(move |(_, copy)| {
            copy.forget_at > now && (unconfirmed || self.is_fresh(copy, now))
        });
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::domain::{group::GroupMetadata, version::Version};

    const HOUR: Duration = Duration::from_secs(3_600);

    fn group(version: i64) -> AlertGroup {
        AlertGroup {
            key: key(),
            alerts: BTreeMap::new(),
            metadata: GroupMetadata {
                version: Version::new(version),
                ..GroupMetadata::default()
            },
        }
    }

    fn key() -> GroupKey {
        GroupKey::new("k").unwrap()
    }

    const MINUTE: Duration = Duration::from_secs(60);

    fn known(version: i64) -> KnownGroups {
        let mut known = KnownGroups::new(10, MINUTE);
        let asked = known.mark();
        saw(&mut known, version, asked, true);
        known
    }

    fn saw(known: &mut KnownGroups, version: i64, asked: Mark, is_last_word: bool) {
        let or_else = Instant::now() + HOUR;
        known.saw(group(version), asked, is_last_word, None, or_else);
    }

    fn version(known: &mut KnownGroups) -> Option<i64> {
        let group = known.get(&key())?;
        group.metadata.version.map(Version::get)
    }

    #[test]
    fn what_redis_has_lost_is_not_known_any_more() {
        let mut known = known(32);
        let asked = known.mark();
        saw(&mut known, 16, asked, true);
        assert_eq!(version(&mut known), Some(16));
        assert_eq!(known.unseen_since(asked), [], "the store has it");
    }

    #[test]
    fn an_answer_that_was_overtaken_changes_nothing() {
        let mut known = known(16);
        let asked = known.mark();
        saw(&mut known, 32, asked, true);
        saw(&mut known, 16, asked, true);
        assert!(!known.saw_none(&key(), asked));
        assert_eq!(version(&mut known), Some(32));
        assert_eq!(known.unseen_since(asked), []);
        let asked = known.mark();
        assert_eq!(known.unseen_since(asked), [key()]);
        assert!(known.saw_none(&key(), asked));
        assert!(!known.saw_none(&key(), asked));
        assert_eq!(version(&mut known), None);
    }

    #[test]
    fn a_memory_that_lags_behind_does_not_replace_what_is_known() {
        let mut known = known(32);
        let asked = known.mark();
        saw(&mut known, 24, asked, false);
        assert_eq!(version(&mut known), Some(32));
        saw(&mut known, 40, asked, false);
        assert_eq!(version(&mut known), Some(40));
    }
    #[tokio::test(start_paused = true)]
    async fn what_the_store_has_not_shown_for_a_while_is_not_shown() {
        let mut known = known(16);
        let all = Filter {
            unconfirmed: true,
            ..Filter::default()
        };
        let shown = |known: &KnownGroups| {
            let of = |filter: &Filter| known.list(filter, Time::now()).len();
            (of(&Filter::default()), known.stats().groups, of(&all))
        };
        tokio::time::advance(MINUTE).await;
        assert_eq!(shown(&known), (1, 1, 1));
        assert!(known.is_confirmed(&key()));
        // It counts when the store was asked, and not when its answer came.
        let asked = known.mark();
        tokio::time::advance(MINUTE / 2).await;
        assert_eq!(shown(&known), (0, 0, 1));
        saw(&mut known, 16, asked, false);
        assert_eq!(shown(&known), (1, 1, 1));
        tokio::time::advance(MINUTE / 2 + Duration::from_millis(1)).await;
        assert_eq!(shown(&known), (0, 0, 1));
        assert!(!known.is_confirmed(&key()));
    }
}
