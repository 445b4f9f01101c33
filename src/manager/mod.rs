//! The replica side: what a replica of the alert-history service does with a
//! groupstate service.
//!
//! | module | what is in it |
//! |---|---|
//! | here | [`AlertGroupManager`]: the groups, as a replica works with them |
//! | [`change`] | the changes of a group, pure |
//! | `attempt` | one attempt to make a change |
//! | [`known`] | the copies that a replica has of groups |
//! | [`outbox`] | changes that only memory has, to be made again |
//! | [`affinity`] | the instances of a service as one store, each key at its own |
//! | [`remote`] | one instance as a store: the gRPC client |
//! | [`group_keys`] | which group an alert belongs to |
//! | [`webhook`] | what Alertmanager sends, as reports for a group |
//!
//! Every change is made by compare-and-swap: load, apply, swap, and after a lost
//! race apply again to what the winner has stored. Two replicas that add two
//! alerts to one group at the same moment end with one group of two alerts.

pub mod affinity;
mod attempt;
pub mod change;
pub mod group_keys;
mod hash;
pub mod known;
pub mod outbox;
pub mod remote;
pub mod webhook;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use thiserror::Error;
use tokio::time::Instant;

use self::{
    attempt::{Attempt, Done, attempt, is_worth_another},
    change::Change,
    known::{Filter, KnownGroups, KnownStats, Mark},
    outbox::{Outbox, OutboxCounts},
};
use crate::{
    group::{Alert, AlertGroup, GroupKey, Time},
    store::{Backend, Deadline, ErrorKind, Failure, GroupStore, Problem, StoreError},
};

/// The alert groups of a replica, over any store. Cheap to clone.
#[derive(Clone)]
pub struct AlertGroupManager(Arc<Shared>);

struct Shared {
    store: Arc<dyn GroupStore>,
    settings: ManagerSettings,
    known: Mutex<KnownGroups>,
    outbox: Mutex<Outbox>,
    counts: Counters,
}

/// How a manager goes about its work.
#[derive(Clone, Debug)]
pub struct ManagerSettings {
    /// How long a group lives after its last change that left an alert firing.
    /// A change that leaves none firing keeps what is left. Default 24 h.
    pub group_ttl: Duration,
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
    /// Reports and other changes that the outbox holds. Default 50,000.
    pub max_outbox_reports: usize,
}

/// The longest pause between two attempts.
pub const LONGEST_BACKOFF: Duration = Duration::from_millis(500);

/// How often [`AlertGroupManager::deliver_forever`] looks after the outbox.
pub const DELIVERY_INTERVAL: Duration = Duration::from_secs(1);

/// A pass over the outbox ends after so many groups whose changes memory has
/// had before: while Redis is down it goes round at this pace, and not over
/// thousands of groups each second.
const MAX_IDLE_DELIVERIES: usize = 100;

/// What a change has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    pub outcome: Outcome,
    /// The group after it; None when it is absent.
    pub group: Option<AlertGroup>,
    /// Who has it.
    pub backend: Backend,
    /// How many attempts it took.
    pub attempts: u32,
    /// Whether the change would survive the instance that answered: Redis has
    /// it, or the outbox does. False when the outbox is full.
    pub safe: bool,
}

/// How a change ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A group was created or replaced.
    Stored,
    /// The group was deleted: its last alert is gone, or it has expired.
    Deleted,
    /// There was nothing to do.
    Unchanged,
}

/// A group and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub group: AlertGroup,
    pub source: Source,
}

/// Where a group was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The store has it.
    Store(Backend),
    /// The store does not answer, or its memory does not know the group: this
    /// is the replica's last copy.
    Copy,
}

/// A change of the state that is not to be seen in the alerts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateChange {
    /// Silences the group, whatever its alerts do.
    Silence,
    /// Lifts the silence: the state is again what the alerts say.
    LiftSilence,
}

