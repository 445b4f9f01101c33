//! One key, one instance: the instances of a service as one store.
//!
//! While Redis is down each instance has groups of its own. A change that reads
//! from one instance and writes to another would then go on losing races against
//! itself: A's version at B, B's at A. So the instance of a key is chosen by
//! rendezvous hashing, the same on every replica and in every language: of all
//! addresses the one with the greatest weight,
//!
//! ```text
//! weight(address, key) = mix(fnv_1a(address + "\n" + key))
//! ```
//!
//! with 64-bit FNV-1a and the 64-bit finalizer of MurmurHash3; of equal weights
//! the smaller address. An instance that cannot be reached is passed over until
//! it answers again, and only its own keys move meanwhile.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use async_trait::async_trait;
use thiserror::Error;

use super::{
    hash::{fnv_1a, mix},
    remote::{RemoteSettings, RemoteStore},
};
use crate::{
    domain::{
        group::{AlertGroup, GroupKey},
        version::Version,
    },
    store::{
        Backend, Deadline, Deletion, ErrorKind, Expiry, GroupStore, KeyPage, LoadAll, Reply,
        Stored, Swap, Written,
    },
};

/// The instances of a service. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Instances(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// `host:port` of each, as it was given; a host may stand for several
    /// addresses.
    targets: Vec<String>,
    settings: RemoteSettings,
    /// By address. Never empty.
    stores: RwLock<Arc<BTreeMap<String, RemoteStore>>>,
}

/// A call on its way round the instances.
struct Turn<'a> {
    instances: &'a Instances,
    key: &'a str,
    /// Whose turn it is.
    store: RemoteStore,
}

/// Why the instances of a service could not be found.
#[derive(Debug, Error)]
pub enum ResolveError {
    #[error("name at least one instance, as host:port")]
    NoTarget,
    #[error("{target}: {error}")]
    Resolve {
        target: String,
        error: std::io::Error,
    },
    #[error("{target}: no address has this name")]
    NoAddress { target: String },
    #[error("{address}: {error}")]
    Address {
        address: String,
        error: tonic::transport::Error,
    },
}

/// How often the names are looked up again.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(5);

/// Addresses in the order in which a key prefers them.
pub fn ranking<'a>(addresses: impl IntoIterator<Item = &'a str>, key: &str) -> Vec<&'a str> {
    let mut ranked: Vec<_> = addresses.into_iter().collect();
    ranked.sort_by_cached_key(|address| {
        let weight = mix(fnv_1a(format!("{address}\n{key}").as_bytes()));
        (std::cmp::Reverse(weight), *address)
    });
    ranked
}

// === impl Instances ===

impl Instances {
    /// Finds the instances of `targets`, each `host:port`: a headless Service of
    /// Kubernetes, or the instances one by one. Follows changes of the names
    /// until the last clone is dropped.
    ///
    /// Fails if a name cannot be looked up now. No instance needs to answer yet.
    pub async fn resolve(
        targets: impl IntoIterator<Item = impl Into<String>>,
        settings: RemoteSettings,
    ) -> Result<Self, ResolveError> {
        let targets: Vec<String> = targets.into_iter().map(Into::into).collect();
        if targets.is_empty() {
            return Err(ResolveError::NoTarget);
        }
        let stores = stores_at(addresses_of(&targets).await?, &settings, &BTreeMap::new())?;
        let shared = Arc::new(Shared {
            targets,
            settings,
            stores: RwLock::new(Arc::new(stores)),
        });
        let followed = Arc::downgrade(&shared);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(RESOLVE_INTERVAL).await;
                let Some(shared) = followed.upgrade() else {
                    return;
                };
                shared.resolve_again().await;
            }
        });
        Ok(Self(shared))
    }

    /// Addresses of the instances, in their order.
    pub fn addresses(&self) -> Vec<String> {
        self.0.stores().keys().cloned().collect()
    }

    /// The instance that has a key now: of those that can be reached, the one
    /// that the key prefers; if there is none, the one that it prefers of all.
    pub fn of(&self, key: &str) -> RemoteStore {
        let stores = self.0.stores();
        let ranked = ranking(stores.keys().map(String::as_str), key);
        let ranked: Vec<_> = ranked.iter().filter_map(|addr| stores.get(*addr)).collect();
        let up = ranked.iter().find(|store| !store.is_down());
        let store = up.or(ranked.first()).expect("there is an instance");
        (*store).clone()
    }

    fn turn<'a>(&'a self, key: &'a str) -> Turn<'a> {
        Turn {
            instances: self,
            key,
            store: self.of(key),
        }
    }
}

impl Turn<'_> {
    /// Whether the call should be made again, at the next instance: it surely
    /// was not made at this one, for want of a connection.
    fn passes_on<T>(&mut self, reply: &Reply<T>) -> bool {
        let failure = reply.as_ref().err();
        let unsent = failure.is_some_and(|failure| failure.error.kind() == ErrorKind::Unavailable);
        if !unsent || !self.store.is_down() {
            return false;
        }
        let next = self.instances.of(self.key);
        let passes_on = next.address() != self.store.address() && !next.is_down();
        self.store = next;
        passes_on
    }
}

