//! One run: starts Redis and the instances, lets clients work while the faults
//! of the plan happen, and has all of it judged.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use groupstate::grpc::proto as pb;
use redis::{AsyncCommands, AsyncIter};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until},
};

use super::{
    clients::{Live, RunClock, Sabotage, Writer},
    evidence::{Evidence, Stall, Struck},
    ground::Ground,
    history::{Backend, Call, Content, Found, Key, Reply, Request, Role},
    oracle::judge,
    schedule::{After, Plan, Step},
    verdict::Verdict,
    watch::{self, Seen, resident_bytes},
    wire::{self, BRIEF_TTL},
};
use crate::common::{
    condition::{Condition, Subject},
    faults::Fault,
    late_requests::LateTally,
    redis_server::RedisServer,
    service::Service,
    stalls::Bound,
    wait_until,
    wall_clock::WallClock,
};

/// A run to be made.
#[derive(Clone, Debug)]
pub struct Run {
    pub plan: Plan,
    pub sabotage: Sabotage,
    /// Groups that are deleted in Redis at the end, behind everybody's back.
    pub deleted_behind: usize,
    /// The proxies lift the deadlines of writes, so that Redis executes them
    /// however late they come.
    pub deadlines_lifted: bool,
}

/// What came of it.
pub struct Outcome {
    pub plan: Plan,
    pub evidence: Evidence,
    pub verdict: Verdict,
    /// What each proxy has seen of late requests.
    pub late: Vec<LateTally>,
}

/// The parts of a run while it goes on.
struct Stage {
    ground: Ground,
    /// The bystander is the last one.
    services: Vec<Arc<Service>>,
    /// The wall clock of each.
    clocks: Vec<WallClock>,
    /// When each was stopped from outside.
    stops: Vec<Vec<Stall>>,
    /// Of each instance before the first fault.
    conditions: Vec<Condition>,
    first_resident_bytes: Vec<usize>,
    clock: RunClock,
    live: Arc<Live>,
    /// When groups that expire soon were stored last.
    last_fleeting: Instant,
    stop_watching: Arc<AtomicBool>,
    writers: JoinSet<Vec<Call>>,
    watchers: Vec<JoinHandle<Seen>>,
    stalls: JoinHandle<Vec<Stall>>,
}

const WRITERS: usize = 6;
/// Keys that two writers of an instance share.
const SHARED_KEYS: u32 = 2;
const MIRROR_MAX_BYTES: usize = 64 << 20;
/// The time before the first fault, and calls in it, so that there is something to lose.
const WARM_UP: Duration = Duration::from_millis(700);
const WARM_UP_CALLS: u64 = 350;
const WARM_UP_BOUND: Duration = Duration::from_secs(30);
/// Between a recovery and the next fault or the end.
const QUIET: Duration = Duration::from_millis(300);
/// Redis is used again within 2 s; then what is dirty is carried over. Not more
/// than a few hundred groups are.
const SETTLED_WITHIN: Duration = Duration::from_secs(3);
/// What an instance that was stopped has to catch up with.
const AFTER_A_STOP: Duration = Duration::from_millis(100);
/// Deletes that Redis may have lost are told again for the last time after 30 s.
const DELETED_AGAIN_WITHIN: Duration = Duration::from_secs(35);
/// Memory is exact to a second about expiry.
const EXPIRED_WITHIN: Duration = Duration::from_millis(1_500);

// === impl Run ===

impl Run {
    pub fn of(plan: Plan) -> Self {
        Self {
            plan,
            sabotage: Sabotage::None,
            deleted_behind: 0,
            deadlines_lifted: false,
        }
    }

    pub async fn make(self) -> Outcome {
        let mut stage = Stage::set(&self).await;
        sleep(WARM_UP).await;
        wait_until("clients call", WARM_UP_BOUND, async || {
            stage.live.calls.load(Ordering::Relaxed) >= WARM_UP_CALLS
        })
        .await;
        let faults = stage.play(&self.plan).await;
        let proxies = stage.ground.proxies().iter();
        let late = proxies.map(|proxy| proxy.late_requests().tally()).collect();
        let evidence = stage.strike_set(&self, faults).await;
        Outcome {
            verdict: judge(&evidence),
            plan: self.plan,
            evidence,
            late,
        }
    }
}

// === impl Stage ===

