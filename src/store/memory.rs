//! The memory store: a bounded, expiring map of documents.
//!
//! It is the whole store when no Redis is configured. Groups lie here as the
//! JSON documents that Redis would hold, since parsed groups take several
//! times the space.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::time::Instant;

use super::{
    Backend, Deadline, Deletion, Expiry, Failure, KeyPage, Reply, StoreError, Written,
    documents::{Condition, DocumentBatch, DocumentStore, ReadAll, StoredDocument, WriteOutcome},
    page_token::PageToken,
};
use crate::{
    document::{Document, DocumentHead},
    group::{GroupKey, Time},
    version::{InstanceId, MemoryVersions, Version, WriteIds},
};

const BACKEND: Backend = Backend::Memory;

/// Keeps documents in this process. Cheap to clone: clones share the groups.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// A plain mutex: it is held for microseconds and never across an await.
    groups: Mutex<Groups>,
    /// The sum of [`Entry::cost`] stays at or below this.
    max_bytes: usize,
    versions: MemoryVersions,
    write_ids: Arc<WriteIds>,
    /// Page tokens name it: a restart ends all listings.
    instance: InstanceId,
}

#[derive(Debug, Default)]
struct Groups {
    by_key: BTreeMap<GroupKey, Entry>,
    /// Every entry of `by_key` once, soonest first.
    by_expiry: BTreeSet<(Instant, GroupKey)>,
    /// Sum of the costs of all entries.
    bytes: usize,
}

#[derive(Clone, Debug)]
struct Entry {
    json: Bytes,
    version: Version,
    /// On the monotonic clock, so that a wall clock that is set does not
    /// expire groups.
    expires: Instant,
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
    pub fn new(max_bytes: usize, instance: InstanceId, write_ids: Arc<WriteIds>) -> Self {
        Self {
            shared: Arc::new(Shared {
                groups: Mutex::default(),
                max_bytes,
                versions: MemoryVersions::new(),
                write_ids,
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
                Some(shared) => shared.lock().sweep(Instant::now()),
                None => return,
            }
        }
    }

    /// Number of groups held, expired ones that were not yet swept included.
    pub fn entries(&self) -> usize {
        self.shared.lock().by_key.len()
    }

    /// Bytes of documents and overhead held.
    pub fn bytes(&self) -> usize {
        self.shared.lock().bytes
    }
}

#[async_trait]
impl DocumentStore for MemoryStore {
    fn backend(&self) -> Backend {
        BACKEND
    }

    async fn write(
        &self,
        head: &DocumentHead,
        condition: Condition,
        expiry: Expiry,
        _: Deadline,
    ) -> Reply<WriteOutcome> {
        match self.shared.write(head, condition, expiry) {
            Ok(outcome) => Ok(BACKEND.answers(outcome)),
            Err(error) => Err(BACKEND.fails(error)),
        }
    }

    async fn read(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        _: Deadline,
    ) -> Reply<Option<StoredDocument>> {
        let now = Instant::now();
        let entry = self.shared.lock().get(key, now).cloned();
        Ok(BACKEND.answers(entry.map(|entry| StoredDocument {
            document: entry.document(key),
            expires_at: if with_expiry {
                wall_clock(entry.expires, now)
            } else {
                None
            },
        })))
    }

    async fn remove(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        _: Deadline,
    ) -> Reply<Deletion> {
        let mut groups = self.shared.lock();
        let found = groups.get(key, Instant::now()).map(|entry| entry.version);
        let deleted = match (found, expected) {
            (Some(found), Some(expected)) => found == expected,
            (found, _) => found.is_some(),
        };
        if deleted {
            groups.remove(key);
        }
        Ok(BACKEND.answers(Deletion {
            deleted,
            version: found,
        }))
    }

