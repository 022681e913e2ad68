//! Drawing images with a network: the reverse process from x_T to x_0, batch by batch.
//!
//! An image depends only on the seed, its index and its class, never on the batch it is computed in. Beside the way
//! from noise to images there are those that start from images: [`encode`], [`inpaint`], [`interpolate`].

pub mod encode;
pub mod inpaint;
pub mod interpolate;
mod replay;

use std::ops::Range;
use std::path::Path;

use crate::conditioning::Conditioning;
use crate::config::Diffusion;
use crate::device::Device;
use crate::device::cuda::tile;
use crate::diffusion::sampler::{Before, Samples};
use crate::diffusion::{Method, Sampler, Schedule, Spacing, Timesteps, Variance};
use crate::error::{Error, Result};
use crate::memory::available_on;
use crate::ops::sample_step::{Given, Noise, Wanted, advance, correct, diffuse, start_from, turn_of};
use crate::ops::time_embedding::Times;
use crate::output;
use crate::params::Params;
use crate::rng::Streams;
use crate::tape::{Tape, Var};
use crate::tensor::{DType, Shape, Tensor};
use crate::unet::UNet;
use crate::usage;
use replay::{Chain, Kind, Replays, Turns};

/// Default number of sampling steps. Ancestral sampling is the default method because it corrects its own errors: after
/// a short training it draws clean images where DDIM leaves specks. More than 100 steps change little that is visible.
pub const DEFAULT_STEPS: usize = 100;

/// The variance of ancestral sampling if none is asked for: the model's own over all its timesteps, over fewer
/// [`Variance::FixedSmall`], but for a learned range, which is that of the steps that are taken. In long strides
/// `FixedLarge` leaves more noise than the next step expects.
///
/// Measured on 512 digits of the default run in 100 steps, as Frechet distance to the data in the features of a small
/// classifier of digits (512 real ones: 3.2): `fixed_small` 13.8, `fixed_large` 15.3, DDIM with eta 0.5 22.2;
/// `fixed_small` with leading timesteps 14.2, with trailing ones 15.6.
pub fn default_variance(own: Variance, steps: usize, timesteps: usize) -> Variance {
    if steps < timesteps && own != Variance::LearnedRange { Variance::FixedSmall } else { own }
}

/// What `sample` draws with if it is told nothing, and training for a look in between: [`DEFAULT_STEPS`] ancestral
/// steps, evenly spaced.
///
/// # Errors
/// Those of [`Sampler::over`].
pub fn default_sampler(process: &Diffusion, schedule: &Schedule) -> Result<Sampler> {
    let steps = DEFAULT_STEPS.min(schedule.len());
    let kept = Timesteps::Spaced(Spacing::Even).kept(schedule, false, 0, steps)?;
    let variance = default_variance(process.variance, steps, schedule.len());
    Sampler::over(schedule, process.prediction, Method::Ancestral(variance), &kept)
}

/// Progress of the reverse process, passed to the caller after every step and correction.
#[derive(Debug)]
pub struct Progress<'a> {
    /// Evaluations of the network done.
    pub done: usize,
    /// Evaluations in all.
    pub total: usize,
    /// The timestep just undone, or corrected.
    pub t: u32,
    /// The current x, f32 (n, h, w, c); x_0 when `done == total`. The caller may keep a clone of the handle.
    pub x: &'a Tensor,
    /// The x_0 that the step predicted, alike, if it was asked for; none after a correction.
    pub x_0: Option<&'a Tensor>,
}

/// What the network is asked.
pub struct Call<'a> {
    /// x_t, of the device's activation type; twice along n if `halves` is 2.
    pub x: &'a Tensor,
    /// The timestep; between two whole ones for Heun's method over noise levels.
    pub t: f32,
    /// 1, or 2 for guidance: then the second half of the images is asked without classes.
    pub halves: usize,
    /// In a process that [replays](Reverse::replays) its steps, the device as it is bound to this step's turn: what is
    /// launched reads the timestep from there, in place of `t`.
    pub turn: Option<&'a Device>,
}

/// Noise that images have in common (DDPM, figure 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shared {
    /// So many images in a row share it; [`Noise::ALL`]: all.
    pub row: u32,
    /// They share x_T and all noise down to x at this timestep.
    pub until: u32,
}

