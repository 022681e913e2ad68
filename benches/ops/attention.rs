use criterion::Criterion;
use ddpm_cuda::ops::attention::attention;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::support::BATCH;
use crate::{Case, Pass, batched};

/// Sizes from the networks, a single image, several heads, many tokens; on a GPU also the layers of `cifar10` at batch
/// 128. FLOP count two matrix products forward and the five that the backward pass cannot avoid.
pub fn bench(c: &mut Criterion) {
    let mut cases = vec![
        (Shape::new(16, 16, 16, 64), 1),
        (Shape::new(4, 16, 16, 256), 1),
        (Shape::new(1, 16, 16, 512), 1),
        (Shape::new(4, 16, 16, 256), 8),
        (Shape::new(1, 64, 64, 64), 1),
    ];
    if crate::device().is_gpu() {
        cases.push((Shape::new(BATCH, 4, 4, 256), 1));
    }
    for (shape, heads) in cases {
        let shape = batched(shape);
        let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| attention(tape, &x[0], &x[1], &x[2], heads);
        let product = 2 * shape.n * shape.pixels() * shape.pixels() * shape.c;
        let (case, work) = (format!("{shape}-{heads}"), [Pass::Flops(2 * product), Pass::Flops(5 * product)]);
        Case { stem: "attention", case, inputs: &[shape; 3], params: &[], work, op }.run(c);
    }
}
