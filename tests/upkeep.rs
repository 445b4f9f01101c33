//! What is measured does not pile up when nobody scrapes. The only test of its
//! process, whose memory it looks at.

use std::{fs, time::Duration};

use groupstate::{
    config::Settings,
    server::Server,
    telemetry::{self, RedisCommand},
};

/// Of about 16 bytes each, until they are put into their buckets.
const SAMPLES: usize = 500_000;
const ROUNDS: usize = 4;

/// Longer than between two upkeeps.
const PAUSE: Duration = Duration::from_secs(3);

#[tokio::test(start_paused = true)]
async fn samples_do_not_pile_up_when_nobody_scrapes() {
    telemetry::metrics().unwrap();
    let addresses = ["--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0"];
    let settings = Settings::read(["groupstate"].iter().chain(&addresses)).unwrap();
    let _server = Server::bind(settings).await.unwrap();
    let mut resident_kib = Vec::new();
    for _ in 0..ROUNDS {
        for _ in 0..SAMPLES {
            drop(telemetry::redis_attempt(RedisCommand::Other));
        }
        tokio::time::sleep(PAUSE).await;
        resident_kib.push(resident());
    }
    // After the first round memory is used again.
    let growth = resident_kib[ROUNDS - 1].saturating_sub(resident_kib[0]);
    let piled_up = (ROUNDS - 1) * SAMPLES * 16 / 1_024;
    assert!(growth < piled_up / 4, "{resident_kib:?} KiB");
}

/// Memory that this process holds, in KiB.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.and_then(|kib| kib.parse().ok())
        .expect("Linux says it in KiB")
}
