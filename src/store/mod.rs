//! The store contract: what every place that keeps groups promises.
//!
//! [`GroupStore`] is what the gRPC service and the replica side work with.
//! Stores that keep groups as JSON documents (Redis, memory) implement the
//! smaller [`documents::DocumentStore`] and become a `GroupStore` through
//! [`documents::Documents`].
//!
//! | module | what is in it |
//! |---|---|
//! | [`documents`] | groups over documents |
//! | [`failover`] | Redis with memory behind it, as one store |
//! | [`caller`] | for whom a call is made |
//! | [`redis`], [`memory`] | the two stores |
//! | [`page_token`] | where a listing goes on |

pub mod caller;
pub mod documents;
pub mod failover;
pub mod memory;
pub mod page_token;
pub mod redis;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::time::Instant;

use crate::domain::{
    document::Unreadable,
    group::{AlertGroup, GroupKey, Time},
    version::Version,
};

/// Keeps alert groups by key.
///
/// Linearizable per key among calls that the same backend answers. Every
/// answer and every failure says which backend it came from.
#[async_trait]
pub trait GroupStore: Send + Sync + 'static {
    /// Who would answer a call that came now.
    fn backend(&self) -> Backend;

    /// The store to which all calls of one change of a group should go. None:
    /// this one. A store in front of several others names the one that has the
    /// key now.
    fn pinned(&self, _key: &GroupKey) -> Option<Arc<dyn GroupStore>> {
        None
    }

    /// Creates or replaces a group, whatever is stored. `group`'s version is
    /// ignored.
    async fn store(&self, group: &AlertGroup, expiry: Expiry, deadline: Deadline)
    -> Reply<Written>;

    /// Reads a group; None when it is absent or expired. The expiry is looked
    /// up only `with_expiry`, since it may cost more.
    async fn load(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<Stored>>;

    /// Removes a group: any version, or only `expected`.
    async fn delete(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion>;

    /// Replaces a group only if its stored version is `expected`; with None,
    /// creates it only if it is absent. `group`'s version is ignored.
    async fn compare_and_swap(
        &self,
        group: &AlertGroup,
        expected: Option<Version>,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Swap>;

    /// Stores each group as `store` does. One result a group, in order. Keys
    /// are expected to differ.
    async fn store_all(
        &self,
        groups: &[AlertGroup],
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>>;

    /// Some keys that begin with `prefix`, about `page_size` of them. `token`
    /// is `next` of the page before.
    async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Reply<KeyPage>;

    /// Number of groups whose key begins with `prefix`.
    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64>;

    /// Reads all groups whose key begins with `prefix`. The stream reads ahead
    /// no more than one batch; it ends after its first failure.
    async fn load_all(&self, prefix: &str, deadline: Deadline) -> Reply<LoadAll>;
}

/// What a store says: a value or a failure, and who said it.
pub type Reply<T> = Result<Answer<T>, Failure>;

/// Where groups are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Shared by all instances.
    Redis,
    /// The memory of this instance.
    Memory,
}

/// A value and the backend that answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer<T> {
    pub backend: Backend,
    pub value: T,
}

/// An error and the backend that it came from.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{error}")]
pub struct Failure {
    pub backend: Backend,
    pub error: StoreError,
}

/// Why a store did not do what it was asked. The text is for the caller.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The stored document cannot be read. It is left as it is.
    #[error("{0}; Store replaces it, Delete without expected_version removes it")]
    Unreadable(Unreadable),
    /// A value of another Redis type lives at the key.
    #[error("a value of another Redis type lives at this key; it is left as it is")]
    ForeignType,
    /// The stored version cannot be raised exactly.
    #[error(
        "the stored version {0} is beyond 2^53 and cannot be raised; Delete the group and store it anew"
    )]
    VersionOutOfRange(String),
    /// The answer to a write was lost, and whether it happened cannot be told.
    #[error(
        "the answer of Redis was lost and it cannot be told whether this write happened; Load the group and decide again"
    )]
    OutcomeUnknown,
    /// The server behind a listing is another one now.
    #[error("the server behind this listing has changed; begin again without a page token")]
    ListingRestarted,
    /// The page token was not made here, or for another listing.
    #[error("{0}; begin again without a page token")]
    InvalidPageToken(&'static str),
    /// The group's document is larger than the limit.
    #[error(
        "the group takes {bytes} bytes as a document, over --max-document-bytes {limit}; split the group or raise the limit"
    )]
    DocumentTooLarge { bytes: usize, limit: usize },
    /// The stored value is larger than the limit and was not read.
    #[error(
        "the stored value takes {bytes} bytes, over --max-document-bytes {limit}; raise the limit, or replace it with Store or remove it with Delete without expected_version"
    )]
    StoredValueTooLarge { bytes: usize, limit: usize },
    /// A stored key that is not a group key: the reason why.
    #[error("a value is stored under a key that is not a group key: it {0}")]
    NotAGroupKey(String),
    /// The deadline passed.
    #[error("the deadline of the call has passed")]
    DeadlineExceeded,
    /// The memory store is full.
    #[error(
        "the memory store holds --mirror-max-bytes {limit}; delete groups, wait until some expire, or raise the limit"
    )]
    MemoryFull { limit: usize },
    /// Large documents wait for their turn.
    #[error(
        "documents of more than 16 KiB have to wait for others: --redis-max-bulk-bytes {limit} are on their way to or from Redis; try again later or raise the limit"
    )]
    TooMuchAtOnce { limit: usize },
    /// Redis has refused a command that not every call needs.
    #[error("Redis refuses {command}: {reply}; see the rights that the README lists")]
    CommandRefused { command: String, reply: String },
    /// The store cannot answer now.
    #[error("{0}")]
    Unavailable(String),
    /// A bug: what was found, for the log only.
    #[error("internal error")]
    Bug(String),
    /// What another server said, in its words.
    #[error("{message}")]
    Told { kind: ErrorKind, message: String },
}

