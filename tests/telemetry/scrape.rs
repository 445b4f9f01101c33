//! A scrape of `/metrics`, as Prometheus reads it.

use std::{collections::BTreeMap, time::Duration};

use crate::common::{http, service::Service};

const PREFIX: &str = "alert_history_business_grouping_";

/// The series of a scrape, without the prefix of their names and with sorted
/// labels, and their values.
pub struct Scrape {
    pub text: String,
    series: BTreeMap<String, f64>,
}

impl Scrape {
    pub async fn of(service: &Service) -> Self {
        let reply = http::get(service.http_addr(), "/metrics", Duration::from_secs(2)).await;
        let reply = reply.unwrap();
        assert_eq!(reply.status, 200);
        assert_eq!(
            reply.content_type,
            "text/plain; version=0.0.4; charset=utf-8"
        );
        Self::parse(reply.body)
    }

    pub fn parse(text: String) -> Self {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let series = lines.map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let series = series
                .strip_prefix(PREFIX)
                .unwrap_or_else(|| panic!("{series} lacks the prefix"));
            (sorted(series), value.parse().unwrap())
        });
        Self {
            series: series.collect(),
            text,
        }
    }

    /// The value of a series, which must exist.
    #[track_caller]
    pub fn value(&self, series: &str) -> f64 {
        let value = self.series.get(&sorted(series));
        *value.unwrap_or_else(|| panic!("no {series} in {}", self.text))
    }

    pub fn has(&self, series: &str) -> bool {
        self.series.contains_key(&sorted(series))
    }

    /// The series of a metric that are not 0.
    pub fn non_zero(&self, name: &str) -> BTreeMap<String, f64> {
        let series = self.series.iter();
        let series = series
            .filter(|(series, value)| series.split('{').next() == Some(name) && **value != 0.0);
        series
            .map(|(series, value)| (series.clone(), *value))
            .collect()
    }

    /// What `# HELP` or `# TYPE` says of a metric.
    #[track_caller]
    pub fn about(&self, what: &str, name: &str) -> &str {
        let begin = format!("# {what} {PREFIX}{name} ");
        let mut lines = self
            .text
            .lines()
            .filter_map(|line| line.strip_prefix(&begin));
        let told = lines
            .next()
            .unwrap_or_else(|| panic!("no {begin}in {}", self.text));
        assert_eq!(lines.next(), None, "{begin}stands once");
        told
    }

    /// Names of all metrics, as `# TYPE` lines have them.
    pub fn names(&self) -> Vec<&str> {
        let begin = format!("# TYPE {PREFIX}");
        let lines = self
            .text
            .lines()
            .filter_map(|line| line.strip_prefix(&begin));
        let mut names: Vec<_> = lines.map(|line| line.split(' ').next().unwrap()).collect();
        names.sort_unstable();
        names
    }
}

/// A series with its labels in order.
fn sorted(series: &str) -> String {
    let Some((name, labels)) = series.split_once('{') else {
        return series.to_owned();
    };
    let mut labels: Vec<_> = labels.trim_end_matches('}').split(',').collect();
    labels.sort_unstable();
    format!("{name}{{{}}}", labels.join(","))
}
