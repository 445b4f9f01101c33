//! What surrounds every call: its context, its credentials, the limits on what is
//! worked on at once, and what becomes of panics and of the statuses that tonic
//! makes by itself.

use std::{
    convert::Infallible,
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
use tokio_util::{sync::WaitForCancellationFutureOwned, task::TaskTracker};
use tonic::{Code, Status, body::Body};
use tower::ServiceExt;

use super::{
    authentication::Tokens,
    slow_clients::{Client, Wait},
};
use super::{
    call::{CallContext, REQUEST_ID},
    head::{self, ACCEPT_ENCODING, IDENTITY, Route},
    request_body::{Inbox, Messages, Room},
};
use crate::{
    domain::version::InstanceId,
    grpc::{
        proto::ErrorReason,
        reflection::{self, MAX_REFLECTION_STREAMS},
        status::CallError,
    },
    reload::Watched,
    store::GroupStore,
    telemetry::{self, Limit, rate_limited},
};

const INSTANCE: HeaderName = HeaderName::from_static("x-groupstate-instance");

/// Which calls are let in.
#[derive(Clone, Debug)]
pub struct Admission {
    /// None: callers need none.
    pub tokens: Option<Watched<Tokens>>,
    pub max_concurrent_calls: usize,
    /// Requests that are being received or worked on, all together.
    pub max_inflight_bytes: usize,
    pub max_request_bytes: usize,
    /// Whether there is server reflection.
    pub reflection: bool,
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
    wait: Option<Wait>,
    /// None: it ends by itself.
    ends: Option<Ends>,
}

/// When and how a reply ends that would go on for as long as its client likes.
struct Ends {
    when: Pin<Box<WaitForCancellationFutureOwned>>,
    /// None: it has ended so.
    how: Option<Status>,
}

/// A call that was let in.
struct Admitted {
    /// Its part of `--max-concurrent-calls`, or of the streams of reflection. None: health
    /// needs none.
    permit: Option<OwnedSemaphorePermit>,
    /// None: it does not come from a client.
    wait: Option<Wait>,
}

struct Shared {
    /// Asked who would answer, for calls that reach nobody.
    store: Arc<dyn GroupStore>,
    instance: HeaderValue,
    tokens: Option<Watched<Tokens>>,
    calls: Arc<Semaphore>,
    max_concurrent_calls: usize,
    inbox: Inbox,
    /// None: there is no reflection. A permit for each stream.
    reflections: Option<Arc<Semaphore>>,
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
            reflection,
        } = admission;
        let shared = Arc::new(Shared {
            store,
            instance: HeaderValue::from_str(instance.as_str())
                .expect("an instance id consists of hex digits"),
            tokens,
            calls: Arc::new(Semaphore::new(max_concurrent_calls)),
            max_concurrent_calls,
            inbox: Inbox::new(max_inflight_bytes, max_request_bytes),
            reflections: reflection.then(|| Arc::new(Semaphore::new(MAX_REFLECTION_STREAMS))),
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
    S: tower::Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    type Response = Response<Reply>;
    type Error = Infallible;
    type Future = Answer<Self::Response, Self::Error>;

    /// Is called as soon as the headers of a call have come, before a task is made of
    /// it: what is refused here waits for nothing.
    fn call(&self, request: Request<B>) -> Self::Future {
        if let Some(refused) = head::not_grpc(&request) {
            return Either::Left(ready(Ok(refused.map(|body| Reply::new(body, None)))));
        }
        let shared = self.shared.clone();
        let context = CallContext::of(&request, shared.in_flight.token());
        let route = Route::of(request.uri().path());
        let (mut call, mut wait) = match shared.admit(request.headers(), &context, route) {
            Ok(Admitted { permit, wait }) => (permit, wait),
            Err(error) => {
                let refused = shared.refuse(error, &context);
                return Either::Left(ready(Ok(refused.map(|body| Reply::new(body, None)))));
            }
        };
        let inner = self.inner.clone();
        let (mut head, body) = request.into_parts();
        head::let_go(&mut head);
        let answer = async move {
            let mut taken = Room::default();
            let ends = route.is_endless().then(|| shared.ends(&context)).flatten();
            let answer = async {
                if context.client().is_some_and(|client| client.is_closing()) {
                    return Err(CallError::request_broken_off());
                }
                let body = match route {
                    Route::Ours => {
                        let receive = shared.inbox.receive(body, wait.as_mut());
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
                    }
                    Route::Health(_) => shared.inbox.receive_health(body, wait.as_mut()).await?,
                    Route::Reflection => {
                        let open = call.take();
                        let messages = Messages::of_reflection(body, wait.take());
                        let (context, backend) = (context.clone(), shared.store.backend());
                        return Ok(reflection::answer(
                            head, messages, inner, context, backend, open,
                        ));
                    }
                    Route::Unknown => return Err(CallError::no_such_method()),
                };
                let mut request = Request::from_parts(head, body);
                request.extensions_mut().insert(context.clone());
                let handled = context.caller().makes(inner.oneshot(request));
                let handled = context.work(handled);
                let handled = AssertUnwindSafe(handled).catch_unwind();
                match handled.await {
                    Ok(Ok(response)) => Ok(response),
                    Ok(Err(never)) => match never {},
                    Err(_panic) => {
                        context.panicked();
                        Err(CallError::internal())
                    }
                }
            };
            let answer = match context.deadline().instant() {
                Some(deadline) => tokio::time::timeout_at(deadline, answer)
                    .await
                    .unwrap_or_else(|_| Err(CallError::deadline_exceeded())),
                None => answer.await,
            };
            let response = match answer {
                Ok(response) => shared.seal(response, &context, route),
                Err(error) => shared.refuse(error, &context),
            };
            if let Some(wait) = &mut wait {
                wait.reply(context.reply_bytes());
            }
            drop((call, taken));
            Ok(response.map(|body| Reply { body, wait, ends }))
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
    /// Lets a call in.
    fn admit(
        &self,
        headers: &HeaderMap,
        context: &CallContext,
        route: Route,
    ) -> Result<Admitted, CallError> {
        let client = context.client();
        if client.is_some_and(|client| client.is_retired()) {
            return Err(CallError::connection_too_old());
        }
        head::check_metadata(headers).inspect_err(|error| {
            let peer = client.map(|client| tracing::field::display(client.peer));
            rate_limited!(warn, peer, reason = error.message(), "a call was refused");
        })?;
        if !matches!(route, Route::Health(_)) {
            self.authenticate(headers, client)?;
        }
        head::check_encoding(headers)?;
        let permit = match route {
            Route::Unknown => return Err(CallError::no_such_method()),
            Route::Health(_) => None,
            Route::Ours => Some(self.take_call()?),
            Route::Reflection => {
                let streams = self.reflections.as_ref();
                let streams = streams.ok_or_else(CallError::no_reflection)?;
                Some(reflection::open(streams)?)
            }
        };
        let wait = client.map(Client::open_call);
        Ok(Admitted { permit, wait })
    }

    /// When an endless reply to this call ends.
    fn ends(&self, context: &CallContext) -> Option<Ends> {
        let when = Box::pin(context.client()?.leaving());
        let error = CallError::connection_ends();
        let status = error.into_status(context.request_id().as_str(), self.store.backend());
        let how = Some(status);
        Some(Ends { when, how })
    }

    fn authenticate(
        &self,
        headers: &HeaderMap,
        client: Option<&Arc<Client>>,
    ) -> Result<(), CallError> {
        let Some(tokens) = &self.tokens else {
            return Ok(());
        };
        let peer = client.map(|client| client.peer);
        let admitted = tokens.current().admit(headers, peer);
        admitted.map_err(CallError::unauthenticated)
    }

    fn take_call(&self) -> Result<OwnedSemaphorePermit, CallError> {
        self.calls.clone().try_acquire_owned().map_err(|_| {
            let limit = Limit::MaxConcurrentCalls;
            telemetry::call_shed(limit);
            CallError::overloaded(limit, self.max_concurrent_calls)
        })
    }

    fn refuse(&self, error: CallError, context: &CallContext) -> Response<Body> {
        let is_compressed = error.reason == ErrorReason::UnsupportedCompression;
        let status = context.refuse(error, self.store.backend());
        let mut response = status.into_http();
        if is_compressed {
            response.headers_mut().insert(ACCEPT_ENCODING, IDENTITY);
        }
        self.label(response, context)
    }

    /// Makes a reply of the service conform to the contract.
    fn seal(
        &self,
        response: Response<Body>,
        context: &CallContext,
        route: Route,
    ) -> Response<Body> {
        let is_health = matches!(route, Route::Health(_));
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

impl Reply {
    fn new(body: Body, wait: Option<Wait>) -> Self {
        let ends = None;
        Self { body, wait, ends }
    }
}

impl HttpBody for Reply {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(ends) = &mut self.ends {
            let Some(status) = &ends.how else {
                return Poll::Ready(None);
            };
            if ends.when.as_mut().poll(cx).is_ready() {
                let trailers = reflection::trailers(status);
                ends.how = None;
                // One that has come to its own end ends so: a stop ends the watches of
                // health, and then the connections.
                let own_end = match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => frame.into_trailers().ok(),
                    _ => None,
                };
                // With what it holds.
                (self.body, self.wait) = (Body::empty(), None);
                let end = own_end.unwrap_or(trailers);
                return Poll::Ready(Some(Ok(Frame::trailers(end))));
            }
        }
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.ends.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.ends {
            None => self.body.size_hint(),
            Some(_) => SizeHint::default(),
        }
    }
}
