//! The eight calls: validate, ask the store, reply.

use std::sync::Arc;

use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status};

use super::{
    admission::call::CallContext,
    convert, load_all,
    proto::{self as pb, group_state_service_server::GroupStateService},
    status::CallError,
    validation::{Limits, Violations, expected_version, version_to_delete},
};
use crate::{
    store::{Backend, Deadline, Deletion, GroupStore, StoreError, Stored, Swap, Written},
    telemetry::{self, CallResult, Limit},
};

/// The service over any store.
#[derive(Clone)]
pub struct Service {
    store: Arc<dyn GroupStore>,
    limits: Limits,
    scans: Arc<Semaphore>,
    max_scans: usize,
    /// Named where a reply is refused.
    max_inflight_bytes: usize,
}

/// A reply, and what is told of it.
struct Replied<T> {
    message: T,
    backend: Backend,
    result: CallResult,
    /// It may be refused as well.
    changed_nothing: bool,
}

// === impl Service ===

impl Service {
    /// At most `max_scans` listings and LoadAlls read at once; more are refused.
    pub fn new(
        store: Arc<dyn GroupStore>,
        limits: Limits,
        max_scans: usize,
        max_inflight_bytes: usize,
    ) -> Self {
        Self {
            store,
            limits,
            scans: Arc::new(Semaphore::new(max_scans)),
            max_scans,
            max_inflight_bytes,
        }
    }

    fn scan_permit(&self) -> Result<OwnedSemaphorePermit, CallError> {
        self.scans.clone().try_acquire_owned().map_err(|_| {
            telemetry::call_shed(Limit::MaxScans);
            CallError::overloaded(Limit::MaxScans, self.max_scans)
        })
    }

    /// Tells what has come of a call and makes its reply.
    fn finish<T: Message>(
        &self,
        context: &CallContext,
        result: Result<Replied<T>, CallError>,
    ) -> Result<Response<T>, Status> {
        match result {
            Ok(replied) => {
                let bytes = replied.message.encoded_len();
                if replied.changed_nothing && !context.has_room_for(bytes) {
                    telemetry::call_shed(Limit::MaxInflightBytes);
                    let error =
                        CallError::overloaded(Limit::MaxInflightBytes, self.max_inflight_bytes);
                    return Err(context.refuse(error, replied.backend));
                }
                context.succeeds(replied.result, replied.backend);
                context.replies_with(bytes);
                Ok(Response::new(replied.message))
            }
            Err(error) => Err(context.refuse(error, self.store.backend())),
        }
    }

    async fn do_store(
        &self,
        request: pb::StoreRequest,
        deadline: Deadline,
    ) -> Result<Replied<pb::StoreResponse>, CallError> {
        let mut violations = Violations::default();
        let group = self
            .limits
            .group(format_args!("group"), request.group, &mut violations);
        let expiry = self
            .limits
            .expiry(request.expiry.map(Into::into), &mut violations);
        let (group, expiry) = violations.check(group.zip(expiry))?;
        let answer = self.store.store(&group, expiry, deadline).await?;
        let message = pb::StoreResponse {
            version: answer.value.version.get(),
            expire_time: convert::expire_time(answer.value.expires),
            backend: convert::backend(answer.backend),
        };
        Ok(Replied::success(answer.backend, message))
    }

    async fn do_load(
        &self,
        request: pb::LoadRequest,
        deadline: Deadline,
    ) -> Result<Replied<pb::LoadResponse>, CallError> {
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
        let message = pb::LoadResponse {
            group: Some(convert::group(group)),
            expire_time: convert::expire_time(expires),
            backend: convert::backend(answer.backend),
        };
        Ok(Replied::read(answer.backend, message))
    }

    async fn do_delete(
        &self,
        request: pb::DeleteRequest,
        deadline: Deadline,
    ) -> Result<Replied<pb::DeleteResponse>, CallError> {
        let mut violations = Violations::default();
        let key = self
            .limits
            .key(format_args!("key"), request.key, &mut violations);
        let expected = version_to_delete(request.expected_version, &mut violations);
        let (key, expected) = violations.check(key.zip(expected))?;
        let answer = self.store.delete(&key, expected, deadline).await?;
        let Deletion { deleted, version } = answer.value;
        let message = pb::DeleteResponse {
            deleted,
            version: convert::version(version),
            backend: convert::backend(answer.backend),
            authoritative: answer.backend == Backend::Redis,
        };
        let conflict = !deleted && version.is_some();
        Ok(Replied::success(answer.backend, message).unless_conflict(conflict))
    }

