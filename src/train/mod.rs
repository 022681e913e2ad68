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

mod feed;
mod init;
mod log;
mod run_folder;
mod trainer;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::json;

pub use feed::{Feed, Resident};
pub use init::Init;
pub use trainer::{StepReport, Trainer};

use crate::checkpoint;
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

/// Receives the progress of a run. `()` ignores it.
pub trait Watch {
    /// A sentence for the user, without a newline.
    fn say(&mut self, line: &str);
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
    /// From initial weights, in the folder `out`; without it, in the first free one of runs/PRESET, runs/PRESET-2, ...
    New {
        /// Its settings. If `init` names a model, [`Init::adopt`] must have made them fit it.
        config: &'a Config,
        /// Its folder, which must not hold a run yet.
        out: Option<&'a Path>,
    },
    /// From the newest checkpoint of a run, or step 0 if it has none yet.
    Resume {
        /// The run's folder.
        run: &'a Path,
        /// The new total number of steps, to extend the run.
        steps: Option<u32>,
    },
}

/// A trainer and the folder it logs and saves to. The folder is locked against other processes.
pub struct Run {
    trainer: Trainer,
    folder: RunFolder,
}

impl Run {
    /// Reads the data, reports the cost of the run, and creates or opens its folder.
    ///
    /// # Errors
    /// Unusable settings, data or checkpoints; a folder that is in use; a run that does not fit into memory.
    pub fn open(start: Start<'_>, device: &Device, watch: &mut dyn Watch) -> Result<Self> {
        let (mut config, out, resumed) = match start {
            Start::New { config, out } => (config.clone(), out, None),
            Start::Resume { run, steps } => {
                let run = RunFolder::open(run)?;
                (Config { steps: steps.unwrap_or(run.config.steps), ..run.config.clone() }, None, Some(run))
            }
        };
        let init = match &resumed {
            None if !config.init.is_empty() => Some(Init::open(Path::new(&config.init))?),
            _ => None,
        };
        let data = data::load(&mut config)?;
        let settled = init.as_ref().map(|init| init.settle(&mut config)).transpose()?;
        config.validate()?;
        for note in data.notes.iter().chain(settled.iter().flatten()) {
            watch.say(note);
        }
        announce(&config, &data, device, watch)?;
        let mut trainer = Trainer::new(&config, data, device)?;
        let folder = match resumed {
            Some(run) => {
                run.restore(&mut trainer, watch)?;
                if !config.init.is_empty() && checkpoint::newest(&run.path)?.is_none() {
                    Init::open(Path::new(&config.init))?.begin(&mut trainer)?;
                }
                run
            }
            None => {
                init.as_ref().map_or(Ok(()), |init| init.begin(&mut trainer))?;
                let folder = RunFolder::create(out, &config, watch)?;
                if init.is_some() {
                    // From now on the run does not need the model.
                    folder.save(&trainer)?;
                }
                folder
            }
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
    /// A loss or gradient that is not finite (the message names the last good checkpoint); files that cannot be
    /// written.
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
            // Read the meter only before work that needs good weights; otherwise let the GPU run ahead.
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
        // A run stopped between two readings of the meter may be past its last good step.
        trainer.reports().map_err(|e| folder.with_last_checkpoint(e))?;
        folder.save(trainer)
    }
}

/// Reports the cost of the run, and refuses one that does not fit into memory.
fn announce(config: &Config, data: &data::Data, device: &Device, watch: &mut dyn Watch) -> Result<()> {
    let (unet, specs) = UNet::new(&config.model)?;
    let size = config.model.image_size;
    let flops: u64 = unet.costs(&specs, size.h, size.w).iter().map(|cost| cost.flops).sum();
    let needed = memory::memory_needed(config, &unet, &specs, device);
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
    match available {
        Some(available) => memory::check_fit(config, &unet, &specs, device, available),
        None => {
            watch.say("the system does not say how much memory is available, so whether the run fits is not checked");
            Ok(())
        }
    }
}

/// Turns [`Error::Interrupted`] into `None`.
fn unless_interrupted<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(Error::Interrupted) => Ok(None),
        other => other.map(Some),
    }
}

/// Draws samples with the moving average of the weights into samples/STEP.png, or samples/STEP.npz if a PNG cannot hold
/// them.
fn draw_samples(trainer: &Trainer, run: &Path, stop: &AtomicBool) -> Result<PathBuf> {
    let (c, unet) = (trainer.config(), trainer.unet());
    let steps = sample::DEFAULT_STEPS.min(c.diffusion.timesteps);
    let sampler = Sampler::new(trainer.schedule(), Method::Ancestral(c.diffusion.variance), Spacing::Even, steps)?;
    let drawing = Drawing { device: trainer.device(), unet, params: trainer.ema(), sampler: &sampler, seed: c.seed };
    // 64 images, or as many as two cores draw in some ten seconds, but at least four.
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
