//! Examples that read as stories, then properties.

use super::*;
use crate::domain::{
    group::{AlertStatus, GroupKey, GroupState},
    version::Version,
};
use proptest::prelude::*;

const FINGERPRINTS: [&str; 3] = ["cpu", "disk", "net"];

fn at(seconds: i64) -> Option<Time> {
    Some(Time::from_parts(seconds, 0).unwrap())
}

/// Firing since `starts_at`, heard of then.
fn firing(fingerprint: &str, starts_at: i64) -> Alert {
    Alert {
        fingerprint: fingerprint.into(),
        starts_at: at(starts_at),
        timestamp: at(starts_at),
        ..Alert::default()
    }
}

/// Resolved at `ends_at`, heard of then.
fn resolved(fingerprint: &str, starts_at: i64, ends_at: i64) -> Alert {
    Alert {
        status: AlertStatus::Resolved,
        ends_at: at(ends_at),
        timestamp: at(ends_at),
        ..firing(fingerprint, starts_at)
    }
}

fn group(alerts: impl IntoIterator<Item = Alert>, metadata: GroupMetadata) -> AlertGroup {
    AlertGroup {
        key: GroupKey::new("alertname=HighCPU").unwrap(),
        alerts: alerts
            .into_iter()
            .map(|alert| (alert.fingerprint.clone(), alert))
            .collect(),
        metadata,
    }
}

/// Metadata of a group that was changed then, and no more.
fn updated(updated_at: i64, state: GroupState) -> GroupMetadata {
    GroupMetadata {
        state,
        updated_at: at(updated_at),
        ..GroupMetadata::default()
    }
}

fn merge(left: &AlertGroup, right: &AlertGroup) -> AlertGroup {
    left.clone().merge(right.clone()).group
}

fn fingerprints(group: &AlertGroup) -> Vec<&str> {
    group.alerts.keys().map(String::as_str).collect()
}

// --- stories ---

#[test]
fn two_instances_that_each_heard_of_one_alert_end_with_one_group_of_both() {
    let here = group([firing("cpu", 10)], updated(10, GroupState::Firing));
    let there = group([firing("disk", 20)], updated(20, GroupState::Firing));
    let merged = here.merge(there);
    assert_eq!(fingerprints(&merged.group), ["cpu", "disk"]);
    assert_eq!(merged.group.metadata.firing_count, 2);
    assert_eq!(merged.group.metadata.updated_at, at(20));
    assert!(merged.dropped.is_empty());
}

#[test]
fn a_resolution_that_one_side_missed_wins_and_the_older_report_is_named() {
    let here = group(
        [firing("cpu", 10), firing("disk", 10)],
        updated(40, GroupState::Firing),
    );
    let there = group([resolved("cpu", 10, 30)], updated(30, GroupState::Resolved));
    let merged = here.merge(there);
    assert_eq!(merged.dropped, ["cpu"]);
    let metadata = &merged.group.metadata;
    assert_eq!(metadata.state, GroupState::Mixed);
    assert_eq!((metadata.firing_count, metadata.resolved_count), (1, 1));
    assert_eq!(metadata.resolved_at, None);
}

#[test]
fn an_alert_that_fires_again_beats_its_earlier_resolution() {
    let resolved = group([resolved("cpu", 10, 30)], updated(30, GroupState::Resolved));
    let again = group([firing("cpu", 50)], updated(50, GroupState::Firing));
    let merged = merge(&resolved, &again);
    assert_eq!(merged.alerts["cpu"], firing("cpu", 50));
    assert_eq!(merged.metadata.state, GroupState::Firing);
}

/// A second Prometheus fired earlier and is heard later; then the alert is over.
#[test]
fn a_start_that_moves_backwards_does_not_hold_up_what_is_heard_later() {
    let report = |starts_at, timestamp| Alert {
        timestamp: at(timestamp),
        ..firing("disk", starts_at)
    };
    let here = group([report(13, 13)], updated(13, GroupState::Firing));
    let earlier = group([report(10, 20)], updated(20, GroupState::Firing));
    let merged = merge(&here, &earlier);
    assert_eq!(merged.alerts["disk"].starts_at, at(10));
    let over = group(
        [resolved("disk", 10, 40)],
        updated(40, GroupState::Resolved),
    );
    let merged = merge(&merged, &over);
    assert_eq!(merged.metadata.state, GroupState::Resolved);
    assert_eq!(merged.metadata.firing_count, 0);
}

