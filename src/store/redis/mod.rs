//! The Redis store: one string key a group, one script call a write.
//!
//! This folder is the only place that knows fred.
//!
//! | file | what is in it |
//! |---|---|
//! | `url.rs`, `settings.rs`, `tls.rs` | where Redis is and how to reach it |
//! | `link.rs` | the connections to a server or cluster, and what is known of their other end |
//! | `renewable.rs`, `events.rs` | one connection, and how a new one takes its place; what happens to them |
//! | `stalls.rs` | the time that this process itself has lost |
//! | `bulk.rs` | how much may be on its way at once of large documents |
//! | `connection.rs` | the link that is used now, and how it gives way to another |
//! | `sentinel.rs` | the primary, as sentinels name it |
//! | `attempt.rs`, `fault.rs` | when a call is repeated; what an error means for that |
//! | `topology.rs` | which server holds a key |
//! | `script.rs`, the `.lua` files | the work on one key; `write.rs` says it in their terms |
//! | `scan.rs`, `server_info.rs`, `primaries.rs` | listings; what the servers say of themselves |
//! | `alone.rs` | Redis as a store without a fallback |

mod alone;
mod attempt;
mod bulk;
mod connection;
mod events;
mod fault;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
mod link;
mod primaries;
mod renewable;
mod scan;
mod script;
mod sentinel;
mod server_info;
mod settings;
mod stalls;
mod tls;
mod topology;
mod url;
mod write;

use std::time::Duration;

use fred::prelude::Value;
use futures::{Stream, future::join_all};
use tokio::{sync::watch, time::Instant};

pub use self::{
    attempt::Trail,
    link::NoPong,
    primaries::{Primaries, Shard},
    server_info::ServerInfo,
    settings::{RedisFiles, RedisLimits, RedisSettings},
    write::pipelines,
};
use self::{
    attempt::{Attempt, Attempts, Command, Traffic},
    connection::Connections,
    fault::Fault,
    link::Lane,
    scan::KeySpace,
    script::{Script, ScriptReply},
    topology::{Node, Place, Topology},
    write::{Bounded, ScriptLimits},
};
use super::{
    Deadline, Deletion, KeyPage, StoreError,
    documents::{DocumentBatch, StoredDocument, Write, WriteOutcome},
};
use crate::{
    domain::{
        document::Document,
        group::GroupKey,
        version::{RedisClock, Version},
    },
    telemetry::{self, RedisCommand},
};

/// Keeps documents in Redis. Cheap to clone.
#[derive(Clone)]
pub struct RedisStore {
    connections: Connections,
    keys: KeySpace,
    /// Whose connections small documents take.
    lane: Lane,
    max_document_bytes: usize,
}

/// Why Redis did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotDone {
    /// For the caller.
    pub error: StoreError,
    pub cause: Cause,
}

/// What a failed call says of Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing: Redis has answered.
    Answered,
    /// Nothing: the caller's own deadline left too little time.
    ShortOfTime,
    /// Nothing: this process was held up, or a large document took its time.
    HeldUp,
    /// Redis is down, or refuses its work: why.
    Unwell(String),
}

/// A document that Redis held and may have lost.
#[derive(Clone, Copy, Debug)]
pub struct LostDocument<'a> {
    pub document: &'a Document,
    /// What is left of its time to live; None: it never expires.
    pub left: Option<Duration>,
}

/// What became of a document that Redis may have lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    PutBack,
    /// Something else is stored: its version, if it can be read, or nothing.
    Kept(Option<Version>),
}

// === impl RedisStore ===

impl RedisStore {
    /// The connection on which health is judged, among [`Self::connections`].
    pub const HEALTH: usize = 0;

    /// The time a batch without a deadline gets.
    pub const BATCH_BOUND: Duration = Duration::from_secs(5);

