//! Every limit has its setting and says its name; ages and numbers of connections.

use std::time::{Duration, Instant};

use groupstate::grpc::{proto as pb, reflection::MAX_REFLECTION_STREAMS};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, Request, Status};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};
use tonic_types::StatusExt;

use crate::{
    common::{
        http,
        redis_server::RedisServer,
        service::{Client, Service},
        stalls::{Bound, pass, within},
        wait_until,
    },
    wire,
    wire::{DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RST_STREAM, Wire, frame},
};

const STORE: &str = "/groupstate.v1.GroupStateService/Store";

fn group(key: &str, alerts: usize, bytes: usize) -> pb::AlertGroup {
    let alert = |number: usize| {
        let fingerprint = format!("f{number}");
        let alert = pb::Alert {
            fingerprint: fingerprint.clone(),
            status: pb::AlertStatus::Firing.into(),
            annotations: [("text".to_owned(), "x".repeat(bytes))].into(),
            ..Default::default()
        };
        (fingerprint, alert)
    };
    pb::AlertGroup {
        key: key.into(),
        alerts: (0..alerts).map(alert).collect(),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            ..Default::default()
        }),
    }
}

async fn store(service: &Service, groups: Vec<pb::AlertGroup>) -> Result<(), Status> {
    let mut client = service.client().await;
    match <[_; 1]>::try_from(groups) {
        Ok([group]) => {
            let group = Some(group);
            let request = pb::StoreRequest {
                group,
                expiry: None,
            };
            client.store(request).await?;
        }
        Err(groups) => {
            let request = pb::StoreAllRequest {
                groups,
                expiry: None,
            };
            client.store_all(request).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_limit_of_a_request_lets_the_largest_through_and_names_itself() {
    for (setting, within, beyond, code) in [
        (
            ["--max-key-bytes", "10"],
            vec![group("0123456789", 1, 1)],
            vec![group("0123456789x", 1, 1)],
            Code::InvalidArgument,
        ),
        (
            ["--max-document-bytes", "1KiB"],
            vec![group("k", 1, 500)],
            vec![group("k", 1, 1_100)],
            Code::InvalidArgument,
        ),
        (
            ["--max-alerts-per-group", "3"],
            vec![group("k", 3, 1)],
            vec![group("k", 4, 1)],
            Code::InvalidArgument,
        ),
        (
            ["--max-groups-per-batch", "2"],
            vec![group("a", 1, 1), group("b", 1, 1)],
            vec![group("a", 1, 1), group("b", 1, 1), group("c", 1, 1)],
            Code::InvalidArgument,
        ),
        (
            ["--max-request-bytes", "1KiB"],
            vec![group("k", 1, 900)],
            vec![group("k", 1, 1_100)],
            Code::ResourceExhausted,
        ),
    ] {
        let service = Service::start(&setting);
        store(&service, within).await.expect(setting[0]);
        let refused = store(&service, beyond).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused:?}");
        // In the message, so that whoever reads it can act.
        assert!(refused.message().contains(setting[0]), "{refused:?}");
    }
}

/// Two bytes of a request are an empty group, which takes five hundred in memory.
#[tokio::test]
async fn what_would_grow_when_it_is_decoded_is_refused_before() {
    const GROUPS: usize = 1 << 20;

    let service = Service::start(&[]);
    let mut client = tonic::client::Grpc::new(crate::channel(&service, None));
    client.ready().await.unwrap();
    // Empty keys look like empty groups, and are quickly made.
    let empty = pb::ListKeysResponse {
        keys: vec![String::new(); GROUPS],
        ..Default::default()
    };
    let codec = tonic_prost::ProstCodec::<_, pb::StoreAllResponse>::default();
    let path = "/groupstate.v1.GroupStateService/StoreAll".parse().unwrap();
    let before = service.most_resident_bytes();
    let refused = client.unary(Request::new(empty), path, codec).await;
    let grown = service.most_resident_bytes() - before;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    let info = refused.get_details_error_info().unwrap();
    assert_eq!(info.reason, "MESSAGE_TOO_LARGE");
    assert_eq!(info.metadata["limit"], "max-request-bytes");
    // The request itself, as it came and put together.
    assert!(grown < 10 * 2 * GROUPS, "{grown}");
}

#[tokio::test]
async fn requests_that_take_too_much_together_are_shed_and_health_is_not() {
    let redis = RedisServer::start().await;
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--max-request-bytes",
        "600KiB",
        "--max-inflight-bytes",
        "1MiB",
        // Calls have to wait for Redis.
        "--trip-after",
        "10s",
        "--redis-timeout",
        "5s",
    ]);
    let service = &service;
    let large = |key| store(service, vec![group(key, 1, 595 << 10)]);
    large("k").await.unwrap();
    redis.process().signal("STOP");
    let (first, ()) = tokio::join!(large("first"), async {
        wait_until(
            "the first is in flight",
            Duration::from_secs(5),
            async || service.metric("storage_operations_in_flight").await == 1.0,
        )
        .await;
        // And all of it has come.
        pass(Duration::from_millis(200)).await;
        let bound = Bound::of(Duration::from_secs(1));
        let refused = large("second").await.unwrap_err();
        bound.assert_holds("it is refused at once");
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
        assert!(refused.message().contains("--max-inflight-bytes"));
        let info = refused.get_details_error_info().unwrap();
        assert_eq!(info.reason, "OVERLOADED");
        assert_eq!(info.metadata["limit"], "max-inflight-bytes");
        assert!(refused.get_details_retry_info().is_some());
        // Health is not asked for room.
        let channel = crate::channel(service, None);
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
        let request = tonic_health::pb::HealthCheckRequest::default();
        health.check(request).await.unwrap();
        redis.process().signal("CONT");
    });
    first.unwrap();
    large("third").await.unwrap();
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_until_there_is_room() {
    let service = Service::start(&["--max-connections", "2"]);
    let mut first = service.client().await;
    let second = service.client().await;
    let size = pb::SizeRequest::default;
    first.size(size()).await.unwrap();
    let third = Wire::connect(service.addr()).await;
    if let Ok(third) = third {
        let closed = within(Duration::from_secs(2), third.drain()).await;
        assert!(closed.is_some(), "it is left open");
    }
    service.wait_for_log("--max-connections", Duration::from_secs(1));
    first.size(size()).await.unwrap();
    drop(second);
    let fourth = crate::client(&service, None);
    wait_until("there is room", Duration::from_secs(5), || {
        let mut fourth = fourth.clone();
        async move { fourth.size(size()).await.is_ok() }
    })
    .await;
}

/// The client waits with more calls than `--max-streams-per-connection` on its own.
#[tokio::test]
async fn calls_beyond_the_limit_of_a_connection_wait_at_the_client() {
    let redis = RedisServer::start().await;
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--max-streams-per-connection",
        "2",
        "--trip-after",
        "10s",
        "--redis-timeout",
        "5s",
    ]);
    let mut client = service.client().await;
    // Until the first answer it does not know of the limit.
    client.size(pb::SizeRequest::default()).await.unwrap();
    redis.process().signal("STOP");
    let calls: Vec<_> = (0..5)
        .map(|number| {
            let mut client = client.clone();
            let group = Some(group(&format!("k{number}"), 1, 1));
            let request = pb::StoreRequest {
                group,
                expiry: None,
            };
            tokio::spawn(async move { client.store(request).await })
        })
        .collect();
    let in_flight = async || service.metric("storage_operations_in_flight").await;
    let patience = Duration::from_secs(5);
    wait_until("two are in flight", patience, async || {
        in_flight().await == 2.0
    })
    .await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(in_flight().await <= 2.0);
    }
    redis.process().signal("CONT");
    for call in calls {
        if let Err(status) = call.await.unwrap() {
            // Redis was away for longer than a call waits, on a busy machine.
            let info = status.get_details_error_info().unwrap();
            assert_eq!(info.reason, "OUTCOME_UNKNOWN", "{status}");
        }
    }
}

