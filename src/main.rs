//! The command line. No logic here: it calls the command of that name in `commands` and maps errors to exit codes.

use std::io::Write;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, Subcommand};
use ddpm_cuda::commands::{
    convert, data, encode, eval, info, inpaint, interpolate, likelihood, predict, profile, quality, report, sample,
    train, train_classifier, watch,
};
use ddpm_cuda::config;
use ddpm_cuda::data::panics_are_caught;
use ddpm_cuda::error::Error;

/// Denoising diffusion probabilistic models: train on a folder of images, draw new ones.
#[derive(Parser)]
#[command(version, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model; without arguments, on built-in handwritten digits.
    #[command(after_help = train::help())]
    Train(train::Args),
    /// Train a classifier of noised images, to guide samples with.
    #[command(after_help = train_classifier::help())]
    TrainClassifier(train_classifier::Args),
    /// The live state of a run, from another terminal.
    Watch(watch::Args),
    /// A run's curves, samples and settings as one page of HTML; several runs are compared.
    Report(report::Args),
    /// Convert images into one file that is read from disk while training, for data larger than memory.
    Data(data::Args),
    /// Measure how like the data a model's samples are, and whether they are copies.
    #[command(after_help = quality::HELP)]
    Quality(Box<quality::Args>),
    /// Draw images with a trained model.
    Sample(Box<sample::Args>),
    /// The noise that DDIM makes given images of.
    Encode(encode::Args),
    /// From one image to another through the noise.
    Interpolate(interpolate::Args),
    /// Paint a part of given images anew.
    Inpaint(inpaint::Args),
    /// The variational bound of images, its terms, and the rate-distortion table.
    Eval(eval::Args),
    /// The exact likelihood of images by the probability-flow ODE.
    Likelihood(likelihood::Args),
    /// Evaluate the network once on given inputs.
    Predict(predict::Args),
    /// Write a model in the files of another program.
    Convert(convert::Args),
    /// Parameters, operations and memory of a model, and the devices there are.
    Info(info::Args),
    /// What a step asks of a GPU, kernel by kernel, and how long it takes or would take.
    #[command(after_help = profile::HELP)]
    Profile(profile::Args),
}

/// The arguments; a flag of `train` that is a setting, or what other tools call one, is named as such.
fn parse() -> Result<Cli, Error> {
    let error = match Cli::try_parse() {
        Ok(cli) => return Ok(cli),
        Err(error) => error,
    };
    if error.kind() == ErrorKind::UnknownArgument
        && std::env::args().nth(1).is_some_and(|command| command == "train" || command == "train-classifier")
        && let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg)
        && let Some(sentence) = config::no_flag(flag, error.get(ContextKind::SuggestedArg).is_some())
    {
        return Err(Error::Usage(sentence));
    }
    error.exit()
}

fn run() -> Result<ExitCode, Error> {
    match parse()?.command {
        Command::Train(args) => train::run(args),
        Command::TrainClassifier(args) => train_classifier::run(args),
        Command::Watch(args) => watch::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Report(args) => report::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Data(args) => data::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Quality(args) => quality::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Sample(args) => sample::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Encode(args) => encode::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Interpolate(args) => interpolate::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Inpaint(args) => inpaint::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Eval(args) => eval::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Likelihood(args) => likelihood::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Predict(args) => predict::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Convert(args) => convert::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Info(args) => info::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Profile(args) => profile::run(&args).map(|()| ExitCode::SUCCESS),
    }
}

fn main() -> ExitCode {
    // What is caught becomes a sentence of its own.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panics_are_caught() {
            report(panic);
        }
    }));
    match run() {
        Ok(code) => code,
        Err(error) => {
            // stderr may be closed; the exit code reports the failure as well.
            let _ = std::io::stderr().write_all(format!("ddpm-cuda: {error}\n").as_bytes());
            ExitCode::from(Error::exit_code(&error))
        }
    }
}
