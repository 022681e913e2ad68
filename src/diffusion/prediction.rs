//! What the network's output means, and the conversions between the meanings.
//!
//! Each is linear in x_0 and eps, and so are x_t and the mean of q(x_{t-1} | x_t, x_0). So any two of x_t, x_0, eps, v
//! and mu give the others, with factors that depend on the timestep alone: x_0 for sampling and the bound, eps for the
//! score, the target for the loss.
//!
//! The factors are those of the chain that the network was trained on. For a chain that keeps fewer timesteps, eps, x_0
//! and v are the same, since alpha_bar is; mu is not: it is converted with the betas of the full chain.

use super::schedule::Schedule;
use crate::error::Result;
use crate::names::names;
use crate::usage;

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

    /// x_0 from x_t and the network's output at timestep `t`. Not finite for eps where alpha_bar is 0.
    pub fn x_0(self, schedule: &Schedule, t: usize) -> Mix {
        let (signal, noise) = schedule.q_sample_coefficients(t);
        match self {
            Prediction::Eps => Mix { xt: 1.0 / signal, output: -noise / signal },
            Prediction::X0 => Mix { xt: 0.0, output: 1.0 },
            Prediction::V => Mix { xt: signal, output: -noise },
            Prediction::Mu => {
                let (c_x0, c_xt) = schedule.posterior_mean_coefficients(t);
                Mix { xt: -c_xt / c_x0, output: 1.0 / c_x0 }
            }
        }
    }

    /// The same at any level of noise sigma = sqrt((1 - alpha_bar) / alpha_bar), also between timesteps. Not finite for
    /// x_0 where sigma is 0. Panics for mu, whose factors have no meaning there.
    pub fn eps_at(self, sigma: f64) -> Mix {
        let signal = 1.0 / (1.0 + sigma * sigma).sqrt();
        let noise = sigma * signal;
        match self {
            Prediction::Eps => Mix { xt: 0.0, output: 1.0 },
            Prediction::X0 => Mix { xt: 1.0 / noise, output: -signal / noise },
            Prediction::V => Mix { xt: noise, output: signal },
            Prediction::Mu => panic!("mu is predicted for timesteps alone"),
        }
    }

    /// x_0 from x_t and the network's output at a level that need not be a timestep's.
    ///
    /// # Errors
    /// `Error::Usage` for mu, which is defined by the betas of whole timesteps.
    pub fn x_0_at(self, alpha_bar: f64) -> Result<Mix> {
        let (signal, noise) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        Ok(match self {
            Prediction::Eps => Mix { xt: 1.0 / signal, output: -noise / signal },
            Prediction::X0 => Mix { xt: 0.0, output: 1.0 },
            Prediction::V => Mix { xt: signal, output: -noise },
            Prediction::Mu => {
                usage!("a network that predicts mu knows whole timesteps alone: take another --spacing than karras")
            }
        })
    }

    /// eps from x_t and the network's output at timestep `t`.
    pub fn eps(self, schedule: &Schedule, t: usize) -> Mix {
        let (signal, noise) = schedule.q_sample_coefficients(t);
        match self {
            Prediction::Eps => Mix { xt: 0.0, output: 1.0 },
            Prediction::X0 => Mix { xt: 1.0 / noise, output: -signal / noise },
            Prediction::V => Mix { xt: noise, output: signal },
            Prediction::Mu => {
                // mu = (x_t - beta eps / sqrt(1 - alpha_bar)) / sqrt(alpha) (DDPM, equation 11).
                let beta = schedule.betas()[t];
                Mix { xt: noise / beta, output: -(1.0 - beta).sqrt() * noise / beta }
            }
        }
    }
}
