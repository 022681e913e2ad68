//! What the network's output means, and the conversions between the meanings.
//!
//! Each is linear in x_0 and eps, and so are x_t and the mean of q(x_{t-1} | x_t, x_0). So any two of x_t, x_0, eps, v
//! and mu give the others, with factors that depend on the timestep alone: x_0 for sampling and the bound, eps for the
//! score, the target for the loss.
//!
//! The factors are those of the chain that the network was trained on. For a chain that keeps fewer timesteps, eps, x_0
//! and v are the same, since alpha_bar is; mu is not: it is converted with the betas of the full chain.

use super::schedule::Schedule;
use crate::names::names;

/// What the network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise eps (DDPM, section 3.2).
    Eps,
    /// The image x_0.
    X0,
    /// v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022, section 4).
    V,
    /// The mean of p(x_{t-1} | x_t) (DDPM, equation 8).
    Mu,
}

// Also accepts the names of diffusers.
names!(Prediction { Eps = "eps" | "epsilon", X0 = "x0" | "sample", V = "v" | "v_prediction", Mu = "mu" });

/// What x_t and the network's output say at a level of noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Said {
    /// The image. Not finite for a prediction of eps where nothing of the image is left.
    pub x_0: Mix,
    /// The noise. Not finite for a prediction of x_0 where there is none.
    pub eps: Mix,
}

/// `xt x_t + output y`, of x_t and the network's output y.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mix {
    /// Factor of x_t.
    pub xt: f64,
    /// Factor of the network's output.
    pub output: f64,
}

impl Prediction {
    /// Its name in `prediction_type` of diffusers' `scheduler_config.json`; `None` for mu, which diffusers does not
    /// have.
    pub const fn diffusers_name(self) -> Option<&'static str> {
        match self {
            Prediction::Eps => Some("epsilon"),
            Prediction::X0 => Some("sample"),
            Prediction::V => Some("v_prediction"),
            Prediction::Mu => None,
        }
    }

    /// Factors of x_0 and of eps in what the network should put out at timestep `t`.
    pub fn target(self, schedule: &Schedule, t: usize) -> (f64, f64) {
        let (signal, noise) = schedule.q_sample_coefficients(t);
        match self {
            Prediction::Eps => (0.0, 1.0),
            Prediction::X0 => (1.0, 0.0),
            Prediction::V => (-noise, signal),
            Prediction::Mu => {
                let (c_x0, c_xt) = schedule.posterior_mean_coefficients(t);
                (c_x0 + c_xt * signal, c_xt * noise)
            }
        }
    }

    /// What it says at any level of noise, where `x_t = signal x_0 + noise eps`, also between timesteps; `None` for mu,
    /// which is defined by the betas of whole timesteps.
    pub fn at_level(self, signal: f64, noise: f64) -> Option<Said> {
        let mix = |xt: f64, output: f64| Mix { xt, output };
        Some(match self {
            Prediction::Eps => Said { x_0: mix(1.0 / signal, -noise / signal), eps: mix(0.0, 1.0) },
            Prediction::X0 => Said { x_0: mix(0.0, 1.0), eps: mix(1.0 / noise, -signal / noise) },
            Prediction::V => Said { x_0: mix(signal, -noise), eps: mix(noise, signal) },
            Prediction::Mu => return None,
        })
    }

    /// What it says at timestep `t`.
    fn said(self, schedule: &Schedule, t: usize) -> Said {
        let (signal, noise) = schedule.q_sample_coefficients(t);
        self.at_level(signal, noise).unwrap_or_else(|| {
            let (c_x0, c_xt) = schedule.posterior_mean_coefficients(t);
            // mu = (x_t - beta eps / sqrt(1 - alpha_bar)) / sqrt(alpha) (DDPM, equation 11).
            let beta = schedule.betas()[t];
            Said {
                x_0: Mix { xt: -c_xt / c_x0, output: 1.0 / c_x0 },
                eps: Mix { xt: noise / beta, output: -(1.0 - beta).sqrt() * noise / beta },
            }
        })
    }

    /// x_0 from x_t and the network's output at timestep `t`. Not finite for eps where alpha_bar is 0.
    pub fn x_0(self, schedule: &Schedule, t: usize) -> Mix {
        self.said(schedule, t).x_0
    }

    /// eps from x_t and the network's output at timestep `t`.
    pub fn eps(self, schedule: &Schedule, t: usize) -> Mix {
        self.said(schedule, t).eps
    }
}
