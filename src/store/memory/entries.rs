//! What the memory store holds: a pure map with a byte bound and a notion of
//! what Redis knows. No I/O, no clock of its own.
//!
//! An entry is either *clean*, as Redis has shown it, or *dirty*, written or
//! deleted here while Redis could not be. A clean entry may leave when room is
//! needed; a dirty one never does. A dirty entry without a document is a
//! *tombstone*: Redis may still hold what was deleted here.
//!
//! Of two answers of Redis the later one counts, whatever its version: groups are
//! deleted and made anew, by others with versions of their own. Where it cannot be
//! told which one is later, since their calls overlapped, the newer version counts.
//!
//! A recovery, or a Redis that has lost data, begins a new *epoch*. What this
//! instance itself had written or deleted before, and what a server may have lost,
//! is *unsure* from then on: Redis has to be told of it. What was merely read is
//! never told: others may have replaced or deleted it since.
//!
//! Whoever calls holds a lock that all calls wait for. So nothing here takes
//! longer with more entries: what has to look at many, or remove many, does so
//! in *steps* of a bounded number, and says whether there is more to do.

mod table;

use std::{ops::ControlFlow, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use self::table::Table;
use super::{
    entry::{Changed, Content, Entry, Ours, Standing},
    loss::{Around, Loss, Losses},
};
use crate::domain::{document::Document, group::GroupKey, version::Version};

/// The entries, and what is known of Redis.
#[derive(Debug)]
pub struct Entries {
    table: Table,
    /// The most that the entries may take, dropped ones included.
    max_bytes: usize,
    /// Stands for "never" as an expiry.
    never: Instant,
    epoch: u64,
    losses: Losses,
    /// Whether changes will be dropped, so that what was there before them is kept.
    drops_changes: bool,
    /// Number of changes made to dirty entries.
    changes: u64,
    step: Step,
}

/// The most that is done at once.
#[derive(Clone, Copy, Debug)]
struct Step {
    /// Entries that are looked at in the order of their keys.
    looks_at: usize,
    /// Entries that are removed, or passed over in the search for one to remove.
    removes: usize,
}

/// A clean entry beside an answer of Redis.
#[derive(Clone, Copy, Debug)]
struct Known {
    version: Version,
    is_group: bool,
    /// Whether the call that showed it may have been executed after that of the answer.
    overlaps: bool,
    same_epoch: bool,
    ours: Option<Ours>,
}

/// The moment at which a call was sent to Redis.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    epoch: u64,
    sent: Instant,
}

impl Ticket {
    pub fn sent(&self) -> Instant {
        self.sent
    }
}

/// What an answer of Redis shows of a key.
#[derive(Clone, Debug)]
pub enum Shown {
    Document {
        /// In a buffer of its own.
        json: Bytes,
        version: Version,
        /// None: it never expires.
        left: Option<Duration>,
        /// Whether this instance has written it.
        ours: Option<Ours>,
    },
    Absent,
    /// This version was deleted by the call, or one before it.
    Deleted {
        version: Version,
        /// How long that is remembered: Redis, or another instance, may bring it back.
        kept_for: Duration,
    },
}

/// An entry that Redis has to be told of.
#[derive(Clone, Debug)]
pub enum Pending {
    /// Changed here.
    Changed {
        /// None: deleted here.
        document: Option<Document>,
        version: Version,
        /// When the document, or the need for the tombstone, expires.
        left: Duration,
        changed: Changed,
    },
    /// Written or deleted in Redis by this instance, and maybe lost there.
    Unsure {
        /// None: deleted.
        document: Option<Document>,
        version: Version,
        left: Option<Duration>,
        ours: Ours,
        around: Around,
    },
}

impl Shown {
    /// This version was deleted.
    pub fn deleted(version: Version) -> Self {
        Self::Deleted {
            version,
            kept_for: Entry::TOMBSTONE,
        }
    }

    /// A call that wanted to delete whatever was there has found nothing.
    pub fn nothing_to_delete() -> Self {
        Self::Deleted {
            version: Version::FIRST,
            kept_for: Entry::TOMBSTONE_OF_NOTHING,
        }
    }

