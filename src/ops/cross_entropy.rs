//! The loss of a classifier, the cross-entropy of softmax(z) and the image's class y, and its gradient, in one pass.
//!
//! ```text
//! p_ik = exp(z_ik) / sum_j exp(z_ij)      L_i = -log p_iy      dL_i/dz_ik = p_ik - [k = y_i]
//! ```
//!
//! Training wants the gradient of the mean over the N images of a step, (p - [k = y]) / N; guidance that of
//! sum_i log p(y_i | x_i), [k = y] - p, which no image's share depends on the others.
//!
//! Shapes: logits z and gradient `(n, 1, 1, classes)`, labels `(n, 1, 1, 1)`, class numbers held as f32, all below the
//! number of classes. Numerics: the largest logit is subtracted before each exponential. On the CPU everything is f64
//! and rounded once; a GPU takes the exponentials in f32. The losses are f64 on both, so that the loss of an image that
//! is nearly certain is right to 1e-16, not to 6e-8.

use crate::device::Device;
use crate::diffusion::Batch;
use crate::error::Result;
use crate::meter::Meter;
use crate::ops::loss::Loss;
use crate::tensor::{Shape, Tensor};

/// Adds to the meter's row, in the quarter of each image's timestep, L_i and whether the class of the largest logit
/// (the first of equal ones) is the image's. With `step_images` = N, the number of images in the step (all its
/// micro-batches), also computes the gradient of the mean loss; `None`, for a validation loss, computes none. `labels`
/// and `t` (n, 1, 1, 1) are the batch's on the device, from [`q_sample`](crate::ops::q_sample::q_sample).
///
/// # Errors
/// A GPU error.
pub fn cross_entropy(
    device: &Device,
    logits: &Tensor,
    labels: &Tensor,
    batch: &Batch,
    t: &Tensor,
    step_images: Option<usize>,
    meter: &mut Meter,
) -> Result<Loss> {
    let shape = check(logits, labels);
    assert_eq!(shape.n, batch.len(), "cross_entropy: logits {shape} for {} images", batch.len());
    let mut gradient = step_images.map(|_| Tensor::uninit(device, logits.dtype(), shape)).transpose()?;
    let factor = 1.0 / step_images.unwrap_or(shape.n) as f64;
    let per_image = match (device, meter) {
        (Device::Cpu(_), meter) => {
            let dz = gradient.as_mut().map(|dz| dz.data_mut());
            let images = cpu::forward(logits.data(), labels.data(), shape.c, factor, dz);
            let (losses, right): (Vec<f64>, Vec<f64>) = images.into_iter().unzip();
            meter.add(&batch.t(), batch.timesteps, &losses, Some(&right), None);
            Some(losses)
        }
        (Device::Cuda(gpu), Meter::Cuda(meter)) => {
            cuda::forward(gpu, logits, labels, (t, batch.timesteps), factor, gradient.as_mut(), meter)?;
            None
        }
        (Device::Meta(_), _) => None,
        (Device::Cuda(gpu), Meter::Cpu(_)) => panic!("cross_entropy: the meter is not on {gpu}"),
    };
    Ok(Loss { per_image, partial: None, image: shape.c, gradient })
}

/// d/dz of sum_i log p(y_i), `(n, 1, 1, classes)`.
///
/// # Errors
/// A GPU error.
pub fn log_probability_gradient(device: &Device, logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let mut gradient = Tensor::uninit(device, logits.dtype(), check(logits, labels))?;
    match device {
        Device::Cpu(_) => {
            cpu::forward(logits.data(), labels.data(), logits.shape().c, -1.0, Some(gradient.data_mut()));
        }
        Device::Cuda(gpu) => cuda::gradient(gpu, logits, labels, &mut gradient)?,
        Device::Meta(_) => {}
    }
    Ok(gradient)
}

fn check(logits: &Tensor, labels: &Tensor) -> Shape {
    let shape = logits.shape();
    assert_eq!(shape, Shape::new(shape.n, 1, 1, shape.c), "cross_entropy: logits are a row an image");
    assert!(!shape.is_empty(), "cross_entropy: logits {shape}");
    assert_eq!(labels.shape(), shape.with_c(1), "cross_entropy: labels for logits {shape}");
    shape
}

/// The definition; rows of `classes` logits.
pub mod reference {
    use num_traits::Float;

