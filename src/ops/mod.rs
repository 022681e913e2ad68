//! The operations, one file each.
//!
//! Every file has the same order: the formula and the derivation of its gradient; the public function (checks, `match`
//! on the device, a record on the tape); the struct with the backward pass; `mod reference`, the definition as plain
//! loops over any float type, which is every test's oracle; `mod cpu`, the fast CPU path; `mod cuda`, the launches. The
//! same stem names the kernels (`kernels`), the tests (`tests/ops`) and the benches (`benches/ops`).

pub mod adam;
pub mod add;
pub mod attention;
pub mod avg_pool;
pub mod concat;
pub mod conv2d;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod grad_norm;
pub mod group_norm;
pub mod linear;
pub mod loss;
pub mod pool;
pub mod q_sample;
pub mod sample_step;
pub mod silu;
pub mod time_embedding;
pub mod tree_sum;
pub mod upsample;

use crate::error::Result;
use crate::params::ParamGrads;
use crate::tape::{LeafGrads, Tape, Var};
use crate::tensor::Tensor;

impl Tape<'_> {
    /// Runs the tape backwards from `y` with gradient `dy`, shaped like `y`, and accumulates the parameters' gradients
    /// in `param_grads`. Returns the gradients of the leaves; see [`LeafGrads::take`].
    ///
    /// # Errors
    /// A GPU error.
    pub fn backward(self, y: &Var, dy: Tensor, param_grads: &mut ParamGrads) -> Result<LeafGrads> {
        self.backward_by(y, dy, Some(param_grads), add::accumulate)
    }

    /// The same for the leaves alone: what only the parameters' gradients need is not computed.
    ///
    /// # Errors
    /// A GPU error.
    pub fn backward_to_leaves(self, y: &Var, dy: Tensor) -> Result<LeafGrads> {
        self.backward_by(y, dy, None, add::accumulate)
    }
}