impl Shared {
    fn stores(&self) -> Arc<BTreeMap<String, RemoteStore>> {
        // Only whole values are put there.
        let stores = self.stores.read().unwrap_or_else(PoisonError::into_inner);
        stores.clone()
    }

    /// Takes up what the names stand for now. Keeps what it knows if they
    /// cannot be looked up: a name server that fails must not take the service
    /// away.
    async fn resolve_again(&self) {
        let known = self.stores();
        let found = match addresses_of(&self.targets).await {
            Ok(addresses) => stores_at(addresses, &self.settings, &known),
            Err(error) => Err(error),
        };
        let stores = match found {
            Ok(stores) => stores,
            Err(error) => {
                tracing::warn!(%error, "instances are not looked up again; going on with those known");
                return;
            }
        };
        if stores.keys().ne(known.keys()) {
            let addresses: Vec<_> = stores.keys().collect();
            tracing::info!(?addresses, "the instances have changed");
            *self.stores.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(stores);
        }
    }
}

async fn addresses_of(targets: &[String]) -> Result<Vec<SocketAddr>, ResolveError> {
    let mut addresses = Vec::new();
    for target in targets {
        let found = tokio::net::lookup_host(target).await;
        let found = found.map_err(|error| ResolveError::Resolve {
            target: target.clone(),
            error,
        })?;
        let before = addresses.len();
        addresses.extend(found);
        if addresses.len() == before {
            return Err(ResolveError::NoAddress {
                target: target.clone(),
            });
        }
    }
    Ok(addresses)
}

/// Stores at these addresses; those that are known already stay as they are.
fn stores_at(
    addresses: Vec<SocketAddr>,
    settings: &RemoteSettings,
    known: &BTreeMap<String, RemoteStore>,
) -> Result<BTreeMap<String, RemoteStore>, ResolveError> {
    let store_at = |address: SocketAddr| {
        let address = address.to_string();
        let store = match known.get(&address) {
            Some(store) => store.clone(),
            None => RemoteStore::at(&address, settings.clone()).map_err(|error| {
                ResolveError::Address {
                    address: address.clone(),
                    error,
                }
            })?,
        };
        Ok((address, store))
    };
    addresses.into_iter().map(store_at).collect()
}

#[async_trait]
impl GroupStore for Instances {
    fn backend(&self) -> Backend {
        self.of("").backend()
    }

    fn pinned(&self, key: &GroupKey) -> Option<Arc<dyn GroupStore>> {
        Some(Arc::new(self.of(key.as_str())))
    }

