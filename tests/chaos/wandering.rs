//! Keys that are written through any instance, one call after the other: what Redis has
//! acknowledged to one instance is what all have to know, whatever they knew before.
//!
//! A writer gives such a key up as soon as it does not know what Redis holds, so what is
//! expected is always the last that was acknowledged. Until Redis loses something every
//! answer of it must be just that. At the end it must be there again: no alert of it may
//! be missing, and what was deleted or has expired must be gone, whatever an instance
//! that had not heard of it has put back meanwhile.

use std::collections::BTreeMap;

use super::{
    evidence::Evidence,
    history::{Backend, Call, Content, Found, Key, Moment, Reply, Request, Role},
    verdict::{Flaw, Verdict},
};

/// What is known of one key.
struct Track {
    key: Key,
    /// What was acknowledged last; None for absent.
    expected: Option<Content>,
    /// Stored for a second: it may be gone, and at the end it must be.
    is_brief: bool,
    asked: BTreeMap<String, u32>,
    /// What each version was given to.
    versions: BTreeMap<i64, Content>,
    /// What is acknowledged now may be overwritten by nobody's fault.
    is_disputed: bool,
}

/// Judges every key that wandered.
pub fn judge(evidence: &Evidence, verdict: &mut Verdict) {
    let first_loss = evidence.wipes().iter().map(|wipe| *wipe.start()).min();
    let mut keys: BTreeMap<Key, Vec<&Call>> = BTreeMap::new();
    for call in evidence.calls_of(Role::Wandering) {
        keys.entry(call.key).or_default().push(call);
    }
    for (key, calls) in keys {
        let mut track = Track::new(key);
        let is_known = calls
            .into_iter()
            .all(|call| track.take_in(call, evidence, first_loss, &mut verdict.flaws));
        if is_known && !track.is_disputed {
            let found = evidence.finals.get(&key.to_string());
            track.finish(found, first_loss.is_some(), evidence.end, verdict);
        }
    }
}

// === impl Track ===

impl Track {
    /// A key at which nothing was ever stored.
    fn new(key: Key) -> Self {
        Self {
            key,
            expected: None,
            is_brief: false,
            asked: BTreeMap::new(),
            versions: BTreeMap::new(),
            is_disputed: false,
        }
    }

    /// Takes in the next call of its writer. False if it is not known any more what
    /// Redis holds.
    fn take_in(
        &mut self,
        call: &Call,
        evidence: &Evidence,
        first_loss: Option<Moment>,
        flaws: &mut Vec<Flaw>,
    ) -> bool {
        if let Some(Some(content)) = call.request.outcome() {
            for (fingerprint, revision) in &content.alerts {
                let asked = self.asked.entry(fingerprint.clone()).or_default();
                *asked = (*asked).max(*revision);
            }
        }
        if call.backend() != Some(Backend::Redis) {
            return !call.is_write();
        }
        let mut faults = evidence.faults.iter();
        self.is_disputed |= call.is_write() && faults.any(|struck| struck.has_two_sides(call));
        let is_sure = first_loss.is_none_or(|loss| call.end < loss);
        let seen = match &call.reply {
            Reply::Shown { found, .. } => Some(found.as_ref().map(|found| &found.content)),
            Reply::NotDeleted { version: 0, .. } => Some(None),
            _ => None,
        };
        if let Some(seen) = seen
            && is_sure
            && !self.may_be(seen)
        {
            flaws.push(self.lost(seen, Some(call)));
        }
        match (&call.reply, &call.request) {
            (Reply::Written { version, .. }, request) => {
                self.expected = request.outcome().flatten().cloned();
                let content = self.expected.clone().expect("a write stores something");
                if self.versions.insert(*version, content).is_some() {
                    flaws.push(Flaw::VersionReused {
                        key: self.key,
                        version: *version,
                    });
                }
                self.is_brief = matches!(request, Request::StoreBriefly(_));
            }
            // That it is not there is acknowledged, too.
            (Reply::Deleted { .. } | Reply::NotDeleted { version: 0, .. }, _) => {
                self.expected = None;
            }
            _ => {}
        }
        true
    }

    /// Judges what Redis holds at the end.
    fn finish(&self, found: Option<&Found>, is_lossy: bool, at: Moment, verdict: &mut Verdict) {
        verdict.wandered += 1;
        let version = found.map_or(0, |found| found.version);
        let found = found.map(|found| &found.content);
        let holds = match (&self.expected, found) {
            (Some(_), None) => self.is_brief,
            (None, Some(_)) => false,
            (Some(_), Some(_)) if self.is_brief => false,
            (Some(expected), Some(found)) if is_lossy => {
                // Who did not know of it in time may have built on what was there before;
                // then the two are merged.
                let was_asked = |(fingerprint, revision): (&String, &u32)| {
                    self.asked.get(fingerprint) >= Some(revision)
                };
                found.covers(expected) && found.alerts.iter().all(was_asked)
            }
            (expected, found) => expected.as_ref() == found,
        };
        if !holds && self.is_brief {
            verdict.flaws.push(Flaw::CameBack {
                key: self.key,
                at,
                version,
            });
        } else if !holds {
            verdict.flaws.push(self.lost(found, None));
        }
    }

    fn may_be(&self, seen: Option<&Content>) -> bool {
        seen == self.expected.as_ref() || self.is_brief && seen.is_none()
    }

    fn lost(&self, found: Option<&Content>, by: Option<&Call>) -> Flaw {
        Flaw::Lost {
            key: self.key,
            at: by.map(|call| call.end),
            backend: by.and_then(Call::backend),
            never_written: found.is_some_and(|found| {
                found
                    .alerts
                    .keys()
                    .any(|alert| !self.asked.contains_key(alert))
            }),
            expected: vec![self.expected.clone()],
            found: found.cloned(),
        }
    }
}
