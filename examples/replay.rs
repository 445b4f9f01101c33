//! Three replicas of an alert-history service share one groupstate.
//!
//! Replays webhooks that a real Alertmanager sent: the alerts of each webhook
//! are dealt out to the replicas, which add them to the same group at the same
//! moment. At the end every group must hold exactly the alerts that the file
//! says.
//!
//! ```text
//! cargo run --bin groupstate
//! cargo run --example replay
//! ```
//!
//! What makes this safe is the loop in [`Replica::make`]: load, change,
//! compare-and-swap, and after a lost race the same change once more on what is
//! stored by then. It asks one thing of a change, [`Webhook::apply_to`]: applied
//! twice, or in another order than others, it must lead to the same group.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    error::Error,
    fs, io,
    num::NonZeroUsize,
    ops::AddAssign,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeDelta, Utc};
use clap::Parser;
use groupstate::{
    group::AlertStatus,
    grpc::proto::{self as pb, group_state_service_client::GroupStateServiceClient},
};
use prost_types::Timestamp;
use serde::{Deserialize, Deserializer, de};
use tokio::{sync::Barrier, task::JoinSet};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

/// Replays Alertmanager webhooks into a running groupstate, as several replicas
/// side by side, and checks that no alert is lost.
///
/// Exits with 1 if the replay fails or a group is not as the file says.
#[derive(Debug, Parser)]
#[command(name = "replay", max_term_width = 100)]
struct Options {
    /// Where groupstate serves gRPC.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:50051")]
    addr: String,

    /// Webhooks of Alertmanager (version 4), one JSON object a line.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "tests/data/alertmanager-webhooks.jsonl"
    )]
    file: PathBuf,

    /// Replicas that share the alerts of each webhook.
    #[arg(long, value_name = "COUNT", default_value = "3")]
    replicas: NonZeroUsize,
}

/// A webhook, or one replica's share of it: reports on alerts of one group.
#[derive(Clone, Debug)]
struct Webhook {
    /// The group key.
    key: String,
    /// Names of the labels by which the group was formed.
    group_by: Vec<String>,
    reports: Vec<pb::Alert>,
}

/// What this program reads of a line of the file.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WebhookLine {
    alerts: Vec<ReportedAlert>,
    group_labels: BTreeMap<String, String>,
}

/// An alert as Alertmanager reports it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReportedAlert {
    fingerprint: String,
    status: AlertStatus,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    #[serde(deserialize_with = "go_time")]
    starts_at: Option<DateTime<Utc>>,
    #[serde(deserialize_with = "go_time")]
    ends_at: Option<DateTime<Utc>>,
    #[serde(rename = "generatorURL")]
    generator_url: String,
}

/// Makes up when reports were received, which the file does not say: each after
/// everything reported so far, in the order of the file. So a time of receipt
/// also tells the place in the file.
#[derive(Debug, Default)]
struct ReceiptClock {
    /// The newest time that the file has named so far.
    newest: DateTime<Utc>,
    /// Reports so far; each takes a microsecond.
    ticks: i64,
}

/// Adds its share of every webhook, on a connection of its own.
struct Replica {
    client: GroupStateServiceClient<Channel>,
    tally: Tally,
}

/// What is stored at a key: a group or nothing.
type Stored = Option<pb::AlertGroup>;

/// How an attempt to make a change ended.
#[allow(
    clippy::large_enum_variant,
    reason = "one at a time, and taken apart at once"
)]
enum Outcome {
    Swapped,
    /// The stored group has the change already.
    NothingToDo,
    /// Another replica was faster; this is stored now.
    Lost(Stored),
}

/// What the replicas did.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    /// Groups that were swapped in.
    changes: u64,
    /// Lost races.
    conflicts: u64,
    /// Attempts to make a change, the lost and the failed ones included.
    attempts: u64,
    /// Attempts that had no answer, or one that did not say what happened.
    failures: u64,
}

/// The alerts that the file says, by group key and fingerprint.
type Expected<'a> = BTreeMap<&'a str, BTreeMap<&'a str, &'a pb::Alert>>;

