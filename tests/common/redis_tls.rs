//! A Redis that speaks TLS.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{
    certificates::{Ca, Issued},
    free_address,
    redis_server::RedisServer,
};

/// A CA, and the files of what it signs.
pub struct Authority {
    pub ca: Ca,
    folder: TempDir,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let authority = Self {
            ca: Ca::new(name),
            folder: TempDir::new().unwrap(),
        };
        authority.ca.write(authority.folder.path(), "ca.pem");
        authority
    }

    /// Where they lie.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The file of its own certificate.
    pub fn ca(&self) -> String {
        shown(self.folder.path().join("ca.pem"))
    }

    /// The files of a certificate and its key.
    pub fn files(&self, name: &str, issued: &Issued) -> [String; 2] {
        let (cert, key) = issued.write(self.folder.path(), name);
        [shown(cert), shown(key)]
    }

    /// Settings of a Redis with such a certificate.
    pub fn server_settings(&self, issued: &Issued) -> Vec<String> {
        let [cert, key] = self.files("server", issued);
        let settings = [
            ["--tls-cert-file", &cert],
            ["--tls-key-file", &key],
            ["--tls-ca-cert-file", &self.ca()],
        ];
        settings
            .as_flattened()
            .iter()
            .map(ToString::to_string)
            .collect()
    }
}

fn shown(path: PathBuf) -> String {
    path.display().to_string()
}

/// A Redis with a certificate, and its address for TLS. Clients must show one of
/// the same authority if `mutual`.
pub async fn tls_server(
    authority: &Authority,
    issued: &Issued,
    mutual: bool,
) -> (RedisServer, SocketAddr) {
    let addr = free_address();
    let port = addr.port().to_string();
    let settings = authority.server_settings(issued);
    let mut settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    settings.extend(["--tls-port", &port, "--tls-auth-clients"]);
    settings.push(if mutual { "yes" } else { "no" });
    (RedisServer::start_with(&settings).await, addr)
}
