//! Data sets: reading images, splitting off held-out ones, and the order in which training sees them.
//!
//! [`load`] reads any source as unsigned bytes, channels last: `mnist` (built in), .npy and .npz, IDX files, CIFAR's
//! binary version and that for Python, folders and archives (.zip, .tar) of images, tables of them (.parquet), and
//! .ddpm. All come into memory but .ddpm, which [`convert`] makes of any other, a few images at a time, and whose
//! images are mapped. The content of a file decides its format, not its name. [`Source`] does it in two steps, so that
//! a recipe can be made from what a source holds before its images are decoded. Labels that are not asked for stop
//! nothing, whatever is wrong with them.
//!
//! Which images are held out depends only on their number, and the training order is a pure function of (seed, step),
//! so a resumed or repeated run sees the same images.
//!
//! Deliberately absent: a buffer in which images are shuffled, since any image can be read at any time; augmentation
//! beyond flips.

mod cifar;
mod contents;
mod ddpm;
mod fit;
mod folder;
mod idx;
mod jpeg;
pub mod npy;
mod order;
mod parquet;
mod pattern;
mod picture;
mod pictures;
mod thrift;
mod webdataset;
mod zipped;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rayon::prelude::*;
use twox_hash::XxHash3_128;

pub use ddpm::{Converted, Progress, convert, part_of};
pub use order::Order;
pub use parquet::panics_are_caught;

use crate::config::{Background, Config, Size};
use crate::error::{Error, Result, printable};
use crate::images::Images;
use crate::rng::philox;
use crate::tensor::Shape;
use crate::usage;
use contents::{Reading, contents, convert_them, free_memory, needs_room};
use ddpm::Mapped;
use pictures::Pictures;

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

/// Images, `(n, h, w, c)` bytes in memory or mapped, with labels where the source has them.
#[derive(Clone)]
pub struct Dataset {
    extent: Extent,
    /// All images of the source, shared by the training and the held-out set.
    images: Pixels,
    /// Indices in `images` of the images of this set.
    rows: Vec<u32>,
    labels: Option<Vec<u32>>,
}

/// Bytes of images, one after the other.
#[derive(Clone)]
enum Pixels {
    Memory(Arc<Vec<u8>>),
    /// Some images of a .ddpm file.
    Mapped(Arc<Mapped>, Range<usize>),
}

impl Pixels {
    fn bytes(&self) -> &[u8] {
        match self {
            Pixels::Memory(bytes) => bytes,
            Pixels::Mapped(file, images) => file.images(images),
        }
    }
}

/// An image that cannot be used and was left out.
#[derive(Clone, Debug)]
pub struct Skipped {
    /// What it is called.
    pub path: PathBuf,
    fault: picture::Fault,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", printable(&format!("{}: {}", self.path.display(), self.fault.short)))
    }
}

/// What a run trains on and what it validates on.
pub struct Data {
    /// Images to train on, at least one.
    pub train: Dataset,
    /// Images kept out of training; may be empty.
    pub held_out: Dataset,
    /// Names of the classes by number, where the source has none the numbers themselves; empty without labels.
    pub classes: Vec<String>,
    /// One sentence for the user about each thing done to the images (cropped, converted, left out).
    pub notes: Vec<String>,
    /// Images that were left out, since they cannot be used.
    pub skipped: Vec<Skipped>,
}

/// What a fingerprint over the hashes of images begins with.
const OVER_HASHES: &str = "images:";

impl Data {
    /// A hash of everything that training and validation see: size and channels, the images of both sets in their
    /// order, and their labels. 32 hexadecimal digits, those of XXH3-128.
    ///
    /// Stable: the same data have the same fingerprint on every machine and in every version, since checkpoints keep
    /// it. The hash is over, for the training set and then the held-out set, as little-endian u64: rows, columns,
    /// channels, number of images, and 1 if there are labels, else 0; the bytes of each image; each label as u32.
    ///
    /// Of a .ddpm file, whose images are not read for it, the hash is over their hashes, XXH3-64 as u64, in place of
    /// their bytes, and the digits stand behind `images:`.
    pub fn fingerprint(&self) -> String {
        self.fingerprint_over(self.train.is_mapped())
    }

    /// The fingerprint of the kind that `other` is, so that data can be compared with what they were made of.
    pub fn fingerprint_like(&self, other: &str) -> String {
        self.fingerprint_over(other.starts_with(OVER_HASHES))
    }

