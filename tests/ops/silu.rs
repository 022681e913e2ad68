use ddpm_cuda::ops::add::{add, reference as reference_add};
use ddpm_cuda::ops::silu::{reference, silu};
use ddpm_cuda::tensor::Shape;

use crate::support::{
    F32_ROUNDING, Pass, finite_differences, gpu, numbers, plant, same_bits, same_bits_at_any_number_of_threads,
    through_tape, through_tape_on, to_f32, worst,
};

/// One element; primes; one beyond a block of 1,024 elements and one beyond a task of 2^13; several tasks.
const CASES: [Shape; 5] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(2, 3, 5, 7),
    Shape::new(1, 1, 5, 205),
    Shape::new(1, 1, 1, 8193),
    Shape::new(3, 32, 32, 11),
];

/// A pass with `x` between -`scale` and `scale`.
fn pass(shape: Shape, scale: f64) -> (Pass, Vec<f64>, Vec<f64>) {
    let x: Vec<f64> = numbers(1, shape.len()).iter().map(|x| f64::from((x * scale) as f32)).collect();
    let dy = numbers(2, shape.len());
    let got = through_tape(&[(shape, to_f32(&x))], &[], &to_f32(&dy), 1, |tape, x, _| silu(tape, &x[0]));
    (got, x, dy)
}

/// `silu` errs by up to 4.5 ulp, each at most two roundings relative. The derivative `s (1 + x (1 - s))` has a zero
/// near -1.28, where only an absolute bound makes sense: `s` errs by 4 ulp of itself, and with it `1 - s` by 4 ulp of
/// `s` and a rounding; so `x (1 - s)` by `|x| (8 s + 2)` roundings, the sum and the product by one more each, and the
/// product with dy by one.
#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for shape in CASES {
        for scale in [1.0, 20.0, 80.0] {
            let (got, x, dy) = pass(shape, scale);
            worst("y", &got.y, &reference::forward(&x), |y| 9.0 * F32_ROUNDING * y.abs());
            let dx = reference::backward(&x, &dy);
            for i in 0..x.len() {
                let s = reference::sigmoid(x[i]);
                let slope = (1.0 + x[i].abs() * (1.0 - s)) * 11.0 + x[i].abs() * (8.0 * s + 2.0);
                worst("dx", &got.dx[0][i..=i], &dx[i..=i], |_| dy[i].abs() * s * slope * F32_ROUNDING);
            }
        }
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let (x, dy) = (numbers(1, 12), numbers(2, 12));
    let f = |x: &[Vec<f64>]| reference::forward(&x[0]).iter().zip(&dy).map(|(y, dy)| y * dy).sum();
    finite_differences("silu", f, std::slice::from_ref(&x), &[reference::backward(&x, &dy)]);
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    same_bits_at_any_number_of_threads("silu", || pass(CASES[3], 5.0).0.flat());
}

/// The exponential errs by up to 2 ulp there and so does the division: 4 roundings of `e^-x`, at most as much of
/// `1 + e^-x`, one for that sum and 4 for the quotient, so `s` errs by 9 roundings of itself and `y` by 10. The
/// derivative as above, with 9 in place of 8 for `s`. Then the result is rounded to its type; one percent is for
/// products of errors. Beyond x = 87 the quotient counts as 0.
#[test]
fn gpu_agrees_with_the_reference() {
    for shape in CASES {
        for scale in [1.0, 20.0, 80.0] {
            gpu::each(&format!("silu, {shape}, to {scale}"), |device| {
                let dtype = device.activations();
                let x: Vec<f64> = numbers(1, shape.len()).iter().map(|x| f64::from((x * scale) as f32)).collect();
                let (x, dy) = (gpu::rounded(dtype, &x), gpu::rounded(dtype, &numbers(2, shape.len())));
                let got = through_tape_on(device, &[(shape, to_f32(&x))], &[], &to_f32(&dy), 1, |tape, x, _| {
                    silu(tape, &x[0])
                });
                let last = |value: f64, error: f64| match gpu::rounding(dtype) {
                    F32_ROUNDING => error,
                    rounding => error + rounding * (value.abs() + error),
                };
                worst("y", &got.y, &reference::forward(&x), |y| last(y, 1.01 * 10.0 * F32_ROUNDING * y.abs()));
                let dx = reference::backward(&x, &dy);
                for i in 0..x.len() {
                    let s = reference::sigmoid(x[i]);
                    let slope = (1.0 + x[i].abs() * (1.0 - s)) * 12.0 + x[i].abs() * (9.0 * s + 2.0);
                    let error = 1.01 * dy[i].abs() * s * slope * F32_ROUNDING;
                    worst("dx", &got.dx[0][i..=i], &dx[i..=i], |dx| last(dx, error));
                }
                got.flat()
            });
        }
    }
}

/// The gradient of a sum reaches both terms as one buffer, so an operation that overwrites it must copy it first.
#[test]
fn gpu_leaves_a_shared_gradient_alone() {
    for shape in CASES {
        let [x, dy] = [1, 2].map(|seed| to_f32(&numbers(seed, shape.len())));
        gpu::each(&format!("silu(x) + x, {shape}"), |device| {
            let inputs = [(shape, x.clone())];
            let alone = through_tape_on(device, &inputs, &[], &dy, 1, |tape, x, _| silu(tape, &x[0]));
            let both = through_tape_on(device, &inputs, &[], &dy, 1, |tape, x, _| {
                let y = silu(tape, &x[0])?;
                add(tape, &y, &x[0])
            });
            let sum = |a: &[f32], b: &[f32]| {
                let b = gpu::rounded_f32(device.activations(), b);
                gpu::rounded_f32(device.activations(), &reference_add::forward(a, &b))
            };
            same_bits("y", &both.y, &sum(&alone.y, &x));
            same_bits("dx", &both.dx[0], &sum(&alone.dx[0], &dy));
            both.flat()
        });
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "silu::gpu_agrees_with_the_reference";
    plant::notices(test, "silu_fwd_f32", "neg.f32", "mov.f32");
    plant::notices(test, "silu_fwd_bf16", "div.approx.f32", "mul.f32");
    plant::notices(test, "silu_bwd_f32", "mul.f32", "add.f32");
    plant::notices(test, "silu_bwd_bf16", "0f3F800000", "0f40000000");
    plant::notices_lost_block(test, "silu_fwd_f32");
    plant::notices_lost_block(test, "silu_bwd_bf16");
}
