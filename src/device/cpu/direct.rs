//! Direct convolution as a matrix product, for any kernel size, stride, padding and number of channels.
//!
//! Forward and the gradient of the input are one loop: patches of an output grid times the packed weights. A task
//! gathers the patches of up to 60 pixels into scratch that stays in L2 (a patch is `taps * c` numbers, zeros outside
//! the image) and multiplies them by the panels; the im2col matrix is never stored. A 1x1 kernel at stride 1 reads its
//! input in place.
//!
//! The gradient of the input of a strided convolution splits into `stride^2` grids, one per remainder of (row, column)
//! modulo the stride. Each sees a subset of the taps at stride 1, so nothing is multiplied by inserted zeros.
//!
//! The gradient of the weights multiplies `dy` transposed by gathered patches, over all pixels.

use rayon::prelude::*;

use super::gemm::{self, Epilogue, Shared, Slots, nth_chunk, panel_width, rows_by_panel};
use super::vector::{Vector, kernel};
use crate::device::Device;
use crate::device::cpu::Buffer;

/// How one dimension (rows or columns) of an output grid maps to its input: output `i`, tap `t` reads `i * stride +
/// first + t`, which counts as zero outside `0..len`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis {
    /// Outputs.
    pub out: usize,
    /// Inputs.
    pub len: usize,
    pub taps: usize,
    pub stride: usize,
    pub first: isize,
}

/// The row (or column) of the weight for tap `t`: `first + t * step`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TapOf {
    pub first: isize,
    pub step: isize,
}

/// The patches that a grid of outputs reads: `n` images of `rows.len x cols.len x c`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patches {
    pub n: usize,
    pub rows: Axis,
    pub cols: Axis,
    pub c: usize,
}

impl Patches {
    /// Number of outputs, all images together.
    fn count(&self) -> usize {
        self.n * self.rows.out * self.cols.out
    }

    /// Elements per patch.
    fn depth(&self) -> usize {
        self.rows.taps * self.cols.taps * self.c
    }

    /// True if patch `i` is pixel `i` of the input.
    fn is_identity(&self) -> bool {
        [self.rows, self.cols].iter().all(|a| a.taps == 1 && a.stride == 1 && a.first == 0 && a.out == a.len)
    }

    /// Image, row and column of output `i`.
    fn place(&self, i: usize) -> [usize; 3] {
        let pixels = self.rows.out * self.cols.out;
        [i / pixels, i % pixels / self.cols.out, i % self.cols.out]
    }
}

/// A convolution weight `(c_out, kh, kw, c_in)`.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a> {
    pub data: &'a [f32],
    pub c_out: usize,
    pub kh: usize,
    pub kw: usize,
    pub c_in: usize,
}

impl Weight<'_> {
    fn row_stride(&self) -> usize {
        self.kh * self.kw * self.c_in
    }
}

/// Where the outputs of a grid go: pixel `(i, j)` to `(i * step + row, j * step + col)` of an `h x w x c` image; and
/// what the epilogue adds.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub h: usize,
    pub w: usize,
    pub c: usize,
    pub step: usize,
    pub row: usize,
    pub col: usize,
    pub plus: Plus<'a>,
}

/// What the epilogue adds to a convolution's sums before it stores them.
#[derive(Clone, Copy, Default)]
pub(crate) struct Plus<'a> {
    /// `c` elements.
    pub bias: Option<&'a [f32]>,
    /// `(n, c)`: `c` elements per image.
    pub shift: Option<&'a [f32]>,
    /// Shaped like the output.
    pub residual: Option<&'a [f32]>,
}

/// Most patches per task: 4 register tiles of AVX-512 (56 patches), 10 of the other levels.
const BLOCK: usize = 60;

/// The epilogue of a block: `pixels` lists each pixel's offset in `y` (in floats) and its image.
#[derive(Clone, Copy)]
struct Finish<'a> {
    y: Shared<'a>,
    pixels: &'a [(usize, usize)],
    c: usize,
    first_column: usize,
    plus: Plus<'a>,
}

