//! Matrix products: the register tile, packed panels, and how work is handed to threads.
//!
//! A tile is up to `V::ROWS` rows by two vector registers of columns; its sums stay in registers over the whole depth
//! `k`, in order of `k`, so an element's bits do not depend on which tile, block or thread computes it. One operand is
//! read as broadcasts of single numbers straight from where it lies, the other from panels: `k` rows of
//! [`panel_width`] columns, padded with zeros.
//!
//! No blocking over `k` in here: a panel is streamed from the L2 cache at 128 bytes per 14 cycles, which it sustains, and blocking
//! would cost a pass over the sums.

// Loops count with the letters of the formulas, over several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::vector::{Vector, kernel};
use crate::device::Device;
use crate::device::cpu::Buffer;

/// Columns of a panel: two registers.
pub(crate) const fn panel_width<V: Vector>() -> usize {
    2 * V::LANES
}

/// A pointer that tasks share; each dereferences only what no other task touches.
#[derive(Clone, Copy)]
pub(crate) struct Shared(*mut f32);

// SAFETY: dereferencing is `unsafe` at each place, which says why the places differ.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(x: &mut [f32]) -> Self {
        Shared(x.as_mut_ptr())
    }

    /// From a place inside another.
    pub fn new_at(p: *mut f32) -> Self {
        Shared(p)
    }

    /// The place `offset` floats in.
    ///
    /// # Safety
    /// Must lie in (or one past) the slice given to [`Shared::new`].
    pub unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// Scratch memory for tasks: one piece for every thread, allocated at once, so that how many are in use at a time does not depend on
/// luck and the pool's contents are the same after every step.
pub(crate) struct Slots {
    buffer: Buffer,
    each: usize,
}

impl Slots {
    pub fn new(device: &Device, floats_each: usize) -> Self {
        // Whole cache lines, so that threads do not share one.
        let each = floats_each.next_multiple_of(16).max(16);
        Slots { buffer: device.scratch(each * rayon::current_num_threads()), each }
    }

    /// Runs `task(i, scratch)` for every `i < count`; threads take the next number when they are free. A task must not depend on what
    /// the scratch holds at its start.
    pub fn run(&mut self, count: usize, task: impl Fn(usize, &mut [f32]) + Sync) {
        let next = AtomicUsize::new(0);
        self.buffer.as_mut_slice().par_chunks_mut(self.each).for_each(|scratch| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= count {
                    break;
                }
                task(i, scratch);
            }
        });
    }
}

/// [`Slots::run`] without scratch.
pub(crate) fn for_each_task(count: usize, task: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    (0..rayon::current_num_threads()).into_par_iter().for_each(|_| {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                break;
            }
            task(i);
        }
    });
}

/// The `i`th of `parts` nearly equal pieces of `0..len`.
pub(crate) fn piece(len: usize, parts: usize, i: usize) -> Range<usize> {
    len * i / parts..len * (i + 1) / parts
}

/// What becomes of a finished sum.
pub(crate) trait Epilogue: Copy + Sync {
    /// Takes `sum`, columns `column..column + count` of row `row`; `count <= V::LANES`.
    ///
    /// # Safety
    /// The processor has `V::LEVEL`, and the place belongs to the caller's task.
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V);

    /// What the sum starts from.
    ///
    /// # Safety
    /// As for [`take`](Self::take).
    #[inline(always)]
    unsafe fn start<V: Vector>(&self, _row: usize, _column: usize, _count: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::splat(0.0) }
    }
}

#[inline(always)]
pub(crate) unsafe fn load_some<V: Vector>(p: *const f32, count: usize) -> V {
    // SAFETY: `count` floats are readable, says the caller.
    unsafe { if count == V::LANES { V::load(p) } else { V::load_first(p, count) } }
}

#[inline(always)]
pub(crate) unsafe fn store_some<V: Vector>(x: V, p: *mut f32, count: usize) {
    // SAFETY: `count` floats are writable, says the caller.
    unsafe { if count == V::LANES { x.store(p) } else { x.store_first(p, count) } }
}

/// `c[row * stride + column] = sum`.
#[derive(Clone, Copy)]
pub(crate) struct Overwrite {
    pub c: Shared,
    pub stride: usize,
}

impl Epilogue for Overwrite {
    #[inline(always)]
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V) {
        // SAFETY: the caller's promise.
        unsafe { store_some(sum, self.c.at(row * self.stride + column), count) }
    }
}

/// [`Overwrite`] that goes on from the sum that is there: the bits are those of one sum over both depths.
#[derive(Clone, Copy)]
pub(crate) struct Continue {
    pub c: Shared,
    pub stride: usize,
}

