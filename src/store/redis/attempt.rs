//! Attempts at a call: how many, how long, and what a failed one means for the
//! next. Nothing else knows when to repeat a call.

use std::{
    future::Future,
    slice,
    sync::{Arc, Mutex},
    time::Duration,
};

use fred::{
    prelude::{ClientLike, Error, KeysInterface, Options, Value},
    types::{ClusterHash, CustomCommand, config::Server},
};
use tokio::time::Instant;

use super::{
    NotDone,
    bulk::BulkShare,
    connection::Connections,
    fault::Fault,
    link::{Lane, Link, lock},
    renewable::Renewable,
    topology::{Node, Place},
};
use crate::{
    store::{Deadline, StoreError},
    telemetry::{self, Limit, RedisRequest, RedisSpan},
};

/// The attempts at one call.
///
/// ```text
/// let mut attempts = Attempts::at_read(&connections, traffic, deadline);
/// while let Some(attempt) = attempts.next().await {
///     match … {
///         Ok(value) => return Ok(value),
///         Err(fault) => attempts.failed(&attempt, fault)?,
///     }
/// }
/// Err(attempts.used_up())
/// ```
pub struct Attempts<'a> {
    connections: &'a Connections,
    traffic: Traffic,
    /// Of the writes that are attempted; None of reads.
    trail: Option<&'a Trail>,
    /// When the last attempt is given up; later by what this process loses meanwhile,
    /// unless it is the caller's.
    end: Instant,
    /// The time that this process had lost before the first attempt.
    lost_before: Duration,
    /// What was added to `end` for what it has lost since.
    made_up: Duration,
    /// Whether `end` is the caller's own and sooner than ours.
    hurried: bool,
    made: u32,
    /// Whether any attempt had no answer within its time.
    timed_out: bool,
    /// Whether the last attempt was redirected.
    redirected: bool,
    /// Whether the last attempt was none, since its connection did not lead to the
    /// server.
    unrouted: bool,
    /// Whether there was no connection for the last attempt.
    not_connected: bool,
    /// Whether the time has passed before it was the turn of so many bytes.
    no_turn: bool,
    /// Whether an attempt shared its connection with large documents.
    beside_large: bool,
    /// Why the last attempt failed.
    reason: String,
}

/// What a call moves to or from Redis: decides which connection it takes, and adds
/// to its time.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    lane: Lane,
    /// Of documents, as far as is known.
    bytes: usize,
}

/// One attempt at a call.
pub struct Attempt {
    /// Lives at least as long as this.
    pub link: Arc<Link>,
    connection: Arc<Renewable>,
    /// Its part of what may be on its way at once; None of small calls.
    _share: Option<BulkShare>,
    /// Held while it moves large documents for the service itself.
    _large_repair: Option<Arc<()>>,
    /// The server behind it, if it is always the same.
    server: Option<Arc<Server>>,
    pub sent: Instant,
    /// A write is not executed later than this.
    pub until: Instant,
    /// When its answer is no longer waited for. Of a write later than `until`:
    /// an answer that comes late still says for sure what was done.
    pub answer_by: Instant,
    /// When the first attempt was sent that may have been executed although its
    /// answer is missing.
    pub lost_since: Option<Instant>,
    /// Whether the attempt before has found that the key is moving.
    pub redirected: bool,
}

/// One command, and the server it is for.
#[derive(Clone, Debug)]
pub struct Command {
    node: Node,
    /// See [`Place::is_arriving`].
    is_arriving: bool,
    words: Words,
    /// The script that it calls, if it does.
    script: Option<&'static str>,
}

/// What a command says. What fred knows by name leaves together with what is sent
/// right behind it; each of the others goes out by itself.
#[derive(Clone, Debug)]
enum Words {
    /// So many bytes from the beginning.
    GetRange(String, usize),
    StrLen(String),
    Other(&'static str, Vec<Value>),
}

/// What the attempts at a write may have left behind, known even after its
/// future was dropped. The same one serves all attempts of a call.
#[derive(Debug, Default)]
pub struct Trail(Mutex<Left>);

#[derive(Clone, Copy, Debug, Default)]
struct Left {
    /// The attempt whose answer is waited for: when it was sent, and when it
    /// can no longer be executed.
    waiting: Option<(Instant, Instant)>,
    /// The same of attempts whose answer is missing: the first time of sending,
    /// the last time of execution.
    lost: Option<(Instant, Instant)>,
}

// === impl Attempts ===

impl<'a> Attempts<'a> {
    /// The time a call gets, all attempts together; there has to be time left
    /// for memory to answer within a second.
    pub const CALL_BOUND: Duration = Duration::from_millis(800);

