//! A schedule in training ([`Curve`]): what the micro-batches of a step say of it, and its update.
//!
//! After the backward pass of a micro-batch the operation `loss` takes a few sums of each image. On a GPU they are
//! copied to the host in stream order, 56 bytes per 4,096 elements of an image, and waited for at the end of the step,
//! when all its work has been launched; the next step begins with the factors of the new schedule. So the GPU idles
//! while the host makes them and launches the first kernels. Sums of the step before, as importance sampling has them,
//! would avoid that and make part of a checkpoint of them.

use std::collections::VecDeque;

use crate::data::Dataset;
use crate::device::Device;
use crate::device::cuda::Readback;
use crate::diffusion::Curve;
use crate::diffusion::learned::{Sums, gradient, slope, slope_of_prior};
use crate::error::Result;
use crate::ops::adam::{self, Update};
use crate::ops::loss::{OfSchedule, Table};

/// A curve, and the derivatives of a step that is not complete.
pub struct Learning {
    curve: Curve,
    /// Mean square of x_0 over the training images, on which L_T depends.
    mean_square: f64,
    /// Derivatives of the loss by gamma of every timestep.
    by_gamma: Vec<f64>,
    on_gpu: Option<OnGpu>,
}

struct OnGpu {
    readback: Readback,
    /// The micro-batches whose sums are on their way.
    parts: VecDeque<Part>,
}

/// Images whose sums are taken: their timesteps, and the weight of a term of the bound, but for the objective's.
struct Part {
    t: Vec<u32>,
    weight: f64,
}

impl Learning {
    /// The curve that training starts from, for these images.
    pub fn new(device: &Device, timesteps: usize, images: &Dataset) -> Self {
        let on_gpu = match device {
            Device::Cuda(gpu) => Some(OnGpu { readback: gpu.readback(), parts: VecDeque::new() }),
            Device::Cpu(_) | Device::Meta(_) => None,
        };
        let curve = Curve::new(timesteps);
        Learning { curve, mean_square: mean_square(images), by_gamma: vec![0.0; timesteps], on_gpu }
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
        self.by_gamma.fill(0.0);
        while let Some(on_gpu) = &mut self.on_gpu
            && on_gpu.parts.pop_front().is_some()
        {
            on_gpu.readback.take()?;
        }
        Ok(())
    }

    /// Adds the sums of a micro-batch at the timesteps `t`, of images of `image` elements in a step of `step_images`.
    pub fn add(
        &mut self,
        table: &Table,
        t: Vec<u32>,
        sums: OfSchedule,
        image: usize,
        step_images: usize,
    ) -> Result<()> {
        let part = Part { t, weight: 1.0 / (image as f64 * step_images as f64) };
        match (sums, &mut self.on_gpu) {
            (OfSchedule::Host(sums), _) => self.note(table, &part, &sums),
            (OfSchedule::Cuda(buffer), Some(on_gpu)) => {
                on_gpu.readback.begin(&buffer)?;
                on_gpu.parts.push_back(part);
            }
            (OfSchedule::Cuda(_), None) => panic!("sums of a GPU for a run on the CPU"),
        }
        Ok(())
    }

    fn note(&mut self, table: &Table, part: &Part, sums: &[Sums<f64>]) {
        for (&t, sums) in part.t.iter().zip(sums) {
            let row = table.objective().row(t).expect("a timestep of the chain");
            let slope = slope(table.objective(), t, sums, part.weight * row.bound);
            // Before the first timestep and after the last there is no gamma, and the derivative is 0.
            for (t, slope) in [t.checked_sub(1), Some(t), Some(t + 1)].into_iter().zip(slope) {
                if let Some(sum) = t.and_then(|t| self.by_gamma.get_mut(t as usize)) {
                    *sum += slope;
                }
            }
        }
    }

    /// Ends a step with its update, without weight decay. Waits for a GPU. Sums that are not finite change nothing: the
    /// loss or the gradient of such a step is not finite either, which ends the training.
    pub fn update(&mut self, table: &Table, update: &Update) -> Result<()> {
        while let Some(on_gpu) = &mut self.on_gpu
            && let Some(part) = on_gpu.parts.pop_front()
        {
            let bytes = on_gpu.readback.take()?.expect("as many copies as micro-batches");
            let parts: Vec<f64> = bytemuck::pod_collect_to_vec(&bytes);
            let sums = OfSchedule::of_images(part.t.len(), &parts);
            self.note(table, &part, &sums);
        }
        let last = self.by_gamma.len() - 1;
        self.by_gamma[last] += slope_of_prior(table.objective().schedule(), self.mean_square);
        let by_theta: Vec<f32> = gradient(&self.curve.theta(), &self.by_gamma).into_iter().map(|g| g as f32).collect();
        if by_theta.iter().all(|slope| slope.is_finite()) {
            let update = Update { weight_decay: 0.0, ..*update };
            self.curve.change(|state| adam::reference::update(state, &by_theta, &update, 1.0));
        }
        Ok(())
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
