//! How far a whole network may be from the exact one, as a share of the largest element of each output and gradient.

use ddpm_cuda::params::{Layout, Specs};
use ddpm_cuda::tensor::DType;

use super::{F32_ROUNDING, winograd};

/// In f32. [`derived`] allows the networks of the fixtures in tests/unet.rs 5.4e-5 and 7.7e-5, which takes the worst
/// row of Winograd's transforms for every row; against their float64 numbers the CPU at every level of vector
/// instructions and the kernels err by 7e-6 and 1.4e-5. This lies between, half as much again as was measured, and
/// holds for the networks that other tests build, which have fewer layers.
pub const F32: f64 = 2e-5;

/// In `dtype`, for a network of `operations` one after the other (longer than any path through it).
///
/// In bf16 every operation rounds each number by up to 2^-9 of itself, independently, forward and backward, so that the
/// errors of a path add up like a random walk: 2^-9 sqrt(2 operations) of what flows there; and twice that for the
/// largest of a tensor's thousands of errors. The sums themselves are f32.
pub fn tolerance(dtype: DType, operations: usize) -> f64 {
    match dtype {
        DType::F32 => F32,
        DType::Bf16 => 2.0 / 512.0 * ((2 * operations) as f64).sqrt(),
    }
}

/// The error to expect in f32 of a network with these parameters over `rows` pixels (n h w), forward and backward.
///
/// - A running sum of n products errs like one whose every term is off by sqrt(n / 2) roundings ([`winograd`]), a sum
///   by Winograd's algorithm by its gain times sqrt(n / 2 + 20) / 3, n then being the channels. The larger counts.
/// - Each weight has such a sum over its inputs forward and over its outputs backward. Its gradient, a sum over pixels,
///   is the last on its path.
/// - The other operations, one or two beside each parameter, err by some ten roundings (the exponential of a sigmoid or
///   of a softmax, the quotient, two products) each way.
/// - Errors of different operations are independent, so their squares add up; relative to what flows they neither grow
///   nor shrink, because the norms keep its size. A rounding's variance is a third of its largest square, the largest
///   of 10^5 deviates five standard deviations, and a tensor's largest element at least its root mean square.
pub fn derived(specs: &Specs, rows: usize) -> f64 {
    let [out, wgrad] = [winograd::Result::Output, winograd::Result::Weight].map(|of| winograd::gain(of).powi(2));
    let sum = |terms: usize| terms as f64 / 2.0;
    let mut squares = sum(rows).max(wgrad * (sum(rows / 16) + 20.0) / 16.0);
    for (_, spec) in specs.iter() {
        squares += 2.0 * 10f64.powi(2);
        let (taps, winograd) = (spec.shape.pixels(), spec.shape.pixels() == 9);
        for channels in [spec.shape.n, spec.shape.c] {
            squares += match spec.layout {
                Layout::Vector => 0.0,
                Layout::Conv if winograd => sum(9 * channels).max(out * (sum(channels) + 20.0) / 9.0),
                Layout::Conv | Layout::Matrix => sum(taps * channels),
            };
        }
    }
    5.0 * F32_ROUNDING / 3f64.sqrt() * squares.sqrt()
}
