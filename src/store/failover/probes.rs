//! What tells whether the servers of Redis still hold what they held: one key on each,
//! which is written again and again.
//!
//! A server executes one thing after the other, and what it loses are its last
//! changes: of a crash those since the last save, of a failover those that had not
//! reached the replica. So where a server shows a probe as it was written at some
//! moment, it also still holds, or has seen replaced, all that it had answered before.

use std::{collections::VecDeque, time::Duration};

use futures::future::try_join_all;
use tokio::time::Instant;

use crate::{
    domain::{
        document::DocumentHead,
        group::{AlertGroup, GroupKey, GroupMetadata},
        version::{InstanceId, Version},
    },
    store::{
        Deadline, Expiry, StoreError,
        documents::{Condition, Write, WriteOutcome},
        memory::Loss,
        redis::{NotDone, Primaries, RedisStore, Shard, Trail},
    },
};

/// The probes of this instance, as it wrote them last.
pub struct Probes {
    redis: RedisStore,
    /// Names the keys.
    instance: InstanceId,
    known: Vec<Probe>,
}

/// One key.
#[derive(Clone, Debug)]
struct Probe {
    /// Another one whenever a server is another one. A write that was meant for one
    /// process may reach the next; under the same key it would make an empty Redis
    /// look like one that has kept its data.
    key: GroupKey,
    /// What lies beside it.
    shard: Shard,
    /// Of the process that it was written to.
    run_id: String,
    /// Of the process that was found to have lost it.
    lost_by: Option<String>,
    history: History,
}

/// A probe that was written again.
struct Rewritten {
    key: GroupKey,
    version: Version,
    sent: Instant,
}

/// When a probe was written, and as which version, the latest last.
#[derive(Clone, Debug, Default)]
struct History(VecDeque<(Version, Instant)>);

/// What the servers show of the probes.
pub struct Look {
    pub primaries: Primaries,
    /// What they may have lost.
    pub losses: Vec<Loss>,
    /// Whether a server has lost data, and not only become another process.
    pub has_lost_data: bool,
    /// The keys of probes of which nothing can be told any more.
    stale: Vec<GroupKey>,
}

// === impl Probes ===

impl Probes {
    /// Longer than an outage that anybody has patience for; a key of an instance
    /// that is gone leaves by itself.
    const TTL: Duration = Duration::from_secs(24 * 3_600);

    pub fn new(redis: RedisStore, instance: InstanceId) -> Self {
        Self {
            redis,
            instance,
            known: Vec::new(),
        }
    }

    /// Asks the servers what they are, and whether they hold the probes.
    pub async fn look(&mut self) -> Result<Look, NotDone> {
        let primaries = self.redis.primaries(Deadline::NONE).await?;
        let found = self.known.iter().map(|probe| self.find(&probe.key));
        let found = try_join_all(found).await?;
        let mut look = Look {
            losses: Vec::new(),
            has_lost_data: false,
            stale: Vec::new(),
            primaries,
        };
        let known: Vec<String> = self.known.iter().map(|it| it.run_id.clone()).collect();
        for (probe, found) in self.known.iter_mut().zip(found) {
            let server = look.primaries.of(&probe.key);
            let same_process = server.is_some_and(|server| server.run_id == probe.run_id);
            let is_there = found >= probe.history.last();
            if is_there && same_process {
                probe.history.show(found);
                continue;
            }
            look.stale.push(probe.key.clone());
            // Its slot has moved, from one process that is still there to another one.
            let has_moved = server.is_some_and(|server| known.contains(&server.run_id))
                && look.primaries.has_process(&probe.run_id);
            if is_there && has_moved {
                continue;
            }
            let may_evict = server.is_some_and(|server| server.may_evict());
            if !is_there && same_process && may_evict {
                // It throws away any key. That is told elsewhere.
                continue;
            }
            let version_at = |ago: Duration| {
                let now = self.redis.clock().at(Instant::now())?;
                let ago = i64::try_from(ago.as_micros()).ok()?;
                Version::new(now.checked_sub(ago)?)
            };
            // Until the probes are renewed it is found at each look, and said once.
            let run_id = server.map(|server| server.run_id.clone());
            look.has_lost_data |= !is_there && (run_id.is_none() || probe.lost_by != run_id);
            if !is_there {
                probe.lost_by = run_id;
            }
            look.losses.push(Loss {
                keys: probe.shard.keys(),
                since: found.and_then(|found| probe.history.written(found)),
                of_deletes: false,
                found_at: version_at(Duration::ZERO),
                // What is from before the process began is from the one before it.
                last_heard: server
                    .and_then(|server| version_at(server.uptime?))
                    .max(probe.history.last()),
            });
        }
        Ok(look)
    }