/// What the service holds under the keys of the file.
#[derive(Debug, Default)]
struct Found {
    groups: BTreeMap<String, pb::AlertGroup>,
    /// What is stored but cannot be read.
    problems: Vec<pb::GroupError>,
    /// False when the service could not know every group.
    complete: bool,
}

/// Why a replay could not be brought to its end.
#[derive(Debug, thiserror::Error)]
enum ReplayError {
    #[error("{}: {error}", .file.display())]
    Read { file: PathBuf, error: io::Error },
    #[error("{}, line {line}: {error}", .file.display())]
    Parse {
        file: PathBuf,
        line: usize,
        error: serde_json::Error,
    },
    #[error("--addr {addr}: {error}")]
    Connect { addr: String, error: String },
    #[error("group {key:?}: {}", describe(.status))]
    Refused { key: String, status: Status },
    #[error("group {key:?}: given up after {attempts} attempts, of which the last {last}")]
    GivenUp {
        key: String,
        attempts: u32,
        last: String,
    },
    #[error("LoadAll: {}", describe(.0))]
    LoadAll(Status),
}

/// What one call gets. A call that hangs is worth another attempt.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// What reading back all groups gets.
const LOAD_ALL_TIMEOUT: Duration = Duration::from_secs(10);
/// With the back-off below this is about five seconds: enough to sit out a
/// restart of the service.
const MAX_ATTEMPTS: u32 = 20;
const FIRST_BACKOFF: Duration = Duration::from_millis(2);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// How Go writes the absence of a time.
const GO_ZERO_TIME: &str = "0001-01-01T00:00:00Z";
/// Differences that are printed; more are counted.
const MAX_DIFFERENCES_SHOWN: usize = 20;

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Options::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Replays, prints what came of it, and says whether all is as it should be.
async fn run(options: &Options) -> Result<bool, ReplayError> {
    let webhooks: Arc<[Webhook]> = read_webhooks(&options.file)?.into();
    let expected = expected_alerts(&webhooks);

    let begin = Instant::now();
    let tally = replay(&options.addr, options.replicas.get(), &webhooks).await?;
    let seconds = begin.elapsed().as_secs_f64();

    let found = load_all(connect(&options.addr).await?, &expected).await?;
    let alerts: usize = found.groups.values().map(|group| group.alerts.len()).sum();
    println!("webhooks   {}", webhooks.len());
    println!("groups     {}", found.groups.len());
    println!("alerts     {alerts}");
    println!("changes    {}", tally.changes);
    println!("conflicts  {}", tally.conflicts);
    println!("attempts   {}", tally.attempts);
    println!("failures   {}", tally.failures);
    println!("seconds    {seconds:.2}");

    let differences = differences(&expected, &found);
    if differences.is_empty() {
        println!("check: ok");
        return Ok(true);
    }
    println!("check: {} differences", differences.len());
    for difference in differences.iter().take(MAX_DIFFERENCES_SHOWN) {
        println!("  {difference}");
    }
    if differences.len() > MAX_DIFFERENCES_SHOWN {
        println!("  and {} more", differences.len() - MAX_DIFFERENCES_SHOWN);
    }
    Ok(false)
}

/// Lets the replicas work through the webhooks, each with its share of the
/// alerts.
async fn replay(
    addr: &str,
    replicas: usize,
    webhooks: &Arc<[Webhook]>,
) -> Result<Tally, ReplayError> {
    // All replicas begin each webhook at the same moment. Left alone they would
    // drift apart and seldom meet in a group.
    let together = Arc::new(Barrier::new(replicas));
    let mut running = JoinSet::new();
    for number in 0..replicas {
        let mut replica = Replica {
            client: connect(addr).await?,
            tally: Tally::default(),
        };
        let (together, webhooks) = (together.clone(), webhooks.clone());
        running.spawn(async move {
            for webhook in webhooks.iter() {
                together.wait().await;
                let share = webhook.share_of(number, replicas);
                if !share.reports.is_empty() {
                    replica.make(&share).await?;
                }
            }
            Ok(replica.tally)
        });
    }

    let mut total = Tally::default();
    while let Some(finished) = running.join_next().await {
        // A replica that fails ends the others: they would wait for it.
        total += finished.expect("no replica panics or is aborted")?;
    }
    Ok(total)
}

