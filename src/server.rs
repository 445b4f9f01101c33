//! Puts the parts together: starts them, serves, stops them gracefully.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpSocket},
    task::JoinSet,
    time::Instant,
};
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    admin::{Admin, Phase},
    config::{OnOff, Settings},
    domain::version::InstanceId,
    grpc::{
        self,
        admission::{
            authentication::Tokens,
            envelope::{Admission, Envelope},
            slow_clients::{Amount, Waits},
        },
        proto::group_state_service_server::{GroupStateServiceServer, SERVICE_NAME},
        service::Service,
        services::Services,
        validation::Limits,
    },
    reload::{Opened, Watched},
    store::{
        GroupStore,
        documents::Documents,
        failover::{Failover, FailoverSettings, switch::Switch},
        memory::MemoryStore,
        redis::RedisStore,
    },
    telemetry::{self, Traces},
    transport::{
        listener::{self, ConnectionLimits},
        tls::ServerTls,
    },
};

/// A server that has its ports and waits to serve gRPC. HTTP is served already.
pub struct Server {
    settings: Settings,
    grpc: TcpListener,
    store: Arc<dyn GroupStore>,
    /// None without Redis.
    failover: Option<Failover>,
    admin: Arc<Admin>,
    /// None: callers need none.
    tokens: Option<Watched<Tokens>>,
    /// None: plain text.
    tls: Option<ServerTls>,
    instance: InstanceId,
    /// Serves HTTP, keeps the metrics in order and watches files, as long as this
    /// value lives.
    tasks: JoinSet<()>,
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
    #[error("{setting} {addr}: {error}")]
    Bind {
        setting: &'static str,
        addr: SocketAddr,
        error: io::Error,
    },
    #[error("{0}")]
    Redis(String),
    #[error("{0}")]
    File(String),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// The services whose health follows the readiness of the server; "" stands for
/// the server as a whole.
const HEALTH_NAMES: [&str; 2] = ["", SERVICE_NAME];

/// Its health follows the switch between Redis and memory.
const REDIS_HEALTH_NAME: &str = "redis";

/// How long the start waits for Redis before it serves without.
const REDIS_START_BOUND: Duration = Duration::from_secs(1);

/// The time to carry over what memory still holds, at the end.
const LAST_TRY: Duration = Duration::from_secs(5);

/// Calls that may be open for each one that may be worked on, and at least.
const OPEN_CALLS: usize = 4;
const LEAST_OPEN_CALLS: usize = 16_384;

/// So many connections wait to be accepted, or as many as the system allows
/// (`net.core.somaxconn`). With the 1,024 of `TcpListener::bind`, the first message of an
/// honest client was lost while thousands connected, and sent again a second later.
const BACKLOG: u32 = 4_096;

/// The time that replies get to leave after the last call.
const LAST_REPLIES: Duration = Duration::from_millis(500);

/// How long a stop may take, all in all: what stops the service has to wait longer
/// before it kills it.
pub fn longest_stop(settings: &Settings) -> Duration {
    [settings.shutdown_timeout, LAST_TRY, Traces::STOP_BOUND]
        .into_iter()
        .fold(settings.shutdown_delay, Duration::saturating_add)
}

// === impl Server ===

impl Server {
    /// Takes the ports and starts the store that the settings ask for. Waits a
    /// moment for Redis, but does not insist on it.
    pub async fn bind(settings: Settings) -> Result<Self, ServerError> {
        let instance = InstanceId::random();
        let max_bytes = settings.mirror_max_bytes;
        let max_document_bytes = settings.max_document_bytes;
        let Some((redis, files)) = settings.redis().map_err(ServerError::Redis)? else {
            tracing::info!(
                "no --redis-url: groups are kept in memory and do not survive a restart"
            );
            let memory = MemoryStore::new(max_bytes, instance.clone());
            tokio::spawn(memory.clone().sweep_forever());
            let store = Documents::new(memory.clone(), max_document_bytes, instance.clone());
            let admin = Admin::of_memory(memory, &instance);
            return Self::listen(settings, Arc::new(store), None, admin, instance).await;
        };
        let redis = RedisStore::open(&redis, &settings.key_prefix, max_document_bytes)
            .map_err(|error| ServerError::Redis(error.to_string()))?;
        let failover = Failover::open(
            redis,
            FailoverSettings {
                trip_after: settings.trip_after,
                on_recovery: settings.on_recovery,
                mirror_max_bytes: max_bytes,
            },
            instance.clone(),
        );
        let store = Documents::new(failover.clone(), max_document_bytes, instance.clone());
        let admin = Admin::of_failover(failover.clone(), &instance);
        let interval = settings.reload_interval;
        let mut server = Self::listen(
            settings,
            Arc::new(store),
            Some(failover.clone()),
            admin,
            instance,
        )
        .await?;
        files.spawn_on(&mut server.tasks, interval);
        failover.started(Instant::now() + REDIS_START_BOUND).await;
        Ok(server)
    }

