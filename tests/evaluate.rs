//! The variational bound of a data set: what an image's figures depend on. The terms themselves are compared with
//! OpenAI's numbers in tests/diffusion.rs and tests/ops/loss.rs.

mod support;

use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::data::{Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::objective::Loss;
use ddpm_cuda::diffusion::sampler::Limit;
use ddpm_cuda::diffusion::{Batch, Kind, Method, Objective, Prediction, Sampler, Schedule, Variance};
use ddpm_cuda::evaluate::{Bound, Evaluation};
use ddpm_cuda::ops::sample_step::{Given, Noise, Wanted, advance, diffuse};
use ddpm_cuda::params::Params;
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::unet::UNet;

use support::gpu;

const SIDE: usize = 8;
const IMAGES: usize = 5;
const TIMESTEPS: usize = 12;

fn data() -> Dataset {
    let mut config = support::tiny(SIDE, SIDE, 3);
    config.model.classes = 2;
    let extent = Extent { size: config.model.image_size, channels: 3 };
    let bytes = (0..IMAGES * extent.len()).map(|k| ((k * k / 7 + 31 * k) % 256) as u8).collect();
    Dataset::new(extent, bytes, Some(vec![0, 1, 1, 0, 1]))
}

/// A small network with random weights, of doubled channels for a `learned` variance.
fn network(device: &Device, learned: bool) -> (UNet, Params) {
    let mut config = support::tiny(SIDE, SIDE, 3);
    config.model.classes = 2;
    config.model.learned_variance = learned;
    let (unet, specs) = UNet::new(&config.model).unwrap();
    (unet, Params::init(device, specs, 3).unwrap())
}

fn schedule() -> Schedule {
    Schedule::with_betas(Kind::Linear, TIMESTEPS, 1e-3, 0.5).unwrap()
}

/// The bound of a small network with random weights.
fn bound(device: &Device, together: usize, variance: Variance, kept: Option<&[u32]>, draws: u32) -> Bound {
    let network = network(device, variance.is_learned());
    bound_of(device, &network, (together, draws), variance, kept, Limit::Range(1.0))
}

fn bound_of(
    device: &Device,
    (unet, params): &(UNet, Params),
    (together, draws): (usize, u32),
    variance: Variance,
    kept: Option<&[u32]>,
    limit: Limit,
) -> Bound {
    let objective = Objective::new(Loss::Vlb, Prediction::V, variance, &schedule());
    let objective = &kept.map_or(objective.clone(), |kept| objective.over(kept));
    let data = &data();
    let evaluation = Evaluation { device, unet, params, objective, data, draws, seed: 2, limit, together };
    let mut passes = 0;
    let bound = evaluation.bound(|| {
        passes += 1;
        Ok(())
    });
    assert_eq!(passes, evaluation.passes());
    bound.unwrap()
}

#[test]
fn an_image_does_not_depend_on_those_evaluated_with_it() {
    for variance in [Variance::FixedLarge, Variance::LearnedRange] {
        let whole = bound(&Device::cpu(), IMAGES, variance, None, 2);
        for together in [1, 2, 3] {
            let parts = bound(&Device::cpu(), together, variance, None, 2);
            // Every bit of every figure.
            assert_eq!(parts, whole, "{variance}, {together} together");
        }
        assert!(whole.per_image.windows(2).all(|pair| pair[0] != pair[1]), "{:?}", whole.per_image);
        let total = whole.prior + whole.terms.iter().sum::<f64>();
        assert!((whole.bits_per_dim() - total).abs() <= 1e-12 * total);
    }
}

#[test]
fn a_shorter_chain_has_a_bound_of_its_own() {
    let kept = [0, 4, 11];
    let short = bound(&Device::cpu(), IMAGES, Variance::FixedSmall, Some(&kept), 1);
    let long = bound(&Device::cpu(), IMAGES, Variance::FixedSmall, None, 1);
    assert_eq!((&short.timesteps[..], short.terms.len()), (&kept[..], 3));
    // The noise of a timestep is its own, whatever else is kept, and so are the errors there.
    for (i, &t) in kept.iter().enumerate() {
        assert_eq!((short.mse_x0[i], short.mse_eps[i]), (long.mse_x0[t as usize], long.mse_eps[t as usize]), "t = {t}");
    }
    assert_eq!(short.prior, long.prior);
    assert_ne!(short.terms[1], long.terms[4]);
    let cuts = short.rate_distortion();
    assert_eq!(cuts.iter().map(|cut| cut.t).collect::<Vec<_>>(), kept);
    assert_eq!(cuts[2].rate, short.prior);
    assert_eq!(cuts[1].rate, short.prior + short.terms[2]);
}

/// The prediction half of a network with a learned variance goes with a fixed one, as in `sample` over fewer timesteps.
#[test]
fn a_fixed_variance_replaces_the_networks_own() {
    let device = Device::cpu();
    let network = network(&device, true);
    let of = |variance| bound_of(&device, &network, (IMAGES, 1), variance, Some(&[0, 3, 11]), Limit::Range(1.0));
    let (fixed, learned) = (of(Variance::FixedSmall), of(Variance::LearnedRange));
    assert_eq!((&fixed.mse_x0, &fixed.mse_eps), (&learned.mse_x0, &learned.mse_eps));
    let objective = Objective::new(Loss::Vlb, Prediction::V, Variance::FixedSmall, &schedule()).over(&[0, 3, 11]);
    for i in [1, 2] {
        // With the posterior's variance the divergence is the squared distance of the means alone. Terms and rows in
        // f32, sums in f64.
        let row = objective.row(fixed.timesteps[i]).unwrap();
        let want = 0.5 * row.mean_of_x_0.powi(2) * fixed.mse_x0[i] / std::f64::consts::LN_2;
        assert!((fixed.terms[i] - want).abs() <= 1e-5 * want, "{i}: {}, expected {want}", fixed.terms[i]);
        assert!((learned.terms[i] - want).abs() > 1e-3 * want, "{i}: the network's variance makes no difference");
    }
}

/// Against the predicted x_0 of a step of `sample` from the same x_t.
#[test]
fn predictions_are_confined_as_in_sampling() {
    let kept = [0, 4, 11];
    let limits = [Limit::None, Limit::Range(0.5), Limit::Range(1.5), Limit::Quantile { p: 0.7, largest: 1.8 }];
    let mut devices = vec![(Device::cpu(), 1e-5)];
    // An output off by a rounding of the network moves an error's square by twice as much of it.
    for (dtype, budget) in [(DType::F32, 4e-5), (DType::Bf16, 8e-2)] {
        devices.extend(gpu::gpu(dtype).map(|gpu| (Device::Cuda(gpu), budget)));
    }
    let (cpu, data) = (Device::cpu(), data());
    // Outputs that go beyond the range.
    let scaled = |device: &Device| {
        let (unet, params) = network(&cpu, false);
        let mut flat = params.host().unwrap().into_owned();
        for (p, spec) in params.specs().iter().filter(|(_, spec)| spec.name.contains("conv_out")) {
            let numbers = support::numbers(5, spec.shape.len());
            flat[params.specs().range(p)].iter_mut().zip(numbers).for_each(|(w, n)| *w = 0.3 * n as f32);
        }
        let specs = UNet::new(unet.model()).unwrap().1;
        (unet, Params::from_host(device, specs, &flat).unwrap())
    };
    let (unet, params) = scaled(&cpu);
    let shape = Shape::new(IMAGES, SIDE, SIDE, 3);
    let x_0: Vec<f32> =
        (0..IMAGES).flat_map(|i| data.image(i)).map(|&u| (2.0 * f32::from(u) - 255.0) / 255.0).collect();
    let x_0 = Tensor::from_slice(&cpu, shape, &x_0).unwrap();
    let mut seen = Vec::new();
    for limit in limits {
        let method = Method::Ancestral(Variance::FixedSmall);
        let sampler = Sampler::over(&schedule(), Prediction::V, method, &kept).unwrap().limited(limit);
        let mut want = Vec::new();
        for (i, &t) in kept.iter().enumerate() {
            let batch = Batch::evaluation(2, 0, 0, (0..IMAGES).collect(), t, TIMESTEPS as u32);
            let noise = Noise::own(batch.noise);
            let factors = schedule().q_sample_coefficients(t as usize);
            let x = diffuse(&cpu, &x_0, None, factors, noise, 1).unwrap().x; // (n, h, w, c)
            let times = Tensor::full(&cpu, Shape::new(IMAGES, 1, 1, 1), t as f32).unwrap();
            let labels = Conditioning::from_labels(&cpu, data.labels()).unwrap();
            let mut tape = Tape::inference(&cpu, &params);
            let output =
                unet.forward(&mut tape, &Var::constant(x.clone()), &times, &labels, None).unwrap().into_value();
            let given = Given { x: &x, output: &output, before: None, gradient: None, guidance: None, noise };
            let wanted = Wanted { copies: 1, x_0: true };
            let (_, predicted) = advance(&cpu, &given, &sampler.steps()[kept.len() - 1 - i], wanted).unwrap();
            let predicted = predicted.expect("wanted");
            let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
            want.push(predicted.data().iter().zip(x_0.data()).map(square).sum::<f64>() / shape.len() as f64);
        }
        for (device, budget) in &devices {
            let network = scaled(device);
            let got = bound_of(device, &network, (2, 1), Variance::FixedSmall, Some(&kept), limit);
            for (got, want) in got.mse_x0.iter().zip(&want) {
                assert!((got - want).abs() <= budget * want, "{device}, {limit:?}: {got}, expected {want}");
            }
        }
        assert!(!seen.contains(&want[2].to_bits()), "{limit:?} makes no difference to this test");
        seen.push(want[2].to_bits());
    }
}

#[test]
fn the_standard_error_and_the_table_by_value() {
    let per_image = vec![1.0, 2.0, 4.0];
    let (timesteps, terms, mse_x0) = (vec![0, 3, 7], vec![1.0, 0.5, 0.25], vec![0.01, 0.04, 0.25]);
    let bound = Bound { per_image, prior: 0.5, timesteps, terms, mse_x0, mse_eps: vec![1.0; 3] };
    // Roundings of a few operations on numbers up to 64.
    let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-13, "{got}, expected {want}");
    // A mean of 7/3, deviations of -4/3, -1/3 and 5/3: 14/3, over the n - 1 of a variance and the n of a mean.
    near(bound.standard_error().unwrap(), (14.0f64 / 3.0 / 2.0 / 3.0).sqrt());
    assert_eq!(Bound { per_image: vec![1.0], ..bound.clone() }.standard_error(), None);
    let cuts = bound.rate_distortion();
    assert_eq!(cuts.len(), 3);
    for (cut, (t, rate, rmse)) in cuts.iter().zip([(0, 1.25, 12.75), (3, 0.75, 25.5), (7, 0.5, 63.75)]) {
        assert_eq!(cut.t, t);
        near(cut.rate, rate);
        near(cut.rmse, rmse);
    }
}

#[test]
fn a_gpu_measures_what_the_cpu_does() {
    let want = bound(&Device::cpu(), 2, Variance::LearnedRange, None, 1);
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        let got = bound(&Device::Cuda(gpu), 3, Variance::LearnedRange, None, 1);
        // An output off by a rounding of the network moves an error's square by twice as much of it.
        let budget = 2.0 * if dtype == DType::F32 { 1e-5 } else { 2e-2 };
        for (name, got, want) in [
            ("terms", &got.terms, &want.terms),
            ("mse_x0", &got.mse_x0, &want.mse_x0),
            ("mse_eps", &got.mse_eps, &want.mse_eps),
            ("per_image", &got.per_image, &want.per_image),
        ] {
            for (i, (g, w)) in got.iter().zip(want).enumerate() {
                assert!((g - w).abs() <= budget * w.abs(), "{dtype:?}, {name} {i}: {g} for {w}");
            }
        }
    }
}
