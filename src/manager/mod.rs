//! The replica side: what a replica of the alert-history service does with a
//! groupstate service.
//!
//! | module | what is in it |
//! |---|---|
//! | here | [`AlertGroupManager`]: the groups, as a replica works with them |
//! | [`change`] | the changes of a group, pure |
//! | `making`, `attempt` | how a change is made, and one attempt at it |
//! | [`settings`], [`stats`] | how a manager goes about its work, and what it has done |
//! | [`known`] | the copies that a replica has of groups |
//! | [`outbox`] | changes that only memory has, to be made again |
//! | [`affinity`] | the instances of a service as one store, each key at its own |
//! | [`remote`] | one instance as a store: the gRPC client |
//! | [`group_keys`] | which group an alert belongs to |
//! | [`pauses`] | whether what was received is out of date, since the process was stopped |
//! | [`webhook`] | what Alertmanager and others send, as reports for a group |
//!
//! Every change is made by compare-and-swap: load, apply, swap, and after a lost
//! race apply again to what the winner has stored. Two replicas that add two
//! alerts to one group at the same moment end with one group of two alerts.

pub mod affinity;
mod attempt;
pub mod group_keys;
mod hash;
pub mod known;
mod making;
pub mod outbox;
pub mod pauses;
pub mod remote;
pub mod settings;
pub mod stats;
pub mod webhook;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt, future, stream};
use thiserror::Error;
use tokio::time::Instant;

use self::{
    attempt::is_worth_another,
    group_keys::GroupKeys,
    known::{Filter, KnownGroups, Mark},
    outbox::Outbox,
    stats::{Counters, add},
    webhook::Webhook,
};
use crate::{
    domain::{
        change::Change,
        group::{Alert, AlertGroup, GroupKey, Time},
        retention::{Refused, RefusedReason},
    },
    store::{Backend, Deadline, Failure, GroupStore, Problem, StoreError},
};

pub use {settings::ManagerSettings, stats::ManagerStats};

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

/// The longest pause between two attempts.
pub const LONGEST_BACKOFF: Duration = Duration::from_millis(500);

/// How often [`AlertGroupManager::deliver_forever`] looks after the outbox.
pub const DELIVERY_INTERVAL: Duration = Duration::from_secs(1);

/// A pass over the outbox ends after so many groups whose changes memory has
/// had before: while Redis is down it goes round at this pace, and not over
/// thousands of groups each second.
const MAX_IDLE_DELIVERIES: usize = 100;

/// Calls of a restore at the same time, to see whether groups are gone.
const MAX_LOADS_AT_ONCE: usize = 16;

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
    /// Reports that were not stored, each with its reason. Another attempt would not
    /// help; the others are stored.
    pub refused: Vec<Refused>,
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

