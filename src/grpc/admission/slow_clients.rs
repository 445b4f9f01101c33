//! What open calls hold: a call from its arrival until its reply has left, and the
//! bytes of a request that has not come whole or of a reply that has not been taken.
//! All of it costs memory for as long as a client likes.
//!
//! So there is a bound on it, and when it is passed the connections that hold the
//! most are closed: at once when there are too many calls, and when there are too many
//! bytes for a while, since a moment is not worth it. Who is quick holds next to
//! nothing: slow clients push out each other, and nobody else.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

use crate::telemetry::{self, ConnectionFailure, rate_limited};

/// All that is held, and for whom.
#[derive(Debug)]
pub struct Waits {
    most: Amount,
    calls: AtomicUsize,
    bytes: AtomicUsize,
    /// Since when there have been too many bytes.
    full_since: Mutex<Option<Instant>>,
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
    /// Its client is asked to open another one.
    leaving: CancellationToken,
    /// The client has been asked and did not listen: no call is served any more.
    is_retired: AtomicBool,
    /// Its open calls.
    open: TaskTracker,
}

/// A connection that is open as long as this is held.
#[derive(Debug)]
pub struct Connected(Arc<Client>);

/// An open call.
#[derive(Debug)]
pub struct Wait {
    client: Arc<Client>,
    bytes: usize,
    _open: TaskTrackerToken,
}

