use criterion::Criterion;
use ddpm_cuda::ops::embedding::embedding;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, bytes};

pub fn bench(c: &mut Criterion) {
    let (classes, shape) = (10, Shape::new(16, 1, 1, 512));
    let labels: Vec<u32> = (0..shape.n as u32).map(|i| i * 7 % classes).collect();
    let params = [Shape::new(classes as usize, 1, 1, shape.c)];
    let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| embedding(tape, p[0], &labels, &x[0]);
    let work = bytes(12 * shape.len(), 4 * (shape.len() + params[0].len()));
    Case { stem: "embedding", case: shape.to_string(), inputs: &[shape], params: &params, work, op }.run(c);
}
