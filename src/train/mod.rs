//! Training: the loop, top to bottom.
//!
//! A step (algorithm 1 of the paper, for a batch) is [`Trainer::step`]: draw images, timesteps and noise; form x_t;
//! predict the noise; compute the loss and its gradient; run the tape backwards; clip; update weights, moments and
//! moving average. What a step draws is a pure function of seed and step, so the state of a run is its step number and
//! four flat buffers: the weights, their moving average and two moments. A checkpoint holds exactly these, so a resumed
//! run continues with the same bits.
//!
//! [`Run`] is a [`Trainer`] with a folder: it logs, validates, draws samples and saves checkpoints. To write your own
//! loop, use the [`Trainer`] alone.
//!
//! A run on several devices has a rank for each ([`Exchange`]). Each computes its micro-batches of a step, its shard of
//! the update and its share of validation and samples; all pass through the same loop, and the first writes the files.
//! Neither what is drawn nor the order of a sum depends on how many there are, so a checkpoint of four ranks has the
//! bits of one, and any number of them may go on from it that the number of micro-batches allows
//! ([`fits`](crate::ops::tree_sum::fits)).

mod ahead;
mod feed;
mod gradient;
mod init;
mod learning;
mod log;
mod losses;
mod recorder;
mod run_folder;
mod trainer;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

pub use ahead::Waits;
pub use feed::{Feed, Resident};
pub use init::Init;
pub use trainer::{Average, StepReport, Trainer, Validation};

use crate::checkpoint::{self, DataMark};
use crate::config::{Config, Given};
use crate::data;
use crate::device::Device;
use crate::diffusion::{Curve, Schedule};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::history::{Event, How};
use crate::memory;
use crate::meter::Quarters;
use crate::output;
use crate::output::plot::{Axis, Plot, Series, write_plot};
use crate::recipe;
use crate::sample::{self, Drawing};
use crate::text::{GIB, grouped};
use crate::unet::UNet;
use crate::usage;
use log::{Fault, Log, Report};
use recorder::{Recorder, Said};
use run_folder::RunFolder;

/// Receives the progress of a run. `()` ignores it.
pub trait Watch {
    /// A sentence for the user, without a newline.
    fn say(&mut self, line: &str);
    /// The same of something that went wrong and that training can do without.
    fn warn(&mut self, line: &str) {
        self.say(line);
    }
    /// Training begins, with `done` of `steps` steps already done.
    fn begin(&mut self, _done: u32, _steps: u32) {}
    /// A summary of the steps since the last log line.
    fn measured(&mut self, _text: String) {}
    /// One more step is done (on a GPU: launched).
    fn step(&mut self) {}
    /// The last step of this call is done.
    fn end(&mut self) {}
}

impl Watch for () {
    fn say(&mut self, _line: &str) {}
}

/// How a run starts.
pub enum Start<'a> {
    /// From initial weights, in the folder `out`; without it, in the first free one of runs/NAME, runs/NAME-2, ...
    New {
        /// Its settings. If `init` names a model, [`Init::adopt`] must have made them fit it.
        config: &'a Config,
        /// Which of them somebody chose; the others are adapted to the data ([`recipe`]).
        given: &'a Given,
        /// Its folder, which must not hold a run yet.
        out: Option<&'a Path>,
    },
    /// From the newest checkpoint of a run, or step 0 if it has none yet.
    Resume {
        /// The run's folder.
        run: &'a Path,
        /// What changes: settings of [`MAY_CHANGE`](crate::config::MAY_CHANGE) alone.
        changes: Changes<'a>,
    },
}

/// What changes when a run is resumed; by default nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes<'a> {
    /// `KEY=VALUE` as for `--set`, with keys of [`MAY_CHANGE`](crate::config::MAY_CHANGE).
    pub sets: &'a [String],
    /// The new total number of steps.
    pub steps: Option<u32>,
    /// The new place of the same data.
    pub data: Option<&'a str>,
}

/// A trainer and the folder it logs and saves to. The folder is locked against other processes.
pub struct Run {
    trainer: Trainer,
    folder: RunFolder,
    resumed: bool,
    /// What was said while it was opened.
    said: Vec<Event>,
}

