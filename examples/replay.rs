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

use std::{
    collections::BTreeMap, fs, io, num::NonZeroUsize, path::PathBuf, process::ExitCode, sync::Arc,
    time::Duration,
};

use clap::Parser;
use groupstate::{
    domain::{
        group::{Alert, AlertGroup, GroupKey, Time},
        retention::Retention,
    },
    manager::{
        AlertGroupManager, ManagerError, ManagerSettings, Restored,
        affinity::{Instances, ResolveError},
        group_keys::GroupKeys,
        known::Filter,
        remote::RemoteSettings,
        webhook::Webhook,
    },
    store::{Deadline, GroupStore, StoreError},
};
use tokio::{sync::Barrier, task::JoinSet, time::Instant};

/// Replays Alertmanager webhooks into a running groupstate, as several replicas
/// side by side, and checks that no alert is lost.
///
/// Exits with 1 if the replay fails or a group is not as the file says.
#[derive(Debug, Parser)]
#[command(name = "replay", max_term_width = 100)]
struct Options {
    /// Where groupstate serves gRPC.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
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

/// What a webhook reports of its group.
struct Reports {
    key: GroupKey,
    /// Names of the labels by which the group was formed.
    group_by: Vec<String>,
    alerts: Vec<Alert>,
}

/// The groups that the file has, as they must be.
type Expected = BTreeMap<GroupKey, AlertGroup>;

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
    #[error("{}, line {line}: {message}", .file.display())]
    Refused {
        file: PathBuf,
        line: usize,
        message: String,
    },
    #[error("--addr {0}")]
    Resolve(#[from] ResolveError),
    #[error("--addr {addr}: {error}")]
    Connect { addr: String, error: StoreError },
    #[error("{0}")]
    Manager(#[from] ManagerError),
}

/// What a change gets: enough to sit out a restart of the service.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// The file does not say when its webhooks were received. We say: one a second,
/// in its order, from this time on (2026-11-24), in seconds since 1970.
const FIRST_RECEIVED: i64 = 1_795_478_400;
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
    let webhooks: Arc<[Reports]> = read(options)?.into();
    let expected = expected(&webhooks);
    let mut replicas = Vec::new();
    for _ in 0..options.replicas.get() {
        replicas.push(replica(&options.addr).await?);
    }

    let begin = Instant::now();
    replay(&replicas, &webhooks).await?;
    let seconds = begin.elapsed().as_secs_f64();
    let (mut changes, mut conflicts, mut attempts, mut failures) = (0, 0, 0, 0);
    for replica in &replicas {
        let stats = replica.stats();
        changes += stats.changes - stats.unchanged;
        conflicts += stats.conflicts;
        attempts += stats.attempts;
        failures += stats.retried_failures;
        // A service that has just started may have answered from its memory.
        replica.deliver().await;
    }

    // One that has no copies of its own to show.
    let reader = replica(&options.addr).await?;
    let restored = reader.restore().await?;
    let mut found = reader.list(&Filter::default());
    found.retain(|group| expected.contains_key(&group.key));
    let alerts: usize = found.iter().map(|group| group.alerts.len()).sum();
    println!("webhooks   {}", webhooks.len());
    println!("groups     {}", found.len());
    println!("alerts     {alerts}");
    println!("changes    {changes}");
    println!("conflicts  {conflicts}");
    println!("attempts   {attempts}");
    println!("failures   {failures}");
    println!("seconds    {seconds:.2}");

    let differences = differences(&expected, &found, &restored);
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

/// A replica on a connection of its own.
async fn replica(addr: &str) -> Result<AlertGroupManager, ReplayError> {
    let instances = Instances::resolve([addr], RemoteSettings::default()).await?;
    // Says at once if nobody is there.
    let answer = instances.size("", Deadline::NONE).await;
    answer.map_err(|failure| ReplayError::Connect {
        addr: addr.to_owned(),
        error: failure.error,
    })?;
    let settings = ManagerSettings {
        change_timeout: CHANGE_TIMEOUT,
        // What was recorded is over for long, and none of it is to leave.
        retention: Retention {
            resolved_retention: Duration::MAX,
            report_horizon: Duration::MAX,
            ..Retention::default()
        },
        ..ManagerSettings::default()
    };
    Ok(AlertGroupManager::new(Arc::new(instances), settings))
}

/// Lets the replicas work through the webhooks, each with its share of the
/// alerts.
async fn replay(
    replicas: &[AlertGroupManager],
    webhooks: &Arc<[Reports]>,
) -> Result<(), ManagerError> {
    // All replicas begin each webhook at the same moment. Left alone they would
    // drift apart and seldom meet in a group.
    let count = replicas.len();
    let together = Arc::new(Barrier::new(count));
    let mut running = JoinSet::new();
    for (number, replica) in replicas.iter().cloned().enumerate() {
        let (together, webhooks) = (together.clone(), webhooks.clone());
        running.spawn(async move {
            for Reports {
                key,
                group_by,
                alerts,
            } in webhooks.iter()
            {
                let share = alerts.iter().skip(number).step_by(count);
                let share: Vec<Alert> = share.cloned().collect();
                together.wait().await;
                if !share.is_empty() {
                    replica.add_alerts(key, group_by.clone(), share).await?;
                }
            }
            Ok(())
        });
    }
    while let Some(finished) = running.join_next().await {
        // A replica that fails ends the others: they would wait for it.
        finished.expect("no replica panics or is aborted")?;
    }
    Ok(())
}

fn read(options: &Options) -> Result<Vec<Reports>, ReplayError> {
    let file = &options.file;
    let text = fs::read_to_string(file).map_err(|error| ReplayError::Read {
        file: file.clone(),
        error,
    })?;
    let mut webhooks = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let webhook: Webhook = serde_json::from_str(line).map_err(|error| ReplayError::Parse {
            file: file.clone(),
            line: index + 1,
            error,
        })?;
        let key = webhook
            .key(&GroupKeys::new())
            .expect("groups are by labels");
        let group_by = webhook.group_by();
        let received = Time::from_parts(FIRST_RECEIVED + index as i64, 0);
        let (alerts, refused) = webhook.into_reports(received.expect("no file is so long"));
        if let Some(refused) = refused.into_iter().next() {
            return Err(ReplayError::Refused {
                file: file.clone(),
                line: index + 1,
                message: refused.message,
            });
        }
        if !alerts.is_empty() {
            webhooks.push(Reports {
                key,
                group_by,
                alerts,
            });
        }
    }
    Ok(webhooks)
}

/// What one replica would make of the file, without a service.
fn expected(webhooks: &[Reports]) -> Expected {
    let at = Time::now();
    let mut groups = Expected::new();
    for webhook in webhooks {
        let group = groups.entry(webhook.key.clone()).or_insert_with(|| {
            AlertGroup::empty(webhook.key.clone(), webhook.group_by.clone(), at)
        });
        group.add_reports(&webhook.alerts, at);
    }
    groups
}

/// Every way in which what was found is not what the file says.
fn differences(expected: &Expected, found: &[AlertGroup], restored: &Restored) -> Vec<String> {
    let mut differences = Vec::new();
    if !restored.complete {
        differences.push("memory answered for Redis and may not know every group".into());
    }
    let is_ours = |key: &str| GroupKey::new(key).is_ok_and(|key| expected.contains_key(&key));
    let problems = restored.problems.iter();
    for problem in problems.filter(|problem| is_ours(&problem.key)) {
        differences.push(format!("group {:?}: {}", problem.key, problem.error));
    }
    let found: BTreeMap<_, _> = found.iter().map(|group| (&group.key, group)).collect();
    for (key, group) in expected {
        let in_group = match found.get(key) {
            Some(found) => group_differences(group, found),
            None => vec!["is missing".into()],
        };
        let in_group = in_group.iter();
        let key = key.as_str();
        differences.extend(in_group.map(|difference| format!("group {key:?}: {difference}")));
    }
    differences
}

fn group_differences(expected: &AlertGroup, found: &AlertGroup) -> Vec<String> {
    let mut differences = Vec::new();
    for (fingerprint, alert) in &expected.alerts {
        match found.alerts.get(fingerprint) {
            Some(found) if found == alert => {}
            Some(_) => differences.push(format!("alert {fingerprint} differs")),
            None => differences.push(format!("alert {fingerprint} is missing")),
        }
    }
    for fingerprint in found.alerts.keys() {
        if !expected.alerts.contains_key(fingerprint) {
            differences.push(format!("alert {fingerprint} is not in the file"));
        }
    }
    let counted = |group: &AlertGroup| {
        let metadata = &group.metadata;
        (
            metadata.state,
            metadata.firing_count,
            metadata.resolved_count,
        )
    };
    let (expected, found) = (counted(expected), counted(found));
    if found != expected {
        differences.push(format!("state and counts are {found:?}, not {expected:?}"));
    }
    differences
}
