//! Reading CIFAR-10 and CIFAR-100. Their binary versions are records of one label byte (CIFAR-100: a coarse and a fine
//! one) and 3072 pixel bytes, three planes of 32x32. Their versions for Python are pickles of dictionaries with `data`,
//! an array of such pixels, and `labels` or `fine_labels`, a list; [`pickle`] reads them and executes nothing.

use std::path::{Path, PathBuf};

use super::contents::{SMALLER, check_room, free_memory};
use super::{Extent, Found, Part, contents};
use crate::config::Size;
use crate::error::{Error, Result};
use crate::pickle::{self, Reads, Unpickled, Value};

const EXTENT: Extent = Extent { size: Size::square(32), channels: 3 };
const PIXELS: usize = 32 * 32;

/// A version of the set.
struct Version {
    name: &'static str,
    /// Classes by each label byte; the last byte's are used.
    classes: &'static [u8],
    /// File of the names of the classes.
    names: &'static str,
    test: &'static str,
    python: Python,
}

/// What the version for Python calls things.
struct Python {
    /// How the names of the files for training begin.
    train: &'static str,
    test: &'static str,
    meta: &'static str,
    labels: &'static str,
    names: &'static str,
}

const CIFAR10: Version = Version {
    name: "CIFAR-10",
    classes: &[10],
    names: "batches.meta.txt",
    test: "test_batch.bin",
    python: Python {
        train: "data_batch_",
        test: "test_batch",
        meta: "batches.meta",
        labels: "labels",
        names: "label_names",
    },
};
const CIFAR100: Version = Version {
    name: "CIFAR-100",
    classes: &[20, 100],
    names: "fine_label_names.txt",
    test: "test.bin",
    python: Python { train: "train", test: "test", meta: "meta", labels: "fine_labels", names: "fine_label_names" },
};

impl Version {
    fn record(&self) -> usize {
        self.classes.len() + 3 * PIXELS
    }
}

/// `data_batch_*.bin`, or CIFAR-100's `train.bin`, for training, and the test file held out; `None` if the folder has
/// neither.
pub fn read_folder(folder: &Path, files: &[PathBuf]) -> Result<Option<Found>> {
    let name = |f: &PathBuf| f.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let named = |wanted: &str| files.iter().find(|f| name(f) == wanted);
    let batches: Vec<&PathBuf> =
        files.iter().filter(|f| name(f).starts_with("data_batch_") && name(f).ends_with(".bin")).collect();
    let mut notes = Vec::new();
    let (version, train) = if !batches.is_empty() {
        notes.extend(missing_note(folder, files, ".bin"));
        (CIFAR10, batches)
    } else if let Some(train) = named("train.bin").filter(|f| named(CIFAR100.names).is_some() || is_cifar100(f)) {
        (CIFAR100, vec![train])
    } else {
        return python_version(folder, files);
    };
    let held_out = named(version.test).map(|file| read_batches(file, &[file], &version)).transpose()?;
    let train = read_batches(folder, &train, &version)?;
    Ok(Some(Found { train, held_out, names: class_names(named(version.names), &version)?, notes, skipped: Vec::new() }))
}

/// True for whole records whose labels are CIFAR-100's: a folder of images may have a `train.bin` of its own.
fn is_cifar100(file: &Path) -> bool {
    contents(file).is_ok_and(|bytes| batch_name(&bytes) == Some(CIFAR100.name))
}

/// The set that whole records with good labels are of.
pub fn batch_name(bytes: &[u8]) -> Option<&'static str> {
    let good = |version: &Version, record: &[u8]| version.classes.iter().zip(record).all(|(classes, l)| l < classes);
    let of = |version: &Version| {
        let whole = !bytes.is_empty() && bytes.len().is_multiple_of(version.record());
        whole && bytes.chunks_exact(version.record()).all(|record| good(version, record))
    };
    [CIFAR10, CIFAR100].into_iter().find(of).map(|version| version.name)
}

/// True for a pickle of protocol 2 or later.
pub fn is_pickle(bytes: &[u8]) -> bool {
    matches!(bytes, [0x80, 2..=5, ..])
}

/// A note if files of CIFAR-10 are missing, whose names end in `ending`.
fn missing_note(folder: &Path, files: &[PathBuf], ending: &str) -> Option<String> {
    let parts = (1..=5).map(|k| format!("data_batch_{k}")).chain(["test_batch".into()]);
    let missing: Vec<String> =
        parts.map(|part| part + ending).filter(|part| !files.contains(&folder.join(part))).collect();
    let folder = folder.display();
    (!missing.is_empty())
        .then(|| format!("{folder} is CIFAR-10 without {}, which the whole set has", missing.join(", ")))
}

/// The version for Python, whose files have the names of the others without `.bin`; `None` if it is not that.
fn python_version(folder: &Path, files: &[PathBuf]) -> Result<Option<Found>> {
    let there = |name: &str| Some(folder.join(name)).filter(|file| files.contains(file));
    let pickled = |name: &str| -> Result<bool> {
        Ok(match there(name) {
            Some(file) => is_pickle(&contents(&file)?),
            None => false,
        })
    };
    let (version, train) = if pickled("data_batch_1")? || pickled("batches.meta")? {
        let batches: Vec<PathBuf> = (1..=5).filter_map(|k| there(&format!("data_batch_{k}"))).collect();
        (CIFAR10, batches)
    } else if pickled("train")? && (pickled("meta")? || pickled("test")?) {
        (CIFAR100, there("train").into_iter().collect())
    } else {
        return Ok(None);
    };
    if train.is_empty() {
        let what = format!("holds no {}1, the images of {}'s version for Python", version.python.train, version.name);
        return Err(Error::file(folder, what));
    }
    let held_out = there(version.python.test).map(|file| read_pickles(&file, std::slice::from_ref(&file), &version));
    let notes = if version.name == CIFAR10.name { missing_note(folder, files, "") } else { None };
    Ok(Some(Found {
        train: read_pickles(folder, &train, &version)?,
        held_out: held_out.transpose()?,
        names: there(version.python.meta).map_or(Ok(Vec::new()), |file| pickled_names(&file, &version))?,
        notes: notes.into_iter().collect(),
        skipped: Vec::new(),
    }))
}

