//! `deploy/` and the Dockerfile are checked rather than believed: by the tools
//! that read such files, by the schemas of Kubernetes and Compose, and by a real
//! Prometheus that watches a real service through an outage of Redis.

#[path = "../common/mod.rs"]
mod common;

mod compose;
mod dashboard;
mod image;
mod kubernetes;
mod prometheus;
mod promql;
mod rules;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use common::tool;
use serde_json::Value;

/// What every metric of ours begins with.
const PREFIX: &str = "alert_history_business_grouping_";

/// What to do about a program that is missing.
const INSTALL: &str = "run `make tools`";

/// A file of this repository.
fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The documents of a YAML text. Python reads it: no crate for YAML is both
/// complete and looked after.
fn yaml(text: &str) -> Vec<Value> {
    const READ: &str = "import json, sys, yaml\n\
                        json.dump(list(yaml.safe_load_all(open(sys.argv[1]))), sys.stdout)";
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    let mut command = Command::new(tool("venv/bin/python"));
    let output = run(command.args(["-c", READ]).arg(file.path()));
    serde_json::from_str(&output).unwrap()
}

/// Runs a program that must succeed; returns what it wrote to standard output.
fn run(command: &mut Command) -> String {
    let (succeeded, stdout, stderr) = outcome(command, INSTALL);
    assert!(succeeded, "{command:?}\n{stdout}{stderr}");
    stdout
}

/// Whether a program has succeeded, and what it wrote to standard output and
/// standard error; `install` is what to do if it is missing.
fn outcome(command: &mut Command, install: &str) -> (bool, String, String) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}; {install}"));
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.success(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// The items of a JSON array; none if there is no such thing.
fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
}

/// The command line that says the same as these environment variables.
fn flags(variables: &Value) -> Vec<String> {
    let variables = variables.as_object().expect("a map of variables");
    let flag = |(name, value): (&String, &Value)| {
        let name = name.strip_prefix("GROUPSTATE_").expect("a setting of ours");
        let name = name.to_lowercase().replace('_', "-");
        format!("--{name}={}", text(value))
    };
    variables.iter().map(flag).collect()
}
