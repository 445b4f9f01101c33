//! Groups over documents: everything that keeps JSON documents is a group
//! store. Groups are written as JSON, limited and read here, and nowhere else.

use async_trait::async_trait;
use futures::{
    StreamExt, future,
    stream::{self, BoxStream},
};

use super::{
    Answer, Backend, Deadline, Deletion, Expires, Expiry, Failure, GroupBatch, GroupStore, KeyPage,
    LoadAll, Problem, Reply, StoreError, Stored, Swap, Written,
};
use crate::domain::{
    document::{Document, DocumentHead},
    group::{AlertGroup, GroupKey},
    version::{InstanceId, Version},
};

/// Keeps documents by group key: the contract of [`GroupStore`], one level
/// lower.
#[async_trait]
pub trait DocumentStore: Send + Sync + 'static {
    /// Who would answer a call that came now.
    fn backend(&self) -> Backend;

    /// Writes a document if the condition holds.
    async fn write(&self, write: &Write, deadline: Deadline) -> Reply<WriteOutcome>;

    /// Reads a document.
    async fn read(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<StoredDocument>>;

    /// Removes a document: any version, or only `expected`.
    async fn remove(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion>;

    /// Makes many writes, each by itself. One result each, in order.
    async fn write_all(&self, writes: &[Write], deadline: Deadline) -> Vec<Reply<WriteOutcome>>;

    /// Some keys; see [`GroupStore::list_keys`].
    async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Reply<KeyPage>;

    /// Number of documents.
    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64>;

    /// All documents; see [`GroupStore::load_all`].
    async fn read_all(&self, prefix: &str, deadline: Deadline) -> Reply<ReadAll>;
}

/// One write call: what stays the same in all of its attempts, whoever makes
/// them.
#[derive(Clone, Debug)]
pub struct Write {
    pub head: DocumentHead,
    pub condition: Condition,
    pub expiry: Expiry,
    /// Stored in the document, so that a write whose answer was lost is
    /// recognised.
    pub write_id: String,
    /// The new version has to be greater than this as well as than the stored
    /// one: a group that comes from another store keeps its order.
    pub newer_than: Option<Version>,
}

/// What must be stored for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Anything or nothing.
    Any,
    /// Nothing.
    Absent,
    /// This version.
    Version(Version),
}

/// What a conditional write did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    Written(Written),
    /// The condition did not hold; here is what is stored.
    Conflict {
        current: Option<StoredDocument>,
    },
}

/// A stored document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDocument {
    pub document: Document,
    /// None: not asked for, or never.
    pub expires: Option<Expires>,
}

/// All documents, in batches.
pub struct ReadAll {
    /// False when this backend cannot know every group.
    pub complete: bool,
    pub batches: BoxStream<'static, Result<DocumentBatch, Failure>>,
}

/// Some documents of a [`ReadAll`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DocumentBatch {
    pub documents: Vec<StoredDocument>,
    pub problems: Vec<Problem>,
}

/// A document store as a group store.
#[derive(Debug)]
pub struct Documents<S> {
    store: S,
    max_document_bytes: usize,
    instance: InstanceId,
}

// === impl Documents ===

impl<S: DocumentStore> Documents<S> {
    /// Refuses to write documents of more than `max_document_bytes`.
    pub fn new(store: S, max_document_bytes: usize, instance: InstanceId) -> Self {
        Self {
            store,
            max_document_bytes,
            instance,
        }
    }

    /// The write of a group, if its document is not too large.
    fn write_of(
        &self,
        group: &AlertGroup,
        condition: Condition,
        expiry: Expiry,
    ) -> Result<Write, Failure> {
        let limit = self.max_document_bytes;
        let head = DocumentHead::within(limit, group).map_err(|bytes| {
            let backend = self.store.backend();
            backend.fails(StoreError::DocumentTooLarge { bytes, limit })
        })?;
        Ok(Write {
            head,
            condition,
            expiry,
            write_id: self.instance.next_write_id(),
            newer_than: None,
        })
    }
}

#[async_trait]
impl<S: DocumentStore> GroupStore for Documents<S> {
    fn backend(&self) -> Backend {
        self.store.backend()
    }

