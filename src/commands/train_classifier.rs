//! `ddpm-cuda train-classifier`: trains a classifier of noised images, or continues such a run.

use std::path::PathBuf;
use std::process::ExitCode;

use super::{PRECISION, choice, train};
use crate::config::{OnBadImage, Preset};
use crate::device::{Devices, Precision};
use crate::distributed::Launcher;
use crate::error::Result;
use crate::exchange::Sums;

/// Arguments of `ddpm-cuda train-classifier`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network and recipe to start from [default: mnist for its digits, auto for other data: made from the data]
    #[arg(long, value_parser = choice::<Preset>())]
    pub preset: Option<Preset>,
    /// Images with classes: mnist (built in), .ddpm, .npz, IDX, .zip, .tar, .parquet, CIFAR's folder, class folders
    #[arg(long, value_name = "mnist|PATH")]
    pub data: Option<String>,
    /// An image that cannot be used ends the run (stop) or is left out and listed (skip) [default: stop]
    #[arg(long, value_name = "WHAT", value_parser = choice::<OnBadImage>(), conflicts_with = "resume")]
    pub on_bad_image: Option<OnBadImage>,
    /// Run folder to create [default: runs/PRESET-classifier or runs/DATA-classifier, numbered if it exists]
    #[arg(long, value_name = "RUN")]
    pub out: Option<PathBuf>,
    /// Settings to start from, such as the config.toml of the model to be guided
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// One of the settings below, such as widths=32,64,64; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Training steps [default: the preset's]
    #[arg(long, value_name = "N")]
    pub steps: Option<u32>,
    /// Images per step [default: the preset's]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Seed of all randomness [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// auto, cpu, cuda, cuda:N, or several GPUs: cuda:0-7, cuda:0,2,3
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: Devices,
    /// Take the rank and the number of ranks from what this launcher has set; without it from RANK and WORLD_SIZE
    #[arg(long, value_name = "LAUNCHER", value_parser = choice::<Launcher>())]
    pub launch: Option<Launcher>,
    /// Who adds up the gradients of several GPUs: a fixed tree, with the bits of one GPU, or NCCL, with bits that
    /// depend on the number of GPUs, their connections and NCCL's version [default: tree]
    #[arg(long, value_name = "SUMS", value_parser = choice::<Sums>())]
    pub exchange: Option<Sums>,
    /// What is computed in.
    #[arg(
        long,
        help = format!("{PRECISION} [default: f32, or that of the resumed run]"),
        value_parser = choice::<Precision>()
    )]
    pub precision: Option<Precision>,
    /// On a GPU, launch kernel by kernel instead of whole steps as CUDA graphs: slower, the same numbers
    #[arg(long)]
    pub eager: bool,
    /// Continue this run from its newest checkpoint, with its own settings, data and precision; see below what may
    /// change
    #[arg(long, value_name = "RUN", conflicts_with_all = ["preset", "out", "config", "batch", "seed"])]
    pub resume: Option<PathBuf>,
}

/// What follows the arguments in the help.
pub fn help() -> String {
    format!(
        "To guide a model, schedule, timesteps, betas and image_size must be the model's. classes is the number that the \
         data has.\n\n{}",
        train::help_of(true)
    )
}

/// Runs the command. Returns 0, or 128 + its number if a signal has stopped the run before its end.
///
/// # Errors
/// Those of [`train::run`]; data without classes.
pub fn run(args: Args) -> Result<ExitCode> {
    let Args {
        preset,
        data,
        on_bad_image,
        out,
        config,
        set,
        steps,
        batch,
        seed,
        device,
        launch,
        exchange,
        precision,
        eager,
        resume,
    } = args;
    let args = train::Args {
        preset,
        data,
        on_bad_image,
        init: None,
        out,
        config,
        set,
        steps,
        batch,
        seed,
        device,
        launch,
        exchange,
        precision,
        eager,
        resume,
    };
    train::run_of(&args, true)
}
