//! A groupstate instance as a store: the gRPC client.
//!
//! It keeps the same contract as the stores in process, and says of every
//! failure what the caller can do about it. A write whose answer does not come
//! is [`OutcomeUnknown`](crate::store::ErrorKind::OutcomeUnknown), whatever the reason, unless it
//! surely was not sent: the deadline had passed before
//! ([`DeadlineExceeded`](crate::store::ErrorKind::DeadlineExceeded)), or no connection came about
//! ([`Unavailable`](crate::store::ErrorKind::Unavailable)). Nothing is repeated here: whoever changes a group loads it again and
//! decides anew.

mod replies;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use prost::Message;
use tokio::time::Instant;
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, ClientTlsConfig, Endpoint},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use self::replies::{Called, Effect, batch, expires, nonsense, told, whole_group, written};
use crate::{
    domain::{
        group::{AlertGroup, GroupKey},
        version::Version,
    },
    grpc::{
        convert,
        proto::{self as pb, group_state_service_client::GroupStateServiceClient},
        validation,
    },
    reload::Watched,
    store::{
        Backend, Deadline, Deletion, Expiry, Failure, GroupBatch, GroupStore, KeyPage, LoadAll,
        Reply, StoreError, Stored, Swap, Written,
    },
};

/// One groupstate instance. Cheap to clone.
///
/// Connects when it is first called, and again whenever the connection breaks.
#[derive(Clone, Debug)]
pub struct RemoteStore {
    client: GroupStateServiceClient<Channel>,
    health: HealthClient<Channel>,
    settings: RemoteSettings,
    state: Arc<RemoteState>,
}

/// How to call an instance.
#[derive(Clone, Debug)]
pub struct RemoteSettings {
    /// What a call gets whose caller has set no deadline. Default 2 s: the
    /// service answers within 1 s even while Redis is failing.
    pub call_timeout: Duration,
    /// What a connection gets to come about. Default 1 s.
    pub connect_timeout: Duration,
    /// A connection is asked for a sign of life this often, also while it is
    /// idle. Default 10 s.
    pub keepalive_interval: Duration,
    /// It counts as broken when it gives none for this long. Default 5 s.
    pub keepalive_timeout: Duration,
    /// How to speak TLS, with the name that the server's certificate bears as
    /// its domain name: instances are called by their addresses. Default None:
    /// plain text.
    pub tls: Option<ClientTlsConfig>,
    /// Sent with every call as `authorization: Bearer TOKEN`; looked up for each,
    /// so that it may change. Default None.
    pub token: Option<Watched<String>>,
}

/// What was seen of an instance.
#[derive(Debug)]
struct RemoteState {
    /// `host:port`.
    address: String,
    /// Whether memory answered last.
    memory: AtomicBool,
    /// Whether it could not be reached, and has not answered since.
    down: AtomicBool,
}

/// A batch is split so that each part holds no more groups than this, the
/// server's default `--max-groups-per-batch`,
const MAX_GROUPS_PER_BATCH: usize = 1_000;
/// and no more bytes than this. Well under its default `--max-request-bytes`,
/// and its keys take less than the server allows.
const MAX_BATCH_BYTES: usize = 4 << 20;
const MAX_BATCH_KEY_BYTES: usize = validation::MAX_BATCH_KEY_BYTES;

/// A reply holds at most 1 MiB plus one group, and a group's size is the
/// server's setting: this is no limit but a guard against nonsense.
const MAX_REPLY_BYTES: usize = 256 << 20;

/// The server sends something of a LoadAll once a second; after this time of
/// silence it is given up.
const LOAD_ALL_SILENCE: Duration = Duration::from_secs(10);

/// The service answers within this time, whatever Redis does. A call that was
/// given it in vain has met an instance that hangs.
const ANSWER_BOUND: Duration = Duration::from_secs(1);

/// How often an instance that is down is asked whether it is back.
const PROBE_INTERVAL: Duration = Duration::from_millis(250);

// === impl RemoteSettings ===

impl Default for RemoteSettings {
    fn default() -> Self {
        Self {
            call_timeout: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(1),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(5),
            tls: None,
            token: None,
        }
    }
}

// === impl RemoteStore ===

