use ddpm_cuda::device::Device;
use ddpm_cuda::ops::attention::{attention, reference};
use ddpm_cuda::params::{Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};

use crate::support::{
    F32_ROUNDING, Pass, close_as_but_for, finite_differences, gpu, numbers, plant, same_bits,
    same_bits_at_any_number_of_threads, through_tape_on, to_f32,
};

/// Shape, heads. One token; one channel; primes; a head per channel; not square; one token beyond a block of 42, and
/// several blocks; sizes of the networks; the largest head; more pairs of image and head than the backward pass of the
/// CPU holds scores for at a time (32 of 256 tokens); more rows of scores than it holds (1,382 of 1,517).
const CASES: [(Shape, usize); 11] = [
    (Shape::new(1, 1, 1, 1), 1),
    (Shape::new(2, 1, 1, 6), 2),
    (Shape::new(2, 3, 5, 7), 1),
    (Shape::new(1, 3, 5, 6), 6),
    (Shape::new(3, 13, 5, 34), 2),
    (Shape::new(1, 16, 16, 64), 1),
    (Shape::new(2, 5, 29, 96), 3),
    (Shape::new(1, 4, 9, 512), 1),
    (Shape::new(1, 43, 1, 17), 1),
    (Shape::new(3, 16, 16, 24), 12),
    (Shape::new(1, 37, 41, 3), 1),
];

/// `[q, k, v, dy]`; `scale` multiplies q and k.
fn inputs(shape: Shape, scale: f64) -> [Vec<f64>; 4] {
    [(1, scale), (2, scale), (3, 1.0), (4, 1.0)]
        .map(|(seed, scale)| numbers(seed, shape.len()).iter().map(|x| f64::from((x * scale) as f32)).collect())
}

fn pass(shape: Shape, heads: usize, inputs: &[Vec<f64>; 4]) -> Pass {
    pass_on(&Device::cpu_guarded(), shape, heads, inputs)
}

fn pass_on(device: &Device, shape: Shape, heads: usize, [q, k, v, dy]: &[Vec<f64>; 4]) -> Pass {
    let inputs = [q, k, v].map(|x| (shape, to_f32(x)));
    let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| attention(tape, &x[0], &x[1], &x[2], heads);
    through_tape_on(device, &inputs, &[], &to_f32(dy), 1, op)
}

/// The exponentials of the CPU path and of the kernels err by up to 2 ulp, 4 roundings; that of the C library by 1.
/// This adds 4 roundings of the largest element to each result. `delta` is the further error allowed in the sums
/// `sum_j P_ij dP_ij`.
fn check(shape: Shape, heads: usize, exact: &[Vec<f64>; 4], got: &Pass, dtype: DType, delta: f64) {
    let [q, k, v, dy] = exact;
    let [q_f32, k_f32, v_f32, dy_f32] = exact.each_ref().map(|x| to_f32(x));
    let (exact, rounded) = ([&q[..], k, v], [&q_f32[..], &k_f32, &v_f32]);
    let compare = |name: &str, got: &[f32], oracle: &[f64], yardstick: &[f32], more: f64| {
        let name = format!("{name} of {shape} with {heads} heads");
        let allowance = 4.0 * F32_ROUNDING * largest(oracle) + more;
        close_as_but_for(dtype, &name, got, oracle, yardstick, allowance);
    };
    compare("y", &got.y, &reference::forward(exact, shape, heads), &reference::forward(rounded, shape, heads), 0.0);
    let oracle = reference::backward(exact, dy, shape, heads);
    let yardstick = reference::backward(rounded, &dy_f32, shape, heads);
    let more = if delta == 0.0 {
        [0.0; 3]
    } else {
        // delta_i reaches dq_i times sum_j P_ij k_j, and dk_j as sum_i P_ij q_i; sum_i P_ij is the gradient dv_j for
        // dy = 1.
        let [_, _, columns] = reference::backward(exact, &vec![1.0; dy.len()], shape, heads);
        let scale = (heads as f64 / shape.c as f64).sqrt();
        [delta * scale * largest(k), delta * scale * largest(q) * largest(&columns), 0.0]
    };
    for (i, name) in ["dq", "dk", "dv"].iter().enumerate() {
        compare(name, &got.dx[i], &oracle[i], &yardstick[i], more[i]);
    }
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// The kernels compute `sum_j P_ij dP_ij` as `dy_i . y_i`. In bf16 they know `y` to 2^-18 of itself: 9 bits from `y`, 9
/// more from its saved rounding error. With one token, dP_i equals the sum and the reference's error is zero; the error
/// of the kernels is then that of two sums of d products, one of which also has roundings in each term.
fn delta(shape: Shape, heads: usize, [q, k, v, dy]: &[Vec<f64>; 4], dtype: DType) -> f64 {
    let d = shape.c / heads;
    let y = reference::forward([&q[..], k, v], shape, heads);
    let terms: Vec<f64> = dy.iter().zip(&y).map(|(dy, y)| (dy * y).abs()).collect();
    let sum = terms.chunks_exact(d).map(|row| row.iter().sum()).fold(0.0, f64::max);
    let rounding = match dtype {
        DType::F32 if shape.pixels() > 1 => 0.0,
        DType::F32 => (2 * d + 4) as f64 * F32_ROUNDING,
        DType::Bf16 => 1.0 / f64::from(1 << 18) + (2 * d + 4) as f64 * F32_ROUNDING,
    };
    rounding * sum
}

fn check_cpu(shape: Shape, heads: usize, scale: f64) {
    let exact = inputs(shape, scale);
    check(shape, heads, &exact, &pass(shape, heads, &exact), DType::F32, 0.0);
}

#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for (shape, heads) in CASES {
        check_cpu(shape, heads, 1.0);
    }
}