impl Stage {
    /// Starts everything.
    async fn set(run: &Run) -> Self {
        let plan = &run.plan;
        let ground = Ground::start(plan).await;
        if run.deadlines_lifted {
            assert!(plan.proxied, "nobody is there to lift deadlines");
            for proxy in ground.proxies() {
                proxy.late_requests().lift_deadlines();
            }
        }
        let all = plan.instances + usize::from(plan.bystander);
        let clocks: Vec<WallClock> = (0..all).map(|_| WallClock::new()).collect();
        let (services, conditions) = start_services_at_their_best(plan, &ground, &clocks).await;
        let clock = RunClock::start();
        let live = Arc::new(Live::new(plan.instances));
        let stop_watching: Arc<AtomicBool> = Arc::default();
        let watchers = services
            .iter()
            .map(|service| tokio::spawn(watch::watch(service.clone(), stop_watching.clone())))
            .collect();
        let stalls = tokio::spawn(watch::watch_stalls(clock, stop_watching.clone()));
        let mut writers = JoinSet::new();
        for number in 0..WRITERS {
            let instance = number % plan.instances;
            let mut clients = Vec::new();
            for service in &services[..plan.instances] {
                clients.push(service.client().await);
            }
            let mut writer = Writer::new(number, instance, clients, clock, live.clone(), plan.seed);
            writer.sabotage = run.sabotage;
            writer.wanders = plan.wanders;
            if number / plan.instances < 2 {
                writer.shared = (0..SHARED_KEYS)
                    .map(|number| Key {
                        role: Role::Shared,
                        owner: instance,
                        number,
                    })
                    .collect();
            }
            writers.spawn(writer.run());
        }
        Self {
            first_resident_bytes: services
                .iter()
                .map(|service| resident_bytes(service))
                .collect(),
            conditions,
            ground,
            stops: vec![Vec::new(); services.len()],
            services,
            clocks,
            clock,
            live,
            last_fleeting: Instant::now(),
            stop_watching,
            writers,
            watchers,
            stalls,
        }
    }

    /// Lets the faults happen, one after the other.
    async fn play(&mut self, plan: &Plan) -> Vec<Struck> {
        let mut faults = Vec::new();
        let mut healthy = true;
        for (number, step) in plan.steps.iter().enumerate() {
            self.ground.make_whole().await;
            let began = self.clock.now();
            self.strike(step).await;
            let ended = self.clock.now();
            self.ground.wait_until_writable(step).await;
            let writable = self.clock.now();
            let from_health = healthy;
            let is_last = number + 1 == plan.steps.len();
            if is_last {
                self.stop_fleeting();
            }
            let awaited = is_last || step.after == After::Recovered;
            healthy = match step.after {
                After::Soon(pause) if !is_last => {
                    sleep(pause).await;
                    false
                }
                _ => self.wait_until_recovered(writable).await,
            };
            if awaited {
                self.ground.wait_for_stragglers().await;
                sleep(QUIET).await;
            }
            faults.push(Struck {
                step: *step,
                began,
                ended,
                writable,
                wiped: self.ground.is_wiped_by(step.fault),
                from_health,
                awaited,
            });
        }
        self.ground.make_whole().await;
        faults
    }

    /// Makes a fault happen; returns at its end.
    async fn strike(&mut self, step: &Step) {
        let struck = (0..self.services.len()).filter(|instance| step.strikes(*instance));
        match step.fault {
            Fault::StopService => {
                for instance in struck {
                    let process = self.services[instance].process();
                    process.signal("STOP");
                    let begin = self.clock.now();
                    sleep(step.length).await;
                    process.signal("CONT");
                    let end = self.clock.now() + AFTER_A_STOP;
                    self.stops[instance].push(Stall { begin, end });
                }
            }
            Fault::ClockOfService(millis) => {
                for instance in struck {
                    self.clocks[instance].move_by(millis);
                }
            }
            _ => self.ground.strike(step).await,
        }
    }

    fn stop_fleeting(&mut self) {
        self.live.stop_fleeting.store(true, Ordering::Relaxed);
        // A call under way may take a second.
        self.last_fleeting = Instant::now() + Duration::from_secs(1);
    }

