//! The file format .ddpm: images of one size as ready bytes, to be mapped into memory, with labels, names of classes
//! and a hash of each image. [`convert`] makes one of any source; docs/data.md has the format byte by byte.
//!
//! A conversion fills FILE.ddpm.part, in which an image is done when its bytes have the hash that the table says. So
//! one that was killed, or whose machine lost power, goes on with what is whole. It is renamed when all of it is there.
//!
//! Deliberately absent: an index, since all images have the same size; compression, since it would have to be undone
//! for every image of every step.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;
use twox_hash::{XxHash3_64, XxHash3_128};

use super::pictures::{Changes, Pictures};
use super::{Content, Extent, Found, Labels, NoLabels, Part, Pixels, Skipped, Source, Stored, Target};
use crate::config::{Config, Size};
use crate::error::{Error, Result, printable};
use crate::output;

/// What a file begins with.
pub const MAGIC: &[u8; 8] = b"ddpmdata";
/// What an unfinished one begins with.
pub const UNFINISHED: &[u8; 8] = b"ddpmpart";
const VERSION: u32 = 1;
/// Where the images begin.
const PIXELS: u64 = 4096;
/// Bytes of the header that the hash of the tables covers.
const COVERED: usize = 96;
const HEADER: usize = 112;
const HAS_LABELS: u32 = 1;
const HAS_HELD_OUT: u32 = 2;
/// Bytes of the text, at most: 65,536 names of classes.
const LONGEST_TEXT: u64 = 64 << 20;
/// Bytes of images that are decoded before they are written.
const AT_ONCE: usize = 8 << 20;

/// A file whose images are mapped into memory.
pub struct Mapped {
    path: PathBuf,
    map: Mmap,
    extent: Extent,
    /// The hash of each image.
    hashes: Vec<u64>,
}

/// Where everything is, by the number and the size of the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    extent: Extent,
    train: u64,
    held_out: Option<u64>,
    labels: bool,
    text: u64,
}

impl Layout {
    fn images(&self) -> u64 {
        self.train + self.held_out.unwrap_or(0)
    }

    fn image(&self, index: u64) -> u64 {
        PIXELS + index * self.extent.len() as u64
    }

    fn hashes_at(&self) -> u64 {
        self.image(self.images()).next_multiple_of(8)
    }

    fn labels_at(&self) -> u64 {
        self.hashes_at() + 8 * self.images()
    }

    fn text_at(&self) -> u64 {
        self.labels_at() + if self.labels { 4 * self.images() } else { 0 }
    }

    fn len(&self) -> u64 {
        self.text_at() + self.text
    }

    /// The header, without its hash.
    fn header(&self, magic: &[u8; 8]) -> [u8; COVERED] {
        let Extent { size: Size { h, w }, channels } = self.extent;
        let flags = if self.labels { HAS_LABELS } else { 0 } | if self.held_out.is_some() { HAS_HELD_OUT } else { 0 };
        let mut bytes = magic.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(self.train.to_le_bytes());
        bytes.extend(self.held_out.unwrap_or(0).to_le_bytes());
        bytes.extend([h as u32, w as u32, channels as u32, 0].iter().flat_map(|n| n.to_le_bytes()));
        let labels_at = if self.labels { self.labels_at() } else { 0 };
        bytes.extend(
            [self.hashes_at(), labels_at, self.text_at(), self.text, self.len()].iter().flat_map(|n| n.to_le_bytes()),
        );
        bytes.resize(COVERED, 0);
        bytes.try_into().expect("so many bytes")
    }

