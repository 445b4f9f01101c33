//! What the memory store holds: a pure map with a byte bound and a notion of
//! what Redis knows. No I/O, no clock of its own.
//!
//! An entry is either *clean*, as Redis has shown it, or *dirty*, written or
//! deleted here while Redis could not be. A clean entry may leave when room is
//! needed; a dirty one never does. A dirty entry without a document is a
//! *tombstone*: Redis may still hold what was deleted here.
//!
//! What Redis shows is taken in by *epochs*. Within one, an older version never
//! takes the place of a newer one, so that answers may come in any order. A
//! recovery, or another Redis process, begins a new epoch, in which the first
//! answer always counts: Redis may have gone back in time.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    time::Duration,
};

use bytes::Bytes;
use tokio::time::Instant;

use super::entry::{Changed, Content, Entry, Standing};
use crate::{document::Document, group::GroupKey, version::Version};

/// The entries, by key and by expiry.
#[derive(Debug)]
pub struct Entries {
    by_key: BTreeMap<GroupKey, Entry>,
    /// Every clean entry once, soonest expiry first: the order of leaving.
    clean: BTreeSet<(Instant, GroupKey)>,
    /// Every dirty entry once, soonest expiry first.
    dirty: BTreeSet<(Instant, GroupKey)>,
    /// The sum of [`Entry::cost`]; stays at or below `max_bytes`.
    bytes: usize,
    /// The part of it that dirty entries take.
    dirty_bytes: usize,
    max_bytes: usize,
    /// Stands for "never" as an expiry.
    never: Instant,
    epoch: u64,
    /// Clean entries of earlier epochs than this are *unsure*: Redis may have
    /// lost them, and has to be offered them.
    unsure_before: u64,
    /// Whether unsure entries are put back where Redis holds nothing at all.
    put_back_absent: bool,
    /// Number of changes made to dirty entries.
    changes: u64,
}

/// The moment at which a call was sent to Redis.
#[derive(Clone, Copy, Debug)]
pub struct Ticket {
    epoch: u64,
    sent: Instant,
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
    },
    Absent,
    /// This version was deleted by the call.
    Deleted(Version),
}

/// What is known of the Redis process with which an epoch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// The one of the epoch before.
    Same,
    /// Another one, which holds what that one held, but maybe not its last
    /// writes.
    Restarted,
    /// Another one, which has lost what that one held.
    LostData,
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
    /// Redis held it, and may have lost it.
    Unsure {
        document: Document,
        version: Version,
        left: Option<Duration>,
        /// Whether it is put back where Redis holds nothing: somebody else may
        /// have deleted the group.
        put_back_absent: bool,
    },
}

impl Shown {
    /// Whether less is shown than this version.
    fn is_older_than(&self, known: Version) -> bool {
        match self {
            Self::Document { version, .. } => *version < known,
            Self::Absent => true,
            // A call that deletes has told Redis first.
            Self::Deleted(_) => false,
        }
    }
}

/// There is no room, and nothing that may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full {
    pub max_bytes: usize,
}

// === impl Entries ===

