//! What a request takes in memory once it is decoded, told from its bytes before it is.
//!
//! In protobuf two bytes are an empty group, which takes five hundred in memory: a request
//! of 16 MiB would come to 4 GiB before anybody has counted its groups.

use std::mem::size_of;

use crate::grpc::proto as pb;

/// What lies at one place of a message.
struct Shape {
    /// Memory that each occurrence takes, besides the bytes of its strings.
    takes: usize,
    /// What may lie in it, by the number of the field, as far as that may be many.
    holds: &'static [(u64, Shape)],
}

/// A string of its own, besides its bytes.
const ALLOCATION: usize = 16;
/// A vector that grows has room for twice what it holds, and so has a tree.
const ROOM: usize = 2;

const LABEL: Shape = Shape {
    takes: ROOM * size_of::<(String, String)>() + 2 * ALLOCATION,
    holds: &[],
};
const ALERT: Shape = Shape {
    takes: 0,
    holds: &[(4, LABEL), (5, LABEL)],
};
const ALERT_BY_FINGERPRINT: Shape = Shape {
    takes: ROOM * size_of::<(String, pb::Alert)>() + 2 * ALLOCATION,
    holds: &[(2, ALERT)],
};
const GROUPED_BY: Shape = Shape {
    takes: ROOM * size_of::<String>() + ALLOCATION,
    holds: &[],
};
const METADATA: Shape = Shape {
    takes: 0,
    holds: &[(8, GROUPED_BY)],
};
const GROUP: Shape = Shape {
    takes: ROOM * size_of::<pb::AlertGroup>(),
    holds: &[(2, ALERT_BY_FINGERPRINT), (3, METADATA)],
};
/// Store, CompareAndSwap and StoreAll have their groups at the same place. The others have
/// nothing that may be many; a key that looks like a group is short.
const REQUEST: Shape = Shape {
    takes: 0,
    holds: &[(1, GROUP)],
};

/// Bytes of memory that the message of any request takes, about.
pub fn decoded_bytes(message: &[u8]) -> usize {
    message.len() + REQUEST.held_bytes(message)
}

// === impl Shape ===

impl Shape {
    /// What the fields of a message take, as far as it can be read: the decoder gets no
    /// farther.
    fn held_bytes(&self, mut message: &[u8]) -> usize {
        let mut bytes = 0;
        while let Some((number, value)) = next_field(&mut message) {
            let held = self.holds.iter().find(|(held, _)| *held == number);
            if let Some((_, shape)) = held {
                bytes += shape.takes + shape.held_bytes(value);
            }
        }
        bytes
    }
}

/// Takes a field from the front: its number, and its bytes if it has a length. None at
/// the end, and where no field can be read.
fn next_field<'a>(message: &mut &'a [u8]) -> Option<(u64, &'a [u8])> {
    let key = varint(message)?;
    let length = match key & 7 {
        0 => {
            varint(message)?;
            return Some((key >> 3, &[]));
        }
        1 => 8,
        2 => usize::try_from(varint(message)?).ok()?,
        5 => 4,
        // The brackets of a group, which proto3 has not: the fields in it come next.
        3 | 4 => 0,
        _ => return None,
    };
    let (value, rest) = message.split_at_checked(length)?;
    *message = rest;
    Some((key >> 3, if key & 7 == 2 { value } else { &[] }))
}

fn varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    fn group(key: &str, alerts: usize, labels: usize, group_by: usize) -> pb::AlertGroup {
        let labels: BTreeMap<_, _> = (0..labels)
            .map(|number| (format!("label{number}"), "value".to_owned()))
            .collect();
        let alert = |number| {
            let fingerprint = format!("{number:016x}");
            let alert = pb::Alert {
                fingerprint: fingerprint.clone(),
                labels: labels.clone(),
                annotations: labels.clone(),
                ..Default::default()
            };
            (fingerprint, alert)
        };
        pb::AlertGroup {
            key: key.into(),
            alerts: (0..alerts).map(alert).collect(),
            metadata: Some(pb::GroupMetadata {
                group_by: vec!["label".into(); group_by],
                ..Default::default()
            }),
        }
    }

    #[test]
    fn empty_groups_weigh_what_they_take() {
        let message = [0x0a, 0].repeat(1_000);
        let decoded = pb::StoreAllRequest::decode(&message[..]).unwrap();
        assert_eq!(decoded.groups.len(), 1_000);
        let takes = decoded.groups.capacity() * size_of::<pb::AlertGroup>();
        assert!((takes..3 * takes).contains(&decoded_bytes(&message)));
    }

    proptest! {
        /// The three requests that hold groups weigh more than what is in them, and not
        /// absurdly more.
        #[test]
        fn a_request_weighs_what_is_in_it(
            groups in 0usize..4,
            alerts in 0usize..5,
            labels in 0usize..5,
            group_by in 0usize..5,
        ) {
            let one = group("key", alerts, labels, group_by);
            let each = size_of::<pb::AlertGroup>()
                + group_by * size_of::<String>()
                + alerts * (size_of::<(String, pb::Alert)>() + 2 * labels * size_of::<(String, String)>());
            let store = pb::StoreRequest { group: Some(one.clone()), expiry: None };
            let swap = pb::CompareAndSwapRequest { group: Some(one.clone()), ..Default::default() };
            let all = pb::StoreAllRequest { groups: vec![one; groups], expiry: None };
            for (message, groups) in [
                (store.encode_to_vec(), 1),
                (swap.encode_to_vec(), 1),
                (all.encode_to_vec(), groups),
            ] {
                let least = message.len() + groups * each;
                let weight = decoded_bytes(&message);
                prop_assert!((least..=3 * least).contains(&weight), "{weight} for {least}");
            }
        }

        #[test]
        fn no_bytes_make_it_panic(message in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decoded_bytes(&message) >= message.len());
        }

        /// What the decoder reads is weighed to the end.
        #[test]
        fn fields_that_nobody_knows_are_passed_over(
            number in 16u64..1 << 29,
            wire in prop::sample::select(vec![0u64, 1, 2, 5]),
        ) {
            let mut unknown = Vec::new();
            prost::encoding::encode_varint(number << 3 | wire, &mut unknown);
            unknown.extend(match wire {
                0 => vec![0xff, 1],
                1 => vec![7; 8],
                2 => vec![3, 10, 0, 10],
                _ => vec![7; 4],
            });
            let message = [unknown, vec![0x0a, 0]].concat();
            prop_assert_eq!(pb::StoreAllRequest::decode(&message[..]).unwrap().groups.len(), 1);
            prop_assert_eq!(decoded_bytes(&message), message.len() + GROUP.takes);
        }
    }
}
