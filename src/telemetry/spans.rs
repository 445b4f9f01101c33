//! Traces: one span for each call of the service, and below it one for each
//! request that it sends to Redis.
//!
//! No span is made unless [`Traces`](super::Traces) have been started and the call
//! is sampled. What Redis is asked in the background belongs to no call and has
//! none.
//!
//! Spans are made here by hand, and not from spans of `tracing`, which the log
//! would show as well. Names and attributes are those of OpenTelemetry's semantic
//! conventions; those of RPC have the names that they had up to version 1.37, which
//! is what most tools look for.

use std::{borrow::Cow, sync::OnceLock};

use futures::future::Either;
use http::HeaderMap;
use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, TextMapPropagator},
    trace::{FutureExt, Span as _, SpanKind, Status, TraceContextExt, Tracer},
};
use opentelemetry_sdk::{
    propagation::TraceContextPropagator,
    trace::{SdkTracer, Span},
};

/// The span of a call, which is sampled. It ends with [`Self::ends`].
pub struct CallSpan(Context);

/// What came of a call.
#[derive(Clone, Copy, Debug)]
pub struct CallEnd {
    /// The number of its gRPC status.
    pub code: i32,
    /// Who has answered, if anyone.
    pub backend: Option<&'static str>,
    pub result: &'static str,
}

/// A request to Redis: a command, or several in one pipeline. Neither keys nor
/// values, which nobody outside has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisRequest<'a> {
    /// The name of all the commands; None if they differ.
    pub command: Option<&'static str>,
    /// The script that they call, if they do.
    pub script: Option<&'static str>,
    /// How many of them are in the pipeline; None without one.
    pub pipelined: Option<usize>,
    /// Host and port; None of a pipeline to several servers.
    pub server: Option<(&'a str, u16)>,
}

/// The span of a request to Redis, if there is one. It ends with [`Self::ends`], or
/// when nobody waits for the answer any more.
#[must_use]
pub struct RedisSpan(Option<Span>);

/// Headers as the propagator reads them.
struct Headers<'a>(&'a HeaderMap);

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Statuses that mean that the server has failed, by their numbers; the others
/// are answers.
const FAILURES: [i32; 6] = [
    2,  // UNKNOWN
    4,  // DEADLINE_EXCEEDED
    12, // UNIMPLEMENTED
    13, // INTERNAL
    14, // UNAVAILABLE
    15, // DATA_LOSS
];

/// Makes spans from now on. False if something else in this process does already.
pub(super) fn make_with(tracer: SdkTracer) -> bool {
    TRACER.set(tracer).is_ok()
}

// === impl CallSpan ===

impl CallSpan {
    /// Begins the span of a call, below the one that `traceparent` names. None if
    /// the call is not sampled. `path` is `/service/method`.
    pub fn begin(path: &str, request_id: &str, headers: &HeaderMap) -> Option<Self> {
        let tracer = TRACER.get()?;
        let name = path.strip_prefix('/')?;
        let (service, method) = name.split_once('/')?;
        let parent =
            TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        let span = tracer
            .span_builder(name.to_owned())
            .with_kind(SpanKind::Server)
            .with_attributes([
                KeyValue::new("rpc.system", "grpc"),
                KeyValue::new("rpc.service", service.to_owned()),
                KeyValue::new("rpc.method", method.to_owned()),
                KeyValue::new("groupstate.request_id", request_id.to_owned()),
            ])
            .start_with_context(tracer, &parent);
        span.is_recording()
            .then(|| Self(Context::new().with_span(span)))
    }

    pub fn ends(self, end: CallEnd) {
        let span = self.0.span();
        span.set_attribute(KeyValue::new("rpc.grpc.status_code", i64::from(end.code)));
        span.set_attribute(KeyValue::new("groupstate.result", end.result));
        if let Some(backend) = end.backend {
            span.set_attribute(KeyValue::new("groupstate.backend", backend));
        }
        if FAILURES.contains(&end.code) {
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

/// Does the work of a call: spans of Redis are below that of the call.
pub fn in_call<F: Future>(
    span: Option<&CallSpan>,
    work: F,
) -> impl Future<Output = F::Output> + use<F> {
    match span {
        Some(CallSpan(context)) => Either::Left(work.with_context(context.clone())),
        None => Either::Right(work),
    }
}

// === impl RedisSpan ===

impl RedisSpan {
    /// Begins the span of a request that is sent now, for the call that is being
    /// worked on.
    pub fn begin<'a>(request: impl FnOnce() -> RedisRequest<'a>) -> Self {
        Self(TRACER.get().and_then(|tracer| {
            Context::map_current(|call| {
                call.has_active_span().then(|| request().span(tracer, call))
            })
        }))
    }

    /// The answer is there, or what kind of error took its place.
    pub fn ends(mut self, error: Option<Cow<'static, str>>) {
        if let Some(mut span) = self.0.take() {
            end(&mut span, error);
        }
    }
}

impl Drop for RedisSpan {
    fn drop(&mut self) {
        if let Some(span) = &mut self.0 {
            end(span, Some("abandoned".into()));
        }
    }
}

fn end(span: &mut Span, error: Option<Cow<'static, str>>) {
    if let Some(error) = error {
        span.set_attribute(KeyValue::new("error.type", error));
        span.set_status(Status::error(""));
    }
    span.end();
}

// === impl RedisRequest ===

impl RedisRequest<'_> {
    fn span(&self, tracer: &SdkTracer, call: &Context) -> Span {
        let operation = self.operation();
        let name = match self.script {
            Some(script) => format!("{operation} {script}").into(),
            None => operation.clone(),
        };
        let mut attributes = vec![
            KeyValue::new("db.system.name", "redis"),
            KeyValue::new("db.operation.name", operation),
        ];
        if let Some(script) = self.script {
            attributes.push(KeyValue::new("db.stored_procedure.name", script));
        }
        if let Some(count) = self.pipelined {
            attributes.push(KeyValue::new("db.operation.batch.size", count as i64));
        }
        if let Some((host, port)) = self.server {
            attributes.push(KeyValue::new("server.address", host.to_owned()));
            attributes.push(KeyValue::new("server.port", i64::from(port)));
        }
        tracer
            .span_builder(name)
            .with_kind(SpanKind::Client)
            .with_attributes(attributes)
            .start_with_context(tracer, call)
    }

    fn operation(&self) -> Cow<'static, str> {
        match (self.pipelined, self.command) {
            (None, command) => command.unwrap_or_default().into(),
            (Some(_), None) => "PIPELINE".into(),
            (Some(_), Some(command)) => format!("PIPELINE {command}").into(),
        }
    }
}

// === impl Headers ===

impl Extractor for Headers<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
