//! Passwords and certificates that change while the service runs.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use groupstate::grpc::proto as pb;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::{
    common::{
        certificates::Valid,
        redis_server::{self, RedisServer, url},
        redis_tls::{Authority, tls_server},
        replicated::{Kind, Replicated},
        service::Service,
        wait_until,
    },
    store_request, works_on_redis,
};

/// Much longer than the service of these tests leaves between two looks, and than
/// a connection takes.
const TAKEN_WITHIN: Duration = Duration::from_secs(5);
const TAKEN: &str = "that have changed are used";

/// Calls all the time, each of which Redis must answer.
struct Calls {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    calling: JoinHandle<()>,
}

/// Enough for some to meet what has changed.
const SOME_CALLS: usize = 50;
const CALLED_WITHIN: Duration = Duration::from_secs(10);

impl Calls {
    async fn start(service: &Service) -> Self {
        let mut client = service.client().await;
        let (stop, answered) = <(Arc<AtomicBool>, Arc<AtomicUsize>)>::default();
        let (stopped, count) = (stop.clone(), answered.clone());
        let calling = tokio::spawn(async move {
            while !stopped.load(Ordering::SeqCst) {
                let stored = client.store(store_request("k")).await.unwrap();
                assert_eq!(stored.get_ref().backend(), pb::Backend::Redis);
                count.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        Self {
            stop,
            answered,
            calling,
        }
    }

    /// Waits until some more are answered.
    async fn go_on(&self) {
        let enough = self.answered.load(Ordering::SeqCst) + SOME_CALLS;
        wait_until("more calls are answered", CALLED_WITHIN, async || {
            self.calling.is_finished() || self.answered.load(Ordering::SeqCst) >= enough
        })
        .await;
    }

    /// Ends them after some more.
    async fn end(self) {
        self.go_on().await;
        self.stop.store(true, Ordering::SeqCst);
        self.calling.await.unwrap();
    }
}

/// A service that has the password from a file.
struct Scene {
    folder: TempDir,
    service: Service,
}

impl Scene {
    /// Over the Redis that a URL without user and password names.
    async fn new(url: &str) -> Self {
        let [user, password] = redis_server::login();
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("password");
        fs::write(&file, format!("{password}\n")).unwrap();
        let service = Service::start(&[
            "--redis-url",
            url,
            "--redis-username",
            user,
            "--redis-password-file",
            file.to_str().unwrap(),
            "--reload-interval",
            "100ms",
        ]);
        works_on_redis(&service).await;
        Self { folder, service }
    }

    fn write_password(&self, password: &str) {
        fs::write(self.folder.path().join("password"), password).unwrap();
    }

    /// First these servers take both passwords, then the file has the new one, then
    /// they take no other.
    async fn changes_the_password(&self, servers: &[RedisServer]) {
        let [_, old] = redis_server::login();
        let calls = Calls::start(&self.service).await;
        set_user(servers, ">n3w-password").await;
        self.write_password("n3w-password\n");
        self.service.wait_for_log(TAKEN, TAKEN_WITHIN);
        set_user(servers, &format!("<{old}")).await;
        calls.end().await;

        kill_connections(servers).await;
        works_on_redis(&self.service).await;
        let told = |line: &String| line.contains("n3w");
        assert!(!self.service.log().iter().any(told));
    }
}

/// Changes the user as whom the service logs in.
async fn set_user(servers: &[RedisServer], rule: &str) {
    let [user, _] = redis_server::login();
    for server in servers {
        let () = admin(server, &["ACL", "SETUSER", user, rule]).await;
    }
}

/// Breaks all connections of that user: new ones have to log in.
async fn kill_connections(servers: &[RedisServer]) {
    let [user, _] = redis_server::login();
    for server in servers {
        let killed: usize = admin(server, &["CLIENT", "KILL", "USER", user]).await;
        assert!(killed > 0);
    }
}

async fn admin<T: redis::FromRedisValue>(redis: &RedisServer, words: &[&str]) -> T {
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]);
    command
        .query_async(&mut redis.connect().await)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_changes_costs_no_call() {
    let redis = [RedisServer::start().await];
    let scene = Scene::new(&without_login(&redis[0].url())).await;
    scene.changes_the_password(&redis).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_changes_costs_no_call_by_sentinel_or_in_a_cluster() {
    for kind in [Kind::Sentinel, Kind::Cluster] {
        let redis = Replicated::start(kind).await;
        let scene = Scene::new(&without_login(&redis.url())).await;
        scene.changes_the_password(redis.primaries()).await;
    }
}

fn without_login(url: &str) -> String {
    let [user, password] = redis_server::login();
    url.replace(&format!("{user}:{password}@"), "")
}

/// It may be in the file before Redis knows it, or be wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_redis_does_not_take_is_said_and_the_one_of_before_is_used() {
    let redis = [RedisServer::start().await];
    let scene = Scene::new(&without_login(&redis[0].url())).await;
    let calls = Calls::start(&scene.service).await;
    scene.write_password("n3w-password");
    let said = scene.service.wait_for_log("does not take", TAKEN_WITHIN);
    assert!(
        said.contains("WRONGPASS") && said.contains("WARN"),
        "{said}"
    );
    // An empty file is no new password.
    scene.write_password("");
    scene.service.wait_for_log("of no use", TAKEN_WITHIN);
    calls.end().await;
    // New connections have the password that was right.
    kill_connections(&redis).await;
    works_on_redis(&scene.service).await;

    set_user(&redis, ">n3w-password").await;
    scene.service.wait_for_log(TAKEN, TAKEN_WITHIN);
    works_on_redis(&scene.service).await;
    assert!(scene.service.log().iter().all(|line| !line.contains("n3w")));
}

/// Redis gets a certificate of another authority, and so do we.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_change_are_used() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let (redis, addr) = tls_server(&old, &old.ca.issue(Valid::Now), true).await;
    let [cert, key] = old.files("us", &old.ca.issue(Valid::Now));
    let service = Service::start(
        &[
            ["--redis-url", &url("rediss", addr)],
            ["--redis-ca", &old.ca()],
            ["--redis-cert", &cert],
            ["--redis-key", &key],
            ["--reload-interval", "100ms"],
        ]
        .concat(),
    );
    works_on_redis(&service).await;

    let calls = Calls::start(&service).await;
    let both = format!("{}{}", old.ca.pem, new.ca.pem);
    fs::write(old.ca(), &both).unwrap();
    service.wait_for_log(TAKEN, TAKEN_WITHIN);
    calls.end().await;
    let [server_cert, server_key] = new.files("server", &new.ca.issue(Valid::Now));
    let () = admin(
        &redis,
        &[
            &["CONFIG", "SET"][..],
            &["tls-cert-file", &server_cert, "tls-key-file", &server_key],
            &["tls-ca-cert-file", &new.ca()],
        ]
        .concat(),
    )
    .await;
    // The old certificate of ours is believed no more.
    new.ca.issue(Valid::Now).write(old.folder(), "us");
    let taken = |line: &String| line.contains(TAKEN);
    wait_until("both are used", TAKEN_WITHIN, async || {
        service.log().iter().filter(|line| taken(line)).count() >= 2
    })
    .await;
    kill_connections(std::slice::from_ref(&redis)).await;
    works_on_redis(&service).await;
}
