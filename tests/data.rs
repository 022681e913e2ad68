//! Every source of images: read correctly, and refused with the file's name if it is damaged.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{self, Data, Dataset, Order};

/// A config that takes the data as it is, with nothing held out.
fn open(source: &Path) -> Config {
    let mut config = Config::preset(Preset::Mnist);
    config.data = source.display().to_string();
    config.model.image_size = Size::DATA;
    config.model.channels = 0;
    config.held_out = 0.0;
    config
}

#[track_caller]
fn load(source: &Path) -> Data {
    data::load(&mut open(source)).unwrap_or_else(|e| panic!("{e}"))
}

/// The error of loading, which must be one sentence that begins with `names`, with exit code 1.
#[track_caller]
fn refusal(config: &mut Config, names: &Path) -> String {
    let Err(error) = data::load(config) else { panic!("{} is refused", config.data) };
    assert_eq!(error.exit_code(), 1, "{error}");
    let sentence = error.to_string();
    assert!(sentence.starts_with(&format!("{}: ", names.display())), "{sentence}");
    assert!(!sentence.contains('\n'), "{sentence}");
    sentence
}

#[track_caller]
fn refuses(source: &Path, want: &str) {
    let sentence = refusal(&mut open(source), source);
    assert!(sentence.contains(want), "{sentence}\nshould say: {want}");
}

fn all(set: &Dataset) -> Vec<u8> {
    (0..set.len()).flat_map(|i| set.image(i).to_vec()).collect()
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 37 + i / 251) as u8).collect()
}

/// A .npy file, written after the specification and not by the library that reads it.
fn npy(dtype: &str, shape: &[usize], body: &[u8]) -> Vec<u8> {
    let extents: String = shape.iter().map(|d| format!("{d},")).collect();
    let mut header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({extents}), }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(body);
    file
}

