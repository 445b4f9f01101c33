//! Every status that does not need Redis, with code, reason and field.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use groupstate::{grpc::proto as pb, store::StoreError};
use tonic::{Code, Request};
use tonic_types::StatusExt;

use crate::{
    alert, assert_status,
    common::{
        service::{Client, Service},
        stalls::Bound,
        wait_until,
    },
    double::{Behaviour, Double, InProcess},
    fields, group, load_request, store_request,
};

async fn memory_service() -> (Service, Client) {
    let service = Service::start(&["--max-alerts-per-group", "3", "--max-groups-per-batch", "5"]);
    let client = service.client().await;
    (service, client)
}

#[tokio::test]
async fn a_bad_group_is_refused_with_the_path_of_each_field() {
    let (_service, mut client) = memory_service().await;
    let with_alert = |change: fn(&mut pb::Alert)| {
        let mut group = group("k");
        change(group.alerts.get_mut("f").unwrap());
        Some(group)
    };
    let with_metadata = |change: fn(&mut pb::GroupMetadata)| {
        let mut group = group("k");
        change(group.metadata.as_mut().unwrap());
        Some(group)
    };
    let with_key = |key: &str| Some(group(key));
    let cases: Vec<(Option<pb::AlertGroup>, &str)> = vec![
        (None, "group"),
        (with_key(""), "group.key"),
        (with_key("\u{1}probe:x"), "group.key"),
        (with_key(&"x".repeat(4_097)), "group.key"),
        (
            with_alert(|alert| alert.fingerprint.clear()),
            r#"group.alerts["f"].fingerprint"#,
        ),
        (
            with_alert(|alert| alert.fingerprint.push('x')),
            r#"group.alerts["f"].fingerprint"#,
        ),
        (
            with_alert(|alert| alert.status = 0),
            r#"group.alerts["f"].status"#,
        ),
        (
            with_alert(|alert| alert.status = 99),
            r#"group.alerts["f"].status"#,
        ),
        (
            with_alert(|alert| alert.labels = BTreeMap::from([(String::new(), "x".into())])),
            r#"group.alerts["f"].labels"#,
        ),
        (
            with_alert(|alert| {
                alert.starts_at = Some(prost_types::Timestamp {
                    seconds: 253_402_300_800,
                    nanos: 0,
                });
            }),
            r#"group.alerts["f"].starts_at"#,
        ),
        (
            with_alert(|alert| {
                alert.ends_at = Some(prost_types::Timestamp {
                    seconds: 0,
                    nanos: -1,
                });
            }),
            r#"group.alerts["f"].ends_at"#,
        ),
        (
            with_alert(|alert| {
                alert.timestamp = Some(prost_types::Timestamp {
                    seconds: 0,
                    nanos: 1_000_000_000,
                });
            }),
            r#"group.alerts["f"].timestamp"#,
        ),
        (
            with_alert(|alert| alert.generator_url = "x".repeat(1 << 20)),
            "group",
        ),
        (
            Some(pb::AlertGroup {
                metadata: None,
                ..group("k")
            }),
            "group.metadata",
        ),
        (
            with_metadata(|metadata| metadata.state = 0),
            "group.metadata.state",
        ),
        (
            with_metadata(|metadata| metadata.state = 5),
            "group.metadata.state",
        ),
        (
            with_metadata(|metadata| metadata.firing_count = -1),
            "group.metadata.firing_count",
        ),
        (
            with_metadata(|metadata| metadata.resolved_count = -1),
            "group.metadata.resolved_count",
        ),
        (
            with_metadata(|metadata| {
                metadata.created_at = Some(prost_types::Timestamp {
                    seconds: i64::MIN,
                    nanos: 0,
                });
            }),
            "group.metadata.created_at",
        ),
        (
            with_metadata(|metadata| {
                metadata.group_wait_timer = Some(pb::TimerMetadata {
                    reset_count: -1,
                    ..Default::default()
                });
            }),
            "group.metadata.group_wait_timer.reset_count",
        ),
        (
            Some(pb::AlertGroup {
                alerts: ["a", "b", "c", "d"]
                    .map(|f| (f.to_owned(), alert(f)))
                    .into(),
                ..group("k")
            }),
            "group.alerts",
        ),
    ];
    for (group, field) in cases {
        let request = pb::StoreRequest {
            group: group.clone(),
            expiry: None,
        };
        assert_eq!(fields(&client.store(request).await.unwrap_err()), [field]);
        let request = pb::CompareAndSwapRequest {
            group,
            expected_version: 0,
            expiry: None,
        };
        let refused = client.compare_and_swap(request).await.unwrap_err();
        assert_eq!(fields(&refused), [field]);
    }
    let size = client
        .size(pb::SizeRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(size.count, 0, "nothing of a refused request is stored");
}

#[tokio::test]
async fn many_faults_at_once_fit_into_a_status() {
    let (_service, mut client) = memory_service().await;
    let name = "\u{1F525}".repeat(500);
    let mut bad = group("");
    bad.alerts = (0..3)
        .map(|i| (format!("{i}{name}"), pb::Alert::default()))
        .collect();
    let status = client.store(store_request(bad)).await.unwrap_err();
    assert!((2..=10).contains(&fields(&status).len()));
    assert!(status.message().len() <= 1_000);
}

#[tokio::test]
async fn a_bad_expiry_is_refused() {
    let (_service, mut client) = memory_service().await;
    use pb::store_request::Expiry::{KeepTtl, Ttl};
    let ttl = |seconds, nanos| Some(Ttl(prost_types::Duration { seconds, nanos }));
    for (expiry, field) in [
        (ttl(0, 0), "ttl"),
        (ttl(0, 999_999_999), "ttl"),
        (ttl(-5, 0), "ttl"),
        (ttl(30 * 24 * 3_600, 1), "ttl"),
        (ttl(i64::MAX, i32::MAX), "ttl"),
        (ttl(i64::MIN, i32::MIN), "ttl"),
        (Some(KeepTtl(false)), "keep_ttl"),
    ] {
        let request = pb::StoreRequest {
            group: Some(group("k")),
            expiry,
        };
        assert_eq!(
            fields(&client.store(request).await.unwrap_err()),
            [field],
            "{expiry:?}"
        );
    }
    for expiry in [
        None,
        ttl(1, 0),
        ttl(30 * 24 * 3_600, 0),
        Some(KeepTtl(true)),
    ] {
        let request = pb::StoreRequest {
            group: Some(group("k")),
            expiry,
        };
        client.store(request).await.unwrap();
    }
}

#[tokio::test]
async fn bad_keys_versions_pages_and_batches_are_refused() {
    let (_service, mut client) = memory_service().await;
    for key in ["", "\n", &"x".repeat(4_097)] {
        assert_eq!(
            fields(&client.load(load_request(key)).await.unwrap_err()),
            ["key"]
        );
        let delete = pb::DeleteRequest {
            key: key.into(),
            expected_version: None,
        };
        assert_eq!(fields(&client.delete(delete).await.unwrap_err()), ["key"]);
    }
    for expected_version in [0, -1, i64::MIN] {
        let delete = pb::DeleteRequest {
            key: "k".into(),
            expected_version: Some(expected_version),
        };
        assert_eq!(
            fields(&client.delete(delete).await.unwrap_err()),
            ["expected_version"]
        );
    }
    for expected_version in [-1, i64::MIN] {
        let swap = pb::CompareAndSwapRequest {
            group: Some(group("k")),
            expected_version,
            expiry: None,
        };
        let refused = client.compare_and_swap(swap).await.unwrap_err();
        assert_eq!(fields(&refused), ["expected_version"]);
    }
    let prefix = "x".repeat(4_097);
    let list = pb::ListKeysRequest {
        prefix: prefix.clone(),
        ..Default::default()
    };
    assert_eq!(
        fields(&client.list_keys(list).await.unwrap_err()),
        ["prefix"]
    );
    let size = pb::SizeRequest {
        prefix: prefix.clone(),
    };
    assert_eq!(fields(&client.size(size).await.unwrap_err()), ["prefix"]);
    let all = pb::LoadAllRequest { prefix };
    assert_eq!(fields(&client.load_all(all).await.unwrap_err()), ["prefix"]);
    let list = pb::ListKeysRequest {
        page_size: -1,
        ..Default::default()
    };
    assert_eq!(
        fields(&client.list_keys(list).await.unwrap_err()),
        ["page_size"]
    );
    let list = pb::ListKeysRequest {
        page_token: "nonsense".into(),
        ..Default::default()
    };
    assert_eq!(
        fields(&client.list_keys(list).await.unwrap_err()),
        ["page_token"]
    );

    let batch = |groups| pb::StoreAllRequest {
        groups,
        expiry: None,
    };
    let many = (0..6).map(|i| group(&i.to_string())).collect();
    assert_eq!(
        fields(&client.store_all(batch(many)).await.unwrap_err()),
        ["groups"]
    );
}

#[tokio::test]
async fn the_keys_of_a_batch_are_bounded_since_its_reply_repeats_them() {
    let service = Service::start(&[]);
    let mut client = service.client().await;
    let groups = (0..200).map(|i| group(&format!("{i:x<4000}"))).collect();
    let request = pb::StoreAllRequest {
        groups,
        expiry: None,
    };
    assert_eq!(
        fields(&client.store_all(request).await.unwrap_err()),
        ["groups"]
    );
}

#[tokio::test]
async fn a_bad_group_of_a_batch_fails_alone_and_a_duplicate_everywhere() {
    let (_service, mut client) = memory_service().await;
    let mut bad = group("bad");
    bad.alerts.get_mut("f").unwrap().status = 0;
    let groups = vec![group("a"), group("twice"), bad, group("twice"), group("b")];
    let request = pb::StoreAllRequest {
        groups,
        expiry: None,
    };
    let reply = client.store_all(request).await.unwrap().into_inner();
    assert_eq!(reply.backend(), pb::Backend::Memory);
    let keys: Vec<_> = reply
        .results
        .iter()
        .map(|result| result.key.as_str())
        .collect();
    assert_eq!(keys, ["a", "twice", "bad", "twice", "b"]);
    for (at, stored) in [(0, true), (1, false), (2, false), (3, false), (4, true)] {
        let result = &reply.results[at];
        assert_eq!(result.backend(), pb::Backend::Memory);
        assert_eq!(
            (result.version > 0, result.error.is_none()),
            (stored, stored),
            "{result:?}"
        );
        let load = client.load(load_request(&result.key)).await;
        assert_eq!(load.is_ok(), stored);
    }
    let error = |at: usize| reply.results[at].error.clone().unwrap();
    assert_eq!(error(1).reason(), pb::ErrorReason::DuplicateKey);
    assert_eq!(error(3).reason(), pb::ErrorReason::DuplicateKey);
    assert_eq!(error(2).reason(), pb::ErrorReason::InvalidField);
    assert_eq!(error(2).code, i32::from(Code::InvalidArgument));
    assert!(error(2).message.contains(r#"groups[2].alerts["f"].status"#));
}

#[tokio::test]
async fn an_absent_group_is_not_found_and_memory_is_no_authority() {
    let (_service, mut client) = memory_service().await;
    let status = client.load(load_request("nobody")).await.unwrap_err();
    let info = assert_status(&status, Code::NotFound, "GROUP_NOT_FOUND");
    assert_eq!(info.metadata["backend"], "memory");
    assert_eq!(info.metadata["authoritative"], "false");
    let delete = pb::DeleteRequest {
        key: "nobody".into(),
        expected_version: None,
    };
    let reply = client.delete(delete).await.unwrap().into_inner();
    assert_eq!((reply.deleted, reply.version), (false, 0));
    assert!(!reply.authoritative);
}

#[tokio::test]
async fn a_full_memory_names_its_limit_and_loses_nothing() {
    let service = Service::start(&["--mirror-max-bytes", "4KiB"]);
    let mut client = service.client().await;
    let mut stored = Vec::new();
    let status = loop {
        let key = format!("k/{}", stored.len());
        match client.store(store_request(group(&key))).await {
            Ok(_) => stored.push(key),
            Err(status) => break status,
        }
    };
    let info = assert_status(&status, Code::ResourceExhausted, "MEMORY_FULL");
    assert_eq!(info.metadata["limit"], "mirror-max-bytes");
    assert!(status.message().contains("--mirror-max-bytes"));
    assert!(status.get_details_retry_info().is_some());
    assert!(!stored.is_empty());
    for key in stored {
        client.load(load_request(&key)).await.unwrap();
    }
}

#[tokio::test]
async fn a_message_over_the_transport_size_names_its_limit() {
    let service = Service::start(&["--max-request-bytes", "64KiB"]);
    let mut client = service.client().await;
    let mut large = group("k");
    large.alerts.get_mut("f").unwrap().generator_url = "x".repeat(100_000);
    let status = client.store(store_request(large)).await.unwrap_err();
    let info = assert_status(&status, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    assert_eq!(info.metadata["limit"], "max-request-bytes");
    assert!(
        status.get_details_retry_info().is_none(),
        "waiting does not help"
    );
}

#[tokio::test]
async fn calls_beyond_the_limit_are_shed_at_once_and_health_is_not() {
    let double = Double::new(Behaviour::Hang);
    let calls = double.calls.clone();
    let server = InProcess::serve(Arc::new(double), &["--max-concurrent-calls", "2"]).await;
    let client = server.client().await;
    let hanging: Vec<_> = (0..2)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.load(load_request("k")).await })
        })
        .collect();
    wait_until("both calls hang", Duration::from_secs(5), || async {
        calls.begun.load(Ordering::SeqCst) == 2
    })
    .await;
    let bound = Bound::of(Duration::from_millis(500));
    let status = client.clone().load(load_request("k")).await.unwrap_err();
    bound.assert_holds("it is refused");
    let info = assert_status(&status, Code::ResourceExhausted, "OVERLOADED");
    assert_eq!(info.metadata["limit"], "max-concurrent-calls");
    assert!(status.get_details_retry_info().is_some());

    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", server.addr));
    let channel = endpoint.unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest::default();
    assert_eq!(health.check(request).await.unwrap().into_inner().status, 1);
    for call in hanging {
        call.abort();
    }
}

