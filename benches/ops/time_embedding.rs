use criterion::{BenchmarkId, Criterion, Throughput};
use ddpm_cuda::ops::time_embedding::{Sinusoid, time_embedding};
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{device, finish, named};

/// Has no gradient: a forward pass only, measured in sines and cosines per second.
pub fn bench(c: &mut Criterion) {
    let device = device();
    let (n, dim) = (16, 128);
    let t = Tensor::full(&device, Shape::new(n, 1, 1, 1), 500.0).unwrap();
    let mut group = c.benchmark_group(named("time_embedding", &device));
    group.throughput(Throughput::Elements((n * dim) as u64));
    group.bench_function(BenchmarkId::new("forward", "16x128"), |b| {
        b.iter(|| {
            let y = time_embedding(&device, &t, dim, Sinusoid::default()).unwrap();
            finish(&device);
            y
        });
    });
    group.finish();
}
