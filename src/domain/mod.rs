//! The domain: values without I/O, which the service and its clients share.
//!
//! | module | what is in it |
//! |---|---|
//! | [`change`] | what a report, a removal or a silence makes of a group |
//! | [`retention`] | how long alerts stay in a group, and how many there is room for |
//! | [`group`] | a group of alerts, its key, its times |
//! | `merge` | two states of one group in one |
//! | `state` | what the alerts of a group say of it as a whole |
//! | [`document`] | the JSON document of a group |
//! | [`version`] | versions, write ids, the clock of Redis |

pub mod change;
pub mod document;
pub mod group;
mod merge;
pub mod retention;
mod state;
pub mod version;
