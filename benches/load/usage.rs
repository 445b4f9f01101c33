//! What a process uses of the machine.

use std::time::Duration;

/// What a process has used.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub cpu: Duration,
    /// Resident memory, in bytes.
    pub rss: usize,
}

impl Usage {
    /// Of a process that is running.
    pub fn of(pid: u32) -> Self {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let stat = read("stat");
        // The name, in parentheses, may hold anything. User and system time are
        // the 14th and 15th field, in ticks.
        let fields: Vec<_> = stat[stat.rfind(')').unwrap()..].split(' ').collect();
        let ticks: u64 = fields[12..14]
            .iter()
            .map(|field| field.parse::<u64>().unwrap())
            .sum();
        let seconds = ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
        // The second field is resident pages.
        let pages: usize = read("statm").split(' ').nth(1).unwrap().parse().unwrap();
        Self {
            cpu: Duration::from_secs_f64(seconds),
            rss: pages * rustix::param::page_size(),
        }
    }
}
