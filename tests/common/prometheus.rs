//! A real Prometheus.

use std::{
    fs,
    net::SocketAddr,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use super::{Process, free_address, http, wait_until};

const INSTALL: &str = "run `make tools`, or as root: apt-get install prometheus";

/// How long one answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Reads one configuration and keeps its data in a folder of its own.
pub struct Prometheus {
    addr: SocketAddr,
    _process: Process,
    _folder: TempDir,
}

impl Prometheus {
    /// Starts it with this configuration and rules; `rules.yaml` in the former
    /// is the latter. Waits until it is ready.
    pub async fn start(config: &str, rules: &str) -> Self {
        Self::start_with(config, rules, &[]).await
    }

    /// The same with further arguments.
    pub async fn start_with(config: &str, rules: &str, arguments: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let file = |name: &str| folder.path().join(name).display().to_string();
        fs::write(file("prometheus.yaml"), config).unwrap();
        fs::write(file("rules.yaml"), rules).unwrap();
        let addr = free_address();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", file("prometheus.yaml")))
            .arg(format!("--storage.tsdb.path={}", file("data")))
            .arg(format!("--web.listen-address={addr}"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let prometheus = Self {
            _process: Process::spawn(&mut command, INSTALL),
            addr,
            _folder: folder,
        };
        wait_until("Prometheus is ready", Duration::from_secs(20), async || {
            let reply = prometheus.get("/-/ready").await;
            reply.is_ok_and(|reply| reply.status == 200)
        })
        .await;
        prometheus
    }

    /// The series that an expression selects now. `Err` is what Prometheus says
    /// against it.
    pub async fn query(&self, expression: &str) -> Result<Vec<Value>, String> {
        let path = format!("/api/v1/query?query={}", percent_encoded(expression));
        let reply = self.json(&path).await;
        match &reply["data"]["result"] {
            Value::Array(series) => Ok(series.clone()),
            _ => Err(reply.to_string()),
        }
    }

    /// The names of the alerts that fire.
    pub async fn firing(&self) -> Vec<String> {
        let reply = self.json("/api/v1/alerts").await;
        let alerts = reply["data"]["alerts"].as_array().unwrap().iter();
        alerts
            .filter(|alert| alert["state"] == "firing")
            .map(|alert| alert["labels"]["alertname"].as_str().unwrap().to_owned())
            .collect()
    }

    /// What became of the last evaluation of every rule: its name and
    /// `ok`, `unknown` or an error.
    pub async fn rules(&self) -> Vec<(String, String)> {
        let reply = self.json("/api/v1/rules").await;
        let groups = reply["data"]["groups"].as_array().unwrap().iter();
        groups
            .flat_map(|group| group["rules"].as_array().unwrap())
            .map(|rule| {
                let error = rule["lastError"].as_str().unwrap_or_default();
                let health = rule["health"].as_str().unwrap();
                let name = rule["name"].as_str().unwrap().to_owned();
                (name, format!("{health}{error}"))
            })
            .collect()
    }

    async fn json(&self, path: &str) -> Value {
        let reply = self.get(path).await.unwrap();
        serde_json::from_str(&reply.body).unwrap_or_else(|_| panic!("{path}: {reply:?}"))
    }

    async fn get(&self, path: &str) -> std::io::Result<http::HttpReply> {
        http::get(&self.addr.to_string(), path, ANSWER_WITHIN).await
    }
}

fn percent_encoded(text: &str) -> String {
    let encoded = text.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    });
    encoded.collect()
}