    /// Takes the ports and serves any store.
    pub async fn with_store(
        settings: Settings,
        store: Arc<dyn GroupStore>,
        instance: InstanceId,
    ) -> Result<Self, ServerError> {
        // Holds nothing; what the store holds it does not show.
        let memory = MemoryStore::new(settings.mirror_max_bytes, instance.clone());
        let admin = Admin::of_memory(memory, &instance);
        Self::listen(settings, store, None, admin, instance).await
    }

    async fn listen(
        settings: Settings,
        store: Arc<dyn GroupStore>,
        failover: Option<Failover>,
        admin: Admin,
        instance: InstanceId,
    ) -> Result<Self, ServerError> {
        let grpc = listen("--grpc-addr", settings.grpc_addr)?;
        let http = listen("--http-addr", settings.http_addr)?;
        tracing::info!(addr = %http.local_addr()?, "serving HTTP");
        let mut tasks = JoinSet::new();
        let interval = settings.reload_interval;
        let tokens = watch(settings.tokens(), interval, &mut tasks)?;
        let client_ca = watch(settings.client_ca(), interval, &mut tasks)?;
        let identity = watch(settings.identity(), interval, &mut tasks)?;
        let tls = match identity {
            Some(identity) => Some(ServerTls::new(identity, client_ca).map_err(ServerError::File)?),
            None => None,
        };
        if let Some(open) = how_open(&settings) {
            tracing::warn!(addr = %settings.grpc_addr, "{open}");
        }
        let admin = Arc::new(admin.open_to(tokens.clone()));
        tasks.spawn(admin.clone().serve(http));
        tasks.spawn(telemetry::upkeep_forever());
        Ok(Self {
            settings,
            grpc,
            store,
            failover,
            admin,
            tokens,
            tls,
            instance,
            tasks,
        })
    }

    /// The address that the gRPC server listens on.
    pub fn grpc_addr(&self) -> io::Result<SocketAddr> {
        self.grpc.local_addr()
    }

    /// Serves until `stop`, then stops gracefully.
    pub async fn serve(self, stop: impl Future<Output = Stop> + Send) -> Result<(), ServerError> {
        let settings = self.settings;
        let addr = self.grpc.local_addr()?;
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
            settings.max_inflight_bytes,
        ))
        .max_decoding_message_size(settings.max_request_bytes);
        let (health, health_service) = tonic_health::server::health_reporter();
        set_health(&health, ServingStatus::Serving).await;
        let mut follow = JoinSet::new();
        if let Some(failover) = &self.failover {
            follow.spawn(follow_switch(health.clone(), failover.switch().clone()));
        }
        self.admin.set_phase(Phase::Serving);

        let backend = self.store.backend().name();
        let admission = Admission {
            tokens: self.tokens,
            max_concurrent_calls: settings.max_concurrent_calls,
            max_inflight_bytes: settings.max_inflight_bytes,
            max_request_bytes: settings.max_request_bytes,
            reflection: settings.reflection == OnOff::On,
        };
        let others = Routes::new(health_service)
            .add_service(reflection().build_v1().map_err(io::Error::other)?)
            .add_service(reflection().build_v1alpha().map_err(io::Error::other)?)
            .prepare();

        let services = Services::new(service, others);
        let envelope = Envelope::new(services, self.store, &self.instance, admission);
        let in_flight = envelope.in_flight().clone();

        // Calls over the limit are refused and gone again, if their clients take it.
        // Of the bytes half, so that slow clients leave room to others, but at least one
        // request.
        let waits = Waits::new(Amount {
            calls: settings
                .max_concurrent_calls
                .saturating_mul(OPEN_CALLS)
                .max(LEAST_OPEN_CALLS),
            bytes: (settings.max_inflight_bytes / 2).max(settings.max_request_bytes),
        });

        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        let limits = ConnectionLimits {
            max_connections: listener::within_open_files(settings.max_connections),
            max_age: settings.max_connection_age,
            age_grace: settings.max_connection_age_grace,
            max_streams: settings.max_streams_per_connection,
        };
        let serve = listener::serve(self.grpc, self.tls, limits, waits, envelope, async {
            // An error means that `finish` was dropped, which ends it as well.
            let _ = finished.await;
        });
        tokio::pin!(serve);
        let instance = self.instance.as_str();
        tracing::info!(%addr, instance, backend, "serving gRPC");

