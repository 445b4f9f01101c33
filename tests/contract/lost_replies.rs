//! A reply that is lost after Redis has executed the write: the call must not
//! write twice, not overwrite what came after, and not say what it cannot know.

use std::{sync::Arc, time::Duration};

use groupstate::{
    domain::{group::AlertGroup, version::Version},
    store::{Deadline, Deletion, GroupStore, Reply, StoreError, Swap, Written},
};

use crate::{
    common::{group, proxy::Proxy, redis_server::RedisServer},
    store_at,
    suite::{HOUR, Store, get, key, put},
};

/// A store behind a proxy that can lose replies, and another writer that talks
/// to the same Redis directly.
struct Scene {
    server: RedisServer,
    proxy: Arc<Proxy>,
    store: Store,
    other: Store,
}

impl Scene {
    async fn new() -> Self {
        let server = RedisServer::start().await;
        let proxy = Arc::new(Proxy::start(server.addr()).await);
        // Long enough that the other writer always comes before the repeat.
        let timeout = Duration::from_secs(2);
        let scene = Self {
            store: store_at(&proxy.url(), timeout).await,
            other: store_at(&server.url(), timeout).await,
            proxy,
            server,
        };
        // The scripts and the clock are known from here on, so that the next
        // reply to a script call is the one to a write.
        put(&scene.store, &group("warm", &[])).await;
        scene
            .store
            .delete(&key("warm"), None, Deadline::NONE)
            .await
            .unwrap();
        scene
    }

    /// Makes a call whose first reply is swallowed; `meanwhile` happens after
    /// Redis has executed it and before it is repeated.
    async fn lose_reply<T: Send + 'static>(
        &self,
        call: impl AsyncCall<T>,
        meanwhile: impl Future<Output = ()>,
    ) -> T {
        self.proxy.swallow_next_reply();
        let deadline = Deadline::at(tokio::time::Instant::now() + Duration::from_secs(10));
        let task = tokio::spawn(call.call(self.store.clone(), deadline));
        self.proxy.swallowed().await;
        meanwhile.await;
        self.proxy.release();
        task.await.unwrap()
    }
}

/// A call on a store, to be made in a task of its own.
trait AsyncCall<T> {
    fn call(self, store: Store, deadline: Deadline) -> impl Future<Output = T> + Send + 'static;
}

impl<T, F, Fut> AsyncCall<T> for F
where
    F: FnOnce(Store, Deadline) -> Fut,
    Fut: Future<Output = T> + Send + 'static,
{
    fn call(self, store: Store, deadline: Deadline) -> impl Future<Output = T> + Send + 'static {
        self(store, deadline)
    }
}

fn store_call(group: AlertGroup) -> impl AsyncCall<Reply<Written>> {
    async move |store: Store, deadline: Deadline| store.store(&group, HOUR, deadline).await
}

fn swap_call(group: AlertGroup, expected: Option<Version>) -> impl AsyncCall<Reply<Swap>> {
    async move |store: Store, deadline: Deadline| {
        store
            .compare_and_swap(&group, expected, HOUR, deadline)
            .await
    }
}

fn delete_call(expected: Option<Version>) -> impl AsyncCall<Reply<Deletion>> {
    async move |store: Store, deadline: Deadline| store.delete(&key("k"), expected, deadline).await
}

async fn nothing() {}

fn assert_unknown<T: std::fmt::Debug>(reply: Reply<T>) {
    assert_eq!(reply.unwrap_err().error, StoreError::OutcomeUnknown);
}

