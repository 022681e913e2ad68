//! Output files hold what was asked for, and appear complete or not at all.

use std::fs;
use std::path::Path;

use ddpm_cuda::data::npy;
use ddpm_cuda::output::{self, Target};
use ddpm_cuda::tensor::Shape;
use image::AnimationDecoder;

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 37 + i / 251) as u8).collect()
}

#[test]
fn every_byte_survives_the_way_to_a_number_and_back() {
    let x: Vec<f32> = (0..=255u8).map(|b| f32::from(b) / 127.5 - 1.0).collect();
    assert_eq!(output::to_bytes(&x), (0..=255).collect::<Vec<u8>>());
    // Rounded to the nearest, clamped; NaN becomes 0.
    let step = 1.0 / 127.5;
    let x = [
        -7.0,
        7.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        -1.0 + 0.49 * step,
        -1.0 + 0.51 * step,
        1.0 - 0.49 * step,
    ];
    assert_eq!(output::to_bytes(&x), [0, 255, 255, 0, 0, 0, 1, 255]);
}

#[test]
fn a_grid_shows_every_image_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    for (n, h, w, c, columns) in
        [(1, 3, 5, 1, 1), (5, 4, 4, 3, 3), (64, 2, 2, 1, 8), (6, 2, 12, 1, 1), (6, 12, 2, 3, 6), (7, 1, 1, 1, 3)]
    {
        let (shape, images) = (Shape::new(n, h, w, c), bytes(n * h * w * c));
        let path = folder.path().join("grid.png");
        output::write_grid(&path, shape, &images).unwrap();
        let grid = image::open(&path).unwrap();
        assert_eq!(grid.color().channel_count() as usize, c, "grey stays grey");
        let rows = n.div_ceil(columns);
        assert_eq!(
            (grid.width() as usize, grid.height() as usize),
            (columns * (w + 2) + 2, rows * (h + 2) + 2),
            "{shape}"
        );
        let grid = grid.into_rgb8();
        let mut seen = 0;
        for y in 0..grid.height() as usize {
            for x in 0..grid.width() as usize {
                let pixel = grid.get_pixel(x as u32, y as u32).0;
                let (row, column) = (y / (h + 2), x / (w + 2));
                let index = row * columns + column;
                let inside = y % (h + 2) >= 2 && x % (w + 2) >= 2 && column < columns && index < n;
                if inside {
                    let at = ((index * h + y % (h + 2) - 2) * w + x % (w + 2) - 2) * c;
                    assert_eq!(pixel, [images[at], images[at + c / 2], images[at + c - 1]], "{shape} at {x},{y}");
                    seen += 1;
                } else {
                    assert_eq!(pixel, [255; 3], "{shape}: the gap at {x},{y}");
                }
            }
        }
        assert_eq!(seen, n * h * w);
    }
    assert_eq!(names(folder.path()), ["grid.png"], "overwritten, and nothing else left");
}

#[test]
fn a_folder_holds_a_png_for_each_image() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("samples");
    let (shape, images) = (Shape::new(12, 3, 2, 3), bytes(12 * 18));
    output::write_folder(&path, shape, &images).unwrap();
    let files = names(&path);
    assert_eq!((files.len(), files[0].as_str(), files[11].as_str()), (12, "00000.png", "00011.png"));
    for (file, image) in files.iter().zip(images.chunks(18)) {
        assert_eq!(image::open(path.join(file)).unwrap().into_rgb8().into_raw(), image);
    }
    let error = output::write_folder(&path, shape, &images).unwrap_err();
    assert!(error.to_string().ends_with("is not empty; give a new or an empty folder"), "{error}");
    let empty = parent.path().join("empty");
    fs::create_dir(&empty).unwrap();
    output::write_folder(&empty, Shape::new(1, 1, 1, 1), &[9]).unwrap();
    assert_eq!(names(&empty), ["00000.png"]);
    assert_eq!(names(parent.path()), ["empty", "samples"], "nothing else left");
}

#[test]
fn an_animation_shows_every_frame() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gif");
    let shape = Shape::new(2, 3, 4, 1);
    let frames: Vec<Vec<u8>> = (0..3).map(|k| bytes(24).iter().map(|b| b.wrapping_add(k * 50)).collect()).collect();
    output::write_gif(&path, shape, &frames).unwrap();
    let decoder = image::codecs::gif::GifDecoder::new(std::io::Cursor::new(fs::read(&path).unwrap())).unwrap();
    let seen = decoder.into_frames().collect_frames().unwrap();
    assert_eq!(seen.len(), 3);
    for (frame, images) in seen.iter().zip(&frames) {
        // Grey has at most 256 values, so nothing is lost. The second image is on the right of the first.
        let pixel = |x, y| frame.buffer().get_pixel(x, y).0;
        for (i, &value) in images.iter().enumerate() {
            let (image, y, x) = (i as u32 / 12, i as u32 / 4 % 3, i as u32 % 4);
            assert_eq!(pixel(2 + image * 6 + x, 2 + y), [value, value, value, 255]);
        }
        assert_eq!(pixel(0, 0), [255; 4]);
    }
    let ms: Vec<u32> = seen.iter().map(|f| f.delay().numer_denom_ms().0).collect();
    assert_eq!(ms, [50, 50, 2000]);
    // One global table of 256 colours for all frames.
    assert_eq!(fs::read(&path).unwrap()[10] & 0x87, 0x87);
    // More than 256 colours: still an image of the right size.
    let shape = Shape::new(4, 16, 16, 3);
    output::write_gif(&path, shape, &[bytes(shape.len())]).unwrap();
    assert_eq!(image::open(&path).unwrap().width(), 38);
}

