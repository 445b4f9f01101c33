//! Each fault really strikes: a suite whose faults do nothing proves nothing.
//!
//! A fault lasts here until a client has met what it should meet, so that a busy
//! machine cannot be late.

use std::{io::ErrorKind, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    time::{Instant, sleep},
};

use crate::common::{
    fault_proxy::Direction,
    faults::{Fault, Site, ask},
    stalls::{Bound, within},
};

/// Of a pause, which Redis ends by itself.
const LENGTH: Duration = Duration::from_millis(1_500);
/// Who says nothing for so long says nothing.
const SOON: Duration = Duration::from_millis(200);
/// What must come comes within this.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// What a new client meets in the midst of a fault.
#[derive(Debug)]
struct Amidst {
    ping: String,
    read: String,
    write: String,
}

/// Makes a fault happen to a Redis that holds `k`, until a new client meets what it
/// should, and looks at what is left.
async fn strike(persists: bool, fault: Fault, meets: impl Fn(&Amidst) -> bool) {
    let mut site = Site::start(persists, usize::from(fault.is_of_the_network())).await;
    let addr = site.addr_for(0);
    assert_eq!(said(addr, "SET k v").await, "+OK");
    let look = until(async || {
        let (ping, read, write) = tokio::join!(
            try_to(addr, "PING"),
            try_to(addr, "GET k"),
            try_to(addr, "SET w v"),
        );
        let amidst = Amidst { ping, read, write };
        if meets(&amidst) {
            Ok(())
        } else {
            Err(format!("{}: {amidst:?}", fault.name()))
        }
    });
    amidst(&mut site, fault, look).await;
    site.wait_until_writable(|_| true).await;
    let left = said(addr, "EXISTS k").await;
    let expected = if site.is_wiped_by(fault) { ":0" } else { ":1" };
    assert_eq!(left, expected, "{}", fault.name());
}

/// Makes a fault happen to everybody until `look` has seen it.
async fn amidst<T>(site: &mut Site, fault: Fault, look: impl Future<Output = T>) -> T {
    let (seen, end) = oneshot::channel::<()>();
    let look = async {
        let looked = look.await;
        drop(seen);
        looked
    };
    let end = async {
        let _ = end.await;
    };
    let (looked, ()) = tokio::join!(look, site.strike_until(fault, LENGTH, end, |_| true));
    looked
}

/// Looks until it sees what it should; otherwise fails with what it sees.
async fn until<T>(mut look: impl AsyncFnMut() -> Result<T, String>) -> T {
    let bound = Bound::of(PATIENCE);
    loop {
        match look().await {
            Ok(looked) => return looked,
            Err(seen) => assert!(!bound.is_over(), "{seen}"),
        }
        sleep(PAUSE).await;
    }
}

/// The first line of the answer, or why there is none soon.
async fn try_to(addr: SocketAddr, command: &str) -> String {
    told(ask(addr, command, SOON).await)
}

/// The same where an answer must come.
async fn said(addr: SocketAddr, command: &str) -> String {
    told(ask(addr, command, PATIENCE).await)
}

fn told(answer: std::io::Result<String>) -> String {
    answer.unwrap_or_else(|error| format!("{:?}", error.kind()))
}

#[tokio::test]
async fn a_killed_redis_refuses_and_comes_back_empty_or_as_it_was() {
    for persists in [false, true] {
        strike(persists, Fault::Kill, |amidst| {
            amidst.ping == "ConnectionRefused"
        })
        .await;
    }
}

#[tokio::test]
async fn a_hung_redis_says_nothing() {
    strike(false, Fault::Hang, |amidst| {
        [&*amidst.ping, &*amidst.read, &*amidst.write] == ["TimedOut"; 3]
    })
    .await;
}

#[tokio::test]
async fn a_paused_redis_says_nothing_or_only_nothing_to_writes() {
    strike(false, Fault::Pause { writes_only: false }, |amidst| {
        [&*amidst.ping, &*amidst.write] == ["TimedOut"; 2]
    })
    .await;
    strike(false, Fault::Pause { writes_only: true }, |amidst| {
        [&*amidst.ping, &*amidst.read, &*amidst.write] == ["+PONG", "$1", "TimedOut"]
    })
    .await;
}

