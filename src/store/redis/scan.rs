//! Listing: the key space of Redis is the index.
//!
//! There is no index key that could drift from the groups. A listing is a
//! `SCAN` of every server, one after the other, and a `SCAN` cursor is worthless
//! on any other server: what ties a listing to its servers are the `run_id`s of
//! their processes and, in a cluster, who holds which slots.

use std::{collections::VecDeque, fmt, str::FromStr, sync::Arc};

use bytes::Bytes;
use fred::prelude::Value;
use futures::{Stream, future::try_join_all, stream};

use super::{
    NotDone, ServerInfo,
    attempt::{Attempts, Command, Traffic},
    connection::Connections,
    fault::Fault,
    link::Lane,
    primaries::{Primaries, Shard},
    script::{self, ScriptReply},
    topology::{Node, Place, Share, Topology},
    write::{Bounded, read_read_reply},
};
use crate::{
    domain::{document::Document, group::GroupKey},
    store::{
        Backend, Deadline, KeyPage, Problem, StoreError,
        caller::Caller,
        documents::{DocumentBatch, StoredDocument},
        page_token::PageToken,
    },
    telemetry::{self, RedisCommand},
};

/// The keys of the service in Redis. Cheap to clone.
#[derive(Clone)]
pub struct KeySpace {
    connections: Connections,
    /// Whose connections listings take.
    lane: Lane,
    /// What every key of ours begins with.
    key_prefix: String,
    /// A scan reports larger values instead of reading them.
    max_document_bytes: usize,
}

/// The servers that a listing goes through.
struct Servers {
    nodes: Vec<Node>,
    /// Another one when any of them is another process, or when a cluster shares
    /// its slots in another way.
    identity: String,
    /// Whether a slot is on its way from one to another, and its keys with it.
    is_moving: bool,
}

/// Where a listing goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Position {
    /// The place of the server among [`Servers::nodes`].
    server: usize,
    cursor: u64,
}

/// What one `SCAN` found.
struct ScanPage {
    /// Where to go on; None at the end.
    next: Option<Position>,
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
    /// For whom it reads, whoever asks for the next batch.
    caller: Caller,
    servers: Servers,
    /// Where to go on; None at the end.
    position: Option<Position>,
    /// Keys that were found and not read yet, with the size of their values.
    found: VecDeque<(GroupKey, usize)>,
    problems: Vec<Problem>,
}

// === impl KeySpace ===

impl KeySpace {
    /// Times that a cluster is looked at until it is known as it is.
    const LOOKS: usize = 3;
    /// Keys that one `SCAN` looks at.
    const SCAN_COUNT: usize = 1_000;
    /// `SCAN`s that one page makes at most; among foreign keys it may be empty.
    const SCANS_PER_PAGE: usize = 100;
    /// Bytes of keys that one page holds, about.
    const PAGE_BYTES: usize = 1 << 20;
    /// A key takes this much at most, for the bound above.
    const MAX_KEY_BYTES: usize = 4_096;
    /// Bytes of documents that are read at once, unless one alone has more.
    pub const BATCH_BYTES: usize = 1 << 20;

    pub fn new(connections: Connections, key_prefix: &str, max_document_bytes: usize) -> Self {
        Self {
            connections,
            lane: Lane::Bulk,
            key_prefix: key_prefix.to_owned(),
            max_document_bytes,
        }
    }

