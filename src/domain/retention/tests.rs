//! Examples that read as stories, then properties.

use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::domain::group::GroupKey;

const HOUR: i64 = 3_600;

fn at(second: i64) -> Time {
    Time::from_parts(second, 0).unwrap()
}

fn firing(fingerprint: &str, received: i64) -> Alert {
    Alert {
        fingerprint: fingerprint.into(),
        starts_at: Some(at(1)),
        timestamp: Some(at(received)),
        ..Alert::default()
    }
}

fn resolved(fingerprint: &str, received: i64) -> Alert {
    Alert {
        status: AlertStatus::Resolved,
        ends_at: Some(at(received)),
        ..firing(fingerprint, received)
    }
}

fn noted(alert: Alert, bytes: usize) -> Alert {
    Alert {
        annotations: [("summary".into(), "x".repeat(bytes))].into(),
        ..alert
    }
}

fn group(alerts: impl IntoIterator<Item = Alert>) -> AlertGroup {
    let mut group = AlertGroup::empty(GroupKey::new("k").unwrap(), Vec::new(), at(1));
    let alerts: Vec<Alert> = alerts.into_iter().collect();
    group.add_reports(&alerts, at(2));
    group
}

fn names(group: &AlertGroup) -> Vec<&str> {
    group.alerts.keys().map(String::as_str).collect()
}

fn of_alerts(max_alerts: usize) -> Retention {
    Retention {
        max_alerts,
        ..Retention::default()
    }
}

/// Room for so many bytes of alerts.
fn of_bytes(bytes: usize) -> Retention {
    let all = Room::of(&Retention::default(), &group([])).bytes;
    let max_document_bytes = Retention::default().max_document_bytes - all + bytes;
    Retention {
        max_document_bytes,
        ..Retention::default()
    }
}

/// Adds reports to a group, and makes it fit.
fn added(
    retention: &Retention,
    before: &AlertGroup,
    reports: &[Alert],
) -> (AlertGroup, Left, Vec<Refused>) {
    let mut after = before.clone();
    after.add_reports(reports, at(9));
    let mut left = Left::default();
    let refused = retention.fit(&mut after, Some(before), reports, at(9), &mut left);
    (after, left, refused)
}

fn refused_names(refused: &[Refused]) -> Vec<(&str, RefusedReason)> {
    let refused = refused.iter();
    refused
        .map(|one| (one.fingerprint.as_str(), one.reason))
        .collect()
}

// --- stories ---

#[test]
fn resolved_alerts_leave_an_hour_after_their_report_and_silent_ones_after_a_day() {
    let day = 24 * HOUR;
    let before = group([
        resolved("over", 100),
        resolved("just over", 101),
        firing("silent", 100),
        firing("heard of", day),
    ]);
    let retention = Retention::default();
    let mut after = before.clone();
    let left = retention.age(&mut after, Some(&before), at(200), at(100 + HOUR));
    assert_eq!(left, Left::default(), "not before");
    let left = retention.age(&mut after, Some(&before), at(200), at(101 + HOUR));
    assert_eq!((left.resolved, left.unreported.len()), (1, 0));
    let left = retention.age(&mut after, Some(&before), at(200), at(101 + day));
    assert_eq!((left.resolved, left.unreported), (1, vec!["silent".into()]));
    assert_eq!(names(&after), ["heard of"]);
    let metadata = &after.metadata;
    assert_eq!((metadata.firing_count, metadata.resolved_count), (1, 0));
    assert_eq!(metadata.state, crate::domain::group::GroupState::Firing);
}

/// The Go service writes the start of an alert as the time of its report. One that has
/// been firing for days is not one that nobody reports.
#[test]
fn a_report_of_unknown_time_counts_from_the_last_change_of_its_group() {
    let day = 24 * HOUR;
    let mut before = group([firing("go", 1), firing("rust", 2)]);
    before.alerts.get_mut("rust").unwrap().timestamp = None;
    before.metadata.updated_at = Some(at(3 * day));
    let retention = Retention::default();
    let mut after = before.clone();
    let left = retention.age(&mut after, Some(&before), at(4 * day), at(4 * day));
    assert_eq!(left, Left::default());
    for name in ["go", "rust"] {
        assert_eq!(after.alerts[name].timestamp, Some(at(3 * day)), "{name}");
    }
    // From then on it is known.
    let before = after.clone();
    let left = retention.age(&mut after, Some(&before), at(5 * day), at(4 * day + 1));
    assert_eq!(left.unreported.len(), 2);
}

