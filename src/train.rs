//! `ddpm-cuda train`: the training loop, top to bottom.
//!
//! A step (algorithm 1 of the paper, for a batch): draw images, timesteps and noise; form x_t; predict the noise; take the loss
//! and its gradient; walk the tape back; clip; update weights, moments and moving average. What a step draws is a pure
//! function of seed and step ([`Batch`]), so the state of a run is its step number and four flat buffers: weights,
//! moving average, two moments. That is what a checkpoint holds and why a resumed run continues with the same bits.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::checkpoint;
use crate::clock::Clock;
use crate::config::{Config, Preset};
use crate::data::feed::{Feed, Resident, Rows};
use crate::data::{self, Data, Dataset, Order};
use crate::device::{self, Device};
use crate::diffusion::{Batch, Method, Sampler, Schedule, Spacing};
use crate::error::{Error, Result};
use crate::meter::Meter;
use crate::ops::adam::{State, Update, adam, ema_decay};
use crate::ops::grad_norm::grad_norm;
use crate::ops::loss::{Quarters, loss};
use crate::ops::q_sample::{Coefficients, Noised, q_sample};
use crate::output;
use crate::params::{ParamGrads, Params, Specs};
use crate::sample;
use crate::tape::{Tape, Var};
use crate::tensor::{DType, Shape, Tensor};
use crate::unet::{DropoutSeed, UNet};
use crate::{say, usage};

/// Adam's constants, the paper's and everyone's.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const ADAM_EPS: f64 = 1e-8;

/// Arguments of `ddpm-cuda train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network and recipe to start from: mnist, cifar10 or celebahq256 [default: mnist]
    #[arg(long)]
    pub preset: Option<Preset>,
    /// Images: mnist (built in), .npy, .npz, IDX file or folder, CIFAR-10 binary folder, folder of PNG/JPEG
    #[arg(long, value_name = "mnist|PATH")]
    pub data: Option<String>,
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
    pub on: device::Args,
    /// Continue this run from its newest checkpoint; --steps may extend it
    #[arg(long, value_name = "RUN", conflicts_with_all = ["preset", "data", "out", "config", "set", "batch", "seed"])]
    pub resume: Option<PathBuf>,
}

/// A network in training: everything that changes from step to step.
pub struct Trainer {
    device: Device,
    config: Config,
    data: Data,
    order: Order,
    unet: UNet,
    schedule: Schedule,
    params: Params,
    ema: Params,
    grads: ParamGrads,
    m: Tensor,
    v: Tensor,
    /// Steps done; on a GPU, steps launched.
    step: u32,
    coefficients: Coefficients,
    feed: Feed,
    /// The held-out images on a GPU that has room for the data set.
    held_out: Option<Resident>,
    clock: Clock,
    meter: Meter,
    /// Steps that have been launched and not yet been read from the meter.
    unread: u32,
}

/// What one step reports.
#[derive(Debug)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u32,
    /// L_simple over the step's images.
    pub loss: f64,
    /// The same by quarter of the timesteps.
    pub quarters: Quarters,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
}

impl Trainer {
    /// A network with its initial weights, at step 0. `config` must know the data's image size and channels.
    ///
    /// # Errors
    /// Settings that cannot work, in one sentence.
    pub fn new(config: &Config, data: Data, device: &Device) -> Result<Self> {
        let (unet, specs) = UNet::new(&config.model)?;
        if let Device::Cuda(gpu) = device {
            gpu.memory_is_for(format_args!("the training state"));
        }
        let params = Params::init(device, specs.clone(), config.seed)?;
        let ema = Params::from_host(device, specs.clone(), &params.host()?)?;
        let flat = Shape::vector(specs.flat_len());
        let schedule = Schedule::new(config.diffusion.schedule, config.diffusion.timesteps)?;
        let [train, held_out] = resident(config, &unet, &specs, &data, device)?;
        Ok(Trainer {
            device: device.clone(),
            config: config.clone(),
            order: Order::new(config.seed, data.train.len()),
            data,
            coefficients: Coefficients::new(device, &schedule)?,
            schedule,
            unet,
            grads: ParamGrads::new(device, &specs)?,
            m: Tensor::zeros(device, flat)?,
            v: Tensor::zeros(device, flat)?,
            params,
            ema,
            step: 0,
            feed: Feed::new(device, train.as_ref()),
            held_out,
            clock: Clock::new(device)?,
            meter: Meter::new(device)?,
            unread: 0,
        })
    }

