//! Draws one image with a trained model, step by step: what `ddpm-cuda sample` does, but you can look at x_t, or change
//! it, between any two steps.
//!
//! `cargo run --release --example sample_loop -- runs/mnist` takes a run, a checkpoint or a model folder of diffusers,
//! and writes `sample.png`.

use std::path::{Path, PathBuf};

use ddpm_cuda::checkpoint;
use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::sampler::Samples;
use ddpm_cuda::error::{Error, Result};
use ddpm_cuda::ops::sample_step::{sample_step, start};
use ddpm_cuda::output;
use ddpm_cuda::sample::default_sampler;
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda::unet::UNet;

fn main() -> Result<()> {
    let model = std::env::args_os().nth(1).map(PathBuf::from);
    let model = model.ok_or_else(|| Error::Usage("give the folder of a model, such as runs/mnist".into()))?;
    let device = Device::cpu();
    let model = checkpoint::load(&device, &model)?;
    let (m, process) = (&model.config.model, &model.config.diffusion);
    let (unet, _) = UNet::new(m)?;
    let schedule = process.noise_schedule()?;
    let sampler = default_sampler(process, &schedule)?;

    // The noise of sample 0 of seed 7. These two numbers determine the image.
    let samples = Samples { seed: 7, first: 0 };
    let shape = Shape::new(1, m.image_size.h, m.image_size.w, m.channels);
    let conditioning = Conditioning::from_labels(&device, (m.classes > 0).then_some(&[0][..]))?;
    let mut state = start(&device, shape, samples)?; // x_T
    for step in sampler.steps() {
        let t = Tensor::full(&device, Shape::vector(1), step.t as f32)?;
        let mut tape = Tape::inference(&device, &model.params);
        let eps = unet.forward(&mut tape, &Var::constant(state.input.clone()), &t, &conditioning, None)?;
        state = sample_step(&device, &state.x, eps.value(), step, samples)?; // x_{t-1}
        let x = state.x.host()?;
        let deviation = (x.iter().map(|v| v * v).sum::<f32>() / x.len() as f32).sqrt();
        println!("t = {:4}: root mean square of x {deviation:.3}", step.t);
    }

    output::write_grid(Path::new("sample.png"), shape, &output::to_bytes(&state.x.host()?))?;
    println!("one image: sample.png");
    Ok(())
}
