//! Page-locked memory for copies that run beside the host.

use super::driver::{CudaEvent, PinnedHostSlice, result};
use super::{Buffer, Gpu, driver_error};
use crate::error::Result;

/// Two pieces of page-locked memory in turn: while one is copied the host fills the other.
pub(crate) struct Staging {
    gpu: Gpu,
    slots: [Option<Slot>; 2],
    turn: usize,
}

struct Slot {
    memory: PinnedHostSlice<u8>,
    /// Recorded behind the last copy out of `memory`.
    copied: CudaEvent,
}

impl Drop for Slot {
    /// Waits for the copy out of `memory`, which is freed next. A driver that cannot be waited for has failed for good
    /// and copies no more; the error is kept for its next call.
    fn drop(&mut self) {
        let context = self.memory.context().clone();
        context.record_err(self.copied.synchronize());
    }
}

impl Gpu {
    /// Staging without memory yet.
    pub(crate) fn staging(&self) -> Staging {
        Staging { gpu: self.clone(), slots: [None, None], turn: 0 }
    }
}

impl Staging {
    /// The GPU that it copies to.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Lets `fill` write `bytes` bytes and copies them to the device, into `to` if that has the size; does not wait for
    /// the copy.
    ///
    /// # Errors
    /// A driver that fails, or has no memory left.
    pub fn upload(&mut self, to: Option<Buffer>, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<Buffer> {
        let gpu = &self.gpu;
        let (stream, context) = (&gpu.inner.stream, gpu.inner.stream.context());
        let failed = |e| driver_error(&format!("staging {bytes} bytes for {gpu}"), e);
        let to = match to.filter(|to| to.bytes() == bytes) {
            Some(to) => to,
            None => gpu.alloc(bytes)?,
        };
        gpu.owns(&to);
        self.turn = 1 - self.turn;
        let slot = &mut self.slots[self.turn];
        if slot.as_ref().is_none_or(|slot| slot.memory.len() < bytes) {
            // SAFETY: the bytes are given a value before anyone reads them.
            let mut memory = unsafe { context.alloc_pinned::<u8>(bytes) }.map_err(failed)?;
            let start = memory.as_mut_ptr().map_err(failed)?;
            // SAFETY: `memory` has that many bytes and nobody else knows it yet.
            unsafe { start.write_bytes(0, bytes) };
            let copied = context.new_event(None).map_err(failed)?;
            copied.record(stream).map_err(failed)?;
            *slot = Some(Slot { memory, copied });
        }
        let slot = slot.as_mut().expect("just made");
        // The copy before the last used this memory; it has long ended unless the GPU is two steps behind.
        slot.copied.synchronize().map_err(failed)?;
        let memory = &mut slot.memory.as_mut_slice().map_err(failed)?[..bytes];
        fill(memory);
        gpu.bind()?;
        // SAFETY: `to` holds `bytes` bytes and is handed out again only in the order of the stream. The page-locked
        // memory is neither written nor freed before the copy has ended: both wait for `copied`, which is recorded
        // behind it, and where that fails the stream is waited for here.
        unsafe { result::memcpy_htod_async(to.address(), memory, stream.cu_stream()) }.map_err(failed)?;
        if let Err(e) = slot.copied.record(stream) {
            context.record_err(stream.synchronize());
            return Err(failed(e));
        }
        Ok(to)
    }
}
