//! Faults, made to happen to a real Redis and to the connections to it.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::Path,
    time::Duration,
};

use redis::{FromRedisValue, cmd};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::{Instant, sleep, sleep_until},
};

use super::schedule::{Fault, Step};
use crate::common::{
    fault_proxy::FaultProxy,
    redis_server::{self, RedisServer},
};

/// A Redis, and the ways of the instances to it.
pub struct Site {
    pub redis: RedisServer,
    /// One for each instance; none when they connect directly.
    pub proxies: Vec<FaultProxy>,
    persists: bool,
}

/// Redis must answer writes this soon after the end of a fault, or the fault is
/// not what it is meant to be.
const WRITABLE_WITHIN: Duration = Duration::from_secs(10);

// === impl Site ===

impl Site {
    /// `proxies`: how many ways with faults lead to Redis.
    pub async fn start(persists: bool, proxies: usize) -> Self {
        // Uncompressed, so that reading a file stops for clients often enough.
        let mut settings = vec!["--rdbcompression", "no"];
        if redis_server::version() >= (7, 0) {
            // Before, nothing was protected.
            settings.extend(["--enable-protected-configs", "yes"]);
        }
        if persists {
            settings.extend(["--appendonly", "yes", "--appendfsync", "always"]);
        }
        let redis = RedisServer::start_with(&settings).await;
        let mut site = Self {
            proxies: Vec::new(),
            redis,
            persists,
        };
        for _ in 0..proxies {
            site.proxies
                .push(FaultProxy::start(site.redis.addr()).await);
        }
        site
    }

    /// Where an instance finds Redis.
    pub fn addr_for(&self, instance: usize) -> SocketAddr {
        match self.proxies.get(instance) {
            Some(proxy) => proxy.addr(),
            None => self.redis.addr(),
        }
    }

    /// Whether a fault takes all data away.
    pub fn is_wiped_by(&self, fault: Fault) -> bool {
        fault == Fault::Kill && !self.persists
    }

    /// Makes a fault happen; returns at its end.
    pub async fn strike(&mut self, step: &Step) {
        let end = Instant::now() + step.length;
        match step.fault {
            Fault::Kill => {
                self.redis.kill();
                sleep_until(end).await;
                self.redis.launch_again(&[]);
            }
            Fault::Loading(duration) => self.strike_by_loading(step.length, duration).await,
            Fault::Hang => {
                self.redis.process().signal("STOP");
                sleep_until(end).await;
                self.redis.process().signal("CONT");
            }
            Fault::Pause { writes_only } => {
                let millis = step.length.as_millis().to_string();
                let mut command = vec!["CLIENT", "PAUSE", &millis];
                if redis_server::version() >= (6, 2) {
                    command.push(if writes_only { "WRITE" } else { "ALL" });
                }
                self.admin(&command).await;
                // Redis ends it by itself.
                sleep_until(end).await;
            }
            Fault::ReadOnly { serve_stale } => self.strike_by_following(end, serve_stale).await,
            Fault::OutOfMemory => {
                self.configure("maxmemory", "1").await;
                sleep_until(end).await;
                self.configure("maxmemory", "0").await;
            }
            Fault::Misconfigured => self.strike_by_failing_saves(end).await,
            Fault::FlapHang(period) => {
                while Instant::now() < end {
                    self.redis.process().signal("STOP");
                    sleep(period).await;
                    self.redis.process().signal("CONT");
                    sleep(period).await;
                }
            }
            Fault::Failover(_) => unreachable!("{step}: there is no replica"),
            Fault::Delay(_)
            | Fault::Reset
            | Fault::BlackHole { .. }
            | Fault::Partition
            | Fault::Refuse
            | Fault::FlapReset(_)
            | Fault::Stragglers(_) => self.strike_the_network(step, end).await,
        }
    }

    async fn strike_the_network(&mut self, step: &Step, end: Instant) {
        let mut struck: Vec<&mut FaultProxy> = self
            .proxies
            .iter_mut()
            .enumerate()
            .filter_map(|(instance, proxy)| step.strikes(instance).then_some(proxy))
            .collect();
        assert!(!struck.is_empty(), "{step}: no proxy");
        match step.fault {
            Fault::Delay(delay) => {
                for proxy in &struck {
                    proxy.delay(delay);
                }
                sleep_until(end).await;
                for proxy in &struck {
                    proxy.delay(Duration::ZERO);
                }
            }
            Fault::Reset => {
                for proxy in &struck {
                    proxy.reset_all();
                }
            }
            Fault::BlackHole {
                direction,
                reset_after,
            } => {
                for proxy in &struck {
                    proxy.swallow(direction);
                }
                sleep_until(end).await;
                for proxy in &struck {
                    proxy.stop_swallowing();
                    if reset_after {
                        proxy.reset_all();
                    }
                }
            }
            Fault::Partition => {
                for proxy in &struck {
                    proxy.hold();
                }
                sleep_until(end).await;
                for proxy in &struck {
                    proxy.release();
                }
            }
            Fault::Refuse => {
                for proxy in &mut struck {
                    proxy.refuse().await;
                    proxy.reset_all();
                }
                sleep_until(end).await;
                for proxy in &mut struck {
                    proxy.accept().await;
                }
            }
            Fault::FlapReset(period) => {
                while Instant::now() < end {
                    for proxy in &struck {
                        proxy.reset_all();
                    }
                    sleep(period).await;
                }
            }
            Fault::Stragglers(delay) => {
                for proxy in &struck {
                    proxy.divert(delay);
                }
                sleep_until(end).await;
                for proxy in &struck {
                    proxy.stop_swallowing();
                    proxy.reset_all();
                }
            }
            _ => unreachable!("{step} is not of the network"),
        }
    }

