//! Redis with memory behind it, as one store.
//!
//! Redis answers as long as the switch is closed. A call that Redis fails, or
//! that waits for Redis when the switch opens, is answered from memory, and so
//! are all calls after it until Redis is well again.
//!
//! What memory must not do is to answer a write that Redis may still execute:
//! such a call waits until the last attempt has passed its deadline in Redis,
//! at most `--redis-timeout`. Reads are answered at once.
//!
//! | module | what is in it |
//! |---|---|
//! | [`switch`], [`breaker`] | who answers; the state machine alone |
//! | [`redis_monitor`] | heartbeats, and looks at what Redis has become |
//! | `probes` | what tells whether the servers of Redis still hold what they held |
//! | [`resync`] | what goes on when Redis is back |
//! | [`reconcile`] | what becomes of one key then |

pub mod breaker;
mod probes;
pub mod reconcile;
pub mod redis_monitor;
pub mod resync;
pub mod switch;

use std::{borrow::Cow, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt, future::join_all};
use tokio::time::Instant;

use self::{
    redis_monitor::RedisMonitor,
    switch::{OnRecovery, Switch},
};
use super::{
    Backend, Deadline, Deletion, Expiry, Failure, KeyPage, Reply, StoreError,
    documents::{Condition, DocumentStore, ReadAll, StoredDocument, Write, WriteOutcome},
    memory::{MemoryStore, Refused, Shown, Ticket},
    redis::{Cause, NotDone, RedisStore, Trail, pipelines},
};
use crate::domain::{
    group::GroupKey,
    version::{InstanceId, Version},
};

/// Keeps documents in Redis, and in memory while Redis cannot. Cheap to clone.
#[derive(Clone)]
pub struct Failover {
    redis: RedisStore,
    memory: MemoryStore,
    switch: Arc<Switch>,
    monitor: Arc<RedisMonitor>,
}

/// How the failover is set up.
#[derive(Clone, Copy, Debug)]
pub struct FailoverSettings {
    /// Redis counts as down when it answers no PING for this long.
    pub trip_after: Duration,
    pub on_recovery: OnRecovery,
    /// Bytes that the mirror may hold.
    pub mirror_max_bytes: usize,
}

/// Redis's turn to answer a call.
#[derive(Clone, Copy, Debug)]
struct RedisTurn {
    period: u64,
    ticket: Ticket,
}

/// Why Redis did not answer a call.
enum Diverted {
    /// It did, with an error.
    Answered(Failure),
    /// It had too little time, by the caller's own deadline, or because this process
    /// was held up.
    ShortOfTime(Failure),
    /// It cannot; memory can.
    ToMemory,
}

/// The time a call has.
#[derive(Clone, Copy, Debug)]
struct CallTime {
    deadline: Deadline,
    /// When the call is answered in any case.
    end: Instant,
    /// All the time that this process had lost when `end` was set.
    lost: Duration,
    turns: u32,
    /// Whether it had to wait before Redis could be asked.
    was_held_up: bool,
}

// === impl Failover ===

impl Failover {
    /// What has been written while Redis was down has to be in Redis before a
    /// listing of Redis is of use; it waits for that this long.
    const LISTING_WAIT: Duration = Duration::from_secs(4);
    const LISTING_POLL: Duration = Duration::from_millis(10);
    /// Longer than it takes from memory's stepping back until all know of it.
    const SWITCHING: Duration = Duration::from_millis(1);

    /// Starts to watch over Redis. Until it answers, memory does.
    pub fn open(redis: RedisStore, settings: FailoverSettings, instance: InstanceId) -> Self {
        let clock = redis.clock().clone();
        let memory = MemoryStore::mirror(
            settings.mirror_max_bytes,
            instance.clone(),
            clock,
            settings.on_recovery,
        );
        tokio::spawn(memory.clone().sweep_forever());
        let switch = Arc::new(Switch::new(memory.clone(), settings.on_recovery));
        let monitor = RedisMonitor::start(
            redis.clone(),
            memory.clone(),
            switch.clone(),
            settings.trip_after,
            &instance,
        );
        Self {
            redis,
            memory,
            switch,
            monitor,
        }
    }

