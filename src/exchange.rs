//! What the ranks of a run give each other: bytes, and nothing is added on the way.
//!
//! A run on several devices has a rank for each. All of them make the same calls in the same order, and a call returns
//! when every rank has made it, or on a GPU when its work is in the stream. Whoever receives terms of a sum adds them
//! itself, in an order that knows no ranks (`ops::tree_sum`). So no result depends on how the bytes travelled.
//!
//! A run of one rank exchanges nothing. Ranks that are processes ([`distributed`](crate::distributed)) exchange what is
//! on GPUs through NCCL, and what is on hosts, or of ranks without GPUs, over their connection to rank 0. Ranks that
//! are threads of one process, each with a device of its own, meet in its memory: everything that depends on the number
//! of ranks can be tested with them, on any device.
//!
//! Ranks of several machines exchange in two levels ([`Exchange::levels`]): first those of a machine among themselves,
//! then those of the same number of all machines. So no more bytes leave a machine than one of its ranks has, however
//! many it has.
//!
//! The exception is for whoever asks for it: [`Sums::Nccl`].
//!
//! Deliberately absent: messages from one rank to another.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bytemuck::Pod;

use crate::device::Device;
use crate::device::cuda::nccl::{self, Communicator, Id, Patience};
use crate::distributed::Control;
use crate::error::{Error, Result};
use crate::names::names;
use crate::tensor::{DType, Tensor};
use crate::usage;

/// How ranks add up their gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sums {
    /// Each shard's owner, along a fixed tree: the bits of one rank.
    #[default]
    Tree,
    /// NCCL on the way (`ncclAllReduce`): bits that depend on the number of GPUs, on how they are connected, and on
    /// NCCL's version.
    Nccl,
}

names!(Sums { Tree = "tree", Nccl = "nccl" });

/// A rank's part in the exchange. Dropping it ends the rank: the others' calls fail from then on.
pub struct Exchange {
    rank: usize,
    size: usize,
    /// Ranks of each machine; all of them if the machines cannot be told apart in levels.
    of_machine: usize,
    sums: Sums,
    way: Way,
}

enum Way {
    /// There is no other rank.
    Alone,
    /// The ranks are threads of this process.
    Threads(Arc<Meeting>),
    /// The ranks are processes, on GPUs with NCCL.
    Processes(Arc<Control>, Option<Nccl>),
}

/// How long what all do alone, such as saving a checkpoint, may take.
const LONGEST_WORK: Duration = Duration::from_secs(3600);
/// For the connection to say why NCCL has failed: it is another rank, most often.
const HINDSIGHT: Duration = Duration::from_secs(2);

impl Exchange {
    /// That of a run of one rank.
    pub fn alone() -> Self {
        Exchange { rank: 0, size: 1, of_machine: 1, sums: Sums::Tree, way: Way::Alone }
    }

    /// Those of `size` ranks, each for a thread of its own.
    pub fn threads(size: usize) -> Vec<Self> {
        Exchange::threads_as_machines(1, size)
    }

    /// The same, which exchange as if they were the ranks of so many machines, equally many of each.
    pub fn threads_as_machines(machines: usize, size: usize) -> Vec<Self> {
        let of_machine = machine_of(&vec![size / machines; machines]);
        let given = (0..size).map(|_| None).collect();
        let meeting = Meeting { state: Mutex::new(State { given, taken: 0, ended: None }), changed: Condvar::new() };
        let meeting = Arc::new(meeting);
        let way = || Way::Threads(meeting.clone());
        (0..size).map(|rank| Exchange { rank, size, of_machine, sums: Sums::Tree, way: way() }).collect()
    }

