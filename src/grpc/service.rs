//! The eight calls: validate, ask the store, reply.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status};

use super::{
    convert,
    envelope::CallContext,
    load_all,
    proto::{self as pb, group_state_service_server::GroupStateService},
    status::CallError,
    validation::{Limits, Violations, expected_version, version_to_delete},
};
use crate::store::{Backend, Deadline, GroupStore, StoreError, Stored, Swap, Written};

/// The service over any store.
#[derive(Clone)]
pub struct Service {
    store: Arc<dyn GroupStore>,
    limits: Limits,
    scans: Arc<Semaphore>,
    max_scans: usize,
}

/// One call, for its log event and its status.
struct Call {
    operation: &'static str,
    context: CallContext,
    /// The group key, for the log; only taken where it is written.
    key: Option<String>,
    /// What an OK reply means for the log: "success", or "conflict".
    success: &'static str,
}

// === impl Service ===

impl Service {
    /// At most `max_scans` listings and LoadAlls run at once; more are refused.
    pub fn new(store: Arc<dyn GroupStore>, limits: Limits, max_scans: usize) -> Self {
        Self {
            store,
            limits,
            scans: Arc::new(Semaphore::new(max_scans)),
            max_scans,
        }
    }

    fn scan_permit(&self) -> Result<OwnedSemaphorePermit, CallError> {
        self.scans
            .clone()
            .try_acquire_owned()
            .map_err(|_| CallError::overloaded("max-scans", self.max_scans))
    }

    /// Writes the log event of a call and makes its reply.
    fn finish<T>(&self, call: &Call, result: Result<T, CallError>) -> Result<Response<T>, Status> {
        let request_id = call.context.request_id.as_str();
        tracing::debug!(
            request_id,
            operation = call.operation,
            key = call.key,
            result = result
                .as_ref()
                .map_or_else(CallError::result, |_| call.success),
            latency_us = call.context.received.elapsed().as_micros() as u64,
            "call"
        );
        result
            .map(Response::new)
            .map_err(|error| error.into_status(request_id, self.store.backend()))
    }

    async fn do_store(
        &self,
        request: pb::StoreRequest,
        deadline: Deadline,
    ) -> Result<pb::StoreResponse, CallError> {
        let mut violations = Violations::default();
        let group = self
            .limits
            .group(format_args!("group"), request.group, &mut violations);
        let expiry = self
            .limits
            .expiry(request.expiry.map(Into::into), &mut violations);
        let (group, expiry) = violations.check(group.zip(expiry))?;
        let answer = self.store.store(&group, expiry, deadline).await?;
        Ok(pb::StoreResponse {
            version: answer.value.version.get(),
            expire_time: convert::expire_time(answer.value.expires),
            backend: convert::backend(answer.backend),
        })
    }

    async fn do_load(
        &self,
        request: pb::LoadRequest,
        deadline: Deadline,
    ) -> Result<pb::LoadResponse, CallError> {
        let mut violations = Violations::default();
        let key = self
            .limits
            .key(format_args!("key"), request.key, &mut violations);
        let key = violations.check(key)?;
        let answer = self
            .store
            .load(&key, request.include_expire_time, deadline)
            .await?;
        let Some(Stored { group, expires }) = answer.value else {
            return Err(CallError::not_found(answer.backend));
        };
        Ok(pb::LoadResponse {
            group: Some(convert::group(group)),
            expire_time: convert::expire_time(expires),
            backend: convert::backend(answer.backend),
        })
    }

    async fn do_delete(
        &self,
        request: pb::DeleteRequest,
        deadline: Deadline,
    ) -> Result<pb::DeleteResponse, CallError> {
        let mut violations = Violations::default();
        let key = self
            .limits
            .key(format_args!("key"), request.key, &mut violations);
        let expected = version_to_delete(request.expected_version, &mut violations);
        let (key, expected) = violations.check(key.zip(expected))?;
        let answer = self.store.delete(&key, expected, deadline).await?;
        Ok(pb::DeleteResponse {
            deleted: answer.value.deleted,
            version: convert::version(answer.value.version),
            backend: convert::backend(answer.backend),
        })
    }

