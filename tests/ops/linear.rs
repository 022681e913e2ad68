use ddpm_cuda::device::cpu::simd::Isa;
use ddpm_cuda::device::{Device, Precision};
use ddpm_cuda::error::Result;
use ddpm_cuda::ops::concat::concat;
use ddpm_cuda::ops::linear::{linear, linear_by, linear_silu, linears, reference};
use ddpm_cuda::ops::silu::silu;
use ddpm_cuda::params::{Init, Layout, Param, Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use num_traits::Float;

use crate::support::{
    F32_ROUNDING, Pass, close, close_as_but_for, finite_differences, gpu, numbers, plant, same_bits, through_tape_on,
    to_f32,
};

/// `x` and `c_out`. Sizes of one, primes, one over the AVX-512 register tile (32 columns, 14 rows) and over its block
/// of 56 rows; on a GPU every tile shape.
const CASES: [(Shape, usize); 10] = [
    (Shape::new(1, 1, 1, 1), 1),
    (Shape::new(2, 1, 1, 7), 5),
    (Shape::new(16, 1, 1, 32), 128),
    (Shape::new(3, 5, 1, 17), 33),
    (Shape::new(1, 3, 5, 64), 3),
    (Shape::new(1, 57, 1, 3), 31),
    (Shape::new(2, 16, 16, 65), 64),
    (Shape::new(1, 1, 4099, 2), 2),
    (Shape::new(3, 7, 1, 130), 31),
    (Shape::new(1, 9, 8, 12), 20),
];

/// More for the products on tensor cores, in bf16: channels that chunks of 16 bytes divide, slabs that are full and
/// not, and enough tiles of 128x128.
const BF16_CASES: [(Shape, usize); 6] = [
    // A weight of whole 128x128 tiles, but two rows: the layers of the timestep.
    (Shape::new(2, 1, 1, 256), 128),
    (Shape::new(2, 5, 1, 24), 40),
    (Shape::new(1, 9, 16, 136), 72),
    (Shape::new(1, 1, 3, 8), 8),
    (Shape::new(1, 6, 12, 64), 20),
    // The last segment of dw ends in a slot of the ring that its results go through.
    (Shape::new(3, 43, 96, 256), 128),
];

/// `x`, `w`, `b`, residual, `dy`.
fn data((x, c_out): (Shape, usize)) -> [Vec<f64>; 5] {
    let y = x.rows() * c_out;
    [numbers(1, x.len()), numbers(2, c_out * x.c), numbers(3, c_out), numbers(4, y), numbers(5, y)]
}

const NAMES: [&str; 5] = ["y", "dx", "dw", "db", "dresidual"];

/// A layer with bias and residual, or without both if `plain`. The parameter gradients of `passes` passes accumulate.
fn by_tape_on(device: &Device, (shape, c_out): (Shape, usize), plain: bool, isa: Isa, passes: usize) -> [Vec<f32>; 5] {
    let [x, w, b, residual, dy] = data((shape, c_out)).map(|v| to_f32(&v));
    let mut inputs = vec![(shape, x), (shape.with_c(c_out), residual)];
    let mut params = vec![(Shape::new(c_out, 1, 1, shape.c), w), (Shape::vector(c_out), b)];
    if plain {
        inputs.truncate(1);
        params.truncate(1);
    }
    let Pass { y, dx, dw } = through_tape_on(device, &inputs, &params, &dy, passes, |tape, v, p| {
        linear_by(tape, &v[0], p[0], p.get(1).copied(), v.get(1), isa)
    });
    let [mut dx, mut dw] = [dx, dw].map(Vec::into_iter);
    let next = |of: &mut std::vec::IntoIter<Vec<f32>>| of.next().unwrap_or_default();
    [y, next(&mut dx), next(&mut dw), next(&mut dw), next(&mut dx)]
}

fn by_tape(case: (Shape, usize), plain: bool, isa: Isa, passes: usize) -> [Vec<f32>; 5] {
    by_tape_on(&Device::cpu_guarded(), case, plain, isa, passes)
}

/// `y`, `dx`, `dw`, `db`, `dresidual` by the reference.
fn by_reference<T: Float>(c_in: usize, data: &[Vec<T>; 5], plain: bool) -> [Vec<T>; 5] {
    let [x, w, b, residual, dy] = data;
    let (b, residual) = if plain { (None, None) } else { (Some(&b[..]), Some(&residual[..])) };
    let y = reference::forward(x, w, c_in, b, residual);
    let [dx, dw, db] = reference::backward(x, w, c_in, dy);
    [y, dx, dw, db, dy.clone()]
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
            let data = data(case);
            let oracle = by_reference(case.0.c, &data, plain);
            let yardstick = by_reference(case.0.c, &data.map(|v| to_f32(&v)), plain);
            for isa in Isa::available() {
                let got = by_tape(case, plain, isa, 1);
                for i in 0..if plain { 3 } else { 5 } {
                    close(&format!("{} on {:?}, {case:?}", NAMES[i], isa.level()), &got[i], &oracle[i], &yardstick[i]);
                }
            }
        }
    }
}