    /// What a header says, compared with itself and with the length of the file before anything follows from it.
    fn of(header: &[u8; COVERED], len: u64) -> std::result::Result<Layout, String> {
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        if u32_at(8) != VERSION {
            return Err(format!("is a .ddpm file of version {}; version {VERSION} is read", u32_at(8)));
        }
        let damaged = |what: &str| format!("has a header that {what}; it is damaged, so convert the source again");
        let [h, w, channels] = [32, 36, 40].map(|at| u32_at(at) as usize);
        let flags = u32_at(12);
        let layout = Layout {
            extent: Extent { size: Size { h, w }, channels },
            train: u64_at(16),
            held_out: (flags & HAS_HELD_OUT != 0).then(|| u64_at(24)),
            labels: flags & HAS_LABELS != 0,
            text: u64_at(72),
        };
        let image = h.checked_mul(w).and_then(|n| n.checked_mul(channels)).filter(|&n| n > 0);
        let images = layout.train.checked_add(layout.held_out.unwrap_or(0));
        let (Some(image), Some(images)) = (image, images.filter(|&n| n > 0 && n <= u64::from(u32::MAX))) else {
            return Err(damaged("claims no images, or more than there can be"));
        };
        if layout.train == 0 {
            return Err(damaged("claims no training images"));
        }
        if images
            .checked_mul(image as u64 + 12)
            .and_then(|n| n.checked_add(layout.text))
            .is_none_or(|n| n > len + 4 * images)
        {
            return Err(format!(
                "claims {images} images of {}, more than its {len} bytes hold; it is cut short or damaged, so convert the source again",
                layout.extent
            ));
        }
        if layout.text > LONGEST_TEXT || layout.header(MAGIC) != *header {
            return Err(damaged("contradicts itself"));
        }
        if layout.len() != len {
            return Err(format!(
                "has {len} bytes where its header says {}; it is cut short or damaged, so convert the source again",
                layout.len()
            ));
        }
        Ok(layout)
    }
}

/// What a file says of itself beside its images.
#[derive(Default, serde::Serialize, serde::Deserialize)]
struct Text {
    /// Names of the classes by number.
    classes: Vec<String>,
    /// Why there are no labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    no_labels: Option<String>,
}

/// The hash of an image: XXH3-64, with 1 for 0, which stands for an image that is not there yet.
pub fn hash_of(pixels: &[u8]) -> u64 {
    XxHash3_64::oneshot(pixels).max(1)
}

impl Mapped {
    /// Maps a file, whose header and tables are compared with their hash; images are when they are used
    /// ([`check`](Self::check)).
    pub(super) fn open(path: &Path) -> Result<Found> {
        let unreadable = |e: io::Error| Error::file(path, format!("cannot be read: {e}"));
        let refused = |what: &str| Error::file(path, what);
        let mut file = File::open(path).map_err(unreadable)?;
        let len = file.metadata().map_err(unreadable)?.len();
        let mut header = [0; HEADER];
        if len < PIXELS {
            return Err(refused("ends within its header; it is cut short, so convert the source again"));
        }
        file.read_exact(&mut header).map_err(unreadable)?;
        let covered: &[u8; COVERED] = header[..COVERED].try_into().expect("a part of it");
        let layout = Layout::of(covered, len).map_err(|e| Error::file(path, e))?;
        let mut tables = Vec::new();
        file.seek(SeekFrom::Start(layout.hashes_at())).map_err(unreadable)?;
        // As many as the layout says, which is no more than the file has.
        (&mut file).take(layout.len() - layout.hashes_at()).read_to_end(&mut tables).map_err(unreadable)?;
        let hash = u128::from_le_bytes(header[COVERED..].try_into().expect("16 bytes"));
        if tables.len() as u64 != layout.len() - layout.hashes_at() || hash_of_tables(covered, &tables) != hash {
            return Err(refused("has tables that do not match their hash; it is damaged, so convert the source again"));
        }
        let images = layout.images() as usize;
        let (hashes, rest) = tables.split_at(8 * images);
        let (labels, text) = rest.split_at((layout.text_at() - layout.labels_at()) as usize);
        let hashes = hashes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))).collect();
        let labels: Vec<u32> =
            labels.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
        let text: Text = serde_json::from_slice(text).map_err(|e| {
            Error::file(path, format!("has a text that cannot be understood ({e}); convert the source again"))
        })?;
        // SAFETY: the mapping is only read, as bytes, of which any value is good: nothing that keeps memory safe is
        // decided by them, as header and tables were copied above. Whoever writes into the file while it is mapped
        // changes pixels, which their hash tells before a step uses them; whoever cuts it short ends this process with
        // SIGBUS when it touches what is gone. This program does neither: it replaces files by renaming.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::file(path, format!("cannot be mapped: {e}")))?;
        if map.len() as u64 != len {
            return Err(refused("has changed while it was opened"));
        }
        // Images are read in the order of a permutation: what lies behind one is not wanted next.
        #[cfg(unix)]
        let _ = map.advise(memmap2::Advice::Random);
        let extent = layout.extent;
        let mapped = Arc::new(Mapped { path: path.into(), map, extent, hashes });
        let part = |range: Range<usize>| {
            let why = text.no_labels.clone().unwrap_or_else(|| "has no labels".into());
            let labels = if layout.labels { Ok(labels[range.clone()].to_vec()) } else { Err(NoLabels::new(path, why)) };
            let images = Stored::Ready(Pixels::Mapped(mapped.clone(), range));
            Part { source: path.into(), extent, images, labels }
        };
        let train = layout.train as usize;
        Ok(Found {
            train: part(0..train),
            held_out: layout.held_out.filter(|&n| n > 0).map(|_| part(train..images)),
            names: text.classes,
            notes: Vec::new(),
            skipped: Vec::new(),
        })
    }

    /// The bytes of images `range`, one after the other.
    pub fn images(&self, range: &Range<usize>) -> &[u8] {
        let len = self.extent.len();
        &self.map[PIXELS as usize..][range.start * len..range.end * len]
    }

    /// The hash of an image, as the file says.
    pub fn hash(&self, image: usize) -> u64 {
        self.hashes[image]
    }

    /// Asks the system for images, without waiting for them.
    pub fn want(&self, images: impl Iterator<Item = usize>) {
        #[cfg(unix)]
        for image in images {
            let len = self.extent.len();
            // Only advice: without it the images are read when they are touched.
            let _ = self.map.advise_range(memmap2::Advice::WillNeed, PIXELS as usize + image * len, len);
        }
        #[cfg(not(unix))]
        drop(images);
    }

    /// Reads images and compares them with their hashes.
    ///
    /// # Errors
    /// `Error::File` for an image that is not as it was written.
    pub fn check(&self, mut images: impl Iterator<Item = usize>) -> Result<()> {
        let wrong = images.find(|&i| hash_of(self.images(&(i..i + 1))) != self.hashes[i]);
        match wrong {
            None => Ok(()),
            Some(image) => {
                let what = format!(
                    "holds another image {image} than was written, by its hash; it is damaged, so convert the source again"
                );
                Err(Error::file(&self.path, what))
            }
        }
    }
}

