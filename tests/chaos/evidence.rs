//! All that is known of a run, as plain values, so that tests can make them by
//! hand.

use std::{collections::BTreeMap, ops::RangeInclusive, time::Duration};

use super::{
    history::{Call, Found, Moment, Role},
    schedule::{Policy, Step},
};
use crate::common::faults::Fault;

/// All that is known of a run.
#[derive(Clone, Debug)]
pub struct Evidence {
    pub policy: Policy,
    /// In the order in which they ended; those of one writer in its order.
    pub calls: Vec<Call>,
    /// What Redis holds at the end, by key.
    pub finals: BTreeMap<String, Found>,
    /// When the writers had stopped and Redis was read.
    pub end: Moment,
    pub faults: Vec<Struck>,
    pub instances: Vec<InstanceRecord>,
    pub stalls: Vec<Stall>,
}

/// A fault as it happened.
#[derive(Clone, Debug)]
pub struct Struck {
    pub step: Step,
    pub began: Moment,
    pub ended: Moment,
    /// When Redis answered a write again, as seen by a new connection over the
    /// way that the instances take.
    pub writable: Moment,
    /// Redis lost data that it had acknowledged, all of it or some.
    pub wiped: bool,
    /// Every instance was in good health before it began, when the schedule looked.
    pub from_health: bool,
    /// The schedule waited for the recovery.
    pub awaited: bool,
}

/// What one instance was seen to do.
#[derive(Clone, Debug, Default)]
pub struct InstanceRecord {
    /// What it has logged during the run.
    pub log: Vec<(Moment, String)>,
    /// From its log.
    pub outages: Vec<Outage>,
    /// From its metrics, in the order of time, the last one after the end.
    pub samples: Vec<Sample>,
    /// What its listing at the end lacked, or had too much.
    pub incomplete: Option<String>,
    /// When it was stopped from outside.
    pub stops: Vec<Stall>,
    /// Why it had not come to rest in time after the end.
    pub unsettled: Option<String>,
    /// What is worse at the end than before the first fault: what calls take, and what
    /// the instance takes.
    pub worse: Vec<String>,
    /// Lines of its log that tell of a panic, and whether it ended by itself.
    pub crashes: Vec<String>,
    /// What its HTTP port should not have answered.
    pub probe_faults: Vec<String>,
    pub first_resident_bytes: usize,
    pub peak_resident_bytes: usize,
    /// `--mirror-max-bytes`.
    pub mirror_max_bytes: usize,
}

/// A time during which the switch was open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outage {
    pub opened: Moment,
    /// None while it lasts.
    pub closed: Option<Moment>,
    /// A line of the log may be written this much before or after what it tells of is
    /// felt by a client.
    pub slack: Duration,
}

/// Counters and gauges of an instance at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// How often the switch has closed.
    pub recoveries: u64,
    /// Groups dropped at recoveries, all together.
    pub discarded: u64,
    /// Groups that it has put back, all together.
    pub put_back: u64,
    pub mirror_bytes: usize,
}

/// A time during which the machine did not run the clients as it should: they
/// cannot tell then who was slow.
#[derive(Clone, Copy, Debug)]
pub struct Stall {
    pub begin: Moment,
    pub end: Moment,
}

// === impl Evidence ===

impl Evidence {
    pub fn calls_of(&self, role: Role) -> impl Iterator<Item = &Call> {
        self.calls.iter().filter(move |call| call.key.role == role)
    }

    /// When Redis lost data: some time within each of these.
    pub fn wipes(&self) -> Vec<RangeInclusive<Moment>> {
        let wiped = self.faults.iter().filter(|struck| struck.wiped);
        wiped.map(|struck| struck.began..=struck.writable).collect()
    }

    /// For how long the machine stood still in this time.
    pub fn stalled(&self, from: Moment, to: Moment) -> Duration {
        let stalls = self.stalls.iter().map(|stall| stall.overlap(from, to));
        stalls.sum()
    }

    /// Gives each outage the slack that the machine has taken about its ends.
    pub fn widen_outages(&mut self) {
        const ABOUT: Duration = Duration::from_secs(1);
        for instance in 0..self.instances.len() {
            for number in 0..self.instances[instance].outages.len() {
                let outage = self.instances[instance].outages[number];
                let ends = [Some(outage.opened), outage.closed];
                let about = |end: Moment| self.stalled(end.saturating_sub(ABOUT), end + ABOUT);
                let longest = ends.into_iter().flatten().map(about).max();
                let slack = Outage::SLACK + longest.unwrap_or_default();
                self.instances[instance].outages[number].slack = slack;
            }
        }
    }
}

// === impl Struck ===

impl Struck {
    /// Whether one instance may have had another Redis than another one during a call.
    pub fn has_two_sides(&self, call: &Call) -> bool {
        let overlaps = self.began <= call.end && call.begin <= self.writable;
        self.step.fault == Fault::Move && overlaps
    }
}

// === impl Outage ===

impl Outage {
    /// The slack on a machine that is not busy.
    pub const SLACK: Duration = Duration::from_millis(100);

    /// Whether the call may have met it.
    pub fn touches(&self, call: &Call) -> bool {
        let closed = self.closed.unwrap_or(Duration::MAX - self.slack);
        self.opened <= call.end + self.slack && closed + self.slack >= call.begin
    }

    pub fn lasts_at(&self, moment: Moment) -> bool {
        self.opened <= moment && self.closed.is_none_or(|closed| closed > moment)
    }
}

// === impl Stall ===

impl Stall {
    pub fn within(&self, call: &Call) -> Duration {
        self.overlap(call.begin, call.end)
    }

    pub fn overlap(&self, from: Moment, to: Moment) -> Duration {
        self.end.min(to).saturating_sub(self.begin.max(from))
    }
}
