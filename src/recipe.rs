//! The recipe for data of one's own, `preset = auto`: settings that suit the images and the device. What somebody chose
//! ([`Given`]) stays as it is; the rest is filled in, and config.toml keeps all of it.
//!
//! - Colour and size as the data has them, but no larger than the device trains in sensible time, and such that no
//!   more than one image in ten is enlarged.
//! - On the CPU a small network, as for the digits, since seeing more images beats having more channels; steps for
//!   about an hour on two cores. On a GPU the paper's network for CIFAR-10 and its optimiser.
//! - Mirrored images only if the data looks like its mirror image: digits, letters, and shoes that all point to the
//!   left do not.
//!
//! Deliberately absent: a search over recipes. The rules are few, and each fills in a setting that anyone can change.

use crate::config::{Config, Given, Preset, Size};
use crate::data::{Dataset, Survey, choose};
use crate::device::Device;
use crate::diffusion::Kind;
use crate::error::Result;
use crate::memory;
use crate::ops::tree_sum;
use crate::text::grouped;
use crate::unet::UNet;
use crate::usage;

/// Largest side chosen unasked.
const CPU_SIDE: usize = 32;
const GPU_SIDE: usize = 64;

/// FLOP of training per second and core, as counted: Winograd's algorithm needs fewer. 150 to 190 * 10^9 with one
/// thread of an Intel Xeon (Sapphire Rapids, 2.3 GHz), for networks as narrow as these.
const CPU_SPEED: f64 = 1.5e11;

/// FLOP of a training on the CPU: about an hour on two such cores.
const CPU_BUDGET: f64 = 1e15;

/// Bounds of the number of steps, on the CPU and on a GPU.
const CPU_STEPS: (f64, f64) = (5e3, 5e4);
const GPU_STEPS: (f64, f64) = (2e4, 2e5);

/// How much less a classifier is trained: it learns faster than a network that predicts noise.
const CLASSIFIER_SHARE: f64 = 4.0;

/// Most times that an image is seen. The paper's 800,000 steps see each image of CIFAR-10 2,048 times.
const EPOCHS: f64 = 2e3;

/// Fewer images than this are all trained on.
const FEW: usize = 20;

/// Fills in what is not `given` for data that is not decoded yet, and returns sentences for the user about it.
///
/// With another preset than [`Preset::Auto`] only `attention_resolutions` is adapted to the image size.
///
/// `device` is that of the run, or of each of its `ranks`.
///
/// # Errors
/// `Error::Usage` for given settings that no network has.
pub fn suit(config: &mut Config, given: &Given, survey: &Survey, device: &Device, ranks: usize) -> Result<Vec<String>> {
    if config.preset != Preset::Auto {
        return Ok(adapt_attention(config, given).into_iter().collect());
    }
    let mut base = if device.is_gpu() { Config::preset(Preset::Cifar10) } else { Config::preset(Preset::Auto) };
    base.diffusion.schedule = Kind::Cosine; // the linear one spends half of its steps on noise at such sizes
    base.data.clone_from(&config.data);
    if config.model.classifier {
        base = base.into_classifier();
    }
    config.fill(given, &base);

    let m = &mut config.model;
    if !given.has("channels") {
        m.channels = survey.channels;
    }
    if !given.has("image_size") {
        let most = if device.is_gpu() { GPU_SIDE } else { CPU_SIDE };
        m.image_size = suitable_size(survey, most, if given.has("widths") { m.levels() } else { 3 });
    } else if m.image_size == Size::DATA {
        let Some(size) = only_size(survey) else { return Ok(Vec::new()) }; // refused when the images are read
        m.image_size = size;
    }
    let size = m.image_size;
    if !given.has("widths") {
        m.widths.truncate(levels(size, device));
    }
    if !given.has("groups") {
        let divides = |groups: &usize| m.widths.iter().all(|width| width.is_multiple_of(*groups));
        m.groups = (1..=m.groups).rev().find(divides).unwrap_or(1);
    }
    if !given.has("attention_resolutions") {
        // The finest level that is coarse enough.
        let most = if device.is_gpu() { 16 } else { 8 };
        let sides = (0..m.levels()).map(|level| m.size_at(level).longer());
        m.attention_resolutions = sides.into_iter().find(|&side| (1..=most).contains(&side)).into_iter().collect();
    }
    if !given.has("held_out") {
        config.held_out = held_out(config.held_out, survey.images);
    }
    config.validate()?;

    let (unet, specs) = UNet::new(&config.model)?;
    let forward: u64 = unet.costs(&specs, size.h, size.w).iter().map(|cost| cost.flops).sum();
    let step = 3.0 * forward as f64 * config.batch as f64;
    let epochs = EPOCHS * survey.images as f64 / config.batch as f64;
    if !given.has("steps") {
        let (mut fewest, most) = if device.is_gpu() { GPU_STEPS } else { CPU_STEPS };
        let mut affordable = if device.is_gpu() { most } else { CPU_BUDGET / step };
        if config.model.classifier {
            (fewest, affordable) = (fewest / CLASSIFIER_SHARE, affordable / CLASSIFIER_SHARE);
        }
        config.steps = (affordable.min(epochs).clamp(fewest, most) / 500.0).round() as u32 * 500;
    }
    if !given.has("warmup_steps") {
        config.warmup_steps = config.warmup_steps.min(config.steps / 20);
    }
    if !given.has("ema_decay") {
        config.ema_decay = if config.steps >= 50_000 { 0.9999 } else { 0.999 };
    }
    let every = a_twelfth(config.steps);
    for (key, setting) in [
        ("validate_every", &mut config.validate_every),
        ("sample_every", &mut config.sample_every),
        ("checkpoint_every", &mut config.checkpoint_every),
    ] {
        if !given.has(key) {
            *setting = every;
        }
    }
    if config.model.classifier && !given.has("sample_every") {
        config.sample_every = 0;
    }
    if !given.has("accumulate")
        && let Some(available) = memory::available_on(device)
    {
        let fits = |accumulate: &usize| {
            let split = Config { accumulate: *accumulate, ..config.clone() };
            config.batch.is_multiple_of(*accumulate)
                && tree_sum::fits(*accumulate, ranks)
                && memory::memory_needed(&split, &unet, &specs, device, ranks) <= available
        };
        config.accumulate = (1..=config.batch).find(fits).unwrap_or(1);
    }
    let duration = match device.is_gpu() {
        true => String::new(),
        false => {
            let seconds = step * f64::from(config.steps) / (CPU_SPEED * rayon::current_num_threads() as f64);
            format!(", about {} on this processor", readable(seconds))
        }
    };
    Ok(vec![summary(config, survey) + &duration + "; --set changes any setting, config.toml keeps them all"])
}

