//! `train-classifier` and `quality` as processes.

mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{Extent, choose};
use ddpm_cuda::measures::Features;
use ddpm_cuda::output::write_npz;
use ddpm_cuda::quality::{pixels, settings, some_of};
use ddpm_cuda::tensor::Shape;
use npyz::WriterBuilder;
use serde_json::Value;
use support::{TINY, numbers, places};

fn ddpm() -> Command {
    let mut command = Command::new(places::program());
    command.stdin(Stdio::null());
    command
}

#[track_caller]
fn ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let [stdout, stderr] = [&out.stdout, &out.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(out.status.success(), "{command:?}: {}\n{stdout}{stderr}", out.status);
    stdout
}

/// Runs a command that must fail with `code` and one sentence, which it returns.
#[track_caller]
fn fails(command: &mut Command, code: i32) -> String {
    let out = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(code), "{command:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{command:?} says more than a sentence: {stderr}");
    stderr.trim_end().to_string()
}

/// `n` images of 4x4 of two classes, bright above or bright below, none like another.
fn images(seed: u64, n: usize) -> (Shape, Vec<u8>, Vec<u32>) {
    let noise = numbers(seed, 16 * n);
    let pixel = |(i, v): (usize, &f64)| {
        let (image, row) = (i / 16, i % 16 / 4);
        let bright = (row < 2) == (image % 2 == 0);
        (if bright { 190.0 } else { 60.0 } + 55.0 * v) as u8
    };
    let bytes = noise.iter().enumerate().map(pixel).collect();
    (Shape::new(n, 4, 4, 1), bytes, (0..n as u32).map(|i| i % 2).collect())
}

fn write_images(path: &Path, seed: u64, n: usize, labels: bool) -> PathBuf {
    let (shape, bytes, of) = images(seed, n);
    write_npz(path, shape, &bytes, labels.then_some(&of)).unwrap();
    path.to_path_buf()
}

