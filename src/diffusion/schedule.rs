//! Noise schedules: beta_t, the products alpha_bar_t, and the posterior q(x_{t-1} | x_t, x_0).
//!
//! `q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t)` (DDPM, equation 4);
//! `q(x_{t-1} | x_t, x_0) = N(c_0 x_0 + c_t x_t, beta_tilde_t)` (equations 6 and 7).

use std::f64::consts::FRAC_PI_2;

use super::learned::Curve;
use crate::error::Result;
use crate::names::names;
use crate::usage;

/// A schedule by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// beta_t evenly spaced (DDPM, section 4).
    Linear,
    /// alpha_bar_t = f(t)/f(0), f(t) = cos^2((t/T + 0.008)/1.008 pi/2), beta_t at most 0.999 (IDDPM, equation 17).
    Cosine,
    /// sqrt(beta_t) evenly spaced; `scaled_linear` in diffusers.
    Quadratic,
    /// Every beta_t equal to the end value.
    Constant,
    /// beta_t on a sigmoid over [-6, 6], scaled to the end values (GeoDiff, Xu et al. 2022), as in diffusers.
    Sigmoid,
    /// Trained with the bound ([`learned`](super::learned)); as a schedule, where that begins.
    Learned,
}

/// The smallest alpha_bar accepted, but for 0 itself: predicting x_0 from eps divides by its root, which must stay
/// within f32.
const SMALLEST_ALPHA_BAR: f64 = 1e-76;

// Also accepts the names of diffusers.
names!(Kind {
    Linear = "linear",
    Cosine = "cosine" | "squaredcos_cap_v2",
    Quadratic = "quadratic" | "scaled_linear",
    Constant = "constant",
    Sigmoid = "sigmoid",
    Learned = "learned",
});

impl Kind {
    /// Its name in `beta_schedule` of diffusers' `scheduler_config.json`; `None` for the constant schedule and a
    /// learned one, which are written there as `trained_betas`.
    pub const fn diffusers_name(self) -> Option<&'static str> {
        match self {
            Kind::Linear => Some("linear"),
            Kind::Cosine => Some("squaredcos_cap_v2"),
            Kind::Quadratic => Some("scaled_linear"),
            Kind::Constant | Kind::Learned => None,
            Kind::Sigmoid => Some("sigmoid"),
        }
    }

    /// First and last beta for a chain of `timesteps`: 1e-4 and 0.02 at the paper's 1000 steps, otherwise inversely
    /// proportional to the number of steps, so that every chain ends at about the same noise level (as in IDDPM's
    /// code).
    pub fn default_betas(timesteps: usize) -> (f64, f64) {
        let scale = 1000.0 / timesteps as f64;
        (1e-4 * scale, 0.02 * scale)
    }
}

/// Betas that have alpha_bar(t/T), up to a constant factor, as their products, each at most 0.999: two schedules of
/// diffusers that are named nowhere else.
pub fn betas_of_diffusers(name: &str, timesteps: usize) -> Option<Vec<f64>> {
    let alpha_bar: fn(f64) -> f64 = match name {
        "exp" => |s| (-12.0 * s).exp(),
        // Half the log-SNR is a Laplace distribution's quantile; the root is diffusers'.
        "laplace" => |s| {
            let log_snr = -0.5 * (0.5 - s).signum() * (1.0 - 2.0 * (0.5 - s).abs() + 1e-6).ln();
            (log_snr.exp() / (1.0 + log_snr.exp())).sqrt()
        },
        _ => return None,
    };
    let at = |t: usize| alpha_bar(t as f64 / timesteps as f64);
    Some((0..timesteps).map(|t| (1.0 - at(t + 1) / at(t)).min(0.999)).collect())
}

/// The variance of p(x_{t-1} | x_t): the two extreme choices of DDPM, section 3.2, or what the network says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variance {
    /// beta_tilde_t, the posterior variance: optimal for a data set of one point.
    FixedSmall,
    /// beta_t: optimal for data that are N(0, 1).
    FixedLarge,
    /// The second half of the network's output is its logarithm (DDPM, table 2).
    Learned,
    /// The second half of the network's output, v, is a place between the logarithms of beta_tilde_t (v = -1) and
    /// beta_t (v = 1) (IDDPM, equation 15).
    LearnedRange,
    /// The second half of the network's output is the variance itself: `learned` of diffusers. Models that have it are
    /// sampled from; nothing here trains it.
    LearnedRaw,
}

// The names of diffusers' `variance_type`, but for its `learned`, which is `learned_raw` here.
names!(Variance {
    FixedSmall = "fixed_small",
    FixedLarge = "fixed_large",
    Learned = "learned",
    LearnedRange = "learned_range",
    LearnedRaw = "learned_raw",
});