/// The share of so many `images` that is held out if nobody has said how much: `share`, but nothing of few.
pub fn held_out(share: f64, images: usize) -> f64 {
    if images < FEW { 0.0 } else { share }
}

/// Chooses a number of micro-batches that `ranks` ranks can share, unless it is given: a multiple of `ranks` by a
/// power of two, the smallest that is not below what the settings have; returns a sentence for the user.
///
/// # Errors
/// `Error::Usage` for a batch of which so many ranks cannot have equal parts.
pub fn suit_ranks(config: &mut Config, given: &Given, ranks: usize) -> Result<Option<String>> {
    if given.has("accumulate") || tree_sum::fits(config.accumulate, ranks) {
        return Ok(None);
    }
    if !config.batch.is_multiple_of(ranks) {
        usage!("batch = {}: on {ranks} devices a step takes a multiple of {ranks} images", config.batch);
    }
    let fits = |accumulate: &usize| config.batch.is_multiple_of(*accumulate) && tree_sum::fits(*accumulate, ranks);
    config.accumulate = (config.accumulate..=config.batch).find(fits).unwrap_or(ranks);
    Ok(Some(format!("a step is computed in {} micro-batches on {ranks} devices", config.accumulate)))
}

/// Decides on mirrored images now that the images are there, if the settings of `suit` leave it open; returns a
/// sentence for the user.
pub fn suit_flip(config: &mut Config, given: &Given, train: &Dataset) -> Option<String> {
    if config.preset != Preset::Auto || given.has("flip") {
        return None;
    }
    let asymmetry = asymmetry(train);
    config.flip = asymmetry < ASYMMETRIC;
    Some(match config.flip {
        true => "half of the images are mirrored left to right, which the data does not mind (flip = true)".into(),
        false => format!(
            "no image is mirrored, since left and right differ: {:.0} per cent of the asymmetry is common to the images \
             (flip = false)",
            100.0 * asymmetry
        ),
    })
}

/// Adapts `attention_resolutions` to an image size that a preset was not made for, unless it is given; returns a
/// sentence for the user.
pub fn adapt_attention(config: &mut Config, given: &Given) -> Option<String> {
    let m = &mut config.model;
    if given.has("attention_resolutions") || m.image_size == Size::DATA {
        return None;
    }
    let before = m.attention_resolutions.clone();
    m.adapt_attention().then(|| {
        format!(
            "attention_resolutions = {:?} are no levels of image_size = {}, so they are {:?}",
            before, m.image_size, m.attention_resolutions
        )
    })
}

/// The size of the images if all have the same.
fn only_size(survey: &Survey) -> Option<Size> {
    let mut sizes = survey.sizes.keys();
    sizes.next().filter(|_| sizes.next().is_none()).map(|&(h, w)| Size { h, w })
}

