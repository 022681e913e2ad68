//! Encoded images, wherever they lie: files of a folder, members of archives, cells of tables. Their sets, classes and
//! extents, known from names and headers, and the decoding.
//!
//! If every image is in a subfolder, the folders of the first level are the classes, numbered in natural order (2
//! before 10). Folders named train, val and test are splits. The readers of the sources, each in a file of its own, say
//! what there is in a [`Listing`].

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::contents::{contents, free_memory, needs_room};
use super::parquet::Tables;
use super::picture::{self, Fault, Picture, unreadable};
use super::{Extent, Found, Labels, NoLabels, Part, Skipped, Survey, Target, fit, shortened};
use crate::config::{Background, OnBadImage};
use crate::error::{Error, Result};

/// Images decoded before the next are read: enough for all cores.
const AT_ONCE: usize = 512;

/// Where the bytes of an encoded image are.
#[derive(Clone, Debug)]
pub enum Place {
    /// In a file of its own, [`Entry::path`].
    File,
    /// `len` bytes of another file from `offset` on. If they are deflated, they become `size` bytes.
    Part { file: Arc<Path>, offset: u64, len: u64, deflated: Option<u64> },
    /// In a row of a table, by their numbers.
    Cell { table: usize, row: usize },
}

/// An encoded image.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What it is called where people are told of it.
    pub path: PathBuf,
    /// Its path below the root of the source, which tells its split and its class.
    pub name: PathBuf,
    pub place: Place,
    /// Its class, where the source has one for each image.
    pub label: Option<u32>,
}

/// Where the classes of a source's images are.
#[derive(Default)]
pub enum Classes {
    /// In a dataset.json, or else in their folders.
    #[default]
    Named,
    /// In the entries. `by` says what has told them; names by number, if there are any.
    Own { by: &'static str, names: Vec<String> },
    /// There are none: the file, and why.
    None(NoLabels),
}

/// What a source holds.
#[derive(Default)]
pub struct Listing {
    /// The images in their order.
    pub entries: Vec<Entry>,
    /// Their headers, where they are known already; otherwise empty.
    pub headers: Vec<std::result::Result<Extent, Fault>>,
    /// What would be images and cannot be.
    pub broken: Vec<(PathBuf, Fault)>,
    /// Folders of the first two levels of a folder.
    pub folders: Vec<PathBuf>,
    pub classes: Classes,
    /// The files dataset.json of an archive: their names, and what they hold. Those of a folder are read from it.
    pub archived: Option<HashMap<PathBuf, Vec<u8>>>,
    /// What cells are in.
    pub tables: Tables,
    pub notes: Vec<String>,
}

/// Images that are known by their headers.
pub struct Pictures {
    path: PathBuf,
    background: Background,
    train: Set,
    held_out: Option<Set>,
    tables: Tables,
    /// What told the classes, if it was neither dataset.json nor folders.
    by: Option<&'static str>,
    /// Names of the classes, if they have any.
    names: Vec<String>,
    /// Folders beside those of the classes that hold no images.
    empty: Vec<String>,
    notes: Vec<String>,
    /// What is left out, if bad images are skipped.
    skipped: Option<Vec<Skipped>>,
}

/// Images in the order of the source.
struct Set {
    root: PathBuf,
    entries: Vec<Entry>,
    extents: Vec<Extent>,
    labels: Labels,
}

impl Pictures {
    /// Sorts what a source holds into sets and classes, and reads the headers.
    pub fn open(path: &Path, listing: Listing, background: Background, bad: OnBadImage) -> Result<Pictures> {
        let Listing { entries, headers, mut broken, folders, classes, archived, tables, mut notes } = listing;
        let header = |entry: &Entry| match &entry.place {
            Place::File => picture::header(&entry.path, background),
            _ => picture::header_of(Cursor::new(entry.read()?), background),
        };
        let headers = if headers.len() == entries.len() { headers } else { entries.par_iter().map(header).collect() };
        let listed = entries.len() + broken.len();
        let (train, held_out) = splits(path, entries.into_iter().zip(headers).collect(), &mut notes);
        let mut open = |(root, images): Images| {
            let (mut entries, mut extents) = (Vec::new(), Vec::new());
            for (entry, header) in images {
                match header {
                    Ok(extent) => {
                        extents.push(extent);
                        entries.push(entry);
                    }
                    Err(fault) => broken.push((entry.path, fault)),
                }
            }
            let labels = Err(NoLabels::new(&root, "has no labels"));
            Set { root, entries, extents, labels }
        };
        let (train, held_out) = (open(train), held_out.map(open));
        let mut pictures = Pictures {
            path: path.into(),
            background,
            train,
            held_out,
            tables,
            by: None,
            names: Vec::new(),
            empty: Vec::new(),
            notes,
            skipped: (bad == OnBadImage::Skip).then(Vec::new),
        };
        if !broken.is_empty() && pictures.skipped.is_none() {
            // Some are broken further down; whoever mends a source wants to know all of them at once.
            broken.extend(pictures.broken_further_down());
            return Err(pictures.refusal(broken, listed));
        }
        pictures.skip(broken);
        if pictures.train.entries.is_empty() {
            let skipped = pictures.skipped.iter().flatten();
            let broken = skipped.map(|bad| (bad.path.clone(), bad.fault.clone())).collect();
            return Err(pictures.refusal(broken, listed));
        }
        match classes {
            Classes::Named => pictures.label(&folders, archived.as_ref())?,
            Classes::None(none) => {
                for set in pictures.sets_mut() {
                    set.labels = Err(none.clone());
                }
            }
            Classes::Own { by, names } => {
                for set in pictures.sets_mut() {
                    set.labels = set
                        .entries
                        .iter()
                        .map(|entry| {
                            entry.label.ok_or_else(|| NoLabels::new(&entry.path, format!("has no label in {by}")))
                        })
                        .collect();
                }
                pictures.names = names;
                pictures.by = Some(by);
            }
        }
        Ok(pictures)
    }

