//! `ddpm-cuda train`: the training loop, top to bottom.
//!
//! A step (algorithm 1 of the paper, for a batch): draw images, timesteps and noise; form x_t; predict the noise; take the loss
//! and its gradient; walk the tape back; clip; update weights, moments and moving average. What a step draws is a pure
//! function of seed and step ([`Batch`]), so the state of a run is its step number and four flat buffers: weights,
//! moving average, two moments. That is what a checkpoint holds and why a resumed run continues with the same bits.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::checkpoint;
use crate::config::{Config, Preset};
use crate::data::{self, Dataset};
use crate::device::{Choice, Device, Precision};
use crate::diffusion::{Batch, Schedule};
use crate::error::{Error, Result};
use crate::ops::adam::{Buffers, Update, adam, ema_decay};
use crate::ops::grad_norm::{clip_factor, grad_norm};
use crate::ops::loss::{Quarters, loss};
use crate::ops::q_sample::q_sample;
use crate::output;
use crate::params::{ParamGrads, Params, Specs};
use crate::sample;
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::unet::{DropoutSeed, UNet};
use crate::usage;

/// Adam's constants, the paper's and everyone's.
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const ADAM_EPS: f64 = 1e-8;

/// Arguments of `ddpm-cuda train`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Network and recipe to start from
    #[arg(long, value_enum)]
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
    /// One setting, such as widths=32,64,64; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Training steps
    #[arg(long, value_name = "N")]
    pub steps: Option<u32>,
    /// Images per step
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Seed of all randomness
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: Choice,
    /// Type of activations and gradients
    #[arg(long, value_enum, default_value = "f32")]
    pub precision: Precision,
    /// Continue this run from its newest checkpoint; --steps may extend it
    #[arg(long, value_name = "RUN", conflicts_with_all = ["preset", "data", "out", "config", "set", "batch", "seed"])]
    pub resume: Option<PathBuf>,
}

/// A network in training: everything that changes from step to step.
pub struct Trainer {
    device: Device,
    config: Config,
    unet: UNet,
    schedule: Schedule,
    params: Params,
    ema: Params,
    grads: ParamGrads,
    m: Tensor,
    v: Tensor,
    /// Steps done.
    step: u32,
}

/// What one step reports.
#[derive(Debug)]
pub struct StepReport {
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
    /// A network with its initial weights, at step 0. `config` must know the image size and channels.
    ///
    /// # Errors
    /// Settings that cannot work, in one sentence.
    pub fn new(config: &Config, device: &Device) -> Result<Self> {
        let (unet, specs) = UNet::new(&config.model)?;
        let params = Params::init(device, specs.clone(), config.seed);
        let mut ema = Params::zeros(device, specs.clone());
        ema.flat_mut().copy_from_slice(params.flat());
        let flat = Shape::vector(specs.flat_len());
        Ok(Trainer {
            device: device.clone(),
            config: config.clone(),
            schedule: Schedule::new(config.diffusion.schedule, config.diffusion.timesteps)?,
            unet,
            grads: ParamGrads::new(device, &specs),
            m: Tensor::zeros(device, flat),
            v: Tensor::zeros(device, flat),
            params,
            ema,
            step: 0,
        })
    }

