//! Page-locked memory for copies that overlap with work on the host.

use std::collections::VecDeque;

use super::driver::{CudaEvent, PinnedHostSlice, result};
use super::{Buffer, Gpu, driver_error};
use crate::error::Result;

/// Two page-locked buffers used in turn: while one is being copied, the host fills the other.
pub(crate) struct Staging {
    gpu: Gpu,
    slots: [Option<Slot>; 2],
    turn: usize,
}

struct Slot {
    memory: PinnedHostSlice<u8>,
    /// Recorded after the last copy out of `memory`.
    copied: CudaEvent,
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
        Staging { gpu: self.clone(), slots: [None, None], turn: 0 }
    }
}

impl Staging {
    /// The GPU that it copies to.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Lets `fill` write `bytes` bytes and copies them to the device: into `to` if it has that size, otherwise into a
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
        gpu.refuse_host("a copy from the host's memory")?;
        let _ordered = gpu.ordered();
        self.turn = 1 - self.turn;
        let slot = &mut self.slots[self.turn];
        if slot.as_ref().is_none_or(|slot| slot.memory.len() < bytes) {
            // SAFETY: the bytes are initialised, just below, before anyone reads them.
            let mut memory = unsafe { context.alloc_pinned::<u8>(bytes) }.map_err(failed)?;
            let start = memory.as_mut_ptr().map_err(failed)?;
            // SAFETY: `memory` has that many bytes and nothing else refers to it yet.
            unsafe { start.write_bytes(0, bytes) };
            let copied = context.new_event(None).map_err(failed)?;
            copied.record(stream).map_err(failed)?;
            *slot = Some(Slot { memory, copied });
        }
        let slot = slot.as_mut().expect("just made");
        // The copy before the last used this memory. It has long finished unless the GPU is two steps behind.
        gpu.watch_ranks(|| slot.copied.try_is_complete())?;
        slot.copied.synchronize().map_err(failed)?;
        let memory = &mut slot.memory.as_mut_slice().map_err(failed)?[..bytes];
        fill(memory);
        gpu.bind()?;
        // SAFETY: `to` holds `bytes` bytes and is reused only in stream order. The page-locked memory is neither
        // written nor freed before the copy has finished: both wait for `copied`, which is recorded after it; if
        // recording fails, the stream is synchronised here.
        unsafe { result::memcpy_htod_async(to.address(), memory, stream.cu_stream()) }.map_err(failed)?;
        if let Err(e) = slot.copied.record(stream) {
            context.record_err(stream.synchronize());
            return Err(failed(e));
        }
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
            None => {
                // SAFETY: the bytes are initialised, just below, before anyone reads them.
                let mut memory = unsafe { context.alloc_pinned::<u8>(bytes) }.map_err(failed)?;
                let start = memory.as_mut_ptr().map_err(failed)?;
                // SAFETY: `memory` has that many bytes and nothing else refers to it yet.
                unsafe { start.write_bytes(0, bytes) };
                let copied = context.new_event(None).map_err(failed)?;
                copied.record(stream).map_err(failed)?;
                Slot { memory, copied }
            }
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
