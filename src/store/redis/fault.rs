//! What an error of fred or Redis means for the call that met it.

use std::borrow::Cow;

use fred::prelude::{Error, ErrorKind};

use crate::store::StoreError;

/// Why an attempt at a Redis command did not do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It surely was not executed: Redis refused it, or it was never sent. It
    /// may be repeated freely.
    NotRun(String),
    /// This connection does not lead to the server yet: a cluster has changed, and
    /// only others have noticed.
    NoRoute,
    /// It may have been executed: the answer is missing.
    Lost(String),
    /// The server does not know the script; load it and repeat.
    NoScript,
    /// The server does not hold the key any more, or is about to give it away.
    Redirected,
    /// Repeating is of no use.
    Final(StoreError),
}

// === impl Fault ===

impl Fault {
    /// The fault that an error of fred stands for.
    pub fn of(error: &Error) -> Self {
        let text = error.details();
        if is_reply_of_redis(text) {
            return Self::of_reply(text);
        }
        let text = readable(error).to_owned();
        match error.kind() {
            // What fred makes of `MOVED` and `ASK`, see `Link::open`.
            ErrorKind::Routing if text == "Too many redirections." => Self::Redirected,
            // fred could not find a connection to write to.
            ErrorKind::Routing | ErrorKind::Backpressure | ErrorKind::Config => Self::NotRun(text),
            _ if text == "Failed to route command." => Self::NoRoute,
            _ => Self::Lost(text),
        }
    }

    /// The fault that an error reply of Redis stands for. The scripts raise no
    /// errors of their own, so a command answered by an error did nothing.
    pub fn of_reply(text: &str) -> Self {
        if text.starts_with("NOSCRIPT") {
            Self::NoScript
        } else if text.starts_with("WRONGTYPE") {
            Self::Final(StoreError::ForeignType)
        } else {
            Self::NotRun(text.to_owned())
        }
    }

    /// The same fault of a command that the service can do without: that Redis does not
    /// let us use it, or does not know it, concerns the call and nobody else.
    pub fn of_command(self, name: &str) -> Self {
        match self {
            Self::NotRun(reply) if is_about_the_command(&reply) => {
                let command = name.to_owned();
                Self::Final(StoreError::CommandRefused { command, reply })
            }
            fault => fault,
        }
    }

    /// Whether a server refuses to write because it is a replica.
    pub fn is_of_replica(&self) -> bool {
        matches!(self, Self::NotRun(text) if text.starts_with("READONLY"))
    }

    /// One word of a small vocabulary: the code of an error reply of Redis, or
    /// what there is instead.
    pub fn kind(&self) -> Cow<'static, str> {
        match self {
            Self::NotRun(text) | Self::Lost(text) if is_reply_of_redis(text) => {
                text.split(' ').next().unwrap_or_default().to_owned().into()
            }
            Self::NotRun(_) | Self::NoRoute => "not_sent".into(),
            Self::Lost(_) => "no_answer".into(),
            Self::NoScript => "NOSCRIPT".into(),
            Self::Redirected => "redirected".into(),
            Self::Final(StoreError::ForeignType) => "WRONGTYPE".into(),
            Self::Final(_) => "error".into(),
        }
    }

    /// The same fault of a command that only prepares a write: whether it was
    /// executed or not, nothing was written.
    pub fn before_the_write(self) -> Self {
        match self {
            Self::Lost(text) => Self::NotRun(text),
            fault => fault,
        }
    }
}

/// The text of an error of fred for people: it prints those of the system in the
/// form for programmers, `Os { code: 111, …, message: "Connection refused" }`, and
/// those of TLS as `Custom { kind: InvalidData, error: … }`.
pub fn readable(error: &Error) -> &str {
    let text = error.details();
    if text == "channel closed" {
        // Who should have answered is gone.
        return "the connection was given up";
    }
    if let Some((_, message)) = text.split_once("message: \"")
        && text.starts_with("Os {")
    {
        return message.trim_end_matches("\" }");
    }
    if let Some((_, inner)) = text.split_once("error: ")
        && text.starts_with("Custom {")
    {
        return inner.trim_end_matches(" }").trim_matches('"');
    }
    text
}

