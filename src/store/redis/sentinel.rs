//! Sentinels: where the primary is, as they say.
//!
//! Each sentinel is asked by a task of its own, so that one that hangs, as it
//! will together with the primary on its machine, holds up nobody. fred 10.1 asks
//! one after the other, and keeps asking a hung one.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use fred::{
    prelude::{Builder, Client, ClientLike, Error, PerformanceConfig, Server, Value},
    types::{ClusterHash, CustomCommand},
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::task::AbortOnDropHandle;

use super::{
    connection::Way,
    fault::readable,
    settings::Access,
    url::{Credentials, SentinelDeployment},
};

/// What a sentinel says.
#[derive(Debug)]
struct Word {
    primary: Server,
    /// Of the configuration of the sentinel; a failover begins a greater one.
    epoch: u64,
    /// The other sentinels; empty most of the time.
    others: Vec<Server>,
}

/// The primary that is believed in.
#[derive(Debug)]
struct Believed {
    primary: Server,
    epoch: u64,
    /// When a sentinel has named it last.
    confirmed: Instant,
}

/// A connection to a sentinel.
struct Sentinel {
    client: Client,
    service: String,
    _task: AbortOnDropHandle<Result<(), Error>>,
}

/// Between two questions to a sentinel.
const PAUSE: Duration = Duration::from_millis(100);
/// A sentinel answers, and lets itself be connected to, within this.
const BOUND: Duration = Duration::from_millis(500);
/// Every so many questions a sentinel is asked for the others.
const ASKED_FOR_OTHERS: u32 = 100;
/// No more than so many sentinels are asked.
const MOST_SENTINELS: usize = 16;
/// A primary that no sentinel has named for this long gives way to any that one
/// names: the sentinels may have been set up anew, and count from the beginning.
const UNCONFIRMED: Duration = Duration::from_secs(2);

/// Follows the primary for ever.
pub async fn follow(way: Arc<Way>, deployment: SentinelDeployment) {
    let (words, mut heard) = mpsc::channel(MOST_SENTINELS);
    let mut asking = JoinSet::new();
    let mut known = HashSet::new();
    let mut learn = |sentinels: Vec<Server>| {
        for host in sentinels {
            if known.len() < MOST_SENTINELS && known.insert(host.clone()) {
                asking.spawn(ask_forever(
                    way.clone(),
                    host,
                    deployment.clone(),
                    words.clone(),
                ));
            }
        }
    };
    learn(deployment.hosts.clone());
    let mut believed: Option<Believed> = None;
    // The channel is open as long as this runs.
    while let Some(word) = heard.recv().await {
        if Believed::gives_way(&mut believed, &word, Instant::now()) {
            let primary = &word.primary;
            tracing::info!(%primary, "the sentinels name another primary");
            // The old one is used until the new one is connected to.
            way.move_to(primary).await;
        }
        learn(word.others);
    }
}

