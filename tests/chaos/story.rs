//! Histories made by hand, for the tests of the oracle.

use std::{collections::BTreeMap, time::Duration};

use tonic::Code;

use super::{
    evidence::{Evidence, InstanceRecord, Outage, Sample, Struck},
    history::{Backend, Call, Content, Found, Key, Moment, Reply, Request, Role},
    oracle::judge,
    schedule::{After, Policy, Step, Target},
};
use crate::common::faults::Fault;

/// A history in the making. Calls follow each other every 10 ms and take 1 ms.
pub struct Story {
    pub evidence: Evidence,
    pub now: Moment,
}

/// A key with one writer.
pub const KEY: Key = Key {
    role: Role::Own,
    owner: 0,
    number: 0,
};

impl Story {
    pub fn new(policy: Policy) -> Self {
        let instance = InstanceRecord {
            mirror_max_bytes: 1 << 20,
            ..InstanceRecord::default()
        };
        Self {
            evidence: Evidence {
                policy,
                calls: Vec::new(),
                finals: BTreeMap::new(),
                end: millis(60_000),
                faults: Vec::new(),
                instances: vec![instance],
                stalls: Vec::new(),
            },
            now: Moment::ZERO,
        }
    }

    pub fn call(mut self, key: Key, request: Request, reply: Reply) -> Self {
        self.now += millis(10);
        self.evidence.calls.push(Call {
            key,
            instance: 0,
            request,
            deadline: None,
            begin: self.now,
            end: self.now + millis(1),
            reply,
        });
        self
    }

    /// Stores the group of this stamp under a version of the same number.
    pub fn stored(self, backend: Backend, stamp: u64) -> Self {
        let version = stamp as i64;
        let reply = Reply::Written { backend, version };
        self.call(KEY, Request::Store(content(stamp)), reply)
    }

    pub fn swapped(self, backend: Backend, expected: i64, stamp: u64) -> Self {
        let request = Request::Swap {
            content: content(stamp),
            expected,
        };
        let version = stamp as i64;
        self.call(KEY, request, Reply::Written { backend, version })
    }

    pub fn deleted(self, backend: Backend, version: i64) -> Self {
        let request = Request::Delete { expected: None };
        self.call(KEY, request, Reply::Deleted { backend, version })
    }

    pub fn loaded(self, backend: Backend, stamp: Option<u64>) -> Self {
        self.loaded_as(backend, stamp, stamp.map_or(0, |stamp| stamp as i64))
    }

    pub fn loaded_as(self, backend: Backend, stamp: Option<u64>, version: i64) -> Self {
        let found = stamp.map(|stamp| Found {
            content: content(stamp),
            version,
        });
        self.call(KEY, Request::Load, Reply::Shown { backend, found })
    }

    pub fn failed(self, stamp: u64, code: Code, reason: &str) -> Self {
        let reply = Reply::Failed {
            code,
            reason: reason.to_owned(),
            message: String::new(),
        };
        self.call(KEY, Request::Store(content(stamp)), reply)
    }

    pub fn unknown(self, stamp: u64) -> Self {
        self.failed(stamp, Code::Aborted, "OUTCOME_UNKNOWN")
    }

    /// Time passes, in milliseconds.
    pub fn wait(mut self, time: u64) -> Self {
        self.now += millis(time);
        self
    }

    /// The switch opens here.
    pub fn opens(mut self) -> Self {
        self.now += millis(300);
        self.evidence.instances[0].outages.push(Outage {
            opened: self.now,
            closed: None,
            slack: Outage::SLACK,
        });
        self
    }

    /// The switch closes, and its metrics count `discarded` groups so far.
    pub fn closes(mut self, discarded: u64) -> Self {
        self.now += millis(300);
        let record = &mut self.evidence.instances[0];
        record.outages.last_mut().unwrap().closed = Some(self.now);
        let sample = Sample {
            recoveries: record.outages.len() as u64,
            discarded,
            put_back: 0,
            mirror_bytes: 1,
        };
        record.samples.extend([sample; 3]);
        self.now += millis(300);
        self
    }

    /// A fault that lasts from now on for this long, with recovery awaited.
    pub fn fault(mut self, fault: Fault, length: u64, wiped: bool) -> Self {
        self.now += millis(300);
        self.evidence.faults.push(Struck {
            step: Step {
                fault,
                target: Target::Everybody,
                length: millis(length),
                after: After::Recovered,
            },
            began: self.now,
            ended: self.now + millis(length),
            writable: self.now + millis(length),
            wiped,
            from_health: true,
            awaited: true,
        });
        self
    }

    pub fn kill(self) -> Self {
        self.fault(Fault::Kill, 100, true)
    }

    /// What is in Redis at the end.
    pub fn ends_with(mut self, stamp: Option<u64>) -> Self {
        if let Some(stamp) = stamp {
            let found = Found {
                content: content(stamp),
                version: stamp as i64,
            };
            self.evidence.finals.insert(KEY.to_string(), found);
        }
        self
    }

    #[track_caller]
    pub fn has(self, expected: &[&str]) {
        let verdict = judge(&self.evidence);
        let kinds: Vec<&str> = verdict.flaws.iter().map(|flaw| flaw.kind()).collect();
        assert_eq!(kinds, expected, "{:#?}", verdict.flaws);
    }

    #[track_caller]
    pub fn holds(self) {
        self.has(&[]);
    }
}

pub fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// One alert of its own for each stamp.
pub fn content(stamp: u64) -> Content {
    Content {
        stamp,
        alerts: [(format!("f{stamp}"), 0)].into(),
    }
}