    /// The state that checkpoints hold.
    pub fn state(&self) -> checkpoint::State<'_> {
        checkpoint::State { step: self.step, params: &self.params, ema: &self.ema, m: &self.m, v: &self.v }
    }

    /// The same, to be read from a checkpoint.
    pub fn state_mut(&mut self) -> checkpoint::StateMut<'_> {
        checkpoint::StateMut {
            step: &mut self.step,
            params: &mut self.params,
            ema: &mut self.ema,
            m: &mut self.m,
            v: &mut self.v,
        }
    }

    /// Steps done.
    pub fn steps_done(&self) -> u32 {
        self.step
    }

    /// Where it trains.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The weights.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The moving average of the weights, which samples are drawn with.
    pub fn ema(&self) -> &Params {
        &self.ema
    }

    /// The network.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }

    /// The noise schedule.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// One step on the next images. On a GPU it only launches; what it measured comes from [`reports`](Self::reports).
    ///
    /// # Errors
    /// On the CPU, `Error::Failed` if the loss or the gradient is not finite: with the step, the first tensor that is not, and what to
    /// try. The weights are then still those of the last step. On a GPU that is found by [`reports`](Self::reports).
    pub fn step(&mut self) -> Result<()> {
        self.meter.begin();
        let update = update(&self.config, self.step + 1);
        // The device on the step's clock: what is launched on it reads from the clock what changes from step to step.
        let device = self.clock.begin(self.step, &update, &self.meter)?;
        self.grads.reset();
        for k in 0..self.config.accumulate {
            let (batch, Noised { x_t, t, labels }, masks) = self.draw(&device, k)?;
            let x_t = Var::constant(x_t); // (n, h, w, c)
            let mut tape = Tape::recording(&device, &self.params);
            let eps = self.unet.forward(&mut tape, &x_t, &t, labels.as_ref(), Some(masks))?; // (n, h, w, c)
            let l = loss(&device, eps.value(), &batch, &t, Some(self.config.batch), &mut self.meter)?;
            if let Some(mean) = l.mean().filter(|mean| !mean.is_finite()) {
                self.meter.read()?;
                return Err(self.not_finite(self.step + 1, "loss", mean, &self.inspect(x_t, t, labels, masks)));
            }
            let dy = l.gradient.expect("a training loss has a gradient"); // (n, h, w, c)
            tape.backward(&eps, dy, &mut self.grads)?;
        }

        let g = self.grads.finish(self.params.specs())?;
        grad_norm(&device, g, self.config.grad_clip, &mut self.meter)?;
        if let Meter::Cpu(_) = self.meter {
            let norm = self.meter.host_row().grad_norm;
            if !norm.is_finite() {
                self.meter.read()?;
                let culprit = first_not_finite("gradient", self.params.specs(), g.data());
                return Err(self.not_finite(self.step + 1, "gradient norm", norm, &culprit));
            }
        }
        let state = State { w: &mut self.params, ema: &mut self.ema, m: &mut self.m, v: &mut self.v, g };
        adam(&device, state, &update, &mut self.meter)?;
        self.step += 1;
        self.unread += 1;
        Ok(())
    }

    /// What the steps since the last call measured, one report each; waits for a GPU.
    ///
    /// # Errors
    /// On a GPU, what [`step`](Self::step) says on the CPU; the trainer is then at the last good step.
    pub fn reports(&mut self) -> Result<Vec<StepReport>> {
        let first = self.step - std::mem::take(&mut self.unread);
        let mut reports = Vec::new();
        for (measured, done) in self.meter.read()?.into_iter().zip(first..) {
            let loss = measured.quarters.mean().expect("a step has images");
            if !loss.is_finite() || !measured.grad_norm.is_finite() {
                self.step = done;
                return Err(self.explain_not_finite(loss, measured.grad_norm));
            }
            let step = done + 1;
            reports.push(StepReport {
                step,
                loss,
                quarters: measured.quarters,
                grad_norm: measured.grad_norm,
                learning_rate: learning_rate(&self.config, step),
            });
        }
        Ok(reports)
    }

    /// True if [`reports`](Self::reports) has to be asked before the next step, or costs nothing: always on the CPU.
    pub fn reports_are_due(&self) -> bool {
        matches!(self.meter, Meter::Cpu(_)) || self.meter.is_full()
    }

    /// Does a GPU's step that was not finite again, looking at every tensor on the way.
    fn explain_not_finite(&mut self, loss: f64, grad_norm: f64) -> Error {
        let (step, what, value) = match loss.is_finite() {
            false => (self.step + 1, "loss", loss),
            true => (self.step + 1, "gradient norm", grad_norm),
        };
        // The meter's row of the second look goes with it.
        let found = self.find_not_finite().and_then(|culprit| self.meter.read().map(|_| culprit));
        let culprit = found.unwrap_or_else(|e| format!("looking for the first tensor that is not finite failed: {e}"));
        self.not_finite(step, what, value, &culprit)
    }

    fn find_not_finite(&mut self) -> Result<String> {
        self.meter.begin();
        self.grads.reset();
        for k in 0..self.config.accumulate {
            let device = self.device.clone();
            let (batch, Noised { x_t, t, labels }, masks) = self.draw(&device, k)?;
            let mut tape = Tape::inspecting(&self.device, &self.params);
            let eps = match self.unet.forward(&mut tape, &Var::constant(x_t), &t, labels.as_ref(), Some(masks)) {
                Ok(eps) => eps,
                Err(found) => return Ok(found.to_string()),
            };
            let l = loss(&self.device, eps.value(), &batch, &t, Some(self.config.batch), &mut self.meter)?;
            tape.backward(&eps, l.gradient.expect("a training loss has a gradient"), &mut self.grads)?;
        }
        let specs = self.params.specs();
        Ok(first_not_finite("gradient", specs, &self.grads.finish(specs)?.host()?))
    }

    /// Piece `k` of the next step's batch, noised, and where its dropout masks come from.
    fn draw(&mut self, device: &Device, k: usize) -> Result<(Batch, Noised, DropoutSeed)> {
        let Trainer { config: c, data: Data { train: data, .. }, order, feed, .. } = self;
        let (size, conditional) = (c.batch / c.accumulate, c.model.classes > 0);
        let first = (k * size) as u32;
        // The images' places in the endless sequence that steps take theirs from.
        let place = u64::from(self.step) * c.batch as u64 + u64::from(first);
        let places = place..place + size as u64;
        let indices = order.range(places.clone());
        let labels = data.labels_of(&indices).filter(|_| conditional);
        let rows_in_set = data.rows(&indices);
        let batch = Batch::train(c.seed, self.step, first, rows_in_set, c.flip, c.diffusion.timesteps as u32);
        let batch = batch.with_labels(labels);
        let source = feed.source(data.images(), places, |places| rows(data, order.range(places), conditional))?;
        let noised = q_sample(device, source, &batch, &self.coefficients)?;
        Ok((batch, noised, DropoutSeed { seed: c.seed, step: self.step, first }))
    }

    /// The first tensor of a forward pass that is not finite, in words.
    fn inspect(&self, x_t: Var, t: Tensor, labels: Option<Tensor>, masks: DropoutSeed) -> String {
        let mut tape = Tape::inspecting(&self.device, &self.params);
        let again = self.unet.forward(&mut tape, &x_t, &t, labels.as_ref(), Some(masks));
        again.err().map_or("every tensor of the forward pass is finite".into(), |e| e.to_string())
    }

    /// L_simple of the moving average on the held-out images, each at one timestep that never changes: overall and by
    /// quarter of the timesteps; without images if none are held out.
    ///
    /// # Errors
    /// `Error::Interrupted` once `stop` is set.
    pub fn validate(&self, stop: &AtomicBool) -> Result<Quarters> {
        let c = &self.config;
        let data = &self.data.held_out;
        let size = c.batch / c.accumulate;
        let mut meter = Meter::new(&self.device)?;
        let mut feed = Feed::new(&self.device, self.held_out.as_ref());
        meter.begin();
        let held_out: Vec<usize> = (0..data.len()).collect();
        for (k, indices) in held_out.chunks(size).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let labels = data.labels_of(indices).filter(|_| c.model.classes > 0);
            let first = k * size;
            let batch = Batch::validation(c.seed, first as u32, data.rows(indices), c.diffusion.timesteps as u32);
            let batch = batch.with_labels(labels);
            let source = feed.source(data.images(), first as u64..(first + indices.len()) as u64, |places| {
                let end = places.end.min(data.len() as u64);
                rows(data, (places.start as usize..end as usize).collect(), c.model.classes > 0)
            })?;
            let Noised { x_t, t, labels } = q_sample(&self.device, source, &batch, &self.coefficients)?; // (n, h, w, c)
            let mut tape = Tape::inference(&self.device, &self.ema);
            let eps = self.unet.forward(&mut tape, &Var::constant(x_t), &t, labels.as_ref(), None)?; // (n, h, w, c)
            loss(&self.device, eps.value(), &batch, &t, None, &mut meter)?;
        }
        Ok(meter.read()?.pop().expect("one row").quarters)
    }

    /// Refuses weights that no step could start from; they would make a checkpoint that is not worth its name.
    ///
    /// # Errors
    /// `Error::Failed` as in [`step`](Self::step).
    pub fn check_weights(&self) -> Result<()> {
        let weights = self.params.host()?;
        match weights.iter().find(|v| !v.is_finite()) {
            None => Ok(()),
            Some(&value) => {
                let culprit = first_not_finite("weight", self.params.specs(), &weights);
                Err(self.not_finite(self.step, "largest weight", f64::from(value), &culprit))
            }
        }
    }

    /// `step` counts from 1, as the log does.
    fn not_finite(&self, step: u32, what: &str, value: f64, culprit: &str) -> Error {
        let c = &self.config;
        let clip = if c.grad_clip == 0.0 { "grad_clip=1" } else { "a smaller grad_clip" };
        Error::Failed(format!(
            "step {step}: the {what} is {value}; {culprit}; try a learning_rate below {:?}, more warmup_steps than {} or {clip}",
            c.learning_rate, c.warmup_steps
        ))
    }
}

