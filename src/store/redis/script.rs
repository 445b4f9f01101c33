//! The Lua scripts, and their replies.

use std::sync::LazyLock;

use bytes::Bytes;
use fred::prelude::Value;
use sha1::{Digest, Sha1};

use super::{
    attempt::{Attempt, Command, Trail},
    fault::Fault,
    topology::{Node, Place},
};
use crate::{
    domain::{document::Document, group::GroupKey},
    store::StoreError,
};

/// Writes a document under a condition; see `write.lua`.
pub static WRITE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "write",
        concat!(include_str!("document.lua"), include_str!("write.lua")),
    )
});

/// Removes a document; see `delete.lua`.
pub static DELETE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "delete",
        concat!(include_str!("document.lua"), include_str!("delete.lua")),
    )
});

/// Reads a document with its expiry; see `read.lua`.
pub static READ: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "read",
        concat!(include_str!("document.lua"), include_str!("read.lua")),
    )
});

/// Puts back a document that the server has lost; see `restore.lua`.
pub static RESTORE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "restore",
        concat!(include_str!("document.lua"), include_str!("restore.lua")),
    )
});

/// A script on one key, called by its digest.
#[derive(Debug)]
pub struct Script {
    name: &'static str,
    source: &'static str,
    sha1: String,
}

/// What a script replied: a status, the time in Redis, and more values.
#[derive(Debug)]
pub struct ScriptReply {
    pub status: String,
    /// Microseconds since 1970 by the clock of Redis.
    pub now: i64,
    values: Vec<Value>,
}

// === impl Script ===

impl Script {
    /// Calls of one attempt. A document may be replaced by another one of which the
    /// version has to be told.
    const MOST_TELLINGS: usize = 3;

    fn new(name: &'static str, source: &'static str) -> Self {
        Self {
            name,
            source,
            sha1: sha1_hex(source),
        }
    }

    /// A call of the script.
    pub fn call(&self, place: &Place, arguments: Vec<Value>) -> Command {
        let mut all = Vec::with_capacity(arguments.len() + 3);
        all.push(self.sha1.as_str().into());
        all.push("1".into());
        all.push(place.key.as_str().into());
        all.extend(arguments);
        Command::on(place, "EVALSHA", all).of_script(self.name)
    }

    /// Calls a script that changes nothing.
    pub async fn run(
        &self,
        attempt: &Attempt,
        place: &Place,
        arguments: Vec<Value>,
    ) -> Result<ScriptReply, Fault> {
        let command = self.call(place, arguments);
        let reply = match attempt.run(command.clone()).await {
            Err(Fault::NoScript) => {
                Box::pin(self.load(attempt, &place.node)).await?;
                Box::pin(attempt.run(command)).await?
            }
            reply => reply?,
        };
        ScriptReply::parse(reply)
    }

    /// Calls a script that may change the document at `key`. A script that asks for
    /// the version of the stored document is told.
    pub async fn run_write(
        &self,
        attempt: &Attempt,
        trail: &Trail,
        place: &Place,
        key: &GroupKey,
        arguments: Vec<Value>,
    ) -> Result<ScriptReply, Fault> {
        let usual = arguments.len();
        let mut arguments = arguments;
        for _ in 0..Self::MOST_TELLINGS {
            let reply = self
                .run_told(attempt, trail, place, arguments.clone())
                .await?;
            let Some(document) = reply.asks_for_version_of(key) else {
                return Ok(reply);
            };
            arguments.truncate(usual);
            arguments.extend(told(&document));
        }
        Err(Fault::NotRun("the document changes all the time".into()))
    }

    async fn run_told(
        &self,
        attempt: &Attempt,
        trail: &Trail,
        place: &Place,
        arguments: Vec<Value>,
    ) -> Result<ScriptReply, Fault> {
        let command = self.call(place, arguments);
        let reply = match attempt.run_write(trail, command.clone()).await {
            Err(Fault::NoScript) => {
                Box::pin(self.load(attempt, &place.node)).await?;
                Box::pin(attempt.run_write(trail, command)).await?
            }
            reply => reply?,
        };
        ScriptReply::parse(reply)
    }

