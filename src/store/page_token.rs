//! Page tokens: where a listing goes on, and on which server.
//!
//! Opaque to clients; URL-safe. A token names the server that made its cursor,
//! since a cursor is worthless on any other.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use super::{Backend, StoreError};

/// The content of a page token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageToken {
    #[serde(rename = "b")]
    pub backend: Backend,
    /// `run_id` of the Redis server, or the id of the instance.
    #[serde(rename = "s")]
    pub server: String,
    /// Where to go on.
    #[serde(rename = "c")]
    pub cursor: String,
    /// The prefix that is listed.
    #[serde(rename = "p")]
    pub prefix: String,
}

// === impl PageToken ===

impl PageToken {
    pub fn encode(&self) -> String {
        let json = serde_json::to_vec(self).expect("a struct of strings always serializes");
        URL_SAFE_NO_PAD.encode(json)
    }

    /// Reads a token for a listing of `prefix`: as [`Self::encode`] made it, and in no
    /// other spelling.
    pub fn decode(token: &str, prefix: &str) -> Result<Self, StoreError> {
        let unreadable = StoreError::InvalidPageToken("this is not a page token of this service");
        let Ok(json) = URL_SAFE_NO_PAD.decode(token) else {
            return Err(unreadable);
        };
        let token = match serde_json::from_slice::<Self>(&json) {
            Ok(read) if read.encode() == token => read,
            _ => return Err(unreadable),
        };
        if token.prefix != prefix {
            return Err(StoreError::InvalidPageToken(
                "this page token belongs to a listing of another prefix",
            ));
        }
        Ok(token)
    }

    /// Whether `server` of `backend` made this token's cursor.
    pub fn check_server(&self, backend: Backend, server: &str) -> Result<(), StoreError> {
        if self.backend == backend && self.server == server {
            Ok(())
        } else {
            Err(StoreError::ListingRestarted)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn another_spelling_of_a_token_is_none() {
        let token = r#"{"b":"redis","s":"a","c":"0:1","p":""}"#;
        let decode = |json: &str| PageToken::decode(&URL_SAFE_NO_PAD.encode(json), "");
        assert!(decode(token).is_ok());
        for other in [
            r#"["redis","a","0:1",""]"#,
            r#"{"s":"a","b":"redis","c":"0:1","p":""}"#,
            r#"{"b":"redis","s":"\u0061","c":"0:1","p":""}"#,
            r#"{"b":"redis","s":"a","c":"0:1","p":""} "#,
        ] {
            assert!(decode(other).is_err(), "{other}");
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(server in ".*", cursor in ".*", prefix in ".*") {
            let token = PageToken { backend: Backend::Redis, server, cursor, prefix };
            let text = token.encode();
            prop_assert!(text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_'));
            prop_assert_eq!(PageToken::decode(&text, &token.prefix), Ok(token.clone()));
            let other = format!("{}x", token.prefix);
            prop_assert!(matches!(
                PageToken::decode(&text, &other),
                Err(StoreError::InvalidPageToken(_))
            ));
            prop_assert_eq!(token.check_server(Backend::Redis, &token.server), Ok(()));
            prop_assert_eq!(
                token.check_server(Backend::Memory, &token.server),
                Err(StoreError::ListingRestarted)
            );
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in ".*", prefix in ".*") {
            prop_assert!(matches!(
                PageToken::decode(&text, &prefix),
                Err(StoreError::InvalidPageToken(_))
            ));
        }
    }
}