impl Run {
    /// Reads the data, reports the cost of the run, and creates or opens its folder.
    ///
    /// A run continues with the settings, the precision and the data it began with, but for
    /// [`MAY_CHANGE`](crate::config::MAY_CHANGE); each checkpoint knows them. It may continue on another device.
    ///
    /// # Errors
    /// Unusable settings, data or checkpoints; settings or data other than the run's own; a folder that is in use; a
    /// run that does not fit into memory.
    pub fn open(start: Start<'_>, device: &Device, watch: &mut dyn Watch) -> Result<Self> {
        Run::open_rank(start, device, Exchange::alone(), watch)
    }

    /// The same of a rank; all of them start alike. The first has the folder, which the others see.
    ///
    /// # Errors
    /// Those of [`Run::open`]; ranks whose settings or checkpoints differ, or that are too many for the micro-batches;
    /// another rank that has ended.
    pub fn open_rank(start: Start<'_>, device: &Device, exchange: Exchange, watch: &mut dyn Watch) -> Result<Self> {
        let mut said = Said { watch, events: Vec::new() };
        let mut run = match start {
            Start::New { config, given, out } => Run::begin(config.clone(), given, out, device, exchange, &mut said),
            Start::Resume { run, changes } => Run::resume(run, changes, device, exchange, &mut said),
        }?;
        run.said = said.events;
        Ok(run)
    }

    fn begin(
        mut config: Config,
        given: &Given,
        out: Option<&Path>,
        device: &Device,
        exchange: Exchange,
        watch: &mut dyn Watch,
    ) -> Result<Self> {
        check_precision(&config, device)?;
        let init = match &config.init[..] {
            "" => None,
            model => Some(Init::open(Path::new(model))?),
        };
        let source = data::Source::open(&config)?;
        let mut given = given.clone();
        if config.model.classifier && !given.has("classes") {
            given.add("classes");
            config.model.classes = source.survey().classes.len();
            if config.model.classes < 2 {
                let what = "has no two classes to tell apart; class folders, or labels beside the images, are needed";
                return Err(Error::file(&config.data, what));
            }
        }
        let mut notes = recipe::suit(&mut config, &given, source.survey(), device, exchange.size())?;
        notes.extend(recipe::suit_ranks(&mut config, &given, exchange.size())?);
        let data = load(source, &mut config, watch)?;
        notes.extend(recipe::adapt_attention(&mut config, &given));
        notes.extend(recipe::suit_flip(&mut config, &given, &data.train));
        if let Some(init) = &init {
            notes.extend(init.settle(&mut config)?);
        }
        config.validate()?;
        for note in &notes {
            watch.say(note);
        }
        agree_on_run(&exchange, &config, &data)?;
        announce(&config, &data, device, exchange.size(), watch)?;
        let skipped = data.skipped.clone();
        let mut trainer = Trainer::of_rank(&config, data, device, exchange)?;
        if let Some(init) = &init {
            init.begin(&mut trainer)?;
        }
        let created = trainer.exchange().is_first().then(|| RunFolder::create(out, &config, watch)).transpose()?;
        let path = created.as_ref().map_or(String::new(), |folder| folder.path.to_string_lossy().into_owned());
        let paths = trainer.exchange().texts(&path)?;
        let folder = created.unwrap_or_else(|| RunFolder::of_first(&paths[0], &config));
        folder.list_skipped(&skipped, watch)?;
        if init.is_some() {
            // From now on the run does not need the model.
            folder.save(&trainer)?;
        }
        Ok(Run { trainer, folder, resumed: false, said: Vec::new() })
    }