fn hash_of_tables(header: &[u8; COVERED], tables: &[u8]) -> u128 {
    let mut hash = XxHash3_128::new();
    hash.write(header);
    hash.write(tables);
    hash.finish_128()
}

/// Receives the progress of a conversion.
pub trait Progress {
    /// A sentence for the user.
    fn say(&mut self, line: &str);
    /// `done` of `images` images are done; `before` of them were when it began.
    fn images(&mut self, before: usize, done: usize, images: usize);
}

/// What a conversion has made.
pub struct Converted {
    /// Images in the file.
    pub images: usize,
    /// Their size and channels.
    pub extent: Extent,
    /// Images that this call has decoded.
    pub decoded: usize,
    /// Bytes of the file.
    pub bytes: u64,
    /// Images that are left out.
    pub skipped: Vec<Skipped>,
}

/// What is converted: images that are decoded, or those of files.
enum Images {
    Arrays(Box<Found>),
    Pictures(Box<Pictures>),
}

impl Images {
    fn lens(&self) -> (usize, Option<usize>) {
        match self {
            Images::Arrays(found) => (found.train.len(), found.held_out.as_ref().map(Part::len)),
            Images::Pictures(pictures) => pictures.lens(),
        }
    }

    /// The labels of all, or why there are none.
    fn all_labels(&self) -> Labels {
        let of_both: Vec<&Labels> = match self {
            Images::Arrays(found) => {
                std::iter::once(&found.train).chain(&found.held_out).map(|part| &part.labels).collect()
            }
            Images::Pictures(pictures) => {
                (0..=usize::from(pictures.lens().1.is_some())).map(|which| pictures.labels(which)).collect()
            }
        };
        of_both.into_iter().try_fold(Vec::new(), |mut all, labels| {
            all.extend_from_slice(labels.as_ref().map_err(Clone::clone)?);
            Ok(all)
        })
    }

