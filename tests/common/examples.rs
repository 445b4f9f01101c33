//! The clients in `clients/` and `examples/`, run as a stranger would run them.

use std::{env, path::PathBuf, process::Command};

use tempfile::TempDir;

use super::tool;

/// Where the repository lies in a `GOPATH`.
const IMPORT_PATH: &str = "src/github.com/groupstate/groupstate";
/// Where Debian has the sources of Go's libraries.
const SYSTEM_GOPATH: &str = "/usr/share/gocode";

/// What clients and examples need of the repository, copied into a `GOPATH` of its own,
/// so that what is generated does not end up beside the sources.
pub struct Examples {
    gopath: TempDir,
}

impl Examples {
    pub fn copy() -> Self {
        let gopath = TempDir::new().unwrap();
        let root = gopath.path().join(IMPORT_PATH);
        std::fs::create_dir_all(&root).unwrap();
        let status = Command::new("cp")
            .args(["-r", "--parents", "clients/go", "examples/go"])
            .args(["clients/python", "examples/python", "proto"])
            .arg("tests/data/rendezvous-vectors.json")
            .arg(root)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .expect("cp is part of every system");
        assert!(status.success());
        Self { gopath }
    }

    /// A program that is run in this folder of the repository, with what `make
    /// tools` has installed and without any registry of packages.
    pub fn command(&self, program: &str, folder: &str) -> Command {
        let path = env::var_os("PATH").unwrap_or_default();
        let tools = [tool("bin"), tool("venv/bin")];
        let path = env::join_paths(tools.into_iter().chain(env::split_paths(&path))).unwrap();
        let gopath = [self.gopath.path().to_owned(), PathBuf::from(SYSTEM_GOPATH)];
        // Packages of Python go into a folder of their own. What they need, and what builds
        // them, is in the venv. ("0" is how pip is told not to build apart from it.)
        let site = self.gopath.path().join("site");
        let mut command = Command::new(program);
        command
            .env("PIP_TARGET", &site)
            .env("PIP_NO_DEPS", "1")
            .env("PIP_NO_BUILD_ISOLATION", "0")
            .env("PYTHONPATH", &site)
            .current_dir(self.gopath.path().join(IMPORT_PATH).join(folder))
            .env("PATH", path)
            .env("PIP_NO_INDEX", "1")
            .env("GO111MODULE", "off")
            .env("GOPATH", env::join_paths(gopath).unwrap())
            // What is compiled once serves all tests, wherever the copy lies.
            .env("GOCACHE", concat!(env!("CARGO_TARGET_TMPDIR"), "/go-cache"));
        command
    }
}
