//! Winograd's convolution F(4x4, 3x3) (Lavin and Gray 2015): 3x3 kernels at stride 1 in a quarter of the
//! multiplications.
//!
//! Each 4x4 tile `Y` of the output comes from the 6x6 tile `D` of the input under it, for every pair of channels, as `Y
//! = A^T [(G w G^T) * (B^T D B)] A`, where `*` is element by element. Summed over input channels, the 36 elements are
//! 36 matrix products (tiles x c_in) (c_in x c_out). The gradients are this formula transposed: the input's is the
//! convolution of `dy` with the kernel rotated by 180 degrees, and `dw = G^T [sum over tiles of (A dY A^T) * (B^T D B)]
//! G`.
//!
//! The matrices evaluate polynomials at 0, +-1/p, +-p and infinity. The usual p = 2 (with 1 for 1/p) makes `y` some six
//! times less accurate than a plain f32 sum over 128 channels; p = sqrt(2) keeps all entries near 1 and the error
//! within twice that of the plain sum. So only F(4x4) is here, not the more accurate F(2x2), which saves only a factor
//! of 2.25. `tests/support/winograd.rs` derives the error to expect.
//!
//! Transformed tiles and weights stay in L2. If there are many tiles per panel of output channels, the weights are
//! transformed once, and a task takes up to 64 tiles and 128 output channels through all steps in its scratch.
//! Otherwise the tiles are transformed once, and a task takes one panel and a range of tiles and transforms the panel's
//! weights into its scratch, 256 input channels at a time. Every sum runs over the input channels in order, so both
//! ways agree to the bit.

// Loops use the formulas' indices, over several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::direct::{Plus, Towards, Weight};
use super::gemm::{
    Accumulate, Continue, Overwrite, Shared, Slots, for_each_task, load_some, nth_chunk, panel_width, rows_by_panel,
    store_some,
};
use super::vector::{Vector, kernel};
use crate::device::Device;

/// Outputs per tile in each direction.
const OUT: usize = 4;
/// Inputs per tile in each direction.
const IN: usize = 6;
/// Products per tile and pair of channels.
const XI: usize = IN * IN;

const R2: f32 = std::f32::consts::SQRT_2;
const H2: f32 = std::f32::consts::FRAC_1_SQRT_2;

/// `B^T`: one row per point 0, 1/p, -1/p, p, -p, infinity.
const BT: [[f32; IN]; IN] = [
    [1.0, 0.0, -2.5, 0.0, 1.0, 0.0],
    [0.0, -2.0 * H2, -2.0, H2, 1.0, 0.0],
    [0.0, 2.0 * H2, -2.0, -H2, 1.0, 0.0],
    [0.0, -0.5 * R2, -0.5, R2, 1.0, 0.0],
    [0.0, 0.5 * R2, -0.5, -R2, 1.0, 0.0],
    [0.0, 1.0, 0.0, -2.5, 0.0, 1.0],
];

/// `A`: the powers 0 to 3 of each point.
const A: [[f32; OUT]; IN] = [
    [1.0, 0.0, 0.0, 0.0],
    [1.0, H2, 0.5, 0.5 * H2],
    [1.0, -H2, 0.5, -0.5 * H2],
    [1.0, R2, 2.0, 2.0 * R2],
    [1.0, -R2, 2.0, -2.0 * R2],
    [0.0, 0.0, 0.0, 1.0],
];

/// `B^T d`.
///
/// # Safety
/// A `V::Token` exists.
#[inline(always)]
unsafe fn input_1d<V: Vector>(d: [V; IN]) -> [V; IN] {
    // SAFETY: arithmetic in registers; the caller promises V's processor.
    unsafe {
        let (even_a, odd_a) = (d[2].mul_add(V::splat(-2.0), d[4]), d[1].mul_add(V::splat(-2.0), d[3]));
        let (even_b, odd_b) = (d[2].mul_add(V::splat(-0.5), d[4]), d[1].mul_add(V::splat(-0.5), d[3]));
        [
            d[2].mul_add(V::splat(-2.5), d[0].add(d[4])),
            odd_a.mul_add(V::splat(H2), even_a),
            odd_a.mul_add(V::splat(-H2), even_a),
            odd_b.mul_add(V::splat(R2), even_b),
            odd_b.mul_add(V::splat(-R2), even_b),
            d[3].mul_add(V::splat(-2.5), d[1].add(d[5])),
        ]
    }
}