#[test]
fn gpu_agrees_with_the_reference() {
    if !gpu::available() {
        return;
    }
    for (case, plain) in CASES.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let expected = Precision::ALL.map(|precision| {
            // The bias stays f32.
            let mut rounded = data(case).map(|v| gpu::rounded(precision.activations(), &v));
            let [_, _, b, ..] = data(case);
            rounded[2] = b;
            let c_in = case.0.c;
            let oracle = in_precision(precision, &rounded, |data| by_reference(c_in, data, plain));
            let in_f32 = |data: &[Vec<f64>; 5]| by_reference(c_in, &data.each_ref().map(|v| to_f32(v)), plain);
            (oracle, in_precision(precision, &rounded, in_f32))
        });
        let depths = [case.0.c, case.1, case.0.rows(), 0, 0];
        gpu::each_precision(&format!("{case:?}"), |device| {
            let precision = device.precision();
            let (oracle, yardstick) = &expected[precision as usize];
            let got = by_tape_on(device, case, plain, Isa::best(), 1);
            for i in 0..if plain { 3 } else { 5 } {
                // Gradients of parameters are f32 in either case.
                let dtype = if ["dw", "db"].contains(&NAMES[i]) { DType::F32 } else { precision.activations() };
                let name = format!("{} on {device}, {precision}, of {case:?}", NAMES[i]);
                let cut = if precision == Precision::Tf32 { gpu::cut(depths[i]) } else { 0.0 };
                close_as_but_for(dtype, &name, &got[i], &oracle[i], &yardstick[i], cut);
            }
            got.concat()
        });
    }
}

/// The results that `by` has where the products take x, w and dy in a precision; what are no products take dy as it is.
fn in_precision<T: Clone>(
    precision: Precision,
    data: &[Vec<f64>; 5],
    by: impl Fn(&[Vec<f64>; 5]) -> [Vec<T>; 5],
) -> [Vec<T>; 5] {
    let mut of_products = data.clone();
    for i in [0, 1, 4] {
        of_products[i] = gpu::multiplied(precision, &data[i]);
    }
    let mut results = by(&of_products);
    if precision == Precision::Tf32 {
        results[3..].clone_from_slice(&by(data)[3..]);
    }
    results
}

/// Operands that are rounded to 10 bits of fraction are off by 2^-11 each, and their product by (1 + 2^-11)^2 - 1. That
/// is seen, or they were not rounded; and numbers that are not finite stay where they belong.
#[test]
fn gpu_errs_in_tf32_by_what_is_rounded_off() {
    let Some(gpu) = gpu::gpu(Precision::Tf32) else { return };
    let device = Device::Cuda(gpu.clone());
    let (shape, c_out) = (Shape::new(1, 9, 8, 40), 64);
    let [x, w, ..] = data((shape, c_out));
    let params = [(Shape::new(c_out, 1, 1, shape.c), to_f32(&w))];
    let y_of = |x: &[f32]| {
        let dy = vec![0.0; shape.rows() * c_out];
        let op = |tape: &mut Tape<'_>, v: &[Var], p: &[Param]| linear(tape, &v[0], p[0], None, None);
        through_tape_on(&device, &[(shape, x.to_vec())], &params, &dy, 1, op).y
    };
    gpu.record_launches();
    let y = y_of(&to_f32(&x));
    assert_eq!(gpu.recorded_launches()[0].kernel, "linear_fwd_64x64_tf32");
    let exact = reference::forward(&x, &w, shape.c, None, None);
    let magnitudes = |v: &[f64]| v.iter().map(|v| v.abs()).collect::<Vec<f64>>();
    let magnitudes = reference::forward(&magnitudes(&x), &magnitudes(&w), shape.c, None, None);
    let of_product = (1.0 + 2f64.powi(-11)).powi(2) - 1.0;
    let shares = y.iter().zip(&exact).zip(&magnitudes).map(|((y, exact), magnitude)| {
        let allowed = magnitude * (of_product + shape.c as f64 * 2.0 * F32_ROUNDING);
        (f64::from(*y) - exact).abs() / allowed
    });
    let worst = shares.fold(0.0, f64::max);
    println!("{worst:.3} of what the roundings of both operands may make");
    assert!(worst <= 1.0, "{worst} of what is allowed");
    assert!(worst > 2f64.powi(-5), "{worst} of what is allowed: the operands were not rounded to tf32");

    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = to_f32(&x);
        x[5 * shape.c + 3] = odd;
        for (at, (got, want)) in y_of(&x).iter().zip(&y).enumerate() {
            if at / c_out != 5 {
                assert_eq!(got.to_bits(), want.to_bits(), "{odd} in another row changes {at}");
            } else if odd.is_nan() {
                assert!(got.is_nan(), "{got} at {at}, of NaN");
            } else {
                let sign = odd.signum() * params[0].1[at % c_out * shape.c + 3].signum();
                assert_eq!(*got, sign * f32::INFINITY, "at {at}, of {odd}");
            }
        }
    }
}

