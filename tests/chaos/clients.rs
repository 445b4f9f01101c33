//! Clients that store, swap, delete and load all the time, and remember what
//! they were told.
//!
//! Each key goes to one instance only, as the contract asks of clients, but for those
//! that wander. A writer makes one call after the other; several writers run side by side.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use tonic::Code;

use super::{
    history::{Backend, Call, Content, Found, Key, Moment, Reply, Request, Role},
    wire::send,
};
use crate::common::service::Client;

/// The clock of a run, shared by all who take down moments.
#[derive(Clone, Copy, Debug)]
pub struct RunClock {
    pub began: Instant,
}

/// What the clients tell while they run.
#[derive(Default)]
pub struct Live {
    /// When each instance answered from Redis last, in microseconds.
    pub last_redis_answer: Vec<AtomicU64>,
    /// Calls that are over.
    pub calls: AtomicU64,
    /// No more groups that expire soon.
    pub stop_fleeting: AtomicBool,
    pub stop: AtomicBool,
}

/// A deliberate mistake of the client's side, to see whether the oracle notices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sabotage {
    #[default]
    None,
    /// The version check is off for one of two writers that share keys: what it
    /// believes to be a swap is sent as a Store.
    SwapsBecomeStores,
    /// Answers of memory are turned into UNAVAILABLE, as if there were no
    /// fallback.
    NoFallback,
}

/// Makes calls and takes them down.
pub struct Writer {
    pub number: usize,
    /// To which most of its calls go.
    pub instance: usize,
    /// Of each instance.
    pub clients: Vec<Client>,
    pub clock: RunClock,
    pub live: Arc<Live>,
    pub sabotage: Sabotage,
    /// Keys it shares with another writer of the same instance.
    pub shared: Vec<Key>,
    /// Whether it writes keys through any instance, too.
    pub wanders: bool,
    rng: StdRng,
    own: Vec<Key>,
    /// The key that it writes through any instance at the moment.
    wandering: Key,
    /// What it believes to be stored; no entry where it does not know.
    known: HashMap<Key, Option<Found>>,
    /// Writes so far: stamps and fingerprints come from it.
    writes: u64,
    calls: Vec<Call>,
}

/// Keys of its own that a writer has.
const OWN_KEYS: u32 = 12;
/// The pause between two calls, in microseconds: about 130 calls a second.
const PAUSE: std::ops::Range<u64> = 3_000..9_000;
/// Shared keys only grow.
const MOST_SHARED_ALERTS: usize = 80;
const MOST_ALERTS: usize = 8;
/// Attempts at a swap before something else is done.
const SWAP_ATTEMPTS: usize = 4;
/// A call whose time was up here may go on at the service for as long as its
/// clock began later. The next call must not meet it.
const AFTER_FAILURE: Duration = Duration::from_millis(60);

// === impl RunClock ===

impl RunClock {
    pub fn start() -> Self {
        Self {
            began: Instant::now(),
        }
    }

    pub fn now(&self) -> Moment {
        self.began.elapsed()
    }
}

// === impl Live ===

impl Live {
    pub fn new(instances: usize) -> Self {
        Self {
            last_redis_answer: (0..instances).map(|_| AtomicU64::new(0)).collect(),
            ..Self::default()
        }
    }

    /// Whether this instance has answered from Redis since.
    pub fn answered_from_redis_since(&self, instance: usize, since: Moment) -> bool {
        let last = self.last_redis_answer[instance].load(Ordering::Relaxed);
        Duration::from_micros(last) >= since
    }
}

// === impl Writer ===

impl Writer {
    pub fn new(
        number: usize,
        instance: usize,
        clients: Vec<Client>,
        clock: RunClock,
        live: Arc<Live>,
        seed: u64,
    ) -> Self {
        let own = |number_of_key| Key {
            role: Role::Own,
            owner: number,
            number: number_of_key,
        };
        Self {
            number,
            instance,
            clients,
            clock,
            live,
            sabotage: Sabotage::None,
            shared: Vec::new(),
            wanders: false,
            // Each writer of each seed does something else.
            rng: StdRng::seed_from_u64(seed.wrapping_mul(1_000) + number as u64),
            own: (0..OWN_KEYS).map(own).collect(),
            wandering: Key {
                role: Role::Wandering,
                owner: number,
                number: 0,
            },
            known: HashMap::new(),
            writes: 0,
            calls: Vec::new(),
        }
    }