    fn names(&self) -> &[String] {
        match self {
            Images::Arrays(found) => &found.names,
            Images::Pictures(pictures) => pictures.names(),
        }
    }

    /// A hash of the source, as far as another source would make another file.
    fn identity(&self, to: Extent) -> u128 {
        let mut hash = XxHash3_128::new();
        hash.write(format!("{} {to}\n", env!("CARGO_PKG_VERSION")).as_bytes());
        match self {
            Images::Arrays(found) => {
                for part in found.parts() {
                    hash.write(format!("{} of {} {:?}\n", part.len(), part.extent, part.images.turned()).as_bytes());
                    match &part.images {
                        // Which are checked by their hashes when they are read.
                        Stored::Ready(Pixels::Mapped(file, images)) => {
                            images.clone().for_each(|image| hash.write(&file.hash(image).to_le_bytes()));
                        }
                        images => hash.write(images.bytes()),
                    }
                    match &part.labels {
                        Ok(labels) => labels.iter().for_each(|label| hash.write(&label.to_le_bytes())),
                        Err(_) => hash.write(b"no labels\n"),
                    }
                }
            }
            Images::Pictures(pictures) => {
                hash.write(format!("{}\n{}", pictures.background(), pictures.identity()).as_bytes());
            }
        }
        hash.finish_128()
    }
}

/// Converts a source into the file `out`, with the image size and the channels of `config` if it says any; `config` is
/// what the source was opened with, by [`Source::open_for`] if it may be larger than memory. A conversion that was
/// broken off goes on.
///
/// # Errors
/// `Error::File` for images that cannot be used, all of them named, unless they are skipped; for images of several
/// sizes without one that is asked for; for a file that exists, is being written or cannot be written.
pub fn convert(source: Source, config: &Config, out: &Path, progress: &mut dyn Progress) -> Result<Converted> {
    let written = |e: io::Error| unwritten(out, e);
    if out.exists() {
        return Err(Error::file(out, "exists; remove it, or give another name"));
    }
    let (images, to) = fitted(source, config, progress)?;
    let labels = images.all_labels();
    let text = Text { classes: images.names().to_vec(), no_labels: labels.as_ref().err().map(|none| none.why.clone()) };
    let text = serde_json::to_vec(&text).expect("texts are JSON");
    let (train, held_out) = images.lens();
    let layout = Layout {
        extent: to,
        train: train as u64,
        held_out: held_out.map(|n| n as u64),
        labels: labels.is_ok(),
        text: text.len() as u64,
    };
    let total = layout.images() as usize;
    if total > u32::MAX as usize || [to.size.h, to.size.w, to.channels].iter().any(|&n| n > u32::MAX as usize) {
        return Err(Error::file(&config.data, "holds more than 4294967295 images"));
    }

    let part_path = part_of(out);
    let mut file =
        File::options().read(true).write(true).create(true).truncate(false).open(&part_path).map_err(written)?;
    match file.try_lock() {
        Ok(()) | Err(TryLockError::Error(_)) => {} // not every file system has locks
        Err(TryLockError::WouldBlock) => {
            return Err(Error::file(&part_path, "is being written by another process"));
        }
    }
    let mut header = layout.header(UNFINISHED).to_vec();
    header.extend(images.identity(to).to_le_bytes());
    let mut hashes = begun(&mut file, &header, &layout).map_err(written)?;
    if hashes.is_none() && file.metadata().map_err(written)?.len() > 0 {
        progress.say(&format!("{} is of another source or size, and begins anew", part_path.display()));
    }
    if hashes.is_none() {
        file.set_len(0).map_err(written)?;
        file.set_len(layout.len()).map_err(written)?;
        write_at(&mut file, 0, &header).map_err(written)?;
    }
    let hashes = hashes.get_or_insert_with(|| vec![0; total]);
    let before = whole(&mut file, &layout, hashes).map_err(written)?;
    let (done, broken) = fill((&mut file, out), &layout, &images, hashes, before, progress)?;

    let bad: Vec<usize> = broken.iter().map(|(index, _)| *index).collect();
    let mut skipped = Vec::new();
    if let Images::Pictures(pictures) = &images {
        match pictures.skipped() {
            None if !broken.is_empty() => {
                return Err(pictures.refusal(broken.into_iter().map(|(_, bad)| (bad.path, bad.fault)).collect(), total));
            }
            None => {}
            Some(known) => skipped.extend_from_slice(known),
        }
    }
    skipped.extend(broken.into_iter().map(|(_, bad)| bad));
    let kept: Vec<usize> = (0..total).filter(|index| bad.binary_search(index).is_err()).collect();
    let train = kept.partition_point(|&index| index < layout.train as usize);
    if train == 0 {
        return Err(Error::file(&config.data, "holds no image that can be used"));
    }
    close_up(&mut file, &layout, &kept).map_err(written)?;
    let held_out = layout.held_out.map(|_| (kept.len() - train) as u64);
    let layout = Layout { train: train as u64, held_out, ..layout };
    let mut tables: Vec<u8> = kept.iter().flat_map(|&i| hashes[i].to_le_bytes()).collect();
    if let Ok(labels) = &labels {
        tables.extend(kept.iter().flat_map(|&i| labels[i].to_le_bytes()));
    }
    tables.extend(text);
    finish(&mut file, &layout, &tables)
        .and_then(|()| fs::rename(&part_path, out))
        .and_then(|()| output::sync_folder(output::parent(out)))
        .map_err(written)?;
    Ok(Converted { images: kept.len(), extent: to, decoded: done - before, bytes: layout.len(), skipped })
}

