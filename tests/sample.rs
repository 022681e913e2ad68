//! Sampling: an image is a function of its seed, index and class.

mod support;

use ddpm_cuda::checkpoint;
use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Kind, Method, Sampler, Schedule, Spacing};
use ddpm_cuda::memory::available_on;
use ddpm_cuda::params::Params;
use ddpm_cuda::sample::{Drawing, class_called, memory_of_forward};
use ddpm_cuda::tensor::{DType, Shape};
use ddpm_cuda::unet::UNet;

use support::{gpu, places};

/// More images than one batch holds, with a class-conditional network of random weights.
#[test]
fn an_image_depends_on_its_seed_index_and_class_alone() {
    let device = Device::cpu();
    let model = checkpoint::load(&device, &places::fixture("unet_rgb16"));
    let model = model.unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let schedule = Schedule::new(model.config.diffusion.schedule, 1000).unwrap();
    let sampler = Sampler::new(&schedule, Method::Ddim { eta: 1.0 }, Spacing::Even, 2).unwrap();
    let draw = |seed: u64, labels: &[u32]| {
        let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed };
        assert_eq!(drawing.batch(), 64, "the number drawn together that this test is made for");
        let bytes = drawing.images(labels.len(), Some(labels), |_| Ok(())).unwrap();
        bytes.chunks_exact(16 * 16 * 3).map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    let in_turn: Vec<u32> = (0..66).map(|i| i % 10).collect();
    let images = draw(1, &in_turn);
    for i in 0..66 {
        assert!(images[..i].iter().all(|other| *other != images[i]), "image {i} is one of those before it");
    }
    let fives = draw(1, &[5; 66]);
    for i in 0..66 {
        assert!(fives[..i].iter().all(|other| *other != fives[i]), "image {i} of class 5 is one of those before it");
        assert_eq!(fives[i] == images[i], in_turn[i] == 5, "image {i}, of class 5 and of class {}", in_turn[i]);
    }
    assert_eq!(draw(1, &in_turn[..3]), images[..3], "the number of images changes them");
    let other = draw(2, &in_turn);
    assert!((0..66).all(|i| other[i] != images[i]), "another seed, the same image");
}

/// Alone, with one other and with two others.
#[test]
fn on_a_gpu_an_image_does_not_depend_on_those_drawn_with_it() {
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        let device = Device::Cuda(gpu);
        let path = places::fixture("unet_rgb16");
        let model = checkpoint::load(&device, &path).unwrap();
        let (unet, _) = UNet::new(&model.config.model).unwrap();
        let schedule = Schedule::new(model.config.diffusion.schedule, 1000).unwrap();
        let sampler = Sampler::new(&schedule, Method::Ddim { eta: 1.0 }, Spacing::Even, 2).unwrap();
        let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed: 1 };
        let draw = |count: usize| drawing.images(count, Some(&[3, 1, 4][..count]), |_| Ok(())).unwrap();
        let (one, two, three) = (draw(1), draw(2), draw(3));
        assert_eq!((one.len(), &three[..one.len()]), (16 * 16 * 3, &one[..]), "{dtype:?}: one of three and alone");
        assert_eq!(three[..two.len()], two, "{dtype:?}: two of three");
        assert_ne!(three[..one.len()], three[one.len()..two.len()], "{dtype:?}: two images are the same");
    }
}

