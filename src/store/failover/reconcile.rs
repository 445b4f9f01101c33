//! Carrying over to Redis what was changed in memory while it was down, and telling
//! it again what was written and deleted in it before it lost data.
//!
//! What to do with one key is a pure function of what both sides hold,
//! [`next_step`]; the [`Carrier`] does it, one task a key at a time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};

use crate::{
    domain::{
        document::{Document, DocumentHead},
        group::{AlertGroup, GroupKey},
        version::{InstanceId, Version},
    },
    store::{
        Deadline, Expiry, StoreError, Written,
        documents::{Condition, Write, WriteOutcome},
        memory::{Changed, MemoryStore, Ours, Pending, Shown, Ticket},
        redis::{Cause, LostDocument, NotDone, Offered, RedisStore, Trail},
    },
    telemetry::{self, rate_limited},
};

/// What Redis holds at a key that was changed here.
#[derive(Clone, Debug, PartialEq)]
pub enum Theirs {
    Absent,
    /// A document that is no group.
    Unreadable,
    Group(Box<AlertGroup>),
}

/// What to do next with a key that was changed here.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Redis holds what it should.
    Nothing,
    /// Our group, since nobody else has changed it.
    Carry(Condition),
    /// Both groups in one, in place of this version.
    Merge {
        group: Box<AlertGroup>,
        /// Fingerprints of reports that lost against another one.
        dropped: Vec<String>,
        replaces: Version,
    },
    /// Our delete, of this version.
    Delete(Version),
}

/// Carries keys over, each by one task at a time.
pub struct Carrier {
    redis: RedisStore,
    memory: MemoryStore,
    instance: InstanceId,
    running: Mutex<HashMap<GroupKey, Carrying>>,
}

type Carrying = Shared<BoxFuture<'static, Result<(), NotDone>>>;

/// The next step for a key. `ours`: our group, None if it was deleted here. `is_ancestor`:
/// what is stored was there before what was changed here, since Redis has gone back.
pub fn next_step(
    ours: Option<&AlertGroup>,
    changed: &Changed,
    theirs: &Theirs,
    is_ancestor: bool,
) -> Step {
    let theirs = match theirs {
        Theirs::Group(theirs) => theirs,
        // Nothing to merge with; a Store would have replaced it as well.
        Theirs::Unreadable if ours.is_some() => return Step::Carry(Condition::Any),
        Theirs::Absent if ours.is_some() => return Step::Carry(Condition::Absent),
        Theirs::Unreadable | Theirs::Absent => return Step::Nothing,
    };
    let Some(stored) = theirs.metadata.version else {
        return Step::Nothing;
    };
    let write_id = &theirs.metadata.write_id;
    let is_base = is_ancestor || changed.base.is_some_and(|(base, _)| base == stored);
    let is_ours = changed.maybe_in_redis.iter().any(|id| id == write_id);
    let Some(ours) = ours else {
        // A delete concerns the version that was there when it was made.
        return if is_base || is_ours {
            Step::Delete(stored)
        } else {
            Step::Nothing
        };
    };
    let has_arrived = !write_id.is_empty() && *write_id == ours.metadata.write_id;
    if has_arrived && ours.metadata.version <= Some(stored) {
        return Step::Nothing;
    }
    // What has arrived under a lesser version than the one that the writer was
    // told is written once more.
    if is_base || is_ours || has_arrived {
        return Step::Carry(Condition::Version(stored));
    }
    let merged = ours.clone().merge(AlertGroup::clone(theirs));
    if merged.group.alerts == theirs.alerts && same_metadata(&merged.group, theirs) {
        return Step::Nothing;
    }
    Step::Merge {
        group: Box::new(merged.group),
        dropped: merged.dropped,
        replaces: stored,
    }
}

/// A version so little after another one that no clock has moved. Its low bits are neither
/// those of Redis (0) nor those of a memory (8 to 15), so it is nobody else's.
fn just_after(version: Version) -> Version {
    const STEP: i64 = 16;
    let steps = version.get() / STEP + rand::random_range(1..64);
    Version::new(steps * STEP + rand::random_range(1..8)).unwrap_or(version)
}

/// Whether two groups say the same besides version and write id.
fn same_metadata(a: &AlertGroup, b: &AlertGroup) -> bool {
    let mut b = b.metadata.clone();
    b.version = a.metadata.version;
    b.write_id.clone_from(&a.metadata.write_id);
    a.metadata == b
}

