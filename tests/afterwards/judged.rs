//! What counts as worse, on conditions made by hand; and that a bound in time is a bound.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::common::{
    Process,
    condition::{Condition, Needs, Rpc, Times},
    stalls::{Bound, stalled},
};

fn millis(millis: u64) -> Times {
    let time = Duration::from_millis(millis);
    Times {
        median: time,
        quarter: time,
    }
}

fn well() -> Condition {
    Condition {
        rpcs: Rpc::ALL.map(|rpc| (rpc, millis(2))).into(),
        way: millis(1),
        stalled: 0.0,
        needs: Needs {
            cpu: 0.01,
            resident_bytes: 10 << 20,
            threads: 5,
            tasks: 12,
            descriptors: 20,
            connections: vec![4],
            log_lines: 0,
        },
    }
}

/// How many things are worse after a change.
fn worse(change: impl Fn(&mut Condition)) -> usize {
    let mut now = well();
    change(&mut now);
    let worse = now.worse_than(&well());
    println!("{worse:?}");
    worse.len()
}

#[test]
fn an_rpc_that_waits_for_the_next_ping_is_worse_and_some_noise_is_not() {
    let load = |time: Times, stalled: f64| {
        worse(|now| {
            now.rpcs.insert(Rpc::Load, time);
            now.stalled = stalled;
        })
    };
    assert_eq!(load(millis(2), 0.0), 0);
    assert_eq!(load(millis(20), 0.0), 0);
    assert_eq!(load(millis(130), 0.0), 2);
    // On a busy machine, too.
    assert_eq!(load(millis(60), 0.6), 0);
    assert_eq!(load(millis(135), 0.8), 2);
    // One connection of two.
    let quarter = Duration::from_millis(130);
    assert_eq!(
        load(
            Times {
                quarter,
                ..millis(2)
            },
            0.0
        ),
        1
    );
}

#[test]
fn an_instance_that_takes_more_or_has_fewer_connections_is_worse() {
    assert_eq!(worse(|_| {}), 0);
    assert_eq!(worse(|now| now.needs.cpu = 0.5), 1);
    assert_eq!(worse(|now| now.needs.resident_bytes = 50 << 20), 1);
    assert_eq!(worse(|now| now.needs.threads = 50), 1);
    assert_eq!(worse(|now| now.needs.tasks = 15), 1);
    assert_eq!(worse(|now| now.needs.descriptors = 21), 1);
    assert_eq!(worse(|now| now.needs.connections = vec![5]), 1);
    assert_eq!(worse(|now| now.needs.connections = vec![3]), 1);
    assert_eq!(worse(|now| now.needs.connections = vec![4, 0]), 1);
    assert_eq!(worse(|now| now.needs.log_lines = 1), 1);
}

/// But for the time that the machine has kept it from running.
#[tokio::test]
async fn a_bound_is_over_in_its_time_for_who_only_waits() {
    let (begin, before) = (Instant::now(), stalled());
    let bound = Bound::of(Duration::from_millis(200));
    while !bound.is_over() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (passed, stalled) = (begin.elapsed(), stalled() - before);
    assert!(
        passed < Duration::from_millis(300) + 2 * stalled,
        "{passed:?}, {stalled:?}"
    );
}

#[tokio::test]
async fn a_bound_waits_for_who_gets_no_processor() {
    let spin = || {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        Process::spawn(command.stdin(Stdio::null()), "sh is part of every system")
    };
    let processors = std::thread::available_parallelism().unwrap().get();
    let before = stalled();
    let bound = Bound::of(Duration::from_millis(200));
    let _spinning: Vec<Process> = (0..4 * processors).map(|_| spin()).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let stalled = stalled() - before;
    assert!(stalled > Duration::from_millis(250), "{stalled:?}");
    // But not for ever.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(bound.is_over(), "{bound:?}");
}
