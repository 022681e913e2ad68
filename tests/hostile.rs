//! Files that the fuzz targets found: what a reader says about them is one sentence, without a period, that the
//! terminal shows as it is.

#[path = "support/places.rs"]
mod places;
#[path = "support/torch.rs"]
mod torch;

use std::fs;
use std::path::Path;

use ddpm_cuda::checkpoint;
use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data;
use ddpm_cuda::device::Device;
use ddpm_cuda::error::Error;
use torch::View;
use zip::CompressionMethod;

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

/// The library would make room for them before it finds that they are not there.
#[test]
fn a_table_whose_schema_claims_two_billion_columns_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.parquet");
    // Version 1; a schema of one group by the name of x with 2^31 - 1 children; no rows in no groups.
    let metadata = b"\x15\x02\x19\x1c\x48\x01x\x15\xfe\xff\xff\xff\x0f\x00\x16\x00\x19\x0c\x00";
    let table = [b"PAR1", &metadata[..], &(metadata.len() as u32).to_le_bytes(), b"PAR1"].concat();
    fs::write(&path, table).unwrap();
    let said = refusal(&path);
    assert!(said.contains("its metadata do not hold together"), "{said}");
}

#[test]
fn a_jpeg_without_components_is_refused_without_a_period() {
    let frame = b"\xff\xd8\xff\xc0\x00\x08\x08\x00\x02\x00\x02\x00\xff\xda\x00\x06\x00\x00\x3f\x00\xff\xd9";
    refusal_of("a.jpg", frame);
}

