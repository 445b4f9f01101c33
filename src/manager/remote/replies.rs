//! What the replies of a service say, in terms of the store contract.

use std::{error::Error, fmt, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{
    domain::{
        group::{AlertGroup, Time},
        version::Version,
    },
    grpc::{convert, proto as pb, status, validation},
    store::{Backend, ErrorKind, Expires, Failure, GroupBatch, Problem, StoreError, Written},
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
    /// Whether the time was up.
    pub timed_out: bool,
    /// An answer and not an error: there is no such group.
    pub not_found: bool,
}

// === impl Called ===

impl Called {
    pub fn of(status: &Status, effect: Effect) -> Self {
        let message = status.message().to_owned();
        let timed_out = matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled);
        let info = status.get_details_error_info();
        if let Some(info) = info.filter(|info| info.domain == status::DOMAIN) {
            let reason = status::reason_named(&info.reason).unwrap_or_default();
            let backend = match info.metadata.get("backend").map(String::as_str) {
                Some("redis") => Some(Backend::Redis),
                Some("memory") => Some(Backend::Memory),
                _ => None,
            };
            let kind = match (status::kind_of(reason), effect) {
                // The service stops work for which nobody waits, and does not say how
                // far it has come.
                (ErrorKind::DeadlineExceeded, Effect::Writes) => ErrorKind::OutcomeUnknown,
                (kind, _) => kind,
            };
            return Self {
                kind,
                message,
                backend,
                told: true,
                timed_out,
                not_found: reason == pb::ErrorReason::GroupNotFound,
            };
        }
        let kind = match (status.code(), effect) {
            // Whoever stands before the service says so without asking it.
            (Code::Unauthenticated | Code::PermissionDenied, _) => ErrorKind::Unauthenticated,
            (Code::Unimplemented, _) => ErrorKind::Invalid,
            // Nobody has the request, or its answer is missing: the time was up, the
            // connection broke, or what came cannot be read. A write may have been made.
            (_, Effect::Writes) if !was_not_sent(status) => ErrorKind::OutcomeUnknown,
            (Code::OutOfRange | Code::ResourceExhausted, _) => ErrorKind::TooLarge,
            // What tonic's client says when the time is up.
            _ if timed_out => ErrorKind::DeadlineExceeded,
            _ => ErrorKind::Unavailable,
        };
        Self {
            kind,
            message: format!("{message}{}", root_cause(status)),
            backend: None,
            told: false,
            timed_out,
            not_found: false,
        }
    }

    /// A call for which no time was left: it was not sent.
    pub fn too_late() -> Self {
        Self {
            kind: ErrorKind::DeadlineExceeded,
            message: "the deadline of the call has passed; nothing was sent".into(),
            backend: None,
            told: false,
            timed_out: true,
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
        replaced: None,
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

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn a_service_that_stops_work_does_not_know_how_far_a_write_has_come() {
        let told = |reason: &str, effect| {
            let details = ErrorDetails::with_error_info(reason, status::DOMAIN, []);
            let status = Status::with_error_details(Code::DeadlineExceeded, "late", details);
            let called = Called::of(&status, effect);
            assert!(called.told && called.timed_out);
            called.kind
        };
        let [unknown, late] = [ErrorKind::OutcomeUnknown, ErrorKind::DeadlineExceeded];
        for reason in ["DEADLINE_EXCEEDED", "CANCELLED"] {
            assert_eq!(told(reason, Effect::Writes), unknown, "{reason}");
            assert_eq!(told(reason, Effect::Reads), late, "{reason}");
        }
    }
}
