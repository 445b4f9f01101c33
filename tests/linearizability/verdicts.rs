//! The judge is judged: histories made by hand that are linearizable and must
//! pass, and such that are not and must not.
//!
//! A call is written with the moments of its begin and its end, so calls whose
//! ranges meet were made at the same time. Contents have letters, versions are
//! small numbers.

use std::ops::Range;

use groupstate::{domain::version::Version, store::Deletion};

use crate::{
    checker::check,
    history::{Act, Call, Content, Outcome, Seen, Swapped},
};

const UNKNOWN: Option<i64> = None;
const ANY: i64 = 0;
const NOTHING: i64 = 0;

fn version(number: i64) -> Version {
    Version::new(number).expect("versions begin with 1")
}

/// None for 0.
fn maybe(number: i64) -> Option<Version> {
    Version::new(number)
}

fn content(letter: char) -> Content {
    Content(letter.into())
}

fn seen(letter: char, number: i64) -> Seen {
    Seen {
        content: content(letter),
        version: version(number),
    }
}

fn outcome<T>(known: Option<T>) -> Outcome<T> {
    known.map_or(Outcome::Unknown, Outcome::Known)
}

fn call(time: Range<u64>, act: Act) -> Call {
    Call {
        begin: time.start,
        end: time.end,
        act,
    }
}

fn load(time: Range<u64>, letter: char, number: i64) -> Call {
    let found = Some(seen(letter, number));
    call(time, Act::Load { found })
}

fn load_of_nothing(time: Range<u64>) -> Call {
    call(time, Act::Load { found: None })
}

fn store(time: Range<u64>, letter: char, written: Option<i64>) -> Call {
    let act = Act::Store {
        content: content(letter),
        outcome: outcome(written.map(version)),
    };
    call(time, act)
}

/// A swap of `NOTHING` is a create.
fn swap(time: Range<u64>, letter: char, expected: i64, written: Option<i64>) -> Call {
    let act = Act::Swap {
        content: content(letter),
        expected: maybe(expected),
        outcome: outcome(written.map(version).map(Swapped::Won)),
    };
    call(time, act)
}

fn lost_swap(time: Range<u64>, letter: char, expected: i64, found: Option<Seen>) -> Call {
    let act = Act::Swap {
        content: content(letter),
        expected: maybe(expected),
        outcome: Outcome::Known(Swapped::Lost(found)),
    };
    call(time, act)
}

/// `deleted` is the version, or `NOTHING`.
fn delete(time: Range<u64>, expected: i64, deleted: Option<i64>) -> Call {
    let deletion = deleted.map(|number| Deletion {
        deleted: number != NOTHING,
        version: maybe(number),
    });
    let act = Act::Delete {
        expected: maybe(expected),
        outcome: outcome(deletion),
    };
    call(time, act)
}

fn delete_too_late(time: Range<u64>, expected: i64, found: i64) -> Call {
    let deletion = Deletion {
        deleted: false,
        version: maybe(found),
    };
    let act = Act::Delete {
        expected: maybe(expected),
        outcome: Outcome::Known(deletion),
    };
    call(time, act)
}

#[track_caller]
fn passes(calls: &[Call]) {
    if let Err(violation) = check(calls) {
        panic!("{violation}");
    }
}

#[track_caller]
fn fails(calls: &[Call]) {
    assert!(check(calls).is_err(), "it is not linearizable, and passed");
}

// === answers that are all known ===

#[test]
fn calls_one_after_the_other_pass() {
    passes(&[
        load_of_nothing(0..1),
        swap(2..3, 'a', NOTHING, Some(1)),
        lost_swap(4..5, 'b', NOTHING, Some(seen('a', 1))),
        swap(6..7, 'c', 1, Some(2)),
        load(8..9, 'c', 2),
        delete_too_late(10..11, 1, 2),
        store(12..13, 'd', Some(3)),
        delete(14..15, 3, Some(3)),
        delete(16..17, ANY, Some(NOTHING)),
        lost_swap(18..19, 'e', 3, None),
        load_of_nothing(20..21),
    ]);
}

#[test]
fn calls_at_the_same_time_may_happen_in_any_order() {
    // The load that found nothing ended last, the other one began first.
    passes(&[
        store(0..10, 'a', Some(1)),
        load(1..20, 'a', 1),
        load_of_nothing(2..30),
    ]);
    // Only this order explains it: b, then the delete, then a.
    passes(&[
        store(0..30, 'a', Some(2)),
        store(1..31, 'b', Some(1)),
        delete(2..32, 1, Some(1)),
        load(33..34, 'a', 2),
    ]);
}