    /// Opens the connections in the background. Keys in Redis begin with
    /// `key_prefix`; no value larger than `max_document_bytes` is read.
    pub fn open(
        settings: &RedisSettings,
        key_prefix: &str,
        max_document_bytes: usize,
    ) -> Result<Self, StoreError> {
        let largest = max_document_bytes.max(KeySpace::BATCH_BYTES);
        let connections = Connections::open(settings, largest)?;
        Ok(Self {
            keys: KeySpace::new(connections.clone(), key_prefix, max_document_bytes),
            connections,
            lane: Lane::Calls,
            max_document_bytes,
        })
    }

    /// The same store for what the service does of its own accord: by a connection of
    /// its own, and with the time that it takes.
    pub fn for_repair(&self) -> Self {
        self.by(Lane::Repair)
    }

    /// The same store for those who judge whether Redis is well, by a connection on
    /// which nothing large is ever in the way.
    pub fn for_health(&self) -> Self {
        self.by(Lane::Health)
    }

    fn by(&self, lane: Lane) -> Self {
        Self {
            keys: self.keys.by(lane),
            lane,
            ..self.clone()
        }
    }

    /// What time it is in Redis.
    pub fn clock(&self) -> &RedisClock {
        self.connections.clock()
    }

    /// Waits until every connection is there, at most until `deadline`; false if one is not.
    pub async fn wait(&self, deadline: Instant) -> bool {
        self.connections.wait(deadline).await
    }

    /// Writes a document if the condition holds.
    pub async fn write_document(
        &self,
        write: &Write,
        deadline: Deadline,
        trail: &Trail,
    ) -> Result<WriteOutcome, NotDone> {
        let traffic = self.traffic(write.head.stored_bytes());
        let attempts = Attempts::at_write(&self.connections, traffic, deadline, trail);
        self.finish_write(write, attempts, deadline, trail).await
    }

    /// Writes documents, as many as one of the [`pipelines`] holds: one attempt
    /// at all of them together, then more at each that failed. One result each.
    pub async fn write_pipeline(
        &self,
        writes: &[Write],
        deadline: Deadline,
        trails: &[Trail],
    ) -> Vec<Result<WriteOutcome, NotDone>> {
        let Some(trail) = trails.first() else {
            return Vec::new();
        };
        let bytes = writes.iter().map(|write| write.head.stored_bytes());
        let traffic = self.traffic(bytes.sum());
        let mut first = Attempts::at_write(&self.connections, traffic, deadline, trail);
        let results = match first.next().await {
            Some(attempt) => {
                let _measured = telemetry::redis_attempt(RedisCommand::Write);
                let results = self.pipeline(writes, &attempt, trails).await;
                if results.contains(&Err(Fault::NoScript)) {
                    // Once for all; what fails here fails again below, and is
                    // told there.
                    for node in attempt.link.topology().nodes() {
                        let _ = script::WRITE.load(&attempt, &node).await;
                    }
                }
                results
            }
            None => {
                let failed = first.used_up();
                return vec![Err(failed); writes.len()];
            }
        };
        let mut finished = Vec::with_capacity(writes.len());
        for ((write, trail), result) in writes.iter().zip(trails).zip(results) {
            finished.push(async move {
                let fault = match result {
                    Ok(Bounded::Whole(outcome)) => return Ok(outcome),
                    Ok(Bounded::Larger(bytes)) => {
                        return self.conflict_with_larger(write, bytes, deadline).await;
                    }
                    Err(Fault::Final(error)) => return Err(NotDone::answered(error)),
                    Err(fault) => fault,
                };
                let traffic = self.traffic(write.head.stored_bytes());
                let attempts = Attempts::at_write(&self.connections, traffic, deadline, trail);
                let attempts = attempts.after_first(&fault);
                self.finish_write(write, attempts, deadline, trail).await
            });
        }
        join_all(finished).await
    }

