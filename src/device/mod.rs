//! Where tensors live and operations run.
//!
//! Operations match on [`Device`] themselves; there is no backend trait. Buffers come from the device's pool and return
//! to it when their last handle is dropped, so that a training step, once warm, allocates nothing.

pub mod cpu;

use std::sync::Arc;

pub use cpu::Buffer;

/// A device and its buffer pool; cloning clones the handle.
#[derive(Clone)]
pub enum Device {
    /// The host's cores, through rayon's global pool.
    Cpu(Arc<cpu::Pool>),
}

impl Device {
    /// The CPU with an empty pool.
    pub fn cpu() -> Self {
        Device::Cpu(cpu::Pool::new(false))
    }

    /// The CPU with a guarded pool: buffers are full of NaN when handed out and stand between guard words that are checked
    /// when they come back. Tests use it to see that an operation writes all of its output and nothing else.
    pub fn cpu_guarded() -> Self {
        Device::Cpu(cpu::Pool::new(true))
    }

    /// A buffer for `len` numbers, contents arbitrary.
    pub fn alloc(&self, len: usize) -> Buffer {
        match self {
            Device::Cpu(pool) => cpu::Pool::alloc(pool, len),
        }
    }

    /// What the pool has done so far.
    pub fn pool_stats(&self) -> PoolStats {
        match self {
            Device::Cpu(pool) => pool.stats(),
        }
    }
}

/// Counters of a buffer pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Allocations served from a returned buffer.
    pub hits: u64,
    /// Allocations that had to ask the system for memory.
    pub misses: u64,
    /// Bytes in buffers handed out and not yet returned.
    pub in_use: u64,
    /// The largest `in_use` so far.
    pub peak: u64,
}
