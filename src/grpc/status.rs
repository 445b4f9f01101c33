//! From whatever went wrong to a gRPC status: the only place that knows codes,
//! reasons and details.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::admission::authentication::Rejection;
use super::proto::{self as pb, ErrorReason};
use crate::{
    store::{Backend, Deadline, ErrorKind, StoreError},
    telemetry::{CallResult, Limit, rate_limited},
};

pub const DOMAIN: &str = "groupstate";

/// An error as the caller will see it.
#[derive(Clone, Debug)]
pub struct CallError {
    pub code: Code,
    pub reason: ErrorReason,
    message: String,
    /// Field and description of each, of an `INVALID_ARGUMENT`.
    violations: Vec<(String, String)>,
    /// Further metadata of the `ErrorInfo`.
    metadata: Vec<(&'static str, String)>,
    /// When it makes sense to try again.
    retry_after: Option<Duration>,
    /// Who answered, where it is known.
    backend: Option<Backend>,
}

// === impl CallError ===

impl CallError {
    /// A status has to fit into HTTP/2 headers.
    const MAX_MESSAGE_BYTES: usize = 1_000;

    const RETRY_AFTER: Duration = Duration::from_millis(500);

    fn new(code: Code, reason: ErrorReason, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            violations: Vec::new(),
            metadata: Vec::new(),
            retry_after: None,
            backend: None,
        }
    }

    pub fn invalid(violations: Vec<(String, String)>) -> Self {
        let message = violations
            .iter()
            .map(|(field, description)| format!("{field}: {description}"))
            .collect::<Vec<_>>()
            .join("; ");
        Self {
            violations,
            ..Self::new(Code::InvalidArgument, ErrorReason::InvalidField, message)
        }
    }

    pub fn malformed(what: &str) -> Self {
        let message = format!("the request is not a message of its type: {what}");
        Self::new(
            Code::InvalidArgument,
            ErrorReason::MalformedMessage,
            message,
        )
    }

    pub fn duplicate_key() -> Self {
        Self::new(
            Code::InvalidArgument,
            ErrorReason::DuplicateKey,
            "this key stands more than once in the batch; send each group once",
        )
    }

    pub fn not_found(backend: Backend) -> Self {
        let mut error = Self::new(
            Code::NotFound,
            ErrorReason::GroupNotFound,
            "no group at this key, or it has expired",
        )
        .answered_by(backend);
        if backend == Backend::Memory {
            // The memory of one instance cannot know that nobody has it.
            error.metadata.push(("authoritative", "false".into()));
        }
        error
    }

    pub fn deadline_exceeded() -> Self {
        Self::new(
            Code::DeadlineExceeded,
            ErrorReason::DeadlineExceeded,
            "the deadline of the call has passed",
        )
    }

    /// Too much at once: over the setting `limit`.
    pub fn overloaded(limit: Limit, most: usize) -> Self {
        let limit = limit.name();
        let message =
            format!("more than --{limit} {most} at once; try again later or raise the limit");
        Self::over(limit, message)
    }

    /// Too much at once: over a limit that has no setting.
    pub fn too_many(limit: &'static str, most: usize) -> Self {
        Self::over(
            limit,
            format!("more than {limit} {most} at once; try again later"),
        )
    }

    fn over(limit: &'static str, message: String) -> Self {
        Self {
            metadata: vec![("limit", limit.into())],
            retry_after: Some(Self::RETRY_AFTER),
            ..Self::new(Code::ResourceExhausted, ErrorReason::Overloaded, message)
        }
    }

    /// The message is over this limit: our setting, or one that has none.
    pub fn message_too_large(limit: &'static str, what: &str) -> Self {
        let message = if limit == "max-request-bytes" {
            format!("the request is over --{limit}; split it or raise the limit ({what})")
        } else {
            format!("the request is larger than any that has a meaning here: {limit} ({what})")
        };
        Self {
            metadata: vec![("limit", limit.into())],
            ..Self::new(
                Code::ResourceExhausted,
                ErrorReason::MessageTooLarge,
                message,
            )
        }
    }

    /// The caller has set no deadline, and the time has passed that the service gives such
    /// a call.
    pub fn time_limit_exceeded() -> Self {
        Self::new(
            Code::DeadlineExceeded,
            ErrorReason::TimeLimitExceeded,
            "the time that the service gives a call without a deadline has passed: \
             send less at once, or set a longer deadline",
        )
    }

    /// A message of a request was still not there after this time.
    pub fn request_too_slow(after: Duration) -> Self {
        Self::new(
            Code::DeadlineExceeded,
            ErrorReason::RequestTooSlow,
            format!("a message has to come whole within {after:?}, and this one has not"),
        )
    }

