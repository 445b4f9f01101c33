//! TLS of the gRPC port: the configuration that is made of certificates, and what a failed
//! handshake means.

use std::{io, sync::Arc};

use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, CertificateError, ServerConfig,
        crypto::ring,
        server::{NoServerSessionStorage, WebPkiClientVerifier},
        sign::SingleCertAndKey,
    },
};

use crate::{
    pem::{Authorities, Identity},
    reload::Watched,
    telemetry::{self, AuthenticationFailure, FileSetting},
};

/// How the server speaks TLS now.
pub struct ServerTls {
    identity: Watched<Identity>,
    /// None: clients need no certificate.
    client_ca: Option<Watched<Authorities>>,
    config: Arc<ServerConfig>,
}

/// The protocol of gRPC, as it is agreed on in a handshake.
const ALPN: &[u8] = b"h2";

// === impl ServerTls ===

impl ServerTls {
    pub fn new(
        identity: Watched<Identity>,
        client_ca: Option<Watched<Authorities>>,
    ) -> Result<Self, String> {
        let config = config(&identity, client_ca.as_ref())?;
        Ok(Self {
            identity,
            client_ca,
            config,
        })
    }

    /// For handshakes that begin now.
    pub fn acceptor(&self) -> TlsAcceptor {
        self.config.clone().into()
    }

    /// Waits until certificates have changed, and takes them. Connections that
    /// there are stay.
    pub async fn renew(&mut self) {
        let client_ca = async {
            match &mut self.client_ca {
                Some(client_ca) => drop(client_ca.changed().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.identity.changed() => {}
            () = client_ca => {}
        }
        match config(&self.identity, self.client_ca.as_ref()) {
            // With a new store of sessions.
            Ok(config) => self.config = config,
            // Each was found good when it was read.
            Err(error) => tracing::error!(error, "new certificates cannot be used"),
        }
    }
}

/// What is current as a configuration; shows when it expires.
fn config(
    identity: &Watched<Identity>,
    client_ca: Option<&Watched<Authorities>>,
) -> Result<Arc<ServerConfig>, String> {
    let provider = Arc::new(ring::default_provider());
    let identity = identity.current();
    let certified = identity.certified(&provider)?;
    telemetry::certificate_expires(FileSetting::TlsCert, identity.expires);
    let config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let config = match client_ca {
        None => config.with_no_client_auth(),
        Some(client_ca) => {
            let client_ca = client_ca.current();
            telemetry::certificate_expires(FileSetting::TlsClientCa, client_ca.expires);
            let verifier =
                WebPkiClientVerifier::builder_with_provider(client_ca.roots.clone(), provider)
                    .build()
                    .map_err(|error| error.to_string())?;
            config.with_client_cert_verifier(verifier)
        }
    };
    let mut config = config.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    if client_ca.is_some() {
        // A session that is resumed shows no certificate: one that has expired would be good
        // for as long as its owner resumes.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(Arc::new(config))
}

/// What a failed handshake counts as, if its client did not show who it is.
pub fn authentication_failure(error: &io::Error) -> Option<AuthenticationFailure> {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner? {
        rustls::Error::NoCertificatesPresented => Some(AuthenticationFailure::NoCertificate),
        rustls::Error::InvalidCertificate(_) => Some(AuthenticationFailure::BadCertificate),
        _ => None,
    }
}

/// What a failed handshake means, for who reads the log.
pub fn handshake_failure(error: &io::Error) -> String {
    use CertificateError::{Expired, ExpiredContext, UnknownIssuer};
    use rustls::Error::{
        AlertReceived, InvalidCertificate, InvalidMessage, NoCertificatesPresented,
    };

    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    let meaning = match inner {
        Some(InvalidMessage(_)) => "the client does not speak TLS",
        Some(NoCertificatesPresented) => "the client shows no certificate, as --tls-client-ca asks",
        Some(InvalidCertificate(UnknownIssuer)) => {
            "the client's certificate is not of a CA of --tls-client-ca"
        }
        Some(InvalidCertificate(Expired | ExpiredContext { .. })) => {
            "the client's certificate has expired"
        }
        Some(AlertReceived(_)) => "the client does not accept the certificate of this server",
        _ => return error.to_string(),
    };
    format!("{meaning}: {error}")
}
