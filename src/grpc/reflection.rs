//! Server reflection as a conversation: a message is received within its limits and
//! answered, then the next one is waited for.
//!
//! The service of tonic reads its stream of requests by itself, with room for what each
//! message announces, for as long as a client likes. Here it is called once for each message,
//! with a body that is there already; so it meets the same bounds as any other call.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, Request, Response, header::CONTENT_TYPE, request};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, Full, StreamBody};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Code, Status, body::Body, metadata::GRPC_CONTENT_TYPE};
use tower::ServiceExt;

use super::{
    admission::{call::CallContext, request_body::Messages},
    status::CallError,
};
use crate::store::Backend;

/// The streams of reflection that may be open. Each may keep a window full
/// of its connection.
pub const MAX_REFLECTION_STREAMS: usize = 32;

/// Its name, for who is over it.
const LIMIT: &str = "max-reflection-streams";

/// A reflection stream. It ends with its messages, with the first error, or when its client
/// is silent.
struct Conversation<S, B> {
    messages: Messages<B>,
    service: S,
    /// Of the request, without its headers.
    head: request::Parts,
    context: CallContext,
    /// Would answer a call, as an error says.
    backend: Backend,
    is_over: bool,
    _open: Option<OwnedSemaphorePermit>,
}

/// The right to have a stream open.
pub fn open(streams: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, CallError> {
    let open = streams.clone().try_acquire_owned();
    open.map_err(|_| CallError::too_many(LIMIT, MAX_REFLECTION_STREAMS))
}

/// The reply to a request of reflection, which `service` knows the answers to.
pub fn answer<S, B>(
    head: request::Parts,
    messages: Messages<B>,
    service: S,
    context: CallContext,
    backend: Backend,
    open: Option<OwnedSemaphorePermit>,
) -> Response<Body>
where
    S: tower::Service<Request<Body>, Response = Response<Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Send,
{
    let conversation = Conversation {
        messages,
        service,
        head,
        context,
        backend,
        is_over: false,
        _open: open,
    };
    let frames = stream::unfold(conversation, |mut conversation| async move {
        let frame = conversation.next_frame().await?;
        Some((Ok::<_, Status>(frame), conversation))
    });
    let mut response = Response::new(Body::new(StreamBody::new(frames)));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    response
}

// === impl Conversation ===

impl<S, B> Conversation<S, B>
where
    S: tower::Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone,
    B: HttpBody<Data = Bytes> + Unpin,
{
    /// A reply, then another one, and at the end the status. None after that.
    async fn next_frame(&mut self) -> Option<Frame<Bytes>> {
        if self.is_over {
            return None;
        }
        let reply = match self.context.deadline().instant() {
            Some(deadline) => tokio::time::timeout_at(deadline, self.next_reply())
                .await
                .unwrap_or_else(|_| Err(self.status_of(CallError::deadline_exceeded()))),
            None => self.next_reply().await,
        };
        let status = match reply {
            Ok(Some(reply)) => return Some(Frame::data(reply)),
            Ok(None) => Status::new(Code::Ok, ""),
            Err(status) => status,
        };
        self.is_over = true;
        Some(Frame::trailers(trailers(&status)))
    }

    /// None: the client has said all.
    async fn next_reply(&mut self) -> Result<Option<Bytes>, Status> {
        let message = self.messages.next().await;
        let Some(message) = message.map_err(|error| self.status_of(error))? else {
            return Ok(None);
        };
        let request = Request::from_parts(self.head.clone(), Body::new(Full::new(message)));
        let service = self.service.clone();
        let response = match service.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let failed = |headers: &HeaderMap| {
            Status::from_header_map(headers).filter(|status| status.code() != Code::Ok)
        };
        if let Some(status) = failed(response.headers()) {
            return Err(status);
        }
        let reply = response.into_body().collect().await?;
        match reply.trailers().and_then(failed) {
            Some(status) => Err(status),
            None => Ok(Some(reply.to_bytes())),
        }
    }

    fn status_of(&self, error: CallError) -> Status {
        self.context.refuse(error, self.backend)
    }
}

/// A status as the end of a stream.
pub fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        // Only with metadata that no status here has.
        trailers.insert(Status::GRPC_STATUS, (Code::Internal as i32).into());
    }
    trailers
}
