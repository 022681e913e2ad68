//! `ddpm-cuda likelihood`: the exact likelihood of images by the probability-flow ODE.

use std::path::PathBuf;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::on_data::OnData;
use super::opened::Opened;
use super::{Of, On, check_writable};
use crate::device::Precision;
use crate::diffusion::Prediction;
use crate::error::Result;
use crate::likelihood::{From, Model, Options, bits_per_dim};
use crate::output;
use crate::text;
use crate::{say, usage};

/// Images that go through the network at once, times probes. No image depends on it.
const TOGETHER: usize = 32;

/// Arguments of `ddpm-cuda likelihood`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `--model` and `--set`
    #[command(flatten)]
    pub of: Of,
    /// `--data`, `--split` and `--count`
    #[command(flatten)]
    pub on_data: OnData,
    /// Largest error of a step of the solver, in x_t and in nats per dimension
    #[arg(long, default_value_t = 1e-3, value_name = "TOLERANCE")]
    pub tolerance: f64,
    /// Random probes of the divergence for each image
    #[arg(long, default_value_t = 1, value_name = "K")]
    pub probes: usize,
    /// Begin at the noise of the first timestep instead of at none, as score_sde does
    #[arg(long)]
    pub cut: bool,
    /// Seed of the dequantisation and the probes
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Also write the figures as JSON
    #[arg(long, value_name = "F.json")]
    pub json: Option<PathBuf>,
    /// `--device`, `--precision` and `--eager`
    #[command(flatten)]
    pub on: On,
}

/// Runs the command.
///
/// # Errors
/// `Error::Usage` for arguments that do not fit, `Error::File` for files that cannot be read or written,
/// `Error::Failed` for a flow that cannot be followed; those of [`On::open`].
pub fn run(args: &Args) -> Result<()> {
    if !(1e-12..1.0).contains(&args.tolerance) {
        usage!("--tolerance {}: must be from 1e-12 to below 1, as in 1e-3", args.tolerance);
    }
    if !(1..=10_000).contains(&args.probes) {
        usage!("--probes {}: must be from 1 to 10000", args.probes);
    }
    if let Some(file) = &args.json {
        check_writable("--json", file)?;
    }
    let Opened { device, model, unet, schedule } = Opened::new(&args.on, &args.of)?;
    let c = &model.config;
    let chosen = args.on_data.open(c)?;
    if args.on.precision != Precision::F32 {
        let precision = args.on.precision;
        say!(
            "in {precision} the network's rounding limits the steps; f32 needs fewer evaluations for small tolerances"
        );
    }
    // Below the first timestep's noise, eps from a predicted x_0 divides by what tends to 0.
    let from = if args.cut || c.diffusion.prediction == Prediction::X0 { From::FirstTimestep } else { From::Image };
    let options = Options { tolerance: args.tolerance, probes: args.probes, seed: args.seed, from };
    let model = Model {
        device: &device,
        unet: &unet,
        params: &model.params,
        schedule: &schedule,
        prediction: c.diffusion.prediction,
    };

    let started = Instant::now();
    let (count, d) = (chosen.images.len(), chosen.data.train.extent().len());
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} images, {eta} left").expect("a valid template");
    let bar = ProgressBar::new(count as u64).with_style(style);
    let (mut bits, mut evaluations) = (Vec::with_capacity(count), 0);
    let together = (TOGETHER / args.probes).max(1);
    for first in (0..count).step_by(together) {
        let range = first..count.min(first + together);
        let images: Vec<&[u8]> = range.clone().map(|i| chosen.image(i)).collect();
        let labels = chosen.labels.as_ref().map(|labels| &labels[range.clone()]);
        let likelihoods = model.likelihoods(&images, labels, first, options)?;
        for of_image in likelihoods.chunks(args.probes) {
            let sum: f64 = of_image.iter().map(|likelihood| bits_per_dim(likelihood.log_p, d)).sum();
            bits.push(sum / args.probes as f64);
            evaluations += of_image.iter().map(|likelihood| likelihood.evaluations).sum::<usize>();
        }
        bar.inc(images.len() as u64);
    }
    bar.finish_and_clear();

    let n = count as f64;
    let mean = bits.iter().sum::<f64>() / n;
    let squares: f64 = bits.iter().map(|bits| (bits - mean).powi(2)).sum();
    let standard_error = (count > 1).then(|| (squares / (n - 1.0) / n).sqrt());
    let each = evaluations as f64 / (n * args.probes as f64);
    say!(
        "{mean:.4}{} bits per dimension of uniformly dequantised pixels, by the ODE from {} on; {}, {} \
         each, tolerance {:e}, {each:.0} evaluations of the network each, {:.1} s",
        standard_error.map_or(String::new(), |error| format!(" +- {error:.4}")),
        if from == From::Image { "the image" } else { "the first timestep" },
        text::images(count),
        if args.probes == 1 { "one probe".into() } else { format!("{} probes", args.probes) },
        args.tolerance,
        started.elapsed().as_secs_f64(),
    );
    if let Some(path) = &args.json {
        let figures = json!({
            "bits_per_dim": mean,
            "standard_error": standard_error,
            "images": count,
            "probes": args.probes,
            "tolerance": args.tolerance,
            "from": if from == From::Image { "image" } else { "first_timestep" },
            "evaluations": each,
            "seed": args.seed,
        });
        output::write_atomically(path, format!("{figures:#}\n").as_bytes())?;
    }
    Ok(())
}
