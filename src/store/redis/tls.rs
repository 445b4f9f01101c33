//! TLS towards Redis: whom to believe to be Redis, and how to show who we are.

use std::sync::Arc;

use fred::types::config::{TlsConfig, TlsConnector};
use tokio_rustls::rustls::{
    ClientConfig, Error, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::{CertifiedKey, SingleCertAndKey},
};

/// The authorities whose certificates are believed.
pub struct Trust(RootCertStore);

/// A certificate, those that it is based on, and its private key.
pub struct Identity(CertifiedKey);

/// What a setting may say of TLS.
#[derive(Default)]
pub struct ClientTls {
    /// None: the authorities that the system believes.
    pub trust: Option<Trust>,
    /// None: we do not show who we are.
    pub identity: Option<Identity>,
}

// === impl Trust ===

impl Trust {
    /// From certificates in PEM.
    pub fn from_pem(pem: &[u8]) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(pem)? {
            let added = roots.add(certificate);
            added.map_err(|error| format!("holds a certificate of no authority: {error}"))?;
        }
        Ok(Self(roots))
    }

    /// The authorities that the system believes.
    fn of_system() -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        // One that cannot be read is no reason to do without the others.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err("asks for TLS, but this system has no CA certificates".into());
        }
        Ok(Self(roots))
    }
}

// === impl Identity ===

impl Identity {
    /// From a certificate, followed by those that it is based on, and its private
    /// key, both in PEM.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, String> {
        let chain = certificates(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| "the file of the key holds no private key in PEM")?;
        let identity = CertifiedKey::from_der(chain, key, &ring::default_provider());
        let identity = identity.map_err(|error| match error {
            Error::InconsistentKeys(_) => "the key is not that of the certificate".into(),
            error => error.to_string(),
        })?;
        Ok(Self(identity))
    }
}

// === impl ClientTls ===

impl ClientTls {
    /// Whether there is anything.
    pub fn is_set(&self) -> bool {
        self.trust.is_some() || self.identity.is_some()
    }

    /// How to connect.
    pub fn config(self) -> Result<TlsConfig, String> {
        let Trust(roots) = self.trust.map_or_else(Trust::of_system, Ok)?;
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let config = match self.identity {
            Some(Identity(identity)) => {
                config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity)))
            }
            None => config.with_no_client_auth(),
        };
        // A cluster names its servers by addresses or names of their own; each
        // has to be the one in its certificate.
        Ok(TlsConfig::from(TlsConnector::from(config)))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err("holds no certificate in PEM".into()),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(format!("cannot be read as PEM: {error}")),
    }
}
