//! Events that others can cause without bound must not fill the log.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// When an event was last written at its own level, and how many were not since
/// then. See [`rate_limited!`].
#[derive(Debug, Default)]
pub struct RateLimit(Mutex<Last>);

#[derive(Debug, Default)]
struct Last {
    at: Option<Instant>,
    left_out: u64,
}

// === impl RateLimit ===

impl RateLimit {
    /// Events of one kind are at least this far apart.
    pub const PAUSE: Duration = Duration::from_secs(1);

    pub const fn new() -> Self {
        Self(Mutex::new(Last {
            at: None,
            left_out: 0,
        }))
    }

    /// If it is time for another one at `now`: how many were left out before it.
    pub fn due(&self, now: Instant) -> Option<u64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last
            .at
            .is_none_or(|at| now.saturating_duration_since(at) >= Self::PAUSE);
        if !due {
            last.left_out += 1;
            return None;
        }
        last.at = Some(now);
        Some(std::mem::take(&mut last.left_out))
    }
}

/// Writes an event that others can cause, `rate_limited!(warn, fields…, "text")`: at the
/// level at most once in [`RateLimit::PAUSE`] for this line of code, with the number of
/// those before it that were `left_out`; otherwise at DEBUG.
macro_rules! rate_limited {
    ($level:ident, $($event:tt)+) => {{
        static LAST: $crate::telemetry::RateLimit = $crate::telemetry::RateLimit::new();
        match LAST.due(::std::time::Instant::now()) {
            Some(0) => ::tracing::$level!($($event)+),
            Some(left_out) => ::tracing::$level!(left_out, $($event)+),
            None => ::tracing::debug!($($event)+),
        }
    }};
}
pub(crate) use rate_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_a_while_is_due_and_says_how_many_were_not() {
        let (limit, start) = (RateLimit::new(), Instant::now());
        let almost = RateLimit::PAUSE - Duration::from_millis(1);
        assert_eq!(limit.due(start), Some(0));
        assert_eq!(limit.due(start), None);
        assert_eq!(limit.due(start + almost), None);
        assert_eq!(limit.due(start + RateLimit::PAUSE), Some(2));
        assert_eq!(limit.due(start + RateLimit::PAUSE + almost), None);
        assert_eq!(limit.due(start + RateLimit::PAUSE * 2), Some(1));
    }
}
