//! One file of tests per operation, under the operation's stem.

#[path = "../support/mod.rs"]
mod support;

mod add;
mod attention;
mod concat;
mod conv2d;
mod dropout;
mod embedding;
mod group_norm;
mod linear;
mod silu;
mod time_embedding;
mod upsample;
