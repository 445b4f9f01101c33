//! Sends spans to a collector by OTLP, in batches and in the background. Nothing
//! here holds up a call: what cannot be sent is dropped and counted.

use std::{env, time::Duration};

use opentelemetry::{KeyValue, trace::TracerProvider};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    resource::EnvResourceDetector,
    trace::{Sampler, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use super::{metrics, spans};

/// The traces of this process, on their way to a collector.
pub struct Traces {
    queue: mpsc::Sender<Option<SpanData>>,
    sending: JoinHandle<()>,
}

/// Takes spans that have ended. None is the end of them all.
#[derive(Debug)]
struct Queue(mpsc::Sender<Option<SpanData>>);

// === impl Traces ===

impl Traces {
    /// Spans that wait to be sent; about 1 KB each.
    const QUEUED: usize = 4_096;
    /// Spans that are sent together.
    const BATCH: usize = 512;
    /// A span waits for others at most this long.
    const BATCH_DELAY: Duration = Duration::from_secs(1);
    /// The time that what is still queued at the end gets.
    pub const STOP_BOUND: Duration = Duration::from_secs(2);

    /// Makes spans from now on and sends them to the collector at `endpoint`: of
    /// all calls whose caller is sampled, and of this share of those whose caller
    /// says nothing of it.
    pub fn start(endpoint: &str, ratio: f64) -> Result<Self, String> {
        let mut exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .build()
            .map_err(|error| error.to_string())?;
        exporter.set_resource(&resource());
        let (queue, queued) = mpsc::channel(Self::QUEUED);
        let provider = SdkTracerProvider::builder()
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
                ratio,
            ))))
            .with_span_processor(Queue(queue.clone()))
            .build();
        if !spans::make_with(provider.tracer("groupstate")) {
            return Err("this process sends its traces elsewhere".into());
        }
        tracing::info!(endpoint, ratio, "sending traces");
        Ok(Self {
            queue,
            sending: tokio::spawn(send(queued, exporter)),
        })
    }

    /// Sends what is queued, if that is done within a moment. Spans that end after
    /// this are dropped.
    pub async fn stop(self) {
        let sent = async {
            let _ = self.queue.send(None).await;
            let _ = self.sending.await;
        };
        // A collector that does not answer has been told of before.
        let _ = tokio::time::timeout(Self::STOP_BOUND, sent).await;
    }
}

/// Sends batches until the queue ends.
async fn send(queued: mpsc::Receiver<Option<SpanData>>, exporter: impl SpanExporter) {
    let spans = ReceiverStream::new(queued).map_while(|span| span);
    let batches = spans.chunks_timeout(Traces::BATCH, Traces::BATCH_DELAY);
    tokio::pin!(batches);
    let mut failing = false;
    while let Some(batch) = batches.next().await {
        let count = batch.len();
        // It has a timeout of its own, and tries again within that.
        match exporter.export(batch).await {
            Ok(()) if failing => {
                failing = false;
                tracing::info!("traces are sent again");
            }
            Ok(()) => {}
            Err(error) => {
                metrics::spans_dropped(count);
                if !failing {
                    failing = true;
                    tracing::warn!(%error, "traces cannot be sent, and are dropped");
                }
            }
        }
    }
}

/// Who sends the spans, unless the variables of OpenTelemetry say otherwise.
fn resource() -> Resource {
    let resource = Resource::builder_empty()
        .with_service_name("groupstate")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_detector(Box::new(EnvResourceDetector::new()));
    match env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => resource.with_service_name(name),
        _ => resource,
    }
    .build()
}

// === impl Queue ===

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, span: SpanData) {
        if self.0.try_send(Some(span)).is_err() {
            metrics::spans_dropped(1);
        }
    }

    /// [`Traces::stop`] does.
    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    /// [`Traces::stop`] does.
    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}
