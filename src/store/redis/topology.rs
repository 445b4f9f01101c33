//! Which Redis server holds which keys.

use std::fmt;

use fred::{
    types::{cluster::ClusterRouting, config::Server},
    util::redis_keyslot,
};

/// A server that holds groups: the only one, or a primary of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// The one that is connected.
    Only,
    Primary(Server),
}

/// A key in Redis, and the server that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub key: String,
    pub node: Node,
    /// Whether that server is about to get the key's slot, and has to be told
    /// that this is known (`ASKING`).
    pub is_arriving: bool,
}

/// What a server of a cluster says of its own slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// First and last slot of each range, in order.
    pub slots: Vec<(u16, u16)>,
    /// Whether one of them is on its way to another server, or comes from there.
    pub is_moving: bool,
}

/// The servers that hold groups, and the slots of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// First and last slot of each range, in order.
    ranges: Vec<(u16, u16, Node)>,
}

const LAST_SLOT: u16 = 16_383;

// === impl Node ===

impl Node {
    /// The address of a primary; None for the only server.
    pub fn address(&self) -> Option<&Server> {
        match self {
            Self::Only => None,
            Self::Primary(server) => Some(server),
        }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Only => f.write_str("Redis"),
            Self::Primary(server) => server.fmt(f),
        }
    }
}

// === impl Share ===

impl Share {
    /// By the server's own line in what it answered to `CLUSTER NODES`.
    pub fn parse(cluster_nodes: &str) -> Option<Self> {
        let mut lines = cluster_nodes.lines();
        let own = lines.find(|line| line.contains("myself"))?;
        // id, address, flags, primary, two times, epoch, state; then the slots.
        let (moving, slots): (Vec<&str>, Vec<&str>) = own
            .split_whitespace()
            .skip(8)
            .partition(|word| word.starts_with('['));
        let slots = slots.into_iter().map(|word| {
            let (first, last) = word.split_once('-').unwrap_or((word, word));
            Some((first.parse().ok()?, last.parse().ok()?))
        });
        Some(Self {
            slots: joined(slots.collect::<Option<_>>()?),
            is_moving: !moving.is_empty(),
        })
    }
}

/// The same slots in as few ranges as there can be, in order.
fn joined(mut slots: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    slots.sort_unstable();
    let mut joined: Vec<(u16, u16)> = Vec::with_capacity(slots.len());
    for (first, last) in slots {
        match joined.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => joined.push((first, last)),
        }
    }
    joined
}

// === impl Topology ===

impl Topology {
    /// Hash tags that are tried to find a key on a server: among so many one
    /// misses a server that has 1 % of the slots in one of 10^8 cases.
    const MOST_TAGS: u32 = 2_000;

    /// Why a key has no place.
    pub const NO_SERVER: &str = "no server of the cluster has its slot";

    /// One server that holds everything.
    pub fn single() -> Self {
        Self {
            ranges: vec![(0, LAST_SLOT, Node::Only)],
        }
    }

    /// What `CLUSTER SLOTS` has told fred.
    pub fn of_cluster(routing: &ClusterRouting) -> Self {
        let ranges = routing.slots().iter();
        let mut ranges: Vec<_> = ranges
            .map(|range| (range.start, range.end, Node::Primary(range.primary.clone())))
            .collect();
        ranges.sort();
        Self { ranges }
    }

    #[cfg(test)]
    pub fn of_ranges(ranges: Vec<(u16, u16, Node)>) -> Self {
        Self { ranges }
    }

    /// First and last slot of each range that a server holds, in order.
    pub fn slots_of(&self, node: &Node) -> Vec<(u16, u16)> {
        let ranges = self.ranges.iter().filter(|(_, _, of)| of == node);
        joined(ranges.map(|(first, last, _)| (*first, *last)).collect())
    }

    /// Whether these are the slots of everything.
    pub fn are_all_slots(slots: &[(u16, u16)]) -> bool {
        slots == [(0, LAST_SLOT)]
    }

