//! How ranks meet: all but rank 0 connect to it, show the secret and say who they are; when all have come and agree,
//! rank 0 says so.
//!
//! Who has not shown the secret is a stranger: there may be any number of them, each is turned away as soon as its
//! bytes are not those of a rank, or after [`HELLO`], and none of them disturbs the meeting. What goes wrong with a
//! rank that knows the secret ends the meeting for all, with the same sentence everywhere.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result, printable};
use crate::text::cut;
use crate::usage;

use super::message::{Decoder, Fact, Hello, LONGEST_HEAD, Message, PROTOCOL, Who, head, opening};
use super::{LastResort, Patience, Timeouts, World, in_words};

/// How long somebody who has connected may take to say who it is.
const HELLO: Duration = Duration::from_secs(10);
/// Connections of which it is not yet known who they are, at most; the oldest makes room.
const STRANGERS: usize = 256;
/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between two looks at the connections.
const LOOK: Duration = Duration::from_millis(10);
/// Between two attempts to connect.
const AGAIN: Duration = Duration::from_millis(200);
/// For the last words on a connection to be read by the other side.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long those that have not come yet may still come to hear why the run does not begin.
const LATE: Duration = Duration::from_secs(10);
/// Bytes of the names in a hello.
const LONGEST_NAME: usize = 500;

/// What a rank brings to the meeting.
pub struct Joining {
    /// Its place.
    pub world: World,
    /// Rank 0's socket, if somebody has opened it for this process; otherwise it opens one.
    pub listener: Option<TcpListener>,
    /// The secret, the same on all ranks. Without one the ranks may only meet on a loopback address.
    pub token: Option<String>,
    /// Name of the machine.
    pub host: String,
    /// What the rank computes on.
    pub device: String,
    /// What must be the same on all ranks. The program's version is.
    pub facts: Vec<Fact>,
    /// How long to wait.
    pub timeouts: Timeouts,
    /// Once it is true, every wait of this rank ends with [`Error::Interrupted`].
    pub cancelled: Arc<AtomicBool>,
    /// What to do if this process does not end after another rank has failed.
    pub last_resort: Option<LastResort>,
}

/// A connection to another rank, and bytes that have come on it.
pub(super) struct Link {
    pub rank: usize,
    pub stream: TcpStream,
    pub decoder: Decoder,
}

/// The outcome of the meeting.
pub(super) struct Met {
    pub ranks: Vec<Who>,
    pub links: Vec<Link>,
    /// For the user.
    pub notes: Vec<String>,
}

/// Meets the others.
pub(super) fn meet(joining: &mut Joining) -> Result<Met> {
    let Joining { world, host, device, facts, .. } = &*joining;
    let short = |name: &str| cut(&printable(name));
    let who = Who {
        rank: world.rank,
        local_rank: world.local_rank,
        host: short(host),
        process: std::process::id(),
        device: short(device),
    };
    if world.size == 1 {
        return Ok(Met { ranks: vec![who], links: Vec::new(), notes: Vec::new() });
    }
    let mut all = vec![Fact::new("the program's version", env!("CARGO_PKG_VERSION"))];
    all.extend(facts.iter().cloned());
    let hello = Hello { who, size: world.size, local_size: world.local_size, facts: all };
    let bytes: usize = hello.facts.iter().map(|fact| 100 + 6 * (fact.name.len() + fact.value.len())).sum();
    assert!(bytes < LONGEST_HEAD, "{} facts to compare", hello.facts.len());
    if joining.token.is_none() && !is_loopback(world) {
        usage!(
            "{} can be reached from other machines: set DDPM_JOIN_TOKEN to a secret, the same on every rank, so that \
             nobody else can join",
            place(world)
        );
    }
    let token = joining.token.clone().unwrap_or_default();
    if world.rank > 0 {
        return connect(world, &hello, &token, &joining.timeouts, &joining.cancelled);
    }
    let listener = match joining.listener.take() {
        Some(listener) => listener,
        None => listen(&joining.world)?,
    };
    let mut meeting = Meeting {
        place: place(&joining.world),
        hello,
        token,
        joined: BTreeMap::new(),
        strangers: Vec::new(),
        culprit: None,
        away: None,
    };
    match meeting.hold(&listener, &joining.timeouts, &joining.cancelled) {
        Ok(ranks) => Ok(meeting.begin(ranks)),
        Err(error) => {
            // Who is late shall not look for a rank 0 that has gone; but nobody waits for Ctrl-C.
            let (why, late) = match &error {
                Error::Interrupted => {
                    (format!("{} was interrupted before all ranks had come", meeting.hello.who), Duration::ZERO)
                }
                other => (other.to_string(), LATE),
            };
            meeting.refuse(&why, &listener, late);
            Err(error)
        }
    }
}

