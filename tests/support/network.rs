//! How far a whole network may be from the exact one, relative to the largest element of each output and gradient.

use ddpm_cuda::checkpoint;
use ddpm_cuda::config::Config;
use ddpm_cuda::device::Device;
use ddpm_cuda::params::{Layout, Params, Specs};
use ddpm_cuda::tensor::DType;
use ddpm_cuda::unet::UNet;

use super::{F32_ROUNDING, places, winograd};

/// The conditional fixture network with a row for images without a class, the negative of class 0.
pub fn with_null_class(device: &Device) -> (Config, Params) {
    let model = checkpoint::load(&Device::cpu(), &places::fixture("unet_rgb16")).expect("the fixture loads");
    let mut config = model.config;
    config.model.null_class = true;
    let (_, specs) = UNet::new(&config.model).expect("a network with one class more");
    let mut flat = vec![0.0; specs.flat_len()];
    for ((p, spec), (own, _)) in specs.iter().zip(model.params.specs().iter()) {
        let (weights, to) = (model.params.get(own), &mut flat[specs.range(p)]);
        to[..weights.len()].copy_from_slice(weights);
        if spec.name == "class_embedding.weight" {
            let row = spec.shape.len() / spec.shape.n;
            to[weights.len()..][..row].iter_mut().zip(weights).for_each(|(null, first)| *null = -first);
        }
    }
    (config, Params::from_host(device, specs, &flat).expect("the parameters fit"))
}

/// Tolerance in f32. For the fixture networks of tests/unet.rs, [`derived`] allows 5.4e-5 and 7.7e-5, because it takes
/// the worst row of Winograd's transforms for every row. The measured error against their float64 numbers, on the CPU
/// at every level of vector instructions and with the kernels, is 7e-6 and 1.4e-5. This value is in between, 1.5 times
/// what was measured, and also holds for the networks that other tests build, which have fewer layers.
pub const F32: f64 = 2e-5;

/// Tolerance in `dtype`, for a network of `operations` operations (an upper bound for any path through it).
///
/// In bf16 every operation rounds each number by up to 2^-9 of itself, independently, forward and backward, so with
/// a standard deviation of 2^-9 / sqrt(3). The errors of a path add up like a random walk, to sqrt(2 operations) of
/// these; the largest of 10^5 deviates is five of them, as in [`derived`]. The sums themselves are f32.
pub fn tolerance(dtype: DType, operations: usize) -> f64 {
    match dtype {
        DType::F32 => F32,
        DType::Bf16 => 5.0 / 3f64.sqrt() / 512.0 * ((2 * operations) as f64).sqrt(),
    }
}

/// The expected error in f32 of a network with these parameters over `rows` pixels (n h w), forward and backward.
///
/// - A running sum of n products errs as if every term were off by sqrt(n / 2) roundings ([`winograd`]); a sum by
///   Winograd's algorithm by its gain times sqrt(n / 2 + 20) / 3, where n is the channels. The larger counts.
/// - Each weight has such a sum over its inputs forward and over its outputs backward. Its gradient, a sum over pixels,
///   is the last sum on its path.
/// - The other operations, one or two beside each parameter, err by some ten roundings (the exponential of a sigmoid or
///   of a softmax, the quotient, two products) each way.
/// - Errors of different operations are independent, so their squares add up. Relative to the activations they neither
///   grow nor shrink, because the norms keep the scale. The variance of a rounding is a third of its largest square,
///   the largest of 10^5 deviates is five standard deviations, and a tensor's largest element is at least its root mean
///   square.
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
