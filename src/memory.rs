//! How much memory a training run needs, how much there is, and what to change if it does not fit.

use std::collections::BTreeSet;

use crate::conditioning::Conditioning;
use crate::config::Config;
use crate::device::{Device, cpu};
use crate::diffusion::Kind;
use crate::error::{Error, Result};
use crate::kernels::loss::Row;
use crate::ops::{grad_norm, tree_sum};
use crate::params::{Layout, ParamGrads, Params, Specs};
use crate::tape::{Recompute, Tape, Var};
use crate::tensor::{DType, Shape, Tensor};
use crate::text::GIB;
use crate::unet::{DropoutSeed, UNet};

/// Bytes that a training run takes of `device`, or each of its `ranks` of a device of its own.
///
/// What the run keeps, and what a step over one micro-batch has alive at its fullest, are asked of a step on shapes
/// alone; the factors of every timestep and the bytes of a step's images are added. Scratch space, which the pools keep
/// by its size, is estimated:
///
/// - beside each convolution's weight, for every size of weight there is, its transform (4 times as many numbers) and
///   as much for its gradient; a GPU's split-K segments are of this order, too;
/// - blocks of attention scores (two of 8 MiB) and the threads' tiles: 24 MiB;
/// - on the CPU, what Winograd's algorithm and attention hold of a micro-batch: measured for `cifar10` with 1, 2 and 4
///   images a step at 0.8 of its activations, for `mnist` with 8 and 32 at 0.3. 0.8 is taken.
pub fn memory_needed(config: &Config, unet: &UNet, specs: &Specs, device: &Device, ranks: usize) -> u64 {
    const BLOCKS_AND_TILES: u64 = 24 << 20;
    // A micro-batch too large for any memory is counted as a multiple of a smaller one, so that sizes do not overflow.
    let image = unet.model().image_size.pixels() * unet.model().widths.iter().max().copied().unwrap_or(1);
    let micro_batch = config.batch / config.accumulate;
    let counted = micro_batch.min(((1 << 40) / image).clamp(1, 1 << 20));
    let held = step_on_shapes(config, counted, unet, specs, &device.meta(), ranks).expect("shapes need no memory");
    let activations = held.activations.saturating_mul(micro_batch.div_ceil(counted) as u64);

    let convolutions = specs.iter().filter(|(_, spec)| spec.layout == Layout::Conv);
    let weights: BTreeSet<u64> = convolutions.map(|(_, spec)| spec.shape.len() as u64).collect();
    let scratch = 2 * 4 * 4 * weights.iter().sum::<u64>() + BLOCKS_AND_TILES;
    let scratch_of_images = if device.is_gpu() { 0 } else { activations / 5 * 4 };
    let factors = (config.diffusion.timesteps * (size_of::<Row>() + size_of::<[f32; 2]>())) as u64;
    // The bytes of a step's images, on a GPU that does not hold the data set.
    let size = unet.model().image_size;
    let bytes = (size.pixels() * unet.model().channels) as u64;
    let images = if device.is_gpu() { bytes.saturating_mul((config.batch / ranks) as u64) } else { 0 };
    let state = held.state.saturating_add(factors).saturating_add(images);
    state.saturating_add(scratch).saturating_add(activations).saturating_add(scratch_of_images)
}

/// Bytes that a pool holds.
struct Held {
    /// Weights, moving average, moments, gradients and what ranks exchange: as long as the run.
    state: u64,
    /// For a step.
    activations: u64,
}