#[tokio::test]
async fn a_call_that_crosses_the_age_of_its_connection_succeeds() {
    let redis = RedisServer::start().await;
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--max-connection-age",
        "1s",
        // The call has to wait for Redis; memory must not answer it.
        "--trip-after",
        "10s",
        "--redis-timeout",
        "5s",
    ]);
    let mut client = service.client().await;
    store(
        &service,
        (0..30)
            .map(|n| group(&format!("k{n}"), 1, 500_000))
            .collect(),
    )
    .await
    .unwrap();

    // A stream whose reader takes its time.
    let begin = Instant::now();
    let stream = client.load_all(pb::LoadAllRequest::default()).await;
    let mut stream = stream.unwrap().into_inner();
    let mut groups = 0;
    loop {
        let message = stream.message().await.unwrap().expect("a summary");
        groups += message.groups.len();
        if message.summary.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(groups, 30);
    assert!(
        begin.elapsed() > Duration::from_millis(1_100),
        "older than the limit"
    );

    // A call that waits for Redis, on a new connection.
    let mut client = service.client().await;
    let groups = vec![group("slow", 1, 1)];
    let expiry = None;
    redis.process().signal("STOP");
    let batch = client.store_all(pb::StoreAllRequest { groups, expiry });
    let (reply, ()) = tokio::join!(batch, async {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        redis.process().signal("CONT");
    });
    let reply = reply.unwrap().into_inner();
    assert!(reply.results[0].error.is_none(), "{reply:?}");
    // And the connection is gone.
    wait_until(
        "the connection is closed",
        Duration::from_secs(5),
        async || service.metric("connections").await == 0.0,
    )
    .await;
}