impl Epilogue for Finish<'_> {
    #[inline(always)]
    unsafe fn take<V: Vector>(&self, row: usize, column: usize, count: usize, sum: V) {
        let (pixel, image) = self.pixels[row];
        let column = self.first_column + column;
        // SAFETY: the caller promises V's processor and columns column..column + count, below c, of this pixel of y.
        // The added slices are readable there: `outputs`, the only place that makes a `Finish`, asserts the lengths
        // that [`Plus`] states and lists pixels of y and their images.
        unsafe {
            let mut sum = sum;
            if let Some(bias) = self.plus.bias {
                sum = sum.add(gemm::load_some(bias.as_ptr().add(column), count));
            }
            if let Some(shift) = self.plus.shift {
                sum = sum.add(gemm::load_some(shift.as_ptr().add(image * self.c + column), count));
            }
            if let Some(residual) = self.plus.residual {
                sum = sum.add(gemm::load_some(residual.as_ptr().add(pixel + column), count));
            }
            gemm::store_some(sum, self.y.at(pixel + column), count);
        }
    }
}

/// Which of the weight's two channel dimensions the outputs have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Towards {
    /// `c_out`: forward.
    Output,
    /// `c_in`: the gradient of the input.
    Input,
}

/// `y = patches * weight`, plus `target.plus`. `taps` maps the rows and columns of a patch to the weight's.
#[allow(clippy::too_many_arguments)]
pub(crate) fn outputs<V: Vector>(
    token: V::Token,
    device: &Device,
    x: &[f32],
    patches: Patches,
    weight: Weight<'_>,
    towards: Towards,
    taps: [TapOf; 2],
    y: &mut [f32],
    target: Target<'_>,
) {
    let c_out = target.c;
    assert_eq!(x.len(), patches.n * patches.rows.len * patches.cols.len * patches.c);
    assert_eq!(y.len(), patches.n * target.h * target.w * c_out);
    assert!(target.plus.bias.is_none_or(|b| b.len() == c_out));
    assert!(target.plus.shift.is_none_or(|s| s.len() == patches.n * c_out));
    assert!(target.plus.residual.is_none_or(|r| r.len() == y.len()));
    let last = |a: Axis, offset: usize| a.out.checked_sub(1).map_or(0, |i| i * target.step + offset + 1);
    assert!(last(patches.rows, target.row) <= target.h && last(patches.cols, target.col) <= target.w);
    // Distinct outputs are distinct pixels of y.
    assert!(target.step > 0, "outputs {} pixels apart", target.step);

    let panels = pack::<V>(token, device, weight, towards, patches, taps);
    let (count, depth) = (patches.count(), patches.depth());
    let identity = patches.is_identity();
    // Gathered patches are padded by one cache line: a power of two between rows would put all rows of a tile into the
    // same few sets of L1.
    let stride = if identity { patches.c } else { depth.next_multiple_of(16) + 16 };
    // Half of a 2 MiB L2 for patches.
    let tile_bytes = V::ROWS * stride * size_of::<f32>();
    let block = V::ROWS * (BLOCK / V::ROWS).min((1 << 20) / tile_bytes).max(1);
    let blocks = count.div_ceil(block);
    let panel_count = c_out.div_ceil(panel_width::<V>());
    // With few pixels the panels are split into groups too; each group gathers for itself.
    let groups = 16usize.div_ceil(blocks.max(1)).clamp(1, panel_count);
    let y = Shared::new(y);
    let panels = panels.as_slice();
    let mut slots = Slots::new(device, if identity { 0 } else { block * stride });
    slots.run(blocks * groups, |task, scratch| {
        let (b, group) = (task / groups, task % groups);
        let first = b * block;
        let rows = block.min(count - first);
        let mut pixels = [(0, 0); BLOCK];
        for (r, pixel) in pixels[..rows].iter_mut().enumerate() {
            let [image, i, j] = patches.place(first + r);
            let (i, j) = (i * target.step + target.row, j * target.step + target.col);
            *pixel = (((image * target.h + i) * target.w + j) * c_out, image);
        }
        let a = if identity {
            x[first * stride..][..rows * stride].as_ptr()
        } else {
            // SAFETY: scratch, this task's alone, holds `block >= rows` rows of `stride >= depth`; x is as long as
            // `patches` says, by the assertion above.
            unsafe { gather::<V>(token, patches, x.as_ptr(), first, rows, scratch.as_mut_ptr(), stride) };
            scratch.as_ptr()
        };
        for p in nth_chunk(panel_count, groups, group) {
            let first_column = p * panel_width::<V>();
            let columns = panel_width::<V>().min(c_out - first_column);
            let finish = Finish { y, pixels: &pixels[..rows], c: c_out, first_column, plus: target.plus };
            let panel = panels[p * depth * panel_width::<V>()..][..depth * panel_width::<V>()].as_ptr();
            // SAFETY: `a` holds `rows` rows of `depth`, sliced or gathered; the panel is sliced to `depth` rows. No
            // other task has these columns of these pixels, which are inside y: the assertion about `last`.
            unsafe { rows_by_panel::<V, _, false>(token, rows, columns, depth, a, stride, panel, a, finish) };
        }
    });
}

