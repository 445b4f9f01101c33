//! Takes in the messages of requests before anybody works on them: how large one may
//! be, how long it may take to come, and how much memory all of them may take
//! together.
//!
//! The decoder of tonic makes room for a message as soon as it has read its
//! length: five bytes would cost as much as the largest request. Here a request takes the
//! room of what has come; and what it grows to when it is decoded is told before.
//!
//! No body of any service reaches tonic's decoder in another way. A call has one message,
//! except in reflection, whose messages come one after the other: see [`Messages`].

use std::{sync::Arc, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use futures::FutureExt;
use http_body::Body as HttpBody;
use http_body_util::{BodyExt, Full};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tonic::body::Body;

use super::decoded_size::decoded_bytes;
use super::slow_clients::Wait;
use crate::{
    grpc::status::CallError,
    telemetry::{self, Limit},
};

/// Where requests come in.
pub struct Inbox {
    /// A permit for each byte.
    room: Arc<Semaphore>,
    max_inflight_bytes: usize,
    max_request_bytes: usize,
}

/// The bytes of a request that count as in flight, as long as this is held.
#[derive(Default)]
pub struct Room(Option<OwnedSemaphorePermit>);

/// A request that has not come within this is given up.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);

/// The name of the setting.
const MAX_REQUEST_BYTES: &str = "max-request-bytes";

/// What gRPC puts before a message: a flag, and the length in four bytes.
const PREFIX_BYTES: usize = 5;

/// Decoded, a request takes at most so many times `--max-request-bytes`. Alerts without a
/// label, in messages of that size, come to less.
const MOST_GROWTH: usize = 16;

/// How large a message may be.
#[derive(Clone, Copy, Debug)]
pub struct MessageLimit {
    /// As the caller is told.
    name: &'static str,
    bytes: usize,
}

/// More than a request to `grpc.health.v1` has to say.
const MAX_HEALTH_REQUEST: MessageLimit = MessageLimit {
    name: "max-health-request-bytes",
    bytes: 1_024,
};

/// More than the longest name of a file or symbol.
const MAX_REFLECTION_REQUEST: MessageLimit = MessageLimit {
    name: "max-reflection-request-bytes",
    bytes: 4_096,
};

/// The messages of a request that may have several, one after the other. What has come of
/// the next one is kept, and no more.
pub struct Messages<B> {
    body: B,
    limit: MessageLimit,
    buffer: BytesMut,
    /// Counts what is in the buffer.
    wait: Option<Wait>,
}

// === impl Inbox ===

impl Inbox {
    pub fn new(max_inflight_bytes: usize, max_request_bytes: usize) -> Self {
        Self {
            room: Arc::new(Semaphore::new(max_inflight_bytes)),
            max_inflight_bytes,
            max_request_bytes,
        }
    }

    /// The request of a call of ours, which `wait` counts as long as it waits for its client.
    pub async fn receive<B>(
        &self,
        body: B,
        wait: Option<&mut Wait>,
    ) -> Result<(Body, Room), CallError>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let limit = MessageLimit {
            name: MAX_REQUEST_BYTES,
            bytes: self.max_request_bytes,
        };
        let mut room = Room::default();
        let take = |bytes| self.make_room(&mut room, bytes);
        let whole = collect(body, wait, limit, take, || self.shed()).await?;
        let decoded = decoded_bytes(whole.get(PREFIX_BYTES..).unwrap_or_default());
        if decoded > self.max_request_bytes.saturating_mul(MOST_GROWTH) {
            return Err(CallError::message_too_large(
                MAX_REQUEST_BYTES,
                &format!("decoded, it would take {decoded} bytes, over {MOST_GROWTH} times that"),
            ));
        }
        // By itself, any request is let in.
        let takes = decoded.min(self.max_inflight_bytes);
        let taken = room.bytes();
        self.make_room(&mut room, takes.saturating_sub(taken))?;
        Ok((Body::new(Full::new(whole)), room))
    }

    /// The request of a health call, which is never shed.
    pub async fn receive_health<B>(
        &self,
        body: B,
        wait: Option<&mut Wait>,
    ) -> Result<Body, CallError>
    where
        B: HttpBody<Data = Bytes> + Unpin,
    {
        let whole = collect(body, wait, MAX_HEALTH_REQUEST, |_| Ok(()), || self.shed()).await?;
        Ok(Body::new(Full::new(whole)))
    }

    fn make_room(&self, room: &mut Room, bytes: usize) -> Result<(), CallError> {
        // A frame of HTTP/2 has less than 2^24 bytes.
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(more) = self.room.clone().try_acquire_many_owned(permits) else {
            return Err(self.shed());
        };
        match &mut room.0 {
            None => room.0 = Some(more),
            Some(held) => held.merge(more),
        }
        Ok(())
    }

    fn shed(&self) -> CallError {
        telemetry::call_shed(Limit::MaxInflightBytes);
        CallError::overloaded(Limit::MaxInflightBytes, self.max_inflight_bytes)
    }
}

