//! Every setting, its default and its check. `--help` is the reference.

mod value;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{
    Command, CommandFactory, FromArgMatches, Parser,
    builder::Resettable,
    error::{ContextKind, ContextValue, ErrorKind},
};
use http::{Uri, uri::Scheme};
use tokio::task::JoinSet;

use self::value::{
    age_grace, connection_age, count, duration, inflight_size, key_prefix, key_size, ratio,
    redis_timeout, reload_interval, size, trip_after,
};
use crate::{
    grpc::{admission::authentication::Tokens, validation::MIN_TTL},
    pem::{Authorities, Identity},
    reload::{Opened, Watched, Watcher},
    store::{
        failover::switch::OnRecovery,
        redis::{RedisFiles, RedisLimits, RedisSettings},
    },
    telemetry::{FileSetting, LogFormat, LogLevel},
};

/// Keeps the state of alert groups for the replicas of an alert-history
/// service, in Redis or in memory, and serves it over gRPC.
///
/// Durations are written as 250ms, 5s or 24h, sizes as 256MiB. Each setting is
/// a flag or an environment variable; the flag wins. A variable that is empty
/// counts as one that is not set.
///
/// SIGTERM and SIGHUP stop it gracefully, see --shutdown-delay; Ctrl-C does so
/// without the delay, and a second signal ends it at once.
#[derive(Clone, Debug, Parser)]
#[command(name = "groupstate", version, max_term_width = 100)]
pub struct Settings {
    /// Address of the gRPC server. Port 0 takes any free port.
    #[arg(
        long,
        env = "GROUPSTATE_GRPC_ADDR",
        value_name = "ADDRESS",
        default_value = "0.0.0.0:50051"
    )]
    pub grpc_addr: SocketAddr,

    /// Address of the HTTP server with probes, health and metrics. Port 0 takes any free port.
    #[arg(
        long,
        env = "GROUPSTATE_HTTP_ADDR",
        value_name = "ADDRESS",
        default_value = "0.0.0.0:9090"
    )]
    pub http_addr: SocketAddr,

    /// Where Redis is: redis://[[user]:password@]host[:port][/database] or redis+unix:///path; a
    /// cluster as redis-cluster://host[:port][?node=host:port]; by sentinels as
    /// redis-sentinel://host[:port]?sentinelServiceName=name[&node=host:port]. With TLS rediss://,
    /// rediss-cluster:// or rediss-sentinel://. Without it, groups are kept in memory and do not
    /// survive a restart.
    #[arg(
        long,
        env = "GROUPSTATE_REDIS_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    pub redis_url: Option<String>,

    /// Connections to Redis for calls on small groups. There are three more, to each primary:
    /// for PINGs, for large groups and listings, and for what the service does by itself.
    #[arg(long, env = "GROUPSTATE_REDIS_POOL_SIZE", value_name = "COUNT", default_value_t = 2,
          value_parser = clap::value_parser!(u16).range(1..=256))]
    pub redis_pool_size: u16,

    /// Bytes of documents larger than 16 KiB that are on their way to or from Redis at once.
    /// What comes on top waits, in turn for each connection of a client.
    #[arg(long, env = "GROUPSTATE_REDIS_MAX_BULK_BYTES", value_name = "SIZE",
          default_value = "4MiB", value_parser = size)]
    pub redis_max_bulk_bytes: usize,

    /// Time that one Redis command gets at most; 1ms to 1m. Each MiB of a document larger than
    /// 16 KiB adds a second.
    #[arg(long, env = "GROUPSTATE_REDIS_TIMEOUT", value_name = "DURATION", default_value = "250ms",
          value_parser = redis_timeout)]
    pub redis_timeout: Duration,

    /// ACL user for Redis; takes the place of the one in the URL.
    #[arg(
        long,
        env = "GROUPSTATE_REDIS_USERNAME",
        value_name = "NAME",
        requires = "redis_url"
    )]
    pub redis_username: Option<String>,

    /// File with the password for Redis; takes the place of the one in the URL. A line break at its
    /// end is not part of the password.
    #[arg(
        long,
        env = "GROUPSTATE_REDIS_PASSWORD_FILE",
        value_name = "FILE",
        requires = "redis_url"
    )]
    pub redis_password_file: Option<PathBuf>,

    /// Certificates in PEM of the authorities that say who is Redis; by default those of the
    /// system. Only with TLS.
    #[arg(
        long,
        env = "GROUPSTATE_REDIS_CA",
        value_name = "FILE",
        requires = "redis_url"
    )]
    pub redis_ca: Option<PathBuf>,

    /// Certificate in PEM by which we show Redis who we are, followed by those that it is based
    /// on. Only with TLS.
    #[arg(
        long,
        env = "GROUPSTATE_REDIS_CERT",
        value_name = "FILE",
        requires = "redis_key"
    )]
    pub redis_cert: Option<PathBuf>,

    /// Private key of that certificate, in PEM.
    #[arg(
        long,
        env = "GROUPSTATE_REDIS_KEY",
        value_name = "FILE",
        requires = "redis_cert"
    )]
    pub redis_key: Option<PathBuf>,

    /// What every key of ours in Redis begins with.
    #[arg(long, env = "GROUPSTATE_KEY_PREFIX", value_name = "TEXT", default_value = "group:",
          value_parser = key_prefix)]
    pub key_prefix: String,

    /// When a group expires whose writer does not say; at least 1s.
    #[arg(long, env = "GROUPSTATE_DEFAULT_TTL", value_name = "DURATION", default_value = "24h",
          value_parser = duration)]
    pub default_ttl: Duration,

    /// The longest time to live that a writer may ask for; at most 3650d.
    #[arg(long, env = "GROUPSTATE_MAX_TTL", value_name = "DURATION", default_value = "30d",
          value_parser = duration)]
    pub max_ttl: Duration,

    /// Memory takes over when Redis has answered no PING for this long; 50ms to 1m. Less than
    /// the stalls of a healthy Redis makes it flap.
    #[arg(long, env = "GROUPSTATE_TRIP_AFTER", value_name = "DURATION", default_value = "500ms",
          value_parser = trip_after)]
    pub trip_after: Duration,

    /// What becomes of groups that were written while Redis was down: discard drops and counts
    /// them, reconcile carries them over to Redis.
    #[arg(
        long,
        env = "GROUPSTATE_ON_RECOVERY",
        value_name = "POLICY",
        default_value = "discard"
    )]
    pub on_recovery: OnRecovery,

    /// Memory that groups may take in this process, keys and overhead included.
    #[arg(long, env = "GROUPSTATE_MIRROR_MAX_BYTES", value_name = "SIZE", default_value = "256MiB",
          value_parser = size)]
    pub mirror_max_bytes: usize,

    /// Longest group key, in bytes of UTF-8; at most 4096.
    #[arg(long, env = "GROUPSTATE_MAX_KEY_BYTES", value_name = "SIZE", default_value = "4096",
          value_parser = key_size)]
    pub max_key_bytes: usize,

    /// Largest group, as a JSON document.
    #[arg(long, env = "GROUPSTATE_MAX_DOCUMENT_BYTES", value_name = "SIZE", default_value = "1MiB",
          value_parser = size)]
    pub max_document_bytes: usize,

    /// Most alerts in one group.
    #[arg(long, env = "GROUPSTATE_MAX_ALERTS_PER_GROUP", value_name = "COUNT", default_value = "10000",
          value_parser = count)]
    pub max_alerts_per_group: usize,

    /// Most groups in one StoreAll.
    #[arg(long, env = "GROUPSTATE_MAX_GROUPS_PER_BATCH", value_name = "COUNT", default_value = "1000",
          value_parser = count)]
    pub max_groups_per_batch: usize,

    /// Largest request message.
    #[arg(long, env = "GROUPSTATE_MAX_REQUEST_BYTES", value_name = "SIZE", default_value = "16MiB",
          value_parser = size)]
    pub max_request_bytes: usize,

    /// What the requests that are being received or worked on may take together; more are refused.
    /// At least --max-request-bytes.
    #[arg(long, env = "GROUPSTATE_MAX_INFLIGHT_BYTES", value_name = "SIZE", default_value = "256MiB",
          value_parser = inflight_size)]
    pub max_inflight_bytes: usize,

    /// Calls that are worked on at once; more are refused. Health calls do not count.
    #[arg(long, env = "GROUPSTATE_MAX_CONCURRENT_CALLS", value_name = "COUNT", default_value = "4096",
          value_parser = count)]
    pub max_concurrent_calls: usize,

    /// Calls at once on one connection; a client waits with further ones.
    #[arg(long, env = "GROUPSTATE_MAX_STREAMS_PER_CONNECTION", value_name = "COUNT", default_value_t = 1024,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub max_streams_per_connection: u32,

    /// Connections of clients at once; more are closed.
    #[arg(long, env = "GROUPSTATE_MAX_CONNECTIONS", value_name = "COUNT", default_value = "16384",
          value_parser = count)]
    pub max_connections: usize,

    /// How old a connection gets, more or less 10 %, before its client is asked to open another
    /// one: so new instances get calls. Calls in flight go on; 1s to 365d.
    #[arg(long, env = "GROUPSTATE_MAX_CONNECTION_AGE", value_name = "DURATION", default_value = "5m",
          value_parser = connection_age)]
    pub max_connection_age: Duration,

    /// How long a client may go on with a connection of that age: then its calls are refused, and the
    /// connection is closed when those in flight have ended; 1s to 1h.
    #[arg(long, env = "GROUPSTATE_MAX_CONNECTION_AGE_GRACE", value_name = "DURATION", default_value = "10s",
          value_parser = age_grace)]
    pub max_connection_age_grace: Duration,

    /// ListKeys, Size and LoadAll calls at once; more are refused. A LoadAll that waits for its reader
    /// does not count.
    #[arg(long, env = "GROUPSTATE_MAX_SCANS", value_name = "COUNT", default_value = "4", value_parser = count)]
    pub max_scans: usize,

    /// Whether clients may ask what there is to call (server reflection), as grpcurl does.
    #[arg(
        long,
        env = "GROUPSTATE_REFLECTION",
        value_name = "ON_OR_OFF",
        default_value = "on"
    )]
    pub reflection: OnOff,

    /// File with the certificate of this server in PEM, its chain below it: gRPC speaks TLS only.
    #[arg(
        long,
        env = "GROUPSTATE_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    pub tls_cert: Option<PathBuf>,

    /// File with the key of the certificate, in PEM.
    #[arg(
        long,
        env = "GROUPSTATE_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,

    /// File with the CAs in PEM of which clients must have a certificate. Without it, clients need
    /// none.
    #[arg(
        long,
        env = "GROUPSTATE_TLS_CLIENT_CA",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_client_ca: Option<PathBuf>,

    /// File with the tokens that callers may have: one a line, `#` begins a comment. A caller sends
    /// one as `authorization: Bearer TOKEN`. Without it, nobody needs one.
    #[arg(long, env = "GROUPSTATE_AUTH_TOKEN_FILE", value_name = "FILE")]
    pub auth_token_file: Option<PathBuf>,

    /// How often files with certificates, tokens and passwords are looked at: what has changed is
    /// used without a restart; 100ms to 1h.
    #[arg(long, env = "GROUPSTATE_RELOAD_INTERVAL", value_name = "DURATION", default_value = "10s",
          value_parser = reload_interval)]
    pub reload_interval: Duration,

    /// How long health says NOT_SERVING before the server stops to take calls, after SIGTERM
    /// or SIGHUP.
    #[arg(long, env = "GROUPSTATE_SHUTDOWN_DELAY", value_name = "DURATION", default_value = "5s",
          value_parser = duration)]
    pub shutdown_delay: Duration,

    /// How long calls in flight may go on after that. Then there are at most 5s to carry groups over
    /// to Redis, and 2s to send traces.
    #[arg(long, env = "GROUPSTATE_SHUTDOWN_TIMEOUT", value_name = "DURATION", default_value = "20s",
          value_parser = duration)]
    pub shutdown_timeout: Duration,

    /// The least severe log events that are written.
    #[arg(
        long,
        env = "GROUPSTATE_LOG_LEVEL",
        value_name = "LEVEL",
        default_value = "info"
    )]
    pub log_level: LogLevel,

    /// Form of the log on standard error: auto is text on a terminal, else JSON.
    #[arg(
        long,
        env = "GROUPSTATE_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "auto"
    )]
    pub log_format: LogFormat,

    /// Collector that traces are sent to, by OTLP over gRPC, such as http://localhost:4317.
    /// Without it, there are none.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    pub otlp_endpoint: Option<String>,

    /// Share of the calls that are traced among those whose caller does not say; 0 to 1.
    #[arg(long, env = "GROUPSTATE_OTLP_SAMPLE_RATIO", value_name = "RATIO", default_value = "1",
          value_parser = ratio)]
    pub otlp_sample_ratio: f64,
}

