use criterion::Criterion;
use ddpm_cuda::diffusion::Batch;
use ddpm_cuda::meter::Meter;
use ddpm_cuda::ops::cross_entropy::cross_entropy;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{Group, Work, device, finish};

/// Bound by latency, so measured in logits per second.
pub fn bench(c: &mut Criterion) {
    let device = device();
    let mut group = Group::new(c, &device, "cross_entropy");
    for shape in [Shape::new(128, 1, 1, 10), Shape::new(128, 1, 1, 1000)] {
        let logits = Tensor::zeros_as(&device, device.activations(), shape).unwrap();
        let batch = Batch::train(1, 1, 0, vec![0; shape.n], false, 1000);
        let [t, labels] = [500.0, 3.0].map(|v| Tensor::full(&device, Shape::new(shape.n, 1, 1, 1), v).unwrap());
        let mut meter = Meter::new(&device).unwrap();
        meter.begin();
        group.case(&shape.to_string(), Work::Elements(shape.len()), || {
            let loss = cross_entropy(&device, &logits, &labels, &batch, &t, Some(shape.n), &mut meter).unwrap();
            finish(&device);
            loss
        });
    }
}
