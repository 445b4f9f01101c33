//! Writes, deletes and reads in the terms of the scripts: their arguments and
//! their replies.

use std::time::Duration;

use bytes::Bytes;
use fred::prelude::Value;

use super::{fault::Fault, script::ScriptReply};
use crate::{
    domain::{
        document::{Document, Unreadable},
        group::{GroupKey, Time},
        version::Version,
    },
    store::{
        Deletion, Expires, Expiry, StoreError, Written,
        documents::{Condition, StoredDocument, Write, WriteOutcome},
    },
    telemetry::rate_limited,
};

/// Documents that one pipeline holds at most, and calls at once where they have
/// to be written one by one.
const WRITES_PER_PIPELINE: usize = 100;
/// Bytes of documents that one pipeline holds at most, unless a single document
/// has more: a pipeline gets no more time than one command.
const BYTES_PER_PIPELINE: usize = 1 << 20;

/// What bounds an attempt, as arguments of the scripts: times in microseconds by the
/// clock of Redis, sizes in bytes.
pub struct ScriptLimits {
    /// Not executed later than this.
    pub deadline: Value,
    /// When an attempt whose answer is missing was executed at the earliest;
    /// empty if there is none.
    pub lost_since: Value,
    /// The largest document that comes along with a refusal.
    pub largest_in_reply: Value,
    /// The largest value that is looked at whole.
    pub largest: Value,
    /// Whatever is written gets a greater version.
    pub newer_than: Option<Version>,
}

/// Something about what is stored, or how large that is where it was too large to
/// come along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bounded<T> {
    Whole(T),
    Larger(usize),
}

/// The arguments of `write.lua`.
pub fn arguments(write: &Write, limits: &ScriptLimits) -> Vec<Value> {
    let condition = match write.condition {
        Condition::Any => "any".into(),
        Condition::Absent => "absent".into(),
        Condition::Version(version) => version.to_string().into(),
    };
    let (ttl, keep) = match write.expiry {
        Expiry::After(ttl) => (ttl, ""),
        Expiry::Keep { otherwise } => (otherwise, "1"),
    };
    vec![
        Value::Bytes(write.head.unversioned(&write.write_id)),
        condition,
        // Redis takes no time to live of 0.
        ttl.as_millis().max(1).to_string().into(),
        keep.into(),
        limits.deadline.clone(),
        write.write_id.as_str().into(),
        limits.lost_since.clone(),
        write
            .newer_than
            .max(limits.newer_than)
            .map_or("".into(), |version| version.to_string().into()),
        limits.largest_in_reply.clone(),
        limits.largest.clone(),
    ]
}

/// Cuts a batch into what is sent at once.
pub fn pipelines(mut writes: &[Write]) -> Vec<&[Write]> {
    let mut pipelines = Vec::new();
    while !writes.is_empty() {
        let mut bytes = 0;
        let fitting = writes.iter().take(WRITES_PER_PIPELINE).take_while(|write| {
            bytes += write.head.stored_bytes();
            bytes <= BYTES_PER_PIPELINE
        });
        let (pipeline, rest) = writes.split_at(fitting.count().max(1));
        pipelines.push(pipeline);
        writes = rest;
    }
    pipelines
}

/// What `write.lua` replied.
pub fn read_write_reply(
    key: &GroupKey,
    reply: &ScriptReply,
) -> Result<Bounded<WriteOutcome>, Fault> {
    let outcome = match reply.status.as_str() {
        "written" => {
            if let Some(bytes) = reply.integer(3) {
                let (key, sha1) = (key.as_str(), reply.text(4));
                rate_limited!(warn, key, bytes, sha1, "replaced an unreadable document");
            }
            WriteOutcome::Written(Written {
                version: version(reply, 0)?,
                // None for 0.
                replaced: reply.integer(2).and_then(Version::new),
                expires: expiry(reply, 1),
            })
        }
        "conflict" => WriteOutcome::Conflict {
            current: stored(key, reply),
        },
        "larger" => return larger(reply),
        "unreadable" => return Err(unreadable(key, reply.bytes(0))),
        _ => return Err(reply.fault()),
    };
    Ok(Bounded::Whole(outcome))
}

fn larger<T>(reply: &ScriptReply) -> Result<Bounded<T>, Fault> {
    let bytes = reply.integer(0).and_then(|bytes| bytes.try_into().ok());
    bytes.map(Bounded::Larger).ok_or_else(|| reply.fault())
}

