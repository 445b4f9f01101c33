//! The JSON document of a group, as it lies in Redis and in memory.
//!
//! The form is that of the Go service that shares the key space, with a tail
//! that a write script can read and put a version into without parsing JSON:
//!
//! ```text
//! {"key":…,"alerts":{…},"metadata":{…,"write_id":"…","version":N},"version":N}
//! ```
//!
//! The outer version counts. What Go writes is read (`null` for empty maps,
//! absent optional fields, any time zone, no write id); what is written here,
//! Go reads.

use std::{collections::BTreeMap, fmt, io};

use bytes::Bytes;
use serde::Deserialize;
use sha1::{Digest, Sha1};

use super::{
    group::{Alert, AlertGroup, GroupKey, GroupMetadata, null_as_default},
    version::{InstanceId, Version},
};

/// A document that is to be written: all of it but the write id and the
/// version, which the store adds.
#[derive(Clone, Debug)]
pub struct DocumentHead {
    key: GroupKey,
    /// JSON up to the last field before the write id, without closing braces.
    json: Vec<u8>,
}

/// A whole document but for its version.
#[derive(Clone, Debug)]
pub struct Draft {
    json: Vec<u8>,
}

/// Takes what is written as long as it is within a bound, and counts the rest: what is
/// refused for its size takes no memory first. In JSON a request can be six times as long.
struct Bounded {
    json: Vec<u8>,
    bytes: usize,
    most: usize,
}

/// A document as it is stored, with the version that it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    pub key: GroupKey,
    pub json: Bytes,
}

/// Why a stored document cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored document of {bytes} bytes (SHA-1 {sha1}) cannot be read: {reason}")]
pub struct Unreadable {
    /// Where parsing stopped, and why.
    pub reason: String,
    /// Size of the document in bytes.
    pub bytes: usize,
    /// Digest of the document, in hex, to find it again.
    pub sha1: String,
}

/// The stored form, as it is read.
#[derive(Deserialize)]
struct StoredForm {
    key: GroupKey,
    #[serde(default, deserialize_with = "null_as_default")]
    alerts: BTreeMap<String, Alert>,
    metadata: GroupMetadata,
    #[serde(default)]
    version: Option<i64>,
}

// === impl DocumentHead ===

impl DocumentHead {
    /// Bytes of the tail at most: the field names, a write id and two versions.
    const MAX_TAIL_BYTES: usize = 128;

    /// Room to begin with.
    const USUAL_BYTES: usize = 1_024;

    const BRACES: &[u8] = b"}}";

    /// Stands for a version that is not known yet, in as many digits as a version has. It
    /// is not a number of JSON: nobody reads such a document as one that has a version.
    const UNKNOWN_VERSION: &str = "0000000000000000";

    /// Writes a group as JSON. Its version and write id are left out.
    pub fn new(group: &AlertGroup) -> Self {
        Self::within(usize::MAX, group).expect("no group has so many bytes")
    }

    /// The same of a group that takes at most `most` bytes once it is stored, as
    /// [`Self::stored_bytes`] counts them; their number if it takes more.
    pub fn within(most: usize, group: &AlertGroup) -> Result<Self, usize> {
        let mut written = Bounded {
            json: Vec::with_capacity(Self::USUAL_BYTES),
            bytes: 0,
            most,
        };
        serde_json::to_writer(&mut written, group)
            .expect("strings, numbers and maps with string keys always serialize");
        let Bounded {
            mut json, bytes, ..
        } = written;
        let stored_bytes = bytes - Self::BRACES.len() + Self::MAX_TAIL_BYTES;
        if stored_bytes > most {
            return Err(stored_bytes);
        }
        // The closing braces of `metadata` and of the document; the tail
        // brings them back.
        debug_assert!(json.ends_with(Self::BRACES));
        json.truncate(json.len() - Self::BRACES.len());
        Ok(Self {
            key: group.key.clone(),
            json,
        })
    }

    pub fn key(&self) -> &GroupKey {
        &self.key
    }

    /// Size in bytes of the document once it is stored, at most.
    pub fn stored_bytes(&self) -> usize {
        self.json.len() + Self::MAX_TAIL_BYTES
    }

    /// The whole document but for its version, which the write script puts in.
    pub fn unversioned(&self, write_id: &str) -> Bytes {
        self.with_tail(write_id, Self::UNKNOWN_VERSION).into()
    }

