//! Faults, made to happen to a real Redis and to the connections to it.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::Path,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use redis::{FromRedisValue, cmd};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::sleep,
};

use super::{
    fault_proxy::{Direction, FaultProxy},
    free_address,
    redis_server::{self, RedisServer},
    replicated::Failure,
    stalls::{Bound, within},
    wall_clock::WallClock,
};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Redis is killed and started again at the end.
    Kill,
    /// Redis is killed, started again at the end, and reads its file for about
    /// this long, answering `LOADING`. Only one that persists.
    Loading(Duration),
    /// Redis is stopped (SIGSTOP), and continues at the end.
    Hang,
    /// `CLIENT PAUSE`: all commands, or only writes.
    Pause { writes_only: bool },
    /// Redis follows a primary that never answers: writes get `READONLY`;
    /// unless stale data is served, everything gets `MASTERDOWN`.
    ReadOnly { serve_stale: bool },
    /// Writes get `OOM`.
    OutOfMemory,
    /// Redis cannot save: writes get `MISCONF`.
    Misconfigured,
    /// Every byte arrives later by this, each way.
    Delay(Duration),
    /// All connections are reset, once.
    Reset,
    /// Bytes vanish; at the end old connections are reset, or stay dead.
    BlackHole {
        direction: Direction,
        reset_after: bool,
    },
    /// Bytes wait, and arrive at the end.
    Partition,
    /// Connections are reset and new ones refused.
    Refuse,
    /// Redis hangs and continues, each for this long, in turn.
    FlapHang(Duration),
    /// All connections are reset again and again, with this pause.
    FlapReset(Duration),
    /// Requests get stuck, and at the end old connections are reset; this long
    /// after that the requests reach Redis. No seed draws it: it came later than
    /// seeds that must mean what they meant.
    Stragglers(Duration),
    /// A script runs until the end: at first Redis is silent, then everything gets
    /// `BUSY`. No seed draws it either, nor those below.
    BusyScript,
    /// The password of the service is another one, and all connections are ended:
    /// new ones get `WRONGPASS`.
    Password,
    /// Connections are reset, and new ones accepted and closed at once.
    AcceptAndClose,
    /// A primary fails, and a replica takes over, which is the end; the primary
    /// comes back later. Only where there is a replica.
    Failover(Failure),
    /// The same with replicas that have not heard of the primary for the length of the
    /// fault.
    LaggingFailover(Failure),
    /// Redis comes back, at the end, as it was at the beginning. Only one that keeps
    /// nothing.
    Rewind,
    /// The address leads to another server, which is empty; connections to the server of
    /// before stay where they are, but for every other one that is reset, until it is
    /// gone, at the end.
    Move,
    /// The wall clock of Redis is moved by so many milliseconds.
    ClockOfRedis(i64),
    /// The ways carry so many bytes a second.
    SlowLink(usize),
    /// Slots move from one primary to another, and stay there. Only in a cluster.
    MoveSlots,
    /// An instance of the service is stopped (SIGSTOP), and continues at the end.
    StopService,
    /// The wall clock of an instance is moved by so many milliseconds.
    ClockOfService(i64),
}

/// A Redis, and the ways of the instances to it.
pub struct Site {
    pub redis: RedisServer,
    /// One for each instance; none when they connect directly.
    pub proxies: Vec<FaultProxy>,
    clock: Arc<WallClock>,
    settings: Vec<&'static str>,
    persists: bool,
}

/// Redis must answer writes this soon after the end of a fault, or the fault is
/// not what it is meant to be.
const WRITABLE_WITHIN: Duration = Duration::from_secs(10);
/// Redis answers a command of the test within this.
const PATIENCE: Duration = Duration::from_secs(10);

// === impl Fault ===