impl RemoteStore {
    /// The instance at `address`, as `host:port`. Must be called within a
    /// Tokio runtime.
    pub fn at(address: &str, settings: RemoteSettings) -> Result<Self, tonic::transport::Error> {
        let endpoint = match settings.tls.clone() {
            Some(tls) => Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?,
            None => Endpoint::from_shared(format!("http://{address}"))?,
        };
        let channel = endpoint
            .connect_timeout(settings.connect_timeout)
            .http2_keep_alive_interval(settings.keepalive_interval)
            .keep_alive_timeout(settings.keepalive_timeout)
            .keep_alive_while_idle(true)
            .tcp_nodelay(true)
            .connect_lazy();
        Ok(Self {
            client: GroupStateServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_REPLY_BYTES),
            health: HealthClient::new(channel),
            settings,
            state: Arc::new(RemoteState {
                address: address.to_owned(),
                memory: AtomicBool::new(false),
                down: AtomicBool::new(false),
            }),
        })
    }

    /// `host:port` of the instance.
    pub fn address(&self) -> &str {
        &self.state.address
    }

    /// Whether the last call could not reach it. It is asked in the background
    /// until it answers.
    pub fn is_down(&self) -> bool {
        self.state.down.load(Ordering::Relaxed)
    }

    /// Whether this instance uses Redis now.
    ///
    /// Asks its health service, so it is told in time, whatever the last answer
    /// was.
    pub async fn uses_redis(&self) -> bool {
        let asked = self.status_of("redis").await;
        asked == Some(ServingStatus::Serving)
    }

    /// None: it does not answer.
    async fn status_of(&self, service: &str) -> Option<ServingStatus> {
        let mut health = self.health.clone();
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let asked = tokio::time::timeout(self.settings.connect_timeout, health.check(request));
        let reply = asked.await.ok()?.ok()?.into_inner();
        ServingStatus::try_from(reply.status).ok()
    }

    /// A request that says who calls.
    fn request<M>(&self, message: M) -> Request<M> {
        let mut request = Request::new(message);
        let token = self.settings.token.as_ref();
        let header = token.map(|token| format!("Bearer {}", token.current()));
        // A token that no header can hold is none that a service knows.
        let header = header.and_then(|header| MetadataValue::<Ascii>::try_from(header).ok());
        if let Some(mut header) = header {
            header.set_sensitive(true);
            request.metadata_mut().insert("authorization", header);
        }
        request
    }

    /// Makes one call, within its deadline.
    async fn call<M, R, F>(
        &self,
        message: M,
        effect: Effect,
        deadline: Deadline,
        call: impl FnOnce(GroupStateServiceClient<Channel>, Request<M>) -> F,
    ) -> Result<R, Called>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let until = deadline.or_within(self.settings.call_timeout);
        let given = until.saturating_duration_since(Instant::now());
        if given.is_zero() {
            return Err(Called::too_late());
        }
        let mut request = self.request(message);
        request.set_timeout(given);
        let answered = tokio::time::timeout_at(until, call(self.client.clone(), request)).await;
        let status = match answered {
            Ok(Ok(response)) => {
                self.state.down.store(false, Ordering::Relaxed);
                return Ok(response.into_inner());
            }
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded("no answer within the deadline of the call"),
        };
        let called = Called::of(&status, effect);
        if called.told {
            self.state.down.store(false, Ordering::Relaxed);
            self.saw(called.backend.unwrap_or(self.backend()));
        } else if !called.timed_out || given >= ANSWER_BOUND {
            // One that passes earlier may just have been short.
            self.is_unreachable();
        }
        Err(called)
    }

    /// The connection is broken or the instance hangs: other instances should
    /// be asked until this one is back.
    fn is_unreachable(&self) {
        if self.state.down.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::warn!(address = self.address(), "instance cannot be reached");
        let state = Arc::downgrade(&self.state);
        let store = self.clone();
        // The clone goes with the task, so look at who else has the instance.
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PROBE_INTERVAL).await;
                // One for the task itself.
                if state.strong_count() <= 1 || !store.is_down() {
                    return;
                }
                if store.status_of("").await == Some(ServingStatus::Serving) {
                    store.state.down.store(false, Ordering::Relaxed);
                    tracing::info!(address = store.address(), "instance is back");
                    return;
                }
            }
        });
    }

    fn saw(&self, backend: Backend) {
        self.state
            .memory
            .store(backend == Backend::Memory, Ordering::Relaxed);
    }

    /// The backend that a reply names.
    fn answered_by(&self, backend: pb::Backend) -> Result<Backend, Failure> {
        let backend = match backend {
            pb::Backend::Redis => Backend::Redis,
            pb::Backend::Memory => Backend::Memory,
            pb::Backend::Unspecified => {
                let bug = StoreError::Bug("a reply does not say who answered".into());
                return Err(self.backend().fails(bug));
            }
        };
        self.saw(backend);
        Ok(backend)
    }

    fn fails(&self, called: Called) -> Failure {
        called
            .backend
            .unwrap_or_else(|| self.backend())
            .fails(StoreError::Told {
                kind: called.kind,
                message: called.message,
            })
    }

    /// Stores a part of a batch.
    async fn store_part(
        &self,
        groups: Vec<pb::AlertGroup>,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>> {
        let count = groups.len();
        let request = pb::StoreAllRequest {
            groups,
            expiry: Some(expiry.into()),
        };
        let call = self.call(
            request,
            Effect::Writes,
            deadline,
            |mut client, request| async move { client.store_all(request).await },
        );
        match call.await {
            Ok(reply) if reply.results.len() == count => reply
                .results
                .into_iter()
                .map(|result| {
                    let backend = self.answered_by(result.backend())?;
                    match result.error {
                        Some(error) => Err(backend.fails(told(error))),
                        // StoreAll does not say when its groups expire.
                        None => Ok(backend.answers(written(backend, result.version, None)?)),
                    }
                })
                .collect(),
            Ok(_) => {
                let bug = StoreError::Bug("a batch has fewer results than groups".into());
                vec![Err(self.backend().fails(bug)); count]
            }
            Err(called) => vec![Err(self.fails(called)); count],
        }
    }
}