#[test]
fn an_alert_that_was_removed_on_one_side_only_comes_back() {
    let here = group([firing("cpu", 10)], updated(90, GroupState::Firing));
    let there = group(
        [firing("cpu", 10), firing("disk", 10)],
        updated(10, GroupState::Firing),
    );
    assert_eq!(fingerprints(&merge(&here, &there)), ["cpu", "disk"]);
}

#[test]
fn a_silence_stands_until_a_later_change_lifts_it() {
    let silenced = group([firing("cpu", 10)], updated(20, GroupState::Silenced));
    let other = |updated_at| group([firing("disk", 10)], updated(updated_at, GroupState::Mixed));
    for (updated_at, state) in [
        (10, GroupState::Silenced),
        (20, GroupState::Silenced),
        (30, GroupState::Firing),
    ] {
        let merged = merge(&silenced, &other(updated_at));
        assert_eq!(merged.metadata.state, state, "other at {updated_at}");
    }
}

#[test]
fn two_sides_that_resolved_one_alert_each_are_resolved_when_the_last_one_ended() {
    let here = group(
        [resolved("cpu", 10, 30), firing("disk", 10)],
        updated(30, GroupState::Mixed),
    );
    let there = group(
        [firing("cpu", 10), resolved("disk", 10, 40)],
        updated(40, GroupState::Mixed),
    );
    let merged = merge(&here, &there);
    assert_eq!(merged.metadata.state, GroupState::Resolved);
    assert_eq!(merged.metadata.resolved_at, at(40));
    assert_eq!(merged.metadata.firing_count, 0);
}

#[test]
fn an_end_that_no_report_gives_is_when_the_resolution_was_heard() {
    let mut alert = resolved("cpu", 10, 30);
    alert.ends_at = None;
    let here = group([alert], updated(30, GroupState::Resolved));
    let there = group([firing("cpu", 10)], updated(10, GroupState::Firing));
    assert_eq!(merge(&here, &there).metadata.resolved_at, at(30));
}

#[test]
fn when_a_side_noticed_the_resolution_is_kept_while_its_alerts_are_the_merged_ones() {
    let noticed = |alert, resolved_at| {
        let mut group = group([alert], updated(50, GroupState::Resolved));
        group.metadata.resolved_at = at(resolved_at);
        group
    };
    let here = noticed(resolved("cpu", 10, 30), 35);
    let older = group([firing("cpu", 10)], updated(60, GroupState::Firing));
    let same = noticed(resolved("cpu", 10, 30), 37);
    let another = noticed(resolved("disk", 10, 20), 99);
    for (other, resolved_at) in [(&older, 35), (&same, 37), (&another, 30)] {
        assert_eq!(merge(&here, other).metadata.resolved_at, at(resolved_at));
        assert_eq!(merge(other, &here).metadata.resolved_at, at(resolved_at));
    }
}

/// The rule "the later `resolved_at` if the merged state is resolved"
/// fails here; see the module's text.
#[test]
fn who_merges_first_does_not_decide_when_a_group_was_resolved() {
    let mut a = group([resolved("cpu", 10, 20)], updated(50, GroupState::Resolved));
    a.metadata.resolved_at = at(50);
    let b = group([firing("disk", 10)], updated(10, GroupState::Firing));
    let mut c = group(
        [resolved("disk", 10, 30)],
        updated(40, GroupState::Resolved),
    );
    c.metadata.resolved_at = at(40);
    let one = merge(&merge(&a, &b), &c);
    assert_eq!(one, merge(&a, &merge(&b, &c)));
    assert_eq!(one.metadata.resolved_at, at(30));
}

#[test]
fn a_silenced_group_that_still_has_a_firing_alert_is_not_resolved_at_any_time() {
    let mut here = group([firing("cpu", 10)], updated(20, GroupState::Silenced));
    here.metadata.resolved_at = at(5);
    assert_eq!(merge(&here, &here).metadata.resolved_at, None);
    here.alerts.insert("cpu".into(), resolved("cpu", 10, 30));
    assert_eq!(merge(&here, &here).metadata.resolved_at, at(30));
}