    /// What is known without decoding.
    pub fn survey(&self) -> Survey {
        let mut sizes = BTreeMap::new();
        for extent in self.extents() {
            *sizes.entry((extent.size.h, extent.size.w)).or_default() += 1;
        }
        Survey {
            images: self.extents().count(),
            sizes,
            channels: self.channels(),
            classes: super::class_names(self.names.clone(), self.sets().map(|set| &set.labels)),
            held_out: self.held_out.is_some(),
            fitted: false,
        }
    }

    /// The extent that all images get: that of `target`, and what it leaves open as the images have it.
    ///
    /// # Errors
    /// `Error::File` for images of several sizes, if none is asked for, and for channels that cannot be converted.
    pub fn extent(&self, target: Target) -> Result<Extent> {
        for (entry, extent) in self.entries().zip(self.extents()) {
            let channels = target.over(*extent).channels;
            fit::check_channels(extent.channels, channels).map_err(|e| Error::file(&entry.path, e))?;
            let (size, first) = (target.over(*extent).size, target.over(self.train.extents[0]).size);
            if size != first {
                let what = format!(
                    "is {size}, but {} is {first}; give all images one size, or fix one with --set image_size={first}",
                    self.train.entries[0].path.display()
                );
                return Err(Error::file(&entry.path, what));
            }
        }
        // If no number of channels is asked for, one colour image makes all of them colour.
        Ok(Extent { channels: target.channels.unwrap_or(self.channels()), ..target.over(self.train.extents[0]) })
    }

