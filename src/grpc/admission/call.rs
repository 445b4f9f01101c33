//! One call: what its handler knows of it, and what is told of it when it is
//! over.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use tokio::time::Instant;
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};
use tonic::{Code, Status};
use tracing::{Level, enabled};

use super::slow_clients::Client;
use crate::{
    grpc::{proto::group_state_service_server::SERVICE_NAME, status::CallError},
    store::{Backend, Deadline, caller::Caller},
    telemetry::{self, CallEnd, CallResult, CallSpan, Operation, rate_limited},
};

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");

/// What a handler knows of its call, among the extensions of the request. Cheap
/// to clone.
///
/// The call goes on until the last copy of this is gone: work that outlives the
/// handler, such as a stream, takes one along. Then the call is counted, once,
/// and the log is told of it.
#[derive(Clone)]
pub struct CallContext(Arc<Call>);

struct Call {
    /// None: a call of another service, such as health.
    operation: Option<Operation>,
    request_id: RequestId,
    /// Only taken where the log wants it.
    trace_id: Option<String>,
    /// None: it is not traced.
    span: Option<CallSpan>,
    deadline: Deadline,
    received: Instant,
    told: Mutex<Told>,
    client: Option<Arc<Client>>,
    /// What the reply takes in memory until it has left.
    reply_bytes: AtomicUsize,
    _in_flight: TaskTrackerToken,
}

/// What the handler has told of a call.
#[derive(Default)]
struct Told {
    /// The group key; only taken where the log wants it.
    key: Option<String>,
    /// None: nobody has waited for an answer.
    result: Option<CallResult>,
    /// The status that the caller gets; None like `result`.
    code: Option<Code>,
    /// Who has answered, if anyone.
    backend: Option<Backend>,
}

/// Names one call in replies and logs: 1 to 128 visible ASCII characters.
#[derive(Clone, Debug)]
pub struct RequestId(HeaderValue);

// === impl CallContext ===

impl CallContext {
    /// Bytes of a key that the log shows: all, of one that is valid.
    const LOGGED_KEY: usize = 4_096;

    /// Reads the headers of a call that was received now.
    pub fn of<B>(request: &Request<B>, in_flight: TaskTrackerToken) -> Self {
        let client = request.extensions().get().cloned();
        Self::new(request.uri().path(), request.headers(), client, in_flight)
    }

    fn new(
        path: &str,
        headers: &HeaderMap,
        client: Option<Arc<Client>>,
        in_flight: TaskTrackerToken,
    ) -> Self {
        let received = Instant::now();
        let operation = operation(path);
        let request_id = RequestId::of(headers);
        let span = operation.and_then(|_| CallSpan::begin(path, request_id.as_str(), headers));
        let deadline = headers
            .get("grpc-timeout")
            .and_then(|value| parse_timeout(value.to_str().ok()?))
            .and_then(|timeout| received.checked_add(timeout));
        if operation.is_some() {
            telemetry::call_begins();
        }
        Self(Arc::new(Call {
            operation,
            request_id,
            trace_id: if is_logged() { trace_id(headers) } else { None },
            span,
            deadline: deadline.map_or(Deadline::NONE, Deadline::at),
            received,
            told: Mutex::default(),
            client,
            reply_bytes: AtomicUsize::new(0),
            _in_flight: in_flight,
        }))
    }

    /// Takes the context out of a request, into which the envelope has put it.
    pub fn take<T>(mut request: tonic::Request<T>) -> (T, Self) {
        let context = request.extensions_mut().remove::<Self>();
        let without_envelope =
            || Self::new("", &HeaderMap::new(), None, TaskTracker::new().token());
        let context = context.unwrap_or_else(without_envelope);
        (request.into_inner(), context)
    }

    pub fn request_id(&self) -> &RequestId {
        &self.0.request_id
    }

    /// Whom it comes from, where that is known.
    pub fn client(&self) -> Option<&Arc<Client>> {
        self.0.client.as_ref()
    }

    /// For whom the work is done.
    pub fn caller(&self) -> Caller {
        let connection = self.client().map_or(0, |client| client.id());
        Caller::connection(connection)
    }

    pub fn deadline(&self) -> Deadline {
        self.0.deadline
    }

    /// Does a part of the work of the call.
    pub fn work<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        telemetry::in_call(self.0.span.as_ref(), work)
    }

    /// Says which group the call is about.
    pub fn concerns<'a>(&self, key: impl FnOnce() -> Option<&'a String>) {
        if is_logged() {
            // One that is refused may be as long as a request.
            let logged = |key: &String| key[..key.floor_char_boundary(Self::LOGGED_KEY)].to_owned();
            self.0.told().key = key().map(logged);
        }
    }

    /// Whether there is room for a reply of this size until its client has taken it.
    pub fn has_room_for(&self, bytes: usize) -> bool {
        let client = self.0.client.as_ref();
        client.is_none_or(|client| client.takes(bytes))
    }

    /// Says what the reply takes in memory, as far as it is known.
    pub fn replies_with(&self, bytes: usize) {
        self.0.reply_bytes.store(bytes, Relaxed);
    }

    pub fn reply_bytes(&self) -> usize {
        self.0.reply_bytes.load(Relaxed)
    }

    /// Says what has come of the call.
    pub fn succeeds(&self, result: CallResult, backend: Backend) {
        self.0.tell(result, Code::Ok, Some(backend));
    }

    /// The status of a call that fails. `now` would answer a call that came now.
    pub fn refuse(&self, error: CallError, now: Backend) -> Status {
        let error = error.under(self.deadline());
        let (result, backend) = (error.result(), error.backend());
        let status = error.into_status(self.0.request_id.as_str(), now);
        self.0.tell(result, status.code(), backend);
        status
    }

    /// The call has panicked. The panic hook has logged where and why.
    pub fn panicked(&self) {
        let request_id = self.0.request_id.as_str();
        rate_limited!(error, request_id, "a call panicked");
    }
}

