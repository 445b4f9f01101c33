//! Versions, write ids and the clock of Redis as seen from here. No I/O.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
};

use tokio::time::Instant;

/// The optimistic lock version of a stored group, at least 1: a hybrid logical
/// timestamp in microseconds since 1970, always greater than the version it
/// replaces.
///
/// Its low four bits say who issued it: 0 for Redis, 8 to 15 for the memory of
/// an instance. So a version that memory issued never equals one of Redis, and
/// a Go writer beside us, which adds 1, stays clear of both for 7 writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(i64);

/// Issues the versions of a memory store.
#[derive(Debug)]
pub struct MemoryVersions {
    /// Low four bits of every version, 8 to 15.
    low_bits: i64,
    /// The last version that was issued. A version never comes back, even for
    /// a group that was deleted and created again within one microsecond.
    last: Mutex<i64>,
}

/// Names this process in write ids, page tokens and replies: random, drawn at
/// start, so that two runs on one host differ. Cheap to clone.
///
/// It makes the write ids, too: one for each write, unique among all instances. A
/// write id is stored in the document, so that a write whose answer was lost is
/// recognised. Whoever writes draws from the clones' common counter, so that no
/// two writers of one process can ever have the same id.
#[derive(Clone, Debug)]
pub struct InstanceId(Arc<Instance>);

#[derive(Debug)]
struct Instance {
    name: String,
    /// The next write's number.
    next_write: AtomicU64,
}

/// What time it is in Redis, as far as it was heard: what versions are made of.
///
/// It goes on by our monotonic clock, so that a wall clock that is set here changes
/// nothing. And it never goes back, though the clock of Redis may be set back, or a server
/// whose clock is behind take over: no version is made of a time that has been. Cheap to
/// clone.
#[derive(Clone, Debug)]
pub struct RedisClock(Arc<Heard>);

#[derive(Debug)]
struct Heard {
    start: Instant,
    /// The microseconds since 1970 in Redis at `start`; [`RedisClock::NEVER`].
    at_start: AtomicI64,
}

/// What is known of a Redis server's clock: an interval in which its offset
/// from our monotonic clock lies.
///
/// Every script reply says what time it was in Redis at some moment between
/// the send and the receive time of that call. Each such sample bounds the
/// offset from both sides, and samples are intersected. All times are
/// microseconds, local ones since any fixed moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IntervalClock {
    offset: Option<OffsetInterval>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct OffsetInterval {
    /// Redis time minus local time is at least this,
    lowest: i64,
    /// and at most this,
    highest: i64,
    /// as of this local time; clocks drift apart afterwards.
    as_of: i64,
}

// === impl Version ===

impl Version {
    /// The greatest version that a write may issue, and the least that none can
    /// replace: Lua's numbers are exact up to here.
    pub const MAX_RAISABLE: i64 = 1 << 53;

    /// What a document without a version, or with version 0, counts as.
    pub const FIRST: Self = Self(1);

    /// None if `version` is less than 1.
    pub fn new(version: i64) -> Option<Self> {
        (version >= 1).then_some(Self(version))
    }

    pub fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// === impl MemoryVersions ===

impl MemoryVersions {
    /// A version lies up to this many steps of 16 past the clock, at random, so
    /// that two instances with equal low bits do not meet: 65 ms.
    const STEPS_PAST_CLOCK: i64 = 4_096;
    /// One that follows others faster than that lies up to this many steps past
    /// the last: few, so that 40,000 writes a second do not outrun the clock.
    const STEPS_PAST_LAST: i64 = 2;

    pub fn new() -> Self {
        Self {
            low_bits: rand::random_range(8..16),
            last: Mutex::new(0),
        }
    }

    /// The version of a write that replaces `previous`. None when `previous`
    /// cannot be raised any more.
    pub fn next(&self, previous: Option<Version>, now_micros: i64) -> Option<Version> {
        // Nothing panics while the lock is held, and a number cannot be left
        // half written.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = previous.map_or(0, Version::get).max(*last);
        if taken.max(now_micros) >= Version::MAX_RAISABLE {
            return None;
        }
        let steps = if now_micros > taken {
            now_micros / 16 + 1 + rand::random_range(0..Self::STEPS_PAST_CLOCK)
        } else {
            taken / 16 + 1 + rand::random_range(0..Self::STEPS_PAST_LAST)
        };
        let version = steps * 16 + self.low_bits;
        if version > Version::MAX_RAISABLE {
            return None;
        }
        *last = version;
        Version::new(version)
    }
}

impl Default for MemoryVersions {
    fn default() -> Self {
        Self::new()
    }
}

// === impl InstanceId ===

impl InstanceId {
    pub fn random() -> Self {
        Self(Arc::new(Instance {
            name: format!("{:012x}", rand::random::<u64>() >> 16),
            next_write: AtomicU64::new(1),
        }))
    }

    pub fn as_str(&self) -> &str {
        &self.0.name
    }

