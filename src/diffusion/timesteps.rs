//! Which timesteps a reverse process visits.

use std::fmt;
use std::str::FromStr;

use super::schedule::Schedule;
use crate::error::{Error, Result};
use crate::names::{Named, names};
use crate::usage;

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
    /// The `steps` kept out of `0..timesteps`, ascending, of a chain whose last step removes the noise of the lowest.
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

/// What `--spacing` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Timesteps {
    /// A spacing by name.
    Spaced(Spacing),
    /// The noise levels of Karras et al. 2022, equation 5, with rho = 7, between those of the schedule's ends, but none
    /// above 164, where x is noise alone.
    ///
    /// Each is rounded to a timestep, and a step is between the levels of the timesteps, so that the network is asked
    /// about the noise that x_t has. diffusers' solvers ask it at the same rounded timesteps but step between the
    /// levels before rounding. [`Sampler::heun_over_levels`](super::Sampler::heun_over_levels) rounds nothing.
    Karras,
    /// So many in each of as many equal sections, evenly spaced there: OpenAI's respacing `10,15,20`.
    Sections(Vec<usize>),
}

impl Default for Timesteps {
    fn default() -> Self {
        Timesteps::Spaced(Spacing::default())
    }
}

impl fmt::Display for Timesteps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Timesteps::Spaced(spacing) => spacing.fmt(f),
            Timesteps::Karras => f.write_str("karras"),
            Timesteps::Sections(counts) => {
                f.write_str(&counts.iter().map(usize::to_string).collect::<Vec<_>>().join(","))
            }
        }
    }
}

impl FromStr for Timesteps {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "karras" {
            return Ok(Timesteps::Karras);
        }
        if text.starts_with(|c: char| c.is_ascii_digit()) {
            return match text.split(',').map(str::parse).collect() {
                Ok(counts) => Ok(Timesteps::Sections(counts)),
                Err(_) => usage!("`{text}`: numbers with commas between them are expected, such as 10,15,20"),
            };
        }
        match Spacing::named(text) {
            Some(spacing) => Ok(Timesteps::Spaced(spacing)),
            None => {
                usage!("`{text}`: one of {}, karras or a list such as 10,15,20 is expected", Spacing::NAMES.join(", "))
            }
        }
    }
}

/// The exponent of Karras et al. 2022.
const RHO: f64 = 7.0;

/// A noise level (half the log-SNR is -5.1) above which x is noise alone: the linear schedule ends just below it, the
/// cosine one at 20,291, in its last timestep.
pub(super) const NOISE_ALONE: f64 = 164.0;

impl Timesteps {
    /// The steps that a list of sections takes; `None` for what takes any number.
    pub fn own_steps(&self) -> Option<usize> {
        match self {
            Timesteps::Sections(counts) => Some(counts.iter().sum()),
            Timesteps::Spaced(_) | Timesteps::Karras => None,
        }
    }

    /// The timesteps kept, ascending: `steps` of them, or fewer for [`Timesteps::Karras`], whose levels may fall on the
    /// same timestep. `offset` is diffusers' `steps_offset`.
    ///
    /// For a `solver` of the ODE, [`Spacing::Even`] and [`Spacing::Leading`] are those of diffusers' solvers: N + 1
    /// points from 0, without 0, from which the last step would jump over the largest change of the log-SNR.
    ///
    /// # Errors
    /// Those of [`Spacing::timesteps_from`]; `Error::Usage` for sections that keep more timesteps than they have, and
    /// for levels of a schedule that ends in pure noise.
    pub fn kept(&self, schedule: &Schedule, solver: bool, offset: u32, steps: usize) -> Result<Vec<u32>> {
        let timesteps = schedule.len();
        match self {
            Timesteps::Spaced(spacing @ (Spacing::Even | Spacing::Leading)) if solver => {
                if steps == 0 || steps >= timesteps {
                    usage!(
                        "the number of sampling steps is {steps}: with this sampler it must be from 1 to {}, one less than the model's timesteps",
                        timesteps - 1
                    );
                }
                let mut kept = spacing.timesteps_from(offset, timesteps, steps + 1)?;
                kept.remove(0);
                Ok(kept)
            }
            Timesteps::Spaced(spacing) => spacing.timesteps_from(offset, timesteps, steps),
            Timesteps::Karras => {
                let levels = Timesteps::karras_levels(schedule, steps)?;
                let mut kept: Vec<u32> = levels.iter().rev().map(|(t, _)| t.round_ties_even() as u32).collect();
                kept.dedup();
                Ok(kept)
            }
            Timesteps::Sections(counts) => sections(timesteps, counts),
        }
    }

