//! Events that others can cause without bound must not fill the log.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// When an event was last written at its own level, and how many were not since
/// then. See [`seldom!`].
#[derive(Debug, Default)]
pub struct Seldom(Mutex<Last>);

#[derive(Debug, Default)]
struct Last {
    at: Option<Instant>,
    left_out: u64,
}

// === impl Seldom ===

impl Seldom {
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

/// Writes an event that others can cause, `seldom!(warn, fields…, "text")`: at the
/// level at most once in [`Seldom::PAUSE`] for this line of code, with the number of
/// those before it that were `left_out`; otherwise at DEBUG.
macro_rules! seldom {
    ($level:ident, $($event:tt)+) => {{
        static LAST: $crate::telemetry::Seldom = $crate::telemetry::Seldom::new();
        match LAST.due(::std::time::Instant::now()) {
            Some(0) => ::tracing::$level!($($event)+),
            Some(left_out) => ::tracing::$level!(left_out, $($event)+),
            None => ::tracing::debug!($($event)+),
        }
    }};
}
pub(crate) use seldom;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_a_while_is_due_and_says_how_many_were_not() {
        let (seldom, start) = (Seldom::new(), Instant::now());
        let almost = Seldom::PAUSE - Duration::from_millis(1);
        assert_eq!(seldom.due(start), Some(0));
        assert_eq!(seldom.due(start), None);
        assert_eq!(seldom.due(start + almost), None);
        assert_eq!(seldom.due(start + Seldom::PAUSE), Some(2));
        assert_eq!(seldom.due(start + Seldom::PAUSE + almost), None);
        assert_eq!(seldom.due(start + Seldom::PAUSE * 2), Some(1));
    }
}