    /// That of a process which has met the others and computes on `device`. `wait` is the longest that one of them may
    /// work on its own between two exchanges of GPUs.
    ///
    /// # Errors
    /// A GPU and no NCCL, or one that fails; [`Sums::Nccl`] without GPUs; another rank that has failed.
    pub fn processes(control: Arc<Control>, device: &Device, wait: Duration, sums: Sums) -> Result<Self> {
        let (rank, size) = (control.rank(), control.size());
        let nccl = match device {
            Device::Cuda(gpu) if size > 1 => {
                let id = if rank == 0 { nccl::unique_id()?.to_vec() } else { Vec::new() };
                let id: Id = control.broadcast("what NCCL meets by", &id)?.try_into().map_err(|id: Vec<u8>| {
                    Error::Failed(format!("rank 0 has sent {} bytes for NCCL to meet by, not 128", id.len()))
                })?;
                let patience = Patience { limit: wait, cancel: control.failed() };
                let communicator = Communicator::new(gpu, rank, size, &id, patience);
                Some(Nccl::new(communicator.map_err(|e| verdict(&control, e))?, &control))
            }
            _ => None,
        };
        if sums == Sums::Nccl && nccl.is_none() {
            usage!("--exchange nccl: NCCL adds up what is on several GPUs, and these are {size} ranks on {device}");
        }
        let of_machine = machine_of(&control.machines().iter().map(Range::len).collect::<Vec<usize>>());
        Ok(Exchange { rank, size, of_machine, sums, way: Way::Processes(control, nccl) })
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The ranks that this one exchanges with, itself among them, one level after the other: those of its machine, then
    /// those of its number on all machines; where there is one machine, or its ranks are no node of the tree that adds
    /// their sums ([`tree_sum`](crate::ops::tree_sum)), all at once. At each level a rank gets a smaller part of what
    /// all have.
    pub fn levels(&self) -> Vec<Vec<usize>> {
        let (size, of_machine) = (self.size, self.of_machine);
        let first = self.rank - self.rank % of_machine;
        let inside = (first..first + of_machine).collect();
        let across = (self.rank % of_machine..size).step_by(of_machine).collect();
        [inside, across].into_iter().filter(|level: &Vec<usize>| level.len() > 1).collect()
    }

    /// Which of as many equal shards as there are ranks this one owns: the part that it has after the last level.
    pub fn shard(&self) -> usize {
        let machines = self.size / self.of_machine;
        self.rank % self.of_machine * machines + self.rank / self.of_machine
    }

    /// True for rank 0, which writes the run's files and speaks for all.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Why what is exchanged has to pass the host, so that it cannot be part of a CUDA graph; `None` if it has not.
    pub fn passes_the_host(&self) -> Option<&'static str> {
        match self.way {
            Way::Alone | Way::Processes(_, Some(_)) => None,
            Way::Threads(_) => Some("the ranks of the run are threads, which exchange through the host's memory"),
            Way::Processes(_, None) => Some("the ranks of the run exchange without NCCL, through the host's memory"),
        }
    }

    /// What each rank gives, from host to host. They may give different numbers of `T`.
    ///
    /// # Errors
    /// A rank that has ended, or that makes another call; likewise for every function here.
    pub fn gather<T: Pod>(&self, own: &[T]) -> Result<Vec<Vec<T>>> {
        let all = self.meet("gather", None, bytemuck::cast_slice(own))?;
        Ok(all.iter().map(|bytes| bytemuck::pod_collect_to_vec(bytes)).collect())
    }

    /// What each rank gives in `call`, where it matters of shards of so many elements.
    fn meet(&self, call: &'static str, shard: Option<usize>, own: &[u8]) -> Result<Vec<Arc<[u8]>>> {
        match &self.way {
            Way::Alone => Ok(vec![own.into()]),
            Way::Threads(meeting) => meeting.meet(self.rank, call, shard, own),
            Way::Processes(control, _) => meet_processes(control, call, shard, own),
        }
    }

    /// Whether all do the step of this number, which is greater than the last one. They stop after the same step, once
    /// `stop` is set on one of them, or one of processes has asked for it ([`Control::ask_to_stop`]).
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn goes_on(&self, step: u32, stop: &AtomicBool) -> Result<bool> {
        let stop = stop.load(Ordering::Relaxed);
        match &self.way {
            Way::Alone => Ok(!stop),
            Way::Threads(_) => Ok(!self.any(stop)?),
            Way::Processes(control, _) => {
                if stop {
                    control.ask_to_stop(1, "it was told to");
                }
                Ok(control.next(step)?.is_none())
            }
        }
    }

