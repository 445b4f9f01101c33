//! The switch between Redis and memory: the state machine of `breaker.rs` with
//! what has to happen in the same moment in which it turns.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::{sync::watch, time::Instant};

use super::breaker::{Breaker, Next, Probe, State};
use crate::{
    domain::group::Time,
    store::memory::{Loss, MemoryStore},
    telemetry::{self, RateLimit, SwitchState},
};

/// What becomes of groups that were written while Redis was down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnRecovery {
    /// They are dropped at once, and counted: no conflicts, by construction.
    Discard,
    /// They are carried over to Redis, and merged with what others have written
    /// there.
    Reconcile,
}

/// Who answers, known to all. Calls ask it, the watch over Redis turns it.
#[derive(Debug)]
pub struct Switch {
    inner: Mutex<Inner>,
    status: watch::Sender<SwitchStatus>,
    memory: MemoryStore,
    on_recovery: OnRecovery,
}

#[derive(Debug)]
struct Inner {
    breaker: Breaker,
    /// Whether the log says that memory answers.
    announced: bool,
    /// Why Redis is not used, as the log has said it last.
    told: String,
}

/// What the switch shows to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchStatus {
    /// Whether Redis answers; otherwise memory does.
    pub closed: bool,
    /// `closed`, `open` or `half_open`.
    pub state: &'static str,
    /// Counts the times that the switch has opened or closed.
    pub period: u64,
    /// When it did so last.
    pub since: Time,
    /// Why it is not closed; empty when it is.
    pub reason: String,
}

/// The reason until the first probe has failed.
const NOT_YET: &str = "Redis has not answered yet";

// === impl Switch ===

impl Switch {
    /// Open until Redis has answered for the first time: `memory` stands in.
    pub fn new(memory: MemoryStore, on_recovery: OnRecovery) -> Self {
        let breaker = Breaker::new(Instant::now());
        memory.stand_in();
        telemetry::switch_state(state_shown(&breaker));
        Self {
            status: watch::Sender::new(SwitchStatus {
                closed: false,
                state: breaker.state().name(),
                period: breaker.period(),
                since: Time::now(),
                reason: NOT_YET.into(),
            }),
            inner: Mutex::new(Inner {
                breaker,
                announced: false,
                told: String::new(),
            }),
            memory,
            on_recovery,
        }
    }

    pub fn on_recovery(&self) -> OnRecovery {
        self.on_recovery
    }

    pub fn status(&self) -> SwitchStatus {
        self.status.borrow().clone()
    }

    /// Follows every change.
    pub fn subscribe(&self) -> watch::Receiver<SwitchStatus> {
        self.status.subscribe()
    }

    /// The period of the switch if Redis answers in it; None if memory does.
    pub fn redis_period(&self) -> Option<u64> {
        let status = self.status.borrow();
        status.closed.then_some(status.period)
    }

    /// Waits until `period` is over.
    pub async fn leaves(&self, period: u64) {
        let mut status = self.status.subscribe();
        // An error means that the switch is gone, and its period with it.
        let _ = status.wait_for(|status| status.period != period).await;
    }

    /// Something that was begun in `period` shows that Redis is not well: from
    /// now on memory answers.
    pub fn fails(&self, period: u64, reason: &str) {
        let mut inner = self.lock();
        let now = Instant::now();
        if inner.breaker.fails(period, rand::random(), now) {
            self.memory.stand_in();
            self.publish(&inner, reason);
            inner.announce(reason);
        }
    }

    /// The start does not wait for Redis any longer. `reason`: why it has not
    /// answered, if no probe has said so.
    pub fn give_up_start(&self, reason: &str) {
        let mut inner = self.lock();
        if !inner.breaker.is_closed() {
            let known = self.status().reason;
            let reason = match known.as_str() {
                NOT_YET => reason,
                known => known,
            };
            self.publish(&inner, reason);
            inner.announce(reason);
        }
    }

