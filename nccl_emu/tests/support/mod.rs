//! Loads the emulator and the stand-in the way a program does, calls the latter by its C functions, and runs ranks.

#![allow(dead_code, reason = "not every test binary that shares this file uses all of it")]

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DeviceRepr, result};

pub const SUCCESS: c_int = 0;
pub const SYSTEM: c_int = 2;
pub const ARGUMENT: c_int = 4;
pub const USAGE: c_int = 5;
pub const REMOTE: c_int = 6;
pub const IN_PROGRESS: c_int = 7;

pub const U8: c_int = 1;
pub const I32: c_int = 2;
pub const F32: c_int = 7;
pub const BF16: c_int = 9;

pub const SUM: c_int = 0;
pub const MAX: c_int = 2;

/// No wait of a test lasts longer.
pub const LONGEST: Duration = Duration::from_secs(60);

pub type Handle = *mut c_void;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Id(pub [u8; 128]);

/// `ncclConfig_t` of NCCL 2.14.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    pub size: usize,
    pub magic: u32,
    pub version: u32,
    pub blocking: c_int,
    pub padding: c_int,
}

impl Config {
    pub fn new(blocking: c_int) -> Config {
        Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 21400, blocking, padding: c_int::MIN }
    }
}

macro_rules! functions {
    ($($name:ident: $symbol:literal ( $($ty:ty),* $(,)? ) -> $result:ty;)*) => {
        /// The functions that the library exports.
        pub struct Nccl { $(pub $name: unsafe extern "C" fn($($ty),*) -> $result,)* }

        impl Nccl {
            fn load(library: &libloading::Library) -> Nccl {
                // SAFETY: looks up functions, whose types are those of nccl.h.
                Nccl { $($name: unsafe { *library.get(concat!($symbol, "\0").as_bytes()).expect($symbol) },)* }
            }
        }
    };
}

