//! The watch over Redis: finds out that it is gone, that it is back, and that it
//! is another one.
//!
//! Tasks, for as long as the [`Recovery`] lives:
//!
//! | task | what it does |
//! |---|---|
//! | `heartbeat`, one a connection | PINGs; opens the switch, replaces a dead connection |
//! | `probe` | closes the switch |
//! | `look_after` | looks at the server, now and then and behind a new connection; keeps the probe keys fresh |
//! | [`BringBack::run`] | tells Redis what memory holds, then fills the mirror |

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::try_join_all;
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use super::{
    Deadline, Expiry, StoreError,
    breaker::{Breaker, Next, Probe},
    bring_back::BringBack,
    documents::{Condition, Write, WriteOutcome},
    memory::{MemoryStore, Server, Ticket},
    redis::{Cause, NoPong, NotDone, RedisStore, Trail},
    switch::{OnRecovery, Switch},
};
use crate::{
    document::DocumentHead,
    group::{AlertGroup, GroupKey, GroupMetadata},
    telemetry,
    version::{InstanceId, Version},
};

/// Watches over Redis until it is dropped.
pub struct Recovery {
    watch: Arc<Watch>,
    /// Ends the tasks with this value.
    _tasks: JoinSet<()>,
}

struct Watch {
    redis: RedisStore,
    memory: MemoryStore,
    switch: Arc<Switch>,
    bring_back: Arc<BringBack>,
    trip_after: Duration,
    /// Of the probe keys; they name them, too.
    instance: InstanceId,
    /// None until Redis has answered for the first time.
    server: tokio::sync::Mutex<Option<KnownServer>>,
    pong: Mutex<Option<Pong>>,
}

/// What tells whether a server still holds what it held: one key on each, as we
/// wrote them last.
#[derive(Clone, Debug)]
struct Probes {
    /// Another one whenever they are written anew. A write that was meant for one
    /// process may reach the next; written under the same name, it would make an
    /// empty Redis look like one that has kept its data.
    name: String,
    versions: HashMap<GroupKey, Version>,
}

/// The Redis process that we know; of a cluster, those of all primaries.
#[derive(Clone, Debug)]
struct KnownServer {
    run_id: String,
    probes: Probes,
    maxmemory_policy: String,
}

/// The last answer to a PING.
#[derive(Clone, Copy, Debug)]
struct Pong {
    at: Instant,
    latency: Duration,
}

/// What is known of the server that answers.
struct Look {
    run_id: String,
    maxmemory_policy: String,
    server: Server,
}

// === impl Recovery ===

impl Recovery {
    /// Starts to watch.
    pub fn start(
        redis: RedisStore,
        memory: MemoryStore,
        switch: Arc<Switch>,
        trip_after: Duration,
        instance: &InstanceId,
    ) -> Arc<Self> {
        let watch = Arc::new(Watch {
            bring_back: Arc::new(BringBack::new(
                redis.clone(),
                memory.clone(),
                switch.clone(),
                instance,
            )),
            instance: instance.clone(),
            server: tokio::sync::Mutex::new(None),
            pong: Mutex::new(None),
            redis: redis.for_health(),
            memory,
            switch,
            trip_after,
        });
        let mut tasks = JoinSet::new();
        for connection in 0..watch.redis.connections() {
            tasks.spawn(watch.clone().heartbeat(connection));
        }
        tasks.spawn(watch.clone().probe());
        tasks.spawn(watch.clone().look_after());
        tasks.spawn(watch.bring_back.clone().run());
        Arc::new(Self {
            watch,
            _tasks: tasks,
        })
    }

    /// Whether Redis is another process than the one we knew when `ticket` was
    /// drawn, or cannot say.
    pub async fn server_has_changed(&self, ticket: Ticket) -> bool {
        let Some(period) = self.watch.switch.redis_period() else {
            return true;
        };
        match self.watch.look_again(period).await {
            Ok(()) => !self.watch.memory.is_current(ticket),
            Err(_) => true,
        }
    }

    /// What goes on when Redis answers again.
    pub fn bring_back(&self) -> &BringBack {
        &self.watch.bring_back
    }

    /// How long the last PING took that was answered.
    pub fn ping_latency(&self) -> Option<Duration> {
        self.watch.pong().map(|pong| pong.latency)
    }

