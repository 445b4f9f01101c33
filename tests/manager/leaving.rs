//! Alerts that leave a group that lives on, and reports that are refused while others
//! are stored.

use std::time::Duration;

use groupstate::{
    domain::{
        group::{Alert, AlertStatus, Time},
        retention::{Refused, RefusedReason, Retention},
    },
    manager::{AlertGroupManager, Changed, ManagerError, ManagerSettings, Outcome},
};

use crate::{
    add, alerts,
    common::{redis_server::RedisServer, service::Service, wait_until},
    firing, key, replica, replica_with, resolved, service,
};

fn settings(retention: Retention) -> ManagerSettings {
    ManagerSettings {
        retention,
        ..ManagerSettings::default()
    }
}

/// A report that was received so long ago.
fn ago(report: Alert, seconds: i64) -> Alert {
    let received = Time::from_millis(Time::now().millis() - 1_000 * seconds).unwrap();
    Alert {
        timestamp: Some(received),
        ..report
    }
}

async fn added(
    manager: &AlertGroupManager,
    name: &str,
    reports: Vec<Alert>,
) -> Result<Changed, ManagerError> {
    let group_by = vec!["alertname".into()];
    manager.add_alerts(&key(name), group_by, reports).await
}

fn named(refused: &[Refused]) -> Vec<(&str, RefusedReason)> {
    let refused = refused.iter();
    refused
        .map(|one| (one.fingerprint.as_str(), one.reason))
        .collect()
}

fn refused_total(manager: &AlertGroupManager, reason: RefusedReason) -> u64 {
    let counts = manager.stats().refused;
    let mut counts = counts.iter();
    counts.find(|(one, _)| *one == reason).unwrap().1
}

#[tokio::test]
async fn alerts_whose_time_is_up_leave_with_the_next_change() {
    const HOUR: i64 = 3_600;
    let (_redis, service) = service().await;
    let manager = replica(&[&service]).await;
    let reports = vec![
        ago(firing("heard of"), 23 * HOUR),
        ago(firing("silent"), 25 * HOUR),
        ago(resolved("over"), 2 * HOUR),
        ago(resolved("just over"), HOUR / 2),
    ];
    // What has left before it came is not stored at all.
    let changed = added(&manager, "k", reports).await.unwrap();
    assert_eq!(changed.refused, []);
    assert_eq!(alerts(&manager, "k").await, ["heard of", "just over"]);
    let stats = manager.stats();
    assert_eq!((stats.left_resolved, stats.left_unreported), (1, 1));

    let settings = settings(Retention {
        resolved_retention: Duration::from_secs(60),
        report_horizon: Duration::from_secs(120),
        ..Retention::default()
    });
    let strict = replica_with(&[&service], settings).await;
    add(&strict, "k", vec![firing("new")]).await;
    assert_eq!(alerts(&manager, "k").await, ["new"]);
    let stats = strict.stats();
    assert_eq!((stats.left_resolved, stats.left_unreported), (1, 1));
}

#[tokio::test]
async fn a_group_goes_with_the_last_alert_that_leaves() {
    let (_redis, service) = service().await;
    let settings = settings(Retention {
        resolved_retention: Duration::ZERO,
        ..Retention::default()
    });
    let manager = replica_with(&[&service], settings).await;
    add(&manager, "k", vec![ago(firing("a"), 5)]).await;
    let changed = added(&manager, "k", vec![ago(resolved("a"), 1)]).await;
    assert_eq!(changed.unwrap().outcome, Outcome::Deleted);
    assert_eq!(alerts(&manager, "k").await, Vec::<String>::new());
    assert_eq!(manager.stats().left_resolved, 1);
}

