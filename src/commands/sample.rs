//! `ddpm-cuda sample`: draws images with a trained model.

use std::path::PathBuf;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::{On, choice};
use crate::checkpoint;
use crate::diffusion::{Method, Sampler, Spacing, Variance};
use crate::error::{Error, Result};
use crate::memory::{available_memory, available_on};
use crate::names::names;
use crate::output;
use crate::sample::{DEFAULT_STEPS, Drawing, class_called, default_variance, labels, memory_of_forward};
use crate::text::GIB;
use crate::unet::UNet;
use crate::{say, usage};

/// Frames of an animation: about three seconds.
const GIF_FRAMES: usize = 60;

/// Names of the samplers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerName {
    /// Ancestral sampling, algorithm 2 of the paper.
    Ddpm,
    /// DDIM: good images in few steps.
    Ddim,
}

names!(SamplerName { Ddpm = "ddpm", Ddim = "ddim" });

/// Arguments of `ddpm-cuda sample`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder (its newest checkpoint), checkpoint, model folder of diffusers, or .pt file of OpenAI's
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER|FILE.pt")]
    pub model: PathBuf,
    /// A flag of OpenAI's scripts that FILE.pt does not tell, such as num_heads=4; may be given several times
    #[arg(long, value_name = "FLAG=VALUE")]
    pub set: Vec<String>,
    /// Number of images
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub count: usize,
    /// How steps are taken: ddpm, the paper's algorithm 2, or ddim, good images in few steps
    #[arg(long, default_value = "ddpm", value_parser = choice::<SamplerName>())]
    pub sampler: SamplerName,
    /// Steps from noise to image, up to the model's number of timesteps [default: 100]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// DDIM's share of the ancestral noise, 0 to 1 [default: 0]
    #[arg(long, value_name = "ETA")]
    pub eta: Option<f64>,
    /// Variance of ancestral sampling [default: the model's for all timesteps, fixed_small for fewer]
    #[arg(long, value_name = "VARIANCE", value_parser = choice::<Variance>())]
    pub variance: Option<Variance>,
    /// Which timesteps are kept when there are fewer steps [default: the model's; even if it says nothing]
    #[arg(long, value_name = "SPACING", value_parser = choice::<Spacing>())]
    pub spacing: Option<Spacing>,
    /// Seed of the noise; image i of a seed is the same whatever --count
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Class of every image, by name or number; a conditional model without it draws the classes in turn
    #[arg(long, value_name = "NAME|K")]
    pub class: Option<String>,
    /// FILE.png (one grid), FILE.npz (arr_0, u8 NHWC), FILE.gif (the reverse process) or DIR/ (a PNG each)
    #[arg(long, value_name = "FILE.png|FILE.npz|FILE.gif|DIR/")]
    pub out: PathBuf,
    /// `--device` and `--precision`
    #[command(flatten)]
    pub on: On,
}

/// Runs the command.
///
/// # Errors
/// `Error::Usage` for arguments that do not fit the model, `Error::File` for files that cannot be read or written,
/// `Error::Failed` for more images than fit into memory; those of [`On::open`].
pub fn run(args: &Args) -> Result<()> {
    let device = args.on.open()?;
    if args.count == 0 {
        usage!("--count 0: draw at least 1 image");
    }
    let target = output::Target::parse(&args.out)?;
    let model = checkpoint::load_with(&device, &args.model, &args.set)?;
    for note in &model.notes {
        say!("{note}");
    }
    let (c, stepping) = (&model.config, model.stepping);
    if stepping.threshold.is_some() || (stepping.clip && stepping.clip_range != 1.0) {
        usage!(
            "{}: its scheduler thresholds x_0 or clips it to other values than -1 and 1, which sample cannot do",
            args.model.display()
        );
    }
    let (unet, _) = UNet::new(&c.model)?;
    let schedule = c.diffusion.noise_schedule()?;
    let steps = args.steps.unwrap_or(DEFAULT_STEPS.min(schedule.len()));
    let method = match (args.sampler, args.eta, args.variance) {
        (SamplerName::Ddpm, Some(eta), _) => usage!("--eta {eta}: only DDIM has it, so add --sampler ddim"),
        (SamplerName::Ddim, _, Some(v)) => usage!("--variance {v}: DDIM's noise is --eta, so leave --variance out"),
        (SamplerName::Ddpm, None, variance) => {
            Method::Ancestral(variance.unwrap_or(default_variance(c.diffusion.variance, steps, schedule.len())))
        }
        (SamplerName::Ddim, eta, None) => Method::Ddim { eta: eta.unwrap_or(0.0) },
    };
    let spacing = args.spacing.unwrap_or(stepping.spacing);
    let kept = spacing.timesteps_from(stepping.steps_offset, schedule.len(), steps)?;
    let sampler = Sampler::over(&schedule, method, &kept)?;
    let sampler = if stepping.clip { sampler } else { sampler.unclipped() };
    let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed: args.seed };
    let frame_every = steps.div_ceil(GIF_FRAMES);
    let held = if target == output::Target::Gif { steps.div_ceil(frame_every) } else { 1 };
    refuse_too_many(args.count, drawing.shape(1).len().saturating_mul(args.count).saturating_mul(held))?;
    let shape = drawing.shape(args.count);
    target.check(&args.out, shape)?;
    let class = args.class.as_deref().map(|class| class_called(class, &c.class_names, c.model.classes)).transpose()?;
    let labels = labels(c.model.classes, class, args.count)?;
    let together = drawing.shape(args.count.min(drawing.batch()));
    let needed = memory_of_forward(&device, &unet, &model.params, together)?;
    let available = available_on(&device).unwrap_or(u64::MAX);
    if needed > available {
        let advice = if together.n > 1 { "draw fewer with --count" } else { "this model is too large to draw here" };
        return Err(Error::Failed(format!(
            "drawing {} images of {}x{} together takes {:.2} GiB of memory and {:.2} GiB are available: {advice}",
            together.n,
            c.model.image_size,
            c.model.channels,
            needed as f64 / GIB,
            available as f64 / GIB
        )));
    }

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

/// Refuses more images than fit into memory: their `bytes`, and as much again while they are written.
fn refuse_too_many(count: usize, bytes: usize) -> Result<()> {
    // If the machine does not say how much there is, nothing is refused for it.
    let (needed, available) = ((bytes as u64).saturating_mul(2), available_memory().unwrap_or(u64::MAX));
    if count > u32::MAX as usize || needed > available {
        return Err(Error::Failed(format!(
            "--count {count}: these images need {:.2} GiB of memory and {:.2} GiB are available; draw fewer at a time, each time with another --seed",
            needed as f64 / GIB,
            available as f64 / GIB
        )));
    }
    Ok(())
}
