//! What training minimises, and the variational bound, as factors that depend on the timestep alone.
//!
//! At a given x_t, everything the losses compare is affine in the network's output y, so its distance from the target,
//! `d = y - target`, is enough: the prediction of x_0 errs by `x_0_error d`, and the mean of p(x_{t-1} | x_t) differs
//! from that of q(x_{t-1} | x_t, x_0) by as many posterior standard deviations as `mean_error d`. x_0 itself is needed
//! only for the target of a prediction other than eps, and for the ends of the scale in the decoder.
//!
//! With z = `mean_error` d and delta = ln of the variance of q minus that of p, a term of the bound is, in nats per
//! element (DDPM, equation 5, with the posterior of equation 7)
//!
//! - KL(q || p) = (expm1(delta) - delta + z^2 exp(delta)) / 2 for t > 0;
//! - at t = 0, -ln of the probability that a normal around the predicted mean gives to the byte of x_0 (equation 13),
//!   by the approximation of the normal distribution in the paper's code, at least 1e-12.
//!
//! Derived in docs/derivations/diffusion.md. For a chain that keeps fewer timesteps the network gets the original t,
//! and everything here is that of the kept chain, but for the meaning of the output, which is that of the chain it was
//! trained on ([`Prediction`]). Rows are found by the original t.

use std::f64::consts::LN_2;

use super::prediction::Prediction;
use super::schedule::{Schedule, Variance};
use crate::error::Result;
use crate::names::names;
use crate::usage;

/// The loss of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The mean squared error of the network's output (DDPM, equation 14, for eps).
    Simple,
    /// The bound without L_T: T times one term of it, in bits per dimension; its mean over uniform timesteps is the sum
    /// of the terms.
    Vlb,
    /// [`Loss::Simple`] + `vlb_weight` [`Loss::Vlb`], whose gradient reaches the variance alone (IDDPM, equation 16).
    Hybrid,
    /// The mean squared error weighted so that x_0 has the weight min(SNR, gamma), whatever is predicted (Hang et al.
    /// 2023).
    MinSnr,
    /// The mean squared error with its weight in the bound, in nats (DDPM, equation 12).
    Weighted,
}

names!(Loss {
    Simple = "simple",
    Vlb = "vlb",
    Hybrid = "hybrid",
    MinSnr = "min_snr",
    Weighted = "weighted",
});

impl Loss {
    /// Whether it needs the bound's terms.
    pub const fn has_bound(self) -> bool {
        matches!(self, Loss::Vlb | Loss::Hybrid)
    }
}

/// A loss over a chain, for what a network predicts.
#[derive(Clone, Debug, PartialEq)]
pub struct Objective {
    loss: Loss,
    prediction: Prediction,
    variance: Variance,
    vlb_weight: f64,
    min_snr_gamma: f64,
    /// The chain that the network was trained on.
    schedule: Schedule,
    /// The chain of the bound, and which timesteps of `schedule` it keeps, ascending.
    chain: Schedule,
    kept: Vec<u32>,
}

/// The factors of one timestep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Factors of x_0 and of eps in the target of the network's output.
    pub target: (f64, f64),
    /// Weight of d^2 in the loss.
    pub squared: f64,
    /// Weight of a term of the bound, in nats, in the loss.
    pub bound: f64,
    /// Error of the predicted x_0 for an output off by 1.
    pub x_0_error: f64,
    /// Difference of the means of p and q for an x_0 off by 1, in units of exp(`log_q` / 2).
    pub mean_of_x_0: f64,
    /// The same for an output off by 1.
    pub mean_error: f64,
    /// ln of the variance of q(x_{t-1} | x_t, x_0); at the first timestep of the chain, where that is 0, of the next.
    pub log_q: f64,
    /// ln of the variance of p is `log_q + shift + scale v`, v being the output's second half; `scale` is 0 where the
    /// variance is fixed.
    pub shift: f64,
    /// See `shift`.
    pub scale: f64,
    /// Half the width of a byte's bin in units of exp(`log_q` / 2) at the first timestep, which has the decoder; 0
    /// elsewhere.
    pub half_bin: f64,
    /// alpha_bar / (1 - alpha_bar).
    pub snr: f64,
}

/// The least probability of a byte under the decoder, as in the paper's code.
pub const LEAST_PROBABILITY: f64 = 1e-12;

impl Objective {
    /// The objective `loss` over all timesteps of a schedule. Whether the settings can work together is
    /// [`check`](Self::check)'s matter; the bound can be had of any but [`Variance::LearnedRaw`], whose logarithm is
    /// not linear in the output.
    pub fn new(loss: Loss, prediction: Prediction, variance: Variance, schedule: &Schedule) -> Self {
        let kept = (0..schedule.len() as u32).collect();
        let (schedule, chain) = (schedule.clone(), schedule.clone());
        Objective { loss, prediction, variance, vlb_weight: 0.001, min_snr_gamma: 5.0, schedule, chain, kept }
    }

    /// With another weight of L_vlb in [`Loss::Hybrid`] and another gamma of [`Loss::MinSnr`]; 0.001 and 5 by default.
    pub fn with_weights(self, vlb_weight: f64, min_snr_gamma: f64) -> Self {
        Objective { vlb_weight, min_snr_gamma, ..self }
    }

    /// The same over all timesteps of another schedule.
    pub fn on(self, schedule: &Schedule) -> Self {
        let kept = (0..schedule.len() as u32).collect();
        Objective { schedule: schedule.clone(), chain: schedule.clone(), kept, ..self }
    }

    /// The same over the chain that keeps only the given timesteps, ascending.
    pub fn over(self, kept: &[u32]) -> Self {
        Objective { chain: self.schedule.keep(kept), kept: kept.to_vec(), ..self }
    }

