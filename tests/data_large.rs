//! Data in archives and tables, and data that stay on disk: .zip, .tar, .parquet, CIFAR for Python, and .ddpm, which
//! any source is converted into. The inputs are made here.

#[path = "support/places.rs"]
mod places;
#[path = "support/sources.rs"]
mod sources;

use std::fs;
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use ddpm_cuda::checkpoint::{DataMark, Origin};
use ddpm_cuda::config::{Config, OnBadImage, Size};
use ddpm_cuda::data::{self, Converted, Data, Progress, Source};
use image::{ExtendedColorType, ImageEncoder, ImageFormat};
use parquet::basic::{Compression, Repetition, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use sources::{Folder, all, load, open, refusal, refuses};

/// Images, labels, held-out images and names: what must be the same however the data came.
fn content(data: &Data) -> (Vec<u8>, Option<Vec<u32>>, Vec<u8>, Vec<String>) {
    let labels = data.train.labels().map(<[u32]>::to_vec);
    (all(&data.train), labels, all(&data.held_out), data.classes.clone())
}

/// Pixels of image `i`, colour, no two alike.
fn pixels(i: usize, h: usize, w: usize) -> Vec<u8> {
    (0..h * w * 3).map(|k| (k * (2 * i + 3) + i * 41 + k / 17) as u8).collect()
}

fn png(i: usize, h: usize, w: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    encoder.write_image(&pixels(i, h, w), w as u32, h as u32, ExtendedColorType::Rgb8).unwrap();
    bytes
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, *content).unwrap();
    }
    archive.into_inner().unwrap()
}

fn zip(members: &[(&str, &[u8])], method: zip::CompressionMethod) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, content) in members {
        archive.start_file(*name, zip::write::SimpleFileOptions::default().compression_method(method)).unwrap();
        archive.write_all(content).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

/// A table as `datasets` writes it, with so many rows a group: image {bytes, path}, label, and the names of the
/// classes. `None` is a cell without bytes.
fn parquet(images: &[Option<Vec<u8>>], labels: Option<&[i64]>, names: &[&str], group: usize) -> Vec<u8> {
    let leaf = |name: &str, physical| {
        Arc::new(Type::primitive_type_builder(name, physical).with_repetition(Repetition::OPTIONAL).build().unwrap())
    };
    let image = Type::group_type_builder("image")
        .with_repetition(Repetition::OPTIONAL)
        .with_fields(vec![leaf("bytes", Physical::BYTE_ARRAY), leaf("path", Physical::BYTE_ARRAY)])
        .build()
        .unwrap();
    let mut fields = vec![Arc::new(image)];
    fields.extend(labels.map(|_| leaf("label", Physical::INT64)));
    let schema = Arc::new(Type::group_type_builder("schema").with_fields(fields).build().unwrap());
    let features = serde_json::json!({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}});
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_key_value_metadata(Some(vec![KeyValue::new("huggingface".into(), features.to_string())]))
        .build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
    for (k, images) in images.chunks(group).enumerate() {
        let mut rows = writer.next_row_group().unwrap();
        let bytes: Vec<ByteArray> = images.iter().flatten().map(|bytes| bytes.clone().into()).collect();
        let levels: Vec<i16> = images.iter().map(|bytes| if bytes.is_some() { 2 } else { 1 }).collect();
        let mut column = rows.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&bytes, Some(&levels), None).unwrap();
        column.close().unwrap();
        let mut column = rows.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[], Some(&vec![1; images.len()]), None).unwrap();
        column.close().unwrap();
        if let Some(labels) = labels {
            let mut column = rows.next_column().unwrap().unwrap();
            let labels = &labels[k * group..][..images.len()];
            column.typed::<Int64Type>().write_batch(labels, Some(&vec![1; labels.len()]), None).unwrap();
            column.close().unwrap();
        }
        rows.close().unwrap();
    }
    writer.into_inner().unwrap()
}

#[derive(Default)]
struct Said(Vec<String>, Vec<(usize, usize, usize)>);

impl Progress for Said {
    fn say(&mut self, line: &str) {
        self.0.push(line.into());
    }

    fn images(&mut self, before: usize, done: usize, images: usize) {
        self.1.push((before, done, images));
    }
}

fn convert_with(config: &Config, out: &Path) -> ddpm_cuda::error::Result<Converted> {
    data::convert(Source::open(config)?, config, out, &mut Said::default())
}

#[track_caller]
fn convert(source: &Path, out: &Path) -> Converted {
    convert_with(&open(source), out).unwrap_or_else(|e| panic!("{e}"))
}

/// The same image in every lossless format is the same pixels.
#[test]
fn every_format_of_a_folder() {
    let folder = Folder::new();
    let (h, w) = (6, 9);
    let image = image::RgbImage::from_raw(w, h, pixels(4, 6, 9)).unwrap();
    for (name, format) in [
        ("a.png", ImageFormat::Png),
        ("b.webp", ImageFormat::WebP),
        ("c.tif", ImageFormat::Tiff),
        ("d.TIFF", ImageFormat::Tiff),
        ("e.bmp", ImageFormat::Bmp),
    ] {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        folder.put(name, bytes.get_ref());
    }
    // A GIF of two frames, of which the first is taken; its four colours are its own.
    let palette = [0, 0, 0, 255, 0, 0, 0, 255, 0, 10, 20, 30];
    let index = |i: usize| (i % 4) as u8;
    let mut gif = Vec::new();
    let mut encoder = gif::Encoder::new(&mut gif, w as u16, h as u16, &palette).unwrap();
    let frame: Vec<u8> = (0..54).map(index).collect();
    encoder.write_frame(&gif::Frame::from_indexed_pixels(w as u16, h as u16, frame, None)).unwrap();
    encoder.write_frame(&gif::Frame::from_indexed_pixels(w as u16, h as u16, vec![3; 54], None)).unwrap();
    drop(encoder);
    folder.put("f.gif", &gif);
    let data = load(folder.path());
    assert_eq!((data.train.len(), data.notes.len()), (6, 0), "{:?}", data.notes);
    for i in 0..5 {
        assert_eq!(data.train.image(i), pixels(4, 6, 9), "image {i}");
    }
    let colours: Vec<u8> = (0..54).flat_map(|i| palette[3 * usize::from(index(i))..][..3].to_vec()).collect();
    assert_eq!(data.train.image(5), colours);

    // Cut short, each is refused or, where what is cut is no pixel, the same.
    for name in ["b.webp", "c.tif", "e.bmp", "f.gif"] {
        let whole = fs::read(folder.at(name)).unwrap();
        for len in [1, 12, 20, whole.len() / 2] {
            let cut = folder.put(name, &whole[..len]);
            let sentence = refusal(&mut open(folder.path()), &cut);
            assert!(sentence.contains("is not a whole image: "), "{sentence}");
        }
        folder.put(name, &whole);
    }
    // Numbers with a fraction have no range that anybody knows.
    let floats = image::Rgb32FImage::from_raw(9, 6, vec![0.5; 162]).unwrap();
    let mut bytes = Cursor::new(Vec::new());
    image::DynamicImage::ImageRgb32F(floats).write_to(&mut bytes, ImageFormat::Tiff).unwrap();
    let deep = folder.put("deep.tif", bytes.get_ref());
    assert!(refusal(&mut open(folder.path()), &deep).contains("holds numbers with a fraction"));
    // No room is made for a frame of 40195x2308 pixels on a screen of 6x9: in the image's descriptor, behind two bytes
    // each for left and top, are its width and height.
    let folder = Folder::new();
    let descriptor = gif.iter().position(|&byte| byte == b',').unwrap();
    gif[descriptor + 5..descriptor + 9].copy_from_slice(&[0x04, 0x09, 0x03, 0x9d]);
    let large = folder.put("large.gif", &gif);
    let sentence = refusal(&mut open(folder.path()), &large);
    assert!(sentence.contains("is not a whole image: Memory limit exceeded"), "{sentence}");
}