// === impl Carrier ===

impl Carrier {
    /// Steps for one key at most: each further one means that another writer
    /// came in between.
    const MOST_STEPS: usize = 10;

    pub fn new(redis: RedisStore, memory: MemoryStore, instance: &InstanceId) -> Self {
        Self {
            redis: redis.for_repair(),
            memory,
            instance: instance.clone(),
            running: Mutex::default(),
        }
    }

    /// Tells Redis of a key, if it has to be told. Everybody who asks for one
    /// key waits for the same task, which goes on when nobody waits any more.
    pub async fn carry(self: &Arc<Self>, key: &GroupKey) -> Result<(), NotDone> {
        let task = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running
                .entry(key.clone())
                .or_insert_with(|| self.start(key.clone()))
                .clone()
        };
        task.await
    }

    fn start(self: &Arc<Self>, key: GroupKey) -> Carrying {
        let running = Running {
            carrier: self.clone(),
            key,
        };
        let task = tokio::spawn(async move { running.carrier.tell(&running.key).await });
        task.map(|ended| {
            ended.unwrap_or_else(|error| {
                Err(StoreError::Bug(format!("carrying a group over: {error}")).into())
            })
        })
        .boxed()
        .shared()
    }

    async fn tell(&self, key: &GroupKey) -> Result<(), NotDone> {
        for _ in 0..Self::MOST_STEPS {
            let told = match self.memory.pending(key) {
                None => return Ok(()),
                Some(Pending::Unsure {
                    document: Some(document),
                    version,
                    left,
                    ours,
                    around,
                }) => {
                    let lost = Lost {
                        document: &document,
                        version,
                        left,
                        ours,
                        last_heard: around.last_heard,
                    };
                    self.put_back(&lost).await
                }
                Some(Pending::Unsure {
                    document: None,
                    version,
                    around,
                    ..
                }) => self.delete_again(key, version, around.found_at).await,
                Some(Pending::Changed {
                    document,
                    version,
                    left,
                    changed,
                }) => {
                    let ours = ChangedKey {
                        key,
                        document,
                        version,
                        left,
                        changed,
                    };
                    self.step(&ours).await
                }
            };
            match told {
                Ok(()) => {}
                // What happened shows in the next step.
                Err(NotDone {
                    error: StoreError::OutcomeUnknown,
                    cause: Cause::Answered,
                }) => {}
                Err(failed) if failed.cause == Cause::Answered && is_refusal(&failed.error) => {
                    self.drop_change(key, &failed.error);
                }
                Err(failed) => return Err(failed),
            }
        }
        Err(StoreError::Unavailable(
            "a group that was written while Redis was down could not be carried over yet: \
             others keep changing it"
                .into(),
        )
        .into())
    }

    /// Puts back what Redis may have lost.
    async fn put_back(&self, lost: &Lost<'_>) -> Result<(), NotDone> {
        let key = &lost.document.key;
        let ticket = self.memory.ticket();
        if self.restore(lost, None, ticket).await? {
            return Ok(());
        }
        let known_bytes = lost.document.json.len();
        let found = self
            .redis
            .read_document(key, true, known_bytes, Deadline::NONE)
            .await;
        if let Err(NotDone {
            error: StoreError::StoredValueTooLarge { .. },
            ..
        }) = found
        {
            // It was not read: what is there stays.
            self.memory.offered(key, lost.version, false, ticket);
            return Ok(());
        }
        let Some(found) = found? else {
            // Somebody has just deleted it, and will do so again; or it was told to a server
            // that was just leaving.
            return Ok(());
        };
        let theirs = found.document.parse().ok();
        let stored = theirs.as_ref().and_then(|theirs| theirs.metadata.version);
        let is_ours = found.document.was_written_by_one_of(&self.instance);
        let comes_of_it = |stored: &Version| lost.is_before(*stored, is_ours);
        let (Some(theirs), Some(stored)) = (theirs, stored.filter(|it| !comes_of_it(it))) else {
            self.memory.offered(key, lost.version, false, ticket);
            self.memory.learn(key, Shown::by_read(Some(&found)), ticket);
            return Ok(());
        };
        if lost.comes_of(stored, is_ours) {
            return self.restore(lost, Some(stored), ticket).await.map(|_| ());
        }
        // Two histories: an acknowledged write is in each of them.
        let ours = lost.document.parse().map_err(StoreError::Unreadable)?;
        let merged = ours.merge(theirs.clone());
        if merged.group.alerts == theirs.alerts && same_metadata(&merged.group, &theirs) {
            self.memory.offered(key, lost.version, false, ticket);
            self.memory.learn(key, Shown::by_read(Some(&found)), ticket);
            return Ok(());
        }
        // It says nothing that was not there before the loss, and must not look newer: who
        // has deleted the group since then would not know it again.
        let version = just_after(lost.version.max(stored));
        let document =
            DocumentHead::new(&merged.group).finish(&self.instance.next_write_id(), version);
        // Whoever wrote last decided how long it lives.
        let left = if stored > lost.version {
            found.expires.map(|expires| expires.left)
        } else {
            lost.left
        };
        let merged_document = LostDocument {
            document: &document,
            left,
        };
        let restored = self
            .redis
            .restore_document(&merged_document, Some(stored), Deadline::NONE)
            .await?;
        if matches!(restored, Offered::PutBack) {
            self.memory.offered(key, lost.version, false, ticket);
            let shown = Shown::Document {
                json: document.json,
                version,
                left,
                ours: Some(Ours::new(Some(stored))),
            };
            self.memory.learn(&lost.document.key, shown, ticket);
            telemetry::groups_put_back(1);
            if !merged.dropped.is_empty() {
                telemetry::reports_dropped(key, &merged.dropped);
            }
        }
        Ok(())
    }

    /// Puts back a lost document in place of one version, or of nothing. False if
    /// something else is stored.
    async fn restore(
        &self,
        lost: &Lost<'_>,
        replaces: Option<Version>,
        ticket: Ticket,
    ) -> Result<bool, NotDone> {
        let document = LostDocument {
            document: lost.document,
            left: lost.left,
        };
        let restored = self
            .redis
            .restore_document(&document, replaces, Deadline::NONE)
            .await?;
        let is_there = match restored {
            Offered::PutBack => {
                telemetry::groups_put_back(1);
                true
            }
            Offered::Kept(stored) => stored == Some(lost.version),
        };
        if is_there {
            self.memory
                .offered(&lost.document.key, lost.version, true, ticket);
        }
        Ok(is_there)
    }

    /// Deletes what Redis may have brought back: this version, or one that was there
    /// before. `found_at`: see [`Loss::found_at`](crate::store::memory::Loss).
    async fn delete_again(
        &self,
        key: &GroupKey,
        version: Version,
        found_at: Option<Version>,
    ) -> Result<(), NotDone> {
        let ticket = self.memory.ticket();
        let found = self
            .redis
            .read_document(key, false, 0, Deadline::NONE)
            .await?;
        let Some(found) = found else {
            self.memory.offered(key, version, true, ticket);
            return Ok(());
        };
        let group = found.document.parse().ok();
        let stored = group.as_ref().and_then(|group| group.metadata.version);
        // The versions of other writers do not rise when a group is made anew, and those
        // of ours only as the clock of Redis does.
        let is_older = stored < Some(version) && (found_at.is_none() || stored < found_at);
        let is_before = stored == Some(version) || is_older;
        if !is_before || !found.document.has_write_id() {
            self.memory.offered(key, version, false, ticket);
            return Ok(());
        }
        let trail = Trail::default();
        let deleted = self
            .redis
            .remove_document(key, stored, Deadline::NONE, &trail)
            .await;
        if deleted.is_err() {
            trail.end().await;
        }
        if deleted?.deleted {
            self.memory.offered(key, version, true, ticket);
            telemetry::groups_deleted_again(1);
        }
        Ok(())
    }

    /// Looks at what Redis holds and does the next step.
    async fn step(&self, ours: &ChangedKey<'_>) -> Result<(), NotDone> {
        let known_bytes = ours.document.as_ref().map_or(0, |ours| ours.json.len());
        let found = self
            .redis
            .read_document(ours.key, true, known_bytes, Deadline::NONE)
            .await;
        let group = match ours.document.as_ref().map(Document::parse) {
            Some(Ok(group)) => Some(group),
            None => None,
            Some(Err(unreadable)) => return Err(StoreError::Unreadable(unreadable).into()),
        };
        let (found, too_large) = match found {
            Err(NotDone {
                error: StoreError::StoredValueTooLarge { .. },
                ..
            }) => (None, true),
            found => (found?, false),
        };
        let theirs = match found.as_ref().map(|found| found.document.parse()) {
            None if too_large => Theirs::Unreadable,
            None => Theirs::Absent,
            Some(Ok(group)) => Theirs::Group(Box::new(group)),
            Some(Err(_)) => Theirs::Unreadable,
        };
        // This instance knew its own writes when it made the change.
        let is_ancestor = match (&found, &theirs) {
            (Some(found), Theirs::Group(theirs)) => {
                theirs.metadata.version < Some(ours.version)
                    && found.document.was_written_by_one_of(&self.instance)
            }
            _ => false,
        };
        match next_step(group.as_ref(), &ours.changed, &theirs, is_ancestor) {
            Step::Nothing => {
                self.carried(ours, Shown::by_read(found.as_ref()));
                Ok(())
            }
            Step::Delete(version) => self.delete(ours, version).await,
            Step::Carry(condition) => {
                let Some(group) = group else {
                    return Err(
                        StoreError::Bug("a delete cannot be carried as a group".into()).into(),
                    );
                };
                let write_id = self.instance.next_write_id();
                // Whatever becomes of this attempt, it is recognised as ours.
                let change = ours.changed.change;
                if !self.memory.carrying(ours.key, change, &write_id) {
                    return Ok(());
                }
                let expiry = Expiry::After(ours.left);
                let written = self.write(ours, &group, condition, expiry, write_id);
                if written.await? {
                    telemetry::degraded_writes_carried(1);
                }
                Ok(())
            }
            Step::Merge {
                group,
                dropped,
                replaces,
            } => {
                let expiry = match found.and_then(|found| found.expires) {
                    Some(expires) => Expiry::After(expires.left.max(ours.left)),
                    None => Expiry::Keep {
                        otherwise: ours.left,
                    },
                };
                let condition = Condition::Version(replaces);
                // Not recognised as ours, since it holds theirs as well: it would
                // be replaced by what is ours alone. Merged again, nothing of it
                // changes.
                let write_id = self.instance.next_write_id();
                let written = self.write(ours, &group, condition, expiry, write_id);
                if written.await? {
                    telemetry::degraded_writes_merged(1);
                    if !dropped.is_empty() {
                        telemetry::reports_dropped(ours.key, &dropped);
                    }
                }
                Ok(())
            }
        }
    }

    /// Writes a group for `ours`. False if somebody else came in between.
    async fn write(
        &self,
        ours: &ChangedKey<'_>,
        group: &AlertGroup,
        condition: Condition,
        expiry: Expiry,
        write_id: String,
    ) -> Result<bool, NotDone> {
        let write = Write {
            head: DocumentHead::new(group),
            condition,
            expiry,
            write_id,
            newer_than: Some(ours.version),
        };
        let written = self.write_once(&write).await?;
        if let Some(written) = &written {
            self.carried(ours, Shown::by_write(&write, written));
        }
        Ok(written.is_some())
    }

    /// None if the condition of a write does not hold.
    async fn write_once(&self, write: &Write) -> Result<Option<Written>, NotDone> {
        let trail = Trail::default();
        let outcome = self
            .redis
            .write_document(write, Deadline::NONE, &trail)
            .await;
        if outcome.is_err() {
            // Memory may take changes of this group again.
            trail.end().await;
        }
        Ok(match outcome? {
            WriteOutcome::Written(written) => Some(written),
            WriteOutcome::Conflict { .. } => None,
        })
    }

    async fn delete(&self, ours: &ChangedKey<'_>, version: Version) -> Result<(), NotDone> {
        let trail = Trail::default();
        let deleted = self
            .redis
            .remove_document(ours.key, Some(version), Deadline::NONE, &trail)
            .await;
        if deleted.is_err() {
            trail.end().await;
        }
        if deleted?.deleted {
            self.carried(ours, Shown::deleted(version));
            telemetry::degraded_writes_carried(1);
        }
        Ok(())
    }

    fn carried(&self, ours: &ChangedKey<'_>, shown: Shown) {
        self.memory.carried(ours.key, ours.changed.change, shown);
    }

    /// Gives up a change that Redis does not take, and would never take.
    fn drop_change(&self, key: &GroupKey, error: &StoreError) {
        let ticket = self.memory.ticket();
        match self.memory.pending(key) {
            Some(Pending::Changed { changed, .. }) => {
                self.memory.carried(key, changed.change, Shown::Absent);
                telemetry::degraded_writes_discarded(1);
                rate_limited!(
                    warn,
                    key = key.as_str(),
                    %error,
                    "a group that was written while Redis was down cannot be carried over and is dropped"
                );
            }
            Some(Pending::Unsure { version, .. }) => {
                self.memory.offered(key, version, false, ticket)
            }
            None => {}
        }
    }
}

