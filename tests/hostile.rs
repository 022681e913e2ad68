//! Files that the fuzz targets found: what a reader says about them is one sentence, without a period, that the
//! terminal shows as it is.

use std::fs;
use std::path::Path;

use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data;
use ddpm_cuda::error::Error;

/// The refusal of the data set at `path`.
fn refusal(path: &Path) -> String {
    let source = path.to_str().unwrap().to_string();
    let mut config = Config { data: source, held_out: 0.0, ..Config::preset(Preset::Mnist) };
    (config.model.image_size, config.model.channels) = (Size::DATA, 0);
    let said = data::load(&mut config).err().expect("the file is damaged").to_string();
    assert!(!said.ends_with('.') && !said.contains(char::is_control), "{said:?}");
    said
}

/// The refusal of a folder with one file.
fn refusal_of(name: &str, bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), bytes).unwrap();
    refusal(folder.path())
}

fn chunk(kind: &[u8], contents: &[u8]) -> Vec<u8> {
    let whole = [kind, contents].concat();
    let length = (contents.len() as u32).to_be_bytes();
    // CRC-32, bit by bit.
    let sum = !whole.iter().fold(!0u32, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xEDB8_8320 } else { sum >> 1 })
    });
    [&length[..], &whole, &sum.to_be_bytes()].concat()
}

#[test]
fn a_png_with_a_filter_that_does_not_exist_is_refused_without_a_period() {
    // 2x1 grey pixels behind filter 73, in a stored block.
    let rows = b"\x78\x01\x01\x03\x00\xfc\xff\x49\x00\x00\x00\x95\x00\x4a";
    let header = [0, 0, 0, 2, 0, 0, 0, 1, 8, 0, 0, 0, 0];
    let png = [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), chunk(b"IDAT", rows), chunk(b"IEND", b"")];
    let said = refusal_of("a.png", &png.concat());
    assert!(said.contains("73"), "{said}");
}

#[test]
fn a_jpeg_without_components_is_refused_without_a_period() {
    let frame = b"\xff\xd8\xff\xc0\x00\x08\x08\x00\x02\x00\x02\x00\xff\xda\x00\x06\x00\x00\x3f\x00\xff\xd9";
    refusal_of("a.jpg", frame);
}

#[test]
fn an_array_named_with_control_characters_does_not_command_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    let mut archive = zip::ZipWriter::new(fs::File::create(&path).unwrap());
    archive.start_file("mean\u{1b}[2J\n\u{6}.npy", zip::write::SimpleFileOptions::default()).unwrap();
    archive.finish().unwrap();
    let said = refusal(&path);
    assert!(said.contains("mean\\u{1b}[2J\\n\\u{6}"), "{said}");
}

#[test]
fn classes_named_with_control_characters_do_not_command_the_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let record = |label: u8| [vec![label], vec![9; 3072]].concat();
    fs::write(folder.path().join("data_batch_1.bin"), [record(0), record(1)].concat()).unwrap();
    let names = "a\u{1b}[2Jb\n".to_string() + &"cat\u{7}\n".repeat(9);
    fs::write(folder.path().join("batches.meta.txt"), names).unwrap();
    let source = folder.path().to_str().unwrap().to_string();
    let mut config = Config { data: source, held_out: 0.0, ..Config::preset(Preset::Cifar10) };
    config.model.classes = 10; // eight of them have no images, which is said with the names of the others
    let notes = data::load(&mut config).unwrap().notes.join("|");
    assert!(!notes.contains(char::is_control) && notes.contains("a\\u{1b}[2Jb"), "{notes:?}");
    let said = Error::Usage("--class \u{1b}[2J: no".into()).to_string();
    assert_eq!(said, "--class \\u{1b}[2J: no");
}

#[test]
fn an_array_whose_header_opens_many_braces_is_refused_at_once() {
    let header = format!("{{'descr': '>f5', 'fortran_order': False, 'shape': ({}), }}\n", "{".repeat(26));
    let length = (header.len() as u16).to_le_bytes();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npy");
    fs::write(&path, [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes()].concat()).unwrap();
    let said = refusal(&path);
    assert!(said.contains("nested too deeply"), "{said}");
}

#[test]
fn a_path_with_a_newline_does_not_break_the_sentence() {
    let said = Error::file("a\nb", "is empty").to_string();
    assert_eq!(said, "a\\nb: is empty");
}
