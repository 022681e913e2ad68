//! NVIDIA's NCCL, opened at run time: it moves bytes between the GPUs of several ranks, each a process or a thread with
//! a [`Gpu`] of its own.
//!
//! A table of sixteen functions, looked up in `libnccl.so.2`. cudarc's layer is not used: it does not look for that
//! name, panics when there is no library, takes an unknown code for success, and hides the handle, without which
//! neither can a failure be asked for nor a wait be ended.
//!
//! A rank may wait for others that never come: one has died, hangs, or has failed for a reason of its own. So the
//! communicator does not block. Every wait here is a loop that asks NCCL for errors and ends when the [`Patience`]
//! does, and so is every wait for the stream in the rest of `device::cuda`, since the stream waits with it
//! (`watch_ranks`). What ends a wait gives the communicator up: it is aborted, which lets the stream go on, and all
//! later calls fail with the same reason. NCCL sees little of what happens to another rank. Whoever learns more, as
//! from a connection that has closed, ends the waits with an [`Aborter`], also where a call of the driver itself waits:
//! a launch while its queue is full, or, on the emulator, that of a graph with an exchange in it. Only the events of
//! `DDPM_TRACE=time` are waited for without looking.
//!
//! NCCL computes nothing here: its sums depend on the number of ranks, their wiring and its version. The exception is
//! [`Communicator::all_reduce`], for whoever prefers that.
//!
//! Deliberately absent: a second stream, several communicators in one group, NCCL's own rendez-vous between machines
//! (how the [`Id`] gets to the other ranks is the caller's business).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use super::driver::{DriverError, sys};
use super::trace::Trace;
use super::{Gpu, View, ViewMut, driver_error};
use crate::error::{Error, Result};

/// What the ranks of a communicator meet by: made by one of them ([`unique_id`]), the same for all, used once.
pub type Id = [u8; 128];

/// The oldest version whose communicators need not block: 2.14, as NCCL encodes it.
const OLDEST: c_int = 21400;

/// How long an abort may take.
const GRACE: Duration = Duration::from_secs(5);

type Handle = *mut c_void;

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId(Id);

/// `ncclConfig_t` of NCCL 2.14. Later versions have more fields and fill in what the version does not have.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: c_int,
    blocking: c_int,
    /// Where the next field of later versions is: `NCCL_CONFIG_UNDEF_INT`.
    next: c_int,
}

const NOT_BLOCKING: Config =
    Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: OLDEST, blocking: 0, next: c_int::MIN };

/// `ncclResult_t`: 0 and 7 are no errors.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

/// `ncclDataType_t` and `ncclRedOp_t`.
const U8: c_int = 1;
const F32: c_int = 7;
const SUM: c_int = 0;

/// Declares the table of NCCL's functions and what looks them up.
macro_rules! functions {
    ($($name:ident: $symbol:literal ( $($ty:ty),* ) -> $result:ty;)*) => {
        /// NCCL's functions. Codes are plain numbers, since a newer library may return others.
        struct Api {
            $($name: unsafe extern "C" fn($($ty),*) -> $result,)*
            /// As NCCL encodes it.
            encoded: c_int,
            /// The library is this workspace's stand-in.
            stand_in: bool,
        }

        impl Api {
            /// `Err` is the name of a function that the library lacks.
            ///
            /// # Safety
            /// The library is NCCL of version `encoded`, and never closed.
            #[cfg(feature = "cuda")]
            unsafe fn new(
                library: &libloading::Library,
                encoded: c_int,
                stand_in: bool,
            ) -> std::result::Result<Api, &'static str> {
                Ok(Api {
                    // SAFETY: the type is that of `nccl.h` in all versions from 2.14 on.
                    $($name: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }.map_err(|_| $symbol)?,)*
                    encoded,
                    stand_in,
                })
            }
        }
    };
}

