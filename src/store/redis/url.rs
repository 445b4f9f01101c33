//! Where Redis is, as a URL says it.

use std::{fmt, path::PathBuf};

use fred::prelude::Server;
use percent_encoding::percent_decode_str;
use url::Url;

/// What a URL says. There is no debug form: it would hold the password.
#[derive(Clone)]
pub struct RedisUrl {
    pub deployment: Deployment,
    pub credentials: Credentials,
    pub database: Option<u8>,
    /// Whether it asks for TLS.
    pub tls: bool,
}

/// How the servers are put up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deployment {
    Standalone(Server),
    /// The path of a socket.
    Unix(PathBuf),
    /// Some of its nodes.
    Cluster(Vec<Server>),
    Sentinel(SentinelDeployment),
}

/// A primary that sentinels know.
#[derive(Clone, PartialEq, Eq)]
pub struct SentinelDeployment {
    /// Some of the sentinels.
    pub hosts: Vec<Server>,
    /// What they call the primary.
    pub service: String,
    /// Their own; None: as it turns out that they want.
    pub credentials: Option<Credentials>,
}

/// As whom to log in.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    pub username: Option<String>,
    pub password: Option<String>,
}

/// A form of URL.
struct Scheme {
    name: &'static str,
    kind: Kind,
    tls: bool,
    /// The parameters that it takes.
    parameters: &'static [&'static str],
}

#[derive(Clone, Copy)]
enum Kind {
    Standalone,
    Unix,
    Cluster,
    Sentinel,
}

const PORT: u16 = 6_379;
const SENTINEL_PORT: u16 = 26_379;

const NODE: &str = "node";
const SERVICE: &str = "sentinelServiceName";
const SENTINEL_USERNAME: &str = "sentinelUsername";
const SENTINEL_PASSWORD: &str = "sentinelPassword";

const SCHEMES: [Scheme; 7] = [
    Scheme::new("redis", Kind::Standalone, false),
    Scheme::new("rediss", Kind::Standalone, true),
    Scheme::new("redis-cluster", Kind::Cluster, false),
    Scheme::new("rediss-cluster", Kind::Cluster, true),
    Scheme::new("redis-sentinel", Kind::Sentinel, false),
    Scheme::new("rediss-sentinel", Kind::Sentinel, true),
    Scheme::new("redis+unix", Kind::Unix, false),
];

/// How the URLs begin that ask for TLS.
pub const SCHEMES_WITH_TLS: &str = "rediss://, rediss-cluster:// or rediss-sentinel://";

// === impl RedisUrl ===

impl RedisUrl {
    /// Reads a URL. The error does not repeat any part of it, since a mistake may
    /// have put the password anywhere.
    pub fn parse(url: &str) -> Result<Self, String> {
        let scheme = Scheme::of(url)?;
        let url = Url::parse(url)
            .map_err(|error| format!("is not a URL: {error}; it is {}", scheme.form()))?;
        scheme.check_parameters(&url)?;
        if url.fragment().is_some() {
            // What follows would be lost: redis://u:1#s3cret@host is host u, port 1.
            return Err("holds a #, which is written as %23 in a password".into());
        }
        Ok(Self {
            deployment: deployment(scheme, &url)?,
            credentials: Credentials {
                username: decoded(url.username())?,
                password: decoded(url.password().unwrap_or_default())?,
            },
            database: database(scheme, &url)?,
            tls: scheme.tls,
        })
    }
}

impl fmt::Debug for SentinelDeployment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sentinel")
            .field("hosts", &self.hosts)
            .field("service", &self.service)
            .finish_non_exhaustive()
    }
}

// === impl Scheme ===

impl Scheme {
    const fn new(name: &'static str, kind: Kind, tls: bool) -> Self {
        Self {
            name,
            kind,
            tls,
            parameters: match kind {
                Kind::Standalone | Kind::Unix => &[],
                Kind::Cluster => &[NODE],
                Kind::Sentinel => &[SERVICE, NODE, SENTINEL_USERNAME, SENTINEL_PASSWORD],
            },
        }
    }