async fn connect(addr: &str) -> Result<GroupStateServiceClient<Channel>, ReplayError> {
    let connecting = async {
        let endpoint = Endpoint::from_shared(addr.to_owned())?
            .connect_timeout(CALL_TIMEOUT)
            .tcp_nodelay(true);
        endpoint.connect().await
    };
    match connecting.await {
        Ok(channel) => Ok(GroupStateServiceClient::new(channel)),
        Err(error) => Err(ReplayError::Connect {
            addr: addr.to_owned(),
            error: root_cause(&error).to_string(),
        }),
    }
}

// === impl Replica ===

impl Replica {
    /// Adds the reports to their group, however many others change it too.
    async fn make(&mut self, change: &Webhook) -> Result<(), ReplayError> {
        let mut seen = None;
        let mut last = String::new();
        for attempt in 0..MAX_ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(backoff(attempt)).await;
            }
            self.tally.attempts += 1;
            match self.attempt(change, seen.take()).await {
                Ok(Outcome::Swapped) => {
                    self.tally.changes += 1;
                    return Ok(());
                }
                Ok(Outcome::NothingToDo) => return Ok(()),
                Ok(Outcome::Lost(current)) => {
                    self.tally.conflicts += 1;
                    seen = Some(current);
                    last = "lost a race".into();
                }
                // Maybe it happened, maybe not: the next attempt loads the
                // group and sees.
                Err(status) if is_worth_another_attempt(&status) => {
                    self.tally.failures += 1;
                    last = format!("failed: {}", describe(&status));
                }
                Err(status) => {
                    return Err(ReplayError::Refused {
                        key: change.key.clone(),
                        status,
                    });
                }
            }
        }
        Err(ReplayError::GivenUp {
            key: change.key.clone(),
            attempts: MAX_ATTEMPTS,
            last,
        })
    }

    /// Tries once, on what a lost race has just shown to be stored, or else on
    /// what is loaded.
    async fn attempt(&mut self, change: &Webhook, seen: Option<Stored>) -> Result<Outcome, Status> {
        let stored = match seen {
            Some(stored) => stored,
            None => self.load(&change.key).await?,
        };
        let group = change.apply_to(stored.clone());
        if stored.as_ref() == Some(&group) {
            return Ok(Outcome::NothingToDo);
        }
        let request = pb::CompareAndSwapRequest {
            expected_version: version_of(stored.as_ref()),
            group: Some(group),
            expiry: None,
        };
        let reply = self
            .client
            .compare_and_swap(within(CALL_TIMEOUT, request))
            .await?
            .into_inner();
        Ok(if reply.swapped {
            Outcome::Swapped
        } else {
            Outcome::Lost(reply.current)
        })
    }

    async fn load(&mut self, key: &str) -> Result<Stored, Status> {
        let request = pb::LoadRequest {
            key: key.to_owned(),
            include_expire_time: false,
        };
        match self.client.load(within(CALL_TIMEOUT, request)).await {
            Ok(reply) => Ok(reply.into_inner().group),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status),
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.changes += other.changes;
        self.conflicts += other.conflicts;
        self.attempts += other.attempts;
        self.failures += other.failures;
    }
}

/// The version to expect; zero for "absent".
fn version_of(stored: Option<&pb::AlertGroup>) -> i64 {
    stored
        .and_then(|group| group.metadata.as_ref())
        .map_or(0, |metadata| metadata.version)
}

/// A request with a deadline, which both ends heed.
fn within<T>(timeout: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

/// Exponential, with full jitter: replicas that met once must not meet again.
fn backoff(attempt: u32) -> Duration {
    let longest = FIRST_BACKOFF.saturating_mul(1 << (attempt - 1).min(16));
    longest.min(LONGEST_BACKOFF).mul_f64(rand::random())
}

/// Whether the same call may fare better in a moment.
fn is_worth_another_attempt(status: &Status) -> bool {
    match status.code() {
        Code::Aborted | Code::Unavailable | Code::DeadlineExceeded => true,
        // The service gives details with every status. One without comes from
        // the client library: the connection broke, or the time was up.
        Code::Cancelled | Code::Internal | Code::Unknown => status.details().is_empty(),
        _ => false,
    }
}

fn describe(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// The error behind an error: tonic's own says only "transport error".
fn root_cause<'a>(mut error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    while let Some(cause) = error.source() {
        error = cause;
    }
    error
}

