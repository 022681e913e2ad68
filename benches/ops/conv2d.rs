use criterion::Criterion;
use ddpm_cuda::ops::conv2d::{Geometry, Plus, conv2d};
use ddpm_cuda::params::{Init, Layout, ParamGrads, Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::Shape;

use crate::support::BATCH;
use crate::{Group, Work, device, finish, matrix_product, numbers, ramp};

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

/// All kinds of convolution of `cifar10` and, the last four, of `mnist`, for a GPU: `size, c_in, c_out, k, stride`.
const GPU_CASES: [[usize; 5]; 21] = [
    [32, 3, 128, 3, 1],
    [32, 128, 128, 3, 1],
    [32, 256, 128, 3, 1],
    [32, 384, 128, 3, 1],
    [32, 128, 3, 3, 1],
    [32, 128, 128, 3, 2],
    [16, 128, 256, 3, 1],
    [16, 256, 256, 3, 1],
    [16, 384, 256, 3, 1],
    [16, 512, 256, 3, 1],
    [16, 256, 256, 3, 2],
    [8, 256, 256, 3, 1],
    [8, 512, 256, 3, 1],
    [8, 256, 256, 3, 2],
    [4, 256, 256, 3, 1],
    [4, 512, 256, 3, 1],
    [32, 384, 128, 1, 1],
    [28, 1, 16, 3, 1],
    [28, 16, 16, 3, 1],
    [14, 32, 32, 3, 1],
    [7, 64, 64, 3, 1],
];

/// The forward pass, the weight gradient alone (for an input that wants no gradient), both gradients, and a matrix
/// product of the same size by the `gemm` crate. FLOP are those of the definition; Winograd's algorithm needs fewer, so
/// its rates may exceed the peak of the machine.
pub fn bench(c: &mut Criterion) {
    let device = device();
    let cases = if device.is_gpu() {
        GPU_CASES.map(|[size, c_in, c_out, k, stride]| [BATCH, size, c_in, c_out, k, stride]).to_vec()
    } else {
        CASES.to_vec()
    };
    for [n, size, c_in, c_out, k, stride] in cases {
        let geometry = match (k, stride) {
            (1, _) => Geometry::POINTWISE,
            (_, 2) => Geometry::HALVE_3X3,
            _ => Geometry::SAME_3X3,
        };
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
        let mut group = Group::new(c, &device, "conv2d");
        group.case(&format!("forward/{case}"), Work::Flops(flop), || {
            let mut tape = Tape::inference(&device, &params);
            let x = Var::constant(x.clone());
            let y = conv2d(&mut tape, &x, weight, bias, geometry, Plus::default()).expect("a valid case");
            finish(&device);
            y
        });
        for (name, factor, wanted) in [("wgrad", 1, false), ("dgrad+wgrad", 2, true)] {
            let record = || {
                let mut tape = Tape::recording(&device, &params);
                let x = if wanted { tape.leaf(x.clone()) } else { Var::constant(x.clone()) };
                let y = conv2d(&mut tape, &x, weight, bias, geometry, Plus::default()).expect("a valid case");
                finish(&device);
                (tape, y)
            };
            let backward = |(tape, y): (Tape<'_>, Var)| {
                tape.backward(&y, dy.clone(), &mut grads).map(drop).expect("a valid case");
                finish(&device);
            };
            group.case_after(&format!("{name}/{case}"), Work::Flops(factor * flop), record, backward);
        }
        drop(group);
        matrix_product(c, "conv2d", &case, [ys.rows(), k * k * c_in, c_out]);
    }
}
