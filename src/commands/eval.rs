//! `ddpm-cuda eval`: the variational bound of images, its terms, and the rate-distortion table.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::on_data::OnData;
use super::opened::{Grid, Opened, bar};
use super::several::{self, Stop, in_order};
use super::{Of, OnSeveral, check_writable, choice};
use crate::device::Device;
use crate::diffusion::objective::Loss;
use crate::diffusion::{Method, Objective, Sampler, Timesteps, Variance};
use crate::error::{Error, Result};
use crate::evaluate::{Bound, Evaluation, Measured};
use crate::output::plot::{Axis, Plot, Series, write_plot};
use crate::output::write_atomically;
use crate::text;
use crate::{say, usage};

/// Lines of the rate-distortion table on the terminal, as in the paper's table 4.
const LINES: usize = 10;

/// Arguments of `ddpm-cuda eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// `--model` and `--set`
    #[command(flatten)]
    pub of: Of,
    /// `--data`, `--split` and `--count`
    #[command(flatten)]
    pub on_data: OnData,
    /// Draws of the noise for each image and timestep
    #[arg(long, default_value_t = 1, value_name = "K")]
    pub draws: u32,
    /// Timesteps of the chain, if fewer than the model's
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Which timesteps are kept when there are fewer: even, stride, leading, trailing, karras, or a list such as
    /// 10,15,20, so many in each of equal sections [default: the model's; even if it says nothing]
    #[arg(long, value_name = "SPACING|LIST", value_parser = |text: &str| text.parse::<Timesteps>())]
    pub spacing: Option<Timesteps>,
    /// Variance of the chain [default: that of `sample`: the model's for all timesteps or a learned range, else
    /// fixed_small]
    #[arg(long, value_name = "VARIANCE", value_parser = choice::<Variance>())]
    pub variance: Option<Variance>,
    /// Seed of the noise
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Also write every figure as JSON
    #[arg(long, value_name = "F.json")]
    pub json: Option<PathBuf>,
    /// Also draw plots into this folder: bound.svg, rate_distortion.svg, and PNGs of both
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// `--device`, `--precision` and `--eager`
    #[command(flatten)]
    pub on: OnSeveral,
}

/// Runs the command.
///
/// # Errors
/// `Error::Usage` for arguments that do not fit the model or the data, `Error::File` for files that cannot be read or
/// written; those of [`OnSeveral::open`].
pub fn run(args: &Args) -> Result<()> {
    if args.draws == 0 {
        usage!("--draws 0: must be at least 1");
    }
    if let Some(file) = &args.json {
        check_writable("--json", file)?;
    }
    let on_each = Opened::on_each(&args.on, &args.of)?;
    let Opened { device, model, schedule, .. } = &on_each[0];
    let c = &model.config;
    let kept = kept(args, &on_each[0])?;
    let variance = on_each[0].variance(args.variance, kept.len(), schedule.len())?;
    if variance == Variance::LearnedRaw {
        usage!(
            "this model's network puts out the variance itself (learned of diffusers), whose bound is not computed here; --variance fixed_small has one"
        );
    }
    // What cannot be sampled from has no bound either.
    Sampler::over(schedule, c.diffusion.prediction, Method::Ancestral(variance), &kept)?;
    let objective = Objective::new(Loss::Vlb, c.diffusion.prediction, variance, schedule).over(&kept);
    if u64::from(args.draws) * schedule.len() as u64 > 1 << 32 {
        usage!(
            "--draws {}: at most {} for {} timesteps",
            args.draws,
            (1u64 << 32) / schedule.len() as u64,
            schedule.len()
        );
    }
    if let Some(folder) = &args.plots {
        std::fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be created: {e}")))?;
    }
    let chosen = args.on_data.open(c)?;
    let data = chosen.dataset();
    let together = several::batch(if device.is_gpu() { 256 } else { 32 }, data.len(), on_each.len());
    let evaluations = on_each.iter().map(|opened| Evaluation {
        device: &opened.device,
        unet: &opened.unet,
        params: &opened.model.params,
        objective: &objective,
        data: &data,
        draws: args.draws,
        seed: args.seed,
        limit: opened.limit(),
        together,
    });
    let evaluations: Vec<Evaluation<'_>> = evaluations.collect();

    let started = Instant::now();
    let bar = bar(evaluations[0].passes() as usize);
    let measure = |device: usize, images: &Range<usize>, stop: &Stop| {
        evaluations[device].measure(images.clone(), || {
            stop.check()?;
            bar.inc(1);
            Ok(())
        })
    };
    let mut sums = evaluations[0].sums();
    let devices: Vec<&Device> = on_each.iter().map(|opened| &opened.device).collect();
    in_order(&devices, &evaluations[0].batches(), measure, |_, measured: Measured| {
        sums.add(&measured);
        Ok(())
    })?;
    let bound = sums.bound();
    bar.finish_and_clear();
    report(&bound, variance, args.draws, started);
    if let Some(path) = &args.json {
        write_json(path, &bound, variance, args)?;
    }
    if let Some(folder) = &args.plots {
        let [bound_svg, _] = write_plot(folder, "bound", &of_bound(&bound))?;
        let [curve_svg, _] = write_plot(folder, "rate_distortion", &of_rate_distortion(&bound))?;
        say!("plots: {} and {}, and PNGs beside them", bound_svg.display(), curve_svg.display());
    }
    Ok(())
}