#[tokio::test]
async fn scans_beyond_the_limit_are_shed_and_other_calls_are_not() {
    let double = Double::new(Behaviour::Hang);
    let calls = double.calls.clone();
    let server = InProcess::serve(Arc::new(double), &["--max-scans", "1"]).await;
    let client = server.client().await;
    let hanging = {
        let mut client = client.clone();
        tokio::spawn(async move { client.size(pb::SizeRequest::default()).await })
    };
    wait_until("the scan hangs", Duration::from_secs(5), || async {
        calls.begun.load(Ordering::SeqCst) == 1
    })
    .await;
    for status in [
        client
            .clone()
            .size(pb::SizeRequest::default())
            .await
            .unwrap_err(),
        client
            .clone()
            .list_keys(pb::ListKeysRequest::default())
            .await
            .unwrap_err(),
        client
            .clone()
            .load_all(pb::LoadAllRequest::default())
            .await
            .unwrap_err(),
    ] {
        let info = assert_status(&status, Code::ResourceExhausted, "OVERLOADED");
        assert_eq!(info.metadata["limit"], "max-scans");
    }
    let mut load = client.clone();
    let load = tokio::spawn(async move { load.load(load_request("k")).await });
    wait_until("the Load hangs, too", Duration::from_secs(5), || async {
        calls.begun.load(Ordering::SeqCst) == 2
    })
    .await;
    load.abort();
    hanging.abort();
}

