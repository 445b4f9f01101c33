//! The rules of Prometheus: valid, tested one by one, and explained.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use serde_json::{Value, json};

use crate::{INSTALL, items, outcome, path, promql, read, run, text, yaml};

const RULES: &str = "deploy/prometheus/rules.yaml";
const TESTS: &str = "deploy/prometheus/rules.test.yaml";

/// What the links to the runbook begin with.
const RUNBOOK: &str = "https://github.com/example/groupstate/blob/main/README.md#";

/// The one document of a rules file.
pub fn rules() -> Value {
    yaml(&read(RULES)).remove(0)
}

/// All rules of a rules file, of all groups.
pub fn all(rules: &Value) -> impl Iterator<Item = &Value> {
    items(&rules["groups"]).flat_map(|group| items(&group["rules"]))
}

#[test]
fn promtool_finds_nothing_wrong() {
    let output = run(Command::new("promtool")
        .args(["check", "rules"])
        .arg(path(RULES)));
    assert!(output.contains("SUCCESS"), "{output}");
}

#[test]
fn every_alert_fires_when_it_should_and_only_then() {
    run(Command::new("promtool")
        .args(["test", "rules"])
        .arg(path(TESTS)));
}

/// That the tests of each alert see it silenced, see it fire for no reason, and
/// see it fire too early.
#[test]
fn the_tests_of_every_alert_notice_when_it_is_wrong() {
    let rules = rules();
    let tests = yaml(&read(TESTS)).remove(0);
    let alerts: Vec<&Value> = all(&rules)
        .filter(|rule| !rule["alert"].is_null())
        .collect();
    let recording: Vec<&Value> = all(&rules).filter(|rule| rule["alert"].is_null()).collect();

    for (at, alert) in alerts.iter().enumerate() {
        let name = text(&alert["alert"]);
        let passes_with = |rule: &Value| {
            // Two alerts may have one name and two severities.
            let others = alerts.iter().enumerate();
            let others = others.filter(|(i, other)| *i != at && other["alert"] == name);
            let rules = recording.iter().copied();
            let rules = rules.chain(others.map(|(_, other)| *other)).chain([rule]);
            passes(&rules.collect::<Vec<_>>(), &tests, name)
        };
        assert!(passes_with(alert), "{name}");

        let mut mutants = vec![
            ("never fires", changed(alert, "expr", "vector(0) > 1")),
            ("always fires", changed(alert, "expr", "vector(1)")),
        ];
        if !alert["for"].is_null() {
            mutants.push(("fires at once", changed(alert, "for", "0s")));
        }
        for (what, mutant) in mutants {
            assert!(!passes_with(&mutant), "no test notices that {name} {what}");
        }
    }
}

#[test]
fn every_alert_says_what_it_means_and_links_to_its_section_of_the_runbook() {
    let rules = rules();
    let readme = read("README.md");
    let runbook = readme
        .split("\n## Runbook\n")
        .nth(1)
        .expect("README.md has a runbook");
    let runbook = runbook.split("\n## ").next().unwrap_or_default();
    let sections: BTreeSet<&str> = runbook
        .lines()
        .filter_map(|line| line.strip_prefix("### "))
        .collect();

    let mut names = BTreeSet::new();
    for alert in all(&rules).filter(|rule| !rule["alert"].is_null()) {
        let name = text(&alert["alert"]);
        names.insert(name);
        assert!(
            ["critical", "warning"].contains(&text(&alert["labels"]["severity"])),
            "{name}"
        );
        for annotation in ["summary", "description"] {
            assert!(
                !text(&alert["annotations"][annotation]).is_empty(),
                "{name}: {annotation}"
            );
        }
        let anchor = text(&alert["annotations"]["runbook_url"]).strip_prefix(RUNBOOK);
        assert_eq!(anchor, Some(name.to_lowercase().as_str()), "{name}");
    }
    assert_eq!(
        names, sections,
        "the alerts and the sections of the runbook"
    );
}

#[test]
fn recorded_series_are_named_level_metric_operations_and_used() {
    let rules = rules();
    let recorded: BTreeSet<String> = all(&rules)
        .filter_map(|rule| rule["record"].as_str())
        .map(str::to_owned)
        .collect();
    for name in &recorded {
        assert_eq!(name.split(':').count(), 3, "{name}");
    }
    let used: BTreeSet<String> = all(&rules)
        .flat_map(|rule| promql::recorded(text(&rule["expr"])))
        .collect();
    assert_eq!(recorded, used);
}

fn changed(rule: &Value, field: &str, value: &str) -> Value {
    let mut rule = rule.clone();
    rule[field] = value.into();
    rule
}

/// Whether these rules pass those of the tests that speak of `alert`.
fn passes(rules: &[&Value], tests: &Value, alert: &str) -> bool {
    let speaks_of_it =
        |test: &&Value| items(&test["alert_rule_test"]).any(|case| case["alertname"] == alert);
    let mut of_it: Vec<Value> = items(&tests["tests"])
        .filter(speaks_of_it)
        .cloned()
        .collect();
    for test in &mut of_it {
        let cases = test["alert_rule_test"].as_array_mut().unwrap();
        cases.retain(|case| case["alertname"] == alert);
        test["promql_expr_test"] = json!([]);
    }
    assert!(!of_it.is_empty(), "{alert} has no test");

    let folder = tempfile::tempdir().unwrap();
    // JSON is YAML.
    let write = |name: &str, content: Value| {
        fs::write(folder.path().join(name), content.to_string()).unwrap();
    };
    write(
        "rules.yaml",
        json!({"groups": [{"name": "g", "rules": rules}]}),
    );
    write(
        "tests.yaml",
        json!({
            "rule_files": ["rules.yaml"],
            "evaluation_interval": tests["evaluation_interval"],
            "tests": of_it,
        }),
    );
    promtool_test(&folder.path().join("tests.yaml"))
}

fn promtool_test(file: &Path) -> bool {
    let mut command = Command::new("promtool");
    command.args(["test", "rules"]).arg(file);
    let (succeeded, stdout, stderr) = outcome(&mut command, INSTALL);
    // A file that cannot be read fails for another reason than the alert.
    assert!(
        succeeded || stderr.contains("alertname:"),
        "{stdout}{stderr}"
    );
    succeeded
}
