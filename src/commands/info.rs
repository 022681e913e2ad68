//! `ddpm-cuda info`: what a model costs, block by block, and the available devices.

use std::path::PathBuf;

use super::{PRECISION, choice};
use crate::checkpoint;
use crate::config::{Config, Preset};
use crate::device::{Device, Precision, cuda};
use crate::error::{Result, printable};
use crate::kernels;
use crate::memory::{available_memory, memory_needed};
use crate::ops::tree_sum;
use crate::params::Specs;
use crate::profile::bound::Roofline;
use crate::profile::exchange::{self, Bytes, Row, Steps};
use crate::say;
use crate::tape::{Kept, Recompute};
use crate::tensor::{DType, Shape};
use crate::text::{GIB, grouped};
use crate::unet::{Cost, UNet};
use crate::usage;

/// Arguments of `ddpm-cuda info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// mnist, cifar10 or celebahq256 [default: mnist]
    #[arg(long, value_parser = choice::<Preset>(), conflicts_with = "model")]
    pub preset: Option<Preset>,
    /// Run folder (its newest checkpoint), checkpoint, model folder of diffusers, or .pt file of OpenAI's
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER|FILE.pt")]
    pub model: Option<PathBuf>,
    /// A flag of OpenAI's scripts that FILE.pt does not tell, such as num_heads=4; may be given several times
    #[arg(long, value_name = "FLAG=VALUE", requires = "model")]
    pub set: Vec<String>,
    /// Images of a training step [default: the preset's or the model's]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// What is computed in.
    #[arg(long, help = PRECISION, default_value = "f32", value_parser = choice::<Precision>())]
    pub precision: Precision,
    /// What a training step computes again in its backward pass instead of keeping it: none, cheap (norms, activations
    /// and dropout of residual blocks) or blocks [default: none, or the model's]
    #[arg(long, value_parser = choice::<Recompute>())]
    pub recompute: Option<Recompute>,
    /// Also say what a training step on N GPUs exchanges, how long that takes over several links, and from how many
    /// GPUs on it pays
    #[arg(long, value_name = "N", conflicts_with = "tape")]
    pub devices: Option<usize>,
    /// List every tensor that a training step keeps from its forward pass for its backward pass
    #[arg(long)]
    pub tape: bool,
}

/// Images of a step, at most; a layer has as many streams of dropout.
const MOST_IMAGES: usize = 1 << 20;