#[test]
fn gpu_agrees_with_the_reference_in_bf16() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu);
    for (case, plain) in BF16_CASES.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let mut rounded = data(case).map(|v| gpu::rounded(DType::Bf16, &v));
        rounded[2] = data(case)[2].clone();
        let oracle = by_reference(case.0.c, &rounded, plain);
        let yardstick = by_reference(case.0.c, &rounded.map(|v| to_f32(&v)), plain);
        let depths = [case.0.c, case.1, case.0.rows(), 0, 0];
        let mut first: Option<Vec<f32>> = None;
        for schedule in gpu::SCHEDULES {
            gpu::configure("seed", schedule);
            let got = by_tape_on(&device, case, plain, Isa::best(), 1);
            for i in 0..if plain { 3 } else { 5 } {
                let dtype = if ["dw", "db"].contains(&NAMES[i]) { DType::F32 } else { DType::Bf16 };
                let cut = gpu::cut(depths[i]);
                let name = format!("{} on {device}, {dtype:?}, of {case:?}", NAMES[i]);
                close_as_but_for(dtype, &name, &got[i], &oracle[i], &yardstick[i], cut);
            }
            let got = got.concat();
            same_bits(&format!("{case:?}, schedule {schedule}"), &got, first.get_or_insert_with(|| got.clone()));
        }
        gpu::configure("seed", "none");
    }
}

/// Asserts that a layer and its SiLU in one call have the bits of both, gradients too, and that a tape that does not
/// record has the same output, in bf16 on a GPU of one launch. Returns everything.
fn layer_and_silu(device: &Device, (shape, c_out): (Shape, usize)) -> Vec<f32> {
    let both = |tape: &mut Tape<'_>, x: &Var, p: &[Param], in_one: bool| {
        if in_one {
            return linear_silu(tape, x, p[0], p[1]);
        }
        let y = linear(tape, x, p[0], Some(p[1]), None)?;
        silu(tape, &y)
    };
    let [x, w, b, _, dy] = data((shape, c_out)).map(|v| to_f32(&v));
    let params = [(Shape::new(c_out, 1, 1, shape.c), w), (Shape::vector(c_out), b)];
    let by = |in_one| {
        let op = |tape: &mut Tape<'_>, v: &[Var], p: &[Param]| both(tape, &v[0], p, in_one);
        through_tape_on(device, &[(shape, x.clone())], &params, &dy, 1, op).flat()
    };
    let in_one = by(true);
    same_bits(&format!("{shape} to {c_out} on {device}"), &in_one, &by(false));

    let mut specs = Specs::default();
    let p = params.each_ref().map(|(shape, _)| specs.add("p".into(), *shape, Layout::Vector, Init::Zeros));
    let mut flat = vec![0.0; specs.flat_len()];
    p.iter().zip(&params).for_each(|(p, (_, values))| flat[specs.range(*p)].copy_from_slice(values));
    let params = Params::from_host(device, specs, &flat).unwrap();
    let x = Var::constant(Tensor::from_slice_as(device, device.activations(), shape, &x).unwrap());
    let infer = || both(&mut Tape::inference(device, &params), &x, &p, true).unwrap().into_value();
    let y = match device {
        Device::Cuda(gpu) => {
            gpu.record_launches();
            let y = infer();
            let want = if device.activations() == DType::Bf16 { 1 } else { 2 };
            assert_eq!(gpu.recorded_launches().len(), want, "launches for {shape} to {c_out}");
            y
        }
        _ => infer(),
    };
    let y = y.to_vec().unwrap();
    same_bits(&format!("{shape} to {c_out} on {device}, not recorded"), &y, &in_one[..y.len()]);
    in_one
}