#[test]
fn two_groups_without_alerts_take_the_state_of_the_last_change() {
    let mut here = group([], updated(20, GroupState::Resolved));
    here.metadata.resolved_at = at(15);
    let mut there = group([], updated(10, GroupState::Silenced));
    there.metadata.resolved_at = at(99);
    let merged = merge(&here, &there);
    assert_eq!(merged.metadata.state, GroupState::Resolved);
    assert_eq!(merged.metadata.resolved_at, at(15));
}

#[test]
fn the_first_event_is_the_earlier_one_and_the_unknown_is_not_early() {
    let mut here = group([], GroupMetadata::default());
    here.metadata.created_at = at(10);
    let mut there = here.clone();
    there.metadata.created_at = at(5);
    there.metadata.first_firing_at = at(7);
    let merged = merge(&here, &there);
    assert_eq!(merged.metadata.created_at, at(5));
    assert_eq!(merged.metadata.first_firing_at, at(7));
}

#[test]
fn the_timer_that_was_reset_last_counts_and_group_by_is_not_forgotten() {
    let timer = |last_reset_at, version, reset_count| TimerMetadata {
        version,
        reset_count,
        last_reset_at: at(last_reset_at),
        ..TimerMetadata::default()
    };
    let mut here = group([], GroupMetadata::default());
    here.metadata.group_wait_timer = Some(timer(10, 9, 9));
    here.metadata.repeat_interval_timer = Some(timer(10, 2, 1));
    here.metadata.group_by = vec!["alertname".into()];
    let mut there = group([], GroupMetadata::default());
    there.metadata.group_wait_timer = Some(timer(20, 1, 1));
    there.metadata.group_interval_timer = Some(TimerMetadata::default());
    there.metadata.repeat_interval_timer = Some(timer(10, 1, 2));
    let merged = merge(&here, &there).metadata;
    assert_eq!(merged.group_wait_timer, Some(timer(20, 1, 1)));
    assert_eq!(merged.group_interval_timer, Some(TimerMetadata::default()));
    assert_eq!(merged.repeat_interval_timer, Some(timer(10, 2, 1)));
    assert_eq!(merged.group_by, ["alertname"]);
}

#[test]
fn the_result_has_no_write_id_and_no_version_of_its_own() {
    let mut here = group([], GroupMetadata::default());
    here.metadata.write_id = "i-1".into();
    here.metadata.version = Version::new(16);
    let merged = merge(&here, &here);
    assert_eq!(merged.metadata.write_id, "");
    assert_eq!(merged.metadata.version, None);
}

#[test]
fn a_count_beyond_its_type_is_the_greatest_there_is() {
    assert_eq!(saturated(3), 3);
    assert_eq!(saturated(usize::MAX), i32::MAX);
}

#[test]
fn reports_are_ordered_by_receipt_then_status_then_start_then_content() {
    let report = |timestamp, status, starts_at, alert_name: &str| Alert {
        alert_name: alert_name.into(),
        status,
        starts_at,
        timestamp,
        ..Alert::default()
    };
    let ended = |ends_at, starts_at| Alert {
        ends_at,
        ..report(None, Resolved, starts_at, "a")
    };
    use AlertStatus::{Firing, Resolved};
    let ascending = [
        // When those without a receipt were heard of is not known: when they
        // ended or began stands in for it.
        report(None, Resolved, None, "b"),
        report(None, Firing, at(7), "a"),
        report(None, Resolved, at(7), "a"),
        ended(at(8), at(9)),
        report(None, Firing, at(9), "a"),
        ended(at(9), at(2)),
        report(at(1), Firing, None, "a"),
        report(at(1), Firing, at(9), "a"),
        report(at(1), Firing, at(9), "b"),
        report(at(1), Resolved, None, "a"),
        report(at(1), Resolved, at(1), "a"),
        report(at(2), Firing, at(1), "a"),
    ];
    for (i, left) in ascending.iter().enumerate() {
        for (j, right) in ascending.iter().enumerate() {
            assert_eq!(left.report_order(right), i.cmp(&j), "{i} and {j}");
        }
    }
}

/// Groups that a real service wrote agree with themselves, so nothing of
/// them is put right.
#[test]
fn what_the_go_service_wrote_is_unchanged_by_merging_it_with_itself() {
    let mut groups = 0;
    for line in include_str!("../../../tests/data/go-group-documents.jsonl").lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let mut document: serde_json::Value =
            serde_json::from_str(line["document"].as_str().unwrap()).unwrap();
        let alerts: Option<BTreeMap<String, Alert>> =
            serde_json::from_value(document["alerts"].take()).unwrap();
        let mut group = group(
            [],
            serde_json::from_value(document["metadata"].take()).unwrap(),
        );
        group.alerts = alerts.unwrap_or_default();
        let merged = group.clone().merge(group.clone());
        assert_eq!(merged.group, group);
        assert!(merged.dropped.is_empty());
        groups += 1;
    }
    assert_eq!(groups, 54);
}

