//! Changes that meet, and stores that fail in between.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use groupstate::{
    domain::{
        group::{AlertGroup, GroupKey},
        version::{InstanceId, Version},
    },
    manager::{AlertGroupManager, ManagerError, ManagerSettings, Outcome},
    store::{
        Backend, Deadline, Deletion, Expiry, GroupStore, KeyPage, LoadAll, Reply, StoreError,
        Stored, Swap, Written, documents::Documents, memory::MemoryStore,
    },
};
use tokio::task::JoinSet;

use crate::{add, alerts, common::stalls::within, firing, key, replica, replica_with, service};

/// What comes between a load and the swap that follows.
#[derive(Clone, Copy, Debug)]
enum Between {
    /// Somebody deletes the group.
    Delete,
    /// The swap is made, and its answer is lost.
    LoseAnswer,
    /// The service says that it is not there.
    Unavailable,
    /// The store is full.
    Full,
}

/// A memory store where something comes between, a few times.
struct Interrupted {
    store: Documents<MemoryStore>,
    between: Between,
    times: AtomicU32,
}

impl Interrupted {
    fn manager(between: Between, times: u32) -> AlertGroupManager {
        let instance = InstanceId::random();
        let memory = MemoryStore::new(1 << 20, instance.clone());
        let store = Self {
            store: Documents::new(memory, 1 << 20, instance),
            between,
            times: AtomicU32::new(times),
        };
        AlertGroupManager::new(Arc::new(store), ManagerSettings::default())
    }
}

#[async_trait]
impl GroupStore for Interrupted {
    fn backend(&self) -> Backend {
        self.store.backend()
    }

    async fn store(&self, group: &AlertGroup, expiry: Expiry, by: Deadline) -> Reply<Written> {
        self.store.store(group, expiry, by).await
    }

    async fn load(&self, key: &GroupKey, expiry: bool, by: Deadline) -> Reply<Option<Stored>> {
        self.store.load(key, expiry, by).await
    }

    async fn delete(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        by: Deadline,
    ) -> Reply<Deletion> {
        self.store.delete(key, expected, by).await
    }

    async fn compare_and_swap(
        &self,
        group: &AlertGroup,
        expected: Option<Version>,
        expiry: Expiry,
        by: Deadline,
    ) -> Reply<Swap> {
        let swap = self.store.compare_and_swap(group, expected, expiry, by);
        let less = |times: u32| times.checked_sub(1);
        let times = &self.times;
        if expected.is_none()
            || times
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
                .is_err()
        {
            return swap.await;
        }
        match self.between {
            Between::Delete => {
                self.store.delete(&group.key, None, by).await?;
                swap.await
            }
            Between::LoseAnswer => {
                swap.await?;
                Err(Backend::Memory.fails(StoreError::OutcomeUnknown))
            }
            Between::Unavailable => {
                Err(Backend::Memory.fails(StoreError::Unavailable("away".into())))
            }
            Between::Full => Err(Backend::Memory.fails(StoreError::MemoryFull { limit: 1 })),
        }
    }

    async fn store_all(
        &self,
        groups: &[AlertGroup],
        expiry: Expiry,
        by: Deadline,
    ) -> Vec<Reply<Written>> {
        self.store.store_all(groups, expiry, by).await
    }

    async fn list_keys(
        &self,
        prefix: &str,
        size: usize,
        token: Option<&str>,
        by: Deadline,
    ) -> Reply<KeyPage> {
        self.store.list_keys(prefix, size, token, by).await
    }

    async fn size(&self, prefix: &str, by: Deadline) -> Reply<u64> {
        self.store.size(prefix, by).await
    }

    async fn load_all(&self, prefix: &str, by: Deadline) -> Reply<LoadAll> {
        self.store.load_all(prefix, by).await
    }
}