#[test]
fn a_silu_behind_a_layer_changes_no_bits() {
    let few = CASES.into_iter().filter(|(x, _)| x.rows() < 1000);
    few.for_each(|case| _ = layer_and_silu(&Device::cpu_guarded(), case));
}

/// Channels that 8 divides and others, tiles of both sizes.
#[test]
fn gpu_silu_behind_a_layer_changes_no_bits() {
    let cases = [CASES[1], CASES[3], BF16_CASES[0], BF16_CASES[2], BF16_CASES[5]];
    for case in cases.into_iter().filter(|_| gpu::available()) {
        gpu::each(&format!("a layer and its SiLU, {case:?}"), |device| layer_and_silu(device, case));
    }
}

/// `x` and the channels of layers that read it. Images of one row, whose layers are segments of dx; one slab after the
/// other, and tiles that are not full; several segments of rows; tiles of 128x128; more layers than a launch takes;
/// channels that are computed layer by layer; tiles of 64x64 for dx and of 128x128 for dw.
const GROUPS: [(Shape, &[usize]); 7] = [
    (Shape::new(5, 1, 1, 72), &[40, 136, 8, 64]),
    (Shape::new(2, 5, 7, 136), &[72, 8, 136]),
    (Shape::new(1, 40, 64, 24), &[16, 16, 16]),
    (Shape::new(3, 43, 96, 128), &[128, 128]),
    (Shape::new(3, 1, 1, 8), &[8; 33]),
    (Shape::new(2, 3, 1, 9), &[5, 8]),
    (Shape::new(3, 1, 1, 128), &[128, 256]),
];