/// Whether an error reply is about the command that was sent: our user has no right to
/// it, or this server does not know it.
pub fn is_about_the_command(reply: &str) -> bool {
    reply.starts_with("NOPERM") || reply.starts_with("ERR unknown command")
}

/// Replies of Redis begin with a code in capitals (`ERR`, `LOADING`, …); fred's
/// own texts do not.
pub fn is_reply_of_redis(text: &str) -> bool {
    let code = text.split(' ').next().unwrap_or_default();
    code.len() >= 3 && code.bytes().all(|c| c.is_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reply_means_that_nothing_was_done() {
        for text in [
            "LOADING Redis is loading the dataset in memory",
            "READONLY You can't write against a read only replica.",
            "OOM command not allowed when used memory > 'maxmemory'.",
            "ERR unknown command",
            "MOVED 42 127.0.0.1:7001",
        ] {
            let error = Error::new(ErrorKind::Unknown, text);
            assert_eq!(Fault::of(&error), Fault::NotRun(text.into()));
        }
        let error = Error::new(ErrorKind::Routing, "Too many redirections.");
        assert_eq!(Fault::of(&error), Fault::Redirected);
        let error = Error::new(ErrorKind::Unknown, "Failed to route command.");
        assert_eq!(Fault::of(&error), Fault::NoRoute);
        let error = Error::new(ErrorKind::Unknown, "NOSCRIPT No matching script.");
        assert_eq!(Fault::of(&error), Fault::NoScript);
        let error = Error::new(
            ErrorKind::InvalidArgument,
            "WRONGTYPE Operation against a key",
        );
        assert_eq!(Fault::of(&error), Fault::Final(StoreError::ForeignType));
    }

    #[test]
    fn the_kind_of_a_fault_is_one_word() {
        let faults = [
            (Fault::of_reply("READONLY You can't write"), "READONLY"),
            (Fault::of_reply("NOSCRIPT No matching script."), "NOSCRIPT"),
            (Fault::of_reply("WRONGTYPE Operation against"), "WRONGTYPE"),
            (Fault::NotRun("connecting again".into()), "not_sent"),
            (Fault::Lost("no answer in time".into()), "no_answer"),
        ];
        for (fault, kind) in faults {
            assert_eq!(fault.kind(), kind);
        }
    }

    #[test]
    fn errors_of_the_system_are_told_in_plain_words() {
        let text = "Os { code: 111, kind: ConnectionRefused, message: \"Connection refused\" }";
        assert_eq!(
            readable(&Error::new(ErrorKind::IO, text)),
            "Connection refused"
        );
        for (inner, shown) in [
            (
                "InvalidCertificate(UnknownIssuer)",
                "InvalidCertificate(UnknownIssuer)",
            ),
            ("\"failed to lookup\"", "failed to lookup"),
        ] {
            let text = format!("Custom {{ kind: InvalidData, error: {inner} }}");
            assert_eq!(readable(&Error::new(ErrorKind::IO, text)), shown);
        }
        let text = "WRONGPASS invalid username-password pair or user is disabled.";
        assert_eq!(readable(&Error::new(ErrorKind::Auth, text)), text);
    }

    #[test]
    fn a_missing_answer_means_that_it_may_have_been_executed() {
        for (kind, text) in [
            (ErrorKind::Timeout, "Request timed out."),
            (ErrorKind::IO, "Connection reset by peer"),
            (ErrorKind::Canceled, "Canceled."),
            (ErrorKind::Unknown, "Too many failed write attempts."),
        ] {
            assert_eq!(Fault::of(&Error::new(kind, text)), Fault::Lost(text.into()));
        }
    }
}
