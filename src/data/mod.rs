//! Data sets: reading images, splitting off held-out ones, and the order in which training sees them.
//!
//! [`load`] reads any source into memory as unsigned bytes, channels last: `mnist` (built in), .npy and .npz, IDX
//! files, CIFAR-10's binary version, folders of PNG and JPEG. The content of a file decides its format, not its name.
//! Which images are held out depends only on their number, and the training order is a pure function of (seed, step),
//! so a resumed or repeated run sees the same images.
//!
//! Deliberately absent: streaming from disk, augmentation beyond flips.

mod cifar;
mod fit;
mod folder;
mod idx;
pub mod npy;

use std::collections::BTreeSet;
use std::fmt;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rand::seq::SliceRandom;
use rayon::prelude::*;
use twox_hash::XxHash3_128;

use crate::config::{Config, Size};
use crate::error::{Error, Result};
use crate::images::Images;
use crate::rng::{Purpose, Stream, philox};
use crate::tensor::Shape;
use crate::usage;

/// Rows, columns and channels of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Rows and columns.
    pub size: Size,
    /// Channels.
    pub channels: usize,
}

impl Extent {
    /// Number of elements of an image.
    pub fn len(&self) -> usize {
        self.size.h * self.size.w * self.channels
    }

    /// True if an image has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.size, self.channels)
    }
}

/// Images in memory, `(n, h, w, c)` bytes, with labels where the source has them.
#[derive(Clone)]
pub struct Dataset {
    extent: Extent,
    /// All images of the source, shared by the training and the held-out set.
    images: Arc<Vec<u8>>,
    /// Indices in `images` of the images of this set.
    rows: Vec<u32>,
    labels: Option<Vec<u32>>,
}

/// What a run trains on and what it validates on.
pub struct Data {
    /// Images to train on, at least one.
    pub train: Dataset,
    /// Images kept out of training; may be empty.
    pub held_out: Dataset,
    /// One sentence for the user about each thing done to the images (cropped, converted, left out).
    pub notes: Vec<String>,
}

impl Data {
    /// A hash of all images and labels and of which are held out: 32 hexadecimal digits.
    pub fn fingerprint(&self) -> String {
        let mut hash = XxHash3_128::new();
        for set in [&self.train, &self.held_out] {
            let Extent { size, channels } = set.extent;
            for number in [size.h, size.w, channels, set.len()] {
                hash.write(&(number as u64).to_le_bytes());
            }
            for i in 0..set.len() {
                hash.write(set.image(i));
            }
            for label in set.labels.iter().flatten() {
                hash.write(&label.to_le_bytes());
            }
        }
        format!("{:032x}", hash.finish_128())
    }
}

impl Dataset {
    /// From the bytes of whole images, `(n, h, w, c)`, and optionally a class for each.
    pub fn new(extent: Extent, images: Vec<u8>, labels: Option<Vec<u32>>) -> Self {
        assert!(images.len().is_multiple_of(extent.len()), "{} bytes are not images of {extent}", images.len());
        let n = images.len() / extent.len();
        assert!(labels.as_ref().is_none_or(|l| l.len() == n), "one label for each of {n} images");
        Dataset { extent, images: Arc::new(images), rows: (0..n as u32).collect(), labels }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Size and channels of every image.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// Bytes of one image, `(h, w, c)`.
    pub fn image(&self, index: usize) -> &[u8] {
        &self.images[self.rows[index] as usize * self.extent.len()..][..self.extent.len()]
    }

    /// Classes of this set's images, if the source has them.
    pub fn labels(&self) -> Option<&[u32]> {
        self.labels.as_deref()
    }

    /// All images of the source, for the forward process; [`rows`](Self::rows) maps this set's images to them.
    pub fn images(&self) -> Images<'_> {
        let Extent { size: Size { h, w }, channels } = self.extent;
        Images { pixels: &self.images, shape: Shape::new(self.images.len() / self.extent.len(), h, w, channels) }
    }

