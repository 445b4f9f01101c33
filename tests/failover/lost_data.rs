//! Redis comes back with less than it had acknowledged: empty, or as it was some time
//! ago. What an instance itself has written and deleted is told again, and nothing
//! else: what it has merely read may have been replaced or deleted since by others.

use common::redis_cluster::RedisCluster;

use super::*;

const RECONCILE: &[&str] = &["--on-recovery", "reconcile"];
const DISCARD: &[&str] = &["--on-recovery", "discard"];

/// The time that an instance takes to notice a loss, and to tell Redis what it knows.
const HEALED_WITHIN: Duration = Duration::from_secs(5);

/// Deletes are told again several times; this is longer than until the second.
const DELETED_WITHIN: Duration = Duration::from_secs(15);

/// From now on a restart comes back as it is now.
async fn save(scene: &Scene) {
    redis_command(&mut scene.redis_client().await, &["SAVE"]).await;
}

async fn has_noticed(service: &Service, losses: f64) {
    wait_until("the loss is noticed", HEALED_WITHIN, async || {
        service.metric("redis_data_losses_total").await == losses
    })
    .await;
}

async fn delete(client: &mut Client, key: &str) -> pb::DeleteResponse {
    let request = pb::DeleteRequest {
        key: key.into(),
        expected_version: None,
    };
    client.delete(request).await.unwrap().into_inner()
}

/// The keys of all groups, as Redis itself has them.
async fn keys_in(connection: &mut MultiplexedConnection) -> Vec<String> {
    let keys = redis_command(connection, &["KEYS", "group:[a-z]*"]).await;
    let mut keys: Vec<String> = redis::from_redis_value(keys).unwrap();
    keys.sort();
    keys
}

/// The number of groups that Redis holds, as soon as it is Redis that says so.
async fn listed(client: &mut Client) -> i64 {
    let count = std::sync::Mutex::new(None);
    wait_until("Redis answers", HEALED_WITHIN, async || {
        let size = client.clone().size(pb::SizeRequest::default()).await;
        let size = size.ok().map(tonic::Response::into_inner);
        let of_redis = size.filter(|size| size.backend == REDIS);
        *count.lock().unwrap() = of_redis.map(|size| size.count);
        of_redis.is_some()
    })
    .await;
    count.into_inner().unwrap().unwrap()
}

