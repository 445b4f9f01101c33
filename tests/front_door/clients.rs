//! What clients see of the front door: grpcurl and Python. The table in the
//! README shows it, and the log says why.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    Files, TOKEN,
    common::{
        certificates::{Ca, Valid},
        service::Service,
        tool,
    },
    start,
};

/// One client at the door, and what becomes of it.
struct Visit<'a> {
    what: &'a str,
    /// The settings of the service.
    service: &'a [Vec<String>],
    /// As `knock.py` takes them; grpcurl gets the same.
    options: Value,
    /// What it prints contains this.
    grpcurl: &'a str,
    /// None: it is not tried.
    python: Option<&'a str>,
    /// None: nothing new.
    log: Option<&'a str>,
}

/// As much of it as a check needs.
const HEALTH_PROTO: &str = r#"
syntax = "proto3";
package grpc.health.v1;
message HealthCheckRequest { string service = 1; }
message HealthCheckResponse { int32 status = 1; }
service Health { rpc Check(HealthCheckRequest) returns (HealthCheckResponse); }
"#;

#[test]
fn what_each_client_sees_is_what_the_readme_shows() {
    let files = Files::make();
    let folder = files.folder();
    let file = |name: &str| files.path(name).display().to_string();
    let foreign = Ca::new("a foreign CA");
    foreign.write(folder, "foreign-ca.pem");
    foreign.issue(Valid::Now).write(folder, "foreign");
    files.ca.issue(Valid::Once).write(folder, "expired");
    let expired = [
        "--tls-cert",
        &file("expired.pem"),
        "--tls-key",
        &file("expired.key"),
    ];

    std::fs::write(file("health.proto"), HEALTH_PROTO).unwrap();

    let plain = [];
    let tls = [files.tls(), files.tokens()];
    let mutual = [files.mutual_tls()];
    let expired = [expired.map(str::to_owned).to_vec()];

    let ca = file("ca.pem");
    let showing = |name: &str| json!({"ca": ca, "cert": file(&format!("{name}.pem")), "key": file(&format!("{name}.key"))});
    let visits = [
        Visit {
            what: "a valid token",
            service: &tls,
            options: json!({"ca": ca, "token": TOKEN}),
            grpcurl: "OK",
            python: Some("OK"),
            log: None,
        },
        Visit {
            what: "health without a token",
            service: &tls,
            options: json!({"ca": ca, "call": "Health", "protos": folder}),
            grpcurl: "OK",
            python: Some("OK"),
            log: None,
        },
        Visit {
            what: "no token",
            service: &tls,
            options: json!({"ca": ca}),
            grpcurl: "Code: Unauthenticated",
            python: Some(
                "UNAUTHENTICATED: no token: send the header `authorization: Bearer TOKEN`",
            ),
            log: Some("no token: send the header"),
        },
        Visit {
            what: "a wrong token",
            service: &tls,
            options: json!({"ca": ca, "token": "s3cret"}),
            grpcurl: "Code: Unauthenticated",
            python: Some("UNAUTHENTICATED: the token is not a valid one"),
            log: Some("the token is not a valid one"),
        },
        Visit {
            what: "reflection without a token",
            service: &tls,
            options: json!({"ca": ca, "call": "Reflection"}),
            grpcurl: "Failed to list services: rpc error: code = Unauthenticated",
            python: None,
            log: Some("no token: send the header"),
        },
        Visit {
            what: "the server's certificate is of a CA that the client does not know",
            service: &tls,
            options: json!({"ca": file("foreign-ca.pem")}),
            grpcurl: "x509: certificate signed by unknown authority",
            python: Some(
                "UNAVAILABLE: … CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
            ),
            log: Some("the client does not accept the certificate of this server"),
        },
        Visit {
            what: "the server's certificate has expired",
            service: &expired,
            options: json!({"ca": ca}),
            grpcurl: "x509: certificate has expired or is not yet valid",
            python: Some("UNAVAILABLE: … CERTIFICATE_VERIFY_FAILED: certificate has expired"),
            log: Some("the client does not accept the certificate of this server"),
        },
        Visit {
            what: "a client certificate",
            service: &mutual,
            options: showing("client"),
            grpcurl: "OK",
            python: Some("OK"),
            log: None,
        },
        Visit {
            what: "no client certificate",
            service: &mutual,
            options: json!({"ca": ca}),
            grpcurl: "Failed to dial target host",
            python: Some("UNAVAILABLE: failed to connect to all addresses"),
            log: Some("the client shows no certificate, as --tls-client-ca asks"),
        },
        Visit {
            what: "a client certificate of a foreign CA",
            service: &mutual,
            options: showing("foreign"),
            grpcurl: "Failed to dial target host",
            python: Some("UNAVAILABLE: failed to connect to all addresses"),
            log: Some("the client's certificate is not of a CA of --tls-client-ca"),
        },
        Visit {
            what: "an expired client certificate",
            service: &mutual,
            options: showing("expired"),
            grpcurl: "Failed to dial target host",
            python: Some("UNAVAILABLE: failed to connect to all addresses"),
            log: Some("the client's certificate has expired"),
        },
        Visit {
            what: "plain text on the TLS port",
            service: &tls,
            options: json!({}),
            grpcurl: "Failed to dial target host",
            python: Some("UNAVAILABLE: failed to connect to all addresses"),
            log: Some("the client does not speak TLS"),
        },
        Visit {
            what: "TLS on the plain-text port",
            service: &plain,
            options: json!({"ca": ca}),
            grpcurl: "Failed to dial target host",
            python: Some("UNAVAILABLE: failed to connect to all addresses"),
            log: Some("the client speaks TLS, and this port does not"),
        },
    ];
    let readme =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    for visit in visits {
        // One of its own: a client that tries again must not write into another's log.
        let service = start(visit.service);
        let lines_before = service.log().len();
        let begin = Instant::now();
        assert_seen(
            visit.what,
            &grpcurl(&service, &visit.options),
            visit.grpcurl,
        );
        if let Some(expected) = visit.python {
            // A line of the log is written at most once in a second, and grpcurl may
            // be refused for another reason: of a foreign CA it shows no certificate.
            std::thread::sleep(Duration::from_millis(1_100));
            assert_seen(visit.what, &python(&service, &visit.options), expected);
        }
        let log = service.log()[lines_before..].join("\n");
        match visit.log {
            Some(said) => {
                assert!(log.contains(said), "{}: {log}", visit.what);
                assert!(log.contains(r#""peer":"127.0.0.1:"#), "{log}");
                let seconds = begin.elapsed().as_secs() as usize;
                assert!(log.lines().count() <= 1 + seconds, "{log}");
            }
            None => assert_eq!(log, "", "{}", visit.what),
        }
        for secret in ["s3cret", TOKEN] {
            assert!(!log.contains(secret), "{log}");
        }
        let row = format!(
            "| {} | {} | {} | {} |",
            visit.what,
            cell(Some(visit.grpcurl)),
            cell(visit.python),
            cell(visit.log),
        );
        assert!(readme.contains(&row), "README.md does not show\n{row}");
    }
}

/// Whether a client has printed this; `…` stands for anything.
fn assert_seen(what: &str, printed: &str, expected: &str) {
    if expected == "OK" {
        return assert_eq!(printed, expected, "{what}");
    }
    // With TLS 1.3 a client learns too late that its certificate is refused, and
    // mostly tries again until its time is over. Now and then it ends at once.
    if expected == "context deadline exceeded"
        && ["broken pipe", "connection reset"]
            .iter()
            .any(|end| printed.contains(end))
    {
        return;
    }
    let mut rest = printed;
    for part in expected.split(" … ") {
        let at = rest.find(part);
        let at = at.unwrap_or_else(|| panic!("{what}: {printed} does not say {part}"));
        rest = &rest[at + part.len()..];
    }
}

fn cell(text: Option<&str>) -> String {
    match text {
        None => String::new(),
        Some("OK") => "OK".into(),
        Some(text) => format!("`{}`", text.replace('`', "")),
    }
}

fn grpcurl(service: &Service, options: &Value) -> String {
    let mut command = Command::new(tool("bin/grpcurl"));
    command.args(["-connect-timeout", "2", "-max-time", "10"]);
    match options["ca"].as_str() {
        Some(ca) => command.args(["-cacert", ca]),
        None => command.arg("-plaintext"),
    };
    for name in ["cert", "key"] {
        if let Some(file) = options[name].as_str() {
            command.args([&format!("-{name}"), file]);
        }
    }
    if let Some(token) = options["token"].as_str() {
        command.args(["-H", &format!("authorization: Bearer {token}")]);
    }
    let root = env!("CARGO_MANIFEST_DIR");
    match options["call"].as_str() {
        Some("Health") => {
            // Reflection, which would tell of it, is closed.
            let protos = options["protos"].as_str().unwrap();
            command.args(["-import-path", protos, "-proto", "health.proto"]);
            command.args([service.addr(), "grpc.health.v1.Health/Check"])
        }
        Some(_) => command.arg(service.addr()).arg("list"),
        None => command
            .args(["-import-path", &format!("{root}/proto")])
            .args(["-proto", "groupstate/v1/group_state.proto"])
            .arg(service.addr())
            .arg("groupstate.v1.GroupStateService/Size"),
    };
    let output = command.output().unwrap();
    if output.status.success() {
        return "OK".into();
    }
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

fn python(service: &Service, options: &Value) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/front_door/knock.py");
    let output = Command::new(tool("venv/bin/python"))
        .arg(script)
        .arg(service.addr())
        .arg(options.to_string())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
