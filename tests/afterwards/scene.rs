//! A service, the failures it has seen, and what came of them.

use std::time::Duration;

use crate::common::{
    condition::{Condition, Subject},
    redis_server::RedisServer,
    service::Service,
    wait_until,
};

/// Where a service has its groups.
pub trait Ground {
    /// Settings of the service.
    fn settings(&self) -> Vec<String>;

    /// Servers that hold groups at the moment.
    fn primaries(&self) -> &[RedisServer];
}

/// A service that meets one failure after the other.
pub struct Scene<G> {
    pub ground: G,
    service: Service,
    rounds: usize,
    before: Condition,
    report: Report,
}

/// What came of the failures.
#[derive(Default)]
pub struct Report {
    pub rows: Vec<Row>,
}

/// What came of one.
pub struct Row {
    pub failure: String,
    pub before: Condition,
    /// None when the service did not answer from Redis.
    pub after: Option<Condition>,
    /// What is worse than before.
    pub worse: Vec<String>,
}

/// Whether the switch has to open for a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    Opens,
    MayStayClosed,
}

/// Longer than is promised: how soon Redis is used again is asked elsewhere.
const BACK_WITHIN: Duration = Duration::from_secs(10);

// === impl Scene ===

impl<G: Ground> Scene<G> {
    /// A service in good health. `rounds`: how often each rpc is called in a look.
    pub async fn new(ground: G, rounds: usize) -> Self {
        let (service, before) = begin(&ground, rounds).await;
        Self {
            ground,
            service,
            rounds,
            before,
            report: Report::default(),
        }
    }

    /// Lets something fail and come back, and compares.
    pub async fn after(
        &mut self,
        failure: &str,
        switch: Switch,
        fail: impl AsyncFnOnce(&mut G, &Service),
    ) {
        let recoveries = self.service.metric("storage_recovery_total").await;
        fail(&mut self.ground, &self.service).await;
        wait_until_well(&self.service).await;
        let recovered = self.service.metric("storage_recovery_total").await;
        assert!(
            switch == Switch::MayStayClosed || recovered > recoveries,
            "{failure} did not strike: {:#?}",
            self.service.log()
        );
        let subject = Subject {
            service: &self.service,
            primaries: self.ground.primaries(),
            rounds: self.rounds,
        };
        let (after, worse) = match subject.is_again_as(&self.before).await {
            Ok(after) => (Some(after), Vec::new()),
            Err(worse) => (worse.now, worse.worse),
        };
        let broken = !worse.is_empty();
        self.report.rows.push(Row {
            failure: failure.to_owned(),
            before: self.before.clone(),
            after,
            worse,
        });
        if broken {
            // What comes next is judged by itself.
            self.service.kill();
            (self.service, self.before) = begin(&self.ground, self.rounds).await;
        }
    }

    /// What came of all.
    pub fn end(self) -> Report {
        self.report
    }
}

async fn begin(ground: &impl Ground, rounds: usize) -> (Service, Condition) {
    let settings = ground.settings();
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    let service = Service::start(&settings);
    wait_until_well(&service).await;
    let subject = Subject {
        service: &service,
        primaries: ground.primaries(),
        rounds,
    };
    let before = subject.at_its_best().await;
    (service, before)
}

/// Waits until Redis answers, knows everything, and memory knows what it holds.
async fn wait_until_well(service: &Service) {
    wait_until("well again", BACK_WITHIN, async || {
        let health = service.health().await;
        health["switch"]["state"] == "closed" && health["mirror"]["dirty"] == 0
    })
    .await;
}

// === impl Report ===

impl Report {
    pub fn join(mut self, other: Self) -> Self {
        self.rows.extend(other.rows);
        self
    }

    /// Fails if anything is worse than before.
    #[track_caller]
    pub fn assert(self) {
        assert!(!self.rows.is_empty(), "nothing was tried");
        let worse: Vec<String> = self
            .rows
            .into_iter()
            .filter(|row| !row.worse.is_empty())
            .map(|row| format!("after {}: {}", row.failure, row.worse.join("; ")))
            .collect();
        assert!(worse.is_empty(), "{}", worse.join("\n"));
    }
}