    /// Reads a document. `known_bytes`: its size as far as is known, else 0; a wrong
    /// one only costs time.
    pub async fn read_document(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        known_bytes: usize,
        deadline: Deadline,
    ) -> Result<Option<StoredDocument>, NotDone> {
        let mut bytes = known_bytes;
        let mut attempts = Attempts::at_read(&self.connections, self.traffic(bytes), deadline);
        while let Some(attempt) = attempts.next().await {
            let _measured = telemetry::redis_attempt(RedisCommand::Read);
            // More than a small document is read only by those who have counted it.
            let most = match bytes {
                0..=Traffic::SMALL_BYTES => Traffic::SMALL_BYTES.min(self.max_document_bytes),
                _ => self.max_document_bytes,
            };
            match self.try_read(key, with_expiry, most, &attempt).await {
                Ok(Bounded::Whole(found)) => return Ok(found),
                Ok(Bounded::Larger(size)) if size > self.max_document_bytes => {
                    return Err(self.too_large(size).into());
                }
                Ok(Bounded::Larger(size)) => {
                    bytes = size;
                    attempts.go_on_with(self.traffic(bytes));
                }
                Err(fault) => attempts.failed(&attempt, fault)?,
            }
        }
        Err(attempts.used_up())
    }

    /// Removes a document: any version, or only `expected`.
    pub async fn remove_document(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
        trail: &Trail,
    ) -> Result<Deletion, NotDone> {
        let traffic = self.traffic(0);
        let mut attempts = Attempts::at_write(&self.connections, traffic, deadline, trail);
        while let Some(attempt) = attempts.next().await {
            let _measured = telemetry::redis_attempt(RedisCommand::Delete);
            match self.try_remove(key, expected, &attempt, trail).await {
                Ok(Bounded::Whole(deletion)) => return Ok(deletion),
                Ok(Bounded::Larger(bytes)) => {
                    let found = self.read_larger(key, bytes, deadline).await?;
                    return Ok(Deletion {
                        deleted: false,
                        version: found.and_then(|found| found.document.version()),
                    });
                }
                Err(fault) => attempts.failed(&attempt, fault)?,
            }
        }
        Err(attempts.used_up())
    }

    /// Puts back a document that Redis has lost, under the version it had: where
    /// nothing is stored, or in place of the version `replaces`.
    pub async fn restore_document(
        &self,
        lost: &LostDocument<'_>,
        replaces: Option<Version>,
        deadline: Deadline,
    ) -> Result<Offered, NotDone> {
        // Repeating it changes nothing, so a lost answer is of no matter; but it
        // must not be executed after this call has ended.
        let trail = Trail::default();
        let traffic = self.traffic(lost.document.json.len());
        let mut attempts = Attempts::at_write(&self.connections, traffic, deadline, &trail);
        while let Some(attempt) = attempts.next().await {
            let _measured = telemetry::redis_attempt(RedisCommand::Restore);
            match self.try_restore(lost, replaces, &attempt, &trail).await {
                Ok(offered) => return Ok(offered),
                Err(fault) => attempts.failed(&attempt, fault)?,
            }
        }
        let failed = attempts.used_up();
        trail.end().await;
        Err(failed)
    }

    /// Some keys that begin with `prefix`.
    pub async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Result<KeyPage, NotDone> {
        self.keys.page(prefix, page_size, token, deadline).await
    }

    /// Number of documents whose key begins with `prefix`.
    pub async fn count(&self, prefix: &str, deadline: Deadline) -> Result<u64, NotDone> {
        self.keys.count(prefix, deadline).await
    }

    /// All documents whose key begins with `prefix`, without their expiry unless
    /// it is asked for.
    pub async fn read_documents(
        &self,
        prefix: &str,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Result<impl Stream<Item = Result<DocumentBatch, NotDone>> + Send + use<>, NotDone> {
        self.keys.read_all(prefix, with_expiry, deadline).await
    }

    /// What the servers say of themselves.
    pub async fn primaries(&self, deadline: Deadline) -> Result<Primaries, NotDone> {
        self.keys.primaries(deadline).await
    }

    /// Whether the servers hold just these keys, as far as is known.
    pub fn has_shards<'a>(&self, shards: impl Iterator<Item = &'a Shard>) -> bool {
        self.keys.has_shards(shards)
    }

