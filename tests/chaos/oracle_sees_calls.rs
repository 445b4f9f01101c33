//! The oracle on histories made by hand: it sees calls that are slow or fail,
//! faults that are not noticed or not over in time, and unwell instances.

use tonic::Code;

use super::{
    evidence::{InstanceRecord, Sample, Stall},
    history::{
        Backend::{Memory, Redis},
        Request,
    },
    schedule::Policy::Reconcile,
    story::{Story, millis},
};
use crate::common::faults::Fault;

#[test]
fn a_call_over_its_bound_is_slow_but_for_what_the_machine_stood_still() {
    let story = |took: u64, deadline: Option<u64>| {
        let mut story = Story::new(Reconcile).stored(Redis, 10).ends_with(Some(10));
        let call = &mut story.evidence.calls[0];
        call.end = call.begin + millis(took);
        call.deadline = deadline.map(millis);
        story
    };
    story(1_100, None).holds();
    story(1_200, None).has(&["slow"]);
    story(400, Some(300)).holds();
    story(500, Some(300)).has(&["slow"]);
    let mut stalled = story(1_200, None);
    stalled.evidence.stalls.push(Stall {
        begin: millis(500),
        end: millis(600),
    });
    stalled.holds();
}

#[test]
fn no_failure_but_an_unknown_outcome_or_a_missed_deadline_is_allowed() {
    let story = |code, reason| Story::new(Reconcile).failed(10, code, reason);
    story(Code::Aborted, "OUTCOME_UNKNOWN").holds();
    story(Code::Unavailable, "UNAVAILABLE").has(&["refused"]);
    story(Code::Internal, "INTERNAL").has(&["refused"]);
    story(Code::ResourceExhausted, "MEMORY_FULL").has(&["refused"]);
    story(Code::DeadlineExceeded, "DEADLINE_EXCEEDED").has(&["refused"]);
    let mut late = story(Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    late.evidence.calls[0].deadline = Some(millis(300));
    late.holds();
    // A Load has no outcome that could be unknown.
    let mut load = story(Code::Aborted, "OUTCOME_UNKNOWN");
    load.evidence.calls[0].request = Request::Load;
    load.has(&["refused"]);
}

#[test]
fn memory_answers_only_while_the_switch_is_open_but_for_loads_in_a_hurry() {
    let story = |deadline| {
        let mut story = Story::new(Reconcile)
            .stored(Redis, 10)
            .opens()
            .loaded(Memory, Some(10))
            .closes(0)
            .loaded(Memory, Some(10))
            .ends_with(Some(10));
        story.evidence.calls.last_mut().unwrap().deadline = deadline;
        story
    };
    story(None).has(&["memory while closed"]);
    story(Some(millis(300))).holds();
}

// === faults and instances ===

/// A fault of two seconds, noticed 100 ms after its beginning or not, and the
/// first answer of Redis after its end.
fn outage(fault: Fault, length: u64, noticed: bool, back_after: u64) -> Story {
    let story = Story::new(Reconcile)
        .stored(Redis, 10)
        .fault(fault, length, false);
    let story = if noticed {
        let mut story = story.opens().loaded(Memory, Some(10));
        story.now = story.evidence.faults[0].writable;
        story.closes(0)
    } else {
        story.wait(length)
    };
    let passed = story.now - story.evidence.faults[0].writable;
    let left = millis(back_after).saturating_sub(passed);
    let mut story = story.ends_with(Some(10));
    story.now += left;
    story.loaded(Redis, Some(10))
}

#[test]
fn a_fault_must_be_noticed_and_redis_used_again_within_two_seconds() {
    outage(Fault::Hang, 2_000, true, 1_500).holds();
    outage(Fault::Hang, 2_000, true, 2_500).has(&["late return"]);
    outage(Fault::Hang, 2_000, false, 100).has(&["not noticed"]);
    outage(Fault::Reset, 0, false, 100).holds();
}

#[test]
fn a_short_stall_must_not_open_the_switch() {
    outage(Fault::Hang, 200, false, 100).holds();
    let mut opened = outage(Fault::Hang, 200, true, 1_000);
    opened.evidence.faults[0].writable += millis(200);
    opened.has(&["overreaction"]);
    // One that was open already, by an earlier fault, was not opened by this one.
    Story::new(Reconcile)
        .stored(Redis, 10)
        .opens()
        .fault(Fault::Hang, 200, false)
        .loaded(Memory, Some(10))
        .closes(0)
        .loaded(Redis, Some(10))
        .ends_with(Some(10))
        .holds();
}

#[test]
fn an_instance_must_not_crash_grow_or_stay_degraded_or_slow() {
    let story = |change: fn(&mut InstanceRecord)| {
        let mut story = Story::new(Reconcile);
        change(&mut story.evidence.instances[0]);
        story
    };
    story(|record| record.crashes.push("panicked".into())).has(&["crashed"]);
    story(|record| record.worse.push("Load".into())).has(&["worse"]);
    story(|record| record.unsettled = Some("open".into())).has(&["unsettled"]);
    story(|record| record.probe_faults.push("/readyz: 503".into())).has(&["probe"]);
    story(|record| record.peak_resident_bytes = 66 << 20).has(&["memory grew"]);
    story(|record| {
        record.samples.push(Sample {
            mirror_bytes: 2 << 20,
            ..Sample::default()
        });
    })
    .has(&["mirror grew"]);
}
