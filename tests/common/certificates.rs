//! Certificates made for a test: a CA, and what it signs.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    date_time_ymd,
};

/// A CA that nobody knows but who is given its certificate.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate.
    pub pem: String,
}

/// A certificate for this machine, as a server or a client, and its key.
pub struct Issued {
    pub certificate: String,
    pub key: String,
}

/// The time in which a certificate is valid.
#[derive(Clone, Copy)]
pub enum Valid {
    Now,
    /// No longer.
    Once,
    /// For so long, in whole seconds.
    For(Duration),
}

/// When certificates that are valid now expire: the beginning of 2096.
pub const EXPIRES: f64 = 3_976_214_400.0;

// === impl Ca ===

impl Ca {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = params(name, Valid::Now);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            pem,
        }
    }

    pub fn issue(&self, valid: Valid) -> Issued {
        self.sign(params("groupstate", valid))
    }

    /// A certificate for another machine, and its key.
    pub fn issue_for(&self, host: &str) -> Issued {
        let mut params = params("groupstate", Valid::Now);
        params.subject_alt_names = vec![SanType::DnsName(host.try_into().unwrap())];
        self.sign(params)
    }

    fn sign(&self, params: CertificateParams) -> Issued {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer);
        Issued {
            certificate: certificate.unwrap().pem(),
            key: key.serialize_pem(),
        }
    }

    /// Writes its certificate into a folder.
    pub fn write(&self, folder: &Path, name: &str) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, &self.pem).unwrap();
        path
    }
}

fn params(name: &str, valid: Valid) -> CertificateParams {
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = match valid {
        Valid::Now => date_time_ymd(2096, 1, 1),
        Valid::Once => date_time_ymd(2021, 1, 1),
        Valid::For(time) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            date_time_ymd(1970, 1, 1) + now + time
        }
    };
    params
}

// === impl Issued ===

impl Issued {
    /// Writes both into a folder, as `NAME.pem` and `NAME.key`.
    pub fn write(&self, folder: &Path, name: &str) -> (PathBuf, PathBuf) {
        let certificate = folder.join(format!("{name}.pem"));
        let key = folder.join(format!("{name}.key"));
        fs::write(&certificate, &self.certificate).unwrap();
        fs::write(&key, &self.key).unwrap();
        (certificate, key)
    }
}
