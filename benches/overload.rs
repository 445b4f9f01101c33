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
    cell::RefCell,
    process,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use common::service::Service;
use h2::client::SendRequest;
use http::Request;
use load::{RawClient, usage::Usage};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::{
    net::TcpStream,
    runtime,
    task::{JoinSet, LocalSet},
};
use tonic::{Code, Status};

const ROUND: Duration = Duration::from_secs(10);
/// The beginning of a round, which does not count.
const WARM_UP: Duration = Duration::from_secs(2);
const LIMITS: [usize; 3] = [64, 256, 1_024];
const CONNECTIONS: usize = 8;
const ALERTS: usize = 200;
const OVERLOAD: f64 = 4.0;
/// Calls that begin at once: a timer is no finer.
const TICK: Duration = Duration::from_millis(2);
/// Bytes that the service may send before it is told to go on.
const WINDOW: u32 = 16 << 20;

const CORE_OF_SERVICE: usize = 0;
const CORE_OF_LOAD: usize = 1;

/// Connections without more between them and a call than HTTP/2: at four times the
/// load the generator must not be what is slow.
struct Generator {
    url: String,
    request: Bytes,
    connections: Vec<SendRequest<Bytes>>,
    service: u32,
}

/// What became of the calls of a round.
#[derive(Default)]
struct Round {
    /// How long the admitted ones took.
    admitted: Vec<Duration>,
    /// How long it took to refuse the others.
    shed: Vec<Duration>,
    failed: usize,
    /// Parts of their cores that were used.
    service_core: f64,
    load_core: f64,
}

fn main() {
    println!(
        "Load of {ALERTS} alerts from memory, {CONNECTIONS} connections, {ROUND:?} a round, a core each\n"
    );
    println!(
        "| in flight at most | load | offered/s | admitted/s | p50 | p99 | shed/s | p99 of a refusal | failed \
         | core of the service | of the load |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for limit in LIMITS {
        // What is started takes over the core of who starts it.
        stay_on(CORE_OF_SERVICE);
        let service = Service::start(&["--max-concurrent-calls", &limit.to_string()]);
        stay_on(CORE_OF_LOAD);
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        LocalSet::new().block_on(&runtime, compare(&service, limit));
    }
}

fn stay_on(core: usize) {
    let mut cores = CpuSet::new();
    cores.set(core);
    sched_setaffinity(None, &cores).expect("this takes two cores");
}

async fn compare(service: &Service, limit: usize) {
    let client = RawClient::connect(service.addr(), 1).await;
    let stored = client.call(0, load::STORE, load::store_request(0, ALERTS));
    stored.await.expect("memory takes it");
    let generator = Rc::new(Generator::connect(service).await);
    let saturated = saturate(&generator, limit).await;
    let rate = saturated.rate();
    saturated.print(limit, "saturation");
    let overloaded = overload(&generator, OVERLOAD * rate).await;
    overloaded.print(limit, "4 × overload");
    let ratio = overloaded.p99().as_secs_f64() / saturated.p99().as_secs_f64();
    println!("| {limit} | ratio of p99: {ratio:.2} | | | | | | | | | |");
}

/// Each call is followed by the next.
async fn saturate(generator: &Rc<Generator>, in_flight: usize) -> Round {
    let begin = Instant::now();
    let round = Rc::<RefCell<Round>>::default();
    let mut callers = JoinSet::new();
    for number in 0..in_flight {
        let (generator, round) = (generator.clone(), round.clone());
        callers.spawn_local(async move {
            while begin.elapsed() < WARM_UP + ROUND {
                let call = generator.clone().call(number, round.clone());
                call.await;
            }
        });
    }
    generator.watch(&round).await;
    callers.join_all().await;
    round.take()
}

