//! A request over HTTP/1.1, as small as the admin port needs it: a library would
//! bring more than these lines.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::stalls::within;

/// What a server answered.
#[derive(Debug)]
pub struct HttpReply {
    /// Such as 200.
    pub status: u16,
    /// Empty if there is none.
    pub content_type: String,
    pub body: String,
}

/// Gets `path` from `addr` (`host:port`), at most within `bound`.
pub async fn get(addr: &str, path: &str, bound: Duration) -> io::Result<HttpReply> {
    send(addr, "GET", path, "", bound).await
}

/// Sends a request to `addr` and waits for the answer, at most for `bound`.
pub async fn send(
    addr: &str,
    method: &str,
    path: &str,
    body: &str,
    bound: Duration,
) -> io::Result<HttpReply> {
    let exchange = async {
        let mut connection = TcpStream::connect(addr).await?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        connection.write_all(request.as_bytes()).await?;
        let mut reply = Vec::new();
        connection.read_to_end(&mut reply).await?;
        parse(&String::from_utf8_lossy(&reply)).ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    let late = Err(io::ErrorKind::TimedOut.into());
    within(bound, exchange).await.unwrap_or(late)
}

fn parse(reply: &str) -> Option<HttpReply> {
    let (head, body) = reply.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let header = |name: &str| {
        let lines = head.lines().filter_map(|line| line.split_once(": "));
        let mut named = lines.filter(|(found, _)| found.eq_ignore_ascii_case(name));
        named.next().map_or("", |(_, value)| value)
    };
    let chunked = header("transfer-encoding") == "chunked";
    let body = if chunked {
        joined(body)?
    } else {
        body.to_owned()
    };
    Some(HttpReply {
        status,
        content_type: header("content-type").to_owned(),
        body,
    })
}

/// Puts the chunks of a body together; None when the last one is missing.
fn joined(mut chunks: &str) -> Option<String> {
    let mut body = String::new();
    loop {
        let (size, rest) = chunks.split_once("\r\n")?;
        let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body += rest.get(..size)?;
        chunks = rest.get(size + 2..)?;
    }
}