/// A document as a writer in Go makes it, without a write id.
async fn write_in_go(connection: &mut MultiplexedConnection, key: &str, version: i64) {
    let document = format!(
        r#"{{"key":"{key}","alerts":{{}},"metadata":{{"state":"firing","version":{version}}},"version":{version}}}"#
    );
    let redis_key = format!("group:{key}");
    redis_command(connection, &["SET", &redis_key, &document, "EX", "3600"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_merely_read_is_not_put_back() {
    const GROUPS: usize = 50;
    for policy in [RECONCILE, DISCARD] {
        let mut writer = Scene::new(policy).await;
        for i in 0..GROUPS {
            writer.store(&format!("k/{i}"), &["a"]).await;
        }
        writer.store("short", &["a"]).await;
        let (reader, mut client) = writer.other(policy).await;
        wait_until("it has read them", HEALED_WITHIN, async || {
            reader.metric("mirror_entries").await == GROUPS as f64 + 1.0
        })
        .await;
        for i in 0..GROUPS {
            assert!(writer.delete(&format!("k/{i}")).await.deleted);
        }
        let mut redis = writer.redis_client().await;
        redis_command(&mut redis, &["PEXPIRE", "group:short", "1"]).await;
        // It is of no more help either: it has deleted them.
        writer.service.kill();
        save(&writer).await;
        store(&mut client, "own", &["a"]).await;
        // So that the snapshot is older than what the reader knows.
        pass(Duration::from_millis(1_200)).await;
        writer.redis.restart().await;
        has_noticed(&reader, 1.0).await;
        assert_eq!(listed(&mut client).await, 1, "{policy:?}");
        let mut redis = writer.redis_client().await;
        assert_eq!(keys_in(&mut redis).await, ["group:own"], "{policy:?}");
        assert_eq!(reader.metric("groups_put_back_total").await, 1.0);
    }
}

/// By both policies: nobody has written since what is put back.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_is_put_back_and_what_was_deleted_stays_deleted() {
    for policy in [RECONCILE, DISCARD] {
        let mut scene = Scene::new(policy).await;
        scene.store("before", &["a"]).await;
        scene.store("deleted", &["a"]).await;
        let changed = scene.store("changed", &["a"]).await;
        pass(Duration::from_millis(1_200)).await;
        save(&scene).await;
        assert!(scene.delete("deleted").await.deleted);
        let swapped = swap(&mut scene.client, "changed", &["b"], changed.version).await;
        let request = pb::StoreRequest {
            group: Some(group("after", &["a"])),
            expiry: Some(pb::store_request::Expiry::Ttl(prost_types::Duration {
                seconds: 600,
                nanos: 0,
            })),
        };
        let after = scene.client.store(request).await.unwrap().into_inner();
        pass(Duration::from_millis(1_200)).await;
        scene.redis.restart().await;
        has_noticed(&scene.service, 1.0).await;
        assert_eq!(listed(&mut scene.client).await, 3, "{policy:?}");
        let mut redis = scene.redis_client().await;
        let keys = ["group:after", "group:before", "group:changed"];
        assert_eq!(keys_in(&mut redis).await, keys, "{policy:?}");
        let loaded = scene.load("changed").await.unwrap();
        assert_eq!(
            (fingerprints(&loaded), version(&loaded)),
            (vec!["b"], swapped.version)
        );
        let loaded = scene.load("after").await.unwrap();
        assert_eq!(version(&loaded), after.version);
        let left = redis_command(&mut redis, &["TTL", "group:after"]).await;
        let left: i64 = redis::from_redis_value(left).unwrap();
        assert!((1..=600).contains(&left), "{left}");
        let log = scene
            .service
            .wait_for_log("Redis has lost data", HEALED_WITHIN);
        assert!(log.contains("WARN"), "{log}");
    }
}

/// What the server had answered before its last state that survived is in that state, or
/// was deleted: here by somebody of whom no instance hears.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_before_the_state_that_survived_is_not_put_back() {
    let mut scene = Scene::new(RECONCILE).await;
    scene.store("deleted", &["a"]).await;
    // Longer than from one probe to the next.
    pass(Duration::from_millis(1_200)).await;
    let mut redis = scene.redis_client().await;
    redis_command(&mut redis, &["DEL", "group:deleted"]).await;
    save(&scene).await;
    scene.store("after", &["a"]).await;
    pass(Duration::from_millis(1_200)).await;
    scene.redis.restart().await;
    has_noticed(&scene.service, 1.0).await;
    assert_eq!(listed(&mut scene.client).await, 1);
    let mut redis = scene.redis_client().await;
    assert_eq!(keys_in(&mut redis).await, ["group:after"]);
}

/// The process is the same, and nothing but what it holds tells it.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_was_flushed_is_noticed_and_told_again() {
    const GROUPS: usize = 500;
    let mut scene = Scene::new(DISCARD).await;
    for i in 0..GROUPS {
        scene.store(&format!("k/{i}"), &["a"]).await;
    }
    let mut redis = scene.redis_client().await;
    redis_command(&mut redis, &["FLUSHALL"]).await;
    // No listing takes it for empty.
    let all = listed(&mut scene.client).await;
    assert_eq!(all, GROUPS as i64);
    assert_eq!(keys_in(&mut redis).await.len(), GROUPS);
    has_noticed(&scene.service, 1.0).await;
    let put_back = scene.service.metric("groups_put_back_total").await;
    assert_eq!(put_back, GROUPS as f64);
}

/// One instance puts back what it has written, and another one had deleted it.
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_of_another_instance_is_not_undone() {
    const GROUPS: usize = 20;
    let mut scene = Scene::new(RECONCILE).await;
    let (deleter, mut client) = scene.other(RECONCILE).await;
    let groups = || (0..GROUPS).map(|i| format!("k/{i}"));
    for key in groups() {
        scene.store(&key, &["a"]).await;
        let deleted = delete(&mut client, &key).await;
        assert!(deleted.deleted && deleted.authoritative);
    }
    scene.redis.restart().await;
    has_noticed(&scene.service, 1.0).await;
    has_noticed(&deleter, 1.0).await;
    wait_until("all were put back", HEALED_WITHIN, async || {
        scene.service.metric("groups_put_back_total").await == GROUPS as f64
    })
    .await;
    let redis = scene.redis_client().await;
    wait_until("and are deleted again", DELETED_WITHIN, async || {
        keys_in(&mut redis.clone()).await.is_empty()
    })
    .await;
    assert_eq!(
        deleter.metric("groups_deleted_again_total").await,
        GROUPS as f64
    );
    assert_eq!(listed(&mut scene.client).await, 0);
}

