//! The reverse process from noise x_T to an image x_0, over all timesteps or a subset: ancestral (DDPM, algorithm 2),
//! DDIM, DPM-Solver++ and Heun's method.
//!
//! A step of any of them is the same arithmetic with different factors ([`Step`]): predict x_0 from x_t and the
//! network's output, limit it, then `x_{t-1} = c_x0 x_0 + c_xt x_t + c_before before + sigma z`. This form fits DDIM
//! because its eps is derived again from the limited x_0. So a device needs one operation, `ops::sample_step`; the loop
//! over the steps is in `sample`. This module only computes factors, in f64.
//!
//! The noise of a sample depends only on the seed and its index: x_T and each z are streams of (seed, index, timestep).
//!
//! Deliberately absent: UniPC, whose predictor is DPM-Solver++'s and whose corrector needs one more stored prediction,
//! and stochastic variants of the two ODE solvers.

use super::prediction::{Mix, Prediction, Said};
use super::schedule::{Schedule, Variance};
use super::timesteps::{NOISE_ALONE, Spacing, Timesteps};
use crate::error::Result;
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
    /// DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order in the log-SNR from the last two predictions of x_0,
    /// first order at the first and the last step. No noise.
    DpmPp,
    /// Heun's method on the ODE `dy/dsigma = eps`, `y = x / sqrt(alpha_bar)`, `sigma = sqrt((1 - alpha_bar)/alpha_bar)`
    /// (Karras et al. 2022, algorithm 1, without churn). Two evaluations of the network a step but one in the last:
    /// 2N - 1. Nor has a step from a level above 164 a second one: all but a thirtieth of the cosine schedule's range
    /// is in its last timestep, and the slope at the end of a step over it says nothing about the step.
    Heun,
}

impl Method {
    /// Whether it is a solver of the ODE, whose grid does not include t = 0 but where it is spaced so, and whose steps
    /// admit no correction.
    pub const fn is_solver(self) -> bool {
        matches!(self, Method::DpmPp | Method::Heun)
    }
}

/// What a predicted x_0 is confined to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    /// Nothing.
    None,
    /// [-r, r]; 1 is the range of images.
    Range(f64),
    /// [-1, 1] by dynamic thresholding (Saharia et al. 2022, section 2.3): clipped to +-s and divided by s, with s the
    /// p-quantile of the image's |x_0|, at least 1 and at most `largest`.
    Quantile {
        /// Which quantile, in (0, 1].
        p: f64,
        /// The largest s, above 1; infinite if there is none.
        largest: f64,
    },
}

impl Limit {
    /// [`Limit::Quantile`] without a largest s.
    ///
    /// # Errors
    /// `Error::Usage` for a `p` outside (0, 1].
    pub fn quantile(p: f64) -> Result<Self> {
        if !(p > 0.0 && p <= 1.0) {
            usage!("--threshold {p}: the quantile must be above 0 and at most 1, such as 0.995");
        }
        Ok(Limit::Quantile { p, largest: f64::INFINITY })
    }
}

/// What a step reads besides x_t and the network's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// Nothing.
    Nothing,
    /// The x_0 that the step before predicted.
    X0,
    /// The state that the step before started from.
    State,
}

/// The variance from the second half v of the network's output: its logarithm is `offset + factor v`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogVariance {
    /// Where v is 0.
    pub offset: f64,
    /// Of v.
    pub factor: f64,
    /// v is the variance itself, and the other two mean nothing. A negative one makes what is no number.
    pub raw: bool,
}

