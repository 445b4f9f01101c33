//! The pieces of a call, each with the same input every time: what they take is
//! measured by `benches/pieces.rs` in nanoseconds and by `benches/instructions.rs`
//! in instructions.

use std::{sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use futures::FutureExt;
use groupstate::{
    domain::{
        document::DocumentHead,
        group::{AlertGroup, GroupKey},
        version::{InstanceId, RedisClock, Version},
    },
    grpc::{
        admission::envelope::{Admission, Envelope},
        convert,
        proto::{self as pb, group_state_service_server::GroupStateServiceServer},
        service::Service,
        services::Services,
        validation::{Limits, Violations},
    },
    store::{
        Deadline, Expiry,
        documents::{Condition, DocumentStore, Documents, Write, WriteOutcome},
        failover::switch::{OnRecovery, Switch},
        memory::{MemoryStore, Shown},
    },
};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::service::Service as _;
use prost::Message;
use tonic::service::Routes;

use crate::load;

/// A piece of work that can be done again and again.
pub struct Piece {
    pub name: String,
    pub work: Box<dyn FnMut()>,
}

/// Alerts in a group: documents of about 1, 9 and 90 KB.
const SIZES: [usize; 3] = [2, 20, 200];
const TTL: Duration = Duration::from_secs(24 * 3_600);
const LIMITS: Limits = Limits {
    max_key_bytes: 4_096,
    max_alerts_per_group: 10_000,
    max_groups_per_batch: 1_000,
    default_ttl: TTL,
    max_ttl: TTL,
};
const MANY_BYTES: usize = 1 << 30;

/// All of them.
pub fn all() -> Vec<Piece> {
    let mut pieces = Vec::new();
    for alerts in SIZES {
        pieces.extend(conversions(alerts));
    }
    pieces.extend(of_memory());
    pieces.extend(of_failover());
    pieces.extend(calls());
    pieces
}

fn piece(name: impl Into<String>, work: impl FnMut() + 'static) -> Piece {
    Piece {
        name: name.into(),
        work: Box::new(work),
    }
}

fn from_proto(group: pb::AlertGroup) -> AlertGroup {
    let mut violations = Violations::default();
    let group = LIMITS.group(format_args!("group"), Some(group), &mut violations);
    group.expect("a valid group")
}

fn group_of(alerts: usize) -> AlertGroup {
    from_proto(load::group(0, alerts))
}

fn version(version: i64) -> Version {
    Version::new(version).expect("it is positive")
}

/// From the wire to the document and back.
fn conversions(alerts: usize) -> [Piece; 4] {
    let message = load::group(0, alerts).encode_to_vec();
    let group = group_of(alerts);
    let document = DocumentHead::new(&group).finish("0123456789ab-1", version(1 << 50));
    let (read, written) = (document, group.clone());
    [
        piece(format!("request read, {alerts} alerts"), move || {
            let message = pb::AlertGroup::decode(&message[..]).expect("just encoded");
            from_proto(message);
        }),
        piece(format!("document written, {alerts} alerts"), move || {
            DocumentHead::new(&written).unversioned("0123456789ab-1");
        }),
        piece(format!("document read, {alerts} alerts"), move || {
            read.parse().expect("just written");
        }),
        piece(format!("reply written, {alerts} alerts"), move || {
            convert::group(group.clone()).encode_to_vec();
        }),
    ]
}

fn write_of(group: &AlertGroup) -> Write {
    Write {
        head: DocumentHead::new(group),
        condition: Condition::Any,
        expiry: Expiry::After(TTL),
        write_id: "0123456789ab-1".into(),
        newer_than: None,
    }
}

/// A store in memory with one group among many.
fn memory() -> (MemoryStore, GroupKey) {
    let store = MemoryStore::new(MANY_BYTES, InstanceId::random());
    for number in 0..10_000 {
        let write = write_of(&from_proto(load::group(number, 2)));
        write_to(&store, &write);
    }
    let key = GroupKey::new(load::key_of(0)).expect("a valid key");
    (store, key)
}

fn write_to(store: &MemoryStore, write: &Write) -> WriteOutcome {
    let written = store.write(write, Deadline::NONE).now_or_never();
    let written = written.expect("memory waits for nothing");
    written.expect("memory has room").value
}

fn of_memory() -> [Piece; 2] {
    let (store, key) = memory();
    let write = write_of(&group_of(2));
    let same = store.clone();
    [
        piece("memory: read, 2 alerts", move || {
            let read = store.read(&key, true, Deadline::NONE).now_or_never();
            let read = read.expect("memory waits for nothing").expect("it can");
            read.value.expect("it is stored");
        }),
        piece("memory: write, 2 alerts", move || {
            write_to(&same, &write);
        }),
    ]
}

/// What the failover adds to a call that Redis answers.
fn of_failover() -> [Piece; 3] {
    let mirror = MemoryStore::mirror(
        MANY_BYTES,
        InstanceId::random(),
        RedisClock::default(),
        OnRecovery::Discard,
    );
    let key = GroupKey::new(load::key_of(0)).expect("a valid key");
    let write = write_of(&group_of(2));
    let (learning, learned) = (mirror.clone(), key.clone());
    let mut next = 1 << 50;
    let switch = Switch::new(mirror.clone(), OnRecovery::Reconcile);
    [
        piece("mirror: update, 2 alerts", move || {
            let ticket = learning.ticket();
            next += 16;
            let written = groupstate::store::Written {
                version: version(next),
                replaced: None,
                expires: None,
            };
            learning.learn(&learned, Shown::by_write(&write, &written), ticket);
        }),
        piece("mirror: look up", move || {
            mirror.known(&key);
        }),
        piece("switch: whose turn it is", move || {
            switch.redis_period();
        }),
    ]
}

/// Whole calls that memory answers, from the headers of the request to the trailers
/// of the reply, without HTTP/2.
fn calls() -> [Piece; 3] {
    let instance = InstanceId::random();
    let (memory, key) = memory();
    let store = Arc::new(Documents::new(memory, MANY_BYTES, instance.clone()));
    let service = Service::new(store.clone(), LIMITS, 4, MANY_BYTES);
    let services = Services::new(GroupStateServiceServer::new(service), Routes::default());
    let admission = Admission {
        tokens: None,
        max_concurrent_calls: 64,
        max_inflight_bytes: MANY_BYTES,
        max_request_bytes: MANY_BYTES,
        reflection: true,
    };
    let envelope = Arc::new(Envelope::new(services, store, &instance, admission));
    let (load, stored) = (envelope.clone(), envelope.clone());
    let mut current = version_of(&call(&envelope, load::LOAD, load::load_request(0)));
    assert_eq!(key.as_str(), load::key_of(0));
    [
        piece("call: Load, 2 alerts", move || {
            call(&load, load::LOAD, load::load_request(0));
        }),
        piece("call: Store, 2 alerts", move || {
            call(&stored, load::STORE, load::store_request(0, 2));
        }),
        piece("call: CompareAndSwap, 2 alerts", move || {
            let swap = load::at_version(&load::swap_request(0, 2), current);
            let reply = call(&envelope, load::COMPARE_AND_SWAP, swap);
            let reply = pb::CompareAndSwapResponse::decode(reply).expect("a reply");
            current = reply.version;
        }),
    ]
}

fn version_of(reply: &Bytes) -> i64 {
    let reply = pb::LoadResponse::decode(reply.clone()).expect("a reply");
    let group = reply.group.expect("it is stored");
    group.metadata.expect("every group has some").version
}

/// Calls and takes the reply's message.
fn call(envelope: &Envelope<Services>, path: &str, message: Bytes) -> Bytes {
    let mut framed = BytesMut::with_capacity(message.len() + 5);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).expect("a small message"));
    framed.put(message);
    let request = Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(framed.freeze()))
        .expect("well-formed");
    let reply = async {
        let reply = envelope.call(request).await.expect("it cannot fail");
        let body = reply.into_body().collect().await.expect("whole");
        let status = body
            .trailers()
            .and_then(|trailers| trailers.get("grpc-status"));
        assert_eq!(status.expect("a status"), "0");
        body.to_bytes().split_off(5)
    };
    reply.now_or_never().expect("memory waits for nothing")
}
