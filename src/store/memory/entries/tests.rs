use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn key(name: &str) -> GroupKey {
    GroupKey::new(name).unwrap()
}

fn version(version: i64) -> Version {
    Version::new(version).unwrap()
}

fn shown(n: i64, left: Option<Duration>) -> Shown {
    Shown::Document {
        json: Bytes::from_static(b"{}"),
        version: version(n),
        left,
        ours: None,
    }
}

/// The same, of a write of ours.
fn written(n: i64, left: Option<Duration>) -> Shown {
    match shown(n, left) {
        Shown::Document {
            json,
            version,
            left,
            ..
        } => Shown::Document {
            json,
            version,
            left,
            ours: Some(Ours::new(None)),
        },
        other => other,
    }
}

fn document(n: i64) -> (Bytes, Version) {
    (Bytes::from_static(b"{}"), version(n))
}

fn entries(max_bytes: usize) -> (Entries, Instant) {
    let now = Instant::now();
    (Entries::new(max_bytes, false, now), now)
}

/// Takes in what Redis shows, in as many steps as it takes.
fn learn(entries: &mut Entries, key: &GroupKey, mut shown: Shown, ticket: Ticket, now: Instant) {
    while let Err(again) = entries.learn(key, shown, ticket, now) {
        shown = again;
    }
}

/// Removes all that has expired or was dropped.
fn sweep(entries: &mut Entries, now: Instant) {
    while entries.sweep(now) == Err(NotYet) {}
}

fn len(entries: &Entries) -> usize {
    entries.groups() + entries.traces()
}

fn version_at(entries: &Entries, name: &str, now: Instant) -> Option<i64> {
    entries.get(name, now).map(|entry| entry.version.get())
}

/// Groups are deleted and made anew by writers whose versions begin again.
#[test]
fn of_two_answers_the_later_counts_and_of_calls_that_overlapped_the_newer_version() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(&mut entries, &key("k"), shown(32, None), ticket, now);
    learn(&mut entries, &key("k"), shown(16, None), ticket, now);
    assert_eq!(version_at(&entries, "k", now), Some(32));
    let now = now + SECOND;
    let ticket = entries.ticket(now);
    learn(&mut entries, &key("k"), shown(1, None), ticket, now);
    assert_eq!(version_at(&entries, "k", now), Some(1));
    learn(&mut entries, &key("k"), shown(32, None), ticket, now);
    entries.begin_epoch(vec![]);
    let late = ticket;
    let ticket = entries.ticket(now);
    learn(&mut entries, &key("k"), shown(16, None), ticket, now);
    assert_eq!(
        version_at(&entries, "k", now),
        Some(16),
        "in a new epoch the first answer counts"
    );
    // An answer of the epoch before.
    learn(&mut entries, &key("k"), shown(8, None), late, now);
    learn(&mut entries, &key("k"), Shown::Absent, late, now + SECOND);
    assert_eq!(version_at(&entries, "k", now), Some(16));
    learn(&mut entries, &key("k"), shown(48, None), late, now);
    assert_eq!(version_at(&entries, "k", now), Some(48));
}

#[test]
fn an_answer_of_a_server_that_has_lost_its_data_is_unsure() {
    let (mut entries, now) = entries(1 << 20);
    let late = entries.ticket(now);
    entries.begin_epoch(vec![Loss::ALL]);
    learn(&mut entries, &key("k"), written(16, None), late, now);
    assert!(entries.is_pending(&key("k"), now));
}