fn npz(arrays: &[(&str, Vec<u8>)], method: zip::CompressionMethod) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, array) in arrays {
        let options = zip::write::SimpleFileOptions::default().compression_method(method);
        archive.start_file(format!("{name}.npy"), options).unwrap();
        archive.write_all(array).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn idx(shape: &[u32], body: &[u8]) -> Vec<u8> {
    let mut file = vec![0, 0, 8, shape.len() as u8];
    file.extend(shape.iter().flat_map(|d| d.to_be_bytes()));
    file.extend(body);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn put(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn png(&self, name: &str, h: u32, w: u32, channels: usize, pixels: &[u8]) -> PathBuf {
        let color = if channels == 1 { image::ExtendedColorType::L8 } else { image::ExtendedColorType::Rgb8 };
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        image::save_buffer(&path, pixels, w, h, color).unwrap();
        path
    }
}

#[test]
fn mnist_is_built_in() {
    let mut config = Config::preset(Preset::Mnist);
    config.model.classes = 10;
    let data = data::load(&mut config).unwrap();
    assert_eq!((data.train.len(), data.held_out.len()), (9500, 500));
    assert_eq!(data.train.extent().to_string(), "28x28x1");
    assert!(data.notes.is_empty(), "{:?}", data.notes);
    // Each digit has between 8 and 12 per cent of the images, which are mostly black with some white.
    let labels = [data.train.labels().unwrap(), data.held_out.labels().unwrap()].concat();
    for digit in 0..10 {
        let count = labels.iter().filter(|&&l| l == digit).count();
        assert!((800..1200).contains(&count), "{count} images of {digit}");
    }
    let pixels = all(&data.train);
    let mean = pixels.iter().map(|&p| f64::from(p)).sum::<f64>() / pixels.len() as f64;
    assert!((30.0..37.0).contains(&mean), "mean {mean}");
    assert_eq!(pixels.iter().max(), Some(&255));
}

#[test]
fn the_held_out_split_is_a_partition_that_depends_on_the_count_alone() {
    let folder = Folder::new();
    // Image i holds the bytes of i, so that images can be told apart.
    let body: Vec<u8> = (0..1000u32).flat_map(|i| i.to_le_bytes()).collect();
    let path = folder.put("a.npy", &npy("|u1", &[1000, 2, 2], &body));
    let ids = |set: &Dataset| -> Vec<u32> {
        (0..set.len()).map(|i| u32::from_le_bytes(set.image(i).try_into().unwrap())).collect()
    };
    let mut config = open(&path);
    config.held_out = 0.1;
    let first = data::load(&mut config).unwrap();
    config.seed = 99;
    let second = data::load(&mut config).unwrap();
    assert_eq!(ids(&first.held_out), ids(&second.held_out), "another seed, the same split");
    assert_eq!(first.held_out.len(), 100);
    let mut together = [ids(&first.train), ids(&first.held_out)].concat();
    together.sort_unstable();
    assert_eq!(together, (0..1000).collect::<Vec<_>>());
    // Not a contiguous stretch: some from each quarter.
    for quarter in 0..4 {
        let from = ids(&first.held_out).iter().filter(|&&i| i / 250 == quarter).count();
        assert!((10..45).contains(&from), "{from} held-out images from quarter {quarter}");
    }
    config.held_out = 0.5;
    let one = folder.put("one.npy", &npy("|u1", &[1, 2, 2], &[0; 4]));
    config.data = one.display().to_string();
    let sentence = refusal(&mut config, &one);
    assert!(sentence.contains("holds 1 image, of which held_out = 0.5 would leave none"), "{sentence}");
}

#[test]
fn npy_in_every_layout() {
    let folder = Folder::new();
    let body = bytes(5 * 4 * 6 * 3);
    let last = load(&folder.put("nhwc.npy", &npy("|u1", &[5, 4, 6, 3], &body)));
    assert_eq!((last.train.extent().to_string(), last.train.len()), ("4x6x3".into(), 5));
    assert_eq!(all(&last.train), body);
    assert!(last.train.labels().is_none() && last.held_out.is_empty());

    let first = load(&folder.put("nchw.npy", &npy("|u1", &[5, 3, 4, 6], &body)));
    assert_eq!(first.train.extent().to_string(), "4x6x3");
    let at = |n: usize, c: usize, y: usize, x: usize| body[((n * 3 + c) * 4 + y) * 6 + x];
    assert_eq!(first.train.image(2)[(3 * 6 + 5) * 3 + 1], at(2, 1, 3, 5));
    assert_eq!(first.train.image(4)[2], at(4, 2, 0, 0));

    let grey = load(&folder.put("nhw.npy", &npy("|u1", &[15, 4, 6], &body)));
    assert_eq!((grey.train.extent().to_string(), all(&grey.train)), ("4x6x1".into(), body.clone()));
    // Compressed, under a name without an extension: the content decides.
    let packed = load(&folder.put("packed", &gzip(&npy("|u1", &[15, 4, 6], &body))));
    assert_eq!(all(&packed.train), body);
    // More than 4 channels, if asked for.
    let many = folder.put("many.npy", &npy("|u1", &[2, 6, 6, 5], &body[..360]));
    let mut config = open(&many);
    config.model.channels = 5;
    assert_eq!(data::load(&mut config).unwrap().train.extent().to_string(), "6x6x5");
}

#[test]
fn npz_by_the_usual_names() {
    let folder = Folder::new();
    let images = |n: usize| npy("|u1", &[n, 2, 3], &bytes(n * 6));
    for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
        let labels = npy("<i8", &[3], &[2i64, 0, 1].map(i64::to_le_bytes).concat());
        for (x, y) in [("images", "labels"), ("arr_0", "arr_1"), ("x_train", "y_train")] {
            let path = folder.put("a.npz", &npz(&[(y, labels.clone()), (x, images(3))], method));
            let data = load(&path);
            assert_eq!((all(&data.train), data.train.labels()), (bytes(18), Some(&[2, 0, 1][..])));
        }
    }
    // Labels of other types and shapes.
    for labels in [
        npy("|u1", &[3], &[2, 0, 1]),
        npy(">i2", &[3, 1], &[0, 2, 0, 0, 0, 1]),
        npy("<u4", &[3], &[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
    ] {
        let data = load(
            &folder.put("l.npz", &npz(&[("images", images(3)), ("labels", labels)], zip::CompressionMethod::Stored)),
        );
        assert_eq!(data.train.labels(), Some(&[2, 0, 1][..]));
    }
    // If there is a test set, it is held out, whatever `held_out` says.
    let both = npz(&[("x_train", images(4)), ("x_test", images(2))], zip::CompressionMethod::Stored);
    let mut config = open(&folder.put("both.npz", &both));
    config.held_out = 0.5;
    let data = data::load(&mut config).unwrap();
    assert_eq!((data.train.len(), data.held_out.len()), (4, 2));
}

#[test]
fn damaged_and_unfit_arrays() {
    let folder = Folder::new();
    let good = npy("|u1", &[5, 4, 6], &bytes(120));
    let cases: [(&str, Vec<u8>, &str); 12] = [
        ("empty.npy", vec![], "is empty"),
        ("short.npy", good[..good.len() - 1].to_vec(), "should hold 120 bytes for its shape 5x4x6, but 119 are there"),
        ("long.npy", [&good[..], &[0]].concat(), "should hold 120 bytes for its shape 5x4x6, but 121 are there"),
        ("header.npy", good[..40].to_vec(), "the file is not a .npy array"),
        ("none.npy", npy("|u1", &[0, 4, 6], &[]), "holds no images"),
        ("flat.npy", npy("|u1", &[0, 4, 0], &[]), "holds no images"),
        (
            "two.npy",
            npy("|u1", &[20, 6], &bytes(120)),
            "holds an array of shape 20x6; images are count x rows x columns",
        ),
        ("wide.npy", npy("|u1", &[1, 6, 4, 5], &bytes(120)), "with the channels (1 to 4) last or second"),
        (
            "float.npy",
            npy("<f4", &[5, 4, 6], &[0; 480]),
            "holds elements of type <f4; images are expected as uint8 ('|u1'), 0 to 255",
        ),
        ("huge.npy", npy("|u1", &[1 << 40, 1 << 40], &[]), "should hold more than any file has bytes"),
        ("object.npy", npy("|O", &[5], &[]), "Python objects"),
        ("text.npy", b"these are not images".to_vec(), "is none of .npy, .npz and IDX"),
    ];
    for (name, content, want) in cases {
        refuses(&folder.put(name, &content), want);
    }
    let mut transposed = good.clone();
    let at = good.windows(5).position(|w| w == b"False").unwrap();
    transposed[at..at + 5].copy_from_slice(b"True ");
    refuses(&folder.put("fortran.npy", &transposed), "is in Fortran order; save numpy.ascontiguousarray of it");
    refuses(&folder.path().join("missing.npy"), "cannot be read: No such file");
}

#[test]
fn damaged_and_unfit_archives() {
    let folder = Folder::new();
    let stored = zip::CompressionMethod::Stored;
    let images = npy("|u1", &[5, 4, 6], &bytes(120));
    let whole = npz(&[("images", images.clone())], zip::CompressionMethod::Deflated);
    let labelled = |labels: Vec<u8>| npz(&[("images", images.clone()), ("labels", labels)], stored);
    // An archive cut anywhere is refused without a panic.
    for cut in (2..whole.len()).step_by(7) {
        refuses(&folder.put("cut.npz", &whole[..cut]), "is not a whole .npz archive");
    }
    let mut flipped = npz(&[("images", images.clone())], stored);
    let middle = flipped.windows(4).position(|w| w == &bytes(120)[60..64]).unwrap();
    flipped[middle] ^= 1;
    refuses(&folder.put("flipped.npz", &flipped), "is not a whole .npz archive");
    refuses(
        &folder.put("names.npz", &npz(&[("foo", images.clone()), ("bar", images.clone())], stored)),
        "its arrays are: foo, bar",
    );
    refuses(&folder.put("nothing.npz", &npz(&[], stored)), "its arrays are: none");
    refuses(&folder.put("count.npz", &labelled(npy("|u1", &[4], &[0; 4]))), "holds labels of shape 4 for 5 images");
    refuses(
        &folder.put("kind.npz", &labelled(npy("<f8", &[5], &[0; 40]))),
        "holds elements of type <f8; integers are expected",
    );
    refuses(&folder.put("below.npz", &labelled(npy("|i1", &[5], &[0, 0, 255, 0, 0]))), "has label -1 at image 2");
    refuses(
        &folder.put("inner.npz", &npz(&[("images", images[..150].to_vec())], stored)),
        "its array 'images' should hold 120 bytes",
    );
}

#[test]
fn labels_must_fit_the_classes() {
    let folder = Folder::new();
    let path = folder.put(
        "a.npz",
        &npz(
            &[("images", npy("|u1", &[3, 1, 1], &[0; 3])), ("labels", npy("|u1", &[3], &[0, 5, 1]))],
            zip::CompressionMethod::Stored,
        ),
    );
    let mut config = open(&path);
    config.model.classes = 5;
    let sentence = refusal(&mut config, &path);
    assert!(
        sentence.contains("has label 5 at image 1, but classes = 5 allows 0 to 4; use --set classes=6 or more"),
        "{sentence}"
    );
    config.model.classes = 6;
    data::load(&mut config).unwrap();
    let path = folder.put("a.npy", &npy("|u1", &[3, 1, 1], &[0; 3]));
    config.data = path.display().to_string();
    assert!(refusal(&mut config, &path).contains("has no labels, which classes = 6 needs"));
}

#[test]
fn idx_files_and_folders() {
    let folder = Folder::new();
    let (images, labels) = (idx(&[4, 2, 3], &bytes(24)), idx(&[4], &[3, 1, 0, 2]));
    // A single file; a file with labels, compressed or not.
    assert!(load(&folder.put("digits", &images)).train.labels().is_none());
    for (name, beside) in [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("my-images.idx3-ubyte", "my-labels.idx1-ubyte.gz"),
        ("images", "labels"),
    ] {
        let folder = Folder::new();
        let packed = if beside.ends_with(".gz") { gzip(&labels) } else { labels.clone() };
        folder.put(beside, &packed);
        let data = load(&folder.put(name, &images));
        assert_eq!((all(&data.train), data.train.labels()), (bytes(24), Some(&[3, 1, 0, 2][..])), "{name}");
    }
    let folder = Folder::new();
    folder.put("train-images-idx3-ubyte.gz", &gzip(&images));
    folder.put("train-labels-idx1-ubyte.gz", &gzip(&labels));
    folder.put("t10k-images-idx3-ubyte.gz", &gzip(&idx(&[2, 2, 3], &[9; 12])));
    let data = load(folder.path());
    assert_eq!((data.train.len(), data.held_out.len(), data.train.labels().unwrap()[0]), (4, 2, 3));
    assert_eq!(data.train.extent().to_string(), "2x3x1");

    refuses(
        &folder.put("short", &images[..images.len() - 1]),
        "should hold 24 bytes for its extents 4x2x3, but 23 are there",
    );
    refuses(&folder.put("long", &[&images[..], &[0]].concat()), "for its extents 4x2x3, but 25 are there");
    refuses(&folder.put("head", &images[..9]), "ends within its header, after 9 bytes");
    refuses(&folder.put("empty", &idx(&[0, 2, 3], &[])), "holds no images");
    refuses(&folder.put("floats", &[&[0, 0, 13, 3], &images[4..]].concat()), "holds IDX elements of type 0x0d");
    refuses(&folder.put("one", &idx(&[4], &[0; 4])), "these may be labels");
    refuses(&folder.put("huge", &idx(&[u32::MAX; 4], &[])), "more than any file has bytes");
    let packed = gzip(&images);
    refuses(&folder.put("packed.gz", &packed[..packed.len() - 3]), "is not whole gzip data");
    let bad = folder.put("train-labels-idx1-ubyte.gz", &gzip(&idx(&[3], &[0; 3])));
    let sentence = refusal(&mut open(folder.path()), &bad);
    assert!(sentence.contains("holds 3 labels for 4 images"), "{sentence}");
}

#[test]
fn cifar_folders() {
    let folder = Folder::new();
    let record =
        |label: u8, red: u8, green: u8, blue: u8| [&[label][..], &[red; 1024], &[green; 1024], &[blue; 1024]].concat();
    folder.put("data_batch_2.bin", &record(7, 4, 5, 6));
    folder.put("data_batch_1.bin", &[record(9, 1, 2, 3), record(0, 7, 8, 9)].concat());
    folder.put("batches.meta.txt", b"airplane\n");
    let data = load(folder.path());
    assert_eq!((data.train.extent().to_string(), data.train.labels()), ("32x32x3".into(), Some(&[9, 0, 7][..])));
    assert_eq!((&data.train.image(0)[..6], &data.train.image(2)[3069..]), (&[1, 2, 3, 1, 2, 3][..], &[4, 5, 6][..]));
    assert!(data.held_out.is_empty());
    folder.put("test_batch.bin", &record(1, 0, 0, 0));
    assert_eq!(load(folder.path()).held_out.labels(), Some(&[1][..]));

    for (content, want) in [
        (record(3, 0, 0, 0)[1..].to_vec(), "has 3072 bytes, which is not a whole number of CIFAR-10 records of 3073"),
        (vec![], "has 0 bytes"),
        (record(10, 0, 0, 0), "has label 10 at record 0"),
    ] {
        let file = folder.put("data_batch_3.bin", &content);
        let sentence = refusal(&mut open(folder.path()), &file);
        assert!(sentence.contains(want), "{sentence}");
    }
}

#[test]
fn folders_of_images() {
    let folder = Folder::new();
    folder.png("b.png", 2, 3, 1, &[10, 20, 30, 40, 50, 60]);
    folder.png("a.PNG", 2, 3, 1, &[1, 2, 3, 4, 5, 6]);
    folder.put("notes.txt", b"hello");
    folder.put(".hidden.png", b"not an image");
    folder.put(".cache/x.png", b"not an image");
    let data = load(folder.path());
    assert_eq!(all(&data.train), [1, 2, 3, 4, 5, 6, 10, 20, 30, 40, 50, 60], "in the order of the names, grey");
    assert!(data.train.labels().is_none());
    assert_eq!(
        data.notes,
        [format!("1 files in {} are neither PNG nor JPEG and are left out", folder.path().display())]
    );
    // One colour image makes all of them colour; a JPEG under the name of a PNG is still read.
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 100)
        .encode(&[200, 100, 50].repeat(6), 3, 2, image::ExtendedColorType::Rgb8)
        .unwrap();
    folder.put("c.png", &jpeg);
    let data = load(folder.path());
    assert_eq!(data.train.extent().to_string(), "2x3x3");
    assert_eq!(&data.train.image(0)[..6], &[1, 1, 1, 2, 2, 2]);
    let pixel = &data.train.image(2)[..3];
    assert!(pixel.iter().zip([200, 100, 50]).all(|(&p, q)| p.abs_diff(q) <= 3), "{pixel:?}");
    assert!(data.notes[1].contains("3 images of 2x3x1, 2x3x3 are made colour: 2x3x3"), "{:?}", data.notes);
}

#[test]
fn class_folders_become_labels() {
    let folder = Folder::new();
    folder.png("dog/deep/1.png", 1, 1, 1, &[1]);
    folder.png("dog/2.png", 1, 1, 1, &[2]);
    folder.png("cat/9.png", 1, 1, 1, &[9]);
    let data = load(folder.path());
    assert_eq!((all(&data.train), data.train.labels()), (vec![9, 2, 1], Some(&[0, 1, 1][..])));
    assert_eq!(data.notes, ["2 classes by folder: 0 cat, 1 dog"]);
    folder.png("stray.png", 1, 1, 1, &[7]);
    assert!(load(folder.path()).train.labels().is_none(), "an image outside the class folders: no labels");
}

#[test]
fn damaged_empty_and_mixed_folders() {
    let folder = Folder::new();
    refuses(folder.path(), "holds no .png, .jpg or .jpeg file (0 others)");
    folder.put("a.txt", b"");
    refuses(folder.path(), "holds no .png, .jpg or .jpeg file (1 others)");
    let good = folder.png("a.png", 40, 40, 3, &bytes(4800));
    let content = fs::read(&good).unwrap();
    for (name, content) in [("empty.png", &[][..]), ("cut.png", &content[..content.len() / 2]), ("text.jpg", b"text")] {
        let bad = folder.put(name, content);
        let sentence = refusal(&mut open(folder.path()), &bad);
        assert!(sentence.contains("is not a whole PNG or JPEG image"), "{sentence}");
        fs::remove_file(bad).unwrap();
    }
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new(&mut jpeg)
        .encode(&bytes(4800), 40, 40, image::ExtendedColorType::Rgb8)
        .unwrap();
    for cut in [1, 2, 3, 10, 100, jpeg.len() / 2] {
        let bad = folder.put("cut.jpg", &jpeg[..jpeg.len() - cut]);
        let sentence = refusal(&mut open(folder.path()), &bad);
        assert!(sentence.contains("is not a whole PNG or JPEG image: it is cut short"), "{sentence}");
        fs::remove_file(bad).unwrap();
    }

    let other = folder.png("b.png", 41, 40, 3, &bytes(4920));
    let sentence = refusal(&mut open(folder.path()), &other);
    let want = format!(
        "is 41x40, but {} is 40x40; give all images one size, or fix one with --set image_size=40x40",
        good.display()
    );
    assert!(sentence.ends_with(&want), "{sentence}");
    // With a fixed size all are fitted to it, and a note says so.
    let mut config = open(folder.path());
    config.model.image_size = Size { h: 8, w: 12 };
    config.model.channels = 1;
    let data = data::load(&mut config).unwrap();
    assert_eq!((data.train.len(), data.train.extent().to_string()), (2, "8x12x1".into()));
    assert!(
        data.notes.contains(
            &"2 images of 40x40x3, 41x40x3 are centre-cropped, resized (Lanczos) and made grey: 8x12x1".into()
        ),
        "{:?}",
        data.notes
    );
    config.model.channels = 2;
    // Names the first of two unusable files, every time.
    for _ in 0..20 {
        assert!(refusal(&mut config, &good).contains("has 3 channels, but 2 are asked for"));
    }
}

#[test]
fn arrays_of_another_size_are_fitted_and_it_is_said() {
    let folder = Folder::new();
    let path = folder.put("a.npy", &npy("|u1", &[2, 10, 20], &[77; 400]));
    let mut config = open(&path);
    config.model.image_size = Size::square(16);
    config.model.channels = 3;
    let data = data::load(&mut config).unwrap();
    assert_eq!(data.train.extent().to_string(), "16x16x3");
    assert!(all(&data.train).iter().all(|&b| b == 77), "a flat image stays flat");
    assert_eq!(data.notes, ["2 images of 10x20x1 are centre-cropped, resized (Lanczos) and made colour: 16x16x3"]);
    let four = folder.put("four.npy", &npy("|u1", &[2, 10, 10, 4], &[77; 800]));
    config.data = four.display().to_string();
    assert!(refusal(&mut config, &four).contains("has 4 channels, but 3 are asked for; only 1 (grey) and 3 (colour)"));
    // If left open, the config gets the size and channels of the data.
    let mut config = open(&path);
    data::load(&mut config).unwrap();
    assert_eq!((config.model.image_size, config.model.channels), (Size { h: 10, w: 20 }, 1));
}

#[test]
fn no_data_given_is_wrong_usage() {
    let error = data::load(&mut Config::preset(Preset::Cifar10)).err().expect("refused");
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("--data mnist (built in) or --data PATH"), "{error}");
}

#[test]
fn the_order_is_a_permutation_per_epoch_and_a_function_of_the_step() {
    let (images, batch) = (103, 10);
    let mut order = Order::new(7, images);
    let seen: Vec<usize> = (0..103).flat_map(|step| order.indices(step, batch)).collect();
    let epochs: Vec<&[usize]> = seen.chunks(images).collect();
    assert_eq!(epochs.len(), 10);
    for (e, epoch) in epochs.iter().enumerate() {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..images).collect::<Vec<_>>(), "epoch {e} sees every image once");
        assert_ne!(sorted, *epoch, "epoch {e} is shuffled");
        assert!(e == 0 || epochs[e - 1] != *epoch, "epoch {e} differs from the one before");
    }
    // Resumed at any step, even backwards: the same images.
    for step in [102, 57, 11, 10, 3] {
        let at = step as usize * batch;
        assert_eq!(Order::new(7, images).indices(step, batch), seen[at..at + batch], "step {step} of a fresh order");
        assert_eq!(order.indices(step, batch), seen[at..at + batch], "step {step} again");
    }
    assert_ne!(Order::new(8, images).indices(0, batch), seen[..batch], "another seed, another order");
    // A batch over several epochs of few images, at the last possible step.
    let small = Order::new(1, 3).indices(u32::MAX, 8);
    assert!(small.iter().all(|&i| i < 3) && (0..3).all(|i| small.contains(&i)), "{small:?}");
    assert_eq!(Order::new(1, 1).indices(5, 2), [0, 0]);
}