    const MOST: u32 = 3;
    /// The pause before the second attempt is between nothing and this; it
    /// doubles with each further attempt.
    const FIRST_PAUSE: Duration = Duration::from_millis(10);

    /// The most that any attempt waits for its answer, if nothing larger than this
    /// is moved.
    pub fn longest_wait(timeout: Duration, bytes: usize) -> Duration {
        2 * (timeout + Traffic::time_for(bytes))
    }

    /// The attempts at a call that changes nothing.
    pub fn at_read(connections: &'a Connections, traffic: Traffic, deadline: Deadline) -> Self {
        Self::new(connections, traffic, deadline, None)
    }

    /// The attempts at writes, which go on from those in `trail`.
    pub fn at_write(
        connections: &'a Connections,
        traffic: Traffic,
        deadline: Deadline,
        trail: &'a Trail,
    ) -> Self {
        Self::new(connections, traffic, deadline, Some(trail))
    }

    fn new(
        connections: &'a Connections,
        traffic: Traffic,
        deadline: Deadline,
        trail: Option<&'a Trail>,
    ) -> Self {
        // A longer timeout than the default is meant to be waited for, by
        // callers who have the time. The service itself has all the time that a
        // large document takes.
        let bound = if traffic.lane == Lane::Repair {
            Self::CALL_BOUND + Self::longest_wait(Duration::ZERO, traffic.bytes)
        } else if deadline.instant().is_some() {
            Self::CALL_BOUND.max(connections.timeout() * Self::MOST)
        } else {
            Self::CALL_BOUND
        };
        let ours = Instant::now() + bound;
        Self {
            connections,
            traffic,
            trail,
            end: deadline.instant().map_or(ours, |at| at.min(ours)),
            lost_before: connections.stalls().lost(),
            made_up: Duration::ZERO,
            hurried: deadline.instant().is_some_and(|at| at < ours),
            made: 0,
            timed_out: false,
            redirected: false,
            unrouted: false,
            not_connected: false,
            no_turn: false,
            beside_large: false,
            reason: String::new(),
        }
    }

    /// Goes on, within the same time, with a call that was answered and has to
    /// move this.
    pub fn go_on_with(&mut self, traffic: Traffic) {
        self.traffic = traffic;
        self.made = 0;
    }

    /// Goes on after a first attempt that was made elsewhere.
    pub fn after_first(mut self, fault: &Fault) -> Self {
        self.unrouted = *fault == Fault::NoRoute;
        self.made = u32::from(!self.unrouted);
        self.redirected = *fault == Fault::Redirected;
        self
    }

    /// The next attempt, after a pause if it is not the first. None when the
    /// attempts or the time are used up.
    pub async fn next(&mut self) -> Option<Attempt> {
        while self.made < Self::MOST {
            self.make_up();
            // No pause may take the time of an answer.
            let most = self.end.saturating_duration_since(Instant::now()) / 4;
            if self.unrouted {
                // It will in a moment.
                tokio::time::sleep(Self::FIRST_PAUSE.min(most)).await;
            } else if self.made > 0 {
                let longest = (Self::FIRST_PAUSE * 2u32.pow(self.made - 1)).min(most);
                tokio::time::sleep(longest.mul_f64(rand::random())).await;
            }
            if let Some(trail) = self.trail {
                // A request may outlive its connection. Two attempts of one
                // call must not both be executed, the first after the second
                // and after what others have written in between.
                trail.end().await;
            }
            let share = tokio::time::timeout_at(self.end, self.share()).await;
            let now = Instant::now();
            let Ok(share) = share else {
                self.no_turn = true;
                return None;
            };
            if now >= self.end {
                self.no_turn = share.is_some();
                return None;
            }
            self.made += 1;
            if let Some(link) = self.connections.link()
                && let Some(connection) = link.connection(self.traffic.lane)
            {
                self.not_connected = false;
                let connection = connection.clone();
                return Some(self.attempt(link, connection, share, now));
            }
            self.not_connected = true;
            self.reason = self.connections.why_not();
        }
        None
    }

    /// What this process loses is not taken from Redis.
    fn make_up(&mut self) {
        if !self.hurried {
            let lost = self.connections.stalls().lost_since(self.lost_before);
            self.end += lost.saturating_sub(self.made_up);
            self.made_up = self.made_up.max(lost);
        }
    }

