//! What happens in a run, drawn from its seed alone: the same seed is the same
//! schedule, so a run that failed can be had again.

use std::{fmt, time::Duration};

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use crate::common::{
    fault_proxy::Direction,
    faults::Fault,
    replicated::{Failure, Kind},
};

/// The schedule of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub seed: u64,
    /// `--on-recovery` of the instances.
    pub policy: Policy,
    /// 1 or 3 instances, on one Redis.
    pub instances: usize,
    /// Each instance reaches Redis through a proxy of its own.
    pub proxied: bool,
    /// Redis keeps every write on disk; else a restart comes back empty.
    pub persists: bool,
    /// Several servers, of which a replica takes over when a primary fails; None:
    /// one Redis.
    pub ground: Option<Kind>,
    /// One after the other.
    pub steps: Vec<Step>,
}

/// What becomes of groups written while degraded; see `--on-recovery`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    Discard,
    Reconcile,
}

/// A fault, and the quiet after it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    pub fault: Fault,
    pub target: Target,
    /// From its beginning to its end.
    pub length: Duration,
    pub after: After,
}

/// Whom a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Everybody,
    /// The connections of this instance alone.
    Instance(usize),
}

/// When the next fault may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// All instances are back to Redis, and some quiet has passed.
    Recovered,
    /// This long after the end of the fault, in the midst of the recovery.
    Soon(Duration),
}

/// What a fault must do to an instance that is in good health before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Memory must answer before its end.
    Degrades,
    /// Too short or too mild: memory must not answer.
    Spares,
    /// Either.
    Either,
}

/// A hang this short must not open the switch, whose limit is 500 ms. The rest
/// is for the machine, on which a "250 ms" stop may last longer.
const STALL: Duration = Duration::from_millis(250);
/// After this long a silent Redis has been noticed for certain: 3 attempts of
/// 250 ms, or a heartbeat of 200 ms and 500 ms of silence, and then some.
const NOTICED_SILENCE: Duration = Duration::from_millis(1_300);
/// The same where connections are refused: no attempt has to be waited for but
/// those that were under way.
const NOTICED_REFUSAL: Duration = Duration::from_millis(900);
/// The same where Redis answers with errors.
const NOTICED_ERROR: Duration = Duration::from_millis(300);
/// Faults of one run last this long together at most.
const ALL_FAULTS: Duration = Duration::from_secs(11);

// === impl Plan ===

impl Plan {
    /// Draws the plan of a seed. `policy` takes the place of the drawn one;
    /// nothing else changes with it.
    pub fn draw(seed: u64, policy: Option<Policy>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let drawn_policy = *[Policy::Discard, Policy::Reconcile]
            .choose(&mut rng)
            .expect("not empty");
        let instances = if rng.random_bool(0.5) { 1 } else { 3 };
        let proxied = rng.random_bool(0.6);
        let persists = rng.random_bool(0.5);
        let mut plan = Self {
            seed,
            policy: policy.unwrap_or(drawn_policy),
            instances,
            proxied,
            persists,
            ground: None,
            steps: Vec::new(),
        };
        let count = rng.random_range(2..=5);
        let mut left = ALL_FAULTS;
        let mut may_be_long = rng.random_bool(0.15);
        while plan.steps.len() < count {
            let step = plan.draw_step(&mut rng, &mut may_be_long);
            if step.length > left {
                break;
            }
            left -= step.length;
            plan.steps.push(step);
        }
        plan
    }

    /// The plan of a seed for servers of which a replica takes over. A primary that
    /// is killed may not have sent its last writes to it; they come back from the
    /// mirrors, but with `discard` they do not.
    pub fn failovers(seed: u64, policy: Option<Policy>, kind: Kind) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let steps = (0..rng.random_range(2..=3)).map(|_| Step {
            fault: Fault::Failover(if rng.random_bool(0.5) {
                Failure::Kill
            } else {
                Failure::Hang
            }),
            target: Target::Everybody,
            length: Duration::ZERO,
            after: After::Recovered,
        });
        let steps = steps.collect();
        Self {
            seed,
            policy: policy.unwrap_or(Policy::Reconcile),
            instances: if rng.random_bool(0.5) { 1 } else { 3 },
            proxied: false,
            persists: false,
            ground: Some(kind),
            steps,
        }
    }

    fn draw_step(&self, rng: &mut impl Rng, may_be_long: &mut bool) -> Step {
        let fault = self.draw_fault(rng);
        let usual = millis(rng, 300..3_000);
        let length = match fault {
            Fault::Hang | Fault::Partition if rng.random_bool(0.25) => millis(rng, 100..250),
            Fault::FlapHang(_) | Fault::FlapReset(_) => millis(rng, 1_500..3_000),
            Fault::Reset => Duration::ZERO,
            _ if *may_be_long => {
                *may_be_long = false;
                millis(rng, 5_000..10_000)
            }
            _ => usual,
        };
        let target = if self.instances > 1 && fault.is_of_the_network() && rng.random_bool(0.7) {
            Target::Instance(rng.random_range(0..self.instances))
        } else {
            Target::Everybody
        };
        let after = if rng.random_bool(0.3) {
            After::Soon(millis(rng, 0..800))
        } else {
            After::Recovered
        };
        Step {
            fault,
            target,
            length,
            after,
        }
    }

    fn draw_fault(&self, rng: &mut impl Rng) -> Fault {
        // Network faults are as frequent as all others, where there are any.
        if self.proxied && rng.random_bool(0.5) {
            return match rng.random_range(0..10) {
                0 => Fault::Delay(millis(rng, 15..50)),
                1 => Fault::Delay(millis(rng, 300..600)),
                2 => Fault::Reset,
                3 => Fault::Partition,
                4 => Fault::Refuse,
                5 => Fault::FlapReset(millis(rng, 100..400)),
                _ => Fault::BlackHole {
                    direction: *[Direction::ToServer, Direction::FromServer, Direction::Both]
                        .choose(rng)
                        .expect("not empty"),
                    reset_after: rng.random_bool(0.5),
                },
            };
        }
        match rng.random_range(0..12) {
            0 | 1 => Fault::Kill,
            2 if self.persists => Fault::Loading(millis(rng, 300..1_500)),
            2..=4 => Fault::Hang,
            5 => Fault::Pause { writes_only: false },
            6 => Fault::Pause { writes_only: true },
            7 => Fault::ReadOnly { serve_stale: true },
            8 => Fault::ReadOnly { serve_stale: false },
            9 => Fault::OutOfMemory,
            10 => Fault::Misconfigured,
            _ => Fault::FlapHang(millis(rng, 100..400)),
        }
    }
}

