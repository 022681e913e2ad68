//! A noise schedule that is learned with the bound (DDPM, section 2, which keeps it fixed; Kingma et al. 2021,
//! "variational diffusion models", VDM).
//!
//! The curve is that of gamma = ln((1 - alpha_bar) / alpha_bar), the negative log-SNR, by timestep: piecewise linear
//! over [`PIECES`] stretches of equal length. Its parameters theta are gamma at the first and at the last timestep and,
//! for each piece, the logit of its share of the rise between them. So gamma rises whatever theta is.
//!
//! What a batch says of theta is gathered in two steps. [`slope`] makes of a few sums over an image's elements
//! ([`Sums`], which the operation `loss` takes on any device) the derivative of the image's term of the bound by gamma
//! at its timestep and at the two beside it; [`gradient`] makes of the derivatives by all gamma the one by theta. Both
//! are derived in docs/derivations/diffusion.md. L_T depends on gamma at the last timestep alone ([`slope_of_prior`]).
//!
//! VDM trains the ends of the curve by the bound, and what is between them to lower the variance of its estimate, since
//! in continuous time the bound does not depend on it. With T timesteps it does, so all of theta follows the bound
//! here; the other rule would need the square of each image's loss.

use std::f64::consts::LN_2;

use super::objective::Objective;
use super::prediction::Prediction;
use super::schedule::{Schedule, Variance};

/// Pieces of the curve, or one for each step between two timesteps if these are fewer. Finer ones would follow the
/// noise of the gradient: the bound of a long chain hardly depends on what they could change.
pub const PIECES: usize = 32;

/// gamma at the first and the last timestep of the curve that training starts from, a straight line: VDM's.
const ENDS: [f64; 2] = [-13.3, 5.0];

/// Limits of gamma, far beyond where a bound leads: noise of 3e-7 on the scale of images, and as little left of them.
const LIMITS: [f64; 2] = [-30.0, 30.0];

/// The least rise of gamma over the chain.
const LEAST_RISE: f64 = 1.0;

/// The part of the rise that all pieces share alike, so that none is flat.
const SHARED: f64 = 0.01;

/// A curve in training: its parameters, their moving average, which other commands use, and Adam's moments, in f32, so
/// that a checkpoint of f32 tensors holds all of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    timesteps: usize,
    theta: Vec<f32>,
    average: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Curve {
    /// The curve that training starts from.
    pub fn new(timesteps: usize) -> Self {
        let mut theta = vec![0.0; 2 + pieces(timesteps)];
        (theta[0], theta[1]) = (ENDS[0] as f32, ENDS[1] as f32);
        let (average, zeros) = (theta.clone(), vec![0.0; theta.len()]);
        Curve { timesteps, theta, average, m: zeros.clone(), v: zeros }
    }

    /// T.
    pub fn timesteps(&self) -> usize {
        self.timesteps
    }

    /// The parameters, in f64.
    pub fn theta(&self) -> Vec<f64> {
        self.theta.iter().map(|&v| f64::from(v)).collect()
    }

    /// The schedule as it is trained.
    pub fn schedule(&self) -> Schedule {
        schedule(&self.theta(), self.timesteps)
    }

    /// The schedule of the moving average.
    pub fn average(&self) -> Schedule {
        let average: Vec<f64> = self.average.iter().map(|&v| f64::from(v)).collect();
        schedule(&average, self.timesteps)
    }

    /// Parameters, moving average and Adam's two moments: for the optimiser, and for a checkpoint.
    pub fn state(&self) -> [&[f32]; 4] {
        [&self.theta, &self.average, &self.m, &self.v]
    }

    /// Changes the state by `update`, and keeps the ends within their limits.
    pub fn change(&mut self, update: impl FnOnce([&mut [f32]; 4])) {
        update([&mut self.theta, &mut self.average, &mut self.m, &mut self.v]);
        for theta in [&mut self.theta, &mut self.average] {
            let [low, high] = LIMITS.map(|limit| limit as f32);
            theta[0] = theta[0].clamp(low, high - LEAST_RISE as f32);
            theta[1] = theta[1].clamp(theta[0] + LEAST_RISE as f32, high);
        }
    }

    /// Takes the state from a checkpoint.
    ///
    /// # Errors
    /// A clause for numbers that no state has.
    pub fn set_state(&mut self, state: [&[f32]; 4]) -> Result<(), String> {
        if let Some(bad) = state.iter().flat_map(|part| part.iter()).find(|v| !v.is_finite()) {
            return Err(format!("holds {bad}; only finite numbers make a schedule"));
        }
        let mut read = self.clone();
        let parts = [&mut read.theta, &mut read.average, &mut read.m, &mut read.v];
        for (part, numbers) in parts.into_iter().zip(state) {
            part.copy_from_slice(numbers);
        }
        let within = read.clone();
        read.change(|_| {});
        if read != within {
            let [low, high] = LIMITS;
            return Err(format!("holds a schedule whose negative log-SNR does not rise between {low} and {high}"));
        }
        *self = read;
        Ok(())
    }
}