/// Another instance may have put back an older one by then.
#[test]
fn what_redis_may_have_lost_is_not_replaced_by_less_before_it_was_offered() {
    let (mut entries, now) = entries(1 << 20);
    let before = entries.ticket(now);
    learn(&mut entries, &key("k"), written(32, None), before, now);
    entries.begin_epoch(vec![Loss {
        last_heard: Some(version(50)),
        ..Loss::ALL
    }]);
    let ticket = entries.ticket(now + SECOND);
    learn(&mut entries, &key("k"), shown(16, None), ticket, now);
    learn(&mut entries, &key("k"), Shown::Absent, ticket, now);
    assert_eq!(version_at(&entries, "k", now), Some(32));
    // One that came after the loss may have been written without it.
    learn(&mut entries, &key("k"), shown(64, None), ticket, now);
    assert_eq!(version_at(&entries, "k", now), Some(32));
    assert!(entries.is_pending(&key("k"), now));
    // One that came before has survived, and has replaced it.
    learn(&mut entries, &key("k"), shown(48, None), ticket, now);
    assert_eq!(version_at(&entries, "k", now), Some(48));
    assert!(!entries.is_pending(&key("k"), now));
}

#[test]
fn what_was_told_to_a_server_that_has_lost_data_since_is_told_again() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(&mut entries, &key("k"), written(16, None), ticket, now);
    entries.begin_epoch(vec![Loss::ALL]);
    for holds in [true, false] {
        let told = entries.ticket(now);
        entries.begin_epoch(vec![Loss::ALL]);
        entries.offered(&key("k"), version(16), holds, told, now);
        assert!(entries.is_pending(&key("k"), now));
    }
}

/// While the answer was under way to a call that was sent before.
#[test]
fn what_was_put_back_contradicts_an_answer_of_the_epoch_before() {
    let (mut entries, now) = entries(1 << 20);
    let before = entries.ticket(now);
    learn(&mut entries, &key("k"), written(32, None), before, now);
    entries.begin_epoch(vec![Loss::ALL]);
    let later = now + SECOND;
    let ticket = entries.ticket(now);
    entries.offered(&key("k"), version(32), true, ticket, later);
    assert!(entries.contradicts(&key("k"), None, before, later));
    assert!(!entries.contradicts(&key("k"), None, ticket, later));
}

#[test]
fn a_late_answer_does_not_bring_back_what_was_deleted() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(&mut entries, &key("k"), shown(16, None), ticket, now);
    learn(
        &mut entries,
        &key("k"),
        Shown::deleted(version(16)),
        ticket,
        now,
    );
    learn(&mut entries, &key("k"), shown(16, None), ticket, now);
    assert_eq!(version_at(&entries, "k", now), None);
    learn(&mut entries, &key("k"), shown(32, None), ticket, now);
    assert_eq!(
        version_at(&entries, "k", now),
        Some(32),
        "it was created anew"
    );
}

#[test]
fn an_absence_counts_only_for_what_was_learned_before_the_call() {
    let (mut entries, now) = entries(1 << 20);
    let early = entries.ticket(now);
    let later = now + SECOND;
    learn(&mut entries, &key("k"), shown(16, None), early, later);
    learn(&mut entries, &key("k"), Shown::Absent, early, later);
    assert_eq!(version_at(&entries, "k", later), Some(16));
    let ticket = entries.ticket(later + SECOND);
    let contradicts = |shown| entries.contradicts(&key("k"), shown, ticket, later + SECOND);
    assert!(contradicts(None) && contradicts(Some(version(15))));
    assert!(!contradicts(Some(version(16))));
    learn(
        &mut entries,
        &key("k"),
        Shown::Absent,
        ticket,
        later + SECOND,
    );
    assert_eq!(version_at(&entries, "k", later), None);
}

#[test]
fn what_was_changed_here_is_not_replaced_by_what_redis_shows() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    let expires = now + SECOND;
    entries
        .change(&key("k"), document(8), expires, None, now)
        .unwrap();
    learn(&mut entries, &key("k"), shown(16, None), ticket, now);
    assert_eq!(version_at(&entries, "k", now), Some(8));
}