/// The size of the images if all have one that the device can bear and `levels` levels can halve; otherwise the largest
/// square that at most one image in ten is too small for.
fn suitable_size(survey: &Survey, most: usize, levels: usize) -> Size {
    if let (true, Some(size)) = (survey.fitted, only_size(survey)) {
        return size; // somebody has decided on it
    }
    let step = (1 << (levels - 1).min(16)).max(4);
    if let Some(Size { h, w }) = only_size(survey)
        && [h, w].iter().all(|side| side.is_multiple_of(step) && (step..=most).contains(side))
    {
        return Size { h, w };
    }
    let mut shorter: Vec<(usize, usize)> = survey.sizes.iter().map(|(&(h, w), &n)| (h.min(w), n)).collect();
    shorter.sort_unstable();
    let mut smaller = 0;
    let side = shorter.into_iter().find(|&(_, n)| {
        smaller += n;
        10 * smaller > survey.images
    });
    let side = side.map_or(most, |(side, _)| side.min(most));
    Size::square((side / step * step).max(2 * step))
}

/// Levels that images of a size are halved into: up to four, the coarsest at least four pixels wide. On the CPU a
/// fourth level of 4x4 is not worth its parameters: 32x32 ends at 8x8 there.
fn levels(size: Size, device: &Device) -> usize {
    let fourth = if device.is_gpu() { 4 } else { 7 };
    let whole = |level: usize| size.h.is_multiple_of(1 << level) && size.w.is_multiple_of(1 << level);
    let wide = |level: usize| size.h.min(size.w) >> level >= if level < 3 { 4 } else { fourth };
    1 + (1..4).take_while(|&level| whole(level) && wide(level)).count()
}

/// At most a twelfth of the steps, as 1, 2 or 5 times a power of ten.
fn a_twelfth(steps: u32) -> u32 {
    let twelfth = steps / 12;
    let powers = (0..9).flat_map(|k| [1, 2, 5].map(|digit| digit * 10u32.pow(k)));
    powers.take_while(|&every| every <= twelfth).last().unwrap_or(1)
}

/// A share of asymmetry from which on images are not mirrored. For the digits of MNIST it is 9 per cent, for
/// Fashion-MNIST 17, for 3,786 emoji 0.3.
const ASYMMETRIC: f64 = 0.02;

/// How much of the difference between images and their mirror images is common to all of them: 0 if left and right are
/// the same on average, 1 if all images are the same.
///
/// a_i is image i minus its mirror image, averaged over the cells of a raster of 8x4 in the left half, which leaves out
/// detail that no two images share. The share is |mean a|^2 / mean |a|^2, less the 1/n that chance has in n images, and
/// less twice that for its error: few images are mirrored.
fn asymmetry(data: &Dataset) -> f64 {
    const ROWS: usize = 8;
    const COLUMNS: usize = 4;
    /// More images change nothing.
    const MOST: usize = 10_000;
    let (Size { h, w }, c) = (data.extent().size, data.extent().channels);
    let chosen = choose(data.len(), MOST);
    let n = chosen.len();
    let mut mean = [0.0; ROWS * COLUMNS];
    let mut square = 0.0;
    for i in chosen {
        let image = data.image(i); // (h, w, c)
        let brightness = |y: usize, x: usize| -> f64 {
            image[(y * w + x) * c..][..c].iter().map(|&byte| f64::from(byte)).sum::<f64>()
        };
        let mut a = [0.0; ROWS * COLUMNS];
        for y in 0..h {
            for x in 0..w / 2 {
                let cell = y * ROWS / h * COLUMNS + x * COLUMNS / (w / 2);
                a[cell] += brightness(y, x) - brightness(y, w - 1 - x);
            }
        }
        for (mean, a) in mean.iter_mut().zip(a) {
            *mean += a / n as f64;
            square += a * a / n as f64;
        }
    }
    if square == 0.0 {
        return 0.0;
    }
    mean.iter().map(|a| a * a).sum::<f64>() / square - 3.0 / n as f64
}

/// What the data is and what it is trained with, the beginning of a sentence.
fn summary(config: &Config, survey: &Survey) -> String {
    let m = &config.model;
    let found = match only_size(survey) {
        Some(size) => size.to_string(),
        None => {
            let sides = |side: fn(&(usize, usize)) -> usize| {
                let sides = survey.sizes.keys().map(side);
                (sides.clone().min().unwrap_or(0), sides.max().unwrap_or(0))
            };
            let ((h, height), (w, width)) = (sides(|size| size.0), sides(|size| size.1));
            format!("{h} to {height} by {w} to {width} pixels")
        }
    };
    let size = match only_size(survey) == Some(m.image_size) {
        true => String::new(),
        false => format!(", trained at {}", m.image_size),
    };
    format!(
        "recipe for {} {} of {found}{size}: widths {}, {} steps of {} images",
        grouped(survey.images as u64),
        if survey.images == 1 { "image" } else { "images" },
        m.widths.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
        grouped(u64::from(config.steps)),
        config.batch,
    )
}

/// `45 minutes`, `3 hours`.
fn readable(seconds: f64) -> String {
    match seconds / 60.0 {
        minutes if minutes < 1.5 => "a minute".into(),
        minutes if minutes < 90.0 => format!("{minutes:.0} minutes"),
        minutes => format!("{:.0} hours", minutes / 60.0),
    }
}
