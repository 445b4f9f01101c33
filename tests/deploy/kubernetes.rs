//! What `kubectl apply -k` would send, checked against the schemas of
//! Kubernetes and for what these cannot know.

use std::{fs, process::Command, time::Duration};

use groupstate::{config::Settings, server::longest_stop, store::failover::switch::OnRecovery};
use serde_json::{Value, json};

use crate::{
    INSTALL, common::tool, dashboard::DASHBOARD, flags, items, outcome, path, read, rules, run,
    text, yaml,
};

const BASE: &str = "deploy/kubernetes/base";
const PRODUCTION: &str = "deploy/kubernetes/overlays/production";
const DEVELOPMENT: &str = "deploy/kubernetes/overlays/development";
const ALL: [&str; 4] = [
    BASE,
    "deploy/kubernetes/monitoring",
    PRODUCTION,
    DEVELOPMENT,
];

/// The oldest Kubernetes that the manifests are for, and the newest one whose
/// schemas we have.
const VERSIONS: [&str; 2] = ["1.27", "1.37"];

/// Kinds that the Prometheus Operator adds; their schemas come with it.
const OF_OPERATOR: [&str; 2] = ["ServiceMonitor", "PrometheusRule"];

const INSTALL_KUBECTL: &str = "run `make tools`, or install kubectl 1.22 or newer as \
                               https://kubernetes.io/docs/tasks/tools/ says";

/// The objects of one kustomization.
struct Rendered(Vec<Value>);

// === impl Rendered ===

impl Rendered {
    fn of(folder: &str) -> Self {
        let mut command = Command::new("kubectl");
        command.arg("kustomize").arg(path(folder));
        let (succeeded, stdout, stderr) = outcome(&mut command, INSTALL_KUBECTL);
        assert!(succeeded, "{folder}: {stderr}");
        // It warns of what the next Kustomize will not read.
        assert_eq!(stderr, "", "{folder}");
        Self(yaml(&stdout))
    }

    fn of_kind(&self, kind: &str) -> impl Iterator<Item = &Value> {
        self.0.iter().filter(move |object| object["kind"] == kind)
    }

    /// The only object of a kind that belongs to groupstate.
    fn one(&self, kind: &str) -> &Value {
        self.named(kind, "groupstate")
    }

    /// The only object of a kind whose name begins so.
    fn named(&self, kind: &str, name: &str) -> &Value {
        let mut ours = self
            .of_kind(kind)
            .filter(|object| text(&object["metadata"]["name"]).starts_with(name));
        let one = ours.next().unwrap_or_else(|| panic!("no {kind}"));
        assert!(ours.next().is_none(), "more than one {kind}");
        one
    }

    /// The template of groupstate's Pods.
    fn pod(&self) -> &Value {
        &self.one("Deployment")["spec"]["template"]
    }

    /// The command line that says the same as the environment of the container.
    fn arguments(&self) -> Vec<String> {
        let container = &self.pod()["spec"]["containers"][0];
        let source = &container["envFrom"][0]["configMapRef"]["name"];
        let settings = self.named("ConfigMap", "groupstate-settings");
        assert_eq!(*source, settings["metadata"]["name"]);
        flags(&settings["data"])
    }
}

#[test]
fn every_object_is_what_kubernetes_expects() {
    let folder = tempfile::tempdir().unwrap();
    for kustomization in ALL {
        let rendered = Rendered::of(kustomization);
        assert!(!rendered.0.is_empty(), "{kustomization}");
        let known = rendered
            .0
            .iter()
            .filter(|object| !OF_OPERATOR.contains(&text(&object["kind"])));
        let files: Vec<_> = known
            .enumerate()
            .map(|(number, object)| {
                let file = folder.path().join(format!("{number}.yaml"));
                fs::write(&file, object.to_string()).unwrap();
                file
            })
            .collect();
        for version in VERSIONS {
            if !files.is_empty() {
                let validate = tool("venv/bin/kubernetes-validate");
                run(Command::new(validate)
                    .args(["--strict", "-k", version])
                    .args(&files));
            }
        }
    }
}

/// Otherwise the test above would not mean much.
#[test]
fn the_validation_sees_a_misspelt_field() {
    let mut service = Rendered::of(BASE).one("Service").clone();
    service["spec"]["clusterIp"] = service["spec"]["clusterIP"].take();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("service.yaml");
    fs::write(&file, service.to_string()).unwrap();
    let mut command = Command::new(tool("venv/bin/kubernetes-validate"));
    let (succeeded, ..) = outcome(command.arg("--strict").arg(file), INSTALL);
    assert!(!succeeded);
}

