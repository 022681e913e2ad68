use ddpm_cuda::device::Device;
use ddpm_cuda::device::cpu::simd::Isa;
use ddpm_cuda::ops::linear::{linear_by, reference};
use ddpm_cuda::tensor::{DType, Shape};
use num_traits::Float;

use crate::support::{
    F32_ROUNDING, Pass, close, close_as, close_as_but_for, finite_differences, gpu, numbers, plant, same_bits,
    through_tape_on, to_f32,
};

/// `x` and `c_out`. Sizes of one, primes, one over the AVX-512 register tile (32 columns, 14 rows) and over its block
/// of 56 rows; on a GPU every tile shape.
const CASES: [(Shape, usize); 9] = [
    (Shape::new(1, 1, 1, 1), 1),
    (Shape::new(2, 1, 1, 7), 5),
    (Shape::new(16, 1, 1, 32), 128),
    (Shape::new(3, 5, 1, 17), 33),
    (Shape::new(1, 3, 5, 64), 3),
    (Shape::new(1, 57, 1, 3), 31),
    (Shape::new(2, 16, 16, 65), 64),
    (Shape::new(1, 1, 4099, 2), 2),
    (Shape::new(3, 7, 1, 130), 31),
];

/// More for the products on tensor cores, in bf16: channels that chunks of 16 bytes divide, slabs that are full and
/// not, and enough tiles of 128x128.
const BF16_CASES: [(Shape, usize); 6] = [
    // A weight of whole 128x128 tiles, but two rows: the layers of the timestep.
    (Shape::new(2, 1, 1, 256), 128),
    (Shape::new(2, 5, 1, 24), 40),
    (Shape::new(1, 9, 8, 136), 72),
    (Shape::new(1, 1, 3, 8), 8),
    (Shape::new(1, 6, 12, 64), 20),
    (Shape::new(3, 64, 64, 256), 128),
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
        let expected = [DType::F32, DType::Bf16].map(|dtype| {
            // The bias stays f32.
            let mut rounded = data(case).map(|v| gpu::rounded(dtype, &v));
            let [_, _, b, ..] = data(case);
            rounded[2] = b;
            let c_in = case.0.c;
            let oracle = by_reference(c_in, &rounded, plain);
            (oracle, by_reference(c_in, &rounded.map(|v| to_f32(&v)), plain))
        });
        gpu::each(&format!("{case:?}"), |device| {
            let dtype = device.activations();
            let (oracle, yardstick) = &expected[(dtype == DType::Bf16) as usize];
            let got = by_tape_on(device, case, plain, Isa::best(), 1);
            for i in 0..if plain { 3 } else { 5 } {
                // Gradients of parameters are f32 in either case.
                let dtype = if ["dw", "db"].contains(&NAMES[i]) { DType::F32 } else { dtype };
                let name = format!("{} on {device}, {dtype:?}, of {case:?}", NAMES[i]);
                close_as(dtype, &name, &got[i], &oracle[i], &yardstick[i]);
            }
            got.concat()
        });
    }
}

/// As for a convolution, on a GPU the tensor cores may cut what an addition cannot hold: an ulp of each partial sum of
/// products below one.
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
                let cut = if gpu::is_real() { depths[i] as f64 * depths[i] as f64 / 4.0 * 2f64.powi(-23) } else { 0.0 };
                let name = format!("{} on {device}, {dtype:?}, of {case:?}", NAMES[i]);
                close_as_but_for(dtype, &name, &got[i], &oracle[i], &yardstick[i], cut);
            }
            let got = got.concat();
            same_bits(&format!("{case:?}, schedule {schedule}"), &got, first.get_or_insert_with(|| got.clone()));
        }
        gpu::configure("seed", "none");
    }
}

/// Columns of numbers up to 10^4 that cancel but for a last one of 0.7. Sums of a thread's terms in f32 alone would err
/// by some 10^-2. The kernel errs by 2^-36 of the sum of the magnitudes, and its result is rounded once.
#[test]
fn gpu_sums_over_rows_keep_what_f32_would_lose() {
    // 512 rows are a chunk, of which a thread sums every 64th: the last ones three.
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
        gpu::each(&format!("{case:?}"), |device| {
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
    for part in ["fwd_64x64_f32", "dgrad_128x32_f32", "wgrad_64x64_f32", "bwd_sums_bf16", "bwd_bias", "sum_parts"] {
        plant::notices_lost_last_barrier(TEST, &format!("linear_{part}"));
    }
    for part in ["fwd_128x32_f32", "dgrad_64x64_f32", "wgrad_32x128_f32", "bwd_sums_f32", "bwd_bias", "sum_parts"] {
        plant::notices_lost_block(TEST, &format!("linear_{part}"));
    }
    // The two channel counts swapped; a sum that always accumulates.
    for (part, is, reads) in [
        ("fwd_64x64_f32", "5+4", "5+8"),
        ("dgrad_128x32_f32", "3+8", "3+4"),
        ("wgrad_64x64_f32", "3+8", "3+4"),
        ("bwd_bias", "4", "2"),
    ] {
        let entry = format!("linear_{part}");
        plant::notices_wrong_parameter(TEST, &entry, is, reads);
    }
    // The rounding error of the last term of three is taken off instead of added.
    let cancelling = "linear::gpu_sums_over_rows_keep_what_f32_would_lose";
    plant::notices(cancelling, "linear_bwd_sums_f32", "add.f32", "sub.f32");
}

#[test]
fn bugs_planted_in_tensor_core_kernels_are_noticed() {
    const TEST: &str = "linear::gpu_agrees_with_the_reference_in_bf16";
    // The barriers in the order of the text: a slab, the end of the ring, results.
    for (part, n) in
        [("fwd_mma_64x64", 0), ("dgrad_mma_128x128", 1), ("wgrad_mma_64x64", 0), ("wgrad_mma_64x64_any", 2)]
    {
        plant::notices_lost_barrier(TEST, &format!("linear_{part}"), n);
    }
    plant::notices_lost_last_barrier(TEST, "linear_fwd_mma_128x128");
    for part in ["fwd_mma_64x64", "dgrad_mma_64x64", "dgrad_mma_64x64_any", "wgrad_mma_128x128"] {
        plant::notices_lost_block(TEST, &format!("linear_{part}"));
    }
    plant::notices(TEST, "linear_fwd_mma_128x128", "cp.async.wait_group 1;", "cp.async.wait_group 2;");
    plant::notices_wrong_parameter(TEST, "linear_dgrad_mma_64x64", "3+8", "3+4");
    plant::notices_wrong_parameter(TEST, "linear_wgrad_mma_64x64", "3+8", "3+4");
    // This one odd number of channels is in the other test.
    let odd = "linear::gpu_agrees_with_the_reference";
    plant::notices_wrong_parameter(odd, "linear_fwd_mma_64x64_any", "5+4", "5+8");
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
