//! A judge that tries every order of a few calls, and every version that a call
//! without an answer may have written. It knows none of the short cuts of
//! `checker.rs`, which must come to the same verdict.

use std::collections::BTreeSet;

use groupstate::{domain::version::Version, store::Deletion};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    checker,
    history::{Act, Call, Content, Outcome, Seen, Swapped},
};

/// What a key holds, as far as the slow judge has made it up.
#[derive(Clone, Debug, Default)]
struct Key {
    /// The content and its version; None for a version that nobody was told.
    stored: Option<(Content, Option<Version>)>,
    /// The greatest version in the life of the key, of those that were told.
    highest: Option<Version>,
    /// The versions that were given.
    given: BTreeSet<Version>,
}

/// A key that does what it is asked, to make histories.
#[derive(Debug, Default)]
struct Model {
    stored: Option<Seen>,
    /// Not the greatest one: versions fall when a key is created anew.
    taken: BTreeSet<Version>,
}

// === the slow judge ===

fn has_an_order(calls: &[Call]) -> bool {
    let versions = versions_named(calls);
    let all: Vec<usize> = (0..calls.len()).collect();
    go_on(calls, &versions, &all, &Key::default())
}

/// Whether the calls that are left can follow on what the key holds.
fn go_on(calls: &[Call], versions: &BTreeSet<Version>, left: &[usize], key: &Key) -> bool {
    // What is unknown may never happen.
    if left.iter().all(|&at| calls[at].is_unknown()) {
        return true;
    }
    let known = left.iter().filter(|&&at| !calls[at].is_unknown());
    let first_end = known.map(|&at| calls[at].end).min();
    left.iter().any(|&next| {
        let may_be_next = first_end.is_none_or(|end| calls[next].begin <= end);
        let rest: Vec<_> = left.iter().copied().filter(|&at| at != next).collect();
        may_be_next
            && happen(&calls[next].act, key, versions)
                .iter()
                .any(|after| go_on(calls, versions, &rest, after))
    })
}

/// Every state in which the key may be once this has happened.
fn happen(act: &Act, key: &Key, versions: &BTreeSet<Version>) -> Vec<Key> {
    let only_if = |holds: bool, after: Key| if holds { vec![after] } else { Vec::new() };
    let version = key.stored.map(|(_, version)| version);
    match *act {
        Act::Load { found } => only_if(key.holds(found), key.clone()),
        Act::Store { content, outcome } => key.written(content, outcome, versions),
        Act::Swap {
            content,
            expected,
            outcome,
        } => {
            let is_met = version == expected.map(Some);
            match outcome {
                Outcome::Known(Swapped::Lost(found)) => {
                    only_if(!is_met && key.holds(found), key.clone())
                }
                _ if !is_met => Vec::new(),
                Outcome::Known(Swapped::Won(version)) => {
                    key.written(content, Outcome::Known(version), versions)
                }
                Outcome::Unknown => key.written(content, Outcome::Unknown, versions),
            }
        }
        Act::Delete { expected, outcome } => {
            let is_met = expected.is_none() || version == expected.map(Some);
            let deletes = key.stored.is_some() && is_met;
            let after = if deletes { key.emptied() } else { key.clone() };
            match outcome {
                Outcome::Unknown => vec![after],
                Outcome::Known(told) => {
                    let is_told = told.version.map(Some) == version && told.deleted == deletes;
                    only_if(is_told, after)
                }
            }
        }
    }
}

/// All versions that any call names.
fn versions_named(calls: &[Call]) -> BTreeSet<Version> {
    let named = calls.iter().flat_map(|call| [told(call), expected(call)]);
    named.flatten().collect()
}

/// The version of which an answer tells.
fn told(call: &Call) -> Option<Version> {
    match call.act {
        Act::Load { found }
        | Act::Swap {
            outcome: Outcome::Known(Swapped::Lost(found)),
            ..
        } => found.map(|seen| seen.version),
        Act::Delete {
            outcome: Outcome::Known(deletion),
            ..
        } => deletion.version,
        _ => call.written(),
    }
}

fn expected(call: &Call) -> Option<Version> {
    match call.act {
        Act::Swap { expected, .. } | Act::Delete { expected, .. } => expected,
        Act::Load { .. } | Act::Store { .. } => None,
    }
}

/// Whether clients expect only what somebody was told before. The quick judge
/// relies on that where answers are missing.
fn nobody_guesses(calls: &[Call]) -> bool {
    calls.iter().filter(|call| call.is_unknown()).all(|call| {
        let mut before = calls.iter().filter(|other| other.end < call.begin);
        let expected = expected(call);
        expected.is_none() || before.any(|other| told(other) == expected)
    })
}

// === impl Key ===