/// Packs the weight into panels of output channels, `patches.depth()` rows each.
fn pack<V: Vector>(
    token: V::Token,
    device: &Device,
    weight: Weight<'_>,
    towards: Towards,
    patches: Patches,
    taps: [TapOf; 2],
) -> Buffer {
    let width = panel_width::<V>();
    let (c_out, c) = match towards {
        Towards::Output => (weight.c_out, weight.c_in),
        Towards::Input => (weight.c_in, weight.c_out),
    };
    assert_eq!(c, patches.c, "the weight reads {c} channels");
    assert_eq!(weight.data.len(), weight.c_out * weight.row_stride());
    for (of, taps, k) in [(taps[0], patches.rows.taps, weight.kh), (taps[1], patches.cols.taps, weight.kw)] {
        let ends = [of.first, of.first + (taps as isize - 1) * of.step];
        assert!(taps == 0 || ends.iter().all(|&t| (0..k as isize).contains(&t)), "taps {ends:?} of a kernel of {k}");
    }
    let tap_count = patches.rows.taps * patches.cols.taps;
    let panel_count = c_out.div_ceil(width);
    let mut buffer = device.scratch(panel_count * tap_count * c * width);
    let out = Shared::new(buffer.as_mut_slice());
    gemm::for_each_task(panel_count * tap_count, |task| {
        let (p, tap) = (task / tap_count, task % tap_count);
        let (first, columns) = (p * width, width.min(c_out - p * width));
        let row = taps[0].first + (tap / patches.cols.taps) as isize * taps[0].step;
        let col = taps[1].first + (tap % patches.cols.taps) as isize * taps[1].step;
        let tap_offset = (row as usize * weight.kw + col as usize) * weight.c_in;
        // SAFETY: the tap is inside the kernel, so row o of `data`, o < c_out, has c_in numbers at `tap_offset`. Output
        // reads c = c_in of them in rows first..first + columns, Input numbers first..first + columns in all c = c_out
        // rows: inside `data`, whose length is asserted. Task i alone has rows i * c..(i + 1) * c of the buffer's
        // panel_count * tap_count * c.
        unsafe {
            let panel = out.at(task * c * width);
            match towards {
                Towards::Output => {
                    let from = &weight.data[first * weight.row_stride() + tap_offset..];
                    gemm::pack_columns::<V>(token, c, columns, from.as_ptr(), weight.row_stride(), panel)
                }
                Towards::Input => {
                    let from = &weight.data[tap_offset + first..];
                    gemm::pack_rows::<V>(token, c, columns, from.as_ptr(), weight.row_stride(), panel)
                }
            }
        }
    });
    buffer
}

