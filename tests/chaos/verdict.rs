//! What came of a run, and every way in which a promise can be broken.

use std::{collections::BTreeSet, fmt, ops::RangeInclusive, time::Duration};

use tonic::Code;

use super::{
    history::{Backend, Content, Key, Moment},
    schedule::Step,
};

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    pub flaws: Vec<Flaw>,
    pub calls: usize,
    /// Acknowledged changes.
    pub writes: usize,
    /// Answers that came from memory.
    pub by_memory: usize,
    /// Keys that lost an acknowledged write without leave.
    pub lost: usize,
    /// Groups that `discard` dropped, as counted by the instances.
    pub discarded: u64,
    /// Groups that instances had written and Redis had lost, and that they put back.
    pub put_back: u64,
    /// Failed writes: they happened or not.
    pub unknown: usize,
    /// Deleted things that returned where that is documented.
    pub returned: usize,
    /// Keys that were written through any instance, and are as was acknowledged last.
    pub wandered: usize,
    pub slowest: Duration,
    /// For each fault and instance: from the beginning to the first answer of
    /// memory.
    pub to_memory: Vec<Duration>,
    /// From when Redis could answer to its first answer.
    pub to_redis: Vec<Duration>,
    pub peak_resident_bytes: usize,
    pub peak_mirror_bytes: usize,
    /// The longest stall of the machine.
    pub worst_stall: Duration,
}

/// A broken promise.
#[derive(Clone, Debug, PartialEq)]
pub enum Flaw {
    /// A key was seen in a state that it cannot be in.
    Lost {
        key: Key,
        /// None: at the end.
        at: Option<Moment>,
        backend: Option<Backend>,
        /// What was found was never asked to be stored there.
        never_written: bool,
        expected: Vec<Option<Content>>,
        found: Option<Content>,
    },
    /// An alert added to a shared key is missing at the end.
    LostAlert {
        key: Key,
        fingerprint: String,
    },
    /// An alert that nobody added to a shared key is there at the end.
    AlienAlert {
        key: Key,
        fingerprint: String,
    },
    /// A deleted or expired group was there again.
    CameBack {
        key: Key,
        at: Moment,
        version: i64,
    },
    /// A swap succeeded that expected a version which was not stored.
    StaleSwap {
        key: Key,
        at: Moment,
        expected: i64,
    },
    /// A swap was told to have lost its race, against itself.
    LostToItself {
        key: Key,
        at: Moment,
    },
    VersionBackwards {
        key: Key,
        at: Moment,
        before: i64,
        after: i64,
    },
    /// One version stood for two contents.
    VersionReused {
        key: Key,
        version: i64,
    },
    /// A key that no client uses.
    UnknownKey(String),
    /// At the end a listing was not what Redis held.
    Incomplete {
        instance: usize,
        what: String,
    },
    /// A call took longer than it may.
    Slow {
        key: Key,
        at: Moment,
        took: Duration,
        bound: Duration,
    },
    /// A call failed in a way in which none may.
    Refused {
        key: Key,
        at: Moment,
        code: Code,
        reason: String,
    },
    /// The counter of discarded groups is not what the clients were told.
    Miscounted {
        instance: usize,
        /// Recoveries, counted from 1, that it is about.
        recoveries: RangeInclusive<u64>,
        at_least: u64,
        at_most: u64,
        counted: u64,
        /// Deletes of groups that are in Redis, which memory may have forgotten
        /// after the recovery before.
        forgotten: u64,
    },
    /// Memory answered while the switch was closed.
    MemoryWhileClosed {
        key: Key,
        instance: usize,
        at: Moment,
    },
    /// Redis was not used again in time.
    LateReturn {
        fault: Step,
        instance: usize,
        took: Option<Duration>,
    },
    /// A fault that must make memory answer did not.
    NotNoticed {
        fault: Step,
        instance: usize,
    },
    /// A fault too short or too mild made memory answer.
    Overreaction {
        fault: Step,
        instance: usize,
    },
    Unsettled {
        instance: usize,
        state: String,
    },
    /// An instance is slower than before the first fault, or takes more.
    Worse {
        instance: usize,
        what: String,
    },
    Crashed {
        instance: usize,
        line: String,
    },
    Probe {
        instance: usize,
        fault: String,
    },
    MemoryGrew {
        instance: usize,
        resident_bytes: usize,
        bound: usize,
    },
    MirrorGrew {
        instance: usize,
        bytes: usize,
    },
}

// === impl Verdict ===

impl Verdict {
    /// Keys with one writer that were seen in a state they cannot be in.
    pub fn keys_lost(&self) -> BTreeSet<Key> {
        let lost = self.flaws.iter().filter_map(|flaw| match flaw {
            Flaw::Lost { key, .. } => Some(*key),
            _ => None,
        });
        lost.collect()
    }
}

// === impl Flaw ===