/// The images `indices` of a set as a feed wants them.
fn rows(data: &Dataset, indices: Vec<usize>, conditional: bool) -> Rows {
    let rows = data.rows(&indices).into_iter().map(|row| row as u32).collect();
    Rows { rows, classes: data.labels_of(&indices).filter(|_| conditional) }
}

/// The numbers of the update of step `step` (from 1).
fn update(c: &Config, step: u32) -> Update {
    let number = u64::from(step);
    Update {
        step: number,
        learning_rate: learning_rate(c, step),
        beta1: BETA1,
        beta2: BETA2,
        eps: ADAM_EPS,
        weight_decay: c.weight_decay,
        ema_decay: ema_decay(c.ema_decay, number),
    }
}

/// The learning rate of step `step` (from 1), warm-up included. The paper's code multiplies by step/warmup, so that its first step
/// does nothing; counting from one does not.
fn learning_rate(c: &Config, step: u32) -> f64 {
    c.learning_rate * (f64::from(step) / f64::from(c.warmup_steps.max(1))).min(1.0)
}

/// Names the first parameter whose `what` is not finite.
fn first_not_finite(what: &str, specs: &Specs, flat: &[f32]) -> String {
    let first = specs.iter().find(|(p, _)| flat[specs.range(*p)].iter().any(|v| !v.is_finite()));
    match first {
        Some((_, spec)) => format!("the first {what} that is not finite is that of {}", spec.name),
        None => format!("every {what} is finite when looked at again"),
    }
}

