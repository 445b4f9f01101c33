//! What an operator sees of the service: its metrics, its log, the level of the
//! log, its traces.

#[path = "../common/mod.rs"]
mod common;
#[path = "../api/double.rs"]
mod double;

mod collector;
mod log_level;
mod logs;
mod metrics;
mod scrape;
mod traces;

use groupstate::grpc::proto as pb;

/// A valid group without alerts.
fn group(key: &str) -> pb::AlertGroup {
    pb::AlertGroup {
        key: key.into(),
        alerts: Default::default(),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            ..Default::default()
        }),
    }
}

fn store_request(key: &str) -> pb::StoreRequest {
    pb::StoreRequest {
        group: Some(group(key)),
        expiry: None,
    }
}

fn load_request(key: &str) -> pb::LoadRequest {
    pb::LoadRequest {
        key: key.into(),
        include_expire_time: false,
    }
}
