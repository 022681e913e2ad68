use criterion::{Criterion, Throughput};
use ddpm_cuda::diffusion::Batch;
use ddpm_cuda::meter::Meter;
use ddpm_cuda::ops::loss::loss;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{device, finish, named};

/// Bound by drawing the noise again, so measured in elements per second.
pub fn bench(c: &mut Criterion) {
    let device = device();
    let mut group = c.benchmark_group(named("loss", &device));
    for shape in [Shape::new(128, 28, 28, 1), Shape::new(128, 32, 32, 3), Shape::new(4, 256, 256, 3)] {
        let prediction = Tensor::zeros_as(&device, device.activations(), shape).unwrap();
        let batch = Batch::train(1, 1, 0, vec![0; shape.n], false, 1000);
        let t = Tensor::full(&device, Shape::new(shape.n, 1, 1, 1), 500.0).unwrap();
        let mut meter = Meter::new(&device).unwrap();
        meter.begin();
        group.throughput(Throughput::Elements(shape.len() as u64));
        group.bench_function(shape.to_string(), |b| {
            b.iter(|| {
                let loss = loss(&device, &prediction, &batch, &t, Some(shape.n), &mut meter).unwrap();
                finish(&device);
                loss
            });
        });
    }
    group.finish();
}
