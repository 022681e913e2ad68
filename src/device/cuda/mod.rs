//! NVIDIA GPUs. Only this module's `driver` names cudarc.
//!
//! One context, one stream for everything but the copies of `Staging`, for whose results that stream waits. Everything
//! runs in its order, so a buffer returned to the pool may be handed out again at once. Nothing waits for the GPU but
//! [`Gpu::download`], [`Gpu::synchronize`], and `Staging` before it reuses its memory; the check of guard words (tests)
//! waits too. Where other ranks take part in what the stream does ([`nccl`]), a wait may be for them, and ends with an
//! error when they are gone.
//!
//! Deliberately absent: kernels on several streams, unified memory.

mod clock;
mod counters;
mod driver;
mod graph;
mod launch;
mod modules;
pub mod nccl;
mod pool;
mod staging;
pub mod tile;
mod trace;

use std::fmt::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use super::{PoolStats, Precision};
use crate::error::{Error, Result};
use crate::kernels;
use crate::shape::DType;
use driver::{CudaContext, CudaStream, DriverError, result, sys};

pub use clock::{DeviceClock, DeviceTurn};
pub use counters::{Counted, Counters};
pub use graph::Repeated;
pub(crate) use graph::eager_note;
pub use launch::{Array, Launch, Launched, View, ViewMut, each_four, each_four_of_images};
pub use pool::Buffer;
pub(super) use pool::UNIT;
pub(crate) use staging::{Readback, Staging};

/// The lowest compute capability the kernels run on.
const OLDEST: (u32, u32) = (8, 0);

/// The lowest CUDA version of a driver that loads any PTX of the build: 12.0, as the driver counts.
const OLDEST_DRIVER: i32 = 12_000;

/// A GPU and its pool. Cloning clones the handle.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
    /// Read by launches through this handle in place of some arguments.
    clock: Option<Arc<clock::Reading<kernels::clock::Clock>>>,
    /// The same, for a reverse process.
    turn: Option<Arc<clock::Reading<kernels::sample_step::Turn>>>,
}

struct Inner {
    /// Declared, and so dropped, before the stream, whose context they need.
    loaded: Mutex<modules::Loaded>,
    stream: Arc<CudaStream>,
    number: usize,
    name: String,
    capability: (u32, u32),
    precision: Precision,
    pool: Mutex<pool::Pool>,
    /// What memory is being requested for, in words.
    purpose: Mutex<String>,
    /// What is shown of launches.
    trace: trace::Trace,
    /// Launches so far, if they are being recorded.
    record: OnceLock<Mutex<Vec<Launched>>>,
    /// The same with the emulator's counters.
    counted: OnceLock<Mutex<Vec<Counted>>>,
    /// Work that repeats is not captured.
    eager: AtomicBool,
    /// Graphs launched so far.
    graph_launches: AtomicU64,
    /// Held for reading over each call that gives the stream work, for writing over a capture.
    order: RwLock<()>,
    /// What a capture notes.
    under_way: Mutex<graph::UnderWay>,
    /// Communicators: other ranks take part in what the stream does.
    ranks: Mutex<Vec<Weak<nccl::Shared>>>,
    emulated: bool,
    /// What the user should know about the kernels.
    notes: Vec<String>,
    /// What has come up since.
    later_notes: Mutex<Vec<String>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.trace.report();
    }
}

/// A GPU as the command `info` lists it.
#[derive(Clone, Debug)]
pub struct Description {
    /// N in cuda:N.
    pub number: usize,
    /// Its marketing name.
    pub name: String,
    /// Compute capability, (major, minor).
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory: u64,
}

impl Description {
    /// True if it is new enough for the kernels.
    pub fn can_run_kernels(&self) -> bool {
        self.capability >= OLDEST
    }

    /// That it is too old for the kernels, as a sentence.
    fn too_old(&self) -> String {
        let (Description { number, name, .. }, (major, minor)) = (self, self.capability);
        let (oldest, its_minor) = OLDEST;
        format!(
            "cuda:{number} ({name}) has compute capability {major}.{minor}, but the kernels need {oldest}.{its_minor} or \
             newer"
        )
    }
}

/// Opens the driver at `DDPM_CUDA_DRIVER`, if set, so that cudarc finds it under the usual name, libcuda.so.
fn open_named_driver() -> Result<()> {
    let Some(path) = std::env::var_os("DDPM_CUDA_DRIVER").filter(|path| !path.is_empty()) else { return Ok(()) };
    // SAFETY: whoever sets the environment decides which libraries the process loads, and has named a CUDA driver.
    unsafe { open_driver(Path::new(&path)) }
}

