use criterion::Criterion;
use ddpm_cuda::ops::time_embedding::{Sinusoid, time_embedding};
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::BATCH;
use crate::{Group, Work, device, finish};

/// Has no gradient: a forward pass only, measured in sines and cosines per second.
pub fn bench(c: &mut Criterion) {
    let device = device();
    let (n, dim) = (if device.is_gpu() { BATCH } else { 16 }, 128);
    let t = Tensor::full(&device, Shape::new(n, 1, 1, 1), 500.0).unwrap();
    let mut group = Group::new(c, &device, "time_embedding");
    group.case(&format!("forward/{n}x{dim}"), Work::Elements(n * dim), || {
        let y = time_embedding(&device, &t, dim, Sinusoid::default()).unwrap();
        finish(&device);
        y
    });
}