/// A .npz of f64 arrays.
fn write_arrays(path: &Path, arrays: &[(&str, &[u64], &[f64])]) -> PathBuf {
    let mut archive = zip::ZipWriter::new(fs::File::create(path).unwrap());
    for (name, shape, numbers) in arrays {
        let mut bytes = Vec::new();
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(&mut bytes).begin_nd().unwrap();
        writer.extend(numbers.iter().copied()).unwrap();
        writer.finish().unwrap();
        archive.start_file(format!("{name}.npy"), zip::write::SimpleFileOptions::default()).unwrap();
        archive.write_all(&bytes).unwrap();
    }
    archive.finish().unwrap();
    path.to_path_buf()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn quality(data: &Path) -> Command {
    let mut command = ddpm();
    command.args(["quality", "--device", "cpu", "--data"]).arg(data);
    command
}

const SMALL: [&str; 10] = [
    "--set",
    "widths=8,16",
    "--set",
    "groups=4",
    "--set",
    "attention_resolutions=2",
    "--set",
    "timesteps=20",
    "--set",
    "batch=4",
];

#[test]
fn a_models_samples_and_copies_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let data = write_images(&at("data.npz"), 1, 80, true);
    ok(ddpm()
        .args(["train", "--device", "cpu", "--steps", "2", "--set", "held_out=0.2", "--set", "flip=true"])
        .args(SMALL)
        .args(["--set", "sample_every=0", "--data"])
        .arg(&data)
        .arg("--out")
        .arg(at("run")));
    let measure = |json: &str| {
        let mut command = quality(&data);
        command.args(["--count", "20", "--steps", "2", "--cache"]).arg(at("cache")).arg("--model").arg(at("run"));
        let said = ok(command.arg("--json").arg(at(json)));
        (said, read_json(&at(json)))
    };
    let (said, first) = measure("first.json");
    assert!(said.contains("training the classifier for the features"), "{said}");
    let name = first["features"].as_str().unwrap().to_string();
    assert!(name.starts_with("classifier-") && said.contains(&format!("[{name}]")), "{name}: {said}");
    assert!(!said.to_lowercase().contains("fid"), "{said}");
    for key in ["frechet_distance", "precision", "recall"] {
        assert!(first[key].as_f64().is_some_and(f64::is_finite), "{key}: {first}");
        assert!(first["baseline"][key].as_f64().is_some_and(f64::is_finite), "{key}: {first}");
        // 16 images are held out, so the baseline compares 16 with 16.
        assert!(first["baseline"]["samples"][key].is_f64(), "{key}: {first}");
    }
    assert_eq!((&first["images"], &first["baseline"]["images"]), (&Value::from(20), &Value::from(16)));
    assert_eq!(first["baseline"]["samples"]["images"], Value::from(16));
    assert_eq!(first["feature_numbers"], Value::from(64));
    assert!(first["classifier_accuracy"].as_f64().unwrap() > 0.9, "{first}");
    for kind in ["pixels", "features"] {
        assert!(first["memorising"][kind]["nearer_than_held_out"].is_f64(), "{first}");
    }
    assert_eq!(&fs::read(at("first.png")).unwrap()[1..4], b"PNG");

    // The classifier is there already, and the same; so are the samples.
    let (said, second) = measure("second.json");
    assert!(!said.contains("training the classifier"), "{said}");
    assert_eq!(first, second);

    // With sample's flags the images are those that it draws.
    let flags = ["--sampler", "ddim", "--eta", "0.5", "--steps", "3", "--clip-x0", "false", "--count", "20"];
    let mut command = quality(&data);
    command.args(flags).arg("--cache").arg(at("cache")).arg("--model").arg(at("run"));
    ok(command.arg("--json").arg(at("ddim.json")));
    ok(ddpm().args(["sample", "--device", "cpu", "--model"]).arg(at("run")).args(flags).arg("--out").arg(at("s.npz")));
    let mut command = quality(&data);
    command.args(["--held-out", "0.2", "--flip", "--cache"]).arg(at("cache")).arg("--samples").arg(at("s.npz"));
    ok(command.arg("--json").arg(at("drawn.json")));
    let [of_model, of_samples] = ["ddim.json", "drawn.json"].map(|json| read_json(&at(json)));
    assert_eq!(of_model, of_samples);
    assert_ne!(of_model["frechet_distance"], first["frechet_distance"]);

    // The training images themselves, every second one mirrored.
    let mut config = Config::preset(Preset::Auto);
    (config.data, config.held_out) = (data.to_string_lossy().into_owned(), 0.2);
    let (mut copies, shape) = pixels(&ddpm_cuda::data::load(&mut config).unwrap().train, false);
    for image in copies.chunks_exact_mut(16).step_by(2) {
        image.chunks_exact_mut(4).for_each(<[u8]>::reverse);
    }
    write_npz(&at("copies.npz"), shape, &copies, None).unwrap();
    let of_copies = |json: &str, flags: &[&str]| {
        let mut command = quality(&data);
        command.args(["--held-out", "0.2", "--cache"]).arg(at("cache")).args(flags).arg("--samples");
        ok(command.arg(at("copies.npz")).arg("--json").arg(at(json)));
        read_json(&at(json))["memorising"].clone()
    };
    let plain = of_copies("plain.json", &[]);
    assert_eq!(plain["pixels"]["copies"], Value::from(0.5), "{plain}");
    let flipped = of_copies("flipped.json", &["--flip"]);
    for kind in ["pixels", "features"] {
        assert_eq!(flipped[kind]["copies"], Value::from(1.0), "{kind}: {flipped}");
        assert_eq!(flipped[kind]["nearer_than_held_out"], Value::from(1.0), "{kind}: {flipped}");
    }
}

