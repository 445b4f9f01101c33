//! In what condition an instance is: how long each rpc takes, and what the instance
//! takes of the machine and of Redis. After a failure it must be as before.

use std::{
    collections::BTreeMap,
    fmt, fs,
    time::{Duration, Instant},
};

use groupstate::grpc::{convert, proto as pb};
use tonic::Code;

use super::{
    group,
    redis_server::{self, RedisServer},
    service::{Client, Service},
    stalls::{self, Bound, stalled},
};

/// How an instance does while all is well.
#[derive(Clone, Debug)]
pub struct Condition {
    pub rpcs: BTreeMap<Rpc, Times>,
    /// What the machine takes at this moment for the way of a call without its work:
    /// a call that is refused at once, and a PING.
    pub way: Times,
    /// The share of the time for which the machine stood still, at most
    /// [`stalls::MOST`].
    pub stalled: f64,
    pub needs: Needs,
}

/// What is measured, in the order in which it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rpc {
    Store,
    Load,
    CompareAndSwap,
    StoreAll,
    ListKeys,
    Size,
    LoadAll,
    Delete,
}

/// How long calls of a kind take.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub median: Duration,
    /// Three of four take less. One slow connection of two shows here.
    pub quarter: Duration,
}

/// What an instance takes while nobody calls it.
#[derive(Clone, Debug)]
pub struct Needs {
    /// The share of one processor.
    pub cpu: f64,
    pub resident_bytes: usize,
    pub threads: usize,
    /// Of tokio.
    pub tasks: usize,
    pub descriptors: usize,
    /// Connections as each primary counts them.
    pub connections: Vec<usize>,
    /// What it has logged meanwhile.
    pub log_lines: usize,
}

/// Who calls it.
struct Caller {
    client: Client,
    /// Of the keys.
    prefix: String,
}

/// An instance, and what is needed to look at it.
pub struct Subject<'a> {
    pub service: &'a Service,
    pub primaries: &'a [RedisServer],
    /// How often each rpc is called.
    pub rounds: usize,
}

/// Groups that are called; in a cluster they lie on every primary.
const KEYS: usize = 8;
/// For how long nobody calls.
const IDLE: Duration = Duration::from_millis(200);
/// A call may take three times what it took, or this more.
const SLACK: Duration = Duration::from_millis(20);
/// The way of a call is longer than what is measured of it, on a busy machine.
const WAYS: u32 = 4;
const RESIDENT_SLACK: usize = 16 << 20;
/// Of the pool for blocking work, which keeps them for ten seconds.
const THREADS_SLACK: usize = 8;
/// Of callers that have just left.
const TASKS_SLACK: usize = 2;
const CPU_SLACK: f64 = 0.05;
/// After a recovery an instance may have something to do for a while: groups to be
/// carried over, a mirror to be filled.
const REGAINED_WITHIN: Duration = Duration::from_secs(5);
/// Looks, however long they take.
const LOOKS: usize = 2;

// === impl Subject ===

