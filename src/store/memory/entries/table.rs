//! The entries by key and by expiry, their sums, and the ones that were dropped.
//!
//! All changes are dropped in one step, whatever their number: each dirty entry
//! carries the *generation* in which it was changed, and a discard begins a new
//! one. From then on nobody sees the entries of earlier generations; they are
//! removed one by one afterwards, or when somebody changes their key.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::{Bound, ControlFlow},
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    domain::group::GroupKey,
    store::memory::entry::{Content, Entry, Standing},
};

/// Soonest expiry first.
type Order = BTreeSet<(Instant, GroupKey)>;

/// See the module.
#[derive(Debug, Default)]
pub struct Table {
    by_key: BTreeMap<GroupKey, Entry>,
    /// Every clean entry once: the order of leaving.
    clean: Order,
    /// Every dirty entry of this generation once.
    dirty: Order,
    /// Those of earlier generations. A key may be here that was removed or
    /// changed since.
    dropped: VecDeque<Order>,
    generation: u64,
    sums: Sums,
    /// Documents that were removed, for whoever gives their memory back.
    removed: Vec<Bytes>,
}

/// What is in a table, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// The sum of [`Entry::cost`].
    pub bytes: usize,
    /// The part of it that dirty entries take.
    pub dirty_bytes: usize,
    /// The part of it that dropped entries take until they are removed.
    pub dropped_bytes: usize,
    /// Entries that hold a document, dropped ones left out.
    pub documents: usize,
    /// The part of these that is dirty.
    pub dirty_documents: usize,
    /// Entries that hold none, dropped ones left out.
    pub traces: usize,
    /// The part of these that is dirty.
    pub dirty_traces: usize,
}

// === impl Table ===

