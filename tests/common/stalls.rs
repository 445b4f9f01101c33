//! How much of the time that passes is the machine's: on a busy one a process waits
//! for a processor, and a bound in time that does not know of that fails for nothing.
//!
//! A [`Bound`] runs only while the machine lets this process and those that it has
//! started run. One that hangs, sleeps or waits for somebody else waits for no
//! processor, so the bound is as strict for it as ever.

use std::{
    collections::HashMap,
    fmt, fs,
    pin::pin,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// A time within which something must happen, not counting [stalls](stalled).
#[derive(Clone, Copy)]
pub struct Bound {
    limit: Duration,
    began: Instant,
    stalled_before: Duration,
}

/// What the meter has found so far.
#[derive(Default)]
struct Meter {
    /// The time for which the processes have waited for a processor.
    stalled: Duration,
    /// When it looked last, and how long each thread had waited by then.
    looked: Option<Instant>,
    waited: HashMap<(u32, String), Duration>,
}

/// Processes that were started, this one among them.
static PROCESSES: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// The pause between two looks.
const TICK: Duration = Duration::from_millis(20);
/// No more of the time than this counts as a stall, however busy the machine is: a bound
/// becomes five times as long at most, and a process that spins comes to its end.
pub const MOST: f64 = 0.8;

/// From now on the time for which this process waits for a processor counts.
pub fn follow(process: u32) {
    lock(&PROCESSES).push(process);
}

/// The process has ended.
pub fn leave(process: u32) {
    lock(&PROCESSES).retain(|one| *one != process);
}

/// Awaits a future, at most for a [`Bound`] of this length; None if that is over.
pub async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    let bound = Bound::of(limit);
    let mut future = pin!(future);
    let mut next = limit;
    loop {
        if let Ok(output) = tokio::time::timeout(next, future.as_mut()).await {
            return Some(output);
        }
        if bound.is_over() {
            return None;
        }
        next = limit.saturating_sub(bound.spent()).max(TICK);
    }
}

/// Waits until this time has passed without [stalls](stalled): for what happens soon, or
/// must not happen, and cannot be waited for otherwise.
pub async fn pass(time: Duration) {
    let bound = Bound::of(time);
    while !bound.is_over() {
        tokio::time::sleep(time.saturating_sub(bound.spent()).max(TICK)).await;
    }
}

/// Makes an attempt at something in which milliseconds matter. When it fails while the
/// machine stood in the way, it says nothing, and is made again.
pub async fn undisturbed<T>(mut attempt: impl AsyncFnMut() -> Result<T, String>) -> T {
    const MOST_TRIES: usize = 20;
    const HARMLESS: Duration = Duration::from_millis(20);
    let mut tries = 0;
    loop {
        tries += 1;
        let before = stalled();
        match attempt().await {
            Ok(done) => return done,
            Err(failure) => {
                let stalled = stalled() - before;
                assert!(
                    stalled > HARMLESS && tries < MOST_TRIES,
                    "try {tries}, with {stalled:?} of stalls: {failure}"
                );
            }
        }
    }
}

/// For how long the machine has kept these processes waiting since the first call, of
/// [each stretch of time](MOST) not all.
pub fn stalled() -> Duration {
    let mut meter = lock(meter());
    meter.look();
    meter.stalled
}

fn meter() -> &'static Mutex<Meter> {
    static METER: OnceLock<Mutex<Meter>> = OnceLock::new();
    METER.get_or_init(|| {
        follow(std::process::id());
        thread::spawn(|| {
            loop {
                let begin = Instant::now();
                thread::sleep(TICK);
                let late = begin.elapsed() - TICK;
                lock(meter()).oversleeps(late);
            }
        });
        Mutex::default()
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Meter ===

impl Meter {
    /// Counts what the threads have waited since it looked last.
    fn look(&mut self) {
        self.oversleeps(Duration::ZERO);
    }

    /// The same if the meter itself was late by this: then the machine stood still,
    /// and its threads were not even asked to run.
    fn oversleeps(&mut self, late: Duration) {
        let now = Instant::now();
        let just_looked = self.looked.is_some_and(|looked| now - looked < TICK / 4);
        if just_looked && late.is_zero() {
            return;
        }
        let mut waited = Duration::ZERO;
        let mut all = HashMap::new();
        for process in lock(&PROCESSES).clone() {
            for (thread, so_far) in waits(process) {
                let thread = (process, thread);
                // Of a thread that is new, all of it.
                let before = self.waited.get(&thread).copied().unwrap_or_default();
                waited += so_far.saturating_sub(before);
                all.insert(thread, so_far);
            }
        }
        self.waited = all;
        // Threads wait side by side.
        if let Some(looked) = self.looked.replace(now) {
            self.stalled += waited.max(late).min((now - looked).mul_f64(MOST));
        }
    }
}

/// How long each thread of a process has waited for a processor; empty when it is gone.
fn waits(process: u32) -> Vec<(String, Duration)> {
    let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else {
        return Vec::new();
    };
    let wait = |thread: fs::DirEntry| {
        // Nanoseconds on a processor, nanoseconds of waiting for one, time slices.
        let told = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let nanos = told.split_whitespace().nth(1)?.parse().ok()?;
        let name = thread.file_name().to_string_lossy().into_owned();
        Some((name, Duration::from_nanos(nanos)))
    };
    threads.flatten().filter_map(wait).collect()
}

// === impl Bound ===

impl Bound {
    /// From now on.
    pub fn of(limit: Duration) -> Self {
        Self {
            limit,
            stalled_before: stalled(),
            began: Instant::now(),
        }
    }

    /// The time that has passed, without stalls.
    pub fn spent(&self) -> Duration {
        let stalled = stalled() - self.stalled_before;
        self.began.elapsed().saturating_sub(stalled)
    }

    pub fn is_over(&self) -> bool {
        self.began.elapsed() > self.limit && self.spent() > self.limit
    }

    /// Fails when it is over.
    #[track_caller]
    pub fn assert_holds(&self, what: &str) {
        assert!(!self.is_over(), "{what}: not within {self:?}");
    }
}

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit, began, .. } = self;
        let (passed, spent) = (began.elapsed(), self.spent());
        write!(
            f,
            "{limit:?} ({passed:.0?} passed, {spent:.0?} of them without stalls)"
        )
    }
}