/// The value of `key` in a pickled dictionary; Python 2's texts are bytes.
fn entry<'a>(bytes: &[u8], read: &'a Unpickled, key: &str) -> Option<&'a Value> {
    let is_key = |value: &Value| text(bytes, value).is_some_and(|text| text == key.as_bytes());
    read.dict(&read.value)?.iter().find(|(own, _)| is_key(own)).map(|(_, value)| value)
}

fn text<'a>(bytes: &'a [u8], value: &'a Value) -> Option<&'a [u8]> {
    match value {
        Value::Text(text) => Some(text.as_bytes()),
        Value::Bytes(start, len) => bytes.get(*start..start + len),
        _ => None,
    }
}

/// Images and labels of pickled batches.
fn read_pickles(source: &Path, files: &[PathBuf], version: &Version) -> Result<Part> {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    let classes = u32::from(*version.classes.last().expect("a set has classes"));
    for file in files {
        let bytes = contents(file)?;
        let refused = |what: String| Error::file(file, what);
        check_room("the file takes", bytes.len() as u64, free_memory(), SMALLER).map_err(refused)?;
        let read = pickle::read(&bytes, Reads::Arrays).map_err(refused)?;
        let unfit = |what: &str| refused(format!("holds {what}, so it is no batch of {} or is damaged", version.name));
        let data =
            entry(&bytes, &read, "data").and_then(|data| read.array(data)).ok_or_else(|| unfit("no array data"))?;
        if data.shape.len() != 2 || data.shape[1] != 3 * PIXELS {
            return Err(unfit(&format!("an array data of {}", super::npy::extent(&data.shape))));
        }
        let own = entry(&bytes, &read, version.python.labels).and_then(|labels| read.list(labels));
        let own = own.ok_or_else(|| unfit(&format!("no list {}", version.python.labels)))?;
        if own.len() != data.shape[0] {
            return Err(unfit(&format!("{} labels for {} images", own.len(), data.shape[0])));
        }
        for (index, label) in own.iter().enumerate() {
            match label {
                Value::Int(label) if (0..i64::from(classes)).contains(label) => labels.push(*label as u32),
                _ => return Err(unfit(&format!("at image {index} another label than 0 to {}", classes - 1))),
            }
        }
        for planes in bytes[data.start..data.start + data.len].chunks_exact(3 * PIXELS) {
            images.extend_from_slice(&crate::layout::to_channels_last(planes, 3, PIXELS));
        }
    }
    Part::new(source, EXTENT, images, Ok(labels))
}

/// The names of the classes. No names if they are not one for each class.
fn pickled_names(file: &Path, version: &Version) -> Result<Vec<String>> {
    let bytes = contents(file)?;
    let read = pickle::read(&bytes, Reads::Arrays).map_err(|e| Error::file(file, e))?;
    let names = entry(&bytes, &read, version.python.names).and_then(|names| read.list(names)).unwrap_or_default();
    let name = |value: &Value| text(&bytes, value).map(|text| String::from_utf8_lossy(text).into_owned());
    let names: Option<Vec<String>> = names.iter().map(name).collect();
    let whole = |names: &Vec<String>| version.classes.last().is_some_and(|&n| names.len() == usize::from(n));
    Ok(names.filter(whole).unwrap_or_default())
}

/// One name a line. No names if they are not one for each class.
fn class_names(file: Option<&PathBuf>, version: &Version) -> Result<Vec<String>> {
    let Some(file) = file else { return Ok(Vec::new()) };
    let text = String::from_utf8_lossy(&contents(file)?).into_owned();
    let names: Vec<String> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect();
    let whole = Some(names.len()) == version.classes.last().map(|&n| usize::from(n));
    Ok(if whole { names } else { Vec::new() })
}

fn read_batches(source: &Path, files: &[&PathBuf], version: &Version) -> Result<Part> {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    let (name, record_len) = (version.name, version.record());
    for file in files {
        let bytes = contents(file)?;
        if bytes.is_empty() || !bytes.len().is_multiple_of(record_len) {
            let what = format!(
                "has {} bytes, which is not a whole number of {name} records of {record_len}; it is cut short or damaged",
                bytes.len()
            );
            return Err(Error::file(file, what));
        }
        check_room("the file takes", bytes.len() as u64, free_memory(), SMALLER).map_err(|e| Error::file(file, e))?;
        for (index, record) in bytes.chunks_exact(record_len).enumerate() {
            let (own, planes) = record.split_at(version.classes.len());
            if let Some((label, classes)) = own.iter().zip(version.classes).find(|(label, classes)| label >= classes) {
                let what =
                    format!("has label {label} at record {index}; {name}'s are 0 to {}, so it is damaged", classes - 1);
                return Err(Error::file(file, what));
            }
            labels.push(u32::from(own[own.len() - 1]));
            images.extend_from_slice(&crate::layout::to_channels_last(planes, 3, PIXELS));
        }
    }
    Part::new(source, EXTENT, images, Ok(labels))
}