// === impl Webhook ===

impl Webhook {
    /// What replica `number` of `replicas` gets: the reports are dealt out in
    /// turn.
    fn share_of(&self, number: usize, replicas: usize) -> Self {
        let reports = self.reports.iter().skip(number).step_by(replicas);
        Self {
            key: self.key.clone(),
            group_by: self.group_by.clone(),
            reports: reports.cloned().collect(),
        }
    }

    /// The stored group with these reports added.
    ///
    /// Reports may come in any order and any number of times: of every alert the
    /// report of the highest rank stays, and of the metadata each field is the
    /// earliest or latest of its kind, or follows from the alerts.
    fn apply_to(&self, stored: Stored) -> pb::AlertGroup {
        let mut group = stored.unwrap_or_default();
        group.key.clone_from(&self.key);
        let mut metadata = group.metadata.take().unwrap_or_default();
        for report in &self.reports {
            metadata.created_at = earlier(metadata.created_at, report.timestamp);
            metadata.updated_at = later(metadata.updated_at, report.timestamp);
            metadata.first_firing_at = earlier(metadata.first_firing_at, report.starts_at);
            match group.alerts.entry(report.fingerprint.clone()) {
                Entry::Vacant(absent) => {
                    absent.insert(report.clone());
                }
                Entry::Occupied(mut known) if rank(report) > rank(known.get()) => {
                    known.insert(report.clone());
                }
                Entry::Occupied(_) => {}
            }
        }
        metadata.group_by.clone_from(&self.group_by);
        let (state, firing, resolved) = state_of(group.alerts.values());
        metadata.set_state(state);
        metadata.firing_count = firing;
        metadata.resolved_count = resolved;
        metadata.resolved_at = match state {
            pb::GroupState::Resolved => {
                let ends = group.alerts.values().map(|alert| alert.ends_at);
                ends.fold(None, later)
            }
            _ => None,
        };
        group.metadata = Some(metadata);
        group
    }
}

/// Decides which of two reports on one alert counts: the one whose alert began
/// later; of the same beginning, "resolved", since an alert that fires again
/// begins anew; then the one that was received later. No two reports of a file
/// are received at the same time, so no two have the same rank.
fn rank(report: &pb::Alert) -> impl Ord {
    (
        report.starts_at.map(moment),
        report.status() == pb::AlertStatus::Resolved,
        report.timestamp.map(moment),
    )
}

/// The state of a group with these alerts; how many fire, how many are
/// resolved.
fn state_of<'a>(alerts: impl Iterator<Item = &'a pb::Alert>) -> (pb::GroupState, i32, i32) {
    let (mut firing, mut resolved) = (0, 0);
    for alert in alerts {
        match alert.status() {
            pb::AlertStatus::Resolved => resolved += 1,
            _ => firing += 1,
        }
    }
    let state = match (firing, resolved) {
        (_, 0) => pb::GroupState::Firing,
        (0, _) => pb::GroupState::Resolved,
        _ => pb::GroupState::Mixed,
    };
    (state, firing, resolved)
}

/// A time as something that can be compared.
fn moment(time: Timestamp) -> (i64, i32) {
    (time.seconds, time.nanos)
}

/// The earlier of two times; an absent one does not count.
fn earlier(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    [one, other]
        .into_iter()
        .flatten()
        .min_by_key(|time| moment(*time))
}

/// The later of two times; an absent one does not count.
fn later(one: Option<Timestamp>, other: Option<Timestamp>) -> Option<Timestamp> {
    [one, other]
        .into_iter()
        .flatten()
        .max_by_key(|time| moment(*time))
}

// === reading the file ===

