//! The Dockerfile. What its steps build is tried by `make dist`.

use std::process::Command;

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