/// What cannot be read of the data and of the samples changes no figure of the others.
#[test]
fn broken_files_are_left_out_if_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let write = |name: String, seed: u64| {
        let path = at(&name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let (_, bytes, _) = images(seed, 1);
        image::GrayImage::from_raw(4, 4, bytes).unwrap().save(path).unwrap();
    };
    for k in 0..40 {
        write(format!("data/{}/{k:02}.png", k % 2), k);
    }
    (0..8).for_each(|k| write(format!("samples/{k}.png"), 100 + k));
    let measure = |json: &str, more: &[&str]| {
        let mut command = quality(&at("data"));
        command.arg("--samples").arg(at("samples")).arg("--cache").arg(at("cache")).arg("--json").arg(at(json));
        command.args(more);
        command
    };
    ok(&mut measure("whole.json", &[]));
    for name in ["data/1/broken.png", "samples/broken.png"] {
        fs::write(at(name), &fs::read(at("samples/0.png")).unwrap()[..40]).unwrap();
        let refused = fails(&mut measure("refused.json", &[]), 1);
        assert!(refused.contains("broken.png: is not a whole image"), "{refused}");
        fs::rename(at(name), at(&name.replace('/', "_"))).unwrap();
    }
    for name in ["data/1/broken.png", "samples/broken.png"] {
        fs::rename(at(&name.replace('/', "_")), at(name)).unwrap();
    }
    let said = ok(&mut measure("skipped.json", &["--on-bad-image", "skip"]));
    assert!(said.contains("1 image cannot be used and is left out: broken.png ("), "{said}");
    assert!(said.contains("1 image cannot be used and is left out: 1/broken.png ("), "{said}");
    assert_eq!(read_json(&at("skipped.json")), read_json(&at("whole.json")));
    // Features follow the files, of which none may be missing then.
    let out = measure("own.json", &["--on-bad-image", "skip", "--features", "own.npz"]).output().unwrap();
    assert_eq!(out.status.code(), Some(2), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn features_and_statistics_of_ones_own() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let data = write_images(&at("data.npz"), 1, 10, false);
    let samples = write_images(&at("samples.npz"), 2, 5, false);
    // By image of the data: 0, 1, 2, .. 9, of which --held-out 0.4 takes four.
    let of_data: Vec<f64> = (0..10).map(f64::from).collect();
    let of_samples = [2.0, 3.0, 4.0, 5.0, 6.0];
    let features =
        write_arrays(&at("features.npz"), &[("samples", &[5, 1], &of_samples), ("data", &[10, 1], &of_data)]);
    let run = |flags: &[&str], json: &str| {
        let mut command = quality(&data);
        command.args(["--held-out", "0.4", "--samples"]).arg(&samples).arg("--features").arg(&features).args(flags);
        let said = ok(command.arg("--json").arg(at(json)));
        (said, read_json(&at(json)))
    };
    let (said, got) = run(&[], "own.json");
    assert!(said.contains("[features.npz]") && got["features"] == "features.npz", "{said}");
    assert_eq!((&got["baseline"]["images"], &got["images"]), (&Value::from(4), &Value::from(5)));
    // One dimension: (m1 - m2)^2 + (s1 - s2)^2 with the standard deviations of n - 1.
    let moments = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (x.len() - 1) as f64;
        (mean, variance.sqrt())
    };
    let distance = |a: (f64, f64), b: (f64, f64)| (a.0 - b.0).powi(2) + (a.1 - b.1).powi(2);
    let mut config = Config::preset(Preset::Auto);
    (config.data, config.held_out) = (data.to_string_lossy().into_owned(), 0.4);
    let split = ddpm_cuda::data::load(&mut config).unwrap();
    let of = |set: &ddpm_cuda::data::Dataset| -> Vec<f64> {
        set.rows(&(0..set.len()).collect::<Vec<_>>(), false).rows.into_iter().map(f64::from).collect()
    };
    let (train, held_out) = (moments(&of(&split.train)), moments(&of(&split.held_out)));
    let near = |got: &Value, want: f64| assert!((got.as_f64().unwrap() - want).abs() < 1e-9, "{got}, expected {want}");
    near(&got["frechet_distance"], distance(moments(&of_samples), train));
    near(&got["baseline"]["frechet_distance"], distance(held_out, train));
    // Four of five samples by their hashes: all but the third.
    near(&got["baseline"]["samples"]["frechet_distance"], distance(moments(&[2.0, 3.0, 5.0, 6.0]), train));

    // N(1, 4) of another program.
    write_arrays(&at("stats.npz"), &[("mu", &[1], &[1.0]), ("sigma", &[1, 1], &[4.0])]);
    let stats = at("stats.npz").to_string_lossy().into_owned();
    let (said, got) = run(&["--reference", &stats], "reference.json");
    assert!(said.contains("compared with mu and sigma of"), "{said}");
    near(&got["frechet_distance"], distance(moments(&of_samples), (1.0, 2.0)));
    near(&got["baseline"]["frechet_distance"], distance(held_out, (1.0, 2.0)));
    assert!(got["precision"].is_f64());

    // Without features of the data there are no neighbours in them.
    let alone = write_arrays(&at("alone.npz"), &[("samples", &[5, 1], &of_samples)]);
    let without_data = |flags: &[&str]| {
        let mut command = quality(&data);
        command.arg("--samples").arg(&samples).arg("--features").arg(&alone).args(["--reference", &stats]).args(flags);
        ok(command.arg("--json").arg(at("alone.json")));
        read_json(&at("alone.json"))
    };
    let got = without_data(&["--held-out", "0.4"]);
    assert!(got["precision"].is_null() && got["baseline"].is_null(), "{got}");
    assert!(got["memorising"]["features"].is_null() && got["memorising"]["pixels"].is_object(), "{got}");
    // As training does of so few images, nothing is held out unless somebody says so.
    let got = without_data(&[]);
    assert!(got["memorising"]["pixels"].is_null(), "{got}");
}

