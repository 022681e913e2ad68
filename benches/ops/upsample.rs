use criterion::Criterion;
use ddpm_cuda::ops::upsample::upsample;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched};

pub fn bench(c: &mut Criterion) {
    for shape in [Shape::new(16, 16, 16, 64), Shape::new(16, 16, 16, 256)].map(batched) {
        let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| upsample(tape, &x[0]);
        let work = [Pass::Moved(5 * shape.len()); 2];
        Case { stem: "upsample", case: shape.to_string(), inputs: &[shape], params: &[], work, op }.run(c);
    }
}
