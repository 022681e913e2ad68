//! How like the data samples are, and whether they are copies: everything of the command `quality` that can be done
//! without the internet.
//!
//! Distances are taken between features. Those that everyone reports are of Inception-v3, whose weights are not here.
//! In their place stands a classifier of the data's own classes, trained here on the training images with settings and
//! a seed that never change ([`settings`]), and cached. Its features are what its last layer sees. Figures of different
//! classifiers cannot be compared, so its name, which follows from its weights, belongs to each figure; and each figure
//! has beside it that of the held-out images, which is what a perfect model would get. Features of any other network
//! can be brought instead.
//!
//! Deliberately absent: a figure called FID, which is of Inception-v3.

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Value, json};
use twox_hash::XxHash3_128;

use crate::checkpoint;
use crate::classifier::Classifier;
use crate::config::{Config, Model, Preset, Size};
use crate::data::{Data, Dataset, Extent, choose};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::measures::{
    Features, Gaussian, NEIGHBOURS, Nearest, Nearness, frechet_distance, nearest, nearest_pixels, precision_and_recall,
};
use crate::output;
use crate::tensor::{Shape, Tensor};
use crate::train::{Trainer, Watch};
use crate::usage;

/// Changes when [`settings`] change, so that no cached classifier of others is taken.
const VERSION: u32 = 1;

/// Images that go through the classifier together. No image's features depend on it.
const TOGETHER: usize = 64;

/// Nearest training images that are looked for: two tell copies, three fill the picture.
const NEAREST: usize = 3;

/// Samples in the picture for each of the two kinds of distance.
const SHOWN: usize = 12;

/// The classifier of images of this extent and these classes, and how it is trained: about a minute for the built-in
/// digits on two cores. Fixed once, since figures of different classifiers cannot be compared.
///
/// Its network is that of a classifier for guidance. Its process has two timesteps of next to no noise (1e-6 in images
/// of [-1, 1], two ten-thousandths of a grey level), so it learns clean images. 64 features: the distance of finite
/// sets to their own distribution grows with the square of their number, and 2,000 samples are too few for more.
///
/// # Errors
/// `Error::Usage` for images that cannot be halved to 32 pixels a side.
pub fn settings(extent: Extent, classes: usize) -> Result<Config> {
    const WIDTHS: [usize; 3] = [16, 32, 64];
    const LAST: usize = 64;
    let Extent { size, channels } = extent;
    let mut levels = 1;
    let at = |level: usize| Size { h: size.h >> level, w: size.w >> level };
    let halves = |level: usize| size.h.is_multiple_of(1 << level) && size.w.is_multiple_of(1 << level);
    while at(levels - 1).longer() > 8 && halves(levels) && at(levels).h.min(at(levels).w) >= 4 {
        levels += 1;
    }
    if at(levels - 1).longer() > 32 {
        usage!(
            "images of {size} cannot be halved to 32 pixels or less, which the classifier for their features needs; give features of your own with --features"
        );
    }
    let mut widths: Vec<usize> = (0..levels).map(|level| WIDTHS.get(level).copied().unwrap_or(LAST)).collect();
    widths[levels - 1] = LAST;
    let mut config = Config::preset(Preset::Cifar10).into_classifier(); // the paper's, which do not change
    config.model = Model {
        image_size: size,
        channels,
        widths,
        blocks_per_level: 1,
        attention_resolutions: Vec::new(),
        head_dim: 0,
        groups: 8,
        dropout: 0.1,
        classes,
        classifier: true,
        ..config.model
    };
    config.diffusion.timesteps = 2;
    config.diffusion.trained_betas = vec![1e-12; 2];
    (config.seed, config.steps, config.batch) = (0, 2000, 32);
    (config.learning_rate, config.warmup_steps, config.ema_decay) = (1e-3, 50, 0.99);
    (config.flip, config.accumulate) = (false, 1);
    (config.data, config.class_names) = (String::new(), Vec::new());
    Ok(config)
}

/// What makes features of images.
pub struct Extractor {
    device: Device,
    classifier: Classifier,
    name: String,
}

