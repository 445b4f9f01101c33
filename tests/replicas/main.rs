//! Replicas as processes, on two instances of the service and a real Redis: no
//! alert is lost, whatever is killed.
//!
//! | file | what it shows |
//! |---|---|
//! | here | replicas that receive the same webhooks at the same moment |
//! | `faults.rs` | Redis, instances and replicas are killed meanwhile |
//! | `alertmanager.rs` | a real Alertmanager sends to all replicas |
//! | `prometheus.rs` | two real Prometheus tell it of the same alert |
//! | `webhooks.rs` | what others send, and the answers that the README shows |
//! | `churn.rs` | a group in which alerts come and go stays small |
//! | `stories.rs` | use cases and mishaps, step by step |
//! | `table.rs` | `make replicas`: the long runs, and their table |
//!
//! The rest are helpers: `site.rs` is what runs, `replica.rs` one replica of it,
//! `load.rs` sends the webhooks of `recorded.rs`.

#[path = "../common/mod.rs"]
mod common;

mod alertmanager;
mod churn;
mod faults;
mod load;
mod prometheus;
mod recorded;
mod replica;
mod site;
mod stories;
mod table;
mod webhooks;

use load::{Load, To};
use site::Site;

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_receive_every_webhook_at_the_same_moment() {
    let site = Site::start(3).await;
    Load::FAST.begin(&site).await.unwrap();
    site.holds_what_was_recorded().await;
    // They did meet.
    let tally = site.tally().await;
    assert!(tally.conflicts > 0, "{tally:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_share_the_webhooks() {
    let site = Site::start(2).await;
    let load = Load {
        to: To::One,
        ..Load::FAST
    };
    load.begin(&site).await.unwrap();
    site.holds_what_was_recorded().await;
}