/// Training and held-out images on the GPU, if they fit beside what training needs. They are one buffer where they are one source's.
fn resident(
    config: &Config,
    unet: &UNet,
    specs: &Specs,
    data: &Data,
    device: &Device,
) -> Result<[Option<Resident>; 2]> {
    let Device::Cuda(gpu) = device else { return Ok([None, None]) };
    let [train, held_out] = [data.train.images(), data.held_out.images()];
    let shared = held_out.pixels.is_empty() || std::ptr::eq(train.pixels, held_out.pixels);
    let bytes = train.pixels.len() + if shared { 0 } else { held_out.pixels.len() };
    if memory_needed(config, unet, specs, device).saturating_add(bytes as u64) > gpu.available_memory()? {
        return Ok([None, None]);
    }
    let train = Resident::new(gpu, train)?;
    let held_out = if shared { train.clone() } else { Resident::new(gpu, held_out)? };
    Ok([Some(train), Some(held_out)])
}

/// Bytes a training run asks of `device`: weights, gradient, two moments and moving average (and the bf16 copies of weights and average); the
/// activations of a piece of a batch, in their type; the gradients and intermediate results alive beside them, half as much again; and
/// scratch space, which on the CPU is the largest weight in Winograd's domain (4 times as many numbers) forward and backward, blocks of attention
/// scores (two of 8 MiB) and the threads' tiles. A GPU's partial sums stay below that.
pub fn memory_needed(config: &Config, unet: &UNet, specs: &Specs, device: &Device) -> u64 {
    const BLOCKS_AND_TILES: u64 = 24 << 20;
    let size = config.model.image_size;
    let activation = device.activations().size() as u64;
    let saved: u64 = unet.costs(specs, size.h, size.w).iter().map(|cost| cost.saved / 4 * activation).sum();
    let piece = (config.batch / config.accumulate) as u64;
    let largest_weight = specs.iter().map(|(_, spec)| spec.shape.len() as u64).max().unwrap_or(0);
    let scratch = 2 * 4 * 4 * largest_weight + BLOCKS_AND_TILES;
    let activations = piece.saturating_mul(saved / 2 * 3);
    let per_weight = 5 * 4 + if device.activations() == DType::Bf16 { 2 * 2 } else { 0 };
    activations.saturating_add(per_weight * specs.flat_len() as u64 + scratch)
}

