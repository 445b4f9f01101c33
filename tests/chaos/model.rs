//! What a key with one writer may hold, as its calls go by.
//!
//! The writer makes one call after the other, so what is stored is known but
//! for calls that failed. The model keeps two sides: what Redis may hold, and
//! while memory answers what memory may hold. A recovery turns the one into the
//! other, by the policy.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::RangeInclusive,
};

use super::{
    evidence::{Outage, Stall},
    history::{Backend, Call, Content, Found, Key, Moment, Reply, Request},
    schedule::Policy,
    verdict::Flaw,
};

/// What the model of every key needs to know of the run.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    pub policy: Policy,
    /// Outages of the key's instance.
    pub outages: &'a [Outage],
    /// When the key's instance was stopped.
    pub stops: &'a [Stall],
    /// When Redis lost data. The instance puts back what it had acknowledged.
    pub wipes: &'a [RangeInclusive<Moment>],
}

/// One key.
pub struct KeyModel<'a> {
    key: Key,
    rules: Rules<'a>,
    /// What Redis may hold.
    redis: Vec<Possible>,
    /// What memory may hold, while it answers.
    memory: Option<Memory>,
    /// A failed write may or may not be in Redis.
    unanswered: bool,
    /// Writes whose caller had given them up before their instance, which was stopped, read
    /// them: a deadline travels as the time that is left. Each may come until that moment.
    late: Vec<(Possible, Moment)>,
    /// Memory may not know the key, since it dropped its own state of it and
    /// has not seen the one of Redis since.
    cold: bool,
    /// What was deleted may have returned until Redis is seen next: after a failed
    /// write, both sides may have been merged.
    merged: bool,
    /// Everything that was ever asked to be stored here, by stamp.
    asked: HashMap<u64, Content>,
    /// The highest revision of each alert that was ever asked to be stored.
    revisions: BTreeMap<String, u32>,
    /// The newest version seen while the group lived.
    floor: Option<i64>,
    /// What each version was seen with.
    versions: HashMap<i64, Content>,
    /// When the call before began.
    previous_begin: Moment,
    /// When the call ended that is taken in, or the run.
    now: Moment,
    /// The switch may have closed since memory answered last.
    recovered_meanwhile: bool,
    /// How often something deleted was seen again, where that is documented.
    pub returned: usize,
}

/// A state that a key may be in.
#[derive(Clone, Debug, PartialEq)]
struct Possible {
    /// None: absent.
    content: Option<Content>,
    /// None: not known.
    version: Option<i64>,
}

/// The memory of an instance as it answers during an outage.
#[derive(Clone)]
struct Memory {
    side: Vec<Possible>,
    dirty: Dirty,
}

/// Whether memory holds a change that Redis does not have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Dirty {
    No,
    Maybe,
    Yes,
}

// === impl KeyModel ===

impl<'a> KeyModel<'a> {
    /// A key at which nothing was ever stored.
    pub fn new(key: Key, rules: Rules<'a>) -> Self {
        Self {
            key,
            rules,
            redis: vec![Possible::absent()],
            memory: None,
            unanswered: false,
            late: Vec::new(),
            cold: false,
            merged: false,
            asked: HashMap::new(),
            revisions: BTreeMap::new(),
            floor: None,
            versions: HashMap::new(),
            previous_begin: Moment::ZERO,
            now: Moment::ZERO,
            recovered_meanwhile: false,
            returned: 0,
        }
    }

    /// Takes in the next call of the key's writer.
    pub fn take_in(&mut self, call: &Call, flaws: &mut Vec<Flaw>) {
        if let Some(Some(content)) = call.request.outcome() {
            self.asked.insert(content.stamp, content.clone());
            for (fingerprint, revision) in &content.alerts {
                let highest = self.revisions.entry(fingerprint.clone()).or_default();
                *highest = (*highest).max(*revision);
            }
        }
        self.pass_time(call.end);
        match call.backend() {
            Some(Backend::Redis) => {
                self.recover();
                let mut side = std::mem::take(&mut self.redis);
                self.answered(&mut side, call, flaws);
                self.redis = side;
                // A Delete that found another version has not shown what is there.
                if !matches!(call.reply, Reply::NotDeleted { version: 1.., .. }) {
                    self.unanswered = false;
                    self.merged = false;
                }
                // What a lost race shows need not be remembered.
                self.cold &= !(call.changed() || call.request == Request::Load);
            }
            Some(Backend::Memory) => {
                let may_have_reached_redis = self.memory.is_none() || self.recovered_meanwhile;
                let mut memory = self.enter_memory();
                let before = memory.side.clone();
                self.answered(&mut memory.side, call, flaws);
                if self.cold && memory.dirty != Dirty::Yes && !call.changed() {
                    // It may yet learn what Redis holds.
                    memory.side = before;
                }
                if call.changed() {
                    memory.dirty = Dirty::Yes;
                }
                if may_have_reached_redis && (call.changed() || lost_to_itself(call).is_some()) {
                    self.redis.extend(Possible::asked(&call.request));
                }
                self.memory = Some(memory);
            }
            None => {
                self.unanswered(&call.request);
                let mut stops = self.rules.stops.iter();
                if let Some(possible) = Possible::asked(&call.request)
                    && let Some(deadline) = call.deadline
                    && let Some(stop) = stops.find(|stop| !stop.within(call).is_zero())
                {
                    self.late.push((possible, stop.end + deadline));
                }
            }
        }
        self.previous_begin = call.begin;
    }

