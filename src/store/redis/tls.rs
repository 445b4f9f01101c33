//! TLS towards Redis: whom to believe to be Redis, and how to show who we are.

use std::sync::Arc;

use fred::types::config::{TlsConfig, TlsConnector};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, sign::SingleCertAndKey};

use crate::{
    pem::{Authorities, Identity},
    reload::Watched,
    telemetry::{self, FileSetting},
};

/// How to connect by TLS.
#[derive(Clone)]
pub struct RedisTls {
    trust: Trust,
    /// None: we do not show who we are.
    identity: Option<Watched<Identity>>,
}

/// Whom to believe.
#[derive(Clone)]
enum Trust {
    /// Those whom the system believes.
    System(Arc<RootCertStore>),
    Authorities(Watched<Authorities>),
}

// === impl RedisTls ===

impl RedisTls {
    /// Without `authorities`, those of the system are believed.
    pub fn new(
        authorities: Option<Watched<Authorities>>,
        identity: Option<Watched<Identity>>,
    ) -> Result<Self, String> {
        let trust = match authorities {
            Some(authorities) => Trust::Authorities(authorities),
            None => Trust::System(Arc::new(of_system()?)),
        };
        Ok(Self { trust, identity })
    }

    /// Waits until a file has changed.
    pub async fn changed(&mut self) {
        let authorities = match &mut self.trust {
            Trust::System(_) => None,
            Trust::Authorities(authorities) => Some(authorities),
        };
        tokio::select! {
            () = changed(authorities) => {}
            () = changed(self.identity.as_mut()) => {}
        }
    }

    /// What is current, as fred takes it; shows when it expires.
    pub fn config(&self) -> Result<TlsConfig, String> {
        let provider = Arc::new(ring::default_provider());
        let roots = match &self.trust {
            Trust::System(roots) => roots.clone(),
            Trust::Authorities(authorities) => {
                let authorities = authorities.current();
                telemetry::certificate_expires(FileSetting::RedisCa, authorities.expires);
                authorities.roots.clone()
            }
        };
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let config = match &self.identity {
            Some(identity) => {
                let identity = identity.current();
                telemetry::certificate_expires(FileSetting::RedisCert, identity.expires);
                let identity = SingleCertAndKey::from(identity.certified(&provider)?);
                config.with_client_cert_resolver(Arc::new(identity))
            }
            None => config.with_no_client_auth(),
        };
        // A cluster names its servers by addresses or names of their own; each
        // has to be the one in its certificate.
        Ok(TlsConfig::from(TlsConnector::from(config)))
    }
}

/// Waits until a file has changed; for ever if there is none.
pub async fn changed<T: Send + Sync + 'static>(watched: Option<&mut Watched<T>>) {
    match watched {
        Some(watched) => drop(watched.changed().await),
        None => std::future::pending().await,
    }
}

fn of_system() -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    // One that cannot be read is no reason to do without the others.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        return Err("asks for TLS, but this system has no CA certificates".into());
    }
    Ok(roots)
}
