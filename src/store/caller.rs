//! For whom a call is made, so that what is scarce can be shared fairly.
//!
//! It says nothing about rights and changes no answer, so it goes beside the calls
//! and not through the contract of the stores: each call runs in the scope of its
//! caller.

use tokio::task_local;

/// Whoever makes calls: a client's connection, or the service itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Caller(u64);

task_local! {
    static CALLER: Caller;
}

// === impl Caller ===

impl Caller {
    /// What the service does by itself.
    const SERVICE: Self = Self(u64::MAX);

    /// A client's connection, by its number.
    pub fn connection(id: u64) -> Self {
        Self(id)
    }

    /// Makes a call for this caller.
    pub fn makes<F: Future>(self, call: F) -> impl Future<Output = F::Output> {
        CALLER.scope(self, call)
    }

    /// For whom the call is made that runs now.
    pub fn current() -> Self {
        CALLER.try_with(|caller| *caller).unwrap_or(Self::SERVICE)
    }
}
