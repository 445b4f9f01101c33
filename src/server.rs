//! Puts the parts together: starts them, serves, stops them gracefully.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, time::Instant};
use tonic::transport::server::TcpIncoming;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    config::Settings,
    grpc::{
        self,
        envelope::EnvelopeLayer,
        proto::group_state_service_server::{GroupStateServiceServer, SERVICE_NAME},
        service::Service,
        validation::Limits,
    },
    store::{GroupStore, documents::Documents, memory::MemoryStore, redis::RedisStore},
    version::{InstanceId, WriteIds},
};

/// A server that has its port and waits to serve.
pub struct Server {
    settings: Settings,
    listener: TcpListener,
    store: Arc<dyn GroupStore>,
    instance: InstanceId,
}

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Say NOT_SERVING for `--shutdown-delay`, then finish the calls in flight.
    AfterDelay,
    /// Finish the calls in flight.
    Now,
}

/// Why a server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("--grpc-addr {addr}: {error}")]
    Bind { addr: SocketAddr, error: io::Error },
    #[error("{0}")]
    Redis(String),
    #[error("the gRPC server failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// The services whose health follows the readiness of the server; "" stands for
/// the server as a whole.
const HEALTH_NAMES: [&str; 2] = ["", SERVICE_NAME];

/// How long the start waits for Redis before it serves without.
const REDIS_START_BOUND: Duration = Duration::from_secs(1);

/// The time that replies get to leave after the last call.
const LAST_REPLIES: Duration = Duration::from_millis(500);

const HTTP2_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(60);
const HTTP2_KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

// === impl Server ===

impl Server {
    /// Takes the port and starts the store that the settings ask for.
    pub async fn bind(settings: Settings) -> Result<Self, ServerError> {
        let instance = InstanceId::random();
        let write_ids = Arc::new(WriteIds::new(instance.clone()));
        let store: Arc<dyn GroupStore> = match settings.redis().map_err(ServerError::Redis)? {
            Some(redis) => {
                let store = RedisStore::open(
                    &redis,
                    &settings.key_prefix,
                    settings.max_document_bytes,
                    write_ids,
                )
                .map_err(|error| ServerError::Redis(error.to_string()))?;
                store.wait(Instant::now() + REDIS_START_BOUND).await;
                Arc::new(Documents::new(store, settings.max_document_bytes))
            }
            None => {
                tracing::info!(
                    "no --redis-url: groups are kept in memory and do not survive a restart"
                );
                let store =
                    MemoryStore::new(settings.mirror_max_bytes, instance.clone(), write_ids);
                tokio::spawn(store.clone().sweep_forever());
                Arc::new(Documents::new(store, settings.max_document_bytes))
            }
        };
        Self::with_store(settings, store, instance).await
    }

    /// Takes the port and serves any store.
    pub async fn with_store(
        settings: Settings,
        store: Arc<dyn GroupStore>,
        instance: InstanceId,
    ) -> Result<Self, ServerError> {
        let addr = settings.grpc_addr;
        let listener = TcpListener::bind(addr)
            .await
            .map_err(|error| ServerError::Bind { addr, error })?;
        Ok(Self {
            settings,
            listener,
            store,
            instance,
        })
    }

    /// The address that the gRPC server listens on.
    pub fn grpc_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop`, then stops gracefully.
    pub async fn serve(self, stop: impl Future<Output = Stop> + Send) -> Result<(), ServerError> {
        let settings = self.settings;
        let addr = self.listener.local_addr()?;
        let limits = Limits {
            max_key_bytes: settings.max_key_bytes,
            max_alerts_per_group: settings.max_alerts_per_group,
            max_groups_per_batch: settings.max_groups_per_batch,
            default_ttl: settings.default_ttl,
            max_ttl: settings.max_ttl,
        };
        let service = GroupStateServiceServer::new(Service::new(
            self.store.clone(),
            limits,
            settings.max_scans,
        ))
        .max_decoding_message_size(settings.max_request_bytes);
        let (health, health_service) = tonic_health::server::health_reporter();
        set_health(&health, ServingStatus::Serving).await;

        let backend = self.store.backend().name();
        let envelope =
            EnvelopeLayer::new(self.store, &self.instance, settings.max_concurrent_calls);
        let in_flight = envelope.in_flight().clone();
        let router = tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(HTTP2_KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(HTTP2_KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(settings.max_streams_per_connection)
            .layer(envelope)
            .add_service(service)
            .add_service(health_service)
            .add_service(reflection().build_v1().map_err(io::Error::other)?)
            .add_service(reflection().build_v1alpha().map_err(io::Error::other)?);

        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        let incoming = TcpIncoming::from(self.listener).with_nodelay(Some(true));
        let serve = router.serve_with_incoming_shutdown(incoming, async {
            // An error means that `finish` was dropped, which ends it as well.
            let _ = finished.await;
        });
        tokio::pin!(serve);
        let instance = self.instance.as_str();
        tracing::info!(%addr, instance, backend, "serving gRPC");

        let stop = tokio::select! {
            result = &mut serve => return Ok(result?),
            stop = stop => stop,
        };
        set_health(&health, ServingStatus::NotServing).await;
        if stop == Stop::AfterDelay {
            let delay = settings.shutdown_delay;
            tracing::info!(?delay, "stopping: health says NOT_SERVING");
            tokio::select! {
                result = &mut serve => return Ok(result?),
                () = tokio::time::sleep(delay) => {}
            }
        }
        // A Watch stream ends only when its status is forgotten; it would hold
        // up the stop otherwise.
        for name in HEALTH_NAMES {
            health.clone().clear_service_status(name).await;
        }
        // Nobody listens if the server has ended by itself.
        let _ = finish.send(());
        // A connection whose client does not answer stays open; it must not
        // hold up the stop when it has no call in flight.
        let idle = async {
            in_flight.close();
            in_flight.wait().await;
            tokio::time::sleep(LAST_REPLIES).await;
        };
        tokio::select! {
            result = &mut serve => result?,
            () = idle => {}
            () = tokio::time::sleep(settings.shutdown_timeout) => {
                let calls = in_flight.len();
                tracing::warn!(calls, "stopping: calls were cut off after --shutdown-timeout");
            }
        }
        tracing::info!("stopped");
        Ok(())
    }
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_NAMES {
        health.set_service_status(name, status).await;
    }
}

/// Everything this server offers, to be looked up by grpcurl and the like.
fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(grpc::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
        // Listed above, with both of its versions.
        .include_reflection_service(false)
        // So that grpcurl shows the details of a status in clear text.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