/// Runs the command.
///
/// # Errors
/// A model that cannot be read, and a number of GPUs that cannot share a step.
pub fn run(args: &Args) -> Result<()> {
    let described = args.model.as_deref().map(|path| checkpoint::describe_with(path, &args.set)).transpose()?;
    let mut config = match &described {
        Some(model) => model.config.clone(),
        None => Config::preset(args.preset.unwrap_or(Preset::Mnist)),
    };
    if let Some(batch) = args.batch {
        if batch == 0 || batch > MOST_IMAGES || !batch.is_multiple_of(config.accumulate) {
            let by =
                if config.accumulate > 1 { format!(" that divides by {}", config.accumulate) } else { String::new() };
            usage!("--batch {batch}: a step takes a number of images from 1 to {MOST_IMAGES}{by}");
        }
        config.batch = batch;
    }
    config.recompute = args.recompute.unwrap_or(config.recompute);
    config.precision = args.precision;
    let shared = args.devices.map(|devices| shared(&config, devices)).transpose()?;
    let m = &config.model;
    let (unet, specs) = UNet::new(m)?;
    // The others are a GPU's.
    let device = match args.precision {
        Precision::F32 => Device::cpu(),
        other => Device::meta_gpu_for(other),
    };
    if let Some(note) = args.precision.note() {
        say!("{note}");
    }
    if args.tape {
        return tape(&config, &unet, &specs, &device);
    }
    let costs_with = |recompute| unet.costs_on(&device, recompute, &specs, m.image_size.h, m.image_size.w);
    let costs = costs_with(config.recompute);
    say!("{:<32} {:>12} {:>14} {:>16}", "block", "parameters", "MFLOP forward", "KiB kept/image");
    for Cost { place, params, flops, saved } in &costs {
        say!(
            "{place:<32} {:>12} {:>14.2} {:>16.1}",
            grouped(*params as u64),
            *flops as f64 / 1e6,
            *saved as f64 / 1024.0
        );
    }
    let total = |costs: &[Cost], f: fn(&Cost) -> u64| costs.iter().map(f).fold(0, u64::saturating_add);
    let (flops, saved) = (total(&costs, |c| c.flops), total(&costs, |c| c.saved));
    let kept = |saved: u64| saved as f64 * (config.batch / config.accumulate) as f64 / GIB;
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
        let clip = match (stepping.threshold, stepping.clip) {
            (Some(t), _) => format!(", x_0 thresholded at its {}-quantile, at most {}", t.ratio, t.largest),
            (None, false) => ", x_0 not clipped".into(),
            (None, true) if stepping.clip_range != 1.0 => format!(", x_0 clipped to {}", stepping.clip_range),
            (None, true) => String::new(),
        };
        say!(
            "process: {} timesteps, betas {shape} from {first:.3e} to {last:.3e}, {}; spacing {}{clip}",
            d.timesteps,
            d.variance,
            stepping.spacing
        );
        if m.classes > 0 {
            let names = if config.class_names.is_empty() {
                "without names".into()
            } else {
                printable(&config.class_names.join(", "))
            };
            say!("{} classes: {names}", m.classes);
        }
        for note in &model.notes {
            say!("{note}");
        }
    }
    say!(
        "training with batch {}: {:.1} GFLOP a step, about {:.2} GiB of memory, of which {:.2} GiB are kept from the \
         forward pass",
        config.batch,
        3.0 * flops as f64 * config.batch as f64 / 1e9,
        memory_needed(&config, &unet, &specs, &device, 1) as f64 / GIB,
        kept(saved),
    );
    let others = Recompute::ALL.into_iter().filter(|&recompute| recompute != config.recompute);
    let others = others.map(|recompute| {
        format!("{:.2} GiB with recompute = {recompute}", kept(total(&costs_with(recompute), |c| c.saved)))
    });
    say!("with recompute = {}; it would be {}", config.recompute, others.collect::<Vec<_>>().join(", "));
    if let (Some(devices), Some(shared)) = (args.devices, &shared) {
        exchange(&config, shared, devices, &unet, &specs)?;
    }
    match available_memory() {
        Some(bytes) => say!("devices: {}, {:.1} GiB of memory available", Device::cpu(), bytes as f64 / GIB),
        None => say!("devices: {}; the system does not say how much memory is available", Device::cpu()),
    }
    // A driver that fails is worth a sentence; everything else here is true without it.
    match cuda::devices() {
        Ok(gpus) if gpus.is_empty() && matches!(cuda::driver_version(), Ok(Some(_))) => {
            say!("         no GPU: the NVIDIA driver knows of none");
        }
        Ok(gpus) => {
            for gpu in gpus {
                let (major, minor) = gpu.capability;
                let old = if gpu.can_run_kernels() { "" } else { ", too old for the kernels" };
                say!(
                    "         cuda:{} {}, compute capability {major}.{minor}{old}, {:.1} GiB",
                    gpu.number,
                    gpu.name,
                    gpu.memory as f64 / GIB
                );
            }
        }
        Err(why) => say!("         no GPU can be used: {why}"),
    }
    match cuda::driver_version() {
        Ok(Some(version)) => say!("driver: CUDA {version}"),
        Ok(None) if cuda::driver_is_likely() => say!("driver: there is one, which is not opened"),
        Ok(None) => say!("driver: none"),
        Err(why) => say!("driver: {why}"),
    }
    match (kernels::COMPILER, cuda::missing_in_this_build()) {
        (Some(version), _) => {
            let codes: Vec<String> =
                kernels::MACHINE_CODE.iter().map(|(major, minor)| format!("{major}.{minor}")).collect();
            let all = kernels::ALL.len();
            say!(
                "kernels: {all}, compiled by CUDA {version} for compute capability {}, and for others by the driver",
                codes.join(", ")
            );
        }
        (None, Some(missing)) if cuda::driver_is_likely() => say!("kernels: none, {missing} to use the GPU"),
        (None, Some(missing)) => say!("kernels: none, {missing}"),
        (None, None) => say!("kernels: none"),
    }
    Ok(())
}

/// The settings with which `devices` GPUs share a step. One of a single micro-batch is then divided among them.
fn shared(config: &Config, devices: usize) -> Result<Config> {
    exchange::check(devices)?;
    let accumulate = if config.accumulate == 1 { devices } else { config.accumulate };
    if !tree_sum::fits(accumulate, devices) {
        let fits = |&n: &usize| tree_sum::fits(accumulate, n);
        let fitting: Vec<String> = (1..=accumulate).filter(fits).map(|n| n.to_string()).collect();
        usage!(
            "--devices {devices}: a step of accumulate = {accumulate} micro-batches is shared by {} GPUs",
            fitting.join(" or ")
        );
    }
    if !config.batch.is_multiple_of(accumulate) {
        usage!(
            "--devices {devices}: {} images are not {accumulate} equal micro-batches, {} would be: --batch",
            config.batch,
            config.batch.next_multiple_of(accumulate)
        );
    }
    Ok(Config { accumulate, ..config.clone() })
}

