//! The reader of page tokens. The first line of an input is the prefix that is listed, the
//! rest is the token, and in another try what the token holds.

#![no_main]

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use groupstate::store::page_token::PageToken;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| {
    let Some((prefix, rest)) = input.split_once('\n') else {
        return;
    };
    for token in [rest, &URL_SAFE_NO_PAD.encode(rest)] {
        if let Ok(read) = PageToken::decode(token, prefix) {
            assert_eq!(read.encode(), token, "there is one token for each content");
            assert_eq!(read.prefix, prefix);
        }
    }
});
