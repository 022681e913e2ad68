//! The variational bound of a data set: what an image's figures depend on. The terms themselves are compared with
//! OpenAI's numbers in tests/diffusion.rs and tests/ops/loss.rs.

mod support;

use ddpm_cuda::data::{Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::objective::Loss;
use ddpm_cuda::diffusion::{Kind, Objective, Prediction, Schedule, Variance};
use ddpm_cuda::evaluate::{Bound, Evaluation};
use ddpm_cuda::params::Params;
use ddpm_cuda::tensor::DType;
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

/// The bound of a small network with random weights.
fn bound(device: &Device, together: usize, variance: Variance, kept: Option<&[u32]>, draws: u32) -> Bound {
    let mut config = support::tiny(SIDE, SIDE, 3);
    config.model.classes = 2;
    config.model.learned_variance = variance.is_learned();
    let (unet, specs) = UNet::new(&config.model).unwrap();
    let params = Params::init(device, specs, 3).unwrap();
    let schedule = Schedule::with_betas(Kind::Linear, TIMESTEPS, 1e-3, 0.5).unwrap();
    let objective = Objective::new(Loss::Vlb, Prediction::V, variance, &schedule);
    let objective = kept.map_or(objective.clone(), |kept| objective.over(kept));
    let (data, objective) = (data(), &objective);
    let (unet, params, data) = (&unet, &params, &data);
    let evaluation = Evaluation { device, unet, params, objective, data, draws, seed: 2, clip: true, together };
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
