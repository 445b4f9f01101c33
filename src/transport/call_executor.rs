//! The tasks in which calls run: which call gets one, when, and what goes before it.
//!
//! tokio takes tasks in the order in which they came, those of connections among those of
//! calls. It is connections that read requests, refuse them and write replies. So
//!
//! - a call that is answered already gets no task: to be refused would take as long as to
//!   be served;
//! - calls wait in a [`Line`] of their own, and only as many leave it as the threads begin
//!   within a millisecond: however many there are, it is soon a connection's turn;
//! - calls that are ready at the same time send together. Each wakes two tasks that write:
//!   that of fred with a command for Redis, that of its connection with a reply. tokio runs
//!   what was woken last before all others, so that every command and every reply would
//!   leave by itself, with a system call here and one at the other end. So the writer is
//!   made to wait for the calls that are ready: see [`Tasks::let_others_go_first`].

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Waker},
    time::{Duration, Instant},
};

use futures::future::{BoxFuture, Either};
use hyper::rt::Executor;
use tokio::{runtime::Handle, sync::Notify};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::grpc::admission::envelope::Answer;

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
    line: Mutex<Line<BoxFuture<'static, ()>>>,
    stand_in: Arc<Notify>,
    /// Does nothing, whenever it is woken.
    _stand_in: AbortOnDropHandle<()>,
}

/// The calls that have not begun, in the order in which they came.
struct Line<Call> {
    /// Without a task.
    waiting: VecDeque<Call>,
    /// With a task, which stands in the queue of tokio or has its first turn.
    admitted: usize,
    /// How long the first turn of a call takes: until it waits for something, or is over.
    first_turn: Duration,
    /// That run tasks.
    threads: usize,
}

/// A call in its first turn.
struct FirstTurn<'a> {
    tasks: &'a Tasks,
    begin: Instant,
}

// === impl Tasks ===

impl Tasks {
    /// Calls that send together; with fewer, to wait for others is to wait for nothing.
    const WORTH_WAITING: usize = 5;

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
                line: Mutex::new(Line::new(Handle::current().metrics().num_workers())),
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

    fn line(&self) -> MutexGuard<'_, Line<BoxFuture<'static, ()>>> {
        let line = &self.shared.line;
        line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self, call: impl Future<Output = ()>) {
        let _running = self.shared.running.token();
        let mut first_turn = Some(FirstTurn::begin(&self));
        let mut call = pin!(call);
        poll_fn(|context| {
            let polled = call.as_mut().poll(context);
            first_turn = None;
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
        if self.shared.running.len() >= Self::WORTH_WAITING {
            self.shared.stand_in.notify_one();
        }
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, call: F) {
        if !self.answered.swap(false, Ordering::Relaxed) {
            let mut line = self.line();
            if line.admits() {
                drop(line);
                tokio::spawn(self.clone().run(call));
            } else {
                line.waiting.push_back(Box::pin(call));
            }
            return;
        }
        let mut call = Box::pin(call);
        let mut unheard = Context::from_waker(Waker::noop());
        if call.as_mut().poll(&mut unheard).is_pending() {
            tokio::spawn(call);
        }
    }
}

// === impl Line ===

impl<Call> Line<Call> {
    /// A thread is given as many calls as it begins within this time, for which a
    /// connection then has to wait.
    const TOGETHER: Duration = Duration::from_millis(1);
    /// What it is given at most, however short their turns.
    const MAX_TOGETHER: usize = 64;
    /// Until something is known. Most calls need a tenth of it.
    const FIRST_TURN: Duration = Duration::from_micros(100);

    fn new(threads: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            admitted: 0,
            first_turn: Self::FIRST_TURN,
            threads,
        }
    }

    /// Admits a call, if it is its time.
    fn admits(&mut self) -> bool {
        let together = Self::TOGETHER.div_duration_f64(self.first_turn) as usize;
        // And one that it has begun: a thread is not to wait for the next.
        let of_a_thread = 1 + together.clamp(1, Self::MAX_TOGETHER);
        let admits = self.admitted < self.threads * of_a_thread;
        self.admitted += usize::from(admits);
        admits
    }

    /// The next one, if it is its time.
    fn next(&mut self) -> Option<Call> {
        if self.waiting.is_empty() || !self.admits() {
            return None;
        }
        self.waiting.pop_front()
    }

    /// A call that was admitted had its first turn.
    fn had_first_turn(&mut self, took: Duration) {
        self.admitted -= 1;
        self.first_turn = (self.first_turn * 7 + took) / 8;
    }
}

impl<Call> fmt::Debug for Line<Call> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line")
            .field("waiting", &self.waiting.len())
            .field("admitted", &self.admitted)
            .field("first_turn", &self.first_turn)
            .finish()
    }
}

