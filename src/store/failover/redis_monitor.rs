//! The watch over Redis: finds out that it is gone, that it is back, and that it
//! is another one.
//!
//! Tasks, for as long as the [`RedisMonitor`] lives:
//!
//! | task | what it does |
//! |---|---|
//! | `heartbeat`, one a connection | PINGs; opens the switch, replaces a dead connection |
//! | `probe` | closes the switch |
//! | `look_after` | looks at the server, now and then and behind a new connection; keeps the probe keys fresh |
//! | [`Resync::run`] | tells Redis what memory holds, then fills the mirror |

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use super::{
    breaker::{Breaker, Next, Probe},
    probes::{Look, Probes},
    resync::Resync,
    switch::{OnRecovery, Switch},
};
use crate::{
    domain::version::InstanceId,
    store::{
        memory::{Loss, MemoryStore, Ticket},
        redis::{Cause, NoPong, NotDone, RedisStore},
    },
    telemetry,
};

/// Watches over Redis until it is dropped.
pub struct RedisMonitor {
    inner: Arc<Inner>,
    /// Ends the tasks with this value.
    _tasks: JoinSet<()>,
}

struct Inner {
    redis: RedisStore,
    memory: MemoryStore,
    switch: Arc<Switch>,
    resync: Arc<Resync>,
    trip_after: Duration,
    known: tokio::sync::Mutex<Known>,
    pong: Mutex<Option<Pong>>,
}

/// The servers that we know.
struct Known {
    probes: Probes,
    /// What they do when their memory is full, as the log has said it last.
    maxmemory_policy: String,
    /// When the last look began that came to an end.
    looked: Instant,
}

/// The last answer to a PING.
#[derive(Clone, Copy, Debug)]
struct Pong {
    at: Instant,
    latency: Duration,
}

// === impl RedisMonitor ===

impl RedisMonitor {
    /// Starts to watch.
    pub fn start(
        redis: RedisStore,
        memory: MemoryStore,
        switch: Arc<Switch>,
        trip_after: Duration,
        instance: &InstanceId,
    ) -> Arc<Self> {
        let inner = Arc::new(Inner {
            resync: Arc::new(Resync::new(
                redis.clone(),
                memory.clone(),
                switch.clone(),
                instance,
            )),
            known: tokio::sync::Mutex::new(Known {
                probes: Probes::new(redis.for_health(), instance.clone()),
                maxmemory_policy: String::new(),
                looked: Instant::now(),
            }),
            pong: Mutex::new(None),
            redis: redis.for_health(),
            memory,
            switch,
            trip_after,
        });
        let mut tasks = JoinSet::new();
        for connection in 0..inner.redis.connections() {
            tasks.spawn(inner.clone().heartbeat(connection));
        }
        tasks.spawn(inner.clone().probe());
        tasks.spawn(inner.clone().look_after());
        tasks.spawn(inner.resync.clone().run());
        Arc::new(Self {
            inner,
            _tasks: tasks,
        })
    }

    /// Whether Redis has lost something since `ticket` was drawn, or cannot say.
    pub async fn may_have_lost(&self, ticket: Ticket) -> bool {
        let Some(period) = self.inner.switch.redis_period() else {
            return true;
        };
        match self.inner.look_again(period).await {
            Ok(()) => !self.inner.memory.is_current(ticket),
            Err(_) => true,
        }
    }

    /// What goes on when Redis answers again.
    pub fn resync(&self) -> &Resync {
        &self.inner.resync
    }

    /// How long the last PING took that was answered.
    pub fn ping_latency(&self) -> Option<Duration> {
        self.inner.pong().map(|pong| pong.latency)
    }

    /// Before the end: tries to carry over what memory holds, whatever the
    /// switch says. The number of groups that Redis does not know of after that.
    pub async fn last_try(&self, deadline: Instant) -> usize {
        let inner = &self.inner;
        if inner.switch.on_recovery() == OnRecovery::Reconcile && inner.memory.usage().dirty > 0 {
            let answers = inner.redis.ping_any(Inner::PROBE_BOUND).await.is_ok();
            if answers {
                let carry = inner.resync.carry_all(|| true);
                let _ = tokio::time::timeout_at(deadline, carry).await;
            }
        }
        inner.memory.usage().dirty
    }
}

