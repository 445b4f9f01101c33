//! Each fault really strikes: a suite whose faults do nothing proves nothing.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::schedule::{After, Step, Target};
use crate::common::{
    fault_proxy::Direction,
    faults::{Fault, Site, ask},
};

const LENGTH: Duration = Duration::from_millis(500);
/// When to look: the fault has begun, and is not over soon.
const AMIDST: Duration = Duration::from_millis(150);
const SOON: Duration = Duration::from_millis(200);

/// What a new client meets in the midst of a fault.
struct Amidst {
    ping: String,
    read: String,
    write: String,
}

/// Makes a fault happen to a Redis that holds `k`, and looks in its midst and
/// after it.
async fn strike(persists: bool, fault: Fault) -> Amidst {
    let mut site = Site::start(persists, usize::from(fault.is_of_the_network())).await;
    let addr = site.addr_for(0);
    assert_eq!(try_to(addr, "SET k v").await, "+OK");
    let step = step(fault);
    let look = async {
        sleep(AMIDST).await;
        let (ping, read, write) = tokio::join!(
            try_to(addr, "PING"),
            try_to(addr, "GET k"),
            try_to(addr, "SET w v"),
        );
        Amidst { ping, read, write }
    };
    let (amidst, ()) = tokio::join!(
        look,
        site.strike(step.fault, step.length, |i| step.strikes(i))
    );
    site.wait_until_writable(|i| step.strikes(i)).await;
    let left = try_to(addr, "EXISTS k").await;
    let expected = if site.is_wiped_by(fault) { ":0" } else { ":1" };
    assert_eq!(left, expected, "{step}");
    amidst
}

fn step(fault: Fault) -> Step {
    Step {
        fault,
        target: Target::Everybody,
        length: LENGTH,
        after: After::Recovered,
    }
}

/// The first line of the answer, or why there is none.
async fn try_to(addr: SocketAddr, command: &str) -> String {
    match ask(addr, command, SOON).await {
        Ok(line) => line,
        Err(error) => format!("{:?}", error.kind()),
    }
}

#[tokio::test]
async fn a_killed_redis_refuses_and_comes_back_empty_or_as_it_was() {
    for persists in [false, true] {
        let amidst = strike(persists, Fault::Kill).await;
        assert_eq!(amidst.ping, "ConnectionRefused");
    }
}

#[tokio::test]
async fn a_hung_redis_says_nothing() {
    let amidst = strike(false, Fault::Hang).await;
    assert_eq!(
        [amidst.ping, amidst.read, amidst.write],
        ["TimedOut", "TimedOut", "TimedOut"]
    );
}

#[tokio::test]
async fn a_paused_redis_says_nothing_or_only_nothing_to_writes() {
    let amidst = strike(false, Fault::Pause { writes_only: false }).await;
    assert_eq!([amidst.ping, amidst.write], ["TimedOut", "TimedOut"]);
    let amidst = strike(false, Fault::Pause { writes_only: true }).await;
    assert_eq!([amidst.ping, amidst.write], ["+PONG", "TimedOut"]);
    assert_eq!(amidst.read, "$1");
}

#[tokio::test]
async fn a_replica_refuses_writes_or_everything_and_keeps_its_data() {
    for persists in [false, true] {
        let amidst = strike(persists, Fault::ReadOnly { serve_stale: true }).await;
        assert!(amidst.write.starts_with("-READONLY"), "{}", amidst.write);
        assert_eq!(amidst.read, "$1");
        let amidst = strike(persists, Fault::ReadOnly { serve_stale: false }).await;
        for answer in [amidst.ping, amidst.read] {
            assert!(answer.starts_with("-MASTERDOWN"), "{answer}");
        }
        assert!(amidst.write.starts_with("-READONLY"), "{}", amidst.write);
    }
}

#[tokio::test]
async fn a_full_redis_refuses_writes() {
    let amidst = strike(false, Fault::OutOfMemory).await;
    assert!(amidst.write.starts_with("-OOM"), "{}", amidst.write);
    assert_eq!(amidst.read, "$1");
}

#[tokio::test]
async fn a_redis_that_cannot_save_refuses_writes() {
    for persists in [false, true] {
        let amidst = strike(persists, Fault::Misconfigured).await;
        assert!(amidst.write.starts_with("-MISCONF"), "{}", amidst.write);
        assert_eq!(amidst.read, "$1");
    }
}

