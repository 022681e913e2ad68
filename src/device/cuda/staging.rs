//! Page-locked memory for copies that run beside the host.

use cudarc::driver::{CudaEvent, PinnedHostSlice, result};

use super::{Buffer, Gpu, driver_error};
use crate::error::Result;

/// Two pieces of page-locked memory in turn: while one is copied the host fills the other.
pub struct Staging {
    gpu: Gpu,
    slots: [Option<Slot>; 2],
    turn: usize,
}

struct Slot {
    memory: PinnedHostSlice<u8>,
    /// Recorded behind the last copy out of `memory`.
    copied: CudaEvent,
}

impl Gpu {
    /// Staging without memory yet.
    pub fn staging(&self) -> Staging {
        Staging { gpu: self.clone(), slots: [None, None], turn: 0 }
    }
}

impl Staging {
    /// The GPU that it copies to.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Lets `fill` write `bytes` bytes and copies them to the device, into `to` if that has the size; does not wait for the copy.
    ///
    /// # Errors
    /// A driver that fails, or has no memory left.
    pub fn upload(&mut self, to: Option<Buffer>, bytes: usize, fill: impl FnOnce(&mut [u8])) -> Result<Buffer> {
        let gpu = &self.gpu;
        let failed = |e| driver_error(&format!("staging {bytes} bytes for {gpu}"), e);
        let to = match to.filter(|to| to.bytes() == bytes) {
            Some(to) => to,
            None => gpu.alloc(bytes)?,
        };
        self.turn = 1 - self.turn;
        let slot = &mut self.slots[self.turn];
        if slot.as_ref().is_none_or(|slot| slot.memory.len() < bytes) {
            // SAFETY: bytes need no initial value, and all that are copied are written below.
            let memory = unsafe { gpu.0.stream.context().alloc_pinned::<u8>(bytes) }.map_err(failed)?;
            let copied = gpu.0.stream.context().new_event(None).map_err(failed)?;
            copied.record(&gpu.0.stream).map_err(failed)?;
            *slot = Some(Slot { memory, copied });
        }
        let slot = slot.as_mut().expect("just made");
        // The copy before the last used this memory; it has long ended unless the GPU is two steps behind.
        slot.copied.synchronize().map_err(failed)?;
        let memory = &mut slot.memory.as_mut_slice().map_err(failed)?[..bytes];
        fill(memory);
        gpu.bind()?;
        // SAFETY: `to` holds `bytes` bytes and is handed out again only in the order of the stream; the page-locked memory is not
        // written before `copied`, recorded behind this copy, has passed.
        unsafe { result::memcpy_htod_async(to.address(), memory, gpu.0.stream.cu_stream()) }.map_err(failed)?;
        slot.copied.record(&gpu.0.stream).map_err(failed)?;
        Ok(to)
    }
}