/// One step of the reverse process:
/// `x_0 = limit(x0_xt x_t + x0_output y)`, `x_{t-1} = c_x0 x_0 + c_xt x_t + c_before before + sigma z`.
///
/// A gradient g of log p(label | x_t), times its scale S, moves the mean (Dhariwal and Nichol 2021, algorithms 1 and
/// 2): `x_0 += shift_x0 S g` after the limit, and `x_{t-1} += shift_mean variance S g`. As in their code, a shifted x_0
/// may leave the range that it was confined to, but not where x_t is noise alone ([`Step::bound_of_shifted`]).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The timestep, an index of the full chain. It names the stream of the noise.
    pub t: u32,
    /// The timestep given to the network. That is `t`, but between two of them for Heun's method over noise levels.
    pub time: f64,
    /// The noise level sqrt((1 - alpha_bar) / alpha_bar) of x_t; infinite where nothing of the image is left.
    pub level: f64,
    /// Factor of x_t in the prediction of x_0.
    pub x0_xt: f64,
    /// Factor of the network's output in the prediction of x_0.
    pub x0_output: f64,
    /// What the predicted x_0 is confined to.
    pub limit: Limit,
    /// Factor of x_0 in x_{t-1}.
    pub c_x0: f64,
    /// Factor of x_t in x_{t-1}.
    pub c_xt: f64,
    /// Factor of `before` in x_{t-1}.
    pub c_before: f64,
    /// What `before` is.
    pub before: Before,
    /// Standard deviation of the noise z; 0 at the last step. With `learned` 1 or 0, whether there is noise.
    pub sigma: f64,
    /// The variance, if the network says it.
    pub learned: Option<LogVariance>,
    /// The variance of p(x_{t-1} | x_t) if the network does not say it.
    pub variance: f64,
    /// Factor of a scaled gradient in x_0.
    pub shift_x0: f64,
    /// Factor of the variance times a scaled gradient in x_{t-1}.
    pub shift_mean: f64,
}

/// A Langevin step with the score at the level that a step has reached (Song et al. 2021, algorithm 5):
/// `x + e s + sqrt(2 e) z`, `s = -eps / noise`, `e = 2 alpha (snr |z| / |s|)^2`, norms per image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Correction {
    /// The timestep of the state that it corrects.
    pub t: u32,
    /// The noise level there, as in [`Step::level`].
    pub level: f64,
    /// eps from the state and the network's output.
    pub eps: Mix,
    /// sqrt(1 - alpha_bar).
    pub noise: f64,
    /// 1 - beta of the kept chain.
    pub alpha: f64,
}

/// How many corrections follow a step, and how large they are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Corrector {
    /// Corrections after every step but the last.
    pub steps: u32,
    /// Ratio of the norms of a correction's drift and noise; 0.16 is Song et al.'s.
    pub snr: f64,
}

/// Classifier-free guidance (Ho and Salimans 2022): `eps = eps_without + weight (eps_with - eps_without)`, of the
/// network's output with and without the class. For a learned variance that of the output with the class is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// 1: no guidance; 0: no class.
    pub weight: f64,
    /// phi, in [0, 1]: how far the output is rescaled to the deviation of that with the class (Lin et al. 2024,
    /// equations 15 and 16).
    pub rescale: f64,
    /// Noise levels at which there is guidance, (above, up to) (Kynkaanniemi et al. 2024); elsewhere the weight is 1.
    pub interval: (f64, f64),
}

impl Guidance {
    /// With this weight, at every noise level, without rescaling.
    ///
    /// # Errors
    /// `Error::Usage` for a weight that is no number.
    pub fn new(weight: f64) -> Result<Self> {
        if !weight.is_finite() {
            usage!("--guidance {weight}: a finite number is expected, 1 for no guidance");
        }
        Ok(Guidance { weight, rescale: 0.0, interval: (0.0, f64::INFINITY) })
    }

    /// The same with rescaling.
    ///
    /// # Errors
    /// `Error::Usage` for a `phi` outside [0, 1].
    pub fn rescaled(self, phi: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&phi) {
            usage!("--guidance-rescale {phi}: must be from 0 to 1, such as 0.7");
        }
        Ok(Guidance { rescale: phi, ..self })
    }

    /// The same at the noise levels sqrt((1 - alpha_bar) / alpha_bar) above `low` and up to `high` only.
    ///
    /// # Errors
    /// `Error::Usage` unless `0 <= low < high`.
    pub fn within(self, low: f64, high: f64) -> Result<Self> {
        if !(low >= 0.0 && low < high) {
            usage!(
                "--guidance-interval {low},{high}: noise levels sigma from low to high are expected, such as 0.28,2.9"
            );
        }
        Ok(Guidance { interval: (low, high), ..self })
    }

    /// Whether the output without the class is needed at this noise level.
    pub fn applies(&self, level: f64) -> bool {
        self.weight != 1.0 && level > self.interval.0 && level <= self.interval.1
    }
}

/// The steps of a reverse process, from x_T to x_0.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    steps: Vec<Step>,
    /// After each step but the last; empty for a solver.
    corrections: Vec<Correction>,
    /// Of the ODE, which admits no correction.
    solver: bool,
    corrector: Option<Corrector>,
    guidance: Option<Guidance>,
}

/// A noise level of the ODE.
struct Level {
    time: f64,
    alpha_bar: f64,
    /// x_0 from the state and the network's output.
    x_0: Mix,
}