    /// Waits until every instance answers from Redis. False when one does not in
    /// time: the oracle will say so.
    async fn wait_until_recovered(&self, since: Duration) -> bool {
        let bound = Bound::of(SETTLED_WITHIN);
        'wait: while !bound.is_over() {
            sleep(Duration::from_millis(20)).await;
            for (instance, service) in self.services.iter().enumerate() {
                let is_bystander = instance >= self.live.last_redis_answer.len();
                if !is_bystander && !self.live.answered_from_redis_since(instance, since)
                    || watch::is_settled(service).await.is_err()
                {
                    continue 'wait;
                }
            }
            return true;
        }
        false
    }

    /// An instance that has not heard of a delete may put the group back; who has deleted
    /// it does so again, for some time. Judged is what there is then.
    async fn wait_until_deleted_again(&self, calls: &[Call], faults: &[Struck]) {
        let of_redis = |call: &&Call| call.backend() == Some(Backend::Redis);
        let known = calls
            .iter()
            .filter(|call| call.key.role == Role::Wandering && call.is_write())
            .filter(|call| !faults.iter().any(|struck| struck.has_two_sides(call)));
        let last: BTreeMap<Key, &Call> = known.map(|call| (call.key, call)).collect();
        let deleted = last.into_values().filter(of_redis).filter(|call| {
            matches!(
                (&call.reply, &call.request),
                (
                    Reply::Deleted { .. } | Reply::NotDeleted { version: 0, .. },
                    _
                ) | (Reply::Written { .. }, Request::StoreBriefly(_))
            )
        });
        let deleted: Vec<String> = deleted.map(|call| call.key.to_string()).collect();
        let bound = Bound::of(DELETED_AGAIN_WITHIN);
        while !bound.is_over() {
            let there = read_all(&self.ground).await;
            if !deleted.iter().any(|key| there.contains_key(key)) {
                return;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Ends the run and collects what is known of it.
    async fn strike_set(mut self, run: &Run, faults: Vec<Struck>) -> Evidence {
        if run.plan.steps.is_empty() {
            self.stop_fleeting();
        }
        self.live.stop.store(true, Ordering::Relaxed);
        let mut calls: Vec<Call> = Vec::new();
        while let Some(of_writer) = self.writers.join_next().await {
            calls.extend(of_writer.expect("no writer panics"));
        }
        calls.sort_by_key(|call| call.end);
        let mut unsettled = Vec::new();
        for service in &self.services {
            unsettled.push(wait_until_settled(service).await.err());
        }
        if calls.iter().any(|call| call.key.role == Role::Fleeting) {
            let set_back = run.plan.steps.iter().map(|step| match step.fault {
                Fault::ClockOfRedis(millis) => Duration::from_millis(millis.min(0).unsigned_abs()),
                _ => Duration::ZERO,
            });
            let ttl = BRIEF_TTL + set_back.sum::<Duration>();
            sleep_until(self.last_fleeting + ttl + EXPIRED_WITHIN).await;
        }
        self.wait_until_deleted_again(&calls, &faults).await;
        let mut finals = read_all(&self.ground).await;
        for name in victims(&finals).into_iter().take(run.deleted_behind) {
            let mut connection = self.ground.primaries()[0].connect().await;
            let () = connection
                .del(format!("group:{name}"))
                .await
                .expect("it is up");
            finals = read_all(&self.ground).await;
        }
        let end = self.clock.now();
        let mut incomplete = Vec::new();
        for service in &self.services {
            incomplete.push(compare_listing(service, &finals).await.err());
        }
        self.stop_watching.store(true, Ordering::Relaxed);
        let mut instances = Vec::new();
        for (number, watcher) in self.watchers.into_iter().enumerate() {
            let seen = watcher.await.expect("no watcher panics");
            let service = Arc::get_mut(&mut self.services[number]).expect("its watcher has ended");
            let first = self.first_resident_bytes[number];
            let mut record = watch::record(service, seen, first, MIRROR_MAX_BYTES, self.clock);
            record.unsettled = unsettled[number].take();
            record.incomplete = incomplete[number].take();
            record.stops = std::mem::take(&mut self.stops[number]);
            instances.push(record);
        }
        // Whatever these calls do, no record of the run has it.
        let looks = (self.services.iter().zip(&self.conditions)).zip(&mut instances);
        let looks = looks.map(|((service, before), record)| async {
            let again = subject(service, self.ground.primaries());
            if let Err(worse) = again.is_again_as(before).await {
                record.worse = worse.worse;
            }
        });
        join_all(looks).await;
        let mut evidence = Evidence {
            policy: run.plan.policy,
            calls,
            finals,
            end,
            faults,
            instances,
            stalls: self.stalls.await.expect("it does not panic"),
        };
        evidence.widen_outages();
        evidence
    }
}

fn subject<'a>(service: &'a Service, primaries: &'a [RedisServer]) -> Subject<'a> {
    /// Few, since other runs go on beside this one.
    const ROUNDS: usize = 7;
    Subject {
        service,
        primaries,
        rounds: ROUNDS,
    }
}

/// Starts all instances, and looks at them while nobody else calls.
async fn start_services_at_their_best(
    plan: &Plan,
    ground: &Ground,
    clocks: &[WallClock],
) -> (Vec<Arc<Service>>, Vec<Condition>) {
    loop {
        let mut services = Vec::new();
        for (instance, clock) in clocks.iter().enumerate() {
            services.push(Arc::new(start_service(plan, ground, instance, clock).await));
        }
        for service in &services {
            wait_until_settled(service).await.expect("a healthy start");
        }
        let looks = services.iter().map(|service| async {
            let before = subject(service, ground.primaries()).at_its_best().await;
            (before, service.metric("storage_recovery_total").await)
        });
        let (conditions, recoveries): (_, Vec<f64>) = join_all(looks).await.into_iter().unzip();
        // What memory has answered by then, on a busy machine, is not in the evidence.
        if recoveries.iter().sum::<f64>() == 0.0 {
            return (services, conditions);
        }
    }
}

async fn start_service(
    plan: &Plan,
    ground: &Ground,
    instance: usize,
    clock: &WallClock,
) -> Service {
    let environment = clock.environment();
    let url = ground.url_for(instance);
    let policy = plan.policy.to_string();
    let mirror = MIRROR_MAX_BYTES.to_string();
    // It sleeps while it waits, which would hold up the clients of other runs.
    let start = move || {
        let environment = environment
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        let settings = [
            ["--redis-url", &url],
            ["--mirror-max-bytes", &mirror],
            ["--on-recovery", &policy],
        ];
        Service::start_in(&environment, settings.as_flattened())
    };
    let started = tokio::task::spawn_blocking(start).await;
    started.expect("the service starts")
}

async fn wait_until_settled(service: &Service) -> Result<(), String> {
    let bound = Bound::of(SETTLED_WITHIN);
    loop {
        let settled = watch::is_settled(service).await;
        if settled.is_ok() || bound.is_over() {
            return settled;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Compares what an instance lists with what Redis holds.
async fn compare_listing(
    service: &Service,
    finals: &BTreeMap<String, Found>,
) -> Result<(), String> {
    let request = pb::LoadAllRequest {
        prefix: Key::PREFIX.to_owned(),
    };
    let told = |status: tonic::Status| format!("failed: {status:?}");
    let mut client = service.client().await;
    let mut parts = client.load_all(request).await.map_err(told)?.into_inner();
    let mut listed = BTreeMap::new();
    let mut is_complete = false;
    while let Some(part) = parts.message().await.map_err(told)? {
        is_complete |= part.summary.is_some_and(|summary| summary.complete);
        for group in part.groups {
            listed.insert(group.key.clone(), wire::found(&group));
        }
    }
    if !is_complete {
        return Err("does not say that it is complete".into());
    }
    let missing: Vec<_> = finals
        .keys()
        .filter(|key| !listed.contains_key(*key))
        .collect();
    let others: Vec<_> = listed
        .iter()
        .filter(|(key, found)| finals.get(*key) != Some(found))
        .collect();
    if missing.is_empty() && others.is_empty() {
        return Ok(());
    }
    Err(format!("lacks {missing:?}, and has {others:?} too much"))
}

/// All groups of the run as they lie in Redis, by group key.
async fn read_all(ground: &Ground) -> BTreeMap<String, Found> {
    let mut groups = BTreeMap::new();
    for primary in ground.primaries() {
        groups.extend(read_all_of(primary).await);
    }
    groups
}

async fn read_all_of(redis: &RedisServer) -> BTreeMap<String, Found> {
    let mut connection = redis.connect().await;
    let mut keys = Vec::new();
    {
        let pattern = format!("group:{}*", Key::PREFIX);
        let mut scan: AsyncIter<String> = connection.scan_match(pattern).await.expect("it is up");
        while let Some(key) = scan.next_item().await {
            keys.push(key.expect("the writers' keys are ASCII"));
        }
    }
    let mut groups = BTreeMap::new();
    for key in keys {
        let document: Option<String> = connection.get(&key).await.expect("it is a string");
        // It may expire between the listing and the reading.
        if let Some(document) = document {
            let name = key.trim_start_matches("group:").to_owned();
            groups.insert(name, Content::of_document(&document));
        }
    }
    groups
}

/// Groups to delete behind everybody's back.
fn victims(finals: &BTreeMap<String, Found>) -> Vec<String> {
    let own = format!("{}own/", Key::PREFIX);
    finals
        .keys()
        .filter(|name| name.starts_with(&own))
        .cloned()
        .collect()
}
