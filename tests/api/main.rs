//! The service over gRPC: every status of the contract, limits, streams, start
//! and stop.

#[path = "../common/mod.rs"]
mod common;

mod double;
mod load_all;
mod process;
mod raw_http2;
mod redis_statuses;
mod statuses;

use groupstate::grpc::proto as pb;
use prost::Message;
use tonic::{Code, Status};
use tonic_types::{ErrorInfo, StatusExt};

/// What a status must say: its code, and the reason of its `ErrorInfo`.
#[track_caller]
pub fn assert_status(status: &Status, code: Code, reason: &str) -> ErrorInfo {
    assert_eq!(status.code(), code, "{status:?}");
    let info = status.get_details_error_info();
    let info = info.unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(
        (info.domain.as_str(), info.reason.as_str()),
        ("groupstate", reason)
    );
    assert!(info.metadata.contains_key("backend"), "{info:?}");
    assert!(info.metadata.contains_key("request_id"), "{info:?}");
    let known = pb::ErrorReason::from_str_name(&format!("ERROR_REASON_{reason}"));
    assert!(known.is_some(), "{reason} is not in the closed list");
    info
}

/// The fields that an `INVALID_ARGUMENT` names.
#[track_caller]
pub fn fields(status: &Status) -> Vec<String> {
    assert_status(status, Code::InvalidArgument, "INVALID_FIELD");
    let violations = status.get_details_bad_request().unwrap().field_violations;
    violations
        .into_iter()
        .map(|violation| {
            assert!(!violation.description.is_empty());
            violation.field
        })
        .collect()
}

/// A valid group.
pub fn group(key: &str) -> pb::AlertGroup {
    pb::AlertGroup {
        key: key.into(),
        alerts: [("f".to_owned(), alert("f"))].into(),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            ..Default::default()
        }),
    }
}

pub fn alert(fingerprint: &str) -> pb::Alert {
    pb::Alert {
        fingerprint: fingerprint.into(),
        status: pb::AlertStatus::Firing.into(),
        ..Default::default()
    }
}

pub fn store_request(group: pb::AlertGroup) -> pb::StoreRequest {
    pb::StoreRequest {
        group: Some(group),
        expiry: None,
    }
}

pub fn load_request(key: &str) -> pb::LoadRequest {
    pb::LoadRequest {
        key: key.into(),
        include_expire_time: false,
    }
}

/// A message in the framing of gRPC.
pub fn frame(message: &impl Message) -> Vec<u8> {
    let body = message.encode_to_vec();
    let mut frame = vec![0];
    frame.extend((body.len() as u32).to_be_bytes());
    frame.extend(body);
    frame
}
