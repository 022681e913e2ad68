use ddpm_cuda::ops::concat::{concat, reference};
use ddpm_cuda::tensor::Shape;

use crate::support::{
    Pass, finite_differences, numbers, plant, same_as_the_cpu, same_bits, same_bits_at_any_number_of_threads,
    through_tape, to_f32,
};

/// Shape of `a`, channels of `b`. One element each; primes; one pixel beyond a task of 2^14 elements; not square; more
/// channels than a task has elements; one element beyond a block of 256. On a GPU, 16 bytes that divide all, both
/// inputs of f32 alone, one of them; rows of more than 256 times 16 bytes.
const CASES: [(Shape, usize); 10] = [
    (Shape::new(1, 1, 1, 1), 1),
    (Shape::new(2, 3, 5, 7), 11),
    (Shape::new(1, 1, 3, 5461), 1),
    (Shape::new(3, 32, 16, 11), 64),
    (Shape::new(1, 2, 2, 20_000), 3),
    (Shape::new(1, 1, 1, 200), 57),
    (Shape::new(2, 3, 5, 8), 24),
    (Shape::new(1, 5, 3, 4), 12),
    (Shape::new(1, 3, 3, 3), 8),
    (Shape::new(1, 1, 3, 2048), 64),
];

fn pass(shape: Shape, c_b: usize) -> (Pass, [Vec<f32>; 3]) {
    let b_shape = shape.with_c(c_b);
    let [a, b] = [numbers(1, shape.len()), numbers(2, b_shape.len())].map(|x| to_f32(&x));
    let dy = to_f32(&numbers(3, a.len() + b.len()));
    let inputs = [(shape, a.clone()), (b_shape, b.clone())];
    (through_tape(&inputs, &[], &dy, 1, |tape, x, _| concat(tape, &x[0], &x[1])), [a, b, dy])
}

#[test]
fn copies_exactly() {
    for (shape, c_b) in CASES {
        let (c_a, c) = (shape.c, shape.c + c_b);
        let (got, [a, b, dy]) = pass(shape, c_b);
        same_bits("y", &got.y, &reference::forward(&a, &b, c_a, c_b));
        same_bits("da", &got.dx[0], &reference::backward(&dy, c, 0..c_a));
        same_bits("db", &got.dx[1], &reference::backward(&dy, c, c_a..c));
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let (a, b, dy) = (numbers(1, 6), numbers(2, 4), numbers(3, 10));
    let f = |x: &[Vec<f64>]| reference::forward(&x[0], &x[1], 3, 2).iter().zip(&dy).map(|(y, dy)| y * dy).sum();
    let gradients = [reference::backward(&dy, 5, 0..3), reference::backward(&dy, 5, 3..5)];
    finite_differences("concat", f, &[a, b], &gradients);
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    same_bits_at_any_number_of_threads("concat", || pass(CASES[3].0, CASES[3].1).0.flat());
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for (shape, c_b) in CASES {
        let b = shape.with_c(c_b);
        let [x, y, dy] =
            [(1, shape.len()), (2, b.len()), (3, shape.len() + b.len())].map(|(seed, len)| numbers(seed, len));
        let (inputs, name) = ([(shape, to_f32(&x)), (b, to_f32(&y))], format!("concat, {shape} and {c_b}"));
        same_as_the_cpu(&name, &inputs, &[], &to_f32(&dy), 1, |tape, x, _| concat(tape, &x[0], &x[1]));
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "concat::gpu_has_the_bits_of_the_cpu";
    // One element too many in a row; the wrong copy at the seam; another row; another first channel.
    plant::notices(test, "concat_join_f32", "setp.lt.u32", "setp.le.u32");
    plant::notices(test, "concat_join_f32", "ld.global.v4.u32", "//");
    plant::notices_wrong_parameter(test, "concat_part_f32", 5, 3);
    plant::notices_wrong_parameter(test, "concat_part_bf16", 4, 3);
    plant::notices_lost_block(test, "concat_join_f32");
    plant::notices_lost_block(test, "concat_part_bf16");
}