#[test]
fn a_change_remembers_what_it_changed_and_what_may_be_in_redis() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(
        &mut entries,
        &key("k"),
        shown(16, Some(SECOND * 9)),
        ticket,
        now,
    );
    let expires = now + SECOND;
    for (n, id) in [(24, Some("a")), (25, None), (26, Some("b"))] {
        entries
            .change(&key("k"), document(n), expires, id, now)
            .unwrap();
    }
    let Some(Pending::Changed { changed, left, .. }) = entries.pending(&key("k"), now) else {
        panic!("not pending");
    };
    assert_eq!(changed.base, Some((version(16), now + SECOND * 9)));
    assert_eq!(changed.maybe_in_redis, ["a", "b"]);
    assert_eq!((left, changed.change), (SECOND, 3));
}

#[test]
fn a_change_that_was_changed_again_is_not_carried() {
    let (mut entries, now) = entries(1 << 20);
    for n in [8, 9] {
        let expires = now + SECOND;
        entries
            .change(&key("k"), document(n), expires, None, now)
            .unwrap();
    }
    entries.carried(&key("k"), 1, shown(16, None), now);
    assert_eq!(
        (entries.dirty(), version_at(&entries, "k", now)),
        (1, Some(9))
    );
    entries.carried(&key("k"), 2, shown(32, None), now);
    assert_eq!(
        (entries.dirty(), version_at(&entries, "k", now)),
        (0, Some(32))
    );
}

#[test]
fn a_change_that_was_changed_again_is_not_written_to_redis() {
    let (mut entries, now) = entries(1 << 20);
    let expires = now + SECOND;
    entries
        .change(&key("k"), document(8), expires, None, now)
        .unwrap();
    assert!(entries.carrying(&key("k"), 1, "s-1"));
    entries.delete(&key("k"), now);
    assert!(!entries.carrying(&key("k"), 1, "s-2"));
    let Some(Pending::Changed { changed, .. }) = entries.pending(&key("k"), now) else {
        panic!("what may be in Redis has to be deleted there");
    };
    assert_eq!(changed.maybe_in_redis, ["s-1"]);
}

#[test]
fn a_tombstone_lasts_as_long_as_redis_may_hold_the_group() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(
        &mut entries,
        &key("k"),
        shown(16, Some(SECOND * 9)),
        ticket,
        now,
    );
    entries.delete(&key("k"), now);
    assert!(matches!(
        entries.pending(&key("k"), now),
        Some(Pending::Changed { document: None, left, .. }) if left == SECOND * 9
    ));
    sweep(&mut entries, now + SECOND * 9);
    assert_eq!((len(&entries), entries.bytes()), (0, 0));
    // Redis has never seen this one.
    let expires = now + SECOND;
    entries
        .change(&key("k"), document(8), expires, None, now)
        .unwrap();
    entries.delete(&key("k"), now);
    assert_eq!((len(&entries), entries.bytes()), (0, 0));
}

#[test]
fn a_delete_after_a_discard_knows_that_redis_holds_the_group() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(
        &mut entries,
        &key("k"),
        shown(16, Some(SECOND * 9)),
        ticket,
        now,
    );
    let expires = now + SECOND;
    let changed = entries.change(&key("k"), document(8), expires, None, now);
    changed.unwrap();
    assert_eq!(entries.discard(now), Ok(1));
    assert_eq!(
        version_at(&entries, "k", now),
        None,
        "its content is unknown"
    );
    let changed = entries.change(&key("k"), document(9), expires, None, now);
    changed.unwrap();
    entries.delete(&key("k"), now);
    assert_eq!(
        entries.discard(now),
        Ok(1),
        "the delete of what Redis holds"
    );
    // And what Redis shows takes its place.
    let ticket = entries.ticket(now);
    learn(
        &mut entries,
        &key("k"),
        shown(16, Some(SECOND * 9)),
        ticket,
        now,
    );
    assert_eq!(version_at(&entries, "k", now), Some(16));
}

