//! The gRPC port as bytes: connections, TLS, and who waits for whom. What the bytes say is
//! known to [`grpc`](crate::grpc).
//!
//! | module | what is in it |
//! |---|---|
//! | [`listener`] | accepts connections, and ends those that are too old, too slow or too many |
//! | [`tls`] | handshakes, and certificates that are exchanged |
//! | [`write_coalescing`] | what a connection writes in one turn leaves together |
//! | [`call_executor`] | the tasks of calls, in the order in which they came |
//! | [`accept`] | what both ports do about too many connections |

pub mod accept;
pub mod call_executor;
pub mod listener;
pub mod tls;
pub mod write_coalescing;
