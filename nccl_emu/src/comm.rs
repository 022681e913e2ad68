//! Communicators: what state they are in, how they end, and how one batch is exchanged.
//!
//! A communicator has one connection, to the [`hub`](crate::hub), and a thread that reads from it, so that a failure of
//! another rank is known at once. Calls that take their time run in threads of their own; a communicator that is not
//! blocking does not wait for them.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::io::{self, BufReader};
use std::net::{Shutdown, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use crate::call::Call;
use crate::codes::{Answer, Code, Refusal, refusal, refuse};
use crate::driver;
use crate::hub::{self, spawn};
use crate::settings::{Failure, Log, Peers, Planned, Settings, log, settings};
use crate::wire::{self, Bye, Hello, Meeting, ToRank, Who};

/// How long a connection may take to come about.
const CONNECTING: Duration = Duration::from_secs(10);

/// How long an abort waits for batches under way, which end at once unless a stream has other work before them.
const ABORTING: Duration = Duration::from_secs(1);

pub struct Comm {
    pub handle: usize,
    pub rank: u32,
    pub size: u32,
    pub blocking: bool,
    pub context: usize,
    pub device: c_int,
    uuid: [u8; 16],
    settings: &'static Settings,
    /// The thread that is in a function of this communicator, and in which.
    inside: Mutex<Option<(ThreadId, &'static str)>>,
    /// The thread whose open group has calls of this communicator.
    grouped: Mutex<Option<ThreadId>>,
    socket: OnceLock<TcpStream>,
    /// Held while a batch is exchanged.
    turn: Mutex<()>,
    /// Calls numbered so far.
    calls: AtomicU64,
    /// Captured batches whose graphs are there.
    captured: AtomicUsize,
    /// Page-locked memory for reuse, by its [`Way`].
    blocks: [Mutex<Vec<Block>>; 2],
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What runs in the background.
    busy: Option<&'static str>,
    error: Option<Refusal>,
    end: Option<End>,
    /// What the calls under way get.
    answer: Option<Vec<u8>>,
    /// Batches given to a stream and not over, and the stream.
    under_way: usize,
    stream: usize,
    /// There is a connection to the hub.
    connected: bool,
    /// There no longer is one, since all ranks of its process have ended in order.
    left: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Finalised,
    Destroyed,
    Aborted,
}

/// Page-locked memory.
pub struct Block {
    pub start: *mut u8,
    pub bytes: usize,
    way: Way,
}

/// Which way data takes through a block. Each has blocks of its own: the emulator knows which bytes of device memory
/// have been written, and a copy from there takes that along, while it does not see what the host writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    Out,
    In,
}

// SAFETY: any thread may use the memory, which is the driver's and not bound to one.
unsafe impl Send for Block {}
// SAFETY: a block is an address; whoever uses what is there says why nobody else does at that time.
unsafe impl Sync for Block {}

impl Block {
    /// No memory at all.
    pub fn empty(way: Way) -> Block {
        Block { start: std::ptr::NonNull::dangling().as_ptr(), bytes: 0, way }
    }
}

/// A call of a batch and how many bytes it gives away and gets.
#[derive(Clone, Copy)]
pub struct Part {
    pub call: Call,
    pub sends: usize,
    pub receives: usize,
}

/// The calling thread is inside a function until this is dropped.
pub struct Inside(Arc<Comm>);

impl Drop for Inside {
    fn drop(&mut self) {
        *lock(&self.0.inside) = None;
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Handles look like addresses, and none is used twice, so that one that is no longer valid is recognised.
const FIRST: usize = 0xecc1_0000_0000;
const STEP: usize = 64;
static COMMS: Mutex<(usize, BTreeMap<usize, Arc<Comm>>)> = Mutex::new((FIRST, BTreeMap::new()));

/// The communicator of a handle.
pub fn find(handle: *mut c_void) -> Answer<Arc<Comm>> {
    let comms = lock(&COMMS);
    match comms.1.get(&handle.addr()) {
        Some(comm) => Ok(comm.clone()),
        None if handle.is_null() => refuse(Code::ARGUMENT, "the communicator is null"),
        None if (FIRST..comms.0).contains(&handle.addr()) => {
            refuse(Code::ARGUMENT, "the communicator is used after it was destroyed or aborted")
        }
        None => refuse(Code::ARGUMENT, format!("{handle:p} was never a communicator of this library")),
    }
}

impl Comm {
    /// A communicator of the current context's device that has yet to connect.
    pub fn new(rank: c_int, size: c_int, blocking: bool) -> Answer<Arc<Comm>> {
        let (Ok(of_rank), Ok(of_size)) = (u32::try_from(rank), u32::try_from(size)) else {
            return refuse(Code::ARGUMENT, format!("rank {rank} of {size}: neither may be negative"));
        };
        if of_rank >= of_size {
            return refuse(Code::ARGUMENT, format!("rank {rank} of {size}: ranks are numbered from 0 to {}", size - 1));
        }
        let settings = settings()?;
        let context = driver::current_context()?;
        let (device, uuid) = driver::current_device()?;
        let mut comms = lock(&COMMS);
        let handle = comms.0;
        comms.0 += STEP;
        let comm = Arc::new(Comm {
            handle,
            rank: of_rank,
            size: of_size,
            blocking,
            context,
            device,
            uuid,
            settings,
            inside: Mutex::default(),
            grouped: Mutex::default(),
            socket: OnceLock::new(),
            turn: Mutex::default(),
            calls: AtomicU64::new(0),
            captured: AtomicUsize::new(0),
            blocks: Default::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        comms.1.insert(handle, comm.clone());
        Ok(comm)
    }

    /// Forgets it: its handle is no longer valid.
    pub fn forget(&self) {
        lock(&COMMS).1.remove(&self.handle);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The calling thread enters a function, in which no other may be.
    pub fn enter(self: &Arc<Self>, function: &'static str) -> Answer<Inside> {
        let here = std::thread::current().id();
        let mut inside = lock(&self.inside);
        if let Some((thread, other)) = *inside {
            let what = format!(
                "two threads are in the communicator of rank {} at once, {thread:?} in {other} and {here:?} in \
                 {function}",
                self.rank
            );
            return refuse(Code::USAGE, what);
        }
        if let Some(thread) = *lock(&self.grouped)
            && thread != here
        {
            let what = format!(
                "{here:?} calls {function} while {thread:?} has a group open with calls of the same communicator, of \
                 rank {}",
                self.rank
            );
            return refuse(Code::USAGE, what);
        }
        *inside = Some((here, function));
        Ok(Inside(self.clone()))
    }

    /// The open group of the calling thread has calls of it, or no group has any longer.
    pub fn set_grouped(&self, grouped: bool) {
        *lock(&self.grouped) = grouped.then(|| std::thread::current().id());
    }

    fn refuse_in_a_group(&self, function: &str) -> Answer {
        match *lock(&self.grouped) {
            None => Ok(()),
            Some(_) => refuse(
                Code::USAGE,
                format!("{function} of rank {} while a group with calls of it is open: end the group first", self.rank),
            ),
        }
    }

    /// Refuses a call for which the communicator is in the wrong state.
    pub fn ready(&self, function: &str) -> Answer {
        let state = self.state();
        let rank = self.rank;
        if let Some(error) = &state.error {
            let why = &error.message;
            let what = format!("{function}: the communicator of rank {rank} has failed and can only be aborted: {why}");
            return refuse(error.code, what);
        }
        if let Some(busy) = state.busy {
            let what = format!(
                "{function} of rank {rank} while {busy} is in progress: wait until ncclCommGetAsyncError no longer says so"
            );
            return refuse(Code::ARGUMENT, what);
        }
        match state.end {
            None => Ok(()),
            Some(_) => refuse(Code::ARGUMENT, format!("{function}: the communicator of rank {rank} has ended")),
        }
    }

    /// What `ncclCommGetAsyncError` says.
    pub fn status(&self) -> Code {
        let state = self.state();
        match (&state.error, state.busy) {
            (Some(error), _) => error.code,
            (None, Some(_)) => Code::IN_PROGRESS,
            (None, None) => Code::SUCCESS,
        }
    }

    /// Why it has failed.
    pub fn failure(&self) -> Option<Refusal> {
        self.state().error.clone()
    }

    /// Notes the first failure.
    pub fn fail(&self, refusal: Refusal) {
        let mut state = self.state();
        if state.end.is_none() && state.error.is_none() {
            if log() != Log::None {
                eprintln!("nccl_emu: rank {} fails with {}: {}", self.rank, refusal.code.0, refusal.message);
            }
            state.error = Some(refusal);
        }
        self.changed.notify_all();
    }

    /// Does `work` in a thread of its own. Until it is done, a communicator that does not block is busy with `what`.
    pub fn start(
        self: &Arc<Self>,
        what: &'static str,
        work: impl FnOnce(&Arc<Comm>) -> Answer + Send + 'static,
    ) -> Answer<JoinHandle<Answer>> {
        if !self.blocking {
            self.state().busy = Some(what);
        }
        let comm = self.clone();
        let started = spawn("nccl_emu rank", move || {
            let done = catch_unwind(AssertUnwindSafe(|| work(&comm)));
            let done = done.unwrap_or_else(|_| refuse(Code::INTERNAL, format!("{what} has panicked")));
            if let Err(refusal) = &done {
                comm.fail(refusal.clone());
            }
            comm.state().busy = None;
            comm.changed.notify_all();
            done
        });
        if started.is_err() {
            self.state().busy = None;
        }
        started
    }

    /// Waits until `pick` finds something, or the communicator has failed or is aborted.
    fn wait<T>(&self, mut pick: impl FnMut(&mut State) -> Option<T>) -> Answer<T> {
        let mut state = self.state();
        loop {
            if let Some(found) = pick(&mut state) {
                return Ok(found);
            }
            self.check(&state)?;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Refuses to go on with a communicator that has failed or ended.
    fn check(&self, state: &State) -> Answer {
        match (&state.error, state.end) {
            (_, Some(end)) => {
                let how = match end {
                    End::Finalised => "finalised",
                    End::Destroyed => "destroyed",
                    End::Aborted => "aborted",
                };
                refuse(Code::USAGE, format!("the communicator of rank {} was {how}", self.rank))
            }
            (Some(error), None) => Err(error.clone()),
            (None, None) => Ok(()),
        }
    }

    /// The same now.
    pub fn still_there(&self) -> Answer {
        self.check(&self.state())
    }

    /// Meets the other ranks.
    pub fn connect(self: &Arc<Self>, meeting: Meeting) -> Answer {
        self.fail_on_demand(0..1)?;
        let address = meeting.address.ip();
        if !address.is_loopback() && !self.settings.addresses.contains(&address) {
            let what = format!(
                "the id says that ranks meet at {address}, which is no loopback address: set NCCL_EMU_ADDRESS={address} for \
                 every rank"
            );
            return refuse(Code::ARGUMENT, what);
        }
        let lost = |e: io::Error| {
            let what = format!(
                "nobody is at {}, where the id says that ranks meet ({e}): the process that made it is gone, or on \
                 another machine",
                meeting.address
            );
            refusal(Code::SYSTEM, what)
        };
        let stream = TcpStream::connect_timeout(&meeting.address, CONNECTING).map_err(lost)?;
        stream.set_nodelay(true).map_err(lost)?;
        let mut from = BufReader::new(stream.try_clone().map_err(lost)?);
        let mut socket = self.socket.get_or_init(|| stream);
        // An abort meanwhile has found no socket to close.
        self.still_there()?;
        let who = Who {
            pid: std::process::id(),
            host: hub::host(),
            machine: machine(self.settings),
            device: self.device,
            uuid: self.uuid,
            shares: self.settings.several_ranks_per_gpu,
        };
        let (rank, size, version) = (self.rank, self.size, self.settings.version);
        Hello { token: meeting.token, rank, size, version, who }.write(&mut socket).map_err(lost)?;
        loop {
            match ToRank::read(&mut from).map_err(lost)? {
                ToRank::Welcome { pid, host, ranks } => {
                    self.state().connected = true;
                    let comm = self.clone();
                    spawn("nccl_emu rank, reading", move || comm.listen(from, pid, &host, ranks))?;
                    return Ok(());
                }
                ToRank::Failure(refusal) => return Err(refusal),
                ToRank::Results(_) | ToRank::Ended { .. } => {}
            }
        }
    }

    /// Takes what the hub says, until the connection ends.
    fn listen(&self, mut from: BufReader<TcpStream>, pid: u32, host: &str, ranks: u32) {
        let mut ended = 0;
        loop {
            match ToRank::read(&mut from) {
                Ok(ToRank::Results(results)) => {
                    self.state().answer = Some(results);
                    self.changed.notify_all();
                }
                Ok(ToRank::Failure(refusal)) => self.fail(refusal),
                Ok(ToRank::Ended { with_hub }) => ended += u32::from(with_hub),
                Ok(ToRank::Welcome { .. }) => {}
                Err(_) => break,
            }
        }
        // The process of the hub may end when its own ranks have: for the others nothing is left but to end, too.
        let left = ranks > 0 && ended == ranks;
        {
            let mut state = self.state();
            (state.connected, state.left) = (false, left);
            self.changed.notify_all();
        }
        if !left && self.settings.peers == Peers::Error {
            let what = format!("process {pid} on {host}, in which the ranks meet, is gone");
            self.fail(refusal(Code::REMOTE, what));
        }
    }

    /// Numbers for `count` calls; returns the first.
    pub fn number(&self, count: usize) -> u64 {
        self.calls.fetch_add(count as u64, Ordering::Relaxed) + 1
    }

    /// A batch is about to be given to a stream. Batches of another stream must be over, so that all ranks exchange
    /// them in the order of the calls.
    pub fn begin_batch(&self, stream: usize) -> Answer {
        self.still_there()?;
        self.wait(|state| {
            let free = state.under_way == 0 || state.stream == stream;
            free.then(|| (state.under_way, state.stream) = (state.under_way + 1, stream))
        })
    }

    /// A stream has passed a batch.
    pub fn end_batch(&self) {
        self.state().under_way -= 1;
        self.changed.notify_all();
    }

    /// A captured batch has come into a graph, or its graphs are gone.
    pub fn count_captured(&self, more: bool) {
        if more {
            self.captured.fetch_add(1, Ordering::Relaxed);
        } else {
            self.captured.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Exchanges one batch with the other ranks: `outgoing` and `incoming` are what its calls give away and get, one
    /// behind the other.
    pub fn exchange(&self, parts: &[Part], outgoing: &mut [u8], incoming: &mut [u8]) -> Answer {
        let _turn = lock(&self.turn);
        self.still_there()?;
        let (Some(first), Some(last)) = (parts.first(), parts.last()) else { return Ok(()) };
        let corrupt = self.fail_on_demand(first.call.number..last.call.number + 1)?;
        let corrupt = corrupt.and_then(|number| parts.iter().position(|part| part.call.number == number));
        if let Some(at) = corrupt.filter(|&at| parts[at].receives == 0) {
            let before: usize = parts[..at].iter().map(|part| part.sends).sum();
            flip(&mut outgoing[before..], &parts[at].call);
        }
        if log() == Log::Calls {
            for Part { call, .. } in parts {
                eprintln!("nccl_emu: rank {} {} in its call {}", self.rank, call.words(), call.number);
            }
        }
        let Some(mut socket) = self.socket.get() else {
            return refuse(Code::INTERNAL, format!("rank {} exchanges before it is connected", self.rank));
        };
        self.state().answer = None;
        let calls: Vec<(Call, usize)> = parts.iter().map(|part| (part.call, part.sends)).collect();
        // The thread that reads from the connection finds out if it is broken, and the settings say what then happens.
        let _ = wire::write_calls(&mut socket, &calls, outgoing);
        let arrived = self.wait(|state| state.answer.take().map(Some).or(state.left.then_some(None)))?;
        let Some(results) = arrived else {
            let (asked, number) = (first.call.words(), first.call.number);
            let what =
                format!("rank {} {asked} in its call {number}, but other ranks have ended their part", self.rank);
            return refuse(Code::USAGE, what);
        };
        if results.len() != incoming.len() {
            let what = format!("{} bytes arrive for {} of rank {}", results.len(), incoming.len(), self.rank);
            return refuse(Code::INTERNAL, what);
        }
        incoming.copy_from_slice(&results);
        if let Some(at) = corrupt.filter(|&at| parts[at].receives > 0) {
            let before: usize = parts[..at].iter().map(|part| part.receives).sum();
            flip(&mut incoming[before..], &parts[at].call);
        }
        Ok(())
    }

    /// Does what `NCCL_EMU_FAIL` asks for at one of these calls. Returns the number of one whose data is to be wrong.
    fn fail_on_demand(&self, calls: std::ops::Range<u64>) -> Answer<Option<u64>> {
        let mut corrupt = None;
        let here = |planned: &&Planned| planned.rank == self.rank && calls.contains(&planned.call);
        for planned in self.settings.failures.iter().filter(here) {
            match planned.what {
                Failure::Kill => {
                    // SAFETY: ends this process, as was asked for; nothing is undone.
                    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
                }
                Failure::Hang => self.wait(|_| None::<()>)?,
                Failure::Error => {
                    let what = format!("rank {} fails at call {}, as NCCL_EMU_FAIL asks", self.rank, planned.call);
                    return refuse(Code::SYSTEM, what);
                }
                Failure::Slow(duration) => self.sleep(duration)?,
                Failure::Corrupt => corrupt = Some(planned.call),
            }
        }
        Ok(corrupt)
    }

    /// Sleeps, unless the communicator ends.
    fn sleep(&self, duration: Duration) -> Answer {
        let until = Instant::now() + duration;
        let mut state = self.state();
        loop {
            self.check(&state)?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Page-locked memory of at least `bytes` bytes.
    pub fn take_block(&self, way: Way, bytes: usize) -> Answer<Block> {
        if bytes == 0 {
            return Ok(Block::empty(way));
        }
        let mut blocks = lock(&self.blocks[way as usize]);
        let fits = |block: &Block| (bytes..=bytes.saturating_mul(4).max(4096)).contains(&block.bytes);
        if let Some(at) = blocks.iter().position(fits) {
            return Ok(blocks.swap_remove(at));
        }
        let bytes = bytes.max(4096);
        Ok(Block { start: driver::within(self.context, || driver::alloc_host(bytes))?, bytes, way })
    }

    /// Keeps it for the next batch. What comes back after the end stays allocated as long as the context: whoever
    /// returns it may not call the driver.
    pub fn give_block(&self, block: Block) {
        if block.bytes > 0 {
            lock(&self.blocks[block.way as usize]).push(block);
        }
    }

    /// Gives the memory back to the driver.
    fn free_blocks(&self) {
        let blocks: Vec<Block> = self.blocks.iter().flat_map(|blocks| std::mem::take(&mut *lock(blocks))).collect();
        // A context that is gone has freed it.
        let _ = driver::within(self.context, || {
            blocks.iter().try_for_each(|block| {
                // SAFETY: from `alloc_host`, and whoever gave the block back uses it no more.
                unsafe { driver::free_host(block.start) }
            })
        });
    }

    fn refuse_while_captured(&self, function: &str) -> Answer {
        match self.captured.load(Ordering::Relaxed) {
            0 => Ok(()),
            captured => refuse(
                Code::USAGE,
                format!(
                    "{function} of rank {} while graphs have {captured} of its captured calls: NCCL would wait for their \
                     end; destroy the graphs first",
                    self.rank
                ),
            ),
        }
    }

    /// What `ncclCommFinalize` checks.
    pub fn may_finalise(&self) -> Answer {
        const FUNCTION: &str = "ncclCommFinalize";
        self.ready(FUNCTION)?;
        self.refuse_in_a_group(FUNCTION)?;
        self.refuse_while_captured(FUNCTION)
    }

    /// Waits for the batches under way and takes leave of the other ranks.
    pub fn finalise(&self) -> Answer {
        self.wait(|state| (state.under_way == 0).then_some(()))?;
        self.still_there()?;
        self.state().end = Some(End::Finalised);
        if let Some(mut socket) = self.socket.get() {
            // If the connection is broken, there is nobody to take leave of.
            let _ = wire::write_bye(&mut socket, Bye::Ended);
            let _ = socket.shutdown(Shutdown::Write);
        }
        // The hub hangs up when the other ranks have been told.
        let waits = |state: &mut State| state.connected && state.end == Some(End::Finalised);
        drop(self.changed.wait_while(self.state(), waits).unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// `ncclCommDestroy`.
    pub fn destroy(&self) -> Answer {
        const FUNCTION: &str = "ncclCommDestroy";
        self.refuse_in_a_group(FUNCTION)?;
        self.refuse_while_captured(FUNCTION)?;
        let finalised = {
            let state = self.state();
            state.end == Some(End::Finalised) && state.busy.is_none()
        };
        if !finalised {
            self.ready(FUNCTION)?;
            self.finalise()?;
        }
        self.state().end = Some(End::Destroyed);
        self.forget();
        self.free_blocks();
        Ok(())
    }

    /// `ncclCommAbort`.
    pub fn abort(&self) -> Answer {
        self.refuse_in_a_group("ncclCommAbort")?;
        {
            let mut state = self.state();
            state.end = Some(End::Aborted);
            self.changed.notify_all();
        }
        self.forget();
        if let Some(mut socket) = self.socket.get() {
            // In the middle of a batch, the others see the connection end.
            if let Ok(_turn) = self.turn.try_lock() {
                let _ = wire::write_bye(&mut socket, Bye::Aborted);
            }
            let _ = socket.shutdown(Shutdown::Both);
        }
        let at_work = |state: &mut State| state.under_way > 0 || state.busy.is_some();
        let waited = self.changed.wait_timeout_while(self.state(), ABORTING, at_work);
        if waited.is_ok_and(|(_, waited)| !waited.timed_out()) {
            self.free_blocks();
        }
        Ok(())
    }
}

/// Makes data wrong without making it NaN: a high bit of the first element's fraction.
fn flip(data: &mut [u8], call: &Call) {
    let at = (call.dtype.size() as usize).saturating_sub(2);
    if let Some(byte) = data.get_mut(at) {
        *byte ^= 0x40;
    }
}

/// What tells machines apart: as NCCL's own variable says, or else name and network, since each network namespace
/// stands for a machine of its own.
fn machine(settings: &Settings) -> String {
    settings.host_id.clone().unwrap_or_else(|| {
        let network =
            std::fs::read_link("/proc/self/ns/net").map_or_else(|_| String::new(), |at| at.display().to_string());
        format!("{} {network}", hub::host())
    })
}