    /// Does `work` on the first rank alone, while the others wait for it; it may take long, such as saving.
    ///
    /// # Errors
    /// What it returns; see [`gather`](Self::gather).
    pub fn first_alone<T>(&self, what: &str, work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        let announced = match &self.way {
            Way::Processes(control, _) if self.is_first() => Some(control.announce(what, LONGEST_WORK)),
            _ => None,
        };
        let done = self.is_first().then(work).transpose();
        drop(announced);
        // Ranks that wait for one that has failed are told so when it ends.
        let done = done?;
        self.meet("first_alone", None, &[])?;
        Ok(done)
    }

    /// What a failure of this rank really is: that of another one, if it is behind an exchange that has failed.
    pub fn verdict(&self, error: Error) -> Error {
        match &self.way {
            Way::Processes(control, Some(nccl)) if nccl.communicator.is_given_up() => verdict(control, error),
            Way::Processes(control, _) => control.check().err().unwrap_or(error),
            Way::Alone | Way::Threads(_) => error,
        }
    }

    /// The last call of a rank that has done all its work: waits for the others. What it has launched must be gone.
    ///
    /// # Errors
    /// See [`gather`](Self::gather): the run has failed after all.
    pub fn leave(mut self) -> Result<()> {
        let Way::Processes(control, nccl) = &mut self.way else { return Ok(()) };
        if let Some(nccl) = nccl.take() {
            nccl.close().map_err(|e| verdict(control, e))?;
        }
        control.leave()
    }

    /// Whether one of the ranks says so.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn any(&self, own: bool) -> Result<bool> {
        Ok(self.gather(&[u8::from(own)])?.concat().contains(&1))
    }

    /// The text of each rank.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn texts(&self, own: &str) -> Result<Vec<String>> {
        let texts = self.gather(own.as_bytes())?;
        Ok(texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect())
    }

    /// How gradients are added up.
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// Adds `x` up over all ranks, where it is, and copies the [shard](Self::shard) of this rank to `shard`: with
    /// [`Sums::Nccl`] alone.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn all_reduce(&self, x: &mut Tensor, shard: &mut Tensor) -> Result<()> {
        let Way::Processes(control, Some(nccl)) = &self.way else { panic!("NCCL adds up what is on several GPUs") };
        let (len, part) = (x.shape().len(), shard.shape().len());
        assert_eq!(len, part * self.size, "all_reduce: {x:?} and a shard {shard:?}");
        let first = self.shard() * part;
        let reduced = nccl.communicator.all_reduce(x.view_mut(0..len)).and_then(|()| {
            // A rank that sends to itself copies.
            nccl.communicator.all_to_all(shard.view_mut(0..part), x.view(first..first + part), &[self.rank])
        });
        reduced.map_err(|e| verdict(control, e))
    }

    /// Sends part k of `from` to the k-th of the ranks of a level, and puts what comes from it into part k of `to`.
    /// Both have as many equal parts as these are, f32.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn all_to_all(&self, from: &Tensor, to: &mut Tensor, level: &[usize]) -> Result<()> {
        let (len, place) = (from.shape().len(), self.place(level));
        let part = len / level.len();
        let equal = from.dtype() == DType::F32 && to.dtype() == DType::F32 && len == part * level.len();
        assert!(equal && to.shape().len() == len, "all_to_all of {} parts: {from:?} to {to:?}", level.len());
        if let Way::Processes(control, Some(nccl)) = &self.way {
            let done = nccl.communicator.all_to_all(to.view_mut(0..len), from.view(0..len), level);
            return done.map_err(|e| verdict(control, e));
        }
        let all = self.meet("all_to_all", Some(part), bytemuck::cast_slice(&from.host()?))?;
        let parts = level.iter().flat_map(|&rank| &all[rank][4 * place * part..][..4 * part]);
        to.write(&bytemuck::pod_collect_to_vec::<u8, f32>(&parts.copied().collect::<Vec<u8>>()))
    }

    /// Gives every rank all of `x`, f32, of which each has the [shard](Self::shard) that it owns at its place, of as
    /// many equal ones as there are ranks.
    ///
    /// # Errors
    /// See [`gather`](Self::gather).
    pub fn all_gather(&self, x: &mut Tensor) -> Result<()> {
        let (len, levels) = (x.shape().len(), self.levels());
        assert!(x.dtype() == DType::F32 && len.is_multiple_of(self.size), "{x:?} in {} shards", self.size);
        // What the ranks of each level share out among themselves.
        let mut whole = 0..len;
        let mut shared_out = Vec::new();
        for level in &levels {
            let part = whole.len() / level.len();
            let start = whole.start + self.place(level) * part;
            shared_out.push((level, whole));
            whole = start..start + part;
        }
        shared_out.into_iter().rev().try_for_each(|(level, whole)| self.gather_level(x, whole, level))
    }

    /// Gives the ranks of a level all of the elements `whole`, of which the k-th of them has part k.
    fn gather_level(&self, x: &mut Tensor, whole: Range<usize>, level: &[usize]) -> Result<()> {
        if let Way::Processes(control, Some(nccl)) = &self.way {
            let done = nccl.communicator.all_gather(x.view_mut(whole), level);
            return done.map_err(|e| verdict(control, e));
        }
        let (mut host, part) = (x.host()?.into_owned(), whole.len() / level.len());
        let own = &host[whole.start + self.place(level) * part..][..part];
        let all = self.meet("all_gather", Some(part), bytemuck::cast_slice(own))?;
        let parts: Vec<u8> = level.iter().flat_map(|&rank| all[rank].iter().copied()).collect();
        host[whole].copy_from_slice(&bytemuck::pod_collect_to_vec::<u8, f32>(&parts));
        x.write(&host)
    }

    /// The own place in a level.
    fn place(&self, level: &[usize]) -> usize {
        level.iter().position(|&rank| rank == self.rank).expect("a rank is in its levels")
    }
}