    async fn write_all(
        &self,
        heads: &[DocumentHead],
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>> {
        let mut replies = Vec::with_capacity(heads.len());
        for head in heads {
            let reply = self.write(head, Condition::Any, expiry, deadline).await;
            replies.push(reply.and_then(|answer| match answer.value {
                WriteOutcome::Written(written) => Ok(BACKEND.answers(written)),
                WriteOutcome::Conflict { .. } => Err(BACKEND.fails(StoreError::Bug(
                    "an unconditional write met a conflict".into(),
                ))),
            }));
        }
        replies
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
        Ok(BACKEND.answers(self.shared.page(prefix, page_size, after.as_ref())))
    }

    async fn size(&self, prefix: &str, _: Deadline) -> Reply<u64> {
        let count = self
            .shared
            .lock()
            .range(prefix, None, Instant::now())
            .count();
        Ok(BACKEND.answers(count as u64))
    }

    async fn read_all(&self, prefix: &str, _: Deadline) -> Reply<ReadAll> {
        let state = Some((self.shared.clone(), prefix.to_owned(), None));
        let batches = stream::try_unfold(state, |state| async move {
            let Some((shared, prefix, after)) = state else {
                return Ok::<_, Failure>(None);
            };
            let (documents, last) = shared.batch(&prefix, after.as_ref());
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

// === impl Shared ===

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Groups> {
        // Every change below is complete before anything that could panic.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(
        &self,
        head: &DocumentHead,
        condition: Condition,
        expiry: Expiry,
    ) -> Result<WriteOutcome, StoreError> {
        let write_id = self.write_ids.next();
        let now = Instant::now();
        let mut groups = self.lock();
        let found = groups.get(head.key(), now);
        let holds = match condition {
            Condition::Any => true,
            Condition::Absent => found.is_none(),
            Condition::Version(version) => found.is_some_and(|entry| entry.version == version),
        };
        if !holds {
            return Ok(WriteOutcome::Conflict {
                current: found.map(|entry| entry.document(head.key())),
            });
        }

        let previous = found.map(|entry| entry.version);
        let expires = match (expiry, found) {
            (Expiry::Keep { .. }, Some(entry)) => entry.expires,
            (Expiry::Keep { otherwise: ttl }, None) | (Expiry::After(ttl), _) => now + ttl,
        };
        let version = self
            .versions
            .next(previous, micros_since_1970())
            .ok_or_else(|| {
                StoreError::VersionOutOfRange(
                    previous.map_or_else(String::new, |version| version.to_string()),
                )
            })?;
        let document = head.finish(&write_id, version);
        let entry = Entry {
            json: document.json,
            version,
            expires,
        };
        groups.insert(document.key, entry, self.max_bytes, now)?;
        Ok(WriteOutcome::Written(Written {
            version,
            expires_at: wall_clock(expires, now),
        }))
    }

    fn page(&self, prefix: &str, page_size: usize, after: Option<&GroupKey>) -> KeyPage {
        let groups = self.lock();
        let mut rest = groups.range(prefix, after, Instant::now()).peekable();
        let mut keys: Vec<GroupKey> = Vec::new();
        let mut bytes = 0;
        while keys.len() < page_size
            && bytes < MemoryStore::PAGE_BYTES
            && let Some((key, _)) = rest.next()
        {
            bytes += key.as_str().len();
            keys.push(key.clone());
        }
        let next = match (rest.peek(), keys.last()) {
            (Some(_), Some(last)) => Some(
                PageToken {
                    backend: BACKEND,
                    server: self.instance.as_str().to_owned(),
                    cursor: last.to_string(),
                    prefix: prefix.to_owned(),
                }
                .encode(),
            ),
            _ => None,
        };
        KeyPage { keys, next }
    }

    /// Some documents after `after`, and the last key of them unless they are
    /// the last.
    fn batch(&self, prefix: &str, after: Option<&GroupKey>) -> (Vec<Document>, Option<GroupKey>) {
        let groups = self.lock();
        let mut documents = Vec::new();
        let mut bytes = 0;
        for (key, entry) in groups.range(prefix, after, Instant::now()) {
            bytes += entry.json.len();
            documents.push(entry.document(key));
            if bytes >= MemoryStore::BATCH_BYTES {
                return (documents, Some(key.clone()));
            }
        }
        (documents, None)
    }
}

// === impl Groups ===

impl Groups {
    fn get(&self, key: &GroupKey, now: Instant) -> Option<&Entry> {
        self.by_key.get(key).filter(|entry| entry.expires > now)
    }

    /// Entries whose key begins with `prefix`, in order, beyond `after`.
    fn range<'a>(
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
            .filter(move |(_, entry)| entry.expires > now)
    }

    /// Puts an entry in place of what is there, unless that would take more
    /// than `max_bytes`.
    fn insert(
        &mut self,
        key: GroupKey,
        entry: Entry,
        max_bytes: usize,
        now: Instant,
    ) -> Result<(), StoreError> {
        let cost = entry.cost(&key);
        let freed = self.by_key.get(&key).map_or(0, |old| old.cost(&key));
        if self.bytes - freed + cost > max_bytes {
            self.sweep(now);
            let freed = self.by_key.get(&key).map_or(0, |old| old.cost(&key));
            if self.bytes - freed + cost > max_bytes {
                return Err(StoreError::MemoryFull { limit: max_bytes });
            }
        }
        self.remove(&key);
        self.bytes += cost;
        self.by_expiry.insert((entry.expires, key.clone()));
        self.by_key.insert(key, entry);
        Ok(())
    }

    fn remove(&mut self, key: &GroupKey) {
        if let Some((key, entry)) = self.by_key.remove_entry(key) {
            self.bytes -= entry.cost(&key);
            self.by_expiry.remove(&(entry.expires, key));
        }
    }

    /// Removes what has expired.
    fn sweep(&mut self, now: Instant) {
        while let Some((expires, key)) = self.by_expiry.first()
            && *expires <= now
        {
            let key = key.clone();
            self.remove(&key);
        }
    }
}

// === impl Entry ===

impl Entry {
    /// What an entry takes besides its key and its document: nodes of the two
    /// trees, reference counts, allocator headers.
    const OVERHEAD_BYTES: usize = 240;

    fn cost(&self, key: &GroupKey) -> usize {
        key.as_str().len() + self.json.len() + Self::OVERHEAD_BYTES
    }

    fn document(&self, key: &GroupKey) -> Document {
        Document {
            key: key.clone(),
            json: self.json.clone(),
        }
    }
}

/// `moment` on the wall clock; None if that is beyond the year 9999.
fn wall_clock(moment: Instant, now: Instant) -> Option<Time> {
    let left = i64::try_from(moment.saturating_duration_since(now).as_millis()).ok()?;
    Time::from_millis(Time::now().millis().checked_add(left)?).ok()
}

fn micros_since_1970() -> i64 {
    let now = Time::now();
    now.seconds() * 1_000_000 + i64::from(now.nanos() / 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{AlertGroup, GroupMetadata};

    fn store(max_bytes: usize) -> MemoryStore {
        let instance = InstanceId::random();
        let write_ids = Arc::new(WriteIds::new(instance.clone()));
        MemoryStore::new(max_bytes, instance, write_ids)
    }

    fn head(key: &str) -> DocumentHead {
        DocumentHead::new(&AlertGroup {
            key: GroupKey::new(key).unwrap(),
            alerts: BTreeMap::new(),
            metadata: GroupMetadata::default(),
        })
    }

    async fn write(store: &MemoryStore, key: &str, ttl: Duration) -> Reply<WriteOutcome> {
        let expiry = Expiry::After(ttl);
        store
            .write(&head(key), Condition::Any, expiry, Deadline::NONE)
            .await
    }

    #[tokio::test(start_paused = true)]
    async fn expired_groups_give_their_memory_back_without_being_asked_for() {
        let store = store(1 << 20);
        tokio::spawn(store.clone().sweep_forever());
        write(&store, "a", Duration::from_secs(1)).await.unwrap();
        write(&store, "b", Duration::from_secs(5)).await.unwrap();
        assert_eq!(store.entries(), 2);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(store.entries(), 1);
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert_eq!((store.entries(), store.bytes()), (0, 0));
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
        assert_eq!(store.entries(), 2);
        write(&store, "a", Duration::from_secs(1)).await.unwrap();
        // Room that an expired group holds is used before anything is refused.
        tokio::time::advance(Duration::from_secs(2)).await;
        write(&store, "c", Duration::from_secs(9)).await.unwrap();
        assert_eq!(store.entries(), 2);
    }

    #[tokio::test]
    async fn overwriting_and_deleting_leave_no_bytes_behind() {
        let store = store(1 << 20);
        for _ in 0..3 {
            write(&store, "a", Duration::from_secs(9)).await.unwrap();
        }
        let key = GroupKey::new("a").unwrap();
        store.remove(&key, None, Deadline::NONE).await.unwrap();
        assert_eq!((store.entries(), store.bytes()), (0, 0));
        assert!(store.shared.lock().by_expiry.is_empty());
    }
}
