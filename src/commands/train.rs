//! `ddpm-cuda train`: trains a model, or continues a run.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::ranks::{Part, Quiet, Rank};
use super::signals::Signals;
use super::{PRECISION, choice, open};
use crate::config::{self, Config, Given, MAY_CHANGE, NOT_OF_CLASSIFIERS, OF_A_MODELS_TRAINING, OnBadImage, Preset};
use crate::device::{Choice, Device, Devices, Precision};
use crate::distributed::{Fact, Launcher};
use crate::error::{Error, Result};
use crate::exchange::{Exchange, Sums};
use crate::text::{duration, shell_word};
use crate::train::{Changes, Init, Run, Start, Watch};
use crate::{recipe, say, usage};

/// Off a terminal, the longest time without a line.
const QUIET_S: f64 = 30.0;
/// And the number of lines of a run that is shorter than that.
const LINES: u64 = 10;

/// Arguments of `ddpm-cuda train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// All of them but one.
    #[command(flatten)]
    pub training: Training,
    /// Start from the weights of this model: a run, a checkpoint, or a model folder of diffusers
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER", conflicts_with = "resume")]
    pub init: Option<PathBuf>,
}

/// Arguments of whatever is trained.
#[derive(Debug, clap::Args)]
pub struct Training {
    /// Network and recipe to start from [default: mnist for its digits, auto for other data: made from the data]
    #[arg(long, value_parser = choice::<Preset>())]
    pub preset: Option<Preset>,
    /// Images: mnist (built in), .ddpm, .npy, .npz, IDX, .zip, .tar, .parquet, CIFAR's folder, folder of images
    #[arg(long, value_name = "mnist|PATH")]
    pub data: Option<String>,
    /// An image that cannot be used ends the run (stop) or is left out and listed (skip) [default: stop]
    #[arg(long, value_name = "WHAT", value_parser = choice::<OnBadImage>(), conflicts_with = "resume")]
    pub on_bad_image: Option<OnBadImage>,
    /// Run folder to create [default: runs/PRESET or runs/DATA, numbered if it exists]
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
    help_of(false)
}

/// The same for a network or a `classifier`.
pub(super) fn help_of(classifier: bool) -> String {
    format!(
        "{}\n\
         Stopping: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU save a checkpoint after the step and stop; a \
         second Ctrl-C stops at once. A signal that is ignored at the start, as SIGHUP under nohup, stays ignored.\n\n\
         Exit codes: 0 all steps are done; 128 + the signal's number if one has stopped the run before (Ctrl-C 130, \
         SIGTERM 143, SIGHUP 129, SIGUSR1 138 on Linux); 1 a failure; 2 wrong usage.\n\n\
         Resuming: --resume goes on to the same bits as a run that was never stopped, on the same device; another device \
         is allowed and differs by rounding. Only these settings may change, with --set: {}; --steps and --data are the \
         same as their settings, and --data takes another place of the same images.\n",
        config::help(classifier),
        MAY_CHANGE.join(", ")
    )
}

/// Runs the command. Returns 0, or 128 + its number if a signal has stopped the run before its end.
///
/// # Errors
/// Unusable settings, data or checkpoints; a loss or gradient that is not finite; checkpoints that cannot be written;
/// those of [`Device::open`].
pub fn run(args: Args) -> Result<ExitCode> {
    let Args { mut training, init } = args;
    training.set.extend(init.map(|model| format!("init={}", model.to_string_lossy())));
    run_of(&training, false)
}

/// [`run`] for a network or a `classifier`.
pub(super) fn run_of(args: &Training, classifier: bool) -> Result<ExitCode> {
    match Part::of(&args.device, args.launch, || facts(args, classifier))? {
        Part::Launcher(code) => Ok(code),
        Part::Alone(_) if args.exchange == Some(Sums::Nccl) => {
            usage!("--exchange nccl: one process trains here, which exchanges nothing; give --device several GPUs")
        }
        Part::Alone(choice) => train(args, classifier, choice, None),
        Part::Rank(rank) => {
            let ended = train(args, classifier, rank.choice(), Some(&rank));
            if let Err(e) = &ended {
                rank.control().fail(&e.to_string());
            }
            ended
        }
    }
}

/// What ranks tell each other before they read any data: what they were asked for.
fn facts(args: &Training, classifier: bool) -> Result<Vec<Fact>> {
    let config = match &args.resume {
        Some(run) => Run::settings(run)?,
        None => config(args, classifier)?.0,
    };
    let mut facts = vec![Fact::new("what is trained", if classifier { "a classifier" } else { "a model" })];
    facts.push(Fact::new("--exchange", args.exchange.unwrap_or_default()));
    facts.extend(config.entries().map(|(key, value)| Fact::new(format!("setting {key}"), value)));
    if args.resume.is_some() {
        let changed = [("--set", args.set.join(" ")), ("--steps", format!("{:?}", args.steps))];
        facts.extend(changed.map(|(flag, value)| Fact::new(flag, value)));
    }
    Ok(facts)
}

