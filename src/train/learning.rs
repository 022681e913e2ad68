//! A schedule in training ([`Curve`]): what the micro-batches of a step say of it, and its update.
//!
//! After the backward pass of a micro-batch the operation `loss` takes a few sums of each image. On a GPU they are
//! copied to the host in stream order, 56 bytes per 4,096 elements of an image, and waited for at the end of the step,
//! when all its work has been launched; the next step begins with the factors of the new schedule. So the GPU idles
//! while the host makes them and launches the first kernels. Sums of the step before, as importance sampling has them,
//! would avoid that and make part of a checkpoint of them.
//!
//! Of several ranks each has the sums of its own images; they give them to each other, and all make the same update.

use std::collections::VecDeque;

use crate::data::Dataset;
use crate::device::Device;
use crate::device::cuda::Readback;
use crate::diffusion::Curve;
use crate::diffusion::learned::{SUMS, Sums, gradient, slope, slope_of_prior};
use crate::error::Result;
use crate::exchange::Exchange;
use crate::ops::adam::{self, Update};
use crate::ops::loss::{OfSchedule, Table};

/// A curve, and what the images of a step that is not complete say of it.
pub struct Learning {
    curve: Curve,
    /// Mean square of x_0 over the training images, on which L_T depends.
    mean_square: f64,
    /// Timestep and sums of each image.
    images: Vec<OfImage>,
    on_gpu: Option<OnGpu>,
}

/// The timestep of an image, and its sums.
type OfImage = [f64; 1 + SUMS];

struct OnGpu {
    readback: Readback,
    /// The timesteps of the micro-batches whose sums are on their way.
    timesteps: VecDeque<Vec<u32>>,
}

impl Learning {
    /// The curve that training starts from, for these images.
    pub fn new(device: &Device, timesteps: usize, images: &Dataset) -> Self {
        let on_gpu = match device {
            Device::Cuda(gpu) => Some(OnGpu { readback: gpu.readback(), timesteps: VecDeque::new() }),
            Device::Cpu(_) | Device::Meta(_) => None,
        };
        Learning { curve: Curve::new(timesteps), mean_square: mean_square(images), images: Vec::new(), on_gpu }
    }

    /// The curve.
    pub fn curve(&self) -> &Curve {
        &self.curve
    }

    /// The same, to be filled from a checkpoint.
    pub fn curve_mut(&mut self) -> &mut Curve {
        &mut self.curve
    }

    /// Begins a step.
    pub fn begin(&mut self) -> Result<()> {
        // What a step that failed half-way has left.
        self.images.clear();
        while let Some(on_gpu) = &mut self.on_gpu
            && on_gpu.timesteps.pop_front().is_some()
        {
            on_gpu.readback.take()?;
        }
        Ok(())
    }

    /// Adds the sums of a micro-batch at the timesteps `t`.
    pub fn add(&mut self, t: Vec<u32>, sums: OfSchedule) -> Result<()> {
        match (sums, &mut self.on_gpu) {
            (OfSchedule::Host(sums), _) => self.note(&t, &sums),
            (OfSchedule::Cuda(buffer), Some(on_gpu)) => {
                on_gpu.readback.begin(&buffer)?;
                on_gpu.timesteps.push_back(t);
            }
            (OfSchedule::Cuda(_), None) => panic!("sums of a GPU for a run on the CPU"),
        }
        Ok(())
    }

    fn note(&mut self, t: &[u32], sums: &[Sums<f64>]) {
        for (&t, sums) in t.iter().zip(sums) {
            let mut image = [f64::from(t); 1 + SUMS];
            image[1..].copy_from_slice(sums);
            self.images.push(image);
        }
    }

    /// Ends a step of images of `image` elements with its update, without weight decay. Waits for a GPU. Sums that are
    /// not finite change nothing: the loss or the gradient of such a step is not finite either, which ends the
    /// training.
    pub fn update(&mut self, table: &Table, update: &Update, image: usize, exchange: &Exchange) -> Result<()> {
        while let Some(on_gpu) = &mut self.on_gpu
            && let Some(t) = on_gpu.timesteps.pop_front()
        {
            let bytes = on_gpu.readback.take()?.expect("as many copies as micro-batches");
            let parts: Vec<f64> = bytemuck::pod_collect_to_vec(&bytes);
            let sums = OfSchedule::of_images(t.len(), &parts);
            self.note(&t, &sums);
        }
        let by_gamma = self.by_gamma(table, image, &exchange.gather(&self.images)?.concat());
        let by_theta: Vec<f32> = gradient(&self.curve.theta(), &by_gamma).into_iter().map(|g| g as f32).collect();
        if by_theta.iter().all(|slope| slope.is_finite()) {
            let update = Update { weight_decay: 0.0, ..*update };
            self.curve.change(|state| adam::reference::update(state, &by_theta, &update, 1.0));
        }
        Ok(())
    }

    /// The derivatives of the loss of a step's images, and of L_T, by gamma of every timestep.
    fn by_gamma(&self, table: &Table, image: usize, images: &[OfImage]) -> Vec<f64> {
        let mut by_gamma = vec![0.0; self.curve.timesteps()];
        // Of a term of the bound, but for the objective's.
        let weight = 1.0 / (image as f64 * images.len() as f64);
        for [t, sums @ ..] in images {
            let t = *t as u32;
            let row = table.objective().row(t).expect("a timestep of the chain");
            let slope = slope(table.objective(), t, sums, weight * row.bound);
            // Before the first timestep and after the last there is no gamma, and the derivative is 0.
            for (t, slope) in [t.checked_sub(1), Some(t), Some(t + 1)].into_iter().zip(slope) {
                if let Some(sum) = t.and_then(|t| by_gamma.get_mut(t as usize)) {
                    *sum += slope;
                }
            }
        }
        let last = by_gamma.len() - 1;
        by_gamma[last] += slope_of_prior(table.objective().schedule(), self.mean_square);
        by_gamma
    }
}

/// Mean square of the images' elements on the scale of x_0, from how often each byte occurs: exact but for the last
/// division.
fn mean_square(images: &Dataset) -> f64 {
    let mut counts = [0u64; 256];
    for i in 0..images.len() {
        images.image(i).iter().for_each(|&byte| counts[usize::from(byte)] += 1);
    }
    let square = |(byte, count): (usize, &u64)| ((2 * byte as i64 - 255).pow(2) as u64 * count) as f64;
    let (squares, elements) = (counts.iter().enumerate().map(square).sum::<f64>(), counts.iter().sum::<u64>() as f64);
    squares / (65_025.0 * elements)
}