/// The library would make room for 311 MiB before it finds that there are no Huffman tables.
#[test]
fn a_jpeg_of_a_few_bytes_that_claims_millions_of_pixels_is_refused() {
    let frame = b"\xff\xd8\xff\xc0\x00\x0b\x08\x63\x72\x32\x08\x01\x01\x11\x00\xff\xdb\x00\x43\x00";
    let scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\xff\xd9";
    let said = refusal_of("a.jpg", &[&frame[..], &[1; 64], scan].concat());
    assert!(said.contains("96 bytes are too few for 25458x12808 pixels"), "{said}");
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

/// The refusal of a file of weights.
fn refusal_of_weights(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    fs::write(&path, bytes).unwrap();
    let error = checkpoint::load(&Device::cpu(), &path).err().expect("the file is unsound");
    let said = error.to_string();
    assert!(matches!(error, Error::File { .. }) && said.starts_with(&path.display().to_string()), "{said}");
    assert!(!said.ends_with('.') && !said.contains(char::is_control), "{said:?}");
    said
}

/// The refusal of an archive with this pickle and one storage of 24 bytes.
fn refusal_of_pickle(pickle: &[u8]) -> String {
    let entries: [(&str, &[u8]); 2] = [("data.pkl", pickle), ("data/0", &[0; 24])];
    refusal_of_weights(&torch::archive(&entries, CompressionMethod::Stored))
}

/// A matrix of 2x3 in a storage of 6 numbers.
const MATRIX: View<'static> =
    View { name: "w", class: "FloatStorage", key: "0", len: 6, offset: 0, shape: &[2, 3], strides: &[3, 1] };

#[test]
fn a_pickle_that_calls_anything_is_refused_by_its_name() {
    for (pickle, name) in [
        (&b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."[..], "os.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.", "posix.system"),
        (b"\x80\x02cbuiltins\neval\n.", "builtins.eval"),
        (b"\x80\x02ctorch\nload\n.", "torch.load"),
        (b"\x80\x02c__builtin__\ngetattr\nctorch._utils\n_rebuild_tensor_v2\n.", "__builtin__.getattr"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n.", "numpy.core.multiarray.scalar"),
    ] {
        let said = refusal_of_pickle(pickle);
        let want = format!("names {name}, which is not read: a pickle of tensors and plain containers is expected");
        assert!(said.contains(&want), "{said}\nshould say: {want}");
    }
}

#[test]
fn a_pickle_that_does_not_hold_together_is_refused() {
    let sound = torch::pickle(&[MATRIX]);
    let said = refusal_of_pickle(&sound);
    assert!(said.contains("lacks time_embed.0.weight, so it is no U-Net of improved- or guided-diffusion"), "{said}");
    for (pickle, want) in [
        (&b""[..], "it ends within an instruction"),
        (&sound[..sound.len() - 1], "it ends within an instruction"),
        (b"\x80\x00.", "holds a pickle of protocol 0; 2 to 5 are read"),
        (b"\x80\x02.", "an instruction without its operand"),
        (b"\x80\x02(.", "an instruction without its operand"),
        (b"\x80\x02t.", "an end without its beginning"),
        (b"\x80\x02h\x05.", "it recalls what was never remembered"),
        (b"\x80\x02NNs.", "an entry of what is no dictionary"),
        (b"\x80\x02}(Nu.", "a key without a value"),
        (b"\x80\x02X\xff\xff\xff\xffab.", "it ends within an instruction"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffab.", "it ends within an instruction"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "a text that is not UTF-8"),
        (b"\x80\x02NQ.", "a reference that is no storage"),
        (b"\x80\x02N)R.", "a call of what is no name"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "a call whose arguments do not fit"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01R.", "a call whose arguments do not fit"),
        (b"\x80\x02N}b.", "holds the state of a Python object"),
        (b"\x80\x02I5\n.", "holds the pickle instruction 0x49, which is not read"),
        (b"\x80\x02c\xff\n\n.", "a name that is not UTF-8"),
        (b"\x80\x02N.", "holds no dictionary from names to tensors; save the state_dict of the network"),
        (b"\x80\x02}.", "holds no dictionary from names to tensors"),
        (b"\x80\x02}K\x01K\x02s.", "holds no dictionary from names to tensors"),
    ] {
        let said = refusal_of_pickle(pickle);
        assert!(said.contains(want), "{pickle:?}: {said}\nshould say: {want}");
    }
    // Far more than its own length would take to hold.
    let many = [&b"\x80\x02"[..], &vec![b'N'; 5 << 20], b"."].concat();
    assert!(refusal_of_pickle(&many).contains("holds a pickle of more than 4194304 instructions"));
    // A million levels deep, which must not take a stack as deep.
    let deep = [&b"\x80\x02N"[..], &vec![0x85; 1 << 20], b"."].concat();
    assert!(refusal_of_pickle(&deep).contains("holds no dictionary from names to tensors"));
}

#[test]
fn a_tensor_beyond_its_storage_is_refused() {
    let most = usize::MAX >> 1;
    for view in [
        View { offset: 1, ..MATRIX },
        View { strides: &[4, 1], ..MATRIX },
        View { shape: &[3, 3], ..MATRIX },
        View { len: 7, ..MATRIX },
        View { class: "DoubleStorage", ..MATRIX },
        View { offset: most, ..MATRIX },
        View { len: most, ..MATRIX },
        View { shape: &[1 << 32, 1 << 32], strides: &[0, 0], ..MATRIX },
        View { shape: &[1 << 20, 1 << 20], strides: &[0, 0], ..MATRIX },
        View { strides: &[usize::MAX >> 1, 1], ..MATRIX },
    ] {
        let said = refusal_of_pickle(&torch::pickle(&[view]));
        assert!(said.contains("holds w, which lies beyond its storage; it is damaged"), "{said}");
    }
    let said = refusal_of_pickle(&torch::pickle(&[View { key: "1", ..MATRIX }]));
    assert!(said.contains("refers to the storage 1, which it does not hold"), "{said}");
    let said = refusal_of_pickle(&torch::pickle(&[MATRIX, MATRIX]));
    assert!(said.contains("holds w twice"), "{said}");
}

#[test]
fn an_archive_that_is_no_pytorchs_is_refused() {
    let pickle = torch::pickle(&[MATRIX]);
    let archive = |entries: &[(&str, &[u8])]| torch::archive(entries, CompressionMethod::Stored);
    for (bytes, want) in [
        (archive(&[("data/0", &[0; 24])]), "is an archive without data.pkl; a file that torch.save wrote is expected"),
        (archive(&[("data.pkl", &pickle), ("data/0", &[0; 20])]), "holds w, which lies beyond its storage"),
        (
            archive(&[("data.pkl", &pickle), ("byteorder", b"big"), ("data/0", &[0; 24])]),
            "was written on a big-endian machine, which is not read",
        ),
        (archive(&[("data.pkl", &pickle), ("constants.pkl", b"")]), "is a TorchScript program; save the state_dict"),
        (
            torch::archive(&[("data.pkl", &pickle), ("data/0", &[0; 24])], CompressionMethod::Deflated),
            "holds model/data/0 compressed; PyTorch stores tensors as they are",
        ),
        (b"PK\x03\x04".to_vec(), "is not a whole file of PyTorch ("),
        (b"".to_vec(), "is not a whole file of PyTorch ("),
        (b"version https://git-lfs".to_vec(), "is a pointer of Git LFS, not the weights"),
    ] {
        let said = refusal_of_weights(&bytes);
        assert!(said.contains(want), "{said}\nshould say: {want}");
    }
    let whole = archive(&[("data.pkl", &pickle), ("data/0", &[0; 24])]);
    for len in (0..whole.len()).step_by(7) {
        refusal_of_weights(&whole[..len]);
    }
}

#[test]
fn a_file_of_pytorch_before_1_6_that_is_cut_short_is_refused() {
    let path = places::fixture("openai/guided_legacy").join("model.pt");
    let whole = fs::read(path).unwrap();
    for len in [15, 16, 20, 100, 1000, 20_000, whole.len() / 2, whole.len() - 1] {
        refusal_of_weights(&whole[..len]);
    }
    let magic = &whole[..15];
    let said = refusal_of_weights(&[magic, b"\x80\x02K\x05."].concat());
    assert!(said.contains("is a file of PyTorch before 1.6 whose version is not 1001"), "{said}");
    // No storage may claim more numbers than the file has.
    let pickles =
        [&b"\x80\x02M\xe9\x03."[..], b"\x80\x02}.", &torch::pickle(&[MATRIX]), b"\x80\x02]X\x01\x00\x00\x000a."];
    let said = refusal_of_weights(&[magic, &pickles.concat(), &u64::MAX.to_le_bytes(), &[0; 24]].concat());
    assert!(said.contains("a storage reaches beyond its end"), "{said}");
    let said = refusal_of_weights(&[magic, &pickles.concat(), &6u64.to_le_bytes(), &[0; 24]].concat());
    assert!(said.contains("lacks time_embed.0.weight"), "{said}");
}

/// Whatever becomes of a byte, the reader says a sentence or reads the pickle: no panic, and no memory without end.
#[test]
fn any_byte_of_a_pickle_may_be_another() {
    let plain = torch::pickle(&[MATRIX]);
    let wrapped = [b"\x80\x02}X\x05\x00\x00\x00model", &plain[2..plain.len() - 1], b"s."].concat();
    for pickle in [plain, wrapped] {
        for at in 0..pickle.len() {
            for byte in [0, 1, 0x7f, 0x80, 0xff, b'(', b't', b'R', b'h', pickle[at].wrapping_add(1)] {
                let mut changed = pickle.clone();
                changed[at] = byte;
                refusal_of_pickle(&changed);
            }
        }
    }
}
