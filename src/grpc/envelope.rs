//! What surrounds every call: its request id, its deadline, the limit on calls
//! at once, and what becomes of panics and of the statuses that tonic makes by
//! itself.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::status::CallError;
use crate::{
    store::{Deadline, GroupStore},
    version::InstanceId,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const INSTANCE: HeaderName = HeaderName::from_static("x-groupstate-instance");

/// Calls of this service are never shed: a probe must not fail under load.
const HEALTH_PATH: &str = "/grpc.health.v1.Health/";

/// Puts every call of a server into its envelope.
#[derive(Clone)]
pub struct EnvelopeLayer {
    shared: Arc<Shared>,
}

/// A service whose calls are in their envelope.
#[derive(Clone)]
pub struct Envelope<S> {
    inner: S,
    shared: Arc<Shared>,
}

struct Shared {
    /// Asked who would answer, for calls that reach nobody.
    store: Arc<dyn GroupStore>,
    instance: HeaderValue,
    calls: Semaphore,
    max_concurrent_calls: usize,
    in_flight: TaskTracker,
}

/// What a handler knows of its call, among the extensions of the request.
#[derive(Clone, Debug)]
pub struct CallContext {
    pub request_id: RequestId,
    pub deadline: Deadline,
    pub received: Instant,
    /// Counts the call as in flight until the last copy of this is gone: work
    /// that outlives the handler, such as a stream, takes one along.
    _in_flight: TaskTrackerToken,
}

/// Names one call in replies and logs: 1 to 128 visible ASCII characters.
#[derive(Clone, Debug)]
pub struct RequestId(HeaderValue);

// === impl EnvelopeLayer ===

impl EnvelopeLayer {
    /// At most `max_concurrent_calls` calls are worked on at once, health
    /// calls apart; more are refused.
    pub fn new(
        store: Arc<dyn GroupStore>,
        instance: &InstanceId,
        max_concurrent_calls: usize,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                instance: HeaderValue::from_str(instance.as_str())
                    .expect("an instance id consists of hex digits"),
                calls: Semaphore::new(max_concurrent_calls),
                max_concurrent_calls,
                in_flight: TaskTracker::new(),
            }),
        }
    }

    /// The calls in flight.
    pub fn in_flight(&self) -> &TaskTracker {
        &self.shared.in_flight
    }
}

impl<S> Layer<S> for EnvelopeLayer {
    type Service = Envelope<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Envelope {
            inner,
            shared: self.shared.clone(),
        }
    }
}

// === impl Envelope ===

impl<S, B> Service<Request<B>> for Envelope<S>
where
    S: Service<Request<B>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // The instance that was polled ready, not its clone, takes the call.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let shared = self.shared.clone();
        let context = CallContext::of(request.headers(), shared.in_flight.token());
        let is_health = request.uri().path().starts_with(HEALTH_PATH);
        Box::pin(async move {
            let _permit = if is_health {
                None
            } else {
                match shared.calls.try_acquire() {
                    Ok(permit) => Some(permit),
                    Err(_) => {
                        let error = CallError::overloaded(
                            "max-concurrent-calls",
                            shared.max_concurrent_calls,
                        );
                        return Ok(shared.refuse(error, &context));
                    }
                }
            };
            request.extensions_mut().insert(context.clone());
            let handled = AssertUnwindSafe(inner.call(request)).catch_unwind();
            let handled = match context.deadline.instant() {
                Some(deadline) => tokio::time::timeout_at(deadline, handled).await,
                None => Ok(handled.await),
            };
            Ok(match handled {
                Ok(Ok(response)) => shared.seal(response?, &context, is_health),
                Ok(Err(_panic)) => {
                    // The panic hook has logged where and why.
                    let request_id = context.request_id.as_str();
                    tracing::error!(request_id, "a call panicked");
                    shared.refuse(CallError::internal(), &context)
                }
                Err(_elapsed) => shared.refuse(CallError::deadline_exceeded(), &context),
            })
        })
    }
}

// === impl Shared ===

