//! The memory store: a bounded, expiring map of documents.
//!
//! It is the whole store when no Redis is configured. Beside Redis it is the
//! *warm mirror*: it holds what this instance has stored and loaded, so that it
//! can answer when Redis cannot. Groups lie here as the JSON documents that
//! Redis would hold, since parsed groups take several times the space.

mod entries;
mod entry;
mod lock;
mod loss;

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::{sync::Notify, time::Instant};

#[cfg(feature = "lock-times")]
pub use self::lock::times;
use self::{
    entries::{Entries, NoRoom, NotYet},
    entry::Entry,
    lock::{Guard, Litters, Lock},
};
pub use self::{
    entries::{Pending, Shown, Ticket},
    entry::{Changed, Ours},
    loss::{Around, Keys, Loss},
};
use super::{
    Backend, Deadline, Deletion, Expires, Expiry, Failure, KeyPage, Reply, StoreError, Written,
    documents::{
        Condition, DocumentBatch, DocumentStore, ReadAll, StoredDocument, Write, WriteOutcome,
    },
    failover::switch::OnRecovery,
    page_token::PageToken,
};
use crate::{
    domain::{
        document::{Document, Draft},
        group::{GroupKey, Time},
        version::{InstanceId, MemoryVersions, RedisClock, Version},
    },
    telemetry::MemoryUsage,
};

const BACKEND: Backend = Backend::Memory;

/// Keeps documents in this process. Cheap to clone: clones share the groups.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    held: Lock<Held>,
    /// Whether any entry may be pending: spares the lock where there is none.
    may_be_pending: AtomicBool,
    /// An entry is pending that was not when it was last looked for them all.
    late: Notify,
    versions: MemoryVersions,
    clock: RedisClock,
    /// Page tokens name it: a restart ends all listings.
    instance: InstanceId,
}

#[derive(Debug)]
struct Held {
    entries: Entries,
    /// Whether changes are taken: always without Redis, else while it is down.
    takes_changes: bool,
}

/// Why a change was not made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Redis answers again: the change is its.
    SwitchedBack,
    Error(StoreError),
}

// === impl MemoryStore ===

impl MemoryStore {
    /// How often expired groups give their memory back.
    pub const SWEEP_INTERVAL: Duration = Duration::from_millis(500);

    /// Bytes of documents that one batch of `read_all` holds, about.
    const BATCH_BYTES: usize = 1 << 20;
    /// Bytes of keys that one page of `list_keys` holds, about.
    const PAGE_BYTES: usize = 1 << 20;

    /// An empty store of at most `max_bytes`, documents and overhead together.
    pub fn new(max_bytes: usize, instance: InstanceId) -> Self {
        let (clock, takes_changes, drops_changes) = (RedisClock::default(), true, false);
        Self::open(max_bytes, instance, clock, takes_changes, drops_changes)
    }

    /// An empty store that takes no changes until it has to stand in for Redis. Its
    /// versions go on from `clock`.
    pub fn mirror(
        max_bytes: usize,
        instance: InstanceId,
        clock: RedisClock,
        on_recovery: OnRecovery,
    ) -> Self {
        let (takes_changes, drops_changes) = (false, on_recovery == OnRecovery::Discard);
        Self::open(max_bytes, instance, clock, takes_changes, drops_changes)
    }

