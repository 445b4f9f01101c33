//! What grows with the number of groups: listings, memory, the way to a full
//! mirror after a start. `cargo bench --bench growth`; `GROUPS=100000` stops there.
//!
//! A cost that is right is flat per group. Keys of others in the same Redis cost
//! listings a SCAN over them. Stores are one after another, beside `StoreAll` of
//! 1,000 at once.

#[path = "../tests/common/mod.rs"]
mod common;
mod load;

use std::time::{Duration, Instant};

use common::{redis_server::RedisServer, service::Service};
use groupstate::grpc::proto as pb;
use load::{RawClient, encode};
use prost::Message;

const SIZES: [usize; 4] = [1_000, 10_000, 100_000, 1_000_000];
/// Keys that are not ours.
const FOREIGN: usize = 1_000_000;
/// Documents of about 1 KB.
const ALERTS: usize = 2;
const BATCH: usize = 1_000;
/// Room for all of them in the mirror.
const MIRROR: &str = "4GiB";
const WARM_WITHIN: Duration = Duration::from_secs(300);
const MIB: f64 = (1 << 20) as f64;

#[tokio::main]
async fn main() {
    let most = std::env::var("GROUPS")
        .ok()
        .and_then(|most| most.parse().ok());
    let most = most.unwrap_or(usize::MAX);
    println!(
        "| groups | foreign keys | StoreAll µs/group | Store µs | Size ms | ListKeys ms | LoadAll ms | µs/group \
         | serving after ms | all in the mirror after ms | mirror MiB | × documents | RSS MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    let redis = RedisServer::start().await;
    let mut filled = 0;
    for groups in SIZES.into_iter().filter(|groups| *groups <= most) {
        let stored = fill(&redis, filled..groups).await;
        filled = groups;
        measure(&redis, groups, 0, Some(stored)).await;
    }
    add_foreign(&redis).await;
    measure(&redis, filled, FOREIGN, None).await;
}

/// Stores groups. How long each took.
async fn fill(redis: &RedisServer, numbers: std::ops::Range<usize>) -> Duration {
    let service = Service::start(&["--redis-url", &redis.url()]);
    let client = RawClient::connect(service.addr(), 1).await;
    let mut took = Duration::ZERO;
    for first in numbers.clone().step_by(BATCH) {
        let groups = (first..first + BATCH).map(|number| load::group(number, ALERTS));
        let request = encode(&pb::StoreAllRequest {
            groups: groups.collect(),
            expiry: None,
        });
        let begin = Instant::now();
        let reply = client.call(0, load::STORE_ALL, request).await.unwrap();
        took += begin.elapsed();
        let reply = pb::StoreAllResponse::decode(reply).unwrap();
        assert_eq!(reply.backend(), pb::Backend::Redis);
        assert!(reply.results.iter().all(|result| result.error.is_none()));
    }
    took / numbers.len() as u32
}

async fn add_foreign(redis: &RedisServer) {
    let mut connection = redis.connect().await;
    for first in (0..FOREIGN).step_by(BATCH) {
        let mut pipeline = redis::pipe();
        for number in first..first + BATCH {
            pipeline.set(format!("session:{number}"), "x").ignore();
        }
        let () = pipeline.query_async(&mut connection).await.unwrap();
    }
}

async fn measure(redis: &RedisServer, groups: usize, foreign: usize, stored: Option<Duration>) {
    let begin = Instant::now();
    let service = Service::start(&["--redis-url", &redis.url(), "--mirror-max-bytes", MIRROR]);
    let serving = begin.elapsed();
    while service.metric("mirror_entries").await < groups as f64 {
        assert!(begin.elapsed() < WARM_WITHIN, "{}", service.health().await);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let warm = begin.elapsed();
    let mirror = service.metric("mirror_bytes").await;
    let documents = documents(redis, groups).await;
    let rss = service.resident_bytes() as f64;

    let client = RawClient::connect(service.addr(), 1).await;
    let store = timed(async {
        for number in 0..BATCH {
            let reply = client.call(0, load::STORE, load::store_request(number, ALERTS));
            let reply = pb::StoreResponse::decode(reply.await.unwrap()).unwrap();
            assert_eq!(reply.backend(), pb::Backend::Redis);
        }
    });
    let store = store.await;
    let size = timed(async {
        let reply = client.call(0, load::SIZE, encode(&pb::SizeRequest::default()));
        let reply = pb::SizeResponse::decode(reply.await.unwrap()).unwrap();
        assert_eq!(reply.count, groups as i64);
    });
    let size = size.await;
    let list = timed(list_keys(&client, groups)).await;
    let load_all = timed(async {
        let request = encode(&pb::LoadAllRequest::default());
        let last = client
            .last_of_stream(load::LOAD_ALL, request)
            .await
            .unwrap();
        let summary = pb::LoadAllResponse::decode(last).unwrap().summary.unwrap();
        assert_eq!((summary.groups, summary.complete), (groups as i64, true));
    });
    let load_all = load_all.await;
    println!(
        "| {groups} | {foreign} | {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.0} | {:.0} | {:.1} | {:.2} | {:.1} |",
        stored.map_or_else(|| "-".into(), |took| format!("{:.1}", micros(took))),
        micros(store) / BATCH as f64,
        millis(size),
        millis(list),
        millis(load_all),
        micros(load_all) / groups as f64,
        millis(serving),
        millis(warm),
        mirror / MIB,
        mirror / documents,
        rss / MIB,
    );
}

async fn list_keys(client: &RawClient, groups: usize) {
    let mut request = pb::ListKeysRequest::default();
    let mut keys = 0;
    loop {
        let reply = client.call(0, load::LIST_KEYS, encode(&request)).await;
        let reply = pb::ListKeysResponse::decode(reply.unwrap()).unwrap();
        keys += reply.keys.len();
        if reply.next_page_token.is_empty() {
            break;
        }
        request.page_token = reply.next_page_token;
    }
    // A key may come twice.
    assert!(keys >= groups, "{keys} of {groups}");
}

/// Bytes of all documents; their keys have nearly one length.
async fn documents(redis: &RedisServer, groups: usize) -> f64 {
    let mut connection = redis.connect().await;
    let key = format!("group:{}", load::key_of(groups - 1));
    let one: usize = redis::AsyncCommands::strlen(&mut connection, key)
        .await
        .unwrap();
    (one * groups) as f64
}

async fn timed(work: impl Future<Output = ()>) -> Duration {
    let begin = Instant::now();
    work.await;
    begin.elapsed()
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