#[test]
fn a_lost_update_is_found() {
    fails(&[
        store(0..1, 'a', Some(1)),
        swap(2..10, 'b', 1, Some(2)),
        swap(3..11, 'c', 1, Some(3)),
    ]);
}

#[test]
fn a_stale_read_is_found() {
    let written = [store(0..1, 'a', Some(1)), store(2..3, 'b', Some(2))];
    fails(&[&written[..], &[load(4..5, 'a', 1)]].concat());
    fails(&[&written[..], &[load_of_nothing(4..5)]].concat());
}

#[test]
fn reads_that_go_back_in_time_are_found() {
    let write = store(0..100, 'a', Some(1));
    passes(&[write.clone(), load_of_nothing(1..2), load(3..4, 'a', 1)]);
    fails(&[write, load(1..2, 'a', 1), load_of_nothing(3..4)]);
}

#[test]
fn two_creates_that_both_succeed_are_found() {
    let creates = [
        swap(0..10, 'a', NOTHING, Some(1)),
        swap(1..11, 'b', NOTHING, Some(2)),
    ];
    fails(&creates);
    // Unless somebody deleted in between.
    passes(&[&creates[..], &[delete(2..12, ANY, Some(1))]].concat());
}

#[test]
fn a_read_of_what_nobody_wrote_is_found() {
    fails(&[load(0..1, 'a', 1)]);
    let refused = lost_swap(2..3, 'b', NOTHING, Some(seen('a', 1)));
    fails(&[store(0..1, 'a', Some(1)), refused, load(4..5, 'b', 2)]);
}

#[test]
fn a_delete_that_is_undone_is_found() {
    fails(&[
        store(0..1, 'a', Some(1)),
        delete(2..3, ANY, Some(1)),
        load(4..5, 'a', 1),
    ]);
}

#[test]
fn a_delete_of_another_version_is_found() {
    let written = [store(0..1, 'a', Some(1)), store(2..3, 'b', Some(2))];
    fails(&[&written[..], &[delete(4..5, 1, Some(2))]].concat());
    // Even if it says that it deleted what it should have.
    fails(&[&written[..], &[delete(4..5, 1, Some(1))]].concat());
}

#[test]
fn a_version_that_goes_back_is_found() {
    fails(&[store(0..1, 'a', Some(2)), store(2..3, 'b', Some(1))]);
    fails(&[store(0..1, 'a', Some(2)), swap(2..3, 'b', 2, Some(1))]);
}

#[test]
fn a_version_that_comes_back_is_found() {
    fails(&[
        store(0..1, 'a', Some(1)),
        delete(2..3, ANY, Some(1)),
        store(4..5, 'b', Some(1)),
    ]);
}

#[test]
fn a_conflict_that_was_none_is_found() {
    let written = store(0..1, 'a', Some(1));
    fails(&[written.clone(), lost_swap(2..3, 'b', 1, Some(seen('a', 1)))]);
    fails(&[written.clone(), delete_too_late(2..3, 1, 1)]);
    fails(&[written, delete(2..3, ANY, Some(NOTHING))]);
    fails(&[lost_swap(0..1, 'a', NOTHING, None)]);
}

// === answers that are missing ===

#[test]
fn a_lost_write_may_show_up_at_any_time_or_never() {
    let lost = [store(0..1, 'a', Some(1)), store(2..3, 'b', UNKNOWN)];
    passes(&[&lost[..], &[load(4..5, 'a', 1), load(6..7, 'b', 2)]].concat());
    passes(&[&lost[..], &[load(4..5, 'a', 1), store(6..7, 'c', Some(2))]].concat());
}

#[test]
fn a_lost_write_happens_once() {
    let lost = [store(0..1, 'a', UNKNOWN), store(2..3, 'b', Some(2))];
    fails(&[&lost[..], &[load(4..5, 'a', 1)]].concat());
    fails(&[&lost[..], &[load(4..5, 'a', 3), delete(6..7, ANY, Some(2))]].concat());
    // Repeated under another write id, it happens twice.
    fails(&[
        store(0..10, 'a', Some(3)),
        load(2..3, 'a', 1),
        store(4..5, 'b', Some(2)),
    ]);
}

