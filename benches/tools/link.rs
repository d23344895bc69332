//! A slow link in user space: a TCP proxy with the round-trip time and the bandwidth of a real network.
//!
//! The cold-start demo puts it between containerd and the registry. It needs no privileges and no traffic-control modules,
//! and works the same on every kernel.
//!
//! What is modelled, for each direction:
//! - *propagation*: a byte arrives half a round trip after its last bit was sent;
//! - *bandwidth*: one serializer shared by all connections. A connection has one chunk in it at a time, so connections
//!   share it fairly;
//! - *the cap of a connection* (`--connection-mbit N`, 0 = none): a serializer of its own for each connection and direction, beside the
//!   shared one. Object stores and CDNs limit what one connection brings, whatever the link could carry;
//! - *the handshake*: the kernel accepts a connection at once, so the first bytes of a new one are held back for the round
//!   trip that SYN and SYN-ACK would have taken.
//!
//! Not modelled: loss, slow start, a receive window smaller than bandwidth x delay. A real link is never kinder than this one.
//!
//! It prints `link ADDRESS` and `stats ADDRESS` once it is ready. Whoever connects to the second address gets one JSON line
//! with the bytes and connections so far.
//!
//! Threads and blocking sockets on purpose: `thread::sleep` is accurate to some 50 us, an async timer only to a millisecond.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;

/// How long a connection has the serializer for at once; 16 KiB at 100 Mbit/s. A chunk costs two wake-ups of threads, which at a fixed size would
/// make a fast link the hungriest program of a benchmark.
const TURN: Duration = Duration::from_micros(1_311);
/// Least and most bytes of a chunk.
const CHUNKS: (u64, u64) = (16 << 10, 128 << 10);

/// Chunks between the two ends of one direction of one connection: at least 4 MiB, above bandwidth x delay of any link of interest.
const IN_FLIGHT: usize = 256;

/// How far the serializer may lag behind the clock and still catch up, so that a late wake-up costs no bandwidth.
const SLACK: Duration = Duration::from_millis(5);

/// Forwards TCP connections as if over a slower network.
#[derive(Parser)]
struct Options {
    /// Address on which clients connect; port 0 picks a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Address of the server.
    #[arg(long)]
    to: SocketAddr,
    /// Round-trip time in milliseconds.
    #[arg(long, default_value_t = 20)]
    rtt: u64,
    /// Bandwidth of each direction in megabits per second.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    mbit: u64,
    /// What each connection has of it at most, in each direction, in megabits per second; 0 = all.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=100_000))]
    connection_mbit: u64,
}

/// Sends bits one after the other.
struct Serializer {
    bytes_per_second: u64,
    /// When it has sent everything that was given to it.
    idle_at: Mutex<Instant>,
}

impl Serializer {
    fn new(mbit: u64) -> Self {
        Serializer {
            bytes_per_second: mbit * 1_000_000 / 8,
            idle_at: Mutex::new(Instant::now()),
        }
    }

    /// Takes `len` bytes, and tells when their last bit is sent.
    fn send(&self, len: usize) -> Instant {
        let duration = Duration::from_nanos(len as u64 * 1_000_000_000 / self.bytes_per_second);
        let now = Instant::now();
        let mut idle_at = self.idle_at.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(SLACK).unwrap_or(now);
        *idle_at = (*idle_at).max(earliest) + duration;
        // Catching up means a higher rate for a moment, never an arrival from the past.
        (*idle_at).max(now)
    }
}

/// One direction of the link, shared by all connections.
struct Direction {
    serializer: Serializer,
    bytes: AtomicU64,
}

impl Direction {
    fn new(mbit: u64) -> Self {
        Direction {
            serializer: Serializer::new(mbit),
            bytes: AtomicU64::new(0),
        }
    }

    /// Gives `len` bytes of a connection to its own serializer and the shared one, and tells when their last bit has left both.
    fn send(&self, own: Option<&Serializer>, len: usize) -> Instant {
        self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        let shared = self.serializer.send(len);
        own.map_or(shared, |own| own.send(len).max(shared))
    }
}

struct Link {
    one_way: Duration,
    /// Cap of each connection, in megabits per second; 0 = none.
    connection_mbit: u64,
    /// Bytes that a connection gives to the serializer at once.
    chunk: usize,
    up: Direction,
    down: Direction,
    connections: AtomicU64,
}

/// A chunk and the time at which it arrives; an empty one is the end of the stream.
type Parcel = (Instant, Vec<u8>);