/// A task that carries a key over. It is over when this is dropped, be it by a
/// panic.
struct Running {
    carrier: Arc<Carrier>,
    key: GroupKey,
}

/// A key that was changed here.
struct ChangedKey<'a> {
    key: &'a GroupKey,
    /// None: it was deleted.
    document: Option<Document>,
    version: Version,
    /// What is left of its time to live.
    left: Duration,
    changed: Changed,
}

/// A group that this instance has written, and that Redis may have lost.
struct Lost<'a> {
    document: &'a Document,
    version: Version,
    /// What is left of its time to live; None: it never expires.
    left: Option<Duration>,
    ours: Ours,
    /// See [`Loss::last_heard`](crate::store::memory::Loss).
    last_heard: Option<Version>,
}

impl Lost<'_> {
    /// Whether what is stored comes of it: what has survived, and what this instance has
    /// written since. Others may have written since without knowing of it.
    fn is_before(&self, stored: Version, is_ours: bool) -> bool {
        stored == self.version
            || stored > self.version && (is_ours || Some(stored) <= self.last_heard)
    }

    /// Whether it comes of what is stored.
    fn comes_of(&self, stored: Version, is_ours: bool) -> bool {
        stored < self.version && (is_ours || self.ours.replaced == Some(stored))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let running = &self.carrier.running;
        let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
        running.remove(&self.key);
    }
}

