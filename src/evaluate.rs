//! The variational bound of images, term by term (DDPM, equation 5 and section 4.3), and what it is made of.
//!
//! `L = L_T + sum over t of L_t`, in bits per dimension: L_T is the prior's, L_0 the discretised decoder's (equation
//! 13), the others are divergences of Gaussians. Every term is measured for every image with noise of its own, so the
//! standard error over images is that of the whole estimate. Predicted x_0 are clipped or thresholded as the model's
//! scheduler says, unlike in training.
//!
//! The rate-distortion table cuts the chain at each timestep: a receiver that has been sent x_t knows L_T and the terms
//! of all later timesteps (the rate), and predicts x_0 with the root mean square error there (the distortion). The
//! paper's table 4 leaves L_T out.
//!
//! Images are measured in batches, on one device or on several ([`Evaluation::measure`]), and added up one by one in
//! their order ([`Sums`]), so that no bit of a bound depends on the batches or on where they were measured.
//!
//! Deliberately absent: the likelihood by the ODE, which is `likelihood`'s; quality of samples.

use std::ops::Range;

use crate::data::Dataset;
use crate::device::Device;
use crate::diffusion::sampler::Limit;
use crate::diffusion::{Batch, Method, Objective, Sampler, Variance};
use crate::error::Result;
use crate::ops::loss::{Bounds, Table, Terms, terms};
use crate::ops::q_sample::{Coefficients, q_sample};
use crate::ops::sample_step::{Given, Noise, diffuse, thresholds};
use crate::params::Params;
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::train::Feed;
use crate::unet::UNet;

/// What is to be measured.
pub struct Evaluation<'a> {
    /// The device to compute on.
    pub device: &'a Device,
    /// The network.
    pub unet: &'a UNet,
    /// Its weights.
    pub params: &'a Params,
    /// What it predicts, its variance, and the chain, which may keep fewer timesteps.
    pub objective: &'a Objective,
    /// The images, with labels for a conditional network.
    pub data: &'a Dataset,
    /// Draws of the noise for each image and timestep.
    pub draws: u32,
    /// Seed of the noise.
    pub seed: u64,
    /// What the predicted x_0 is confined to.
    pub limit: Limit,
    /// Images that go through the network at once. No image depends on it.
    pub together: usize,
}

/// The bound of a data set, in bits per dimension.
#[derive(Clone, Debug, PartialEq)]
pub struct Bound {
    /// L of each image.
    pub per_image: Vec<f64>,
    /// L_T, mean over the images.
    pub prior: f64,
    /// The timesteps of the chain, ascending.
    pub timesteps: Vec<u32>,
    /// L_0 and the further terms, one for each timestep, mean over images and draws.
    pub terms: Vec<f64>,
    /// Mean squared error of the predicted x_0, on the scale of [-1, 1].
    pub mse_x0: Vec<f64>,
    /// Mean squared error of the eps that belongs to it.
    pub mse_eps: Vec<f64>,
}

/// What some of the images contribute to a bound.
pub struct Measured {
    images: Range<usize>,
    /// L of each image.
    per_image: Vec<f64>,
    /// L_T of each image.
    prior: Vec<f64>,
    /// For each timestep of the chain the sums over the draws, for each image.
    steps: Vec<Terms>,
}

/// The sums over images from the first on, each image added by itself.
pub struct Sums {
    per_image: Vec<f64>,
    prior: f64,
    timesteps: Vec<u32>,
    draws: u32,
    terms: Vec<f64>,
    mse_x0: Vec<f64>,
    mse_eps: Vec<f64>,
}

impl Sums {
    /// Adds the next images.
    pub fn add(&mut self, measured: &Measured) {
        let Measured { images, per_image, prior, steps } = measured;
        assert_eq!(images.start, self.per_image.len(), "images {images:?} are not the next");
        self.per_image.extend(per_image);
        self.prior = prior.iter().fold(self.prior, |sum, bits| sum + bits);
        for (i, of) in steps.iter().enumerate() {
            for (sums, of_images) in
                [(&mut self.terms, &of.vlb), (&mut self.mse_x0, &of.mse_x0), (&mut self.mse_eps, &of.mse_eps)]
            {
                sums[i] = of_images.iter().fold(sums[i], |sum, of_image| sum + of_image);
            }
        }
    }

