//! What goes on when Redis answers again: it is told what memory holds for it,
//! then the mirror is filled with what it holds.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use tokio::{sync::Notify, time::Instant};

use super::{reconcile::Carrier, switch::Switch};
use crate::{
    domain::{group::GroupKey, version::InstanceId},
    store::{
        Deadline,
        memory::{MemoryStore, Shown},
        redis::{Cause, NotDone, RedisStore},
    },
    telemetry,
};

/// Brings memory and Redis together.
pub struct Resync {
    redis: RedisStore,
    memory: MemoryStore,
    switch: Arc<Switch>,
    carrier: Arc<Carrier>,
    /// There is something to do, although the switch has not turned.
    again: Notify,
    /// The period of the switch for which the mirror has been filled.
    filled: AtomicU64,
}

// === impl Resync ===

impl Resync {
    /// Keys that are carried over in one go, at once, and how long that takes at
    /// least: Redis has other things to do as well.
    const CARRY_BATCH: usize = 250;
    const CARRY_AT_ONCE: usize = 16;
    const CARRY_PAUSE: Duration = Duration::from_millis(50);
    /// A delete that Redis may have lost is told it again so long after the first time:
    /// an instance that did not know of it may have put the group back.
    const DELETES_AGAIN: [Duration; 3] = [
        Duration::from_secs(2),
        Duration::from_secs(10),
        Duration::from_secs(30),
    ];
    /// The mirror is filled one batch, of about 1 MiB, in this time at most...
    const FILL_PAUSE: Duration = Duration::from_millis(20);
    /// ...begun after a random part of this, so that instances do not all read
    /// at once...
    const FILL_JITTER: Duration = Duration::from_millis(500);
    /// ...and after a failure again after this.
    const FILL_RETRY: Duration = Duration::from_secs(2);

    pub fn new(
        redis: RedisStore,
        memory: MemoryStore,
        switch: Arc<Switch>,
        instance: &InstanceId,
    ) -> Self {
        Self {
            carrier: Arc::new(Carrier::new(redis.clone(), memory.clone(), instance)),
            again: Notify::new(),
            filled: AtomicU64::new(u64::MAX),
            redis: redis.for_repair(),
            memory,
            switch,
        }
    }

    /// Tells Redis of a key, if it has to be told.
    pub async fn carry(&self, key: &GroupKey) -> Result<(), NotDone> {
        self.carrier.carry(key).await
    }

    /// Whether the mirror is still being filled.
    pub fn is_warming(&self) -> bool {
        let filled = self.filled.load(Ordering::SeqCst);
        let period = self.switch.redis_period();
        period.is_some_and(|period| period != filled)
    }

    /// Does all of it once more: Redis is another process now.
    pub fn once_more(&self) {
        self.filled.store(u64::MAX, Ordering::SeqCst);
        self.again.notify_one();
    }

    /// Whenever Redis answers again: carries over what memory holds, then fills
    /// the mirror with what Redis holds.
    pub async fn run(self: Arc<Self>) {
        let mut status = self.switch.subscribe();
        loop {
            let Ok(period) = status
                .wait_for(|status| status.closed)
                .await
                .map(|status| status.period)
            else {
                return;
            };
            let goes_on = || self.switch.redis_period() == Some(period);
            let resync = async {
                if let Some(reason) = self.carry_all(goes_on).await {
                    self.switch.fails(period, &reason);
                }
                let fill = async {
                    self.fill(goes_on).await;
                    if goes_on() {
                        self.filled.store(period, Ordering::SeqCst);
                    }
                };
                tokio::join!(fill, self.tell_again(period));
            };
            // Another process has to be told of everything before anything is
            // read from it, so what is under way ends.
            tokio::select! {
                () = resync => {}
                () = self.switch.leaves(period) => {}
                () = self.again.notified() => {}
            }
        }
    }