/// What a restore has brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Groups that were read.
    pub groups: usize,
    /// What is stored and cannot be read. It stays in the store.
    pub problems: Vec<Problem>,
    /// False when the store cannot know every group: its memory answered in
    /// place of Redis. Restore again later.
    pub complete: bool,
    /// Copies of groups that the store has no more.
    pub forgotten: usize,
}

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
    pub known: KnownStats,
    pub outbox: OutboxCounts,
}

/// Why a change was not made, or a group not read. The caller still has it in
/// hand: a receiver of webhooks answers 5xx, and is sent them again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ManagerError {
    #[error("{0}")]
    Invalid(&'static str),
    /// Another attempt would not help.
    #[error("group {key:?}: {error}")]
    Refused { key: GroupKey, error: StoreError },
    /// Too many attempts, or no time left.
    #[error("group {key:?}: given up after {attempts} attempts, of which the last {last}")]
    GivenUp {
        key: GroupKey,
        attempts: u32,
        last: String,
    },
    /// The groups could not be read.
    #[error("reading the groups: {0}")]
    Restore(StoreError),
}

#[derive(Debug, Default)]
struct Counters {
    changes: AtomicU64,
    unchanged: AtomicU64,
    failed: AtomicU64,
    attempts: AtomicU64,
    most_attempts: AtomicU64,
    conflicts: AtomicU64,
    retried_failures: AtomicU64,
}

// === impl ManagerSettings ===

impl Default for ManagerSettings {
    fn default() -> Self {
        Self {
            group_ttl: Duration::from_secs(24 * 3_600),
            max_attempts: 50,
            change_timeout: Duration::from_secs(10),
            call_timeout: Duration::from_secs(2),
            first_backoff: Duration::from_millis(2),
            max_known_groups: 100_000,
            max_outbox_reports: 50_000,
        }
    }
}

// === impl AlertGroupManager ===

impl AlertGroupManager {
    /// A manager that knows no group yet: see [`AlertGroupManager::restore`].
    pub fn new(store: Arc<dyn GroupStore>, settings: ManagerSettings) -> Self {
        Self(Arc::new(Shared {
            store,
            known: Mutex::new(KnownGroups::new(settings.max_known_groups)),
            outbox: Mutex::new(Outbox::new(settings.max_outbox_reports)),
            settings,
            counts: Counters::default(),
        }))
    }

    /// Adds reports of alerts to their group, all in one swap; creates the group
    /// if there is none, formed by the labels `group_by`. Of two reports of one
    /// alert the greater in [`Alert::report_order`] stays.
    pub async fn add_alerts(
        &self,
        key: &GroupKey,
        group_by: Vec<String>,
        reports: Vec<Alert>,
    ) -> Result<Changed, ManagerError> {
        if reports.is_empty() {
            return Err(ManagerError::Invalid("there is no alert to add"));
        }
        if reports.iter().any(|report| report.fingerprint.is_empty()) {
            return Err(ManagerError::Invalid("an alert has no fingerprint"));
        }
        let at = Time::now();
        let change = Change::Add {
            group_by,
            reports,
            at,
        };
        self.change(key, change).await
    }

    /// Removes an alert. The last one takes the group with it.
    pub async fn remove_alert(
        &self,
        key: &GroupKey,
        fingerprint: &str,
    ) -> Result<Changed, ManagerError> {
        let change = Change::Remove {
            fingerprint: fingerprint.to_owned(),
            last: None,
            at: Time::now(),
        };
        self.change(key, change).await
    }

    /// Silences a group or lifts its silence. Nothing happens to a group that is
    /// absent, or that was changed by a clock ahead of ours.
    pub async fn update_state(
        &self,
        key: &GroupKey,
        state: StateChange,
    ) -> Result<Changed, ManagerError> {
        let at = Time::now();
        let change = match state {
            StateChange::Silence => Change::Silence { at },
            StateChange::LiftSilence => Change::LiftSilence { at },
        };
        self.change(key, change).await
    }