/// HTTP/2 has the client agree to the end of a connection, by answering a PING. This one
/// does not, and goes on calling.
#[tokio::test]
async fn a_client_that_does_not_let_go_of_its_old_connection_loses_it() {
    const AGE: Duration = Duration::from_secs(1);
    const GRACE: Duration = Duration::from_secs(2);
    let redis = RedisServer::start().await;
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--max-connection-age",
        "1s",
        "--max-connection-age-grace",
        "2s",
        // A call has to wait for Redis.
        "--trip-after",
        "30s",
        "--redis-timeout",
        "30s",
    ]);
    let begin = Instant::now();
    let deaf = wire::deaf_to_the_end(service.addr()).await;
    let mut client = Client::connect(format!("http://{deaf}")).await.unwrap();
    // A call that is in flight when the connection has grown too old.
    redis.process().signal("STOP");
    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move {
            let (group, expiry) = (Some(group("slow", 1, 1)), None);
            client.store(pb::StoreRequest { group, expiry }).await
        }
    });
    let mut served_at = Duration::ZERO;
    loop {
        // What is wrong with it is known without Redis.
        let answer = client.store(pb::StoreRequest::default()).await;
        let refused = answer.unwrap_err();
        match refused.code() {
            Code::InvalidArgument => served_at = begin.elapsed(),
            _ => {
                assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
                assert!(
                    refused.message().contains("--max-connection-age"),
                    "{refused:?}"
                );
                break;
            }
        }
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "it goes on for ever"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused_at = begin.elapsed();
    assert!(
        served_at > AGE.mul_f64(1.2),
        "age alone breaks nothing off: {served_at:?}"
    );
    assert!(refused_at > AGE.mul_f64(0.9) + GRACE, "{refused_at:?}");

    redis.process().signal("CONT");
    waiting
        .await
        .unwrap()
        .expect("a call in flight gets its time");
    wait_until("it is closed", Duration::from_secs(20), async || {
        service.metric("connections").await == 0.0
    })
    .await;
    service.wait_for_log("its client went on with it", Duration::from_secs(1));
    let metric = "connection_failures_total{reason=\"age\"}";
    assert_eq!(service.metric(metric).await, 1.0);
}