/// Keep up to date what [`RedisSettings`] have from files.
pub struct RedisWatchers {
    password: Option<Watcher<String>>,
    authorities: Option<Watcher<Authorities>>,
    identity: Option<Watcher<Identity>>,
}

/// A thing that is there or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnOff {
    On,
    Off,
}

/// Clocks can count up to here without a check at every sum.
const LONGEST_TTL: Duration = Duration::from_secs(3_650 * 24 * 3_600);

// === impl Settings ===

impl Settings {
    /// Reads the command line and the environment. `Err` holds what to print
    /// and the exit code: 2 and one line for a bad setting, 0 for `--help`.
    pub fn read<I, T>(arguments: I) -> Result<Self, (String, u8)>
    where
        I: IntoIterator<Item = T>,
        T: Into<std::ffi::OsString> + Clone,
    {
        let arguments: Vec<std::ffi::OsString> = arguments.into_iter().map(Into::into).collect();
        let parsed = Self::without_empty_variables()
            .try_get_matches_from(arguments.clone())
            .and_then(|matches| Self::from_arg_matches(&matches));
        let settings = parsed.map_err(|error| {
            let error = match error.kind() {
                // It names all variables.
                ErrorKind::DisplayHelp => Self::command()
                    .try_get_matches_from(arguments)
                    .err()
                    .unwrap_or(error),
                _ => error,
            };
            let text = error.render();
            if is_bare_argument(&error) {
                (BARE_ARGUMENT.to_owned(), 2)
            } else if error.use_stderr() {
                (one_line(&text.to_string()), 2)
            } else {
                (text.to_string().trim_end().to_owned(), 0)
            }
        })?;
        settings
            .check()
            .map_err(|error| (format!("error: {error}"), 2))?;
        Ok(settings)
    }

