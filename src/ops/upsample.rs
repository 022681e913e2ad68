//! Nearest-neighbour upsampling by two: `y[n, 2i+a, 2j+b, c] = x[n, i, j, c]` for `a, b` in `{0, 1}`; `x (n,h,w,c)`,
//! `y (n,2h,2w,c)`.
//!
//! Gradient: `dx[n, i, j, c] = (dy[.., 2i, 2j, ..] + dy[.., 2i, 2j+1, ..]) + (dy[.., 2i+1, 2j, ..] + dy[.., 2i+1, 2j+1,
//! ..])`, in this order. Nothing is saved. The forward copies; the backward rounds three times. Least traffic: `x` once
//! and `y` once, `4 (1 + 4)` bytes per element of `x` in f32, forward and backward.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{Shape, Tensor};

/// Repeats each pixel in a 2x2 square: twice as high, twice as wide.
pub fn upsample(tape: &mut Tape<'_>, x: &Var) -> Result<Var> {
    let shape = x.shape();
    let mut y = Tensor::uninit(tape.device(), x.value().dtype(), Shape { h: 2 * shape.h, w: 2 * shape.w, ..shape })?;
    match tape.device() {
        Device::Cpu(_) => cpu::forward(y.data_mut(), x.data(), shape),
        Device::Cuda(gpu) => cuda::forward(gpu, &mut y, x.value())?,
        Device::Meta(_) => {}
    }
    tape.push("upsample", y, || UpsampleBackward { x: x.id(), shape })
}

struct UpsampleBackward {
    x: Option<VarId>,
    shape: Shape,
}

impl Backward for UpsampleBackward {
    fn name(&self) -> &'static str {
        "upsample"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Some(x) = self.x else { return Ok(()) };
        let mut dx = Tensor::uninit(grads.device(), dy.dtype(), self.shape)?;
        match grads.device() {
            Device::Cpu(_) => cpu::backward(dx.data_mut(), dy.data(), self.shape),
            Device::Cuda(gpu) => cuda::backward(gpu, &mut dx, &dy)?,
            Device::Meta(_) => {}
        }
        grads.add(x, dx)
    }
}

/// The definition. `shape` is that of `x`.
pub mod reference {
    use num_traits::Float;

    use crate::tensor::Shape;

    /// `y[n, i, j, c] = x[n, i/2, j/2, c]`.
    pub fn forward<T: Float>(x: &[T], shape: Shape) -> Vec<T> {
        let Shape { n, h, w, c } = shape;
        let mut y = vec![T::nan(); 4 * shape.len()];
        for (ni, i, j, ci) in indices(n, 2 * h, 2 * w, c) {
            y[((ni * 2 * h + i) * 2 * w + j) * c + ci] = x[((ni * h + i / 2) * w + j / 2) * c + ci];
        }
        y
    }

    /// `dx[n, i/2, j/2, c] += dy[n, i, j, c]`.
    pub fn backward<T: Float>(dy: &[T], shape: Shape) -> Vec<T> {
        let Shape { n, h, w, c } = shape;
        let mut dx = vec![T::zero(); shape.len()];
        for (ni, i, j, ci) in indices(n, 2 * h, 2 * w, c) {
            let at = ((ni * h + i / 2) * w + j / 2) * c + ci;
            dx[at] = dx[at] + dy[((ni * 2 * h + i) * 2 * w + j) * c + ci];
        }
        dx
    }

    fn indices(n: usize, h: usize, w: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
        (0..n * h * w * c).map(move |i| (i / (h * w * c), i / (w * c) % h, i / c % w, i % c))
    }
}

pub(super) mod cpu {
    use super::*;

    /// Elements of `y` per task: 128 KiB, large compared with the cost of scheduling a task.
    const CHUNK: usize = 1 << 15;

    /// Rows of `x` per task.
    fn rows(shape: Shape) -> usize {
        (CHUNK / (4 * shape.w * shape.c)).max(1)
    }

    pub fn forward(y: &mut [f32], x: &[f32], shape: Shape) {
        let (row, c) = (shape.w * shape.c, shape.c);
        let rows = rows(shape);
        y.par_chunks_mut(rows * 4 * row).zip(x.par_chunks(rows * row)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(4 * row).zip(x.chunks_exact(row)) {
                let (above, below) = y.split_at_mut(2 * row);
                for (y, x) in above.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
                    y[..c].copy_from_slice(x);
                    y[c..].copy_from_slice(x);
                }
                below.copy_from_slice(above);
            }
        });
    }

    pub fn backward(dx: &mut [f32], dy: &[f32], shape: Shape) {
        let (row, c) = (shape.w * shape.c, shape.c);
        let rows = rows(shape);
        dx.par_chunks_mut(rows * row).zip(dy.par_chunks(rows * 4 * row)).for_each(|(dx, dy)| {
            for (dx, dy) in dx.chunks_exact_mut(row).zip(dy.chunks_exact(4 * row)) {
                let (above, below) = dy.split_at(2 * row);
                let pairs = above.chunks_exact(2 * c).zip(below.chunks_exact(2 * c));
                for (dx, (above, below)) in dx.chunks_exact_mut(c).zip(pairs) {
                    let (a, b) = above.split_at(c);
                    let (d, e) = below.split_at(c);
                    for ((((dx, a), b), d), e) in dx.iter_mut().zip(a).zip(b).zip(d).zip(e) {
                        *dx = (a + b) + (d + e);
                    }
                }
            }
        });
    }
}

pub(super) mod cuda {
    use super::*;
    use crate::device::cuda::Gpu;
    use crate::device::cuda::tile::{at_a_time, over_rows};
    use crate::kernels::upsample::{BWD, FWD};

    pub fn forward(gpu: &Gpu, y: &mut Tensor, x: &Tensor) -> Result<()> {
        let Shape { w, c, .. } = x.shape();
        let (pixels, wide) = (pixels(x), at_a_time(x.dtype().size(), &[c]));
        let (grid, lane_bits) = over_rows(pixels, c / wide, 256);
        let launch = gpu.launch(FWD.of(x.dtype()), grid, 256).write(y).read(x).u64(pixels);
        launch.u32(w).u32(c).u32((wide > 1).into()).u32(lane_bits).run()
    }

    pub fn backward(gpu: &Gpu, dx: &mut Tensor, dy: &Tensor) -> Result<()> {
        let Shape { w, c, .. } = dx.shape();
        let pixels = pixels(dx);
        let (grid, lane_bits) = over_rows(pixels, c.div_ceil(4), 256);
        let launch = gpu.launch(BWD.of(dy.dtype()), grid, 256).write(dx).read(dy).u64(pixels);
        launch.u32(w).u32(c).u32(lane_bits).run()
    }

    /// Pixels of x or dx.
    fn pixels(x: &Tensor) -> usize {
        let pixels = x.shape().rows();
        assert!(pixels < 1 << 32, "upsample: {pixels} pixels; the kernels count to 2^32");
        pixels
    }
}
