//! The dashboard of Grafana, as far as it can be checked without one. Its
//! queries are tried against a real Prometheus in `prometheus.rs`.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{items, promql, read, rules, text};

pub const DASHBOARD: &str = "deploy/grafana/groupstate.json";

/// One query of a panel.
#[derive(Debug)]
pub struct Query {
    pub panel: String,
    pub expression: String,
}

fn dashboard() -> Value {
    serde_json::from_str(&read(DASHBOARD)).unwrap()
}

/// Those that ask something; the others are headings.
fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    items(&dashboard["panels"]).filter(|panel| panel["type"] != "row")
}

/// What all panels ask.
pub fn queries() -> Vec<Query> {
    let dashboard = dashboard();
    let targets = panels(&dashboard)
        .flat_map(|panel| items(&panel["targets"]).map(move |target| (panel, target)));
    targets
        .map(|(panel, target)| Query {
            panel: text(&panel["title"]).to_owned(),
            expression: text(&target["expr"]).to_owned(),
        })
        .collect()
}

#[test]
fn it_answers_four_questions_from_top_to_bottom() {
    let dashboard = dashboard();
    let rows = items(&dashboard["panels"]).filter(|panel| panel["type"] == "row");
    let questions: Vec<&str> = rows.map(|row| text(&row["title"])).collect();
    assert_eq!(
        questions,
        [
            "Is it up?",
            "Is it fast?",
            "Is it degraded?",
            "What is it doing?"
        ]
    );
}

#[test]
fn panels_have_stable_ids_and_do_not_cover_each_other() {
    let dashboard = dashboard();
    let mut cells = BTreeSet::new();
    for (at, panel) in items(&dashboard["panels"]).enumerate() {
        let title = &panel["title"];
        assert_eq!(panel["id"], at + 1, "{title}");
        let place = |field: &str| panel["gridPos"][field].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{title}");
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(cells.insert((x, y)), "{title} covers another panel");
            }
        }
    }
}

#[test]
fn the_data_source_and_the_instances_are_variables() {
    let dashboard = dashboard();
    let names: Vec<&str> = items(&dashboard["templating"]["list"])
        .map(|variable| text(&variable["name"]))
        .collect();
    assert_eq!(names, ["datasource", "instance"]);
    for panel in panels(&dashboard) {
        let source = json!({"type": "prometheus", "uid": "$datasource"});
        assert_eq!(panel["datasource"], source, "{}", panel["title"]);
    }
    for Query { panel, expression } in queries() {
        assert!(expression.contains(r#"job="groupstate""#), "{panel}");
        // Recorded series are about all instances, and the panel says so.
        let of_all = !promql::recorded(&expression).is_empty();
        assert!(
            of_all || expression.contains(r#"instance=~"$instance""#),
            "{panel}"
        );
    }
}

#[test]
fn recorded_series_and_alerts_that_it_names_exist() {
    let rules = rules::rules();
    let names = |field: &str| -> BTreeSet<&str> {
        rules::all(&rules)
            .filter_map(|rule| rule[field].as_str())
            .collect()
    };
    for Query { panel, expression } in queries() {
        for name in promql::recorded(&expression) {
            assert!(names("record").contains(name.as_str()), "{panel}: {name}");
        }
    }
    for panel in panels(&dashboard()) {
        let words = panel["description"].as_str().unwrap_or_default();
        let words = words.split(|c: char| !c.is_alphanumeric());
        for alert in words.filter(|word| word.starts_with("Groupstate")) {
            assert!(names("alert").contains(alert), "{alert}");
        }
    }
}
