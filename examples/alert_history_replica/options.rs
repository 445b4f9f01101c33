//! The command line, and what follows from it.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};
use groupstate::{
    domain::retention::Retention,
    manager::{ManagerSettings, group_keys::GroupKeys, remote::RemoteSettings},
    reload::Watched,
    telemetry::FileSetting,
};
use tonic::transport::{Certificate, ClientTlsConfig};

use crate::ReplicaError;

/// Receives Alertmanager webhooks and keeps their alert groups in groupstate.
#[derive(Debug, Parser)]
#[command(name = "alert_history_replica", max_term_width = 100)]
pub struct Options {
    /// Where to receive webhooks. Port 0 takes a free one, which is logged.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,

    /// An instance of groupstate, or a name that stands for all of them; may be
    /// given several times.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    pub groupstate: Vec<String>,

    /// Speaks TLS; a file with the CA of the service's certificate.
    #[arg(long, value_name = "FILE", requires = "tls_domain")]
    pub tls_ca: Option<PathBuf>,

    /// The name in the service's certificate.
    #[arg(long, value_name = "NAME", requires = "tls_ca")]
    pub tls_domain: Option<String>,

    /// A file with the token for the service, read again when it changes.
    #[arg(long, value_name = "FILE")]
    pub auth_token_file: Option<PathBuf>,

    /// How long a group lives after its last firing report.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "24h")]
    pub group_ttl: Duration,

    /// How long a resolved alert stays in a group that lives on.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "1h")]
    pub resolved_retention: Duration,

    /// How long a firing alert that nobody reports any more stays in a group that
    /// lives on: longer than Alertmanager's repeat_interval and group_interval
    /// together, and not longer than --group-ttl.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "24h")]
    pub report_horizon: Duration,

    /// Alerts that a group holds at most; as at the service.
    #[arg(long, value_name = "COUNT", default_value_t = Retention::default().max_alerts)]
    pub max_alerts_per_group: usize,

    /// Bytes that the document of a group takes at most; as at the service.
    #[arg(long, value_name = "BYTES", default_value_t = Retention::default().max_document_bytes)]
    pub max_document_bytes: usize,

    /// Bytes of it that resolved alerts take at most.
    #[arg(long, value_name = "BYTES", default_value_t = Retention::default().max_resolved_bytes)]
    pub max_resolved_bytes: usize,

    /// Which group an alert belongs to: by its group labels, as the Go service has
    /// it, or by Alertmanager's groupKey and receiver.
    #[arg(long, value_name = "RULE", value_enum, default_value = "labels")]
    pub group_keys: GroupKeyRule,

    /// Labels by which to group what comes without a group, from Prometheus or vmalert.
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "alertname"
    )]
    pub group_by: Vec<String>,

    /// When Alertmanager gives up a notification: a replica that was stopped for longer
    /// answers 503 to what it had received before.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "10s")]
    pub sender_timeout: Duration,

    /// Deletes groups that were not updated for this long.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "24h")]
    pub max_age: Duration,

    /// How often to learn what other replicas have done.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "30s")]
    pub restore_every: Duration,

    /// How long a group is listed that the service has not shown again: longer than
    /// --restore-every.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "2m")]
    pub max_copy_age: Duration,
}

/// Which group an alert belongs to.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum GroupKeyRule {
    Labels,
    Alertmanager,
}

/// How often the token file is looked at.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

// === impl Options ===

impl Options {
    /// How the manager goes about its work.
    pub fn manager(&self) -> Result<ManagerSettings, ReplicaError> {
        if self.report_horizon > self.group_ttl {
            return Err(ReplicaError::Setting(
                "--report-horizon must not be longer than --group-ttl: a group that nobody changes any more goes with the latter",
            ));
        }
        if self.max_copy_age <= self.restore_every {
            return Err(ReplicaError::Setting(
                "--max-copy-age must be longer than --restore-every, or groups are not listed in between",
            ));
        }
        Ok(ManagerSettings {
            group_ttl: self.group_ttl,
            retention: Retention {
                resolved_retention: self.resolved_retention,
                report_horizon: self.report_horizon,
                max_alerts: self.max_alerts_per_group,
                max_document_bytes: self.max_document_bytes,
                max_resolved_bytes: self.max_resolved_bytes,
            },
            max_copy_age: self.max_copy_age,
            ..ManagerSettings::default()
        })
    }

    /// Which group an alert belongs to.
    pub fn keys(&self) -> GroupKeys {
        match self.group_keys {
            GroupKeyRule::Labels => GroupKeys::new(),
            GroupKeyRule::Alertmanager => GroupKeys::new().of_alertmanager(),
        }
    }

    /// How to call the service.
    pub fn remote(&self) -> Result<RemoteSettings, ReplicaError> {
        let mut settings = RemoteSettings::default();
        if let (Some(ca), Some(domain)) = (&self.tls_ca, &self.tls_domain) {
            let pem =
                fs::read(ca).map_err(|error| ReplicaError::File(format!("--tls-ca: {error}")))?;
            let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem));
            settings.tls = Some(tls.domain_name(domain));
        }
        if let Some(file) = &self.auth_token_file {
            let parse = |contents: &[Vec<u8>]| {
                let token = String::from_utf8(contents.concat()).map_err(|_| "is not a text")?;
                Ok(token.trim().to_owned())
            };
            let (token, watcher) =
                Watched::open(FileSetting::AuthTokenFile, vec![file.clone()], parse)
                    .map_err(ReplicaError::File)?;
            tokio::spawn(watcher.watch_forever(RELOAD_INTERVAL));
            settings.token = Some(token);
        }
        Ok(settings)
    }
}
