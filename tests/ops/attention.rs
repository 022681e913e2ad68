use ddpm_cuda::ops::attention::{attention, reference};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::Shape;

use crate::support::{
    F32_ROUNDING, Pass, close_but_for, finite_differences, numbers, same_bits, same_bits_at_any_number_of_threads,
    through_tape, to_f32,
};

/// Shape, heads. One token; one channel; primes; a head for each channel; not square; tokens one beyond a block of 42 and some beyond several; the
/// sizes of the networks; the largest head; more pairs of image and head than the backward pass holds scores of (32 of 256 tokens); more
/// tokens than it holds rows of (1,382 of 1,517).
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

fn pass(shape: Shape, heads: usize, [q, k, v, dy]: &[Vec<f64>; 4]) -> Pass {
    let inputs = [q, k, v].map(|x| (shape, to_f32(x)));
    let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| attention(tape, &x[0], &x[1], &x[2], heads);
    through_tape(&inputs, &[], &to_f32(dy), 1, op)
}

/// The exponential of the CPU path errs by up to 2 ulp, 4 roundings, where the C library's errs by 1: that much of `P <= 1`, and of what is computed
/// from it, in the largest element.
fn check(shape: Shape, heads: usize, scale: f64) {
    let exact = inputs(shape, scale);
    let got = pass(shape, heads, &exact);
    let [q, k, v, dy] = &exact;
    let [q_f32, k_f32, v_f32, dy_f32] = exact.each_ref().map(|x| to_f32(x));
    let (exact, rounded) = ([&q[..], k, v], [&q_f32[..], &k_f32, &v_f32]);
    let compare = |name: &str, got: &[f32], oracle: &[f64], yardstick: &[f32]| {
        let largest = oracle.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        let name = format!("{name} of {shape} with {heads} heads, scale {scale}");
        close_but_for(&name, got, oracle, yardstick, 4.0 * F32_ROUNDING * largest);
    };
    compare("y", &got.y, &reference::forward(exact, shape, heads), &reference::forward(rounded, shape, heads));
    let oracle = reference::backward(exact, dy, shape, heads);
    let yardstick = reference::backward(rounded, &dy_f32, shape, heads);
    for (i, name) in ["dq", "dk", "dv"].iter().enumerate() {
        compare(name, &got.dx[i], &oracle[i], &yardstick[i]);
    }
}

#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for (shape, heads) in CASES {
        check(shape, heads, 1.0);
    }
}

/// Scores in the hundreds: their exponentials overflow f32, and a softmax that does not take the row's largest off first is all NaN.
#[test]
fn large_scores_do_not_overflow() {
    for (shape, heads) in CASES {
        check(shape, heads, 20.0);
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
