//! Clients of three instances that write the same few keys, on a bad day.

use std::{
    collections::HashSet,
    ops::AddAssign,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use groupstate::{
    domain::{
        group::GroupKey,
        version::{InstanceId, Version},
    },
    store::{
        Backend, Deadline, Expiry, GroupStore,
        documents::Documents,
        redis::{RedisFiles, RedisLimits, RedisSettings, RedisStore},
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    common::{
        lossy_proxy::{LossyProxy, Weather},
        redis_server::RedisServer,
    },
    history::{Act, Call, Content, Outcome, Seen, Swapped, assert_says_nothing},
};

pub type Store = Arc<dyn GroupStore>;

const INSTANCES: u64 = 3;
const CLIENTS_PER_INSTANCE: u64 = 4;

const MAX_DOCUMENT_BYTES: usize = 1 << 20;
const HOUR: Expiry = Expiry::After(Duration::from_secs(3_600));

/// How a history comes about.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Decides what the clients do and what the proxies lose. Not when: two
    /// histories of one seed are alike, not equal.
    pub seed: u64,
    /// The clients stop when so many calls were answered.
    pub answered_calls: usize,
    pub keys: usize,
    pub weather: Weather,
    /// The proxies lift the deadlines of writes, so that Redis executes them
    /// however late they come: a deliberate mistake.
    pub deadlines_lifted: bool,
}

/// What happened.
pub struct History {
    /// The calls on each key.
    pub calls: Vec<Vec<Call>>,
    pub tally: Tally,
}

/// Numbers that tell whether a history is worth checking.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Calls that were made.
    pub calls: usize,
    /// Those that Redis answered.
    pub answered: usize,
    /// Compare-and-swaps and deletes by version that came too late.
    pub conflicts: usize,
    /// Writes whose clients do not know what they did.
    pub unknown: usize,
    /// Answers of another backend than Redis.
    pub from_memory: usize,
    /// Replies that a proxy has swallowed.
    pub lost_replies: usize,
    /// Writes whose reply was swallowed, and whose client was told the version
    /// all the same: the repeated write was recognised by its write id.
    pub recognised: usize,
    /// Writes that reached Redis after their connection was closed, and were
    /// refused because they were late.
    pub refused_late: usize,
    /// Writes whose deadlines were lifted.
    pub lifted: usize,
}

/// One client: it makes one call after another.
struct Client {
    store: Store,
    shared: Arc<Shared>,
    dice: StdRng,
    /// The version of each key of which it heard last. Others write meanwhile,
    /// so what it expects is often out of date.
    heard_of: Vec<Option<Version>>,
    /// Its calls, each with the place of its key.
    journal: Vec<(usize, Call)>,
    tally: Tally,
}

/// What all clients share.
struct Shared {
    keys: Vec<GroupKey>,
    /// The number of the next event.
    next_event: AtomicU64,
    answered: AtomicUsize,
}

/// Makes a history on keys that no other seed uses. `wrap` may put something
/// between the clients of an instance and its store.
pub async fn make_history(
    server: &RedisServer,
    plan: Plan,
    wrap: impl Fn(Store) -> Store,
) -> History {
    let keys = (0..plan.keys).map(|at| format!("history {}/{at}", plan.seed));
    let shared = Arc::new(Shared {
        keys: keys.map(|key| GroupKey::new(key).unwrap()).collect(),
        next_event: AtomicU64::new(0),
        answered: AtomicUsize::new(0),
    });
    let mut clients = JoinSet::new();
    let mut proxies = Vec::new();
    for instance in 0..INSTANCES {
        let proxy = LossyProxy::start(server.addr(), plan.seed * 10 + instance).await;
        let store = wrap(store_at(&proxy.url()).await);
        proxy.set_weather(plan.weather);
        if plan.deadlines_lifted {
            proxy.late_requests().lift_deadlines();
        }
        proxies.push(proxy);
        for client in 0..CLIENTS_PER_INSTANCE {
            let seed = plan.seed * 100 + instance * 10 + client;
            let client = Client::new(store.clone(), shared.clone(), seed);
            clients.spawn(client.make_calls(plan.answered_calls));
        }
    }
    let clients = clients.join_all().await;
    let mut history = History {
        calls: vec![Vec::new(); plan.keys],
        tally: Tally::default(),
    };
    for client in clients {
        history.tally += client.tally;
        for (key, call) in client.journal {
            history.calls[key].push(call);
        }
    }
    for proxy in &proxies {
        let late = proxy.late_requests().tally();
        history.tally.refused_late += late.refused;
        history.tally.lifted += late.lifted;
    }
    let lost: Vec<_> = proxies.iter().flat_map(LossyProxy::lost_replies).collect();
    history.tally.lost_replies = lost.len();
    let lost_versions: HashSet<_> = lost.iter().flat_map(|reply| written(reply)).collect();
    let written = history.calls.iter().flatten().filter_map(Call::written);
    history.tally.recognised = written
        .filter(|version| lost_versions.contains(version))
        .count();
    history
}

/// A store on the Redis at `url`, an instance of its own.
async fn store_at(url: &str) -> Store {
    // Shorter than the longest wait of the proxies, so that some calls are given
    // up whose answer comes too late.
    let timeout = Duration::from_millis(100);
    let settings = RedisSettings::new(
        url,
        RedisFiles::default(),
        RedisLimits {
            pool_size: 3,
            timeout,
            ..RedisLimits::default()
        },
    )
    .unwrap();
    let store = RedisStore::open(&settings, "group:", MAX_DOCUMENT_BYTES).unwrap();
    assert!(
        store.wait(Instant::now() + Duration::from_secs(10)).await,
        "no connection to Redis"
    );
    Arc::new(Documents::new(
        store,
        MAX_DOCUMENT_BYTES,
        InstanceId::random(),
    ))
}