/// Two waves of tiles at the coarsest level, unless less memory is free than they take.
#[test]
fn on_a_gpu_images_are_drawn_together_until_they_fill_it_or_its_memory() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let device = Device::Cuda(gpu);
    let sampler =
        Sampler::new(&Schedule::new(Kind::Linear, 1000).unwrap(), Method::Ddim { eta: 0.0 }, Spacing::Even, 1).unwrap();
    let batch = |preset: Preset, side: usize, channels: usize| {
        let mut model = Config::preset(preset).model;
        (model.image_size, model.channels) = (Size::square(side), channels);
        let (unet, specs) = UNet::new(&model).unwrap();
        // Only shapes matter.
        let params = Params::zeros(&device.meta(), specs).unwrap();
        let drawing = Drawing { device: &device, unet: &unet, params: &params, sampler: &sampler, seed: 0 };
        let needed = |n: usize| memory_of_forward(&device, &unet, &params, drawing.shape(n)).unwrap();
        (drawing.batch(), needed(drawing.batch()), needed(2 * drawing.batch()))
    };
    let available = available_on(&device).unwrap();
    // 7x7 pixels of 64 channels: one tile for 64 pixels, of which an H100 computes 132 x 8 at a time.
    let (images, needed, _) = batch(Preset::Mnist, 28, 1);
    assert_eq!(images, (2 * 132 * 8 * 64usize).div_ceil(49));
    assert!(needed <= available, "{needed} of {available} bytes");
    let (images, needed, twice) = batch(Preset::CelebaHq256, 256, 3);
    assert!(images < (2 * 132 * 8usize).div_ceil(8), "{images} images");
    assert!(
        needed <= available && available < twice,
        "{images} images: {needed} of {available} bytes, {twice} for two"
    );
}

#[test]
fn a_class_is_called_by_its_name_or_its_number() {
    let names: Vec<String> = ["cat", "3", "dog", "owl", "owl"].map(String::from).into();
    let called = |text: &str| class_called(text, &names, 6).map_err(|e| e.to_string());
    assert_eq!(called("cat"), Ok(0));
    assert_eq!(called("3"), Ok(1), "the name comes before the number");
    assert_eq!((called("2"), called("5")), (Ok(2), Ok(5)), "a class without a name has its number");
    assert_eq!(called("owl").unwrap_err(), "--class owl: the classes 3 and 4 are both called so; give the number");
    let all = "this model has the classes 0 to 5, called";
    assert_eq!(called("6").unwrap_err(), format!("--class 6: {all} 3, cat, dog, owl, owl"));
    assert_eq!(called("Dgo").unwrap_err(), format!("--class Dgo: {all} dog, cat, 3, owl, owl"));
    called("-1").unwrap_err();
    let many: Vec<String> = (0..1000).map(|k| format!("class {k}")).collect();
    let said = class_called("clas 999", &many, 1000).unwrap_err().to_string();
    assert!(said.contains("called class 999, ") && said.ends_with(" and 990 more"), "{said}");
    let bare = |text: &str, classes| class_called(text, &[], classes).unwrap_err().to_string();
    assert_eq!(bare("cat", 10), "--class cat: this model has the classes 0 to 9, without names");
    assert_eq!(bare("cat", 0), "--class cat: this model is unconditional, leave --class out");
    assert_eq!(class_called("9", &[], 10).unwrap(), 9);
}

/// The estimate grows with the images and is of the order of what the pool holds after drawing.
#[test]
fn the_memory_of_a_forward_pass_is_foreseen() {
    let device = Device::cpu();
    let model = checkpoint::load(&device, &places::fixture("unet_gray16"));
    let model = model.unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let foreseen = |n, side| memory_of_forward(&device, &unet, &model.params, Shape::new(n, side, side, 1)).unwrap();
    let before = device.pool_stats().held;
    let schedule = model.config.diffusion.noise_schedule().unwrap();
    let sampler = Sampler::new(&schedule, Method::Ddim { eta: 0.0 }, Spacing::Even, 1).unwrap();
    let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed: 0 };
    drawing.images(64, None, |_| Ok(())).unwrap();
    let held = device.pool_stats().held - before;
    let share = foreseen(64, 16) as f64 / held as f64;
    assert!((0.2..=1.5).contains(&share), "foreseen {} bytes, held {held}", foreseen(64, 16));
    assert!(foreseen(1, 65_536) > 1 << 40, "{}", foreseen(1, 65_536));
}
