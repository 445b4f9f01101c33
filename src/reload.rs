//! What is read from files and read again when they change: certificates,
//! tokens, passwords.
//!
//! [`Watched::open`] reads them for the start, when what is wrong is an error.
//! From then on the [`Watcher`] looks at their content, and when it changes there is
//! a new value. What is wrong then is said once, counted for as long as it stays,
//! and the value of before remains.

use std::{fmt, fs::File, io::Read, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::watch;

use crate::telemetry::{self, FileSetting};

/// The current value. Cheap to clone; each clone remembers by itself which value it
/// has seen.
pub struct Watched<T>(watch::Receiver<Arc<T>>);

/// Keeps a [`Watched`] value up to date as long as it runs.
pub struct Watcher<T> {
    setting: FileSetting,
    files: Vec<PathBuf>,
    parse: Parse<T>,
    value: watch::Sender<Arc<T>>,
    /// What was last found and judged, and whether it was of use.
    found: Found,
    is_good: bool,
}

/// A value and what keeps it up to date, of a setting that may be absent.
pub type Opened<T> = Result<Option<(Watched<T>, Watcher<T>)>, String>;

/// Makes a value of the contents of all files, in their order. Its errors reach the
/// log: they must not repeat what is secret.
type Parse<T> = Box<dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync>;

/// The contents of all files, or why one cannot be read.
type Found = Result<Vec<Vec<u8>>, String>;

/// More than any file of ours holds.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A file that is being written looks different after this.
const SETTLE: Duration = Duration::from_millis(200);

// === impl Watched ===

impl<T: Send + Sync + 'static> Watched<T> {
    /// Reads the files of a setting for the first time. `Err` names the setting and
    /// the file. Nothing is watched until the watcher runs.
    pub fn open(
        setting: FileSetting,
        files: Vec<PathBuf>,
        parse: impl Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<(Self, Watcher<T>), String> {
        let parse: Parse<T> = Box::new(parse);
        let found = read_all(&files);
        let value = judge(&found, &files, &parse)
            .map_err(|error| format!("--{} {error}", setting.name()))?;
        let (sender, receiver) = watch::channel(Arc::new(value));
        let watcher = Watcher {
            setting,
            files,
            parse,
            value: sender,
            found,
            is_good: true,
        };
        Ok((Self(receiver), watcher))
    }

    /// A value that does not come from a file.
    pub fn fixed(value: T) -> Self {
        Self(watch::channel(Arc::new(value)).1)
    }

    pub fn current(&self) -> Arc<T> {
        self.0.borrow().clone()
    }

    /// Waits for a value that this clone has not seen, and returns it; for ever when
    /// the watcher is gone.
    pub async fn changed(&mut self) -> Arc<T> {
        match self.0.changed().await {
            Ok(()) => self.0.borrow_and_update().clone(),
            Err(_) => std::future::pending().await,
        }
    }
}

impl<T> Clone for Watched<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> fmt::Debug for Watched<T> {
    /// Does not show the value, which may be secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watched")
    }
}

// === impl Watcher ===

impl<T: Send + Sync + 'static> Watcher<T> {
    /// Looks at the files every `interval`.
    pub async fn watch_forever(mut self, interval: Duration) {
        loop {
            tokio::time::sleep(interval).await;
            self.look().await;
        }
    }

    async fn look(&mut self) {
        let found = self.read().await;
        if found != self.found {
            tokio::time::sleep(SETTLE).await;
            if self.read().await != found {
                // Its writer has not finished. There is another look.
                return;
            }
            self.take(found);
        } else if !self.is_good {
            telemetry::reload_failed(self.setting);
        }
    }

    fn take(&mut self, found: Found) {
        let judged = judge(&found, &self.files, &self.parse);
        self.found = found;
        self.is_good = judged.is_ok();
        let setting = self.setting.name();
        match judged {
            Ok(value) => {
                tracing::info!(setting, "changed files were read and are used from now on");
                self.value.send_replace(Arc::new(value));
            }
            Err(error) => {
                telemetry::reload_failed(self.setting);
                tracing::warn!(
                    setting,
                    error,
                    "changed files are of no use: what was read before stays"
                );
            }
        }
    }

    /// Reads the files where it may take its time.
    async fn read(&self) -> Found {
        let files = self.files.clone();
        let read = tokio::task::spawn_blocking(move || read_all(&files));
        read.await.unwrap_or_else(|error| Err(error.to_string()))
    }
}

