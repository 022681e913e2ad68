//! Work that repeats, as a CUDA graph: launched once to warm up, then captured, and from then on replayed as a whole. A
//! step of hundreds of launches costs the host one call.
//!
//! A graph repeats the same kernels with the same arguments, so what differs from one time to the next must be in
//! device memory (the step's [`DeviceClock`](super::DeviceClock)), and every address must mean what it meant. Two kinds
//! of memory are behind the addresses:
//!
//! - What the work took from the pool and gave back. These blocks return to the pool, where all other work may use
//!   them between two replays: everything runs in stream order, and a replay needs nothing that they held. But before
//!   each replay the graph asks whether all of them are idle. One that somebody holds, or that went back to the driver,
//!   makes the graph stale.
//! - What was there before: weights, moments, the clock. Each of these buffers must still be alive, which the pool
//!   knows by the serial number that a buffer gets with its memory.
//!
//! A stale graph is dropped and the work captured anew, so a replay never writes into memory of others. Rejected:
//! allocation nodes, with which the driver gives a graph memory of its own, and blocks that stay reserved for the
//! graph. Both add a step's memory to what validation and sampling take between the steps, which share it here; and
//! `memory` counts it once.
//!
//! What needs the host cannot be captured: copies from and to its memory, waiting. Memory that the pool does not have
//! and functions that are not loaded end a capture too; then the work runs eagerly, which provides them, and is
//! captured the next time.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use super::driver::{CudaGraph, sys};
use super::{Buffer, Gpu, driver_error};
use crate::error::{Error, Result};

/// Captures in a row that may fail for want of memory or functions. Each is followed by an eager run, which provides
/// them.
const ATTEMPTS: u32 = 4;

/// Work of a GPU that repeats.
pub struct Repeated {
    /// What it is, for messages: "a training step".
    what: &'static str,
    state: State,
}

enum State {
    /// Never ran.
    Cold,
    /// Ran eagerly; so many captures have failed since.
    Warm(u32),
    Captured(Box<Graph>),
    /// For good.
    Eager,
}

impl Repeated {
    /// Work that has not run yet, called `what` in messages.
    pub fn new(what: &'static str) -> Self {
        Repeated { what, state: State::Cold }
    }

    /// Work that is never captured.
    pub fn eager(what: &'static str) -> Self {
        Repeated { what, state: State::Eager }
    }

    /// Does the work: `launch` launches it, or its graph is replayed. `launch` must launch the same kernels with the
    /// same arguments each time, and may be called twice for one time; a capture that fails has run nothing.
    ///
    /// # Errors
    /// Those of `launch`, or of the replay.
    pub fn run(&mut self, gpu: &Gpu, mut launch: impl FnMut() -> Result<()>) -> Result<()> {
        if !gpu.captures() {
            return launch();
        }
        if let State::Captured(graph) = &mut self.state {
            if graph.replay(self.what)? {
                return Ok(());
            }
            self.state = State::Warm(0);
        }
        let failed = match self.state {
            State::Eager => return launch(),
            State::Cold | State::Captured(_) => 0,
            State::Warm(failed) => match gpu.capture(&mut launch) {
                Captured::Graph(mut graph) => {
                    if graph.replay(self.what)? {
                        self.state = State::Captured(Box::new(graph));
                        return Ok(());
                    }
                    failed + 1
                }
                Captured::Missing(what) if failed + 1 == ATTEMPTS => {
                    return self.give_up(gpu, &format!("each time it lacks {what}"), launch);
                }
                Captured::Missing(_) => failed + 1,
                Captured::Refused(why) => return self.give_up(gpu, &why, launch),
            },
        };
        self.state = State::Warm(failed);
        launch()
    }

    /// Runs eagerly from now on.
    fn give_up(&mut self, gpu: &Gpu, why: &str, mut launch: impl FnMut() -> Result<()>) -> Result<()> {
        self.state = State::Eager;
        gpu.add_note(eager_note(self.what, why));
        launch()
    }