    /// Tells Redis of deletes once more, after others may have put back what was
    /// deleted here; and of what has come late.
    async fn tell_again(&self, period: u64) {
        let begin = Instant::now();
        let mut again = Self::DELETES_AGAIN.iter();
        let mut next = again.next();
        loop {
            let due = async {
                match next {
                    Some(after) => tokio::time::sleep_until(begin + *after).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {
                    next = again.next();
                    self.memory.doubt_deletes();
                }
                () = self.memory.has_come_late() => {}
            }
            let goes_on = || self.switch.redis_period() == Some(period);
            if let Some(reason) = self.carry_all(goes_on).await {
                self.switch.fails(period, &reason);
            }
        }
    }

    /// Carries over every key that Redis has to be told of, for as long as
    /// `goes_on`. Returns why Redis is not well, if it is not.
    pub async fn carry_all(&self, goes_on: impl Fn() -> bool) -> Option<String> {
        let mut carried = 0;
        let mut more = self.memory.may_be_pending();
        while more {
            let ticket = self.memory.ticket();
            let mut found = false;
            let mut after = None;
            loop {
                let begin = Instant::now();
                let (keys, next) = self.memory.pending_keys(after.as_ref(), Self::CARRY_BATCH);
                let batch = keys.len();
                found |= batch > 0;
                let results: Vec<_> = stream::iter(keys)
                    .map(async |key| self.carrier.carry(&key).await)
                    .buffer_unordered(Self::CARRY_AT_ONCE)
                    .collect()
                    .await;
                for result in results {
                    match result {
                        Ok(()) => carried += 1,
                        Err(NotDone {
                            cause: Cause::Unwell(reason),
                            ..
                        }) => return Some(reason),
                        // It is tried again in the next walk.
                        Err(_) => {}
                    }
                }
                if !goes_on() {
                    return None;
                }
                if batch > 0 {
                    tokio::time::sleep_until(begin + Self::CARRY_PAUSE).await;
                } else {
                    // A walk past many that Redis knows of is no reason to let
                    // others wait.
                    tokio::task::yield_now().await;
                }
                after = next;
                if after.is_none() {
                    break;
                }
            }
            if !found {
                self.memory.nothing_pending(ticket);
            }
            more = found;
        }
        if carried > 0 {
            tracing::info!(
                groups = carried,
                "Redis knows of everything that memory held for it"
            );
        }
        None
    }

    /// Fills the mirror with what Redis holds, until it is full, for as long as
    /// `goes_on`.
    async fn fill(&self, goes_on: impl Fn() -> bool) {
        tokio::time::sleep(Self::FILL_JITTER.mul_f64(rand::random())).await;
        while goes_on() {
            match self.try_fill(&goes_on).await {
                Ok(restored) => {
                    if restored > 0 {
                        tracing::info!(groups = restored, "filled the mirror from Redis");
                    }
                    return;
                }
                // The calls will show whether Redis is unwell.
                Err(failed) => {
                    tracing::debug!(error = %failed.error, "filling the mirror: again later");
                    tokio::time::sleep(Self::FILL_RETRY).await;
                }
            }
        }
    }

    async fn try_fill(&self, goes_on: impl Fn() -> bool) -> Result<usize, NotDone> {
        let mut restored = 0;
        let batches = self.redis.read_documents("", true, Deadline::NONE).await?;
        tokio::pin!(batches);
        loop {
            let ticket = self.memory.ticket();
            let Some(batch) = batches.next().await else {
                return Ok(restored);
            };
            for found in batch?.documents {
                let key = found.document.key.clone();
                if !self.memory.has_room_for(&key, found.document.json.len()) {
                    return Ok(restored);
                }
                if self
                    .memory
                    .learn(&key, Shown::by_read(Some(&found)), ticket)
                {
                    restored += 1;
                    telemetry::groups_restored(1);
                }
            }
            if !goes_on() {
                return Ok(restored);
            }
            tokio::time::sleep(Self::FILL_PAUSE.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
        }
    }
}