#[test]
fn an_alert_of_which_no_time_is_known_stays() {
    let mut before = group([Alert {
        fingerprint: "timeless".into(),
        ..Alert::default()
    }]);
    before.metadata = GroupMetadata::default();
    let mut after = before.clone();
    let left = Retention::default().age(&mut after, Some(&before), at(2), at(1_000 * HOUR));
    assert_eq!(left, Left::default());
    assert_eq!(names(&after), ["timeless"]);
}

#[test]
fn the_longest_resolved_make_room_for_what_fires() {
    let before = group([
        firing("a", 2),
        resolved("b", 5),
        resolved("c", 3),
        resolved("d", 4),
    ]);
    let (after, left, refused) = added(&of_alerts(4), &before, &[firing("e", 6), firing("f", 6)]);
    assert_eq!(names(&after), ["a", "b", "e", "f"]);
    assert_eq!(left.crowded_out, 2);
    assert_eq!(refused, []);
}

#[test]
fn new_alerts_that_fire_come_before_new_ones_that_are_over() {
    let before = group([firing("a", 2), resolved("b", 3)]);
    let reports = [
        resolved("c", 6),
        firing("d", 6),
        firing("e", 6),
        firing("f", 6),
    ];
    let (after, left, refused) = added(&of_alerts(3), &before, &reports);
    assert_eq!(names(&after), ["a", "d", "e"]);
    assert_eq!(left.crowded_out, 1);
    let full = RefusedReason::GroupFull;
    assert_eq!(refused_names(&refused), [("f", full), ("c", full)]);
    assert!(refused[0].message.contains("--max-alerts-per-group"));
}

#[test]
fn a_report_about_an_alert_that_is_held_always_fits() {
    let before = group([firing("a", 2), firing("b", 2)]);
    let retention = of_bytes(300);
    // Together with "b" it would be too large as it is.
    let reports = [noted(firing("a", 6), 250), firing("c", 6)];
    let (after, left, refused) = added(&retention, &before, &reports);
    assert_eq!(after.alerts["a"], firing("a", 6));
    assert_eq!(left.shortened, 1);
    assert_eq!(refused_names(&refused), [("c", RefusedReason::GroupFull)]);
    // Over is over, however full it is.
    let (after, _, refused) = added(&of_alerts(1), &group([firing("a", 2)]), &[resolved("a", 6)]);
    assert_eq!(after.alerts["a"].status, AlertStatus::Resolved);
    assert_eq!(refused, []);
}

#[test]
fn an_alert_that_is_larger_than_a_group_does_not_keep_others_out() {
    let before = group([firing("a", 2)]);
    let reports = [
        noted(firing("giant", 6), 10_000),
        firing("b", 6),
        noted(resolved("giant over", 6), 10_000),
        resolved("c", 6),
    ];
    let (after, _, refused) = added(&of_bytes(1_000), &before, &reports);
    assert_eq!(names(&after), ["a", "b", "c"]);
    let too_large = RefusedReason::TooLarge;
    assert_eq!(
        refused_names(&refused),
        [("giant", too_large), ("giant over", too_large)]
    );
}

/// What has just ended is known, and what ended before makes room for it, however much
/// of the whole would be left.
#[test]
fn what_is_over_takes_a_part_of_the_group_at_most() {
    let retention = Retention {
        max_resolved_bytes: 500,
        ..Retention::default()
    };
    let before = group([firing("a", 2), resolved("b", 3), resolved("c", 4)]);
    let reports = [noted(resolved("giant", 6), 1_000), resolved("d", 5)];
    let (after, left, refused) = added(&retention, &before, &reports);
    assert_eq!(names(&after), ["a", "c", "d"]);
    assert_eq!((left.crowded_out, refused), (2, Vec::new()));
    let (after, _, _) = added(&retention, &before, &[noted(firing("giant", 6), 1_000)]);
    assert_eq!(after.alerts.len(), 4, "what fires has all of it");
}

