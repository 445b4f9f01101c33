//! The tasks in which calls run: which call gets one, and what goes before it.
//!
//! A call that is answered already gets none. A new task stands behind all others, so
//! that under too high a load to be refused would take as long as to be served.
//!
//! Calls that are ready at the same time send together. Each wakes two tasks that write:
//! that of fred with a command for Redis, that of its connection with a reply. tokio runs
//! what was woken last before all others, so that every command and every reply would
//! leave by itself, with a system call here and one at the other end. So the writer is
//! made to wait for the calls that are ready: see [`Tasks::let_others_go_first`].

use std::{
    future::poll_fn,
    ops::RangeInclusive,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Waker},
};

use futures::future::Either;
use hyper::rt::Executor;
use tokio::sync::Notify;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::grpc::envelope::Answer;

/// Tasks for the calls of a connection, as hyper asks for them.
#[derive(Clone, Debug)]
pub struct Tasks {
    /// Whether the call is answered for which hyper asks next.
    answered: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    running: TaskTracker,
    stand_in: Arc<Notify>,
    /// Does nothing, whenever it is woken.
    _stand_in: AbortOnDropHandle<()>,
}

// === impl Tasks ===

impl Tasks {
    /// With fewer calls, to wait for others is to wait for nothing. With more, it takes too
    /// long: what writes replies is also what reads and refuses requests.
    const WORTH_WAITING: RangeInclusive<usize> = 5..=128;

    /// For all connections. Needs a runtime.
    pub fn start() -> Self {
        let stand_in: Arc<Notify> = Arc::default();
        let woken = stand_in.clone();
        let task = tokio::spawn(async move {
            loop {
                woken.notified().await;
            }
        });
        Self {
            answered: Arc::default(),
            shared: Arc::new(Shared {
                running: TaskTracker::new(),
                stand_in,
                _stand_in: AbortOnDropHandle::new(task),
            }),
        }
    }

    /// For the calls of one connection.
    pub fn of_connection(&self) -> Self {
        Self {
            answered: Arc::default(),
            shared: self.shared.clone(),
        }
    }

    /// The service has been called; hyper asks for the task next.
    pub fn next_is<R, E>(&self, answer: &Answer<R, E>) {
        let answered = matches!(answer, Either::Left(_));
        self.answered.store(answered, Ordering::Relaxed);
    }

    async fn run(self, call: impl Future<Output = ()>) {
        let _running = self.shared.running.token();
        let mut call = pin!(call);
        poll_fn(|context| {
            let polled = call.as_mut().poll(context);
            self.let_others_go_first();
            polled
        })
        .await;
    }

    /// What has been woken just now goes behind the calls that are ready: tokio keeps one
    /// place at the head of its queue, for the task that was woken last, and another one
    /// takes it.
    ///
    /// (To switch that place off, as `disable_lifo_slot` of tokio does where unstable
    /// features are on, is as good for many calls and costs a single one twice the
    /// processor time: what it wakes is taken over by another thread each time.)
    fn let_others_go_first(&self) {
        if Self::WORTH_WAITING.contains(&self.shared.running.len()) {
            self.shared.stand_in.notify_one();
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, call: F) {
        if !self.answered.swap(false, Ordering::Relaxed) {
            tokio::spawn(self.clone().run(call));
            return;
        }
        let mut call = Box::pin(call);
        let mut unheard = Context::from_waker(Waker::noop());
        if call.as_mut().poll(&mut unheard).is_pending() {
            tokio::spawn(call);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn only_a_call_that_is_answered_already_does_without_a_task() {
        let tasks = Tasks::start();
        let done = Arc::new(AtomicBool::new(false));
        let call = || {
            let done = done.clone();
            async move { done.store(true, Ordering::Relaxed) }
        };
        tasks.next_is(&Answer::<(), ()>::Left(ready(Ok(()))));
        tasks.execute(call());
        assert!(done.swap(false, Ordering::Relaxed), "it is done at once");

        // What was said of one call says nothing of the next.
        for is_told in [false, true] {
            if is_told {
                tasks.next_is(&Answer::<(), ()>::Right(Box::pin(pending())));
            }
            tasks.execute(call());
            assert!(!done.load(Ordering::Relaxed), "a task of its own does it");
            tokio::task::yield_now().await;
            assert!(done.swap(false, Ordering::Relaxed));
        }
    }

    /// How many commands a writer finds each time it runs, if calls that are ready
    /// together send one each.
    async fn sent_together(calls: usize) -> Vec<usize> {
        let (send, mut commands) = mpsc::unbounded_channel();
        let writer = tokio::spawn(async move {
            let mut together = Vec::new();
            let mut found = Vec::new();
            while commands.recv_many(&mut found, usize::MAX).await > 0 {
                together.push(found.drain(..).count());
            }
            together
        });
        let tasks = Tasks::start();
        tokio::task::yield_now().await;
        for number in 0..calls {
            let send = send.clone();
            tasks.execute(async move {
                send.send(number).expect("the writer listens");
                // Its reply comes later.
                tokio::task::yield_now().await;
            });
        }
        drop(send);
        writer.await.expect("the writer ends with the last call")
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn many_calls_that_are_ready_send_together() {
        // In the worker's thread, as calls are.
        let together = tokio::spawn(sent_together(64)).await.unwrap();
        assert_eq!(together.iter().sum::<usize>(), 64);
        assert!(together.len() < 8, "{together:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_few_calls_wait_for_nobody() {
        let together = tokio::spawn(sent_together(4)).await.unwrap();
        assert_eq!(together, [1, 1, 1, 1]);
    }
}