    async fn store(
        &self,
        group: &AlertGroup,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Written> {
        let mut turn = self.turn(group.key.as_str());
        loop {
            let reply = turn.store.store(group, expiry, deadline).await;
            if !turn.passes_on(&reply) {
                return reply;
            }
        }
    }

    async fn load(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<Stored>> {
        let mut turn = self.turn(key.as_str());
        loop {
            let reply = turn.store.load(key, with_expiry, deadline).await;
            if !turn.passes_on(&reply) {
                return reply;
            }
        }
    }

    async fn delete(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion> {
        let mut turn = self.turn(key.as_str());
        loop {
            let reply = turn.store.delete(key, expected, deadline).await;
            if !turn.passes_on(&reply) {
                return reply;
            }
        }
    }

    async fn compare_and_swap(
        &self,
        group: &AlertGroup,
        expected: Option<Version>,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Swap> {
        let mut turn = self.turn(group.key.as_str());
        loop {
            let reply = turn
                .store
                .compare_and_swap(group, expected, expiry, deadline)
                .await;
            if !turn.passes_on(&reply) {
                return reply;
            }
        }
    }

    /// Each group at its own instance.
    async fn store_all(
        &self,
        groups: &[AlertGroup],
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>> {
        let mut parts: BTreeMap<String, (RemoteStore, Vec<usize>)> = BTreeMap::new();
        for (at, group) in groups.iter().enumerate() {
            let store = self.of(group.key.as_str());
            let part = parts.entry(store.address().to_owned());
            part.or_insert_with(|| (store, Vec::new())).1.push(at);
        }
        let mut replies: Vec<Option<Reply<Written>>> = vec![None; groups.len()];
        let asked = parts.into_values().map(|(store, places)| async move {
            let part: Vec<_> = places.iter().map(|at| groups[*at].clone()).collect();
            let part = store.store_all(&part, expiry, deadline).await;
            places.into_iter().zip(part).collect::<Vec<_>>()
        });
        for (at, reply) in futures::future::join_all(asked).await.into_iter().flatten() {
            replies[at] = Some(reply);
        }
        let missing = || {
            let bug = crate::store::StoreError::Bug("a group of a batch has no result".into());
            Err(self.backend().fails(bug))
        };
        let replies = replies.into_iter();
        replies.map(|reply| reply.unwrap_or_else(missing)).collect()
    }

    /// All instances list the same while Redis answers. One and the same is
    /// asked for all pages, as long as it can be reached.
    async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Reply<KeyPage> {
        let mut turn = self.turn("");
        loop {
            let reply = turn
                .store
                .list_keys(prefix, page_size, token, deadline)
                .await;
            if !turn.passes_on(&reply) {
                return reply;
            }
        }
    }

    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64> {
        let mut turn = self.turn("");
        loop {
            let reply = turn.store.size(prefix, deadline).await;
            if !turn.passes_on(&reply) {
                return reply;
            }
        }
    }

    async fn load_all(&self, prefix: &str, deadline: Deadline) -> Reply<LoadAll> {
        let mut turn = self.turn("");
        loop {
            let reply = turn.store.load_all(prefix, deadline).await;
            if !turn.passes_on(&reply) {
                return reply;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THREE: [&str; 3] = ["10.0.0.1:50051", "10.0.0.2:50051", "10.0.0.3:50051"];

    fn keys() -> impl Iterator<Item = String> {
        (0..3_000).map(|i| format!("alertname=A{i},cluster=prod"))
    }

    /// The examples in other languages are held to the same.
    #[test]
    fn every_language_ranks_alike() {
        #[derive(serde::Deserialize)]
        struct Vector {
            addresses: Vec<String>,
            key: String,
            ranking: Vec<String>,
        }
        let vectors = include_str!("../../tests/data/rendezvous-vectors.json");
        let vectors: Vec<Vector> = serde_json::from_str(vectors).unwrap();
        assert!(vectors.len() > 10);
        for vector in vectors {
            let addresses = vector.addresses.iter().map(String::as_str);
            assert_eq!(ranking(addresses, &vector.key), vector.ranking);
        }
    }

    /// The instances of a target once it was looked up, of which 10.0.0.1 was known.
    async fn instances_after_looking_up(target: &str) -> Vec<String> {
        let settings = RemoteSettings::default();
        let known = vec!["10.0.0.1:50051".parse().unwrap()];
        let stores = stores_at(known, &settings, &BTreeMap::new()).unwrap();
        let shared = Shared {
            targets: vec![target.to_owned()],
            settings,
            stores: RwLock::new(Arc::new(stores)),
        };
        shared.resolve_again().await;
        shared.stores().keys().map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn a_name_that_leads_elsewhere_is_followed() {
        let instances = instances_after_looking_up("10.0.0.2:50051").await;
        assert_eq!(instances, ["10.0.0.2:50051"]);
    }

    #[tokio::test]
    async fn a_name_that_cannot_be_looked_up_leaves_the_instances_as_they_are() {
        let instances = instances_after_looking_up("name.invalid:50051").await;
        assert_eq!(instances, ["10.0.0.1:50051"]);
    }

    #[test]
    fn keys_are_spread_evenly() {
        let firsts = keys().map(|key| ranking(THREE, &key)[0]);
        let mut counts = BTreeMap::new();
        for first in firsts {
            *counts.entry(first).or_insert(0) += 1;
        }
        // 1,000 each are expected, with a standard deviation of 26.
        let even = counts.values().all(|count| (870..1_130).contains(count));
        assert!(counts.len() == 3 && even, "{counts:?}");
    }

    #[test]
    fn only_the_keys_of_an_instance_that_goes_move() {
        for key in keys() {
            let three = ranking(THREE, &key);
            let two = ranking([THREE[2], THREE[0]], &key);
            let rest: Vec<_> = three.into_iter().filter(|addr| *addr != THREE[1]).collect();
            assert_eq!(two, rest);
        }
    }

    #[tokio::test]
    async fn names_are_looked_up_and_bad_ones_refused() {
        let resolve = |targets: Vec<&str>| {
            let targets: Vec<String> = targets.into_iter().map(Into::into).collect();
            Instances::resolve(targets, RemoteSettings::default())
        };
        let two = resolve(vec!["127.0.0.1:1", "127.0.0.1:2"]).await.unwrap();
        assert_eq!(two.addresses(), ["127.0.0.1:1", "127.0.0.1:2"]);
        for bad in [vec![], vec!["no.such.host.invalid:1"], vec!["127.0.0.1"]] {
            assert!(resolve(bad.clone()).await.is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn with_nobody_there_the_first_in_rank_is_asked() {
        let settings = RemoteSettings::default();
        let instances = Instances::resolve(["127.0.0.1:1", "127.0.0.1:2"], settings).await;
        let instances = instances.unwrap();
        let key = GroupKey::new("k").unwrap();
        let first = instances.of("k").address().to_owned();
        for _ in 0..3 {
            let failure = instances
                .load(&key, false, Deadline::NONE)
                .await
                .unwrap_err();
            assert_eq!(failure.error.kind(), ErrorKind::Unavailable);
        }
        assert_eq!(instances.of("k").address(), first);
        assert!(instances.of("k").is_down());
    }
}
