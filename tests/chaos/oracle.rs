//! Judges a run by what its clients were told, what Redis holds at the end, and
//! what the instances say of themselves.
//!
//! The claims are those of the contract: with `reconcile` no acknowledged write
//! is lost, with `discard` exactly the counted ones are; every call is answered
//! in time; Redis is used again within 2 s; versions never go back; memory
//! stays bounded; nothing panics.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tonic::Code;

use super::{
    discards,
    evidence::{Evidence, InstanceRecord},
    history::{Backend, Key, Moment, Reply, Request, Role},
    model::{KeyModel, Rules},
    schedule::{Effect, Policy},
    verdict::{Flaw, Verdict},
    wandering,
};

/// A call without a deadline gets this long.
const CALL_BOUND: Duration = Duration::from_secs(1);
/// What a call may take over its bound, for the way between client and service
/// on a machine that is busy with both. Without faults the slowest of 10,000
/// calls takes 20 to 60 ms here. Stalls that were measured come on top.
const SLACK: Duration = Duration::from_millis(150);
/// Redis is used again this soon after it can answer.
const RETURN_BOUND: Duration = Duration::from_secs(2);
/// A short fault may open the switch if the machine stood still for longer than this.
const SPARED_STALLS: Duration = Duration::from_millis(100);
/// What an instance may hold besides its mirror: buffers, stacks, and what the
/// allocator does not give back.
const RESIDENT_BYTES_ALLOWED: usize = 64 << 20;

/// Judges a run.
pub fn judge(evidence: &Evidence) -> Verdict {
    let mut verdict = Verdict::default();
    judge_calls(evidence, &mut verdict);
    judge_keys(evidence, &mut verdict);
    judge_shared_keys(evidence, &mut verdict);
    judge_fleeting_keys(evidence, &mut verdict);
    judge_faults(evidence, &mut verdict);
    for (instance, record) in evidence.instances.iter().enumerate() {
        judge_instance(instance, record, &mut verdict);
        if evidence.policy == Policy::Discard {
            let mine = evidence
                .calls
                .iter()
                .filter(|call| call.instance == instance);
            let wipes = evidence.wipes();
            discards::judge(instance, record, mine, &wipes, &mut verdict.flaws);
        }
    }
    verdict
}

/// Every call by itself: in time, and answered.
fn judge_calls(evidence: &Evidence, verdict: &mut Verdict) {
    for call in &evidence.calls {
        verdict.calls += 1;
        verdict.writes += usize::from(call.changed());
        verdict.by_memory += usize::from(call.backend() == Some(Backend::Memory));
        verdict.slowest = verdict.slowest.max(call.took());
        let record = evidence.instances.get(call.instance);
        let stops = record.map_or(&[][..], |record| &record.stops);
        let stalls = evidence.stalls.iter().chain(stops);
        let stalled: Duration = stalls.map(|stall| stall.within(call)).sum();
        let bound = call.deadline.unwrap_or(CALL_BOUND) + SLACK + stalled;
        if call.took() > bound {
            verdict.flaws.push(Flaw::Slow {
                key: call.key,
                at: call.end,
                took: call.took(),
                bound,
            });
        }
        if let Reply::Failed {
            code,
            reason,
            message,
        } = &call.reply
        {
            verdict.unknown += usize::from(call.is_write());
            let allowed = match code {
                Code::Aborted => reason == "OUTCOME_UNKNOWN" && call.is_write(),
                Code::DeadlineExceeded => call.deadline.is_some(),
                _ => false,
            };
            if !allowed {
                verdict.flaws.push(Flaw::Refused {
                    key: call.key,
                    at: call.end,
                    code: *code,
                    reason: format!("{reason}: {message}"),
                });
            }
        }
        if call.backend() == Some(Backend::Memory)
            && !call.is_load_in_a_hurry()
            && let Some(record) = record
            && !record.outages.iter().any(|outage| outage.touches(call))
        {
            verdict.flaws.push(Flaw::MemoryWhileClosed {
                key: call.key,
                instance: call.instance,
                at: call.begin,
            });
        }
    }
    let stalls = evidence.stalls.iter();
    let longest = stalls
        .map(|stall| stall.end.saturating_sub(stall.begin))
        .max();
    verdict.worst_stall = longest.unwrap_or_default();
}