#[test]
fn a_lost_write_does_not_happen_before_it_is_made() {
    fails(&[load(0..1, 'a', 1), store(2..3, 'a', UNKNOWN)]);
}

#[test]
fn a_lost_swap_keeps_its_condition() {
    let written = [store(0..1, 'a', Some(1)), store(2..3, 'b', Some(2))];
    let lost = |expected| swap(4..5, 'c', expected, UNKNOWN);
    let read = load(6..7, 'c', 3);
    passes(&[&written[..], &[lost(2), read.clone()]].concat());
    fails(&[&written[..], &[lost(1), read.clone()]].concat());
    fails(&[&written[..], &[lost(NOTHING), read]].concat());
}

#[test]
fn a_lost_swap_that_happened_was_not_refused() {
    let written = store(0..1, 'a', Some(1));
    let refused = lost_swap(2..9, 'b', 1, Some(seen('c', 3)));
    let next = swap(5..6, 'c', 2, Some(3));
    fails(&[written, refused, load(3..4, 'b', 2), next]);
}

#[test]
fn a_lost_delete_may_happen_at_any_time_but_once() {
    let lost = [store(0..1, 'a', Some(1)), delete(2..3, ANY, None)];
    let still_there = load(4..5, 'a', 1);
    passes(&[&lost[..], &[still_there.clone(), load_of_nothing(6..7)]].concat());
    passes(
        &[
            &lost[..],
            &[store(4..5, 'b', Some(2)), load_of_nothing(6..7)],
        ]
        .concat(),
    );
    fails(&[&lost[..], &[load_of_nothing(4..5), still_there_again(6..7)]].concat());
    let written_again = [
        load_of_nothing(4..5),
        store(6..7, 'b', Some(2)),
        load_of_nothing(8..9),
    ];
    fails(&[&lost[..], &written_again].concat());
}

fn still_there_again(time: Range<u64>) -> Call {
    load(time, 'a', 1)
}

#[test]
fn a_lost_delete_of_a_version_deletes_no_other() {
    let lost = [store(0..1, 'a', Some(1)), delete(2..3, 1, None)];
    passes(&[&lost[..], &[load_of_nothing(4..5)]].concat());
    fails(
        &[
            &lost[..],
            &[store(4..5, 'b', Some(2)), load_of_nothing(6..7)],
        ]
        .concat(),
    );
}

#[test]
fn a_delete_may_meet_a_write_that_nobody_has_read() {
    let lost = [
        store(0..1, 'a', Some(1)),
        store(2..3, 'b', UNKNOWN),
        delete(4..5, 1, UNKNOWN),
    ];
    passes(
        &[
            &lost[..],
            &[delete_too_late(6..7, 1, 2), delete(8..9, 2, Some(2))],
        ]
        .concat(),
    );
    // Who swaps the version that the delete told of meets it as well.
    passes(
        &[
            &lost[..],
            &[delete_too_late(6..7, 1, 2), swap(8..9, 'c', 2, Some(3))],
        ]
        .concat(),
    );
    // One lost write is not two versions.
    fails(
        &[
            &lost[..],
            &[delete_too_late(6..7, 1, 2), delete(8..9, ANY, Some(3))],
        ]
        .concat(),
    );
    // A lost create does not replace anything: but the lost delete came first.
    let created = [
        store(0..1, 'a', Some(1)),
        swap(2..3, 'b', NOTHING, UNKNOWN),
        delete(4..5, ANY, Some(2)),
    ];
    fails(&created);
    passes(&[&created[..], &[delete(0..2, 1, UNKNOWN)]].concat());
}

#[test]
fn lost_writes_that_nobody_has_read_do_not_slow_the_search() {
    let mut calls = Vec::new();
    for round in 0..400 {
        let at = 100 * round;
        let letter = |n: u32| char::from_u32(0x4e00 + round as u32 * 8 + n).unwrap();
        calls.push(store(at..at + 1, letter(0), UNKNOWN));
        calls.push(swap(at + 2..at + 3, letter(1), NOTHING, UNKNOWN));
        calls.push(delete(at + 4..at + 5, ANY, UNKNOWN));
        let version = 2 * round as i64 + 2;
        for n in 0..4 {
            let begin = at + 10 + u64::from(n);
            let number = version.saturating_mul(8) + i64::from(n);
            calls.push(store(begin..begin + 50, letter(2 + n), Some(number)));
        }
        if round % 2 == 0 {
            calls.push(load_of_nothing(at + 90..at + 91));
        }
    }
    passes(&calls);
}