    /// What is to be done about Redis now.
    pub fn next(&self) -> Next {
        let mut inner = self.lock();
        let was = inner.breaker.state();
        let next = inner.breaker.next(Instant::now());
        if inner.breaker.state().name() != was.name() {
            self.publish(&inner, &self.status().reason);
        }
        next
    }

    /// Another server has taken the place of Redis.
    pub fn meets_another_server(&self) {
        self.lock().breaker.meets_another_server();
    }

    /// Redis has answered a PING.
    pub fn ping_succeeds(&self) {
        let mut inner = self.lock();
        inner.breaker.probe_succeeds(Probe::Ping, Instant::now());
    }

    /// Redis has taken a write: from now on it answers. It may have lost something.
    pub fn write_succeeds(&self, losses: Vec<Loss>) {
        let mut inner = self.lock();
        let now = Instant::now();
        let open_for = now - inner.breaker.since();
        if !inner.breaker.probe_succeeds(Probe::Write, now) {
            // The probes show them once.
            if !losses.is_empty() {
                self.memory.doubt(losses);
            }
            return;
        }
        // Before anybody can know that Redis answers again: a change that memory
        // takes after this would be lost.
        let dirty = self.memory.usage().dirty;
        let discarded = match self.on_recovery {
            OnRecovery::Discard => self.memory.step_back_and_discard(&losses),
            OnRecovery::Reconcile => {
                self.memory.step_back(losses);
                0
            }
        };
        // Whoever sees that it has closed finds it counted.
        if inner.announced {
            telemetry::switched_to_redis();
        }
        telemetry::degraded_writes_discarded(discarded);
        let reason = self.status().reason;
        self.publish(&inner, "");
        if inner.announced {
            inner.announced = false;
            inner.told.clear();
            let to_carry = dirty - dirty.min(discarded);
            tracing::info!(
                outage = ?open_for,
                reason,
                discarded,
                to_carry,
                "Switched back to Redis storage"
            );
        } else {
            tracing::info!("Redis answers");
        }
        if discarded > 0 {
            tracing::warn!(
                discarded,
                "groups that were written or deleted while Redis was down are dropped; \
                 --on-recovery reconcile would keep them"
            );
        }
    }

    /// A probe has failed.
    pub fn probe_fails(&self, reason: &str) {
        let mut inner = self.lock();
        inner.breaker.probe_fails(rand::random(), Instant::now());
        self.publish(&inner, reason);
        inner.tell(reason);
    }

    fn publish(&self, inner: &Inner, reason: &str) {
        let breaker = &inner.breaker;
        let closed = breaker.is_closed();
        telemetry::switch_state(state_shown(breaker));
        self.status.send_modify(|status| {
            if status.period != breaker.period() {
                status.since = Time::now();
            }
            status.closed = closed;
            status.state = breaker.state().name();
            status.period = breaker.period();
            status.reason = reason.to_owned();
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change is complete before anything that could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Inner ===

impl Inner {
    /// Writes why Redis is still not used when that is another reason than before.
    /// What is left out now is written with the next probe, if it is still so.
    fn tell(&mut self, reason: &str) {
        static LAST: RateLimit = RateLimit::new();
        if self.announced && self.told != reason && LAST.due(std::time::Instant::now()).is_some() {
            reason.clone_into(&mut self.told);
            tracing::warn!(reason, "Redis is still not used");
        }
    }

    fn announce(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.announced, true) {
            telemetry::switched_to_memory();
            reason.clone_into(&mut self.told);
            tracing::warn!(reason, "Switched to in-memory storage due to Redis failure");
        }
    }
}

fn state_shown(breaker: &Breaker) -> SwitchState {
    match breaker.state() {
        State::Closed => SwitchState::Closed,
        State::Open { .. } => SwitchState::Open,
        State::HalfOpen { .. } => SwitchState::HalfOpen,
    }
}
