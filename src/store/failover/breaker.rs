//! The switch between Redis and memory, as a state machine alone: no I/O, no
//! clock of its own.
//!
//! ```text
//!            a failure of Redis                 the pause is over
//!   Closed ─────────────────────▶ Open ─────────────────────────────▶ HalfOpen
//!      ▲                            ▲                                   │   │
//!      │                            └───────── a probe fails ───────────┘   │
//!      └───────────── enough PINGs and a write have succeeded ──────────────┘
//! ```
//!
//! `Closed`: Redis answers. `Open`: memory answers, and Redis is left alone for
//! a pause that grows with each failure. `HalfOpen`: memory answers, and Redis
//! is probed. So it begins.

use std::time::Duration;

use tokio::time::Instant;

/// The state machine.
#[derive(Clone, Debug)]
pub struct Breaker {
    state: State,
    /// Counts the times that the switch has opened or closed. What was begun in
    /// an earlier period says nothing about this one.
    period: u64,
    /// When this period began.
    since: Instant,
    /// Pauses since Redis was last well for a while.
    failures: u32,
}

/// Who answers, and what is done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Redis answers.
    Closed,
    /// Memory answers; Redis is left alone until then.
    Open { until: Instant },
    /// Memory answers; Redis is probed and has answered this many PINGs in a row.
    HalfOpen { pings: u32 },
}

/// What to probe next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    Ping,
    /// A write of a probe key, as the service writes: a Redis that answers PING
    /// may still refuse writes.
    Write,
}

/// What is to be done about Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, for as long as it answers.
    Nothing,
    /// Leave it alone for this long.
    Pause(Duration),
    Probe(Probe),
}

// === impl Breaker ===

impl Breaker {
    /// PINGs in a row that Redis has to answer.
    pub const PINGS_TO_CLOSE: u32 = 3;
    /// The pause between two of them.
    pub const PING_PAUSE: Duration = Duration::from_millis(50);
    /// The pause after the first failure; it doubles with each further one.
    pub const FIRST_PAUSE: Duration = Duration::from_millis(200);
    /// The pause grows to this.
    pub const LONGEST_PAUSE: Duration = Duration::from_millis(500);
    /// A pause is shorter than it could be by up to this part, at random, so
    /// that several instances do not probe at the same moment.
    const JITTER: f64 = 0.25;
    /// When Redis was well for this long, the next failure counts as the first.
    const FORGIVEN_AFTER: Duration = Duration::from_secs(10);

