//! Listing: the key space of Redis is the index.
//!
//! There is no index key that could drift from the groups. A listing is a
//! `SCAN`, and a `SCAN` cursor is worthless on any other server: what ties a
//! listing to one server is the `run_id` of its process.

use std::collections::VecDeque;

use bytes::Bytes;
use fred::{prelude::Value, types::CustomCommand};
use futures::{Stream, stream};

use super::{
    NotDone, ServerInfo,
    attempt::{Attempts, on_any_node, on_key},
    connection::Connections,
    fault::Fault,
    script::{self, ScriptReply},
    write::read_read_reply,
};
use crate::{
    document::Document,
    group::GroupKey,
    store::{
        Backend, Deadline, KeyPage, Problem, StoreError,
        documents::{DocumentBatch, StoredDocument},
        page_token::PageToken,
    },
    telemetry::{self, RedisCommand},
};

/// The keys of the service in Redis. Cheap to clone.
#[derive(Clone)]
pub struct KeySpace {
    connections: Connections,
    /// What every key of ours begins with.
    key_prefix: String,
    /// A scan reports larger values instead of reading them.
    max_document_bytes: usize,
}

/// What one `SCAN` found.
struct ScanPage {
    /// Where to go on; None at the end.
    cursor: Option<String>,
    /// Keys without the key prefix.
    keys: Vec<Bytes>,
}

/// A reading of all documents, between two batches.
struct Reading {
    keys: KeySpace,
    prefix: String,
    /// Whether to look up when each document expires.
    with_expiry: bool,
    deadline: Deadline,
    /// The server that is scanned.
    run_id: String,
    /// Where to go on; None at the end.
    cursor: Option<String>,
    /// Keys that were found and not read yet, with the size of their values.
    found: VecDeque<(GroupKey, usize)>,
    problems: Vec<Problem>,
}

// === impl KeySpace ===

impl KeySpace {
    /// Keys that one `SCAN` looks at.
    const SCAN_COUNT: usize = 1_000;
    /// `SCAN`s that one page makes at most; among foreign keys it may be empty.
    const SCANS_PER_PAGE: usize = 100;
    /// Bytes of keys that one page holds, about.
    const PAGE_BYTES: usize = 1 << 20;
    /// A key takes this much at most, for the bound above.
    const MAX_KEY_BYTES: usize = 4_096;
    /// Bytes of documents that are read at once, unless one alone has more.
    const BATCH_BYTES: usize = 1 << 20;

    pub fn new(connections: Connections, key_prefix: &str, max_document_bytes: usize) -> Self {
        Self {
            connections,
            key_prefix: key_prefix.to_owned(),
            max_document_bytes,
        }
    }

    /// The key of a group's document.
    pub fn redis_key(&self, key: &GroupKey) -> String {
        format!("{}{}", self.key_prefix, key)
    }