    /// The reader of a stream has taken none of its messages for this long.
    pub fn reader_too_slow(after: Duration) -> Self {
        Self::new(
            Code::DeadlineExceeded,
            ErrorReason::ReaderTooSlow,
            format!("no message of the stream was taken for {after:?}; begin again, and read on"),
        )
    }

    /// The metadata of a call is over what it may be.
    pub fn metadata_too_large(bytes: usize, most: usize) -> Self {
        Self {
            metadata: vec![("limit", "max-metadata-bytes".into())],
            ..Self::new(
                Code::ResourceExhausted,
                ErrorReason::MetadataTooLarge,
                format!(
                    "the metadata of the call has {bytes} bytes, over max-metadata-bytes {most} \
                     (32 for each field beside its name and value); send less of it"
                ),
            )
        }
    }

    pub fn unsupported_compression() -> Self {
        Self::new(
            Code::Unimplemented,
            ErrorReason::UnsupportedCompression,
            "messages must not be compressed: switch compression off in the client",
        )
    }

    pub fn no_such_method() -> Self {
        Self::new(
            Code::Unimplemented,
            ErrorReason::Unimplemented,
            "no such method: check that client and server use one proto",
        )
    }

    pub fn no_reflection() -> Self {
        Self::new(
            Code::Unimplemented,
            ErrorReason::Unimplemented,
            "server reflection is switched off: --reflection off",
        )
    }

    /// The client goes on with a connection that it was asked to leave.
    pub fn connection_too_old() -> Self {
        Self::unavailable("the connection has passed --max-connection-age; open another one")
    }

    /// The client is asked to open another connection, and this stream would hold it up.
    pub fn connection_ends() -> Self {
        Self::unavailable("the connection is about to be closed; begin again on another one")
    }

    fn unavailable(message: &str) -> Self {
        Self {
            retry_after: Some(Self::RETRY_AFTER),
            ..Self::new(Code::Unavailable, ErrorReason::Unavailable, message)
        }
    }

    /// The body of a request ended before its end.
    pub fn request_broken_off() -> Self {
        let message = "the request was broken off";
        Self::new(Code::Cancelled, ErrorReason::Cancelled, message)
    }

    pub fn unauthenticated(rejection: Rejection) -> Self {
        Self::new(
            Code::Unauthenticated,
            ErrorReason::Unauthenticated,
            rejection.to_string(),
        )
    }

    /// A status that tonic made by itself, in the terms of our contract. Of the
    /// codes it uses, these contradict it.
    pub fn of_tonic(code: Code, message: &str) -> Self {
        match code {
            Code::OutOfRange => Self::message_too_large("max-request-bytes", message),
            // What it calls internal is a request that it cannot read.
            Code::Internal | Code::InvalidArgument => Self::malformed(message),
            Code::Unimplemented => Self::new(code, ErrorReason::Unimplemented, message),
            Code::Cancelled => Self::new(code, ErrorReason::Cancelled, message),
            Code::DeadlineExceeded => Self::deadline_exceeded(),
            Code::Unavailable => Self::new(code, ErrorReason::Unavailable, message),
            other => Self::new(other, ErrorReason::Internal, message),
        }
    }

    /// A bug. The message says nothing of it: the log does, under the request
    /// id.
    pub fn internal() -> Self {
        Self::new(Code::Internal, ErrorReason::Internal, "internal error")
    }

    /// The same, but that a deadline which no caller has set is not called the caller's.
    pub fn under(self, deadline: Deadline) -> Self {
        if self.reason != ErrorReason::DeadlineExceeded || deadline.instant().is_some() {
            return self;
        }
        Self {
            backend: self.backend,
            ..Self::time_limit_exceeded()
        }
    }

    /// Says who answered.
    pub fn answered_by(mut self, backend: Backend) -> Self {
        self.backend = Some(backend);
        self
    }

    /// What went wrong, for a person.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same.
    pub fn into_message(self) -> String {
        self.message
    }

    /// What it counts as.
    pub fn result(&self) -> CallResult {
        result_of(self.reason)
    }

    /// Who answered, if anyone.
    pub fn backend(&self) -> Option<Backend> {
        self.backend
    }

    /// The status. `backend` would answer a call now; it stands in where none
    /// has answered this one.
    pub fn into_status(mut self, request_id: &str, backend: Backend) -> Status {
        if self.code == Code::Internal {
            self.message = format!("{} (request id {request_id})", self.message);
        }
        truncate(&mut self.message, Self::MAX_MESSAGE_BYTES);
        let backend = self.backend.unwrap_or(backend);
        let mut metadata = HashMap::from([
            ("backend".to_owned(), backend.name().to_owned()),
            ("request_id".to_owned(), request_id.to_owned()),
        ]);
        for (name, value) in self.metadata {
            metadata.insert(name.to_owned(), value);
        }
        let mut details = ErrorDetails::with_error_info(reason_name(self.reason), DOMAIN, metadata);
        for (field, description) in self.violations {
            details.add_bad_request_violation(field, description);
        }
        if let Some(delay) = self.retry_after {
            details.set_retry_info(Some(delay));
        }
        Status::with_error_details(self.code, self.message, details)
    }