    /// Bytes of the images in memory; none of a file that is mapped.
    pub fn bytes_in_memory(&self) -> u64 {
        let shared = self.train.images.bytes().as_ptr() == self.held_out.images.bytes().as_ptr();
        let sets = [&self.train, &self.held_out];
        let own = sets[..if shared { 1 } else { 2 }].iter().filter(|set| !set.is_mapped());
        own.map(|set| set.images.bytes().len() as u64).sum()
    }

    /// How these images, which are those of `source`, can stay on disk: the end of a sentence.
    pub fn advice(&self, source: &str) -> String {
        convert_them(Path::new(source), self.train.extent)
    }

    fn fingerprint_over(&self, hashes: bool) -> String {
        let mut hash = XxHash3_128::new();
        for set in [&self.train, &self.held_out] {
            let Extent { size: Size { h, w }, channels } = set.extent;
            for number in [h, w, channels, set.len(), usize::from(set.labels.is_some())] {
                hash.write(&(number as u64).to_le_bytes());
            }
            for index in 0..set.len() {
                match hashes {
                    false => hash.write(set.image(index)),
                    true => hash.write(&set.hash(index).to_le_bytes()),
                }
            }
            for label in set.labels.iter().flatten() {
                hash.write(&label.to_le_bytes());
            }
        }
        format!("{}{:032x}", if hashes { OVER_HASHES } else { "" }, hash.finish_128())
    }
}

impl Dataset {
    /// From the bytes of whole images, `(n, h, w, c)`, and optionally a class for each.
    pub fn new(extent: Extent, images: Vec<u8>, labels: Option<Vec<u32>>) -> Self {
        assert!(images.len().is_multiple_of(extent.len()), "{} bytes are not images of {extent}", images.len());
        let n = images.len() / extent.len();
        assert!(labels.as_ref().is_none_or(|l| l.len() == n), "one label for each of {n} images");
        Dataset { extent, images: Pixels::Memory(Arc::new(images)), rows: (0..n as u32).collect(), labels }
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
        &self.images.bytes()[self.rows[index] as usize * self.extent.len()..][..self.extent.len()]
    }

    /// True if the images are those of a file that is mapped, which [`check`](Self::check) reads.
    pub fn is_mapped(&self) -> bool {
        matches!(self.images, Pixels::Mapped(..))
    }

    /// Reads the images at `rows` of [`images`](Self::images), if they are in a file, and compares them with their
    /// hashes; those of all `rows` are asked for at once.
    ///
    /// # Errors
    /// `Error::File` for an image that is not as it was written.
    pub fn check(&self, rows: &[u32]) -> Result<()> {
        let Pixels::Mapped(file, images) = &self.images else { return Ok(()) };
        let at = || rows.iter().map(|&row| images.start + row as usize);
        file.want(at());
        file.check(at())
    }

    /// [`check`](Self::check) of all images.
    ///
    /// # Errors
    /// As there.
    pub fn check_all(&self) -> Result<()> {
        match self.is_mapped() {
            true => self.rows.par_chunks(1024).try_for_each(|rows| self.check(rows)),
            false => Ok(()),
        }
    }

    /// The hash of one image, XXH3-64.
    fn hash(&self, index: usize) -> u64 {
        match &self.images {
            Pixels::Memory(_) => ddpm::hash_of(self.image(index)),
            Pixels::Mapped(file, images) => file.hash(images.start + self.rows[index] as usize),
        }
    }

    /// Classes of this set's images, if the source has them.
    pub fn labels(&self) -> Option<&[u32]> {
        self.labels.as_deref()
    }

    /// All images of the source, for the forward process; [`rows`](Self::rows) maps this set's images to them.
    pub fn images(&self) -> Images<'_> {
        let Extent { size: Size { h, w }, channels } = self.extent;
        let pixels = self.images.bytes();
        Images { pixels, shape: Shape::new(pixels.len() / self.extent.len(), h, w, channels) }
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
        let images = self.images.bytes();
        for (to, &row) in to.chunks_exact_mut(image).zip(rows) {
            to.copy_from_slice(&images[row as usize * image..][..image]);
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

/// What a source holds, found without decoding its images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Images, those of its own test set among them.
    pub images: usize,
    /// How many images have each size: (rows, columns) as a viewer shows them.
    pub sizes: BTreeMap<(usize, usize), usize>,
    /// Channels: of image files 1 if all are grey and 3 if one is in colour, of arrays their own number.
    pub channels: usize,
    /// Names of the classes by number, as in [`Data::classes`].
    pub classes: Vec<String>,
    /// True if it brings a test or validation set of its own, which is held out whole.
    pub held_out: bool,
    /// True if all images were fitted to one size already, which then is the size to train at.
    pub fitted: bool,
}

/// A source that has been opened: looked through, but of image files only the headers read.
pub struct Source {
    survey: Survey,
    content: Content,
}

enum Content {
    /// Images that are decoded, in memory or mapped.
    Arrays(Box<Found>),
    /// Encoded images.
    Pictures(Box<Pictures>),
}

impl Source {
    /// Opens `config.data`. Of the other settings it needs `channels`, by which it tells the layout of an array,
    /// `background` and `on_bad_image`.
    ///
    /// # Errors
    /// `Error::Usage` if no data is given; `Error::File` for data that is missing or damaged, and for compressed arrays
    /// that do not fit into memory.
    pub fn open(config: &Config) -> Result<Source> {
        Source::open_in(config, None)
    }

