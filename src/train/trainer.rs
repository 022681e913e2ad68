//! A network in training: the state of a run and one step of it, algorithm 1 of the paper.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use super::ahead::{Ahead, Waits};
use super::feed::{Feed, Resident};
use super::learning::Learning;
use super::losses::Losses;
use crate::checkpoint::{self, DataMark};
use crate::clock::Clock;
use crate::conditioning::Conditioning;
use crate::config::Config;
use crate::data::{Data, Dataset, Order};
use crate::device::Device;
use crate::device::cuda::{Repeated, eager_note};
use crate::diffusion::{Batch, Curve, Importance, Kind, Sampling, Schedule};
use crate::error::{Error, Result};
use crate::images::Source;
use crate::memory::memory_needed;
use crate::meter::{Meter, Quarters};
use crate::ops::adam::{State, Update, adam, ema_decay};
use crate::ops::cross_entropy::cross_entropy;
use crate::ops::grad_norm::grad_norm;
use crate::ops::loss::{self, Loss, Table};
use crate::ops::q_sample::{Coefficients, Noised, q_sample};
use crate::params::{ParamGrads, Params, Specs};
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::unet::{DropoutSeed, UNet};

/// Adam's usual constants, also the paper's.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const ADAM_EPS: f64 = 1e-8;

/// What the launches of a step are called in messages.
const A_STEP: &str = "a training step";

/// A network in training: everything that changes from step to step.
pub struct Trainer {
    device: Device,
    config: Config,
    data: Data,
    unet: UNet,
    /// The noise schedule, unless it is learned.
    schedule: Schedule,
    /// The noise schedule, if it is learned.
    learning: Option<Learning>,
    params: Params,
    ema: Params,
    grads: ParamGrads,
    m: Tensor,
    v: Tensor,
    /// Steps done; on a GPU, steps launched.
    step: u32,
    inputs: Inputs,
    /// The objective.
    table: Table,
    /// The held-out images, if they are resident on a GPU.
    held_out: Option<Resident>,
    clock: Clock,
    meter: Meter,
    /// Steps launched but not yet read from the meter.
    unread: u32,
    /// The launches of a step, on a GPU.
    launches: Repeated,
    /// What its checkpoints say of the data.
    mark: DataMark,
}

/// The measurements of one step.
#[derive(Debug)]
pub struct StepReport {
    /// Number of the step, counted from 1.
    pub step: u32,
    /// The loss, of a classifier the cross-entropy, the mean over the step's images.
    pub loss: f64,
    /// The mean of T times a term of the bound, in bits per dimension, if the loss has one: an estimate of the bound
    /// without L_T.
    pub vlb: Option<f64>,
    /// The same by quarter of the timesteps.
    pub quarters: Quarters,
    /// Of a classifier: the share of images whose class it tells rightly, by quarter of the timesteps.
    pub right: Quarters,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
}

impl Trainer {
    /// A network with its initial weights, at step 0. `config` must know the data's image size and channels; its
    /// precision becomes the device's.
    ///
    /// # Errors
    /// Settings that cannot work; a GPU without enough memory.
    pub fn new(config: &Config, data: Data, device: &Device) -> Result<Self> {
        let (unet, specs) = UNet::new(&config.model)?;
        if let Device::Cuda(gpu) = device {
            gpu.memory_is_for(format_args!("the training state"));
        }
        let params = Params::init(device, specs.clone(), config.seed)?;
        let ema = Params::from_host(device, specs.clone(), &params.host()?)?;
        let flat = Shape::vector(specs.flat_len());
        let schedule = config.diffusion.noise_schedule()?;
        let [train, held_out] = resident(config, &unet, &specs, &data, device)?;
        let is_learned = config.diffusion.schedule == Kind::Learned;
        Ok(Trainer {
            device: device.clone(),
            config: Config { precision: device.precision(), ..config.clone() },
            mark: DataMark::of(config, &data),
            inputs: Inputs {
                order: Order::new(config.seed, data.train.len()),
                ahead: train.is_none().then(|| Ahead::new(&data.train, Order::new(config.seed, data.train.len()))),
                feed: Feed::new(device, train.as_ref()),
                coefficients: Coefficients::new(device, &schedule)?,
                losses: (config.timestep_sampling == Sampling::Importance)
                    .then(|| Losses::new(device, Importance::new(schedule.len(), config.batch), config.accumulate)),
            },
            learning: is_learned.then(|| Learning::new(device, schedule.len(), &data.train)),
            data,
            table: Table::new(device, config.objective()?)?,
            schedule,
            unet,
            grads: ParamGrads::new(device, &specs)?,
            m: Tensor::zeros(device, flat)?,
            v: Tensor::zeros(device, flat)?,
            params,
            ema,
            step: 0,
            held_out,
            clock: Clock::new(device)?,
            meter: Meter::new(device)?,
            unread: 0,
            launches: launches(device, config),
        })
    }

