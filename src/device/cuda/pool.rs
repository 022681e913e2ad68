//! Device memory: returned buffers by size, rounded up to eight classes an octave, as in the CPU's pool. Memory goes
//! back to the driver only when an allocation fails for want of it.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::PoisonError;

use super::driver::{CudaSlice, DevicePtr, DriverError, sys};
use super::{Gpu, driver_error};
use crate::device::{PoolStats, size_class};
use crate::error::{Error, Result};

/// Smallest unit of memory, and the alignment that kernels may count on.
pub const UNIT: usize = 256;

/// What guard words hold.
const GUARD: u8 = 0xA5;

#[derive(Default)]
pub(super) struct Pool {
    /// By size; the last one returned is the first to be handed out again, since it may still be in the L2 cache.
    free: HashMap<usize, Vec<Free>>,
    pub(super) stats: PoolStats,
    /// Nothing is kept: each buffer is an allocation of its own.
    guarded: bool,
    /// Bytes of guard words before and behind each buffer.
    guard: usize,
}

/// A buffer that nobody uses, and where it starts.
struct Free {
    address: sys::CUdeviceptr,
    memory: CudaSlice<u8>,
}

impl Pool {
    /// Forgets in which order buffers came back: whoever asks for the same sizes in the same order, with the same
    /// buffers in use, then gets the same addresses.
    pub(super) fn sort(&mut self) {
        self.free.values_mut().for_each(|free| free.sort_unstable_by_key(|free| Reverse(free.address)));
    }

    pub(super) fn new(guarded: bool, emulated: bool) -> Self {
        // The emulator knows where every allocation ends and which bytes have been written; guards would blind it.
        Pool { guarded, guard: if guarded && !emulated { UNIT } else { 0 }, ..Pool::default() }
    }
}

/// Some device memory; goes back to its pool when dropped.
pub struct Buffer {
    /// Taken when dropped.
    memory: Option<CudaSlice<u8>>,
    bytes: usize,
    address: sys::CUdeviceptr,
    gpu: Gpu,
}

impl Buffer {
    /// Size asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU it is on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Where it starts on the device.
    pub(super) fn address(&self) -> sys::CUdeviceptr {
        self.address
    }
}

impl Gpu {
    /// Memory for `bytes` bytes, contents arbitrary, aligned to 256.
    ///
    /// # Errors
    /// `Error::Failed` where there is not enough, with the numbers.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let mut pool = self.pool();
        let guard = pool.guard;
        let size = if pool.guarded { bytes.max(1) + 2 * guard } else { size_class(bytes.max(1), UNIT) };
        let recycled = pool.free.get_mut(&size).and_then(Vec::pop);
        let memory = match recycled {
            Some(Free { memory, .. }) => {
                pool.stats.hits += 1;
                memory
            }
            None => {
                pool.stats.misses += 1;
                let memory = match self.ask_driver(size) {
                    Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                        let idle: usize = pool.free.values().flatten().map(|free| free.memory.len()).sum();
                        pool.stats.held -= idle as u64;
                        pool.free.clear();
                        self.ask_driver(size)
                    }
                    other => other,
                };
                let in_use = pool.stats.in_use;
                let memory = memory.map_err(|e| self.out_of_memory(size, in_use, e))?;
                pool.stats.held += size as u64;
                memory
            }
        };
        pool.stats.in_use += size as u64;
        pool.stats.peak = pool.stats.peak.max(pool.stats.in_use);
        drop(pool);
        let start = memory.device_ptr(&self.inner.stream).0;
        let mut buffer = Buffer { memory: Some(memory), bytes: size, address: start, gpu: self.off_clock() };
        if guard > 0 {
            let pattern = u32::from_ne_bytes([GUARD; 4]);
            self.fill(&mut buffer, 0, size / 4, pattern)?;
            // What nobody writes is a NaN in either type.
            buffer.address = start + guard as u64;
            buffer.bytes = bytes;
            self.fill(&mut buffer, 0, bytes / 4, u32::MAX)?;
        }
        buffer.bytes = bytes;
        Ok(buffer)
    }

    fn ask_driver(&self, size: usize) -> std::result::Result<CudaSlice<u8>, DriverError> {
        // SAFETY: bytes need no initial value; the pool's contract is that contents are arbitrary, and kernels are
        // tested never to read what nobody wrote.
        unsafe { self.inner.stream.alloc::<u8>(size) }
    }

    fn out_of_memory(&self, size: usize, in_use: u64, e: DriverError) -> Error {
        const MIB: f64 = (1 << 20) as f64;
        if e.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return driver_error(&format!("allocating {size} bytes on {self}"), e);
        }
        let purpose = self.inner.purpose.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let purpose = if purpose.is_empty() { "this".into() } else { purpose };
        let free = self.inner.stream.context().mem_get_info().map_or(0, |(free, _)| free);
        Error::Failed(format!(
            "{self} is out of memory: {purpose} needs {:.1} MiB beside {:.1} MiB in use, and {:.1} MiB are free; use a \
             smaller --batch, a larger accumulate or --precision bf16",
            size as f64 / MIB,
            in_use as f64 / MIB,
            free as f64 / MIB,
        ))
    }

    /// Looks at the words around a guarded buffer.
    fn check_guards(&self, memory: &CudaSlice<u8>, bytes: usize, guard: usize) {
        let all = self.inner.stream.clone_dtoh(memory).expect("the guards of a tested buffer can be read");
        assert!(
            all[..guard].iter().all(|&b| b == GUARD),
            "a kernel wrote before the start of a buffer of {bytes} bytes"
        );
        assert!(
            all[guard + bytes..].iter().all(|&b| b == GUARD),
            "a kernel wrote past the end of a buffer of {bytes} bytes"
        );
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        let guard = self.gpu.pool().guard;
        let start = self.address - guard as u64;
        if guard > 0 && !std::thread::panicking() {
            self.gpu.check_guards(&memory, self.bytes, guard);
        }
        let mut pool = self.gpu.pool();
        pool.stats.in_use -= memory.len() as u64;
        if pool.guarded {
            pool.stats.held -= memory.len() as u64;
        } else {
            pool.free.entry(memory.len()).or_default().push(Free { address: start, memory });
        }
    }
}
