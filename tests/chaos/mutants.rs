//! Runs with a deliberate mistake: the oracle must object.

use std::time::Duration;

use super::{
    clients::Sabotage,
    run::Run,
    schedule::{After, Fault, Plan, Policy, Step, Target},
    verdict::{Flaw, Verdict},
};

fn plan(policy: Policy, steps: Vec<Step>) -> Plan {
    Plan {
        seed: 7,
        policy,
        instances: 1,
        proxied: false,
        persists: false,
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
        length: Duration::from_millis(1_500),
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
