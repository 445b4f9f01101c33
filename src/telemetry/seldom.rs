//! Events that others can cause without bound must not fill the log.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// When an event was last written at its own level. See [`seldom!`].
#[derive(Debug, Default)]
pub struct Seldom(Mutex<Option<Instant>>);

// === impl Seldom ===

impl Seldom {
    /// Events of one kind are at least this far apart.
    pub const PAUSE: Duration = Duration::from_secs(1);

    pub const fn new() -> Self {
        Self(Mutex::new(None))
    }

    /// Whether it is time for another one at `now`.
    pub fn is_due(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| now.saturating_duration_since(last) >= Self::PAUSE);
        if due {
            *last = Some(now);
        }
        due
    }
}

/// Writes an event that clients can cause, `seldom!(warn, fields…, "text")`: at
/// the level at most once in [`Seldom::PAUSE`] for this line of code, otherwise at
/// DEBUG.
macro_rules! seldom {
    ($level:ident, $($event:tt)+) => {{
        static LAST: $crate::telemetry::Seldom = $crate::telemetry::Seldom::new();
        if LAST.is_due(::std::time::Instant::now()) {
            ::tracing::$level!($($event)+);
        } else {
            ::tracing::debug!($($event)+);
        }
    }};
}
pub(crate) use seldom;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_a_while_is_due() {
        let (seldom, start) = (Seldom::new(), Instant::now());
        let almost = Seldom::PAUSE - Duration::from_millis(1);
        assert!(seldom.is_due(start));
        assert!(!seldom.is_due(start));
        assert!(!seldom.is_due(start + almost));
        assert!(seldom.is_due(start + Seldom::PAUSE));
        assert!(!seldom.is_due(start + Seldom::PAUSE + almost));
    }
}
