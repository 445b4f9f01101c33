//! What every port has to do about connections: to pause when none can be accepted,
//! and to give up the oldest when there are too many that should be over by now.

use std::{collections::VecDeque, io, time::Duration};

use tokio::task::AbortHandle;

use crate::telemetry::rate_limited;

/// The pause when there is no file descriptor or no memory for another connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Tasks for connections, so many at most: who opens connections and sends nothing keeps
/// nobody out. They end with this value.
#[derive(Debug)]
pub struct Newest {
    most: usize,
    tasks: VecDeque<AbortHandle>,
}

/// After an error that is not one of the connection alone, to accept again at once
/// would be in vain.
pub async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    if !matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | Interrupted
    ) {
        rate_limited!(warn, %error, "no connection can be accepted");
        tokio::time::sleep(PAUSE).await;
    }
}

// === impl Newest ===

impl Newest {
    pub fn new(most: usize) -> Self {
        Self {
            most,
            tasks: VecDeque::new(),
        }
    }

    /// Adds a task. True if the oldest had to be given up for it.
    #[must_use]
    pub fn push(&mut self, newest: AbortHandle) -> bool {
        if self.tasks.len() >= self.most {
            self.tasks.retain(|task| !task.is_finished());
        }
        let oldest = match self.tasks.len() >= self.most {
            true => self.tasks.pop_front(),
            false => None,
        };
        self.tasks.push_back(newest);
        oldest.inspect(AbortHandle::abort).is_some()
    }
}

impl Drop for Newest {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn the_oldest_that_goes_on_is_given_up_for_the_newest() {
        let mut newest = Newest::new(2);
        let over = tokio::spawn(async {});
        let over_handle = over.abort_handle();
        over.await.unwrap();
        let going_on: Vec<_> = (0..3).map(|_| tokio::spawn(pending::<()>())).collect();
        let [first, second, third] = [0, 1, 2].map(|at: usize| going_on[at].abort_handle());
        assert!(!newest.push(over_handle));
        assert!(!newest.push(first.clone()));
        assert!(!newest.push(second.clone()), "one of the two is over");
        assert!(newest.push(third.clone()));
        tokio::task::yield_now().await;
        let ended = [&first, &second, &third].map(AbortHandle::is_finished);
        assert_eq!(ended, [true, false, false]);
        drop(newest);
        tokio::task::yield_now().await;
        assert!(second.is_finished() && third.is_finished());
    }
}