    /// Judges what Redis holds at the end, after the last recovery.
    pub fn finish(&mut self, found: Option<Found>, at: Moment, flaws: &mut Vec<Flaw>) {
        self.pass_time(at);
        self.recover();
        let mut side = std::mem::take(&mut self.redis);
        self.shown(&mut side, found.as_ref(), None, flaws);
    }

    /// Takes in what has happened around the key since the call before.
    fn pass_time(&mut self, end: Moment) {
        self.now = end;
        // A moment may lie within either call, before or after its effect.
        let since = self.previous_begin;
        self.late.retain(|(_, until)| since <= *until);
        for (possible, _) in &self.late {
            self.redis.push(possible.clone());
            if let Some(memory) = &mut self.memory {
                memory.side.push(possible.clone());
            }
        }
        if self
            .rules
            .wipes
            .iter()
            .any(|wipe| *wipe.start() <= end && since <= *wipe.end())
        {
            forget_versions(&mut self.redis);
        }
        let closed = self
            .rules
            .outages
            .iter()
            .filter_map(|outage| Some((outage.closed?, outage.slack)))
            .any(|(closed, slack)| closed + slack >= since && closed <= end + slack);
        self.recovered_meanwhile |= self.memory.is_some() && closed;
    }

    /// Memory answers: it continues from what it held, or from what Redis held.
    fn enter_memory(&mut self) -> Memory {
        let before = self.memory.take();
        if std::mem::take(&mut self.recovered_meanwhile)
            && let Some(before) = before
        {
            // Either it is still the same outage, or the next one.
            self.memory = Some(before.clone());
            self.recover();
            let mut memory = self.fresh_memory();
            memory.side.extend(before.side);
            memory.dirty = before.dirty.min(Dirty::Maybe).max(memory.dirty);
            return memory;
        }
        before.unwrap_or_else(|| self.fresh_memory())
    }

    fn fresh_memory(&self) -> Memory {
        let mut side = self.redis.clone();
        if self.cold {
            side.push(Possible::absent());
        }
        Memory {
            side,
            dirty: if self.unanswered {
                Dirty::Maybe
            } else {
                Dirty::No
            },
        }
    }

    /// The switch has closed, if memory answered before.
    fn recover(&mut self) {
        self.recovered_meanwhile = false;
        let Some(memory) = self.memory.take() else {
            return;
        };
        if self.rules.policy == Policy::Discard {
            self.cold |= memory.dirty > Dirty::No;
            self.floor = None;
            return;
        }
        match memory.dirty {
            Dirty::No => {}
            Dirty::Yes => {
                self.redis = memory.side;
                // What a failed write has left in Redis may be merged in.
                self.merged = self.unanswered;
            }
            Dirty::Maybe => {
                self.redis.extend(memory.side);
                self.merged = true;
            }
        }
        // What is carried over gets a new version.
        forget_versions(&mut self.redis);
    }

    /// A write failed: it happened or it did not.
    fn unanswered(&mut self, request: &Request) {
        let Some(possible) = Possible::asked(request) else {
            return;
        };
        self.unanswered = true;
        if let Some(memory) = &mut self.memory {
            memory.side.push(possible.clone());
            memory.dirty = memory.dirty.max(Dirty::Maybe);
        }
        self.redis.push(possible);
    }

    /// An answer: checks it against what the side may hold, and narrows that.
    fn answered(&mut self, side: &mut Vec<Possible>, call: &Call, flaws: &mut Vec<Flaw>) {
        match (&call.reply, &call.request) {
            (Reply::Written { version, .. }, request) => {
                self.had_version(side, call, flaws);
                let content = request.outcome().flatten().cloned();
                self.saw_version(*version, true, content.as_ref(), flaws);
                *side = vec![Possible {
                    content,
                    version: Some(*version),
                }];
            }
            (Reply::Shown { .. }, _) if let Some(found) = lost_to_itself(call) => {
                flaws.push(Flaw::LostToItself {
                    key: self.key,
                    at: call.end,
                });
                *side = vec![Possible {
                    content: Some(found.content.clone()),
                    version: Some(found.version),
                }];
            }
            (Reply::Shown { found, .. }, _) => {
                self.shown(side, found.as_ref(), Some(call), flaws);
            }
            (Reply::Deleted { version, .. }, _) => {
                if side.iter().any(|possible| possible.content.is_some()) {
                    self.had_version(side, call, flaws);
                } else {
                    self.deleted_seen(*version, call, flaws);
                }
                *side = vec![Possible::absent()];
                self.floor = None;
            }
            (Reply::NotDeleted { version: 0, .. }, _) => self.shown(side, None, Some(call), flaws),
            (Reply::NotDeleted { version, .. }, _) => {
                // What is carried over gets a new version while memory answers.
                side.retain(|possible| possible.content.is_some());
                for possible in side.iter_mut() {
                    possible.version = Some(*version);
                }
                if side.is_empty() {
                    self.deleted_seen(*version, call, flaws);
                    *side = self.anything();
                }
            }
            (Reply::Failed { .. }, _) => {}
        }
    }