impl Fault {
    /// Whether it is a fault of connections rather than of Redis.
    pub fn is_of_the_network(self) -> bool {
        matches!(
            self,
            Self::Delay(_)
                | Self::Reset
                | Self::BlackHole { .. }
                | Self::Partition
                | Self::Refuse
                | Self::FlapReset(_)
                | Self::Stragglers(_)
                | Self::AcceptAndClose
                | Self::SlowLink(_)
        )
    }

    /// Whether it happens to the service itself.
    pub fn is_of_the_service(self) -> bool {
        matches!(self, Self::StopService | Self::ClockOfService(_))
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Loading(_) => "loading",
            Self::Hang => "hang",
            Self::Pause { writes_only: false } => "pause",
            Self::Pause { writes_only: true } => "pause-writes",
            Self::ReadOnly { serve_stale: true } => "readonly",
            Self::ReadOnly { serve_stale: false } => "masterdown",
            Self::OutOfMemory => "oom",
            Self::Misconfigured => "misconf",
            Self::Delay(_) => "delay",
            Self::Reset => "reset",
            Self::BlackHole { direction, .. } => match direction {
                Direction::ToServer => "blackhole-out",
                Direction::FromServer => "blackhole-in",
                Direction::Both => "blackhole",
            },
            Self::Partition => "partition",
            Self::Refuse => "refuse",
            Self::FlapHang(_) => "flap-hang",
            Self::FlapReset(_) => "flap-reset",
            Self::Stragglers(_) => "stragglers",
            Self::BusyScript => "busy-script",
            Self::Password => "password",
            Self::AcceptAndClose => "accept-and-close",
            Self::Failover(Failure::Kill) => "failover-kill",
            Self::Failover(Failure::Hang) => "failover-hang",
            Self::LaggingFailover(Failure::Kill) => "lagging-failover-kill",
            Self::LaggingFailover(Failure::Hang) => "lagging-failover-hang",
            Self::Rewind => "rewind",
            Self::Move => "move",
            Self::ClockOfRedis(_) => "redis-clock",
            Self::SlowLink(_) => "slow-link",
            Self::MoveSlots => "move-slots",
            Self::StopService => "stop-service",
            Self::ClockOfService(_) => "service-clock",
        }
    }
}

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
        let clock = Arc::new(WallClock::new());
        let redis = RedisServer::start_by(&clock, &settings).await;
        let mut site = Self {
            proxies: Vec::new(),
            redis,
            clock,
            settings,
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

    /// Whether a fault takes data away that was acknowledged.
    pub fn is_wiped_by(&self, fault: Fault) -> bool {
        match fault {
            Fault::Kill => !self.persists,
            Fault::Rewind | Fault::Move => true,
            _ => false,
        }
    }

    /// Makes a fault of this length happen, those of the network to the instances
    /// that are `struck`; returns at its end.
    pub async fn strike(&mut self, fault: Fault, length: Duration, struck: impl Fn(usize) -> bool) {
        self.strike_until(fault, length, sleep(length), struck)
            .await;
    }

    /// The same until a condition holds. A pause cannot be ended before its `length`.
    pub async fn strike_until(
        &mut self,
        fault: Fault,
        length: Duration,
        end: impl Future<Output = ()>,
        struck: impl Fn(usize) -> bool,
    ) {
        let end = pin!(end);
        match fault {
            Fault::Kill => {
                self.redis.kill();
                end.await;
                self.redis.launch_again(&[]);
            }
            Fault::Loading(duration) => self.strike_by_loading(end, duration).await,
            Fault::Hang => {
                self.redis.process().signal("STOP");
                end.await;
                self.redis.process().signal("CONT");
            }
            Fault::Pause { writes_only } => {
                let millis = length.as_millis().to_string();
                let mut command = vec!["CLIENT", "PAUSE", &millis];
                if redis_server::version() >= (6, 2) {
                    command.push(if writes_only { "WRITE" } else { "ALL" });
                }
                self.admin(&command).await;
                // Redis ends it by itself.
                sleep(length).await;
            }
            Fault::ReadOnly { serve_stale } => self.strike_by_following(end, serve_stale).await,
            Fault::OutOfMemory => {
                self.configure("maxmemory", "1").await;
                end.await;
                self.configure("maxmemory", "0").await;
            }
            Fault::Misconfigured => self.strike_by_failing_saves(end).await,
            Fault::FlapHang(period) => {
                let mut end = end;
                while !is_over(&mut end).await {
                    self.redis.process().signal("STOP");
                    sleep(period).await;
                    self.redis.process().signal("CONT");
                    sleep(period).await;
                }
            }
            Fault::BusyScript => self.strike_by_script(end).await,
            Fault::Password => {
                self.set_password("another-password").await;
                let [user, password] = redis_server::login();
                self.admin(&["CLIENT", "KILL", "USER", user]).await;
                end.await;
                self.set_password(password).await;
            }
            Fault::Rewind => self.strike_by_going_back(end).await,
            Fault::Move => self.strike_by_moving(end).await,
            Fault::ClockOfRedis(millis) => self.clock.move_by(millis),
            Fault::Failover(_) | Fault::LaggingFailover(_) | Fault::MoveSlots => {
                unreachable!("{}: there is one Redis", fault.name())
            }
            Fault::StopService | Fault::ClockOfService(_) => {
                unreachable!("{} is not of Redis", fault.name())
            }
            Fault::Delay(_)
            | Fault::Reset
            | Fault::BlackHole { .. }
            | Fault::Partition
            | Fault::Refuse
            | Fault::FlapReset(_)
            | Fault::Stragglers(_)
            | Fault::SlowLink(_)
            | Fault::AcceptAndClose => self.strike_the_network(fault, end, struck).await,
        }
    }

    async fn strike_the_network(
        &mut self,
        fault: Fault,
        end: impl Future<Output = ()>,
        struck: impl Fn(usize) -> bool,
    ) {
        let mut struck: Vec<&mut FaultProxy> = self
            .proxies
            .iter_mut()
            .enumerate()
            .filter_map(|(instance, proxy)| struck(instance).then_some(proxy))
            .collect();
        assert!(!struck.is_empty(), "{}: no proxy", fault.name());
        match fault {
            Fault::Delay(delay) => {
                for proxy in &struck {
                    proxy.delay(delay);
                }
                end.await;
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
                end.await;
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
                end.await;
                for proxy in &struck {
                    proxy.release();
                }
            }
            Fault::Refuse => {
                for proxy in &mut struck {
                    proxy.refuse().await;
                    proxy.reset_all();
                }
                end.await;
                for proxy in &mut struck {
                    proxy.accept();
                }
            }
            Fault::FlapReset(period) => {
                let mut end = pin!(end);
                while !is_over(&mut end).await {
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
                end.await;
                for proxy in &struck {
                    proxy.stop_swallowing();
                    proxy.reset_all();
                }
            }
            Fault::SlowLink(bytes_per_second) => {
                for proxy in &struck {
                    proxy.limit(Some(bytes_per_second));
                }
                end.await;
                for proxy in &struck {
                    proxy.limit(None);
                }
            }
            Fault::AcceptAndClose => {
                let nobody = free_address();
                for proxy in &mut struck {
                    proxy.lead_to(nobody).await;
                    proxy.reset_all();
                }
                end.await;
                for proxy in &mut struck {
                    proxy.lead_to(self.redis.addr()).await;
                }
            }
            _ => unreachable!("{} is not of the network", fault.name()),
        }
    }

    /// Kills Redis at the end, and starts it with what it held at the beginning.
    async fn strike_by_going_back(&mut self, end: impl Future<Output = ()>) {
        assert!(!self.persists, "it would come back with everything");
        self.admin(&["SAVE"]).await;
        end.await;
        self.redis.restart().await;
        // The next time it comes back empty.
        let saved = self.redis.folder().join("dump.rdb");
        std::fs::remove_file(saved).expect("it was saved");
    }

    /// Puts another server in the place of Redis.
    async fn strike_by_moving(&mut self, end: impl Future<Output = ()>) {
        assert!(!self.proxies.is_empty(), "nobody can be led elsewhere");
        let next = RedisServer::start_by(&self.clock, &self.settings).await;
        for proxy in &mut self.proxies {
            proxy.lead_to(next.addr()).await;
            proxy.reset_every_other();
        }
        end.await;
        self.redis = next;
    }

    /// Kills Redis, and starts it so that reading its file takes `duration`.
    async fn strike_by_loading(&mut self, end: impl Future<Output = ()>, duration: Duration) {
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
        end.await;
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
    async fn strike_by_following(&mut self, end: impl Future<Output = ()>, serve_stale: bool) {
        let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = silent.local_addr().expect("it is bound").port().to_string();
        let stale = if serve_stale { "yes" } else { "no" };
        self.configure("replica-serve-stale-data", stale).await;
        self.admin(&["REPLICAOF", "127.0.0.1", &port]).await;
        end.await;
        self.admin(&["REPLICAOF", "NO", "ONE"]).await;
        self.configure("replica-serve-stale-data", "yes").await;
    }

    /// Makes saving fail: even root cannot write into a folder that is gone.
    async fn strike_by_failing_saves(&mut self, end: impl Future<Output = ()>) {
        let folder = self.redis.folder().to_owned();
        let gone = folder.join("gone");
        std::fs::create_dir_all(&gone).expect("a folder of the test");
        self.configure("dir", &gone.display().to_string()).await;
        std::fs::remove_dir(&gone).expect("it is empty");
        self.configure("stop-writes-on-bgsave-error", "yes").await;
        self.configure("save", "3600 1").await;
        self.admin(&["BGSAVE"]).await;
        end.await;
        // In this order: it must never save for real.
        self.configure("save", "").await;
        let folder = folder.display().to_string();
        self.configure("dir", &folder).await;
    }

    /// Keeps Redis busy with a script that has written nothing, so that it can be
    /// ended.
    async fn strike_by_script(&mut self, end: impl Future<Output = ()>) {
        self.configure("lua-time-limit", "700").await;
        let mut connection = self.redis.connect().await;
        let script = tokio::spawn(async move {
            let mut endless = cmd("EVAL");
            let endless = endless.arg("while true do end").arg(0);
            endless.query_async::<redis::Value>(&mut connection).await
        });
        end.await;
        let killed = ask(self.redis.addr(), "SCRIPT KILL", PATIENCE).await;
        assert_eq!(killed.ok().as_deref(), Some("+OK"), "the script is killed");
        let ended = script.await.expect("it does not panic");
        assert!(ended.is_err(), "the script runs until it is killed");
    }

    /// Of the service.
    async fn set_password(&self, password: &str) {
        let [user, _] = redis_server::login();
        let password = format!(">{password}");
        self.admin(&["ACL", "SETUSER", user, "resetpass", &password])
            .await;
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

    /// Waits until everybody who was `struck` can write to Redis on a new
    /// connection.
    pub async fn wait_until_writable(&self, struck: impl Fn(usize) -> bool) {
        let bound = Bound::of(WRITABLE_WITHIN);
        for instance in 0..self.proxies.len().max(1) {
            if !struck(instance) && !self.proxies.is_empty() {
                continue;
            }
            let addr = self.addr_for(instance);
            let soon = Duration::from_millis(200);
            while ask(addr, "SET chaos:probe 1", soon).await.ok().as_deref() != Some("+OK") {
                bound.assert_holds("Redis takes writes again");
                sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

/// Whether a condition holds by now.
async fn is_over(end: &mut (impl Future<Output = ()> + Unpin)) -> bool {
    futures::poll!(end).is_ready()
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
    let late = Err(io::ErrorKind::TimedOut.into());
    within(bound, exchange).await.unwrap_or(late)
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