functions! {
    get_unique_id: "ncclGetUniqueId" (*mut UniqueId) -> c_int;
    error_string: "ncclGetErrorString" (c_int) -> *const c_char;
    last_error: "ncclGetLastError" (Handle) -> *const c_char;
    init: "ncclCommInitRankConfig" (*mut Handle, c_int, UniqueId, c_int, *const Config) -> c_int;
    finalize: "ncclCommFinalize" (Handle) -> c_int;
    destroy: "ncclCommDestroy" (Handle) -> c_int;
    abort: "ncclCommAbort" (Handle) -> c_int;
    async_error: "ncclCommGetAsyncError" (Handle, *mut c_int) -> c_int;
    group_start: "ncclGroupStart" () -> c_int;
    group_end: "ncclGroupEnd" () -> c_int;
    send: "ncclSend" (u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
    recv: "ncclRecv" (u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
    broadcast: "ncclBroadcast" (u64, u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
    all_gather: "ncclAllGather" (u64, u64, usize, c_int, Handle, sys::CUstream) -> c_int;
    all_reduce: "ncclAllReduce" (u64, u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
}

/// NCCL, opened at the first call: the library of `DDPM_NCCL`, or the one that the system finds.
fn api() -> Result<&'static Api> {
    static API: OnceLock<Api> = OnceLock::new();
    if let Some(api) = API.get() {
        return Ok(api);
    }
    let opened = open()?;
    Ok(API.get_or_init(|| opened))
}

/// A build without the feature `cuda` opens no library.
#[cfg(not(feature = "cuda"))]
fn open() -> Result<Api> {
    Err(Error::Failed("several GPUs need NCCL, which this program cannot open: it was built without cuda".into()))
}

#[cfg(feature = "cuda")]
fn open() -> Result<Api> {
    use std::path::PathBuf;

    const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
    let named = std::env::var_os("DDPM_NCCL").filter(|path| !path.is_empty()).map(PathBuf::from);
    // SAFETY: whoever sets the environment, or has installed a library under this name, has chosen a NCCL, whose
    // initialisers are sound.
    let load = |name: PathBuf| unsafe { libloading::Library::new(&name) }.map(|library| (name, library));
    let (path, library) = match named {
        Some(path) => {
            let path = std::path::absolute(&path).map_err(|e| Error::file(&path, e))?;
            load(path.clone()).map_err(|e| {
                // The error names only the call that failed; the reason is in its source, which repeats the path.
                let why = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
                let why = why.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&why);
                Error::file(&path, format!("is no NCCL that can be opened: {why}"))
            })?
        }
        None => NAMES.into_iter().find_map(|name| load(name.into()).ok()).ok_or_else(|| {
            Error::Failed(
                "several GPUs need NCCL, and there is no libnccl.so.2: install the package libnccl2, or \
                 `python3 -m pip install nvidia-nccl-cu12` and set DDPM_NCCL to the path of its libnccl.so.2"
                    .into(),
            )
        })?,
    };
    // SAFETY: the type is that of `nccl.h`; nothing is called.
    let version = unsafe { library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"ncclGetVersion\0") };
    let Ok(version) = version else {
        return Err(Error::file(
            &path,
            "is a library but not NCCL: it has no ncclGetVersion; give the path of libnccl.so.2",
        ));
    };
    let mut encoded = 0;
    // SAFETY: writes one number.
    let code = unsafe { version(&mut encoded) };
    if code != SUCCESS {
        return Err(Error::file(&path, format!("does not say which NCCL it is: ncclGetVersion returns {code}")));
    }
    if encoded < OLDEST {
        let what = format!("is NCCL {}, but 2.14 or newer is needed: update it", dotted(encoded));
        return Err(Error::file(&path, what));
    }
    // SAFETY: looks up a symbol and calls nothing.
    let stand_in = unsafe { library.get::<*const ()>(b"nccl_emu_version\0") }.is_ok();
    // SAFETY: it has just said that it is NCCL, and its handle is forgotten below.
    let api = unsafe { Api::new(&library, encoded, stand_in) };
    // Its threads may run as long as the process.
    std::mem::forget(library);
    api.map_err(|lacks| Error::file(&path, format!("is NCCL {}, but has no {lacks}", dotted(encoded))))
}

/// 23003 is 2.30.3, and 2804 is 2.8.4.
fn dotted(version: c_int) -> String {
    let unit = if version < 10_000 { 1000 } else { 10_000 };
    format!("{}.{}.{}", version / unit, version % unit / 100, version % 100)
}

/// The version of NCCL, as `2.30.3`, for ranks to compare: it should be the same for all of them. Opens the library.
///
/// # Errors
/// `Error::Failed` or `Error::File` if there is no NCCL or none that can be used, with how to get one.
pub fn version() -> Result<String> {
    Ok(dotted(api()?.encoded))
}

/// True if the library is `nccl_emu`, which is for tests: slow, and on this machine alone.
///
/// # Errors
/// As [`version`].
pub fn is_stand_in() -> Result<bool> {
    Ok(api()?.stand_in)
}

/// Makes an id, for one communicator. The process must stay until all ranks have made theirs, and on the stand-in as
/// long as they use it.
///
/// # Errors
/// As [`version`], or NCCL's own.
pub fn unique_id() -> Result<Id> {
    let api = api()?;
    let mut id = UniqueId([0; 128]);
    // SAFETY: writes one id.
    match unsafe { (api.get_unique_id)(&mut id) } {
        SUCCESS => Ok(id.0),
        code => Err(Error::Failed(api.said("making an id for the ranks", code, std::ptr::null_mut()))),
    }
}

impl Api {
    /// That `what` failed, with what NCCL says of it.
    fn said(&self, what: &str, code: c_int, comm: Handle) -> String {
        let text = |text: *const c_char| {
            // SAFETY: null, or NCCL's own text, which ends with a zero and is copied here.
            let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned());
            text.filter(|text| !text.is_empty())
        };
        // SAFETY: takes any number.
        let meaning = text(unsafe { (self.error_string)(code) }).unwrap_or_default();
        // SAFETY: the handle is null or of a communicator that is there.
        let why = text(unsafe { (self.last_error)(comm) }).map_or_else(String::new, |why| format!(": {why}"));
        format!("{what} failed with code {code} of NCCL, {meaning}{why}")
    }
}

