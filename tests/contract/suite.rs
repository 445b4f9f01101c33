//! What every store promises.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::StreamExt;
use groupstate::{
    domain::{
        group::{AlertGroup, GroupKey, Time},
        version::Version,
    },
    grpc::validation::MIN_TTL,
    store::{Deadline, ErrorKind, Expiry, GroupStore, Swap, Written},
};

use crate::common::group;

pub type Store = Arc<dyn GroupStore>;

pub const HOUR: Expiry = Expiry::After(Duration::from_secs(3_600));

pub fn key(key: &str) -> GroupKey {
    GroupKey::new(key).unwrap()
}

pub async fn put(store: &Store, group: &AlertGroup) -> Written {
    store
        .store(group, HOUR, Deadline::NONE)
        .await
        .unwrap()
        .value
}

pub async fn get(store: &Store, name: &str) -> Option<AlertGroup> {
    let stored = store.load(&key(name), false, Deadline::NONE).await.unwrap();
    stored.value.map(|stored| stored.group)
}

pub async fn swap(store: &Store, group: &AlertGroup, expected: Option<Version>) -> Swap {
    store
        .compare_and_swap(group, expected, HOUR, Deadline::NONE)
        .await
        .unwrap()
        .value
}

pub async fn all_keys(store: &Store, prefix: &str, page_size: usize) -> Vec<String> {
    let mut keys = Vec::new();
    let mut token = None;
    loop {
        let page = store
            .list_keys(prefix, page_size, token.as_deref(), Deadline::NONE)
            .await
            .unwrap()
            .value;
        keys.extend(page.keys.iter().map(ToString::to_string));
        token = page.next;
        if token.is_none() {
            return keys;
        }
    }
}

fn swapped(swap: Swap) -> Version {
    match swap {
        Swap::Swapped(written) => written.version,
        Swap::Lost { current } => panic!("lost the race against {current:?}"),
    }
}

/// A group as the store gives it back: with a version, and some write id.
fn as_stored(mut group: AlertGroup, version: Version, read: &AlertGroup) -> AlertGroup {
    group.metadata.version = Some(version);
    group.metadata.write_id.clone_from(&read.metadata.write_id);
    group
}

pub async fn a_stored_group_is_loaded_as_it_was(store: Store) {
    let written = group("alertname=HighCPU", &["a", "b"]);
    let version = put(&store, &written).await.version;
    let read = get(&store, "alertname=HighCPU").await.unwrap();
    assert_eq!(read, as_stored(written, version, &read));
    assert!(!read.metadata.write_id.is_empty());
}

pub async fn the_last_write_wins_and_versions_rise(store: Store) {
    let mut last = None;
    for fingerprint in ["a", "b", "c"] {
        let version = put(&store, &group("k", &[fingerprint])).await.version;
        assert!(Some(version) > last);
        last = Some(version);
    }
    let read = get(&store, "k").await.unwrap();
    assert_eq!(read.alerts.keys().collect::<Vec<_>>(), ["c"]);
    assert_eq!(read.metadata.version, last);
}

pub async fn an_absent_group_is_none(store: Store) {
    assert_eq!(get(&store, "nobody").await, None);
}

pub async fn create_only_does_not_overwrite(store: Store) {
    let version = swapped(swap(&store, &group("k", &["first"]), None).await);
    let second = swap(&store, &group("k", &["second"]), None).await;
    let Swap::Lost {
        current: Some(current),
    } = second
    else {
        panic!("overwritten: {second:?}");
    };
    assert!(current.alerts.contains_key("first"));
    assert_eq!(current.metadata.version, Some(version));
    assert_eq!(get(&store, "k").await, Some(*current));
}

pub async fn a_swap_replaces_only_the_expected_version(store: Store) {
    let first = put(&store, &group("k", &["a"])).await.version;
    let second = swapped(swap(&store, &group("k", &["b"]), Some(first)).await);
    assert!(second > first);
    let read = get(&store, "k").await.unwrap();
    assert_eq!(read.metadata.version, Some(second));
    assert!(read.alerts.contains_key("b"));
}

pub async fn a_lost_race_gives_the_current_group(store: Store) {
    let first = put(&store, &group("k", &["a"])).await.version;
    let second = put(&store, &group("k", &["b"])).await.version;
    let lost = swap(&store, &group("k", &["c"]), Some(first)).await;
    let Swap::Lost {
        current: Some(current),
    } = lost
    else {
        panic!("swapped: {lost:?}");
    };
    assert_eq!(current.metadata.version, Some(second));
    assert_eq!(get(&store, "k").await, Some(*current));
}

