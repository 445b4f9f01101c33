//! Calls of which the answer does not come, in every way in which that can be: an
//! instance that is none takes them, and does something else.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use groupstate::{
    domain::{
        group::{AlertGroup, GroupKey, GroupMetadata},
        version::Version,
    },
    manager::remote::{RemoteSettings, RemoteStore},
    store::{Deadline, ErrorKind, Expiry, GroupStore, StoreError},
};
use h2::{Reason, server::SendResponse};
use http::{Response, StatusCode};
use tokio::{net::TcpListener, time::Instant};

const CONTENT: &str = "application/grpc";
/// Much less than a call has, for what is silent to the end of it.
const SHORT: Duration = Duration::from_millis(300);

/// What the instance does with a call that it has got whole.
#[derive(Clone, Copy, Debug)]
enum Instead {
    Nothing,
    Reset(Reason),
    CloseConnection,
    /// A status that does not come from a service, as of a proxy.
    Status(&'static str),
    /// Headers, and nothing more.
    BeginAnswer,
    /// Bytes that are no message.
    Nonsense,
    NoGrpc,
}

const ALL: [Instead; 12] = [
    Instead::Nothing,
    Instead::Reset(Reason::CANCEL),
    Instead::Reset(Reason::INTERNAL_ERROR),
    Instead::Reset(Reason::ENHANCE_YOUR_CALM),
    Instead::CloseConnection,
    Instead::Status("1"),
    Instead::Status("4"),
    Instead::Status("8"),
    Instead::Status("14"),
    Instead::BeginAnswer,
    Instead::Nonsense,
    Instead::NoGrpc,
];

struct Instance {
    addr: SocketAddr,
    /// Calls that it has got.
    calls: Arc<AtomicUsize>,
}

impl Instance {
    async fn start(instead: Instead) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let calls = counted.clone();
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    let mut held = Vec::new();
                    while let Some(Ok((request, answer))) = connection.accept().await {
                        // Of a request that is sent its beginning comes first.
                        drop(request);
                        calls.fetch_add(1, Ordering::SeqCst);
                        if matches!(instead, Instead::CloseConnection) {
                            return;
                        }
                        do_instead(instead, answer, &mut held);
                    }
                });
            }
        });
        Self { addr, calls }
    }

    fn store(&self) -> RemoteStore {
        RemoteStore::at(&self.addr.to_string(), RemoteSettings::default()).unwrap()
    }
}

/// `held` is held open.
fn do_instead(
    instead: Instead,
    mut answer: SendResponse<bytes::Bytes>,
    held: &mut Vec<Box<dyn std::any::Any + Send>>,
) {
    let response = |status| Response::builder().status(status);
    let grpc = || response(StatusCode::OK).header("content-type", CONTENT);
    match instead {
        Instead::Nothing => held.push(Box::new(answer)),
        Instead::Reset(reason) => answer.send_reset(reason),
        Instead::CloseConnection => {}
        Instead::Status(code) => {
            let trailers = grpc().header("grpc-status", code).body(()).unwrap();
            answer.send_response(trailers, true).unwrap();
        }
        Instead::BeginAnswer => {
            let body = answer.send_response(grpc().body(()).unwrap(), false);
            held.push(Box::new(body.unwrap()));
        }
        Instead::Nonsense => {
            let mut body = answer
                .send_response(grpc().body(()).unwrap(), false)
                .unwrap();
            // A message that claims to be larger than any.
            let message = bytes::Bytes::from_static(b"\0\xff\xff\xff\xff");
            body.send_data(message, true).unwrap();
        }
        Instead::NoGrpc => {
            let page = response(StatusCode::BAD_GATEWAY).body(()).unwrap();
            answer.send_response(page, true).unwrap();
        }
    }
}

fn key() -> GroupKey {
    GroupKey::new("k").unwrap()
}

/// What each write is told.
async fn write_in_every_way(
    store: &RemoteStore,
    deadline: impl Fn() -> Deadline,
) -> Vec<StoreError> {
    let group = AlertGroup {
        key: key(),
        alerts: BTreeMap::new(),
        metadata: GroupMetadata::default(),
    };
    let expiry = Expiry::After(Duration::from_secs(60));
    let stored = store.store(&group, expiry, deadline()).await;
    let swapped = store
        .compare_and_swap(&group, Version::new(16), expiry, deadline())
        .await;
    let deleted = store.delete(&key(), None, deadline()).await;
    let all = store.store_all(&[group], expiry, deadline()).await;
    let mut errors = vec![
        stored.unwrap_err().error,
        swapped.unwrap_err().error,
        deleted.unwrap_err().error,
    ];
    errors.extend(all.into_iter().map(|reply| reply.unwrap_err().error));
    errors
}

#[tokio::test]
async fn a_write_without_an_answer_may_have_been_made() {
    for instead in ALL {
        let instance = Instance::start(instead).await;
        let store = instance.store();
        let short = || Deadline::at(Instant::now() + SHORT);
        let errors = write_in_every_way(&store, short).await;
        assert_eq!(errors.len(), 4);
        for error in errors {
            let kind = error.kind();
            assert_eq!(kind, ErrorKind::OutcomeUnknown, "{instead:?}: {error}");
        }
        let read = store.load(&key(), false, short()).await.unwrap_err().error;
        let kind = read.kind();
        assert_ne!(kind, ErrorKind::OutcomeUnknown, "{instead:?}: {read}");
        assert!(instance.calls.load(Ordering::SeqCst) >= 5, "{instead:?}");
    }
}

#[tokio::test]
async fn a_write_that_was_not_sent_was_not_made() {
    let instance = Instance::start(Instead::Nothing).await;
    let passed = || Deadline::at(Instant::now());
    for error in write_in_every_way(&instance.store(), passed).await {
        assert_eq!(error.kind(), ErrorKind::DeadlineExceeded, "{error}");
    }
    assert_eq!(instance.calls.load(Ordering::SeqCst), 0);

    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let store = RemoteStore::at(&nobody.to_string(), RemoteSettings::default()).unwrap();
    for error in write_in_every_way(&store, || Deadline::NONE).await {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
}

/// A caller in a hurry says nothing of the instance, whatever it was told.
#[tokio::test]
async fn a_short_deadline_does_not_make_an_instance_unreachable() {
    let instance = Instance::start(Instead::Nothing).await;
    let store = instance.store();
    let short = || Deadline::at(Instant::now() + SHORT);
    write_in_every_way(&store, short).await;
    assert!(!store.is_down());
    write_in_every_way(&store, || Deadline::NONE).await;
    assert!(store.is_down(), "it hangs");
}