        let stop = tokio::select! {
            () = &mut serve => return Ok(()),
            stop = stop => stop,
        };
        self.admin.set_phase(Phase::Stopping);
        set_health(&health, ServingStatus::NotServing).await;
        if stop == Stop::AfterDelay {
            let delay = settings.shutdown_delay;
            tracing::info!(?delay, "stopping: health says NOT_SERVING");
            tokio::select! {
                () = &mut serve => return Ok(()),
                () = tokio::time::sleep(delay) => {}
            }
        }
        // A Watch stream ends only when its status is forgotten; it would hold
        // up the stop otherwise.
        follow.shutdown().await;
        for name in HEALTH_NAMES.into_iter().chain([REDIS_HEALTH_NAME]) {
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
            () = &mut serve => {}
            () = idle => {}
            () = tokio::time::sleep(settings.shutdown_timeout) => {
                let calls = in_flight.len();
                tracing::warn!(calls, "stopping: calls were cut off after --shutdown-timeout");
            }
        }
        let unsaved = match &self.failover {
            Some(failover) => {
                let deadline = Instant::now() + LAST_TRY;
                failover.monitor().last_try(deadline).await
            }
            None => 0,
        };
        if unsaved > 0 {
            tracing::warn!(
                unsaved,
                "stopped; groups that were written while Redis was down are lost"
            );
        } else {
            tracing::info!(unsaved, "stopped");
        }
        Ok(())
    }
}

/// Has the files of a setting watched, if there are any.
fn watch<T: Send + Sync + 'static>(
    opened: Opened<T>,
    interval: Duration,
    tasks: &mut JoinSet<()>,
) -> Result<Option<Watched<T>>, ServerError> {
    let opened = opened.map_err(ServerError::File)?;
    Ok(opened.map(|(watched, watcher)| {
        tasks.spawn(watcher.watch_forever(interval));
        watched
    }))
}

/// What strangers can do at the gRPC port, if anything.
fn how_open(settings: &Settings) -> Option<&'static str> {
    let is_local = settings.grpc_addr.ip().to_canonical().is_loopback();
    let is_guarded = settings.auth_token_file.is_some() || settings.tls_client_ca.is_some();
    if settings.tls_cert.is_none() && settings.auth_token_file.is_some() {
        Some("tokens are sent in plain text: there is no --tls-cert")
    } else if is_local || is_guarded {
        None
    } else {
        Some(
            "whoever reaches the gRPC port may read and change every group: set --tls-cert with \
             --auth-token-file or --tls-client-ca, or let --grpc-addr be a loopback address",
        )
    }
}

fn listen(setting: &'static str, addr: SocketAddr) -> Result<TcpListener, ServerError> {
    bind(addr).map_err(|error| ServerError::Bind {
        setting,
        addr,
        error,
    })
}

fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // As `TcpListener::bind` does, so that a restart need not wait for old connections.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Shows in the health of `redis` whether Redis answers.
async fn follow_switch(health: HealthReporter, switch: Arc<Switch>) {
    let mut status = switch.subscribe();
    loop {
        let closed = status.borrow_and_update().closed;
        let serving = if closed {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        health.set_service_status(REDIS_HEALTH_NAME, serving).await;
        // Watchers are told of every status that is set, also of the same.
        let turned = status.wait_for(|status| status.closed != closed).await;
        if turned.is_err() {
            return;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_open_to_strangers_is_warned_of() {
        let how_open = |addr: &str, settings: &[&str]| {
            let mut read = Settings::read(["groupstate", "--grpc-addr", addr]).unwrap();
            let file = |setting| settings.contains(&setting).then(|| "file".into());
            read.tls_cert = file("--tls-cert");
            read.tls_client_ca = file("--tls-client-ca");
            read.auth_token_file = file("--auth-token-file");
            how_open(&read)
        };
        for (addr, is_local) in [
            ("0.0.0.0:50051", false),
            ("[::]:50051", false),
            ("10.0.0.7:50051", false),
            ("127.0.0.1:50051", true),
            ("[::1]:50051", true),
            ("[::ffff:127.0.0.1]:50051", true),
        ] {
            for unguarded in [&[][..], &["--tls-cert"]] {
                let open = how_open(addr, unguarded);
                assert_eq!(open.is_none(), is_local, "{addr} {unguarded:?}");
                assert!(open.is_none_or(|open| open.contains("whoever reaches")));
            }
            for guarded in [
                ["--tls-cert", "--auth-token-file"],
                ["--tls-cert", "--tls-client-ca"],
            ] {
                assert_eq!(how_open(addr, &guarded), None, "{addr} {guarded:?}");
            }
            let plain = how_open(addr, &["--auth-token-file"]);
            assert!(
                plain.is_some_and(|plain| plain.contains("plain text")),
                "{addr}"
            );
        }
    }
}
