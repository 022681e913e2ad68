//! Where the ranks of one communicator meet: a thread in the process that made the id, which is there as long as the
//! process. Every rank has a connection to it and none to other ranks, so that one place sees all calls, compares them
//! and knows who is missing.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::call::Call;
use crate::codes::{Answer, Code, Refusal, refusal, refuse};
use crate::matching::Matching;
use crate::settings::{Peers, Settings, dotted, settings};
use crate::wire::{self, Bye, Hello, Meeting, ToHub, ToRank, Token};

/// A hub and its thread.
struct Hub {
    token: Token,
    settings: &'static Settings,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    members: BTreeMap<u32, Member>,
    /// Once all ranks are there.
    matching: Option<Matching>,
    failed: Option<Refusal>,
}

struct Member {
    hello: Hello,
    /// To its connection; `None` once it has left.
    out: Option<Sender<Post>>,
}

/// A message on its way, and whom to tell when it has been written.
type Post = (ToRank, Option<Sender<()>>);

/// How long the end of a rank waits until the others have been told of it, which nothing but a rank that has been
/// stopped delays.
const TELLING: Duration = Duration::from_secs(1);

/// Starts a hub at the first address of the settings that is this machine's.
pub fn start() -> Answer<Meeting> {
    let settings = settings()?;
    let mut bound = Err(io::Error::from(io::ErrorKind::AddrNotAvailable));
    for address in &settings.addresses {
        bound = TcpListener::bind((*address, 0));
        if bound.is_ok() {
            break;
        }
    }
    let at = bound.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (address, listener) = at.map_err(|e| {
        let addresses: Vec<String> = settings.addresses.iter().map(ToString::to_string).collect();
        refusal(Code::SYSTEM, format!("nothing can listen at {}: {e}", addresses.join(" or ")))
    })?;
    let token = token();
    let hub = Arc::new(Hub { token, settings, state: Mutex::default() });
    spawn("nccl_emu hub", move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Too many files are open, perhaps, and later fewer.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            };
            let hub = hub.clone();
            // Without a thread for it the connection is dropped, which its rank reports.
            let _ = spawn("nccl_emu hub, a rank", move || hub.serve(stream));
        }
    })?;
    Ok(Meeting { address, token })
}

/// A thread of this library.
pub fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Answer<std::thread::JoinHandle<T>> {
    let started = std::thread::Builder::new().name(name.into()).spawn(work);
    started.map_err(|e| refusal(Code::SYSTEM, format!("no thread can be started: {e}")))
}

/// Sixteen random bytes: the standard library draws the keys of its hash tables at random.
fn token() -> Token {
    let mut token = [0; 16];
    for half in token.chunks_exact_mut(8) {
        half.copy_from_slice(&RandomState::new().build_hasher().finish().to_le_bytes());
    }
    token
}

impl Hub {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Talks to one rank until it leaves.
    fn serve(&self, stream: TcpStream) {
        let (Ok(()), Ok(mut writer)) = (stream.set_nodelay(true), stream.try_clone()) else { return };
        let mut reader = BufReader::new(stream);
        // Whoever does not speak the language is no rank.
        let Ok(hello) = wire::read_hello(&mut reader) else { return };
        // Written by a thread of its own, so that a rank that does not read cannot keep the others waiting.
        let (out, posts) = channel::<Post>();
        let writing = spawn("nccl_emu hub, to a rank", move || {
            for (message, written) in posts {
                if writer.write_all(&message.to_bytes()).is_err() {
                    break;
                }
                // Whoever wanted to know may no longer wait.
                let _ = written.map(|written| written.send(()));
            }
        });
        let rank = hello.rank;
        let joined = writing.map(|_| ()).and_then(|()| self.join(hello, out.clone()));
        if let Err(refusal) = joined {
            // Without the writing thread nobody receives it, and the rank sees its connection end.
            let _ = out.send((ToRank::Failure(refusal), None));
            return;
        }
        drop(out);
        loop {
            match wire::read_from_rank(&mut reader) {
                Ok(ToHub::Calls(calls)) => self.carry_out(rank, calls),
                Ok(ToHub::Bye(Bye::Ended)) => return self.end(rank),
                Ok(ToHub::Bye(Bye::Aborted)) => return self.leave(rank, "has aborted its communicator"),
                _ => return self.leave(rank, "is gone, without having ended its communicator"),
            }
        }
    }

    /// A rank arrives. The last one completes the communicator; one that does not fit spoils it for all.
    fn join(&self, hello: Hello, out: Sender<Post>) -> Answer {
        if hello.token != self.token {
            return refuse(Code::ARGUMENT, "the id is of another communicator, which is no longer there");
        }
        let mut state = self.state();
        if let Some(failed) = &state.failed {
            return Err(failed.clone());
        }
        if state.matching.is_some() {
            let what = format!("{} joins a communicator that is complete: an id is for one communicator", name(&hello));
            return refuse(Code::USAGE, what);
        }
        if let Err(refusal) = state.check(&hello) {
            state.fail(&refusal);
            return Err(refusal);
        }
        let size = hello.size;
        state.members.insert(hello.rank, Member { hello, out: Some(out) });
        if state.members.len() == size as usize {
            state.matching = Some(Matching::new(size, self.settings.seed));
            let ranks = state.members.values().filter(|member| member.is_with_hub()).count() as u32;
            let welcome = ToRank::Welcome { pid: std::process::id(), host: host(), ranks };
            state.members.values().for_each(|member| member.say(welcome.clone(), None));
        }
        Ok(())
    }