    /// A new write id: letters, digits and a dash; at most 29 bytes.
    pub fn next_write_id(&self) -> String {
        let number = self.0.next_write.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number:x}", self.0.name)
    }
}

// === impl RedisClock ===

impl RedisClock {
    const NEVER: i64 = i64::MIN;

    /// It goes on slower than time by one part in so many, so that it does not run away
    /// from a clock that is a little slower than ours: NTP slews by half of this. One that
    /// was set back is waited for, a thousand times as long.
    const SLOWER_BY: i64 = 1_000;

    /// Takes in what time it was in Redis not after `received`.
    pub fn hear(&self, received: Instant, redis_micros: i64) {
        let at_start = redis_micros.saturating_sub(self.since_start(received));
        self.0.at_start.fetch_max(at_start, Ordering::Relaxed);
    }

    /// A time in microseconds since 1970 that is later than all before. Redis shows no
    /// earlier one, unless its clock was set back. None if it has never been heard.
    pub fn at(&self, moment: Instant) -> Option<i64> {
        let at_start = self.0.at_start.load(Ordering::Relaxed);
        (at_start != Self::NEVER).then(|| at_start.saturating_add(self.since_start(moment)))
    }

    fn since_start(&self, moment: Instant) -> i64 {
        let since = moment.saturating_duration_since(self.0.start);
        let since = i64::try_from(since.as_micros()).unwrap_or(i64::MAX);
        since - since / Self::SLOWER_BY
    }
}

impl Default for RedisClock {
    fn default() -> Self {
        Self(Arc::new(Heard {
            start: Instant::now(),
            at_start: AtomicI64::new(Self::NEVER),
        }))
    }
}

// === impl IntervalClock ===

impl IntervalClock {
    /// How fast the two clocks may drift apart, in microseconds a second: twice
    /// the 500 ppm that NTP daemons slew by at most.
    const DRIFT_PPM: i64 = 1_000;

    /// Takes in a reply that was asked for at `sent`, came at `received`, and
    /// says that it was `remote` in Redis.
    pub fn observe(&mut self, sent: i64, received: i64, remote: i64) {
        let sample = OffsetInterval {
            lowest: remote - received,
            // The remote clock counts whole microseconds, rounded down.
            highest: remote + 1 - sent,
            as_of: received,
        };
        self.offset = Some(match self.offset {
            None => sample,
            Some(known) => {
                let known = known.at(received);
                let lowest = known.lowest.max(sample.lowest);
                let highest = known.highest.min(sample.highest);
                if lowest <= highest {
                    OffsetInterval {
                        lowest,
                        highest,
                        as_of: received,
                    }
                } else {
                    // The remote clock was set: only the newest sample counts.
                    sample
                }
            }
        });
    }

    /// What Redis's clock shows at least when ours shows `local`. None before
    /// the first reply.
    pub fn earliest_remote(&self, local: i64) -> Option<i64> {
        self.offset.map(|offset| local + offset.at(local).lowest)
    }
}

// === impl OffsetInterval ===

