//! What must hold while Redis is killed, hung, restarted empty, read-only, out
//! of memory, slow or cut off, tried by schedules that are drawn from seeds.
//!
//! A run: some clients store, swap, delete and load all the time, and remember
//! what they were told; faults happen to a real Redis and to the connections to
//! it; at the end an oracle compares what was said with what Redis holds.
//!
//! | module | what is in it |
//! |---|---|
//! | [`schedule`] | what happens in the run of a seed |
//! | [`ground`] | where it happens: one Redis, or several of which a replica takes over |
//! | [`common::faults`] | makes it happen; [`faults_strike`] shows that it does |
//! | [`clients`], [`wire`] | writers that remember every answer |
//! | [`watch`] | logs, metrics, probes, memory of the instances |
//! | [`history`], [`evidence`] | what was done and seen, as plain values |
//! | [`oracle`] | judges; with [`model`] and [`wandering`] for keys and [`discards`] for counters |
//! | [`verdict`] | what came of a run, and every way to break a promise |
//! | [`run`] | one run from start to verdict |
//! | [`report`] | tables and explanations |
//! | [`oracle_sees`], [`oracle_sees_calls`], [`story`] | the oracle on histories made by hand |
//! | [`mutants`] | the oracle on runs with a deliberate mistake |
//!
//! `cargo test` makes the runs of [`FIXED`] and [`REGRESSIONS`]. More seeds:
//!
//! ```text
//! make chaos SEEDS=1..100 POLICY=reconcile
//! make chaos SEEDS=1..10 REDIS=sentinel
//! ```

#[path = "../common/mod.rs"]
mod common;

mod clients;
mod discards;
mod evidence;
mod faults_strike;
mod ground;
mod history;
mod model;
mod mutants;
mod oracle;
mod oracle_sees;
mod oracle_sees_calls;
mod report;
mod run;
mod schedule;
mod story;
mod verdict;
mod wandering;
mod watch;
mod wire;

use std::{collections::BTreeSet, env};

use common::replicated::Kind;
use futures::{StreamExt, stream};
use run::{Outcome, Run};
use schedule::{Plan, Policy};

/// Seeds whose runs meet every fault that is drawn under both policies, with 1 and
/// 3 instances, behind a proxy and without. A test below holds them to it.
const FIXED: [(u64, Policy); 8] = [
    (3740, Policy::Reconcile),
    (310, Policy::Discard),
    // It also showed a Redis that came back empty and was taken for one that had
    // kept its data, and a Delete that believed it.
    (3954, Policy::Reconcile),
    (3359, Policy::Discard),
    // And this one a version that went back with a recovery.
    (2795, Policy::Reconcile),
    (443, Policy::Discard),
    (2954, Policy::Reconcile),
    (315, Policy::Discard),
];

/// Seeds that have failed once, with the policy under which they did.
const REGRESSIONS: [(u64, Policy); 8] = [
    // A Redis that came back empty within a heartbeat was not noticed.
    (33, Policy::Reconcile),
    // An alert that was deleted in memory came back by a merge with one's own
    // earlier write.
    (24, Policy::Reconcile),
    // A Load with a short deadline failed with UNAVAILABLE.
    (19, Policy::Reconcile),
    // Deletes of groups that memory had forgotten were dropped and not counted.
    (22, Policy::Discard),
    // A swap that Redis had executed was told to have lost, to itself.
    (58, Policy::Reconcile),
    // Connections that were replaced at once were not asked again in time, and
    // the switch opened.
    (1040, Policy::Discard),
    // A group came back that was deleted while it was being carried over.
    (1079, Policy::Reconcile),
    // Memory forgot what a restarted Redis had kept.
    (1025, Policy::Reconcile),
];

/// Seeds whose runs meet everything that can happen besides: Redis loses what it has
/// acknowledged, servers and slots move, clocks jump, the service itself stands still. A
/// test below holds them to it.
const OF_ANYTHING: [(u64, Policy, Option<Kind>); 10] = [
    // What was changed in memory was merged with what had been there before it.
    (9, Policy::Reconcile, None),
    // What was there before changes that were dropped was lost with Redis; merges that
    // were put back looked newer than the deletes that came after what they merge.
    (6, Policy::Discard, None),
    // Calls gave up while a pool moved from one server to another.
    (10, Policy::Discard, None),
    (13, Policy::Reconcile, None),
    (14, Policy::Reconcile, None),
    (4, Policy::Reconcile, Some(Kind::Sentinel)),
    (2, Policy::Discard, Some(Kind::Cluster)),
    // A probe that was repeated reached the next process, of which it then seemed that it
    // had lost nothing.
    (146, Policy::Reconcile, None),
    // The clock of Redis was set back, and what came after a loss looked older than what
    // had been deleted before it.
    (113, Policy::Reconcile, None),
    // Slots that moved were taken for a loss, and what had been replaced was merged again.
    (118, Policy::Reconcile, Some(Kind::Cluster)),
];