/// Scores in the hundreds, whose exponentials overflow f32: a softmax that does not subtract the maximum of the row
/// first gives only NaN.
#[test]
fn large_scores_do_not_overflow() {
    for (shape, heads) in CASES {
        check_cpu(shape, heads, 20.0);
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    for (shape, heads) in [(Shape::new(2, 2, 2, 4), 2), (Shape::new(1, 3, 1, 3), 1)] {
        let [q, k, v, dy] = inputs(shape, 1.0);
        let gradients = reference::backward([&q, &k, &v], &dy, shape, heads);
        let f = |x: &[Vec<f64>]| {
            reference::forward([&x[0], &x[1], &x[2]], shape, heads).iter().zip(&dy).map(|(y, dy)| y * dy).sum()
        };
        finite_differences("attention", f, &[q.clone(), k.clone(), v.clone()], &gradients);
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let (shape, heads) = CASES[4];
    let batch = inputs(shape, 1.0);
    let together = pass(shape, heads, &batch);
    let image = shape.len() / shape.n;
    for i in 0..shape.n {
        let part = i * image..(i + 1) * image;
        let alone = pass(Shape { n: 1, ..shape }, heads, &batch.each_ref().map(|x| x[part.clone()].to_vec()));
        same_bits("y", &alone.y, &together.y[part.clone()]);
        for (alone, together) in alone.dx.iter().zip(&together.dx) {
            same_bits("gradient", alone, &together[part.clone()]);
        }
    }
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    for (shape, heads) in [CASES[4], CASES[6], CASES[10]] {
        let exact = inputs(shape, 1.0);
        same_bits_at_any_number_of_threads("attention", || pass(shape, heads, &exact).flat());
    }
}

/// Runs and checks a case on a GPU; returns all its results.
fn check_gpu(device: &Device, shape: Shape, heads: usize, scale: f64) -> Vec<f32> {
    let dtype = device.activations();
    let exact = inputs(shape, scale).each_ref().map(|x| gpu::rounded(dtype, x));
    let got = pass_on(device, shape, heads, &exact);
    check(shape, heads, &exact, &got, dtype, delta(shape, heads, &exact, dtype));
    got.flat()
}

/// One tile of tokens and channels, and one beyond it, for each compiled head size.
const GPU_CASES: [(Shape, usize); 5] = [
    (Shape::new(1, 1, 65, 33), 1),
    (Shape::new(1, 8, 8, 128), 2),
    (Shape::new(1, 7, 7, 128), 1),
    (Shape::new(1, 5, 13, 129), 1),
    (Shape::new(1, 1, 33, 257), 1),
];

#[test]
fn the_gpu_agrees_with_the_reference() {
    for (shape, heads) in CASES.into_iter().chain(GPU_CASES) {
        // Many small heads with many tokens are slow under the emulator's checks, so only the other cases run in all
        // schedules.
        if shape.n * heads * shape.pixels().pow(2) < 1 << 18 {
            gpu::each("attention", |device| check_gpu(device, shape, heads, 1.0));
        } else {
            for dtype in [DType::F32, DType::Bf16] {
                let Some(gpu) = gpu::gpu(dtype) else { return };
                check_gpu(&Device::Cuda(gpu), shape, heads, 1.0);
            }
        }
    }
}

#[test]
fn on_the_gpu_large_scores_do_not_overflow() {
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        for (shape, heads) in [CASES[2], CASES[4], CASES[5], CASES[7], GPU_CASES[3]] {
            check_gpu(&Device::Cuda(gpu.clone()), shape, heads, 20.0);
        }
    }
}

#[test]
fn on_the_gpu_an_image_does_not_depend_on_its_batch() {
    let (shape, heads) = CASES[4];
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu);
    let batch = inputs(shape, 1.0);
    let together = pass_on(&device, shape, heads, &batch);
    let image = shape.len() / shape.n;
    for i in 0..shape.n {
        let part = i * image..(i + 1) * image;
        let alone = batch.each_ref().map(|x| x[part.clone()].to_vec());
        let alone = pass_on(&device, Shape { n: 1, ..shape }, heads, &alone);
        same_bits("y", &alone.y, &together.y[part.clone()]);
        for (alone, together) in alone.dx.iter().zip(&together.dx) {
            same_bits("gradient", alone, &together[part.clone()]);
        }
    }
}

#[test]
fn heads_too_large_for_the_gpu_are_refused() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let (shape, device) = (Shape::new(1, 1, 1, 513), Device::Cuda(gpu));
    let params = Params::zeros(&device, Specs::default()).expect("no parameters");
    let x = Var::constant(Tensor::zeros(&device, shape).expect("room for a tensor"));
    let refused = attention(&mut Tape::inference(&device, &params), &x, &x, &x, 1).expect_err("513 channels");
    assert!(refused.to_string().contains("heads of 513 channels"), "{refused}");
}

/// Two blocks of rows, two of columns and two chunks of channels, so that a missing barrier shows.
#[test]
fn gpu_agrees_where_every_barrier_matters() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    check_gpu(&Device::Cuda(gpu), Shape::new(1, 7, 10, 40), 1, 1.0);
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "attention::gpu_agrees_where_every_barrier_matters";
    for (pass, barriers) in [("fwd", 4), ("bwd_q", 6), ("bwd_kv", 8)] {
        let entry = format!("attention_{pass}_d64_f32");
        (0..barriers).for_each(|n| plant::notices_lost_barrier(test, &entry, n));
        plant::notices_lost_block(test, &entry);
    }
}
