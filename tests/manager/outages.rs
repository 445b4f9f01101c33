//! Redis or an instance goes, and no alert with it.

use std::{sync::Arc, time::Duration};

use groupstate::{
    manager::{
        AlertGroupManager, ManagerSettings, Source, affinity::Instances, remote::RemoteSettings,
    },
    reload::Watched,
    store::Backend,
};

use crate::{
    add, alerts,
    common::{redis_server::RedisServer, service::Service, wait_until},
    firing, key, replica, replica_with,
};

const BOUND: Duration = Duration::from_secs(10);

async fn two_instances(redis: &RedisServer, arguments: &[&str]) -> [Service; 2] {
    let url = redis.url();
    let arguments = [&["--redis-url", &url], arguments].concat();
    [Service::start(&arguments), Service::start(&arguments)]
}

async fn degraded(services: &[&Service]) {
    for service in services {
        wait_until("degraded", BOUND, async || {
            service.health().await["status"] == "degraded"
        })
        .await;
    }
}

#[tokio::test]
async fn without_an_answer_the_last_copy_stands_in() {
    let redis = RedisServer::start().await;
    let [mut one, mut other] = two_instances(&redis, &[]).await;
    let manager = replica(&[&one, &other]).await;
    add(&manager, "k", vec![firing("a")]).await;
    one.kill();
    other.kill();
    let found = manager.get(&key("k")).await.unwrap().unwrap();
    assert_eq!(found.source, Source::Copy);
    assert_eq!(found.group.alerts.len(), 1);
    assert!(manager.get(&key("unknown")).await.is_err());
}

/// Under round robin, changes would go on losing races against themselves.
#[tokio::test]
async fn while_redis_is_down_three_replicas_make_every_change_in_few_attempts() {
    let mut redis = RedisServer::start().await;
    let [one, other] = two_instances(&redis, &[]).await;
    let services = [&one, &other];
    redis.kill();
    degraded(&services).await;
    let replicas = [
        replica(&services).await,
        replica(&services).await,
        replica(&services).await,
    ];
    for round in 0..30 {
        for (number, replica) in replicas.iter().enumerate() {
            let report = firing(&format!("{number}/{round}"));
            let changed = replica
                .add_alerts(&key("k"), Vec::new(), vec![report])
                .await
                .unwrap();
            assert!(changed.attempts <= 5, "{changed:?}");
            assert_eq!((changed.backend, changed.safe), (Backend::Memory, true));
        }
    }
    assert_eq!(alerts(&replicas[0], "k").await.len(), 90);
}

