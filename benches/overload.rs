//! What four times the load that the service can bear does to the calls that it
//! admits: their p99, beside that at saturation. The goal is at most twice.
//!
//! `cargo bench --bench overload` loads large groups from memory, over and over. The
//! service has one core and the load generator another: it is the service that is
//! to be short of CPU. Saturation: as many calls in flight as
//! `--max-concurrent-calls` admits, each followed by the next. Overload: calls begin at
//! four times the rate that was answered then, whether earlier ones have been
//! answered or not.

#[path = "../tests/common/mod.rs"]
mod common;
mod load;

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use common::service::Service;
use load::RawClient;
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::{runtime::Runtime, task::JoinSet};
use tonic::Code;

const ROUND: Duration = Duration::from_secs(10);
/// The beginning of a round, which does not count.
const WARM_UP: Duration = Duration::from_secs(2);
const LIMITS: [usize; 3] = [64, 256, 1_024];
const CONNECTIONS: usize = 8;
const ALERTS: usize = 200;
const OVERLOAD: f64 = 4.0;
/// Calls that begin at once: a timer is no finer.
const TICK: Duration = Duration::from_millis(2);

const CORE_OF_SERVICE: usize = 0;
const CORE_OF_LOAD: usize = 1;

/// What became of the calls of a round.
#[derive(Default)]
struct Round {
    /// How long the admitted ones took.
    admitted: Vec<Duration>,
    /// How long it took to refuse the others.
    shed: Vec<Duration>,
    failed: usize,
}

fn main() {
    println!(
        "Load of {ALERTS} alerts from memory, {CONNECTIONS} connections, {ROUND:?} a round, a core each\n"
    );
    println!(
        "| in flight at most | load | offered/s | admitted/s | p50 | p99 | shed/s | p99 of a refusal | failed |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for limit in LIMITS {
        // What is started takes over the core of who starts it.
        stay_on(CORE_OF_SERVICE);
        let service = Service::start(&["--max-concurrent-calls", &limit.to_string()]);
        stay_on(CORE_OF_LOAD);
        let runtime = Runtime::new().expect("a runtime");
        runtime.block_on(compare(&service, limit));
    }
}

fn stay_on(core: usize) {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).expect("this takes two cores");
}

async fn compare(service: &Service, limit: usize) {
    let client = RawClient::connect(service.addr(), CONNECTIONS).await;
    let stored = client.call(0, load::STORE, load::store_request(0, ALERTS));
    stored.await.expect("memory takes it");
    let saturated = saturate(&client, limit).await;
    let rate = saturated.rate();
    saturated.print(limit, "saturation");
    let overloaded = overload(&client, OVERLOAD * rate).await;
    overloaded.print(limit, "4 × overload");
    let ratio = overloaded.p99().as_secs_f64() / saturated.p99().as_secs_f64();
    println!("| {limit} | ratio of p99: {ratio:.2} | | | | | | | |");
}

/// One call, if it is over before the round is.
async fn call(
    client: RawClient,
    number: usize,
    request: Bytes,
    round: Arc<Mutex<Round>>,
    counts_from: Instant,
) {
    let begin = Instant::now();
    let answer = client.call(number, load::LOAD, request).await;
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
async fn saturate(client: &RawClient, in_flight: usize) -> Round {
    let request = load::load_request(0);
    let round = Arc::<Mutex<Round>>::default();
    let counts_from = Instant::now() + WARM_UP;
    let end = counts_from + ROUND;
    let mut callers = JoinSet::new();
    for number in 0..in_flight {
        let (client, request, round) = (client.clone(), request.clone(), round.clone());
        callers.spawn(async move {
            while Instant::now() < end {
                let (client, request, round) = (client.clone(), request.clone(), round.clone());
                call(client, number, request, round, counts_from).await;
            }
        });
    }
    callers.join_all().await;
    std::mem::take(&mut round.lock().expect("no caller is left"))
}

/// Calls begin at this rate, come what may.
async fn overload(client: &RawClient, rate: f64) -> Round {
    let request = load::load_request(0);
    let round = Arc::<Mutex<Round>>::default();
    let begin = Instant::now();
    let counts_from = begin + WARM_UP;
    let end = counts_from + ROUND;
    let mut calls = JoinSet::new();
    let mut begun = 0;
    while Instant::now() < end {
        let due = (begin.elapsed().as_secs_f64() * rate) as usize;
        for number in begun..due {
            let (client, request, round) = (client.clone(), request.clone(), round.clone());
            calls.spawn(call(client, number, request, round, counts_from));
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
