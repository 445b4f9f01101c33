//! What Redis may have lost, as far as it is known.

use std::{fmt, sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::domain::{group::GroupKey, version::Version};

/// Keys of groups, by what they have in common.
pub type Keys = Arc<dyn Fn(&GroupKey) -> bool + Send + Sync>;

/// A server of Redis may have lost something.
#[derive(Clone)]
pub struct Loss {
    /// The keys that it holds; None: all keys.
    pub keys: Option<Keys>,
    /// It still holds, or has seen replaced, what it had answered before this moment.
    /// None: it may have lost anything.
    pub since: Option<Instant>,
    /// Whether only deletes are meant.
    pub of_deletes: bool,
    /// What time it was there when it was found: the version of a group that is made
    /// there later is no less. None: it is not known.
    pub found_at: Option<Version>,
    /// A version that is no later than the loss: what is stored under a later one may have
    /// been written by somebody who did not know what was lost. None: it is not known.
    pub last_heard: Option<Version>,
}

/// The versions of the losses of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Around {
    /// See [`Loss::found_at`]: of the last loss.
    pub found_at: Option<Version>,
    /// See [`Loss::last_heard`]: of the first loss.
    pub last_heard: Option<Version>,
}

/// The losses that entries may not have been told of yet.
#[derive(Debug, Default)]
pub struct Losses {
    /// Each with the epoch that began with it, the latest last.
    known: Vec<(u64, Loss)>,
}

// === impl Loss ===

impl Loss {
    /// Everything may be lost.
    pub const ALL: Self = Self {
        keys: None,
        since: None,
        of_deletes: false,
        found_at: None,
        last_heard: None,
    };

    /// The same, but of deletes only.
    pub fn of_deletes(&self) -> Self {
        Self {
            of_deletes: true,
            ..self.clone()
        }
    }

    fn is_of(&self, key: &GroupKey) -> bool {
        self.keys.as_ref().is_none_or(|holds| holds(key))
    }

    /// Both in one.
    fn or(&self, other: &Self) -> Self {
        Self {
            keys: None,
            since: self.since.min(other.since),
            of_deletes: self.of_deletes && other.of_deletes,
            found_at: self.found_at.max(other.found_at),
            last_heard: self.last_heard.min(other.last_heard),
        }
    }
}

impl fmt::Debug for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loss")
            .field("of_some_keys", &self.keys.is_some())
            .field("since", &self.since)
            .field("of_deletes", &self.of_deletes)
            .finish()
    }
}

// === impl Losses ===

impl Losses {
    /// Others know less well until when nothing was lost. What they put back for that may
    /// have been deleted here so much earlier.
    const OTHERS_ARE_BEHIND: Duration = Duration::from_secs(10);

    /// Of more than this the two oldest become one, which is larger than both.
    const MOST: usize = 16;

    pub fn add(&mut self, epoch: u64, loss: Loss) {
        self.known.push((epoch, loss));
        if self.known.len() > Self::MOST {
            let (_, oldest) = self.known.remove(0);
            let (_, next) = &mut self.known[0];
            *next = oldest.or(next);
        }
    }

    /// The deletes of the latest losses are doubted once more, from `epoch` on.
    pub fn doubt_deletes(&mut self, epoch: u64) {
        self.known.retain(|(_, loss)| !loss.of_deletes);
        let latest = self.known.last().map(|(begun, _)| *begun);
        let losses = self
            .known
            .iter()
            .filter(|(begun, _)| Some(*begun) == latest);
        let again: Vec<_> = losses.map(|(_, loss)| loss.of_deletes()).collect();
        for loss in again {
            self.add(epoch, loss);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whether one of the losses may hold what was learned of a key in `epoch`, by an
    /// answer that was there at `seen`.
    pub fn may_hold(&self, key: &GroupKey, epoch: u64, seen: Instant, is_deleted: bool) -> bool {
        let later = self.known.iter().rev();
        later
            .take_while(|(begun, _)| epoch < *begun)
            .any(|(_, loss)| {
                let seen = if is_deleted {
                    seen + Self::OTHERS_ARE_BEHIND
                } else {
                    seen
                };
                (is_deleted || !loss.of_deletes)
                    && loss.since.is_none_or(|since| seen >= since)
                    && loss.is_of(key)
            })
    }

    /// The versions of the losses of a key of which it was not told in `epoch`.
    pub fn around(&self, key: &GroupKey, epoch: u64) -> Around {
        let untold = self.known.iter().rev();
        let untold = untold
            .take_while(|(begun, _)| epoch < *begun)
            .filter(|(_, loss)| loss.is_of(key));
        Around {
            found_at: self.found_at(key),
            last_heard: untold.map(|(_, loss)| loss.last_heard).min().flatten(),
        }
    }

    /// When the last loss was found that may be of this key, by the clock of its server.
    pub fn found_at(&self, key: &GroupKey) -> Option<Version> {
        let mut latest = self.known.iter().rev().map(|(_, loss)| loss);
        latest.find(|loss| loss.is_of(key))?.found_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(key: &str) -> GroupKey {
        GroupKey::new(key).unwrap()
    }

    #[test]
    fn a_loss_holds_what_its_server_had_answered_since() {
        let start = Instant::now();
        let later = start + Duration::from_secs(11);
        let mut losses = Losses::default();
        losses.add(
            5,
            Loss {
                keys: Some(Arc::new(|key| key.as_str().starts_with('a'))),
                since: Some(later),
                ..Loss::ALL
            },
        );
        assert!(losses.may_hold(&key("a"), 4, later, false));
        assert!(losses.may_hold(&key("a"), 4, later, true));
        assert!(!losses.may_hold(&key("a"), 4, start, false), "before that");
        assert!(!losses.may_hold(&key("a"), 4, start, true), "long before");
        let little_before = later - Duration::from_secs(9);
        assert!(!losses.may_hold(&key("a"), 4, little_before, false));
        assert!(losses.may_hold(&key("a"), 4, little_before, true));
        assert!(!losses.may_hold(&key("b"), 4, later, false), "elsewhere");
        assert!(!losses.may_hold(&key("a"), 5, later, false), "told since");
        losses.add(6, Loss::ALL.of_deletes());
        assert!(!losses.may_hold(&key("b"), 5, later, false));
        assert!(losses.may_hold(&key("b"), 5, later, true));
    }

    #[test]
    fn of_many_losses_none_is_forgotten() {
        let start = Instant::now();
        let mut losses = Losses::default();
        losses.add(1, Loss::ALL);
        for epoch in 2..100 {
            losses.add(
                epoch,
                Loss {
                    keys: Some(Arc::new(|_| false)),
                    since: Some(start + Duration::from_secs(epoch)),
                    of_deletes: true,
                    ..Loss::ALL
                },
            );
        }
        assert!(losses.may_hold(&key("a"), 0, start, false));
    }
}
