//! The counting of `discard`: at each recovery exactly the groups that were
//! changed in memory are dropped and counted.
//!
//! What a client was told by memory belongs to an outage of its instance, by
//! time. A key with such an acknowledgement is one dropped group, however often
//! it was changed. The count is exact but for keys of which only a failed call
//! is known, groups that may have expired before the recovery, groups that were
//! made and deleted again in memory, and calls that touch two outages: those may
//! be counted.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use super::{
    evidence::{InstanceRecord, Sample},
    history::{Backend, Call, Key, Moment, Reply, Request},
    verdict::Flaw,
};

/// The keys that a recovery drops.
#[derive(Clone, Debug, Default)]
struct Dropped {
    certainly: BTreeSet<Key>,
    maybe: BTreeSet<Key>,
    /// Of the certain ones those that were deleted, and are in Redis, but memory
    /// may have forgotten that.
    forgotten: BTreeSet<Key>,
}

/// What is known of Redis while the calls of an instance go by.
#[derive(Default)]
struct InRedis {
    /// Whether Redis holds a group at a key; no entry where it cannot be told.
    holds: BTreeMap<Key, bool>,
    /// Keys that a recovery has dropped, and of which memory has not seen since
    /// what Redis holds.
    forgotten: BTreeSet<Key>,
}

/// Whether a call changed memory.
#[derive(PartialEq)]
enum Change {
    No,
    Maybe,
    Yes,
}

/// Compares the counter of an instance with what its clients were told.
pub fn judge<'a>(
    instance: usize,
    record: &InstanceRecord,
    calls: impl Iterator<Item = &'a Call>,
    wipes: &[RangeInclusive<Moment>],
    flaws: &mut Vec<Flaw>,
) {
    let mut dropped = vec![Dropped::default(); record.outages.len()];
    let mut redis = InRedis::default();
    let mut previous = Moment::ZERO;
    for call in calls {
        let passed = previous..=call.end;
        previous = call.begin;
        let overlaps = |wipe: &RangeInclusive<Moment>| {
            wipe.start() <= passed.end() && passed.start() <= wipe.end()
        };
        if wipes.iter().any(overlaps) {
            redis.holds.clear();
        }
        for (outage, dropped) in record.outages.iter().zip(&dropped) {
            if outage.closed.is_some_and(|closed| passed.contains(&closed)) {
                redis.forgotten.extend(&dropped.certainly);
                redis.forgotten.extend(&dropped.maybe);
            }
        }
        let change = redis.take_in(call);
        let touched: Vec<usize> = (0..dropped.len())
            .filter(|outage| record.outages[*outage].touches(call))
            .collect();
        // A delete may undo a change of the same outage.
        if matches!(call.reply, Reply::Deleted { .. }) && change == Change::Maybe {
            for outage in &touched {
                dropped[*outage].certainly.remove(&call.key);
            }
        }
        let may_expire = matches!(call.request, Request::StoreBriefly(_));
        match touched[..] {
            [outage] if change == Change::Yes && !may_expire => {
                let dropped = &mut dropped[outage];
                dropped.certainly.insert(call.key);
                dropped.forgotten.remove(&call.key);
                if call.request.outcome() == Some(None) && redis.forgotten.contains(&call.key) {
                    dropped.forgotten.insert(call.key);
                }
            }
            _ if change != Change::No => {
                for outage in touched {
                    dropped[outage].maybe.insert(call.key);
                }
            }
            _ => {}
        }
    }
    compare(instance, record, &dropped, flaws);
}

/// Compares what each recovery has counted with what it has dropped.
fn compare(instance: usize, record: &InstanceRecord, dropped: &[Dropped], flaws: &mut Vec<Flaw>) {
    let mut before = Sample::default();
    for sample in reliable(&record.samples) {
        let closed = record
            .outages
            .iter()
            .filter(|outage| outage.closed.is_some());
        // More recoveries than the log tells of are found elsewhere.
        let to = usize::try_from(sample.recoveries)
            .unwrap_or(0)
            .min(closed.count());
        let from = usize::try_from(before.recoveries).unwrap_or(0).min(to);
        let certainly = |dropped: &Dropped| dropped.certainly.len() as u64;
        let maybe = |dropped: &Dropped| dropped.maybe.difference(&dropped.certainly).count() as u64;
        let forgotten = |dropped: &Dropped| dropped.forgotten.len() as u64;
        let at_least: u64 = dropped[from..to].iter().map(certainly).sum();
        let at_most = at_least + dropped[from..to].iter().map(maybe).sum::<u64>();
        let counted = sample.discarded.saturating_sub(before.discarded);
        if !(at_least..=at_most).contains(&counted) {
            flaws.push(Flaw::Miscounted {
                instance,
                recoveries: before.recoveries + 1..=sample.recoveries,
                at_least,
                at_most,
                counted,
                forgotten: dropped[from..to].iter().map(forgotten).sum(),
            });
        }
        before = *sample;
    }
}

/// The samples that are not from the midst of a recovery: the number of
/// recoveries is the same before and after. And the last one.
fn reliable(samples: &[Sample]) -> impl Iterator<Item = &Sample> {
    let amidst = samples.windows(3).filter_map(|three| {
        let same = three[0].recoveries == three[2].recoveries;
        same.then_some(&three[1])
    });
    amidst.chain(samples.last())
}

// === impl InRedis ===

impl InRedis {
    /// Takes in a call, and says whether it changed memory.
    fn take_in(&mut self, call: &Call) -> Change {
        let Some(backend) = call.backend() else {
            self.holds.remove(&call.key);
            return if call.is_write() {
                Change::Maybe
            } else {
                Change::No
            };
        };
        if backend == Backend::Redis {
            let holds = match &call.reply {
                Reply::Written { .. } => true,
                Reply::Shown { found, .. } => found.is_some(),
                Reply::NotDeleted { version, .. } => *version != 0,
                Reply::Deleted { .. } | Reply::Failed { .. } => false,
            };
            self.holds.insert(call.key, holds);
            if call.changed() || !call.is_write() {
                self.forgotten.remove(&call.key);
            }
            return Change::No;
        }
        match call.reply {
            Reply::Written { .. } => Change::Yes,
            // To delete what Redis does not hold changes nothing in the end.
            Reply::Deleted { .. } if self.holds.get(&call.key) == Some(&true) => Change::Yes,
            // Memory may not know what Redis holds.
            Reply::Deleted { .. } | Reply::NotDeleted { .. } => Change::Maybe,
            Reply::Shown { .. } | Reply::Failed { .. } => Change::No,
        }
    }
}