/// Asks one sentinel again and again.
async fn ask_forever(
    way: Arc<Way>,
    host: Server,
    deployment: SentinelDeployment,
    words: mpsc::Sender<Word>,
) {
    let mut refused = 0;
    let mut told = String::new();
    loop {
        let access = way.access();
        let logins = logins(&deployment, &access.credentials);
        let login = &logins[refused % logins.len()];
        let failed = match Sentinel::connect(&access, &host, &deployment, login).await {
            Ok(sentinel) => {
                told.clear();
                sentinel.ask_while_it_answers(&words).await
            }
            Err(error) => error,
        };
        if is_about_login(&failed) {
            refused += 1;
            if refused < logins.len() {
                // Nobody said what it wants: perhaps the next one.
                continue;
            }
        }
        let reason = readable(&failed);
        if reason != told {
            tracing::warn!(sentinel = %host, reason, "a sentinel does not answer, trying again");
            told = reason.to_owned();
        }
        if way.link().is_none() {
            way.events()
                .has_no_address(&format!("the sentinel at {host}: {reason}"));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// As whom a sentinel may want us to log in. Many have the password of Redis, or
/// none.
fn logins(deployment: &SentinelDeployment, redis: &Credentials) -> Vec<Credentials> {
    if let Some(own) = &deployment.credentials {
        return vec![own.clone()];
    }
    let mut logins = vec![Credentials::default()];
    if redis.password.is_some() {
        logins.push(redis.clone());
        logins.push(Credentials {
            username: None,
            ..redis.clone()
        });
    }
    logins
}

fn is_about_login(error: &Error) -> bool {
    let text = error.details();
    ["NOAUTH", "WRONGPASS", "ERR AUTH"]
        .iter()
        .any(|code| text.starts_with(code))
}

// === impl Believed ===

impl Believed {
    /// Takes in what a sentinel says. True if another primary is believed in from
    /// now on.
    fn gives_way(believed: &mut Option<Self>, word: &Word, now: Instant) -> bool {
        let is_newer = match believed {
            Some(believed) if believed.primary == word.primary => {
                believed.epoch = believed.epoch.max(word.epoch);
                believed.confirmed = now;
                return false;
            }
            Some(believed) => {
                // A sentinel that was cut off tells old news.
                word.epoch > believed.epoch || now - believed.confirmed > UNCONFIRMED
            }
            None => true,
        };
        if is_newer {
            *believed = Some(Self {
                primary: word.primary.clone(),
                epoch: word.epoch,
                confirmed: now,
            });
        }
        is_newer
    }
}

// === impl Sentinel ===

impl Sentinel {
    async fn connect(
        access: &Access,
        host: &Server,
        deployment: &SentinelDeployment,
        login: &Credentials,
    ) -> Result<Self, Error> {
        let config = access.sentinel_config(host, login);
        let client = Builder::from_config(config)
            .with_performance_config(|config: &mut PerformanceConfig| {
                config.default_command_timeout = BOUND;
            })
            .with_connection_config(|config| {
                config.connection_timeout = BOUND;
                config.internal_command_timeout = BOUND;
            })
            .build()?;
        // The task ends with the connection: there is no policy to reconnect.
        let task = client.init().await?;
        Ok(Self {
            client,
            service: deployment.service.clone(),
            _task: AbortOnDropHandle::new(task),
        })
    }

    /// Asks again and again. Why that came to an end.
    async fn ask_while_it_answers(&self, words: &mpsc::Sender<Word>) -> Error {
        let mut question = 0u32;
        loop {
            let with_others = question.is_multiple_of(ASKED_FOR_OTHERS);
            match self.ask(with_others).await {
                Ok(word) => {
                    // It is received as long as this runs.
                    let _ = words.send(word).await;
                }
                Err(error) => return error,
            }
            question = question.wrapping_add(1);
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn ask(&self, with_others: bool) -> Result<Word, Error> {
        // In this order: an address is never older than its epoch.
        let master: Vec<(String, String)> = self.sentinel("MASTER").await?.convert()?;
        let epoch = master.iter().find(|(name, _)| name == "config-epoch");
        let epoch = epoch.and_then(|(_, epoch)| epoch.parse().ok());
        let address = self.sentinel("GET-MASTER-ADDR-BY-NAME").await?;
        let (host, port): (String, u16) = address.convert()?;
        let mut others = Vec::new();
        if with_others {
            for fields in self.sentinel("SENTINELS").await?.into_array() {
                let fields: Vec<(String, String)> = fields.convert()?;
                let field = |name| {
                    let mut fields = fields.iter();
                    fields.find_map(|(field, value)| (field == name).then_some(value))
                };
                if let (Some(ip), Some(port)) = (field("ip"), field("port"))
                    && let Ok(port) = port.parse()
                {
                    others.push(Server::new(ip.as_str(), port));
                }
            }
        }
        Ok(Word {
            primary: Server::new(host, port),
            epoch: epoch.unwrap_or(0),
            others,
        })
    }

    async fn sentinel(&self, question: &'static str) -> Result<Value, Error> {
        let command = CustomCommand::new_static("SENTINEL", ClusterHash::Random, false);
        let arguments = vec![question, self.service.as_str()];
        self.client.custom(command, arguments).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(port: u16, epoch: u64) -> Word {
        Word {
            primary: Server::new("h", port),
            epoch,
            others: Vec::new(),
        }
    }

    #[test]
    fn the_newest_word_counts_and_old_news_do_not() {
        let now = Instant::now();
        let mut believed = None;
        assert!(Believed::gives_way(&mut believed, &word(1, 3), now));
        assert!(!Believed::gives_way(&mut believed, &word(1, 3), now));
        // A failover, of which another sentinel has not heard yet.
        assert!(Believed::gives_way(&mut believed, &word(2, 4), now));
        assert!(!Believed::gives_way(&mut believed, &word(1, 3), now));
        assert!(!Believed::gives_way(&mut believed, &word(3, 4), now));
        // The first one is back, and that is no news to the one that was cut off.
        assert!(Believed::gives_way(&mut believed, &word(1, 5), now));
        assert!(!Believed::gives_way(&mut believed, &word(1, 3), now));
        assert!(!Believed::gives_way(&mut believed, &word(2, 4), now));
    }

    #[test]
    fn a_primary_that_nobody_names_any_more_gives_way() {
        let now = Instant::now();
        let mut believed = None;
        assert!(Believed::gives_way(&mut believed, &word(1, 9), now));
        let later = now + UNCONFIRMED + Duration::from_millis(1);
        assert!(!Believed::gives_way(&mut believed, &word(1, 9), later));
        assert!(!Believed::gives_way(&mut believed, &word(2, 0), later));
        let much_later = later + UNCONFIRMED + Duration::from_millis(1);
        assert!(Believed::gives_way(&mut believed, &word(2, 0), much_later));
    }

    #[test]
    fn a_sentinel_is_offered_the_password_of_redis_only_when_none_is_its_own() {
        let redis = Credentials {
            username: Some("u".into()),
            password: Some("p".into()),
        };
        let mut deployment = SentinelDeployment {
            hosts: Vec::new(),
            service: "m".into(),
            credentials: None,
        };
        let of = |deployment: &SentinelDeployment, redis: &Credentials| -> Vec<_> {
            logins(deployment, redis)
                .into_iter()
                .map(|login| (login.username, login.password))
                .collect()
        };
        let (u, p) = (Some("u".to_owned()), Some("p".to_owned()));
        assert_eq!(of(&deployment, &Credentials::default()), [(None, None)]);
        assert_eq!(
            of(&deployment, &redis),
            [(None, None), (u, p.clone()), (None, p)]
        );
        deployment.credentials = Some(Credentials::default());
        assert_eq!(of(&deployment, &redis), [(None, None)]);
    }
}