/// `G g`.
///
/// # Safety
/// A `V::Token` exists.
#[inline(always)]
unsafe fn weight_1d<V: Vector>(g: [V; 3]) -> [V; IN] {
    // SAFETY: as in `input_1d`.
    unsafe {
        let even_a = g[2].mul_add(V::splat(0.5), g[0]).mul(V::splat(-2.0 / 3.0));
        let even_b = g[2].mul_add(V::splat(2.0), g[0]).mul(V::splat(1.0 / 6.0));
        [
            g[0],
            g[1].mul_add(V::splat(-2.0 / 3.0 * H2), even_a),
            g[1].mul_add(V::splat(2.0 / 3.0 * H2), even_a),
            g[1].mul_add(V::splat(R2 / 6.0), even_b),
            g[1].mul_add(V::splat(-R2 / 6.0), even_b),
            g[2],
        ]
    }
}

/// `A^T m`.
///
/// # Safety
/// A `V::Token` exists.
#[inline(always)]
unsafe fn output_1d<V: Vector>(m: [V; IN]) -> [V; OUT] {
    // SAFETY: as in `input_1d`.
    unsafe {
        let (sum_a, dif_a, sum_b, dif_b) = (m[1].add(m[2]), m[1].sub(m[2]), m[3].add(m[4]), m[3].sub(m[4]));
        [
            m[0].add(sum_a).add(sum_b),
            dif_b.mul_add(V::splat(R2), dif_a.mul(V::splat(H2))),
            sum_b.mul_add(V::splat(2.0), sum_a.mul(V::splat(0.5))),
            dif_b.mul_add(V::splat(2.0 * R2), dif_a.mul_add(V::splat(0.5 * H2), m[5])),
        ]
    }
}

/// `A y`.
///
/// # Safety
/// A `V::Token` exists.
#[inline(always)]
unsafe fn output_transposed_1d<V: Vector>(y: [V; OUT]) -> [V; IN] {
    // SAFETY: as in `input_1d`.
    unsafe {
        let (even_a, odd_a) = (y[2].mul_add(V::splat(0.5), y[0]), y[3].mul_add(V::splat(0.5), y[1]));
        let (even_b, odd_b) = (y[2].mul_add(V::splat(2.0), y[0]), y[3].mul_add(V::splat(2.0), y[1]));
        [
            y[0],
            odd_a.mul_add(V::splat(H2), even_a),
            odd_a.mul_add(V::splat(-H2), even_a),
            odd_b.mul_add(V::splat(R2), even_b),
            odd_b.mul_add(V::splat(-R2), even_b),
            y[3],
        ]
    }
}

/// `G^T p`.
///
/// # Safety
/// A `V::Token` exists.
#[inline(always)]
unsafe fn weight_transposed_1d<V: Vector>(p: [V; IN]) -> [V; 3] {
    // SAFETY: as in `input_1d`.
    unsafe {
        let (sum_a, dif_a, sum_b, dif_b) = (p[1].add(p[2]), p[1].sub(p[2]), p[3].add(p[4]), p[3].sub(p[4]));
        [
            sum_b.mul_add(V::splat(1.0 / 6.0), sum_a.mul_add(V::splat(-2.0 / 3.0), p[0])),
            dif_b.mul_add(V::splat(R2 / 6.0), dif_a.mul(V::splat(-2.0 / 3.0 * H2))),
            sum_b.sub(sum_a).mul_add(V::splat(1.0 / 3.0), p[5]),
        ]
    }
}

/// Tiles over `n` images: inputs of `h x w x c`, outputs of `out_h x out_w`; output (i, j) reads the 3x3 inputs from
/// `(i - top, j - left)`, zero outside.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles {
    pub n: usize,
    pub h: usize,
    pub w: usize,
    pub c: usize,
    pub out_h: usize,
    pub out_w: usize,
    pub top: usize,
    pub left: usize,
}

impl Tiles {
    /// Numbers of tiles down and across one image.
    fn extent(&self) -> (usize, usize) {
        (self.out_h.div_ceil(OUT), self.out_w.div_ceil(OUT))
    }

    fn count(&self) -> usize {
        let (rows, cols) = self.extent();
        self.n * rows * cols
    }

    /// Image, first output row and first output column of tile `t`.
    #[inline(always)]
    fn place(&self, t: usize) -> [usize; 3] {
        let (rows, cols) = self.extent();
        [t / (rows * cols), t / cols % rows * OUT, t % cols * OUT]
    }
}

