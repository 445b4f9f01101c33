//! Whether this process was stopped for so long that what it had received before is out
//! of date. A value: the times are passed in.
//!
//! A replica that was stopped (by `SIGSTOP`, a debugger, a machine that was suspended)
//! finds webhooks in its sockets that Alertmanager has given up meanwhile. Their "firing"
//! must not be stamped as received now, after a "resolved" that another replica got in
//! time. Which of them came before cannot be told, so for a moment none is taken;
//! Alertmanager sends again what it has not given up.

use std::time::{Duration, Instant, SystemTime};

/// Looked at by whoever receives something, and now and then.
#[derive(Debug)]
pub struct Pauses {
    /// A longer pause makes what was received before it doubtful.
    longest: Duration,
    last: Moment,
    doubtful_until: Option<Instant>,
}

/// A moment by both clocks: one of them stands still while a machine is suspended, and
/// the other one may be set.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub monotonic: Instant,
    pub wall: SystemTime,
}

/// How often to look, at least.
pub const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long after a pause nothing is taken: until what waits in the sockets is read.
pub const SETTLE_TIME: Duration = Duration::from_secs(2);

// === impl Pauses ===

impl Pauses {
    /// The shortest time after which Alertmanager gives up a notification.
    pub const DEFAULT_LONGEST: Duration = Duration::from_secs(10);

    pub fn new(longest: Duration, now: Moment) -> Self {
        Self {
            longest,
            last: now,
            doubtful_until: None,
        }
    }

    /// Takes note that the process runs. Says whether what is received now may have come
    /// long ago.
    pub fn look(&mut self, now: Moment) -> bool {
        let pause = now.since(self.last);
        self.last = now;
        let was_doubtful = self
            .doubtful_until
            .is_some_and(|until| now.monotonic < until);
        // Whoever is still held up has not read everything yet.
        let bound = match was_doubtful {
            true => SETTLE_TIME / 2,
            false => self.longest,
        };
        if pause > bound {
            self.doubtful_until = Some(now.monotonic + SETTLE_TIME);
            return true;
        }
        was_doubtful
    }
}

// === impl Moment ===

impl Moment {
    pub fn now() -> Self {
        Self {
            monotonic: Instant::now(),
            wall: SystemTime::now(),
        }
    }

    /// By the clock that has gone further.
    fn since(self, earlier: Self) -> Duration {
        let monotonic = self.monotonic.saturating_duration_since(earlier.monotonic);
        let wall = self.wall.duration_since(earlier.wall).unwrap_or_default();
        monotonic.max(wall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn later(moment: Moment, by: Duration) -> Moment {
        Moment {
            monotonic: moment.monotonic + by,
            wall: moment.wall + by,
        }
    }

    #[test]
    fn after_a_long_pause_nothing_is_taken_for_a_moment() {
        let begin = Moment::now();
        let mut pauses = Pauses::new(10 * SECOND, begin);
        let mut at = later(begin, 9 * SECOND);
        assert!(!pauses.look(at), "Alertmanager still waits");
        at = later(at, 11 * SECOND);
        assert!(pauses.look(at));
        at = later(at, SECOND / 2);
        assert!(pauses.look(at));
        // Held up once more before everything was read.
        at = later(at, 3 * SECOND / 2 - SECOND / 10);
        assert!(pauses.look(at));
        at = later(at, SECOND);
        assert!(pauses.look(at));
        at = later(at, SECOND);
        assert!(!pauses.look(at));
    }

    #[test]
    fn a_suspended_machine_is_noticed_by_its_wall_clock() {
        let begin = Moment::now();
        let mut pauses = Pauses::new(10 * SECOND, begin);
        assert!(pauses.look(Moment {
            wall: begin.wall + 3_600 * SECOND,
            ..later(begin, SECOND)
        }));
    }

    #[test]
    fn a_wall_clock_that_is_set_back_is_no_pause() {
        let begin = Moment::now();
        let mut pauses = Pauses::new(10 * SECOND, begin);
        assert!(!pauses.look(Moment {
            wall: begin.wall - 3_600 * SECOND,
            ..later(begin, SECOND)
        }));
    }
}
