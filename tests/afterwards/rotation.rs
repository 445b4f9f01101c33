//! Passwords and certificates that change while the service runs.

use std::{fs, net::SocketAddr, time::Duration};

use tempfile::TempDir;

use crate::{
    common::{
        certificates::Valid,
        redis_server::{self, RedisServer},
        redis_tls::{Authority, tls_server},
        service::Service,
        wait_until,
    },
    scene::{Ground, Report, Scene, Switch},
};

const TAKEN_WITHIN: Duration = Duration::from_secs(5);
const TIMES: usize = 2;

/// A Redis whose password the service has from a file.
struct WithPassword {
    redis: RedisServer,
    folder: TempDir,
}

/// A Redis that takes clients of one authority, by TLS.
struct WithCertificates {
    redis: RedisServer,
    addr: SocketAddr,
    authority: Authority,
    settings: Vec<String>,
}

impl Ground for WithPassword {
    fn settings(&self) -> Vec<String> {
        let [user, _] = redis_server::login();
        let file = self.folder.path().join("password");
        [
            ["--redis-url", &self.redis.admin_url()],
            ["--redis-username", user],
            ["--redis-password-file", &file.display().to_string()],
            ["--reload-interval", "100ms"],
        ]
        .as_flattened()
        .iter()
        .map(ToString::to_string)
        .collect()
    }

    fn primaries(&self) -> &[RedisServer] {
        std::slice::from_ref(&self.redis)
    }
}

impl WithPassword {
    /// From now on Redis takes no other.
    async fn change_to(&self, password: &str, service: &Service) {
        let taken = count_taken(service);
        self.allow(&format!(">{password}")).await;
        fs::write(self.folder.path().join("password"), password).unwrap();
        wait_until_taken(service, taken + 1).await;
        self.allow("resetpass").await;
        self.allow(&format!(">{password}")).await;
    }

    async fn allow(&self, rule: &str) {
        let [user, _] = redis_server::login();
        let mut set = redis::cmd("ACL");
        let set = set.arg(&["SETUSER", user, rule]);
        let () = set
            .query_async(&mut self.redis.connect().await)
            .await
            .unwrap();
    }
}

impl Ground for WithCertificates {
    fn settings(&self) -> Vec<String> {
        let url = redis_server::url("rediss", self.addr);
        let more = [["--redis-url", &url], ["--reload-interval", "100ms"]];
        let more = more.as_flattened().iter().map(ToString::to_string);
        self.settings.iter().cloned().chain(more).collect()
    }

    fn primaries(&self) -> &[RedisServer] {
        std::slice::from_ref(&self.redis)
    }
}

/// A password that changes again and again.
pub async fn password(rounds: usize) -> Report {
    let [_, password] = redis_server::login();
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("password"), password).unwrap();
    let redis = RedisServer::start().await;
    let mut scene = Scene::new(WithPassword { redis, folder }, rounds).await;
    let change = async |ground: &mut WithPassword, service: &Service| {
        for time in 0..TIMES {
            ground.change_to(&format!("n3w-{time}"), service).await;
        }
    };
    scene
        .after("a new password", Switch::MayStayClosed, change)
        .await;
    scene.end()
}

/// A certificate of ours that changes again and again.
pub async fn certificates(rounds: usize) -> Report {
    let authority = Authority::new("ours");
    let (redis, addr) = tls_server(&authority, &authority.ca.issue(Valid::Now), true).await;
    let [cert, key] = authority.files("us", &authority.ca.issue(Valid::Now));
    let settings = [
        ["--redis-ca", &authority.ca()],
        ["--redis-cert", &cert],
        ["--redis-key", &key],
    ];
    let ground = WithCertificates {
        settings: settings
            .as_flattened()
            .iter()
            .map(ToString::to_string)
            .collect(),
        redis,
        addr,
        authority,
    };
    let mut scene = Scene::new(ground, rounds).await;
    let change = async |ground: &mut WithCertificates, service: &Service| {
        for _ in 0..TIMES {
            let taken = count_taken(service);
            let authority = &ground.authority;
            authority.files("us", &authority.ca.issue(Valid::Now));
            wait_until_taken(service, taken + 1).await;
        }
    };
    scene
        .after("a new certificate", Switch::MayStayClosed, change)
        .await;
    scene.end()
}

/// How often the service has said that it uses what has changed.
fn count_taken(service: &Service) -> usize {
    let log = service.log();
    log.iter()
        .filter(|line| line.contains("that have changed are used"))
        .count()
}

async fn wait_until_taken(service: &Service, times: usize) {
    wait_until("what has changed is used", TAKEN_WITHIN, async || {
        count_taken(service) >= times
    })
    .await;
}