/// Distance, in floats, between two of the 36 planes of transformed numbers: at least `floats` and an odd number of
/// cache lines, so that the 36 stores for one tile fall into different sets of L1.
const fn plane(floats: usize) -> usize {
    floats.next_multiple_of(16) | 16
}

/// Row `i` of the input tile at (row, col): `d[j]` holds channels `k..k + count` of pixel `(row + i, col + j)`, zeros
/// outside the image.
///
/// # Safety
/// A `V::Token` exists; `image` is readable for `h w c` floats as `tiles` says; `k + count <= c`, `count <= V::LANES`.
#[inline(always)]
unsafe fn load_tile<V: Vector>(
    image: *const f32,
    tiles: &Tiles,
    row: isize,
    col: isize,
    k: usize,
    count: usize,
    i: usize,
) -> [V; IN] {
    // SAFETY: row r and each column read are inside the image, by the comparisons, and channels k..k + count inside the
    // pixel, so every load is within the floats that the caller promises.
    unsafe {
        let zero = V::splat(0.0);
        let mut d = [zero; IN];
        let r = row + i as isize;
        if r < 0 || r >= tiles.h as isize {
            return d;
        }
        let line = image.offset(r * (tiles.w * tiles.c) as isize + k as isize);
        if col >= 0 && col as usize + IN <= tiles.w && count == V::LANES {
            for j in 0..IN {
                d[j] = V::load(line.add((col as usize + j) * tiles.c));
            }
        } else {
            for j in 0..IN {
                let q = col + j as isize;
                if q >= 0 && q < tiles.w as isize {
                    d[j] = load_some(line.add(q as usize * tiles.c), count);
                }
            }
        }
        d
    }
}

kernel! {
    /// `B^T D B` of tiles `first .. first + count`, channels `k .. k + channels`: element xi of channel `k + j` of tile
    /// `first + t` to `out[xi * plane + t * stride + j]`.
    ///
    /// # Safety
    /// `x` holds the images of `tiles`, which has these tiles and channels; that part of `out` is writable and the
    /// caller's alone.
    unsafe fn transform_inputs<V>(
        x: *const f32,
        tiles: Tiles,
        first: usize,
        count: usize,
        k: usize,
        channels: usize,
        out: *mut f32,
        plane: usize,
        stride: usize,
    ) {
        for t in 0..count {
            let [image, row, col] = tiles.place(first + t);
            let image = x.add(image * tiles.h * tiles.w * tiles.c);
            let (row, col) = (row as isize - tiles.top as isize, col as isize - tiles.left as isize);
            for channel in (0..channels).step_by(V::LANES) {
                let lanes = V::LANES.min(channels - channel);
                // Rows first: the columns of a row are adjacent in memory.
                let mut half = [[V::splat(0.0); IN]; IN];
                for i in 0..IN {
                    let d = input_1d(load_tile::<V>(image, &tiles, row, col, k + channel, lanes, i));
                    for j in 0..IN {
                        half[j][i] = d[j];
                    }
                }
                for j in 0..IN {
                    let v = input_1d(half[j]);
                    for i in 0..IN {
                        store_some(v[i], out.add((i * IN + j) * plane + t * stride + channel), lanes);
                    }
                }
            }
        }
    }
}