    /// Some keys that begin with `prefix`.
    pub async fn page(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Result<KeyPage, NotDone> {
        let token = token
            .map(|token| PageToken::decode(token, prefix))
            .transpose()?;
        let run_id = self.server(deadline).await?.run_id;
        let mut cursor = match token {
            Some(token) => {
                token.check_server(Backend::Redis, &run_id)?;
                if token.cursor.parse::<u64>().is_err() {
                    let error = "this page token has no valid cursor";
                    return Err(StoreError::InvalidPageToken(error).into());
                }
                Some(token.cursor)
            }
            None => Some("0".to_owned()),
        };

        let mut page = KeyPage::default();
        let mut room = Self::PAGE_BYTES;
        for _ in 0..Self::SCANS_PER_PAGE {
            let Some(from) = cursor.take() else { break };
            let count = (room / Self::MAX_KEY_BYTES).clamp(10, Self::SCAN_COUNT);
            let scanned = self.scan(prefix, &from, count, deadline).await?;
            for key in scanned.keys {
                if let Ok(key) = group_key(&key) {
                    room = room.saturating_sub(key.as_str().len());
                    page.keys.push(key);
                }
            }
            cursor = scanned.cursor;
            if page.keys.len() >= page_size || room < 10 * Self::MAX_KEY_BYTES {
                break;
            }
        }
        self.check_run_id(&run_id, deadline).await?;
        page.next = cursor.map(|cursor| {
            PageToken {
                backend: Backend::Redis,
                server: run_id,
                cursor,
                prefix: prefix.to_owned(),
            }
            .encode()
        });
        Ok(page)
    }

    /// Number of group keys that begin with `prefix`.
    pub async fn count(&self, prefix: &str, deadline: Deadline) -> Result<u64, NotDone> {
        let mut count = 0;
        let mut cursor = Some("0".to_owned());
        while let Some(from) = cursor {
            let scanned = self.scan(prefix, &from, Self::SCAN_COUNT, deadline).await?;
            let keys = scanned.keys.iter().filter(|key| group_key(key).is_ok());
            count += keys.count() as u64;
            cursor = scanned.cursor;
        }
        Ok(count)
    }

    /// All documents under keys that begin with `prefix`. Reads one batch at a
    /// time, when it is asked for.
    pub async fn read_all(
        &self,
        prefix: &str,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Result<impl Stream<Item = Result<DocumentBatch, NotDone>> + Send + use<>, NotDone> {
        let reading = Reading {
            run_id: self.server(deadline).await?.run_id,
            with_expiry,
            keys: self.clone(),
            prefix: prefix.to_owned(),
            deadline,
            cursor: Some("0".to_owned()),
            found: VecDeque::new(),
            problems: Vec::new(),
        };
        Ok(stream::try_unfold(reading, |mut reading| async move {
            let batch = reading.next().await?;
            Ok(batch.map(|batch| (batch, reading)))
        }))
    }

    /// One `SCAN`.
    async fn scan(
        &self,
        prefix: &str,
        cursor: &str,
        count: usize,
        deadline: Deadline,
    ) -> Result<ScanPage, NotDone> {
        let pattern = format!("{}{}*", escape_glob(&self.key_prefix), escape_glob(prefix));
        let command = on_any_node("SCAN");
        let arguments = vec![
            cursor.into(),
            "MATCH".into(),
            pattern.into(),
            "COUNT".into(),
            count.to_string().into(),
            "TYPE".into(),
            "string".into(),
        ];
        let reply = self.read_one(command, arguments, deadline).await?;
        let malformed = || NotDone::from(StoreError::Bug("SCAN: a reply of another form".into()));
        let Value::Array(parts) = reply else {
            return Err(malformed());
        };
        let [cursor, Value::Array(keys)] = &parts[..] else {
            return Err(malformed());
        };
        let cursor = cursor.as_string().ok_or_else(malformed)?;
        let key_prefix = self.key_prefix.as_bytes();
        Ok(ScanPage {
            cursor: (cursor != "0").then_some(cursor),
            keys: keys
                .iter()
                .filter_map(script::bytes)
                .filter(|key| key.starts_with(key_prefix))
                .map(|key| key.slice(key_prefix.len()..))
                .collect(),
        })
    }

    /// What the server that answers says of itself.
    pub async fn server(&self, deadline: Deadline) -> Result<ServerInfo, NotDone> {
        let info = self
            .read_one(on_any_node("INFO"), Vec::new(), deadline)
            .await?
            .into_string()
            .unwrap_or_default();
        let server = ServerInfo::parse(&info);
        server.ok_or_else(|| StoreError::Bug("INFO: no run_id".into()).into())
    }

    async fn check_run_id(&self, run_id: &str, deadline: Deadline) -> Result<(), NotDone> {
        if self.server(deadline).await?.run_id == run_id {
            Ok(())
        } else {
            Err(StoreError::ListingRestarted.into())
        }
    }

    /// The reply to the same command on each of some keys; None where another
    /// type lives.
    async fn read_each(
        &self,
        command: &'static str,
        keys: &[GroupKey],
        deadline: Deadline,
    ) -> Result<Vec<Option<Value>>, NotDone> {
        let mut commands = Vec::with_capacity(keys.len());
        for key in keys {
            commands.push((on_key(command), vec![self.redis_key(key).into()]));
        }
        self.read(commands, deadline).await
    }

    /// The reply of `read.lua` for each of some keys; None where another type
    /// lives.
    async fn read_each_expiring(
        &self,
        keys: &[GroupKey],
        deadline: Deadline,
    ) -> Result<Vec<Option<Value>>, NotDone> {
        let mut commands = Vec::with_capacity(keys.len());
        for key in keys {
            let arguments = script::READ.arguments(&self.redis_key(key), Vec::new());
            commands.push((script::READ.command(), arguments));
        }
        self.read(commands, deadline).await
    }

    /// The reply to a command that no type is foreign to.
    async fn read_one(
        &self,
        command: CustomCommand,
        arguments: Vec<Value>,
        deadline: Deadline,
    ) -> Result<Value, NotDone> {
        let replies = self.read(vec![(command, arguments)], deadline).await?;
        Ok(replies.into_iter().flatten().next().unwrap_or(Value::Null))
    }

    /// The replies to commands in one pipeline; None where another type lives.
    async fn read(
        &self,
        commands: Vec<(CustomCommand, Vec<Value>)>,
        deadline: Deadline,
    ) -> Result<Vec<Option<Value>>, NotDone> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        let kind = match &*commands[0].0.cmd {
            "INFO" => RedisCommand::Other,
            _ => RedisCommand::Scan,
        };
        // Each step of a listing gets the time of one call.
        let mut attempts = Attempts::at_read(&self.connections, deadline);
        while let Some(attempt) = attempts.next().await {
            let _measured = telemetry::redis_attempt(kind);
            let replies = attempt.pipeline(commands.clone()).await;
            match replies.and_then(|replies| replies.into_iter().map(unless_foreign).collect()) {
                Ok(values) => return Ok(values),
                Err(fault) => {
                    if fault == Fault::NoScript {
                        // What fails here fails again in the next attempt.
                        let _ = script::READ.load(&attempt).await;
                    }
                    attempts.failed(&attempt, fault)?;
                }
            }
        }
        Err(attempts.used_up())
    }
}

// === impl Reading ===

impl Reading {
    async fn next(&mut self) -> Result<Option<DocumentBatch>, NotDone> {
        if self.found.is_empty() {
            let Some(cursor) = self.cursor.take() else {
                return Ok(None);
            };
            self.find(&cursor).await?;
        }
        let documents = self.read().await?;
        if self.cursor.is_none() && self.found.is_empty() {
            // After the last read and before it is handed out: what was read is
            // complete only if one server was read to the end.
            self.keys.check_run_id(&self.run_id, self.deadline).await?;
        }
        Ok(Some(DocumentBatch {
            documents,
            problems: std::mem::take(&mut self.problems),
        }))
    }