#[tokio::test]
async fn a_panic_is_internal_and_says_nothing_of_itself() {
    for behaviour in [Behaviour::Panic, Behaviour::PanicMidway] {
        let midway = matches!(behaviour, Behaviour::PanicMidway);
        let server = InProcess::serve(Arc::new(Double::new(behaviour)), &[]).await;
        let mut client = server.client().await;
        let mut statuses = Vec::new();
        let mut request = Request::new(pb::LoadAllRequest::default());
        request
            .metadata_mut()
            .insert("x-request-id", "my-request".parse().unwrap());
        if midway {
            let mut stream = client.load_all(request).await.unwrap().into_inner();
            assert_eq!(stream.message().await.unwrap().unwrap().groups.len(), 1);
            statuses.push(stream.message().await.unwrap_err());
        } else {
            statuses.push(client.load_all(request).await.unwrap_err());
            let mut request = Request::new(load_request("k"));
            request
                .metadata_mut()
                .insert("x-request-id", "my-request".parse().unwrap());
            statuses.push(client.load(request).await.unwrap_err());
        }
        for status in statuses {
            let info = assert_status(&status, Code::Internal, "INTERNAL");
            assert_eq!(info.metadata["request_id"], "my-request");
            assert!(
                status.message().contains("my-request"),
                "{}",
                status.message()
            );
            for secret in ["secret", "path", "src", "panic"] {
                assert!(!status.message().contains(secret), "{}", status.message());
            }
        }
        // The server lives on.
        client.load(load_request("k")).await.unwrap_err();
    }
}

