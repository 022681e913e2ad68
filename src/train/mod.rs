//! Training: the loop, top to bottom.
//!
//! A step (algorithm 1 of the paper, for a batch) is [`Trainer::step`]: draw images, timesteps and noise; form x_t;
//! predict the noise; take the loss and its gradient; walk the tape back; clip; update weights, moments and moving
//! average. What a step draws is a pure function of seed and step, so the state of a run is its step number and four
//! flat buffers: weights, moving average, two moments. That is what a checkpoint holds and why a resumed run continues
//! with the same bits.
//!
//! [`Run`] is a [`Trainer`] in a folder: it logs, validates, draws samples and saves. Whoever has a loop of their own
//! takes the [`Trainer`] alone.

mod feed;
mod log;
mod run_folder;
mod trainer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

pub use feed::{Feed, Resident};
pub use trainer::{StepReport, Trainer};

use crate::config::Config;
use crate::data;
use crate::device::Device;
use crate::diffusion::{Method, Sampler, Spacing};
use crate::error::{Error, Result};
use crate::memory;
use crate::output;
use crate::sample::{self, Drawing};
use crate::text::{GIB, grouped};
use crate::unet::UNet;
use log::{Log, Report};
use run_folder::RunFolder;

/// Who follows a run. `()` follows in silence.
pub trait Watch {
    /// A sentence for people, without a line's end.
    fn say(&mut self, line: &str);
    /// Step `done` of `steps` is done, others follow.
    fn begin(&mut self, _done: u32, _steps: u32) {}
    /// What the steps since the last line of the log measured, in words.
    fn measured(&mut self, _text: String) {}
    /// One more step is done; on a GPU, launched.
    fn step(&mut self) {}
    /// All steps are done, or no more follow.
    fn end(&mut self) {}
}

impl Watch for () {
    fn say(&mut self, _line: &str) {}
}

/// How a run starts.
pub enum Start<'a> {
    /// With initial weights, in the folder `out`; without one in the first free of runs/PRESET, runs/PRESET-2, ...
    New {
        /// Its settings.
        config: &'a Config,
        /// Its folder, which must not hold a run.
        out: Option<&'a Path>,
    },
    /// From the newest checkpoint of a run.
    Resume {
        /// The run's folder.
        run: &'a Path,
        /// Steps in all, where it is to be extended.
        steps: Option<u32>,
    },
}

/// A trainer and the folder that it logs and saves to, which no other process trains in meanwhile.
pub struct Run {
    trainer: Trainer,
    folder: RunFolder,
}

impl Run {
    /// Reads the data, says what the run will cost, and makes or opens its folder.
    ///
    /// # Errors
    /// Settings, data or checkpoints that cannot be used; a run that does not fit into memory.
    pub fn open(start: Start<'_>, device: &Device, watch: &mut dyn Watch) -> Result<Self> {
        let (mut config, out, resumed) = match start {
            Start::New { config, out } => (config.clone(), out, None),
            Start::Resume { run, steps } => {
                let run = RunFolder::open(run)?;
                (Config { steps: steps.unwrap_or(run.config.steps), ..run.config.clone() }, None, Some(run))
            }
        };
        let data = data::load(&mut config)?;
        config.validate()?;
        for note in &data.notes {
            watch.say(note);
        }
        announce(&config, &data, device, watch)?;
        let mut trainer = Trainer::new(&config, data, device)?;
        let folder = match resumed {
            Some(run) => {
                run.restore(&mut trainer, watch)?;
                run
            }
            None => RunFolder::create(out, &config, watch)?,
        };
        Ok(Run { trainer, folder })
    }

