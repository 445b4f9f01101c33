//! The servers that hold groups, as they said they are at one moment.

use std::sync::Arc;

use super::{
    server_info::ServerInfo,
    topology::{Node, Topology},
};
use crate::{domain::group::GroupKey, store::memory::Keys};

/// What the servers say of themselves: the only one, or the primaries of a cluster.
pub struct Primaries {
    pub topology: Arc<Topology>,
    /// In the order of [`Topology::nodes`].
    pub infos: Vec<ServerInfo>,
    /// What every key of ours begins with.
    pub key_prefix: String,
}

/// The keys that one server holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    key_prefix: String,
    /// First and last slot of each range.
    slots: Arc<[(u16, u16)]>,
}

// === impl Primaries ===

impl Primaries {
    /// The server that holds a key.
    pub fn of(&self, key: &GroupKey) -> Option<&ServerInfo> {
        let node = self.node_of(key)?;
        let at = self.topology.nodes().iter().position(|it| it == node)?;
        self.infos.get(at)
    }

    /// The keys of the server that holds a key.
    pub fn shard_of(&self, key: &GroupKey) -> Option<Shard> {
        let node = self.node_of(key)?;
        Some(Shard::of(&self.topology, node, &self.key_prefix))
    }

    /// Whether one of them is this process.
    pub fn has_process(&self, run_id: &str) -> bool {
        self.infos.iter().any(|info| info.run_id == run_id)
    }

    /// All of them as one.
    pub fn as_one(&self) -> ServerInfo {
        ServerInfo::join(self.infos.clone())
    }

    fn node_of(&self, key: &GroupKey) -> Option<&Node> {
        self.topology.node_of(&format!("{}{key}", self.key_prefix))
    }
}

// === impl Shard ===

impl Shard {
    pub fn of(topology: &Topology, node: &Node, key_prefix: &str) -> Self {
        Self {
            key_prefix: key_prefix.to_owned(),
            slots: topology.slots_of(node).into(),
        }
    }

    /// Tells its keys from others; None: it holds all keys.
    pub fn keys(&self) -> Option<Keys> {
        if Topology::are_all_slots(&self.slots) {
            return None;
        }
        let shard = self.clone();
        Some(Arc::new(move |key| {
            Topology::has_slot_of(&shard.slots, &format!("{}{key}", shard.key_prefix))
        }))
    }
}

#[cfg(test)]
mod tests {
    use fred::types::config::Server;

    use super::*;

    #[test]
    fn a_shard_knows_its_keys() {
        let node = |port| Node::Primary(Server::new("127.0.0.1", port));
        let topology = Topology::of_ranges(vec![
            (0, 8_191, node(7_001)),
            (8_192, 12_000, node(7_002)),
            (12_001, 16_383, node(7_001)),
        ]);
        let info =
            |run_id: &str| ServerInfo::parse(&format!("run_id:{run_id}\nrole:master\n")).unwrap();
        let primaries = Primaries {
            topology: Arc::new(topology),
            infos: vec![info("one"), info("two")],
            key_prefix: "x:".into(),
        };
        let key = |n: usize| GroupKey::new(format!("k{n}")).unwrap();
        let on = |run_id: &str| {
            let mut keys = (0..100).map(key);
            keys.find(|key| primaries.of(key).unwrap().run_id == run_id)
                .unwrap()
        };
        let (one, two) = (on("one"), on("two"));
        let holds = primaries.shard_of(&one).unwrap().keys().unwrap();
        assert!(holds(&one) && !holds(&two));
        assert!(primaries.has_process("one") && !primaries.has_process("three"));
        assert_ne!(primaries.shard_of(&one), primaries.shard_of(&two));
        let only = Shard::of(&Topology::single(), &Node::Only, "x:");
        assert!(only.keys().is_none());
    }
}
