//! What is measured of one side in one round, and what all rounds say together.

use std::time::Duration;

/// How long a round takes.
pub const ROUND: Duration = Duration::from_secs(2);

/// Calls in flight: each is followed by the next.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub connections: usize,
    pub on_each: usize,
}

/// What one side did in a round.
pub struct Sample {
    /// How long each call took.
    pub latencies: Vec<Duration>,
    /// Processor time of the server and of Redis.
    pub server_cpu: Duration,
    pub redis_cpu: Duration,
    /// Memory of the server after it, in bytes.
    pub server_rss: usize,
}

/// The median round by throughput, and what a call costs over all rounds.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    pub calls_per_second: f64,
    pub p50: Duration,
    pub p99: Duration,
    /// Seconds of processor time for 100,000 calls.
    pub server_cpu: f64,
    pub redis_cpu: f64,
    pub server_rss: usize,
}

/// Takes the rounds together.
pub fn summary(mut samples: Vec<Sample>) -> Summary {
    let calls: usize = samples.iter().map(|sample| sample.latencies.len()).sum();
    let per_100_000 = |cpu: fn(&Sample) -> Duration| {
        let sum: Duration = samples.iter().map(cpu).sum();
        sum.as_secs_f64() / calls as f64 * 100_000.0
    };
    let server_cpu = per_100_000(|sample| sample.server_cpu);
    let redis_cpu = per_100_000(|sample| sample.redis_cpu);
    samples.sort_by_key(|sample| sample.latencies.len());
    let middle = samples.len() / 2;
    let median = &mut samples[middle];
    median.latencies.sort_unstable();
    let percentile = |share: f64| {
        let at = (median.latencies.len() as f64 * share) as usize;
        median.latencies[at.min(median.latencies.len() - 1)]
    };
    Summary {
        calls_per_second: median.latencies.len() as f64 / ROUND.as_secs_f64(),
        p50: percentile(0.5),
        p99: percentile(0.99),
        server_cpu,
        redis_cpu,
        server_rss: median.server_rss,
    }
}

impl Load {
    pub const fn new(connections: usize, on_each: usize) -> Self {
        Self {
            connections,
            on_each,
        }
    }

    pub const fn in_flight(self) -> usize {
        self.connections * self.on_each
    }
}
