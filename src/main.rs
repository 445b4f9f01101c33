//! Settings, telemetry, server, and nothing else.

use std::process::ExitCode;

use groupstate::{
    config::Settings,
    server::{Server, ServerError, Stop},
    telemetry,
};
use tokio::signal::unix::{SignalKind, signal};

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
    match run(settings).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "cannot serve");
            ExitCode::FAILURE
        }
    }
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
