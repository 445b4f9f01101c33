//! The slowest of a hundred and of a thousand calls while something else goes on:
//! `cargo bench --bench tail`. Each scene stands beside a quiet one of the same run.

#[path = "../tests/common/mod.rs"]
mod common;
mod load;

use std::time::{Duration, Instant};

use common::{redis_server::RedisServer, service::Service};
use groupstate::grpc::proto as pb;
use load::{RawClient, encode};
use redis::aio::MultiplexedConnection;
use tokio::task::JoinSet;

const GROUPS: usize = 100_000;
const ALERTS: usize = 2;
const BATCH: usize = 1_000;
/// Calls in flight, half of them Loads.
const TASKS: usize = 8;
const ROUND: Duration = Duration::from_secs(10);

/// What goes on beside the calls.
#[derive(Clone, Copy, Debug)]
enum Beside {
    Nothing,
    /// Somebody reads all groups, again and again.
    LoadAll,
    /// Redis writes its data to disk, again and again.
    BgSave,
}

struct Scene {
    name: &'static str,
    settings: &'static [&'static str],
    beside: Beside,
}

const SCENES: [Scene; 5] = [
    Scene {
        name: "quiet",
        settings: &[],
        beside: Beside::Nothing,
    },
    Scene {
        name: "LoadAll of 100,000 groups",
        settings: &[],
        beside: Beside::LoadAll,
    },
    Scene {
        name: "BGSAVE of Redis",
        settings: &[],
        beside: Beside::BgSave,
    },
    Scene {
        name: "the mirror evicts (8 MiB for 100 MB)",
        settings: &["--mirror-max-bytes", "8MiB"],
        beside: Beside::Nothing,
    },
    Scene {
        name: "log level debug",
        settings: &["--log-level", "debug"],
        beside: Beside::Nothing,
    },
];

#[tokio::main]
async fn main() {
    let redis = RedisServer::start().await;
    fill(&redis).await;
    println!("{TASKS} calls in flight, {GROUPS} groups of 1 KB, {ROUND:?} a scene\n");
    println!("| beside | call | calls/s | p50 µs | p99 µs | p99.9 µs | longest ms |");
    println!("|---|---|---|---|---|---|---|");
    for scene in SCENES {
        let url = redis.url();
        let settings = [&["--redis-url", &url], scene.settings].concat();
        let service = Service::start(&settings);
        // Until then the mirror is being filled.
        while service.health().await["status"] != "ok" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let beside = go_on(&redis, &service, scene.beside).await;
        let [loads, stores] = call(&service).await;
        drop(beside);
        print(scene.name, "Load", loads);
        print(scene.name, "Store", stores);
    }
}

async fn fill(redis: &RedisServer) {
    let service = Service::start(&["--redis-url", &redis.url()]);
    let client = RawClient::connect(service.addr(), 1).await;
    for first in (0..GROUPS).step_by(BATCH) {
        let groups = (first..first + BATCH).map(|number| load::group(number, ALERTS));
        let request = encode(&pb::StoreAllRequest {
            groups: groups.collect(),
            expiry: None,
        });
        client.call(0, load::STORE_ALL, request).await.unwrap();
    }
}

/// Does something until what this returns is dropped.
async fn go_on(redis: &RedisServer, service: &Service, beside: Beside) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    match beside {
        Beside::Nothing => {}
        Beside::LoadAll => {
            let client = RawClient::connect(service.addr(), 1).await;
            tasks.spawn(async move {
                loop {
                    let request = encode(&pb::LoadAllRequest::default());
                    let all = client.last_of_stream(load::LOAD_ALL, request).await;
                    all.expect("it goes through");
                }
            });
        }
        Beside::BgSave => {
            let mut redis = redis.connect().await;
            tasks.spawn(async move {
                loop {
                    save(&mut redis).await;
                }
            });
        }
    }
    tasks
}

/// Begins to write to disk, unless that goes on already.
async fn save(redis: &mut MultiplexedConnection) {
    let _: Result<(), _> = redis::cmd("BGSAVE").query_async(redis).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Loads and Stores of any groups. How long each took.
async fn call(service: &Service) -> [Vec<Duration>; 2] {
    let client = RawClient::connect(service.addr(), 4).await;
    let end = Instant::now() + ROUND;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let client = client.clone();
        tasks.spawn(async move {
            let stores = task % 2 == 1;
            let mut took = Vec::new();
            while Instant::now() < end {
                let number = rand::random_range(0..GROUPS);
                let (path, request) = if stores {
                    (load::STORE, load::store_request(number, ALERTS))
                } else {
                    (load::LOAD, load::load_request(number))
                };
                let sent = Instant::now();
                client.call(task, path, request).await.unwrap();
                took.push(sent.elapsed());
            }
            (stores, took)
        });
    }
    let mut all = [Vec::new(), Vec::new()];
    while let Some(done) = tasks.join_next().await {
        let (stores, took) = done.unwrap();
        all[usize::from(stores)].extend(took);
    }
    all
}

fn print(scene: &str, call: &str, mut took: Vec<Duration>) {
    took.sort_unstable();
    let micros = |share: f64| {
        let at = (took.len() as f64 * share) as usize;
        took[at.min(took.len() - 1)].as_micros()
    };
    println!(
        "| {scene} | {call} | {:.0} | {} | {} | {} | {:.1} |",
        took.len() as f64 / ROUND.as_secs_f64(),
        micros(0.5),
        micros(0.99),
        micros(0.999),
        micros(1.0) as f64 / 1e3,
    );
}
