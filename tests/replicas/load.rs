//! Those who send the webhooks, as Alertmanager does: each group's one after
//! another, and each again until it is answered 200.

use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::{sync::watch, task::JoinSet};

use crate::{common::http, recorded, replica::ANSWER_WITHIN, site::Site};

/// How the recorded webhooks are sent.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Webhooks, of different groups, that are under way at the same time.
    pub lanes: usize,
    /// After each webhook of a lane, to stretch the load.
    pub pause: Duration,
    /// Which replicas get a webhook.
    pub to: To,
}

/// Which replicas get a webhook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// All of them, at the same moment.
    Each,
    /// One of them in turn.
    One,
}

/// Before a webhook is sent again.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

// === impl Load ===

impl Load {
    /// To every replica, as fast as they take them.
    pub const FAST: Self = Self {
        lanes: 4,
        pause: Duration::ZERO,
        to: To::Each,
    };

    /// To every replica, over about this time if nothing fails.
    pub fn over(time: Duration) -> Self {
        let longest = recorded::lanes(Self::FAST.lanes).iter().map(Vec::len).max();
        Self {
            pause: time / longest.unwrap_or(1) as u32,
            ..Self::FAST
        }
    }

    /// Begins to send; the handle ends when all are answered, and says how long
    /// that took.
    pub fn begin(self, site: &Site) -> tokio::task::JoinHandle<Duration> {
        let receivers = site.receivers();
        tokio::spawn(async move {
            let begin = Instant::now();
            let mut lanes = JoinSet::new();
            for webhooks in recorded::lanes(self.lanes) {
                lanes.spawn(self.send(webhooks, receivers.clone()));
            }
            lanes.join_all().await;
            begin.elapsed()
        })
    }

    async fn send(self, webhooks: Vec<&'static str>, receivers: watch::Receiver<Vec<String>>) {
        for (number, webhook) in webhooks.into_iter().enumerate() {
            let mut to = receivers.borrow().clone();
            if self.to == To::One {
                to = vec![to.swap_remove(number % to.len())];
            }
            let sent = to.iter().map(|addr| deliver(addr, webhook, &receivers));
            join_all(sent).await;
            tokio::time::sleep(self.pause).await;
        }
    }
}

/// Sends until it is answered, or its replica is there no more.
async fn deliver(addr: &String, webhook: &str, receivers: &watch::Receiver<Vec<String>>) {
    while receivers.borrow().contains(addr) {
        match http::send(addr, "POST", "/webhook", webhook, ANSWER_WITHIN).await {
            Ok(reply) if reply.status == 200 => return,
            // Alertmanager would not send it again.
            Ok(reply) => assert_eq!(reply.status, 503, "{reply:?}"),
            // The replica was killed, before it answered or before it was asked.
            Err(_) => {}
        }
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}