    fn open(
        max_bytes: usize,
        instance: InstanceId,
        clock: RedisClock,
        takes_changes: bool,
        drops_changes: bool,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                held: Lock::new(Held {
                    entries: Entries::new(max_bytes, drops_changes, Instant::now()),
                    takes_changes,
                }),
                may_be_pending: AtomicBool::new(false),
                late: Notify::new(),
                versions: MemoryVersions::new(),
                clock,
                instance,
            }),
        }
    }

    /// Removes expired groups for as long as anyone else holds the store.
    pub async fn sweep_forever(self) {
        let shared = Arc::downgrade(&self.shared);
        drop(self);
        let mut interval = tokio::time::interval(Self::SWEEP_INTERVAL);
        loop {
            interval.tick().await;
            match shared.upgrade() {
                Some(shared) => shared.sweep().await,
                None => return,
            }
        }
    }

    /// Removes what has expired or was dropped.
    pub async fn sweep(&self) {
        self.shared.sweep().await;
    }

    /// Removes the changes that have expired, so that nothing is left to do in the
    /// moment of a discard.
    pub async fn sweep_changes(&self) {
        let sweep = |held: &mut Held| held.entries.sweep_changes(Instant::now());
        while self.shared.step(sweep) == Err(NotYet) {
            tokio::task::yield_now().await;
        }
    }

    pub fn usage(&self) -> MemoryUsage {
        let mut held = self.shared.lock();
        // What has expired does not count, unless it is too much for one step.
        let _ = held.entries.sweep(Instant::now());
        MemoryUsage {
            groups: held.entries.groups(),
            traces: held.entries.traces(),
            bytes: held.entries.bytes(),
            max_bytes: held.entries.max_bytes(),
            dirty: held.entries.dirty(),
            dirty_bytes: held.entries.dirty_bytes(),
        }
    }

    /// Writes a document if the condition holds. `maybe_in_redis`: Redis may
    /// have executed the same write.
    pub fn change(&self, write: &Write, maybe_in_redis: bool) -> Result<WriteOutcome, Refused> {
        self.shared.change(write, maybe_in_redis)
    }

    /// Removes a document: any version, or only `expected`.
    pub fn delete(&self, key: &GroupKey, expected: Option<Version>) -> Result<Deletion, Refused> {
        let now = Instant::now();
        let mut held = self.shared.lock();
        if !held.takes_changes {
            return Err(Refused::SwitchedBack);
        }
        let found = held.entries.get(key.as_str(), now);
        let version = found.map(|entry| entry.version);
        let deleted = match (version, expected) {
            (Some(found), Some(expected)) => found == expected,
            (found, _) => found.is_some(),
        };
        if deleted {
            held.entries.delete(key, now);
        }
        Ok(Deletion { deleted, version })
    }
}

/// The warm mirror: what Redis shows, and what it has to be told.
impl MemoryStore {
    /// Takes changes from now on, in place of Redis.
    pub fn stand_in(&self) {
        self.shared.lock().takes_changes = true;
        self.shared.may_be_pending.store(true, Ordering::SeqCst);
    }

    /// Takes no more changes and drops those that were made, in one moment: the
    /// number of groups that were written or deleted. What has expired does not
    /// count; see [`Self::sweep_changes`]. Redis has to be told of what it may have lost.
    pub fn step_back_and_discard(&self, losses: &[Loss]) -> usize {
        self.shared.in_steps(|held| {
            let discarded = held.entries.discard(Instant::now())?;
            held.takes_changes = false;
            held.entries.begin_epoch(losses.to_vec());
            // Redis may not have been told yet of what it had lost before.
            self.shared.may_be_pending.store(true, Ordering::SeqCst);
            Ok(discarded)
        })
    }

    /// Takes no more changes; Redis has to be told of those that were made, and of
    /// what it may have lost.
    pub fn step_back(&self, losses: Vec<Loss>) {
        let mut held = self.shared.lock();
        held.takes_changes = false;
        held.entries.begin_epoch(losses);
        self.shared.may_be_pending.store(true, Ordering::SeqCst);
    }

    /// What a write has come to in Redis, if Redis has shown that to another call.
    pub fn shown_as_written(&self, write: &Write) -> Option<Written> {
        let now = Instant::now();
        let held = self.shared.lock();
        let key = write.head.key();
        let entry = held.entries.get(key.as_str(), now)?;
        let expires = held.entries.expiry_of(entry);
        entry
            .document(key)
            .was_written_by(&write.write_id)
            .then(|| Written {
                version: entry.version,
                replaced: None,
                expires: expires.and_then(|expires| in_wall_clock_time(expires, now)),
            })
    }

    /// Redis may have lost this. Whoever's turn it is, stays.
    pub fn doubt(&self, losses: Vec<Loss>) {
        let mut held = self.shared.lock();
        held.entries.begin_epoch(losses);
        self.shared.may_be_pending.store(true, Ordering::SeqCst);
    }