    async fn do_compare_and_swap(
        &self,
        request: pb::CompareAndSwapRequest,
        deadline: Deadline,
    ) -> Result<Replied<pb::CompareAndSwapResponse>, CallError> {
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
        let message = match answer.value {
            Swap::Swapped(Written {
                version, expires, ..
            }) => pb::CompareAndSwapResponse {
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
        };
        let conflict = !message.swapped;
        Ok(Replied::success(answer.backend, message).unless_conflict(conflict))
    }

    async fn do_store_all(
        &self,
        request: pb::StoreAllRequest,
        deadline: Deadline,
    ) -> Result<Replied<pb::StoreAllResponse>, CallError> {
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
        let mut worst = CallResult::Success;
        for (key, valid) in checked {
            let reply = match valid {
                Ok(()) => replies.next().unwrap_or_else(|| {
                    Err(now.fails(StoreError::Bug("a result is missing".into())))
                }),
                Err(error) => {
                    worst = worst.max(error.result());
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
            let reply = reply.map(|answer| answer.value);
            let reply = reply.map_err(|failure| CallError::from(failure).under(deadline));
            if let Err(error) = &reply {
                worst = worst.max(error.result());
            }
            results.push(store_result(key, backend, reply));
        }
        Ok(Replied {
            message: pb::StoreAllResponse {
                results,
                backend: convert::backend(batch_backend),
            },
            backend: batch_backend,
            result: worst,
            changed_nothing: false,
        })
    }

    async fn do_list_keys(
        &self,
        request: pb::ListKeysRequest,
        deadline: Deadline,
    ) -> Result<Replied<pb::ListKeysResponse>, CallError> {
        let prefix = self.limits.prefix(request.prefix)?;
        let page_size = self.limits.page_size(request.page_size)?;
        let token = Some(request.page_token.as_str()).filter(|token| !token.is_empty());
        let _permit = self.scan_permit()?;
        let answer = self
            .store
            .list_keys(&prefix, page_size, token, deadline)
            .await?;
        let message = pb::ListKeysResponse {
            keys: answer.value.keys.iter().map(ToString::to_string).collect(),
            next_page_token: answer.value.next.unwrap_or_default(),
            backend: convert::backend(answer.backend),
        };
        Ok(Replied::read(answer.backend, message))
    }

    async fn do_size(
        &self,
        request: pb::SizeRequest,
        deadline: Deadline,
    ) -> Result<Replied<pb::SizeResponse>, CallError> {
        let prefix = self.limits.prefix(request.prefix)?;
        let _permit = self.scan_permit()?;
        let answer = self.store.size(&prefix, deadline).await?;
        let message = pb::SizeResponse {
            count: i64::try_from(answer.value).unwrap_or(i64::MAX),
            backend: convert::backend(answer.backend),
        };
        Ok(Replied::read(answer.backend, message))
    }

    async fn do_load_all(
        &self,
        request: pb::LoadAllRequest,
        context: CallContext,
    ) -> Result<load_all::Messages, CallError> {
        let prefix = self.limits.prefix(request.prefix)?;
        let permit = self.scan_permit()?;
        let answer = self.store.load_all(&prefix, context.deadline()).await?;
        context.replies_with(load_all::BYTES);
        Ok(load_all::messages(answer, context, permit))
    }
}

#[tonic::async_trait]
impl GroupStateService for Service {
    async fn store(
        &self,
        request: Request<pb::StoreRequest>,
    ) -> Result<Response<pb::StoreResponse>, Status> {
        let (request, context) = CallContext::take(request);
        context.concerns(|| request.group.as_ref().map(|group| &group.key));
        let result = self.do_store(request, context.deadline()).await;
        self.finish(&context, result)
    }

    async fn load(
        &self,
        request: Request<pb::LoadRequest>,
    ) -> Result<Response<pb::LoadResponse>, Status> {
        let (request, context) = CallContext::take(request);
        context.concerns(|| Some(&request.key));
        let result = self.do_load(request, context.deadline()).await;
        self.finish(&context, result)
    }

    async fn delete(
        &self,
        request: Request<pb::DeleteRequest>,
    ) -> Result<Response<pb::DeleteResponse>, Status> {
        let (request, context) = CallContext::take(request);
        context.concerns(|| Some(&request.key));
        let result = self.do_delete(request, context.deadline()).await;
        self.finish(&context, result)
    }

    async fn compare_and_swap(
        &self,
        request: Request<pb::CompareAndSwapRequest>,
    ) -> Result<Response<pb::CompareAndSwapResponse>, Status> {
        let (request, context) = CallContext::take(request);
        context.concerns(|| request.group.as_ref().map(|group| &group.key));
        let result = self.do_compare_and_swap(request, context.deadline()).await;
        self.finish(&context, result)
    }

    async fn store_all(
        &self,
        request: Request<pb::StoreAllRequest>,
    ) -> Result<Response<pb::StoreAllResponse>, Status> {
        let (request, context) = CallContext::take(request);
        let result = self.do_store_all(request, context.deadline()).await;
        self.finish(&context, result)
    }

    async fn list_keys(
        &self,
        request: Request<pb::ListKeysRequest>,
    ) -> Result<Response<pb::ListKeysResponse>, Status> {
        let (request, context) = CallContext::take(request);
        let result = self.do_list_keys(request, context.deadline()).await;
        self.finish(&context, result)
    }

    async fn size(
        &self,
        request: Request<pb::SizeRequest>,
    ) -> Result<Response<pb::SizeResponse>, Status> {
        let (request, context) = CallContext::take(request);
        let result = self.do_size(request, context.deadline()).await;
        self.finish(&context, result)
    }

    type LoadAllStream = load_all::Messages;

    async fn load_all(
        &self,
        request: Request<pb::LoadAllRequest>,
    ) -> Result<Response<Self::LoadAllStream>, Status> {
        let (request, context) = CallContext::take(request);
        // The stream tells what comes of it.
        self.do_load_all(request, context.clone())
            .await
            .map(Response::new)
            .map_err(|error| context.refuse(error, self.store.backend()))
    }
}

// === impl Replied ===

impl<T> Replied<T> {
    fn success(backend: Backend, message: T) -> Self {
        Self {
            message,
            backend,
            result: CallResult::Success,
            changed_nothing: false,
        }
    }

    /// The same, of a call that only reads.
    fn read(backend: Backend, message: T) -> Self {
        Self {
            changed_nothing: true,
            ..Self::success(backend, message)
        }
    }

    /// The same; a conflict if somebody else's change came first.
    fn unless_conflict(self, conflict: bool) -> Self {
        Self {
            result: if conflict {
                CallResult::Conflict
            } else {
                self.result
            },
            changed_nothing: conflict,
            ..self
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