/// Opens the driver library at `path` for the rest of the process. Call it before opening the first device.
///
/// # Safety
/// The library must be a CUDA driver: its initialisers run, and every driver call goes to it.
///
/// # Errors
/// `Error::File` if it cannot be opened.
#[cfg(feature = "cuda")]
pub unsafe fn open_driver(path: &Path) -> Result<()> {
    static OPENED: Mutex<Vec<libloading::Library>> = Mutex::new(Vec::new());
    let path = std::path::absolute(path).map_err(|e| Error::file(path, e))?;
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: a CUDA driver, as the caller promises. The handle is never dropped, so nothing called later can be
    // unloaded.
    let library = unsafe { libloading::Library::new(&path) }.map_err(|e| {
        // The error names only the call that failed; the reason is in its source, which repeats the path.
        let why = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
        let why = why.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&why);
        Error::file(&path, format!("is no CUDA driver that can be opened: {why}"))
    })?;
    // SAFETY: looks up a symbol and calls nothing. Without it the first call would panic.
    if unsafe { library.get::<*const ()>(b"cuInit\0") }.is_err() {
        return Err(Error::file(
            &path,
            "is a library but no CUDA driver: it has no cuInit; give the path of libcuda.so.1",
        ));
    }
    opened.push(library);
    Ok(())
}

/// A build without the feature `cuda` opens no driver.
///
/// # Safety
/// None is needed here.
///
/// # Errors
/// Always.
#[cfg(not(feature = "cuda"))]
pub unsafe fn open_driver(path: &Path) -> Result<()> {
    Err(Error::file(path, "is a driver that this program cannot open: it was built without the feature cuda"))
}

/// True if there is a driver library. Without one cudarc's first call would panic.
fn driver_present() -> Result<bool> {
    open_named_driver()?;
    // SAFETY: opens and closes the driver's library, whose initialisers are sound.
    Ok(unsafe { sys::is_culib_present() })
}

/// True if there are signs of an NVIDIA driver: its files, or a path to one in `DDPM_CUDA_DRIVER`. Opens nothing, so
/// that a build that cannot use a GPU can say that there is one.
pub fn driver_is_likely() -> bool {
    let named = std::env::var_os("DDPM_CUDA_DRIVER").is_some_and(|path| !path.is_empty());
    let windows = std::env::var_os("SystemRoot").map(|root| Path::new(&root).join("System32/nvcuda.dll"));
    let files = ["/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1"];
    named || files.iter().any(|file| Path::new(file).exists()) || windows.is_some_and(|file| file.exists())
}

/// What this build lacks to run kernels, and how to get it; `None` if it lacks nothing.
pub fn missing_in_this_build() -> Option<&'static str> {
    if !cfg!(feature = "cuda") {
        return Some("this program was built without the feature cuda: build it with the feature");
    }
    let without = "this program was built without a CUDA compiler: build it with DDPM_CUDA_TOOLCHAIN=fetch (or with nvcc \
                   in PATH)";
    kernels::COMPILER.is_none().then_some(without)
}

/// Opens the first GPU that can run the kernels; `None` if there is no sign of an NVIDIA driver.
///
/// # Errors
/// `Error::Failed` or `Error::File` with the reason why a driver or a GPU that is there cannot be used.
pub fn open_any(precision: Precision) -> Result<Option<Gpu>> {
    if let Some(missing) = missing_in_this_build() {
        return match driver_is_likely() {
            false => Ok(None),
            true => Err(Error::Failed(format!("there is an NVIDIA driver, but {missing} to use its GPUs"))),
        };
    }
    if !driver_present()? {
        return Ok(None);
    }
    let all = devices()?;
    let mut failed = match all.first() {
        None => Error::Failed("there is an NVIDIA driver, but it knows of no GPU".into()),
        Some(first) => Error::Failed(first.too_old()),
    };
    for gpu in all.iter().filter(|gpu| gpu.can_run_kernels()) {
        match Gpu::open(gpu.number, precision, false) {
            Ok(gpu) => return Ok(Some(gpu)),
            Err(why) => failed = why,
        }
    }
    Err(failed)
}