impl Shared {
    fn refuse(&self, error: CallError, context: &CallContext) -> Response<Body> {
        let status = error.into_status(context.request_id.as_str(), self.store.backend());
        self.label(status.into_http(), context)
    }

    /// Makes a reply of the service conform to the contract.
    fn seal(
        &self,
        response: Response<Body>,
        context: &CallContext,
        is_health: bool,
    ) -> Response<Body> {
        // Every status that is made here has details; one without is tonic's.
        let code = Status::from_header_map(response.headers()).map(|status| status.code());
        let has_details = response.headers().contains_key(Status::GRPC_STATUS_DETAILS);
        match code {
            Some(code) if code != Code::Ok && !has_details && !is_health => {
                let status = Status::from_header_map(response.headers());
                let message = status.as_ref().map_or("", Status::message);
                self.refuse(CallError::of_tonic(code, message), context)
            }
            _ => self.label(response, context),
        }
    }

    fn label(&self, mut response: Response<Body>, context: &CallContext) -> Response<Body> {
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, context.request_id.0.clone());
        headers.insert(INSTANCE, self.instance.clone());
        response
    }
}

// === impl CallContext ===

impl CallContext {
    /// Reads the headers of a call that was received now.
    fn of(headers: &HeaderMap, in_flight: TaskTrackerToken) -> Self {
        let received = Instant::now();
        let deadline = headers
            .get("grpc-timeout")
            .and_then(|value| parse_timeout(value.to_str().ok()?))
            .and_then(|timeout| received.checked_add(ahead_of(timeout)));
        Self {
            request_id: RequestId::of(headers),
            deadline: deadline.map_or(Deadline::NONE, Deadline::at),
            received,
            _in_flight: in_flight,
        }
    }
}

impl Default for CallContext {
    /// Of a call that came without an envelope.
    fn default() -> Self {
        Self::of(&HeaderMap::new(), TaskTracker::new().token())
    }
}

/// tonic ends a call at its timeout with a status of its own; ours has to come
/// first.
fn ahead_of(timeout: Duration) -> Duration {
    timeout - Duration::from_millis(2).min(timeout / 2)
}

/// Reads a `grpc-timeout`: at most 8 digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|c| c.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3_600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

// === impl RequestId ===

impl RequestId {
    const MAX_BYTES: usize = 128;

    /// The caller's id if it is fit for use, else a new one.
    fn of(headers: &HeaderMap) -> Self {
        headers
            .get(REQUEST_ID)
            .filter(|id| (1..=Self::MAX_BYTES).contains(&id.len()))
            .filter(|id| id.as_bytes().iter().all(u8::is_ascii_graphic))
            .map_or_else(Self::random, |id| Self(id.clone()))
    }

    fn random() -> Self {
        let id = format!("{:016x}", rand::random::<u64>());
        Self(HeaderValue::from_str(&id).expect("hex digits are visible ASCII"))
    }

    pub fn as_str(&self) -> &str {
        // Visible ASCII by construction.
        self.0.to_str().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read() {
        for (text, timeout) in [
            ("1S", Some(Duration::from_secs(1))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3_600))),
            ("250m", Some(Duration::from_millis(250))),
            ("7u", Some(Duration::from_micros(7))),
            ("7n", Some(Duration::from_nanos(7))),
            ("2M", Some(Duration::from_secs(120))),
            ("", None),
            ("S", None),
            ("5", None),
            ("-1S", None),
            ("+1S", None),
            ("123456789S", None),
            ("1é", None),
        ] {
            assert_eq!(parse_timeout(text), timeout, "{text}");
        }
    }

    #[test]
    fn only_a_fit_request_id_is_taken_over() {
        let id_of = |id: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_str(id).unwrap());
            RequestId::of(&headers).as_str().to_owned()
        };
        assert_eq!(id_of("abc-1"), "abc-1");
        let longest = "x".repeat(128);
        assert_eq!(id_of(&longest), longest);
        for unfit in ["", "a b", &"x".repeat(129)] {
            assert_ne!(id_of(unfit), unfit);
        }
    }
}
