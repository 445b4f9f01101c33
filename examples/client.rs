//! What a replica does with groups, told as a story. Start the service, then:
//!
//! ```text
//! cargo run --example client -- localhost:50051
//! ```
//!
//! It takes several `HOST:PORT`, too. For a whole replica see
//! `alert_history_replica.rs`; for calls without the manager, the generated client is
//! [`groupstate::grpc::proto::group_state_service_client`].

use std::{error::Error, sync::Arc, time::Duration};

use futures::future::try_join_all;
use groupstate::{
    domain::group::{Alert, AlertStatus, Time, TimeError},
    manager::{
        AlertGroupManager, ManagerSettings, affinity::Instances, group_keys::GroupKeys,
        known::Filter, remote::RemoteSettings,
    },
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let targets: Vec<_> = std::env::args().skip(1).collect();
    // Each key is served by one of the instances.
    let instances = Instances::resolve(targets, RemoteSettings::default()).await?;
    let manager = AlertGroupManager::new(Arc::new(instances), ManagerSettings::default());
    let group_by = ["alertname", "cluster"].map(str::to_owned);
    let labels = alert("disk-0", AlertStatus::Firing, 0)?.labels;
    let key = GroupKeys::new().key(&labels, &group_by);
    println!("key: {key}");

    // Ten replicas, one group, the same moment: no alert is lost.
    let replicas = (0..10).map(async |n| {
        let report = alert(&format!("disk-{n}"), AlertStatus::Firing, 10)?;
        let changed = manager.add_alerts(&key, group_by.to_vec(), vec![report]);
        Ok::<_, Box<dyn Error>>(changed.await?.attempts)
    });
    try_join_all(replicas).await?;

    // A later report of one of them, and an earlier one that is applied late.
    for report in [
        alert("disk-1", AlertStatus::Resolved, 1)?,
        alert("disk-1", AlertStatus::Firing, 5)?,
    ] {
        manager
            .add_alerts(&key, group_by.to_vec(), vec![report])
            .await?;
    }
    let found = manager
        .get(&key)
        .await?
        .ok_or("it was stored a moment ago")?;
    let metadata = found.group.metadata;
    println!("alerts: {}", found.group.alerts.len());
    println!(
        "firing: {} resolved: {}",
        metadata.firing_count, metadata.resolved_count
    );
    println!("state: {:?}", metadata.state);

    // After a restart: a manager that knows nothing yet reads all groups.
    let restored = manager.restore().await?;
    for problem in &restored.problems {
        println!("cannot be read: {} {}", problem.key, problem.error);
    }
    if !restored.complete {
        println!("Redis is down: there may be more");
    }
    let recent = Filter {
        max_age: Some(Duration::from_secs(60)),
        min_alerts: 10,
        ..Filter::default()
    };
    println!("recent: {}", manager.list(&recent).len());

    // The last alert takes the group with it.
    for n in 0..10 {
        manager.remove_alert(&key, &format!("disk-{n}")).await?;
    }
    println!("gone: {}", manager.get(&key).await?.is_none());
    Ok(())
}

/// A report of an alert, received so many minutes ago.
fn alert(fingerprint: &str, status: AlertStatus, minutes_ago: i64) -> Result<Alert, TimeError> {
    let now = Time::now().seconds();
    let labels = [
        ("alertname", "DiskFull"),
        ("cluster", "rust"),
        ("disk", fingerprint),
    ];
    Ok(Alert {
        fingerprint: fingerprint.to_owned(),
        alert_name: "DiskFull".to_owned(),
        status,
        labels: labels
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        starts_at: Some(Time::from_parts(now - 3_600, 0)?),
        timestamp: Some(Time::from_parts(now - 60 * minutes_ago, 0)?),
        ..Alert::default()
    })
}
