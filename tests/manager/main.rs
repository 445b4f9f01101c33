//! The replica side, over real services and Redis.
//!
//! | file | what it shows |
//! |---|---|
//! | here | what a manager does for its caller |
//! | `leaving.rs` | alerts that leave a group, and what does not fit |
//! | `copies.rs` | the copies of groups: what is forgotten, listed and found |
//! | `races.rs` | changes that meet, and stores that fail in between |
//! | `outages.rs` | Redis or an instance goes, and no alert with it |
//! | `secured.rs` | TLS and tokens |
//! | `unanswered.rs` | calls of which the answer does not come |

#[path = "../common/mod.rs"]
mod common;

mod copies;
mod leaving;
mod outages;
mod races;
mod secured;
mod unanswered;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::{redis_server::RedisServer, service::Service, stalls::Bound};
use groupstate::{
    domain::group::{Alert, AlertGroup, AlertStatus, GroupKey, GroupState, Time},
    manager::{
        AlertGroupManager, ManagerError, ManagerSettings, Outcome, Source, StateChange,
        affinity::Instances, known::Filter, remote::RemoteSettings,
    },
    store::{Backend, ErrorKind},
};
use redis::AsyncCommands;

pub fn key(name: &str) -> GroupKey {
    GroupKey::new(name).unwrap()
}

pub fn firing(fingerprint: &str) -> Alert {
    Alert {
        timestamp: Some(Time::now()),
        ..common::alert(fingerprint)
    }
}

pub fn resolved(fingerprint: &str) -> Alert {
    Alert {
        status: AlertStatus::Resolved,
        ends_at: Some(Time::now()),
        ..firing(fingerprint)
    }
}

/// A replica of its own, with instances of the service.
pub async fn replica_with(services: &[&Service], settings: ManagerSettings) -> AlertGroupManager {
    let targets = services.iter().map(|service| service.addr().to_owned());
    let instances = Instances::resolve(targets, RemoteSettings::default()).await;
    AlertGroupManager::new(Arc::new(instances.unwrap()), settings)
}

pub async fn replica(services: &[&Service]) -> AlertGroupManager {
    replica_with(services, ManagerSettings::default()).await
}

pub async fn add(manager: &AlertGroupManager, name: &str, reports: Vec<Alert>) {
    let added = manager
        .add_alerts(&key(name), vec!["alertname".into()], reports)
        .await;
    added.unwrap();
}

/// The fingerprints in a group; none if it is absent.
pub async fn alerts(manager: &AlertGroupManager, name: &str) -> Vec<String> {
    let found = manager.get(&key(name)).await.unwrap();
    let found = found.map(|found| found.group.alerts.into_keys().collect());
    found.unwrap_or_default()
}

/// A service on a Redis of its own.
async fn service() -> (RedisServer, Service) {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    (redis, service)
}

#[tokio::test]
async fn a_group_lives_from_its_first_alert_to_its_last() {
    let (_redis, service) = service().await;
    let manager = replica(&[&service]).await;

    add(&manager, "k", vec![firing("a"), firing("b")]).await;
    let found = manager.get(&key("k")).await.unwrap().unwrap();
    assert_eq!(found.source, Source::Store(Backend::Redis));
    assert_eq!(found.group.metadata.state, GroupState::Firing);
    assert_eq!(found.group.metadata.group_by, ["alertname"]);

    add(&manager, "k", vec![resolved("a")]).await;
    let found = manager.get(&key("k")).await.unwrap().unwrap();
    assert_eq!(found.group.metadata.state, GroupState::Mixed);
    assert_eq!(found.group.metadata.firing_count, 1);

    let removed = manager.remove_alert(&key("k"), "a").await.unwrap();
    assert_eq!(removed.outcome, Outcome::Stored);
    let removed = manager.remove_alert(&key("k"), "b").await.unwrap();
    assert_eq!((removed.outcome, removed.group), (Outcome::Deleted, None));
    assert_eq!(manager.get(&key("k")).await.unwrap(), None);
    assert_eq!(manager.list(&Filter::default()), []);
    let again = manager.remove_alert(&key("k"), "b").await.unwrap();
    assert_eq!(again.outcome, Outcome::Unchanged);
}

#[tokio::test]
async fn what_is_known_already_is_not_written_again() {
    let (_redis, service) = service().await;
    let manager = replica(&[&service]).await;
    let report = firing("a");
    add(&manager, "k", vec![report.clone()]).await;
    let version = |found: Option<groupstate::manager::Found>| found.unwrap().group.metadata.version;
    let before = version(manager.get(&key("k")).await.unwrap());
    let again = manager
        .add_alerts(&key("k"), Vec::new(), vec![report])
        .await;
    assert_eq!(again.unwrap().outcome, Outcome::Unchanged);
    assert_eq!(version(manager.get(&key("k")).await.unwrap()), before);
    let stats = manager.stats();
    assert_eq!((stats.changes, stats.unchanged, stats.attempts), (2, 1, 2));
}