    fn of(url: &str) -> Result<&'static Self, String> {
        let name = url.split_once("://").map(|(name, _)| name);
        let scheme = SCHEMES.iter().find(|scheme| Some(scheme.name) == name);
        scheme.ok_or_else(|| {
            let names = SCHEMES.map(|scheme| format!("{}://", scheme.name));
            format!(
                "must begin with one of {}; such as redis://host:6379",
                names.join(" ")
            )
        })
    }

    /// What such a URL looks like.
    fn form(&self) -> String {
        let Self { name, kind, .. } = self;
        match kind {
            Kind::Standalone => format!("{name}://host:{PORT}"),
            Kind::Unix => format!("{name}:///path/of/the/socket"),
            Kind::Cluster => format!("{name}://host:{PORT}?node=host:{PORT}"),
            Kind::Sentinel => format!("{name}://host:{SENTINEL_PORT}?{SERVICE}=NAME"),
        }
    }

    fn check_parameters(&self, url: &Url) -> Result<(), String> {
        for (name, _) in url.query_pairs() {
            if !self.parameters.contains(&&*name) {
                let known = match self.parameters {
                    [] => "none".to_owned(),
                    parameters => parameters.join(", "),
                };
                return Err(format!(
                    "has a parameter that {}:// does not know; it knows {known}. A ? or / in a \
                     password is written as %3F or %2F",
                    self.name
                ));
            }
        }
        Ok(())
    }
}

// === parts of a URL ===

fn deployment(scheme: &Scheme, url: &Url) -> Result<Deployment, String> {
    let hosts = |default_port| {
        let mut hosts = vec![first_host(scheme, url, default_port)?];
        for node in parameters(url, NODE) {
            hosts.push(host_and_port(&node).ok_or("node= must be host:port")?);
        }
        Ok::<_, String>(hosts)
    };
    Ok(match scheme.kind {
        Kind::Standalone => Deployment::Standalone(first_host(scheme, url, PORT)?),
        Kind::Cluster => Deployment::Cluster(hosts(PORT)?),
        Kind::Unix => {
            if url.has_host() || url.path().len() < 2 {
                return Err(format!(
                    "must be of the form {}, without a host; user and password are settings of \
                     their own",
                    scheme.form()
                ));
            }
            let path = percent_decode_str(url.path()).decode_utf8();
            Deployment::Unix(path.map_err(|_| "is not UTF-8")?.into_owned().into())
        }
        Kind::Sentinel => {
            let one = |name| parameters(url, name).pop();
            let service = one(SERVICE).filter(|service| !service.is_empty());
            let credentials = Credentials {
                username: one(SENTINEL_USERNAME),
                password: one(SENTINEL_PASSWORD),
            };
            Deployment::Sentinel(SentinelDeployment {
                hosts: hosts(SENTINEL_PORT)?,
                service: service.ok_or_else(|| {
                    format!(
                        "must say what the sentinels call the primary: {}",
                        scheme.form()
                    )
                })?,
                credentials: (credentials != Credentials::default()).then_some(credentials),
            })
        }
    })
}

fn first_host(scheme: &Scheme, url: &Url, default_port: u16) -> Result<Server, String> {
    let host = url.host_str().unwrap_or_default();
    let host = percent_decode_str(host).decode_utf8();
    let host = host.map_err(|_| "has a host that is not UTF-8")?;
    if host.is_empty() {
        return Err(format!("names no host: it is {}", scheme.form()));
    }
    Ok(Server::new(
        without_brackets(&host),
        url.port().unwrap_or(default_port),
    ))
}

fn host_and_port(text: &str) -> Option<Server> {
    let (host, port) = text.rsplit_once(':')?;
    let host = without_brackets(host);
    (!host.is_empty()).then_some(Server::new(host, port.parse().ok()?))
}

/// Those around an IPv6 address belong to the URL.
fn without_brackets(host: &str) -> String {
    let inner = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    inner.unwrap_or(host).to_owned()
}

/// The values of a parameter.
fn parameters(url: &Url, name: &str) -> Vec<String> {
    let values = url.query_pairs().filter(|(key, _)| key == name);
    values.map(|(_, value)| value.into_owned()).collect()
}

fn database(scheme: &Scheme, url: &Url) -> Result<Option<u8>, String> {
    let path = url.path().trim_start_matches('/');
    match scheme.kind {
        Kind::Unix => Ok(None),
        _ if path.is_empty() => Ok(None),
        Kind::Cluster => Err("must not name a database: a cluster has only one".into()),
        Kind::Standalone | Kind::Sentinel => {
            let number = path.parse().map(Some);
            number.map_err(|_| {
                "names a database that is not a number from 0 to 255. A / in a password is \
                 written as %2F"
                    .into()
            })
        }
    }
}

