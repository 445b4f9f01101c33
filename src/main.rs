//! Settings, telemetry, server, and nothing else.

use std::process::ExitCode;

use groupstate::{
    config::Settings,
    server::{Server, ServerError, Stop},
    telemetry::{self, Traces},
};
use tokio::signal::unix::{SignalKind, signal};

/// A call makes and drops hundreds of small pieces, on whichever thread it is just
/// then: the allocator of the C library takes a fifth of a call's time for that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
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
