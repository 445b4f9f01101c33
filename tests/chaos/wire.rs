//! The calls of the clients as gRPC: requests and replies, there and back.

use std::time::{Duration, SystemTime};

use groupstate::grpc::proto as pb;
use prost_types::Timestamp;
use tonic::{Code, Request as Envelope, Status};
use tonic_types::StatusExt;

use super::history::{Backend, Content, Found, Key, Reply, Request};
use crate::common::service::Client;

/// Longer than any run.
const TTL: Duration = Duration::from_secs(3_600);
/// Of [`Request::StoreBriefly`].
pub const BRIEF_TTL: Duration = Duration::from_secs(1);

/// Makes a call and waits for its end.
pub async fn send(
    client: &mut Client,
    key: Key,
    request: &Request,
    deadline: Option<Duration>,
) -> Reply {
    let reply = try_to_send(client, key, request, deadline).await;
    reply.unwrap_or_else(|status| failed(&status))
}

async fn try_to_send(
    client: &mut Client,
    key: Key,
    request: &Request,
    deadline: Option<Duration>,
) -> Result<Reply, Status> {
    let now = Timestamp::from(SystemTime::now());
    let ttl = match request {
        Request::StoreBriefly(_) => BRIEF_TTL,
        _ => TTL,
    };
    let ttl = prost_types::Duration::try_from(ttl).expect("an hour is not too long");
    Ok(match request {
        Request::Store(content) | Request::StoreBriefly(content) => {
            let message = pb::StoreRequest {
                group: Some(content.to_group(&key, now)),
                expiry: Some(pb::store_request::Expiry::Ttl(ttl)),
            };
            let reply = client.store(within(deadline, message)).await?.into_inner();
            Reply::Written {
                backend: backend(reply.backend()),
                version: reply.version,
            }
        }
        Request::Swap { content, expected } => {
            let message = pb::CompareAndSwapRequest {
                group: Some(content.to_group(&key, now)),
                expected_version: *expected,
                expiry: Some(pb::compare_and_swap_request::Expiry::Ttl(ttl)),
            };
            let reply = client.compare_and_swap(within(deadline, message)).await?;
            let reply = reply.into_inner();
            let backend = backend(reply.backend());
            if reply.swapped {
                Reply::Written {
                    backend,
                    version: reply.version,
                }
            } else {
                let found = reply.current.as_ref().map(found);
                Reply::Shown { backend, found }
            }
        }
        Request::Delete { expected } => {
            let message = pb::DeleteRequest {
                key: key.to_string(),
                expected_version: *expected,
            };
            let reply = client.delete(within(deadline, message)).await?.into_inner();
            let (backend, version) = (backend(reply.backend()), reply.version);
            if reply.deleted {
                Reply::Deleted { backend, version }
            } else {
                Reply::NotDeleted { backend, version }
            }
        }
        Request::Load => {
            let message = pb::LoadRequest {
                key: key.to_string(),
                include_expire_time: false,
            };
            match client.load(within(deadline, message)).await {
                Ok(reply) => {
                    let reply = reply.into_inner();
                    Reply::Shown {
                        backend: backend(reply.backend()),
                        found: reply.group.as_ref().map(found),
                    }
                }
                Err(status) if status.code() == Code::NotFound => Reply::Shown {
                    backend: backend_of_status(&status),
                    found: None,
                },
                Err(status) => return Err(status),
            }
        }
    })
}

fn within<T>(deadline: Option<Duration>, message: T) -> Envelope<T> {
    let mut request = Envelope::new(message);
    if let Some(deadline) = deadline {
        request.set_timeout(deadline);
    }
    request
}

fn backend(backend: pb::Backend) -> Backend {
    match backend {
        pb::Backend::Redis => Backend::Redis,
        pb::Backend::Memory => Backend::Memory,
        pb::Backend::Unspecified => panic!("a reply does not say which backend answered"),
    }
}

fn backend_of_status(status: &Status) -> Backend {
    let info = status.get_details_error_info();
    let backend = info.and_then(|info| info.metadata.get("backend").cloned());
    match backend.as_deref() {
        Some("redis") => Backend::Redis,
        Some("memory") => Backend::Memory,
        other => panic!("{status:?} says that {other:?} answered"),
    }
}

/// A group that was read.
pub fn found(group: &pb::AlertGroup) -> Found {
    Found {
        content: Content::of_group(group),
        version: group
            .metadata
            .as_ref()
            .map_or(0, |metadata| metadata.version),
    }
}

fn failed(status: &Status) -> Reply {
    let message = status.message().to_owned();
    let (code, reason) = match (status.code(), status.get_details_error_info()) {
        (code, Some(info)) => (code, info.reason),
        // tonic's client says so when its own clock was faster than the
        // service's.
        (Code::Cancelled, None) if message == "Timeout expired" => {
            (Code::DeadlineExceeded, "DEADLINE_EXCEEDED".into())
        }
        (code, None) => (code, "without ErrorInfo".into()),
    };
    Reply::Failed {
        code,
        reason,
        message,
    }
}