/// Ranks of a machine, of machines with so many each, where each machine's are a node of the tree that adds all ranks'
/// sums; otherwise all ranks.
fn machine_of(ranks: &[usize]) -> usize {
    let alike = ranks[0].is_power_of_two() && ranks.iter().all(|&of_machine| of_machine == ranks[0]);
    if alike { ranks[0] } else { ranks.iter().sum() }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        match &self.way {
            Way::Threads(meeting) => meeting.end(self.rank),
            Way::Processes(_, Some(nccl)) => nccl.closed.store(true, Ordering::Relaxed),
            Way::Alone | Way::Processes(_, None) => {}
        }
    }
}

/// NCCL's way, and the thread that ends waits in it once the run has failed.
struct Nccl {
    communicator: Communicator,
    closed: Arc<AtomicBool>,
}

impl Nccl {
    fn new(communicator: Communicator, control: &Control) -> Self {
        let closed = Arc::new(AtomicBool::new(false));
        let (failed, aborter, ended) = (control.failed(), communicator.aborter(), closed.clone());
        let watch = move || {
            while !ended.load(Ordering::Relaxed) {
                if failed.load(Ordering::Acquire) {
                    // If NCCL does not let go, the connection's last resort ends the process.
                    aborter.abort("another rank has failed");
                    return;
                }
                thread::sleep(Duration::from_millis(50));
            }
        };
        // Without this thread waits end all the same where they ask NCCL, and with the last resort elsewhere.
        let _ = thread::Builder::new().name("nccl watch".into()).spawn(watch);
        Nccl { communicator, closed }
    }

    /// Takes leave of the other ranks.
    fn close(self) -> Result<()> {
        self.closed.store(true, Ordering::Relaxed);
        self.communicator.close()
    }
}