kernel! {
    /// `G w G^T` for one panel of `columns` output channels from `column` and `depth` input channels from `start`:
    /// element xi of input channel `start + k` and column `j` to `out[xi * plane + k * panel_width + j]`, zero for `j
    /// >= columns`. Output and input channels are those of the convolution computed: with `towards_input`, they are the
    /// weight's `c_in` and `c_out`.
    ///
    /// # Safety
    /// `w` holds a weight of 3x3 taps and `c_in` input channels that has these channels; `depth` rows of each of the 36
    /// planes of `out` are writable and the caller's alone.
    unsafe fn transform_weights<V>(
        w: *const f32,
        c_in: usize,
        start: usize,
        depth: usize,
        towards_input: bool,
        column: usize,
        columns: usize,
        out: *mut f32,
        plane: usize,
    ) {
        let row_stride = 9 * c_in;
        for j in (0..panel_width::<V>()).step_by(V::LANES) {
            let lanes = V::LANES.min(columns.saturating_sub(j));
            for k in (0..depth).step_by(V::LANES) {
                let count = V::LANES.min(depth - k);
                // taps[u * 3 + v]: one register of output channels for each of LANES input channels.
                let mut taps = [V::zero_block(); 9];
                for (tap, block) in taps.iter_mut().enumerate() {
                    let block_rows = block.as_mut();
                    if towards_input {
                        // The gradient uses the rotated kernel; rows are c_out, columns c_in, as in memory.
                        if lanes > 0 {
                            let w = w.add((8 - tap) * c_in + column + j + start * row_stride);
                            for l in 0..count {
                                block_rows[l] = load_some::<V>(w.add((k + l) * row_stride), lanes);
                                V::prefetch(w.wrapping_add((k + V::LANES + l) * row_stride));
                            }
                        }
                    } else {
                        let w = w.add(tap * c_in + start + k);
                        for l in 0..lanes {
                            block_rows[l] = load_some::<V>(w.add((column + j + l) * row_stride), count);
                            V::prefetch(w.wrapping_add((column + j + l) * row_stride + V::LANES));
                        }
                        V::transpose(block);
                    }
                }
                for l in 0..count {
                    let mut half = [[V::splat(0.0); 3]; IN];
                    for u in 0..3 {
                        let g = weight_1d([
                            taps[u * 3].as_mut()[l],
                            taps[u * 3 + 1].as_mut()[l],
                            taps[u * 3 + 2].as_mut()[l],
                        ]);
                        for q in 0..IN {
                            half[q][u] = g[q];
                        }
                    }
                    for q in 0..IN {
                        let g = weight_1d(half[q]);
                        for p in 0..IN {
                            g[p].store(out.add((p * IN + q) * plane + (k + l) * panel_width::<V>() + j));
                        }
                    }
                }
            }
        }
    }
}

kernel! {
    /// `A^T M A` of tiles `first .. first + count` for one panel, plus `plus`, to `y` (n, out_h, out_w, c_out).
    ///
    /// # Safety
    /// `m` is readable for `count` rows of a panel in each of the 36 planes; `tiles` has these tiles, and `y` and the
    /// slices of `plus` have matching lengths; no other task has channels `column .. column + columns`, below `c_out`,
    /// of these tiles' outputs.
    unsafe fn transform_outputs<V>(
        m: *const f32,
        plane: usize,
        tiles: Tiles,
        first: usize,
        count: usize,
        column: usize,
        columns: usize,
        y: Shared<'_>,
        c_out: usize,
        plus: Plus<'_>,
    ) {
        for t in 0..count {
            let [image, row, col] = tiles.place(first + t);
            let (rows, cols) = (OUT.min(tiles.out_h - row), OUT.min(tiles.out_w - col));
            for j in (0..columns).step_by(V::LANES) {
                let lanes = V::LANES.min(columns - j);
                let m = m.add(t * panel_width::<V>() + j);
                let mut half = [[V::splat(0.0); IN]; OUT];
                for q in 0..IN {
                    let mut column = [V::splat(0.0); IN];
                    for p in 0..IN {
                        column[p] = V::load(m.add((p * IN + q) * plane));
                    }
                    let h = output_1d(column);
                    for i in 0..OUT {
                        half[i][q] = h[i];
                    }
                }
                let mut both = V::splat(0.0);
                if let Some(bias) = plus.bias {
                    both = load_some(bias.as_ptr().add(column + j), lanes);
                }
                if let Some(shift) = plus.shift {
                    both = both.add(load_some(shift.as_ptr().add(image * c_out + column + j), lanes));
                }
                for i in 0..rows {
                    let out = output_1d(half[i]);
                    let pixel = ((image * tiles.out_h + row + i) * tiles.out_w + col) * c_out + column + j;
                    for l in 0..cols {
                        let mut v = out[l].add(both);
                        if let Some(residual) = plus.residual {
                            v = v.add(load_some(residual.as_ptr().add(pixel + l * c_out), lanes));
                        }
                        store_some(v, y.at(pixel + l * c_out), lanes);
                    }
                }
            }
        }
    }
}

