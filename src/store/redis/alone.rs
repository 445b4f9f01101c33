//! Redis as a store by itself: what it does not do is an error.

use async_trait::async_trait;
use futures::StreamExt;

use super::{NotDone, RedisStore, Trail, pipelines};
use crate::{
    domain::{group::GroupKey, version::Version},
    store::{
        Backend, Deadline, Deletion, KeyPage, Reply,
        documents::{DocumentStore, ReadAll, StoredDocument, Write, WriteOutcome},
    },
};

#[async_trait]
impl DocumentStore for RedisStore {
    fn backend(&self) -> Backend {
        Backend::Redis
    }

    async fn write(&self, write: &Write, deadline: Deadline) -> Reply<WriteOutcome> {
        let trail = Trail::default();
        reply(self.write_document(write, deadline, &trail).await)
    }

    async fn read(
        &self,
        key: &GroupKey,
        with_expiry: bool,
        deadline: Deadline,
    ) -> Reply<Option<StoredDocument>> {
        reply(self.read_document(key, with_expiry, 0, deadline).await)
    }

    async fn remove(
        &self,
        key: &GroupKey,
        expected: Option<Version>,
        deadline: Deadline,
    ) -> Reply<Deletion> {
        let trail = Trail::default();
        reply(self.remove_document(key, expected, deadline, &trail).await)
    }

    async fn write_all(&self, writes: &[Write], deadline: Deadline) -> Vec<Reply<WriteOutcome>> {
        let deadline = Deadline::at(deadline.or_within(Self::BATCH_BOUND));
        let mut replies = Vec::with_capacity(writes.len());
        for chunk in pipelines(writes) {
            let trails: Vec<_> = chunk.iter().map(|_| Trail::default()).collect();
            let results = self.write_pipeline(chunk, deadline, &trails).await;
            replies.extend(results.into_iter().map(reply));
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
        reply(RedisStore::list_keys(self, prefix, page_size, token, deadline).await)
    }

    async fn size(&self, prefix: &str, deadline: Deadline) -> Reply<u64> {
        reply(self.count(prefix, deadline).await)
    }

    async fn read_all(&self, prefix: &str, deadline: Deadline) -> Reply<ReadAll> {
        let batches = reply(self.read_documents(prefix, false, deadline).await)?;
        Ok(batches.map(|batches| ReadAll {
            complete: true,
            batches: batches
                .map(|batch| batch.map_err(|failed| Backend::Redis.fails(failed.error)))
                .boxed(),
        }))
    }
}

fn reply<T>(result: Result<T, NotDone>) -> Reply<T> {
    match result {
        Ok(value) => Ok(Backend::Redis.answers(value)),
        Err(failed) => Err(Backend::Redis.fails(failed.error)),
    }
}
