//! A collector of traces: a server of OTLP that keeps what it gets.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value},
    trace::v1::Span,
};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use crate::common::stalls::Bound;

pub struct Collector {
    addr: String,
    received: Arc<Received>,
    /// Ends with this value.
    _server: JoinSet<()>,
}

/// What was sent, in order.
#[derive(Default)]
struct Received(Mutex<Vec<ExportTraceServiceRequest>>);

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

// === impl Collector ===

impl Collector {
    /// More than a batch waits for its spans.
    const BOUND: Duration = Duration::from_secs(10);

    pub async fn start() -> Self {
        Self::start_on("127.0.0.1:0").await
    }

    pub async fn start_on(addr: &str) -> Self {
        let listener = TcpListener::bind(addr).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let received: Arc<Received> = Arc::default();
        let service = TraceServiceServer::from_arc(received.clone());
        let mut server = JoinSet::new();
        server.spawn(async move {
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
                .unwrap();
        });
        Self {
            addr: format!("http://{addr}"),
            received,
            _server: server,
        }
    }

    pub fn endpoint(&self) -> &str {
        &self.addr
    }

    pub fn requests(&self) -> Vec<ExportTraceServiceRequest> {
        self.received.0.lock().unwrap().clone()
    }

    pub fn spans(&self) -> Vec<Span> {
        let resources = self.requests().into_iter().flat_map(|r| r.resource_spans);
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        scopes.flat_map(|scope| scope.spans).collect()
    }

    /// The span of the call with this request id, and those below it, once they
    /// are there: the span of a call ends last.
    pub async fn call(&self, request_id: &str) -> (Span, Vec<Span>) {
        let bound = Bound::of(Self::BOUND);
        let id = any_value::Value::StringValue(request_id.into());
        loop {
            let spans = self.spans();
            let call = spans.iter().find(|span| {
                attributes(&span.attributes).get("groupstate.request_id") == Some(&id)
            });
            if let Some(call) = call {
                let below = spans.iter().filter(|s| s.parent_span_id == call.span_id);
                return (call.clone(), below.cloned().collect());
            }
            assert!(!bound.is_over(), "no {request_id}: {spans:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Attributes by name.
pub fn attributes(attributes: &[KeyValue]) -> BTreeMap<&str, any_value::Value> {
    let pairs = attributes.iter().map(|pair| {
        let value = pair.value.clone().and_then(|value| value.value);
        (
            pair.key.as_str(),
            value.expect("every attribute has a value"),
        )
    });
    pairs.collect()
}

pub fn text(value: &str) -> any_value::Value {
    any_value::Value::StringValue(value.into())
}

pub fn number(value: i64) -> any_value::Value {
    any_value::Value::IntValue(value)
}
