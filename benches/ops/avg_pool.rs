use criterion::Criterion;
use ddpm_cuda::ops::avg_pool::avg_pool;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::{Case, Pass, batched};

pub fn bench(c: &mut Criterion) {
    for shape in [Shape::new(16, 32, 32, 64), Shape::new(16, 32, 32, 256)].map(batched) {
        let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| avg_pool(tape, &x[0]);
        let work = [Pass::Moved(shape.len() / 4 * 5); 2];
        Case { stem: "avg_pool", case: shape.to_string(), inputs: &[shape], params: &[], work, op }.run(c);
    }
}
