//! What can be told from the calls on one key before any order is tried: which
//! call wrote which version, and what each answer says about the moment at which
//! its call took effect.

use std::collections::{HashMap, HashSet};

use groupstate::{
    domain::version::Version,
    store::{Deletion, documents::Condition},
};

use crate::history::{Act, Call, Content, Outcome, Seen, Swapped};

/// The calls on one key, sorted by what is known of them.
#[derive(Debug, Default)]
pub struct Facts {
    /// Calls whose effect is known.
    pub effects: Vec<Effect>,
    /// Writes without an answer, whose content nobody has read.
    pub lost_writes: Lost,
    /// Deletes without an answer.
    pub lost_deletes: Lost,
    /// Which call wrote a version, as far as anybody was told.
    pub writers: HashMap<Version, Content>,
    /// The effects that are possible only while the key holds a version, by
    /// their places.
    pub needing: HashMap<Version, Vec<usize>>,
}

/// A call that is known to have taken effect, once, between two moments.
#[derive(Debug)]
pub struct Effect {
    /// The call, by its place in the history.
    pub call: usize,
    /// It took effect after this moment,
    pub begin: u64,
    /// and before this one: its answer or, if that was lost, the first time that
    /// somebody had read what it wrote.
    pub end: u64,
    pub step: Step,
}

/// What a call did to a key that holds one version or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It found this and changed nothing.
    Found(Option<Version>),
    Wrote(Write),
    /// It removed this version.
    Removed(Version),
}

/// A write of this version over what the condition allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    pub condition: Condition,
    pub version: Version,
}

/// Calls of one kind of which nobody knows whether they took effect, or when.
/// Calls with the same condition are interchangeable, so of each only the moment
/// of its begin is kept.
#[derive(Debug, Default)]
pub struct Lost {
    /// Those that need nothing, in order.
    pub of_anything: Vec<u64>,
    /// Those that need an absent key, in order.
    pub of_nothing: Vec<u64>,
    /// The first of those that need a version. It has its chance but once.
    pub of_version: HashMap<Version, u64>,
}

/// Why the answer to a call, by its place in the history, cannot be true.
#[derive(Debug)]
pub struct Contradiction {
    pub call: usize,
    pub reason: String,
}

/// What was told about contents and versions.
#[derive(Default)]
struct Told {
    /// Contents that may ever be read: those of lost races may not.
    contents: HashSet<Content>,
    versions: HashMap<Content, Version>,
    writers: HashMap<Version, Content>,
    /// When the first call ended that had read a content.
    first_read: HashMap<Content, u64>,
}

// === impl Facts ===

impl Facts {
    pub fn of(calls: &[Call]) -> Result<Self, Contradiction> {
        let told = Told::by(calls)?;
        let mut facts = Self::default();
        for (at, call) in calls.iter().enumerate() {
            facts
                .add(at, call, &told)
                .map_err(|reason| Contradiction { call: at, reason })?;
        }
        facts.lost_writes.sort();
        facts.lost_deletes.sort();
        facts.writers = told.writers;
        for (at, effect) in facts.effects.iter().enumerate() {
            if let Some(version) = effect.step.needs() {
                facts.needing.entry(version).or_default().push(at);
            }
        }
        Ok(facts)
    }

    fn add(&mut self, at: usize, call: &Call, told: &Told) -> Result<(), String> {
        let step = match call.act {
            Act::Load { found } => Step::Found(found.map(|seen| seen.version)),
            Act::Store { content, outcome } => {
                return self.add_write(at, call, content, Condition::Any, outcome, told);
            }
            Act::Swap {
                content,
                expected,
                outcome,
            } => {
                let condition = expected.map_or(Condition::Absent, Condition::Version);
                let outcome = match outcome {
                    Outcome::Known(Swapped::Lost(found)) => {
                        let found = found.map(|seen| seen.version);
                        if found == expected {
                            return Err("it found what it expected".into());
                        }
                        self.add_effect(at, call, Step::Found(found));
                        return Ok(());
                    }
                    Outcome::Known(Swapped::Won(version)) => Outcome::Known(version),
                    Outcome::Unknown => Outcome::Unknown,
                };
                return self.add_write(at, call, content, condition, outcome, told);
            }
            Act::Delete { expected, outcome } => match outcome {
                Outcome::Known(deletion) => deletion_step(expected, deletion)?,
                Outcome::Unknown => {
                    let condition = expected.map_or(Condition::Any, Condition::Version);
                    self.lost_deletes.add(condition, call.begin);
                    return Ok(());
                }
            },
        };
        self.add_effect(at, call, step);
        Ok(())
    }

    fn add_effect(&mut self, at: usize, call: &Call, step: Step) {
        self.effects.push(Effect {
            call: at,
            begin: call.begin,
            end: call.end,
            step,
        });
    }

