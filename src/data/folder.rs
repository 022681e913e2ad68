//! Reading a folder of PNG and JPEG files, including subfolders. If every image is in a subfolder, the folders of the
//! first level are the classes, numbered in natural order (2 before 10). Folders named train, val and test are splits.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::picture::{self, Fault, Picture};
use super::{Extent, Found, Labels, NoLabels, Part, Survey, Target, check_room, contents, fit, free_memory, shortened};
use crate::config::{Background, Config};
use crate::error::{Error, Result};

/// A folder whose images are known by their headers.
pub struct Folder {
    path: PathBuf,
    background: Background,
    train: Set,
    held_out: Option<Set>,
    /// Names of the classes, if they are folders.
    names: Vec<String>,
    /// Folders beside those of the classes that hold no images.
    empty: Vec<String>,
    notes: Vec<String>,
}

/// Images in the order of their paths.
struct Set {
    root: PathBuf,
    files: Vec<PathBuf>,
    extents: Vec<Extent>,
    labels: Labels,
}

impl Folder {
    /// Lists the images and reads their headers.
    pub fn open(path: &Path, background: Background) -> Result<Folder> {
        let listing = list(path)?;
        if listing.files.is_empty() && listing.broken.is_empty() {
            return Err(Error::file(path, listing.nothing_to_read()));
        }
        let mut notes = listing.notes(path);
        let (train, held_out) = splits(path, &listing.files, &mut notes);
        let mut broken = listing.broken;
        let mut open = |(root, files): (PathBuf, Vec<PathBuf>)| {
            let headers: Vec<_> = files.par_iter().map(|file| picture::header(file, background)).collect();
            let mut extents = Vec::new();
            for (file, header) in files.iter().zip(headers) {
                match header {
                    Ok(extent) => extents.push(extent),
                    Err(fault) => broken.push((file.clone(), fault)),
                }
            }
            let labels = Err(NoLabels::new(&root, "has no labels"));
            Set { root, files, extents, labels }
        };
        let (train, held_out) = (open(train), held_out.map(open));
        let mut folder =
            Folder { path: path.into(), background, train, held_out, names: Vec::new(), empty: Vec::new(), notes };
        if !broken.is_empty() {
            // Some are broken further down; whoever mends a folder wants to know all of them at once.
            let known: BTreeSet<PathBuf> = broken.iter().map(|(file, _)| file.clone()).collect();
            let others: Vec<&PathBuf> = folder.files().filter(|file| !known.contains(*file)).collect();
            let read = |file: &&PathBuf| Some(((*file).clone(), picture::decode(file, background).err()?));
            broken.extend(others.par_iter().filter_map(read).collect::<Vec<_>>());
            return Err(folder.refusal(broken));
        }
        folder.label(&listing.folders)?;
        Ok(folder)
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
        }
    }

    /// Decodes every image and fits it to `target` at once, so that a folder of photographs need not fit into memory at
    /// full size.
    pub fn load(mut self, target: Target, classes: usize) -> Result<Found> {
        for (file, extent) in self.files().zip(self.extents()) {
            let channels = target.over(*extent).channels;
            fit::check_channels(extent.channels, channels).map_err(|e| Error::file(file, e))?;
            let (size, first) = (target.over(*extent).size, target.over(self.train.extents[0]).size);
            if size != first {
                let what = format!(
                    "is {size}, but {} is {first}; give all images one size, or fix one with --set image_size={first}",
                    self.train.files[0].display()
                );
                return Err(Error::file(file, what));
            }
        }
        // If no number of channels is asked for, one colour image makes all of them colour.
        let to = Extent { channels: target.channels.unwrap_or(self.channels()), ..target.over(self.train.extents[0]) };
        let bytes = (self.extents().count() as u64).saturating_mul(to.len() as u64);
        check_room(&format!("{} images of {to}", self.extents().count()), bytes, free_memory())
            .map_err(|e| Error::file(&self.path, e))?;

        let background = self.background;
        let read = |file: &PathBuf| -> std::result::Result<Picture, Fault> {
            let mut picture = picture::decode(file, background)?;
            if picture.extent != to {
                picture.pixels = fit::fit(&picture.pixels, picture.extent, to);
            }
            Ok(picture)
        };
        let (mut broken, mut changes) = (Vec::new(), Changes::default());
        let mut pixels = |set: &Set| {
            let pictures: Vec<_> = set.files.par_iter().map(read).collect();
            // A header may promise an image that its file does not hold.
            let whole = pictures.iter().filter(|picture| picture.is_ok()).count();
            let mut pixels = Vec::with_capacity(whole * to.len());
            for (file, picture) in set.files.iter().zip(pictures) {
                match picture {
                    Ok(picture) => {
                        changes.count(file, &picture);
                        pixels.extend_from_slice(&picture.pixels);
                    }
                    Err(fault) => broken.push((file.clone(), fault)),
                }
            }
            pixels
        };
        let train = pixels(&self.train);
        let held_out = self.held_out.as_ref().map(pixels);
        if !broken.is_empty() {
            return Err(self.refusal(broken));
        }
        let found: BTreeSet<_> = self.extents().map(|e| (e.size.h, e.size.w, e.channels)).collect();
        let mut notes = std::mem::take(&mut self.notes);
        notes.extend(changes.notes(background));
        notes.extend(super::fitted_note(self.extents().count(), &found, to));
        notes.extend(self.classes_note(classes));
        let part = |set: Set, pixels| Part::new(&set.root, to, pixels, set.labels);
        Ok(Found {
            train: part(self.train, train)?,
            held_out: match (self.held_out, held_out) {
                (Some(set), Some(pixels)) => Some(part(set, pixels)?),
                _ => None,
            },
            names: self.names,
            notes,
        })
    }

    fn sets(&self) -> impl Iterator<Item = &Set> {
        std::iter::once(&self.train).chain(&self.held_out)
    }

    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.sets().flat_map(|set| &set.files)
    }

    fn extents(&self) -> impl Iterator<Item = &Extent> {
        self.sets().flat_map(|set| &set.extents)
    }

    fn channels(&self) -> usize {
        self.extents().map(|extent| extent.channels).max().unwrap_or(1)
    }

    /// All files that cannot be used, in one sentence.
    fn refusal(&self, mut broken: Vec<(PathBuf, Fault)>) -> Error {
        const NAMED: usize = 8;
        broken.sort_by(|a, b| a.0.cmp(&b.0));
        if let [(file, fault)] = &broken[..] {
            return Error::file(file, &fault.sentence);
        }
        let named = |(file, fault): &(PathBuf, Fault)| {
            format!("{} ({})", file.strip_prefix(&self.path).unwrap_or(file).display(), fault.short)
        };
        let mut list = broken.iter().take(NAMED).map(named).collect::<Vec<_>>().join(", ");
        if broken.len() > NAMED {
            list += &format!(" and {} more", broken.len() - NAMED);
        }
        let known: BTreeSet<&PathBuf> = self.files().chain(broken.iter().map(|(file, _)| file)).collect();
        let what = format!("{} of its {} images cannot be used; mend or remove {list}", broken.len(), known.len());
        Error::file(&self.path, what)
    }

    /// Gives each image its class: by dataset.json, or by its folder.
    fn label(&mut self, folders: &[PathBuf]) -> Result<()> {
        let by_file = |root: &Path| Listed::read(&root.join("dataset.json"));
        let whole = by_file(&self.path)?;
        let mut all_listed = true;
        for set in std::iter::once(&mut self.train).chain(&mut self.held_out) {
            let (own, base) = match &whole {
                Some(_) => (None, &self.path),
                None => (by_file(&set.root)?, &set.root),
            };
            match own.as_ref().or(whole.as_ref()) {
                Some(listed) => set.labels = listed.labels(base, &set.files),
                None => all_listed = false,
            }
        }
        if all_listed {
            return Ok(());
        }
        let classes: Vec<Vec<Option<OsString>>> =
            self.sets().map(|set| set.files.iter().map(|file| first_folder(&set.root, file)).collect()).collect();
        let names: BTreeSet<&OsString> = classes.iter().flatten().flatten().collect();
        let mut names: Vec<&OsString> = names.into_iter().collect();
        names.sort_by(|a, b| natural(&a.to_string_lossy(), &b.to_string_lossy()));
        let number: HashMap<&OsString, u32> = names.iter().enumerate().map(|(k, name)| (*name, k as u32)).collect();
        let shown: Vec<String> = names.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        for (set, classes) in std::iter::once(&mut self.train).chain(&mut self.held_out).zip(&classes) {
            let of_files: Option<Vec<u32>> = classes.iter().map(|c| Some(number[c.as_ref()?])).collect();
            set.labels = of_files.ok_or_else(|| stray(set, classes, &shown));
        }
        if self.sets().all(|set| set.labels.is_ok()) {
            let holds_none = |folder: &&PathBuf| {
                self.sets().any(|set| folder.parent() == Some(&*set.root))
                    && !self.files().any(|file| file.starts_with(folder))
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
            return Some(format!("labels 0 to {} by dataset.json{}", count.max(1) - 1, unused(count)));
        }
        // A single folder may be there for any reason.
        if count == 1 && classes == 0 {
            return None;
        }
        let named: Vec<String> = self.names.iter().enumerate().map(|(k, name)| format!("{k} {name}")).collect();
        let mut note = format!(
            "{count} class{} by folder, in natural order: {}{}",
            if count == 1 { "" } else { "es" },
            shortened(&named),
            unused(count)
        );
        if !self.empty.is_empty() {
            note += &format!("; folders without images are no classes: {}", shortened(&self.empty));
        }
        Some(note)
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
    NoLabels::new(&set.files[first], why)
}

/// The first folder of a file below `root`; `None` if it lies in `root` itself.
fn first_folder(root: &Path, file: &Path) -> Option<OsString> {
    let mut parts = file.strip_prefix(root).ok()?.components();
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
struct Changes {
    transparent: usize,
    deep: usize,
    range: Option<(u16, u16)>,
    unfinished: Vec<String>,
}

impl Changes {
    fn count(&mut self, file: &Path, picture: &Picture) {
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

    fn notes(&self, background: Background) -> Vec<String> {
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

fn plural(count: usize) -> (&'static str, &'static str, &'static str) {
    if count == 1 { ("image", "is", "has") } else { ("images", "are", "have") }
}

/// What a folder holds.
#[derive(Default)]
struct Listing {
    /// PNG and JPEG files in the order of their paths.
    files: Vec<PathBuf>,
    broken: Vec<(PathBuf, Fault)>,
    /// Number of other files by their ending.
    others: BTreeMap<String, usize>,
    /// Folders of the first two levels.
    folders: Vec<PathBuf>,
    /// Folders of runs, which are passed over.
    runs: Vec<PathBuf>,
}

/// Endings of the files that are read.
const READ: [&str; 6] = ["png", "jpg", "jpeg", "jfif", "jpe", "pjpeg"];

/// Endings of pictures that are not read.
const PICTURES: [&str; 26] = [
    "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2", "j2k", "svg", "ico", "tga", "ppm",
    "pgm", "pbm", "pnm", "psd", "exr", "hdr", "dng", "cr2", "nef", "arw", "dcm",
];

/// Folders and files that other programs leave everywhere, hidden ones aside.
const LITTER: [&str; 6] =
    ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"];
const LITTER_FILES: [&str; 3] = ["Thumbs.db", "desktop.ini", "ehthumbs.db"];

impl Listing {
    /// `2 .webp, 1 .gif and 3 other files`.
    fn others_by_kind(&self) -> String {
        let (pictures, rest): (Vec<_>, Vec<_>) =
            self.others.iter().partition(|(ending, _)| PICTURES.contains(&ending.as_str()));
        let mut items: Vec<String> = pictures.iter().map(|(ending, n)| format!("{n} .{ending}")).collect();
        let rest: usize = rest.iter().map(|(_, n)| **n).sum();
        let other = if items.is_empty() { "" } else { "other " };
        if rest > 0 {
            items.push(format!("{rest} {other}file{}", if rest == 1 { "" } else { "s" }));
        }
        match &items[..] {
            [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
            _ => items.concat(),
        }
    }

    fn has_other_pictures(&self) -> bool {
        self.others.keys().any(|ending| PICTURES.contains(&ending.as_str()))
    }

    fn notes(&self, folder: &Path) -> Vec<String> {
        let mut notes = Vec::new();
        let count: usize = self.others.values().sum();
        if count > 0 {
            let (_, are, _) = plural(count);
            let convert = if self.has_other_pictures() { "; convert them to PNG or JPEG to use them" } else { "" };
            let what = if self.has_other_pictures() { "" } else { "neither PNG nor JPEG and " };
            let others = self.others_by_kind();
            notes.push(format!("{others} in {} {are} {what}left out{convert}", folder.display()));
        }
        if let [first, rest @ ..] = &self.runs[..] {
            let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
            notes.push(format!("images in {}{more} are passed over, being those of a training run", first.display()));
        }
        notes
    }

    /// Why there is nothing to read.
    fn nothing_to_read(&self) -> String {
        let held = |endings: &[&'static str]| endings.iter().copied().find(|e| self.others.contains_key(*e));
        let what = "holds no PNG or JPEG file, no data_batch_1.bin and no train-images-idx3-ubyte";
        if self.has_other_pictures() {
            return format!("holds no PNG or JPEG file, but {}; convert them to PNG or JPEG", self.others_by_kind());
        }
        if let Some(run) = self.runs.first() {
            let run = run.display();
            return format!("{what}; {run} is passed over, being of a training run, whose samples are no data");
        }
        if let Some(ending) = held(&["npz", "npy"]) {
            return format!("{what}; give the .{ending} file in it by its own name");
        }
        if let Some(ending) = held(&["zip", "tar", "gz", "tgz"]) {
            return format!("{what}; unpack the .{ending} file in it");
        }
        match self.others.values().sum::<usize>() {
            0 => format!("{what}; it holds no files at all"),
            _ => format!("{what}; it holds {}", self.others_by_kind()),
        }
    }
}

/// Lists a folder with its subfolders. Hidden files and folders are ignored, folders of runs passed over.
fn list(folder: &Path) -> Result<Listing> {
    let mut listing = Listing::default();
    let own_run = is_run(folder);
    let mut runs = Vec::new();
    let wanted = |entry: &walkdir::DirEntry| {
        if entry.depth() == 0 {
            return true;
        }
        let name = entry.file_name().to_string_lossy();
        if !entry.file_type().is_dir() {
            return !name.starts_with('.') && !LITTER_FILES.contains(&&*name);
        }
        let of_run =
            (own_run && entry.depth() == 1 && (name == "samples" || name == "checkpoints")) || is_run(entry.path());
        if of_run {
            runs.push(entry.path().to_path_buf());
        }
        !of_run && !name.starts_with('.') && !LITTER.contains(&&*name)
    };
    let walk = walkdir::WalkDir::new(folder).follow_links(true).sort_by_file_name();
    for entry in walk.into_iter().filter_entry(wanted) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(e) => {
                let path = e.path().unwrap_or(folder);
                let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
                let dangling =
                    path.is_symlink() && e.io_error().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound);
                match (e.loop_ancestor(), e.io_error()) {
                    _ if dangling && hidden => {}
                    _ if dangling && READ.contains(&&*ending(path)) => {
                        let sentence = "is a link to a file that does not exist".into();
                        listing.broken.push((path.into(), Fault { sentence, short: "a link to nothing".into() }));
                    }
                    _ if dangling => *listing.others.entry(ending(path)).or_default() += 1,
                    (Some(ancestor), _) => {
                        let what = format!("is a link to {}, which it is in", ancestor.display());
                        return Err(Error::file(path, what));
                    }
                    (None, Some(io)) => return Err(Error::file(path, format!("cannot be read: {io}"))),
                    (None, None) => return Err(Error::file(path, format!("cannot be read: {e}"))),
                }
                continue;
            }
        };
        if entry.file_type().is_dir() && (1..=2).contains(&entry.depth()) {
            listing.folders.push(entry.path().to_path_buf());
        }
        if !entry.file_type().is_file() {
            continue;
        }
        let ending = ending(entry.path());
        // Pictures under another picture's name, or under none, are what their first bytes say.
        let doubtful = ending.is_empty() || PICTURES.contains(&&*ending);
        if READ.contains(&&*ending) || (doubtful && picture::is_readable(entry.path())) {
            listing.files.push(entry.into_path());
        } else {
            *listing.others.entry(ending).or_default() += 1;
        }
    }
    // What lies above a run only is no class without images.
    listing.folders.retain(|folder| !runs.iter().any(|run| run.starts_with(folder)));
    listing.runs = runs;
    Ok(listing)
}

/// The part of a name behind its last dot, in small letters.
fn ending(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase()
}

/// True for the folder of a run of this program: its settings are there, and samples or checkpoints.
fn is_run(folder: &Path) -> bool {
    if !folder.join("samples").is_dir() && !folder.join("checkpoints").is_dir() {
        return false;
    }
    std::fs::read_to_string(folder.join("config.toml")).is_ok_and(|text| Config::is_of_run(&text))
}

/// What a folder of the first level is by its name.
fn role(name: &str) -> Option<usize> {
    const NAMES: [&[&str]; 3] = [&["train", "training"], &["val", "valid", "validation"], &["test", "testing"]];
    NAMES.iter().position(|names| names.contains(&name.to_lowercase().as_str()))
}

/// A folder and the images in it.
type Files = (PathBuf, Vec<PathBuf>);

/// The images to train on, and those to hold out if the folder is divided. It is if it has a folder `train` and one
/// `val` or `test`, or `train` alone; a folder `train` among others may as well be a class.
fn splits(folder: &Path, files: &[PathBuf], notes: &mut Vec<String>) -> (Files, Option<Files>) {
    let mut groups: BTreeMap<Option<OsString>, Vec<PathBuf>> = BTreeMap::new();
    for file in files {
        groups.entry(first_folder(folder, file)).or_default().push(file.clone());
    }
    let named =
        |wanted: usize| groups.keys().flatten().find(|name| role(&name.to_string_lossy()) == Some(wanted)).cloned();
    let (train, val, test) = (named(0), named(1), named(2));
    let held_out = val.or(test);
    let (Some(train), true) = (train.clone(), held_out.is_some() || (train.is_some() && groups.len() == 1)) else {
        if let Some(train) = train {
            notes.push(format!(
                "{} is taken for a folder like the others, not for the training set, since there is no val or test beside it",
                folder.join(train).display()
            ));
        }
        return ((folder.to_path_buf(), files.to_vec()), None);
    };
    let mut take = |name: OsString| {
        let root = folder.join(&name);
        let files = groups.remove(&Some(name)).unwrap_or_default();
        (root, files)
    };
    let (train, held_out) = (take(train), held_out.map(&mut take));
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut note = match &held_out {
        Some(held_out) => format!("{} is trained on and {} held out", name(&train.0), name(&held_out.0)),
        None => format!("{} is taken for the training set, with no val or test beside it", name(&train.0)),
    };
    let left: Vec<String> = groups
        .iter()
        .map(|(group, files)| {
            let (images, ..) = plural(files.len());
            match group {
                Some(group) => format!("{} ({} {images})", group.to_string_lossy(), files.len()),
                None => format!("{} {images} beside them", files.len()),
            }
        })
        .collect();
    if !left.is_empty() {
        note += &format!("; left out: {}", shortened(&left));
    }
    notes.push(format!("{}: {note}", folder.display()));
    (train, held_out)
}

/// The labels of a dataset.json, as EDM's and StyleGAN's tools write it: `{"labels": [["00000/img00000000.png", 6],
/// ...]}` or `{"labels": null}`.
struct Listed {
    path: PathBuf,
    /// The label of each file, or why it is none.
    labels: std::result::Result<HashMap<String, serde_json::Value>, String>,
}

impl Listed {
    /// `None` if there is no such file, or it is another kind of file of this name.
    fn read(path: &Path) -> Result<Option<Listed>> {
        if !path.is_file() {
            return Ok(None);
        }
        let json: serde_json::Value = match serde_json::from_slice(&contents(path)?) {
            Ok(json) => json,
            Err(e) => {
                let labels = Err(format!("is not whole JSON: {e}"));
                return Ok(Some(Listed { path: path.into(), labels }));
            }
        };
        let labels = match json.get("labels") {
            None => return Ok(None),
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
        Ok(Some(Listed { path: path.into(), labels }))
    }

    /// The labels of `files` below `base`.
    fn labels(&self, base: &Path, files: &[PathBuf]) -> Labels {
        let none = |why: String| NoLabels { path: self.path.clone(), why };
        let labels = self.labels.as_ref().map_err(|why| none(why.clone()))?;
        let name = |file: &PathBuf| {
            let parts = file.strip_prefix(base).unwrap_or(file).components();
            parts.map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
        };
        let names: Vec<String> = files.iter().map(name).collect();
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