#[tokio::test]
async fn failures_of_the_store_have_their_own_statuses() {
    for (error, code, reason) in [
        (StoreError::OutcomeUnknown, Code::Aborted, "OUTCOME_UNKNOWN"),
        (
            StoreError::ListingRestarted,
            Code::Aborted,
            "LISTING_RESTARTED",
        ),
        (
            StoreError::ForeignType,
            Code::FailedPrecondition,
            "FOREIGN_TYPE",
        ),
        // No caller has set one: it is the service's own.
        (
            StoreError::DeadlineExceeded,
            Code::DeadlineExceeded,
            "TIME_LIMIT_EXCEEDED",
        ),
        (StoreError::Bug("secret".into()), Code::Internal, "INTERNAL"),
        (
            StoreError::Unavailable("gone".into()),
            Code::Unavailable,
            "UNAVAILABLE",
        ),
    ] {
        let double = Double::new(Behaviour::Fail(error.clone()));
        let server = InProcess::serve(Arc::new(double), &[]).await;
        let mut client = server.client().await;
        let status = client.store(store_request(group("k"))).await.unwrap_err();
        let info = assert_status(&status, code, reason);
        assert_eq!(info.metadata["backend"], "redis");
        assert!(!status.message().contains("secret"));
        assert_eq!(
            status.get_details_retry_info().is_some(),
            code == Code::Unavailable,
            "{error:?}"
        );
        // Inside a batch it is the error of each group.
        let batch = pb::StoreAllRequest {
            groups: vec![group("k")],
            expiry: None,
        };
        let reply = client.store_all(batch).await.unwrap().into_inner();
        let in_batch = reply.results[0].error.clone().unwrap();
        assert_eq!(in_batch.code, i32::from(code));
        assert_eq!(
            in_batch.reason().as_str_name(),
            format!("ERROR_REASON_{reason}")
        );
    }
}