/// Two instances put back what they have written, which is merged, and a third one had
/// deleted it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_merged_when_it_is_put_back_is_deleted_again() {
    const GROUPS: usize = 20;
    let mut scene = Scene::new(RECONCILE).await;
    let (_second, mut second) = scene.other(RECONCILE).await;
    let (deleter, mut third) = scene.other(RECONCILE).await;
    let groups = || (0..GROUPS).map(|i| format!("k/{i}"));
    for key in groups() {
        scene.store(&key, &["a"]).await;
        store(&mut second, &key, &["b"]).await;
    }
    for key in groups() {
        assert!(delete(&mut third, &key).await.deleted);
    }
    scene.redis.restart().await;
    has_noticed(&scene.service, 1.0).await;
    has_noticed(&deleter, 1.0).await;
    let redis = scene.redis_client().await;
    wait_until("all are deleted again", DELETED_WITHIN, async || {
        let again = deleter.metric("groups_deleted_again_total").await;
        again >= GROUPS as f64 && keys_in(&mut redis.clone()).await.is_empty()
    })
    .await;
}

/// One instance puts back what it has written for a day, and another one had let it
/// expire.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_instance_has_let_expire_does_not_return() {
    const GROUPS: usize = 20;
    let mut scene = Scene::new(DISCARD).await;
    let (ends_them, mut client) = scene.other(DISCARD).await;
    // While it fills its mirror, the first one may come to read what the other one writes.
    wait_until("mirrors are filled", HEALED_WITHIN, async || {
        scene.service.health().await["status"] == "ok" && ends_them.health().await["status"] == "ok"
    })
    .await;
    let groups = || (0..GROUPS).map(|i| format!("k/{i}"));
    for key in groups() {
        scene.store(&key, &["a"]).await;
        let request = pb::StoreRequest {
            group: Some(group(&key, &["b"])),
            expiry: Some(pb::store_request::Expiry::Ttl(prost_types::Duration {
                seconds: 1,
                nanos: 0,
            })),
        };
        client.store(request).await.unwrap();
    }
    let redis = scene.redis_client().await;
    wait_until("they have expired", HEALED_WITHIN, async || {
        keys_in(&mut redis.clone()).await.is_empty()
    })
    .await;
    scene.redis.restart().await;
    has_noticed(&scene.service, 1.0).await;
    has_noticed(&ends_them, 1.0).await;
    wait_until("all were put back", HEALED_WITHIN, async || {
        scene.service.metric("groups_put_back_total").await == GROUPS as f64
    })
    .await;
    let redis = scene.redis_client().await;
    wait_until("and are deleted again", DELETED_WITHIN, async || {
        keys_in(&mut redis.clone()).await.is_empty()
    })
    .await;
    let again = ends_them.metric("groups_deleted_again_total").await;
    assert_eq!(again, GROUPS as f64);
}

/// Redis has executed the write and is gone before its answer is here; the one that comes
/// in its place is empty, and has been told all else by then.
#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledged_write_whose_answer_was_held_is_in_redis() {
    const ONE_WAY: Duration = Duration::from_millis(150);
    // The link is slow, and nobody is to take that for an outage.
    let slow = ["--redis-timeout", "2s", "--trip-after", "10s"];
    let mut scene = Scene::new(&[RECONCILE, &slow].concat()).await;
    let mut redis = scene.redis_client().await;
    let mut acknowledged = 0;
    for round in 0..4 {
        scene.proxy.delay(ONE_WAY);
        let key = format!("k/{round}");
        let mut client = scene.client.clone();
        let storing = {
            let key = key.clone();
            tokio::spawn(async move {
                let request = pb::StoreRequest {
                    group: Some(group(&key, &["a"])),
                    expiry: None,
                };
                client.store(request).await
            })
        };
        let redis_key = format!("group:{key}");
        wait_until("Redis has executed it", HEALED_WITHIN, async || {
            keys_in(&mut redis.clone()).await.contains(&redis_key)
        })
        .await;
        scene.redis.restart().await;
        redis = scene.redis_client().await;
        let stored = storing.await.unwrap();
        scene.proxy.delay(Duration::ZERO);
        scene.wait_until_back().await;
        if stored.is_ok() {
            acknowledged += 1;
            wait_until("it is there again", HEALED_WITHIN, async || {
                keys_in(&mut redis.clone()).await.contains(&redis_key)
            })
            .await;
            let loaded = scene.load(&key).await.unwrap();
            assert_eq!(fingerprints(&loaded), ["a"]);
        }
    }
    assert!(acknowledged > 0, "nothing was held");
}