fn read_webhooks(file: &Path) -> Result<Vec<Webhook>, ReplayError> {
    let text = fs::read_to_string(file).map_err(|error| ReplayError::Read {
        file: file.to_owned(),
        error,
    })?;
    let mut clock = ReceiptClock::default();
    text.lines()
        .enumerate()
        .map(|(index, line)| match serde_json::from_str(line) {
            Ok(line) => Ok(webhook(line, &mut clock)),
            Err(error) => Err(ReplayError::Parse {
                file: file.to_owned(),
                line: index + 1,
                error,
            }),
        })
        .collect()
}

fn webhook(line: WebhookLine, clock: &mut ReceiptClock) -> Webhook {
    clock.advance(&line.alerts);
    Webhook {
        key: group_key(&line.group_labels),
        group_by: line.group_labels.into_keys().collect(),
        reports: line
            .alerts
            .into_iter()
            .map(|alert| report(alert, clock.tick()))
            .collect(),
    }
}

fn report(alert: ReportedAlert, received: DateTime<Utc>) -> pb::Alert {
    pb::Alert {
        fingerprint: alert.fingerprint,
        alert_name: alert.labels.get("alertname").cloned().unwrap_or_default(),
        status: match alert.status {
            AlertStatus::Firing => pb::AlertStatus::Firing,
            AlertStatus::Resolved => pb::AlertStatus::Resolved,
        }
        .into(),
        labels: alert.labels,
        annotations: alert.annotations,
        starts_at: alert.starts_at.map(timestamp),
        ends_at: alert.ends_at.map(timestamp),
        generator_url: alert.generator_url,
        timestamp: Some(timestamp(received)),
    }
}

impl ReceiptClock {
    /// A webhook is received after everything that it reports.
    fn advance(&mut self, alerts: &[ReportedAlert]) {
        let times = alerts
            .iter()
            .flat_map(|alert| [alert.starts_at, alert.ends_at]);
        self.newest = times.flatten().fold(self.newest, DateTime::max);
    }

    /// When the next report is received: later than all before.
    fn tick(&mut self) -> DateTime<Utc> {
        self.ticks += 1;
        self.newest + TimeDelta::microseconds(self.ticks)
    }
}

fn timestamp(time: DateTime<Utc>) -> Timestamp {
    Timestamp {
        seconds: time.timestamp(),
        // Less than 2 * 10^9, leap seconds included.
        nanos: time.timestamp_subsec_nanos() as i32,
    }
}

/// Reads a time as Go writes it; the zero time stands for "none".
fn go_time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<DateTime<Utc>>, D::Error> {
    let text = String::deserialize(from)?;
    let time = DateTime::parse_from_rfc3339(&text).map_err(de::Error::custom)?;
    Ok(Some(time.to_utc()).filter(|_| text != GO_ZERO_TIME))
}

/// The group key that the Go service makes of these labels, so that Rust and Go
/// replicas meet in the same group.
fn group_key(labels: &BTreeMap<String, String>) -> String {
    if labels.is_empty() {
        return "{global}".into();
    }
    // A BTreeMap is in the order of bytes.
    let pairs = labels
        .iter()
        .map(|(name, value)| format!("{name}={}", key_value(value)));
    pairs.collect::<Vec<_>>().join(",")
}

/// A label value within a key: as it is, or query-escaped as a whole if any of
/// its characters could be mistaken for the key's own. What stands for an absent
/// label is not escaped even where it is a value.
fn key_value(value: &str) -> String {
    let plain = |c: char| c.is_ascii() && !", ={}[]<>".contains(c);
    if value.chars().all(plain) || value == "<missing>" {
        return value.to_owned();
    }
    let escape = |byte: u8| match byte {
        b' ' => "+".to_owned(),
        b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' | b'.' | b'~' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    value.bytes().map(escape).collect()
}

// === the check ===

/// What the groups must hold, from the file alone: of every alert the report of
/// the highest rank.
fn expected_alerts(webhooks: &[Webhook]) -> Expected<'_> {
    let mut expected = Expected::new();
    for webhook in webhooks {
        let alerts = expected.entry(&webhook.key).or_default();
        for report in &webhook.reports {
            let alert = alerts.entry(&report.fingerprint).or_insert(report);
            if rank(report) > rank(alert) {
                *alert = report;
            }
        }
    }
    expected
}

