//! The fewest bytes that a step can move between memory and the chip, given what its tape keeps: a bound to compare the
//! real traffic with.
//!
//! It assumes that no layer is fused with the next one, which the tensors between them are too large for, and that
//! everything else is perfect:
//!
//! - a kept activation is written once and read once by the operation that keeps it in the forward pass, read once in
//!   the backward pass, and its gradient is written once and read once;
//! - what is kept without having a gradient (statistics, the noised images) is written once and read once;
//! - weights are read once in each pass over a micro-batch, in the type of the products, other parameters in f32;
//! - a parameter's gradient is written once, read once for the norm of all, which must be known before the first
//!   update, and once by the update;
//! - weights, moving average and both moments are read and written once by the update, and their rounded copy is
//!   written once;
//! - the images are read once, a byte an element, and the network's output and its gradient are written and read once.
//!
//! What is not kept may stay on the chip: the bound does not count it.

use serde::Serialize;

use crate::config::Config;
use crate::params::{Layout, Specs};
use crate::tape::Kept;
use crate::tensor::DType;

/// Bytes of a step, by what they are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Least {
    /// Kept tensors.
    pub activations: u64,
    /// Their gradients.
    pub gradients: u64,
    /// Parameters, as the forward and the backward pass read them.
    pub weights: u64,
    /// The gradients of parameters, and what the update reads and writes.
    pub update: u64,
    /// Images in, output out.
    pub images: u64,
}

impl Least {
    /// In all.
    pub fn total(&self) -> u64 {
        self.activations + self.gradients + self.weights + self.update + self.images
    }
}

/// Bytes of the kept tensors, (with, without) a gradient.
fn kept(plan: &[Kept]) -> (u64, u64) {
    let sum = |gradient: bool| plan.iter().filter(|k| k.gradient == gradient).map(|k| k.bytes as u64).sum();
    (sum(true), sum(false))
}

/// Bytes of all parameters as the products read them: weights in the type of the activations, vectors in f32.
fn parameters(specs: &Specs, dtype: DType) -> u64 {
    let bytes = |layout: Layout| if layout == Layout::Vector { 4 } else { dtype.size() };
    specs.iter().map(|(_, spec)| (spec.shape.len() * bytes(spec.layout)) as u64).sum()
}

/// Of a training step whose micro-batches keep `plan`, with activations of type `dtype`.
pub fn of_training(config: &Config, specs: &Specs, plan: &[Kept], dtype: DType) -> Least {
    let (m, passes) = (&config.model, config.accumulate as u64);
    let (with, without) = kept(plan);
    let count = specs.count() as u64;
    let rounded = match dtype {
        DType::F32 => 0,
        DType::Bf16 => parameters(specs, dtype) - parameters_in_vectors(specs),
    };
    let images = (config.batch * m.image_size.pixels() * m.channels) as u64;
    let outputs = if m.classifier { config.batch } else { config.batch * m.image_size.pixels() };
    let output = (outputs * m.out_channels() * dtype.size()) as u64;
    Least {
        activations: passes * (3 * with + 2 * without),
        gradients: passes * 2 * with,
        weights: passes * 2 * parameters(specs, dtype),
        update: 4 * count * (1 + 2 + 4 + 4) + rounded,
        images: images + 4 * output,
    }
}

/// Of a sampling step, which keeps nothing: what a training step would keep and has a gradient is written and read
/// once, weights are read once, and x, in f32 and rounded, and the network's output are written and read once.
pub fn of_sampling(config: &Config, specs: &Specs, plan: &[Kept], dtype: DType) -> Least {
    let m = &config.model;
    let pixels = (config.batch * m.image_size.pixels()) as u64;
    let (x, output) = (pixels * m.channels as u64, pixels * m.out_channels() as u64);
    let size = dtype.size() as u64;
    Least {
        activations: 2 * kept(plan).0,
        weights: parameters(specs, dtype),
        images: 2 * (4 * x + size * output) + if dtype == DType::F32 { 0 } else { 2 * size * x },
        ..Least::default()
    }
}

/// Bytes of the parameters that are vectors.
fn parameters_in_vectors(specs: &Specs) -> u64 {
    let vectors = specs.iter().filter(|(_, spec)| spec.layout == Layout::Vector);
    vectors.map(|(_, spec)| 4 * spec.shape.len() as u64).sum()
}
