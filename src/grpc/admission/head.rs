//! What is checked of the head of a request before anything else: that it is a call of
//! gRPC, how large its metadata is, and that its messages can be read.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
    request,
};
use tonic::body::Body;

use super::call::operation;
use crate::{
    grpc::status::CallError,
    telemetry::{self, Refused, rate_limited},
};

/// Which service a call is for, by its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Ours,
    /// `grpc.health.v1`, which needs no token and is never shed: a probe must not fail
    /// under load.
    Health(Health),
    Reflection,
    /// Nobody.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Check,
    /// Goes on for as long as its connection.
    Watch,
}

/// The metadata of a call, as HTTP/2 counts it: names, values, and [`FIELD_BYTES`] for
/// each.
pub const MAX_METADATA_BYTES: usize = 16 << 10;

const FIELD_BYTES: usize = 32;

/// That of most calls.
const SMALL_METADATA_BYTES: usize = 1_024;

/// What h2 takes of it, so that we are the ones who refuse it and can say why. It answers
/// more than this with 431 and nothing else, and closes the connection at four times as
/// much.
pub const MAX_HEADER_LIST_BYTES: u32 = 64 << 10;

/// How the messages of a call are compressed.
const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
pub const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// Not at all, which is all that is taken.
pub const IDENTITY: HeaderValue = HeaderValue::from_static("identity");

const GRPC: &[u8] = b"application/grpc";

// === impl Route ===

impl Route {
    pub fn of(path: &str) -> Self {
        match path {
            "/grpc.health.v1.Health/Check" => Self::Health(Health::Check),
            "/grpc.health.v1.Health/Watch" => Self::Health(Health::Watch),
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
            | "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo" => Self::Reflection,
            path if operation(path).is_some() => Self::Ours,
            _ => Self::Unknown,
        }
    }

    /// Whether the reply goes on for as long as its client likes.
    pub fn is_endless(self) -> bool {
        matches!(self, Self::Health(Health::Watch) | Self::Reflection)
    }
}

/// The answer to a request that is none of gRPC, in the terms of HTTP.
pub fn not_grpc<B>(request: &Request<B>) -> Option<Response<Body>> {
    let (reason, status) = if request.method() != Method::POST {
        (Refused::Method, StatusCode::METHOD_NOT_ALLOWED)
    } else if !is_grpc(request.headers()) {
        (Refused::ContentType, StatusCode::UNSUPPORTED_MEDIA_TYPE)
    } else {
        return None;
    };
    telemetry::request_refused(reason);
    rate_limited!(
        info,
        method = %request.method(),
        status = status.as_u16(),
        "a request was refused that is no call of gRPC"
    );
    // Without a body, which its client might not take.
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    if status == StatusCode::METHOD_NOT_ALLOWED {
        let post = HeaderValue::from_static("POST");
        response.headers_mut().insert(ALLOW, post);
    }
    Some(response)
}

/// Whether the content type is `application/grpc`, with `+proto` or parameters or without;
/// that of gRPC-Web is another one.
fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE) else {
        return false;
    };
    let value = value.as_bytes();
    let kind = value.split(|byte| *byte == b';').next().unwrap_or(value);
    let Some((begin, rest)) = kind.trim_ascii().split_at_checked(GRPC.len()) else {
        return false;
    };
    let is_proto = rest.is_empty() || rest.eq_ignore_ascii_case(b"+proto");
    begin.eq_ignore_ascii_case(GRPC) && is_proto
}

/// Lets go of the metadata, which nobody needs any more: the call may have to wait for its
/// turn, and for its body.
pub fn let_go(head: &mut request::Parts) {
    let metadata = std::mem::take(&mut head.headers);
    // The path is a part of the same buffer. A copy of it is not worth it for a small one.
    if metadata_bytes(&metadata) > SMALL_METADATA_BYTES
        && let Ok(path) = head.uri.path().parse()
    {
        head.uri = path;
    }
}

/// Refuses metadata that is over its limit.
pub fn check_metadata(headers: &HeaderMap) -> Result<(), CallError> {
    let bytes = metadata_bytes(headers);
    if bytes > MAX_METADATA_BYTES {
        telemetry::request_refused(Refused::MetadataTooLarge);
        return Err(CallError::metadata_too_large(bytes, MAX_METADATA_BYTES));
    }
    Ok(())
}

fn metadata_bytes(headers: &HeaderMap) -> usize {
    let size = |(name, value): (&HeaderName, &HeaderValue)| {
        name.as_str().len() + value.len() + FIELD_BYTES
    };
    headers.iter().map(size).sum()
}

/// Refuses messages that are compressed.
pub fn check_encoding(headers: &HeaderMap) -> Result<(), CallError> {
    match headers.get(ENCODING) {
        Some(encoding) if encoding != IDENTITY => Err(CallError::unsupported_compression()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_application_grpc_is_grpc() {
        for (value, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("Application/gRPC", true),
            ("application/grpc;charset=utf-8", true),
            ("application/grpc+proto ; x=y", true),
            ("application/grpc+json", false),
            ("application/grpc-web", false),
            ("application/grpc-web+proto", false),
            ("application/grpcx", false),
            ("application/json", false),
            ("text/plain", false),
            ("", false),
        ] {
            let headers = HeaderMap::from_iter([(CONTENT_TYPE, value.parse().unwrap())]);
            assert_eq!(is_grpc(&headers), expected, "{value}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }

    #[test]
    fn every_field_of_the_metadata_counts() {
        let of = |fields: usize, bytes: usize| {
            let field = |number: usize| {
                let name = HeaderName::try_from(format!("name{number:04}")).unwrap();
                (name, HeaderValue::from_str(&"x".repeat(bytes)).unwrap())
            };
            let headers: HeaderMap = (0..fields).map(field).collect();
            check_metadata(&headers).is_ok()
        };
        let field = 8 + FIELD_BYTES;
        assert!(of(1, MAX_METADATA_BYTES - field));
        assert!(!of(1, MAX_METADATA_BYTES - field + 1));
        assert!(of(MAX_METADATA_BYTES / field, 0));
        assert!(!of(MAX_METADATA_BYTES / field + 1, 0));
    }

    #[test]
    fn every_path_has_its_route() {
        for (path, route) in [
            ("/groupstate.v1.GroupStateService/Load", Route::Ours),
            ("/groupstate.v1.GroupStateService/Nothing", Route::Unknown),
            ("/groupstate.v1.GroupStateServiceX/Load", Route::Unknown),
            ("/grpc.health.v1.Health/Check", Route::Health(Health::Check)),
            ("/grpc.health.v1.Health/Watch", Route::Health(Health::Watch)),
            ("/grpc.health.v1.Health/Nothing", Route::Unknown),
            (
                "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                Route::Reflection,
            ),
            (
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                Route::Reflection,
            ),
            (
                "/grpc.reflection.v1.ServerReflection/Nothing",
                Route::Unknown,
            ),
            ("/", Route::Unknown),
            ("", Route::Unknown),
        ] {
            assert_eq!(Route::of(path), route, "{path}");
        }
    }
}
