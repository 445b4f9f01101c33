//! How long the lock of the memory store is held with 1,000,000 groups in it,
//! by operation: while one holds it, every call waits.
//!
//! `cargo bench --features lock-times --bench memory_lock`; `GROUPS=100000` holds fewer. It
//! prints the longest hold, by the time that the processor has worked, and by the
//! clock: on a machine that has other things to do, a thread that holds the lock may
//! have to wait. What others do differs from round to round, and what the lock is held
//! for does not: so the least of three rounds counts, and it fails when that is more
//! than 1 ms.
//!
//! The allocator is that of the service, with its thread that gives memory back.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt;
use groupstate::{
    domain::{
        document::DocumentHead,
        group::{AlertGroup, GroupKey, GroupMetadata},
        version::{InstanceId, RedisClock, Version},
    },
    store::{
        Deadline, Expiry,
        documents::{Condition, DocumentStore, Write},
        failover::switch::OnRecovery,
        memory::{Loss, MemoryStore, Ours, Shown, times},
    },
};

#[path = "../src/allocator.rs"]
mod allocator;

const BOUND: Duration = Duration::from_millis(1);
/// Lets all groups in.
const MAX_BYTES: usize = 4 << 30;
/// Bytes of a small document, of which the most fit into one batch, and of one
/// as large as they may be.
const SMALL: usize = 300;
const LARGE: usize = 1 << 20;
const DAY: Duration = Duration::from_secs(24 * 3_600);

const ROUNDS: usize = 3;

struct Bench {
    groups: usize,
    rows: Vec<Row>,
    /// The next row of this round.
    next: usize,
}

/// An operation and what it took, at least, in a round.
struct Row {
    name: &'static str,
    took: Duration,
    processor: Duration,
    clock: Duration,
}

#[tokio::main]
async fn main() {
    allocator::give_back_apart().expect("a thread");
    let groups = std::env::var("GROUPS")
        .ok()
        .and_then(|groups| groups.parse().ok())
        .unwrap_or(1_000_000);
    let mut bench = Bench {
        groups,
        rows: Vec::new(),
        next: 0,
    };
    for _ in 0..ROUNDS {
        bench.next = 0;
        bench.of_a_store_that_answers().await;
        bench.of_a_mirror_that_redis_fills().await;
        bench.of_a_mirror_that_is_told_of().await;
        bench.of_a_full_mirror().await;
    }
    println!("| operation, with {groups} groups | took ms | longest hold µs | by the clock µs |");
    println!("|---|---|---|---|");
    let micros = |duration: Duration| duration.as_secs_f64() * 1e6;
    for row in &bench.rows {
        println!(
            "| {} | {:.1} | {:.0} | {:.0} |",
            row.name,
            micros(row.took) / 1e3,
            micros(row.processor),
            micros(row.clock),
        );
    }
    let too_long = bench.rows.iter().filter(|row| row.processor > BOUND);
    let too_long: Vec<_> = too_long.map(|row| row.name).collect();
    assert!(
        too_long.is_empty(),
        "held longer than {BOUND:?}: {too_long:?}"
    );
}

impl Bench {
    /// Runs an operation for its row.
    async fn row<T>(&mut self, name: &'static str, operation: impl Future<Output = T>) -> T {
        let_the_allocator_rest().await;
        times::take();
        let begin = Instant::now();
        let result = operation.await;
        let took = begin.elapsed();
        let times::Longest { processor, clock } = times::take();
        let row = Row {
            name,
            took,
            processor,
            clock,
        };
        match self.rows.get_mut(self.next) {
            None => self.rows.push(row),
            Some(least) => {
                least.took = least.took.min(took);
                least.processor = least.processor.min(processor);
                least.clock = least.clock.min(clock);
            }
        }
        self.next += 1;
        result
    }

