//! Writing NumPy's .npy and .npz, and other zip archives.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use npyz::{AutoSerialize, WriterBuilder};
use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

use super::atomic;
use crate::error::Result;
use crate::tensor::Shape;

/// Writes a `.npy` file of f32 in C order.
///
/// # Errors
/// `Error::File` if it cannot be written.
pub fn write_npy(path: &Path, shape: &[usize], data: &[f32]) -> Result<()> {
    assert_eq!(shape.iter().product::<usize>(), data.len(), "an array of shape {shape:?}");
    write_npy_from(path, shape, data.iter().copied())
}

/// The same of elements that are made as they are written.
///
/// # Errors
/// `Error::File` if it cannot be written, or if the elements are too few.
pub fn write_npy_from(path: &Path, shape: &[usize], elements: impl Iterator<Item = f32>) -> Result<()> {
    atomic::write_with(path, |file| write_array(file, shape, elements))
}

/// Writes a `.npz` file as OpenAI's evaluator reads it: `arr_0`, bytes of shape `(n, h, w, c)`, and with labels
/// `arr_1`, i64 of shape `(n)`. Uncompressed, like `numpy.savez`.
///
/// # Errors
/// `Error::File` if it cannot be written.
pub fn write_npz(path: &Path, shape: Shape, images: &[u8], labels: Option<&[u32]>) -> Result<()> {
    assert_eq!(shape.len(), images.len(), "bytes for images of {shape}");
    assert!(labels.is_none_or(|labels| labels.len() == shape.n), "one label per image");
    write_npz_parts(path, shape, std::iter::once(Ok(images)), labels.map(|labels| labels.iter().copied()))
}

/// The same of images that come in parts, and of as many labels: nothing but a part is in memory.
///
/// # Errors
/// `Error::File` if it cannot be written, and for the errors of the parts.
pub fn write_npz_parts<P: AsRef<[u8]>>(
    path: &Path,
    shape: Shape,
    parts: impl Iterator<Item = io::Result<P>>,
    labels: Option<impl Iterator<Item = u32>>,
) -> Result<()> {
    write_archive(path, |archive| {
        start(archive, "arr_0.npy", shape.len())?;
        let extent = [shape.n, shape.h, shape.w, shape.c].map(|d| d as u64);
        let mut array = npyz::WriteOptions::new().default_dtype().shape(&extent).writer(&mut *archive).begin_nd()?;
        for part in parts {
            array.extend(part?.as_ref().iter().copied())?;
        }
        array.finish()?;
        if let Some(labels) = labels {
            start(archive, "arr_1.npy", 8 * shape.n)?;
            write_array(&mut *archive, &[shape.n], labels.map(i64::from))?;
        }
        Ok(())
    })
}

/// Writes a zip archive. `fill` adds its entries.
///
/// # Errors
/// `Error::File` if it cannot be written.
pub(crate) fn write_archive(path: &Path, fill: impl FnOnce(&mut Archive<'_, '_>) -> io::Result<()>) -> Result<()> {
    atomic::write_with(path, |file| {
        let mut archive = zip::ZipWriter::new(Failing { to: file, failed: false, at: 0 });
        fill(&mut archive)?;
        archive.finish()?;
        Ok(())
    })
}

/// An archive that is being written.
pub(crate) type Archive<'a, 'f> = zip::ZipWriter<Failing<&'a mut BufWriter<&'f mut File>>>;

/// A writer that after its first error takes everything and drops it. An archive that is given up writes its end from
/// its destructor, which would print a second error to stderr.
pub(crate) struct Failing<W> {
    to: W,
    failed: bool,
    /// Where it writes next, or would.
    at: u64,
}

impl<W> Failing<W> {
    /// What `act` returns, or `after` once something has failed.
    fn unless_failed<T>(&mut self, after: T, act: impl FnOnce(&mut W) -> io::Result<T>) -> io::Result<T> {
        if self.failed {
            return Ok(after);
        }
        let done = act(&mut self.to);
        self.failed = done.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Interrupted);
        done
    }
}

impl<W: Write> Write for Failing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.unless_failed(bytes.len(), |to| to.write(bytes))?;
        self.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.unless_failed((), Write::flush)
    }
}

impl<W: Seek> Seek for Failing<W> {
    fn seek(&mut self, place: SeekFrom) -> io::Result<u64> {
        let after = match place {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) | SeekFrom::End(by) => self.at.saturating_add_signed(by),
        };
        self.at = self.unless_failed(after, |to| to.seek(place))?;
        Ok(self.at)
    }
}

fn start(archive: &mut zip::ZipWriter<impl Write + Seek>, name: &str, bytes: usize) -> io::Result<()> {
    // Entries beyond 4 GiB need ZIP64; the header of the array is far below a KiB.
    let large = bytes as u64 + 1024 > u64::from(u32::MAX);
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(large);
    Ok(archive.start_file(name, options)?)
}

fn write_array<T: AutoSerialize>(to: impl Write, shape: &[usize], elements: impl Iterator<Item = T>) -> io::Result<()> {
    let shape: Vec<u64> = shape.iter().map(|&d| d as u64).collect();
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(&shape).writer(to).begin_nd()?;
    writer.extend(elements)?;
    writer.finish()
}