/// Runs the command.
///
/// # Errors
/// Settings, data or checkpoints that cannot be used; a loss or gradient that is not finite; files that cannot be written.
pub fn run(args: &Args) -> Result<()> {
    let device = args.on.open()?;
    let resumed = args.resume.as_deref().map(RunFolder::open).transpose()?;
    let mut config = match &resumed {
        Some(run) => Config { steps: args.steps.unwrap_or(run.config.steps), ..run.config.clone() },
        None => new_config(args)?,
    };
    let data = data::load(&mut config)?;
    config.validate()?;
    for note in &data.notes {
        say!("{note}");
    }
    let (unet, specs) = UNet::new(&config.model)?;
    announce(&config, &unet, &specs, &data, &device)?;

    let mut trainer = Trainer::new(&config, data, &device)?;
    let run = match resumed {
        Some(run) => {
            run.restore(&mut trainer)?;
            run
        }
        None => RunFolder::create(args.out.as_deref(), &config)?,
    };
    let run = &run.path;
    if trainer.steps_done() == config.steps {
        return Ok(());
    }
    let stop = stop_flag()?;
    let started = Instant::now();
    let mut log = Log::open(run, trainer.steps_done())?;
    let mut report = Report::default();
    let bar = progress_bar(config.steps, trainer.steps_done());

    while trainer.steps_done() < config.steps && !stop.load(Ordering::Relaxed) {
        let step_started = Instant::now();
        trainer.step().map_err(|e| with_last_checkpoint(e, run))?;
        let done = trainer.steps_done();
        let finished = done == config.steps;
        let due = |every: u32| every > 0 && done.is_multiple_of(every);
        let logs = due(config.log_every) || due(config.validate_every) || finished;
        // Whatever follows wants to know that all is well; otherwise a GPU is left to run ahead.
        let stops = logs || due(config.sample_every) || due(config.checkpoint_every) || stop.load(Ordering::Relaxed);
        if stops || trainer.reports_are_due() {
            for step in trainer.reports().map_err(|e| with_last_checkpoint(e, run))? {
                report.add(step, config.batch);
            }
            bar.set_message(report.message());
        }
        report.seconds += step_started.elapsed().as_secs_f64();
        bar.inc(1);

        if logs {
            let mut line = report.line(done);
            if due(config.validate_every) || (finished && config.validate_every > 0) {
                let quarters = unless_interrupted(trainer.validate(&stop))?;
                if let Some((quarters, mean)) = quarters.and_then(|q| q.mean().map(|mean| (q, mean))) {
                    line["validation_loss"] = json!(mean);
                    line["validation_loss_by_quarter"] = json!(quarters.means());
                    above(&bar, &format!("step {done}: loss {:.4}, validation loss {mean:.4}", report.loss()));
                }
            }
            log.write(line)?;
            report = Report::default();
        }
        if (due(config.sample_every) || (finished && config.sample_every > 0))
            && let Some(path) =
                unless_interrupted(draw_samples(&trainer, run, &stop).map_err(|e| with_last_checkpoint(e, run)))?
            && finished
        {
            above(&bar, &format!("samples: {}", path.display()));
        }
        if due(config.checkpoint_every) && !finished {
            save(&trainer, run)?;
        }
    }
    bar.finish_and_clear();
    // A GPU that was told to stop between two readings may have gone past its last good step.
    trainer.reports().map_err(|e| with_last_checkpoint(e, run))?;
    let path = save(&trainer, run)?;
    let seconds = started.elapsed().as_secs_f64();
    if trainer.steps_done() < config.steps {
        say!("stopped after step {} of {}: {}", trainer.steps_done(), config.steps, path.display());
        say!("to go on: ddpm-cuda train --resume {}", run.display());
    } else {
        say!("{} steps, {seconds:.0} s: {}", trainer.steps_done(), path.display());
        say!("to draw images: ddpm-cuda sample --model {} --out samples.png", run.display());
    }
    Ok(())
}