#[test]
fn only_what_this_instance_has_written_and_redis_may_have_lost_is_unsure() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(&mut entries, &key("early"), written(16, None), ticket, now);
    let later = now + SECOND;
    let ticket = entries.ticket(later);
    learn(&mut entries, &key("old"), written(16, None), ticket, later);
    learn(&mut entries, &key("read"), shown(16, None), ticket, later);
    // Who reads it does not take it away, and who replaces it does.
    learn(&mut entries, &key("old"), shown(16, None), ticket, later);
    learn(
        &mut entries,
        &key("theirs"),
        written(16, None),
        ticket,
        later,
    );
    learn(&mut entries, &key("theirs"), shown(32, None), ticket, later);
    entries.begin_epoch(vec![Loss {
        since: Some(later),
        ..Loss::ALL
    }]);
    let ticket = entries.ticket(later);
    learn(&mut entries, &key("new"), written(16, None), ticket, later);
    let (keys, next) = entries.pending_keys(None, 10, later);
    assert_eq!((keys, next), (vec![key("old")], None));
    let told = entries.ticket(later);
    entries.offered(&key("old"), version(16), true, told, later);
    assert!(!entries.is_pending(&key("old"), later));
    assert_eq!(version_at(&entries, "old", later), Some(16));
}

/// Others may know what it has replaced, and put that back.
#[test]
fn what_was_written_here_and_has_expired_is_unsure_like_a_delete() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(
        &mut entries,
        &key("k"),
        written(16, Some(SECOND)),
        ticket,
        now,
    );
    let now = now + 2 * SECOND;
    for swept in [false, true] {
        if swept {
            sweep(&mut entries, now);
        }
        assert_eq!(version_at(&entries, "k", now), None);
        // Redis may show it for a moment longer.
        let ticket = entries.ticket(now);
        assert!(!entries.contradicts(&key("k"), Some(version(16)), ticket, now));
        assert!(!entries.is_pending(&key("k"), now));
    }
    entries.begin_epoch(vec![Loss::ALL]);
    assert!(matches!(
        entries.pending(&key("k"), now),
        Some(Pending::Unsure { document: None, .. })
    ));
    let forgotten = now + Entry::TOMBSTONE;
    assert!(!entries.is_pending(&key("k"), forgotten));
}

/// Another instance may be about to put back what Redis has just lost. But that a delete is
/// repeated is no reason to forget it sooner.
#[test]
fn a_delete_that_finds_nothing_is_remembered_for_a_minute_and_shortens_no_other() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(
        &mut entries,
        &key("deleted"),
        Shown::deleted(version(16)),
        ticket,
        now,
    );
    let now = now + SECOND;
    let ticket = entries.ticket(now);
    for name in ["deleted", "never there"] {
        learn(
            &mut entries,
            &key(name),
            Shown::nothing_to_delete(),
            ticket,
            now,
        );
    }
    entries.begin_epoch(vec![Loss::ALL]);
    let is_remembered = |name: &str, after| entries.is_pending(&key(name), now + after);
    let minute = Entry::TOMBSTONE_OF_NOTHING;
    assert!(is_remembered("never there", minute - SECOND));
    assert!(!is_remembered("never there", minute));
    assert!(is_remembered("deleted", Entry::TOMBSTONE - SECOND));
}

#[test]
fn what_was_there_before_changes_that_are_dropped_is_there_again() {
    let now = Instant::now();
    let mut entries = Entries::new(1 << 20, true, now);
    let ticket = entries.ticket(now);
    learn(&mut entries, &key("ours"), written(16, None), ticket, now);
    learn(&mut entries, &key("read"), shown(16, None), ticket, now);
    learn(
        &mut entries,
        &key("gone"),
        Shown::deleted(version(16)),
        ticket,
        now,
    );
    let expires = now + 9 * SECOND;
    for name in ["ours", "read", "gone"] {
        entries
            .change(&key(name), document(32), expires, None, now)
            .unwrap();
    }
    assert_eq!(entries.discard(now), Ok(3));
    entries.begin_epoch(vec![Loss::ALL]);
    for swept in [false, true] {
        if swept {
            sweep(&mut entries, now);
        }
        assert_eq!(version_at(&entries, "ours", now), Some(16));
        assert_eq!(version_at(&entries, "read", now), None);
        assert_eq!(version_at(&entries, "gone", now), None);
        let (pending, _) = entries.pending_keys(None, 9, now);
        assert_eq!(pending, [key("gone"), key("ours")]);
    }
}

