//! What waits for clients: requests that have not come whole, and replies that have
//! not been taken. Both cost memory for as long as a client likes.
//!
//! So there is a bound on all of it, and when it is passed the connections that
//! hold the most are closed. Who is quick holds next to nothing: slow clients push
//! out each other, and nobody else.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use tokio_util::sync::CancellationToken;

use crate::telemetry::{self, ConnectionFailure, seldom};

/// All that waits, and for whom.
#[derive(Debug)]
pub struct Waits {
    most: Amount,
    calls: AtomicUsize,
    bytes: AtomicUsize,
    clients: Mutex<Clients>,
}

/// One connection of a client, among the extensions of its requests.
#[derive(Debug)]
pub struct Client {
    pub peer: SocketAddr,
    id: u64,
    waits: Arc<Waits>,
    calls: AtomicUsize,
    bytes: AtomicUsize,
    /// It has to be closed.
    closing: CancellationToken,
}

/// A connection that is open as long as this is held.
#[derive(Debug)]
pub struct Connected(Arc<Client>);

/// A call that waits for its client as long as this is held.
#[derive(Debug)]
pub struct Wait {
    client: Arc<Client>,
    bytes: usize,
}

/// How much waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    pub calls: usize,
    pub bytes: usize,
}

#[derive(Debug, Default)]
struct Clients {
    next_id: u64,
    connected: HashMap<u64, Arc<Client>>,
}

// === impl Waits ===

impl Waits {
    /// When there is too much, connections are closed until this share of what may
    /// be is left: not one for each call that comes.
    const LEFT: f64 = 0.875;

    pub fn new(most: Amount) -> Arc<Self> {
        Arc::new(Self {
            most,
            calls: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            clients: Mutex::default(),
        })
    }

    /// A client has connected.
    pub fn connect(self: &Arc<Self>, peer: SocketAddr) -> Connected {
        let mut clients = self.clients();
        let id = clients.next_id;
        clients.next_id += 1;
        let client = Arc::new(Client {
            peer,
            id,
            waits: self.clone(),
            calls: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            closing: CancellationToken::new(),
        });
        clients.connected.insert(id, client.clone());
        Connected(client)
    }

    /// Of all there may be, the share that this is.
    fn share(&self, amount: Amount) -> f64 {
        let of = |part: usize, most: usize| part as f64 / most as f64;
        of(amount.calls, self.most.calls).max(of(amount.bytes, self.most.bytes))
    }

    fn added(&self) {
        let now = Amount {
            calls: self.calls.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
        };
        if self.share(now) > 1.0 {
            self.make_room();
        }
    }

    /// Closes the connections that hold the most. Those that are closing already
    /// hold what will be gone.
    fn make_room(&self) {
        let clients = self.clients();
        let open = clients.connected.values();
        let mut open: Vec<_> = open
            .filter(|client| !client.closing.is_cancelled())
            .map(|client| (client.amount(), client))
            .collect();
        let mut left = open
            .iter()
            .fold(Amount::default(), |sum, (amount, _)| Amount {
                calls: sum.calls + amount.calls,
                bytes: sum.bytes + amount.bytes,
            });
        if self.share(left) <= 1.0 {
            return;
        }
        open.sort_by(|(a, _), (b, _)| self.share(*b).total_cmp(&self.share(*a)));
        for (amount, client) in open {
            if self.share(left) <= Self::LEFT {
                break;
            }
            left.calls -= amount.calls;
            left.bytes -= amount.bytes;
            client.closing.cancel();
            telemetry::connection_failed(ConnectionFailure::Slow);
            seldom!(
                warn,
                peer = %client.peer,
                calls = amount.calls,
                bytes = amount.bytes,
                "too much waits for clients: the connection that holds the most of it was closed"
            );
        }
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Client ===

impl Client {
    /// A call waits for its client from now on, with so many bytes of it in memory.
    pub fn wait(self: &Arc<Self>, bytes: usize) -> Wait {
        self.calls.fetch_add(1, Relaxed);
        self.waits.calls.fetch_add(1, Relaxed);
        let mut wait = Wait {
            client: self.clone(),
            bytes: 0,
        };
        wait.add(bytes);
        wait
    }

    fn amount(&self) -> Amount {
        Amount {
            calls: self.calls.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
        }
    }
}

// === impl Connected ===

impl Connected {
    pub fn client(&self) -> &Arc<Client> {
        &self.0
    }

    /// Waits until the connection has to be closed.
    pub async fn closing(&self) {
        self.0.closing.cancelled().await;
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.waits.clients().connected.remove(&self.0.id);
    }
}

// === impl Wait ===

impl Wait {
    /// There are so many bytes more in memory.
    pub fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.client.bytes.fetch_add(bytes, Relaxed);
        self.client.waits.bytes.fetch_add(bytes, Relaxed);
        self.client.waits.added();
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        for of in [&self.client.calls, &self.client.waits.calls] {
            of.fetch_sub(1, Relaxed);
        }
        for of in [&self.client.bytes, &self.client.waits.bytes] {
            of.fetch_sub(self.bytes, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waits() -> Arc<Waits> {
        Waits::new(Amount {
            calls: 16,
            bytes: 1_000,
        })
    }

    fn connect(waits: &Arc<Waits>, count: u16) -> Vec<Connected> {
        let peers = (1..=count).map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        peers.map(|peer| waits.connect(peer)).collect()
    }

    fn closed(clients: &[Connected]) -> Vec<bool> {
        let closed = |client: &Connected| client.0.closing.is_cancelled();
        clients.iter().map(closed).collect()
    }

    #[test]
    fn who_holds_the_most_calls_is_closed() {
        let waits = waits();
        let clients = connect(&waits, 3);
        let mut held: Vec<Wait> = [0, 0, 0, 1, 1, 2].map(|at| clients[at].0.wait(0)).into();
        held.extend((0..10).map(|_| clients[1].0.wait(0)));
        assert_eq!(closed(&clients), [false; 3]);
        held.push(clients[2].0.wait(0));
        assert_eq!(closed(&clients), [false, true, false]);
        // What is closing counts no more.
        held.extend((0..11).map(|_| clients[0].0.wait(0)));
        assert_eq!(closed(&clients), [false, true, false]);
    }

    #[test]
    fn who_holds_the_most_bytes_is_closed() {
        let waits = waits();
        let clients = connect(&waits, 3);
        let _some = clients[0].0.wait(300);
        let mut large = clients[1].0.wait(400);
        let _many: Vec<_> = (0..5).map(|_| clients[2].0.wait(10)).collect();
        assert_eq!(closed(&clients), [false; 3]);
        large.add(251);
        assert_eq!(closed(&clients), [false, true, false]);
    }

    #[test]
    fn among_many_small_ones_some_are_closed_at_once() {
        let waits = waits();
        let clients = connect(&waits, 17);
        let _held: Vec<_> = clients.iter().map(|client| client.0.wait(0)).collect();
        let count = closed(&clients)
            .into_iter()
            .filter(|closed| *closed)
            .count();
        assert_eq!(count, 3);
    }

    #[test]
    fn what_is_over_is_given_back() {
        let waits = waits();
        let clients = connect(&waits, 1);
        for _ in 0..100 {
            let mut wait = clients[0].0.wait(500);
            wait.add(400);
        }
        assert_eq!(closed(&clients), [false]);
        assert_eq!(clients[0].0.amount(), Amount::default());
        assert_eq!(
            (waits.calls.load(Relaxed), waits.bytes.load(Relaxed)),
            (0, 0)
        );
        drop(clients);
        assert!(waits.clients().connected.is_empty());
    }
}
