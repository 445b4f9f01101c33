//! What was measured, as a table and a picture in `benches/results/`, with what it
//! was measured on, so that the next change can be compared.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use plotters::prelude::*;

use super::{
    LOADS, ROUNDS, SIZES,
    plain::{CLIENTS, Plain},
    sample::{Load, ROUND, Summary},
};

/// Calls in flight for which there are goals.
const IN_FLIGHT: usize = 64;
const TARGETS: [(&str, f64); 3] = [("Load", 0.85), ("Store", 0.70), ("CompareAndSwap", 0.70)];

/// All rows of a run.
#[derive(Default)]
pub struct Report {
    pub rows: Vec<Row>,
    /// With values of the first size.
    pub plain: Plain,
}

/// One call under one load: ours first, then the pass-through, then others.
pub struct Row {
    pub case: &'static str,
    pub alerts: usize,
    pub load: Load,
    pub sides: Vec<(&'static str, Summary)>,
}

impl Row {
    /// Ours in parts of the pass-through.
    pub fn ratio(&self) -> f64 {
        self.sides[0].1.calls_per_second / self.sides[1].1.calls_per_second
    }

    /// A line for each side.
    pub fn markdown(&self) -> String {
        let reference = self.sides[1].1;
        let line = |(name, summary): &(&str, Summary)| {
            format!(
                "| {} | {} | {} | {name} | {:.0} | {:.2} | {:.0} | {:.2} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} | {:.0} |",
                self.case,
                self.alerts,
                self.load.in_flight(),
                summary.calls_per_second,
                summary.calls_per_second / reference.calls_per_second,
                micros(summary.p50),
                micros(summary.p50) / micros(reference.p50),
                micros(summary.p99),
                micros(summary.p99) / micros(reference.p99),
                summary.server_cpu,
                summary.server_cpu / reference.server_cpu,
                summary.redis_cpu,
                summary.server_rss as f64 / (1 << 20) as f64,
            )
        };
        self.sides.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

impl Report {
    /// Writes the table and the picture.
    pub fn write(&self) {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/results");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("wire.md"), self.markdown()).unwrap();
        self.plot(&folder.join("wire.svg"));
        println!("\nwritten to {}", folder.join("wire.md").display());
    }

    fn markdown(&self) -> String {
        let mut text = format!(
            "# What calls cost beside the pass-through\n\n\
             By `make bench`; see [`benches/wire/main.rs`](../wire/main.rs) for what is compared with what.\n\
             Median of {ROUNDS} rounds of {ROUND:?} by throughput; processor time over all of them. \
             × is in parts of the pass-through in the same row group.\n\n\
             {}\n\n\
             | call | alerts | in flight | server | calls/s | × | p50 µs | × | p99 µs | × \
             | server CPU s / 100,000 calls | × | Redis CPU s / 100,000 | server RSS MiB |\n\
             |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
            machine()
        );
        for row in &self.rows {
            text += &row.markdown();
            text += "\n";
        }
        text + &self.beside_plain()
    }

    /// Our throughput beside that of Redis by itself.
    fn beside_plain(&self) -> String {
        let ours = |case| {
            let mut rows = self.rows.iter();
            let row = rows.find(|row| {
                row.case == case && row.alerts == SIZES[0] && row.load.in_flight() == IN_FLIGHT
            });
            row.expect("it is among the cases").sides[0]
                .1
                .calls_per_second
        };
        let Plain { set, get } = self.plain;
        format!(
            "\nPlain Redis by redis-benchmark with {CLIENTS} clients does {set:.0} SET/s and {get:.0} GET/s of values of {} alerts: \
             `Store` at {IN_FLIGHT} in flight is {:.2} of the one, `Load` {:.2} of the other.\n",
            SIZES[0],
            ours("Store") / set,
            ours("Load") / get,
        )
    }

    /// Our throughput in parts of the pass-through, by calls in flight: a line for
    /// each call with groups of the first size.
    fn plot(&self, path: &Path) {
        let root = SVGBackend::new(path, (640, 400)).into_drawing_area();
        root.fill(&WHITE).unwrap();
        let mut chart = ChartBuilder::on(&root)
            .caption(format!("groups of {} alerts", SIZES[0]), ("sans-serif", 18))
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..(LOADS.len() - 1) as f64, 0.0..1.2)
            .unwrap();
        chart
            .configure_mesh()
            .x_desc("calls in flight")
            .y_desc("calls/s, in parts of the pass-through")
            .x_labels(LOADS.len())
            .x_label_formatter(&|at| {
                let load = LOADS.get(at.round() as usize);
                load.map_or(String::new(), |load| load.in_flight().to_string())
            })
            .draw()
            .unwrap();
        for (at, (case, target)) in TARGETS.into_iter().enumerate() {
            let color = Palette99::pick(at).to_rgba();
            let rows = self.rows.iter();
            let rows = rows.filter(|row| row.case == case && row.alerts == SIZES[0]);
            let points = rows.enumerate().map(|(at, row)| (at as f64, row.ratio()));
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))
                .unwrap()
                .label(format!("{case} (goal at 64: {target})"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
        }
        chart
            .configure_series_labels()
            .border_style(BLACK)
            .background_style(WHITE)
            .draw()
            .unwrap();
        root.present().unwrap();
    }
}

/// What it ran on.
fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let first_line = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        let output = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let output = output.unwrap_or_default();
        output.lines().next().unwrap_or("unknown").to_owned()
    };
    format!(
        "{model}, {cores} cores, Linux {}; {}; commit {}.",
        first_line("uname", &["-r"]),
        first_line("redis-server", &["--version"]),
        first_line("git", &["describe", "--always", "--dirty"]),
    )
}