/// They would hold the connection up for as long as their client likes.
#[tokio::test]
async fn streams_without_an_end_end_with_the_age_of_their_connection() {
    let service = Service::start(&["--max-connection-age", "1s"]);
    let channel = crate::channel(&service, None);
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let request = tonic_health::pb::HealthCheckRequest::default();
    let mut watch = health.watch(request).await.unwrap().into_inner();
    watch.message().await.unwrap().expect("how it is now");

    let (questions, asked) = tokio::sync::mpsc::channel(1);
    let mut reflection = ServerReflectionClient::new(channel);
    let asked = tokio_stream::wrappers::ReceiverStream::new(asked);
    let stream = reflection.server_reflection_info(asked);
    let question = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    questions.send(question).await.unwrap();
    let mut answers = stream.await.unwrap().into_inner();
    answers.message().await.unwrap().expect("a list");

    let soon = Duration::from_secs(10);
    let ends = tokio::time::timeout(soon, watch.message()).await.unwrap();
    assert_eq!(ends.unwrap_err().code(), Code::Unavailable);
    let ends = tokio::time::timeout(soon, answers.message()).await.unwrap();
    assert_eq!(ends.unwrap_err().code(), Code::Unavailable);
    wait_until("it is closed", soon, async || {
        service.metric("connections").await == 0.0
    })
    .await;
}