    /// Keys of this name to probe with, one on each server.
    pub fn probe_keys(&self, name: &str) -> Vec<GroupKey> {
        let key = self.keys.redis_key(&GroupKey::probe(name, ""));
        let endings = self.connections.topology().endings(&key);
        endings
            .iter()
            .map(|ending| GroupKey::probe(name, ending))
            .collect()
    }

    /// Uses each right that calls need, on a key of which nothing remains. Inside a
    /// script Redis would not say which one is missing.
    pub async fn use_all_rights(&self, key: &GroupKey) -> Result<(), NotDone> {
        let name = self.keys.redis_key(key);
        let commands: [(&'static str, &[&str]); 7] = [
            ("SET", &["", "PX", "1000"]),
            ("GET", &[]),
            ("GETRANGE", &["0", "0"]),
            ("STRLEN", &[]),
            ("PTTL", &[]),
            ("EXISTS", &[]),
            ("DEL", &[]),
        ];
        for (command, arguments) in commands {
            let key = std::iter::once(name.as_str().into());
            let arguments = key.chain(arguments.iter().map(|&word| word.into()));
            self.use_right(&name, command, arguments.collect()).await?;
        }
        Ok(())
    }

    /// Asks over any connection whether Redis is there, each of its servers.
    pub async fn ping_any(&self, bound: Duration) -> Result<(), NoPong> {
        self.connections.ping(None, bound).await
    }

    /// Asks over the connection `index` whether Redis is there, each of its
    /// servers. Silence is noticed after `bound`.
    pub async fn ping(&self, index: usize, bound: Duration) -> Result<(), NoPong> {
        self.connections.ping(Some(index), bound).await
    }

    /// Replaces the connection `index`, whatever it is waiting for.
    pub fn reconnect(&self, index: usize) {
        self.connections.reconnect(index);
    }

    /// Replaces every connection.
    pub fn reconnect_all(&self) {
        for index in 0..self.connections() {
            self.reconnect(index);
        }
    }

    /// Number of connections.
    pub fn connections(&self) -> usize {
        self.connections.count()
    }

    /// Counts new connections: each may lead to another server than before.
    pub fn connected(&self) -> watch::Receiver<u64> {
        self.connections.connected()
    }

    /// Counts the times that other servers took the place of those before.
    pub fn moved(&self) -> watch::Receiver<u64> {
        self.connections.moved()
    }

    /// Writes what the log still has to say of the connections.
    pub fn write_what_was_left_out(&self) {
        self.connections.write_what_was_left_out();
    }

    /// All the time that this process has lost since it began.
    pub fn lost_time(&self) -> Duration {
        self.connections.stalls().lost()
    }

    /// Why there is no connection.
    pub fn why_not_connected(&self) -> String {
        self.connections.why_not()
    }
}

impl RedisStore {
    /// What moves when a document of this size is read or written.
    fn traffic(&self, bytes: usize) -> Traffic {
        Traffic::of(self.lane, bytes)
    }

    fn too_large(&self, bytes: usize) -> StoreError {
        StoreError::StoredValueTooLarge {
            bytes,
            limit: self.max_document_bytes,
        }
    }

    async fn finish_write(
        &self,
        write: &Write,
        mut attempts: Attempts<'_>,
        deadline: Deadline,
        trail: &Trail,
    ) -> Result<WriteOutcome, NotDone> {
        while let Some(attempt) = attempts.next().await {
            let _measured = telemetry::redis_attempt(RedisCommand::Write);
            match self.try_write(write, &attempt, trail).await {
                Ok(Bounded::Whole(outcome)) => return Ok(outcome),
                Ok(Bounded::Larger(bytes)) => {
                    return self.conflict_with_larger(write, bytes, deadline).await;
                }
                Err(fault) => attempts.failed(&attempt, fault)?,
            }
        }
        Err(attempts.used_up())
    }

