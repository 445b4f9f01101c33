//! The way to Redis: the link that is used now, and how it gives way to another
//! one.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use fred::prelude::{Client, ClientLike, Config, Server};
use tokio::{sync::watch, task::JoinSet, time::Instant};

use super::{
    attempt::Attempts,
    bulk::BulkBudget,
    events::Events,
    fault::readable,
    link::{Lane, Link, LinkSettings, NoPong, lock},
    sentinel,
    settings::{Access, RedisSettings},
    stalls::Stalls,
    topology::Topology,
    url::Deployment,
};
use crate::{domain::version::RedisClock, store::StoreError};

/// The way to Redis. Cheap to clone.
#[derive(Clone)]
pub struct Connections {
    way: Arc<Way>,
    /// Follow files, and the primary that sentinels name.
    _tasks: Arc<JoinSet<()>>,
}

/// What those who use the link share with those who replace it.
pub struct Way {
    settings: LinkSettings,
    /// How Redis is reached; what it has refused does not get here.
    access: Mutex<Arc<Access>>,
    /// None until it is known where Redis is.
    link: Mutex<Option<Arc<Link>>>,
    /// Held by whoever goes over to another link, so that a new password does not
    /// lead back to an old primary.
    moving: tokio::sync::Mutex<()>,
    events: Arc<Events>,
    bulk: BulkBudget,
    /// Cloned for each large document that the service moves for itself.
    large_repairs: Arc<()>,
    stalls: Arc<Stalls>,
    clock: RedisClock,
}

// === impl Connections ===

impl Connections {
    /// fred does not say when a client gets a connection, only whether it has.
    const CONNECTED_POLL: Duration = Duration::from_millis(10);

    /// Starts to connect, in the background and for as long as it takes.
    /// Nothing larger than `largest` bytes is moved by one command.
    pub fn open(settings: &RedisSettings, largest: usize) -> Result<Self, StoreError> {
        let access = settings.access().map_err(StoreError::Unavailable)?;
        let deployment = access.deployment.clone();
        let limits = settings.limits();
        let way = Arc::new(Way {
            settings: LinkSettings {
                calls: limits.pool_size,
                timeout: limits.timeout,
                longest_wait: Attempts::longest_wait(limits.timeout, largest),
            },
            access: Mutex::new(Arc::new(access)),
            link: Mutex::default(),
            moving: tokio::sync::Mutex::default(),
            events: Arc::new(Events::new()),
            bulk: BulkBudget::new(limits.max_bulk_bytes),
            large_repairs: Arc::default(),
            stalls: Arc::new(Stalls::new()),
            clock: RedisClock::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(way.stalls.clone().measure());
        match deployment {
            Deployment::Sentinel(deployment) => {
                tasks.spawn(sentinel::follow(way.clone(), deployment));
            }
            _ => way.use_link(way.open_link(None)),
        }
        tasks.spawn(renew(way.clone(), settings.clone()));
        Ok(Self {
            way,
            _tasks: Arc::new(tasks),
        })
    }

    /// The link that is used now. None until it is known where Redis is.
    pub fn link(&self) -> Option<Arc<Link>> {
        self.way.link()
    }

    /// Waits until every connection is there, at most until `deadline`; false if one is not.
    pub async fn wait(&self, deadline: Instant) -> bool {
        loop {
            if self.link().is_some_and(|link| link.is_connected()) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(Self::CONNECTED_POLL).await;
        }
    }

    /// Which server holds which keys.
    pub fn topology(&self) -> Arc<Topology> {
        self.link()
            .map_or_else(Arc::default, |link| link.topology())
    }

    /// Asks a cluster who holds what. What comes of it is in [`Self::topology`].
    pub async fn look_at_cluster(&self) {
        if let Some(link) = self.link() {
            link.look_at_cluster().await;
        }
    }

    /// Counts new connections: each may lead to another server than before.
    pub fn connected(&self) -> watch::Receiver<u64> {
        self.way.events.connected()
    }

    /// Counts the times that other servers took the place of those before.
    pub fn moved(&self) -> watch::Receiver<u64> {
        self.way.events.moved()
    }

    /// Why there is no connection.
    pub fn why_not(&self) -> String {
        self.way.events.why_not()
    }

    /// Number of connections.
    pub fn count(&self) -> usize {
        Lane::connections(self.way.settings.calls)
    }

    /// Asks whether Redis is there, each of its servers, over the connection
    /// `index` or over any. Time that this process loses is not counted.
    pub async fn ping(&self, index: Option<usize>, bound: Duration) -> Result<(), NoPong> {
        let sent = Instant::now();
        let ping = async {
            loop {
                if let Some(link) = self.link()
                    && let Some(pong) = link.ping(index).await
                {
                    return pong;
                }
                tokio::time::sleep(Self::CONNECTED_POLL).await;
            }
        };
        match self.stalls().within(sent + bound, ping).await {
            Some(pong) => pong,
            // It is no silence where the PINGs wait behind other replies.
            None if self.link().is_some_and(|link| link.is_busy(index, sent)) => Err(NoPong::Busy),
            None => Err(NoPong::Silence),
        }
    }

    /// Replaces the connection `index`, whatever it is waiting for.
    pub fn reconnect(&self, index: usize) {
        if let Some(link) = self.link() {
            link.reconnect(index);
        }
    }

    /// Writes what the log still has to say of the connections.
    pub fn write_what_was_left_out(&self) {
        self.way.events.write_what_was_left_out();
    }

    /// What is cloned for each large document that the service moves for itself.
    pub fn large_repairs(&self) -> &Arc<()> {
        &self.way.large_repairs
    }

    /// What may be on its way at once of large documents.
    pub fn bulk(&self) -> &BulkBudget {
        &self.way.bulk
    }

    /// The time that this process has lost.
    pub fn stalls(&self) -> &Stalls {
        &self.way.stalls
    }

    /// What time it is in Redis.
    pub fn clock(&self) -> &RedisClock {
        &self.way.clock
    }

    /// The time one command gets at most.
    pub fn timeout(&self) -> Duration {
        self.way.settings.timeout
    }
}

/// Goes over to passwords and certificates that have changed, once Redis takes
/// them. Until then those of before are used.
async fn renew(way: Arc<Way>, mut settings: RedisSettings) {
    const AGAIN: Duration = Duration::from_secs(1);
    loop {
        settings.changed().await;
        let mut told = String::new();
        while let Err(reason) = way.renew(&settings).await {
            if reason != told {
                tracing::warn!(
                    reason,
                    "Redis does not take the password or certificates that have changed: those \
                     of before are used"
                );
                told = reason;
            }
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                () = settings.changed() => {}
            }
        }
        tracing::info!("the password or certificates for Redis that have changed are used");
    }
}

// === impl Way ===

impl Way {
    const CONNECTED_WITHIN: Duration = Duration::from_millis(500);
    const TRIAL_BOUND: Duration = Duration::from_secs(2);

