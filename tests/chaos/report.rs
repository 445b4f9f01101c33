//! Tells what came of runs: a table, a summary, and for a failed run what is
//! needed to understand it.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use super::{
    history::{Call, Key, Moment},
    run::Outcome,
    verdict::{Flaw, Verdict},
};

/// Flaws of a run that are told; more are counted.
const MOST_FLAWS_TOLD: usize = 25;
/// Calls on a key that are told with a flaw.
const CALLS_TOLD: usize = 6;
/// Lines of the log of each instance that are told.
const LOG_LINES_TOLD: usize = 60;

/// The heading of the table.
pub fn heading() -> String {
    format!(
        "{:>5} {:<9} {:<12} {:>6} {:>7} {:>5} {:>5} {:>5} {:>5} {:>5} {:>8} {:>8} {:>8} {:>6} {:>6}  faults",
        "seed",
        "policy",
        "topology",
        "calls",
        "writes",
        "mem%",
        "lost",
        "disc.",
        "back",
        "unkn.",
        "slowest",
        "to mem",
        "to redis",
        "stall",
        "flaws"
    )
}

/// One line of the table.
pub fn row(outcome: &Outcome) -> String {
    let (plan, verdict) = (&outcome.plan, &outcome.verdict);
    let faults: Vec<String> = plan.steps.iter().map(ToString::to_string).collect();
    format!(
        "{:>5} {:<9} {:<12} {:>6} {:>7} {:>4}% {:>5} {:>5} {:>5} {:>5} {:>8} {:>8} {:>8} {:>6} {:>6}  {}",
        plan.seed,
        plan.policy,
        plan.topology(),
        verdict.calls,
        verdict.writes,
        100 * verdict.by_memory / verdict.calls.max(1),
        verdict.lost,
        verdict.discarded,
        verdict.put_back,
        verdict.unknown,
        millis(Some(verdict.slowest)),
        millis(verdict.to_memory.iter().max().copied()),
        millis(verdict.to_redis.iter().max().copied()),
        millis(Some(verdict.worst_stall)),
        verdict.flaws.len(),
        faults.join(", "),
    )
}

/// What a failed run is told to have been; None for one that held.
pub fn explanation(outcome: &Outcome) -> Option<String> {
    let (plan, verdict) = (&outcome.plan, &outcome.verdict);
    if verdict.flaws.is_empty() {
        return None;
    }
    let mut text = format!(
        "seed {} with {} ({} flaws)\n",
        plan.seed,
        plan.policy,
        verdict.flaws.len()
    );
    for struck in &outcome.evidence.faults {
        let _ = writeln!(
            text,
            "  fault {}: {} to {}, writable at {}",
            struck.step,
            millis(Some(struck.began)),
            millis(Some(struck.ended)),
            millis(Some(struck.writable)),
        );
    }
    for (instance, record) in outcome.evidence.instances.iter().enumerate() {
        for (moment, line) in record.log.iter().take(LOG_LINES_TOLD) {
            let _ = writeln!(
                text,
                "  instance {instance} at {}: {}",
                millis(Some(*moment)),
                line
            );
        }
    }
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for flaw in &verdict.flaws {
        *kinds.entry(flaw.kind()).or_default() += 1;
    }
    let _ = writeln!(text, "  {kinds:?}");
    for flaw in verdict.flaws.iter().take(MOST_FLAWS_TOLD) {
        let _ = writeln!(text, "  - {flaw}");
        let (key, at) = match flaw {
            Flaw::Lost { key, at, .. } => (key, at.unwrap_or(Moment::MAX)),
            Flaw::CameBack { key, at, .. } | Flaw::StaleSwap { key, at, .. } => (key, *at),
            Flaw::VersionBackwards { key, at, .. } | Flaw::LostToItself { key, at } => (key, *at),
            Flaw::Slow { key, at, .. } | Flaw::Refused { key, at, .. } => (key, *at),
            _ => continue,
        };
        tell_calls(outcome, *key, at, &mut text);
    }
    if verdict.flaws.len() > MOST_FLAWS_TOLD {
        let _ = writeln!(text, "  and {} more", verdict.flaws.len() - MOST_FLAWS_TOLD);
    }
    Some(text)
}

/// The last calls on a key up to a moment.
fn tell_calls(outcome: &Outcome, key: Key, until: Moment, text: &mut String) {
    let calls = outcome.evidence.calls.iter();
    let calls: Vec<&Call> = calls
        .filter(|call| call.key == key && call.end <= until)
        .collect();
    for call in &calls[calls.len().saturating_sub(CALLS_TOLD)..] {
        let _ = writeln!(
            text,
            "      {} to {}{}: {:?} -> {:?}",
            millis(Some(call.begin)),
            millis(Some(call.end)),
            call.deadline
                .map_or_else(String::new, |deadline| format!(" (deadline {deadline:?})")),
            call.request,
            call.reply
        );
    }
}

/// Medians and maxima over runs.
pub fn summary(outcomes: &[Outcome]) -> String {
    let verdicts = || outcomes.iter().map(|outcome| &outcome.verdict);
    let failed = verdicts().filter(|verdict| !verdict.flaws.is_empty());
    let mut text = format!(
        "{} runs, {} failed; {} calls, {} acknowledged changes, {} answered by memory, \
         {} lost, {} discarded and counted, {} put back, {} unknown, {} returned; \
         {} keys wandered\n",
        outcomes.len(),
        failed.count(),
        verdicts().map(|verdict| verdict.calls).sum::<usize>(),
        verdicts().map(|verdict| verdict.writes).sum::<usize>(),
        verdicts().map(|verdict| verdict.by_memory).sum::<usize>(),
        verdicts().map(|verdict| verdict.lost).sum::<usize>(),
        verdicts().map(|verdict| verdict.discarded).sum::<u64>(),
        verdicts().map(|verdict| verdict.put_back).sum::<u64>(),
        verdicts().map(|verdict| verdict.unknown).sum::<usize>(),
        verdicts().map(|verdict| verdict.returned).sum::<usize>(),
        verdicts().map(|verdict| verdict.wandered).sum::<usize>(),
    );
    let spreads: [(&str, Vec<Duration>); 3] = [
        (
            "slowest call of a run",
            verdicts().map(|verdict| verdict.slowest).collect(),
        ),
        (
            "fault to first answer of memory",
            verdicts()
                .flat_map(|verdict| verdict.to_memory.clone())
                .collect(),
        ),
        (
            "Redis writable to first answer of Redis",
            verdicts()
                .flat_map(|verdict| verdict.to_redis.clone())
                .collect(),
        ),
    ];
    for (name, mut durations) in spreads {
        durations.sort_unstable();
        let median = durations.get(durations.len() / 2).copied();
        let _ = writeln!(
            text,
            "{name}: median {}, longest {}",
            millis(median),
            millis(durations.last().copied())
        );
    }
    let most = |bytes: fn(&Verdict) -> usize| verdicts().map(bytes).max().unwrap_or(0) / 1024;
    let _ = writeln!(
        text,
        "most memory of an instance: {} KiB, of a mirror: {} KiB",
        most(|verdict| verdict.peak_resident_bytes),
        most(|verdict| verdict.peak_mirror_bytes),
    );
    text
}

fn millis(duration: Option<Duration>) -> String {
    duration.map_or_else(
        || "-".into(),
        |duration| format!("{}ms", duration.as_millis()),
    )
}
