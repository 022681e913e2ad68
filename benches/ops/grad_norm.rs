use criterion::Criterion;
use ddpm_cuda::meter::Meter;
use ddpm_cuda::ops::grad_norm::grad_norm;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{Group, Work, device, finish};

/// Parameter counts of the `small` network of benches/step.rs and of `cifar10`, in bytes read.
pub fn bench(c: &mut Criterion) {
    let device = device();
    let mut group = Group::new(c, &device, "grad_norm");
    for len in [1_620_000, 35_746_307_usize] {
        // As long as the flat buffer, whose gaps are zero.
        let len = len.next_multiple_of(4);
        let g = Tensor::full(&device, Shape::vector(len), 0.01).unwrap();
        let mut meter = Meter::new(&device).unwrap();
        meter.begin();
        group.case(&len.to_string(), Work::Bytes(4 * len), || {
            grad_norm(&device, &g, 1.0, &mut meter).unwrap();
            finish(&device);
        });
    }
}