    async fn store(
        &self,
        group: &AlertGroup,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Written> {
        let write = self.write_of(group, Condition::Any, expiry)?;
        unconditional(self.store.write(&write, deadline).await)
    }

    async fn load(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<Stored>> {
        let answer = self.store.read(key, with_expiry, deadline).await?;
        let backend = answer.backend;
        let Some(stored) = answer.value else {
            return Ok(backend.answers(None));
        };
        Ok(backend.answers(Some(Stored {
            group: parse(backend, &stored.document)?,
            expires: stored.expires,
        })))
    }

    async fn delete(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion> {
        self.store.remove(key, expected, deadline).await
    }

    async fn compare_and_swap(
        &self,
        group: &AlertGroup,
        expected: Option<Version>,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<Swap> {
        let condition = expected.map_or(Condition::Absent, Condition::Version);
        let write = self.write_of(group, condition, expiry)?;
        let answer = self.store.write(&write, deadline).await?;
        let backend = answer.backend;
        let swap = match answer.value {
            WriteOutcome::Written(written) => Swap::Swapped(written),
            WriteOutcome::Conflict { current } => Swap::Lost {
                current: match current {
                    Some(stored) => Some(Box::new(parse(backend, &stored.document)?)),
                    None => None,
                },
            },
        };
        Ok(backend.answers(swap))
    }

    async fn store_all(
        &self,
        groups: &[AlertGroup],
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>> {
        let mut replies: Vec<Option<Reply<Written>>> = Vec::with_capacity(groups.len());
        let mut writes = Vec::with_capacity(groups.len());
        for group in groups {
            match self.write_of(group, Condition::Any, expiry) {
                Ok(write) => {
                    writes.push(write);
                    replies.push(None);
                }
                Err(failure) => replies.push(Some(Err(failure))),
            }
        }
        let written = self.store.write_all(&writes, deadline).await;
        let mut written = written.into_iter().map(unconditional);
        replies
            .into_iter()
            .map(|refused| {
                refused.or_else(|| written.next()).unwrap_or_else(|| {
                    Err(self.store.backend().fails(StoreError::Bug(
                        "a batch write gave fewer results than it was given documents".into(),
                    )))
                })
            })
            .collect()
    }

    async fn list_keys(
        &self,
        prefix: &str,
        page_size: usize,
        token: Option<&str>,
        deadline: Deadline,
    ) -> Reply<KeyPage> {
        self.store
            .list_keys(prefix, page_size, token, deadline)
            .await
    }

    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64> {
        self.store.size(prefix, deadline).await
    }

    async fn load_all(&self, prefix: &str, deadline: Deadline) -> Reply<LoadAll> {
        let answer: Answer<ReadAll> = self.store.read_all(prefix, deadline).await?;
        Ok(answer.map(|all| {
            let end = GroupBatch {
                complete: Some(all.complete),
                ..GroupBatch::default()
            };
            let end = stream::once(future::ready(Ok(end)));
            // A failure is the last that comes: no end after it.
            let whole = all.batches.map(|batch| batch.map(parse_batch)).chain(end);
            let failed = |failed: &mut bool, batch: Result<GroupBatch, Failure>| {
                let goes_on = !std::mem::replace(failed, batch.is_err());
                future::ready(goes_on.then_some(batch))
            };
            whole.scan(false, failed).boxed()
        }))
    }
}

/// The reply to a write without a condition.
fn unconditional(reply: Reply<WriteOutcome>) -> Reply<Written> {
    let answer = reply?;
    match answer.value {
        WriteOutcome::Written(written) => Ok(answer.backend.answers(written)),
        WriteOutcome::Conflict { .. } => Err(answer.backend.fails(StoreError::Bug(
            "an unconditional write met a conflict".into(),
        ))),
    }
}

fn parse(backend: Backend, document: &Document) -> Result<AlertGroup, Failure> {
    document
        .parse()
        .map_err(|unreadable| backend.fails(StoreError::Unreadable(unreadable)))
}

fn parse_batch(batch: DocumentBatch) -> GroupBatch {
    let mut parsed = GroupBatch {
        groups: Vec::with_capacity(batch.documents.len()),
        problems: batch.problems,
        complete: None,
    };
    for StoredDocument { document, .. } in batch.documents {
        match document.parse() {
            Ok(group) => parsed.groups.push(group),
            Err(unreadable) => parsed.problems.push(Problem {
                key: document.key.to_string(),
                error: StoreError::Unreadable(unreadable),
            }),
        }
    }
    parsed
}