/// By both policies.
#[test]
fn a_delete_is_remembered_after_a_group_that_came_and_went_here() {
    for drops_changes in [false, true] {
        let now = Instant::now();
        let mut entries = Entries::new(1 << 20, drops_changes, now);
        let ticket = entries.ticket(now);
        learn(
            &mut entries,
            &key("k"),
            Shown::deleted(version(16)),
            ticket,
            now,
        );
        entries
            .change(&key("k"), document(32), now + SECOND, None, now)
            .unwrap();
        entries.delete(&key("k"), now);
        assert_eq!(entries.dirty(), 0);
        entries.begin_epoch(vec![Loss::ALL]);
        assert!(entries.is_pending(&key("k"), now));
    }
}

#[test]
fn a_delete_is_unsure_like_a_write_and_can_be_doubted_again() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    let left = Some(SECOND * 9);
    learn(&mut entries, &key("k"), written(16, left), ticket, now);
    learn(&mut entries, &key("l"), written(16, left), ticket, now);
    let deleted = Shown::deleted(version(16));
    learn(&mut entries, &key("k"), deleted, ticket, now);
    assert!(!entries.doubt_deletes(), "nothing was lost yet");
    entries.begin_epoch(vec![Loss::ALL]);
    assert!(matches!(
        entries.pending(&key("k"), now),
        Some(Pending::Unsure {
            document: None,
            left: None,
            ..
        })
    ));
    // What Redis has brought back is not learned, and is not believed.
    let ticket = entries.ticket(now + SECOND);
    learn(&mut entries, &key("k"), shown(16, None), ticket, now);
    assert!(entries.contradicts(&key("k"), Some(version(16)), ticket, now));
    assert!(!entries.contradicts(&key("k"), None, ticket, now));
    assert!(!entries.contradicts(&key("k"), Some(version(17)), ticket, now));
    let told = entries.ticket(now);
    entries.offered(&key("k"), version(16), true, told, now);
    let told = entries.ticket(now);
    entries.offered(&key("l"), version(16), true, told, now);
    assert_eq!(entries.pending_keys(None, 10, now).0, []);
    for _ in 0..3 {
        assert!(entries.doubt_deletes());
        assert_eq!(entries.pending_keys(None, 10, now).0, [key("k")]);
        let told = entries.ticket(now);
        entries.offered(&key("k"), version(16), true, told, now);
    }
    // What is newer has come after it.
    entries.doubt_deletes();
    learn(&mut entries, &key("k"), shown(32, None), ticket, now);
    assert_eq!(version_at(&entries, "k", now), Some(32));
}

#[test]
fn a_discard_drops_everything_at_once_and_removes_it_in_steps() {
    let (mut entries, now) = entries(1 << 20);
    let many = Entries::STEP.removes * 3;
    for n in 0..many {
        let key = key(&n.to_string());
        entries
            .change(&key, document(8), now + SECOND, None, now)
            .unwrap();
    }
    let bytes = entries.bytes();
    assert_eq!(entries.discard(now), Ok(many));
    assert_eq!((entries.dirty(), entries.dirty_bytes()), (0, 0));
    assert_eq!((entries.groups(), entries.traces()), (0, 0));
    assert_eq!(version_at(&entries, "0", now), None);
    assert_eq!(
        entries.bytes(),
        bytes,
        "the memory is taken until it is given back"
    );
    // And is as good as free.
    assert!(entries.has_room_for(&key("new"), (1 << 20) - 1_000));
    entries
        .change(&key("0"), document(9), now + SECOND, None, now)
        .unwrap();
    for _ in 0..3 {
        assert_eq!(entries.sweep(now), Err(NotYet));
    }
    assert_eq!(entries.sweep(now), Ok(()));
    assert_eq!(version_at(&entries, "0", now), Some(9));
    assert_eq!((len(&entries), entries.discard(now)), (1, Ok(1)));
}

