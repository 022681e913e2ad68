//! The Euclidean norm of all gradients, `sqrt(sum g^2)`, and what follows from it: the clipping factor and whether
//! every gradient is finite.
//!
//! Squares and sums in f64 over fixed chunks, joined in order: the same bits for any number of threads. The square of
//! an f32 never overflows an f64, so the norm is finite if and only if every gradient is, and no second pass looks for
//! NaN.
//!
//! Of several ranks each has a shard of the gradient: [`squares`] sums those of its chunks, and [`join`] makes of the
//! sums of all ranks the norm, with the bits that [`grad_norm`] has for the whole. So shards are whole [`CHUNK`]s.

use crate::device::Device;
use crate::error::Result;
use crate::meter::Meter;
use crate::tensor::{Shape, Tensor};

/// Elements that a shard of a gradient is a multiple of: a chunk of the CPU's sums, and several of a GPU's.
pub const CHUNK: usize = 1 << 16;

/// Writes the norm of a flat buffer of gradients, and the factor that clips it to `max_norm` (0: no clipping), to the
/// meter's row. The norm is finite if and only if every gradient is. On a GPU a norm, or a loss in the row, that is not
/// finite halts all later updates.
///
/// # Errors
/// A GPU error.
pub fn grad_norm(device: &Device, g: &Tensor, max_norm: f64, meter: &mut Meter) -> Result<()> {
    match (device, meter) {
        (Device::Cpu(_), meter) => {
            let mut sums = vec![0.0; g.shape().len().div_ceil(CHUNK)];
            cpu::squares(g.data(), &mut sums);
            note(sums.iter().sum::<f64>().sqrt(), max_norm, meter);
            Ok(())
        }
        (Device::Cuda(gpu), Meter::Cuda(meter)) => cuda::forward(gpu, g, max_norm, meter),
        (Device::Meta(_), _) => Ok(()),
        (Device::Cuda(gpu), Meter::Cpu(_)) => panic!("grad_norm: the meter is not on {gpu}"),
    }
}

/// Chunks of a shard of `len` elements, each of which has a sum of squares.
fn chunks(device: &Device, len: usize) -> usize {
    assert!(len.is_multiple_of(CHUNK), "grad_norm: a shard of {len} elements, a multiple of {CHUNK} is expected");
    len / if device.is_gpu() { cuda::CHUNK } else { CHUNK }
}

/// Shape of the sums of squares of all ranks, for shards of `len` elements: a row for each rank, f64 in the place of
/// two elements.
pub fn squares_shape(device: &Device, ranks: usize, len: usize) -> Shape {
    Shape::new(ranks, 1, 1, 2 * chunks(device, len))
}

/// Writes the sums of squares of the chunks of `g`, a shard of which the first `len` elements count, to its row of
/// `sums`, which is as [`squares_shape`] says. If a loss in the meter's row is not finite, they say that the norm is
/// not, so that all ranks come to know.
///
/// # Errors
/// A GPU error.
pub fn squares(
    device: &Device,
    g: &Tensor,
    len: usize,
    sums: &mut Tensor,
    rank: usize,
    meter: &mut Meter,
) -> Result<()> {
    let shape = sums.shape();
    assert_eq!(shape, squares_shape(device, shape.n, g.shape().len()), "grad_norm: sums of a shard {}", g.shape());
    assert!(rank < shape.n && len <= g.shape().len(), "grad_norm: {len} elements of {}, rank {rank}", g.shape());
    match (device, meter) {
        (Device::Cpu(_), meter) => {
            let own = &mut cpu::of_f64_mut(sums)[rank * shape.c / 2..][..shape.c / 2];
            own.fill(0.0);
            cpu::squares(&g.data()[..len], own);
            if !meter.losses_are_finite() {
                own[0] = f64::NAN;
            }
            Ok(())
        }
        (Device::Cuda(gpu), Meter::Cuda(meter)) => cuda::squares(gpu, g, len, sums, rank, meter),
        (Device::Meta(_), _) => Ok(()),
        (Device::Cuda(gpu), Meter::Cpu(_)) => panic!("grad_norm: the meter is not on {gpu}"),
    }
}

