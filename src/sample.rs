//! `ddpm-cuda sample`: draws images with a trained model.

use std::path::PathBuf;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use crate::checkpoint;
use crate::device::{self, Device};
use crate::diffusion::sampler::{Progress, Samples, sample};
use crate::diffusion::{Method, Sampler, Schedule, Spacing, Variance};
use crate::error::{Error, Result};
use crate::output;
use crate::params::Params;
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::unet::UNet;
use crate::{say, train, usage};

/// Sampling steps unless `--steps` says otherwise. Ancestral sampling is the default because it mends its own errors as it goes:
/// after a short training it draws clean images where DDIM leaves specks; more than 100 steps change little that one sees.
pub const DEFAULT_STEPS: usize = 100;

/// Frames of an animation: about three seconds.
const GIF_FRAMES: usize = 60;

/// How x_{t-1} is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SamplerName {
    /// Ancestral sampling, algorithm 2 of the paper
    Ddpm,
    /// DDIM: good images in few steps
    Ddim,
}

/// Arguments of `ddpm-cuda sample`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder (its newest checkpoint), checkpoint, or model folder of diffusers
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER")]
    pub model: PathBuf,
    /// Number of images
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub count: usize,
    /// How steps are taken
    #[arg(long, value_enum, default_value = "ddpm")]
    pub sampler: SamplerName,
    /// Steps from noise to image, up to the model's number of timesteps [default: 100]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// DDIM's share of the ancestral noise, 0 to 1 [default: 0]
    #[arg(long, value_name = "ETA")]
    pub eta: Option<f64>,
    /// Variance of ancestral sampling, fixed_small or fixed_large [default: the model's]
    #[arg(long, value_name = "VARIANCE")]
    pub variance: Option<Variance>,
    /// Which timesteps are kept when there are fewer steps: even, stride, leading or trailing
    #[arg(long, default_value = "even", value_name = "SPACING")]
    pub spacing: Spacing,
    /// Seed of the noise; image i of a seed is the same whatever --count
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Class of every image; a conditional model without it draws the classes in turn
    #[arg(long, value_name = "K")]
    pub class: Option<u32>,
    /// FILE.png (one grid), FILE.npz (arr_0, u8 NHWC), FILE.gif (the reverse process) or DIR/ (a PNG each)
    #[arg(long, value_name = "FILE.png|FILE.npz|FILE.gif|DIR/")]
    pub out: PathBuf,
    /// `--device` and `--precision`
    #[command(flatten)]
    pub on: device::Args,
}

/// Runs the command.
///
/// # Errors
/// Arguments that do not fit the model, files that cannot be read or written.
pub fn run(args: &Args) -> Result<()> {
    let device = args.on.open()?;
    if args.count == 0 {
        usage!("--count 0: draw at least 1 image");
    }
    let target = output::Target::parse(&args.out)?;
    let model = checkpoint::load(&device, &args.model)?;
    let c = &model.config;
    let (unet, _) = UNet::new(&c.model)?;
    let schedule = Schedule::new(c.diffusion.schedule, c.diffusion.timesteps)?;
    let method = match (args.sampler, args.eta, args.variance) {
        (SamplerName::Ddpm, Some(eta), _) => usage!("--eta {eta}: only DDIM has it, so add --sampler ddim"),
        (SamplerName::Ddim, _, Some(v)) => usage!("--variance {v}: DDIM's noise is --eta, so leave --variance out"),
        (SamplerName::Ddpm, None, variance) => Method::Ancestral(variance.unwrap_or(c.diffusion.variance)),
        (SamplerName::Ddim, eta, None) => Method::Ddim { eta: eta.unwrap_or(0.0) },
    };
    let steps = args.steps.unwrap_or(DEFAULT_STEPS.min(schedule.len()));
    let sampler = Sampler::new(&schedule, method, args.spacing, steps)?;
    let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed: args.seed };
    let frame_every = steps.div_ceil(GIF_FRAMES);
    let shape = drawing.shape(args.count);
    target.check(&args.out, shape)?;
    let held = if target == output::Target::Gif { steps.div_ceil(frame_every) } else { 1 };
    refuse_too_many(args.count, shape.len().saturating_mul(held))?;
    let labels = labels(c.model.classes, args.class, args.count)?;

    let started = Instant::now();
    let style =
        ProgressStyle::with_template("{wide_bar} {pos}/{len} network passes, {eta} left").expect("a valid template");
    let bar = ProgressBar::new((args.count.div_ceil(drawing.batch()) * steps) as u64).with_style(style);
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let images = drawing.images(args.count, labels.as_deref(), |p| {
        bar.inc(1);
        if target == output::Target::Gif && (p.done % frame_every == 0 || p.done == p.total) {
            let index = (p.done - 1) / frame_every;
            frames.resize_with(frames.len().max(index + 1), Vec::new);
            frames[index].extend(output::to_bytes(&p.x.to_vec()?));
        }
        Ok(())
    })?;
    bar.finish_and_clear();

    match target {
        output::Target::Gif => output::write_gif(&args.out, shape, &frames)?,
        output::Target::Png => output::write_grid(&args.out, shape, &images)?,
        output::Target::Npz => output::write_npz(&args.out, shape, &images, labels.as_deref())?,
        output::Target::Folder => output::write_folder(&args.out, shape, &images)?,
    }
    say!("{} images in {:.1} s: {}", args.count, started.elapsed().as_secs_f64(), args.out.display());
    Ok(())
}

