//! The readers of what Redis answers, for the targets in `fuzz/`.

use bytes::Bytes;
use fred::prelude::Value;

use super::{
    fault::Fault,
    script::ScriptReply,
    server_info::ServerInfo,
    topology::{Node, Share, Topology},
    write::{Bounded, read_delete_reply, read_read_reply, read_write_reply, too_early_by},
};
use crate::{
    domain::group::GroupKey,
    store::{
        Deletion,
        documents::{StoredDocument, WriteOutcome},
    },
};

/// What each script's reader makes of one reply; None: a fault, or what is stored is too
/// large to come along.
#[derive(Debug)]
pub struct ReadBy {
    pub write: Option<WriteOutcome>,
    pub delete: Option<Deletion>,
    pub read: Option<Option<StoredDocument>>,
}

/// Reads a reply of a script, of which each line is a value: `:1` a number, `_` nil,
/// anything else a string. None if it is not even the beginning of one.
pub fn read_reply(key: &GroupKey, lines: &[u8]) -> Option<ReadBy> {
    let values = lines.split(|byte| *byte == b'\n').map(value).collect();
    let reply = ScriptReply::parse(Value::Array(values)).ok()?;
    let _ = too_early_by(&reply);
    Some(ReadBy {
        write: read_write_reply(key, &reply).ok().and_then(whole),
        delete: read_delete_reply(key, &reply).ok().and_then(whole),
        read: read_read_reply(key, &reply).ok().and_then(whole),
    })
}

/// Reads what a server says of itself, of a cluster and of what went wrong.
pub fn read_info(key: &str, text: &str) -> Option<ServerInfo> {
    let _ = Fault::of_reply(text).before_the_write().kind();
    if let Some(node) = Topology::single().destination(key, text) {
        assert_eq!(node, Node::Only);
    }
    let _ = Share::parse(text);
    ServerInfo::parse(text)
}

fn whole<T>(bounded: Bounded<T>) -> Option<T> {
    match bounded {
        Bounded::Whole(whole) => Some(whole),
        Bounded::Larger(_) => None,
    }
}

fn value(line: &[u8]) -> Value {
    let number = line.strip_prefix(b":");
    let number = number.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    match (number, line) {
        (Some(number), _) => Value::Integer(number),
        (None, b"_") => Value::Null,
        (None, _) => Value::Bytes(Bytes::copy_from_slice(line)),
    }
}