// === impl FirstTurn ===

impl<'a> FirstTurn<'a> {
    fn begin(tasks: &'a Tasks) -> Self {
        let begin = Instant::now();
        Self { tasks, begin }
    }
}

/// On drop, so that a call that panics does not keep its place.
impl Drop for FirstTurn<'_> {
    fn drop(&mut self) {
        let took = self.begin.elapsed();
        let mut line = self.tasks.line();
        line.had_first_turn(took);
        while let Some(call) = line.next() {
            tokio::spawn(self.tasks.clone().run(call));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{pending, ready},
        sync::atomic::AtomicUsize,
        task::Poll,
        thread,
    };

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

    /// Calls for which there is no task are admitted as others begin, in their order.
    #[test]
    fn so_many_calls_are_admitted_as_begin_within_a_while() {
        for (threads, first_turn, most) in [
            (1, Duration::ZERO, 65),
            (1, Duration::from_micros(1), 65),
            (1, Duration::from_micros(50), 21),
            (1, Duration::from_micros(900), 2),
            (1, Duration::from_secs(1), 2),
            (8, Duration::from_micros(50), 168),
            (8, Duration::from_secs(1), 16),
        ] {
            let mut line = Line::new(threads);
            line.first_turn = first_turn;
            let admitted = (0..1_000).take_while(|_| line.admits()).count();
            assert_eq!(admitted, most, "{threads}, {first_turn:?}");

            line.waiting.extend(0..1_000);
            assert_eq!(line.next(), None);
            for call in 0..1_000 {
                line.had_first_turn(first_turn);
                assert_eq!(line.next(), Some(call));
                assert_eq!(line.next(), None);
            }
            for _ in 0..most {
                line.had_first_turn(first_turn);
                assert_eq!(line.next(), None, "nobody waits any more");
            }
            assert_eq!(line.admitted, 0);
        }
    }

    #[test]
    fn turns_that_become_long_let_fewer_calls_in_and_short_ones_more() {
        let mut line = Line::<()>::new(1);
        for (took, most) in [(2_000, 2), (20, 50), (2_000, 2)] {
            for _ in 0..100 {
                line.admitted += 1;
                line.had_first_turn(Duration::from_micros(took));
            }
            let admitted = (0..1_000).take_while(|_| line.admits()).count();
            assert!(admitted.abs_diff(most) <= 5, "{took} us: {admitted}");
            line.admitted = 0;
        }
    }

    /// Waits for a turn, but not, as tokio's does, for what has come in meanwhile.
    async fn next_turn() {
        let mut has_waited = false;
        poll_fn(|context| {
            if has_waited {
                return Poll::Ready(());
            }
            has_waited = true;
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }

    /// The calls that end between two turns of a task that is always ready, at most.
    async fn ended_in_a_row(calls: usize, call: impl Fn() + Clone + Send + 'static) -> usize {
        let ended = Arc::<AtomicUsize>::default();
        let tasks = Tasks::start();
        for _ in 0..calls {
            let (call, ended) = (call.clone(), ended.clone());
            tasks.execute(async move {
                ended.fetch_add(1, Ordering::Relaxed);
                call();
            });
        }
        let (mut most, mut before) = (0, 0);
        while before < calls {
            next_turn().await;
            let now = ended.load(Ordering::Relaxed);
            most = most.max(now - before);
            before = now;
        }
        most
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn a_connection_has_its_turn_soon_among_long_calls() {
        let long = || thread::sleep(Duration::from_millis(1));
        let in_a_row = tokio::spawn(ended_in_a_row(100, long)).await.unwrap();
        assert!(in_a_row < 20, "{in_a_row}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn long_calls_keep_all_threads_busy() {
        let (begun, running, most) = <(AtomicUsize, AtomicUsize, Arc<AtomicUsize>)>::default();
        let at_once = most.clone();
        let counts = Arc::new((begun, running));
        let long = move || {
            let (begun, running) = &*counts;
            let with_this = running.fetch_add(1, Ordering::Relaxed) + 1;
            // By then it is known that they are long.
            if begun.fetch_add(1, Ordering::Relaxed) > 20 {
                most.fetch_max(with_this, Ordering::Relaxed);
            }
            thread::sleep(Duration::from_millis(20));
            running.fetch_sub(1, Ordering::Relaxed);
        };
        ended_in_a_row(60, long).await;
        assert!(at_once.load(Ordering::Relaxed) > 2);
    }

    #[tokio::test]
    async fn a_call_that_panics_keeps_no_place() {
        ended_in_a_row(1_000, || panic!("a call that panics")).await;
    }
}
