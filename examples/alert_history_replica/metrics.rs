//! What a replica says of itself, in the text format of Prometheus.

use std::{fmt::Write, sync::atomic::Ordering};

use axum::extract::State;

use crate::Replica;

/// `GET /metrics`.
pub async fn metrics(State(replica): State<Replica>) -> String {
    let stats = replica.manager.stats();
    let answers = &replica.answers;
    let mut text = String::new();

    let of_answers = [
        ("200", &answers.stored),
        ("400", &answers.never),
        ("503", &answers.again),
    ];
    let of_answers = of_answers.map(|(code, count)| (code, count.load(Ordering::Relaxed)));
    labelled(
        &mut text,
        "webhooks",
        "Webhooks, by the status that they were answered.",
        "code",
        of_answers,
    );
    let of_refused = stats.refused.iter();
    let of_refused = of_refused.map(|(reason, count)| (reason.as_str(), count));
    labelled(
        &mut text,
        "reports_refused",
        "Reports of alerts that were not stored, by reason.",
        "reason",
        of_refused,
    );
    let of_left = [
        ("resolved", stats.left_resolved),
        ("unreported", stats.left_unreported),
        ("crowded_out", stats.left_crowded_out),
    ];
    labelled(
        &mut text,
        "alerts_left",
        "Alerts that have left a group that lives on: resolved long enough ago, not reported any more, or resolved and in the way.",
        "reason",
        of_left,
    );

    for (name, help, value) in [
        (
            "changes",
            "Changes of groups that were made.",
            stats.changes,
        ),
        (
            "changes_unchanged",
            "Changes that found nothing to do.",
            stats.unchanged,
        ),
        (
            "changes_failed",
            "Changes that failed; their callers were told.",
            stats.failed,
        ),
        ("attempts", "Attempts to make a change.", stats.attempts),
        ("conflicts", "Attempts that lost a race.", stats.conflicts),
        (
            "retried_failures",
            "Attempts without an answer.",
            stats.retried_failures,
        ),
        (
            "reports_set_back",
            "Reports whose time was ahead of this replica's clock.",
            stats.set_back,
        ),
        (
            "alerts_shortened",
            "Times that an alert was stored without annotations, for want of room.",
            stats.shortened,
        ),
        (
            "outbox_remembered",
            "Changes that only memory had.",
            stats.outbox.remembered,
        ),
        (
            "outbox_delivered",
            "Of these, changes that Redis has.",
            stats.outbox.delivered,
        ),
        (
            "outbox_dropped",
            "Of these, changes that can never be stored.",
            stats.outbox.dropped,
        ),
        (
            "outbox_refused",
            "Changes for which the outbox was full.",
            stats.outbox.refused,
        ),
        (
            "known_crowded_out",
            "Copies forgotten to make room.",
            stats.known.crowded_out,
        ),
    ] {
        begin(&mut text, &format!("{name}_total"), help, "counter");
        line(&mut text, &format!("{name}_total"), value);
    }

    let most_attempts = usize::try_from(stats.most_attempts).unwrap_or(usize::MAX);
    for (name, help, value) in [
        (
            "most_attempts",
            "Attempts of the change that took the most.",
            most_attempts,
        ),
        (
            "outbox_groups",
            "Groups whose changes wait.",
            stats.outbox.groups,
        ),
        ("outbox_reports", "Reports that wait.", stats.outbox.reports),
        (
            "known_groups",
            "Groups of which there is a copy.",
            stats.known.groups,
        ),
        (
            "firing_alerts",
            "Firing alerts in known groups.",
            stats.known.firing_alerts,
        ),
        (
            "resolved_alerts",
            "Resolved alerts in known groups.",
            stats.known.resolved_alerts,
        ),
    ] {
        begin(&mut text, name, help, "gauge");
        line(&mut text, name, value);
    }
    text
}

/// A counter with one label.
fn labelled(
    text: &mut String,
    name: &str,
    help: &str,
    label: &str,
    series: impl IntoIterator<Item = (&'static str, u64)>,
) {
    let name = format!("{name}_total");
    begin(text, &name, help, "counter");
    for (value, count) in series {
        line(text, &format!("{name}{{{label}=\"{value}\"}}"), count);
    }
}

fn begin(text: &mut String, name: &str, help: &str, kind: &str) {
    let name = format!("alert_history_replica_{name}");
    // A string takes everything.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(text: &mut String, series: &str, value: impl std::fmt::Display) {
    let _ = writeln!(text, "alert_history_replica_{series} {value}");
}