functions! {
    emulator_version: "nccl_emu_version" () -> *const c_char;
    version: "ncclGetVersion" (*mut c_int) -> c_int;
    unique_id: "ncclGetUniqueId" (*mut Id) -> c_int;
    error_string: "ncclGetErrorString" (c_int) -> *const c_char;
    last_error: "ncclGetLastError" (Handle) -> *const c_char;
    init_rank: "ncclCommInitRank" (*mut Handle, c_int, Id, c_int) -> c_int;
    init_rank_config: "ncclCommInitRankConfig" (*mut Handle, c_int, Id, c_int, *const Config) -> c_int;
    init_all: "ncclCommInitAll" (*mut Handle, c_int, *const c_int) -> c_int;
    finalize: "ncclCommFinalize" (Handle) -> c_int;
    destroy: "ncclCommDestroy" (Handle) -> c_int;
    abort: "ncclCommAbort" (Handle) -> c_int;
    async_error: "ncclCommGetAsyncError" (Handle, *mut c_int) -> c_int;
    count: "ncclCommCount" (Handle, *mut c_int) -> c_int;
    cu_device: "ncclCommCuDevice" (Handle, *mut c_int) -> c_int;
    user_rank: "ncclCommUserRank" (Handle, *mut c_int) -> c_int;
    group_start: "ncclGroupStart" () -> c_int;
    group_end: "ncclGroupEnd" () -> c_int;
    send: "ncclSend" (u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
    recv: "ncclRecv" (u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
    broadcast: "ncclBroadcast" (u64, u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
    all_gather: "ncclAllGather" (u64, u64, usize, c_int, Handle, sys::CUstream) -> c_int;
    all_reduce: "ncclAllReduce" (u64, u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
    reduce: "ncclReduce" (u64, u64, usize, c_int, c_int, c_int, Handle, sys::CUstream) -> c_int;
    reduce_scatter: "ncclReduceScatter" (u64, u64, usize, c_int, c_int, Handle, sys::CUstream) -> c_int;
}

/// A shared library beside the test's own executable, where cargo puts it.
pub fn library(name: &str) -> PathBuf {
    let executable = std::env::current_exe().expect("the test knows its own path");
    let path = executable.parent().expect("an executable is in a folder").join(name);
    assert!(path.exists(), "{} is not built", path.display());
    path
}

/// The stand-in, with the emulator started. `settings` are variables for the whole process; the first caller's count.
/// Most refusals are wanted, so they are printed only if NCCL_EMU_LOG or CUDA_EMU_LOG asks for them.
pub fn nccl_with(settings: &[(&str, &str)]) -> &'static Nccl {
    static LOADED: OnceLock<Nccl> = OnceLock::new();
    LOADED.get_or_init(|| {
        let silent = [("NCCL_EMU_LOG", "none"), ("CUDA_EMU_LOG", "none")];
        let silent = silent.iter().filter(|(name, _)| std::env::var_os(name).is_none());
        for (name, value) in settings.iter().chain(silent) {
            // SAFETY: tests come here before anything else, and nothing else in this process reads or writes variables.
            unsafe { std::env::set_var(name, value) };
        }
        // SAFETY: the libraries' initialisers are those of the Rust runtime.
        let [driver, nccl] = ["libcuda_emu.so", "libnccl_emu.so"]
            .map(|name| unsafe { libloading::Library::new(library(name)) }.expect("a library of this workspace loads"));
        std::mem::forget(driver);
        result::init().expect("the driver starts");
        let functions = Nccl::load(&nccl);
        std::mem::forget(nccl);
        functions
    })
}

/// The same with four devices.
pub fn nccl() -> &'static Nccl {
    nccl_with(&[("CUDA_EMU_DEVICES", "4"), ("CUDA_EMU_MEMORY", "64M")])
}

pub fn unique_id() -> Id {
    let mut id = Id([0; 128]);
    // SAFETY: writes one id.
    assert_eq!(unsafe { (nccl().unique_id)(&mut id) }, SUCCESS, "{}", last_error());
    id
}

/// Why this thread's last failing call failed.
pub fn last_error() -> String {
    last_error_of(std::ptr::null_mut())
}

/// Why a communicator has failed, or else the same.
pub fn last_error_of(comm: Handle) -> String {
    // SAFETY: the text ends with a zero and is never freed.
    unsafe { CStr::from_ptr((nccl().last_error)(comm)) }.to_string_lossy().into_owned()
}

/// Asserts that a call was refused with a code and words.
#[track_caller]
pub fn refused(code: c_int, expected: c_int, words: &str) {
    let said = last_error();
    assert!(code == expected && said.contains(words), "{code}, expected {expected}: `{words}` is not in: {said}");
}

/// A rank: a context of its own on a device of its own, a stream and a communicator.
pub struct Rank {
    pub rank: usize,
    pub size: usize,
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    pub comm: Handle,
    /// It has been destroyed or aborted.
    pub ended: Cell<bool>,
}

/// A context of its own, so that a fault or a leak of one test is not another's, and a stream.
pub fn device(ordinal: usize) -> (Arc<CudaContext>, Arc<CudaStream>) {
    nccl();
    let context = CudaContext::new_non_primary(ordinal, 0).expect("a context");
    // SAFETY: each test uses one stream at a time, or orders its streams itself.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    (context, stream)
}

impl Rank {
    /// Connects, which takes all ranks.
    pub fn open(rank: usize, size: usize, id: Id) -> Rank {
        let (mut made, code) = Rank::open_as(rank, size, id, 1);
        assert_eq!(code, SUCCESS, "{}", last_error());
        made.ended = Cell::new(false);
        made
    }

    /// The same by ncclCommInitRankConfig, whatever comes of it: with what it returns.
    pub fn open_as(rank: usize, size: usize, id: Id, blocking: c_int) -> (Rank, c_int) {
        let (context, stream) = device(rank);
        let mut comm = std::ptr::null_mut();
        let config = Config::new(blocking);
        // SAFETY: writes one handle; the configuration is one of NCCL 2.14.
        let code = unsafe { (nccl().init_rank_config)(&mut comm, size as c_int, id, rank as c_int, &config) };
        (Rank { rank, size, context, stream, comm, ended: Cell::new(false) }, code)
    }

    /// What ncclCommGetAsyncError says.
    pub fn status(&self) -> c_int {
        let mut status = -1;
        // SAFETY: writes one number.
        assert_eq!(unsafe { (nccl().async_error)(self.comm, &mut status) }, SUCCESS, "{}", last_error());
        status
    }

    /// What it says once it no longer says that something is in progress.
    #[track_caller]
    pub fn settled(&self) -> c_int {
        let start = Instant::now();
        loop {
            match self.status() {
                IN_PROGRESS => assert!(start.elapsed() < LONGEST, "rank {} is in progress for ever", self.rank),
                status => return status,
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    pub fn abort(&self) {
        if !self.ended.replace(true) {
            // SAFETY: the communicator is there and no longer used.
            assert_eq!(unsafe { (nccl().abort)(self.comm) }, SUCCESS, "{}", last_error());
        }
    }

    /// Ends it in order, or aborts one that has failed.
    pub fn close(&self) {
        if self.ended.get() {
            return;
        }
        if self.status() != SUCCESS {
            return self.abort();
        }
        self.ended.set(true);
        // SAFETY: the communicator is there and no longer used.
        assert_eq!(unsafe { (nccl().destroy)(self.comm) }, SUCCESS, "{}", last_error());
    }

    /// Device memory with these numbers.
    pub fn upload<T: DeviceRepr + Clone>(&self, numbers: &[T]) -> CudaSlice<T> {
        self.stream.clone_htod(numbers).expect("room for some numbers")
    }

    pub fn read<T: DeviceRepr + Clone + Default>(&self, slice: &CudaSlice<T>) -> Vec<T> {
        self.stream.clone_dtoh(slice).expect("the numbers of a buffer")
    }

    /// The address of a buffer.
    pub fn at<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.stream).0
    }

    pub fn send(&self, from: u64, count: usize, peer: usize) -> c_int {
        // SAFETY: tests pass memory that is there, or other memory on purpose, which the library refuses.
        unsafe { (nccl().send)(from, count, F32, peer as c_int, self.comm, self.stream.cu_stream()) }
    }

    pub fn recv(&self, to: u64, count: usize, peer: usize) -> c_int {
        // SAFETY: as in `send`.
        unsafe { (nccl().recv)(to, count, F32, peer as c_int, self.comm, self.stream.cu_stream()) }
    }

    pub fn broadcast(&self, from: u64, to: u64, count: usize, root: usize) -> c_int {
        // SAFETY: as in `send`.
        unsafe { (nccl().broadcast)(from, to, count, F32, root as c_int, self.comm, self.stream.cu_stream()) }
    }

    pub fn all_gather(&self, from: u64, to: u64, count: usize) -> c_int {
        // SAFETY: as in `send`.
        unsafe { (nccl().all_gather)(from, to, count, F32, self.comm, self.stream.cu_stream()) }
    }

    pub fn all_reduce(&self, from: u64, to: u64, count: usize, dtype: c_int, op: c_int) -> c_int {
        // SAFETY: as in `send`.
        unsafe { (nccl().all_reduce)(from, to, count, dtype, op, self.comm, self.stream.cu_stream()) }
    }

    pub fn reduce(&self, from: u64, to: u64, count: usize, root: usize) -> c_int {
        // SAFETY: as in `send`.
        unsafe { (nccl().reduce)(from, to, count, F32, SUM, root as c_int, self.comm, self.stream.cu_stream()) }
    }

    pub fn reduce_scatter(&self, from: u64, to: u64, count: usize) -> c_int {
        // SAFETY: as in `send`.
        unsafe { (nccl().reduce_scatter)(from, to, count, F32, SUM, self.comm, self.stream.cu_stream()) }
    }

    /// Captures what `work` gives the stream.
    pub fn capture(&self, work: impl FnOnce()) -> cudarc::driver::CudaGraph {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).expect("a capture begins");
        work();
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).expect("a capture ends");
        graph.expect("something was captured")
    }
}

pub fn group_start() {
    // SAFETY: takes nothing.
    assert_eq!(unsafe { (nccl().group_start)() }, SUCCESS);
}

pub fn group_end() -> c_int {
    // SAFETY: takes nothing.
    unsafe { (nccl().group_end)() }
}

/// Runs `size` ranks in threads, each on its own device. A rank that panics aborts its communicator first, so that the
/// others do not wait for it.
pub fn together(size: usize, work: impl Fn(&Rank) + Sync) {
    let id = unique_id();
    threads(size, |rank| {
        let rank = Rank::open(rank, size, id);
        let done = catch_unwind(AssertUnwindSafe(|| work(&rank)));
        match done {
            Ok(()) => rank.close(),
            Err(panic) => {
                rank.abort();
                resume_unwind(panic);
            }
        }
    });
}

/// Runs `work` in `count` threads and passes on the first panic. A test that takes too long ends the process.
pub fn threads(count: usize, work: impl Fn(usize) + Sync) {
    let (over, waits) = std::sync::mpsc::channel::<()>();
    let test = std::thread::current().name().unwrap_or("a test").to_string();
    std::thread::spawn(move || {
        if waits.recv_timeout(LONGEST) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{test}: its ranks wait for ever");
            std::process::abort();
        }
    });
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count).map(|number| scope.spawn(move || work(number))).collect();
        let panics: Vec<_> = threads.into_iter().filter_map(|thread| thread.join().err()).collect();
        if let Some(panic) = panics.into_iter().next() {
            resume_unwind(panic);
        }
    });
    drop(over);
}

/// Numbers that differ between ranks and places.
pub fn numbers(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| (100 * rank + i) as f32).collect()
}

/// That the driver's last answer was no error, for calls that are made raw.
pub fn ok(answer: CUresult) {
    assert_eq!(answer, CUresult::CUDA_SUCCESS);
}
