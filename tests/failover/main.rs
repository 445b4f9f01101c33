//! Redis fails, and the service goes on: the real binary, a real Redis that is
//! killed, hung, emptied and told to refuse writes.
//!
//! Each file is one part of the story; `tests/chaos` mixes them at random.

#[path = "../common/mod.rs"]
mod common;

mod cluster;
mod large;
mod life;
mod lost_data;
mod mirror;
mod opening;
mod recovery;
mod refusals;
mod sentinel;

use std::time::Duration;

use common::{
    fault_proxy::FaultProxy,
    redis_server::RedisServer,
    service::{Client, Service},
    stalls::pass,
    wait_until,
};
use groupstate::grpc::proto as pb;
use redis::aio::MultiplexedConnection;
use tonic::Status;

/// The time after its return within which Redis must be used again.
const BACK_WITHIN: Duration = Duration::from_secs(2);

const REDIS: i32 = pb::Backend::Redis as i32;
const MEMORY: i32 = pb::Backend::Memory as i32;

/// A service on a Redis of its own.
struct Scene {
    redis: RedisServer,
    /// Between the two.
    proxy: FaultProxy,
    service: Service,
    client: Client,
}

impl Scene {
    async fn new(settings: &[&str]) -> Self {
        let redis = RedisServer::start().await;
        let proxy = FaultProxy::start(redis.addr()).await;
        let url = proxy.url();
        let service =
            Service::start(&[&["--redis-url", &url, "--shutdown-delay", "0s"], settings].concat());
        Self {
            client: service.client().await,
            service,
            proxy,
            redis,
        }
    }

    /// Another service on the same Redis, which the proxy does not cut off.
    async fn other(&self, settings: &[&str]) -> (Service, Client) {
        let url = self.redis.url();
        let service = Service::start(&[&["--redis-url", &url], settings].concat());
        let client = service.client().await;
        (service, client)
    }

    /// Cuts the service off from Redis, and waits until memory answers.
    async fn cut_off(&mut self) {
        self.proxy.refuse().await;
        self.proxy.reset_all();
        self.wait_for("degraded").await;
    }

    /// Ends that, and waits until Redis answers and knows everything.
    async fn reconnect(&mut self) {
        self.proxy.accept();
        self.wait_until_back().await;
    }

    async fn wait_for(&self, status: &str) {
        wait_until(status, BACK_WITHIN, async || {
            self.service.health().await["status"] == status
        })
        .await;
    }

    /// Waits until Redis answers and knows everything.
    async fn wait_until_back(&self) {
        wait_until("back on Redis", BACK_WITHIN, async || {
            let health = self.service.health().await;
            health["switch"]["state"] == "closed" && health["mirror"]["dirty"] == 0
        })
        .await;
    }

    async fn store(&mut self, key: &str, fingerprints: &[&str]) -> pb::StoreResponse {
        store(&mut self.client, key, fingerprints).await
    }

    async fn load(&mut self, key: &str) -> Result<pb::LoadResponse, Status> {
        load(&mut self.client, key).await
    }

    async fn delete(&mut self, key: &str) -> pb::DeleteResponse {
        let request = pb::DeleteRequest {
            key: key.into(),
            expected_version: None,
        };
        self.client.delete(request).await.unwrap().into_inner()
    }

    /// A connection to Redis itself.
    async fn redis_client(&self) -> MultiplexedConnection {
        self.redis.connect().await
    }
}

fn group(key: &str, fingerprints: &[&str]) -> pb::AlertGroup {
    let alert = |fingerprint: &&str| {
        let alert = pb::Alert {
            fingerprint: fingerprint.to_string(),
            status: pb::AlertStatus::Firing.into(),
            ..Default::default()
        };
        (fingerprint.to_string(), alert)
    };
    pb::AlertGroup {
        key: key.into(),
        alerts: fingerprints.iter().map(alert).collect(),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            firing_count: fingerprints.len() as i32,
            ..Default::default()
        }),
    }
}

async fn store(client: &mut Client, key: &str, fingerprints: &[&str]) -> pb::StoreResponse {
    let request = pb::StoreRequest {
        group: Some(group(key, fingerprints)),
        expiry: None,
    };
    client.store(request).await.unwrap().into_inner()
}

async fn load(client: &mut Client, key: &str) -> Result<pb::LoadResponse, Status> {
    let request = pb::LoadRequest {
        key: key.into(),
        include_expire_time: true,
    };
    client.load(request).await.map(tonic::Response::into_inner)
}

async fn swap(
    client: &mut Client,
    key: &str,
    fingerprints: &[&str],
    expected_version: i64,
) -> pb::CompareAndSwapResponse {
    let request = pb::CompareAndSwapRequest {
        group: Some(group(key, fingerprints)),
        expected_version,
        expiry: None,
    };
    client.compare_and_swap(request).await.unwrap().into_inner()
}

/// The alerts of a loaded group.
fn fingerprints(loaded: &pb::LoadResponse) -> Vec<&str> {
    let group = loaded.group.as_ref().unwrap();
    group.alerts.keys().map(String::as_str).collect()
}

fn version(loaded: &pb::LoadResponse) -> i64 {
    let group = loaded.group.as_ref().unwrap();
    group.metadata.as_ref().unwrap().version
}

/// Runs one command on Redis itself.
async fn redis_command(connection: &mut MultiplexedConnection, words: &[&str]) -> redis::Value {
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]);
    command.query_async(connection).await.unwrap()
}
