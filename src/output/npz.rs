//! Writing NumPy's .npy and .npz.

use std::io::{self, Seek, Write};
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
    atomic::write_with(path, |file| write_array(file, shape, data.iter().copied()))
}

/// Writes a `.npz` file as OpenAI's evaluator reads it: `arr_0`, bytes of shape `(n, h, w, c)`, and with labels
/// `arr_1`, i64 of shape `(n)`. Uncompressed, like `numpy.savez`.
///
/// # Errors
/// `Error::File` if it cannot be written.
pub fn write_npz(path: &Path, shape: Shape, images: &[u8], labels: Option<&[u32]>) -> Result<()> {
    assert_eq!(shape.len(), images.len(), "bytes for images of {shape}");
    atomic::write_with(path, |file| {
        let mut archive = zip::ZipWriter::new(file);
        start(&mut archive, "arr_0.npy", images.len())?;
        write_array(&mut archive, &[shape.n, shape.h, shape.w, shape.c], images.iter().copied())?;
        if let Some(labels) = labels {
            assert_eq!(labels.len(), shape.n, "one label per image");
            start(&mut archive, "arr_1.npy", 8 * labels.len())?;
            write_array(&mut archive, &[shape.n], labels.iter().map(|&l| i64::from(l)))?;
        }
        archive.finish()?;
        Ok(())
    })
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