    /// Writes the probes again, and new ones in place of those that are stale and for
    /// servers that have none. What fails changes nothing: the next look has to find all
    /// that this one has found.
    pub async fn renew(&mut self, look: &Look) -> Result<(), NotDone> {
        let Some(written) = self.rewrite(&look.stale).await? else {
            return Err(replaced_again());
        };
        let primaries = &look.primaries;
        let stays = |probe: &Probe| {
            !look.stale.contains(&probe.key)
                && primaries.shard_of(&probe.key).as_ref() == Some(&probe.shard)
        };
        let is_known = |key: &GroupKey| {
            let shard = primaries.shard_of(key);
            let mut staying = self.known.iter().filter(|probe| stays(probe));
            staying.any(|probe| Some(&probe.shard) == shard.as_ref())
        };
        let keys = self.redis.probe_keys(&self.instance.next_write_id());
        let new = keys.into_iter().filter(|key| !is_known(key));
        let new = new.map(|key| self.begin(key, primaries));
        let new: Vec<_> = try_join_all(new).await?;
        let staying = self.known.iter().filter(|probe| stays(probe));
        if !self.are_where_they_were(staying.chain(&new)).await? {
            return Err(replaced_again());
        }
        self.known.retain(stays);
        self.take_in(written);
        self.known.extend(new);
        Ok(())
    }

    /// An error if the servers are others since the look.
    pub async fn stay(&self) -> Result<(), NotDone> {
        if self.are_where_they_were(self.known.iter()).await? {
            Ok(())
        } else {
            Err(replaced_again())
        }
    }

    /// Whether each server has a probe.
    pub fn has_one_on_each(&self) -> bool {
        let shards = self.known.iter().map(|probe| &probe.shard);
        self.redis.has_shards(shards)
    }

    /// Writes each probe again. False if one is not as it was, or a server has none.
    pub async fn refresh(&mut self) -> Result<bool, NotDone> {
        if !self.has_one_on_each() {
            return Ok(false);
        }
        let Some(written) = self.rewrite(&[]).await? else {
            return Ok(false);
        };
        if !self.are_where_they_were(self.known.iter()).await? {
            return Ok(false);
        }
        self.take_in(written);
        Ok(true)
    }

    /// Writes each probe but the stale ones in place of the one that was written last.
    /// None if one of those is not there any more.
    async fn rewrite(&self, stale: &[GroupKey]) -> Result<Option<Vec<Rewritten>>, NotDone> {
        let sent = Instant::now();
        let fresh = self.known.iter();
        let fresh = fresh.filter(|probe| !stale.contains(&probe.key));
        let writes = fresh.map(async |probe| {
            let last = probe.history.last();
            let condition = last.map_or(Condition::Any, Condition::Version);
            let version = self.write(&probe.key, condition).await?;
            Ok::<_, NotDone>(version.map(|version| Rewritten {
                key: probe.key.clone(),
                version,
                sent,
            }))
        });
        Ok(try_join_all(writes).await?.into_iter().collect())
    }

    /// Whether each probe lies in the process that it was meant for. Asked after it was
    /// written: the write may have reached the next process, in place of the one before,
    /// of which it would then seem that nothing was lost.
    async fn are_where_they_were(
        &self,
        mut probes: impl Iterator<Item = &Probe>,
    ) -> Result<bool, NotDone> {
        let now = self.redis.primaries(Deadline::NONE).await?;
        Ok(probes.all(|probe| {
            let server = now.of(&probe.key);
            server.is_some_and(|server| server.run_id == probe.run_id)
        }))
    }

    fn take_in(&mut self, written: Vec<Rewritten>) {
        for rewritten in written {
            let mut known = self.known.iter_mut();
            if let Some(probe) = known.find(|probe| probe.key == rewritten.key) {
                probe.history.add(rewritten.version, rewritten.sent);
            }
        }
    }

    /// Does what calls do to groups, on every server: an error if our user has not all
    /// the rights for it. Without them the switch would close and open again.
    pub async fn use_all_rights(&self) -> Result<(), NotDone> {
        let name = self.instance.next_write_id();
        let used = self.redis.probe_keys(&name).into_iter().map(async |key| {
            self.redis.use_all_rights(&key).await?;
            self.write(&key, Condition::Any).await?;
            self.redis
                .read_document(&key, true, 0, Deadline::NONE)
                .await?;
            let trail = Trail::default();
            let removed = self
                .redis
                .remove_document(&key, None, Deadline::NONE, &trail);
            removed.await?;
            // Of nothing more is asked than of a group that is there.
            self.find(&key).await
        });
        try_join_all(used).await.map(|_| ())
    }