    /// Before the end: tries to carry over what memory holds, whatever the
    /// switch says. The number of groups that Redis does not know of after that.
    pub async fn last_try(&self, deadline: Instant) -> usize {
        let watch = &self.watch;
        if watch.switch.on_recovery() == OnRecovery::Reconcile && watch.memory.usage().dirty > 0 {
            let answers = watch.redis.ping_any(Watch::PROBE_BOUND).await.is_ok();
            if answers {
                let carry = watch.bring_back.carry_all(|| true);
                let _ = tokio::time::timeout_at(deadline, carry).await;
            }
        }
        watch.memory.usage().dirty
    }
}

// === impl Watch ===

impl Watch {
    const HEARTBEAT: Duration = Duration::from_millis(200);
    const PROBE_BOUND: Duration = Duration::from_millis(250);
    /// The probe keys are written this often. What Redis took since then may be
    /// missing after a crash although the probe is there.
    const PROBE_REFRESH: Duration = Duration::from_secs(1);
    /// The server is looked at this often, too: somebody may have set another
    /// `maxmemory-policy`.
    const LOOK_AGAIN: Duration = Duration::from_secs(10);
    /// Longer than an outage that anybody has patience for; a key of an instance
    /// that is gone leaves by itself.
    const PROBE_TTL: Duration = Duration::from_secs(24 * 3_600);

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
                    Ok(server) => {
                        // So that there is little left to sweep in the moment in
                        // which the switch turns, and nobody waits for that.
                        self.memory.sweep_changes().await;
                        self.switch.write_succeeds(server);
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

    /// Looks at the server, then writes the probe keys as groups are written.
    async fn probe_write(&self) -> Result<Server, NotDone> {
        let mut known = self.server.lock().await;
        self.use_all_rights().await?;
        let look = self.look(known.as_ref()).await?;
        let refreshed = match known.as_ref() {
            Some(known) if look.server == Server::Same => self.refresh(&known.probes).await?,
            _ => None,
        };
        let probes = match refreshed {
            Some(probes) => {
                self.is_still(&look.run_id).await?;
                probes
            }
            None => self.new_probes(&look.run_id).await?,
        };
        self.check_policy(known.as_ref(), &look);
        *known = Some(KnownServer {
            run_id: look.run_id,
            maxmemory_policy: look.maxmemory_policy,
            probes,
        });
        Ok(look.server)
    }

    /// Finds out which server answers.
    async fn look(&self, known: Option<&KnownServer>) -> Result<Look, NotDone> {
        let info = self.redis.server(Deadline::NONE).await?;
        let server = match known {
            Some(known) if known.run_id != info.run_id => {
                if self.holds_all(&known.probes).await? {
                    Server::Restarted
                } else {
                    Server::LostData
                }
            }
            _ => Server::Same,
        };
        Ok(Look {
            run_id: info.run_id,
            maxmemory_policy: info.maxmemory_policy,
            server,
        })
    }

    /// Whether Redis holds these probes, or newer ones.
    async fn holds_all(&self, probes: &Probes) -> Result<bool, NotDone> {
        let holds = probes.versions.iter().map(async |(key, probe)| {
            let found = self
                .redis
                .read_document(key, false, 0, Deadline::NONE)
                .await?;
            let version = found.and_then(|found| found.document.version());
            Ok::<_, NotDone>(version >= Some(*probe))
        });
        let holds = try_join_all(holds).await?;
        Ok(holds.into_iter().all(|holds| holds))
    }

    /// Writes each probe key in place of the one that was written last. None if one
    /// of those is not there any more, or a server has none.
    async fn refresh(&self, probes: &Probes) -> Result<Option<Probes>, NotDone> {
        let name = &probes.name;
        let conditions = self.redis.probe_keys(name).into_iter().map(|key| {
            let version = *probes.versions.get(&key)?;
            Some((key, Condition::Version(version)))
        });
        let Some(conditions) = conditions.collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        self.write_probes(name, conditions).await
    }

    /// Writes a new probe key on every server of which `run_id` was just read.
    async fn new_probes(&self, run_id: &str) -> Result<Probes, NotDone> {
        let name = self.instance.next_write_id();
        let keys = self.redis.probe_keys(&name).into_iter();
        let conditions = keys.map(|key| (key, Condition::Any));
        let written = self.write_probes(&name, conditions).await?;
        self.is_still(run_id).await?;
        let conflict = || StoreError::Bug("an unconditional write met a conflict".into()).into();
        written.ok_or_else(conflict)
    }

    /// Does what calls do to groups, on every server: an error if our user has not all
    /// the rights for it. Without them the switch would close and open again.
    async fn use_all_rights(&self) -> Result<(), NotDone> {
        let name = self.instance.next_write_id();
        let used = self.redis.probe_keys(&name).into_iter().map(async |key| {
            self.redis.use_all_rights(&key).await?;
            self.write_probe(&key, Condition::Any).await?;
            self.redis
                .read_document(&key, true, 0, Deadline::NONE)
                .await?;
            let trail = Trail::default();
            let removed = self
                .redis
                .remove_document(&key, None, Deadline::NONE, &trail);
            removed.await?;
            // Of nothing more is asked than of a group that is there.
            let absent = self.redis.read_document(&key, false, 0, Deadline::NONE);
            absent.await.map(|_| ())
        });
        try_join_all(used).await.map(|_| ())
    }

    /// An error if Redis is another process by now: then what was written may lie in
    /// either of them.
    async fn is_still(&self, run_id: &str) -> Result<(), NotDone> {
        if self.redis.server(Deadline::NONE).await?.run_id == run_id {
            Ok(())
        } else {
            Err(StoreError::Unavailable("Redis was replaced again".into()).into())
        }
    }

    /// Writes probe keys; None if one of the conditions does not hold.
    async fn write_probes(
        &self,
        name: &str,
        conditions: impl IntoIterator<Item = (GroupKey, Condition)>,
    ) -> Result<Option<Probes>, NotDone> {
        let writes = conditions.into_iter().map(async |(key, condition)| {
            let version = self.write_probe(&key, condition).await?;
            Ok::<_, NotDone>(version.map(|version| (key, version)))
        });
        let versions: Option<_> = try_join_all(writes).await?.into_iter().collect();
        Ok(versions.map(|versions| Probes {
            name: name.to_owned(),
            versions,
        }))
    }

    /// Writes a probe key; None if the condition does not hold.
    async fn write_probe(
        &self,
        key: &GroupKey,
        condition: Condition,
    ) -> Result<Option<Version>, NotDone> {
        let group = AlertGroup {
            key: key.clone(),
            alerts: Default::default(),
            metadata: GroupMetadata::default(),
        };
        let write = Write {
            head: DocumentHead::new(&group),
            condition,
            expiry: Expiry::After(Self::PROBE_TTL),
            write_id: self.instance.next_write_id(),
            newer_than: None,
        };
        let trail = Trail::default();
        let outcome = self
            .redis
            .write_document(&write, Deadline::NONE, &trail)
            .await?;
        Ok(match outcome {
            WriteOutcome::Written(written) => Some(written.version),
            WriteOutcome::Conflict { .. } => None,
        })
    }

    fn check_policy(&self, known: Option<&KnownServer>, look: &Look) {
        let policy = &look.maxmemory_policy;
        telemetry::redis_may_evict(!policy.is_empty() && policy != "noeviction");
        let told = known.is_some_and(|known| known.maxmemory_policy == *policy);
        if !told && !policy.is_empty() && policy != "noeviction" {
            tracing::warn!(
                policy,
                "maxmemory-policy is not noeviction: when its memory is full, Redis throws \
                 groups away and tells nobody"
            );
        }
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

    /// Keeps the probe keys fresh. If one is not there, the server is another one,
    /// or has lost it.
    async fn refresh_probes(&self, period: u64) -> Result<(), NotDone> {
        let mut known = self.server.lock().await;
        let Some(server) = known.as_mut() else {
            return Ok(());
        };
        if let Some(probes) = self.refresh(&server.probes).await? {
            server.probes = probes;
            return Ok(());
        }
        self.look_at(server, period).await?;
        // Otherwise `probe_write` goes on.
        if self.switch.redis_period() == Some(period) {
            server.probes = self.new_probes(&server.run_id).await?;
        }
        Ok(())
    }

    /// Looks whether the server is still the one we know.
    async fn look_again(&self, period: u64) -> Result<(), NotDone> {
        match self.server.lock().await.as_mut() {
            Some(server) => self.look_at(server, period).await,
            None => Ok(()),
        }
    }

    /// If the server is another one, a new epoch begins, as after a recovery.
    async fn look_at(&self, known: &mut KnownServer, period: u64) -> Result<(), NotDone> {
        let look = self.look(Some(known)).await?;
        self.check_policy(Some(known), &look);
        known.maxmemory_policy.clone_from(&look.maxmemory_policy);
        if look.server == Server::Same || self.switch.redis_period() != Some(period) {
            return Ok(());
        }
        tracing::info!(server = ?look.server, "Redis is another process now");
        known.run_id = look.run_id;
        self.memory.meet(match self.switch.on_recovery() {
            OnRecovery::Reconcile => look.server,
            // What it has lost is lost.
            OnRecovery::Discard => Server::Same,
        });
        self.bring_back.once_more();
        Ok(())
    }
}