pub async fn a_swap_of_an_absent_group_is_lost(store: Store) {
    let lost = swap(&store, &group("k", &["a"]), Version::new(16)).await;
    assert_eq!(lost, Swap::Lost { current: None });
    assert_eq!(get(&store, "k").await, None);
}

pub async fn delete_is_idempotent(store: Store) {
    let version = put(&store, &group("k", &["a"])).await.version;
    let delete = async || {
        let deleted = store.delete(&key("k"), None, Deadline::NONE).await;
        let deletion = deleted.unwrap().value;
        (deletion.deleted, deletion.version)
    };
    assert_eq!(delete().await, (true, Some(version)));
    assert_eq!(delete().await, (false, None));
    assert_eq!(get(&store, "k").await, None);
}

pub async fn delete_of_another_version_deletes_nothing(store: Store) {
    let first = put(&store, &group("k", &["a"])).await.version;
    let second = put(&store, &group("k", &["b"])).await.version;
    let delete = async |expected| {
        let deleted = store
            .delete(&key("k"), Some(expected), Deadline::NONE)
            .await;
        let deletion = deleted.unwrap().value;
        (deletion.deleted, deletion.version)
    };
    assert_eq!(delete(first).await, (false, Some(second)));
    assert!(get(&store, "k").await.is_some());
    assert_eq!(delete(second).await, (true, Some(second)));
    assert_eq!(delete(second).await, (false, None));
}

pub async fn a_version_does_not_come_back_after_a_delete(store: Store) {
    let before = put(&store, &group("k", &["a"])).await.version;
    store.delete(&key("k"), None, Deadline::NONE).await.unwrap();
    let after = swapped(swap(&store, &group("k", &["b"]), None).await);
    assert!(after > before);
    let stale = swap(&store, &group("k", &["stale"]), Some(before)).await;
    assert!(
        matches!(stale, Swap::Lost { current: Some(_) }),
        "{stale:?}"
    );
}

pub async fn a_version_does_not_come_back_after_an_expiry(store: Store) {
    let short = Expiry::After(MIN_TTL);
    let written = store
        .store(&group("k", &["a"]), short, Deadline::NONE)
        .await;
    let before = written.unwrap().value.version;
    tokio::time::sleep(MIN_TTL + Duration::from_millis(50)).await;
    let after = swapped(swap(&store, &group("k", &["b"]), None).await);
    assert!(after > before);
    let stale = swap(&store, &group("k", &["stale"]), Some(before)).await;
    assert!(
        matches!(stale, Swap::Lost { current: Some(_) }),
        "{stale:?}"
    );
}

pub async fn a_group_expires(store: Store) {
    let short = Expiry::After(MIN_TTL);
    let begin = Time::now().millis();
    let written = store
        .store(&group("k", &["a"]), short, Deadline::NONE)
        .await;
    let end = Time::now().millis();
    let expires_at = written.unwrap().value.expires.unwrap().at;
    assert!((begin + 1_000..=end + 1_010).contains(&expires_at.millis()));
    let stored = store.load(&key("k"), true, Deadline::NONE).await.unwrap();
    let told = stored.value.unwrap().expires.unwrap().at;
    assert!(told.millis().abs_diff(expires_at.millis()) <= 2);

    tokio::time::sleep(MIN_TTL + Duration::from_millis(50)).await;
    assert_eq!(get(&store, "k").await, None);
    assert_eq!(all_keys(&store, "", 10).await, Vec::<String>::new());
    assert_eq!(store.size("", Deadline::NONE).await.unwrap().value, 0);
    // Not kept either by a write that keeps it.
    let lost = swap(&store, &group("k", &["a"]), Version::new(16)).await;
    assert_eq!(lost, Swap::Lost { current: None });
}

pub async fn keep_ttl_keeps_what_is_left(store: Store) {
    let first = put(&store, &group("k", &["a"])).await;
    let keep = Expiry::Keep {
        otherwise: Duration::from_secs(1),
    };
    let second = store.store(&group("k", &["b"]), keep, Deadline::NONE).await;
    let second = second.unwrap().value;
    let swap = store
        .compare_and_swap(
            &group("k", &["c"]),
            Some(second.version),
            keep,
            Deadline::NONE,
        )
        .await;
    let Swap::Swapped(third) = swap.unwrap().value else {
        panic!("lost");
    };
    for written in [second, third] {
        let difference = written.expires.unwrap().at.millis() - first.expires.unwrap().at.millis();
        assert!(difference.abs() <= 5, "{difference} ms");
    }
}

pub async fn keep_ttl_of_a_new_group_is_the_default(store: Store) {
    let keep = Expiry::Keep {
        otherwise: Duration::from_secs(100),
    };
    let begin = Time::now().millis();
    let written = store.store(&group("k", &["a"]), keep, Deadline::NONE).await;
    let end = Time::now().millis();
    let expires_at = written.unwrap().value.expires.unwrap().at.millis();
    assert!((begin + 100_000..=end + 100_010).contains(&expires_at));
}

