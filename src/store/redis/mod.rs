//! The Redis store: one string key a group, one script call a write.
//!
//! This folder is the only place that knows fred. `attempt.rs` decides when a
//! call is repeated, `fault.rs` what an error means, `script.rs` and the
//! `.lua` files do the work on one key, `scan.rs` lists.

mod attempt;
mod connection;
mod fault;
mod scan;
mod script;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use fred::prelude::Value;
use futures::{StreamExt, future::join_all};
use tokio::time::Instant;

pub use self::connection::RedisSettings;
use self::{
    attempt::{Attempt, Attempts, on_any_node, on_key},
    connection::Connections,
    fault::Fault,
    scan::KeySpace,
    script::{Script, ScriptReply},
};
use super::{
    Backend, Deadline, Deletion, Expiry, KeyPage, Reply, StoreError, Written,
    documents::{Condition, DocumentStore, ReadAll, StoredDocument, WriteOutcome},
};
use crate::{
    document::{Document, DocumentHead, Unreadable},
    group::{GroupKey, Time},
    version::{Version, WriteIds},
};

const BACKEND: Backend = Backend::Redis;

/// Documents that one pipeline of `write_all` holds at most, and calls at once
/// where they have to be written one by one.
const WRITES_PER_PIPELINE: usize = 100;
/// Bytes of documents that one pipeline holds at most, unless a single document
/// has more: a pipeline gets no more time than one command.
const BYTES_PER_PIPELINE: usize = 1 << 20;

/// Keeps documents in Redis.
#[derive(Clone)]
pub struct RedisStore {
    connections: Connections,
    keys: KeySpace,
    write_ids: Arc<WriteIds>,
}

/// One write call: what stays the same in all of its attempts.
struct WriteCall<'a> {
    head: &'a DocumentHead,
    condition: Condition,
    expiry: Expiry,
    write_id: String,
}

/// The bounds of an attempt in microseconds of the time of Redis, as arguments
/// of the scripts.
struct TimeBounds {
    /// Not executed later than this.
    deadline: Value,
    /// When an attempt whose answer is missing was executed at the earliest;
    /// empty if there is none.
    lost_since: Value,
}

// === impl RedisStore ===

impl RedisStore {
    /// The time a batch without a deadline gets.
    const BATCH_BOUND: Duration = Duration::from_secs(5);

    /// Opens the connections in the background. Keys in Redis begin with
    /// `key_prefix`; `max_document_bytes` bounds what a scan reads of one value.
    pub fn open(
        settings: &RedisSettings,
        key_prefix: &str,
        max_document_bytes: usize,
        write_ids: Arc<WriteIds>,
    ) -> Result<Self, StoreError> {
        let connections = Connections::open(settings)?;
        Ok(Self {
            keys: KeySpace::new(connections.clone(), key_prefix, max_document_bytes),
            connections,
            write_ids,
        })
    }

    /// Waits until Redis answers, at most until `deadline`; false if it does
    /// not.
    pub async fn wait(&self, deadline: Instant) -> bool {
        self.connections.wait(deadline).await
    }