    /// Whether one of these is the slot of a key.
    pub fn has_slot_of(slots: &[(u16, u16)], key: &str) -> bool {
        let slot = redis_keyslot(key.as_bytes());
        slots
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&slot))
    }

    /// Every server once, in order; none while a cluster has not been found.
    pub fn nodes(&self) -> Vec<Node> {
        let mut nodes: Vec<_> = self
            .ranges
            .iter()
            .map(|(_, _, node)| node.clone())
            .collect();
        nodes.sort();
        nodes.dedup();
        nodes
    }

    /// The server that holds a key; None if no server has its slot.
    pub fn node_of(&self, key: &str) -> Option<&Node> {
        if let [(0, LAST_SLOT, node)] = &self.ranges[..] {
            return Some(node);
        }
        let slot = redis_keyslot(key.as_bytes());
        let at = self.ranges.partition_point(|(_, last, _)| *last < slot);
        let (first, _, node) = self.ranges.get(at)?;
        (*first <= slot).then_some(node)
    }

    /// Where a key lives, as far as is known; None if no server has its slot.
    pub fn place(&self, key: String) -> Option<Place> {
        Some(Place {
            node: self.node_of(&key)?.clone(),
            key,
            is_arriving: false,
        })
    }

    /// Where a server sends the slot of `key` to, if it does: by its own line in
    /// what it answered to `CLUSTER NODES`.
    pub fn destination(&self, key: &str, cluster_nodes: &str) -> Option<Node> {
        let slot = redis_keyslot(key.as_bytes());
        let sent = format!("[{slot}->-");
        let mut lines = cluster_nodes.lines();
        let own = lines.find(|line| line.contains("myself"))?;
        let id = own
            .split(' ')
            .find_map(|word| word.strip_prefix(&sent)?.strip_suffix(']'))?;
        let mut lines = cluster_nodes.lines();
        let words = lines.find_map(|line| line.strip_prefix(id)?.strip_prefix(' '))?;
        // ip:port@bus,hostname
        let address = words.split(['@', ' ']).next()?;
        let nodes = self.nodes();
        nodes.into_iter().find(|node| node.to_string() == address)
    }

    /// Endings of `key`, one for each server, with which it comes to lie there.
    /// A server of which none is found is left out: `key` has a hash tag, and
    /// that server holds no key like it.
    pub fn endings(&self, key: &str) -> Vec<String> {
        self.nodes()
            .iter()
            .filter_map(|node| self.ending(key, node))
            .collect()
    }

    fn ending(&self, key: &str, node: &Node) -> Option<String> {
        let leads_there = |ending: &String| self.node_of(&format!("{key}{ending}")) == Some(node);
        let tags = (0..Self::MOST_TAGS).map(|tag| format!("{{{tag}}}"));
        std::iter::once(String::new()).chain(tags).find(leads_there)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn primary(port: u16) -> Node {
        Node::Primary(Server::new("127.0.0.1", port))
    }

    /// As three primaries usually share the slots, the last one in two parts.
    fn three() -> Topology {
        Topology {
            ranges: vec![
                (0, 5_460, primary(7_001)),
                (5_461, 10_922, primary(7_002)),
                (10_923, 16_000, primary(7_003)),
                (16_001, 16_383, primary(7_003)),
            ],
        }
    }

    #[test]
    fn a_key_lies_on_the_server_that_has_its_slot() {
        // `CLUSTER KEYSLOT` says 12182 and 5061.
        for (key, port) in [("foo", 7_003), ("bar", 7_001), ("x{bar}y", 7_001)] {
            assert_eq!(three().node_of(key), Some(&primary(port)), "{key}");
            assert_eq!(Topology::single().node_of(key), Some(&Node::Only));
        }
        assert_eq!(Topology::default().node_of("foo"), None);
    }

    #[test]
    fn every_server_is_named_once() {
        let all = [primary(7_001), primary(7_002), primary(7_003)];
        assert_eq!(three().nodes(), all);
        assert_eq!(Topology::single().nodes(), [Node::Only]);
        assert_eq!(Topology::default().nodes(), []);
    }

    #[test]
    fn a_server_says_where_it_sends_a_slot() {
        let nodes = "aa1 127.0.0.1:7001@17001 myself,master - 0 0 1 connected 0-5460 [5061->-bb2]\n\
                     bb2 127.0.0.1:7002@17002,host-2 master - 0 1 2 connected 5461-10922\n\
                     cc3 127.0.0.1:7003@17003 master - 0 1 3 connected 10923-16383\n";
        assert_eq!(three().destination("bar", nodes), Some(primary(7_002)));
        assert_eq!(three().destination("foo", nodes), None);
        assert_eq!(three().destination("bar", ""), None);
    }

    #[test]
    fn a_server_says_which_slots_it_has() {
        let share = |slots: &str| {
            let line = format!("aa1 127.0.0.1:7001@17001 myself,master - 0 0 1 connected {slots}");
            Share::parse(&format!(
                "{line}\nbb2 127.0.0.1:7002@17002 master - 0 1 2 connected 7\n"
            ))
        };
        let of = |slots: &[(u16, u16)], is_moving| {
            let slots = slots.to_vec();
            Some(Share { slots, is_moving })
        };
        assert_eq!(share("0-5 9 6-7"), of(&[(0, 7), (9, 9)], false));
        assert_eq!(share("0-5 [5->-bb2]"), of(&[(0, 5)], true));
        assert_eq!(share("[7-<-bb2]"), of(&[], true));
        assert_eq!(share(""), of(&[], false));
        assert_eq!(share("x-y"), None);
        assert_eq!(Share::parse(""), None);
        assert_eq!(three().slots_of(&primary(7_003)), [(10_923, 16_383)]);
    }

    #[test]
    fn an_ending_leads_to_each_server() {
        let key = "group:\u{1}probe:x";
        let endings = three().endings(key);
        let keys = endings.iter().map(|ending| format!("{key}{ending}"));
        let nodes: Vec<_> = keys.map(|key| three().node_of(&key).cloned()).collect();
        let all = [7_001, 7_002, 7_003].map(|port| Some(primary(port)));
        assert_eq!(nodes, all);
        assert_eq!(Topology::single().endings(key), [""]);
        assert_eq!(Topology::default().endings(key), [""; 0]);
    }

    #[test]
    fn a_key_with_a_tag_of_its_own_leads_to_one_server() {
        assert_eq!(three().endings("{groups}:\u{1}probe:x"), [""]);
    }
}