impl Level {
    fn sigma(&self) -> f64 {
        level(self.alpha_bar)
    }
}

/// sqrt((1 - alpha_bar) / alpha_bar).
fn level(alpha_bar: f64) -> f64 {
    ((1.0 - alpha_bar) / alpha_bar).sqrt()
}

impl Sampler {
    /// `steps` steps of `method` over the timesteps that `spacing` keeps, for a network that predicts eps, with x_0
    /// clipped to [-1, 1]. `steps = schedule.len()` is the full chain.
    ///
    /// # Errors
    /// Those of [`Sampler::over`] and [`Spacing::timesteps`].
    pub fn new(schedule: &Schedule, method: Method, spacing: Spacing, steps: usize) -> Result<Self> {
        let kept = Timesteps::Spaced(spacing).kept(schedule, method.is_solver(), 0, steps)?;
        Sampler::over(schedule, Prediction::Eps, method, &kept)
    }

    /// The same over the timesteps `kept`, ascending, for a network that predicts `prediction`.
    ///
    /// # Errors
    /// `Error::Usage` for an `eta` outside [0, 1]; for a network that predicts eps, and for any with a solver, if
    /// nothing of the image is left at the last timestep; for [`Variance::Learned`] and [`Variance::LearnedRaw`] over
    /// fewer timesteps than the network learned it for.
    pub fn over(schedule: &Schedule, prediction: Prediction, method: Method, kept: &[u32]) -> Result<Self> {
        if let Method::Ddim { eta } = method
            && !(0.0..=1.0).contains(&eta)
        {
            usage!("eta is {eta}: must be from 0 to 1");
        }
        if matches!(method, Method::Ancestral(Variance::Learned | Variance::LearnedRaw))
            && kept.iter().enumerate().any(|(i, &t)| i != t as usize)
        {
            usage!(
                "the learned variance is that of a step of one timestep, but {} of {} are kept: take another, such as --variance fixed_small",
                kept.len(),
                schedule.len()
            );
        }
        let chain = schedule.keep(kept);
        let last = chain.len() - 1;
        if chain.alpha_bar(last) == 0.0 {
            if prediction == Prediction::Eps {
                usage!(
                    "a network that predicts eps cannot start from pure noise, which the schedule ends in (zero terminal SNR)"
                );
            }
            if method.is_solver() {
                usage!(
                    "the schedule ends in pure noise (zero terminal SNR), where the log-SNR is infinite: take --sampler ddim or ddpm"
                );
            }
        }
        if method == Method::Heun {
            let level = |&t: &u32| {
                let x_0 = prediction.x_0(schedule, t as usize);
                Level { time: f64::from(t), alpha_bar: schedule.alpha_bar(t as usize), x_0 }
            };
            return Ok(Sampler::of(heun(&kept.iter().rev().map(level).collect::<Vec<_>>()), Vec::new(), true));
        }
        let step = |i: usize| {
            let alpha_bar = chain.alpha_bar(i);
            let x_0 = prediction.x_0(schedule, kept[i] as usize);
            let plain = Step { shift_x0: shift_x0(alpha_bar), ..Step::plain(f64::from(kept[i]), alpha_bar, x_0) };
            match method {
                Method::Ancestral(variance) => ancestral(plain, &chain, variance, i),
                Method::Ddim { eta } => ddim(plain, &chain, eta, i),
                Method::DpmPp => dpm_pp(plain, &chain, i),
                Method::Heun => unreachable!("its steps are made above"),
            }
        };
        let correction = |i: usize| {
            let alpha_bar = chain.alpha_bar(i);
            Correction {
                t: kept[i],
                level: level(alpha_bar),
                eps: prediction.eps(schedule, kept[i] as usize),
                noise: (1.0 - alpha_bar).sqrt(),
                alpha: alpha_bar / chain.alpha_bar_before(i),
            }
        };
        let corrections = if method.is_solver() { Vec::new() } else { (0..last).rev().map(correction).collect() };
        Ok(Sampler::of((0..=last).rev().map(step).collect(), corrections, method.is_solver()))
    }