#[test]
fn of_many_that_expire_at_once_a_step_removes_some() {
    let (mut entries, now) = entries(1 << 20);
    let most = Entries::STEP.removes;
    let expires = now + SECOND;
    for n in 0..3 * most {
        let key = key(&n.to_string());
        entries
            .change(&key, document(8), expires, None, now)
            .unwrap();
    }
    assert_eq!(entries.sweep(expires), Err(NotYet));
    assert_eq!(len(&entries), 2 * most);
    let discarded = entries.discard(expires);
    assert_eq!(discarded, Err(NotYet), "what has expired does not count");
    assert_eq!(len(&entries), most);
    assert_eq!(entries.sweep_changes(expires), Err(NotYet));
    assert_eq!(entries.discard(expires), Ok(0));
    assert_eq!(len(&entries), 0);
}

#[test]
fn a_walk_past_many_that_are_no_groups_takes_steps() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    let most = Entries::STEP.looks_at;
    for n in 0..2 * most {
        let key = key(&format!("{n:05}"));
        learn(&mut entries, &key, shown(16, Some(SECOND)), ticket, now);
    }
    let now = now + SECOND;
    let last = key(&format!("{:05}", most - 1));
    let nothing = |_: &GroupKey, _: &Entry| panic!("it has expired");
    let next = entries.walk("", None, now, nothing);
    assert_eq!(next, Some(last.clone()));
    assert_eq!(entries.pending_keys(None, 1, now), (vec![], next));
    assert!(entries.walk("", Some(&last), now, nothing).is_some());
}

#[test]
fn room_for_a_large_group_among_small_ones_is_made_in_steps() {
    let small = Entries::STEP.removes * 3;
    let (mut entries, now) = entries(small * 320);
    let ticket = entries.ticket(now);
    for n in 0..small {
        let key = key(&n.to_string());
        learn(&mut entries, &key, shown(16, Some(SECOND)), ticket, now);
    }
    let large = Bytes::from(vec![b' '; small * 300]);
    let document = (large.clone(), version(8));
    let expires = now + SECOND;
    let changed = entries.change(&key("k"), document.clone(), expires, None, now);
    assert_eq!(changed, Err(NoRoom::NotYet));
    let removed = small - len(&entries);
    assert!((1..=Entries::STEP.removes).contains(&removed), "{removed}");
    let shown = Shown::Document {
        json: large,
        version: version(16),
        left: None,
        ours: None,
    };
    let again = entries.learn(&key("l"), shown, ticket, now);
    let Err(Shown::Document { json, .. }) = again else {
        panic!("it needs as much room: {again:?}");
    };
    assert_eq!(json.len(), small * 300);
    while entries.change(&key("k"), document.clone(), expires, None, now) == Err(NoRoom::NotYet) {}
    assert_eq!(version_at(&entries, "k", now), Some(8));
}

/// Until it is swept, too: a walk over all keys that finds none must not be
/// followed by one that has to be told after all.
#[test]
fn a_change_that_has_expired_is_a_delete_of_what_redis_holds() {
    let (mut entries, now) = entries(1 << 20);
    let ticket = entries.ticket(now);
    learn(
        &mut entries,
        &key("k"),
        shown(16, Some(SECOND * 9)),
        ticket,
        now,
    );
    entries
        .change(&key("k"), document(8), now + SECOND, None, now)
        .unwrap();
    let now = now + SECOND;
    for swept in [false, true] {
        if swept {
            sweep(&mut entries, now);
        }
        assert!(entries.is_pending(&key("k"), now), "swept: {swept}");
        assert!(
            matches!(
                entries.pending(&key("k"), now),
                Some(Pending::Changed { document: None, left, .. }) if left == SECOND * 8
            ),
            "swept: {swept}"
        );
        assert_eq!(entries.pending_keys(None, 9, now).0, [key("k")]);
    }
}

