//! A device of shapes alone: tensors have a shape but no elements, and operations allocate but compute nothing. A
//! training step on it takes a millisecond and shows how much memory the step needs on the real device: its pool counts
//! the buffers the real pool would hand out, in the same size classes. (The name is PyTorch's.)
//!
//! Deliberately absent: the scratch space of the CPU and GPU paths, which do not run here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{PoolStats, Precision, size_class};

/// Stands for a device in questions of memory. Cloning clones the handle.
#[derive(Clone)]
pub struct Meta(Arc<Inner>);

struct Inner {
    precision: Precision,
    gpu: bool,
    /// Allocation unit, in bytes, of the pool it stands for.
    unit: usize,
    shelves: Mutex<Shelves>,
}

/// Number of returned buffers of each size.
#[derive(Default)]
struct Shelves {
    free: HashMap<usize, usize>,
    stats: PoolStats,
}

impl Meta {
    pub(super) fn new(precision: Precision, gpu: bool, unit: usize) -> Self {
        Meta(Arc::new(Inner { precision, gpu, unit, shelves: Mutex::default() }))
    }

    /// What the device is opened for.
    pub fn precision(&self) -> Precision {
        self.0.precision
    }

    /// True if it stands for a GPU.
    pub fn is_gpu(&self) -> bool {
        self.0.gpu
    }

    /// The pool's counters.
    pub fn pool_stats(&self) -> PoolStats {
        self.shelves().stats
    }

    pub(super) fn alloc(&self, bytes: usize) -> Buffer {
        // A GPU's pool has no empty buffers.
        let size = size_class(bytes.max(usize::from(self.0.gpu)), self.0.unit);
        let mut shelves = self.shelves();
        let Shelves { free, stats } = &mut *shelves;
        match free.get_mut(&size).filter(|count| **count > 0) {
            Some(count) => {
                *count -= 1;
                stats.hits += 1;
            }
            None => {
                stats.misses += 1;
                stats.held += size as u64;
            }
        }
        stats.in_use += size as u64;
        stats.peak = stats.peak.max(stats.in_use);
        drop(shelves);
        Buffer { size, meta: self.clone() }
    }

    /// A panic cannot leave the counters inconsistent, so a poisoned lock is safe to use.
    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        self.0.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that is counted but does not exist; returns to its pool when dropped.
pub struct Buffer {
    size: usize,
    meta: Meta,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut shelves = self.meta.shelves();
        shelves.stats.in_use -= self.size as u64;
        *shelves.free.entry(self.size).or_default() += 1;
    }
}