impl Extractor {
    /// The classifier of `data`, from the folder `cache` if it was trained before, else trained now and kept there.
    /// Always on the CPU in f32: another device would round to another classifier.
    ///
    /// # Errors
    /// Data without two classes, images that are too large ([`settings`]), a cache that cannot be read or written.
    pub fn of(data: &Data, cache: &Path, watch: &mut dyn Watch) -> Result<Self> {
        let (device, classes) = (Device::cpu(), data.classes.len());
        if classes < 2 || data.train.labels().is_none() {
            return Err(Error::Failed(
                "the data has no two classes, by which the features are learnt; give features of your own with --features"
                    .into(),
            ));
        }
        let config = settings(data.train.extent(), classes)?;
        let mut key = XxHash3_128::new();
        key.write(format!("{VERSION}\n{}\n{}", data.fingerprint(), config.to_toml()).as_bytes());
        let folder = cache.join(format!("quality-{:012x}", key.finish_128() >> 80));
        let trained = match checkpoint::newest(&folder)? {
            Some(trained) => trained,
            None => train(&config, data, &folder, watch)?,
        };
        let classifier = Classifier::load(&device, &trained)?;
        let mut hash = XxHash3_128::new();
        for weight in classifier.params().host()?.iter() {
            hash.write(&weight.to_le_bytes());
        }
        let name = format!("classifier-{:08x}", hash.finish_128() >> 96);
        Ok(Extractor { device, classifier, name })
    }

    /// `classifier-` and a hash of its weights.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The features of images, `shape.len()` bytes, and the class that each is taken for. `each` is called with the
    /// number of images done.
    ///
    /// # Errors
    /// Features that are not finite.
    pub fn features(&self, images: &[u8], shape: Shape, mut each: impl FnMut(usize)) -> Result<(Features, Vec<u32>)> {
        let (mut rows, mut classes, mut d) = (Vec::new(), Vec::new(), 1);
        for part in images.chunks(TOGETHER * shape.len() / shape.n) {
            let n = part.len() * shape.n / shape.len();
            // As the forward process scales them.
            let x: Vec<f32> = part.iter().map(|&byte| f32::from(2 * i16::from(byte) - 255) / 255.0).collect();
            let x = Tensor::from_slice(&self.device, Shape { n, ..shape }, &x)?; // (n, h, w, c)
            let (features, logits) = self.classifier.features(&self.device, &x, 0)?;
            d = features.shape().c;
            rows.extend(features.data().iter().map(|&v| f64::from(v)));
            for z in logits.data().chunks_exact(logits.shape().c) {
                let largest = (0..z.len()).rev().max_by(|&a, &b| z[a].total_cmp(&z[b])).expect("two classes or more");
                classes.push(largest as u32);
            }
            each(n);
        }
        Ok((Features::new(rows, d)?, classes))
    }
}

fn train(config: &Config, data: &Data, folder: &Path, watch: &mut dyn Watch) -> Result<PathBuf> {
    fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be created: {e}")))?;
    watch.say(&format!(
        "training the classifier for the features, once for these data: {} steps, kept in {}",
        config.steps,
        folder.display()
    ));
    let (train, held_out) = (data.train.clone(), data.held_out.clone());
    let data = Data { train, held_out, classes: data.classes.clone(), notes: Vec::new(), skipped: Vec::new() };
    let mut trainer = Trainer::new(config, data, &Device::cpu())?;
    watch.begin(0, config.steps);
    while trainer.steps_done() < config.steps {
        trainer.step()?;
        let loss = trainer.reports()?.pop().map(|step| step.loss);
        watch.measured(format!("loss {:.4}", loss.expect("a step on the CPU has a report")));
        watch.step();
    }
    watch.end();
    trainer.check_weights()?;
    checkpoint::save(folder, config, trainer.state())
}

/// The bytes of a set's images, one after the other, and `mirrored` left to right after all of them.
pub fn pixels(set: &Dataset, mirrored: bool) -> (Vec<u8>, Shape) {
    let Extent { size: Size { h, w }, channels: c } = set.extent();
    let mut bytes: Vec<u8> = (0..set.len()).flat_map(|i| set.image(i).iter().copied()).collect();
    if mirrored {
        let mirror = |row: &[u8]| row.rchunks_exact(c).flatten().copied().collect::<Vec<u8>>();
        let mirrored: Vec<u8> = bytes.par_chunks_exact(w * c).flat_map_iter(mirror).collect();
        bytes.extend(mirrored);
    }
    let n = bytes.len() / (h * w * c);
    (bytes, Shape::new(n, h, w, c))
}