    /// The settings, without those variables that are empty: Compose files and
    /// templates leave a variable empty where they mean "not set".
    fn without_empty_variables() -> Command {
        Self::command().mut_args(|argument| {
            let is_empty = argument
                .get_env()
                .and_then(std::env::var_os)
                .is_some_and(|value| value.is_empty());
            if is_empty {
                argument.env(Resettable::Reset)
            } else {
                argument
            }
        })
    }

    /// Checks what no setting shows alone.
    fn check(&self) -> Result<(), String> {
        if self.default_ttl < MIN_TTL {
            return Err("--default-ttl must be at least 1s".into());
        }
        if self.max_ttl < self.default_ttl {
            return Err("--max-ttl must not be less than --default-ttl".into());
        }
        if self.max_ttl > LONGEST_TTL {
            return Err("--max-ttl must be at most 3650d".into());
        }
        if self.max_inflight_bytes < self.max_request_bytes {
            return Err("--max-inflight-bytes must not be less than --max-request-bytes".into());
        }
        self.tokens()?;
        self.identity()?;
        self.client_ca()?;
        self.otlp_endpoint()?;
        self.redis().map(|_| ())
    }

    /// The tokens that callers may have, and what keeps them up to date; None
    /// without `--auth-token-file`.
    pub fn tokens(&self) -> Opened<Tokens> {
        let Some(file) = &self.auth_token_file else {
            return Ok(None);
        };
        let parse = |contents: &[Vec<u8>]| Tokens::parse(&contents.concat());
        Watched::open(FileSetting::AuthTokenFile, vec![file.clone()], parse).map(Some)
    }

