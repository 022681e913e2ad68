//! Every source of images: read correctly, and refused with the file's name if it is damaged.

#[path = "support/places.rs"]
mod places;
#[path = "support/sources.rs"]
mod sources;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{self, Data, Dataset, Order, Source};
use sources::{Folder, all, load, open, refusal, refuses};

/// A config that takes the data as it is, with so many classes.
fn with_classes(source: &Path, classes: usize) -> Config {
    let mut config = open(source);
    config.model.classes = classes;
    config
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

impl Folder {
    fn png(&self, name: &str, h: u32, w: u32, channels: usize, pixels: &[u8]) -> PathBuf {
        let color = if channels == 1 { image::ExtendedColorType::L8 } else { image::ExtendedColorType::Rgb8 };
        let path = self.at(name);
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
        (
            "text.npy",
            b"these are not images".to_vec(),
            "is of no kind that is read; give a .npy, .npz, IDX, .parquet, .tar, .zip or .ddpm file",
        ),
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
    // Labels that cannot be used stop a run only if it needs them.
    let mut transposed = npy("|u1", &[5, 1], &[0; 5]);
    let at = transposed.windows(5).position(|w| w == b"False").unwrap();
    transposed[at..at + 5].copy_from_slice(b"True ");
    for (name, labels, want) in [
        ("count", npy("|u1", &[4], &[0; 4]), "holds labels of shape 4 for 5 images"),
        ("many", npy("|u1", &[5, 14], &[0; 70]), "holds labels of shape 5x14 for 5 images"),
        ("scalar", npy("|u1", &[], &[0]), "holds labels of shape () for 5 images"),
        ("kind", npy("<f8", &[5], &[0; 40]), "holds elements of type <f8; integers are expected"),
        ("text", npy("<U3", &[5], &[0; 60]), "holds elements of type <U3; integers are expected"),
        ("bool", npy("|b1", &[5], &[0; 5]), "holds elements of type |b1; integers are expected"),
        ("pickled", npy("|O", &[5], b"\x80\x04abc"), "holds Python objects"),
        ("fortran", transposed, "is in Fortran order"),
        ("damaged", npy("|u1", &[5], &[0; 5])[..40].to_vec(), "is not a .npy array: it ends within its header"),
        ("below", npy("|i1", &[5], &[0, 0, 255, 0, 0]), "has label -1 at image 2"),
    ] {
        let path = folder.put(&format!("{name}.npz"), &labelled(labels));
        let data = load(&path);
        assert!(data.train.labels().is_none() && data.classes.is_empty(), "{name}");
        let sentence = refusal(&mut with_classes(&path, 3), &path);
        assert!(sentence.contains(want) && sentence.contains("classes = 3 needs a class for each"), "{sentence}");
    }
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
    let sentence = refusal(&mut config, &path);
    assert!(
        sentence.ends_with(
            "has no labels; put both into a .npz; classes = 6 needs a class for each image, classes = 0 needs none"
        ),
        "{sentence}"
    );
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
    for shape in [&[0, 2, 3][..], &[2, 0, 3], &[2, 3, 0], &[0, 3, 4, 5], &[2, 4, 0, 5], &[2, 4, 5, 0], &[2, 5, 0, 1]] {
        refuses(&folder.put("empty", &idx(shape, &[])), "holds no images");
        refuses(&folder.put("emnist-letters-train-images-idx3-ubyte", &idx(shape, &[])), "holds no images");
    }
    refuses(&folder.put("floats", &[&[0, 0, 13, 3], &images[4..]].concat()), "holds IDX elements of type 0x0d");
    refuses(&folder.put("one", &idx(&[4], &[0; 4])), "these may be labels");
    refuses(&folder.put("huge", &idx(&[u32::MAX; 4], &[])), "more than any file has bytes");
    let packed = gzip(&images);
    refuses(&folder.put("packed.gz", &packed[..packed.len() - 3]), "is not whole gzip data");
    for (labels, want) in [
        (gzip(&idx(&[3], &[0; 3])), "holds 3 labels for 4 images"),
        (gzip(&[0, 0, 13, 1, 0, 0, 0, 4]), "holds IDX elements of type 0x0d"),
        (packed[..packed.len() - 3].to_vec(), "is not whole gzip data"),
    ] {
        let bad = folder.put("train-labels-idx1-ubyte.gz", &labels);
        assert!(load(folder.path()).train.labels().is_none(), "labels that nobody needs");
        let sentence = refusal(&mut with_classes(folder.path(), 2), &bad);
        assert!(sentence.contains(want), "{sentence}");
    }
    fs::remove_file(folder.path().join("train-labels-idx1-ubyte.gz")).unwrap();
    let images = folder.path().join("train-images-idx3-ubyte.gz");
    let sentence = refusal(&mut with_classes(folder.path(), 2), &images);
    assert!(sentence.contains("has no file of labels beside it, such as train-labels-idx1-ubyte.gz"), "{sentence}");
}

#[test]
fn cifar_folders() {
    let folder = Folder::new();
    let record =
        |label: u8, red: u8, green: u8, blue: u8| [&[label][..], &[red; 1024], &[green; 1024], &[blue; 1024]].concat();
    folder.put("data_batch_2.bin", &record(7, 4, 5, 6));
    folder.put("data_batch_1.bin", &[record(9, 1, 2, 3), record(0, 7, 8, 9)].concat());
    folder.put("batches.meta.txt", b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n\n");
    let data = load(folder.path());
    assert_eq!((data.classes.len(), &*data.classes[7]), (10, "horse"));
    let parts = "data_batch_3.bin, data_batch_4.bin, data_batch_5.bin, test_batch.bin";
    let here = folder.path().display();
    let notes = [
        format!("{here} is CIFAR-10 without {parts}, which the whole set has"),
        "10 classes, not used: classes = 0; use --set classes=10".into(),
    ];
    assert_eq!(data.notes, notes);
    assert_eq!(data::load(&mut with_classes(folder.path(), 10)).unwrap().notes[0], notes[0]);
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
    assert_eq!(data.notes, [format!("1 file in {} is no image and left out", folder.path().display())]);
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
    assert_eq!(data.classes, ["cat", "dog"]);
    let note = "2 classes by folder, in natural order: 0 cat, 1 dog";
    assert_eq!(data.notes, [format!("{note}; not used: classes = 0; use --set classes=2")]);
    assert_eq!(data::load(&mut with_classes(folder.path(), 2)).unwrap().notes, [note]);
    fs::create_dir(folder.path().join("eel")).unwrap();
    folder.put("fish/readme.txt", b"");
    let data = data::load(&mut with_classes(folder.path(), 20)).unwrap();
    assert_eq!(
        data.notes[1..],
        [
            format!("{note}; folders without images are no classes: eel, fish"),
            "classes = 20, but only 2 have images: 0 cat, 1 dog".into()
        ]
    );

    // An image outside the class folders: no labels, and with classes no run.
    let stray = folder.png("stray.png", 1, 1, 1, &[7]);
    assert!(load(folder.path()).train.labels().is_none());
    let sentence = refusal(&mut with_classes(folder.path(), 2), &stray);
    assert!(
        sentence
            .contains("lies beside the class folders cat, dog; move it into one of them or away; classes = 2 needs"),
        "{sentence}"
    );
    folder.png("z.png", 1, 1, 1, &[7]);
    assert!(refusal(&mut with_classes(folder.path(), 2), &stray).contains("cat, dog, as do 1 others; move"));
    let flat = Folder::new();
    flat.png("a.png", 1, 1, 1, &[1]);
    assert!(refusal(&mut with_classes(flat.path(), 2), flat.path()).contains("not in a folder for each class"));
}

#[test]
fn damaged_empty_and_mixed_folders() {
    let folder = Folder::new();
    refuses(
        folder.path(),
        "holds no PNG, JPEG, WebP, TIFF, BMP or GIF file, no .parquet, no .tar, no data_batch_1 and no \
         train-images-idx3-ubyte; it holds no files at all",
    );
    folder.put("a.txt", b"");
    refuses(folder.path(), "train-images-idx3-ubyte; it holds 1 file");
    let arrays = folder.put("a.npz", b"");
    refuses(folder.path(), "give the .npz file in it by its own name");
    fs::remove_file(arrays).unwrap();
    let packed = folder.put("a.tgz", b"");
    refuses(folder.path(), "unpack the .tgz file in it");
    fs::remove_file(packed).unwrap();
    let lsun = folder.put("data.mdb", b"");
    refuses(folder.path(), "is an LMDB, as of LSUN, which is not read; export its values to a folder or a .tar");
    fs::remove_file(lsun).unwrap();
    let good = folder.png("a.png", 40, 40, 3, &bytes(4800));
    let content = fs::read(&good).unwrap();
    for (name, content) in [("empty.png", &[][..]), ("cut.png", &content[..content.len() / 2]), ("text.jpg", b"text")] {
        let bad = folder.put(name, content);
        let sentence = refusal(&mut open(folder.path()), &bad);
        assert!(sentence.contains("is not a whole image"), "{sentence}");
        fs::remove_file(bad).unwrap();
    }
    let mut jpeg = Vec::new();
    image::codecs::jpeg::JpegEncoder::new(&mut jpeg)
        .encode(&bytes(4800), 40, 40, image::ExtendedColorType::Rgb8)
        .unwrap();
    for cut in [1, 2, 3, 10, 100, jpeg.len() / 2] {
        let bad = folder.put("cut.jpg", &jpeg[..jpeg.len() - cut]);
        let sentence = refusal(&mut open(folder.path()), &bad);
        assert!(sentence.contains("is not a whole image: it is cut short"), "{sentence}");
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
    assert!(sentence.contains("is not a whole image: it is cut short"), "{sentence}");
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

#[test]
fn a_survey_is_taken_before_images_are_decoded() {
    let folder = Folder::new();
    folder.png("b/1.png", 2, 3, 1, &[0; 6]);
    folder.png("a/1.png", 4, 5, 3, &[0; 60]);
    // The header is whole, the image is not.
    let good = folder.png("a/2.png", 4, 5, 3, &bytes(60));
    let content = fs::read(&good).unwrap();
    fs::write(&good, &content[..50]).unwrap();
    let source = Source::open(&open(folder.path())).unwrap();
    let survey = source.survey().clone();
    assert_eq!(survey.images, 3);
    assert_eq!(survey.sizes.into_iter().collect::<Vec<_>>(), [((2, 3), 1), ((4, 5), 2)]);
    assert_eq!((survey.channels, &survey.classes[..], survey.held_out), (3, &["a".into(), "b".into()][..], false));
    let mut config = open(folder.path());
    config.model.image_size = Size::square(4);
    assert!(source.load(&mut config).err().expect("refused").to_string().contains("is not a whole image"));

    let images = npy("|u1", &[4, 2, 3], &bytes(24));
    let arrays = [("x_train", images.clone()), ("y_train", npy("|u1", &[4], &[0, 3, 1, 1])), ("x_test", images)];
    let path = folder.put("a.npz", &npz(&arrays, zip::CompressionMethod::Stored));
    let survey = Source::open(&open(&path)).unwrap().survey().clone();
    assert_eq!((survey.images, survey.channels, survey.held_out), (8, 1, true));
    assert!(survey.classes.is_empty(), "the test set has no labels: {:?}", survey.classes);
}

#[test]
fn the_order_of_training_is_pinned() {
    // Recorded with rand 0.10.3's `shuffle`, with which the first runs were made: (images, seed, epoch), first indices,
    // XXH3-128 of all as little-endian u32.
    let recorded: [(usize, u64, u64, &[usize], &str); 10] = [
        (1, 0, 0, &[0], "2a33816ed7e0c373dbe563c737220b65"),
        (2, 0, 0, &[0, 1], "cf68e872ea7766f66c3911ab3c2c7521"),
        (5, 7, 0, &[1, 3, 0, 4, 2], "69532b073a9717ced322b336ac3d4a14"),
        (20, 0, 0, &[4, 18, 11, 5, 6, 7, 12, 17], "7f8593bff5773b3e6cfd45dbb96662f3"),
        (103, 7, 3, &[90, 12, 8, 92, 47, 2, 85, 68], "5f7cde99f140e99978a00ed0c9184ad7"),
        (9500, 0, 0, &[1886, 8783, 6689, 845, 4436, 4821, 1690, 8263], "4bdb46a66744591dd27574a68cd73287"),
        (9500, 0, 1, &[1882, 7671, 7358, 6921, 5758, 7593, 3895, 8245], "d2aba353f5794bd32134af65dea1dc7f"),
        (
            9500,
            u64::MAX,
            4294967301,
            &[466, 7575, 1176, 3336, 202, 7334, 7391, 7126],
            "98326cd627060ffc61154922a3467e19",
        ),
        (70000, 1, 0, &[5770, 17326, 41045, 20102, 43472, 21002, 48288, 32576], "2de7aa556edf6e9c4ebd1aa0a059f36c"),
        (
            1000003,
            2,
            9,
            &[825708, 882182, 660373, 674697, 851069, 899623, 63959, 698703],
            "ca7b4d393b7e0f97125885bc6dfaefc7",
        ),
    ];
    for (images, seed, epoch, first, hash) in recorded {
        let start = epoch * images as u64;
        let order = Order::new(seed, images).range(start..start + images as u64);
        assert_eq!(order[..first.len()], *first, "{images} images, seed {seed}, epoch {epoch}");
        let bytes: Vec<u8> = order.iter().flat_map(|&i| (i as u32).to_le_bytes()).collect();
        let found = format!("{:032x}", twox_hash::XxHash3_128::oneshot(&bytes));
        assert_eq!(found, hash, "{images} images, seed {seed}, epoch {epoch}");
    }
}

#[test]
fn a_fingerprint_is_stable_and_tells_data_apart() {
    let folder = Folder::new();
    let arrays = |pixels: &[u8], labels: &[u8]| {
        let images = npy("|u1", &[4, 2, 3], pixels);
        npz(&[("images", images), ("labels", npy("|u1", &[4], labels))], zip::CompressionMethod::Stored)
    };
    let path = folder.put("a.npz", &arrays(&bytes(24), &[0, 1, 2, 1]));
    let fingerprint = load(&path).fingerprint();
    assert_eq!(fingerprint, "512b80b769b7f2f2e55e6e95b1fa83b2");
    assert_eq!(load(&path).fingerprint(), fingerprint);
    let mut seen = vec![fingerprint];
    let mut differs = |data: Data, what: &str| {
        assert!(!seen.contains(&data.fingerprint()), "{what}");
        seen.push(data.fingerprint());
    };
    let mut other = bytes(24);
    other[23] ^= 1;
    differs(load(&folder.put("a.npz", &arrays(&other, &[0, 1, 2, 1]))), "a pixel");
    let path = folder.put("a.npz", &arrays(&bytes(24), &[0, 1, 1, 1]));
    differs(load(&path), "a label");
    let mut config = open(&path);
    config.held_out = 0.25;
    differs(data::load(&mut config).unwrap(), "the split");
    differs(load(&folder.put("b.npy", &npy("|u1", &[4, 2, 3], &bytes(24)))), "no labels");
    differs(load(&folder.put("b.npy", &npy("|u1", &[4, 3, 2], &bytes(24)))), "the size");
    differs(load(&folder.put("b.npy", &npy("|u1", &[2, 4, 3], &bytes(24)))), "the number of images");
}

/// A PNG of one row, made by hand: no encoder writes all of these.
fn png_row(depth: u8, color: u8, chunks: &[(&[u8; 4], &[u8])], width: u32, row: &[u8]) -> Vec<u8> {
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |kind: &[u8; 4], body: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(kind);
        crc.update(body);
        file.extend((body.len() as u32).to_be_bytes());
        file.extend(kind);
        file.extend(body);
        file.extend(crc.sum().to_be_bytes());
    };
    let head = [&width.to_be_bytes()[..], &1u32.to_be_bytes(), &[depth, color, 0, 0, 0]].concat();
    chunk(b"IHDR", &head);
    for (kind, body) in chunks {
        chunk(kind, body);
    }
    let mut packer = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(&[&[0][..], row].concat()).unwrap();
    chunk(b"IDAT", &packer.finish().unwrap());
    chunk(b"IEND", &[]);
    file
}

#[test]
fn transparency_of_every_kind_is_laid_over_the_background() {
    // Grey 100 or the colour (100, 60, 20), at full, half and no opacity. Over white: v, (v + 255) / 2, 255.
    let deep = |v: u16| (v * 257).to_be_bytes();
    let half8 = |v: u8| ((u32::from(v) * 128 + 255 * 127 + 127) / 255) as u8;
    let rgb = [100, 60, 20];
    let colour: Vec<u8> = rgb.into_iter().chain(rgb.map(half8)).chain([255; 3]).collect();
    let grey = vec![100, half8(100), 255];
    let palette: &[u8] = &[100, 60, 20, 1, 2, 3, 9, 9, 9];
    let rgba16 = |v: [u16; 3], a: u16| -> Vec<u8> { v.into_iter().chain([a]).flat_map(deep).collect() };
    let color16 = [rgba16([100, 60, 20], 255), rgba16([100, 60, 20], 128), rgba16([100, 60, 20], 0)].concat();
    let kinds: [(&str, Vec<u8>, Vec<u8>); 9] = [
        ("RGBA", png_row(8, 6, &[], 3, &[100, 60, 20, 255, 100, 60, 20, 128, 1, 2, 3, 0]), colour.clone()),
        ("grey with alpha", png_row(8, 4, &[], 3, &[100, 255, 100, 128, 7, 0]), grey.clone()),
        (
            "palette with tRNS",
            png_row(8, 3, &[(b"PLTE", palette), (b"tRNS", &[255, 0])], 3, &[0, 1, 2]),
            vec![100, 60, 20, 255, 255, 255, 9, 9, 9],
        ),
        ("grey with tRNS", png_row(8, 0, &[(b"tRNS", &[0, 7])], 3, &[100, 7, 8]), vec![100, 255, 8]),
        ("2-bit grey with tRNS", png_row(2, 0, &[(b"tRNS", &[0, 1])], 3, &[0b0001_1000]), vec![0, 255, 170]),
        (
            "RGB with tRNS",
            png_row(8, 2, &[(b"tRNS", &[0, 1, 0, 2, 0, 3])], 3, &[100, 60, 20, 1, 2, 3, 1, 2, 4]),
            vec![100, 60, 20, 255, 255, 255, 1, 2, 4],
        ),
        (
            "16-bit grey with alpha",
            png_row(16, 4, &[], 3, &[100, 255, 100, 128, 7, 0].map(deep).concat()),
            grey.clone(),
        ),
        ("16-bit RGBA", png_row(16, 6, &[], 3, &color16), colour.clone()),
        (
            "16-bit grey with tRNS",
            png_row(16, 0, &[(b"tRNS", &deep(7))], 3, &[100, 7, 8].map(deep).concat()),
            vec![100, 255, 8],
        ),
    ];
    for (name, content, want) in kinds {
        let folder = Folder::new();
        folder.put("a.png", &content);
        let data = load(folder.path());
        assert_eq!(all(&data.train), want, "{name}");
        let note =
            "1 image has transparent parts and is laid over white; --set background=black, grey or #rrggbb for another";
        assert_eq!(data.notes[0], note, "{name}");
    }
    let folder = Folder::new();
    folder.put("a.png", &png_row(8, 4, &[], 3, &[100, 255, 100, 255, 7, 255]));
    assert!(load(folder.path()).notes.is_empty(), "an opaque image says nothing");
    folder.put("a.png", &png_row(8, 4, &[], 3, &[100, 255, 100, 128, 7, 0]));
    for (background, want) in [
        ("black", vec![100, 50, 0]),
        ("grey", vec![100, 114, 128]),
        // A colour shows through: no longer grey.
        ("#FF8000", vec![100, 100, 100, 177, 114, 50, 255, 128, 0]),
    ] {
        let mut config = open(folder.path());
        config.set("background", background).unwrap();
        let survey = Source::open(&config).unwrap().survey().clone();
        assert_eq!(survey.channels, want.len() / 3);
        assert_eq!(all(&data::load(&mut config).unwrap().train), want, "{background}");
    }
    // Before resizing: nothing of the hidden black comes through at the edges.
    let pixels: Vec<u8> = (0..64 * 64).flat_map(|i| if i % 64 < 32 { [0, 0] } else { [255, 255] }).collect();
    let path = folder.path().join("a.png");
    image::save_buffer(&path, &pixels, 64, 64, image::ExtendedColorType::La8).unwrap();
    let mut config = open(folder.path());
    config.model.image_size = Size::square(16);
    assert!(all(&data::load(&mut config).unwrap().train).iter().all(|&v| v == 255));
}

#[test]
fn sixteen_bits_become_eight_and_it_is_said() {
    let folder = Folder::new();
    for (most, want) in [
        (65_535, "1 image of 16 bits is reduced to 8, with values from 10 to 65535 of 65535"),
        (
            4095,
            "1 image of 16 bits is reduced to 8, with values from 10 to 4095 of 65535, all below 4096, as of 12 bits: they become all but black, 16 of 255 at most; multiply them by 16 before",
        ),
        (
            1023,
            "1 image of 16 bits is reduced to 8, with values from 10 to 1023 of 65535, all below 1024, as of 10 bits: they become all but black, 4 of 255 at most; multiply them by 64 before",
        ),
    ] {
        folder.put("a.png", &png_row(16, 0, &[], 2, &[10u16, most].map(u16::to_be_bytes).concat()));
        assert_eq!(load(folder.path()).notes, [want]);
    }
}

#[test]
fn a_run_folder_among_the_images_is_passed_over() {
    let folder = Folder::new();
    let settings = Config::preset(Preset::Mnist).to_toml();
    folder.png("1.png", 1, 1, 1, &[1]);
    folder.png("cat/2.png", 1, 1, 1, &[2]);
    folder.png("runs/mnist/samples/3.png", 1, 1, 1, &[3]);
    folder.png("runs/mnist-2/samples/4.png", 1, 1, 1, &[4]);
    for run in ["mnist", "mnist-2"] {
        folder.put(&format!("runs/{run}/config.toml"), settings.as_bytes());
    }
    // Somebody else's config.toml makes no run.
    folder.png("site/samples/5.png", 1, 1, 1, &[5]);
    folder.put("site/config.toml", b"title = \"photographs\"\n");
    let data = load(folder.path());
    assert_eq!(all(&data.train), [1, 2, 5]);
    let run = folder.path().join("runs/mnist");
    let note = format!("images in {} and 1 more are passed over, being those of a training run", run.display());
    assert!(data.notes.contains(&note), "{:?}", data.notes);
    // A run in the folder itself.
    folder.put("config.toml", settings.as_bytes());
    folder.png("samples/6.png", 1, 1, 1, &[6]);
    assert_eq!(all(&load(folder.path()).train), [1, 2, 5]);
    // Given by name, samples are read.
    assert_eq!(all(&load(&run.join("samples")).train), [3]);
    refuses(&run, "is passed over, being of a training run, whose samples are no data");
}

#[test]
fn classes_are_in_natural_order() {
    let folder = Folder::new();
    let names = ["10", "2", "1", "01", "a10", "a9", "B", "a", "a9b2", "a9b10"];
    for (i, name) in names.iter().enumerate() {
        folder.png(&format!("{name}/x.png"), 1, 1, 1, &[i as u8]);
    }
    let data = load(folder.path());
    assert_eq!(data.classes, ["01", "1", "2", "10", "B", "a", "a9", "a9b2", "a9b10", "a10"]);
    for i in 0..names.len() {
        let (place, label) = (usize::from(data.train.image(i)[0]), data.train.labels().unwrap()[i]);
        assert_eq!(data.classes[label as usize], names[place]);
    }
}

#[test]
fn litter_of_other_programs_is_no_class() {
    let folder = Folder::new();
    folder.png("cat/1.png", 1, 1, 1, &[1]);
    folder.png("dog/2.png", 1, 1, 1, &[2]);
    folder.png("@eaDir/thumbnail.png", 1, 1, 1, &[3]);
    for litter in [".DS_Store", "cat/._1.png", "Thumbs.db", "desktop.ini", "__MACOSX/cat/._1.png", ".Trash-0/x.png"] {
        folder.put(litter, b"\0\x05\x16\x07");
    }
    let data = load(folder.path());
    assert_eq!(all(&data.train), [1, 2]);
    let want = "2 classes by folder, in natural order: 0 cat, 1 dog; not used: classes = 0; use --set classes=2";
    assert_eq!(data.notes, [want]);
}

#[test]
fn train_and_test_folders_are_splits() {
    for (train, held_out) in [("train", "val"), ("Training", "Testing"), ("TRAIN", "validation"), ("train", "valid")] {
        let folder = Folder::new();
        folder.png(&format!("{train}/cat/1.png"), 1, 1, 1, &[1]);
        folder.png(&format!("{train}/dog/2.png"), 1, 1, 1, &[2]);
        folder.png(&format!("{held_out}/dog/3.png"), 1, 1, 1, &[3]);
        let mut config = with_classes(folder.path(), 2);
        config.held_out = 0.5;
        let survey = Source::open(&config).unwrap().survey().clone();
        assert!(survey.held_out && survey.images == 3);
        let data = data::load(&mut config).unwrap();
        assert_eq!((all(&data.train), all(&data.held_out)), (vec![1, 2], vec![3]));
        assert_eq!((data.train.labels(), data.held_out.labels()), (Some(&[0, 1][..]), Some(&[1][..])));
        assert_eq!(data.classes, ["cat", "dog"]);
        let here = folder.path().display();
        assert_eq!(data.notes[0], format!("{here}: {train} is trained on and {held_out} held out"));
    }
    // Validation goes before test; what else lies there is left out, and it is said.
    let folder = Folder::new();
    for (name, value) in [("train/1", 1), ("val/2", 2), ("test/3", 3), ("extra/4", 4), ("5", 5)] {
        folder.png(&format!("{name}.png"), 1, 1, 1, &[value]);
    }
    let data = load(folder.path());
    assert_eq!((all(&data.train), all(&data.held_out), data.train.labels()), (vec![1], vec![2], None));
    let left = "left out: 1 image beside them, extra (1 image), test (1 image)";
    assert_eq!(data.notes, [format!("{}: train is trained on and val held out; {left}", folder.path().display())]);

    // `train` alone is the training set, among others a class.
    let folder = Folder::new();
    folder.png("train/cat/1.png", 1, 1, 1, &[1]);
    folder.png("train/dog/2.png", 1, 1, 1, &[2]);
    let data = load(folder.path());
    assert_eq!((&data.classes[..], data.held_out.len()), (&["cat".into(), "dog".into()][..], 0));
    assert!(data.notes[0].ends_with(": train is taken for the training set, with no val or test beside it"));
    folder.png("bus/3.png", 1, 1, 1, &[3]);
    let data = load(folder.path());
    assert_eq!(data.classes, ["bus", "train"]);
    assert!(data.notes[0].contains("train is taken for a folder like the others"), "{:?}", data.notes);
}

#[test]
fn labels_of_a_dataset_json() {
    let folder = Folder::new();
    for i in 0..4 {
        folder.png(&format!("0000{}/img{i}.png", i / 2), 1, 1, 1, &[i as u8]);
    }
    let put = |text: &str| folder.put("dataset.json", text.as_bytes());
    let name = |i: usize| format!("0000{}/img{i}.png", i / 2);
    let list = |labels: [&str; 4]| {
        let entries: Vec<String> = (0..4).map(|i| format!("[\"{}\", {}]", name(i), labels[i])).collect();
        format!("{{\"labels\": [{}]}}", entries.join(", "))
    };
    put(&list(["2", "0", "1", "2.0"]));
    let data = load(folder.path());
    assert_eq!(
        (data.train.labels(), &data.classes[..]),
        (Some(&[2, 0, 1, 2][..]), &["0", "1", "2"].map(String::from)[..])
    );
    let note = "labels 0 to 2 by dataset.json; not used: classes = 0; use --set classes=3";
    assert!(data.notes.contains(&note.to_string()), "{:?}", data.notes);
    for (text, want) in [
        ("{\"labels\": null}".to_string(), "has no labels: they are null"),
        (list(["2", "0", "[0, 1, 0]", "1"]), "has the label [0,1,0] for 00001/img2.png; a class number is expected"),
        (list(["2", "0", "-1", "1"]), "has the label -1 for 00001/img2.png"),
        (list(["2", "0", "1.5", "1"]), "has the label 1.5 for"),
        (list(["2", "0", "\"cat\"", "1"]), "has the label \"cat\" for"),
        ("{\"labels\": [[\"00000/img0.png\", 1]]}".into(), "has no label for 00000/img1.png and 2 more"),
        ("{\"labels\": [[\"00000/img0.png\"]]}".into(), "has the entry [\"00000/img0.png\"] among its labels"),
        ("{\"labels\": {}}".into(), "has labels = {}; a list of [name, number] is expected"),
        ("{\"labels\": [".into(), "is not whole JSON"),
    ] {
        let path = put(&text);
        assert!(load(folder.path()).train.labels().is_none(), "nothing stops a run without classes");
        let sentence = refusal(&mut with_classes(folder.path(), 3), &path);
        assert!(sentence.contains(want), "{sentence}");
    }
    // Another program's file of this name.
    put("{\"annotations\": []}");
    assert_eq!(load(folder.path()).classes, ["00000", "00001"]);
}

#[test]
fn files_of_other_kinds_are_counted() {
    let folder = Folder::new();
    let avif = b"\0\0\0\x1cftypavif\0\0\0\0";
    folder.put("1.avif", avif);
    folder.put("2.AVIF", avif);
    folder.put("3.psd", b"8BPS");
    folder.put("4.exr", b"\x76\x2f\x31\x01");
    refuses(
        folder.path(),
        "holds no PNG, JPEG, WebP, TIFF, BMP or GIF file, but 2 .avif, 1 .exr and 1 .psd; convert them to PNG or JPEG",
    );
    for other in ["a.txt", "b.csv", "c"] {
        folder.put(other, b"text");
    }
    let good = folder.png("a.png", 1, 1, 1, &[7]);
    // By content: a PNG under another picture's name, and under none.
    fs::copy(&good, folder.path().join("5.avif")).unwrap();
    fs::copy(&good, folder.path().join("6")).unwrap();
    let data = load(folder.path());
    assert_eq!(data.train.len(), 3);
    let others = "2 .avif, 1 .exr, 1 .psd and 3 other files";
    let here = folder.path().display();
    let want = format!("{others} in {here} are left out; convert them to PNG or JPEG to use them");
    assert_eq!(data.notes, [want]);
    let scraped = folder.put("scraped.jpg", avif);
    let sentence = refusal(&mut open(folder.path()), &scraped);
    assert!(
        sentence.ends_with("is an image of the kind AVIF, which is not read; convert it to PNG or JPEG"),
        "{sentence}"
    );
    // A file of its own.
    refuses(&good, "is a single PNG image; give the folder that holds the images");
}

#[test]
fn jpegs_by_every_name() {
    let folder = Folder::new();
    let jpeg = jpeg_with(8, 8, &[]);
    for name in ["1.jpg", "2.JPEG", "3.jfif", "4.JFIF", "5.jpe", "6.Jpe"] {
        folder.put(name, &jpeg);
    }
    let data = load(folder.path());
    assert_eq!((data.train.len(), data.notes.len()), (6, 0));
}

#[test]
fn all_broken_files_are_named_at_once() {
    let folder = Folder::new();
    for i in 0..20 {
        folder.png(&format!("{i:02}.png"), 8, 8, 3, &bytes(192));
    }
    let content = fs::read(folder.path().join("00.png")).unwrap();
    folder.put("05.png", b"");
    folder.put("10.png", b"<!DOCTYPE html><html>404</html>");
    folder.put("15.png", &content[..60]);
    let sentence = refusal(&mut open(folder.path()), folder.path());
    let start = "3 of its 20 images cannot be used; mend or remove 05.png (it is empty), 10.png (it is a web page or the like), 15.png (";
    assert!(sentence.contains(start), "{sentence}");
    for i in 0..20 {
        folder.put(&format!("{i:02}.png"), &content[..60]);
    }
    let sentence = refusal(&mut open(folder.path()), folder.path());
    assert!(
        sentence.contains("20 of its 20 images") && sentence.contains(" and 12 more, or leave them out with "),
        "{sentence}"
    );
}

#[cfg(unix)]
#[test]
fn dangling_links_are_named_or_left_out() {
    let folder = Folder::new();
    folder.png("a.png", 1, 1, 1, &[7]);
    std::os::unix::fs::symlink("/nowhere/readme.txt", folder.path().join("readme.txt")).unwrap();
    let data = load(folder.path());
    assert_eq!((data.train.len(), data.notes.len()), (1, 1));
    let link = folder.path().join("gone.png");
    std::os::unix::fs::symlink("/nowhere/x.png", &link).unwrap();
    assert!(refusal(&mut open(folder.path()), &link).ends_with("is a link to a file that does not exist"));
}

/// JPEGs of other encoders than the one here: progressive, with restart markers, of every subsampling, as ink.
#[test]
fn a_jpeg_is_refused_wherever_its_data_end() {
    let fixtures = places::fixture("jpeg");
    let mut names: Vec<PathBuf> = fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert!(names.len() >= 7);
    let folder = Folder::new();
    for path in names {
        let whole = fs::read(&path).unwrap();
        // What follows the end marker is no part of the image.
        let file = folder.put("a.jpg", &[&whole[..], b"\xFF\xD8 and more"].concat());
        let data = load(folder.path());
        assert_eq!((data.train.extent().size, data.notes.len()), (Size { h: 27, w: 38 }, 0), "{}", path.display());
        let scan = whole.windows(2).position(|w| w == [0xFF, 0xDA]).unwrap();
        let mut unfinished = 0;
        for cut in (scan..whole.len() - 2).step_by(3) {
            let mut short = whole[..cut].to_vec();
            while short.last() == Some(&0xFF) {
                short.pop();
            }
            short.extend([0xFF, 0xD9]);
            folder.put("a.jpg", &short);
            match data::load(&mut open(folder.path())) {
                Err(error) => {
                    let sentence = error.to_string();
                    assert!(sentence.starts_with(&format!("{}: is not a whole", file.display())), "{sentence}");
                }
                // A progressive image may end between its scans; that is said.
                Ok(data) => {
                    let note =
                        "1 progressive JPEG image is without the last scans and so blurred, perhaps cut short: a.jpg";
                    assert_eq!(data.notes, [note], "{} cut at {cut} of {}", path.display(), whole.len());
                    unfinished += 1;
                }
            }
        }
        let progressive = path.file_name().unwrap().to_str().unwrap().contains("progressive");
        assert!(unfinished <= if progressive { 15 } else { 0 }, "{}: {unfinished}", path.display());
    }
}

/// A PNG of this width and height without pixels.
fn empty_png(h: u32, w: u32) -> Vec<u8> {
    let mut file = png_row(8, 2, &[], w, &[]);
    file[20..24].copy_from_slice(&h.to_be_bytes());
    let mut crc = flate2::Crc::new();
    crc.update(&file[12..29]);
    file[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    file
}

#[test]
fn an_image_too_large_is_called_so() {
    let folder = Folder::new();
    // The limit is known before anything is decoded.
    let path = folder.put("a.png", &empty_png(14_000, 14_000));
    let sentence = refusal(&mut open(folder.path()), &path);
    let want =
        "is too large: 14000x14000 are 560 MiB when decoded, and the most that is read is 512 MiB; shrink it first";
    assert!(sentence.ends_with(want), "{sentence}");
}

#[test]
fn cifar_100() {
    let record = |coarse: u8, fine: u8, value: u8| [&[coarse, fine][..], &[value; 3072]].concat();
    let folder = Folder::new();
    folder.put("train.bin", &[record(1, 50, 7), record(19, 99, 8)].concat());
    let test = folder.put("test.bin", &record(0, 3, 9));
    let data = load(folder.path());
    assert_eq!((data.train.labels(), data.held_out.labels()), (Some(&[50, 99][..]), Some(&[3][..])));
    assert_eq!(
        (data.train.extent().to_string(), data.train.image(1)[0], data.classes.len()),
        ("32x32x3".into(), 8, 100)
    );
    let names: Vec<String> = (0..100).map(|k| format!("kind {k}")).collect();
    folder.put("fine_label_names.txt", names.join("\n").as_bytes());
    assert_eq!(load(folder.path()).classes, names);
    refuses(&test, "may be a part of CIFAR-100; give its folder");
    folder.put("train.bin", &record(1, 100, 7));
    let sentence = refusal(&mut open(folder.path()), &folder.path().join("train.bin"));
    assert!(sentence.contains("has label 100 at record 0; CIFAR-100's are 0 to 99"), "{sentence}");
}

#[test]
fn emnist_is_turned_upright() {
    let folder = Folder::new();
    let images = folder.put("emnist-letters-train-images-idx3-ubyte", &idx(&[2, 2, 3], &bytes(12)));
    folder.put("emnist-letters-train-labels-idx1-ubyte", &idx(&[2], &[1, 26]));
    let data = load(&images);
    assert_eq!((data.train.extent().to_string(), data.train.labels()), ("3x2x1".into(), Some(&[1, 26][..])));
    let b = bytes(12);
    assert_eq!(data.train.image(1), [b[6], b[9], b[7], b[10], b[8], b[11]]);
    let here = images.display();
    let notes = [
        format!("{here}: EMNIST stores its images transposed; they are turned upright"),
        "27 classes, not used: classes = 0; use --set classes=27".into(),
    ];
    assert_eq!(data.notes, notes);
    folder.put("emnist-letters-test-images-idx3-ubyte.gz", &gzip(&idx(&[1, 2, 3], &bytes(6))));
    let data = load(folder.path());
    assert_eq!((data.train.len(), data.held_out.image(0)), (2, &[b[0], b[3], b[1], b[4], b[2], b[5]][..]));
    folder.put("emnist-digits-train-images-idx3-ubyte", &idx(&[2, 2, 3], &bytes(12)));
    refuses(folder.path(), "holds several sets, emnist-digits, emnist-letters; give the images of one");
}

#[test]
fn only_the_arrays_that_are_needed_are_read() {
    let folder = Folder::new();
    let images = npy("|u1", &[2, 2, 2], &bytes(8));
    let broken = b"not an array".to_vec();
    let with = |arrays: &[(&str, Vec<u8>)]| npz(arrays, zip::CompressionMethod::Stored);
    let data =
        load(&folder.put("a.npz", &with(&[("meta", broken.clone()), ("arr_0", images.clone()), ("sigma", broken)])));
    assert_eq!(data.train.len(), 2);
    // Names tried and names found.
    let labels = npy("|u1", &[2], &[0, 1]);
    for (x, y, want) in [
        (
            "images",
            "targets",
            "holds no labels, which go by the name of labels beside images; its arrays are: images, targets",
        ),
        ("x", "targets", "holds no labels, which go by the name of y beside x; its arrays are: x, targets"),
    ] {
        let path = folder.put("a.npz", &with(&[(x, images.clone()), (y, labels.clone())]));
        let sentence = refusal(&mut with_classes(&path, 2), &path);
        assert!(sentence.contains(want), "{sentence}");
    }
    refuses(
        &folder.put("a.npz", &with(&[("X", images.clone()), ("Y", labels)])),
        "x_train, train_images, x or data (for their labels: labels, arr_1, y_train, train_labels, y or labels); its arrays are: X, Y",
    );
    let four = npy("|u1", &[2, 2, 2, 4], &bytes(32));
    let data = load(&folder.put("a.npy", &four));
    assert!(data.notes[0].starts_with("the images have 4 channels and are learnt as they are"), "{:?}", data.notes);
    // One colour image without an axis of its own.
    let single = load(&folder.put("a.npy", &npy("|u1", &[8, 6, 3], &bytes(144))));
    let note =
        "the array is read as 8 grey images of 6x3; if it is a single colour image, save it in the shape 1x8x6x3";
    assert_eq!(single.notes, [note]);
}

#[test]
fn what_a_file_declares_is_compared_with_the_file() {
    let folder = Folder::new();
    let good = npy("|u1", &[2, 2, 2], &bytes(8));
    // A header of 4 GiB; one that is nested a million times; one that is no dictionary.
    let mut long = b"\x93NUMPY\x02\x00".to_vec();
    long.extend(u32::MAX.to_le_bytes());
    long.extend(&good[10..]);
    refuses(&folder.put("long.npy", &long), "the file is not a .npy array: it ends within its header");
    let mut nested = b"\x93NUMPY\x02\x00".to_vec();
    nested.extend(1_000_000u32.to_le_bytes());
    nested.extend(vec![b'['; 1_000_000]);
    refuses(&folder.put("nested.npy", &nested), "its header is nested too deeply; it is damaged");
    let mut wrong = good.clone();
    wrong[20] = b'$';
    refuses(&folder.put("wrong.npy", &wrong), "its header cannot be understood; it is damaged");
    let png = empty_png(13_000, 13_000);
    let path = folder.put("images/a.png", &png);
    let sentence = refusal(&mut open(path.parent().unwrap()), &path);
    assert!(sentence.ends_with(&format!("{} bytes are too few for 13000x13000 pixels", png.len())), "{sentence}");
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    folder.put("images/a.png", pointer);
    assert!(refusal(&mut open(path.parent().unwrap()), &path).contains("it is a pointer of Git LFS"));
    // A zip entry of 20 bytes that claims four gibibytes.
    let mut claims = npz(&[("images", good)], zip::CompressionMethod::Deflated);
    let central = claims.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    claims[central + 24..central + 28].copy_from_slice(&0xFFFF_FF00u32.to_le_bytes());
    refuses(&folder.put("claims.npz", &claims), "its array 'images' claims 4294967040 bytes, packed in");
}