/// What `delete.lua` replied.
pub fn read_delete_reply(key: &GroupKey, reply: &ScriptReply) -> Result<Bounded<Deletion>, Fault> {
    let (deleted, version) = match reply.status.as_str() {
        "deleted" => {
            if let Some(bytes) = reply.integer(1) {
                let (key, sha1) = (key.as_str(), reply.text(2));
                rate_limited!(warn, key, bytes, sha1, "removed an unreadable document");
            }
            // None for the 0 of an unreadable document.
            (true, reply.integer(0).and_then(Version::new))
        }
        "absent" => (false, None),
        "conflict" => (false, Some(version(reply, 0)?)),
        "larger" => return larger(reply),
        "unreadable" => return Err(unreadable(key, reply.bytes(0))),
        _ => return Err(reply.fault()),
    };
    Ok(Bounded::Whole(Deletion { deleted, version }))
}

/// How long a delete has to wait for the clock of Redis to pass the version that
/// it deletes; None if it has not.
pub fn too_early_by(reply: &ScriptReply) -> Option<Duration> {
    if reply.status != "early" {
        return None;
    }
    let ahead = reply.integer(0)?.saturating_sub(reply.now);
    Some(Duration::from_micros(ahead.try_into().unwrap_or(0) + 1))
}

/// What `read.lua` replied.
pub fn read_read_reply(
    key: &GroupKey,
    reply: &ScriptReply,
) -> Result<Bounded<Option<StoredDocument>>, Fault> {
    match reply.status.as_str() {
        "absent" => Ok(Bounded::Whole(None)),
        "read" => Ok(Bounded::Whole(stored(key, reply))),
        "larger" => larger(reply),
        _ => Err(reply.fault()),
    }
}

/// A document and its expiry, if there is one.
fn stored(key: &GroupKey, reply: &ScriptReply) -> Option<StoredDocument> {
    Some(StoredDocument {
        document: Document {
            key: key.clone(),
            json: reply.bytes(0)?,
        },
        expires: expiry(reply, 1),
    })
}

fn version(reply: &ScriptReply, at: usize) -> Result<Version, Fault> {
    reply.integer(at).and_then(Version::new).ok_or_else(|| {
        let text = reply.text(at).unwrap_or_default();
        Fault::Final(StoreError::VersionOutOfRange(text))
    })
}

/// A reply holds milliseconds since 1970, or -1 for "never".
fn expiry(reply: &ScriptReply, at: usize) -> Option<Expires> {
    let millis = reply.integer(at).filter(|millis| *millis >= 0)?;
    let left = millis.saturating_sub(reply.now / 1_000);
    Some(Expires {
        at: Time::from_millis(millis).ok()?,
        left: Duration::from_millis(left.try_into().unwrap_or(0)),
    })
}

/// There is no version, since the document cannot be read.
fn unreadable(key: &GroupKey, json: Option<Bytes>) -> Fault {
    Fault::Final(why_unreadable(&Document {
        key: key.clone(),
        json: json.unwrap_or_default(),
    }))
}

/// Why a document has no version: parsing says it.
pub fn why_unreadable(document: &Document) -> StoreError {
    let why = document.parse().err();
    StoreError::Unreadable(
        why.unwrap_or_else(|| Unreadable::new(&document.json, "its version cannot be told".into())),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        document::DocumentHead,
        group::{AlertGroup, GroupMetadata},
    };

    #[test]
    fn a_batch_is_cut_by_number_and_by_bytes() {
        let write = |name_bytes: usize| Write {
            head: DocumentHead::new(&AlertGroup {
                key: GroupKey::new("k".repeat(name_bytes)).unwrap(),
                alerts: Default::default(),
                metadata: GroupMetadata::default(),
            }),
            condition: Condition::Any,
            expiry: Expiry::After(Duration::from_secs(1)),
            write_id: String::new(),
            newer_than: None,
        };
        let lengths = |writes: &[Write]| -> Vec<usize> {
            pipelines(writes).into_iter().map(<[_]>::len).collect()
        };
        assert_eq!(lengths(&[]), [0; 0]);
        assert_eq!(lengths(&vec![write(1); 250]), [100, 100, 50]);
        assert_eq!(lengths(&vec![write(400_000); 5]), [2, 2, 1]);
        assert_eq!(lengths(&[write(1), write(2_000_000), write(1)]), [1, 1, 1]);
    }
}
