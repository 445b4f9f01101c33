//! Redis or an instance goes, and no alert with it.

use std::time::Duration;

use groupstate::{
    manager::{ManagerSettings, Source},
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