    fn add_write(
        &mut self,
        at: usize,
        call: &Call,
        content: Content,
        condition: Condition,
        outcome: Outcome<Version>,
        told: &Told,
    ) -> Result<(), String> {
        let Some(&version) = told.versions.get(&content) else {
            // Who reads a content is told its version, so nobody did.
            self.lost_writes.add(condition, call.begin);
            return Ok(());
        };
        let mut end = call.end;
        if outcome == Outcome::Unknown {
            // Somebody has read it, so it took effect, and before that.
            end = told.first_read[&content];
            if end < call.begin {
                return Err(format!("{content} was read before it was written"));
            }
        }
        self.effects.push(Effect {
            call: at,
            begin: call.begin,
            end,
            step: Step::Wrote(Write { condition, version }),
        });
        Ok(())
    }
}

fn deletion_step(expected: Option<Version>, deletion: Deletion) -> Result<Step, String> {
    let Deletion { deleted, version } = deletion;
    match (deleted, version, expected) {
        (true, None, _) => Err("it deleted a document that cannot be read".into()),
        (true, Some(found), Some(expected)) if found != expected => {
            Err("it deleted another version".into())
        }
        (true, Some(found), _) => Ok(Step::Removed(found)),
        (false, Some(found), None) => Err(format!("it found {found} and left it")),
        (false, found, Some(_)) if found == expected => {
            Err("it found what it expected and left it".into())
        }
        (false, found, _) => Ok(Step::Found(found)),
    }
}

// === impl Lost ===

impl Lost {
    fn add(&mut self, condition: Condition, begin: u64) {
        match condition {
            Condition::Any => self.of_anything.push(begin),
            Condition::Absent => self.of_nothing.push(begin),
            Condition::Version(version) => {
                let first = self.of_version.entry(version).or_insert(begin);
                *first = begin.min(*first);
            }
        }
    }

    fn sort(&mut self) {
        self.of_anything.sort_unstable();
        self.of_nothing.sort_unstable();
    }
}

// === impl Told ===

impl Told {
    fn by(calls: &[Call]) -> Result<Self, Contradiction> {
        let mut told = Self::default();
        for call in calls {
            if let Act::Store { content, .. } = call.act {
                told.contents.insert(content);
            }
            if let Act::Swap {
                content, outcome, ..
            } = call.act
                && !matches!(outcome, Outcome::Known(Swapped::Lost(_)))
            {
                told.contents.insert(content);
            }
        }
        for (at, call) in calls.iter().enumerate() {
            told.take_in(call)
                .map_err(|reason| Contradiction { call: at, reason })?;
        }
        Ok(told)
    }

    fn take_in(&mut self, call: &Call) -> Result<(), String> {
        match call.act {
            Act::Load { found: Some(seen) }
            | Act::Swap {
                outcome: Outcome::Known(Swapped::Lost(Some(seen))),
                ..
            } => {
                if !self.contents.contains(&seen.content) {
                    return Err(format!("{} was never written", seen.content));
                }
                let first = self.first_read.entry(seen.content).or_insert(call.end);
                *first = call.end.min(*first);
                self.pair(seen)
            }
            Act::Store { content, .. } | Act::Swap { content, .. } => match call.written() {
                Some(version) => self.pair(Seen { content, version }),
                None => Ok(()),
            },
            Act::Load { .. } | Act::Delete { .. } => Ok(()),
        }
    }

    /// Takes in that a content has a version. Each content is written at most
    /// once, and a version never comes back, not even after a delete.
    fn pair(&mut self, seen: Seen) -> Result<(), String> {
        let Seen { content, version } = seen;
        let known = *self.versions.entry(content).or_insert(version);
        if known != version {
            return Err(format!(
                "{content} was written twice, as {known} and as {version}"
            ));
        }
        let writer = *self.writers.entry(version).or_insert(content);
        if writer != content {
            return Err(format!(
                "{version} is the version of {writer} and of {content}"
            ));
        }
        Ok(())
    }
}

// === impl Step ===

impl Step {
    /// What the key holds after this step, or None if it is not possible while
    /// it holds `stored`.
    pub fn after(self, stored: Option<Version>) -> Option<Option<Version>> {
        match self {
            Self::Found(found) => (found == stored).then_some(stored),
            Self::Wrote(write) => write.after(stored),
            Self::Removed(version) => (stored == Some(version)).then_some(None),
        }
    }

    /// The only version that the key may hold before this step, if there is one.
    pub fn needs(self) -> Option<Version> {
        match self {
            Self::Found(found) => found,
            Self::Removed(version) => Some(version),
            Self::Wrote(write) => match write.condition {
                Condition::Version(version) => Some(version),
                Condition::Any | Condition::Absent => None,
            },
        }
    }
}

// === impl Write ===

impl Write {
    /// As [`Step::after`].
    pub fn after(self, stored: Option<Version>) -> Option<Option<Version>> {
        let is_met = match self.condition {
            Condition::Any => true,
            Condition::Absent => stored.is_none(),
            Condition::Version(version) => stored == Some(version),
        };
        // A version is always greater than the one it replaces.
        (is_met && stored < Some(self.version)).then_some(Some(self.version))
    }
}