pub async fn a_group_called_index_is_a_group(store: Store) {
    put(&store, &group("index", &["a"])).await;
    put(&store, &group("other", &["b"])).await;
    assert!(get(&store, "index").await.unwrap().alerts.contains_key("a"));
    let keys: BTreeSet<_> = all_keys(&store, "", 10).await.into_iter().collect();
    assert_eq!(keys, BTreeSet::from(["index".into(), "other".into()]));
}

pub async fn strange_keys_are_ordinary_keys(store: Store) {
    let longest = "x".repeat(4_096);
    let strange = [
        "*",
        "a*b",
        "a?b",
        "[ab]",
        "a\\b",
        "{}",
        "{hash:1}",
        "a{b}c",
        " ",
        "a b",
        "a\tb\nc\r\n",
        "ключ=значение",
        "🔥",
        "a\u{0}b",
        "\"quoted\"",
        "$1",
        "a:b:c",
        &longest,
    ];
    for name in strange {
        put(&store, &group(name, &["a"])).await;
    }
    for name in strange {
        let read = get(&store, name).await.unwrap();
        assert_eq!(read.key.as_str(), name);
        assert!(all_keys(&store, name, 10).await.contains(&name.to_owned()));
    }
    let listed: BTreeSet<_> = all_keys(&store, "", 3).await.into_iter().collect();
    assert_eq!(listed, strange.iter().map(ToString::to_string).collect());
    assert_eq!(
        store.size("", Deadline::NONE).await.unwrap().value,
        strange.len() as u64
    );
    for name in strange {
        let deleted = store
            .delete(&key(name), None, Deadline::NONE)
            .await
            .unwrap();
        assert!(deleted.value.deleted, "{name:?}");
    }
}

/// However many commands a Load takes: it never sees half of what happens meanwhile.
pub async fn a_load_that_meets_a_create_or_a_delete_sees_the_group_or_none(store: Store) {
    const ROUNDS: usize = 300;
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for _ in 0..ROUNDS {
                put(&store, &group("k", &["a"])).await;
                let deleted = store.delete(&key("k"), None, Deadline::NONE).await;
                deleted.unwrap();
            }
        }
    });
    while !writer.is_finished() {
        for with_expiry in [false, true] {
            let found = store.load(&key("k"), with_expiry, Deadline::NONE).await;
            if let Some(found) = found.unwrap().value {
                assert!(found.group.alerts.contains_key("a"));
            }
        }
    }
    writer.await.unwrap();
}

pub async fn a_prefix_is_taken_as_it_is(store: Store) {
    for name in ["a*1", "a*2", "ab1", "a?1", "a[1]", "a1", "b"] {
        put(&store, &group(name, &[])).await;
    }
    for (prefix, count) in [("a*", 2), ("a", 6), ("a[", 1), ("a?", 1), ("", 7), ("c", 0)] {
        assert_eq!(all_keys(&store, prefix, 10).await.len(), count, "{prefix}");
        let size = store.size(prefix, Deadline::NONE).await.unwrap().value;
        assert_eq!(size, count as u64, "{prefix}");
    }
}

pub async fn ten_thousand_keys_are_paged_while_others_are_written(store: Store) {
    let steady: Vec<_> = (0..10_000)
        .map(|i| group(&format!("steady/{i}"), &[]))
        .collect();
    for chunk in steady.chunks(1_000) {
        for reply in store.store_all(chunk, HOUR, Deadline::NONE).await {
            reply.unwrap();
        }
    }
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for i in 0.. {
                put(&store, &group(&format!("other/{i}"), &[])).await;
                tokio::time::sleep(Duration::from_millis(1)).await;
                if i % 2 == 0 {
                    let other = key(&format!("other/{i}"));
                    store.delete(&other, None, Deadline::NONE).await.unwrap();
                }
            }
        }
    });
    for page_size in [100, 1_000, 10_000] {
        let listed: BTreeSet<_> = all_keys(&store, "", page_size).await.into_iter().collect();
        let missing = steady
            .iter()
            .filter(|group| !listed.contains(group.key.as_str()));
        assert_eq!(missing.count(), 0, "pages of {page_size}");
    }
    writer.abort();
    assert_eq!(
        store.size("steady/", Deadline::NONE).await.unwrap().value,
        10_000
    );
}

