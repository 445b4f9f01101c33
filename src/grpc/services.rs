//! Which service a call is for. Ours is called directly: tonic's router, behind which
//! the others are, looks the path up and boxes every call on several levels.

use std::{
    convert::Infallible,
    task::{Context, Poll},
};

use futures::future::{BoxFuture, Either};
use http::{Request, Response};
use tonic::{body::Body, service::Routes};
use tower::Service;

use super::{
    admission::head::Route, proto::group_state_service_server::GroupStateServiceServer, service,
};

/// Everything that is served on the gRPC port.
#[derive(Clone)]
pub struct Services {
    ours: GroupStateServiceServer<service::Service>,
    others: Routes,
}

// === impl Services ===

impl Services {
    pub fn new(ours: GroupStateServiceServer<service::Service>, others: Routes) -> Self {
        Self { ours, others }
    }
}

impl Service<Request<Body>> for Services {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<
        BoxFuture<'static, Result<Response<Body>, Infallible>>,
        <Routes as Service<Request<Body>>>::Future,
    >;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Ours is always ready.
        Service::<Request<Body>>::poll_ready(&mut self.others, cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if Route::of(request.uri().path()) == Route::Ours {
            Either::Left(self.ours.call(request))
        } else {
            Either::Right(self.others.call(request))
        }
    }
}