/// `y = conv(x, weight) + plus`, or with `Towards::Input` the gradient of the input from that of the output.
#[allow(clippy::too_many_arguments)]
pub(crate) fn outputs<V: Vector>(
    token: V::Token,
    device: &Device,
    x: &[f32],
    tiles: Tiles,
    weight: Weight<'_>,
    towards: Towards,
    y: &mut [f32],
    plus: Plus<'_>,
) {
    let (c_out, c) = match towards {
        Towards::Output => (weight.c_out, weight.c_in),
        Towards::Input => (weight.c_in, weight.c_out),
    };
    assert_eq!((weight.kh, weight.kw, c), (3, 3, tiles.c), "Winograd: a 3x3 kernel over {} channels", tiles.c);
    assert_eq!(weight.data.len(), weight.c_out * 9 * weight.c_in);
    assert_eq!(x.len(), tiles.n * tiles.h * tiles.w * c);
    assert_eq!(y.len(), tiles.n * tiles.out_h * tiles.out_w * c_out);
    assert!(plus.bias.is_none_or(|b| b.len() == c_out));
    assert!(plus.shift.is_none_or(|s| s.len() == tiles.n * c_out));
    assert!(plus.residual.is_none_or(|r| r.len() == y.len()));

    let (count, width) = (tiles.count(), panel_width::<V>());
    let panels = c_out.div_ceil(width);
    let y = Shared::new(y);
    let panel_columns = |p: usize| width.min(c_out - p * width);
    let transform_panel = |p: usize, start: usize, depth: usize, out: *mut f32, plane: usize| {
        let towards_input = towards == Towards::Input;
        let (w, c_in) = (weight.data.as_ptr(), weight.c_in);
        // SAFETY: the weight has the length asserted, and both callers below stay within its channels; they pass XI
        // planes of at least `depth` panel rows that are their task's alone.
        unsafe {
            transform_weights::<V>(token, w, c_in, start, depth, towards_input, p * width, panel_columns(p), out, plane)
        };
    };
    // The 36 products of `rows` tiles and panel `p` over `depth` channels; the sums in `m` continue those of earlier
    // channels unless `fresh`.
    let multiply = |v: Planes, u: Planes, m: *mut f32, p: usize, rows: usize, depth: usize, fresh: bool| {
        for xi in 0..XI {
            let (a, b) = (v.start.wrapping_add(xi * v.plane), u.start.wrapping_add(xi * u.plane));
            let next = v.start.wrapping_add((xi + 1) % XI * v.plane);
            let (columns, stride) = (panel_columns(p), v.stride);
            // SAFETY: both callers below pass v and u with XI planes, in which `rows` rows of `depth` floats and
            // `depth` rows of a panel have been written, and for m XI planes of BLOCK >= rows panel rows in their
            // task's scratch.
            unsafe {
                let c = Shared::new_at(m.add(xi * m_plane::<V>()));
                if fresh {
                    let store = Overwrite { c, stride: width };
                    rows_by_panel::<V, _, false>(token, rows, columns, depth, a, stride, b, next, store);
                } else {
                    let go_on = Continue { c, stride: width };
                    rows_by_panel::<V, _, false>(token, rows, columns, depth, a, stride, b, next, go_on);
                }
            }
        }
    };
    let finish = |m: *const f32, p: usize, first: usize, rows: usize| {
        // SAFETY: m holds the sums of `rows` tiles; y and `plus` have the lengths asserted; only one task finishes
        // these columns of these tiles.
        unsafe {
            let columns = panel_columns(p);
            transform_outputs::<V>(token, m, m_plane::<V>(), tiles, first, rows, p * width, columns, y, c_out, plus)
        };
    };
    // One cache line more than needed between tiles, lest all rows of a register tile fall into the same sets of L1.
    let stride_for = |depth: usize| depth.next_multiple_of(16) + 16;
    let m_len = XI * m_plane::<V>();

    // With many blocks of tiles, each block goes through all weights; otherwise the tasks are panels.
    let blocks = count.div_ceil(BLOCK);
    if blocks >= 2 * panels {
        let u_plane = plane(c * width);
        let mut u = device.scratch(panels * XI * u_plane);
        let out = Shared::new(u.as_mut_slice());
        let chunks = c.div_ceil(64);
        for_each_task(panels * chunks, |task| {
            let (p, k) = (task / chunks, task % chunks * 64);
            // SAFETY: inside `u`, since k < c. The task alone has rows k..min(k + 64, c) of its panel's planes.
            let out = unsafe { out.at(p * XI * u_plane + k * width) };
            transform_panel(p, k, 64.min(c - k), out, u_plane);
        });
        let u = u.as_slice();
        // Sums for 128 output channels and tiles for 64 input channels fit in L2 together.
        let group = (128 / width).min(panels);
        let groups = panels.div_ceil(group);
        let depth = if group == 1 { c.min(128) } else { c.min(64) };
        let (stride, v_plane) = (stride_for(depth), plane(BLOCK * stride_for(depth)));
        Slots::new(device, XI * v_plane + group * m_len).run(blocks * groups, |task, scratch| {
            let tiles_here = nth_chunk(count, blocks, task / groups);
            let (first, rows) = (tiles_here.start, tiles_here.len());
            let panels_here = task % groups * group..panels.min((task % groups + 1) * group);
            let (v, m) = scratch.split_at_mut(XI * v_plane);
            let m = m.as_mut_ptr();
            for k in (0..c).step_by(depth) {
                let here = depth.min(c - k);
                let out = v.as_mut_ptr();
                // SAFETY: x has the length asserted; v, in this task's scratch, has XI planes of BLOCK >= rows rows of
                // `stride >= here`.
                unsafe { transform_inputs::<V>(token, x.as_ptr(), tiles, first, rows, k, here, out, v_plane, stride) };
                for (i, p) in panels_here.clone().enumerate() {
                    let v = Planes { start: v.as_ptr(), plane: v_plane, stride };
                    let u = Planes { start: u[p * XI * u_plane + k * width..].as_ptr(), plane: u_plane, stride: width };
                    multiply(v, u, m.wrapping_add(i * m_len), p, rows, here, k == 0);
                }
            }
            for (i, p) in panels_here.enumerate() {
                finish(m.wrapping_add(i * m_len), p, first, rows);
            }
        });
    } else {
        let stride = stride_for(c);
        let v_plane = plane(count * stride);
        let mut v = device.scratch(XI * v_plane);
        let out = Shared::new(v.as_mut_slice());
        let chunks = count.div_ceil(8);
        for_each_task(chunks, |i| {
            let tiles_here = nth_chunk(count, chunks, i);
            // SAFETY: x has the length asserted; v has XI planes of `count` rows of `stride >= c`, of which the task
            // alone has the rows of its tiles.
            unsafe {
                let out = out.at(tiles_here.start * stride);
                let (first, rows) = (tiles_here.start, tiles_here.len());
                transform_inputs::<V>(token, x.as_ptr(), tiles, first, rows, 0, c, out, v_plane, stride);
            }
        });
        let v = v.as_slice();
        // A panel's transformed weights for 256 input channels: about half of a 2 MiB L2.
        let depth = c.min(256);
        let u_plane = plane(depth * width);
        // Enough tasks for all threads; tasks that share a panel each transform its weights.
        let groups = (2 * rayon::current_num_threads()).div_ceil(panels).clamp(1, blocks);
        let most = count.div_ceil(groups).div_ceil(BLOCK);
        Slots::new(device, XI * u_plane + (most + 1) * m_len).run(panels * groups, |task, scratch| {
            let (p, group) = (task / groups, task % groups);
            let (u, m) = scratch.split_at_mut(XI * u_plane);
            let m = m.as_mut_ptr();
            let tiles_here = nth_chunk(count, groups, group);
            let blocks = tiles_here.len().div_ceil(BLOCK);
            let block = |b: usize| {
                let block = nth_chunk(tiles_here.len(), blocks, b);
                (tiles_here.start + block.start, block.len())
            };
            for k in (0..c).step_by(depth) {
                let here = depth.min(c - k);
                transform_panel(p, k, here, u.as_mut_ptr(), u_plane);
                for b in 0..blocks {
                    let (first, rows) = block(b);
                    let v = Planes { start: v[first * stride + k..].as_ptr(), plane: v_plane, stride };
                    let u = Planes { start: u.as_ptr(), plane: u_plane, stride: width };
                    multiply(v, u, m.wrapping_add(b * m_len), p, rows, here, k == 0);
                }
            }
            for b in 0..blocks {
                let (first, rows) = block(b);
                finish(m.wrapping_add(b * m_len), p, first, rows);
            }
        });
    }
}