    /// True if all steps are done.
    pub fn is_done(&self) -> bool {
        self.trainer.steps_done() == self.config().steps
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

    /// Trains until all steps are done or `stop` is set, and returns the folder of the last checkpoint.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, with the place of the last good checkpoint; files that cannot be written.
    pub fn train(&mut self, stop: &AtomicBool, watch: &mut dyn Watch) -> Result<PathBuf> {
        let Run { trainer, folder } = self;
        let config = trainer.config().clone();
        let mut log = Log::open(&folder.path, trainer.steps_done())?;
        let mut report = Report::default();
        watch.begin(trainer.steps_done(), config.steps);

        while trainer.steps_done() < config.steps && !stop.load(Ordering::Relaxed) {
            let step_started = Instant::now();
            trainer.step().map_err(|e| folder.with_last_checkpoint(e))?;
            let done = trainer.steps_done();
            let finished = done == config.steps;
            let due = |every: u32| every > 0 && done.is_multiple_of(every);
            let due_or_last = |every: u32| due(every) || (finished && every > 0);
            let logs = due(config.log_every) || due(config.validate_every) || finished;
            // Whatever follows wants to know that all is well; otherwise a GPU is left to run ahead.
            let stops =
                logs || due(config.sample_every) || due(config.checkpoint_every) || stop.load(Ordering::Relaxed);
            if stops || trainer.reports_are_due() {
                for step in trainer.reports().map_err(|e| folder.with_last_checkpoint(e))? {
                    report.add(step, config.batch);
                }
                watch.measured(report.message());
            }
            report.seconds += step_started.elapsed().as_secs_f64();
            watch.step();

            if logs {
                let mut line = report.line(done);
                if due_or_last(config.validate_every)
                    && let Some(quarters) = unless_interrupted(trainer.validate(stop))?
                    && let Some(mean) = quarters.mean()
                {
                    line["validation_loss"] = json!(mean);
                    line["validation_loss_by_quarter"] = json!(quarters.means());
                    watch.say(&format!("step {done}: loss {:.4}, validation loss {mean:.4}", report.loss()));
                }
                log.write(line)?;
                report = Report::default();
            }
            if due_or_last(config.sample_every) {
                let drawn = draw_samples(trainer, &folder.path, stop).map_err(|e| folder.with_last_checkpoint(e));
                if let Some(path) = unless_interrupted(drawn)?.filter(|_| finished) {
                    watch.say(&format!("samples: {}", path.display()));
                }
            }
            if due(config.checkpoint_every) && !finished {
                folder.save(trainer)?;
            }
        }
        watch.end();
        // A GPU that was told to stop between two readings may have gone past its last good step.
        trainer.reports().map_err(|e| folder.with_last_checkpoint(e))?;
        folder.save(trainer)
    }
}

/// Says what the run will cost, and refuses one that does not fit into memory.
fn announce(config: &Config, data: &data::Data, device: &Device, watch: &mut dyn Watch) -> Result<()> {
    let (unet, specs) = UNet::new(&config.model)?;
    let size = config.model.image_size;
    let flops: u64 = unet.costs(&specs, size.h, size.w).iter().map(|cost| cost.flops).sum();
    let needed = memory::memory_needed(config, &unet, &specs, device);
    let available = memory::available_on(device)?;
    watch.say(&format!(
        "{} parameters, {:.2} GFLOP per image and step, {:.2} GiB of memory needed ({:.2} GiB available); \
         {} training and {} held-out images of {size}x{}; {device}",
        grouped(specs.count() as u64),
        3.0 * flops as f64 / 1e9,
        needed as f64 / GIB,
        available as f64 / GIB,
        data.train.len(),
        data.held_out.len(),
        config.model.channels,
    ));
    memory::check_fit(config, &unet, &specs, device, available)
}

/// What was interrupted is left out.
fn unless_interrupted<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(Error::Interrupted) => Ok(None),
        other => other.map(Some),
    }
}

/// Draws a grid with the moving average into samples/STEP.png, or samples/STEP.npz if the images are no pictures.
fn draw_samples(trainer: &Trainer, run: &Path, stop: &AtomicBool) -> Result<PathBuf> {
    let (c, unet) = (trainer.config(), trainer.unet());
    let steps = sample::DEFAULT_STEPS.min(c.diffusion.timesteps);
    let sampler = Sampler::new(trainer.schedule(), Method::Ancestral(c.diffusion.variance), Spacing::Even, steps)?;
    let drawing = Drawing { device: trainer.device(), unet, params: trainer.ema(), sampler: &sampler, seed: c.seed };
    // A grid of 64, or as many images as take some ten seconds on two cores, but at least four.
    let size = c.model.image_size;
    let flops: u64 = unet.costs(trainer.params().specs(), size.h, size.w).iter().map(|cost| cost.flops).sum();
    let count = (2_000_000_000_000 / (flops * steps as u64)).clamp(4, 64) as usize;
    let labels = sample::labels(c.model.classes, None, count)?;
    let images = drawing.images(count, labels.as_deref(), |_| match stop.load(Ordering::Relaxed) {
        true => Err(Error::Interrupted),
        false => Ok(()),
    })?;
    let shape = drawing.shape(count);
    let path = run.join("samples").join(trainer.steps_done().to_string());
    let png = path.with_extension("png");
    if output::Target::Png.check(&png, shape).is_ok() {
        output::write_grid(&png, shape, &images)?;
        return Ok(png);
    }
    let npz = path.with_extension("npz");
    output::write_npz(&npz, shape, &images, labels.as_deref())?;
    Ok(npz)
}