    fn new_write<'a>(
        &self,
        head: &'a DocumentHead,
        condition: Condition,
        expiry: Expiry,
    ) -> WriteCall<'a> {
        WriteCall {
            head,
            condition,
            expiry,
            write_id: self.write_ids.next(),
        }
    }

    /// Makes attempts at a write.
    async fn finish_write(
        &self,
        write: &WriteCall<'_>,
        mut attempts: Attempts<'_>,
    ) -> Result<WriteOutcome, StoreError> {
        while let Some(attempt) = attempts.next().await {
            match self.try_write(write, &attempt).await {
                Ok(outcome) => return Ok(outcome),
                Err(fault) => attempts.failed(&attempt, fault)?,
            }
        }
        Err(attempts.write_exhausted())
    }

    async fn try_write(
        &self,
        write: &WriteCall<'_>,
        attempt: &Attempt,
    ) -> Result<WriteOutcome, Fault> {
        let key = write.head.key();
        let bounds = self.bounds(attempt).await?;
        let reply = self
            .run(attempt, &script::WRITE, key, write.arguments(&bounds))
            .await?;
        read_write_reply(key, &reply)
    }

    async fn try_remove(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        attempt: &Attempt,
    ) -> Result<Deletion, Fault> {
        let bounds = self.bounds(attempt).await?;
        let arguments = vec![
            expected.map_or("any".into(), |version| version.to_string().into()),
            bounds.deadline,
            bounds.lost_since,
        ];
        let reply = self.run(attempt, &script::DELETE, key, arguments).await?;
        read_delete_reply(key, &reply)
    }

    async fn try_read(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        attempt: &Attempt,
    ) -> Result<Option<StoredDocument>, Fault> {
        let (json, expires_at) = if with_expiry {
            let reply = self.run(attempt, &script::READ, key, Vec::new()).await?;
            match reply.status.as_str() {
                "absent" => (None, None),
                "read" => (reply.bytes(0), expiry(&reply, 1)),
                _ => return Err(reply.fault()),
            }
        } else {
            let value = attempt
                .run(on_key("GET"), vec![self.keys.redis_key(key).into()])
                .await?;
            (script::bytes(&value), None)
        };
        Ok(json.map(|json| StoredDocument {
            document: Document {
                key: key.clone(),
                json,
            },
            expires_at,
        }))
    }

    /// Runs a script on one key and learns from its reply what time it is in
    /// Redis.
    async fn run(
        &self,
        attempt: &Attempt,
        script: &Script,
        key: &GroupKey,
        arguments: Vec<Value>,
    ) -> Result<ScriptReply, Fault> {
        let sent = Instant::now();
        let redis_key = self.keys.redis_key(key);
        let reply = script.run(attempt, &redis_key, arguments).await?;
        self.connections.observe(sent, reply.now);
        Ok(reply)
    }

    /// The bounds of an attempt in the time of Redis.
    async fn bounds(&self, attempt: &Attempt) -> Result<TimeBounds, Fault> {
        if self.connections.redis_time(attempt.until).is_none() {
            self.ask_time(attempt).await?;
        }
        let redis_time = |moment| {
            let time = self.connections.redis_time(moment);
            let time = time.ok_or_else(|| Fault::NotRun("connecting again".into()))?;
            Ok(time.to_string().into())
        };
        Ok(TimeBounds {
            deadline: redis_time(attempt.until)?,
            lost_since: match attempt.lost_since {
                Some(since) => redis_time(since)?,
                None => "".into(),
            },
        })
    }

    /// Asks Redis what time it is.
    async fn ask_time(&self, attempt: &Attempt) -> Result<(), Fault> {
        let sent = Instant::now();
        let reply = attempt.run(on_any_node("TIME"), Vec::new()).await;
        let reply = reply.map_err(Fault::before_the_write)?;
        let time: Option<Vec<i64>> = reply.convert().ok();
        let Some([seconds, micros]) = time.as_deref() else {
            return Err(Fault::Final(StoreError::Bug("TIME: no time".into())));
        };
        self.connections.observe(sent, seconds * 1_000_000 + micros);
        Ok(())
    }
}

#[async_trait]
impl DocumentStore for RedisStore {
    fn backend(&self) -> Backend {
        BACKEND
    }