    /// Heun's method over the noise levels of Karras et al. 2022, equation 5, which lie between the timesteps.
    ///
    /// # Errors
    /// `Error::Usage` for a number of steps that is not from 1 to the number of timesteps, a network that predicts mu,
    /// which is known at whole timesteps alone, and a schedule that ends in pure noise.
    pub fn heun_over_levels(schedule: &Schedule, prediction: Prediction, steps: usize) -> Result<Self> {
        let level = |(time, sigma): (f64, f64)| {
            let alpha_bar: f64 = 1.0 / (1.0 + sigma * sigma);
            let Some(Said { x_0, .. }) = prediction.at_level(alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()) else {
                usage!("a network that predicts mu knows whole timesteps alone: take another --spacing than karras")
            };
            Ok(Level { time, alpha_bar, x_0 })
        };
        let levels = Timesteps::karras_levels(schedule, steps)?.into_iter().map(level).collect::<Result<Vec<_>>>()?;
        Ok(Sampler::of(heun(&levels), Vec::new(), true))
    }

    fn of(steps: Vec<Step>, corrections: Vec<Correction>, solver: bool) -> Self {
        Sampler { steps, corrections, solver, corrector: None, guidance: None }
    }

    /// The same steps with x_0 confined otherwise.
    pub fn limited(mut self, limit: Limit) -> Self {
        self.steps.iter_mut().for_each(|step| step.limit = limit);
        self
    }

    /// The same steps without clipping of x_0, for a model whose scheduler asks for that.
    pub fn unclipped(self) -> Self {
        self.limited(Limit::None)
    }

    /// The same with guidance.
    pub fn guided(mut self, guidance: Guidance) -> Self {
        self.guidance = Some(guidance);
        self
    }

    /// The same with corrections after every step but the last.
    ///
    /// # Errors
    /// `Error::Usage` for an `snr` that is not above 0, and for a solver of the ODE.
    pub fn corrected(mut self, corrector: Corrector) -> Result<Self> {
        if !(corrector.snr > 0.0 && corrector.snr.is_finite()) {
            usage!("--snr {}: must be above 0, such as 0.16", corrector.snr);
        }
        if self.solver {
            usage!("--corrector {}: dpm++ and heun solve an ODE, so take --sampler ddpm or ddim", corrector.steps);
        }
        self.corrector = (corrector.steps > 0).then_some(corrector);
        Ok(self)
    }

    /// The steps in the order they are taken.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The correction after the step of each index but the last, and how many there are of it.
    pub fn correction(&self, index: usize) -> Option<(Corrector, &Correction)> {
        self.corrector.zip(self.corrections.get(index))
    }

    /// The guidance, if it applies at this noise level.
    pub fn guidance(&self, level: f64) -> Option<Guidance> {
        self.guidance.filter(|guidance| guidance.applies(level))
    }

    /// Whether any step or correction needs the network's output with and without the class.
    pub fn is_guided(&self) -> bool {
        self.steps.iter().any(|step| self.guidance(step.level).is_some())
    }

    /// Evaluations of the network for a batch of images.
    pub fn calls(&self) -> usize {
        let corrections = self.corrector.map_or(0, |corrector| corrector.steps as usize * self.corrections.len());
        self.steps.len() + corrections
    }
}

impl Step {
    /// What |x_0| is clipped to after a gradient's shift: infinite but above sigma = 164, where x_t is noise alone. The
    /// shift grows with 1/sqrt(alpha_bar), and after the first step of a cosine schedule, whose last alpha_bar is 2e-9,
    /// nothing of an image would be left.
    pub fn bound_of_shifted(&self) -> f64 {
        match self.limit {
            _ if self.level <= NOISE_ALONE => f64::INFINITY,
            Limit::None => f64::INFINITY,
            Limit::Range(r) => r,
            Limit::Quantile { .. } => 1.0,
        }
    }

    /// A step at which nothing else is decided than the prediction of x_0.
    pub(super) fn plain(time: f64, alpha_bar: f64, x_0: Mix) -> Step {
        Step {
            t: time as u32,
            time,
            level: level(alpha_bar),
            x0_xt: x_0.xt,
            x0_output: x_0.output,
            limit: Limit::Range(1.0),
            c_x0: 1.0,
            c_xt: 0.0,
            c_before: 0.0,
            before: Before::Nothing,
            sigma: 0.0,
            learned: None,
            variance: 0.0,
            shift_x0: 0.0,
            shift_mean: 0.0,
        }
    }
}

/// Factor of a scaled gradient in x_0 that lowers eps by sqrt(1 - alpha_bar) times it (Dhariwal and Nichol 2021,
/// algorithm 2). Pure noise says nothing about a class, so there the gradient is 0.
fn shift_x0(alpha_bar: f64) -> f64 {
    if alpha_bar == 0.0 { 0.0 } else { (1.0 - alpha_bar) / alpha_bar.sqrt() }
}

