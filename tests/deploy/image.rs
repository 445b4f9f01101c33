//! The Dockerfile. What its steps build is tried by `make dist`.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

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

/// The images that a file names, by tag.
fn images(text: &str) -> Vec<String> {
    let named = text.lines().filter_map(|line| {
        let line = line.trim_start().trim_start_matches("- ");
        let image = line
            .strip_prefix("FROM ")
            .or_else(|| line.strip_prefix("image: "))?;
        image.split_whitespace().next()
    });
    let others = named.filter(|image| image.contains(':'));
    others.map(str::to_owned).collect()
}

/// A copy of what is pinned, and a docker that answers with this script.
fn pin_images(root: &Path, answer: &str) -> Output {
    let programs = root.join("bin");
    fs::create_dir_all(&programs).unwrap();
    let docker = programs.join("docker");
    fs::write(&docker, format!("#!/bin/sh\n{answer}\n")).unwrap();
    fs::set_permissions(&docker, fs::Permissions::from_mode(0o755)).unwrap();
    let path_variable = std::env::var("PATH").unwrap();
    Command::new(path("deploy/pin-images"))
        .arg(root)
        .env("PATH", format!("{}:{path_variable}", programs.display()))
        .output()
        .unwrap()
}

const DIGEST_OF_NAME: &str = r#"test "$1 $2 $3" = "buildx imagetools inspect" || exit 1
for name; do :; done
printf 'sha256:'; printf %s "$name" | sha256sum | cut -c1-64"#;

#[test]
fn pin_images_writes_the_digest_of_each_tag_behind_it() {
    const FILES: [&str; 3] = [
        "Dockerfile",
        "deploy/compose/compose.yaml",
        "deploy/kubernetes/overlays/development/redis.yaml",
    ];
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for file in FILES {
        fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
        fs::write(root.join(file), read(file)).unwrap();
    }
    let now = || FILES.map(|file| fs::read_to_string(root.join(file)).unwrap());
    let before = now();

    // A registry that cannot be asked, or says something else.
    for answer in ["exit 1", "echo latest"] {
        assert!(!pin_images(root, answer).status.success(), "{answer}");
        assert_eq!(now(), before, "{answer}");
    }

    let output = pin_images(root, DIGEST_OF_NAME);
    assert!(output.status.success(), "{output:?}");
    let pinned = now();
    for (before, pinned) in before.iter().zip(&pinned) {
        let (before, pinned) = (images(before), images(pinned));
        assert!(!before.is_empty());
        assert_eq!(before.len(), pinned.len());
        for (before, pinned) in before.iter().zip(&pinned) {
            let tag = before.split('@').next().unwrap();
            let digest = pinned.strip_prefix(&format!("{tag}@sha256:"));
            assert_eq!(digest.map(str::len), Some(64), "{pinned}");
        }
    }
    // Again, with the digests of another day.
    assert!(pin_images(root, DIGEST_OF_NAME).status.success());
    assert_eq!(now(), pinned);
    let other = DIGEST_OF_NAME.replace("%s", "%sx");
    assert!(pin_images(root, &other).status.success());
    let digests = |texts: &[String; 3]| {
        texts
            .iter()
            .map(|text| text.matches("@sha256:").count())
            .sum::<usize>()
    };
    assert_eq!(digests(&now()), digests(&pinned));
    assert_ne!(now(), pinned);
}

#[test]
fn what_security_md_says_can_be_done_can_be_done() {
    let security = read("SECURITY.md");
    let makefile = read("Makefile");
    let targets: Vec<_> = security.split("`make ").skip(1).collect();
    assert!(targets.len() > 3);
    for target in targets {
        let end = |c: char| !(c.is_ascii_lowercase() || c == '-');
        let target = target.split(end).next().unwrap();
        assert!(makefile.contains(&format!("\n{target}:")), "make {target}");
    }
    let version: Vec<_> = env!("CARGO_PKG_VERSION").split('.').collect();
    let supported = format!("| {}.{}.x | yes |", version[0], version[1]);
    assert!(security.contains(&supported), "{supported}");
}