    /// Waits for the turn of a large document.
    async fn share(&self) -> Option<BulkShare> {
        match self.traffic.lane {
            Lane::Bulk => Some(self.connections.bulk().take(self.traffic.bytes).await),
            _ => None,
        }
    }

    fn attempt(
        &mut self,
        link: Arc<Link>,
        connection: Arc<Renewable>,
        share: Option<BulkShare>,
        now: Instant,
    ) -> Attempt {
        if self.made > 1 {
            telemetry::redis_retries();
        }
        // Half of what is left, so that there is time for another answer.
        let timeout = self.connections.timeout() + Traffic::time_for(self.traffic.bytes);
        let part = |from: Instant| ((self.end - from) / 2).min(timeout);
        let until = now + part(now);
        let server = link.only_server().cloned();
        let large_repairs = self.connections.large_repairs();
        let large_repair = (self.traffic.lane == Lane::Repair && self.traffic.is_large())
            .then(|| large_repairs.clone());
        self.beside_large |= self.is_beside_large();
        Attempt {
            link,
            connection,
            _share: share,
            _large_repair: large_repair,
            server,
            redirected: self.redirected,
            sent: now,
            until,
            answer_by: match self.trail {
                Some(_) => until + part(until),
                None => until,
            },
            lost_since: self.trail.and_then(Trail::lost_since),
        }
    }

    /// Takes in the fault of `attempt`. An error when repeating is of no use.
    pub fn failed(&mut self, attempt: &Attempt, fault: Fault) -> Result<(), NotDone> {
        self.timed_out |= Instant::now() >= attempt.answer_by;
        self.redirected = fault == Fault::Redirected;
        self.unrouted = fault == Fault::NoRoute;
        attempt.heed(&fault);
        match fault {
            Fault::NoRoute => {
                self.made -= 1;
                self.reason = "one of its servers is not connected yet".into();
            }
            Fault::Final(error) => return Err(NotDone::answered(error)),
            Fault::NotRun(text) | Fault::Lost(text) => self.reason = text,
            Fault::Redirected => self.reason = "keys are moving between its servers".into(),
            Fault::NoScript => self.reason = "it does not keep the scripts it is given".into(),
        }
        Ok(())
    }

    /// Whether its connection carries large documents, too. If not, whoever gets no answer
    /// by it knows that Redis is as good as down.
    fn is_beside_large(&self) -> bool {
        match self.traffic.lane {
            Lane::Bulk => true,
            // One is held by the connections.
            Lane::Repair => Arc::strong_count(self.connections.large_repairs()) > 1,
            Lane::Calls | Lane::Health => false,
        }
    }

    /// The error of a call that has used up its attempts or its time.
    pub fn used_up(self) -> NotDone {
        // A caller in a hurry has seen nothing that speaks against Redis, unless
        // every attempt was refused.
        let in_a_hurry = self.hurried && (self.timed_out || self.made < Self::MOST);
        let error = if self.trail.and_then(Trail::lost_since).is_some() {
            // What may have been executed must not be reported as if it was not.
            StoreError::OutcomeUnknown
        } else if self.no_turn {
            telemetry::call_shed(Limit::RedisMaxBulkBytes);
            StoreError::TooMuchAtOnce {
                limit: self.connections.bulk().most(),
            }
        } else if in_a_hurry {
            StoreError::DeadlineExceeded
        } else {
            StoreError::Unavailable(format!("Redis does not answer: {}", self.reason))
        };
        // Large documents may take longer than a call has, and those who wait for them
        // say nothing of Redis: its health is judged on another connection. Nor does
        // time that we have lost ourselves.
        let lost = self.connections.stalls().lost_since(self.lost_before);
        let was_held_up = lost >= self.connections.timeout() / 2;
        let out_of_time = self.timed_out || self.made == 0;
        // But where there is no connection, that is no matter of time.
        let beside_large = self.beside_large || self.is_beside_large();
        let is_slow = out_of_time && !self.not_connected && (beside_large || was_held_up);
        if self.no_turn {
            NotDone::answered(error)
        } else if is_slow {
            NotDone::held_up(error)
        } else if in_a_hurry {
            NotDone::short_of_time(error)
        } else {
            NotDone::unwell(error, self.reason)
        }
    }
}

// === impl Traffic ===

impl Traffic {
    /// A document of more than this is a large one: it goes by a connection of its own
    /// kind, and is counted.
    pub const SMALL_BYTES: usize = 16 << 10;

