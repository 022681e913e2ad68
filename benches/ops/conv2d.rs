use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use ddpm_cuda::ops::conv2d::{Geometry, Plus, conv2d};
use ddpm_cuda::params::{Init, Layout, ParamGrads, Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::Shape;

use crate::{device, finish, matrix_product, named, numbers, ramp};

/// The convolutions of the small network (batch 16) and of `cifar10` (batch 4) that take the most time:
/// `n, size, c_in, c_out, k, stride`.
const CASES: [[usize; 6]; 14] = [
    [16, 32, 1, 32, 3, 1],
    [16, 32, 32, 32, 3, 1],
    [16, 32, 32, 1, 3, 1],
    [16, 32, 32, 32, 3, 2],
    [16, 16, 128, 64, 3, 1],
    [16, 8, 64, 64, 3, 1],
    [4, 32, 3, 128, 3, 1],
    [4, 32, 128, 128, 3, 1],
    [4, 32, 384, 128, 3, 1],
    [4, 32, 128, 3, 3, 1],
    [4, 16, 256, 256, 3, 1],
    [4, 16, 512, 256, 3, 1],
    [4, 8, 256, 256, 3, 1],
    [4, 4, 256, 256, 3, 1],
];

/// The forward pass, the weight gradient alone (for an input that wants no gradient), both gradients, and a matrix
/// product of the same size by the `gemm` crate. FLOP are those of the definition; Winograd's algorithm needs fewer, so
/// its rates may exceed the peak of the machine.
pub fn bench(c: &mut Criterion) {
    let device = device();
    for [n, size, c_in, c_out, k, stride] in CASES {
        let geometry = if stride == 2 { Geometry::HALVE_3X3 } else { Geometry::SAME_3X3 };
        let (xs, ws) = (Shape::new(n, size, size, c_in), Shape::new(c_out, k, k, c_in));
        let ys = geometry.output(xs, ws);
        let mut specs = Specs::default();
        let weight = specs.add(String::new(), ws, Layout::Conv, Init::Zeros);
        let bias = specs.add(String::new(), Shape::vector(c_out), Layout::Vector, Init::Zeros);
        let mut flat = vec![0.0; specs.flat_len()];
        flat[specs.range(weight)].iter_mut().zip(ramp()).for_each(|(p, v)| *p = 0.05 * v);
        let params = Params::from_host(&device, specs, &flat).unwrap();
        let mut grads = ParamGrads::new(&device, params.specs()).unwrap();
        let x = numbers(&device, xs);
        let dy = numbers(&device, ys);

        let case = format!("{xs}-{c_out}-{k}x{k}s{stride}");
        let flop = 2 * ys.rows() * k * k * c_in * c_out;
        let mut group = c.benchmark_group(named("conv2d", &device));
        group.throughput(Throughput::Elements(flop as u64));
        group.bench_function(BenchmarkId::new("forward", &case), |b| {
            b.iter(|| {
                let mut tape = Tape::inference(&device, &params);
                let x = Var::constant(x.clone());
                let y = conv2d(&mut tape, &x, weight, bias, geometry, Plus::default()).expect("a valid case");
                finish(&device);
                y
            });
        });
        for (name, factor, wanted) in [("wgrad", 1, false), ("dgrad+wgrad", 2, true)] {
            group.throughput(Throughput::Elements((factor * flop) as u64));
            group.bench_function(BenchmarkId::new(name, &case), |b| {
                let record = || {
                    let mut tape = Tape::recording(&device, &params);
                    let x = if wanted { tape.leaf(x.clone()) } else { Var::constant(x.clone()) };
                    let y = conv2d(&mut tape, &x, weight, bias, geometry, Plus::default()).expect("a valid case");
                    finish(&device);
                    (tape, y)
                };
                let run = |(tape, y): (Tape<'_>, Var)| {
                    tape.backward(&y, dy.clone(), &mut grads).map(drop).expect("a valid case");
                    finish(&device);
                };
                b.iter_batched(record, run, BatchSize::PerIteration);
            });
        }
        group.finish();
        matrix_product(c, "conv2d", &case, [ys.rows(), k * k * c_in, c_out]);
    }
}