fn millis(rng: &mut impl Rng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(rng.random_range(range))
}

// === impl Step ===

impl Step {
    /// Whether it strikes this instance.
    pub fn strikes(&self, instance: usize) -> bool {
        match self.target {
            Target::Everybody => true,
            Target::Instance(one) => one == instance,
        }
    }

    /// What it must do to an instance it strikes on a machine that is `stalled` for some
    /// of its length.
    pub fn effect(&self, stalled: Duration) -> Effect {
        let degrades_after = match self.fault {
            Fault::Kill | Fault::Refuse | Fault::AcceptAndClose | Fault::Password => {
                NOTICED_REFUSAL
            }
            Fault::ReadOnly { .. } | Fault::OutOfMemory | Fault::Misconfigured => NOTICED_ERROR,
            Fault::Loading(duration) if self.length + duration < NOTICED_REFUSAL => {
                return Effect::Either;
            }
            // Nobody takes over from one that is silent for less than a second.
            Fault::Loading(_) | Fault::Failover(_) => Duration::ZERO,
            Fault::Hang | Fault::Partition if self.length <= STALL => return Effect::Spares,
            Fault::Hang
            | Fault::Partition
            | Fault::Pause { .. }
            | Fault::BlackHole { .. }
            | Fault::BusyScript
            | Fault::Stragglers(_) => NOTICED_SILENCE,
            // A round trip within the time of one Redis command.
            Fault::Delay(delay) if 2 * delay <= Duration::from_millis(100) => {
                return Effect::Spares;
            }
            Fault::Delay(_) => NOTICED_SILENCE,
            Fault::Reset | Fault::FlapHang(_) | Fault::FlapReset(_) => return Effect::Either,
        };
        if self.length.saturating_sub(stalled) >= degrades_after {
            Effect::Degrades
        } else {
            Effect::Either
        }
    }
}

// === Display ===

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Discard => "discard",
            Self::Reconcile => "reconcile",
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.fault.name())?;
        if let Target::Instance(instance) = self.target {
            write!(f, "@{instance}")?;
        }
        if !self.length.is_zero() {
            write!(f, " {:.1}s", self.length.as_secs_f64())?;
        }
        if let After::Soon(pause) = self.after {
            write!(f, " +{:.1}s", pause.as_secs_f64())?;
        }
        Ok(())
    }
}

impl Plan {
    /// Such as `3 apart, aof`.
    pub fn topology(&self) -> String {
        if let Some(kind) = self.ground {
            return format!("{}, {kind}", self.instances);
        }
        let place = match (self.instances, self.proxied) {
            (1, false) => "1",
            (1, true) => "1 proxied",
            (_, false) => "3",
            (_, true) => "3 apart",
        };
        format!("{place}{}", if self.persists { ", aof" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_is_always_the_same_schedule_and_the_policy_changes_nothing_else() {
        for seed in 0..50 {
            let plan = Plan::draw(seed, None);
            assert_eq!(plan, Plan::draw(seed, None));
            for policy in [Policy::Discard, Policy::Reconcile] {
                let forced = Plan::draw(seed, Some(policy));
                assert_eq!(
                    forced,
                    Plan {
                        policy,
                        ..plan.clone()
                    }
                );
            }
        }
    }

    #[test]
    fn a_hundred_seeds_meet_every_fault_that_is_drawn_in_every_topology() {
        let mut seen = BTreeSet::new();
        let mut topologies = BTreeSet::new();
        for seed in 0..100 {
            let plan = Plan::draw(seed, None);
            topologies.insert((plan.topology(), plan.policy));
            let all: Duration = plan.steps.iter().map(|step| step.length).sum();
            assert!(all <= ALL_FAULTS && !plan.steps.is_empty(), "{plan:?}");
            for step in &plan.steps {
                seen.insert(step.fault.name());
                assert!(plan.proxied || !step.fault.is_of_the_network());
                assert!(plan.persists || !matches!(step.fault, Fault::Loading(_)));
            }
        }
        assert_eq!(seen.len(), 18, "{seen:?}");
        assert_eq!(topologies.len(), 16, "{topologies:?}");
    }
}
