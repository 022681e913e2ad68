//! The operations, one file each.
//!
//! Every file has the same order: the formula and its derived gradient; the public function (checks, `match` on the
//! device, a record on the tape); the struct with the backward pass; `mod reference`, the definition as plain loops
//! over any float type and the oracle of every test; `mod cpu`, the practical path where the plain loops are too slow; `mod cuda`, the
//! launches. The same stem names the kernels (`kernels`), the tests (`tests/ops`) and the benches (`benches/ops`).

pub mod adam;
pub mod add;
pub mod attention;
pub mod concat;
pub mod conv2d;
pub mod dropout;
pub mod embedding;
pub mod grad_norm;
pub mod group_norm;
pub mod linear;
pub mod loss;
pub mod q_sample;
pub mod sample_step;
pub mod silu;
pub mod time_embedding;
pub mod upsample;