/// Reads all groups back, and keeps those of the file.
async fn load_all(
    mut client: GroupStateServiceClient<Channel>,
    expected: &Expected<'_>,
) -> Result<Found, ReplayError> {
    let mut attempt = 1;
    loop {
        let read = try_load_all(&mut client, expected);
        let status = match tokio::time::timeout(LOAD_ALL_TIMEOUT, read).await {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded("the stream did not end in time"),
        };
        if attempt == MAX_ATTEMPTS || !is_worth_another_attempt(&status) {
            return Err(ReplayError::LoadAll(status));
        }
        tokio::time::sleep(backoff(attempt)).await;
        attempt += 1;
    }
}

async fn try_load_all(
    client: &mut GroupStateServiceClient<Channel>,
    expected: &Expected<'_>,
) -> Result<Found, Status> {
    let mut found = Found::default();
    let is_ours = |key: &str| expected.contains_key(key);
    let request = within(LOAD_ALL_TIMEOUT, pb::LoadAllRequest::default());
    let mut messages = client.load_all(request).await?.into_inner();
    while let Some(message) = messages.message().await? {
        for group in message.groups {
            if is_ours(&group.key) {
                // One that comes twice is newer the second time.
                found.groups.insert(group.key.clone(), group);
            }
        }
        let problems = message.problems.into_iter();
        let ours = problems.filter(|problem| is_ours(&problem.key));
        found.problems.extend(ours);
        if let Some(summary) = message.summary {
            found.complete = summary.complete;
            return Ok(found);
        }
    }
    Err(Status::aborted("the stream ended without a summary"))
}

/// Every way in which what was found is not what the file says.
fn differences(expected: &Expected<'_>, found: &Found) -> Vec<String> {
    let mut differences = Vec::new();
    if !found.complete {
        differences.push("memory answered for Redis and may not know every group".into());
    }
    for problem in &found.problems {
        differences.push(format!("group {:?}: {}", problem.key, problem.message));
    }
    for (key, alerts) in expected {
        let in_group = match found.groups.get(*key) {
            Some(group) => group_differences(alerts, group),
            None => vec!["is missing".into()],
        };
        let in_group = in_group.iter();
        differences.extend(in_group.map(|difference| format!("group {key:?}: {difference}")));
    }
    differences
}

fn group_differences(expected: &BTreeMap<&str, &pb::Alert>, group: &pb::AlertGroup) -> Vec<String> {
    let mut differences = Vec::new();
    for (fingerprint, alert) in expected {
        match group.alerts.get(*fingerprint) {
            Some(found) => differences.extend(
                differing_fields(alert, found)
                    .map(|field| format!("alert {fingerprint}: {field} differs")),
            ),
            None => differences.push(format!("alert {fingerprint} is missing")),
        }
    }
    for fingerprint in group.alerts.keys() {
        if !expected.contains_key(fingerprint.as_str()) {
            differences.push(format!("alert {fingerprint} is not in the file"));
        }
    }
    let expected = state_of(expected.values().copied());
    let found = group.metadata.as_ref().map(|metadata| {
        (
            metadata.state(),
            metadata.firing_count,
            metadata.resolved_count,
        )
    });
    if found != Some(expected) {
        differences.push(format!("state and counts are {found:?}, not {expected:?}"));
    }
    differences
}

fn differing_fields(one: &pb::Alert, other: &pb::Alert) -> impl Iterator<Item = &'static str> {
    [
        ("alert_name", one.alert_name == other.alert_name),
        ("status", one.status == other.status),
        ("labels", one.labels == other.labels),
        ("annotations", one.annotations == other.annotations),
        ("starts_at", one.starts_at == other.starts_at),
        ("ends_at", one.ends_at == other.ends_at),
        ("generator_url", one.generator_url == other.generator_url),
        ("timestamp", one.timestamp == other.timestamp),
    ]
    .into_iter()
    .filter_map(|(field, same)| (!same).then_some(field))
}
