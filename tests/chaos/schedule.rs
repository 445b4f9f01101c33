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
    /// One instance more, which nobody calls before the end.
    pub bystander: bool,
    /// Writers write some keys through any instance.
    pub wanders: bool,
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
/// A clock is moved by less than this, in milliseconds.
const MOST_OF_A_JUMP: i64 = 6_000;
/// Faults of one run last this long together at most.
const ALL_FAULTS: Duration = Duration::from_secs(11);

// === impl Plan ===

impl Plan {
    /// Draws the plan of a seed from everything that can happen there. `policy` takes the
    /// place of the drawn one; nothing else changes with it.
    pub fn of_anything(seed: u64, policy: Option<Policy>, ground: Option<Kind>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let drawn_policy = *[Policy::Discard, Policy::Reconcile]
            .choose(&mut rng)
            .expect("not empty");
        let mut plan = Self {
            seed,
            policy: policy.unwrap_or(drawn_policy),
            instances: if rng.random_bool(0.25) { 1 } else { 3 },
            proxied: rng.random_bool(0.7) && ground.is_none(),
            persists: rng.random_bool(0.3) && ground.is_none(),
            ground,
            bystander: rng.random_bool(0.3),
            wanders: true,
            steps: Vec::new(),
        };
        let mut may_be_long = false;
        for _ in 0..rng.random_range(2..=4) {
            let fault = match ground {
                None if rng.random_bool(0.3) => plan.draw_fault(&mut rng),
                None => plan.draw_loss(&mut rng),
                Some(kind) => draw_failover(kind, &mut rng),
            };
            let step = plan.draw_step(fault, &mut rng, &mut may_be_long);
            plan.steps.push(step);
        }
        plan
    }

    /// Draws the plan of a seed from what keeps instances from using one Redis for a
    /// while. [`Self::of_anything`] came later than seeds that must mean what they meant.
    pub fn of_outages(seed: u64, policy: Option<Policy>) -> Self {
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
            bystander: false,
            wanders: false,
            steps: Vec::new(),
        };
        let count = rng.random_range(2..=5);
        let mut left = ALL_FAULTS;
        let mut may_be_long = rng.random_bool(0.15);
        while plan.steps.len() < count {
            let fault = plan.draw_fault(&mut rng);
            let step = plan.draw_step(fault, &mut rng, &mut may_be_long);
            if step.length > left {
                break;
            }
            left -= step.length;
            plan.steps.push(step);
        }
        plan
    }

    fn draw_step(&self, fault: Fault, rng: &mut impl Rng, may_be_long: &mut bool) -> Step {
        let usual = millis(rng, 300..3_000);
        let length = match fault {
            Fault::Hang | Fault::Partition if rng.random_bool(0.25) => millis(rng, 100..250),
            Fault::FlapHang(_) | Fault::FlapReset(_) => millis(rng, 1_500..3_000),
            Fault::Reset
            | Fault::ClockOfRedis(_)
            | Fault::ClockOfService(_)
            | Fault::MoveSlots
            | Fault::Failover(_) => Duration::ZERO,
            _ if *may_be_long => {
                *may_be_long = false;
                millis(rng, 5_000..10_000)
            }
            _ => usual,
        };
        let may_strike_one =
            self.instances > 1 && fault.is_of_the_network() && rng.random_bool(0.7);
        let target = if may_strike_one || fault.is_of_the_service() {
            Target::Instance(rng.random_range(0..self.instances))
        } else {
            Target::Everybody
        };
        // A server that has failed must be back before the next one may.
        let after = if rng.random_bool(0.3) && self.ground.is_none() {
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

    /// What takes groups away, or moves what is relied on.
    fn draw_loss(&self, rng: &mut impl Rng) -> Fault {
        match rng.random_range(0..8) {
            0 | 1 if self.proxied => Fault::Move,
            2 if self.proxied => Fault::SlowLink(rng.random_range(20..200) << 10),
            3 => Fault::ClockOfRedis(jump(rng)),
            4 => Fault::ClockOfService(jump(rng)),
            5 => Fault::StopService,
            _ if self.persists => Fault::Kill,
            _ => Fault::Rewind,
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

/// What can happen where replicas take over.
fn draw_failover(kind: Kind, rng: &mut impl Rng) -> Fault {
    let failure = *[Failure::Kill, Failure::Hang]
        .choose(rng)
        .expect("not empty");
    match rng.random_range(0..8) {
        0 | 1 => Fault::Failover(failure),
        2 if kind == Kind::Cluster => Fault::MoveSlots,
        3 => Fault::ClockOfService(jump(rng)),
        4 => Fault::StopService,
        _ => Fault::LaggingFailover(failure),
    }
}

/// How far a clock is moved, in milliseconds.
fn jump(rng: &mut impl Rng) -> i64 {
    let millis = rng.random_range(200..MOST_OF_A_JUMP);
    if rng.random_bool(0.5) {
        millis
    } else {
        -millis
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
            Fault::Loading(_) | Fault::Failover(_) | Fault::LaggingFailover(_) => Duration::ZERO,
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
            // Time that the service itself lost is nobody's fault, nor is what time it is.
            Fault::StopService | Fault::ClockOfService(_) | Fault::ClockOfRedis(_) => {
                return Effect::Spares;
            }
            Fault::Reset
            | Fault::FlapHang(_)
            | Fault::FlapReset(_)
            | Fault::Rewind
            | Fault::Move
            | Fault::SlowLink(_)
            | Fault::MoveSlots => return Effect::Either,
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
            let plan = Plan::of_outages(seed, None);
            assert_eq!(plan, Plan::of_outages(seed, None));
            for policy in [Policy::Discard, Policy::Reconcile] {
                let forced = Plan::of_outages(seed, Some(policy));
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
            let plan = Plan::of_outages(seed, None);
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