/// Classes of samples come in turn, so that every fourth sample would be of the even classes alone.
#[test]
fn some_of_the_samples_are_of_all_classes() {
    let classes = (0..2000).map(|i| f64::from(i % 10)).collect();
    let chosen = some_of(&Features::new(classes, 1).unwrap(), 500);
    let of_class = |class: u32| chosen.rows().filter(|row| row[0] == f64::from(class)).count();
    let counts: Vec<usize> = (0..10).map(of_class).collect();
    assert_eq!(counts.iter().sum::<usize>(), 500);
    // 50 are expected of each. Of 500 of 2,000 at random, of which a tenth is of the class, the standard deviation is
    // sqrt(500 * 0.1 * 0.9 * 0.75) = 5.8; three of these.
    assert!(counts.iter().all(|count| (33..=67).contains(count)), "{counts:?}");

    assert_eq!(choose(10, 4), [1, 5, 8, 9]);
    assert_eq!(choose(5, 5), [0, 1, 2, 3, 4]);
    assert_eq!(choose(3, 9), [0, 1, 2]);
}

/// Figures need no picture, and images of two or four channels are none.
#[test]
fn figures_of_images_that_are_no_pictures_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for channels in [2, 4] {
        let write = |name: &str, n: usize| {
            let bytes: Vec<u8> = (0..n * 16 * channels).map(|k| (k * k / 3 % 251) as u8).collect();
            write_npz(&at(name), Shape::new(n, 4, 4, channels), &bytes, None).unwrap();
        };
        write("data.npz", 10);
        write("samples.npz", 5);
        let (five, ten): (Vec<f64>, Vec<f64>) = ((0..5).map(f64::from).collect(), (0..10).map(f64::from).collect());
        let own = write_arrays(&at("own.npz"), &[("samples", &[5, 1], &five), ("data", &[10, 1], &ten)]);
        let measure = || {
            let mut command = quality(&at("data.npz"));
            command.arg("--samples").arg(at("samples.npz")).arg("--features").arg(&own);
            command
        };
        let said = ok(measure().arg("--json").arg(at("own.json")));
        let note = format!("not drawn, since images of {channels} channels are no pictures");
        assert!(said.contains(&note), "{said}");
        assert!(read_json(&at("own.json"))["frechet_distance"].is_f64());
        assert!(!at("own.png").exists());
        fs::remove_file(at("own.json")).unwrap();
        // Before anything is read of the data, and so before anything is measured.
        let mut command = quality(&at("missing.npz"));
        command.arg("--samples").arg(at("samples.npz")).arg("--features").arg(&own);
        let said = fails(command.arg("--picture").arg(at("p.png")), 2);
        let wanted = format!("p.png: images of {channels} channels are no pictures, only those of 1 and 3 are;");
        assert!(said.contains(&wanted), "{said}");
    }
}