    /// The outcome of a write that met a document too large to come along with the
    /// refusal.
    async fn conflict_with_larger(
        &self,
        write: &Write,
        bytes: usize,
        deadline: Deadline,
    ) -> Result<WriteOutcome, NotDone> {
        let current = self.read_larger(write.head.key(), bytes, deadline).await?;
        Ok(WriteOutcome::Conflict { current })
    }

    /// Reads what was too large to come along with a refusal; an error if it cannot
    /// be read as a group.
    async fn read_larger(
        &self,
        key: &GroupKey,
        bytes: usize,
        deadline: Deadline,
    ) -> Result<Option<StoredDocument>, NotDone> {
        let found = Box::pin(self.read_document(key, true, bytes, deadline)).await?;
        match found {
            Some(found) if found.document.version().is_none() => {
                Err(write::why_unreadable(&found.document).into())
            }
            found => Ok(found),
        }
    }

    async fn try_write(
        &self,
        write: &Write,
        attempt: &Attempt,
        trail: &Trail,
    ) -> Result<Bounded<WriteOutcome>, Fault> {
        let key = write.head.key();
        let place = self.place(key, attempt).await?;
        let limits = self.script_limits(attempt, &place.node).await?;
        let arguments = write::arguments(write, &limits);
        let reply = self
            .run_write(attempt, trail, &script::WRITE, &place, key, arguments)
            .await?;
        write::read_write_reply(key, &reply)
    }

    async fn use_right(
        &self,
        key: &str,
        command: &'static str,
        arguments: Vec<Value>,
    ) -> Result<(), NotDone> {
        let mut attempts = Attempts::at_read(&self.connections, self.traffic(0), Deadline::NONE);
        while let Some(attempt) = attempts.next().await {
            let _measured = telemetry::redis_attempt(RedisCommand::Other);
            let place = attempt.link.topology().place(key.to_owned());
            let used = match place {
                Some(place) => {
                    attempt
                        .run(Command::on(&place, command, arguments.clone()))
                        .await
                }
                None => Err(Fault::NotRun(Topology::NO_SERVER.into())),
            };
            match used {
                Ok(_) => return Ok(()),
                Err(fault) => attempts.failed(&attempt, fault)?,
            }
        }
        Err(attempts.used_up())
    }

    async fn try_remove(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        attempt: &Attempt,
        trail: &Trail,
    ) -> Result<Bounded<Deletion>, Fault> {
        let place = self.place(key, attempt).await?;
        let limits = self.script_limits(attempt, &place.node).await?;
        let arguments = vec![
            expected.map_or("any".into(), |version| version.to_string().into()),
            limits.deadline,
            limits.lost_since,
            limits.largest_in_reply,
            limits.largest,
        ];
        loop {
            let arguments = arguments.clone();
            let reply = self
                .run_write(attempt, trail, &script::DELETE, &place, key, arguments)
                .await?;
            match write::too_early_by(&reply) {
                // When the attempt is over, the script says that it is late.
                Some(wait) => tokio::time::sleep(wait).await,
                None => return write::read_delete_reply(key, &reply),
            }
        }
    }

    async fn try_restore(
        &self,
        lost: &LostDocument<'_>,
        replaces: Option<Version>,
        attempt: &Attempt,
        trail: &Trail,
    ) -> Result<Offered, Fault> {
        let key = &lost.document.key;
        let place = self.place(key, attempt).await?;
        let limits = self.script_limits(attempt, &place.node).await?;
        let arguments = vec![
            replaces.map_or("".into(), |version| version.to_string().into()),
            limits.deadline,
            Value::Bytes(lost.document.json.clone()),
            lost.left
                .map_or("".into(), |left| left.as_millis().max(1).to_string().into()),
            limits.largest,
        ];
        let reply = self
            .run_write(attempt, trail, &script::RESTORE, &place, key, arguments)
            .await?;
        match reply.status.as_str() {
            "restored" => Ok(Offered::PutBack),
            // None for the 0 of an unreadable document, and for nothing.
            "kept" => Ok(Offered::Kept(reply.integer(0).and_then(Version::new))),
            _ => Err(reply.fault()),
        }
    }

