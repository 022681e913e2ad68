//! L_simple: the mean squared error of the predicted noise (DDPM, equation 14), and its gradient, in one pass.
//!
//! `L = 1/N sum_i L_i`, `L_i = 1/d sum_k (y_ik - eps_ik)^2` over the N images of a step and the d elements of an image;
//! `dL/dy_ik = 2 (y_ik - eps_ik) / (N d)`. eps is redrawn from the batch's streams, so only the prediction is read.
//!
//! Shapes: prediction and gradient `(n, h, w, c)`; the n images may be one micro-batch of the step's N. Numerics:
//! differences in f32, squares and sums in f64 over fixed chunks, so per-image losses have the same bits for any number
//! of threads.

use crate::device::Device;
use crate::diffusion::Batch;
use crate::error::Result;
use crate::meter::Meter;
use crate::tensor::Tensor;

/// The loss of a batch.
#[derive(Debug)]
pub struct Loss {
    /// L_i of each image. CPU only: a GPU just sums them by quarter into the meter.
    pub per_image: Option<Vec<f64>>,
    /// dL/dy, shaped like the prediction, if requested.
    pub gradient: Option<Tensor>,
}

impl Loss {
    /// Mean over the batch's images, if they are known; not finite if any element of the prediction is not.
    pub fn mean(&self) -> Option<f64> {
        self.per_image.as_ref().map(|l| l.iter().sum::<f64>() / l.len() as f64)
    }
}

/// Adds L_i of each image to the meter's row, in the quarter of its timestep. With `step_images` = N, the number of
/// images in the step (all its micro-batches), also computes dL/dy; `None`, for a validation loss, computes no
/// gradient. `t` (n, 1, 1, 1) holds the batch's timesteps on the device, from
/// [`q_sample`](crate::ops::q_sample::q_sample).
///
/// # Errors
/// A GPU error.
pub fn loss(
    device: &Device,
    prediction: &Tensor,
    batch: &Batch,
    t: &Tensor,
    step_images: Option<usize>,
    meter: &mut Meter,
) -> Result<Loss> {
    let shape = prediction.shape();
    assert_eq!(shape.n, batch.len(), "loss: prediction {shape} for {} images", batch.len());
    assert!(!shape.is_empty(), "loss: prediction {shape}");
    let image = shape.len() / shape.n;
    let dtype = prediction.dtype();
    let mut gradient = step_images.map(|_| Tensor::uninit(device, dtype, shape)).transpose()?;
    let factor = (2.0 / (step_images.unwrap_or(shape.n) as f64 * image as f64)) as f32;
    let per_image = match (device, meter) {
        (Device::Cpu(_), meter) => {
            let dy = gradient.as_mut().map(|dy| dy.data_mut());
            let per_image = cpu::forward(prediction.data(), batch, image, factor, dy);
            meter.host_row().quarters.add(&batch.t(), batch.timesteps, &per_image);
            Some(per_image)
        }
        (Device::Cuda(gpu), Meter::Cuda(meter)) => {
            cuda::forward(gpu, prediction, batch, t, factor, gradient.as_mut(), meter)?;
            None
        }
        (Device::Meta(_), _) => None,
        (Device::Cuda(gpu), Meter::Cpu(_)) => panic!("loss: the meter is not on {gpu}"),
    };
    Ok(Loss { per_image, gradient })
}

/// The definition.
pub mod reference {
    use num_traits::{Float, FloatConst};

    use crate::diffusion::Batch;
    use crate::rng::reference::normals;

    /// L_i of each image.
    pub fn forward<T: Float + FloatConst>(prediction: &[T], batch: &Batch) -> Vec<T> {
        let image = prediction.len() / batch.len();
        let per_image = |(i, y): (usize, &[T])| {
            let eps = normals(&batch.noise.image(i), 0, image);
            let sum = y.iter().zip(&eps).fold(T::zero(), |sum, (&y, &eps)| sum + (y - eps) * (y - eps));
            sum / T::from(image).expect("a length is a number")
        };
        prediction.chunks(image).enumerate().map(per_image).collect()
    }