#[test]
fn zip_archives_are_read_as_their_folders() {
    let folder = Folder::new();
    let list = br#"{"labels": [["00000/img0.png", 1], ["00000/img1.png", 0], ["00001/img2.png", 2]]}"#;
    let images = [png(0, 5, 4), png(1, 5, 4), png(2, 5, 4)];
    let names = ["00000/img0.png", "00000/img1.png", "00001/img2.png"];
    names.iter().zip(&images).for_each(|(name, image)| drop(folder.put(&format!("edm/{name}"), image)));
    // In another order, with litter and a comment that is no image.
    let members: Vec<(&str, &[u8])> = vec![
        (names[2], &images[2]),
        (names[0], &images[0]),
        ("__MACOSX/._img0.png", b"x"),
        ("readme.txt", b"x"),
        (names[1], &images[1]),
    ];
    for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
        // Without a list folders are classes.
        let archive = folder.put("a.zip", &zip(&members, method));
        let data = load(&archive);
        assert_eq!(content(&data), content(&load(&folder.at("edm"))), "{method}");
        assert_eq!(data.train.labels(), Some(&[0, 0, 1][..]));
        let listed = folder.put("listed.zip", &zip(&[&members[..], &[("dataset.json", list)]].concat(), method));
        assert_eq!(load(&listed).train.labels(), Some(&[1, 0, 2][..]));
    }
    // An archive cut anywhere is refused; a member that is damaged is named.
    let whole = zip(&members, zip::CompressionMethod::Stored);
    for len in (2..whole.len()).step_by(37) {
        let cut = folder.put("cut.zip", &whole[..len]);
        assert!(data::load(&mut open(&cut)).is_err(), "{len} bytes of {}", whole.len());
    }
    let mut flipped = whole.clone();
    let at = flipped.windows(4).position(|bytes| bytes == b"IDAT").unwrap();
    flipped[at + 8] ^= 0x55;
    let flipped = folder.put("flipped.zip", &flipped);
    let sentence = refusal(&mut open(&flipped), &flipped.join(names[2]));
    assert!(sentence.contains("is not a whole image"), "{sentence}");
}

