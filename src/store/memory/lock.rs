//! The lock that every call to the memory store takes.

use std::ops::{Deref, DerefMut};

use parking_lot::{Mutex, MutexGuard};

/// A plain mutex: it is held for microseconds and never across an await.
#[derive(Debug)]
pub struct Lock<T>(Mutex<T>);

/// Holds a [`Lock`] until it is dropped.
pub struct Guard<'a, T: Litters> {
    /// None once it is dropped.
    held: Option<MutexGuard<'a, T>>,
    /// Whether whoever waits gets the lock next.
    is_handed_over: bool,
    #[cfg(feature = "lock-times")]
    hold: times::Hold,
}

/// Something that leaves things behind which nobody needs any more.
pub trait Litters {
    /// Things of which the memory is given back once the lock is free: now and then
    /// the allocator gives much of it to the system, which takes milliseconds.
    type Litter;

    fn take_litter(&mut self) -> Self::Litter;
}

// === impl Lock ===

impl<T: Litters> Lock<T> {
    pub fn new(held: T) -> Self {
        Self(Mutex::new(held))
    }

    pub fn lock(&self) -> Guard<'_, T> {
        Guard {
            held: Some(self.0.lock()),
            is_handed_over: false,
            #[cfg(feature = "lock-times")]
            hold: times::Hold::begin(),
        }
    }
}

// === impl Guard ===

impl<T: Litters> Guard<'_, T> {
    const IS_HELD: &'static str = "it is held until the guard is dropped";

    /// Gives the lock to whoever waits for it. What is done in steps does so
    /// after each, since whoever takes a lock again at once gets it before one
    /// that has to wake up first.
    pub fn hand_over(mut self) {
        self.is_handed_over = true;
    }
}

impl<T: Litters> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        let Some(mut held) = self.held.take() else {
            return;
        };
        let litter = held.take_litter();
        if self.is_handed_over {
            MutexGuard::unlock_fair(held);
        } else {
            drop(held);
        }
        #[cfg(feature = "lock-times")]
        self.hold.end();
        drop(litter);
    }
}

impl<T: Litters> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect(Self::IS_HELD)
    }
}

impl<T: Litters> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect(Self::IS_HELD)
    }
}

/// How long the lock was held, for `benches/memory_lock.rs`.
#[cfg(feature = "lock-times")]
pub mod times {
    use std::time::{Duration, Instant};

    use parking_lot::Mutex;
    use rustix::time::{ClockId, clock_gettime};

    /// The longest hold so far.
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Longest {
        /// By the time that the processor has worked for the thread.
        pub processor: Duration,
        /// By the clock: with what the thread has waited for a processor.
        pub clock: Duration,
    }

    pub(super) struct Hold {
        processor: Duration,
        clock: Instant,
    }

    static LONGEST: Mutex<Longest> = Mutex::new(Longest {
        processor: Duration::ZERO,
        clock: Duration::ZERO,
    });

    /// The longest hold since this was last asked.
    pub fn take() -> Longest {
        std::mem::take(&mut LONGEST.lock())
    }

    impl Hold {
        pub(super) fn begin() -> Self {
            Self {
                clock: Instant::now(),
                processor: processor_time(),
            }
        }

        pub(super) fn end(&self) {
            let processor = processor_time() - self.processor;
            let clock = self.clock.elapsed();
            let mut longest = LONGEST.lock();
            longest.processor = longest.processor.max(processor);
            longest.clock = longest.clock.max(clock);
        }
    }

    fn processor_time() -> Duration {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        // The kernel counts up from 0.
        Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
    }
}
