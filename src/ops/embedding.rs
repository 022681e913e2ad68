//! `y[i] = add_to[i] + table[labels[i]]`: one row of a table for each image, added to what is there (the time embedding).
//! `table (classes,1,1,c)`, `labels (n)`, `add_to` and `y (n,1,1,c)`.
//!
//! Gradient: `d add_to = dy`, handed on; `d table[k] = sum of dy[i] over the i with labels[i] = k`, in order of `i`; rows of classes that
//! no image has are zero. No tensor is saved (the labels are, 4 bytes an image). One rounding per element forward. A few rows,
//! so everything runs on one core.

use crate::device::Device;
use crate::error::Result;
use crate::params::Param;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{Shape, Tensor};

/// `add_to` with each image's row of `table` added. A label beyond the table is a bug of the caller.
pub fn embedding(tape: &mut Tape<'_>, table: Param, labels: &[u32], add_to: &Var) -> Result<Var> {
    let (shape, rows) = (add_to.shape(), tape.params().shape(table));
    assert_eq!(shape, Shape::new(labels.len(), 1, 1, rows.c), "embedding: {} labels, table {rows}", labels.len());
    if let Some(label) = labels.iter().find(|&&label| label as usize >= rows.n) {
        panic!("embedding: label {label} with a table of {} classes", rows.n);
    }
    let mut y = Tensor::uninit(tape.device(), shape);
    match tape.device() {
        Device::Cpu(_) => cpu::forward(y.data_mut(), tape.params().get(table), labels, add_to.data()),
    }
    tape.push("embedding", y, || EmbeddingBackward { table, labels: labels.to_vec(), add_to: add_to.id() })
}

struct EmbeddingBackward {
    table: Param,
    labels: Vec<u32>,
    add_to: Option<VarId>,
}

impl Backward for EmbeddingBackward {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        match grads.device() {
            Device::Cpu(_) => {
                let table = grads.param(self.table);
                cpu::backward(table.data, table.accumulate, &self.labels, dy.data());
            }
        }
        if let Some(add_to) = self.add_to {
            grads.add(add_to, dy);
        }
        Ok(())
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    /// `y[i] = add_to[i] + table[labels[i]]`, rows of `c`.
    pub fn forward<T: Float>(table: &[T], labels: &[u32], add_to: &[T], c: usize) -> Vec<T> {
        let at = |i: usize| add_to[i] + table[labels[i / c] as usize * c + i % c];
        (0..add_to.len()).map(at).collect()
    }

    /// The gradient of a table of `classes` rows.
    pub fn backward<T: Float>(labels: &[u32], dy: &[T], classes: usize, c: usize) -> Vec<T> {
        let mut dtable = vec![T::zero(); classes * c];
        for (i, &dy) in dy.iter().enumerate() {
            let at = labels[i / c] as usize * c + i % c;
            dtable[at] = dtable[at] + dy;
        }
        dtable
    }
}

mod cpu {
    pub fn forward(y: &mut [f32], table: &[f32], labels: &[u32], add_to: &[f32]) {
        let c = y.len() / labels.len();
        for ((y, x), &label) in y.chunks_exact_mut(c).zip(add_to.chunks_exact(c)).zip(labels) {
            let row = &table[label as usize * c..][..c];
            for ((y, x), row) in y.iter_mut().zip(x).zip(row) {
                *y = x + row;
            }
        }
    }

    pub fn backward(dtable: &mut [f32], accumulate: bool, labels: &[u32], dy: &[f32]) {
        if !accumulate {
            dtable.fill(0.0);
        }
        let c = dy.len() / labels.len();
        for (dy, &label) in dy.chunks_exact(c).zip(labels) {
            let row = &mut dtable[label as usize * c..][..c];
            for (row, dy) in row.iter_mut().zip(dy) {
                *row += dy;
            }
        }
    }
}