    /// The same keys by other connections.
    pub fn by(&self, lane: Lane) -> Self {
        Self {
            lane,
            ..self.clone()
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
        let servers = self.servers(deadline).await?;
        let mut position = match token {
            Some(token) => {
                token.check_server(Backend::Redis, &servers.identity)?;
                Some(token.cursor.parse()?)
            }
            None => Some(Position::START),
        };

        let mut page = KeyPage::default();
        let mut room = Self::PAGE_BYTES;
        for _ in 0..Self::SCANS_PER_PAGE {
            let Some(from) = position.take() else { break };
            let count = (room / Self::MAX_KEY_BYTES).clamp(10, Self::SCAN_COUNT);
            let scanned = self.scan(prefix, &servers, from, count, deadline).await?;
            for key in scanned.keys {
                if let Ok(key) = group_key(&key) {
                    room = room.saturating_sub(key.as_str().len());
                    page.keys.push(key);
                }
            }
            position = scanned.next;
            if page.keys.len() >= page_size || room < 10 * Self::MAX_KEY_BYTES {
                break;
            }
        }
        self.check_identity(&servers, deadline).await?;
        page.next = position.map(|position| {
            PageToken {
                backend: Backend::Redis,
                server: servers.identity,
                cursor: position.to_string(),
                prefix: prefix.to_owned(),
            }
            .encode()
        });
        Ok(page)
    }

    /// Number of group keys that begin with `prefix`.
    pub async fn count(&self, prefix: &str, deadline: Deadline) -> Result<u64, NotDone> {
        let mut count = 0;
        let servers = self.servers(deadline).await?;
        let mut position = Some(Position::START);
        while let Some(from) = position {
            let scanned = self
                .scan(prefix, &servers, from, Self::SCAN_COUNT, deadline)
                .await?;
            let keys = scanned.keys.iter().filter(|key| group_key(key).is_ok());
            count += keys.count() as u64;
            position = scanned.next;
        }
        self.check_identity(&servers, deadline).await?;
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
            servers: self.servers(deadline).await?,
            with_expiry,
            keys: self.clone(),
            prefix: prefix.to_owned(),
            deadline,
            caller: Caller::current(),
            position: Some(Position::START),
            found: VecDeque::new(),
            problems: Vec::new(),
        };
        Ok(stream::try_unfold(reading, |mut reading| async move {
            let caller = reading.caller;
            let batch = caller.makes(reading.next()).await?;
            Ok(batch.map(|batch| (batch, reading)))
        }))
    }

    /// One `SCAN`.
    async fn scan(
        &self,
        prefix: &str,
        servers: &Servers,
        from: Position,
        count: usize,
        deadline: Deadline,
    ) -> Result<ScanPage, NotDone> {
        let Some(node) = servers.nodes.get(from.server) else {
            return Err(StoreError::InvalidPageToken(Position::INVALID).into());
        };
        let pattern = format!("{}{}*", escape_glob(&self.key_prefix), escape_glob(prefix));
        let arguments = vec![
            from.cursor.to_string().into(),
            "MATCH".into(),
            pattern.into(),
            "COUNT".into(),
            count.to_string().into(),
            "TYPE".into(),
            "string".into(),
        ];
        let reply = self.ask(node, "SCAN", arguments, deadline).await?;
        let malformed = || NotDone::from(StoreError::Bug("SCAN: a reply of another form".into()));
        let Value::Array(parts) = reply else {
            return Err(malformed());
        };
        let [cursor, Value::Array(keys)] = &parts[..] else {
            return Err(malformed());
        };
        let cursor = cursor.as_string().and_then(|cursor| cursor.parse().ok());
        let key_prefix = self.key_prefix.as_bytes();
        Ok(ScanPage {
            next: from.next(cursor.ok_or_else(malformed)?, servers),
            keys: keys
                .iter()
                .filter_map(script::bytes)
                .filter(|key| key.starts_with(key_prefix))
                .map(|key| key.slice(key_prefix.len()..))
                .collect(),
        })
    }

    /// What the servers say of themselves.
    pub async fn primaries(&self, deadline: Deadline) -> Result<Primaries, NotDone> {
        let (topology, infos) = self.infos(deadline).await?;
        Ok(Primaries {
            topology,
            infos,
            key_prefix: self.key_prefix.clone(),
        })
    }

