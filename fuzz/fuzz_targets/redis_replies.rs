//! The readers of what Redis answers: replies of the scripts, and what a server says of
//! itself. `read_reply` says how an input is a reply.

#![no_main]

use groupstate::{
    domain::group::GroupKey,
    fuzzing::{read_info, read_reply},
    store::documents::WriteOutcome,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let key = GroupKey::new("k").expect("a key");
    if let Some(read) = read_reply(&key, input) {
        let current = match read.write {
            Some(WriteOutcome::Written(written)) => {
                assert!(written.version.get() > 0);
                None
            }
            Some(WriteOutcome::Conflict { current }) => current,
            None => None,
        };
        // A document is one of the values, untouched.
        for stored in [current, read.read.flatten()].into_iter().flatten() {
            let json = stored.document.json;
            let mut lines = input.split(|byte| *byte == b'\n');
            assert!(json.is_empty() || lines.any(|line| line == json));
        }
        if let Some(deletion) = read.delete {
            assert!(deletion.version.is_none_or(|version| version.get() > 0));
        }
    }
    if let Ok(text) = std::str::from_utf8(input)
        && let Some(info) = read_info("k", text)
    {
        assert!(info.run_id.len() + info.maxmemory_policy.len() <= text.len());
    }
});