    /// `steps` noise levels `sigma = sqrt((1 - alpha_bar) / alpha_bar)`, falling from the schedule's last, at most 164,
    /// to its first, evenly spaced in sigma^(1/7), each with its timestep, fractional: linear in ln sigma between two
    /// timesteps.
    ///
    /// # Errors
    /// `Error::Usage` unless `steps` is from 1 to the number of timesteps, and for a schedule that ends in pure noise.
    pub fn karras_levels(schedule: &Schedule, steps: usize) -> Result<Vec<(f64, f64)>> {
        let timesteps = schedule.len();
        if steps == 0 || steps > timesteps {
            usage!("the number of sampling steps is {steps}: must be from 1 to the model's {timesteps} timesteps");
        }
        if schedule.has_zero_terminal_snr() {
            usage!(
                "the schedule ends in pure noise (zero terminal SNR), which is no finite noise level: take another --spacing than karras"
            );
        }
        let log_sigma: Vec<f64> = (0..timesteps).map(|t| schedule.log_sigma(t)).collect();
        let root = |t: usize| (log_sigma[t].min(NOISE_ALONE.ln()) / RHO).exp();
        let (most, least) = (root(timesteps - 1), root(0));
        let level = |i: usize| {
            let part = if steps == 1 { 0.0 } else { i as f64 / (steps - 1) as f64 };
            let sigma = (most + part * (least - most)).powf(RHO);
            (timestep_of(&log_sigma, sigma.ln()), sigma)
        };
        Ok((0..steps).map(level).collect())
    }
}

/// The timestep of a noise level with this ln sigma, fractional: linear between those around it in `log_sigma`, which
/// has that of every timestep, ascending. Below the first it is 0, above the last the last.
pub fn timestep_of(log_sigma: &[f64], wanted: f64) -> f64 {
    match log_sigma.partition_point(|&l| l <= wanted) {
        0 => 0.0,
        above if above == log_sigma.len() => (above - 1) as f64,
        above => {
            let (low, high) = (log_sigma[above - 1], log_sigma[above]);
            (above - 1) as f64 + (wanted - low) / (high - low)
        }
    }
}

/// OpenAI's respacing: T/n timesteps a section, the first T mod n sections one more; of each `counts` from its first to
/// its last, rounded half to even.
fn sections(timesteps: usize, counts: &[usize]) -> Result<Vec<u32>> {
    let (size, longer) = (timesteps / counts.len(), timesteps % counts.len());
    let (mut start, mut kept) = (0, Vec::new());
    for (section, &count) in counts.iter().enumerate() {
        let size = size + usize::from(section < longer);
        if count == 0 || count > size {
            usage!("a section of {size} of the {timesteps} timesteps cannot keep {count}: give from 1 to {size}");
        }
        let stride = if count == 1 { 0.0 } else { (size - 1) as f64 / (count - 1) as f64 };
        kept.extend((0..count).map(|i| start + (stride * i as f64).round_ties_even() as u32));
        start += size as u32;
    }
    // A single section is even spacing, of which one step starts from the noise.
    Ok(if kept.len() == 1 { vec![timesteps as u32 - 1] } else { kept })
}
