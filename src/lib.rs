//! Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020).

pub mod config;
pub mod data;
pub mod device;
pub mod error;
pub mod layout;
pub mod ops;
pub mod params;
pub mod rng;
pub mod tape;
pub mod tensor;