/// Copies `count` floats.
///
/// # Safety
/// A `V::Token` exists; `from` is readable and `to` writable for `count` floats, and they do not overlap.
#[inline(always)]
unsafe fn copy<V: Vector>(from: *const f32, to: *mut f32, count: usize) {
    // SAFETY: i + LANES <= count, or count - i < LANES floats are left; the rest is the caller's promise.
    unsafe {
        let mut i = 0;
        while i + V::LANES <= count {
            V::load(from.add(i)).store(to.add(i));
            i += V::LANES;
        }
        if i < count {
            V::load_first(from.add(i), count - i).store_first(to.add(i), count - i);
        }
    }
}

/// Writes `count` zeros.
///
/// # Safety
/// A `V::Token` exists; `to` is writable for `count` floats.
#[inline(always)]
unsafe fn zero<V: Vector>(to: *mut f32, count: usize) {
    // SAFETY: as in `copy`.
    unsafe {
        let mut i = 0;
        while i + V::LANES <= count {
            V::splat(0.0).store(to.add(i));
            i += V::LANES;
        }
        if i < count {
            V::splat(0.0).store_first(to.add(i), count - i);
        }
    }
}

kernel! {
    /// Gathers patches `first .. first + count` into rows `stride` floats apart. Neighbouring taps are adjacent in the
    /// image, so each row of a patch is one run of memory, cut off at the image's edges.
    ///
    /// # Safety
    /// `x` holds the images of `patches`, which has these patches; `out` is writable for `count` rows of
    /// `patches.depth()`, and the caller's alone.
    unsafe fn gather<V>(patches: Patches, x: *const f32, first: usize, count: usize, out: *mut f32, stride: usize) {
        let Patches { rows, cols, c, .. } = patches;
        for r in 0..count {
            let [image, i, j] = patches.place(first + r);
            let start = (j * cols.stride) as isize + cols.first;
            let from = start.clamp(0, cols.len as isize);
            let to = (start + cols.taps as isize).clamp(0, cols.len as isize);
            let before = (from - start).clamp(0, cols.taps as isize) as usize * c;
            let inside = (to - from) as usize * c;
            let run = cols.taps * c;
            for t in 0..rows.taps {
                let out = out.add(r * stride + t * run);
                let row = (i * rows.stride) as isize + rows.first + t as isize;
                if row < 0 || row >= rows.len as isize || inside == 0 {
                    zero::<V>(out, run);
                    continue;
                }
                let x = x.add(((image * rows.len + row as usize) * cols.len + from as usize) * c);
                zero::<V>(out, before);
                copy::<V>(x, out.add(before), inside);
                zero::<V>(out.add(before + inside), run - before - inside);
            }
        }
    }
}

kernel! {
    /// Gathers columns `column .. column + columns` of patches `first .. first + count` into a panel.
    ///
    /// # Safety
    /// `x` holds the images of `patches`, which has these patches and columns; `columns` is at most the panel's width;
    /// `panel` is writable for `count` rows, and the caller's alone.
    unsafe fn gather_panel<V>(
        patches: Patches,
        x: *const f32,
        first: usize,
        count: usize,
        column: usize,
        columns: usize,
        panel: *mut f32,
    ) {
        let Patches { rows, cols, c, .. } = patches;
        let width = panel_width::<V>();
        if columns < width {
            zero::<V>(panel, count * width);
        }
        let mut done = 0;
        while done < columns {
            let (tap, channel) = ((column + done) / c, (column + done) % c);
            let run = (c - channel).min(columns - done);
            let (tap_row, tap_col) = (tap / cols.taps, tap % cols.taps);
            let [mut image, mut i, mut j] = patches.place(first);
            for r in 0..count {
                let row = (i * rows.stride) as isize + rows.first + tap_row as isize;
                let col = (j * cols.stride) as isize + cols.first + tap_col as isize;
                let out = panel.add(r * width + done);
                if row < 0 || row >= rows.len as isize || col < 0 || col >= cols.len as isize {
                    zero::<V>(out, run);
                } else {
                    let pixel = (image * rows.len + row as usize) * cols.len + col as usize;
                    copy::<V>(x.add(pixel * c + channel), out, run);
                }
                j += 1;
                if j == cols.out {
                    (i, j) = (i + 1, 0);
                    if i == rows.out {
                        (image, i) = (image + 1, 0);
                    }
                }
            }
            done += run;
        }
    }
}

