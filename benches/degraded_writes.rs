//! Memory of the service while Redis is down and clients write much more than
//! the mirror may hold: 2,000,000 writes to 500,000 keys that live for 1 to 5
//! seconds, in a mirror of 64 MiB.
//!
//! `cargo bench --bench degraded_writes` prints what the process holds before,
//! at most and after, and how long the entries take to be gone when nobody calls
//! any more.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{redis_server::RedisServer, service::Service};
use groupstate::grpc::proto::{self as pb, store_all_request::Expiry};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const WRITES: usize = 2_000_000;
const KEYS: usize = 500_000;
const BATCH: usize = 1_000;
const WRITERS: usize = 4;
const MIRROR: &str = "64MiB";

/// What the writers were told.
#[derive(Default)]
struct Told {
    stored: usize,
    /// `RESOURCE_EXHAUSTED`: the mirror is full.
    refused: usize,
}

#[tokio::main]
async fn main() {
    let mut redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url(), "--mirror-max-bytes", MIRROR]);
    redis.kill();
    common::wait_until("degraded", Duration::from_secs(2), async || {
        service.health().await["status"] == "degraded"
    })
    .await;
    let at_start = service.resident_bytes();

    let begin = Instant::now();
    let mut writers = Vec::new();
    for seed in 0..WRITERS {
        let client = service.client().await;
        writers.push(tokio::spawn(write(client, seed as u64)));
    }
    let mut most = at_start;
    let mut most_entries = 0;
    while writers.iter().any(|writer| !writer.is_finished()) {
        most = most.max(service.resident_bytes());
        let entries = service.health().await["mirror"]["entries"].as_u64();
        most_entries = most_entries.max(entries.unwrap_or(0));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut told = Told::default();
    for writer in writers {
        let one = writer.await.expect("a writer has panicked");
        told.stored += one.stored;
        told.refused += one.refused;
    }
    let wrote_for = begin.elapsed();

    let end = Instant::now();
    while service.health().await["mirror"]["entries"] != 0 {
        assert!(end.elapsed() < Duration::from_secs(60), "entries are left");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let empty_after = end.elapsed();
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    println!("writes            {WRITES} to {KEYS} keys in {wrote_for:.1?}");
    println!("stored, refused   {}, {}", told.stored, told.refused);
    println!("entries at most   {most_entries} in a mirror of {MIRROR}");
    println!(
        "resident          {:.0} MiB at start, {:.0} MiB at most, {:.0} MiB when empty",
        mib(at_start),
        mib(most),
        mib(service.resident_bytes())
    );
    println!("entries were gone {empty_after:.1?} after the last call");
}

/// Writes a part of all groups, in batches of one time to live each.
async fn write(mut client: common::service::Client, seed: u64) -> Told {
    let mut random = StdRng::seed_from_u64(seed);
    let mut told = Told::default();
    for _ in 0..WRITES / BATCH / WRITERS {
        // A batch must not hold a key twice.
        let first = random.random_range(0..KEYS / BATCH) * BATCH;
        let request = pb::StoreAllRequest {
            groups: (first..first + BATCH).map(group).collect(),
            expiry: Some(Expiry::Ttl(prost_types::Duration {
                seconds: random.random_range(1..=5),
                nanos: 0,
            })),
        };
        let reply = client.store_all(request).await.expect("memory answers");
        for result in reply.into_inner().results {
            match result.error {
                None => told.stored += 1,
                Some(error) if error.code == i32::from(tonic::Code::ResourceExhausted) => {
                    told.refused += 1;
                }
                Some(error) => panic!("{error:?}"),
            }
        }
    }
    told
}

fn group(key: usize) -> pb::AlertGroup {
    let alert = pb::Alert {
        fingerprint: "f".into(),
        alert_name: "HighCPU".into(),
        status: pb::AlertStatus::Firing.into(),
        ..Default::default()
    };
    pb::AlertGroup {
        key: format!("alertname=HighCPU,instance=web-{key}"),
        alerts: [("f".to_owned(), alert)].into(),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            firing_count: 1,
            ..Default::default()
        }),
    }
}
