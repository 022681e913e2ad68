//! The reverse process from noise x_T to an image x_0: ancestral (DDPM, algorithm 2) or DDIM, over all timesteps or a
//! subset.
//!
//! A step of either is the same arithmetic with different factors ([`Step`]): predict x_0 from x_t and the network's
//! output, clip it to [-1, 1], then `x_{t-1} = c_x0 x_0 + c_xt x_t + sigma z`. This form fits DDIM because its eps is
//! derived again from the clipped x_0. So a device needs one operation, `ops::sample_step`; the loop over the steps is
//! in `sample`. This module only computes factors, in f64.
//!
//! The noise of a sample depends only on the seed and its index: x_T and each z are streams of (seed, index, timestep).
//!
//! Deliberately absent: multistep samplers and guidance; both would change the prediction of x_0.

use super::schedule::{Schedule, Variance};
use crate::error::Result;
use crate::names::names;
use crate::rng::{Purpose, Streams};
use crate::usage;

/// How x_{t-1} is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// From p(x_{t-1} | x_t) = N(posterior mean, variance) (DDPM, algorithm 2; strided: IDDPM, section 4).
    Ancestral(Variance),
    /// DDIM (equation 12): `eta = 0` adds no noise, `eta = 1` as much as ancestral sampling with
    /// [`Variance::FixedSmall`].
    Ddim {
        /// Fraction of the ancestral noise, in [0, 1].
        eta: f64,
    },
}

/// Which timesteps are kept when there are fewer steps than timesteps.
///
/// [`Spacing::Even`] is the default because it is right at both ends. It starts at T - 1, the noise level of x_T;
/// `Stride` and `Leading` start about T/N lower, where a little of an image's brightness should already show. It ends
/// at t = 0; `Trailing` jumps to the image from t = T/N - 1 and loses detail finer than the noise there. Measured with
/// DDIM over the linear schedule and the exact denoiser of Gaussian data: for standard deviation 0.05, 10, 25 and 100
/// steps keep 32, 48 and 79 per cent of it, and 15, 33 and 71 with `Trailing`; for mean 0.5, the mean is off by 0.0001
/// after four steps, and by 0.0014 with `Leading`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Spacing {
    /// From 0 to T - 1 in equal steps, rounded half to even; OpenAI's respacing `N`. A single step is T - 1.
    #[default]
    Even,
    /// Every k-th timestep from 0, with the smallest k that keeps N; OpenAI's `ddimN`. Some N have no such k.
    Stride,
    /// Multiples of floor(T/N) from 0; diffusers' `leading`.
    Leading,
    /// From T - 1 down in steps of T/N, rounded half to even; diffusers' `trailing`.
    Trailing,
}

names!(Spacing { Even = "even", Stride = "stride", Leading = "leading", Trailing = "trailing" });

impl Spacing {
    /// The `steps` kept out of `0..timesteps`, ascending.
    ///
    /// # Errors
    /// `Error::Usage` unless `steps` is from 1 to `timesteps`, or if [`Spacing::Stride`] has no such stride.
    pub fn timesteps(self, timesteps: usize, steps: usize) -> Result<Vec<u32>> {
        if steps == 0 || steps > timesteps {
            usage!("the number of sampling steps is {steps}: must be from 1 to the model's {timesteps} timesteps");
        }
        let last = timesteps - 1;
        let kept: Vec<u32> = match self {
            Spacing::Even if steps == 1 => vec![last as u32],
            Spacing::Even => {
                let stride = last as f64 / (steps - 1) as f64;
                (0..steps).map(|i| (stride * i as f64).round_ties_even() as u32).collect()
            }
            Spacing::Stride => {
                let Some(stride) = (1..=timesteps).find(|k| timesteps.div_ceil(*k) == steps) else {
                    usage!(
                        "no stride takes {timesteps} timesteps in {steps} steps: take another number or even spacing"
                    );
                };
                (0..timesteps as u32).step_by(stride).collect()
            }
            Spacing::Leading => (0..steps).map(|i| (i * (timesteps / steps)) as u32).collect(),
            Spacing::Trailing => {
                let stride = timesteps as f64 / steps as f64;
                let down = |i: usize| (timesteps as f64 - i as f64 * stride).round_ties_even() as u32 - 1;
                (0..steps).rev().map(down).collect()
            }
        };
        Ok(kept)
    }

    /// The same with `steps_offset` of diffusers' schedulers, which moves the timesteps of [`Spacing::Leading`] up and
    /// no others.
    ///
    /// # Errors
    /// Those of [`Spacing::timesteps`], and an offset that moves the last timestep beyond the end.
    pub fn timesteps_from(self, offset: u32, timesteps: usize, steps: usize) -> Result<Vec<u32>> {
        let mut kept = self.timesteps(timesteps, steps)?;
        if self == Spacing::Leading && offset > 0 {
            let last = u64::from(kept[steps - 1]) + u64::from(offset);
            if last >= timesteps as u64 {
                usage!(
                    "steps_offset = {offset} of the model's scheduler moves the last of {steps} steps to timestep {last}, but the last there is is {}: take fewer steps or --spacing even",
                    timesteps - 1
                );
            }
            kept.iter_mut().for_each(|t| *t += offset);
        }
        Ok(kept)
    }
}

