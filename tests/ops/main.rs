//! One file of tests per operation, under the operation's stem.

#[path = "../support/mod.rs"]
mod support;

mod add;
mod conv2d;
mod linear;
