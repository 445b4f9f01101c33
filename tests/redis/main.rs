//! Any Redis, and as whom: every form of URL, TLS both ways, users and their
//! rights, what is never said of a password, and files that change.

#[path = "../common/mod.rs"]
mod common;

mod login;
mod rotation;
mod tls;
mod urls;

use std::time::Duration;

use common::{service::Service, stalls::Bound, wait_until};
use groupstate::grpc::proto as pb;

/// The time that a service needs to connect, on a busy machine.
const CONNECTED_WITHIN: Duration = Duration::from_secs(5);

/// Waits until Redis has taken and given back a group.
async fn works_on_redis(service: &Service) {
    let client = service.client().await;
    wait_until("Redis answers", CONNECTED_WITHIN, async || {
        let stored = client.clone().store(store_request("k")).await.unwrap();
        stored.get_ref().backend() == pb::Backend::Redis
    })
    .await;
    let loaded = client.clone().load(load_request("k")).await.unwrap();
    assert_eq!(loaded.get_ref().backend(), pb::Backend::Redis);
}

/// Waits until the service says why it does not use Redis.
async fn says_why_not(service: &Service, why: &str) {
    let mut reason = String::new();
    let bound = Bound::of(CONNECTED_WITHIN);
    while !bound.is_over() {
        let health = service.health().await;
        assert_ne!(health["switch"]["state"], "closed", "{why}");
        let said = health["switch"]["reason"].as_str().unwrap_or_default();
        reason = said.to_owned();
        if reason.contains(why) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not {why:?} but {reason:?}: {:#?}", service.log());
}

fn store_request(key: &str) -> pb::StoreRequest {
    pb::StoreRequest {
        group: Some(pb::AlertGroup {
            key: key.into(),
            metadata: Some(pb::GroupMetadata {
                state: pb::GroupState::Firing.into(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        expiry: None,
    }
}

fn load_request(key: &str) -> pb::LoadRequest {
    pb::LoadRequest {
        key: key.into(),
        include_expire_time: true,
    }
}
