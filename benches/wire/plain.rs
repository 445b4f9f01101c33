//! Redis by itself, as its own benchmark drives it.

use std::{net::SocketAddr, process::Command};

use super::ROUNDS;

/// Clients, each with one command in flight.
pub const CLIENTS: usize = 50;
const COMMANDS: usize = 200_000;

/// Commands a second, each the median of the rounds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain {
    pub set: f64,
    pub get: f64,
}

/// With values of so many bytes.
pub fn measure(redis: SocketAddr, bytes: usize) -> Plain {
    let [set, get] = ["SET", "GET"].map(|command| {
        let mut rounds: Vec<f64> = (0..ROUNDS).map(|_| shoot(redis, command, bytes)).collect();
        rounds.sort_by(f64::total_cmp);
        rounds[ROUNDS / 2]
    });
    Plain { set, get }
}

fn shoot(redis: SocketAddr, command: &str, bytes: usize) -> f64 {
    let output = Command::new("redis-benchmark")
        .args([
            "-h",
            &redis.ip().to_string(),
            "-p",
            &redis.port().to_string(),
        ])
        .args(["-c", &CLIENTS.to_string(), "-n", &COMMANDS.to_string()])
        .args(["-d", &bytes.to_string(), "-t", command, "--csv"])
        .output()
        .expect("redis-benchmark comes with Redis; run `make bench`");
    let text = String::from_utf8_lossy(&output.stdout);
    // "SET","123456.78",…
    let line = text.lines().find(|line| line.contains(command));
    let rate = line.and_then(|line| line.split('"').nth(3)?.parse().ok());
    rate.unwrap_or_else(|| panic!("redis-benchmark: {output:?}"))
}
