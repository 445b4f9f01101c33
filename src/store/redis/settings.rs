//! Where Redis is and how to reach it: what the URL and the files say.

use std::{fmt, time::Duration};

use fred::{
    prelude::{Config, Server, ServerConfig},
    types::config::{ClusterDiscoveryPolicy, TlsConfig},
};

use super::{
    tls::{RedisTls, changed},
    url::{Credentials, Deployment, RedisUrl, SCHEMES_WITH_TLS},
};
use crate::{
    pem::{Authorities, Identity},
    reload::Watched,
};

/// Where Redis is and how to reach it. Its debug form holds no credentials.
#[derive(Clone)]
pub struct RedisSettings {
    deployment: Deployment,
    /// Of the URL, or those that took their place.
    credentials: Credentials,
    /// Takes the place of the password there.
    password: Option<Watched<String>>,
    database: Option<u8>,
    tls: Option<RedisTls>,
    limits: RedisLimits,
}

/// How many connections there are, and how much and how long they are used.
#[derive(Clone, Copy, Debug)]
pub struct RedisLimits {
    /// Connections for calls. There are three more: for PINGs, for large documents
    /// and listings, and for what the service does by itself.
    pub pool_size: usize,
    /// The time one command on small documents gets at most.
    pub timeout: Duration,
    /// Bytes of large documents that may be on their way at once.
    pub max_bulk_bytes: usize,
}

impl Default for RedisLimits {
    fn default() -> Self {
        Self {
            pool_size: 2,
            timeout: Duration::from_millis(250),
            max_bulk_bytes: 4 << 20,
        }
    }
}

/// What comes from files.
#[derive(Clone, Debug, Default)]
pub struct RedisFiles {
    pub password: Option<Watched<String>>,
    /// Only with TLS. None: those whom the system believes.
    pub authorities: Option<Watched<Authorities>>,
    /// Only with TLS.
    pub identity: Option<Watched<Identity>>,
}

/// The same settings at one moment, between two changes of files.
#[derive(Clone)]
pub struct Access {
    pub deployment: Deployment,
    pub credentials: Credentials,
    database: Option<u8>,
    tls: Option<TlsConfig>,
}

// === impl RedisSettings ===

impl RedisSettings {
    /// Of a URL. The error does not repeat any part of it.
    pub fn new(url: &str, files: RedisFiles, limits: RedisLimits) -> Result<Self, String> {
        let url = RedisUrl::parse(url)?;
        let has_certificates = files.authorities.is_some() || files.identity.is_some();
        if has_certificates && !url.tls {
            return Err(format!(
                "does not ask for TLS, as certificates do: it must begin with \
                 {SCHEMES_WITH_TLS}"
            ));
        }
        let tls = || RedisTls::new(files.authorities, files.identity);
        Ok(Self {
            deployment: url.deployment,
            credentials: url.credentials,
            password: files.password,
            database: url.database,
            tls: url.tls.then(tls).transpose()?,
            limits,
        })
    }

    /// Replaces the user of the URL.
    pub fn set_username(&mut self, username: String) {
        self.credentials.username = Some(username);
    }

    /// How many connections there are, and how much and how long they are used.
    pub fn limits(&self) -> RedisLimits {
        self.limits
    }

    /// Waits until a file has changed.
    pub async fn changed(&mut self) {
        let tls = async {
            match &mut self.tls {
                Some(tls) => tls.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = changed(self.password.as_mut()) => {}
            () = tls => {}
        }
    }

    /// How to reach Redis now.
    pub fn access(&self) -> Result<Access, String> {
        let mut credentials = self.credentials.clone();
        if let Some(password) = &self.password {
            credentials.password = Some((*password.current()).clone());
        }
        Ok(Access {
            deployment: self.deployment.clone(),
            credentials,
            database: self.database,
            tls: self.tls.as_ref().map(RedisTls::config).transpose()?,
        })
    }
}

impl fmt::Debug for RedisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSettings")
            .field("deployment", &self.deployment)
            .field("username", &self.credentials.username)
            .field("database", &self.database)
            .field("tls", &self.tls.is_some())
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

// === impl Access ===

impl Access {
    /// What fred needs to connect; to the primary at `server` where that is
    /// found out by asking sentinels.
    pub fn config(&self, server: Option<&Server>) -> Config {
        Config {
            server: match (server, &self.deployment) {
                (Some(server), _) | (None, Deployment::Standalone(server)) => {
                    ServerConfig::Centralized {
                        server: server.clone(),
                    }
                }
                (None, Deployment::Unix(path)) => ServerConfig::Unix { path: path.clone() },
                (None, Deployment::Cluster(hosts)) => ServerConfig::Clustered {
                    hosts: hosts.clone(),
                    // The nodes of the URL may be gone some day.
                    policy: ClusterDiscoveryPolicy::UseCache,
                },
                // Nobody connects before a sentinel has named the primary.
                (None, Deployment::Sentinel(sentinel)) => ServerConfig::new_sentinel(
                    Vec::<(String, u16)>::new(),
                    sentinel.service.clone(),
                ),
            },
            // Redis may come up later than this service.
            fail_fast: false,
            database: self.database,
            ..self.login(&self.credentials)
        }
    }

    /// The same for a sentinel.
    pub fn sentinel_config(&self, host: &Server, credentials: &Credentials) -> Config {
        Config {
            server: ServerConfig::Centralized {
                server: host.clone(),
            },
            ..self.login(credentials)
        }
    }

    fn login(&self, credentials: &Credentials) -> Config {
        Config {
            username: credentials.username.clone(),
            password: credentials.password.clone(),
            tls: self.tls.clone(),
            ..Config::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debug_form_holds_no_secrets() {
        for url in [
            "redis://u:s3cret@h",
            "redis-sentinel://u:s3cret@h?sentinelServiceName=m&sentinelPassword=s3cret",
        ] {
            let files = RedisFiles::default();
            let settings = RedisSettings::new(url, files, RedisLimits::default()).unwrap();
            let shown = format!("{settings:?}");
            assert!(!shown.contains("s3cret"), "{shown}");
        }
    }
}
