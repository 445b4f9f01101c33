//! What the scripts read of a document and what Rust reads of it is the same: documents
//! are made up by the hundred, and a real Redis is asked.

use std::sync::LazyLock;

use groupstate::{
    document::{Document, DocumentHead},
    group::{AlertGroup, GroupKey, GroupMetadata},
    version::Version,
};
use proptest::{prelude::*, test_runner::TestRunner};
use redis::{AsyncCommands, aio::MultiplexedConnection};
use tokio::runtime::Handle;

use crate::common::redis_server::RedisServer;

/// Answers what the scripts find out of a document: its version, whether that is not
/// exact, and whether the call has written it; empty where there is none, or it is not.
static LOOK_UP: LazyLock<redis::Script> = LazyLock::new(|| {
    redis::Script::new(concat!(
        include_str!("../../src/store/redis/document.lua"),
        "local found = look_up(KEYS[1], 1048576)
         return {found.version or '', found.inexact and '1' or '',
                 was_written_by(ARGV[1], found) and '1' or ''}"
    ))
});

/// The script that writes, at a time of ours.
fn write_at(seconds: &str) -> redis::Script {
    let source = concat!(
        include_str!("../../src/store/redis/document.lua"),
        include_str!("../../src/store/redis/write.lua")
    );
    let clock = "redis.call('TIME')";
    assert!(source.contains(clock));
    redis::Script::new(&source.replace(clock, &format!("{{'{seconds}', '16'}}")))
}

/// Times as many cases as proptest tries by itself.
const MORE_CASES: u32 = 8;
const KEY: &str = "k";

/// A field with half of a surrogate pair, which is no character.
const HALF_A_PAIR: &str = r#""x":"\ud800""#;
const WRITE_ID: &str = "0123456789ab-1";

/// What the scripts find out.
#[derive(Debug)]
struct Found {
    version: String,
    inexact: bool,
    is_written_by_call: bool,
}

async fn look_up(connection: &mut MultiplexedConnection, document: &[u8]) -> Found {
    let () = connection.set(KEY, document).await.unwrap();
    let mut look_up = LOOK_UP.key(KEY);
    let reply = look_up.arg(WRITE_ID).invoke_async(connection).await;
    let (version, inexact, is_written_by_call): (String, String, String) = reply.unwrap();
    Found {
        version,
        inexact: !inexact.is_empty(),
        is_written_by_call: !is_written_by_call.is_empty(),
    }
}

/// A version as somebody may write it.
fn number() -> impl Strategy<Value = String> {
    const EDGES: [&str; 19] = [
        "0",
        "1",
        "-1",
        "16",
        "007",
        "9007199254740991",
        "9007199254740992",
        "9007199254740993",
        "9007199254740994",
        "9223372036854775807",
        "9223372036854775808",
        "99999999999999999999999",
        "7.0",
        "1e3",
        "1e400",
        "null",
        "\"7\"",
        "true",
        "{}",
    ];
    prop_oneof![
        prop::sample::select(&EDGES[..]).prop_map(str::to_owned),
        any::<i64>().prop_map(|number| number.to_string()),
    ]
}

/// A field beside those that are known, or one of them again.
fn more() -> impl Strategy<Value = String> {
    const TEXTS: [&str; 12] = [
        r#""x":"\"},\"version\":5}""#,
        r#""x\"},\"version":5"#,
        r#""x":{"version":5}"#,
        r#""x":[{"write_id":"0123456789ab-1","version":5},{"version":5}]"#,
        r#""x":"\ud83d\ude00""#,
        HALF_A_PAIR,
        r#""x":1e400"#,
        r#""x":"}{""#,
        r#""version":5"#,
        r#""Version":5"#,
        r#""write_id":"0123456789ab-1""#,
        r#""key":"k""#,
    ];
    prop::sample::select(&TEXTS[..]).prop_map(str::to_owned)
}