#[tokio::test]
async fn a_deadline_is_the_callers_only_if_a_caller_has_set_it() {
    let double = Double::new(Behaviour::Fail(StoreError::DeadlineExceeded));
    let server = InProcess::serve(Arc::new(double), &[]).await;
    let mut client = server.client().await;
    for (timeout, reason, text) in [
        (None, "TIME_LIMIT_EXCEEDED", "set a longer deadline"),
        (
            Some(Duration::from_secs(60)),
            "DEADLINE_EXCEEDED",
            "the deadline of the call has passed",
        ),
    ] {
        let mut load = tonic::Request::new(load_request("k"));
        let mut batch = tonic::Request::new(pb::StoreAllRequest {
            groups: vec![group("k")],
            expiry: None,
        });
        if let Some(timeout) = timeout {
            load.set_timeout(timeout);
            batch.set_timeout(timeout);
        }
        let status = client.load(load).await.unwrap_err();
        assert_status(&status, Code::DeadlineExceeded, reason);
        assert!(status.message().contains(text), "{status:?}");
        let reply = client.store_all(batch).await.unwrap().into_inner();
        let error = reply.results[0].error.clone().unwrap();
        assert_eq!(
            error.reason().as_str_name(),
            format!("ERROR_REASON_{reason}")
        );
        assert!(error.message.contains(text), "{error:?}");
    }
}

#[tokio::test]
async fn a_load_all_that_fails_midway_ends_with_its_status() {
    let behaviour = Behaviour::FailMidway(StoreError::Unavailable("gone".into()));
    let server = InProcess::serve(Arc::new(Double::new(behaviour)), &[]).await;
    let stream = server
        .client()
        .await
        .load_all(pb::LoadAllRequest::default())
        .await;
    let mut stream = stream.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().groups.len(), 1);
    let status = stream.message().await.unwrap_err();
    assert_status(&status, Code::Unavailable, "UNAVAILABLE");
}

#[tokio::test]
async fn replies_carry_the_request_id_and_the_instance() {
    let (_service, mut client) = memory_service().await;
    let mut request = Request::new(pb::SizeRequest::default());
    request
        .metadata_mut()
        .insert("x-request-id", "id-of-the-caller".parse().unwrap());
    let reply = client.size(request).await.unwrap();
    assert_eq!(
        reply.metadata().get("x-request-id").unwrap(),
        "id-of-the-caller"
    );
    let instance = reply
        .metadata()
        .get("x-groupstate-instance")
        .unwrap()
        .clone();

    let reply = client.size(pb::SizeRequest::default()).await.unwrap();
    assert!(!reply.metadata().get("x-request-id").unwrap().is_empty());
    assert_eq!(
        reply.metadata().get("x-groupstate-instance"),
        Some(&instance)
    );

    let status = client.load(load_request("nobody")).await.unwrap_err();
    let info = status.get_details_error_info().unwrap();
    let id = status
        .metadata()
        .get("x-request-id")
        .unwrap()
        .to_str()
        .unwrap();
    assert_eq!(info.metadata["request_id"], id);
}