    /// Reads a document of no more than `most` bytes.
    async fn try_read(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        most: usize,
        attempt: &Attempt,
    ) -> Result<Bounded<Option<StoredDocument>>, Fault> {
        let place = self.place(key, attempt).await?;
        if with_expiry {
            let sent = Instant::now();
            let most = most.to_string().into();
            let reply = script::READ.run(attempt, &place, vec![most]).await?;
            attempt.link.observe(&place.node, sent, reply.now);
            return write::read_read_reply(key, &reply);
        }
        // One byte more shows that there are more.
        let value = attempt.run(Command::get_up_to(&place, most + 1)).await?;
        let json = script::bytes(&value).unwrap_or_default();
        if json.is_empty() {
            // Nothing, or a value of no bytes: what was there cannot be told any more,
            // so it is read anew where something is.
            return match attempt.says_yes(Command::exists(&place)).await? {
                true => Box::pin(self.try_read(key, true, most, attempt)).await,
                false => Ok(Bounded::Whole(None)),
            };
        }
        if json.len() > most {
            let size = attempt.run(Command::str_len(&place)).await?;
            return Ok(Bounded::Larger(size.as_usize().unwrap_or(json.len())));
        }
        Ok(Bounded::Whole(Some(StoredDocument {
            document: Document {
                key: key.clone(),
                json,
            },
            expires: None,
        })))
    }

    /// One attempt at all writes; one result each.
    async fn pipeline(
        &self,
        writes: &[Write],
        attempt: &Attempt,
        trails: &[Trail],
    ) -> Vec<Result<Bounded<WriteOutcome>, Fault>> {
        let all_failed = |fault| vec![Err(fault); writes.len()];
        let mut places = Vec::with_capacity(writes.len());
        let mut commands = Vec::with_capacity(writes.len());
        for write in writes {
            let place = match self.place(write.head.key(), attempt).await {
                Ok(place) => place,
                Err(fault) => return all_failed(fault),
            };
            let limits = match self.script_limits(attempt, &place.node).await {
                Ok(limits) => limits,
                Err(fault) => return all_failed(fault),
            };
            commands.push(script::WRITE.call(&place, write::arguments(write, &limits)));
            places.push(place);
        }
        for trail in trails {
            trail.sent(attempt);
        }
        let replies = match attempt.pipeline(commands).await {
            Ok(replies) => replies,
            Err(fault) => return all_failed(fault),
        };
        let mut results = Vec::with_capacity(writes.len());
        let sent = writes.iter().zip(trails).zip(&places);
        for (((write, trail), place), reply) in sent.zip(replies) {
            if !matches!(reply, Err(Fault::Lost(_))) {
                trail.answered();
            }
            let result = reply.and_then(ScriptReply::parse).and_then(|reply| {
                attempt.link.observe(&place.node, attempt.sent, reply.now);
                write::read_write_reply(write.head.key(), &reply)
            });
            if let Err(fault) = &result {
                attempt.heed(fault);
            }
            results.push(result);
        }
        results
    }

    /// Where a group lives.
    async fn place(&self, key: &GroupKey, attempt: &Attempt) -> Result<Place, Fault> {
        let topology = attempt.link.topology();
        let place = topology.place(self.keys.redis_key(key));
        let place = place.ok_or_else(|| Fault::NotRun(Topology::NO_SERVER.into()))?;
        if attempt.redirected {
            Box::pin(self.place_of_moving(place, attempt)).await
        } else {
            Ok(place)
        }
    }

