//! Redis, instances and replicas are killed while webhooks come in.
//!
//! One replica at least lives through an outage of Redis, from its beginning
//! until its outbox is delivered. What is told while Redis is away is in the
//! memory of an instance, which drops it, and in the outboxes of the replicas
//! that were told: with all of these it would be gone.

use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    load::{Load, To},
    site::Site,
};

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Redis,
    Instance(usize),
    Replica(usize),
}

/// Something is killed, and started again after a while.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub target: Target,
    /// Since the beginning of the load, in milliseconds.
    pub at: u64,
    /// In milliseconds.
    pub down: u64,
}

/// A change loses a race against each other replica at most, and has an attempt
/// left for the moment in which its instance changes over to memory.
const MOST_ATTEMPTS: u64 = 5;

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_killed_in_turn_and_no_alert_is_lost() {
    let mut site = Site::start(3).await;
    let load = Load::over(Duration::from_secs(12)).begin(&site);
    strike(
        &mut site,
        &[
            fault(Target::Replica(0), 500, 500),
            fault(Target::Instance(0), 2_000, 500),
            fault(Target::Redis, 3_500, 5_000),
            fault(Target::Replica(1), 4_500, 500),
            fault(Target::Instance(1), 5_500, 500),
            fault(Target::Replica(1), 6_500, 500),
            fault(Target::Instance(0), 7_000, 500),
            // Before its outbox can be delivered.
            fault(Target::Replica(0), 8_600, 500),
            fault(Target::Instance(1), 10_500, 500),
        ],
    )
    .await;
    load.await.unwrap();
    site.holds_what_was_recorded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_scale_from_3_to_10_to_2_and_no_alert_is_lost() {
    // A busy machine may not be done with it in that time.
    for seconds in [8, 16, 32, 64] {
        let mut site = Site::start(3).await;
        let load = Load::over(Duration::from_secs(seconds)).begin(&site);
        tokio::time::sleep(Duration::from_secs(1)).await;
        site.scale(10).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        site.scale(2).await;
        let was_under_load = !load.is_finished();
        load.await.unwrap();
        site.holds_what_was_recorded().await;
        if was_under_load {
            return;
        }
    }
    panic!("the load is over before the replicas are gone, however long it is");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_share_the_webhooks_are_killed_and_are_sent_them_again() {
    let mut site = Site::start(3).await;
    let load = Load {
        to: To::One,
        ..Load::over(Duration::from_secs(4))
    };
    let load = load.begin(&site);
    let faults = [
        fault(Target::Replica(0), 500, 300),
        fault(Target::Instance(0), 1_200, 500),
        fault(Target::Replica(1), 1_500, 300),
        fault(Target::Replica(2), 2_500, 300),
    ];
    strike(&mut site, &faults).await;
    load.await.unwrap();
    site.holds_what_was_recorded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_redis_is_dead_every_change_ends_within_5_attempts() {
    let mut site = Site::start(3).await;
    let load = Load::over(Duration::from_secs(4)).begin(&site);
    tokio::time::sleep(Duration::from_secs(1)).await;
    site.redis.kill();
    load.await.unwrap();
    site.are("degraded").await;
    let tally = site.tally().await;
    assert!(tally.changes >= 3 * 456, "{tally:?}");
    assert!(tally.most_attempts <= MOST_ATTEMPTS, "{tally:?}");

    site.redis.restart().await;
    site.holds_what_was_recorded().await;
}

fn fault(target: Target, at: u64, down: u64) -> Fault {
    Fault { target, at, down }
}

/// Faults at random moments within `length`, in milliseconds: Redis once, for
/// 5 s, and `kills` of anything else, before, during and after. The last replica
/// lives on.
pub fn random(
    seed: u64,
    length: u64,
    replicas: usize,
    instances: usize,
    kills: usize,
) -> Vec<Fault> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut faults = vec![fault(
        Target::Redis,
        random.random_range(0..length / 3),
        5_000,
    )];
    for _ in 0..kills {
        let target = if random.random_bool(0.5) {
            Target::Instance(random.random_range(0..instances))
        } else {
            Target::Replica(random.random_range(0..replicas - 1))
        };
        let at = random.random_range(0..length);
        faults.push(fault(target, at, random.random_range(0..1_500)));
    }
    faults
}

/// Kills and starts again, beginning now.
pub async fn strike(site: &mut Site, faults: &[Fault]) {
    let kills = faults.iter().map(|fault| (fault.at, false, fault.target));
    let starts = faults
        .iter()
        .map(|fault| (fault.at + fault.down, true, fault.target));
    let mut steps: Vec<_> = kills.chain(starts).collect();
    steps.sort_by_key(|(at, ..)| *at);
    let begin = Instant::now();
    for (at, starts, target) in steps {
        let wait = Duration::from_millis(at).saturating_sub(begin.elapsed());
        tokio::time::sleep(wait).await;
        match (target, starts) {
            (Target::Redis, false) => site.redis.kill(),
            (Target::Redis, true) => site.redis.restart().await,
            (Target::Instance(number), false) => site.services[number].kill(),
            (Target::Instance(number), true) => site.start_instance_again(number),
            (Target::Replica(number), false) => site.replicas[number].kill(),
            (Target::Replica(number), true) => site.replicas[number].launch_again(),
        }
    }
    for replica in &mut site.replicas {
        assert!(replica.is_ready().await, "a replica does not start again");
    }
}