/// Factors of x_0 and x_t in the mean of p(x_{t-1} | x_t), and its standard deviation (DDPM, equations 7 and 11).
fn ancestral(plain: Step, chain: &Schedule, variance: Variance, i: usize) -> Step {
    let (c_x0, c_xt) = chain.posterior_mean_coefficients(i);
    let step = Step { c_x0, c_xt, shift_x0: 0.0, shift_mean: 1.0, ..plain };
    let noisy = if i == 0 { 0.0 } else { 1.0 };
    match variance {
        Variance::FixedSmall => {
            let sigma = if i == 0 { 0.0 } else { (0.5 * chain.log_variance(variance, i)).exp() };
            Step { sigma, variance: chain.posterior_variance(i), ..step }
        }
        Variance::FixedLarge => {
            let log_variance = chain.log_variance(variance, i);
            let sigma = if i == 0 { 0.0 } else { (0.5 * log_variance).exp() };
            Step { sigma, variance: log_variance.exp(), ..step }
        }
        Variance::Learned | Variance::LearnedRaw => {
            let raw = variance == Variance::LearnedRaw;
            Step { sigma: noisy, learned: Some(LogVariance { offset: 0.0, factor: 1.0, raw }), ..step }
        }
        Variance::LearnedRange => {
            let (low, high) = (chain.log_variance(Variance::FixedSmall, i), chain.betas()[i].ln());
            let learned = LogVariance { offset: 0.5 * (high + low), factor: 0.5 * (high - low), raw: false };
            Step { sigma: noisy, learned: Some(learned), ..step }
        }
    }
}

/// `x_{t-1} = sqrt(a') x_0 + sqrt(1 - a' - sigma^2) eps + sigma z` (DDIM, equation 12) with a' = alpha_bar_{t-1} and
/// `eps = (x_t - sqrt(a) x_0) / sqrt(1 - a)`, collected by x_0 and x_t; sigma is DDIM's equation 16.
fn ddim(plain: Step, chain: &Schedule, eta: f64, i: usize) -> Step {
    let (a, before) = (chain.alpha_bar(i), chain.alpha_bar_before(i));
    let sigma = eta * ((1.0 - before) / (1.0 - a)).sqrt() * (1.0 - a / before).sqrt();
    // For eta = 1 and a long stride, rounding may take the difference below zero.
    let c_xt = ((1.0 - before - sigma * sigma).max(0.0) / (1.0 - a)).sqrt();
    Step { c_x0: before.sqrt() - c_xt * a.sqrt(), c_xt, sigma, ..plain }
}

/// DPM-Solver++ 2M with the midpoint rule (Lu et al. 2022, algorithm 2): with lambda half the log-SNR and h its
/// increase, `x_{t-1} = s'/s x_t - sqrt(a') expm1(-h) (x_0 + (x_0 - before) / (2 r))`, r the ratio of the last h to
/// this one.
///
/// h is infinite at the last step, which returns x_0, and nothing is before the first, which is of first order.
fn dpm_pp(plain: Step, chain: &Schedule, i: usize) -> Step {
    if i == 0 {
        return plain;
    }
    let (a, after) = (chain.alpha_bar(i), chain.alpha_bar(i - 1));
    let lambda = |a: f64| 0.5 * (a / (1.0 - a)).ln();
    let h = lambda(after) - lambda(a);
    let (c_x0, c_xt) = (-after.sqrt() * (-h).exp_m1(), ((1.0 - after) / (1.0 - a)).sqrt());
    if i + 1 == chain.len() {
        return Step { c_x0, c_xt, ..plain };
    }
    let half = 0.5 * h / (lambda(a) - lambda(chain.alpha_bar(i + 1)));
    Step { c_x0: c_x0 * (1.0 + half), c_xt, c_before: -c_x0 * half, before: Before::X0, ..plain }
}

