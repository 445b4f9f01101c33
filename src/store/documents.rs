//! Groups over documents: everything that keeps JSON documents is a group
//! store. Groups are written as JSON, limited and read here, and nowhere else.

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};

use super::{
    Answer, Backend, Deadline, Deletion, Expiry, Failure, GroupBatch, GroupStore, KeyPage, LoadAll,
    Problem, Reply, StoreError, Stored, Swap, Written,
};
use crate::{
    document::{Document, DocumentHead},
    group::{AlertGroup, GroupKey},
    version::Version,
};

/// Keeps documents by group key: the contract of [`GroupStore`], one level
/// lower.
#[async_trait]
pub trait DocumentStore: Send + Sync + 'static {
    /// Who would answer a call that came now.
    fn backend(&self) -> Backend;

    /// Writes a document if `condition` holds.
    async fn write(
        &self,
        head: &DocumentHead,
        condition: Condition,
        expiry: Expiry,
        deadline: Deadline,
    ) -> Reply<WriteOutcome>;

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

    /// Writes many documents without condition. One result each, in order.
    async fn write_all(
        &self,
        heads: &[DocumentHead],
        expiry: Expiry,
        deadline: Deadline,
    ) -> Vec<Reply<Written>>;

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
        current: Option<Document>,
    },
}

/// A stored document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDocument {
    pub document: Document,
    /// By the backend's clock. None: not asked for, or never expires.
    pub expires_at: Option<crate::group::Time>,
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
    pub documents: Vec<Document>,
    pub problems: Vec<Problem>,
}

/// A document store as a group store.
#[derive(Debug)]
pub struct Documents<S> {
    store: S,
    max_document_bytes: usize,
}

// === impl Documents ===

impl<S: DocumentStore> Documents<S> {
    /// Refuses to write documents of more than `max_document_bytes`.
    pub fn new(store: S, max_document_bytes: usize) -> Self {
        Self {
            store,
            max_document_bytes,
        }
    }

    /// The group as a document, if it is not too large.
    fn head(&self, group: &AlertGroup) -> Result<DocumentHead, Failure> {
        let head = DocumentHead::new(group);
        let bytes = head.stored_bytes();
        if bytes > self.max_document_bytes {
            return Err(self.store.backend().fails(StoreError::DocumentTooLarge {
                bytes,
                limit: self.max_document_bytes,
            }));
        }
        Ok(head)
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
        let head = self.head(group)?;
        let answer = self
            .store
            .write(&head, Condition::Any, expiry, deadline)
            .await?;
        match answer.value {
            WriteOutcome::Written(written) => Ok(answer.backend.answers(written)),
            WriteOutcome::Conflict { .. } => Err(answer.backend.fails(StoreError::Bug(
                "an unconditional write met a conflict".into(),
            ))),
        }
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
            expires_at: stored.expires_at,
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
        let head = self.head(group)?;
        let condition = expected.map_or(Condition::Absent, Condition::Version);
        let answer = self.store.write(&head, condition, expiry, deadline).await?;
        let backend = answer.backend;
        let swap = match answer.value {
            WriteOutcome::Written(written) => Swap::Swapped(written),
            WriteOutcome::Conflict { current } => Swap::Lost {
                current: match current {
                    Some(document) => Some(Box::new(parse(backend, &document)?)),
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
        let mut heads = Vec::with_capacity(groups.len());
        for group in groups {
            match self.head(group) {
                Ok(head) => {
                    heads.push(head);
                    replies.push(None);
                }
                Err(failure) => replies.push(Some(Err(failure))),
            }
        }
        let mut written = self
            .store
            .write_all(&heads, expiry, deadline)
            .await
            .into_iter();
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
        Ok(answer.map(|all| LoadAll {
            complete: all.complete,
            batches: all.batches.map(|batch| batch.map(parse_batch)).boxed(),
        }))
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
    };
    for document in batch.documents {
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