#[tokio::test]
async fn a_replica_refuses_writes_or_everything_and_keeps_its_data() {
    for persists in [false, true] {
        strike(persists, Fault::ReadOnly { serve_stale: true }, |amidst| {
            amidst.write.starts_with("-READONLY") && amidst.read == "$1"
        })
        .await;
        strike(persists, Fault::ReadOnly { serve_stale: false }, |amidst| {
            let refused = |answer: &str| answer.starts_with("-MASTERDOWN");
            refused(&amidst.ping) && refused(&amidst.read) && amidst.write.starts_with("-READONLY")
        })
        .await;
    }
}

#[tokio::test]
async fn a_full_redis_refuses_writes() {
    strike(false, Fault::OutOfMemory, |amidst| {
        amidst.write.starts_with("-OOM") && amidst.read == "$1"
    })
    .await;
}

#[tokio::test]
async fn a_redis_that_cannot_save_refuses_writes() {
    for persists in [false, true] {
        strike(persists, Fault::Misconfigured, |amidst| {
            amidst.write.starts_with("-MISCONF") && amidst.read == "$1"
        })
        .await;
    }
}

#[tokio::test]
async fn a_busy_script_has_everything_refused() {
    strike(false, Fault::BusyScript, |amidst| {
        amidst.ping.starts_with("-BUSY") && amidst.write.starts_with("-BUSY")
    })
    .await;
}

#[tokio::test]
async fn another_password_ends_connections_and_lets_nobody_in() {
    let mut site = Site::start(false, 0).await;
    let addr = site.redis.addr();
    let [user, password] = crate::common::redis_server::login();
    let login = format!("AUTH {user} {password}");
    assert_eq!(said(addr, &login).await, "+OK");
    let mut line = Line::open(addr).await;
    assert_eq!(line.say(&login, "+OK").await, "+OK");
    let look = async {
        until(async || {
            let answer = said(addr, &login).await;
            let refused = answer.starts_with("-WRONGPASS");
            refused.then_some(()).ok_or(answer)
        })
        .await;
        line.ends().await;
    };
    amidst(&mut site, Fault::Password, look).await;
    assert_eq!(said(addr, &login).await, "+OK");
}

#[tokio::test]
async fn a_loading_redis_says_so_until_it_has_read_its_file() {
    const DURATION: Duration = Duration::from_millis(800);
    let mut site = Site::start(true, 0).await;
    let addr = site.redis.addr();
    for key in 0..100 {
        said(addr, &format!("SET k{key} {}", "v".repeat(1_000))).await;
    }
    let begin = Instant::now();
    site.strike(Fault::Loading(DURATION), Duration::ZERO, |_| true)
        .await;
    let bound = Bound::of(2 * DURATION);
    until(async || {
        let answer = try_to(addr, "GET k1").await;
        let loads = answer.starts_with("-LOADING");
        loads.then_some(()).ok_or(answer)
    })
    .await;
    until(async || {
        let answer = try_to(addr, "GET k1").await;
        (answer == "$1000").then_some(()).ok_or(answer)
    })
    .await;
    bound.assert_holds("it has read its file");
    assert!(begin.elapsed() > DURATION.mul_f64(0.75));
    assert_eq!(said(addr, "EXISTS k0 k50 k99").await, ":3");
}

#[tokio::test]
async fn a_flapping_redis_hangs_and_answers_in_turn() {
    let mut site = Site::start(false, 0).await;
    let addr = site.redis.addr();
    let look = async {
        for _ in 0..3 {
            for silent in [true, false] {
                until(async || {
                    let ping = ask(addr, "PING", Duration::from_millis(20)).await;
                    let as_it_should = ping.is_err() == silent;
                    as_it_should.then_some(()).ok_or(format!("{ping:?}"))
                })
                .await;
            }
        }
    };
    let flapping = Fault::FlapHang(Duration::from_millis(150));
    amidst(&mut site, flapping, look).await;
}

// === the network ===

/// An open connection, on which PINGs are sent.
struct Line(TcpStream);

impl Line {
    async fn open(addr: SocketAddr) -> Self {
        Self(TcpStream::connect(addr).await.unwrap())
    }

