use ddpm_cuda::ops::upsample::{reference, upsample};
use ddpm_cuda::tensor::Shape;

use crate::support::{
    Pass, close, finite_differences, numbers, plant, same_as_the_cpu, same_bits, same_bits_at_any_number_of_threads,
    through_tape, to_f32,
};

/// One element; primes; several tasks of 2^15 elements, the last one short; single pixels; rows longer than a task; one
/// element beyond a block of 256. On a GPU, channels that 16 bytes divide in both types and in f32 alone, and more of
/// them than a block has threads.
const CASES: [Shape; 9] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(2, 3, 5, 7),
    Shape::new(3, 17, 16, 64),
    Shape::new(2, 1, 1, 17),
    Shape::new(1, 3, 1, 9001),
    Shape::new(1, 1, 257, 1),
    Shape::new(2, 3, 5, 8),
    Shape::new(1, 2, 3, 12),
    Shape::new(1, 3, 2, 2100),
];

fn pass(shape: Shape) -> (Pass, Vec<f64>, Vec<f64>) {
    let (x, dy) = (numbers(1, shape.len()), numbers(2, 4 * shape.len()));
    let got = through_tape(&[(shape, to_f32(&x))], &[], &to_f32(&dy), 1, |tape, x, _| upsample(tape, &x[0]));
    (got, x, dy)
}

#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for shape in CASES {
        let (got, x, dy) = pass(shape);
        same_bits("y", &got.y, &reference::forward(&to_f32(&x), shape));
        let yardstick = reference::backward(&to_f32(&dy), shape);
        close("dx", &got.dx[0], &reference::backward(&dy, shape), &yardstick);
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let shape = Shape::new(2, 3, 2, 2);
    let dy = numbers(2, 4 * shape.len());
    let f = |x: &[Vec<f64>]| reference::forward(&x[0], shape).iter().zip(&dy).map(|(y, dy)| y * dy).sum();
    finite_differences("upsample", f, &[numbers(1, shape.len())], &[reference::backward(&dy, shape)]);
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    same_bits_at_any_number_of_threads("upsample", || pass(CASES[2]).0.flat());
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for shape in CASES {
        let (x, dy) = (to_f32(&numbers(1, shape.len())), to_f32(&numbers(2, 4 * shape.len())));
        let name = format!("upsample, {shape}");
        same_as_the_cpu(&name, &[(shape, x)], &[], &dy, 1, |tape, x, _| upsample(tape, &x[0]));
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "upsample::gpu_has_the_bits_of_the_cpu";
    // The last of four copies is missing; a sum becomes a difference.
    plant::notices(test, "upsample_fwd_f32", "st.global.f32", "//");
    plant::notices(test, "upsample_fwd_f32", "st.global.v4.u32", "//");
    plant::notices(test, "upsample_bwd_f32", "add.f32", "sub.f32");
    plant::notices(test, "upsample_bwd_bf16", "add.f32", "sub.f32");
    plant::notices_lost_block(test, "upsample_fwd_f32");
    plant::notices_lost_block(test, "upsample_bwd_bf16");
}
