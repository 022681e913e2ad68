use criterion::Criterion;
use ddpm_cuda::diffusion::sampler::Samples;
use ddpm_cuda::diffusion::{Kind, Method, Sampler, Schedule, Spacing, Variance};
use ddpm_cuda::ops::sample_step::{sample_step, start};
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{Group, Work, device, finish};

/// Bound by drawing the noise if there is any, otherwise by memory; measured in elements per second.
pub fn bench(c: &mut Criterion) {
    let schedule = Schedule::new(Kind::Linear, 1000).expect("the paper's schedule");
    let samples = Samples { seed: 1, first: 0 };
    let device = device();
    let mut group = Group::new(c, &device, "sample_step");
    for shape in [Shape::new(64, 28, 28, 1), Shape::new(64, 32, 32, 3), Shape::new(4, 256, 256, 3)] {
        let x = start(&device, shape, samples).unwrap().x;
        let output = Tensor::zeros_as(&device, device.activations(), shape).unwrap();
        for (name, method) in
            [("ancestral", Method::Ancestral(Variance::FixedLarge)), ("ddim", Method::Ddim { eta: 0.0 })]
        {
            let sampler = Sampler::new(&schedule, method, Spacing::Even, 50).expect("fifty steps");
            let step = sampler.steps()[20];
            group.case(&format!("{shape}/{name}"), Work::Elements(shape.len()), || {
                let state = sample_step(&device, &x, &output, &step, samples).unwrap();
                finish(&device);
                state
            });
        }
    }
}