/// Share of `classes` that are `labels`.
pub fn accuracy(classes: &[u32], labels: &[u32]) -> f64 {
    assert_eq!(classes.len(), labels.len(), "a class for each image");
    classes.iter().zip(labels).filter(|(class, label)| class == label).count() as f64 / classes.len() as f64
}

/// The figures of one set of images.
#[derive(Clone, Debug)]
pub struct Figures {
    /// How many images they are of. They depend on it.
    pub images: usize,
    /// [`frechet_distance`] to the reference.
    pub frechet_distance: f64,
    /// To as many training images; `None` without features of these.
    pub precision: Option<f64>,
    /// Likewise.
    pub recall: Option<f64>,
}

impl Figures {
    /// Those of `images` against the `reference` and as many of `train` as there are images ([`some_of`]).
    ///
    /// # Errors
    /// Fewer images than a covariance or a radius needs.
    pub fn of(images: &Features, reference: &Gaussian, train: Option<&Features>) -> Result<Self> {
        let shares = match train {
            None => None,
            Some(train) => {
                let n = images.len().min(train.len());
                Some(precision_and_recall(&some_of(train, n), &some_of(images, n), NEIGHBOURS)?)
            }
        };
        Ok(Figures {
            images: images.len(),
            frechet_distance: frechet_distance(&Gaussian::of(images)?, reference),
            precision: shares.map(|shares| shares.precision),
            recall: shares.map(|shares| shares.recall),
        })
    }

    fn json(&self) -> Value {
        json!({
            "images": self.images,
            "frechet_distance": self.frechet_distance,
            "precision": self.precision,
            "recall": self.recall,
        })
    }
}

/// `n` of the images, or all if there are no more, those that [`choose`] takes.
pub fn some_of(all: &Features, n: usize) -> Features {
    all.select(choose(all.len(), n))
}

/// Everything that is reported.
pub struct Report {
    /// Name of the features.
    pub features: String,
    /// Numbers of a feature vector.
    pub d: usize,
    /// Of a classifier trained here: the share of held-out images that it is right about, if there are any.
    pub accuracy: Option<f64>,
    /// What the samples were compared with, for people.
    pub reference: String,
    /// Of the samples.
    pub samples: Figures,
    /// Of the held-out images, as many as there are samples or all there are; `None` if there are too few.
    pub baseline: Option<Figures>,
    /// Of as many samples as the baseline has images, if these are fewer.
    pub samples_of_baseline: Option<Figures>,
    /// Nearness to the training set in pixels, if there are held-out images.
    pub pixels: Option<Nearness>,
    /// The same in features, if there are features of the training set.
    pub nearness: Option<Nearness>,
}

impl Report {
    /// The report as JSON.
    pub fn json(&self) -> Value {
        let nearness = |of: &Option<Nearness>| {
            of.as_ref().map(|of| {
                json!({
                    "nearer_than_held_out": of.nearer_than_held_out,
                    "z": of.z,
                    "copies": of.copies,
                    "distance": of.distance,
                    "held_out_distance": of.held_out_distance,
                })
            })
        };
        let baseline = self.baseline.as_ref().map(|baseline| {
            let mut json = baseline.json();
            json["samples"] = self.samples_of_baseline.as_ref().unwrap_or(&self.samples).json();
            json
        });
        json!({
            "features": self.features,
            "feature_numbers": self.d,
            "classifier_accuracy": self.accuracy,
            "reference": self.reference,
            "images": self.samples.images,
            "frechet_distance": self.samples.frechet_distance,
            "precision": self.samples.precision,
            "recall": self.samples.recall,
            "baseline": baseline,
            "memorising": { "pixels": nearness(&self.pixels), "features": nearness(&self.nearness) },
        })
    }