#[test]
fn what_cannot_be_measured_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let data = write_images(&at("data.npz"), 1, 20, false);
    let samples = write_images(&at("samples.npz"), 2, 6, false);
    let few = write_images(&at("few.npz"), 2, 3, false);
    let (six, twenty): (Vec<f64>, Vec<f64>) = ((0..6).map(f64::from).collect(), (0..20).map(f64::from).collect());
    let arrays = |name: &str, arrays: &[(&str, &[u64], &[f64])]| write_arrays(&at(name), arrays);
    let good = arrays("good.npz", &[("samples", &[6, 1], &six), ("data", &[20, 1], &twenty)]);
    let no_samples = arrays("no_samples.npz", &[("data", &[20, 1], &twenty)]);
    let no_data = arrays("no_data.npz", &[("samples", &[6, 1], &six)]);
    let fewer = arrays("fewer.npz", &[("samples", &[5, 1], &six[..5]), ("data", &[20, 1], &twenty)]);
    let other_data = arrays("other_data.npz", &[("samples", &[6, 1], &six), ("data", &[6, 1], &six)]);
    let more = arrays("more.npz", &[("samples", &[7, 1], &twenty[..7]), ("data", &[20, 1], &twenty)]);
    let flat = arrays("flat.npz", &[("samples", &[6], &six), ("data", &[20, 1], &twenty)]);
    let wider = arrays("wider.npz", &[("samples", &[3, 2], &six), ("data", &[20, 1], &twenty)]);
    let nan = arrays("nan.npz", &[("samples", &[6, 1], &[f64::NAN; 6]), ("data", &[20, 1], &twenty)]);
    let stats = arrays("stats.npz", &[("mu", &[2], &[0.0; 2]), ("sigma", &[2, 2], &[1.0, 0.0, 0.0, 1.0])]);
    let no_sigma = arrays("no_sigma.npz", &[("mu", &[1], &[0.0])]);
    let negative = arrays("negative.npz", &[("mu", &[1], &[0.0]), ("sigma", &[1, 1], &[-1.0])]);
    fs::write(at("text.npz"), "no archive").unwrap();
    let text = at("text.npz");
    let says = |flags: &[(&str, &Path)], more: &[&str], code: i32, part: &str| {
        let mut command = quality(&data);
        for (flag, path) in flags {
            command.arg(flag).arg(path);
        }
        let said = fails(command.args(more), code);
        assert!(said.contains(part), "{said}\ndoes not say: {part}");
    };
    let own = |features: &Path, code: i32, part: &str| {
        says(&[("--samples", &samples), ("--features", features)], &[], code, part);
    };
    own(&at("missing.npz"), 1, "missing.npz: cannot be read");
    own(&text, 1, "text.npz: is not a whole .npz archive");
    own(&no_samples, 1, "holds no array `samples`; its arrays are: data");
    own(&no_data, 1, "holds no array `data`, the features of --data; without it --reference is needed");
    own(&fewer, 1, "holds features of 5 samples, but there are 6");
    own(&more, 1, "holds features of 7 samples, but there are 6; --count 6 takes the first 6");
    let mut counted = quality(&data);
    ok(counted.arg("--samples").arg(&samples).arg("--features").arg(&more).args(["--count", "6"]));
    own(&other_data, 1, "holds `data` of 6 images, but the data has 20");
    own(&flat, 1, "holds `samples` of shape 6; images x numbers is expected");
    own(&nan, 1, "`samples`: feature 0 of image 0 is NaN; only finite features can be compared");
    let three: [(&str, &Path); 2] = [("--samples", &samples), ("--features", &wider)];
    says(&three, &["--count", "4"], 1, "holds features of 3 samples, but there are 4");
    let with = |reference: &Path, code: i32, part: &str| {
        says(&[("--samples", &samples), ("--features", &good), ("--reference", reference)], &[], code, part);
    };
    with(&stats, 1, "holds mu of shape 2 and sigma of 2x2, but the features have 1 numbers");
    with(&no_sigma, 1, "holds no array `sigma`; its arrays are: mu");
    with(&negative, 1, "sigma has the variance -1 at 0; it is no covariance");
    with(&at("missing.npz"), 1, "missing.npz: cannot be read");
    let alone: [(&str, &Path); 1] = [("--samples", &samples)];
    let reference: [(&str, &Path); 2] = [("--samples", &samples), ("--reference", &stats)];
    says(&reference, &[], 2, "mu and sigma belong to the network that made them; give its features");
    says(&alone, &[], 1, "the data has no two classes, by which the features are learnt; give features of your own");
    says(&[("--model", &samples), ("--features", &good)], &[], 2, "say with --samples whose features they are");
    says(&alone, &["--count", "3"], 2, "--count 3: at least 4 samples are needed");
    says(&alone, &["--count", "7"], 2, "--count 7: ");
    says(&alone, &["--held-out", "0.6"], 2, "--held-out 0.6 must be a share between 0 (none) and 0.5");
    says(&alone, &["--steps", "10"], 2, "--steps: the samples of --samples are drawn already");
    says(&alone, &["--guidance", "2"], 2, "--guidance: the samples of --samples are drawn already");
    says(&alone, &["--class", "1"], 2, "--class: the samples of --samples are drawn already");
    says(&[("--samples", &few)], &[], 1, "holds 3 images; at least 4 are needed");
    says(&[("--samples", &at("missing.npz"))], &[], 1, "missing.npz: cannot be read");
    says(&[("--model", &at("missing"))], &[], 1, "missing: does not exist");
    says(
        &[("--samples", &samples), ("--json", &at("no/where.json"))],
        &[],
        1,
        "where.json: cannot be written: there is no",
    );
    says(&[("--samples", &samples), ("--picture", folder.path())], &[], 2, "is a folder; a file is expected");
    let clap = |flags: &[&str]| {
        let out = quality(&data).args(flags).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{flags:?}");
    };
    clap(&[]);
    clap(&["--model", "a", "--samples", "b"]);
}

