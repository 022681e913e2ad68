use ddpm_cuda::device::Device;
use ddpm_cuda::device::cpu::simd::{self, Level};
use ddpm_cuda::ops::linear::{linear_by, reference};
use ddpm_cuda::params::{Init, Layout, ParamGrads, Params, Specs};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{close, finite_differences, numbers, same_bits, to_f32};

/// `x` and `c_out`: sizes of one, primes, one over the register tile (32 columns, 14 rows) and over a block of rows (56).
const CASES: [(Shape, usize); 8] = [
    (Shape::new(1, 1, 1, 1), 1),
    (Shape::new(2, 1, 1, 7), 5),
    (Shape::new(16, 1, 1, 32), 128),
    (Shape::new(3, 5, 1, 17), 33),
    (Shape::new(1, 3, 5, 64), 3),
    (Shape::new(1, 57, 1, 3), 31),
    (Shape::new(2, 16, 16, 65), 64),
    (Shape::new(1, 1, 4099, 2), 2),
];

/// `x`, `w`, `b`, residual, `dy`.
fn data((x, c_out): (Shape, usize)) -> [Vec<f64>; 5] {
    let y = x.rows() * c_out;
    [numbers(1, x.len()), numbers(2, c_out * x.c), numbers(3, c_out), numbers(4, y), numbers(5, y)]
}

const NAMES: [&str; 5] = ["y", "dx", "dw", "db", "dresidual"];

fn by_tape((shape, c_out): (Shape, usize), plain: bool, level: Level, passes: usize) -> [Vec<f32>; 5] {
    let [x, w, b, residual, dy] = data((shape, c_out)).map(|v| to_f32(&v));
    let device = Device::cpu_guarded();
    let mut specs = Specs::default();
    let weight = specs.add("w".into(), Shape::new(c_out, 1, 1, shape.c), Layout::Matrix, Init::Zeros);
    let bias = specs.add("b".into(), Shape::vector(c_out), Layout::Vector, Init::Zeros);
    let mut params = Params::zeros(&device, specs).unwrap();
    params.get_mut(weight).copy_from_slice(&w);
    params.get_mut(bias).copy_from_slice(&b);
    let mut param_grads = ParamGrads::new(&device, params.specs()).unwrap();
    // What earlier steps left behind is stale: it must be overwritten, not added to.
    let stale = vec![f32::NAN; params.specs().flat_len()];
    param_grads.finish(params.specs()).and_then(|g| g.write(&stale)).unwrap();
    param_grads.reset();
    let mut results = None;
    for _ in 0..passes {
        let mut tape = Tape::recording(&device, &params);
        let x = tape.leaf(Tensor::from_slice(&device, shape, &x).unwrap());
        let residual = tape.leaf(Tensor::from_slice(&device, shape.with_c(c_out), &residual).unwrap());
        let (b, r) = if plain { (None, None) } else { (Some(bias), Some(&residual)) };
        let y = linear_by(&mut tape, &x, weight, b, r, level).unwrap();
        let dy = Tensor::from_slice(&device, y.shape(), &dy).unwrap();
        let mut leaves = tape.backward(&y, dy, &mut param_grads).unwrap();
        let dresidual = leaves.take(&residual).map_or(vec![], |t| t.data().to_vec());
        results = Some((y.data().to_vec(), leaves.take(&x).unwrap().data().to_vec(), dresidual));
    }
    let (y, dx, dresidual) = results.expect("at least one pass");
    let dw = param_grads.slot(params.specs(), weight).data.to_vec();
    let db = if plain { vec![] } else { param_grads.slot(params.specs(), bias).data.to_vec() };
    [y, dx, dw, db, dresidual]
}

#[test]
fn the_derived_gradient_agrees_with_differences() {
    for case in CASES.into_iter().filter(|(x, _)| x.len() < 300) {
        let [x, w, b, residual, dy] = data(case);
        let f = |v: &[Vec<f64>]| {
            let y = reference::forward(&v[0], &v[1], case.0.c, Some(&v[2]), Some(&v[3]));
            y.iter().zip(&dy).map(|(y, dy)| y * dy).sum()
        };
        let [dx, dw, db] = reference::backward(&x, &w, case.0.c, &dy);
        finite_differences(&format!("{case:?}"), f, &[x, w, b, residual], &[dx, dw, db, dy.clone()]);
    }
}

#[test]
fn agrees_with_the_reference() {
    for case in CASES {
        for plain in [false, true] {
            let d = data(case);
            let [x, w, b, residual, dy] = &d;
            let (b, residual) = if plain { (None, None) } else { (Some(&b[..]), Some(&residual[..])) };
            let y = reference::forward(x, w, case.0.c, b, residual);
            let [dx, dw, db] = reference::backward(x, w, case.0.c, dy);
            let oracle = [y, dx, dw, db, dy.clone()];

            let [x, w, b, residual, dy] = d.each_ref().map(|v| to_f32(v));
            let (b, residual) = if plain { (None, None) } else { (Some(&b[..]), Some(&residual[..])) };
            let y = reference::forward(&x, &w, case.0.c, b, residual);
            let [dx, dw, db] = reference::backward(&x, &w, case.0.c, &dy);
            let yardstick = [y, dx, dw, db, dy];

            for level in simd::levels() {
                let got = by_tape(case, plain, level, 1);
                for i in 0..if plain { 3 } else { 5 } {
                    close(&format!("{} on {level:?}, {case:?}", NAMES[i]), &got[i], &oracle[i], &yardstick[i]);
                }
            }
        }
    }
}

#[test]
fn parameter_gradients_accumulate() {
    for case in CASES {
        let (once, twice) = (by_tape(case, false, simd::level(), 1), by_tape(case, false, simd::level(), 2));
        for i in 2..4 {
            let sum: Vec<f32> = once[i].iter().map(|v| v + v).collect();
            same_bits(&format!("{} twice, {case:?}", NAMES[i]), &twice[i], &sum);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for case in CASES {
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| by_tape(case, false, simd::level(), 1))
        };
        let one = on(1);
        for threads in [2, 3, 5] {
            for (name, (a, b)) in NAMES.iter().zip(one.iter().zip(on(threads))) {
                same_bits(&format!("{name} on {threads} threads, {case:?}"), &b, a);
            }
        }
    }
}
