//! What the clients did and were told: the evidence that the oracle judges.
//!
//! Plain values without clocks or sockets, so that tests can make them by hand.

use std::{collections::BTreeMap, fmt, time::Duration};

use groupstate::grpc::proto as pb;
use prost_types::Timestamp;
use tonic::Code;

/// Time since the run began. All processes of a run share the machine's clocks.
pub type Moment = Duration;

/// A group key, and what is done with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub role: Role,
    /// The writer; of a shared key, the instance.
    pub owner: usize,
    pub number: u32,
}

/// How a key is used, and so what can be said about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// One writer, one call after the other: its state is always known.
    Own,
    /// Two writers at once, who only add alerts by CompareAndSwap: none may be
    /// missing.
    Shared,
    /// Stored once, for a second: it must be gone afterwards.
    Fleeting,
    /// One writer, one call after the other, each through any instance: what one
    /// instance did last is what all have to know.
    Wandering,
}

/// A group as far as the clients fill it. Every write has a stamp of its own,
/// and an alert is determined by its fingerprint and revision.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Content {
    /// Unique among the writes of its key.
    pub stamp: u64,
    /// Revision of each alert by fingerprint. Fingerprints never come twice; an
    /// alert with a higher revision is a later report of it.
    pub alerts: BTreeMap<String, u32>,
}

/// A group that was read, and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub content: Content,
    pub version: i64,
}

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Redis,
    Memory,
}

/// A call and its outcome.
#[derive(Clone, Debug)]
pub struct Call {
    pub key: Key,
    pub instance: usize,
    pub request: Request,
    /// None for a call without a deadline.
    pub deadline: Option<Duration>,
    pub begin: Moment,
    pub end: Moment,
    pub reply: Reply,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    Store(Content),
    /// For a second.
    StoreBriefly(Content),
    Swap {
        content: Content,
        expected: i64,
    },
    Delete {
        expected: Option<i64>,
    },
    Load,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Stored or swapped in.
    Written {
        backend: Backend,
        version: i64,
    },
    /// Loaded, or what won the race against a swap; None for absent.
    Shown {
        backend: Backend,
        found: Option<Found>,
    },
    Deleted {
        backend: Backend,
        version: i64,
    },
    /// Absent (version 0), or another version than the expected one.
    NotDeleted {
        backend: Backend,
        version: i64,
    },
    /// A status other than OK and NOT_FOUND.
    Failed {
        code: Code,
        /// Of its `ErrorInfo`.
        reason: String,
        message: String,
    },
}

// === impl Key ===

impl Key {
    pub const PREFIX: &str = "chaos/";
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Own => "own",
            Role::Shared => "shared",
            Role::Fleeting => "fleeting",
            Role::Wandering => "wandering",
        };
        write!(f, "{}{role}/{}/{}", Self::PREFIX, self.owner, self.number)
    }
}

// === impl Call ===

impl Call {
    /// The backend that answered; None without an answer.
    pub fn backend(&self) -> Option<Backend> {
        match &self.reply {
            Reply::Written { backend, .. }
            | Reply::Shown { backend, .. }
            | Reply::Deleted { backend, .. }
            | Reply::NotDeleted { backend, .. } => Some(*backend),
            Reply::Failed { .. } => None,
        }
    }

    pub fn took(&self) -> Duration {
        self.end.saturating_sub(self.begin)
    }

    /// A Load whose caller has little time: memory may answer it also while the
    /// switch is closed.
    pub fn is_load_in_a_hurry(&self) -> bool {
        self.request == Request::Load && self.deadline.is_some()
    }

    /// Whether it wanted to change its key.
    pub fn is_write(&self) -> bool {
        self.request != Request::Load
    }

    /// Whether it says that it changed its key.
    pub fn changed(&self) -> bool {
        matches!(self.reply, Reply::Written { .. } | Reply::Deleted { .. })
    }
}

// === impl Request ===

impl Request {
    /// What is stored if it succeeds; None for absent. A Load has none.
    pub fn outcome(&self) -> Option<Option<&Content>> {
        match self {
            Self::Store(content) | Self::StoreBriefly(content) | Self::Swap { content, .. } => {
                Some(Some(content))
            }
            Self::Delete { .. } => Some(None),
            Self::Load => None,
        }
    }
}

