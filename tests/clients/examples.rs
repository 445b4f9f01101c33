//! The clients in `clients/python` and `clients/go`, against two instances of
//! the service and their Redis, which go down one after the other. What they must
//! do is told in `python_example.py` and in `clients/go/groupstate_storage_test.go`.

use std::{
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use groupstate::grpc::DESCRIPTORS;
use prost::Message;
use prost_types::FileDescriptorSet;

use crate::common::{examples::Examples, redis_server::RedisServer, service::Service};

/// Two instances with one Redis, in which the document of one group is none.
struct Pair {
    redis: RedisServer,
    services: [Service; 2],
}

#[tokio::test]
async fn the_python_client_is_one_for_good_and_bad_days() {
    let examples = Examples::copy();
    let install = ["-m", "pip", "install", "--quiet", "clients/python"];
    run(examples.command("python", ".").args(install));
    let phase = |phase: &str, targets: &[&str]| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/python_example.py");
        let mut python = examples.command("python", ".");
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
async fn the_go_client_is_a_storage_for_good_and_bad_days() {
    let examples = Examples::copy();
    let go = |arguments: &[&str]| run(examples.command("go", "clients/go").args(arguments));
    for folder in ["clients/go", "examples/go"] {
        let badly_formatted = run(examples.command("gofmt", folder).args(["-l", "."]));
        assert_eq!(badly_formatted, "");
        run(examples.command("go", folder).args(["vet", "./..."]));
    }
    go(&["test", "-c", "-o", "storage.test"]);

    let phase = |tests: &str, targets: &[&str]| {
        let mut command = examples.command("./storage.test", "clients/go");
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

/// The stubs are committed: somebody has to renew them when the proto grows.
#[test]
fn the_stubs_for_go_have_every_message_and_call_of_the_proto() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/go/groupstatev1");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let (messages, calls) = (read("group_state.pb.go"), read("group_state_grpc.pb.go"));
    let renew = "run `go generate` in clients/go";
    let descriptors = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    let ours = descriptors.file.iter();
    let ours = ours.filter(|file| file.package() == "groupstate.v1");
    let mut fields = 0;
    for file in ours {
        for message in &file.message_type {
            let begin = format!("type {} struct", message.name());
            assert!(messages.contains(&begin), "{}: {renew}", message.name());
            for field in &message.field {
                let tag = format!(",{},", field.number());
                let name = format!("name={},", field.name());
                let mut lines = messages.lines();
                let found = lines.any(|line| line.contains(&tag) && line.contains(&name));
                assert!(found, "{}.{}: {renew}", message.name(), field.name());
                fields += 1;
            }
        }
        for one in &file.enum_type {
            for value in &one.value {
                let name = format!("\"{}\"", value.name());
                assert!(messages.contains(&name), "{}: {renew}", value.name());
            }
        }
        for call in file.service.iter().flat_map(|service| &service.method) {
            assert!(calls.contains(&format!("{}(", call.name())), "{renew}");
        }
    }
    assert!(fields > 50, "{fields}");
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