/// Heun's method over the levels, noisiest first, then to the image: `y' = y + (sigma' - sigma) (d + d') / 2` with d at
/// y and d' at `y + (sigma' - sigma) d`. The first half of a step is DDIM's, from x to x~; as it moved y by
/// `(sigma' - sigma) d`, the second half is `x' = sqrt(a'/a) x / 2 + x~ / 2 + sqrt(a') (sigma' - sigma) d' / 2`, of x~,
/// x and `d' = (x~ - sqrt(a') x~_0) / sqrt(1 - a')`. The last interval has the first half alone, and so have those from
/// noise alone.
fn heun(levels: &[Level]) -> Vec<Step> {
    let mut steps = Vec::new();
    let plain = |l: &Level| Step { shift_x0: shift_x0(l.alpha_bar), ..Step::plain(l.time, l.alpha_bar, l.x_0) };
    for (j, here) in levels.iter().enumerate() {
        let a = here.alpha_bar;
        let Some(next) = levels.get(j + 1) else {
            steps.push(plain(here));
            break;
        };
        let after = next.alpha_bar;
        let c_xt = ((1.0 - after) / (1.0 - a)).sqrt();
        steps.push(Step { c_x0: after.sqrt() - c_xt * a.sqrt(), c_xt, ..plain(here) });
        if here.sigma() > NOISE_ALONE {
            continue;
        }
        let slope = 0.5 * after.sqrt() * (next.sigma() - here.sigma()) / (1.0 - after).sqrt();
        let (c_x0, c_xt, c_before) = (-slope * after.sqrt(), 0.5 + slope, 0.5 * (after / a).sqrt());
        steps.push(Step { c_x0, c_xt, c_before, before: Before::State, ..plain(next) });
    }
    steps
}

/// Ratio of the noise levels of a step of [`inversion`] above which iterating eps hardly contracts, by 1 - 1/ratio a
/// round.
const WIDEST: f64 = 8.0;

/// The steps of DDIM inversion (Song et al. 2021, section 4.3), from x_0 up to the noisiest timestep kept: each inverts
/// the step of DDIM with eta = 0 that leaves its timestep. `x_B = sqrt(b) (y_A + (sigma_B - sigma_A) eps(x_B))` from
/// level A, implicit: it is iterated, with x_t the guess of x_B, from `x_B = x_A` on, and `before` x_A.
///
/// A round of that contracts by `1 - sigma_A/sigma_B` at worst, hardly at all in the last step of a cosine schedule,
/// from sigma 32 to 20,291. There the same equation is solved for x_0, `x_B = r x_A + (sqrt(b) - sqrt(a) r) x_0(x_B)`
/// with `r = sqrt((1 - b)/(1 - a))`: for a perfect network `x_0(x_B)` moves by at most `image / sigma_B^2` times `x_B /
/// sqrt(b)`, the covariance of as many numbers in [-1, 1] having no larger eigenvalue, so a round contracts by
/// `(sigma_B/sigma_A - 1) image / sigma_B^2`. `image` is the number of elements of an image. Of a network that predicts
/// x_0 or v: from eps or mu the x_0 of noise alone is told with errors of a thousand times.
///
/// # Errors
/// `Error::Usage` for a schedule that ends in pure noise, of which nothing leads back.
pub fn inversion(schedule: &Schedule, prediction: Prediction, kept: &[u32], image: usize) -> Result<Vec<Step>> {
    let chain = schedule.keep(kept);
    if chain.alpha_bar(chain.len() - 1) == 0.0 {
        usage!(
            "the schedule ends in pure noise (zero terminal SNR), from which no image can be told: nothing can be encoded"
        );
    }
    let step = |i: usize| {
        let (b, a) = (chain.alpha_bar(i), chain.alpha_bar_before(i));
        let x_0 = prediction.x_0(schedule, kept[i] as usize);
        let plain = Step { limit: Limit::None, before: Before::State, ..Step::plain(f64::from(kept[i]), b, x_0) };
        let ratio = level(b) / level(a);
        let near = matches!(prediction, Prediction::X0 | Prediction::V);
        if near && ratio > WIDEST && (ratio - 1.0) * image as f64 / level(b).powi(2) < 1.0 {
            let r = ((1.0 - b) / (1.0 - a)).sqrt();
            return Step { c_x0: b.sqrt() - a.sqrt() * r, c_before: r, ..plain };
        }
        let slope = b.sqrt() * (level(b) - level(a)) / (1.0 - b).sqrt();
        Step { c_x0: -slope * b.sqrt(), c_xt: slope, c_before: (b / a).sqrt(), ..plain }
    };
    Ok((0..chain.len()).map(step).collect())
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

    /// The streams of the noise of correction `round` of `rounds` at timestep `t`.
    pub fn correction(&self, t: u32, round: u32, rounds: u32) -> Streams {
        let step = t.wrapping_mul(rounds).wrapping_add(round);
        Streams { seed: self.seed, purpose: Purpose::SampleCorrection, step, first: self.first }
    }
}
