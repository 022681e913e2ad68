use criterion::Criterion;
use ddpm_cuda::device::Device;
use ddpm_cuda::ops::embedding::embedding;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{Case, bytes};

pub fn bench(c: &mut Criterion) {
    let (classes, shape) = (10, Shape::new(16, 1, 1, 512));
    let labels: Vec<f32> = (0..shape.n).map(|i| (i * 7 % classes) as f32).collect();
    let labels = Tensor::from_slice(&Device::cpu(), Shape::new(shape.n, 1, 1, 1), &labels).unwrap();
    let params = [Shape::new(classes, 1, 1, shape.c)];
    let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| embedding(tape, p[0], &labels, &x[0]);
    let work = bytes(12 * shape.len(), 4 * (shape.len() + params[0].len()));
    Case { stem: "embedding", case: shape.to_string(), inputs: &[shape], params: &params, work, op }.run(c);
}