/// Keys with one writer: every answer must fit to those before.
fn judge_keys(evidence: &Evidence, verdict: &mut Verdict) {
    let wipes = evidence.wipes();
    let mut models: BTreeMap<Key, KeyModel> = BTreeMap::new();
    for call in evidence.calls_of(Role::Own) {
        let rules = Rules {
            policy: evidence.policy,
            outages: &evidence.instances[call.instance].outages,
            stops: &evidence.instances[call.instance].stops,
            wipes: &wipes,
        };
        let model = models
            .entry(call.key)
            .or_insert_with(|| KeyModel::new(call.key, rules));
        model.take_in(call, &mut verdict.flaws);
    }
    wandering::judge(evidence, verdict);
    for (key, model) in &mut models {
        let found = evidence.finals.get(&key.to_string()).cloned();
        model.finish(found, evidence.end, &mut verdict.flaws);
        verdict.returned += model.returned;
    }
    let keys: BTreeSet<Key> = evidence.calls.iter().map(|call| call.key).collect();
    let names: BTreeSet<String> = keys.iter().map(Key::to_string).collect();
    let unknown = evidence.finals.keys().filter(|name| !names.contains(*name));
    let unknown = unknown.map(|name| Flaw::UnknownKey(name.clone()));
    verdict.flaws.extend(unknown);
    verdict.lost += verdict.keys_lost().len();
}

/// Shared keys, to which alerts are only added: none that was acknowledged may
/// be missing, but for those that `discard` may drop.
fn judge_shared_keys(evidence: &Evidence, verdict: &mut Verdict) {
    let mut asked: BTreeMap<Key, BTreeSet<&String>> = BTreeMap::new();
    let mut kept: BTreeMap<Key, BTreeSet<&String>> = BTreeMap::new();
    for call in evidence.calls_of(Role::Shared) {
        let Request::Swap { content, .. } = &call.request else {
            continue;
        };
        let fingerprints = content.alerts.keys();
        asked
            .entry(call.key)
            .or_default()
            .extend(fingerprints.clone());
        let Reply::Written { backend, .. } = call.reply else {
            continue;
        };
        let must_stay = match evidence.policy {
            Policy::Reconcile => true,
            Policy::Discard => backend == Backend::Redis,
        };
        if must_stay {
            kept.entry(call.key).or_default().extend(fingerprints);
        }
    }
    for (key, asked) in &asked {
        let found = evidence.finals.get(&key.to_string());
        let found: BTreeSet<&String> = found
            .iter()
            .flat_map(|found| found.content.alerts.keys())
            .collect();
        let kept = kept.remove(key).unwrap_or_default();
        let missing: Vec<_> = kept.difference(&found).collect();
        verdict.lost += usize::from(!missing.is_empty());
        let lost = missing.into_iter().map(|fingerprint| Flaw::LostAlert {
            key: *key,
            fingerprint: fingerprint.to_string(),
        });
        verdict.flaws.extend(lost);
        let alien = found.difference(asked).map(|fingerprint| Flaw::AlienAlert {
            key: *key,
            fingerprint: fingerprint.to_string(),
        });
        verdict.flaws.extend(alien);
    }
}

/// Groups that were stored for a second must be gone long after.
fn judge_fleeting_keys(evidence: &Evidence, verdict: &mut Verdict) {
    for call in evidence.calls_of(Role::Fleeting) {
        if let Some(found) = evidence.finals.get(&call.key.to_string()) {
            verdict.flaws.push(Flaw::CameBack {
                key: call.key,
                at: evidence.end,
                version: found.version,
            });
        }
    }
}

