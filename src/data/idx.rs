//! Reading IDX, the format of the MNIST family: two zero bytes, the element type (8 = unsigned byte), the number of
//! dimensions, each extent as a big-endian u32, then the elements.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::contents::Reading;
use super::{Found, Labels, NoLabels, Part, Stored, extent_of};
use crate::config::Size;
use crate::error::{Error, Result};

/// True if the bytes begin like an IDX file.
pub fn is_idx(bytes: &[u8]) -> bool {
    bytes.len() >= 4 && bytes[..2] == [0, 0] && (1..=4).contains(&bytes[3]) && (8..=14).contains(&bytes[2])
}

/// Dimensions and elements.
fn parse(mut bytes: Bytes) -> std::result::Result<(Vec<usize>, Bytes), String> {
    if !is_idx(&bytes) {
        return Err("is not an IDX file; one starts with two zero bytes, a type and a number of dimensions".into());
    }
    if bytes[2] != 8 {
        return Err(format!("holds IDX elements of type {:#04x}; unsigned bytes (0x08) are expected", bytes[2]));
    }
    let dims = usize::from(bytes[3]);
    let Some((head, body)) = bytes[4..].split_at_checked(4 * dims) else {
        return Err(format!("ends within its header, after {} bytes", bytes.len()));
    };
    let shape: Vec<usize> =
        head.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize).collect();
    let want = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    if want != Some(body.len()) {
        return Err(format!(
            "should hold {} bytes for its extents {}, but {} are there; it is cut short or damaged",
            want.map_or("more than any file has".into(), |w| w.to_string()),
            super::npy::extent(&shape),
            body.len()
        ));
    }
    let begin = bytes.len() - body.len();
    Ok((shape, bytes.split_off(begin)))
}

/// Images from one file, with labels from the file beside it whose name has `labels` for `images`, if there is one.
/// Those of EMNIST, told by their name, are stored with rows and columns exchanged and are turned upright.
pub fn read_file(path: &Path, bytes: Bytes, reading: &Reading<'_>) -> Result<Found> {
    let (shape, elements) = parse(bytes).map_err(|e| Error::file(path, e))?;
    if shape.len() < 3 {
        return Err(Error::file(
            path,
            format!("has {} dimensions; images have three (count, rows, columns), so these may be labels", shape.len()),
        ));
    }
    let (mut extent, mut turned) = extent_of(&shape, reading.channels).map_err(|e| Error::file(path, e))?;
    let labels = match labels_beside(path) {
        None => {
            let name = path.file_name().unwrap_or_default().to_string_lossy().replace("images-idx3", "labels-idx1");
            Err(NoLabels::new(path, format!("has no file of labels beside it, such as {name}")))
        }
        Some(file) => read_labels(&file, shape[0], reading),
    };
    let mut notes = Vec::new();
    if is_emnist(path) && shape.len() == 3 {
        let Size { h, w } = extent.size;
        turned = Some((h, w));
        extent.size = Size { h: w, w: h };
        notes.push(format!("{}: EMNIST stores its images transposed; they are turned upright", path.display()));
    }
    Ok(Found {
        train: Part::of(path, extent, Stored::Array { elements, turned }, labels)?,
        held_out: None,
        names: Vec::new(),
        notes,
        skipped: Vec::new(),
    })
}

fn is_emnist(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().to_ascii_lowercase().starts_with("emnist-"))
}

/// `train-images-idx3-ubyte.gz` -> `train-labels-idx1-ubyte`, with or without `.gz`, if it exists.
fn labels_beside(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    if !name.contains("images") {
        return None;
    }
    let plain = name.strip_suffix(".gz").unwrap_or(name).replace("images", "labels");
    let names = [plain.replace("idx3", "idx1").replace("idx4", "idx1"), plain];
    let files = names.iter().flat_map(|n| [path.with_file_name(n), path.with_file_name(format!("{n}.gz"))]);
    files.into_iter().find(|f| f.is_file())
}

fn read_labels(path: &Path, images: usize, reading: &Reading<'_>) -> Labels {
    let none = |why: String| NoLabels { path: path.to_path_buf(), why };
    let bytes = reading.contents(path).map_err(|e| match e {
        Error::File { what, .. } => none(what),
        other => none(other.to_string()),
    })?;
    let (shape, body) = parse(bytes).map_err(none)?;
    if shape != [images] {
        return Err(none(format!("holds {} labels for {images} images", super::npy::extent(&shape))));
    }
    Ok(body.iter().map(|&b| u32::from(b)).collect())
}

/// The image files of a folder by their usual names: `train-images*` and, for the held-out set, `t10k-images*` or
/// `test-images*`, or EMNIST's `emnist-letters-train-images*` and `emnist-letters-test-images*`. `None` without them.
pub fn read_folder(folder: &Path, files: &[PathBuf], reading: &Reading<'_>) -> Result<Option<Found>> {
    let name = |f: &PathBuf| f.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let starting = |starts: &[&str]| files.iter().find(|f| starts.iter().any(|start| name(f).starts_with(start)));
    let (train, held_out) = match starting(&["train-images"]) {
        Some(train) => (train, starting(&["t10k-images", "test-images"])),
        None => {
            let stem = |f: &PathBuf| Some(name(f).split_once("-train-images-idx3")?.0.to_string());
            let mut stems: Vec<String> = files.iter().filter_map(stem).collect();
            stems.dedup();
            match &stems[..] {
                [] => return Ok(None),
                [stem] => {
                    let file = |part: &str| starting(&[&format!("{stem}-{part}-images-idx3")]);
                    (file("train").expect("it has this stem"), file("test"))
                }
                _ => {
                    let what = format!(
                        "holds several sets, {}; give the images of one, such as {}-train-images-idx3-ubyte",
                        super::shortened(&stems),
                        stems[0]
                    );
                    return Err(Error::file(folder, what));
                }
            }
        }
    };
    let mut found = read_file(train, reading.contents(train)?, reading)?;
    if let Some(file) = held_out {
        found.held_out = Some(read_file(file, reading.contents(file)?, reading)?.train);
    }
    Ok(Some(found))
}