    /// Writes the first probe under a key.
    async fn begin(&self, key: GroupKey, primaries: &Primaries) -> Result<Probe, NotDone> {
        let (Some(server), Some(shard)) = (primaries.of(&key), primaries.shard_of(&key)) else {
            return Err(replaced_again());
        };
        let sent = Instant::now();
        let written = self.write(&key, Condition::Any).await?;
        let conflict = || StoreError::Bug("an unconditional write met a conflict".into());
        let mut history = History::default();
        history.add(written.ok_or_else(conflict)?, sent);
        Ok(Probe {
            run_id: server.run_id.clone(),
            lost_by: None,
            key,
            shard,
            history,
        })
    }

    /// The version of the probe that is stored.
    async fn find(&self, key: &GroupKey) -> Result<Option<Version>, NotDone> {
        let found = self.redis.read_document(key, false, 0, Deadline::NONE);
        Ok(found.await?.and_then(|found| found.document.version()))
    }

    /// Writes a probe; None if the condition does not hold.
    async fn write(
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
            expiry: Expiry::After(Self::TTL),
            write_id: self.instance.next_write_id(),
            newer_than: None,
        };
        let trail = Trail::default();
        let outcome = self.redis.write_document(&write, Deadline::NONE, &trail);
        Ok(match outcome.await? {
            WriteOutcome::Written(written) => Some(written.version),
            WriteOutcome::Conflict { .. } => None,
        })
    }
}

fn replaced_again() -> NotDone {
    StoreError::Unavailable("Redis was replaced again".into()).into()
}

// === impl History ===

impl History {
    /// All of the last writes are kept...
    const RECENT: Duration = Duration::from_secs(60);
    /// ...and of those before one in each of these, for as long as a probe lives.
    const COARSE: Duration = Duration::from_secs(60);

    /// The version that was written last.
    fn last(&self) -> Option<Version> {
        self.0.back().map(|(version, _)| *version)
    }

    /// When the version that is stored was written, or at least one before it. None if
    /// it is older than all that are known.
    fn written(&self, stored: Version) -> Option<Instant> {
        let not_newer = self.0.iter().rev().find(|(version, _)| *version <= stored);
        not_newer.map(|(_, sent)| *sent)
    }

    /// Takes in what is stored: a later version is that of a write whose answer was lost.
    fn show(&mut self, stored: Option<Version>) {
        if let Some(stored) = stored
            && let Some((last, sent)) = self.0.back().copied()
            && stored > last
        {
            self.add(stored, sent);
        }
    }

    fn add(&mut self, version: Version, sent: Instant) {
        self.0.push_back((version, sent));
        // The one that has just left the recent ones is not needed beside a coarse one
        // that is near it.
        let recent = self
            .0
            .partition_point(|(_, at)| sent.duration_since(*at) > Self::RECENT);
        if let Some(last) = recent.checked_sub(1)
            && let Some(before) = last.checked_sub(1)
            && self.0[last].1.duration_since(self.0[before].1) < Self::COARSE
        {
            self.0.remove(last);
        }
        while let Some((_, first)) = self.0.front()
            && sent.duration_since(*first) > Probes::TTL
        {
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(version: u64) -> Version {
        Version::new(i64::try_from(version).unwrap()).unwrap()
    }

    #[test]
    fn a_day_of_probes_is_known_by_the_minute_and_the_last_of_them_by_the_second() {
        let start = Instant::now();
        let at = |second: u64| start + Duration::from_secs(second);
        let mut history = History::default();
        let day = Probes::TTL.as_secs();
        for second in 1..=2 * day {
            history.add(version(second), at(second));
        }
        assert!(history.0.len() < 1_520, "{}", history.0.len());
        assert_eq!(history.last(), Some(version(2 * day)));
        for back in 0..60 {
            let second = 2 * day - back;
            assert_eq!(history.written(version(second)), Some(at(second)));
        }
        for back in [61, 3_600, day - 61] {
            let second = 2 * day - back;
            let written = history.written(version(second)).unwrap();
            assert!(written <= at(second), "never later than it was");
            assert!(at(second) - written <= 2 * History::COARSE, "{back}");
        }
        assert_eq!(history.written(version(1)), None);
    }
}
