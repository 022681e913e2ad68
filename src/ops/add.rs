//! `y = a + b`, element by element.
//!
//! Gradient: `da = dy`, `db = dy`: one tensor, two handles, nothing computed. Nothing is saved. One rounding per element.
//! Also the sum by which the tape joins two gradients of one value.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::Tensor;

/// `a + b` for two values of one shape.
pub fn add(tape: &mut Tape<'_>, a: &Var, b: &Var) -> Result<Var> {
    assert_eq!(a.shape(), b.shape(), "add: a is {}, b is {}", a.shape(), b.shape());
    let y = match tape.device() {
        Device::Cpu(_) => sum(tape.device(), a.value(), b.value()),
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
            grads.add(a, dy.clone());
        }
        if let Some(b) = self.b {
            grads.add(b, dy);
        }
        Ok(())
    }
}

/// `sum + term`, in the buffer of whichever nobody else holds.
pub(crate) fn accumulate(device: &Device, mut sum: Tensor, mut term: Tensor) -> Tensor {
    assert_eq!(sum.shape(), term.shape(), "gradients of one value: {} and {}", sum.shape(), term.shape());
    match device {
        Device::Cpu(_) if sum.is_unique() => {
            cpu::add_assign(sum.data_mut(), term.data());
            sum
        }
        Device::Cpu(_) if term.is_unique() => {
            cpu::add_assign(term.data_mut(), sum.data());
            term
        }
        Device::Cpu(_) => self::sum(device, &sum, &term),
    }
}

fn sum(device: &Device, a: &Tensor, b: &Tensor) -> Tensor {
    let mut y = Tensor::uninit(device, a.shape());
    cpu::add(y.data_mut(), a.data(), b.data());
    y
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

    /// Elements per task: 64 KiB of output, large against the cost of handing out a task.
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
