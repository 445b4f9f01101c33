//! Where a run takes place: on one Redis, or on several of which a replica takes
//! over when a primary fails.

use super::schedule::{Plan, Step};
use crate::common::{
    fault_proxy::FaultProxy,
    faults::{Fault, Site},
    redis_server::{self, RedisServer},
    replicated::{Failure, Replicated},
};

/// The servers of a run.
pub enum Ground {
    Site(Site),
    Replicated {
        redis: Replicated,
        /// How the server failed that is missing.
        fallen: Option<Failure>,
    },
}

impl Ground {
    pub async fn start(plan: &Plan) -> Self {
        match plan.ground {
            None => {
                let all = plan.instances + usize::from(plan.bystander);
                let proxies = if plan.proxied { all } else { 0 };
                Self::Site(Site::start(plan.persists, proxies).await)
            }
            Some(kind) => Self::Replicated {
                redis: Replicated::start(kind).await,
                fallen: None,
            },
        }
    }

    /// Where an instance finds Redis.
    pub fn url_for(&self, instance: usize) -> String {
        match self {
            Self::Site(site) => redis_server::url("redis", site.addr_for(instance)),
            Self::Replicated { redis, .. } => redis.url(),
        }
    }

    /// The ways with faults; none where instances connect directly.
    pub fn proxies(&self) -> &[FaultProxy] {
        match self {
            Self::Site(site) => &site.proxies,
            Self::Replicated { .. } => &[],
        }
    }

    /// Servers that hold groups.
    pub fn primaries(&self) -> &[RedisServer] {
        match self {
            Self::Site(site) => std::slice::from_ref(&site.redis),
            Self::Replicated { redis, .. } => redis.primaries(),
        }
    }

    /// Whether a fault takes data away that was acknowledged: a replica may not have all.
    pub fn is_wiped_by(&self, fault: Fault) -> bool {
        match self {
            Self::Site(site) => site.is_wiped_by(fault),
            Self::Replicated { .. } => {
                matches!(fault, Fault::Failover(_) | Fault::LaggingFailover(_))
            }
        }
    }

    /// Brings back what a fault before has left behind.
    pub async fn make_whole(&mut self) {
        if let Self::Replicated { redis, fallen } = self
            && let Some(failure) = fallen.take()
        {
            redis.bring_back(failure).await;
        }
    }

    /// Makes a fault happen; returns at its end.
    pub async fn strike(&mut self, step: &Step) {
        match (self, step.fault) {
            (Self::Site(site), _) => {
                site.strike(step.fault, step.length, |i| step.strikes(i))
                    .await
            }
            (Self::Replicated { redis, fallen }, Fault::Failover(failure)) => {
                redis.fail_over(failure).await;
                *fallen = Some(failure);
            }
            (Self::Replicated { redis, fallen }, Fault::LaggingFailover(failure)) => {
                redis.fail_over_behind(failure, step.length).await;
                *fallen = Some(failure);
            }
            (Self::Replicated { redis, .. }, Fault::MoveSlots) => redis.move_slots().await,
            (Self::Replicated { .. }, _) => unreachable!("{step} is for one Redis"),
        }
    }

    /// Waits until no request is left that may reach Redis late.
    pub async fn wait_for_stragglers(&self) {
        if let Self::Site(site) = self {
            site.wait_for_stragglers().await;
        }
    }

    /// Waits until everybody who was struck can write to Redis. A replica that has
    /// taken over takes writes at once.
    pub async fn wait_until_writable(&self, step: &Step) {
        if let Self::Site(site) = self {
            site.wait_until_writable(|i| step.strikes(i)).await;
        }
    }
}
