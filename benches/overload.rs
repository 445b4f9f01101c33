//! What four times the load that the service can bear does to the calls that it
//! admits: their p99, beside that at saturation. The goal is at most twice.
//!
//! `cargo bench --bench overload` has groups counted in memory, which costs the
//! service much and the load generator nothing, so that the service is what is short of
//! CPU on one machine with both. Saturation: as many calls in flight as
//! `--max-concurrent-calls` admits, each followed by the next. Overload: calls begin at
//! four times the rate that was answered then, whether earlier ones have been
//! answered or not.

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use common::service::{Client, Service};
use groupstate::grpc::proto as pb;
use tokio::task::JoinSet;
use tonic::Code;

const ROUND: Duration = Duration::from_secs(10);
/// The beginning of a round, which does not count.
const WARM_UP: Duration = Duration::from_secs(2);
const LIMITS: [usize; 2] = [64, 256];
const CONNECTIONS: usize = 8;
/// Groups that are looked at for each call.
const GROUPS: usize = 50_000;
const BATCH: usize = 1_000;
const OVERLOAD: f64 = 4.0;
/// Calls that begin at once: a timer is no finer.
const TICK: Duration = Duration::from_millis(2);

/// What became of the calls of a round.
#[derive(Default)]
struct Round {
    /// How long the admitted ones took.
    admitted: Vec<Duration>,
    /// How long it took to refuse the others.
    shed: Vec<Duration>,
    failed: usize,
}

#[tokio::main]
async fn main() {
    println!("Size over {GROUPS} groups in memory, {CONNECTIONS} connections, {ROUND:?} a round\n");
    println!(
        "| in flight at most | load | offered/s | admitted/s | p50 | p99 | shed/s | p99 of a refusal | failed |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for limit in LIMITS {
        let service = Service::start(&[
            "--max-concurrent-calls",
            &limit.to_string(),
            // The other limit is the one that is looked at.
            "--max-scans",
            "100000",
        ]);
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            clients.push(service.client().await);
        }
        store(&mut clients[0]).await;
        let saturated = saturate(&clients, limit).await;
        let rate = saturated.rate();
        saturated.print(limit, "saturation");
        let overloaded = overload(&clients, OVERLOAD * rate).await;
        overloaded.print(limit, "4 × overload");
        let ratio = overloaded.p99().as_secs_f64() / saturated.p99().as_secs_f64();
        println!("| {limit} | ratio of p99: {ratio:.2} | | | | | | | |");
    }
}

async fn store(client: &mut Client) {
    let group = |number: usize| pb::AlertGroup {
        key: format!("alertname=HighCPU,instance=web-{number}"),
        metadata: Some(pb::GroupMetadata {
            state: pb::GroupState::Firing.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    for first in (0..GROUPS).step_by(BATCH) {
        let groups = (first..first + BATCH).map(group).collect();
        let request = pb::StoreAllRequest {
            groups,
            expiry: None,
        };
        client.store_all(request).await.expect("memory takes it");
    }
}

/// One call, if it is over before the round is.
async fn call(mut client: Client, round: Arc<Mutex<Round>>, counts_from: Instant) {
    let request = pb::SizeRequest {
        prefix: "alertname=HighCPU".into(),
    };
    let begin = Instant::now();
    let answer = client.size(request).await;
    let took = begin.elapsed();
    if begin < counts_from {
        return;
    }
    let mut round = round.lock().expect("nothing panics while it is held");
    match answer {
        Ok(_) => round.admitted.push(took),
        Err(status) if status.code() == Code::ResourceExhausted => round.shed.push(took),
        Err(_) => round.failed += 1,
    }
}

/// Each call is followed by the next.
async fn saturate(clients: &[Client], in_flight: usize) -> Round {
    let round = Arc::<Mutex<Round>>::default();
    let counts_from = Instant::now() + WARM_UP;
    let end = counts_from + ROUND;
    let mut callers = JoinSet::new();
    for number in 0..in_flight {
        let client = clients[number % clients.len()].clone();
        let round = round.clone();
        callers.spawn(async move {
            while Instant::now() < end {
                call(client.clone(), round.clone(), counts_from).await;
            }
        });
    }
    callers.join_all().await;
    std::mem::take(&mut round.lock().expect("no caller is left"))
}

/// Calls begin at this rate, come what may.
async fn overload(clients: &[Client], rate: f64) -> Round {
    let round = Arc::<Mutex<Round>>::default();
    let begin = Instant::now();
    let counts_from = begin + WARM_UP;
    let end = counts_from + ROUND;
    let mut calls = JoinSet::new();
    let mut begun = 0;
    while Instant::now() < end {
        let due = (begin.elapsed().as_secs_f64() * rate) as usize;
        for number in begun..due {
            let client = clients[number % clients.len()].clone();
            calls.spawn(call(client, round.clone(), counts_from));
        }
        begun = due;
        while calls.try_join_next().is_some() {}
        tokio::time::sleep(TICK).await;
    }
    calls.join_all().await;
    std::mem::take(&mut round.lock().expect("no call is left"))
}

// === impl Round ===

impl Round {
    fn rate(&self) -> f64 {
        self.admitted.len() as f64 / ROUND.as_secs_f64()
    }

    fn p99(&self) -> Duration {
        percentile(&self.admitted, 0.99)
    }

    fn print(&self, limit: usize, load: &str) {
        let per_second = |count: usize| count as f64 / ROUND.as_secs_f64();
        println!(
            "| {limit} | {load} | {:.0} | {:.0} | {:.1?} | {:.1?} | {:.0} | {:.1?} | {} |",
            per_second(self.admitted.len() + self.shed.len() + self.failed),
            self.rate(),
            percentile(&self.admitted, 0.5),
            self.p99(),
            per_second(self.shed.len()),
            percentile(&self.shed, 0.99),
            self.failed,
        );
    }
}

fn percentile(times: &[Duration], share: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() as f64 * share) as usize;
    sorted
        .get(at.min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or_default()
}