    /// The state that a checkpoint holds. With importance sampling on a GPU, after [`reports`](Self::reports).
    pub fn state(&self) -> checkpoint::State<'_> {
        checkpoint::State {
            step: self.step,
            params: &self.params,
            ema: &self.ema,
            m: &self.m,
            v: &self.v,
            data: Some(&self.mark),
            importance: self.inputs.losses.as_ref().map(Losses::known),
            curve: self.learning.as_ref().map(Learning::curve),
        }
    }

    /// The same, to be filled from a checkpoint.
    pub fn state_mut(&mut self) -> checkpoint::StateMut<'_> {
        // Whoever gets it may put other buffers in place of these.
        self.launches.forget();
        checkpoint::StateMut {
            step: &mut self.step,
            params: &mut self.params,
            ema: &mut self.ema,
            m: &mut self.m,
            v: &mut self.v,
            importance: self.inputs.losses.as_mut().map(Losses::known_mut),
            curve: self.learning.as_mut().map(Learning::curve_mut),
        }
    }

    /// Begins with the weights `given`, which are also the first moving average. A parameter, or a row of the classes,
    /// that they lack begins at zero.
    ///
    /// # Errors
    /// A GPU error.
    pub(super) fn begin_with(&mut self, given: &Params) -> Result<()> {
        let (specs, values) = (self.params.specs(), given.host()?);
        let mut flat = vec![0.0; specs.flat_len()];
        for (p, spec) in specs.iter() {
            if let Some((theirs, _)) = given.specs().iter().find(|(_, theirs)| theirs.name == spec.name) {
                // A table of classes may have a row more than theirs, at its end.
                let values = &values[given.specs().range(theirs)];
                flat[specs.range(p)][..values.len()].copy_from_slice(values);
            }
        }
        self.params.write(&flat)?;
        self.ema.write(&flat)
    }

    /// Steps done; on a GPU, steps launched.
    pub fn steps_done(&self) -> u32 {
        self.step
    }

    /// Its settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The device it trains on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The weights.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The moving average of the weights, with which samples are drawn.
    pub fn ema(&self) -> &Params {
        &self.ema
    }

    /// The network.
    pub fn unet(&self) -> &UNet {
        &self.unet
    }

    /// The noise schedule, of a learned one the moving average, with which samples are drawn.
    pub fn schedule(&self) -> Cow<'_, Schedule> {
        match &self.learning {
            Some(learning) => Cow::Owned(learning.curve().average()),
            None => Cow::Borrowed(&self.schedule),
        }
    }

    /// A schedule in training.
    pub fn curve(&self) -> Option<&Curve> {
        self.learning.as_ref().map(Learning::curve)
    }

    /// One step on the next images: algorithm 1 of the paper, for a batch. On a GPU it only launches the work, from the
    /// second step on as a CUDA graph. [`reports`](Self::reports) returns the measurements.
    ///
    /// # Errors
    /// On the CPU, `Error::NotFinite` if the loss or the gradient is not finite; it names the step, the first
    /// non-finite tensor and what to try. The weights are then those of the last good step. On a GPU,
    /// [`reports`](Self::reports) returns this error.
    pub fn step(&mut self) -> Result<()> {
        self.meter.begin();
        if let Some(losses) = &mut self.inputs.losses {
            losses.begin(&self.table)?;
        }
        if let Some(learning) = &mut self.learning {
            learning.begin()?;
            let schedule = learning.curve().schedule();
            self.table.follow(&schedule)?;
            self.inputs.coefficients.follow(&schedule)?;
        }
        let place = self.inputs.begin(&self.config, &self.data.train, self.step)?;
        let update = update(&self.config, self.step + 1);
        // A handle of the device bound to the step's clock, from which kernels read what changes from step to step.
        let device = self.clock.begin(self.step, place, update.factors(), self.meter.row())?;
        match &device {
            Device::Cuda(gpu) => {
                let mut launches = std::mem::replace(&mut self.launches, Repeated::new(A_STEP));
                let done = launches.run(gpu, || self.compute(&device, &update));
                self.launches = launches;
                done?;
            }
            Device::Cpu(_) | Device::Meta(_) => self.compute(&device, &update)?,
        }
        if let Some(learning) = &mut self.learning {
            learning.update(&self.table, &update)?;
        }
        self.step += 1;
        self.unread += 1;
        Ok(())
    }

    /// Everything of a step that is computed on `device`.
    fn compute(&mut self, device: &Device, update: &Update) -> Result<()> {
        self.meter.restart();
        self.grads.reset();
        for k in 0..self.config.accumulate {
            let batch = self.inputs.draw(device, &self.config, &self.data.train, self.step, k)?;
            let mut tape = Tape::recording(device, &self.params).recomputing(self.config.recompute);
            let Passed { x_t, t, y, mut loss, batch, source } =
                forward_loss(&self.unet, &mut tape, &self.table, batch, &mut self.meter)?;
            if let Some(mean) = loss.mean().filter(|mean| !mean.is_finite()) {
                return Err(self.explain_not_finite("loss", mean));
            }
            let dy = loss.gradient.take().expect("a training loss has a gradient");
            let mut leaves = tape.backward(&y, dy, &mut self.grads)?;
            if let Some(learning) = &mut self.learning {
                let dx = leaves.take(&x_t).expect("the output depends on x_t"); // (n, h, w, c)
                let sums = loss::of_schedule(device, (y.value(), &dx), source, &batch, &t, &self.table)?;
                learning.add(&self.table, batch.t(), sums, loss.image, self.config.batch)?;
            }
            if let (Some(losses), Some(_)) = (&mut self.inputs.losses, &batch.weights) {
                losses.add(&batch.t(), &loss)?;
            }
        }

        let g = self.grads.finish(self.params.specs())?;
        grad_norm(device, g, self.config.grad_clip, &mut self.meter)?;
        if let Meter::Cpu(_) = self.meter {
            let norm = self.meter.host_row().grad_norm;
            if !norm.is_finite() {
                return Err(self.explain_not_finite("gradient norm", norm));
            }
        }
        let state = State { w: &mut self.params, ema: &mut self.ema, m: &mut self.m, v: &mut self.v, g };
        adam(device, state, update, &mut self.meter)
    }

    /// Launches in the CUDA graph of a step; `None` if there is no graph (yet).
    pub fn launches_captured(&self) -> Option<usize> {
        self.launches.launches()
    }

    /// The measurements of the steps since the last call, one report each. Waits for the GPU.
    ///
    /// # Errors
    /// On a GPU, the error that [`step`](Self::step) returns on the CPU. The trainer is then at the last good step.
    pub fn reports(&mut self) -> Result<Vec<StepReport>> {
        let steps = self.step - std::mem::take(&mut self.unread)..self.step;
        let mut reports = Vec::new();
        let has_bound = self.table.objective().loss().has_bound();
        if let Some(losses) = &mut self.inputs.losses {
            losses.finish(&self.table)?;
        }
        // A step that failed half-way has left a row of its own.
        for (measured, done) in self.meter.read()?.into_iter().zip(steps) {
            let loss = measured.quarters.mean().expect("a step has images");
            if !loss.is_finite() || !measured.grad_norm.is_finite() {
                self.step = done;
                return Err(match loss.is_finite() {
                    false => self.explain_not_finite("loss", loss),
                    true => self.explain_not_finite("gradient norm", measured.grad_norm),
                });
            }
            let step = done + 1;
            reports.push(StepReport {
                step,
                loss,
                vlb: has_bound.then(|| measured.vlb_sum / self.config.batch as f64),
                quarters: measured.quarters,
                right: measured.right,
                grad_norm: measured.grad_norm,
                learning_rate: learning_rate(&self.config, step),
            });
        }
        Ok(reports)
    }

    /// True if [`reports`](Self::reports) must be called before the next step (the meter of a GPU is full) or costs
    /// nothing (the CPU).
    pub fn reports_are_due(&self) -> bool {
        matches!(self.meter, Meter::Cpu(_)) || self.meter.is_full()
    }

    /// Runs the next step again to find the first non-finite tensor, given that its `what` is `value`, which is not
    /// finite.
    fn explain_not_finite(&mut self, what: &str, value: f64) -> Error {
        let found = self.find_not_finite();
        let culprit = found.unwrap_or_else(|e| format!("looking for the first tensor that is not finite failed: {e}"));
        self.not_finite(self.step + 1, what, value, &culprit)
    }

    /// Describes the first non-finite tensor of the next step. The meter is empty afterwards.
    fn find_not_finite(&mut self) -> Result<String> {
        self.meter.read()?;
        self.meter.begin();
        self.grads.reset();
        let device = self.device.clone();
        self.inputs.begin(&self.config, &self.data.train, self.step)?;
        for k in 0..self.config.accumulate {
            let batch = self.inputs.draw(&device, &self.config, &self.data.train, self.step, k)?;
            let mut tape = Tape::inspecting(&self.device, &self.params).recomputing(self.config.recompute);
            match forward_loss(&self.unet, &mut tape, &self.table, batch, &mut self.meter) {
                Ok(Passed { y, loss, .. }) => {
                    let dy = loss.gradient.expect("a training loss has a gradient");
                    tape.backward(&y, dy, &mut self.grads)?;
                }
                Err(found) => {
                    self.meter.read()?;
                    return Ok(found.to_string());
                }
            }
        }
        self.meter.read()?;
        let specs = self.params.specs();
        Ok(first_not_finite("gradient", specs, &self.grads.finish(specs)?.host()?))
    }

    /// The loss of the moving average on the held-out images, as of one step, and a classifier's right answers. The
    /// timestep, drawn uniformly, and the noise of each image are the same in every call. Without losses if no images
    /// are held out.
    ///
    /// # Errors
    /// `Error::Interrupted` once `stop` is set; a GPU that fails.
    pub fn validate(&self, stop: &AtomicBool) -> Result<Validation> {
        let c = &self.config;
        let data = &self.data.held_out;
        let (size, conditional) = (c.batch / c.accumulate, c.model.classes > 0);
        let mut meter = Meter::new(&self.device)?;
        let mut feed = Feed::new(&self.device, self.held_out.as_ref());
        meter.begin();
        // Of a learned schedule the moving average, as of the weights.
        let averaged = match &self.learning {
            Some(learning) => {
                let (schedule, objective) = (learning.curve().average(), self.table.objective().clone());
                let table = Table::new(&self.device, objective.on(&schedule))?;
                Some((table, Coefficients::new(&self.device, &schedule)?))
            }
            None => None,
        };
        let (table, coefficients) =
            averaged.as_ref().map_or((&self.table, &self.inputs.coefficients), |(table, factors)| (table, factors));
        let held_out: Vec<usize> = (0..data.len()).collect();
        for (k, indices) in held_out.chunks(size).enumerate() {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let first = (k * size) as u64;
            let drawn = data.rows(indices, conditional);
            if self.held_out.is_none() {
                data.check(&drawn.rows)?;
            }
            let batch = Batch::validation(c.seed, first as u32, drawn.indices(), c.diffusion.timesteps as u32);
            let batch = batch.with_labels(drawn.classes);
            let source = feed.source(data, first..first + indices.len() as u64, |places| {
                let end = places.end.min(data.len() as u64);
                data.rows(&held_out[places.start as usize..end as usize], conditional)
            })?;
            let noised = q_sample(&self.device, source, &batch, coefficients)?;
            let batch = MicroBatch { batch, source, noised, masks: None, step_images: None, by_x_t: false };
            forward_loss(&self.unet, &mut Tape::inference(&self.device, &self.ema), table, batch, &mut meter)?;
        }
        let measured = meter.read()?.pop().expect("one row");
        let vlb = self.table.objective().loss().has_bound() && !data.is_empty();
        let vlb = vlb.then(|| measured.vlb_sum / data.len() as f64);
        Ok(Validation { quarters: measured.quarters, right: measured.right, vlb })
    }

    /// How often and how long steps have waited for their images since this was last asked; `None` if the images are
    /// in memory.
    pub fn take_waits(&mut self) -> Option<Waits> {
        self.inputs.ahead.as_mut().filter(|ahead| ahead.is_reading()).map(Ahead::take_waits)
    }

    /// Refuses non-finite weights, from which no run could continue.
    ///
    /// # Errors
    /// `Error::NotFinite` as in [`step`](Self::step).
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
        Error::NotFinite(format!(
            "step {step}: the {what} is {value}; {culprit}; try a learning_rate below {:?}, more warmup_steps than {} or {clip}",
            c.learning_rate, c.warmup_steps
        ))
    }
}