    /// Of what Redis may have lost, the deletes are to be told it once more.
    pub fn doubt_deletes(&self) {
        let mut held = self.shared.lock();
        if held.entries.doubt_deletes() {
            self.shared.may_be_pending.store(true, Ordering::SeqCst);
        }
    }

    /// Waits until an answer comes that was under way when Redis lost it, so that
    /// Redis has to be told of it.
    pub async fn has_come_late(&self) {
        self.shared.late.notified().await;
    }

    /// To be drawn before a call is sent to Redis.
    pub fn ticket(&self) -> Ticket {
        self.shared.lock().entries.ticket(Instant::now())
    }

    /// Whether the epoch in which `ticket` was drawn goes on.
    pub fn is_current(&self, ticket: Ticket) -> bool {
        self.shared.lock().entries.is_current(ticket)
    }

    /// Takes in what Redis has answered to the call with this ticket. True if
    /// that is a group that was not known before.
    pub fn learn(&self, key: &GroupKey, shown: Shown, ticket: Ticket) -> bool {
        let mut shown = shown.claimed(key, &self.shared.instance);
        // Nor does anything come back that was there when the call was sent.
        if let Shown::Deleted { version, .. } = &mut shown {
            let sent = self.shared.clock.at(ticket.sent()).and_then(Version::new);
            *version = (*version).max(sent.unwrap_or(*version));
        }
        loop {
            let now = Instant::now();
            let mut held = self.shared.lock();
            match held.entries.learn(key, shown, ticket, now) {
                Ok(is_new) => {
                    if held.entries.is_pending(key, now) {
                        self.shared.may_be_pending.store(true, Ordering::SeqCst);
                        self.shared.late.notify_one();
                    }
                    return is_new;
                }
                Err(again) => {
                    shown = again;
                    held.hand_over();
                }
            }
        }
    }

    /// Whether a document of this size fits without another one leaving.
    pub fn has_room_for(&self, key: &GroupKey, bytes: usize) -> bool {
        self.shared.lock().entries.has_room_for(key, bytes)
    }

    /// The version that Redis has last shown of a key, and the size of the document.
    pub fn known(&self, key: &GroupKey) -> Option<(Version, usize)> {
        let held = self.shared.lock();
        held.entries.known(key, Instant::now())
    }

    /// Whether Redis, which shows this version or None, held a newer one when
    /// `ticket` was drawn, as far as is known here.
    pub fn contradicts(&self, key: &GroupKey, shown: Option<Version>, ticket: Ticket) -> bool {
        let held = self.shared.lock();
        held.entries.contradicts(key, shown, ticket, Instant::now())
    }

    /// Whether Redis has to be told of a key before it is asked.
    pub fn is_pending(&self, key: &GroupKey) -> bool {
        self.may_be_pending() && self.shared.lock().entries.is_pending(key, Instant::now())
    }

    /// False when there is nothing that Redis has to be told.
    pub fn may_be_pending(&self) -> bool {
        self.shared.may_be_pending.load(Ordering::SeqCst)
    }

    /// See [`Entries::left_of_lost`].
    pub fn left_of_lost(&self, key: &GroupKey) -> Option<Duration> {
        let held = self.shared.lock();
        held.entries.left_of_lost(key, Instant::now())
    }

    /// What Redis has to be told of a key.
    pub fn pending(&self, key: &GroupKey) -> Option<Pending> {
        self.shared.lock().entries.pending(key, Instant::now())
    }

    /// Some keys that Redis has to be told of, or none, beyond `after`, and where to
    /// go on unless there is nothing more to look at. After a walk from the beginning has found
    /// none, and while Redis answers, there are none.
    pub fn pending_keys(
        &self,
        after: Option<&GroupKey>,
        most: usize,
    ) -> (Vec<GroupKey>, Option<GroupKey>) {
        self.shared
            .step(|held| held.entries.pending_keys(after, most, Instant::now()))
    }

    /// A walk over all keys has found none that is pending. `ticket` was drawn
    /// before it began.
    pub fn nothing_pending(&self, ticket: Ticket) {
        let held = self.shared.lock();
        if !held.takes_changes && held.entries.is_current(ticket) {
            self.shared.may_be_pending.store(false, Ordering::SeqCst);
        }
    }

