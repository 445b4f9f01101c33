//! Clients that resume their TLS sessions, as most do by themselves.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, HandshakeKind, RootCertStore, SupportedProtocolVersion,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
        version::{TLS12, TLS13},
    },
};

use crate::{
    Files,
    common::{certificates::Valid, service::Service},
    start,
    wire::{PREFACE, SETTINGS, frame},
};

/// A client with the certificate of this name, which keeps what it needs to resume.
fn client(
    files: &Files,
    version: &'static SupportedProtocolVersion,
    identity: Option<&str>,
) -> Arc<ClientConfig> {
    let read = |name: String| std::fs::read(files.path(&name)).unwrap();
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(&read("ca.pem".into())).unwrap();
    roots.add(ca).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let mut client = match identity {
        None => client.with_no_client_auth(),
        Some(name) => {
            let certificate = CertificateDer::from_pem_slice(&read(format!("{name}.pem")));
            let key = PrivateKeyDer::from_pem_slice(&read(format!("{name}.key")));
            client
                .with_client_auth_cert(vec![certificate.unwrap()], key.unwrap())
                .unwrap()
        }
    };
    client.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(client)
}

/// Connects and waits for the first frame: by then the client is let in. Says whether it
/// was by an earlier session.
async fn connect(service: &Service, client: &Arc<ClientConfig>) -> io::Result<HandshakeKind> {
    let tcp = TcpStream::connect(service.addr()).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut tls = TlsConnector::from(client.clone())
        .connect(name, tcp)
        .await?;
    tls.write_all(PREFACE).await?;
    tls.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
    tls.flush().await?;
    tls.read_exact(&mut [0; 9]).await?;
    Ok(tls.get_ref().1.handshake_kind().unwrap())
}

#[tokio::test]
async fn without_client_certificates_sessions_are_resumed() {
    let files = Files::make();
    let service = start(&[files.tls()]);
    for version in [&TLS12, &TLS13] {
        let client = client(&files, version, None);
        let first = connect(&service, &client).await.unwrap();
        assert_ne!(first, HandshakeKind::Resumed);
        let second = connect(&service, &client).await.unwrap();
        assert_eq!(second, HandshakeKind::Resumed, "{version:?}");
    }
}

/// A session that is resumed shows no certificate.
#[tokio::test]
async fn an_expired_certificate_lets_nobody_in_by_an_earlier_session() {
    let files = Files::make();
    let service = start(&[files.mutual_tls()]);
    for version in [&TLS12, &TLS13] {
        let begin = Instant::now();
        let short = files.ca.issue(Valid::For(Duration::from_secs(4)));
        short.write(files.folder(), "short");
        let client = client(&files, version, Some("short"));
        let mut connected = 0;
        while let Ok(handshake) = connect(&service, &client).await {
            assert_ne!(handshake, HandshakeKind::Resumed, "{version:?}");
            connected += 1;
            assert!(
                begin.elapsed() < Duration::from_secs(30),
                "it is let in for ever"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(connected > 1, "as long as its certificate was valid");
        let said = "the client's certificate has expired";
        service.wait_for_log(said, Duration::from_secs(2));
    }
}