    fn resume(
        run: &Path,
        changes: Changes<'_>,
        device: &Device,
        exchange: Exchange,
        watch: &mut dyn Watch,
    ) -> Result<Self> {
        let folder = RunFolder::open(run, exchange.is_first())?;
        let mut config = folder.config.clone();
        config.change(changes.sets)?;
        config.steps = changes.steps.unwrap_or(config.steps);
        config.data = changes.data.map_or(config.data, String::from);
        check_precision(&config, device)?;
        let origin = folder.origin(watch)?;
        if let Some((checkpoint, origin)) = &origin {
            origin.check_settings(checkpoint, &run.join("config.toml"), &config)?;
        }
        if !data::is_there(&config.data) {
            let what = "does not exist; if the data of the run are in another place now, give it with --data PATH";
            return Err(Error::file(&config.data, what));
        }
        let data = load(data::Source::open(&config)?, &mut config, watch)?;
        config.validate()?;
        if let Some((checkpoint, origin)) = &origin {
            origin.check_data(checkpoint, &config.data, &config, &data)?;
        }
        agree_on_run(&exchange, &config, &data)?;
        let newest = origin.as_ref().map_or(String::new(), |(checkpoint, _)| checkpoint.display().to_string());
        agree(&exchange, "newest checkpoint", &newest)?;
        announce(&config, &data, device, exchange.size(), watch)?;
        folder.list_skipped(&data.skipped, watch)?;
        let mut trainer = Trainer::of_rank(&config, data, device, exchange)?;
        folder.restore(&mut trainer, watch)?;
        if !config.init.is_empty() && checkpoint::newest(run)?.is_none() {
            Init::open(Path::new(&config.init))?.begin(&mut trainer)?;
        }
        Ok(Run { trainer, folder, resumed: true, said: Vec::new() })
    }

    /// The settings of a run folder.
    ///
    /// # Errors
    /// `Error::File` if it is none, or its config.toml cannot be read.
    pub fn settings(run: &Path) -> Result<Config> {
        run_folder::read_settings(run)
    }

    /// True if all steps are done.
    pub fn is_done(&self) -> bool {
        self.trainer.steps_done() == self.config().steps
    }

    /// The last call of a rank that has done all its work: waits for the others, and leaves the folder to whoever comes
    /// next.
    ///
    /// # Errors
    /// Another rank that has failed after all.
    pub fn leave(self) -> Result<()> {
        self.trainer.leave()
    }

    /// Its settings.
    pub fn config(&self) -> &Config {
        self.trainer.config()
    }

