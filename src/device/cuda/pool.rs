//! The pool of device memory. Returned buffers are kept by size class, eight per octave, as in the CPU's pool. Memory
//! goes back to the driver only when an allocation would otherwise fail.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::PoisonError;

use super::driver::{CudaSlice, DevicePtr, DriverError, sys};
use super::graph::Memory;
use super::{Gpu, driver_error};
use crate::device::{PoolStats, size_class};
use crate::error::{Error, Result};

/// Allocation unit in bytes, and the alignment that kernels may rely on.
pub const UNIT: usize = 256;

/// Every byte of a guard.
const GUARD: u8 = 0xA5;

#[derive(Default)]
pub(super) struct Pool {
    /// By size. Last in, first out, since the last one returned may still be in L2.
    free: HashMap<usize, Vec<Free>>,
    /// Serial numbers of the buffers that are handed out, by the address of their memory.
    live: HashMap<sys::CUdeviceptr, u64>,
    /// Times that memory was handed out, returned or given back; also the last serial number.
    changes: u64,
    pub(super) stats: PoolStats,
    /// Nothing is pooled: each buffer is its own allocation.
    guarded: bool,
    /// Bytes of guard before and after each buffer.
    guard: usize,
}

/// A free buffer and its address.
struct Free {
    address: sys::CUdeviceptr,
    memory: CudaSlice<u8>,
}

impl Pool {
    /// Forgets the order in which buffers were returned, so that the same requests in the same order, with the same
    /// buffers in use, get the same addresses.
    pub(super) fn sort(&mut self) {
        self.free.values_mut().for_each(|free| free.sort_unstable_by_key(|free| Reverse(free.address)));
    }

    /// True if the blocks that a graph takes are idle and the buffers it uses are those that were there.
    pub(super) fn has(&self, memory: &Memory) -> bool {
        let idle = |address: &_, size: &_| {
            self.free.get(size).is_some_and(|free| free.iter().any(|free| free.address == *address))
        };
        memory.taken.iter().all(|(address, size)| idle(address, size))
            && memory.used.iter().all(|(address, serial)| self.live.get(address) == Some(serial))
    }

    /// Changes with every change of what [`has`](Self::has) looks at.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// True if nothing is pooled.
    pub(super) fn is_guarded(&self) -> bool {
        self.guarded
    }

    /// `guard_words`: a guarded pool's buffers lie between guards. The emulator needs none: it knows where every
    /// allocation ends and which bytes have been written, and guards would hide both.
    pub(super) fn new(guarded: bool, guard_words: bool) -> Self {
        Pool { guarded, guard: if guarded && guard_words { UNIT } else { 0 }, ..Pool::default() }
    }
}

/// Device memory; returns to its pool when dropped.
pub struct Buffer {
    /// `None` once dropped.
    memory: Option<CudaSlice<u8>>,
    bytes: usize,
    address: sys::CUdeviceptr,
    /// Tells it from other buffers with the same memory, before it or after it.
    serial: u64,
    gpu: Gpu,
}

impl Buffer {
    /// The size asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU it is on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The address of its memory, its guard included, and its serial number.
    pub(super) fn memory(&self) -> (sys::CUdeviceptr, u64) {
        (self.address - self.gpu.pool().guard as u64, self.serial)
    }

    /// Its device address.
    pub(super) fn address(&self) -> sys::CUdeviceptr {
        self.address
    }
}

impl Gpu {
    /// Allocates `bytes` bytes, aligned to 256, contents arbitrary.
    ///
    /// # Errors
    /// `Error::Failed` if there is not enough memory, with the sizes; or a driver error.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let ordered = self.ordered();
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
                // It would become a node of the graph, which alone could use it.
                self.refuse_missing("memory")?;
                pool.stats.misses += 1;
                let memory = match self.ask_driver(size) {
                    Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                        let idle: usize = pool.free.values().flatten().map(|free| free.memory.len()).sum();
                        pool.stats.held -= idle as u64;
                        pool.free.clear();
                        pool.changes += 1;
                        self.trim()?;
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
        pool.changes += 1;
        let (start, serial) = (memory.device_ptr(&self.inner.stream).0, pool.changes);
        pool.live.insert(start, serial);
        drop((pool, ordered));
        self.note_taken(start, size);
        let (address, gpu) = (start + guard as u64, self.off_clock());
        let buffer = Buffer { memory: Some(memory), bytes, address, serial, gpu };
        if guard > 0 {
            // Byte by byte: the guard behind a buffer begins at its last byte.
            self.fill_bytes(start, GUARD, size)?;
            // Unwritten elements are NaN in either type.
            self.fill_bytes(buffer.address, u8::MAX, bytes)?;
        }
        Ok(buffer)
    }

    /// Sets bytes of an allocation of this GPU, which is not in use.
    fn fill_bytes(&self, address: sys::CUdeviceptr, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _ordered = self.ordered();
        self.bind()?;
        // SAFETY: `bytes` bytes of an allocation that nothing else refers to yet, in the order of this GPU's stream.
        let filled = unsafe { sys::cuMemsetD8Async(address, value, bytes, self.inner.stream.cu_stream()).result() };
        filled.map_err(|e| driver_error(&format!("filling {bytes} bytes on {self}"), e))
    }

    /// Gives memory that has been freed back to the system. The driver frees in stream order: what has just been
    /// returned is free once the stream has got there, and what it has freed it keeps for a while.
    fn trim(&self) -> Result<()> {
        self.wait()?;
        let mut pool = std::ptr::null_mut();
        let context = self.inner.stream.context();
        // SAFETY: the device is this context's, and the driver writes one handle.
        if unsafe { sys::cuDeviceGetMemPool(&mut pool, context.cu_device()).result() }.is_ok() {
            // SAFETY: the pool that the driver just named. A device without pools has none and keeps nothing.
            context.record_err(unsafe { sys::cuMemPoolTrimTo(pool, 0).result() });
        }
        Ok(())
    }

    fn ask_driver(&self, size: usize) -> std::result::Result<CudaSlice<u8>, DriverError> {
        // SAFETY: bytes need no initial value: the pool promises arbitrary contents, and tests check that kernels read
        // nothing unwritten.
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

    /// Panics if the guards around a buffer have been overwritten.
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
        let _ordered = self.gpu.ordered();
        if guard > 0 && !std::thread::panicking() {
            self.gpu.check_guards(&memory, self.bytes, guard);
        }
        let mut pool = self.gpu.pool();
        pool.changes += 1;
        pool.live.remove(&start);
        pool.stats.in_use -= memory.len() as u64;
        if pool.guarded {
            pool.stats.held -= memory.len() as u64;
        } else {
            pool.free.entry(memory.len()).or_default().push(Free { address: start, memory });
        }
    }
}
