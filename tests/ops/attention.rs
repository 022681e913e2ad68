use ddpm_cuda::device::Device;
use ddpm_cuda::error::Result;
use ddpm_cuda::ops::attention::{attention, attention_then_linear, reference};
use ddpm_cuda::ops::linear::linear;
use ddpm_cuda::params::{Init, Layout, Param, Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};

use crate::support::gpu::BF16_ROUNDING;
use crate::support::{
    F32_ROUNDING, Numbers, Pass, close_as_but_for_each, finite_differences, gpu, numbers, plant, same_bits,
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

/// Errors allowed in each element of y, dq, dk and dv beside those that the reference makes in f32.
type Allowance = [Vec<f64>; 4];

/// The exponentials of the CPU path and of the kernels err by up to 2 ulp, 4 roundings; that of the C library by 1.
/// This adds 4 roundings of the largest element to each result, beside what is `allowed`.
fn check(shape: Shape, heads: usize, exact: &[Vec<f64>; 4], got: &Pass, dtype: DType, allowed: &Allowance) {
    let [q, k, v, dy] = exact;
    let [q_f32, k_f32, v_f32, dy_f32] = exact.each_ref().map(|x| to_f32(x));
    let (exact, rounded) = ([&q[..], k, v], [&q_f32[..], &k_f32, &v_f32]);
    let mut oracle = vec![reference::forward(exact, shape, heads)];
    oracle.extend(reference::backward(exact, dy, shape, heads));
    let mut yardstick = vec![reference::forward(rounded, shape, heads)];
    yardstick.extend(reference::backward(rounded, &dy_f32, shape, heads));
    for (i, name) in ["y", "dq", "dk", "dv"].iter().enumerate() {
        let got = if i == 0 { &got.y } else { &got.dx[i - 1] };
        let name = format!("{name} of {shape} with {heads} heads in {dtype:?}");
        let all = 4.0 * F32_ROUNDING * largest(&oracle[i]);
        let share =
            close_as_but_for_each(dtype, &name, got, &oracle[i], &yardstick[i], |element| all + allowed[i][element]);
        println!("{share:.2} of the budget: {name}");
    }
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |m, v| m.max(v.abs()))
}

fn none(shape: Shape) -> Allowance {
    [(); 4].map(|()| vec![0.0; shape.len()])
}

/// The kernels compute `delta_i = sum_j P_ij dP_ij` as `dy_i . y_i`, and those on tensor cores multiply P and dS as
/// bf16. With u = 2^-8, the rounding of a bf16:
///
/// - y: the exponentials are rounded, their sum l is not, so y_i errs by `u sum_j P_ij |v_j|`. As much for dv.
/// - delta: `dy_i` times this error of y_i is `u sum_j P_ij |dP_ij|`; y and its rounding error, which is rounded too,
///   know y to u^2 of itself; a sum of d products, one factor a sum, rounds 2 d + 4 times.
/// - dS: between S and dP, P is an f16, to 2^-11 of itself or 2^-25; the product is rounded by u. The error of delta_i
///   reaches dS_ij times P_ij.
///
/// In f32, delta matters for a single token alone: dP_i equals the sum and the reference's error is zero.
fn allowance(shape: Shape, heads: usize, [q, k, v, dy]: &[Vec<f64>; 4], dtype: DType) -> Allowance {
    let (tokens, d) = (shape.pixels(), shape.c / heads);
    let mut allowed = none(shape);
    if dtype == DType::F32 && tokens > 1 {
        return allowed;
    }
    let scale = (d as f64).sqrt().recip();
    // As for a convolution, a tensor core may cut what an addition cannot hold: an ulp of each partial sum of products.
    let cut = |depth: usize| if gpu::is_real() { (depth * depth) as f64 / 4.0 * 2f64.powi(-23) } else { 0.0 };
    let u = match dtype {
        DType::F32 => 0.0,
        DType::Bf16 => BF16_ROUNDING + 2.0 * scale * cut(d) * largest(q) * largest(k),
    };
    let of_dp = cut(d) * largest(dy) * largest(v);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let y = reference::forward([&q[..], k, v], shape, heads);
    for (image, head) in (0..shape.n * heads).map(|pair| (pair / heads, pair % heads)) {
        let first = |token: usize| (image * tokens + token) * shape.c + head * d;
        let of = |token: usize| first(token)..first(token) + d;
        for i in 0..tokens {
            let s: Vec<f64> = (0..tokens).map(|j| scale * dot(&q[of(i)], &k[of(j)])).collect();
            let m = s.iter().fold(f64::NEG_INFINITY, |m, &s| m.max(s));
            let l: f64 = s.iter().map(|s| (s - m).exp()).sum();
            let p: Vec<f64> = s.iter().map(|s| (s - m).exp() / l).collect();
            let dp: Vec<f64> = (0..tokens).map(|j| dot(&dy[of(i)], &v[of(j)])).collect();
            let delta = dot(&p, &dp);
            let terms: f64 = dy[of(i)].iter().zip(&y[of(i)]).map(|(dy, y)| (dy * y).abs()).sum();
            let of_p: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp.abs()).sum();
            let of_delta = u * of_p + (u * u + (2 * d + 4) as f64 * F32_ROUNDING) * terms;
            for j in 0..tokens {
                let off = (dp[j] - delta).abs() + of_dp;
                let of_ds = match dtype {
                    DType::F32 => p[j] * of_delta,
                    DType::Bf16 => 1.01 * ((u + 2f64.powi(-11)) * p[j] * off + 2f64.powi(-25) * off + p[j] * of_delta),
                };
                for (a, b) in of(i).zip(of(j)) {
                    allowed[0][a] += u * p[j] * v[b].abs();
                    allowed[1][a] += scale * of_ds * k[b].abs();
                    allowed[2][b] += scale * of_ds * q[a].abs();
                    allowed[3][b] += u * p[j] * dy[a].abs();
                }
            }
        }
    }
    allowed
}