/// A document with its fields in any order, mostly readable.
fn of_others() -> impl Strategy<Value = Vec<u8>> {
    let metadata = (
        prop::option::of(number()),
        prop::option::of(prop::sample::select(&[WRITE_ID, "", "x", "\\u0041"][..])),
    )
        .prop_map(|(version, write_id)| {
            let mut fields = vec![r#""state":"mixed""#.to_owned()];
            fields.extend(write_id.map(|id| format!(r#""write_id":"{id}""#)));
            fields.extend(version.map(|version| format!(r#""version":{version}"#)));
            format!(r#""metadata":{{{}}}"#, fields.join(","))
        });
    let version = number().prop_map(|version| format!(r#""version":{version}"#));
    let fields = (
        metadata,
        prop::option::weighted(0.9, version),
        prop::collection::vec(more(), 0..2),
    )
        .prop_map(|(metadata, version, more)| {
            let mut fields = vec![r#""key":"k""#.to_owned(), metadata];
            fields.extend(more);
            fields.extend(version);
            fields
        })
        .boxed();
    let fields = prop_oneof![fields.clone(), fields.prop_shuffle()];
    (fields, prop::sample::select(&["", " ", "\n"][..])).prop_map(|(fields, space)| {
        let fields = fields.join(&format!(",{space}"));
        format!("{space}{{{fields}{space}}}{space}").into_bytes()
    })
}

/// A document of ours, of which some text comes last before the tail.
fn ours() -> impl Strategy<Value = Vec<u8>> {
    (any::<Vec<String>>(), 1i64..).prop_map(|(group_by, version)| {
        let group = AlertGroup {
            key: GroupKey::new(KEY).unwrap(),
            alerts: Default::default(),
            metadata: GroupMetadata {
                group_by,
                ..GroupMetadata::default()
            },
        };
        let version = Version::new(version).unwrap();
        let document = DocumentHead::new(&group).finish(WRITE_ID, version);
        document.json.to_vec()
    })
}

fn documents() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => of_others(),
        2 => ours(),
        // Cut, or with another byte in it.
        1 => (of_others(), any::<prop::sample::Index>()).prop_map(|(mut json, at)| {
            json.truncate(at.index(json.len()));
            json
        }),
        1 => (of_others(), any::<prop::sample::Index>(), any::<u8>()).prop_map(
            |(mut json, at, byte)| {
                let at = at.index(json.len());
                json[at] = byte;
                json
            }
        ),
    ]
}

/// What holds for every document.
fn check(json: &[u8], found: &Found) -> Result<(), TestCaseError> {
    let document = Document {
        key: GroupKey::new(KEY).unwrap(),
        json: json.to_vec().into(),
    };
    let says = |version: Version| {
        if found.inexact {
            version.get() >= Version::MAX_RAISABLE
        } else {
            found.version == version.to_string()
        }
    };
    let read = document.parse();
    if let Ok(group) = &read {
        let version = group.metadata.version.unwrap();
        if found.version.is_empty() {
            // Rust passes over the fields that it does not know, and Redis reads all of
            // them: half of a surrogate pair is in one. Nobody is told another version.
            // (Redis reads 1e400 as well.)
            let small = String::from_utf8_lossy(json).replace("1e400", "1");
            let whole = serde_json::from_str::<serde_json::Value>(&small);
            let fault = whole.err().map(|error| error.to_string());
            prop_assert!(
                fault.as_ref().is_some_and(|fault| {
                    fault.contains("surrogate") || fault.contains("hex escape")
                }),
                "Redis cannot read it, and Rust says {fault:?}"
            );
            return Ok(());
        }
        prop_assert!(says(version), "read as {version}");
        prop_assert_eq!(document.version(), Some(version));
    }
    // What only the tail says is said by both.
    if let Some(version) = document.version() {
        prop_assert!(says(version), "the tail says {version}");
    }
    if let Ok(group) = &read
        && group.metadata.write_id == WRITE_ID
        && let Some(version) = group.metadata.version
        && DocumentHead::new(group).finish(WRITE_ID, version).json == json
    {
        prop_assert!(found.is_written_by_call, "it is as we write it");
    }
    if found.is_written_by_call {
        prop_assert!(document.was_written_by(WRITE_ID));
        if let Ok(group) = &read {
            prop_assert_eq!(&group.metadata.write_id, WRITE_ID);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rust_and_the_scripts_read_the_same_of_any_document() {
    let server = RedisServer::start().await;
    let connection = server.connect().await;
    let handle = Handle::current();
    let tried = tokio::task::spawn_blocking(move || {
        let default = ProptestConfig::default();
        let config = ProptestConfig {
            cases: default.cases * MORE_CASES,
            // What failed stands in the message, and becomes a case below.
            failure_persistence: None,
            ..default
        };
        TestRunner::new(config).run(&documents(), |json| {
            let mut connection = connection.clone();
            let found = handle.block_on(look_up(&mut connection, &json));
            let shown = String::from_utf8_lossy(&json).into_owned();
            check(&json, &found)
                .map_err(|error| TestCaseError::fail(format!("{shown}: {found:?}: {error}")))
        })
    });
    tried.await.unwrap().unwrap();
}

/// A version is put into a document where it is stored, if that can be done; what is
/// stored is the same if not.
#[tokio::test]
async fn a_version_is_written_in_any_length_and_with_any_rights() {
    let server = RedisServer::start().await;
    let mut connection = server.connect().await;
    let group = AlertGroup {
        key: GroupKey::new(KEY).unwrap(),
        alerts: Default::default(),
        metadata: GroupMetadata::default(),
    };
    let head = DocumentHead::new(&group);
    for (rights, seconds, version) in [
        ("+setrange", "1795612700", 1_795_612_700_000_016),
        ("-setrange", "1795612700", 1_795_612_700_000_016),
        ("+setrange", "17956127", 17_956_127_000_016),
        ("+setrange", "0", 16),
    ] {
        let () = redis::cmd("ACL")
            .arg(&["SETUSER", "default", rights])
            .query_async(&mut connection)
            .await
            .unwrap();
        for keeps in ["", "1"] {
            let () = connection.pset_ex(KEY, "replaced", 50_000).await.unwrap();
            let _: redis::Value = write_at(seconds)
                .key(KEY)
                .arg(&head.unversioned(WRITE_ID)[..])
                .arg(&["any", "60000", keeps, "9999999999999999", WRITE_ID, "", ""])
                .arg(&["16384", "1048576"])
                .invoke_async(&mut connection)
                .await
                .unwrap();
            let stored: Vec<u8> = connection.get(KEY).await.unwrap();
            let whole = head.finish(WRITE_ID, Version::new(version).unwrap());
            assert_eq!(stored, whole.json, "{rights} {seconds} {keeps}");
            let left: i64 = connection.pttl(KEY).await.unwrap();
            assert_eq!(left <= 50_000, !keeps.is_empty(), "{left}");
        }
    }
}

/// What has been read differently, or was taken for that.
#[tokio::test]
async fn documents_that_were_read_differently_are_not_any_more() {
    let server = RedisServer::start().await;
    let mut connection = server.connect().await;
    // 2^53 + 1, which Lua rounds to 2^53.
    let rounded = br#"{"version":9007199254740993,"key":"k","metadata":{"state":"mixed"}}"#;
    let found = look_up(&mut connection, rounded).await;
    assert!(found.inexact, "{found:?}");
    check(rounded, &found).unwrap();

    // Half of a pair, where a whole one has lost a byte.
    let half = br#" {"key":"k","metadata":{"state":"mixed"},"x":"\ud83d ude00","version":7 }"#;
    let found = look_up(&mut connection, half).await;
    assert_eq!(found.version, "");
    check(half, &found).unwrap();
}
