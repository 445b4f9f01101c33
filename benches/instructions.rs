//! Counts the instructions of the pieces of a call, and compares them with those in
//! `benches/instructions.txt`: a guard against changes that make calls slower, which
//! does not depend on what else a machine does. `make bench-check`; with
//! `RENEW=1`, what was counted is what counts from now on.
//!
//! callgrind counts, on a processor that valgrind makes up. Another compiler or another C
//! library count differently by some per cent: then renew before the change.

#[path = "pieces/mod.rs"]
mod pieces;

#[path = "../tests/common/mod.rs"]
mod common;
mod load;

use std::{
    collections::BTreeMap,
    env, fs,
    process::{Command, ExitCode},
};

use pieces::Piece;

const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/instructions.txt");

/// More than this, in per cent, is a change.
const TOLERANCE: f64 = 2.0;

/// Before it is counted, so that what is only done once is done.
const WARM_UP: usize = 3;

fn main() -> ExitCode {
    // cargo says `--bench`.
    let argument = env::args().skip(1).find(|word| word != "--bench");
    if let Some(name) = argument {
        let mut pieces = pieces::all().into_iter();
        let piece = pieces.find(|piece| piece.name == name);
        run(piece.expect("the name of a piece"));
        return ExitCode::SUCCESS;
    }
    let counted: BTreeMap<String, u64> = pieces::all()
        .into_iter()
        .map(|piece| (piece.name.clone(), count(&piece.name)))
        .collect();
    if env::var("RENEW").is_ok_and(|renew| !renew.is_empty()) {
        fs::write(BASELINE, table(&counted)).expect("the baseline can be written");
        println!("written to {BASELINE}");
        return ExitCode::SUCCESS;
    }
    let baseline = fs::read_to_string(BASELINE).expect("RENEW=1 makes it");
    compare(&counted, &baseline)
}

fn run(mut piece: Piece) {
    for _ in 0..WARM_UP {
        (piece.work)();
    }
    do_and_count(&mut piece);
}

/// callgrind counts what happens in here.
#[inline(never)]
fn do_and_count(piece: &mut Piece) {
    (piece.work)();
}

/// Instructions that a piece takes, in a process of its own.
fn count(name: &str) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg("--toggle-collect=*do_and_count*")
        .arg(env::current_exe().expect("the system knows what runs"))
        .arg(name)
        .output()
        .expect("valgrind is there: `make bench-check` installs it");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let collected = text
        .lines()
        .find_map(|line| line.split("Collected :").nth(1));
    let collected = collected.and_then(|count| count.trim().parse().ok());
    collected.unwrap_or_else(|| panic!("callgrind says how many: {text}"))
}

fn compiler() -> String {
    let version = Command::new("rustc").arg("--version").output();
    let version = version.expect("cargo has found it");
    String::from_utf8_lossy(&version.stdout).trim().to_owned()
}

fn table(counted: &BTreeMap<String, u64>) -> String {
    let mut text = format!(
        "# instructions by `make bench-check RENEW=1`; {}\n",
        compiler()
    );
    for (name, count) in counted {
        text += &format!("{count:>9}  {name}\n");
    }
    text
}

fn compare(counted: &BTreeMap<String, u64>, baseline: &str) -> ExitCode {
    let compiler = compiler();
    if !baseline
        .lines()
        .next()
        .is_some_and(|line| line.ends_with(&compiler))
    {
        println!("(The baseline was made with another compiler than {compiler}.)");
    }
    let before: BTreeMap<&str, u64> = baseline
        .lines()
        .filter_map(|line| line.trim().split_once("  "))
        .filter_map(|(count, name)| Some((name, count.parse().ok()?)))
        .collect();
    let mut slower = Vec::new();
    println!("| piece | instructions | before | change |\n|---|---|---|---|");
    for (name, now) in counted {
        let Some(before) = before.get(name.as_str()) else {
            println!("| {name} | {now} | | new |");
            slower.push(name);
            continue;
        };
        let change = (*now as f64 / *before as f64 - 1.0) * 100.0;
        println!("| {name} | {now} | {before} | {change:+.1} % |");
        if change > TOLERANCE {
            slower.push(name);
        }
    }
    if slower.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("\nslower or new: {slower:?}; if it is meant, `make bench-check RENEW=1`");
    ExitCode::FAILURE
}
