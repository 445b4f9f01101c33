//! Settings, telemetry, server, and nothing else.

use std::process::ExitCode;

use groupstate::{
    config::Settings,
    server::{Server, ServerError, Stop},
    telemetry::{self, Traces},
};
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

/// A call makes and drops hundreds of small pieces, on whichever thread it is just
/// then: the allocator of the C library takes a fifth of a call's time for that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// So many tasks of a thread go first before it looks for what has come in, and for tasks
/// that it shares with the others. With tokio's own number, 61, a call that is refused under
/// four times the load that can be borne hears so after 40 ms instead of 6, and two cores do
/// 4 % more `Store`s.
const TURN: u32 = 2;

fn main() -> ExitCode {
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
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = Server::bind(settings).await?;
    let stop = async {
        let stop = tokio::select! {
            _ = terminate.recv() => Stop::AfterDelay,
            _ = interrupt.recv() => Stop::Now,
        };
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::warn!("a second signal: ended at once");
            std::process::exit(1);
        });
        stop
    };
    server.serve(stop).await
}
