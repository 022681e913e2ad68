//! A network in training: the state of a run and one step of it, algorithm 1 of the paper.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::ahead::{Ahead, Waits};
use super::feed::{Feed, Resident};
use super::gradient::Gradient;
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
use crate::exchange::Exchange;
use crate::images::Source;
use crate::kernels::meter::MeterRow;
use crate::memory::memory_needed;
use crate::meter::{Measured, Meter, Quarters, Row};
use crate::ops::adam::{self, State, Update, adam, ema_decay};
use crate::ops::cross_entropy::cross_entropy;
use crate::ops::loss::{self, Loss, Table};
use crate::ops::q_sample::{Coefficients, Noised, q_sample};
use crate::ops::{grad_norm, tree_sum};
use crate::params::{Params, Specs};
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::unet::{DropoutSeed, UNet};
use crate::usage;

/// Adam's usual constants, also the paper's.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const ADAM_EPS: f64 = 1e-8;

/// What the launches of a step are called in messages.
const A_STEP: &str = "a training step";

/// A network in training: everything that changes from step to step.
///
/// A run has one, or on several devices one for each, its ranks. Then all of them make the same calls in the same
/// order, and what a rank has to itself are its micro-batches and its shard of moving average and moments (ZeRO stage
/// 1). The numbers are the same for every number of ranks.
pub struct Trainer {
    device: Device,
    config: Config,
    data: Data,
    exchange: Exchange,
    unet: UNet,
    /// The noise schedule, unless it is learned.
    schedule: Schedule,
    /// The noise schedule, if it is learned.
    learning: Option<Learning>,
    params: Params,
    /// This rank's shard: the elements of the flat parameters that it updates, of which the next three are.
    shard: Range<usize>,
    ema: Tensor,
    m: Tensor,
    v: Tensor,
    gradient: Gradient,
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
        Trainer::of_rank(config, data, device, Exchange::alone())
    }

    /// The same of a rank. All have the same settings and data.
    ///
    /// # Errors
    /// Those of [`Trainer::new`], and a number of micro-batches that so many ranks cannot share.
    pub fn of_rank(config: &Config, data: Data, device: &Device, exchange: Exchange) -> Result<Self> {
        let (rank, ranks) = (exchange.rank(), exchange.size());
        check_ranks(config, ranks)?;
        let micro_batches = config.accumulate / ranks;
        let (unet, mut specs) = UNet::new(&config.model)?;
        if let Device::Cuda(gpu) = device {
            gpu.memory_is_for(format_args!("the training state"));
        }
        let [train, held_out] = resident(config, &unet, &specs, &data, device, ranks)?;
        if ranks > 1 {
            specs.pad(ranks * grad_norm::CHUNK);
        }
        let len = specs.flat_len() / ranks;
        let (shard, flat) = (exchange.shard() * len..(exchange.shard() + 1) * len, Shape::vector(len));
        let params = Params::init(device, specs.clone(), config.seed)?;
        let schedule = config.diffusion.noise_schedule()?;
        let is_learned = config.diffusion.schedule == Kind::Learned;
        Ok(Trainer {
            device: device.clone(),
            config: Config { precision: device.precision(), ..config.clone() },
            mark: DataMark::of(config, &data),
            inputs: Inputs {
                own: rank * micro_batches..(rank + 1) * micro_batches,
                order: Order::new(config.seed, data.train.len()),
                ahead: train.is_none().then(|| Ahead::new(&data.train, Order::new(config.seed, data.train.len()))),
                feed: Feed::new(device, train.as_ref()),
                coefficients: Coefficients::new(device, &schedule)?,
                losses: (config.timestep_sampling == Sampling::Importance)
                    .then(|| Losses::new(device, Importance::new(schedule.len(), config.batch), micro_batches)),
            },
            learning: is_learned.then(|| Learning::new(device, schedule.len(), &data.train)),
            data,
            table: Table::new(device, config.objective()?)?,
            schedule,
            unet,
            ema: Tensor::from_slice(device, flat, &params.host()?[shard.clone()])?,
            m: Tensor::zeros(device, flat)?,
            v: Tensor::zeros(device, flat)?,
            gradient: Gradient::new(device, &specs, micro_batches, &exchange)?,
            params,
            shard,
            step: 0,
            held_out,
            clock: Clock::new(device)?,
            meter: Meter::of_micro_batches(device, micro_batches)?,
            unread: 0,
            launches: launches(device, config, &exchange),
            exchange,
        })
    }

    /// The state that a checkpoint holds, of a run of one rank; panics in one of several, for which
    /// [`save`](Self::save) gathers it. With importance sampling on a GPU, after [`reports`](Self::reports).
    pub fn state(&self) -> checkpoint::State<'_> {
        assert_eq!(self.exchange.size(), 1, "ranks, each with a shard of the state");
        self.state_with([&self.ema, &self.m, &self.v])
    }

    /// The state with these for all of moving average and moments.
    fn state_with<'a>(&'a self, [ema, m, v]: [&'a Tensor; 3]) -> checkpoint::State<'a> {
        checkpoint::State {
            step: self.step,
            params: &self.params,
            ema,
            m,
            v,
            data: Some(&self.mark),
            importance: self.inputs.losses.as_ref().map(Losses::known),
            curve: self.learning.as_ref().map(Learning::curve),
        }
    }

    /// The state to be filled from a checkpoint; every rank fills its own.
    pub fn state_mut(&mut self) -> checkpoint::StateMut<'_> {
        // Whoever gets it may put other buffers in place of these.
        self.launches.forget();
        checkpoint::StateMut {
            step: &mut self.step,
            params: &mut self.params,
            shard: self.shard.clone(),
            ema: &mut self.ema,
            m: &mut self.m,
            v: &mut self.v,
            importance: self.inputs.losses.as_mut().map(Losses::known_mut),
            curve: self.learning.as_mut().map(Learning::curve_mut),
        }
    }

    /// Saves a checkpoint to the folder of the run, as [`checkpoint::save`] does; returns where it is. Of several ranks
    /// the first writes it. With importance sampling on a GPU, after [`reports`](Self::reports).
    ///
    /// # Errors
    /// Those of [`checkpoint::save`]; a GPU error; another rank that has ended.
    pub fn save(&self, run: &Path) -> Result<PathBuf> {
        if self.exchange.size() == 1 {
            return checkpoint::save(run, &self.config, self.state());
        }
        // One after the other, so that a device has one of them whole.
        let on_host = |shard: &Tensor| {
            let whole = self.whole(shard)?;
            let copy = || Tensor::from_slice(&Device::cpu(), whole.shape(), &whole.host()?);
            self.exchange.is_first().then(copy).transpose()
        };
        let whole = [on_host(&self.ema)?, on_host(&self.m)?, on_host(&self.v)?];
        let saved = self.exchange.first_alone("saving a checkpoint", || {
            let whole = whole.each_ref().map(|whole| whole.as_ref().expect("the first rank has them"));
            checkpoint::save(run, &self.config, self.state_with(whole))
        })?;
        Ok(saved.unwrap_or_else(|| checkpoint::of_step(run, self.step)))
    }

    /// All of a flat buffer of which each rank has a shard.
    fn whole(&self, shard: &Tensor) -> Result<Tensor> {
        if self.exchange.size() == 1 {
            return Ok(shard.clone());
        }
        let mut whole = Tensor::zeros(&self.device, Shape::vector(self.params.specs().flat_len()))?;
        whole.put(self.shard.start, shard)?;
        self.exchange.all_gather(&mut whole)?;
        Ok(whole)
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
        self.ema.write(&flat[self.shard.clone()])
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

    /// The moving average of the weights, with which samples are drawn. Several ranks gather it, in memory of its own.
    ///
    /// # Errors
    /// Out of GPU memory; another rank that has ended.
    pub fn ema(&self) -> Result<Average<'_>> {
        let mut params = Params::of_flat(&self.device, self.params.specs().clone(), self.whole(&self.ema)?)?;
        adam::round(&self.device, &mut params)?;
        Ok(Average { params, _trainer: PhantomData })
    }

    /// The last call of a rank that has done all its work: waits for the others.
    ///
    /// # Errors
    /// Another rank that has failed after all.
    pub fn leave(self) -> Result<()> {
        // A graph with an exchange in it must be gone before NCCL is left.
        drop(self.launches);
        self.exchange.leave()
    }

    /// What it exchanges with the other ranks.
    pub fn exchange(&self) -> &Exchange {
        &self.exchange
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
    /// [`reports`](Self::reports) returns this error. Another rank that has ended.
    pub fn step(&mut self) -> Result<()> {
        self.meter.begin();
        if let Some(losses) = &mut self.inputs.losses {
            losses.begin(&self.table, &self.exchange)?;
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
            learning.update(&self.table, &update, self.data.train.extent().len(), &self.exchange)?;
        }
        self.step += 1;
        self.unread += 1;
        Ok(())
    }

    /// Everything of a step that is computed on `device`.
    fn compute(&mut self, device: &Device, update: &Update) -> Result<()> {
        self.gradient.begin();
        for (k, micro_batch) in self.inputs.own.clone().enumerate() {
            self.meter.micro_batch(k);
            let batch = self.inputs.draw(device, &self.config, &self.data.train, self.step, micro_batch)?;
            let mut tape = Tape::recording(device, &self.params).recomputing(self.config.recompute);
            let Passed { x_t, t, y, mut loss, batch, source } =
                forward_loss(&self.unet, &mut tape, &self.table, batch, &mut self.meter)?;
            let dy = loss.gradient.take().expect("a training loss has a gradient");
            let mut leaves = tape.backward(&y, dy, self.gradient.next())?;
            if let Some(learning) = &mut self.learning {
                let dx = leaves.take(&x_t).expect("the output depends on x_t"); // (n, h, w, c)
                let sums = loss::of_schedule(device, (y.value(), &dx), source, &batch, &t, &self.table)?;
                learning.add(batch.t(), sums)?;
            }
            if let (Some(losses), Some(_)) = (&mut self.inputs.losses, &batch.weights) {
                losses.add(&batch.t(), &loss, &self.exchange)?;
            }
            self.gradient.add(device, self.params.specs())?;
        }

        // From here on of all ranks' micro-batches, and of this rank's shard.
        let Range { start, end } = self.shard;
        let len = self.params.specs().end().clamp(start, end) - start;
        let g = self.gradient.sum(device, &self.exchange, len, self.config.grad_clip, &mut self.meter)?;
        if let Meter::Cpu(_) = self.meter {
            let is_finite = self.meter.host_row().grad_norm.is_finite() && self.meter.losses_are_finite();
            if !is_finite {
                let measured = self.read_meter()?.pop().expect("the row of this step");
                return Err(self.explain_not_finite(&measured));
            }
        }
        let (ema, m, v) = (&mut self.ema, &mut self.m, &mut self.v);
        adam(device, State { w: &mut self.params, shard: start..end, ema, m, v, g }, update, &mut self.meter)?;
        if self.exchange.size() > 1 {
            self.exchange.all_gather(self.params.tensors_mut().0)?;
            adam::round(device, &mut self.params)?;
        }
        Ok(())
    }

    /// Launches in the CUDA graph of a step; `None` if there is no graph (yet).
    pub fn launches_captured(&self) -> Option<usize> {
        self.launches.launches()
    }

    /// The measurements of the steps since the last call, one report each. Waits for the GPU.
    ///
    /// # Errors
    /// On a GPU, the error that [`step`](Self::step) returns on the CPU. The trainer is then at the last good step.
    /// Another rank that has ended.
    pub fn reports(&mut self) -> Result<Vec<StepReport>> {
        let steps = self.step - std::mem::take(&mut self.unread)..self.step;
        let mut reports = Vec::new();
        let has_bound = self.table.objective().loss().has_bound();
        if let Some(losses) = &mut self.inputs.losses {
            losses.finish(&self.table, &self.exchange)?;
        }
        // A step that failed half-way has left a row of its own.
        for (measured, done) in self.read_meter()?.into_iter().zip(steps) {
            let loss = measured.quarters.mean().expect("a step has images");
            if !loss.is_finite() || !measured.grad_norm.is_finite() {
                self.step = done;
                return Err(self.explain_not_finite(&measured));
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

    /// What the steps since the last call have measured, on all ranks. Waits for the GPU.
    fn read_meter(&mut self) -> Result<Vec<Measured>> {
        let rows = of_all_ranks(&self.exchange, self.meter.rows()?)?;
        Ok(rows.iter().map(Row::measured).collect())
    }

    /// True if [`reports`](Self::reports) must be called before the next step (the meter of a GPU is full) or costs
    /// nothing (the CPU).
    pub fn reports_are_due(&self) -> bool {
        matches!(self.meter, Meter::Cpu(_)) || self.meter.is_full()
    }

    /// Runs the next step again to find the first non-finite tensor, given what it has `measured`, of which the loss or
    /// the norm is not finite.
    fn explain_not_finite(&mut self, measured: &Measured) -> Error {
        let loss = measured.quarters.mean().filter(|loss| !loss.is_finite());
        let (what, value) = loss.map_or(("gradient norm", measured.grad_norm), |loss| ("loss", loss));
        let found = self.find_not_finite();
        let culprit = found.unwrap_or_else(|e| format!("looking for the first tensor that is not finite failed: {e}"));
        self.not_finite(self.step + 1, what, value, &culprit)
    }

    /// Describes the first non-finite tensor of the next step, the first rank's of those that have one. The meter is
    /// empty afterwards.
    fn find_not_finite(&mut self) -> Result<String> {
        self.meter.rows()?;
        self.meter.begin();
        self.gradient.begin();
        let device = self.device.clone();
        self.inputs.begin(&self.config, &self.data.train, self.step)?;
        let mut found = None;
        for (k, micro_batch) in self.inputs.own.clone().enumerate() {
            self.meter.micro_batch(k);
            let batch = self.inputs.draw(&device, &self.config, &self.data.train, self.step, micro_batch)?;
            let mut tape = Tape::inspecting(&self.device, &self.params).recomputing(self.config.recompute);
            match forward_loss(&self.unet, &mut tape, &self.table, batch, &mut self.meter) {
                Ok(Passed { y, loss, .. }) => {
                    let dy = loss.gradient.expect("a training loss has a gradient");
                    tape.backward(&y, dy, self.gradient.next())?;
                    self.gradient.add(&device, self.params.specs())?;
                }
                Err(tensor) => {
                    found = Some(tensor.to_string());
                    break;
                }
            }
        }
        self.meter.rows()?;
        if found.is_none() {
            let gradient = self.gradient.of_rank(&device)?.host()?;
            found = first_not_finite("gradient", self.params.specs(), &gradient);
        }
        let of_ranks = self.exchange.texts(&found.unwrap_or_default())?;
        let first = of_ranks.into_iter().find(|found| !found.is_empty());
        Ok(first.unwrap_or_else(|| "every gradient is finite when looked at again".into()))
    }

    /// The loss of the moving average on the held-out images, as of one step, and a classifier's right answers. The
    /// timestep, drawn uniformly, and the noise of each image are the same in every call. Without losses if no images
    /// are held out. Each rank takes a share of the images.
    ///
    /// # Errors
    /// `Error::Interrupted` once `stop` is set on one of the ranks; a GPU that fails; another rank that has ended.
    pub fn validate(&self, stop: &AtomicBool) -> Result<Validation> {
        let c = &self.config;
        let data = &self.data.held_out;
        let (size, conditional) = (c.batch / c.accumulate, c.model.classes > 0);
        let average = self.ema()?;
        let mut meter = Meter::new(&self.device)?;
        let mut feed = Feed::new(&self.device, self.held_out.as_ref());
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
        let batches: Vec<&[usize]> = held_out.chunks(size).collect();
        let (rank, ranks) = (self.exchange.rank(), self.exchange.size());
        let mut interrupted = false;
        let mut row = Row::default();
        let own = rank * batches.len() / ranks..(rank + 1) * batches.len() / ranks;
        for (&indices, k) in batches[own.clone()].iter().zip(own) {
            interrupted = stop.load(Ordering::Relaxed);
            if interrupted {
                break;
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
            if meter.is_full() {
                row.parts.extend(meter.rows()?.into_iter().flat_map(|row| row.parts));
            }
            meter.begin();
            forward_loss(&self.unet, &mut Tape::inference(&self.device, &average), table, batch, &mut meter)?;
        }
        row.parts.extend(meter.rows()?.into_iter().flat_map(|row| row.parts));
        if self.exchange.any(interrupted)? {
            return Err(Error::Interrupted);
        }
        let measured = of_all_ranks(&self.exchange, vec![row])?[0].measured();
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
                let culprit = first_not_finite("weight", self.params.specs(), &weights).expect("it is not in a gap");
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

/// The moving average of a trainer's weights, as parameters. No step can be taken meanwhile.
pub struct Average<'a> {
    params: Params,
    /// Of a run of one rank it is in the trainer's memory.
    _trainer: PhantomData<&'a Trainer>,
}

impl Deref for Average<'_> {
    type Target = Params;

    fn deref(&self) -> &Params {
        &self.params
    }
}

/// Rows of all ranks: the parts of each follow one another in the order of the ranks, and so of micro-batches and
/// images.
fn of_all_ranks(exchange: &Exchange, mut rows: Vec<Row>) -> Result<Vec<Row>> {
    if exchange.size() == 1 || rows.is_empty() {
        return Ok(rows);
    }
    let own: Vec<MeterRow> = rows.iter().flat_map(|row| &row.parts).map(MeterRow::from).collect();
    let of_ranks = exchange.gather(&own)?;
    rows.iter_mut().for_each(|row| row.parts.clear());
    for parts in of_ranks {
        // Of a rank all rows have as many.
        let count = parts.len() / rows.len();
        for (k, row) in rows.iter_mut().enumerate() {
            row.parts.extend(parts[k * count..(k + 1) * count].iter().copied().map(Measured::from));
        }
    }
    Ok(rows)
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
    /// This rank's micro-batches of each step.
    own: Range<usize>,
    order: Order,
    /// Reads the images of the next steps, unless all are on a GPU.
    ahead: Option<Ahead>,
    feed: Feed,
    coefficients: Coefficients,
    /// The losses so far, if the timesteps are drawn by them.
    losses: Option<Losses>,
}

impl Inputs {
    /// Positions in the endless sequence of training images ([`Order`]) of those of micro-batches `of` of step `step`.
    fn places(c: &Config, step: u32, of: &Range<usize>) -> Range<u64> {
        let (place, size) = (u64::from(step) * c.batch as u64, c.batch / c.accumulate);
        place + (of.start * size) as u64..place + (of.end * size) as u64
    }

    /// Brings this rank's images of step `step` (from 0) to the device; where they begin there.
    fn begin(&mut self, c: &Config, data: &Dataset, step: u32) -> Result<u32> {
        let Inputs { own, order, ahead, feed, .. } = self;
        let (places, conditional) = (Inputs::places(c, step, own), c.model.classes > 0);
        if let Some(ahead) = ahead {
            ahead.begin(data, places.clone())?;
        }
        feed.begin(data, places, |places| data.rows(&order.range(places), conditional))
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
        let Inputs { own, order, feed, coefficients, losses, .. } = self;
        let (size, conditional) = (c.batch / c.accumulate, c.model.classes > 0);
        let (first, places) = ((k * size) as u32, Inputs::places(c, step, &(k..k + 1)));
        let drawn = data.rows(&order.range(places.clone()), conditional);
        let batch = Batch::train(c.seed, step, first, drawn.indices(), c.flip, c.diffusion.timesteps as u32);
        let batch = batch.with_labels(drawn.classes).dropping(c.label_dropout, c.model.classes);
        let batch = match (c.timestep_sampling, losses) {
            (Sampling::Stratified, _) => batch.stratified(c.batch),
            (_, Some(losses)) => losses.known().draw(batch),
            (_, None) => batch,
        };
        let source = feed.part(data, Inputs::places(c, step, own), places);
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
fn first_not_finite(what: &str, specs: &Specs, flat: &[f32]) -> Option<String> {
    let (_, spec) = specs.iter().find(|(p, _)| flat[specs.range(*p)].iter().any(|v| !v.is_finite()))?;
    Some(format!("the first {what} that is not finite is that of {}", spec.name))
}

/// Refuses a number of micro-batches that so many ranks cannot share.
fn check_ranks(config: &Config, ranks: usize) -> Result<()> {
    let micro_batches = config.accumulate;
    if tree_sum::fits(micro_batches, ranks) {
        return Ok(());
    }
    let fitting: Vec<String> =
        (1..=micro_batches).filter(|&n| tree_sum::fits(micro_batches, n)).map(|n| n.to_string()).collect();
    usage!(
        "accumulate = {micro_batches}: a step of so many micro-batches is computed on {} devices, not on {ranks}; take \
         one of these numbers, or for a new run a multiple of {ranks} by a power of two for accumulate",
        fitting.join(" or ")
    );
}

/// The launches of a step, which are captured unless the steps need the host in between.
fn launches(device: &Device, config: &Config, exchange: &Exchange) -> Repeated {
    let Device::Cuda(gpu) = device else { return Repeated::eager(A_STEP) };
    let why = if let Some(why) = exchange.passes_the_host() {
        why
    } else if config.diffusion.schedule == Kind::Learned {
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
    ranks: usize,
) -> Result<[Option<Resident>; 2]> {
    let Device::Cuda(gpu) = device else { return Ok([None, None]) };
    let [train, held_out] = [data.train.images(), data.held_out.images()];
    let shared = held_out.pixels.is_empty() || std::ptr::eq(train.pixels, held_out.pixels);
    let bytes = train.pixels.len() + if shared { 0 } else { held_out.pixels.len() };
    // A GPU that does not say how much is free gets no more than it must have.
    let available = gpu.available_memory().unwrap_or(0);
    if memory_needed(config, unet, specs, device, ranks).saturating_add(bytes as u64) > available {
        return Ok([None, None]);
    }
    data.train.check_all()?;
    data.held_out.check_all()?;
    let train = Resident::new(gpu, train)?;
    let held_out = if shared { train.clone() } else { Resident::new(gpu, held_out)? };
    Ok([Some(train), Some(held_out)])
}