/// The promise of the product.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_add_two_alerts_at_the_same_moment_and_both_are_there() {
    let (_redis, service) = service().await;
    let (one, other) = (replica(&[&service]).await, replica(&[&service]).await);
    for round in 0..200 {
        let name = format!("k/{round}");
        tokio::join!(
            add(&one, &name, vec![firing("a")]),
            add(&other, &name, vec![firing("b")]),
        );
        assert_eq!(alerts(&one, &name).await, ["a", "b"]);
    }
    let conflicts = one.stats().conflicts + other.stats().conflicts;
    assert!(conflicts > 0, "they have never met");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_replicas_change_one_group_and_every_alert_is_there() {
    let (_redis, service) = service().await;
    let mut running = JoinSet::new();
    // On a busy machine ten of them take longer than one change gets.
    let settings = ManagerSettings {
        change_timeout: Duration::from_secs(60),
        max_attempts: 500,
        ..ManagerSettings::default()
    };
    for number in 0..10 {
        let replica = replica_with(&[&service], settings.clone()).await;
        running.spawn(async move {
            for round in 0..20 {
                let fingerprint = format!("{number}/{round}");
                add(&replica, "k", vec![firing(&fingerprint)]).await;
            }
            replica.stats()
        });
    }
    let stats = running.join_all().await;
    let conflicts: u64 = stats.iter().map(|stats| stats.conflicts).sum();
    assert!(conflicts > 0);
    assert_eq!(alerts(&replica(&[&service]).await, "k").await.len(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alert_that_is_removed_while_another_is_added_stays_removed() {
    let (_redis, service) = service().await;
    let (one, other) = (replica(&[&service]).await, replica(&[&service]).await);
    for round in 0..50 {
        let name = format!("k/{round}");
        add(&one, &name, vec![firing("a"), firing("b")]).await;
        let key = key(&name);
        let (removed, ()) = tokio::join!(
            one.remove_alert(&key, "a"),
            add(&other, &name, vec![firing("c")]),
        );
        removed.unwrap();
        assert_eq!(alerts(&one, &name).await, ["b", "c"]);
    }
}

#[tokio::test]
async fn a_group_that_vanishes_in_between_is_created_anew_without_stale_alerts() {
    let manager = Interrupted::manager(Between::Delete, 1);
    add(&manager, "k", vec![firing("stale")]).await;
    let changed = manager
        .add_alerts(&key("k"), Vec::new(), vec![firing("new")])
        .await
        .unwrap();
    assert_eq!((changed.outcome, changed.attempts), (Outcome::Stored, 2));
    assert_eq!(alerts(&manager, "k").await, ["new"]);
}

#[tokio::test]
async fn a_lost_answer_is_looked_after_and_the_change_made_once() {
    let manager = Interrupted::manager(Between::LoseAnswer, 1);
    add(&manager, "k", vec![firing("a")]).await;
    let changed = manager
        .add_alerts(&key("k"), Vec::new(), vec![firing("b")])
        .await
        .unwrap();
    assert_eq!((changed.outcome, changed.attempts), (Outcome::Unchanged, 2));
    assert_eq!(alerts(&manager, "k").await, ["a", "b"]);
    assert_eq!(manager.stats().retried_failures, 1);
}

#[tokio::test]
async fn a_store_that_stays_away_is_given_up_and_the_caller_told() {
    let manager = Interrupted::manager(Between::Unavailable, u32::MAX);
    add(&manager, "k", vec![firing("a")]).await;
    let key = key("k");
    let change = manager.add_alerts(&key, Vec::new(), vec![firing("b")]);
    let given_up = within(Duration::from_secs(12), change).await;
    let given_up = given_up.expect("it ends within its time").unwrap_err();
    let ManagerError::GivenUp { attempts, last, .. } = &given_up else {
        panic!("{given_up:?}");
    };
    assert!(*attempts > 5, "{given_up}");
    assert!(last.contains("away"), "{given_up}");
    assert_eq!(manager.stats().failed, 1);
    assert_eq!(alerts(&manager, "k").await, ["a"]);
}

#[tokio::test]
async fn a_full_store_is_said_at_once() {
    let manager = Interrupted::manager(Between::Full, 1);
    add(&manager, "k", vec![firing("a")]).await;
    let refused = manager
        .add_alerts(&key("k"), Vec::new(), vec![firing("b")])
        .await;
    assert!(matches!(refused, Err(ManagerError::Refused { .. })));
    assert_eq!(manager.stats().attempts, 2);
}