#[async_trait]
impl GroupStore for RemoteStore {
    fn backend(&self) -> Backend {
        if self.state.memory.load(Ordering::Relaxed) {
            Backend::Memory
        } else {
            Backend::Redis
        }
    }

    async fn store(
        &self,
        group: &AlertGroup,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Written> {
        let request = pb::StoreRequest {
            group: Some(convert::group(group.clone())),
            expiry: Some(expiry.into()),
        };
        let call = self.call(
            request,
            Effect::Writes,
            deadline,
            |mut client, request| async move { client.store(request).await },
        );
        let reply = call.await.map_err(|called| self.fails(called))?;
        let backend = self.answered_by(reply.backend())?;
        Ok(backend.answers(written(backend, reply.version, reply.expire_time)?))
    }

    async fn load(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<Stored>> {
        let request = pb::LoadRequest {
            key: key.to_string(),
            include_expire_time: with_expiry,
        };
        let call = self.call(
            request,
            Effect::Reads,
            deadline,
            |mut client, request| async move { client.load(request).await },
        );
        let reply = match call.await {
            Ok(reply) => reply,
            Err(Called {
                not_found: true,
                backend: Some(backend),
                ..
            }) => return Ok(backend.answers(None)),
            Err(called) => return Err(self.fails(called)),
        };
        let backend = self.answered_by(reply.backend())?;
        let stored = Stored {
            group: whole_group(backend, reply.group)?,
            expires: reply.expire_time.and_then(expires),
        };
        Ok(backend.answers(Some(stored)))
    }

    async fn delete(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion> {
        let request = pb::DeleteRequest {
            key: key.to_string(),
            expected_version: expected.map(Version::get),
        };
        let call = self.call(
            request,
            Effect::Writes,
            deadline,
            |mut client, request| async move { client.delete(request).await },
        );
        let reply = call.await.map_err(|called| self.fails(called))?;
        let backend = self.answered_by(reply.backend())?;
        Ok(backend.answers(Deletion {
            deleted: reply.deleted,
            version: Version::new(reply.version),
        }))
    }

    async fn compare_and_swap(
        &self,
        group: &AlertGroup,
        expected: Option<Version>,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Swap> {
        let request = pb::CompareAndSwapRequest {
            group: Some(convert::group(group.clone())),
            expected_version: convert::version(expected),
            expiry: Some(expiry.into()),
        };
        let call = self.call(
            request,
            Effect::Writes,
            deadline,
            |mut client, request| async move { client.compare_and_swap(request).await },
        );
        let reply = call.await.map_err(|called| self.fails(called))?;
        let backend = self.answered_by(reply.backend())?;
        let swap = if reply.swapped {
            Swap::Swapped(written(backend, reply.version, reply.expire_time)?)
        } else {
            let current = reply.current;
            let current = current.map(|group| whole_group(backend, Some(group)));
            Swap::Lost {
                current: current.transpose()?.map(Box::new),
            }
        };
        Ok(backend.answers(swap))
    }

    async fn store_all(
        &self,
        groups: &[AlertGroup],
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>> {
        let mut replies = Vec::with_capacity(groups.len());
        let (mut part, mut bytes, mut key_bytes) = (Vec::new(), 0, 0);
        for group in groups {
            let group = convert::group(group.clone());
            let (group_bytes, this_key) = (group.encoded_len(), group.key.len());
            let is_full = part.len() == MAX_GROUPS_PER_BATCH
                || bytes + group_bytes > MAX_BATCH_BYTES
                || key_bytes + this_key > MAX_BATCH_KEY_BYTES;
            if is_full && !part.is_empty() {
                let part = std::mem::take(&mut part);
                replies.extend(self.store_part(part, expiry, deadline).await);
                (bytes, key_bytes) = (0, 0);
            }
            bytes += group_bytes;
            key_bytes += this_key;
            part.push(group);
        }
        if !part.is_empty() {
            replies.extend(self.store_part(part, expiry, deadline).await);
        }
        replies
    }

    async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Reply<KeyPage> {
        let request = pb::ListKeysRequest {
            prefix: prefix.to_owned(),
            page_size: i32::try_from(page_size).unwrap_or(i32::MAX),
            page_token: token.unwrap_or_default().to_owned(),
        };
        let call = self.call(
            request,
            Effect::Reads,
            deadline,
            |mut client, request| async move { client.list_keys(request).await },
        );
        let reply = call.await.map_err(|called| self.fails(called))?;
        let backend = self.answered_by(reply.backend())?;
        let keys: Result<Vec<_>, _> = reply.keys.into_iter().map(GroupKey::new).collect();
        Ok(backend.answers(KeyPage {
            keys: keys.map_err(|error| backend.fails(nonsense("a key", error)))?,
            next: Some(reply.next_page_token).filter(|token| !token.is_empty()),
        }))
    }

    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64> {
        let request = pb::SizeRequest {
            prefix: prefix.to_owned(),
        };
        let call = self.call(
            request,
            Effect::Reads,
            deadline,
            |mut client, request| async move { client.size(request).await },
        );
        let reply = call.await.map_err(|called| self.fails(called))?;
        let backend = self.answered_by(reply.backend())?;
        Ok(backend.answers(u64::try_from(reply.count).unwrap_or(0)))
    }

    async fn load_all(&self, prefix: &str, deadline: Deadline) -> Reply<LoadAll> {
        let mut request = self.request(pb::LoadAllRequest {
            prefix: prefix.to_owned(),
        });
        if let Some(until) = deadline.instant() {
            request.set_timeout(until.saturating_duration_since(Instant::now()));
        }
        let mut client = self.client.clone();
        let open = async {
            let mut messages = client.load_all(request).await?.into_inner();
            let first = messages.message().await?;
            Ok((messages, first))
        };
        let opened = tokio::time::timeout_at(deadline.or_within(LOAD_ALL_SILENCE), open).await;
        let (messages, first) = opened
            .unwrap_or_else(|_| Err(Status::unavailable("LoadAll: no answer")))
            .map_err(|status| self.fails(Called::of(&status, Effect::Reads)))?;
        let backend = match &first {
            Some(message) => self.answered_by(message.backend())?,
            None => self.backend(),
        };

        let first = stream::once(async { Ok(first) });
        let rest = stream::unfold(messages, |mut messages| async {
            let next = tokio::time::timeout(LOAD_ALL_SILENCE, messages.message()).await;
            let next = next.unwrap_or_else(|_| Err(Status::unavailable("LoadAll: silence")));
            Some((next, messages))
        });
        let steps = first.chain(rest).map(move |message| match message {
            Ok(Some(message)) => Ok(batch(backend, message)?),
            Ok(None) => Err(Status::unavailable("LoadAll: ended without a summary")),
            Err(status) => Err(status),
        });
        let failed = move |status: Status| {
            let called = Called::of(&status, Effect::Reads);
            called.backend.unwrap_or(backend).fails(StoreError::Told {
                kind: called.kind,
                message: called.message,
            })
        };
        // The summary or a failure is the last that comes.
        let steps = steps.scan(false, move |ended, step: Result<GroupBatch, Status>| {
            let is_last = step.as_ref().map_or(true, |batch| batch.complete.is_some());
            let goes_on = !std::mem::replace(ended, is_last);
            futures::future::ready(goes_on.then(|| step.map_err(failed)))
        });
        Ok(backend.answers(steps.boxed()))
    }
}

macro_rules! expiry_of_request {
    ($($module:ident),*) => {$(
        /// Of a group that is new, the server decides how long "kept" is.
        impl From<Expiry> for pb::$module::Expiry {
            fn from(expiry: Expiry) -> Self {
                match expiry {
                    Expiry::Keep { .. } => Self::KeepTtl(true),
                    Expiry::After(ttl) => Self::Ttl(prost_types::Duration {
                        seconds: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
                        // Less than 10^9.
                        nanos: ttl.subsec_nanos() as i32,
                    }),
                }
            }
        }
    )*};
}

// The oneof is generated once for each request that has it.
expiry_of_request!(store_request, compare_and_swap_request, store_all_request);
