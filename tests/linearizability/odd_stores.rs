//! Stores with a quirk. Most break a promise, to see that the check notices.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use groupstate::{
    domain::{
        group::{AlertGroup, GroupKey},
        version::{InstanceId, Version},
    },
    store::{
        Backend, Deadline, Deletion, Expiry, Failure, GroupStore, KeyPage, LoadAll, Reply,
        StoreError, Stored, Swap, Written, documents::Documents, memory::MemoryStore,
    },
};

use crate::workload::Store;

/// What a store does that others do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// CompareAndSwap writes whatever is stored.
    SwapsBlindly,
    /// CompareAndSwap creates where something is stored.
    CreatesOverOthers,
    /// Delete removes any version when it is asked for one.
    DeletesAnyVersion,
    /// A write whose answer was lost is made again, as if it were another one.
    RepeatsLostWrites,
    /// A CompareAndSwap whose answer was lost says that it was refused.
    CallsLostSwapsRefused,
    /// Some Loads give what an earlier one has found.
    LoadsWhatItRemembers,
    /// Memory answers some calls, and says so. This breaks no promise.
    LetsMemoryAnswer,
}

/// A good store, and what happens in front of it.
pub struct OddStore {
    redis: Store,
    memory: Store,
    quirk: Quirk,
    /// Counts the calls, of which only some meet the quirk.
    calls: AtomicUsize,
    /// What the last Load of a key has found.
    remembered: Mutex<HashMap<GroupKey, Option<Stored>>>,
}

// === impl OddStore ===

impl OddStore {
    /// Of so many calls, one is remembered or answered from memory.
    const ONE_IN: usize = 8;

    pub fn wrap(redis: Store, quirk: Quirk) -> Store {
        let instance = InstanceId::random();
        let memory = MemoryStore::new(1 << 20, instance.clone());
        Arc::new(Self {
            redis,
            memory: Arc::new(Documents::new(memory, 1 << 20, instance)),
            quirk,
            calls: AtomicUsize::new(0),
            remembered: Mutex::default(),
        })
    }

    /// Whether this call meets a quirk that is not always there.
    fn now_and_then(&self, quirk: Quirk) -> bool {
        let is_its_turn = || {
            let call = self.calls.fetch_add(1, Ordering::Relaxed);
            call.is_multiple_of(Self::ONE_IN)
        };
        self.quirk == quirk && is_its_turn()
    }

    /// The store that answers the next call.
    fn store(&self) -> &Store {
        if self.now_and_then(Quirk::LetsMemoryAnswer) {
            &self.memory
        } else {
            &self.redis
        }
    }

    /// Whether the write is made again.
    fn repeats<T>(&self, reply: &Reply<T>) -> bool {
        self.quirk == Quirk::RepeatsLostWrites && is_lost(reply)
    }

    fn swaps_blindly(&self, expected: Option<Version>) -> bool {
        match self.quirk {
            Quirk::SwapsBlindly => true,
            Quirk::CreatesOverOthers => expected.is_none(),
            _ => false,
        }
    }
}

fn is_lost<T>(reply: &Reply<T>) -> bool {
    let lost = StoreError::OutcomeUnknown;
    matches!(reply, Err(Failure { error, .. }) if *error == lost)
}

#[async_trait]
impl GroupStore for OddStore {
    fn backend(&self) -> Backend {
        self.redis.backend()
    }

    async fn store(
        &self,
        group: &AlertGroup,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Written> {
        let store = || self.store().store(group, expiry, deadline);
        let reply = store().await;
        if self.repeats(&reply) {
            return store().await;
        }
        reply
    }

    async fn load(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<Stored>> {
        if self.now_and_then(Quirk::LoadsWhatItRemembers)
            && let Some(found) = self.remembered.lock().unwrap().get(key)
        {
            return Ok(Backend::Redis.answers(found.clone()));
        }
        let answer = self.store().load(key, with_expiry, deadline).await?;
        let mut remembered = self.remembered.lock().unwrap();
        remembered.insert(key.clone(), answer.value.clone());
        Ok(answer)
    }

    async fn delete(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion> {
        let expected = expected.filter(|_| self.quirk != Quirk::DeletesAnyVersion);
        let delete = || self.store().delete(key, expected, deadline);
        let reply = delete().await;
        if self.repeats(&reply) {
            return delete().await;
        }
        reply
    }

    async fn compare_and_swap(
        &self,
        group: &AlertGroup,
        expected: Option<Version>,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Swap> {
        if self.swaps_blindly(expected) {
            let written = self.redis.store(group, expiry, deadline).await?;
            return Ok(written.map(Swap::Swapped));
        }
        let swap = || {
            let store = self.store();
            store.compare_and_swap(group, expected, expiry, deadline)
        };
        let reply = swap().await;
        if self.repeats(&reply) {
            return swap().await;
        }
        if self.quirk == Quirk::CallsLostSwapsRefused && is_lost(&reply) {
            let found = self.redis.load(&group.key, false, Deadline::NONE).await?;
            let lost = |stored: Stored| Box::new(stored.group);
            return Ok(found.map(|found| Swap::Lost {
                current: found.map(lost),
            }));
        }
        reply
    }

    // No history holds the calls below; they meet no quirk.

    async fn store_all(
        &self,
        groups: &[AlertGroup],
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>> {
        self.redis.store_all(groups, expiry, deadline).await
    }

    async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Reply<KeyPage> {
        let pages = self.redis.list_keys(prefix, page_size, token, deadline);
        pages.await
    }

    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64> {
        self.redis.size(prefix, deadline).await
    }

    async fn load_all(&self, prefix: &str, deadline: Deadline) -> Reply<LoadAll> {
        self.redis.load_all(prefix, deadline).await
    }
}
