//! Wall clocks that a test moves while processes go by them.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::FileExt,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicI64, Ordering},
    },
};

use tempfile::TempDir;

/// The wall clock of some processes. It goes with that of the machine until it is moved;
/// monotonic clocks are not touched.
pub struct WallClock {
    /// How far it is ahead of that of the machine.
    millis: AtomicI64,
    file: File,
    folder: TempDir,
}

/// Built once by each test program that needs it.
static LIBRARY: LazyLock<PathBuf> = LazyLock::new(build);

// === impl WallClock ===

impl WallClock {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let file = File::create(folder.path().join("offset")).unwrap();
        let clock = Self {
            millis: AtomicI64::new(0),
            file,
            folder,
        };
        clock.move_by(0);
        clock
    }

    /// Variables of the environment of a process that goes by it.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        let file = self.folder.path().join("offset");
        [
            ("LD_PRELOAD", LIBRARY.display().to_string()),
            ("GROUPSTATE_TEST_CLOCK", file.display().to_string()),
        ]
    }

    /// Moves it by so many milliseconds, back if they are negative.
    pub fn move_by(&self, millis: i64) {
        let millis = self.millis.fetch_add(millis, Ordering::Relaxed) + millis;
        let nanos = millis * 1_000_000;
        self.file.write_all_at(&nanos.to_ne_bytes(), 0).unwrap();
    }
}

/// Compiles the library that moves the clock of a process into which it is loaded.
fn build() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join("wall_clock.so");
    // Others may be building it as well.
    let mine = folder.join(format!("wall_clock.{}.so", std::process::id()));
    let mut compiler = Command::new("cc")
        .args(["-O1", "-shared", "-fPIC", "-x", "c", "-o"])
        .arg(&mine)
        .arg("-")
        .stdin(Stdio::piped())
        .spawn()
        .expect("a C compiler is installed: apt-get install gcc");
    let mut source = compiler.stdin.take().unwrap();
    source.write_all(include_bytes!("wall_clock.c")).unwrap();
    drop(source);
    assert!(compiler.wait().unwrap().success(), "wall_clock.c compiles");
    fs::rename(&mine, &library).unwrap();
    library
}
