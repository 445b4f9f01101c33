//! The way to Redis: the link that is used now, and how it gives way to another
//! one.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use fred::prelude::Server;
use tokio::{sync::watch, task::JoinSet, time::Instant};

use super::{
    link::{Events, Link, NoPong, lock},
    sentinel,
    settings::{Deployment, RedisSettings},
    topology::Topology,
};
use crate::store::StoreError;

/// The way to Redis. Cheap to clone.
#[derive(Clone)]
pub struct Connections {
    way: Arc<Way>,
    /// Follow the primary that sentinels name.
    _tasks: Arc<JoinSet<()>>,
}

/// What those who use the link share with those who replace it.
pub struct Way {
    settings: RedisSettings,
    /// None until it is known where Redis is.
    link: Mutex<Option<Arc<Link>>>,
    events: Arc<Events>,
}

// === impl Connections ===

impl Connections {
    /// fred does not say when a client gets a connection, only whether it has.
    const CONNECTED_POLL: Duration = Duration::from_millis(10);

    /// Starts to connect, in the background and for as long as it takes.
    pub fn open(settings: &RedisSettings) -> Result<Self, StoreError> {
        let way = Arc::new(Way {
            settings: settings.clone(),
            link: Mutex::default(),
            events: Arc::new(Events::new()),
        });
        let mut tasks = JoinSet::new();
        match &settings.deployment {
            Deployment::Sentinel(deployment) => {
                tasks.spawn(sentinel::follow(way.clone(), deployment.clone()));
            }
            _ => way.use_link(way.link_to(None)?),
        }
        Ok(Self {
            way,
            _tasks: Arc::new(tasks),
        })
    }

    /// The link that is used now. None until it is known where Redis is.
    pub fn link(&self) -> Option<Arc<Link>> {
        self.way.link()
    }

    /// Waits until Redis answers, at most until `deadline`; false if it does
    /// not.
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
        self.way.settings.pool_size
    }

    /// Asks whether Redis is there, each of its servers, over the connection
    /// `index` or over any.
    pub async fn ping(&self, index: Option<usize>, bound: Duration) -> Result<(), NoPong> {
        let end = Instant::now() + bound;
        while Instant::now() < end {
            if let Some(link) = self.link()
                && let Some(pong) = link.ping(index, end).await
            {
                return pong;
            }
            tokio::time::sleep(Self::CONNECTED_POLL).await;
        }
        Err(NoPong::Silence)
    }

    /// Replaces the connection `index`, whatever it is waiting for.
    pub fn reconnect(&self, index: usize) {
        if let Some(link) = self.link() {
            link.reconnect(index);
        }
    }

    /// The time one command gets at most.
    pub fn timeout(&self) -> Duration {
        self.way.settings.timeout
    }
}

// === impl Way ===

impl Way {
    pub fn settings(&self) -> &RedisSettings {
        &self.settings
    }

    pub fn events(&self) -> &Events {
        &self.events
    }

    fn link(&self) -> Option<Arc<Link>> {
        lock(&self.link).clone()
    }

    /// Opens a link, to `server` where that is found out by asking sentinels.
    pub fn link_to(&self, server: Option<&Server>) -> Result<Link, StoreError> {
        let Self {
            settings, events, ..
        } = self;
        Link::open(
            settings.config(server),
            settings.pool_size,
            settings.timeout,
            events.clone(),
        )
    }

    /// From now on calls take this link. Those that are under way on the one
    /// before end there; then it is closed.
    pub fn use_link(&self, link: Link) {
        *lock(&self.link) = Some(Arc::new(link));
        self.events.moved_on();
    }
}