    /// Makes calls until it is told to stop. Returns all of them, in order.
    pub async fn run(mut self) -> Vec<Call> {
        for key in self.own.clone() {
            self.store(key).await;
        }
        while !self.live.stop.load(Ordering::Relaxed) {
            self.do_something().await;
            let pause = Duration::from_micros(self.rng.random_range(PAUSE));
            tokio::time::sleep(pause).await;
        }
        self.calls
    }

    async fn do_something(&mut self) {
        let key = *self.own.choose(&mut self.rng).expect("it has keys");
        match self.rng.random_range(0..100) {
            0..=34 => self.swap(key).await,
            35..=54 => self.store(key).await,
            55..=59 => self.delete(key, None).await,
            60..=65 => match self.known.get(&key) {
                Some(Some(found)) => {
                    let expected = Some(found.version);
                    self.delete(key, expected).await;
                }
                _ => self.load(key).await,
            },
            66..=67 => self.store_fleeting().await,
            68..=75 => match self.shared.choose(&mut self.rng) {
                Some(shared) => self.add_to_shared(*shared).await,
                None => self.load(key).await,
            },
            84.. if self.wanders => self.wander().await,
            _ => self.load(key).await,
        }
    }

    /// Makes a call on the key that wanders, through any instance, and takes another key
    /// now and then: of some the last that happens is that they are deleted, or expire.
    async fn wander(&mut self) {
        let key = self.wandering;
        let via = self.rng.random_range(0..self.clients.len());
        let stored = self.known.get(&key).cloned().flatten();
        let (request, is_last) = match self.rng.random_range(0..100) {
            0..=24 => (Request::Store(self.new_content(None)), false),
            25..=54 => {
                let content = self.new_content(stored.as_ref().map(|found| &found.content));
                let expected = stored.map_or(0, |found| found.version);
                (Request::Swap { content, expected }, false)
            }
            55..=64 => (Request::Delete { expected: None }, self.rng.random()),
            65..=69 if !self.live.stop_fleeting.load(Ordering::Relaxed) => {
                (Request::StoreBriefly(self.new_content(None)), true)
            }
            70..=74 => (Request::Load, true),
            _ => (Request::Load, false),
        };
        let is_write = request != Request::Load;
        self.call_through(via, key, request).await;
        // What Redis has not acknowledged nobody else has to know.
        let last = self.calls.last().expect("it has just called");
        let is_known = last.backend() == Some(Backend::Redis);
        if is_last || is_write && !is_known {
            self.known.remove(&key);
            self.wandering.number += 1;
        } else if !is_known {
            // Memory knows what its own instance has seen.
            self.known.remove(&key);
        }
    }

    async fn load(&mut self, key: Key) {
        self.call(key, Request::Load).await;
    }

    async fn store(&mut self, key: Key) {
        let alerts = self.rng.random_range(1..4);
        let mut content = self.new_content(None);
        for _ in 1..alerts {
            let fingerprint = self.new_fingerprint();
            content.alerts.insert(fingerprint, 0);
        }
        self.call(key, Request::Store(content)).await;
    }

    /// Stores a group under a key of its own that is not touched again.
    async fn store_fleeting(&mut self) {
        if self.live.stop_fleeting.load(Ordering::Relaxed) {
            return;
        }
        let content = self.new_content(None);
        let key = Key {
            role: Role::Fleeting,
            owner: self.number,
            number: u32::try_from(content.stamp).expect("a run is short"),
        };
        self.call(key, Request::StoreBriefly(content)).await;
    }

    async fn delete(&mut self, key: Key, expected: Option<i64>) {
        self.call(key, Request::Delete { expected }).await;
    }

    /// Adds an alert to what is stored and changes it in other ways, again after
    /// each lost race.
    async fn swap(&mut self, key: Key) {
        for _ in 0..SWAP_ATTEMPTS {
            let Some(found) = self.known(key).await else {
                return;
            };
            let mut content = self.new_content(found.as_ref().map(|found| &found.content));
            let fingerprints: Vec<String> = content.alerts.keys().cloned().collect();
            if self.rng.random_bool(0.3)
                && let Some(fingerprint) = fingerprints.choose(&mut self.rng)
            {
                *content.alerts.entry(fingerprint.clone()).or_default() += 1;
            }
            if content.alerts.len() > MOST_ALERTS {
                for fingerprint in &fingerprints[..MOST_ALERTS / 2] {
                    content.alerts.remove(fingerprint);
                }
            }
            let expected = found.map_or(0, |found| found.version);
            if self.call(key, Request::Swap { content, expected }).await {
                return;
            }
        }
    }

