//! Who is not let in is counted, by the reason.

use std::time::Duration;

use groupstate::grpc::proto as pb;
use tonic::{Code, Request};

use crate::{
    Files, TOKEN, client,
    common::{
        certificates::{Ca, Valid},
        http,
        service::Service,
        wait_until,
    },
    start,
};

async fn failures(service: &Service, reason: &str) -> f64 {
    let metric = format!("authentication_failures_total{{reason=\"{reason}\"}}");
    service.metric(&metric).await
}

#[tokio::test]
async fn a_call_without_a_valid_token_is_a_failed_login_and_no_bad_request() {
    let files = Files::make();
    let service = start(&[files.tokens()]);
    let mut client = client(&service, None);
    for (authorization, reason) in [
        (None, "no_token"),
        (Some("Basic abc"), "malformed_token"),
        (Some("Bearer wrong"), "unknown_token"),
    ] {
        let mut request = Request::new(pb::SizeRequest::default());
        if let Some(value) = authorization {
            let value = value.parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        let refused = client.size(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        assert_eq!(failures(&service, reason).await, 1.0, "{reason}");
    }
    crate::size(&mut client, TOKEN).await.unwrap();
    for (result, expected) in [("unauthenticated", 3.0), ("invalid", 0.0), ("success", 1.0)] {
        let metric = format!("storage_operations_total{{operation=\"size\",result=\"{result}\"}}");
        assert_eq!(service.metric(&metric).await, expected, "{result}");
    }
    // The log level is guarded by the same tokens, on this machine too.
    let bound = Duration::from_secs(2);
    let reply = http::send(service.http_addr(), "PUT", "/loglevel", "debug", bound).await;
    assert_eq!(reply.unwrap().status, 401);
    assert_eq!(failures(&service, "no_token").await, 2.0);
}

#[tokio::test]
async fn a_handshake_without_a_valid_certificate_is_a_failed_login() {
    let files = Files::make();
    files.ca.issue(Valid::Once).write(files.folder(), "expired");
    let foreign = Ca::new("a foreign CA").issue(Valid::Now);
    foreign.write(files.folder(), "foreign");
    let service = start(&[files.mutual_tls()]);
    for (certificate, reason) in [
        (None, "no_certificate"),
        (Some("expired"), "bad_certificate"),
        (Some("foreign"), "bad_certificate"),
    ] {
        let before = failures(&service, reason).await;
        let mut client = client(&service, Some(files.client_tls(certificate)));
        client.size(pb::SizeRequest::default()).await.unwrap_err();
        wait_until("it is counted", Duration::from_secs(5), async || {
            failures(&service, reason).await > before
        })
        .await;
    }
    let handshakes = "connection_failures_total{reason=\"handshake\"}";
    assert!(service.metric(handshakes).await >= 3.0);
}
