//! Which group an alert belongs to: the key rule of the Go service, so that
//! Rust and Go replicas meet in the same group. Pure.
//!
//! | labels of the alert | grouping labels | key |
//! |---|---|---|
//! | none | any | `{empty}` |
//! | some | none | `{global}` |
//! | some | `...` alone | all labels of the alert |
//! | some | others | these labels; `<missing>` for one that the alert does not have |
//!
//! Labels stand in the order of their bytes, as `name=value` joined by commas. A
//! value that holds a character outside of ASCII, a space or one of
//! `, = { } [ ] < >` is query-escaped as a whole (a space becomes `+`). One that
//! happens to be `<missing>` stands as it is, as in Go: it cannot be told from
//! an absent label.
//!
//! Two routes of one Alertmanager that group by the same labels meet in one group so.
//! [`GroupKeys::of_alertmanager`] keeps them apart: the key is then
//! `receiver=RECEIVER,groupKey=GROUPKEY`, with Alertmanager's own name of its group.

use std::{collections::BTreeMap, fmt::Write};

use crate::domain::group::GroupKey;

/// Makes group keys of labels.
#[derive(Clone, Debug)]
pub struct GroupKeys {
    /// A longer key, in bytes, is replaced by its hash; None leaves it.
    hash_longer_than: Option<usize>,
    /// The server's `--max-key-bytes`: a key over it is always replaced.
    max_key_bytes: usize,
    /// Alertmanager's groups, in place of groups by labels.
    of_alertmanager: bool,
}

/// Groups by all labels, where it is the only grouping label.
pub const ALL_LABELS: &str = "...";

const EMPTY: &str = "{empty}";
const GLOBAL: &str = "{global}";
const MISSING: &str = "<missing>";

// === impl GroupKeys ===

impl GroupKeys {
    /// The Go service's limit, where it replaces long keys at all.
    pub const DEFAULT_HASH_LONGER_THAN: usize = 256;

    /// Keys up to the default limit of the server, not shortened before: what
    /// the Go service does by default.
    pub fn new() -> Self {
        Self {
            hash_longer_than: None,
            max_key_bytes: 4_096,
            of_alertmanager: false,
        }
    }

    /// Takes the groups and receivers of Alertmanager in place of groups by labels, for
    /// sites that route alerts of the same group labels to two receivers. Go replicas
    /// do not know such groups.
    pub fn of_alertmanager(self) -> Self {
        Self {
            of_alertmanager: true,
            ..self
        }
    }

    /// Replaces keys of more than `bytes` by their hash. All replicas must do
    /// the same, or they do not meet.
    pub fn hash_longer_than(self, bytes: usize) -> Self {
        Self {
            hash_longer_than: Some(bytes),
            ..self
        }
    }

    /// For a server whose `--max-key-bytes` is `bytes`.
    pub fn max_key_bytes(self, bytes: usize) -> Self {
        Self {
            max_key_bytes: bytes,
            ..self
        }
    }

    /// The key of the group of an alert with these labels.
    pub fn key<L: AsRef<str>>(
        &self,
        labels: &BTreeMap<String, String>,
        group_by: &[L],
    ) -> GroupKey {
        self.within_limits(readable_key(labels, group_by))
    }

    /// Whether the groups are Alertmanager's own.
    pub(super) fn are_alertmanagers(&self) -> bool {
        self.of_alertmanager
    }

    /// The key of a group of Alertmanager.
    pub(super) fn alertmanagers_key(&self, receiver: &str, group_key: &str) -> GroupKey {
        let mut key = String::from("receiver=");
        push_value(&mut key, receiver);
        key.push_str(",groupKey=");
        key.push_str(group_key);
        self.within_limits(key)
    }

    fn within_limits(&self, key: String) -> GroupKey {
        let limit = self.hash_longer_than.unwrap_or(usize::MAX);
        let key = if key.len() > limit.min(self.max_key_bytes) {
            hashed(&key)
        } else {
            key
        };
        // It begins with `{` or with the name of a label. A label whose name
        // begins with a control character is none that Prometheus knows.
        GroupKey::new(key.as_str())
            .or_else(|_| GroupKey::new(hashed(&key)))
            .expect("`{hash:…}` is a group key")
    }
}

impl Default for GroupKeys {
    fn default() -> Self {
        Self::new()
    }
}

