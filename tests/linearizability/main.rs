//! Linearizability per key, of what three instances do with one Redis while
//! replies are lost and requests come late: whatever clients were told, there is
//! one order of all calls on a key that explains it.
//!
//! `workload.rs` makes the histories, `history.rs` is what they are, `facts.rs`
//! and `checker.rs` judge them. The judge is judged too: in `verdicts.rs` by
//! histories made by hand, in `slow_judge.rs` by one that takes no short cuts, and
//! below by the stores of `odd_stores.rs`, most of which break a promise, and by a
//! Redis that gets writes without their deadlines, see `deadlines.rs`.
//!
//! A failure names the seed and shows the calls. The seed alone does not bring it
//! back, since it does not decide when things happen; many runs may.

#[path = "../common/mod.rs"]
mod common;

mod checker;
mod deadlines;
mod facts;
mod history;
mod odd_stores;
mod slow_judge;
mod verdicts;
mod workload;

use std::time::Duration;

use common::{lossy_proxy::Weather, redis_server::RedisServer};
use futures::{StreamExt, stream};
use odd_stores::{OddStore, Quirk};
use workload::{History, Plan, Tally, make_history};

const HISTORIES: u64 = 20;
const CALLS: usize = 2_000;
/// Their clients mostly wait, but more finish no sooner.
const AT_THE_SAME_TIME: usize = 8;

/// A day on which a few calls in a hundred lose their answers.
const BAD_DAY: Weather = Weather {
    lost: 0.02,
    late: 0.02,
    outliving: 0.01,
    longest_wait: Duration::from_millis(300),
};

/// So few that clients meet on each of them all the time.
const FEW_KEYS: usize = 5;
/// So many that clients meet on each of them a few times a second.
const MANY_KEYS: usize = 60;

/// What the clients of the history with this seed do.
fn plan(seed: u64) -> Plan {
    Plan {
        seed,
        answered_calls: CALLS,
        keys: FEW_KEYS,
        weather: BAD_DAY,
        deadlines_lifted: false,
    }
}

/// A plan in which late writes do harm, if they are executed. Where clients meet
/// all the time, they do none: a write whose first request is late finds, when it
/// is tried again, that others have written meanwhile, and its client is told that
/// the outcome is unknown. There must be time for the second request before others
/// write, and for others before the first one arrives.
fn plan_of_late_writes(seed: u64) -> Plan {
    Plan {
        keys: MANY_KEYS,
        weather: Weather {
            outliving: 0.04,
            ..BAD_DAY
        },
        ..plan(seed)
    }
}

/// Makes a history with stores that have a quirk.
async fn odd_history(server: &RedisServer, seed: u64, quirk: Quirk) -> History {
    make_history(server, plan(seed), |redis| OddStore::wrap(redis, quirk)).await
}

/// The first key on which a history is not linearizable, and why.
fn check(history: &History) -> Result<(), String> {
    for (at, calls) in history.calls.iter().enumerate() {
        checker::check(calls).map_err(|violation| format!("key {at} is {violation}"))?;
    }
    Ok(())
}

/// Makes so many histories, which must all be linearizable.
async fn all_pass(histories: u64, plan: impl Fn(u64) -> Plan) -> Tally {
    let server = RedisServer::start().await;
    let mut made = stream::iter(1..=histories)
        .map(async |seed| {
            let history = make_history(&server, plan(seed), |redis| redis).await;
            (seed, history)
        })
        .buffer_unordered(AT_THE_SAME_TIME);
    let mut sum = Tally::default();
    while let Some((seed, history)) = made.next().await {
        if let Err(violation) = check(&history) {
            panic!("the history with seed {seed}: {violation}");
        }
        let tally = history.tally;
        assert!(tally.answered >= CALLS, "seed {seed}: {tally:?}");
        assert!(
            tally.conflicts * 100 >= tally.calls * 5,
            "seed {seed}: too few conflicts, {tally:?}"
        );
        sum += tally;
    }
    println!("{histories} histories: {sum:?}");
    sum
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_clients_were_told_one_order_of_their_calls_explains_it() {
    let sum = all_pass(HISTORIES, plan).await;
    // What this is about must have happened, and often.
    assert!(sum.lost_replies >= 100, "{sum:?}");
    assert!(sum.unknown >= 100, "{sum:?}");
    assert!(sum.recognised >= 10, "{sum:?}");
    assert!(sum.refused_late >= 50, "{sum:?}");
}

/// As [`a_redis_that_executes_late_writes_is_caught`], but for the mistake.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_writes_that_would_do_harm_are_refused() {
    let sum = all_pass(3, plan_of_late_writes).await;
    assert!(sum.refused_late >= 25, "{sum:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_memory_answers_says_nothing_about_redis() {
    let server = RedisServer::start().await;
    let history = odd_history(&server, 1, Quirk::LetsMemoryAnswer).await;
    if let Err(violation) = check(&history) {
        panic!("{violation}");
    }
    let tally = history.tally;
    assert!(tally.from_memory * 20 >= tally.calls, "{tally:?}");
}

/// Makes histories in which a promise is broken, until one is found not to be
/// linearizable.
async fn is_caught(culprit: &str, make: impl AsyncFn(&RedisServer, u64) -> History) {
    const TRIES: u64 = 5;
    let server = RedisServer::start().await;
    for seed in 1..=TRIES {
        let history = make(&server, seed).await;
        if let Err(violation) = check(&history) {
            println!("{culprit}, seed {seed}: {violation}");
            return;
        }
    }
    panic!("{TRIES} histories of {culprit} pass as linearizable");
}

async fn store_is_caught(quirk: Quirk) {
    is_caught(&format!("{quirk:?}"), async |server, seed| {
        odd_history(server, seed, quirk).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_executes_late_writes_is_caught() {
    is_caught("a Redis without deadlines", async |server, seed| {
        let plan = Plan {
            deadlines_lifted: true,
            ..plan_of_late_writes(seed)
        };
        let history = make_history(server, plan, |redis| redis).await;
        let tally = history.tally;
        assert!(tally.lifted > 0 && tally.refused_late == 0, "{tally:?}");
        history
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_swaps_blindly_is_caught() {
    store_is_caught(Quirk::SwapsBlindly).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_creates_over_others_is_caught() {
    store_is_caught(Quirk::CreatesOverOthers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_deletes_any_version_is_caught() {
    store_is_caught(Quirk::DeletesAnyVersion).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_repeats_lost_writes_is_caught() {
    store_is_caught(Quirk::RepeatsLostWrites).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_calls_lost_swaps_refused_is_caught() {
    store_is_caught(Quirk::CallsLostSwapsRefused).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_loads_what_it_remembers_is_caught() {
    store_is_caught(Quirk::LoadsWhatItRemembers).await;
}
