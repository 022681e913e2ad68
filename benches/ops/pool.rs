use criterion::Criterion;
use ddpm_cuda::ops::pool::tokens;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched};

pub fn bench(c: &mut Criterion) {
    let shape = batched(Shape::new(16, 8, 8, 256));
    let params = [Shape::new(shape.pixels() + 1, 1, 1, shape.c)];
    let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| tokens(tape, &x[0], p[0]);
    // As if the positions, which are f32, had the type of the activations.
    let moved = shape.len() + (shape.n + 1) * params[0].len();
    let work = [Pass::Moved(moved), Pass::Moved(moved)];
    Case { stem: "pool", case: shape.to_string(), inputs: &[shape], params: &params, work, op }.run(c);
}
