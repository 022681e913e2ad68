//! The diffusion process: how images are noised, and how noise becomes images.
//!
//! Equation numbers are those of Ho, Jain and Abbeel 2020 ("DDPM"), Nichol and Dhariwal 2021 ("IDDPM") and Song, Meng
//! and Ermon 2021 ("DDIM"). Index `t = 0` is one diffusion step (the papers' t = 1); `x_0` is the image itself, and
//! `alpha_bar` before index 0 is 1. All tables are f64; the factors of a step are rounded to f32 at the end.
//!
//! [`schedule`] has the noise levels, [`prediction`] what the network's output means, [`objective`] the losses and the
//! variational bound, [`learned`] a schedule trained with the bound, [`batch`] what a training step draws,
//! [`importance`] timesteps by their losses, [`timesteps`] which timesteps a reverse process visits, [`sampler`] its
//! steps. Coefficients only: the passes over pixels are the operations q_sample, loss and sample_step, built on this
//! module.

pub mod batch;
pub mod importance;
pub mod learned;
pub mod objective;
pub mod prediction;
pub mod sampler;
pub mod schedule;
pub mod timesteps;

pub use batch::{Batch, Sampling, Timestep};
pub use importance::Importance;
pub use learned::Curve;
pub use objective::Objective;
pub use prediction::Prediction;
pub use sampler::{Method, Sampler};
pub use schedule::{Kind, Schedule, Variance};
pub use timesteps::{Spacing, Timesteps};
