//! The binary: its settings, its start, its stop.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use clap::CommandFactory;
use groupstate::config::Settings;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    common::{redis_server::RedisServer, service::Service, stalls::Bound, wait_until},
    group, load_request, store_request,
};

#[test]
fn a_bad_setting_is_one_line_and_exit_code_two() {
    for (arguments, named) in [
        (&["--redis-timeout", "soon"][..], "--redis-timeout"),
        (&["--redis-url", "memcached://x"], "--redis-url"),
        (
            &[
                "--redis-password-file",
                "/nowhere",
                "--redis-url",
                "redis://x",
            ],
            "/nowhere",
        ),
        (&["--unknown"], "--unknown"),
    ] {
        let output = run(arguments, &[]);
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains(named), "{text}");
    }
    let output = run(&[], &[("GROUPSTATE_MAX_TTL", "1s")]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("--max-ttl")
    );
}

/// Compose files and templates leave a variable empty where they mean "not set".
#[tokio::test]
async fn an_empty_variable_is_one_that_is_not_set_whatever_the_setting() {
    let settings = Settings::command();
    let names = settings.get_arguments().filter_map(|argument| {
        let name = argument.get_env()?.to_str().unwrap().to_owned();
        Some(name)
    });
    let names: Vec<_> = names.collect();
    assert!(names.len() > 30, "{names:?}");
    // What is said once all single settings have been read.
    let arguments = ["--default-ttl", "100ms"];
    let expected = run(&arguments, &[]);
    assert_eq!(expected.status.code(), Some(2));
    for name in &names {
        let output = run(&arguments, &[(name, "")]);
        assert_eq!(output, expected, "{name}");
    }
    let all: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    let service = Service::start_in(&all, &[]);
    let mut client = service.client().await;
    client.store(store_request(group("k"))).await.unwrap();
    assert_eq!(service.health().await["redis"]["status"], "none");
    // It is still said that there are variables.
    let help = String::from_utf8(run(&["--help"], &all).stdout).unwrap();
    for name in &names {
        assert!(help.contains(name.as_str()), "{name}");
    }
    // A value of no use is none that is empty.
    for useless in [" ", "\t"] {
        let output = run(&[], &[("GROUPSTATE_MAX_SCANS", useless)]);
        assert_eq!(output.status.code(), Some(2));
    }
}

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_groupstate"))
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn an_address_in_use_is_said_in_one_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let output = run(&["--grpc-addr", &addr, "--log-format", "json"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    let last = text.lines().last().unwrap();
    assert!(last.contains(&addr) && last.contains("in use"), "{text}");
}

#[test]
fn it_says_once_that_nothing_survives_a_restart() {
    let service = Service::start(&[]);
    let log = service.log();
    let told = log
        .iter()
        .filter(|line| line.contains("do not survive a restart"));
    assert_eq!(told.count(), 1, "{log:#?}");
}

async fn health(addr: &str) -> HealthClient<tonic::transport::Channel> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{addr}")).unwrap();
    HealthClient::new(endpoint.connect().await.unwrap())
}

fn check(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.into(),
    }
}

#[tokio::test]
async fn sigterm_says_not_serving_then_ends_watches_and_exits_with_zero() {
    stops_gracefully("TERM").await;
}

/// Of a terminal that is closed, or of somebody who thinks that it reads files again.
#[tokio::test]
async fn sighup_stops_it_as_sigterm_does() {
    stops_gracefully("HUP").await;
}

async fn stops_gracefully(signal: &str) {
    // Long enough for what happens meanwhile.
    const DELAY: Duration = Duration::from_secs(2);
    let mut service = Service::start(&["--shutdown-delay", "2s"]);
    let mut client = service.client().await;
    let mut health = health(service.addr()).await;
    for name in ["", "groupstate.v1.GroupStateService"] {
        let reply = health.check(check(name)).await.unwrap().into_inner();
        assert_eq!(reply.status(), ServingStatus::Serving);
    }
    let unknown = health.check(check("nobody")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    let mut watch = health.watch(check("")).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);

    let begin = Instant::now();
    let bound = Bound::of(DELAY + Duration::from_secs(1));
    service.process().signal(signal);
    let second = watch.message().await.unwrap().unwrap();
    assert_eq!(second.status(), ServingStatus::NotServing);
    let reply = health.check(check("")).await.unwrap().into_inner();
    assert_eq!(reply.status(), ServingStatus::NotServing);
    // During the pause calls are still answered.
    client.store(store_request(group("k"))).await.unwrap();
    assert!(
        watch.message().await.unwrap().is_none(),
        "the watch has ended"
    );
    let status = service.wait_for_exit(Duration::from_secs(5));
    bound.assert_holds("it ends after the pause");
    assert!(begin.elapsed() >= DELAY);
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn ctrl_c_skips_the_pause_and_waits_for_no_idle_client() {
    let mut service = Service::start(&[]);
    // Its connection stays open: this test blocks the thread that would close
    // it, as a client that hangs does.
    let mut idle = service.client().await;
    idle.load(load_request("k")).await.unwrap_err();
    let bound = Bound::of(Duration::from_secs(1));
    service.process().signal("INT");
    assert_eq!(
        service.wait_for_exit(Duration::from_secs(5)).code(),
        Some(0)
    );
    bound.assert_holds("it ends without a pause");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut service = Service::start(&["--shutdown-delay", "60s"]);
    service.process().signal("TERM");
    service.wait_for_log("NOT_SERVING", Duration::from_secs(2));
    service.process().signal("TERM");
    assert_eq!(
        service.wait_for_exit(Duration::from_secs(2)).code(),
        Some(1)
    );
}

#[tokio::test]
async fn calls_in_flight_may_finish_and_are_cut_off_after_the_shutdown_timeout() {
    let redis = RedisServer::start().await;
    let arguments = [
        ("--shutdown-timeout", "20s", Ok(())),
        ("--shutdown-timeout", "200ms", Err(())),
    ];
    for (flag, timeout, outcome) in arguments {
        let settings = [
            "--redis-url",
            &redis.url(),
            "--redis-timeout",
            "2s",
            // The call has to wait for Redis; memory must not answer it.
            "--trip-after",
            "10s",
            flag,
            timeout,
        ];
        let mut service = Service::start(&settings);
        let mut client = service.client().await;
        client.store(store_request(group("k"))).await.unwrap();
        redis.process().signal("STOP");
        let groups = vec![group("slow")];
        let request = groupstate::grpc::proto::StoreAllRequest {
            groups,
            expiry: None,
        };
        let slow = tokio::spawn(async move { client.store_all(request).await });
        wait_until(
            "the call is under way",
            Duration::from_secs(5),
            async || service.metric("storage_operations_in_flight").await == 1.0,
        )
        .await;
        let bound = Bound::of(Duration::from_millis(1_500));
        service.process().signal("INT");
        if outcome.is_ok() {
            tokio::time::sleep(Duration::from_millis(500)).await;
            redis.process().signal("CONT");
        }
        let finished = slow.await.unwrap().map(|_| ()).map_err(|_| ());
        redis.process().signal("CONT");
        assert_eq!(finished, outcome, "--shutdown-timeout {timeout}");
        assert_eq!(
            service.wait_for_exit(Duration::from_secs(2)).code(),
            Some(0)
        );
        bound.assert_holds("it ends when no call is left");
    }
}