    /// Waits until Redis answers, at most until `deadline`. False if it does not;
    /// the log says so then.
    pub async fn started(&self, deadline: Instant) -> bool {
        let mut status = self.switch.subscribe();
        let closed = status.wait_for(|status| status.closed);
        if matches!(tokio::time::timeout_at(deadline, closed).await, Ok(Ok(_))) {
            return true;
        }
        self.switch.give_up_start(&self.redis.why_not_connected());
        false
    }

    pub fn switch(&self) -> &Arc<Switch> {
        &self.switch
    }

    pub fn memory(&self) -> &MemoryStore {
        &self.memory
    }

    pub fn monitor(&self) -> &Arc<RedisMonitor> {
        &self.monitor
    }

    fn call_time(&self, deadline: Deadline) -> CallTime {
        CallTime::new(deadline, self.redis.lost_time())
    }

    /// Whose turn it is to answer a call on `keys`: Redis's, once it knows of all
    /// changes to them, or memory's (None).
    async fn turn<'a>(
        &self,
        keys: impl Iterator<Item = &'a GroupKey> + Clone + Send,
        time: &mut CallTime,
    ) -> Result<Option<RedisTurn>, Failure> {
        time.take_turn(self.redis.lost_time()).await?;
        let Some(period) = self.switch.redis_period() else {
            return Ok(None);
        };
        loop {
            // Drawn first: another Redis process that is met after this is another
            // epoch, and then the answer is looked at again.
            let ticket = self.memory.ticket();
            let pending = keys.clone().filter(|key| self.memory.is_pending(key));
            let pending: Vec<_> = pending.collect();
            if pending.is_empty() {
                return Ok(Some(RedisTurn { period, ticket }));
            }
            match Box::pin(self.carry(pending, period, time)).await {
                Ok(()) => time.was_held_up = true,
                // It may be that Redis has just gone: then memory will answer.
                Err(Diverted::ShortOfTime(_)) if Instant::now() + Self::LISTING_POLL < time.end => {
                    time.was_held_up = true;
                    tokio::time::sleep(Self::LISTING_POLL).await;
                }
                Err(Diverted::Answered(failure) | Diverted::ShortOfTime(failure)) => {
                    return Err(failure);
                }
                Err(Diverted::ToMemory) => return Ok(None),
            }
        }
    }

    /// Lets Redis know of the changes to these keys.
    async fn carry(
        &self,
        keys: Vec<&GroupKey>,
        period: u64,
        time: &CallTime,
    ) -> Result<(), Diverted> {
        let carried = keys.into_iter().map(|key| self.monitor.resync().carry(key));
        let carried = async {
            let results = tokio::time::timeout_at(time.end, join_all(carried)).await;
            let results = results.map_err(|_| NotDone {
                error: StoreError::DeadlineExceeded,
                cause: Cause::ShortOfTime,
            })?;
            results.into_iter().collect::<Result<(), _>>()
        };
        self.ask(period, time, carried).await
    }

    /// Awaits an answer of Redis for as long as it is Redis's turn.
    async fn ask<T>(
        &self,
        period: u64,
        time: &CallTime,
        call: impl Future<Output = Result<T, NotDone>>,
    ) -> Result<T, Diverted> {
        tokio::select! {
            biased;
            result = call => result.map_err(|failed| self.divert(period, time, failed)),
            () = self.switch.leaves(period) => Err(Diverted::ToMemory),
        }
    }

    /// What a failed call means for its caller, and for the switch.
    fn divert(&self, period: u64, time: &CallTime, failed: NotDone) -> Diverted {
        let failure = Backend::Redis.fails(failed.error);
        match failed.cause {
            Cause::Answered => Diverted::Answered(failure),
            Cause::HeldUp => Diverted::ShortOfTime(failure),
            Cause::ShortOfTime if time.is_limited_by_caller() => Diverted::ShortOfTime(failure),
            Cause::ShortOfTime => {
                self.switch.fails(period, "a call was not answered in time");
                Diverted::ToMemory
            }
            Cause::Unwell(reason) => {
                self.switch.fails(period, &reason);
                Diverted::ToMemory
            }
        }
    }

    async fn write_on(
        &self,
        write: &Write,
        trail: &Trail,
        mut time: CallTime,
    ) -> Reply<WriteOutcome> {
        let key = write.head.key();
        loop {
            let turn = self.turn(std::iter::once(key), &mut time).await;
            if let Some(turn) = turn.map_err(|failure| unless_lost(failure, trail))? {
                if write.condition == Condition::Absent
                    && self.may_be_lost(key, None, turn)
                    && Box::pin(self.would_overwrite_lost(key, turn, &mut time)).await
                {
                    continue;
                }
                let write = &*self.with_lost_expiry(write);
                let call = self.redis.write_document(write, time.deadline(), trail);
                match self.ask(turn.period, &time, call).await {
                    Ok(outcome) => {
                        if let WriteOutcome::Conflict { current } = &outcome
                            && self
                                .has_lost(key, version_of(current.as_ref()), turn, &time)
                                .await
                        {
                            continue;
                        }
                        self.learn_write(write, &outcome, turn.ticket);
                        self.is_kept(key, turn, &time).await?;
                        return Ok(Backend::Redis.answers(outcome));
                    }
                    Err(Diverted::ShortOfTime(_)) if time.goes_on(self.redis.lost_time()) => {
                        continue;
                    }
                    Err(Diverted::Answered(failure) | Diverted::ShortOfTime(failure)) => {
                        return Err(failure);
                    }
                    Err(Diverted::ToMemory) => {}
                }
            }
            let maybe_in_redis = trail.end().await;
            if maybe_in_redis && let Some(written) = self.memory.shown_as_written(write) {
                return Ok(Backend::Redis.answers(WriteOutcome::Written(written)));
            }
            match self.memory.change(write, maybe_in_redis) {
                Err(Refused::SwitchedBack) => tokio::time::sleep(Self::SWITCHING).await,
                Ok(written @ WriteOutcome::Written(_)) => {
                    return Ok(Backend::Memory.answers(written));
                }
                // That memory has refused it does not mean that it was not done.
                _ if maybe_in_redis => return Err(outcome_unknown()),
                Ok(conflict) => return Ok(Backend::Memory.answers(conflict)),
                Err(Refused::Error(error)) => return Err(Backend::Memory.fails(error)),
            }
        }
    }

    /// The write; where it is to keep an expiry that Redis has lost with the group, with
    /// what is left of that.
    fn with_lost_expiry<'a>(&self, write: &'a Write) -> Cow<'a, Write> {
        if matches!(write.expiry, Expiry::Keep { .. })
            && let Some(otherwise) = self.memory.left_of_lost(write.head.key())
        {
            return Cow::Owned(Write {
                expiry: Expiry::Keep { otherwise },
                ..write.clone()
            });
        }
        Cow::Borrowed(write)
    }

    /// The same of many.
    fn with_lost_expiries<'a>(&self, writes: &'a [Write]) -> Cow<'a, [Write]> {
        let keeps = |write: &Write| matches!(write.expiry, Expiry::Keep { .. });
        if !writes.iter().any(keeps) {
            return Cow::Borrowed(writes);
        }
        let writes = writes.iter().map(|write| self.with_lost_expiry(write));
        Cow::Owned(writes.map(Cow::into_owned).collect())
    }

    /// Whether a group is to be created that Redis has lost: it would tell nobody
    /// that there was one.
    async fn would_overwrite_lost(
        &self,
        key: &GroupKey,
        turn: RedisTurn,
        time: &mut CallTime,
    ) -> bool {
        time.was_held_up = true;
        let read = self.redis.read_document(key, false, 0, time.deadline());
        // What fails here fails again when it is written.
        let absent = matches!(self.ask(turn.period, time, read).await, Ok(None));
        absent && self.has_lost(key, None, turn, time).await
    }

    /// An answer that was under way while Redis lost data says nothing of the Redis
    /// that is there now: it is told again before the caller hears of it.
    async fn is_kept(
        &self,
        key: &GroupKey,
        turn: RedisTurn,
        time: &CallTime,
    ) -> Result<(), Failure> {
        if !self.memory.is_pending(key) {
            return Ok(());
        }
        let told = Box::pin(self.carry(vec![key], turn.period, time)).await;
        told.map_err(|_| outcome_unknown())
    }

    /// Takes in what a write has shown of its key.
    fn learn_write(&self, write: &Write, outcome: &WriteOutcome, ticket: Ticket) {
        let key = write.head.key();
        let shown = match outcome {
            WriteOutcome::Written(written) => Shown::by_write(write, written),
            WriteOutcome::Conflict { current } => Shown::by_read(current.as_ref()),
        };
        self.memory.learn(key, shown, ticket);
    }

    /// Whether Redis, which shows this version of a group or None, has lost a newer
    /// one. Only then is the mirror right and Redis wrong; otherwise somebody else
    /// has deleted the group.
    async fn has_lost(
        &self,
        key: &GroupKey,
        shown: Option<Version>,
        turn: RedisTurn,
        time: &CallTime,
    ) -> bool {
        self.may_be_lost(key, shown, turn) && Box::pin(self.may_have_lost(turn, time)).await
    }

    /// Whether Redis has lost something since it was its turn, or cannot say: then its
    /// answer is not believed.
    async fn may_have_lost(&self, turn: RedisTurn, time: &CallTime) -> bool {
        let look = self.monitor.may_have_lost(turn.ticket);
        tokio::select! {
            looked = tokio::time::timeout_at(time.end, look) => looked.unwrap_or(true),
            () = self.switch.leaves(turn.period) => true,
        }
    }

    /// Whether it is worth a look: the mirror knows of a newer version.
    fn may_be_lost(&self, key: &GroupKey, shown: Option<Version>, turn: RedisTurn) -> bool {
        self.memory.contradicts(key, shown, turn.ticket)
    }

    /// Reads a document from Redis, and when it expires, unless neither the
    /// caller nor the mirror has to know.
    async fn read_in_redis(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Result<(Option<StoredDocument>, bool), NotDone> {
        let known = self.memory.known(key);
        let bytes = known.map_or(0, |(_, bytes)| bytes);
        if let Some((known, _)) = known
            && !with_expiry
        {
            let found = self
                .redis
                .read_document(key, false, bytes, deadline)
                .await?;
            let version = version_of(found.as_ref());
            if found.is_none() || version == Some(known) {
                return Ok((found, false));
            }
        }
        let found = self.redis.read_document(key, true, bytes, deadline).await?;
        Ok((found, true))
    }

    /// Waits until Redis knows of every change that was made here, and of what it
    /// has lost.
    async fn all_carried(&self, time: &CallTime) -> Result<(), Failure> {
        let end = time
            .deadline
            .or_within(Self::LISTING_WAIT)
            .min(Instant::now() + Self::LISTING_WAIT);
        // A Redis that has come back empty a moment ago must not pass for one that
        // holds no groups: it has to say that it is the one we know.
        while self.switch.redis_period().is_some() && Instant::now() < end {
            let look = self.monitor.may_have_lost(self.memory.ticket());
            if tokio::time::timeout_at(end, look).await == Ok(false) {
                break;
            }
            tokio::time::sleep(Self::LISTING_POLL).await;
        }
        while self.switch.redis_period().is_some() && self.memory.may_be_pending() {
            if Instant::now() >= end {
                return Err(Backend::Redis.fails(StoreError::Unavailable(
                    "groups that were written while Redis was down are still being carried over"
                        .into(),
                )));
            }
            tokio::time::sleep(Self::LISTING_POLL).await;
        }
        Ok(())
    }
}