impl Epilogue for Continue {
    #[inline(always)]
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V) {
        // SAFETY: the caller's promise.
        unsafe { store_some(sum, self.c.at(row * self.stride + column), count) }
    }

    #[inline(always)]
    unsafe fn start<V: Vector>(&self, row: usize, column: usize, count: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe { load_some(self.c.at(row * self.stride + column), count) }
    }
}

/// `c[row * stride + column] += sum`.
#[derive(Clone, Copy)]
pub(crate) struct Accumulate {
    pub c: Shared,
    pub stride: usize,
}

impl Epilogue for Accumulate {
    #[inline(always)]
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V) {
        // SAFETY: the caller's promise.
        unsafe {
            let c = self.c.at(row * self.stride + column);
            store_some(load_some::<V>(c, count).add(sum), c, count)
        }
    }
}

/// One register tile: `sums[i][j] += sum over k of a(i, k) b(k, j)`, where `a(i, k)` is `a[i * stride + k]`, or `a[k * stride + i]` if
/// `TRANSPOSED`.
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const C: usize, const TRANSPOSED: bool>(
    depth: usize,
    a: *const f32,
    stride: usize,
    b: *const f32,
    ahead: *const f32,
    mut sums: [[V; C]; R],
) -> [[V; C]; R] {
    // SAFETY: the caller's promise about `a`, `b` and the processor.
    unsafe {
        let (mut a, mut b) = (a, b);
        let mut left = depth;
        while left > 0 {
            if !TRANSPOSED {
                for i in 0..R {
                    V::prefetch(ahead.wrapping_add(i * stride + depth - left));
                }
            }
            let run = left.min(16);
            left -= run;
            for _ in 0..run {
                let mut columns = [V::splat(0.0); C];
                for j in 0..C {
                    columns[j] = V::load(b.add(j * V::LANES));
                }
                for i in 0..R {
                    let x = V::splat(*a.add(if TRANSPOSED { i } else { i * stride }));
                    for j in 0..C {
                        sums[i][j] = x.mul_add(columns[j], sums[i][j]);
                    }
                }
                a = a.add(if TRANSPOSED { stride } else { 1 });
                b = b.add(panel_width::<V>());
            }
        }
        sums
    }
}

