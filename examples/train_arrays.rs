//! Trains on images that exist only in memory, with a loop of its own, and draws new ones.
//!
//! `cargo run --release --example train_arrays` writes `discs.png`: discs of random position and brightness on black.
//! It takes half a minute on two cores.

use std::path::Path;

use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{Data, Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Method, Sampler, Spacing};
use ddpm_cuda::error::Result;
use ddpm_cuda::output;
use ddpm_cuda::sample::Drawing;
use ddpm_cuda::train::Trainer;

const SIDE: usize = 16;

/// Bytes of 1,000 images, (1000, 16, 16, 1), each of one disc.
fn discs() -> Vec<u8> {
    let mut images = Vec::new();
    for i in 0..1000 {
        // Three numbers that run through their ranges out of step with each other.
        let (y, x, radius) =
            (4.0 + (i * 7 % 90) as f32 / 10.0, 4.0 + (i * 13 % 90) as f32 / 10.0, 2.0 + (i % 20) as f32 / 10.0);
        let brightness = 100 + (i * 31 % 156) as u8;
        for row in 0..SIDE {
            for col in 0..SIDE {
                let distance = (row as f32 - y).hypot(col as f32 - x);
                images.push(if distance < radius { brightness } else { 0 });
            }
        }
    }
    images
}

fn main() -> Result<()> {
    // A preset with a different network and recipe. Every field is also a setting of the command line.
    let mut config = Config::preset(Preset::Mnist);
    config.model.image_size = Size::square(SIDE);
    config.model.widths = vec![16, 32];
    config.model.attention_resolutions = vec![];
    config.batch = 32;
    config.steps = 600;
    config.validate()?;

    let extent = Extent { size: config.model.image_size, channels: 1 };
    let none = Dataset::new(extent, Vec::new(), None);
    let data = Data {
        train: Dataset::new(extent, discs(), None),
        held_out: none,
        classes: Vec::new(),
        notes: Vec::new(),
        skipped: Vec::new(),
    };

    let device = Device::cpu();
    let mut trainer = Trainer::new(&config, data, &device)?;
    while trainer.steps_done() < config.steps {
        trainer.step()?;
        // The measurements of the steps; a loop may ask for them at every step or once in a while.
        for report in trainer.reports()? {
            if report.step % 100 == 0 {
                println!("step {}: loss {:.4}", report.step, report.loss);
            }
        }
    }

    let sampler = Sampler::new(&trainer.schedule(), Method::Ancestral(config.diffusion.variance), Spacing::Even, 50)?;
    let average = trainer.ema()?;
    let drawing = Drawing { device: &device, unet: trainer.unet(), params: &average, sampler: &sampler, seed: 1 };
    let images = drawing.images(0..16, None, |_| Ok(()))?;
    output::write_grid(Path::new("discs.png"), drawing.shape(16), &images)?;
    println!("16 images: discs.png");
    Ok(())
}