fn check_cpu(shape: Shape, heads: usize, scale: f64) {
    let exact = inputs(shape, scale);
    check(shape, heads, &exact, &pass(shape, heads, &exact), DType::F32, &none(shape));
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
    check(shape, heads, &exact, &got, dtype, &allowance(shape, heads, &exact, dtype));
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

/// For the kernels on tensor cores: tokens that fill blocks of rows and of columns, fall one short of them and go
/// beyond; heads of whole slabs, of chunks, of neither, and of more than the channels of a warp's sums, all and by 8.
const BF16_CASES: [(Shape, usize); 13] = [
    (Shape::new(1, 1, 1, 8), 1),
    (Shape::new(2, 1, 7, 6), 2),
    (Shape::new(3, 4, 4, 80), 2),
    (Shape::new(1, 7, 9, 20), 1),
    (Shape::new(2, 8, 8, 128), 2),
    (Shape::new(1, 5, 13, 192), 2),
    (Shape::new(1, 7, 10, 3), 3),
    (Shape::new(1, 12, 25, 64), 2),
    (Shape::new(1, 16, 16, 256), 1),
    (Shape::new(1, 2, 35, 136), 1),
    (Shape::new(2, 5, 13, 512), 1),
    (Shape::new(1, 3, 23, 264), 1),
    (Shape::new(1, 1, 17, 129), 1),
];

/// Enough heads for the large blocks of each size; an image alone has too few.
const LARGE_CASES: [(Shape, usize); 5] = [
    (Shape::new(2, 10, 12, 24 * 24), 24),
    (Shape::new(2, 8, 16, 24 * 64), 24),
    (Shape::new(2, 10, 12, 24 * 72), 24),
    (Shape::new(2, 10, 12, 24 * 136), 24),
    (Shape::new(2, 6, 10, 24 * 264), 24),
];

#[test]
fn the_gpu_agrees_with_the_reference_in_bf16() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu);
    for (shape, heads) in BF16_CASES {
        let mut first: Option<Vec<f32>> = None;
        for schedule in gpu::SCHEDULES {
            gpu::configure("seed", schedule);
            let got = check_gpu(&device, shape, heads, 1.0);
            let name = format!("{shape} with {heads} heads, schedule {schedule}");
            same_bits(&name, &got, first.get_or_insert_with(|| got.clone()));
        }
        gpu::configure("seed", "none");
        // Scores in the hundreds.
        check_gpu(&device, shape, heads, 20.0);
    }
}

/// The images one by one take the small blocks, which give the same bits.
#[test]
fn on_the_gpu_large_blocks_agree_with_the_reference_and_with_small_ones() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu);
    for (shape, heads) in LARGE_CASES {
        check_gpu(&device, shape, heads, 1.0);
        images_stand_alone(&device, shape, heads);
    }
}

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
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        let device = Device::Cuda(gpu);
        images_stand_alone(&device, CASES[4].0, CASES[4].1);
        if dtype == DType::Bf16 {
            let several = BF16_CASES.into_iter().filter(|(shape, _)| shape.n > 1);
            several.for_each(|(shape, heads)| images_stand_alone(&device, shape, heads));
        }
    }
}