    /// Drops the graph: something that it holds by value has changed.
    pub fn forget(&mut self) {
        if let State::Captured(_) = self.state {
            self.state = State::Warm(0);
        }
    }

    /// Launches in its graph; `None` if it has none.
    pub fn launches(&self) -> Option<usize> {
        match &self.state {
            State::Captured(graph) => Some(graph.launches),
            _ => None,
        }
    }
}

/// Why `what` is not replayed as a graph, as a sentence for the user.
pub(crate) fn eager_note(what: &str, why: &str) -> String {
    format!("{what} is launched kernel by kernel, not replayed as a CUDA graph: {why}")
}

/// What came of a capture.
enum Captured {
    Graph(Graph),
    /// What an eager run will provide.
    Missing(&'static str),
    /// Why it cannot be captured.
    Refused(String),
}

/// A captured graph.
struct Graph {
    exec: CudaGraph,
    memory: Memory,
    /// The pool's count of changes when its memory was last as it should be.
    seen: Option<u64>,
    /// Kernels in it.
    launches: usize,
    /// Declared, and so dropped, last: it holds the context and the kernels' modules.
    gpu: Gpu,
}

// SAFETY: a graph may be used from any thread, by one at a time: only who owns it can launch or drop it.
unsafe impl Send for Graph {}
// SAFETY: nothing uses it through a shared reference.
unsafe impl Sync for Graph {}

/// The memory that a graph's addresses mean.
#[derive(Default)]
pub(super) struct Memory {
    /// Blocks that it took from the pool and gave back: their sizes by address.
    pub taken: HashMap<sys::CUdeviceptr, usize>,
    /// Other buffers: their serial numbers by the address of their memory.
    pub used: HashMap<sys::CUdeviceptr, u64>,
}

/// A capture under way.
#[derive(Default)]
pub(super) struct UnderWay {
    memory: Memory,
    launches: usize,
    missing: Option<&'static str>,
}

thread_local! {
    /// The GPU on which this thread captures: the address of its [`Inner`], or 0.
    static CAPTURES: Cell<usize> = const { Cell::new(0) };
}

/// Ends a capture that a panic has left, so that the stream can be used again.
struct Capturing<'a> {
    gpu: &'a Gpu,
    /// Keeps other threads' work out of the stream.
    _alone: RwLockWriteGuard<'a, ()>,
    ended: bool,
}

impl Capturing<'_> {
    fn end(&mut self) -> std::result::Result<Option<CudaGraph>, super::DriverError> {
        self.ended = true;
        CAPTURES.set(0);
        self.gpu.inner.stream.end_capture(sys::CUgraphInstantiate_flags(0))
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // The panic goes on; the graph is of no use.
            let _ = self.end();
        }
    }
}

impl Gpu {
    /// True if work that repeats is captured: not if launches are traced, recorded or counted, each by itself, nor if
    /// somebody has asked for it, nor on a guarded GPU, which gives every buffer memory of its own.
    pub fn captures(&self) -> bool {
        let inner = &self.inner;
        let shown = inner.trace.is_on() || inner.record.get().is_some() || inner.counted.get().is_some();
        !shown && !inner.eager.load(Ordering::Relaxed) && !self.pool().is_guarded()
    }

    /// Graphs launched so far.
    pub fn graph_launches(&self) -> u64 {
        self.inner.graph_launches.load(Ordering::Relaxed)
    }

    /// Launches everything kernel by kernel from now on.
    pub fn launch_eagerly(&self) {
        self.inner.eager.store(true, Ordering::Relaxed);
    }

    /// True if this thread is capturing on this GPU.
    pub(super) fn is_capturing(&self) -> bool {
        CAPTURES.get() == Arc::as_ptr(&self.inner).addr()
    }