impl fmt::Debug for CallContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CallContext")
            .field(&self.0.request_id)
            .finish()
    }
}

// === impl Call ===

impl Call {
    fn tell(&self, result: CallResult, code: Code, backend: Option<Backend>) {
        let mut told = self.told();
        (told.result, told.code, told.backend) = (Some(result), Some(code), backend);
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let Some(operation) = self.operation else {
            return;
        };
        let told = std::mem::take(&mut *self.told());
        // Without a result, its caller was gone before it had one.
        let result = told.result.unwrap_or(CallResult::Deadline);
        let took = self.received.elapsed();
        let by_memory = told.backend == Some(Backend::Memory);
        let backend = told.backend.map(Backend::name);
        telemetry::call_ends(operation, result, by_memory, took);
        if let Some(span) = self.span.take() {
            span.ends(CallEnd {
                code: told.code.unwrap_or(Code::Cancelled) as i32,
                backend,
                result: result.name(),
            });
        }
        tracing::debug!(
            request_id = self.request_id.as_str(),
            trace_id = self.trace_id,
            operation = operation.name(),
            key = told.key,
            backend,
            result = result.name(),
            latency_us = took.as_micros() as u64,
            "call"
        );
    }
}

/// Whether the log is told of calls.
fn is_logged() -> bool {
    enabled!(Level::DEBUG)
}

/// The call of our service that a path stands for; None: of another one, or of none.
pub(super) fn operation(path: &str) -> Option<Operation> {
    let rpc = path.strip_prefix('/')?.strip_prefix(SERVICE_NAME)?;
    Some(match rpc {
        "/Store" => Operation::Store,
        "/Load" => Operation::Load,
        "/Delete" => Operation::Delete,
        "/CompareAndSwap" => Operation::CompareAndSwap,
        "/StoreAll" => Operation::StoreAll,
        "/ListKeys" => Operation::ListKeys,
        "/Size" => Operation::Size,
        "/LoadAll" => Operation::LoadAll,
        _ => return None,
    })
}

/// The trace id of a `traceparent` in the form of W3C Trace Context.
fn trace_id(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(TRACE_PARENT)?.to_str().ok()?;
    let mut parts = text.split('-');
    let mut hex = |digits: usize| {
        let is_hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        let part = parts.next()?;
        (part.len() == digits && part.bytes().all(is_hex)).then_some(part)
    };
    let (version, trace, parent, _flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    let is_zero = |id: &str| id.bytes().all(|c| c == b'0');
    // Later versions may add parts; this one has none, and 255 is no version.
    let well_formed = match version {
        "00" => parts.next().is_none(),
        version => version != "ff",
    };
    (well_formed && !is_zero(trace) && !is_zero(parent)).then(|| trace.to_owned())
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
            // A copy: what it is a part of is as large as all of the metadata.
            .and_then(|id| HeaderValue::from_bytes(id.as_bytes()).ok())
            .map_or_else(Self::random, Self)
    }

    fn random() -> Self {
        let id = format!("{:016x}", rand::random::<u64>());
        Self(HeaderValue::from_str(&id).expect("hex digits are visible ASCII"))
    }

    /// The value of a reply's header. It will not come again, so HPACK is not to keep
    /// it in place of headers that do: "sensitive" says just that.
    pub fn header(&self) -> HeaderValue {
        let mut header = self.0.clone();
        header.set_sensitive(true);
        header
    }

    pub fn as_str(&self) -> &str {
        // Visible ASCII by construction.
        self.0.to_str().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

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

    #[test]
    fn a_trace_id_is_taken_from_a_valid_traceparent_only() {
        let trace_of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(TRACE_PARENT, HeaderValue::from_str(text).unwrap());
            trace_id(&headers)
        };
        const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
        for valid in [
            format!("00-{TRACE}-00f067aa0ba902b7-01"),
            format!("01-{TRACE}-00f067aa0ba902b7-01-later"),
        ] {
            assert_eq!(trace_of(&valid).as_deref(), Some(TRACE), "{valid}");
        }
        for invalid in [
            "",
            TRACE,
            &format!("00-{TRACE}-00f067aa0ba902b7"),
            &format!("00-{TRACE}-00f067aa0ba902b7-01-more"),
            &format!("ff-{TRACE}-00f067aa0ba902b7-01"),
            &format!("00-{TRACE}-0000000000000000-01"),
            &format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            &format!("00-{}-00f067aa0ba902b7-01", TRACE.to_uppercase()),
            &format!("00-{TRACE}0-00f067aa0ba902b7-01"),
            &format!("00 -{TRACE}-00f067aa0ba902b7-01"),
        ] {
            assert_eq!(trace_of(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn every_rpc_of_the_proto_is_an_operation() {
        let set = prost_types::FileDescriptorSet::decode(crate::grpc::DESCRIPTORS).unwrap();
        let files = set
            .file
            .iter()
            .filter(|file| file.package() == "groupstate.v1");
        let rpcs = files.flat_map(|file| &file.service).flat_map(|s| &s.method);
        let mut operations: Vec<_> = rpcs
            .map(|rpc| operation(&format!("/{SERVICE_NAME}/{}", rpc.name())))
            .collect();
        operations.sort();
        let expected: Vec<_> = Operation::ALL.iter().copied().map(Some).collect();
        assert_eq!(operations, expected);
        assert_eq!(operation("/grpc.health.v1.Health/Check"), None);
    }
}