#[tokio::test]
async fn streams_of_reflection_beyond_the_limit_are_refused_until_there_is_room() {
    let service = Service::start(&[]);
    let mut open = Vec::new();
    let stream = async || {
        let (questions, asked) = tokio::sync::mpsc::channel::<ServerReflectionRequest>(1);
        let asked = tokio_stream::wrappers::ReceiverStream::new(asked);
        let mut client = ServerReflectionClient::new(crate::channel(&service, None));
        let answers = client.server_reflection_info(asked).await?;
        Ok::<_, Status>((questions, answers))
    };
    for _ in 0..MAX_REFLECTION_STREAMS {
        open.push(stream().await.unwrap());
    }
    let refused = stream().await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    let info = refused.get_details_error_info().unwrap();
    assert_eq!(info.reason, "OVERLOADED");
    assert_eq!(info.metadata["limit"], "max-reflection-streams");
    open.pop();
    wait_until("there is room", Duration::from_secs(5), async || {
        stream().await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn reflection_may_be_switched_off() {
    let service = Service::start(&["--reflection", "off"]);
    let mut client = ServerReflectionClient::new(crate::channel(&service, None));
    let question = ServerReflectionRequest::default();
    let refused = client
        .server_reflection_info(tokio_stream::once(question))
        .await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused:?}");
    assert!(
        refused.message().contains("--reflection off"),
        "{refused:?}"
    );
    // And nothing else is.
    store(&service, vec![group("k", 1, 1)]).await.unwrap();
}

/// They have a limit of their own, the bytes that wait for them.
#[tokio::test(flavor = "multi_thread")]
async fn readers_that_take_nothing_keep_nobody_from_listing() {
    const SCANS: usize = 2;
    let service = Service::start(&["--max-scans", &SCANS.to_string()]);
    // More than lies in the windows of a client.
    let mut client = service.client().await;
    for i in 0..24 {
        let request = pb::StoreRequest {
            group: Some(group(&format!("k{i}"), 1, 900_000)),
            expiry: None,
        };
        client.store(request).await.unwrap();
    }
    let patience = Duration::from_secs(10);
    let readers = std::sync::Mutex::new(Vec::new());
    for _ in 0..2 * SCANS {
        let client = service.client().await;
        // Until those before have come to a halt.
        wait_until("one more reads", patience, async || {
            let request = pb::LoadAllRequest::default();
            let stream = client.clone().load_all(request).await;
            stream.is_ok_and(|stream| {
                readers.lock().unwrap().push(stream.into_inner());
                true
            })
        })
        .await;
    }
    wait_until("a listing is answered", patience, async || {
        client
            .clone()
            .size(pb::SizeRequest::default())
            .await
            .is_ok()
    })
    .await;
    // And who reads on gets the rest.
    let mut groups = 0;
    let mut readers = readers.into_inner().unwrap();
    while let Some(message) = readers[0].message().await.unwrap() {
        groups += message.groups.len();
    }
    assert_eq!(groups, 24);
}

/// h2 by itself takes 20 of them at once for a flood, and ends the connection with all
/// calls on it.
#[tokio::test]
async fn calls_that_are_cancelled_in_a_hurry_do_no_harm_to_others_on_their_connection() {
    let service = Service::start(&["--max-streams-per-connection", "1024"]);
    let mut wire = Wire::connect(service.addr()).await.unwrap();
    let headers = wire::headers(STORE);
    // All in one piece, so that none has been looked at when the next one comes.
    let mut hurry = Vec::new();
    for stream in (1..).step_by(2).take(1_000) {
        hurry.extend(frame(HEADERS, END_HEADERS, stream, &headers));
        hurry.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
    }
    wire.send(&hurry).await.unwrap();
    // A call whose message is empty, which is an answer of its own.
    wire.send(&frame(HEADERS, END_HEADERS, 2_001, &headers))
        .await
        .unwrap();
    wire.send(&frame(DATA, END_STREAM, 2_001, &[0; 5]))
        .await
        .unwrap();
    let seen = wire.frames_until(|kind, stream| stream == 2_001 || kind == GOAWAY);
    let seen = within(Duration::from_secs(10), seen).await.unwrap();
    assert_eq!(seen, Some((HEADERS, 2_001)));
}

/// Of small messages that wait to be read h2 counts 256 bytes each, and ends a connection
/// with more of them than half its window.
#[tokio::test]
async fn as_many_small_calls_at_once_as_a_connection_may_have_are_all_answered() {
    const CALLS: usize = 1_024;
    let service = Service::start(&[]);
    let mut wire = Wire::connect(service.addr()).await.unwrap();
    let headers = wire::headers(STORE);
    let streams = || (1u32..).step_by(2).take(CALLS);
    // All in one piece, so that none has been read when the last one comes. The end comes
    // by itself, as clients in Rust send it.
    let mut calls = Vec::new();
    for stream in streams() {
        calls.extend(frame(HEADERS, END_HEADERS, stream, &headers));
        calls.extend(frame(DATA, 0, stream, &[0; 5]));
    }
    for stream in streams() {
        calls.extend(frame(DATA, END_STREAM, stream, &[]));
    }
    wire.send(&calls).await.unwrap();
    let mut answered = 0;
    let seen = wire.frames_until(|kind, _| {
        answered += usize::from(kind == HEADERS);
        answered == CALLS || kind == GOAWAY
    });
    let seen = within(Duration::from_secs(10), seen).await.unwrap();
    assert_eq!(seen.map(|(kind, _)| kind), Some(HEADERS));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_calls_on_one_connection_are_cancelled_after_a_millisecond() {
    let service = Service::start(&[]);
    let mut patient = service.client().await;
    let calls: Vec<_> = (0..1_000)
        .map(|_| {
            let mut client = patient.clone();
            tokio::spawn(async move {
                let call = client.size(pb::SizeRequest::default());
                let over = tokio::time::timeout(Duration::from_millis(1), call).await;
                if let Ok(Err(status)) = over {
                    // Shed by --max-scans, at the worst.
                    assert_eq!(status.code(), Code::ResourceExhausted);
                }
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    // And the connection is the same.
    patient.size(pb::SizeRequest::default()).await.unwrap();
    assert_eq!(service.metric("connections").await, 1.0);
}

/// Probes come through, whoever holds on to connections.
#[tokio::test(flavor = "multi_thread")]
async fn the_http_port_gives_up_the_oldest_of_too_many_connections() {
    const TOO_MANY: usize = 300;
    let service = Service::start(&[]);
    let addr = service.http_addr();
    let mut silent = Vec::new();
    for _ in 0..TOO_MANY {
        let mut connection = TcpStream::connect(addr).await.unwrap();
        connection
            .write_all(b"GET /metrics HTTP/1.1\r\n")
            .await
            .unwrap();
        silent.push(connection);
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        let reply = http::get(addr, path, Duration::from_secs(2)).await.unwrap();
        assert_eq!(reply.status, 200, "{path}");
    }
    let mut oldest = silent.swap_remove(0);
    let mut answer = Vec::new();
    let end = oldest.read_to_end(&mut answer);
    // Closed, or reset because it was not read to its end.
    let end = within(Duration::from_secs(2), end).await;
    assert!(end.is_some() && answer.is_empty(), "{answer:?}");
}