    /// Whether the servers hold just these keys, as far as is known.
    pub fn has_shards<'a>(&self, shards: impl Iterator<Item = &'a Shard>) -> bool {
        let topology = self.connections.topology();
        let nodes = topology.nodes();
        let now: Vec<_> = nodes
            .iter()
            .map(|node| Shard::of(&topology, node, &self.key_prefix))
            .collect();
        let known: Vec<_> = shards.collect();
        // With a hash tag in the key prefix only one of them holds groups.
        let with_groups = topology.endings(&self.redis_key(&GroupKey::probe("", "")));
        known.len() == with_groups.len() && known.into_iter().all(|shard| now.contains(shard))
    }

    /// The servers as they are now. Of a cluster each is asked for its own slots: what
    /// fred knows of them is renewed only when a call has met another server than it
    /// looked for.
    async fn servers(&self, deadline: Deadline) -> Result<Servers, NotDone> {
        for _ in 0..Self::LOOKS {
            let (topology, infos) = self.infos(deadline).await?;
            let nodes = topology.nodes();
            if nodes == [Node::Only] {
                return Ok(Servers {
                    nodes,
                    identity: ServerInfo::join(infos).run_id,
                    is_moving: false,
                });
            }
            let shares = nodes.iter().map(|node| self.share_of(node, deadline));
            let shares = try_join_all(shares).await?;
            let mut holders = nodes.iter().zip(&shares);
            let are_known = holders.all(|(node, share)| topology.slots_of(node) == share.slots);
            if are_known && infos.iter().all(|info| info.is_primary) {
                let run_ids: Vec<_> = infos.into_iter().map(|info| info.run_id).collect();
                return Ok(Servers {
                    identity: script::sha1_hex(format!("{nodes:?} {shares:?} {run_ids:?}")),
                    is_moving: shares.iter().any(|share| share.is_moving),
                    nodes,
                });
            }
            self.connections.look_at_cluster().await;
        }
        Err(StoreError::ListingRestarted.into())
    }

    /// The slots of a server of a cluster.
    async fn share_of(&self, node: &Node, deadline: Deadline) -> Result<Share, NotDone> {
        let nodes = self.ask(node, "CLUSTER", vec!["NODES".into()], deadline);
        let nodes = nodes.await?.into_string().unwrap_or_default();
        let malformed = || StoreError::Bug("CLUSTER NODES: a reply of another form".into());
        Ok(Share::parse(&nodes).ok_or_else(malformed)?)
    }

    /// An error unless a listing from beginning to end has gone through these servers.
    async fn check_identity(&self, servers: &Servers, deadline: Deadline) -> Result<(), NotDone> {
        let now = self.servers(deadline).await?;
        // A key that moves may be where the listing has been, and no more where it goes.
        if now.identity == servers.identity && !now.is_moving {
            Ok(())
        } else {
            Err(StoreError::ListingRestarted.into())
        }
    }

    /// What each server says of itself, in the order of [`Topology::nodes`].
    async fn infos(&self, deadline: Deadline) -> Result<(Arc<Topology>, Vec<ServerInfo>), NotDone> {
        let topology = self.connections.topology();
        let nodes = topology.nodes();
        if nodes.is_empty() {
            let why = self.connections.why_not();
            let error = StoreError::Unavailable(format!("Redis does not answer: {why}"));
            return Err(NotDone::unwell(error, why));
        }
        let asked = nodes.iter().map(async |node| {
            let info = self.ask(node, "INFO", Vec::new(), deadline).await?;
            let info = ServerInfo::parse(&info.into_string().unwrap_or_default());
            info.ok_or_else(|| NotDone::from(StoreError::Bug("INFO: no run_id".into())))
        });
        Ok((topology, try_join_all(asked).await?))
    }

    /// The reply of a server to a command without a key.
    async fn ask(
        &self,
        node: &Node,
        name: &'static str,
        arguments: Vec<Value>,
        deadline: Deadline,
    ) -> Result<Value, NotDone> {
        // Each step of a listing gets the time of one call.
        let traffic = Traffic::of(self.lane, 0);
        let mut attempts = Attempts::at_read(&self.connections, traffic, deadline);
        while let Some(attempt) = attempts.next().await {
            let _measured = telemetry::redis_attempt(match name {
                "SCAN" => RedisCommand::Scan,
                _ => RedisCommand::Other,
            });
            let command = Command::at(node, name, arguments.clone());
            match attempt.run(command).await {
                Ok(reply) => return Ok(reply),
                Err(fault) => attempts.failed(&attempt, fault.of_command(name))?,
            }
        }
        Err(attempts.used_up())
    }

    /// The replies to one command on each of some keys, in one pipeline, about so many
    /// bytes together; None where another type lives.
    async fn read(
        &self,
        keys: &[GroupKey],
        name: &'static str,
        command: impl Fn(&Place) -> Command,
        bytes: usize,
        deadline: Deadline,
    ) -> Result<Vec<Option<Value>>, NotDone> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        // Each step of a listing gets the time of one call.
        let traffic = Traffic::of(self.lane, bytes);
        let mut attempts = Attempts::at_read(&self.connections, traffic, deadline);
        while let Some(attempt) = attempts.next().await {
            let _measured = telemetry::redis_attempt(RedisCommand::Scan);
            let commands: Option<Vec<_>> = {
                let topology = attempt.link.topology();
                let places = keys.iter().map(|key| topology.place(self.redis_key(key)));
                places.map(|place| place.as_ref().map(&command)).collect()
            };
            let replies = match commands {
                Some(commands) => attempt.pipeline(commands).await,
                None => Err(Fault::NotRun(Topology::NO_SERVER.into())),
            };
            match replies.and_then(|replies| replies.into_iter().map(unless_foreign).collect()) {
                Ok(values) => return Ok(values),
                Err(Fault::Redirected) if attempt.redirected => {
                    // A key is on its way to another server, and so may be keys
                    // that were not seen.
                    return Err(StoreError::ListingRestarted.into());
                }
                Err(fault) => {
                    if fault == Fault::NoScript {
                        // What fails here fails again in the next attempt.
                        for node in attempt.link.topology().nodes() {
                            let _ = script::READ.load(&attempt, &node).await;
                        }
                    }
                    attempts.failed(&attempt, fault.of_command(name))?;
                }
            }
        }
        Err(attempts.used_up())
    }
}

