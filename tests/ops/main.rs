//! One file of tests per operation, under the operation's stem.

#[path = "../support/mod.rs"]
mod support;

mod adam;
mod add;
mod attention;
mod concat;
mod conv2d;
mod dropout;
mod embedding;
mod grad_norm;
mod group_norm;
mod linear;
mod loss;
mod q_sample;
mod sample_step;
mod silu;
mod time_embedding;
mod upsample;