/// `dw[o][q] = sum over patches p of dy[p][o] patch[p][q]`, stored in `dw` or added to it.
#[allow(clippy::too_many_arguments)]
pub(crate) fn weight_gradient<V: Vector>(
    token: V::Token,
    device: &Device,
    x: &[f32],
    patches: Patches,
    dy: &[f32],
    c_out: usize,
    dw: &mut [f32],
    accumulate: bool,
) {
    /// Pixels between two passes over the sums: up to 32 KiB of panel in L1.
    const CHUNK: usize = 256;
    let (count, depth, width) = (patches.count(), patches.depth(), panel_width::<V>());
    assert_eq!(x.len(), patches.n * patches.rows.len * patches.cols.len * patches.c);
    assert_eq!(dy.len(), count * c_out);
    assert_eq!(dw.len(), c_out * depth);
    let panels = depth.div_ceil(width);
    // Few panels (the first layer) would leave cores idle, so the pixels are split into parts whose sums are added in
    // order. The number of parts depends on the shape and the panel width, not on the threads.
    let parts = 16usize.div_ceil(panels).min(count.div_ceil(4 * CHUNK)).max(1);
    let each = c_out * width;
    let mut sums = device.scratch(parts * panels * each);
    let out = Shared::new(sums.as_mut_slice());
    let mut slots = Slots::new(device, CHUNK * width);
    slots.run(parts * panels, |task, scratch| {
        let (part, p) = (task / panels, task % panels);
        let columns = width.min(depth - p * width);
        let pixels = nth_chunk(count, parts, part);
        for first in pixels.clone().step_by(CHUNK) {
            let chunk = CHUNK.min(pixels.end - first);
            let (panel, dy) = (scratch.as_mut_ptr(), dy[first * c_out..][..chunk * c_out].as_ptr());
            // SAFETY: x is as long as `patches` says, by the assertion above; scratch, this task's alone, holds CHUNK
            // >= chunk rows of a panel; dy is sliced to `chunk` rows of c_out; task i alone has the i-th c_out rows of
            // `width` of `sums`, which has parts * panels times as many.
            unsafe {
                gather_panel::<V>(token, patches, x.as_ptr(), first, chunk, p * width, columns, panel);
                let c = Shared::new_at(out.at(task * each));
                if first == pixels.start {
                    let store = gemm::Overwrite { c, stride: width };
                    rows_by_panel::<V, _, true>(token, c_out, columns, chunk, dy, c_out, panel, dy, store);
                } else {
                    let add = gemm::Accumulate { c, stride: width };
                    rows_by_panel::<V, _, true>(token, c_out, columns, chunk, dy, c_out, panel, dy, add);
                }
            }
        }
    });
    let sums = sums.as_slice();
    dw.par_chunks_mut(depth).enumerate().for_each(|(o, dw)| {
        for (p, dw) in dw.chunks_mut(width).enumerate() {
            for (j, dw) in dw.iter_mut().enumerate() {
                let part = |part: usize| sums[((part * panels + p) * c_out + o) * width + j];
                let sum = (1..parts).fold(part(0), |sum, i| sum + part(i));
                *dw = if accumulate { *dw + sum } else { sum };
            }
        }
    });
}