    /// Open, but probing at once: Redis has not answered yet. Nor has it failed, so
    /// that one PING is enough.
    pub fn new(now: Instant) -> Self {
        let pings = Self::PINGS_TO_CLOSE - 1;
        Self {
            state: State::HalfOpen { pings },
            period: 0,
            since: now,
            failures: 0,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    pub fn period(&self) -> u64 {
        self.period
    }

    /// When the switch opened or closed last.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Something that was begun in `period` shows that Redis is not well.
    /// `jitter`: from 0 to 1, at random. True if the switch opens.
    pub fn fails(&mut self, period: u64, jitter: f64, now: Instant) -> bool {
        if !self.is_closed() || period != self.period {
            return false;
        }
        if now.saturating_duration_since(self.since) >= Self::FORGIVEN_AFTER {
            self.failures = 0;
        }
        self.begin_period(now);
        self.pause(jitter, now);
        true
    }

    /// What is to be done now.
    pub fn next(&mut self, now: Instant) -> Next {
        if let State::Open { until } = self.state {
            if now < until {
                return Next::Pause(until - now);
            }
            self.state = State::HalfOpen { pings: 0 };
        }
        match self.state {
            State::HalfOpen { pings } if pings < Self::PINGS_TO_CLOSE => Next::Probe(Probe::Ping),
            State::HalfOpen { .. } => Next::Probe(Probe::Write),
            State::Closed | State::Open { .. } => Next::Nothing,
        }
    }

    /// The probe has succeeded. True if the switch closes.
    pub fn probe_succeeds(&mut self, probe: Probe, now: Instant) -> bool {
        match (self.state, probe) {
            (State::HalfOpen { pings }, Probe::Ping) => {
                self.state = State::HalfOpen { pings: pings + 1 };
                false
            }
            (State::HalfOpen { pings }, Probe::Write) if pings >= Self::PINGS_TO_CLOSE => {
                self.begin_period(now);
                self.state = State::Closed;
                true
            }
            _ => false,
        }
    }

    /// The probe has failed.
    pub fn probe_fails(&mut self, jitter: f64, now: Instant) {
        if matches!(self.state, State::HalfOpen { .. }) {
            self.pause(jitter, now);
        }
    }

    /// Another server has taken the place of the one that is left alone; there is
    /// no reason to wait with it.
    pub fn meets_another_server(&mut self) {
        if matches!(self.state, State::Open { .. }) {
            self.state = State::HalfOpen { pings: 0 };
        }
    }

    fn begin_period(&mut self, now: Instant) {
        self.period += 1;
        self.since = now;
    }

    fn pause(&mut self, jitter: f64, now: Instant) {
        let pause = (Self::FIRST_PAUSE * 2u32.pow(self.failures.min(8))).min(Self::LONGEST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        self.state = State::Open {
            until: now + pause.mul_f64(1.0 - Self::JITTER * jitter.clamp(0.0, 1.0)),
        };
    }
}

// === impl State ===

impl State {
    /// The name in `/health`, metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open { .. } => "open",
            Self::HalfOpen { .. } => "half_open",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A breaker that has closed, and the time.
    fn closed() -> (Breaker, Instant) {
        let now = Instant::now();
        let mut breaker = Breaker::new(now);
        assert!(probe_through(&mut breaker, now));
        (breaker, now)
    }

    /// Lets every probe succeed; whether that has closed it.
    fn probe_through(breaker: &mut Breaker, now: Instant) -> bool {
        while let Next::Probe(probe) = breaker.next(now) {
            if breaker.probe_succeeds(probe, now) {
                return true;
            }
        }
        false
    }

    #[test]
    fn it_starts_by_probing_and_closes_after_a_ping_and_a_write() {
        closes_after(1, Breaker::new(Instant::now()), Instant::now());
    }

    #[test]
    fn it_closes_again_after_three_pings_and_a_write() {
        let (mut breaker, now) = closed();
        breaker.fails(breaker.period(), 0.0, now);
        closes_after(3, breaker, now + Breaker::FIRST_PAUSE);
    }

    fn closes_after(pings: u32, mut breaker: Breaker, now: Instant) {
        for _ in 0..pings {
            assert!(!breaker.is_closed());
            assert_eq!(breaker.next(now), Next::Probe(Probe::Ping));
            assert!(!breaker.probe_succeeds(Probe::Ping, now));
        }
        assert_eq!(breaker.next(now), Next::Probe(Probe::Write));
        assert!(breaker.probe_succeeds(Probe::Write, now));
        assert!(breaker.is_closed());
        assert_eq!(breaker.next(now), Next::Nothing);
    }

    #[test]
    fn another_server_is_probed_at_once_and_has_to_answer_like_any() {
        let (mut breaker, now) = closed();
        breaker.meets_another_server();
        assert!(breaker.is_closed());
        assert!(breaker.fails(breaker.period(), 0.0, now));
        assert!(matches!(breaker.next(now), Next::Pause(_)));
        breaker.meets_another_server();
        assert_eq!(breaker.next(now), Next::Probe(Probe::Ping));
        assert!(!breaker.probe_succeeds(Probe::Ping, now));
        // It says nothing of a probe that is under way.
        breaker.meets_another_server();
        assert_eq!(breaker.state(), State::HalfOpen { pings: 1 });
    }

    #[test]
    fn a_failure_opens_it_once() {
        let (mut breaker, now) = closed();
        let period = breaker.period();
        assert!(breaker.fails(period, 0.0, now));
        assert!(!breaker.fails(period, 0.0, now), "it is open already");
        assert_eq!(
            breaker.state(),
            State::Open {
                until: now + Breaker::FIRST_PAUSE
            }
        );
    }

    #[test]
    fn a_failure_of_what_was_begun_before_the_recovery_says_nothing() {
        let (mut breaker, now) = closed();
        let before = breaker.period();
        breaker.fails(before, 0.0, now);
        let later = now + Breaker::LONGEST_PAUSE;
        assert!(probe_through(&mut breaker, later));
        assert!(!breaker.fails(before, 0.0, later));
        assert!(breaker.is_closed());
    }

    #[test]
    fn redis_is_left_alone_during_the_pause() {
        let (mut breaker, now) = closed();
        breaker.fails(breaker.period(), 0.0, now);
        assert_eq!(
            breaker.next(now + Breaker::FIRST_PAUSE - MS),
            Next::Pause(MS)
        );
        assert_eq!(
            breaker.next(now + Breaker::FIRST_PAUSE),
            Next::Probe(Probe::Ping)
        );
    }

    #[test]
    fn a_redis_that_answers_ping_and_refuses_writes_keeps_it_open() {
        let (mut breaker, mut now) = closed();
        breaker.fails(breaker.period(), 0.0, now);
        for pause in [200, 400, 500, 500] {
            let State::Open { until } = breaker.state() else {
                panic!("{breaker:?}");
            };
            assert_eq!(until - now, pause * MS);
            now = until;
            for _ in 0..3 {
                assert_eq!(breaker.next(now), Next::Probe(Probe::Ping));
                breaker.probe_succeeds(Probe::Ping, now);
            }
            assert_eq!(breaker.next(now), Next::Probe(Probe::Write));
            breaker.probe_fails(0.0, now);
        }
    }

    #[test]
    fn a_ping_that_fails_begins_the_count_anew() {
        let (mut breaker, now) = closed();
        breaker.fails(breaker.period(), 0.0, now);
        let later = now + Breaker::LONGEST_PAUSE;
        breaker.next(later);
        breaker.probe_succeeds(Probe::Ping, later);
        breaker.probe_fails(0.0, later);
        let later = later + Breaker::LONGEST_PAUSE;
        assert_eq!(breaker.next(later), Next::Probe(Probe::Ping));
        assert_eq!(breaker.state(), State::HalfOpen { pings: 0 });
    }

    #[test]
    fn after_a_time_of_health_the_pause_is_the_first_again() {
        let (mut breaker, mut now) = closed();
        for (healthy_for, pause) in [(0, 200), (0, 400), (0, 500), (10_000, 200)] {
            now += healthy_for * MS;
            breaker.fails(breaker.period(), 0.0, now);
            let State::Open { until } = breaker.state() else {
                panic!("{breaker:?}");
            };
            assert_eq!(until - now, pause * MS);
            now = until;
            assert!(probe_through(&mut breaker, now));
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        CallFails,
        ProbeSucceeds,
        ProbeFails,
    }

    proptest! {
        /// Whatever happens: it closes only after as many PINGs and a write have
        /// succeeded since the last failure, and not sooner after it opened than
        /// the least pause.
        #[test]
        fn it_never_closes_while_probes_fail_and_never_flaps_faster_than_its_pause(
            events in prop::collection::vec(
                (0u32..400, prop_oneof![
                    Just(Event::CallFails),
                    Just(Event::ProbeSucceeds), Just(Event::ProbeSucceeds), Just(Event::ProbeSucceeds),
                    Just(Event::ProbeFails),
                ], 0.0f64..1.0),
                1..300,
            ),
        ) {
            let mut now = Instant::now();
            let mut breaker = Breaker::new(now);
            // Those that it begins with.
            let mut succeeded = vec![Probe::Ping, Probe::Ping];
            let mut opened = None;
            for (pause, event, jitter) in events {
                now += pause * MS;
                let was_closed = breaker.is_closed();
                let period = breaker.period();
                match event {
                    Event::CallFails => {
                        if breaker.fails(period, jitter, now) {
                            opened = Some(now);
                            succeeded.clear();
                        }
                        prop_assert!(!breaker.is_closed());
                    }
                    Event::ProbeSucceeds => {
                        if let Next::Probe(probe) = breaker.next(now) {
                            succeeded.push(probe);
                            breaker.probe_succeeds(probe, now);
                        }
                    }
                    Event::ProbeFails => {
                        if matches!(breaker.next(now), Next::Probe(_)) {
                            succeeded.clear();
                            breaker.probe_fails(jitter, now);
                            prop_assert!(!breaker.is_closed());
                        }
                    }
                }
                if breaker.is_closed() && !was_closed {
                    prop_assert_eq!(
                        &succeeded[..],
                        &[Probe::Ping, Probe::Ping, Probe::Ping, Probe::Write][..]
                    );
                    let least = Breaker::FIRST_PAUSE.mul_f64(1.0 - Breaker::JITTER);
                    prop_assert!(opened.is_none_or(|opened| now - opened >= least));
                }
                prop_assert_eq!(breaker.period() > period, was_closed != breaker.is_closed());
            }
        }
    }
}
