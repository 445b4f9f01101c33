//! The names in a PromQL expression, and the list of all metrics that rules and
//! panels may use.

use std::collections::BTreeSet;

use crate::{PREFIX, dashboard, rules, text};

/// Every metric of the service that a rule or a panel uses, without its prefix.
/// The live test asks a running service for each of them.
pub const METRICS: [&str; 35] = [
    "authentication_failures_total",
    "build_info",
    "calls_shed_total",
    "certificate_expiry_timestamp_seconds",
    "connection_failures_total",
    "connections",
    "degraded_writes_carried_total",
    "degraded_writes_discarded_total",
    "degraded_writes_merged_total",
    "groups_deleted_again_total",
    "groups_put_back_total",
    "groups_restored_total",
    "memory_operations_total",
    "merge_reports_dropped_total",
    "mirror_bytes",
    "mirror_dirty_bytes",
    "mirror_dirty_entries",
    "mirror_entries",
    "mirror_max_bytes",
    "mirror_tombstones",
    "redis_data_losses_total",
    "redis_duration_seconds_bucket",
    "redis_duration_seconds_count",
    "redis_may_evict",
    "redis_retries_total",
    "reload_failures_total",
    "storage_duration_seconds_bucket",
    "storage_duration_seconds_count",
    "storage_fallback_total",
    "storage_health",
    "storage_operations_in_flight",
    "storage_operations_total",
    "storage_recovery_total",
    "switch_state",
    "up",
];

/// The metrics that an expression uses, as in [`METRICS`].
pub fn metrics(expression: &str) -> BTreeSet<String> {
    let names = names(expression).filter(|name| !name.contains(':'));
    names
        .filter_map(|name| match name.strip_prefix(PREFIX) {
            Some(name) => Some(name.to_owned()),
            None => (name == "up").then(|| name.to_owned()),
        })
        .collect()
}

/// The recorded series that an expression uses.
pub fn recorded(expression: &str) -> BTreeSet<String> {
    let names = names(expression).filter(|name| name.contains(':'));
    names.map(str::to_owned).collect()
}

/// Everything outside of quotes that could be a name. `[5m:1m]` is none.
fn names(expression: &str) -> impl Iterator<Item = &str> {
    let outside_quotes = expression.split('"').step_by(2);
    outside_quotes
        .flat_map(|part| part.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':'))
        .filter(|name| name.starts_with(|c: char| c.is_ascii_alphabetic()))
}

#[test]
fn the_list_is_what_rules_and_panels_use() {
    let rules = rules::rules();
    let of_rules = rules::all(&rules).map(|rule| text(&rule["expr"]).to_owned());
    let of_panels = dashboard::queries()
        .into_iter()
        .map(|query| query.expression);
    let used: BTreeSet<String> = of_rules
        .chain(of_panels)
        .flat_map(|e| metrics(&e))
        .collect();
    let listed: BTreeSet<String> = METRICS.iter().map(ToString::to_string).collect();
    assert_eq!(used, listed);
}

#[test]
fn names_are_found_outside_of_quotes() {
    let expression = r#"sum by (le) (rate(alert_history_business_grouping_mirror_bytes{a=~"up|x:y"}[5m:1m])) / a:b:rate5m"#;
    assert_eq!(metrics(expression), BTreeSet::from(["mirror_bytes".into()]));
    assert_eq!(recorded(expression), BTreeSet::from(["a:b:rate5m".into()]));
    assert_eq!(metrics("up == 0"), BTreeSet::from(["up".into()]));
}