    /// The same to [`convert`] it into the file `out`: compressed arrays that do not fit into memory are unpacked into
    /// a file without a name beside `out`, which is gone with this process.
    ///
    /// # Errors
    /// As of [`open`](Self::open), without the last; `Error::File` if there is no room for that file.
    pub fn open_for(config: &Config, out: &Path) -> Result<Source> {
        Source::open_in(config, Some(crate::output::parent(out)))
    }

    fn open_in(config: &Config, scratch: Option<&Path>) -> Result<Source> {
        let content = open(config, scratch)?;
        let survey = match &content {
            Content::Arrays(found) => found.survey(),
            Content::Pictures(pictures) => pictures.survey(),
        };
        Ok(Source { survey, content })
    }

    /// What it holds.
    pub fn survey(&self) -> &Survey {
        &self.survey
    }

    /// Reads the images. If the config leaves the image size or the channels open, they are set to those of the data;
    /// otherwise images of another size are cropped and resized and other channels converted, which [`Data::notes`]
    /// reports.
    ///
    /// # Errors
    /// `Error::File` for data that is damaged, does not fit the settings or does not fit into memory.
    pub fn load(self, config: &mut Config) -> Result<Data> {
        let target = Target::of(config);
        let arrays = matches!(self.content, Content::Arrays(_));
        let Found { mut train, mut held_out, names, mut notes, skipped } = match self.content {
            Content::Arrays(found) => *found,
            Content::Pictures(pictures) => pictures.load(target, config.model.classes)?,
        };
        let to = target.over(train.extent);
        let mut more = 0;
        for part in std::iter::once(&train).chain(&held_out) {
            notes.extend(part.fitted_note(to)?);
            more += part.images_to_allocate(to);
        }
        needs_room(Path::new(&config.data), more, to, free_memory())?;
        for part in std::iter::once(&mut train).chain(&mut held_out) {
            part.fit(to)?;
        }
        (config.model.image_size, config.model.channels) = (to.size, to.channels);
        let classes = config.model.classes;
        for part in std::iter::once(&train).chain(&held_out) {
            part.check_classes(classes)?;
        }
        notes.extend(train.empty_classes_note(classes, &names));
        let names = class_names(names, std::iter::once(&train).chain(&held_out).map(|part| &part.labels));
        // A folder has said so. Of the built-in digits it is known, and every run without settings would say it.
        if arrays && classes == 0 && names.len() > 1 && config.data != "mnist" {
            notes.push(format!("{0} classes, not used: classes = 0; use --set classes={0}", names.len()));
        }
        let (train, held_out) = match held_out {
            Some(held_out) => (train.into_dataset(), held_out.into_dataset()),
            None => train.split(config.held_out)?,
        };
        // They name files and classes.
        let notes = notes.iter().map(|note| printable(note)).collect();
        Ok(Data { train, held_out, classes: names, notes, skipped })
    }
}

/// One image file, fitted to `to`: (h, w, c).
///
/// # Errors
/// `Error::File` for a file that is missing, damaged or no such image.
pub fn read_picture(path: &Path, to: Extent, background: Background) -> Result<Vec<u8>> {
    let picture = picture::decode(path, background).map_err(|fault| Error::file(path, fault.sentence))?;
    fit::check_channels(picture.extent.channels, to.channels).map_err(|e| Error::file(path, e))?;
    Ok(fit::fit(&picture.pixels, picture.extent, to))
}

/// A mask from an image file of the size of `to`: true where it is lighter than half, (h, w).
///
/// # Errors
/// `Error::File` for a file that is missing, damaged, no such image or of another size.
pub fn read_mask(path: &Path, to: Extent) -> Result<Vec<bool>> {
    let picture = picture::decode(path, Background([255; 3])).map_err(|fault| Error::file(path, fault.sentence))?;
    if picture.extent.size != to.size {
        let what = format!("is {}, but the model's images are {}: a mask has their size", picture.extent.size, to.size);
        return Err(Error::file(path, what));
    }
    Ok(fit::fit(&picture.pixels, picture.extent, Extent { channels: 1, ..to }).iter().map(|&v| v >= 128).collect())
}

/// [`Source::open`], then [`Source::load`].
///
/// # Errors
/// Those of both.
pub fn load(config: &mut Config) -> Result<Data> {
    Source::open(config)?.load(config)
}

/// The requested size and channels; `None`: those of the data.
#[derive(Clone, Copy)]
struct Target {
    size: Option<Size>,
    channels: Option<usize>,
}

impl Target {
    fn of(config: &Config) -> Target {
        let (size, channels) = (config.model.image_size, config.model.channels);
        Target { size: (size != Size::DATA).then_some(size), channels: (channels > 0).then_some(channels) }
    }

