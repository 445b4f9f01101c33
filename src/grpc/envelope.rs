//! What surrounds every call: its context, the limit on calls at once, and what
//! becomes of panics and of the statuses that tonic makes by itself.

use std::{
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll},
};

use futures::{FutureExt, future::BoxFuture};
use http::{HeaderName, HeaderValue, Request, Response};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::{
    call::{CallContext, REQUEST_ID},
    status::CallError,
};
use crate::{
    store::GroupStore,
    telemetry::{self, Limit},
    version::InstanceId,
};

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
        let context = CallContext::of(&request, shared.in_flight.token());
        let is_health = request.uri().path().starts_with(HEALTH_PATH);
        Box::pin(async move {
            let _permit = if is_health {
                None
            } else {
                match shared.calls.try_acquire() {
                    Ok(permit) => Some(permit),
                    Err(_) => {
                        let limit = Limit::MaxConcurrentCalls;
                        telemetry::call_shed(limit);
                        let error = CallError::overloaded(limit, shared.max_concurrent_calls);
                        return Ok(shared.refuse(error, &context));
                    }
                }
            };
            request.extensions_mut().insert(context.clone());
            let handled = context.work(inner.call(request));
            let handled = AssertUnwindSafe(handled).catch_unwind();
            let handled = match context.deadline().instant() {
                Some(deadline) => tokio::time::timeout_at(deadline, handled).await,
                None => Ok(handled.await),
            };
            Ok(match handled {
                Ok(Ok(response)) => shared.seal(response?, &context, is_health),
                Ok(Err(_panic)) => {
                    context.panicked();
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
