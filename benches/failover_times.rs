//! How soon a replica that has taken over is used: from the moment in which it
//! takes itself for a primary to the first call that Redis answers again.
//!
//! ```text
//! make failover-times
//! ```
//!
//! By sentinels, that moment is up to a second earlier than the one in which they
//! tell of it: so often they ask the replica.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use common::{
    replicated::{Failure, Kind, Replicated},
    service::{Client, Service},
};
use groupstate::grpc::proto as pb;

const ROUNDS: usize = 10;
/// Between two calls.
const PAUSE: Duration = Duration::from_millis(2);
/// Calls before and after each failure, so that the service knows the servers.
const QUIET: Duration = Duration::from_secs(1);
/// Far more than is promised.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() {
    println!("| Redis | failure | median | longest of {ROUNDS} |");
    println!("|---|---|---|---|");
    for kind in [Kind::Sentinel, Kind::Cluster] {
        let mut redis = Replicated::start(kind).await;
        for failure in [Failure::Kill, Failure::Hang] {
            let mut times = Vec::new();
            for _ in 0..ROUNDS {
                times.push(measure(&mut redis, failure).await);
                redis.bring_back(failure).await;
            }
            times.sort_unstable();
            let (median, longest) = (times[ROUNDS / 2], times[ROUNDS - 1]);
            println!("| {kind} | {failure} | {median:.2?} | {longest:.2?} |");
        }
    }
}

/// One failure, as a new instance sees it.
async fn measure(redis: &mut Replicated, failure: Failure) -> Duration {
    let service = Service::start(&["--redis-url", &redis.url()]);
    let client = service.client().await;
    answered_by_redis(&client, Instant::now()).await;
    tokio::time::sleep(QUIET).await;
    let promoted = redis.fail_over(failure).await;
    answered_by_redis(&client, promoted).await
}

/// How long after `since` Redis answers a call.
async fn answered_by_redis(client: &Client, since: Instant) -> Duration {
    loop {
        let request = pb::StoreRequest {
            group: Some(pb::AlertGroup {
                key: "k".into(),
                metadata: Some(pb::GroupMetadata {
                    state: pb::GroupState::Firing.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            expiry: None,
        };
        let stored = client.clone().store(request).await;
        let took = since.elapsed();
        if stored.is_ok_and(|stored| stored.get_ref().backend() == pb::Backend::Redis) {
            return took;
        }
        assert!(took < FOLLOWED_WITHIN, "Redis is not used again");
        tokio::time::sleep(PAUSE).await;
    }
}
