//! Matrix products: the register tile, packed panels, and the distribution of work to threads.
//!
//! A tile is up to `V::ROWS` rows by two vector registers of columns. Its sums stay in registers over the whole depth
//! and run in order of `k`, so an element's bits do not depend on the tile, block or thread that computes it. One
//! operand is read in place, as broadcasts of single numbers; the other is packed into panels: a row of [`panel_width`]
//! columns for each `k`, padded with zeros.
//!
//! No blocking over `k` here: a panel streams from L2 at 128 bytes per 14 cycles, which L2 sustains, and blocking would
//! cost a pass over the sums.
//!
//! # Soundness
//!
//! Functions that take raw pointers are `unsafe` and say what must be there. The safe functions that call them
//! ([`column_sums`], and `outputs` and `weight_gradient` of the two convolutions) check the lengths of their slices,
//! split the results into tasks with no element in common, and give each task pointers into a [`Shared`].

// Loops use the formulas' indices, over several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::vector::{Vector, kernel};
use crate::device::Device;
use crate::device::cpu::Buffer;

/// Columns per panel: two registers.
pub(crate) const fn panel_width<V: Vector>() -> usize {
    2 * V::LANES
}

/// A slice that tasks write concurrently, each to elements of its own: a pointer that carries the slice's borrow.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a>(*mut f32, PhantomData<&'a mut [f32]>);

// SAFETY: the pointer may go to other threads, as `&mut [f32]` may. Every use of it is `unsafe` and says why no two
// tasks touch the same float.
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Borrows `x` for as long as the tasks may write.
    pub fn new(x: &'a mut [f32]) -> Self {
        Shared(x.as_mut_ptr(), PhantomData)
    }

    /// From a pointer into another `Shared` or into a task's scratch. The caller of [`Shared::at`] promises that the
    /// memory is still borrowed.
    pub fn new_at(p: *mut f32) -> Self {
        Shared(p, PhantomData)
    }

    /// A pointer to the float at `offset`.
    ///
    /// # Safety
    /// It must lie in (or one past) the slice that this was made from, which must still be borrowed.
    pub unsafe fn at(self, offset: usize) -> *mut f32 {
        // SAFETY: the sum stays within one allocation, by the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// Scratch memory for tasks, the same amount for every thread, allocated at once. So the memory in use does not depend
/// on timing, and the pool's contents are the same after every step.
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

    /// Runs `task(i, scratch)` once for every `i < count`; a free thread takes the next `i`. The scratch has at least
    /// the floats requested; a task must not depend on its initial contents.
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

/// The `i`th of `count` consecutive chunks of `0..len`, whose lengths differ by at most one.
pub(crate) fn nth_chunk(len: usize, count: usize, i: usize) -> Range<usize> {
    len * i / count..len * (i + 1) / count
}

/// What happens to a finished sum.
pub(crate) trait Epilogue: Copy + Sync {
    /// Consumes `sum`: columns `column..column + count` of row `row`.
    ///
    /// # Safety
    /// A `V::Token` exists, `count <= V::LANES`, and these elements are inside the epilogue's slices and belong to the
    /// caller's task: no other task reads or writes them meanwhile.
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V);

    /// The initial value of the sum.
    ///
    /// # Safety
    /// As for [`take`](Self::take).
    #[inline(always)]
    unsafe fn start<V: Vector>(&self, _row: usize, _column: usize, _count: usize) -> V {
        // SAFETY: touches no memory; the caller promises V's processor.
        unsafe { V::splat(0.0) }
    }
}

/// Loads `count` floats from `p`; the other lanes are zero.
///
/// # Safety
/// A `V::Token` exists, `count <= V::LANES`, and `count` floats at `p` are readable.
#[inline(always)]
pub(crate) unsafe fn load_some<V: Vector>(p: *const f32, count: usize) -> V {
    // SAFETY: the caller's promise; `load` reads LANES floats only where `count` is that many.
    unsafe { if count == V::LANES { V::load(p) } else { V::load_first(p, count) } }
}

/// Stores the first `count` lanes to `p`.
///
/// # Safety
/// A `V::Token` exists, `count <= V::LANES`, and `count` floats at `p` are writable.
#[inline(always)]
pub(crate) unsafe fn store_some<V: Vector>(x: V, p: *mut f32, count: usize) {
    // SAFETY: the caller's promise; `store` writes LANES floats only where `count` is that many.
    unsafe { if count == V::LANES { x.store(p) } else { x.store_first(p, count) } }
}

/// `c[row * stride + column] = sum`.
#[derive(Clone, Copy)]
pub(crate) struct Overwrite<'a> {
    pub c: Shared<'a>,
    pub stride: usize,
}

impl Epilogue for Overwrite<'_> {
    #[inline(always)]
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V) {
        // SAFETY: the caller promises V's processor and `count` floats of its own there.
        unsafe { store_some(sum, self.c.at(row * self.stride + column), count) }
    }
}

/// Like [`Overwrite`], but the sum starts from the value already there: the bits are those of one sum over both depths.
#[derive(Clone, Copy)]
pub(crate) struct Continue<'a> {
    pub c: Shared<'a>,
    pub stride: usize,
}

impl Epilogue for Continue<'_> {
    #[inline(always)]
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V) {
        // SAFETY: the caller promises V's processor and `count` floats of its own there.
        unsafe { store_some(sum, self.c.at(row * self.stride + column), count) }
    }

    #[inline(always)]
    unsafe fn start<V: Vector>(&self, row: usize, column: usize, count: usize) -> V {
        // SAFETY: the caller promises V's processor and `count` floats of its own there.
        unsafe { load_some(self.c.at(row * self.stride + column), count) }
    }
}