/// Trains on a device, as one of several ranks or alone.
fn train(args: &Training, classifier: bool, choice: Choice, rank: Option<&Rank>) -> Result<ExitCode> {
    let command = if classifier { "train-classifier" } else { "train" };
    let signals = Signals::listen()?;
    let (mut terminal, mut quiet) = (Terminal::default(), Quiet { rank: rank.map_or(0, |rank| rank.control().rank()) });
    let speaks = rank.is_none_or(Rank::speaks);
    let watch: &mut dyn Watch = if speaks { &mut terminal } else { &mut quiet };
    let sums = args.exchange.unwrap_or_default();
    let exchange = |device: &Device| rank.map_or_else(|| Ok(Exchange::alone()), |rank| rank.exchange(device, sums));
    if sums == Sums::Nccl {
        watch.say(
            "NCCL adds the gradients up: the bits of this run depend on the number of GPUs, how they are connected and \
             NCCL's version",
        );
    }
    let mut run = match &args.resume {
        Some(run) => {
            if Run::settings(run)?.model.classifier != classifier {
                let other = if classifier { "train" } else { "train-classifier" };
                let what =
                    format!("is a run of {other}; resume it with ddpm-cuda {other} --resume {}", shell_word(run));
                return Err(Error::file(run, what));
            }
            let device = open_to_resume(run, choice, args)?;
            let data = args.data.as_deref().map(absolute);
            let changes = Changes { sets: &args.set, steps: args.steps, data: data.as_deref() };
            Run::open_rank(Start::Resume { run, changes }, &device, exchange(&device)?, watch)?
        }
        None => {
            let (config, given, notes) = config(args, classifier)?;
            notes.iter().for_each(|note| watch.say(note));
            let device = open(choice, config.precision, args.eager)?;
            let start = Start::New { config: &config, given: &given, out: args.out.as_deref() };
            Run::open_rank(start, &device, exchange(&device)?, watch)?
        }
    };
    if let Some(rank) = rank {
        rank.log_to(&run)?;
        signals.tell(rank.control());
    }
    if run.is_done() {
        return run.leave().map(|()| ExitCode::SUCCESS);
    }
    signals.training_begins();
    let started = Instant::now();
    let checkpoint = run.train(signals.stop(), watch)?;
    let (done, steps, folder) = (run.trainer().steps_done(), run.config().steps, shell_word(run.folder()));
    run.leave()?;
    if done < steps {
        let stopped = rank.and_then(|rank| Some((rank.control().stopped()?, rank.control().ranks())));
        if speaks {
            if let Some((stop, ranks)) = &stopped {
                say!("{} was told to stop: {}", ranks[stop.rank], stop.why);
            }
            say!("stopped after step {done} of {steps}: {}", checkpoint.display());
            say!("to go on: ddpm-cuda {command} --resume {folder}");
        }
        return Ok(ExitCode::from(stopped.map_or_else(|| signals.exit_code(), |(stop, _)| stop.code)));
    }
    if speaks {
        say!(
            "{done} step{}, {:.0} s: {}",
            if done == 1 { "" } else { "s" },
            started.elapsed().as_secs_f64(),
            checkpoint.display()
        );
        match classifier {
            false => say!("to draw images: ddpm-cuda sample --model {folder} --out samples.png"),
            true => say!(
                "to guide a model's samples: ddpm-cuda sample --model MODEL --classifier {folder} --out samples.png"
            ),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens a device for the precision of a run.
fn open_to_resume(run: &Path, device: Choice, args: &Training) -> Result<Device> {
    let precision = Run::settings(run)?.precision;
    if let Some(asked) = args.precision.filter(|asked| *asked != precision) {
        usage!(
            "--precision {asked}: {} is a run in {precision} and goes on in it; leave --precision out",
            run.display()
        );
    }
    let no_gpu = precision != Precision::F32 && matches!(device, Choice::Auto | Choice::Cpu);
    open(device, precision, args.eager).map_err(|e| match e {
        Error::Failed(_) if no_gpu => Error::file(
            run,
            format!(
                "is a run in {precision}, in which the CPU does not compute; resume it on a GPU, with --device cuda"
            ),
        ),
        other => other,
    })
}

/// The settings of a new run: preset, file, `--set`, then flags; which of them somebody chose; and sentences about
/// them.
fn config(args: &Training, classifier: bool) -> Result<(Config, Given, Vec<String>)> {
    let flags = [
        ("data", args.data.clone()),
        ("on_bad_image", args.on_bad_image.map(|what| what.to_string())),
        ("steps", args.steps.map(|steps| steps.to_string())),
        ("batch", args.batch.map(|batch| batch.to_string())),
        ("seed", args.seed.map(|seed| seed.to_string())),
        ("precision", args.precision.map(|precision| precision.to_string())),
    ];
    let mut sets = args.set.clone();
    sets.extend(flags.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?))));
    let (mut config, mut given) = Config::build(args.preset, args.config.as_deref(), &sets)?;
    if let (true, false, Some(file)) = (config.model.classifier, classifier, &args.config) {
        return Err(Error::file(file, "holds the settings of a classifier, for train-classifier"));
    }
    let mut notes = Vec::new();
    if classifier {
        // The file may be that of the model to be guided, which has them.
        Config::refuse_sets(&args.set, &NOT_OF_CLASSIFIERS, "a classifier")?;
        given.forget_file(&NOT_OF_CLASSIFIERS);
        if config.model.classes == 0 {
            given.forget_file(&["classes"]); // the data has them
        }
        if let (true, false, Some(file)) = (given.has_file_of_run(), config.model.classifier, &args.config) {
            given.forget_file(&OF_A_MODELS_TRAINING);
            let (file, keys) = (file.display(), OF_A_MODELS_TRAINING.join(", "));
            notes.push(format!("{file} is of a model, whose {keys} are not taken; --set gives a classifier's"));
        }
        config.model.null_class = false;
        config.fill(&given, &Config::preset(config.preset).into_classifier());
        config.model.classifier = true;
    }
    config.data = absolute(&config.data);
    if !config.init.is_empty() {
        if !given.has("data") {
            usage!("--init {}: say with --data which images to train it on", config.init);
        }
        notes = Init::open(Path::new(&config.init))?.adopt(&mut config, &mut given)?;
    }
    recipe::adapt_attention(&mut config, &given);
    config.validate()?;
    config.refuse_unused(&given)?;
    Ok((config, given, notes))
}