    /// Decodes every image and fits it to `target` at once, so that a folder of photographs need not fit into memory at
    /// full size.
    pub fn load(mut self, target: Target, classes: usize) -> Result<Found> {
        let to = self.extent(target)?;
        needs_room(&self.path, self.extents().count(), to, free_memory())?;
        let mut pixels = [Vec::new(), Vec::new()];
        let (mut broken, mut changes) = (Vec::new(), Changes::default());
        let mut kept = [Vec::new(), Vec::new()];
        for (which, set) in self.sets().enumerate() {
            for first in (0..set.entries.len()).step_by(AT_ONCE) {
                let range = first..set.entries.len().min(first + AT_ONCE);
                for (index, picture) in range.clone().zip(self.read(which, range, to)) {
                    match picture {
                        Ok(picture) => {
                            changes.count(&set.entries[index].path, &picture);
                            // Room for all once one of them has shown that their size is no invention of a header.
                            if pixels[which].is_empty() {
                                pixels[which].reserve_exact(set.entries.len() * to.len());
                            }
                            pixels[which].extend_from_slice(&picture.pixels);
                            kept[which].push(index);
                        }
                        Err(fault) => broken.push((set.entries[index].path.clone(), fault)),
                    }
                }
            }
        }
        if !broken.is_empty() && self.skipped.is_none() {
            let listed = self.entries().count();
            return Err(self.refusal(broken, listed));
        }
        self.skip(broken);
        let found: BTreeSet<_> = self.extents().map(|e| (e.size.h, e.size.w, e.channels)).collect();
        let mut notes = std::mem::take(&mut self.notes);
        notes.extend(changes.notes(self.background));
        notes.extend(super::fitted_note(kept.iter().map(Vec::len).sum(), &found, to));
        notes.extend(self.classes_note(classes));
        notes.extend(self.skipped_note());
        let part = |set: Set, pixels, kept: &[usize]| {
            let labels = set.labels.map(|labels| kept.iter().map(|&i| labels[i]).collect());
            Part::new(&set.root, to, pixels, labels)
        };
        let [of_train, of_held_out] = pixels;
        Ok(Found {
            train: part(self.train, of_train, &kept[0])?,
            held_out: self.held_out.map(|set| part(set, of_held_out, &kept[1])).transpose()?,
            names: self.names,
            notes,
            skipped: self.skipped.unwrap_or_default(),
        })
    }

    /// The images `range` of the training set (0) or the held-out set (1), decoded and fitted to `to`.
    pub fn read(&self, which: usize, range: Range<usize>, to: Extent) -> Vec<std::result::Result<Picture, Fault>> {
        self.each(which, range, |bytes| {
            let mut picture = picture::decode_bytes(&bytes, self.background)?;
            if picture.extent != to {
                picture.pixels = fit::fit(&picture.pixels, picture.extent, to);
            }
            Ok(picture)
        })
    }

    /// `work` on the bytes of each image, in parallel.
    fn each<T: Send>(
        &self,
        which: usize,
        range: Range<usize>,
        work: impl Fn(Vec<u8>) -> std::result::Result<T, Fault> + Sync,
    ) -> Vec<std::result::Result<T, Fault>> {
        let entries = &self.set(which).entries[range];
        let cell = |entry: &Entry| match entry.place {
            Place::Cell { table, row } => Some((table, row)),
            _ => None,
        };
        match entries.iter().map(cell).collect::<Option<Vec<_>>>() {
            // Tables are read from their beginning to their end, by one thread.
            Some(cells) => self.tables.read(&cells).into_par_iter().map(|bytes| bytes.and_then(&work)).collect(),
            None => entries.par_iter().map(|entry| entry.read().and_then(&work)).collect(),
        }
    }

    /// Number of images of the training set and of the held-out set, if there is one.
    pub fn lens(&self) -> (usize, Option<usize>) {
        (self.train.entries.len(), self.held_out.as_ref().map(|set| set.entries.len()))
    }

    /// The labels of a set.
    pub fn labels(&self, which: usize) -> &Labels {
        &self.set(which).labels
    }

