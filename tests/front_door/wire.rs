//! HTTP/2 as bytes, for clients that do what no library lets them do.

use std::io;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A connection on which anything may be sent.
pub struct Wire {
    pub tcp: TcpStream,
}

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// The setting of the window of new streams.
const INITIAL_WINDOW_SIZE: u16 = 4;

// === impl Wire ===

impl Wire {
    /// Connects and begins HTTP/2, with settings of the default.
    pub async fn connect(addr: &str) -> io::Result<Self> {
        let mut wire = Self {
            tcp: TcpStream::connect(addr).await?,
        };
        wire.send(PREFACE).await?;
        wire.send(&frame(SETTINGS, 0, 0, &[])).await?;
        Ok(wire)
    }

    /// The same, and takes no byte of any reply.
    pub async fn connect_and_read_nothing(addr: &str) -> io::Result<Self> {
        let mut wire = Self {
            tcp: TcpStream::connect(addr).await?,
        };
        let mut window = INITIAL_WINDOW_SIZE.to_be_bytes().to_vec();
        window.extend(0_u32.to_be_bytes());
        wire.send(PREFACE).await?;
        wire.send(&frame(SETTINGS, 0, 0, &window)).await?;
        Ok(wire)
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tcp.write_all(bytes).await
    }

    /// Reads frames until one is looked for; returns its type and its stream. None: the
    /// server has closed.
    pub async fn frames_until(
        &mut self,
        mut looked_for: impl FnMut(u8, u32) -> bool,
    ) -> Option<(u8, u32)> {
        loop {
            let mut head = [0; 9];
            self.tcp.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.tcp.read_exact(&mut payload).await.ok()?;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            if looked_for(head[3], stream) {
                return Some((head[3], stream));
            }
        }
    }

    /// Throws away what the server says, until it closes.
    pub async fn drain(self) {
        let mut tcp = self.tcp;
        let mut buffer = [0; 16_384];
        while tcp.read(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {}
    }
}

/// The address of a way to `addr`, for one connection, on which the end of a connection is
/// not heard of: its GOAWAYs get lost, and the PINGs with which a server makes sure of them.
pub async fn deaf_to_the_end(addr: &str) -> String {
    let addr = addr.to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let way = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await?;
        drop(listener);
        let (mut from_client, to_client) = client.into_split();
        let (from_server, mut to_server) = TcpStream::connect(addr).await?.into_split();
        let mut preface = [0; PREFACE.len()];
        from_client.read_exact(&mut preface).await?;
        to_server.write_all(&preface).await?;
        // When one of them has closed, both are.
        tokio::select! {
            ended = pass_on(from_client, to_server, |_| true) => ended,
            ended = pass_on(from_server, to_client, |kind| kind != GOAWAY && kind != PING) => ended,
        }
    });
    way
}

/// Passes on the frames of these types.
async fn pass_on(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    passes: impl Fn(u8) -> bool,
) -> io::Result<()> {
    loop {
        let mut frame = vec![0; 9];
        from.read_exact(&mut frame).await?;
        let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]);
        frame.resize(9 + length as usize, 0);
        from.read_exact(&mut frame[9..]).await?;
        if passes(frame[3]) {
            to.write_all(&frame).await?;
        }
    }
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The headers of a call, as HPACK: nothing is indexed but the names that are.
pub fn headers(path: &str) -> Vec<u8> {
    // :method POST, :scheme http
    let mut block = vec![0x83, 0x86];
    let mut text = |begin: &[u8], text: &str| {
        block.extend(begin);
        block.push(u8::try_from(text.len()).unwrap());
        block.extend(text.bytes());
    };
    text(&[0x04], path);
    text(&[0x01], "localhost");
    text(&[0x0f, 0x10], "application/grpc");
    text(&[0x00], "te");
    text(&[], "trailers");
    block
}