async fn delete(store: &Arc<dyn GroupStore>) {
    store.delete(&key("k"), None, Deadline::NONE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_reply_is_lost_is_recognised_by_its_write_id() {
    let scene = Scene::new().await;
    let reply = scene
        .lose_reply(store_call(group("k", &["mine"])), nothing())
        .await;
    let written = reply.unwrap().value;
    let read = get(&scene.other, "k").await.unwrap();
    assert_eq!(
        read.metadata.version,
        Some(written.version),
        "not written twice"
    );
    assert!(written.expires.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_reply_is_lost_does_not_overwrite_a_later_writer() {
    let scene = Scene::new().await;
    let later = async {
        put(&scene.other, &group("k", &["theirs"])).await;
    };
    assert_unknown(
        scene
            .lose_reply(store_call(group("k", &["mine"])), later)
            .await,
    );
    assert!(
        get(&scene.other, "k")
            .await
            .unwrap()
            .alerts
            .contains_key("theirs")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_reply_is_lost_does_not_undo_a_later_delete() {
    let scene = Scene::new().await;
    let later = delete(&scene.other);
    assert_unknown(
        scene
            .lose_reply(store_call(group("k", &["mine"])), later)
            .await,
    );
    assert_eq!(get(&scene.other, "k").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_whose_reply_is_lost_is_recognised_by_its_write_id() {
    let scene = Scene::new().await;
    let first = put(&scene.other, &group("k", &["first"])).await.version;
    let reply = scene
        .lose_reply(swap_call(group("k", &["mine"]), Some(first)), nothing())
        .await;
    let Swap::Swapped(written) = reply.unwrap().value else {
        panic!("lost against itself");
    };
    let read = get(&scene.other, "k").await.unwrap();
    assert_eq!(read.metadata.version, Some(written.version));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_whose_reply_is_lost_is_recognised_by_its_write_id() {
    let scene = Scene::new().await;
    let reply = scene
        .lose_reply(swap_call(group("k", &["mine"]), None), nothing())
        .await;
    assert!(matches!(reply.unwrap().value, Swap::Swapped(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_whose_reply_is_lost_does_not_overwrite_a_later_writer() {
    let scene = Scene::new().await;
    let first = put(&scene.other, &group("k", &["first"])).await.version;
    let later = async {
        put(&scene.other, &group("k", &["theirs"])).await;
    };
    let reply = scene
        .lose_reply(swap_call(group("k", &["mine"]), Some(first)), later)
        .await;
    assert_unknown(reply);
    assert!(
        get(&scene.other, "k")
            .await
            .unwrap()
            .alerts
            .contains_key("theirs")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_whose_reply_is_lost_does_not_undo_a_later_delete() {
    let scene = Scene::new().await;
    let later = delete(&scene.other);
    let reply = scene
        .lose_reply(swap_call(group("k", &["mine"]), None), later)
        .await;
    assert_unknown(reply);
    assert_eq!(get(&scene.other, "k").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_race_whose_reply_is_lost_is_still_a_lost_race() {
    let scene = Scene::new().await;
    let stale = put(&scene.other, &group("k", &["first"])).await.version;
    let current = put(&scene.other, &group("k", &["second"])).await.version;
    // Only what was surely written before the call is surely another's; how
    // far back that is depends on how well the clock of Redis is known.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let reply = scene
        .lose_reply(swap_call(group("k", &["mine"]), Some(stale)), nothing())
        .await;
    let Swap::Lost {
        current: Some(found),
    } = reply.unwrap().value
    else {
        panic!("swapped");
    };
    assert_eq!(found.metadata.version, Some(current));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_whose_reply_is_lost_does_not_claim_what_it_cannot_know() {
    let scene = Scene::new().await;
    put(&scene.other, &group("k", &["first"])).await;
    assert_unknown(scene.lose_reply(delete_call(None), nothing()).await);
    assert_eq!(get(&scene.other, "k").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_whose_reply_is_lost_does_not_delete_a_later_group() {
    let scene = Scene::new().await;
    let first = put(&scene.other, &group("k", &["first"])).await.version;
    for expected in [None, Some(first)] {
        let later = async {
            put(&scene.other, &group("k", &["theirs"])).await;
        };
        assert_unknown(scene.lose_reply(delete_call(expected), later).await);
        assert!(
            get(&scene.other, "k")
                .await
                .unwrap()
                .alerts
                .contains_key("theirs")
        );
    }
}

/// Whatever has replaced the group since: the call may have been executed
/// before that, and must not say that it was refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_reply_is_lost_does_not_claim_that_it_was_refused() {
    let scene = Scene::new().await;
    let replace = async |commands: &[&[&str]]| {
        let mut connection = scene.server.connect().await;
        for command in commands {
            let mut sent = redis::cmd(command[0]);
            sent.arg(&command[1..]);
            let _: redis::Value = sent.query_async(&mut connection).await.unwrap();
        }
    };
    let foreign: &[&[&str]] = &[&["DEL", "group:k"], &["RPUSH", "group:k", "x"]];
    let unreadable: &[&[&str]] = &[&["SET", "group:k", "not JSON"]];
    for replaced in [foreign, unreadable] {
        let mine = || group("k", &["mine"]);
        replace(&[&["DEL", "group:k"]]).await;
        assert_unknown(
            scene
                .lose_reply(store_call(mine()), replace(replaced))
                .await,
        );

        replace(&[&["DEL", "group:k"]]).await;
        assert_unknown(
            scene
                .lose_reply(swap_call(mine(), None), replace(replaced))
                .await,
        );

        replace(&[&["DEL", "group:k"]]).await;
        let version = put(&scene.other, &mine()).await.version;
        let delete = delete_call(Some(version));
        assert_unknown(scene.lose_reply(delete, replace(replaced)).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_replies_are_lost_is_recognised_or_unknown() {
    let scene = Scene::new().await;
    let groups: Vec<_> = (0..20).map(|i| group(&format!("k/{i}"), &[])).collect();
    let batch = groups.clone();
    let call =
        async move |store: Store, deadline: Deadline| store.store_all(&batch, HOUR, deadline).await;
    let replies = scene.lose_reply(call, nothing()).await;
    let mut recognised = 0;
    for (group, reply) in groups.iter().zip(replies) {
        let read = get(&scene.other, group.key.as_str()).await;
        match reply {
            Ok(answer) => {
                recognised += 1;
                let version = read.unwrap().metadata.version;
                assert_eq!(version, Some(answer.value.version), "written once");
            }
            // The connection may close before all of the batch has reached
            // Redis; an absent group may have been deleted by another.
            Err(failure) => {
                assert_eq!(failure.error, StoreError::OutcomeUnknown);
                assert_eq!(read, None);
            }
        }
    }
    assert!(recognised > 0);
}

/// A middlebox may end a connection whose last request still arrives. Its repeat
/// must not be executed, and answered, before that: others write in between, and
/// the request would overwrite them.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_outlives_its_connection_does_not_overwrite_a_later_writer() {
    let scene = Scene::new().await;
    put(&scene.other, &group("k", &["first"])).await;
    // The call has to be surely later, by what is known of the clock of Redis.
    tokio::time::sleep(Duration::from_millis(500)).await;
    scene.proxy.detach_next_request();
    put(&scene.store, &group("k", &["mine"])).await;
    put(&scene.other, &group("k", &["theirs"])).await;
    tokio::time::sleep(2 * Proxy::DETOUR).await;
    let read = get(&scene.other, "k").await.unwrap();
    assert!(read.alerts.contains_key("theirs"), "{read:?}");
}