    /// Reads a group. When the store does not answer, or its memory does not
    /// know the group, the last copy stands in; the copy is forgotten when Redis
    /// says that there is no such group.
    pub async fn get(&self, key: &GroupKey) -> Result<Option<Found>, ManagerError> {
        let store = self.store_of(key);
        let deadline = Deadline::at(Instant::now() + self.0.settings.call_timeout);
        let asked = self.known().mark();
        let failure = match store.load(key, false, deadline).await {
            Ok(answer) => {
                let backend = answer.backend;
                let group = answer.value.map(|stored| stored.group);
                self.saw(key, group.as_ref(), asked, None, backend);
                if let Some(group) = group {
                    let source = Source::Store(backend);
                    return Ok(Some(Found { group, source }));
                }
                None
            }
            Err(failure) => Some(failure),
        };
        let source = Source::Copy;
        let copy = self.known().get(key);
        match (copy, failure) {
            (Some(group), _) => Ok(Some(Found { group, source })),
            (None, None) => Ok(None),
            (None, Some(failure)) => Err(ManagerError::Refused {
                key: key.clone(),
                error: failure.error,
            }),
        }
    }

    /// The groups that this replica knows, sorted by key: those that it has
    /// changed, read or restored. [`AlertGroupManager::restore`] brings what
    /// others have done.
    pub fn list(&self, filter: &Filter) -> Vec<AlertGroup> {
        self.known().list(filter, Time::now())
    }

    /// The groups that hold an alert. Looks among those that are known, and asks
    /// the store whether they still do; restores first if none is known.
    pub async fn find_by_fingerprint(
        &self,
        fingerprint: &str,
    ) -> Result<Vec<AlertGroup>, ManagerError> {
        let mut keys = self.known().keys_of(fingerprint);
        if keys.is_empty() {
            self.restore().await?;
            keys = self.known().keys_of(fingerprint);
        }
        let mut groups = Vec::new();
        for key in keys {
            let found = self.get(&key).await?.map(|found| found.group);
            groups.extend(found.filter(|group| group.alerts.contains_key(fingerprint)));
        }
        Ok(groups)
    }

    /// Deletes the groups, of those that are known, that nobody has updated for
    /// `max_age`. Each is looked at again in the store before. Says how many
    /// were deleted.
    pub async fn clean_up_expired(&self, max_age: Duration) -> Result<usize, ManagerError> {
        let max_millis = i64::try_from(max_age.as_millis()).unwrap_or(i64::MAX);
        let before = Time::now().millis().saturating_sub(max_millis);
        // Nothing was updated before the year 1.
        let Ok(before) = Time::from_millis(before) else {
            return Ok(0);
        };
        let stale = self.known().keys_not_updated_since(before);
        let mut deleted = 0;
        for key in stale {
            let changed = self.change(&key, Change::Expire { before }).await?;
            deleted += usize::from(changed.outcome == Outcome::Deleted);
        }
        Ok(deleted)
    }

    /// Reads all groups of the store: at start, and from time to time to learn
    /// what other replicas have done. Tries again if the store changes meanwhile.
    pub async fn restore(&self) -> Result<Restored, ManagerError> {
        let mut attempt = 1;
        loop {
            let failure = match self.try_restore().await {
                Ok(restored) => return Ok(restored),
                Err(failure) => failure,
            };
            if attempt == self.0.settings.max_attempts.min(10) || !is_worth_another(&failure.error)
            {
                return Err(ManagerError::Restore(failure.error));
            }
            tokio::time::sleep(self.backoff(attempt + 4)).await;
            attempt += 1;
        }
    }