// === impl Room ===

impl Room {
    fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }
}

// === impl MessageLimit ===

impl MessageLimit {
    /// Checks a message of which there are so many bytes, and as many as it says itself.
    fn check(self, so_far: usize, declared: Option<usize>) -> Result<(), CallError> {
        let bytes = declared
            .unwrap_or(0)
            .max(so_far.saturating_sub(PREFIX_BYTES));
        if bytes > self.bytes {
            let what = format!("it has {bytes} bytes");
            return Err(CallError::message_too_large(self.name, &what));
        }
        Ok(())
    }
}

// === impl Messages ===

impl<B: HttpBody<Data = Bytes> + Unpin> Messages<B> {
    /// The requests of a reflection stream.
    pub fn of_reflection(body: B, wait: Option<Wait>) -> Self {
        Self {
            body,
            limit: MAX_REFLECTION_REQUEST,
            buffer: BytesMut::new(),
            wait,
        }
    }

    /// The next message with its prefix; None at the end. It has to come within
    /// [`BODY_TIMEOUT`], and whoever is silent for longer is done.
    pub async fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        let deadline = Instant::now() + BODY_TIMEOUT;
        loop {
            let declared = declared_bytes(&self.buffer);
            self.limit.check(0, declared)?;
            let whole = declared.map(|bytes| bytes + PREFIX_BYTES);
            if let Some(whole) = whole.filter(|whole| *whole <= self.buffer.len()) {
                // A copy, so that the small one does not keep a large buffer.
                let message = Bytes::copy_from_slice(&self.buffer[..whole]);
                self.buffer.advance(whole);
                self.count();
                return Ok(Some(message));
            }
            let frame = tokio::time::timeout_at(deadline, self.body.frame())
                .await
                .map_err(|_| CallError::request_too_slow(BODY_TIMEOUT))?;
            match frame {
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(CallError::malformed("it ends in the middle of a message")),
                Some(Err(_)) => return Err(CallError::request_broken_off()),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                        self.count();
                    }
                }
            }
        }
    }

    fn count(&mut self) {
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        if let Some(wait) = &mut self.wait {
            wait.clear();
            wait.add(self.buffer.capacity());
        }
    }
}

