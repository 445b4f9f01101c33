//! Every status that needs Redis.

use std::time::Duration;

use groupstate::grpc::proto as pb;
use redis::AsyncCommands;
use tonic::{Code, Status};

use crate::{
    assert_status,
    common::{
        redis_server::{self, RedisServer},
        service::{Client, Service},
    },
    group, load_request, store_request,
};

async fn redis_service() -> (RedisServer, Service, Client) {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let client = service.client().await;
    (redis, service, client)
}

fn swap_request(key: &str, expected_version: i64) -> pb::CompareAndSwapRequest {
    pb::CompareAndSwapRequest {
        group: Some(group(key)),
        expected_version,
        expiry: None,
    }
}

fn delete_request(key: &str, expected_version: Option<i64>) -> pb::DeleteRequest {
    pb::DeleteRequest {
        key: key.into(),
        expected_version,
    }
}

/// The status of every call on one group.
async fn statuses(
    client: &mut Client,
    key: &str,
    version: i64,
) -> [(&'static str, Option<Status>); 5] {
    [
        ("Load", client.load(load_request(key)).await.err()),
        (
            "CompareAndSwap",
            client
                .compare_and_swap(swap_request(key, version))
                .await
                .err(),
        ),
        (
            "Delete by version",
            client
                .delete(delete_request(key, Some(version)))
                .await
                .err(),
        ),
        ("Store", client.store(store_request(group(key))).await.err()),
        (
            "Delete",
            client.delete(delete_request(key, None)).await.err(),
        ),
    ]
}

#[tokio::test]
async fn an_absent_group_is_not_found_by_authority() {
    let (_redis, _service, mut client) = redis_service().await;
    let status = client.load(load_request("nobody")).await.unwrap_err();
    let info = assert_status(&status, Code::NotFound, "GROUP_NOT_FOUND");
    assert_eq!(info.metadata["backend"], "redis");
    assert!(!info.metadata.contains_key("authoritative"));
}

#[tokio::test]
async fn an_unreadable_document_is_data_loss_that_says_where() {
    let (redis, service, mut client) = redis_service().await;
    let mut connection = redis.connect().await;
    let () = connection
        .set("group:k", "{\"key\":\"k\",\"alerts\":{")
        .await
        .unwrap();
    for (call, status) in statuses(&mut client, "k", 7).await {
        match call {
            "Store" | "Delete" => assert!(status.is_none(), "{call}: {status:?}"),
            _ => {
                let status = status.unwrap();
                assert_status(&status, Code::DataLoss, "UNREADABLE_DOCUMENT");
                assert!(
                    status.message().contains("line 1 column 21"),
                    "{}",
                    status.message()
                );
            }
        }
    }
    let line = service.wait_for_log("replaced an unreadable document", Duration::from_secs(1));
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (event["key"].as_str(), event["bytes"].as_u64()),
        (Some("k"), Some(21))
    );
    assert_eq!(event["sha1"].as_str().unwrap().len(), 40);
}

#[tokio::test]
async fn another_type_and_a_version_beyond_two_to_the_53_are_failed_preconditions() {
    let (redis, _service, mut client) = redis_service().await;
    let mut connection = redis.connect().await;
    let () = connection.zadd("group:k", "member", 1).await.unwrap();
    for (_, status) in statuses(&mut client, "k", 7).await {
        assert_status(&status.unwrap(), Code::FailedPrecondition, "FOREIGN_TYPE");
    }

    let version = 9_007_199_254_740_993i64;
    let document =
        format!(r#"{{"key":"old","metadata":{{"state":"firing"}},"version":{version}}}"#);
    let () = connection.set("group:old", document).await.unwrap();
    let read = client.load(load_request("old")).await.unwrap().into_inner();
    assert_eq!(read.group.unwrap().metadata.unwrap().version, version);
    for status in [
        client.store(store_request(group("old"))).await.unwrap_err(),
        client
            .compare_and_swap(swap_request("old", version))
            .await
            .unwrap_err(),
    ] {
        assert_status(&status, Code::FailedPrecondition, "VERSION_OUT_OF_RANGE");
    }
    let deleted = client
        .delete(delete_request("old", Some(version)))
        .await
        .unwrap();
    assert!(deleted.into_inner().deleted);
}

#[tokio::test]
async fn a_lost_race_is_an_answer_with_the_current_group() {
    let (_redis, _service, mut client) = redis_service().await;
    let first = client
        .store(store_request(group("k")))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(first.backend(), pb::Backend::Redis);
    let second = client
        .store(store_request(group("k")))
        .await
        .unwrap()
        .into_inner();
    for stale in [0, first.version] {
        let reply = client
            .compare_and_swap(swap_request("k", stale))
            .await
            .unwrap();
        let reply = reply.into_inner();
        assert!(!reply.swapped);
        assert_eq!(reply.version, second.version);
        assert_eq!(
            reply.current.unwrap().metadata.unwrap().version,
            second.version
        );
    }
    let reply = client
        .compare_and_swap(swap_request("k", second.version))
        .await
        .unwrap();
    let reply = reply.into_inner();
    assert!(reply.swapped && reply.version > second.version && reply.current.is_none());
    assert!(reply.expire_time.is_some());
}

#[tokio::test]
async fn a_listing_whose_redis_was_restarted_is_aborted() {
    let (mut redis, _service, mut client) = redis_service().await;
    for chunk in 0..3 {
        let groups = (0..1_000).map(|i| group(&format!("{chunk}/{i}"))).collect();
        let request = pb::StoreAllRequest {
            groups,
            expiry: None,
        };
        client.store_all(request).await.unwrap();
    }
    let list = |page_token: &str| pb::ListKeysRequest {
        page_size: 10,
        page_token: page_token.into(),
        ..Default::default()
    };
    let page = client.list_keys(list("")).await.unwrap().into_inner();
    assert!(!page.next_page_token.is_empty());
    redis.restart().await;
    crate::common::wait_until("Redis is back", Duration::from_secs(5), || async {
        client
            .clone()
            .size(pb::SizeRequest::default())
            .await
            .is_ok()
    })
    .await;
    let status = client
        .list_keys(list(&page.next_page_token))
        .await
        .unwrap_err();
    assert_status(&status, Code::Aborted, "LISTING_RESTARTED");
}

#[tokio::test]
async fn the_password_comes_from_a_file() {
    let redis = RedisServer::start().await;
    let [user, password] = redis_server::login();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, format!("{password}\n")).unwrap();
    let service = Service::start(&[
        "--redis-url",
        &format!("redis://{user}:wrong@{}", redis.addr()),
        "--redis-password-file",
        file.to_str().unwrap(),
    ]);
    service
        .client()
        .await
        .store(store_request(group("k")))
        .await
        .unwrap();
}
