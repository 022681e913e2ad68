//! The recipe for data of one's own: sizes, networks, steps and mirroring that suit the data, and what is given stays.

use std::collections::BTreeMap;

use ddpm_cuda::config::{Config, Given, Preset, Size};
use ddpm_cuda::data::{Dataset, Extent, Survey};
use ddpm_cuda::device::Device;
use ddpm_cuda::recipe;

/// What a source of `images` of these sizes looks like.
fn survey(sizes: &[(usize, usize, usize)], channels: usize) -> Survey {
    let sizes: BTreeMap<(usize, usize), usize> = sizes.iter().map(|&(h, w, n)| ((h, w), n)).collect();
    Survey { images: sizes.values().sum(), sizes, channels, classes: Vec::new(), held_out: false, fitted: false }
}

/// The settings for a source, with `assignments` given; every one must be valid.
fn recipe(survey: &Survey, assignments: &[&str], device: &Device) -> (Config, String) {
    let mut sets = vec!["data=photos".to_string()];
    sets.extend(assignments.iter().map(|s| s.to_string()));
    let (mut config, given) = Config::build(None, None, &sets).unwrap();
    let notes = recipe::suit(&mut config, &given, survey, device, 1).unwrap();
    config.validate().unwrap();
    for assignment in assignments.iter().filter(|&&assignment| assignment != "image_size=0") {
        let (key, value) = assignment.split_once('=').unwrap();
        let mut again = config.clone();
        again.set(key, value).unwrap();
        assert_eq!(again, config, "{assignment} is given");
    }
    (config, notes.join("\n"))
}

/// A GPU without hardware.
fn gpu() -> Device {
    Device::meta_gpu()
}

#[test]
fn sizes_are_the_datas_as_far_as_the_device_goes() {
    type Case<'a> = (&'a [(usize, usize, usize)], (usize, usize), (usize, usize));
    let cases: [Case; 12] = [
        // Sizes with their numbers; on the CPU; on a GPU.
        (&[(64, 64, 3786)], (32, 32), (64, 64)),
        (&[(32, 32, 50_000)], (32, 32), (32, 32)),
        (&[(28, 28, 60_000)], (28, 28), (28, 28)),
        (&[(28, 20, 100)], (28, 20), (28, 20)),
        (&[(30, 30, 100)], (28, 28), (28, 28)),
        (&[(218, 178, 200_000)], (32, 32), (64, 64)),
        (&[(1080, 1920, 5), (1920, 1080, 7)], (32, 32), (64, 64)),
        // One in ten may be smaller than what is trained.
        (&[(20, 20, 9), (100, 100, 91)], (32, 32), (64, 64)),
        (&[(20, 20, 11), (100, 100, 89)], (20, 20), (20, 20)),
        (&[(50, 90, 10)], (32, 32), (48, 48)),
        (&[(8, 8, 10)], (8, 8), (8, 8)),
        (&[(1, 1, 1)], (8, 8), (8, 8)),
    ];
    for (sizes, cpu, gpu_size) in cases {
        for (device, (h, w)) in [(Device::cpu(), cpu), (gpu(), gpu_size)] {
            let (config, _) = recipe(&survey(sizes, 3), &[], &device);
            assert_eq!(config.model.image_size, Size { h, w }, "{sizes:?} on {device}");
        }
    }
}

#[test]
fn the_network_suits_size_and_device() {
    let (small, said) = recipe(&survey(&[(64, 64, 3786)], 3), &[], &Device::cpu());
    let m = &small.model;
    assert_eq!((&m.widths[..], &m.attention_resolutions[..], m.channels), (&[64, 96, 128][..], &[8][..], 3));
    assert_eq!((small.batch, small.learning_rate, small.ema_decay), (32, 1e-3, 0.999));
    assert!((5000..20_000).contains(&small.steps), "{} steps", small.steps);
    assert!((12..=30).contains(&(small.steps / small.sample_every)), "a grid every {}", small.sample_every);
    assert!(said.starts_with("recipe for 3,786 images of 64x64, trained at 32x32: widths 64,96,128"), "{said}");

    let (large, _) = recipe(&survey(&[(64, 64, 100_000)], 3), &[], &gpu());
    let m = &large.model;
    assert_eq!((&m.widths[..], &m.attention_resolutions[..]), (&[128, 256, 256, 256][..], &[16][..]));
    assert_eq!((large.batch, large.learning_rate, large.ema_decay, large.steps), (128, 2e-4, 0.9999, 200_000));
    let (few, _) = recipe(&survey(&[(64, 64, 100)], 3), &[], &gpu());
    assert_eq!((few.steps, few.ema_decay, few.warmup_steps), (20_000, 0.999, 1000), "few images are seen often");

    let (paper, _) = recipe(&survey(&[(32, 32, 50_000)], 3), &[], &gpu());
    assert_eq!(paper.model, Config::preset(Preset::Cifar10).model, "the paper's network");

    // Sizes that halve once or not at all.
    let levels = |h, w| recipe(&survey(&[(h, w, 10)], 1), &[], &Device::cpu()).0.model.levels();
    assert_eq!([levels(8, 8), levels(16, 16), levels(28, 28), levels(32, 32)], [2, 3, 3, 3]);
}