impl Subject<'_> {
    /// The condition of an instance at its best, the better one of two looks.
    pub async fn at_its_best(&self) -> Condition {
        let bound = Bound::of(REGAINED_WITHIN);
        let mut looks = Vec::new();
        while looks.len() < LOOKS {
            match self.look().await {
                Ok(look) => looks.push(look),
                Err(unanswered) => assert!(!bound.is_over(), "{unanswered}"),
            }
        }
        let best = looks.into_iter().reduce(Condition::best);
        best.expect("there are looks")
    }

    /// Waits until it is as `before`; otherwise what is worse.
    pub async fn is_again_as(&self, before: &Condition) -> Result<Condition, Worse> {
        let bound = Bound::of(REGAINED_WITHIN);
        let mut looks = 0;
        let mut best: Option<Condition> = None;
        loop {
            looks += 1;
            let (now, worse) = match self.look().await {
                Ok(now) => {
                    // What is slow for good is slow in each look.
                    let now = match best.take() {
                        Some(best) => best.best(now),
                        None => now,
                    };
                    best = Some(now.clone());
                    let worse = now.worse_than(before);
                    (Some(now), worse)
                }
                Err(unanswered) => (None, vec![unanswered]),
            };
            match now {
                Some(now) if worse.is_empty() => return Ok(now),
                now if looks >= LOOKS && bound.is_over() => {
                    return Err(Worse { now, worse });
                }
                _ => {}
            }
        }
    }

    async fn look(&self) -> Result<Condition, String> {
        let mut client = Caller {
            client: self.service.client().await,
            // Others may look at another instance on the same Redis.
            prefix: format!("condition/{}/", self.service.addr()),
        };
        let mut redis = self.primaries[0].connect().await;
        let mut times: BTreeMap<Option<Rpc>, Vec<Duration>> = BTreeMap::new();
        Rpc::StoreAll.call(&mut client, 0, 0).await?;
        let (began, stalled_before) = (Instant::now(), stalled());
        for round in 0..self.rounds {
            let key = round % KEYS;
            // So that each rpc gets to each connection to Redis, which take turns.
            for _ in 0..round % 3 {
                Rpc::Load.call(&mut client, key, 0).await?;
            }
            let mut version = 0;
            for rpc in Rpc::ALL {
                let begin = Instant::now();
                version = rpc.call(&mut client, key, version).await?;
                times.entry(Some(rpc)).or_default().push(begin.elapsed());
            }
            let begin = Instant::now();
            refused(&mut client).await?;
            let pong: redis::RedisResult<String> = redis::cmd("PING").query_async(&mut redis).await;
            pong.map_err(|error| format!("PING: {error}"))?;
            times.entry(None).or_default().push(begin.elapsed());
        }
        let share = (stalled() - stalled_before).div_duration_f64(began.elapsed());
        for key in 0..KEYS {
            Rpc::Delete.call(&mut client, key, 0).await?;
        }
        let mut times: BTreeMap<_, _> = times
            .into_iter()
            .map(|(rpc, times)| (rpc, Times::of(times)))
            .collect();
        Ok(Condition {
            way: times.remove(&None).expect("there is a round"),
            rpcs: times
                .into_iter()
                .filter_map(|(rpc, times)| Some((rpc?, times)))
                .collect(),
            stalled: share.min(stalls::MOST),
            needs: self.needs().await,
        })
    }

    async fn needs(&self) -> Needs {
        let process = self.service.process().child.id();
        let (cpu, lines, begin) = (cpu_time(process), self.service.log().len(), Instant::now());
        tokio::time::sleep(IDLE).await;
        let spent = cpu_time(process).saturating_sub(cpu);
        let mut connections = Vec::new();
        for primary in self.primaries {
            connections.push(connections_to(primary).await);
        }
        let count =
            |what| fs::read_dir(format!("/proc/{process}/{what}")).map_or(0, Iterator::count);
        Needs {
            cpu: spent.as_secs_f64() / begin.elapsed().as_secs_f64(),
            resident_bytes: self.service.resident_bytes(),
            threads: count("task"),
            tasks: self.service.metric("tokio_tasks").await as usize,
            descriptors: count("fd"),
            connections,
            log_lines: self.service.log().len() - lines,
        }
    }
}

