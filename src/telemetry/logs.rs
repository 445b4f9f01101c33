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

use super::rate_limited;

/// See `--log-level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// See `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Auto,
    Json,
    Text,
}

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

/// Writes each event on one line of what can be seen, whatever is in it: what a client
/// has sent must not pass for an event of its own, nor tell a terminal what to do, nor
/// stand in another place than it is shown at.
struct OneLine<W> {
    to: W,
    /// Whether events are in colours.
    colours: bool,
}

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
    let colours = terminal && !json;
    let lines = fmt::layer().with_writer(move || OneLine {
        to: io::stderr(),
        colours,
    });
    let lines: Box<dyn Layer<Registry> + Send + Sync> = if json {
        lines.json().flatten_event(true).boxed()
    } else {
        lines.with_ansi(colours).boxed()
    };
    // Fails only if another subscriber was set before, which then stays.
    let subscriber = Registry::default().with(lines.with_filter(filter));
    if subscriber.try_init().is_ok() {
        CONTROL.get_or_init(|| Arc::new(control));
    }

    panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        rate_limited!(error, location, message, "panic");
    }));
}

/// The level of the log; None if this process writes its log elsewhere.
pub fn log_control() -> Option<Arc<LogControl>> {
    CONTROL.get().cloned()
}

// === impl LogLevel ===

impl LogLevel {
    pub const ALL: [Self; 5] = [
        Self::Error,
        Self::Warn,
        Self::Info,
        Self::Debug,
        Self::Trace,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
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
        rate_limited!(
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
        if text.iter().all(|byte| matches!(byte, b' '..=b'~')) {
            self.to.write_all(event)?;
        } else {
            let mut line = visible(&String::from_utf8_lossy(text), self.colours);
            line.push('\n');
            self.to.write_all(line.as_bytes())?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The same text with escapes, as JSON has them, in the place of what cannot be seen:
/// control and format characters, line and paragraph separators, those that change the
/// direction of what follows. `colours`: those of an event stay.
fn visible(text: &str, colours: bool) -> String {
    let mut visible = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if colours && let Some(colour) = colour_at(rest) {
            visible.push_str(colour);
            rest = &rest[colour.len()..];
            continue;
        }
        rest = &rest[c.len_utf8()..];
        match c {
            '\n' => visible.push_str("\\n"),
            '\r' => visible.push_str("\\r"),
            '\t' => visible.push_str("\\t"),
            ' '..='~' => visible.push(c),
            c if can_be_seen(c) => visible.push(c),
            c => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    visible.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    visible
}

/// The standard library knows what cannot be seen. (Behind a letter, so that an accent
/// which combines with it can be.)
fn can_be_seen(c: char) -> bool {
    let text = String::from_iter(['a', c]);
    text.escape_debug().nth(1) == Some(c)
}

/// The escape sequence for a colour that `text` begins with: `ESC [ 2 ; 31 m`.
fn colour_at(text: &str) -> Option<&str> {
    let parameters = text.strip_prefix("\u{1b}[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    let is_colour = parameters[end..].starts_with('m');
    is_colour.then(|| &text[..text.len() - parameters.len() + end + 1])
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

    fn written(event: &str, colours: bool) -> String {
        let mut written = Vec::new();
        let mut line = OneLine {
            to: &mut written,
            colours,
        };
        line.write_all(event.as_bytes()).unwrap();
        String::from_utf8(written).unwrap()
    }

    #[test]
    fn an_event_is_one_line_of_what_can_be_seen() {
        for (event, line) in [
            ("INFO plain\n", "INFO plain\n"),
            ("INFO a\nERROR b\r\n\n", "INFO a\\nERROR b\\r\\n\n"),
            ("", ""),
            ("Zürich 東京 👍 e\u{301}\n", "Zürich 東京 👍 e\u{301}\n"),
            (
                "\0\u{7f}\u{85}\u{9b}2J\t\n",
                "\\u0000\\u007f\\u0085\\u009b2J\\t\n",
            ),
            (
                "\u{202e}\u{2066}\u{61c}\u{200f}\u{2028}\u{2029}\u{ad}\u{feff}\u{200b}\n",
                "\\u202e\\u2066\\u061c\\u200f\\u2028\\u2029\\u00ad\\ufeff\\u200b\n",
            ),
            // A tag, which is written in two units.
            ("\u{e0041}\n", "\\udb40\\udc41\n"),
            ("\u{1b}[31mred\n", "\\u001b[31mred\n"),
        ] {
            assert_eq!(written(event, false), line);
        }
    }

    #[test]
    fn colours_are_all_that_an_event_may_tell_a_terminal() {
        let colours = "\u{1b}[2;31mred\u{1b}[0m\n";
        assert_eq!(written(colours, true), colours);
        for (event, line) in [
            ("\u{1b}[2J\n", "\\u001b[2J\n"),
            ("\u{1b}[31\n", "\\u001b[31\n"),
            ("\u{1b}]0;title\u{7}\n", "\\u001b]0;title\\u0007\n"),
            ("\u{1b}\n", "\\u001b\n"),
        ] {
            assert_eq!(written(event, true), line);
        }
    }

    #[test]
    fn what_was_json_is_the_same_json() {
        let texts: String = (0..=0x10_ffffu32).filter_map(char::from_u32).collect();
        let json = serde_json::to_string(&texts).unwrap();
        let line = written(&format!("{json}\n"), false);
        assert_eq!(serde_json::from_str::<String>(&line).unwrap(), texts);
        let unseen = |c: char| c.is_control() || "\u{2028}\u{202e}\u{feff}".contains(c);
        assert!(!line.trim_end().contains(unseen));
    }
}
