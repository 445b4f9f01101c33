//! What a call costs beside the thin pass-through: `make bench`.
//!
//! Starts Redis, an empty tonic server that is also the pass-through (one fred GET
//! or SET a call and nothing else), etcd, and the service, each as a process, and
//! drives them in turn, round by round, so that what disturbs one disturbs the
//! others. Only the ratios within one run mean something.
//!
//! What h2load can send, h2load sends: it is written in C and knows nothing of gRPC,
//! so it takes little of the two cores, and no side is favoured. What has to look at
//! the replies is sent by [`callers`] and [`batches`].

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../load/mod.rs"]
mod load;

mod batches;
mod callers;
mod etcd;
mod h2load;
mod plain;
mod report;
mod sample;

use std::time::Duration;

use common::{http, redis_server::RedisServer, service::Service};
use load::{RawClient, pass_through, usage::Usage};
use redis::AsyncCommands;

use self::{
    batches::Batches,
    callers::Caller,
    etcd::Etcd,
    h2load::Shot,
    report::{Report, Row},
    sample::{Load, Sample},
};

const ROUNDS: usize = 3;
/// Calls in flight: over how many connections, how many on each.
const LOADS: [Load; 4] = [
    Load::new(1, 1),
    Load::new(4, 2),
    Load::new(4, 16),
    Load::new(4, 128),
];
/// Alerts in a group: documents of about 1, 9 and 90 KB.
const SIZES: [usize; 3] = [2, 20, 200];
/// Groups: one for each call in flight, of which h2load uses the first.
const KEYS: usize = 512;

const ETCD: &str = "etcd";

/// What a call is, how it is sent, and what it is compared with.
struct Case {
    name: &'static str,
    /// Ours, the pass-through, and others to stand beside them.
    sides: Vec<Side>,
}

struct Side {
    name: &'static str,
    server: u32,
    sender: Sender,
}

enum Sender {
    H2load(Shot),
    Callers(Caller),
    /// With one call in flight, whatever the load.
    Batches(Batches),
}

/// The servers, all of them running from the beginning to the end.
struct Ground {
    redis: RedisServer,
    service: Service,
    thin: common::Process,
    thin_addr: String,
    etcd: Etcd,
    folder: tempfile::TempDir,
}

#[tokio::main]
async fn main() {
    pass_through::serve_if_asked().await;
    let ground = Ground::start().await;
    let mut report = Report::default();
    for alerts in SIZES {
        let document = ground.fill(alerts).await;
        let mut cases = Vec::new();
        for load in LOADS {
            cases.extend(ground.cases(alerts, document).map(|case| (case, load)));
        }
        if alerts == SIZES[0] {
            cases.extend(
                ground
                    .batches(alerts, document)
                    .map(|case| (case, LOADS[0])),
            );
        }
        for (case, load) in cases {
            let row = ground.measure(&case, alerts, load).await;
            println!("{}", row.markdown());
            report.rows.push(row);
        }
        if alerts == SIZES[0] {
            report.plain = plain::measure(ground.redis.addr(), document);
        }
    }
    ground.all_succeeded().await;
    report.write();
}

impl Ground {
    async fn start() -> Self {
        let redis = RedisServer::start().await;
        let service = Service::start(&["--redis-url", &redis.url()]);
        let (thin, thin_addr) = pass_through::start(&redis.admin_url());
        Self {
            etcd: Etcd::start().await,
            folder: tempfile::tempdir().unwrap(),
            redis,
            service,
            thin,
            thin_addr,
        }
    }

    /// Stores groups of this size everywhere. How many bytes their documents have.
    async fn fill(&self, alerts: usize) -> usize {
        let ours = RawClient::connect(self.service.addr(), 1).await;
        let mut redis = self.redis.connect().await;
        let mut bytes = 0;
        let thin = RawClient::connect(&self.thin_addr, 1).await;
        for number in 0..KEYS {
            let request = load::store_request(number, alerts);
            ours.call(0, load::STORE, request).await.unwrap();
            if number == 0 {
                let key = format!("group:{}", load::key_of(number));
                bytes = redis.strlen(key).await.unwrap();
            }
            let request = pass_through::set_request(number, bytes);
            thin.call(0, pass_through::SET, request).await.unwrap();
        }
        if alerts == SIZES[0] {
            self.etcd.put(bytes).await;
        }
        bytes
    }