    /// Indices in [`images`](Self::images) of this set's images `indices`, and with `classes` their classes, if the
    /// source has them.
    pub fn rows(&self, indices: &[usize], classes: bool) -> Rows {
        let labels = self.labels.as_ref().filter(|_| classes);
        Rows {
            rows: indices.iter().map(|&i| self.rows[i]).collect(),
            classes: labels.map(|labels| indices.iter().map(|&i| labels[i]).collect()),
        }
    }

    /// Copies the images at `rows` of [`images`](Self::images) to `to`, one after the other.
    pub fn gather(&self, rows: &[u32], to: &mut [u8]) {
        let image = self.extent.len();
        assert_eq!(to.len(), rows.len() * image, "bytes for {} images of {}", rows.len(), self.extent);
        for (to, &row) in to.chunks_exact_mut(image).zip(rows) {
            to.copy_from_slice(&self.images[row as usize * image..][..image]);
        }
    }
}

/// References to images, in the order of the batch.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Their indices in the source's [`Images`].
    pub rows: Vec<u32>,
    /// Their classes, if they were asked for and the source has them.
    pub classes: Option<Vec<u32>>,
}

impl Rows {
    /// `rows` as `usize`.
    pub fn indices(&self) -> Vec<usize> {
        self.rows.iter().map(|&row| row as usize).collect()
    }
}

/// Reads `config.data`. If the config leaves the image size or the channels open, they are set to those of the data;
/// otherwise images of another size are cropped and resized and other channels converted, which [`Data::notes`]
/// reports.
///
/// # Errors
/// `Error::Usage` if no data is given; `Error::File` for data that is missing, damaged or does not fit the settings.
pub fn load(config: &mut Config) -> Result<Data> {
    let (size, channels) = (config.model.image_size, config.model.channels);
    let target = Target { size: (size != Size::DATA).then_some(size), channels: (channels > 0).then_some(channels) };
    let Found { mut train, mut held_out, mut notes } = read(&config.data, target)?;

    let to = target.over(train.extent);
    for part in std::iter::once(&mut train).chain(&mut held_out) {
        notes.extend(part.fit(to)?);
    }
    (config.model.image_size, config.model.channels) = (to.size, to.channels);
    for part in std::iter::once(&train).chain(&held_out) {
        part.check_classes(config.model.classes)?;
    }
    let (train, held_out) = match held_out {
        Some(held_out) => (train.into_dataset(), held_out.into_dataset()),
        None => train.split(config.held_out)?,
    };
    Ok(Data { train, held_out, notes })
}

/// The requested size and channels; `None`: those of the data.
#[derive(Clone, Copy)]
struct Target {
    size: Option<Size>,
    channels: Option<usize>,
}

impl Target {
    fn over(self, own: Extent) -> Extent {
        Extent { size: self.size.unwrap_or(own.size), channels: self.channels.unwrap_or(own.channels) }
    }
}

/// What a source holds.
struct Found {
    train: Part,
    /// The test set of the source, if it has one.
    held_out: Option<Part>,
    notes: Vec<String>,
}

/// Images of one size, not yet a [`Dataset`], with the file that errors name.
struct Part {
    source: PathBuf,
    extent: Extent,
    images: Vec<u8>,
    labels: Option<Vec<u32>>,
}

impl Part {
    fn new(source: &Path, extent: Extent, images: Vec<u8>, labels: Option<Vec<u32>>) -> Result<Part> {
        if extent.is_empty() || images.is_empty() {
            return Err(Error::file(source, "holds no images"));
        }
        assert!(images.len().is_multiple_of(extent.len()), "{} bytes are not images of {extent}", images.len());
        if images.len() / extent.len() > u32::MAX as usize {
            return Err(Error::file(source, "holds more than 4294967295 images"));
        }
        Ok(Part { source: source.to_path_buf(), extent, images, labels })
    }

    fn len(&self) -> usize {
        self.images.len() / self.extent.len()
    }

    /// Crops, resizes and converts all images to `to`, if they differ from it, and returns a note that says so.
    fn fit(&mut self, to: Extent) -> Result<Option<String>> {
        let from = self.extent;
        fit::check_channels(from.channels, to.channels).map_err(|e| Error::file(&self.source, e))?;
        if from == to {
            return Ok(None);
        }
        let fitted: Vec<Vec<u8>> =
            self.images.par_chunks_exact(from.len()).map(|image| fit::fit(image, from, to)).collect();
        self.images = fitted.concat();
        self.extent = to;
        let found = BTreeSet::from([(from.size.h, from.size.w, from.channels)]);
        Ok(fitted_note(fitted.len(), &found, to))
    }

