//! Decides whether the calls on one key, which overlapped, could have happened
//! one after the other: each in one step, at some moment between its begin and
//! its end, with just these answers.
//!
//! # The model
//!
//! A key holds a version or nothing. Store writes a version over anything;
//! CompareAndSwap only over the expected one, or over nothing; Delete removes
//! any version, or the expected one; Load changes nothing. A new version is
//! greater than the one it replaces. A version belongs to one write for ever, so
//! it stands for the content too.
//!
//! # The search
//!
//! It is that of Wing and Gong with Lowe's memory of what was tried, in its
//! just-in-time form: it walks through the history once and keeps every
//! [`World`] that the answers so far allow. When a call ends, each world in which
//! it has not happened yet is continued by calls that are under way until it has.
//! A history in which no world is left is not linearizable, and the call that
//! ended last is the one that cannot be explained, which makes a failure easy to
//! read.
//!
//! Two things keep the worlds few. A call that changes nothing happens as soon as
//! it can. And a version never comes back, so no world leaves one while a call
//! that needs it has still to happen.
//!
//! What has no answer would make them many all the same, since it may happen at
//! any time or never:
//!
//! - A write whose content was read has happened before that read ended, and its
//!   version is known from it (`facts.rs`). It is a call like any other.
//! - A write whose content nobody has read can be left out, unless a delete tells
//!   of a version that nobody else knows. Then it happens right before the first
//!   call that met that version.
//! - A lost delete happens right before the first call that met its result. Any
//!   moment before that would do as well, and if there is no such call, never is
//!   as good.
//!
//! Lost calls of one kind are interchangeable, so a world only counts them. This
//! relies on one thing about clients: they expect only versions that they were
//! told. Whether the short cuts are sound is seen in `slow_judge.rs`.
//!
//! # Why it was written here
//!
//! The crate `stateright` has a tester of linearizability. It tries all orders
//! without remembering those that came to the same, and knows calls without
//! answer only as the last ones of their clients. That is made for models of ten
//! calls; here are hundreds a key. Its answers are values that the model
//! foretells, where ours are versions that only Redis can choose.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
};

use groupstate::domain::version::Version;

use crate::{
    facts::{Contradiction, Facts, Step},
    history::Call,
};

/// A history that no order of its calls explains.
#[derive(Debug)]
pub struct Violation {
    /// What cannot be.
    reason: String,
    /// The call whose answer shows it.
    call: Call,
    /// Calls on the same key from shortly before.
    before: Vec<Call>,
}

/// One way in which things may stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct World {
    /// What the key holds.
    stored: Option<Version>,
    /// The calls under way that have happened already.
    happened: BTreeSet<usize>,
    used: Used,
}

/// How many lost calls of each kind have happened. Which ones does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Used {
    /// Deletes of any version.
    deletes: usize,
    /// Stores.
    stores: usize,
    /// Swaps that create.
    creates: usize,
}

/// The walk through a history.
struct Search<'a> {
    facts: &'a Facts,
    /// The moment that was reached.
    now: u64,
    /// The calls that have begun and not ended.
    under_way: BTreeSet<usize>,
    /// All that may be true; never empty.
    worlds: HashSet<World>,
}

/// What happens to a call in a search.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Begins,
    Ends,
}

/// Checks the calls on one key. Each must have written a content of its own.
pub fn check(calls: &[Call]) -> Result<(), Violation> {
    let facts = Facts::of(calls).map_err(|found| Violation::new(calls, found))?;
    Search::new(&facts)
        .run()
        .map_err(|found| Violation::new(calls, found))
}

// === impl Search ===

impl<'a> Search<'a> {
    /// Far more worlds than a history has shown, which is some fifty. A search
    /// that meets as many would not end within the time of a test.
    const MOST_WORLDS: usize = 10_000;

    fn new(facts: &'a Facts) -> Self {
        Self {
            facts,
            now: 0,
            under_way: BTreeSet::new(),
            worlds: HashSet::from([World::default()]),
        }
    }

