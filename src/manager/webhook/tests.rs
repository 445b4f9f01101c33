//! What is read of webhooks, recorded ones and others.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const RECORDED: &str = include_str!("../../../tests/data/alertmanager-webhooks.jsonl");

fn parse(text: &str) -> Webhook {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn key(webhook: &Webhook) -> GroupKey {
    webhook.key(&GroupKeys::new()).unwrap()
}

/// The reports of a webhook about one group with these alerts.
fn reports(alerts: &str) -> (Vec<Alert>, Vec<Refused>) {
    let webhook = parse(&format!(r#"{{"groupLabels":{{}},"alerts":[{alerts}]}}"#));
    webhook.into_reports(Time::now())
}

#[test]
fn recorded_webhooks_are_read_whole() {
    let webhooks: Vec<Webhook> = RECORDED.lines().map(parse).collect();
    assert_eq!(webhooks.len(), 456);
    let keys: BTreeSet<_> = webhooks.iter().map(key).collect();
    assert_eq!(keys.len(), 278);
    let received = Time::now();
    let mut alerts = BTreeSet::new();
    for webhook in webhooks {
        let key = key(&webhook);
        let (reports, refused) = webhook.into_reports(received);
        assert_eq!(refused, []);
        for report in reports {
            assert!(!report.alert_name.is_empty());
            assert_eq!(
                report.ends_at.is_some(),
                report.status == AlertStatus::Resolved
            );
            assert!(report.starts_at.is_some());
            alerts.insert((key.clone(), report.fingerprint));
        }
    }
    assert_eq!(alerts.len(), 1_112);
}

/// A real Alertmanager has computed them.
#[test]
fn fingerprints_are_those_of_alertmanager() {
    let mut compared = 0;
    for webhook in RECORDED.lines().map(parse) {
        for report in webhook.into_reports(Time::now()).0 {
            assert_eq!(fingerprint(&report.labels), report.fingerprint);
            compared += 1;
        }
    }
    assert!(compared > 1_112, "{compared}");
    assert_eq!(fingerprint(&BTreeMap::new()), "cbf29ce484222325");
    // Alertmanager drops a label without a value.
    let mut labels = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
    let without = fingerprint(&labels);
    labels.insert("c".into(), String::new());
    assert_eq!(fingerprint(&labels), without);
}

#[test]
fn what_is_no_webhook_is_refused_with_a_reason() {
    for (text, reason) in [
        ("", "EOF"),
        ("{}", "missing field"),
        (r#"{"alerts":[]}"#, "missing field `groupLabels`"),
        (r#"{"groupLabels":{}}"#, "missing field `alerts`"),
        (r#"{"groupLabels":{"a":[]},"alerts":[]}"#, "must be a text"),
        (r#"{"groupLabels":{},"alerts":{}}"#, "invalid type"),
    ] {
        let error = serde_json::from_str::<Webhook>(text)
            .unwrap_err()
            .to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
}

#[test]
fn an_alert_that_cannot_be_read_is_refused_alone_and_named() {
    for (bad, reason) in [
        ("7", "invalid type"),
        (r#"{"fingerprint":"f","status":"odd"}"#, "unknown variant"),
        (r#"{"fingerprint":"f","startsAt":"now"}"#, "must be a time"),
        (r#"{"fingerprint":"f","labels":{"a":{}}}"#, "must be a text"),
        (r#"{"fingerprint":"f","labels":[]}"#, "invalid type"),
    ] {
        let (reports, refused) = reports(&format!(
            r#"{{"labels":{{"a":"1"}}}},{bad},{{"labels":{{"a":"2"}}}}"#
        ));
        assert_eq!(reports.len(), 2, "{bad}");
        let [refused] = &refused[..] else {
            panic!("{bad}: {refused:?}");
        };
        assert_eq!(refused.reason, RefusedReason::Malformed);
        assert!(refused.message.starts_with("alerts[1]: "), "{refused:?}");
        assert!(refused.message.contains(reason), "{refused:?}");
        let named = if bad == "7" { "" } else { "f" };
        assert_eq!(refused.fingerprint, named);
    }
}

#[test]
fn what_others_leave_out_or_write_differently_is_read() {
    let (reports, refused) = reports(
        r#"{"labels":{"a":1,"b":true,"c":null,"d":1.5},"annotations":null,"startsAt":"",
            "endsAt":null,"generatorURL":null,"fingerprint":null,"status":null,"silenceURL":""},
           {"labels":{"a":"x"},"endsAt":"2020-01-01T00:00:00Z"},
           {"labels":{"a":"y"},"endsAt":"9020-01-01T00:00:00Z"},
           {"labels":{"a":"z"},"endsAt":"0001-01-01T00:00:00Z","startsAt":"0001-01-01T00:00:00+00:00"}"#,
    );
    assert_eq!(refused, []);
    let texts = [("a", "1"), ("b", "true"), ("d", "1.5")];
    let labels = texts.map(|(name, value)| (name.into(), value.into()));
    assert_eq!(reports[0].labels, BTreeMap::from(labels));
    assert_eq!(reports[0].fingerprint, fingerprint(&reports[0].labels));
    let statuses: Vec<AlertStatus> = reports.iter().map(|report| report.status).collect();
    use AlertStatus::{Firing, Resolved};
    assert_eq!(statuses, [Firing, Resolved, Firing, Firing]);
    for report in &reports {
        assert_eq!(report.starts_at, None);
        assert_eq!(report.ends_at.is_some(), report.status == Resolved);
    }
}

#[test]
fn a_webhook_without_group_labels_is_of_the_group_of_all_or_of_none() {
    for (text, expected) in [
        (
            r#"{"groupLabels":null,"alerts":[{"labels":{"a":"b"}}]}"#,
            "{global}",
        ),
        (r#"{"groupLabels":{},"alerts":[{"labels":{}}]}"#, "{empty}"),
        (r#"{"groupLabels":{"a":7},"alerts":[3]}"#, "a=7"),
    ] {
        assert_eq!(key(&parse(text)).as_str(), expected);
    }
}

#[test]
fn alertmanagers_own_groups_are_kept_apart_if_that_is_set() {
    let keys = GroupKeys::new().of_alertmanager();
    let webhook = |receiver: &str, route: &str| {
        parse(&format!(
            r#"{{"receiver":"{receiver}","groupKey":"{route}:{{a=\"b\"}}","groupLabels":{{"a":"b"}},"alerts":[]}}"#
        ))
    };
    let key = |receiver, route| webhook(receiver, route).key(&keys).unwrap();
    assert_eq!(
        key("team x", "{}").as_str(),
        r#"receiver=team+x,groupKey={}:{a="b"}"#
    );
    let different = [key("x", "{}"), key("y", "{}"), key("x", "{}/{}")];
    assert_eq!(BTreeSet::from(different).len(), 3);
    let long = key("x", &"r".repeat(5_000));
    assert!(long.as_str().starts_with("{hash:"), "{long}");
    // The oldest ones send a number.
    let old = parse(r#"{"receiver":"x","groupKey":17,"groupLabels":{},"alerts":[]}"#);
    assert_eq!(old.key(&keys).unwrap().as_str(), "receiver=x,groupKey=17");
    let none = parse(r#"{"groupLabels":{},"alerts":[]}"#);
    assert!(none.key(&keys).unwrap_err().contains("no groupKey"));
}

#[test]
fn a_posted_list_is_grouped_by_the_labels_that_are_asked_for() {
    let posted = br#"[
        {"labels":{"alertname":"A","i":"1"},"endsAt":"9020-01-01T00:00:00Z"},
        {"labels":{"alertname":"B","i":"1"},"endsAt":"2020-01-01T00:00:00Z"},
        7,
        {"labels":{"alertname":"A","i":"2"},"startsAt":"2026-03-01T10:00:00Z"},
        {"labels":{"i":"3"}}
    ]"#;
    let webhooks = Webhook::of_posted(posted, &["alertname".into()]).unwrap();
    let groups: Vec<_> = webhooks
        .into_iter()
        .map(|webhook| {
            let key = key(&webhook).to_string();
            let (reports, refused) = webhook.into_reports(Time::now());
            let firing = |report: &&Alert| report.status == AlertStatus::Firing;
            (
                key,
                reports.len(),
                reports.iter().filter(firing).count(),
                refused.len(),
            )
        })
        .collect();
    let expected = [
        ("{global}", 1, 1, 1),
        ("alertname=A", 2, 2, 0),
        ("alertname=B", 1, 0, 0),
    ];
    let expected =
        expected.map(|(key, all, firing, refused)| (key.to_owned(), all, firing, refused));
    assert_eq!(groups, expected);
    assert!(Webhook::of_posted(b"{}", &[]).is_err());
}

proptest! {
    /// Whatever comes, it is read or refused, and nothing panics.
    #[test]
    fn any_alert_is_a_report_or_refused(
        fields in prop::collection::btree_map(
            prop::sample::select(vec![
                "fingerprint", "status", "labels", "annotations", "startsAt", "endsAt", "generatorURL",
            ]),
            prop::sample::select(vec![
                "null", "0", "true", "\"\"", "\"firing\"", "\"a\"", "[]", "{}", "{\"\":\"x\"}",
                "{\"a\":null}", "{\"a\":1e300}", "{\"a\":[]}", "\"2026-03-01T10:00:00Z\"",
                "\"0000-01-01T00:00:00Z\"", "-1",
            ]),
            0..7,
        ),
    ) {
        let fields: Vec<String> = fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        let (reports, refused) = reports(&format!("{{{}}}", fields.join(",")));
        prop_assert_eq!(reports.len() + refused.len(), 1);
        prop_assert!(reports.iter().all(|report| !report.fingerprint.is_empty()));
    }
}