/// 36 matrices, `plane` floats apart, with rows `stride` floats apart.
#[derive(Clone, Copy)]
struct Planes {
    start: *const f32,
    plane: usize,
    stride: usize,
}

/// Distance, in floats, between the 36 planes of sums for a block of tiles and one panel.
fn m_plane<V: Vector>() -> usize {
    plane(BLOCK * panel_width::<V>())
}

/// Most tiles multiplied by a panel at a time: one image of 32x32 or four of 16x16.
const BLOCK: usize = 64;

kernel! {
    /// Row `p` of `B^T D B`: element `q` of channel `k + j`, `j < channels`, of tile `first + t` to panel `j /
    /// panel_width`, row `t`, of plane `q`; panels are `panel` floats apart. In the last panel, whole registers are
    /// written.
    ///
    /// # Safety
    /// `x` holds the images of `tiles`, which has these tiles and channels; `count` rows of these panels in IN planes
    /// of `out` are writable and the caller's alone.
    unsafe fn transform_input_row<V>(
        x: *const f32,
        tiles: Tiles,
        first: usize,
        count: usize,
        p: usize,
        k: usize,
        channels: usize,
        out: *mut f32,
        plane: usize,
        panel: usize,
    ) {
        let width = panel_width::<V>();
        for t in 0..count {
            let [image, row, col] = tiles.place(first + t);
            let image = x.add(image * tiles.h * tiles.w * tiles.c);
            let (row, col) = (row as isize - tiles.top as isize, col as isize - tiles.left as isize);
            for j in (0..channels).step_by(V::LANES) {
                let lanes = V::LANES.min(channels - j);
                let mut sum = [V::splat(0.0); IN];
                for i in 0..IN {
                    if BT[p][i] != 0.0 {
                        let d = load_tile::<V>(image, &tiles, row, col, k + j, lanes, i);
                        for l in 0..IN {
                            sum[l] = d[l].mul_add(V::splat(BT[p][i]), sum[l]);
                        }
                    }
                }
                let v = input_1d(sum);
                let out = out.add(j / width * panel + t * width + j % width);
                for q in 0..IN {
                    v[q].store(out.add(q * plane));
                }
            }
        }
    }
}

