use criterion::Criterion;
use ddpm_cuda::ops::concat::concat;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched};

pub fn bench(c: &mut Criterion) {
    for (shape, c_b) in [(Shape::new(16, 32, 32, 32), 32), (Shape::new(16, 16, 16, 256), 128)] {
        let shape = batched(shape);
        let inputs = [shape, shape.with_c(c_b)];
        let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| concat(tape, &x[0], &x[1]);
        let moved = 2 * (inputs[0].len() + inputs[1].len());
        let (case, work) = (format!("{shape}+{c_b}"), [Pass::Moved(moved); 2]);
        Case { stem: "concat", case, inputs: &inputs, params: &[], work, op }.run(c);
    }
}