    /// Makes the script known to a server.
    pub async fn load(&self, attempt: &Attempt, node: &Node) -> Result<(), Fault> {
        let arguments = vec!["LOAD".into(), self.source.into()];
        let loaded = attempt.run(Command::at(node, "SCRIPT", arguments)).await;
        loaded.map(|_| ()).map_err(Fault::before_the_write)
    }
}

// === impl ScriptReply ===

impl ScriptReply {
    /// Reads a reply. The statuses that mean the same for every script become
    /// faults.
    pub fn parse(reply: Value) -> Result<Self, Fault> {
        let bug = |what: &str| Fault::Final(StoreError::Bug(format!("script reply: {what}")));
        let Value::Array(values) = reply else {
            return Err(bug("not an array"));
        };
        let mut values = values.into_iter();
        let mut text = || values.next().and_then(|value| value.into_string());
        let status = text().ok_or_else(|| bug("no status"))?;
        let now = text()
            .and_then(|now| now.parse().ok())
            .ok_or_else(|| bug("no time"))?;
        Ok(Self {
            status,
            now,
            values: values.collect(),
        })
    }

    /// The document at `key`, if the script has done nothing because it has to be told
    /// the version of that.
    fn asks_for_version_of(&self, key: &GroupKey) -> Option<Document> {
        (self.status == "whole").then(|| Document {
            key: key.clone(),
            json: self.bytes(0).unwrap_or_default(),
        })
    }

    /// The statuses that mean the same for every script.
    pub fn fault(&self) -> Fault {
        match self.status.as_str() {
            "late" => Fault::NotRun("Redis got the command after its deadline".into()),
            // In a pipeline, where nobody is told: by itself it will be.
            "whole" => Fault::NotRun("the version of the document has to be told".into()),
            "foreign" => Fault::Final(StoreError::ForeignType),
            "out_of_range" => Fault::Final(StoreError::VersionOutOfRange(
                self.text(0).unwrap_or_default(),
            )),
            "unknown" => Fault::Final(StoreError::OutcomeUnknown),
            "failed" => Fault::of_reply(plain(&self.text(0).unwrap_or_default())),
            other => Fault::Final(StoreError::Bug(format!("script status {other}"))),
        }
    }

    /// A value as text.
    pub fn text(&self, at: usize) -> Option<String> {
        self.values.get(at).and_then(Value::as_string)
    }

    /// A value as a whole number.
    pub fn integer(&self, at: usize) -> Option<i64> {
        self.text(at)?.parse().ok()
    }

    /// A value as bytes, without copying them.
    pub fn bytes(&self, at: usize) -> Option<Bytes> {
        self.values.get(at).and_then(bytes)
    }
}

/// What a script is told of a document: which one it is, and its version.
fn told(document: &Document) -> [Value; 2] {
    let version = document.version();
    [
        sha1_hex(&document.json).into(),
        version.map_or("".into(), |version| version.to_string().into()),
    ]
}

/// The error of a command that Redis refused to a script. Before version 7, it says
/// where in the script that was: `@user_script: 155: -READONLY You can't …`.
fn plain(error: &str) -> &str {
    let error = error.trim_end();
    let position = error.strip_prefix("@user_script");
    let refused = position.and_then(|position| position.split_once(": -"));
    refused.map_or(error, |(_, error)| error)
}

/// The SHA-1 digest of a text, as Redis writes it.
pub fn sha1_hex(text: impl AsRef<[u8]>) -> String {
    let digest = Sha1::digest(text);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of a string value, without copying them.
pub fn bytes(value: &Value) -> Option<Bytes> {
    match value {
        Value::Bytes(bytes) => Some(bytes.clone()),
        Value::String(text) => Some(text.inner().clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_same_on_every_version_of_redis() {
        for error in [
            "READONLY You can't write against a read only replica.",
            "@user_script: 155: -READONLY You can't write against a read only replica.\r\n",
        ] {
            let expected = "READONLY You can't write against a read only replica.";
            assert_eq!(plain(error), expected);
        }
        assert_eq!(plain("ERR a: -b"), "ERR a: -b");
    }
}