#[test]
fn pods_have_no_more_rights_than_they_need() {
    for kustomization in [BASE, PRODUCTION, DEVELOPMENT] {
        for deployment in Rendered::of(kustomization).of_kind("Deployment") {
            let pod = &deployment["spec"]["template"]["spec"];
            assert_eq!(pod["automountServiceAccountToken"], false);
            assert_eq!(pod["enableServiceLinks"], false);
            let security = &pod["securityContext"];
            assert_eq!(security["runAsNonRoot"], true);
            assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault");
            for container in items(&pod["containers"]) {
                let security = &container["securityContext"];
                assert_eq!(security["allowPrivilegeEscalation"], false);
                assert_eq!(security["readOnlyRootFilesystem"], true);
                assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
                let resources = &container["resources"];
                for amount in ["/requests/cpu", "/requests/memory", "/limits/memory"] {
                    assert!(resources.pointer(amount).is_some(), "{amount}");
                }
                // Being held back looks like a hung Redis.
                assert_eq!(resources["limits"]["cpu"], Value::Null);
            }
        }
        assert_eq!(
            Rendered::of(kustomization).pod()["spec"]["securityContext"]["runAsUser"],
            65532
        );
    }
}

#[test]
fn the_service_takes_the_settings_and_has_time_to_stop() {
    for kustomization in [BASE, PRODUCTION, DEVELOPMENT] {
        let rendered = Rendered::of(kustomization);
        let pod = &rendered.pod()["spec"];
        let container = &pod["containers"][0];

        // The file is where the Secret is mounted; here it is another one.
        let mount = text(&container["volumeMounts"][0]["mountPath"]);
        let item = text(&pod["volumes"][0]["secret"]["items"][0]["path"]);
        let flag = "--redis-password-file=";
        let password = tempfile::NamedTempFile::new().unwrap();
        fs::write(password.path(), "secret").unwrap();
        let mut arguments = rendered.arguments();
        let position = arguments
            .iter()
            .position(|argument| argument.starts_with(flag));
        let file = &mut arguments[position.expect("a password")];
        assert_eq!(*file, format!("{flag}{mount}/{item}"));
        *file = format!("{flag}{}", password.path().display());
        // The files of the front door are looked at in a test of their own.
        arguments.retain(|argument| !argument.contains("/front-door/"));

        arguments.insert(0, "groupstate".into());
        let settings = Settings::read(&arguments).expect(kustomization);
        assert_eq!(settings.on_recovery, OnRecovery::Reconcile);
        let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
        let grace = Duration::from_secs(grace);
        assert!(grace > longest_stop(&settings), "{grace:?}");

        let port = |name: &str| {
            let mut ports = items(&container["ports"]);
            let port = ports.find(|port| port["name"] == name).unwrap();
            port["containerPort"].as_u64().unwrap()
        };
        assert_eq!(port("grpc"), u64::from(settings.grpc_addr.port()));
        assert_eq!(port("http"), u64::from(settings.http_addr.port()));
        for (probe, path) in [
            ("startupProbe", "/livez"),
            ("livenessProbe", "/livez"),
            ("readinessProbe", "/readyz"),
        ] {
            let expected = json!({"path": path, "port": "http"});
            assert_eq!(container[probe]["httpGet"], expected, "{probe}");
        }
    }
}

#[test]
fn production_has_tls_and_tokens_from_a_secret() {
    let rendered = Rendered::of(PRODUCTION);
    let pod = &rendered.pod()["spec"];
    let named = |list: &Value| {
        let mut found = items(list).filter(|item| item["name"] == "front-door");
        found.next().unwrap().clone()
    };
    let mount = named(&pod["containers"][0]["volumeMounts"]);
    // As a folder: with subPath a file never changes.
    assert_eq!(mount["subPath"], Value::Null);
    let secret = &named(&pod["volumes"])["secret"];
    assert_eq!(secret["secretName"], "groupstate-front-door");
    // Their group may read them.
    assert_eq!(secret["defaultMode"], 0o440);
    let arguments = rendered.arguments();
    for (flag, key) in [
        ("--tls-cert", "tls.crt"),
        ("--tls-key", "tls.key"),
        ("--auth-token-file", "tokens"),
    ] {
        let expected = format!("{flag}={}/{key}", text(&mount["mountPath"]));
        assert!(arguments.contains(&expected), "{expected}: {arguments:?}");
    }
    let ports = items(&rendered.one("Service")["spec"]["ports"]);
    let protocols: Vec<&str> = ports.map(|port| text(&port["appProtocol"])).collect();
    assert_eq!(protocols, ["https", "http"]);
}

#[test]
fn what_selects_pods_selects_ours() {
    for kustomization in [BASE, PRODUCTION, DEVELOPMENT] {
        let rendered = Rendered::of(kustomization);
        let labels = &rendered.pod()["metadata"]["labels"];
        let mut selectors = vec![
            &rendered.one("Service")["spec"]["selector"],
            &rendered.one("Deployment")["spec"]["selector"]["matchLabels"],
            &rendered.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
            &rendered.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        ];
        for constraint in items(&rendered.pod()["spec"]["topologySpreadConstraints"]) {
            selectors.push(&constraint["labelSelector"]["matchLabels"]);
        }
        for selector in selectors {
            let selector = selector.as_object().unwrap();
            assert!(!selector.is_empty());
            assert!(
                selector.iter().all(|(key, value)| labels[key] == *value),
                "{selector:?}"
            );
        }
    }
}

