//! One entry of the memory store, and what it knows of Redis.

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use crate::domain::{document::Document, group::GroupKey, version::Version};

/// One group, or the trace of one.
#[derive(Clone, Debug)]
pub struct Entry {
    pub content: Content,
    /// The version of the content, or the last one before it was deleted.
    pub version: Version,
    /// On the monotonic clock, so that a wall clock that is set does not
    /// expire groups.
    pub expires: Instant,
    pub standing: Standing,
}

/// What is known of the group.
#[derive(Clone, Debug)]
pub enum Content {
    Document(Bytes),
    /// There is no group any more.
    Deleted,
    /// Redis holds a group that is not known here: a change of it was dropped.
    Unknown,
}

/// What Redis knows of it.
#[derive(Clone, Debug)]
pub enum Standing {
    Clean {
        epoch: u64,
        /// When it was learned.
        seen: Instant,
        /// Set where this instance has written or deleted it.
        ours: Option<Ours>,
    },
    Dirty {
        changed: Box<Changed>,
        /// Dropped when a later generation of changes has begun.
        generation: u64,
    },
}

/// What this instance has itself done to a group in Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ours {
    /// The version that its write replaced. None: nothing, or one that is not known.
    pub replaced: Option<Version>,
    /// Whether Redis has shown again what was deleted, so that it has to be deleted again.
    pub is_back: bool,
    /// Whether nobody deleted it: what was written has expired.
    pub has_expired: bool,
}

impl Ours {
    pub fn new(replaced: Option<Version>) -> Self {
        Self {
            replaced,
            is_back: false,
            has_expired: false,
        }
    }
}

/// What is known of a group in Redis that was changed here.
#[derive(Clone, Debug, Default)]
pub struct Changed {
    /// The version in Redis that was changed, and when Redis lets it expire.
    pub base: Option<(Version, Instant)>,
    /// What this instance itself had deleted in Redis before, and where changes are
    /// dropped also what it had written: Redis may lose that.
    pub before: Option<Box<Entry>>,
    /// Write ids of writes that may have been executed by Redis although they
    /// were answered here.
    pub maybe_in_redis: Vec<String>,
    /// Tells two changes of an entry apart.
    pub change: u64,
}

// === impl Changed ===

impl Changed {
    /// Write ids that are remembered. One that is forgotten is taken for another
    /// writer's, and merged with: the safe side.
    const MOST_REMEMBERED: usize = 32;

    pub fn remember(&mut self, write_id: &str) {
        if self.maybe_in_redis.len() == Self::MOST_REMEMBERED {
            self.maybe_in_redis.remove(0);
        }
        self.maybe_in_redis.push(write_id.to_owned());
    }

    /// Size of the document that was there before.
    pub fn before_bytes(&self) -> usize {
        self.before
            .as_ref()
            .map_or(0, |entry| entry.document_bytes())
    }

    /// Until when Redis may hold the group, which is deleted here or has expired
    /// here at `expired`. None: it does not.
    pub fn tombstone_expires(&self, expired: Instant, now: Instant) -> Option<Instant> {
        let base_expires = self.base.map(|(_, expires)| expires);
        let expires = if self.maybe_in_redis.is_empty() {
            base_expires
        } else {
            // What may be in Redis got the time to live that it had here.
            base_expires.max(Some(expired))
        };
        expires.filter(|expires| *expires > now)
    }
}

// === impl Standing ===

impl Standing {
    /// Whether it is of a change that was made before this generation.
    pub fn is_before(&self, current: u64) -> bool {
        matches!(self, Self::Dirty { generation, .. } if *generation < current)
    }
}

// === impl Entry ===

impl Entry {
    /// What an entry takes besides its key and its document: nodes of the two
    /// trees, reference counts, allocator headers.
    pub const OVERHEAD_BYTES: usize = 300;
    /// How long a delete that Redis has executed is remembered, at most: a Redis
    /// that goes back further than this may bring the group back.
    pub const TOMBSTONE: Duration = Duration::from_secs(3_600);
    /// The same of one that found nothing: another instance may be about to put back what
    /// Redis has just lost.
    pub const TOMBSTONE_OF_NOTHING: Duration = Duration::from_secs(60);

    pub fn cost(&self, key: &GroupKey) -> usize {
        let before = match &self.standing {
            Standing::Clean { .. } => 0,
            Standing::Dirty { changed, .. } => changed.before_bytes(),
        };
        Self::cost_of(key, self.document_bytes() + before)
    }

    /// What an entry with a document of this size takes.
    pub fn cost_of(key: &GroupKey, document_bytes: usize) -> usize {
        key.as_str().len() + document_bytes + Self::OVERHEAD_BYTES
    }

    pub fn is_group(&self, now: Instant) -> bool {
        matches!(self.content, Content::Document(_)) && self.expires > now
    }

    /// When the tombstone expires that a changed group leaves which has expired
    /// and was not yet swept. None: it leaves none.
    pub fn leaves_tombstone(&self, now: Instant) -> Option<Instant> {
        match (&self.standing, &self.content) {
            (Standing::Dirty { changed, .. }, Content::Document(_)) if self.expires <= now => {
                changed.tombstone_expires(self.expires, now)
            }
            _ => None,
        }
    }

    /// What is left of a clean group once it has expired: this instance has written it,
    /// maybe in place of what others know, and has to say so should they put that back.
    pub fn trace_of_expired(&self) -> Option<Self> {
        match (&self.content, &self.standing) {
            (
                Content::Document(_),
                Standing::Clean {
                    epoch,
                    seen,
                    ours: Some(ours),
                },
            ) => Some(Self {
                content: Content::Deleted,
                version: self.version,
                expires: self.expires + Self::TOMBSTONE,
                standing: Standing::Clean {
                    epoch: *epoch,
                    seen: *seen,
                    ours: Some(Ours {
                        has_expired: true,
                        ..*ours
                    }),
                },
            }),
            _ => None,
        }
    }

    /// What is left of an entry by now, be it swept or not: of a change that has expired
    /// and leaves no tombstone what was there before it.
    pub fn as_of(&self, now: Instant) -> Cow<'_, Self> {
        match &self.standing {
            _ if self.expires > now => Cow::Borrowed(self),
            Standing::Clean { .. } => self
                .trace_of_expired()
                .map_or(Cow::Borrowed(self), Cow::Owned),
            Standing::Dirty { changed, .. } => match &changed.before {
                Some(before) if self.leaves_tombstone(now).is_none() => before.as_of(now),
                _ => Cow::Borrowed(self),
            },
        }
    }

    /// Whether Redis, by what it has shown of a clean entry, holds a group.
    pub fn is_in_redis(&self, now: Instant) -> bool {
        !matches!(self.content, Content::Deleted) && self.expires > now
    }

    /// The document of a group.
    pub fn document(&self, key: &GroupKey) -> Document {
        Document {
            key: key.clone(),
            json: match &self.content {
                Content::Document(json) => json.clone(),
                Content::Deleted | Content::Unknown => Bytes::new(),
            },
        }
    }

    /// Size of the document.
    pub fn document_bytes(&self) -> usize {
        match &self.content {
            Content::Document(json) => json.len(),
            Content::Deleted | Content::Unknown => 0,
        }
    }
}