impl Entries {
    /// How long a delete that Redis has executed keeps late answers to earlier
    /// reads from bringing the group back: longer than any such answer takes.
    const TOMBSTONE: Duration = Duration::from_secs(5);
    /// Longer than any time to live.
    const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);
    /// Unsure entries that are passed over in the search for one that may leave.
    const MOST_PASSED_OVER: usize = 64;

    pub fn new(max_bytes: usize, now: Instant) -> Self {
        Self {
            by_key: BTreeMap::new(),
            clean: BTreeSet::new(),
            dirty: BTreeSet::new(),
            bytes: 0,
            dirty_bytes: 0,
            max_bytes,
            never: now + Self::NEVER,
            epoch: 0,
            unsure_before: 0,
            put_back_absent: false,
            changes: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    /// Every unsure entry has been offered.
    pub fn nothing_unsure(&mut self) {
        self.put_back_absent = false;
    }

    /// Number of entries that were changed here, tombstones included.
    pub fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// What these take of [`Self::bytes`].
    pub fn dirty_bytes(&self) -> usize {
        self.dirty_bytes
    }

    /// The group at a key, if there is one.
    pub fn get(&self, key: &str, now: Instant) -> Option<&Entry> {
        self.by_key.get(key).filter(|entry| entry.is_group(now))
    }

    /// Groups whose key begins with `prefix`, in order, beyond `after`.
    pub fn range<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a GroupKey>,
        now: Instant,
    ) -> impl Iterator<Item = (&'a GroupKey, &'a Entry)> {
        let from: Bound<&str> = match after {
            Some(after) => Bound::Excluded(after.as_str()),
            None => Bound::Included(prefix),
        };
        self.by_key
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(move |(key, _)| key.as_str().starts_with(prefix))
            .filter(move |(_, entry)| entry.is_group(now))
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
    ) -> Result<(), Full> {
        let (json, version) = document;
        let changed = self.changed(key, maybe_in_redis, now);
        let entry = Entry {
            content: Content::Document(json),
            version,
            expires,
            standing: Standing::Dirty(Box::new(changed)),
        };
        self.make_room(key, entry.cost(key), now, true)?;
        self.put(key.clone(), entry);
        Ok(())
    }

    /// Deletes the group at a key, of which Redis does not know.
    pub fn delete(&mut self, key: &GroupKey, now: Instant) {
        let Some(entry) = self.get(key.as_str(), now) else {
            return;
        };
        let (version, expires) = (entry.version, entry.expires);
        let changed = self.changed(key, None, now);
        self.remove(key);
        self.bury(key.clone(), version, expires, changed, now);
    }

    /// What is known of Redis once the entry at `key` is changed.
    fn changed(&mut self, key: &GroupKey, maybe_in_redis: Option<&str>, now: Instant) -> Changed {
        self.changes += 1;
        let mut changed = match self.by_key.get(key).map(|entry| (entry, &entry.standing)) {
            Some((_, Standing::Dirty(changed))) => Changed::clone(changed),
            Some((entry, Standing::Clean { .. })) if entry.is_in_redis(now) => Changed {
                base: Some((entry.version, entry.expires)),
                ..Changed::default()
            },
            _ => Changed::default(),
        };
        if let Some(write_id) = maybe_in_redis {
            changed.remember(write_id);
        }
        changed.change = self.changes;
        changed
    }

    /// Leaves a tombstone for as long as Redis may hold the deleted group. It
    /// takes no more room than the group did.
    fn bury(
        &mut self,
        key: GroupKey,
        version: Version,
        expired: Instant,
        changed: Changed,
        now: Instant,
    ) {
        let base_expires = changed.base.map(|(_, expires)| expires);
        let expires = if changed.maybe_in_redis.is_empty() {
            base_expires
        } else {
            // What may be in Redis got the time to live that it had here.
            base_expires.max(Some(expired))
        };
        if let Some(expires) = expires.filter(|expires| *expires > now) {
            let entry = Entry {
                content: Content::Deleted,
                version,
                expires,
                standing: Standing::Dirty(Box::new(changed)),
            };
            self.put(key, entry);
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
    /// there is an entry now that was not there before.
    pub fn learn(&mut self, key: &GroupKey, shown: Shown, ticket: Ticket, now: Instant) -> bool {
        let known = match self.by_key.get(key).map(|entry| (entry, &entry.standing)) {
            // What was changed here has to be told to Redis first.
            Some((_, Standing::Dirty(_))) => return false,
            // And so has what it may have lost: there may be an older one already,
            // which another instance has put back.
            Some((entry, _)) if self.pending_entry(entry) && shown.is_older_than(entry.version) => {
                return false;
            }
            Some((entry, Standing::Clean { epoch, seen }))
                if !matches!(entry.content, Content::Unknown) =>
            {
                let same_epoch = *epoch == self.epoch && entry.expires > now;
                let is_group = matches!(entry.content, Content::Document(_));
                Some((entry.version, *seen, same_epoch, is_group))
            }
            _ => None,
        };
        match shown {
            Shown::Document {
                json,
                version,
                left,
            } => {
                // An answer of an earlier epoch may be out of date, but not when
                // its version is newer.
                if let Some((known, _, same_epoch, is_group)) = known
                    && (same_epoch || ticket.epoch != self.epoch)
                    && (known > version || (known == version && !is_group))
                {
                    return false;
                }
                let expires = left.map_or(self.never, |left| ticket.sent + left);
                let entry = Entry {
                    content: Content::Document(json),
                    version,
                    expires,
                    standing: Standing::Clean {
                        epoch: ticket.epoch,
                        seen: now,
                    },
                };
                let fits = self.make_room(key, entry.cost(key), now, false).is_ok();
                self.remove(key);
                if fits {
                    self.put(key.clone(), entry);
                }
                fits && known.is_none()
            }
            _ if ticket.epoch != self.epoch => false,
            Shown::Absent => {
                // An entry that was learned after the call was sent may be newer
                // than its answer.
                if known.is_some_and(|(_, seen, same_epoch, is_group)| {
                    is_group && (!same_epoch || seen < ticket.sent)
                }) {
                    self.remove(key);
                }
                false
            }
            Shown::Deleted(version) => {
                if known.is_some_and(|(known, _, same_epoch, _)| same_epoch && known > version) {
                    return false;
                }
                let entry = Entry {
                    content: Content::Deleted,
                    version,
                    expires: now + Self::TOMBSTONE,
                    standing: Standing::Clean {
                        epoch: self.epoch,
                        seen: now,
                    },
                };
                self.remove(key);
                if self.make_room(key, entry.cost(key), now, false).is_ok() {
                    self.put(key.clone(), entry);
                }
                false
            }
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
        self.get(key.as_str(), now).is_some_and(|entry| {
            shown < Some(entry.version)
                && matches!(entry.standing, Standing::Clean { seen, .. } if learned_before(seen))
        })
    }

    /// The version of the clean group at a key, if it was learned in this epoch, and
    /// the size of its document.
    pub fn known(&self, key: &GroupKey, now: Instant) -> Option<(Version, usize)> {
        let entry = self.get(key.as_str(), now)?;
        matches!(entry.standing, Standing::Clean { epoch, .. } if epoch == self.epoch)
            .then_some((entry.version, entry.document_bytes()))
    }

    /// Begins a new epoch.
    pub fn begin_epoch(&mut self, server: Server) {
        self.epoch += 1;
        match server {
            Server::Same => {}
            Server::Restarted => self.unsure_before = self.epoch,
            Server::LostData => {
                self.unsure_before = self.epoch;
                self.put_back_absent = true;
            }
        }
    }

    /// Drops what was changed here. The number of groups that were written or
    /// deleted and are dropped.
    pub fn discard(&mut self, now: Instant) -> usize {
        self.sweep(now);
        let dropped = std::mem::take(&mut self.dirty);
        let count = dropped.len();
        self.dirty_bytes = 0;
        for (_, key) in dropped {
            let Some(entry) = self.by_key.remove(&key) else {
                continue;
            };
            self.bytes -= entry.cost(&key);
            // Redis still holds what was changed. Should it fail again before
            // that is read, a delete must know that there is something to
            // delete.
            if let Standing::Dirty(changed) = entry.standing
                && let Some((version, expires)) = changed.base
                && expires > now
            {
                let entry = Entry {
                    content: Content::Unknown,
                    version,
                    expires,
                    standing: Standing::Clean {
                        epoch: self.epoch,
                        seen: now,
                    },
                };
                self.put(key, entry);
            }
        }
        count
    }

    /// Whether Redis has to be told of the entry at a key before it is asked.
    pub fn is_pending(&self, key: &GroupKey, now: Instant) -> bool {
        self.by_key
            .get(key)
            .is_some_and(|entry| entry.expires > now && self.pending_entry(entry))
    }

    fn pending_entry(&self, entry: &Entry) -> bool {
        match &entry.standing {
            Standing::Dirty(_) => true,
            Standing::Clean { epoch, .. } => {
                *epoch < self.unsure_before && matches!(entry.content, Content::Document(_))
            }
        }
    }

    /// Some keys of pending entries beyond `after`, and the key to go on from
    /// unless these are the last.
    pub fn pending_keys(
        &self,
        after: Option<&GroupKey>,
        most: usize,
        now: Instant,
    ) -> (Vec<GroupKey>, Option<GroupKey>) {
        let from: Bound<&str> = match after {
            Some(after) => Bound::Excluded(after.as_str()),
            None => Bound::Unbounded,
        };
        let mut keys = Vec::new();
        let range = self.by_key.range::<str, _>((from, Bound::Unbounded));
        for (looked_at, (key, entry)) in range.enumerate() {
            if entry.expires > now && self.pending_entry(entry) {
                keys.push(key.clone());
            }
            // The lock must not be held long.
            if keys.len() >= most || looked_at >= 20 * most {
                return (keys, Some(key.clone()));
            }
        }
        (keys, None)
    }

    /// What Redis has to be told of a key.
    pub fn pending(&self, key: &GroupKey, now: Instant) -> Option<Pending> {
        let entry = self.by_key.get(key).filter(|entry| entry.expires > now)?;
        let document = match &entry.content {
            Content::Document(json) => Some(Document {
                key: key.clone(),
                json: json.clone(),
            }),
            Content::Deleted | Content::Unknown => None,
        };
        match &entry.standing {
            Standing::Dirty(changed) => Some(Pending::Changed {
                document,
                version: entry.version,
                left: entry.expires - now,
                changed: Changed::clone(changed),
            }),
            Standing::Clean { .. } if self.pending_entry(entry) => Some(Pending::Unsure {
                document: document?,
                version: entry.version,
                left: self.expiry_of(entry).map(|expires| expires - now),
                put_back_absent: self.put_back_absent,
            }),
            Standing::Clean { .. } => None,
        }
    }

    /// The change `change` of a key is about to be written to Redis under this
    /// write id. False if it was changed again: then it must not be.
    pub fn carrying(&mut self, key: &GroupKey, change: u64, write_id: &str) -> bool {
        match self.by_key.get_mut(key).map(|entry| &mut entry.standing) {
            Some(Standing::Dirty(changed)) if changed.change == change => {
                changed.remember(write_id);
                true
            }
            _ => false,
        }
    }

    /// Redis was told of the change `change` of a key, and shows this now.
    pub fn carried(&mut self, key: &GroupKey, change: u64, shown: Shown, now: Instant) {
        let same = matches!(
            self.by_key.get(key).map(|entry| &entry.standing),
            Some(Standing::Dirty(changed)) if changed.change == change
        );
        if same {
            self.remove(key);
            let ticket = self.ticket(now);
            self.learn(key, shown, ticket, now);
        }
    }

    /// Redis was offered the unsure `version` of a key. `is_there`: it has that
    /// version now, or a newer one, of which ours is still the last that we know.
    pub fn offered(&mut self, key: &GroupKey, version: Version, is_there: bool, now: Instant) {
        let current = self.epoch;
        let Some(entry) = self.by_key.get_mut(key) else {
            return;
        };
        if entry.version != version {
            return;
        }
        match &mut entry.standing {
            Standing::Clean { epoch, seen } if *epoch < self.unsure_before && is_there => {
                (*epoch, *seen) = (current, now);
            }
            Standing::Clean { epoch, .. } if *epoch < self.unsure_before => self.remove(key),
            _ => {}
        }
    }

    /// Removes what has expired.
    pub fn sweep(&mut self, now: Instant) {
        while let Some((_, key)) = self.clean.first().filter(|(expires, _)| *expires <= now) {
            let key = key.clone();
            self.remove(&key);
        }
        while let Some((_, key)) = self.dirty.first().filter(|(expires, _)| *expires <= now) {
            let key = key.clone();
            let Some(entry) = self.remove_entry(&key) else {
                continue;
            };
            // Redis may hold the group for longer than its last writer wanted.
            if let Standing::Dirty(changed) = entry.standing
                && matches!(entry.content, Content::Document(_))
            {
                self.bury(key, entry.version, entry.expires, *changed, now);
            }
        }
    }

    /// Makes room for an entry of `cost` in place of the one at `key`: what has
    /// expired goes first, then clean entries. For a clean one nothing has to
    /// go to any length.
    fn make_room(
        &mut self,
        key: &GroupKey,
        cost: usize,
        now: Instant,
        sweep: bool,
    ) -> Result<(), Full> {
        let full = Full {
            max_bytes: self.max_bytes,
        };
        if self.over(key, cost) && sweep {
            self.sweep(now);
        }
        while self.over(key, cost) {
            let leaves = self
                .clean
                .iter()
                .take(Self::MOST_PASSED_OVER)
                .map(|(_, candidate)| candidate)
                .find(|candidate| {
                    *candidate != key
                        && !self
                            .by_key
                            .get(*candidate)
                            .is_some_and(|entry| self.pending_entry(entry))
                })
                .cloned();
            self.remove(&leaves.ok_or(full)?);
        }
        Ok(())
    }

    fn over(&self, key: &GroupKey, cost: usize) -> bool {
        let freed = self.by_key.get(key).map_or(0, |old| old.cost(key));
        self.bytes - freed + cost > self.max_bytes
    }

    /// Whether a clean entry of this size fits without another one leaving.
    pub fn has_room_for(&self, key: &GroupKey, json_bytes: usize) -> bool {
        !self.over(key, key.as_str().len() + json_bytes + Entry::OVERHEAD_BYTES)
    }

    /// Puts an entry in place of what is there.
    fn put(&mut self, key: GroupKey, entry: Entry) {
        self.remove(&key);
        let cost = entry.cost(&key);
        self.bytes += cost;
        let order = match entry.standing {
            Standing::Clean { .. } => &mut self.clean,
            Standing::Dirty(_) => {
                self.dirty_bytes += cost;
                &mut self.dirty
            }
        };
        order.insert((entry.expires, key.clone()));
        self.by_key.insert(key, entry);
    }

    fn remove(&mut self, key: &GroupKey) {
        self.remove_entry(key);
    }

    fn remove_entry(&mut self, key: &GroupKey) -> Option<Entry> {
        let (key, entry) = self.by_key.remove_entry(key)?;
        let cost = entry.cost(&key);
        self.bytes -= cost;
        let order = match entry.standing {
            Standing::Clean { .. } => &mut self.clean,
            Standing::Dirty(_) => {
                self.dirty_bytes -= cost;
                &mut self.dirty
            }
        };
        order.remove(&(entry.expires, key));
        Some(entry)
    }
}

#[cfg(test)]
mod tests;