    /// The error of one group inside an OK reply.
    pub fn into_group_error(mut self, key: String) -> pb::GroupError {
        truncate(&mut self.message, Self::MAX_MESSAGE_BYTES);
        pb::GroupError {
            key,
            code: self.code.into(),
            reason: self.reason.into(),
            message: self.message,
        }
    }
}

impl From<StoreError> for CallError {
    fn from(error: StoreError) -> Self {
        let field = match &error {
            StoreError::InvalidPageToken(_) => Some("page_token"),
            StoreError::DocumentTooLarge { .. } => Some("group"),
            _ => None,
        };
        if let Some(field) = field {
            return Self::invalid(vec![(field.into(), error.to_string())]);
        }
        let (code, reason) = match error.kind() {
            ErrorKind::Invalid => (Code::InvalidArgument, ErrorReason::InvalidField),
            ErrorKind::TooLarge => (Code::ResourceExhausted, ErrorReason::MessageTooLarge),
            ErrorKind::Unreadable => (Code::DataLoss, ErrorReason::UnreadableDocument),
            ErrorKind::ForeignType => (Code::FailedPrecondition, ErrorReason::ForeignType),
            ErrorKind::VersionOutOfRange => {
                (Code::FailedPrecondition, ErrorReason::VersionOutOfRange)
            }
            ErrorKind::OutcomeUnknown => (Code::Aborted, ErrorReason::OutcomeUnknown),
            ErrorKind::ListingRestarted => (Code::Aborted, ErrorReason::ListingRestarted),
            ErrorKind::DeadlineExceeded => (Code::DeadlineExceeded, ErrorReason::DeadlineExceeded),
            ErrorKind::Overloaded => (Code::ResourceExhausted, ErrorReason::Overloaded),
            ErrorKind::MemoryFull => (Code::ResourceExhausted, ErrorReason::MemoryFull),
            ErrorKind::CommandRefused => (Code::FailedPrecondition, ErrorReason::CommandRefused),
            ErrorKind::Unauthenticated => (Code::Unauthenticated, ErrorReason::Unauthenticated),
            ErrorKind::Unavailable => (Code::Unavailable, ErrorReason::Unavailable),
            ErrorKind::Bug => {
                let what = match &error {
                    StoreError::Bug(what) => what,
                    _ => "another server says that it has met a bug",
                };
                rate_limited!(error, what, "bug");
                return Self::internal();
            }
        };
        let mut call_error = Self::new(code, reason, error.to_string());
        let waiting_helps = matches!(
            reason,
            ErrorReason::MemoryFull | ErrorReason::Overloaded | ErrorReason::Unavailable
        );
        if waiting_helps {
            call_error.retry_after = Some(Self::RETRY_AFTER);
        }
        let limit = match error {
            StoreError::MemoryFull { .. } => Some("mirror-max-bytes"),
            StoreError::StoredValueTooLarge { .. } => Some("max-document-bytes"),
            StoreError::TooMuchAtOnce { .. } => Some("redis-max-bulk-bytes"),
            _ => None,
        };
        let limit = limit.map(|limit| ("limit", limit.into()));
        call_error.metadata.extend(limit);
        call_error
    }
}

/// What an error that another groupstate has told means to a store's caller.
pub fn kind_of(reason: ErrorReason) -> ErrorKind {
    match reason {
        ErrorReason::InvalidField
        | ErrorReason::MalformedMessage
        | ErrorReason::DuplicateKey
        | ErrorReason::Unimplemented
        | ErrorReason::UnsupportedCompression => ErrorKind::Invalid,
        ErrorReason::MessageTooLarge | ErrorReason::MetadataTooLarge => ErrorKind::TooLarge,
        ErrorReason::UnreadableDocument => ErrorKind::Unreadable,
        ErrorReason::ForeignType => ErrorKind::ForeignType,
        ErrorReason::VersionOutOfRange => ErrorKind::VersionOutOfRange,
        ErrorReason::OutcomeUnknown => ErrorKind::OutcomeUnknown,
        ErrorReason::ListingRestarted => ErrorKind::ListingRestarted,
        ErrorReason::DeadlineExceeded
        | ErrorReason::TimeLimitExceeded
        | ErrorReason::RequestTooSlow
        | ErrorReason::ReaderTooSlow
        | ErrorReason::Cancelled => ErrorKind::DeadlineExceeded,
        ErrorReason::Overloaded => ErrorKind::Overloaded,
        ErrorReason::MemoryFull => ErrorKind::MemoryFull,
        ErrorReason::Unauthenticated => ErrorKind::Unauthenticated,
        ErrorReason::CommandRefused => ErrorKind::CommandRefused,
        ErrorReason::Unavailable => ErrorKind::Unavailable,
        // An absent group is an answer, of which no store makes an error.
        ErrorReason::GroupNotFound | ErrorReason::Internal | ErrorReason::Unspecified => {
            ErrorKind::Bug
        }
    }
}