#[tokio::test]
async fn a_loading_redis_says_so_until_it_has_read_its_file() {
    let mut site = Site::start(true, 0).await;
    let addr = site.redis.addr();
    for key in 0..100 {
        try_to(addr, &format!("SET k{key} {}", "v".repeat(1_000))).await;
    }
    let step = step(Fault::Loading(Duration::from_millis(800)));
    site.strike(step.fault, step.length, |i| step.strikes(i))
        .await;
    let begin = Instant::now();
    let (mut refused, mut ready) = (0, false);
    while !ready {
        let answer = try_to(addr, "GET k1").await;
        refused += usize::from(answer.starts_with("-LOADING"));
        ready = answer == "$1000";
        sleep(Duration::from_millis(20)).await;
    }
    let took = begin.elapsed();
    assert!(refused >= 10, "{refused}");
    assert!((Duration::from_millis(600)..Duration::from_millis(1_600)).contains(&took));
    assert_eq!(try_to(addr, "EXISTS k0 k50 k99").await, ":3");
}

#[tokio::test]
async fn a_flapping_redis_hangs_and_answers_in_turn() {
    let mut site = Site::start(false, 0).await;
    let addr = site.redis.addr();
    let step = Step {
        length: Duration::from_millis(1_200),
        ..step(Fault::FlapHang(Duration::from_millis(150)))
    };
    let look = async {
        let (mut hung, mut answered) = (0, 0);
        for _ in 0..50 {
            match ask(addr, "PING", Duration::from_millis(20)).await {
                Ok(_) => answered += 1,
                Err(_) => hung += 1,
            }
            sleep(Duration::from_millis(5)).await;
        }
        (hung, answered)
    };
    let ((hung, answered), ()) = tokio::join!(
        look,
        site.strike(step.fault, step.length, |i| step.strikes(i))
    );
    assert!(hung >= 5 && answered >= 5, "{hung} {answered}");
}

// === the network ===

/// An open connection, on which PINGs are sent.
struct Line(TcpStream);

impl Line {
    async fn open(addr: SocketAddr) -> Self {
        Self(TcpStream::connect(addr).await.unwrap())
    }

    /// How a PING on it ends, within [`SOON`].
    async fn ping(&mut self) -> String {
        let exchange = async {
            self.0.write_all(b"PING\r\n").await?;
            let mut reply = [0; 7];
            match self.0.read_exact(&mut reply).await {
                Ok(_) => Ok("+PONG".to_owned()),
                Err(error) => Err(error),
            }
        };
        match timeout(SOON, exchange).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => format!("{:?}", error.kind()),
            Err(_) => "silence".to_owned(),
        }
    }
}

/// How PINGs end on a connection that was open before: amidst the fault, after
/// it, and on a new connection after it.
async fn strike_line(fault: Fault) -> [String; 3] {
    let mut site = Site::start(false, 1).await;
    let addr = site.addr_for(0);
    let mut line = Line::open(addr).await;
    assert_eq!(line.ping().await, "+PONG");
    let step = step(fault);
    let look = async {
        sleep(AMIDST).await;
        line.ping().await
    };
    let (amidst, ()) = tokio::join!(
        look,
        site.strike(step.fault, step.length, |i| step.strikes(i))
    );
    sleep(Duration::from_millis(20)).await;
    let after = line.ping().await;
    [amidst, after, Line::open(addr).await.ping().await]
}

#[tokio::test]
async fn a_reset_ends_open_connections_and_no_others() {
    let mut site = Site::start(false, 1).await;
    let mut line = Line::open(site.addr_for(0)).await;
    assert_eq!(line.ping().await, "+PONG");
    site.strike(Fault::Reset, LENGTH, |_| true).await;
    sleep(Duration::from_millis(20)).await;
    assert_ne!(line.ping().await, "+PONG");
    assert_eq!(Line::open(site.addr_for(0)).await.ping().await, "+PONG");
    // As often as one likes.
    let flapping = step(Fault::FlapReset(Duration::from_millis(100)));
    let addr = site.addr_for(0);
    let look = async {
        let mut ends = 0;
        for _ in 0..4 {
            let mut line = Line::open(addr).await;
            sleep(Duration::from_millis(110)).await;
            ends += usize::from(line.ping().await != "+PONG");
        }
        ends
    };
    let (ends, ()) = tokio::join!(
        look,
        site.strike(flapping.fault, flapping.length, |i| flapping.strikes(i))
    );
    assert!(ends >= 3, "{ends}");
}

#[tokio::test]
async fn bytes_vanish_and_old_connections_stay_dead_or_are_reset() {
    for direction in [Direction::ToServer, Direction::FromServer, Direction::Both] {
        let black_hole = |reset_after| Fault::BlackHole {
            direction,
            reset_after,
        };
        let [amidst, after, new] = strike_line(black_hole(false)).await;
        assert_eq!([&*amidst, &*after, &*new], ["silence", "silence", "+PONG"]);
        let [amidst, after, new] = strike_line(black_hole(true)).await;
        assert_eq!([&*amidst, &*new], ["silence", "+PONG"]);
        assert!(!["silence", "+PONG"].contains(&&*after), "{after}");
    }
}

