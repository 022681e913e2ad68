//! What a folder holds: image files, including those in subfolders, or else tables or archives of images.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::picture::{self, Fault, KINDS, READ};
use super::pictures::{Entry, Listing, plural};
use crate::config::Config;
use crate::error::{Error, Result};

/// What lies in a folder.
#[derive(Default)]
pub struct Folder {
    /// Image files in the order of their paths.
    pub files: Vec<PathBuf>,
    /// Files .parquet and .tar in the order of their paths.
    pub tables: Vec<PathBuf>,
    pub shards: Vec<PathBuf>,
    broken: Vec<(PathBuf, Fault)>,
    /// Number of other files by their ending.
    others: BTreeMap<String, usize>,
    /// Folders of the first two levels.
    folders: Vec<PathBuf>,
    /// Folders of runs, which are passed over.
    runs: Vec<PathBuf>,
}

/// Endings of pictures that are not read.
const PICTURES: [&str; 21] = [
    "avif", "heic", "heif", "jxl", "jp2", "j2k", "svg", "ico", "tga", "ppm", "pgm", "pbm", "pnm", "psd", "exr", "hdr",
    "dng", "cr2", "nef", "arw", "dcm",
];

/// Folders and files that other programs leave everywhere, hidden ones aside.
pub const LITTER: [&str; 6] =
    ["__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"];
pub const LITTER_FILES: [&str; 3] = ["Thumbs.db", "desktop.ini", "ehthumbs.db"];

impl Folder {
    /// True if there is an image, or what should be one.
    pub fn has_images(&self) -> bool {
        !self.files.is_empty() || !self.broken.is_empty()
    }

    /// Its image files, as a source.
    pub fn into_listing(self, folder: &Path) -> Listing {
        let notes = self.notes(folder);
        let entries = self.files.into_iter().map(|file| Entry::file(folder, file)).collect();
        Listing { entries, broken: self.broken, folders: self.folders, notes, ..Listing::default() }
    }

    /// `2 .avif, 1 .svg and 3 other files`.
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
            let (images, are, _) = plural(count);
            let convert = if self.has_other_pictures() { "; convert them to PNG or JPEG to use them" } else { "" };
            let what = if self.has_other_pictures() { String::new() } else { format!("no {images} and ") };
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
    pub fn nothing_to_read(&self) -> String {
        let held = |endings: &[&'static str]| endings.iter().copied().find(|e| self.others.contains_key(*e));
        let what =
            format!("holds no {KINDS} file, no .parquet, no .tar, no data_batch_1 and no train-images-idx3-ubyte");
        if self.has_other_pictures() {
            return format!("holds no {KINDS} file, but {}; convert them to PNG or JPEG", self.others_by_kind());
        }
        if held(&["mdb"]).is_some() {
            return "is an LMDB, as of LSUN, which is not read; export its values to a folder or a .tar: each is a whole image file, mostly WebP".into();
        }
        if let Some(run) = self.runs.first() {
            let run = run.display();
            return format!("{what}; {run} is passed over, being of a training run, whose samples are no data");
        }
        if let Some(ending) = held(&["ddpm", "npz", "npy", "zip"]) {
            return format!("{what}; give the .{ending} file in it by its own name");
        }
        if let Some(ending) = held(&["gz", "tgz"]) {
            return format!("{what}; unpack the .{ending} file in it");
        }
        match self.others.values().sum::<usize>() {
            0 => format!("{what}; it holds no files at all"),
            _ => format!("{what}; it holds {}", self.others_by_kind()),
        }
    }
}

/// Lists a folder with its subfolders. Hidden files and folders are ignored, folders of runs passed over.
pub fn list(folder: &Path) -> Result<Folder> {
    let mut listing = Folder::default();
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
        } else if ending == "parquet" || ending == "tar" {
            let to = if ending == "tar" { &mut listing.shards } else { &mut listing.tables };
            to.push(entry.into_path());
            *listing.others.entry(ending).or_default() += 1;
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
pub fn ending(path: &Path) -> String {
    path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase()
}

/// True for the folder of a run of this program: its settings are there, and samples or checkpoints.
fn is_run(folder: &Path) -> bool {
    if !folder.join("samples").is_dir() && !folder.join("checkpoints").is_dir() {
        return false;
    }
    std::fs::read_to_string(folder.join("config.toml")).is_ok_and(|text| Config::is_of_run(&text))
}
