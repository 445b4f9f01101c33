//! Store doubles: stores that panic, hang or fail, behind the real server.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use groupstate::{
    config::Settings,
    domain::{
        group::{AlertGroup, GroupKey},
        version::{InstanceId, Version},
    },
    grpc::proto::group_state_service_client::GroupStateServiceClient,
    server::{Server, Stop},
    store::{
        Backend, Deadline, Deletion, Expiry, GroupBatch, GroupStore, KeyPage, LoadAll, Reply,
        StoreError, Stored, Swap, Written,
    },
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

/// What a double does with every call.
#[derive(Clone)]
pub enum Behaviour {
    Panic,
    /// Never answers.
    Hang,
    Fail(StoreError),
    /// Panics in the middle of a LoadAll.
    PanicMidway,
    /// Fails in the middle of a LoadAll.
    FailMidway(StoreError),
}

/// A store that behaves badly.
pub struct Double {
    behaviour: Behaviour,
    pub calls: Arc<Calls>,
}

/// What has become of the calls on a double.
#[derive(Default)]
pub struct Calls {
    pub begun: AtomicUsize,
    /// Calls whose future is gone.
    pub ended: AtomicUsize,
}

struct Ended(Arc<Calls>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::SeqCst);
    }
}

impl Double {
    pub fn new(behaviour: Behaviour) -> Self {
        Self {
            behaviour,
            calls: Arc::default(),
        }
    }

    async fn misbehave<T>(&self) -> Reply<T> {
        self.calls.begun.fetch_add(1, Ordering::SeqCst);
        let _ended = Ended(self.calls.clone());
        match &self.behaviour {
            Behaviour::Panic => panic!("the secret of /some/path"),
            Behaviour::Hang => std::future::pending().await,
            Behaviour::Fail(error) => Err(Backend::Redis.fails(error.clone())),
            Behaviour::PanicMidway | Behaviour::FailMidway(_) => panic!("only for LoadAll"),
        }
    }
}

#[async_trait]
impl GroupStore for Double {
    fn backend(&self) -> Backend {
        Backend::Redis
    }

    async fn store(&self, _: &AlertGroup, _: Expiry, _: Deadline) -> Reply<Written> {
        self.misbehave().await
    }

    async fn load(&self, _: &GroupKey, _: bool, _: Deadline) -> Reply<Option<Stored>> {
        self.misbehave().await
    }

    async fn delete(&self, _: &GroupKey, _: Option<Version>, _: Deadline) -> Reply<Deletion> {
        self.misbehave().await
    }

    async fn compare_and_swap(
        &self,
        _: &AlertGroup,
        _: Option<Version>,
        _: Expiry,
        _: Deadline,
    ) -> Reply<Swap> {
        self.misbehave().await
    }

    async fn store_all(
        &self,
        groups: &[AlertGroup],
        _: Expiry,
        _: Deadline,
    ) -> Vec<Reply<Written>> {
        let mut replies = Vec::new();
        for _ in groups {
            replies.push(self.misbehave().await);
        }
        replies
    }

    async fn list_keys(&self, _: &str, _: usize, _: Option<&str>, _: Deadline) -> Reply<KeyPage> {
        self.misbehave().await
    }

    async fn size(&self, _: &str, _: Deadline) -> Reply<u64> {
        self.misbehave().await
    }

    async fn load_all(&self, _: &str, _: Deadline) -> Reply<LoadAll> {
        let midway = match self.behaviour.clone() {
            Behaviour::PanicMidway => None,
            Behaviour::FailMidway(error) => Some(error),
            _ => return self.misbehave().await,
        };
        let first = stream::iter([Ok(GroupBatch {
            groups: vec![crate::common::group("k", &[])],
            ..GroupBatch::default()
        })]);
        let then = stream::once(async move {
            match midway {
                None => panic!("the secret of /some/path"),
                Some(error) => Err(Backend::Redis.fails(error)),
            }
        });
        Ok(Backend::Redis.answers(first.chain(then).boxed()))
    }
}

/// A server in this process, which stops when this value goes.
pub struct InProcess {
    pub addr: String,
    stop: CancellationToken,
}

impl InProcess {
    /// Serves a store with these settings.
    pub async fn serve(store: Arc<dyn GroupStore>, arguments: &[&str]) -> Self {
        let arguments = [
            "groupstate",
            "--grpc-addr",
            "127.0.0.1:0",
            "--http-addr",
            "127.0.0.1:0",
        ]
        .iter()
        .chain(arguments);
        let settings = Settings::read(arguments).unwrap();
        let server = Server::with_store(settings, store, InstanceId::random())
            .await
            .unwrap();
        let addr = server.grpc_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        tokio::spawn(server.serve(async move {
            stopped.await;
            Stop::Now
        }));
        Self { addr, stop }
    }

    pub async fn client(&self) -> GroupStateServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.addr)).unwrap();
        GroupStateServiceClient::new(endpoint.connect().await.unwrap())
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