    fn cases(&self, alerts: usize, document: usize) -> [Case; 4] {
        let h2load = |addr: &str, path, request| {
            Sender::H2load(Shot::new(self.folder.path(), addr, path, request))
        };
        let ours = |sender| self.ours(sender);
        let thin = |sender| self.thin(sender);
        let etcd = |path, request| Side {
            name: ETCD,
            server: self.etcd.pid(),
            sender: h2load(self.etcd.addr(), path, request),
        };
        let get = || {
            h2load(
                &self.thin_addr,
                pass_through::GET,
                pass_through::get_request(0),
            )
        };
        let set = pass_through::set_request(0, document);
        let set = || h2load(&self.thin_addr, pass_through::SET, set.clone());
        let callers = |addr: &str, kind| Sender::Callers(Caller::new(addr, kind, alerts, document));
        let mut cases = [
            Case {
                name: "Load",
                sides: vec![
                    ours(h2load(
                        self.service.addr(),
                        load::LOAD,
                        load::load_request(0),
                    )),
                    thin(get()),
                    Side {
                        name: "empty",
                        ..thin(h2load(
                            &self.thin_addr,
                            pass_through::EMPTY,
                            pass_through::get_request(0),
                        ))
                    },
                    etcd(etcd::RANGE, etcd::range_request()),
                ],
            },
            Case {
                name: "Store",
                sides: vec![
                    ours(h2load(
                        self.service.addr(),
                        load::STORE,
                        load::store_request(0, alerts),
                    )),
                    thin(set()),
                    etcd(etcd::PUT, etcd::put_request(document)),
                ],
            },
            Case {
                name: "CompareAndSwap",
                sides: vec![
                    ours(callers(self.service.addr(), callers::Kind::Swap)),
                    thin(callers(&self.thin_addr, callers::Kind::Set)),
                ],
            },
            Case {
                name: "80 % Load, 20 % Store",
                sides: vec![
                    ours(callers(self.service.addr(), callers::Kind::Mixed)),
                    thin(callers(&self.thin_addr, callers::Kind::ThinMixed)),
                ],
            },
        ];
        if alerts != SIZES[0] {
            // It keeps every version of a value, up to 2 GiB of them.
            for case in &mut cases {
                case.sides.retain(|side| side.name != ETCD);
            }
        }
        cases
    }

    /// All groups in one call.
    fn batches(&self, alerts: usize, document: usize) -> [Case; 2] {
        let case = |name, all, singly| {
            let batches = |addr: &str, kind| {
                Sender::Batches(Batches::new(addr, kind, KEYS, alerts, document))
            };
            Case {
                name,
                sides: vec![
                    self.ours(batches(self.service.addr(), all)),
                    self.thin(batches(&self.thin_addr, singly)),
                ],
            }
        };
        [
            case(
                "LoadAll of 512",
                batches::Kind::LoadAll,
                batches::Kind::Gets,
            ),
            case(
                "StoreAll of 512",
                batches::Kind::StoreAll,
                batches::Kind::Sets,
            ),
        ]
    }

    fn ours(&self, sender: Sender) -> Side {
        Side {
            name: "groupstate",
            server: self.service.process().child.id(),
            sender,
        }
    }

    fn thin(&self, sender: Sender) -> Side {
        Side {
            name: "pass-through",
            server: self.thin.child.id(),
            sender,
        }
    }

    async fn measure(&self, case: &Case, alerts: usize, load: Load) -> Row {
        let mut samples: Vec<Vec<Sample>> = case.sides.iter().map(|_| Vec::new()).collect();
        // The first round warms up, and does not count.
        for round in 0..=ROUNDS {
            for (side, samples) in case.sides.iter().zip(&mut samples) {
                let sample = self.shoot(side, load).await;
                if round > 0 {
                    samples.push(sample);
                }
            }
        }
        let names = case.sides.iter().map(|side| side.name);
        Row {
            case: case.name,
            alerts,
            load,
            sides: names
                .zip(samples.into_iter().map(sample::summary))
                .collect(),
        }
    }

    async fn shoot(&self, side: &Side, load: Load) -> Sample {
        let redis = self.redis.process().child.id();
        let before = (Usage::of(side.server), Usage::of(redis));
        let latencies = match &side.sender {
            Sender::H2load(shot) => shot.fire(load),
            Sender::Callers(caller) => caller.drive(load).await,
            Sender::Batches(batches) => batches.drive().await,
        };
        Sample {
            latencies,
            server_cpu: Usage::of(side.server).cpu - before.0.cpu,
            redis_cpu: Usage::of(redis).cpu - before.1.cpu,
            server_rss: Usage::of(side.server).rss,
        }
    }

    /// h2load does not look into replies: had calls failed, they would have been
    /// cheap.
    async fn all_succeeded(&self) {
        let health = self.service.health().await;
        assert_eq!(health["switch"]["state"], "closed", "{health}");
        // It is, and has never been anything else.
        assert_eq!(self.service.metric("storage_recovery_total").await, 0.0);
        let addr = self.service.http_addr();
        let metrics = http::get(addr, "/metrics", Duration::from_secs(2)).await;
        let body = metrics.unwrap().body;
        let failed: Vec<_> = body
            .lines()
            .filter(|line| line.contains("storage_operations_total{"))
            .filter(|line| !line.contains(r#"result="success""#) && !line.ends_with(" 0"))
            // The first swap of a caller is lost: it tells the version. And nobody sets a
            // deadline, but h2load leaves behind what is in flight when its time is over.
            .filter(|line| !line.contains(r#"result="conflict""#))
            .filter(|line| !line.contains(r#"result="deadline""#))
            .collect();
        assert!(failed.is_empty(), "calls have failed: {failed:#?}");
    }
}