kernel! {
    /// `rows` rows times one panel of which `columns` count: the sums over `depth` go to `epilogue`. While a tile is multiplied, the
    /// next one's rows are prefetched (a tile reads some 14 streams, which the processor does not predict well); `next` is where the caller
    /// goes on.
    ///
    /// # Safety
    /// The processor has `V::LEVEL`; `a` is readable at `i * stride + k` (`k * stride + i` if `TRANSPOSED`) for all `i < rows`,
    /// `k < depth`; `b` holds `depth` rows of a panel; the places of `epilogue` belong to the caller.
    pub(crate) unsafe fn rows_by_panel<V, E: Epilogue; const TRANSPOSED: bool>(
        rows: usize,
        columns: usize,
        depth: usize,
        a: *const f32,
        stride: usize,
        b: *const f32,
        next: *const f32,
        epilogue: E,
    ) {
        debug_assert!((1..=panel_width::<V>()).contains(&columns));
        if rows == 0 {
            return;
        }
        // Tiles of nearly equal height: 14 + 14 + 14 + 14 + 8 rows would leave the last with too few sums in flight.
        let tiles = rows.div_ceil(V::ROWS);
        for t in 0..tiles {
            let rows = piece(rows, tiles, t);
            let ahead = if t + 1 < tiles { a.wrapping_add(rows.end * stride) } else { next };
            let a = a.add(rows.start * if TRANSPOSED { 1 } else { stride });
            macro_rules! heights {
                ($($r:literal)*) => {
                    match rows.len() {
                        $($r if V::ROWS >= $r => {
                            if columns > V::LANES {
                                let mut sums = [[V::splat(0.0); 2]; $r];
                                for i in 0..$r {
                                    sums[i][0] = epilogue.start(rows.start + i, 0, V::LANES);
                                    sums[i][1] = epilogue.start(rows.start + i, V::LANES, columns - V::LANES);
                                }
                                let sums = tile::<V, $r, 2, TRANSPOSED>(depth, a, stride, b, ahead, sums);
                                for i in 0..$r {
                                    epilogue.take(rows.start + i, 0, V::LANES, sums[i][0]);
                                    epilogue.take(rows.start + i, V::LANES, columns - V::LANES, sums[i][1]);
                                }
                            } else {
                                let mut sums = [[V::splat(0.0); 1]; $r];
                                for i in 0..$r {
                                    sums[i][0] = epilogue.start(rows.start + i, 0, columns);
                                }
                                let sums = tile::<V, $r, 1, TRANSPOSED>(depth, a, stride, b, ahead, sums);
                                for i in 0..$r {
                                    epilogue.take(rows.start + i, 0, columns, sums[i][0]);
                                }
                            }
                        })*
                        r => unreachable!("a tile of {r} rows"),
                    }
                };
            }
            heights!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
    }
}

kernel! {
    /// A panel from a matrix that has its rows along `k`: `panel[k][j] = b[k * stride + j]`, zero for `j >= columns`.
    ///
    /// # Safety
    /// The processor has `V::LEVEL`; `b` is readable there, `panel` writable for `depth * panel_width` floats.
    pub(crate) unsafe fn pack_rows<V>(depth: usize, columns: usize, b: *const f32, stride: usize, panel: *mut f32) {
        for k in 0..depth {
            let (from, to) = (b.add(k * stride), panel.add(k * panel_width::<V>()));
            let first = columns.min(V::LANES);
            load_some::<V>(from, first).store(to);
            let second = columns - first;
            let second = if second > 0 { load_some::<V>(from.add(V::LANES), second) } else { V::splat(0.0) };
            second.store(to.add(V::LANES));
        }
    }
}

kernel! {
    /// A panel from a matrix that has its columns along `k`: `panel[k][j] = b[j * stride + k]`, zero for `j >= columns`.
    ///
    /// # Safety
    /// As for [`pack_rows`].
    pub(crate) unsafe fn pack_columns<V>(depth: usize, columns: usize, b: *const f32, stride: usize, panel: *mut f32) {
        for j in (0..panel_width::<V>()).step_by(V::LANES) {
            for k in (0..depth).step_by(V::LANES) {
                let count = V::LANES.min(depth - k);
                let mut block = V::zero_block();
                let rows = block.as_mut();
                for l in 0..V::LANES {
                    if j + l < columns {
                        rows[l] = load_some::<V>(b.add((j + l) * stride + k), count);
                    }
                }
                V::transpose(&mut block);
                let rows = block.as_mut();
                for l in 0..count {
                    rows[l].store(panel.add((k + l) * panel_width::<V>() + j));
                }
            }
        }
    }
}

/// Sums of each of `c` columns over the rows of each of `groups` equal groups: `sums[g][j] = sum over r of x[g][r][j]`.
///
/// Rows are summed by eights, the eights in runs of 64 rows, then the runs: the error grows with `8 + 8 + rows / 64` and not with
/// the number of rows. The order depends on the shape alone.
pub(crate) fn column_sums<V: Vector>(device: &Device, x: &[f32], groups: usize, c: usize, sums: &mut [f32]) {
    const RUN: usize = 64;
    let rows = x.len() / (groups * c);
    assert_eq!(sums.len(), groups * c, "column sums of {groups} groups of {c}");
    let runs = rows.div_ceil(RUN);
    let mut partial = device.scratch(groups * runs * c);
    let out = Shared::new(partial.as_mut_slice());
    for_each_task(groups * runs, |i| {
        let (group, run) = (i / runs, i % runs);
        let first = run * RUN;
        let count = RUN.min(rows - first);
        // SAFETY: level from the caller; rows first..first + count of the group lie in x; task i owns partial[i].
        unsafe { sum_rows::<V>(count, c, x[(group * rows + first) * c..].as_ptr(), out.at(i * c)) }
    });
    let partial = partial.as_slice();
    let out = Shared::new(sums);
    for_each_task(groups, |g| {
        // SAFETY: level from the caller; the group's runs lie in partial; task g owns sums[g].
        unsafe { sum_rows::<V>(runs, c, partial[g * runs * c..].as_ptr(), out.at(g * c)) }
    });
}

kernel! {
    /// `sums[j] = sum over i < rows of x[i * c + j]`, eight rows at a time.
    unsafe fn sum_rows<V>(rows: usize, c: usize, x: *const f32, sums: *mut f32) {
        for j in (0..c).step_by(V::LANES) {
            let count = V::LANES.min(c - j);
            let mut sum = V::splat(0.0);
            for first in (0..rows).step_by(8) {
                let mut eight = V::splat(0.0);
                for i in first..rows.min(first + 8) {
                    eight = eight.add(load_some::<V>(x.add(i * c + j), count));
                }
                sum = sum.add(eight);
            }
            store_some(sum, sums.add(j), count);
        }
    }
}
