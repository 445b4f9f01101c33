//! Time that this process itself has lost: it was stopped, throttled, moved to another
//! machine, or its threads were busy. What Redis has not answered in that time says
//! nothing of Redis.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::time::Instant;

/// Measures the time that is lost, by a task that wants to run now and then.
/// Every call asks, so there is no lock.
#[derive(Debug)]
pub struct Stalls {
    /// Where the moments below begin.
    started: Instant,
    /// What was lost until the task has run last, in microseconds.
    lost: AtomicU64,
    /// When the task wants to run next, in microseconds.
    next: AtomicU64,
}

// === impl Stalls ===

impl Stalls {
    const TICK: Duration = Duration::from_millis(50);
    /// So much later than asked for is nothing unusual.
    const TOLERANCE: Duration = Duration::from_millis(10);

    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            lost: AtomicU64::new(0),
            next: AtomicU64::new(micros(Self::TICK)),
        }
    }

    /// Measures for ever.
    pub async fn measure(self: Arc<Self>) {
        loop {
            tokio::time::sleep(Self::TICK).await;
            let late = self.late();
            // In this order what is late is never counted twice.
            let next = self.started.elapsed() + Self::TICK;
            self.next.store(micros(next), SeqCst);
            self.lost.fetch_add(micros(late), SeqCst);
        }
    }

    /// All the time that was lost so far. Of use is what it has grown by, see
    /// [`Self::lost_since`].
    pub fn lost(&self) -> Duration {
        Duration::from_micros(self.lost.load(SeqCst)) + self.late()
    }

    /// The time that was lost since it was `before` in all.
    pub fn lost_since(&self, before: Duration) -> Duration {
        self.lost().saturating_sub(before)
    }

    /// By how much the task is late now.
    fn late(&self) -> Duration {
        let next = Duration::from_micros(self.next.load(SeqCst));
        let late = self.started.elapsed().saturating_sub(next);
        late.saturating_sub(Self::TOLERANCE)
    }

    /// Awaits `future` until `end`, and as much longer as this process was held up
    /// meanwhile. None if it is not ready by then.
    pub async fn within<F: Future>(&self, end: Instant, future: F) -> Option<F::Output> {
        let before = self.lost();
        let mut future = std::pin::pin!(future);
        let mut until = end;
        loop {
            if let Ok(output) = tokio::time::timeout_at(until, future.as_mut()).await {
                return Some(output);
            }
            let longer = end + self.lost_since(before);
            if longer <= until {
                return None;
            }
            until = longer;
        }
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_that_is_lost_is_given_back() {
        let stalls = Arc::new(Stalls::new());
        tokio::spawn(stalls.clone().measure());
        // Undisturbed, the end is the end.
        let never = std::future::pending::<()>;
        let begin = Instant::now();
        let end = begin + Duration::from_millis(500);
        assert_eq!(stalls.within(end, never()).await, None);
        assert!(begin.elapsed() <= Duration::from_millis(501));

        // The clock goes on while nothing runs.
        let begin = Instant::now();
        let end = begin + Duration::from_millis(500);
        let waiting = stalls.within(end, never());
        let stop = async {
            tokio::task::yield_now().await;
            tokio::time::advance(Duration::from_secs(3)).await;
        };
        let (waited, ()) = tokio::join!(waiting, stop);
        assert_eq!(waited, None);
        let waited = begin.elapsed();
        assert!(waited >= Duration::from_millis(3_400), "{waited:?}");
        assert!(waited <= Duration::from_millis(3_600), "{waited:?}");
        assert_eq!(stalls.within(end, async { 7 }).await, Some(7));
    }
}