pub async fn a_foreign_page_token_is_refused(store: Store) {
    for i in 0..5_000 {
        put(&store, &group(&format!("k/{i}"), &[])).await;
    }
    let page = store
        .list_keys("k/", 1, None, Deadline::NONE)
        .await
        .unwrap();
    let token = page.value.next.unwrap();
    for (prefix, token) in [("k/", "?"), ("k/", "AAAA"), ("k", token.as_str())] {
        let refused = store
            .list_keys(prefix, 1, Some(token), Deadline::NONE)
            .await;
        let error = refused.unwrap_err().error;
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
    }
}

pub async fn sixty_four_tasks_increment_one_group_and_lose_nothing(store: Store) {
    const TASKS: i32 = 64;
    const INCREMENTS: i32 = 5;
    put(&store, &group("counter", &[])).await;
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut conflicts = 0;
                for _ in 0..INCREMENTS {
                    let mut current = get(&store, "counter").await.unwrap();
                    loop {
                        // Memory answers without a pause in which the tasks
                        // could meet.
                        tokio::task::yield_now().await;
                        let version = current.metadata.version;
                        current.metadata.firing_count += 1;
                        match swap(&store, &current, version).await {
                            Swap::Swapped(_) => break,
                            Swap::Lost { current: found } => current = *found.unwrap(),
                        }
                        conflicts += 1;
                    }
                }
                conflicts
            })
        })
        .collect();
    let mut conflicts = 0;
    for task in tasks {
        conflicts += task.await.unwrap();
    }
    let counted = get(&store, "counter").await.unwrap().metadata.firing_count;
    assert_eq!(counted, TASKS * INCREMENTS);
    assert!(conflicts > 0, "the tasks did not meet");
}

pub async fn store_all_answers_each_group_in_order(store: Store) {
    let mut groups: Vec<_> = (0..250).map(|i| group(&format!("k/{i}"), &["a"])).collect();
    let mut large = group("large", &["a"]);
    large.alerts.get_mut("a").unwrap().generator_url = "x".repeat(2 << 20);
    groups.insert(120, large);
    let replies = store.store_all(&groups, HOUR, Deadline::NONE).await;
    assert_eq!(replies.len(), groups.len());
    for (group, reply) in groups.iter().zip(replies) {
        if group.key.as_str() == "large" {
            let error = reply.unwrap_err().error;
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
        } else {
            let read = get(&store, group.key.as_str()).await.unwrap();
            assert_eq!(read.metadata.version, Some(reply.unwrap().value.version));
        }
    }
    assert_eq!(get(&store, "large").await, None);
    assert!(store.store_all(&[], HOUR, Deadline::NONE).await.is_empty());
}

pub async fn a_group_that_is_too_large_is_refused(store: Store) {
    let mut large = group("k", &["a"]);
    large.alerts.get_mut("a").unwrap().generator_url = "x".repeat(1 << 20);
    let stored = store.store(&large, HOUR, Deadline::NONE).await;
    assert_eq!(stored.unwrap_err().error.kind(), ErrorKind::Invalid);
    let swapped = store
        .compare_and_swap(&large, None, HOUR, Deadline::NONE)
        .await;
    assert_eq!(swapped.unwrap_err().error.kind(), ErrorKind::Invalid);
    large.alerts.get_mut("a").unwrap().generator_url = "x".repeat((1 << 20) - 2_000);
    put(&store, &large).await;
}

pub async fn load_all_gives_every_group_once(store: Store) {
    let groups: Vec<_> = (0..3_000)
        .map(|i| group(&format!("k/{i}"), &["a", "b"]))
        .collect();
    for chunk in groups.chunks(1_000) {
        for reply in store.store_all(chunk, HOUR, Deadline::NONE).await {
            reply.unwrap();
        }
    }
    put(&store, &group("other", &[])).await;
    let mut all = store.load_all("k/", Deadline::NONE).await.unwrap().value;
    let (mut read, mut complete) = (Vec::new(), None);
    while let Some(batch) = all.next().await {
        let batch = batch.unwrap();
        assert_eq!(batch.problems, []);
        read.extend(batch.groups);
        assert_eq!(complete, None, "nothing comes after the end");
        complete = batch.complete;
    }
    assert_eq!(complete, Some(true));
    read.sort_by(|a, b| a.key.cmp(&b.key));
    let keys: Vec<_> = read.iter().map(|group| group.key.clone()).collect();
    let mut expected: Vec<_> = groups.iter().map(|group| group.key.clone()).collect();
    expected.sort();
    assert_eq!(keys, expected);
    assert!(read.iter().all(|group| group.alerts.len() == 2));
}

pub async fn load_all_of_nothing_is_complete(store: Store) {
    let mut all = store.load_all("", Deadline::NONE).await.unwrap().value;
    let mut complete = None;
    while let Some(batch) = all.next().await {
        let batch = batch.unwrap();
        assert_eq!(batch.groups, []);
        complete = batch.complete;
    }
    assert_eq!(complete, Some(true));
}