    /// The certificate of the server and what keeps it up to date; None without
    /// `--tls-cert`.
    pub fn identity(&self) -> Opened<Identity> {
        let (Some(certificate), Some(key)) = (&self.tls_cert, &self.tls_key) else {
            return Ok(None);
        };
        let files = vec![certificate.clone(), key.clone()];
        Watched::open(FileSetting::TlsCert, files, Identity::parse).map(Some)
    }

    /// The CAs of clients and what keeps them up to date; None without
    /// `--tls-client-ca`.
    pub fn client_ca(&self) -> Opened<Authorities> {
        let Some(file) = &self.tls_client_ca else {
            return Ok(None);
        };
        let files = vec![file.clone()];
        Watched::open(FileSetting::TlsClientCa, files, Authorities::parse).map(Some)
    }

    /// Where traces are sent; None: nowhere.
    pub fn otlp_endpoint(&self) -> Result<Option<&str>, String> {
        let Some(url) = self.otlp_endpoint.as_ref().filter(|url| !url.is_empty()) else {
            return Ok(None);
        };
        // Without TLS, and without credentials, which the log would show.
        let is_plain = |uri: &Uri| {
            uri.scheme() == Some(&Scheme::HTTP)
                && uri.authority().is_some_and(|it| !it.as_str().contains('@'))
        };
        match url.parse() {
            Ok(uri) if is_plain(&uri) => Ok(Some(url)),
            _ => Err("--otlp-endpoint must be of the form http://localhost:4317".into()),
        }
    }