    /// dL/dy of the mean over `step_images` images.
    pub fn backward<T: Float + FloatConst>(prediction: &[T], batch: &Batch, step_images: usize) -> Vec<T> {
        let image = prediction.len() / batch.len();
        let factor = T::from(2.0 / (step_images as f64 * image as f64)).expect("every f64 has a nearest number");
        let of_image = |(i, y): (usize, &[T])| {
            let eps = normals::<T>(&batch.noise.image(i), 0, image);
            y.iter().zip(eps).map(|(&y, eps)| factor * (y - eps)).collect::<Vec<T>>()
        };
        prediction.chunks(image).enumerate().flat_map(of_image).collect()
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::*;
    use crate::device::cpu::simd;
    use crate::rng::{Stream, normals_from};

    /// Elements per task, of one image.
    const CHUNK: usize = 1 << 12;
    /// Normals drawn at a time, on the stack.
    const NOISE: usize = 256;

    /// L_i of each image of `len` elements; writes `factor (y - eps)` to `dy` if given.
    pub fn forward(y: &[f32], batch: &Batch, len: usize, factor: f32, dy: Option<&mut [f32]>) -> Vec<f64> {
        // The images' chunks in order, each with its slice of dy, which is empty if no gradient is wanted.
        let mut tasks: Vec<(Stream, usize, &[f32], &mut [f32])> = Vec::new();
        let mut left = dy.unwrap_or_default();
        let wanted = !left.is_empty();
        for (i, image) in y.chunks(len).enumerate() {
            for (k, y) in image.chunks(CHUNK).enumerate() {
                let (dy, rest) = left.split_at_mut(if wanted { y.len() } else { 0 });
                left = rest;
                tasks.push((batch.noise.image(i), k * CHUNK, y, dy));
            }
        }
        let sum = |(stream, first, y, dy): (Stream, usize, &[f32], &mut [f32])| chunk(&stream, first, y, dy, factor);
        let sums: Vec<f64> = tasks.into_par_iter().map(sum).collect();
        sums.chunks(len.div_ceil(CHUNK)).map(|image| image.iter().sum::<f64>() / len as f64).collect()
    }

    simd::dispatch! {
        /// Sum of the squared differences of elements `first..` of an image, and their gradient.
        fn chunk<S>(stream: &Stream, first: usize, y: &[f32], dy: &mut [f32], factor: f32) -> f64 {
            let mut eps = [0.0; NOISE];
            // Sixteen running sums, so that the additions do not wait for each other; joined in a fixed order.
            let mut sums = [0.0f64; 16];
            for (k, y) in y.chunks(NOISE).enumerate() {
                let eps = &mut eps[..y.len()];
                normals_from(stream, first + k * NOISE, eps);
                eps.iter_mut().zip(y).for_each(|(eps, y)| *eps = y - *eps);
                let (lanes, rest) = eps.as_chunks::<16>();
                for d in lanes {
                    sums.iter_mut().zip(d).for_each(|(sum, &d)| *sum += f64::from(d) * f64::from(d));
                }
                sums.iter_mut().zip(rest).for_each(|(sum, &d)| *sum += f64::from(d) * f64::from(d));
                if !dy.is_empty() {
                    dy[k * NOISE..][..y.len()].iter_mut().zip(&*eps).for_each(|(dy, d)| *dy = factor * d);
                }
            }
            sums.iter().sum()
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::Gpu;
    use crate::kernels::loss::{CHUNK, FWD};
    use crate::kernels::philox::THREADS;
    use crate::meter::CudaMeter;

    pub fn forward(
        gpu: &Gpu,
        y: &Tensor,
        batch: &Batch,
        t: &Tensor,
        factor: f32,
        dy: Option<&mut Tensor>,
        meter: &mut CudaMeter,
    ) -> Result<()> {
        let shape = y.shape();
        assert!(shape.n <= 65535, "loss: {} images at once", shape.n);
        let image = shape.len() / shape.n;
        let chunks = image.div_ceil(CHUNK);
        assert!(shape.n * chunks < 1 << 31, "loss: {} chunks; the kernel counts to 2^31", shape.n * chunks);
        let mut partial = gpu.alloc(8 * shape.n * chunks)?; // (n, chunks), f64
        let row = meter.for_writing(gpu.now());
        let launch = gpu.launch(FWD.of(y.dtype()), [chunks, shape.n, 1], THREADS).write_opt(dy).view_mut(row.rows);
        let launch = launch.buffer_mut(&mut partial).buffer_mut(row.done).read(y).read(t).u64(image);
        let launch = launch.u32(batch.timesteps as usize).f32(factor).streams_of_step(batch.noise);
        launch.u32(row.has_losses.into()).clock().run()?;
        *row.fresh = false;
        Ok(())
    }
}