    /// Calls, listings, and an outage after which everything is dropped.
    async fn of_a_store_that_answers(&mut self) {
        let groups = self.groups;
        let store = MemoryStore::mirror(
            MAX_BYTES,
            InstanceId::random(),
            RedisClock::default(),
            OnRecovery::Discard,
        );
        store.stand_in();
        let fill = async {
            for number in 0..groups {
                change(&store, &key(number), DAY);
            }
        };
        self.row("a write, each group", fill).await;
        let again = async {
            for number in (0..groups).step_by(7) {
                change(&store, &key(number), DAY);
            }
        };
        self.row("a write over another, every seventh", again).await;
        let large = large_head("large");
        let of_large = async {
            for _ in 0..100 {
                write(&store, &large, DAY);
            }
        };
        self.row("a write of 1 MiB, 100 of them", of_large).await;
        let read = async {
            for number in (0..groups).step_by(7) {
                let found = store.read(&key(number), true, Deadline::NONE).await;
                assert!(found.unwrap().value.is_some());
            }
        };
        self.row("Load, every seventh", read).await;
        let count = self
            .row("Size of all", store.size("", Deadline::NONE))
            .await;
        assert_eq!(count.unwrap().value, groups as u64 + 1);
        self.row("ListKeys of all, pages of 10,000", list(&store))
            .await;
        self.row("LoadAll", read_all(&store)).await;
        self.row("the metrics", async { store.usage() }).await;

        let discarded = self
            .row("discard of all", async { store.step_back_and_discard(&[]) })
            .await;
        assert_eq!(discarded, groups + 1);
        assert_eq!(store.usage().groups, 0);
        let past = async {
            assert_eq!(store.size("", Deadline::NONE).await.unwrap().value, 0);
            list(&store).await;
            read_all(&store).await;
        };
        self.row("listings past what was dropped", past).await;
        let sweep = store.sweep();
        self.row("memory given back after that", sweep).await;
        assert_eq!(store.usage().bytes, 0);
    }

    /// The mirror of a Redis: it learns, tells another process, and its groups
    /// all expire at once.
    async fn of_a_mirror_that_redis_fills(&mut self) {
        let groups = self.groups;
        let store = MemoryStore::mirror(
            MAX_BYTES,
            InstanceId::random(),
            RedisClock::default(),
            OnRecovery::Discard,
        );
        let expire = Instant::now() + Duration::from_secs(60);
        let learn_all = async {
            for number in 0..groups {
                learn(
                    &store,
                    number,
                    expire.saturating_duration_since(Instant::now()),
                );
            }
        };
        self.row("an answer of Redis taken in, each group", learn_all)
            .await;
        self.row(
            "looking for what Redis has to be told: nothing",
            pending(&store),
        )
        .await;
        store.step_back(vec![Loss::ALL]);
        self.row(
            "looking for what Redis has to be told: all",
            pending(&store),
        )
        .await;
        tokio::time::sleep(expire.saturating_duration_since(Instant::now())).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let past = async {
            assert_eq!(store.size("", Deadline::NONE).await.unwrap().value, 0);
            list(&store).await;
            read_all(&store).await;
        };
        self.row("listings past what has expired", past).await;
        self.row("sweep of all, expired at once", store.sweep())
            .await;
        assert_eq!(store.usage().bytes, 0);
    }

    /// A mirror of which all was changed in an outage.
    async fn of_a_mirror_that_is_told_of(&mut self) {
        let groups = self.groups;
        let store = MemoryStore::mirror(
            MAX_BYTES,
            InstanceId::random(),
            RedisClock::default(),
            OnRecovery::Discard,
        );
        for number in 0..groups {
            learn(&store, number, DAY);
        }
        store.stand_in();
        let delete = async {
            for number in (0..groups).step_by(2) {
                assert!(store.delete(&key(number), None).unwrap().deleted);
            }
        };
        self.row("Delete, every second", delete).await;
        let change_rest = async {
            for number in (1..groups).step_by(2) {
                change(&store, &key(number), DAY);
            }
        };
        self.row("a write over what Redis holds, every second", change_rest)
            .await;
        let carry = async {
            let mut after = None;
            loop {
                let (keys, next) = store.pending_keys(after.as_ref(), 250);
                for key in keys {
                    drop(store.pending(&key));
                }
                after = next;
                if after.is_none() {
                    break;
                }
            }
        };
        self.row("what Redis has to be told, each group", carry)
            .await;
        let discarded = self
            .row("discard of all that Redis holds", async {
                store.step_back_and_discard(&[])
            })
            .await;
        assert_eq!(discarded, groups);
        self.row("memory given back after it", store.sweep()).await;
        assert_eq!(store.usage().traces, groups);
    }

