//! Page-locked memory for copies that overlap with work on the host and, towards the GPU, with its kernels.

use std::collections::VecDeque;
use std::sync::Arc;

use super::driver::{CudaContext, CudaEvent, CudaStream, DriverError, PinnedHostSlice, result};
use super::{Buffer, Gpu, driver_error};
use crate::error::Result;

/// Two page-locked buffers and two buffers on the GPU used in turn: while the kernels of a step run, the host fills one
/// pair for the next step, and a stream of its own copies it. The kernels' stream then waits for that copy and moves
/// the bytes to where its kernels read them, in microseconds: kernels captured in a graph read from one place only.
pub(crate) struct Staging {
    gpu: Gpu,
    /// The stream of the copies from the host, made for the first.
    copies: Option<Arc<CudaStream>>,
    /// None or two.
    slots: Vec<Landing>,
    turn: usize,
}

/// Page-locked memory.
struct Slot {
    memory: PinnedHostSlice<u8>,
    /// Recorded after the last copy out of or into `memory`.
    copied: CudaEvent,
}

/// Where the bytes of a step land before their turn.
struct Landing {
    host: Slot,
    device: Buffer,
    /// Recorded after the last move out of `device`.
    moved: CudaEvent,
}

impl Slot {
    /// Memory of `bytes` bytes, zeros, with nothing under way on `stream`.
    fn new(context: &Arc<CudaContext>, stream: &CudaStream, bytes: usize) -> std::result::Result<Slot, DriverError> {
        // SAFETY: the bytes are initialised, just below, before anyone reads them.
        let mut memory = unsafe { context.alloc_pinned::<u8>(bytes) }?;
        let start = memory.as_mut_ptr()?;
        // SAFETY: `memory` has that many bytes and nothing else refers to it yet.
        unsafe { start.write_bytes(0, bytes) };
        let copied = context.new_event(None)?;
        copied.record(stream)?;
        Ok(Slot { memory, copied })
    }
}

impl Drop for Slot {
    /// Waits for the copy out of `memory`, which is freed next. If the wait fails, the context has failed for good and
    /// copies no more; cudarc reports the error on its next call.
    fn drop(&mut self) {
        let context = self.memory.context().clone();
        context.record_err(self.copied.synchronize());
    }
}

impl Gpu {
    /// Staging with no memory allocated yet.
    pub(crate) fn staging(&self) -> Staging {
        Staging { gpu: self.clone(), copies: None, slots: Vec::new(), turn: 0 }
    }
}

