//! etcd, to stand beside: what another keeper of small values makes of two cores. Its
//! Range and Put are our Load and Store, without a deadline, a merge or a script.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message;
use tempfile::TempDir;

use super::load::{RawClient, encode, key_of};
use crate::common::{Process, free_address, tool};

pub const RANGE: &str = "/etcdserverpb.KV/Range";
pub const PUT: &str = "/etcdserverpb.KV/Put";

const STARTS_WITHIN: Duration = Duration::from_secs(20);

/// A member of its own, whose data are in memory.
pub struct Etcd {
    process: Process,
    addr: String,
    _data: TempDir,
}

#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

pub fn range_request() -> Bytes {
    encode(&RangeRequest {
        key: key_of(0).into(),
    })
}

pub fn put_request(bytes: usize) -> Bytes {
    encode(&PutRequest {
        key: key_of(0).into(),
        value: vec![b'x'; bytes].into(),
    })
}

impl Etcd {
    pub async fn start() -> Self {
        // The speed of a disk is not what is compared.
        let data = tempfile::tempdir_in("/dev/shm").expect("a file system in memory");
        let [client, peer] = [free_address(), free_address()];
        let [client_url, peer_url] = [client, peer].map(|addr| format!("http://{addr}"));
        let mut command = Command::new(tool("bench/etcd"));
        command
            .args(["--log-level", "error", "--data-dir"])
            .arg(data.path())
            .args(["--listen-client-urls", &client_url])
            .args(["--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url])
            .args(["--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("default={peer_url}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let etcd = Self {
            process: Process::spawn(&mut command, "run `make bench`"),
            addr: client.to_string(),
            _data: data,
        };
        let begin = Instant::now();
        while tokio::net::TcpStream::connect(&etcd.addr).await.is_err() {
            assert!(begin.elapsed() < STARTS_WITHIN, "etcd does not start");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        etcd
    }

    pub fn addr(&self) -> &str {
        &self.addr
    }

    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// Puts a value of this size where [`range_request`] looks.
    pub async fn put(&self, bytes: usize) {
        let client = RawClient::connect(&self.addr, 1).await;
        client.call(0, PUT, put_request(bytes)).await.unwrap();
    }
}
