//! The clients in `examples/python` and `examples/go`, against two instances of
//! the service and their Redis, which go down one after the other. What they must
//! do is told in `python_example.py` and in `examples/go/storage_test.go`.

use std::{
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use crate::common::{examples::Examples, redis_server::RedisServer, service::Service, tool};

/// Two instances with one Redis, in which the document of one group is none.
struct Pair {
    redis: RedisServer,
    services: [Service; 2],
}

#[tokio::test]
async fn the_python_example_is_a_client_for_good_and_bad_days() {
    let phase = |phase: &str, targets: &[&str]| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/python_example.py");
        let mut python = Command::new(tool("venv/bin/python"));
        let printed = run(python.arg(script).arg(phase).args(targets));
        assert!(printed.ends_with("ok\n"), "{printed}");
    };
    phase("alone", &[]);
    let mut pair = Pair::start().await;
    phase("redis", &pair.targets());
    pair.lose_redis();
    phase("down", &pair.targets());
    pair.lose_first_instance();
    phase("gone", &pair.targets());
}

#[tokio::test]
async fn the_go_example_is_a_storage_for_good_and_bad_days() {
    let examples = Examples::copy();
    let go = |arguments: &[&str]| run(examples.command("go", "examples/go").args(arguments));
    go(&["generate"]);
    let badly_formatted = run(examples.command("gofmt", "examples/go").args(["-l", "."]));
    assert_eq!(badly_formatted, "");
    go(&["vet", "./..."]);
    go(&["test", "-c", "-o", "storage.test"]);

    let phase = |tests: &str, targets: &[&str]| {
        let mut command = examples.command("./storage.test", "examples/go");
        command.args(["-test.v", "-test.timeout=2m", "-test.run", tests]);
        let printed = run(command.env("GROUPSTATE_TARGETS", targets.join(",")));
        assert!(printed.contains("--- PASS: Test"), "{printed}");
    };
    phase("^Test(Rank|A)", &[]);
    let mut pair = Pair::start().await;
    phase("^TestOnRedis$", &pair.targets());
    pair.lose_redis();
    phase("^TestRedisDown$", &pair.targets());
    pair.lose_first_instance();
    phase("^TestInstanceGone$", &pair.targets());
}

/// What a command prints; it must succeed.
fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; run `make tools`"));
    let Output { stdout, stderr, .. } = &output;
    let stdout = String::from_utf8_lossy(stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}\n{}",
        output.status,
        String::from_utf8_lossy(stderr)
    );
    stdout
}

// === impl Pair ===

impl Pair {
    async fn start() -> Self {
        let redis = RedisServer::start().await;
        let () = redis::cmd("SET")
            .arg("group:unreadable")
            .arg("{\"key\":")
            .query_async(&mut redis.connect().await)
            .await
            .unwrap();
        let start = || Service::start(&["--redis-url", &redis.url()]);
        let services = [start(), start()];
        Self { redis, services }
    }

    fn targets(&self) -> Vec<&str> {
        self.services.iter().map(Service::addr).collect()
    }

    /// Kills Redis; memory has taken over when this returns.
    fn lose_redis(&mut self) {
        self.redis.kill();
        for service in &self.services {
            service.wait_for_log("Switched to in-memory storage", Duration::from_secs(10));
        }
    }

    fn lose_first_instance(&mut self) {
        self.services[0].kill();
    }
}
