//! What runs in one place: Redis, two instances of the service, and replicas.

use std::time::Duration;

use futures::StreamExt;
use groupstate::{
    domain::group::AlertGroup,
    manager::remote::{RemoteSettings, RemoteStore},
    store::{Backend, Deadline, GroupStore},
};
use tokio::sync::watch;

use crate::{
    common::{redis_server::RedisServer, service::Service, stalls::Bound, wait_until},
    recorded,
    replica::Replica,
};

/// Redis syncs every write to disk, so a kill loses none. The instances drop
/// what they have written while it was away.
pub struct Site {
    pub redis: RedisServer,
    pub services: Vec<Service>,
    pub replicas: Vec<Replica>,
    /// With which all replicas are started.
    arguments: Vec<&'static str>,
    /// The addresses of the replicas, for those who send to them.
    receivers: watch::Sender<Vec<String>>,
}

/// What the replicas that run have done, together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub changes: u64,
    pub attempts: u64,
    pub conflicts: u64,
    /// Attempts of the change that took the most.
    pub most_attempts: u64,
}

const INSTANCES: usize = 2;

/// After the last fault, all is as it was within this time. The machine may be
/// busy with other tests.
const SETTLED_WITHIN: Duration = Duration::from_secs(40);

// === impl Site ===

impl Site {
    pub async fn start(replicas: usize) -> Self {
        Self::start_with(replicas, &[]).await
    }

    /// The same, with further arguments for the replicas.
    pub async fn start_with(replicas: usize, arguments: &[&'static str]) -> Self {
        let durable = ["--appendonly", "yes", "--appendfsync", "always"];
        let redis = RedisServer::start_with(&durable).await;
        let services = (0..INSTANCES)
            .map(|_| service("127.0.0.1:0", &redis))
            .collect();
        let mut site = Self {
            redis,
            services,
            replicas: Vec::new(),
            arguments: arguments.to_vec(),
            receivers: watch::channel(Vec::new()).0,
        };
        site.scale(replicas).await;
        site
    }

    /// The addresses of the replicas, now and later.
    pub fn receivers(&self) -> watch::Receiver<Vec<String>> {
        self.receivers.subscribe()
    }

    /// Starts replicas or stops the last ones. Whoever sends to those is told
    /// before.
    pub async fn scale(&mut self, replicas: usize) {
        while self.replicas.len() < replicas {
            let replica = Replica::start_with(&self.addresses(), &self.arguments).await;
            self.replicas.push(replica);
            self.publish();
        }
        let stopped = self.replicas.split_off(replicas);
        self.publish();
        for mut replica in stopped {
            replica.stop();
        }
    }

    fn publish(&self) {
        let addresses = self.replicas.iter().map(|replica| replica.addr().into());
        self.receivers.send_replace(addresses.collect());
    }

    /// The addresses of the instances.
    pub fn addresses(&self) -> Vec<String> {
        let services = self.services.iter();
        services.map(|service| service.addr().into()).collect()
    }

    pub fn start_instance_again(&mut self, number: usize) {
        let instance = &mut self.services[number];
        instance.kill();
        let addr = instance.addr().to_owned();
        self.services[number] = service(&addr, &self.redis);
    }

    /// Waits until every instance says this in `/health`.
    pub async fn are(&self, status: &str) {
        for service in &self.services {
            wait_until(status, SETTLED_WITHIN, async || {
                service.health().await["status"] == status
            })
            .await;
        }
    }

    /// Waits until Redis answers and has what the replicas were told.
    pub async fn settled(&self) {
        self.are("ok").await;
        for replica in &self.replicas {
            wait_until("the outbox is delivered", SETTLED_WITHIN, async || {
                replica.metric("outbox_reports").await == 0
            })
            .await;
            assert_eq!(replica.metric("outbox_refused_total").await, 0);
        }
    }

    /// All groups, as Redis has them by the word of an instance.
    pub async fn groups(&self) -> Vec<AlertGroup> {
        let bound = Bound::of(SETTLED_WITHIN);
        loop {
            if let Some(groups) = self.groups_of_redis().await {
                return groups;
            }
            bound.assert_holds("Redis answers");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// None if it is not Redis that answers, or not to the end.
    async fn groups_of_redis(&self) -> Option<Vec<AlertGroup>> {
        let addr = self.services[0].addr();
        let store = RemoteStore::at(addr, RemoteSettings::default()).unwrap();
        let answer = store.load_all("", Deadline::NONE).await.ok()?;
        if answer.backend != Backend::Redis {
            return None;
        }
        let batches: Vec<_> = answer.value.collect().await;
        let mut groups = Vec::new();
        let mut complete = false;
        for batch in batches {
            let batch = batch.ok()?;
            assert!(batch.problems.is_empty(), "{:?}", batch.problems);
            groups.extend(batch.groups);
            complete |= batch.complete == Some(true);
        }
        complete.then_some(groups)
    }

    /// The recorded groups hold exactly their alerts.
    pub async fn holds_what_was_recorded(&self) {
        self.settled().await;
        let differences = recorded::differences(&self.groups().await);
        assert!(
            differences.is_empty(),
            "{} differences, such as {:#?}",
            differences.len(),
            &differences[..differences.len().min(5)]
        );
    }

    pub async fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for replica in &self.replicas {
            tally.changes += replica.metric("changes_total").await;
            tally.attempts += replica.metric("attempts_total").await;
            tally.conflicts += replica.metric("conflicts_total").await;
            let most = replica.metric("most_attempts").await;
            tally.most_attempts = tally.most_attempts.max(most);
        }
        tally
    }
}

impl Tally {
    pub fn attempts_per_change(&self) -> f64 {
        self.attempts as f64 / self.changes as f64
    }
}

fn service(addr: &str, redis: &RedisServer) -> Service {
    let url = redis.url();
    Service::start_on(addr, &["--redis-url", &url, "--on-recovery", "discard"])
}
