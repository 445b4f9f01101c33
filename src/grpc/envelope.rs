//! What surrounds every call: its context, its credentials, the limits on what is
//! worked on at once, and what becomes of panics and of the statuses that tonic
//! makes by itself.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tonic::{Code, Status, body::Body};
use tower::Service;

use super::{
    call::{CallContext, REQUEST_ID},
    receive::{Inbox, Room},
    status::CallError,
};
use crate::{
    auth::Tokens,
    reload::Watched,
    store::GroupStore,
    telemetry::{self, Limit, seldom},
    version::InstanceId,
    waits::{Client, Wait},
};

const INSTANCE: HeaderName = HeaderName::from_static("x-groupstate-instance");

/// Calls of this service need no token and are never shed: a probe must not fail
/// under load.
const HEALTH_PATH: &str = "/grpc.health.v1.Health/";

/// Which calls are let in.
#[derive(Clone, Debug)]
pub struct Admission {
    /// None: callers need none.
    pub tokens: Option<Watched<Tokens>>,
    pub max_concurrent_calls: usize,
    /// Requests that are being received or worked on, all together.
    pub max_inflight_bytes: usize,
    pub max_request_bytes: usize,
}

/// A service whose calls are in their envelope.
#[derive(Clone)]
pub struct Envelope<S> {
    inner: S,
    shared: Arc<Shared>,
}

/// The body of a reply, which waits for its client until it has left.
pub struct Reply {
    body: Body,
    _wait: Option<Wait>,
}

/// What a call takes of what there is for all, while it is worked on.
#[derive(Default)]
struct Taken {
    _call: Option<OwnedSemaphorePermit>,
    _room: Room,
}

struct Shared {
    /// Asked who would answer, for calls that reach nobody.
    store: Arc<dyn GroupStore>,
    instance: HeaderValue,
    tokens: Option<Watched<Tokens>>,
    calls: Arc<Semaphore>,
    max_concurrent_calls: usize,
    inbox: Inbox,
    in_flight: TaskTracker,
}

// === impl Envelope ===

impl<S> Envelope<S> {
    /// Puts every call of `inner`, which answers from `store`, into its envelope.
    pub fn new(
        inner: S,
        store: Arc<dyn GroupStore>,
        instance: &InstanceId,
        admission: Admission,
    ) -> Self {
        let Admission {
            tokens,
            max_concurrent_calls,
            max_inflight_bytes,
            max_request_bytes,
        } = admission;
        let shared = Arc::new(Shared {
            store,
            instance: HeaderValue::from_str(instance.as_str())
                .expect("an instance id consists of hex digits"),
            tokens,
            calls: Arc::new(Semaphore::new(max_concurrent_calls)),
            max_concurrent_calls,
            inbox: Inbox::new(max_inflight_bytes, max_request_bytes),
            in_flight: TaskTracker::new(),
        });
        Self { inner, shared }
    }

    /// The calls in flight.
    pub fn in_flight(&self) -> &TaskTracker {
        &self.shared.in_flight
    }
}

impl<S, B> Service<Request<B>> for Envelope<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    type Response = Response<Reply>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The instance that was polled ready, not its clone, takes the call.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let shared = self.shared.clone();
        let context = CallContext::of(&request, shared.in_flight.token());
        let mut wait = context.client().map(Client::open_call);
        Box::pin(async move {
            let is_health = request.uri().path().starts_with(HEALTH_PATH);
            let mut taken = Taken::default();
            let answer = async {
                let (parts, body) = request.into_parts();
                let client = context.client();
                if client.is_some_and(|client| client.is_closing()) {
                    return Err(CallError::request_broken_off());
                }
                if !is_health {
                    shared.authenticate(&parts.headers, client)?;
                }
                let body = if is_health {
                    shared.inbox.receive_health(body, wait.as_mut()).await?
                } else if context.is_ours() {
                    let (body, room) = shared.inbox.receive(body, wait.as_mut()).await?;
                    taken._room = room;
                    body
                } else {
                    Body::new(body)
                };
                if !is_health {
                    taken._call = Some(shared.take_call()?);
                }
                let mut request = Request::from_parts(parts, body);
                request.extensions_mut().insert(context.clone());
                let handled = context.work(inner.call(request));
                let handled = AssertUnwindSafe(handled).catch_unwind();
                handled.await.map_err(|_panic| {
                    context.panicked();
                    CallError::internal()
                })
            };
            let answer = match context.deadline().instant() {
                Some(deadline) => tokio::time::timeout_at(deadline, answer)
                    .await
                    .unwrap_or_else(|_| Err(CallError::deadline_exceeded())),
                None => answer.await,
            };
            let response = match answer {
                Ok(response) => shared.seal(response?, &context, is_health),
                Err(error) => shared.refuse(error, &context),
            };
            if let Some(wait) = &mut wait {
                wait.reply(context.reply_bytes());
            }
            Ok(response.map(|body| Reply { body, _wait: wait }))
        })
    }
}

// === impl Shared ===

impl Shared {
    fn authenticate(
        &self,
        headers: &HeaderMap,
        client: Option<&Arc<Client>>,
    ) -> Result<(), CallError> {
        let Some(tokens) = &self.tokens else {
            return Ok(());
        };
        tokens.current().check(headers).map_err(|rejection| {
            let peer = client.map(|client| tracing::field::display(client.peer));
            seldom!(warn, peer, reason = %rejection, "a call was refused for want of a valid token");
            CallError::unauthenticated(rejection)
        })
    }

    fn take_call(&self) -> Result<OwnedSemaphorePermit, CallError> {
        self.calls.clone().try_acquire_owned().map_err(|_| {
            let limit = Limit::MaxConcurrentCalls;
            telemetry::call_shed(limit);
            CallError::overloaded(limit, self.max_concurrent_calls)
        })
    }

    fn refuse(&self, error: CallError, context: &CallContext) -> Response<Body> {
        let status = context.refuse(error, self.store.backend());
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
        headers.insert(REQUEST_ID, context.request_id().header().clone());
        headers.insert(INSTANCE, self.instance.clone());
        response
    }
}

// === impl Reply ===

impl HttpBody for Reply {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