kernel! {
    /// Row `p` of `A dY A^T`: element `q` of channel `j` of tile `first + t` to `out[q * plane + t * stride + j]`.
    ///
    /// # Safety
    /// `dy` holds the outputs (n, out_h, out_w, c_out) of `tiles`, which has these tiles; that part of `out` is
    /// writable and the caller's alone.
    unsafe fn transform_gradient_row<V>(
        dy: *const f32,
        tiles: Tiles,
        c_out: usize,
        first: usize,
        count: usize,
        p: usize,
        out: *mut f32,
        plane: usize,
        stride: usize,
    ) {
        for t in 0..count {
            let [image, row, col] = tiles.place(first + t);
            let (rows, cols) = (OUT.min(tiles.out_h - row), OUT.min(tiles.out_w - col));
            let dy = dy.add(((image * tiles.out_h + row) * tiles.out_w + col) * c_out);
            for j in (0..c_out).step_by(V::LANES) {
                let lanes = V::LANES.min(c_out - j);
                let mut sum = [V::splat(0.0); OUT];
                for i in 0..rows {
                    if A[p][i] != 0.0 {
                        for l in 0..cols {
                            let d = load_some::<V>(dy.add((i * tiles.out_w + l) * c_out + j), lanes);
                            sum[l] = d.mul_add(V::splat(A[p][i]), sum[l]);
                        }
                    }
                }
                let m = output_transposed_1d(sum);
                for q in 0..IN {
                    store_some(m[q], out.add(q * plane + t * stride + j), lanes);
                }
            }
        }
    }
}

kernel! {
    /// `dw = G^T P G` (or `+=`) for output channel `o`; `P` is the sum that [`weight_gradient`] computes.
    ///
    /// # Safety
    /// `sums` holds the 36 planes of all panels of `c` input channels, `c_out` rows each; the rows of `o` have been
    /// written. `dw` is writable for `9 c` floats, and the caller's alone.
    unsafe fn transform_weight_gradient<V>(
        sums: *const f32,
        plane: usize,
        o: usize,
        c_out: usize,
        c: usize,
        dw: *mut f32,
        accumulate: bool,
    ) {
        let width = panel_width::<V>();
        for k in (0..c).step_by(V::LANES) {
            let lanes = V::LANES.min(c - k);
            let sums = sums.add((k / width * c_out + o) * width + k % width);
            let mut half = [[V::splat(0.0); IN]; 3];
            for q in 0..IN {
                let mut column = [V::splat(0.0); IN];
                for p in 0..IN {
                    column[p] = load_some(sums.add((p * IN + q) * plane), lanes);
                }
                let h = weight_transposed_1d(column);
                for u in 0..3 {
                    half[u][q] = h[u];
                }
            }
            for u in 0..3 {
                let g = weight_transposed_1d(half[u]);
                for v in 0..3 {
                    let dw = dw.add((u * 3 + v) * c + k);
                    let g = if accumulate { load_some::<V>(dw, lanes).add(g[v]) } else { g[v] };
                    store_some(g, dw, lanes);
                }
            }
        }
    }
}