    async fn do_compare_and_swap(
        &self,
        request: pb::CompareAndSwapRequest,
        deadline: Deadline,
    ) -> Result<pb::CompareAndSwapResponse, CallError> {
        let mut violations = Violations::default();
        let group = self
            .limits
            .group(format_args!("group"), request.group, &mut violations);
        let expected = expected_version(request.expected_version, &mut violations);
        let expiry = self
            .limits
            .expiry(request.expiry.map(Into::into), &mut violations);
        let ((group, expected), expiry) = violations.check(group.zip(expected).zip(expiry))?;
        let answer = self
            .store
            .compare_and_swap(&group, expected, expiry, deadline)
            .await?;
        let backend = convert::backend(answer.backend);
        Ok(match answer.value {
            Swap::Swapped(Written { version, expires }) => pb::CompareAndSwapResponse {
                swapped: true,
                version: version.get(),
                current: None,
                expire_time: convert::expire_time(expires),
                backend,
            },
            Swap::Lost { current } => pb::CompareAndSwapResponse {
                swapped: false,
                version: convert::version(
                    current.as_ref().and_then(|group| group.metadata.version),
                ),
                current: current.map(|group| convert::group(*group)),
                expire_time: None,
                backend,
            },
        })
    }

    async fn do_store_all(
        &self,
        request: pb::StoreAllRequest,
        deadline: Deadline,
    ) -> Result<pb::StoreAllResponse, CallError> {
        let mut violations = Violations::default();
        let expiry = self
            .limits
            .expiry(request.expiry.map(Into::into), &mut violations);
        let expiry = violations.check(expiry)?;
        let batch = self.limits.batch(request.groups)?;

        let mut groups = Vec::with_capacity(batch.len());
        let mut checked = Vec::with_capacity(batch.len());
        for (key, group) in batch {
            checked.push((key, group.map(|group| groups.push(group))));
        }
        let replies = self.store.store_all(&groups, expiry, deadline).await;

        let mut replies = replies.into_iter();
        let now = self.store.backend();
        let mut results = Vec::with_capacity(checked.len());
        let mut batch_backend = now;
        for (key, valid) in checked {
            let reply = match valid {
                Ok(()) => replies.next().unwrap_or_else(|| {
                    Err(now.fails(StoreError::Bug("a result is missing".into())))
                }),
                Err(error) => {
                    results.push(store_result(key, now, Err(error)));
                    continue;
                }
            };
            let backend = match &reply {
                Ok(answer) => answer.backend,
                Err(failure) => failure.backend,
            };
            if backend == Backend::Memory {
                batch_backend = backend;
            }
            let reply = reply.map(|answer| answer.value).map_err(CallError::from);
            results.push(store_result(key, backend, reply));
        }
        Ok(pb::StoreAllResponse {
            results,
            backend: convert::backend(batch_backend),
        })
    }

    async fn do_list_keys(
        &self,
        request: pb::ListKeysRequest,
        deadline: Deadline,
    ) -> Result<pb::ListKeysResponse, CallError> {
        let prefix = self.limits.prefix(request.prefix)?;
        let page_size = self.limits.page_size(request.page_size)?;
        let token = Some(request.page_token.as_str()).filter(|token| !token.is_empty());
        let _permit = self.scan_permit()?;
        let answer = self
            .store
            .list_keys(&prefix, page_size, token, deadline)
            .await?;
        Ok(pb::ListKeysResponse {
            keys: answer.value.keys.iter().map(ToString::to_string).collect(),
            next_page_token: answer.value.next.unwrap_or_default(),
            backend: convert::backend(answer.backend),
        })
    }

    async fn do_size(
        &self,
        request: pb::SizeRequest,
        deadline: Deadline,
    ) -> Result<pb::SizeResponse, CallError> {
        let prefix = self.limits.prefix(request.prefix)?;
        let _permit = self.scan_permit()?;
        let answer = self.store.size(&prefix, deadline).await?;
        Ok(pb::SizeResponse {
            count: i64::try_from(answer.value).unwrap_or(i64::MAX),
            backend: convert::backend(answer.backend),
        })
    }