    /// A change is about to be written to Redis under this write id. False if it
    /// was changed again: then it must not be.
    pub fn carrying(&self, key: &GroupKey, change: u64, write_id: &str) -> bool {
        let mut held = self.shared.lock();
        held.entries.carrying(key, change, write_id)
    }

    /// Redis was told of a change and shows this now.
    pub fn carried(&self, key: &GroupKey, change: u64, shown: Shown) {
        let mut held = self.shared.lock();
        held.entries.carried(key, change, shown, Instant::now());
    }

    /// Redis was told of a version of a key that was written or deleted here. `holds`:
    /// it is so in Redis now; otherwise something newer is, or has to be left. `ticket` was
    /// drawn before Redis was asked: one that has lost data since has to be told again.
    pub fn offered(&self, key: &GroupKey, version: Version, holds: bool, ticket: Ticket) {
        let mut held = self.shared.lock();
        let now = Instant::now();
        held.entries.offered(key, version, holds, ticket, now);
    }
}

#[async_trait]
impl DocumentStore for MemoryStore {
    fn backend(&self) -> Backend {
        BACKEND
    }

    async fn write(&self, write: &Write, _: Deadline) -> Reply<WriteOutcome> {
        reply(self.change(write, false))
    }

    async fn read(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        _: Deadline,
    ) -> Reply<Option<StoredDocument>> {
        let now = Instant::now();
        let held = self.shared.lock();
        let found = held.entries.get(key.as_str(), now);
        Ok(BACKEND.answers(found.map(|entry| {
            StoredDocument {
                document: entry.document(key),
                expires: held
                    .entries
                    .expiry_of(entry)
                    .filter(|_| with_expiry)
                    .and_then(|expires| in_wall_clock_time(expires, now)),
            }
        })))
    }

    async fn remove(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        _: Deadline,
    ) -> Reply<Deletion> {
        reply(self.delete(key, expected))
    }

    async fn write_all(&self, writes: &[Write], _: Deadline) -> Vec<Reply<WriteOutcome>> {
        let change = |write| reply(self.change(write, false));
        writes.iter().map(change).collect()
    }

    async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        _: Deadline,
    ) -> Reply<KeyPage> {
        let after = match token {
            None => None,
            Some(token) => Some(
                PageToken::decode(token, prefix)
                    .and_then(|token| {
                        token.check_server(BACKEND, self.shared.instance.as_str())?;
                        GroupKey::new(token.cursor).map_err(|_| {
                            StoreError::InvalidPageToken("this page token has no valid cursor")
                        })
                    })
                    .map_err(|error| BACKEND.fails(error))?,
            ),
        };
        Ok(BACKEND.answers(self.shared.page(prefix, page_size, after).await))
    }

    async fn size(&self, prefix: &str, _: Deadline) -> Reply<u64> {
        let mut count = 0;
        let visit = |_: &GroupKey, _: &Entry| {
            count += 1;
            ControlFlow::Continue(())
        };
        self.shared.walk(prefix, None, visit).await;
        Ok(BACKEND.answers(count))
    }

    async fn read_all(&self, prefix: &str, _: Deadline) -> Reply<ReadAll> {
        let state = Some((self.shared.clone(), prefix.to_owned(), None));
        let batches = stream::try_unfold(state, |state| async move {
            let Some((shared, prefix, after)) = state else {
                return Ok::<_, Failure>(None);
            };
            let (documents, last) = shared.batch(&prefix, after).await;
            let batch = DocumentBatch {
                documents,
                problems: Vec::new(),
            };
            let next = last.map(|last| (shared, prefix, Some(last)));
            Ok(Some((batch, next)))
        });
        Ok(BACKEND.answers(ReadAll {
            complete: true,
            batches: batches.boxed(),
        }))
    }
}

// === impl Shown ===

impl Shown {
    /// What a read shows, with the expiry that it has looked up.
    pub fn by_read(found: Option<&StoredDocument>) -> Self {
        // What cannot be read is of no use in the mirror.
        let known = found.and_then(|found| Some((found, found.document.version()?)));
        known.map_or(Self::Absent, |(found, version)| Self::Document {
            // What was read is a small part of a large buffer, which would be
            // kept with it.
            json: Bytes::copy_from_slice(&found.document.json),
            version,
            left: found.expires.map(|expires| expires.left),
            ours: None,
        })
    }

