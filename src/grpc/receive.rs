//! Takes in the whole body of a request before anybody works on it: how large it may
//! be, how long it may take to come, and how much memory all of them may take
//! together.
//!
//! The decoder of tonic makes room for a message as soon as it has read its
//! length: five bytes would cost as much as the largest request. Here a request takes the
//! room of what has come; and what it grows to when it is decoded is told before.

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

use super::{status::CallError, weight::decoded_bytes};
use crate::{
    telemetry::{self, Limit},
    waits::Wait,
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

/// What gRPC puts before a message: a flag, and the length in four bytes.
const PREFIX_BYTES: usize = 5;

/// Decoded, a request takes at most so many times `--max-request-bytes`. Alerts without a
/// label, in messages of that size, come to less.
const MOST_GROWTH: usize = 16;

/// More than a request to `grpc.health.v1` has to say.
const MAX_HEALTH_REQUEST_BYTES: usize = 1_024;

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
        let mut room = Room::default();
        let whole = collect(body, wait, self.max_request_bytes, |bytes| {
            self.make_room(&mut room, bytes)
        })
        .await?;
        let decoded = decoded_bytes(whole.get(PREFIX_BYTES..).unwrap_or_default());
        if decoded > self.max_request_bytes.saturating_mul(MOST_GROWTH) {
            return Err(CallError::message_too_large(&format!(
                "decoded, it would take {decoded} bytes, over {MOST_GROWTH} times that"
            )));
        }
        // By itself, any request is let in.
        let takes = decoded.min(self.max_inflight_bytes);
        self.make_room(&mut room, takes.saturating_sub(whole.len()))?;
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
        let whole = collect(body, wait, MAX_HEALTH_REQUEST_BYTES, |_| Ok(())).await?;
        Ok(Body::new(Full::new(whole)))
    }

    fn make_room(&self, room: &mut Room, bytes: usize) -> Result<(), CallError> {
        // A frame of HTTP/2 has less than 2^24 bytes.
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(more) = self.room.clone().try_acquire_many_owned(permits) else {
            telemetry::call_shed(Limit::MaxInflightBytes);
            return Err(CallError::overloaded(
                Limit::MaxInflightBytes,
                self.max_inflight_bytes,
            ));
        };
        match &mut room.0 {
            None => room.0 = Some(more),
            Some(held) => held.merge(more),
        }
        Ok(())
    }
}

/// Puts a body together from its frames; `take` is asked before each is kept.
async fn collect<B>(
    mut body: B,
    mut wait: Option<&mut Wait>,
    max_message_bytes: usize,
    mut take: impl FnMut(usize) -> Result<(), CallError>,
) -> Result<Bytes, CallError>
where
    B: HttpBody<Data = Bytes> + Unpin,
{
    let deadline = Instant::now() + BODY_TIMEOUT;
    // Nearly every request comes in one frame, which is not copied.
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    // What waits for the rest.
    let mut counted = 0;
    while !body.is_end_stream() {
        let frame = match body.frame().now_or_never() {
            Some(frame) => frame,
            None => {
                let so_far = first.len() + all.len();
                if let Some(wait) = &mut wait {
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
        take(data.len())?;
        if first.is_empty() && all.is_empty() {
            first = data;
        } else {
            // A frame may be of one byte and keep a buffer alive.
            all.extend_from_slice(&std::mem::take(&mut first));
            all.extend_from_slice(&data);
        }
        let so_far = if all.is_empty() { &first[..] } else { &all[..] };
        let declared = declared_bytes(so_far).unwrap_or(0);
        let bytes = declared.max(so_far.len().saturating_sub(PREFIX_BYTES));
        if bytes > max_message_bytes {
            return Err(CallError::message_too_large(&format!(
                "it has {bytes} bytes"
            )));
        }
    }
    if let Some(wait) = wait {
        wait.clear();
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
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

    #[tokio::test(start_paused = true)]
    async fn a_body_that_drips_is_given_up() {
        let begin = Instant::now();
        let inbox = inbox();
        let error = refused(&inbox, vec![message(9)[..7].to_vec()], false).await;
        assert_eq!(error.code, Code::DeadlineExceeded);
        assert_eq!(begin.elapsed(), BODY_TIMEOUT);
        assert_eq!(inbox.room.available_permits(), 100);
    }
}
