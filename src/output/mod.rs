//! Output files: PNG grids and folders, animated GIFs, .npz for OpenAI's evaluator, .npy, plots.
//!
//! Images are bytes, `(n, h, w, c)`; [`to_bytes`] makes them from samples in [-1, 1]. Everything is written beside its
//! final name, synced and renamed, so that name always holds the old file or the complete new one.

mod atomic;
mod npz;
pub mod plot;
pub mod tensorboard;

use std::path::Path;

use image::{ExtendedColorType, ImageEncoder};
use rayon::prelude::*;

pub use atomic::{UNFINISHED, remove_unfinished, write_atomically, write_folder_atomically};
pub(crate) use atomic::{parent, sync_folder};
pub(crate) use npz::write_archive;
pub use npz::{write_npy, write_npy_from, write_npz, write_npz_parts};

use crate::error::{Error, Result};
use crate::tensor::Shape;
use crate::usage;

/// Pixels between and around the images of a grid.
const GAP: usize = 2;
/// Their colour.
const GAP_VALUE: u8 = 255;
/// How long an animation shows a frame, in hundredths of a second.
const FRAME_CS: u16 = 5;
/// How long it shows the last one.
const LAST_FRAME_CS: u16 = 200;
/// Speed of NeuQuant, from 1 (most effort) to 30, for frames of more than 256 colours; up to 256 are kept exactly.
const GIF_SPEED: i32 = 10;

/// What `--out` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `FILE.png`: one grid.
    Png,
    /// `FILE.npz`: `arr_0`.
    Npz,
    /// `FILE.gif`: an animation of the reverse process.
    Gif,
    /// `DIR/`: a PNG per image.
    Folder,
}

impl Target {
    /// From the file extension; a path without one is a folder.
    ///
    /// # Errors
    /// `Error::Usage` for another extension; `Error::File` if nothing can be written there, which is checked now,
    /// before hours are spent on images.
    pub fn parse(out: &Path) -> Result<Self> {
        let ending = out.extension().unwrap_or_default().to_ascii_lowercase();
        let target = match ending.to_str() {
            _ if out.is_dir() || out.as_os_str().as_encoded_bytes().ends_with(b"/") => Target::Folder,
            Some("") => Target::Folder,
            Some("png") => Target::Png,
            Some("npz") => Target::Npz,
            Some("gif") => Target::Gif,
            _ => usage!("--out {}: the ending is none of .png, .npz, .gif and DIR/", out.display()),
        };
        let parent = atomic::parent(out);
        if !parent.is_dir() {
            return Err(Error::file(out, format!("cannot be written: there is no folder {}", parent.display())));
        }
        if target == Target::Folder && out.exists() {
            refuse_full_folder(out)?;
        }
        tempfile::tempfile_in(parent).map_err(|e| Error::file(out, format!("cannot be written: {e}")))?;
        Ok(target)
    }

    /// Refuses images of `shape` that this format cannot hold: other than 1 or 3 channels, or a grid that is too large.
    ///
    /// # Errors
    /// `Error::File` for such images.
    pub fn check(self, out: &Path, shape: Shape) -> Result<()> {
        if self == Target::Npz {
            return Ok(());
        }
        check_channels(out, shape.c)?;
        let (height, width) = grid_pixels(shape);
        let most = if self == Target::Gif { usize::from(u16::MAX) } else { i32::MAX as usize };
        if self != Target::Folder && height.max(width) > most {
            let what = format!(
                "would be {height}x{width} pixels, but its format ends at {most}; draw fewer images, or into FILE.npz or DIR/"
            );
            return Err(Error::file(out, what));
        }
        Ok(())
    }
}

/// Numbers in [-1, 1] as bytes: `(x + 1) * 127.5`, rounded to the nearest and clamped to 0..=255. Rounding makes
/// `byte / 127.5 - 1` come back as the same byte; OpenAI's code truncates, which darkens by half a level on average.
pub fn to_bytes(x: &[f32]) -> Vec<u8> {
    x.iter().map(|&x| ((x + 1.0) * 127.5).round().clamp(0.0, 255.0) as u8).collect()
}

