//! Reading the binary versions of CIFAR-10 and CIFAR-100: records of one label byte (CIFAR-100: a coarse and a fine
//! one) and 3072 pixel bytes, three planes of 32x32.

use std::path::{Path, PathBuf};

use super::{Extent, Found, Part, contents};
use crate::config::Size;
use crate::error::{Error, Result};

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
}

const CIFAR10: Version =
    Version { name: "CIFAR-10", classes: &[10], names: "batches.meta.txt", test: "test_batch.bin" };
const CIFAR100: Version =
    Version { name: "CIFAR-100", classes: &[20, 100], names: "fine_label_names.txt", test: "test.bin" };

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
        let parts = (1..=5).map(|k| format!("data_batch_{k}.bin")).chain([CIFAR10.test.into()]);
        let missing: Vec<String> = parts.filter(|part| named(part).is_none()).collect();
        if !missing.is_empty() {
            let folder = folder.display();
            notes.push(format!("{folder} is CIFAR-10 without {}, which the whole set has", missing.join(", ")));
        }
        (CIFAR10, batches)
    } else if let Some(train) = named("train.bin").filter(|f| named(CIFAR100.names).is_some() || is_cifar100(f)) {
        (CIFAR100, vec![train])
    } else {
        return match python_version(folder, files)? {
            Some(what) => Err(Error::file(folder, what)),
            None => Ok(None),
        };
    };
    let held_out = named(version.test).map(|file| read_batches(file, &[file], &version)).transpose()?;
    let train = read_batches(folder, &train, &version)?;
    Ok(Some(Found { train, held_out, names: class_names(named(version.names), &version)?, notes }))
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

/// What to do with the version for Python, whose files have the names of the others without `.bin`.
fn python_version(folder: &Path, files: &[PathBuf]) -> Result<Option<String>> {
    let pickled = |name: &str| -> Result<bool> {
        let file = folder.join(name);
        if !files.contains(&file) {
            return Ok(false);
        }
        Ok(is_pickle(&contents(&file)?))
    };
    Ok(if pickled("data_batch_1")? || pickled("batches.meta")? {
        Some(
            "is CIFAR-10's version for Python, which is pickled; get its binary version, cifar-10-binary.tar.gz".into(),
        )
    } else if pickled("train")? && (pickled("meta")? || pickled("test")?) {
        Some(
            "is CIFAR-100's version for Python, which is pickled; get its binary version, cifar-100-binary.tar.gz"
                .into(),
        )
    } else {
        None
    })
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
