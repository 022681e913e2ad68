//! Inputs to start from, made by code instead of kept as files, and writers of the formats for them.

use std::io::{Cursor, Write};
use std::sync::Arc;

use image::{DynamicImage, ImageFormat};
use parquet::basic::{Compression, Repetition, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
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

/// What a Parquet table holds, and how it is written.
pub struct Table {
    /// Files of images; `None` is a cell without one.
    pub images: Vec<Option<Vec<u8>>>,
    /// A class for each, if there is a column of them.
    pub labels: Option<Vec<i64>>,
    /// How pages are compressed.
    pub compression: Compression,
    /// True if equal cells are stored once.
    pub dictionary: bool,
    /// True for data pages of the format's second version.
    pub second_version: bool,
}

impl Default for Table {
    /// Without rows, written in the plainest way.
    fn default() -> Self {
        let compression = Compression::UNCOMPRESSED;
        Table { images: Vec::new(), labels: None, compression, dictionary: false, second_version: false }
    }
}

/// A Parquet table as `datasets` writes it, with one group of rows: image {bytes, path}, label, and the names of the
/// classes.
pub fn table(table: &Table) -> Vec<u8> {
    let Table { images, labels, compression, dictionary, second_version } = table;
    let node = |node: parquet::errors::Result<Type>| Arc::new(node.expect("a sound schema"));
    let leaf =
        |name, kind| node(Type::primitive_type_builder(name, kind).with_repetition(Repetition::OPTIONAL).build());
    let cells = vec![leaf("bytes", Physical::BYTE_ARRAY), leaf("path", Physical::BYTE_ARRAY)];
    let image = Type::group_type_builder("image").with_repetition(Repetition::OPTIONAL).with_fields(cells);
    let mut fields = vec![node(image.build())];
    fields.extend(labels.as_ref().map(|_| leaf("label", Physical::INT64)));
    let schema = node(Type::group_type_builder("schema").with_fields(fields).build());
    let names = r#"{"info": {"features": {"label": {"names": ["a", "b", "c"]}}}}"#;
    let version = if *second_version { WriterVersion::PARQUET_2_0 } else { WriterVersion::PARQUET_1_0 };
    let properties = WriterProperties::builder()
        .set_compression(*compression)
        .set_dictionary_enabled(*dictionary)
        .set_writer_version(version)
        .set_key_value_metadata(Some(vec![KeyValue::new("huggingface".into(), names.to_string())]));
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties.build())).expect("in memory");
    let mut rows = writer.next_row_group().expect("in memory");
    let bytes: Vec<ByteArray> = images.iter().flatten().map(|bytes| bytes.clone().into()).collect();
    let there: Vec<i16> = images.iter().map(|image| if image.is_some() { 2 } else { 1 }).collect();
    for (cells, levels) in [(&bytes[..], &there), (&[], &vec![1; images.len()])] {
        let mut column = rows.next_column().expect("in memory").expect("two columns at least");
        column.typed::<ByteArrayType>().write_batch(cells, Some(levels), None).expect("in memory");
        column.close().expect("in memory");
    }
    if let Some(labels) = labels {
        let mut column = rows.next_column().expect("in memory").expect("a column of labels");
        column.typed::<Int64Type>().write_batch(labels, Some(&vec![1; labels.len()]), None).expect("in memory");
        column.close().expect("in memory");
    }
    rows.close().expect("in memory");
    writer.into_inner().expect("in memory")
}