// --- properties ---

/// Few values, so that two groups often say the same of something.
fn any_time() -> impl Strategy<Value = Option<Time>> {
    prop_oneof![Just(None), (1i64..4).prop_map(at)]
}

fn any_name() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), Just("a".into()), Just("b".into())]
}

fn any_alert() -> impl Strategy<Value = Alert> {
    (
        any_name(),
        // Mostly resolved, or groups would seldom be so as a whole.
        prop_oneof![1 => Just(AlertStatus::Firing), 3 => Just(AlertStatus::Resolved)],
        (any_time(), any_time(), any_time()),
        prop::option::of(any_name()),
    )
        .prop_map(
            |(alert_name, status, (starts_at, ends_at, timestamp), label)| Alert {
                alert_name,
                status,
                labels: label
                    .map(|value| ("job".into(), value))
                    .into_iter()
                    .collect(),
                starts_at,
                ends_at,
                timestamp,
                ..Alert::default()
            },
        )
}

fn any_state() -> impl Strategy<Value = GroupState> {
    prop_oneof![
        Just(GroupState::Firing),
        Just(GroupState::Resolved),
        Just(GroupState::Mixed),
        Just(GroupState::Silenced),
    ]
}

fn any_timer() -> impl Strategy<Value = Option<TimerMetadata>> {
    prop::option::of(
        (any_time(), 0i64..2, 0i32..2, any_name(), any_name()).prop_map(
            |(last_reset_at, version, reset_count, created_by, lock_id)| TimerMetadata {
                version,
                created_by,
                reset_count,
                last_reset_at,
                lock_id,
            },
        ),
    )
}

/// A group whose metadata need not agree with its alerts.
fn any_group() -> impl Strategy<Value = AlertGroup> {
    (
        prop::collection::btree_map(
            prop::sample::select(&FINGERPRINTS[..]).prop_map(String::from),
            any_alert(),
            0..=FINGERPRINTS.len(),
        ),
        any_state(),
        (any_time(), any_time(), any_time(), any_time()),
        (0i32..4, 0i32..4),
        prop::collection::vec(any_name(), 0..3),
        (any_timer(), any_timer(), any_timer()),
        prop::option::of(1i64..3),
    )
        .prop_map(
            |(alerts, state, times, counts, group_by, timers, version)| {
                let mut group = group(
                    [],
                    GroupMetadata {
                        state,
                        created_at: times.0,
                        updated_at: times.1,
                        first_firing_at: times.2,
                        resolved_at: times.3,
                        firing_count: counts.0,
                        resolved_count: counts.1,
                        group_by,
                        group_wait_timer: timers.0,
                        group_interval_timer: timers.1,
                        repeat_interval_timer: timers.2,
                        write_id: version.map(|n| format!("i-{n}")).unwrap_or_default(),
                        version: version.and_then(Version::new),
                    },
                );
                group.alerts = alerts;
                group
            },
        )
}

fn any_pair() -> impl Strategy<Value = (AlertGroup, AlertGroup)> {
    any_three().prop_map(|[a, b, _]| (a, b))
}

/// Three groups that share two reports of each alert, so that one often
/// holds all that another does, or all that two others do; some have none.
fn any_three() -> impl Strategy<Value = [AlertGroup; 3]> {
    const ALERTS: usize = FINGERPRINTS.len();
    (
        [any_group(), any_group(), any_group()],
        prop::collection::vec([any_alert(), any_alert()], ALERTS),
        [(); 3].map(|()| prop::collection::vec(prop::option::of(0usize..2), ALERTS)),
        prop::sample::select(vec![0, ALERTS, ALERTS, ALERTS]),
    )
        .prop_map(|(mut groups, reports, choices, alerts)| {
            for (group, choices) in groups.iter_mut().zip(choices) {
                group.alerts = FINGERPRINTS
                    .into_iter()
                    .take(alerts)
                    .zip(&reports)
                    .zip(choices)
                    .filter_map(|((fingerprint, reports), choice)| {
                        Some((fingerprint.into(), reports[choice?].clone()))
                    })
                    .collect();
            }
            groups
        })
}