/// How long waits for other ranks may last.
#[derive(Clone, Debug)]
pub struct Patience {
    /// A wait that lasts longer ends with an error. It must be longer than any rank works on its own between two calls.
    pub limit: Duration,
    /// Waits end with an error once this is true.
    pub cancel: Arc<AtomicBool>,
}

/// One rank's part in the exchange between `size` ranks. All ranks must make the same calls in the same order, with as
/// many bytes; a call in a captured graph is one of each launch of it. A GPU may have several communicators, of
/// different ranks: then the order of the calls is one over all of them.
///
/// Every call returns once its work is in the GPU's stream, where it runs in the order of the launches. On the emulator
/// with `nccl_emu` that takes as long as the exchange itself.
///
/// Dropped without [`close`](Self::close), it is aborted.
pub struct Communicator {
    gpu: Gpu,
    shared: Arc<Shared>,
}

/// Ends a communicator's waits from another thread.
#[derive(Clone)]
pub struct Aborter {
    shared: Arc<Shared>,
}

/// What threads share of a communicator.
pub(super) struct Shared {
    api: &'static Api,
    rank: usize,
    size: usize,
    /// Locked over every call of NCCL that takes the handle: only one thread may be inside at a time.
    state: Mutex<State>,
    /// In milliseconds.
    limit: AtomicU64,
    cancel: Arc<AtomicBool>,
}

enum State {
    Open(Handle),
    Closed,
    /// Aborted, or about to be: why.
    GivenUp(String),
}

// SAFETY: NCCL lets any thread use a communicator if only one does at a time, which the lock around it ensures.
unsafe impl Send for State {}

