//! The validation of requests: an input is the message of each of them.

#![no_main]

use std::time::Duration;

use groupstate::{
    domain::{document::DocumentHead, group::AlertGroup, version::Version},
    grpc::{
        convert, proto as pb,
        validation::{
            ExpiryField, Limits, MIN_TTL, Violations, expected_version, stored_group,
            version_to_delete,
        },
    },
    store::{Backend, Expiry},
};
use libfuzzer_sys::fuzz_target;
use prost::Message;

/// Small ones, which an input of few bytes can reach.
const LIMITS: Limits = Limits {
    max_key_bytes: 64,
    max_alerts_per_group: 8,
    max_groups_per_batch: 8,
    default_ttl: Duration::from_secs(24 * 3_600),
    max_ttl: Duration::from_secs(30 * 24 * 3_600),
};

/// What every document has, and what a byte of a message takes at most in one: in JSON
/// a control character is six, and an alert has the names of all its fields.
const LEAST_BYTES: usize = 1_024;
const BYTES_PER_BYTE: usize = 32;

/// Clients take so much of headers, of which the details of a status are a part.
const MOST_DETAILS: usize = 6 * 1_024;

fuzz_target!(|message: &[u8]| {
    if let Ok(request) = pb::StoreRequest::decode(message) {
        let mut violations = Violations::default();
        let group = LIMITS.group(format_args!("group"), request.group, &mut violations);
        let expiry = expiry(request.expiry.map(Into::into), &mut violations);
        check(violations, group.zip(expiry), |(group, _)| {
            assert_kept(group, message)
        });
    }
    if let Ok(request) = pb::CompareAndSwapRequest::decode(message) {
        let mut violations = Violations::default();
        let expected = expected_version(request.expected_version, &mut violations);
        let group = LIMITS.group(format_args!("group"), request.group, &mut violations);
        let expiry = expiry(request.expiry.map(Into::into), &mut violations);
        check(violations, group.zip(expected).zip(expiry), |both| {
            assert_kept(both.0.0, message)
        });
    }
    if let Ok(request) = pb::StoreAllRequest::decode(message) {
        let sent = request.groups.len();
        match LIMITS.batch(request.groups) {
            Ok(batch) => {
                assert_eq!(batch.len(), sent);
                for (key, group) in batch {
                    match group {
                        Ok(group) => {
                            assert_eq!(group.key.as_str(), key);
                            assert_kept(group, message);
                        }
                        Err(error) => {
                            error.into_group_error(key);
                        }
                    }
                }
            }
            Err(error) => {
                let status = error.into_status("id", Backend::Memory);
                assert_small(status.message(), status.details());
            }
        }
    }
    if let Ok(request) = pb::DeleteRequest::decode(message) {
        let mut violations = Violations::default();
        let key = LIMITS.key(format_args!("key"), request.key, &mut violations);
        let version = version_to_delete(request.expected_version, &mut violations);
        check(violations, key.zip(version), |(key, version)| {
            assert!(key.as_str().len() <= LIMITS.max_key_bytes);
            assert_eq!(version.map(Version::get), request.expected_version);
        });
    }
    if let Ok(request) = pb::ListKeysRequest::decode(message) {
        if let Ok(prefix) = LIMITS.prefix(request.prefix) {
            assert!(prefix.len() <= LIMITS.max_key_bytes);
        }
        if let Ok(size) = LIMITS.page_size(request.page_size) {
            assert!((1..=10_000).contains(&size));
        }
    }
    // What a service sends, as a client takes it.
    if let Ok(group) = pb::AlertGroup::decode(message)
        && let Ok(group) = stored_group(group)
    {
        assert_eq!(stored_group(convert::group(group.clone())), Ok(group));
    }
});

fn expiry(field: Option<ExpiryField>, violations: &mut Violations) -> Option<Expiry> {
    let expiry = LIMITS.expiry(field, violations)?;
    let (Expiry::After(ttl) | Expiry::Keep { otherwise: ttl }) = expiry;
    assert!((MIN_TTL..=LIMITS.max_ttl).contains(&ttl));
    Some(expiry)
}

/// What is valid has no violations; what is not is told in few words.
fn check<T>(violations: Violations, value: Option<T>, valid: impl FnOnce(T)) {
    match violations.check(value) {
        Ok(value) => valid(value),
        Err(error) => {
            let status = error.into_status("id", Backend::Memory);
            assert_small(status.message(), status.details());
        }
    }
}

fn assert_small(message: &str, details: &[u8]) {
    assert!(message.len() + details.len() <= MOST_DETAILS);
}

/// A valid group is the same after it was sent to a client, and after it was stored.
fn assert_kept(group: AlertGroup, message: &[u8]) {
    assert_eq!(
        stored_group(convert::group(group.clone())).as_ref(),
        Ok(&group)
    );
    let head = DocumentHead::new(&group);
    assert!(head.stored_bytes() <= LEAST_BYTES + BYTES_PER_BYTE * message.len());
    let stored = head.finish("id", Version::FIRST);
    assert!(stored.json.len() <= head.stored_bytes());
    let mut read = stored.parse().expect("what is written is read");
    read.metadata.version = None;
    read.metadata.write_id = String::new();
    assert_eq!(read, group);
}
