//! Interpolation between two images in the latent space of x_t (DDPM, section 4.3, figures 8 and 9).
//!
//! Both images are noised to t with the same noise, mixed, and decoded by the reverse process with the same noise for
//! every mixture: what changes from frame to frame is the mixture alone. With noise of its own for each image, the
//! mixture's would lose a part of its variance.

use crate::device::Device;
use crate::diffusion::Schedule;
use crate::error::Result;
use crate::ops::sample_step::{Noise, diffuse};
use crate::rng::{Purpose, Streams};
use crate::tensor::{Shape, Tensor};

/// x_t of the mixtures `(1 - lambda) a + lambda b` of two images in [-1, 1], (h, w, c): f32 (n, h, w, c). The mixture
/// of two images with the same noise is the mixture with that noise.
///
/// # Errors
/// A GPU that fails.
pub fn mixtures(
    device: &Device,
    schedule: &Schedule,
    t: u32,
    seed: u64,
    shape: Shape,
    [a, b]: [&[f32]; 2],
    lambdas: &[f64],
) -> Result<Tensor> {
    assert_eq!(shape.n, lambdas.len(), "a lambda an image");
    let mix = |&lambda: &f64| {
        let pixels = a.iter().zip(b);
        pixels.map(move |(&a, &b)| ((1.0 - lambda) * f64::from(a) + lambda * f64::from(b)) as f32)
    };
    let x_0: Vec<f32> = lambdas.iter().flat_map(mix).collect();
    let x_0 = Tensor::from_slice(device, shape, &x_0)?;
    let streams = Streams { seed, purpose: Purpose::Interpolate, step: t, first: 0 };
    let noise = Noise { streams, row: Noise::ALL };
    Ok(diffuse(device, &x_0, None, schedule.q_sample_coefficients(t as usize), noise, 1)?.x)
}

/// `frames` values from 0 to 1, evenly spaced; a single one is 1/2.
pub fn lambdas(frames: usize) -> Vec<f64> {
    match frames {
        1 => vec![0.5],
        _ => (0..frames).map(|i| i as f64 / (frames - 1) as f64).collect(),
    }
}
