//! `ddpm-cuda train`: trains a model, or continues a run.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::{On, choice};
use crate::config::{Config, Preset};
use crate::error::{Error, Result};
use crate::train::{Init, Run, Start, Watch};
use crate::{say, usage};

/// Arguments of `ddpm-cuda train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network and recipe to start from [default: mnist]
    #[arg(long, value_parser = choice::<Preset>())]
    pub preset: Option<Preset>,
    /// Images: mnist (built in), .npy, .npz, IDX file or folder, CIFAR-10 binary folder, folder of PNG/JPEG
    #[arg(long, value_name = "mnist|PATH")]
    pub data: Option<String>,
    /// Start from the weights of this model: a run, a checkpoint, or a model folder of diffusers
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER")]
    pub init: Option<PathBuf>,
    /// Run folder to create [default: runs/PRESET, numbered if it exists]
    #[arg(long, value_name = "RUN")]
    pub out: Option<PathBuf>,
    /// Settings to start from, such as the config.toml of another run
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
    /// `--device` and `--precision`
    #[command(flatten)]
    pub on: On,
    /// Continue this run from its newest checkpoint; --steps may extend it
    #[arg(long, value_name = "RUN", conflicts_with_all = ["preset", "data", "init", "out", "config", "set", "batch", "seed"])]
    pub resume: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Unusable settings, data or checkpoints; a loss or gradient that is not finite; files that cannot be written; those
/// of [`On::open`].
pub fn run(args: &Args) -> Result<()> {
    let device = args.on.open()?;
    let mut terminal = Terminal { bar: ProgressBar::hidden() };
    let mut run = match &args.resume {
        Some(run) => Run::open(Start::Resume { run, steps: args.steps }, &device, &mut terminal)?,
        None => {
            let start = Start::New { config: &config(args)?, out: args.out.as_deref() };
            Run::open(start, &device, &mut terminal)?
        }
    };
    if run.is_done() {
        return Ok(());
    }
    let stop = stop_flag()?;
    let started = Instant::now();
    let checkpoint = run.train(&stop, &mut terminal)?;
    let (done, steps, folder) = (run.trainer().steps_done(), run.config().steps, run.folder().display());
    if done < steps {
        say!("stopped after step {done} of {steps}: {}", checkpoint.display());
        say!("to go on: ddpm-cuda train --resume {folder}");
    } else {
        say!("{done} steps, {:.0} s: {}", started.elapsed().as_secs_f64(), checkpoint.display());
        say!("to draw images: ddpm-cuda sample --model {folder} --out samples.png");
    }
    Ok(())
}

/// The settings of a new run: preset, file, `--set`, then flags.
fn config(args: &Args) -> Result<Config> {
    let mut config = Config::build(args.preset, args.config.as_deref(), &args.set)?;
    if let Some(data) = &args.data {
        config.data.clone_from(data);
    }
    config.steps = args.steps.unwrap_or(config.steps);
    config.batch = args.batch.unwrap_or(config.batch);
    config.seed = args.seed.unwrap_or(config.seed);
    if !config.data.is_empty() && config.data != "mnist" {
        // So that the run can be resumed from another working directory.
        let absolute = std::path::absolute(&config.data).ok();
        config.data = absolute.and_then(|p| p.into_os_string().into_string().ok()).unwrap_or(config.data);
    }
    if let Some(model) = args.init.clone().or_else(|| (!config.init.is_empty()).then(|| config.init.clone().into())) {
        adopt(&model, &mut config, args)?;
    }
    config.validate()?;
    Ok(config)
}

/// Makes the network and the process of the model of `--init` those of `config`.
fn adopt(model: &Path, config: &mut Config, args: &Args) -> Result<()> {
    let file: toml::Table = match &args.config {
        None => toml::Table::new(),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
            text.parse().map_err(|e: toml::de::Error| Error::file(path, e.message()))?
        }
    };
    let is_set = |key: &str| args.set.iter().any(|set| set.split_once('=').is_some_and(|(k, _)| k.trim() == key));
    let given = |key: &str| match (&args.config, args.preset) {
        _ if is_set(key) => Some(format!("--set {key}")),
        (Some(path), _) if file.contains_key(key) => Some(format!("--config {}", path.display())),
        (_, Some(preset)) => Some(format!("--preset {preset}")),
        _ => None,
    };
    if args.data.is_none() && given("data").is_none() {
        usage!("--init {}: say with --data which images to train it on", model.display());
    }
    for note in Init::open(model)?.adopt(config, given)? {
        say!("{note}");
    }
    Ok(())
}

/// A progress bar if standard error is a terminal; other lines go to standard output, above it.
struct Terminal {
    bar: ProgressBar,
}

impl Watch for Terminal {
    fn say(&mut self, line: &str) {
        self.bar.suspend(|| say!("{line}"));
    }

    fn begin(&mut self, done: u32, steps: u32) {
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}, {eta} left").expect("a valid template");
        self.bar = ProgressBar::new(u64::from(steps)).with_style(style).with_position(u64::from(done));
        self.bar.reset_eta();
    }

    fn measured(&mut self, text: String) {
        self.bar.set_message(text);
    }

    fn step(&mut self) {
        self.bar.inc(1);
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A flag set by the first Ctrl-C (or SIGTERM). A second one ends the program at once, unless it comes within a second:
/// `timeout` and job schedulers signal a process and then its whole group, and mean one signal.
fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let mut first: Option<Instant> = None;
    let handler = move || {
        if let Some(first) = first {
            if first.elapsed().as_secs_f64() < 1.0 {
                return;
            }
            std::process::exit(130);
        }
        first = Some(Instant::now());
        flag.store(true, Ordering::Relaxed);
        let _ = writeln!(std::io::stderr(), "stopping after this step; once more to stop at once");
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Failed(format!("Ctrl-C cannot be caught: {e}")))?;
    Ok(stop)
}