    /// Groups of 1 MiB in the place of small ones.
    async fn of_a_full_mirror(&mut self) {
        let small = key(self.groups - 1).as_str().len() + SMALL;
        // With less overhead than there is: the last ones let the first ones go.
        let store = MemoryStore::mirror(
            self.groups * (small + 290),
            InstanceId::random(),
            RedisClock::default(),
            OnRecovery::Discard,
        );
        for number in 0..self.groups {
            learn(&store, number, DAY);
        }
        let held = store.usage();
        assert!(
            (self.groups * 9 / 10..self.groups).contains(&held.groups),
            "{held:?}"
        );
        let json = Bytes::from(vec![b' '; LARGE]);
        let learn_large = async {
            for number in 0..20 {
                let ticket = store.ticket();
                let shown = Shown::Document {
                    json: json.clone(),
                    version: version(16),
                    left: Some(DAY),
                    ours: Some(Ours::new(None)),
                };
                store.learn(
                    &GroupKey::new(format!("large {number}")).unwrap(),
                    shown,
                    ticket,
                );
            }
        };
        self.row("1 MiB taken in by a full mirror, 20 times", learn_large)
            .await;
        store.stand_in();
        let heads: Vec<_> = (0..20).map(|n| large_head(&format!("new {n}"))).collect();
        let write_large = async {
            for head in &heads {
                write(&store, head, DAY);
            }
        };
        self.row("a write of 1 MiB to a full mirror, 20 of them", write_large)
            .await;
        // Nothing may leave at first sight: Redis may have lost it all.
        store.step_back(vec![Loss::ALL]);
        store.stand_in();
        let refused = async {
            for head in &heads {
                let write = write_of(head, DAY);
                drop(store.change(&write, false));
            }
        };
        self.row("the same where Redis may have lost all", refused)
            .await;
    }
}

/// What an operation has freed is not to be given to the system in the next one.
async fn let_the_allocator_rest() {
    for _ in 0..150 {
        drop(std::hint::black_box(vec![1u8; 1 << 17]));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn key(number: usize) -> GroupKey {
    // Not in order, as keys come.
    let spread = number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    GroupKey::new(format!(
        "alertname=HighCPU,instance=web-{spread:06x}-{number}"
    ))
    .unwrap()
}

fn version(version: i64) -> Version {
    Version::new(version).unwrap()
}

fn head_of(key: GroupKey, state: Vec<String>) -> DocumentHead {
    DocumentHead::new(&AlertGroup {
        key,
        alerts: BTreeMap::new(),
        metadata: GroupMetadata {
            group_by: state,
            ..GroupMetadata::default()
        },
    })
}

fn large_head(key: &str) -> Arc<DocumentHead> {
    let filler = vec!["x".repeat(1_000); LARGE / 1_003 - 1];
    Arc::new(head_of(GroupKey::new(key).unwrap(), filler))
}

fn write_of(head: &DocumentHead, ttl: Duration) -> Write {
    Write {
        head: head.clone(),
        condition: Condition::Any,
        expiry: Expiry::After(ttl),
        write_id: "0123456789ab-1".into(),
        newer_than: None,
    }
}

fn write(store: &MemoryStore, head: &DocumentHead, ttl: Duration) {
    store
        .change(&write_of(head, ttl), false)
        .expect("there is room");
}

fn change(store: &MemoryStore, key: &GroupKey, ttl: Duration) {
    write(store, &head_of(key.clone(), Vec::new()), ttl);
}

fn learn(store: &MemoryStore, number: usize, left: Duration) {
    let shown = Shown::Document {
        json: Bytes::from(vec![b' '; SMALL]),
        version: version(16),
        left: Some(left),
        ours: Some(Ours::new(None)),
    };
    store.learn(&key(number), shown, store.ticket());
}

async fn list(store: &MemoryStore) {
    let mut token = None;
    loop {
        let page = store
            .list_keys("", 10_000, token.as_deref(), Deadline::NONE)
            .await
            .unwrap();
        token = page.value.next;
        if token.is_none() {
            break;
        }
    }
}

async fn read_all(store: &MemoryStore) {
    let mut all = store.read_all("", Deadline::NONE).await.unwrap().value;
    while let Some(batch) = all.batches.next().await {
        batch.unwrap();
    }
}

async fn pending(store: &MemoryStore) {
    let mut after = None;
    loop {
        after = store.pending_keys(after.as_ref(), 250).1;
        if after.is_none() {
            break;
        }
    }
}
