//! Attempts at a call: how many, how long, and what a failed one means for the
//! next. Nothing else knows when to repeat a call.

use std::{future::Future, time::Duration};

use fred::{
    prelude::{Client, ClientLike, Error, Value},
    types::{ClusterHash, CustomCommand},
};
use tokio::time::Instant;

use super::{connection::Connections, fault::Fault};
use crate::store::{Deadline, StoreError};

/// The attempts at one call.
///
/// ```text
/// let mut attempts = Attempts::new(&connections, deadline);
/// while let Some(attempt) = attempts.next().await {
///     match … {
///         Ok(value) => return Ok(value),
///         Err(fault) => attempts.failed(&attempt, fault)?,
///     }
/// }
/// Err(attempts.exhausted())
/// ```
pub struct Attempts<'a> {
    connections: &'a Connections,
    deadline: Deadline,
    /// When the last attempt is given up.
    end: Instant,
    made: u32,
    lost_since: Option<Instant>,
    /// Why the last attempt failed.
    reason: String,
}

/// One attempt at a call.
pub struct Attempt {
    pub client: Client,
    pub sent: Instant,
    /// When the attempt is given up.
    pub until: Instant,
    /// When the first attempt was sent that may have been executed although its
    /// answer is missing.
    pub lost_since: Option<Instant>,
}

// === impl Attempts ===

impl<'a> Attempts<'a> {
    /// The time a call without a deadline gets, all attempts together.
    pub const CALL_BOUND: Duration = Duration::from_secs(1);

    const MOST: u32 = 3;
    /// The pause before the second attempt is between nothing and this; it
    /// doubles with each further attempt.
    const FIRST_PAUSE: Duration = Duration::from_millis(10);

    /// The attempts that a call with this deadline may make.
    pub fn new(connections: &'a Connections, deadline: Deadline) -> Self {
        Self {
            connections,
            deadline,
            end: deadline.or_within(Self::CALL_BOUND),
            made: 0,
            lost_since: None,
            reason: String::new(),
        }
    }

    /// Goes on after a first attempt that was made elsewhere. `lost_since`: it
    /// was sent then and its answer is missing.
    pub fn after_first(mut self, lost_since: Option<Instant>) -> Self {
        self.made = 1;
        self.lost_since = lost_since;
        self
    }

    /// The next attempt, after a pause if it is not the first. None when the
    /// attempts or the time are used up.
    pub async fn next(&mut self) -> Option<Attempt> {
        while self.made < Self::MOST {
            if self.made > 0 {
                let longest = Self::FIRST_PAUSE * 2u32.pow(self.made - 1);
                tokio::time::sleep(longest.mul_f64(rand::random())).await;
            }
            self.made += 1;
            let now = Instant::now();
            if now >= self.end {
                return None;
            }
            if let Some(client) = self.connections.client() {
                // Half of what is left, so that there is time for another
                // answer.
                let share = ((self.end - now) / 2).min(self.connections.timeout());
                return Some(Attempt {
                    client,
                    sent: now,
                    until: now + share,
                    lost_since: self.lost_since,
                });
            }
            self.reason = "not connected".into();
        }
        None
    }

    /// Takes in the fault of `attempt`. An error when repeating is of no use.
    pub fn failed(&mut self, attempt: &Attempt, fault: Fault) -> Result<(), StoreError> {
        match fault {
            Fault::Final(error) => return Err(error),
            Fault::NotRun(text) => self.reason = text,
            Fault::NoScript => self.reason = "it does not keep the scripts it is given".into(),
            Fault::Lost(text) => {
                self.lost_since = self.lost_since.or(Some(attempt.sent));
                self.reason = text;
            }
        }
        Ok(())
    }

    /// The error of a read that has used up its attempts.
    pub fn exhausted(self) -> StoreError {
        if self
            .deadline
            .instant()
            .is_some_and(|at| at <= Instant::now())
        {
            StoreError::DeadlineExceeded
        } else {
            StoreError::Unavailable(format!("Redis does not answer: {}", self.reason))
        }
    }

    /// The error of a write that has used up its attempts: one that may have
    /// been executed must not be reported as one that was not.
    pub fn write_exhausted(self) -> StoreError {
        if self.lost_since.is_some() {
            StoreError::OutcomeUnknown
        } else {
            self.exhausted()
        }
    }
}

// === impl Attempt ===

impl Attempt {
    /// Runs one command, at most until the attempt is given up.
    pub async fn run(&self, command: CustomCommand, arguments: Vec<Value>) -> Result<Value, Fault> {
        self.within(self.client.custom(command, arguments)).await
    }

    /// Runs commands in one pipeline. One result each, in order.
    pub async fn pipeline(
        &self,
        commands: Vec<(CustomCommand, Vec<Value>)>,
    ) -> Result<Vec<Result<Value, Fault>>, Fault> {
        let pipeline = self.client.pipeline();
        let queued = commands.len();
        for (command, arguments) in commands {
            // Answered at once; sent below.
            let answer: Result<Value, Error> = pipeline.custom(command, arguments).await;
            answer.map_err(|error| Fault::NotRun(error.details().to_owned()))?;
        }
        let replies = self
            .within(async { Ok(pipeline.try_all::<Value>().await) })
            .await?;
        if replies.len() == queued {
            return Ok(replies
                .into_iter()
                .map(|reply| reply.map_err(|error| Fault::of(&error)))
                .collect());
        }
        // The pipeline failed as a whole.
        Err(match replies.first() {
            Some(Err(error)) => Fault::of(error),
            _ => Fault::Lost("replies are missing".into()),
        })
    }

    /// Awaits a call of fred, at most until the attempt is given up.
    pub async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Fault> {
        match tokio::time::timeout_at(self.until, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(Fault::of(&error)),
            Err(_) => Err(Fault::Lost("no answer in time".into())),
        }
    }
}

/// A command on the key that is its first argument.
pub fn on_key(command: &'static str) -> CustomCommand {
    CustomCommand::new_static(command, ClusterHash::Offset(0), false)
}

/// A command without a key.
pub fn on_any_node(command: &'static str) -> CustomCommand {
    CustomCommand::new_static(command, ClusterHash::Random, false)
}