#[test]
fn tar_shards_in_the_way_of_webdataset() {
    let folder = Folder::new();
    let images: Vec<Vec<u8>> = (0..5).map(|i| png(i, 5, 4)).collect();
    let shard = |range: std::ops::Range<usize>| {
        let names: Vec<[String; 2]> = range.clone().map(|i| [format!("{i:06}.png"), format!("{i:06}.cls")]).collect();
        let labels: Vec<String> = range.clone().map(|i| format!("{}\n", i % 3)).collect();
        let members: Vec<(&str, &[u8])> = range
            .clone()
            .flat_map(|i| {
                let k = i - range.start;
                [(&*names[k][0], &*images[i]), (&*names[k][1], labels[k].as_bytes())]
            })
            .collect();
        tar(&members)
    };
    folder.put("x-000009.tar", &shard(0..2));
    folder.put("x-000010.tar", &shard(2..5));
    let want: Vec<u8> = (0..5).flat_map(|i| pixels(i, 5, 4)).collect();
    // The folder, a pattern that counts, one that matches.
    for source in [folder.path().to_path_buf(), folder.at("x-{000009..000010}.tar"), folder.at("x-*.tar")] {
        let data = load(&source);
        assert_eq!(all(&data.train), want, "{}", source.display());
        assert_eq!(data.train.labels(), Some(&[0, 1, 2, 0, 1][..]));
        let said = data.notes.join("\n");
        assert!(said.contains("2 archives of 5 images together") && said.contains("by the .cls or .json"), "{said}");
    }
    let missing = folder.at("x-{000009..000011}.tar");
    assert!(refusal(&mut open(&missing), &missing).contains("names a file that does not exist"));
    // One shard; labels in .json; two pictures of one sample; folders instead of labels.
    assert_eq!(load(&folder.at("x-000009.tar")).train.len(), 2);
    let json = tar(&[("a.seg.png", &images[0]), ("a.png", &images[1]), ("a.json", br#"{"label": 7, "x": [1]}"#)]);
    assert_eq!(load(&folder.put("json.tar", &json)).train.labels(), Some(&[7, 7][..]));
    let folders = tar(&[("./cat/1.png", &images[0]), ("./dog/1.png", &images[1]), ("./dog/._2.png", b"x")]);
    let data = load(&folder.put("folders.tar", &folders));
    assert_eq!((data.classes.join(","), data.train.labels()), ("cat,dog".into(), Some(&[0, 1][..])));

    // Labels that are none stop only who needs them.
    let wrong = folder.put("wrong.tar", &tar(&[("a.png", &images[0]), ("a.cls", b"cat")]));
    assert!(load(&wrong).train.labels().is_none());
    let mut config = open(&wrong);
    config.model.classes = 2;
    let sentence = refusal(&mut config, &wrong.join("a.png"));
    assert!(sentence.contains("has the label cat in its .cls file; a class number is expected"), "{sentence}");
    let partly = folder.put("partly.tar", &tar(&[("a.png", &images[0]), ("a.cls", b"1"), ("b.png", &images[1])]));
    config.data = partly.display().to_string();
    assert!(refusal(&mut config, &partly.join("b.png")).contains("has no label"));

    // Cut within a member it is refused, behind one it may be whole.
    let whole = shard(0..2);
    let cut = folder.put("cut.tar", &whole[..whole.len() - 1024 - 512]);
    refuses(&cut, "is not a whole tar archive (a member of 2 bytes reaches beyond its end)");
    let unmarked = load(&folder.put("unmarked.tar", &whole[..whole.len() - 1024]));
    assert!(unmarked.notes.iter().any(|note| note.contains("has no mark at its end and may be cut short")));
    let mut wrong = whole.clone();
    wrong[0] ^= 1;
    refuses(&folder.put("sum.tar", &wrong), "is not a whole tar archive (archive header checksum mismatch)");
    refuses(&folder.put("none.tar", &tar(&[("a.txt", b"text")])), "holds no image file");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&whole).unwrap();
    refuses(&folder.put("a.tar.gz", &gzip.finish().unwrap()), "is a compressed tar archive; unpack it with gunzip");
}

#[test]
fn parquet_tables_in_the_way_of_hugging_face() {
    let folder = Folder::new();
    let images: Vec<Option<Vec<u8>>> = (0..7).map(|i| Some(png(i, 5, 4))).collect();
    let labels = [2, 0, 1, 1, 0, 2, 2];
    let names = ["red", "green", "blue"];
    folder.put("data/train-00000-of-00002.parquet", &parquet(&images[..3], Some(&labels[..3]), &names, 2));
    folder.put("data/train-00001-of-00002.parquet", &parquet(&images[3..5], Some(&labels[3..5]), &names, 9));
    let want: Vec<u8> = (0..5).flat_map(|i| pixels(i, 5, 4)).collect();
    for source in [folder.path().to_path_buf(), folder.at("data/train-*.parquet")] {
        let data = load(&source);
        assert_eq!(all(&data.train), want, "{}", source.display());
        assert_eq!(data.train.labels(), Some(&[2, 0, 1, 1, 0][..]));
        assert_eq!((data.classes.join(","), data.held_out.len()), ("red,green,blue".into(), 0));
    }
    // The survey knows sizes and classes, and which shards are held out.
    folder.put("data/validation-00000-of-00001.parquet", &parquet(&images[5..], Some(&labels[5..]), &names, 1));
    let source = Source::open(&open(folder.path())).unwrap();
    let survey = source.survey();
    assert_eq!((survey.images, survey.held_out, survey.channels), (7, true, 3));
    let data = load(folder.path());
    assert_eq!((all(&data.train), data.held_out.labels()), (want, Some(&[2, 2][..])));
    // Without labels.
    let plain = folder.put("plain.parquet", &parquet(&images, None, &names, 3));
    assert!(load(&plain).train.labels().is_none());
    let mut config = open(&plain);
    config.model.classes = 3;
    assert!(refusal(&mut config, &plain).contains("has no column of labels"));
    // No image in a cell, or none at all.
    let empty = folder.put("empty.parquet", &parquet(&[images[0].clone(), None], None, &[], 9));
    let sentence = refusal(&mut open(&empty), &empty.join("row 1"));
    assert!(sentence.contains("its cell holds no bytes"), "{sentence}");
    refuses(&folder.put("zero.parquet", &parquet(&[], None, &[], 9)), "holds no rows");
    // Cut short or changed, it is refused or read, and no panic leaves the reader.
    let whole = fs::read(&plain).unwrap();
    for len in [4, 8, 40, whole.len() / 2, whole.len() - 1] {
        refuses(&folder.put("cut.parquet", &whole[..len]), "is a table that cannot be read (");
    }
    for at in (4..whole.len()).step_by(5) {
        let mut changed = whole.clone();
        changed[at] ^= 0x41;
        if let Err(error) = data::load(&mut open(&folder.put("changed.parquet", &changed))) {
            assert!(!error.to_string().contains('\n'), "byte {at}: {error}");
        }
    }
}

/// No room is made for what a page claims: its dictionary of 100 values becomes one of 8191 in the same bytes.
#[test]
fn a_table_that_claims_more_than_it_has_is_refused() {
    let folder = Folder::new();
    let images: Vec<Option<Vec<u8>>> = (0..100).map(|i| Some(png(i, 5, 4))).collect();
    let mut table = parquet(&images, None, &[], 100);
    assert_eq!(load(&folder.put("whole.parquet", &table)).train.len(), 100);
    // The header of a dictionary's page, field 7, a struct, and its first field, a number in zigzag.
    let header = [0x4c, 0x15, 0xc8, 0x01];
    let at = table.windows(4).position(|bytes| bytes == header).expect("a dictionary of 100 values");
    table[at + 2..at + 4].copy_from_slice(&[0xfe, 0x7f]);
    let claims = folder.put("claims.parquet", &table);
    let sentence = refusal(&mut open(&claims), &claims);
    assert!(
        sentence.contains("is a table that cannot be read (") && sentence.contains("claims 8191 values"),
        "{sentence}"
    );
    // A set of 268 million numbers in the header of the first page, which the library would seek behind the file's end.
    let mut table = parquet(&images, None, &[], 100);
    table[6..13].copy_from_slice(&[0xea, 0xf7, 0xf5, 0xff, 0xff, 0xff, 0x00]);
    refuses(&folder.put("set.parquet", &table), "is a table that cannot be read (");
    // Equal rows take little room, but not this little: 100,000 of them become 1,048,575.
    let mut table = parquet(&vec![Some(png(1, 5, 4)); 100_000], None, &[], 100_000);
    let (rows, more) = ([0xc0, 0x9a, 0x0c], [0xfe, 0xff, 0x7f]);
    for at in 0..table.len() - rows.len() {
        if table[at..].starts_with(&rows) {
            table[at..at + 3].copy_from_slice(&more);
        }
    }
    let len = table.len();
    refuses(&folder.put("rows.parquet", &table), &format!("claims 1048575 rows in {len} bytes; it is damaged"));
}

/// The pickles are those of Python 2, as of the files that are handed out.
#[test]
fn cifar_for_python() {
    fn text(text: &str) -> Vec<u8> {
        [b"U", &[text.len() as u8][..], text.as_bytes()].concat()
    }
    fn list(items: &[Vec<u8>]) -> Vec<u8> {
        [b"](".to_vec(), items.concat(), b"e".to_vec()].concat()
    }
    fn array(rows: usize, bytes: &[u8]) -> Vec<u8> {
        let whole = |n: usize| [b"J", &(n as i32).to_le_bytes()[..]].concat();
        [
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01".to_vec(),
            whole(rows),
            whole(bytes.len() / rows.max(1)),
            b"\x86cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T"
                .to_vec(),
            (bytes.len() as u32).to_le_bytes().to_vec(),
            bytes.to_vec(),
            b"tb".to_vec(),
        ]
        .concat()
    }
    fn batch(key: &str, labels: &[u8], planes: &[u8]) -> Vec<u8> {
        let labels: Vec<Vec<u8>> = labels.iter().map(|&l| vec![b'K', l]).collect();
        let entries =
            [text("batch_label"), text("one"), text(key), list(&labels), text("data"), array(labels.len(), planes)];
        [b"\x80\x02}q\x01(".to_vec(), entries.concat(), b"u.".to_vec()].concat()
    }
    let planes = |i: usize| -> Vec<u8> { (0..3072).map(|k| (k * 7 + i * 13 + k / 1024) as u8).collect() };
    let folder = Folder::new();
    folder.put("data_batch_1", &batch("labels", &[3, 9], &[planes(0), planes(1)].concat()));
    folder.put("data_batch_2", &batch("labels", &[0], &planes(2)));
    folder.put("test_batch", &batch("labels", &[5], &planes(3)));
    let names: Vec<Vec<u8>> = (0..10).map(|k| text(&format!("kind {k}"))).collect();
    folder.put("batches.meta", &[b"\x80\x02}(".to_vec(), text("label_names"), list(&names), b"u.".to_vec()].concat());
    let data = load(folder.path());
    let upright = |i: usize| -> Vec<u8> {
        let planes = planes(i);
        (0..1024).flat_map(|p| [planes[p], planes[1024 + p], planes[2048 + p]]).collect()
    };
    assert_eq!(all(&data.train), [upright(0), upright(1), upright(2)].concat());
    assert_eq!((data.train.labels(), data.held_out.labels()), (Some(&[3, 9, 0][..]), Some(&[5][..])));
    assert_eq!((all(&data.held_out), &*data.classes[7]), (upright(3), "kind 7"));
    assert!(data.notes[0].contains("without data_batch_3, data_batch_4, data_batch_5"), "{:?}", data.notes);

    let of_100 = Folder::new();
    let train = of_100.put("train", &batch("fine_labels", &[99, 0], &[planes(0), planes(1)].concat()));
    of_100.put("test", &batch("fine_labels", &[4], &planes(2)));
    let data = load(of_100.path());
    assert_eq!((data.train.labels(), data.held_out.len()), (Some(&[99, 0][..]), 1));
    refuses(&train, "is a Python pickle; if it is a part of CIFAR, give its folder");

    // What it does not hold, and what nobody executes.
    let first = folder.at("data_batch_1");
    for (content, want) in [
        (batch("labels", &[3, 10], &[planes(0), planes(1)].concat()), "holds at image 1 another label than 0 to 9"),
        (batch("labels", &[3], &[planes(0), planes(1)].concat()), "holds an array data of 1x6144"),
        (batch("labelz", &[3], &planes(0)), "holds no list labels"),
        (b"\x80\x02}(U\x04dataK\x01u.".to_vec(), "holds no array data"),
        (b"\x80\x02cposix\nsystem\nU\x04true\x85R.".to_vec(), "names posix.system, which is not read"),
        (b"\x80\x02}(U\x04data".to_vec(), "cut short or damaged"),
    ] {
        fs::write(&first, content).unwrap();
        let sentence = refusal(&mut open(folder.path()), &first);
        assert!(sentence.contains(want), "{sentence}\nshould say: {want}");
    }
}

/// Of each kind of source a .ddpm file holds the same images, labels, split and names.
#[test]
fn every_source_becomes_a_file_of_ready_bytes() {
    let folder = Folder::new();
    let images: Vec<Vec<u8>> = (0..9).map(|i| png(i, 6 + i % 2, 8)).collect();
    for (i, image) in images.iter().enumerate() {
        let split = if i < 6 { "train" } else { "val" };
        folder.put(&format!("pictures/{split}/{}/{i}.png", ["b", "a10", "a9"][i % 3]), image);
    }
    let cells: Vec<Option<Vec<u8>>> = images.iter().cloned().map(Some).collect();
    let labels: Vec<i64> = (0..9).map(|i| i % 4).collect();
    folder.put("t/train-0.parquet", &parquet(&cells, Some(&labels), &["a", "b", "c", "d"], 2));
    let members: Vec<(String, &[u8])> =
        images.iter().enumerate().map(|(i, image)| (format!("{i}.png"), &**image)).collect();
    let members: Vec<(&str, &[u8])> = members.iter().map(|(name, image)| (&**name, *image)).collect();
    folder.put("a.tar", &tar(&members));
    folder.put("a.zip", &zip(&members, zip::CompressionMethod::Stored));
    let header = [[0, 0, 8, 3], 9u32.to_be_bytes(), 6u32.to_be_bytes(), 8u32.to_be_bytes()].concat();
    folder.put("digits", &[header, pixels(1, 9, 16)].concat());
    for source in ["pictures", "t", "a.tar", "a.zip", "digits"] {
        let (path, out) = (folder.at(source), folder.at(&format!("{source}.ddpm")));
        let mut config = open(&path);
        config.model.image_size = Size { h: 5, w: 4 };
        let made = convert_with(&config, &out).unwrap_or_else(|e| panic!("{source}: {e}"));
        let direct = data::load(&mut config.clone()).unwrap();
        let mapped = load(&out);
        assert_eq!(made.images, direct.train.len() + direct.held_out.len(), "{source}");
        assert_eq!(content(&mapped), content(&direct), "{source}");
        assert!(mapped.train.is_mapped() && !direct.train.is_mapped());
        mapped.train.check_all().unwrap();
        // The same data, whichever way they are told apart.
        let (a, b) = (mapped.fingerprint(), direct.fingerprint());
        assert!(a.starts_with("images:") && a != b, "{a} {b}");
        assert_eq!((mapped.fingerprint_like(&b), direct.fingerprint_like(&a)), (b, a), "{source}");
        // Held-out images are split off by their number alone, and a size of their own is fitted in memory.
        let split = |path: &Path| {
            let mut config = open(path);
            (config.held_out, config.model.image_size) = (0.3, Size { h: 5, w: 4 });
            data::load(&mut config).unwrap()
        };
        assert_eq!(content(&split(&out)), content(&split(&path)), "{source}");
        let mut smaller = open(&out);
        smaller.model.image_size = Size::square(2);
        assert_eq!(data::load(&mut smaller).unwrap().train.extent().size, Size::square(2));
        assert!(!data::part_of(&out).exists());
        let again = convert_with(&config, &out).err().unwrap().to_string();
        assert!(again.contains("exists; remove it, or give another name"), "{again}");
    }
    let own_size = convert_with(&open(&folder.at("a.zip")), &folder.at("own.ddpm")).err().unwrap().to_string();
    assert!(own_size.contains("give all images one size, or fix one with --set image_size"), "{own_size}");
}

/// The format, byte by byte, as docs/data.md says it.
#[test]
fn the_format_is_as_it_is_written_down() {
    let folder = Folder::new();
    folder.put("x/train/k/1.png", &png(1, 2, 3));
    folder.put("x/train/l/2.png", &png(2, 2, 3));
    folder.put("x/test/l/3.png", &png(3, 2, 3));
    let out = folder.at("x.ddpm");
    convert(&folder.at("x"), &out);
    let bytes = fs::read(&out).unwrap();
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    assert_eq!((&bytes[..8], u32_at(8), u32_at(12)), (&b"ddpmdata"[..], 1, 3));
    assert_eq!((u64_at(16), u64_at(24)), (2, 1), "training and held-out images");
    assert_eq!([32, 36, 40, 44].map(u32_at), [2, 3, 3, 0]);
    let (hashes, labels, text, text_len, len) = (u64_at(48), u64_at(56), u64_at(64), u64_at(72), u64_at(80));
    assert_eq!((hashes, labels, text, len), (4096 + 56, 4096 + 56 + 24, 4096 + 56 + 36, bytes.len()));
    assert_eq!(text + text_len, len);
    assert_eq!(bytes[4096..4096 + 54], [pixels(1, 2, 3), pixels(2, 2, 3), pixels(3, 2, 3)].concat());
    for i in 0..3 {
        let image = &bytes[4096 + 18 * i..][..18];
        assert_eq!(u64_at(hashes + 8 * i) as u64, twox_hash::XxHash3_64::oneshot(image));
    }
    assert_eq!([0, 4, 8].map(|at| u32_at(labels + at)), [0, 1, 1]);
    assert_eq!(&bytes[text..], br#"{"classes":["k","l"]}"#);
    let covered = [&bytes[..96], &bytes[hashes..]].concat();
    assert_eq!(bytes[96..112], twox_hash::XxHash3_128::oneshot(&covered).to_le_bytes());
    assert!(bytes[112..4096].iter().all(|&b| b == 0) && bytes[4096 + 54..hashes] == [0, 0]);
}

#[test]
fn a_damaged_file_of_ready_bytes_is_refused() {
    let folder = Folder::new();
    for i in 0..20 {
        folder.put(&format!("x/{}/{i}.png", i % 2), &png(i, 4, 4));
    }
    let out = folder.at("x.ddpm");
    convert(&folder.at("x"), &out);
    let whole = fs::read(&out).unwrap();
    let damaged = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        folder.put(name, &bytes)
    };
    for len in [0, 7, 8, 100, 4095, 4096, 5000, whole.len() - 1] {
        let path = damaged("cut.ddpm", &|bytes| bytes.truncate(len));
        assert!(data::load(&mut open(&path)).is_err(), "{len} bytes");
    }
    refuses(&damaged("cut.ddpm", &|bytes| bytes.truncate(4095)), "ends within its header; it is cut short");
    refuses(
        &damaged("cut.ddpm", &|bytes| bytes.truncate(4500)),
        "has 4500 bytes where its header says 5317; it is cut short or damaged",
    );
    refuses(&damaged("cut.ddpm", &|bytes| _ = bytes.pop()), "it is cut short or damaged, so convert the source again");
    refuses(
        &damaged("many.ddpm", &|bytes| bytes[18] = 1),
        "claims 65556 images of 4x4x3, more than its 5317 bytes hold",
    );
    refuses(&damaged("long.ddpm", &|bytes| bytes.push(0)), "bytes where its header says");
    refuses(&damaged("v.ddpm", &|bytes| bytes[8] = 2), "is a .ddpm file of version 2; version 1 is read");
    // Any byte of header and tables; a size whose product is beyond every number.
    for at in (8..96).chain(4096 + 20 * 48..whole.len()) {
        let path = damaged("flip.ddpm", &|bytes| bytes[at] ^= 0x11);
        assert!(data::load(&mut open(&path)).is_err(), "byte {at}");
    }
    let huge = damaged("huge.ddpm", &|bytes| bytes[32..44].fill(0xff));
    assert!(refusal(&mut open(&huge), &huge).contains("so convert the source again"));
    // A pixel is noticed when it is used.
    let pixel = damaged("pixel.ddpm", &|bytes| bytes[4096 + 48 * 7 + 5] ^= 1);
    let data = load(&pixel);
    data.train.check(&[6, 8]).unwrap();
    for error in [data.train.check(&[6, 7]).unwrap_err(), data.train.check_all().unwrap_err()] {
        assert!(error.to_string().contains("holds another image 7 than was written"), "{error}");
    }
    // Unfinished.
    let part = damaged("part.ddpm", &|bytes| bytes[4..8].copy_from_slice(b"part"));
    refuses(&part, "is an unfinished conversion; run its ddpm-cuda data again");
}

/// What is left out is left out wherever the images come from, and in the same way.
#[test]
fn bad_images_are_skipped_if_that_is_asked_for() {
    let folder = Folder::new();
    for i in 0..12 {
        folder.put(&format!("x/{}/{i:02}.png", i % 3), &png(i, 9, 9));
    }
    let whole = fs::read(folder.at("x/1/04.png")).unwrap();
    folder.put("x/1/04.png", &whole[..whole.len() - 30]); // its header is whole
    folder.put("x/0/06.png", b"<html>"); // it has none
    let mut config = open(&folder.at("x"));
    let sentence = refusal(&mut config, &folder.at("x"));
    assert!(sentence.contains("2 of its 12 images cannot be used; mend or remove 0/06.png"), "{sentence}");
    assert!(sentence.ends_with("or leave them out with --on-bad-image skip"), "{sentence}");
    config.on_bad_image = OnBadImage::Skip;
    let data = data::load(&mut config.clone()).unwrap();
    let kept = [0, 3, 9, 1, 7, 10, 2, 5, 8, 11];
    assert_eq!(all(&data.train), kept.iter().flat_map(|&i| pixels(i, 9, 9)).collect::<Vec<_>>());
    assert_eq!(data.train.labels(), Some(&[0, 0, 0, 1, 1, 1, 2, 2, 2, 2][..]));
    let listed: Vec<String> = data.skipped.iter().map(|image| image.to_string()).collect();
    assert!(listed[0].contains("x/0/06.png: it is a web page") && listed[1].contains("x/1/04.png: "), "{listed:?}");
    assert!(data.notes.iter().any(|note| note.starts_with("2 images cannot be used and are left out: 0/06.png (")));

    let out = folder.at("x.ddpm");
    let made = convert_with(&config, &out).unwrap();
    assert_eq!((made.images, made.skipped.len()), (10, 2));
    assert_eq!(content(&load(&out)), content(&data));
    load(&out).train.check_all().unwrap();
    // Without leave it is refused, and names all.
    config.on_bad_image = OnBadImage::Stop;
    fs::write(folder.at("x/0/06.png"), &whole[..whole.len() - 20]).unwrap();
    let error = convert_with(&config, &folder.at("y.ddpm")).err().unwrap().to_string();
    assert!(error.contains("2 of its 12 images cannot be used; mend or remove 0/06.png"), "{error}");
    assert!(!folder.at("y.ddpm").exists() && data::part_of(&folder.at("y.ddpm")).exists());
    // All are bad.
    for file in fs::read_dir(folder.at("x/2")).unwrap() {
        fs::write(file.unwrap().path(), b"").unwrap();
    }
    let mut none = open(&folder.at("x/2"));
    none.on_bad_image = OnBadImage::Skip;
    assert!(refusal(&mut none, &folder.at("x/2")).contains("4 of its 4 images cannot be used"));
}

fn ddpm() -> Command {
    let mut command = Command::new(places::program());
    command.stdin(Stdio::null()).env_remove("DDPM_TRACE");
    command
}

#[track_caller]
fn ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{command:?}: {}\n{said}{}", out.status, String::from_utf8_lossy(&out.stderr));
    said
}

/// Killed at any moment, a conversion leaves nothing under the final name, and goes on to the same bytes.
#[test]
fn a_killed_conversion_goes_on_to_the_same_bytes() {
    let folder = Folder::new();
    let images: Vec<Vec<u8>> = (0..3000).map(|i| png(i % 300, 16, 12)).collect();
    let cells: Vec<Option<Vec<u8>>> = images.iter().cloned().map(Some).collect();
    folder.put("t.parquet", &parquet(&cells, Some(&vec![1; cells.len()]), &["a", "b"], 100));
    for (i, image) in images.iter().enumerate() {
        folder.put(&format!("x/{i}.png"), image);
    }
    folder.put("x/700.png", &images[0][..images[0].len() / 2]);
    for source in ["x", "t.parquet"] {
        let command = |out: &Path| {
            let mut command = ddpm();
            command.arg("data").arg(folder.at(source)).arg("--out").arg(out);
            command.args(["--on-bad-image", "skip"]);
            command
        };
        let whole = folder.at("whole.ddpm");
        let begun = std::time::Instant::now();
        ok(&mut command(&whole));
        let took = begun.elapsed();
        let out = folder.at("killed.ddpm");
        let spawn = || command(&out).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // At any moment, before its first image too.
        for k in 0..4 {
            let mut child = spawn();
            std::thread::sleep(took.mul_f64(0.25 * f64::from(k)));
            child.kill().unwrap();
            child.wait().unwrap();
        }
        // And when some images are there: the first has a hash, behind the images. A quick machine may have come to
        // the end by then, and begins anew.
        let hash = (4096 + images.len() * 16 * 12 * 3) as u64;
        let has_begun = || {
            let Ok(mut file) = fs::File::open(data::part_of(&out)) else { return false };
            let mut bytes = [0; 8];
            file.seek(SeekFrom::Start(hash)).is_ok() && file.read_exact(&mut bytes).is_ok() && bytes != [0; 8]
        };
        let mut tries = 0;
        drop(fs::remove_file(&out));
        while !has_begun() {
            tries += 1;
            assert!(tries <= 100, "no conversion of 100 was killed before its end");
            drop(fs::remove_file(&out));
            let mut child = spawn();
            while !has_begun() && child.try_wait().unwrap().is_none() {
                std::thread::yield_now();
            }
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(!out.exists(), "what is unfinished has another name");
        let said = ok(&mut command(&out));
        assert!(said.contains("images are there already"), "{said}");
        assert!(fs::read(&out).unwrap() == fs::read(&whole).unwrap(), "{source}: the same bytes");
        [&out, &whole].iter().for_each(|file| fs::remove_file(file).unwrap());
    }
}

/// A broken-off conversion of another source, or at another size, is not gone on with.
#[test]
fn another_conversion_begins_anew() {
    let folder = Folder::new();
    (0..4).for_each(|i| drop(folder.put(&format!("x/{i}.png"), &png(i, 8, 8))));
    let (mut config, out) = (open(&folder.at("x")), folder.at("x.ddpm"));
    config.on_bad_image = OnBadImage::Stop;
    let good = fs::read(folder.at("x/3.png")).unwrap();
    folder.put("x/3.png", &good[..good.len() - 20]);
    assert!(convert_with(&config, &out).is_err());
    // Mended, it is another source, and so the three that were done are done again.
    folder.put("x/3.png", &good);
    let mut said = Said::default();
    data::convert(Source::open(&config).unwrap(), &config, &out, &mut said).unwrap();
    assert!(said.0.iter().any(|line| line.ends_with("is of another source or size, and begins anew")), "{:?}", said.0);
    assert_eq!(said.1, [(0, 0, 4), (0, 4, 4)]);
    assert_eq!(all(&load(&out).train), (0..4).flat_map(|i| pixels(i, 8, 8)).collect::<Vec<_>>());
}

/// The weights of a run do not depend on whether its images come from a folder, a table, an archive or a .ddpm file; a
/// run that began on one goes on on the other; and it says how long it waited for data.
#[test]
fn training_on_a_file_gives_the_bits_of_training_on_its_source() {
    let folder = Folder::new();
    let images: Vec<Vec<u8>> = (0..40).map(|i| png(i, 14, 12)).collect();
    images.iter().enumerate().for_each(|(i, image)| drop(folder.put(&format!("x/{i:02}.png"), image)));
    let cells: Vec<Option<Vec<u8>>> = images.into_iter().map(Some).collect();
    let table = folder.put("t.parquet", &parquet(&cells, None, &[], 7));
    let file = folder.at("x.ddpm");
    let said = ok(ddpm().arg("data").arg(folder.at("x")).arg("--out").arg(&file).args(["--image-size", "8"]));
    assert!(said.contains("40 images of 8x8x3") && said.contains("images/s"), "{said}");
    let train = |source: &Path, run: &str, steps: &str| {
        let mut command = ddpm();
        command.args(["train", "--device", "cpu", "--steps", steps, "--batch", "4", "--out"]).arg(folder.at(run));
        command.arg("--data").arg(source);
        for set in [
            "image_size=8",
            "widths=8,8",
            "groups=4",
            "attention_resolutions=",
            "sample_every=0",
            "validate_every=5",
            "log_every=3",
            "checkpoint_every=6",
            "held_out=0.2",
        ] {
            command.args(["--set", set]);
        }
        ok(&mut command)
    };
    let weights = |run: &str, step: u32| {
        let folder = folder.at(run).join(format!("checkpoints/{step}"));
        fs::read(folder.join("training_state.safetensors")).unwrap()
    };
    train(&folder.at("x"), "of_folder", "12");
    train(&table, "of_table", "12");
    train(&file, "of_file", "12");
    for run in ["of_table", "of_file"] {
        assert!(weights(run, 12) == weights("of_folder", 12), "{run}: other bits than of the folder");
    }
    // Half of it on the folder, half on the file, and the other way round.
    for (first, second, run) in [(&folder.at("x"), &file, "a"), (&file, &folder.at("x"), "b")] {
        train(first, run, "6");
        ok(ddpm().args(["train", "--steps", "12", "--resume"]).arg(folder.at(run)).arg("--data").arg(second));
        assert!(weights(run, 12) == weights("of_folder", 12), "{run}: other bits after a resume");
    }
    // Another file is refused.
    folder.put("x/00.png", &png(77, 14, 12));
    let other = folder.at("other.ddpm");
    ok(ddpm().arg("data").arg(folder.at("x")).arg("--out").arg(&other).args(["--image-size", "8"]));
    let out =
        ddpm().args(["train", "--steps", "20", "--resume"]).arg(folder.at("b")).arg("--data").arg(&other).output();
    let refused = String::from_utf8(out.unwrap().stderr).unwrap();
    assert!(refused.contains("as before, but with other pixels or labels"), "{refused}");

    let waits = |run: &str| -> Vec<serde_json::Value> {
        let log = fs::read_to_string(folder.at(run).join("metrics.jsonl")).unwrap();
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    for line in waits("of_file") {
        assert!(line["data_waits"].as_u64().is_some_and(|n| n <= 3), "{line}");
        assert!(line["data_wait_s"].as_f64().is_some_and(|s| (0.0..60.0).contains(&s)), "{line}");
    }
    assert!(waits("of_folder").iter().all(|line| line.get("data_waits").is_none()));
    // A pixel that has changed on disk ends the run with the file's name.
    let mut bytes = fs::read(&file).unwrap();
    bytes[4096..4096 + 40 * 192].iter_mut().for_each(|b| *b ^= 1);
    fs::write(&other, bytes).unwrap();
    let mut command = ddpm();
    command.args(["train", "--steps", "2", "--set", "widths=8", "--set", "groups=4", "--out"]).arg(folder.at("c"));
    let out = command.arg("--data").arg(&other).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("other.ddpm: holds another image"), "{said}");
}

/// Checkpoints know the data by its hash, whether it was read or mapped.
#[test]
fn a_mark_knows_the_data_either_way() {
    let folder = Folder::new();
    (0..6).for_each(|i| drop(folder.put(&format!("x/{i}.png"), &png(i, 8, 8))));
    convert(&folder.at("x"), &folder.at("x.ddpm"));
    let (read, mapped) = (load(&folder.at("x")), load(&folder.at("x.ddpm")));
    let marks = [(&read, "x"), (&mapped, "x.ddpm")].map(|(data, name)| DataMark::of(&open(&folder.at(name)), data));
    assert_eq!(marks[0].extent, marks[1].extent);
    assert!(marks[0].fingerprint != marks[1].fingerprint && marks[1].fingerprint.starts_with("images:"));
    assert!(Origin::read(folder.path()).unwrap().is_none());
}

/// The program with 140 MB of memory for its data (`ulimit -d`), to which what it maps does not count.
#[cfg(target_os = "linux")]
fn limited(args: &[&str]) -> Output {
    let mut command = Command::new("bash");
    let script = "ulimit -d 140000; exec \"$@\"";
    command.args(["-c", script, "bash"]).arg(places::program()).args(args).env("RAYON_NUM_THREADS", "2");
    command.stdin(Stdio::null()).output().unwrap()
}

/// Two steps within this limit.
#[cfg(target_os = "linux")]
fn train_limited(data: &str, run: &Path, size: &str) -> Output {
    let size = format!("image_size={size}");
    let settings = ["widths=8,8", "groups=4", "attention_resolutions=", "sample_every=0", "held_out=0", &size];
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    let args = ["train", "--steps", "2", "--batch", "1", "--out", run.to_str().unwrap(), "--data", data];
    limited(&args.into_iter().chain(settings).collect::<Vec<_>>())
}

/// Arrays larger than memory are converted, to the same bytes as with memory for all, and otherwise refused with the
/// command for it.
#[cfg(target_os = "linux")]
#[test]
fn arrays_that_do_not_fit_are_converted() {
    const IMAGES: usize = 12_000;
    let folder = Folder::new();
    let (channels, side) = (3, 64);
    let of_image = channels * side * side;
    // 147 MB, as planes, with long repetitions.
    let element = |i: usize, k: usize| (i * 5 + k / side + k % 7) as u8;
    let elements: Vec<u8> = (0..IMAGES).flat_map(|i| (0..of_image).map(move |k| element(i, k))).collect();
    let npy = |descr: &str, shape: &str, body: &[u8]| {
        let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
        let header = format!("{header:<117}\n");
        [b"\x93NUMPY\x01\0", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), body].concat()
    };
    let array = npy("|u1", &format!("({IMAGES}, {channels}, {side}, {side})"), &elements);
    let labels = npy("|u1", &format!("({IMAGES},)"), &(0..IMAGES).map(|i| (i % 9) as u8).collect::<Vec<_>>());
    let archive = zip(&[("images.npy", &array), ("labels.npy", &labels)], zip::CompressionMethod::Deflated);
    let transposed = "emnist-letters-train-images-idx3-ubyte.gz";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&[0, 0, 8, 3]).unwrap();
    [IMAGES, channels * side, side].iter().for_each(|&n| gzip.write_all(&(n as u32).to_be_bytes()).unwrap());
    gzip.write_all(&elements).unwrap();
    let gzip = gzip.finish().unwrap();

    for (name, content, refused) in [
        ("planes.npy", array, "12000 images of 64x64x3 take 0.14 GiB, but "),
        ("planes.npz", archive, "its array 'images' takes 0.14 GiB, but "),
        (transposed, gzip, "its content takes more than the "),
    ] {
        let source = folder.put(name, &content);
        let path = source.to_str().unwrap();
        let stem = source.file_stem().unwrap().to_str().unwrap();
        let file = folder.at(&format!("{stem}-{}.ddpm", content.len()));
        let out = limited(&["data", path, "--out", file.to_str().unwrap()]);
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        let whole = folder.at("whole.ddpm");
        ok(ddpm().arg("data").arg(&source).arg("--out").arg(&whole));
        assert!(fs::read(&file).unwrap() == fs::read(&whole).unwrap(), "{name}: other bytes than without a limit");
        fs::remove_file(&whole).unwrap();
        let data = load(&file);
        let image = IMAGES - 5;
        let (h, w, c) = if name == transposed { (side, channels * side, 1) } else { (side, side, channels) };
        let at = |y: usize, x: usize, z: usize| if c == 1 { x * side + y } else { (z * side + y) * side + x };
        let pixels = (0..h * w * c).map(|k| element(image, at(k / c / w, k / c % w, k % c)));
        assert_eq!(data.train.image(image), pixels.collect::<Vec<_>>(), "{name}");
        assert_eq!(data.train.labels().is_some(), name == "planes.npz");

        let said = String::from_utf8(train_limited(path, &folder.at("run"), "64").stderr).unwrap();
        let offer = format!("with ddpm-cuda data {path} --out {stem}.ddpm");
        assert!(said.contains(refused) && said.contains(&offer), "{said}");
        assert!(said.contains(&format!("and give --data {stem}.ddpm, which stays on disk")), "{said}");
        fs::remove_file(&source).unwrap();
        // What is converted is converted once more, to another size.
        if name == "planes.npy" {
            let path = file.to_str().unwrap();
            let said = String::from_utf8(train_limited(path, &folder.at("run"), "62").stderr).unwrap();
            assert!(said.contains("-62.ddpm --image-size 62, and give"), "{said}");
            let small = folder.at("small.ddpm");
            let out = limited(&["data", path, "--out", small.to_str().unwrap(), "--image-size", "8"]);
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            let mut fitted = open(&file);
            fitted.model.image_size = Size::square(8);
            assert!(all(&load(&small).train) == all(&data::load(&mut fitted).unwrap().train), "at another size");
            fs::remove_file(&small).unwrap();
        }
        fs::remove_file(&file).unwrap();
    }
    // Nothing is left of what was unpacked.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Data that do not fit into memory are refused with the command that converts them.
#[cfg(target_os = "linux")]
#[test]
fn what_does_not_fit_is_offered_the_conversion() {
    let folder = Folder::new();
    // 12,000 flat images of 64x64x3, 147 MB decoded and little on disk.
    let mut flat = Vec::new();
    let image = vec![9; 64 * 64 * 3];
    let encoder = image::codecs::png::PngEncoder::new(&mut flat);
    encoder.write_image(&image, 64, 64, ExtendedColorType::Rgb8).unwrap();
    let names: Vec<String> = (0..12000).map(|i| format!("{i:05}.png")).collect();
    let members: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, &*flat)).collect();
    let source = folder.put("flat.tar", &tar(&members));
    let path = source.to_str().unwrap();
    let train = |data: &str| train_limited(data, &folder.at("run"), "64");
    let out = train(path);
    let said = String::from_utf8(out.stderr).unwrap();
    let offer = format!(
        "convert them once with ddpm-cuda data {path} --out flat.ddpm --image-size 64, and give --data flat.ddpm"
    );
    assert!(said.contains("12000 images of 64x64x3 take 0.14 GiB") && said.contains(&offer), "{said}");
    let file = folder.at("flat.ddpm");
    let out = limited(&["data", path, "--out", file.to_str().unwrap(), "--image-size", "64"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let out = train(file.to_str().unwrap());
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));

    // 8,700 of them, 107 MB, fit, but the run does not beside them.
    let source = folder.put("fewer.tar", &tar(&members[..8700]));
    fs::remove_dir_all(folder.at("run")).unwrap();
    let said = String::from_utf8(train(source.to_str().unwrap()).stderr).unwrap();
    let beside = "GiB are available beside its images, which take 0.10 GiB; convert them once with ddpm-cuda data ";
    assert!(said.contains("this run needs ") && said.contains(beside), "{said}");
}