/// The settings of a new run: preset, file, `--set`, then flags.
fn new_config(args: &Args) -> Result<Config> {
    let mut config = Config::build(args.preset, args.config.as_deref(), &args.set)?;
    if let Some(data) = &args.data {
        config.data.clone_from(data);
    }
    config.steps = args.steps.unwrap_or(config.steps);
    config.batch = args.batch.unwrap_or(config.batch);
    config.seed = args.seed.unwrap_or(config.seed);
    if !config.data.is_empty() && config.data != "mnist" {
        // So that the run can be continued from another folder.
        let absolute = std::path::absolute(&config.data).ok();
        config.data = absolute.and_then(|p| p.into_os_string().into_string().ok()).unwrap_or(config.data);
    }
    config.validate()?;
    Ok(config)
}

/// Says what the run will cost, and refuses one that does not fit into memory.
fn announce(config: &Config, unet: &UNet, specs: &Specs, data: &Data, device: &Device) -> Result<()> {
    const GIB: f64 = (1u64 << 30) as f64;
    let size = config.model.image_size;
    let flops: u64 = unet.costs(specs, size.h, size.w).iter().map(|cost| cost.flops).sum();
    let needed = memory_needed(config, unet, specs, device);
    let available = match device {
        Device::Cpu(_) => available_memory()?,
        Device::Cuda(gpu) => gpu.available_memory()?,
    };
    say!(
        "{} parameters, {:.2} GFLOP per image and step, {:.2} GiB of memory needed ({:.2} GiB available); {} training and {} held-out images of {size}x{}; {device}",
        crate::info::grouped(specs.count() as u64),
        3.0 * flops as f64 / 1e9,
        needed as f64 / GIB,
        available as f64 / GIB,
        data.train.len(),
        data.held_out.len(),
        config.model.channels,
    );
    if needed > available {
        let fits = |accumulate: &usize| {
            config.batch.is_multiple_of(*accumulate)
                && memory_needed(&Config { accumulate: *accumulate, ..config.clone() }, unet, specs, device)
                    <= available
        };
        let advice = match (config.accumulate + 1..=config.batch).find(fits) {
            None => {
                "one image at a time is too much already, so use smaller widths, fewer classes or smaller images".into()
            }
            Some(accumulate) => {
                let batch = config.batch / accumulate;
                format!("use --batch {batch}, or --set accumulate={accumulate} for the same result in pieces")
            }
        };
        return Err(Error::Failed(format!(
            "this run needs {:.2} GiB of memory and {:.2} GiB are available: {advice}",
            needed as f64 / GIB,
            available as f64 / GIB,
        )));
    }
    Ok(())
}

/// Bytes of memory that this process may still take, of the machine's or its control group's.
///
/// # Errors
/// A machine that does not say.
pub fn available_memory() -> Result<u64> {
    let memory = sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram());
    let system = sysinfo::System::new_with_specifics(memory);
    if system.total_memory() == 0 {
        return Err(Error::Failed("the machine does not say how much memory it has".into()));
    }
    let limit = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    Ok(system.available_memory().min(limit))
}

/// A run folder in which no other process trains until this is dropped: two would delete each other's files.
struct RunFolder {
    path: PathBuf,
    /// What its config.toml says.
    config: Config,
    _lock: Option<File>,
}

impl RunFolder {
    /// Makes a folder with its config.toml: the one asked for, which must not hold a run, or the first free of runs/PRESET,
    /// runs/PRESET-2, ...
    fn create(out: Option<&Path>, config: &Config) -> Result<Self> {
        let failed = |path: &Path, e| Error::file(path, format!("cannot be created: {e}"));
        let path = match out {
            Some(out) => {
                fs::create_dir_all(out).map_err(|e| failed(out, e))?;
                out.to_path_buf()
            }
            None => first_free(config.preset).map_err(|e| failed(Path::new("runs"), e))?,
        };
        let lock = lock(&path)?;
        if path.join("config.toml").exists() {
            let what =
                format!("already holds a run: continue it with --resume {}, or choose another --out", path.display());
            return Err(Error::file(&path, what));
        }
        for sub in [path.join("samples"), path.join("checkpoints")] {
            fs::create_dir_all(&sub).map_err(|e| failed(&sub, e))?;
        }
        output::write_atomically(&path.join("config.toml"), config.to_toml().as_bytes())?;
        say!("run folder: {}", path.display());
        Ok(RunFolder { path, config: config.clone(), _lock: lock })
    }