    /// Its trainer.
    pub fn trainer(&self) -> &Trainer {
        &self.trainer
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// Trains until all steps are done or `stop` is set, and returns the folder of the last checkpoint. Samples that
    /// cannot be drawn or written, and log lines, events, a report or event files of TensorBoard that cannot be
    /// written, do not end it: `watch` is told.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, a checkpoint that cannot be written, a GPU that fails. The message names
    /// the last good checkpoint, which is of the last step if that could be saved and is worth it.
    pub fn train(&mut self, stop: &AtomicBool, watch: &mut dyn Watch) -> Result<PathBuf> {
        let Run { trainer, folder, resumed, said } = self;
        let mut recorder = Recorder::open(&folder.path, trainer, *resumed, std::mem::take(said), watch);
        let mut log = Log::open(&folder.path, folder.writes, trainer.steps_done(), &mut recorder);
        recorder.begin(trainer.steps_done(), trainer.config().steps);
        let ended = steps(trainer, folder, &mut log, stop, &mut recorder);
        recorder.end();
        let ranks = trainer.exchange().size();
        // A run stopped between two readings of the meter may be past its last good step.
        let mut save = || {
            let saved = trainer.reports().and_then(|_| folder.save(trainer))?;
            recorder.saved(trainer.steps_done());
            Ok(saved)
        };
        let saved = match ended {
            Err(e @ Error::NotFinite(_)) => Err(e),
            // The other ranks are somewhere else, and do not help to save.
            Err(e) if ranks > 1 => Err(trainer.exchange().verdict(e)),
            Err(e) => {
                let _: Result<PathBuf> = save();
                Err(e)
            }
            Ok(()) => save(),
        };
        log.close(&mut recorder);
        if let (Some(curve), Ok(_), true) = (trainer.curve(), &saved, folder.writes) {
            // Training can do without it.
            match write_schedule(curve, trainer.steps_done(), &folder.path) {
                Ok(plot) => recorder.say(&format!("learned schedule: {}", plot.display())),
                Err(e) => recorder.warn(&format!("{e}; the checkpoint has the schedule all the same")),
            }
        }
        let saved = saved.map_err(|e| folder.with_last_checkpoint(e));
        let how = match &saved {
            Ok(_) if trainer.steps_done() == trainer.config().steps => How::Done,
            Ok(_) => How::Stopped,
            Err(_) => How::Failed,
        };
        recorder.ended(trainer.steps_done(), how, saved.as_ref().err().map(Error::to_string));
        recorder.report();
        recorder.close();
        saved
    }
}

/// The loop: steps until all are done or `stop` is set, on one of the ranks.
fn steps(
    trainer: &mut Trainer,
    folder: &RunFolder,
    log: &mut Log,
    stop: &AtomicBool,
    watch: &mut Recorder<'_>,
) -> Result<()> {
    let config = trainer.config().clone();
    let mut report = Report::default();
    let mut samples = Fault::default();
    trainer.device().take_notes().iter().for_each(|note| watch.warn(note));
    while trainer.steps_done() < config.steps && trainer.exchange().goes_on(trainer.steps_done() + 1, stop)? {
        let step_started = Instant::now();
        trainer.step()?;
        trainer.device().take_notes().iter().for_each(|note| watch.warn(note));
        let done = trainer.steps_done();
        let finished = done == config.steps;
        let due = |every: u32| every > 0 && done.is_multiple_of(every);
        let due_or_last = |every: u32| due(every) || (finished && every > 0);
        let logs = due(config.log_every) || due(config.validate_every) || finished;
        // Read the meter only before work that needs good weights; otherwise let the GPU run ahead.
        let stops = logs || due(config.sample_every) || due(config.checkpoint_every);
        let read = if stops || trainer.reports_are_due() { trainer.reports()? } else { Vec::new() };
        report.seconds += step_started.elapsed().as_secs_f64();
        if !read.is_empty() {
            read.into_iter().for_each(|step| report.add(step, config.batch));
            watch.measured(report.message());
        }
        watch.step();

        if logs {
            let mut line = report.line(done, &config);
            if let Some(waits) = trainer.take_waits() {
                line["data_waits"] = json!(waits.steps);
                line["data_wait_s"] = json!(waits.seconds);
            }
            if let Some(curve) = trainer.curve() {
                let schedule = curve.average();
                line["log_snr"] = json!([0, schedule.len() - 1].map(|t| -2.0 * schedule.log_sigma(t)));
            }
            if due_or_last(config.validate_every)
                && let Some(held_out) = unless_interrupted(trainer.validate(stop))?
                && let Some(mean) = held_out.quarters.mean()
            {
                line["validation_loss"] = json!(mean);
                line["validation_loss_by_quarter"] = json!(held_out.quarters.means());
                if let Some(vlb) = held_out.vlb {
                    line["validation_vlb"] = json!(vlb);
                }
                let mut said = format!("step {done}: loss {:.4}, validation loss {mean:.4}", report.loss());
                if config.model.classifier {
                    line["validation_accuracy"] = json!(held_out.right.mean());
                    line["validation_accuracy_by_quarter"] = json!(held_out.right.means());
                    said += &accuracies(&held_out.right);
                }
                watch.say(&said);
            }
            watch.line(done, &line);
            log.write(line, watch);
            report = Report::default();
        }
        if due_or_last(config.sample_every) {
            // Neither a full disk nor a GPU that runs out of memory stops the training.
            match draw_samples(trainer, &folder.path, stop) {
                Ok(path) => {
                    samples.is_over(&path, watch);
                    watch.samples(done, &path);
                    if finished {
                        watch.say(&format!("samples: {}", path.display()));
                    }
                }
                Err(Error::Interrupted) => {}
                Err(e) => samples.occurred(&e, "training goes on without these samples", watch),
            }
        }
        if due(config.checkpoint_every) && !finished {
            folder.save(trainer)?;
            watch.saved(done);
            watch.report();
        }
    }
    Ok(())
}

/// Refuses ranks of which one has other settings or data than the first.
fn agree_on_run(exchange: &Exchange, config: &Config, data: &data::Data) -> Result<()> {
    agree(exchange, "settings", &all_settings(config))?;
    if exchange.size() == 1 {
        return Ok(());
    }
    let DataMark { training_images, held_out_images, extent, fingerprint, .. } = DataMark::of(config, data);
    let images = format!("{training_images} training and {held_out_images} held-out images of {extent}");
    agree(exchange, "data", &format!("{images} with the hash {fingerprint} in {}", config.data))
}

/// All settings, a line each.
fn all_settings(config: &Config) -> String {
    let lines = config.entries().map(|(key, value)| format!("{key} = {value}\n"));
    lines.collect::<String>() + &format!("betas = {:?}", config.diffusion.trained_betas)
}

/// Refuses ranks of which one has another `what` than the first, `own` being this one's.
fn agree(exchange: &Exchange, what: &str, own: &str) -> Result<()> {
    let all = exchange.texts(own)?;
    let Some(rank) = all.iter().position(|of_rank| *of_rank != all[0]) else { return Ok(()) };
    let line = |text: &str, number: usize| text.lines().nth(number).unwrap_or("nothing").to_string();
    let differs = (0..).find(|&number| line(&all[0], number) != line(&all[rank], number)).unwrap_or_default();
    Err(Error::Failed(format!(
        "the ranks of a run have the same {what}, but rank 0 has {} and rank {rank} has {}",
        line(&all[0], differs),
        line(&all[rank], differs)
    )))
}

fn check_precision(config: &Config, device: &Device) -> Result<()> {
    if config.precision != device.precision() {
        usage!("precision = {}, but {device} was opened for {}", config.precision, device.precision());
    }
    Ok(())
}

/// Reads the images, says what was done to them, and notes the names of the classes.
fn load(source: data::Source, config: &mut Config, watch: &mut dyn Watch) -> Result<data::Data> {
    let data = source.load(config)?;
    for note in &data.notes {
        watch.say(note);
    }
    if config.model.classes > 0 && !data.classes.is_empty() {
        config.class_names.clone_from(&data.classes);
    }
    Ok(data)
}

/// Reports the cost of the run, and refuses one that does not fit into the memory of one of its ranks.
fn announce(config: &Config, data: &data::Data, device: &Device, ranks: usize, watch: &mut dyn Watch) -> Result<()> {
    let (unet, specs) = UNet::new(&config.model)?;
    let size = config.model.image_size;
    let costs = unet.costs(&specs, size.h, size.w);
    let flops = costs.iter().map(|cost| cost.flops).fold(0, u64::saturating_add);
    let needed = memory::memory_needed(config, &unet, &specs, device, ranks);
    let available = memory::available_on(device);
    watch.say(&format!(
        "{} parameters, {:.2} GFLOP per image and step, {:.2} GiB of memory needed{}; \
         {} training and {} held-out images of {size}x{}; {device}",
        grouped(specs.count() as u64),
        3.0 * flops as f64 / 1e9,
        needed as f64 / GIB,
        available.map_or(String::new(), |available| format!(" ({:.2} GiB available)", available as f64 / GIB)),
        data.train.len(),
        data.held_out.len(),
        config.model.channels,
    ));
    let Some(available) = available else {
        watch.warn("the system does not say how much memory is available, so whether the run fits is not checked");
        return Ok(());
    };
    // Images that are converted leave their memory to the run.
    let images = if device.is_gpu() { 0 } else { data.bytes_in_memory() };
    if available < needed && needed <= available.saturating_add(images) {
        return Err(Error::Failed(format!(
            "this run needs {:.2} GiB of memory and {:.2} GiB are available beside its images, which take {:.2} GiB; \
             {}",
            needed as f64 / GIB,
            available as f64 / GIB,
            images as f64 / GIB,
            data.advice(&config.data),
        )));
    }
    memory::check_fit(config, &unet, &specs, device, ranks, available)
}

/// Draws log-SNR by timestep, at the start and after `done` steps, into schedule.svg, which it returns, and
/// schedule.png. Writes the betas, f32, to betas.npy, for the setting `betas` of another run, such as a classifier's.
fn write_schedule(curve: &Curve, done: u32, run: &Path) -> Result<PathBuf> {
    let series = |name: String, schedule: &Schedule| Series {
        name,
        points: (0..schedule.len()).map(|t| (t as f64, -2.0 * schedule.log_sigma(t))).collect(),
        line: true,
    };
    let (start, average) = (Curve::new(curve.timesteps()).schedule(), curve.average());
    let betas: Vec<f32> = average.betas().iter().map(|&beta| beta as f32).collect();
    output::write_npy(&run.join("betas.npy"), &[betas.len()], &betas)?;
    let plot = Plot {
        title: "Learned noise schedule".into(),
        x: Axis { label: "timestep t".into(), log: false },
        y: Axis { label: "log-SNR, ln(alpha_bar / (1 - alpha_bar))".into(), log: false },
        series: vec![
            series("at the start".into(), &start),
            series(format!("after {done} steps, moving average"), &average),
        ],
        marks: curve.timesteps() <= 50,
    };
    let [svg, _] = write_plot(run, "schedule", &plot)?;
    Ok(svg)
}

/// How often a classifier is right, overall and by quarter of the timesteps, the end of a sentence.
fn accuracies(right: &Quarters) -> String {
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let by_quarter = right.means().map(|mean| mean.map_or("-".into(), percent)).join(", ");
    format!(", {} right ({by_quarter} from least noise to most)", right.mean().map_or("-".into(), percent))
}

/// Turns [`Error::Interrupted`] into `None`.
fn unless_interrupted<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(Error::Interrupted) => Ok(None),
        other => other.map(Some),
    }
}

