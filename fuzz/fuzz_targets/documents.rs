//! The reader of stored documents. The first line of an input is the key under which the
//! rest is stored.

#![no_main]

use groupstate::domain::{
    document::{Document, DocumentHead},
    group::GroupKey,
    version::Version,
};
use libfuzzer_sys::fuzz_target;

/// What every document has, and what a byte of a group that was read takes at most when
/// it is written: an alert gets all of its fields.
const LEAST_BYTES: usize = 512;
const BYTES_PER_BYTE: usize = 8;

/// What a message about a document may take for each byte of it: escapes.
const REASON_BYTES_PER_BYTE: usize = 10;

fuzz_target!(|input: &[u8]| {
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
        return;
    };
    let Some(key) = std::str::from_utf8(&input[..end])
        .ok()
        .and_then(|key| GroupKey::new(key).ok())
    else {
        return;
    };
    let json = &input[end + 1..];
    let document = Document {
        key,
        json: json.to_vec().into(),
    };
    let in_tail = document.version();
    let group = match document.parse() {
        Ok(group) => group,
        Err(unreadable) => {
            assert!(unreadable.reason.len() <= LEAST_BYTES + REASON_BYTES_PER_BYTE * json.len());
            return;
        }
    };

    // The tail says the same as the whole.
    assert_eq!(in_tail, group.metadata.version);

    // What was read is written, and is read back.
    let head = DocumentHead::new(&group);
    let version = Version::new(i64::MAX).expect("it is positive");
    let written = head.finish("0123456789ab-s1", version);
    assert!(written.json.len() <= head.stored_bytes());
    assert!(head.stored_bytes() <= LEAST_BYTES + BYTES_PER_BYTE * input.len());
    assert_eq!(written.version(), Some(version));
    assert!(written.was_written_by("0123456789ab-s1"));
    let mut expected = group;
    expected.metadata.version = Some(version);
    expected.metadata.write_id = "0123456789ab-s1".into();
    assert_eq!(written.parse().as_ref(), Ok(&expected));
});
