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
//!
//! [`Roofline`] makes of it, and of the FLOP of the products, the least time of a training step.

use serde::Serialize;

use super::card::Card;
use crate::config::Config;
use crate::device::Device;
use crate::error::Result;
use crate::params::{Layout, Specs};
use crate::tape::Kept;
use crate::tensor::{DType, Shape};
use crate::unet::UNet;

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

/// Bytes of the update of `parameters` parameters that several GPUs share, each with a shard: the gradient read for the
/// norm and for the update; weights, moving average and both moments read and written.
pub fn shared_update(parameters: usize) -> u64 {
    40 * parameters as u64
}

/// The least time that a training step can take on a card: that of the products' FLOP at the card's peak or, if it is
/// longer, of the least traffic at the bandwidth of its memory (Williams, Waterman, Patterson 2009).
#[derive(Clone, Copy, Debug)]
pub struct Roofline {
    /// Seconds of the FLOP of an image.
    flops: f64,
    /// Seconds of the traffic of an image.
    image: f64,
    /// Seconds of the traffic of the weights in a pass.
    weights: f64,
    /// Seconds of the traffic of the update, (of each GPU, that several share).
    update: (f64, f64),
}

impl Roofline {
    /// For steps of `config` on `card`.
    ///
    /// # Errors
    /// Those of [`UNet::new`].
    pub fn of_training(config: &Config, card: &Card) -> Result<Self> {
        let dtype = config.precision.activations();
        let (device, size) = (Device::meta_gpu_for(dtype), config.model.image_size);
        let (unet, specs) = UNet::new(&config.model)?;
        let shape = Shape::new(1, size.h, size.w, config.model.channels);
        let plan = unet.tape_plan(&device, config.recompute, &specs, shape)?;
        let one = of_training(&Config { batch: 1, accumulate: 1, ..config.clone() }, &specs, &plan, dtype);
        let costs = unet.costs_on(&device, config.recompute, &specs, size.h, size.w);
        let flops = 3.0 * costs.iter().map(|cost| cost.flops as f64).sum::<f64>();
        let peak = card.peak(config.precision);
        let seconds = |bytes: u64| bytes as f64 / card.memory;
        let shared = shared_update(specs.count());
        Ok(Roofline {
            flops: flops / peak,
            image: seconds(one.activations + one.gradients + one.images),
            weights: seconds(one.weights),
            update: (seconds(one.update - shared), seconds(shared)),
        })
    }

    /// Seconds of a step of one of `ranks` GPUs, which computes `images` images in `passes` micro-batches.
    pub fn seconds(&self, images: f64, passes: usize, ranks: usize) -> f64 {
        let (own, shared) = self.update;
        let memory = images * self.image + passes as f64 * self.weights + own + shared / ranks as f64;
        memory.max(images * self.flops)
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
