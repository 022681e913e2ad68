//! A file of ready bytes.

#![no_main]

use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{self, Progress, Source};
use ddpm_cuda_fuzz::{Seeds, ddpms, file, idx, offer, read, read_data, scratch};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    read_data(&file("images.ddpm", bytes));
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { ddpms(data, size, max_size, seed) });

struct Quiet;

impl Progress for Quiet {
    fn say(&mut self, _line: &str) {}

    fn images(&mut self, _before: usize, _done: usize, _images: usize) {}
}

/// What the program makes of a few digits, with labels and without.
fn seeds() -> Seeds {
    let converted = |labels: bool| {
        let images = file(&format!("seed-{labels}/images-idx3-ubyte"), &idx(&[3, 4, 5]));
        if labels {
            file("seed-true/labels-idx1-ubyte", &idx(&[3]));
        }
        let mut config = Config::preset(Preset::Mnist);
        config.data = images.to_str().expect("a path in UTF-8").into();
        (config.model.image_size, config.model.channels) = (Size::DATA, 0);
        let out = scratch().join(format!("{labels}.ddpm"));
        let source = Source::open(&config).expect("a source");
        data::convert(source, &config, &out, &mut Quiet).expect("a file");
        read(&out)
    };
    Seeds { inputs: vec![converted(true), converted(false)], words: vec![b"ddpmdata".to_vec(), b"classes".to_vec()] }
}