    /// The whole document.
    pub fn finish(&self, write_id: &str, version: Version) -> Document {
        Document {
            key: self.key.clone(),
            json: self.with_tail(write_id, version).into(),
        }
    }

    /// The same, to put a version in later, at no more cost than that of its digits.
    pub fn draft(&self, write_id: &str) -> Draft {
        Draft {
            json: self.with_tail(write_id, Self::UNKNOWN_VERSION),
        }
    }

    fn with_tail(&self, write_id: &str, version: impl fmt::Display) -> Vec<u8> {
        let end = end_of_tail(version);
        // In one piece of exactly the size that it takes: it may be kept.
        [
            &self.json,
            &b",\"write_id\":\""[..],
            write_id.as_bytes(),
            b"\",\"version\":",
            end.as_bytes(),
        ]
        .concat()
    }
}

/// What follows the name of the inner version.
fn end_of_tail(version: impl fmt::Display) -> String {
    format!("{version}}},\"version\":{version}}}")
}

// === impl Draft ===

impl Draft {
    /// Size of the document, or that of it with a version of another length.
    pub fn bytes(&self) -> usize {
        self.json.len()
    }

    /// The document with its version.
    pub fn finish(mut self, version: Version) -> Bytes {
        let end = end_of_tail(version);
        let place = self.json.len() - end_of_tail(DocumentHead::UNKNOWN_VERSION).len();
        self.json.truncate(place);
        self.json.extend_from_slice(end.as_bytes());
        self.json.into()
    }
}

// === impl Bounded ===