#[test]
fn what_is_given_stays() {
    let survey = survey(&[(64, 64, 500)], 3);
    let given = ["widths=20,40,40,80", "steps=77", "batch=5", "learning_rate=0.5", "ema_decay=0.5", "channels=1"];
    let (config, _) = recipe(&survey, &given, &Device::cpu());
    assert_eq!(config.model.groups, 5, "the most that divides all widths");
    assert_eq!(config.model.image_size, Size::square(32));
    let (config, _) = recipe(&survey, &["image_size=64", "sample_every=9", "dropout=0.2"], &Device::cpu());
    assert_eq!((config.model.levels(), &config.model.attention_resolutions[..]), (4, &[8][..]));
    let (config, _) = recipe(&survey, &["image_size=0"], &gpu());
    assert_eq!(config.model.image_size, Size::square(64), "0 is the data's");
    let (config, _) = recipe(&survey, &["accumulate=4", "held_out=0.5", "attention_resolutions="], &gpu());
    assert!(config.model.attention_resolutions.is_empty());
}

#[test]
fn few_images_are_all_trained_on() {
    let held_out = |n| recipe(&survey(&[(16, 16, n)], 1), &[], &Device::cpu()).0.held_out;
    assert_eq!([held_out(1), held_out(19), held_out(20)], [0.0, 0.0, 0.05]);
}

#[test]
fn other_presets_keep_their_settings_but_for_the_attention() {
    let (mut config, given) = Config::build(None, None, &["image_size=32".into()]).unwrap();
    let before = config.clone();
    let notes = recipe::suit(&mut config, &given, &survey(&[(64, 64, 10)], 3), &gpu(), 1).unwrap();
    assert_eq!(notes, ["attention_resolutions = [7] are no levels of image_size = 32x32, so they are [8]"]);
    config.model.attention_resolutions = vec![7];
    assert_eq!(config, before);
    let mut all = before.clone();
    assert!(recipe::suit(&mut all, &Given::all(), &survey(&[(64, 64, 10)], 3), &gpu(), 1).unwrap().is_empty());
    assert_eq!(all, before);
}

/// Images of one bright pixel each, at the places that `place` returns.
fn points(n: usize, w: usize, place: impl Fn(usize) -> usize) -> Dataset {
    let mut images = vec![0; n * 8 * w];
    for k in 0..n {
        images[k * 8 * w + 3 * w + place(k)] = 200;
    }
    Dataset::new(Extent { size: Size { h: 8, w }, channels: 1 }, images, None)
}

#[test]
fn images_are_mirrored_if_the_data_is_like_its_mirror_image() {
    let flip = |data: &Dataset| {
        let (mut config, given) = Config::build(None, None, &["data=x".into()]).unwrap();
        recipe::suit_flip(&mut config, &given, data).expect("it is decided");
        config.flip
    };
    for w in [8, 9, 10, 27, 3] {
        let even = points(400, w, |k| if k % 2 == 0 { 0 } else { w - 1 });
        let left = points(400, w, |k| if k % 10 < 7 { 0 } else { w - 1 });
        assert!(flip(&even), "as often left as right, {w} wide");
        assert!(!flip(&left), "seven of ten to the left, {w} wide");
    }
    // More than are looked at, at even distances all to the left.
    assert!(flip(&points(20_000, 8, |k| if k % 2 == 0 { 0 } else { 7 })), "an image and its mirror image in turn");
    assert!(flip(&points(2, 8, |_| 1)), "two images show nothing");
    assert!(flip(&points(50, 1, |_| 0)), "one column has no sides");
    // The digits that come with the program are not mirrored.
    let mut digits = Config::build(None, None, &[]).unwrap().0;
    let data = ddpm_cuda::data::load(&mut digits).unwrap();
    assert!(!flip(&data.train));
    // What is given, and another preset's, is not decided.
    let (mut config, given) = Config::build(None, None, &["data=x".into(), "flip=false".into()]).unwrap();
    assert_eq!(recipe::suit_flip(&mut config, &given, &data.train), None);
    assert_eq!(recipe::suit_flip(&mut digits, &Given::default(), &data.train), None);
}

/// Somebody has decided on the size of a .ddpm file.
#[test]
fn ready_bytes_keep_their_size() {
    let mut ready = survey(&[(64, 64, 100)], 3);
    assert_eq!(recipe(&ready, &[], &Device::cpu()).0.model.image_size, Size::square(32));
    ready.fitted = true;
    assert_eq!(recipe(&ready, &[], &Device::cpu()).0.model.image_size, Size::square(64));
}
