use criterion::Criterion;
use ddpm_cuda::ops::silu::silu;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched};

/// A time embedding, and feature maps for comparison.
pub fn bench(c: &mut Criterion) {
    for shape in [Shape::new(16, 1, 1, 512), Shape::new(16, 32, 32, 128)].map(batched) {
        let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| silu(tape, &x[0]);
        let work = [Pass::Moved(2 * shape.len()), Pass::Moved(3 * shape.len())];
        Case { stem: "silu", case: shape.to_string(), inputs: &[shape], params: &[], work, op }.run(c);
    }
}