impl io::Write for Bounded {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        self.bytes += part.len();
        if self.bytes <= self.most {
            self.json.extend_from_slice(part);
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// === impl Document ===

impl Document {
    /// Reads the group. Unknown fields are passed over.
    pub fn parse(&self) -> Result<AlertGroup, Unreadable> {
        // Checked as a whole it takes a fifth less than string by string; but what is
        // wrong in a field that is passed over is no matter.
        let form: StoredForm = match std::str::from_utf8(&self.json) {
            Ok(text) => serde_json::from_str(text),
            Err(_) => serde_json::from_slice(&self.json),
        }
        .map_err(|error| Unreadable::new(&self.json, error.to_string()))?;
        if form.key != self.key {
            return Err(Unreadable::new(
                &self.json,
                "it names another group key than the one it is stored under".into(),
            ));
        }
        let version = match form.version {
            None | Some(0) => Version::FIRST,
            Some(version) => Version::new(version)
                .ok_or_else(|| Unreadable::new(&self.json, "its version is negative".into()))?,
        };
        Ok(AlertGroup {
            key: form.key,
            alerts: form.alerts,
            metadata: GroupMetadata {
                version: Some(version),
                ..form.metadata
            },
        })
    }
}

impl Document {
    /// The version that the document says, None if it cannot be read. Reads no
    /// more than the tail of a document of ours.
    pub fn version(&self) -> Option<Version> {
        if let Some(version) = self.version_in_tail() {
            return Some(version);
        }
        self.parse().ok()?.metadata.version
    }

    /// Whether the call with this write id has written the document.
    pub fn was_written_by(&self, write_id: &str) -> bool {
        // As the scripts see it.
        let written = |version| {
            let tail = format!(
                "\"write_id\":\"{write_id}\",\"version\":{version}}},\"version\":{version}}}"
            );
            self.json.ends_with(tail.as_bytes())
        };
        self.version_in_tail().is_some_and(written)
    }

    /// Whether a call of this instance has written the document.
    pub fn was_written_by_one_of(&self, instance: &InstanceId) -> bool {
        let begin = format!("{}-", instance.as_str());
        let write_id = self.write_id_in_tail();
        write_id.is_some_and(|write_id| write_id.starts_with(begin.as_bytes()))
    }

    /// Whether it has a write id. Then its writer's versions never come back, even for a
    /// group that is deleted and made anew.
    pub fn has_write_id(&self) -> bool {
        self.write_id_in_tail().is_some()
    }

    /// The write id that stands right before the version at the very end.
    fn write_id_in_tail(&self) -> Option<&[u8]> {
        const BEGIN: &[u8] = b"\"write_id\":\"";
        let version = self.version_in_tail()?;
        let end = format!("\",\"version\":{version}}},\"version\":{version}}}");
        let rest = self.json.strip_suffix(end.as_bytes())?;
        let is_part = |c: &&u8| c.is_ascii_alphanumeric() || **c == b'-';
        let length = rest.iter().rev().take_while(is_part).count();
        let (before, write_id) = rest.split_at(rest.len() - length);
        (before.ends_with(BEGIN) && length > 0).then_some(write_id)
    }

    /// The version in `},"version":N}` at the very end: what the scripts read of a
    /// document without being told.
    fn version_in_tail(&self) -> Option<Version> {
        let json = self.json.strip_suffix(b"}")?;
        let digits = json.iter().rev().take_while(|c| c.is_ascii_digit()).count();
        let (rest, digits) = json.split_at(json.len() - digits);
        // With a zero in front it is no number of JSON, so nobody can read the document.
        if !rest.ends_with(b"},\"version\":") || digits.starts_with(b"0") {
            return None;
        }
        let version = std::str::from_utf8(digits).ok()?.parse().ok()?;
        Version::new(version)
    }
}

// === impl Unreadable ===

impl Unreadable {
    pub fn new(document: &[u8], reason: String) -> Self {
        Self {
            reason,
            bytes: document.len(),
            sha1: hex(&Sha1::digest(document)),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::group::{AlertStatus, GroupState, Time};
    use proptest::prelude::*;

    fn document(key: &str, json: impl Into<Bytes>) -> Document {
        Document {
            key: GroupKey::new(key).unwrap(),
            json: json.into(),
        }
    }

    fn version(version: i64) -> Version {
        Version::new(version).unwrap()
    }

    #[test]
    fn the_tail_is_the_one_that_the_scripts_know() {
        let group = AlertGroup {
            key: GroupKey::new("a").unwrap(),
            alerts: BTreeMap::new(),
            metadata: GroupMetadata::default(),
        };
        let written = DocumentHead::new(&group).finish("i-1", version(16));
        assert_eq!(
            std::str::from_utf8(&written.json).unwrap(),
            r#"{"key":"a","alerts":{},"metadata":{"state":"firing","firing_count":0,"resolved_count":0,"group_by":[],"write_id":"i-1","version":16},"version":16}"#,
        );
    }

    #[test]
    fn what_takes_too_many_bytes_is_told_how_many() {
        let group = AlertGroup {
            key: GroupKey::new("a").unwrap(),
            alerts: BTreeMap::new(),
            metadata: GroupMetadata {
                group_by: vec!["\u{1}".repeat(1_000)],
                ..GroupMetadata::default()
            },
        };
        let bytes = DocumentHead::new(&group).stored_bytes();
        assert!(bytes > 6_000);
        assert!(DocumentHead::within(bytes, &group).is_ok());
        assert_eq!(DocumentHead::within(bytes - 1, &group).err(), Some(bytes));
        assert_eq!(DocumentHead::within(0, &group).err(), Some(bytes));
    }

    #[test]
    fn the_tail_tells_version_and_writer() {
        let group = AlertGroup {
            key: GroupKey::new("a").unwrap(),
            alerts: BTreeMap::new(),
            metadata: GroupMetadata::default(),
        };
        let head = DocumentHead::new(&group);
        let written = head.finish("i-1", version(16));
        assert_eq!(head.draft("i-1").finish(version(16)), written.json);
        let usual = version(1_795_425_541_998_120);
        let draft = head.draft("i-1");
        assert_eq!(draft.bytes(), head.finish("i-1", usual).json.len());
        assert_eq!(draft.finish(usual), head.finish("i-1", usual).json);
        assert_eq!(written.version(), Some(version(16)));
        assert!(written.was_written_by("i-1"));
        assert!(!written.was_written_by("i-") && !written.was_written_by("i-11"));
        let instance = InstanceId::random();
        assert!(written.has_write_id() && !written.was_written_by_one_of(&instance));
        let ours = head.finish(&instance.next_write_id(), version(16));
        assert!(ours.was_written_by_one_of(&instance) && ours.has_write_id());
        assert!(!ours.was_written_by_one_of(&InstanceId::random()));
        // Of another writer, with another tail.
        let foreign = r#"{"version":7,"key":"a","metadata":{"state":"mixed","version":3}}"#;
        let foreign = document("a", foreign);
        assert_eq!(foreign.version(), Some(version(7)));
        assert!(!foreign.was_written_by("i-1") && !foreign.has_write_id());
        assert_eq!(document("a", "{}").version(), None);
        let no_number = r#"{"key":"a","metadata":{"state":"mixed"},"version":007}"#;
        assert_eq!(document("a", no_number).version(), None);
        assert!(!document("a", "").was_written_by("i-1"));
    }

    #[test]
    fn the_outer_version_counts_and_zero_or_none_is_one() {
        for (outer, read) in [
            ("9", 9),
            ("0", 1),
            ("null", 1),
            ("9007199254740993", 9007199254740993),
        ] {
            let json = format!(
                r#"{{"key":"a","metadata":{{"state":"mixed","version":3}},"version":{outer}}}"#
            );
            let group = document("a", json).parse().unwrap();
            assert_eq!(group.metadata.version, Some(version(read)));
        }
        let without = document("a", r#"{"key":"a","metadata":{"state":"mixed"}}"#);
        assert_eq!(
            without.parse().unwrap().metadata.version,
            Some(Version::FIRST)
        );
    }

    #[test]
    fn unknown_fields_are_passed_over() {
        let json = r#"{"key":"a","new":{"x":[1]},"alerts":{"f":{"fingerprint":"f","status":"resolved","more":1}},
            "metadata":{"state":"silenced","extra":null},"version":2}"#;
        let group = document("a", json).parse().unwrap();
        assert_eq!(group.alerts["f"].status, AlertStatus::Resolved);
        assert_eq!(group.metadata.state, GroupState::Silenced);
    }

    #[test]
    fn what_cannot_be_read_says_where_parsing_stopped() {
        let truncated = document("a", r#"{"key":"a","alerts":{"#)
            .parse()
            .unwrap_err();
        assert!(truncated.reason.contains("line 1 column 21"), "{truncated}");
        assert_eq!(truncated.bytes, 21);
        assert_eq!(truncated.sha1.len(), 40);
        for json in [
            "",
            "5",
            "[]",
            r#"{"key":"b","metadata":{"state":"firing"}}"#,
            r#"{"key":"a","metadata":{"state":"firing"},"version":-1}"#,
            r#"{"key":"a","metadata":{"state":"on fire"}}"#,
            r#"{"key":"a"}"#,
        ] {
            assert!(document("a", json).parse().is_err(), "{json}");
        }
        let deep = format!(r#"{{"key":"a","x":{}"#, "[".repeat(100_000));
        assert!(document("a", deep).parse().is_err());
    }

    fn time() -> impl Strategy<Value = Option<Time>> {
        prop::option::of(
            (-62_135_596_800i64..253_402_300_800, 0u32..1_000_000_000)
                .prop_map(|(seconds, nanos)| Time::from_parts(seconds, nanos).unwrap()),
        )
    }

    fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
        prop::collection::btree_map(any::<String>(), any::<String>(), 0..4)
    }

    fn alert() -> impl Strategy<Value = Alert> {
        (
            any::<(String, String, bool)>(),
            labels(),
            labels(),
            time(),
            time(),
            time(),
        )
            .prop_map(
                |(
                    (alert_name, generator_url, firing),
                    labels,
                    annotations,
                    starts_at,
                    ends_at,
                    timestamp,
                )| Alert {
                    fingerprint: String::new(),
                    alert_name,
                    status: if firing {
                        AlertStatus::Firing
                    } else {
                        AlertStatus::Resolved
                    },
                    labels,
                    annotations,
                    starts_at,
                    ends_at,
                    generator_url,
                    timestamp,
                },
            )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            key in "[^\\pC]\\PC*",
            alerts in prop::collection::btree_map(any::<String>(), alert(), 0..4),
            created_at in time(),
            group_by in prop::collection::vec(any::<String>(), 0..3),
            counts in any::<(i32, i32)>(),
            n in 1i64..,
        ) {
            let mut group = AlertGroup {
                key: GroupKey::new(key).unwrap(),
                alerts,
                metadata: GroupMetadata {
                    created_at,
                    group_by,
                    firing_count: counts.0,
                    resolved_count: counts.1,
                    ..GroupMetadata::default()
                },
            };
            let head = DocumentHead::new(&group);
            let written = head.finish("i-1", version(n));
            prop_assert!(written.json.len() <= head.stored_bytes());
            group.metadata.write_id = "i-1".into();
            group.metadata.version = Some(version(n));
            prop_assert_eq!(written.parse().unwrap(), group);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(json in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = document("a", json).parse();
        }
    }
}
