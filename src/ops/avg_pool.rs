//! Average pooling by two: `y[n, i, j, c] = ((x[.., 2i, 2j, ..] + x[.., 2i, 2j+1, ..]) + (x[.., 2i+1, 2j, ..] +
//! x[.., 2i+1, 2j+1, ..])) / 4`, in this order; `x (n,2h,2w,c)`, `y (n,h,w,c)`. It halves an image within OpenAI's
//! `resblock_updown` (guided-diffusion) and diffusers' `downsample_type: resnet`.
//!
//! Gradient: `dx[n, 2i+a, 2j+b, c] = dy[n, i, j, c] / 4` for `a, b` in `{0, 1}`. Nothing is saved. The forward rounds
//! three times, the backward not at all but for numbers below the normal ones. Least traffic: `x` once and `y` once,
//! `4 (4 + 1)` bytes per element of `y` in f32, forward and backward.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{Shape, Tensor};

/// The mean of each 2x2 square: half as high, half as wide. Rows and columns of `x` must be even.
pub fn avg_pool(tape: &mut Tape<'_>, x: &Var) -> Result<Var> {
    let of_x = x.shape();
    assert!(of_x.h.is_multiple_of(2) && of_x.w.is_multiple_of(2), "avg_pool: {of_x} has an odd side");
    let shape = Shape { h: of_x.h / 2, w: of_x.w / 2, ..of_x };
    let mut y = Tensor::uninit(tape.device(), x.value().dtype(), shape)?;
    match tape.device() {
        Device::Cpu(_) => cpu::forward(y.data_mut(), x.data(), shape),
        Device::Cuda(gpu) => cuda::forward(gpu, &mut y, x.value())?,
        Device::Meta(_) => {}
    }
    tape.push("avg_pool", y, || AvgPoolBackward { x: x.id(), shape })
}

struct AvgPoolBackward {
    x: Option<VarId>,
    /// Of `y`.
    shape: Shape,
}

impl Backward for AvgPoolBackward {
    fn name(&self) -> &'static str {
        "avg_pool"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Some(x) = self.x else { return Ok(()) };
        let of_x = Shape { h: 2 * self.shape.h, w: 2 * self.shape.w, ..self.shape };
        let mut dx = Tensor::uninit(grads.device(), dy.dtype(), of_x)?;
        match grads.device() {
            Device::Cpu(_) => cpu::backward(dx.data_mut(), dy.data(), self.shape),
            Device::Cuda(gpu) => cuda::backward(gpu, &mut dx, &dy)?,
            Device::Meta(_) => {}
        }
        grads.add(x, dx)
    }
}

/// The definition. `shape` is that of `y`.
pub mod reference {
    use num_traits::Float;

    use crate::tensor::Shape;

    /// `y[n, i/2, j/2, c] += x[n, i, j, c]`, divided by four at the end.
    pub fn forward<T: Float>(x: &[T], shape: Shape) -> Vec<T> {
        let mut y = vec![T::zero(); shape.len()];
        for (at, of_x) in places(shape) {
            y[at] = y[at] + x[of_x];
        }
        y.into_iter().map(|sum| sum / four()).collect()
    }

    /// `dx[n, i, j, c] = dy[n, i/2, j/2, c] / 4`.
    pub fn backward<T: Float>(dy: &[T], shape: Shape) -> Vec<T> {
        let mut dx = vec![T::nan(); 4 * shape.len()];
        for (at, of_x) in places(shape) {
            dx[of_x] = dy[at] / four();
        }
        dx
    }

    fn four<T: Float>() -> T {
        T::from(4).expect("a small integer")
    }

    /// For each element of `x` that of `y` which it belongs to, and its own index.
    fn places(shape: Shape) -> impl Iterator<Item = (usize, usize)> {
        let Shape { n, h, w, c } = shape;
        let place = move |i: usize| {
            let (image, row, column, channel) =
                (i / (4 * h * w * c), i / (2 * w * c) % (2 * h), i / c % (2 * w), i % c);
            (((image * h + row / 2) * w + column / 2) * c + channel, i)
        };
        (0..4 * n * h * w * c).map(place)
    }
}

mod cpu {
    use super::*;

    /// Elements of `x` per task: 128 KiB, large compared with the cost of scheduling a task.
    const CHUNK: usize = 1 << 15;

    /// Rows of `y` per task.
    fn rows(shape: Shape) -> usize {
        (CHUNK / (4 * shape.w * shape.c)).max(1)
    }

    pub fn forward(y: &mut [f32], x: &[f32], shape: Shape) {
        let (row, c) = (shape.w * shape.c, shape.c);
        let rows = rows(shape);
        y.par_chunks_mut(rows * row).zip(x.par_chunks(rows * 4 * row)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(row).zip(x.chunks_exact(4 * row)) {
                let (above, below) = x.split_at(2 * row);
                let pairs = above.chunks_exact(2 * c).zip(below.chunks_exact(2 * c));
                for (y, (above, below)) in y.chunks_exact_mut(c).zip(pairs) {
                    let (a, b) = above.split_at(c);
                    let (d, e) = below.split_at(c);
                    for ((((y, a), b), d), e) in y.iter_mut().zip(a).zip(b).zip(d).zip(e) {
                        *y = 0.25 * ((a + b) + (d + e));
                    }
                }
            }
        });
    }

    pub fn backward(dx: &mut [f32], dy: &[f32], shape: Shape) {
        let (row, c) = (shape.w * shape.c, shape.c);
        let rows = rows(shape);
        dx.par_chunks_mut(rows * 4 * row).zip(dy.par_chunks(rows * row)).for_each(|(dx, dy)| {
            for (dx, dy) in dx.chunks_exact_mut(4 * row).zip(dy.chunks_exact(row)) {
                let (above, below) = dx.split_at_mut(2 * row);
                for (dx, dy) in above.chunks_exact_mut(2 * c).zip(dy.chunks_exact(c)) {
                    let (left, right) = dx.split_at_mut(c);
                    left.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = 0.25 * dy);
                    right.copy_from_slice(left);
                }
                below.copy_from_slice(above);
            }
        });
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::Gpu;
    use crate::device::cuda::tile::over_rows;
    use crate::kernels::avg_pool::{BWD, FWD};

    pub fn forward(gpu: &Gpu, y: &mut Tensor, x: &Tensor) -> Result<()> {
        let Shape { w, c, .. } = y.shape();
        let pixels = pixels(y);
        let (grid, lane_bits) = over_rows(pixels, c.div_ceil(4), 256);
        let launch = gpu.launch(FWD.of(x.dtype()), grid, 256).write(y).read(x).u64(pixels);
        launch.u32(w).u32(c).u32(lane_bits).run()
    }

    pub fn backward(gpu: &Gpu, dx: &mut Tensor, dy: &Tensor) -> Result<()> {
        let Shape { w, c, .. } = dy.shape();
        let pixels = pixels(dy);
        let (grid, lane_bits) = over_rows(pixels, c.div_ceil(4), 256);
        let launch = gpu.launch(BWD.of(dy.dtype()), grid, 256).write(dx).read(dy).u64(pixels);
        launch.u32(w).u32(c).u32(lane_bits).run()
    }

    /// Pixels of y or dy.
    fn pixels(y: &Tensor) -> usize {
        let pixels = y.shape().rows();
        assert!(pixels < 1 << 32, "avg_pool: {pixels} pixels; the kernels count to 2^32");
        pixels
    }
}
