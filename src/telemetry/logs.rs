//! The log: where it goes, what it looks like, how much of it is written.

use std::{
    io::{self, IsTerminal},
    panic,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use tokio::task::AbortHandle;
use tracing_subscriber::{
    Layer, Registry,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    reload,
    util::SubscriberInitExt,
};

use super::seldom;
use crate::config::{LogFormat, LogLevel};

/// The level of the log, which may be changed while the process runs.
#[derive(Debug)]
pub struct LogControl {
    filter: reload::Handle<Targets, Registry>,
    configured: LogLevel,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    level: LogLevel,
    /// Goes back to the configured level.
    fallback: Option<AbortHandle>,
}

/// Writes each event on one line, whatever is in it: what a client has sent must
/// not pass for an event of its own.
struct OneLine<W>(W);

static CONTROL: OnceLock<Arc<LogControl>> = OnceLock::new();

/// Writes events of this process to standard error from now on. Events of
/// libraries are written from WARN on.
pub fn init(level: LogLevel, format: LogFormat) {
    let (control, filter) = LogControl::new(level);
    let terminal = io::stderr().is_terminal();
    let json = match format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !terminal,
    };
    let lines = fmt::layer().with_writer(|| OneLine(io::stderr()));
    let lines: Box<dyn Layer<Registry> + Send + Sync> = if json {
        lines.json().flatten_event(true).boxed()
    } else {
        lines.with_ansi(terminal).boxed()
    };
    // Fails only if another subscriber was set before, which then stays.
    let subscriber = Registry::default().with(lines.with_filter(filter));
    if subscriber.try_init().is_ok() {
        CONTROL.get_or_init(|| Arc::new(control));
    }

    panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        seldom!(error, location, message, "panic");
    }));
}

/// The level of the log; None if this process writes its log elsewhere.
pub fn log_control() -> Option<Arc<LogControl>> {
    CONTROL.get().cloned()
}

// === impl LogControl ===

impl LogControl {
    /// A level that was set by hand is forgotten after this: it is wanted for a while. DEBUG
    /// and TRACE write a line for every call, and ERROR leaves out that memory answers.
    pub const SET_FOR: Duration = Duration::from_secs(15 * 60);

    /// The control, and the filter that obeys it.
    fn new(level: LogLevel) -> (Self, reload::Layer<Targets, Registry>) {
        let (filter, handle) = reload::Layer::new(targets(level));
        let control = Self {
            filter: handle,
            configured: level,
            now: Mutex::new(Now {
                level,
                fallback: None,
            }),
        };
        (control, filter)
    }

    pub fn level(&self) -> LogLevel {
        self.now().level
    }

    /// Sets the level. Returns the level that takes its place after [`Self::SET_FOR`]; None
    /// if that is the same.
    pub fn set(self: &Arc<Self>, level: LogLevel) -> Option<LogLevel> {
        let falls_back = level != self.configured;
        let mut now = self.now();
        if let Some(fallback) = now.fallback.take() {
            fallback.abort();
        }
        self.apply(&mut now, level);
        if !falls_back {
            return None;
        }
        let control = self.clone();
        let fallback = tokio::spawn(async move {
            tokio::time::sleep(Self::SET_FOR).await;
            let mut now = control.now();
            // It may have been set again in this moment.
            if now
                .fallback
                .take_if(|fallback| fallback.id() == tokio::task::id())
                .is_some()
            {
                control.apply(&mut now, control.configured);
            }
        });
        now.fallback = Some(fallback.abort_handle());
        Some(self.configured)
    }

    fn apply(&self, now: &mut Now, level: LogLevel) {
        seldom!(
            info,
            from = now.level.name(),
            to = level.name(),
            "log level"
        );
        // It fails when nobody writes events any more.
        let _ = self.filter.reload(targets(level));
        now.level = level;
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is written at a level.
fn targets(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    Targets::new()
        .with_target("groupstate", level)
        // It warns of every odd frame that a client sends.
        .with_target("h2", LevelFilter::ERROR)
        .with_default(level.min(LevelFilter::WARN))
}

// === impl OneLine ===

impl<W: io::Write> io::Write for OneLine<W> {
    /// Takes a whole event, which ends in a line break.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = event.strip_suffix(b"\n").unwrap_or(event);
        if text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            let mut line = Vec::with_capacity(event.len() + 64);
            for byte in text {
                match byte {
                    b'\n' => line.extend(b"\\n"),
                    b'\r' => line.extend(b"\\r"),
                    byte => line.push(*byte),
                }
            }
            line.push(b'\n');
            self.0.write_all(&line)?;
        } else {
            self.0.write_all(event)?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tracing::Level;

    use super::*;

    /// A control, and its filter, which it needs to live.
    fn control(level: LogLevel) -> (Arc<LogControl>, reload::Layer<Targets, Registry>) {
        let (control, filter) = LogControl::new(level);
        (Arc::new(control), filter)
    }

    /// The filter is asked, not `enabled!`: what that says is remembered for the
    /// whole process, and wrong if two tests set their levels at once.
    fn writes_debug(control: &LogControl) -> bool {
        let writes = |targets: &Targets| targets.would_enable("groupstate::grpc", &Level::DEBUG);
        control.filter.with_current(writes).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_level_is_forgotten_after_a_while() {
        let (control, _filter) = control(LogLevel::Warn);
        assert!(!writes_debug(&control));
        assert_eq!(control.set(LogLevel::Debug), Some(LogLevel::Warn));
        assert!(writes_debug(&control));
        let almost = LogControl::SET_FOR - Duration::from_secs(1);
        tokio::time::sleep(almost).await;
        // Set again, it begins anew.
        assert_eq!(control.set(LogLevel::Trace), Some(LogLevel::Warn));
        tokio::time::sleep(almost).await;
        assert_eq!(control.level(), LogLevel::Trace);
        assert!(writes_debug(&control));
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(control.level(), LogLevel::Warn);
        assert!(!writes_debug(&control));
    }

    #[tokio::test(start_paused = true)]
    async fn every_level_but_the_configured_one_is_forgotten() {
        for configured in LogLevel::ALL {
            let (control, _filter) = control(configured);
            for level in LogLevel::ALL {
                let falls_back = (level != configured).then_some(configured);
                assert_eq!(control.set(level), falls_back, "{level:?}");
                assert_eq!(control.level(), level);
                tokio::time::sleep(LogControl::SET_FOR * 2).await;
                assert_eq!(control.level(), configured, "{level:?}");
            }
            // The configured one, set by hand, ends what was set before.
            control.set(LogLevel::Error);
            control.set(configured);
            tokio::time::sleep(LogControl::SET_FOR * 2).await;
            assert_eq!(control.level(), configured);
        }
    }

    #[test]
    fn an_event_is_one_line() {
        for (event, line) in [
            ("INFO plain\n", "INFO plain\n"),
            ("INFO a\nERROR b\r\n\n", "INFO a\\nERROR b\\r\\n\n"),
            ("", ""),
        ] {
            let mut written = Vec::new();
            OneLine(&mut written).write_all(event.as_bytes()).unwrap();
            assert_eq!(String::from_utf8(written).unwrap(), line);
        }
    }
}