impl Communicator {
    /// Meets the other ranks, all of which must come with the same `id` and `size` and with different ranks below it.
    ///
    /// # Errors
    /// As [`version`]; NCCL's own, with its text; the patience has ended before all ranks were there.
    pub fn new(gpu: &Gpu, rank: usize, size: usize, id: &Id, patience: Patience) -> Result<Self> {
        assert!(rank < size, "rank {rank} of {size}");
        let api = api()?;
        if gpu.is_emulated() && !api.stand_in {
            let what = "NVIDIA's NCCL does not run on the emulator: set DDPM_NCCL to the path of libnccl_emu.so";
            return Err(Error::Failed(what.into()));
        }
        gpu.refuse_host("a wait for other ranks")?;
        let _ordered = gpu.ordered();
        // A communicator is bound to the device of the current context.
        gpu.bind()?;
        let shared = Arc::new(Shared {
            api,
            rank,
            size,
            state: Mutex::new(State::Closed),
            limit: AtomicU64::new(0),
            cancel: patience.cancel,
        });
        let communicator = Communicator { gpu: gpu.clone(), shared };
        communicator.set_limit(patience.limit);
        let shared = &communicator.shared;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; the configuration is one of NCCL 2.14 and is copied before the call returns.
        let code = unsafe { (api.init)(&mut handle, size as c_int, UniqueId(*id), rank as c_int, &NOT_BLOCKING) };
        if !handle.is_null() {
            *shared.state() = State::Open(handle);
        }
        shared.accept(format_args!("meeting the other ranks"), code)?;
        shared.settle(format_args!("meeting the other ranks"))?;
        let mut ranks = gpu.ranks();
        ranks.retain(|shared| shared.strong_count() > 0);
        ranks.push(Arc::downgrade(shared));
        drop(ranks);
        Ok(communicator)
    }

