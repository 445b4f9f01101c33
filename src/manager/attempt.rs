//! One attempt to make a change: load, apply, swap. Whether to make another is
//! for the manager to say.

use std::time::Duration;

use tokio::time::Instant;

use super::{ManagerSettings, Outcome};
use crate::{
    domain::{
        change::{Applied, Change, Step},
        group::{AlertGroup, GroupKey, Time},
        retention::{Left, Refused},
    },
    store::{Answer, Backend, Deadline, ErrorKind, Expiry, Failure, GroupStore, StoreError, Swap},
};

/// What an attempt has come to.
pub enum Attempt {
    Done(Box<Done>),
    /// Another change came first; this is stored now.
    Lost(Answer<Option<Box<AlertGroup>>>),
    /// The store does not take what it was to store, and would not later.
    NotTaken(StoreError),
}

/// A change that was made.
pub struct Done {
    pub outcome: Outcome,
    pub before: Option<AlertGroup>,
    pub after: Option<AlertGroup>,
    /// What is left of its time to live, where it is known.
    pub time_left: Option<Duration>,
    pub backend: Backend,
    /// Alerts that have left the group along with it.
    pub left: Left,
    /// Reports that were not stored, for want of room.
    pub refused: Vec<Refused>,
}

/// Tries once, on what a lost race has just shown to be stored, or else on what
/// is loaded.
pub async fn attempt(
    store: &dyn GroupStore,
    settings: &ManagerSettings,
    key: &GroupKey,
    change: &Change,
    seen: Option<Answer<Option<Box<AlertGroup>>>>,
    deadline: Instant,
) -> Result<Attempt, Failure> {
    let deadline = Deadline::at(deadline);
    let load = async || {
        let answer = store.load(key, false, deadline).await?;
        Ok::<_, Failure>(answer.map(|stored| stored.map(|stored| Box::new(stored.group))))
    };
    let stored = match seen {
        Some(seen) => seen,
        None => load().await?,
    };
    let before = stored.value.map(|group| *group);
    let Applied {
        step,
        left,
        refused,
    } = change.apply(key, before.as_ref(), Time::now(), &settings.retention);
    let mut done = Done {
        outcome: Outcome::Unchanged,
        before,
        after: None,
        time_left: None,
        backend: stored.backend,
        left,
        refused,
    };
    match step {
        Step::Nothing => done.after.clone_from(&done.before),
        Step::Put(mut group) => {
            let before = done.before.as_ref();
            let expected = before.and_then(|group| group.metadata.version);
            let expiry = expiry_of(&group, settings.group_ttl);
            let answer = store
                .compare_and_swap(&group, expected, expiry, deadline)
                .await;
            let answer = match answer {
                Err(failure) if failure.error.kind() == ErrorKind::Invalid => {
                    return Ok(Attempt::NotTaken(failure.error));
                }
                answer => answer?,
            };
            done.backend = answer.backend;
            match answer.value {
                Swap::Swapped(written) => {
                    group.metadata.version = Some(written.version);
                    done.outcome = Outcome::Stored;
                    done.after = Some(*group);
                    done.time_left = written.expires.map(|expires| expires.left);
                }
                Swap::Lost { current } => {
                    return Ok(Attempt::Lost(answer.backend.answers(current)));
                }
            }
        }
        Step::Delete(version) => {
            let answer = store.delete(key, Some(version), deadline).await?;
            if !answer.value.deleted {
                // It says which version it met, and not the group.
                return Ok(Attempt::Lost(load().await?));
            }
            done.backend = answer.backend;
            done.outcome = Outcome::Deleted;
        }
    }
    Ok(Attempt::Done(Box::new(done)))
}

/// A group lives on while something fires; once nothing does, its time runs out.
fn expiry_of(group: &AlertGroup, ttl: Duration) -> Expiry {
    if group.counts().firing > 0 {
        Expiry::After(ttl)
    } else {
        Expiry::Keep { otherwise: ttl }
    }
}

/// Whether the same change may fare better in a moment.
pub fn is_worth_another(error: &StoreError) -> bool {
    match error.kind() {
        ErrorKind::OutcomeUnknown
        | ErrorKind::ListingRestarted
        | ErrorKind::DeadlineExceeded
        | ErrorKind::Overloaded
        | ErrorKind::Unavailable => true,
        ErrorKind::Invalid
        | ErrorKind::TooLarge
        | ErrorKind::Unreadable
        | ErrorKind::ForeignType
        | ErrorKind::VersionOutOfRange
        | ErrorKind::MemoryFull
        | ErrorKind::CommandRefused
        | ErrorKind::Unauthenticated
        | ErrorKind::Bug => false,
    }
}