/// Writes one PNG with all images in a roughly square grid.
///
/// # Errors
/// `Error::File` for other than 1 or 3 channels, or if the file cannot be written.
pub fn write_grid(path: &Path, shape: Shape, images: &[u8]) -> Result<()> {
    check(path, shape, images.len())?;
    let (h, w) = grid_pixels(shape);
    write_atomically(path, &png(path, h, w, shape.c, &grid(shape, images))?)
}

/// The same with so many images in a row.
///
/// # Errors
/// The same.
pub fn write_table(path: &Path, shape: Shape, images: &[u8], columns: usize) -> Result<()> {
    check(path, shape, images.len())?;
    let (h, w) = table_pixels(shape, columns);
    write_atomically(path, &png(path, h, w, shape.c, &table(shape, images, columns))?)
}

/// Images in a row of the grid.
pub fn columns(shape: Shape) -> usize {
    grid_extent(shape).1
}

/// Writes a new folder of PNGs, `00000.png` and so on.
///
/// # Errors
/// `Error::File` for other than 1 or 3 channels, for a folder that is not empty, or if it cannot be written.
pub fn write_folder(path: &Path, shape: Shape, images: &[u8]) -> Result<()> {
    check(path, shape, images.len())?;
    write_folder_parts(path, shape, std::iter::once(Ok(images)))
}

/// The same of images that come in parts, each of whole ones.
///
/// # Errors
/// The same, and those of the parts.
pub fn write_folder_parts<P: AsRef<[u8]>>(
    path: &Path,
    shape: Shape,
    parts: impl Iterator<Item = std::io::Result<P>>,
) -> Result<()> {
    check_channels(path, shape.c)?;
    if path.exists() {
        refuse_full_folder(path)?;
    }
    let digits = (shape.n - 1).to_string().len().max(5);
    let failed = |e: std::io::Error| Error::file(path, format!("cannot be written: {e}"));
    let (image, mut first) = (shape.len() / shape.n, 0);
    write_folder_atomically(path, |folder| {
        for part in parts {
            let part = part.map_err(failed)?;
            part.as_ref().par_chunks_exact(image).enumerate().try_for_each(|(i, image)| {
                let file = folder.join(format!("{:0digits$}.png", first + i));
                let bytes = png(&file, shape.h, shape.w, shape.c, image)?;
                std::fs::write(&file, bytes).map_err(failed)
            })?;
            first += part.as_ref().len() / image;
        }
        assert_eq!(first, shape.n, "images in parts");
        Ok(())
    })
}

/// Writes an endlessly looping animation; each frame holds all images and is shown as a grid. Grey frames share a
/// global table of 256 greys: with local tables only, the file is valid, but Pillow shows grey frames as black.
///
/// # Errors
/// `Error::File` for other than 1 or 3 channels, for a grid above 65,535 pixels a side, or if the file cannot be
/// written.
pub fn write_gif(path: &Path, shape: Shape, frames: &[Vec<u8>]) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written as GIF: {e}"));
    let greys: Vec<u8> = if shape.c == 1 { (0..=255).flat_map(|v| [v; 3]).collect() } else { Vec::new() };
    let (height, width) = grid_pixels(shape);
    let h = u16::try_from(height).map_err(|e| failed(&e))?;
    let w = u16::try_from(width).map_err(|e| failed(&e))?;
    let mut bytes = Vec::new();
    let mut encoder = gif::Encoder::new(&mut bytes, w, h, &greys).map_err(|e| failed(&e))?;
    encoder.set_repeat(gif::Repeat::Infinite).map_err(|e| failed(&e))?;
    for (index, frame) in frames.iter().enumerate() {
        check(path, shape, frame.len())?;
        let pixels = grid(shape, frame);
        let mut image = match shape.c {
            1 => gif::Frame::from_indexed_pixels(w, h, pixels, None),
            _ => gif::Frame::from_rgb_speed(w, h, &pixels, GIF_SPEED),
        };
        image.delay = if index + 1 == frames.len() { LAST_FRAME_CS } else { FRAME_CS };
        encoder.write_frame(&image).map_err(|e| failed(&e))?;
    }
    drop(encoder); // writes the end
    write_atomically(path, &bytes)
}

