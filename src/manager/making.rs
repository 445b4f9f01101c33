//! How a change is made: attempt after attempt, in parts if it has to be, and once
//! more from the outbox if only memory has it.

use tokio::time::Instant;

use super::{
    AlertGroupManager, Changed, DELIVERY_INTERVAL, LONGEST_BACKOFF, MAX_IDLE_DELIVERIES,
    ManagerError, Outcome,
    attempt::{Attempt, Done, attempt, is_worth_another},
    stats::add,
};
use crate::{
    domain::{
        change::Change,
        group::{Alert, AlertGroup, GroupKey},
        retention::{Refused, RefusedReason},
    },
    store::{Backend, ErrorKind, StoreError},
};

/// A change that was made, or a part of one.
struct Made {
    change: Change,
    changed: Changed,
    /// What was stored before.
    before: Option<AlertGroup>,
}

/// Why a change was not made.
enum NotMade {
    /// The store does not take what the change has made of the group.
    Content(StoreError),
    Failed(ManagerError),
}

/// What came of a change: its parts, which is one where the service takes it whole,
/// and none where it takes nothing of it.
#[derive(Default)]
struct Parts {
    made: Vec<Made>,
    refused: Vec<Refused>,
}

// === impl AlertGroupManager ===

impl AlertGroupManager {
    /// Makes a change, and remembers it if only memory has it. `refused` are reports
    /// that were refused before; they are named in the answer, too.
    pub(super) async fn change(
        &self,
        key: &GroupKey,
        change: Change,
        mut refused: Vec<Refused>,
    ) -> Result<Changed, ManagerError> {
        let parts = self.make_in_parts(key, change).await;
        let parts = parts.inspect_err(|_| add(&self.0.counts.failed, 1))?;
        let mut whole: Option<Changed> = None;
        refused.extend(parts.refused);
        for Made {
            change,
            mut changed,
            before,
        } in parts.made
        {
            if changed.backend == Backend::Memory {
                changed.safe = self.outbox().remember(key, change.again(before.as_ref()));
            }
            whole = Some(match whole {
                Some(whole) => whole.and(changed),
                None => changed,
            });
        }
        match whole {
            Some(mut whole) => {
                refused.append(&mut whole.refused);
                Ok(Changed { refused, ..whole })
            }
            None => Err(ManagerError::AllRefused(refused)),
        }
    }

    /// Makes a change. Where the service does not take what it adds, it is made in
    /// parts, so that a report that can never be stored is refused alone.
    async fn make_in_parts(&self, key: &GroupKey, change: Change) -> Result<Parts, ManagerError> {
        let mut parts = Parts::default();
        let Change::Add {
            group_by,
            reports,
            at,
        } = change
        else {
            parts.made.push(match self.make(key, &change).await {
                Ok(made) => made,
                Err(NotMade::Failed(error)) => return Err(error),
                Err(NotMade::Content(error)) => {
                    let key = key.clone();
                    return Err(ManagerError::Refused { key, error });
                }
            });
            return Ok(parts);
        };
        let mut waiting = vec![reports];
        while let Some(reports) = waiting.pop() {
            let part = Change::Add {
                group_by: group_by.clone(),
                reports: reports.clone(),
                at,
            };
            match self.make(key, &part).await {
                Ok(made) => parts.made.push(made),
                Err(NotMade::Content(error)) if reports.len() < 2 => parts.refuse(&reports, &error),
                Err(NotMade::Content(_)) => {
                    let (one, other) = reports.split_at(reports.len() / 2);
                    // What came first is taken first.
                    waiting.extend([other.to_vec(), one.to_vec()]);
                }
                // It is nothing about the reports: the key is not taken.
                Err(NotMade::Failed(ManagerError::Refused { error, .. }))
                    if error.kind() == ErrorKind::Invalid =>
                {
                    parts.refuse(&reports, &error);
                }
                Err(NotMade::Failed(error)) => return Err(error),
            }
        }
        self.0.counts.refused(&parts.refused);
        Ok(parts)
    }

    /// Makes a change, however many others change the group too.
    async fn make(&self, key: &GroupKey, change: &Change) -> Result<Made, NotMade> {
        let settings = &self.0.settings;
        let counts = &self.0.counts;
        let give_up = Instant::now() + settings.change_timeout;
        let mut store = self.store_of(key);
        let mut seen = None;
        let mut asked = self.known().mark();
        let mut last = String::new();
        let mut attempts = 0;
        while attempts < settings.max_attempts && Instant::now() < give_up {
            if attempts > 0 {
                tokio::time::sleep(self.backoff(attempts)).await;
            }
            attempts += 1;
            counts.attempted(attempts);
            let deadline = give_up.min(Instant::now() + settings.call_timeout);
            if seen.is_none() {
                // What a lost race has shown was asked for before.
                asked = self.known().mark();
            }
            match attempt(&*store, settings, key, change, seen.take(), deadline).await {
                Ok(Attempt::Done(done)) => {
                    let Done {
                        outcome,
                        before,
                        after,
                        time_left,
                        backend,
                        left,
                        refused,
                    } = *done;
                    counts.changed(outcome, &left);
                    counts.refused(&refused);
                    if !left.unreported.is_empty() {
                        tracing::info!(
                            key = key.as_str(),
                            fingerprints = ?left.unreported,
                            "firing alerts that nobody reports any more have left their group"
                        );
                    }
                    if outcome == Outcome::Deleted {
                        self.known().forget(key);
                    } else {
                        self.saw(key, after.as_ref(), asked, time_left, backend);
                    }
                    let changed = Changed {
                        outcome,
                        group: after,
                        backend,
                        attempts,
                        safe: true,
                        refused,
                    };
                    return Ok(Made {
                        change: change.clone(),
                        changed,
                        before,
                    });
                }
                Ok(Attempt::NotTaken(error)) => return Err(NotMade::Content(error)),
                Ok(Attempt::Lost(current)) => {
                    add(&counts.conflicts, 1);
                    last = "lost a race".into();
                    seen = Some(current);
                }
                // Maybe it happened, maybe not: the next attempt loads the group
                // and sees.
                Err(failure) if is_worth_another(&failure.error) => {
                    add(&counts.retried_failures, 1);
                    last = format!("failed: {}", failure.error);
                    // Its instance may be gone.
                    store = self.store_of(key);
                }
                Err(failure) => {
                    return Err(NotMade::Failed(ManagerError::Refused {
                        key: key.clone(),
                        error: failure.error,
                    }));
                }
            }
        }
        Err(NotMade::Failed(ManagerError::GivenUp {
            key: key.clone(),
            attempts,
            last,
        }))
    }