/// Pieces of a curve over so many timesteps.
fn pieces(timesteps: usize) -> usize {
    PIECES.min(timesteps - 1)
}

/// The share of each piece in the rise, and the softmax of the logits.
fn shares(logits: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let most = logits.iter().fold(f64::NEG_INFINITY, |most, &logit| most.max(logit));
    let powers: Vec<f64> = logits.iter().map(|logit| (logit - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    let softmax: Vec<f64> = powers.iter().map(|power| power / sum).collect();
    let alike = SHARED / logits.len() as f64;
    (softmax.iter().map(|share| alike + (1.0 - SHARED) * share).collect(), softmax)
}

/// The piece that timestep `t` lies in, and how far into it; the last timestep is at the end of the last piece.
fn place(t: usize, timesteps: usize) -> (usize, f64) {
    let (pieces, last) = (pieces(timesteps), timesteps - 1);
    if t == last {
        return (pieces - 1, 1.0);
    }
    (t * pieces / last, (t * pieces % last) as f64 / last as f64)
}

/// gamma of every timestep.
pub fn gammas(theta: &[f64], timesteps: usize) -> Vec<f64> {
    let (first, last, (shares, _)) = (theta[0], theta[1], shares(&theta[2..]));
    let before = sums_before(&shares);
    let gamma = |t: usize| {
        if t == timesteps - 1 {
            return last; // whatever the shares' sum is rounded to
        }
        let (piece, part) = place(t, timesteps);
        first + (last - first) * (before[piece] + part * shares[piece])
    };
    (0..timesteps).map(gamma).collect()
}

/// Of each piece the sum of the shares before it.
fn sums_before(shares: &[f64]) -> Vec<f64> {
    let before = |sum: &mut f64, share: &f64| {
        let before = *sum;
        *sum += share;
        Some(before)
    };
    shares.iter().scan(0.0, before).collect()
}

/// The schedule of a curve: `beta_t = -(1 - alpha_bar_t) expm1(gamma_{t-1} - gamma_t)`, which has all digits also where
/// the noise is small.
pub fn schedule(theta: &[f64], timesteps: usize) -> Schedule {
    let gammas = gammas(theta, timesteps);
    let noise = |t: usize| 1.0 / (1.0 + (-gammas[t]).exp()); // 1 - alpha_bar
    let beta = |t: usize| if t == 0 { noise(0) } else { -noise(t) * (gammas[t - 1] - gammas[t]).exp_m1() };
    Schedule::from_betas((0..timesteps).map(beta).collect()).expect("a curve that rises within its limits")
}

/// The derivative of a loss by theta, of those by gamma of every timestep.
pub fn gradient(theta: &[f64], by_gamma: &[f64]) -> Vec<f64> {
    let (rise, (shares, softmax)) = (theta[1] - theta[0], shares(&theta[2..]));
    let before = sums_before(&shares);
    let mut by_theta = vec![0.0; theta.len()];
    let [mut by_share, mut totals] = [0; 2].map(|_| vec![0.0; shares.len()]);
    for (t, slope) in by_gamma.iter().enumerate() {
        let (piece, part) = place(t, by_gamma.len());
        let along = before[piece] + part * shares[piece];
        by_theta[0] += slope * (1.0 - along);
        by_theta[1] += slope * along;
        by_share[piece] += rise * slope * part;
        totals[piece] += rise * slope;
    }
    // A share moves all gamma of the pieces behind its own as well.
    let mut behind = 0.0;
    for (by_share, total) in by_share.iter_mut().zip(totals).rev() {
        *by_share += behind;
        behind += total;
    }
    let mean: f64 = by_share.iter().zip(&softmax).map(|(slope, share)| slope * share).sum();
    for (by_logit, (slope, share)) in by_theta[2..].iter_mut().zip(by_share.iter().zip(&softmax)) {
        *by_logit = (1.0 - SHARED) * share * (slope - mean);
    }
    by_theta
}

/// Number of [`Sums`].
pub const SUMS: usize = 7;

/// Sums over the elements of an image, of which the derivative of its term of the bound by the schedule is made. With
/// dz and ddelta the derivatives of an element's term by z and delta ([`objective`](super::objective)), d the output's
/// distance from the target, v its second half and dx the derivative of the training loss by x_t: of `dz d`, `dz x_0`,
/// `dz eps`, `ddelta`, `ddelta v`, `dx x_0` and `dx eps`.
pub type Sums<T> = [T; SUMS];

/// The derivative by gamma of timesteps t - 1, t and t + 1.
pub type Slope = [f64; 3];

fn sum(parts: &[(f64, Slope)]) -> Slope {
    [0, 1, 2].map(|k| parts.iter().map(|(factor, slope)| factor * slope[k]).sum())
}

/// The derivative of the training loss of one image at timestep `t` by the schedule. `weight` is that of a term of the
/// bound, in nats and summed over the image's elements, in the training loss: as [`Row::bound`] says, over the number
/// of elements and of images. The chain must keep all timesteps.
///
/// [`Row::bound`]: super::objective::Row::bound
pub fn slope(objective: &Objective, t: u32, sums: &Sums<f64>, weight: f64) -> Slope {
    let [dz_d, dz_x_0, dz_eps, ddelta, ddelta_v, dx_x_0, dx_eps] = *sums;
    let (row, schedule, t) = (objective.row(t).expect("a timestep of the chain"), objective.schedule(), t as usize);
    let (alpha_bar, before) = (schedule.alpha_bar(t), schedule.alpha_bar_before(t));
    let (signal, noise) = schedule.q_sample_coefficients(t);
    let (rest, rest_before) = (1.0 - alpha_bar, 1.0 - before);
    // 1 / expm1(gamma_t - gamma_{t-1}); 0 at t = 0, before which gamma is minus infinity.
    let steep = |t: usize| {
        let beta = schedule.betas()[t];
        (1.0 - beta) * (1.0 - schedule.alpha_bar_before(t)) / beta
    };
    let rise = steep(t);
    // Of the logarithms of c_x0, of the variance of q, of beta, and of the size of the error of x_0.
    let c_x0 = [-rise - 0.5 * rest_before, rise, 0.0];
    let variance = match t {
        0 => [0.0, alpha_bar - steep(1), steep(1)],
        _ => [before - rise, rise, 0.0],
    };
    let beta = [-rise, alpha_bar + rise, 0.0];
    let x_0_error = match objective.prediction() {
        Prediction::Eps => [0.0, 0.5, 0.0],
        Prediction::X0 => [0.0; 3],
        Prediction::V => [0.0, 0.5 * alpha_bar, 0.0],
        Prediction::Mu => c_x0.map(|slope| -slope),
    };
    let (of_signal, of_noise) = (-0.5 * signal * rest, 0.5 * noise * alpha_bar); // derivatives by gamma_t
    // Of the factors of x_0 and eps in the target.
    let (target_x_0, target_eps) = match objective.prediction() {
        Prediction::Eps | Prediction::X0 => ([0.0; 3], [0.0; 3]),
        Prediction::V => ([0.0, -of_noise, 0.0], [0.0, of_signal, 0.0]),
        Prediction::Mu => {
            let (factor_x0, factor_xt) = schedule.posterior_mean_coefficients(t);
            let c_xt = [0.5 * rest_before + before, -0.5 * rest - alpha_bar, 0.0];
            let at = |slope: f64| [0.0, slope, 0.0];
            (
                sum(&[(factor_x0, c_x0), (factor_xt * signal, c_xt), (factor_xt, at(of_signal))]),
                sum(&[(factor_xt * noise, c_xt), (factor_xt, at(of_noise))]),
            )
        }
    };
    // Of `shift` and `scale`.
    let apart = sum(&[(1.0, beta), (-1.0, variance)]);
    let (shift, scale) = match objective.variance() {
        Variance::FixedSmall => ([0.0; 3], [0.0; 3]),
        Variance::FixedLarge if t == 0 => ([0.0; 3], [0.0; 3]),
        Variance::FixedLarge => (apart, [0.0; 3]),
        Variance::Learned => (variance.map(|slope| -slope), [0.0; 3]),
        Variance::LearnedRange => (apart.map(|slope| 0.5 * slope), apart.map(|slope| 0.5 * slope)),
        Variance::LearnedRaw => unreachable!("it has no row"),
    };
    let of_term = match t {
        // The decoder depends on the deviation of p and on the error of the mean, c_x0 being 1: z and the half width of
        // a bin change with the deviation of q as delta does.
        0 => sum(&[(row.mean_error * dz_d, x_0_error), (-ddelta, variance), (-ddelta, shift), (-ddelta_v, scale)]),
        _ => sum(&[
            (row.mean_error * dz_d, c_x0),
            (row.mean_error * dz_d, x_0_error),
            (-0.5 * row.mean_error * dz_d, variance),
            (-ddelta, shift),
            (-ddelta_v, scale),
        ]),
    };
    let of_target = sum(&[(-row.mean_error * dz_x_0, target_x_0), (-row.mean_error * dz_eps, target_eps)]);
    let by_x_t = [0.0, of_signal * dx_x_0 + of_noise * dx_eps, 0.0];
    sum(&[(weight, of_term), (weight, of_target), (1.0, by_x_t)])
}

/// The derivative of L_T by gamma of the last timestep, in bits per dimension, for images whose elements on the scale
/// of x_0 have the mean square `mean_square`.
pub fn slope_of_prior(schedule: &Schedule, mean_square: f64) -> f64 {
    let alpha_bar = schedule.alpha_bar(schedule.len() - 1);
    -0.5 * alpha_bar * ((1.0 - alpha_bar) * mean_square + alpha_bar) / LN_2
}