/// Asserts that each image has the same results when computed alone.
fn images_stand_alone(device: &Device, shape: Shape, heads: usize) {
    let batch = inputs(shape, 1.0);
    let together = pass_on(device, shape, heads, &batch);
    let image = shape.len() / shape.n;
    for i in 0..shape.n {
        let part = i * image..(i + 1) * image;
        let alone = batch.each_ref().map(|x| x[part.clone()].to_vec());
        let alone = pass_on(device, Shape { n: 1, ..shape }, heads, &alone);
        same_bits("y", &alone.y, &together.y[part.clone()]);
        for (alone, together) in alone.dx.iter().zip(&together.dx) {
            same_bits("gradient", alone, &together[part.clone()]);
        }
    }
}

#[test]
fn heads_too_large_for_the_gpu_are_refused() {
    for (dtype, d) in [(DType::F32, 513), (DType::Bf16, 513), (DType::Bf16, 520)] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        let (shape, device) = (Shape::new(1, 1, 1, d), Device::Cuda(gpu));
        let params = Params::zeros(&device, Specs::default()).expect("no parameters");
        let x = Tensor::from_slice_as(&device, dtype, shape, &vec![0.0; d]).expect("room for a tensor");
        let x = Var::constant(x);
        let refused = attention(&mut Tape::inference(&device, &params), &x, &x, &x, 1).expect_err("too many channels");
        assert!(refused.to_string().contains(&format!("heads of {d} channels")), "{refused}");
    }
}

/// A head and the layer that follows it. Rows and channels in tiles that are not full, one tile and several of both,
/// blocks of 16 rows and of 64; channels that 8 does not divide, more than 256, and two heads: two operations.
const THEN_LINEAR: [((Shape, usize), bool); 8] = [
    ((Shape::new(2, 3, 6, 24), 1), true),
    ((Shape::new(1, 5, 14, 200), 1), true),
    ((Shape::new(1, 4, 4, 256), 1), true),
    ((Shape::new(48, 8, 16, 16), 1), true),
    ((Shape::new(96, 8, 8, 256), 1), true),
    ((Shape::new(2, 3, 5, 7), 1), false),
    ((Shape::new(1, 2, 3, 264), 1), false),
    ((Shape::new(1, 3, 5, 32), 2), false),
];

/// Both, in one call or two.
fn then_linear(tape: &mut Tape<'_>, heads: usize, v: &[Var], p: &[Param], in_one: bool) -> Result<Var> {
    if in_one {
        return attention_then_linear(tape, [&v[0], &v[1], &v[2]], heads, p[0], p[1], &v[3]);
    }
    let y = attention(tape, &v[0], &v[1], &v[2], heads)?;
    linear(tape, &y, p[0], Some(p[1]), Some(&v[3]))
}

/// q, k, v and the residual; weight and bias; dy.
fn of_then_linear(shape: Shape) -> (Vec<Numbers>, [Numbers; 2], Vec<f32>) {
    let of = |seed, shape: Shape| (shape, to_f32(&numbers(seed, shape.len())));
    let inputs = [1, 2, 3, 5].map(|seed| of(seed, shape)).to_vec();
    let params = [of(6, Shape::new(shape.c, 1, 1, shape.c)), of(7, Shape::vector(shape.c))];
    (inputs, params, to_f32(&numbers(4, shape.len())))
}

/// All results and gradients of both operations.
#[test]
fn gpu_goes_on_with_a_linear_layer_by_the_same_bits() {
    for ((shape, heads), _) in THEN_LINEAR {
        let (inputs, params, dy) = of_then_linear(shape);
        gpu::each(&format!("{shape}, {heads} heads, then a linear layer"), |device| {
            let by = |in_one| {
                let op = |tape: &mut Tape<'_>, v: &[Var], p: &[Param]| then_linear(tape, heads, v, p, in_one);
                through_tape_on(device, &inputs, &params, &dy, 1, op).flat()
            };
            let in_one = by(true);
            same_bits(&format!("{shape}, {heads} heads"), &in_one, &by(false));
            in_one
        });
    }
}

