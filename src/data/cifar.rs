//! Reading the binary version of CIFAR-10: records of one label byte and 3072 pixel bytes, three planes of 32x32.

use std::path::{Path, PathBuf};

use super::{Extent, Found, Part, contents};
use crate::config::Size;
use crate::error::{Error, Result};

const EXTENT: Extent = Extent { size: Size::square(32), channels: 3 };
const PIXELS: usize = 32 * 32;
const RECORD: usize = 1 + 3 * PIXELS;

/// `data_batch_*.bin` for training and `test_batch.bin` held out; `None` if the folder has no `data_batch_*.bin`.
pub fn read_folder(folder: &Path, files: &[PathBuf]) -> Result<Option<Found>> {
    let name = |f: &PathBuf| f.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let batches: Vec<&PathBuf> =
        files.iter().filter(|f| name(f).starts_with("data_batch_") && name(f).ends_with(".bin")).collect();
    if batches.is_empty() {
        return Ok(None);
    }
    let held_out = match files.iter().find(|f| name(f) == "test_batch.bin") {
        None => None,
        Some(file) => Some(read_batches(file, &[file])?),
    };
    Ok(Some(Found { train: read_batches(folder, &batches)?, held_out, notes: Vec::new() }))
}

fn read_batches(source: &Path, files: &[&PathBuf]) -> Result<Part> {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for file in files {
        let bytes = contents(file)?;
        if bytes.is_empty() || !bytes.len().is_multiple_of(RECORD) {
            let what = format!(
                "has {} bytes, which is not a whole number of CIFAR-10 records of {RECORD}; it is cut short or damaged",
                bytes.len()
            );
            return Err(Error::file(file, what));
        }
        for (index, record) in bytes.chunks_exact(RECORD).enumerate() {
            let (label, planes) = (record[0], &record[1..]);
            if label > 9 {
                let what = format!("has label {label} at record {index}; CIFAR-10's are 0 to 9, so it is damaged");
                return Err(Error::file(file, what));
            }
            labels.push(u32::from(label));
            images.extend_from_slice(&crate::layout::to_channels_last(planes, 3, PIXELS));
        }
    }
    Part::new(source, EXTENT, images, Some(labels))
}
