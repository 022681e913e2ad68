//! Reading IDX, the format of the MNIST family: two zero bytes, the element type (8 = unsigned byte), the number of
//! dimensions, each extent as a big-endian u32, then the elements.

use std::path::{Path, PathBuf};

use super::{Found, Part, PixelOrder, contents, extent_of};
use crate::error::{Error, Result};

/// True if the bytes begin like an IDX file.
pub fn is_idx(bytes: &[u8]) -> bool {
    bytes.len() >= 4 && bytes[..2] == [0, 0] && (1..=4).contains(&bytes[3]) && (8..=14).contains(&bytes[2])
}

/// Dimensions and elements.
fn parse(bytes: &[u8]) -> std::result::Result<(Vec<usize>, &[u8]), String> {
    if !is_idx(bytes) {
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
    Ok((shape, body))
}

/// Images from one file, with labels from the file beside it whose name has `labels` for `images`, if there is one.
pub fn read_file(path: &Path, bytes: &[u8], channels: Option<usize>) -> Result<Part> {
    let (shape, body) = parse(bytes).map_err(|e| Error::file(path, e))?;
    if shape.len() < 3 {
        return Err(Error::file(
            path,
            format!("has {} dimensions; images have three (count, rows, columns), so these may be labels", shape.len()),
        ));
    }
    let (extent, order) = extent_of(&shape, channels).map_err(|e| Error::file(path, e))?;
    let images = match order {
        PixelOrder::Last => body.to_vec(),
        PixelOrder::First => crate::layout::to_channels_last(body, extent.channels, extent.size.h * extent.size.w),
    };
    let labels = match labels_beside(path) {
        None => None,
        Some(file) => Some(read_labels(&file, shape[0])?),
    };
    Part::new(path, extent, images, labels)
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

fn read_labels(path: &Path, images: usize) -> Result<Vec<u32>> {
    let bytes = contents(path)?;
    let (shape, body) = parse(&bytes).map_err(|e| Error::file(path, e))?;
    if shape != [images] {
        let what = format!("holds {} labels for {images} images", super::npy::extent(&shape));
        return Err(Error::file(path, what));
    }
    Ok(body.iter().map(|&b| u32::from(b)).collect())
}

/// The image files of a folder by their usual names: `train-images*` and, for the held-out set, `t10k-images*` or
/// `test-images*`. `None` without `train-images*`.
pub fn read_folder(files: &[PathBuf], channels: Option<usize>) -> Result<Option<Found>> {
    let starting = |starts: &[&str]| {
        let named = |f: &&PathBuf| {
            f.file_name().is_some_and(|n| starts.iter().any(|s| n.as_encoded_bytes().starts_with(s.as_bytes())))
        };
        files.iter().find(named)
    };
    let Some(train) = starting(&["train-images"]) else { return Ok(None) };
    let held_out = match starting(&["t10k-images", "test-images"]) {
        None => None,
        Some(file) => Some(read_file(file, &contents(file)?, channels)?),
    };
    Ok(Some(Found { train: read_file(train, &contents(train)?, channels)?, held_out, notes: Vec::new() }))
}