/// What is fixed once: 64 features of any image that can be halved to a few pixels.
#[test]
fn the_classifier_of_the_features_suits_the_images() {
    let widths = |h: usize, w: usize| {
        let config = settings(Extent { size: Size { h, w }, channels: 3 }, 7).unwrap();
        config.validate().unwrap();
        assert_eq!((config.model.classes, config.model.channels, config.seed), (7, 3, 0));
        config.model.widths
    };
    assert_eq!(widths(28, 28), [16, 32, 64]);
    assert_eq!(widths(32, 24), [16, 32, 64]);
    assert_eq!(widths(64, 64), [16, 32, 64, 64]);
    assert_eq!(widths(256, 256), [16, 32, 64, 64, 64, 64]);
    assert_eq!(widths(27, 27), [64]);
    assert_eq!(widths(4, 4), [64]);
    let extent = Extent { size: Size::square(250), channels: 3 };
    let refused = settings(extent, 7).unwrap_err().to_string();
    assert!(refused.starts_with("images of 250x250 cannot be halved to 32 pixels or less"), "{refused}");
}

/// Data of one's own: size and classes are the data's, the network is the recipe's.
#[test]
fn a_classifier_of_ones_own_images() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let data = write_images(&at("data.npz"), 1, 60, true);
    let mut command = ddpm();
    command.args(["train-classifier", "--device", "cpu", "--steps", "3", "--set", "log_every=3", "--data"]).arg(&data);
    let said = ok(command.arg("--out").arg(at("run")));
    assert!(said.contains("recipe for 60 images of 4x4") && said.contains(" % right ("), "{said}");
    let config = Config::read(&at("run/config.toml")).unwrap();
    assert_eq!((config.model.classes, config.model.image_size, config.model.classifier), (2, Size::square(4), true));
    assert_eq!((config.sample_every, config.weight_decay), (0, 0.05));
    let log = fs::read_to_string(at("run/metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert!(line["validation_accuracy"].is_f64() && line["accuracy_by_quarter"].is_array(), "{line}");
}

#[test]
fn a_classifier_is_trained_stopped_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let train = |run: &str, steps: &str| {
        let mut command = ddpm();
        command.args(["train-classifier", "--device", "cpu", "--seed", "5", "--batch", "4", "--steps", steps]);
        command.args(["--set", "validate_every=0", "--set", "log_every=2", "--out"]).arg(at(run)).args(TINY);
        command
    };
    let said = ok(&mut train("run", "4"));
    assert!(said.contains("to guide a model's samples: ddpm-cuda sample --model MODEL --classifier"), "{said}");
    let settings = fs::read_to_string(at("run/config.toml")).unwrap();
    assert!(settings.contains("classifier = true") && settings.contains("weight_decay = 0.05"), "{settings}");
    assert!(settings.contains("classes = 10 "), "the digits have ten classes: {settings}");
    // Two steps and two more are four, to the bit.
    ok(&mut train("half", "2"));
    ok(ddpm().args(["train-classifier", "--device", "cpu", "--steps", "4", "--resume"]).arg(at("half")));
    for file in
        ["classifier/config.json", "classifier/diffusion_pytorch_model.safetensors", "training_state.safetensors"]
    {
        let [whole, resumed] = ["run", "half"].map(|run| fs::read(at(run).join("checkpoints/4").join(file)).unwrap());
        assert!(whole == resumed, "{file} differs");
    }
    let resumes = |command: &str, run: &str| fails(ddpm().args([command, "--resume"]).arg(at(run)), 1);
    assert!(
        resumes("train", "run").contains("is a run of train-classifier; resume it with ddpm-cuda train-classifier")
    );
    ok(ddpm()
        .args(["train", "--device", "cpu", "--steps", "1", "--set", "batch=4", "--set", "sample_every=0"])
        .args(["--set", "validate_every=0", "--out"])
        .arg(at("model"))
        .args(TINY));
    assert!(
        resumes("train-classifier", "model").contains("is a run of train; resume it with ddpm-cuda train --resume")
    );
    let draws = fails(ddpm().args(["sample", "--out", "a.png", "--model"]).arg(at("run")), 1);
    assert!(draws.ends_with("is a classifier, which draws no images; a model is expected"), "{draws}");
    let config = fails(ddpm().args(["train", "--config"]).arg(at("run/config.toml")), 1);
    assert!(config.ends_with("holds the settings of a classifier, for train-classifier"), "{config}");
    let samples = fails(train("other", "2").args(["--set", "sample_every=5"]), 2);
    assert!(samples.ends_with("sample_every = 5: a classifier draws no samples, so leave it at 0"), "{samples}");
    let plain = write_images(&at("plain.npz"), 1, 20, false);
    let none = fails(train("none", "2").arg("--data").arg(&plain), 1);
    assert!(none.contains("has no two classes to tell apart; class folders, or labels beside the images"), "{none}");
    let one = fails(train("one", "2").args(["--set", "classes=1"]), 2);
    assert!(one.ends_with("classes = 1: a classifier tells two classes or more apart"), "{one}");
}