/// The losses of a validation.
#[derive(Clone, Copy, Debug)]
pub struct Validation {
    /// By quarter of the timesteps.
    pub quarters: Quarters,
    /// Of a classifier: 1 for each image whose class it tells rightly, else 0.
    pub right: Quarters,
    /// The mean of T times a term of the bound, as in [`StepReport`].
    pub vlb: Option<f64>,
}

/// Where the inputs of the steps come from.
struct Inputs {
    order: Order,
    /// Reads the images of the next steps, unless all are on a GPU.
    ahead: Option<Ahead>,
    feed: Feed,
    coefficients: Coefficients,
    /// The losses so far, if the timesteps are drawn by them.
    losses: Option<Losses>,
}

impl Inputs {
    /// Positions in the endless sequence of training images ([`Order`]) of those of step `step`.
    fn places(c: &Config, step: u32) -> Range<u64> {
        let place = u64::from(step) * c.batch as u64;
        place..place + c.batch as u64
    }

    /// Brings the images of step `step` (from 0) to the device; where they begin there.
    fn begin(&mut self, c: &Config, data: &Dataset, step: u32) -> Result<u32> {
        let Inputs { order, ahead, feed, .. } = self;
        let conditional = c.model.classes > 0;
        if let Some(ahead) = ahead {
            ahead.begin(data, Inputs::places(c, step))?;
        }
        feed.begin(data, Inputs::places(c, step), |places| data.rows(&order.range(places), conditional))
    }