/// Puts the body of a call with one message together from its frames. `take` is asked
/// before more memory is taken; `shed` says why what has come must not wait for the rest.
async fn collect<B>(
    mut body: B,
    mut wait: Option<&mut Wait>,
    limit: MessageLimit,
    mut take: impl FnMut(usize) -> Result<(), CallError>,
    shed: impl Fn() -> CallError,
) -> Result<Bytes, CallError>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    let deadline = Instant::now() + BODY_TIMEOUT;
    // Nearly every request comes in one frame, which is not copied.
    let mut first = Bytes::new();
    let mut all = Vec::new();
    // What waits for the rest.
    let mut counted = 0;
    while !body.is_end_stream() {
        let frame = match body.frame().now_or_never() {
            Some(frame) => frame,
            None => {
                if all.is_empty() {
                    // A frame may be of one byte and keep a buffer alive.
                    first = Bytes::copy_from_slice(&first);
                }
                let so_far = first.len() + all.capacity();
                if let Some(wait) = &mut wait {
                    if !wait.takes(so_far) {
                        return Err(shed());
                    }
                    wait.add(so_far - counted);
                }
                counted = so_far;
                tokio::time::timeout_at(deadline, body.frame())
                    .await
                    .map_err(|_| CallError::request_too_slow(BODY_TIMEOUT))?
            }
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|_| CallError::request_broken_off())?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        let bytes = first.len() + all.len() + data.len();
        if first.is_empty() && all.is_empty() {
            take(bytes)?;
            first = data;
        } else {
            let begin = if all.is_empty() { &first[..] } else { &all[..] };
            limit.check(bytes, declared_bytes(begin))?;
            if bytes > all.capacity() {
                // Twice as much each time, but no more than will come.
                let whole = declared_bytes(begin).map_or(0, |bytes| bytes + PREFIX_BYTES);
                let capacity = (2 * all.capacity()).min(whole).max(bytes);
                take(capacity - all.capacity() - first.len())?;
                all.reserve_exact(capacity - all.len());
            }
            all.extend_from_slice(&std::mem::take(&mut first));
            all.extend_from_slice(&data);
        }
        let so_far = if all.is_empty() { &first[..] } else { &all[..] };
        let declared = declared_bytes(so_far);
        limit.check(so_far.len(), declared)?;
        if declared.is_some_and(|bytes| so_far.len() > bytes + PREFIX_BYTES) {
            return Err(CallError::malformed(
                "a call of this method has one message, and there is something behind it",
            ));
        }
    }
    if let Some(wait) = wait {
        wait.clear();
    }
    Ok(if all.is_empty() { first } else { all.into() })
}