    /// How to reach Redis, and what keeps that up to date; None without
    /// `--redis-url`.
    pub fn redis(&self) -> Result<Option<(RedisSettings, RedisWatchers)>, String> {
        // Empty as a flag, it takes the place of a variable.
        let Some(url) = self.redis_url.as_ref().filter(|url| !url.is_empty()) else {
            return Ok(None);
        };
        let (password, password_watcher) = self.redis_password()?.unzip();
        let (authorities, authorities_watcher) = self.redis_authorities()?.unzip();
        let (identity, identity_watcher) = self.redis_identity()?.unzip();
        let files = RedisFiles {
            password,
            authorities,
            identity,
        };
        let limits = RedisLimits {
            pool_size: usize::from(self.redis_pool_size),
            timeout: self.redis_timeout,
            max_bulk_bytes: self.redis_max_bulk_bytes,
        };
        let mut redis = RedisSettings::new(url, files, limits)
            .map_err(|error| format!("--redis-url: {error}"))?;
        if let Some(username) = &self.redis_username {
            redis.set_username(username.clone());
        }
        let watchers = RedisWatchers {
            password: password_watcher,
            authorities: authorities_watcher,
            identity: identity_watcher,
        };
        Ok(Some((redis, watchers)))
    }

    fn redis_password(&self) -> Opened<String> {
        let Some(file) = &self.redis_password_file else {
            return Ok(None);
        };
        let files = vec![file.clone()];
        Watched::open(FileSetting::RedisPasswordFile, files, password).map(Some)
    }

    fn redis_authorities(&self) -> Opened<Authorities> {
        let Some(file) = &self.redis_ca else {
            return Ok(None);
        };
        let files = vec![file.clone()];
        Watched::open(FileSetting::RedisCa, files, Authorities::parse).map(Some)
    }

    fn redis_identity(&self) -> Opened<Identity> {
        let (Some(certificate), Some(key)) = (&self.redis_cert, &self.redis_key) else {
            return Ok(None);
        };
        let files = vec![certificate.clone(), key.clone()];
        Watched::open(FileSetting::RedisCert, files, Identity::parse).map(Some)
    }
}

// === impl RedisWatchers ===

impl RedisWatchers {
    /// Looks at the files every `interval`.
    pub fn spawn_on(self, tasks: &mut JoinSet<()>, interval: Duration) {
        if let Some(password) = self.password {
            tasks.spawn(password.watch_forever(interval));
        }
        if let Some(authorities) = self.authorities {
            tasks.spawn(authorities.watch_forever(interval));
        }
        if let Some(identity) = self.identity {
            tasks.spawn(identity.watch_forever(interval));
        }
    }
}

/// A line break at the end is not part of the password.
fn password(contents: &[Vec<u8>]) -> Result<String, String> {
    let password = String::from_utf8(contents.concat()).map_err(|_| "is not UTF-8")?;
    let password = password.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err("is empty".into());
    }
    Ok(password.to_owned())
}