fn main() -> io::Result<()> {
    let options = Options::parse();
    let listener = TcpListener::bind(options.listen)?;
    let stats = TcpListener::bind(SocketAddr::new(options.listen.ip(), 0))?;
    let link = Arc::new(Link {
        one_way: Duration::from_micros(options.rtt * 1_000 / 2),
        connection_mbit: options.connection_mbit,
        chunk: chunk(options.mbit, options.connection_mbit),
        up: Direction::new(options.mbit),
        down: Direction::new(options.mbit),
        connections: AtomicU64::new(0),
    });
    println!("link {}", listener.local_addr()?);
    println!("stats {}", stats.local_addr()?);

    let reported = Arc::clone(&link);
    thread::spawn(move || {
        for client in stats.incoming().flatten() {
            // A client that went away has no use for the answer.
            let _ = report(&reported, client);
        }
    });
    for client in listener.incoming() {
        let client = client?;
        let link = Arc::clone(&link);
        thread::spawn(move || {
            if let Err(error) = forward(link, &client, options.to) {
                eprintln!("link: {}: {error}", options.to);
                // The client sees a closed connection, as from a server that is down; more cannot be done for it.
                let _ = client.shutdown(Shutdown::Both);
            }
        });
    }
    Ok(())
}

/// Bytes that take [`TURN`] at the slower of both rates, in megabits per second (of which 0 is none), within [`CHUNKS`].
fn chunk(mbit: u64, connection_mbit: u64) -> usize {
    let slower = if connection_mbit > 0 {
        mbit.min(connection_mbit)
    } else {
        mbit
    };
    let bytes = u128::from(slower) * TURN.as_nanos() / 8_000;
    (bytes as u64).clamp(CHUNKS.0, CHUNKS.1) as usize
}

fn report(link: &Link, mut client: TcpStream) -> io::Result<()> {
    writeln!(
        client,
        r#"{{"connections":{},"up":{},"down":{}}}"#,
        link.connections.load(Ordering::Relaxed),
        link.up.bytes.load(Ordering::Relaxed),
        link.down.bytes.load(Ordering::Relaxed),
    )
}

/// Connects one client to the server, and starts both directions.
fn forward(link: Arc<Link>, client: &TcpStream, server: SocketAddr) -> io::Result<()> {
    link.connections.fetch_add(1, Ordering::Relaxed);
    let established = Instant::now() + link.one_way * 2;
    let server = TcpStream::connect(server)?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    spawn_direction(
        &link,
        |link| &link.up,
        client.try_clone()?,
        server.try_clone()?,
        established,
    );
    spawn_direction(&link, |link| &link.down, server, client.try_clone()?, established);
    Ok(())
}

fn spawn_direction(
    link: &Arc<Link>,
    direction: fn(&Link) -> &Direction,
    from: TcpStream,
    to: TcpStream,
    established: Instant,
) {
    let (sender, receiver) = sync_channel(IN_FLIGHT);
    let link = Arc::clone(link);
    let own = (link.connection_mbit > 0).then(|| Serializer::new(link.connection_mbit));
    thread::spawn(move || depart(&link, direction, own, from, established, &sender));
    thread::spawn(move || arrive(to, &receiver));
}

/// Reads what one end sends, and stamps every chunk with the time of its arrival.
fn depart(
    link: &Link,
    direction: fn(&Link) -> &Direction,
    own: Option<Serializer>,
    mut from: TcpStream,
    established: Instant,
    sender: &SyncSender<Parcel>,
) {
    loop {
        let mut chunk = vec![0; link.chunk];
        // A connection that broke ends like one that was closed: the other end sees the end of the stream.
        let len = from.read(&mut chunk).unwrap_or(0);
        chunk.truncate(len);
        let sent = direction(link).send(own.as_ref(), len).max(established);
        if sender.send((sent + link.one_way, chunk)).is_err() || len == 0 {
            break;
        }
        thread::sleep(sent.saturating_duration_since(Instant::now()));
    }
}

/// Hands every chunk to the other end when its time has come.
fn arrive(mut to: TcpStream, receiver: &Receiver<Parcel>) {
    for (at, chunk) in receiver {
        thread::sleep(at.saturating_duration_since(Instant::now()));
        if chunk.is_empty() {
            // The peer may have closed already.
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        if to.write_all(&chunk).is_err() {
            // Nobody listens: stop the sender too.
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
    }
}