/// The meeting point, for messages.
fn place(world: &World) -> String {
    match world.address.contains(':') {
        true => format!("[{}]:{}", world.address, world.port),
        false => format!("{}:{}", world.address, world.port),
    }
}

fn resolve(world: &World) -> io::Result<Vec<SocketAddr>> {
    Ok((world.address.as_str(), world.port).to_socket_addrs()?.collect())
}

/// Whether only processes of this machine reach the meeting point.
fn is_loopback(world: &World) -> bool {
    let loopback = |address: &SocketAddr| match address.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => ip.is_loopback(),
    };
    resolve(world).is_ok_and(|addresses| !addresses.is_empty() && addresses.iter().all(loopback))
}

/// Opens rank 0's socket, on its own address alone and not on every address of the machine.
fn listen(world: &World) -> Result<TcpListener> {
    let place = place(world);
    let addresses = resolve(world)
        .map_err(|e| Error::Failed(format!("rank 0 cannot listen on {place}: the name of its machine: {e}")))?;
    TcpListener::bind(&addresses[..]).map_err(|e| {
        Error::Failed(match e.kind() {
            io::ErrorKind::AddrInUse => format!(
                "rank 0 cannot listen on {place}, which another process uses: end that one, or set MASTER_PORT to \
                 another port on every rank (under torchrun DDPM_PORT)"
            ),
            io::ErrorKind::AddrNotAvailable => format!(
                "rank 0 cannot listen on {place}, which is no address of its machine: MASTER_ADDR must be that of the \
                 machine of rank 0"
            ),
            _ => format!("rank 0 cannot listen on {place}: {e}"),
        })
    })
}

/// Whether the secrets are the same, in a time that does not tell where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

/// The first fact in which a rank differs from rank 0, as a sentence.
pub(super) fn difference(own: (&Who, &[Fact]), other: (&Who, &[Fact])) -> Option<String> {
    let value = |facts: &[Fact], name: &str| facts.iter().find(|fact| fact.name == name).map(|fact| fact.value.clone());
    let names = own.1.iter().chain(other.1).map(|fact| &fact.name);
    for name in names {
        let (here, there) = (value(own.1, name), value(other.1, name));
        if here != there {
            let shown = |value: Option<String>| value.unwrap_or_else(|| "none".into());
            return Some(format!(
                "{} and {} differ in {name}: {} and {}; it must be the same on all ranks",
                own.0,
                other.0,
                shown(here),
                shown(there)
            ));
        }
    }
    None
}

/// The ranks of each machine, which must follow each other.
pub(super) fn machines(ranks: &[Who]) -> Result<Vec<Range<usize>>> {
    let mut machines: Vec<Range<usize>> = Vec::new();
    for who in ranks {
        match machines.last_mut() {
            Some(last) if who.local_rank == last.len() && who.host == ranks[last.start].host => last.end += 1,
            _ if who.local_rank == 0 => machines.push(who.rank..who.rank + 1),
            _ => {
                let list: Vec<String> = ranks.iter().map(|who| who.local_rank.to_string()).collect();
                return Err(Error::Failed(format!(
                    "{who} has the local rank {} behind one of another machine: the ranks of a machine must follow each \
                     other, as with srun --distribution=block (local ranks in order: {})",
                    who.local_rank,
                    cut(&list.join(", "))
                )));
            }
        }
    }
    Ok(machines)
}

/// Numbers as `1, 3 and 5 to 7`.
pub(super) fn list(numbers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if number == *last + 1 => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let texts: Vec<String> = (runs.iter())
        .flat_map(|&(first, last)| match last - first {
            0 => vec![first.to_string()],
            1 => vec![first.to_string(), last.to_string()],
            _ => vec![format!("{first} to {last}")],
        })
        .collect();
    match texts.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => texts.concat(),
    }
}