/// `y`, `dx`, `dw` and `db` of layers of the same `x`, side by side as of one.
fn group_on(
    device: &Device,
    (shape, widths): (Shape, &[usize]),
    passes: usize,
    by: impl Fn(&mut Tape<'_>, &Var, &[(Param, Param)]) -> Result<Vec<Var>>,
) -> [Vec<f32>; 4] {
    let [x, w, b, _, dy] = data((shape, widths.iter().sum())).map(|v| to_f32(&v));
    let (mut w, mut b, mut params) = (&w[..], &b[..], Vec::new());
    for &c in widths {
        let (of_w, of_b);
        (of_w, w) = w.split_at(c * shape.c);
        (of_b, b) = b.split_at(c);
        params.extend([(Shape::new(c, 1, 1, shape.c), of_w.to_vec()), (Shape::vector(c), of_b.to_vec())]);
    }
    let Pass { y, dx, dw } = through_tape_on(device, &[(shape, x)], &params, &dy, passes, |tape, v, p| {
        let layers: Vec<(Param, Param)> = p.chunks_exact(2).map(|p| (p[0], p[1])).collect();
        let mut ys = by(tape, &v[0], &layers)?.into_iter();
        let first = ys.next().expect("a layer");
        ys.try_fold(first, |y, next| concat(tape, &y, &next))
    });
    let every_second = |first: usize| dw.iter().skip(first).step_by(2).flatten().copied().collect();
    [y, dx[0].clone(), every_second(0), every_second(1)]
}

fn one_by_one(tape: &mut Tape<'_>, x: &Var, layers: &[(Param, Param)]) -> Result<Vec<Var>> {
    layers.iter().map(|&(weight, bias)| linear(tape, x, weight, Some(bias), None)).collect()
}

#[test]
fn layers_of_one_input_have_the_bits_of_each() {
    for case in GROUPS {
        let device = Device::cpu_guarded();
        let [group, each] = [group_on(&device, case, 2, linears), group_on(&device, case, 2, one_by_one)];
        for i in 0..4 {
            same_bits(&format!("{}, {case:?}", NAMES[i]), &group[i], &each[i]);
        }
    }
}

/// In f32 and of odd channels everything has the bits of layer by layer. In bf16 `y` has; `dx` is rounded once, after
/// all layers, and the rows, which `dw` sums over, are cut into other segments.
#[test]
fn gpu_layers_of_one_input_agree_with_the_reference() {
    for case in GROUPS {
        let (shape, c_out) = (case.0, case.1.iter().sum());
        gpu::each(&format!("{case:?}"), |device| {
            let dtype = device.activations();
            let [group, each] = [group_on(device, case, 1, linears), group_on(device, case, 1, one_by_one)];
            let as_group = dtype == DType::Bf16 && shape.c.is_multiple_of(8);
            for i in 0..if as_group { 1 } else { 4 } {
                same_bits(&format!("{}, {dtype:?}, of {case:?}", NAMES[i]), &group[i], &each[i]);
            }
            if as_group {
                let mut rounded = data((shape, c_out)).map(|v| gpu::rounded(dtype, &v));
                rounded[2] = data((shape, c_out))[2].clone();
                rounded[3].fill(0.0); // the residual
                let oracle = by_reference(shape.c, &rounded, false);
                let yardstick = by_reference(shape.c, &rounded.each_ref().map(|v| to_f32(v)), false);
                let depths = [shape.c, c_out, shape.rows(), 0];
                for i in 0..4 {
                    let dtype = if ["dw", "db"].contains(&NAMES[i]) { DType::F32 } else { DType::Bf16 };
                    let mut cut = gpu::cut(depths[i]);
                    if NAMES[i] == "dx" && case.1.len() > 32 {
                        // The parts of two launches are rounded before they are added.
                        let seam: usize = case.1[..32].iter().sum();
                        let [x, w, _, _, dy] = &rounded;
                        let dy: Vec<f64> = dy.chunks(c_out).flat_map(|dy| dy[seam..].to_vec()).collect();
                        let [last, ..] = reference::backward(x, &w[seam * shape.c..], shape.c, &dy);
                        let parts = oracle[i].iter().zip(&last).map(|(all, last)| (all - last).abs() + last.abs());
                        cut += gpu::rounding(dtype) * parts.fold(0.0, f64::max);
                    }
                    let name = format!("{} on {device}, {dtype:?}, of {case:?}", NAMES[i]);
                    close_as_but_for(dtype, &name, &group[i], &oracle[i], &yardstick[i], cut);
                }
            }
            group.concat()
        });
    }
}

/// The launches of a backward pass: one for all gradients of all layers, and one sum for what they leave of it.
#[test]
fn gpu_layers_of_one_input_are_one_product() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu.clone());
    for (case, expected) in [
        (GROUPS[0], &["fwd_mma_64x64", "bwd_mma_64x64", "join"][..]),
        (GROUPS[1], &["fwd_mma_64x64", "bwd_mma_64x64"]),
        (GROUPS[3], &["fwd_mma_128x128", "bwd_mma_128x128"]),
        (GROUPS[6], &["fwd_mma_64x64", "bwd_mma_64x64_128x128", "join"]),
    ] {
        gpu.record_launches();
        group_on(&device, case, 1, linears);
        let launched = gpu.recorded_launches();
        let of_group: Vec<&str> = launched.iter().filter_map(|l| l.kernel.strip_prefix("linear_group_")).collect();
        assert_eq!(of_group, expected, "{case:?}");
        let sums = launched.iter().filter(|l| l.kernel == "add_parts").count();
        assert_eq!(sums, 1, "launches for the sums of {case:?}");
    }
}

/// An output that nothing uses has no gradient, and leaves those of the others alone.
#[test]
fn an_unused_layer_of_several_has_no_gradient() {
    let used = |tape: &mut Tape<'_>, x: &Var, layers: &[(Param, Param)]| {
        let mut ys = linears(tape, x, layers)?;
        // As wide as the one that it takes the place of.
        ys[0] = linear(tape, x, layers[0].0, Some(layers[0].1), None)?;
        Ok(ys)
    };
    let device = Device::cpu_guarded();
    let (group, other) = (group_on(&device, GROUPS[1], 1, linears), group_on(&device, GROUPS[1], 1, used));
    for i in [0, 2, 3] {
        same_bits(NAMES[i], &other[i], &group[i]);
    }
    gpu::each("an unused layer", |device| group_on(device, GROUPS[1], 1, used).concat());
}

