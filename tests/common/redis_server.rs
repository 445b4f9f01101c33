//! A real Redis server.

use std::{
    env,
    ffi::OsString,
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use redis::{AsyncConnectionConfig, Client, RedisResult, aio::MultiplexedConnection};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{Process, free_address, stalls::Bound, wall_clock::WallClock};

pub const INSTALL: &str = "run `make tools`, or as root: apt-get install redis-server";

/// The program that is tried, if not the one on the PATH; see `make matrix`.
const PROGRAM: &str = "GROUPSTATE_TEST_REDIS";

/// The user as whom the service logs in, with no more rights than it needs.
const ACL: &str = include_str!("../../deploy/redis/groupstate.acl");

const PATIENCE: Duration = Duration::from_secs(10);

/// Keeps nothing on disk: a restart comes back empty. The service logs in as the
/// user of [`ACL`], tests as the default user, who may do everything.
pub struct RedisServer {
    addr: SocketAddr,
    process: Process,
    arguments: Vec<String>,
    folder: TempDir,
    /// Of the machine if None.
    clock: Option<Arc<WallClock>>,
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// With further settings, as on the command line of `redis-server`.
    pub async fn start_with(arguments: &[&str]) -> Self {
        Self::start_with_each(|| arguments.iter().map(ToString::to_string).collect()).await
    }

    /// The same by a clock of the test.
    pub async fn start_by(clock: &Arc<WallClock>, arguments: &[&str]) -> Self {
        let arguments = || arguments.iter().map(ToString::to_string).collect();
        Self::try_to_start(arguments, Some(clock)).await
    }

    /// With other settings for each try: another process may take a port before Redis
    /// does.
    pub async fn start_with_each(arguments: impl FnMut() -> Vec<String>) -> Self {
        Self::try_to_start(arguments, None).await
    }

    async fn try_to_start(
        mut arguments: impl FnMut() -> Vec<String>,
        clock: Option<&Arc<WallClock>>,
    ) -> Self {
        let mut folder = TempDir::new().unwrap();
        for _ in 0..10 {
            let (addr, arguments) = (free_address(), arguments());
            let mut server = Self {
                process: spawn(addr, &arguments, &folder, clock.map(Arc::as_ref)),
                addr,
                arguments,
                folder,
                clock: clock.cloned(),
            };
            if server.is_up().await {
                return server;
            }
            folder = server.folder;
        }
        panic!("redis-server does not start");
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What the service is told.
    pub fn url(&self) -> String {
        url("redis", self.addr)
    }

    /// The same for a client that may do everything.
    pub fn admin_url(&self) -> String {
        format!("redis://{}", self.addr)
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    /// A connection of an independent client.
    pub async fn connect(&self) -> MultiplexedConnection {
        self.try_to_connect().await.unwrap()
    }

    /// The same where a server may be on its way up or down.
    pub async fn try_to_connect(&self) -> RedisResult<MultiplexedConnection> {
        // A busy machine must not look like a server that is gone.
        let patient = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        let client = Client::open(self.admin_url())?;
        client
            .get_multiplexed_async_connection_with_config(&patient)
            .await
    }

    /// Whether the process is there.
    pub fn is_running(&mut self) -> bool {
        self.process.child.try_wait().unwrap().is_none()
    }

    /// Ends it as by `kill -9`.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same port, if need be after ending it.
    pub async fn restart(&mut self) {
        self.launch_again(&[]);
        assert!(self.is_up().await, "redis-server does not start again");
    }

    /// The same with further settings, and without waiting until it answers.
    pub fn launch_again(&mut self, arguments: &[&str]) {
        self.process.kill();
        let arguments = arguments.iter().map(ToString::to_string);
        let arguments: Vec<String> = self.arguments.iter().cloned().chain(arguments).collect();
        let clock = self.clock.as_deref();
        self.process = spawn(self.addr, &arguments, &self.folder, clock);
    }

    /// Where it keeps its files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until it answers; false if it ended instead.
    async fn is_up(&mut self) -> bool {
        let bound = Bound::of(PATIENCE);
        while !bound.is_over() {
            if self.process.child.try_wait().unwrap().is_some() {
                return false;
            }
            if self.answers_ping().await.unwrap_or(false) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }
}

impl RedisServer {
    /// Whether it answers, be it by asking for a password.
    async fn answers_ping(&self) -> std::io::Result<bool> {
        let mut connection = TcpStream::connect(self.addr).await?;
        connection.write_all(b"PING\r\n").await?;
        let mut reply = [0; 7];
        connection.read_exact(&mut reply).await?;
        Ok(reply.starts_with(b"+PONG") || reply.starts_with(b"-NOAUTH"))
    }
}

/// A URL with the user as whom the service logs in.
pub fn url(scheme: &str, addr: SocketAddr) -> String {
    let [user, password] = login();
    format!("{scheme}://{user}:{password}@{addr}")
}

/// User and password of the service.
pub fn login() -> [&'static str; 2] {
    let mut words = ACL.split_whitespace();
    let password = |word: &'static str| word.strip_prefix('>');
    let user = words.nth(1).expect("user NAME");
    [user, words.find_map(password).expect(">password")]
}

/// The program of `redis-server` or one that takes its place.
pub fn program() -> OsString {
    env::var_os(PROGRAM).unwrap_or_else(|| "redis-server".into())
}

/// Major and minor version of the program.
pub fn version() -> (u32, u32) {
    let output = Command::new(program()).arg("--version").output();
    let output = output.unwrap_or_else(|error| panic!("{error}; {INSTALL}"));
    // Redis server v=7.0.15 sha=00000000:0 …
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split("v=").nth(1).unwrap_or_default();
    let mut numbers = version.split('.').map_while(|number| number.parse().ok());
    let (major, minor) = (numbers.next(), numbers.next());
    major
        .zip(minor)
        .unwrap_or_else(|| panic!("no version in {text:?}"))
}

fn spawn(
    addr: SocketAddr,
    arguments: &[String],
    folder: &TempDir,
    clock: Option<&WallClock>,
) -> Process {
    let mut command = Command::new(program());
    command.envs(clock.into_iter().flat_map(WallClock::environment));
    command
        .args(["--bind", "127.0.0.1", "--port", &addr.port().to_string()])
        .args(["--save", "", "--appendonly", "no"])
        .args(ACL.split_whitespace().enumerate().map(|(at, word)| {
            // As one of its settings.
            if at == 0 {
                format!("--{word}")
            } else {
                word.to_owned()
            }
        }))
        .args(["--dir", &folder.path().display().to_string()])
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Process::spawn(&mut command, INSTALL)
}
