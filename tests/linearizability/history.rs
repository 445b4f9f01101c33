//! What clients asked of a store and what they were told.

use std::fmt;

use groupstate::{
    domain::{group::AlertGroup, version::Version},
    store::{Backend, Deletion, Reply, StoreError, Swap},
};

use crate::common;

/// One call on one key, as its client saw it. Loads without an answer say
/// nothing and are left out.
#[derive(Clone, Debug)]
pub struct Call {
    /// When it was made. Moments are counted, not timed: the next event of the
    /// history, of whichever client, has the next number.
    pub begin: u64,
    /// When it was answered.
    pub end: u64,
    /// What it was, and the answer.
    pub act: Act,
}

/// A call and its answer.
#[derive(Clone, Debug)]
pub enum Act {
    Load {
        found: Option<Seen>,
    },
    Store {
        content: Content,
        outcome: Outcome<Version>,
    },
    Swap {
        content: Content,
        /// None creates only.
        expected: Option<Version>,
        outcome: Outcome<Swapped>,
    },
    Delete {
        /// None deletes any version.
        expected: Option<Version>,
        outcome: Outcome<Deletion>,
    },
}

/// Names what a call wrote. Every call writes something else, so whoever reads
/// it knows which call wrote it: even one whose answer was lost, and whose
/// version nobody was told. (So a store that merges what two calls wrote cannot
/// be judged here.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Content(pub u64);

/// A group as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub content: Content,
    pub version: Version,
}

/// What the client of a write knows about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<T> {
    /// Redis said so.
    Known(T),
    /// It took effect at any time after it was made, or it never will: its
    /// answer was lost, or another backend than Redis gave it.
    Unknown,
}

/// The answer to a compare-and-swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swapped {
    Won(Version),
    /// What was found instead of what was expected.
    Lost(Option<Seen>),
}

// === impl Call ===

impl Call {
    /// Whether it was a compare-and-swap or a delete by version that came too
    /// late.
    pub fn is_conflict(&self) -> bool {
        match self.act {
            Act::Swap { outcome, .. } => matches!(outcome, Outcome::Known(Swapped::Lost(_))),
            Act::Delete { expected, outcome } => {
                expected.is_some() && matches!(outcome, Outcome::Known(found) if !found.deleted)
            }
            Act::Load { .. } | Act::Store { .. } => false,
        }
    }

    /// Whether its client does not know what it did.
    pub fn is_unknown(&self) -> bool {
        match self.act {
            Act::Load { .. } => false,
            Act::Store { outcome, .. } => outcome == Outcome::Unknown,
            Act::Swap { outcome, .. } => outcome == Outcome::Unknown,
            Act::Delete { outcome, .. } => outcome == Outcome::Unknown,
        }
    }

    /// The version that its client was told it had written.
    pub fn written(&self) -> Option<Version> {
        match self.act {
            Act::Store {
                outcome: Outcome::Known(version),
                ..
            }
            | Act::Swap {
                outcome: Outcome::Known(Swapped::Won(version)),
                ..
            } => Some(version),
            _ => None,
        }
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>5} to {:>5}: ", self.begin, self.end)?;
        match &self.act {
            Act::Load { found } => write!(f, "Load found {}", text(*found)),
            Act::Store { content, outcome } => match outcome {
                Outcome::Known(version) => write!(f, "Store of {content} wrote {version}"),
                Outcome::Unknown => write!(f, "Store of {content}, outcome unknown"),
            },
            Act::Swap {
                content,
                expected,
                outcome,
            } => {
                match expected {
                    Some(version) => write!(f, "Swap of {version} by {content}")?,
                    None => write!(f, "Create of {content}")?,
                }
                match outcome {
                    Outcome::Known(Swapped::Won(version)) => write!(f, " wrote {version}"),
                    Outcome::Known(Swapped::Lost(found)) => {
                        write!(f, " lost, found {}", text(*found))
                    }
                    Outcome::Unknown => write!(f, ", outcome unknown"),
                }
            }
            Act::Delete { expected, outcome } => {
                match expected {
                    Some(version) => write!(f, "Delete of {version}")?,
                    None => write!(f, "Delete")?,
                }
                match outcome {
                    Outcome::Known(Deletion { deleted, version }) => {
                        let done = if *deleted {
                            "deleted"
                        } else {
                            "did not delete"
                        };
                        match version {
                            Some(version) => write!(f, " {done} {version}"),
                            None => write!(f, " {done} anything"),
                        }
                    }
                    Outcome::Unknown => write!(f, ", outcome unknown"),
                }
            }
        }
    }
}

fn text(found: Option<Seen>) -> String {
    found.map_or("nothing".into(), |seen| {
        format!("{} of {}", seen.version, seen.content)
    })
}

// === impl Content ===

impl Content {
    /// The group that a call with this content writes: one alert, whose
    /// fingerprint names it.
    pub fn as_group(self, key: &str) -> AlertGroup {
        common::group(key, &[&self.to_string()])
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.0)
    }
}

// === impl Seen ===

impl Seen {
    /// What a group tells that was read. It must be just as a call wrote it.
    pub fn in_group(group: &AlertGroup) -> Self {
        let mut fingerprints = group.alerts.keys();
        let content = match (fingerprints.next(), fingerprints.next()) {
            (Some(one), None) => one.strip_prefix('w').and_then(|number| number.parse().ok()),
            _ => None,
        };
        let (Some(content), Some(version)) = (content.map(Content), group.metadata.version) else {
            panic!("no call writes such a group: {group:?}");
        };
        let mut written = content.as_group(group.key.as_str());
        written.metadata.version = group.metadata.version;
        written
            .metadata
            .write_id
            .clone_from(&group.metadata.write_id);
        assert_eq!(*group, written, "not as it was written");
        Self { content, version }
    }
}

// === impl Outcome ===

impl<T> Outcome<T> {
    /// What the reply to a write tells. Only Redis knows what is in Redis: what
    /// another backend says about a write may come true there, or never.
    pub fn of(reply: Reply<T>) -> Self {
        match reply {
            Ok(answer) if answer.backend == Backend::Redis => Self::Known(answer.value),
            Ok(_) => Self::Unknown,
            Err(failure) => {
                assert_says_nothing(&failure.error);
                Self::Unknown
            }
        }
    }

    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Outcome<U> {
        match self {
            Self::Known(value) => Outcome::Known(change(value)),
            Self::Unknown => Outcome::Unknown,
        }
    }
}

/// Only failures that leave open what happened have a place here: every group
/// is readable, small, and of the right type, so nothing else may fail.
pub fn assert_says_nothing(error: &StoreError) {
    assert!(
        matches!(
            error,
            StoreError::OutcomeUnknown | StoreError::Unavailable(_) | StoreError::DeadlineExceeded
        ),
        "no call may fail like this here: {error:?}"
    );
}

// === impl Swapped ===

impl From<Swap> for Swapped {
    fn from(swap: Swap) -> Self {
        match swap {
            Swap::Swapped(written) => Self::Won(written.version),
            Swap::Lost { current } => Self::Lost(current.map(|group| Seen::in_group(&group))),
        }
    }
}
