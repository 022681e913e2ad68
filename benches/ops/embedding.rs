use criterion::Criterion;
use ddpm_cuda::ops::embedding::embedding;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::{Case, Pass, batched, device};

pub fn bench(c: &mut Criterion) {
    let device = device();
    let (classes, shape) = (10, batched(Shape::new(16, 1, 1, 512)));
    let labels: Vec<f32> = (0..shape.n).map(|i| (i * 7 % classes) as f32).collect();
    let labels = Tensor::from_slice(&device, Shape::new(shape.n, 1, 1, 1), &labels).unwrap();
    let params = [Shape::new(classes, 1, 1, shape.c)];
    let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| embedding(tape, p[0], &labels, &x[0]);
    // As if the table, which is f32, had the type of the activations.
    let work = [Pass::Moved(3 * shape.len()), Pass::Moved(shape.len() + params[0].len())];
    Case { stem: "embedding", case: shape.to_string(), inputs: &[shape], params: &params, work, op }.run_on(&device, c);
}