    /// Micro-batch `k` of the batch of step `step` (from 0), which has begun, noised.
    fn draw<'a>(
        &'a mut self,
        device: &Device,
        c: &Config,
        data: &'a Dataset,
        step: u32,
        k: usize,
    ) -> Result<MicroBatch<'a>> {
        let Inputs { order, feed, coefficients, losses, .. } = self;
        let (size, conditional) = (c.batch / c.accumulate, c.model.classes > 0);
        let (first, of_step) = ((k * size) as u32, Inputs::places(c, step));
        let place = of_step.start + u64::from(first);
        let places = place..place + size as u64;
        let drawn = data.rows(&order.range(places.clone()), conditional);
        let batch = Batch::train(c.seed, step, first, drawn.indices(), c.flip, c.diffusion.timesteps as u32);
        let batch = batch.with_labels(drawn.classes).dropping(c.label_dropout, c.model.classes);
        let batch = match (c.timestep_sampling, losses) {
            (Sampling::Stratified, _) => batch.stratified(c.batch),
            (_, Some(losses)) => losses.known().draw(batch),
            (_, None) => batch,
        };
        let source = feed.part(data, of_step, places);
        let noised = q_sample(device, source, &batch, coefficients)?;
        let masks = Some(DropoutSeed { seed: c.seed, step, first });
        let by_x_t = c.diffusion.schedule == Kind::Learned;
        Ok(MicroBatch { batch, source, noised, masks, step_images: Some(c.batch), by_x_t })
    }
}

