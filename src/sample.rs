//! Drawing images with a network: the reverse process from x_T to x_0, batch by batch.
//!
//! An image depends only on the seed, its index and its class, never on the batch it is computed in.

use crate::conditioning::Conditioning;
use crate::device::Device;
use crate::device::cuda::tile;
use crate::diffusion::sampler::Samples;
use crate::diffusion::{Sampler, Variance};
use crate::error::{Error, Result};
use crate::memory::available_on;
use crate::ops::sample_step::{sample_step, start};
use crate::output;
use crate::params::Params;
use crate::tape::{Tape, Var};
use crate::tensor::{DType, Shape, Tensor};
use crate::unet::UNet;
use crate::usage;

/// Default number of sampling steps. Ancestral sampling is the default method because it corrects its own errors: after
/// a short training it draws clean images where DDIM leaves specks. More than 100 steps change little that is visible.
pub const DEFAULT_STEPS: usize = 100;

/// The variance of ancestral sampling if none is asked for: the model's own over all its timesteps,
/// [`Variance::FixedSmall`] over fewer. In long strides `FixedLarge` leaves more noise than the next step expects.
///
/// Measured on 512 digits of the default run in 100 steps, as Frechet distance to the data in the features of a small
/// classifier of digits (512 real ones: 3.2): `fixed_small` 13.8, `fixed_large` 15.3, DDIM with eta 0.5 22.2;
/// `fixed_small` with leading timesteps 14.2, with trailing ones 15.6.
pub fn default_variance(own: Variance, steps: usize, timesteps: usize) -> Variance {
    if steps < timesteps { Variance::FixedSmall } else { own }
}

/// Progress of the reverse process, passed to the caller after every step.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Steps taken.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
    /// The timestep just undone.
    pub t: u32,
    /// The current x, f32 (n, h, w, c); x_0 when `done == total`. The caller may keep a clone of the handle.
    pub x: &'a Tensor,
}

/// The reverse process (algorithm 2): draws x_T for `shape.n` images and takes every step of the sampler. Returns x_0,
/// f32, of shape `shape`.
///
/// `network(x_t, t)` returns the predicted noise, shaped like x_t; both have the type of the device's activations.
/// `each` is called after every step.
///
/// # Errors
/// Those of `network` and `each`, which end the loop, and a GPU that fails.
pub fn sample(
    device: &Device,
    sampler: &Sampler,
    shape: Shape,
    samples: Samples,
    mut network: impl FnMut(&Tensor, u32) -> Result<Tensor>,
    mut each: impl FnMut(Progress<'_>) -> Result<()>,
) -> Result<Tensor> {
    let mut state = start(device, shape, samples)?;
    for (i, step) in sampler.steps().iter().enumerate() {
        let output = network(&state.input, step.t)?;
        state = sample_step(device, &state.x, &output, step, samples)?;
        each(Progress { done: i + 1, total: sampler.steps().len(), t: step.t, x: &state.x })?;
    }
    Ok(state.x)
}

/// Everything needed to draw images.
pub struct Drawing<'a> {
    /// The device to compute on.
    pub device: &'a Device,
    /// The network.
    pub unet: &'a UNet,
    /// Its weights.
    pub params: &'a Params,
    /// The steps.
    pub sampler: &'a Sampler,
    /// Seed of all noise.
    pub seed: u64,
}

impl Drawing<'_> {
    /// Shape of `count` images.
    pub fn shape(&self, count: usize) -> Shape {
        let m = self.unet.model();
        Shape::new(count, m.image_size.h, m.image_size.w, m.channels)
    }

    /// Images drawn together. No image depends on it.
    ///
    /// On the CPU from 1 to 64: as many as keep an activation of the finest level within 8 MiB, near the caches. On a
    /// GPU as many as fill it at the coarsest level, where an image has the fewest pixels: enough for two waves of
    /// tiles of a convolution there, or half as many, and so on, until a pass takes no more than the memory that is
    /// free.
    pub fn batch(&self) -> usize {
        let m = self.unet.model();
        if !self.device.is_gpu() {
            return (2 * 1024 * 1024 / (m.image_size.h * m.image_size.w * m.widths[0])).clamp(1, 64);
        }
        let coarsest = m.levels() - 1;
        let pixels = m.size_at(coarsest).pixels();
        let available = available_on(self.device).unwrap_or(u64::MAX);
        let fits = |images: usize| {
            let shape = self.shape(images);
            let needed =
                || memory_of_forward(self.device, self.unet, self.params, shape).expect("shapes need no memory");
            // The convolutions count pixels to 2^30.
            shape.rows() < 1 << 30 && needed() <= available
        };
        let mut images = tile::rows_of_waves(2, m.widths[coarsest]).div_ceil(pixels);
        while images > 1 && !fits(images) {
            images = images.div_ceil(2);
        }
        images
    }

    /// The bytes of images `0..count`, (count, h, w, c). A conditional model takes the class of each image from
    /// `labels`. `each` is called after every step of every batch.
    ///
    /// # Errors
    /// More than `u32::MAX` images; those of `each`, which end the drawing; a pixel that is not finite; a GPU that
    /// fails.
    pub fn images(
        &self,
        count: usize,
        labels: Option<&[u32]>,
        mut each: impl FnMut(&Progress<'_>) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let count_u32 =
            u32::try_from(count).map_err(|_| Error::Usage(format!("--count {count}: at most {} images", u32::MAX)))?;
        let mut images = Vec::with_capacity(self.shape(count).len());
        let together = self.batch();
        for first in (0..count_u32).step_by(together) {
            let range = first as usize..count.min(first as usize + together);
            let conditioning = Conditioning::from_labels(self.device, labels.map(|labels| &labels[range.clone()]))?;
            let network = |x: &Tensor, t: u32| {
                let mut tape = Tape::inference(self.device, self.params);
                let t = Tensor::full(self.device, Shape::new(range.len(), 1, 1, 1), t as f32)?;
                let x = Var::constant(x.clone());
                let eps = self.unet.forward(&mut tape, &x, &t, &conditioning, None)?; // (n, h, w, c)
                Ok(eps.into_value())
            };
            let samples = Samples { seed: self.seed, first };
            let x_0 = sample(self.device, self.sampler, self.shape(range.len()), samples, network, |p| each(&p))?;
            let x_0 = x_0.to_vec()?; // (n, h, w, c)
            if let Some(bad) = x_0.iter().find(|v| !v.is_finite()) {
                return Err(Error::Failed(format!(
                    "a pixel came out as {bad}: the network's weights are damaged, or were trained with too large a learning_rate"
                )));
            }
            images.extend(output::to_bytes(&x_0));
        }
        Ok(images)
    }
}