impl From<crate::store::Failure> for CallError {
    fn from(failure: crate::store::Failure) -> Self {
        Self::from(failure.error).answered_by(failure.backend)
    }
}

/// What a call that fails for a reason counts as.
fn result_of(reason: ErrorReason) -> CallResult {
    match reason {
        ErrorReason::GroupNotFound => CallResult::NotFound,
        // Nothing has failed: the listing is to be begun anew.
        ErrorReason::ListingRestarted => CallResult::Conflict,
        ErrorReason::InvalidField
        | ErrorReason::MalformedMessage
        | ErrorReason::DuplicateKey
        // Waiting does not help.
        | ErrorReason::MessageTooLarge
        | ErrorReason::MetadataTooLarge
        | ErrorReason::Unimplemented
        | ErrorReason::UnsupportedCompression => CallResult::Invalid,
        ErrorReason::Unauthenticated => CallResult::Unauthenticated,
        // What is stored has to be looked at, not the request.
        ErrorReason::UnreadableDocument
        | ErrorReason::ForeignType
        | ErrorReason::VersionOutOfRange => CallResult::Unreadable,
        ErrorReason::Overloaded | ErrorReason::MemoryFull => CallResult::Shed,
        // Clients cancel a call when its deadline passes.
        ErrorReason::DeadlineExceeded
        | ErrorReason::TimeLimitExceeded
        | ErrorReason::RequestTooSlow
        | ErrorReason::ReaderTooSlow
        | ErrorReason::Cancelled => CallResult::Deadline,
        ErrorReason::Unavailable | ErrorReason::CommandRefused => CallResult::Unavailable,
        ErrorReason::OutcomeUnknown => CallResult::UnknownOutcome,
        ErrorReason::Internal | ErrorReason::Unspecified => CallResult::Error,
    }
}

/// The name of a reason without its prefix, as `ErrorInfo` has it.
pub fn reason_name(reason: ErrorReason) -> &'static str {
    reason.as_str_name().trim_start_matches("ERROR_REASON_")
}

/// The reason of that name.
pub fn reason_named(name: &str) -> Option<ErrorReason> {
    ErrorReason::from_str_name(&format!("ERROR_REASON_{name}"))
}

/// Cuts a text to at most `bytes`, between two characters.
pub fn truncate(text: &mut String, bytes: usize) {
    if text.len() > bytes {
        let mut end = bytes.saturating_sub('…'.len_utf8());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The metrics page of the README says the same.
    #[test]
    fn every_reason_counts_as_one_result() {
        let expected = [
            ("UNSPECIFIED", "error"),
            ("INVALID_FIELD", "invalid"),
            ("MALFORMED_MESSAGE", "invalid"),
            ("DUPLICATE_KEY", "invalid"),
            ("GROUP_NOT_FOUND", "not_found"),
            ("UNREADABLE_DOCUMENT", "unreadable"),
            ("FOREIGN_TYPE", "unreadable"),
            ("VERSION_OUT_OF_RANGE", "unreadable"),
            ("OUTCOME_UNKNOWN", "unknown_outcome"),
            ("LISTING_RESTARTED", "conflict"),
            ("DEADLINE_EXCEEDED", "deadline"),
            ("OVERLOADED", "shed"),
            ("MEMORY_FULL", "shed"),
            ("MESSAGE_TOO_LARGE", "invalid"),
            ("UNAUTHENTICATED", "unauthenticated"),
            ("UNAVAILABLE", "unavailable"),
            ("UNIMPLEMENTED", "invalid"),
            ("INTERNAL", "error"),
            ("CANCELLED", "deadline"),
            ("COMMAND_REFUSED", "unavailable"),
            ("TIME_LIMIT_EXCEEDED", "deadline"),
            ("REQUEST_TOO_SLOW", "deadline"),
            ("READER_TOO_SLOW", "deadline"),
            ("METADATA_TOO_LARGE", "invalid"),
            ("UNSUPPORTED_COMPRESSION", "invalid"),
        ];
        let reasons = (0..).map_while(|number| ErrorReason::try_from(number).ok());
        let actual: Vec<_> = reasons
            .map(|reason| (reason_name(reason), result_of(reason).name()))
            .collect();
        assert_eq!(actual, expected);
    }
}