#[tokio::test]
async fn vanishing_replies_leave_the_write_done_and_vanishing_requests_do_not() {
    for (direction, done) in [(Direction::FromServer, ":1"), (Direction::ToServer, ":0")] {
        let mut site = Site::start(false, 1).await;
        let (direct, through) = (site.redis.addr(), site.addr_for(0));
        let step = step(Fault::BlackHole {
            direction,
            reset_after: false,
        });
        let look = async {
            sleep(AMIDST).await;
            assert_eq!(try_to(through, "SET k v").await, "TimedOut");
            assert_eq!(try_to(direct, "EXISTS k").await, done);
        };
        tokio::join!(
            look,
            site.strike(step.fault, step.length, |i| step.strikes(i))
        );
    }
}

#[tokio::test]
async fn a_partition_that_heals_delivers_late() {
    let mut site = Site::start(false, 1).await;
    let (direct, through) = (site.redis.addr(), site.addr_for(0));
    let mut line = Line::open(through).await;
    assert_eq!(line.ping().await, "+PONG");
    let step = step(Fault::Partition);
    let look = async {
        sleep(AMIDST).await;
        line.0.write_all(b"SET ghost v\r\n").await.unwrap();
        sleep(SOON).await;
        assert_eq!(try_to(direct, "EXISTS ghost").await, ":0");
    };
    tokio::join!(
        look,
        site.strike(step.fault, step.length, |i| step.strikes(i))
    );
    sleep(Duration::from_millis(50)).await;
    assert_eq!(try_to(direct, "EXISTS ghost").await, ":1");
}

#[tokio::test]
async fn stragglers_arrive_when_their_connection_is_gone() {
    const DELAY: Duration = Duration::from_millis(300);
    let mut site = Site::start(false, 1).await;
    let (direct, through) = (site.redis.addr(), site.addr_for(0));
    let mut line = Line::open(through).await;
    assert_eq!(line.ping().await, "+PONG");
    let step = step(Fault::Stragglers(DELAY));
    let look = async {
        sleep(AMIDST).await;
        line.0.write_all(b"SET ghost v\r\n").await.unwrap();
        assert_eq!(line.ping().await, "silence");
    };
    tokio::join!(
        look,
        site.strike(step.fault, step.length, |i| step.strikes(i))
    );
    let end = Instant::now();
    assert!(!["silence", "+PONG"].contains(&&*line.ping().await));
    assert_eq!(try_to(through, "EXISTS ghost").await, ":0");
    site.wait_for_stragglers().await;
    assert!(end.elapsed() >= DELAY, "{:?}", end.elapsed());
    assert_eq!(try_to(direct, "EXISTS ghost").await, ":1");
}

#[tokio::test]
async fn delayed_bytes_arrive_that_much_later() {
    let mut site = Site::start(false, 1).await;
    let mut line = Line::open(site.addr_for(0)).await;
    let step = step(Fault::Delay(Duration::from_millis(50)));
    let look = async {
        sleep(AMIDST).await;
        let begin = Instant::now();
        assert_eq!(line.ping().await, "+PONG");
        begin.elapsed()
    };
    let (took, ()) = tokio::join!(
        look,
        site.strike(step.fault, step.length, |i| step.strikes(i))
    );
    assert!(took >= Duration::from_millis(100), "{took:?}");
    let begin = Instant::now();
    assert_eq!(line.ping().await, "+PONG");
    assert!(begin.elapsed() < Duration::from_millis(50));
}

#[tokio::test]
async fn refused_connections_are_refused_until_the_end() {
    let amidst = strike(false, Fault::Refuse).await;
    assert_eq!(amidst.ping, "ConnectionRefused");
}

#[tokio::test]
async fn a_fault_of_one_way_leaves_the_others_alone() {
    let mut site = Site::start(false, 2).await;
    let (one, other) = (site.addr_for(0), site.addr_for(1));
    let step = Step {
        target: Target::Instance(0),
        ..step(Fault::Refuse)
    };
    let look = async {
        sleep(AMIDST).await;
        (try_to(one, "PING").await, try_to(other, "PING").await)
    };
    let ((one, other), ()) = tokio::join!(
        look,
        site.strike(step.fault, step.length, |i| step.strikes(i))
    );
    assert_eq!([&*one, &*other], ["ConnectionRefused", "+PONG"]);
}
