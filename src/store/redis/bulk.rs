//! A bound on the bytes of large documents that are on their way to and from Redis.
//!
//! Without it, a client that loads one large group a thousand times has Redis send a
//! gigabyte, behind which everybody else waits. Those who wait are served in turn,
//! caller by caller, however much each of them asks for.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use tokio::sync::oneshot;

use super::link::lock;
use crate::store::caller::Caller;

/// The bytes that may be on their way at once. Cheap to clone.
#[derive(Clone, Debug)]
pub struct BulkBudget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    most: usize,
    line: Mutex<Line>,
}

/// Bytes of the budget. They are given back when this is dropped.
#[derive(Debug)]
pub struct BulkShare {
    budget: Arc<Shared>,
    bytes: usize,
}

/// What is left, and who waits for it.
#[derive(Debug)]
struct Line {
    free: usize,
    /// The caller at the front is served next, and goes to the back.
    callers: VecDeque<(Caller, VecDeque<Waiter>)>,
}

#[derive(Debug)]
struct Waiter {
    bytes: usize,
    served: oneshot::Sender<BulkShare>,
}

// === impl BulkBudget ===

impl BulkBudget {
    pub fn new(most: usize) -> Self {
        Self(Arc::new(Shared {
            most,
            line: Mutex::new(Line {
                free: most,
                callers: VecDeque::new(),
            }),
        }))
    }

    /// The most that may be on their way at once.
    pub fn most(&self) -> usize {
        self.0.most
    }

    /// Waits until it is the turn of the current caller, and so many bytes are free;
    /// more than there are count as all.
    pub async fn take(&self, bytes: usize) -> BulkShare {
        let bytes = bytes.min(self.0.most);
        let (served, share) = oneshot::channel();
        let waiter = Waiter { bytes, served };
        lock(&self.0.line).join(Caller::current(), waiter);
        self.0.serve();
        match share.await {
            Ok(share) => share,
            // The line outlives this call, and drops nobody in it who waits.
            Err(_) => std::future::pending().await,
        }
    }
}

// === impl Shared ===

impl Shared {
    /// Serves those whose turn it is, as long as there are enough bytes.
    fn serve(self: &Arc<Self>) {
        loop {
            let Some(waiter) = lock(&self.line).next() else {
                return;
            };
            // One who does not wait any more drops the share, which gives it back.
            let _ = waiter.served.send(BulkShare {
                budget: self.clone(),
                bytes: waiter.bytes,
            });
        }
    }
}

// === impl BulkShare ===

impl Drop for BulkShare {
    fn drop(&mut self) {
        lock(&self.budget.line).free += self.bytes;
        self.budget.serve();
    }
}

// === impl Line ===

impl Line {
    fn join(&mut self, caller: Caller, waiter: Waiter) {
        let mut callers = self.callers.iter_mut();
        match callers.find(|(waiting, _)| *waiting == caller) {
            Some((_, waiters)) => waiters.push_back(waiter),
            None => self.callers.push_back((caller, [waiter].into())),
        }
    }

    /// Takes out the one who is served next, with its bytes; None if nobody waits,
    /// or the one whose turn it is needs more than there is.
    fn next(&mut self) -> Option<Waiter> {
        loop {
            let (_, waiters) = self.callers.front_mut()?;
            // Nobody is kept waiting by one who has gone.
            while waiters
                .front()
                .is_some_and(|front| front.served.is_closed())
            {
                waiters.pop_front();
            }
            let Some(front) = waiters.front() else {
                self.callers.pop_front();
                continue;
            };
            if front.bytes > self.free {
                return None;
            }
            let served = waiters.pop_front();
            if let Some((caller, waiters)) = self.callers.pop_front()
                && !waiters.is_empty()
            {
                self.callers.push_back((caller, waiters));
            }
            self.free -= served.as_ref().map_or(0, |waiter| waiter.bytes);
            return served;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn what_is_given_back_goes_to_the_next() {
        let budget = BulkBudget::new(10);
        let take = |bytes| Box::pin(budget.take(bytes));
        let first = take(6).now_or_never().unwrap();
        let mut second = take(6);
        assert!((&mut second).now_or_never().is_none());
        drop(first);
        let second = second.now_or_never().unwrap();
        // More than there is counts as all.
        let mut all = take(1_000);
        assert!((&mut all).now_or_never().is_none());
        drop(second);
        assert!(all.now_or_never().is_some());
        assert!(take(10).now_or_never().is_some());
    }

    #[test]
    fn one_who_asks_for_much_does_not_keep_the_others_waiting() {
        let budget = BulkBudget::new(1);
        let of = |id| Box::pin(Caller::connection(id).makes(budget.take(1)));
        let running = of(1).now_or_never().unwrap();
        let mut greedy: Vec<_> = (0..100).map(|_| of(1)).collect();
        for waiting in &mut greedy {
            assert!(waiting.now_or_never().is_none());
        }
        let mut modest = of(2);
        assert!((&mut modest).now_or_never().is_none());
        drop(running);
        // One of the others is served before it, and no more.
        let served = greedy
            .iter_mut()
            .filter_map(|waiting| waiting.now_or_never());
        assert_eq!(served.count(), 1);
        assert!(modest.now_or_never().is_some());
    }

    #[test]
    fn one_who_goes_leaves_nothing_behind() {
        let budget = BulkBudget::new(10);
        let running = budget.take(10).now_or_never().unwrap();
        let mut gone = Box::pin(budget.take(5));
        assert!((&mut gone).now_or_never().is_none());
        let mut waiting = Box::pin(budget.take(10));
        assert!((&mut waiting).now_or_never().is_none());
        drop(gone);
        drop(running);
        assert!(waiting.now_or_never().is_some());
        // Nor one who was served and did not look.
        let running = budget.take(10).now_or_never().unwrap();
        let mut gone = Box::pin(budget.take(10));
        assert!((&mut gone).now_or_never().is_none());
        drop(running);
        drop(gone);
        assert!(budget.take(10).now_or_never().is_some());
    }
}