/// The gradient of the weight, stored to `dw` or added to it.
///
/// A task owns one row of the 6x6 products and up to 128 input channels. It walks over all tiles with its transformed
/// numbers and its sums in L2. The first half of the transform yields just that row, so splitting by row costs only
/// that tiles are read six times.
#[allow(clippy::too_many_arguments)]
pub(crate) fn weight_gradient<V: Vector>(
    token: V::Token,
    device: &Device,
    x: &[f32],
    tiles: Tiles,
    dy: &[f32],
    c_out: usize,
    dw: &mut [f32],
    accumulate: bool,
) {
    let (count, width, c) = (tiles.count(), panel_width::<V>(), tiles.c);
    assert_eq!(x.len(), tiles.n * tiles.h * tiles.w * c);
    assert_eq!(dy.len(), tiles.n * tiles.out_h * tiles.out_w * c_out);
    assert_eq!(dw.len(), c_out * 9 * c);
    let channels = 128usize.next_multiple_of(width);
    let blocks = c.div_ceil(channels);
    let y_stride = c_out.next_multiple_of(16) + 16;
    // Tiles per chunk, 16 to 256: about 768 KiB of transformed numbers.
    let chunk =
        (768 * 1024 / (4 * IN * (channels.min(c.next_multiple_of(width)) + y_stride))).clamp(16, 256).min(count.max(1));
    let v_panel = plane(chunk * width);
    let v_plane = channels.min(c).div_ceil(width) * v_panel;
    let y_plane = plane(chunk * y_stride);
    let sums_plane = plane(c.div_ceil(width) * c_out * width);
    let mut sums = device.scratch(XI * sums_plane);
    let out = Shared::new(sums.as_mut_slice());
    Slots::new(device, IN * (v_plane + y_plane)).run(IN * blocks, |task, scratch| {
        let (block, p) = (task / IN, task % IN);
        let (k, here) = (block * channels, channels.min(c - block * channels));
        let (v, m) = scratch.split_at_mut(IN * v_plane);
        for first in (0..count).step_by(chunk) {
            let rows = chunk.min(count - first);
            // SAFETY: x and dy have the lengths asserted; v and m, in this task's scratch, have IN planes each: v's
            // hold enough panels of `chunk` rows for `channels.min(c) >= here` channels, m's `chunk` rows of `y_stride
            // >= c_out`.
            unsafe {
                let v = v.as_mut_ptr();
                transform_input_row::<V>(token, x.as_ptr(), tiles, first, rows, p, k, here, v, v_plane, v_panel);
                let m = m.as_mut_ptr();
                transform_gradient_row::<V>(token, dy.as_ptr(), tiles, c_out, first, rows, p, m, y_plane, y_stride);
            }
            for q in 0..IN {
                for j in (0..here).step_by(width) {
                    let columns = width.min(here - j);
                    // SAFETY: plane q of m holds `rows` rows of c_out and plane q of v `rows` rows of this panel, both
                    // just written; `sums` has room for c_out rows of each of c's panels in each plane, and no other
                    // task has those of channels k..k + here in plane p * IN + q.
                    unsafe {
                        let a = m.as_ptr().add(q * y_plane);
                        let b = v.as_ptr().add(q * v_plane + j / width * v_panel);
                        let c = out.at((p * IN + q) * sums_plane + (k + j) / width * c_out * width);
                        let c = Shared::new_at(c);
                        if first == 0 {
                            let store = Overwrite { c, stride: width };
                            rows_by_panel::<V, _, true>(token, c_out, columns, rows, a, y_stride, b, a, store);
                        } else {
                            let add = Accumulate { c, stride: width };
                            rows_by_panel::<V, _, true>(token, c_out, columns, rows, a, y_stride, b, a, add);
                        }
                    }
                }
            }
        }
    });
    let sums = sums.as_slice();
    let out = Shared::new(dw);
    for_each_task(c_out, |o| {
        // SAFETY: the tasks above covered all rows of the 6x6 products and all blocks of channels, so every panel of
        // every plane has been written; dw has the length asserted, and task o alone has its row o.
        unsafe {
            let dw = out.at(o * 9 * c);
            transform_weight_gradient::<V>(token, sums.as_ptr(), sums_plane, o, c_out, c, dw, accumulate)
        }
    });
}
