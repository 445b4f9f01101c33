//! Time that this process itself has lost: it was stopped, throttled, moved to another
//! machine, or its threads were busy. What Redis has not answered in that time says
//! nothing of Redis.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::Instant;

use super::link::lock;

/// Measures the time that is lost, by a task that wants to run now and then.
#[derive(Debug)]
pub struct Stalls(Mutex<Ticks>);

#[derive(Debug)]
struct Ticks {
    lost: Duration,
    /// When the task wants to run next.
    next: Instant,
}

// === impl Stalls ===

impl Stalls {
    const TICK: Duration = Duration::from_millis(50);

    pub fn new() -> Self {
        Self(Mutex::new(Ticks {
            lost: Duration::ZERO,
            next: Instant::now() + Self::TICK,
        }))
    }

    /// Measures for ever.
    pub async fn measure(self: Arc<Self>) {
        loop {
            let next = lock(&self.0).next;
            tokio::time::sleep_until(next).await;
            lock(&self.0).tick(Instant::now());
        }
    }

    /// All the time that was lost so far. Of use is the difference between two of
    /// these.
    pub fn lost(&self) -> Duration {
        lock(&self.0).lost_at(Instant::now())
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
            let longer = end + (self.lost() - before);
            if longer <= until {
                return None;
            }
            until = longer;
        }
    }
}

// === impl Ticks ===

impl Ticks {
    /// So much later than asked for is nothing unusual.
    const TOLERANCE: Duration = Duration::from_millis(10);

    fn tick(&mut self, now: Instant) {
        self.lost = self.lost_at(now);
        self.next = now + Stalls::TICK;
    }

    fn lost_at(&self, now: Instant) -> Duration {
        let late = now.saturating_duration_since(self.next);
        self.lost + late.saturating_sub(Self::TOLERANCE)
    }
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