    /// Makes the changes of the outbox again, until Redis has them or memory
    /// says too often that it is still in charge. Says how many reports wait.
    ///
    /// A change whose instance is gone is made at another one on the way.
    pub async fn deliver(&self) -> usize {
        let mut last = None;
        let mut idle = 0;
        let groups = self.outbox().counts().groups;
        for _ in 0..groups {
            let Some((key, changes)) = self.outbox().next(last.as_ref()) else {
                break;
            };
            for change in &changes {
                let parts = match self.make_in_parts(&key, change.clone()).await {
                    Ok(parts) => parts,
                    Err(error) if never_fits(&error) => {
                        tracing::warn!(
                            key = key.as_str(),
                            %error,
                            "a change that was made while Redis was down can never be stored and is dropped"
                        );
                        self.outbox().dropped(&key, change);
                        continue;
                    }
                    // Somebody has to look at what is stored there.
                    Err(ManagerError::Refused { error, .. }) if concerns_the_group(&error) => break,
                    Err(_) => {
                        idle += 1;
                        break;
                    }
                };
                if parts
                    .made
                    .iter()
                    .any(|made| made.changed.backend == Backend::Memory)
                {
                    let unchanged = |made: &Made| made.changed.outcome == Outcome::Unchanged;
                    idle += usize::from(parts.made.iter().all(unchanged));
                    break;
                }
                for refused in parts
                    .refused
                    .iter()
                    .chain(parts.made.iter().flat_map(|made| &made.changed.refused))
                {
                    tracing::warn!(
                        key = key.as_str(),
                        fingerprint = refused.fingerprint,
                        reason = refused.reason.as_str(),
                        message = refused.message,
                        "a report that was received while Redis was down is not stored"
                    );
                }
                if parts.made.is_empty() {
                    self.outbox().dropped(&key, change);
                } else {
                    self.outbox().delivered(&key, change);
                }
            }
            if idle >= MAX_IDLE_DELIVERIES {
                break;
            }
            last = Some(key);
        }
        self.outbox().counts().reports
    }

    /// Looks after the outbox. Never returns.
    pub async fn deliver_forever(self) {
        loop {
            tokio::time::sleep(DELIVERY_INTERVAL).await;
            self.deliver().await;
        }
    }

    /// Exponential, with full jitter: replicas that met once must not meet again.
    pub(super) fn backoff(&self, attempts: u32) -> std::time::Duration {
        let doubled = 1 << (attempts - 1).min(16);
        let longest = self.0.settings.first_backoff.saturating_mul(doubled);
        longest.min(LONGEST_BACKOFF).mul_f64(rand::random())
    }
}

// === impl Parts ===

impl Parts {
    fn refuse(&mut self, reports: &[Alert], why: &StoreError) {
        self.refused.extend(reports.iter().map(|report| Refused {
            fingerprint: report.fingerprint.clone(),
            reason: RefusedReason::Service,
            message: why.to_string(),
        }));
    }
}

// === impl Changed ===

impl Changed {
    /// What this part of a change and a later one have come to together.
    fn and(self, later: Self) -> Self {
        let outcome = match later.outcome {
            Outcome::Unchanged => self.outcome,
            outcome => outcome,
        };
        let mut refused = self.refused;
        refused.extend(later.refused);
        Self {
            outcome,
            group: later.group,
            backend: later.backend,
            attempts: self.attempts.max(later.attempts),
            safe: self.safe && later.safe,
            refused,
        }
    }
}

/// Whether the same change would be refused whenever it is made.
fn never_fits(error: &ManagerError) -> bool {
    match error {
        ManagerError::Invalid(_) | ManagerError::AllRefused(_) => true,
        ManagerError::Refused { error, .. } => error.kind() == ErrorKind::Invalid,
        ManagerError::GivenUp { .. } | ManagerError::Restore(_) => false,
    }
}

/// Whether an error is about what is stored at one key.
fn concerns_the_group(error: &StoreError) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Unreadable
            | ErrorKind::ForeignType
            | ErrorKind::VersionOutOfRange
            | ErrorKind::TooLarge
    )
}
