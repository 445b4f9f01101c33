//! What surrounds every call: its context, its credentials, the limits on what is
//! worked on at once, and what becomes of panics and of the statuses that tonic
//! makes by itself.

use std::{
    future::{Ready, poll_fn, ready},
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{
    FutureExt,
    future::{BoxFuture, Either},
};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::service::Service;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tonic::{Code, Status, body::Body};
use tower::ServiceExt;

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

/// What becomes of a call: an answer that is there already, or one to wait for.
pub type Answer<R, E> = Either<Ready<Result<R, E>>, BoxFuture<'static, Result<R, E>>>;

/// The body of a reply, which waits for its client until it has left.
pub struct Reply {
    body: Body,
    _wait: Option<Wait>,
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
    S: tower::Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    type Response = Response<Reply>;
    type Error = S::Error;
    type Future = Answer<Self::Response, Self::Error>;

    /// Is called as soon as the headers of a call have come, before a task is made of
    /// it: what is refused here waits for nothing.
    fn call(&self, request: Request<B>) -> Self::Future {
        let shared = self.shared.clone();
        let context = CallContext::of(&request, shared.in_flight.token());
        let mut wait = context.client().map(Client::open_call);
        let is_health = request.uri().path().starts_with(HEALTH_PATH);
        let mut call = match shared.admit(request.headers(), &context, is_health) {
            Ok(call) => call,
            Err(error) => {
                let body = |body| Reply { body, _wait: wait };
                let refused = shared.refuse(error, &context).map(body);
                return Either::Left(ready(Ok(refused)));
            }
        };
        let inner = self.inner.clone();
        let answer = async move {
            let mut taken = Room::default();
            let answer = async {
                let (parts, body) = request.into_parts();
                if context.client().is_some_and(|client| client.is_closing()) {
                    return Err(CallError::request_broken_off());
                }
                let wait = wait.as_mut();
                let body = if is_health {
                    shared.inbox.receive_health(body, wait).await?
                } else if context.is_ours() {
                    let receive = shared.inbox.receive(body, wait);
                    // Who has to be waited for takes nobody's turn.
                    let (body, room) = match poll_once(pin!(receive)).await {
                        Ok(received) => received?,
                        Err(receive) => {
                            call = None;
                            let received = receive.await?;
                            call = Some(shared.take_call()?);
                            received
                        }
                    };
                    taken = room;
                    body
                } else {
                    Body::new(body)
                };
                let mut request = Request::from_parts(parts, body);
                request.extensions_mut().insert(context.clone());
                let handled = context.caller().makes(inner.oneshot(request));
                let handled = context.work(handled);
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
            drop((call, taken));
            Ok(response.map(|body| Reply { body, _wait: wait }))
        };
        Either::Right(Box::pin(answer))
    }
}

/// Polls a future; gives it back if it is not ready.
async fn poll_once<F: Future>(mut future: Pin<&mut F>) -> Result<F::Output, Pin<&mut F>> {
    match poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => Err(future),
    }
}

// === impl Shared ===

impl Shared {
    /// Lets a call in, with its part of `--max-concurrent-calls`; health needs none.
    fn admit(
        &self,
        headers: &HeaderMap,
        context: &CallContext,
        is_health: bool,
    ) -> Result<Option<OwnedSemaphorePermit>, CallError> {
        if is_health {
            return Ok(None);
        }
        self.authenticate(headers, context.client())?;
        self.take_call().map(Some)
    }

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
        headers.insert(REQUEST_ID, context.request_id().header());
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