fn decoded(text: &str) -> Result<Option<String>, String> {
    let text = percent_decode_str(text).decode_utf8();
    let text = text.map_err(|_| "has a user or password that is not UTF-8")?;
    Ok((!text.is_empty()).then(|| text.into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The error of what is no URL.
    fn refused(url: &str) -> String {
        RedisUrl::parse(url).err().expect(url)
    }

    fn read(url: &str) -> RedisUrl {
        RedisUrl::parse(url).unwrap()
    }

    fn servers(servers: &[(&str, u16)]) -> Vec<Server> {
        servers.iter().map(|server| Server::from(*server)).collect()
    }

    #[test]
    fn every_form_of_url_is_understood() {
        let deployment = |url| read(url).deployment;
        let standalone = |host: &str, port| Deployment::Standalone(Server::new(host, port));
        assert_eq!(deployment("redis://h"), standalone("h", 6_379));
        assert_eq!(deployment("redis://h:7/1"), standalone("h", 7));
        assert_eq!(
            deployment("rediss://10.0.0.1/"),
            standalone("10.0.0.1", 6_379)
        );
        assert_eq!(deployment("redis://[::1]:7"), standalone("::1", 7));
        assert_eq!(
            deployment("rediss-cluster://a?node=b:1&node=[::2]:2"),
            Deployment::Cluster(servers(&[("a", 6_379), ("b", 1), ("::2", 2)]))
        );
        assert_eq!(
            deployment("redis+unix:///run/a%20b.sock"),
            Deployment::Unix("/run/a b.sock".into())
        );
        assert_eq!(
            deployment("redis-sentinel://a/1?sentinelServiceName=m&node=b:1"),
            Deployment::Sentinel(SentinelDeployment {
                hosts: servers(&[("a", 26_379), ("b", 1)]),
                service: "m".into(),
                credentials: None,
            })
        );
        let sentinel =
            deployment("rediss-sentinel://a?sentinelServiceName=m&sentinelPassword=s%20p");
        let Deployment::Sentinel(sentinel) = sentinel else {
            panic!("{sentinel:?}");
        };
        assert_eq!(
            sentinel.credentials.unwrap().password.as_deref(),
            Some("s p")
        );
        for scheme in SCHEMES {
            let url = read(&scheme.form());
            assert_eq!(url.tls, scheme.name.starts_with("rediss"));
        }
    }

    #[test]
    fn credentials_and_database_are_decoded() {
        let url = read("redis://us%65r:p%40s%2Fs@h/9");
        assert_eq!(url.credentials.username.as_deref(), Some("user"));
        assert_eq!(url.credentials.password.as_deref(), Some("p@s/s"));
        assert_eq!(url.database, Some(9));
        let url = read("redis://:x@h");
        assert_eq!(url.credentials.username, None);
        assert!(read("redis://h").credentials == Credentials::default());
    }

    #[test]
    fn a_wrong_url_is_refused_by_a_line_that_says_what_is_wrong_and_repeats_nothing() {
        for (url, says) in [
            ("s3cret", "must begin with one of redis:// rediss://"),
            ("http://s3cret@h", "must begin with"),
            ("redis:s3cret", "must begin with"),
            ("redis://u:s3cret@h:notaport", "invalid port"),
            ("redis://u:s3cret@", "is not a URL"),
            ("redis:///1", "names no host"),
            ("redis://h/s3cret", "not a number from 0 to 255"),
            ("redis://h/256", "not a number from 0 to 255"),
            ("redis://u:1?s3cret@h", "%3F"),
            ("redis://h?node=s3cret:1", "it knows none"),
            ("redis://u:1#s3cret@h", "%23"),
            ("redis-cluster://h/1", "must not name a database"),
            ("redis-cluster://h?node=s3cret", "node= must be host:port"),
            ("redis-cluster://h?node=:1", "node= must be host:port"),
            ("redis-cluster://h?nodes=s3cret:1", "it knows node"),
            ("redis-sentinel://h", "sentinelServiceName=NAME"),
            (
                "redis-sentinel://h?sentinelServiceName=",
                "sentinelServiceName=NAME",
            ),
            (
                "redis-sentinel://h?servicename=s3cret",
                "it knows sentinelServiceName",
            ),
            ("redis+unix://s3cret/path", "without a host"),
            ("redis+unix://", "redis+unix:///path"),
        ] {
            let error = refused(url);
            assert!(error.contains(says), "{url}: {error}");
            assert!(!error.contains("s3cret"), "{url}: {error}");
            assert!(!error.contains('\n'), "{url}: {error}");
        }
    }
}