/// Columns of numbers up to 10^4 that cancel but for a last one of 0.7. Sums of a thread's terms in f32 alone would err
/// by some 10^-2. The kernel errs by 2^-36 of the sum of the magnitudes, and its result is rounded once.
#[test]
fn gpu_sums_over_rows_keep_what_f32_would_lose() {
    // In f32 512 rows are a chunk, of which a thread sums every 64th: the last ones three. In bf16 64 are a slab.
    let (rows, c_out) = (703, 3);
    let half: Vec<f32> = numbers(5, rows / 2 * c_out).iter().map(|v| (v * 1e4) as f32).collect();
    let dy = [half.clone(), half.iter().rev().map(|v| -v).collect(), vec![0.7; c_out]].concat();
    gpu::each("cancelling rows", |device| {
        let dtype = device.activations();
        let dy = gpu::rounded_f32(dtype, &dy);
        let (shape, bias) = (Shape::new(1, rows, 1, 1), (Shape::vector(c_out), vec![0.0; c_out]));
        let weight = (Shape::new(c_out, 1, 1, 1), vec![0.0; c_out]);
        let Pass { dw, .. } =
            through_tape_on(device, &[(shape, vec![0.0; rows])], &[weight, bias], &dy, 1, |tape, v, p| {
                linear_by(tape, &v[0], p[0], Some(p[1]), None, Isa::best())
            });
        for (column, got) in dw[1].iter().enumerate() {
            let terms = || dy.iter().skip(column).step_by(c_out).map(|&v| f64::from(v));
            let (want, magnitudes) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            let budget = F32_ROUNDING * want.abs() + magnitudes * 2f64.powi(-36);
            let error = (f64::from(*got) - want).abs();
            assert!(error <= budget, "column {column}, {dtype:?}: {got}, expected {want} +- {budget:e}");
        }
        dw[1].clone()
    });
}

#[test]
fn gpu_parameter_gradients_accumulate() {
    // One with a single split-K segment (its rows are the k of dw) and one with several.
    for case in [CASES[3], CASES[7]] {
        gpu::each_precision(&format!("{case:?}"), |device| {
            let [once, twice] = [1, 2].map(|passes| by_tape_on(device, case, false, Isa::best(), passes));
            for i in 2..4 {
                let sum: Vec<f32> = once[i].iter().map(|v| v + v).collect();
                same_bits(&format!("{} twice, {case:?}", NAMES[i]), &twice[i], &sum);
            }
            twice.concat()
        });
    }
}

/// Missing barriers, missing blocks, one parameter in place of another.
#[test]
fn planted_bugs_are_noticed() {
    const TEST: &str = "linear::gpu_agrees_with_the_reference";
    for part in ["fwd_64x64_f32", "dgrad_128x32_f32", "wgrad_64x64_f32", "bwd_sums_f32"] {
        plant::notices_lost_last_barrier(TEST, &format!("linear_{part}"));
    }
    for part in ["fwd_128x32_f32", "dgrad_64x64_f32", "wgrad_32x128_f32", "bwd_sums_f32"] {
        plant::notices_lost_block(TEST, &format!("linear_{part}"));
    }
    // The two channel counts swapped.
    for (part, is, reads) in
        [("fwd_64x64_f32", "5+4", "5+8"), ("dgrad_128x32_f32", "3+8", "3+4"), ("wgrad_64x64_f32", "3+8", "3+4")]
    {
        let entry = format!("linear_{part}");
        plant::notices_wrong_parameter(TEST, &entry, is, reads);
    }
    // The rounding error of the last term of three is taken off instead of added.
    let cancelling = "linear::gpu_sums_over_rows_keep_what_f32_would_lose";
    plant::notices(cancelling, "linear_bwd_sums_f32", "add.f32", "sub.f32");
}

/// The same in tf32, and operands that are cut instead of rounded.
#[test]
fn bugs_planted_in_tf32_kernels_are_noticed() {
    const TEST: &str = "linear::gpu_agrees_with_the_reference";
    for part in ["fwd_64x64", "dgrad_128x32", "wgrad_64x64"] {
        plant::notices_lost_last_barrier(TEST, &format!("linear_{part}_tf32"));
    }
    for part in ["fwd_128x32", "dgrad_64x64", "wgrad_32x128"] {
        plant::notices_lost_block(TEST, &format!("linear_{part}_tf32"));
    }
    for part in ["fwd_64x64", "fwd_128x32", "dgrad_64x64", "dgrad_128x32", "wgrad_64x64", "wgrad_32x128"] {
        plant::notices(TEST, &format!("linear_{part}_tf32"), "cvt.rna.tf32.f32", "mov.b32");
    }
    // The second step of the second 32 rows or columns is that of the first.
    for (part, from, to) in
        [("fwd_64x64", "+400];", "+272];"), ("dgrad_128x32", "+656];", "+528];"), ("wgrad_32x128", "+656];", "+528];")]
    {
        plant::notices(TEST, &format!("linear_{part}_tf32"), from, to);
    }
}