/// The versions in the replies to writes: `written`, the time, the version, each
/// after a line with its length.
fn written(replies: &[u8]) -> Vec<Version> {
    let text = String::from_utf8_lossy(replies);
    let lines: Vec<_> = text.split("\r\n").collect();
    let version = |at: usize| lines.get(at)?.parse().ok().and_then(Version::new);
    let replies = lines.iter().enumerate();
    replies
        .filter(|(_, line)| **line == "written")
        .filter_map(|(at, _)| version(at + 4))
        .collect()
}

// === impl Client ===

impl Client {
    fn new(store: Store, shared: Arc<Shared>, seed: u64) -> Self {
        Self {
            heard_of: vec![None; shared.keys.len()],
            store,
            shared,
            dice: StdRng::seed_from_u64(seed),
            journal: Vec::new(),
            tally: Tally::default(),
        }
    }

    async fn make_calls(mut self, enough: usize) -> Self {
        while self.shared.answered.load(Ordering::Relaxed) < enough {
            self.make_call().await;
        }
        self
    }

    async fn make_call(&mut self) {
        let at = self.draw_key();
        let begin = self.shared.next_event();
        // The number of the call's first event serves as its content.
        let act = self.act(at, Content(begin)).await;
        let end = self.shared.next_event();
        self.tally.calls += 1;
        let Some(act) = act else { return };
        let call = Call { begin, end, act };
        if call.is_unknown() {
            self.tally.unknown += 1;
        } else {
            self.tally.answered += 1;
            self.shared.answered.fetch_add(1, Ordering::Relaxed);
        }
        if call.is_conflict() {
            self.tally.conflicts += 1;
        }
        self.journal.push((at, call));
    }

    /// Makes a call on a key. None if it is a load without an answer.
    async fn act(&mut self, at: usize, content: Content) -> Option<Act> {
        let deadline = self.draw_deadline();
        let key = self.shared.keys[at].clone();
        let group = content.as_group(key.as_str());
        let heard_of = self.heard_of[at];
        let store = self.store.clone();
        match self.dice.random_range(0..100) {
            0..30 => {
                let with_expiry = self.dice.random();
                let found = match store.load(&key, with_expiry, deadline).await {
                    Ok(answer) => {
                        self.note(answer.backend);
                        let found = answer.value.map(|stored| Seen::in_group(&stored.group));
                        self.heard_of[at] = found.map(|seen| seen.version);
                        (answer.backend == Backend::Redis).then_some(found)?
                    }
                    Err(failure) => {
                        assert_says_nothing(&failure.error);
                        return None;
                    }
                };
                Some(Act::Load { found })
            }
            30..45 => {
                let reply = store.store(&group, HOUR, deadline).await;
                if let Ok(answer) = &reply {
                    self.note(answer.backend);
                    self.heard_of[at] = Some(answer.value.version);
                }
                let outcome = Outcome::of(reply).map(|written| written.version);
                Some(Act::Store { content, outcome })
            }
            45..80 => {
                let swap = store.compare_and_swap(&group, heard_of, HOUR, deadline);
                let reply = swap.await.map(|answer| answer.map(Swapped::from));
                if let Ok(answer) = &reply {
                    self.note(answer.backend);
                    self.heard_of[at] = match answer.value {
                        Swapped::Won(version) => Some(version),
                        Swapped::Lost(found) => found.map(|seen| seen.version),
                    };
                }
                Some(Act::Swap {
                    content,
                    expected: heard_of,
                    outcome: Outcome::of(reply),
                })
            }
            draw => {
                let expected = heard_of.filter(|_| draw < 92);
                let reply = store.delete(&key, expected, deadline).await;
                if let Ok(answer) = &reply {
                    self.note(answer.backend);
                    let left = answer.value.version.filter(|_| !answer.value.deleted);
                    self.heard_of[at] = left;
                }
                let outcome = Outcome::of(reply);
                Some(Act::Delete { expected, outcome })
            }
        }
    }

    /// The first key is written all the time, the last one now and then: where
    /// others write at once, a lost write is rarely recognised.
    fn draw_key(&mut self) -> usize {
        let keys = 0..self.shared.keys.len();
        let (one, other) = (
            self.dice.random_range(keys.clone()),
            self.dice.random_range(keys),
        );
        one.min(other)
    }

    /// Some callers are in a hurry.
    fn draw_deadline(&mut self) -> Deadline {
        if self.dice.random_bool(0.03) {
            let time = Duration::from_millis(self.dice.random_range(1..50));
            Deadline::at(Instant::now() + time)
        } else {
            Deadline::NONE
        }
    }

    fn note(&mut self, backend: Backend) {
        if backend == Backend::Memory {
            self.tally.from_memory += 1;
        }
    }
}

// === impl Shared ===

impl Shared {
    fn next_event(&self) -> u64 {
        self.next_event.fetch_add(1, Ordering::SeqCst)
    }
}

// === impl Tally ===

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.answered += other.answered;
        self.conflicts += other.conflicts;
        self.unknown += other.unknown;
        self.from_memory += other.from_memory;
        self.lost_replies += other.lost_replies;
        self.recognised += other.recognised;
        self.refused_late += other.refused_late;
        self.lifted += other.lifted;
    }
}
