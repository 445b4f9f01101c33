//! Listings while Redis restarts, and what no listing shows.

use futures::StreamExt;
use groupstate::store::{Deadline, StoreError};
use redis::AsyncCommands;

use crate::{
    common::group,
    redis_store,
    suite::{HOUR, Store, all_keys, put},
};

async fn fill(store: &Store, count: usize) {
    let groups: Vec<_> = (0..count).map(|i| group(&format!("k/{i}"), &[])).collect();
    for chunk in groups.chunks(1_000) {
        for reply in store.store_all(chunk, HOUR, Deadline::NONE).await {
            reply.unwrap();
        }
    }
}

/// Waits until the store answers again.
async fn reconnected(store: &Store) {
    crate::common::wait_until(
        "Redis is back",
        std::time::Duration::from_secs(5),
        || async { store.size("", Deadline::NONE).await.is_ok() },
    )
    .await;
}

#[tokio::test]
async fn a_restart_between_two_pages_restarts_the_listing() {
    let (store, mut server) = redis_store().await;
    fill(&store, 10_000).await;
    let page = store
        .list_keys("", 100, None, Deadline::NONE)
        .await
        .unwrap();
    let token = page.value.next.unwrap();

    server.restart().await;
    reconnected(&store).await;
    fill(&store, 10_000).await;
    let next = store.list_keys("", 100, Some(&token), Deadline::NONE).await;
    assert_eq!(next.unwrap_err().error, StoreError::ListingRestarted);
    let mut keys = all_keys(&store, "", 1_000).await;
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 10_000);
}

#[tokio::test]
async fn a_restart_in_the_middle_of_a_load_all_is_never_taken_for_its_end() {
    let (store, mut server) = redis_store().await;
    fill(&store, 10_000).await;
    let mut all = store.load_all("", Deadline::NONE).await.unwrap().value;
    all.next().await.unwrap().unwrap();

    server.restart().await;
    reconnected(&store).await;
    fill(&store, 10_000).await;
    let mut error = None;
    while let Some(batch) = all.next().await {
        error = batch.err();
    }
    assert_eq!(error.unwrap().error, StoreError::ListingRestarted);
}

/// The keys are all found by the first `SCAN`, and read in several batches: a
/// Redis that comes back empty in between holds none of the rest.
#[tokio::test]
async fn a_restart_after_the_last_key_was_found_is_never_taken_for_its_end() {
    let (store, mut server) = redis_store().await;
    let groups: Vec<_> = (0..500)
        .map(|i| {
            let mut group = group(&format!("k/{i}"), &["a"]);
            group.alerts.get_mut("a").unwrap().generator_url = "x".repeat(10_000);
            group
        })
        .collect();
    for reply in store.store_all(&groups, HOUR, Deadline::NONE).await {
        reply.unwrap();
    }
    let mut all = store.load_all("", Deadline::NONE).await.unwrap().value;
    let first = all.next().await.unwrap().unwrap();
    assert!((1..500).contains(&first.groups.len()));

    server.restart().await;
    reconnected(&store).await;
    let mut error = None;
    while let Some(batch) = all.next().await {
        error = batch.err();
    }
    assert_eq!(error.unwrap().error, StoreError::ListingRestarted);
}

#[tokio::test]
async fn keys_of_the_service_itself_and_foreign_keys_are_not_listed() {
    let (store, server) = redis_store().await;
    let mut connection = server.connect().await;
    put(&store, &group("k", &[])).await;
    for foreign in ["group:\u{1}probe:x", "other:k", "groups", "group:"] {
        let () = connection.set(foreign, "x").await.unwrap();
    }
    let () = connection.set(b"group:\xff", "x").await.unwrap();
    let () = connection.zadd("group:index", "member", 1).await.unwrap();
    assert_eq!(all_keys(&store, "", 10).await, ["k"]);
    assert_eq!(store.size("", Deadline::NONE).await.unwrap().value, 1);
}

#[tokio::test]
async fn a_page_of_the_longest_keys_stays_about_a_mebibyte() {
    let (store, _server) = redis_store().await;
    let groups: Vec<_> = (0..2_000)
        .map(|i| group(&format!("{i:x<4096}"), &[]))
        .collect();
    for chunk in groups.chunks(100) {
        for reply in store.store_all(chunk, HOUR, Deadline::NONE).await {
            reply.unwrap();
        }
    }
    let mut token = None;
    let mut listed = 0;
    loop {
        let page = store
            .list_keys("", 10_000, token.as_deref(), Deadline::NONE)
            .await
            .unwrap()
            .value;
        let bytes: usize = page.keys.iter().map(|key| key.as_str().len()).sum();
        assert!(bytes < (1 << 20) + (1 << 18), "{bytes} bytes");
        listed += page.keys.len();
        token = page.next;
        if token.is_none() {
            break;
        }
    }
    assert!(listed >= 2_000);
}
