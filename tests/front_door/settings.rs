//! Settings that make no sense, or files that do not: one line, and exit code 2.

use std::{fs, process::Command};

use groupstate::config::Settings;

use crate::{
    Files,
    common::certificates::{Ca, Valid},
};

#[test]
fn what_makes_no_sense_is_one_line_that_says_why() {
    let files = Files::make();
    let file = |name: &str| files.path(name).display().to_string();
    Ca::new("x")
        .issue(Valid::Now)
        .write(files.folder(), "other");
    fs::write(file("empty"), "").unwrap();
    fs::write(file("text"), "this is s3cret\n").unwrap();
    fs::write(file("comments"), "# s3cret\n\n").unwrap();
    let tls = |certificate: &str, key: &str| {
        ["--tls-cert", &file(certificate), "--tls-key", &file(key)].map(str::to_owned)
    };
    let tokens = |name: &str| ["--auth-token-file".to_owned(), file(name)];
    let client_ca = |name: &str| {
        let tls = tls("server.pem", "server.key").to_vec();
        [tls, vec!["--tls-client-ca".into(), file(name)]].concat()
    };
    for (arguments, said) in [
        (tls("server.pem", "server.key")[..2].to_vec(), "--tls-key"),
        (tls("server.pem", "server.key")[2..].to_vec(), "--tls-cert"),
        (client_ca("ca.pem")[4..].to_vec(), "--tls-cert"),
        (tls("server.pem", "absent").to_vec(), "absent: No such file"),
        (tls("absent", "server.key").to_vec(), "absent: No such file"),
        (tls("empty", "server.key").to_vec(), "empty: is empty"),
        (
            tls("text", "server.key").to_vec(),
            "holds no certificate in PEM",
        ),
        (
            tls("server.pem", "text").to_vec(),
            "holds no private key in PEM",
        ),
        (
            tls("server.key", "server.pem").to_vec(),
            "holds no certificate in PEM",
        ),
        (
            tls("server.pem", "other.key").to_vec(),
            "the key is not that of the certificate",
        ),
        (client_ca("empty"), "--tls-client-ca"),
        (client_ca("text"), "holds no certificate in PEM"),
        (tokens("absent").to_vec(), "absent: No such file"),
        (tokens("comments").to_vec(), "holds no token"),
        (tokens("text").to_vec(), "line 1: a token holds no spaces"),
    ] {
        let program = std::iter::once("groupstate".to_owned());
        let (text, code) = Settings::read(program.chain(arguments)).unwrap_err();
        assert_eq!((text.lines().count(), code), (1, 2), "{text}");
        assert!(text.starts_with("error: ") && text.contains(said), "{text}");
        assert!(!text.contains("s3cret"), "{text}");
    }
}

#[test]
fn the_program_says_it_and_ends() {
    let files = Files::make();
    let output = Command::new(env!("CARGO_BIN_EXE_groupstate"))
        .args(&files.tls()[..2])
        .env_clear()
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        said,
        "error: the following required arguments were not provided: --tls-key <FILE>\n"
    );
}