/// The gradient of log p(label | x_t) for x_t, f32, and a timestep, f32 (n, h, w, c), and its scale.
pub type Gradient<'a> = (&'a mut dyn FnMut(&Tensor, f32) -> Result<Tensor>, f64);

/// A reverse process.
pub struct Reverse<'a> {
    /// The device to compute on.
    pub device: &'a Device,
    /// The steps.
    pub sampler: &'a Sampler,
    /// Of x.
    pub shape: Shape,
    /// Whose noise is drawn.
    pub samples: Samples,
    /// x at the sampler's first timestep, f32; `None`: normals.
    pub start: Option<&'a Tensor>,
    /// Noise in common.
    pub shared: Option<Shared>,
    /// Whether [`Progress::x_0`] is wanted.
    pub x_0: bool,
    /// Whether a GPU may replay a step as a CUDA graph, in which `network` is not called. It must launch the same
    /// kernels with the same arguments for every call of as many halves, which read the timestep by [`Call::turn`].
    pub replays: bool,
}

/// The reverse process (algorithm 2): draws x_T for `shape.n` images and takes every step of the sampler. Returns x_0,
/// f32, of shape `shape`.
///
/// `network(x_t, t)` returns its prediction, shaped like x_t, or with twice the channels for a learned variance; both
/// have the type of the device's activations. `each` is called after every step. For a sampler without guidance.
///
/// # Errors
/// Those of `network` and `each`, which end the loop, and a GPU that fails.
pub fn sample(
    device: &Device,
    sampler: &Sampler,
    shape: Shape,
    samples: Samples,
    mut network: impl FnMut(&Tensor, f32) -> Result<Tensor>,
    each: impl FnMut(Progress<'_>) -> Result<()>,
) -> Result<Tensor> {
    assert!(!sampler.is_guided(), "a network without classes has no guidance");
    let reverse = Reverse { device, sampler, shape, samples, start: None, shared: None, x_0: false, replays: false };
    reverse.run(|call| network(call.x, call.t), None, each)
}

impl Reverse<'_> {
    /// Takes every step, and returns x_0, f32, of the process's shape.
    ///
    /// `network` returns what it predicts for [`Call::x`], with as many images and of the same type. With a `gradient`
    /// the steps are moved towards a label.
    ///
    /// # Errors
    /// Those of `network`, `gradient` and `each`, which end the loop, and a GPU that fails.
    pub fn run(
        &self,
        mut network: impl FnMut(Call<'_>) -> Result<Tensor>,
        mut gradient: Option<Gradient<'_>>,
        mut each: impl FnMut(Progress<'_>) -> Result<()>,
    ) -> Result<Tensor> {
        let (device, sampler, samples) = (self.device, self.sampler, self.samples);
        let (steps, total) = (sampler.steps(), sampler.calls());
        let halves = |level: f64| if sampler.guidance(level).is_some() { 2 } else { 1 };
        let first = halves(steps[0].level);
        let start = match self.start {
            Some(x) => diffuse(device, x, None, (1.0, 0.0), Noise::own(samples.start()), first)?,
            None => start_from(device, self.shape, self.noise(samples.start(), true), first)?,
        };
        let mut chain = Chain::new(start, first);
        let mut turns = Turns::new(device)?;
        let mut replays = Replays::new(self, gradient.is_some());
        let mut done = 0;
        for (i, step) in steps.iter().enumerate() {
            let next = steps.get(i + 1);
            let wants = next.map_or(Before::Nothing, |next| next.before);
            let kind = Kind {
                halves: halves(step.level),
                copies: next.map_or(1, |next| halves(next.level)),
                reads: step.before,
                wants,
                x_0: self.x_0,
                row: self.row(self.shared.is_some_and(|shared| step.t > shared.until)),
                guidance: sampler.guidance(step.level),
                limit: step.limit,
                learned: step.learned.map(|learned| learned.raw),
            };
            let noise = Noise { streams: samples.noise(step.t), row: kind.row };
            let device = turns.begin(turn_of(step, noise, gradient.as_ref().map(|(_, scale)| *scale)))?;
            let mut take = |chain: &Chain| {
                let turn = (self.replays && device.is_gpu()).then_some(&device);
                let call = Call { x: chain.input(kind.halves), t: step.time as f32, halves: kind.halves, turn };
                let output = network(call)?;
                let slope = match &mut gradient {
                    Some((gradient, scale)) => Some((gradient(&chain.x, step.time as f32)?, *scale)),
                    None => None,
                };
                let given = Given {
                    x: &chain.x,
                    output: &output,
                    before: chain.before.as_ref().filter(|_| step.before != Before::Nothing),
                    gradient: slope.as_ref().map(|(slope, scale)| (slope, *scale)),
                    guidance: kind.guidance,
                    noise,
                };
                let x_0 = kind.x_0 || kind.wants == Before::X0;
                advance(&device, &given, step, Wanted { copies: kind.copies, x_0 })
            };
            match (&mut replays, &device) {
                (Some(replays), Device::Cuda(gpu)) => replays.step(gpu, &mut chain, kind, take)?,
                _ => {
                    let after = take(&chain)?;
                    chain.replace(after, &kind);
                }
            }
            done += 1;
            each(Progress { done, total, t: step.t, x: &chain.x, x_0: chain.x_0.as_ref() })?;

            let Some((corrector, correction)) = sampler.correction(i) else { continue };
            for round in 0..corrector.steps {
                let t = correction.t;
                let call = Call { x: chain.input(kind.copies), t: t as f32, halves: kind.copies, turn: None };
                let output = network(call)?;
                let slope = match &mut gradient {
                    Some((gradient, scale)) => Some((gradient(&chain.x, t as f32)?, *scale)),
                    None => None,
                };
                let streams = samples.correction(t, round, corrector.steps);
                let given = Given {
                    x: &chain.x,
                    output: &output,
                    before: None,
                    gradient: slope.as_ref().map(|(slope, scale)| (slope, *scale)),
                    guidance: sampler.guidance(correction.level),
                    noise: self.noise(streams, self.shared.is_some_and(|shared| t >= shared.until)),
                };
                let after = correct(self.device, &given, correction, corrector, kind.copies)?;
                chain.correct(after, kind.copies);
                done += 1;
                each(Progress { done, total, t, x: &chain.x, x_0: None })?;
            }
        }
        Ok(chain.x)
    }

    /// Each image's own noise, or what a row shares.
    fn noise(&self, streams: Streams, shared: bool) -> Noise {
        Noise { streams, row: self.row(shared) }
    }

    fn row(&self, shared: bool) -> u32 {
        self.shared.filter(|_| shared).map_or(1, |shared| shared.row)
    }
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

/// A batch of images to be drawn.
#[derive(Clone, Copy, Default)]
pub struct Request<'a> {
    /// The index of the first.
    pub first: u32,
    /// How many.
    pub count: usize,
    /// The class of each, for a conditional model.
    pub labels: Option<&'a [u32]>,
    /// x at the sampler's first timestep, (count, h, w, c); `None`: normals.
    pub start: Option<&'a [f32]>,
    /// Noise in common.
    pub shared: Option<Shared>,
    /// Whether [`Progress::x_0`] is wanted.
    pub x_0: bool,
}

/// The network with the classes of a batch.
pub struct Conditional<'a> {
    device: &'a Device,
    unet: &'a UNet,
    params: &'a Params,
    /// With the classes, and twice as many, the second half without.
    conditioning: [Conditioning; 2],
}

impl<'a> Conditional<'a> {
    /// With the class of each image, for a conditional model; `guided` if it will be asked without classes too.
    ///
    /// # Errors
    /// A GPU without enough memory.
    pub fn new(
        device: &'a Device,
        unet: &'a UNet,
        params: &'a Params,
        labels: Option<&[u32]>,
        guided: bool,
    ) -> Result<Self> {
        let m = unet.model();
        let twice = labels.filter(|_| guided).map(|labels| {
            assert!(m.null_class, "guidance needs a network with a null class");
            labels.iter().copied().chain(labels.iter().map(|_| m.classes as u32)).collect::<Vec<u32>>()
        });
        let conditioning =
            [Conditioning::from_labels(device, labels)?, Conditioning::from_labels(device, twice.as_deref())?];
        Ok(Conditional { device, unet, params, conditioning })
    }

    /// Evaluates the network, of the device's activation type.
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn call(&self, call: Call<'_>) -> Result<Tensor> {
        let (x, n) = (Var::constant(call.x.clone()), call.x.shape().n);
        let conditioning = &self.conditioning[call.halves - 1];
        let output = match call.turn {
            Some(device) => {
                let mut tape = Tape::inference(device, self.params);
                self.unet.forward(&mut tape, &x, Times::OfTurn(n), conditioning, None)? // (n, h, w, c)
            }
            None => {
                let t = Tensor::full(self.device, Shape::new(n, 1, 1, 1), call.t)?;
                let mut tape = Tape::inference(self.device, self.params);
                self.unet.forward(&mut tape, &x, &t, conditioning, None)? // (n, h, w, c)
            }
        };
        Ok(output.into_value())
    }
}

impl Drawing<'_> {
    /// Shape of `count` images.
    pub fn shape(&self, count: usize) -> Shape {
        let m = self.unet.model();
        Shape::new(count, m.image_size.h, m.image_size.w, m.channels)
    }

    /// How often the network is asked at once for an image.
    fn halves(&self) -> usize {
        if self.sampler.is_guided() { 2 } else { 1 }
    }

    /// Images drawn together. No image depends on it.
    ///
    /// On the CPU from 1 to 64: as many as keep an activation of the finest level within 8 MiB, near the caches. On a
    /// GPU as many as fill it at the coarsest level, where an image has the fewest pixels: enough for two waves of
    /// tiles of a convolution there, or half as many, and so on, until a pass takes no more than the memory that is
    /// free. Half of either with guidance, which evaluates the network twice for an image.
    pub fn batch(&self) -> usize {
        let m = self.unet.model();
        if !self.device.is_gpu() {
            let images = (2 * 1024 * 1024 / (m.image_size.h * m.image_size.w * m.widths[0])).clamp(1, 64);
            return (images / self.halves()).max(1);
        }
        let coarsest = m.levels() - 1;
        let pixels = m.size_at(coarsest).pixels();
        let available = available_on(self.device).unwrap_or(u64::MAX);
        let fits = |images: usize| {
            let shape = self.shape(self.halves() * images);
            let needed =
                || memory_of_forward(self.device, self.unet, self.params, shape).expect("shapes need no memory");
            // The convolutions count pixels to 2^30.
            shape.rows() < 1 << 30 && needed() <= available
        };
        let mut images = tile::rows_of_waves(2, m.widths[coarsest]).div_ceil(pixels).div_ceil(self.halves());
        while images > 1 && !fits(images) {
            images = images.div_ceil(2);
        }
        images
    }

    /// Bytes of device memory that a batch of `count` images takes, the weights not counted.
    ///
    /// # Errors
    /// None; shapes need no memory.
    pub fn memory(&self, count: usize) -> Result<u64> {
        memory_of_forward(self.device, self.unet, self.params, self.shape(self.halves() * count))
    }

    /// One batch of images in [-1, 1], (count, h, w, c). `each` is called after every step.
    ///
    /// # Errors
    /// Those of `gradient` and `each`, which end the drawing; a pixel that is not finite; a GPU that fails.
    pub fn draw(
        &self,
        request: &Request<'_>,
        gradient: Option<Gradient<'_>>,
        each: impl FnMut(Progress<'_>) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let shape = self.shape(request.count);
        let guided = self.sampler.is_guided();
        let network = Conditional::new(self.device, self.unet, self.params, request.labels, guided)?;
        let start = request.start.map(|x| Tensor::from_slice(self.device, shape, x)).transpose()?;
        let reverse = Reverse {
            device: self.device,
            sampler: self.sampler,
            shape,
            samples: Samples { seed: self.seed, first: request.first },
            start: start.as_ref(),
            shared: request.shared,
            x_0: request.x_0,
            replays: true,
        };
        finite(reverse.run(|call| network.call(call), gradient, each)?.to_vec()?)
    }

    /// The bytes of images `which`, (n, h, w, c). A conditional model takes the class of image i from `labels[i]`.
    /// `each` is called after every step of every batch.
    ///
    /// # Errors
    /// More than `u32::MAX` images; those of `each`, which end the drawing; a pixel that is not finite; a GPU that
    /// fails.
    pub fn images(
        &self,
        which: Range<usize>,
        labels: Option<&[u32]>,
        mut each: impl FnMut(&Progress<'_>) -> Result<()>,
    ) -> Result<Vec<u8>> {
        let end = which.end;
        if u32::try_from(end).is_err() {
            return Err(Error::Usage(format!("--count {end}: at most {} images", u32::MAX)));
        }
        let mut images = Vec::with_capacity(self.shape(which.len()).len());
        let together = self.batch();
        for first in which.step_by(together) {
            let range = first..end.min(first + together);
            let labels = labels.map(|labels| &labels[range.clone()]);
            let request = Request { first: first as u32, count: range.len(), labels, ..Request::default() };
            images.extend(output::to_bytes(&self.draw(&request, None, |p| each(&p))?));
        }
        Ok(images)
    }
}

/// The pixels, if all are numbers.
fn finite(x_0: Vec<f32>) -> Result<Vec<f32>> {
    match x_0.iter().find(|v| !v.is_finite()) {
        None => Ok(x_0),
        Some(bad) => Err(Error::Failed(format!(
            "a pixel came out as {bad}: the network's weights are damaged, or were trained with too large a learning_rate"
        ))),
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
    usage!("--class {text}: this model has the classes {}", nearest_first(text, names, classes));
}

/// The model's number of each of the `labels` of images, which go by name ([`crate::classes::go_by_name`]): `of_data`
/// are the names of the data's classes, `names` those of the model's. A class of the same name and number is the same
/// one, whatever else is called so.
///
/// # Errors
/// `Error::File` for a label whose class the model does not have, or has twice.
pub fn classes_by_name(
    data: &Path,
    labels: &[u32],
    of_data: &[String],
    names: &[String],
    classes: usize,
) -> Result<Vec<u32>> {
    let mut found: Vec<Option<u32>> = vec![None; of_data.len()];
    for &label in labels {
        let k = label as usize;
        if found[k].is_some() {
            continue;
        }
        let name = &of_data[k];
        let called: Vec<usize> = (0..names.len()).filter(|&k| names[k] == *name).collect();
        found[k] = match called[..] {
            _ if called.contains(&k) => Some(label),
            [only] => Some(only as u32),
            [] => {
                let has = nearest_first(name, names, classes);
                let what = format!("has images of class {name}, but this model has the classes {has}");
                return Err(Error::file(data, what));
            }
            [first, second, ..] => {
                let what = format!(
                    "has images of class {name}, but the model calls two classes so, {first} and {second}; their names must differ"
                );
                return Err(Error::file(data, what));
            }
        };
    }
    Ok(labels.iter().map(|&label| found[label as usize].expect("found above")).collect())
}

/// The classes 0 to `classes` - 1 with their names, those nearest to `text` first.
fn nearest_first(text: &str, names: &[String], classes: usize) -> String {
    let last = classes - 1;
    if names.is_empty() {
        return format!("0 to {last}, without names");
    }
    let lower = text.to_lowercase();
    let mut nearest: Vec<(usize, &String)> = names.iter().enumerate().collect();
    // A stable sort: names that are equally far stay in order.
    nearest.sort_by_cached_key(|(_, name)| {
        let name = name.to_lowercase();
        let edits = strsim::damerau_levenshtein(&name, &lower);
        if edits <= 2.max(lower.chars().count() / 3) || name.contains(&lower) { edits } else { usize::MAX }
    });
    const SHOWN: usize = 10;
    // With their numbers, since their order here is not that of the classes.
    let shown: Vec<String> = nearest.iter().take(SHOWN).map(|(k, name)| format!("{k} {name}")).collect();
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    format!("0 to {last}: {}{more}", shown.join(", "))
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

/// The class of image `i` of a network with `classes` classes: `class`, or all in turn; `None` if it is unconditional.
pub fn label(classes: usize, class: Option<u32>, i: usize) -> Option<u32> {
    (classes > 0).then(|| class.unwrap_or((i % classes.max(1)) as u32))
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
        _ => Ok((0..count).map(|i| label(classes, class, i)).collect()),
    }
}
