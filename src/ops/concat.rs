//! `y = [a, b]` along the channels: `a (n,h,w,c_a)`, `b (n,h,w,c_b)`, `y (n,h,w,c_a + c_b)`.
//!
//! Gradient: `da` and `db` are the two parts of `dy`. Nothing is saved. Elements are only copied, so results are exact.
//! Least traffic: every element read once and written once, `8 (c_a + c_b)` bytes per pixel in f32, forward and
//! backward.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{Shape, Tensor};

/// `a` and `b` concatenated along the channels; everything but the number of channels must agree.
pub fn concat(tape: &mut Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    let (a_shape, b_shape) = (a.shape(), b.shape());
    assert_eq!(a_shape.with_c(0), b_shape.with_c(0), "concat: a is {a_shape}, b is {b_shape}");
    let mut y = Tensor::uninit(tape.device(), a.value().dtype(), a_shape.with_c(a_shape.c + b_shape.c))?;
    match tape.device() {
        Device::Cpu(_) => cpu::forward(y.data_mut(), a.data(), b.data(), a_shape.c, b_shape.c),
        Device::Cuda(gpu) => cuda::forward(gpu, &mut y, a.value(), b.value())?,
        Device::Meta(_) => {}
    }
    tape.push("concat", y, || ConcatBackward { a: a.id(), b: b.id(), a_shape, b_shape })
}

struct ConcatBackward {
    a: Option<VarId>,
    b: Option<VarId>,
    a_shape: Shape,
    b_shape: Shape,
}

impl Backward for ConcatBackward {
    fn name(&self) -> &'static str {
        "concat"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let c = dy.shape().c;
        for (id, shape, at) in [(self.a, self.a_shape, 0), (self.b, self.b_shape, self.a_shape.c)] {
            let Some(id) = id else { continue };
            let mut dx = Tensor::uninit(grads.device(), dy.dtype(), shape)?;
            match grads.device() {
                Device::Cpu(_) => cpu::part(dx.data_mut(), dy.data(), c, at..at + shape.c),
                Device::Cuda(gpu) => cuda::part(gpu, &mut dx, &dy, at)?,
                Device::Meta(_) => {}
            }
            grads.add(id, dx)?;
        }
        Ok(())
    }
}

/// The definition.
pub mod reference {
    use std::ops::Range;

    /// Rows of `c_a` and rows of `c_b` elements, joined row by row.
    pub fn forward<T: Copy>(a: &[T], b: &[T], c_a: usize, c_b: usize) -> Vec<T> {
        let rows = a.chunks_exact(c_a).zip(b.chunks_exact(c_b));
        rows.flat_map(|(a, b)| a.iter().chain(b).copied()).collect()
    }

    /// The channels `part` of every row of `c` elements: the gradient of the input at those channels.
    pub fn backward<T: Copy>(dy: &[T], c: usize, part: Range<usize>) -> Vec<T> {
        dy.chunks_exact(c).flat_map(|row| &row[part.clone()]).copied().collect()
    }
}

mod cpu {
    use super::*;
    use std::ops::Range;

    /// Elements per task: 64 KiB, large compared with the cost of scheduling a task.
    const CHUNK: usize = 1 << 14;

    pub fn forward(y: &mut [f32], a: &[f32], b: &[f32], c_a: usize, c_b: usize) {
        let rows = (CHUNK / (c_a + c_b)).max(1);
        let chunks = y.par_chunks_mut(rows * (c_a + c_b)).zip(a.par_chunks(rows * c_a)).zip(b.par_chunks(rows * c_b));
        chunks.for_each(|((y, a), b)| {
            let rows = y.chunks_exact_mut(c_a + c_b).zip(a.chunks_exact(c_a)).zip(b.chunks_exact(c_b));
            for ((y, a), b) in rows {
                y[..c_a].copy_from_slice(a);
                y[c_a..].copy_from_slice(b);
            }
        });
    }

    pub fn part(dx: &mut [f32], dy: &[f32], c: usize, part: Range<usize>) {
        let rows = (CHUNK / part.len()).max(1);
        dx.par_chunks_mut(rows * part.len()).zip(dy.par_chunks(rows * c)).for_each(|(dx, dy)| {
            for (dx, dy) in dx.chunks_exact_mut(part.len()).zip(dy.chunks_exact(c)) {
                dx.copy_from_slice(&dy[part.clone()]);
            }
        });
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::Gpu;
    use crate::device::cuda::tile::{at_a_time, over_rows};
    use crate::kernels::concat::{JOIN, PART};

    pub fn forward(gpu: &Gpu, y: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        let (shape, [ca, cb]) = (y.shape(), [a.shape().c, b.shape().c]);
        let wide = at_a_time(a.dtype().size(), &[ca, cb]);
        let (grid, lane_bits) = over_rows(shape.rows(), shape.c / wide, 256);
        let launch = gpu.launch(JOIN.of(a.dtype()), grid, 256).write(y).read(a).read(b);
        launch.u64(shape.rows()).u32(ca).u32(cb).u32((wide > 1).into()).u32(lane_bits).run()
    }

    /// The channels of `dy` from `first` on.
    pub fn part(gpu: &Gpu, dx: &mut Tensor, dy: &Tensor, first: usize) -> Result<()> {
        let (shape, whole) = (dx.shape(), dy.shape().c);
        let wide = at_a_time(dy.dtype().size(), &[shape.c, whole, first]);
        let (grid, lane_bits) = over_rows(shape.rows(), shape.c / wide, 256);
        let launch = gpu.launch(PART.of(dy.dtype()), grid, 256).write(dx).read(dy).u64(shape.rows());
        launch.u32(shape.c).u32(whole).u32(first).u32((wide > 1).into()).u32(lane_bits).run()
    }
}