/// `c[row * stride + column] += sum`.
#[derive(Clone, Copy)]
pub(crate) struct Accumulate<'a> {
    pub c: Shared<'a>,
    pub stride: usize,
}

impl Epilogue for Accumulate<'_> {
    #[inline(always)]
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V) {
        // SAFETY: the caller promises V's processor and `count` floats of its own there.
        unsafe {
            let c = self.c.at(row * self.stride + column);
            store_some(load_some::<V>(c, count).add(sum), c, count)
        }
    }
}

/// One register tile: `sums[i][j] += sum over k of a(i, k) b(k, j)`, where `a(i, k)` is `a[i * stride + k]`, or `a[k *
/// stride + i]` if `TRANSPOSED`. Prefetches the rows at `ahead`, which need not be valid.
///
/// # Safety
/// A `V::Token` exists; `a` is readable at every (i, k) with `i < R`, `k < depth`; `b` holds `depth` rows of a panel of
/// which `C` registers are readable.
#[inline(always)]
unsafe fn tile<V: Vector, const R: usize, const C: usize, const TRANSPOSED: bool>(
    depth: usize,
    a: *const f32,
    stride: usize,
    b: *const f32,
    ahead: *const f32,
    mut sums: [[V; C]; R],
) -> [[V; C]; R] {
    // SAFETY: in round k, `a` has moved by k columns (rows if TRANSPOSED) and `b` by k rows. The caller promises that
    // they are readable there, and V's processor.
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
                // After the last round these may point beyond their allocations; they are not dereferenced.
                a = a.wrapping_add(if TRANSPOSED { stride } else { 1 });
                b = b.wrapping_add(panel_width::<V>());
            }
        }
        sums
    }
}

kernel! {
    /// Multiplies `rows` rows by the first `columns` columns of one panel: the sums over `depth` go to `epilogue`.
    /// While a tile is multiplied, the next tile's rows are prefetched: a tile reads up to 14 streams, too many for the
    /// hardware prefetcher. `next` is the caller's next `a`; it need not be valid.
    ///
    /// # Safety
    /// `a` is readable at `i * stride + k` (`k * stride + i` if `TRANSPOSED`) for all `i < rows`, `k < depth`;
    /// `columns` is from 1 to the panel's width; `b` holds `depth` rows of a panel, readable through the last register
    /// that holds any of the first `columns` columns; the elements of `epilogue` at rows below `rows` and columns below
    /// `columns` exist and belong to the caller.
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
        // Tiles of nearly equal height: in 14 + 14 + 14 + 14 + 8 rows, the last would have too few sums in flight.
        let tiles = rows.div_ceil(V::ROWS);
        for t in 0..tiles {
            let rows = nth_chunk(rows, tiles, t);
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
    /// Packs a panel from a matrix with a row for each `k`: `panel[k][j] = b[k * stride + j]`, zero for `j >= columns`.
    ///
    /// # Safety
    /// `b[k * stride + j]` is readable for `k < depth` and `j < columns`, which is at most the panel's width; `panel`
    /// is writable for `depth * panel_width` floats.
    pub(crate) unsafe fn pack_rows<V>(depth: usize, columns: usize, b: *const f32, stride: usize, panel: *mut f32) {
        for k in 0..depth {
            let (from, to) = (b.add(k * stride), panel.add(k * panel_width::<V>()));
            let first = columns.min(V::LANES);
            load_some::<V>(from, first).store(to);
            let second = columns - first;
            let second = if second > 0 { load_some(from.add(V::LANES), second) } else { V::splat(0.0) };
            second.store(to.add(V::LANES));
        }
    }
}

kernel! {
    /// Packs a panel from a matrix with a column for each `k`: `panel[k][j] = b[j * stride + k]`, zero for `j >=
    /// columns`.
    ///
    /// # Safety
    /// As for [`pack_rows`], with `b[j * stride + k]`.
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

/// Sums each of `c` columns over the rows of each of `groups` equal groups: `sums[g][j] = sum over r of x[g][r][j]`.
///
/// Rows are summed in eights, eights in runs of 64 rows, then the runs, again in eights: the error grows with about `8
/// + 8 + 8 + rows / 512` additions instead of `rows`. The order depends on the shape alone.
pub(crate) fn column_sums<V: Vector>(
    token: V::Token,
    device: &Device,
    x: &[f32],
    groups: usize,
    c: usize,
    sums: &mut [f32],
) {
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
        let x = &x[(group * rows + first) * c..][..count * c];
        // SAFETY: x is sliced to `count` rows; task i alone has row i of `partial`, which has groups * runs rows of c.
        unsafe { sum_rows::<V>(token, count, c, x.as_ptr(), out.at(i * c)) }
    });
    let partial = partial.as_slice();
    let out = Shared::new(sums);
    for_each_task(groups, |g| {
        let partial = &partial[g * runs * c..][..runs * c];
        // SAFETY: `partial` is sliced to `runs` rows; task g alone has row g of `sums`, which has `groups` rows of c.
        unsafe { sum_rows::<V>(token, runs, c, partial.as_ptr(), out.at(g * c)) }
    });
}

kernel! {
    /// `sums[j] = sum over i < rows of x[i * c + j]`, eight rows at a time.
    ///
    /// # Safety
    /// `x` is readable for `rows * c` floats; the `c` floats at `sums` are writable and the caller's alone.
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