    /// Adds an alert, and does nothing else.
    async fn add_to_shared(&mut self, key: Key) {
        for _ in 0..SWAP_ATTEMPTS {
            let Some(found) = self.known(key).await else {
                return;
            };
            if found.as_ref().map_or(0, |found| found.content.alerts.len()) >= MOST_SHARED_ALERTS {
                return self.load(key).await;
            }
            let content = self.new_content(found.as_ref().map(|found| &found.content));
            let expected = found.map_or(0, |found| found.version);
            if self.call(key, Request::Swap { content, expected }).await {
                return;
            }
        }
    }

    /// What is stored as far as it knows; loads it if it does not. None when the
    /// service could not say.
    async fn known(&mut self, key: Key) -> Option<Option<Found>> {
        if !self.known.contains_key(&key) {
            self.load(key).await;
        }
        self.known.get(&key).cloned()
    }

    /// What was stored with one more alert, under a new stamp.
    fn new_content(&mut self, stored: Option<&Content>) -> Content {
        let mut alerts = stored
            .map(|stored| stored.alerts.clone())
            .unwrap_or_default();
        alerts.insert(self.new_fingerprint(), 0);
        // Two writers share the stamps of a key.
        let stamp = self.writes << 8 | self.number as u64;
        Content { stamp, alerts }
    }

    /// Increasing by name too, so that the oldest are the first of a group.
    fn new_fingerprint(&mut self) -> String {
        self.writes += 1;
        format!("{:08x}-{}", self.writes, self.number)
    }

    /// Makes a call, takes it down, and learns from it. True if it succeeded.
    async fn call(&mut self, key: Key, request: Request) -> bool {
        self.call_through(self.instance, key, request).await
    }

    async fn call_through(&mut self, via: usize, key: Key, request: Request) -> bool {
        let deadline = self.rng.random_bool(0.1).then(|| {
            let millis = self.rng.random_range(300..1_000);
            Duration::from_millis(millis)
        });
        let begin = self.clock.now();
        // One of two writers is enough to break what they share.
        let unchecked = self.sabotage == Sabotage::SwapsBecomeStores
            && key.role == Role::Shared
            && self.number == 0;
        let sent = match &request {
            Request::Swap { content, .. } if unchecked => &Request::Store(content.clone()),
            request => request,
        };
        let mut reply = send(&mut self.clients[via], key, sent, deadline).await;
        let end = self.clock.now();
        if self.sabotage == Sabotage::NoFallback {
            forget_fallback(&mut reply);
        }
        let call = Call {
            key,
            instance: via,
            request,
            deadline,
            begin,
            end,
            reply,
        };
        if call.backend() == Some(Backend::Redis) {
            let micros = u64::try_from(begin.as_micros()).expect("a run is short");
            self.live.last_redis_answer[via].fetch_max(micros, Ordering::Relaxed);
        }
        let succeeded = self.learn(&call);
        let failed = call.backend().is_none();
        self.calls.push(call);
        self.live.calls.fetch_add(1, Ordering::Relaxed);
        if failed {
            tokio::time::sleep(AFTER_FAILURE).await;
        }
        succeeded
    }

    /// Draws what is known of a key from a reply. True if a write succeeded.
    fn learn(&mut self, call: &Call) -> bool {
        let known = match (&call.reply, &call.request) {
            (Reply::Written { version, .. }, request) => {
                let content = request.outcome().flatten().cloned();
                content.map(|content| Found {
                    content,
                    version: *version,
                })
            }
            (Reply::Shown { found, .. }, _) => found.clone(),
            (Reply::Deleted { .. } | Reply::NotDeleted { version: 0, .. }, _) => None,
            (Reply::NotDeleted { .. } | Reply::Failed { .. }, _) => {
                self.known.remove(&call.key);
                return false;
            }
        };
        self.known.insert(call.key, known);
        call.changed()
    }
}

/// What a client would have been told without a fallback.
fn forget_fallback(reply: &mut Reply) {
    let (Reply::Written { backend, .. }
    | Reply::Shown { backend, .. }
    | Reply::Deleted { backend, .. }
    | Reply::NotDeleted { backend, .. }) = reply
    else {
        return;
    };
    if *backend == Backend::Memory {
        *reply = Reply::Failed {
            code: Code::Unavailable,
            reason: "UNAVAILABLE".into(),
            message: String::new(),
        };
    }
}