/// A group whose metadata agree with its alerts, as a store has not yet
/// seen it.
fn any_agreeing_group() -> impl Strategy<Value = AlertGroup> {
    any_group().prop_map(|mut group| {
        let (resolved, firing): (Vec<&Alert>, Vec<&Alert>) = group
            .alerts
            .values()
            .partition(|alert| alert.status == AlertStatus::Resolved);
        let metadata = &mut group.metadata;
        metadata.firing_count = firing.len() as i32;
        metadata.resolved_count = resolved.len() as i32;
        if metadata.state != GroupState::Silenced {
            metadata.state = match (firing.is_empty(), resolved.is_empty()) {
                (true, true) => metadata.state,
                (false, true) => GroupState::Firing,
                (true, false) => GroupState::Resolved,
                (false, false) => GroupState::Mixed,
            };
        }
        if !firing.is_empty() {
            metadata.resolved_at = None;
        }
        for alert in resolved.iter().filter(|_| firing.is_empty()) {
            // Nobody notices a resolution before it happens.
            let end = alert.ends_at.or(alert.timestamp);
            metadata.resolved_at = metadata.resolved_at.max(end);
        }
        metadata.write_id = String::new();
        metadata.version = None;
        group
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn it_does_not_matter_which_side_is_which((a, b) in any_pair()) {
        prop_assert_eq!(a.clone().merge(b.clone()), b.merge(a));
    }

    #[test]
    fn it_does_not_matter_which_two_are_merged_first([a, b, c] in any_three()) {
        prop_assert_eq!(merge(&merge(&a, &b), &c), merge(&a, &merge(&b, &c)));
    }

    #[test]
    fn merging_a_side_in_again_changes_nothing((a, b) in any_pair()) {
        let merged = merge(&a, &b);
        prop_assert_eq!(&merge(&merged, &a), &merged);
        prop_assert_eq!(&merge(&b, &merged), &merged);
        prop_assert_eq!(&merge(&merged, &merged), &merged);
    }

    #[test]
    fn a_group_that_agrees_with_its_alerts_is_unchanged_by_itself(a in any_agreeing_group()) {
        prop_assert_eq!(merge(&a, &a), a);
    }

    #[test]
    fn no_alert_is_lost_and_none_is_made_up((a, b) in any_pair()) {
        let merged = a.clone().merge(b.clone());
        let mut differing = Vec::new();
        for fingerprint in FINGERPRINTS {
            let sides = (a.alerts.get(fingerprint), b.alerts.get(fingerprint));
            let expected = match sides {
                (Some(a), Some(b)) => {
                    if a != b {
                        differing.push(fingerprint);
                    }
                    Some(if a.report_order(b).is_gt() { a } else { b })
                }
                (a, b) => a.or(b),
            };
            prop_assert_eq!(merged.group.alerts.get(fingerprint), expected);
        }
        prop_assert_eq!(merged.dropped, differing);
    }

    #[test]
    fn the_order_of_reports_is_total(a in any_alert(), b in any_alert(), c in any_alert()) {
        prop_assert_eq!(a.report_order(&b), b.report_order(&a).reverse());
        prop_assert_eq!(a.report_order(&b).is_eq(), a == b);
        if a.report_order(&b).is_le() && b.report_order(&c).is_le() {
            prop_assert!(a.report_order(&c).is_le());
        }
    }

    #[test]
    fn a_merged_group_agrees_with_its_alerts((a, b) in any_pair()) {
        let AlertGroup { alerts, metadata, .. } = merge(&a, &b);
        let resolved = |alert: &Alert| alert.status == AlertStatus::Resolved;
        let total = metadata.firing_count + metadata.resolved_count;
        prop_assert_eq!(total as usize, alerts.len());
        if alerts.is_empty() {
            return Ok(());
        }
        if metadata.state != GroupState::Silenced {
            let all_resolved = alerts.values().all(resolved);
            prop_assert_eq!(metadata.state == GroupState::Resolved, all_resolved);
            let none_resolved = !alerts.values().any(resolved);
            prop_assert_eq!(metadata.state == GroupState::Firing, none_resolved);
        }
        if metadata.firing_count > 0 {
            prop_assert_eq!(metadata.resolved_at, None);
        }
    }
}