    /// The bound of the images that were added.
    pub fn bound(self) -> Bound {
        let images = self.per_image.len() as f64;
        let mean = |sums: Vec<f64>| sums.iter().map(|sum| sum / (images * f64::from(self.draws))).collect();
        Bound {
            prior: self.prior / images,
            per_image: self.per_image,
            timesteps: self.timesteps,
            terms: mean(self.terms),
            mse_x0: mean(self.mse_x0),
            mse_eps: mean(self.mse_eps),
        }
    }
}

/// A line of the rate-distortion table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    /// The timestep at which the chain is cut.
    pub t: u32,
    /// Bits per dimension that have been sent by then.
    pub rate: f64,
    /// Root mean square error of the predicted image, on the scale of 0 to 255.
    pub rmse: f64,
}

impl Bound {
    /// The mean over the images.
    pub fn bits_per_dim(&self) -> f64 {
        self.per_image.iter().sum::<f64>() / self.per_image.len() as f64
    }

    /// The standard error of the mean over the images; `None` for a single image.
    pub fn standard_error(&self) -> Option<f64> {
        let (n, mean) = (self.per_image.len() as f64, self.bits_per_dim());
        let squares: f64 = self.per_image.iter().map(|bits| (bits - mean).powi(2)).sum();
        (self.per_image.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt())
    }

    /// The rate-distortion table, one line for each timestep.
    pub fn rate_distortion(&self) -> Vec<Cut> {
        let mut rate = self.prior;
        let mut cuts = Vec::with_capacity(self.terms.len());
        for (i, &t) in self.timesteps.iter().enumerate().rev() {
            cuts.push(Cut { t, rate, rmse: 127.5 * self.mse_x0[i].sqrt() });
            rate += self.terms[i];
        }
        cuts.reverse();
        cuts
    }
}