/// Draws samples with the moving average of the weights into samples/STEP.png, or samples/STEP.npz if a PNG cannot hold
/// them. Each rank draws a share of them.
fn draw_samples(trainer: &Trainer, run: &Path, stop: &AtomicBool) -> Result<PathBuf> {
    let (c, unet, exchange) = (trainer.config(), trainer.unet(), trainer.exchange());
    let sampler = sample::default_sampler(&c.diffusion, &trainer.schedule())?;
    let (steps, average) = (sampler.calls(), trainer.ema()?);
    let drawing = Drawing { device: trainer.device(), unet, params: &average, sampler: &sampler, seed: c.seed };
    // A square of 64 images, or of as many as two cores draw in some twenty seconds, but at least four.
    let size = c.model.image_size;
    let flops: u64 = unet.costs(trainer.params().specs(), size.h, size.w).iter().map(|cost| cost.flops).sum();
    let count = (5_000_000_000_000 / (flops * steps as u64)).clamp(4, 64).isqrt().pow(2) as usize;
    let labels = sample::labels(c.model.classes, None, count)?;
    let own = exchange.rank() * count / exchange.size()..(exchange.rank() + 1) * count / exchange.size();
    let drawn = drawing.images(own, labels.as_deref(), |_| match stop.load(Ordering::Relaxed) {
        true => Err(Error::Interrupted),
        false => Ok(()),
    });
    if exchange.any(matches!(drawn, Err(Error::Interrupted)))? {
        return Err(Error::Interrupted);
    }
    let failed = exchange.any(drawn.is_err())?;
    let images = exchange.gather(drawn.as_deref().unwrap_or_default())?.concat();
    drawn?;
    if failed {
        return Err(Error::Failed("another rank could not draw its share of the samples".into()));
    }
    let shape = drawing.shape(count);
    let folder = run.join("samples");
    let path = folder.join(trainer.steps_done().to_string());
    let png = path.with_extension("png");
    if !exchange.is_first() {
        return Ok(png);
    }
    fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, format!("cannot be created: {e}")))?;
    if output::Target::Png.check(&png, shape).is_ok() {
        output::write_grid(&png, shape, &images)?;
        return Ok(png);
    }
    let npz = path.with_extension("npz");
    output::write_npz(&npz, shape, &images, labels.as_deref())?;
    Ok(npz)
}
