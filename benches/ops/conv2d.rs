use criterion::Criterion;
use ddpm_cuda::ops::conv2d::{Geometry, Plus, conv2d};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, flops};

/// Sizes of the networks: stride 1, a skip's wider input, few channels in, stride 2, 1x1. A backward pass is two products of the forward pass's size.
pub fn bench(c: &mut Criterion) {
    let cases = [
        (Shape::new(16, 32, 32, 32), 32, 3, Geometry::SAME_3X3),
        (Shape::new(16, 16, 16, 64), 64, 3, Geometry::SAME_3X3),
        (Shape::new(4, 32, 32, 128), 128, 3, Geometry::SAME_3X3),
        (Shape::new(4, 16, 16, 512), 256, 3, Geometry::SAME_3X3),
        (Shape::new(16, 32, 32, 1), 32, 3, Geometry::SAME_3X3),
        (Shape::new(16, 32, 32, 32), 32, 3, Geometry::HALVE_3X3),
        (Shape::new(16, 16, 16, 128), 64, 1, Geometry::POINTWISE),
    ];
    for (shape, c_out, k, geometry) in cases {
        let params = [Shape::new(c_out, k, k, shape.c), Shape::vector(c_out)];
        let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| conv2d(tape, &x[0], p[0], p[1], geometry, Plus::default());
        let product = 2 * shape.rows() / (geometry.stride * geometry.stride) * params[0].len();
        let case = format!("{shape}-{c_out}-{k}x{k}-stride{}", geometry.stride);
        let work = flops(product, 2 * product);
        Case { stem: "conv2d", case, inputs: &[shape], params: &params, work, op }.run(c);
    }
}
