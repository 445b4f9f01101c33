//! What tonic would answer by itself, seen over raw HTTP/2: the statuses of the
//! contract, and none of tonic's own.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use groupstate::grpc::proto as pb;
use http::{HeaderMap, Request};
use tonic::{Code, Status};

use crate::{
    assert_status,
    common::{service::Service, stalls::Bound, wait_until},
    double::{Behaviour, Double, InProcess},
    frame, group, load_request, store_request,
};

const LOAD: &str = "/groupstate.v1.GroupStateService/Load";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
const STORE: &str = "/groupstate.v1.GroupStateService/Store";

/// Sends one request; what comes back, without its body, which has to be empty.
async fn knock(addr: &str, request: http::request::Builder) -> http::Response<()> {
    let tcp = tokio::net::TcpStream::connect(addr).await.unwrap();
    let (mut client, connection) = h2::client::handshake(tcp).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let request = request.uri(format!("http://{addr}{LOAD}"));
    let (response, _) = client
        .send_request(request.body(()).unwrap(), true)
        .unwrap();
    let (head, mut body) = response.await.unwrap().into_parts();
    assert!(body.data().await.is_none());
    http::Response::from_parts(head, ())
}

/// Sends one request with any body; the status from its headers or trailers.
async fn call(addr: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> (u16, Status) {
    let tcp = tokio::net::TcpStream::connect(addr).await.unwrap();
    let (mut client, connection) = h2::client::handshake(tcp).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let mut request = Request::post(format!("http://{addr}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(()).unwrap();
    let (response, mut stream) = client.send_request(request, false).unwrap();
    stream
        .send_data(Bytes::copy_from_slice(body), true)
        .unwrap();
    let response = response.await.unwrap();
    let http_status = response.status().as_u16();
    let mut headers: HeaderMap = response.headers().clone();
    let mut body = response.into_body();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        let _ = body.flow_control().release_capacity(chunk.len());
    }
    if let Some(trailers) = body.trailers().await.unwrap() {
        headers.extend(trailers);
    }
    assert!(headers.contains_key("x-request-id"), "{headers:?}");
    assert!(headers.contains_key("x-groupstate-instance"), "{headers:?}");
    (
        http_status,
        Status::from_header_map(&headers).expect("a grpc-status"),
    )
}

#[tokio::test]
async fn a_body_that_is_no_message_is_an_invalid_argument() {
    let service = Service::start(&[]);
    let bad_utf8 = [0, 0, 0, 0, 3, 0x0a, 1, 0xff];
    let bodies: [(&str, &[u8]); 7] = [
        ("no bytes", b""),
        ("half a frame header", &[0, 0, 0]),
        ("half a message", &[0, 0, 0, 0, 9, 1]),
        ("not protobuf", &[0, 0, 0, 0, 2, 0xff, 0xff]),
        ("bad UTF-8", &bad_utf8),
        ("compressed without saying how", &[1, 0, 0, 0, 0]),
        ("an unknown compression flag", &[7, 0, 0, 0, 0]),
    ];
    for (what, body) in bodies {
        let (http_status, status) = call(service.addr(), LOAD, &[], body).await;
        assert_eq!(http_status, 200, "{what}");
        assert_status(&status, Code::InvalidArgument, "MALFORMED_MESSAGE");
    }
}

#[tokio::test]
async fn a_message_that_is_too_large_is_resource_exhausted() {
    let service = Service::start(&["--max-request-bytes", "1KiB"]);
    // The length alone is enough: nothing is allocated for it.
    for length in [1_025u32, u32::MAX] {
        let mut body = vec![0];
        body.extend(length.to_be_bytes());
        let (_, status) = call(service.addr(), STORE, &[], &body).await;
        assert_status(&status, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    }
}

#[tokio::test]
async fn an_expired_timeout_is_deadline_exceeded_and_ends_the_work() {
    let double = Double::new(Behaviour::Hang);
    let calls = double.calls.clone();
    let server = InProcess::serve(Arc::new(double), &[]).await;
    let body = frame(&load_request("k"));
    for timeout in ["1n", "1u", "1m", "2m", "3m", "20m", "0S"] {
        for _ in 0..20 {
            let bound = Bound::of(Duration::from_secs(1));
            let (_, status) = call(&server.addr, LOAD, &[("grpc-timeout", timeout)], &body).await;
            assert_status(&status, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
            bound.assert_holds("it is answered");
        }
    }
    assert!(calls.begun.load(Ordering::SeqCst) > 0);
    wait_until("the work has ended", Duration::from_secs(1), async || {
        calls.ended.load(Ordering::SeqCst) == calls.begun.load(Ordering::SeqCst)
    })
    .await;
}

#[tokio::test]
async fn a_body_that_never_ends_is_cut_off_by_the_deadline() {
    let service = Service::start(&[]);
    let tcp = tokio::net::TcpStream::connect(service.addr())
        .await
        .unwrap();
    let (mut client, connection) = h2::client::handshake(tcp).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let request = Request::post(format!("http://{}{LOAD}", service.addr()))
        .header("content-type", "application/grpc")
        .header("grpc-timeout", "100m")
        .body(())
        .unwrap();
    let (response, mut stream) = client.send_request(request, false).unwrap();
    stream
        .send_data(Bytes::from_static(&[0, 0, 0]), false)
        .unwrap();
    let response = response.await.unwrap();
    let status = Status::from_header_map(response.headers()).unwrap();
    assert_status(&status, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
}

#[tokio::test]
async fn an_unknown_method_is_unimplemented() {
    let service = Service::start(&[]);
    for path in [
        "/groupstate.v1.GroupStateService/Nothing",
        "/other.Service/Call",
        "/",
    ] {
        let (_, status) = call(service.addr(), path, &[], &frame(&load_request("k"))).await;
        assert_status(&status, Code::Unimplemented, "UNIMPLEMENTED");
    }
}

/// A browser page could send the others without asking.
#[tokio::test]
async fn what_is_no_call_of_grpc_is_answered_in_the_terms_of_http() {
    let service = Service::start(&[]);
    let refused = async |reason: &str| {
        let metric = format!("requests_refused_total{{reason=\"{reason}\"}}");
        service.metric(&metric).await
    };
    for (method, content_type, expected, reason) in [
        ("GET", Some("application/grpc"), 405, "method"),
        ("PUT", Some("application/grpc"), 405, "method"),
        ("OPTIONS", None, 405, "method"),
        ("POST", None, 415, "content_type"),
        ("POST", Some("text/plain"), 415, "content_type"),
        ("POST", Some("application/json"), 415, "content_type"),
        (
            "POST",
            Some("application/grpc-web+proto"),
            415,
            "content_type",
        ),
    ] {
        let before = refused(reason).await;
        let mut request = Request::builder().method(method);
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        let reply = knock(service.addr(), request).await;
        assert_eq!(reply.status(), expected, "{method} {content_type:?}");
        let allow = reply.headers().get("allow");
        assert_eq!(allow.is_some(), expected == 405, "{allow:?}");
        assert_eq!(reply.headers().get("grpc-status"), None);
        assert_eq!(refused(reason).await, before + 1.0);
    }
    for content_type in ["application/grpc", "application/grpc+proto"] {
        let request = Request::post("/").header("content-type", content_type);
        let reply = knock(service.addr(), request).await;
        assert_eq!(reply.status(), 200, "{content_type}");
    }
    service.wait_for_log("no call of gRPC", Duration::from_secs(1));
}

#[tokio::test]
async fn a_second_message_is_refused() {
    let service = Service::start(&[]);
    let load = frame(&load_request("k"));
    let no_message = [0; 5];
    for (path, body) in [
        (LOAD, [&load[..], &load[..]].concat()),
        (LOAD, [&load[..], &[0]].concat()),
        (
            "/grpc.health.v1.Health/Check",
            [no_message, no_message].concat(),
        ),
    ] {
        let (_, status) = call(service.addr(), path, &[], &body).await;
        assert_status(&status, Code::InvalidArgument, "MALFORMED_MESSAGE");
        assert!(status.message().contains("has one message"), "{status:?}");
    }
}

#[tokio::test]
async fn a_compressed_request_is_told_what_is_accepted() {
    let service = Service::start(&[]);
    let body = frame(&load_request("k"));
    for path in [LOAD, "/grpc.health.v1.Health/Check"] {
        for encoding in ["gzip", "deflate", "zstd", "IDENTITY"] {
            let headers = [("grpc-encoding", encoding)];
            let (_, status) = call(service.addr(), path, &headers, &body).await;
            assert_status(&status, Code::Unimplemented, "UNSUPPORTED_COMPRESSION");
            let accepted = status.metadata().get("grpc-accept-encoding");
            assert_eq!(accepted.unwrap(), "identity");
        }
    }
    let headers = [("grpc-encoding", "identity")];
    let (_, status) = call(service.addr(), LOAD, &headers, &body).await;
    assert_status(&status, Code::NotFound, "GROUP_NOT_FOUND");
}

#[tokio::test]
async fn metadata_over_the_limit_is_resource_exhausted() {
    let service = Service::start(&[]);
    let body = frame(&load_request("k"));
    for (bytes, is_too_large) in [(15 << 10, false), (17 << 10, true), (60 << 10, true)] {
        let value = "x".repeat(bytes);
        let (_, status) = call(service.addr(), LOAD, &[("x-large", &value)], &body).await;
        if is_too_large {
            assert_status(&status, Code::ResourceExhausted, "METADATA_TOO_LARGE");
            let info = tonic_types::StatusExt::get_details_error_info(&status).unwrap();
            assert_eq!(info.metadata["limit"], "max-metadata-bytes");
        } else {
            assert_status(&status, Code::NotFound, "GROUP_NOT_FOUND");
        }
    }
    service.wait_for_log("max-metadata-bytes", Duration::from_secs(1));
    let metric = "requests_refused_total{reason=\"metadata_too_large\"}";
    assert_eq!(service.metric(metric).await, 2.0);
}

/// It has a reason of its own: the caller has set no deadline.
#[tokio::test]
async fn a_body_that_does_not_come_is_not_called_the_callers_deadline() {
    let service = Service::start(&[]);
    let unfinished = async |path| {
        let status = unfinished(service.addr(), path, &[0, 0, 0]).await;
        assert_status(&status, Code::DeadlineExceeded, "REQUEST_TOO_SLOW");
        assert!(status.message().contains("20s"), "{status:?}");
    };
    tokio::join!(
        unfinished(LOAD),
        unfinished("/grpc.health.v1.Health/Check"),
        unfinished("/grpc.health.v1.Health/Watch"),
        unfinished(REFLECTION),
    );
}

#[tokio::test]
async fn a_message_to_reflection_is_bounded() {
    let service = Service::start(&[]);
    let status = unfinished(service.addr(), REFLECTION, &[0, 0, 0x40, 0, 0]).await;
    assert_status(&status, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    assert!(status.message().contains("max-reflection-request-bytes"));
}

/// A message that has come in part; the status, which comes without the rest.
async fn unfinished(addr: &str, path: &str, part: &[u8]) -> Status {
    let tcp = tokio::net::TcpStream::connect(addr).await.unwrap();
    let (mut client, connection) = h2::client::handshake(tcp).await.unwrap();
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let request = Request::post(format!("http://{addr}{path}"))
        .header("content-type", "application/grpc")
        .body(())
        .unwrap();
    let (response, mut stream) = client.send_request(request, false).unwrap();
    stream
        .send_data(Bytes::copy_from_slice(part), false)
        .unwrap();
    let response = response.await.unwrap();
    let mut headers = response.headers().clone();
    let mut body = response.into_body();
    while let Some(data) = body.data().await {
        data.unwrap();
    }
    headers.extend(body.trailers().await.unwrap().unwrap_or_default());
    Status::from_header_map(&headers).expect("a status")
}

#[tokio::test]
async fn unknown_fields_are_passed_over() {
    let service = Service::start(&[]);
    let mut message = prost::Message::encode_to_vec(&store_request(group("k")));
    message.extend([0xba, 0x3e, 1, b'x']); // field 999, one byte
    let mut body = vec![0];
    body.extend((message.len() as u32).to_be_bytes());
    body.extend(message);
    let (_, status) = call(service.addr(), STORE, &[], &body).await;
    assert_eq!(status.code(), Code::Ok, "{status:?}");
    let mut client = service.client().await;
    let size = client
        .size(pb::SizeRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(size.count, 1);
}
