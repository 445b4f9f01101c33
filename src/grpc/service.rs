//! The eight calls: validate, ask the store, reply.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::{FutureExt, Stream, StreamExt, stream, stream::BoxStream};
use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tonic::{Request, Response, Status};

use super::{
    convert,
    envelope::CallContext,
    proto::{self as pb, group_state_service_server::GroupStateService},
    status::CallError,
    validation::{Limits, Violations, expected_version, version_to_delete},
};
use crate::store::{
    Answer, Backend, Deadline, GroupStore, LoadAll, StoreError, Stored, Swap, Written,
};

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

/// Sends the messages of a LoadAll.
struct LoadAllSender {
    messages: mpsc::Sender<Result<pb::LoadAllResponse, Status>>,
    backend: Backend,
    /// The message that is being filled, and its size.
    message: pb::LoadAllResponse,
    bytes: usize,
    last_sent: Instant,
    summary: pb::LoadAllSummary,
}

/// Why a LoadAll was not sent to its end.
enum SendError {
    Call(CallError),
    /// Nobody reads it any more.
    ReaderGone,
}

type LoadAllStream = BoxStream<'static, Result<pb::LoadAllResponse, Status>>;

// === impl Service ===

impl Service {
    /// The time a batch without a deadline gets.
    const BATCH_BOUND: Duration = Duration::from_secs(5);

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
            expire_time: answer.value.expires_at.map(convert::timestamp),
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
        let Some(Stored { group, expires_at }) = answer.value else {
            return Err(CallError::not_found(answer.backend));
        };
        Ok(pb::LoadResponse {
            group: Some(convert::group(group)),
            expire_time: expires_at.map(convert::timestamp),
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
            Swap::Swapped(Written {
                version,
                expires_at,
            }) => pb::CompareAndSwapResponse {
                swapped: true,
                version: version.get(),
                current: None,
                expire_time: expires_at.map(convert::timestamp),
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
        let deadline = Deadline::at(deadline.or_within(Self::BATCH_BOUND));
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
    ) -> Result<LoadAllStream, CallError> {
        let prefix = self.limits.prefix(request.prefix)?;
        let permit = self.scan_permit()?;
        let answer = self.store.load_all(&prefix, context.deadline).await?;
        let backend = answer.backend;
        // One message waits while one is being sent: a slow reader slows the
        // read, and memory stays bounded.
        let (messages, receiver) = mpsc::channel(1);
        let request_id = context.request_id.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let sent = send_all(answer, messages.clone(), context.deadline);
            let error = match AssertUnwindSafe(sent).catch_unwind().await {
                Ok(Ok(())) | Ok(Err(SendError::ReaderGone)) => return,
                Ok(Err(SendError::Call(error))) => error,
                Err(_panic) => CallError::internal(),
            };
            let status = error.into_status(context.request_id.as_str(), backend);
            let send = messages.send_timeout(Err(status), LoadAllSender::STALL_LIMIT);
            // If the reader is gone, nobody is left to be told.
            let _ = send.await;
        });
        let unfinished =
            move || CallError::deadline_exceeded().into_status(request_id.as_str(), backend);
        Ok(until_finished(receiver, unfinished).boxed())
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

    type LoadAllStream = LoadAllStream;

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

// === impl LoadAllSender ===

impl LoadAllSender {
    /// A message is sent when it has grown to this.
    const MESSAGE_BYTES: usize = 1 << 20;
    /// A read that finds nothing shows that it goes on this often.
    const SIGN_OF_LIFE: Duration = Duration::from_secs(1);
    /// A reader that takes no message for this long is given up.
    const STALL_LIMIT: Duration = Duration::from_secs(60);

    async fn group(&mut self, group: pb::AlertGroup) -> Result<(), SendError> {
        self.make_room(group.encoded_len()).await?;
        self.message.groups.push(group);
        self.summary.groups += 1;
        Ok(())
    }

    async fn problem(&mut self, problem: pb::GroupError) -> Result<(), SendError> {
        self.make_room(problem.encoded_len()).await?;
        self.message.problems.push(problem);
        self.summary.problems += 1;
        Ok(())
    }

    /// Sends the message if `bytes` more would make it too large.
    async fn make_room(&mut self, bytes: usize) -> Result<(), SendError> {
        // A tag and a length stand before each element.
        let bytes = bytes + 6;
        if self.bytes > 0 && self.bytes + bytes > Self::MESSAGE_BYTES {
            self.send().await?;
        }
        self.bytes += bytes;
        Ok(())
    }

    async fn send(&mut self) -> Result<(), SendError> {
        let mut message = std::mem::take(&mut self.message);
        message.backend = convert::backend(self.backend);
        self.bytes = 0;
        self.messages
            .send_timeout(Ok(message), Self::STALL_LIMIT)
            .await
            .map_err(|_| SendError::ReaderGone)?;
        self.last_sent = Instant::now();
        Ok(())
    }
}

/// Sends a whole LoadAll, its summary last.
async fn send_all(
    answer: Answer<LoadAll>,
    messages: mpsc::Sender<Result<pb::LoadAllResponse, Status>>,
    deadline: Deadline,
) -> Result<(), SendError> {
    let mut batches = answer.value.batches;
    let mut sender = LoadAllSender {
        messages,
        backend: answer.backend,
        message: pb::LoadAllResponse::default(),
        bytes: 0,
        last_sent: Instant::now(),
        summary: pb::LoadAllSummary {
            complete: answer.value.complete,
            ..pb::LoadAllSummary::default()
        },
    };
    let send = async {
        while let Some(batch) = batches.next().await {
            let batch = batch.map_err(|failure| SendError::Call(failure.into()))?;
            for group in batch.groups {
                sender.group(convert::group(group)).await?;
            }
            for problem in batch.problems {
                let error = CallError::from(problem.error).into_group_error(problem.key);
                sender.problem(error).await?;
            }
            if sender.bytes > 0 || sender.last_sent.elapsed() > LoadAllSender::SIGN_OF_LIFE {
                sender.send().await?;
            }
        }
        sender.message.summary = Some(sender.summary);
        sender.send().await?;
        Ok(())
    };
    match deadline.instant() {
        Some(deadline) => tokio::time::timeout_at(deadline, send)
            .await
            .unwrap_or_else(|_| Err(SendError::Call(CallError::deadline_exceeded()))),
        None => send.await,
    }
}

/// The messages of a LoadAll. One that breaks off without a summary or an
/// error, since its reader was given up, ends with the status `unfinished`: it
/// must not look complete.
fn until_finished(
    messages: mpsc::Receiver<Result<pb::LoadAllResponse, Status>>,
    unfinished: impl FnOnce() -> Status,
) -> impl Stream<Item = Result<pb::LoadAllResponse, Status>> {
    let state = (messages, Some(unfinished));
    stream::unfold(state, |(mut messages, unfinished)| async move {
        let unfinished = unfinished?;
        Some(match messages.recv().await {
            Some(Ok(message)) if message.summary.is_none() => {
                (Ok(message), (messages, Some(unfinished)))
            }
            Some(last) => (last, (messages, None)),
            None => (Err(unfinished()), (messages, None)),
        })
    })
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
