//! The thin pass-through: a tonic server whose handlers do one fred GET or SET
//! and nothing else, or nothing at all. It is what a call costs without us.

use std::{
    convert::Infallible,
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Command, Stdio},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use fred::prelude::{Builder, ClientLike, Config, KeysInterface, Pool};
use futures::future::BoxFuture;
use http::Request;
use tokio::net::TcpListener;
use tonic::{Response, Status, transport::server::TcpIncoming};

use super::{Raw, key_of};
use crate::common::Process;

pub const EMPTY: &str = "/thin/Empty";
pub const GET: &str = "/thin/Get";
pub const SET: &str = "/thin/Set";

/// As many connections as the service has by default.
const POOL_SIZE: usize = 2;

/// The first argument of a benchmark that is to be the pass-through.
const ARGUMENT: &str = "pass-through";

/// Is the pass-through, if this process was started to be it.
pub async fn serve_if_asked() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(ARGUMENT) {
        serve(&arguments.next().expect("the URL of Redis")).await;
        std::process::exit(0);
    }
}

/// Starts this program once more, as the pass-through. Returns its address too.
pub fn start(redis: &str) -> (Process, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([ARGUMENT, redis]).stdout(Stdio::piped());
    let mut process = Process::spawn(&mut command, "it is this program");
    let mut addr = String::new();
    let stdout = process.child.stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut addr).unwrap();
    (process, addr.trim().to_owned())
}

pub fn get_request(number: usize) -> Bytes {
    key_of(number).into()
}

/// A key, a line break, and a value of this size.
pub fn set_request(number: usize, bytes: usize) -> Bytes {
    let mut request = key_of(number).into_bytes();
    request.push(b'\n');
    request.resize(request.len() + bytes, b'x');
    request.into()
}

async fn serve(redis: &str) {
    let pool = Builder::from_config(Config::from_url(redis).unwrap())
        .build_pool(POOL_SIZE)
        .unwrap();
    pool.init().await.unwrap();
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .unwrap();
    println!("{}", listener.local_addr().unwrap());
    tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .add_service(Thin {
            pool: Arc::new(pool),
        })
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await
        .unwrap();
}

#[derive(Clone)]
struct Thin {
    pool: Arc<Pool>,
}

/// What one call does.
struct Handler {
    pool: Arc<Pool>,
    path: String,
}

impl tonic::server::NamedService for Thin {
    const NAME: &'static str = "thin";
}

impl tower::Service<Request<tonic::body::Body>> for Thin {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let handler = Handler {
            pool: self.pool.clone(),
            path: request.uri().path().to_owned(),
        };
        Box::pin(async move { Ok(tonic::server::Grpc::new(Raw).unary(handler, request).await) })
    }
}

impl tonic::server::UnaryService<Bytes> for Handler {
    type Response = Bytes;
    type Future = BoxFuture<'static, Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: tonic::Request<Bytes>) -> Self::Future {
        let pool = self.pool.clone();
        let path = self.path.clone();
        Box::pin(async move {
            let request = request.into_inner();
            let reply = match path.as_str() {
                EMPTY => Bytes::new(),
                GET => {
                    let value: Option<Bytes> = pool.get(request.as_ref()).await.unwrap();
                    value.expect("it was set before")
                }
                SET => {
                    let end = request.iter().position(|byte| *byte == b'\n').unwrap();
                    let value = request.slice(end + 1..);
                    let () = pool
                        .set(&request[..end], value, None, None, false)
                        .await
                        .unwrap();
                    Bytes::new()
                }
                other => return Err(Status::unimplemented(other)),
            };
            Ok(Response::new(reply))
        })
    }
}