/// The noised images that go through the network at once: a batch, or a part of one.
struct MicroBatch<'a> {
    batch: Batch,
    /// The images themselves.
    source: Source<'a>,
    noised: Noised,
    /// The dropout masks of a training step; `None` drops nothing.
    masks: Option<DropoutSeed>,
    /// Images over which the step's loss is the mean; `None`: no gradient is wanted.
    step_images: Option<usize>,
    /// Whether the derivative by x_t is wanted.
    by_x_t: bool,
}

/// Noised images that went through the network.
struct Passed<'a> {
    /// (n, h, w, c).
    x_t: Var,
    /// (n, 1, 1, 1).
    t: Tensor,
    /// The output, (n, h, w, c), with a learned variance (n, h, w, 2c), of a classifier (n, 1, 1, classes).
    y: Var,
    loss: Loss,
    batch: Batch,
    source: Source<'a>,
}

/// Takes noised images through the network, and adds the loss to the meter's row.
fn forward_loss<'a>(
    unet: &UNet,
    tape: &mut Tape<'_>,
    table: &Table,
    batch: MicroBatch<'a>,
    meter: &mut Meter,
) -> Result<Passed<'a>> {
    let MicroBatch { batch, source, noised: Noised { x_t, t, conditioning }, masks, step_images, by_x_t } = batch;
    let device = tape.device().clone();
    let x_t = if by_x_t { tape.leaf(x_t) } else { Var::constant(x_t) };
    if unet.model().classifier {
        let labels = conditioning.labels().expect("images for a classifier have classes");
        let y = unet.forward(tape, &x_t, &t, &Conditioning::NONE, masks)?; // (n, 1, 1, classes)
        let loss = cross_entropy(&device, y.value(), labels, &batch, &t, step_images, meter)?;
        return Ok(Passed { x_t, t, y, loss, batch, source });
    }
    let y = unet.forward(tape, &x_t, &t, &conditioning, masks)?; // (n, h, w, out_channels)
    let loss = loss::any(&device, y.value(), source, &batch, &t, table, step_images, meter)?;
    Ok(Passed { x_t, t, y, loss, batch, source })
}

