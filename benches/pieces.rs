//! How long the pieces of a call take, each by itself: `cargo bench --bench pieces`;
//! with a part of a name behind `--`, only those.

#[path = "../tests/common/mod.rs"]
mod common;
mod load;
#[path = "pieces/mod.rs"]
mod pieces;

use criterion::Criterion;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for mut piece in pieces::all() {
        criterion.bench_function(&piece.name, |bencher| bencher.iter(&mut piece.work));
    }
    criterion.final_summary();
}
