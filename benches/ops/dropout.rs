use criterion::Criterion;
use ddpm_cuda::ops::dropout::dropout;
use ddpm_cuda::rng::{Purpose, Streams};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched};

/// The forward pass is measured without recording, where dropout is the identity. The backward pass does the work of a
/// recorded forward pass, in place.
pub fn bench(c: &mut Criterion) {
    for shape in [Shape::new(16, 32, 32, 32), Shape::new(4, 32, 32, 128)].map(batched) {
        let streams = Streams { seed: 1, purpose: Purpose::Dropout, step: 2, first: 3 };
        let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| dropout(tape, &x[0], 0.1, streams);
        let work = [Pass::Moved(0), Pass::Moved(2 * shape.len())];
        Case { stem: "dropout", case: shape.to_string(), inputs: &[shape], params: &[], work, op }.run(c);
    }
}
