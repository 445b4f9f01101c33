//! The Dockerfile. What its steps build is tried by `make dist`.

use std::{process::Command, time::Duration};

use groupstate::{config::Settings, server::longest_stop};

use crate::{common::tool, path, read, run};

#[test]
fn hadolint_finds_nothing_wrong() {
    run(Command::new(tool("venv/bin/hadolint")).arg(path("Dockerfile")));
}

#[test]
fn the_image_has_no_root_and_no_shell_and_says_what_it_is() {
    let dockerfile = read("Dockerfile");
    let stages: Vec<&str> = dockerfile.split("\nFROM ").collect();
    let image = stages.last().unwrap();
    assert!(image.starts_with("gcr.io/distroless/"), "{image}");
    assert!(!image.contains("\nRUN "), "{image}");
    assert!(image.contains("\nUSER 65532:65532\n"), "{image}");
    for label in ["title", "description", "licenses", "version", "revision"] {
        let label = format!("org.opencontainers.image.{label}=");
        assert!(image.contains(&label), "{label}");
    }
}

/// Otherwise each change of the code compiles a hundred crates again.
#[test]
fn the_dependencies_are_a_layer_that_the_code_does_not_outdate() {
    let dockerfile = read("Dockerfile");
    let manifest = dockerfile.find("COPY Cargo.toml Cargo.lock ./").unwrap();
    let dependencies = dockerfile.find("cargo build").unwrap();
    let code = dockerfile.find("COPY src src").unwrap();
    assert!(manifest < dependencies && dependencies < code);
}

/// Whoever follows a page must not kill what only the memory of an instance holds.
#[test]
fn docker_waits_longer_than_a_stop_may_take() {
    const STOP: &str = "docker stop";
    let settings = Settings::read(["groupstate"]).unwrap();
    let longest = longest_stop(&settings);
    let files = run(Command::new("git")
        .args(["-C", &path("").display().to_string()])
        .args([
            "grep",
            "-lF",
            STOP,
            "--",
            "*.md",
            "*.yaml",
            "deploy",
            "Dockerfile",
        ]));
    let mut found = 0;
    for file in files.lines() {
        for rest in read(file).split(STOP).skip(1) {
            let seconds = rest.strip_prefix(" -t ").unwrap_or_default();
            let seconds = seconds.split(|c: char| !c.is_ascii_digit()).next();
            let seconds = seconds.and_then(|seconds| seconds.parse().ok());
            let waits = seconds.map(Duration::from_secs);
            assert!(waits > Some(longest), "{file}: {STOP}{rest:.20}");
            found += 1;
        }
    }
    assert!(found > 0);
    let said = format!("That is {} s at most by default", longest.as_secs());
    assert!(read("README.md").contains(&said), "README.md: {said}");
}
