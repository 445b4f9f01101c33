//! `make replicas`: runs that take too long for every day, as a table.

use std::time::Duration;

use crate::{faults, load::Load, recorded, site::Site};

/// How many of the runs with random faults; `REPLICA_SEEDS` sets it.
const DEFAULT_SEEDS: u64 = 3;

/// Things killed in such a run, beside Redis.
const KILLS: usize = 12;

/// How long the webhooks come in such a run, in milliseconds, if nothing fails.
const FAULTY_LOAD: u64 = 15_000;

/// What goes on while the webhooks come.
#[derive(Clone, Copy)]
enum Weather {
    Healthy,
    /// Redis is dead all the time.
    Degraded,
    /// All is killed at random moments.
    Faults(u64),
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: `make replicas`"]
async fn table() {
    let seeds = std::env::var("REPLICA_SEEDS").ok();
    let seeds = seeds.filter(|text| !text.is_empty());
    let seeds = seeds.map_or(DEFAULT_SEEDS, |text| text.parse().expect("a number"));
    println!(
        "| replicas | meanwhile | conflicts | attempts per change | most attempts of a change | alerts lost | changes/s |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut lost = 0;
    for replicas in [2, 3, 10] {
        lost += row(replicas, Weather::Healthy).await;
        lost += row(replicas, Weather::Degraded).await;
        for seed in 1..=seeds {
            lost += row(replicas, Weather::Faults(seed)).await;
        }
    }
    assert_eq!(lost, 0);
}

/// Prints a row. Says how many alerts were lost.
async fn row(replicas: usize, weather: Weather) -> usize {
    let mut site = Site::start(replicas).await;
    let (name, took) = match weather {
        Weather::Healthy => {
            let took = Load::FAST.begin(&site).await.unwrap();
            ("healthy".into(), took)
        }
        Weather::Degraded => {
            site.redis.kill();
            site.are("degraded").await;
            let took = Load::FAST.begin(&site).await.unwrap();
            ("Redis dead".into(), took)
        }
        Weather::Faults(seed) => {
            let load = Load::over(Duration::from_millis(FAULTY_LOAD)).begin(&site);
            let instances = site.services.len();
            let faults = faults::random(seed, FAULTY_LOAD, replicas, instances, KILLS);
            faults::strike(&mut site, &faults).await;
            let took = load.await.unwrap();
            (format!("all killed at random, seed {seed}"), took)
        }
    };
    // Before the outbox makes its changes again.
    let tally = site.tally().await;
    if let Weather::Degraded = weather {
        site.redis.restart().await;
    }
    site.settled().await;
    let differences = recorded::differences(&site.groups().await);
    for difference in &differences {
        eprintln!("{difference}");
    }
    let rate = match weather {
        // A load that was stretched says nothing of speed.
        Weather::Faults(_) => "–".into(),
        _ => format!("{:.0}", tally.changes as f64 / took.as_secs_f64()),
    };
    println!(
        "| {replicas} | {name} | {} | {:.2} | {} | {} | {rate} |",
        tally.conflicts,
        tally.attempts_per_change(),
        tally.most_attempts,
        differences.len(),
    );
    differences.len()
}