/// How much is held.
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

    /// For so long large replies are refused and requests go on before connections
    /// are closed because of their bytes.
    const PATIENCE: Duration = Duration::from_secs(2);

    pub fn new(most: Amount) -> Arc<Self> {
        Arc::new(Self {
            most,
            calls: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            full_since: Mutex::default(),
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
            leaving: CancellationToken::new(),
            is_retired: AtomicBool::new(false),
            open: TaskTracker::new(),
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
        let too_many = self.calls.load(Relaxed) > self.most.calls;
        if too_many || (!self.fits(0) && self.is_full_for_long()) {
            self.make_room(0);
        }
    }

    /// Whether there is room for so many bytes more, those of closing connections
    /// included, which are still there.
    fn fits(&self, bytes: usize) -> bool {
        self.bytes.load(Relaxed).saturating_add(bytes) <= self.most.bytes
    }

    /// There is no room now; whether that has been so for [`Self::PATIENCE`].
    fn is_full_for_long(&self) -> bool {
        let mut since = self.full_since();
        let now = Instant::now();
        let for_long = since.is_some_and(|since| now - since >= Self::PATIENCE);
        if for_long {
            *since = None;
        } else {
            since.get_or_insert(now);
        }
        for_long
    }

    fn full_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.full_since
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the connections that hold the most, so that there is room for so many
    /// bytes more. Those that are closing already hold what will be gone.
    fn make_room(&self, bytes: usize) {
        let clients = self.clients();
        let open = clients.connected.values();
        let mut open: Vec<_> = open
            .filter(|client| !client.closing.is_cancelled())
            .map(|client| (client.amount(), client))
            .collect();
        let more = Amount { calls: 0, bytes };
        let mut left = open.iter().fold(more, |sum, (amount, _)| Amount {
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
            rate_limited!(
                warn,
                peer = %client.peer,
                calls = amount.calls,
                bytes = amount.bytes,
                "open calls hold too much: the connection that holds the most was closed"
            );
        }
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Client ===

impl Client {
    /// A reply that may always be made: as many as there may be calls take little.
    const SMALL: usize = 16 << 10;

    /// A request of which so much may always wait for the rest.
    const SMALL_REQUEST: usize = 2 << 10;

    /// A reply takes about twice its size: its parts, and what they are made from or
    /// into.
    const REPLY_COSTS: usize = 2;

    /// Tells this connection from all others.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// A call has arrived.
    pub fn open_call(self: &Arc<Self>) -> Wait {
        self.calls.fetch_add(1, Relaxed);
        self.waits.calls.fetch_add(1, Relaxed);
        self.waits.added();
        Wait {
            client: self.clone(),
            bytes: 0,
            _open: self.open.token(),
        }
    }

    /// Whether the connection is being closed: nobody will see a reply.
    pub fn is_closing(&self) -> bool {
        self.closing.is_cancelled()
    }

    /// Waits until the client is asked to open another connection: streams that have no
    /// end of their own end then.
    pub fn leaving(&self) -> WaitForCancellationFutureOwned {
        self.leaving.clone().cancelled_owned()
    }

    /// Whether calls that come now are too late.
    pub fn is_retired(&self) -> bool {
        self.is_retired.load(Relaxed)
    }

    /// Whether a reply of this size may be made.
    pub fn takes(&self, bytes: usize) -> bool {
        bytes <= Self::SMALL || self.takes_bytes(bytes * Self::REPLY_COSTS)
    }

    /// Whether there is room for so many bytes more. If there has been none for long, it
    /// is made.
    fn takes_bytes(&self, bytes: usize) -> bool {
        let fits = self.waits.fits(bytes);
        if fits {
            *self.waits.full_since() = None;
        } else if self.waits.is_full_for_long() {
            self.waits.make_room(bytes);
        }
        fits
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

    /// The client is asked to open another connection.
    pub fn leave(&self) {
        self.0.leaving.cancel();
    }

    /// Serves no more calls; waits until those that there are have ended.
    pub async fn retire(&self) {
        self.0.is_retired.store(true, Relaxed);
        self.0.open.close();
        self.0.open.wait().await;
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.waits.clients().connected.remove(&self.0.id);
    }
}

// === impl Wait ===

impl Wait {
    /// Its reply of so many bytes waits for the client.
    pub fn reply(&mut self, bytes: usize) {
        self.add(bytes * Client::REPLY_COSTS);
    }

    /// Whether its request, of which there will be so many bytes, may wait for the rest.
    pub fn takes(&self, bytes: usize) -> bool {
        bytes <= Client::SMALL_REQUEST || self.client.takes_bytes(bytes.saturating_sub(self.bytes))
    }

    /// So many bytes more of its request wait for the rest.
    pub fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.client.bytes.fetch_add(bytes, Relaxed);
        self.client.waits.bytes.fetch_add(bytes, Relaxed);
        self.client.waits.added();
    }

    /// No bytes of it wait for the client any more.
    pub fn clear(&mut self) {
        for of in [&self.client.bytes, &self.client.waits.bytes] {
            of.fetch_sub(self.bytes, Relaxed);
        }
        self.bytes = 0;
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.clear();
        for of in [&self.client.calls, &self.client.waits.calls] {
            of.fetch_sub(1, Relaxed);
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

    fn hold(client: &Connected, bytes: usize) -> Wait {
        let mut wait = client.0.open_call();
        wait.add(bytes);
        wait
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
        let mut held: Vec<Wait> = [0, 0, 0, 1, 1, 2].map(|at| hold(&clients[at], 0)).into();
        held.extend((0..10).map(|_| hold(&clients[1], 0)));
        assert_eq!(closed(&clients), [false; 3]);
        held.push(hold(&clients[2], 0));
        assert_eq!(closed(&clients), [false, true, false]);
        // What is closing counts no more.
        held.extend((0..11).map(|_| hold(&clients[0], 0)));
        assert_eq!(closed(&clients), [false, true, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_holds_the_most_bytes_for_a_while_is_closed() {
        let waits = waits();
        let clients = connect(&waits, 3);
        let _some = hold(&clients[0], 300);
        let mut large = hold(&clients[1], 400);
        let _many: Vec<_> = (0..5).map(|_| hold(&clients[2], 10)).collect();
        large.add(251);
        assert_eq!(closed(&clients), [false; 3], "it may be over in a moment");
        tokio::time::advance(Waits::PATIENCE).await;
        large.add(1);
        assert_eq!(closed(&clients), [false, true, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_reply_has_to_fit_beside_what_is_closing_too() {
        let waits = Waits::new(Amount {
            calls: 16,
            bytes: 100_000,
        });
        let clients = connect(&waits, 2);
        let mut held = clients[0].0.open_call();
        held.reply(45_000);
        assert!(clients[1].0.takes(10_000), "it is small");
        assert!(!clients[1].0.takes(20_000));
        assert_eq!(closed(&clients), [false, false]);
        tokio::time::advance(Waits::PATIENCE).await;
        assert!(!clients[1].0.takes(20_000), "the other is still there");
        assert_eq!(closed(&clients), [true, false]);
        assert!(!clients[1].0.takes(20_000));
        drop(held);
        assert!(clients[1].0.takes(20_000));
        assert_eq!(closed(&clients), [true, false]);
    }

    #[test]
    fn among_many_small_ones_some_are_closed_at_once() {
        let waits = waits();
        let clients = connect(&waits, 17);
        let _held: Vec<_> = clients.iter().map(|client| hold(client, 0)).collect();
        let count = closed(&clients)
            .into_iter()
            .filter(|closed| *closed)
            .count();
        assert_eq!(count, 3);
    }

    /// Slow requests leave room to others, of which none may be small enough to wait.
    #[tokio::test(start_paused = true)]
    async fn a_request_that_does_not_fit_does_not_wait_for_its_rest() {
        let waits = Waits::new(Amount {
            calls: 16,
            bytes: 100_000,
        });
        let clients = connect(&waits, 2);
        let mut large = hold(&clients[0], 90_000);
        let mut other = hold(&clients[1], 5_000);
        assert!(
            large.takes(95_000) && !large.takes(95_001),
            "its own counts once"
        );
        assert!(other.takes(10_000) && !other.takes(10_001));
        assert!(other.takes(Client::SMALL_REQUEST));
        large.clear();
        assert!(other.takes(95_000));
        other.clear();
    }

    #[tokio::test(start_paused = true)]
    async fn a_retired_connection_waits_for_its_calls_and_takes_no_more() {
        let waits = waits();
        let clients = connect(&waits, 2);
        let (call, _of_another) = (hold(&clients[0], 0), hold(&clients[1], 0));
        assert!(!clients[0].0.is_retired());
        let retire = clients[0].retire();
        let mut retire = std::pin::pin!(retire);
        let soon = tokio::time::timeout(Duration::from_secs(1), retire.as_mut());
        assert!(soon.await.is_err(), "there is a call");
        assert!(clients[0].0.is_retired() && !clients[1].0.is_retired());
        drop(call);
        retire.await;
    }

    #[test]
    fn what_is_over_is_given_back() {
        let waits = waits();
        let clients = connect(&waits, 1);
        for _ in 0..100 {
            let mut wait = hold(&clients[0], 500);
            wait.clear();
            wait.add(400);
            wait.add(500);
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