/// The length of the message that a body begins with.
fn declared_bytes(body: &[u8]) -> Option<usize> {
    let mut length = body.get(1..PREFIX_BYTES)?;
    usize::try_from(length.get_u32()).ok()
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use tonic::Code;

    use super::*;
    use crate::grpc::proto::ErrorReason;

    /// A body that comes in these pieces, and then ends or never does.
    fn body(pieces: Vec<Vec<u8>>, ends: bool) -> impl HttpBody<Data = Bytes> + Unpin {
        use futures::StreamExt;
        let frames = pieces
            .into_iter()
            .map(|piece| Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(piece))));
        let pieces = stream::iter(frames);
        StreamBody::new(if ends {
            pieces.boxed()
        } else {
            pieces.chain(stream::pending()).boxed()
        })
    }

    fn message(bytes: usize) -> Vec<u8> {
        let mut message = vec![0];
        message.extend((bytes as u32).to_be_bytes());
        message.extend(vec![7; bytes]);
        message
    }

    fn inbox() -> Inbox {
        Inbox::new(100, 50)
    }

    async fn refused(inbox: &Inbox, pieces: Vec<Vec<u8>>, ends: bool) -> CallError {
        let received = inbox.receive(body(pieces, ends), None).await;
        received.map(|_| ()).unwrap_err()
    }

    #[tokio::test]
    async fn a_body_is_put_together_from_its_pieces() {
        let whole = message(50);
        for size in [1, 3, 5, 54, 55] {
            let inbox = inbox();
            let pieces = whole.chunks(size).map(<[u8]>::to_vec).collect();
            let (received, room) = inbox.receive(body(pieces, true), None).await.unwrap();
            let received = received.collect().await.unwrap().to_bytes();
            assert_eq!(received, whole);
            assert_eq!(inbox.room.available_permits(), 45);
            drop(room);
            assert_eq!(inbox.room.available_permits(), 100);
        }
    }

    #[tokio::test]
    async fn over_the_size_it_is_refused_as_soon_as_that_shows() {
        let inbox = inbox();
        let announced = message(51)[..PREFIX_BYTES].to_vec();
        for pieces in [vec![announced], vec![message(1), vec![0; 50]]] {
            let error = refused(&inbox, pieces, false).await;
            assert_eq!(error.code, Code::ResourceExhausted);
            assert_eq!(inbox.room.available_permits(), 100);
        }
    }

    #[tokio::test]
    async fn what_is_in_flight_leaves_less_room_for_others() {
        let inbox = inbox();
        let (_, held) = inbox
            .receive(body(vec![message(50)], true), None)
            .await
            .unwrap();
        let pieces = message(50).chunks(10).map(<[u8]>::to_vec).collect();
        let error = refused(&inbox, pieces, true).await;
        assert_eq!(error.code, Code::ResourceExhausted);
        // A small one still comes through, and a health call always does.
        let small = inbox
            .receive(body(vec![message(40)], true), None)
            .await
            .unwrap();
        let health = inbox
            .receive_health(body(vec![message(40)], true), None)
            .await;
        assert!(health.is_ok());
        drop((held, small));
        assert!(
            inbox
                .receive(body(vec![message(50)], true), None)
                .await
                .is_ok()
        );
    }

    #[tokio::test]
    async fn what_it_grows_to_when_it_is_decoded_is_bounded_and_takes_room() {
        let empty_groups = |number: usize| {
            let mut message = message(2 * number);
            message.truncate(PREFIX_BYTES);
            message.extend([0x0a, 0].repeat(number));
            vec![message]
        };
        let inbox = Inbox::new(100_000, 10_000);
        let one = decoded_bytes(&[0x0a, 0]);
        let most = 10_000 * MOST_GROWTH / one;
        let error = refused(&inbox, empty_groups(most + 1), true).await;
        assert_eq!(error.code, Code::ResourceExhausted);
        assert_eq!(inbox.room.available_permits(), 100_000);
        let (_, room) = inbox
            .receive(body(empty_groups(20), true), None)
            .await
            .unwrap();
        assert_eq!(inbox.room.available_permits(), 100_000 - 20 * one);
        drop(room);
        // Alone, a request may take all of the room.
        let received = inbox.receive(body(empty_groups(most), true), None).await;
        assert_eq!(inbox.room.available_permits(), 0);
        assert!(received.is_ok());
    }

    #[tokio::test]
    async fn what_stands_behind_the_message_is_refused_as_soon_as_it_comes() {
        let inbox = inbox();
        let error = refused(&inbox, vec![message(9), vec![0]], false).await;
        assert_eq!(error.reason, ErrorReason::MalformedMessage);
        assert_eq!(inbox.room.available_permits(), 100);
    }

    #[tokio::test]
    async fn messages_come_one_after_the_other_in_pieces_of_any_size() {
        let all = [message(3), message(0), message(4_096)].concat();
        for size in [1, 2, 5, 8, 4_000, all.len()] {
            let pieces = all.chunks(size).map(<[u8]>::to_vec).collect();
            let mut messages = Messages::of_reflection(body(pieces, true), None);
            for expected in [3, 0, 4_096] {
                let next = messages.next().await.unwrap().unwrap();
                assert_eq!(next, message(expected), "{size}");
            }
            assert!(messages.next().await.unwrap().is_none());
        }
        let announced = message(4_097)[..PREFIX_BYTES].to_vec();
        let mut messages = Messages::of_reflection(body(vec![announced], false), None);
        let error = messages.next().await.unwrap_err();
        assert_eq!(error.reason, ErrorReason::MessageTooLarge);
        let half = vec![message(3), message(9)[..7].to_vec()];
        let mut messages = Messages::of_reflection(body(half, true), None);
        assert!(messages.next().await.unwrap().is_some());
        let error = messages.next().await.unwrap_err();
        assert_eq!(error.reason, ErrorReason::MalformedMessage);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_silent_is_done() {
        for pieces in [vec![], vec![message(9)[..7].to_vec()]] {
            let begin = Instant::now();
            let mut messages = Messages::of_reflection(body(pieces, false), None);
            let error = messages.next().await.unwrap_err();
            assert_eq!(error.reason, ErrorReason::RequestTooSlow);
            assert_eq!(begin.elapsed(), BODY_TIMEOUT);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_drips_is_given_up() {
        let begin = Instant::now();
        let inbox = inbox();
        let error = refused(&inbox, vec![message(9)[..7].to_vec()], false).await;
        assert_eq!(error.code, Code::DeadlineExceeded);
        assert_eq!(error.reason, ErrorReason::RequestTooSlow);
        assert_eq!(begin.elapsed(), BODY_TIMEOUT);
        assert_eq!(inbox.room.available_permits(), 100);
    }
}
