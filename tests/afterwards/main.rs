//! After a failure everything is as fast as before, and takes no more: of each kind of
//! failure, each rpc is measured before it and after the recovery, and with that idle
//! CPU, memory, threads, tasks, open files, connections to Redis, and what is logged.
//!
//! | module | what is in it |
//! |---|---|
//! | [`scene`] | a service, the failures it has seen, and what came of them |
//! | [`alone`] | everything that happens to one Redis |
//! | [`rotation`] | passwords and certificates that change |
//! | [`replicated`] | replicas that take over, by sentinels and in a cluster |
//! | [`judged`] | what counts as worse, on conditions made by hand |
//! | [`table`] | `make afterwards`: all of it as tables |
//!
//! What is measured, and what counts as worse, is in [`common::condition`].

#[path = "../common/mod.rs"]
mod common;

mod alone;
mod judged;
mod replicated;
mod rotation;
mod scene;
mod table;

use common::replicated::Kind;

/// How often each rpc is called in a look: enough for a median.
const ROUNDS: usize = 11;

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_was_silent_leaves_nothing_slower() {
    alone::silent(ROUNDS).await.assert();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_refused_leaves_nothing_slower() {
    alone::refusing(ROUNDS).await.assert();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_was_gone_leaves_nothing_slower() {
    alone::gone(ROUNDS).await.assert();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_ended_leave_nothing_slower() {
    alone::disconnected(ROUNDS).await.assert();
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_vanished_or_came_late_leave_nothing_slower() {
    alone::out_of_reach(ROUNDS).await.assert();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_or_certificate_that_changed_leaves_nothing_slower() {
    rotation::password(ROUNDS).await.assert();
    rotation::certificates(ROUNDS).await.assert();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_by_sentinels_leaves_nothing_slower() {
    replicated::failovers(Kind::Sentinel, ROUNDS).await.assert();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_in_a_cluster_leaves_nothing_slower() {
    replicated::failovers(Kind::Cluster, ROUNDS).await.assert();
}