fn readable_key<L: AsRef<str>>(labels: &BTreeMap<String, String>, group_by: &[L]) -> String {
    let mut names: Vec<&str> = group_by.iter().map(AsRef::as_ref).collect();
    if labels.is_empty() {
        return EMPTY.into();
    }
    match names[..] {
        [] => return GLOBAL.into(),
        [ALL_LABELS] => names = labels.keys().map(String::as_str).collect(),
        // The order of strings is that of their bytes.
        _ => names.sort_unstable(),
    }
    let mut key = String::new();
    for name in names {
        if !key.is_empty() {
            key.push(',');
        }
        key.push_str(name);
        key.push('=');
        match labels.get(name) {
            Some(value) => push_value(&mut key, value),
            None => key.push_str(MISSING),
        }
    }
    key
}

fn push_value(key: &mut String, value: &str) {
    let plain = |c: char| c.is_ascii() && !", ={}[]<>".contains(c);
    if value.chars().all(plain) || value == MISSING {
        key.push_str(value);
        return;
    }
    for byte in value.bytes() {
        match byte {
            b' ' => key.push('+'),
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' | b'.' | b'~' => {
                key.push(byte.into());
            }
            _ => write!(key, "%{byte:02X}").expect("a string takes everything"),
        }
    }
}

fn hashed(key: &str) -> String {
    format!("{{hash:{:016x}}}", super::hash::fnv_1a(key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    /// A vector that the Go service's code agrees with.
    #[derive(Deserialize)]
    struct GoVector {
        labels: BTreeMap<String, String>,
        group_by: Vec<String>,
        hash_keys_longer_than: Option<usize>,
        key: String,
    }

    fn labels<const N: usize>(labels: [(&str, &str); N]) -> BTreeMap<String, String> {
        labels
            .map(|(name, value)| (name.into(), value.into()))
            .into()
    }

    #[test]
    fn go_makes_the_same_keys() {
        let vectors: Vec<GoVector> =
            serde_json::from_str(include_str!("../../tests/data/group-key-vectors.json")).unwrap();
        assert_eq!(vectors.len(), 17);
        for vector in vectors {
            let keys = match vector.hash_keys_longer_than {
                Some(bytes) => GroupKeys::new().hash_longer_than(bytes),
                None => GroupKeys::new(),
            };
            let key = keys.key(&vector.labels, &vector.group_by);
            assert_eq!(key.as_str(), vector.key);
        }
    }

    #[test]
    fn a_key_over_the_servers_limit_is_always_replaced() {
        let long = labels([("a", &"x".repeat(5_000))]);
        let key = GroupKeys::new().key(&long, &["a"]);
        assert!(key.as_str().starts_with("{hash:"), "{key}");
        assert_eq!(key.as_str().len(), 23);
        let short = labels([("a", "xxxxxxxxxx")]);
        let key = GroupKeys::new().max_key_bytes(10).key(&short, &["a"]);
        assert!(key.as_str().starts_with("{hash:"), "{key}");
    }

    #[test]
    fn a_label_that_prometheus_would_not_have_does_no_harm() {
        let odd = labels([("\u{1}probe", "x"), ("", "y")]);
        let key = GroupKeys::new().key(&odd, &["\u{1}probe"]);
        assert!(key.as_str().starts_with("{hash:"), "{key}");
        assert_eq!(GroupKeys::new().key(&odd, &[""]).as_str(), "=y");
    }

    proptest! {
        #[test]
        fn any_labels_have_a_key_within_the_limit(
            labels in prop::collection::btree_map(".{0,20}", ".{0,60}", 0..6),
            group_by in prop::collection::vec(".{0,20}", 0..6),
            limit in 23usize..300,
        ) {
            let key = GroupKeys::new().max_key_bytes(limit).key(&labels, &group_by);
            prop_assert!(key.as_str().len() <= limit);
        }

        /// The same labels make the same key, in whatever order they are named.
        #[test]
        fn the_order_of_the_grouping_labels_makes_no_difference(
            labels in prop::collection::btree_map("[a-e]", ".{0,10}", 1..5),
            mut group_by in prop::collection::vec("[a-g]", 2..6),
        ) {
            let key = GroupKeys::new().key(&labels, &group_by);
            group_by.reverse();
            prop_assert_eq!(GroupKeys::new().key(&labels, &group_by), key);
        }
    }
}