    /// Whether this is what comes of a Redis that has lost the `known` entry.
    fn is_without(&self, known: &Entry, around: Around) -> bool {
        match (self, &known.content) {
            (Self::Document { version, .. }, Content::Deleted) => *version <= known.version,
            // A newer one may have been written by somebody who did not know of it.
            (Self::Document { version, ours, .. }, _) => {
                *version < known.version
                    || *version > known.version
                        && ours.is_none()
                        && Some(*version) > around.last_heard
            }
            (Self::Absent, content) => matches!(content, Content::Document(_)),
            // A call that deletes has told Redis first.
            (Self::Deleted { .. }, _) => false,
        }
    }
}

/// Why there is no room for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoom {
    /// Nothing is left that may leave.
    Full,
    /// More has to leave than one step removes: try again.
    NotYet,
}

/// A step has not removed everything: try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotYet;

// === impl Entries ===

impl Entries {
    /// Longer than any time to live.
    const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);
    /// Unsure entries that are passed over in the search for one that may leave.
    const MOST_PASSED_OVER: usize = 64;

    /// With a million groups: some 0.1 ms.
    const STEP: Step = Step {
        looks_at: 500,
        removes: 30,
    };

    /// `drops_changes`: what is changed here will be dropped, and not carried over.
    pub fn new(max_bytes: usize, drops_changes: bool, now: Instant) -> Self {
        Self {
            table: Table::default(),
            max_bytes,
            never: now + Self::NEVER,
            epoch: 0,
            losses: Losses::default(),
            drops_changes,
            changes: 0,
            step: Self::STEP,
        }
    }

    /// Number of groups. What has expired counts until it is swept.
    pub fn groups(&self) -> usize {
        self.table.sums().documents
    }

    /// Number of entries that hold no group: tombstones, and what is known of
    /// groups in Redis of which a change was dropped.
    pub fn traces(&self) -> usize {
        self.table.sums().traces
    }

    pub fn bytes(&self) -> usize {
        self.table.sums().bytes
    }

    pub fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    /// Documents of entries that were removed, for whoever gives their memory back.
    pub fn take_removed(&mut self) -> Vec<Bytes> {
        self.table.take_removed()
    }

    /// Number of entries that were changed here, tombstones included.
    pub fn dirty(&self) -> usize {
        self.table.dirty()
    }

    /// What these take of [`Self::bytes`].
    pub fn dirty_bytes(&self) -> usize {
        self.table.sums().dirty_bytes
    }

    /// The group at a key, if there is one.
    pub fn get(&self, key: &str, now: Instant) -> Option<&Entry> {
        self.table.get(key).filter(|entry| entry.is_group(now))
    }

    /// Shows groups whose key begins with `prefix` to `visit`, in order and
    /// beyond `after`, until it breaks off or the step is over. Where to go on,
    /// unless there is nothing more to look at.
    pub fn walk(
        &self,
        prefix: &str,
        after: Option<&GroupKey>,
        now: Instant,
        mut visit: impl FnMut(&GroupKey, &Entry) -> ControlFlow<()>,
    ) -> Option<GroupKey> {
        self.table
            .walk(prefix, after, self.step.looks_at, |key, entry| {
                if entry.is_group(now) {
                    visit(key, entry)
                } else {
                    ControlFlow::Continue(())
                }
            })
    }

    /// When an entry expires; None if it never does.
    pub fn expiry_of(&self, entry: &Entry) -> Option<Instant> {
        Some(entry.expires).filter(|expires| *expires != self.never)
    }

    /// Writes a document that Redis does not know of. `maybe_in_redis`: its
    /// write id, if Redis may have executed the same write.
    pub fn change(
        &mut self,
        key: &GroupKey,
        document: (Bytes, Version),
        expires: Instant,
        maybe_in_redis: Option<&str>,
        now: Instant,
    ) -> Result<(), NoRoom> {
        let (json, version) = document;
        self.settle(key, now);
        let changed = self.changed(key, maybe_in_redis, now);
        let entry = Entry {
            content: Content::Document(json),
            version,
            expires,
            standing: self.dirty_standing(changed),
        };
        self.make_room(key, entry.cost(key), now, true)?;
        self.table.put(key.clone(), entry);
        Ok(())
    }

    /// Deletes the group at a key, of which Redis does not know.
    pub fn delete(&mut self, key: &GroupKey, now: Instant) {
        let Some(entry) = self.get(key.as_str(), now) else {
            return;
        };
        let (version, expires) = (entry.version, entry.expires);
        let changed = self.changed(key, None, now);
        self.table.remove(key);
        self.bury(key.clone(), version, expires, changed, now);
    }

    /// What is known of Redis once the entry at `key` is changed.
    fn changed(&mut self, key: &GroupKey, maybe_in_redis: Option<&str>, now: Instant) -> Changed {
        self.changes += 1;
        let mut changed = match self.entry(key).map(|entry| (entry, &entry.standing)) {
            Some((_, Standing::Dirty { changed, .. })) => Changed::clone(changed),
            Some((entry, Standing::Clean { ours, .. })) => Changed {
                base: entry
                    .is_in_redis(now)
                    .then_some((entry.version, entry.expires)),
                before: (ours.is_some()
                    && (self.drops_changes || matches!(entry.content, Content::Deleted)))
                .then(|| Box::new(entry.clone())),
                ..Changed::default()
            },
            None => Changed::default(),
        };
        if let Some(write_id) = maybe_in_redis {
            changed.remember(write_id);
        }
        changed.change = self.changes;
        changed
    }

    /// Leaves a tombstone for as long as Redis may hold the deleted group. It
    /// takes no more room than the group did, with what was there before.
    fn bury(
        &mut self,
        key: GroupKey,
        version: Version,
        expired: Instant,
        changed: Changed,
        now: Instant,
    ) {
        if let Some(expires) = changed.tombstone_expires(expired, now) {
            let entry = Entry {
                content: Content::Deleted,
                version,
                expires,
                standing: self.dirty_standing(changed),
            };
            self.table.put(key, entry);
        } else if let Some(before) = changed.before {
            // For Redis nothing has changed.
            self.table.put(key, *before);
        }
    }

    fn dirty_standing(&self, changed: Changed) -> Standing {
        Standing::Dirty {
            changed: Box::new(changed),
            generation: self.table.generation(),
        }
    }

    /// To be drawn before a call is sent to Redis.
    pub fn ticket(&self, now: Instant) -> Ticket {
        Ticket {
            epoch: self.epoch,
            sent: now,
        }
    }

    /// Whether the epoch in which `ticket` was drawn goes on.
    pub fn is_current(&self, ticket: Ticket) -> bool {
        ticket.epoch == self.epoch
    }

    /// Takes in what Redis has answered to the call with this ticket. True if
    /// there is an entry now that was not there before. Returns what is shown if
    /// this takes another step.
    pub fn learn(
        &mut self,
        key: &GroupKey,
        shown: Shown,
        ticket: Ticket,
        now: Instant,
    ) -> Result<bool, Shown> {
        self.settle(key, now);
        let known = match self.entry(key).map(|entry| (entry, &entry.standing)) {
            // What was changed here has to be told to Redis first.
            Some((_, Standing::Dirty { .. })) => return Ok(false),
            // And so has what it may have lost: there may be another one already, which
            // another instance has put back.
            Some((entry, Standing::Clean { epoch, .. }))
                if self.pending_entry(key, entry, now)
                    && shown.is_without(entry, self.losses.around(key, *epoch)) =>
            {
                return Ok(false);
            }
            Some((entry, Standing::Clean { epoch, seen, ours }))
                if !matches!(entry.content, Content::Unknown) =>
            {
                let same_epoch = *epoch == self.epoch;
                Some(Known {
                    version: entry.version,
                    is_group: matches!(entry.content, Content::Document(_)),
                    // A call that was sent after the answer was there came later.
                    overlaps: ticket.sent <= *seen,
                    same_epoch,
                    ours: *ours,
                })
            }
            _ => None,
        };
        match shown {
            Shown::Document {
                json,
                version,
                left,
                ours,
            } => {
                // An answer of an earlier epoch may be out of date, but not when
                // its version is newer.
                if let Some(known) = &known
                    && ((known.overlaps && known.same_epoch) || ticket.epoch != self.epoch)
                    && (known.version > version || (known.version == version && !known.is_group))
                {
                    return Ok(false);
                }
                if let Some(known) = &known
                    && !known.is_group
                    && ticket.epoch == self.epoch
                    && self.is_back(key, known, version, &json)
                {
                    if let Some(Standing::Clean {
                        ours: Some(ours), ..
                    }) = self.table.standing_mut(key)
                    {
                        ours.is_back = true;
                    }
                    return Ok(false);
                }
                let cost = Entry::cost_of(key, json.len());
                let Ok(fits) = self.fits(key, cost, now) else {
                    return Err(Shown::Document {
                        json,
                        version,
                        left,
                        ours,
                    });
                };
                // Who reads what we have written learns nothing new.
                let same = known.filter(|known| known.is_group && known.version == version);
                let ours = same.and_then(|known| known.ours).or(ours);
                self.table.remove(key);
                if fits {
                    let entry = Entry {
                        content: Content::Document(json),
                        version,
                        expires: left.map_or(self.never, |left| ticket.sent + left),
                        standing: Standing::Clean {
                            epoch: ticket.epoch,
                            seen: now,
                            ours,
                        },
                    };
                    self.table.put(key.clone(), entry);
                }
                Ok(fits && known.is_none())
            }
            Shown::Absent if ticket.epoch != self.epoch => Ok(false),
            Shown::Absent => {
                // An entry that was learned after the call was sent may be newer
                // than its answer.
                if known
                    .is_some_and(|known| known.is_group && (!known.same_epoch || !known.overlaps))
                {
                    self.table.remove(key);
                }
                Ok(false)
            }
            Shown::Deleted { version, kept_for } => {
                let is_older = known.is_some_and(|known| {
                    known.version > version
                        && ((known.overlaps && known.same_epoch) || ticket.epoch != self.epoch)
                });
                if is_older {
                    return Ok(false);
                }
                // Whoever finds nothing where there was a group must not forget its delete
                // sooner than who had deleted it.
                let kept_for = known.map_or(kept_for, |_| Entry::TOMBSTONE);
                let cost = Entry::cost_of(key, 0);
                let Ok(fits) = self.fits(key, cost, now) else {
                    return Err(Shown::Deleted { version, kept_for });
                };
                self.table.remove(key);
                if fits {
                    let entry = Entry {
                        content: Content::Deleted,
                        version,
                        expires: now + kept_for,
                        standing: Standing::Clean {
                            epoch: ticket.epoch,
                            seen: now,
                            ours: Some(Ours::new(None)),
                        },
                    };
                    self.table.put(key.clone(), entry);
                }
                Ok(false)
            }
        }
    }

    /// Whether a document is what was deleted here, or was there before: after a loss
    /// another instance may have put it back. What has expired here may live on in Redis
    /// for a moment, or because somebody wants it to.
    fn is_back(&self, key: &GroupKey, known: &Known, version: Version, json: &Bytes) -> bool {
        let is_older = version < known.version
            && self
                .losses
                .found_at(key)
                .is_some_and(|found_at| version < found_at);
        let is_same = version == known.version && known.ours.is_some_and(|ours| !ours.has_expired);
        let document = || Document {
            key: key.clone(),
            json: json.clone(),
        };
        (is_same || is_older) && document().has_write_id()
    }

    /// Whether there is room for a clean entry of `cost`.
    fn fits(&mut self, key: &GroupKey, cost: usize, now: Instant) -> Result<bool, NotYet> {
        match self.make_room(key, cost, now, false) {
            Ok(()) => Ok(true),
            Err(NoRoom::Full) => Ok(false),
            Err(NoRoom::NotYet) => Err(NotYet),
        }
    }

    /// Whether an answer of Redis that shows this version, or None, contradicts
    /// what was learned of a live group before `ticket` was drawn.
    pub fn contradicts(
        &self,
        key: &GroupKey,
        shown: Option<Version>,
        ticket: Ticket,
        now: Instant,
    ) -> bool {
        // What was put back in a new epoch was learned before it, too.
        let learned_before = |seen: Instant| seen < ticket.sent || !self.is_current(ticket);
        self.entry(key).is_some_and(|entry| {
            let is_before = match entry.content {
                Content::Document(_) => shown < Some(entry.version),
                Content::Deleted => shown.is_some_and(|shown| shown <= entry.version),
                Content::Unknown => false,
            };
            let is_sure = match entry.standing {
                Standing::Clean { seen, ours, .. } => {
                    learned_before(seen) && !ours.is_some_and(|ours| ours.has_expired)
                }
                Standing::Dirty { .. } => false,
            };
            is_before && entry.expires > now && is_sure
        })
    }

    /// The version of the clean group at a key, if it was learned in this epoch, and
    /// the size of its document.
    pub fn known(&self, key: &GroupKey, now: Instant) -> Option<(Version, usize)> {
        let entry = self.get(key.as_str(), now)?;
        matches!(entry.standing, Standing::Clean { epoch, .. } if epoch == self.epoch)
            .then_some((entry.version, entry.document_bytes()))
    }

    /// What is left of a group that Redis may have lost, and that nobody puts back since
    /// it was merely read. None: it is not that, or it never expires.
    pub fn left_of_lost(&self, key: &GroupKey, now: Instant) -> Option<Duration> {
        let entry = self.get(key.as_str(), now)?;
        let Standing::Clean {
            epoch,
            seen,
            ours: None,
        } = entry.standing
        else {
            return None;
        };
        let is_lost = self.losses.may_hold(key, epoch, seen, false);
        let expires = self.expiry_of(entry).filter(|_| is_lost)?;
        Some(expires - now)
    }

    /// Begins a new epoch, with these losses.
    pub fn begin_epoch(&mut self, losses: Vec<Loss>) {
        self.epoch += 1;
        for loss in losses {
            self.losses.add(self.epoch, loss);
        }
    }

    /// Deletes that were told to Redis after its last losses are unsure once more.
    /// False if there were no losses.
    pub fn doubt_deletes(&mut self) -> bool {
        if self.losses.is_empty() {
            return false;
        }
        self.epoch += 1;
        self.losses.doubt_deletes(self.epoch);
        true
    }

    /// Drops what was changed here, all of it at once. The number of groups that
    /// were written or deleted and are dropped. What has expired does not count,
    /// and goes first.
    pub fn discard(&mut self, now: Instant) -> Result<usize, NotYet> {
        self.sweep_changes(now)?;
        Ok(self.table.drop_dirty())
    }

    /// Whether Redis has to be told of the entry at a key before it is asked.
    pub fn is_pending(&self, key: &GroupKey, now: Instant) -> bool {
        self.entry(key)
            .is_some_and(|entry| self.pending_entry(key, entry, now))
    }

    fn pending_entry(&self, key: &GroupKey, entry: &Entry, now: Instant) -> bool {
        let entry = entry.as_of(now);
        match &entry.standing {
            Standing::Dirty { .. } => entry.expires > now || entry.leaves_tombstone(now).is_some(),
            Standing::Clean { ours: None, .. } => false,
            Standing::Clean {
                ours: Some(Ours { is_back: true, .. }),
                ..
            } => entry.expires > now,
            Standing::Clean { epoch, seen, .. } => {
                let is_deleted = matches!(entry.content, Content::Deleted);
                entry.expires > now && self.losses.may_hold(key, *epoch, *seen, is_deleted)
            }
        }
    }

    /// Some keys of pending entries beyond `after`, and where to go on unless
    /// there is nothing more to look at.
    pub fn pending_keys(
        &self,
        after: Option<&GroupKey>,
        most: usize,
        now: Instant,
    ) -> (Vec<GroupKey>, Option<GroupKey>) {
        let mut keys = Vec::new();
        let next = self
            .table
            .walk("", after, self.step.looks_at, |key, entry| {
                if self.pending_entry(key, entry, now) {
                    keys.push(key.clone());
                }
                if keys.len() < most {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            });
        (keys, next)
    }

    /// What Redis has to be told of a key.
    pub fn pending(&self, key: &GroupKey, now: Instant) -> Option<Pending> {
        let entry = self
            .entry(key)
            .map(|entry| entry.as_of(now))
            .filter(|entry| self.pending_entry(key, entry, now))?;
        let document = match &entry.content {
            Content::Document(json) if entry.expires > now => Some(Document {
                key: key.clone(),
                json: json.clone(),
            }),
            Content::Document(_) | Content::Deleted | Content::Unknown => None,
        };
        match &entry.standing {
            Standing::Dirty { changed, .. } => Some(Pending::Changed {
                document,
                version: entry.version,
                left: entry.leaves_tombstone(now).unwrap_or(entry.expires) - now,
                changed: Changed::clone(changed),
            }),
            Standing::Clean { epoch, ours, .. } => Some(Pending::Unsure {
                left: match document {
                    Some(_) => self.expiry_of(&entry).map(|expires| expires - now),
                    None => None,
                },
                document,
                version: entry.version,
                ours: (*ours)?,
                around: self.losses.around(key, *epoch),
            }),
        }
    }

    /// The change `change` of a key is about to be written to Redis under this
    /// write id. False if it was changed again: then it must not be.
    pub fn carrying(&mut self, key: &GroupKey, change: u64, write_id: &str) -> bool {
        match self.table.standing_mut(key) {
            Some(Standing::Dirty { changed, .. }) if changed.change == change => {
                changed.remember(write_id);
                true
            }
            _ => false,
        }
    }

    /// Redis was told of the change `change` of a key, and shows this now.
    pub fn carried(&mut self, key: &GroupKey, change: u64, shown: Shown, now: Instant) {
        let same = matches!(
            self.entry(key).map(|entry| &entry.standing),
            Some(Standing::Dirty { changed, .. }) if changed.change == change
        );
        if same {
            self.table.remove(key);
            let ticket = self.ticket(now);
            // What finds no room in one step need not be known.
            let _ = self.learn(key, shown, ticket, now);
        }
    }

    /// Redis was told of the unsure `version` of a key. `holds`: what was written or
    /// deleted here is so in Redis now; otherwise something newer is, or has to be left.
    pub fn offered(
        &mut self,
        key: &GroupKey,
        version: Version,
        holds: bool,
        ticket: Ticket,
        now: Instant,
    ) {
        self.settle(key, now);
        if self.entry(key).map(|entry| entry.version) != Some(version) || !self.is_pending(key, now)
        {
            return;
        }
        if let Some(Standing::Clean { epoch, seen, ours }) = self.table.standing_mut(key) {
            if holds {
                (*epoch, *seen) = (ticket.epoch, now);
                *ours = ours.map(|ours| Ours {
                    is_back: false,
                    ..ours
                });
            } else if ticket.epoch == self.epoch {
                self.table.remove(key);
            }
        }
    }

    /// Removes what has expired or was dropped.
    pub fn sweep(&mut self, now: Instant) -> Result<(), NotYet> {
        self.step(|entries| entries.table.settle_one(entries.epoch, now) || entries.sweep_one(now))
    }

    /// Removes the changes that have expired.
    pub fn sweep_changes(&mut self, now: Instant) -> Result<(), NotYet> {
        self.step(|entries| entries.sweep_change(now))
    }

    /// Does something until it says that there is no more to do.
    fn step(&mut self, mut one: impl FnMut(&mut Self) -> bool) -> Result<(), NotYet> {
        for _ in 0..self.step.removes {
            if !one(self) {
                return Ok(());
            }
        }
        Err(NotYet)
    }

    /// Removes one entry that has expired. False if none has.
    fn sweep_one(&mut self, now: Instant) -> bool {
        let Some(key) = expired(self.table.first_clean(), now) else {
            return self.sweep_change(now);
        };
        self.expire(&key, now);
        true
    }

    /// Removes one change that has expired. False if none has.
    fn sweep_change(&mut self, now: Instant) -> bool {
        let Some(key) = expired(self.table.first_dirty(), now) else {
            return false;
        };
        self.expire(&key, now);
        true
    }

    /// Removes an entry that has expired.
    fn expire(&mut self, key: &GroupKey, now: Instant) {
        let trace = self.entry(key).and_then(Entry::trace_of_expired);
        let entry = self.table.remove(key);
        if let Some(trace) = trace {
            self.table.put(key.clone(), trace);
        // Redis may hold the group for longer than its last writer wanted.
        } else if let Some(entry) = entry
            && let Standing::Dirty { changed, .. } = entry.standing
        {
            self.bury(key.clone(), entry.version, entry.expires, *changed, now);
        }
    }

    /// Does for one key what steps do for all: its entry is none that was dropped
    /// or has expired.
    fn settle(&mut self, key: &GroupKey, now: Instant) {
        self.table.settle(key, self.epoch, now);
        // What was there before a change that has expired may have expired, too.
        while self.entry(key).is_some_and(|entry| entry.expires <= now) {
            self.expire(key, now);
        }
    }

    /// Makes room for a change of a key to a document of this size.
    pub fn make_room_for(
        &mut self,
        key: &GroupKey,
        json_bytes: usize,
        now: Instant,
    ) -> Result<(), NoRoom> {
        let before = match self.entry(key).map(|entry| (entry, &entry.standing)) {
            Some((_, Standing::Dirty { changed, .. })) => changed.before_bytes(),
            Some((entry, Standing::Clean { ours: Some(_), .. })) if self.drops_changes => {
                entry.document_bytes()
            }
            _ => 0,
        };
        self.make_room(key, Entry::cost_of(key, json_bytes + before), now, true)
    }

    /// Makes room for an entry of `cost` in place of the one at `key`: what was
    /// dropped or has expired goes first, then clean entries. For a clean one
    /// nothing has to go to any length.
    fn make_room(
        &mut self,
        key: &GroupKey,
        cost: usize,
        now: Instant,
        sweep: bool,
    ) -> Result<(), NoRoom> {
        let mut steps = 0;
        while self.over(key, cost) {
            if steps >= self.step.removes {
                return Err(NoRoom::NotYet);
            }
            steps += 1;
            if self.table.settle_one(self.epoch, now) || (sweep && self.sweep_one(now)) {
                continue;
            }
            let leaves = self.first_to_leave(key, &mut steps, now);
            let leaves = leaves.cloned().ok_or(NoRoom::Full)?;
            self.table.remove(&leaves);
        }
        Ok(())
    }

    /// The first clean entry that may leave, but not the one at `key`. Counts those
    /// that it passes over.
    fn first_to_leave(&self, key: &GroupKey, steps: &mut usize, now: Instant) -> Option<&GroupKey> {
        let candidates = self.table.clean().take(Self::MOST_PASSED_OVER);
        candidates
            .map(|(_, candidate)| candidate)
            .find(|candidate| {
                *steps += 1;
                *candidate != key && !self.is_pending(candidate, now)
            })
    }

    fn over(&self, key: &GroupKey, cost: usize) -> bool {
        self.bytes() - self.table.cost_at(key) + cost > self.max_bytes
    }

    /// Whether a clean entry of this size fits without another one leaving.
    pub fn has_room_for(&self, key: &GroupKey, json_bytes: usize) -> bool {
        let kept = self.bytes() - self.table.sums().dropped_bytes;
        let freed = self.entry(key).map_or(0, |old| old.cost(key));
        let cost = Entry::cost_of(key, json_bytes);
        kept - freed + cost <= self.max_bytes
    }

    fn entry(&self, key: &GroupKey) -> Option<&Entry> {
        self.table.get(key.as_str())
    }
}

/// The key of the entry that expires first, if it has.
fn expired(first: Option<&(Instant, GroupKey)>, now: Instant) -> Option<GroupKey> {
    let (_, key) = first.filter(|(expires, _)| *expires <= now)?;
    Some(key.clone())
}

#[cfg(test)]
mod tests;
