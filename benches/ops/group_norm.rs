use criterion::Criterion;
use ddpm_cuda::ops::group_norm::{Activation, group_norm};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched};

/// Sizes from the networks at 32 x 32, a single image, and one image larger than any cache.
pub fn bench(c: &mut Criterion) {
    let shapes = [
        Shape::new(16, 32, 32, 32),
        Shape::new(16, 32, 32, 96),
        Shape::new(4, 32, 32, 128),
        Shape::new(4, 16, 16, 512),
        Shape::new(16, 8, 8, 64),
        Shape::new(1, 32, 32, 128),
        Shape::new(1, 256, 256, 128),
    ];
    for shape in shapes.map(batched) {
        for activation in [Activation::Identity, Activation::Silu] {
            let params = [Shape::vector(shape.c); 2];
            let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| group_norm(tape, &x[0], p[0], p[1], 32, 1e-6, activation);
            let (case, work) =
                (format!("{shape}-{activation:?}"), [2, 3].map(|tensors| Pass::Moved(tensors * shape.len())));
            Case { stem: "group_norm", case, inputs: &[shape], params: &params, work, op }.run(c);
        }
    }
}
