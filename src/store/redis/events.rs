//! What happens to the connections, for those who have to react to it and for
//! the log.

use std::{
    sync::Mutex,
    time::{Duration, Instant as StdInstant},
};

use fred::prelude::{Error, Server};
use tokio::{sync::watch, time::Instant};

use super::{fault::readable, link::lock};

/// What happens to the connections of all links, one after the other.
pub struct Events {
    log: Mutex<ConnectionLog>,
    /// Counts new connections.
    connected: watch::Sender<u64>,
    /// Counts the times that other servers took the place of those before.
    moved: watch::Sender<u64>,
    /// Where local microseconds begin.
    started: Instant,
}

/// What the log says of the connections. Each of them reports each attempt, and
/// a server may accept and close them without end: a state is written when it
/// differs from the one before, and no more often than once in [`Self::PAUSE`].
#[derive(Debug, Default)]
struct ConnectionLog {
    /// Why there is no connection.
    error: String,
    state: State,
    written: State,
    written_at: Option<StdInstant>,
    /// Changes of the state that were not written.
    left_out: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Unknown,
    Connected(String),
    Failed(String),
}

// === impl Events ===

impl Events {
    pub fn new() -> Self {
        Self {
            log: Mutex::default(),
            connected: watch::Sender::new(0),
            moved: watch::Sender::new(0),
            started: Instant::now(),
        }
    }

    /// Counts new connections: each may lead to another server than before.
    pub fn connected(&self) -> watch::Receiver<u64> {
        self.connected.subscribe()
    }

    /// Why there is no connection.
    pub fn why_not(&self) -> String {
        match lock(&self.log).error.as_str() {
            "" => "not connected".into(),
            error => format!("not connected: {error}"),
        }
    }

    /// Counts the times that other servers took the place of those before.
    pub fn moved(&self) -> watch::Receiver<u64> {
        self.moved.subscribe()
    }

    /// What is used from now on are other servers than before.
    pub fn moved_on(&self) {
        self.connected.send_modify(|count| *count += 1);
        self.moved.send_modify(|count| *count += 1);
    }

    /// A new connection leads to this server.
    pub fn connected_to(&self, server: &Server) {
        self.write(State::Connected(server.to_string()));
        self.connected.send_modify(|count| *count += 1);
    }

    /// A connection failed.
    pub fn failed(&self, error: &Error) {
        self.cannot_connect(readable(error));
    }

    /// Takes down why it is not known where to connect to.
    pub fn has_no_address(&self, reason: &str) {
        lock(&self.log).error = reason.to_owned();
    }

    /// Takes down why there is no connection.
    pub fn cannot_connect(&self, reason: &str) {
        lock(&self.log).error = reason.to_owned();
        self.write(State::Failed(reason.to_owned()));
    }

    /// Writes the last state if it was left out and there is room for it now. To
    /// be called now and then.
    pub fn write_what_was_left_out(&self) {
        let due = lock(&self.log).due(StdInstant::now());
        tell(due);
    }

    fn write(&self, state: State) {
        let due = {
            let mut log = lock(&self.log);
            log.enter(state);
            log.due(StdInstant::now())
        };
        tell(due);
    }

    /// A moment in local microseconds.
    pub fn micros(&self, moment: Instant) -> i64 {
        i64::try_from(moment.duration_since(self.started).as_micros()).unwrap_or(i64::MAX / 2)
    }
}

fn tell(due: Option<(State, u64)>) {
    match due {
        Some((State::Connected(server), 0)) => tracing::info!(server, "connected to Redis"),
        Some((State::Connected(server), left_out)) => {
            tracing::info!(server, left_out, "connected to Redis");
        }
        Some((State::Failed(reason), 0)) => {
            tracing::warn!(reason, "no connection to Redis, trying again");
        }
        Some((State::Failed(reason), left_out)) => {
            tracing::warn!(reason, left_out, "no connection to Redis, trying again");
        }
        Some((State::Unknown, _)) | None => {}
    }
}

// === impl ConnectionLog ===

impl ConnectionLog {
    const PAUSE: Duration = Duration::from_secs(1);

    fn enter(&mut self, state: State) {
        if self.state != state {
            // The one before was not written, and never will be.
            self.left_out += u64::from(self.state != self.written);
            self.state = state;
        }
    }

    /// The state to write now, and how many changes were left out before it.
    fn due(&mut self, now: StdInstant) -> Option<(State, u64)> {
        let paused = self
            .written_at
            .is_none_or(|at| now.saturating_duration_since(at) >= Self::PAUSE);
        if self.state == self.written || !paused {
            return None;
        }
        self.written = self.state.clone();
        self.written_at = Some(now);
        Some((self.state.clone(), std::mem::take(&mut self.left_out)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_gets_one_line_a_second_and_always_the_last_state() {
        let (mut log, start) = (ConnectionLog::default(), StdInstant::now());
        let connected = || State::Connected("h:1".into());
        let failed = || State::Failed("EOF".into());
        log.enter(connected());
        assert_eq!(log.due(start), Some((connected(), 0)));
        for _ in 0..20 {
            log.enter(failed());
            assert_eq!(log.due(start), None);
            log.enter(connected());
            assert_eq!(log.due(start), None);
        }
        log.enter(failed());
        let later = start + ConnectionLog::PAUSE;
        let (state, left_out) = log.due(later).unwrap();
        assert_eq!(state, failed());
        assert!(left_out >= 20, "{left_out}");
        // The same again is no news.
        log.enter(failed());
        assert_eq!(log.due(later + ConnectionLog::PAUSE), None);
    }
}
