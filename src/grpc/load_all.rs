//! A LoadAll as a stream of messages: bounded in size, no faster than its
//! reader, and never complete by mistake.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures::{FutureExt, Stream, StreamExt, stream, stream::BoxStream};
use prost::Message;
use tokio::{
    sync::{
        OwnedSemaphorePermit,
        mpsc::{self, error::TrySendError},
    },
    time::Instant,
};
use tonic::Status;

use super::{admission::call::CallContext, convert, proto as pb, status::CallError};
use crate::{
    store::{Answer, Backend, Deadline, LoadAll, StoreError},
    telemetry::CallResult,
};

/// Sends the messages of a LoadAll.
struct LoadAllSender {
    /// Held while it reads, and not while it waits for its reader: who reads slowly
    /// keeps nobody from listing.
    permit: Option<OwnedSemaphorePermit>,
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

/// What a LoadAll holds when its reader stalls, besides the message that is being
/// sent: one that waits, one that is being filled, and what it is filled from.
pub const BYTES: usize = 3 * LoadAllSender::MESSAGE_BYTES;

/// What the reader of a LoadAll gets.
pub type Messages = BoxStream<'static, Result<pb::LoadAllResponse, Status>>;

/// Sends what was read in a task of its own, which holds `permit` while it reads.
pub fn messages(
    answer: Answer<LoadAll>,
    context: CallContext,
    permit: OwnedSemaphorePermit,
) -> Messages {
    let backend = answer.backend;
    // One message waits while one is being sent: a slow reader slows the read,
    // and memory stays bounded.
    let (messages, receiver) = mpsc::channel(1);
    let request_id = context.request_id().clone();
    tokio::spawn(async move {
        let sent = send_all(answer, permit, messages.clone(), context.deadline());
        let sent = context.work(sent);
        let sent = AssertUnwindSafe(sent).catch_unwind().await;
        let error = match sent {
            Ok(Ok(summary)) => {
                let result = match summary.problems {
                    0 => CallResult::Success,
                    _ => CallResult::Unreadable,
                };
                return context.succeeds(result, backend);
            }
            Ok(Err(SendError::ReaderGone)) => return,
            Ok(Err(SendError::Call(error))) => error,
            Err(_panic) => {
                context.panicked();
                CallError::internal()
            }
        };
        let status = context.refuse(error, backend);
        let send = messages.send_timeout(Err(status), LoadAllSender::STALL_LIMIT);
        // If the reader is gone, nobody is left to be told.
        let _ = send.await;
    });
    let unfinished = move || {
        let error = CallError::reader_too_slow(LoadAllSender::STALL_LIMIT);
        error.into_status(request_id.as_str(), backend)
    };
    until_finished(receiver, unfinished).boxed()
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
        if let Err(not_sent) = self.messages.try_send(Ok(message)) {
            let TrySendError::Full(message) = not_sent else {
                return Err(SendError::ReaderGone);
            };
            let permit = self.permit.take();
            let scans = permit.as_ref().map(|permit| permit.semaphore().clone());
            drop(permit);
            self.messages
                .send_timeout(message, Self::STALL_LIMIT)
                .await
                .map_err(|_| SendError::ReaderGone)?;
            if let Some(scans) = scans {
                self.permit = scans.acquire_owned().await.ok();
            }
        }
        self.last_sent = Instant::now();
        Ok(())
    }
}

/// Sends a whole LoadAll, its summary last.
async fn send_all(
    answer: Answer<LoadAll>,
    permit: OwnedSemaphorePermit,
    messages: mpsc::Sender<Result<pb::LoadAllResponse, Status>>,
    deadline: Deadline,
) -> Result<pb::LoadAllSummary, SendError> {
    let mut batches = answer.value;
    let mut sender = LoadAllSender {
        permit: Some(permit),
        messages,
        backend: answer.backend,
        message: pb::LoadAllResponse::default(),
        bytes: 0,
        last_sent: Instant::now(),
        summary: pb::LoadAllSummary::default(),
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
            if let Some(complete) = batch.complete {
                sender.summary.complete = complete;
                sender.message.summary = Some(sender.summary);
                sender.send().await?;
                return Ok(sender.summary);
            }
            if sender.bytes > 0 || sender.last_sent.elapsed() > LoadAllSender::SIGN_OF_LIFE {
                sender.send().await?;
            }
        }
        Err(SendError::Call(CallError::from(StoreError::Bug(
            "a LoadAll ended without saying whether it is complete".into(),
        ))))
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