    fn over(self, own: Extent) -> Extent {
        Extent { size: self.size.unwrap_or(own.size), channels: self.channels.unwrap_or(own.channels) }
    }
}

/// What a source holds, its images read.
struct Found {
    train: Part,
    /// The test set of the source, if it has one.
    held_out: Option<Part>,
    /// Names of the classes by number, if the source has names.
    names: Vec<String>,
    notes: Vec<String>,
    /// Images that were left out.
    skipped: Vec<Skipped>,
}

impl Found {
    fn survey(&self) -> Survey {
        let mut sizes = BTreeMap::new();
        for part in self.parts() {
            *sizes.entry((part.extent.size.h, part.extent.size.w)).or_default() += part.len();
        }
        Survey {
            images: self.parts().map(Part::len).sum(),
            sizes,
            channels: self.train.extent.channels,
            classes: class_names(self.names.clone(), self.parts().map(|part| &part.labels)),
            held_out: self.held_out.is_some(),
            fitted: matches!(self.train.images, Stored::Ready(Pixels::Mapped(..))),
        }
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.train).chain(&self.held_out)
    }
}

/// `names`, and where labels go beyond them the numbers. Empty if the images of a set have no usable labels, or
/// labels so high that they are hardly classes.
fn class_names<'a>(names: Vec<String>, labels: impl Iterator<Item = &'a Labels>) -> Vec<String> {
    const MOST: usize = 65_536;
    let mut count = names.len();
    for labels in labels {
        let Ok(labels) = labels else { return Vec::new() };
        count = count.max(labels.iter().max().map_or(0, |&l| l as usize + 1));
    }
    if count > MOST {
        return Vec::new();
    }
    let numbers = (names.len()..count).map(|k| k.to_string());
    names.into_iter().chain(numbers).collect()
}

/// Images of one size, not yet a [`Dataset`], with the file that errors name.
struct Part {
    source: PathBuf,
    extent: Extent,
    images: Stored,
    labels: Labels,
}

/// Images as a source holds them.
enum Stored {
    /// As they are used.
    Ready(Pixels),
    /// The elements of an array. With `turned` each image is the transpose of what is used: a matrix of so many rows
    /// and columns, such as one row for each channel.
    Array { elements: Bytes, turned: Option<(usize, usize)> },
}

impl Stored {
    fn bytes(&self) -> &[u8] {
        match self {
            Stored::Ready(pixels) => pixels.bytes(),
            Stored::Array { elements, .. } => elements,
        }
    }

    fn turned(&self) -> Option<(usize, usize)> {
        match self {
            Stored::Ready(_) => None,
            Stored::Array { turned, .. } => *turned,
        }
    }

    /// Images that are in memory, and as they are used.
    fn into_pixels(self) -> Pixels {
        match self {
            Stored::Ready(pixels) => pixels,
            Stored::Array { .. } => unreachable!("images are fitted before they are used"),
        }
    }
}

/// The class of each image, or why there is none: the start of a sentence, said only if classes are asked for.
type Labels = std::result::Result<Vec<u32>, NoLabels>;

/// A file or folder, and what it lacks.
#[derive(Clone)]
struct NoLabels {
    path: PathBuf,
    why: String,
}

impl NoLabels {
    fn new(path: &Path, why: impl fmt::Display) -> NoLabels {
        NoLabels { path: path.to_path_buf(), why: why.to_string() }
    }
}