    /// How a PING on it ends, if it does.
    async fn ping(&mut self) -> String {
        self.say("PING", "+PONG").await
    }

    /// How a command on it ends that is answered by `expected`: with that, with an
    /// error, or in silence.
    async fn say(&mut self, command: &str, expected: &str) -> String {
        let exchange = async {
            self.0
                .write_all(format!("{command}\r\n").as_bytes())
                .await?;
            let mut reply = vec![0; expected.len() + 2];
            self.0.read_exact(&mut reply).await?;
            Ok::<_, std::io::Error>(String::from_utf8_lossy(&reply).trim_end().to_owned())
        };
        match within(SOON, exchange).await {
            Some(Ok(reply)) => reply,
            Some(Err(error)) => format!("{:?}", error.kind()),
            None => "silence".to_owned(),
        }
    }

    /// PINGs until nothing comes back.
    async fn falls_silent(&mut self) {
        until(async || {
            let ping = self.ping().await;
            (ping == "silence").then_some(()).ok_or(ping)
        })
        .await;
    }

    /// PINGs until the connection has ended.
    async fn ends(&mut self) {
        until(async || {
            let ping = self.ping().await;
            let alive = ["+PONG", "silence"].contains(&&*ping);
            if alive { Err(ping) } else { Ok(()) }
        })
        .await;
    }
}

/// Makes a fault happen until a connection that was open before is silent, and returns
/// the connection.
async fn silenced(site: &mut Site, fault: Fault) -> Line {
    let mut line = Line::open(site.addr_for(0)).await;
    assert_eq!(line.ping().await, "+PONG");
    amidst(site, fault, line.falls_silent()).await;
    line
}

#[tokio::test]
async fn a_reset_ends_open_connections_and_no_others() {
    let mut site = Site::start(false, 1).await;
    let addr = site.addr_for(0);
    let mut line = Line::open(addr).await;
    assert_eq!(line.ping().await, "+PONG");
    site.strike(Fault::Reset, Duration::ZERO, |_| true).await;
    line.ends().await;
    assert_eq!(Line::open(addr).await.ping().await, "+PONG");
    // As often as one likes.
    let look = async {
        for _ in 0..3 {
            Line::open(addr).await.ends().await;
        }
    };
    let flapping = Fault::FlapReset(Duration::from_millis(100));
    amidst(&mut site, flapping, look).await;
}