impl Evaluation<'_> {
    /// Measures the bound. `each` is called after every pass of the network, of [`passes`](Self::passes).
    ///
    /// # Errors
    /// Those of `each`, which end it; a GPU that fails.
    pub fn bound(&self, mut each: impl FnMut() -> Result<()>) -> Result<Bound> {
        let mut sums = self.sums();
        for images in self.batches() {
            sums.add(&self.measure(images, &mut each)?);
        }
        Ok(sums.bound())
    }

    /// The images that go through the network at once, batch by batch.
    pub fn batches(&self) -> Vec<Range<usize>> {
        let images = self.data.len();
        (0..images).step_by(self.together).map(|first| first..images.min(first + self.together)).collect()
    }

    /// Sums over no images yet.
    pub fn sums(&self) -> Sums {
        let kept = self.objective.kept();
        let [terms, mse_x0, mse_eps] = [0; 3].map(|_| vec![0.0; kept.len()]);
        let (per_image, timesteps, draws) = (Vec::new(), kept.to_vec(), self.draws);
        Sums { per_image, prior: 0.0, timesteps, draws, terms, mse_x0, mse_eps }
    }

    /// Measures the images of a batch. `each` is called after every pass of the network.
    ///
    /// # Errors
    /// Those of [`bound`](Self::bound).
    pub fn measure(&self, images: Range<usize>, mut each: impl FnMut() -> Result<()>) -> Result<Measured> {
        let (schedule, kept) = (self.objective.schedule(), self.objective.kept());
        let table = Table::new(self.device, self.objective.clone())?;
        let coefficients = Coefficients::new(self.device, schedule)?;
        let mut feed = Feed::new(self.device, None);
        let indices: Vec<usize> = images.clone().collect();
        let rows = self.data.rows(&indices, self.unet.model().classes > 0);
        let prior: Vec<f64> = indices.iter().map(|&i| self.objective.prior(self.data.image(i))).collect();
        let (mut per_image, mut steps) = (prior.clone(), Vec::with_capacity(kept.len()));
        let thresholding = self.thresholding(&images)?;
        for (place, &t) in kept.iter().enumerate() {
            let [vlb, mse_x0, mse_eps] = [0; 3].map(|_| vec![0.0; images.len()]);
            let mut sums = Terms { vlb, mse_x0, mse_eps };
            for draw in 0..self.draws {
                let (numbers, timesteps) = (rows.indices(), schedule.len() as u32);
                let batch = Batch::evaluation(self.seed, draw, images.start as u32, numbers, t, timesteps);
                let batch = batch.with_labels(rows.classes.clone());
                let source = feed.source(self.data, images.start as u64..images.end as u64, |_| rows.clone())?;
                let noised = q_sample(self.device, source, &batch, &coefficients)?;
                let mut tape = Tape::inference(self.device, self.params);
                let x_t = Var::constant(noised.x_t);
                let output = self.unet.forward(&mut tape, &x_t, &noised.t, &noised.conditioning, None)?;
                let output = output.into_value(); // (n, h, w, out_channels)
                let limits = match &thresholding {
                    None => None,
                    Some((sampler, x_0)) => {
                        let (step, noise) = (&sampler.steps()[kept.len() - 1 - place], Noise::own(batch.noise));
                        let factors = schedule.q_sample_coefficients(t as usize);
                        let x = &diffuse(self.device, x_0, None, factors, noise, 1)?.x; // (n, h, w, c)
                        let output = &output;
                        let given = Given { x, output, before: None, gradient: None, guidance: None, noise };
                        thresholds(self.device, &given, step)?
                    }
                };
                let bounds = match (&limits, self.limit) {
                    (Some(limits), _) => Bounds::PerImage(limits),
                    (None, Limit::Range(r)) => Bounds::Range(r),
                    (None, _) => Bounds::None,
                };
                let terms = terms(self.device, &output, source, &batch, &noised.t, &table, bounds)?;
                for (total, bits) in per_image.iter_mut().zip(&terms.vlb) {
                    *total += bits / f64::from(self.draws);
                }
                for (sums, of_draw) in
                    [(&mut sums.vlb, terms.vlb), (&mut sums.mse_x0, terms.mse_x0), (&mut sums.mse_eps, terms.mse_eps)]
                {
                    sums.iter_mut().zip(of_draw).for_each(|(sum, of_image)| *sum += of_image);
                }
                each()?;
            }
            steps.push(sums);
        }
        Ok(Measured { images, per_image, prior, steps })
    }

    /// What dynamic thresholding needs, if there is any: the steps, and x_0 of the images in f32. The x_t that the
    /// network sees is of the activations' type, whose rounding would show in the quantile at low signal.
    fn thresholding(&self, images: &Range<usize>) -> Result<Option<(Sampler, Tensor)>> {
        let Limit::Quantile { .. } = self.limit else { return Ok(None) };
        let (schedule, prediction) = (self.objective.schedule(), self.objective.prediction());
        // The variance is nothing to the predicted x_0, and this one fits any number of steps.
        let method = Method::Ancestral(Variance::FixedSmall);
        let sampler = Sampler::over(schedule, prediction, method, self.objective.kept())?.limited(self.limit);
        let bytes = images.clone().flat_map(|i| self.data.image(i));
        let x_0: Vec<f32> = bytes.map(|&byte| (2.0 * f32::from(byte) - 255.0) / 255.0).collect();
        let m = self.unet.model();
        let shape = Shape::new(images.len(), m.image_size.h, m.image_size.w, m.channels);
        Ok(Some((sampler, Tensor::from_slice(self.device, shape, &x_0)?)))
    }

    /// Passes of the network that [`bound`](Self::bound) takes.
    pub fn passes(&self) -> u64 {
        let batches = self.data.len().div_ceil(self.together) as u64;
        batches * self.objective.kept().len() as u64 * u64::from(self.draws)
    }
}