    /// Its number, from 0.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.shared.size
    }

    /// How long waits may last from now on: longer while a rank has work that the others know of.
    pub fn set_limit(&self, limit: Duration) {
        self.shared.limit.store(limit.as_millis().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What another thread ends the waits with.
    pub fn aborter(&self) -> Aborter {
        Aborter { shared: self.shared.clone() }
    }

    /// True once it has been given up: all later calls fail.
    pub fn is_given_up(&self) -> bool {
        matches!(*self.shared.state(), State::GivenUp(_))
    }

    /// Part k of `from` goes to the rank `ranks[k]`, and part k of `to` comes from it: as many equal parts each. All
    /// `ranks` make this call with the same `ranks`, among them this one. Grouped sends and receives, the own part
    /// among them.
    ///
    /// # Errors
    /// NCCL's own, a driver error, or the end of the patience; likewise for every call below.
    pub fn all_to_all(&self, to: ViewMut<'_>, from: View<'_>, ranks: &[usize]) -> Result<()> {
        let part = self.part("all_to_all", to.bytes(), ranks);
        assert_eq!(from.bytes(), to.bytes(), "all_to_all: bytes sent and received");
        let ((to_buffer, to), (from_buffer, from)) = (to.place(), from.place());
        self.gpu.owns(to_buffer);
        self.gpu.owns(from_buffer);
        let what = format_args!("all_to_all of {} parts of {part} bytes", ranks.len());
        // SAFETY: both ranges have as many parts as there are ranks. `to` is borrowed mutably, so they do not overlap,
        // and nothing else writes `from` before the stream has passed the call, since buffers are reused in its order.
        self.run(what, |api, comm, stream| unsafe {
            group(api, |send_or_recv| {
                for (k, &rank) in ranks.iter().enumerate() {
                    let at = (k * part) as u64;
                    send_or_recv((api.send)(from + at, part, U8, rank as c_int, comm, stream));
                    send_or_recv((api.recv)(to + at, part, U8, rank as c_int, comm, stream));
                }
            })
        })
    }

    /// Of `data` the rank `ranks[k]` has part k, of as many equal ones; afterwards all `ranks`, which make this call
    /// with the same `ranks`, have all of it.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all).
    pub fn all_gather(&self, data: ViewMut<'_>, ranks: &[usize]) -> Result<()> {
        let part = self.part("all_gather", data.bytes(), ranks);
        let (buffer, at) = data.place();
        self.gpu.owns(buffer);
        let place = ranks.iter().position(|&rank| rank == self.rank()).expect("a rank is among those that call");
        let own = at + (place * part) as u64;
        let what = format_args!("all_gather of {} parts of {part} bytes", ranks.len());
        // SAFETY: the range has as many parts as there are ranks, is borrowed mutably, and is reused in the order of
        // the stream. The own part is where NCCL expects it of a call in place; the parts that come do not overlap it.
        self.run(what, |api, comm, stream| unsafe {
            if ranks.len() == self.size() {
                return (api.all_gather)(own, at, part, U8, comm, stream);
            }
            group(api, |send_or_recv| {
                for (k, &rank) in ranks.iter().enumerate().filter(|(_, rank)| **rank != self.rank()) {
                    send_or_recv((api.send)(own, part, U8, rank as c_int, comm, stream));
                    send_or_recv((api.recv)(at + (k * part) as u64, part, U8, rank as c_int, comm, stream));
                }
            })
        })
    }

    /// Every rank gets the `data` of rank `root`.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all).
    pub fn broadcast(&self, data: ViewMut<'_>, root: usize) -> Result<()> {
        assert!(root < self.size(), "broadcast from rank {root} of {}", self.size());
        let (bytes, (buffer, at)) = (data.bytes(), data.place());
        self.gpu.owns(buffer);
        // SAFETY: the range is borrowed mutably and reused in the order of the stream; in place is the same address.
        self.run(format_args!("broadcast of {bytes} bytes from rank {root}"), |api, comm, stream| unsafe {
            (api.broadcast)(at, at, bytes, U8, root as c_int, comm, stream)
        })
    }

    /// Adds up the f32 of `data` over all ranks, each of which gets the sums. All ranks get the same bits, but which
    /// depends on the number of ranks, on how the GPUs are connected and on NCCL.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all).
    pub fn all_reduce(&self, data: ViewMut<'_>) -> Result<()> {
        let (bytes, (buffer, at)) = (data.bytes(), data.place());
        assert!(bytes.is_multiple_of(4), "all_reduce of {bytes} bytes, which are no f32");
        self.gpu.owns(buffer);
        // SAFETY: the range is borrowed mutably and reused in the order of the stream; in place is the same address.
        self.run(format_args!("all_reduce of {} f32", bytes / 4), |api, comm, stream| unsafe {
            (api.all_reduce)(at, at, bytes / 4, F32, SUM, comm, stream)
        })
    }

    /// Bytes of one of as many equal parts as there are `ranks`, this one among them.
    fn part(&self, what: &str, bytes: usize, ranks: &[usize]) -> usize {
        assert!(ranks.contains(&self.rank()), "{what} of the ranks {ranks:?} on rank {}", self.rank());
        assert!(bytes.is_multiple_of(ranks.len()), "{what}: {bytes} bytes for {} ranks", ranks.len());
        bytes / ranks.len()
    }

    /// Makes a call and waits until its work is in the stream.
    fn run(&self, what: fmt::Arguments<'_>, call: impl FnOnce(&Api, Handle, sys::CUstream) -> c_int) -> Result<()> {
        let gpu = &self.gpu;
        if matches!(gpu.inner.trace, Trace::Print) {
            eprintln!("{what} on rank {} of {}", self.rank(), self.size());
        }
        let _ordered = gpu.ordered();
        gpu.bind()?;
        let code = {
            let state = self.shared.state();
            call(self.shared.api, self.shared.open(&state)?, gpu.inner.stream.cu_stream())
        };
        self.shared.accept(what, code)?;
        self.shared.settle(what)
    }

    /// Waits until the GPU has done everything that it was given, which may take other ranks.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all), or an error of a kernel launched earlier.
    pub fn wait(&self) -> Result<()> {
        self.gpu.synchronize()
    }

    /// Takes leave of the other ranks, in order. Captured graphs with calls of this communicator must be gone.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all).
    pub fn close(self) -> Result<()> {
        let what = format_args!("taking leave of the other ranks");
        self.gpu.synchronize()?;
        let _ordered = self.gpu.ordered();
        self.gpu.bind()?;
        let shared = &self.shared;
        let code = {
            let state = shared.state();
            // SAFETY: the handle of a communicator that is there.
            unsafe { (shared.api.finalize)(shared.open(&state)?) }
        };
        shared.accept(what, code)?;
        shared.settle(what)?;
        let code = {
            let mut state = shared.state();
            let handle = shared.open(&state)?;
            *state = State::Closed;
            // SAFETY: the handle of a communicator that has been finalised, which nothing uses after this.
            unsafe { (shared.api.destroy)(handle) }
        };
        shared.accept(what, code)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.shared.give_up("it was left without an end");
    }
}

impl Aborter {
    /// Gives the communicator up: waits for other ranks end with an error that says `why`, and the stream goes on.
    /// False if NCCL does not let go within five seconds: then waits for the GPU may never end, and only the end of the
    /// process is left, without destructors.
    ///
    /// NCCL of the other ranks need not notice: each rank aborts its own.
    pub fn abort(&self, why: &str) -> bool {
        self.shared.give_up(why)
    }
}

/// Calls in a group, each of which `calls` hands its code to; the first error of them.
///
/// # Safety
/// `api` is NCCL.
unsafe fn group(api: &Api, calls: impl FnOnce(&mut dyn FnMut(c_int))) -> c_int {
    // SAFETY: takes nothing.
    let started = unsafe { (api.group_start)() };
    if started != SUCCESS {
        return started;
    }
    let mut first = SUCCESS;
    calls(&mut |code| first = if is_error(first) { first } else { code });
    // SAFETY: takes nothing. Also after an error, since the group would stay open.
    let ended = unsafe { (api.group_end)() };
    if is_error(first) { first } else { ended }
}

fn is_error(code: c_int) -> bool {
    !matches!(code, SUCCESS | IN_PROGRESS)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handle, if there is one.
    fn open(&self, state: &State) -> Result<Handle> {
        match state {
            State::Open(handle) => Ok(*handle),
            State::Closed => Err(self.failed("the exchange between the ranks has ended")),
            State::GivenUp(why) => Err(self.failed(why)),
        }
    }

    fn failed(&self, why: &str) -> Error {
        Error::Failed(format!("rank {} of {}: {why}", self.rank, self.size))
    }

    /// Gives up if a call has returned an error.
    fn accept(&self, what: fmt::Arguments<'_>, code: c_int) -> Result<()> {
        if !is_error(code) {
            return Ok(());
        }
        let said = {
            let state = self.state();
            let handle = match *state {
                State::Open(handle) => handle,
                State::Closed | State::GivenUp(_) => std::ptr::null_mut(),
            };
            self.api.said(&what.to_string(), code, handle)
        };
        Err(self.end(said))
    }

    /// Gives up; the error says why, or why it was given up before.
    fn end(&self, why: String) -> Error {
        let let_go = self.give_up(&why);
        let why = match &*self.state() {
            State::GivenUp(first) => first.clone(),
            State::Open(_) | State::Closed => why,
        };
        let stuck = if let_go { "" } else { "; NCCL does not let go, so that only the end of the process is left" };
        self.failed(&format!("{why}{stuck}"))
    }

    /// What NCCL says of the communicator: whether a call is in progress, or an error.
    fn progress(&self, what: fmt::Arguments<'_>) -> Result<bool> {
        let said = {
            let state = self.state();
            let handle = self.open(&state)?;
            let mut code = SUCCESS;
            // SAFETY: the handle of a communicator that is there; writes one number.
            let asked = unsafe { (self.api.async_error)(handle, &mut code) };
            let code = if asked == SUCCESS { code } else { asked };
            if !is_error(code) {
                return Ok(code == IN_PROGRESS);
            }
            self.api.said(&what.to_string(), code, handle)
        };
        Err(self.end(said))
    }

    /// Waits until no call is in progress.
    fn settle(&self, what: fmt::Arguments<'_>) -> Result<()> {
        self.poll(what, |in_progress| Ok(!in_progress))
    }

    /// Waits until `done`, which is told whether a call is in progress.
    fn poll(&self, what: fmt::Arguments<'_>, mut done: impl FnMut(bool) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            if done(self.progress(what)?)? {
                return Ok(());
            }
            let waited = start.elapsed();
            let limit = Duration::from_millis(self.limit.load(Ordering::Relaxed));
            if self.cancel.load(Ordering::Relaxed) {
                return Err(self.end(format!("{what} was cancelled")));
            }
            if waited >= limit {
                let seconds = limit.as_secs_f64();
                return Err(self.end(format!("{what} has lasted {seconds} s: another rank is slow, hangs or is gone")));
            }
            pause(waited);
        }
    }

    /// Aborts the communicator, unless it has ended; false if that does not come to an end in time.
    fn give_up(&self, why: &str) -> bool {
        let until = Instant::now() + GRACE;
        // Whoever is in a call of NCCL holds the lock, and NCCL does not want to be aborted meanwhile.
        let handle = loop {
            let state = match self.state.try_lock() {
                Ok(state) => Some(state),
                Err(TryLockError::Poisoned(state)) => Some(state.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            };
            if let Some(mut state) = state {
                let State::Open(handle) = *state else { return true };
                *state = State::GivenUp(why.into());
                break handle;
            }
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let (api, handle) = (self.api, handle.expose_provenance());
        let (done, waits) = std::sync::mpsc::channel();
        let abort = move || {
            // SAFETY: the handle of a communicator that is there; nobody else has it any longer.
            unsafe { (api.abort)(std::ptr::with_exposed_provenance_mut(handle)) };
            // Nobody may be waiting any longer.
            let _ = done.send(());
        };
        // In a thread of its own, since it may never come back.
        if std::thread::Builder::new().name("nccl abort".into()).spawn(abort).is_err() {
            return false;
        }
        waits.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok()
    }
}

/// Sleeps a little: less at first, when most waits end.
fn pause(waited: Duration) {
    match waited.as_micros() {
        0..100 => std::thread::yield_now(),
        100..20_000 => std::thread::sleep(Duration::from_micros(50)),
        _ => std::thread::sleep(Duration::from_millis(1)),
    }
}

impl Gpu {
    /// To be called before a wait for the stream. If other ranks take part in what the stream does, waits until
    /// `is_done`, and no longer than they may be waited for.
    pub(super) fn watch_ranks(&self, is_done: impl Fn() -> std::result::Result<bool, DriverError>) -> Result<()> {
        let shared: Vec<Arc<Shared>> = self.ranks().iter().filter_map(Weak::upgrade).collect();
        let open: Vec<&Arc<Shared>> =
            shared.iter().filter(|shared| !matches!(*shared.state(), State::Closed)).collect();
        let [first, others @ ..] = &open[..] else { return Ok(()) };
        let what = format_args!("waiting for {self} and the other ranks");
        first.poll(what, |_| {
            others.iter().try_for_each(|shared| shared.progress(what).map(|_| ()))?;
            is_done().map_err(|e| driver_error(&format!("waiting for {self}"), e))
        })
    }

    /// The communicators on this GPU.
    fn ranks(&self) -> MutexGuard<'_, Vec<Weak<Shared>>> {
        self.inner.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
