//! The pool of Redis connections, and attempts at calls over it. Nothing else
//! knows when to repeat a call.

use std::{
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fred::{
    prelude::{
        Builder, Client, ClientLike, Config, ConnectionConfig, Error, EventInterface,
        PerformanceConfig, Pool, ReconnectPolicy, Value,
    },
    types::{ClusterHash, CustomCommand},
};
use tokio::time::Instant;

use super::{
    fault::Fault,
    script::{Script, ScriptReply},
};
use crate::{
    store::{Deadline, StoreError},
    version::IntervalClock,
};

/// Where Redis is and how to reach it. Its debug form holds no credentials.
#[derive(Clone)]
pub struct RedisSettings {
    config: Config,
    pool_size: usize,
    timeout: Duration,
}

/// Connections to Redis, and what is known of its clock. Cheap to clone.
#[derive(Clone)]
pub struct Connections {
    pool: Pool,
    /// The time one command gets at most.
    timeout: Duration,
    clock: Arc<Mutex<IntervalClock>>,
    /// Where local microseconds begin.
    started: Instant,
}

/// The attempts at one call.
///
/// ```text
/// let mut attempts = connections.attempts(deadline);
/// while let Some(attempt) = attempts.next().await {
///     match … {
///         Ok(value) => return Ok(value),
///         Err(fault) => attempts.failed(fault)?,
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

// === impl RedisSettings ===

impl RedisSettings {
    /// Reads a Redis URL. The error does not repeat the URL, which may hold a
    /// password.
    pub fn new(url: &str, pool_size: usize, timeout: Duration) -> Result<Self, String> {
        if !url.starts_with("redis://") {
            return Err("must begin with redis://, such as redis://host:6379".into());
        }
        let mut config = Config::from_url(url).map_err(|error: Error| {
            format!("is not of the form redis://host:6379: {}", error.details())
        })?;
        // Redis may come up later than this service.
        config.fail_fast = false;
        Ok(Self {
            config,
            pool_size,
            timeout,
        })
    }

    /// Replaces the user of the URL.
    pub fn set_username(&mut self, username: String) {
        self.config.username = Some(username);
    }

    /// Replaces the password of the URL.
    pub fn set_password(&mut self, password: String) {
        self.config.password = Some(password);
    }
}

impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSettings")
            .field("server", &self.config.server)
            .field("username", &self.config.username)
            .field("pool_size", &self.pool_size)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

// === impl Connections ===

impl Connections {
    /// The time a call without a deadline gets, all attempts together.
    pub const CALL_BOUND: Duration = Duration::from_secs(1);

    const MAX_ATTEMPTS: u32 = 3;
    /// The pause before the second attempt is between nothing and this; it
    /// doubles with each further attempt.
    const FIRST_PAUSE: Duration = Duration::from_millis(10);
    const RECONNECT_MIN_DELAY_MS: u32 = 50;
    const RECONNECT_MAX_DELAY_MS: u32 = 500;

    /// Starts to connect, in the background and for as long as it takes.
    pub fn open(settings: &RedisSettings) -> Result<Self, StoreError> {
        let pool = Builder::from_config(settings.config.clone())
            .with_performance_config(|config: &mut PerformanceConfig| {
                // The only timeout that takes a command back out of fred's
                // queues; dropping the future of a call does not.
                config.default_command_timeout = settings.timeout;
            })
            .with_connection_config(|config: &mut ConnectionConfig| {
                config.connection_timeout = settings.timeout.max(Duration::from_millis(500));
                config.internal_command_timeout = settings.timeout.max(Duration::from_millis(500));
                // Repeating is decided here, where it is known what is safe.
                config.max_command_attempts = 1;
                config.reconnect_on_auth_error = true;
                config.tcp.nodelay = Some(true);
            })
            .set_policy(ReconnectPolicy::new_exponential(
                0, // without end
                Self::RECONNECT_MIN_DELAY_MS,
                Self::RECONNECT_MAX_DELAY_MS,
                2,
            ))
            .build_pool(settings.pool_size)
            .map_err(|error| StoreError::Unavailable(error.details().to_owned()))?;
        let connections = Self {
            pool,
            timeout: settings.timeout,
            clock: Arc::default(),
            started: Instant::now(),
        };
        connections.watch();
        connections.pool.connect_pool();
        Ok(connections)
    }

    /// Waits until Redis answers, at most until `deadline`; false if it does
    /// not.
    pub async fn wait(&self, deadline: Instant) -> bool {
        let connected = self.pool.wait_for_connect();
        matches!(
            tokio::time::timeout_at(deadline, connected).await,
            Ok(Ok(()))
        )
    }

    /// Logs when the connections of the pool come and go, and forgets the clock
    /// of a server that may not be the one we talk to next.
    fn watch(&self) {
        // What was told last: every connection reports every attempt.
        let told: Arc<Mutex<Option<String>>> = Arc::default();
        for client in self.pool.clients() {
            let (clock, last_told) = (self.clock.clone(), told.clone());
            client.on_reconnect(move |server| {
                lock(&clock).forget();
                let event = format!("connected to {server}");
                if lock(&last_told).replace(event.clone()) != Some(event) {
                    tracing::info!(%server, "connected to Redis");
                }
                async { Ok(()) }
            });
            let last_told = told.clone();
            client.on_error(move |(error, _)| {
                let reason = error.details();
                if lock(&last_told).replace(reason.to_owned()).as_deref() != Some(reason) {
                    tracing::warn!(reason, "no connection to Redis, trying again");
                }
                async { Ok(()) }
            });
        }
    }

    /// The attempts that a call with this deadline may make.
    pub fn attempts(&self, deadline: Deadline) -> Attempts<'_> {
        Attempts {
            connections: self,
            deadline,
            end: deadline.or_within(Self::CALL_BOUND),
            made: 0,
            lost_since: None,
            reason: String::new(),
        }
    }

    /// What Redis's clock shows at least at a local moment. Asks Redis if that
    /// is not known.
    pub async fn earliest_redis_time(
        &self,
        attempt: &Attempt,
        moment: Instant,
    ) -> Result<i64, Fault> {
        if let Some(known) = self.known_redis_time(moment) {
            return Ok(known);
        }
        let sent = Instant::now();
        let time: Vec<i64> = attempt
            .run(on_any_node("TIME"), Vec::new())
            .await?
            .convert()
            .map_err(|_| Fault::NotRun("Redis gave no time".into()))?;
        let [seconds, micros] = time[..] else {
            return Err(Fault::NotRun("Redis gave no time".into()));
        };
        self.observe(sent, seconds * 1_000_000 + micros);
        self.known_redis_time(moment)
            .ok_or_else(|| Fault::NotRun("the connection to Redis was lost".into()))
    }

    fn known_redis_time(&self, moment: Instant) -> Option<i64> {
        lock(&self.clock).earliest_remote(self.micros(moment))
    }

    /// Runs a script on one key and learns from its reply what time it is in
    /// Redis.
    pub async fn run(
        &self,
        attempt: &Attempt,
        script: &Script,
        key: &str,
        arguments: Vec<Value>,
    ) -> Result<ScriptReply, Fault> {
        let sent = Instant::now();
        let reply = script.run(attempt, key, arguments).await?;
        self.observe(sent, reply.now);
        Ok(reply)
    }

    /// Takes in what time it was in Redis between `sent` and now.
    pub fn observe(&self, sent: Instant, redis_now: i64) {
        let received = self.micros(Instant::now()) + 1;
        lock(&self.clock).observe(self.micros(sent), received, redis_now);
    }

    fn micros(&self, moment: Instant) -> i64 {
        i64::try_from(moment.duration_since(self.started).as_micros()).unwrap_or(i64::MAX / 2)
    }
}

// === impl Attempts ===

impl Attempts<'_> {
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
        while self.made < Connections::MAX_ATTEMPTS {
            if self.made > 0 {
                let longest = Connections::FIRST_PAUSE * 2u32.pow(self.made - 1);
                tokio::time::sleep(longest.mul_f64(rand::random())).await;
            }
            self.made += 1;
            let now = Instant::now();
            if now >= self.end {
                return None;
            }
            let client = self.connections.pool.next_connected();
            if client.is_connected() {
                // Half of what is left, so that there is time for another
                // answer.
                let share = ((self.end - now) / 2).min(self.connections.timeout);
                return Some(Attempt {
                    client: client.clone(),
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

/// Locks what cannot be left half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