#[test]
fn clients_see_every_instance_by_itself() {
    let rendered = Rendered::of(BASE);
    let service = &rendered.one("Service")["spec"];
    assert_eq!(service["clusterIP"], "None");
    let ports: Vec<(&str, &str)> = items(&service["ports"])
        .map(|port| (text(&port["name"]), text(&port["appProtocol"])))
        .collect();
    assert_eq!(ports, [("grpc", "kubernetes.io/h2c"), ("http", "http")]);
}

#[test]
fn instances_go_slowly_and_never_before_there_are_new_ones() {
    let rendered = Rendered::of(PRODUCTION);
    let deployment = &rendered.one("Deployment")["spec"];
    assert_eq!(deployment["strategy"]["rollingUpdate"]["maxUnavailable"], 0);
    assert_eq!(deployment["replicas"], Value::Null);
    let budget = &rendered.one("PodDisruptionBudget")["spec"];
    assert_eq!(budget["maxUnavailable"], 1);

    let autoscaler = &rendered.one("HorizontalPodAutoscaler")["spec"];
    assert_eq!(
        autoscaler["scaleTargetRef"]["name"],
        rendered.one("Deployment")["metadata"]["name"]
    );
    assert_eq!(
        (&autoscaler["minReplicas"], &autoscaler["maxReplicas"]),
        (&json!(2), &json!(10))
    );
    let down = &autoscaler["behavior"]["scaleDown"];
    assert!(down["stabilizationWindowSeconds"].as_u64() >= Some(1_800));
    assert_eq!(down["selectPolicy"], "Max");
    let policies: Vec<&Value> = items(&down["policies"]).collect();
    assert_eq!(
        policies,
        [&json!({"type": "Pods", "value": 1, "periodSeconds": 600})]
    );
}

/// Who may connect, tokens or not.
#[test]
fn only_alert_history_and_prometheus_get_in() {
    let rendered = Rendered::of(PRODUCTION);
    let policy = &rendered.one("NetworkPolicy")["spec"];
    assert_eq!(policy["policyTypes"], json!(["Ingress", "Egress"]));
    let who = |port: &str| -> Vec<&Value> {
        let rules = items(&policy["ingress"]);
        let rules = rules.filter(|rule| rule["ports"] == json!([{"port": port}]));
        rules.flat_map(|rule| items(&rule["from"])).collect()
    };
    let alert_history =
        json!({"podSelector": {"matchLabels": {"app.kubernetes.io/name": "alert-history"}}});
    let monitoring = json!({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}});
    assert_eq!(who("grpc"), [&alert_history]);
    assert_eq!(who("http"), [&monitoring]);
    assert_eq!(items(&policy["ingress"]).count(), 2);
}

/// The schemas of these two come with the Prometheus Operator.
#[test]
fn the_operator_scrapes_the_job_that_the_rules_ask_for() {
    let rendered = Rendered::of(PRODUCTION);
    let monitor = rendered.one("ServiceMonitor");
    assert_eq!(monitor["apiVersion"], "monitoring.coreos.com/v1");
    let service = rendered.one("Service");
    let labels = &service["metadata"]["labels"];
    let selector = monitor["spec"]["selector"]["matchLabels"]
        .as_object()
        .unwrap();
    assert!(selector.iter().all(|(key, value)| labels[key] == *value));
    let job = text(&monitor["spec"]["jobLabel"]);
    assert_eq!(labels[job], "groupstate");
    let endpoints: Vec<&Value> = items(&monitor["spec"]["endpoints"]).collect();
    assert_eq!(
        endpoints,
        [&json!({"port": "http", "path": "/metrics", "interval": "15s"})]
    );
}

#[test]
fn kubernetes_gets_the_same_rules() {
    let rendered = Rendered::of(PRODUCTION);
    let rule = rendered.one("PrometheusRule");
    assert_eq!(rule["apiVersion"], "monitoring.coreos.com/v1");
    assert!(rule["spec"] == rules::rules(), "run `make prometheus-rule`");
}

#[test]
fn kubernetes_gets_the_same_dashboard() {
    let rendered = Rendered::of(PRODUCTION);
    let dashboard = rendered.named("ConfigMap", "groupstate-dashboard");
    assert_eq!(dashboard["metadata"]["labels"]["grafana_dashboard"], "1");
    assert_eq!(dashboard["data"]["groupstate.json"], read(DASHBOARD));
}

#[test]
fn secrets_are_made_in_development_only() {
    assert_eq!(Rendered::of(PRODUCTION).of_kind("Secret").count(), 0);
    let rendered = Rendered::of(DEVELOPMENT);
    let secret = &rendered.one("Secret")["metadata"]["name"];
    let volume = &rendered.pod()["spec"]["volumes"][0]["secret"]["secretName"];
    assert_eq!(volume, secret);
}