/// One step of the reverse process:
/// `x_0 = clip(x0_xt x_t + x0_output output)`, `x_{t-1} = c_x0 x_0 + c_xt x_t + sigma z`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The timestep given to the network, an index of the full chain.
    pub t: u32,
    /// Factor of x_t in the prediction of x_0.
    pub x0_xt: f64,
    /// Factor of the network's output in the prediction of x_0.
    pub x0_output: f64,
    /// Whether the predicted x_0 is clipped to [-1, 1].
    pub clip: bool,
    /// Factor of x_0 in x_{t-1}.
    pub c_x0: f64,
    /// Factor of x_t in x_{t-1}.
    pub c_xt: f64,
    /// Standard deviation of the noise z; 0 at the last step.
    pub sigma: f64,
}

/// The steps of a reverse process, from x_T to x_0.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    steps: Vec<Step>,
}

impl Sampler {
    /// `steps` steps of `method` over the timesteps that `spacing` keeps, with x_0 clipped. `steps = schedule.len()` is
    /// the full chain.
    ///
    /// # Errors
    /// `Error::Usage` for an `eta` outside [0, 1], and those of [`Spacing::timesteps`].
    pub fn new(schedule: &Schedule, method: Method, spacing: Spacing, steps: usize) -> Result<Self> {
        Sampler::over(schedule, method, &spacing.timesteps(schedule.len(), steps)?)
    }

    /// The same over the timesteps `kept`, ascending.
    ///
    /// # Errors
    /// `Error::Usage` for an `eta` outside [0, 1].
    pub fn over(schedule: &Schedule, method: Method, kept: &[u32]) -> Result<Self> {
        if let Method::Ddim { eta } = method
            && !(0.0..=1.0).contains(&eta)
        {
            usage!("eta is {eta}: must be from 0 to 1");
        }
        let chain = schedule.keep(kept);
        let step = |i: usize| {
            let (signal, noise) = chain.q_sample_coefficients(i);
            let (c_x0, c_xt, sigma) = match method {
                Method::Ancestral(variance) => ancestral(&chain, variance, i),
                Method::Ddim { eta } => ddim(&chain, eta, i),
            };
            // x_t = signal x_0 + noise eps (DDPM, equation 4), solved for x_0.
            Step { t: kept[i], x0_xt: 1.0 / signal, x0_output: -noise / signal, clip: true, c_x0, c_xt, sigma }
        };
        Ok(Sampler { steps: (0..chain.len()).rev().map(step).collect() })
    }

    /// The same steps without clipping of x_0, for a model whose scheduler asks for that.
    pub fn unclipped(mut self) -> Self {
        self.steps.iter_mut().for_each(|step| step.clip = false);
        self
    }

    /// The steps in the order they are taken.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}

/// Factors of x_0 and x_t in the mean of p(x_{t-1} | x_t), and its standard deviation (DDPM, equations 7 and 11).
fn ancestral(chain: &Schedule, variance: Variance, i: usize) -> (f64, f64, f64) {
    let (c_x0, c_xt) = chain.posterior_mean_coefficients(i);
    let sigma = if i == 0 { 0.0 } else { (0.5 * chain.log_variance(variance, i)).exp() };
    (c_x0, c_xt, sigma)
}

/// `x_{t-1} = sqrt(a') x_0 + sqrt(1 - a' - sigma^2) eps + sigma z` (DDIM, equation 12) with a' = alpha_bar_{t-1} and
/// `eps = (x_t - sqrt(a) x_0) / sqrt(1 - a)`, collected by x_0 and x_t; sigma is DDIM's equation 16.
fn ddim(chain: &Schedule, eta: f64, i: usize) -> (f64, f64, f64) {
    let (a, before) = (chain.alpha_bar(i), chain.alpha_bar_before(i));
    let sigma = eta * ((1.0 - before) / (1.0 - a)).sqrt() * (1.0 - a / before).sqrt();
    // For eta = 1 and a long stride, rounding may take the difference below zero.
    let c_xt = ((1.0 - before - sigma * sigma).max(0.0) / (1.0 - a)).sqrt();
    (before.sqrt() - c_xt * a.sqrt(), c_xt, sigma)
}

/// Which samples a batch draws: those of one seed with the indices `first..`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Samples {
    /// The seed.
    pub seed: u64,
    /// Index of the first sample of the batch.
    pub first: u32,
}

impl Samples {
    /// The streams of x_T.
    pub fn start(&self) -> Streams {
        Streams { seed: self.seed, purpose: Purpose::SampleStart, step: 0, first: self.first }
    }

    /// The streams of the noise that the step at timestep `t` adds.
    pub fn noise(&self, t: u32) -> Streams {
        Streams { seed: self.seed, purpose: Purpose::SampleNoise, step: t, first: self.first }
    }
}