    async fn do_load_all(
        &self,
        request: pb::LoadAllRequest,
        context: CallContext,
    ) -> Result<load_all::Messages, CallError> {
        let prefix = self.limits.prefix(request.prefix)?;
        let permit = self.scan_permit()?;
        let answer = self.store.load_all(&prefix, context.deadline).await?;
        Ok(load_all::messages(answer, context, permit))
    }
}

#[tonic::async_trait]
impl GroupStateService for Service {
    async fn store(
        &self,
        request: Request<pb::StoreRequest>,
    ) -> Result<Response<pb::StoreResponse>, Status> {
        let (request, mut call) = Call::of("store", request);
        call.concerns(|| request.group.as_ref().map(|group| &group.key));
        let result = self.do_store(request, call.context.deadline).await;
        self.finish(&call, result)
    }

    async fn load(
        &self,
        request: Request<pb::LoadRequest>,
    ) -> Result<Response<pb::LoadResponse>, Status> {
        let (request, mut call) = Call::of("load", request);
        call.concerns(|| Some(&request.key));
        let result = self.do_load(request, call.context.deadline).await;
        self.finish(&call, result)
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteRequest>,
    ) -> Result<Response<pb::DeleteResponse>, Status> {
        let (request, mut call) = Call::of("delete", request);
        call.concerns(|| Some(&request.key));
        let result = self.do_delete(request, call.context.deadline).await;
        if matches!(&result, Ok(reply) if !reply.deleted && reply.version > 0) {
            call.success = "conflict";
        }
        self.finish(&call, result)
    }

    async fn compare_and_swap(
        &self,
        request: Request<pb::CompareAndSwapRequest>,
    ) -> Result<Response<pb::CompareAndSwapResponse>, Status> {
        let (request, mut call) = Call::of("compare_and_swap", request);
        call.concerns(|| request.group.as_ref().map(|group| &group.key));
        let result = self
            .do_compare_and_swap(request, call.context.deadline)
            .await;
        if matches!(&result, Ok(reply) if !reply.swapped) {
            call.success = "conflict";
        }
        self.finish(&call, result)
    }

    async fn store_all(
        &self,
        request: Request<pb::StoreAllRequest>,
    ) -> Result<Response<pb::StoreAllResponse>, Status> {
        let (request, call) = Call::of("store_all", request);
        let result = self.do_store_all(request, call.context.deadline).await;
        self.finish(&call, result)
    }

    async fn list_keys(
        &self,
        request: Request<pb::ListKeysRequest>,
    ) -> Result<Response<pb::ListKeysResponse>, Status> {
        let (request, call) = Call::of("list_keys", request);
        let result = self.do_list_keys(request, call.context.deadline).await;
        self.finish(&call, result)
    }

    async fn size(
        &self,
        request: Request<pb::SizeRequest>,
    ) -> Result<Response<pb::SizeResponse>, Status> {
        let (request, call) = Call::of("size", request);
        let result = self.do_size(request, call.context.deadline).await;
        self.finish(&call, result)
    }

    type LoadAllStream = load_all::Messages;

    async fn load_all(
        &self,
        request: Request<pb::LoadAllRequest>,
    ) -> Result<Response<Self::LoadAllStream>, Status> {
        let (request, call) = Call::of("load_all", request);
        let result = self.do_load_all(request, call.context.clone()).await;
        self.finish(&call, result)
    }
}

// === impl Call ===

impl Call {
    fn of<T>(operation: &'static str, mut request: Request<T>) -> (T, Self) {
        // The envelope has put it there.
        let context = request
            .extensions_mut()
            .remove::<CallContext>()
            .unwrap_or_default();
        let call = Self {
            operation,
            context,
            key: None,
            success: "success",
        };
        (request.into_inner(), call)
    }

    fn concerns<'a>(&mut self, key: impl FnOnce() -> Option<&'a String>) {
        if tracing::enabled!(tracing::Level::DEBUG) {
            self.key = key().cloned();
        }
    }
}

fn store_result(
    key: String,
    backend: Backend,
    result: Result<Written, CallError>,
) -> pb::StoreResult {
    let (version, error) = match result {
        Ok(written) => (written.version.get(), None),
        Err(error) => (0, Some(error.into_group_error(key.clone()))),
    };
    pb::StoreResult {
        key,
        version,
        backend: convert::backend(backend),
        error,
    }
}