fn unwritten(out: &Path, e: io::Error) -> Error {
    Error::file(out, format!("cannot be written: {e}; run the command again to go on"))
}

/// The images of a source and what they become.
fn fitted(source: Source, config: &Config, progress: &mut dyn Progress) -> Result<(Images, Extent)> {
    let target = Target::of(config);
    match source.content {
        Content::Pictures(pictures) => {
            let to = pictures.extent(target)?;
            pictures.notes(1).iter().for_each(|note| progress.say(&printable(note)));
            Ok((Images::Pictures(pictures), to))
        }
        Content::Arrays(found) => {
            let to = target.over(found.train.extent);
            let fitted = found.parts().map(|part| part.fitted_note(to)).collect::<Result<Vec<_>>>()?;
            found.notes.iter().chain(fitted.iter().flatten()).for_each(|note| progress.say(&printable(note)));
            Ok((Images::Arrays(found), to))
        }
    }
}

/// Writes the images that have no hash yet, and their hashes, which stay 0 for those that cannot be used, into the file
/// that becomes `out`. Returns how many of all are done, of which `before` were, and those that cannot be used, in
/// their order.
fn fill(
    (file, out): (&mut File, &Path),
    layout: &Layout,
    images: &Images,
    hashes: &mut [u64],
    before: usize,
    progress: &mut dyn Progress,
) -> Result<(usize, Vec<(usize, Skipped)>)> {
    let (size, total) = (layout.extent.len(), hashes.len());
    let (mut done, mut broken, mut changes) = (before, Vec::new(), Changes::default());
    progress.images(before, done, total);
    let (train, held_out) = images.lens();
    for (which, first, len) in [(0, 0, train), (1, train, held_out.unwrap_or(0))] {
        for from in (0..len).step_by(chunk(layout)) {
            let range = from..len.min(from + chunk(layout));
            let at = first + from..first + range.end;
            let known = hashes[at.clone()].iter().filter(|&&hash| hash != 0).count();
            if known == range.len() {
                continue;
            }
            let begins = broken.len();
            let mut pixels = Vec::with_capacity(range.len() * size);
            match images {
                Images::Arrays(found) => {
                    let part = if which == 0 { &found.train } else { found.held_out.as_ref().expect("it has images") };
                    pixels.extend(part.read(range.clone(), layout.extent)?);
                }
                Images::Pictures(pictures) => {
                    for (index, picture) in range.clone().zip(pictures.read(which, range.clone(), layout.extent)) {
                        match picture {
                            Ok(picture) => {
                                changes.count(pictures.name(which, index), &picture);
                                pixels.extend_from_slice(&picture.pixels);
                            }
                            Err(fault) => {
                                let path = pictures.name(which, index).to_path_buf();
                                broken.push((first + index, Skipped { path, fault }));
                                pixels.resize(pixels.len() + size, 0);
                            }
                        }
                    }
                }
            }
            let mut new: Vec<u64> = pixels.par_chunks_exact(size).map(hash_of).collect();
            for (bad, _) in &broken[begins..] {
                new[bad - at.start] = 0;
            }
            write_at(file, layout.image(at.start as u64), &pixels).map_err(|e| unwritten(out, e))?;
            let bytes: Vec<u8> = new.iter().flat_map(|hash| hash.to_le_bytes()).collect();
            write_at(file, layout.hashes_at() + 8 * at.start as u64, &bytes).map_err(|e| unwritten(out, e))?;
            hashes[at].copy_from_slice(&new);
            done += range.len() - known;
            progress.images(before, done, total);
        }
    }
    if let Images::Pictures(pictures) = images {
        changes.notes(pictures.background()).iter().for_each(|note| progress.say(&printable(note)));
    }
    Ok((done, broken))
}

