//! The copies that a replica has of groups: what is forgotten, listed and found.

use std::time::Duration;

use groupstate::manager::{AlertGroupManager, ManagerSettings, known::Filter};
use redis::AsyncCommands;

use crate::{add, common::wait_until, firing, key, replica, replica_with, service};

fn listed(manager: &AlertGroupManager, filter: &Filter) -> Vec<String> {
    let groups = manager.list(filter).into_iter();
    groups.map(|group| group.key.to_string()).collect()
}

/// What cannot be read is there: the copy is all that a replica has of it.
#[tokio::test]
async fn a_restore_does_not_forget_what_the_store_has_but_cannot_read() {
    let (redis, service) = service().await;
    let manager = replica(&[&service]).await;
    for name in ["damaged", "gone", "there"] {
        add(&manager, name, vec![firing("a")]).await;
    }
    let mut admin = redis.connect().await;
    let () = admin.set("group:damaged", "{").await.unwrap();
    let () = admin.del("group:gone").await.unwrap();
    let restored = manager.restore().await.unwrap();
    assert_eq!((restored.groups, restored.forgotten), (1, 1));
    assert_eq!(restored.problems.len(), 1);
    assert_eq!(listed(&manager, &Filter::default()), ["damaged", "there"]);
}

/// A listing may miss a group that was deleted and made anew while it went on.
#[tokio::test(flavor = "multi_thread")]
async fn a_restore_does_not_forget_a_group_that_was_made_anew_meanwhile() {
    let (_redis, service) = service().await;
    let (manager, other) = (replica(&[&service]).await, replica(&[&service]).await);
    for number in 0..50 {
        add(&manager, &format!("k/{number}"), vec![firing("a")]).await;
    }
    let names: Vec<String> = (0..50).map(|number| format!("k/{number}")).collect();
    for _ in 0..5 {
        let churn = async {
            for name in &names {
                other.remove_alert(&key(name), "a").await.unwrap();
                add(&other, name, vec![firing("a")]).await;
            }
        };
        let (restored, ()) = tokio::join!(manager.restore(), churn);
        restored.unwrap();
    }
    assert!(manager.restore().await.unwrap().complete);
    assert_eq!(listed(&manager, &Filter::default()).len(), 50);
}

#[tokio::test]
async fn what_others_have_deleted_is_not_listed_or_found_for_long() {
    let (_redis, service) = service().await;
    let settings = ManagerSettings {
        max_copy_age: Duration::from_secs(3),
        ..ManagerSettings::default()
    };
    let manager = replica_with(&[&service], settings).await;
    let other = replica(&[&service]).await;
    add(&manager, "k", vec![firing("a")]).await;
    add(&manager, "l", vec![firing("b")]).await;
    other.remove_alert(&key("k"), "a").await.unwrap();
    wait_until("it is not listed", Duration::from_secs(15), async || {
        listed(&manager, &Filter::default()).is_empty()
    })
    .await;
    let all = Filter {
        unconfirmed: true,
        ..Filter::default()
    };
    assert_eq!(listed(&manager, &all), ["k", "l"]);
    assert_eq!(manager.stats().known.groups, 0);
    assert_eq!(manager.find_by_fingerprint("a").await.unwrap(), []);
    let restored = manager.restore().await.unwrap();
    assert_eq!(listed(&manager, &Filter::default()), ["l"]);
    assert_eq!((restored.groups, restored.forgotten), (1, 0));
}

/// The group that held it holds it no more, and another one does.
#[tokio::test]
async fn an_alert_is_found_in_a_group_that_this_replica_did_not_know() {
    let (_redis, service) = service().await;
    let (manager, other) = (replica(&[&service]).await, replica(&[&service]).await);
    add(&manager, "old", vec![firing("a")]).await;
    other.remove_alert(&key("old"), "a").await.unwrap();
    add(&other, "new", vec![firing("a")]).await;
    let found = manager.find_by_fingerprint("a").await.unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].key.as_str(), "new");
}

#[tokio::test]
async fn without_any_answer_a_copy_is_found_for_as_long_as_it_is_listed() {
    let (_redis, mut service) = service().await;
    let settings = ManagerSettings {
        max_copy_age: Duration::from_secs(5),
        ..ManagerSettings::default()
    };
    let manager = replica_with(&[&service], settings).await;
    add(&manager, "k", vec![firing("a")]).await;
    service.kill();
    assert_eq!(manager.find_by_fingerprint("a").await.unwrap().len(), 1);
    wait_until("it is not listed", Duration::from_secs(15), async || {
        listed(&manager, &Filter::default()).is_empty()
    })
    .await;
    // Nobody can say where it is.
    assert!(manager.find_by_fingerprint("a").await.is_err());
    // One that is asked for by its key stands in all the same.
    assert!(manager.get(&key("k")).await.unwrap().is_some());
}