/// What a step exchanges between `devices` GPUs, which share it as `shared` says or each take one as `config` says.
fn exchange(config: &Config, shared: &Config, devices: usize, unet: &UNet, specs: &Specs) -> Result<()> {
    let (card, elements) = (exchange::h100(), specs.flat_len());
    let (batch, of_each) = (config.batch, config.batch / devices);
    let roofline = Roofline::of_training(config, card)?;
    let bytes = Bytes::of(elements, devices);
    let gpu = Device::meta_gpu_for(config.precision);
    let alone = roofline.seconds(batch as f64, config.accumulate, 1);
    let part = |ranks: usize| roofline.seconds(batch as f64 / ranks as f64, config.accumulate.div_ceil(ranks), ranks);
    let whole = |ranks: usize| roofline.seconds(batch as f64, config.accumulate, ranks);
    let divides = |ranks: usize| {
        batch.is_multiple_of(ranks) && (config.accumulate == 1 || tree_sum::fits(config.accumulate, ranks))
    };
    let one_batch = Steps { elements, card, counts: &divides, of_rank: &part, alone: &|_| alone };
    let a_batch_each =
        Steps { elements, card, counts: &|_| true, of_rank: &whole, alone: &|ranks| ranks as f64 * alone };
    say!("");
    say!(
        "on {devices} GPUs: accumulate = {}, {of_each} images on each, which needs about {:.2} GiB of memory, and sends \
         {:.1} MB a step to the others: of {:.1} MB of gradients and as many of weights all but its own shard",
        shared.accumulate,
        memory_needed(shared, unet, specs, &gpu, devices) as f64 / GIB,
        bytes.sent(devices) as f64 / 1e6,
        bytes.gradient as f64 / 1e6
    );
    say!(
        "an {} takes at least {:.2} ms for {batch} images in {}, and {:.2} ms for its {of_each}, by the roofline (FLOP of \
         the products, least traffic); a real step takes longer, so that the exchange has less of it and pays sooner \
         than stands here",
        card.name,
        1e3 * alone,
        config.precision,
        1e3 * part(devices)
    );
    say!("");
    let [few, many] = [of_each, batch].map(|images| format!("{} images, {images} on each", devices * images));
    say!("{:<36} {:>6} {:>11}   {few:>27}   {many:>27}", "", "", "");
    let columns = format!("{:>6} {:>10} {:>9}", "share", "efficiency", "pays from");
    say!("{:<36} {:>6} {:>11}   {columns}   {columns}", "link", "GB/s", "exchange ms");
    let columns = |row: &Row| {
        let pays_from = row.pays_from.map_or("never".into(), |devices| devices.to_string());
        format!("{:>5.0}% {:>9.0}% {pays_from:>9}", 100.0 * row.share, 100.0 * row.efficiency)
    };
    for (few, many) in one_batch.rows(devices).iter().zip(&a_batch_each.rows(devices)) {
        let [of_few, of_many] = [few, many].map(columns);
        say!("{:<36} {:>6} {:>11.2}   {of_few}   {of_many}", few.name, few.bandwidth / 1e9, few.exchange_ms);
    }
    say!("");
    Ok(())
}

/// Lists the tape plan of a step, or of one of its micro-batches.
fn tape(config: &Config, unet: &UNet, specs: &Specs, device: &Device) -> Result<()> {
    let (m, images) = (&config.model, config.batch / config.accumulate);
    let plan = unet.tape_plan(
        device,
        config.recompute,
        specs,
        Shape::new(images, m.image_size.h, m.image_size.w, m.channels),
    )?;
    say!("{:<32} {:<14} {:>18} {:>5} {:>16}", "block", "operation", "shape", "type", "bytes");
    for Kept { place, op, shape, dtype, bytes, .. } in &plan {
        let dtype = match dtype {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
        };
        say!("{place:<32} {op:<14} {:>18} {dtype:>5} {:>16}", shape.to_string(), grouped(*bytes as u64));
    }
    let bytes: u64 = plan.iter().map(|kept| kept.bytes as u64).sum();
    say!("{:<32} {:<14} {:>18} {:>5} {:>16}", "in all", "", "", "", grouped(bytes));
    let step = if config.accumulate > 1 {
        format!("each of the {} micro-batches of a step, of {images} images", config.accumulate)
    } else {
        format!("a step of {images} images")
    };
    say!("");
    say!(
        "{} tensors, {:.2} GiB, are kept from the forward pass of {step}; each stands beside the first operation that \
         holds it",
        plan.len(),
        bytes as f64 / GIB
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run keeps its micro-batches; one without gets as many as there are GPUs.
    #[test]
    fn micro_batches_are_shared_or_refused() {
        let of = |batch: usize, accumulate: usize, devices: usize| {
            let config = Config { batch, accumulate, ..Config::preset(Preset::Mnist) };
            shared(&config, devices).map(|shared| shared.accumulate).map_err(|why| why.to_string())
        };
        assert_eq!((of(128, 1, 8), of(128, 8, 2), of(12, 6, 3)), (Ok(8), Ok(8), Ok(6)));
        let refused = "--devices 4: a step of accumulate = 6 micro-batches is shared by 1 or 3 or 6 GPUs";
        assert_eq!(of(12, 6, 4), Err(refused.into()));
        let refused = "--devices 5: 128 images are not 5 equal micro-batches, 130 would be: --batch";
        assert_eq!(of(128, 1, 5), Err(refused.into()));
        assert!(of(128, 1, 1).is_err() && of(4096, 1, 2048).is_err());
    }
}