#[derive(Clone, Debug)]
enum Event {
    Learn(u8, i64, u64),
    Absent(u8),
    Deleted(u8, i64),
    Change(u8, i64, u64),
    Delete(u8),
    Epoch,
    Discard,
    Carried(u8),
    Sweep,
}

fn event() -> impl Strategy<Value = Event> {
    let key = 0u8..6;
    let version = 1i64..50;
    let left = 1u64..8;
    prop_oneof![
        3 => (key.clone(), version.clone(), left.clone()).prop_map(|(k, v, l)| Event::Learn(k, v, l)),
        1 => key.clone().prop_map(Event::Absent),
        1 => (key.clone(), version.clone()).prop_map(|(k, v)| Event::Deleted(k, v)),
        3 => (key.clone(), version, left).prop_map(|(k, v, l)| Event::Change(k, v, l)),
        1 => key.clone().prop_map(Event::Delete),
        1 => Just(Event::Epoch),
        1 => Just(Event::Discard),
        2 => key.prop_map(Event::Carried),
        1 => Just(Event::Sweep),
    ]
}

proptest! {
    /// Whatever happens: the bytes are those of the entries and within the
    /// bound, the dirty bytes those of the dirty ones, every entry is in one of the orders, and what was changed here
    /// and not discarded, carried or expired is still there.
    #[test]
    fn nothing_that_was_changed_is_dropped_in_silence(
        events in prop::collection::vec((event(), 0u64..3), 1..200),
    ) {
        let start = Instant::now();
        let mut entries = Entries::new(4 * (Entry::OVERHEAD_BYTES + 4), true, start);
        entries.step = Step { looks_at: 2, removes: 1 };
        let mut now = start;
        let mut ours = std::collections::HashMap::new();
        for (event, pause) in events {
            now += SECOND * pause as u32;
            ours.retain(|_, (_, expires)| *expires > now);
            let ticket = entries.ticket(now);
            match event {
                Event::Learn(k, v, l) => {
                    let left = Some(SECOND * l as u32);
                    let shown = if v % 2 == 0 { shown(v, left) } else { written(v, left) };
                    learn(&mut entries, &key(&k.to_string()), shown, ticket, now);
                }
                Event::Absent(k) => {
                    learn(&mut entries, &key(&k.to_string()), Shown::Absent, ticket, now);
                }
                Event::Deleted(k, v) => {
                    learn(&mut entries, &key(&k.to_string()), Shown::deleted(version(v)), ticket, now);
                }
                Event::Change(k, v, l) => {
                    let expires = now + SECOND * l as u32;
                    let key = key(&k.to_string());
                    let changed = loop {
                        match entries.change(&key, document(v), expires, None, now) {
                            Err(NoRoom::NotYet) => {}
                            changed => break changed,
                        }
                    };
                    if changed.is_ok() {
                        ours.insert(k, (v, expires));
                    }
                }
                Event::Delete(k) => {
                    entries.delete(&key(&k.to_string()), now);
                    ours.remove(&k);
                }
                Event::Epoch => entries.begin_epoch(vec![Loss::ALL]),
                Event::Discard => {
                    while entries.discard(now) == Err(NotYet) {}
                    ours.clear();
                }
                Event::Carried(k) => {
                    let key = key(&k.to_string());
                    if let Some(Pending::Changed { changed, .. }) = entries.pending(&key, now) {
                        entries.carried(&key, changed.change, Shown::Absent, now);
                        ours.remove(&k);
                    }
                }
                Event::Sweep => {
                    let _ = entries.sweep(now);
                }
            }
            for (k, (v, _)) in &ours {
                prop_assert_eq!(version_at(&entries, &k.to_string(), now), Some(*v));
            }
            prop_assert!(entries.bytes() <= entries.max_bytes);
            entries.table.check();
        }
    }

    /// Nobody can tell whether what has expired or was dropped is removed in the
    /// same moment or in steps of one.
    #[test]
    fn what_is_gone_is_gone_before_it_is_removed(
        events in prop::collection::vec((event(), 0u64..3), 1..200),
    ) {
        let start = Instant::now();
        let mut at_once = Entries::new(1 << 20, true, start);
        let mut in_steps = Entries::new(1 << 20, true, start);
        in_steps.step = Step { looks_at: 2, removes: 1 };
        let mut now = start;
        for (event, pause) in events {
            now += SECOND * pause as u32;
            sweep(&mut at_once, now);
            let both = [&mut at_once, &mut in_steps].map(|entries| {
                let ticket = entries.ticket(now);
                match event {
                    Event::Learn(k, v, l) => {
                        let left = Some(SECOND * l as u32);
                        let shown = if v % 2 == 0 { shown(v, left) } else { written(v, left) };
                        learn(entries, &key(&k.to_string()), shown, ticket, now);
                    }
                    Event::Absent(k) => {
                        learn(entries, &key(&k.to_string()), Shown::Absent, ticket, now);
                    }
                    Event::Deleted(k, v) => {
                        let shown = Shown::deleted(version(v));
                        learn(entries, &key(&k.to_string()), shown, ticket, now);
                    }
                    Event::Change(k, v, l) => {
                        let expires = now + SECOND * l as u32;
                        let key = key(&k.to_string());
                        let id = (v % 5 == 0).then_some("a");
                        entries.change(&key, document(v), expires, id, now).unwrap();
                    }
                    Event::Delete(k) => entries.delete(&key(&k.to_string()), now),
                    Event::Epoch => entries.begin_epoch(vec![Loss::ALL]),
                    Event::Discard => loop {
                        if let Ok(discarded) = entries.discard(now) {
                            return Some(discarded);
                        }
                    },
                    Event::Carried(k) => {
                        let key = key(&k.to_string());
                        if let Some(Pending::Changed { changed, .. }) = entries.pending(&key, now) {
                            entries.carried(&key, changed.change, Shown::Absent, now);
                        }
                    }
                    Event::Sweep => {
                        let _ = entries.sweep(now);
                    }
                }
                None
            });
            prop_assert_eq!(both[0], both[1], "as many are dropped");
            sweep(&mut at_once, now);
            prop_assert_eq!(seen(&at_once, now), seen(&in_steps, now));
            in_steps.table.check();
        }
    }
}

/// Everything that can be seen of the keys of [`event`].
fn seen(entries: &Entries, now: Instant) -> Vec<String> {
    let mut listed = Vec::new();
    let mut after = None;
    loop {
        after = entries.walk("", after.as_ref(), now, |key, _| {
            listed.push(key.clone());
            ControlFlow::Continue(())
        });
        if after.is_none() {
            break;
        }
    }
    let mut pending = Vec::new();
    loop {
        let (keys, next) = entries.pending_keys(after.as_ref(), 1, now);
        pending.extend(keys);
        after = next;
        if after.is_none() {
            break;
        }
    }
    let of_key = |k: u8| {
        let key = key(&k.to_string());
        format!(
            "{k}: {:?}, known {:?}, pending {} {:?}",
            version_at(entries, key.as_str(), now),
            entries.known(&key, now),
            entries.is_pending(&key, now),
            entries.pending(&key, now),
        )
    };
    let lists = [format!("listed {listed:?}, pending {pending:?}")];
    lists.into_iter().chain((0..6).map(of_key)).collect()
}