/// The time that all threads of a process have run.
fn cpu_time(process: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter();
    let ran = threads.flatten().flatten().filter_map(|thread| {
        let told = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        told.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(ran.sum())
}

/// How many connections the service has to a Redis.
async fn connections_to(redis: &RedisServer) -> usize {
    let mut list = redis::cmd("CLIENT");
    let list: String = list
        .arg("LIST")
        .query_async(&mut redis.connect().await)
        .await
        .expect("the primary is up");
    let of_service = format!(" user={} ", redis_server::login()[0]);
    list.lines()
        .filter(|line| line.contains(&of_service))
        .count()
}

/// A call that is refused before it gets to Redis.
async fn refused(caller: &mut Caller) -> Result<(), String> {
    let refused = caller.client.load(pb::LoadRequest::default()).await;
    match refused.err().map(|status| status.code()) {
        Some(Code::InvalidArgument) => Ok(()),
        other => Err(format!("a Load without a key: {other:?}")),
    }
}

// === impl Rpc ===

impl Rpc {
    pub const ALL: [Self; 8] = [
        Self::Store,
        Self::Load,
        Self::CompareAndSwap,
        Self::StoreAll,
        Self::ListKeys,
        Self::Size,
        Self::LoadAll,
        Self::Delete,
    ];

    /// Makes a call that Redis has to answer. `version` is that of the key; returns it,
    /// if need be as it is now.
    async fn call(self, caller: &mut Caller, key: usize, version: i64) -> Result<i64, String> {
        let called = self.try_to_call(caller, key, version).await;
        let (version, backend) = called.map_err(|status| format!("{self}: {status:?}"))?;
        if backend == pb::Backend::Redis {
            Ok(version)
        } else {
            Err(format!("{self}: {backend:?} answers"))
        }
    }

    async fn try_to_call(
        self,
        Caller { client, prefix }: &mut Caller,
        key: usize,
        version: i64,
    ) -> Result<(i64, pb::Backend), tonic::Status> {
        let name = |key: usize| format!("{prefix}{key}");
        let group = |key| convert::group(group(&name(key), &["a", "b"]));
        let prefix = || prefix.clone();
        Ok(match self {
            Self::Store => {
                let request = pb::StoreRequest {
                    group: Some(group(key)),
                    expiry: None,
                };
                let reply = client.store(request).await?.into_inner();
                (reply.version, reply.backend())
            }
            Self::Load => {
                let request = pb::LoadRequest {
                    key: name(key),
                    include_expire_time: false,
                };
                let reply = client.load(request).await?.into_inner();
                (version, reply.backend())
            }
            Self::CompareAndSwap => {
                let request = pb::CompareAndSwapRequest {
                    group: Some(group(key)),
                    expected_version: version,
                    expiry: None,
                };
                let reply = client.compare_and_swap(request).await?.into_inner();
                assert!(reply.swapped, "nobody else writes it");
                (reply.version, reply.backend())
            }
            Self::StoreAll => {
                let request = pb::StoreAllRequest {
                    groups: (0..KEYS).map(group).collect(),
                    expiry: None,
                };
                let reply = client.store_all(request).await?.into_inner();
                (version, reply.backend())
            }
            Self::ListKeys => {
                let request = pb::ListKeysRequest {
                    prefix: prefix(),
                    ..Default::default()
                };
                (
                    version,
                    client.list_keys(request).await?.get_ref().backend(),
                )
            }
            Self::Size => {
                let request = pb::SizeRequest { prefix: prefix() };
                (version, client.size(request).await?.get_ref().backend())
            }
            Self::LoadAll => {
                let request = pb::LoadAllRequest { prefix: prefix() };
                let mut stream = client.load_all(request).await?.into_inner();
                let mut backend = pb::Backend::Unspecified;
                while let Some(message) = stream.message().await? {
                    backend = message.backend();
                }
                (version, backend)
            }
            Self::Delete => {
                let request = pb::DeleteRequest {
                    key: name(key),
                    expected_version: None,
                };
                (0, client.delete(request).await?.get_ref().backend())
            }
        })
    }
}

impl fmt::Display for Rpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

// === impl Times ===

impl Times {
    /// At least one.
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        Self {
            median: times[times.len() / 2],
            quarter: times[times.len() * 3 / 4],
        }
    }

    fn best(self, other: Self) -> Self {
        Self {
            median: self.median.min(other.median),
            quarter: self.quarter.min(other.quarter),
        }
    }
}

// === impl Condition ===

impl Condition {
    fn best(mut self, other: Self) -> Self {
        for (rpc, times) in &mut self.rpcs {
            *times = times.best(other.rpcs[rpc]);
        }
        // What it takes comes to rest.
        self.needs = other.needs;
        self.way = self.way.best(other.way);
        self.stalled = self.stalled.min(other.stalled);
        self
    }

    /// What is worse than `before`, beyond what a busy machine explains.
    pub fn worse_than(&self, before: &Self) -> Vec<String> {
        let mut worse = Vec::new();
        for (rpc, now) in &self.rpcs {
            let then = before.rpcs[rpc];
            let judged = [
                ("the median", then.median, now.median, self.way.median),
                ("a quarter", then.quarter, now.quarter, self.way.quarter),
            ];
            for (what, then, now, way) in judged {
                let most = (3 * then).max(then + SLACK) + WAYS * way;
                let most = most.div_f64(1.0 - self.stalled);
                if now > most {
                    worse.push(format!("{rpc}: {what} took {then:.1?} and takes {now:.1?}"));
                }
            }
        }
        let (then, now) = (&before.needs, &self.needs);
        let mut judge = |what: &str, then: usize, now: usize, slack: usize| {
            if now > then + slack {
                worse.push(format!("{what}: {then} before, {now} now"));
            }
        };
        judge(
            "bytes of memory",
            then.resident_bytes,
            now.resident_bytes,
            RESIDENT_SLACK,
        );
        judge("threads", then.threads, now.threads, THREADS_SLACK);
        judge("tasks", then.tasks, now.tasks, TASKS_SLACK);
        judge("open files", then.descriptors, now.descriptors, 0);
        judge("lines of log while idle", 0, now.log_lines, 0);
        // A connection to a cluster leads to every primary, and once more to any server,
        // of which it asks who holds what.
        let all = |needs: &Needs| needs.connections.iter().sum::<usize>();
        let fewest = |needs: &Needs| needs.connections.iter().min().copied();
        if all(now) > all(then) || fewest(now) < fewest(then) {
            let (then, now) = (&then.connections, &now.connections);
            worse.push(format!(
                "connections to Redis: {then:?} before, {now:?} now"
            ));
        }
        if now.cpu > (3.0 * then.cpu).max(then.cpu + CPU_SLACK) {
            let (then, now) = (then.cpu * 100.0, now.cpu * 100.0);
            worse.push(format!(
                "{then:.1} % of a processor while idle before, {now:.1} % now"
            ));
        }
        worse
    }
}

/// What has not become as it was.
pub struct Worse {
    /// None when a call failed, or memory answered it.
    pub now: Option<Condition>,
    pub worse: Vec<String>,
}

impl fmt::Debug for Worse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.worse.join("; "))
    }
}