/// What the pool of `meta` holds after a training step of `config` over a micro-batch of `n` images.
fn step_on_shapes(config: &Config, n: usize, unet: &UNet, specs: &Specs, meta: &Device, ranks: usize) -> Result<Held> {
    let (m, mut specs) = (&config.model, specs.clone());
    if ranks > 1 {
        specs.pad(ranks * grad_norm::CHUNK);
    }
    let params = Params::zeros(meta, specs.clone())?;
    let shard = || Tensor::zeros(meta, Shape::vector(specs.flat_len() / ranks));
    let _ema_m_v = [shard()?, shard()?, shard()?];
    let nodes = tree_sum::most_waiting((config.accumulate / ranks).max(1));
    let mut grads: Vec<ParamGrads> = (0..nodes).map(|_| ParamGrads::new(meta, &specs)).collect::<Result<_>>()?;
    // Of four ranks or more as of two on each of several machines, which takes most.
    let flat = |of: usize| Tensor::zeros(meta, Shape::vector(specs.flat_len() / of));
    let _of_ranks = match ranks {
        1 => Vec::new(),
        2 | 3 => vec![flat(1)?, flat(ranks)?],
        _ => vec![flat(1)?, flat(2)?, flat(2)?, flat(ranks)?],
    };
    let state = meta.pool_stats().held;

    let shape = Shape::new(n, m.image_size.h, m.image_size.w, m.channels);
    let x_t = Tensor::uninit(meta, meta.activations(), shape)?;
    let per_image = || Tensor::uninit(meta, DType::F32, Shape::new(n, 1, 1, 1));
    let (t, labels) = (per_image()?, per_image()?);
    let conditioning = if m.is_conditional() { Conditioning::on_labels(labels) } else { Conditioning::NONE };
    let masks = Some(DropoutSeed { seed: config.seed, step: 0, first: 0 });
    let mut tape = Tape::recording(meta, &params).recomputing(config.recompute);
    // A learned schedule takes the derivative by x_t too.
    let is_learned = config.diffusion.schedule == Kind::Learned;
    let x_t = if is_learned { tape.leaf(x_t) } else { Var::constant(x_t) };
    let eps = unet.forward(&mut tape, &x_t, &t, &conditioning, masks)?; // (n, h, w, c)
    let dy = Tensor::uninit(meta, meta.activations(), eps.shape())?; // (n, h, w, c)
    tape.backward(&eps, dy, &mut grads[0])?;
    Ok(Held { state, activations: meta.pool_stats().held - state })
}

/// Bytes that this process can use on `device`, on a GPU with the idle buffers of its pool; `None` if the machine or
/// the driver does not say.
pub fn available_on(device: &Device) -> Option<u64> {
    match device {
        Device::Cpu(_) | Device::Meta(_) => available_memory(),
        Device::Cuda(gpu) => gpu.available_memory().ok(),
    }
}

/// Refuses a training run that needs more than `available` bytes on `device`, or on each of those of its `ranks`, and
/// says what would fit.
///
/// # Errors
/// `Error::Failed` for such a run.
pub fn check_fit(
    config: &Config,
    unet: &UNet,
    specs: &Specs,
    device: &Device,
    ranks: usize,
    available: u64,
) -> Result<()> {
    let needed = |config: &Config| memory_needed(config, unet, specs, device, ranks);
    if needed(config) <= available {
        return Ok(());
    }
    let fits = |accumulate: &usize| {
        config.batch.is_multiple_of(*accumulate)
            && tree_sum::fits(*accumulate, ranks)
            && needed(&Config { accumulate: *accumulate, ..config.clone() }) <= available
    };
    let again = Recompute::ALL.into_iter().find(|&recompute| {
        recompute != Recompute::None && needed(&Config { recompute, ..config.clone() }) <= available
    });
    let again = again.map_or(String::new(), |recompute| {
        format!(", or --set recompute={recompute}, which keeps less and computes it again")
    });
    let advice = match (config.accumulate + 1..=config.batch).find(fits) {
        None => {
            "one image at a time is too much already, so use smaller widths, fewer classes or smaller images".into()
        }
        Some(accumulate) => {
            let batch = config.batch / accumulate;
            format!("use --batch {batch}, or --set accumulate={accumulate} for the same batch in micro-batches{again}")
        }
    };
    Err(Error::Failed(format!(
        "this run needs {:.2} GiB of memory and {:.2} GiB are available: {advice}",
        needed(config) as f64 / GIB,
        available as f64 / GIB,
    )))
}

/// Bytes of host memory that this process can still use, within the machine, its control groups and its resource
/// limits; `None` if the machine does not say.
pub fn available_memory() -> Option<u64> {
    cpu::available_memory()
}