fn judge<T>(found: &Found, files: &[PathBuf], parse: &Parse<T>) -> Result<T, String> {
    parse(found.as_ref()?).map_err(|error| {
        let names: Vec<_> = files
            .iter()
            .map(|file| file.display().to_string())
            .collect();
        format!("{}: {error}", names.join(" and "))
    })
}

fn read_all(files: &[PathBuf]) -> Found {
    let read = |file: &PathBuf| {
        let mut content = Vec::new();
        File::open(file)
            .and_then(|open| open.take(MAX_FILE_BYTES + 1).read_to_end(&mut content))
            .map_err(|error| error.to_string())
            .and_then(|bytes| match bytes as u64 {
                0 => Err("is empty".into()),
                bytes if bytes > MAX_FILE_BYTES => Err("is over 1 MiB".into()),
                _ => Ok(()),
            })
            .map_err(|error| format!("{}: {error}", file.display()))?;
        Ok(content)
    };
    files.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// A number in one file and a word in another, and who watches them.
    struct Fixture {
        folder: TempDir,
        value: Watched<(u32, String)>,
        watcher: Watcher<(u32, String)>,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = TempDir::new().unwrap();
            fs::write(folder.path().join("number"), "1").unwrap();
            fs::write(folder.path().join("word"), "one").unwrap();
            let files = ["number", "word"].map(|name| folder.path().join(name));
            let (value, watcher) =
                Watched::open(FileSetting::TlsCert, files.into(), parse).unwrap();
            Self {
                folder,
                value,
                watcher,
            }
        }

        fn write(&self, name: &str, content: &str) {
            fs::write(self.folder.path().join(name), content).unwrap();
        }

        async fn look(&mut self) -> (u32, String) {
            self.watcher.look().await;
            (*self.value.current()).clone()
        }
    }

    fn parse(contents: &[Vec<u8>]) -> Result<(u32, String), String> {
        let [number, word] = contents else {
            panic!("two files")
        };
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let number = text(number).parse().map_err(|_| "no number".to_owned())?;
        Ok((number, text(word)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_content_is_a_new_value() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.look().await, (1, "one".into()));
        assert!(!fixture.value.0.has_changed().unwrap());
        fixture.write("number", "2");
        fixture.write("word", "two");
        assert_eq!(fixture.look().await, (2, "two".into()));
        assert_eq!(fixture.value.changed().await.0, 2);
        // Written again, it is the same content.
        fixture.write("word", "two");
        fixture.look().await;
        assert!(!fixture.value.0.has_changed().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_of_no_use_leaves_the_value_of_before() {
        let mut fixture = Fixture::new();
        let word = fixture.folder.path().join("word");
        for spoil in [
            (|fixture, _| fixture.write("number", "many")) as fn(&Fixture, &PathBuf),
            |fixture, _| fixture.write("word", ""),
            |_, word| fs::remove_file(word).unwrap(),
            |fixture, _| fixture.write("word", &"x".repeat((1 << 20) + 1)),
        ] {
            spoil(&fixture, &word);
            assert_eq!(fixture.look().await, (1, "one".into()));
            assert!(!fixture.watcher.is_good);
            assert_eq!(fixture.look().await, (1, "one".into()));
            fixture.write("number", "1");
            fixture.write("word", "one");
            fixture.look().await;
            assert!(fixture.watcher.is_good);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_being_written_is_looked_at_again() {
        let mut fixture = Fixture::new();
        fixture.write("number", "2");
        let path = fixture.folder.path().join("number");
        let finish = async {
            tokio::time::sleep(SETTLE / 2).await;
            fs::write(path, "23").unwrap();
        };
        tokio::join!(fixture.watcher.look(), finish);
        assert_eq!(fixture.value.current().0, 1);
        assert_eq!(fixture.look().await.0, 23);
    }

    #[test]
    fn at_the_start_what_is_wrong_is_an_error_that_names_setting_and_file() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("file");
        let open = || {
            Watched::open(FileSetting::TlsCert, vec![file.clone()], |_| {
                Err::<(), _>("no good".into())
            })
            .map(|_| ())
            .unwrap_err()
        };
        let named = format!("--tls-cert {}: ", file.display());
        assert!(open().starts_with(&named), "{}", open());
        fs::write(&file, "").unwrap();
        assert_eq!(open(), format!("{named}is empty"));
        fs::write(&file, "x").unwrap();
        assert_eq!(open(), format!("{named}no good"));
    }
}
