use criterion::Criterion;
use ddpm_cuda::ops::linear::linear;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, flops};

/// A time embedding's projection, and the projections of attention. A backward pass is two products of the forward pass's size.
pub fn bench(c: &mut Criterion) {
    for (shape, c_out) in
        [(Shape::new(16, 1, 1, 512), 512), (Shape::new(16, 16, 16, 64), 64), (Shape::new(4, 16, 16, 256), 256)]
    {
        let params = [Shape::new(c_out, 1, 1, shape.c), Shape::vector(c_out)];
        let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| linear(tape, &x[0], p[0], Some(p[1]), None);
        let product = 2 * shape.rows() * params[0].len();
        let (case, work) = (format!("{shape}-{c_out}"), flops(product, 2 * product));
        Case { stem: "linear", case, inputs: &[shape], params: &params, work, op }.run(c);
    }
}