impl Variance {
    /// Whether the network puts it out, in a second half of its channels.
    pub const fn is_learned(self) -> bool {
        matches!(self, Variance::Learned | Variance::LearnedRange | Variance::LearnedRaw)
    }
}

/// beta_t and alpha_bar_t for `t` in `0..len`.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    betas: Vec<f64>,
    alpha_bar: Vec<f64>,
}

/// The longest chain accepted.
pub const MOST_TIMESTEPS: usize = 1_000_000;

impl Schedule {
    /// A named schedule with [`Kind::default_betas`].
    ///
    /// # Errors
    /// `Error::Usage` for fewer than 2 timesteps (21 for all that have end values) or more than a million.
    pub fn new(kind: Kind, timesteps: usize) -> Result<Self> {
        check_timesteps(timesteps)?;
        let (start, end) = Kind::default_betas(timesteps);
        // Only schedules without end values can be shorter than 21 steps.
        if !matches!(kind, Kind::Cosine | Kind::Learned) && end >= 1.0 {
            usage!("timesteps is {timesteps}: the {kind} schedule needs at least 21");
        }
        Schedule::with_betas(kind, timesteps, start, end)
    }

    /// A named schedule from beta `start` to beta `end`, each in (0, 1). The cosine schedule and a learned one ignore
    /// both; the constant one uses `end` only.
    ///
    /// # Errors
    /// `Error::Usage` for a beta or a number of timesteps out of range.
    pub fn with_betas(kind: Kind, timesteps: usize, start: f64, end: f64) -> Result<Self> {
        check_timesteps(timesteps)?;
        if kind == Kind::Learned {
            return Ok(Curve::new(timesteps).schedule());
        }
        if kind != Kind::Cosine {
            check_beta("beta_start", start)?;
            check_beta("beta_end", end)?;
        }
        let last = timesteps - 1;
        // From `a` to `b` in equal steps.
        let spaced = |a: f64, b: f64, t: usize| if t == last { b } else { a + (b - a) / last as f64 * t as f64 };
        let angle = |t: usize| (t as f64 / timesteps as f64 + 0.008) / 1.008 * FRAC_PI_2;
        let f = |t: usize| angle(t).cos().powi(2);
        let beta = |t: usize| match kind {
            Kind::Linear => spaced(start, end, t),
            Kind::Cosine => (1.0 - f(t + 1) / f(t)).min(0.999),
            Kind::Quadratic => spaced(start.sqrt(), end.sqrt(), t).powi(2),
            Kind::Constant => end,
            Kind::Sigmoid => start + (end - start) / (1.0 + (-spaced(-6.0, 6.0, t)).exp()),
            Kind::Learned => unreachable!("its curve is made above"),
        };
        Schedule::from_betas((0..timesteps).map(beta).collect())
    }

    /// A schedule with the given betas, each in (0, 1); the last may be 1, which leaves nothing of the image.
    ///
    /// # Errors
    /// `Error::Usage` for a beta or a number of betas out of range, or if the last alpha_bar is too small for f32.
    pub fn from_betas(betas: Vec<f64>) -> Result<Self> {
        check_timesteps(betas.len())?;
        let last = betas.len() - 1;
        for (t, &beta) in betas.iter().enumerate() {
            if t < last || beta != 1.0 {
                check_beta(&format!("beta at timestep {t}"), beta)?;
            }
        }
        let product = |alpha_bar: &mut f64, beta: &f64| {
            *alpha_bar *= 1.0 - beta;
            Some(*alpha_bar)
        };
        let alpha_bar: Vec<f64> = betas.iter().scan(1.0, product).collect();
        let left = if betas[last] == 1.0 { alpha_bar[last - 1] } else { alpha_bar[last] };
        if left < SMALLEST_ALPHA_BAR {
            usage!(
                "the product of all 1 - beta underflows: it is {left:e} and must be at least {SMALLEST_ALPHA_BAR:e}, with fewer timesteps or smaller betas"
            );
        }
        let before = std::iter::once(&1.0).chain(&alpha_bar);
        if let Some(t) = alpha_bar.iter().zip(before).position(|(alpha_bar, before)| alpha_bar >= before) {
            usage!("beta at timestep {t} is {:e}: so small that nothing is noised there", betas[t]);
        }
        Ok(Schedule { betas, alpha_bar })
    }

    /// The chain that keeps only the given timesteps (ascending). It keeps their alpha_bar, from which its betas follow
    /// (IDDPM, equation 19).
    pub fn keep(&self, timesteps: &[u32]) -> Self {
        assert!(!timesteps.is_empty(), "a chain keeps at least one timestep");
        assert!(timesteps.is_sorted_by(|a, b| a < b), "kept timesteps ascend: {timesteps:?}");
        if timesteps.len() == self.len() {
            return self.clone();
        }
        let alpha_bar: Vec<f64> = timesteps.iter().map(|&t| self.alpha_bar[t as usize]).collect();
        let before = std::iter::once(&1.0).chain(&alpha_bar);
        let betas = alpha_bar.iter().zip(before).map(|(alpha_bar, before)| 1.0 - alpha_bar / before).collect();
        Schedule { betas, alpha_bar }
    }