// === impl Position ===

impl Position {
    const START: Self = Self {
        server: 0,
        cursor: 0,
    };
    const INVALID: &str = "this page token has no valid cursor";

    /// Where to go on when a `SCAN` from here has given `cursor`; None at the end.
    fn next(&self, cursor: u64, servers: &Servers) -> Option<Self> {
        let next = match cursor {
            0 => Self {
                server: self.server + 1,
                cursor: 0,
            },
            _ => Self {
                server: self.server,
                cursor,
            },
        };
        (next.server < servers.nodes.len()).then_some(next)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.server, self.cursor)
    }
}

impl FromStr for Position {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self, StoreError> {
        let position = text.split_once(':').and_then(|(server, cursor)| {
            Some(Self {
                server: server.parse().ok()?,
                cursor: cursor.parse().ok()?,
            })
        });
        position.ok_or(StoreError::InvalidPageToken(Self::INVALID))
    }
}

// === impl Reading ===

impl Reading {
    async fn next(&mut self) -> Result<Option<DocumentBatch>, NotDone> {
        if self.found.is_empty() {
            let Some(position) = self.position.take() else {
                return Ok(None);
            };
            self.find(position).await?;
        }
        let documents = self.read().await?;
        if self.position.is_none() && self.found.is_empty() {
            // After the last read and before it is handed out: what was read is
            // complete only if the same servers were read to the end.
            self.keys
                .check_identity(&self.servers, self.deadline)
                .await?;
        }
        Ok(Some(DocumentBatch {
            documents,
            problems: std::mem::take(&mut self.problems),
        }))
    }