/// Whether Redis would refuse the same again.
fn is_refusal(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::ForeignType | StoreError::VersionOutOfRange(_) | StoreError::Unreadable(_)
    )
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tokio::time::Instant;

    use super::*;
    use crate::domain::group::{Alert, GroupMetadata};

    fn version(version: i64) -> Version {
        Version::new(version).unwrap()
    }

    fn group(fingerprints: &[&str], write_id: &str, stored: i64) -> AlertGroup {
        let alert = |fingerprint: &&str| {
            let alert = Alert {
                fingerprint: fingerprint.to_string(),
                ..Alert::default()
            };
            (fingerprint.to_string(), alert)
        };
        AlertGroup {
            key: GroupKey::new("k").unwrap(),
            alerts: fingerprints.iter().map(alert).collect::<BTreeMap<_, _>>(),
            metadata: GroupMetadata {
                firing_count: fingerprints.len() as i32,
                write_id: write_id.into(),
                version: Version::new(stored),
                ..GroupMetadata::default()
            },
        }
    }

    fn theirs(fingerprints: &[&str], write_id: &str, stored: i64) -> Theirs {
        Theirs::Group(Box::new(group(fingerprints, write_id, stored)))
    }

    /// A change of version 16, whose writes "lost-1" and "lost-2" may be in Redis.
    fn changed() -> Changed {
        Changed {
            base: Some((version(16), Instant::now())),
            maybe_in_redis: vec!["lost-1".into(), "lost-2".into()],
            change: 1,
            before: None,
        }
    }

    #[test]
    fn what_nobody_else_has_changed_is_carried() {
        let ours = group(&["a"], "ours", 24);
        for (theirs, condition) in [
            (theirs(&["x"], "base", 16), Condition::Version(version(16))),
            (
                theirs(&["x"], "lost-2", 32),
                Condition::Version(version(32)),
            ),
            (Theirs::Absent, Condition::Absent),
            (Theirs::Unreadable, Condition::Any),
        ] {
            let step = next_step(Some(&ours), &changed(), &theirs, false);
            assert_eq!(step, Step::Carry(condition));
        }
    }

    #[test]
    fn what_was_lost_comes_before_what_has_survived_and_after_what_it_replaced() {
        let document = Document {
            key: GroupKey::new("k").unwrap(),
            json: Default::default(),
        };
        let lost = Lost {
            document: &document,
            version: version(64),
            left: None,
            ours: Ours::new(Some(version(48))),
            last_heard: Some(version(100)),
        };
        let of_others = |stored| {
            let stored = version(stored);
            (lost.is_before(stored, false), lost.comes_of(stored, false))
        };
        assert_eq!(of_others(64), (true, false));
        assert_eq!(of_others(96), (true, false), "it has survived");
        assert_eq!(of_others(112), (false, false), "after the loss");
        assert_eq!(of_others(48), (false, true), "what it replaced");
        assert_eq!(of_others(32), (false, false), "of two histories");
        assert!(lost.is_before(version(112), true) && lost.comes_of(version(32), true));
        let unknown = Lost {
            last_heard: None,
            ..lost
        };
        assert!(!unknown.is_before(version(96), false));
    }

    #[test]
    fn a_merge_that_is_put_back_is_hardly_newer_than_what_it_merges() {
        for before in [1, 64, 1_795_869_119_194_496] {
            let after = just_after(version(before)).get();
            assert!((1..=16 * 65).contains(&(after - before)), "{after}");
            assert!((1..8).contains(&(after % 16)), "{after}");
        }
    }

    /// Redis has gone back: what is stored was known when the change was made.
    #[test]
    fn what_was_there_before_is_replaced_and_a_delete_concerns_it() {
        let ours = group(&["a"], "ours", 24);
        let ancestor = theirs(&["x"], "earlier", 8);
        let step = next_step(Some(&ours), &changed(), &ancestor, true);
        assert_eq!(step, Step::Carry(Condition::Version(version(8))));
        let step = next_step(None, &changed(), &ancestor, true);
        assert_eq!(step, Step::Delete(version(8)));
        let step = next_step(None, &changed(), &ancestor, false);
        assert_eq!(step, Step::Nothing);
    }

    #[test]
    fn what_has_arrived_already_is_left_alone() {
        let ours = group(&["a"], "ours", 24);
        let arrived = theirs(&["a"], "ours", 32);
        assert_eq!(
            next_step(Some(&ours), &changed(), &arrived, false),
            Step::Nothing
        );
        // And so is a merge.
        let merged = theirs(&["a", "b"], "merged", 32);
        assert_eq!(
            next_step(Some(&ours), &changed(), &merged, false),
            Step::Nothing
        );
    }

    #[test]
    fn what_has_arrived_under_a_lesser_version_than_its_writer_was_told_is_written_again() {
        let ours = group(&["a"], "ours", 24);
        let lesser = theirs(&["a"], "ours", 16);
        assert_eq!(
            next_step(Some(&ours), &Changed::default(), &lesser, false),
            Step::Carry(Condition::Version(version(16)))
        );
    }

    #[test]
    fn what_another_has_changed_is_merged() {
        let ours = group(&["a"], "ours", 24);
        let step = next_step(
            Some(&ours),
            &changed(),
            &theirs(&["b"], "theirs", 48),
            false,
        );
        let Step::Merge {
            group, replaces, ..
        } = step
        else {
            panic!("{step:?}");
        };
        assert_eq!(group.alerts.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(replaces, version(48));
    }

    #[test]
    fn a_group_without_a_write_id_is_nobodys_but_its_writers() {
        // As the Go service writes it.
        let ours = group(&["a"], "", 24);
        let step = next_step(Some(&ours), &changed(), &theirs(&["b"], "", 48), false);
        assert!(matches!(step, Step::Merge { .. }), "{step:?}");
    }

    #[test]
    fn a_delete_concerns_only_the_version_that_was_deleted() {
        for (theirs, step) in [
            (theirs(&["x"], "base", 16), Step::Delete(version(16))),
            (theirs(&["x"], "lost-1", 32), Step::Delete(version(32))),
            (theirs(&["x"], "theirs", 32), Step::Nothing),
            (Theirs::Absent, Step::Nothing),
            (Theirs::Unreadable, Step::Nothing),
        ] {
            assert_eq!(
                next_step(None, &changed(), &theirs, false),
                step,
                "{theirs:?}"
            );
        }
    }
}