/// The place of the data, so that the run can be resumed from another working directory.
fn absolute(data: &str) -> String {
    if data.is_empty() || data == "mnist" {
        return data.into();
    }
    std::path::absolute(data).ok().and_then(|p| p.into_os_string().into_string().ok()).unwrap_or_else(|| data.into())
}

/// Shows the progress of a run: a bar if standard error is a terminal, with other lines on standard output above it;
/// off a terminal a line on standard output at each tenth of the run, and as often as no 30 s pass without one.
pub(super) struct Terminal {
    bar: ProgressBar,
    began: Instant,
    /// Steps done when training began, steps done now, steps in all.
    before: u64,
    done: u64,
    steps: u64,
    measured: String,
    last_step: Instant,
    last_line: Instant,
}

impl Default for Terminal {
    fn default() -> Self {
        let now = Instant::now();
        Terminal {
            bar: ProgressBar::hidden(),
            began: now,
            before: 0,
            done: 0,
            steps: 0,
            measured: String::new(),
            last_step: now,
            last_line: now,
        }
    }
}

impl Terminal {
    /// True at each tenth of the steps of this call, and if the next step may end too long after the last line.
    fn is_due(&self, now: Instant) -> bool {
        let tenths = |done: u64| done * LINES / (self.steps - self.before);
        let (done, step) = (self.done - self.before, now - self.last_step);
        tenths(done) > tenths(done - 1) || (now - self.last_line + step).as_secs_f64() > QUIET_S
    }

    fn line(&self, now: Instant) -> String {
        let Terminal { before, done, steps, measured, .. } = self;
        let left = (now - self.began).as_secs_f64() / (done - before) as f64 * (steps - done) as f64;
        let left = if done < steps { format!("{} left", duration(left)) } else { "done".into() };
        // A GPU is not asked for its measurements at every step, and at first there are none.
        let measured = if measured.is_empty() { String::new() } else { format!("{measured}, ") };
        format!("step {done} of {steps}: {measured}{left}")
    }
}

impl Watch for Terminal {
    fn say(&mut self, line: &str) {
        self.bar.suspend(|| say!("{line}"));
    }

    fn begin(&mut self, done: u32, steps: u32) {
        let (before, steps, now) = (u64::from(done), u64::from(steps), Instant::now());
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}, {eta} left").expect("a valid template");
        let bar = ProgressBar::new(steps).with_style(style).with_position(before);
        bar.reset_eta();
        *self = Terminal {
            bar,
            began: now,
            before,
            done: before,
            steps,
            last_step: now,
            last_line: now,
            ..Terminal::default()
        };
    }

    fn measured(&mut self, text: String) {
        self.bar.set_message(text.clone());
        self.measured = text;
    }

    fn step(&mut self) {
        self.bar.inc(1);
        self.done += 1;
        let now = Instant::now();
        if self.bar.is_hidden() && self.is_due(now) {
            say!("{}", self.line(now));
            self.last_line = now;
        }
        self.last_step = now;
    }

    fn end(&mut self) {
        self.bar.finish_and_clear();
    }
}
