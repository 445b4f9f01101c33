//! What a call passes on its way in, in this order:
//!
//! | module | what it does |
//! |---|---|
//! | [`envelope`] | leads the call through all of them; load shedding, panics |
//! | [`head`] | method, path, content type, size of the metadata |
//! | [`call`] | the request id, the deadline, and what is counted of the call |
//! | [`authentication`] | who may call |
//! | `request_body` | receives the request whole |
//! | `decoded_size` | what the request will take once it is decoded |
//! | [`slow_clients`] | what waits for slow clients, and the bound on it |

pub mod authentication;
pub mod call;
mod decoded_size;
pub mod envelope;
pub mod head;
pub(super) mod request_body;
pub mod slow_clients;