    /// What a write shows that was done.
    pub fn by_write(write: &Write, written: &Written) -> Self {
        Self::Document {
            json: write.head.finish(&write.write_id, written.version).json,
            version: written.version,
            left: written.expires.map(|expires| expires.left),
            ours: Some(Ours::new(written.replaced)),
        }
    }

    /// The same; what `instance` has written is marked as such, whoever shows it.
    fn claimed(mut self, key: &GroupKey, instance: &InstanceId) -> Self {
        if let Self::Document { json, ours, .. } = &mut self
            && ours.is_none()
        {
            let document = Document {
                key: key.clone(),
                json: json.clone(),
            };
            *ours = document
                .was_written_by_one_of(instance)
                .then_some(Ours::new(None));
        }
        self
    }
}

// === impl Held ===

impl Litters for Held {
    type Litter = Vec<Bytes>;

    fn take_litter(&mut self) -> Vec<Bytes> {
        self.entries.take_removed()
    }
}

// === impl Shared ===

impl Shared {
    fn lock(&self) -> Guard<'_, Held> {
        self.held.lock()
    }

    /// Does something in as many steps as it takes.
    fn in_steps<T>(&self, mut step: impl FnMut(&mut Held) -> Result<T, NotYet>) -> T {
        loop {
            let mut held = self.lock();
            match step(&mut held) {
                Ok(result) => return result,
                Err(NotYet) => held.hand_over(),
            }
        }
    }

    /// Does one step of something that takes several.
    fn step<T>(&self, step: impl FnOnce(&mut Held) -> T) -> T {
        let mut held = self.lock();
        let result = step(&mut held);
        held.hand_over();
        result
    }

    /// Removes what has expired or was dropped, in steps.
    async fn sweep(&self) {
        while self.step(|held| held.entries.sweep(Instant::now())) == Err(NotYet) {
            tokio::task::yield_now().await;
        }
    }

    /// Shows groups whose key begins with `prefix` to `visit`, in order and
    /// beyond `after`, until it breaks off. It takes steps, and others change
    /// groups between them.
    async fn walk(
        &self,
        prefix: &str,
        mut after: Option<GroupKey>,
        mut visit: impl FnMut(&GroupKey, &Entry) -> ControlFlow<()>,
    ) {
        let mut breaks_off = false;
        loop {
            let visit = |key: &GroupKey, entry: &Entry| {
                let flow = visit(key, entry);
                breaks_off = flow.is_break();
                flow
            };
            let now = Instant::now();
            let next = self.step(|held| held.entries.walk(prefix, after.as_ref(), now, visit));
            if breaks_off || next.is_none() {
                return;
            }
            after = next;
            tokio::task::yield_now().await;
        }
    }

    fn change(&self, write: &Write, maybe_in_redis: bool) -> Result<WriteOutcome, Refused> {
        let key = write.head.key();
        // A large document is copied before the lock is taken.
        let draft = write.head.draft(&write.write_id);
        loop {
            let now = Instant::now();
            let mut held = self.lock();
            if !held.takes_changes {
                return Err(Refused::SwitchedBack);
            }
            let found = held.entries.get(key.as_str(), now);
            let holds = match write.condition {
                Condition::Any => true,
                Condition::Absent => found.is_none(),
                Condition::Version(version) => found.is_some_and(|entry| entry.version == version),
            };
            if !holds {
                return Ok(WriteOutcome::Conflict {
                    current: found.map(|entry| StoredDocument {
                        document: entry.document(key),
                        expires: None,
                    }),
                });
            }
            match held.entries.make_room_for(key, draft.bytes(), now) {
                Ok(()) => return self.change_now(&mut held, write, draft, maybe_in_redis, now),
                Err(NoRoom::Full) => return Err(full(&held)),
                Err(NoRoom::NotYet) => held.hand_over(),
            }
        }
    }

    /// Makes a change of which the condition holds.
    fn change_now(
        &self,
        held: &mut Held,
        write: &Write,
        draft: Draft,
        maybe_in_redis: bool,
        now: Instant,
    ) -> Result<WriteOutcome, Refused> {
        let key = write.head.key();
        let found = held.entries.get(key.as_str(), now);
        let previous = found.map(|entry| entry.version);
        let kept = found.and_then(|entry| held.entries.expiry_of(entry));
        let expires = match (write.expiry, kept) {
            (Expiry::Keep { .. }, Some(expires)) => expires,
            (Expiry::Keep { otherwise: ttl }, None) | (Expiry::After(ttl), _) => now + ttl,
        };
        let version = self
            .versions
            .next(previous.max(write.newer_than), self.micros_since_1970(now))
            .ok_or_else(|| {
                let previous = previous.map_or_else(String::new, |version| version.to_string());
                Refused::Error(StoreError::VersionOutOfRange(previous))
            })?;
        let document = (draft.finish(version), version);
        let maybe_in_redis = maybe_in_redis.then_some(write.write_id.as_str());
        held.entries
            .change(key, document, expires, maybe_in_redis, now)
            .map_err(|_| full(held))?;
        Ok(WriteOutcome::Written(Written {
            version,
            replaced: previous,
            expires: in_wall_clock_time(expires, now),
        }))
    }

    /// By the clock of Redis, if it was ever heard; a wall clock that is set must not
    /// make versions that have been there, or that are far ahead.
    fn micros_since_1970(&self, now: Instant) -> i64 {
        self.clock.at(now).unwrap_or_else(|| {
            let now = Time::now();
            now.seconds() * 1_000_000 + i64::from(now.nanos() / 1_000)
        })
    }

    async fn page(&self, prefix: &str, page_size: usize, after: Option<GroupKey>) -> KeyPage {
        let mut keys: Vec<GroupKey> = Vec::new();
        let mut bytes = 0;
        let mut more = false;
        let visit = |key: &GroupKey, _: &Entry| {
            if keys.len() >= page_size || bytes >= MemoryStore::PAGE_BYTES {
                more = true;
                return ControlFlow::Break(());
            }
            bytes += key.as_str().len();
            keys.push(key.clone());
            ControlFlow::Continue(())
        };
        self.walk(prefix, after, visit).await;
        let next = keys.last().filter(|_| more).map(|last| {
            PageToken {
                backend: BACKEND,
                server: self.instance.as_str().to_owned(),
                cursor: last.to_string(),
                prefix: prefix.to_owned(),
            }
            .encode()
        });
        KeyPage { keys, next }
    }

    /// Some documents after `after`, and the last key of them unless they are
    /// the last.
    async fn batch(
        &self,
        prefix: &str,
        after: Option<GroupKey>,
    ) -> (Vec<StoredDocument>, Option<GroupKey>) {
        let mut documents = Vec::new();
        let mut bytes = 0;
        let mut last = None;
        let visit = |key: &GroupKey, entry: &Entry| {
            bytes += entry.document_bytes();
            documents.push(StoredDocument {
                document: entry.document(key),
                expires: None,
            });
            if bytes < MemoryStore::BATCH_BYTES {
                return ControlFlow::Continue(());
            }
            last = Some(key.clone());
            ControlFlow::Break(())
        };
        self.walk(prefix, after, visit).await;
        (documents, last)
    }
}