impl Part {
    fn new(source: &Path, extent: Extent, images: Vec<u8>, labels: Labels) -> Result<Part> {
        Part::of(source, extent, Stored::Ready(Pixels::Memory(Arc::new(images))), labels)
    }

    fn of(source: &Path, extent: Extent, images: Stored, labels: Labels) -> Result<Part> {
        let len = images.bytes().len();
        // In this order: where there are no elements, an extent may be anything.
        if len == 0 || extent.is_empty() {
            return Err(Error::file(source, "holds no images"));
        }
        assert!(len.is_multiple_of(extent.len()), "{len} bytes are not images of {extent}");
        if len / extent.len() > u32::MAX as usize {
            return Err(Error::file(source, "holds more than 4294967295 images"));
        }
        Ok(Part { source: source.to_path_buf(), extent, images, labels })
    }

    fn len(&self) -> usize {
        self.images.bytes().len() / self.extent.len()
    }

    /// A note that says how all images become `to`; none if they are it already.
    fn fitted_note(&self, to: Extent) -> Result<Option<String>> {
        let Extent { size: Size { h, w }, channels } = self.extent;
        fit::check_channels(channels, to.channels).map_err(|e| Error::file(&self.source, e))?;
        Ok(fitted_note(self.len(), &BTreeSet::from([(h, w, channels)]), to))
    }

    /// The images `range` as they are used: cropped, resized and converted to `to`, one after the other.
    fn read(&self, range: Range<usize>, to: Extent) -> Result<Vec<u8>> {
        if let Stored::Ready(Pixels::Mapped(file, images)) = &self.images {
            let at = images.start + range.start..images.start + range.end;
            file.want(at.clone());
            file.check(at)?;
        }
        let (from, turned) = (self.extent, self.images.turned());
        let mut fitted = vec![0; range.len() * to.len()];
        let convert = |(image, place): (&[u8], &mut [u8])| {
            let upright = turned.map(|(rows, columns)| crate::layout::to_channels_last(image, rows, columns));
            let image = upright.as_deref().unwrap_or(image);
            if from == to { place.copy_from_slice(image) } else { place.copy_from_slice(&fit::fit(image, from, to)) }
        };
        let images = &self.images.bytes()[range.start * from.len()..range.end * from.len()];
        images.par_chunks_exact(from.len()).zip(fitted.par_chunks_exact_mut(to.len())).for_each(convert);
        Ok(fitted)
    }

    /// Of how many images [`fit`](Self::fit) makes copies in memory.
    fn images_to_allocate(&self, to: Extent) -> usize {
        let is_there = match &self.images {
            Stored::Ready(_) => true,
            // What was unpacked into memory is taken as it is; what is mapped is never anybody's alone.
            Stored::Array { elements, turned } => turned.is_none() && elements.is_unique(),
        };
        if is_there && self.extent == to { 0 } else { self.len() }
    }

    /// Brings all images into memory as they are used, if they are not there yet or differ from `to`.
    fn fit(&mut self, to: Extent) -> Result<()> {
        const AT_ONCE: usize = 512;
        let pixels = match &mut self.images {
            Stored::Ready(_) if self.extent == to => return Ok(()),
            Stored::Array { elements, turned: None } if self.extent == to => Vec::from(std::mem::take(elements)),
            _ => {
                let mut pixels = Vec::with_capacity(self.len() * to.len());
                for first in (0..self.len()).step_by(AT_ONCE) {
                    pixels.extend(self.read(first..self.len().min(first + AT_ONCE), to)?);
                }
                pixels
            }
        };
        (self.images, self.extent) = (Stored::Ready(Pixels::Memory(Arc::new(pixels))), to);
        Ok(())
    }

    fn check_classes(&self, classes: usize) -> Result<()> {
        if classes == 0 {
            return Ok(());
        }
        let labels = self.labels.as_ref().map_err(|none| {
            let what =
                format!("{}; classes = {classes} needs a class for each image, classes = 0 needs none", none.why);
            Error::file(&none.path, what)
        })?;
        match labels.iter().enumerate().find(|&(_, &l)| l as usize >= classes) {
            None => Ok(()),
            Some((index, label)) => {
                let what = format!(
                    "has label {label} at image {index}, but classes = {classes} allows 0 to {}; use --set classes={} or more",
                    classes - 1,
                    labels.iter().max().map_or(0, |&l| u64::from(l) + 1)
                );
                Err(Error::file(&self.source, what))
            }
        }
    }