#[test]
fn the_shuffle_is_fair() {
    // Position of image 0 in 20,000 shuffles of 5: each position has probability 1/5, so its count has mean 4,000 and
    // standard deviation sqrt(20000 * 0.2 * 0.8) = 57. Any of the five is off by more than five standard deviations
    // with probability about 3e-6.
    let mut counts = [0i64; 5];
    for seed in 0..20_000 {
        let order = Order::new(seed, 5).indices(0, 5);
        counts[order.iter().position(|&i| i == 0).unwrap()] += 1;
    }
    assert!(counts.iter().all(|c| (c - 4000).abs() < 5 * 57), "{counts:?}");
}

#[test]
fn a_note_says_no_more_than_was_done() {
    let folder = Folder::new();
    let path = folder.put("a.npy", &npy("|u1", &[2, 10, 20], &[77; 400]));
    for ((h, w), channels, want) in [
        ((10, 20), 1, None),
        ((5, 10), 1, Some("resized (Lanczos): 5x10x1")),
        ((10, 10), 1, Some("centre-cropped and resized (Lanczos): 10x10x1")),
        ((10, 20), 3, Some("made colour: 10x20x3")),
        ((20, 40), 3, Some("resized (Lanczos) and made colour: 20x40x3")),
    ] {
        let mut config = open(&path);
        (config.model.image_size, config.model.channels) = (Size { h, w }, channels);
        let want: Vec<String> = want.iter().map(|how| format!("2 images of 10x20x1 are {how}")).collect();
        assert_eq!(data::load(&mut config).unwrap().notes, want);
    }
}