/// What clap would repeat may be the URL of Redis with its password.
const BARE_ARGUMENT: &str =
    "error: an argument belongs to no setting: write --redis-url URL, and so on";

/// Whether an argument is neither a flag nor the value of one. After `--` anything is.
fn is_bare_argument(error: &clap::Error) -> bool {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return false;
    };
    let is_part_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let is_flag = argument.starts_with('-') && argument.chars().all(is_part_of_name);
    error.kind() == ErrorKind::UnknownArgument && !is_flag
}

/// clap explains an error in several lines; the first says what is wrong.
fn one_line(text: &str) -> String {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or("error: bad settings").to_owned();
    if first.ends_with(':') {
        // The names of missing or conflicting settings stand on the next lines.
        let names: Vec<_> = lines.take_while(|line| line.starts_with("--")).collect();
        return format!("{first} {}", names.join(", "));
    }
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Result<Settings, (String, u8)> {
        Settings::read(["groupstate"].iter().chain(arguments))
    }

    #[test]
    fn the_defaults_are_those_of_the_reference() {
        let settings = read(&[]).unwrap();
        assert_eq!(settings.grpc_addr.to_string(), "0.0.0.0:50051");
        assert_eq!(settings.default_ttl, Duration::from_secs(24 * 3_600));
        assert_eq!(settings.max_ttl, Duration::from_secs(30 * 24 * 3_600));
        assert_eq!(settings.mirror_max_bytes, 256 << 20);
        assert_eq!(settings.max_document_bytes, 1 << 20);
        assert_eq!(settings.max_request_bytes, 16 << 20);
        assert!(settings.redis().unwrap().is_none());
        assert!(read(&["--redis-url="]).unwrap().redis().unwrap().is_none());
        let settings = read(&["--otlp-endpoint="]).unwrap();
        assert_eq!(settings.otlp_endpoint(), Ok(None));
    }

    #[test]
    fn a_bad_setting_is_one_line_that_names_it() {
        for (arguments, named) in [
            (&["--redis-timeout", "fast"][..], "--redis-timeout"),
            (&["--redis-timeout", "0s"], "--redis-timeout"),
            (&["--redis-timeout", "2m"], "--redis-timeout"),
            (&["--trip-after", "0s"], "--trip-after"),
            (&["--on-recovery", "hope"], "--on-recovery"),
            (&["--http-addr", "9090"], "--http-addr"),
            (&["--max-ttl", "3651d"], "--max-ttl"),
            (&["--max-key-bytes", "5000"], "--max-key-bytes"),
            (&["--max-scans", "0"], "--max-scans"),
            (&["--max-scans", "99999999999"], "--max-scans"),
            (&["--mirror-max-bytes", "lots"], "--mirror-max-bytes"),
            (&["--mirror-max-bytes=-1"], "--mirror-max-bytes"),
            (&["--key-prefix", ""], "--key-prefix"),
            (&["--max-inflight-bytes", "1MiB"], "--max-inflight-bytes"),
            (&["--auth-token-file", "/nowhere"], "--auth-token-file"),
            (&["--reload-interval", "1ms"], "--reload-interval"),
            (&["--tls-cert", "/nowhere"], "--tls-key"),
            (&["--tls-key", "/nowhere"], "--tls-cert"),
            (&["--tls-client-ca", "/nowhere"], "--tls-cert"),
            (
                &["--tls-cert", "/nowhere", "--tls-key", "/nowhere"],
                "--tls-cert /nowhere",
            ),
            (&["--max-connection-age", "0s"], "--max-connection-age"),
            (&["--max-connections", "0"], "--max-connections"),
            (&["--default-ttl", "100ms"], "--default-ttl"),
            (&["--default-ttl", "10d", "--max-ttl", "1d"], "--max-ttl"),
            (&["--redis-url", "localhost"], "--redis-url"),
            (&["--redis-url", "redis-cluster://host:port"], "--redis-url"),
            (
                &["--redis-url", "redis-sentinel://localhost"],
                "--redis-url",
            ),
            (&["--redis-url", "redis-cluster://host/1"], "--redis-url"),
            (&["--redis-ca", "ca.pem"], "--redis-url"),
            (&["--redis-cert", "cert.pem"], "--redis-key"),
            (
                &["--redis-url", "rediss://h", "--redis-ca", "/none.pem"],
                "--redis-ca /none.pem",
            ),
            (&["--redis-username", "x"], "--redis-url"),
            (&["--log-level", "loud"], "--log-level"),
            (&["--otlp-endpoint", "localhost:4317"], "--otlp-endpoint"),
            (&["--otlp-endpoint", "https://host:4317"], "--otlp-endpoint"),
            (
                &["--otlp-endpoint", "http://me:s3cret@host"],
                "--otlp-endpoint",
            ),
            (&["--otlp-sample-ratio", "1.1"], "--otlp-sample-ratio"),
            (&["--otlp-sample-ratio", "NaN"], "--otlp-sample-ratio"),
            (&["--no-such-setting"], "--no-such-setting"),
            (&["--grpc-addr", "here"], "--grpc-addr"),
        ] {
            let (text, code) = read(arguments).unwrap_err();
            assert_eq!((text.lines().count(), code), (1, 2), "{text}");
            assert!(
                text.starts_with("error: ") && text.contains(named),
                "{text}"
            );
        }
    }

    #[test]
    fn a_password_is_never_repeated() {
        for url in [
            "redis://u:s3cret@host:notaport",
            "http://u:s3cret@h",
            "redis://:s3cret@",
        ] {
            if let Err((text, _)) = read(&["--redis-url", url]) {
                assert!(!text.contains("s3cret"), "{text}");
            }
        }
        // The flag was forgotten, or is none.
        for arguments in [
            &["redis://u:s3cret@host"][..],
            &["--", "--redis-url=redis://u:s3cret@host"],
            &["--", "-redis://u:s3cret@host"],
        ] {
            let error = read(arguments).unwrap_err();
            assert_eq!(error, (BARE_ARGUMENT.to_owned(), 2));
        }
        for argument in ["--redis-ur1=redis://u:s3cret@host", "-xs3cret"] {
            let (text, _) = read(&[argument]).unwrap_err();
            assert!(text.contains("unexpected argument '-"), "{text}");
            assert!(!text.contains("s3cret"), "{text}");
        }
        let settings = read(&["--redis-url", "redis://u:s3cret@host"]).unwrap();
        let (redis, _) = settings.redis().unwrap().unwrap();
        assert!(!format!("{redis:?}").contains("s3cret"));
    }

    #[test]
    fn files_for_tls_are_read_and_what_is_wrong_with_them_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, content).unwrap();
            path.display().to_string()
        };
        let issue = || rcgen::generate_simple_self_signed(["h".to_owned()]).unwrap();
        let (ours, other) = (issue(), issue());
        let cert = file("cert", &ours.cert.pem());
        let key = file("key", &ours.signing_key.serialize_pem());
        let other_key = file("other key", &other.signing_key.serialize_pem());
        let nothing = file("nothing", "not in PEM");
        let try_out = |url: &str, ca: &str, cert: &str, key: &str| {
            let arguments = [
                ["--redis-url", url],
                ["--redis-ca", ca],
                ["--redis-cert", cert],
                ["--redis-key", key],
            ];
            read(arguments.as_flattened()).map_err(|(text, _)| text)
        };
        try_out("rediss://h", &cert, &cert, &key).unwrap();
        for (url, ca, key, says) in [
            (
                "rediss://h",
                &nothing,
                &key,
                "nothing: holds no certificate",
            ),
            (
                "rediss://h",
                &cert,
                &other_key,
                "not that of the certificate",
            ),
            ("rediss://h", &cert, &nothing, "holds no private key"),
            ("redis://h", &cert, &key, "must begin with rediss://"),
        ] {
            let text = try_out(url, ca, &cert, key).unwrap_err();
            assert!(text.contains(says), "{text}");
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }

    #[test]
    fn help_names_every_setting_and_is_no_error() {
        let (text, code) = read(&["--help"]).unwrap_err();
        assert_eq!(code, 0);
        assert!(text.contains("--redis-url") && text.contains("GROUPSTATE_REDIS_URL"));
    }
}