fn full(held: &Held) -> Refused {
    Refused::Error(StoreError::MemoryFull {
        limit: held.entries.max_bytes(),
    })
}

fn reply<T>(result: Result<T, Refused>) -> Reply<T> {
    match result {
        Ok(value) => Ok(BACKEND.answers(value)),
        Err(Refused::Error(error)) => Err(BACKEND.fails(error)),
        Err(Refused::SwitchedBack) => Err(BACKEND.fails(StoreError::Unavailable(
            "memory takes no changes while Redis answers".into(),
        ))),
    }
}

/// `moment` by the wall clock; None if that is beyond the year 9999.
fn in_wall_clock_time(moment: Instant, now: Instant) -> Option<Expires> {
    let left = moment.saturating_duration_since(now);
    let millis = i64::try_from(left.as_millis()).ok()?;
    let at = Time::from_millis(Time::now().millis().checked_add(millis)?).ok()?;
    Some(Expires { at, left })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::domain::{
        document::DocumentHead,
        group::{AlertGroup, GroupMetadata},
    };

    fn store(max_bytes: usize) -> MemoryStore {
        MemoryStore::new(max_bytes, InstanceId::random())
    }

    fn head(key: &str) -> DocumentHead {
        DocumentHead::new(&AlertGroup {
            key: GroupKey::new(key).unwrap(),
            alerts: BTreeMap::new(),
            metadata: GroupMetadata::default(),
        })
    }

    fn write_of(key: &str, ttl: Duration) -> Write {
        Write {
            head: head(key),
            condition: Condition::Any,
            expiry: Expiry::After(ttl),
            write_id: "i-1".into(),
            newer_than: None,
        }
    }

    async fn write(store: &MemoryStore, key: &str, ttl: Duration) -> Reply<WriteOutcome> {
        DocumentStore::write(store, &write_of(key, ttl), Deadline::NONE).await
    }

    #[tokio::test(start_paused = true)]
    async fn expired_groups_give_their_memory_back_without_being_asked_for() {
        let store = store(1 << 20);
        tokio::spawn(store.clone().sweep_forever());
        write(&store, "a", Duration::from_secs(1)).await.unwrap();
        write(&store, "b", Duration::from_secs(5)).await.unwrap();
        assert_eq!(store.usage().groups, 2);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(store.usage().groups, 1);
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!((store.usage().groups, store.usage().bytes), (0, 0));
    }

    /// Redis has executed it, lost it, and been told all that was known by then.
    #[tokio::test]
    async fn an_answer_that_comes_after_a_loss_is_to_be_told_again() {
        let store = MemoryStore::mirror(
            1 << 20,
            InstanceId::random(),
            RedisClock::default(),
            OnRecovery::Reconcile,
        );
        let ticket = store.ticket();
        store.doubt(vec![Loss::ALL]);
        store.nothing_pending(store.ticket());
        assert!(!store.may_be_pending());
        let write = write_of("a", Duration::from_secs(9));
        let written = Written {
            version: Version::new(16).unwrap(),
            replaced: None,
            expires: None,
        };
        let key = GroupKey::new("a").unwrap();
        store.learn(&key, Shown::by_write(&write, &written), ticket);
        assert!(store.is_pending(&key));
        store.has_come_late().await;
        // One that Redis gave after it had been told is none of these.
        store.offered(&key, written.version, true, store.ticket());
        store.learn(&key, Shown::by_write(&write, &written), store.ticket());
        assert!(!store.is_pending(&key));
    }

    #[tokio::test]
    async fn what_was_to_be_told_before_an_outage_is_to_be_told_after_it() {
        for on_recovery in [OnRecovery::Discard, OnRecovery::Reconcile] {
            let (clock, instance) = (RedisClock::default(), InstanceId::random());
            let store = MemoryStore::mirror(1 << 20, instance, clock, on_recovery);
            let write = write_of("a", Duration::from_secs(9));
            let written = Written {
                version: Version::new(16).unwrap(),
                replaced: None,
                expires: None,
            };
            let key = GroupKey::new("a").unwrap();
            store.learn(&key, Shown::by_write(&write, &written), store.ticket());
            store.doubt(vec![Loss::ALL]);
            // The next outage begins before it was told.
            store.stand_in();
            match on_recovery {
                OnRecovery::Discard => _ = store.step_back_and_discard(&[]),
                OnRecovery::Reconcile => store.step_back(Vec::new()),
            }
            assert!(store.is_pending(&key), "{on_recovery:?}");
        }
    }

    /// A wall clock that is ahead must not make versions that Redis comes to only later:
    /// a group that is deleted and made anew there would get one that has been.
    #[tokio::test]
    async fn versions_go_on_from_the_clock_of_redis() {
        let clock = RedisClock::default();
        let store = MemoryStore::mirror(
            1 << 20,
            InstanceId::random(),
            clock.clone(),
            OnRecovery::Reconcile,
        );
        store.stand_in();
        let hour_ago = Time::now().seconds() * 1_000_000 - 3_600_000_000;
        clock.hear(Instant::now(), hour_ago);
        let reply = write(&store, "a", Duration::from_secs(9)).await.unwrap();
        let WriteOutcome::Written(written) = reply.value else {
            panic!("it was not written");
        };
        let ahead = written.version.get() - hour_ago;
        assert!((0..5_000_000).contains(&ahead), "{ahead} us");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_store_refuses_and_drops_nothing() {
        let store = store(1_000);
        write(&store, "a", Duration::from_secs(1)).await.unwrap();
        write(&store, "b", Duration::from_secs(9)).await.unwrap();
        let full = write(&store, "c", Duration::from_secs(9)).await;
        assert_eq!(
            full.unwrap_err().error,
            StoreError::MemoryFull { limit: 1_000 }
        );
        assert_eq!(store.usage().groups, 2);
        write(&store, "a", Duration::from_secs(1)).await.unwrap();
        // Room that an expired group holds is used before anything is refused.
        tokio::time::advance(Duration::from_secs(2)).await;
        write(&store, "c", Duration::from_secs(9)).await.unwrap();
        assert_eq!(store.usage().groups, 2);
    }

    #[tokio::test]
    async fn overwriting_and_deleting_leave_no_bytes_behind() {
        let store = store(1 << 20);
        for _ in 0..3 {
            write(&store, "a", Duration::from_secs(9)).await.unwrap();
        }
        let key = GroupKey::new("a").unwrap();
        store.remove(&key, None, Deadline::NONE).await.unwrap();
        assert_eq!((store.usage().groups, store.usage().bytes), (0, 0));
    }

    /// Many groups: more than one step looks at.
    const MANY: usize = 5_000;

    async fn store_of_many() -> MemoryStore {
        let store = store(1 << 30);
        for n in 0..MANY {
            let ttl = Duration::from_secs(9);
            write(&store, &format!("{n:05}"), ttl).await.unwrap();
        }
        store
    }

    #[tokio::test]
    async fn others_change_groups_while_many_are_counted() {
        let store = store_of_many().await;
        let mut size = std::pin::pin!(store.size("", Deadline::NONE));
        assert!(
            futures::poll!(size.as_mut()).is_pending(),
            "it must give way"
        );
        let ttl = Duration::from_secs(9);
        write(&store, "zz", ttl).await.unwrap();
        assert_eq!(size.await.unwrap().value, MANY as u64 + 1);
    }

    #[tokio::test]
    async fn others_change_groups_while_many_are_listed() {
        let store = store_of_many().await;
        let mut page = std::pin::pin!(store.list_keys("", MANY, None, Deadline::NONE));
        assert!(
            futures::poll!(page.as_mut()).is_pending(),
            "it must give way"
        );
        let page = page.await.unwrap().value;
        assert_eq!((page.keys.len(), page.next), (MANY, None));
        let mut all = store.read_all("", Deadline::NONE).await.unwrap().value;
        let mut next = all.batches.next();
        assert!(futures::poll!(&mut next).is_pending(), "it must give way");
        let mut documents = next.await.unwrap().unwrap().documents.len();
        while let Some(batch) = all.batches.next().await {
            documents += batch.unwrap().documents.len();
        }
        assert_eq!(documents, MANY);
    }

    /// What was taken in before is dropped, what comes after is refused.
    #[tokio::test]
    async fn a_discard_beside_writers_counts_every_group_that_was_taken() {
        let store = store_of_many().await;
        let writer = std::thread::spawn({
            let store = store.clone();
            move || {
                let writes = (0..).map(|n| Write {
                    head: head(&format!("w{n}")),
                    condition: Condition::Any,
                    expiry: Expiry::After(Duration::from_secs(9)),
                    write_id: "i-1".into(),
                    newer_than: None,
                });
                let taken = writes.take_while(|write| store.change(write, false).is_ok());
                taken.count()
            }
        });
        while store.usage().groups < MANY + 100 {
            tokio::task::yield_now().await;
        }
        let discarded = store.step_back_and_discard(&[]);
        assert_eq!(store.usage().groups, 0);
        assert_eq!(discarded, MANY + writer.join().unwrap());
        store.sweep().await;
        assert_eq!(store.usage().bytes, 0);
    }
}