impl OffsetInterval {
    /// The interval as it stands at `local`, widened by drift. For an earlier
    /// `local` too: replies do not come in the order in which they are taken in.
    fn at(self, local: i64) -> Self {
        let drift = (local - self.as_of).abs() * IntervalClock::DRIFT_PPM / 1_000_000 + 1;
        Self {
            lowest: self.lowest - drift,
            highest: self.highest + drift,
            as_of: self.as_of,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn memory_versions_rise_and_never_look_like_those_of_redis() {
        let versions = MemoryVersions::new();
        let mut previous = None;
        for now in [1_000, 1_000, 5, 2_000_000, 1 << 50] {
            let version = versions.next(previous, now).unwrap();
            assert!(Some(version) > previous);
            assert!(version.get() >= now);
            assert!((8..16).contains(&(version.get() % 16)));
            previous = Some(version);
        }
    }

    /// Versions of two instances that write one group in the same moment are drawn
    /// from 8 times 4,096.
    #[test]
    fn two_instances_hardly_ever_issue_the_same_version() {
        let meet = |_: &u32| {
            let (one, other) = (MemoryVersions::new(), MemoryVersions::new());
            one.next(None, 1_000_000) == other.next(None, 1_000_000)
        };
        // 0.6 are expected; more than 8 in one of 50,000,000 runs.
        let met = (0..20_000).filter(meet).count();
        assert!(met <= 8, "{met}");
    }

    #[test]
    fn memory_versions_do_not_outrun_the_clock() {
        let versions = MemoryVersions::new();
        let mut now = 1_000_000;
        for _ in 0..100_000 {
            now += 30; // 33,000 writes a second
            let version = versions.next(None, now).unwrap();
            assert!((0..100_000).contains(&(version.get() - now)));
        }
    }

    #[test]
    fn a_memory_version_does_not_come_back_after_a_delete() {
        let versions = MemoryVersions::new();
        let deleted = versions.next(None, 1_000).unwrap();
        assert!(versions.next(None, 1_000).unwrap() > deleted);
    }

    #[test]
    fn the_time_of_redis_goes_on_by_itself() {
        let clock = RedisClock::default();
        let now = Instant::now();
        assert_eq!(clock.at(now), None);
        clock.hear(now, 5_000_000);
        let later = std::time::Duration::from_secs(2);
        let gone_on = clock.at(now + later).unwrap();
        assert!((6_990_000..=7_000_000).contains(&gone_on), "{gone_on}");
        clock.hear(now + later, 9_000_000);
        assert_eq!(clock.at(now + later), Some(9_000_000));
    }

    #[test]
    fn the_time_of_redis_never_goes_back() {
        let clock = RedisClock::default();
        let now = Instant::now();
        let after = |seconds| now + std::time::Duration::from_secs(seconds);
        clock.hear(now, 5_000_000);
        let mut last = clock.at(now).unwrap();
        // The clock of Redis was set back by 3 s.
        for second in 1..10 {
            clock.hear(after(second), 2_000_000 + second as i64 * 1_000_000);
            let next = clock.at(after(second)).unwrap();
            assert!(next > last, "{next} after {last}");
            last = next;
        }
        assert!(last > 13_900_000, "{last}");
        // An hour later it has been caught up with.
        clock.hear(after(3_600), 3_602_000_000);
        assert_eq!(clock.at(after(3_600)), Some(3_602_000_000));
    }

    #[test]
    fn a_version_that_cannot_be_raised_is_refused() {
        let versions = MemoryVersions::new();
        let huge = Version::new(Version::MAX_RAISABLE + 1);
        assert_eq!(versions.next(huge, 1_000), None);
        assert!(versions.next(None, 1_000).is_some());
    }

    #[test]
    fn no_two_writers_of_a_process_share_a_write_id() {
        let instance = InstanceId::random();
        // As the calls, the watch over Redis and whoever carries over have it.
        let writers: Vec<_> = (0..3)
            .map(|_| {
                let writer = instance.clone();
                std::thread::spawn(move || {
                    let ids = std::iter::repeat_with(|| writer.next_write_id());
                    ids.take(1_000).collect::<Vec<_>>()
                })
            })
            .collect();
        let mut ids = std::collections::HashSet::new();
        for id in writers
            .into_iter()
            .flat_map(|writer| writer.join().unwrap())
        {
            assert!(id.len() <= 29 && id.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-'));
            assert!(id.starts_with(instance.as_str()));
            assert!(ids.insert(id));
        }
        assert!(!ids.contains(&InstanceId::random().next_write_id()));
    }

    #[test]
    fn a_clock_that_was_set_is_learned_anew() {
        let mut clock = IntervalClock::default();
        assert_eq!(clock.earliest_remote(0), None);
        clock.observe(0, 100, 1_000_000);
        clock.observe(200, 300, 500_000);
        let earliest = clock.earliest_remote(300).unwrap();
        assert!((499_900..=500_000).contains(&earliest), "{earliest}");
    }

    proptest! {
        /// Whatever the group had before and whatever the clock says: a version
        /// of memory rises, never equals one of Redis, and is never issued twice.
        #[test]
        fn memory_versions_rise_and_are_memorys_alone(
            calls in prop::collection::vec(
                (prop::option::of(1i64..Version::MAX_RAISABLE - 1_000_000), 0i64..1 << 52),
                1..100,
            ),
        ) {
            let versions = MemoryVersions::new();
            let mut issued = std::collections::HashSet::new();
            for (previous, now) in calls {
                let previous = previous.and_then(Version::new);
                let Some(version) = versions.next(previous, now) else {
                    // Near 2^53, where nothing is raised any more.
                    continue;
                };
                prop_assert!(previous.is_none_or(|previous| version > previous));
                prop_assert!((8..16).contains(&(version.get() % 16)));
                prop_assert!(issued.insert(version));
            }
        }

        /// Whatever the delays of request and reply, and however the clocks
        /// drift: the remote clock never shows less than `earliest_remote`, so
        /// a deadline made from it never lies after the local moment it is for.
        #[test]
        fn earliest_remote_is_never_late(
            offset in -1_000_000_000_000i64..1_000_000_000_000,
            drift_ppm in -900i64..900,
            calls in prop::collection::vec(
                (0i64..60_000_000, 0i64..2_000_000, 0i64..2_000_000), 1..40),
            later in 0i64..600_000_000,
        ) {
            let remote_at = |local: i64| local + offset + local * drift_ppm / 1_000_000;
            let mut clock = IntervalClock::default();
            let mut local = 0;
            for (pause, request_delay, reply_delay) in calls {
                let sent = local + pause;
                let executed = sent + request_delay;
                let received = executed + reply_delay;
                clock.observe(sent, received, remote_at(executed));
                for moment in [received, received + later] {
                    let earliest = clock.earliest_remote(moment).unwrap();
                    prop_assert!(earliest <= remote_at(moment));
                }
                local = received;
            }
        }
    }
}
