//! LoadAll as a stream: bounded messages, bounded memory, slow readers.

use std::time::{Duration, Instant};

use groupstate::grpc::proto as pb;
use prost::Message;

use crate::{
    common::{
        redis_server::RedisServer,
        service::{Client, Service},
        stalls::Bound,
    },
    group, load_request,
};

/// Settings of a service that is patient with Redis: these tests are not about a
/// machine that is busy.
const PATIENT: [&str; 4] = ["--redis-timeout", "5s", "--trip-after", "15s"];

/// Stores groups of about 1 KB, as in the speed targets, and checks that this
/// backend has them.
async fn fill(client: &mut Client, count: usize, backend: pb::Backend) {
    for first in (0..count).step_by(1_000) {
        let groups = (first..count.min(first + 1_000))
            .map(|i| {
                let mut group = group(&format!("k/{i}"));
                group.alerts.get_mut("f").unwrap().generator_url = "x".repeat(600);
                group
            })
            .collect();
        let request = pb::StoreAllRequest {
            groups,
            expiry: None,
        };
        let reply = client.store_all(request).await.unwrap().into_inner();
        for result in reply.results {
            assert_eq!(result.error, None);
        }
        assert_eq!(reply.backend, i32::from(backend));
    }
}

#[tokio::test]
async fn the_last_message_sums_up_what_was_sent() {
    let redis = RedisServer::start().await;
    let url = redis.url();
    let on_redis = [&["--redis-url", &url][..], &PATIENT].concat();
    for (arguments, backend) in [
        (&[][..], pb::Backend::Memory),
        (&on_redis, pb::Backend::Redis),
    ] {
        let service = Service::start(arguments);
        let mut client = service.client().await;
        fill(&mut client, 5_000, backend).await;
        let request = pb::LoadAllRequest {
            prefix: "k/".into(),
        };
        let mut stream = client.load_all(request).await.unwrap().into_inner();
        let (mut groups, mut summaries) = (0, Vec::new());
        while let Some(message) = stream.message().await.unwrap() {
            assert!(summaries.is_empty(), "nothing follows the summary");
            assert!(message.encoded_len() <= (1 << 20) + 4_096);
            assert_ne!(message.backend(), pb::Backend::Unspecified);
            groups += message.groups.len() as i64;
            summaries.extend(message.summary);
        }
        assert_eq!(groups, 5_000);
        let summary = pb::LoadAllSummary {
            groups,
            problems: 0,
            complete: true,
        };
        assert_eq!(summaries, [summary]);
    }
}

#[tokio::test]
async fn a_deadline_ends_a_load_all_without_a_summary() {
    let service = Service::start(&[]);
    let mut client = service.client().await;
    fill(&mut client, 20_000, pb::Backend::Memory).await;
    let mut request = tonic::Request::new(pb::LoadAllRequest::default());
    request
        .metadata_mut()
        .insert("grpc-timeout", "200m".parse().unwrap());
    let status = match client.load_all(request).await {
        Ok(stream) => {
            let mut stream = stream.into_inner();
            tokio::time::sleep(Duration::from_millis(300)).await;
            loop {
                match stream.message().await {
                    Ok(Some(message)) => assert_eq!(message.summary, None),
                    Ok(None) => panic!("it looks complete"),
                    Err(status) => break status,
                }
            }
        }
        // On a busy machine it may be over before it begins.
        Err(status) => status,
    };
    crate::assert_status(&status, tonic::Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
}

/// 100,000 groups and a reader that stops reading: other calls go on as usual,
/// and the memory of the service stays as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stops_reading_costs_neither_memory_nor_speed() {
    const GROUPS: usize = 100_000;
    let redis = RedisServer::start().await;
    let url = redis.url();
    let service = Service::start(&[&["--redis-url", &url][..], &PATIENT].concat());
    let mut client = service.client().await;
    fill(&mut client, GROUPS, pb::Backend::Redis).await;
    median_load(&mut client).await;
    let usual = median_load(&mut client).await;
    let before = service.resident_bytes();

    let mut stalled = service.client().await;
    let request = pb::LoadAllRequest::default();
    let mut stream = stalled.load_all(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    let mut most = 0;
    let mut during = Duration::MAX;
    let as_usual = usual * 3 + Duration::from_millis(1);
    let bound = Bound::of(Duration::from_secs(10));
    let mut rounds = 0;
    // The best of several rounds: other tests share this machine.
    while rounds < 5 || during >= as_usual {
        assert!(!bound.is_over(), "{usual:?} → {during:?}");
        rounds += 1;
        during = during.min(median_load(&mut client).await);
        most = most.max(service.resident_bytes());
    }
    let grown = most.saturating_sub(before);
    println!(
        "Load: usual {usual:?}, during {during:?}; memory: +{} KiB",
        grown / 1024
    );
    assert!(grown < 64 << 20, "{grown} bytes more");

    // It goes on from where it stopped when it is read again.
    let mut groups = 0;
    let mut summary = None;
    while let Some(message) = stream.message().await.unwrap() {
        groups += message.groups.len();
        summary = message.summary;
    }
    let summary = summary.unwrap();
    assert_eq!((summary.groups, summary.complete), (GROUPS as i64, true));
    assert!(groups < GROUPS, "the first message held some");
}

async fn median_load(client: &mut Client) -> Duration {
    let mut times = Vec::new();
    for i in 0..500 {
        let begin = Instant::now();
        client.load(load_request(&format!("k/{i}"))).await.unwrap();
        times.push(begin.elapsed());
    }
    times.sort();
    times[times.len() / 2]
}