/// All GPUs of this machine; empty without a driver.
///
/// # Errors
/// A driver error; no driver at all is not an error.
pub fn devices() -> Result<Vec<Description>> {
    if !driver_present()? {
        return Ok(Vec::new());
    }
    let failed = |what: &str| {
        let what = what.to_string();
        move |e: DriverError| driver_error(&what, e)
    };
    let version = version()?;
    if version < OLDEST_DRIVER {
        let what = format!("the NVIDIA driver is of CUDA {}, but 12.0 or newer is needed: update it", dotted(version));
        return Err(Error::Failed(what));
    }
    match result::init() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Ok(Vec::new()),
        other => other.map_err(failed("starting the NVIDIA driver"))?,
    }
    let count = result::device::get_count().map_err(failed("counting the GPUs"))?;
    (0..count)
        .map(|number| {
            let failed = || failed(&format!("asking cuda:{number} what it is"));
            let device = result::device::get(number).map_err(failed())?;
            let attribute = |attribute| {
                // SAFETY: `device` was just returned by the driver.
                let value = unsafe { result::device::get_attribute(device, attribute) }.map_err(failed())?;
                Ok::<u32, Error>(value.max(0) as u32)
            };
            Ok(Description {
                number: number as usize,
                name: result::device::get_name(device).map_err(failed())?,
                capability: (
                    attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                    attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                ),
                // SAFETY: as above.
                memory: unsafe { result::device::total_mem(device) }.map_err(failed())? as u64,
            })
        })
        .collect()
}

/// The driver's CUDA version as `12.4`; `None` without a driver.
///
/// # Errors
/// A driver error; no driver at all is not an error.
pub fn driver_version() -> Result<Option<String>> {
    Ok(if driver_present()? { Some(dotted(version()?)) } else { None })
}

/// The CUDA version of the driver, which is present: 12040 is 12.4.
fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one integer.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    result.result().map_err(|e| driver_error("asking the NVIDIA driver for its version", e))?;
    Ok(version)
}

