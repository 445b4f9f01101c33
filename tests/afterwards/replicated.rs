//! Replicas that take over, by sentinels and in a cluster.

use std::time::Duration;

use crate::{
    common::{
        redis_server::RedisServer,
        replicated::{Failure, Kind, Replicated},
        service::Service,
    },
    scene::{Ground, Report, Scene, Switch},
};

/// Long enough for a silence to be noticed.
const LENGTH: Duration = Duration::from_millis(1_500);

impl Ground for Replicated {
    fn settings(&self) -> Vec<String> {
        ["--redis-url", &self.url(), "--on-recovery", "reconcile"]
            .map(ToOwned::to_owned)
            .to_vec()
    }

    fn primaries(&self) -> &[RedisServer] {
        Self::primaries(self)
    }
}

/// A primary fails, a replica takes over, and the primary comes back as a replica.
pub async fn failovers(kind: Kind, rounds: usize) -> Report {
    let mut scene = Scene::new(Replicated::start(kind).await, rounds).await;
    for failure in [Failure::Hang, Failure::Kill] {
        let fails = async |redis: &mut Replicated, _: &Service| {
            redis.fail_over(failure).await;
            redis.bring_back(failure).await;
        };
        let name = format!("failover by {failure}, {kind}");
        scene.after(&name, Switch::Opens, fails).await;
    }
    scene.end()
}

/// A primary hangs or is killed and comes back before anybody takes over.
pub async fn outages(kind: Kind, rounds: usize) -> Report {
    let mut scene = Scene::new(Replicated::start_patient(kind).await, rounds).await;
    for failure in [Failure::Hang, Failure::Kill] {
        let fails =
            async |redis: &mut Replicated, _: &Service| redis.fail_for(failure, LENGTH).await;
        let name = format!("{failure}, {kind}");
        scene.after(&name, Switch::Opens, fails).await;
    }
    scene.end()
}
