//! Inputs to start from, made by code instead of kept as files, and writers of the formats for them.

use std::io::{Cursor, Write};

use image::{DynamicImage, ImageFormat};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// What a target starts from.
pub struct Seeds {
    /// Inputs.
    pub inputs: Vec<Vec<u8>>,
    /// Words that the fuzzer puts into inputs: keys, values, magic numbers.
    pub words: Vec<Vec<u8>>,
}

/// With `DDPM_FUZZ_SEEDS=FOLDER` set, writes the seeds to FOLDER/inputs and FOLDER/words.dict and ends the process.
pub fn offer(seeds: impl FnOnce() -> Seeds) {
    let Some(folder) = std::env::var_os("DDPM_FUZZ_SEEDS") else { return };
    let folder = std::path::PathBuf::from(folder);
    let Seeds { inputs, words } = seeds();
    let written = || -> std::io::Result<()> {
        std::fs::create_dir_all(folder.join("inputs"))?;
        for (number, input) in inputs.iter().enumerate() {
            std::fs::write(folder.join("inputs").join(format!("seed-{number}")), input)?;
        }
        let line = |word: &Vec<u8>| {
            let bytes: String = word.iter().map(|byte| format!("\\x{byte:02X}")).collect();
            format!("\"{bytes}\"\n")
        };
        std::fs::write(folder.join("words.dict"), words.iter().map(line).collect::<String>())
    };
    written().unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    std::process::exit(0)
}

/// Bytes that look like something: a ramp.
fn ramp(count: usize) -> Vec<u8> {
    (0..count).map(|i| (7 * i) as u8).collect()
}

/// A .npy file of type `descr` and shape `shape`, with elements of `size` bytes.
pub fn npy(descr: &str, shape: &[usize], size: usize) -> Vec<u8> {
    let mut extents: String = shape.iter().map(|d| format!("{d}, ")).collect();
    if shape.len() > 1 {
        extents.truncate(extents.len() - 2);
    }
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", extents.trim_end());
    header += &" ".repeat((64 - (10 + header.len() + 1) % 64) % 64);
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    // Small numbers whatever the type, so that they can be labels.
    let count = shape.iter().product::<usize>() * size;
    bytes.extend(if size == 1 { ramp(count) } else { (0..count).map(|i| u8::from(i % size == 0)).collect() });
    bytes
}

/// An archive of named files.
pub fn npz(files: &[(&str, Vec<u8>)], method: CompressionMethod) -> Vec<u8> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in files {
        archive.start_file(*name, SimpleFileOptions::default().compression_method(method)).expect("in memory");
        archive.write_all(bytes).expect("in memory");
    }
    archive.finish().expect("in memory").into_inner()
}

/// An IDX file of unsigned bytes.
pub fn idx(extents: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, extents.len() as u8];
    bytes.extend(extents.iter().flat_map(|extent| extent.to_be_bytes()));
    let count = extents.iter().product::<u32>() as usize;
    bytes.extend(if extents.len() == 1 { vec![3; count] } else { ramp(count) });
    bytes
}

/// A PNG of an image of 4x3 pixels.
pub fn png(image: DynamicImage) -> Vec<u8> {
    encoded(image, ImageFormat::Png)
}

/// An image in any format.
pub fn encoded(image: DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).expect("in memory");
    bytes.into_inner()
}

/// A tar archive of named files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, name, *bytes).expect("in memory");
    }
    archive.into_inner().expect("in memory")
}

/// A JPEG of grey or coloured stripes.
pub fn jpeg(width: u32, height: u32, grey: bool) -> Vec<u8> {
    let pixel = |x: u32, y: u32| image::Rgb([(20 * x) as u8, (20 * y) as u8, 90]);
    let image = DynamicImage::ImageRgb8(image::ImageBuffer::from_fn(width, height, pixel));
    let image = if grey { DynamicImage::ImageLuma8(image.into_luma8()) } else { image };
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Jpeg).expect("in memory");
    bytes.into_inner()
}