/// The pixels of a grid of images with gaps around each.
fn grid(shape: Shape, images: &[u8]) -> Vec<u8> {
    table(shape, images, columns(shape))
}

/// The same with so many images in a row.
fn table(shape: Shape, images: &[u8], columns: usize) -> Vec<u8> {
    let Shape { h, w, c, .. } = shape;
    let (height, width) = table_pixels(shape, columns);
    let mut pixels = vec![GAP_VALUE; height * width * c];
    for (index, image) in images.chunks_exact(h * w * c).enumerate() {
        let (top, left) = (GAP + index / columns * (h + GAP), GAP + index % columns * (w + GAP));
        for (y, row) in image.chunks_exact(w * c).enumerate() {
            pixels[((top + y) * width + left) * c..][..w * c].copy_from_slice(row);
        }
    }
    pixels
}

/// Rows and columns of images, so that the grid is about square in pixels.
fn grid_extent(shape: Shape) -> (usize, usize) {
    let Shape { n, h, w, .. } = shape;
    let columns = (((n * h) as f64 / w as f64).sqrt().ceil() as usize).clamp(1, n);
    (n.div_ceil(columns), columns)
}

/// Rows and columns of the grid in pixels.
fn grid_pixels(shape: Shape) -> (usize, usize) {
    table_pixels(shape, columns(shape))
}

/// The same with so many images in a row.
fn table_pixels(shape: Shape, columns: usize) -> (usize, usize) {
    (shape.n.div_ceil(columns) * (shape.h + GAP) + GAP, columns * (shape.w + GAP) + GAP)
}

fn png(path: &Path, h: usize, w: usize, c: usize, pixels: &[u8]) -> Result<Vec<u8>> {
    let color = if c == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let mut bytes = Vec::new();
    image::codecs::png::PngEncoder::new(&mut bytes)
        .write_image(pixels, w as u32, h as u32, color)
        .map_err(|e| Error::file(path, format!("cannot be written as PNG: {e}")))?;
    Ok(bytes)
}

/// Rows and columns of a PNG; `None` for bytes that do not begin as one.
pub(crate) fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    // Signature, then the chunk IHDR: length, name, columns, rows.
    let header = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR")?;
    let [w, h] = [0, 4].map(|at| header.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes));
    Some((h?, w?)).filter(|(h, w)| *h > 0 && *w > 0)
}

fn check(path: &Path, shape: Shape, bytes: usize) -> Result<()> {
    assert!(!shape.is_empty() && bytes == shape.len(), "{bytes} bytes for images of {shape}");
    check_channels(path, shape.c)
}

/// Whether images of so many channels are pictures: grey or in colour.
pub fn are_pictures(channels: usize) -> bool {
    matches!(channels, 1 | 3)
}

fn check_channels(path: &Path, channels: usize) -> Result<()> {
    if !are_pictures(channels) {
        let what = format!("images of {channels} channels are no pictures; only 1 and 3 are, use FILE.npz");
        return Err(Error::file(path, what));
    }
    Ok(())
}

/// Refuses a folder that is not empty: old images would mix with new ones.
fn refuse_full_folder(path: &Path) -> Result<()> {
    let mut entries =
        std::fs::read_dir(path).map_err(|e| Error::file(path, format!("is no folder to write to: {e}")))?;
    if entries.next().is_some() {
        return Err(Error::file(path, "is not empty; give a new or an empty folder"));
    }
    Ok(())
}
