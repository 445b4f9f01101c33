//! What a manager has done and holds, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Outcome, known::KnownStats, outbox::OutboxCounts};
use crate::domain::retention::{Left, Refused, RefusedReason};

/// What a manager has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ManagerStats {
    /// Changes that were made, those that found nothing to do included.
    pub changes: u64,
    /// Of these, the ones that found nothing to do.
    pub unchanged: u64,
    /// Changes that failed: their callers were told.
    pub failed: u64,
    /// Attempts, over all changes.
    pub attempts: u64,
    /// Attempts that the change took which took the most, failed or not.
    pub most_attempts: u64,
    /// Attempts that lost a race.
    pub conflicts: u64,
    /// Attempts that got no answer, or one that did not say what happened.
    pub retried_failures: u64,
    /// Reports that were not stored, by reason.
    pub refused: RefusedCounts,
    /// Reports whose `timestamp` was ahead of this replica's clock, and was set back.
    pub set_back: u64,
    /// Resolved alerts that have left their group, long enough after their report.
    pub left_resolved: u64,
    /// Firing alerts that have left their group, since nobody reported them any more.
    pub left_unreported: u64,
    /// Resolved alerts that have left their group early, to make room.
    pub left_crowded_out: u64,
    /// Times that an alert was stored without annotations and link, for want of room.
    pub shortened: u64,
    pub known: KnownStats,
    pub outbox: OutboxCounts,
}

/// Reports that were refused, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefusedCounts([u64; RefusedReason::ALL.len()]);

/// The counts of a manager that grow.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub changes: AtomicU64,
    pub unchanged: AtomicU64,
    pub failed: AtomicU64,
    pub attempts: AtomicU64,
    pub most_attempts: AtomicU64,
    pub conflicts: AtomicU64,
    pub retried_failures: AtomicU64,
    pub set_back: AtomicU64,
    refused: [AtomicU64; RefusedReason::ALL.len()],
    left_resolved: AtomicU64,
    left_unreported: AtomicU64,
    left_crowded_out: AtomicU64,
    shortened: AtomicU64,
}

// === impl RefusedCounts ===

impl RefusedCounts {
    /// Each reason with its count.
    pub fn iter(&self) -> impl Iterator<Item = (RefusedReason, u64)> {
        RefusedReason::ALL.into_iter().zip(self.0)
    }

    /// All reasons together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

// === impl Counters ===

impl Counters {
    pub fn attempted(&self, attempts: u32) {
        add(&self.attempts, 1);
        self.most_attempts
            .fetch_max(attempts.into(), Ordering::Relaxed);
    }

    pub fn changed(&self, outcome: Outcome, left: &Left) {
        add(&self.changes, 1);
        add(&self.unchanged, u64::from(outcome == Outcome::Unchanged));
        add(&self.left_resolved, left.resolved as u64);
        add(&self.left_unreported, left.unreported.len() as u64);
        add(&self.left_crowded_out, left.crowded_out as u64);
        add(&self.shortened, left.shortened as u64);
    }

    pub fn refused(&self, refused: &[Refused]) {
        for refused in refused {
            for (counter, reason) in self.refused.iter().zip(RefusedReason::ALL) {
                add(counter, u64::from(reason == refused.reason));
            }
        }
    }

    pub fn read(&self, known: KnownStats, outbox: OutboxCounts) -> ManagerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ManagerStats {
            changes: read(&self.changes),
            unchanged: read(&self.unchanged),
            failed: read(&self.failed),
            attempts: read(&self.attempts),
            most_attempts: read(&self.most_attempts),
            conflicts: read(&self.conflicts),
            retried_failures: read(&self.retried_failures),
            refused: RefusedCounts(self.refused.each_ref().map(read)),
            set_back: read(&self.set_back),
            left_resolved: read(&self.left_resolved),
            left_unreported: read(&self.left_unreported),
            left_crowded_out: read(&self.left_crowded_out),
            shortened: read(&self.shortened),
            known,
            outbox,
        }
    }
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
