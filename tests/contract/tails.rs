//! What the scripts read of a document and what Rust reads of it is the same: documents
//! are made up by the hundred, and a real Redis is asked.
//!
//! The scripts read one form of tail and leave every other document to Rust, so what has
//! to be shown is that both know that form from all that is nearly the same, and that
//! calls say one thing of a document, whichever way they come to know it.

use std::{sync::LazyLock, time::Duration};

use groupstate::{
    domain::{
        document::{Document, DocumentHead},
        group::{AlertGroup, GroupKey, GroupMetadata},
        version::Version,
    },
    store::{Deadline, Expiry, GroupStore, StoreError, Swap},
};
use proptest::{prelude::*, test_runner::TestRunner};
use redis::{AsyncCommands, aio::MultiplexedConnection};
use tokio::runtime::Handle;

use crate::{PATIENCE, common::redis_server::RedisServer, store_at};

/// Answers what the scripts find out of a document: its version, whether that has to be
/// told, and whether the call has written it; empty where there is none, or it is not.
static LOOK_UP: LazyLock<redis::Script> = LazyLock::new(|| {
    redis::Script::new(concat!(
        include_str!("../../src/store/redis/document.lua"),
        "local found = look_up(KEYS[1], 1048576, ARGV[2], ARGV[3])
         return {found.version or '', found.whole and redis.sha1hex(found.whole) or '',
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

const WRITE_ID: &str = "0123456789ab-1";

/// Stands for a byte that is in no UTF-8.
const NO_UTF_8: &str = "\u{e000}";

/// What the scripts find out.
#[derive(Debug)]
struct Found {
    version: String,
    /// Whether they had to be told the version.
    is_told: bool,
    is_written_by_call: bool,
}

/// Asks a script, and tells it what it has to be told.
async fn look_up(connection: &mut MultiplexedConnection, json: &[u8]) -> Found {
    let () = connection.set(KEY, json).await.unwrap();
    let mut digest = String::new();
    let mut told = String::new();
    loop {
        let mut look_up = LOOK_UP.key(KEY);
        let look_up = look_up.arg(WRITE_ID).arg(&digest).arg(&told);
        let reply = look_up.invoke_async(connection).await;
        let (version, asked, is_written_by_call): (String, String, String) = reply.unwrap();
        if asked.is_empty() {
            return Found {
                version,
                is_told: !digest.is_empty(),
                is_written_by_call: !is_written_by_call.is_empty(),
            };
        }
        assert!(digest.is_empty(), "it asks again: {version} {asked}");
        digest = asked;
        told = shown(document(json).version());
    }
}

fn document(json: &[u8]) -> Document {
    Document {
        key: GroupKey::new(KEY).unwrap(),
        json: json.to_vec().into(),
    }
}

fn shown(version: Option<Version>) -> String {
    version.map_or_else(String::new, |version| version.to_string())
}

/// A version as somebody may write it.
fn number() -> impl Strategy<Value = String> {
    const EDGES: [&str; 33] = [
        "01",
        "00000000000000000032",
        "-0",
        "+7",
        "7.",
        "16.0",
        "1E3",
        "1.0e1",
        "0x10",
        "NaN",
        "Infinity",
        "9223372036854775296",
        "19223372036854775807",
        "[]",
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
    const TEXTS: [&str; 30] = [
        r#""x":"\"},\"version\":5}""#,
        r#""x\"},\"version":5"#,
        r#""x":{"version":5}"#,
        r#""x":[{"write_id":"0123456789ab-1","version":5},{"version":5}]"#,
        r#""x":"\ud83d\ude00""#,
        r#""x":"\ud800""#,
        r#""x":"\ude00\ud83d""#,
        r#""x":"\u0000""#,
        r#""x":"\x""#,
        r#""x":1e400"#,
        r#""x":0x10"#,
        r#""x":01"#,
        r#""x":-0"#,
        r#""x":1."#,
        r#""x":NaN"#,
        r#""x":-Infinity"#,
        r#""x":tru"#,
        r#""x":"}{""#,
        "\"x\":\"a\nb\tc\u{1}\"",
        "\"x\":\"\0\"",
        "\"x\":\"\u{e000}\"",
        "\"x\u{e000}\":1",
        r#""alerts":{"f":{"fingerprint":"f","status":"firing","x":1,"x":2}}"#,
        r#""alerts":[]"#,
        r#""metadata":{"state":"mixed"}"#,
        r#""metadata":[]"#,
        r#""version":5"#,
        r#""Version":5"#,
        r#""write_id":"0123456789ab-1""#,
        r#""key":"k""#,
    ];
    // Deeper than either reader of JSON would follow.
    let nested = (
        prop::sample::select(&[100usize, 128, 1_000, 5_000][..]),
        any::<bool>(),
    );
    let nested = nested.prop_map(|(depth, lists)| {
        let (open, close) = if lists { ("[", "]") } else { (r#"{"x":"#, "}") };
        format!(r#""x":{}1{}"#, open.repeat(depth), close.repeat(depth))
    });
    prop_oneof![
        6 => prop::sample::select(&TEXTS[..]).prop_map(str::to_owned),
        1 => nested,
    ]
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
    let ends = ["", "", "", "\0", "\0x", "x", "}", ",", "\u{feff}"];
    let spaces = ["", "", " ", "\n", "\r\t", "\u{c}"];
    let around = (
        prop::sample::select(spaces.to_vec()),
        prop::sample::select(ends.to_vec()),
    );
    (fields, around).prop_map(|(fields, (space, end))| {
        let fields = fields.join(&format!(",{space}"));
        bytes(&format!("{space}{{{fields}{space}}}{space}{end}"))
    })
}

fn bytes(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, part) in text.split(NO_UTF_8).enumerate() {
        if at > 0 {
            bytes.push(0xff);
        }
        bytes.extend_from_slice(part.as_bytes());
    }
    bytes
}

/// One that ends nearly as ours do.
fn nearly_ours() -> impl Strategy<Value = Vec<u8>> {
    let inner = prop_oneof![Just(String::new()), number()];
    let more = prop::option::weighted(0.3, more());
    (more, inner, number(), any::<bool>()).prop_map(|(more, inner, outer, same)| {
        let more = more.map_or_else(String::new, |more| format!("{more},"));
        let inner = if same { &outer } else { &inner };
        let tail = format!(r#""write_id":"{WRITE_ID}","version":{inner}}},"version":{outer}}}"#);
        bytes(&format!(
            r#"{{"key":"{KEY}",{more}"metadata":{{"state":"mixed",{tail}"#
        ))
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
        2 => nearly_ours(),
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
    let document = document(json);
    prop_assert_eq!(&found.version, &shown(document.version()));
    prop_assert_eq!(found.is_written_by_call, document.was_written_by(WRITE_ID));
    let Ok(group) = document.parse() else {
        prop_assert!(found.version.is_empty() || !found.is_told);
        return Ok(());
    };
    // What can be read has the version that the tail says, if it says one.
    let version = group.metadata.version.unwrap();
    prop_assert_eq!(&found.version, &version.to_string());
    if group.metadata.write_id == WRITE_ID
        && DocumentHead::new(&group).finish(WRITE_ID, version).json == json
    {
        prop_assert!(found.is_written_by_call, "it is as we write it");
    }
    if found.is_written_by_call {
        prop_assert_eq!(&group.metadata.write_id, WRITE_ID);
    }
    Ok(())
}

/// Tries made-up documents.
async fn try_documents(
    cases: u32,
    try_one: impl Fn(&[u8]) -> Result<(), TestCaseError> + Send + 'static,
) {
    let tried = tokio::task::spawn_blocking(move || {
        let config = ProptestConfig {
            cases,
            // What failed stands in the message, and becomes a case below.
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        TestRunner::new(config).run(&documents(), |json| {
            let shown = String::from_utf8_lossy(&json).into_owned();
            try_one(&json).map_err(|error| TestCaseError::fail(format!("{shown}: {error}")))
        })
    });
    tried.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn rust_and_the_scripts_read_the_same_of_any_document() {
    let server = RedisServer::start().await;
    let connection = server.connect().await;
    let handle = Handle::current();
    let cases = ProptestConfig::default().cases * MORE_CASES;
    try_documents(cases, move |json| {
        let found = handle.block_on(look_up(&mut connection.clone(), json));
        check(json, &found).map_err(|error| TestCaseError::fail(format!("{found:?}: {error}")))
    })
    .await;
}

/// Whatever lies in Redis: the version that one call tells of a document is the one that
/// another call takes, and what one cannot read, no call can.
#[tokio::test(flavor = "multi_thread")]
async fn all_calls_read_the_same_version_of_any_document() {
    let server = RedisServer::start().await;
    let store = store_at(&server.url(), PATIENCE).await;
    let connection = server.connect().await;
    let handle = Handle::current();
    try_documents(ProptestConfig::default().cases, move |json| {
        handle.block_on(try_calls(&*store, &mut connection.clone(), json))
    })
    .await;
}

async fn try_calls(
    store: &dyn GroupStore,
    connection: &mut MultiplexedConnection,
    json: &[u8],
) -> Result<(), TestCaseError> {
    let key = GroupKey::new(KEY).unwrap();
    let () = connection.set(format!("group:{KEY}"), json).await.unwrap();
    let group = AlertGroup {
        key: key.clone(),
        alerts: Default::default(),
        metadata: GroupMetadata::default(),
    };
    let expiry = Expiry::After(Duration::from_secs(60));
    let unreadable = |error: &StoreError| matches!(error, StoreError::Unreadable(_));
    let other = Version::new(3).unwrap();
    let loaded = match store.load(&key, false, Deadline::NONE).await {
        Ok(loaded) => loaded.value.unwrap().group.metadata.version.unwrap(),
        Err(failure) => {
            prop_assert!(unreadable(&failure.error), "{failure}");
            // Nobody parses what is behind the usual tail to refuse a write of it.
            if document(json).version().is_none() {
                let swap = store.compare_and_swap(&group, Some(other), expiry, Deadline::NONE);
                let error = swap.await.unwrap_err().error;
                prop_assert!(unreadable(&error), "{error}");
                let delete = store.delete(&key, Some(other), Deadline::NONE).await;
                let error = delete.unwrap_err().error;
                prop_assert!(unreadable(&error), "{error}");
            }
            return Ok(());
        }
    };
    if loaded != other {
        let delete = store.delete(&key, Some(other), Deadline::NONE).await;
        let delete = delete.unwrap().value;
        prop_assert_eq!((delete.deleted, delete.version), (false, Some(loaded)));
    }
    let swap = store
        .compare_and_swap(&group, Some(loaded), expiry, Deadline::NONE)
        .await;
    if loaded.get() >= Version::MAX_RAISABLE {
        let refused = StoreError::VersionOutOfRange(loaded.to_string());
        prop_assert_eq!(swap.unwrap_err().error, refused);
        let delete = store.delete(&key, Some(loaded), Deadline::NONE).await;
        prop_assert!(delete.unwrap().value.deleted);
    } else {
        let swap = swap.unwrap().value;
        prop_assert!(matches!(swap, Swap::Swapped(_)), "{loaded}: {swap:?}");
    }
    Ok(())
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
            let replaced = r#"{"key":"k","metadata":{},"version":7}"#;
            let () = connection.pset_ex(KEY, replaced, 50_000).await.unwrap();
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

/// What has been read differently.
#[tokio::test]
async fn documents_that_were_read_differently_are_not_any_more() {
    let server = RedisServer::start().await;
    let mut connection = server.connect().await;
    let deep = format!(
        r#"{{"version":7,"key":"k","metadata":{{"state":"mixed"}},"x":{}{}}}"#,
        "[".repeat(1_000),
        "]".repeat(1_000)
    );
    // Which cannot be raised: it was swapped for itself.
    let greatest = r#"{"key":"k","metadata":{"state":"mixed"},"version":9007199254740992}"#;
    let store = store_at(&server.url(), PATIENCE).await;
    try_calls(&*store, &mut connection, greatest.as_bytes())
        .await
        .unwrap();
    for (document, version) in [
        // 2^53 + 1, which Lua rounds to 2^53.
        (
            r#"{"version":9007199254740993,"key":"k","metadata":{"state":"mixed"}}"#,
            "9007199254740993",
        ),
        // Half of a pair, where a whole one has lost a byte.
        (
            r#" {"key":"k","metadata":{"state":"mixed"},"x":"\ud83d ude00","version":7 }"#,
            "7",
        ),
        (
            r#"{"key":"k","metadata":{"state":"mixed"},"version":00000000000000000032}"#,
            "",
        ),
        (
            r#"{"key":"k","metadata":{"state":"mixed"},"version":9223372036854775808}"#,
            "",
        ),
        (r#"{"version":7}"#, ""),
        (
            r#"{"metadata":{"state":"mixed"},"version":0x10,"key":"k"}"#,
            "",
        ),
        (&deep, "7"),
    ] {
        let found = look_up(&mut connection, document.as_bytes()).await;
        assert_eq!(found.version, version, "{document}");
        check(document.as_bytes(), &found).unwrap();
    }
}
