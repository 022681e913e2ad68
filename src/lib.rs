//! Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020).

pub mod device;
pub mod diffusion;
pub mod error;
pub mod ops;
pub mod params;
pub mod rng;
pub mod tape;
pub mod tensor;