impl Key {
    fn holds(&self, found: Option<Seen>) -> bool {
        self.stored == found.map(|seen| (seen.content, Some(seen.version)))
    }

    fn emptied(&self) -> Self {
        Self {
            stored: None,
            highest: None,
            ..self.clone()
        }
    }

    fn written(
        &self,
        content: Content,
        outcome: Outcome<Version>,
        versions: &BTreeSet<Version>,
    ) -> Vec<Self> {
        let candidates = match outcome {
            Outcome::Known(version) => vec![Some(version)],
            Outcome::Unknown => {
                let told = versions.iter().copied().map(Some);
                told.chain([None]).collect()
            }
        };
        let possible = candidates.into_iter().filter(|version| {
            version.is_none_or(|new| Some(new) > self.highest && !self.given.contains(&new))
        });
        possible
            .map(|version| {
                let mut after = self.clone();
                after.stored = Some((content, version));
                after.highest = version.or(self.highest);
                after.given.extend(version);
                after
            })
            .collect()
    }
}

// === impl Model ===

impl Model {
    fn write(&mut self, content: Content, dice: &mut StdRng) -> Version {
        let lowest = self.stored.map_or(1, |seen| seen.version.get() + 1);
        let mut versions = (lowest..).filter_map(Version::new);
        let skip = dice.random_range(0..2);
        let free = |version: &Version| !self.taken.contains(version);
        let version = versions.by_ref().filter(free).nth(skip);
        let version = version.expect("versions do not end");
        self.taken.insert(version);
        self.stored = Some(Seen { content, version });
        version
    }

    /// Makes a call and gives the true answer.
    fn call(&mut self, content: Content, dice: &mut StdRng) -> Act {
        let stored = self.stored.map(|seen| seen.version);
        let expected = match dice.random_range(0..3) {
            0 => stored,
            1 => Version::new(dice.random_range(0..4)),
            _ => None,
        };
        match dice.random_range(0..4) {
            0 => Act::Load { found: self.stored },
            1 => Act::Store {
                content,
                outcome: Outcome::Known(self.write(content, dice)),
            },
            2 => Act::Swap {
                content,
                expected,
                outcome: Outcome::Known(if stored == expected {
                    Swapped::Won(self.write(content, dice))
                } else {
                    Swapped::Lost(self.stored)
                }),
            },
            _ => {
                let deleted = stored.is_some() && (expected.is_none() || stored == expected);
                if deleted {
                    self.stored = None;
                }
                let version = stored;
                let outcome = Outcome::Known(Deletion { deleted, version });
                Act::Delete { expected, outcome }
            }
        }
    }
}

/// Calls of which some overlap, each answered truly at some moment of it; then
/// some answers are lost, and some calls change places.
fn some_calls(dice: &mut StdRng) -> Vec<Call> {
    let mut model = Model::default();
    let mut calls: Vec<_> = (0..dice.random_range(2..9))
        .map(|at| Call {
            // Begins are even and ends are odd, so no two events are at once.
            begin: 1_000 + 100 * at - 2 * dice.random_range(0..80),
            end: 1_001 + 100 * at + 2 * dice.random_range(0..80),
            act: model.call(Content(at), dice),
        })
        .collect();
    for call in &mut calls {
        if dice.random_bool(0.3) {
            match &mut call.act {
                Act::Load { .. } => {}
                Act::Store { outcome, .. } => *outcome = Outcome::Unknown,
                Act::Swap { outcome, .. } => *outcome = Outcome::Unknown,
                Act::Delete { outcome, .. } => *outcome = Outcome::Unknown,
            }
        }
    }
    for _ in 0..dice.random_range(0..3) {
        let (one, other) = (
            dice.random_range(0..calls.len()),
            dice.random_range(0..calls.len()),
        );
        let act = calls[one].act.clone();
        calls[one].act = std::mem::replace(&mut calls[other].act, act);
    }
    calls
}

#[test]
fn the_quick_judge_says_what_the_slow_one_says() {
    let (mut judged, mut with_order) = (0, 0);
    const HISTORIES: u64 = 20_000;
    for seed in 0..HISTORIES {
        let calls = some_calls(&mut StdRng::seed_from_u64(seed));
        if !nobody_guesses(&calls) {
            continue;
        }
        judged += 1;
        let verdict = checker::check(&calls);
        let slow_verdict = has_an_order(&calls);
        with_order += u64::from(slow_verdict);
        if verdict.is_ok() != slow_verdict {
            let calls: Vec<_> = calls.iter().map(ToString::to_string).collect();
            let calls = calls.join("\n");
            panic!("seed {seed}: {verdict:?}, the slow judge: {slow_verdict}\n{calls}");
        }
    }
    println!("{with_order} of {judged} have an order");
}
