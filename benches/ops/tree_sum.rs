use criterion::{Criterion, Throughput};
use ddpm_cuda::ops::tree_sum::tree_sum;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{device, finish, named};

/// The shards of `cifar10`'s gradient that a rank of two and of eight gets, in bytes read and written.
pub fn bench(c: &mut Criterion) {
    let device = device();
    let mut group = c.benchmark_group(named("tree_sum", &device));
    for ranks in [2, 8] {
        let shard = 35_746_307_usize.div_ceil(ranks).next_multiple_of(1 << 16);
        let x = Tensor::full(&device, Shape::new(ranks, 1, 1, shard), 0.01).unwrap();
        let mut y = Tensor::zeros(&device, Shape::vector(shard)).unwrap();
        group.throughput(Throughput::Bytes((4 * (ranks + 1) * shard) as u64));
        group.bench_function(format!("{ranks} ranks"), |b| {
            b.iter(|| {
                tree_sum(&device, &mut y, &x).unwrap();
                finish(&device);
            });
        });
    }
    group.finish();
}