/// What a caller can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Ask for something else.
    Invalid,
    /// Ask for less at once.
    TooLarge,
    /// Look at what is stored: it is no group's document.
    Unreadable,
    /// Look at what is stored: it is another Redis type.
    ForeignType,
    /// Delete the group and store it anew.
    VersionOutOfRange,
    /// Load, and decide again: the write may have happened.
    OutcomeUnknown,
    /// Begin the listing again.
    ListingRestarted,
    /// Give it more time, or try again; a write may have happened.
    DeadlineExceeded,
    /// Try again later.
    Overloaded,
    /// Delete groups or wait until some expire.
    MemoryFull,
    /// Present credentials.
    Unauthenticated,
    /// Let the user of the service have the right that is missing in Redis.
    CommandRefused,
    /// Try again later.
    Unavailable,
    /// Tell whoever maintains groupstate.
    Bug,
}

/// When a written group expires. Callers have checked the bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// After this time.
    After(Duration),
    /// When the stored group would have; `otherwise` after this time, if there
    /// is none or it never expires.
    Keep { otherwise: Duration },
}

/// The moment by which a call wants its answer, if it has one.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Option<Instant>);

/// When something that is stored expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expires {
    /// By the backend's clock.
    pub at: Time,
    /// The time that was left when the backend answered.
    pub left: Duration,
}

/// What a write did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub version: Version,
    /// The version that it replaced. None: nothing, or one that is not known.
    pub replaced: Option<Version>,
    /// None: never.
    pub expires: Option<Expires>,
}

/// A stored group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub group: AlertGroup,
    /// None: not asked for, or never.
    pub expires: Option<Expires>,
}

/// What a delete did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deletion {
    pub deleted: bool,
    /// The version that was found; None when the group was absent, or
    /// unreadable and removed.
    pub version: Option<Version>,
}

/// What a compare-and-swap did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swap {
    Swapped(Written),
    /// The race was lost; here is what is stored now.
    Lost {
        current: Option<Box<AlertGroup>>,
    },
}

/// Some keys of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyPage {
    pub keys: Vec<GroupKey>,
    /// Where to go on; None at the end.
    pub next: Option<String>,
}

/// All groups, in batches. One that ends without a batch that says whether it
/// is complete was cut off.
pub type LoadAll = BoxStream<'static, Result<GroupBatch, Failure>>;

/// Some groups of a [`LoadAll`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupBatch {
    pub groups: Vec<AlertGroup>,
    pub problems: Vec<Problem>,
    /// In the last batch only: false when the backend that answered cannot know
    /// every group.
    pub complete: Option<bool>,
}

/// Something that is stored and cannot be read as a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The group key; bytes that are not UTF-8 are replaced.
    pub key: String,
    pub error: StoreError,
}

// === impl Backend ===

impl Backend {
    /// The name in metadata, metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Memory => "memory",
        }
    }

    pub fn answers<T>(self, value: T) -> Answer<T> {
        Answer {
            backend: self,
            value,
        }
    }

    pub fn fails(self, error: StoreError) -> Failure {
        Failure {
            backend: self,
            error,
        }
    }
}

// === impl StoreError ===

impl StoreError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unreadable(_) | Self::NotAGroupKey(_) => ErrorKind::Unreadable,
            Self::ForeignType => ErrorKind::ForeignType,
            Self::VersionOutOfRange(_) => ErrorKind::VersionOutOfRange,
            Self::OutcomeUnknown => ErrorKind::OutcomeUnknown,
            Self::ListingRestarted => ErrorKind::ListingRestarted,
            Self::InvalidPageToken(_) | Self::DocumentTooLarge { .. } => ErrorKind::Invalid,
            Self::StoredValueTooLarge { .. } => ErrorKind::TooLarge,
            Self::DeadlineExceeded => ErrorKind::DeadlineExceeded,
            Self::MemoryFull { .. } => ErrorKind::MemoryFull,
            Self::TooMuchAtOnce { .. } => ErrorKind::Overloaded,
            Self::CommandRefused { .. } => ErrorKind::CommandRefused,
            Self::Unavailable(_) => ErrorKind::Unavailable,
            Self::Bug(_) => ErrorKind::Bug,
            Self::Told { kind, .. } => *kind,
        }
    }
}

// === impl Answer ===

impl<T> Answer<T> {
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Answer<U> {
        Answer {
            backend: self.backend,
            value: change(self.value),
        }
    }
}

// === impl Deadline ===

impl Deadline {
    /// No deadline of the caller's: the store's own bounds hold.
    pub const NONE: Self = Self(None);

    pub fn at(moment: Instant) -> Self {
        Self(Some(moment))
    }

    /// None when the caller has set no deadline.
    pub fn instant(self) -> Option<Instant> {
        self.0
    }

    /// The deadline; for a call without one, `bound` from now.
    pub fn or_within(self, bound: Duration) -> Instant {
        self.0.unwrap_or_else(|| Instant::now() + bound)
    }
}