#[tokio::test]
async fn a_time_ahead_of_the_clock_is_set_back_and_counted() {
    let (_redis, service) = service().await;
    let manager = replica(&[&service]).await;
    let before = Time::now();
    let reports = vec![
        ago(firing("ahead"), -3_600),
        Alert {
            timestamp: None,
            ..firing("timeless")
        },
    ];
    let group = added(&manager, "k", reports).await.unwrap().group.unwrap();
    for name in ["ahead", "timeless"] {
        let received = group.alerts[name].timestamp.unwrap();
        assert!(received >= before && received <= Time::now(), "{name}");
    }
    assert_eq!(manager.stats().set_back, 1);
    // So what is over now is over.
    add(&manager, "k", vec![resolved("ahead")]).await;
    let found = manager.get(&key("k")).await.unwrap().unwrap();
    let status = found.group.alerts["ahead"].status;
    assert_eq!(status, AlertStatus::Resolved);
}

#[tokio::test]
async fn what_is_malformed_is_refused_alone() {
    let (_redis, service) = service().await;
    let manager = replica(&[&service]).await;
    let mut nameless = firing("nameless");
    nameless.labels.insert(String::new(), "x".into());
    let reports = vec![firing("a"), nameless.clone(), firing(""), firing("b")];
    let changed = added(&manager, "k", reports).await.unwrap();
    let malformed = RefusedReason::Malformed;
    assert_eq!(
        named(&changed.refused),
        [("nameless", malformed), ("", malformed)]
    );
    assert_eq!(alerts(&manager, "k").await, ["a", "b"]);
    assert_eq!(refused_total(&manager, malformed), 2);
    let refused = added(&manager, "k", vec![nameless]).await;
    let Err(ManagerError::AllRefused(refused)) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(named(&refused), [("nameless", malformed)]);
    let nothing = added(&manager, "k", Vec::new()).await;
    assert!(matches!(nothing, Err(ManagerError::Invalid(_))));
}

#[tokio::test]
async fn what_fires_makes_the_resolved_leave_and_then_is_refused_one_by_one() {
    let (_redis, service) = service().await;
    let settings = settings(Retention {
        max_alerts: 3,
        ..Retention::default()
    });
    let manager = replica_with(&[&service], settings).await;
    add(&manager, "k", vec![firing("a"), resolved("over")]).await;
    let reports = vec![firing("b"), firing("c"), firing("d"), firing("a")];
    let changed = added(&manager, "k", reports).await.unwrap();
    assert_eq!(named(&changed.refused), [("d", RefusedReason::GroupFull)]);
    assert_eq!(alerts(&manager, "k").await, ["a", "b", "c"]);
    let stats = manager.stats();
    assert_eq!((stats.left_crowded_out, stats.changes), (1, 2));
    assert_eq!(refused_total(&manager, RefusedReason::GroupFull), 1);
    // Nothing of it can be stored.
    let refused = added(&manager, "k", vec![firing("e"), firing("f")]).await;
    assert!(matches!(refused, Err(ManagerError::AllRefused(all)) if all.len() == 2));
    // One that is held is heard all the same, and makes room when it is over.
    add(&manager, "k", vec![resolved("a")]).await;
    add(&manager, "k", vec![firing("e")]).await;
    assert_eq!(alerts(&manager, "k").await, ["b", "c", "e"]);
}

/// Its limits are lower than ours, which nobody should set so.
#[tokio::test]
async fn what_the_service_does_not_take_is_refused_alone() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url(), "--max-document-bytes", "4KiB"]);
    let manager = replica(&[&service]).await;
    let giant = |name: &str| Alert {
        annotations: [("summary".into(), "x".repeat(5_000))].into(),
        ..firing(name)
    };
    // Two halves that are refused in the same words.
    let reports = vec![giant("b"), firing("a"), giant("d"), firing("c")];
    let changed = added(&manager, "k", reports).await.unwrap();
    let mut refused = changed.refused;
    refused.sort_by(|one, other| one.fingerprint.cmp(&other.fingerprint));
    let by_service = RefusedReason::Service;
    assert_eq!(named(&refused), [("b", by_service), ("d", by_service)]);
    assert!(refused[0].message.contains("--max-document-bytes"));
    assert_eq!(alerts(&manager, "k").await, ["a", "c"]);
    assert_eq!(refused_total(&manager, by_service), 2);
    assert_eq!(manager.stats().failed, 0);
}