#[test]
fn npz_for_openais_evaluator() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("samples.npz");
    let (shape, images) = (Shape::new(3, 4, 5, 3), bytes(180));
    output::write_npz(&path, shape, &images, Some(&[7, 0, u32::MAX])).unwrap();
    let mut arrays = npy::parse_npz(&fs::read(&path).unwrap()).unwrap();
    let (name, labels) = arrays.pop().unwrap();
    assert_eq!((name.as_str(), labels.type_name().as_str(), &labels.shape[..]), ("arr_1", "<i8", &[3][..]));
    assert_eq!(labels.to_i64().unwrap(), [7, 0, i64::from(u32::MAX)]);
    let (name, array) = arrays.pop().unwrap();
    assert_eq!((name.as_str(), array.type_name().as_str(), &array.shape[..]), ("arr_0", "|u1", &[3, 4, 5, 3][..]));
    assert_eq!(array.into_u8().unwrap(), images);
    output::write_npz(&path, shape, &images, None).unwrap();
    assert_eq!(npy::parse_npz(&fs::read(&path).unwrap()).unwrap().len(), 1);
    // We can train on what we write.
    let mut config = ddpm_cuda::config::Config::preset(ddpm_cuda::config::Preset::Mnist);
    config.data = path.display().to_string();
    config.held_out = 0.0;
    (config.model.image_size, config.model.channels) = (ddpm_cuda::config::Size::DATA, 0);
    let data = ddpm_cuda::data::load(&mut config).unwrap();
    assert_eq!((data.train.extent().to_string(), data.train.image(2)), ("4x5x3".into(), &images[120..]));
}

#[test]
fn npy_of_f32() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("y.npy");
    let data: Vec<f32> = (0..24).map(|i| (i as f32).sin()).chain([f32::MIN_POSITIVE / 8.0, -0.0]).collect();
    output::write_npy(&path, &[2, 13], &data).unwrap();
    let file = fs::read(&path).unwrap();
    // By the specification: magic, version, an aligned header, the numbers.
    assert_eq!(&file[..8], b"\x93NUMPY\x01\x00");
    let header = 10 + usize::from(u16::from_le_bytes([file[8], file[9]]));
    let text = String::from_utf8_lossy(&file[10..header]);
    assert!(header % 16 == 0 && text.contains("'<f4'") && text.contains("(2, 13") && text.contains("False"), "{text}");
    assert_eq!(file[header..], data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
    let array = npy::read(&path).unwrap();
    assert_eq!(array.shape, [2, 13]);
    let back = array.to_f32().unwrap();
    assert!(back.iter().zip(&data).all(|(a, b)| a.to_bits() == b.to_bits()));
    assert!(array.to_i64().unwrap_err().contains("holds elements of type <f4; integers are expected"));
}

#[test]
fn a_file_is_replaced_whole_and_open_to_others_like_any() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    fs::write(&path, "old").unwrap();
    #[cfg(unix)]
    let mode = {
        use std::os::unix::fs::PermissionsExt;
        |p: &Path| fs::metadata(p).unwrap().permissions().mode()
    };
    #[cfg(unix)]
    let usual = mode(&path);
    output::write_atomically(&path, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    #[cfg(unix)]
    assert_eq!(mode(&path), usual);
    assert_eq!(names(folder.path()), ["config.toml"]);
    let error = output::write_atomically(&folder.path().join("no/such"), b"new").unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("no/such: cannot be written: "), "{error}");
    // Over a folder: refused, and no unfinished file remains.
    fs::create_dir(folder.path().join("taken")).unwrap();
    output::write_atomically(&folder.path().join("taken"), b"new").unwrap_err();
    assert_eq!(names(folder.path()), ["config.toml", "taken"]);
}

#[test]
fn a_folder_whose_filling_fails_leaves_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("five");
    let error = output::write_folder_atomically(&path, |folder| {
        fs::write(folder.join("half"), "done").unwrap();
        assert!(!path.exists(), "not under its name while it is filled");
        Err(ddpm_cuda::error::Error::Failed("the disk is full".into()))
    });
    assert_eq!(error.unwrap_err().to_string(), "the disk is full");
    assert!(names(parent.path()).is_empty());
    // Images that a PNG cannot hold.
    let error = output::write_grid(&path, Shape::new(1, 1, 1, 2), &[0, 0]).unwrap_err();
    assert!(error.to_string().contains("images of 2 channels are no pictures"), "{error}");
    assert!(names(parent.path()).is_empty());
}

#[test]
fn where_to_write_is_judged_before_the_work() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert_eq!(Target::parse(&at("a.png")).unwrap(), Target::Png);
    assert_eq!(Target::parse(&at("a.NPZ")).unwrap(), Target::Npz);
    assert_eq!(Target::parse(&at("a.gif")).unwrap(), Target::Gif);
    assert_eq!(Target::parse(&at("a.b/")).unwrap(), Target::Folder);
    assert_eq!(Target::parse(&at("samples")).unwrap(), Target::Folder);
    assert_eq!(Target::parse(folder.path()).unwrap(), Target::Folder);
    assert_eq!(Target::parse(Path::new("a.png")).unwrap(), Target::Png);
    let error = Target::parse(&at("a.jpg")).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().ends_with("a.jpg: the ending is none of .png, .npz, .gif and DIR/"), "{error}");
    let error = Target::parse(&at("no/a.png")).unwrap_err();
    assert!(error.to_string().contains("cannot be written: there is no folder"), "{error}");
    fs::write(at("something"), "").unwrap();
    let error = Target::parse(folder.path()).unwrap_err();
    assert!(error.to_string().ends_with("is not empty; give a new or an empty folder"), "{error}");
    let error = Target::parse(&at("something")).unwrap_err();
    assert!(error.to_string().contains("something: is no folder to write to"), "{error}");
}