/// Nobody puts it back, since others may have deleted it; but what is stored in its place
/// lives no longer than it.
#[tokio::test(flavor = "multi_thread")]
async fn keep_ttl_keeps_an_expiry_that_was_lost_with_the_group() {
    let mut writer = Scene::new(DISCARD).await;
    let request = pb::StoreRequest {
        group: Some(group("k", &["a"])),
        expiry: Some(pb::store_request::Expiry::Ttl(prost_types::Duration {
            seconds: 600,
            nanos: 0,
        })),
    };
    writer.client.store(request).await.unwrap();
    let all = pb::StoreAllRequest {
        groups: vec![group("of many", &["a"])],
        expiry: Some(pb::store_all_request::Expiry::Ttl(prost_types::Duration {
            seconds: 600,
            nanos: 0,
        })),
    };
    writer.client.store_all(all).await.unwrap();
    let (reader, mut client) = writer.other(DISCARD).await;
    wait_until("it has read them", HEALED_WITHIN, async || {
        reader.metric("mirror_entries").await == 2.0
    })
    .await;
    // It would put the group back.
    writer.service.kill();
    writer.redis.restart().await;
    has_noticed(&reader, 1.0).await;
    let request = pb::StoreRequest {
        group: Some(group("k", &["b"])),
        expiry: Some(pb::store_request::Expiry::KeepTtl(true)),
    };
    let stored = client.store(request).await.unwrap().into_inner();
    assert_eq!(stored.backend, REDIS);
    let all = pb::StoreAllRequest {
        groups: vec![group("of many", &["b"])],
        expiry: Some(pb::store_all_request::Expiry::KeepTtl(true)),
    };
    client.store_all(all).await.unwrap();
    let mut redis = writer.redis_client().await;
    for key in ["group:k", "group:of many"] {
        let left = redis_command(&mut redis, &["TTL", key]).await;
        let left: i64 = redis::from_redis_value(left).unwrap();
        assert!((1..=600).contains(&left), "{key}: {left}");
    }
}

/// Only what memory has acknowledged is dropped, and not what Redis had before.
#[tokio::test(flavor = "multi_thread")]
async fn what_there_was_before_a_change_that_is_dropped_is_put_back() {
    let mut scene = Scene::new(DISCARD).await;
    let before = scene.store("changed", &["before"]).await;
    scene.store("deleted", &["before"]).await;
    scene.redis.kill();
    wait_until("memory answers", HEALED_WITHIN, async || {
        let mut client = scene.client.clone();
        let request = pb::StoreRequest {
            group: Some(group("changed", &["dropped"])),
            expiry: None,
        };
        client
            .store(request)
            .await
            .is_ok_and(|stored| stored.into_inner().backend == MEMORY)
    })
    .await;
    assert!(scene.delete("deleted").await.deleted);
    scene.redis.restart().await;
    has_noticed(&scene.service, 1.0).await;
    assert_eq!(listed(&mut scene.client).await, 2);
    let loaded = scene.load("changed").await.unwrap();
    assert_eq!(
        (fingerprints(&loaded), version(&loaded)),
        (vec!["before"], before.version)
    );
    let loaded = scene.load("deleted").await.unwrap();
    assert_eq!(fingerprints(&loaded), ["before"]);
    let discarded = scene
        .service
        .metric("degraded_writes_discarded_total")
        .await;
    assert_eq!(discarded, 2.0);
}

/// What is no ancestor of it: of another writer, and not what it has replaced.
#[tokio::test(flavor = "multi_thread")]
async fn what_others_have_written_is_merged_with_and_not_replaced() {
    let mut scene = Scene::new(RECONCILE).await;
    let ours = scene.store("k", &["ours"]).await;
    scene.cut_off().await;
    scene.redis.restart().await;
    let (_other, mut other) = scene.other(RECONCILE).await;
    store(&mut other, "k", &["theirs"]).await;
    // As one whose clock is behind would have written it.
    let mut redis = scene.redis_client().await;
    let stored = redis_command(&mut redis, &["GET", "group:k"]).await;
    let stored: String = redis::from_redis_value(stored).unwrap();
    let theirs = version(&load(&mut other, "k").await.unwrap());
    let older = stored.replace(&theirs.to_string(), &(ours.version - 16).to_string());
    redis_command(&mut redis, &["SET", "group:k", &older, "EX", "60"]).await;
    scene.reconnect().await;
    let loaded = scene.load("k").await.unwrap();
    assert_eq!(fingerprints(&loaded), ["ours", "theirs"]);
    assert!(version(&loaded) > ours.version);
}