    /// A link that moves fewer bytes a second than this is as good as down.
    const SLOWEST_LINK: usize = 1 << 20;

    /// A call of somebody, or of the service itself, on documents of so many bytes.
    pub fn of(own_lane: Lane, bytes: usize) -> Self {
        let lane = match own_lane {
            Lane::Calls if bytes > Self::SMALL_BYTES => Lane::Bulk,
            lane => lane,
        };
        Self { lane, bytes }
    }

    fn is_large(&self) -> bool {
        self.bytes > Self::SMALL_BYTES
    }

    /// The time that so many bytes may take besides what a small command gets.
    fn time_for(bytes: usize) -> Duration {
        if bytes <= Self::SMALL_BYTES {
            return Duration::ZERO;
        }
        Duration::from_secs_f64(bytes as f64 / Self::SLOWEST_LINK as f64)
    }
}

// === impl Attempt ===

impl Attempt {
    /// Runs one command that changes no document.
    pub async fn run(&self, command: Command) -> Result<Value, Fault> {
        if command.is_arriving {
            let both = vec![command.asking(), command];
            let replies = Box::pin(self.pipeline(both)).await?;
            let missing = || Err(Fault::Lost("replies are missing".into()));
            return replies.into_iter().nth(1).unwrap_or_else(missing);
        }
        let span = self.span(slice::from_ref(&command));
        let client = self.connection.client().with_options(&command.options());
        let Command { node, words, .. } = command;
        // What fred makes of it is large, and would be moved with all that waits for it.
        let reply = self.within(Box::pin(words.send(&client))).await;
        if !matches!(reply, Err(Fault::Lost(_))) {
            self.connection.answers(&node);
        }
        span.ends(reply.as_ref().err().map(Fault::kind));
        reply
    }

    /// Replaces the connection to a server that has become a replica: its address may
    /// lead to the primary by now.
    pub fn heed(&self, fault: &Fault) {
        if fault.is_of_replica() {
            self.connection.renew();
        }
    }

    /// Runs one command that is answered by 1 or 0.
    pub async fn says_yes(&self, command: Command) -> Result<bool, Fault> {
        Ok(self.run(command).await?.as_i64() == Some(1))
    }

    /// Runs one command that may change a document.
    pub async fn run_write(&self, trail: &Trail, command: Command) -> Result<Value, Fault> {
        trail.sent(self);
        let reply = self.run(command).await;
        if !matches!(reply, Err(Fault::Lost(_))) {
            trail.answered();
        }
        reply
    }