#[tokio::test]
async fn an_alert_survives_discard_and_the_death_of_its_instance() {
    let mut redis =
        RedisServer::start_with(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let [mut one, mut other] = two_instances(&redis, &["--on-recovery", "discard"]).await;
    let manager = replica(&[&one, &other]).await;
    tokio::spawn(manager.clone().deliver_forever());
    for number in 0..20 {
        add(&manager, &format!("k/{number}"), vec![firing("before")]).await;
    }
    redis.kill();
    degraded(&[&one, &other]).await;
    for number in 0..20 {
        add(&manager, &format!("k/{number}"), vec![firing("degraded")]).await;
    }
    manager.remove_alert(&key("k/0"), "before").await.unwrap();
    assert_eq!(manager.stats().outbox.groups, 20);

    // All that memory has goes with its instances.
    one.kill();
    other.kill();
    redis.restart().await;
    let url = redis.url();
    let _one = Service::start_on(one.addr(), &["--redis-url", &url]);
    let _other = Service::start_on(other.addr(), &["--redis-url", &url]);
    wait_until("the outbox is delivered", BOUND, async || {
        manager.stats().outbox.reports == 0
    })
    .await;
    for number in 1..20 {
        let name = format!("k/{number}");
        assert_eq!(alerts(&manager, &name).await, ["before", "degraded"]);
    }
    assert_eq!(alerts(&manager, "k/0").await, ["degraded"]);
    let outbox = manager.stats().outbox;
    assert_eq!((outbox.delivered, outbox.refused), (outbox.remembered, 0));
}

/// A refusal is not a delivery, whatever the reason: only what could never be stored
/// is dropped, and counted as that.
#[tokio::test]
async fn the_outbox_keeps_what_is_refused_for_a_while() {
    let mut redis = RedisServer::start().await;
    let folder = tempfile::TempDir::new().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, "before").unwrap();
    let service = Service::start(&[
        "--redis-url",
        &redis.url(),
        "--auth-token-file",
        tokens.to_str().unwrap(),
        "--reload-interval",
        "100ms",
    ]);
    let settings = RemoteSettings {
        token: Some(Watched::fixed("before".into())),
        ..RemoteSettings::default()
    };
    let instances = Instances::resolve([service.addr()], settings).await;
    let manager = AlertGroupManager::new(Arc::new(instances.unwrap()), ManagerSettings::default());
    redis.kill();
    degraded(&[&service]).await;
    for number in 0..20 {
        add(&manager, &format!("k/{number:02}"), vec![firing("a")]).await;
    }
    // Somebody keeps something else where the first of them belongs.
    redis.restart().await;
    let mut admin = redis.connect().await;
    let () = redis::cmd("RPUSH")
        .arg(&["group:k/00", "foreign"])
        .query_async(&mut admin)
        .await
        .unwrap();
    std::fs::write(&tokens, "after").unwrap();
    wait_until("the token is refused", BOUND, async || {
        manager.get(&key("unknown")).await.is_err()
    })
    .await;
    assert_eq!(manager.deliver().await, 20);
    assert_eq!(manager.stats().outbox.dropped, 0);

    // With the token, all but that one are delivered, and it is not given up.
    std::fs::write(&tokens, "before").unwrap();
    wait_until("all others are delivered", BOUND, async || {
        manager.deliver().await == 1
    })
    .await;
    let () = redis::cmd("DEL")
        .arg("group:k/00")
        .query_async(&mut admin)
        .await
        .unwrap();
    wait_until("the last one is delivered", BOUND, async || {
        manager.deliver().await == 0
    })
    .await;
    for number in 0..20 {
        assert_eq!(alerts(&manager, &format!("k/{number:02}")).await, ["a"]);
    }
    let outbox = manager.stats().outbox;
    assert_eq!((outbox.delivered, outbox.dropped), (outbox.remembered, 0));
}

#[tokio::test]
async fn a_full_outbox_is_said_to_the_caller() {
    let mut redis = RedisServer::start().await;
    let [one, other] = two_instances(&redis, &[]).await;
    redis.kill();
    degraded(&[&one, &other]).await;
    let settings = ManagerSettings {
        max_outbox_reports: 2,
        ..ManagerSettings::default()
    };
    let manager = replica_with(&[&one, &other], settings).await;
    let mut safe = Vec::new();
    for name in ["a", "b", "c"] {
        let changed = manager
            .add_alerts(&key(name), Vec::new(), vec![firing("a")])
            .await;
        safe.push(changed.unwrap().safe);
    }
    assert_eq!(safe, [true, true, false]);
    assert_eq!(manager.stats().outbox.refused, 1);
}

#[tokio::test]
async fn when_an_instance_hangs_its_keys_go_to_the_other_and_come_back() {
    let redis = RedisServer::start().await;
    let [one, other] = two_instances(&redis, &[]).await;
    let manager = replica(&[&one, &other]).await;
    for number in 0..10 {
        add(&manager, &format!("k/{number}"), vec![firing("a")]).await;
    }
    one.process().signal("STOP");
    for number in 0..10 {
        add(&manager, &format!("k/{number}"), vec![firing("b")]).await;
    }
    one.process().signal("CONT");
    for number in 0..10 {
        assert_eq!(alerts(&manager, &format!("k/{number}")).await, ["a", "b"]);
    }
}
