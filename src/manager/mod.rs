pub mod group_keys;
mod hash;
pub mod remote;
