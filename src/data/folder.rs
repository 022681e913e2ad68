//! Reading a folder of PNG and JPEG files, including subfolders. If every image is in a subfolder, the folders of the
//! first level are the classes, numbered in alphabetical order.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{ColorType, DynamicImage, ImageDecoder, ImageReader};
use rayon::prelude::*;

use super::{Extent, Found, Part, Target, fit};
use crate::error::{Error, Result};

/// Decodes every image, in the order of the paths, and fits it to `target` at once, so that a folder of photographs
/// need not fit into memory at full size.
pub fn read(folder: &Path, target: Target) -> Result<Found> {
    let (files, others) = list(folder)?;
    if files.is_empty() {
        return Err(Error::file(
            folder,
            format!(
                "holds no .png, .jpg or .jpeg file ({others} others), no data_batch_1.bin and no train-images-idx3-ubyte"
            ),
        ));
    }
    let read = |file: &PathBuf| {
        let (extent, pixels) = decode(file)?;
        let to = target.over(extent);
        fit::check_channels(extent.channels, to.channels).map_err(|e| Error::file(file, e))?;
        Ok((extent, if to == extent { pixels } else { fit::fit(&pixels, extent, to) }))
    };
    let images: Result<Vec<(Extent, Vec<u8>)>> = files.par_iter().map(read).collect();
    // Of several unusable files the error names the first by path, whichever thread failed first.
    let images = images.map_err(|e| files.par_iter().find_map_first(|file| read(file).err()).unwrap_or(e))?;

    let found: BTreeSet<(usize, usize, usize)> = images.iter().map(|(e, _)| (e.size.h, e.size.w, e.channels)).collect();
    // If no number of channels is asked for, one colour image makes all of them colour.
    let channels = target.channels.unwrap_or(found.iter().map(|e| e.2).max().unwrap_or(1));
    let size = target.size.unwrap_or(images[0].0.size);
    let mut pixels = Vec::with_capacity(images.len() * size.h * size.w * channels);
    for (file, (extent, image)) in files.iter().zip(images) {
        let now = target.over(extent);
        if now.size != size {
            let what = format!(
                "is {}, but {} is {size}; give all images one size, or fix one with --set image_size={size}",
                now.size,
                files[0].display()
            );
            return Err(Error::file(file, what));
        }
        if now.channels == channels {
            pixels.extend_from_slice(&image);
        } else {
            pixels.extend_from_slice(&fit::fit(&image, now, Extent { channels, ..now }));
        }
    }
    let to = Extent { size, channels };
    let mut notes = Vec::new();
    if others > 0 {
        notes.push(format!("{others} files in {} are neither PNG nor JPEG and are left out", folder.display()));
    }
    if let Some(note) = super::fitted_note(files.len(), &found, to) {
        notes.push(note);
    }
    let (labels, classes) = labels(folder, &files);
    if !classes.is_empty() {
        let named: Vec<String> = classes.iter().enumerate().map(|(k, name)| format!("{k} {name}")).collect();
        notes.push(format!("{} classes by folder: {}", classes.len(), super::shortened(&named)));
    }
    Ok(Found { train: Part::new(folder, to, pixels, labels)?, held_out: None, notes })
}

/// Image files in the order of their paths, and the number of other files. Hidden files and folders are ignored.
fn list(folder: &Path) -> Result<(Vec<PathBuf>, usize)> {
    let (mut files, mut others) = (Vec::new(), 0);
    let hidden = |e: &walkdir::DirEntry| e.depth() > 0 && e.file_name().as_encoded_bytes().starts_with(b".");
    let walk = walkdir::WalkDir::new(folder).follow_links(true).sort_by_file_name();
    for entry in walk.into_iter().filter_entry(|e| !hidden(e)) {
        let entry = entry.map_err(|e| {
            let what = match (e.loop_ancestor(), e.io_error()) {
                (Some(ancestor), _) => format!("is a link to {}, which it is in", ancestor.display()),
                (None, Some(io)) => format!("cannot be read: {io}"),
                (None, None) => format!("cannot be read: {e}"),
            };
            Error::file(e.path().unwrap_or(folder), what)
        })?;
        if !entry.file_type().is_file() {
            continue;
        }
        let ending = entry.path().extension().unwrap_or_default().to_ascii_lowercase();
        if ending == "png" || ending == "jpg" || ending == "jpeg" {
            files.push(entry.into_path());
        } else {
            others += 1;
        }
    }
    Ok((files, others))
}

/// Grey images become one channel, all others three. Transparency is dropped, 16 bits become 8, and EXIF orientation is
/// applied.
fn decode(file: &Path) -> Result<(Extent, Vec<u8>)> {
    let broken = |e: &dyn std::fmt::Display| Error::file(file, format!("is not a whole PNG or JPEG image: {e}"));
    let bytes = std::fs::read(file).map_err(|e| Error::file(file, format!("cannot be read: {e}")))?;
    if bytes.starts_with(&JPEG_START) && !jpeg_has_end(&bytes) {
        return Err(broken(&"it is cut short"));
    }
    let reader = ImageReader::new(Cursor::new(&bytes)).with_guessed_format();
    let mut decoder = reader.map_err(|e| broken(&e))?.into_decoder().map_err(|e| broken(&e))?;
    let orientation = decoder.orientation().map_err(|e| broken(&e))?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| broken(&e))?;
    image.apply_orientation(orientation);
    let size = crate::config::Size { h: image.height() as usize, w: image.width() as usize };
    let grey = matches!(image.color(), ColorType::L8 | ColorType::La8 | ColorType::L16 | ColorType::La16);
    Ok(if grey {
        (Extent { size, channels: 1 }, image.into_luma8().into_raw())
    } else {
        (Extent { size, channels: 3 }, image.into_rgb8().into_raw())
    })
}

const JPEG_START: [u8; 2] = [0xFF, 0xD8];

/// True if a JPEG has its end marker. Without this check a truncated file would enter the training set unnoticed: the
/// decoder fills the missing part with grey.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    let mut at = JPEG_START.len();
    loop {
        match (bytes.get(at), bytes.get(at + 1)) {
            (Some(0xFF), Some(0xD9)) => return true,
            // In compressed data: a stuffed 0xFF, a restart marker, a fill byte.
            (Some(0xFF), Some(0x00 | 0xD0..=0xD7)) => at += 2,
            (Some(0xFF), Some(0xFF)) => at += 1,
            // Any other marker starts a segment with a length; it may hold a thumbnail with an end marker of its own.
            (Some(0xFF), Some(_)) => match bytes.get(at + 2..at + 4) {
                Some(length) => at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
            (Some(_), _) => at += 1,
            (None, _) => return false,
        }
    }
}

/// Class of each file by its first folder, and the names of the classes; none if an image is in `folder` itself.
fn labels(folder: &Path, files: &[PathBuf]) -> (Option<Vec<u32>>, Vec<String>) {
    let class = |file: &PathBuf| {
        let mut parts = file.strip_prefix(folder).ok()?.components();
        let first = parts.next()?.as_os_str().to_string_lossy().into_owned();
        parts.next().map(|_| first)
    };
    let Some(of_file) = files.iter().map(class).collect::<Option<Vec<String>>>() else { return (None, Vec::new()) };
    let names: Vec<String> = of_file.iter().collect::<BTreeSet<_>>().into_iter().cloned().collect();
    let number = |name: &String| names.binary_search(name).expect("every name is in the list") as u32;
    (Some(of_file.iter().map(number).collect()), names)
}