    fn carry_out(&self, rank: u32, calls: Vec<(Call, Vec<u8>)>) {
        let mut state = self.state();
        let State { members, matching: Some(matching), failed: None } = &mut *state else { return };
        match matching.submit(rank, calls) {
            Ok(done) => done.into_iter().for_each(|(rank, results)| members[&rank].say(ToRank::Results(results), None)),
            Err(refusal) => state.fail(&refusal),
        }
    }

    /// A rank ends in order. Its connection ends once the others know, so that its process may then end, too.
    fn end(&self, rank: u32) {
        let told: Vec<Receiver<()>> = {
            let mut state = self.state();
            let with_hub = state.members.get(&rank).is_some_and(Member::is_with_hub);
            let others = state.members.iter().filter(|(other, member)| **other != rank && member.out.is_some());
            let tell = |(_, member): (&u32, &Member)| {
                let (written, told) = channel();
                member.say(ToRank::Ended { with_hub }, Some(written));
                told
            };
            let told = others.map(tell).collect();
            if let State { matching: Some(matching), failed: None, .. } = &mut *state
                && let Err(refusal) = matching.end(rank)
            {
                state.fail(&refusal);
            }
            told
        };
        let until = Instant::now() + TELLING;
        for told in told {
            // A rank that is not reached is gone, or will be told later.
            let _ = told.recv_timeout(until.saturating_duration_since(Instant::now()));
        }
        self.state().drop_connection(rank);
    }

    /// A rank is gone without a proper end.
    fn leave(&self, rank: u32, how: &str) {
        let mut state = self.state();
        state.drop_connection(rank);
        if state.failed.is_some() || self.settings.peers == Peers::Hang {
            return;
        }
        let who = state.members.get(&rank).map_or_else(String::new, |member| name(&member.hello));
        let when = if state.matching.is_some() { "" } else { ", before all ranks were there" };
        state.fail(&refusal(Code::REMOTE, format!("{who} {how}{when}")));
    }
}

impl State {
    /// Refuses a rank that does not fit those that are there.
    fn check(&self, new: &Hello) -> Answer {
        if let Some(there) = self.members.get(&new.rank) {
            let (one, other) = (&there.hello.who, &new.who);
            let what = format!(
                "rank {} is there twice: process {} on {} and process {} on {}",
                new.rank, one.pid, one.host, other.pid, other.host
            );
            return refuse(Code::USAGE, what);
        }
        for there in self.members.values().map(|member| &member.hello) {
            if there.size != new.size {
                let what = format!(
                    "rank {} makes a communicator of {} ranks, rank {} one of {}",
                    there.rank, there.size, new.rank, new.size
                );
                return refuse(Code::USAGE, what);
            }
            if there.version != new.version {
                let [one, other] = [there.version, new.version].map(dotted);
                let what = format!("rank {} has NCCL {one}, rank {} NCCL {other}", there.rank, new.rank);
                return refuse(Code::USAGE, what);
            }
            let same = (&there.who.machine, there.who.uuid) == (&new.who.machine, new.who.uuid);
            if same && !(there.who.shares && new.who.shares) {
                let what = format!(
                    "rank {} and rank {} both use GPU {} of {}: every rank needs its own, unless \
                     NCCL_MULTI_RANK_GPU_ENABLE=1",
                    there.rank, new.rank, new.who.device, new.who.host
                );
                return refuse(Code::USAGE, what);
            }
        }
        Ok(())
    }

    /// Tells everybody.
    fn fail(&mut self, refusal: &Refusal) {
        self.failed = Some(refusal.clone());
        self.members.values().for_each(|member| member.say(ToRank::Failure(refusal.clone()), None));
    }

    fn drop_connection(&mut self, rank: u32) {
        if let Some(member) = self.members.get_mut(&rank) {
            member.out = None;
        }
    }
}

impl Member {
    fn say(&self, message: ToRank, written: Option<Sender<()>>) {
        if let Some(out) = &self.out {
            // Its thread ends when the connection does, which the reading side reports.
            let _ = out.send((message, written));
        }
    }

    /// True if it is in the hub's process.
    fn is_with_hub(&self) -> bool {
        self.hello.who.pid == std::process::id() && self.hello.who.host == host()
    }
}

fn name(hello: &Hello) -> String {
    format!("rank {} (process {} on {})", hello.rank, hello.who.pid, hello.who.host)
}

/// The name of this machine.
pub fn host() -> String {
    let mut name = [0u8; 256];
    // SAFETY: the buffer has as many bytes as are named.
    let answer = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) };
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    if answer == 0 { String::from_utf8_lossy(&name[..end]).into_owned() } else { "this machine".into() }
}