/// A tape that does not record: the same output, of a launch that stores nothing else.
#[test]
fn gpu_goes_on_without_what_is_between() {
    for ((shape, heads), goes_on) in THEN_LINEAR {
        let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
        let device = Device::Cuda(gpu.clone());
        let (inputs, params, _) = of_then_linear(shape);
        let mut specs = Specs::default();
        let p = params.each_ref().map(|(shape, _)| specs.add("p".into(), *shape, Layout::Vector, Init::Zeros));
        let mut flat = vec![0.0; specs.flat_len()];
        p.iter().zip(&params).for_each(|(p, (_, values))| flat[specs.range(*p)].copy_from_slice(values));
        let params = Params::from_host(&device, specs, &flat).unwrap();
        let tensor = |(shape, x): &Numbers| Tensor::from_slice_as(&device, DType::Bf16, *shape, x).unwrap();
        let v: Vec<Var> = inputs.iter().map(|x| Var::constant(tensor(x))).collect();
        gpu.record_launches();
        let of = |tape: Tape<'_>, in_one| {
            let mut tape = tape;
            then_linear(&mut tape, heads, &v, &p, in_one).unwrap().into_value().to_vec().unwrap()
        };
        let got = of(Tape::inference(&device, &params), true);
        let launched = gpu.recorded_launches();
        let kernels: Vec<&str> = launched.iter().map(|l| l.kernel.split('_').next().unwrap_or_default()).collect();
        assert_eq!(kernels, if goes_on { &["attention"][..] } else { &["attention", "linear"] }, "{shape}");
        same_bits(&format!("{shape}, {heads} heads"), &got, &of(Tape::recording(&device, &params), false));
    }
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

/// As many blocks as large ones need, of few channels; two blocks of rows, and two of columns.
#[test]
fn gpu_agrees_where_every_barrier_of_tensor_core_kernels_matters() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    check_gpu(&Device::Cuda(gpu), Shape::new(1, 8, 16, 48 * 8), 48, 1.0);
}

#[test]
fn bugs_planted_in_tensor_core_kernels_are_noticed() {
    let test = "attention::gpu_agrees_where_every_barrier_of_tensor_core_kernels_matters";
    let goes_on = "attention::gpu_goes_on_with_a_linear_layer_by_the_same_bits";
    // As many barriers as slabs in a round.
    for (pass, barriers) in [("fwd", 2), ("bwd_q", 6), ("bwd_kv", 4)] {
        let entry = format!("attention_{pass}_mma_d32_large");
        (0..barriers).for_each(|n| plant::notices_lost_barrier(test, &entry, n));
        plant::notices_lost_block(test, &entry);
    }
    // In fwd of smaller heads the last wait of the text is for the weight of the layer that it goes on with.
    for (test, entry) in [
        ("attention::the_gpu_agrees_with_the_reference_in_bf16", "attention_fwd_mma_d512_small"),
        (test, "attention_bwd_q_mma_d32_large"),
        (test, "attention_bwd_kv_mma_d32_large"),
    ] {
        plant::notices(test, entry, "cp.async.wait_group 0;", "cp.async.wait_group 1;");
    }
    // Sums are rescaled only if the maximum of all rows of a warp has grown, not of any.
    plant::notices(test, "attention_fwd_mma_d32_large", "vote.sync.any.pred", "vote.sync.all.pred");
    // The tokens for the channels, the channels for the heads, one scale for the other.
    plant::notices_wrong_parameter(test, "attention_fwd_mma_d32_large", "6+4", "6");
    plant::notices_wrong_parameter(test, "attention_bwd_q_mma_d32_large", "9+8", "9+4");
    plant::notices_wrong_parameter(test, "attention_bwd_kv_mma_d32_large", "8+16", "8+12");
    // Slabs of the weight that are overwritten too early; another matrix in the place of the weight, of the residual.
    plant::notices_lost_barrier(goes_on, "attention_fwd_mma_d32_large", 2);
    plant::notices_wrong_parameter(goes_on, "attention_fwd_mma_d32_large", 8, 3);
    plant::notices_wrong_parameter(goes_on, "attention_fwd_mma_d256_large", 10, 3);
    plant::notices_lost_block(goes_on, "attention_fwd_mma_d256_large");
    let test = "attention::the_gpu_agrees_with_the_reference_in_bf16";
    for part in ["fwd_mma_d64_any", "bwd_q_mma_d64_small", "bwd_kv_mma_d512_small", "bwd_q_mma_d512_any"] {
        plant::notices_lost_block(test, &format!("attention_{part}"));
    }
}