#[test]
fn labels_and_rows_go_with_their_images_on_both_sides_of_the_split() {
    let folder = Folder::new();
    // Image i holds the bytes of i and has label i mod 7.
    let body: Vec<u8> = (0..60u32).flat_map(|i| i.to_le_bytes()).collect();
    let labels: Vec<u8> = (0..60).map(|i| i % 7).collect();
    let arrays = [("images", npy("|u1", &[60, 2, 2], &body)), ("labels", npy("|u1", &[60], &labels))];
    let mut config = open(&folder.put("a.npz", &npz(&arrays, zip::CompressionMethod::Stored)));
    config.held_out = 0.3;
    let data = data::load(&mut config).unwrap();
    for set in [&data.train, &data.held_out] {
        let place = |i: usize| u32::from_le_bytes(set.image(i).try_into().unwrap()) as usize;
        let indices: Vec<usize> = (0..set.len()).rev().step_by(3).collect();
        let (places, classes): (Vec<_>, Vec<_>) = indices.iter().map(|&i| (place(i), place(i) as u32 % 7)).unzip();
        let rows = set.rows(&indices, true);
        assert_eq!((rows.indices(), rows.classes), (places, Some(classes)));
        assert_eq!(set.rows(&indices, false).classes, None, "classes that nobody asked for");
        let mut gathered = vec![0; 4 * rows.rows.len()];
        set.gather(&rows.rows, &mut gathered);
        assert_eq!(gathered, rows.rows.iter().flat_map(|row| row.to_le_bytes()).collect::<Vec<_>>());
        assert_eq!(set.labels().unwrap(), (0..set.len()).map(|i| place(i) as u32 % 7).collect::<Vec<_>>());
        assert_eq!(set.images().pixels, body, "both sides read from all images");
    }
    assert_ne!(data.held_out.rows(&[0, 1, 2], false).rows, [0, 1, 2], "rows and indices are the same in this test");
}