// === impl Content ===

impl Content {
    /// What stands for a group that no client can have written.
    pub fn alien() -> Self {
        Self {
            stamp: u64::MAX,
            alerts: BTreeMap::new(),
        }
    }

    /// Whether every alert of `other` is here, in the same revision or a later
    /// one.
    pub fn covers(&self, other: &Self) -> bool {
        other
            .alerts
            .iter()
            .all(|(fingerprint, revision)| self.alerts.get(fingerprint) >= Some(revision))
    }

    /// The group to send. `now` becomes the time of its reports: merging goes
    /// by it.
    pub fn to_group(&self, key: &Key, now: Timestamp) -> pb::AlertGroup {
        let alert = |(fingerprint, revision): (&String, &u32)| {
            let resolved = is_resolved(*revision);
            let alert = pb::Alert {
                fingerprint: fingerprint.clone(),
                alert_name: "HighCPU".into(),
                status: if resolved {
                    pb::AlertStatus::Resolved.into()
                } else {
                    pb::AlertStatus::Firing.into()
                },
                labels: [("alertname".into(), "HighCPU".into())].into(),
                annotations: [("revision".to_owned(), revision.to_string())].into(),
                starts_at: Some(Timestamp {
                    seconds: 1_700_000_000,
                    nanos: 0,
                }),
                ends_at: resolved.then_some(now),
                generator_url: "http://prometheus.example/graph?g0.expr=up".into(),
                timestamp: Some(now),
            };
            (fingerprint.clone(), alert)
        };
        pb::AlertGroup {
            key: key.to_string(),
            alerts: self.alerts.iter().map(alert).collect(),
            metadata: Some(pb::GroupMetadata {
                state: pb::GroupState::Firing.into(),
                updated_at: Some(now),
                group_by: vec!["alertname".into()],
                group_wait_timer: Some(pb::TimerMetadata {
                    version: i64::try_from(self.stamp).expect("stamps are small"),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }
    }

    /// The content of a group that was read; [`Content::alien`] when it is none
    /// of ours.
    pub fn of_group(group: &pb::AlertGroup) -> Self {
        let read = || {
            let metadata = group.metadata.as_ref()?;
            let stamp = u64::try_from(metadata.group_wait_timer.as_ref()?.version).ok()?;
            let mut alerts = BTreeMap::new();
            for (fingerprint, alert) in &group.alerts {
                let revision = alert.annotations.get("revision")?.parse().ok()?;
                let resolved = alert.status() == pb::AlertStatus::Resolved;
                if alert.fingerprint != *fingerprint || resolved != is_resolved(revision) {
                    return None;
                }
                alerts.insert(fingerprint.clone(), revision);
            }
            Some(Self { stamp, alerts })
        };
        read().unwrap_or_else(Self::alien)
    }

    /// The content and version of a document as it lies in Redis, read without
    /// the code under test.
    pub fn of_document(document: &str) -> Found {
        let read = || {
            let document: serde_json::Value = serde_json::from_str(document).ok()?;
            let metadata = &document["metadata"];
            let mut alerts = BTreeMap::new();
            for (fingerprint, alert) in document["alerts"].as_object()? {
                let revision = alert["annotations"]["revision"].as_str()?.parse().ok()?;
                let resolved = alert["status"] == "resolved";
                if alert["fingerprint"] != **fingerprint || resolved != is_resolved(revision) {
                    return None;
                }
                alerts.insert(fingerprint.clone(), revision);
            }
            let stamp = metadata["group_wait_timer"]["version"].as_u64()?;
            Some(Found {
                content: Self { stamp, alerts },
                version: document["version"].as_i64()?,
            })
        };
        read().unwrap_or_else(|| Found {
            content: Self::alien(),
            version: 0,
        })
    }
}

/// The first report of an alert fires, the next resolves it, and so on.
fn is_resolved(revision: u32) -> bool {
    revision % 2 == 1
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::alien() {
            return f.write_str("a group that no client wrote");
        }
        write!(f, "write {}", self.stamp)?;
        f.debug_map().entries(&self.alerts).finish()
    }
}