/// Images that are decoded, or compared with their hashes, at once.
fn chunk(layout: &Layout) -> usize {
    (AT_ONCE / layout.extent.len()).clamp(1, 512)
}

/// Writes the tables behind the images and then the header that makes the file whole.
fn finish(file: &mut File, layout: &Layout, tables: &[u8]) -> io::Result<()> {
    // Between the images and the tables are zeros.
    let end = layout.image(layout.images());
    write_at(file, end, &[0; 8][..(layout.hashes_at() - end) as usize])?;
    write_at(file, layout.hashes_at(), tables)?;
    file.sync_all()?;
    file.set_len(layout.len())?;
    let mut header = layout.header(MAGIC).to_vec();
    header.extend(hash_of_tables(&layout.header(MAGIC), tables).to_le_bytes());
    write_at(file, 0, &header)?;
    file.sync_all()
}

/// The name of an unfinished file.
pub fn part_of(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_os_string();
    name.push(".part");
    name.into()
}

fn write_at(file: &mut File, at: u64, bytes: &[u8]) -> io::Result<()> {
    file.seek(SeekFrom::Start(at))?;
    file.write_all(bytes)
}

/// The hashes that an unfinished file has, if it is of this conversion.
fn begun(file: &mut File, header: &[u8], layout: &Layout) -> io::Result<Option<Vec<u64>>> {
    if file.metadata()?.len() != layout.len() {
        return Ok(None);
    }
    let mut found = vec![0; header.len()];
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut found)?;
    if found != header {
        return Ok(None);
    }
    let mut hashes = vec![0; 8 * layout.images() as usize];
    file.seek(SeekFrom::Start(layout.hashes_at()))?;
    file.read_exact(&mut hashes)?;
    Ok(Some(hashes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes"))).collect()))
}

/// Forgets the hashes of images that are not there, and returns how many are.
fn whole(file: &mut File, layout: &Layout, hashes: &mut [u64]) -> io::Result<usize> {
    let (size, chunk) = (layout.extent.len(), chunk(layout));
    let mut done = 0;
    for (k, hashes) in hashes.chunks_mut(chunk).enumerate() {
        if hashes.iter().all(|&hash| hash == 0) {
            continue;
        }
        let mut pixels = vec![0; hashes.len() * size];
        file.seek(SeekFrom::Start(layout.image((k * chunk) as u64)))?;
        file.read_exact(&mut pixels)?;
        let there = pixels.par_chunks_exact(size).zip(hashes.par_iter_mut()).map(|(image, hash)| {
            if *hash != hash_of(image) {
                *hash = 0;
            }
            usize::from(*hash != 0)
        });
        done += there.sum::<usize>();
    }
    Ok(done)
}

/// Moves the images `kept` up to the beginning. Should this be broken off, those that have moved no longer match their
/// hashes and are decoded again.
fn close_up(file: &mut File, layout: &Layout, kept: &[usize]) -> io::Result<()> {
    let mut image = vec![0; layout.extent.len()];
    for (to, &from) in kept.iter().enumerate().filter(|(to, from)| to != *from) {
        file.seek(SeekFrom::Start(layout.image(from as u64)))?;
        file.read_exact(&mut image)?;
        write_at(file, layout.image(to as u64), &image)?;
    }
    Ok(())
}
