//! A replica of a service that asks for TLS and a token.

use std::{fs, sync::Arc};

use groupstate::{
    manager::{
        AlertGroupManager, ManagerError, ManagerSettings,
        affinity::Instances,
        remote::{RemoteSettings, RemoteStore},
    },
    reload::Watched,
    store::{Deadline, ErrorKind, GroupStore},
};
use tempfile::TempDir;
use tonic::transport::{Certificate, ClientTlsConfig};

use crate::{
    add, alerts,
    common::{
        certificates::{Ca, Valid},
        service::Service,
    },
    firing, key,
};

/// A service in memory with TLS and the token `secret`, and the CA to believe.
fn secured() -> (Service, Ca, TempDir) {
    let folder = TempDir::new().unwrap();
    let ca = Ca::new("the CA");
    let issued = ca.issue(Valid::Now);
    let path = |name: &str, content: &str| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let service = Service::start(&[
        "--tls-cert",
        &path("cert", &issued.certificate),
        "--tls-key",
        &path("key", &issued.key),
        "--auth-token-file",
        &path("tokens", "secret\n"),
    ]);
    (service, ca, folder)
}

fn settings(ca: &Ca, token: &str) -> RemoteSettings {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca.pem));
    RemoteSettings {
        tls: Some(tls.domain_name("localhost")),
        token: Some(Watched::fixed(token.into())),
        ..RemoteSettings::default()
    }
}

#[tokio::test]
async fn a_replica_with_the_ca_and_a_token_is_served() {
    let (service, ca, _folder) = secured();
    let instances = Instances::resolve([service.addr()], settings(&ca, "secret")).await;
    let store = Arc::new(instances.unwrap());
    let manager = AlertGroupManager::new(store, ManagerSettings::default());
    add(&manager, "k", vec![firing("a")]).await;
    assert_eq!(alerts(&manager, "k").await, ["a"]);
    assert!(manager.restore().await.unwrap().complete);
}

#[tokio::test]
async fn without_a_valid_token_a_change_is_refused_at_once() {
    let (service, ca, _folder) = secured();
    let instances = Instances::resolve([service.addr()], settings(&ca, "wrong")).await;
    let store = Arc::new(instances.unwrap());
    let manager = AlertGroupManager::new(store, ManagerSettings::default());
    let refused = manager
        .add_alerts(&key("k"), Vec::new(), vec![firing("a")])
        .await;
    let Err(ManagerError::Refused { error, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    assert_eq!(manager.stats().attempts, 1);
}

#[tokio::test]
async fn a_service_of_another_ca_is_not_believed() {
    let (service, _ca, _folder) = secured();
    let other = Ca::new("another CA");
    let store = RemoteStore::at(service.addr(), settings(&other, "secret")).unwrap();
    let failure = store.load(&key("k"), false, Deadline::NONE).await;
    let error = failure.unwrap_err().error;
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("certificate"), "{error}");
}