// === impl Inner ===

impl Inner {
    const HEARTBEAT: Duration = Duration::from_millis(200);
    const PROBE_BOUND: Duration = Duration::from_millis(250);
    /// The probe keys are written this often. What Redis took since then may be
    /// missing after a crash although the probe is there.
    const PROBE_REFRESH: Duration = Duration::from_secs(1);
    /// The server is looked at this often, too: somebody may have set another
    /// `maxmemory-policy`.
    const LOOK_AGAIN: Duration = Duration::from_secs(10);

    /// PINGs over one connection for ever.
    async fn heartbeat(self: Arc<Self>, connection: usize) {
        loop {
            let period = self.switch.redis_period();
            let sent = Instant::now();
            let pong = self.redis.ping(connection, self.trip_after).await;
            if connection == RedisStore::HEALTH {
                self.redis.write_what_was_left_out();
            }
            match (&pong, period) {
                (Ok(()), _) => self.heard(connection, sent),
                (Err(NoPong::Refused(error)), Some(period)) => self.switch.fails(period, error),
                // One connection may be dead; when none has answered in all this
                // time, Redis is.
                (Err(NoPong::Silence), Some(period)) if !self.heard_since(sent) => {
                    self.switch.fails(period, &self.why_silent());
                }
                (Err(_), _) => {}
            }
            if pong == Err(NoPong::Silence) {
                self.redis.reconnect(connection);
            }
            tokio::time::sleep_until(sent + Self::HEARTBEAT).await;
        }
    }

    fn heard(&self, connection: usize, sent: Instant) {
        let at = Instant::now();
        let mut pong = self.pong.lock().unwrap_or_else(PoisonError::into_inner);
        let latency = match *pong {
            // On another connection it may have waited behind something large.
            Some(Pong { latency, .. }) if connection != RedisStore::HEALTH => latency,
            _ => at - sent,
        };
        *pong = Some(Pong { at, latency });
    }

    fn heard_since(&self, moment: Instant) -> bool {
        self.pong().is_some_and(|pong| pong.at >= moment)
    }

    fn pong(&self) -> Option<Pong> {
        *self.pong.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn why_silent(&self) -> String {
        let connection = self.redis.why_not_connected();
        format!(
            "no PING was answered for {:?}; {connection}",
            self.trip_after
        )
    }

    /// Probes Redis whenever the switch is open.
    async fn probe(self: Arc<Self>) {
        let mut status = self.switch.subscribe();
        let mut moved = self.redis.moved();
        // With each connection that comes up later, what time it is at its other end is
        // forgotten, and the next write would have to ask first.
        let connected_by = Instant::now() + Self::PROBE_BOUND;
        self.redis.wait(connected_by).await;
        loop {
            match self.switch.next() {
                Next::Probe(Probe::Ping) => match self.redis.ping_any(Self::PROBE_BOUND).await {
                    Ok(()) => {
                        self.switch.ping_succeeds();
                        if self.switch.next() == Next::Probe(Probe::Ping) {
                            tokio::time::sleep(Breaker::PING_PAUSE).await;
                        }
                    }
                    Err(NoPong::Refused(error)) => self.switch.probe_fails(&error),
                    Err(NoPong::Silence | NoPong::Busy) => {
                        self.switch.probe_fails(&self.redis.why_not_connected());
                    }
                },
                Next::Probe(Probe::Write) => match self.probe_write().await {
                    Ok(losses) => {
                        // So that there is little left to sweep in the moment in
                        // which the switch turns, and nobody waits for that.
                        self.memory.sweep_changes().await;
                        self.switch.write_succeeds(losses);
                    }
                    Err(failed) => {
                        self.switch.probe_fails(&failed.error.to_string());
                        if failed.is_refused_by_replica() {
                            // Its address may lead to the primary by now.
                            self.redis.reconnect_all();
                        }
                    }
                },
                Next::Pause(pause) => tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    // The sender lives as long as `redis`.
                    _ = moved.changed() => self.switch.meets_another_server(),
                },
                Next::Nothing => {
                    // The switch outlives this task.
                    let _ = status.wait_for(|status| !status.closed).await;
                }
            }
        }
    }

