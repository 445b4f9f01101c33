//! Settings, telemetry, server, and nothing else.

mod allocator;

use std::{io, process::ExitCode};

use groupstate::{
    config::Settings,
    server::{Server, ServerError, Stop},
    telemetry::{self, Traces},
};
use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
};

/// So many tasks of a thread go first before it looks for what has come in, and for tasks
/// that it shares with the others. With tokio's own number, 61, a call that is refused under
/// four times the load that can be borne hears so after 40 ms instead of 6, and two cores do
/// 4 % more `Store`s.
const TURN: u32 = 2;

/// The signals that stop the service.
struct Signals {
    terminate: Signal,
    /// Of a terminal that is closed. Nothing is read again because of it: files that
    /// have changed are noticed without.
    hang_up: Signal,
    interrupt: Signal,
}

fn main() -> ExitCode {
    if let Err(error) = allocator::give_back_apart() {
        eprintln!("error: cannot start threads: {error}");
        return ExitCode::FAILURE;
    }
    let runtime = runtime::Builder::new_multi_thread()
        .enable_all()
        .event_interval(TURN)
        .global_queue_interval(TURN)
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(start()),
        Err(error) => {
            eprintln!("error: cannot start threads: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn start() -> ExitCode {
    let settings = match Settings::read(std::env::args_os()) {
        Ok(settings) => settings,
        Err((text, 0)) => {
            println!("{text}");
            return ExitCode::SUCCESS;
        }
        Err((text, code)) => {
            eprintln!("{text}");
            return ExitCode::from(code);
        }
    };
    telemetry::init(settings.log_level, settings.log_format);
    // Before anything happens that counts.
    telemetry::metrics();
    let traces = match start_traces(&settings) {
        Ok(traces) => traces,
        Err(error) => {
            tracing::error!(error, "cannot send traces");
            return ExitCode::FAILURE;
        }
    };
    let served = run(settings).await;
    if let Some(traces) = traces {
        traces.stop().await;
    }
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot serve");
            ExitCode::FAILURE
        }
    }
}

fn start_traces(settings: &Settings) -> Result<Option<Traces>, String> {
    let endpoint = settings.otlp_endpoint()?;
    endpoint
        .map(|endpoint| Traces::start(endpoint, settings.otlp_sample_ratio))
        .transpose()
}

async fn run(settings: Settings) -> Result<(), ServerError> {
    let mut signals = Signals::new()?;
    let server = Server::bind(settings).await?;
    let stop = async {
        let stop = signals.next().await;
        tokio::spawn(async move {
            signals.next().await;
            tracing::warn!("a second signal: ended at once");
            std::process::exit(1);
        });
        stop
    };
    server.serve(stop).await
}

// === impl Signals ===

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// How the next one wants it to stop.
    async fn next(&mut self) -> Stop {
        tokio::select! {
            _ = self.terminate.recv() => Stop::AfterDelay,
            _ = self.hang_up.recv() => Stop::AfterDelay,
            _ = self.interrupt.recv() => Stop::Now,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::allocator::{NEVER, PURGE_DELAY, give_back, set_purge_delay};

    /// The number of the option is that of the mimalloc in Cargo.lock: its default is one
    /// second.
    #[test]
    #[expect(unsafe_code, reason = "a call of C that reads a number")]
    fn freed_memory_is_given_back_when_it_is_asked_for() {
        // SAFETY: mimalloc reads any option, from any thread.
        let delay = || unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY) };
        assert_eq!(delay(), 1_000);
        set_purge_delay(NEVER);
        assert_eq!(delay(), NEVER);

        let before = resident_kib();
        let pieces: Vec<Vec<u8>> = (0..1_024).map(|_| vec![1; 64 << 10]).collect();
        let full = resident_kib();
        assert!(full > before + (60 << 10), "{before} -> {full} KiB");
        drop(pieces);
        give_back();
        let after = resident_kib();
        assert!(
            after < before + (16 << 10),
            "{before} -> {full} -> {after} KiB"
        );
    }

    fn resident_kib() -> u64 {
        let status = fs::read_to_string("/proc/self/status").expect("Linux");
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        line.and_then(|line| line.split_whitespace().nth(1))
            .and_then(|kib| kib.parse().ok())
            .expect("VmRSS in KiB")
    }
}