    /// A note about classes that no training image has.
    fn empty_classes_note(&self, classes: usize, names: &[String]) -> Option<String> {
        let used: BTreeSet<u32> = self.labels.iter().flatten().copied().collect();
        if classes <= used.len() {
            return None;
        }
        let named = |k: u32| names.get(k as usize).map_or(k.to_string(), |name| format!("{k} {name}"));
        if classes - used.len() < used.len() {
            let empty: Vec<String> = (0..classes as u32).filter(|k| !used.contains(k)).map(named).collect();
            let have = if empty.len() == 1 { "has" } else { "have" };
            return Some(format!(
                "classes = {classes}, but {} {have} no images to train on: {}",
                empty.len(),
                shortened(&empty)
            ));
        }
        let have = if used.len() == 1 { "has" } else { "have" };
        let used: Vec<String> = used.into_iter().map(named).collect();
        Some(format!("classes = {classes}, but only {} {have} images: {}", used.len(), shortened(&used)))
    }

    fn into_dataset(self) -> Dataset {
        let rows = (0..self.len() as u32).collect();
        Dataset { extent: self.extent, images: self.images.into_pixels(), rows, labels: self.labels.ok() }
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
        let by_hash = by_hash(n, [0x6865_6C64, 0x6F75_7421]);
        let mut held_out = by_hash[..count].to_vec();
        let mut train = by_hash[count..].to_vec();
        held_out.sort_unstable();
        train.sort_unstable();
        let images = self.images.into_pixels();
        let pick = |rows: Vec<u32>| {
            let labels = self.labels.as_ref().ok().map(|l| rows.iter().map(|&i| l[i as usize]).collect());
            Dataset { extent: self.extent, images: images.clone(), rows, labels }
        };
        Ok((pick(train), pick(held_out)))
    }
}

/// `count` of `n` indices, or all if there are no more, ascending. Always the same ones: those of the smallest
/// hashes.
///
/// At even distances they would be of some classes only where classes come in turn, as those of samples do, and the
/// first ones where files are sorted.
pub fn choose(n: usize, count: usize) -> Vec<usize> {
    // The key spells "a choice"; nothing else draws from it.
    let by_hash = by_hash(n, [0x6120_6368, 0x6F69_6365]);
    let mut chosen: Vec<usize> = by_hash.into_iter().take(count).map(|i| i as usize).collect();
    chosen.sort_unstable();
    chosen
}

