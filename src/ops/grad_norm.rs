//! The Euclidean norm of all gradients, `sqrt(sum g^2)`, and what follows from it: the clipping factor and whether
//! every gradient is finite.
//!
//! Squares and sums in f64 over fixed chunks, joined in order: the same bits for any number of threads. The square of
//! an f32 never overflows an f64, so the norm is finite if and only if every gradient is, and no second pass looks for
//! NaN.

use crate::device::Device;
use crate::error::Result;
use crate::meter::Meter;
use crate::tensor::Tensor;

/// Writes the norm of a flat buffer of gradients, and the factor that clips it to `max_norm` (0: no clipping), to the
/// meter's row. The norm is finite if and only if every gradient is. On a GPU a norm, or a loss in the row, that is not
/// finite halts all later updates.
///
/// # Errors
/// A GPU error.
pub fn grad_norm(device: &Device, g: &Tensor, max_norm: f64, meter: &mut Meter) -> Result<()> {
    match (device, meter) {
        (Device::Cpu(_), meter) => {
            let norm = cpu::sum_of_squares(g.data()).sqrt();
            let row = meter.host_row();
            row.grad_norm = norm;
            row.clip = if max_norm > 0.0 { clip_factor(norm, max_norm) } else { 1.0 };
            Ok(())
        }
        (Device::Cuda(gpu), Meter::Cuda(meter)) => cuda::forward(gpu, g, max_norm, meter),
        (Device::Meta(_), _) => Ok(()),
        (Device::Cuda(gpu), Meter::Cpu(_)) => panic!("grad_norm: the meter is not on {gpu}"),
    }
}

/// The factor that scales a gradient of norm `norm` down to at most `max_norm`: `min(1, max_norm / (norm + 1e-6))`,
/// PyTorch's `clip_grad_norm_`. NaN if `norm` is NaN.
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

    /// Elements per task, each with one partial sum: 256 KiB.
    const CHUNK: usize = 1 << 16;

    pub fn sum_of_squares(g: &[f32]) -> f64 {
        let sums: Vec<f64> = g.par_chunks(CHUNK).map(chunk).collect();
        sums.iter().sum()
    }

    simd::dispatch! {
        fn chunk<S>(g: &[f32]) -> f64 {
            // Four streams through the chunk at once: the processor prefetches each, and one alone does not use the
            // full memory bandwidth. Each has 16 running sums, which hide the latency of the additions; they are joined
            // in a fixed order.
            let mut sums = [[0.0f64; 16]; 4];
            let (lanes, rest) = g.as_chunks::<16>();
            let quarter = lanes.len() / 4;
            let (places, more) = lanes.split_at(4 * quarter);
            let (a, b) = places.split_at(2 * quarter);
            let ((a, b), (c, d)) = (a.split_at(quarter), b.split_at(quarter));
            for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
                for (sums, g) in sums.iter_mut().zip([a, b, c, d]) {
                    sums.iter_mut().zip(g).for_each(|(sum, &g)| *sum += f64::from(g) * f64::from(g));
                }
            }
            for g in more.iter().map(|g| &g[..]).chain([rest]) {
                sums[0].iter_mut().zip(g).for_each(|(sum, &g)| *sum += f64::from(g) * f64::from(g));
            }
            sums.iter().flatten().sum()
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::Gpu;
    use crate::kernels::grad_norm::{CHUNK, FWD};
    use crate::kernels::philox::THREADS;
    use crate::meter::CudaMeter;

    pub fn forward(gpu: &Gpu, g: &Tensor, max_norm: f64, meter: &mut CudaMeter) -> Result<()> {
        let len = g.shape().len();
        assert!(len.is_multiple_of(4), "grad_norm: {len} gradients, the flat buffer has a multiple of 4");
        let blocks = len.div_ceil(CHUNK).max(1);
        let mut partial = gpu.alloc(8 * blocks)?; // (blocks), f64
        let row = meter.for_writing(gpu.now());
        let launch = gpu.launch(&FWD, [blocks, 1, 1], THREADS).view_mut(row.rows).buffer_mut(row.halt);
        let launch = launch.buffer_mut(&mut partial).buffer_mut(row.done).read(g).u64(len).f64(max_norm);
        launch.clock().run()
    }
}
