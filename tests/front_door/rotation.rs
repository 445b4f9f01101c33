//! Files change while the service runs: nobody notices, unless they are to.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::json;
use tonic::{
    Code,
    transport::{Certificate, ClientTlsConfig},
};

use crate::{
    Files, TOKEN, client,
    common::{
        certificates::{Ca, EXPIRES, Valid},
        http,
        service::Service,
        stalls::{self, pass},
        tool, wait_until,
    },
    size, start,
};

/// Replaces a file as careful people do.
fn replace(files: &Files, name: &str, content: &str) {
    let new = files.path("new");
    fs::write(&new, content).unwrap();
    fs::rename(new, files.path(name)).unwrap();
}

fn often() -> Vec<String> {
    vec!["--reload-interval".into(), "100ms".into()]
}

async fn metric(service: &Service, series: &str) -> Option<f64> {
    let reply = http::get(service.http_addr(), "/metrics", Duration::from_secs(2)).await;
    let body = reply.unwrap().body;
    let name = format!("alert_history_business_grouping_{series} ");
    let value = body.lines().find_map(|line| line.strip_prefix(&name))?;
    Some(value.parse().unwrap())
}

async fn failures(service: &Service, file: &str) -> f64 {
    let series = format!(r#"reload_failures_total{{file="{file}"}}"#);
    metric(service, &series).await.unwrap()
}

fn times(service: &Service, said: &str) -> usize {
    service
        .log()
        .iter()
        .filter(|line| line.contains(said))
        .count()
}

/// Waits until the service has read changed files this many times.
async fn read_again(service: &Service, count: usize) {
    wait_until(
        "changed files are used",
        Duration::from_secs(5),
        async || times(service, "changed files were read") >= count,
    )
    .await;
}

/// Waits until some more calls have succeeded.
async fn calls_go_on(service: &Service) {
    let calls = async || {
        let series = r#"storage_operations_total{operation="size",result="success"}"#;
        metric(service, series).await.unwrap()
    };
    let before = calls().await;
    wait_until("calls succeed", Duration::from_secs(30), async || {
        calls().await >= before + 100.0
    })
    .await;
}

/// A Python client that calls again and again, until its standard input ends.
fn call_on_and_on(service: &Service, files: &Files) -> Child {
    let file = |name: &str| files.path(name).display().to_string();
    let options = json!({
        "ca": file("both.pem"),
        "cert": file("client.pem"),
        "key": file("client.key"),
        "token-file": file("token"),
    });
    Command::new(tool("venv/bin/python"))
        .arg(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/front_door/knock.py"
        ))
        .arg(service.addr())
        .arg(options.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn tokens_and_certificates_rotate_under_load_without_a_failed_call() {
    let files = Files::make();
    let new_ca = Ca::new("the next CA");
    // Clients have to connect again and again.
    let age = ["--max-connection-age", "1s"].map(str::to_owned).to_vec();
    let service = start(&[files.mutual_tls(), files.tokens(), often(), age]);

    replace(
        &files,
        "both.pem",
        &format!("{}{}", files.ca.pem, new_ca.pem),
    );
    replace(&files, "token", TOKEN);
    let load: Vec<_> = (0..3).map(|_| call_on_and_on(&service, &files)).collect();
    load.iter().for_each(|client| stalls::follow(client.id()));

    calls_go_on(&service).await;

    // Old and new token, then new only.
    replace(&files, "tokens", &format!("{TOKEN}\nthe-next\n"));
    read_again(&service, 1).await;
    replace(&files, "token", "the-next");
    // Calls that took the old one along are over.
    pass(Duration::from_millis(500)).await;
    replace(&files, "tokens", "the-next\n");
    read_again(&service, 2).await;
    // Both CAs for clients, then a certificate of the new one for the server.
    replace(&files, "ca.pem", &format!("{}{}", files.ca.pem, new_ca.pem));
    read_again(&service, 3).await;
    let server = new_ca.issue(Valid::Now);
    replace(&files, "server.key", &server.key);
    replace(&files, "server.pem", &server.certificate);
    // It may have been seen while only one of the two was there.
    wait_until("the new certificate", Duration::from_secs(5), async || {
        let trusts_new_only = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&new_ca.pem))
            .identity(tonic::transport::Identity::from_pem(
                fs::read(files.path("client.pem")).unwrap(),
                fs::read(files.path("client.key")).unwrap(),
            ));
        let mut new = client(&service, Some(trusts_new_only));
        size(&mut new, "the-next").await.is_ok()
    })
    .await;
    // And time for every connection to have been opened anew.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    calls_go_on(&service).await;

    for mut load in load {
        drop(load.stdin.take());
        let output = load.wait_with_output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        let calls: usize = printed.trim().parse().expect(&printed);
        assert!(calls > 0);
    }
    let mut old = client(&service, Some(files.client_tls(Some("client"))));
    let refused = size(&mut old, "the-next").await;
    assert!(refused.is_err(), "this client trusts the old CA alone");
}

#[tokio::test]
async fn a_file_that_is_of_no_use_is_said_once_and_the_old_one_stays() {
    let files = Files::make();
    let service = start(&[files.tls(), files.tokens(), often()]);
    let client_of = || client(&service, Some(files.client_tls(None)));
    let expiry = r#"certificate_expiry_timestamp_seconds{file="tls-cert"}"#;
    assert_eq!(metric(&service, expiry).await, Some(EXPIRES));
    let other = files.ca.issue(Valid::Now);
    let mut said = 0;
    for (file, name, content, setting) in [
        ("tokens", "tokens", "", "auth-token-file"),
        ("tokens", "tokens", "# s3cret\n", "auth-token-file"),
        ("server.pem", "server", "s3cret", "tls-cert"),
        ("server.key", "server", &other.key, "tls-cert"),
    ] {
        let good = fs::read_to_string(files.path(file)).unwrap();
        let before = failures(&service, setting).await;
        replace(&files, file, content);
        // It is counted as long as it stays.
        wait_until("it is counted", Duration::from_secs(5), async || {
            failures(&service, setting).await >= before + 3.0
        })
        .await;
        said += 1;
        assert_eq!(times(&service, "changed files are of no use"), said);
        let line = service.wait_for_log(&format!(r#""setting":"{setting}""#), Duration::ZERO);
        assert!(line.contains(name) && !line.contains("s3cret"), "{line}");
        size(&mut client_of(), TOKEN).await.unwrap();
        replace(&files, file, &good);
        let mends = times(&service, "changed files were read") + 1;
        read_again(&service, mends).await;
    }
    // And one that is of use.
    replace(&files, "tokens", "the-next");
    read_again(&service, 5).await;
    size(&mut client_of(), "the-next").await.unwrap();
    let refused = size(&mut client_of(), TOKEN).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_ca_of_clients_that_is_replaced_counts_from_the_next_connection() {
    let files = Files::make();
    let service = start(&[files.mutual_tls(), often()]);
    let next = Ca::new("the next CA");
    next.issue(Valid::Now).write(files.folder(), "next");
    let visit = async |name| {
        let mut client = client(&service, Some(files.client_tls(Some(name))));
        size(&mut client, "").await
    };
    let mut connected = client(&service, Some(files.client_tls(Some("client"))));
    size(&mut connected, "").await.unwrap();
    visit("next").await.unwrap_err();

    replace(&files, "ca.pem", &next.pem);
    read_again(&service, 1).await;
    visit("next").await.unwrap();
    visit("client").await.unwrap_err();
    size(&mut connected, "").await.unwrap();
}
