//! `ddpm-cuda train-classifier`: trains a classifier of noised images, or continues such a run.

use std::process::ExitCode;

use super::train;
use crate::config::OF_A_MODELS_TRAINING;
use crate::error::Result;

/// Arguments of `ddpm-cuda train-classifier`.
#[derive(Debug, clap::Args)]
#[command(
    mut_arg("data", |arg| arg.help(
        "Images with classes: mnist (built in), .ddpm, .npz, IDX, .zip, .tar, .parquet, CIFAR's folder, class folders"
    )),
    mut_arg("out", |arg| arg.help(
        "Run folder to create [default: runs/PRESET-classifier or runs/DATA-classifier, numbered if it exists]"
    )),
    mut_arg("config", |arg| arg.help("Settings to start from, such as the config.toml of the model to be guided")),
)]
pub struct Args {
    /// All of them.
    #[command(flatten)]
    pub training: train::Training,
}

/// What follows the arguments in the help.
pub fn help() -> String {
    format!(
        "To guide a model, schedule, timesteps, betas and image_size must be the model's. classes is the number that the \
         data has. Of the config.toml of a model's run these are not taken, which are of its own training: {}.\n\n{}",
        OF_A_MODELS_TRAINING.join(", "),
        train::help_of(true)
    )
}

/// Runs the command. Returns 0, or 128 + its number if a signal has stopped the run before its end.
///
/// # Errors
/// Those of [`train::run`]; data without classes.
pub fn run(args: Args) -> Result<ExitCode> {
    train::run_of(&args.training, true)
}
