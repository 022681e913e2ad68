use criterion::{BenchmarkId, Criterion, Throughput};
use ddpm_cuda::device::Device;
use ddpm_cuda::ops::time_embedding::{Sinusoid, time_embedding};
use ddpm_cuda::tensor::{Shape, Tensor};

/// Has no gradient: a forward pass only, measured in sines and cosines per second.
pub fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let (n, dim) = (16, 128);
    let t = Tensor::full(&device, Shape::new(n, 1, 1, 1), 500.0).unwrap();
    let mut group = c.benchmark_group("time_embedding");
    group.throughput(Throughput::Elements((n * dim) as u64));
    group.bench_function(BenchmarkId::new("forward", "16x128"), |b| {
        b.iter(|| time_embedding(&device, &t, dim, Sinusoid::default()))
    });
    group.finish();
}