/// Why a change was not made, or a group not read. The caller still has it in
/// hand: a receiver of webhooks answers 5xx, and is sent them again.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ManagerError {
    #[error("{0}")]
    Invalid(&'static str),
    /// None of the reports can be stored, now or later: the receiver of a webhook
    /// answers 4xx, since a repetition would not help.
    #[error("none of {} reports can be stored, the first since: {}", .0.len(), .0.first().map_or("", |refused| &refused.message))]
    AllRefused(Vec<Refused>),
    /// Another attempt would not help, before somebody has looked after the service
    /// or what is stored there.
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

// === impl AlertGroupManager ===

impl AlertGroupManager {
    /// A manager that knows no group yet: see [`AlertGroupManager::restore`].
    pub fn new(store: Arc<dyn GroupStore>, settings: ManagerSettings) -> Self {
        Self(Arc::new(Shared {
            store,
            known: Mutex::new(KnownGroups::new(
                settings.max_known_groups,
                settings.max_copy_age,
            )),
            outbox: Mutex::new(Outbox::new(settings.max_outbox_reports)),
            settings,
            counts: Counters::default(),
        }))
    }

    /// Adds the alerts of a webhook that came at `received` to their group: see
    /// [`AlertGroupManager::add_alerts`]. None if it has no alert.
    pub async fn receive(
        &self,
        webhook: Webhook,
        keys: &GroupKeys,
        received: Time,
    ) -> Result<Option<Changed>, ManagerError> {
        let key = webhook.key(keys).map_err(ManagerError::Invalid)?;
        let group_by = webhook.group_by();
        let (reports, refused) = webhook.into_reports(received);
        if reports.is_empty() && refused.is_empty() {
            return Ok(None);
        }
        self.add(&key, group_by, reports, refused).await.map(Some)
    }

    /// Adds reports of alerts to their group, all in one swap; creates the group
    /// if there is none, formed by the labels `group_by`. Of two reports of one
    /// alert the greater in [`Alert::report_order`] stays; one without a `timestamp`,
    /// or with one ahead of this replica's clock, is received now.
    ///
    /// A report that can never be stored is refused alone, see [`Changed::refused`].
    pub async fn add_alerts(
        &self,
        key: &GroupKey,
        group_by: Vec<String>,
        reports: Vec<Alert>,
    ) -> Result<Changed, ManagerError> {
        if reports.is_empty() {
            return Err(ManagerError::Invalid("there is no alert to add"));
        }
        self.add(key, group_by, reports, Vec::new()).await
    }

    /// `refused` are reports that were refused before.
    async fn add(
        &self,
        key: &GroupKey,
        group_by: Vec<String>,
        reports: Vec<Alert>,
        mut refused: Vec<Refused>,
    ) -> Result<Changed, ManagerError> {
        let at = Time::now();
        let mut sound = Vec::with_capacity(reports.len());
        for mut report in reports {
            if let Some(fault) = fault_of(&report) {
                refused.push(Refused {
                    fingerprint: report.fingerprint,
                    reason: RefusedReason::Malformed,
                    message: fault.into(),
                });
                continue;
            }
            if report.timestamp > Some(at) {
                add(&self.0.counts.set_back, 1);
            }
            report.timestamp = Some(report.timestamp.map_or(at, |received| received.min(at)));
            sound.push(report);
        }
        self.0.counts.refused(&refused);
        if sound.is_empty() {
            return Err(ManagerError::AllRefused(refused));
        }
        let fingerprints = sound.iter().map(|report| report.fingerprint.clone());
        let fingerprints: BTreeSet<String> = fingerprints.collect();
        let malformed = refused.len();
        let change = Change::Add {
            group_by,
            reports: sound,
            at,
        };
        let changed = self.change(key, change, refused).await?;
        let refused = changed.refused[malformed..].iter();
        let refused: BTreeSet<String> = refused.map(|one| one.fingerprint.clone()).collect();
        if refused == fingerprints {
            return Err(ManagerError::AllRefused(changed.refused));
        }
        Ok(changed)
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
        self.change(key, change, Vec::new()).await
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
        self.change(key, change, Vec::new()).await
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
    /// others have done; a group that the store has not shown for
    /// [`max_copy_age`](ManagerSettings::max_copy_age) is left out.
    pub fn list(&self, filter: &Filter) -> Vec<AlertGroup> {
        self.known().list(filter, Time::now())
    }

    /// The groups that hold an alert. Looks among those that are known, and asks
    /// the store whether they still do; restores if none does, and looks again.
    pub async fn find_by_fingerprint(
        &self,
        fingerprint: &str,
    ) -> Result<Vec<AlertGroup>, ManagerError> {
        let holders = self.holders(fingerprint).await?;
        if !holders.is_empty() {
            return Ok(holders);
        }
        self.restore().await?;
        self.holders(fingerprint).await
    }

    async fn holders(&self, fingerprint: &str) -> Result<Vec<AlertGroup>, ManagerError> {
        let keys = self.known().keys_of(fingerprint);
        let mut groups = Vec::new();
        for key in keys {
            let Some(Found { group, source }) = self.get(&key).await? else {
                continue;
            };
            let is_there = source != Source::Copy || self.known().is_confirmed(&key);
            if is_there && group.alerts.contains_key(fingerprint) {
                groups.push(group);
            }
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
            let changed = self
                .change(&key, Change::Expire { before }, Vec::new())
                .await?;
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
            restored.forgotten = self.forget_what_is_gone(mark, &restored.problems).await;
        }
        Ok(restored)
    }

    /// Forgets the copies of groups that the store does not have, of those that a
    /// listing since `mark` did not show. One that was deleted and made anew meanwhile
    /// may be missing there, so each is asked for; one that cannot be read is there.
    async fn forget_what_is_gone(&self, mark: Mark, problems: &[Problem]) -> usize {
        let unreadable: BTreeSet<&str> = problems.iter().map(|one| one.key.as_str()).collect();
        let mut unseen = self.known().unseen_since(mark);
        unseen.retain(|key| !unreadable.contains(key.as_str()));
        let asked = stream::iter(unseen).map(async |key| {
            let deadline = Deadline::at(Instant::now() + self.0.settings.call_timeout);
            let asked = self.known().mark();
            let answer = self.store_of(&key).load(&key, false, deadline).await;
            match answer.map(|answer| (answer.value, answer.backend)) {
                Ok((None, Backend::Redis)) => self.known().saw_none(&key, asked),
                Ok((Some(stored), backend)) => {
                    self.saw(&key, Some(&stored.group), asked, None, backend);
                    false
                }
                Ok((None, Backend::Memory)) | Err(_) => false,
            }
        });
        let gone = asked.buffer_unordered(MAX_LOADS_AT_ONCE);
        gone.filter(|gone| future::ready(*gone)).count().await
    }

    /// What this manager has done and holds.
    pub fn stats(&self) -> ManagerStats {
        let (known, outbox) = (self.known().stats(), self.outbox().counts());
        self.0.counts.read(known, outbox)
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
            None if is_redis => {
                self.known().saw_none(key, asked);
            }
            None => {}
        }
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

/// Why a report can never be stored, if that is so.
fn fault_of(report: &Alert) -> Option<&'static str> {
    if report.fingerprint.is_empty() {
        return Some("the alert has no fingerprint");
    }
    if report.labels.contains_key("") {
        return Some("the alert has a label with an empty name");
    }
    None
}
