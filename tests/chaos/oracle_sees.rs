//! The oracle on histories made by hand: it sees when groups are lost, come
//! back or are counted wrongly, and nothing where all is well.

use tonic::Code;

use super::{
    evidence::Stall,
    history::{
        Backend::{Memory, Redis},
        Found, Key, Reply, Request, Role,
    },
    oracle::judge,
    schedule::Policy::{Discard, Reconcile},
    story::{KEY, Story, content, millis},
};

#[test]
fn a_life_without_faults_is_fine() {
    Story::new(Reconcile)
        .loaded(Redis, None)
        .stored(Redis, 10)
        .loaded(Redis, Some(10))
        .swapped(Redis, 10, 20)
        .deleted(Redis, 20)
        .loaded(Redis, None)
        .swapped(Redis, 0, 30)
        .ends_with(Some(30))
        .holds();
}

#[test]
fn an_acknowledged_write_that_is_gone_or_old_at_the_end_is_lost() {
    for policy in [Reconcile, Discard] {
        let story = || Story::new(policy).stored(Redis, 10).stored(Redis, 20);
        story().ends_with(None).has(&["lost"]);
        story()
            .ends_with(Some(10))
            .has(&["lost", "version backwards"]);
        story().ends_with(Some(25)).has(&["never written"]);
    }
}

#[test]
fn a_load_must_show_the_last_write_also_from_memory() {
    for policy in [Reconcile, Discard] {
        let story = || Story::new(policy).stored(Redis, 10).stored(Redis, 20);
        let back = |story: Story| story.stored(Redis, 30).ends_with(Some(30));
        back(story().loaded(Redis, None)).has(&["lost"]);
        back(story().loaded(Redis, Some(10))).has(&["lost", "version backwards"]);
        let memory = |stamp| story().opens().loaded(Memory, stamp).closes(0);
        back(memory(Some(20))).holds();
        back(memory(None)).has(&["lost"]);
        back(memory(Some(10))).has(&["lost", "version backwards"]);
    }
}

#[test]
fn reconcile_must_carry_over_what_memory_acknowledged() {
    let story = || Story::new(Reconcile).stored(Redis, 10).opens();
    let story = || story().stored(Memory, 20).stored(Memory, 30).closes(0);
    story().ends_with(Some(30)).holds();
    story()
        .loaded_as(Redis, Some(30), 40)
        .ends_with(None)
        .has(&["lost"]);
    for stale in [None, Some(10), Some(20)] {
        let flaws = judge(&story().ends_with(stale).evidence).flaws;
        assert_eq!(flaws[0].kind(), "lost");
    }
    let deleted = || Story::new(Reconcile).stored(Redis, 10).opens();
    let deleted = || deleted().deleted(Memory, 10).closes(0);
    deleted().ends_with(None).holds();
    deleted().ends_with(Some(10)).has(&["came back"]);
}

#[test]
fn discard_goes_back_to_what_redis_had() {
    let story = || Story::new(Discard).stored(Redis, 10).opens();
    let story = || story().stored(Memory, 20).stored(Memory, 30).closes(1);
    story().ends_with(Some(10)).holds();
    // Redis may have executed the call that opened the switch, but no later one.
    story().ends_with(Some(20)).holds();
    story().ends_with(Some(30)).has(&["lost"]);
    story().ends_with(None).has(&["lost"]);
}

#[test]
fn a_failed_write_happened_or_did_not() {
    for policy in [Reconcile, Discard] {
        let story = || Story::new(policy).stored(Redis, 10).unknown(20);
        story().ends_with(Some(10)).holds();
        story().ends_with(Some(20)).holds();
        story().ends_with(None).has(&["lost"]);
        // Once seen, it is known.
        story()
            .loaded(Redis, Some(10))
            .ends_with(Some(20))
            .has(&["lost"]);
        // Memory cannot know what became of it.
        let story = || story().opens().loaded(Memory, Some(10)).closes(0);
        story().ends_with(Some(20)).holds();
    }
}