    /// Names of the classes, if they have any.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The names of all images and what is known of their files, a line each: length and time of the last change.
    pub fn identity(&self) -> String {
        let of = |path: &Path| {
            let Ok(file) = std::fs::metadata(path) else { return "-".to_string() };
            let changed = file.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            format!("{} {}", file.len(), changed.map_or(0, |time| time.as_nanos()))
        };
        let mut files: HashMap<&Path, String> = HashMap::new();
        let mut lines = String::new();
        for (entry, extent) in self.entries().zip(self.extents()) {
            let place = match &entry.place {
                Place::File => of(&entry.path),
                Place::Part { file, offset, len, .. } => {
                    format!("{} {offset} {len}", files.entry(&**file).or_insert_with(|| of(file)))
                }
                Place::Cell { table, row } => {
                    let path = self.tables.path(*table);
                    format!("{} {row}", files.entry(path).or_insert_with(|| of(path)))
                }
            };
            lines += &format!("{} {:?} {extent} {place}\n", entry.name.display(), entry.label);
        }
        lines
    }

    /// Notes about the source alone, and about its classes.
    pub fn notes(&self, classes: usize) -> Vec<String> {
        self.notes.iter().cloned().chain(self.classes_note(classes)).collect()
    }

    /// What an image of a set is called.
    pub fn name(&self, which: usize, index: usize) -> &Path {
        &self.set(which).entries[index].path
    }

    /// The images that are left out so far.
    pub fn skipped(&self) -> Option<&[Skipped]> {
        self.skipped.as_deref()
    }

    /// What is laid under transparent images.
    pub fn background(&self) -> Background {
        self.background
    }

    fn set(&self, which: usize) -> &Set {
        if which == 0 { &self.train } else { self.held_out.as_ref().expect("there is a held-out set") }
    }

    fn sets(&self) -> impl Iterator<Item = &Set> {
        std::iter::once(&self.train).chain(&self.held_out)
    }

    fn sets_mut(&mut self) -> impl Iterator<Item = &mut Set> {
        std::iter::once(&mut self.train).chain(&mut self.held_out)
    }

    fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.sets().flat_map(|set| &set.entries)
    }

    fn extents(&self) -> impl Iterator<Item = &Extent> {
        self.sets().flat_map(|set| &set.extents)
    }

    fn channels(&self) -> usize {
        self.extents().map(|extent| extent.channels).max().unwrap_or(1)
    }

    fn skip(&mut self, broken: Vec<(PathBuf, Fault)>) {
        if let Some(skipped) = &mut self.skipped {
            skipped.extend(broken.into_iter().map(|(path, fault)| Skipped { path, fault }));
        }
    }

    /// The images whose headers promise what their files do not hold.
    fn broken_further_down(&self) -> Vec<(PathBuf, Fault)> {
        let mut broken = Vec::new();
        for (which, set) in self.sets().enumerate() {
            for first in (0..set.entries.len()).step_by(AT_ONCE) {
                let range = first..set.entries.len().min(first + AT_ONCE);
                let decoded =
                    self.each(which, range.clone(), |bytes| picture::decode_bytes(&bytes, self.background).map(drop));
                let read = range.zip(decoded);
                broken.extend(read.filter_map(|(i, read)| Some((set.entries[i].path.clone(), read.err()?))));
            }
        }
        broken
    }

    /// Images that cannot be used, in one sentence; `listed` is the number of all.
    pub fn refusal(&self, mut broken: Vec<(PathBuf, Fault)>, listed: usize) -> Error {
        broken.sort_by(|a, b| a.0.cmp(&b.0));
        if let [(path, fault)] = &broken[..] {
            return Error::file(path, &fault.sentence);
        }
        let list = self.named(broken.iter().map(|(path, fault)| (&**path, fault)));
        let what = format!(
            "{} of its {listed} images cannot be used; mend or remove {list}, or leave them out with --on-bad-image skip",
            broken.len()
        );
        Error::file(&self.path, what)
    }

