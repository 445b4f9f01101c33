//! What the log event of a call costs that is not written: what surrounds every
//! call is done without the call, in each of the ways in which the log can be set.
//!
//! ```text
//! cargo bench --bench call_event                                              # off and on
//! cargo bench --bench call_event --features tracing/release_max_level_info    # not there at all
//! ```
//!
//! Each way runs in a process of its own, which counts nanoseconds. Instructions
//! are counted by valgrind, of two numbers of calls, so that the start cancels out:
//! `valgrind --tool=callgrind target/release/deps/call_event-… info 100000`.

use std::{
    env,
    hint::black_box,
    process::{Command, Stdio},
    time::Instant,
};

use groupstate::{
    grpc::admission::call::CallContext,
    store::Backend,
    telemetry::{self, CallResult, LogFormat, LogLevel},
};
use http::Request;
use tokio_util::task::TaskTracker;

const CALLS: usize = 1_000_000;
/// The best of them counts: whatever else runs only makes it slower.
const ROUNDS: usize = 10;

fn main() {
    // cargo says `--bench`.
    let mut arguments = env::args().skip(1).filter(|word| word != "--bench");
    let Some(level) = arguments.next() else {
        for level in ["info", "debug"] {
            run_apart(level);
        }
        return;
    };
    let level = LogLevel::ALL.into_iter().find(|each| each.name() == level);
    telemetry::init(level.expect("a level of the log"), LogFormat::Json);
    telemetry::metrics();
    if let Some(calls) = arguments.next() {
        return run(calls.parse().expect("a number of calls"));
    }
    let nanoseconds = (0..ROUNDS).map(|_| {
        let begin = Instant::now();
        run(CALLS / ROUNDS);
        begin.elapsed().as_nanos() / (CALLS / ROUNDS) as u128
    });
    println!("{} ns a call", nanoseconds.min().unwrap_or_default());
}

/// Runs with this level in a process whose log goes nowhere.
fn run_apart(level: &str) {
    let itself = env::current_exe().expect("the system knows what runs");
    let run = Command::new(itself)
        .arg(level)
        .stderr(Stdio::null())
        .output()
        .expect("what runs can run again");
    print!(
        "log level {level}: {}",
        String::from_utf8_lossy(&run.stdout)
    );
}

fn run(calls: usize) {
    let in_flight = TaskTracker::new();
    let request = Request::post("/groupstate.v1.GroupStateService/Load")
        .header("grpc-timeout", "1S")
        .header("x-request-id", "0123456789abcdef")
        .header(
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        )
        .body(())
        .expect("well-formed");
    let key = "alertname=HighCPU,cluster=prod".to_owned();
    for _ in 0..calls {
        let context = CallContext::of(black_box(&request), in_flight.token());
        context.concerns(|| Some(&key));
        context.succeeds(CallResult::Success, Backend::Redis);
    }
}