/// Calls begin at this rate, come what may.
async fn overload(generator: &Rc<Generator>, rate: f64) -> Round {
    let begin = Instant::now();
    let round = Rc::<RefCell<Round>>::default();
    let watched = round.clone();
    let watch = {
        let generator = generator.clone();
        tokio::task::spawn_local(async move { generator.watch(&watched).await })
    };
    let mut calls = JoinSet::new();
    let mut begun = 0;
    while begin.elapsed() < WARM_UP + ROUND {
        let due = (begin.elapsed().as_secs_f64() * rate) as usize;
        for number in begun..due {
            calls.spawn_local(generator.clone().call(number, round.clone()));
        }
        begun = due;
        while calls.try_join_next().is_some() {}
        tokio::time::sleep(TICK).await;
    }
    calls.join_all().await;
    watch.await.expect("it does not panic");
    round.take()
}

// === impl Generator ===

impl Generator {
    async fn connect(service: &Service) -> Self {
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let tcp = TcpStream::connect(service.addr()).await;
            let tcp = tcp.expect("the service listens");
            tcp.set_nodelay(true).expect("every socket has it");
            let handshake = h2::client::Builder::new()
                .initial_window_size(WINDOW)
                .initial_connection_window_size(WINDOW)
                .handshake(tcp)
                .await;
            let (send_request, connection) = handshake.expect("it is HTTP/2");
            tokio::task::spawn_local(connection);
            connections.push(send_request);
        }
        let message = load::load_request(0);
        let length = u32::try_from(message.len()).expect("a small message");
        let request = [&[0][..], &length.to_be_bytes(), &message].concat();
        Self {
            url: format!("http://{}{}", service.addr(), load::LOAD),
            request: request.into(),
            connections,
            service: service.process().child.id(),
        }
    }

    /// One call, and what became of it: what is still warming up does not count.
    async fn call(self: Rc<Self>, number: usize, round: Rc<RefCell<Round>>) {
        let begin = Instant::now();
        let status = self.status_of_call(number).await;
        let took = begin.elapsed();
        let mut round = round.borrow_mut();
        match status.map(|status| status.code()) {
            Ok(Code::Ok) => round.admitted.push(took),
            Ok(Code::ResourceExhausted) => round.shed.push(took),
            _ => round.failed += 1,
        }
    }

    async fn status_of_call(&self, number: usize) -> Result<Status, h2::Error> {
        let connection = self.connections[number % CONNECTIONS].clone();
        let request = Request::post(&self.url)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("well-formed");
        let (response, mut body) = connection.ready().await?.send_request(request, false)?;
        body.send_data(self.request.clone(), true)?;
        let response = response.await?;
        if let Some(refused) = Status::from_header_map(response.headers()) {
            return Ok(refused);
        }
        let mut body = response.into_body();
        while let Some(part) = body.data().await {
            let bytes = part?.len();
            body.flow_control().release_capacity(bytes)?;
        }
        let trailers = body.trailers().await?.unwrap_or_default();
        let missing = || Status::internal("no status");
        Ok(Status::from_header_map(&trailers).unwrap_or_else(missing))
    }

    /// Leaves of a round what comes after its beginning, and counts what it takes.
    async fn watch(&self, round: &RefCell<Round>) {
        tokio::time::sleep(WARM_UP).await;
        round.take();
        let before = (Usage::of(self.service), Usage::of(process::id()));
        tokio::time::sleep(ROUND).await;
        let part = |before: Usage, pid| (Usage::of(pid).cpu - before.cpu).div_duration_f64(ROUND);
        let mut round = round.borrow_mut();
        round.service_core = part(before.0, self.service);
        round.load_core = part(before.1, process::id());
    }
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
            "| {limit} | {load} | {:.0} | {:.0} | {:.1?} | {:.1?} | {:.0} | {:.1?} | {} | {:.2} | {:.2} |",
            per_second(self.admitted.len() + self.shed.len() + self.failed),
            self.rate(),
            percentile(&self.admitted, 0.5),
            self.p99(),
            per_second(self.shed.len()),
            percentile(&self.shed, 0.99),
            self.failed,
            self.service_core,
            self.load_core,
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