/// Why an exchange has failed: what the connection says, which hears of another rank's failure a little later than NCCL
/// may.
fn verdict(control: &Control, error: Error) -> Error {
    let since = Instant::now();
    loop {
        match control.check() {
            Err(why) => return why,
            Ok(()) if since.elapsed() > HINDSIGHT => return error,
            Ok(()) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// The bytes of each process: they come together at rank 0, which sends all of them, each behind its length.
fn meet_processes(control: &Control, call: &str, shard: Option<usize>, own: &[u8]) -> Result<Vec<Arc<[u8]>>> {
    let call = shard.map_or(call.to_string(), |shard| format!("{call} of shards of {shard} elements"));
    let all = control.gather(&call, own)?.unwrap_or_default();
    let framed: Vec<u8> = all.iter().flat_map(|bytes| [&bytes.len().to_le_bytes(), &bytes[..]].concat()).collect();
    let framed = control.broadcast(&call, &framed)?;
    let mut rest = &framed[..];
    let mut next = || {
        let (len, behind) = rest.split_first_chunk::<{ size_of::<usize>() }>()?;
        let (bytes, behind) = behind.split_at_checked(usize::from_le_bytes(*len))?;
        rest = behind;
        Some(bytes.into())
    };
    (0..control.size()).map(|_| next()).collect::<Option<_>>().ok_or_else(|| {
        Error::Failed(format!("rank 0 has sent {} bytes in {call}, which are not those of all ranks", framed.len()))
    })
}

/// Where the threads of a process meet.
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What each rank has given in the call under way.
    given: Vec<Option<Given>>,
    /// Ranks that have taken what all have given.
    taken: usize,
    /// The first rank that has ended.
    ended: Option<usize>,
}

struct Given {
    call: &'static str,
    /// Elements of a shard, where they must be the same.
    shard: Option<usize>,
    bytes: Arc<[u8]>,
}

impl Meeting {
    /// Gives `bytes` in a call, waits for all ranks, and returns what each has given.
    fn meet(&self, rank: usize, call: &'static str, shard: Option<usize>, bytes: &[u8]) -> Result<Vec<Arc<[u8]>>> {
        let mut state = self.lock();
        // The others may still have to take what was given last.
        while state.given[rank].is_some() {
            state = self.wait(state, rank)?;
        }
        state.given[rank] = Some(Given { call, shard, bytes: bytes.into() });
        self.changed.notify_all();
        while state.given.iter().any(Option::is_none) {
            state = self.wait(state, rank)?;
        }
        let all: Vec<&Given> = state.given.iter().flatten().collect();
        let other = all.iter().position(|given| (given.call, given.shard) != (all[0].call, all[0].shard));
        let taken = match other {
            None => Ok(all.iter().map(|given| given.bytes.clone()).collect()),
            Some(other) => {
                let said = [0, other].map(|rank| format!("rank {rank} {}", all[rank].describe()));
                Err(Error::Failed(format!("the ranks of a run make the same calls, but {}", said.join(" and "))))
            }
        };
        state.taken += 1;
        if state.taken == state.given.len() {
            state.given.iter_mut().for_each(|given| *given = None);
            state.taken = 0;
            self.changed.notify_all();
        }
        taken
    }

    /// Waits for a change.
    fn wait<'a>(&self, state: MutexGuard<'a, State>, rank: usize) -> Result<MutexGuard<'a, State>> {
        match state.ended {
            Some(ended) => {
                let what = format!("rank {ended} has ended, without which rank {rank} cannot go on");
                Err(Error::Failed(what))
            }
            None => Ok(self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)),
        }
    }

    fn end(&self, rank: usize) {
        self.lock().ended.get_or_insert(rank);
        self.changed.notify_all();
    }

    /// Nothing panics between two changes that belong together, so a poisoned lock is safe to use.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Given {
    fn describe(&self) -> String {
        match self.shard {
            None => format!("calls {}", self.call),
            Some(shard) => format!("calls {} of shards of {shard} elements", self.call),
        }
    }
}