    /// Opens one to be continued.
    fn open(path: &Path) -> Result<Self> {
        let settings = path.join("config.toml");
        if !settings.is_file() {
            return Err(Error::file(path, "is not a run folder: it holds no config.toml"));
        }
        let lock = lock(path)?;
        Ok(RunFolder { path: path.to_path_buf(), config: Config::read(&settings)?, _lock: lock })
    }

    /// Brings `trainer` to the newest checkpoint, and the folder to the trainer's settings; only the number of steps can differ.
    fn restore(&self, trainer: &mut Trainer) -> Result<()> {
        let damaged = checkpoint::damaged(&self.path)?;
        match (checkpoint::newest(&self.path)?, damaged.last()) {
            (Some(newest), _) => checkpoint::restore(&newest, trainer.state_mut())?,
            (None, Some(damaged)) => {
                let what = "is damaged, and there is no other checkpoint; delete it to begin again from step 0";
                return Err(Error::file(damaged, what));
            }
            (None, None) => {}
        }
        for damaged in damaged {
            say!("{} is damaged and left out", damaged.display());
        }
        let (steps, done) = (trainer.config.steps, trainer.steps_done());
        if steps < done {
            usage!("steps = {steps}: {} has done {done} already; give more with --steps", self.path.display());
        }
        if steps != self.config.steps {
            output::write_atomically(&self.path.join("config.toml"), trainer.config.to_toml().as_bytes())?;
        }
        for folder in [self.path.clone(), self.path.join("samples")].iter().filter(|folder| folder.is_dir()) {
            output::remove_unfinished(folder)?;
        }
        if steps == done {
            say!("{} has done its {done} steps; to extend it give more with --steps", self.path.display());
        } else {
            say!("{} continues after step {done}", self.path.display());
        }
        Ok(())
    }
}

/// Makes the first of runs/PRESET, runs/PRESET-2, ... that does not exist.
fn first_free(preset: Preset) -> std::io::Result<PathBuf> {
    fs::create_dir_all("runs")?;
    for k in 1u32.. {
        let path = Path::new("runs").join(if k == 1 { preset.to_string() } else { format!("{preset}-{k}") });
        match fs::create_dir(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| path),
        }
    }
    unreachable!("four billion runs")
}

/// Locks a run folder; it is free again when the file is closed, however the process ends. `None` where a system has no locks on
/// folders.
fn lock(run: &Path) -> Result<Option<File>> {
    let Ok(folder) = File::open(run) else { return Ok(None) };
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(fs::TryLockError::WouldBlock) => Err(Error::file(
            run,
            "is in use: another process trains in it; wait for it to end, or choose another --out",
        )),
        Err(fs::TryLockError::Error(_)) => Ok(None),
    }
}

/// Set by the first Ctrl-C (or SIGTERM); another ends the program at once, unless it comes within a second: `timeout` and job
/// schedulers signal a process and then its whole group, and mean one signal.
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

fn save(trainer: &Trainer, run: &Path) -> Result<PathBuf> {
    let saved = trainer.check_weights().and_then(|()| checkpoint::save(run, &trainer.config, trainer.state()));
    saved.map_err(|e| with_last_checkpoint(e, run))
}

/// What was interrupted is left out.
fn unless_interrupted<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(Error::Interrupted) => Ok(None),
        other => other.map(Some),
    }
}

fn with_last_checkpoint(error: Error, run: &Path) -> Error {
    if matches!(error, Error::Interrupted) {
        return error;
    }
    let last = match checkpoint::newest(run) {
        Ok(Some(path)) => format!("the last good checkpoint is {}", path.display()),
        _ => "there is no checkpoint yet".into(),
    };
    Error::Failed(format!("{error}; {last}"))
}