    async fn try_restore(&self) -> Result<Restored, Failure> {
        let mark = self.known().mark();
        let answer = self.0.store.load_all("", Deadline::NONE).await?;
        let backend = answer.backend;
        let mut batches = answer.value;
        let mut restored = Restored::default();
        while let Some(batch) = batches.next().await {
            let batch = batch?;
            restored.groups += batch.groups.len();
            restored.problems.extend(batch.problems);
            for group in batch.groups {
                self.saw(&group.key, Some(&group), mark, None, backend);
            }
            restored.complete |= batch.complete == Some(true);
        }
        if restored.complete && backend == Backend::Redis {
            restored.forgotten = self.known().forget_unseen(mark);
        }
        Ok(restored)
    }

    /// What this manager has done and holds.
    pub fn stats(&self) -> ManagerStats {
        let counts = &self.0.counts;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ManagerStats {
            changes: read(&counts.changes),
            unchanged: read(&counts.unchanged),
            failed: read(&counts.failed),
            attempts: read(&counts.attempts),
            most_attempts: read(&counts.most_attempts),
            conflicts: read(&counts.conflicts),
            retried_failures: read(&counts.retried_failures),
            known: self.known().stats(),
            outbox: self.outbox().counts(),
        }
    }

    /// Makes the changes of the outbox again, until Redis has them or memory
    /// says too often that it is still in charge. Says how many reports wait.
    ///
    /// A change whose instance is gone is made at another one on the way.
    pub async fn deliver(&self) -> usize {
        let mut last = None;
        let mut idle = 0;
        let groups = self.outbox().counts().groups;
        for _ in 0..groups {
            let Some((key, changes)) = self.outbox().next(last.as_ref()) else {
                break;
            };
            for change in &changes {
                match self.make(&key, change.clone()).await {
                    Ok((changed, _)) if changed.backend == Backend::Redis => {
                        self.outbox().delivered(&key, change);
                        continue;
                    }
                    Ok((changed, _)) => idle += usize::from(changed.outcome == Outcome::Unchanged),
                    Err(error) if never_fits(&error) => {
                        tracing::warn!(
                            key = key.as_str(),
                            %error,
                            "a change that was made while Redis was down can never be stored and is dropped"
                        );
                        self.outbox().dropped(&key, change);
                        continue;
                    }
                    // Somebody has to look at what is stored there.
                    Err(ManagerError::Refused { error, .. }) if concerns_the_group(&error) => {}
                    Err(_) => idle += 1,
                }
                break;
            }
            if idle >= MAX_IDLE_DELIVERIES {
                break;
            }
            last = Some(key);
        }
        self.outbox().counts().reports
    }

    /// Looks after the outbox. Never returns.
    pub async fn deliver_forever(self) {
        loop {
            tokio::time::sleep(DELIVERY_INTERVAL).await;
            self.deliver().await;
        }
    }

    /// Makes a change, and remembers it if only memory has it.
    async fn change(&self, key: &GroupKey, change: Change) -> Result<Changed, ManagerError> {
        let (mut changed, before) = self.make(key, change.clone()).await?;
        if changed.backend == Backend::Memory {
            changed.safe = self.outbox().remember(key, change.again(before.as_ref()));
        }
        Ok(changed)
    }