/// Refuses more images than memory holds: their `bytes`, and as much again while they are written.
fn refuse_too_many(count: usize, bytes: usize) -> Result<()> {
    const GIB: f64 = (1u64 << 30) as f64;
    let (needed, available) = ((bytes as u64).saturating_mul(2), train::available_memory()?);
    if count > u32::MAX as usize || needed > available {
        return Err(Error::Failed(format!(
            "--count {count}: these images need {:.2} GiB of memory and {:.2} GiB are available; draw fewer at a time, each time with another --seed",
            needed as f64 / GIB,
            available as f64 / GIB
        )));
    }
    Ok(())
}

/// One class for all, or all classes in turn; nothing for an unconditional model.
fn labels(classes: usize, class: Option<u32>, count: usize) -> Result<Option<Vec<u32>>> {
    match class {
        Some(k) if classes == 0 => usage!("--class {k}: this model is unconditional, leave --class out"),
        Some(k) if k as usize >= classes => usage!("--class {k}: this model has the classes 0 to {}", classes - 1),
        Some(k) => Ok(Some(vec![k; count])),
        None if classes == 0 => Ok(None),
        None => Ok(Some((0..count).map(|i| (i % classes) as u32).collect())),
    }
}

/// What images are drawn with.
pub struct Drawing<'a> {
    /// Where.
    pub device: &'a Device,
    /// The network.
    pub unet: &'a UNet,
    /// Its weights.
    pub params: &'a Params,
    /// The steps.
    pub sampler: &'a Sampler,
    /// Seed of all noise.
    pub seed: u64,
}

impl Drawing<'_> {
    /// Shape of `count` images.
    pub fn shape(&self, count: usize) -> Shape {
        let m = self.unet.model();
        Shape::new(count, m.image_size.h, m.image_size.w, m.channels)
    }

    /// Images drawn together: as many as keep the finest level's activations near the caches, 8 MiB. No image depends on it.
    pub fn batch(&self) -> usize {
        let m = self.unet.model();
        (2 * 1024 * 1024 / (m.image_size.h * m.image_size.w * m.widths[0])).clamp(1, 64)
    }

    /// The bytes of images `0..count`, (count, h, w, c), with `labels` if the model is conditional. `each` is called after
    /// every step of every batch, and ends the drawing with its error.
    ///
    /// # Errors
    /// Those of `each`.
    pub fn images(
        &self,
        count: usize,
        labels: Option<&[u32]>,
        mut each: impl FnMut(&Progress<'_>) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let count_u32 =
            u32::try_from(count).map_err(|_| Error::Usage(format!("--count {count}: at most {} images", u32::MAX)))?;
        let mut images = Vec::with_capacity(self.shape(count).len());
        for first in (0..count_u32).step_by(self.batch()) {
            let range = first as usize..count.min(first as usize + self.batch());
            let per_image = Shape::new(range.len(), 1, 1, 1);
            let numbers = labels.map(|l| l[range.clone()].iter().map(|&l| l as f32).collect::<Vec<_>>());
            let labels = numbers.map(|l| Tensor::from_slice(self.device, per_image, &l)).transpose()?;
            let network = |x: &Tensor, t: u32| {
                let mut tape = Tape::inference(self.device, self.params);
                let t = Tensor::full(self.device, per_image, t as f32)?;
                let eps = self.unet.forward(&mut tape, &Var::constant(x.clone()), &t, labels.as_ref(), None)?; // (n, h, w, c)
                Ok(eps.into_value())
            };
            let samples = Samples { seed: self.seed, first };
            let x_0 = sample(self.device, self.sampler, self.shape(range.len()), samples, network, |p| each(&p))?; // (n, h, w, c)
            let x_0 = x_0.to_vec()?;
            if let Some(bad) = x_0.iter().find(|v| !v.is_finite()) {
                return Err(Error::Failed(format!(
                    "a pixel came out as {bad}: the network's weights are damaged, or were trained with too large a learning_rate"
                )));
            }
            images.extend(output::to_bytes(&x_0));
        }
        Ok(images)
    }
}