/// What a look at a connection gives.
enum Seen {
    /// Not enough to know.
    Nothing,
    /// It is closed or broken, behind the bytes that came before.
    Closed,
}

/// Reads what is there, at most a hello and a little.
fn take(stream: &mut TcpStream, decoder: &mut Decoder, most: usize) -> Seen {
    let mut chunk = [0; 4096];
    while decoder.waiting() < most {
        match stream.read(&mut chunk) {
            Ok(0) => return Seen::Closed,
            Ok(n) => decoder.push(&chunk[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => return Seen::Nothing,
            Err(_) => return Seen::Closed,
        }
    }
    Seen::Nothing
}

/// Somebody who has connected.
struct Stranger {
    stream: TcpStream,
    from: SocketAddr,
    since: Instant,
    decoder: Decoder,
    /// True once it has shown the secret.
    known: bool,
    /// Since when it has been told that it may not join. Its connection is kept a little, since one that is closed with
    /// unread bytes is reset, and what was said last may be lost with it.
    refused: Option<Instant>,
}

/// What has become of a stranger.
enum Became {
    Still,
    /// Turned away, and why.
    Away(String),
    /// Turned away before, and gone.
    Gone,
    Rank(Box<Hello>),
}

impl Stranger {
    /// Looks at what it has said. The answer, if any, fits into the socket's buffer.
    fn look(&mut self, token: &str) -> Result<Became> {
        let most = if self.known { LONGEST_HEAD + 8 } else { 4096 };
        let seen = take(&mut self.stream, &mut self.decoder, most);
        if let Some(since) = self.refused {
            self.decoder = Decoder::default();
            let gone = matches!(seen, Seen::Closed) || since.elapsed() > FAREWELL;
            return Ok(if gone { Became::Gone } else { Became::Still });
        }
        if !self.known {
            match self.decoder.opening() {
                Err(e) => return Ok(Became::Away(e.to_string())),
                Ok(None) => return Ok(self.wait_or_leave(&seen)),
                Ok(Some(opened)) => {
                    // An answer that cannot be written is not missed: the other side has gone.
                    let mut answer = opening("");
                    if !same(&opened.token, token.as_bytes()) {
                        let why = "its secret is not that of rank 0: DDPM_JOIN_TOKEN must be the same on every rank";
                        answer.extend(head(&Message::Refused { why: why.into() }, 0));
                        let _ = self.stream.write_all(&answer).and_then(|()| self.stream.shutdown(Shutdown::Write));
                        self.refused = Some(Instant::now());
                        return Ok(Became::Away("it has another secret".into()));
                    }
                    let _ = self.stream.write_all(&answer);
                    if opened.protocol != PROTOCOL {
                        return Err(Error::Failed(format!(
                            "a rank at {} speaks protocol {}, and rank 0 protocol {PROTOCOL}: all must be the same \
                             version of the program",
                            self.from.ip(),
                            opened.protocol
                        )));
                    }
                    self.known = true;
                }
            }
        }
        match self.decoder.message() {
            Ok(Some((Message::Hello(hello), _))) => Ok(Became::Rank(Box::new(hello))),
            Ok(Some(_)) => Err(Error::Failed(format!("a rank at {} does not say who it is", self.from.ip()))),
            Err(e) => Err(Error::Failed(format!("a rank at {} sends {e}", self.from.ip()))),
            Ok(None) => Ok(self.wait_or_leave(&seen)),
        }
    }

    fn wait_or_leave(&self, seen: &Seen) -> Became {
        match seen {
            Seen::Closed => Became::Away("it has closed the connection".into()),
            Seen::Nothing if self.since.elapsed() > HELLO => {
                Became::Away(format!("it has not said who it is within {}", in_words(HELLO)))
            }
            Seen::Nothing => Became::Still,
        }
    }
}

struct Joined {
    stream: TcpStream,
    decoder: Decoder,
    hello: Hello,
}

/// Rank 0's side.
struct Meeting {
    place: String,
    hello: Hello,
    token: String,
    joined: BTreeMap<usize, Joined>,
    strangers: Vec<Stranger>,
    /// The connection of the rank because of which the meeting ends; it is not among those that have joined.
    culprit: Option<TcpStream>,
    /// How many were turned away, and the last of them.
    away: Option<(u32, String)>,
}

impl Meeting {
    /// Until all are here.
    fn hold(&mut self, listener: &TcpListener, timeouts: &Timeouts, cancelled: &AtomicBool) -> Result<Vec<Who>> {
        let failed = |e: io::Error| Error::Failed(format!("rank 0 cannot wait for the other ranks: {e}"));
        listener.set_nonblocking(true).map_err(failed)?;
        let (mut patience, mut beaten) = (Patience::new(), Instant::now());
        while self.joined.len() + 1 < self.hello.size {
            if cancelled.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            if patience.passed() > timeouts.join {
                return Err(self.missing(timeouts));
            }
            self.accept(listener);
            self.look_at_strangers()?;
            self.look_at_ranks()?;
            if beaten.elapsed() >= timeouts.beat() {
                beaten = Instant::now();
                let alive = head(&Message::Alive { step: 0 }, 0);
                // A rank that cannot take it has gone, which the next look tells.
                self.joined.values_mut().for_each(|joined| drop(joined.stream.write_all(&alive)));
            }
            thread::sleep(LOOK);
        }
        let ranks: Vec<Who> =
            std::iter::once(&self.hello).chain(self.joined.values().map(|j| &j.hello)).map(|h| h.who.clone()).collect();
        let hellos: Vec<&Hello> = std::iter::once(&self.hello).chain(self.joined.values().map(|j| &j.hello)).collect();
        for machine in machines(&ranks)? {
            for hello in &hellos[machine.clone()] {
                if hello.local_size.is_some_and(|size| size != machine.len()) {
                    return Err(Error::Failed(format!(
                        "{} expects {} ranks on its machine (LOCAL_WORLD_SIZE), and {} have come, ranks {}",
                        hello.who,
                        hello.local_size.unwrap_or_default(),
                        machine.len(),
                        list(&machine.clone().collect::<Vec<_>>())
                    )));
                }
            }
        }
        Ok(ranks)
    }

    fn accept(&mut self, listener: &TcpListener) {
        for _ in 0..STRANGERS {
            // Errors are of connections that were closed meanwhile, or of too many open files, which strangers free.
            let Ok((stream, from)) = listener.accept() else { return };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.strangers.len() == STRANGERS {
                let oldest = self.strangers.remove(0);
                self.turned_away(oldest.from, "too many others wait");
            }
            let (since, decoder) = (Instant::now(), Decoder::default());
            self.strangers.push(Stranger { stream, from, since, decoder, known: false, refused: None });
        }
    }

    fn turned_away(&mut self, from: SocketAddr, why: &str) {
        let count = self.away.as_ref().map_or(0, |(count, _)| *count);
        self.away = Some((count.saturating_add(1), format!("from {}, since {why}", from.ip())));
    }

    fn look_at_strangers(&mut self) -> Result<()> {
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.look(&self.token) {
                Ok(Became::Still) => self.strangers.push(stranger),
                Ok(Became::Away(why)) => {
                    self.turned_away(stranger.from, &why);
                    if stranger.refused.is_some() {
                        self.strangers.push(stranger);
                    }
                }
                Ok(Became::Gone) => {}
                Ok(Became::Rank(hello)) => match self.objection(&hello) {
                    None => {
                        let Stranger { stream, decoder, .. } = stranger;
                        self.joined.insert(hello.who.rank, Joined { stream, decoder, hello: *hello });
                    }
                    Some(why) => {
                        self.culprit = Some(stranger.stream);
                        return Err(Error::Failed(why));
                    }
                },
                Err(error) => {
                    self.culprit = Some(stranger.stream);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Why the run cannot begin with this rank.
    fn objection(&self, hello: &Hello) -> Option<String> {
        let (own, who) = (&self.hello, &hello.who);
        if who.host.len() > LONGEST_NAME || who.device.len() > LONGEST_NAME {
            return Some(format!("rank {} says who it is in too many words", who.rank));
        }
        if hello.size != own.size {
            return Some(format!(
                "{} and {who} differ in the number of ranks (WORLD_SIZE): {} and {}; it must be the same on all ranks",
                own.who, own.size, hello.size
            ));
        }
        if who.rank >= own.size {
            return Some(format!("{who} has come, and there are {} ranks, counted from 0", own.size));
        }
        let twin = if who.rank == 0 { Some(&own.who) } else { self.joined.get(&who.rank).map(|j| &j.hello.who) };
        if let Some(twin) = twin {
            return Some(format!("{twin} and {who} have the same number: each rank (RANK) must be started once"));
        }
        difference((&own.who, &own.facts), (who, &hello.facts))
    }

    /// Ranks that have come and do not wait until the end.
    fn look_at_ranks(&mut self) -> Result<()> {
        for joined in self.joined.values_mut() {
            let seen = take(&mut joined.stream, &mut joined.decoder, LONGEST_HEAD);
            let who = &joined.hello.who;
            match joined.decoder.message() {
                Ok(Some((Message::Failed { text, .. }, _))) => return Err(Error::Failed(text)),
                Ok(Some(_)) | Err(_) => return Err(Error::Failed(format!("{who} does not wait for the others"))),
                Ok(None) => {}
            }
            if let Seen::Closed = seen {
                return Err(Error::Failed(format!("{who} has ended before all ranks had come")));
            }
        }
        Ok(())
    }

    fn missing(&self, timeouts: &Timeouts) -> Error {
        let size = self.hello.size;
        let missing: Vec<usize> = (1..size).filter(|rank| !self.joined.contains_key(rank)).collect();
        let (ranks, have) = if missing.len() == 1 { ("rank", "has") } else { ("ranks", "have") };
        Error::Failed(format!(
            "{ranks} {} of {size} {have} not come to {} within {}: they were not started, or cannot reach it{}",
            list(&missing),
            self.place,
            in_words(timeouts.join),
            self.away_note().map_or(String::new(), |note| format!(" ({note})"))
        ))
    }

    fn away_note(&self) -> Option<String> {
        let (count, last) = self.away.as_ref()?;
        let (one, were) = if *count == 1 { ("connection", "was") } else { ("connections", "were") };
        Some(format!("{count} {one} to {} {were} turned away, the last {last}", self.place))
    }

    /// Says welcome to all. Who cannot be told has ended, which its link tells.
    fn begin(mut self, ranks: Vec<Who>) -> Met {
        let notes = self.away_note().into_iter().collect();
        let welcome = head(&Message::Welcome { ranks: ranks.clone() }, 0);
        let mut links = Vec::new();
        for (rank, Joined { mut stream, decoder, .. }) in std::mem::take(&mut self.joined) {
            let _ = stream
                .set_nonblocking(false)
                .and_then(|()| stream.set_write_timeout(Some(ATTEMPT)))
                .and_then(|()| stream.write_all(&welcome));
            links.push(Link { rank, stream, decoder });
        }
        Met { ranks, links, notes }
    }

    /// Tells everybody why the run does not begin, also those that come within `late`.
    fn refuse(mut self, why: &str, listener: &TcpListener, late: Duration) {
        let refused = head(&Message::Refused { why: why.into() }, 0);
        let tell = |mut stream: TcpStream| {
            let _ = stream.write_all(&refused).and_then(|()| stream.shutdown(Shutdown::Write));
            stream
        };
        let mut told: Vec<TcpStream> =
            std::mem::take(&mut self.joined).into_values().map(|joined| tell(joined.stream)).collect();
        told.extend(self.culprit.take().map(tell));
        let mut patience = Patience::new();
        while told.len() + 1 < self.hello.size && patience.passed() < late {
            self.accept(listener);
            for mut stranger in std::mem::take(&mut self.strangers) {
                match stranger.look(&self.token) {
                    Ok(Became::Still) => self.strangers.push(stranger),
                    Ok(Became::Away(_) | Became::Gone) => {}
                    Ok(Became::Rank(_)) | Err(_) => told.push(tell(stranger.stream)),
                }
            }
            thread::sleep(LOOK);
        }
        told.iter().for_each(say_farewell);
    }
}

/// Waits until the other side has read what was written on a connection, or has closed it.
fn say_farewell(stream: &TcpStream) {
    let _ = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(FAREWELL / 10)));
    let (since, mut chunk, mut stream) = (Instant::now(), [0; 4096], stream);
    while since.elapsed() < FAREWELL {
        match stream.read(&mut chunk) {
            Ok(n) if n > 0 => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            _ => break,
        }
    }
}

/// The side of all ranks but 0.
fn connect(world: &World, hello: &Hello, token: &str, timeouts: &Timeouts, cancelled: &AtomicBool) -> Result<Met> {
    let me = format!("rank {}", world.rank);
    let place = place(world);
    let mut patience = Patience::new();
    let mut last = String::new();
    loop {
        if cancelled.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        if patience.passed() > timeouts.join {
            return Err(Error::Failed(format!(
                "{me} ({}) has not reached rank 0 at {place} within {}: {last}",
                hello.who.host,
                in_words(timeouts.join)
            )));
        }
        match attempt(world, hello, token) {
            Ok(stream) => match wait_for_welcome(stream, world, timeouts, cancelled, &mut patience)? {
                Some(met) => return Ok(met),
                // Rank 0 has not answered: it may be that of another job that has just ended.
                None => last = "the connection was closed before rank 0 had answered".into(),
            },
            Err(e) => last = e,
        }
        thread::sleep(AGAIN);
    }
}

/// Connects and says hello.
fn attempt(world: &World, hello: &Hello, token: &str) -> std::result::Result<TcpStream, String> {
    let addresses = resolve(world).map_err(|e| format!("the name {}: {e}", world.address))?;
    let mut last = format!("the name {} has no address", world.address);
    for address in addresses {
        let connected = TcpStream::connect_timeout(&address, ATTEMPT).and_then(|mut stream| {
            // Where nobody listens on a port of this machine, the system may connect a socket to itself.
            if stream.local_addr()? == stream.peer_addr()? {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            stream.set_nodelay(true)?;
            stream.set_write_timeout(Some(ATTEMPT))?;
            stream.write_all(&[opening(token), head(&Message::Hello(hello.clone()), 0)].concat())?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => return Ok(stream),
            Err(e) => last = format!("{address}: {e}"),
        }
    }
    Err(last)
}

/// Waits for rank 0's word. `None` if it has not even begun to answer.
fn wait_for_welcome(
    mut stream: TcpStream,
    world: &World,
    timeouts: &Timeouts,
    cancelled: &AtomicBool,
    patience: &mut Patience,
) -> Result<Option<Met>> {
    let place = place(world);
    let failed = |what: String| Err(Error::Failed(what));
    if let Err(e) = stream.set_read_timeout(Some(Duration::from_millis(100))) {
        return failed(format!("the connection to rank 0 at {place}: {e}"));
    }
    let (mut decoder, mut answered, mut heard) = (Decoder::default(), false, Patience::new());
    loop {
        let before = decoder.waiting();
        let seen = take(&mut stream, &mut decoder, before + 1);
        if decoder.waiting() > before {
            heard.begin_again();
        }
        if !answered {
            match decoder.opening() {
                Err(_) => {
                    return failed(format!(
                        "what listens on {place} is not rank 0 of this program: set MASTER_PORT to another port on every \
                         rank (under torchrun DDPM_PORT)"
                    ));
                }
                Ok(Some(opened)) if opened.protocol != PROTOCOL => {
                    return failed(format!(
                        "rank 0 at {place} speaks protocol {}, and rank {} protocol {PROTOCOL}: all must be the same \
                         version of the program",
                        opened.protocol, world.rank
                    ));
                }
                Ok(opened) => answered = opened.is_some(),
            }
        }
        let next = |decoder: &mut Decoder| {
            decoder.message().map_err(|e| Error::Failed(format!("rank 0 at {place} sends {e}")))
        };
        while answered && let Some((message, _)) = next(&mut decoder)? {
            match message {
                Message::Alive { .. } => {}
                Message::Refused { why } | Message::Failed { text: why, .. } => return failed(why),
                Message::Welcome { ranks } => {
                    let orderly = ranks.len() == world.size && ranks.iter().enumerate().all(|(i, who)| who.rank == i);
                    if !orderly || machines(&ranks).is_err() {
                        return failed(format!("rank 0 at {place} says that other ranks have come than there are"));
                    }
                    let links = vec![Link { rank: 0, stream, decoder }];
                    return Ok(Some(Met { ranks, links, notes: Vec::new() }));
                }
                _ => return failed(format!("rank 0 at {place} does not say whether the run begins")),
            }
        }
        if cancelled.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        match seen {
            Seen::Closed if answered => {
                return failed(format!("rank 0 at {place} has ended before all ranks had come"));
            }
            Seen::Closed => return Ok(None),
            Seen::Nothing if heard.passed() > timeouts.silence => {
                return failed(format!(
                    "rank 0 at {place} has not been heard of for {}, before all ranks had come",
                    in_words(timeouts.silence)
                ));
            }
            // The time for all to come is rank 0's to tell; this is for one that lives and does not.
            Seen::Nothing if patience.passed() > 2 * timeouts.join => {
                return failed(format!("rank 0 at {place} does not say whether the run begins"));
            }
            Seen::Nothing => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(rank: usize, local_rank: usize) -> Who {
        Who { rank, local_rank, host: "h".into(), process: 7, device: String::new() }
    }

    #[test]
    fn machines_are_known_by_local_ranks() {
        let of = |local: &[usize]| {
            let ranks: Vec<Who> = local.iter().enumerate().map(|(rank, &local)| who(rank, local)).collect();
            machines(&ranks)
        };
        assert_eq!(of(&[0]).unwrap(), vec![0..1; 1]);
        assert_eq!(of(&[0, 1, 2, 0, 1, 2]).unwrap(), [0..3, 3..6]);
        assert_eq!(of(&[0, 0, 0]).unwrap(), [0..1, 1..2, 2..3]);
        assert_eq!(of(&[0, 1, 0]).unwrap(), [0..2, 2..3]);
        let said = of(&[0, 0, 1, 1]).unwrap_err().to_string();
        assert!(said.contains("rank 3 (h, process 7) has the local rank 1") && said.contains("0, 0, 1, 1"), "{said}");
        assert!(of(&[1]).is_err());
        // Dealt out in turns to two machines, three ranks look like one and two.
        let mut dealt = [who(0, 0), who(1, 0), who(2, 1)];
        dealt[1].host = "other".into();
        assert!(machines(&dealt).is_err());
    }

    #[test]
    fn numbers_are_listed_briefly() {
        let lists = [&[][..], &[4], &[1, 2], &[1, 2, 3], &[1, 3, 5, 6, 7, 9]].map(list);
        assert_eq!(lists, ["", "4", "1 and 2", "1 to 3", "1, 3, 5 to 7 and 9"]);
    }

    #[test]
    fn the_first_difference_is_named_with_both_sides() {
        let facts = |list: &[(&str, &str)]| list.iter().map(|(n, v)| Fact::new(*n, v)).collect::<Vec<_>>();
        let own = facts(&[("version", "1"), ("steps", "5"), ("data", "a")]);
        let said = |other: &[(&str, &str)]| difference((&who(0, 0), &own), (&who(2, 1), &facts(other)));
        assert_eq!(said(&[("version", "1"), ("steps", "5"), ("data", "a")]), None);
        assert_eq!(
            said(&[("version", "1"), ("steps", "6"), ("data", "b")]).unwrap(),
            "rank 0 (h, process 7) and rank 2 (h, process 7) differ in steps: 5 and 6; it must be the same on all ranks"
        );
        assert!(said(&[("version", "1"), ("steps", "5")]).unwrap().contains("differ in data: a and none; "));
        let more = [("version", "1"), ("steps", "5"), ("data", "a"), ("x", "y")];
        assert!(said(&more).unwrap().contains("differ in x: none and y; "));
    }

    #[test]
    fn secrets_are_compared_whole() {
        assert!(same(b"abc", b"abc") && same(b"", b""));
        assert!(!same(b"abc", b"abd") && !same(b"abc", b"ab") && !same(b"", b"a"));
    }

    #[test]
    fn loopback_addresses_need_no_secret() {
        let at = |address: &str| is_loopback(&World { address: address.into(), port: 1, ..World::alone() });
        assert!(at("127.0.0.1") && at("127.0.1.1") && at("::1"));
        assert!(!at("10.0.0.1") && !at("0.0.0.0") && !at("::"));
    }
}
