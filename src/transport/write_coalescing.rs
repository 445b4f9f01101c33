//! What a connection writes in one turn of its task leaves together.
//!
//! By itself h2 sends every refusal alone, and a large reply in frames of 16 KiB with two
//! system calls each. tokio lets a task make 128 of them, then it is the turn of others:
//! under too high a load a connection would not come to read what is to be refused.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection that keeps what is written to it until [`Self::turns`] lets it out.
///
/// Without vectored writes: h2 makes one system call of each frame with them.
#[derive(Debug)]
pub struct Corked<IO>(Arc<Mutex<Outgoing<IO>>>);

#[derive(Debug)]
struct Outgoing<IO> {
    io: IO,
    bytes: BytesMut,
}

/// More than this does not wait for the end of a turn.
const MAX_BYTES: usize = 64 << 10;

// === impl Corked ===

impl<IO> Corked<IO> {
    pub fn new(io: IO) -> Self {
        let bytes = BytesMut::new();
        Self(Arc::new(Mutex::new(Outgoing { io, bytes })))
    }

    fn outgoing(&self) -> MutexGuard<'_, Outgoing<IO>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<IO: AsyncWrite + Unpin> Corked<IO> {
    /// Does what `writer` does, which writes to a clone of this, and sends after each of
    /// its turns what it has written. Ends with it, or when nothing can be sent any more.
    pub async fn turns<T>(self, writer: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let mut writer = pin!(writer);
        poll_fn(|cx| {
            let written = writer.as_mut().poll(cx);
            match self.outgoing().poll_send(cx) {
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                _ => written,
            }
        })
        .await
    }
}

impl<IO> Clone for Corked<IO> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Corked<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.outgoing().io).poll_read(cx, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Corked<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut outgoing = self.outgoing();
        if outgoing.bytes.len() + bytes.len() > MAX_BYTES {
            ready!(outgoing.poll_send(cx))?;
        }
        outgoing.bytes.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    /// There will be more in this turn.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outgoing = self.outgoing();
        ready!(outgoing.poll_send(cx))?;
        Pin::new(&mut outgoing.io).poll_shutdown(cx)
    }
}

// === impl Outgoing ===

impl<IO: AsyncWrite + Unpin> Outgoing<IO> {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.bytes.has_remaining() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.bytes))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.bytes.advance(sent),
            }
        }
        // Most connections are idle; they keep no room for what they might write.
        self.bytes = BytesMut::new();
        // TLS may hold back what the socket did not take.
        Pin::new(&mut self.io).poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures::FutureExt;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::yield_now,
    };

    use super::*;

    /// The bytes that can be read now.
    fn arrived(client: &mut DuplexStream) -> usize {
        let mut bytes = vec![0; MAX_BYTES * 2];
        let read = client.read(&mut bytes).now_or_never();
        read.map_or(0, |bytes| bytes.expect("it is open"))
    }

    #[test]
    fn the_writes_of_a_turn_leave_at_its_end() {
        let (server, mut client) = duplex(MAX_BYTES * 2);
        let corked = Corked::new(server);
        let mut writer = corked.clone();
        let mut turns = pin!(corked.turns(async move {
            for _ in 0..3 {
                writer.write_all(b"ten bytes ").await?;
                writer.flush().await?;
                assert_eq!(arrived(&mut client), 0);
            }
            yield_now().await;
            assert_eq!(arrived(&mut client), 30);
            writer.write_all(b"five ").await?;
            Ok(client)
        }));
        assert!(turns.as_mut().now_or_never().is_none());
        let mut client = turns.as_mut().now_or_never().unwrap().unwrap();
        assert_eq!(arrived(&mut client), 5);
    }

    #[tokio::test]
    async fn many_bytes_do_not_wait() {
        let (server, mut client) = duplex(MAX_BYTES * 2);
        let mut corked = Corked::new(server);
        corked.write_all(&[1; MAX_BYTES]).await.unwrap();
        assert_eq!(arrived(&mut client), 0);
        corked.write_all(&[2]).await.unwrap();
        assert_eq!(arrived(&mut client), MAX_BYTES);
        corked.shutdown().await.unwrap();
        assert_eq!(arrived(&mut client), 1);
    }

    #[tokio::test]
    async fn a_slow_client_gets_everything_in_order() {
        let (server, mut client) = duplex(7);
        let corked = Corked::new(server);
        let mut writer = corked.clone();
        let turns = tokio::spawn(corked.turns(async move {
            for byte in 0..=u8::MAX {
                writer.write_all(&[byte; 1_000]).await?;
            }
            writer.shutdown().await
        }));
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        turns.await.unwrap().unwrap();
        let sent: Vec<u8> = (0..=u8::MAX).flat_map(|byte| [byte; 1_000]).collect();
        assert!(received == sent);
    }

    #[tokio::test]
    async fn a_client_that_is_gone_ends_the_turns() {
        let (server, client) = duplex(7);
        drop(client);
        let corked = Corked::new(server);
        let mut writer = corked.clone();
        let ended = corked.turns(async move {
            writer.write_all(b"for nobody").await?;
            pending::<io::Result<()>>().await
        });
        let error = ended.await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