#[tokio::test]
async fn a_proxy_that_accepts_and_closes_ends_old_and_new_connections() {
    let mut site = Site::start(false, 1).await;
    let addr = site.addr_for(0);
    let mut line = Line::open(addr).await;
    assert_eq!(line.ping().await, "+PONG");
    let look = async {
        line.ends().await;
        until(async || {
            // It may be over before the PING is sent, or after.
            match ask(addr, "PING", PATIENCE)
                .await
                .map_err(|error| error.kind())
            {
                Err(
                    ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof,
                ) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    };
    amidst(&mut site, Fault::AcceptAndClose, look).await;
    assert_eq!(said(addr, "PING").await, "+PONG");
}

#[tokio::test]
async fn bytes_vanish_and_old_connections_stay_dead_or_are_reset() {
    for direction in [Direction::ToServer, Direction::FromServer, Direction::Both] {
        for reset_after in [false, true] {
            let mut site = Site::start(false, 1).await;
            let black_hole = Fault::BlackHole {
                direction,
                reset_after,
            };
            let mut line = silenced(&mut site, black_hole).await;
            if reset_after {
                line.ends().await;
            } else {
                assert_eq!(line.ping().await, "silence");
            }
            let mut new = Line::open(site.addr_for(0)).await;
            assert_eq!(new.ping().await, "+PONG");
        }
    }
}

#[tokio::test]
async fn vanishing_replies_leave_the_write_done_and_vanishing_requests_do_not() {
    for (direction, done) in [(Direction::FromServer, ":1"), (Direction::ToServer, ":0")] {
        let mut site = Site::start(false, 1).await;
        let (direct, through) = (site.redis.addr(), site.addr_for(0));
        let mut line = Line::open(through).await;
        assert_eq!(line.ping().await, "+PONG");
        let black_hole = Fault::BlackHole {
            direction,
            reset_after: false,
        };
        let look = async {
            line.falls_silent().await;
            assert_eq!(try_to(through, "SET k v").await, "TimedOut");
            until(async || {
                let exists = said(direct, "EXISTS k").await;
                (exists == done).then_some(()).ok_or(exists)
            })
            .await;
        };
        amidst(&mut site, black_hole, look).await;
    }
}

#[tokio::test]
async fn a_partition_that_heals_delivers_late() {
    let mut site = Site::start(false, 1).await;
    let (direct, through) = (site.redis.addr(), site.addr_for(0));
    let mut line = Line::open(through).await;
    assert_eq!(line.ping().await, "+PONG");
    let look = async {
        line.falls_silent().await;
        line.0.write_all(b"SET ghost v\r\n").await.unwrap();
        sleep(SOON).await;
        assert_eq!(said(direct, "EXISTS ghost").await, ":0");
    };
    amidst(&mut site, Fault::Partition, look).await;
    until(async || {
        let exists = said(direct, "EXISTS ghost").await;
        (exists == ":1").then_some(()).ok_or(exists)
    })
    .await;
}

#[tokio::test]
async fn stragglers_arrive_when_their_connection_is_gone() {
    const DELAY: Duration = Duration::from_millis(500);
    // Whether they are under way can only be seen before they arrive.
    until(async || {
        let mut site = Site::start(false, 1).await;
        let (direct, through) = (site.redis.addr(), site.addr_for(0));
        let mut line = Line::open(through).await;
        assert_eq!(line.ping().await, "+PONG");
        let look = async {
            line.falls_silent().await;
            line.0.write_all(b"SET ghost v\r\n").await.unwrap();
            assert_eq!(line.ping().await, "silence");
        };
        // The requests set out at the end of the fault.
        let begin = Instant::now();
        amidst(&mut site, Fault::Stragglers(DELAY), look).await;
        let end = Instant::now();
        line.ends().await;
        let under_way = said(through, "EXISTS ghost").await;
        let looked = end.elapsed();
        site.wait_for_stragglers().await;
        assert!(begin.elapsed() >= DELAY);
        assert_eq!(said(direct, "EXISTS ghost").await, ":1");
        if looked < DELAY {
            assert_eq!(under_way, ":0");
            return Ok(());
        }
        Err(format!("looked after {looked:?}"))
    })
    .await;
}

#[tokio::test]
async fn delayed_bytes_arrive_that_much_later() {
    const DELAY: Duration = Duration::from_millis(50);
    let mut site = Site::start(false, 1).await;
    let mut line = Line::open(site.addr_for(0)).await;
    let look = until(async || {
        let begin = Instant::now();
        let ping = line.ping().await;
        let took = begin.elapsed();
        let is_late = ping == "+PONG" && took >= 2 * DELAY;
        is_late
            .then_some(())
            .ok_or(format!("{ping} after {took:?}"))
    });
    amidst(&mut site, Fault::Delay(DELAY), look).await;
    until(async || {
        let begin = Instant::now();
        let ping = line.ping().await;
        let took = begin.elapsed();
        let is_late = ping != "+PONG" || took >= DELAY;
        if is_late {
            Err(format!("{ping} after {took:?}"))
        } else {
            Ok(())
        }
    })
    .await;
}

#[tokio::test]
async fn refused_connections_are_refused_until_the_end() {
    strike(false, Fault::Refuse, |amidst| {
        amidst.ping == "ConnectionRefused"
    })
    .await;
}

#[tokio::test]
async fn a_fault_of_one_way_leaves_the_others_alone() {
    let mut site = Site::start(false, 2).await;
    let (one, other) = (site.addr_for(0), site.addr_for(1));
    let (seen, end) = oneshot::channel::<()>();
    let look = async {
        until(async || {
            let ping = try_to(one, "PING").await;
            (ping == "ConnectionRefused").then_some(()).ok_or(ping)
        })
        .await;
        assert_eq!(said(other, "PING").await, "+PONG");
        drop(seen);
    };
    let end = async {
        let _ = end.await;
    };
    tokio::join!(
        look,
        site.strike_until(Fault::Refuse, LENGTH, end, |instance| instance == 0)
    );
}
