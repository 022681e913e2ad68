use criterion::Criterion;
use ddpm_cuda::ops::tree_sum::tree_sum;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{Group, Work, device, finish};

/// The shards of `cifar10`'s gradient that a rank of two and of eight gets, in bytes read and written.
pub fn bench(c: &mut Criterion) {
    let device = device();
    let mut group = Group::new(c, &device, "tree_sum");
    for ranks in [2, 8] {
        let shard = 35_746_307_usize.div_ceil(ranks).next_multiple_of(1 << 16);
        let x = Tensor::full(&device, Shape::new(ranks, 1, 1, shard), 0.01).unwrap();
        let mut y = Tensor::zeros(&device, Shape::vector(shard)).unwrap();
        group.case(&format!("{ranks} ranks"), Work::Bytes(4 * (ranks + 1) * shard), || {
            tree_sum(&device, &mut y, &x).unwrap();
            finish(&device);
        });
    }
}