fn dotted(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn driver_error(what: &str, e: DriverError) -> Error {
    let text = match (e.error_name(), e.error_string()) {
        (Ok(name), Ok(text)) => format!("{}: {}", name.to_string_lossy(), text.to_string_lossy()),
        // Its number alone: a driver newer than this build may return a code that cudarc's enum has no name for.
        _ => format!("code {}", e.0 as u32),
    };
    Error::Failed(format!("{what} failed with {text}"))
}

impl Gpu {
    /// Opens GPU `number` for a precision, or for that of a type of activations. A guarded GPU (tests) does not pool:
    /// each buffer is its own allocation of exactly its size, between guard words except on the emulator, which checks
    /// accesses itself.
    ///
    /// # Errors
    /// `Error::Failed` if this build has no CUDA support or no kernels, or if there is no driver, no such GPU, or it is
    /// too old.
    pub fn open(number: usize, precision: impl Into<Precision>, guarded: bool) -> Result<Self> {
        Self::open_as(number, precision.into(), guarded, false, trace::Trace::from_environment()?)
    }

    /// A GPU that measures each launch by two events, for [`Gpu::launch_times`].
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open_timed(number: usize, precision: impl Into<Precision>) -> Result<Self> {
        Self::open_as(number, precision.into(), false, false, trace::Trace::timing())
    }

    /// A guarded GPU with guard words on the emulator too, where they hide from it where a buffer ends: for tests of
    /// the guards.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open_with_guard_words(number: usize, precision: impl Into<Precision>) -> Result<Self> {
        Self::open_as(number, precision.into(), true, true, trace::Trace::from_environment()?)
    }

    fn open_as(
        number: usize,
        precision: Precision,
        guarded: bool,
        guard_words: bool,
        trace: trace::Trace,
    ) -> Result<Self> {
        if let Some(missing) = missing_in_this_build() {
            let what = format!("cuda:{number} was asked for, but {missing}, or use --device cpu");
            return Err(Error::Failed(what));
        }
        let all = devices()?;
        let Some(description) = all.get(number) else {
            return Err(Error::Failed(match all.len() {
                0 => format!("cuda:{number} was asked for, but there is no NVIDIA driver or no GPU: use --device cpu"),
                n => format!("cuda:{number} was asked for, but there are only cuda:0 to cuda:{}", n - 1),
            }));
        };
        if !description.can_run_kernels() {
            return Err(Error::Failed(format!("{}: use --device cpu", description.too_old())));
        }
        let failed = |e| driver_error(&format!("opening cuda:{number}"), e);
        let context = CudaContext::new(number).map_err(failed)?;
        // SAFETY: everything is on one stream but the copies of `Staging`, which orders them with events of its own. So
        // nothing needs cudarc's, and events recorded outside a captured graph would break the capture.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed)?;
        // SAFETY: looks up a symbol and calls nothing.
        let emulated = unsafe { sys::culib().get::<*const ()>(b"emu_version\0") }.is_ok();
        let (loaded, notes) = modules::Loaded::new(&context, description.capability, emulated)?;
        let inner = Inner {
            pool: Mutex::new(pool::Pool::new(guarded, guard_words || !emulated)),
            stream,
            number,
            name: description.name.clone(),
            capability: description.capability,
            precision,
            loaded: Mutex::new(loaded),
            purpose: Mutex::default(),
            trace,
            record: OnceLock::new(),
            counted: OnceLock::new(),
            eager: AtomicBool::new(false),
            graph_launches: AtomicU64::new(0),
            order: RwLock::default(),
            under_way: Mutex::default(),
            ranks: Mutex::default(),
            emulated,
            notes,
            later_notes: Mutex::default(),
        };
        Ok(Gpu { inner: Arc::new(inner), clock: None, turn: None })
    }

    /// Type of activations and gradients.
    pub fn activations(&self) -> DType {
        self.inner.precision.activations()
    }

    /// What it was opened for.
    pub fn precision(&self) -> Precision {
        self.inner.precision
    }

    /// Sentences for the user about the kernels, such as that they come from `DDPM_KERNELS`.
    pub fn notes(&self) -> &[String] {
        &self.inner.notes
    }

    /// What it is, without its number: its name and compute capability.
    pub fn kind(&self) -> String {
        let Inner { name, capability: (major, minor), .. } = &*self.inner;
        // The name of an emulated one ends with its number.
        let name = if self.is_emulated() { "emulated" } else { name };
        format!("{name}, compute capability {major}.{minor}")
    }

    /// N in cuda:N.
    pub fn number(&self) -> usize {
        self.inner.number
    }

    /// Adds a sentence for the user about what is going on.
    pub(crate) fn add_note(&self, note: String) {
        self.inner.later_notes.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }

    /// The sentences for the user that have come up since the last call.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut *self.inner.later_notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// True on the emulator.
    pub fn is_emulated(&self) -> bool {
        self.inner.emulated
    }

    /// The pool's counters.
    pub fn pool_stats(&self) -> PoolStats {
        self.pool().stats
    }

    /// Free device memory in bytes, idle pool memory included.
    ///
    /// # Errors
    /// A driver error.
    pub fn available_memory(&self) -> Result<u64> {
        let (free, _) =
            self.inner.stream.context().mem_get_info().map_err(|e| driver_error("asking for free memory", e))?;
        let stats = self.pool_stats();
        Ok(free as u64 + stats.held - stats.in_use)
    }

    /// Sets what memory is requested for from now on; an out-of-memory error names it.
    pub fn memory_is_for(&self, purpose: fmt::Arguments<'_>) {
        let mut text = self.inner.purpose.lock().unwrap_or_else(PoisonError::into_inner);
        text.clear();
        // Writing to a String cannot fail.
        let _ = text.write_fmt(purpose);
    }

    /// Records launches from now on, for tests that compare them. What was recorded before is dropped.
    pub fn record_launches(&self) {
        self.inner.record.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The launches recorded since the last call, in order.
    pub fn recorded_launches(&self) -> Vec<Launched> {
        let record = self.inner.record.get();
        record.map_or(Vec::new(), |r| std::mem::take(&mut *r.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Waits until everything launched so far has finished.
    ///
    /// # Errors
    /// An error of the driver, or of a kernel launched earlier.
    pub fn synchronize(&self) -> Result<()> {
        self.refuse_host("a wait")?;
        let _ordered = self.ordered();
        self.wait()
    }

    /// The same for whoever has called [`ordered`](Self::ordered).
    fn wait(&self) -> Result<()> {
        self.watch_ranks(|| self.is_idle())?;
        self.inner.stream.synchronize().map_err(|e| driver_error(&format!("waiting for {self}"), e))
    }

    /// True if everything launched so far has finished.
    fn is_idle(&self) -> std::result::Result<bool, DriverError> {
        // SAFETY: this GPU's stream, which lives as long as it.
        match unsafe { sys::cuStreamQuery(self.inner.stream.cu_stream()).result() } {
            Ok(()) => Ok(true),
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Copies `data` to the start of `to`, in stream order. `data` may be reused when this returns.
    ///
    /// # Errors
    /// A driver error.
    pub fn upload<T: bytemuck::Pod>(&self, to: &mut Buffer, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        assert!(bytes.len() <= to.bytes(), "{} bytes into a buffer of {}", bytes.len(), to.bytes());
        self.owns(to);
        if bytes.is_empty() {
            return Ok(());
        }
        self.refuse_host("a copy from the host's memory")?;
        let _ordered = self.ordered();
        self.bind()?;
        // SAFETY: `to` holds that many bytes (checked) and lives until the stream has passed the copy, since buffers
        // are reused or freed in the order of this GPU's stream. The driver stages pageable host memory before the call
        // returns, and the only page-locked memory is that of `Staging`, which lends it out only to be written.
        let copied = unsafe { result::memcpy_htod_async(to.address(), bytes, self.inner.stream.cu_stream()) };
        copied.map_err(|e| driver_error(&format!("copying {} bytes to {self}", bytes.len()), e))
    }

    /// Copies the start of `from` to `data` and waits for the copy.
    ///
    /// # Errors
    /// An error of the driver, or of a kernel launched earlier.
    pub fn download<T: bytemuck::Pod>(&self, data: &mut [T], from: &Buffer) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(data);
        assert!(bytes.len() <= from.bytes(), "{} bytes out of a buffer of {}", bytes.len(), from.bytes());
        let what = format!("copying {} bytes from {self}", bytes.len());
        self.owns(from);
        if bytes.is_empty() {
            return self.synchronize();
        }
        self.refuse_host("a copy to the host's memory")?;
        let _ordered = self.ordered();
        self.bind()?;
        self.watch_ranks(|| self.is_idle())?;
        // SAFETY: `from` holds that many bytes (checked). `bytes` is borrowed until the stream is synchronised, below;
        // if that fails, the context has failed for good and copies no more.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, from.address(), self.inner.stream.cu_stream()) };
        copied.and_then(|()| self.inner.stream.synchronize()).map_err(|e| driver_error(&what, e))
    }

    /// Copies all of `from` to `to`, from byte `offset` on, on the device.
    ///
    /// # Errors
    /// A driver error.
    pub fn copy(&self, to: &mut Buffer, offset: usize, from: &Buffer) -> Result<()> {
        let (bytes, end) = (from.bytes(), offset.checked_add(from.bytes()));
        assert!(end.is_some_and(|end| end <= to.bytes()), "{bytes} bytes at {offset} of a buffer of {}", to.bytes());
        self.owns(to);
        self.owns(from);
        if bytes == 0 {
            return Ok(());
        }
        let _ordered = self.ordered();
        self.bind()?;
        // SAFETY: `to` holds that many bytes from the offset on (checked), and both are used in the order of this GPU's
        // stream; `to` is borrowed mutably, so they are not the same.
        let copied = unsafe {
            let to = to.address() + offset as u64;
            result::memcpy_dtod_async(to, from.address(), bytes, self.inner.stream.cu_stream())
        };
        copied.map_err(|e| driver_error(&format!("copying {bytes} bytes on {self}"), e))
    }

    /// Fills `words` 32-bit words of `to`, from byte `offset` on, with `word`.
    ///
    /// # Errors
    /// A driver error.
    pub fn fill(&self, to: &mut Buffer, offset: usize, words: usize, word: u32) -> Result<()> {
        let end = words.checked_mul(4).and_then(|bytes| bytes.checked_add(offset));
        assert!(
            offset.is_multiple_of(4) && end.is_some_and(|end| end <= to.bytes()),
            "{words} words at {offset} of a buffer of {}",
            to.bytes()
        );
        self.owns(to);
        if words == 0 {
            return Ok(());
        }
        let _ordered = self.ordered();
        self.bind()?;
        // SAFETY: inside the buffer (checked), which is borrowed mutably and used in the order of this GPU's stream.
        let filled = unsafe {
            sys::cuMemsetD32Async(to.address() + offset as u64, word, words, self.inner.stream.cu_stream()).result()
        };
        filled.map_err(|e| driver_error(&format!("filling {words} words on {self}"), e))
    }

    /// Asserts that a buffer belongs to this GPU, whose stream orders its use.
    fn owns(&self, buffer: &Buffer) {
        let owner = buffer.gpu();
        assert!(Arc::ptr_eq(&self.inner, &owner.inner), "a buffer of {owner} is used on {self}");
        self.note_use(buffer);
    }

    /// Makes the context current on the calling thread, as raw driver calls require.
    fn bind(&self) -> Result<()> {
        self.inner.stream.context().bind_to_thread().map_err(|e| driver_error(&format!("using {self}"), e))
    }

    fn pool(&self) -> MutexGuard<'_, pool::Pool> {
        self.inner.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn loaded(&self) -> MutexGuard<'_, modules::Loaded> {
        self.inner.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({})", self.inner.number, self.kind())
    }
}