    /// Looks for more keys.
    async fn find(&mut self, cursor: &str) -> Result<(), NotDone> {
        let scanned = self
            .keys
            .scan(&self.prefix, cursor, KeySpace::SCAN_COUNT, self.deadline)
            .await?;
        self.cursor = scanned.cursor;
        let mut keys = Vec::with_capacity(scanned.keys.len());
        for key in &scanned.keys {
            match group_key(key) {
                Ok(key) => keys.push(key),
                Err(Some(error)) => self.problems.push(Problem {
                    key: String::from_utf8_lossy(key).into_owned(),
                    error,
                }),
                Err(None) => {}
            }
        }
        let sizes = self.keys.read_each("STRLEN", &keys, self.deadline).await?;
        for (key, size) in keys.into_iter().zip(sizes) {
            match size.and_then(|size| size.as_usize()) {
                Some(bytes) if bytes > self.keys.max_document_bytes => self.problem(
                    &key,
                    StoreError::StoredValueTooLarge {
                        bytes,
                        limit: self.keys.max_document_bytes,
                    },
                ),
                Some(bytes) => self.found.push_back((key, bytes)),
                None => self.problem(&key, StoreError::ForeignType),
            }
        }
        Ok(())
    }

    /// Reads some of the documents that were found.
    async fn read(&mut self) -> Result<Vec<StoredDocument>, NotDone> {
        let mut keys = Vec::new();
        let mut room = KeySpace::BATCH_BYTES;
        while let Some((_, bytes)) = self.found.front()
            && (keys.is_empty() || *bytes <= room)
        {
            room = room.saturating_sub(*bytes);
            keys.extend(self.found.pop_front().map(|(key, _)| key));
        }
        let values = if self.with_expiry {
            self.keys.read_each_expiring(&keys, self.deadline).await?
        } else {
            self.keys.read_each("GET", &keys, self.deadline).await?
        };
        let mut documents = Vec::with_capacity(keys.len());
        for (key, value) in keys.into_iter().zip(values) {
            match value {
                // None: deleted or expired since it was found.
                Some(value) => documents.extend(self.stored(key, value)?),
                None => self.problem(&key, StoreError::ForeignType),
            }
        }
        Ok(documents)
    }