    fn check_classes(&self, classes: usize) -> Result<()> {
        let Some(labels) = &self.labels else {
            if classes == 0 {
                return Ok(());
            }
            return Err(Error::file(
                &self.source,
                format!("has no labels, which classes = {classes} needs; use classes = 0"),
            ));
        };
        match labels.iter().enumerate().find(|&(_, &l)| classes > 0 && l as usize >= classes) {
            None => Ok(()),
            Some((index, label)) => {
                let what = format!(
                    "has label {label} at image {index}, but classes = {classes} allows 0 to {}; use --set classes={} or more",
                    classes - 1,
                    labels.iter().max().map_or(0, |&l| l as usize + 1)
                );
                Err(Error::file(&self.source, what))
            }
        }
    }

    fn into_dataset(self) -> Dataset {
        Dataset::new(self.extent, self.images, self.labels)
    }

    /// Training and held-out images. Held out are the `share * n` images (rounded, at least one unless the share is 0)
    /// whose indices have the smallest hashes. Independent of the run's seed, so that runs can be compared.
    fn split(self, share: f64) -> Result<(Dataset, Dataset)> {
        let n = self.len();
        let count = if share == 0.0 { 0 } else { ((share * n as f64).round() as usize).max(1) };
        if count >= n {
            let what = format!(
                "holds {n} image{}, of which held_out = {share} would leave none to train on; use --set held_out=0",
                if n == 1 { "" } else { "s" }
            );
            return Err(Error::file(&self.source, what));
        }
        // The key spells "held out!"; nothing else draws from it.
        let hash = |index: u32| philox([index, 0, 0, 0], [0x6865_6C64, 0x6F75_7421])[0];
        let mut by_hash: Vec<u32> = (0..n as u32).collect();
        by_hash.sort_by_key(|&i| (hash(i), i));
        let mut held_out = by_hash[..count].to_vec();
        let mut train = by_hash[count..].to_vec();
        held_out.sort_unstable();
        train.sort_unstable();
        let images = Arc::new(self.images);
        let pick = |rows: Vec<u32>| {
            let labels = self.labels.as_ref().map(|l| rows.iter().map(|&i| l[i as usize]).collect());
            Dataset { extent: self.extent, images: images.clone(), rows, labels }
        };
        Ok((pick(train), pick(held_out)))
    }
}