    /// A swap or a Delete by version succeeded: that version must have been
    /// there.
    fn had_version(&self, side: &[Possible], call: &Call, flaws: &mut Vec<Flaw>) {
        let expected = match call.request {
            Request::Swap { expected, .. } => expected,
            Request::Delete {
                expected: Some(expected),
            } => expected,
            _ => return,
        };
        if !side.iter().any(|possible| possible.matches(expected)) {
            flaws.push(Flaw::StaleSwap {
                key: self.key,
                at: call.end,
                expected,
            });
        }
    }

    /// The key was seen in this state; `by` no call at the end of a run.
    fn shown(
        &mut self,
        side: &mut Vec<Possible>,
        found: Option<&Found>,
        by: Option<&Call>,
        flaws: &mut Vec<Flaw>,
    ) {
        let content = found.map(|found| &found.content);
        let expected: BTreeSet<_> = side.iter().map(|state| state.content.clone()).collect();
        let known = side.iter().any(|state| state.content.as_ref() == content);
        if !known && self.may_have_returned(&expected, content) {
            self.returned += 1;
        } else if !known {
            let never_written =
                content.is_some_and(|content| self.asked.get(&content.stamp) != Some(content));
            flaws.push(Flaw::Lost {
                key: self.key,
                at: by.map(|call| call.end),
                backend: by.and_then(Call::backend),
                never_written,
                expected: expected.into_iter().collect(),
                found: content.cloned(),
            });
        }
        match found {
            Some(found) => {
                self.saw_version(found.version, false, content, flaws);
            }
            None => self.floor = None,
        }
        *side = vec![Possible {
            content: content.cloned(),
            version: found.map(|found| found.version),
        }];
    }

    /// Whether what was found is what was expected and in addition only what
    /// was deleted here before, where that may return.
    fn may_have_returned(
        &self,
        expected: &BTreeSet<Option<Content>>,
        found: Option<&Content>,
    ) -> bool {
        let Some(found) = found else {
            return false;
        };
        let was_asked = |(fingerprint, revision): (&String, &u32)| {
            self.revisions.get(fingerprint) >= Some(revision)
        };
        self.merged
            && self.asked.contains_key(&found.stamp)
            && found.alerts.iter().all(was_asked)
            && expected.iter().any(|expected| match expected {
                Some(expected) => found.covers(expected),
                None => true,
            })
    }

    /// A group was there although it had been deleted.
    fn deleted_seen(&mut self, version: i64, by: &Call, flaws: &mut Vec<Flaw>) {
        if self.merged {
            self.returned += 1;
        } else {
            flaws.push(Flaw::CameBack {
                key: self.key,
                at: by.end,
                version,
            });
        }
    }

    /// Versions only grow while a group lives, and none comes twice.
    fn saw_version(
        &mut self,
        version: i64,
        is_new: bool,
        content: Option<&Content>,
        flaws: &mut Vec<Flaw>,
    ) {
        if let Some(floor) = self.floor
            && (version < floor || is_new && version == floor)
        {
            flaws.push(Flaw::VersionBackwards {
                key: self.key,
                at: self.now,
                before: floor,
                after: version,
            });
        }
        self.floor = Some(version);
        if let Some(content) = content {
            let before = self.versions.insert(version, content.clone());
            if before.is_some_and(|before| before != *content) {
                flaws.push(Flaw::VersionReused {
                    key: self.key,
                    version,
                });
            }
        }
    }

    fn anything(&self) -> Vec<Possible> {
        let contents = self.asked.values().cloned().map(Some);
        contents
            .chain([None])
            .map(|content| Possible {
                content,
                version: None,
            })
            .collect()
    }
}

// === impl Possible ===

impl Possible {
    fn absent() -> Self {
        Self {
            content: None,
            version: None,
        }
    }

    /// What a write leaves, under a version that is not known; None for a Load.
    fn asked(request: &Request) -> Option<Self> {
        let content = request.outcome()?;
        Some(Self {
            content: content.cloned(),
            version: None,
        })
    }

    /// Whether a swap that expects this version (0: absent) may find it here.
    fn matches(&self, expected: i64) -> bool {
        match (&self.content, self.version) {
            (None, _) => expected == 0,
            (Some(_), Some(version)) => version == expected,
            (Some(_), None) => expected != 0,
        }
    }
}

fn forget_versions(side: &mut [Possible]) {
    for possible in side {
        possible.version = None;
    }
}

/// What the call itself has stored, if it is a swap that was told to have lost
/// its race to that.
fn lost_to_itself(call: &Call) -> Option<&Found> {
    match (&call.reply, &call.request) {
        (
            Reply::Shown {
                found: Some(found), ..
            },
            Request::Swap { content, .. },
        ) if found.content == *content => Some(found),
        _ => None,
    }
}