impl Flaw {
    /// What kind of flaw it is, in a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Lost {
                never_written: true,
                ..
            } => "never written",
            Self::Lost { expected, .. } if expected[..] == [None] => "came back",
            Self::Lost { .. } | Self::LostAlert { .. } => "lost",
            Self::AlienAlert { .. } | Self::UnknownKey(_) => "never written",
            Self::CameBack { .. } => "came back",
            Self::StaleSwap { .. } => "stale swap",
            Self::LostToItself { .. } => "lost to itself",
            Self::VersionBackwards { .. } => "version backwards",
            Self::VersionReused { .. } => "version reused",
            Self::Slow { .. } => "slow",
            Self::Refused { .. } => "refused",
            Self::Miscounted { .. } => "miscounted",
            Self::MemoryWhileClosed { .. } => "memory while closed",
            Self::LateReturn { .. } => "late return",
            Self::NotNoticed { .. } => "not noticed",
            Self::Overreaction { .. } => "overreaction",
            Self::Incomplete { .. } => "incomplete",
            Self::Unsettled { .. } => "unsettled",
            Self::Worse { .. } => "worse",
            Self::Crashed { .. } => "crashed",
            Self::Probe { .. } => "probe",
            Self::MemoryGrew { .. } => "memory grew",
            Self::MirrorGrew { .. } => "mirror grew",
        }
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost {
                key,
                at,
                backend,
                never_written,
                expected,
                found,
            } => {
                match (at, backend) {
                    (Some(at), Some(backend)) => write!(f, "{key} at {at:.3?}: {backend:?}")?,
                    _ => write!(f, "{key} at the end: Redis")?,
                }
                let expected: Vec<String> = expected.iter().map(told).collect();
                write!(f, " holds {}, not {}", told(found), expected.join(" or "))?;
                if *never_written {
                    f.write_str("; this was never written")?;
                }
                Ok(())
            }
            Self::LostAlert { key, fingerprint } => {
                write!(f, "{key} at the end: alert {fingerprint} is missing")
            }
            Self::AlienAlert { key, fingerprint } => {
                write!(f, "{key} at the end: nobody added alert {fingerprint}")
            }
            Self::CameBack { key, at, version } => write!(
                f,
                "{key} at {at:.3?}: deleted or expired, but there with version {version}"
            ),
            Self::StaleSwap { key, at, expected } => write!(
                f,
                "{key} at {at:.3?}: succeeded on version {expected}, which was not stored"
            ),
            Self::LostToItself { key, at } => write!(
                f,
                "{key} at {at:.3?}: a swap that had succeeded was told to have lost, to itself"
            ),
            Self::VersionBackwards {
                key,
                at,
                before,
                after,
            } => write!(f, "{key} at {at:.3?}: version {after} came after {before}"),
            Self::VersionReused { key, version } => {
                write!(f, "{key}: version {version} stood for two contents")
            }
            Self::UnknownKey(name) => write!(f, "{name}: no client uses this key"),
            Self::Slow {
                key,
                at,
                took,
                bound,
            } => write!(
                f,
                "{key} at {at:.3?}: a call took {took:.3?}, bound {bound:.3?}"
            ),
            Self::Refused {
                key,
                at,
                code,
                reason,
            } => write!(f, "{key} at {at:.3?}: a call failed with {code:?} {reason}"),
            Self::Miscounted {
                instance,
                recoveries,
                at_least,
                at_most,
                counted,
                forgotten,
            } => write!(
                f,
                "instance {instance}, recoveries {recoveries:?}: counted {counted} discarded groups, \
                 but it was {at_least} to {at_most}, \
                 of which {forgotten} deletes of groups that memory may have forgotten"
            ),
            Self::MemoryWhileClosed { key, instance, at } => write!(
                f,
                "{key} at {at:.3?}: memory of instance {instance} answered with the switch closed"
            ),
            Self::LateReturn {
                fault,
                instance,
                took,
            } => match took {
                Some(took) => write!(
                    f,
                    "after {fault}: instance {instance} took {took:.3?} to return to Redis"
                ),
                None => write!(
                    f,
                    "after {fault}: instance {instance} did not return to Redis"
                ),
            },
            Self::NotNoticed { fault, instance } => {
                write!(f, "{fault}: memory of instance {instance} never answered")
            }
            Self::Overreaction { fault, instance } => {
                write!(f, "{fault}: memory of instance {instance} answered")
            }
            Self::Incomplete { instance, what } => {
                write!(f, "instance {instance} at the end: its listing {what}")
            }
            Self::Unsettled { instance, state } => {
                write!(f, "instance {instance} did not come to rest: {state}")
            }
            Self::Worse { instance, what } => {
                write!(
                    f,
                    "instance {instance}, worse than before the first fault: {what}"
                )
            }
            Self::Crashed { instance, line } => write!(f, "instance {instance}: {line}"),
            Self::Probe { instance, fault } => write!(f, "instance {instance}: {fault}"),
            Self::MemoryGrew {
                instance,
                resident_bytes,
                bound,
            } => write!(
                f,
                "instance {instance} holds {resident_bytes} bytes, bound {bound}"
            ),
            Self::MirrorGrew { instance, bytes } => {
                write!(f, "instance {instance}: the mirror takes {bytes} bytes")
            }
        }
    }
}

fn told(content: &Option<Content>) -> String {
    content
        .as_ref()
        .map_or_else(|| "nothing".to_owned(), ToString::to_string)
}