    /// The report as lines for people.
    pub fn lines(&self) -> Vec<String> {
        let Report { features, d, .. } = self;
        let mut lines = Vec::new();
        let right = self
            .accuracy
            .map_or(String::new(), |share| format!(", right about {:.1} % of the held-out images", 100.0 * share));
        lines.push(format!("features: {features}, {d} numbers an image{right}"));
        lines.push(format!("compared with {}", self.reference));
        lines.push(format!(
            "{:<28} {:>8} {:>18} {:>10} {:>10}",
            format!("[{features}]"),
            "images",
            "Frechet distance",
            "precision",
            "recall"
        ));
        let mut row = |name: &str, of: &Figures| {
            let share = |share: Option<f64>| share.map_or("-".into(), |share| format!("{share:.3}"));
            lines.push(format!(
                "{name:<28} {:>8} {:>18.4} {:>10} {:>10}",
                of.images,
                of.frechet_distance,
                share(of.precision),
                share(of.recall)
            ));
        };
        row("samples", &self.samples);
        if let Some(fewer) = &self.samples_of_baseline {
            row("samples, as many as below", fewer);
        }
        match &self.baseline {
            Some(baseline) => row("held-out images (baseline)", baseline),
            None => {
                lines.push("too few images are held out for a baseline, without which the figures mean little".into())
            }
        }
        for (name, of) in [("pixels", &self.pixels), (&features[..], &self.nearness)] {
            let Some(of) = of else { continue };
            lines.push(format!(
                "memorising [{name}]: a sample is nearer to the training set than a held-out image in {:.1} % of all pairs (50 % if none is memorised, z = {:.1}); {:.2} % are copies; mean distance {:.4}, of held-out images {:.4}",
                100.0 * of.nearer_than_held_out,
                of.z,
                100.0 * of.copies,
                of.distance,
                of.held_out_distance
            ));
        }
        lines
    }
}

/// The nearest training images of `of`, images of `shape`, among `train`, `(bytes, shape)` of [`pixels`], whose first
/// `images` are not mirrored.
pub fn nearest_in_pixels(of: &[u8], (train, shape): &(Vec<u8>, Shape), images: usize) -> Vec<Nearest> {
    nearest_pixels(of, train, shape.len() / shape.n, images, NEAREST)
}

/// The same in features.
pub fn nearest_in_features(of: &Features, train: &Features, images: usize) -> Vec<Nearest> {
    nearest(of, train, images, NEAREST)
}

/// Writes the picture of the samples that are most like one training image and no other ([`Nearest::ratio`]), first in
/// pixels and then in features: each a strip of the sample, its three nearest training images in pixels, and those in
/// features. By the distance alone they would be the simplest images, such as ones among digits.
///
/// # Errors
/// `Error::File` for images that are no pictures, or a file that cannot be written.
pub fn write_picture(
    path: &Path,
    samples: &[u8],
    train: &[u8],
    image: Shape,
    in_pixels: &[Nearest],
    in_features: Option<&[Nearest]>,
) -> Result<()> {
    let Shape { h, w, c, .. } = image;
    let likest_first = |of: &[Nearest]| {
        let mut order: Vec<usize> = (0..of.len()).collect();
        order.sort_by(|&a, &b| of[a].ratio().total_cmp(&of[b].ratio()));
        order.truncate(SHOWN);
        order
    };
    let shown = [likest_first(in_pixels), in_features.map_or(Vec::new(), likest_first)].concat();
    let gap = (w / 8).max(2);
    let width = w + (NEAREST * w + gap) * if in_features.is_some() { 2 } else { 1 };
    let mut strips = Vec::with_capacity(shown.len() * h * width * c);
    let row = |images: &[u8], index: usize, y: usize| images[(index * h + y) * w * c..][..w * c].to_vec();
    for &sample in &shown {
        for y in 0..h {
            strips.extend(row(samples, sample, y));
            for nearest in std::iter::once(&in_pixels[sample]).chain(in_features.map(|of| &of[sample])) {
                strips.extend(vec![255; gap * c]);
                for k in 0..NEAREST {
                    match nearest.images.get(k) {
                        Some(&image) => strips.extend(row(train, image, y)),
                        None => strips.extend(vec![255; w * c]),
                    }
                }
            }
        }
    }
    output::write_grid(path, Shape::new(shown.len(), h, width, c), &strips)
}