    /// The first of some images with what is wrong with each.
    fn named<'a>(&self, broken: impl ExactSizeIterator<Item = (&'a Path, &'a Fault)>) -> String {
        const NAMED: usize = 8;
        let count = broken.len();
        let named = |(path, fault): (&Path, &Fault)| {
            format!("{} ({})", path.strip_prefix(&self.path).unwrap_or(path).display(), fault.short)
        };
        let mut list = broken.take(NAMED).map(named).collect::<Vec<_>>().join(", ");
        if count > NAMED {
            list += &format!(" and {} more", count - NAMED);
        }
        list
    }

    /// What was left out.
    pub fn skipped_note(&self) -> Option<String> {
        let skipped = self.skipped.as_deref().filter(|skipped| !skipped.is_empty())?;
        let (images, are, _) = plural(skipped.len());
        let list = self.named(skipped.iter().map(|bad| (&*bad.path, &bad.fault)));
        Some(format!("{} {images} cannot be used and {are} left out: {list}", skipped.len()))
    }

    /// Gives each image its class: by dataset.json, or by its folder.
    fn label(&mut self, folders: &[PathBuf], archived: Option<&HashMap<PathBuf, Vec<u8>>>) -> Result<()> {
        let path = self.path.clone();
        let by_file = |root: &Path| -> Result<Option<Listed>> {
            let file = root.join("dataset.json");
            match archived {
                None if file.is_file() => Ok(Listed::parse(&file, &contents(&file)?)),
                None => Ok(None),
                Some(archived) => {
                    let name = file.strip_prefix(&path).unwrap_or(&file);
                    Ok(archived.get(name).and_then(|bytes| Listed::parse(&file, bytes)))
                }
            }
        };
        let whole = by_file(&path)?;
        let mut all_listed = true;
        for set in self.sets_mut() {
            let own = if whole.is_some() { None } else { by_file(&set.root)? };
            let below = set.root.strip_prefix(&path).unwrap_or(Path::new("")).to_path_buf();
            match (&own, &whole) {
                (Some(listed), _) => set.labels = listed.labels(Path::new(""), &set.entries),
                (None, Some(listed)) => set.labels = listed.labels(&below, &set.entries),
                (None, None) => all_listed = false,
            }
        }
        if all_listed {
            return Ok(());
        }
        let classes: Vec<Vec<Option<OsString>>> =
            self.sets().map(|set| set.entries.iter().map(|entry| first_folder(&entry.name)).collect()).collect();
        let names: BTreeSet<&OsString> = classes.iter().flatten().flatten().collect();
        let mut names: Vec<&OsString> = names.into_iter().collect();
        names.sort_by(|a, b| natural(&a.to_string_lossy(), &b.to_string_lossy()));
        let number: HashMap<&OsString, u32> = names.iter().enumerate().map(|(k, name)| (*name, k as u32)).collect();
        let shown: Vec<String> = names.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        for (set, classes) in self.sets_mut().zip(&classes) {
            let of_images: Option<Vec<u32>> = classes.iter().map(|c| Some(number[c.as_ref()?])).collect();
            set.labels = of_images.ok_or_else(|| stray(set, classes, &shown));
        }
        if self.sets().all(|set| set.labels.is_ok()) {
            let holds_none = |folder: &&PathBuf| {
                self.sets().any(|set| folder.parent() == Some(&*set.root))
                    && !self.entries().any(|entry| entry.path.starts_with(folder))
            };
            self.empty = folders
                .iter()
                .filter(holds_none)
                .map(|f| f.file_name().unwrap_or_default())
                .map(|n| n.to_string_lossy().into_owned())
                .collect();
            self.names = shown;
        }
        Ok(())
    }

    /// Which folders are which classes, and whether they are used.
    fn classes_note(&self, classes: usize) -> Option<String> {
        let labels = self.train.labels.as_ref().ok()?;
        let unused = |count: usize| match classes {
            0 => format!("; not used: classes = 0; use --set classes={count}"),
            _ => String::new(),
        };
        let count = self.names.len();
        if count == 0 {
            let count = labels.iter().max().map_or(0, |&l| l as usize + 1);
            let by = self.by.unwrap_or("dataset.json");
            return Some(format!("labels 0 to {} by {by}{}", count.max(1) - 1, unused(count)));
        }
        // A single folder may be there for any reason.
        if count == 1 && classes == 0 {
            return None;
        }
        let named: Vec<String> = self.names.iter().enumerate().map(|(k, name)| format!("{k} {name}")).collect();
        let mut note = format!(
            "{count} class{} by {}: {}{}",
            if count == 1 { "" } else { "es" },
            self.by.unwrap_or("folder, in natural order"),
            shortened(&named),
            unused(count)
        );
        if !self.empty.is_empty() {
            note += &format!("; folders without images are no classes: {}", shortened(&self.empty));
        }
        Some(note)
    }
}