    /// To be held over every call that gives the stream work or waits for it: while another thread captures, its work
    /// would become part of the graph. Taken before the locks of the pool and of the modules, and by one function of
    /// those that call each other.
    pub(super) fn ordered(&self) -> Option<RwLockReadGuard<'_, ()>> {
        (!self.is_capturing()).then(|| self.inner.order.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn under_way(&self) -> MutexGuard<'_, UnderWay> {
        self.inner.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a launch.
    pub(super) fn note_launch(&self) {
        if self.is_capturing() {
            self.under_way().launches += 1;
        }
    }

    /// Notes that the work uses `buffer`.
    pub(super) fn note_use(&self, buffer: &Buffer) {
        if self.is_capturing() {
            let mut under_way = self.under_way();
            let (start, serial) = buffer.memory();
            // A buffer of the work's own is among the blocks taken.
            if !under_way.memory.taken.contains_key(&start) {
                under_way.memory.used.insert(start, serial);
            }
        }
    }

    /// Notes that the work took a block of the pool.
    pub(super) fn note_taken(&self, start: sys::CUdeviceptr, bytes: usize) {
        if self.is_capturing() {
            self.under_way().memory.taken.insert(start, bytes);
        }
    }

    /// Refuses what an eager run must provide before a capture.
    pub(super) fn refuse_missing(&self, what: &'static str) -> Result<()> {
        if !self.is_capturing() {
            return Ok(());
        }
        self.under_way().missing = Some(what);
        Err(Error::Failed(format!("a capture lacks {what}")))
    }

    /// Refuses what needs the host, and so cannot be captured.
    pub(super) fn refuse_host(&self, what: &str) -> Result<()> {
        if !self.is_capturing() {
            return Ok(());
        }
        Err(Error::Failed(format!("it is {what}, which a replay would not do again")))
    }

    /// Captures what `launch` launches; nothing of it runs.
    fn capture(&self, launch: impl FnOnce() -> Result<()>) -> Captured {
        let inner = &self.inner;
        let mut capturing =
            Capturing { gpu: self, _alone: inner.order.write().unwrap_or_else(PoisonError::into_inner), ended: false };
        self.pool().sort();
        *self.under_way() = UnderWay::default();
        // Other threads may allocate and wait, in contexts of their own.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        if let Err(e) = inner.stream.begin_capture(mode) {
            capturing.ended = true;
            return Captured::Refused(driver_error("beginning its capture", e).to_string());
        }
        CAPTURES.set(Arc::as_ptr(inner).addr());
        let launched = launch();
        let ended = capturing.end();
        let UnderWay { memory, launches, missing } = std::mem::take(&mut *self.under_way());
        if let Some(what) = missing {
            return Captured::Missing(what);
        }
        let exec = match (launched, ended) {
            (Err(e), _) => return Captured::Refused(e.to_string()),
            (Ok(()), Err(e)) => return Captured::Refused(driver_error("ending its capture", e).to_string()),
            (Ok(()), Ok(None)) => return Captured::Refused("the driver has captured nothing".into()),
            (Ok(()), Ok(Some(exec))) => exec,
        };
        if !self.pool().has(&memory) {
            return Captured::Refused("a buffer that it makes outlives it".into());
        }
        Captured::Graph(Graph { exec, memory, seen: None, launches, gpu: self.off_clock() })
    }
}

impl Graph {
    /// Launches it; false if its memory is not what it was.
    fn replay(&mut self, what: &str) -> Result<bool> {
        let _ordered = self.gpu.ordered();
        // Held until the work is in the stream, so that no block is handed out before.
        let pool = self.gpu.pool();
        if self.seen != Some(pool.changes()) {
            if !pool.has(&self.memory) {
                return Ok(false);
            }
            self.seen = Some(pool.changes());
        }
        let launched = self.exec.launch();
        self.gpu.inner.graph_launches.fetch_add(1, Ordering::Relaxed);
        drop(pool);
        launched.map(|()| true).map_err(|e| {
            let (gpu, launches) = (&self.gpu, self.launches);
            let said = driver_error(&format!("launching {what} on {gpu}, a graph of {launches} kernels,"), e);
            Error::Failed(format!("{said}; DDPM_TRACE=sync names the kernel"))
        })
    }
}