    /// Where a group lives whose key was redirected.
    async fn place_of_moving(&self, place: Place, attempt: &Attempt) -> Result<Place, Fault> {
        // fred has looked at the cluster again. If the key still belongs there,
        // it is on its way to another server.
        let command = Command::at(&place.node, "CLUSTER", vec!["NODES".into()]);
        let nodes = attempt
            .run(command)
            .await
            .map_err(Fault::before_the_write)?;
        let nodes = nodes.into_string().unwrap_or_default();
        let topology = attempt.link.topology();
        Ok(match topology.destination(&place.key, &nodes) {
            Some(node) => Place {
                node,
                is_arriving: true,
                ..place
            },
            None => place,
        })
    }

    /// Runs a script that may change a document, and learns from its reply what
    /// time it is in Redis.
    async fn run_write(
        &self,
        attempt: &Attempt,
        trail: &Trail,
        script: &Script,
        place: &Place,
        key: &GroupKey,
        arguments: Vec<Value>,
    ) -> Result<ScriptReply, Fault> {
        let sent = Instant::now();
        let reply = script
            .run_write(attempt, trail, place, key, arguments)
            .await?;
        attempt.link.observe(&place.node, sent, reply.now);
        Ok(reply)
    }

    /// The limits of an attempt, its times by the clock of a server.
    async fn script_limits(&self, attempt: &Attempt, node: &Node) -> Result<ScriptLimits, Fault> {
        if attempt.link.redis_time(node, attempt.until).is_none() {
            Box::pin(self.ask_time(attempt, node)).await?;
        }
        let redis_time = |moment| {
            let time = attempt.link.redis_time(node, moment);
            let time = time.ok_or_else(|| Fault::NotRun("connecting again".into()))?;
            Ok(time.to_string().into())
        };
        Ok(ScriptLimits {
            deadline: redis_time(attempt.until)?,
            lost_since: match attempt.lost_since {
                Some(since) => redis_time(since)?,
                None => "".into(),
            },
            largest_in_reply: Traffic::SMALL_BYTES
                .min(self.max_document_bytes)
                .to_string()
                .into(),
            largest: self.max_document_bytes.to_string().into(),
            newer_than: self.clock().at(attempt.sent).and_then(Version::new),
        })
    }

    /// Asks a server what time it is.
    async fn ask_time(&self, attempt: &Attempt, node: &Node) -> Result<(), Fault> {
        let sent = Instant::now();
        let reply = attempt.run(Command::at(node, "TIME", Vec::new())).await;
        let reply = reply.map_err(Fault::before_the_write)?;
        let time: Option<Vec<i64>> = reply.convert().ok();
        let Some([seconds, micros]) = time.as_deref() else {
            return Err(Fault::Final(StoreError::Bug("TIME: no time".into())));
        };
        let now = seconds * 1_000_000 + micros;
        attempt.link.observe(node, sent, now);
        Ok(())
    }
}

// === impl NotDone ===

impl NotDone {
    /// Redis has answered with this.
    pub fn answered(error: StoreError) -> Self {
        Self {
            error,
            cause: Cause::Answered,
        }
    }

    /// Whether it was a replica that refused a write.
    pub fn is_refused_by_replica(&self) -> bool {
        matches!(&self.cause, Cause::Unwell(why) if why.starts_with("READONLY"))
    }

    fn short_of_time(error: StoreError) -> Self {
        Self {
            error,
            cause: Cause::ShortOfTime,
        }
    }

    fn held_up(error: StoreError) -> Self {
        Self {
            error,
            cause: Cause::HeldUp,
        }
    }

    fn unwell(error: StoreError, why: String) -> Self {
        Self {
            error,
            cause: Cause::Unwell(why),
        }
    }
}

impl From<StoreError> for NotDone {
    fn from(error: StoreError) -> Self {
        Self::answered(error)
    }
}
