//! What Redis says of itself, in its answer to `INFO`.

use std::{collections::HashMap, time::Duration};

/// What Redis says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// Another one after every start of a server; of a cluster those of all its
    /// primaries.
    pub run_id: String,
    /// Whether it throws keys away when its memory is full: the first policy
    /// other than `noeviction`, if there is one.
    pub maxmemory_policy: String,
    /// How long its process has been there, at most. None where it does not say.
    pub uptime: Option<Duration>,
    /// Whether it is no replica; of a cluster, whether none is.
    pub is_primary: bool,
}

// === impl ServerInfo ===

impl ServerInfo {
    /// The `run_id` in the reply to `INFO`.
    pub fn run_id(info: &str) -> Option<&str> {
        let mut lines = info.lines();
        lines.find_map(|line| line.trim().strip_prefix("run_id:"))
    }

    /// From the reply to `INFO`.
    pub fn parse(info: &str) -> Option<Self> {
        let fields: HashMap<&str, &str> = info
            .lines()
            .filter_map(|line| line.trim().split_once(':'))
            .collect();
        let number = |name| fields.get(name)?.parse::<u64>().ok();
        // Whole seconds were begun since, the first and this one in part.
        let of_this_second = number("server_time_usec").map_or(999_999, |time| time % 1_000_000);
        let uptime = number("uptime_in_seconds")
            .map(|seconds| Duration::from_secs(seconds) + Duration::from_micros(of_this_second));
        Some(Self {
            run_id: (*fields.get("run_id")?).to_owned(),
            maxmemory_policy: fields
                .get("maxmemory_policy")
                .copied()
                .unwrap_or_default()
                .to_owned(),
            uptime,
            is_primary: fields.get("role") == Some(&"master"),
        })
    }

    /// Whether it throws keys away when its memory is full.
    pub fn may_evict(&self) -> bool {
        !self.maxmemory_policy.is_empty() && self.maxmemory_policy != "noeviction"
    }

    /// Of several servers as one, whatever their order.
    pub fn join(mut servers: Vec<Self>) -> Self {
        servers.sort_by(|a, b| a.run_id.cmp(&b.run_id));
        let run_ids: Vec<_> = servers
            .iter()
            .map(|server| server.run_id.as_str())
            .collect();
        let policies = servers
            .iter()
            .map(|server| server.maxmemory_policy.as_str());
        let worst = policies.max_by_key(|policy| *policy != "noeviction");
        Self {
            run_id: run_ids.join(","),
            maxmemory_policy: worst.unwrap_or_default().to_owned(),
            uptime: None,
            is_primary: servers.iter().all(|server| server.is_primary),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_servers_are_one_whatever_their_order() {
        let server = |run_id: &str, policy: &str| {
            let info = format!(
                "# Server\r\nrun_id:{run_id}\r\nmaxmemory_policy:{policy}\r\nrole:master\r\nuptime_in_seconds:5\r\n"
            );
            ServerInfo::parse(&info).unwrap()
        };
        let (a, b) = (server("a", "noeviction"), server("b", "allkeys-lru"));
        let joined = ServerInfo::join(vec![b.clone(), a.clone()]);
        assert_eq!(joined, ServerInfo::join(vec![a.clone(), b]));
        assert_eq!(joined.run_id, "a,b");
        assert_eq!(joined.maxmemory_policy, "allkeys-lru");
        let one = ServerInfo::join(vec![a.clone()]);
        assert_eq!(
            (one.run_id, a.uptime),
            (a.run_id, Some(Duration::from_micros(5_999_999)))
        );
        let info = "run_id:a\r\nserver_time_usec:1700000000200000\r\nuptime_in_seconds:5\r\n";
        let uptime = ServerInfo::parse(info).unwrap().uptime;
        assert_eq!(uptime, Some(Duration::from_millis(5_200)));
        assert_eq!(ServerInfo::parse("nothing"), None);
    }
}