impl Entry {
    /// An image in a file of its own, below `root`.
    pub fn file(root: &Path, path: PathBuf) -> Entry {
        let name = path.strip_prefix(root).unwrap_or(&path).to_path_buf();
        Entry { path, name, place: Place::File, label: None }
    }

    /// The bytes of an image that is no cell of a table.
    pub fn read(&self) -> std::result::Result<Vec<u8>, Fault> {
        match &self.place {
            Place::File => std::fs::read(&self.path).map_err(unreadable),
            Place::Part { file, offset, len, deflated } => {
                let mut bytes = Vec::new();
                let mut opened = File::open(file).map_err(unreadable)?;
                opened.seek(SeekFrom::Start(*offset)).map_err(unreadable)?;
                opened.take(*len).read_to_end(&mut bytes).map_err(unreadable)?;
                if bytes.len() as u64 != *len {
                    return Err(Fault::broken("its archive ends before"));
                }
                let Some(size) = deflated else { return Ok(bytes) };
                let mut unpacked = Vec::new();
                let inflated = flate2::read::DeflateDecoder::new(&bytes[..]).take(*size).read_to_end(&mut unpacked);
                inflated.map_err(|e| Fault::broken(format!("it cannot be inflated: {e}")))?;
                if unpacked.len() as u64 != *size {
                    return Err(Fault::broken(format!("it inflates to {} bytes, not {size}", unpacked.len())));
                }
                Ok(unpacked)
            }
            Place::Cell { .. } => unreachable!("cells are read by their tables"),
        }
    }
}

/// Why the images of a set have no class.
fn stray(set: &Set, classes: &[Option<OsString>], names: &[String]) -> NoLabels {
    let strays = classes.iter().filter(|class| class.is_none()).count();
    let first = classes.iter().position(Option::is_none).unwrap_or(0);
    if names.is_empty() {
        return NoLabels::new(&set.root, "has no labels: its images are not in a folder for each class");
    }
    let more = if strays > 1 { format!(", as do {} others", strays - 1) } else { String::new() };
    let why = format!("lies beside the class folders {}{more}; move it into one of them or away", shortened(names));
    NoLabels::new(&set.entries[first].path, why)
}

/// The first folder of a name; `None` if it is in none.
fn first_folder(name: &Path) -> Option<OsString> {
    let mut parts = name.components();
    let first = parts.next()?.as_os_str().to_os_string();
    parts.next().map(|_| first)
}

/// Compares names with their numbers by value, so that 2 comes before 10. Names that differ only in leading zeros, and
/// all others, are in the order of their bytes.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut x, mut y) = (a.as_bytes(), b.as_bytes());
    let digits = |s: &[u8]| s.iter().take_while(|c| c.is_ascii_digit()).count();
    loop {
        match (digits(x), digits(y)) {
            (0, _) | (_, 0) => {
                let (Some(p), Some(q)) = (x.first(), y.first()) else { return x.len().cmp(&y.len()).then(a.cmp(b)) };
                if p != q {
                    return p.cmp(q);
                }
                (x, y) = (&x[1..], &y[1..]);
            }
            (m, n) => {
                let value = |s: &[u8]| -> Vec<u8> { s.iter().copied().skip_while(|&c| c == b'0').collect() };
                let (p, q) = (value(&x[..m]), value(&y[..n]));
                let order = p.len().cmp(&q.len()).then(p.cmp(&q));
                if order.is_ne() {
                    return order;
                }
                (x, y) = (&x[m..], &y[n..]);
            }
        }
    }
}

