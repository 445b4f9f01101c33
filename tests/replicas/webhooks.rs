//! What others than a recent Alertmanager send: the cases of
//! `tests/data/webhooks.jsonl`, and the table of answers in the README.

use std::fmt::Write;

use groupstate::domain::{
    group::{AlertGroup, AlertStatus},
    retention::RefusedReason,
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{common::http, replica::ANSWER_WITHIN, site::Site};

const CASES: &str = include_str!("../data/webhooks.jsonl");

#[derive(Deserialize)]
struct Case {
    case: String,
    why: String,
    webhooks: Vec<Value>,
}

/// What a case must come to.
struct Right {
    case: &'static str,
    answers: &'static [u16],
    /// Fingerprint, status, and the instance or severity.
    stored: &'static [(&'static str, AlertStatus, &'static str)],
    /// Fingerprint and reason.
    refused: &'static [(&'static str, &'static str)],
}

use AlertStatus::{Firing, Resolved};

const DB_1: &str = "fd807b82f98f9135";

const RIGHT: [Right; 9] = [
    Right {
        case: "start-goes-back",
        answers: &[200, 200, 200],
        stored: &[(DB_1, Resolved, "db-1")],
        refused: &[],
    },
    Right {
        case: "no-fingerprint",
        answers: &[200],
        stored: &[(DB_1, Firing, "db-1")],
        refused: &[],
    },
    Right {
        case: "grafana",
        answers: &[200],
        stored: &[(DB_1, Firing, "db-1")],
        refused: &[],
    },
    Right {
        case: "nulls",
        answers: &[200],
        stored: &[(DB_1, Firing, "db-1")],
        refused: &[],
    },
    Right {
        case: "number-label",
        answers: &[200],
        stored: &[("b2ff7990f4fb2a4a", Firing, "3")],
        refused: &[],
    },
    Right {
        case: "one-bad-among-good",
        answers: &[200],
        stored: &[
            ("63510c93a905c728", Firing, "a"),
            ("63550c93a909afff", Firing, "b"),
        ],
        refused: &[("00000000000000aa", "malformed")],
    },
    Right {
        case: "only-bad",
        answers: &[400],
        stored: &[],
        refused: &[("00000000000000ab", "malformed")],
    },
    Right {
        case: "empty-fingerprint",
        answers: &[200],
        stored: &[(DB_1, Firing, "db-1")],
        refused: &[],
    },
    Right {
        case: "two-routes",
        answers: &[200, 200],
        stored: &[
            (DB_1, Firing, "db-1"),
            ("fd8a7b82f997e5ba", Resolved, "db-2"),
        ],
        refused: &[],
    },
];

fn cases() -> Vec<Case> {
    CASES
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn stored(groups: &[AlertGroup]) -> Vec<(String, AlertStatus, String)> {
    let alerts = groups.iter().flat_map(|group| group.alerts.values());
    let alerts = alerts.map(|alert| {
        let named = alert
            .labels
            .get("instance")
            .or(alert.labels.get("severity"));
        (
            alert.fingerprint.clone(),
            alert.status,
            named.cloned().unwrap_or_default(),
        )
    });
    alerts.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sender_is_answered_as_the_readme_says() {
    let site = Site::start(1).await;
    let replica = &site.replicas[0];
    let mut redis = site.redis.connect().await;
    let mut table = String::new();
    let mut refused_before = 0;
    for (case, right) in cases().iter().zip(&RIGHT) {
        assert_eq!(case.case, right.case);
        let () = redis::cmd("DEL")
            .arg("group:alertname=DiskFull")
            .query_async(&mut redis)
            .await
            .unwrap();
        let mut answers = Vec::new();
        let mut refused = Vec::new();
        for webhook in &case.webhooks {
            let reply = replica.answer(&webhook.to_string()).await.unwrap();
            answers.push(reply.status);
            let body: Value = serde_json::from_str(&reply.body).unwrap();
            let count = body["stored"].as_u64().unwrap() as usize;
            let named = body["refused"].as_array().unwrap().clone();
            let alerts = webhook["alerts"].as_array().unwrap().len();
            assert_eq!(count + named.len(), alerts, "{body}");
            refused.extend(named);
        }
        assert_eq!(answers, right.answers, "{}", case.case);
        let named: Vec<(&str, &str)> = refused
            .iter()
            .map(|one| {
                (
                    one["fingerprint"].as_str().unwrap(),
                    one["reason"].as_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(named, right.refused, "{}", case.case);

        let groups = site.groups().await;
        let expected: Vec<_> = right
            .stored
            .iter()
            .map(|(fingerprint, status, named)| ((*fingerprint).into(), *status, (*named).into()))
            .collect();
        assert_eq!(stored(&groups), expected, "{}", case.case);
        if case.case == "start-goes-back" {
            let starts_at = groups[0].alerts[DB_1].starts_at.unwrap();
            assert_eq!(starts_at.to_string(), "2026-03-01T10:00:00Z");
        }
        for group in &groups {
            let firing = expected.iter().filter(|(_, status, _)| *status == Firing);
            assert_eq!(group.metadata.firing_count as usize, firing.count());
        }
        let malformed = replica
            .metric(r#"reports_refused_total{reason="malformed"}"#)
            .await;
        assert_eq!(malformed - refused_before, right.refused.len() as u64);
        refused_before = malformed;

        let answers: Vec<String> = answers.iter().map(u16::to_string).collect();
        let held: Vec<String> = expected
            .iter()
            .map(|(fingerprint, status, _)| format!("`{fingerprint}` {status:?}").to_lowercase())
            .collect();
        let named: Vec<String> = named
            .iter()
            .map(|(fingerprint, reason)| format!("`{fingerprint}` {reason}"))
            .collect();
        writeln!(
            table,
            "| `{}` | {} | {} | {} | {} |",
            case.case,
            case.why,
            answers.join(", "),
            held.join(", "),
            named.join(", ")
        )
        .unwrap();
    }
    assert_eq!(cases().len(), RIGHT.len());
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    assert!(
        readme.contains(&table),
        "the table of the README should be:\n{table}"
    );
}

/// Those of replicas are not among the ones that `tests/deploy` asks a service for.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_has_every_metric_that_a_rule_uses() {
    let site = Site::start(1).await;
    let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/prometheus/rules.yaml");
    let rules = std::fs::read_to_string(rules).unwrap();
    let rules = rules.lines().filter(|line| !line.trim().starts_with('#'));
    let names: Vec<&str> = rules
        .flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
        .filter_map(|name| name.strip_prefix("alert_history_replica_"))
        .collect();
    assert_eq!(names, ["reports_refused_total"]);
    for reason in RefusedReason::ALL {
        let series = format!("{}{{reason=\"{}\"}}", names[0], reason.as_str());
        assert_eq!(site.replicas[0].metric(&series).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_routes_with_equal_labels_are_kept_apart_if_that_is_set() {
    let site = Site::start_with(1, &["--group-keys", "alertmanager"]).await;
    let cases = cases();
    let routes = cases.iter().find(|case| case.case == "two-routes").unwrap();
    for webhook in &routes.webhooks {
        assert_eq!(
            site.replicas[0].receives(&webhook.to_string()).await,
            Some(200)
        );
    }
    let mut groups = site.groups().await;
    groups.sort_by(|one, other| one.key.cmp(&other.key));
    let keys: Vec<&str> = groups.iter().map(|group| group.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            r#"receiver=history,groupKey={}/{team="blue"}:{alertname="DiskFull"}"#,
            r#"receiver=history,groupKey={}/{team="red"}:{alertname="DiskFull"}"#,
        ]
    );
    assert_eq!(stored(&groups[..1])[0].2, "db-2");
    let without = json!({"groupLabels": {}, "alerts": []}).to_string();
    let reply = site.replicas[0].answer(&without).await.unwrap();
    assert_eq!(reply.status, 400);
    assert!(reply.body.contains("no groupKey"), "{}", reply.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_webhook_is_refused_for_good() {
    let site = Site::start(1).await;
    let replica = &site.replicas[0];
    for body in ["", "[]", "{}", r#"{"groupLabels":{},"alerts":7}"#, "\u{0}"] {
        let reply = replica.answer(body).await.unwrap();
        assert_eq!(reply.status, 400, "{body}");
        assert!(reply.body.contains("this is no webhook"), "{}", reply.body);
    }
    let nothing = replica.answer(r#"{"groupLabels":{},"alerts":null}"#).await;
    assert_eq!(nothing.unwrap().status, 200);
    assert_eq!(replica.metric(r#"webhooks_total{code="400"}"#).await, 5);
    assert_eq!(replica.metric(r#"webhooks_total{code="200"}"#).await, 1);
}

/// What vmalert and Prometheus post when a replica is the Alertmanager that they know.
#[tokio::test(flavor = "multi_thread")]
async fn alerts_that_are_posted_as_to_an_alertmanager_are_stored() {
    let site = Site::start_with(1, &["--group-by", "alertname,cluster"]).await;
    let replica = &site.replicas[0];
    let post = async |alerts: Value| {
        let body = alerts.to_string();
        let sent = http::send(
            replica.addr(),
            "POST",
            "/api/v2/alerts",
            &body,
            ANSWER_WITHIN,
        );
        sent.await.unwrap()
    };
    let alert = |cluster: &str, instance: &str, ends: &str| {
        json!({
            "labels": {"alertname": "DiskFull", "cluster": cluster, "instance": instance},
            "annotations": {"summary": "made up"},
            "startsAt": "2026-03-01T10:00:00Z",
            "endsAt": ends,
            "generatorURL": "http://vmalert.example/vmalert/alert",
        })
    };
    let (later, before) = ("2999-01-01T00:00:00Z", "2026-03-01T10:20:00Z");
    let reply = post(json!([
        alert("x", "db-1", later),
        alert("y", "db-1", later),
        alert("x", "db-2", later),
        {"labels": {"": "nameless"}},
    ]))
    .await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let body: Value = serde_json::from_str(&reply.body).unwrap();
    assert_eq!(
        (&body["stored"], body["refused"].as_array().unwrap().len()),
        (&json!(3), 1)
    );
    let reply = post(json!([alert("x", "db-1", before)])).await;
    assert_eq!(reply.status, 200, "{}", reply.body);

    let mut groups = site.groups().await;
    groups.sort_by(|one, other| one.key.cmp(&other.key));
    let counted: Vec<_> = groups
        .iter()
        .map(|group| {
            (
                group.key.as_str(),
                group.metadata.firing_count,
                group.metadata.resolved_count,
            )
        })
        .collect();
    assert_eq!(
        counted,
        [
            ("alertname=DiskFull,cluster=x", 1, 1),
            ("alertname=DiskFull,cluster=y", 1, 0)
        ]
    );
    assert_eq!(post(json!([])).await.status, 200);
    assert_eq!(post(json!([7])).await.status, 400);
    assert_eq!(post(json!({})).await.status, 400);
}