    /// Looks for more keys.
    async fn find(&mut self, from: Position) -> Result<(), NotDone> {
        let count = KeySpace::SCAN_COUNT;
        let scanned = self
            .keys
            .scan(&self.prefix, &self.servers, from, count, self.deadline)
            .await?;
        self.position = scanned.next;
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
        let sizes = self
            .keys
            .read(&keys, "STRLEN", Command::str_len, 0, self.deadline)
            .await?;
        for (key, size) in keys.into_iter().zip(sizes) {
            match size.and_then(|size| size.as_usize()) {
                Some(bytes) if bytes > self.keys.max_document_bytes => self.too_large(&key, bytes),
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
        let bytes = KeySpace::BATCH_BYTES - room;
        let mut read = self.read_keys(keys, self.with_expiry, bytes).await?;
        // Without its expiry, an empty value looks like none.
        let is_empty = |found: &Option<StoredDocument>| {
            found
                .as_ref()
                .is_some_and(|found| found.document.json.is_empty())
        };
        if !self.with_expiry {
            let empty = read.extract_if(
                ..,
                |(_, value)| matches!(value, Some(Bounded::Whole(found)) if is_empty(found)),
            );
            let empty = empty.map(|(key, _)| key).collect();
            read.extend(self.read_keys(empty, true, 0).await?);
        }
        let mut documents = Vec::with_capacity(read.len());
        for (key, value) in read {
            match value {
                // None: deleted or expired since it was found.
                Some(Bounded::Whole(found)) => documents.extend(found),
                // It was smaller when it was found.
                Some(Bounded::Larger(bytes)) => self.too_large(&key, bytes),
                None => self.problem(&key, StoreError::ForeignType),
            }
        }
        Ok(documents)
    }

    /// Reads these keys; None where another type lives.
    async fn read_keys(
        &self,
        keys: Vec<GroupKey>,
        with_expiry: bool,
        bytes: usize,
    ) -> Result<Vec<(GroupKey, Option<Bounded<Option<StoredDocument>>>)>, NotDone> {
        let most = self.keys.max_document_bytes;
        let values = if with_expiry {
            let command = |place: &Place| script::READ.call(place, vec![most.to_string().into()]);
            self.keys
                .read(&keys, "EVALSHA", command, bytes, self.deadline)
                .await?
        } else {
            // One byte more shows that there are more.
            let command = |place: &Place| Command::get_up_to(place, most + 1);
            self.keys
                .read(&keys, "GETRANGE", command, bytes, self.deadline)
                .await?
        };
        let read = keys.into_iter().zip(values).map(|(key, value)| {
            let value = match value {
                Some(value) if with_expiry => Some(read_with_expiry(&key, value)?),
                Some(value) => Some(self.read_without_expiry(&key, &value)),
                None => None,
            };
            Ok((key, value))
        });
        read.collect()
    }

    fn read_without_expiry(
        &self,
        key: &GroupKey,
        value: &Value,
    ) -> Bounded<Option<StoredDocument>> {
        let json = script::bytes(value).unwrap_or_default();
        if json.len() > self.keys.max_document_bytes {
            return Bounded::Larger(json.len());
        }
        Bounded::Whole(Some(StoredDocument {
            document: Document {
                key: key.clone(),
                json,
            },
            expires: None,
        }))
    }

    fn too_large(&mut self, key: &GroupKey, bytes: usize) {
        let limit = self.keys.max_document_bytes;
        self.problem(key, StoreError::StoredValueTooLarge { bytes, limit });
    }

    fn problem(&mut self, key: &GroupKey, error: StoreError) {
        self.problems.push(Problem {
            key: key.to_string(),
            error,
        });
    }
}

fn read_with_expiry(
    key: &GroupKey,
    value: Value,
) -> Result<Bounded<Option<StoredDocument>>, NotDone> {
    let read = ScriptReply::parse(value).and_then(|reply| read_read_reply(key, &reply));
    // A reply that is no error and no document was not foreseen.
    read.map_err(|fault| StoreError::Bug(format!("READ: {fault:?}")).into())
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
    use crate::domain::group::GroupKeyError;

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
    fn a_listing_goes_through_the_servers_one_after_the_other() {
        let servers = Servers {
            nodes: vec![Node::Only, Node::Only],
            identity: String::new(),
            is_moving: false,
        };
        let at = |server, cursor| Position { server, cursor };
        assert_eq!(Position::START.next(7, &servers), Some(at(0, 7)));
        assert_eq!(at(0, 7).next(0, &servers), Some(at(1, 0)));
        assert_eq!(at(1, 0).next(0, &servers), None);
        assert_eq!(at(1, u64::MAX).to_string().parse(), Ok(at(1, u64::MAX)));
        for bad in ["", "7", ":", "1:", "-1:0", "0:18446744073709551616"] {
            assert!(bad.parse::<Position>().is_err(), "{bad}");
        }
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