impl Table {
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// Number of dirty entries.
    pub fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// The generation of what is changed now.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The entry at a key.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.visible(self.by_key.get(key)?)
    }

    /// An entry, or if it was dropped what was there before it was changed.
    fn visible<'a>(&self, entry: &'a Entry) -> Option<&'a Entry> {
        match &entry.standing {
            Standing::Dirty { changed, .. } if self.is_dropped(entry) => changed.before.as_deref(),
            _ => Some(entry),
        }
    }

    /// What Redis knows of the entry at a key.
    pub fn standing_mut(&mut self, key: &GroupKey) -> Option<&mut Standing> {
        let generation = self.generation;
        let standing = &mut self.by_key.get_mut(key)?.standing;
        (!standing.is_before(generation)).then_some(standing)
    }

    /// Shows entries whose key begins with `prefix` to `visit`, in order and
    /// beyond `after`, until it breaks off. No more than `most` are looked at.
    /// The last key that was, unless there is no further one.
    pub fn walk(
        &self,
        prefix: &str,
        after: Option<&GroupKey>,
        most: usize,
        mut visit: impl FnMut(&GroupKey, &Entry) -> ControlFlow<()>,
    ) -> Option<GroupKey> {
        let from: Bound<&str> = match after {
            Some(after) => Bound::Excluded(after.as_str()),
            None => Bound::Included(prefix),
        };
        let entries = self.by_key.range::<str, _>((from, Bound::Unbounded));
        let entries = entries.take_while(|(key, _)| key.as_str().starts_with(prefix));
        for (looked_at, (key, entry)) in (1..).zip(entries) {
            let goes_on = match self.visible(entry) {
                Some(entry) => visit(key, entry).is_continue(),
                None => true,
            };
            if !goes_on || looked_at >= most {
                return Some(key.clone());
            }
        }
        None
    }

    /// The clean entries, soonest expiry first.
    pub fn clean(&self) -> impl Iterator<Item = &(Instant, GroupKey)> {
        self.clean.iter()
    }

    /// The clean entry that expires first.
    pub fn first_clean(&self) -> Option<&(Instant, GroupKey)> {
        self.clean.first()
    }

    /// The dirty entry that expires first.
    pub fn first_dirty(&self) -> Option<&(Instant, GroupKey)> {
        self.dirty.first()
    }

    /// What the entry at `key` takes, dropped or not.
    pub fn cost_at(&self, key: &GroupKey) -> usize {
        self.by_key.get(key).map_or(0, |entry| entry.cost(key))
    }

    /// Puts an entry in place of what is there.
    pub fn put(&mut self, key: GroupKey, entry: Entry) {
        self.remove(&key);
        self.count(&key, &entry, |sum, n| *sum += n);
        let order = match entry.standing {
            Standing::Clean { .. } => &mut self.clean,
            Standing::Dirty { .. } => &mut self.dirty,
        };
        order.insert((entry.expires, key.clone()));
        self.by_key.insert(key, entry);
    }

    /// The documents that were removed since this was called last.
    pub fn take_removed(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.removed)
    }

    /// Removes the entry at a key: without its document, which is left to
    /// [`Self::take_removed`]. None also if it was dropped before.
    pub fn remove(&mut self, key: &GroupKey) -> Option<Entry> {
        let (key, mut entry) = self.by_key.remove_entry(key)?;
        self.count(&key, &entry, |sum, n| *sum -= n);
        if let Content::Document(json) = &mut entry.content {
            self.removed.push(std::mem::take(json));
        }
        if self.is_dropped(&entry) {
            return None;
        }
        let order = match entry.standing {
            Standing::Clean { .. } => &mut self.clean,
            Standing::Dirty { .. } => &mut self.dirty,
        };
        order.remove(&(entry.expires, key));
        Some(entry)
    }

    /// Drops every dirty entry, in one step. Their number.
    pub fn drop_dirty(&mut self) -> usize {
        let dropped = std::mem::take(&mut self.dirty);
        let count = dropped.len();
        if count > 0 {
            self.dropped.push_back(dropped);
            self.generation += 1;
        }
        let sums = &mut self.sums;
        sums.dropped_bytes += std::mem::take(&mut sums.dirty_bytes);
        sums.documents -= std::mem::take(&mut sums.dirty_documents);
        sums.traces -= std::mem::take(&mut sums.dirty_traces);
        count
    }

    /// Puts what is left of the entry at a key, if it was dropped, in its place: what
    /// was there before it was changed, or that Redis holds a group of which the content
    /// is unknown. Should Redis fail again before that is read, a delete must know that
    /// there is something to delete.
    ///
    /// To be called before an entry is changed. `epoch`: the one that goes on.
    pub fn settle(&mut self, key: &GroupKey, epoch: u64, now: Instant) {
        let (base, before) = match self.by_key.get(key).map(|entry| &entry.standing) {
            Some(standing @ Standing::Dirty { changed, .. })
                if standing.is_before(self.generation) =>
            {
                (changed.base, changed.before.clone())
            }
            _ => return,
        };
        self.remove(key);
        if let Some(before) = before {
            self.put(key.clone(), *before);
        } else if let Some((version, expires)) = base.filter(|(_, expires)| *expires > now) {
            let entry = Entry {
                content: Content::Unknown,
                version,
                expires,
                standing: Standing::Clean {
                    epoch,
                    seen: now,
                    ours: None,
                },
            };
            self.put(key.clone(), entry);
        }
    }

    /// Settles one of the keys whose entries were dropped. False if there is none.
    pub fn settle_one(&mut self, epoch: u64, now: Instant) -> bool {
        while let Some(order) = self.dropped.front_mut() {
            if let Some((_, key)) = order.pop_first() {
                self.settle(&key, epoch, now);
                return true;
            }
            self.dropped.pop_front();
        }
        false
    }

    fn is_dropped(&self, entry: &Entry) -> bool {
        entry.standing.is_before(self.generation)
    }

    /// Changes the sums by what an entry adds to them.
    fn count(&mut self, key: &GroupKey, entry: &Entry, change: impl Fn(&mut usize, usize)) {
        let dropped = self.is_dropped(entry);
        let dirty = matches!(entry.standing, Standing::Dirty { .. });
        let sums = &mut self.sums;
        let cost = entry.cost(key);
        change(&mut sums.bytes, cost);
        if dropped {
            change(&mut sums.dropped_bytes, cost);
            return;
        }
        let (all, of_dirty) = match entry.content {
            Content::Document(_) => (&mut sums.documents, &mut sums.dirty_documents),
            Content::Deleted | Content::Unknown => (&mut sums.traces, &mut sums.dirty_traces),
        };
        change(all, 1);
        if dirty {
            change(of_dirty, 1);
            change(&mut sums.dirty_bytes, cost);
        }
    }
}

#[cfg(test)]
impl Table {
    /// Panics unless the sums are those of the entries, and every entry is in
    /// exactly one of the orders.
    pub fn check(&self) {
        let mut expected = Sums::default();
        let (mut clean, mut dirty) = (Order::new(), Order::new());
        for (key, entry) in &self.by_key {
            let cost = entry.cost(key);
            expected.bytes += cost;
            if self.is_dropped(entry) {
                expected.dropped_bytes += cost;
                let is_to_be_settled =
                    |order: &Order| order.contains(&(entry.expires, key.clone()));
                assert!(self.dropped.iter().any(is_to_be_settled), "{key}");
                continue;
            }
            let is_document = matches!(entry.content, Content::Document(_));
            expected.documents += usize::from(is_document);
            expected.traces += usize::from(!is_document);
            let order = match entry.standing {
                Standing::Clean { .. } => &mut clean,
                Standing::Dirty { .. } => {
                    expected.dirty_documents += usize::from(is_document);
                    expected.dirty_traces += usize::from(!is_document);
                    expected.dirty_bytes += cost;
                    &mut dirty
                }
            };
            order.insert((entry.expires, key.clone()));
        }
        assert_eq!(self.sums, expected);
        assert_eq!((&self.clean, &self.dirty), (&clean, &dirty));
    }
}