/// The number of the class that a user calls `text`: its name in `names`, or the number itself. A class whose name is
/// a number comes before that number.
///
/// # Errors
/// `Error::Usage` for a class that the network does not have, or any class if it is unconditional; the message names
/// those there are, the nearest first.
pub fn class_called(text: &str, names: &[String], classes: usize) -> Result<u32> {
    if classes == 0 {
        usage!("--class {text}: this model is unconditional, leave --class out");
    }
    let called: Vec<usize> = (0..names.len()).filter(|&k| names[k] == text).collect();
    match (&called[..], text.parse::<usize>()) {
        ([only], _) => return Ok(*only as u32),
        ([first, second, ..], _) => {
            usage!("--class {text}: the classes {first} and {second} are both called so; give the number")
        }
        ([], Ok(number)) if number < classes => return Ok(number as u32),
        ([], _) => {}
    }
    let last = classes - 1;
    if names.is_empty() {
        usage!("--class {text}: this model has the classes 0 to {last}, without names");
    }
    let lower = text.to_lowercase();
    let mut nearest: Vec<&String> = names.iter().collect();
    // A stable sort: names that are equally far stay in order.
    nearest.sort_by_cached_key(|name| {
        let name = name.to_lowercase();
        let edits = strsim::damerau_levenshtein(&name, &lower);
        if edits <= 2.max(lower.chars().count() / 3) || name.contains(&lower) { edits } else { usize::MAX }
    });
    const SHOWN: usize = 10;
    let shown: Vec<&str> = nearest.iter().take(SHOWN).map(|name| name.as_str()).collect();
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    usage!("--class {text}: this model has the classes 0 to {last}, called {}{more}", shown.join(", "));
}

/// Bytes that one evaluation of the network for `shape.n` images takes of `device`, its weights not counted.
pub fn memory_of_forward(device: &Device, unet: &UNet, params: &Params, shape: Shape) -> Result<u64> {
    let meta = device.meta();
    let params = Params::zeros(&meta, params.specs().clone())?;
    let weights = meta.pool_stats().held;
    let x = Tensor::uninit(&meta, meta.activations(), shape)?; // (n, h, w, c)
    let per_image = || Tensor::uninit(&meta, DType::F32, Shape::new(shape.n, 1, 1, 1));
    let (t, labels) = (per_image()?, per_image()?);
    let conditioning = if unet.model().classes > 0 { Conditioning::on_labels(labels) } else { Conditioning::NONE };
    unet.forward(&mut Tape::inference(&meta, &params), &Var::constant(x), &t, &conditioning, None)?;
    Ok(meta.pool_stats().held - weights)
}

/// Classes for `count` images of a network with `classes` classes: `class` for every image, or all classes in turn;
/// `None` for an unconditional network.
///
/// # Errors
/// `Error::Usage` for a class that the network does not have, or any class if it is unconditional.
pub fn labels(classes: usize, class: Option<u32>, count: usize) -> Result<Option<Vec<u32>>> {
    match class {
        Some(k) if classes == 0 => usage!("--class {k}: this model is unconditional, leave --class out"),
        Some(k) if k as usize >= classes => usage!("--class {k}: this model has the classes 0 to {}", classes - 1),
        Some(k) => Ok(Some(vec![k; count])),
        None if classes == 0 => Ok(None),
        None => Ok(Some((0..count).map(|i| (i % classes) as u32).collect())),
    }
}