/// The parameters of the update of step `step` (from 1).
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

/// The learning rate of step `step` (from 1), with warm-up and cooldown. The paper's code multiplies by step/warmup
/// with step counted from 0, so its first step does nothing; counting from 1 avoids that. So does the last step's share
/// of the cooldown, 1/cooldown. The rate depends on the run's planned number of steps in the cooldown alone, so a run
/// that is prolonged before it goes on as if it had been longer from the start.
fn learning_rate(c: &Config, step: u32) -> f64 {
    let risen = f64::from(step) / f64::from(c.warmup_steps.max(1));
    let cooldown = (f64::from(c.steps) * c.cooldown).round().max(1.0);
    let left = (f64::from(c.steps) + 1.0 - f64::from(step)).max(1.0);
    c.learning_rate * risen.min(left / cooldown).min(1.0)
}

/// Names the first parameter whose `what` is not finite.
fn first_not_finite(what: &str, specs: &Specs, flat: &[f32]) -> String {
    let first = specs.iter().find(|(p, _)| flat[specs.range(*p)].iter().any(|v| !v.is_finite()));
    match first {
        Some((_, spec)) => format!("the first {what} that is not finite is that of {}", spec.name),
        None => format!("every {what} is finite when looked at again"),
    }
}

/// The launches of a step, which are captured unless the steps need the host in between.
fn launches(device: &Device, config: &Config) -> Repeated {
    let Device::Cuda(gpu) = device else { return Repeated::eager(A_STEP) };
    let why = if config.diffusion.schedule == Kind::Learned {
        "schedule = learned updates the schedule on the host"
    } else if config.timestep_sampling == Sampling::Importance {
        "timestep_sampling = importance draws the timesteps on the host"
    } else {
        return Repeated::new(A_STEP);
    };
    if gpu.captures() {
        gpu.add_note(eager_note(A_STEP, why));
    }
    Repeated::eager(A_STEP)
}

/// Training and held-out images on the GPU, if they fit beside the memory that training needs. If both come from one
/// source they share a buffer.
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
    // A GPU that does not say how much is free gets no more than it must have.
    let available = gpu.available_memory().unwrap_or(0);
    if memory_needed(config, unet, specs, device).saturating_add(bytes as u64) > available {
        return Ok([None, None]);
    }
    data.train.check_all()?;
    data.held_out.check_all()?;
    let train = Resident::new(gpu, train)?;
    let held_out = if shared { train.clone() } else { Resident::new(gpu, held_out)? };
    Ok([Some(train), Some(held_out)])
}
