//! Requests that reach Redis when nobody waits for them any more. What was sent
//! may lie in the buffers of hosts on the way for as long as these like, and
//! outlive the connection on which it was sent.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{mpsc, watch},
};

use super::resp::{count_late, lift_deadlines};

/// The late requests of all connections of a proxy.
pub struct LateRequests {
    upstream: SocketAddr,
    deadlines_lifted: AtomicBool,
    tally: watch::Sender<LateTally>,
}

/// What became of requests so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LateTally {
    /// Connections whose last requests have not arrived yet.
    pub under_way: usize,
    /// Writes that Redis refused because they were late.
    pub refused: usize,
    /// Writes that were made to be never too late.
    pub lifted: usize,
}

// === impl LateRequests ===

impl LateRequests {
    pub fn new(upstream: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            upstream,
            deadlines_lifted: AtomicBool::new(false),
            tally: watch::Sender::default(),
        })
    }

    /// From now on no write is refused because it is late: a deliberate mistake,
    /// to see who notices.
    pub fn lift_deadlines(&self) {
        self.deadlines_lifted.store(true, Ordering::SeqCst);
    }

    /// Every whole request comes by here, be it late or not.
    pub fn pass_by(&self, requests: &mut [u8]) {
        if self.deadlines_lifted.load(Ordering::SeqCst) {
            let lifted = lift_deadlines(requests);
            self.tally.send_modify(|tally| tally.lifted += lifted);
        }
    }

    /// Whole requests of one connection that are sent here reach Redis over a
    /// connection of their own, this long after the sender was dropped.
    pub fn detour(self: &Arc<Self>, delay: Duration) -> mpsc::UnboundedSender<Vec<u8>> {
        let (sender, mut receiver) = mpsc::unbounded_channel::<Vec<u8>>();
        self.tally.send_modify(|tally| tally.under_way += 1);
        let late = self.clone();
        tokio::spawn(async move {
            let mut requests = Vec::new();
            while let Some(more) = receiver.recv().await {
                requests.extend(more);
            }
            tokio::time::sleep(delay).await;
            // A Redis that is gone takes nothing.
            let replies = late.deliver(&requests).await.unwrap_or_default();
            late.tally.send_modify(|tally| {
                tally.under_way -= 1;
                tally.refused += count_late(&replies);
            });
        });
        sender
    }

    /// Waits until no request is on a detour.
    pub async fn have_arrived(&self) {
        let mut tally = self.tally.subscribe();
        // The sender lives as long as `self`.
        let _ = tally.wait_for(|tally| tally.under_way == 0).await;
    }

    pub fn tally(&self) -> LateTally {
        *self.tally.borrow()
    }

    /// Sends requests; returns what Redis replies to them.
    async fn deliver(&self, requests: &[u8]) -> io::Result<Vec<u8>> {
        let mut connection = TcpStream::connect(self.upstream).await?;
        connection.write_all(requests).await?;
        // Redis closes the connection when it has replied to all of them.
        connection.shutdown().await?;
        let mut replies = Vec::new();
        connection.read_to_end(&mut replies).await?;
        Ok(replies)
    }
}