/// A stopped instance reads a call later, and gives it the time that its caller had set.
#[test]
fn a_write_that_was_given_up_before_a_stopped_instance_read_it_may_come_late() {
    let story = || {
        let mut story = Story::new(Reconcile).stored(Redis, 10);
        let begin = story.now + millis(5);
        let end = begin + millis(100);
        story.evidence.instances[0].stops.push(Stall { begin, end });
        story = story.failed(20, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
        let call = story.evidence.calls.last_mut().unwrap();
        call.deadline = Some(millis(50));
        story.loaded(Redis, Some(10))
    };
    story().ends_with(Some(20)).holds();
    story().ends_with(Some(10)).holds();
    story().ends_with(None).has(&["lost"]);
    // Not any more after its own deadline.
    let later = || story().wait(200).loaded(Redis, Some(10));
    later()
        .loaded(Redis, Some(20))
        .ends_with(Some(20))
        .has(&["lost"]);
}

/// What Redis executed and could not answer is merged with what memory has done
/// since. A Delete that is refused on the way tells nothing of that.
#[test]
fn a_failed_write_may_return_by_a_merge_also_after_a_refused_delete() {
    let refused = |story: Story| {
        let request = Request::Delete { expected: Some(30) };
        let reply = Reply::NotDeleted {
            backend: Redis,
            version: 40,
        };
        story.call(KEY, request, reply)
    };
    let story = || {
        let story = Story::new(Reconcile).stored(Redis, 10).unknown(20).opens();
        refused(story.stored(Memory, 30).closes(0))
    };
    let loaded = |stamps: &[u64]| {
        let mut found = content(30);
        found.alerts = stamps
            .iter()
            .flat_map(|stamp| content(*stamp).alerts)
            .collect();
        let found = Some(Found {
            content: found,
            version: 40,
        });
        let reply = Reply::Shown {
            backend: Redis,
            found,
        };
        story().call(KEY, Request::Load, reply)
    };
    loaded(&[30]).stored(Redis, 50).ends_with(Some(50)).holds();
    loaded(&[20, 30])
        .stored(Redis, 50)
        .ends_with(Some(50))
        .holds();
    // Not without what memory has acknowledged, nor with what nobody asked for.
    loaded(&[20])
        .stored(Redis, 50)
        .ends_with(Some(50))
        .has(&["never written"]);
    loaded(&[30, 99])
        .stored(Redis, 50)
        .ends_with(Some(50))
        .has(&["never written"]);
}

#[test]
fn what_a_redis_without_a_disk_loses_is_healed_and_what_was_deleted_does_not_return() {
    for policy in [Discard, Reconcile] {
        let story = || Story::new(policy).stored(Redis, 10).kill();
        story().ends_with(None).has(&["lost"]);
        story().ends_with(Some(10)).holds();
        let story = || Story::new(policy).stored(Redis, 10).deleted(Redis, 10);
        story().ends_with(Some(10)).has(&["came back"]);
        story().kill().ends_with(Some(10)).has(&["came back"]);
        story().kill().ends_with(None).holds();
    }
    // What there was before a change that was dropped is not dropped with it.
    let dropped = || {
        let story = Story::new(Discard).stored(Redis, 10);
        story.opens().stored(Memory, 20).closes(1).kill()
    };
    dropped().ends_with(None).has(&["lost"]);
    dropped().ends_with(Some(10)).holds();
}

/// A key that wanders: any instance may have written it.
#[test]
fn a_key_that_wanders_is_what_was_acknowledged_last() {
    let key = Key {
        role: Role::Wandering,
        ..KEY
    };
    let written = |version| Reply::Written {
        backend: Redis,
        version,
    };
    let shown = |stamp: Option<u64>| Reply::Shown {
        backend: Redis,
        found: stamp.map(|stamp| Found {
            content: content(stamp),
            version: stamp as i64,
        }),
    };
    let stored = |story: Story, stamp: u64| {
        let request = Request::Store(content(stamp));
        story.call(key, request, written(stamp as i64))
    };
    let ends_with = |mut story: Story, stamp: Option<u64>| {
        let found = stamp.map(|stamp| Found {
            content: content(stamp),
            version: stamp as i64,
        });
        story.evidence.finals = found.map(|it| (key.to_string(), it)).into_iter().collect();
        story
    };
    let story = || stored(stored(Story::new(Discard), 10), 20);
    ends_with(story(), Some(20)).holds();
    ends_with(story(), Some(10)).has(&["lost"]);
    ends_with(story(), None).has(&["lost"]);
    ends_with(story().kill(), None).has(&["lost"]);
    // No instance may show what was replaced through another one.
    let loaded = |stamp| story().call(key, Request::Load, shown(stamp));
    ends_with(loaded(Some(20)), Some(20)).holds();
    ends_with(loaded(Some(10)), Some(20)).has(&["lost"]);
    ends_with(stored(story(), 20), Some(20)).has(&["version reused"]);
    let deleted = || {
        let reply = Reply::Deleted {
            backend: Redis,
            version: 20,
        };
        story().call(key, Request::Delete { expected: None }, reply)
    };
    ends_with(deleted().kill(), None).holds();
    ends_with(deleted().kill(), Some(10)).has(&["came back"]);
    let brief = || {
        let request = Request::StoreBriefly(content(30));
        story().call(key, request, written(30))
    };
    ends_with(brief().kill(), None).holds();
    ends_with(brief().kill(), Some(20)).has(&["came back"]);
    // After a write that Redis did not acknowledge nothing can be said.
    let reply = Reply::Written {
        backend: Memory,
        version: 30,
    };
    let given_up = story()
        .opens()
        .call(key, Request::Store(content(30)), reply);
    ends_with(given_up.closes(1), Some(10)).holds();
}

#[test]
fn a_swap_must_not_succeed_on_a_version_that_was_replaced() {
    Story::new(Reconcile)
        .stored(Redis, 10)
        .swapped(Redis, 10, 20)
        .swapped(Redis, 10, 30)
        .ends_with(Some(30))
        .has(&["stale swap"]);
    Story::new(Reconcile)
        .stored(Redis, 10)
        .swapped(Redis, 0, 20)
        .ends_with(Some(20))
        .has(&["stale swap"]);
}

#[test]
fn versions_never_go_back_while_a_group_lives() {
    let story = |policy| Story::new(policy).stored(Redis, 50);
    story(Reconcile)
        .stored(Redis, 40)
        .ends_with(Some(40))
        .has(&["version backwards"]);
    // After a Delete the group is another one.
    story(Reconcile)
        .deleted(Redis, 50)
        .stored(Redis, 40)
        .ends_with(Some(40))
        .holds();
    let outage = |policy| story(policy).opens().stored(Memory, 60).closes(1);
    let back = |story: Story| story.loaded_as(Redis, Some(60), 55).ends_with(Some(60));
    back(outage(Reconcile)).has(&["version backwards"]);
    outage(Discard)
        .loaded(Redis, Some(50))
        .ends_with(Some(50))
        .holds();
}

#[test]
fn a_version_never_stands_for_two_contents() {
    let same = Reply::Written {
        backend: Redis,
        version: 10,
    };
    Story::new(Reconcile)
        .stored(Redis, 10)
        .deleted(Redis, 10)
        .call(KEY, Request::Store(content(20)), same)
        .ends_with(Some(20))
        .has(&["version reused"]);
}

#[test]
fn shared_keys_hold_all_alerts_that_were_acknowledged_and_no_others() {
    let key = Key {
        role: Role::Shared,
        ..KEY
    };
    let swap = |stamp: u64| Request::Swap {
        content: content(stamp),
        expected: 0,
    };
    let written = |backend, version| Reply::Written { backend, version };
    let story = |policy, backend| {
        let mut story = Story::new(policy)
            .call(key, swap(1), written(Redis, 1))
            .opens()
            .call(key, swap(2), written(backend, 2))
            .closes(u64::from(backend == Memory));
        let found = Found {
            content: content(1),
            version: 1,
        };
        story.evidence.finals.insert(key.to_string(), found);
        story
    };
    story(Reconcile, Memory).has(&["lost"]);
    story(Discard, Redis).has(&["lost"]);
    story(Discard, Memory).holds();
    let mut alien = story(Discard, Memory);
    let found = alien.evidence.finals.get_mut(&key.to_string()).unwrap();
    found.content.alerts.insert("alien".into(), 0);
    alien.has(&["never written"]);
}

#[test]
fn groups_that_expired_and_keys_nobody_uses_are_noticed() {
    let key = Key {
        role: Role::Fleeting,
        ..KEY
    };
    let written = Reply::Written {
        backend: Redis,
        version: 1,
    };
    let mut story = Story::new(Reconcile).call(key, Request::Store(content(1)), written);
    let found = Found {
        content: content(1),
        version: 1,
    };
    story.evidence.finals.insert(key.to_string(), found.clone());
    story.evidence.finals.insert("chaos/other".into(), found);
    story.has(&["never written", "came back"]);
}

// === the counting of discard ===

#[test]
fn each_recovery_counts_exactly_the_groups_that_memory_changed() {
    let story = |first, second| {
        Story::new(Discard)
            .stored(Redis, 10)
            .opens()
            .stored(Memory, 20)
            .swapped(Memory, 20, 30)
            .closes(first)
            .loaded(Redis, Some(10))
            .opens()
            .loaded(Memory, Some(10))
            .closes(second)
            .ends_with(Some(10))
    };
    story(1, 1).holds();
    story(0, 0).has(&["miscounted"]);
    story(2, 2).has(&["miscounted"]);
    // Two errors do not make up for each other.
    story(0, 1).has(&["miscounted", "miscounted"]);
}

#[test]
fn what_cannot_be_told_may_be_counted_or_not() {
    for counted in 0..=1 {
        Story::new(Discard)
            .stored(Redis, 10)
            .opens()
            .unknown(20)
            .closes(counted)
            .ends_with(Some(10))
            .holds();
    }
}

#[test]
fn a_swap_that_succeeded_must_not_be_told_to_have_lost() {
    let itself = Found {
        content: content(20),
        version: 20,
    };
    let reply = Reply::Shown {
        backend: Memory,
        found: Some(itself),
    };
    let request = Request::Swap {
        content: content(20),
        expected: 10,
    };
    Story::new(Reconcile)
        .stored(Redis, 10)
        .opens()
        .call(KEY, request, reply)
        .closes(0)
        .ends_with(Some(20))
        .has(&["lost to itself"]);
}

#[test]
fn after_a_discard_memory_may_not_know_a_group_until_it_has_seen_it() {
    let story = || {
        Story::new(Discard)
            .stored(Redis, 10)
            .opens()
            .stored(Memory, 20)
            .closes(1)
            .opens()
    };
    let ends = |story: Story, discarded| story.closes(discarded).ends_with(Some(10));
    let learns = story().loaded(Memory, None).loaded(Memory, Some(10));
    ends(learns, 1).holds();
    // A failed call in between changes nothing.
    let failed = story().unknown(30).loaded(Memory, None);
    ends(failed, 1).holds();
    // What was dropped must not come back.
    let stored = story().stored(Memory, 30);
    ends(stored.loaded(Memory, Some(10)), 2).has(&["lost", "version backwards"]);
}
