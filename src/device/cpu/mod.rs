//! The CPU: aligned pooled buffers.
//!
//! The pool keeps returned buffers by size class, eight per octave: a training step requests the same sizes every time,
//! and scratch space of nearly equal sizes shares buffers at a cost of 6 % on average. The pool never splits or joins
//! buffers, and frees no memory before it is dropped.
//!
//! A guarded pool (tests) hands out buffers filled with NaN between guard words: one cache line before, and at least
//! one line from the first float past the end. It checks them when a buffer comes back.
//!
//! Nothing in [`device::cpu`](self) knows tensors, parameters or operations: it works on slices and extents.

pub(crate) mod direct;
pub(crate) mod gemm;
#[cfg(any(target_os = "linux", test))]
mod memory;
pub mod simd;
pub(crate) mod vector;
pub(crate) mod winograd;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{PoolStats, size_class};

/// Bytes of host memory that this process can still use, within the machine, its control groups and its resource
/// limits; `None` if the system does not say.
#[cfg(target_os = "linux")]
pub fn available_memory() -> Option<u64> {
    memory::available(&|path| std::fs::read_to_string(path).ok())
}

/// Bytes of host memory that this process can still use; `None` if the system does not say.
#[cfg(not(target_os = "linux"))]
pub fn available_memory() -> Option<u64> {
    let memory = sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    let system = sysinfo::System::new_with_specifics(memory);
    (system.total_memory() > 0).then(|| system.available_memory())
}

/// One cache line and one AVX-512 register: the unit and alignment of every buffer.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Bytes per line.
pub(super) const UNIT: usize = size_of::<Line>();

/// Returned buffers by number of lines, and the counters.
#[derive(Default)]
struct Shelves {
    free: HashMap<usize, Vec<Vec<Line>>>,
    stats: PoolStats,
}

/// A pool of host buffers.
pub struct Pool {
    shelves: Mutex<Shelves>,
    /// Guard lines before and after each buffer: 0, or 1 in a guarded pool.
    guard: usize,
}

/// Value of the guard words: a number no computation here produces.
const GUARD: f32 = -6.022_140_8e23;

impl Pool {
    pub(super) fn new(guarded: bool) -> Arc<Self> {
        Arc::new(Pool { shelves: Mutex::default(), guard: usize::from(guarded) })
    }

    pub(super) fn alloc(pool: &Arc<Pool>, len: usize) -> Buffer {
        let lines = size_class((len.div_ceil(16) + 2 * pool.guard) * UNIT, UNIT) / UNIT;
        let recycled = {
            let mut shelves = pool.shelves();
            let recycled = shelves.free.get_mut(&lines).and_then(Vec::pop);
            match recycled {
                Some(_) => shelves.stats.hits += 1,
                None => {
                    shelves.stats.misses += 1;
                    shelves.stats.held += (lines * size_of::<Line>()) as u64;
                }
            }
            shelves.stats.in_use += (lines * size_of::<Line>()) as u64;
            shelves.stats.peak = shelves.stats.peak.max(shelves.stats.in_use);
            recycled
        };
        let mut data = recycled.unwrap_or_else(|| bytemuck::zeroed_vec(lines));
        if pool.guard > 0 {
            data.fill(Line([GUARD; 16]));
        }
        let mut buffer = Buffer { data, len, pool: pool.clone() };
        if pool.guard > 0 {
            buffer.as_mut_slice().fill(f32::NAN);
        }
        buffer
    }

    pub(super) fn stats(&self) -> PoolStats {
        self.shelves().stats
    }

    /// A panic cannot leave the shelves inconsistent, so a poisoned lock is safe to use.
    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `len` floats, 64-byte aligned; returns to its pool when dropped.
pub struct Buffer {
    data: Vec<Line>,
    len: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// The floats.
    pub fn as_slice(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.data[self.pool.guard..])[..self.len]
    }

    /// The floats, mutable.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.data[self.pool.guard..])[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        if self.pool.guard > 0 && !std::thread::panicking() {
            let floats: &[f32] = bytemuck::cast_slice(&data);
            let (before, rest) = floats.split_at(16 * self.pool.guard);
            let intact = |words: &[f32]| words.iter().all(|&word| word == GUARD);
            assert!(intact(before), "something wrote before the start of a buffer of {} numbers", self.len);
            assert!(intact(&rest[self.len..]), "something wrote past the end of a buffer of {} numbers", self.len);
        }
        let mut shelves = self.pool.shelves();
        shelves.stats.in_use -= (data.len() * size_of::<Line>()) as u64;
        shelves.free.entry(data.len()).or_default().push(data);
    }
}

#[cfg(test)]
mod tests;
