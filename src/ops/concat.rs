//! `y = [a, b]` along the channels: `a (n,h,w,c_a)`, `b (n,h,w,c_b)`, `y (n,h,w,c_a + c_b)`.
//!
//! Gradient: `da` and `db` are the two parts of `dy`. Nothing is saved. Elements are only copied, so results are exact.
//!
//! [`Joined`] is a concatenation that is never made on a GPU: the operations that take one read both tensors in place,
//! and write the gradients of both.
//!
//! Least traffic: every element read once and written once, `8 (c_a + c_b)` bytes per pixel in f32, forward and
//! backward.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{DType, Shape, Tensor};

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

/// One value, or two whose channels follow one another, for an operation that reads both where they are. On the CPU it
/// concatenates them.
#[derive(Clone)]
pub struct Joined {
    first: (Tensor, Option<VarId>),
    second: Option<(Tensor, Option<VarId>)>,
}

impl From<&Var> for Joined {
    fn from(x: &Var) -> Self {
        Joined { first: (x.value().clone(), x.id()), second: None }
    }
}

impl From<[&Var; 2]> for Joined {
    /// Everything but the number of channels must agree.
    fn from([a, b]: [&Var; 2]) -> Self {
        assert_eq!(a.shape().with_c(0), b.shape().with_c(0), "joined: a is {}, b is {}", a.shape(), b.shape());
        assert_eq!(a.value().dtype(), b.value().dtype(), "joined: {:?} and {:?}", a.value(), b.value());
        Joined { second: Some((b.value().clone(), b.id())), ..Joined::from(a) }
    }
}

impl Joined {
    /// The shape of the concatenation.
    pub fn shape(&self) -> Shape {
        let shape = self.first().shape();
        shape.with_c(shape.c + self.second().map_or(0, |second| second.shape().c))
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.first().dtype()
    }

    /// The first of the tensors, or the only one.
    pub(crate) fn first(&self) -> &Tensor {
        &self.first.0
    }

    /// The second.
    pub(crate) fn second(&self) -> Option<&Tensor> {
        self.second.as_ref().map(|(tensor, _)| tensor)
    }

    /// Both of them.
    pub(crate) fn tensors(&self) -> Vec<&Tensor> {
        [self.first()].into_iter().chain(self.second()).collect()
    }

    /// Channels of each of them.
    pub(crate) fn widths(&self) -> Vec<usize> {
        self.tensors().into_iter().map(|x| x.shape().c).collect()
    }

    /// Whether a gradient of any of them is wanted.
    pub(crate) fn wants_gradient(&self) -> bool {
        self.first.1.is_some() || self.second.as_ref().is_some_and(|(_, id)| id.is_some())
    }

    /// The concatenation. CPU only.
    pub(crate) fn concatenated(&self, device: &Device) -> Result<Tensor> {
        let Some(second) = self.second() else { return Ok(self.first().clone()) };
        let mut y = Tensor::uninit(device, DType::F32, self.shape())?;
        cpu::forward(y.data_mut(), self.first().data(), second.data(), self.first().shape().c, second.shape().c);
        Ok(y)
    }

    /// Tensors for the gradients of both.
    pub(crate) fn gradients(&self, device: &Device) -> Result<(Tensor, Option<Tensor>)> {
        let uninit = |x: &Tensor| Tensor::uninit(device, x.dtype(), x.shape());
        Ok((uninit(self.first())?, self.second().map(uninit).transpose()?))
    }

    /// Adds the gradients of both, each if it is wanted.
    pub(crate) fn add(&self, grads: &mut Grads<'_>, dx: (Tensor, Option<Tensor>)) -> Result<()> {
        for (id, dx) in self.ids().into_iter().zip([Some(dx.0), dx.1]) {
            if let (Some(id), Some(dx)) = (id, dx) {
                grads.add(id, dx)?;
            }
        }
        Ok(())
    }

    /// The places of both on the tape, of each whose gradient is wanted.
    pub(crate) fn ids(&self) -> [Option<VarId>; 2] {
        [self.first.1, self.second.as_ref().and_then(|(_, id)| *id)]
    }

    /// The same as [`add`](Self::add), for the gradient of the concatenation. CPU only.
    pub(crate) fn add_parts(&self, grads: &mut Grads<'_>, dx: Tensor) -> Result<()> {
        let c = dx.shape().c;
        let (mut first, Some(mut second)) = self.gradients(grads.device())? else { return self.add(grads, (dx, None)) };
        let seam = first.shape().c;
        cpu::part(first.data_mut(), dx.data(), c, 0..seam);
        cpu::part(second.data_mut(), dx.data(), c, seam..c);
        self.add(grads, (first, Some(second)))
    }
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
