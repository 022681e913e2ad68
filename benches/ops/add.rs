use criterion::Criterion;
use ddpm_cuda::ops::add::add;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched};

pub fn bench(c: &mut Criterion) {
    for shape in [Shape::new(16, 32, 32, 32), Shape::new(16, 32, 32, 128)].map(batched) {
        let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| add(tape, &x[0], &x[1]);
        // The backward pass hands its gradient on: nothing is moved, so its rate means nothing.
        let work = [Pass::Moved(3 * shape.len()), Pass::Moved(0)];
        Case { stem: "add", case: shape.to_string(), inputs: &[shape, shape], params: &[], work, op }.run(c);
    }
}