    /// What was read of a key, if anything.
    fn stored(&self, key: GroupKey, value: Value) -> Result<Option<StoredDocument>, NotDone> {
        if self.with_expiry {
            let read = ScriptReply::parse(value).and_then(|reply| read_read_reply(&key, &reply));
            // A reply that is no error and no document was not foreseen.
            return read.map_err(|fault| StoreError::Bug(format!("READ: {fault:?}")).into());
        }
        Ok(script::bytes(&value).map(|json| StoredDocument {
            document: Document { key, json },
            expires: None,
        }))
    }

    fn problem(&mut self, key: &GroupKey, error: StoreError) {
        self.problems.push(Problem {
            key: key.to_string(),
            error,
        });
    }
}

fn unless_foreign(reply: Result<Value, Fault>) -> Result<Option<Value>, Fault> {
    match reply {
        Ok(value) => Ok(Some(value).filter(|value| !says_foreign(value))),
        Err(Fault::Final(StoreError::ForeignType)) => Ok(None),
        Err(fault) => Err(fault),
    }
}

/// Whether a script says that another type lives at its key.
fn says_foreign(reply: &Value) -> bool {
    let Value::Array(values) = reply else {
        return false;
    };
    values.first().and_then(Value::as_string).as_deref() == Some("foreign")
}

/// A key of ours as a group key. No error for the service's own keys, which no
/// listing shows.
fn group_key(key: &[u8]) -> Result<GroupKey, Option<StoreError>> {
    use crate::group::GroupKeyError;

    let not_a_key = |reason: String| Some(StoreError::NotAGroupKey(reason));
    let key = std::str::from_utf8(key).map_err(|_| not_a_key("is not UTF-8".into()))?;
    match GroupKey::new(key) {
        Ok(key) => Ok(key),
        Err(GroupKeyError::LeadingControl) => Err(None),
        Err(GroupKeyError::Empty) => Err(not_a_key("is empty".into())),
    }
}

/// Takes their special meaning from the characters of a glob pattern.
fn escape_glob(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '*' | '?' | '[' | ']' | '\\') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn glob_characters_are_escaped() {
        assert_eq!(escape_glob(r"a*b?[c]\d{e}^-"), r"a\*b\?\[c\]\\d{e}^-");
    }

    #[test]
    fn only_keys_of_groups_are_listed() {
        assert_eq!(group_key(b"a").unwrap().as_str(), "a");
        assert_eq!(group_key(b"\x01probe:x"), Err(None));
        assert!(matches!(
            group_key(b""),
            Err(Some(StoreError::NotAGroupKey(_)))
        ));
        assert!(matches!(
            group_key(b"a\xff"),
            Err(Some(StoreError::NotAGroupKey(_)))
        ));
    }
}
