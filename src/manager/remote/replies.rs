//! What the replies of a service say, in terms of the store contract.

use std::{error::Error, fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{
    group::{AlertGroup, Time},
    grpc::{convert, proto as pb, status, validation},
    store::{Backend, ErrorKind, Expires, Failure, GroupBatch, Problem, StoreError, Written},
    version::Version,
};

/// Whether a call changes something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Reads,
    Writes,
}

/// What a status means to the caller of a store.
#[derive(Debug)]
pub struct Called {
    pub kind: ErrorKind,
    pub message: String,
    /// Who answered, if anyone.
    pub backend: Option<Backend>,
    /// Whether the service itself said so, and not the client's library.
    pub told: bool,
    /// An answer and not an error: there is no such group.
    pub not_found: bool,
}

// === impl Called ===

impl Called {
    pub fn of(status: &Status, effect: Effect) -> Self {
        let message = status.message().to_owned();
        let info = status.get_details_error_info();
        if let Some(info) = info.filter(|info| info.domain == status::DOMAIN) {
            let reason = status::reason_named(&info.reason).unwrap_or_default();
            let backend = match info.metadata.get("backend").map(String::as_str) {
                Some("redis") => Some(Backend::Redis),
                Some("memory") => Some(Backend::Memory),
                _ => None,
            };
            return Self {
                kind: status::kind_of(reason),
                message,
                backend,
                told: true,
                not_found: reason == pb::ErrorReason::GroupNotFound,
            };
        }
        let kind = match status.code() {
            // What tonic's client says when the time is up.
            Code::DeadlineExceeded | Code::Cancelled => ErrorKind::DeadlineExceeded,
            Code::OutOfRange | Code::ResourceExhausted => ErrorKind::TooLarge,
            Code::Unauthenticated | Code::PermissionDenied => ErrorKind::Unauthenticated,
            Code::Unimplemented => ErrorKind::Invalid,
            // The connection broke. A write may have gone through before.
            _ if effect == Effect::Writes && !was_not_sent(status) => ErrorKind::OutcomeUnknown,
            _ => ErrorKind::Unavailable,
        };
        Self {
            kind,
            message: format!("{message}{}", root_cause(status)),
            backend: None,
            told: false,
            not_found: false,
        }
    }
}

/// Whether a call failed before there was a connection to send it on.
fn was_not_sent(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<tonic::ConnectError>())
}

/// The errors behind a status; tonic's own text says only "transport error".
fn causes<'a>(status: &'a Status) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(status.source(), |&cause| cause.source())
}

fn root_cause(status: &Status) -> String {
    causes(status)
        .last()
        .map_or_else(String::new, |cause| format!(": {cause}"))
}

pub fn nonsense(what: &str, error: impl fmt::Display) -> StoreError {
    StoreError::Bug(format!("{what} from the service is not valid: {error}"))
}

/// An error about one group inside a reply.
pub fn told(error: pb::GroupError) -> StoreError {
    StoreError::Told {
        kind: status::kind_of(error.reason()),
        message: error.message,
    }
}

pub fn whole_group(backend: Backend, group: Option<pb::AlertGroup>) -> Result<AlertGroup, Failure> {
    let group = group.ok_or_else(|| backend.fails(nonsense("a reply", "it has no group")))?;
    validation::stored_group(group).map_err(|error| backend.fails(nonsense("a group", error)))
}

pub fn written(
    backend: Backend,
    version: i64,
    expire_time: Option<prost_types::Timestamp>,
) -> Result<Written, Failure> {
    let version = Version::new(version)
        .ok_or_else(|| backend.fails(nonsense("a version", "it is less than 1")))?;
    Ok(Written {
        version,
        expires: expire_time.and_then(expires),
    })
}

/// What is left is reckoned by this machine's clock.
pub fn expires(at: prost_types::Timestamp) -> Option<Expires> {
    let at = validation::stored_time(at)?;
    let left = at.millis().saturating_sub(Time::now().millis());
    Some(Expires {
        at,
        left: Duration::from_millis(u64::try_from(left).unwrap_or(0)),
    })
}

/// One message of a LoadAll.
pub fn batch(backend: Backend, message: pb::LoadAllResponse) -> Result<GroupBatch, Status> {
    if message.backend != convert::backend(backend) {
        return Err(Status::unavailable("LoadAll: its backend has changed"));
    }
    let mut batch = GroupBatch {
        complete: message.summary.map(|summary| summary.complete),
        ..GroupBatch::default()
    };
    for group in message.groups {
        let key = group.key.clone();
        match validation::stored_group(group) {
            Ok(group) => batch.groups.push(group),
            Err(error) => batch.problems.push(Problem {
                key,
                error: nonsense("a group", error),
            }),
        }
    }
    let problems = message.problems.into_iter().map(|error| Problem {
        key: error.key.clone(),
        error: told(error),
    });
    batch.problems.extend(problems);
    Ok(batch)
}