/// Runs that are made side by side: more would slow each other down, and then
/// it cannot be told who was late.
const SIDE_BY_SIDE: usize = 3;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_unsaid_and_every_call_is_answered_whatever_happens_to_redis() {
    let seeds = FIXED.iter().chain(&REGRESSIONS);
    hold(seeds.map(|(seed, policy)| Plan::of_outages(*seed, Some(*policy)))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_returns_whatever_redis_has_lost() {
    let plans = OF_ANYTHING.into_iter();
    hold(plans.map(|(seed, policy, ground)| Plan::of_anything(seed, Some(policy), ground))).await;
}

/// `CHAOS_SEEDS=1..100` or a count, `CHAOS_POLICY=discard`, `reconcile` or, by
/// default, as drawn, `CHAOS_JOBS=2`, `CHAOS_REDIS=sentinel` or `cluster`: see
/// `make chaos`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "as long as one likes: make chaos"]
async fn many_seeds() {
    let policy = match env::var("CHAOS_POLICY").unwrap_or_default().as_str() {
        "discard" => Some(Policy::Discard),
        "reconcile" => Some(Policy::Reconcile),
        "" => None,
        other => panic!("CHAOS_POLICY={other}: discard or reconcile"),
    };
    let seeds = env::var("CHAOS_SEEDS").unwrap_or_else(|_| "20".into());
    let seeds = seeds_of(&seeds).expect("CHAOS_SEEDS is 1..100 or a count");
    let kind = Kind::of_environment("CHAOS_REDIS");
    hold(seeds.map(|seed| Plan::of_anything(seed, policy, kind))).await;
}

/// `1..100` with both ends, or a count from 1.
fn seeds_of(text: &str) -> Option<std::ops::RangeInclusive<u64>> {
    match text.split_once("..") {
        Some((from, to)) => {
            let to = to.trim_start_matches('=');
            Some(from.parse().ok()?..=to.parse().ok()?)
        }
        None => Some(1..=text.parse().ok()?),
    }
}

/// Makes the runs, tells of them, and fails if one does not hold.
async fn hold(plans: impl Iterator<Item = Plan>) {
    // Two tests at once would make twice as many runs as go side by side.
    static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _alone = ONE_AT_A_TIME.lock().await;
    let jobs = env::var("CHAOS_JOBS")
        .ok()
        .and_then(|jobs| jobs.parse().ok());
    println!("{}", report::heading());
    let mut broken = 0;
    let outcomes: Vec<Outcome> = stream::iter(plans)
        .map(|plan| async move {
            let seed = plan.seed;
            (seed, tokio::spawn(Run::of(plan).make()).await)
        })
        .buffer_unordered(jobs.unwrap_or(SIDE_BY_SIDE))
        .filter_map(|(seed, outcome)| {
            match &outcome {
                Ok(outcome) => println!("{}", report::row(outcome)),
                Err(error) => {
                    broken += 1;
                    println!("{seed:>5} broke: {error}");
                }
            }
            std::future::ready(outcome.ok())
        })
        .collect()
        .await;
    println!("\n{}", report::summary(&outcomes));
    let explanations: Vec<String> = outcomes.iter().filter_map(report::explanation).collect();
    assert!(
        broken == 0 && explanations.is_empty(),
        "{broken} runs broke, {} failed:\n\n{}",
        explanations.len(),
        explanations.join("\n")
    );
}

#[test]
fn the_fixed_seeds_meet_every_drawn_fault_both_policies_and_every_topology() {
    let plans: Vec<Plan> = FIXED
        .iter()
        .map(|(seed, policy)| Plan::of_outages(*seed, Some(*policy)))
        .collect();
    let faults: BTreeSet<&str> = plans
        .iter()
        .flat_map(|plan| &plan.steps)
        .map(|step| step.fault.name())
        .collect();
    assert_eq!(faults.len(), 18, "{faults:?}");
    let places: BTreeSet<_> = plans
        .iter()
        .map(|plan| (plan.policy, plan.instances, plan.proxied))
        .collect();
    assert_eq!(places.len(), 8, "{places:?}");
}

#[test]
fn the_seeds_of_anything_meet_what_the_fixed_ones_do_not() {
    let plans = OF_ANYTHING.map(|(seed, policy, ground)| {
        let plan = Plan::of_anything(seed, Some(policy), ground);
        assert!(plan.wanders && plan.steps.len() > 1, "{plan:?}");
        plan
    });
    let steps = plans.iter().flat_map(|plan| &plan.steps);
    let faults: BTreeSet<&str> = steps.map(|step| step.fault.name()).collect();
    for fault in [
        "rewind",
        "kill",
        "move",
        "redis-clock",
        "service-clock",
        "slow-link",
        "stop-service",
        "failover-kill",
        "lagging-failover-kill",
        "lagging-failover-hang",
        "move-slots",
    ] {
        assert!(faults.contains(fault), "{fault}: {faults:?}");
    }
    assert!(plans.iter().any(|plan| plan.bystander));
}

#[test]
fn seeds_are_a_range_or_a_count() {
    assert_eq!(seeds_of("3..5"), Some(3..=5));
    assert_eq!(seeds_of("3"), Some(1..=3));
    assert_eq!(seeds_of("x"), None);
}