/// A JPEG of `w` x `h`, left half white and right half black, with an APP1 segment (0xFFE1) of this content after its
/// start.
fn jpeg_with(h: u32, w: u32, segment: &[u8]) -> Vec<u8> {
    let pixels: Vec<u8> = (0..h * w).map(|i| if i % w < w / 2 { 255 } else { 0 }).collect();
    let mut plain = Vec::new();
    let encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut plain, 100);
    image::ImageEncoder::write_image(encoder, &pixels, w, h, image::ExtendedColorType::L8).unwrap();
    let length = (2 + segment.len() as u16).to_be_bytes();
    [&plain[..2], &[0xFF, 0xE1], &length, segment, &plain[2..]].concat()
}

/// The end marker of a thumbnail in a segment is not that of the image.
#[test]
fn a_jpeg_cut_short_behind_its_thumbnail_is_refused() {
    let folder = Folder::new();
    let whole = jpeg_with(16, 24, &[0xFF, 0xD8, 1, 2, 3, 0xFF, 0xD9]);
    let path = folder.put("a.jpg", &whole);
    assert_eq!(load(folder.path()).train.extent().to_string(), "16x24x1");
    folder.put("a.jpg", &whole[..whole.len() - 2]);
    let sentence = refusal(&mut open(folder.path()), &path);
    assert!(sentence.contains("is not a whole PNG or JPEG image: it is cut short"), "{sentence}");
}

#[test]
fn a_cameras_orientation_is_obeyed() {
    let folder = Folder::new();
    // EXIF with one entry: tag 0x0112 (orientation), a short, 6: rotate by 90 degrees clockwise to view.
    let entry = [0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0];
    let exif = [&b"Exif\0\0MM\0*\0\0\0\x08\0\x01"[..], &entry, &[0; 4]].concat();
    folder.put("a.jpg", &jpeg_with(16, 24, &exif));
    let data = load(folder.path());
    assert_eq!(data.train.extent().to_string(), "24x16x1");
    // What was on the left is on top.
    let image = data.train.image(0);
    assert!(image[..8 * 16].iter().all(|&v| v > 200) && image[16 * 16..].iter().all(|&v| v < 50), "{image:?}");
}
