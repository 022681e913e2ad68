//! `y = a + b`, element by element.
//!
//! Gradient: `da = dy`, `db = dy`: one tensor, two handles, nothing computed. Nothing is saved. One rounding per
//! element. The tape also uses this sum to add two gradients of one value, and training to add those of micro-batches.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::Tensor;

/// `a + b`; both have the same shape.
pub fn add(tape: &mut Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    assert_eq!(a.shape(), b.shape(), "add: a is {}, b is {}", a.shape(), b.shape());
    let y = match tape.device() {
        Device::Cpu(_) | Device::Cuda(_) | Device::Meta(_) => sum(tape.device(), a.value(), b.value())?,
    };
    tape.push("add", y, || AddBackward { a: a.id(), b: b.id() })
}

struct AddBackward {
    a: Option<VarId>,
    b: Option<VarId>,
}

impl Backward for AddBackward {
    fn name(&self) -> &'static str {
        "add"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        if let Some(a) = self.a {
            grads.add(a, dy.clone())?;
        }
        if let Some(b) = self.b {
            grads.add(b, dy)?;
        }
        Ok(())
    }
}

/// `sum + term`, in place in whichever buffer no other handle shares, else in a new one.
pub(crate) fn accumulate(device: &Device, mut sum: Tensor, mut term: Tensor) -> Result<Tensor> {
    assert_eq!(sum.shape(), term.shape(), "gradients of one value: {} and {}", sum.shape(), term.shape());
    if !sum.is_unique() {
        std::mem::swap(&mut sum, &mut term);
    }
    if !sum.is_unique() {
        return self::sum(device, &sum, &term);
    }
    add_assign(device, &mut sum, &term)?;
    Ok(sum)
}

/// `sum = sum + term`, in the buffer of `sum`, which no other handle may share; both have the same shape.
///
/// # Errors
/// A GPU error.
pub fn add_assign(device: &Device, sum: &mut Tensor, term: &Tensor) -> Result<()> {
    assert_eq!(sum.shape(), term.shape(), "add: a sum of {} and {}", sum.shape(), term.shape());
    match device {
        Device::Cpu(_) => cpu::add_assign(sum.data_mut(), term.data()),
        Device::Cuda(gpu) => cuda::add_assign(gpu, sum, term)?,
        Device::Meta(_) => {}
    }
    Ok(())
}

fn sum(device: &Device, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let mut y = Tensor::uninit(device, a.dtype(), a.shape())?;
    match device {
        Device::Cpu(_) => cpu::add(y.data_mut(), a.data(), b.data()),
        Device::Cuda(gpu) => cuda::add(gpu, &mut y, a, b)?,
        Device::Meta(_) => {}
    }
    Ok(y)
}

/// The definition.
pub mod reference {
    use std::ops::Add;

    /// `y[i] = a[i] + b[i]`.
    pub fn forward<T: Copy + Add<Output = T>>(a: &[T], b: &[T]) -> Vec<T> {
        a.iter().zip(b).map(|(&a, &b)| a + b).collect()
    }
}

mod cpu {
    use super::*;

    /// Elements per task: 64 KiB of output, large compared with the cost of scheduling a task.
    const CHUNK: usize = 1 << 14;

    pub fn add(y: &mut [f32], a: &[f32], b: &[f32]) {
        let chunks = y.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK));
        chunks.for_each(|((y, a), b)| y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = a + b));
    }

    pub fn add_assign(y: &mut [f32], x: &[f32]) {
        let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
        chunks.for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, x)| *y += x));
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::{Gpu, each_four};
    use crate::kernels::add::FWD;

    pub fn add(gpu: &Gpu, y: &mut Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
        let (kernel, len) = (FWD.of(a.dtype()), a.shape().len());
        gpu.launch(kernel, each_four(len), 256).write(y).read(a).read(b).u64(len).run()
    }

    pub fn add_assign(gpu: &Gpu, y: &mut Tensor, x: &Tensor) -> Result<()> {
        let (kernel, len) = (FWD.of(x.dtype()), x.shape().len());
        gpu.launch(kernel, each_four(len), 256).write(y).first_again().read(x).u64(len).run()
    }
}