    /// Looks at the servers, then writes the probes as groups are written. What may be
    /// lost.
    async fn probe_write(&self) -> Result<Vec<Loss>, NotDone> {
        let mut known = self.known.lock().await;
        known.probes.use_all_rights().await?;
        let look = known.probes.look().await?;
        tell_of_losses(&look);
        // If this fails, the next look finds them again.
        known.probes.renew(&look).await?;
        self.check_policy(&mut known, &look);
        Ok(look.losses)
    }

    fn check_policy(&self, known: &mut Known, look: &Look) {
        let server = look.primaries.as_one();
        let policy = server.maxmemory_policy.as_str();
        telemetry::redis_may_evict(server.may_evict());
        if server.may_evict() && known.maxmemory_policy != policy {
            tracing::warn!(
                policy,
                "maxmemory-policy is not noeviction: when its memory is full, Redis throws \
                 groups away and tells nobody"
            );
        }
        policy.clone_into(&mut known.maxmemory_policy);
    }

    /// While Redis answers: looks at the server, now and then and behind each new
    /// connection, and keeps the probe keys fresh, which also shows whether Redis
    /// takes writes when nobody writes.
    async fn look_after(self: Arc<Self>) {
        let mut connected = self.redis.connected();
        let mut refresh = tokio::time::interval(Self::PROBE_REFRESH);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut again = tokio::time::interval(Self::LOOK_AGAIN);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let look = tokio::select! {
                _ = refresh.tick() => false,
                _ = again.tick() => true,
                // The sender lives as long as `redis`.
                changed = connected.changed() => changed.is_ok(),
            };
            let Some(period) = self.switch.redis_period() else {
                continue;
            };
            let done = if look {
                self.look_again(period).await
            } else {
                self.refresh_probes(period).await
            };
            if let Err(NotDone {
                cause: Cause::Unwell(reason),
                ..
            }) = done
            {
                self.switch.fails(period, &reason);
            }
        }
    }

    /// Keeps the probes fresh. If one is not as it was, the servers are looked at.
    async fn refresh_probes(&self, period: u64) -> Result<(), NotDone> {
        let mut known = self.known.lock().await;
        if known.probes.refresh().await? {
            return Ok(());
        }
        self.look_at(&mut known, period).await
    }

    /// Looks whether the servers are still those we know. Of many who ask for it at once
    /// the first looks for all.
    async fn look_again(&self, period: u64) -> Result<(), NotDone> {
        let asked = Instant::now();
        let mut known = self.known.lock().await;
        if known.looked > asked {
            return Ok(());
        }
        self.look_at(&mut known, period).await
    }

    /// If a server may have lost something, a new epoch begins, as after a recovery.
    async fn look_at(&self, known: &mut Known, period: u64) -> Result<(), NotDone> {
        let began = Instant::now();
        let look = known.probes.look().await?;
        self.check_policy(known, &look);
        // Otherwise `probe_write` goes on.
        if self.switch.redis_period() != Some(period) {
            return Ok(());
        }
        if !look.losses.is_empty() {
            // Before anybody can take its answers for those of the one before.
            self.memory.doubt(look.losses.clone());
            self.resync.once_more();
            tell_of_losses(&look);
        }
        if look.losses.is_empty() && known.probes.has_one_on_each() {
            // Calls wait for this: to write them again is left to the next refresh.
            known.probes.stay().await?;
        } else {
            known.probes.renew(&look).await?;
        }
        known.looked = began;
        Ok(())
    }
}

/// Says what has become of Redis.
fn tell_of_losses(look: &Look) {
    if look.has_lost_data {
        telemetry::redis_lost_data();
        let servers = look.losses.len();
        tracing::warn!(
            servers,
            "Redis has lost data: what this instance has written and deleted since is told it again"
        );
    } else if !look.losses.is_empty() {
        tracing::info!("Redis is another process now");
    }
}