    /// L_i of each image.
    pub fn forward<T: Float>(logits: &[T], labels: &[u32], classes: usize) -> Vec<T> {
        let images = logits.chunks_exact(classes).zip(labels);
        images.map(|(z, &y)| -(softmax(z)[y as usize].ln())).collect()
    }

    /// The gradient of `factor` times the sum of the losses.
    pub fn backward<T: Float>(logits: &[T], labels: &[u32], classes: usize, factor: f64) -> Vec<T> {
        let factor = T::from(factor).expect("every f64 has a nearest number");
        let of_image = |(z, &y): (&[T], &u32)| {
            let mut dz = softmax(z);
            dz[y as usize] = dz[y as usize] - T::one();
            dz.into_iter().map(|v| factor * v).collect::<Vec<T>>()
        };
        logits.chunks_exact(classes).zip(labels).flat_map(of_image).collect()
    }

    fn softmax<T: Float>(z: &[T]) -> Vec<T> {
        let largest = z.iter().fold(T::neg_infinity(), |m, &z| m.max(z));
        let e: Vec<T> = z.iter().map(|&z| (z - largest).exp()).collect();
        let sum = e.iter().fold(T::zero(), |sum, &e| sum + e);
        e.into_iter().map(|e| e / sum).collect()
    }
}

mod cpu {
    /// L_i of each image, and 1 if its class has the first of the largest logits, else 0; writes the gradient of
    /// `factor` times the sum of the losses to `dz` if given.
    pub fn forward(
        z: &[f32],
        labels: &[f32],
        classes: usize,
        factor: f64,
        mut dz: Option<&mut [f32]>,
    ) -> Vec<(f64, f64)> {
        let mut images = Vec::with_capacity(labels.len());
        for (i, (z, &label)) in z.chunks_exact(classes).zip(labels).enumerate() {
            let label = label as usize;
            assert!(label < classes, "cross_entropy: label {label} with {classes} classes");
            let largest = z.iter().fold(f32::NEG_INFINITY, |m, &z| m.max(z));
            let exp = |z: f32| (f64::from(z) - f64::from(largest)).exp();
            let sum: f64 = z.iter().map(|&z| exp(z)).sum();
            let loss = f64::from(largest) - f64::from(z[label]) + sum.ln();
            let argmax = z.iter().position(|&z| z == largest);
            images.push((loss, if argmax == Some(label) { 1.0 } else { 0.0 }));
            if let Some(dz) = &mut dz {
                for (k, (dz, &z)) in dz[i * classes..][..classes].iter_mut().zip(z).enumerate() {
                    let p = exp(z) / sum;
                    *dz = (factor * if k == label { p - 1.0 } else { p }) as f32;
                }
            }
        }
        images
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::{Gpu, Launch};
    use crate::kernels::cross_entropy::FWD;
    use crate::kernels::philox::THREADS;
    use crate::meter::CudaMeter;

    /// Eight images a block.
    fn launch<'a>(gpu: &'a Gpu, z: &Tensor) -> Launch<'a> {
        let n = z.shape().n;
        assert!(n <= 65535, "cross_entropy: {n} images at once");
        gpu.launch(FWD.of(z.dtype()), [n.div_ceil(THREADS as usize / 32), 1, 1], THREADS)
    }

    pub fn forward(
        gpu: &Gpu,
        z: &Tensor,
        labels: &Tensor,
        (t, timesteps): (&Tensor, u32),
        factor: f64,
        dz: Option<&mut Tensor>,
        meter: &mut CudaMeter,
    ) -> Result<()> {
        let Shape { n, c, .. } = z.shape();
        let mut partial = gpu.alloc(2 * 8 * n)?; // (2, n), f64
        let row = meter.for_writing(gpu.now());
        let launch = launch(gpu, z).write_opt(dz).view_mut(row.rows).buffer_mut(&mut partial).buffer_mut(row.done);
        let launch = launch.read(z).read(labels).read(t).u32(n).u32(c).u32(timesteps as usize).f32(factor as f32);
        launch.u32(row.has_losses.into()).clock().run()?;
        *row.fresh = false;
        Ok(())
    }

    pub fn gradient(gpu: &Gpu, z: &Tensor, labels: &Tensor, dz: &mut Tensor) -> Result<()> {
        let Shape { n, c, .. } = z.shape();
        let launch = launch(gpu, z).write(dz).null().null().null().read(z).read(labels).null();
        launch.u32(n).u32(c).u32(1).f32(-1.0).u32(0).clock().run()
    }
}