#[test]
fn bugs_planted_in_tensor_core_kernels_are_noticed() {
    const TEST: &str = "linear::gpu_agrees_with_the_reference_in_bf16";
    // The barriers in the order of the text: a slab, the end of the ring, results.
    for (part, barriers) in [
        ("fwd_mma_64x64", &[0][..]),
        ("bwd_mma_128x128", &[1, 2]),
        ("bwd_mma_64x64", &[0]),
        ("wgrad_mma_64x64_any", &[2]),
    ] {
        barriers.iter().for_each(|&n| plant::notices_lost_barrier(TEST, &format!("linear_{part}"), n));
    }
    plant::notices_lost_last_barrier(TEST, "linear_fwd_mma_128x128");
    for part in ["fwd_mma_64x64", "bwd_mma_64x64", "dgrad_mma_64x64_any", "bwd_mma_64x64_128x128"] {
        plant::notices_lost_block(TEST, &format!("linear_{part}"));
    }
    plant::notices(TEST, "linear_fwd_mma_128x128", "cp.async.wait_group 1;", "cp.async.wait_group 2;");
    // The two channel counts swapped; tiles for segments of dw, segments for their depth, tiles of dx for those of dw.
    for (is, reads) in [("6+8", "6+4"), ("7+4", "7"), ("7+8", "7+4"), ("7", "7+12")] {
        plant::notices_wrong_parameter(TEST, "linear_bwd_mma_64x64", is, reads);
    }
    // The rounding error of the last term of a slab is taken off instead of added.
    let cancelling = "linear::gpu_sums_over_rows_keep_what_f32_would_lose";
    plant::notices(cancelling, "linear_wgrad_mma_64x64_any", "sub.f32", "add.f32");
    // What the SiLU makes of y takes the place of y; a block that stores neither.
    let with_silu = "linear::gpu_silu_behind_a_layer_changes_no_bits";
    plant::notices_wrong_parameter(with_silu, "linear_fwd_mma_64x64", "6", "0");
    plant::notices_lost_block(with_silu, "linear_fwd_mma_128x128");
    // This one odd number of channels is in the other test.
    let odd = "linear::gpu_agrees_with_the_reference";
    plant::notices_wrong_parameter(odd, "linear_fwd_mma_64x64_any", "5+4", "5+8");
}

/// A layer's tiles, its place in the table, its part of a sum.
#[test]
fn bugs_planted_in_kernels_of_several_layers_are_noticed() {
    const TEST: &str = "linear::gpu_layers_of_one_input_agree_with_the_reference";
    for (part, barriers) in [("fwd_mma_64x64", &[0][..]), ("bwd_mma_64x64", &[0, 1]), ("bwd_mma_128x128", &[1, 2])] {
        barriers.iter().for_each(|&n| plant::notices_lost_barrier(TEST, &format!("linear_group_{part}"), n));
    }
    for part in ["fwd_mma_128x128", "bwd_mma_128x128", "join", "bwd_mma_64x64_128x128"] {
        plant::notices_lost_block(TEST, &format!("linear_group_{part}"));
    }
    // A segment of dx has as many layers as there are segments; the tiles of dw are those of dx.
    for (is, reads) in [("7+20", "7+16"), ("7", "7+12")] {
        plant::notices_wrong_parameter(TEST, "linear_group_bwd_mma_64x64", is, reads);
    }
}

#[test]
fn parameter_gradients_accumulate() {
    for case in CASES {
        let (once, twice) = (by_tape(case, false, Isa::best(), 1), by_tape(case, false, Isa::best(), 2));
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
            pool.install(|| by_tape(case, false, Isa::best(), 1))
        };
        let one = on(1);
        for threads in [2, 3, 5] {
            for (name, (a, b)) in NAMES.iter().zip(one.iter().zip(on(threads))) {
                same_bits(&format!("{name} on {threads} threads, {case:?}"), &b, a);
            }
        }
    }
}
