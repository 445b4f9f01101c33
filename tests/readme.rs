//! The README tells the truth: its commands run word for word and answer what
//! it shows, its tables name what the program has, its ACL line is enough.
//!
//! A block of commands is marked by how it is run: `sh test` one after the other
//! in one shell, `sh example` in a copy of what the examples need, `sh rust example`
//! where it lies.

mod common;

use std::{
    env, fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use clap::CommandFactory;
use common::{
    examples::Examples, redis_cluster::RedisCluster, redis_server::RedisServer, service::Service,
    tool,
};
use groupstate::{
    config::Settings,
    grpc::{
        DESCRIPTORS,
        proto::{self as pb, ErrorReason},
    },
};
use prost::Message;

const ADDRESS_IN_README: &str = "localhost:50051";

/// A block of commands and what the README shows as their output.
struct Example {
    commands: String,
    shown: Option<String>,
}

/// What the commands of an [`Example`] did.
struct Outcome {
    output: String,
    succeeded: bool,
}

/// Makes the output of two runs comparable: white space and what differs from
/// run to run are taken out. Versions and write ids become numbers in the order
/// in which they appear, so that equal ones stay equal.
#[derive(Default)]
struct Comparable {
    seen: Vec<String>,
}

// === impl Comparable ===

impl Comparable {
    fn of(&mut self, output: &str) -> String {
        let pieces: Vec<String> = output.split('"').map(|piece| self.piece(piece)).collect();
        let text = pieces.join("\"");
        text.split_whitespace().collect()
    }

    /// What stands between two quotation marks.
    fn piece(&mut self, piece: &str) -> String {
        let is_version = piece.len() == 16 && piece.bytes().all(|c| c.is_ascii_digit());
        let is_time = piece.ends_with('Z') && piece.as_bytes().get(10) == Some(&b'T');
        let is_write_id = piece.split_once('-').is_some_and(|(instance, _)| {
            instance.len() == 12 && instance.bytes().all(|c| c.is_ascii_hexdigit())
        });
        if is_time {
            return "TIME".into();
        }
        if !is_version && !is_write_id {
            return piece.into();
        }
        let known = self.seen.iter().position(|seen| seen == piece);
        let number = known.unwrap_or_else(|| {
            self.seen.push(piece.into());
            self.seen.len() - 1
        });
        format!("UNIQUE-{number}")
    }
}

// === the tests ===

#[test]
fn the_commands_answer_what_the_readme_shows() {
    let service = Service::start(&[]);
    let examples = examples(&readme());
    assert!(examples.len() >= 6, "only {} examples", examples.len());

    let (mut shown_forms, mut actual_forms) = (Comparable::default(), Comparable::default());
    for (example, outcome) in examples.iter().zip(run(&examples, service.addr())) {
        let commands = &example.commands;
        let Some(shown) = &example.shown else {
            assert!(outcome.succeeded, "{commands}\n{}", outcome.output);
            continue;
        };
        assert_eq!(
            shown_forms.of(shown),
            actual_forms.of(&outcome.output),
            "{commands}\nanswers\n{}",
            outcome.output
        );
        let shows_success = !shown.starts_with("ERROR:");
        assert_eq!(outcome.succeeded, shows_success, "{commands}");
    }
}

#[tokio::test]
async fn the_commands_answer_the_same_on_redis() {
    let redis = RedisServer::start().await;
    let service = Service::start(&["--redis-url", &redis.url()]);
    let examples = examples(&readme());

    let (mut shown_forms, mut actual_forms) = (Comparable::default(), Comparable::default());
    for (example, outcome) in examples.iter().zip(run(&examples, service.addr())) {
        let Some(shown) = &example.shown else {
            continue;
        };
        let shown_on_redis = shown
            .replace("BACKEND_MEMORY", "BACKEND_REDIS")
            .replace(r#""authoritative":"false","#, "")
            .replace(r#""backend":"memory""#, r#""backend":"redis""#);
        assert_eq!(
            shown_forms.of(&shown_on_redis),
            actual_forms.of(&outcome.output),
            "{}",
            example.commands
        );
    }
}

#[test]
fn the_examples_in_other_languages_print_what_the_readme_shows() {
    let service = Service::start(&[]);
    let copy = Examples::copy();
    let blocks = blocks(&readme(), "```sh example");
    assert_eq!(blocks.len(), 2, "Python and Go");
    for Example { commands, shown } in blocks {
        assert!(commands.contains(ADDRESS_IN_README));
        let script = commands.replace(ADDRESS_IN_README, service.addr());
        let mut bash = copy.command("bash", ".");
        let output = bash.args(["-ec", &script]).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{commands}\n{errors}");
        let shown = shown.expect("each is shown with its output");
        assert!(text(&output).ends_with(&shown), "{}", text(&output));
    }
}

#[test]
fn the_rust_example_prints_what_the_readme_shows() {
    let service = Service::start(&[]);
    let blocks = blocks(&readme(), "```sh rust example");
    let [Example { commands, shown }] = &blocks[..] else {
        panic!("{} blocks", blocks.len());
    };
    assert!(commands.contains(ADDRESS_IN_README));
    let output = Command::new("bash")
        .args(["-ec", &commands.replace(ADDRESS_IN_README, service.addr())])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{commands}\n{errors}");
    assert_eq!(Some(text(&output)), *shown);
}

#[test]
fn the_code_it_shows_is_in_the_files_it_names() {
    let trimmed = |text: &str| text.lines().map(str::trim).collect::<Vec<_>>().join("\n");
    let readme = readme();
    let mut lines = readme.lines();
    let mut shown = 0;
    while let Some(line) = lines.next() {
        let Some((_, file)) = line
            .strip_prefix("```")
            .and_then(|line| line.split_once(' '))
        else {
            continue;
        };
        let code = block(&mut lines);
        if file.starts_with("examples/") {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
            let text = fs::read_to_string(path).unwrap();
            assert!(trimmed(&text).contains(&trimmed(&code)), "{file}\n{code}");
            shown += 1;
        }
    }
    assert_eq!(shown, 3, "Rust, Python and Go");
}

#[test]
fn make_run_prints_lines_of_the_readme() {
    let output = Command::new("make")
        .args(["--no-print-directory", "next-step"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        // Those of the `make` that runs this test, if any.
        .env_remove("MAKEFLAGS")
        .output()
        .expect("make is there: install make");
    let printed = text(&output);
    let examples = examples(&readme());
    for example in &examples[..2] {
        assert!(printed.contains(&example.commands), "{printed}");
    }
    assert!(!printed.contains(&examples[2].commands), "{printed}");
}

#[test]
fn every_setting_is_in_the_table() {
    let readme = readme();
    let (_, section) = readme.split_once("\n## Settings\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let is_row = |line: &&str| line.starts_with("| `--");
    let actual: Vec<&str> = section.lines().filter(is_row).collect();
    let expected = settings();
    assert!(
        actual == expected,
        "the table of settings in README.md must be:\n\n{}\n",
        expected.join("\n")
    );
}

#[test]
fn every_call_and_every_reason_is_in_a_table() {
    let readme = readme();
    let first_of_row = |name: &str| readme.contains(&format!("\n| `{name}` |"));

    let files = prost_types::FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    let services = files.file.iter().flat_map(|file| &file.service);
    let calls: Vec<&str> = services
        .flat_map(|service| &service.method)
        .map(|call| call.name())
        .collect();
    assert_eq!(calls.len(), 8);
    for call in calls {
        assert!(first_of_row(call), "{call}");
    }

    let reasons = (1..).map_while(|number| ErrorReason::try_from(number).ok());
    for reason in reasons {
        let name = reason.as_str_name().trim_start_matches("ERROR_REASON_");
        assert!(first_of_row(name), "{name}");
    }
}

/// They are named as `suite::file::test`.
#[test]
fn the_tests_that_hold_the_guarantees_exist() {
    let readme = readme();
    let section = readme.split("\n## What is guaranteed").nth(1).unwrap();
    let section = section.split("\n### ").next().unwrap();
    let named = section
        .split('`')
        .filter(|piece| piece.matches("::").count() == 2);
    let mut count = 0;
    for named in named.filter(|named| !named.starts_with("suite")) {
        let [suite, file, test] = named.split("::").collect::<Vec<_>>()[..] else {
            unreachable!("it has two separators")
        };
        let path = format!("{}/tests/{suite}/{file}.rs", env!("CARGO_MANIFEST_DIR"));
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(text.contains(&format!("fn {test}(")), "{named}");
        count += 1;
    }
    assert!(count > 15, "{count}");
}

#[test]
fn the_files_that_are_linked_to_exist() {
    let readme = readme();
    let targets = readme
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|target| !target.starts_with("http"));
    for target in targets {
        match target.strip_prefix('#') {
            Some(anchor) => {
                let mut headings = readme.lines().filter(|line| line.starts_with('#'));
                assert!(headings.any(|heading| slug(heading) == anchor), "{target}");
            }
            None => {
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(target);
                assert!(path.exists(), "{target}");
            }
        }
    }
}

#[tokio::test]
async fn the_acl_line_is_enough_for_every_call() {
    let redis = RedisServer::start().await;
    makes_every_call_under_the_acl_line(&redis.url(), &[&redis]).await;
}

#[tokio::test]
async fn the_acl_line_is_enough_for_every_call_on_a_cluster() {
    let cluster = RedisCluster::start().await;
    let nodes: Vec<_> = cluster.primaries.iter().collect();
    makes_every_call_under_the_acl_line(&cluster.url(), &nodes).await;
}

/// All servers of all tests know the service by this line.
#[test]
fn the_acl_lines_are_those_of_the_files() {
    for file in ["groupstate.acl", "sentinel.acl"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("deploy/redis")
            .join(file);
        let line = fs::read_to_string(path).unwrap();
        assert!(readme().contains(&format!("\n{line}```\n")), "{line}");
    }
}

async fn makes_every_call_under_the_acl_line(url: &str, nodes: &[&RedisServer]) {
    let service = Service::start(&["--redis-url", url]);

    let mut client = service.client().await;
    let group = |key: &str| pb::AlertGroup {
        key: key.into(),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let stored = client
        .store(pb::StoreRequest {
            group: Some(group("a")),
            expiry: None,
        })
        .await
        .unwrap();
    assert_eq!(stored.get_ref().backend(), pb::Backend::Redis);
    let swap = client
        .compare_and_swap(pb::CompareAndSwapRequest {
            group: Some(group("a")),
            expected_version: 1,
            expiry: Some(pb::compare_and_swap_request::Expiry::KeepTtl(true)),
        })
        .await
        .unwrap();
    assert!(!swap.get_ref().swapped);
    let stored = client
        .store_all(pb::StoreAllRequest {
            groups: vec![group("a"), group("b")],
            expiry: Some(pb::store_all_request::Expiry::KeepTtl(true)),
        })
        .await
        .unwrap();
    assert!(stored.get_ref().results.iter().all(|r| r.error.is_none()));
    for include_expire_time in [false, true] {
        let request = pb::LoadRequest {
            key: "a".into(),
            include_expire_time,
        };
        client.load(request).await.unwrap();
    }
    let keys = client
        .list_keys(pb::ListKeysRequest::default())
        .await
        .unwrap();
    assert_eq!(keys.get_ref().keys.len(), 2);
    let size = client.size(pb::SizeRequest::default()).await.unwrap();
    assert_eq!(size.get_ref().count, 2);
    let mut all = client
        .load_all(pb::LoadAllRequest::default())
        .await
        .unwrap()
        .into_inner();
    let mut summary = None;
    while let Some(message) = all.message().await.unwrap() {
        summary = message.summary;
    }
    assert_eq!(summary.unwrap().groups, 2);
    let request = pb::DeleteRequest {
        key: "a".into(),
        expected_version: None,
    };
    assert!(client.delete(request).await.unwrap().get_ref().deleted);

    // What was refused would be in here.
    for node in nodes {
        let refused: Vec<redis::Value> = redis::cmd("ACL")
            .arg("LOG")
            .query_async(&mut node.connect().await)
            .await
            .unwrap();
        assert!(refused.is_empty(), "{refused:?}");
    }
}

// === helpers ===

fn readme() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    fs::read_to_string(path).unwrap()
}

/// The blocks marked `sh test`.
fn examples(readme: &str) -> Vec<Example> {
    blocks(readme, "```sh test")
}

/// The blocks that begin so. An output block, if any, follows with nothing but
/// blank lines in between.
fn blocks(readme: &str, first_line: &str) -> Vec<Example> {
    let mut examples = Vec::new();
    let mut lines = readme.lines().peekable();
    while let Some(line) = lines.next() {
        if line != first_line {
            continue;
        }
        let commands = block(&mut lines);
        while lines.next_if(|line| line.is_empty()).is_some() {}
        let shown = lines
            .next_if(|line| ["```json", "```text"].contains(line))
            .map(|_| block(&mut lines));
        examples.push(Example { commands, shown });
    }
    examples
}

/// The lines up to the end of a block.
fn block<'a>(lines: &mut impl Iterator<Item = &'a str>) -> String {
    let lines = lines.take_while(|line| *line != "```");
    lines.map(|line| format!("{line}\n")).collect()
}

/// Runs all commands in one shell, since later ones use variables of earlier
/// ones. Only the address differs from the README.
fn run(examples: &[Example], addr: &str) -> Vec<Outcome> {
    const END: &str = "--- end of example:";

    let mut script = "exec 2>&1\n".to_owned();
    for example in examples {
        assert!(example.commands.contains(ADDRESS_IN_README));
        script.push_str(&example.commands.replace(ADDRESS_IN_README, addr));
        script.push_str(&format!("echo '{END}' $?\n"));
    }
    let tools = tool("bin/grpcurl").parent().unwrap().to_owned();
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([tools].into_iter().chain(env::split_paths(&path))).unwrap();
    let output = Command::new("bash")
        .args(["-c", &script])
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .expect("bash is there: install bash");

    let mut outcomes = Vec::new();
    let mut output_so_far = String::new();
    for line in text(&output).lines() {
        match line.strip_prefix(END) {
            Some(status) => outcomes.push(Outcome {
                output: std::mem::take(&mut output_so_far),
                succeeded: status.trim() == "0",
            }),
            None => output_so_far.push_str(&format!("{line}\n")),
        }
    }
    assert_eq!(outcomes.len(), examples.len(), "{}", text(&output));
    outcomes
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The rows of the table of settings, from what `--help` is made of.
fn settings() -> Vec<String> {
    let command = Settings::command();
    let shown = command.get_arguments().filter(|flag| !flag.is_hide_set());
    shown
        .map(|flag| {
            let name = flag.get_long().expect("every setting is a flag");
            let value: String = flag
                .get_value_names()
                .iter()
                .flat_map(|names| names.iter())
                .map(|name| format!(" {name}"))
                .collect();
            let env = flag.get_env().expect("every setting has a variable");
            let default: Vec<String> = flag
                .get_default_values()
                .iter()
                .map(|value| format!("`{}`", value.display()))
                .collect();
            let help = flag.get_long_help().or(flag.get_help()).unwrap();
            let mut help = help.to_string().replace('\n', " ").replace('|', "\\|");
            let values = flag.get_possible_values();
            if !values.is_empty() {
                let values: Vec<&str> = values.iter().map(|value| value.get_name()).collect();
                help.push_str(&format!(" ({})", values.join(", ")));
            }
            format!(
                "| `--{name}{value}` | `{}` | {} | {help} |",
                env.display(),
                default.join(" ")
            )
        })
        .collect()
}

/// The anchor that a heading gets.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}
