//! Runs with a deliberate mistake: the oracle must object.

use std::time::Duration;

use super::{
    clients::Sabotage,
    report,
    run::Run,
    schedule::{After, Plan, Policy, Step, Target},
    verdict::{Flaw, Verdict},
};
use crate::common::faults::Fault;

fn plan(policy: Policy, steps: Vec<Step>) -> Plan {
    Plan {
        seed: 7,
        policy,
        instances: 1,
        proxied: false,
        ground: None,
        persists: false,
        bystander: false,
        wanders: false,
        steps,
    }
}

async fn verdict(run: Run) -> Verdict {
    run.make().await.verdict
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_run_has_no_flaws() {
    let verdict = verdict(Run::of(plan(Policy::Reconcile, vec![]))).await;
    assert_eq!(verdict.flaws, []);
    assert!(verdict.writes > 100, "{}", verdict.writes);
    assert_eq!(
        (verdict.lost, verdict.unknown, verdict.by_memory),
        (0, 0, 0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_vanishes_from_redis_is_noticed() {
    for policy in [Policy::Reconcile, Policy::Discard] {
        let run = Run {
            deleted_behind: 1,
            ..Run::of(plan(policy, vec![]))
        };
        let verdict = verdict(run).await;
        assert_eq!(verdict.lost, 1);
        assert!(
            matches!(
                verdict.flaws[..],
                [Flaw::Lost {
                    at: None,
                    found: None,
                    ..
                }]
            ),
            "{:?}",
            verdict.flaws
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_check_that_is_off_loses_alerts_and_is_noticed() {
    let run = Run {
        sabotage: Sabotage::SwapsBecomeStores,
        ..Run::of(plan(Policy::Reconcile, vec![]))
    };
    let verdict = verdict(run).await;
    assert!(verdict.lost > 0);
    let lost = |flaw: &Flaw| matches!(flaw, Flaw::LostAlert { .. });
    assert!(verdict.flaws.iter().all(lost), "{:?}", verdict.flaws);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_a_fallback_is_noticed() {
    let hang = Step {
        fault: Fault::Hang,
        target: Target::Everybody,
        // However busy the machine is.
        length: Duration::from_secs(7),
        after: After::Recovered,
    };
    let run = Run {
        sabotage: Sabotage::NoFallback,
        ..Run::of(plan(Policy::Reconcile, vec![hang]))
    };
    let verdict = verdict(run).await;
    let refused = |flaw: &Flaw| matches!(flaw, Flaw::Refused { .. });
    assert!(verdict.flaws.iter().any(refused), "{:?}", verdict.flaws);
    let not_noticed = |flaw: &Flaw| matches!(flaw, Flaw::NotNoticed { .. });
    assert!(verdict.flaws.iter().any(not_noticed), "{:?}", verdict.flaws);
}

/// A run in which requests reach Redis late: when the client was answered and has
/// gone on, after short faults by Redis alone, after the long one by memory first.
fn run_with_stragglers(policy: Policy) -> Run {
    let stragglers = |length, delay| Step {
        fault: Fault::Stragglers(Duration::from_millis(delay)),
        target: Target::Everybody,
        length: Duration::from_millis(length),
        after: After::Recovered,
    };
    let short = stragglers(250, 600);
    let long = stragglers(1_400, 1_500);
    Run::of(Plan {
        proxied: true,
        ..plan(policy, vec![short, short, long, short, short])
    })
}

/// Without deadlines late writes are executed: groups are seen as they were before.
/// Not each of them is seen, since its writer may write again before it looks, and
/// now and then none of a run.
#[tokio::test(flavor = "multi_thread")]
async fn write_deadlines_that_are_off_are_noticed() {
    const TRIES: usize = 10;
    for _ in 0..TRIES {
        let run = Run {
            deadlines_lifted: true,
            ..run_with_stragglers(Policy::Reconcile)
        };
        let outcome = run.make().await;
        for late in &outcome.late {
            assert!(late.lifted > 0 && late.refused == 0, "{late:?}");
        }
        let seen = |flaw: &&Flaw| matches!(flaw, Flaw::Lost { .. } | Flaw::CameBack { .. });
        let seen: Vec<_> = outcome.verdict.flaws.iter().filter(seen).collect();
        for flaw in &seen {
            println!("{flaw}");
        }
        if !seen.is_empty() {
            return;
        }
    }
    panic!("{TRIES} runs without deadlines pass");
}

/// With deadlines late writes are refused, and a run has no flaws.
async fn late_writes_do_no_harm(policy: Policy) {
    let outcome = run_with_stragglers(policy).make().await;
    if let Some(explanation) = report::explanation(&outcome) {
        panic!("{explanation}");
    }
    for late in &outcome.late {
        assert!(late.refused >= 5, "{late:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn late_writes_do_no_harm_with_reconcile() {
    late_writes_do_no_harm(Policy::Reconcile).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_writes_do_no_harm_with_discard() {
    late_writes_do_no_harm(Policy::Discard).await;
}