    /// How Redis is reached.
    pub fn access(&self) -> Arc<Access> {
        lock(&self.access).clone()
    }

    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The link that is used now. None until it is known where Redis is.
    pub fn link(&self) -> Option<Arc<Link>> {
        lock(&self.link).clone()
    }

    /// Opens a link, to `server` where that is found out by asking sentinels.
    fn open_link(&self, server: Option<&Server>) -> Link {
        let config = self.access().config(server);
        Link::open(
            server.cloned(),
            config,
            self.settings,
            self.events.clone(),
            self.clock.clone(),
        )
    }

    /// Goes over to the primary that sentinels name.
    pub async fn move_to(&self, primary: &Server) {
        let _moving = self.moving.lock().await;
        self.replace_link(Some(primary)).await;
    }

    /// Opens a link, and waits until it is connected, but not for long: if it takes
    /// its time, it is used all the same.
    async fn replace_link(&self, server: Option<&Server>) {
        let link = self.open_link(server);
        let connected = async {
            while !link.is_connected() {
                tokio::time::sleep(Connections::CONNECTED_POLL).await;
            }
        };
        let _ = tokio::time::timeout(Self::CONNECTED_WITHIN, connected).await;
        self.use_link(link);
    }

    /// Connects in the way that `settings` say now, and goes over to it if Redis
    /// agrees. Otherwise why it does not.
    async fn renew(&self, settings: &RedisSettings) -> Result<(), String> {
        let access = settings.access()?;
        if let Some(link) = self.link() {
            let config = Config {
                fail_fast: true,
                ..access.config(link.server())
            };
            let client = Client::new(config, None, None, None);
            match tokio::time::timeout(Self::TRIAL_BOUND, client.init()).await {
                Ok(Ok(task)) => task.abort(),
                Ok(Err(error)) => return Err(readable(&error).to_owned()),
                Err(_) => return Err("no answer in time".into()),
            }
        }
        let _moving = self.moving.lock().await;
        *lock(&self.access) = Arc::new(access);
        if let Some(link) = self.link() {
            self.replace_link(link.server()).await;
        }
        Ok(())
    }

    /// From now on calls take this link. Those that are under way on the one
    /// before end there; then it is closed.
    fn use_link(&self, link: Link) {
        *lock(&self.link) = Some(Arc::new(link));
        self.events.moved_on();
    }
}
