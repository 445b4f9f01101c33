//! What tonic would answer by itself, seen over raw HTTP/2: the statuses of the
//! contract, and none of tonic's own.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use groupstate::grpc::proto as pb;
use http::{HeaderMap, Request};
use tonic::{Code, Status};

use crate::{
    assert_status,
    common::service::Service,
    double::{Behaviour, Double, InProcess},
    frame, group, load_request, store_request,
};

const LOAD: &str = "/groupstate.v1.GroupStateService/Load";
const STORE: &str = "/groupstate.v1.GroupStateService/Store";

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
            let begin = Instant::now();
            let (_, status) = call(&server.addr, LOAD, &[("grpc-timeout", timeout)], &body).await;
            assert_status(&status, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
            assert!(begin.elapsed() < Duration::from_secs(1));
        }
    }
    assert!(calls.begun.load(Ordering::SeqCst) > 0);
    assert_eq!(
        calls.ended.load(Ordering::SeqCst),
        calls.begun.load(Ordering::SeqCst)
    );
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