    /// Kills Redis, and starts it so that reading its file takes `duration`.
    async fn strike_by_loading(&mut self, length: Duration, duration: Duration) {
        assert!(self.persists, "nothing to load");
        // All groups go into one base file: while Redis reads that it answers,
        // with LOADING.
        self.admin(&["BGREWRITEAOF"]).await;
        loop {
            let info: String = self.ask(&["INFO", "persistence"]).await;
            if info.contains("aof_rewrite_in_progress:0")
                && info.contains("aof_rewrite_scheduled:0")
            {
                break;
            }
            sleep(Duration::from_millis(5)).await;
        }
        let keys: u64 = self.ask(&["DBSIZE"]).await;
        self.redis.kill();
        sleep(length).await;
        // It pauses for each key of the base file and for each command behind it.
        let pauses = keys.max(1) + commands_behind_base(self.redis.folder());
        let micros = duration.as_micros() / u128::from(pauses);
        let micros = micros.to_string();
        let mut settings = vec!["--key-load-delay", &micros];
        if redis_server::version() >= (7, 0) {
            // Before, it answers nobody while it reads so little.
            settings.extend(["--loading-process-events-interval-bytes", "1024"]);
        }
        self.redis.launch_again(&settings);
    }

    /// Makes Redis a replica of a primary that accepts connections and says
    /// nothing, so that nothing is ever copied from it.
    async fn strike_by_following(&mut self, end: Instant, serve_stale: bool) {
        let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = silent.local_addr().expect("it is bound").port().to_string();
        let stale = if serve_stale { "yes" } else { "no" };
        self.configure("replica-serve-stale-data", stale).await;
        self.admin(&["REPLICAOF", "127.0.0.1", &port]).await;
        sleep_until(end).await;
        self.admin(&["REPLICAOF", "NO", "ONE"]).await;
        self.configure("replica-serve-stale-data", "yes").await;
    }

    /// Makes saving fail: even root cannot write into a folder that is gone.
    async fn strike_by_failing_saves(&mut self, end: Instant) {
        let folder = self.redis.folder().to_owned();
        let gone = folder.join("gone");
        std::fs::create_dir_all(&gone).expect("a folder of the test");
        self.configure("dir", &gone.display().to_string()).await;
        std::fs::remove_dir(&gone).expect("it is empty");
        self.configure("stop-writes-on-bgsave-error", "yes").await;
        self.configure("save", "3600 1").await;
        self.admin(&["BGSAVE"]).await;
        sleep_until(end).await;
        // In this order: it must never save for real.
        self.configure("save", "").await;
        let folder = folder.display().to_string();
        self.configure("dir", &folder).await;
    }

    async fn configure(&self, name: &str, value: &str) {
        self.admin(&["CONFIG", "SET", name, value]).await;
    }

    async fn admin(&self, command: &[&str]) {
        let _: redis::Value = self.ask(command).await;
    }

    async fn ask<T: FromRedisValue>(&self, command: &[&str]) -> T {
        let mut connection = self.redis.connect().await;
        let answer = cmd(command[0])
            .arg(&command[1..])
            .query_async(&mut connection)
            .await;
        answer.unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// Waits until no request is left that may reach Redis late.
    pub async fn wait_for_stragglers(&self) {
        for proxy in &self.proxies {
            proxy.late_requests().have_arrived().await;
        }
    }

    /// Waits until everybody who was struck can write to Redis on a new
    /// connection.
    pub async fn wait_until_writable(&self, step: &Step) {
        let begin = Instant::now();
        for instance in 0..self.proxies.len().max(1) {
            if !step.strikes(instance) && !self.proxies.is_empty() {
                continue;
            }
            let addr = self.addr_for(instance);
            let soon = Duration::from_millis(200);
            while ask(addr, "SET chaos:probe 1", soon).await.ok().as_deref() != Some("+OK") {
                assert!(
                    begin.elapsed() < WRITABLE_WITHIN,
                    "{step}: Redis does not recover"
                );
                sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

/// Sends a command on a new connection; the first line of the answer.
pub async fn ask(addr: SocketAddr, command: &str, bound: Duration) -> io::Result<String> {
    let exchange = async {
        let mut connection = BufReader::new(TcpStream::connect(addr).await?);
        connection
            .write_all(format!("{command}\r\n").as_bytes())
            .await?;
        let mut line = String::new();
        match connection.read_line(&mut line).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    };
    tokio::time::timeout(bound, exchange).await?
}

/// Number of commands in the append-only files of Redis: what was written since, or while,
/// it wrote its base file.
fn commands_behind_base(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).expect("a folder of the test");
    let counts = entries.map(|entry| {
        let path = entry.expect("a folder of the test").path();
        if path.is_dir() {
            commands_behind_base(&path)
        } else if path.extension().is_some_and(|extension| extension == "aof") {
            let bytes = std::fs::read(&path).expect("Redis is dead and its file is there");
            // JSON has no line breaks.
            bytes.windows(2).filter(|pair| pair == b"\n*").count() as u64
        } else {
            0
        }
    });
    counts.sum()
}
