//! `ddpm-cuda eval`: the variational bound of images, its terms, and the rate-distortion table.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::on_data::OnData;
use super::opened::{Opened, bar};
use super::several::{self, Stop, in_order};
use super::{Of, OnSeveral, check_writable, choice};
use crate::device::Device;
use crate::diffusion::objective::Loss;
use crate::diffusion::{Objective, Spacing, Variance};
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
    /// Which timesteps are kept when there are fewer [default: the model's; even if it says nothing]
    #[arg(long, value_name = "SPACING", value_parser = choice::<Spacing>())]
    pub spacing: Option<Spacing>,
    /// Another variance than the model's, of those that are not learned
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
    let (c, stepping) = (&model.config, model.stepping);
    let own = c.diffusion.variance;
    let variance = match args.variance {
        Some(asked) if asked != own && asked.is_learned() => {
            usage!("--variance {asked}: this model has variance = {own}, so it was not trained to say another")
        }
        Some(asked) if asked != own && own.is_learned() => {
            usage!("--variance {asked}: this model's variance is {own}, a part of its output; leave --variance out")
        }
        asked => asked.unwrap_or(own),
    };
    if variance == Variance::LearnedRaw {
        usage!(
            "this model's network puts out the variance itself (learned of diffusers), whose bound is not computed here; sample and quality judge it"
        );
    }
    let objective = Objective::new(Loss::Vlb, c.diffusion.prediction, variance, schedule);
    let steps = args.steps.unwrap_or(schedule.len());
    let spacing = args.spacing.unwrap_or(stepping.spacing);
    let objective = match steps == schedule.len() {
        true => objective,
        false => objective.over(&spacing.timesteps_from(stepping.steps_offset, schedule.len(), steps)?),
    };
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
    let evaluations = on_each.iter().map(|Opened { device, model, unet, .. }| Evaluation {
        device,
        unet,
        params: &model.params,
        objective: &objective,
        data: &data,
        draws: args.draws,
        seed: args.seed,
        clip: stepping.clip,
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
    report(&bound, data.len(), args.draws, started);
    if let Some(path) = &args.json {
        write_json(path, &bound, args)?;
    }
    if let Some(folder) = &args.plots {
        let [bound_svg, _] = write_plot(folder, "bound", &of_bound(&bound))?;
        let [curve_svg, _] = write_plot(folder, "rate_distortion", &of_rate_distortion(&bound))?;
        say!("plots: {} and {}, and PNGs beside them", bound_svg.display(), curve_svg.display());
    }
    Ok(())
}

/// Says the bound, its parts and a part of the rate-distortion table.
fn report(bound: &Bound, images: usize, draws: u32, started: Instant) {
    let (cuts, steps) = (bound.rate_distortion(), bound.terms.len());
    say!("{:>8} {:>18} {:>12}", "t", "rate, bits/dim", "RMSE, 0-255");
    for line in 0..LINES.min(steps) {
        let cut = cuts[line * steps / LINES.min(steps)];
        say!("{:>8} {:>18.5} {:>12.5}", cut.t, cut.rate, cut.rmse);
    }
    say!("rates hold L_T, which the paper's table 4 leaves out");
    let between: f64 = bound.terms[1..].iter().sum();
    say!(
        "{:.4}{} bits per dimension: L_T {:.6}, L_1 to L_{} {:.4}, L_0 {:.4}; {}, {draws} draw{} a timestep, {:.1} s",
        bound.bits_per_dim(),
        bound.standard_error().map_or(String::new(), |error| format!(" +- {error:.4}")),
        bound.prior,
        steps - 1,
        between,
        bound.terms[0],
        text::images(images),
        if draws == 1 { "" } else { "s" },
        started.elapsed().as_secs_f64(),
    );
}

fn write_json(path: &Path, bound: &Bound, args: &Args) -> Result<()> {
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
