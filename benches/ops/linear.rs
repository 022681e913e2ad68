use criterion::Criterion;
use ddpm_cuda::ops::linear::linear;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched, matrix_product};

/// Time embedding, attention projections of both networks, the 1x1 convolution of a shortcut, each beside a matrix
/// product of the same size by the `gemm` crate.
pub fn bench(c: &mut Criterion) {
    let cases = [
        (Shape::new(16, 1, 1, 128), 64),
        (Shape::new(4, 1, 1, 512), 512),
        (Shape::new(16, 16, 16, 64), 64),
        (Shape::new(4, 16, 16, 256), 256),
        (Shape::new(4, 32, 32, 384), 128),
    ];
    for (shape, c_out) in cases {
        let shape = batched(shape);
        let params = [Shape::new(c_out, 1, 1, shape.c), Shape::vector(c_out)];
        let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| linear(tape, &x[0], p[0], Some(p[1]), None);
        let product = 2 * shape.rows() * shape.c * c_out;
        let (case, work) = (format!("{shape}-{c_out}"), [Pass::Flops(product), Pass::Flops(2 * product)]);
        Case { stem: "linear", case: case.clone(), inputs: &[shape], params: &params, work, op }.run(c);
        matrix_product(c, "linear", &case, [shape.rows(), shape.c, c_out]);
    }
}
