//! How a manager goes about its work.

use std::time::Duration;

use crate::domain::retention::Retention;

/// How a manager goes about its work.
#[derive(Clone, Debug)]
pub struct ManagerSettings {
    /// How long a group lives after its last change that left an alert firing.
    /// A change that leaves none firing keeps what is left. Default 24 h.
    pub group_ttl: Duration,
    /// How long alerts stay in a group that lives on, and how much it may hold.
    pub retention: Retention,
    /// Attempts to make a change, the first included. Default 50.
    pub max_attempts: u32,
    /// What a change gets, all attempts together. Default 10 s.
    pub change_timeout: Duration,
    /// What one call gets. Default 2 s.
    pub call_timeout: Duration,
    /// The longest pause before the second attempt; doubled with each, up to
    /// [`LONGEST_BACKOFF`]. The pause is drawn from zero to that. Default 2 ms.
    pub first_backoff: Duration,
    /// Groups of which a copy is kept; more are forgotten, the longest unused
    /// first, and loaded again when they are asked for. Default 100,000.
    pub max_known_groups: usize,
    /// How long a copy is listed and found that the store has not shown again: so long
    /// at most a group is still shown that others have deleted. Longer than
    /// [`restore`](super::AlertGroupManager::restore) takes and than it is called.
    /// Default 2 min.
    pub max_copy_age: Duration,
    /// Reports and other changes that the outbox holds. Default 50,000.
    pub max_outbox_reports: usize,
}

// === impl ManagerSettings ===

impl Default for ManagerSettings {
    fn default() -> Self {
        Self {
            group_ttl: Duration::from_secs(24 * 3_600),
            retention: Retention::default(),
            max_attempts: 50,
            change_timeout: Duration::from_secs(10),
            call_timeout: Duration::from_secs(2),
            first_backoff: Duration::from_millis(2),
            max_known_groups: 100_000,
            max_copy_age: Duration::from_secs(120),
            max_outbox_reports: 50_000,
        }
    }
}
