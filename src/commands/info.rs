//! `ddpm-cuda info`: what a model costs, block by block, and the available devices.

use std::path::PathBuf;

use super::choice;
use crate::checkpoint;
use crate::config::{Config, Preset};
use crate::device::{Device, cuda};
use crate::error::Result;
use crate::kernels;
use crate::memory::memory_needed;
use crate::say;
use crate::text::{GIB, grouped};
use crate::unet::{Cost, UNet};

/// Arguments of `ddpm-cuda info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// mnist, cifar10 or celebahq256 [default: mnist]
    #[arg(long, value_parser = choice::<Preset>(), conflicts_with = "model")]
    pub preset: Option<Preset>,
    /// Run folder (its newest checkpoint), checkpoint, or model folder of diffusers
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER")]
    pub model: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be read; a CUDA driver that fails.
pub fn run(args: &Args) -> Result<()> {
    let described = args.model.as_deref().map(checkpoint::describe).transpose()?;
    let config = match &described {
        Some(model) => model.config.clone(),
        None => Config::preset(args.preset.unwrap_or(Preset::Mnist)),
    };
    let m = &config.model;
    let (unet, specs) = UNet::new(m)?;
    let costs = unet.costs(&specs, m.image_size.h, m.image_size.w);
    say!("{:<32} {:>12} {:>14} {:>16}", "block", "parameters", "MFLOP forward", "KiB kept/image");
    for Cost { place, params, flops, saved } in &costs {
        say!(
            "{place:<32} {:>12} {:>14.2} {:>16.1}",
            grouped(*params as u64),
            *flops as f64 / 1e6,
            *saved as f64 / 1024.0
        );
    }
    let total = |f: fn(&Cost) -> u64| costs.iter().map(f).fold(0, u64::saturating_add);
    let (flops, saved) = (total(|c| c.flops), total(|c| c.saved));
    say!(
        "{:<32} {:>12} {:>14.2} {:>16.1}",
        "in all",
        grouped(specs.count() as u64),
        flops as f64 / 1e6,
        saved as f64 / 1024.0
    );
    say!("");
    say!("{} parameters; images {}x{}", grouped(specs.count() as u64), m.image_size, m.channels);
    if let Some(model) = &described {
        let (d, stepping) = (&config.diffusion, model.stepping);
        let betas = d.noise_schedule()?;
        let (first, last) = (betas.betas()[0], betas.betas()[betas.len() - 1]);
        let shape = if d.trained_betas.is_empty() { d.schedule.name() } else { "one by one" };
        let clip = if stepping.clip { "" } else { ", x_0 not clipped" };
        say!(
            "process: {} timesteps, betas {shape} from {first:.3e} to {last:.3e}, {}; spacing {}{clip}",
            d.timesteps,
            d.variance,
            stepping.spacing
        );
        if m.classes > 0 {
            let names =
                if config.class_names.is_empty() { "without names".into() } else { config.class_names.join(", ") };
            say!("{} classes: {names}", m.classes);
        }
        for note in &model.notes {
            say!("{note}");
        }
    }
    say!(
        "training with batch {}: {:.1} GFLOP a step, about {:.2} GiB of memory",
        config.batch,
        3.0 * flops as f64 * config.batch as f64 / 1e9,
        memory_needed(&config, &unet, &specs, &Device::cpu()) as f64 / GIB
    );
    say!("devices: {}", Device::cpu());
    for gpu in cuda::devices()? {
        let (major, minor) = gpu.capability;
        say!(
            "         cuda:{} {}, compute capability {major}.{minor}, {:.1} GiB",
            gpu.number,
            gpu.name,
            gpu.memory as f64 / GIB
        );
    }
    say!("driver: {}", cuda::driver_version()?.map_or("none".into(), |version| format!("CUDA {version}")));
    match kernels::COMPILER {
        Some(version) => say!("kernels: {}, compiled by CUDA {version}", kernels::ALL.len()),
        None => say!("kernels: none, built without a CUDA compiler"),
    }
    Ok(())
}
