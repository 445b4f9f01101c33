//! The reader of the URL of Redis: an input is one. Where it holds [`PASSWORD`] once, nothing
//! that is shown does.

#![no_main]

use std::time::Duration;

use groupstate::store::redis::{RedisFiles, RedisSettings};
use libfuzzer_sys::fuzz_target;

const PASSWORD: &str = "s3cret";

fuzz_target!(|url: &str| {
    let settings = RedisSettings::new(url, RedisFiles::default(), 4, Duration::from_secs(1));
    let settings = match settings {
        Ok(settings) => settings,
        Err(error) => {
            assert!(!error.contains(PASSWORD), "{error}");
            assert!(!error.contains('\n'), "{error}");
            return;
        }
    };
    let access = settings.access().expect("there are no files");
    let shown = format!("{settings:?}");
    let is_password = access
        .credentials
        .password
        .as_ref()
        .is_some_and(|password| password.contains(PASSWORD));
    // Once, however it is spelled: line breaks and tabs are passed over, and % may be any
    // letter.
    let without = url.replace(['\r', '\n', '\t'], "");
    if is_password && without.matches(PASSWORD).count() == 1 && !without.contains('%') {
        assert!(!shown.contains(PASSWORD), "{shown}");
    }
    // Nothing of the URL is lost: whoever forgets to escape a password is told.
    assert!(!url.contains('#'));
    // What fred makes of it.
    let _ = access.config(None);
});