/// The timesteps of the chain: all, unless fewer are asked for.
fn kept(args: &Args, opened: &Opened) -> Result<Vec<u32>> {
    let timesteps = opened.schedule.len();
    let by_name = !matches!(args.spacing, Some(Timesteps::Sections(_) | Timesteps::Karras));
    if by_name && args.steps.is_none_or(|steps| steps == timesteps) {
        return Ok((0..timesteps as u32).collect());
    }
    let all = matches!(args.spacing, Some(Timesteps::Karras)).then_some(timesteps);
    Grid { steps: args.steps.or(all), spacing: args.spacing.clone() }.kept(opened, false)
}

/// Says the bound, its parts and a part of the rate-distortion table.
fn report(bound: &Bound, variance: Variance, draws: u32, started: Instant) {
    let (cuts, steps) = (bound.rate_distortion(), bound.terms.len());
    say!("{:>8} {:>18} {:>12}", "t", "rate, bits/dim", "RMSE, 0-255");
    for line in 0..LINES.min(steps) {
        let cut = cuts[line * steps / LINES.min(steps)];
        say!("{:>8} {:>18.5} {:>12.5}", cut.t, cut.rate, cut.rmse);
    }
    say!("rates hold L_T, which the paper's table 4 leaves out");
    let sum: f64 = bound.terms[1..].iter().sum();
    let between = match steps - 1 {
        0 => String::new(),
        1 => format!("L_1 {sum:.4}, "),
        last => format!("L_1 to L_{last} {sum:.4}, "),
    };
    say!(
        "{:.4}{} bits per dimension: L_T {:.6}, {between}L_0 {:.4}; variance = {variance}, {}, {draws} draw{} a timestep, {:.1} s",
        bound.bits_per_dim(),
        bound.standard_error().map_or(String::new(), |error| format!(" +- {error:.4}")),
        bound.prior,
        bound.terms[0],
        text::images(bound.per_image.len()),
        if draws == 1 { "" } else { "s" },
        started.elapsed().as_secs_f64(),
    );
}

fn write_json(path: &Path, bound: &Bound, variance: Variance, args: &Args) -> Result<()> {
    let cuts = bound.rate_distortion();
    let cuts: Vec<_> = cuts.iter().map(|cut| json!({"t": cut.t, "rate": cut.rate, "rmse": cut.rmse})).collect();
    let figures = json!({
        "bits_per_dim": bound.bits_per_dim(),
        "standard_error": bound.standard_error(),
        "prior": bound.prior,
        "reconstruction": bound.terms[0],
        "terms": bound.terms,
        "mse_x0": bound.mse_x0,
        "mse_eps": bound.mse_eps,
        "rate_distortion": cuts,
        "timesteps": bound.timesteps,
        "variance": variance.to_string(),
        "images": bound.per_image.len(),
        "draws": args.draws,
        "seed": args.seed,
    });
    write_atomically(path, format!("{figures:#}\n").as_bytes())
}

/// The terms by timestep.
fn of_bound(bound: &Bound) -> Plot {
    let points = bound.timesteps.iter().zip(&bound.terms).map(|(&t, &term)| (f64::from(t), term)).collect();
    Plot {
        title: format!("Variational bound by timestep, {:.4} bits/dim in all", bound.bits_per_dim()),
        x: Axis { label: "timestep t".into(), log: false },
        y: Axis { label: "bits/dim".into(), log: true },
        series: vec![Series { name: String::new(), points, line: true }],
        marks: bound.terms.len() <= 50,
    }
}

/// Distortion over rate.
fn of_rate_distortion(bound: &Bound) -> Plot {
    let points = bound.rate_distortion().iter().map(|cut| (cut.rate, cut.rmse)).collect();
    Plot {
        title: "Rate and distortion of progressive coding".into(),
        x: Axis { label: "rate, bits/dim".into(), log: false },
        y: Axis { label: "RMSE on the scale of 0 to 255".into(), log: false },
        series: vec![Series { name: String::new(), points, line: true }],
        marks: bound.terms.len() <= 50,
    }
}
