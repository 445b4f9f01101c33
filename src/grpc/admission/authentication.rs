//! Who may call: bearer tokens.

use std::{fmt, net::SocketAddr};

use http::{HeaderMap, header::AUTHORIZATION};
use subtle::{Choice, ConstantTimeEq};

use crate::telemetry::{self, AuthenticationFailure, rate_limited};

/// The tokens that are accepted; at least one.
pub struct Tokens(Vec<Vec<u8>>);

/// Why a caller is refused, for the caller and for the log; it says what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("no token: send the header `authorization: Bearer TOKEN`")]
    Missing,
    #[error("one header `authorization: Bearer TOKEN` is needed, and no other kind of it")]
    Malformed,
    #[error("the token is not a valid one: it may have been replaced; get the current one")]
    Unknown,
}

/// What stands before a token, whatever its case.
const SCHEME: &str = "bearer ";

// === impl Tokens ===

impl Tokens {
    /// Reads one token a line. A `#` begins a comment, on a line of its own or
    /// after a token. The error does not repeat what was read.
    pub fn parse(content: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(content).map_err(|_| "is not a text in UTF-8")?;
        let mut tokens = Vec::new();
        for (at, line) in text.lines().enumerate() {
            let mut words = line.split_whitespace();
            let Some(token) = words.next().filter(|word| !word.starts_with('#')) else {
                continue;
            };
            let number = at + 1;
            if words.next().is_some_and(|word| !word.starts_with('#')) {
                return Err(format!("line {number}: a token holds no spaces"));
            }
            if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(format!(
                    "line {number}: a token consists of visible ASCII characters"
                ));
            }
            tokens.push(token.as_bytes().to_vec());
        }
        if tokens.is_empty() {
            return Err("holds no token".into());
        }
        Ok(Self(tokens))
    }

    /// Checks the `authorization` of a request from `peer`; who is not let in is counted, and
    /// the log is told.
    pub fn admit(&self, headers: &HeaderMap, peer: Option<SocketAddr>) -> Result<(), Rejection> {
        self.check(headers).inspect_err(|rejection| {
            telemetry::authentication_failed(rejection.counts_as());
            let peer = peer.map(tracing::field::display);
            rate_limited!(warn, peer, reason = %rejection, "a call was refused for want of a valid token");
        })
    }

    /// Checks the `authorization` of a request. How long it takes tells of the
    /// tokens no more than how long they are.
    fn check(&self, headers: &HeaderMap) -> Result<(), Rejection> {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let value = values.next().ok_or(Rejection::Missing)?;
        let (scheme, token) = value
            .as_bytes()
            .split_at_checked(SCHEME.len())
            .ok_or(Rejection::Malformed)?;
        if values.next().is_some() || !scheme.eq_ignore_ascii_case(SCHEME.as_bytes()) {
            return Err(Rejection::Malformed);
        }
        let found = |found: Choice, known: &Vec<u8>| found | known.ct_eq(token);
        if bool::from(self.0.iter().fold(Choice::from(0), found)) {
            Ok(())
        } else {
            Err(Rejection::Unknown)
        }
    }
}

// === impl Rejection ===

impl Rejection {
    fn counts_as(self) -> AuthenticationFailure {
        match self {
            Self::Missing => AuthenticationFailure::NoToken,
            Self::Malformed => AuthenticationFailure::MalformedToken,
            Self::Unknown => AuthenticationFailure::UnknownToken,
        }
    }
}

impl fmt::Debug for Tokens {
    /// Does not show them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn one_token_a_line_with_comments() {
        let content = b"# of the replicas\r\none\r\n\n  two # until Friday\n#three\n";
        let tokens = Tokens::parse(content).unwrap();
        for (value, outcome) in [
            ("Bearer one", Ok(())),
            ("bearer two", Ok(())),
            ("BEARER one", Ok(())),
            ("Bearer three", Err(Rejection::Unknown)),
            ("Bearer on", Err(Rejection::Unknown)),
            ("Bearer one ", Err(Rejection::Unknown)),
            ("Bearer onetwo", Err(Rejection::Unknown)),
            ("Bearer ", Err(Rejection::Unknown)),
            ("Bearer # of the replicas", Err(Rejection::Unknown)),
            ("Bearer", Err(Rejection::Malformed)),
            ("Basic b25lOm9uZQ==", Err(Rejection::Malformed)),
            ("one", Err(Rejection::Malformed)),
            ("", Err(Rejection::Malformed)),
        ] {
            assert_eq!(tokens.check(&headers(&[value])), outcome, "{value:?}");
        }
        assert_eq!(tokens.check(&headers(&[])), Err(Rejection::Missing));
        let twice = headers(&["Bearer wrong", "Bearer one"]);
        assert_eq!(tokens.check(&twice), Err(Rejection::Malformed));
    }

    #[test]
    fn a_file_without_a_token_is_of_no_use_and_not_repeated() {
        for (content, problem) in [
            (&b"\n \n"[..], "holds no token"),
            (b"# s3cret", "holds no token"),
            (b"one\ns3cret two", "line 2"),
            ("sécret".as_bytes(), "line 1"),
            (b"s3cret\xff", "UTF-8"),
        ] {
            let error = Tokens::parse(content).unwrap_err();
            assert!(error.contains(problem), "{error}");
            assert!(!error.contains("cret"), "{error}");
        }
        let tokens = Tokens::parse(b"s3cret").unwrap();
        assert_eq!(format!("{tokens:?}"), "1 tokens");
    }
}
