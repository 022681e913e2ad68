//! How much memory a training run needs, how much there is, and what to change where it does not fit.

use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::params::Specs;
use crate::tensor::DType;
use crate::text::GIB;
use crate::unet::UNet;

/// Bytes a training run asks of `device`: weights, gradient, two moments and moving average (and the bf16 copies of weights and average); the
/// activations of a piece of a batch, in their type; the gradients and intermediate results alive beside them, half as much again; and
/// scratch space, which on the CPU is the largest weight in Winograd's domain (4 times as many numbers) forward and backward, blocks of attention
/// scores (two of 8 MiB) and the threads' tiles. A GPU's partial sums stay below that.
pub fn memory_needed(config: &Config, unet: &UNet, specs: &Specs, device: &Device) -> u64 {
    const BLOCKS_AND_TILES: u64 = 24 << 20;
    let size = config.model.image_size;
    let activation = device.activations().size() as u64;
    let saved: u64 = unet.costs(specs, size.h, size.w).iter().map(|cost| cost.saved / 4 * activation).sum();
    let piece = (config.batch / config.accumulate) as u64;
    let largest_weight = specs.iter().map(|(_, spec)| spec.shape.len() as u64).max().unwrap_or(0);
    let scratch = 2 * 4 * 4 * largest_weight + BLOCKS_AND_TILES;
    let activations = piece.saturating_mul(saved / 2 * 3);
    let per_weight = 5 * 4 + if device.activations() == DType::Bf16 { 2 * 2 } else { 0 };
    activations.saturating_add(per_weight * specs.flat_len() as u64 + scratch)
}

/// Bytes that `device` has for this process, those idle in its pool included.
///
/// # Errors
/// A machine or a driver that does not say.
pub fn available_on(device: &Device) -> Result<u64> {
    match device {
        Device::Cpu(_) => available_memory(),
        Device::Cuda(gpu) => gpu.available_memory(),
    }
}

/// Refuses a training run that needs more than `available` bytes on `device`, with what would fit.
///
/// # Errors
/// `Error::Failed` for such a run.
pub fn check_fit(config: &Config, unet: &UNet, specs: &Specs, device: &Device, available: u64) -> Result<()> {
    let needed = memory_needed(config, unet, specs, device);
    if needed <= available {
        return Ok(());
    }
    let fits = |accumulate: &usize| {
        config.batch.is_multiple_of(*accumulate)
            && memory_needed(&Config { accumulate: *accumulate, ..config.clone() }, unet, specs, device) <= available
    };
    let advice = match (config.accumulate + 1..=config.batch).find(fits) {
        None => {
            "one image at a time is too much already, so use smaller widths, fewer classes or smaller images".into()
        }
        Some(accumulate) => {
            let batch = config.batch / accumulate;
            format!("use --batch {batch}, or --set accumulate={accumulate} for the same result in pieces")
        }
    };
    Err(Error::Failed(format!(
        "this run needs {:.2} GiB of memory and {:.2} GiB are available: {advice}",
        needed as f64 / GIB,
        available as f64 / GIB,
    )))
}

/// Bytes of memory that this process may still take, of the machine's or its control group's.
///
/// # Errors
/// A machine that does not say.
pub fn available_memory() -> Result<u64> {
    let memory = sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    let system = sysinfo::System::new_with_specifics(memory);
    if system.total_memory() == 0 {
        return Err(Error::Failed("the machine does not say how much memory it has".into()));
    }
    let limit = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    Ok(system.available_memory().min(limit))
}