    fn run(mut self) -> Result<(), Contradiction> {
        let mut events = Vec::with_capacity(self.facts.effects.len() * 2);
        for (at, effect) in self.facts.effects.iter().enumerate() {
            events.push((effect.begin, Event::Begins, at));
            events.push((effect.end, Event::Ends, at));
        }
        events.sort_unstable();
        for (now, event, at) in events {
            self.now = now;
            match event {
                Event::Begins => self.begin(at),
                Event::Ends => self.end(at)?,
            }
        }
        Ok(())
    }

    fn begin(&mut self, call: usize) {
        self.under_way.insert(call);
        let worlds = std::mem::take(&mut self.worlds);
        self.worlds = worlds.into_iter().map(|w| self.settle(w)).collect();
    }

    /// Leaves the worlds in which the call has happened.
    fn end(&mut self, call: usize) -> Result<(), Contradiction> {
        let mut to_continue: Vec<_> = self.worlds.iter().cloned().collect();
        let mut tried = std::mem::take(&mut self.worlds);
        while let Some(mut world) = to_continue.pop() {
            if world.happened.remove(&call) {
                self.worlds.insert(world);
                continue;
            }
            for next in self.under_way.difference(&world.happened) {
                for mut after in self.ways(&world, *next) {
                    after.happened.insert(*next);
                    let after = self.settle(after);
                    if tried.insert(after.clone()) {
                        to_continue.push(after);
                    }
                }
            }
            assert!(tried.len() < Self::MOST_WORLDS, "the search is too wide");
        }
        self.under_way.remove(&call);
        self.worlds = without_waste(std::mem::take(&mut self.worlds));
        if self.worlds.is_empty() {
            return Err(Contradiction {
                call: self.facts.effects[call].call,
                reason: no_order(&tried),
            });
        }
        Ok(())
    }

    /// Lets happen what is under way and changes nothing: there is no better
    /// moment for a call that found what the key holds now.
    fn settle(&self, mut world: World) -> World {
        for &call in &self.under_way {
            if self.facts.effects[call].step == Step::Found(world.stored) {
                world.happened.insert(call);
            }
        }
        world
    }

    /// The worlds to which a call leads. Calls without answer take part only if
    /// it is not possible without them.
    fn ways(&self, world: &World, call: usize) -> Vec<World> {
        let step = self.facts.effects[call].step;
        if step.after(world.stored).is_some() {
            return self.after(world, call).into_iter().collect();
        }
        let emptied = self.emptied(world);
        let after_delete = emptied.iter().filter_map(|world| self.after(world, call));
        let mut ways: Vec<_> = after_delete.collect();
        if let Some(version) = step.needs()
            && !self.facts.writers.contains_key(&version)
        {
            let starts = [Some(world), emptied.as_ref()].into_iter().flatten();
            let written = starts.filter_map(|start| self.written(start, version));
            ways.extend(written.filter_map(|written| self.after(&written, call)));
        }
        ways
    }

    /// The world after a call, if it is possible as things stand.
    fn after(&self, world: &World, call: usize) -> Option<World> {
        let stored = self.facts.effects[call].step.after(world.stored)?;
        let leaves = stored != world.stored;
        (!leaves || self.may_leave(world, Some(call))).then(|| world.holding(stored))
    }

    /// Whether all calls have happened, but this one, that need what the key
    /// holds. It will not come back.
    fn may_leave(&self, world: &World, but: Option<usize>) -> bool {
        let needing = world.stored.and_then(|held| self.facts.needing.get(&held));
        needing.into_iter().flatten().all(|&call| {
            let begun = self.facts.effects[call].begin < self.now;
            let ended = begun && !self.under_way.contains(&call);
            ended || Some(call) == but || world.happened.contains(&call)
        })
    }

