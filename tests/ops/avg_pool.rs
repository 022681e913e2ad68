use ddpm_cuda::ops::avg_pool::{avg_pool, reference};
use ddpm_cuda::tensor::Shape;

use crate::support::{
    Pass, close, finite_differences, numbers, plant, same_as_the_cpu, same_bits, same_bits_at_any_number_of_threads,
    through_tape, to_f32,
};

/// Shapes of y. One element; primes; several tasks of 2^15 elements, the last one short; single pixels; rows longer
/// than a task; one element beyond a block of 256. On a GPU, channels that four divides and such that it does not, and
/// more of them than a block has threads.
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

fn of_x(shape: Shape) -> Shape {
    Shape { h: 2 * shape.h, w: 2 * shape.w, ..shape }
}

fn pass(shape: Shape) -> (Pass, Vec<f64>, Vec<f64>) {
    let (x, dy) = (numbers(1, 4 * shape.len()), numbers(2, shape.len()));
    let got = through_tape(&[(of_x(shape), to_f32(&x))], &[], &to_f32(&dy), 1, |tape, x, _| avg_pool(tape, &x[0]));
    (got, x, dy)
}

#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for shape in CASES {
        let (got, x, dy) = pass(shape);
        let yardstick = reference::forward(&to_f32(&x), shape);
        close("y", &got.y, &reference::forward(&x, shape), &yardstick);
        same_bits("dx", &got.dx[0], &reference::backward(&to_f32(&dy), shape));
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let shape = Shape::new(2, 3, 2, 2);
    let dy = numbers(2, shape.len());
    let f = |x: &[Vec<f64>]| reference::forward(&x[0], shape).iter().zip(&dy).map(|(y, dy)| y * dy).sum();
    finite_differences("avg_pool", f, &[numbers(1, 4 * shape.len())], &[reference::backward(&dy, shape)]);
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    same_bits_at_any_number_of_threads("avg_pool", || pass(CASES[2]).0.flat());
}

#[test]
#[should_panic(expected = "avg_pool: 1x3x2x1 has an odd side")]
fn an_odd_side_cannot_be_halved() {
    through_tape(&[(Shape::new(1, 3, 2, 1), vec![0.0; 6])], &[], &[0.0], 1, |tape, x, _| avg_pool(tape, &x[0]));
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for shape in CASES {
        let (x, dy) = (to_f32(&numbers(1, 4 * shape.len())), to_f32(&numbers(2, shape.len())));
        let name = format!("avg_pool, {shape}");
        same_as_the_cpu(&name, &[(of_x(shape), x)], &[], &dy, 1, |tape, x, _| avg_pool(tape, &x[0]));
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "avg_pool::gpu_has_the_bits_of_the_cpu";
    // A sum becomes a difference; the last of four copies is missing; a quarter is left out.
    plant::notices(test, "avg_pool_fwd_f32", "add.f32", "sub.f32");
    plant::notices(test, "avg_pool_fwd_bf16", "add.f32", "sub.f32");
    plant::notices(test, "avg_pool_bwd_f32", "st.global.f32", "//");
    plant::notices(test, "avg_pool_bwd_bf16", "mul.f32", "add.f32");
    plant::notices_lost_block(test, "avg_pool_fwd_bf16");
    plant::notices_lost_block(test, "avg_pool_bwd_f32");
}