#[tokio::test]
async fn a_silence_stays_until_it_is_lifted() {
    let (_redis, service) = service().await;
    let (one, other) = (replica(&[&service]).await, replica(&[&service]).await);
    add(&one, "k", vec![firing("a")]).await;
    let silenced = one.update_state(&key("k"), StateChange::Silence).await;
    assert_eq!(silenced.unwrap().outcome, Outcome::Stored);
    add(&other, "k", vec![firing("b")]).await;
    let state = |found: Option<groupstate::manager::Found>| found.unwrap().group.metadata.state;
    assert_eq!(
        state(one.get(&key("k")).await.unwrap()),
        GroupState::Silenced
    );
    let lifted = other
        .update_state(&key("k"), StateChange::LiftSilence)
        .await;
    assert_eq!(lifted.unwrap().outcome, Outcome::Stored);
    assert_eq!(state(one.get(&key("k")).await.unwrap()), GroupState::Firing);
    let absent = one.update_state(&key("absent"), StateChange::Silence).await;
    assert_eq!(absent.unwrap().outcome, Outcome::Unchanged);
}

#[tokio::test]
async fn known_groups_are_listed_filtered_and_found() {
    let (_redis, service) = service().await;
    let manager = replica(&[&service]).await;
    add(&manager, "b", vec![firing("1"), firing("2"), firing("3")]).await;
    add(&manager, "a", vec![firing("1")]).await;
    add(&manager, "c", vec![firing("4"), resolved("5")]).await;
    add(&manager, "d", vec![resolved("6")]).await;
    let names = |filter: Filter| -> Vec<String> {
        let listed = manager.list(&filter).into_iter();
        listed.map(|group| group.key.to_string()).collect()
    };

    assert_eq!(names(Filter::default()), ["a", "b", "c", "d"]);
    let state = Some(GroupState::Mixed);
    assert_eq!(
        names(Filter {
            state,
            ..Filter::default()
        }),
        ["c"]
    );
    let min_alerts = 2;
    assert_eq!(
        names(Filter {
            min_alerts,
            ..Filter::default()
        }),
        ["b", "c"]
    );
    let page = Filter {
        offset: 1,
        limit: Some(2),
        ..Filter::default()
    };
    assert_eq!(names(page), ["b", "c"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begin = Instant::now();
    add(&manager, "d", vec![firing("7")]).await;
    let max_age = Some(begin.elapsed() + Duration::from_millis(500));
    assert_eq!(
        names(Filter {
            max_age,
            ..Filter::default()
        }),
        ["d"]
    );

    let holders = manager.find_by_fingerprint("1").await.unwrap();
    let holders: Vec<_> = holders.iter().map(|group| group.key.as_str()).collect();
    assert_eq!(holders.len(), 2);
    assert!(holders.contains(&"a") && holders.contains(&"b"));
    assert_eq!(manager.find_by_fingerprint("nobody's").await.unwrap(), []);

    let stats = manager.stats().known;
    assert_eq!(
        (stats.groups, stats.firing_groups, stats.mixed_groups),
        (4, 2, 2)
    );
    assert_eq!((stats.firing_alerts, stats.resolved_alerts), (6, 2));
}

#[tokio::test]
async fn a_new_replica_restores_and_learns_what_others_have_done() {
    let (_redis, service) = service().await;
    let (first, second) = (replica(&[&service]).await, replica(&[&service]).await);
    for number in 0..300 {
        add(&first, &format!("k/{number}"), vec![firing("a")]).await;
    }
    let restored = second.restore().await.unwrap();
    assert!(restored.complete);
    assert_eq!((restored.groups, restored.forgotten), (300, 0));
    assert_eq!(second.list(&Filter::default()).len(), 300);

    // Found though this replica has never seen its group before.
    add(&first, "new", vec![firing("new")]).await;
    assert_eq!(second.find_by_fingerprint("new").await.unwrap().len(), 1);

    // Two groups go behind the back of the second replica.
    for name in ["k/1", "k/2"] {
        first.remove_alert(&key(name), "a").await.unwrap();
    }
    let restored = second.restore().await.unwrap();
    assert_eq!((restored.groups, restored.forgotten), (299, 2));
    assert_eq!(second.list(&Filter::default()).len(), 299);
}

/// A failover has lost the last write: what is there is what there is.
#[tokio::test]
async fn a_group_that_redis_has_in_an_older_version_is_known_in_that_one() {
    let (redis, service) = service().await;
    let manager = replica(&[&service]).await;
    let mut connection = redis.connect().await;
    let alerts = |groups: &[AlertGroup]| groups.iter().map(|group| group.alerts.len()).sum();
    add(&manager, "restored", vec![firing("a")]).await;
    add(&manager, "read", vec![firing("a")]).await;
    let names = ["group:restored", "group:read"];
    let older: Vec<Vec<u8>> = connection.mget(&names[..]).await.unwrap();
    add(&manager, "restored", vec![firing("b")]).await;
    add(&manager, "read", vec![firing("b")]).await;
    assert_eq!(alerts(&manager.list(&Filter::default())), 4usize);
    for (name, document) in names.into_iter().zip(older) {
        let () = connection.set(name, document).await.unwrap();
    }
    manager.get(&key("read")).await.unwrap().unwrap();
    assert_eq!(alerts(&manager.list(&Filter::default())), 3);
    let restored = manager.restore().await.unwrap();
    assert!(restored.complete);
    assert_eq!((restored.groups, restored.forgotten), (2, 0));
    let listed = manager.list(&Filter::default());
    assert_eq!((listed.len(), alerts(&listed)), (2, 2));
}

#[tokio::test]
async fn an_unreadable_group_is_a_problem_of_a_restore_and_refused_to_a_change() {
    let (redis, service) = service().await;
    let mut connection = redis.connect().await;
    let () = redis::AsyncCommands::set(&mut connection, "group:bad", "{")
        .await
        .unwrap();
    let manager = replica(&[&service]).await;
    add(&manager, "good", vec![firing("a")]).await;
    let restored = manager.restore().await.unwrap();
    assert_eq!((restored.groups, restored.problems.len()), (1, 1));
    assert_eq!(restored.problems[0].key, "bad");
    let refused = manager
        .add_alerts(&key("bad"), Vec::new(), vec![firing("a")])
        .await;
    let Err(ManagerError::Refused { error, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(error.kind(), ErrorKind::Unreadable);
    assert_eq!(manager.stats().failed, 1);
}

#[tokio::test]
async fn groups_that_nobody_updates_are_cleaned_up() {
    let (_redis, service) = service().await;
    let (one, other) = (replica(&[&service]).await, replica(&[&service]).await);
    for name in ["old", "updated", "new"] {
        add(&one, name, vec![firing("a")]).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begin = Instant::now();
    // One knows this group as it was before.
    add(&other, "updated", vec![firing("b")]).await;
    add(&one, "new", vec![firing("b")]).await;
    let max_age = begin.elapsed() + Duration::from_millis(500);
    assert_eq!(one.clean_up_expired(max_age).await.unwrap(), 1);
    assert_eq!(alerts(&one, "old").await, Vec::<String>::new());
    assert_eq!(alerts(&one, "updated").await, ["a", "b"]);
    assert_eq!(alerts(&one, "new").await, ["a", "b"]);
}

#[tokio::test]
async fn copies_over_the_limit_are_forgotten_and_loaded_again() {
    let (_redis, service) = service().await;
    let settings = ManagerSettings {
        max_known_groups: 10,
        ..ManagerSettings::default()
    };
    let manager = replica_with(&[&service], settings).await;
    for number in 0..25 {
        add(&manager, &format!("k/{number}"), vec![firing("a")]).await;
    }
    let stats = manager.stats().known;
    assert_eq!((stats.groups, stats.crowded_out), (10, 15));
    assert_eq!(alerts(&manager, "k/0").await, ["a"]);
}

/// The third use case: resolved half way through its life, gone at its end.
#[tokio::test]
async fn a_resolved_group_is_gone_when_its_first_time_is_up() {
    let (_redis, service) = service().await;
    let settings = ManagerSettings {
        group_ttl: Duration::from_secs(4),
        ..ManagerSettings::default()
    };
    let manager = replica_with(&[&service], settings).await;
    let bound = Bound::of(Duration::from_millis(4_500));
    add(&manager, "k", vec![firing("a")]).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    add(&manager, "k", vec![resolved("a")]).await;
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    let found = manager.get(&key("k")).await.unwrap().unwrap();
    assert_eq!(found.group.metadata.state, GroupState::Resolved);
    while manager.get(&key("k")).await.unwrap().is_some() {
        bound.assert_holds("it is gone");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(manager.list(&Filter::default()), []);
    assert_eq!(manager.stats().known.groups, 0);
}