/// `n` indices in the order of their hashes under `key`.
fn by_hash(n: usize, key: [u32; 2]) -> Vec<u32> {
    let mut indices: Vec<u32> = (0..n as u32).collect();
    indices.sort_by_key(|&i| (philox([i, 0, 0, 0], key)[0], i));
    indices
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

fn arrays(found: Found) -> Content {
    Content::Arrays(Box::new(found))
}

fn open(config: &Config, scratch: Option<&Path>) -> Result<Content> {
    let source = &config.data;
    if source.is_empty() {
        usage!("no data is given; use --data mnist (built in) or --data PATH");
    }
    let path = Path::new(source);
    let reading = Reading { source: path, channels: Target::of(config).channels, scratch };
    if source == "mnist" {
        #[cfg(feature = "mnist")]
        return read_npz(path, Bytes::from_static(include_bytes!("mnist-10k.npz")), &reading).map(arrays);
        #[cfg(not(feature = "mnist"))]
        usage!("the digits of data = mnist are not in this build: build it with the feature mnist, or use --data PATH");
    }
    let pictures = |listing| {
        let opened = Pictures::open(path, listing, config.background, config.on_bad_image)?;
        Ok(Content::Pictures(Box::new(opened)))
    };
    let shards = pattern::expand(path)?;
    if let Some(first) = shards.first() {
        return match start_of(first)? {
            start if start.starts_with(parquet::MAGIC) => pictures(parquet::open(path, shards, config.background)?),
            start if webdataset::is_tar(&start) => pictures(webdataset::open(path, &shards)?),
            _ => Err(Error::file(first, "is neither a .parquet nor a .tar file, of which a pattern names several")),
        };
    }
    let kind = std::fs::metadata(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    if kind.is_dir() {
        if let Some(found) = read_binary_set(path, &reading)? {
            return Ok(arrays(found));
        }
        let folder = folder::list(path)?;
        if folder.has_images() {
            return pictures(folder.into_listing(path));
        }
        if !folder.tables.is_empty() {
            return pictures(parquet::open(path, folder.tables, config.background)?);
        }
        if !folder.shards.is_empty() {
            return pictures(webdataset::open(path, &folder.shards)?);
        }
        return Err(Error::file(path, folder.nothing_to_read()));
    }
    if !kind.is_file() {
        return Err(Error::file(path, "is neither a file nor a folder"));
    }
    // What may be larger than memory is told by how it begins.
    let start = start_of(path)?;
    if start.starts_with(ddpm::MAGIC) {
        return Mapped::open(path).map(arrays);
    }
    if start.starts_with(parquet::MAGIC) {
        return pictures(parquet::open(path, vec![path.into()], config.background)?);
    }
    if webdataset::is_tar(&start) {
        return pictures(webdataset::open(path, &[path.into()])?);
    }
    if zipped::is_zip(&start)
        && let Some(listing) = zipped::open(path)?
    {
        return pictures(listing);
    }
    read_one(path, &reading).map(arrays)
}

/// True if there is something at the place of `data`, which may be a pattern.
pub fn is_there(data: &str) -> bool {
    data == "mnist" || Path::new(data).exists() || pattern::expand(Path::new(data)).is_ok_and(|files| !files.is_empty())
}

/// The first bytes of a file, 512 if it has as many.
fn start_of(path: &Path) -> Result<Vec<u8>> {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(512).read_to_end(&mut start));
    read.map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    Ok(start)
}

/// The name of a member of an archive, below its root whatever it says.
fn safe_name(name: &Path) -> PathBuf {
    let normal =
        |part: Component<'_>| if let Component::Normal(part) = part { Some(part.to_os_string()) } else { None };
    name.components().filter_map(normal).collect()
}

/// True for members of archives that other programs leave in them.
fn litter(name: &Path) -> bool {
    name.components().any(|part| {
        let part = part.as_os_str().to_string_lossy();
        part.starts_with('.') || folder::LITTER.contains(&&*part) || folder::LITTER_FILES.contains(&&*part)
    })
}

/// A folder of the binary files of CIFAR or the MNIST family; `None` if it is neither.
fn read_binary_set(path: &Path, reading: &Reading<'_>) -> Result<Option<Found>> {
    let unreadable = |e: std::io::Error| Error::file(path, format!("cannot be read: {e}"));
    let entries = std::fs::read_dir(path).map_err(unreadable)?.collect::<std::io::Result<Vec<_>>>();
    let mut files: Vec<PathBuf> =
        entries.map_err(unreadable)?.into_iter().map(|e| e.path()).filter(|p| p.is_file()).collect();
    files.sort();
    if let Some(found) = cifar::read_folder(path, &files)? {
        return Ok(Some(found));
    }
    idx::read_folder(path, &files, reading)
}

fn read_one(path: &Path, reading: &Reading<'_>) -> Result<Found> {
    let bytes = reading.contents(path)?;
    if bytes.is_empty() {
        return Err(Error::file(path, "is empty"));
    }
    if bytes.starts_with(b"PK") {
        return read_npz(path, bytes, reading);
    }
    if bytes.starts_with(b"\x93NUMPY") {
        let array = npy::Array::parse("the file", bytes).map_err(|e| Error::file(path, e))?;
        let labels = Err(NoLabels::new(path, "is a .npy file, which has no labels; put both into a .npz"));
        let train = from_array(path, array, labels, reading)?;
        let notes = array_note(&train).into_iter().collect();
        return Ok(Found { train, held_out: None, names: Vec::new(), notes, skipped: Vec::new() });
    }
    if idx::is_idx(&bytes) {
        return idx::read_file(path, bytes, reading);
    }
    Err(Error::file(path, foreign(path, &bytes)))
}

/// What a file is that cannot be read, and what to do with it.
fn foreign(path: &Path, bytes: &[u8]) -> String {
    let wanted = "give a .npy, .npz, IDX, .parquet, .tar, .zip or .ddpm file, CIFAR's folder or a folder of images";
    // It was compressed, or it would have been read.
    if webdataset::is_tar(bytes) {
        return "is a compressed tar archive; unpack it with gunzip and give the .tar".into();
    }
    if bytes.starts_with(ddpm::UNFINISHED) {
        return "is an unfinished conversion; run its ddpm-cuda data again to go on".into();
    }
    if let Some(name) = cifar::batch_name(bytes) {
        return format!("may be a part of {name}; give its folder {}", path.parent().unwrap_or(path).display());
    }
    if cifar::is_pickle(bytes) {
        let folder = path.parent().unwrap_or(path).display();
        return format!("is a Python pickle; if it is a part of CIFAR, give its folder {folder}");
    }
    if let Some(kind) = picture::kind(bytes) {
        return format!("is a single {kind} image; give the folder that holds the images");
    }
    format!("is of no kind that is read; {wanted}")
}

/// Names of images and of their labels in .npz files.
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

fn read_npz(path: &Path, bytes: Bytes, reading: &Reading<'_>) -> Result<Found> {
    let broken = |e: String| Error::file(path, e);
    let mut archive = npy::Archive::open(bytes).map_err(broken)?;
    let names = archive.names();
    let there = |name: &str| names.iter().any(|n| n == name);
    let listed = if names.is_empty() { "none".into() } else { shortened(&names) };
    let Some(&(images, labels)) = TRAIN_NAMES.iter().find(|(images, _)| there(images)) else {
        let tried = |names: [&str; 6]| {
            let [first @ .., last] = names;
            format!("{} or {last}", first.join(", "))
        };
        let what = format!(
            "holds no array named {} (for their labels: {}); its arrays are: {listed}",
            tried(TRAIN_NAMES.map(|(images, _)| images)),
            tried(TRAIN_NAMES.map(|(_, labels)| labels))
        );
        return Err(Error::file(path, what));
    };
    let mut part = |images: &str, labels: &str| -> Result<Part> {
        let array = archive.array_by(images, reading).map_err(broken)?;
        let count = array.shape.first().copied().unwrap_or(0);
        let labels = if there(labels) {
            archive.array_by(labels, reading).and_then(|l| labels_from(&l, count)).map_err(|e| NoLabels::new(path, e))
        } else {
            let why =
                format!("holds no labels, which go by the name of {labels} beside {images}; its arrays are: {listed}");
            Err(NoLabels::new(path, why))
        };
        from_array(path, array, labels, reading)
    };
    let train = part(images, labels)?;
    let held_out = HELD_OUT_NAMES.iter().find(|(images, _)| there(images));
    let held_out = held_out.map(|&(images, labels)| part(images, labels)).transpose()?;
    let notes = array_note(&train).into_iter().collect();
    Ok(Found { train, held_out, names: Vec::new(), notes, skipped: Vec::new() })
}

/// What the shape of an array leaves open. Nothing says what a fourth channel is, so it is neither dropped nor laid
/// over a background; and a single colour image has the shape of many narrow grey ones.
fn array_note(part: &Part) -> Option<String> {
    let Extent { size: Size { h, w }, channels } = part.extent;
    let n = part.len();
    match channels {
        4 => Some(
            "the images have 4 channels and are learnt as they are; if the fourth is transparency, so are the colours hidden under it: lay the images over a background first, as 3 channels".into(),
        ),
        1 if (w == 3 || w == 4) && h > 4 => Some(format!(
            "the array is read as {n} grey images of {h}x{w}; if it is a single colour image, save it in the shape 1x{n}x{h}x{w}"
        )),
        _ => None,
    }
}

fn from_array(path: &Path, images: npy::Array, labels: Labels, reading: &Reading<'_>) -> Result<Part> {
    let shape = images.shape.clone();
    let elements = images.into_u8().map_err(|e| Error::file(path, e))?;
    let (extent, turned) = extent_of(&shape, reading.channels).map_err(|e| Error::file(path, e))?;
    Part::of(path, extent, Stored::Array { elements, turned }, labels)
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

/// Interprets the shape of an array: `(n, h, w)`, or four dimensions with the channels (1 to 4, or the number asked
/// for) last or second, trying last first. Those with the channels second are to be turned.
fn extent_of(
    shape: &[usize],
    channels: Option<usize>,
) -> std::result::Result<(Extent, Option<(usize, usize)>), String> {
    let is_channels = |c: usize| (1..=4).contains(&c) || Some(c) == channels;
    match *shape {
        [_, h, w] => Ok((Extent { size: Size { h, w }, channels: 1 }, None)),
        [_, h, w, c] if is_channels(c) => Ok((Extent { size: Size { h, w }, channels: c }, None)),
        // Saturating, since an extent may be anything where another is 0.
        [_, c, h, w] if is_channels(c) => {
            Ok((Extent { size: Size { h, w }, channels: c }, Some((c, h.saturating_mul(w)))))
        }
        _ => Err(format!(
            "holds an array of shape {}; images are count x rows x columns, with the channels (1 to 4) last or second",
            npy::extent(shape)
        )),
    }
}