impl Staging {
    /// The GPU that it copies to.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Lets `fill` write `bytes` bytes and brings them to the device: into `to` if it has that size, otherwise into a
    /// new buffer. Does not wait for the copy, only for the one before the last, whose memory it reuses.
    ///
    /// # Errors
    /// A driver error, or no memory left.
    pub fn upload(&mut self, to: Option<Buffer>, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<Buffer> {
        let gpu = &self.gpu;
        let (stream, context) = (&gpu.inner.stream, gpu.inner.stream.context());
        let failed = |e| driver_error(&format!("staging {bytes} bytes for {gpu}"), e);
        let to = match to.filter(|to| to.bytes() == bytes) {
            Some(to) => to,
            None => gpu.alloc(bytes)?,
        };
        gpu.owns(&to);
        if bytes == 0 {
            fill(&mut []);
            return Ok(to);
        }
        // Both at once, so that the second step finds all memory where it will be in the third: it is captured.
        let fits = self.slots.first().is_some_and(|slot| slot.device.bytes() >= bytes);
        let buffers = if fits { Vec::new() } else { vec![gpu.alloc(bytes)?, gpu.alloc(bytes)?] };
        gpu.refuse_host("a copy from the host's memory")?;
        let _ordered = gpu.ordered();
        let copies = match &mut self.copies {
            Some(copies) => &*copies,
            none => &*none.insert(context.new_stream().map_err(failed)?),
        };
        if !buffers.is_empty() {
            let landing = |device| -> std::result::Result<Landing, DriverError> {
                let (host, moved) = (Slot::new(context, copies, bytes)?, context.new_event(None)?);
                // What the kernels' stream still does with memory that has become this buffer comes before a copy.
                moved.record(stream)?;
                Ok(Landing { host, device, moved })
            };
            self.slots = buffers.into_iter().map(landing).collect::<std::result::Result<_, _>>().map_err(failed)?;
        }
        self.turn = 1 - self.turn;
        let Landing { host: Slot { memory, copied }, device, moved } = &mut self.slots[self.turn];
        // The copy before the last used this memory. It has long finished unless the GPU is two steps behind.
        gpu.watch_ranks(|| copied.try_is_complete())?;
        copied.synchronize().map_err(failed)?;
        let memory = &mut memory.as_mut_slice().map_err(failed)?[..bytes];
        fill(memory);
        gpu.bind()?;
        let copy = || {
            copies.wait(moved)?;
            // SAFETY: `device` holds `bytes` bytes; what it held was moved out before, as the stream has waited for it.
            // The page-locked memory is neither written nor freed before the copy has finished: both wait for
            // `copied`, which is recorded after it; if recording fails, the stream is synchronised below.
            unsafe { result::memcpy_htod_async(device.address(), memory, copies.cu_stream()) }?;
            copied.record(copies)?;
            stream.wait(copied)?;
            // SAFETY: both buffers hold `bytes` bytes and are reused only in the order of this stream, which has waited
            // for the copy into `device`.
            unsafe { result::memcpy_dtod_async(to.address(), device.address(), bytes, stream.cu_stream()) }?;
            moved.record(stream)
        };
        copy().map_err(|e| {
            context.record_err(copies.synchronize());
            context.record_err(stream.synchronize());
            failed(e)
        })?;
        Ok(to)
    }
}

/// Numbers on their way to the host: copied in stream order and taken in the order of the copies, each as soon as its
/// own copy has finished, whatever was launched after it.
pub(crate) struct Readback {
    gpu: Gpu,
    /// The copies under way, the oldest first, and how many bytes each has.
    copies: VecDeque<(Slot, usize)>,
    free: Vec<Slot>,
}

impl Gpu {
    /// A readback with nothing under way.
    pub(crate) fn readback(&self) -> Readback {
        Readback { gpu: self.clone(), copies: VecDeque::new(), free: Vec::new() }
    }
}

impl Readback {
    /// Begins to copy all of `from`. Does not wait.
    ///
    /// # Errors
    /// A driver error, or no memory left.
    pub fn begin(&mut self, from: &Buffer) -> Result<()> {
        let (gpu, bytes) = (&self.gpu, from.bytes());
        let (stream, context) = (&gpu.inner.stream, gpu.inner.stream.context());
        let failed = |e| driver_error(&format!("copying {bytes} bytes from {gpu}"), e);
        gpu.owns(from);
        gpu.refuse_host("a copy to the host's memory")?;
        let _ordered = gpu.ordered();
        let fitting = self.free.iter().position(|slot| slot.memory.len() >= bytes);
        let mut slot = match fitting.map(|k| self.free.swap_remove(k)) {
            Some(slot) => slot,
            None => Slot::new(context, stream, bytes).map_err(failed)?,
        };
        // The copy that used it was waited for when it was taken, or never was.
        slot.copied.synchronize().map_err(failed)?;
        gpu.bind()?;
        let memory = &mut slot.memory.as_mut_slice().map_err(failed)?[..bytes];
        // SAFETY: `from` holds `bytes` bytes and is reused only in stream order. The page-locked memory is neither read
        // nor freed before the copy has finished: both wait for `copied`, which is recorded after it; if recording
        // fails, the stream is synchronised here.
        unsafe { result::memcpy_dtoh_async(memory, from.address(), stream.cu_stream()) }.map_err(failed)?;
        if let Err(e) = slot.copied.record(stream) {
            context.record_err(stream.synchronize());
            return Err(failed(e));
        }
        self.copies.push_back((slot, bytes));
        Ok(())
    }

    /// The bytes of the oldest copy, for which it waits; `None` if there is none.
    ///
    /// # Errors
    /// An error of the driver, or of a kernel launched earlier.
    pub fn take(&mut self) -> Result<Option<Vec<u8>>> {
        let Some((mut slot, bytes)) = self.copies.pop_front() else { return Ok(None) };
        let failed = |e| driver_error(&format!("copying {bytes} bytes from {}", self.gpu), e);
        self.gpu.watch_ranks(|| slot.copied.try_is_complete())?;
        slot.copied.synchronize().map_err(failed)?;
        let taken = slot.memory.as_mut_slice().map_err(failed)?[..bytes].to_vec();
        self.free.push(slot);
        Ok(Some(taken))
    }
}