/// Draws a grid with the moving average into samples/STEP.png, or samples/STEP.npz if the images are no pictures.
fn draw_samples(trainer: &Trainer, run: &Path, stop: &AtomicBool) -> Result<PathBuf> {
    let c = &trainer.config;
    let steps = sample::DEFAULT_STEPS.min(c.diffusion.timesteps);
    let sampler = Sampler::new(&trainer.schedule, Method::Ancestral(c.diffusion.variance), Spacing::Even, steps)?;
    let drawing = sample::Drawing {
        device: &trainer.device,
        unet: &trainer.unet,
        params: &trainer.ema,
        sampler: &sampler,
        seed: c.seed,
    };
    // A grid of 64, or as many images as take some ten seconds on two cores, but at least four.
    let size = c.model.image_size;
    let flops: u64 = trainer.unet.costs(trainer.params.specs(), size.h, size.w).iter().map(|cost| cost.flops).sum();
    let count = (2_000_000_000_000 / (flops * steps as u64)).clamp(4, 64) as usize;
    let labels: Option<Vec<u32>> =
        (c.model.classes > 0).then(|| (0..count).map(|i| (i % c.model.classes) as u32).collect());
    let images = drawing.images(count, labels.as_deref(), |_| match stop.load(Ordering::Relaxed) {
        true => Err(Error::Interrupted),
        false => Ok(()),
    })?;
    let shape = drawing.shape(count);
    let path = run.join("samples").join(trainer.step.to_string());
    let png = path.with_extension("png");
    if output::Target::Png.check(&png, shape).is_ok() {
        output::write_grid(&png, shape, &images)?;
        return Ok(png);
    }
    let npz = path.with_extension("npz");
    output::write_npz(&npz, shape, &images, labels.as_deref())?;
    Ok(npz)
}

/// A bar on a terminal; nothing elsewhere.
fn progress_bar(steps: u32, done: u32) -> ProgressBar {
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}, {eta} left").expect("a valid template");
    let bar = ProgressBar::new(u64::from(steps)).with_style(style).with_position(u64::from(done));
    bar.reset_eta();
    bar
}

/// A line above the bar, or on standard output where there is none.
fn above(bar: &ProgressBar, line: &str) {
    bar.suspend(|| say!("{line}"));
}

/// What has come together since the last line of the log.
#[derive(Default)]
struct Report {
    /// The last of the steps.
    last: Option<StepReport>,
    steps: u32,
    loss: f64,
    quarters: Quarters,
    images: usize,
    seconds: f64,
}

impl Report {
    fn add(&mut self, step: StepReport, images: usize) {
        self.steps += 1;
        self.loss += step.loss;
        self.quarters.merge(&step.quarters);
        self.images += images;
        self.last = Some(step);
    }

    /// Mean loss of the steps.
    fn loss(&self) -> f64 {
        self.loss / f64::from(self.steps)
    }

    fn images_per_s(&self) -> f64 {
        self.images as f64 / self.seconds
    }

    fn message(&self) -> String {
        format!("loss {:.4}, {:.0} images/s", self.loss(), self.images_per_s())
    }

    fn line(&self, done: u32) -> serde_json::Value {
        json!({
            "step": done,
            "loss": self.loss(),
            "loss_by_quarter": self.quarters.means(),
            "grad_norm": self.last.as_ref().map(|step| step.grad_norm),
            "lr": self.last.as_ref().map(|step| step.learning_rate),
            "images_per_s": self.images_per_s(),
        })
    }
}

/// metrics.jsonl: one object a line.
struct Log {
    path: PathBuf,
    file: fs::File,
    /// Seconds of the run before this process, and when this process began.
    before: f64,
    started: Instant,
}

impl Log {
    /// Opens the log of a run that continues after step `done`: later lines, and a last one that a crash cut short, go.
    fn open(run: &Path, done: u32) -> Result<Self> {
        let path = run.join("metrics.jsonl");
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            other => other.map_err(|e| Error::file(&path, format!("cannot be read: {e}")))?,
        };
        let mut kept = String::new();
        let mut before = 0.0;
        for line in text.lines() {
            let Ok(value) = serde_json::from_str::<serde_json::Value>(line) else { continue };
            if value["step"].as_u64().is_some_and(|step| step <= u64::from(done)) {
                before = value["elapsed_s"].as_f64().unwrap_or(before);
                kept.push_str(line);
                kept.push('\n');
            }
        }
        output::write_atomically(&path, kept.as_bytes())?;
        let file = fs::OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|e| Error::file(&path, format!("cannot be written: {e}")))?;
        Ok(Log { path, file, before, started: Instant::now() })
    }

    fn write(&mut self, mut line: serde_json::Value) -> Result<()> {
        line["elapsed_s"] = json!(self.before + self.started.elapsed().as_secs_f64());
        let written = writeln!(self.file, "{line}");
        written.map_err(|e| Error::file(&self.path, format!("cannot be written: {e}")))
    }
}