    /// The same with zero terminal SNR: sqrt(alpha_bar) shifted and scaled so that its first value stays and its last
    /// is 0 (Lin et al. 2024, algorithm 1). Only a network that predicts x_0, v or mu can start from there.
    pub fn with_zero_terminal_snr(&self) -> Self {
        let last = self.len() - 1;
        let root = |t: usize| self.alpha_bar[t].sqrt();
        let scale = root(0) / (root(0) - root(last));
        let alpha_bar: Vec<f64> = (0..=last).map(|t| ((root(t) - root(last)) * scale).powi(2)).collect();
        let before = std::iter::once(&1.0).chain(&alpha_bar);
        let betas = alpha_bar.iter().zip(before).map(|(alpha_bar, before)| 1.0 - alpha_bar / before).collect();
        Schedule { betas, alpha_bar }
    }

    /// Whether nothing of the image is left at the last timestep.
    pub fn has_zero_terminal_snr(&self) -> bool {
        self.alpha_bar[self.len() - 1] == 0.0
    }

    /// T, the number of timesteps.
    #[allow(clippy::len_without_is_empty)] // there is always one
    pub fn len(&self) -> usize {
        self.betas.len()
    }

    /// beta_t for every t.
    pub fn betas(&self) -> &[f64] {
        &self.betas
    }

    /// alpha_bar_t, the product of `1 - beta_s` over s <= t.
    pub fn alpha_bar(&self, t: usize) -> f64 {
        self.alpha_bar[t]
    }

    /// alpha_bar_{t-1}; 1 at `t = 0`.
    pub fn alpha_bar_before(&self, t: usize) -> f64 {
        if t == 0 { 1.0 } else { self.alpha_bar[t - 1] }
    }

    /// ln of the noise level sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t), minus half the log-SNR; infinite where
    /// nothing of the image is left.
    pub fn log_sigma(&self, t: usize) -> f64 {
        0.5 * ((1.0 - self.alpha_bar[t]) / self.alpha_bar[t]).ln()
    }

    /// Factors of x_0 and of eps in x_t: `sqrt(alpha_bar_t)` and `sqrt(1 - alpha_bar_t)` (DDPM, equation 4).
    pub fn q_sample_coefficients(&self, t: usize) -> (f64, f64) {
        (self.alpha_bar[t].sqrt(), (1.0 - self.alpha_bar[t]).sqrt())
    }

    /// Factors of x_0 and of x_t in the posterior mean (DDPM, equation 7); 1 and 0 at `t = 0`.
    pub fn posterior_mean_coefficients(&self, t: usize) -> (f64, f64) {
        let (beta, alpha_bar, before) = (self.betas[t], self.alpha_bar[t], self.alpha_bar_before(t));
        let rest = 1.0 - alpha_bar;
        (beta * before.sqrt() / rest, (1.0 - before) * (1.0 - beta).sqrt() / rest)
    }

    /// beta_tilde_t, the posterior variance (DDPM, equation 7); 0 at `t = 0`.
    pub fn posterior_variance(&self, t: usize) -> f64 {
        self.betas[t] * (1.0 - self.alpha_bar_before(t)) / (1.0 - self.alpha_bar[t])
    }

    /// Natural logarithm of the variance of p(x_{t-1} | x_t). At `t = 0`, where beta_tilde is 0, both choices have
    /// `ln beta_tilde_1`: sampling adds no noise there, but the likelihood of the data is finite and better than with
    /// beta_0. A chain of one step has no entry 1 and uses `ln beta_0`. Of a variance that is not learned.
    pub fn log_variance(&self, variance: Variance, t: usize) -> f64 {
        let single = self.len() == 1;
        let value = match variance {
            _ if single => self.betas[0],
            _ if t == 0 => self.posterior_variance(1),
            Variance::FixedSmall => self.posterior_variance(t),
            Variance::FixedLarge => self.betas[t],
            Variance::Learned | Variance::LearnedRange | Variance::LearnedRaw => {
                panic!("the {variance} variance is the network's")
            }
        };
        value.ln()
    }
}

fn check_timesteps(timesteps: usize) -> Result<()> {
    if !(2..=MOST_TIMESTEPS).contains(&timesteps) {
        usage!("timesteps is {timesteps}: must be from 2 to {MOST_TIMESTEPS}");
    }
    Ok(())
}

fn check_beta(name: &str, beta: f64) -> Result<()> {
    if !(beta > 0.0 && beta < 1.0) {
        usage!("{name} is {beta}: must lie between 0 and 1");
    }
    Ok(())
}
