//! The Euclidean norm of all gradients, `sqrt(sum g^2)`, and what follows from it: the clipping factor, and whether everything is finite.
//!
//! Squares and sums in f64 over fixed chunks, joined in order: the same bits for any number of threads. The square of an f32
//! never overflows an f64, so the norm is finite if and only if every gradient is: no second pass looks for NaN.

use crate::device::Device;

/// Norm of a flat buffer of gradients; not finite if and only if one of them is not.
pub fn grad_norm(device: &Device, g: &[f32]) -> f64 {
    match device {
        Device::Cpu(_) => cpu::sum_of_squares(g).sqrt(),
    }
}

/// The factor that brings a gradient of norm `norm` down to at most `max_norm`: `min(1, max_norm / (norm + 1e-6))`, PyTorch's `clip_grad_norm_`.
/// NaN for a norm that is not a number.
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    let factor = max_norm / (norm + 1e-6);
    if factor > 1.0 { 1.0 } else { factor }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    /// `sqrt(sum g^2)`.
    pub fn forward<T: Float>(g: &[T]) -> T {
        g.iter().fold(T::zero(), |sum, &g| sum + g * g).sqrt()
    }
}

mod cpu {
    use rayon::prelude::*;

    use crate::device::cpu::simd;

    /// Elements per task and partial sum: 256 KiB.
    const CHUNK: usize = 1 << 16;

    pub fn sum_of_squares(g: &[f32]) -> f64 {
        let sums: Vec<f64> = g.par_chunks(CHUNK).map(chunk).collect();
        sums.iter().sum()
    }

    simd::dispatch! {
        fn chunk<I>(g: &[f32]) -> f64 {
            // Thirty-two running sums hide the latency of the additions; joined in a fixed order.
            let mut sums = [0.0f64; 32];
            let (lanes, rest) = g.as_chunks::<32>();
            for g in lanes {
                sums.iter_mut().zip(g).for_each(|(sum, &g)| *sum += f64::from(g) * f64::from(g));
            }
            sums.iter_mut().zip(rest).for_each(|(sum, &g)| *sum += f64::from(g) * f64::from(g));
            sums.iter().sum()
        }
    }
}