#[async_trait]
impl DocumentStore for Failover {
    fn backend(&self) -> Backend {
        match self.switch.redis_period() {
            Some(_) => Backend::Redis,
            None => Backend::Memory,
        }
    }

    async fn write(&self, write: &Write, deadline: Deadline) -> Reply<WriteOutcome> {
        let trail = Trail::default();
        self.write_on(write, &trail, self.call_time(deadline)).await
    }

    async fn read(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<StoredDocument>> {
        let mut time = self.call_time(deadline);
        while let Some(turn) = self.turn(std::iter::once(key), &mut time).await? {
            let call = self.read_in_redis(key, with_expiry, time.deadline());
            match self.ask(turn.period, &time, call).await {
                Ok((found, with_expiry)) => {
                    let shown = version_of(found.as_ref());
                    if self.has_lost(key, shown, turn, &time).await {
                        continue;
                    }
                    if found.is_none() || with_expiry {
                        let shown = Shown::by_read(found.as_ref());
                        self.memory.learn(key, shown, turn.ticket);
                        if self.memory.is_pending(key) {
                            // It was deleted here, and another instance has put it back.
                            continue;
                        }
                    }
                    return Ok(Backend::Redis.answers(found));
                }
                Err(Diverted::Answered(failure)) => return Err(failure),
                Err(Diverted::ShortOfTime(_)) if time.goes_on(self.redis.lost_time()) => {}
                Err(Diverted::ShortOfTime(failure)) => {
                    // Better than nothing, and marked as what it is.
                    let known = self.memory.read(key, with_expiry, deadline).await?;
                    return known.value.is_some().then_some(known).ok_or(failure);
                }
                Err(Diverted::ToMemory) => break,
            }
        }
        self.memory.read(key, with_expiry, deadline).await
    }

    async fn remove(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion> {
        let mut time = self.call_time(deadline);
        let trail = Trail::default();
        loop {
            let turn = self.turn(std::iter::once(key), &mut time).await;
            if let Some(turn) = turn.map_err(|failure| unless_lost(failure, &trail))? {
                let call = self
                    .redis
                    .remove_document(key, expected, time.deadline(), &trail);
                match self.ask(turn.period, &time, call).await {
                    Ok(deletion) => {
                        if self.has_lost(key, deletion.version, turn, &time).await {
                            continue;
                        }
                        let shown = match deletion {
                            Deletion {
                                deleted: true,
                                version: Some(version),
                            } => Some(Shown::deleted(version)),
                            // Of an unreadable document, or of nothing.
                            Deletion { version: None, .. } => Some(match expected {
                                None => Shown::nothing_to_delete(),
                                Some(_) => Shown::Absent,
                            }),
                            Deletion { deleted: false, .. } => None,
                        };
                        if let Some(shown) = shown {
                            self.memory.learn(key, shown, turn.ticket);
                        }
                        self.is_kept(key, turn, &time).await?;
                        return Ok(Backend::Redis.answers(deletion));
                    }
                    Err(Diverted::ShortOfTime(_)) if time.goes_on(self.redis.lost_time()) => {
                        continue;
                    }
                    Err(Diverted::Answered(failure) | Diverted::ShortOfTime(failure)) => {
                        return Err(failure);
                    }
                    Err(Diverted::ToMemory) => {}
                }
            }
            let maybe_in_redis = trail.end().await;
            match self.memory.delete(key, expected) {
                Err(Refused::SwitchedBack) => tokio::time::sleep(Self::SWITCHING).await,
                // That memory knows of nothing to delete does not mean that
                // nothing was deleted.
                Ok(Deletion { deleted: false, .. }) if maybe_in_redis => {
                    return Err(outcome_unknown());
                }
                Ok(deletion) => return Ok(Backend::Memory.answers(deletion)),
                Err(Refused::Error(error)) => return Err(Backend::Memory.fails(error)),
            }
        }
    }

    async fn write_all(&self, writes: &[Write], deadline: Deadline) -> Vec<Reply<WriteOutcome>> {
        let deadline = Deadline::at(deadline.or_within(RedisStore::BATCH_BOUND));
        let mut replies = Vec::with_capacity(writes.len());
        for chunk in pipelines(writes) {
            replies.extend(self.write_pipeline(chunk, deadline).await);
        }
        replies
    }

    async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Reply<KeyPage> {
        let time = self.call_time(deadline);
        self.all_carried(&time).await?;
        if let Some(period) = self.switch.redis_period() {
            let call = self.redis.list_keys(prefix, page_size, token, deadline);
            match self.ask(period, &time, call).await {
                Ok(page) => return Ok(Backend::Redis.answers(page)),
                Err(Diverted::Answered(failure) | Diverted::ShortOfTime(failure)) => {
                    return Err(failure);
                }
                Err(Diverted::ToMemory) => {}
            }
        }
        self.memory
            .list_keys(prefix, page_size, token, deadline)
            .await
    }

    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64> {
        let time = self.call_time(deadline);
        self.all_carried(&time).await?;
        if let Some(period) = self.switch.redis_period() {
            let call = self.redis.count(prefix, deadline);
            match self.ask(period, &time, call).await {
                Ok(count) => return Ok(Backend::Redis.answers(count)),
                Err(Diverted::Answered(failure) | Diverted::ShortOfTime(failure)) => {
                    return Err(failure);
                }
                Err(Diverted::ToMemory) => {}
            }
        }
        self.memory.size(prefix, deadline).await
    }

    async fn read_all(&self, prefix: &str, deadline: Deadline) -> Reply<ReadAll> {
        let time = self.call_time(deadline);
        self.all_carried(&time).await?;
        if let Some(period) = self.switch.redis_period() {
            let call = self.redis.read_documents(prefix, false, deadline);
            match self.ask(period, &time, call).await {
                Ok(batches) => {
                    let switch = self.switch.clone();
                    // It ends with its backend, and is never continued from the
                    // other one.
                    let batches = batches.map(move |batch| {
                        batch.map_err(|failed| {
                            if let Cause::Unwell(reason) = &failed.cause {
                                switch.fails(period, reason);
                            }
                            Backend::Redis.fails(failed.error)
                        })
                    });
                    return Ok(Backend::Redis.answers(ReadAll {
                        complete: true,
                        batches: batches.boxed(),
                    }));
                }
                Err(Diverted::Answered(failure) | Diverted::ShortOfTime(failure)) => {
                    return Err(failure);
                }
                Err(Diverted::ToMemory) => {}
            }
        }
        let answer = self.memory.read_all(prefix, deadline).await?;
        Ok(answer.map(|all| ReadAll {
            // Other instances know of other groups.
            complete: false,
            ..all
        }))
    }
}

impl Failover {
    /// As many writes as are sent to Redis at once. Each that Redis fails is
    /// answered from memory by itself.
    async fn write_pipeline(
        &self,
        writes: &[Write],
        deadline: Deadline,
    ) -> Vec<Reply<WriteOutcome>> {
        let trails: Vec<_> = writes.iter().map(|_| Trail::default()).collect();
        let mut results: Vec<Option<Reply<WriteOutcome>>> = vec![None; writes.len()];
        let mut time = self.call_time(deadline);
        let keys = writes.iter().map(|write| write.head.key());
        match self.turn(keys, &mut time).await {
            Err(failure) => return vec![Err(failure); writes.len()],
            Ok(None) => {}
            Ok(Some(turn)) => {
                let writes = &*self.with_lost_expiries(writes);
                let call = self.redis.write_pipeline(writes, deadline, &trails);
                let call = async { Ok(call.await) };
                if let Ok(outcomes) = self.ask(turn.period, &time, call).await {
                    for ((write, outcome), result) in writes.iter().zip(outcomes).zip(&mut results)
                    {
                        *result = match outcome {
                            Ok(outcome) => {
                                self.learn_write(write, &outcome, turn.ticket);
                                let kept = self.is_kept(write.head.key(), turn, &time).await;
                                Some(kept.map(|()| Backend::Redis.answers(outcome)))
                            }
                            Err(failed) => match self.divert(turn.period, &time, failed) {
                                Diverted::Answered(failure) | Diverted::ShortOfTime(failure) => {
                                    Some(Err(failure))
                                }
                                Diverted::ToMemory => None,
                            },
                        };
                    }
                }
            }
        }
        let finished = writes.iter().zip(&trails).zip(results);
        join_all(finished.map(async |((write, trail), result)| match result {
            Some(result) => result,
            None => self.write_on(write, trail, time).await,
        }))
        .await
    }
}

// === impl CallTime ===

impl CallTime {
    /// A call without a deadline is answered within this.
    const BOUND: Duration = Duration::from_millis(950);
    /// A call has further turns when the switch turns in the middle of it, or when Redis
    /// has to be asked again. From the third one on it waits before each, for twice as
    /// long as before the last one...
    const FIRST_PAUSE: Duration = Duration::from_millis(1);
    /// ...but no longer than this.
    const LONGEST_PAUSE: Duration = Duration::from_millis(32);

    fn new(deadline: Deadline, lost: Duration) -> Self {
        Self {
            deadline,
            end: deadline.or_within(Self::BOUND),
            lost,
            turns: 0,
            was_held_up: false,
        }
    }

    /// Begins a turn, unless it is too late. `lost`: all the time that this process has
    /// lost, which does not count unless the caller counts it.
    async fn take_turn(&mut self, lost: Duration) -> Result<(), Failure> {
        self.turns += 1;
        if self.turns == 1 {
            return Ok(());
        }
        self.make_up(lost);
        if self.turns > 2 {
            let pause = Self::FIRST_PAUSE * (1 << (self.turns - 3).min(16));
            tokio::time::sleep(pause.min(Self::LONGEST_PAUSE)).await;
        }
        if Instant::now() >= self.end {
            return Err(Backend::Memory.fails(StoreError::Unavailable(
                "Redis and memory keep taking turns; try again".into(),
            )));
        }
        Ok(())
    }

    /// Whether there is time for another turn after one in which Redis was too slow.
    /// `lost`: see [`Self::take_turn`].
    fn goes_on(&self, lost: Duration) -> bool {
        let end = self.end + lost.saturating_sub(self.lost);
        !self.is_limited_by_caller() && Instant::now() < end
    }

    fn make_up(&mut self, lost: Duration) {
        if !self.is_limited_by_caller() {
            self.end += lost.saturating_sub(self.lost);
            self.lost = self.lost.max(lost);
        }
    }

    /// Whether it is the caller who wants an answer by the end.
    fn is_limited_by_caller(&self) -> bool {
        self.deadline.instant().is_some()
    }

    /// What Redis is given: no more than is left of our bound when the call has
    /// waited already.
    fn deadline(&self) -> Deadline {
        if self.turns == 1 && !self.was_held_up {
            self.deadline
        } else {
            Deadline::at(self.end)
        }
    }
}

/// What is told of a write that is given up.
fn unless_lost(failure: Failure, trail: &Trail) -> Failure {
    if trail.lost_since().is_some() {
        outcome_unknown()
    } else {
        failure
    }
}

/// Of a write that Redis may have executed, and that memory did not make.
fn outcome_unknown() -> Failure {
    Backend::Redis.fails(StoreError::OutcomeUnknown)
}

/// The version of what Redis has shown.
fn version_of(found: Option<&StoredDocument>) -> Option<Version> {
    found.and_then(|found| found.document.version())
}