    /// Refuses what cannot be trained.
    ///
    /// # Errors
    /// `Error::Usage`, with the reason.
    pub fn check(&self) -> Result<()> {
        let (loss, variance) = (self.loss, self.variance);
        if variance == Variance::LearnedRaw {
            usage!(
                "variance = learned_raw is that of models of diffusers, whose network puts out the variance itself: they are sampled from, not trained; variance = learned trains its logarithm"
            );
        }
        let learned = variance.is_learned();
        if learned && !loss.has_bound() {
            usage!(
                "loss = {loss}: it does not depend on the variance, so variance = {variance} would stay untrained; loss = hybrid or vlb trains it"
            );
        }
        if loss == Loss::Hybrid && !learned {
            usage!(
                "loss = hybrid: its bound trains the variance alone, and variance = {variance} is not trained; variance = learned_range would be, or use loss = simple"
            );
        }
        if self.vlb_weight <= 0.0 {
            usage!("vlb_weight = {} must be above 0; IDDPM has 0.001", self.vlb_weight);
        }
        if self.min_snr_gamma <= 0.0 {
            usage!("min_snr_gamma = {} must be above 0; its paper has 5", self.min_snr_gamma);
        }
        if !self.schedule.has_zero_terminal_snr() {
            return Ok(());
        }
        if self.prediction == Prediction::Mu {
            usage!(
                "prediction = mu: with zero terminal SNR next to nothing of x_0 is in the mean of the last timestep, where sampling starts, which stays untrained; prediction = v or x0 would do"
            );
        }
        // The bound's weight of x_0's error there is half of alpha_bar two timesteps before: 2e-9 of the linear one.
        let weight = match loss {
            Loss::Simple | Loss::Hybrid => return Ok(()),
            Loss::MinSnr => "weight 0",
            Loss::Vlb | Loss::Weighted => "next to no weight",
        };
        let other = if learned { Loss::Hybrid } else { Loss::Simple };
        usage!(
            "loss = {loss}: with zero terminal SNR the last timestep, where sampling starts, has {weight} and stays untrained; loss = {other} would train it"
        );
    }

    /// The loss.
    pub fn loss(&self) -> Loss {
        self.loss
    }

    /// What the network predicts.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// The variance of p.
    pub fn variance(&self) -> Variance {
        self.variance
    }

    /// The chain that the network was trained on.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The chain of the bound.
    pub fn chain(&self) -> &Schedule {
        &self.chain
    }

    /// The timesteps that the chain keeps, ascending.
    pub fn kept(&self) -> &[u32] {
        &self.kept
    }

    /// Whether the bound trains the variance alone.
    pub fn stops_mean(&self) -> bool {
        self.loss == Loss::Hybrid
    }

    /// Whether it is L_simple of eps with a fixed variance, which needs neither x_0 nor a table.
    pub fn is_plain(&self) -> bool {
        self.loss == Loss::Simple && self.prediction == Prediction::Eps && !self.variance.is_learned()
    }

    /// The factors of timestep `t` of the network, if the chain keeps it.
    pub fn row(&self, t: u32) -> Option<Row> {
        let i = self.kept.binary_search(&t).ok()?;
        let (full, chain, t) = (&self.schedule, &self.chain, t as usize);
        let log_q = chain.log_variance(Variance::FixedSmall, i);
        let (shift, scale) = match self.variance {
            Variance::Learned => (-log_q, 1.0),
            Variance::LearnedRaw => panic!("the bound of a network that puts out the variance itself"),
            // v from -1 to 1 is from log_q to ln beta (IDDPM, equation 15).
            Variance::LearnedRange => {
                let half = 0.5 * (chain.betas()[i].ln() - log_q);
                (half, half)
            }
            fixed => (chain.log_variance(fixed, i) - log_q, 0.0),
        };
        let x_0_error = self.prediction.x_0(full, t).output;
        let in_deviations = (-0.5 * log_q).exp();
        let mean_of_x_0 = chain.posterior_mean_coefficients(i).0 * in_deviations;
        let mean_error = mean_of_x_0 * x_0_error;
        let alpha_bar = chain.alpha_bar(i);
        let snr = alpha_bar / (1.0 - alpha_bar);
        let terms = chain.len() as f64 / LN_2;
        let (squared, bound) = match self.loss {
            Loss::Simple => (1.0, 0.0),
            Loss::Vlb => (0.0, terms),
            Loss::Hybrid => (1.0, self.vlb_weight * terms),
            Loss::MinSnr => (snr.min(self.min_snr_gamma) * x_0_error * x_0_error, 0.0),
            Loss::Weighted => (0.5 * mean_error * mean_error * (-shift).exp(), 0.0),
        };
        let half_bin = if i == 0 { in_deviations / 255.0 } else { 0.0 };
        let target = self.prediction.target(full, t);
        Some(Row { target, squared, bound, x_0_error, mean_of_x_0, mean_error, log_q, shift, scale, half_bin, snr })
    }

    /// L_T of an image in bits per dimension: the divergence of q(x_T | x_0) from N(0, 1), mean over its elements.
    pub fn prior(&self, pixels: &[u8]) -> f64 {
        let alpha_bar = self.chain.alpha_bar(self.chain.len() - 1);
        let square = |u: &u8| ((2.0 * f64::from(*u) - 255.0) / 255.0).powi(2);
        let mean_square = pixels.iter().map(square).sum::<f64>() / pixels.len() as f64;
        // (-1 - ln(1 - a) + (1 - a) + a x_0^2) / 2 with a = alpha_bar.
        0.5 * (alpha_bar * mean_square - alpha_bar - (-alpha_bar).ln_1p()) / LN_2
    }
}
