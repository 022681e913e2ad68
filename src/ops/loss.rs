//! L_simple: the mean squared error of the predicted noise (DDPM, equation 14), and its gradient, in one pass.
//!
//! `L = 1/N sum_i L_i`, `L_i = 1/d sum_k (y_ik - eps_ik)^2` over the N images of a step and the d numbers of an image;
//! `dL/dy_ik = 2 (y_ik - eps_ik) / (N d)`. eps is drawn again from the batch's streams, so nothing is read but the
//! prediction.
//!
//! Shapes: prediction and gradient `(n, h, w, c)`; n may be a piece of the step's N images. Numerics: differences in
//! f32, squares and sums in f64 over fixed chunks, so per-image losses are the same bits for any number of threads.

use crate::device::Device;
use crate::diffusion::Batch;
use crate::tensor::Tensor;

/// The loss of a batch.
#[derive(Debug)]
pub struct Loss {
    /// L_i of each image.
    pub per_image: Vec<f64>,
    /// dL/dy, shaped like the prediction, if it was asked for.
    pub gradient: Option<Tensor>,
}

impl Loss {
    /// Mean over the batch's images; not finite if anything in the prediction is not.
    pub fn mean(&self) -> f64 {
        self.per_image.iter().sum::<f64>() / self.per_image.len() as f64
    }
}

/// L_i of each image, and dL/dy if `step_images` says over how many images, N, the step's loss is the mean (more than
/// the batch has if gradients are accumulated over several). `None` for a validation loss: no gradient.
pub fn loss(device: &Device, prediction: &Tensor, batch: &Batch, step_images: Option<usize>) -> Loss {
    let shape = prediction.shape();
    assert_eq!(shape.n, batch.len(), "loss: prediction {shape} for {} images", batch.len());
    assert!(!shape.is_empty(), "loss: prediction {shape}");
    let image = shape.len() / shape.n;
    let mut gradient = step_images.map(|_| Tensor::uninit(device, shape));
    let factor = 2.0 / (step_images.unwrap_or(shape.n) as f64 * image as f64);
    let per_image = match device {
        Device::Cpu(_) => {
            let dy = gradient.as_mut().map(|dy| dy.data_mut());
            cpu::forward(prediction.data(), batch, image, factor as f32, dy)
        }
    };
    Loss { per_image, gradient }
}

/// Sums the losses of images by the quarter of the timesteps they were noised to: the mean over all timesteps hides
/// that late quarters are nearly solved while the first is not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quarters {
    sums: [f64; 4],
    counts: [u64; 4],
}

impl Quarters {
    /// Adds a batch of a chain with `timesteps` timesteps.
    pub fn add(&mut self, batch: &Batch, per_image: &[f64], timesteps: usize) {
        assert_eq!(batch.t.len(), per_image.len(), "one loss for each of the batch's images");
        for (&t, loss) in batch.t.iter().zip(per_image) {
            let quarter = 4 * t as usize / timesteps;
            self.sums[quarter] += loss;
            self.counts[quarter] += 1;
        }
    }

    /// Adds what another has summed.
    pub fn merge(&mut self, other: &Quarters) {
        for quarter in 0..4 {
            self.sums[quarter] += other.sums[quarter];
            self.counts[quarter] += other.counts[quarter];
        }
    }

    /// Mean loss of each quarter, from the least noise to the most; `None` where no image fell.
    pub fn means(&self) -> [Option<f64>; 4] {
        std::array::from_fn(|q| (self.counts[q] > 0).then(|| self.sums[q] / self.counts[q] as f64))
    }

    /// Mean loss over all images; `None` without any.
    pub fn mean(&self) -> Option<f64> {
        let count: u64 = self.counts.iter().sum();
        (count > 0).then(|| self.sums.iter().sum::<f64>() / count as f64)
    }
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

    /// dL/dy, the mean being over `step_images` images.
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
    /// Noise drawn at a time, on the stack.
    const PIECE: usize = 256;

    /// L_i of each image of `len` numbers; writes `factor (y - eps)` if `dy` is given.
    pub fn forward(y: &[f32], batch: &Batch, len: usize, factor: f32, dy: Option<&mut [f32]>) -> Vec<f64> {
        // Chunks of the images in order, an empty slice of dy where no gradient is wanted.
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
        fn chunk<I>(stream: &Stream, first: usize, y: &[f32], dy: &mut [f32], factor: f32) -> f64 {
            let mut eps = [0.0; PIECE];
            // Sixteen running sums, so that the additions do not wait for each other; joined in a fixed order.
            let mut sums = [0.0f64; 16];
            for (k, y) in y.chunks(PIECE).enumerate() {
                let eps = &mut eps[..y.len()];
                normals_from(stream, first + k * PIECE, eps);
                eps.iter_mut().zip(y).for_each(|(eps, y)| *eps = y - *eps);
                let (lanes, rest) = eps.as_chunks::<16>();
                for d in lanes {
                    sums.iter_mut().zip(d).for_each(|(sum, &d)| *sum += f64::from(d) * f64::from(d));
                }
                sums.iter_mut().zip(rest).for_each(|(sum, &d)| *sum += f64::from(d) * f64::from(d));
                if !dy.is_empty() {
                    dy[k * PIECE..][..y.len()].iter_mut().zip(&*eps).for_each(|(dy, d)| *dy = factor * d);
                }
            }
            sums.iter().sum()
        }
    }
}
