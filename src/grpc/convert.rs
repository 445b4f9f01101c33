//! From the domain to the proto. The other direction checks what it converts:
//! see `validation.rs`.

use prost_types::Timestamp;

use super::proto as pb;
use crate::{
    domain::{
        group::{Alert, AlertGroup, AlertStatus, GroupState, Time, TimerMetadata},
        version::Version,
    },
    store::{Backend, Expires},
};

pub fn backend(backend: Backend) -> i32 {
    match backend {
        Backend::Redis => pb::Backend::Redis.into(),
        Backend::Memory => pb::Backend::Memory.into(),
    }
}

pub fn timestamp(time: Time) -> Timestamp {
    Timestamp {
        seconds: time.seconds(),
        // Less than 10^9.
        nanos: time.nanos() as i32,
    }
}

pub fn expire_time(expires: Option<Expires>) -> Option<Timestamp> {
    expires.map(|expires| timestamp(expires.at))
}

/// Zero stands for "none".
pub fn version(version: Option<Version>) -> i64 {
    version.map_or(0, Version::get)
}

pub fn group(group: AlertGroup) -> pb::AlertGroup {
    let metadata = group.metadata;
    pb::AlertGroup {
        key: group.key.to_string(),
        alerts: group
            .alerts
            .into_iter()
            .map(|(fingerprint, value)| (fingerprint, alert(value)))
            .collect(),
        metadata: Some(pb::GroupMetadata {
            state: match metadata.state {
                GroupState::Firing => pb::GroupState::Firing,
                GroupState::Resolved => pb::GroupState::Resolved,
                GroupState::Mixed => pb::GroupState::Mixed,
                GroupState::Silenced => pb::GroupState::Silenced,
            }
            .into(),
            created_at: metadata.created_at.map(timestamp),
            updated_at: metadata.updated_at.map(timestamp),
            first_firing_at: metadata.first_firing_at.map(timestamp),
            resolved_at: metadata.resolved_at.map(timestamp),
            firing_count: metadata.firing_count,
            resolved_count: metadata.resolved_count,
            group_by: metadata.group_by,
            group_wait_timer: metadata.group_wait_timer.map(timer),
            group_interval_timer: metadata.group_interval_timer.map(timer),
            repeat_interval_timer: metadata.repeat_interval_timer.map(timer),
            write_id: metadata.write_id,
            version: version(metadata.version),
        }),
    }
}

fn alert(alert: Alert) -> pb::Alert {
    pb::Alert {
        fingerprint: alert.fingerprint,
        alert_name: alert.alert_name,
        status: match alert.status {
            AlertStatus::Firing => pb::AlertStatus::Firing,
            AlertStatus::Resolved => pb::AlertStatus::Resolved,
        }
        .into(),
        labels: alert.labels,
        annotations: alert.annotations,
        starts_at: alert.starts_at.map(timestamp),
        ends_at: alert.ends_at.map(timestamp),
        generator_url: alert.generator_url,
        timestamp: alert.timestamp.map(timestamp),
    }
}

fn timer(timer: TimerMetadata) -> pb::TimerMetadata {
    pb::TimerMetadata {
        version: timer.version,
        created_by: timer.created_by,
        reset_count: timer.reset_count,
        last_reset_at: timer.last_reset_at.map(timestamp),
        lock_id: timer.lock_id,
    }
}