/// [`grad_norm`] from the [`squares`] of all ranks.
///
/// # Errors
/// A GPU error.
pub fn join(device: &Device, sums: &Tensor, max_norm: f64, meter: &mut Meter) -> Result<()> {
    match (device, meter) {
        (Device::Cpu(_), meter) => {
            note(cpu::of_f64(sums).iter().sum::<f64>().sqrt(), max_norm, meter);
            Ok(())
        }
        (Device::Cuda(gpu), Meter::Cuda(meter)) => cuda::join(gpu, sums, max_norm, meter),
        (Device::Meta(_), _) => Ok(()),
        (Device::Cuda(gpu), Meter::Cpu(_)) => panic!("grad_norm: the meter is not on {gpu}"),
    }
}

/// Writes a norm and what follows from it to a meter on the host.
fn note(norm: f64, max_norm: f64, meter: &mut Meter) {
    let row = meter.host_row();
    row.grad_norm = norm;
    row.clip = if max_norm > 0.0 { clip_factor(norm, max_norm) } else { 1.0 };
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

    use super::{CHUNK, Tensor};
    use crate::device::cpu::simd;

    /// The numbers of a tensor of f64 in the place of two elements.
    pub fn of_f64(x: &Tensor) -> &[f64] {
        bytemuck::cast_slice(x.data())
    }

    pub fn of_f64_mut(x: &mut Tensor) -> &mut [f64] {
        bytemuck::cast_slice_mut(x.data_mut())
    }

    /// The sum of squares of each chunk, a task of 256 KiB; there may be more sums than chunks.
    pub fn squares(g: &[f32], sums: &mut [f64]) {
        g.par_chunks(CHUNK).zip(sums).for_each(|(g, sum)| *sum = chunk(g));
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
    use crate::kernels::grad_norm::{FWD, JOIN, SQUARES};
    use crate::kernels::philox::THREADS;
    use crate::meter::CudaMeter;

    pub use crate::kernels::grad_norm::CHUNK;

    const _: () = assert!(super::CHUNK.is_multiple_of(CHUNK), "a shard is whole chunks");

    pub fn forward(gpu: &Gpu, g: &Tensor, max_norm: f64, meter: &mut CudaMeter) -> Result<()> {
        let len = g.shape().len();
        assert!(len.is_multiple_of(4), "grad_norm: {len} gradients, the flat buffer has a multiple of 4");
        let blocks = len.div_ceil(CHUNK).max(1);
        let mut partial = gpu.alloc(8 * blocks)?; // (blocks), f64
        let micro_batches = meter.micro_batches();
        let row = meter.for_writing_step(gpu.now());
        let launch = gpu.launch(&FWD, [blocks, 1, 1], THREADS).view_mut(row.rows).buffer_mut(row.halt);
        let launch = launch.buffer_mut(&mut partial).buffer_mut(row.done).read(g).u64(len).u32(micro_batches);
        launch.f64(max_norm).clock().run()
    }

    pub fn squares(gpu: &Gpu, g: &Tensor, len: usize, sums: &mut Tensor, rank: usize, meter: &CudaMeter) -> Result<()> {
        assert!(len.is_multiple_of(4), "grad_norm: {len} gradients, the flat buffer has a multiple of 4");
        let row = sums.shape().c;
        let own = sums.view_mut(rank * row..(rank + 1) * row); // (chunks), f64
        let launch = gpu.launch(&SQUARES, [row / 2, 1, 1], THREADS).view_mut(own).view(meter.rows(gpu.now()));
        launch.read(g).u64(len).u32(meter.micro_batches()).clock().run()
    }

    pub fn join(gpu: &Gpu, sums: &Tensor, max_norm: f64, meter: &mut CudaMeter) -> Result<()> {
        let row = meter.for_writing_step(gpu.now());
        let launch = gpu.launch(&JOIN, [1, 1, 1], THREADS).view_mut(row.rows).buffer_mut(row.halt).read(sums);
        launch.u32(sums.shape().len() / 2).f64(max_norm).clock().run()
    }
}