/// What was done to the images on the way, beside fitting.
#[derive(Default)]
pub struct Changes {
    transparent: usize,
    deep: usize,
    range: Option<(u16, u16)>,
    unfinished: Vec<String>,
}

impl Changes {
    pub fn count(&mut self, file: &Path, picture: &Picture) {
        self.transparent += usize::from(picture.transparent);
        if let Some((least, most)) = picture.deep {
            self.deep += 1;
            let (a, b) = self.range.unwrap_or((least, most));
            self.range = Some((a.min(least), b.max(most)));
        }
        if picture.unfinished {
            self.unfinished.push(file.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
    }

    /// A sentence for each kind of change.
    pub fn notes(&self, background: Background) -> Vec<String> {
        let mut notes = Vec::new();
        if self.transparent > 0 {
            let (images, are, have) = plural(self.transparent);
            notes.push(format!(
                "{} {images} {have} transparent parts and {are} laid over {background}; --set background=black, grey or #rrggbb for another",
                self.transparent
            ));
        }
        if let Some((least, most)) = self.range {
            let (images, are, _) = plural(self.deep);
            let mut note = format!(
                "{} {images} of 16 bits {are} reduced to 8, with values from {least} to {most} of 65535",
                self.deep
            );
            if let Some(bits) = [8, 10, 12, 14].into_iter().find(|bits| most < 1 << bits) {
                note += &format!(
                    ", all below {}, as of {bits} bits: they become all but black, {} of 255 at most; multiply them by {} before",
                    1 << bits,
                    (u32::from(most) + 128) / 257,
                    1 << (16 - bits)
                );
            }
            notes.push(note);
        }
        if let [first, rest @ ..] = &self.unfinished[..] {
            let (images, are, _) = plural(self.unfinished.len());
            let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            notes.push(format!(
                "{} progressive JPEG {images} {are} without the last scans and so blurred, perhaps cut short: {first}{more}",
                self.unfinished.len()
            ));
        }
        notes
    }
}

pub fn plural(count: usize) -> (&'static str, &'static str, &'static str) {
    if count == 1 { ("image", "is", "has") } else { ("images", "are", "have") }
}

/// What a folder of the first level is by its name.
pub fn role(name: &str) -> Option<usize> {
    const NAMES: [&[&str]; 3] = [&["train", "training"], &["val", "valid", "validation"], &["test", "testing"]];
    NAMES.iter().position(|names| names.contains(&name.to_lowercase().as_str()))
}

/// A folder and the images in it with their headers, known by their names below it.
type Images = (PathBuf, Vec<(Entry, std::result::Result<Extent, Fault>)>);

/// The images to train on, and those to hold out if the source is divided. It is if it has a folder `train` and one
/// `val` or `test`, or `train` alone; a folder `train` among others may as well be a class.
fn splits(
    source: &Path,
    images: Vec<(Entry, std::result::Result<Extent, Fault>)>,
    notes: &mut Vec<String>,
) -> (Images, Option<Images>) {
    let mut counts: BTreeMap<Option<OsString>, usize> = BTreeMap::new();
    for (entry, _) in &images {
        *counts.entry(first_folder(&entry.name)).or_default() += 1;
    }
    let named =
        |wanted: usize| counts.keys().flatten().find(|name| role(&name.to_string_lossy()) == Some(wanted)).cloned();
    let (train, val, test) = (named(0), named(1), named(2));
    let held_out = val.or(test);
    let (Some(train), true) = (train.clone(), held_out.is_some() || (train.is_some() && counts.len() == 1)) else {
        if let Some(train) = train {
            notes.push(format!(
                "{} is taken for a folder like the others, not for the training set, since there is no val or test beside it",
                source.join(train).display()
            ));
        }
        return ((source.to_path_buf(), images), None);
    };
    let (mut of_train, mut of_held_out) = (Vec::new(), Vec::new());
    for (mut entry, header) in images {
        let folder = first_folder(&entry.name);
        let to = match folder {
            Some(folder) if folder == train => &mut of_train,
            Some(folder) if Some(&folder) == held_out.as_ref() => &mut of_held_out,
            _ => continue,
        };
        entry.name = entry.name.components().skip(1).collect();
        to.push((entry, header));
    }
    let mut note = match &held_out {
        Some(held_out) => {
            format!("{} is trained on and {} held out", train.to_string_lossy(), held_out.to_string_lossy())
        }
        None => format!("{} is taken for the training set, with no val or test beside it", train.to_string_lossy()),
    };
    counts.remove(&Some(train.clone()));
    counts.retain(|folder, _| folder.is_none() || *folder != held_out);
    let left: Vec<String> = counts
        .iter()
        .map(|(group, &count)| {
            let (images, ..) = plural(count);
            match group {
                Some(group) => format!("{} ({count} {images})", group.to_string_lossy()),
                None => format!("{count} {images} beside them"),
            }
        })
        .collect();
    if !left.is_empty() {
        note += &format!("; left out: {}", shortened(&left));
    }
    notes.push(format!("{}: {note}", source.display()));
    ((source.join(train), of_train), held_out.map(|held_out| (source.join(held_out), of_held_out)))
}

/// The labels of a dataset.json, as EDM's and StyleGAN's tools write it: `{"labels": [["00000/img00000000.png", 6],
/// ...]}` or `{"labels": null}`.
struct Listed {
    path: PathBuf,
    /// The label of each file, or why it is none.
    labels: std::result::Result<HashMap<String, serde_json::Value>, String>,
}

impl Listed {
    /// `None` for another kind of file of this name.
    fn parse(path: &Path, bytes: &[u8]) -> Option<Listed> {
        let json: serde_json::Value = match serde_json::from_slice(bytes) {
            Ok(json) => json,
            Err(e) => {
                let labels = Err(format!("is not whole JSON: {e}"));
                return Some(Listed { path: path.into(), labels });
            }
        };
        let labels = match json.get("labels") {
            None => return None,
            Some(serde_json::Value::Null) => Err("has no labels: they are null".into()),
            Some(serde_json::Value::Array(entries)) => {
                let entry = |entry: &serde_json::Value| match entry.as_array().map(Vec::as_slice) {
                    Some([serde_json::Value::String(name), label]) => Ok((name.clone(), label.clone())),
                    _ => Err(format!("has the entry {} among its labels; [name, number] is expected", brief(entry))),
                };
                entries.iter().map(entry).collect()
            }
            Some(other) => Err(format!("has labels = {}; a list of [name, number] is expected", brief(other))),
        };
        Some(Listed { path: path.into(), labels })
    }

    /// The labels of `entries`, whose names are below `base`.
    fn labels(&self, base: &Path, entries: &[Entry]) -> Labels {
        let none = |why: String| NoLabels { path: self.path.clone(), why };
        let labels = self.labels.as_ref().map_err(|why| none(why.clone()))?;
        let name = |entry: &Entry| {
            let parts = base.components().chain(entry.name.components());
            parts.map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
        };
        let names: Vec<String> = entries.iter().map(name).collect();
        let missing: Vec<&String> = names.iter().filter(|name| !labels.contains_key(*name)).collect();
        if let [first, rest @ ..] = &missing[..] {
            let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            return Err(none(format!("has no label for {first}{more}")));
        }
        let number = |name: &String| {
            let whole = labels[name].as_f64().filter(|l| l.fract() == 0.0 && (0.0..4_294_967_295.0).contains(l));
            whole.map(|l| l as u32).ok_or_else(|| {
                let label = brief(&labels[name]);
                none(format!("has the label {label} for {name}; a class number is expected, 0 or above, no list"))
            })
        };
        names.iter().map(number).collect()
    }
}

/// JSON of at most some dozen letters.
fn brief(json: &serde_json::Value) -> String {
    let text = json.to_string();
    if text.chars().count() <= 40 { text } else { text.chars().take(37).chain("...".chars()).collect() }
}