/// The note that says how images were changed; `found` holds their original (rows, columns, channels).
fn fitted_note(n: usize, found: &BTreeSet<(usize, usize, usize)>, to: Extent) -> Option<String> {
    let any = |test: &dyn Fn(usize, usize, usize) -> bool| found.iter().any(|&(h, w, c)| test(h, w, c));
    let mut how = Vec::new();
    if any(&|h, w, _| h * to.size.w != w * to.size.h) {
        how.push("centre-cropped");
    }
    if any(&|h, w, _| Size { h, w } != to.size) {
        how.push("resized (Lanczos)");
    }
    if any(&|_, _, c| c != to.channels) {
        how.push(if to.channels == 1 { "made grey" } else { "made colour" });
    }
    let how = match &how[..] {
        [] => return None,
        [one] => one.to_string(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    };
    let sizes: Vec<String> = found.iter().map(|&(h, w, c)| format!("{h}x{w}x{c}")).collect();
    Some(format!("{n} images of {} are {how}: {to}", shortened(&sizes)))
}

/// The items joined; of a long list only the first and the last.
fn shortened(items: &[String]) -> String {
    match items {
        [first, .., last] if items.len() > 12 => format!("{} kinds from {first} to {last}", items.len()),
        _ => items.join(", "),
    }
}

fn read(source: &str, target: Target) -> Result<Found> {
    if source.is_empty() {
        usage!("no data is given; use --data mnist (built in) or --data PATH");
    }
    let path = Path::new(source);
    if source == "mnist" {
        #[cfg(feature = "mnist")]
        return read_npz(path, include_bytes!("mnist-10k.npz"), target.channels);
        #[cfg(not(feature = "mnist"))]
        usage!("the digits of data = mnist are not in this build: build it with the feature mnist, or use --data PATH");
    }
    let kind = std::fs::metadata(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    if !kind.is_dir() && !kind.is_file() {
        return Err(Error::file(path, "is neither a file nor a folder"));
    }
    if kind.is_dir() { read_folder(path, target) } else { read_one(path, target) }
}

fn read_folder(path: &Path, target: Target) -> Result<Found> {
    let unreadable = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
    let entries = std::fs::read_dir(path).map_err(unreadable)?.collect::<std::io::Result<Vec<_>>>();
    let mut files: Vec<PathBuf> =
        entries.map_err(unreadable)?.into_iter().map(|e| e.path()).filter(|p| p.is_file()).collect();
    files.sort();
    if let Some(found) = cifar::read_folder(path, &files)? {
        return Ok(found);
    }
    if let Some(found) = idx::read_folder(&files, target.channels)? {
        return Ok(found);
    }
    folder::read(path, target)
}

fn read_one(path: &Path, target: Target) -> Result<Found> {
    let bytes = contents(path)?;
    if bytes.is_empty() {
        return Err(Error::file(path, "is empty"));
    }
    if bytes.starts_with(b"PK") {
        return read_npz(path, &bytes, target.channels);
    }
    let train = if bytes.starts_with(b"\x93NUMPY") {
        let array = npy::Array::parse("the file", &bytes).map_err(|e| Error::file(path, e))?;
        from_arrays(path, array, None, target.channels)?
    } else if idx::is_idx(&bytes) {
        idx::read_file(path, &bytes, target.channels)?
    } else {
        return Err(Error::file(
            path,
            "is none of .npy, .npz and IDX; give one of those, a CIFAR-10 binary folder or a folder of PNG/JPEG files",
        ));
    };
    Ok(Found { train, held_out: None, notes: Vec::new() })
}

/// Names of images and their labels in .npz files.
const TRAIN_NAMES: [(&str, &str); 6] = [
    ("images", "labels"),
    ("arr_0", "arr_1"),
    ("x_train", "y_train"),
    ("train_images", "train_labels"),
    ("x", "y"),
    ("data", "labels"),
];
/// Names of a test set in the same file.
const HELD_OUT_NAMES: [(&str, &str); 2] = [("x_test", "y_test"), ("test_images", "test_labels")];

fn read_npz(path: &Path, bytes: &[u8], channels: Option<usize>) -> Result<Found> {
    let mut arrays = npy::parse_npz(bytes).map_err(|e| Error::file(path, e))?;
    let mut take = |name: &str| {
        let index = arrays.iter().position(|(n, _)| n == name)?;
        Some(arrays.swap_remove(index).1)
    };
    let mut part = |names: &[(&str, &str)]| {
        let (images, labels) = names.iter().find_map(|&(images, labels)| Some((take(images)?, labels)))?;
        Some((images, take(labels)))
    };
    let train = part(&TRAIN_NAMES);
    let held_out = part(&HELD_OUT_NAMES);
    let Some((images, labels)) = train else {
        let names: Vec<String> = arrays.into_iter().map(|(name, _)| name).collect();
        let what = format!(
            "holds no array named images, arr_0, x_train, train_images, x or data; its arrays are: {}",
            if names.is_empty() { "none".into() } else { names.join(", ") }
        );
        return Err(Error::file(path, what));
    };
    let train = from_arrays(path, images, labels, channels)?;
    let held_out = match held_out {
        None => None,
        Some((images, labels)) => Some(from_arrays(path, images, labels, channels)?),
    };
    Ok(Found { train, held_out, notes: Vec::new() })
}

fn from_arrays(path: &Path, images: npy::Array, labels: Option<npy::Array>, channels: Option<usize>) -> Result<Part> {
    let shape = images.shape.clone();
    let images = images.into_u8().map_err(|e| Error::file(path, e))?;
    let (extent, order) = extent_of(&shape, channels).map_err(|e| Error::file(path, e))?;
    let labels = match labels {
        None => None,
        Some(array) => Some(labels_from(&array, shape[0]).map_err(|e| Error::file(path, e))?),
    };
    let images = match order {
        PixelOrder::First if !images.is_empty() => {
            crate::layout::to_channels_last(&images, extent.channels, extent.size.h * extent.size.w)
        }
        _ => images,
    };
    Part::new(path, extent, images, labels)
}

fn labels_from(array: &npy::Array, images: usize) -> std::result::Result<Vec<u32>, String> {
    // Shape (n), or (n, 1).
    if array.shape.first() != Some(&images) || array.shape[1..].iter().any(|&d| d != 1) {
        return Err(format!("holds labels of shape {} for {images} images", npy::extent(&array.shape)));
    }
    let labels = array.to_i64()?;
    let convert = |(i, l)| u32::try_from(l).map_err(|_| format!("has label {l} at image {i}; labels are 0 and above"));
    labels.into_iter().enumerate().map(convert).collect()
}

/// Whether an array's images are `(h, w, c)` or `(c, h, w)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PixelOrder {
    Last,
    First,
}

/// Interprets the shape of an array: `(n, h, w)`, or four dimensions with the channels (1 to 4, or the number asked
/// for) last or second, trying last first.
fn extent_of(shape: &[usize], channels: Option<usize>) -> std::result::Result<(Extent, PixelOrder), String> {
    let is_channels = |c: usize| (1..=4).contains(&c) || Some(c) == channels;
    match *shape {
        [_, h, w] => Ok((Extent { size: Size { h, w }, channels: 1 }, PixelOrder::Last)),
        [_, h, w, c] if is_channels(c) => Ok((Extent { size: Size { h, w }, channels: c }, PixelOrder::Last)),
        [_, c, h, w] if is_channels(c) => Ok((Extent { size: Size { h, w }, channels: c }, PixelOrder::First)),
        _ => Err(format!(
            "holds an array of shape {}; images are count x rows x columns, with the channels (1 to 4) last or second",
            npy::extent(shape)
        )),
    }
}

/// A file's bytes, decompressed if they are gzip data.
fn contents(path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    if !bytes.starts_with(&[0x1F, 0x8B]) {
        return Ok(bytes);
    }
    let mut unpacked = Vec::new();
    flate2::read::MultiGzDecoder::new(&bytes[..])
        .read_to_end(&mut unpacked)
        .map_err(|e| Error::file(path, format!("is not whole gzip data ({e}); it is cut short or damaged")))?;
    Ok(unpacked)
}

/// The order in which training sees images: one endless sequence, a new permutation per epoch, of which each step takes
/// the next batch. A pure function of (seed, position); only the permutation last used is kept.
pub struct Order {
    seed: u64,
    images: usize,
    epoch: u64,
    permutation: Vec<u32>,
}

impl Order {
    /// The order of a data set of `images` images, at least one.
    pub fn new(seed: u64, images: usize) -> Self {
        assert!(images > 0 && images <= u32::MAX as usize, "an order of {images} images");
        Order { seed, images, epoch: 0, permutation: permutation(seed, 0, images) }
    }

    /// Indices of the images of step `step` (from 0). A batch may cross the end of an epoch, or of several.
    pub fn indices(&mut self, step: u32, batch: usize) -> Vec<usize> {
        let first = u64::from(step) * batch as u64;
        self.range(first..first + batch as u64)
    }

    /// Indices of the images at positions `places` of the endless sequence.
    pub fn range(&mut self, places: Range<u64>) -> Vec<usize> {
        places.map(|place| self.at(place)).collect()
    }

    fn at(&mut self, place: u64) -> usize {
        let (epoch, place) = (place / self.images as u64, (place % self.images as u64) as usize);
        if epoch != self.epoch {
            (self.epoch, self.permutation) = (epoch, permutation(self.seed, epoch, self.images));
        }
        self.permutation[place] as usize
    }
}

/// `0..n`, shuffled with the stream of `epoch`.
fn permutation(seed: u64, epoch: u64, n: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    let stream = Stream { seed, purpose: Purpose::Shuffle, step: (epoch >> 32) as u32, stream: epoch as u32 };
    order.shuffle(&mut stream.generator());
    order
}