/// The measure of a document that stays small: 20 alerts that fire, and others that
/// come and go.
#[test]
fn a_group_in_which_alerts_come_and_go_stays_small() {
    let retention = Retention::default();
    let always: Vec<Alert> = (0..20).map(|n| firing(&format!("always {n}"), 2)).collect();
    let mut held = group(always);
    let mut largest = 0;
    for minute in 0..1_000 {
        let now = at(60 * minute + 10);
        let name = |minute: i64| format!("job {minute}");
        let mut reports = vec![firing(&name(minute), now.seconds())];
        reports.push(resolved(&name(minute - 1), now.seconds()));
        let always = (0..20).map(|n| firing(&format!("always {n}"), now.seconds()));
        reports.extend(always);
        let before = held.clone();
        held.add_reports(&reports, now);
        retention.age(&mut held, Some(&before), now, now);
        largest = largest.max(held.alerts.len());
    }
    assert_eq!(held.counts().firing, 21);
    // Those of the last hour.
    assert_eq!(largest, 21 + 61);
}

// --- properties ---

fn any_report(received: Range<i64>) -> impl Strategy<Value = Alert> {
    ("[a-h]", any::<bool>(), received, 0usize..200).prop_map(|(name, fires, received, bytes)| {
        let report = match fires {
            true => firing(&name, received),
            false => resolved(&name, received),
        };
        noted(report, bytes)
    })
}

fn any_reports(received: Range<i64>) -> impl Strategy<Value = Vec<Alert>> {
    prop::collection::vec(any_report(received), 0..8)
}

proptest! {
    /// What fires and is held stays, every report is stored or refused or has made room,
    /// and the group is within its limits unless what fires is too much by itself.
    #[test]
    fn a_group_is_made_to_fit(
        held in any_reports(2..9),
        reports in any_reports(2..9),
        alerts in 1usize..9,
        bytes in 0usize..2_000,
        resolved in 0usize..1_000,
    ) {
        let before = group(held);
        let retention = Retention {
            max_alerts: alerts,
            max_resolved_bytes: resolved,
            ..of_bytes(bytes)
        };
        let mut whole = before.clone();
        whole.add_reports(&reports, at(9));
        let (after, left, refused) = added(&retention, &before, &reports);
        let fires = |group: &AlertGroup| -> BTreeSet<String> {
            let firing = group.alerts.values().filter(|alert| alert.status == AlertStatus::Firing);
            firing.map(|alert| alert.fingerprint.clone()).collect()
        };
        let held_and_firing: BTreeSet<String> = fires(&whole)
            .into_iter()
            .filter(|name| before.alerts.contains_key(name))
            .collect();
        prop_assert!(held_and_firing.is_subset(&fires(&after)));
        prop_assert_eq!(
            after.alerts.len() + left.crowded_out + refused.len(),
            whole.alerts.len()
        );
        for refused in &refused {
            prop_assert!(!before.alerts.contains_key(&refused.fingerprint));
            prop_assert!(!after.alerts.contains_key(&refused.fingerprint));
        }
        let only_held = after.alerts.len() == held_and_firing.len();
        prop_assert!(retention.fits(&after) || only_held, "{:?}", after);
        if retention.fits(&after) {
            let stored = DocumentHead::within(retention.max_document_bytes, &after);
            prop_assert!(stored.is_ok(), "the service would not take it");
        }
        let counts = after.counts();
        prop_assert_eq!(after.metadata.firing_count as usize, counts.firing);
        prop_assert_eq!(after.metadata.resolved_count as usize, counts.resolved);
    }

    /// What was made to fit is not changed by the same reports once more. (An old report
    /// of an alert whose newer one had to leave would be taken for news.)
    #[test]
    fn to_make_it_fit_again_changes_nothing(
        held in any_reports(2..9),
        reports in any_reports(9..16),
        alerts in 1usize..9,
        bytes in 0usize..2_000,
        resolved in 0usize..1_000,
    ) {
        let retention = Retention {
            max_alerts: alerts,
            max_resolved_bytes: resolved,
            ..of_bytes(bytes)
        };
        let (once, _, _) = added(&retention, &group(held), &reports);
        let (twice, _, _) = added(&retention, &once, &reports);
        prop_assert_eq!(twice.alerts, once.alerts);
    }
}
