//! Who is let in and how much of it: TLS, tokens, the files they come from, the
//! limits on connections and requests, and clients that mean harm.

#[path = "../common/mod.rs"]
mod common;

mod abuse;
mod clients;
mod failures;
mod limits;
mod random;
mod resumption;
mod rotation;
mod settings;
mod wire;

use std::path::{Path, PathBuf};

use common::{
    certificates::{Ca, Valid},
    service::{Client, Service},
};
use groupstate::grpc::proto as pb;
use tempfile::TempDir;
use tonic::{
    Request, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

/// A folder with what a server and its clients need; the files have the names of the
/// settings.
pub struct Files {
    folder: TempDir,
    pub ca: Ca,
}

/// A token that the files hold.
pub const TOKEN: &str = "correct-horse-battery-staple";

// === impl Files ===

impl Files {
    pub fn make() -> Self {
        let folder = TempDir::new().unwrap();
        let ca = Ca::new("the CA");
        ca.write(folder.path(), "ca.pem");
        ca.issue(Valid::Now).write(folder.path(), "server");
        ca.issue(Valid::Now).write(folder.path(), "client");
        let tokens = format!("# of the tests\nanother-token\n{TOKEN} # the one they use\n");
        std::fs::write(folder.path().join("tokens"), tokens).unwrap();
        Self { folder, ca }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The settings of TLS.
    pub fn tls(&self) -> Vec<String> {
        let file = |name| self.path(name).display().to_string();
        [
            "--tls-cert",
            &file("server.pem"),
            "--tls-key",
            &file("server.key"),
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// The settings of mutual TLS.
    pub fn mutual_tls(&self) -> Vec<String> {
        let ca = self.path("ca.pem").display().to_string();
        [self.tls(), vec!["--tls-client-ca".into(), ca]].concat()
    }

    /// The setting of tokens.
    pub fn tokens(&self) -> Vec<String> {
        let tokens = self.path("tokens").display().to_string();
        vec!["--auth-token-file".into(), tokens]
    }

    /// How a client trusts the CA, and shows the certificate of this name.
    pub fn client_tls(&self, name: Option<&str>) -> ClientTlsConfig {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.ca.pem));
        let read = |file: String| std::fs::read(self.path(&file)).unwrap();
        match name {
            None => tls,
            Some(name) => tls.identity(Identity::from_pem(
                read(format!("{name}.pem")),
                read(format!("{name}.key")),
            )),
        }
    }
}

pub fn start(settings: &[Vec<String>]) -> Service {
    let settings = settings.concat();
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    Service::start(&settings)
}

/// A client that connects when it is first used, and again when it has to.
pub fn client(service: &Service, tls: Option<ClientTlsConfig>) -> Client {
    Client::new(channel(service, tls))
}

pub fn channel(service: &Service, tls: Option<ClientTlsConfig>) -> Channel {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let endpoint = Endpoint::from_shared(format!("{scheme}://{}", service.addr())).unwrap();
    match tls {
        Some(tls) => endpoint.tls_config(tls).unwrap().connect_lazy(),
        None => endpoint.connect_lazy(),
    }
}

/// A message with a token.
pub fn with_token<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    request
}

pub async fn size(client: &mut Client, token: &str) -> Result<i64, Status> {
    let reply = client.size(with_token(token, pb::SizeRequest::default()));
    Ok(reply.await?.into_inner().count)
}
