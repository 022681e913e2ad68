//! Sampling: an image is a function of its seed, index and class.

use std::path::Path;

use ddpm_cuda::checkpoint;
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Method, Sampler, Schedule, Spacing};
use ddpm_cuda::sample::Drawing;
use ddpm_cuda::unet::UNet;

/// More images than one batch holds, with a class-conditional network of random weights.
#[test]
fn an_image_depends_on_its_seed_index_and_class_alone() {
    let device = Device::cpu();
    let model = checkpoint::load(&device, &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/unet_rgb16"));
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