    async fn write(
        &self,
        head: &DocumentHead,
        condition: Condition,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<WriteOutcome> {
        let write = self.new_write(head, condition, expiry);
        match self
            .finish_write(&write, Attempts::new(&self.connections, deadline))
            .await
        {
            Ok(outcome) => Ok(BACKEND.answers(outcome)),
            Err(error) => Err(BACKEND.fails(error)),
        }
    }

    async fn read(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<StoredDocument>> {
        let mut attempts = Attempts::new(&self.connections, deadline);
        while let Some(attempt) = attempts.next().await {
            match self.try_read(key, with_expiry, &attempt).await {
                Ok(found) => return Ok(BACKEND.answers(found)),
                Err(fault) => attempts
                    .failed(&attempt, fault)
                    .map_err(|error| BACKEND.fails(error))?,
            }
        }
        Err(BACKEND.fails(attempts.exhausted()))
    }

    async fn remove(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion> {
        let mut attempts = Attempts::new(&self.connections, deadline);
        while let Some(attempt) = attempts.next().await {
            match self.try_remove(key, expected, &attempt).await {
                Ok(deletion) => return Ok(BACKEND.answers(deletion)),
                Err(fault) => attempts
                    .failed(&attempt, fault)
                    .map_err(|error| BACKEND.fails(error))?,
            }
        }
        Err(BACKEND.fails(attempts.write_exhausted()))
    }

    async fn write_all(
        &self,
        heads: &[DocumentHead],
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>> {
        let deadline = Deadline::at(deadline.or_within(Self::BATCH_BOUND));
        let mut replies = Vec::with_capacity(heads.len());
        for chunk in pipelines(heads) {
            let writes: Vec<_> = chunk
                .iter()
                .map(|head| self.new_write(head, Condition::Any, expiry))
                .collect();
            let outcomes = self.write_chunk(writes, deadline).await;
            replies.extend(outcomes.into_iter().map(|outcome| match outcome {
                Ok(WriteOutcome::Written(written)) => Ok(BACKEND.answers(written)),
                Ok(WriteOutcome::Conflict { .. }) => Err(BACKEND.fails(StoreError::Bug(
                    "an unconditional write met a conflict".into(),
                ))),
                Err(error) => Err(BACKEND.fails(error)),
            }));
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
        match self.keys.page(prefix, page_size, token, deadline).await {
            Ok(page) => Ok(BACKEND.answers(page)),
            Err(error) => Err(BACKEND.fails(error)),
        }
    }

    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64> {
        match self.keys.count(prefix, deadline).await {
            Ok(count) => Ok(BACKEND.answers(count)),
            Err(error) => Err(BACKEND.fails(error)),
        }
    }

    async fn read_all(&self, prefix: &str, deadline: Deadline) -> Reply<ReadAll> {
        match self.keys.read_all(prefix, deadline).await {
            Ok(batches) => Ok(BACKEND.answers(ReadAll {
                complete: true,
                batches: batches
                    .map(|batch| batch.map_err(|error| BACKEND.fails(error)))
                    .boxed(),
            })),
            Err(error) => Err(BACKEND.fails(error)),
        }
    }
}

impl RedisStore {
    /// Makes one attempt at all writes in one pipeline, then goes on with each
    /// of those that failed by itself.
    async fn write_chunk(
        &self,
        writes: Vec<WriteCall<'_>>,
        deadline: Deadline,
    ) -> Vec<Result<WriteOutcome, StoreError>> {
        let sent = Instant::now();
        let results = match Attempts::new(&self.connections, deadline).next().await {
            Some(attempt) => {
                let results = self.pipeline(&writes, &attempt).await;
                if results.contains(&Err(Fault::NoScript)) {
                    // Once for all; what fails here fails again below, and is
                    // told there.
                    let _ = script::WRITE.load(&attempt).await;
                }
                results
            }
            None => vec![Err(Fault::NotRun("not connected".into())); writes.len()],
        };
        let mut finished = Vec::with_capacity(writes.len());
        for (write, result) in writes.iter().zip(results) {
            finished.push(async move {
                let lost_since = match result {
                    Ok(outcome) => return Ok(outcome),
                    Err(Fault::Final(error)) => return Err(error),
                    Err(Fault::Lost(_)) => Some(sent),
                    Err(Fault::NotRun(_) | Fault::NoScript) => None,
                };
                let attempts = Attempts::new(&self.connections, deadline).after_first(lost_since);
                self.finish_write(write, attempts).await
            });
        }
        join_all(finished).await
    }

    /// One attempt at all writes; one result each.
    async fn pipeline(
        &self,
        writes: &[WriteCall<'_>],
        attempt: &Attempt,
    ) -> Vec<Result<WriteOutcome, Fault>> {
        let all_failed = |fault| vec![Err(fault); writes.len()];
        let bounds = match self.bounds(attempt).await {
            Ok(bounds) => bounds,
            Err(fault) => return all_failed(fault),
        };
        let mut commands = Vec::with_capacity(writes.len());
        for write in writes {
            let key = self.keys.redis_key(write.head.key());
            let arguments = script::WRITE.arguments(&key, write.arguments(&bounds));
            commands.push((script::WRITE.command(), arguments));
        }
        let replies = match attempt.pipeline(commands).await {
            Ok(replies) => replies,
            Err(fault) => return all_failed(fault),
        };
        writes
            .iter()
            .zip(replies)
            .map(|(write, reply)| {
                let reply = ScriptReply::parse(reply?)?;
                self.connections.observe(attempt.sent, reply.now);
                read_write_reply(write.head.key(), &reply)
            })
            .collect()
    }
}

// === impl WriteCall ===

impl WriteCall<'_> {
    /// The arguments of `write.lua`.
    fn arguments(&self, bounds: &TimeBounds) -> Vec<Value> {
        let condition = match self.condition {
            Condition::Any => "any".into(),
            Condition::Absent => "absent".into(),
            Condition::Version(version) => version.to_string().into(),
        };
        let (ttl, keep) = match self.expiry {
            Expiry::After(ttl) => (ttl, ""),
            Expiry::Keep { otherwise } => (otherwise, "1"),
        };
        vec![
            Value::Bytes(self.head.up_to_version(&self.write_id)),
            condition,
            ttl.as_millis().to_string().into(),
            keep.into(),
            bounds.deadline.clone(),
            self.write_id.as_str().into(),
            bounds.lost_since.clone(),
        ]
    }
}

/// Cuts a batch into what is sent at once.
fn pipelines(mut heads: &[DocumentHead]) -> Vec<&[DocumentHead]> {
    let mut pipelines = Vec::new();
    while !heads.is_empty() {
        let mut bytes = 0;
        let fitting = heads.iter().take(WRITES_PER_PIPELINE).take_while(|head| {
            bytes += head.stored_bytes();
            bytes <= BYTES_PER_PIPELINE
        });
        let (pipeline, rest) = heads.split_at(fitting.count().max(1));
        pipelines.push(pipeline);
        heads = rest;
    }
    pipelines
}

fn read_write_reply(key: &GroupKey, reply: &ScriptReply) -> Result<WriteOutcome, Fault> {
    match reply.status.as_str() {
        "written" => {
            if let (Some(bytes), Some(sha1)) = (reply.integer(2), reply.text(3)) {
                tracing::warn!(%key, bytes, sha1, "replaced an unreadable document");
            }
            Ok(WriteOutcome::Written(Written {
                version: version(reply, 0)?,
                expires_at: expiry(reply, 1),
            }))
        }
        "conflict" => Ok(WriteOutcome::Conflict {
            current: reply.bytes(0).map(|json| Document {
                key: key.clone(),
                json,
            }),
        }),
        "unreadable" => Err(unreadable(key, reply.bytes(0))),
        _ => Err(reply.fault()),
    }
}

fn read_delete_reply(key: &GroupKey, reply: &ScriptReply) -> Result<Deletion, Fault> {
    let (deleted, version) = match reply.status.as_str() {
        "deleted" => {
            if let (Some(bytes), Some(sha1)) = (reply.integer(1), reply.text(2)) {
                tracing::warn!(%key, bytes, sha1, "removed an unreadable document");
            }
            // None for the 0 of an unreadable document.
            (true, reply.integer(0).and_then(Version::new))
        }
        "absent" => (false, None),
        "conflict" => (false, Some(version(reply, 0)?)),
        "unreadable" => return Err(unreadable(key, reply.bytes(0))),
        _ => return Err(reply.fault()),
    };
    Ok(Deletion { deleted, version })
}

fn version(reply: &ScriptReply, at: usize) -> Result<Version, Fault> {
    reply.integer(at).and_then(Version::new).ok_or_else(|| {
        let text = reply.text(at).unwrap_or_default();
        Fault::Final(StoreError::VersionOutOfRange(text))
    })
}

/// A reply holds milliseconds since 1970, or -1 for "never".
fn expiry(reply: &ScriptReply, at: usize) -> Option<Time> {
    let millis = reply.integer(at).filter(|millis| *millis >= 0)?;
    Time::from_millis(millis).ok()
}

/// The script could not tell the version; parsing says why.
fn unreadable(key: &GroupKey, json: Option<Bytes>) -> Fault {
    let document = Document {
        key: key.clone(),
        json: json.unwrap_or_default(),
    };
    let why = document
        .parse()
        .err()
        .unwrap_or_else(|| Unreadable::new(&document.json, "Redis cannot parse it as JSON".into()));
    Fault::Final(StoreError::Unreadable(why))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{AlertGroup, GroupMetadata};

    #[test]
    fn a_batch_is_cut_by_number_and_by_bytes() {
        let head = |name_bytes: usize| {
            DocumentHead::new(&AlertGroup {
                key: GroupKey::new("k".repeat(name_bytes)).unwrap(),
                alerts: Default::default(),
                metadata: GroupMetadata::default(),
            })
        };
        let lengths = |heads: &[DocumentHead]| -> Vec<usize> {
            pipelines(heads).into_iter().map(<[_]>::len).collect()
        };
        assert_eq!(lengths(&[]), [0; 0]);
        assert_eq!(lengths(&vec![head(1); 250]), [100, 100, 50]);
        assert_eq!(lengths(&vec![head(400_000); 5]), [2, 2, 1]);
        assert_eq!(lengths(&[head(1), head(2_000_000), head(1)]), [1, 1, 1]);
    }
}
