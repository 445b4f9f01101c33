//! Everything that happens to one Redis and to the way to it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use groupstate::grpc::proto as pb;

use crate::{
    common::{
        fault_proxy::Direction,
        faults::{Fault, Site},
        redis_server::{self, RedisServer},
        service::Service,
    },
    scene::{Ground, Report, Scene, Switch},
};

/// Long enough for a silence to be noticed.
const LENGTH: Duration = Duration::from_millis(1_500);
/// A caller that nobody answers asks again after this.
const CALL_BOUND: Duration = Duration::from_secs(2);

/// Who calls while a fault lasts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Callers {
    One,
    Nobody,
}

impl Ground for Site {
    fn settings(&self) -> Vec<String> {
        let url = redis_server::url("redis", self.addr_for(0));
        ["--redis-url", &url, "--on-recovery", "reconcile"]
            .map(ToOwned::to_owned)
            .to_vec()
    }

    fn primaries(&self) -> &[RedisServer] {
        std::slice::from_ref(&self.redis)
    }
}

/// Redis says nothing for a while.
pub async fn silent(rounds: usize) -> Report {
    let mut scene = Scene::new(Site::start(false, 0).await, rounds).await;
    strike(&mut scene, Fault::Hang, Callers::Nobody).await;
    for fault in [
        Fault::Hang,
        Fault::Pause { writes_only: false },
        Fault::Pause { writes_only: true },
        Fault::BusyScript,
        Fault::FlapHang(Duration::from_millis(250)),
    ] {
        strike(&mut scene, fault, Callers::One).await;
    }
    scene.end()
}

/// Redis answers, and refuses.
pub async fn refusing(rounds: usize) -> Report {
    let mut scene = Scene::new(Site::start(false, 0).await, rounds).await;
    for fault in [
        Fault::ReadOnly { serve_stale: true },
        Fault::ReadOnly { serve_stale: false },
        Fault::OutOfMemory,
        Fault::Misconfigured,
        Fault::Password,
    ] {
        strike(&mut scene, fault, Callers::One).await;
    }
    scene.end()
}

/// Redis ends, and comes back with its groups or without.
pub async fn gone(rounds: usize) -> Report {
    let mut scene = Scene::new(Site::start(true, 0).await, rounds).await;
    strike(&mut scene, Fault::Kill, Callers::One).await;
    let loading = Fault::Loading(Duration::from_millis(800));
    strike(&mut scene, loading, Callers::One).await;
    let kept = scene.end();
    let mut scene = Scene::new(Site::start(false, 0).await, rounds).await;
    strike(&mut scene, Fault::Kill, Callers::One).await;
    let mut emptied = scene.end();
    emptied.rows[0].failure.push_str(", comes back empty");
    kept.join(emptied)
}

/// The way to Redis ends.
pub async fn disconnected(rounds: usize) -> Report {
    let mut scene = Scene::new(Site::start(false, 1).await, rounds).await;
    for fault in [
        Fault::Refuse,
        Fault::AcceptAndClose,
        Fault::Reset,
        Fault::FlapReset(Duration::from_millis(150)),
    ] {
        strike(&mut scene, fault, Callers::One).await;
    }
    scene.end()
}

/// The way to Redis is there, and nothing comes over it, or late.
pub async fn out_of_reach(rounds: usize) -> Report {
    let mut scene = Scene::new(Site::start(false, 1).await, rounds).await;
    let black_hole = |direction, reset_after| Fault::BlackHole {
        direction,
        reset_after,
    };
    for fault in [
        black_hole(Direction::Both, false),
        black_hole(Direction::Both, true),
        black_hole(Direction::ToServer, false),
        black_hole(Direction::FromServer, false),
        Fault::Partition,
        Fault::Delay(Duration::from_millis(30)),
        Fault::Delay(Duration::from_millis(400)),
        Fault::Stragglers(Duration::from_millis(300)),
    ] {
        strike(&mut scene, fault, Callers::One).await;
    }
    scene.end()
}

async fn strike(scene: &mut Scene<Site>, fault: Fault, callers: Callers) {
    let switch = match fault {
        Fault::Reset | Fault::FlapReset(_) | Fault::FlapHang(_) => Switch::MayStayClosed,
        Fault::Delay(delay) if delay < Duration::from_millis(100) => Switch::MayStayClosed,
        _ => Switch::Opens,
    };
    let name = match (callers, fault) {
        (Callers::Nobody, _) => format!("{}, nobody calls", fault.name()),
        (Callers::One, Fault::Delay(delay)) => format!("{} of {delay:?}", fault.name()),
        (
            Callers::One,
            Fault::BlackHole {
                reset_after: true, ..
            },
        ) => {
            format!("{}, then reset", fault.name())
        }
        (Callers::One, _) => fault.name().to_owned(),
    };
    let happens = async |site: &mut Site, service: &Service| {
        let over = AtomicBool::new(false);
        let calls = async {
            if callers == Callers::One {
                call_until(&over, service).await;
            }
        };
        let strikes = async {
            site.strike(fault, LENGTH, |_| true).await;
            over.store(true, Ordering::Relaxed);
        };
        tokio::join!(calls, strikes);
        site.wait_until_writable(|_| true).await;
        site.wait_for_stragglers().await;
    };
    scene.after(&name, switch, happens).await;
}

/// Stores and loads, whoever answers.
async fn call_until(over: &AtomicBool, service: &Service) {
    let mut client = service.client().await;
    while !over.load(Ordering::Relaxed) {
        let call = async {
            let request = pb::StoreRequest {
                group: Some(pb::AlertGroup {
                    key: "meanwhile".into(),
                    ..Default::default()
                }),
                expiry: None,
            };
            let _ = client.store(request).await;
            let request = pb::LoadRequest {
                key: "meanwhile".into(),
                include_expire_time: false,
            };
            let _ = client.load(request).await;
        };
        let _ = tokio::time::timeout(CALL_BOUND, call).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