    /// Makes a change, however many others change the group too. Gives what was
    /// stored before as well.
    async fn make(
        &self,
        key: &GroupKey,
        change: Change,
    ) -> Result<(Changed, Option<AlertGroup>), ManagerError> {
        let settings = &self.0.settings;
        let counts = &self.0.counts;
        let give_up = Instant::now() + settings.change_timeout;
        let mut store = self.store_of(key);
        let mut seen = None;
        let mut asked = self.known().mark();
        let mut last = String::new();
        let mut attempts = 0;
        while attempts < settings.max_attempts && Instant::now() < give_up {
            if attempts > 0 {
                tokio::time::sleep(self.backoff(attempts)).await;
            }
            attempts += 1;
            counts.attempts.fetch_add(1, Ordering::Relaxed);
            counts
                .most_attempts
                .fetch_max(attempts.into(), Ordering::Relaxed);
            let deadline = give_up.min(Instant::now() + settings.call_timeout);
            if seen.is_none() {
                // What a lost race has shown was asked for before.
                asked = self.known().mark();
            }
            match attempt(&*store, settings, key, &change, seen.take(), deadline).await {
                Ok(Attempt::Done(done)) => {
                    let Done {
                        outcome,
                        before,
                        after,
                        left,
                        backend,
                    } = *done;
                    counts.changes.fetch_add(1, Ordering::Relaxed);
                    if outcome == Outcome::Unchanged {
                        counts.unchanged.fetch_add(1, Ordering::Relaxed);
                    }
                    if outcome == Outcome::Deleted {
                        self.known().forget(key);
                    } else {
                        self.saw(key, after.as_ref(), asked, left, backend);
                    }
                    let changed = Changed {
                        outcome,
                        group: after,
                        backend,
                        attempts,
                        safe: true,
                    };
                    return Ok((changed, before));
                }
                Ok(Attempt::Lost(current)) => {
                    counts.conflicts.fetch_add(1, Ordering::Relaxed);
                    last = "lost a race".into();
                    seen = Some(current);
                }
                // Maybe it happened, maybe not: the next attempt loads the group
                // and sees.
                Err(failure) if is_worth_another(&failure.error) => {
                    counts.retried_failures.fetch_add(1, Ordering::Relaxed);
                    last = format!("failed: {}", failure.error);
                    // Its instance may be gone.
                    store = self.store_of(key);
                }
                Err(failure) => {
                    counts.failed.fetch_add(1, Ordering::Relaxed);
                    return Err(ManagerError::Refused {
                        key: key.clone(),
                        error: failure.error,
                    });
                }
            }
        }
        counts.failed.fetch_add(1, Ordering::Relaxed);
        Err(ManagerError::GivenUp {
            key: key.clone(),
            attempts,
            last,
        })
    }

    /// Where a change of a group goes, all of its calls.
    fn store_of(&self, key: &GroupKey) -> Arc<dyn GroupStore> {
        let store = &self.0.store;
        store.pinned(key).unwrap_or_else(|| store.clone())
    }

    /// Takes in what the store has said of a group.
    fn saw(
        &self,
        key: &GroupKey,
        group: Option<&AlertGroup>,
        asked: Mark,
        left: Option<Duration>,
        from: Backend,
    ) {
        let now = Instant::now();
        let is_redis = from == Backend::Redis;
        match group {
            Some(group) => {
                let ttl = left.map(|left| now + left);
                let forget_at = now + self.0.settings.group_ttl;
                let group = group.clone();
                self.known().saw(group, asked, is_redis, ttl, forget_at);
            }
            // The memory of one instance does not know every group.
            None if is_redis => self.known().saw_none(key, asked),
            None => {}
        }
    }

    /// Exponential, with full jitter: replicas that met once must not meet again.
    fn backoff(&self, attempts: u32) -> Duration {
        let doubled = 1 << (attempts - 1).min(16);
        let longest = self.0.settings.first_backoff.saturating_mul(doubled);
        longest.min(LONGEST_BACKOFF).mul_f64(rand::random())
    }

    fn known(&self) -> MutexGuard<'_, KnownGroups> {
        // Copies are replaced as a whole.
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        // Nothing in there panics half way.
        self.0.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the same change would be refused whenever it is made.
fn never_fits(error: &ManagerError) -> bool {
    match error {
        ManagerError::Invalid(_) => true,
        ManagerError::Refused { error, .. } => {
            matches!(error.kind(), ErrorKind::Invalid | ErrorKind::TooLarge)
        }
        ManagerError::GivenUp { .. } | ManagerError::Restore(_) => false,
    }
}

/// Whether an error is about what is stored at one key.
fn concerns_the_group(error: &StoreError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Unreadable | ErrorKind::ForeignType | ErrorKind::VersionOutOfRange
    )
}
