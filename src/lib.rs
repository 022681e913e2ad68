//! Denoising diffusion probabilistic models.