/// Each fault on each instance: noticed in time, and over in time.
fn judge_faults(evidence: &Evidence, verdict: &mut Verdict) {
    for (number, struck) in evidence.faults.iter().enumerate() {
        let next = evidence.faults.get(number + 1);
        let until = next.map_or(evidence.end, |next| next.began);
        for instance in 0..evidence.instances.len() {
            // Whom nobody calls shows nothing.
            let is_called = evidence.calls.iter().any(|call| call.instance == instance);
            if !struck.step.strikes(instance) || !is_called {
                continue;
            }
            let fault = struck.step;
            // The fault before may have opened the switch since: a call that it held
            // up is given up some hundred milliseconds later.
            let outages = &evidence.instances[instance].outages;
            let from_health =
                struck.from_health && !outages.iter().any(|outage| outage.lasts_at(struck.began));
            let first = |backend, from: Moment| {
                let calls = evidence.calls.iter();
                calls
                    .filter(|call| call.instance == instance && call.backend() == Some(backend))
                    .filter(|call| backend == Backend::Redis || !call.is_load_in_a_hurry())
                    .filter(|call| (from..until).contains(&call.end))
                    .map(|call| call.end - from)
                    .min()
            };
            let to_memory = first(Backend::Memory, struck.began);
            let degraded = to_memory.is_some_and(|took| struck.began + took <= struck.writable);
            let could_show = |began: Moment, writable: Moment| {
                let half = began + (writable - began) / 2;
                evidence.calls.iter().any(|call| {
                    call.instance == instance
                        && call.backend().is_some()
                        && !call.is_load_in_a_hurry()
                        && (half..writable).contains(&call.begin)
                        && call.end < writable
                })
            };
            // What a fault does in a while it does in as much more as the machine stood
            // still.
            let stalled = evidence.stalled(struck.began, struck.ended);
            let effect = struck.step.effect(stalled);
            match effect {
                // A short fault may end between two calls. One that came in its
                // second half and went by is evidence.
                Effect::Degrades
                    if from_health
                        && !degraded
                        && (to_memory.is_none() || could_show(struck.began, struck.writable)) =>
                {
                    verdict.flaws.push(Flaw::NotNoticed { fault, instance });
                }
                Effect::Spares
                    if from_health
                        && to_memory.is_some()
                        && evidence.stalled(struck.began, struck.writable) <= SPARED_STALLS =>
                {
                    verdict.flaws.push(Flaw::Overreaction { fault, instance });
                }
                _ => {}
            }
            if from_health && effect == Effect::Degrades {
                verdict.to_memory.extend(to_memory);
            }
            if !struck.awaited || !degraded {
                continue;
            }
            let to_redis = first(Backend::Redis, struck.writable);
            verdict.to_redis.extend(to_redis);
            let returned = to_redis.map_or(until, |took| struck.writable + took);
            let stalled = evidence.stalled(struck.writable, returned);
            if to_redis.is_none_or(|took| took > RETURN_BOUND + SLACK + stalled) {
                verdict.flaws.push(Flaw::LateReturn {
                    fault,
                    instance,
                    took: to_redis,
                });
            }
        }
    }
}

fn judge_instance(instance: usize, record: &InstanceRecord, verdict: &mut Verdict) {
    let flaws = &mut verdict.flaws;
    let incomplete = record.incomplete.clone();
    flaws.extend(incomplete.map(|what| Flaw::Incomplete { instance, what }));
    let unsettled = record.unsettled.clone();
    flaws.extend(unsettled.map(|state| Flaw::Unsettled { instance, state }));
    let worse = record.worse.iter().cloned();
    flaws.extend(worse.map(|what| Flaw::Worse { instance, what }));
    let crashes = record.crashes.iter().cloned();
    flaws.extend(crashes.map(|line| Flaw::Crashed { instance, line }));
    let probes = record.probe_faults.iter().cloned();
    flaws.extend(probes.map(|fault| Flaw::Probe { instance, fault }));
    let bound = record.first_resident_bytes + record.mirror_max_bytes + RESIDENT_BYTES_ALLOWED;
    if record.peak_resident_bytes > bound {
        flaws.push(Flaw::MemoryGrew {
            instance,
            resident_bytes: record.peak_resident_bytes,
            bound,
        });
    }
    let samples = record.samples.iter();
    let bytes = samples.map(|sample| sample.mirror_bytes).max().unwrap_or(0);
    if bytes > record.mirror_max_bytes {
        flaws.push(Flaw::MirrorGrew { instance, bytes });
    }
    verdict.discarded += record.samples.last().map_or(0, |sample| sample.discarded);
    verdict.put_back += record.samples.last().map_or(0, |sample| sample.put_back);
    verdict.peak_resident_bytes = verdict.peak_resident_bytes.max(record.peak_resident_bytes);
    verdict.peak_mirror_bytes = verdict.peak_mirror_bytes.max(bytes);
}