    /// The state that checkpoints hold.
    pub fn state(&self) -> checkpoint::State<'_> {
        checkpoint::State { step: self.step, params: &self.params, ema: &self.ema, m: self.m.data(), v: self.v.data() }
    }

    /// The same, to be read from a checkpoint.
    pub fn state_mut(&mut self) -> checkpoint::StateMut<'_> {
        checkpoint::StateMut {
            step: &mut self.step,
            params: &mut self.params,
            ema: &mut self.ema,
            m: self.m.data_mut(),
            v: self.v.data_mut(),
        }
    }

    /// Steps done.
    pub fn steps_done(&self) -> u32 {
        self.step
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

    /// One step on the next images of `data`.
    ///
    /// # Errors
    /// `Error::Failed` if the loss or the gradient is not finite: with the step, the first tensor that is not, and what to
    /// try. The weights are then still those of the last step.
    pub fn step(&mut self, data: &Dataset) -> Result<StepReport> {
        let c = &self.config;
        let piece = c.batch / c.accumulate;
        let mut quarters = Quarters::default();
        let mut total = 0.0;
        self.grads.reset();
        for k in 0..c.accumulate {
            let first = k * piece;
            let indices = data.training_indices(c.seed, u64::from(self.step) * c.batch as u64 + first as u64, piece);
            let labels = self.labels(data, &indices);
            let batch = Batch::train(c.seed, self.step, first as u32, indices, c.flip, c.diffusion.timesteps as u32);
            let masks = DropoutSeed { seed: c.seed, step: self.step * c.accumulate as u32 + k as u32 };

            let x_t = Var::constant(q_sample(&self.device, data.images(), &batch, &self.schedule)); // (n, h, w, c)
            let mut tape = Tape::recording(&self.device, &self.params);
            let eps = self.unet.forward(&mut tape, &x_t, &batch.t_f32(), labels.as_deref(), Some(masks))?; // (n, h, w, c)
            let l = loss(&self.device, eps.value(), &batch, Some(c.batch));
            if !l.mean().is_finite() {
                let mut tape = Tape::inspecting(&self.device, &self.params);
                let again = self.unet.forward(&mut tape, &x_t, &batch.t_f32(), labels.as_deref(), Some(masks));
                let culprit = again.err().map_or("every tensor of the forward pass is finite".into(), |e| e.to_string());
                return Err(self.not_finite("loss", l.mean(), &culprit));
            }
            total += l.per_image.iter().sum::<f64>();
            quarters.add(&batch, &l.per_image, c.diffusion.timesteps);
            let dy = l.gradient.expect("a training loss has a gradient"); // (n, h, w, c)
            tape.backward(&eps, dy, &mut self.grads)?;
        }

        let specs = self.params.specs();
        let norm = grad_norm(&self.device, self.grads.finish(specs));
        if !norm.is_finite() {
            let g = self.grads.finish(specs);
            let first = specs.iter().find(|(p, _)| g[specs.range(*p)].iter().any(|v| !v.is_finite()));
            let name = first.map_or("", |(_, spec)| &spec.name);
            return Err(self.not_finite("gradient norm", norm, &format!("the first gradient that is not finite is that of {name}")));
        }
        let number = u64::from(self.step) + 1;
        // The paper's code multiplies by step/warmup, so that its first step does nothing; counting from one does not.
        let learning_rate = c.learning_rate * (number as f64 / f64::from(c.warmup_steps.max(1))).min(1.0);
        let update = Update {
            step: number,
            learning_rate,
            beta1: BETA1,
            beta2: BETA2,
            eps: ADAM_EPS,
            weight_decay: c.weight_decay,
            clip: if c.grad_clip > 0.0 { clip_factor(norm, c.grad_clip) } else { 1.0 },
            ema_decay: ema_decay(c.ema_decay, number),
        };
        let g = self.grads.finish(specs);
        let buffers = Buffers { w: self.params.flat_mut(), ema: self.ema.flat_mut(), m: self.m.data_mut(), v: self.v.data_mut(), g };
        adam(&self.device, buffers, &update);
        self.step += 1;
        Ok(StepReport { loss: total / c.batch as f64, quarters, grad_norm: norm, learning_rate })
    }

    /// L_simple of the moving average on the held-out images, each at one timestep that never changes: overall and by
    /// quarter of the timesteps. `None` without held-out images.
    ///
    /// # Errors
    /// None of its own.
    pub fn validate(&self, data: &Dataset) -> Result<Quarters> {
        let c = &self.config;
        let piece = c.batch / c.accumulate;
        let mut quarters = Quarters::default();
        let held_out = data.held_out_indices();
        for (k, indices) in held_out.chunks(piece).enumerate() {
            let labels = self.labels(data, indices);
            let batch = Batch::validation(c.seed, (k * piece) as u32, indices.to_vec(), c.diffusion.timesteps as u32);
            let x_t = Var::constant(q_sample(&self.device, data.images(), &batch, &self.schedule)); // (n, h, w, c)
            let mut tape = Tape::inference(&self.device, &self.ema);
            let eps = self.unet.forward(&mut tape, &x_t, &batch.t_f32(), labels.as_deref(), None)?; // (n, h, w, c)
            quarters.add(&batch, &loss(&self.device, eps.value(), &batch, None).per_image, c.diffusion.timesteps);
        }
        Ok(quarters)
    }

    fn labels(&self, data: &Dataset, indices: &[usize]) -> Option<Vec<u32>> {
        (self.config.model.classes > 0).then(|| indices.iter().map(|&i| data.label(i)).collect())
    }

    fn not_finite(&self, what: &str, value: f64, culprit: &str) -> Error {
        Error::Failed(format!(
            "step {}: the {what} is {value}; {culprit}; try a learning_rate below {}, more warmup_steps than {} or a smaller grad_clip",
            self.step, self.config.learning_rate, self.config.warmup_steps
        ))
    }
}