/// Its versions begin again with each group.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_was_made_anew_in_go_is_what_memory_knows_then() {
    let mut scene = Scene::new(RECONCILE).await;
    let mut redis = scene.redis_client().await;
    write_in_go(&mut redis, "k", 7).await;
    assert_eq!(version(&scene.load("k").await.unwrap()), 7);
    redis_command(&mut redis, &["DEL", "group:k"]).await;
    write_in_go(&mut redis, "k", 1).await;
    assert_eq!(version(&scene.load("k").await.unwrap()), 1);
    scene.cut_off().await;
    let loaded = scene.load("k").await.unwrap();
    assert_eq!((loaded.backend, version(&loaded)), (MEMORY, 1));
    scene.reconnect().await;
    // And what was read comes back after no restart.
    scene.redis.restart().await;
    has_noticed(&scene.service, 1.0).await;
    assert_eq!(listed(&mut scene.client).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_shard_that_lost_its_data_gets_its_own_groups_back_and_the_others_none() {
    const GROUPS: usize = 96;
    let mut cluster = RedisCluster::start().await;
    let url = cluster.url();
    let start = || Service::start(&[&["--redis-url", &url], RECONCILE].concat());
    let (writer, deleter) = (start(), start());
    let (mut client, mut other) = (writer.client().await, deleter.client().await);
    let groups = || (0..GROUPS).map(|i| format!("k/{i}"));
    for key in groups() {
        assert_eq!(store(&mut client, &key, &["a"]).await.backend, REDIS);
    }
    let mut of_first = cluster.primaries[0].connect().await;
    let on_first = keys_in(&mut of_first).await;
    for key in groups() {
        if !on_first.contains(&format!("group:{key}")) {
            assert!(delete(&mut other, &key).await.deleted);
        }
    }
    drop((other, deleter));
    cluster.primaries[0].restart().await;
    has_noticed(&writer, 1.0).await;
    wait_until("its own are there", Duration::from_secs(10), async || {
        let size = client.clone().size(pb::SizeRequest::default()).await;
        size.is_ok_and(|size| size.into_inner().count == on_first.len() as i64)
    })
    .await;
    assert_eq!(
        writer.metric("groups_put_back_total").await,
        on_first.len() as f64
    );
    let mut of_first = cluster.primaries[0].connect().await;
    assert_eq!(keys_in(&mut of_first).await, on_first);
    for primary in &cluster.primaries[1..] {
        let mut connection = primary.connect().await;
        assert!(keys_in(&mut connection).await.is_empty());
    }
}

/// As when an address is given to another server and one connection of two breaks: the
/// others would go on to the server of before.
#[tokio::test(flavor = "multi_thread")]
async fn all_connections_lead_to_one_server() {
    let mut scene = Scene::new(RECONCILE).await;
    for i in 0..30 {
        scene.store(&format!("k/{i}"), &["a"]).await;
    }
    let next = RedisServer::start().await;
    scene.proxy.lead_to(next.addr()).await;
    // Of the connections that are there, one breaks.
    let mut before = scene.redis_client().await;
    kill_one_of_the_service(&mut before).await;
    wait_until("all connections have moved", HEALED_WITHIN, async || {
        of_the_service(&mut before.clone()).await.is_empty()
    })
    .await;
    // And what only the server of before has is told to the next one.
    assert_eq!(listed(&mut scene.client).await, 30);
    for i in 0..30 {
        assert_eq!(scene.store(&format!("k/{i}"), &["b"]).await.backend, REDIS);
        let loaded = scene.load(&format!("k/{i}")).await.unwrap();
        assert_eq!((loaded.backend, fingerprints(&loaded)), (REDIS, vec!["b"]));
    }
    assert_eq!(keys_in(&mut next.connect().await).await.len(), 30);
}

/// The connections of the service to a server, by their ids.
async fn of_the_service(connection: &mut MultiplexedConnection) -> Vec<String> {
    let clients = redis_command(connection, &["CLIENT", "LIST", "TYPE", "normal"]).await;
    let clients: String = redis::from_redis_value(clients).unwrap();
    let [user, _] = common::redis_server::login();
    let field = |line: &str, name: &str| {
        let mut words = line.split(' ');
        words.find_map(|word| word.strip_prefix(name).map(str::to_owned))
    };
    let ours = clients
        .lines()
        .filter(|line| field(line, "user=").as_deref() == Some(user));
    ours.filter_map(|line| field(line, "id=")).collect()
}

async fn kill_one_of_the_service(connection: &mut MultiplexedConnection) {
    let ids = of_the_service(connection).await;
    assert!(ids.len() > 1, "{ids:?}");
    let last = ids.last().unwrap();
    redis_command(connection, &["CLIENT", "KILL", "ID", last]).await;
}
