use ddpm_cuda::device::Device;
use ddpm_cuda::ops::dropout::{dropout, reference};
use ddpm_cuda::params::{Params, Specs};
use ddpm_cuda::rng::{Purpose, Stream};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{
    F32_ROUNDING, Pass, finite_differences, numbers, same_bits, same_bits_at_any_number_of_threads, through_tape,
    to_f32, worst,
};

const STREAM: Stream = Stream { seed: 0x0123_4567_89AB_CDEF, purpose: Purpose::Dropout, step: 7, stream: 3 };

/// One number, primes (the last block of four is not full), one beyond a task of 2^12 numbers, several tasks.
const CASES: [Shape; 4] =
    [Shape::new(1, 1, 1, 1), Shape::new(2, 3, 5, 7), Shape::new(1, 1, 1, 4097), Shape::new(3, 32, 32, 11)];

fn pass(shape: Shape, rate: f32) -> (Pass, Vec<f64>, Vec<f64>) {
    let (x, dy) = (numbers(1, shape.len()), numbers(2, shape.len()));
    let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| dropout(tape, &x[0], rate, STREAM);
    (through_tape(&[(shape, to_f32(&x))], &[], &to_f32(&dy), 1, op), x, dy)
}

/// Three roundings: `1 - rate`, its reciprocal, the product.
#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for shape in CASES {
        for rate in [0.1, 0.5, 0.999] {
            let (got, x, dy) = pass(shape, rate);
            let budget = |y: f64| 3.001 * F32_ROUNDING * y.abs();
            worst("y", &got.y, &reference::forward(&x, f64::from(rate), STREAM), budget);
            worst("dx", &got.dx[0], &reference::backward(&dy, f64::from(rate), STREAM), budget);
        }
    }
}

#[test]
fn drops_the_share_it_is_asked_to() {
    for rate in [0.1f32, 0.5] {
        let n = 100_000;
        let (got, ..) = pass(Shape::vector(n), rate);
        let dropped = got.y.iter().filter(|&&y| y == 0.0).count() as f64 / n as f64;
        // Five standard deviations of a binomial share.
        let deviation = (f64::from(rate) * (1.0 - f64::from(rate)) / n as f64).sqrt();
        assert!((dropped - f64::from(rate)).abs() < 5.0 * deviation, "dropped {dropped} at rate {rate}");
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let dy = numbers(2, 13);
    let f = |x: &[Vec<f64>]| reference::forward(&x[0], 0.5, STREAM).iter().zip(&dy).map(|(y, dy)| y * dy).sum();
    finite_differences("dropout", f, &[numbers(1, 13)], &[reference::backward(&dy, 0.5, STREAM)]);
}

#[test]
fn does_nothing_at_rate_zero_or_without_recording() {
    let device = Device::cpu_guarded();
    let params = Params::zeros(&device, Specs::default()).unwrap();
    let x = Tensor::from_slice(&device, Shape::vector(9), &to_f32(&numbers(1, 9))).unwrap();
    for (mut tape, rate) in [(Tape::recording(&device, &params), 0.0), (Tape::inference(&device, &params), 0.5)] {
        let x = tape.leaf(x.clone());
        let y = dropout(&mut tape, &x, rate, STREAM).unwrap();
        same_bits("y", y.data(), x.data());
        assert!(tape.saved().is_empty(), "an identity was recorded");
    }
}

#[test]
fn streams_differ() {
    let x = vec![1.0; 64];
    let other = Stream { stream: 4, ..STREAM };
    assert_ne!(reference::forward(&x, 0.5f64, STREAM), reference::forward(&x, 0.5f64, other));
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    same_bits_at_any_number_of_threads("dropout", || pass(CASES[3], 0.1).0.flat());
}