    /// Runs commands in one pipeline, those to one server right after each
    /// other. One result each, in order.
    pub async fn pipeline(
        &self,
        commands: Vec<Command>,
    ) -> Result<Vec<Result<Value, Fault>>, Fault> {
        let span = self.span(&commands);
        let client = self.connection.client();
        let pipeline = client.pipeline();
        let queued = commands.len();
        let nodes: Vec<_> = commands
            .iter()
            .map(|command| command.node.clone())
            .collect();
        for command in commands {
            let pipeline = pipeline.with_options(&command.options());
            // Answered at once; sent below.
            let answer = command.words.send(&pipeline).await;
            answer.map_err(|error| Fault::NotRun(error.details().to_owned()))?;
        }
        let replies = self
            .within(async { Ok(pipeline.try_all::<Value>().await) })
            .await;
        span.ends(match &replies {
            Ok(replies) => {
                let mut errors = replies.iter().filter_map(|reply| reply.as_ref().err());
                errors.next().map(|error| Fault::of(error).kind())
            }
            Err(fault) => Some(fault.kind()),
        });
        let replies = replies?;
        if replies.len() == queued {
            for (node, reply) in nodes.iter().zip(&replies) {
                if reply.is_ok() {
                    self.connection.answers(node);
                }
            }
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

    /// The span of commands that are sent now: a single one, or a pipeline.
    fn span(&self, commands: &[Command]) -> RedisSpan {
        RedisSpan::begin(|| RedisRequest {
            command: the_same(commands, |command| command.words.name()),
            script: the_same(commands, |command| command.script).flatten(),
            pipelined: (commands.len() > 1).then_some(commands.len()),
            server: the_same(commands, |command| &command.node)
                .and_then(|node| node.address().or(self.server.as_deref()))
                .map(|server| (&*server.host, server.port)),
        })
    }

    /// Awaits a call of fred, at most until the attempt is given up.
    async fn within<T>(&self, call: impl Future<Output = Result<T, Error>>) -> Result<T, Fault> {
        match tokio::time::timeout_at(self.answer_by, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(Fault::of(&error)),
            Err(_) => Err(Fault::Lost("no answer in time".into())),
        }
    }
}

// === impl Trail ===

impl Trail {
    /// An attempt goes out. Until it is answered, it may be executed.
    pub fn sent(&self, attempt: &Attempt) {
        let mut left = lock(&self.0);
        left.give_up_waiting();
        left.waiting = Some((attempt.sent, attempt.until));
    }

    /// The last attempt was answered: it leaves nothing behind.
    pub fn answered(&self) {
        lock(&self.0).waiting = None;
    }

    /// When the first attempt was sent that may have been executed although its
    /// answer is missing.
    pub fn lost_since(&self) -> Option<Instant> {
        let mut left = lock(&self.0);
        left.give_up_waiting();
        left.lost.map(|(sent, _)| sent)
    }

    /// Waits until no attempt can be executed any more. True if one may have
    /// been executed.
    pub async fn end(&self) -> bool {
        let lost = {
            let mut left = lock(&self.0);
            left.give_up_waiting();
            left.lost
        };
        match lost {
            Some((_, until)) => {
                tokio::time::sleep_until(until).await;
                true
            }
            None => false,
        }
    }
}

// === impl Left ===

impl Left {
    fn give_up_waiting(&mut self) {
        if let Some((sent, until)) = self.waiting.take() {
            self.lost = Some(match self.lost {
                Some((first, last)) => (first.min(sent), last.max(until)),
                None => (sent, until),
            });
        }
    }
}

// === impl Command ===

impl Command {
    /// A command without a key.
    pub fn at(node: &Node, name: &'static str, arguments: Vec<Value>) -> Self {
        Self {
            node: node.clone(),
            is_arriving: false,
            words: Words::Other(name, arguments),
            script: None,
        }
    }

    /// A command on a key, which `arguments` contains.
    pub fn on(place: &Place, name: &'static str, arguments: Vec<Value>) -> Self {
        Self::say(place, Words::Other(name, arguments))
    }

    /// The value at a key, but no more than so many bytes of it.
    pub fn get_up_to(place: &Place, bytes: usize) -> Self {
        Self::say(place, Words::GetRange(place.key.clone(), bytes))
    }

    /// Whether there is a value at a key.
    pub fn exists(place: &Place) -> Self {
        Self::on(place, "EXISTS", vec![place.key.as_str().into()])
    }

    /// The length of the value at a key.
    pub fn str_len(place: &Place) -> Self {
        Self::say(place, Words::StrLen(place.key.clone()))
    }

    fn say(place: &Place, words: Words) -> Self {
        Self {
            node: place.node.clone(),
            is_arriving: place.is_arriving,
            words,
            script: None,
        }
    }

    /// Says which script it calls.
    pub fn of_script(self, script: &'static str) -> Self {
        Self {
            script: Some(script),
            ..self
        }
    }

    /// What a server has to be told that is about to get the key.
    fn asking(&self) -> Self {
        Self::at(&self.node, "ASKING", Vec::new())
    }

    fn options(&self) -> Options {
        Options {
            cluster_node: self.node.address().cloned(),
            ..Options::default()
        }
    }
}

// === impl Words ===

impl Words {
    fn name(&self) -> &'static str {
        match self {
            Self::GetRange(..) => "GETRANGE",
            Self::StrLen(_) => "STRLEN",
            Self::Other(name, _) => name,
        }
    }

    async fn send(self, client: &impl KeysInterface) -> Result<Value, Error> {
        match self {
            // The last byte is included.
            Self::GetRange(key, bytes) => client.getrange(key, 0, bytes.saturating_sub(1)).await,
            Self::StrLen(key) => client.strlen(key).await,
            Self::Other(name, arguments) => {
                // In a cluster, the options say where it goes.
                let command = CustomCommand::new_static(name, ClusterHash::Random, false);
                client.custom(command, arguments).await
            }
        }
    }
}

/// What is the same of all commands; None if it differs.
fn the_same<'a, T: PartialEq>(commands: &'a [Command], of: impl Fn(&'a Command) -> T) -> Option<T> {
    let (first, others) = commands.split_first()?;
    let first = of(first);
    others
        .iter()
        .all(|other| of(other) == first)
        .then_some(first)
}