/// It is nothing about one of the alerts, so they are not tried one by one.
#[tokio::test]
async fn a_key_that_the_service_does_not_take_is_refused_with_all_alerts() {
    let (_redis, service) = service().await;
    let manager = replica(&[&service]).await;
    let reports: Vec<Alert> = (0..100).map(|n| firing(&n.to_string())).collect();
    let refused = added(&manager, &"x".repeat(5_000), reports).await;
    let Err(ManagerError::AllRefused(refused)) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(refused.len(), 100);
    assert!(refused[0].message.contains("--max-key-bytes"));
    assert_eq!(manager.stats().attempts, 1);
}

/// A report that only memory has, and that Redis will never take, does not hold up others
/// of its group.
#[tokio::test]
async fn the_outbox_refuses_alone_what_can_never_be_stored() {
    let mut redis = RedisServer::start().await;
    let url = redis.url();
    let lavish = Service::start(&["--redis-url", &url]);
    let addr = lavish.addr().to_owned();
    let manager = replica(&[&lavish]).await;
    redis.kill();
    wait_until("degraded", Duration::from_secs(10), async || {
        lavish.health().await["status"] == "degraded"
    })
    .await;
    let giant = Alert {
        annotations: [("summary".into(), "x".repeat(5_000))].into(),
        ..firing("giant")
    };
    add(&manager, "k", vec![firing("a"), giant, firing("b")]).await;
    assert_eq!(manager.stats().outbox.reports, 3);
    // Its successor has a lower limit.
    drop(lavish);
    redis.restart().await;
    let limit = ["--redis-url", &url, "--max-document-bytes", "4KiB"];
    let _strict = Service::start_on(&addr, &limit);
    wait_until("it is delivered", Duration::from_secs(10), async || {
        manager.deliver().await == 0
    })
    .await;
    assert_eq!(alerts(&manager, "k").await, ["a", "b"]);
    let stats = manager.stats();
    assert_eq!((stats.outbox.delivered, stats.outbox.dropped), (1, 0));
    assert!(refused_total(&manager, RefusedReason::Service) > 0);
}

/// The service reads what others have stored and would not take it again: it must not
/// keep new alerts out.
#[tokio::test]
async fn a_group_with_faults_of_another_writer_can_be_changed() {
    let (redis, service) = service().await;
    let manager = replica(&[&service]).await;
    let document = r#"{"key":"k","alerts":{
        "f":{"fingerprint":"another","alert_name":"A","status":"firing","labels":{"":"x","a":"b"}},
        "":{"fingerprint":"g","alert_name":"A","status":"firing","labels":null}},
        "metadata":{"state":"firing","created_at":"2026-03-01T10:00:00Z","updated_at":"2026-03-01T10:00:00Z",
        "firing_count":-7,"resolved_count":0,"group_by":null,
        "group_wait_timer":{"version":1,"reset_count":-1}},"version":3}"#;
    let () = redis::AsyncCommands::set(&mut redis.connect().await, "group:k", document)
        .await
        .unwrap();
    let settings = settings(Retention {
        report_horizon: Duration::MAX,
        ..Retention::default()
    });
    let patient = replica_with(&[&service], settings).await;
    add(&patient, "k", vec![firing("new")]).await;
    let group = manager.get(&key("k")).await.unwrap().unwrap().group;
    assert_eq!(alerts(&manager, "k").await, ["f", "g", "new"]);
    assert_eq!(group.alerts["f"].fingerprint, "f");
    assert_eq!(group.alerts["f"].labels.len(), 1);
    assert_eq!(group.metadata.firing_count, 3);
    assert_eq!(patient.stats().refused.total(), 0);
}
