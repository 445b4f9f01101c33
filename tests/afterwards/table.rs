//! `make afterwards`: what each failure leaves, as tables.

use std::time::Duration;

use crate::{
    alone,
    common::{
        condition::{Condition, Rpc},
        replicated::Kind,
    },
    replicated, rotation,
    scene::{Report, Row},
};

/// Enough for medians that can be compared.
const ROUNDS: usize = 100;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make afterwards"]
async fn of_everything() {
    let alone = alone::silent(ROUNDS)
        .await
        .join(alone::refusing(ROUNDS).await)
        .join(alone::gone(ROUNDS).await)
        .join(alone::disconnected(ROUNDS).await)
        .join(alone::out_of_reach(ROUNDS).await)
        .join(rotation::password(ROUNDS).await)
        .join(rotation::certificates(ROUNDS).await);
    print("one Redis", &alone);
    let mut all = alone;
    for kind in [Kind::Sentinel, Kind::Cluster] {
        let outages = replicated::outages(kind, ROUNDS).await;
        let report = outages.join(replicated::failovers(kind, ROUNDS).await);
        print(&kind.to_string(), &report);
        all = all.join(report);
    }
    all.assert();
}

/// Medians before and after in milliseconds, then what the instance takes.
fn print(place: &str, report: &Report) {
    let names: Vec<String> = Rpc::ALL.iter().map(ToString::to_string).collect();
    println!("\n### {place}: median before → after, in ms\n");
    println!("| after | {} |", names.join(" | "));
    println!("|---|{}", "---|".repeat(names.len()));
    for row in &report.rows {
        println!("| {} | {} |", row.failure, medians(row).join(" | "));
    }
    println!("\n### {place}: what the instance takes while idle, before → after\n");
    println!(
        "| after | CPU, % | memory, MiB | threads | tasks | open files | connections to Redis |"
    );
    println!("|---|---|---|---|---|---|---|");
    for row in &report.rows {
        println!("| {} | {} |", row.failure, needs(row).join(" | "));
    }
}

fn medians(row: &Row) -> Vec<String> {
    let medians = Rpc::ALL.map(|rpc| both(row, |condition| millis(condition.rpcs[&rpc].median)));
    medians.to_vec()
}

fn needs(row: &Row) -> Vec<String> {
    let mib = |bytes: usize| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    vec![
        both(row, |now| format!("{:.1}", now.needs.cpu * 100.0)),
        both(row, |now| mib(now.needs.resident_bytes)),
        both(row, |now| now.needs.threads.to_string()),
        both(row, |now| now.needs.tasks.to_string()),
        both(row, |now| now.needs.descriptors.to_string()),
        both(row, |now| {
            now.needs.connections.iter().sum::<usize>().to_string()
        }),
    ]
}

fn both(row: &Row, told: impl Fn(&Condition) -> String) -> String {
    let after = row.after.as_ref().map_or_else(|| "-".to_owned(), &told);
    format!("{} → {after}", told(&row.before))
}

fn millis(duration: Duration) -> String {
    format!("{:.2}", duration.as_secs_f64() * 1_000.0)
}
