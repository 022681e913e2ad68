use criterion::{Criterion, Throughput};
use ddpm_cuda::device::Device;
use ddpm_cuda::ops::grad_norm::grad_norm;

/// Parameters of `mnist`-sized and `cifar10`-sized networks; bytes read.
pub fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("grad_norm");
    for len in [1_620_000, 35_746_307] {
        let g = vec![0.01f32; len];
        group.throughput(Throughput::Bytes(4 * len as u64));
        group.bench_function(len.to_string(), |b| b.iter(|| grad_norm(&Device::cpu(), &g)));
    }
    group.finish();
}
