use ddpm_cuda::ops::silu::{reference, silu};
use ddpm_cuda::tensor::Shape;

use crate::support::{
    F32_ROUNDING, Pass, finite_differences, numbers, same_bits_at_any_number_of_threads, through_tape, to_f32, worst,
};

/// One number, primes, one beyond a task of 2^13 numbers, several tasks.
const CASES: [Shape; 4] =
    [Shape::new(1, 1, 1, 1), Shape::new(2, 3, 5, 7), Shape::new(1, 1, 1, 8193), Shape::new(3, 32, 32, 11)];

/// Numbers between -`scale` and `scale`.
fn pass(shape: Shape, scale: f64) -> (Pass, Vec<f64>, Vec<f64>) {
    let x: Vec<f64> = numbers(1, shape.len()).iter().map(|x| f64::from((x * scale) as f32)).collect();
    let dy = numbers(2, shape.len());
    let got = through_tape(&[(shape, to_f32(&x))], &[], &to_f32(&dy), 1, |tape, x, _| silu(tape, &x[0]));
    (got, x, dy)
}

/// `silu` is good to 4.5 ulp, each at most two roundings relative. The derivative `s (1 + x (1 - s))` has a zero near -1.28, where only an absolute
/// bound makes sense: `s` errs by 4 ulp of itself, and with it `1 - s` by 4 ulp of `s` and a rounding; so `x (1 - s)` by `|x| (8 s + 2)` roundings,
/// the sum and the product by one more each, and the product with dy by one.
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
