//! Certificates and CAs as they are read from PEM files.

use std::sync::Arc;

use tokio_rustls::rustls::{
    self, RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use x509_cert::{Certificate, der::Decode};

/// A certificate with its chain, and its key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// When the first certificate of the chain expires, in seconds of the Unix epoch.
    pub expires: i64,
}

/// The CAs that are trusted.
pub struct Authorities {
    pub roots: Arc<RootCertStore>,
    /// When the last of them expires, in seconds of the Unix epoch: a file may hold
    /// old ones beside new ones.
    pub expires: i64,
}

// === impl Identity ===

impl Identity {
    /// Reads the contents of two PEM files, the certificate and the key. The error
    /// does not repeat what was read.
    pub fn parse(contents: &[Vec<u8>]) -> Result<Self, String> {
        let [certificate, key] = contents else {
            return Err("a certificate and a key are needed".into());
        };
        let chain = certificates(certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| "the key file holds no private key in PEM")?;
        let expires = chain.iter().map(expires).min();
        let identity = Self {
            chain,
            key,
            expires: expires.unwrap_or(Err("no certificate".into()))?,
        };
        identity.certified(&ring::default_provider())?;
        Ok(identity)
    }

    /// As rustls takes it.
    pub fn certified(&self, provider: &CryptoProvider) -> Result<CertifiedKey, String> {
        let key = self.key.clone_key();
        CertifiedKey::from_der(self.chain.clone(), key, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => "the key is not that of the certificate".into(),
            error => error.to_string(),
        })
    }
}

// === impl Authorities ===

impl Authorities {
    /// Reads the content of one PEM file.
    pub fn parse(contents: &[Vec<u8>]) -> Result<Self, String> {
        let certificates = certificates(&contents.concat())?;
        let expires = certificates.iter().map(expires).max();
        let mut roots = RootCertStore::empty();
        for certificate in certificates {
            roots.add(certificate).map_err(|error| error.to_string())?;
        }
        Ok(Self {
            roots: Arc::new(roots),
            expires: expires.unwrap_or(Err("no certificate".into()))?,
        })
    }
}

/// All certificates of a PEM file, at least one.
fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|_| "is not well-formed PEM")?;
    if certificates.is_empty() {
        return Err("holds no certificate in PEM".into());
    }
    Ok(certificates)
}

fn expires(certificate: &CertificateDer<'_>) -> Result<i64, String> {
    let parsed = Certificate::from_der(certificate)
        .map_err(|_| "holds a certificate that cannot be read".to_owned())?;
    let end = parsed.tbs_certificate().validity().not_after;
    i64::try_from(end.to_unix_duration().as_secs()).map_err(|error| error.to_string())
}