    /// The world after a lost delete, if there is one left that was made before.
    fn emptied(&self, world: &World) -> Option<World> {
        let stored = world.stored?;
        if !self.may_leave(world, None) {
            return None;
        }
        let lost = &self.facts.lost_deletes;
        let mut emptied = world.holding(None);
        if self.was_made(lost.of_version.get(&stored)) {
            Some(emptied)
        } else if self.was_made(lost.of_anything.get(world.used.deletes)) {
            emptied.used.deletes += 1;
            Some(emptied)
        } else {
            None
        }
    }

    /// The world after a lost write of this version, if there is one left that
    /// was made before: the one with the narrowest condition, since the others
    /// will do where that one does.
    fn written(&self, world: &World, version: Version) -> Option<World> {
        if world.stored >= Some(version) || !self.may_leave(world, None) {
            return None;
        }
        let lost = &self.facts.lost_writes;
        let mut written = world.holding(Some(version));
        let narrowest = match world.stored {
            Some(stored) => lost.of_version.get(&stored),
            None => lost.of_nothing.get(world.used.creates),
        };
        if self.was_made(narrowest) {
            // A lost swap needs no count: what it needs never comes back.
            written.used.creates += usize::from(world.stored.is_none());
            Some(written)
        } else if self.was_made(lost.of_anything.get(world.used.stores)) {
            written.used.stores += 1;
            Some(written)
        } else {
            None
        }
    }

    fn was_made(&self, begin: Option<&u64>) -> bool {
        begin.is_some_and(|begin| *begin < self.now)
    }
}

/// Leaves out worlds that have come no further than others by more lost calls.
fn without_waste(worlds: HashSet<World>) -> HashSet<World> {
    let mut alike: HashMap<_, Vec<Used>> = HashMap::new();
    for World {
        stored,
        happened,
        used,
    } in worlds
    {
        let thrifty = alike.entry((stored, happened)).or_default();
        if !thrifty.iter().any(|other| other.is_within(used)) {
            thrifty.retain(|other| !used.is_within(*other));
            thrifty.push(used);
        }
    }
    let alike = alike.into_iter();
    let worlds = alike.flat_map(|((stored, happened), thrifty)| {
        thrifty.into_iter().map(move |used| World {
            stored,
            happened: happened.clone(),
            used,
        })
    });
    worlds.collect()
}

/// What the key could have held, in all worlds that were tried in vain.
fn no_order(tried: &HashSet<World>) -> String {
    let held: BTreeSet<_> = tried.iter().map(|world| world.stored).collect();
    let held: Vec<_> = held
        .into_iter()
        .map(|stored| stored.map_or("nothing".into(), |version| version.to_string()))
        .collect();
    format!("the key may have held {}", held.join(" or "))
}

// === impl World ===

impl World {
    fn holding(&self, stored: Option<Version>) -> Self {
        Self {
            stored,
            ..self.clone()
        }
    }
}

// === impl Used ===

impl Used {
    fn is_within(self, other: Self) -> bool {
        self.deletes <= other.deletes
            && self.stores <= other.stores
            && self.creates <= other.creates
    }
}

// === impl Violation ===

impl Violation {
    /// How many calls from before are shown.
    const SHOWN_BEFORE: usize = 20;

    fn new(calls: &[Call], found: Contradiction) -> Self {
        let call = calls[found.call].clone();
        let mut before: Vec<_> = calls
            .iter()
            .enumerate()
            .filter(|(at, other)| *at != found.call && other.begin < call.end)
            .map(|(_, other)| other.clone())
            .collect();
        before.sort_unstable_by_key(|call| call.begin);
        before.drain(..before.len().saturating_sub(Self::SHOWN_BEFORE));
        Self {
            reason: found.reason,
            call,
            before,
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "not linearizable: {}\n  {}", self.reason, self.call)?;
        writeln!(f, "after, on the same key:")?;
        for call in &self.before {
            writeln!(f, "  {call}")?;
        }
        Ok(())
    }
}
