//! `y[i] = add_to[i] + table[labels[i]]`: a table row per image, added to `add_to` (the time embedding). `table
//! (classes,1,1,c)`, `labels (n,1,1,1)`, `add_to` and `y (n,1,1,c)`. Labels are class numbers, held as f32, which is
//! exact up to 2^24.
//!
//! Gradient: `d add_to = dy`, passed on; `d table[k] = sum of dy[i] over the i with labels[i] = k`, in order of `i`,
//! zero for a class without images. Saved: the labels. One rounding per element forward. There are only a few rows, so
//! the CPU path uses one core.

use crate::device::Device;
use crate::error::Result;
use crate::params::Param;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{DType, Shape, Tensor};

/// `add_to` plus each image's row of `table`. Labels must be below the number of classes: the CPU path asserts it, a
/// kernel cannot.
pub fn embedding(tape: &mut Tape<'_>, table: Param, labels: &Tensor, add_to: &Var) -> Result<Var> {
    let (shape, rows, n) = (add_to.shape(), tape.params().shape(table), labels.shape().n);
    assert_eq!(shape, Shape::new(n, 1, 1, rows.c), "embedding: {n} labels, table {rows}");
    let mut y = Tensor::uninit(tape.device(), add_to.value().dtype(), shape)?;
    match tape.device() {
        Device::Cpu(_) => {
            if let Some(label) = labels.data().iter().find(|&&label| label as usize >= rows.n) {
                panic!("embedding: label {label} with a table of {} classes", rows.n);
            }
            cpu::forward(y.data_mut(), tape.params().get(table), labels.data(), add_to.data());
        }
        Device::Cuda(gpu) => {
            let table = tape.params().view(table, DType::F32);
            cuda::forward(gpu, &mut y, table, labels, add_to.value())?;
        }
        Device::Meta(_) => {}
    }
    tape.push("embedding", y, || EmbeddingBackward { table, labels: labels.clone(), add_to: add_to.id() })
}

struct EmbeddingBackward {
    table: Param,
    labels: Tensor,
    add_to: Option<VarId>,
}

impl Backward for EmbeddingBackward {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn saved(&self) -> Vec<&Tensor> {
        vec![&self.labels]
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        match grads.device() {
            Device::Cpu(_) => {
                if let Some(table) = grads.param(self.table) {
                    cpu::backward(table.data, table.accumulate, self.labels.data(), dy.data());
                }
            }
            Device::Cuda(gpu) => {
                let rows = grads.weight_shape(self.table);
                if let Some(table) = grads.param_view(self.table) {
                    cuda::backward(gpu, table, rows, &self.labels, &dy)?;
                }
            }
            Device::Meta(_) => {}
        }
        if let Some(add_to) = self.add_to {
            grads.add(add_to, dy)?;
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
    pub fn forward(y: &mut [f32], table: &[f32], labels: &[f32], add_to: &[f32]) {
        let c = y.len() / labels.len();
        for ((y, x), &label) in y.chunks_exact_mut(c).zip(add_to.chunks_exact(c)).zip(labels) {
            let row = &table[label as usize * c..][..c];
            for ((y, x), row) in y.iter_mut().zip(x).zip(row) {
                *y = x + row;
            }
        }
    }

    pub fn backward(dtable: &mut [f32], accumulate: bool, labels: &[f32], dy: &[f32]) {
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

mod cuda {
    use super::*;
    use crate::device::cuda::tile::over_rows;
    use crate::device::cuda::{Gpu, View};
    use crate::kernels::embedding::{BWD, FWD};
    use crate::params::ParamView;

    pub fn forward(gpu: &Gpu, y: &mut Tensor, table: View<'_>, labels: &Tensor, add_to: &Tensor) -> Result<()> {
        let Shape { n, c, .. } = y.shape();
        let (grid, lane_bits) = over_rows(n, c, 256);
        let launch = gpu.launch(FWD.of(add_to.dtype()), grid, 256).write(y).read(add_to);
        launch.view(table).read(labels).u32(n).u32(c).u32(lane_bits).run()
    }

    pub fn backward(gpu: &Gpu, table: ParamView<'_>, rows: Shape, labels: &Tensor, dy: &Tensor) -> Result<()> {
        let (grid, lane_bits) = over_rows(rows.n, rows.c, 256);
        let launch = gpu.launch(BWD.of(dy.dtype()), grid, 256).view_mut(table.view).read(dy).read(labels);
        let launch = launch.u32(rows.n).u32(dy.shape().n).u32(rows.c);
        launch.u32(table.accumulate.into()).u32(lane_bits).run()
    }
}
