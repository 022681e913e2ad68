//! Schedules, forward process, ancestral sampling and DDIM against OpenAI's guided-diffusion: the arrays in
//! `fixtures/diffusion.safetensors`, all float64 (diffusion.md beside it says what each holds).
//!
//! In f64 everything agrees to 1e-10: both sides make a few thousand roundings of 1e-16, and what a reverse process
//! amplifies, by at most 1/sqrt(alpha_bar) = 157 per step, clipping to [-1, 1] undoes.

#[path = "support/mod.rs"]
mod support;

use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::learned::{self, gradient, slope, slope_of_prior};
use ddpm_cuda::diffusion::objective::{Loss, Objective};
use ddpm_cuda::diffusion::sampler::{Before, Corrector, Guidance, Limit, Samples, Step, inversion};
use ddpm_cuda::diffusion::{
    Batch, Curve, Importance, Kind, Method, Prediction, Sampler, Schedule, Spacing, Timesteps, Variance,
};
use ddpm_cuda::ops::adam::{self, Update};
use ddpm_cuda::ops::sample_step::reference::Image;
use ddpm_cuda::ops::{loss, q_sample, sample_step};
use ddpm_cuda::rng;
use ddpm_cuda::sample::sample;
use ddpm_cuda::tensor::{Shape, Tensor};
use num_traits::Float;
use safetensors::SafeTensors;

use support::{close, same_bits};

/// One array of the fixture.
fn golden(name: &str) -> Vec<f64> {
    static BYTES: &[u8] = include_bytes!("fixtures/diffusion.safetensors");
    let file = SafeTensors::deserialize(BYTES).expect("the fixture is a safetensors file");
    let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(view.dtype(), safetensors::Dtype::F64, "{name}");
    view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("eight bytes"))).collect()
}

/// Asserts that every element is within 1e-10 of the expected one, relative to the larger of it and 1. Prints the
/// fraction of the budget used.
#[track_caller]
fn agrees(name: &str, got: &[f64], want: &[f64]) {
    agrees_to(name, got, want, |w| 1e-10 * w.abs().max(1.0));
}

#[track_caller]
fn agrees_to(name: &str, got: &[f64], want: &[f64], budget: impl Fn(f64) -> f64) {
    assert_eq!(got.len(), want.len(), "{name}: {} numbers, expected {}", got.len(), want.len());
    let mut share = 0.0f64;
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let used = (g - w).abs() / budget(w);
        assert!(used <= 1.0, "{name}: element {i} is {g:e}, expected {w:e}: {used:.3} of the budget");
        share = share.max(used);
    }
    println!("{name}: {share:.2e} of the budget");
}

const IMAGES: usize = 2 * 3 * 6 * 6;

/// The fixture's short chain: 20 betas evenly spaced from 0.001 to 0.35.
fn short() -> Schedule {
    Schedule::with_betas(Kind::Linear, 20, 1e-3, 0.35).unwrap()
}

/// The fixture's network: `0.8 tanh x + 0.1 sin 3x + 0.05 t/T`.
fn network<T: Float>(x: &[T], t: u32, timesteps: usize) -> Vec<T> {
    let number = |v: f64| T::from(v).unwrap();
    let shift = number(0.05 * f64::from(t) / timesteps as f64);
    x.iter().map(|&x| number(0.8) * x.tanh() + number(0.1) * (number(3.0) * x).sin() + shift).collect()
}

/// The states after each step of `sampler`, from `start`; the step with index i counted from the end adds `noise(i)`.
fn trajectory<'a, T: Float + 'a>(
    sampler: &Sampler,
    timesteps: usize,
    start: &[T],
    noise: impl Fn(usize) -> &'a [T],
) -> Vec<T> {
    let (mut x, mut all) = (start.to_vec(), Vec::new());
    let count = sampler.steps().len();
    for (k, step) in sampler.steps().iter().enumerate() {
        let output = network(&x, step.t, timesteps);
        x = sample_step::reference::forward(&x, &output, noise(count - 1 - k), step);
        all.extend_from_slice(&x);
    }
    all
}

#[test]
fn linear_and_cosine_schedules_are_openais() {
    for kind in [Kind::Linear, Kind::Cosine] {
        let s = Schedule::new(kind, 1000).unwrap();
        // Relative: the smallest beta_tilde is 5e-5.
        let check = |key: &str, got: &dyn Fn(usize) -> f64| {
            let got: Vec<f64> = (0..1000).map(got).collect();
            agrees_to(&format!("{kind} {key}"), &got, &golden(&format!("schedule.{kind}.{key}")), |w| {
                1e-10 * w.abs().max(1e-300)
            });
        };
        check("betas", &|t| s.betas()[t]);
        check("alphas_cumprod", &|t| s.alpha_bar(t));
        check("posterior_variance", &|t| s.posterior_variance(t));
        check("posterior_log_variance_clipped", &|t| s.log_variance(Variance::FixedSmall, t));
        check("posterior_mean_coef1", &|t| s.posterior_mean_coefficients(t).0);
        check("posterior_mean_coef2", &|t| s.posterior_mean_coefficients(t).1);
    }
}

/// Asserts that a number is the one written, to the digits written.
#[track_caller]
fn near(name: &str, got: f64, want: f64, digits: i32) {
    let unit = 10f64.powi(want.abs().log10().floor() as i32 + 1 - digits);
    assert!((got - want).abs() <= 0.5 * unit * (1.0 + 1e-9), "{name} is {got:e}, expected {want:e}");
}

/// Values computed independently in f64 for the paper's schedule, to the digits written here.
#[test]
fn the_papers_schedule_has_its_known_values() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    near("alpha_bar_0", s.alpha_bar(0), 0.9999, 13);
    near("alpha_bar_1", s.alpha_bar(1), 0.99978009207, 11);
    near("alpha_bar_500", s.alpha_bar(500), 0.077796658365, 11);
    near("alpha_bar_999", s.alpha_bar(999), 4.03582976538e-5, 12);
    near("beta_tilde_1", s.posterior_variance(1), 5.4531876613e-5, 11);
    near("ln beta_tilde_1", s.log_variance(Variance::FixedSmall, 1), -9.8167251353, 11);
    near("ln beta_1", s.log_variance(Variance::FixedLarge, 1), -9.0286863719, 11);
    near("beta_tilde_999", s.posterior_variance(999), 0.0199999835266, 12);
    near("c_0 at 999", s.posterior_mean_coefficients(999).0, 1.283514872e-4, 10);
    near("c_t at 999", s.posterior_mean_coefficients(999).1, 0.9899486783, 10);
    assert_eq!(s.posterior_variance(0), 0.0);
    for variance in [Variance::FixedSmall, Variance::FixedLarge] {
        assert_eq!(s.log_variance(variance, 0), s.posterior_variance(1).ln(), "{variance} at t = 0");
    }
    let (c_0, c_t) = s.posterior_mean_coefficients(0);
    assert!((c_0 - 1.0).abs() < 1e-11 && c_t == 0.0, "posterior at t = 0: {c_0}, {c_t}");

    let cosine = Schedule::new(Kind::Cosine, 1000).unwrap();
    near("cosine beta_0", cosine.betas()[0], 4.128422482e-5, 10);
    assert_eq!(cosine.betas().iter().filter(|&&b| b == 0.999).count(), 1, "one beta is cut off");
    assert_eq!(cosine.betas()[999], 0.999);
    near("cosine beta_0 of 4000", Schedule::new(Kind::Cosine, 4000).unwrap().betas()[0], 9.865818814e-6, 10);
}

#[test]
fn the_other_schedules_start_and_end_where_they_should() {
    let s = |kind| Schedule::with_betas(kind, 101, 1e-4, 0.02).unwrap();
    let ends = |kind| (s(kind).betas()[0], s(kind).betas()[50], s(kind).betas()[100]);
    // sqrt(beta) runs from 0.01 to sqrt(0.02); in the middle it is their mean.
    let (first, middle, last) = ends(Kind::Quadratic);
    agrees("quadratic", &[first, middle, last], &[1e-4, ((0.01 + 0.02f64.sqrt()) / 2.0).powi(2), 0.02]);
    assert_eq!(ends(Kind::Constant), (0.02, 0.02, 0.02));
    let (first, middle, last) = ends(Kind::Sigmoid);
    let at = |x: f64| 1e-4 + 0.0199 / (1.0 + (-x).exp());
    agrees("sigmoid", &[first, middle, last], &[at(-6.0), 0.01005, at(6.0)]);
    let given = vec![0.1, 0.5, 0.2];
    let s = Schedule::from_betas(given.clone()).unwrap();
    assert_eq!(s.betas(), given);
    agrees("given", &[s.alpha_bar(0), s.alpha_bar(1), s.alpha_bar(2)], &[0.9, 0.45, 0.36]);
}

#[test]
fn every_length_of_chain_ends_in_noise() {
    // A learned schedule begins with an end of 0.0067 and finds another.
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Learned) {
        for timesteps in [21, 50, 1000, 4000] {
            let s = Schedule::new(kind, timesteps).unwrap();
            // The quadratic schedule keeps the most signal: its mean beta is 0.0072 at 1000 steps, so alpha_bar ends at
            // e^-7.2 = 7.5e-4.
            let left = s.alpha_bar(timesteps - 1);
            assert!(left < 1e-3, "{kind} over {timesteps}: alpha_bar ends at {left}");
            assert!((1..timesteps).all(|t| s.alpha_bar(t) < s.alpha_bar(t - 1)), "{kind}: alpha_bar falls");
        }
    }
}

#[test]
fn names_parse_and_print_and_wrong_settings_are_refused() {
    for kind in Kind::ALL {
        assert_eq!(kind.to_string().parse::<Kind>().unwrap(), kind);
    }
    let of_diffusers: Vec<(&str, Kind)> =
        Kind::ALL.into_iter().filter_map(|kind| Some((kind.diffusers_name()?, kind))).collect();
    assert!(of_diffusers.len() >= 2, "diffusers has linear and cosine schedules too: {of_diffusers:?}");
    for (name, kind) in of_diffusers {
        assert_eq!(name.parse::<Kind>().unwrap(), kind);
    }
    for variance in [Variance::FixedSmall, Variance::FixedLarge] {
        assert_eq!(variance.to_string().parse::<Variance>().unwrap(), variance);
    }
    for spacing in Spacing::ALL {
        assert_eq!(spacing.to_string().parse::<Spacing>().unwrap(), spacing);
    }
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let ddim = |eta| Sampler::new(&s, Method::Ddim { eta }, Spacing::Even, 10).map(|_| ());
    let refused = [
        ("`lineal`: one of linear, cosine", "lineal".parse::<Kind>().map(|_| ())),
        ("`learnt`: one of fixed_small", "learnt".parse::<Variance>().map(|_| ())),
        ("`odd`: one of even", "odd".parse::<Spacing>().map(|_| ())),
        ("timesteps is 1: must be from 2", Schedule::new(Kind::Cosine, 1).map(|_| ())),
        ("timesteps is 20: the linear schedule needs at least 21", Schedule::new(Kind::Linear, 20).map(|_| ())),
        ("beta_start is 0: must lie", Schedule::with_betas(Kind::Linear, 10, 0.0, 0.02).map(|_| ())),
        ("beta_end is NaN: must lie", Schedule::with_betas(Kind::Constant, 10, 0.1, f64::NAN).map(|_| ())),
        ("beta at timestep 0 is 1: must", Schedule::from_betas(vec![1.0, 0.5]).map(|_| ())),
        ("underflows", Schedule::from_betas(vec![0.99; 200]).map(|_| ())),
        ("underflows: it is 9", Schedule::from_betas(vec![0.9; 80]).map(|_| ())),
        ("beta at timestep 0 is 1e-17: so small that", Schedule::from_betas(vec![1e-17; 2]).map(|_| ())),
        ("beta at timestep 2 is 1e-18: so small that", Schedule::from_betas(vec![0.1, 0.1, 1e-18]).map(|_| ())),
        ("timestep 999, but the last there is is 998", Spacing::Leading.timesteps_from(1, 999, 999).map(|_| ())),
        ("steps is 0: must be from 1 to the model's 1000", Spacing::Even.timesteps(1000, 0).map(|_| ())),
        ("steps is 1001: must be from 1", Spacing::Trailing.timesteps(1000, 1001).map(|_| ())),
        ("no stride takes 1000 timesteps in 300", Spacing::Stride.timesteps(1000, 300).map(|_| ())),
        ("eta is -0.5: must be from 0 to 1", ddim(-0.5)),
        ("eta is NaN: must be from 0 to 1", ddim(f64::NAN)),
    ];
    for (words, result) in refused {
        let error = result.expect_err(words);
        assert!(error.to_string().contains(words), "`{error}` does not say `{words}`");
        assert_eq!(error.exit_code(), 2, "{error}");
    }
}

#[test]
fn q_sample_is_openais() {
    let (s, x_0, noise) = (short(), golden("x0"), golden("noise"));
    let x_t: Vec<f64> = (0..20).flat_map(|t| q_sample::reference::forward(&x_0, slice(&noise, t), t, &s)).collect();
    agrees("q_sample", &x_t, &golden("q_sample"));
    // The fixture's images are scaled bytes; our scaling reproduces each of them.
    for &x in &x_0 {
        let byte = ((x + 1.0) * 127.5).round() as u8;
        let scaled: f64 = q_sample::reference::scale(byte);
        assert!((scaled - x).abs() <= 1e-10, "byte {byte} is {scaled}, expected {x}");
    }
}

fn slice<T>(all: &[T], i: usize) -> &[T] {
    &all[i * IMAGES..(i + 1) * IMAGES]
}

/// The variances that OpenAI's code has too.
fn of_openai() -> impl Iterator<Item = Variance> {
    Variance::ALL.into_iter().filter(|variance| *variance != Variance::LearnedRaw)
}

/// Every prediction with every variance. OpenAI's clips no predicted mean.
#[test]
fn ancestral_sampling_is_openais() {
    let (s, noise) = (short(), golden("noise"));
    let kept: Vec<u32> = (0..20).collect();
    for prediction in [Prediction::Eps, Prediction::X0, Prediction::Mu] {
        for variance in of_openai() {
            let sampler = Sampler::over(&s, prediction, Method::Ancestral(variance), &kept).unwrap();
            let sampler = if prediction == Prediction::Mu { sampler.unclipped() } else { sampler };
            let (mut x, mut got) = (slice(&noise, 19).to_vec(), Vec::new());
            for step in sampler.steps() {
                let output = network(&x, step.t, 20);
                let v: Vec<f64> = x.iter().map(|x| 0.6 * (2.0 * x).cos()).collect();
                let z = slice(&noise, (step.t as usize).saturating_sub(1));
                let image = Image { x: &x, output: &output, v: &v, before: &[], gradient: &[], z };
                x = sample_step::reference::step_of(image, step).0;
                got.extend_from_slice(&x);
            }
            let name = format!("ancestral.{prediction}.{variance}");
            agrees(&name, &got, &golden(&name));
        }
    }
}

/// DPM-Solver++ 2M is diffusers', whose tables are f32.
#[test]
fn dpm_solver_pp_is_diffusers() {
    let (s, noise) = (Schedule::new(Kind::Linear, 1000).unwrap(), golden("noise"));
    let sampler = Sampler::new(&s, Method::DpmPp, Spacing::Even, 10).unwrap().unclipped();
    let times: Vec<f64> = sampler.steps().iter().map(|step| step.time).collect();
    assert_eq!(times, golden("dpmpp2m.timesteps"));
    let (mut x, mut before, mut got) = (slice(&noise, 19).to_vec(), Vec::new(), Vec::new());
    for step in sampler.steps() {
        let output = network(&x, step.t, 1000);
        let image = Image { x: &x, output: &output, v: &[], before: &before, gradient: &[], z: &[] };
        (x, before) = sample_step::reference::step_of(image, step);
        got.extend_from_slice(&x);
    }
    let want = golden("dpmpp2m.traj");
    agrees_to("dpmpp2m", &got, &want, |w| 1e-5 * w.abs().max(1.0));
}

/// eps of a network that knows that every pixel is N(0.1, 0.25), at a noise level sigma.
fn toy(x: f64, sigma: f64) -> f64 {
    let a = 1.0 / (1.0 + sigma * sigma);
    (1.0 - a).sqrt() * (x - a.sqrt() * 0.1) / (a * 0.25 + 1.0 - a)
}

/// What `sampler` makes of x_T = 1 with that network.
fn of_toy(sampler: &Sampler) -> f64 {
    let (mut x, mut before) = (1.0, None::<(f64, f64)>);
    for step in sampler.steps() {
        let past = match (step.before, before) {
            (Before::X0, Some((_, x_0))) => vec![x_0],
            (Before::State, Some((x, _))) => vec![x],
            _ => Vec::new(),
        };
        let output = [toy(x, step.level)];
        let image = Image { x: &[x], output: &output, v: &[], before: &past, gradient: &[], z: &[] };
        let (next, x_0) = sample_step::reference::step_of(image, step);
        before = Some((x, x_0[0]));
        x = next[0];
    }
    x
}

/// Solutions of the ODE from x_T = 1, which leads to 0.5996899216, computed independently in f64.
#[test]
fn solvers_solve_the_ode_as_well_as_is_known() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    for (steps, want) in [(10, 0.5032090643), (20, 0.5766318223), (50, 0.5994595114), (100, 0.6000255102)] {
        let sampler = Sampler::new(&s, Method::DpmPp, Spacing::Even, steps).unwrap().unclipped();
        near(&format!("dpm++ in {steps}"), of_toy(&sampler), want, 9);
    }
    let grid = Timesteps::Spaced(Spacing::Even);
    for (steps, want) in [(10, 0.4689591427), (20, 0.5305942837), (50, 0.5708315604), (100, 0.5849563772)] {
        let kept = grid.kept(&s, true, 0, steps).unwrap();
        let sampler = Sampler::over(&s, Prediction::Eps, Method::Ddim { eta: 0.0 }, &kept).unwrap().unclipped();
        near(&format!("ddim in {steps}"), of_toy(&sampler), want, 9);
    }
    for (steps, want) in [(10, 0.7254471137), (18, 0.6306811050), (50, 0.6030199569)] {
        let sampler = Sampler::heun_over_levels(&s, Prediction::Eps, steps).unwrap().unclipped();
        assert_eq!(sampler.calls(), 2 * steps - 1);
        near(&format!("heun in {steps}"), of_toy(&sampler), want, 9);
    }
    let error = |spacing: &str, steps| {
        let kept = spacing.parse::<Timesteps>().unwrap().kept(&s, true, 0, steps).unwrap();
        of_toy(&Sampler::over(&s, Prediction::Eps, Method::DpmPp, &kept).unwrap().unclipped()) - 0.5996899216
    };
    near("even in 15", error("even", 15), -0.0460, 3);
    near("trailing in 15", error("trailing", 15), -0.0447, 3);
    // Its levels are those of whole timesteps here.
    assert!((error("karras", 15) - 0.0417).abs() < 2e-3, "{}", error("karras", 15));
}

/// Heun's method over the same whole timesteps follows the ODE more closely than DDIM over twice as many.
#[test]
fn heun_over_timesteps_is_of_second_order() {
    let s = Schedule::new(Kind::Cosine, 1000).unwrap();
    let exact =
        0.1 + 0.5 * (1.0 - s.alpha_bar(999).sqrt() * 0.1) / (s.alpha_bar(999) * 0.25 + 1.0 - s.alpha_bar(999)).sqrt();
    let error = |steps| {
        let kept = Timesteps::Spaced(Spacing::Trailing).kept(&s, true, 0, steps).unwrap();
        let of = |method| of_toy(&Sampler::over(&s, Prediction::Eps, method, &kept).unwrap().unclipped());
        ((of(Method::Heun) - exact).abs(), (of(Method::Ddim { eta: 0.0 }) - exact).abs())
    };
    for steps in [10, 50, 200] {
        let (heun, ddim) = error(steps);
        assert!(heun < 0.3 * ddim, "in {steps} steps heun errs by {heun}, ddim by {ddim}");
    }
    // Its first step is from a level of 20,291, where the slope at the end would lead astray.
    let kept = Timesteps::Spaced(Spacing::Trailing).kept(&s, true, 0, 10).unwrap();
    assert_eq!(Sampler::over(&s, Prediction::Eps, Method::Heun, &kept).unwrap().calls(), 18);
}

/// DDIM inverted over the levels of ten or fifty steps, from x_0 = 0.3: what it leads to, and how far it comes back,
/// computed independently in f64. Iterated to the end it comes back to rounding.
#[test]
fn inversion_leads_back() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    for (steps, naive, limit, back) in [
        (10, 0.4356211888, 0.5423563574, [-0.0394060, -0.0146380, -0.00169120, 3.64335e-6]),
        (50, 0.4130299425, 0.4251457872, [-0.00570815, -3.76456e-4, -5.22635e-7, 4.50e-12]),
    ] {
        let kept = Timesteps::Spaced(Spacing::Even).kept(&s, true, 0, steps).unwrap();
        let inverse = inversion(&s, Prediction::Eps, &kept, 1).unwrap();
        let encode = |rounds: usize| {
            inverse.iter().fold(0.3, |a, step| {
                (0..=rounds).fold(a, |x, _| {
                    let output = [toy(x, step.level)];
                    let image = Image { x: &[x], output: &output, v: &[], before: &[a], gradient: &[], z: &[] };
                    sample_step::reference::step_of(image, step).0[0]
                })
            })
        };
        let sampler = Sampler::over(&s, Prediction::Eps, Method::Ddim { eta: 0.0 }, &kept).unwrap().unclipped();
        let decode = |x: f64| {
            let step = |x: f64, step: &Step| sample_step::reference::forward(&[x], &[toy(x, step.level)], &[], step)[0];
            sampler.steps().iter().fold(x, step)
        };
        near(&format!("x_T of {steps}"), encode(0), naive, 9);
        near(&format!("x_T of {steps} in the end"), encode(100), limit, 9);
        assert!((decode(encode(100)) - 0.3).abs() < 1e-12, "{steps}: {:e}", decode(encode(100)) - 0.3);
        for (rounds, want) in [0, 1, 3, 10].into_iter().zip(back) {
            // To the digits written, and to the rounding of a few hundred operations on numbers up to 157.
            let off = (decode(encode(rounds)) - 0.3 - want).abs();
            assert!(off <= 1e-4 * want.abs() + 1e-12, "{steps}, {rounds} rounds: off by {off:e}");
        }
    }
}

/// Lists and Karras' levels, against diffusers and OpenAI's respacing.
#[test]
fn timesteps_are_diffusers_and_openais() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let kept = |text: &str, solver: bool, steps: usize| {
        let mut kept = text.parse::<Timesteps>().unwrap().kept(&s, solver, 0, steps).unwrap();
        kept.reverse();
        kept
    };
    assert_eq!(kept("even", true, 15), [999, 932, 866, 799, 733, 666, 599, 533, 466, 400, 333, 266, 200, 133, 67]);
    assert_eq!(kept("trailing", true, 15), [999, 932, 866, 799, 732, 666, 599, 532, 466, 399, 332, 266, 199, 132, 66]);
    assert_eq!((kept("leading", true, 15)[0], kept("leading", true, 15)[14]), (930, 62));
    assert_eq!(kept("karras", true, 10), [999, 937, 864, 775, 663, 511, 301, 102, 18, 0]);
    assert_eq!(kept("karras", false, 15), [999, 960, 917, 869, 815, 753, 681, 593, 484, 350, 205, 92, 32, 8, 0]);
    let levels = Timesteps::karras_levels(&s, 10).unwrap();
    // diffusers rounds betas to f32, which is 1.7e-4 of 1 - alpha_bar at the clean end.
    for (i, want) in [(0, 157.407), (1, 85.7107), (4, 9.27474), (8, 0.0739303), (9, 0.0100013)] {
        let got = levels[i].1;
        assert!((got / want - 1.0).abs() < 2e-4, "level {i} is {got}, expected {want}");
    }
    // The cosine schedule's are spread below its last timesteps; a long list repeats some, and each is taken once.
    let cosine = Schedule::new(Kind::Cosine, 1000).unwrap();
    let karras = |steps| Timesteps::Karras.kept(&cosine, true, 0, steps).unwrap();
    assert_eq!(karras(15), [0, 11, 51, 156, 359, 608, 788, 886, 936, 962, 977, 985, 990, 993, 995]);
    assert!(karras(40).is_sorted_by(|a, b| a < b) && karras(40).len() == 39, "{:?}", karras(40));
    let mut listed = kept("10,15,20", false, 45);
    listed.reverse();
    assert_eq!(listed[..12], [0, 37, 74, 111, 148, 185, 222, 259, 296, 333, 334, 358]);
    assert_eq!((listed[24], listed[25], listed[26], listed[44]), (666, 667, 684, 999));
    assert_eq!(kept("10", false, 10), kept("even", false, 10));
    for (text, words) in [("odd", "karras or a list"), ("10,x", "numbers with commas"), ("500,1", "")] {
        match text.parse::<Timesteps>() {
            Err(e) => assert!(e.to_string().contains(words), "{e}"),
            Ok(list) => _ = list.kept(&s, false, 0, 501).unwrap(),
        }
    }
    let said = |text: &str| text.parse::<Timesteps>().unwrap().kept(&s, true, 0, 1000).unwrap_err().to_string();
    assert!(said("even").contains("must be from 1 to 999"));
    assert!(said("900,900").contains("cannot keep 900"));
}

/// What cannot work is refused: pure noise for eps and for solvers, a learned variance in longer steps, corrections of
/// an ODE, and numbers out of range.
#[test]
fn samplers_that_cannot_work_are_refused() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let zero = s.with_zero_terminal_snr();
    let all: Vec<u32> = (0..1000).collect();
    let ancestral = Method::Ancestral(Variance::FixedSmall);
    let over = |s: &Schedule, prediction, method, kept: &[u32]| Sampler::over(s, prediction, method, kept).map(|_| ());
    over(&zero, Prediction::V, ancestral, &all).unwrap();
    over(&zero, Prediction::Eps, ancestral, &all[..999]).unwrap();
    over(&s, Prediction::Eps, Method::Ancestral(Variance::Learned), &all).unwrap();
    let ddim = Sampler::new(&s, Method::Ddim { eta: 0.0 }, Spacing::Even, 10).unwrap();
    let heun = Sampler::new(&s, Method::Heun, Spacing::Even, 10).unwrap();
    let guidance = Guidance::new(2.0).unwrap();
    for (words, result) in [
        ("predicts eps cannot start from pure noise", over(&zero, Prediction::Eps, ancestral, &all)),
        ("the log-SNR is infinite", over(&zero, Prediction::V, Method::DpmPp, &all)),
        ("the log-SNR is infinite", over(&zero, Prediction::V, Method::Heun, &all)),
        ("3 of 1000 are kept", over(&s, Prediction::Eps, Method::Ancestral(Variance::Learned), &[0, 1, 3])),
        ("no finite noise level", Timesteps::karras_levels(&zero, 5).map(|_| ())),
        ("whole timesteps alone", Sampler::heun_over_levels(&s, Prediction::Mu, 5).map(|_| ())),
        ("nothing can be encoded", inversion(&zero, Prediction::V, &all, 1).map(|_| ())),
        ("dpm++ and heun solve an ODE", heun.corrected(Corrector { steps: 1, snr: 0.16 }).map(|_| ())),
        ("--snr 0: must be above 0", ddim.corrected(Corrector { steps: 1, snr: 0.0 }).map(|_| ())),
        ("--threshold 0: the quantile", Limit::quantile(0.0).map(|_| ())),
        ("--guidance NaN", Guidance::new(f64::NAN).map(|_| ())),
        ("--guidance-rescale 2", guidance.rescaled(2.0).map(|_| ())),
        ("--guidance-interval 2,1", guidance.within(2.0, 1.0).map(|_| ())),
    ] {
        let error = result.expect_err(words).to_string();
        assert!(error.contains(words), "`{error}` does not say `{words}`");
    }
}

/// From pure noise a network that predicts x_0 or v samples with finite factors, and one that knows x_0 ends at it.
#[test]
fn zero_terminal_snr_is_sampled_from() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap().with_zero_terminal_snr();
    let kept = Spacing::Trailing.timesteps(1000, 10).unwrap();
    for prediction in [Prediction::X0, Prediction::V, Prediction::Mu] {
        for method in [Method::Ancestral(Variance::FixedLarge), Method::Ddim { eta: 0.0 }, Method::Ddim { eta: 1.0 }] {
            let (mut x, x_0) = (0.7, 0.3);
            for step in Sampler::over(&s, prediction, method, &kept).unwrap().steps() {
                let (signal, noise) = s.q_sample_coefficients(step.t as usize);
                let eps = (x - signal * x_0) / noise;
                let (of_x_0, of_eps) = prediction.target(&s, step.t as usize);
                let output = [of_x_0 * x_0 + of_eps * eps];
                x = sample_step::reference::forward(&[x], &output, &[-0.4], step)[0];
                assert!(x.is_finite(), "{prediction} {method:?} at {}", step.t);
            }
            assert!((x - 0.3).abs() < 1e-9, "{prediction} {method:?}: {x}");
        }
    }
}

/// The learned range that makes ancestral sampling of the toy exact gives its samples their deviation of 0.5.
#[test]
fn a_learned_variance_makes_the_toy_exact() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let kept: Vec<u32> = (0..1000).collect();
    let sampler = Sampler::over(&s, Prediction::Eps, Method::Ancestral(Variance::LearnedRange), &kept).unwrap();
    let v = |a: f64| a * 0.25 + 1.0 - a;
    for (t, want) in [(1, 0.99954374), (100, 0.76234044), (999, 0.25000764)] {
        let variance = s.betas()[t] * v(s.alpha_bar(t - 1)) / v(s.alpha_bar(t));
        let learned = sampler.steps()[999 - t].learned.unwrap();
        near(&format!("fraction at {t}"), ((variance.ln() - learned.offset) / learned.factor + 1.0) / 2.0, want, 8);
    }
}

/// Numbers of the notes on guidance and thresholding, computed by hand.
#[test]
fn guidance_and_thresholding_by_hand() {
    let guidance = Guidance::new(3.0).unwrap();
    let (with, without) = ([1.0, -1.0, 2.0, 0.0], [0.5, 0.0, 1.0, 0.5]);
    agrees("W = 3", &sample_step::reference::guided(&with, &without, guidance), &[2.0, -3.0, 4.0, -1.0]);
    let rescaled = sample_step::reference::guided(&with, &without, guidance.rescaled(0.7).unwrap());
    agrees_to("phi = 0.7", &rescaled, &[1.18131836, -1.77197754, 2.36263672, -0.59065918], |_| 5e-9);
    let x_0 = [-2.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0];
    agrees("0.9", &[sample_step::reference::quantile(&x_0, 0.9)], &[2.3]);
    agrees("0.995", &[sample_step::reference::quantile(&x_0, 0.995)], &[2.965]);
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let sampler = Sampler::over(&s, Prediction::X0, Method::Ddim { eta: 0.0 }, &[500]).unwrap();
    let step = sampler.limited(Limit::quantile(0.9).unwrap()).steps()[0];
    let got = sample_step::reference::forward(&x_0, &x_0, &[], &step);
    agrees("thresholded", &got, &x_0.map(|x: f64| x.clamp(-2.3, 2.3) / 2.3));
    let interval = guidance.within(0.28, 2.9).unwrap();
    assert_eq!([0.28, 0.281, 2.9, 2.91].map(|level| interval.applies(level)), [false, true, true, false]);
    assert!(!Guidance::new(1.0).unwrap().applies(1.0), "W = 1 is no guidance");
}

/// A Langevin step by hand: s = (3, 4), z = (1, 2), snr 0.16.
#[test]
fn a_correction_by_hand() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let all: Vec<u32> = (0..1000).collect();
    let corrector = Corrector { steps: 1, snr: 0.16 };
    let sampler =
        Sampler::over(&s, Prediction::Eps, Method::Ddim { eta: 0.0 }, &all).unwrap().corrected(corrector).unwrap();
    assert_eq!(sampler.calls(), 1999);
    let (_, correction) = sampler.correction(498).unwrap();
    assert_eq!(correction.t, 500, "it corrects the level that the step has reached");
    assert!(sampler.correction(999).is_none(), "there is none after the last step");
    near("alpha", correction.alpha, 0.98994004004, 11);
    let eps = [3.0, 4.0].map(|s| -s * correction.noise);
    let of = |output: &[f64], gradient: &[f64]| {
        let image = Image { x: &[0.0, 0.0], output, v: &[], before: &[], gradient, z: &[1.0, 2.0] };
        sample_step::reference::correct(image, correction, corrector)
    };
    let got = of(&eps, &[]);
    agrees_to("step", &got, &[0.17279766, 0.32532134], |_| 5e-9);
    // The gradient of a log probability is part of the score: (1, 5) + (2, -1).
    let guided = of(&[1.0, 5.0].map(|s| -s * correction.noise), &[2.0, -1.0]);
    agrees_to("step towards a class", &guided, &got, |want| 1e-14 * want.abs());
}

/// The gradient of a classifier lowers eps by sqrt(1 - alpha_bar) times it under DDIM, and moves the mean of ancestral
/// sampling by the variance times it (Dhariwal and Nichol 2021, algorithms 1 and 2), whatever x_0 is clipped to.
#[test]
fn a_classifier_moves_eps_and_the_mean() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let kept: Vec<u32> = (0..50).map(|i| 20 * i).collect();
    // As their code steps from 900 to 880: x_t = 0.3, and a predicted x_0 below -1.
    let (a, before) = (s.alpha_bar(900), s.alpha_bar(880));
    let step_of = |method: Method, output: f64, g: &[f64]| {
        let sampler = Sampler::over(&s, Prediction::X0, method, &kept).unwrap();
        let step = *sampler.steps().iter().find(|step| step.t == 900).unwrap();
        let image = Image { x: &[0.3], output: &[output], v: &[], before: &[], gradient: g, z: &[0.0] };
        sample_step::reference::step_of(image, &step).0[0]
    };
    let ddim = Method::Ddim { eta: 0.0 };
    for (output, g) in [(-1.7, -0.02), (-1.7, 0.02), (0.4, 0.3), (1.2, 0.1)] {
        let x_0 = f64::clamp(output, -1.0, 1.0);
        let eps = (0.3 - a.sqrt() * x_0) / (1.0 - a).sqrt() - (1.0 - a).sqrt() * g;
        let x_0 = (0.3 - (1.0 - a).sqrt() * eps) / a.sqrt();
        let want = before.sqrt() * x_0 + (1.0 - before).sqrt() * eps;
        agrees(&format!("ddim, {output}, {g}"), &[step_of(ddim, output, &[g])], &[want]);
        let variance = 1.0 - a / before;
        for (name, method, variance) in [
            ("fixed_large", Method::Ancestral(Variance::FixedLarge), variance),
            ("fixed_small", Method::Ancestral(Variance::FixedSmall), variance * (1.0 - before) / (1.0 - a)),
        ] {
            let want = step_of(method, output, &[]) + variance * g;
            agrees(&format!("{name}, {output}, {g}"), &[step_of(method, output, &[g])], &[want]);
        }
    }
    // Of OpenAI's code.
    near("ddim", step_of(ddim, -1.7, &[-0.02]), 0.29280, 4);
}

#[test]
fn ddim_and_its_respacings_are_openais() {
    let (s, noise) = (Schedule::new(Kind::Linear, 1000).unwrap(), golden("noise"));
    for (name, spacing) in [("10", Spacing::Even), ("ddim10", Spacing::Stride)] {
        let kept: Vec<f64> = spacing.timesteps(1000, 10).unwrap().into_iter().map(f64::from).collect();
        assert_eq!(kept, golden(&format!("respace.{name}.steps")), "{name}");
        for eta in [0.0, 0.5, 1.0] {
            let sampler = Sampler::new(&s, Method::Ddim { eta }, spacing, 10).unwrap();
            let got = trajectory(&sampler, 1000, slice(&noise, 19), |i| slice(&noise, i));
            agrees(&format!("ddim {name} {eta}"), &got, &golden(&format!("ddim.{name}.eta{eta:.1}")));
        }
    }
}

#[test]
fn spacings_keep_what_they_say() {
    let kept = |spacing: Spacing, timesteps, steps| spacing.timesteps(timesteps, steps).unwrap();
    assert_eq!(kept(Spacing::Even, 1000, 1), [999]);
    assert_eq!(kept(Spacing::Even, 1000, 2), [0, 999]);
    // Steps of 166.5: halves round to even.
    assert_eq!(kept(Spacing::Even, 1000, 7), [0, 166, 333, 500, 666, 832, 999]);
    assert_eq!(kept(Spacing::Stride, 1000, 7), [0, 143, 286, 429, 572, 715, 858]);
    assert_eq!(kept(Spacing::Leading, 1000, 7), [0, 142, 284, 426, 568, 710, 852]);
    assert_eq!(kept(Spacing::Trailing, 1000, 4), [249, 499, 749, 999]);
    assert_eq!(kept(Spacing::Trailing, 1000, 7), [142, 285, 428, 570, 713, 856, 999]);
    for spacing in Spacing::ALL {
        assert_eq!(kept(spacing, 50, 50), (0..50).collect::<Vec<u32>>(), "{spacing}");
    }
    // Distinct and in range for every number of steps.
    for spacing in [Spacing::Even, Spacing::Leading, Spacing::Trailing] {
        for steps in 1..=1000 {
            let kept = kept(spacing, 1000, steps);
            assert!(
                kept.len() == steps && kept.is_sorted_by(|a, b| a < b) && kept[steps - 1] < 1000,
                "{spacing} {steps}"
            );
        }
    }
}

/// `steps_offset` of diffusers' schedulers: the timesteps of `leading` one further up, those of others where they were.
#[test]
fn an_offset_moves_the_leading_timesteps_alone() {
    let moved = |spacing: Spacing, offset, steps| spacing.timesteps_from(offset, 1000, steps).unwrap();
    assert_eq!(moved(Spacing::Leading, 1, 4), [1, 251, 501, 751]);
    assert_eq!(moved(Spacing::Leading, 0, 4), [0, 250, 500, 750]);
    for spacing in [Spacing::Even, Spacing::Trailing, Spacing::Stride] {
        assert_eq!(moved(spacing, 1, 4), spacing.timesteps(1000, 4).unwrap(), "{spacing}");
    }
    assert_eq!(moved(Spacing::Leading, 249, 4)[3], 999);
    Spacing::Leading.timesteps_from(250, 1000, 4).unwrap_err();
    Spacing::Leading.timesteps_from(u32::MAX, 1000, 4).unwrap_err();
    // Over given timesteps the steps are those of the spacing that keeps them; unclipped they differ in nothing else.
    let (s, method) = (Schedule::new(Kind::Linear, 1000).unwrap(), Method::Ddim { eta: 0.5 });
    let kept = Spacing::Trailing.timesteps(1000, 7).unwrap();
    let sampler = Sampler::over(&s, Prediction::Eps, method, &kept).unwrap();
    assert_eq!(sampler, Sampler::new(&s, method, Spacing::Trailing, 7).unwrap());
    let unclipped = sampler.clone().unclipped();
    for (step, free) in sampler.steps().iter().zip(unclipped.steps()) {
        assert_eq!((step.limit, free.limit), (Limit::Range(1.0), Limit::None));
        assert_eq!(Step { limit: step.limit, ..*free }, *step);
    }
}

/// With eta = 1 DDIM is ancestral sampling with the small variance (DDIM, section 4.1), also over a subset of the
/// timesteps.
#[test]
fn ddim_with_eta_1_is_ancestral() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    for steps in [1, 7, 250, 1000] {
        let ddim = Sampler::new(&s, Method::Ddim { eta: 1.0 }, Spacing::Even, steps).unwrap();
        let ancestral = Sampler::new(&s, Method::Ancestral(Variance::FixedSmall), Spacing::Even, steps).unwrap();
        let numbers = |sampler: &Sampler| {
            let of = |s: &Step| [f64::from(s.t), s.c_x0, s.c_xt, s.sigma, s.x0_xt, s.x0_output];
            sampler.steps().iter().flat_map(of).collect::<Vec<f64>>()
        };
        agrees(&format!("{steps} steps"), &numbers(&ddim), &numbers(&ancestral));
    }
}

/// Mean and standard deviation of samples by DDIM with the exact denoiser of N(mean, deviation^2). The samples are an
/// affine map of x_T, so three points determine both.
fn sampled_gaussian(spacing: Spacing, steps: usize, mean: f64, deviation: f64) -> (f64, f64) {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let mut x = vec![-1.0, 0.0, 1.0];
    for step in Sampler::new(&s, Method::Ddim { eta: 0.0 }, spacing, steps).unwrap().steps() {
        let (signal, noise) = s.q_sample_coefficients(step.t as usize);
        let gain = signal * deviation.powi(2) / (signal.powi(2) * deviation.powi(2) + noise.powi(2));
        let eps: Vec<f64> = x.iter().map(|x| (x - signal * (mean + gain * (x - signal * mean))) / noise).collect();
        x = sample_step::reference::forward(&x, &eps, &[], step);
    }
    (x[1], (x[2] - x[0]) / 2.0)
}

/// The reasons for the default spacing: the figures in the documentation of `Spacing`.
#[test]
fn even_spacing_keeps_detail_and_brightness() {
    let kept = |spacing, steps| (100.0 * sampled_gaussian(spacing, steps, 0.0, 0.05).1 / 0.05).round();
    assert_eq!([10, 25, 100].map(|n| kept(Spacing::Even, n)), [32.0, 48.0, 79.0]);
    assert_eq!([10, 25, 100].map(|n| kept(Spacing::Trailing, n)), [15.0, 33.0, 71.0]);
    let off = |spacing| (1e4 * (sampled_gaussian(spacing, 4, 0.5, 0.2).0 - 0.5)).abs().round();
    assert_eq!((off(Spacing::Even), off(Spacing::Leading)), (1.0, 14.0));
}

/// Micro-batches draw what the whole batch draws, timesteps are uniform, half of the images are mirrored, and
/// validation draws the same every time.
#[test]
fn a_batch_draws_by_position() {
    let n = 20_000;
    let whole = Batch::train(3, 9, 0, (0..n).collect(), true, 1000);
    let piece = Batch::train(3, 9, 700, (700..800).collect(), true, 1000);
    let (t, flip) = (whole.t(), whole.flip());
    assert_eq!((&piece.t()[..], &piece.flip()[..]), (&t[700..800], &flip[700..800]));
    assert_eq!(piece.noise.image(5), whole.noise.image(705));
    assert_eq!(piece.indices[5], 705);
    for other in
        [Batch::train(4, 9, 0, (0..n).collect(), true, 1000), Batch::train(3, 10, 0, (0..n).collect(), true, 1000)]
    {
        assert!(other.t() != t && other.flip() != flip && other.noise != whole.noise);
    }
    assert!(!Batch::train(3, 9, 0, (0..n).collect(), false, 1000).flip().contains(&true));

    // Five standard deviations each: sqrt(n)/2 for the number mirrored, 1000/sqrt(12 n) for the mean timestep, sqrt(18)
    // around 9 for chi-squared over ten bins.
    let mirrored = flip.iter().filter(|f| **f).count() as f64;
    assert!((mirrored - n as f64 / 2.0).abs() <= 2.5 * (n as f64).sqrt(), "{mirrored} of {n} mirrored");
    let mean = t.iter().map(|&t| f64::from(t)).sum::<f64>() / n as f64;
    assert!((mean - 499.5).abs() <= 5.0 * 1000.0 / (12.0 * n as f64).sqrt(), "mean timestep {mean}");
    let mut bins = [0.0f64; 10];
    t.iter().for_each(|&t| bins[t as usize / 100] += 1.0);
    let expected = n as f64 / 10.0;
    let chi2: f64 = bins.iter().map(|b| (b - expected).powi(2) / expected).sum();
    assert!((chi2 - 9.0).abs() <= 5.0 * 18f64.sqrt(), "chi-squared {chi2}");

    let validation = Batch::validation(3, 700, (0..100).collect(), 1000);
    assert_eq!(validation, Batch::validation(3, 700, (0..100).collect(), 1000));
    assert_ne!(validation.t(), piece.t(), "validation has its own timesteps");
    assert_ne!(validation.noise.image(0), piece.noise.image(0), "and its own noise");
    assert!(!validation.flip().contains(&true));
    let whole = Batch::validation(3, 0, (0..n).collect(), 1000);
    assert_eq!((&validation.t()[..], validation.noise.image(5)), (&whole.t()[700..800], whole.noise.image(705)));
    let streams = [whole.noise.image(0), Batch::train(3, 0, 0, vec![0], true, 1000).noise.image(0)];
    assert_ne!(streams[0], streams[1], "at step 0, too, validation and training draw apart");
}

/// With a network that knows x_0, every sampler ends at x_0, whatever the steps.
#[test]
fn a_network_that_knows_the_image_ends_at_it() {
    let s = Schedule::new(Kind::Cosine, 1000).unwrap();
    let (x_0, noise) = (golden("x0"), golden("noise"));
    for method in [Method::Ancestral(Variance::FixedLarge), Method::Ddim { eta: 0.0 }, Method::Ddim { eta: 0.3 }] {
        for spacing in Spacing::ALL {
            let sampler = Sampler::new(&s, method, spacing, 20).unwrap();
            let mut x = slice(&noise, 0).to_vec();
            for (k, step) in sampler.steps().iter().enumerate() {
                let (signal, rest) = s.q_sample_coefficients(step.t as usize);
                let eps: Vec<f64> = x.iter().zip(&x_0).map(|(x, x_0)| (x - signal * x_0) / rest).collect();
                x = sample_step::reference::forward(&x, &eps, slice(&noise, k), step);
            }
            agrees(&format!("{method:?} {spacing}"), &x, &x_0);
        }
    }
}

/// The reverse loop in f32 on the device against the reference in f64 with the same noise. The budget is that of
/// [`close`]: twice the error of the reference in f32, plus one rounding.
#[test]
fn the_loop_in_f32_follows_the_reference() {
    let device = Device::cpu_guarded();
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let shape = Shape::new(2, 5, 3, 3);
    let samples = Samples { seed: 5, first: 7 };
    for method in [Method::Ancestral(Variance::FixedSmall), Method::Ddim { eta: 0.5 }] {
        let sampler = Sampler::new(&s, method, Spacing::Even, 10).unwrap();
        let mut states: Vec<f32> = Vec::new();
        let net = |x: &Tensor, t: f32| {
            Ok(Tensor::from_slice(&device, x.shape(), &network(x.data(), t as u32, 1000)).unwrap())
        };
        let last = sample(&device, &sampler, shape, samples, net, |p| {
            states.extend_from_slice(p.x.data());
            Ok(())
        });
        same_bits("the last state", last.unwrap().data(), &states[9 * shape.len()..]);
        let oracle = reverse::<f64>(&sampler, shape, samples);
        let yardstick = reverse::<f32>(&sampler, shape, samples);
        println!("{method:?}: {:.2} of the budget", close("states", &states, &oracle, &yardstick));
    }
}

fn reverse<T: Float + num_traits::FloatConst>(sampler: &Sampler, shape: Shape, samples: Samples) -> Vec<T> {
    let image = shape.len() / shape.n;
    let all = |streams: rng::Streams| -> Vec<T> {
        (0..shape.n).flat_map(|i| rng::reference::normals(&streams.image(i), 0, image)).collect()
    };
    let steps = sampler.steps();
    let noise: Vec<Vec<T>> = steps.iter().rev().map(|step| all(samples.noise(step.t))).collect();
    trajectory(sampler, 1000, &all(samples.start()), |i| &noise[i])
}

#[test]
fn a_sample_does_not_depend_on_its_batch_and_progress_is_told() {
    let device = Device::cpu_guarded();
    let s = Schedule::new(Kind::Linear, 100).unwrap();
    let sampler = Sampler::new(&s, Method::Ancestral(Variance::FixedLarge), Spacing::Even, 12).unwrap();
    let net =
        |x: &Tensor, t: f32| Ok(Tensor::from_slice(&device, x.shape(), &network(x.data(), t as u32, 100)).unwrap());
    let draw = |n: usize, first: u32| {
        let mut told = Vec::new();
        let x = sample(&device, &sampler, Shape::new(n, 4, 7, 3), Samples { seed: 1, first }, net, |p| {
            told.push((p.done, p.total, p.t));
            Ok(())
        });
        let steps = sampler.steps().iter().enumerate();
        assert_eq!(told, steps.map(|(i, step)| (i + 1, 12, step.t)).collect::<Vec<_>>());
        x.unwrap()
    };
    let together = draw(5, 10);
    for i in 0..5 {
        same_bits("alone and together", draw(1, 10 + i as u32).data(), &together.data()[i * 84..(i + 1) * 84]);
    }
    assert!(together.data()[..84] != together.data()[84..168], "two samples are the same");
    assert!(together.data().iter().all(|x| x.abs() <= 1.0), "x_0 is clipped");
    let stop = sample(&device, &sampler, Shape::new(1, 4, 7, 3), Samples { seed: 1, first: 0 }, net, |p| {
        if p.done == 3 { Err(ddpm_cuda::error::Error::Failed("enough".into())) } else { Ok(()) }
    });
    assert_eq!(stop.unwrap_err().to_string(), "enough");
}

/// Each conversion undoes the prediction's definition, at every timestep where it has one.
#[test]
fn predictions_are_converted() {
    let linear = Schedule::new(Kind::Linear, 1000).unwrap();
    let cosine = Schedule::new(Kind::Cosine, 1000).unwrap();
    let zero = linear.with_zero_terminal_snr();
    let (x_0, eps) = (0.3, -1.2);
    for s in [&linear, &cosine, &zero] {
        for t in 0..1000 {
            let (signal, noise) = s.q_sample_coefficients(t);
            let x_t = signal * x_0 + noise * eps;
            for prediction in Prediction::ALL {
                if signal == 0.0 && prediction == Prediction::Eps {
                    continue;
                }
                let (of_x_0, of_eps) = prediction.target(s, t);
                let y = of_x_0 * x_0 + of_eps * eps;
                // What a factor multiplies is rounded to 1e-16, and the factors' own rounding is of that size too.
                for (mix, want) in [(prediction.x_0(s, t), x_0), (prediction.eps(s, t), eps)] {
                    let got = mix.xt * x_t + mix.output * y;
                    let size = (mix.xt * x_t).abs() + (mix.output * y).abs();
                    assert!((got - want).abs() <= 1e-11 * size.max(1.0), "{prediction} at {t}: {got} for {want}");
                }
            }
        }
    }
    // Computed in float64 by hand from the definitions.
    let at = |prediction: Prediction| {
        let (of_x_0, of_eps) = prediction.target(&linear, 500);
        of_x_0 * x_0 + of_eps * eps
    };
    near("v", at(Prediction::V), -0.622798885, 9);
    near("mu", at(Prediction::Mu), -1.061482767, 9);
}

#[test]
fn zero_terminal_snr() {
    let linear = Schedule::new(Kind::Linear, 1000).unwrap().with_zero_terminal_snr();
    assert!(linear.has_zero_terminal_snr());
    near("beta_1", linear.betas()[1], 1.206866355e-4, 9);
    near("beta_500", linear.betas()[500], 0.0102926174, 9);
    near("beta_998", linear.betas()[998], 0.7522672312, 9);
    assert_eq!(linear.betas()[999], 1.0);
    near("alpha_bar_500", linear.alpha_bar(500), 0.0752462157, 9);
    near("alpha_bar_998", linear.alpha_bar(998), 4.2132625e-9, 8);
    let cosine = Schedule::new(Kind::Cosine, 1000).unwrap().with_zero_terminal_snr();
    near("beta_998 of cosine", cosine.betas()[998], 0.7579675808, 9);
    near("alpha_bar_998 of cosine", cosine.alpha_bar(998), 2.2778115e-6, 8);
    // The betas alone say the same.
    assert_eq!(Schedule::from_betas(linear.betas().to_vec()).unwrap().alpha_bar(999), 0.0);
}

/// The fixture's network with its second half of channels, of images of one channel: the prediction and v by turns.
fn doubled_network(x: &[f64], t: u32, timesteps: usize) -> Vec<f64> {
    let y = network(x, t, timesteps);
    x.iter().zip(y).flat_map(|(x, y)| [y, 0.6 * (2.0 * x).cos()]).collect()
}

#[test]
fn the_bound_is_openais() {
    let (s, x_0, noise) = (short(), golden("x0"), golden("noise"));
    let image = IMAGES / 2;
    for prediction in [Prediction::Eps, Prediction::X0, Prediction::Mu] {
        for variance in of_openai() {
            let objective = Objective::new(Loss::Vlb, prediction, variance, &s);
            let (mut terms, mut mse) = (Vec::new(), Vec::new());
            for t in 0..20u32 {
                let eps = slice(&noise, t as usize);
                let x_t = q_sample::reference::forward(&x_0, eps, t as usize, &s);
                let output = if variance.is_learned() { doubled_network(&x_t, t, 20) } else { network(&x_t, t, 20) };
                let all =
                    loss::reference::elements(&objective, t, [&x_0, eps, &output], 1, &|x_0| x_0.clamp(-1.0, 1.0));
                for of_image in all.chunks(image) {
                    let mean = |f: &dyn Fn(&loss::reference::Element<f64>) -> f64| {
                        of_image.iter().map(f).sum::<f64>() / image as f64
                    };
                    terms.push(mean(&|e| e.nats) / std::f64::consts::LN_2);
                    mse.push(mean(&|e| e.x_0_square));
                }
            }
            let key = format!("bpd.{prediction}.{variance}");
            agrees(&key, &terms, &golden(&format!("{key}.terms")));
            agrees(&format!("{key}, x_0"), &mse, &golden(&format!("{key}.xstart_mse")));
        }
    }
    let objective = Objective::new(Loss::Vlb, Prediction::Eps, Variance::FixedSmall, &s);
    let bytes: Vec<u8> = x_0.iter().map(|x| ((x + 1.0) * 127.5).round() as u8).collect();
    let prior: Vec<f64> = bytes.chunks(image).map(|image| objective.prior(image)).collect();
    agrees("bpd.prior", &prior, &golden("bpd.prior"));
}

/// The decoder's values, computed independently in f64, with the log variance of the paper's schedule at t = 0.
#[test]
fn the_decoder_has_its_known_values() {
    let log_p = Schedule::new(Kind::Linear, 1000).unwrap().log_variance(Variance::FixedSmall, 0);
    let x = 128.0 / 127.5 - 1.0;
    for (x_0, mean, nats) in [
        (x, x, 0.905018114),
        (x, x + 0.01, 1.739377596),
        (x, x + 0.2, 27.631021116),
        (1.0, 1.0, 0.353441209),
        (-1.0, -1.0, 0.353441209),
        (1.0, 0.99, 1.583140739),
    ] {
        near("the decoder", loss::reference::decoder(x_0, mean, log_p).0, nats, 9);
    }
}

fn row(loss: Loss, prediction: Prediction, variance: Variance, t: u32) -> ddpm_cuda::diffusion::objective::Row {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    Objective::new(loss, prediction, variance, &s).row(t).expect("every timestep is kept")
}

#[test]
fn min_snr_weighs_x_0_alike_whatever_is_predicted() {
    let weight = |prediction, t| row(Loss::MinSnr, prediction, Variance::FixedSmall, t).squared;
    for (t, snr, eps, x0, v) in [
        (0, 9999.0, 5.0005e-4, 5.0, 5.0000e-4),
        (100, 8.536669577, 0.5857085, 5.0, 0.5242920),
        (250, 1.089528, 1.0, 1.089528, 0.5214230),
        (500, 0.08435954955, 1.0, 0.08435955, 0.07779666),
        (999, 4.03599e-5, 1.0, 4.03599e-5, 4.03583e-5),
    ] {
        near("snr", row(Loss::Simple, Prediction::Eps, Variance::FixedSmall, t).snr, snr, 6);
        near("eps", weight(Prediction::Eps, t), eps, 5);
        near("x0", weight(Prediction::X0, t), x0, 5);
        near("v", weight(Prediction::V, t), v, 5);
    }
    near("mu at 1", weight(Prediction::Mu, 1), 16.81561, 7);
    near("mu at 999", weight(Prediction::Mu, 999), 2449.901, 7);
}

/// The weights of equation 12 on the error of eps. With the small variance they are `(SNR_{t-1} / SNR_t - 1) / 2`.
#[test]
fn weighted_is_equation_12() {
    let weight = |variance, t| row(Loss::Weighted, Prediction::Eps, variance, t).squared;
    for (t, small, large) in [
        (1, 0.5996715122, 0.2726920843),
        (2, 0.3179953517, 0.1944019765),
        (10, 0.0789765416, 0.0682239890),
        (100, 0.0101783834, 0.0099962302),
        (500, 0.0055144620, 0.0055097345),
        (999, 0.0102045019, 0.0102044935),
    ] {
        near("fixed_small", weight(Variance::FixedSmall, t), small, 8);
        near("fixed_large", weight(Variance::FixedLarge, t), large, 8);
    }
    near("at t = 0", weight(Variance::FixedSmall, 0), 0.9169866068, 10);
    let snr = |t| row(Loss::Simple, Prediction::Eps, Variance::FixedSmall, t).snr;
    for t in 1..1000 {
        let want = 0.5 * (snr(t - 1) / snr(t) - 1.0);
        let got = weight(Variance::FixedSmall, t);
        assert!((got - want).abs() <= 1e-11 * want, "at {t}: {got}, expected {want}");
        // The same loss whatever is predicted.
        for prediction in Prediction::ALL {
            let other = row(Loss::Weighted, prediction, Variance::FixedSmall, t);
            let of_x_0 = other.squared / (other.x_0_error * other.x_0_error);
            let want = got / (row(Loss::Weighted, Prediction::Eps, Variance::FixedSmall, t).x_0_error).powi(2);
            assert!((of_x_0 - want).abs() <= 1e-11 * want, "{prediction} at {t}: {of_x_0}, expected {want}");
        }
    }
}

/// Every pixel is N(m, s^2), and the network knows it: its output, exact in expectation at any x_t, for every
/// prediction. Expectations of what is quadratic in x_0 and eps are means over the four points m +- s, +-1.
struct Toy {
    schedule: Schedule,
    objective: Objective,
}

const TOY_MEAN: f64 = 0.1;
const TOY_DEVIATION: f64 = 0.5;

impl Toy {
    fn new(prediction: Prediction, variance: Variance) -> Self {
        Toy::on(Schedule::new(Kind::Linear, 1000).unwrap(), prediction, variance)
    }

    fn on(schedule: Schedule, prediction: Prediction, variance: Variance) -> Self {
        Toy { objective: Objective::new(Loss::Vlb, prediction, variance, &schedule), schedule }
    }

    /// The variance of x_t where alpha_bar is `a`.
    fn variance_at(a: f64) -> f64 {
        a * TOY_DEVIATION.powi(2) + 1.0 - a
    }

    /// The elements at timestep `t`, with `v` in the output's second half.
    fn elements(&self, t: u32, v: f64) -> Vec<loss::reference::Element<f64>> {
        let [x_0, eps, output] = self.made(t, v);
        loss::reference::elements(&self.objective, t, [&x_0, &eps, &output], 1, &|x_0| x_0)
    }

    /// The four points x_0 and eps at timestep `t`, and the network's output for them.
    fn made(&self, t: u32, v: f64) -> [Vec<f64>; 3] {
        let a = self.schedule.alpha_bar(t as usize);
        let (signal, noise) = self.schedule.q_sample_coefficients(t as usize);
        let (prediction, learned) = (self.objective.prediction(), self.objective.variance().is_learned());
        let (of_x_0, of_eps) = prediction.target(&self.schedule, t as usize);
        let (mut x_0, mut eps, mut output) = (Vec::new(), Vec::new(), Vec::new());
        for (sign_x, sign_eps) in [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)] {
            let x = TOY_MEAN + sign_x * TOY_DEVIATION;
            let x_t = signal * x + noise * sign_eps;
            let whitened = (x_t - signal * TOY_MEAN) / Toy::variance_at(a);
            // The prediction is linear in x_0 and eps, and so is its expectation.
            let expected = (TOY_MEAN + signal * TOY_DEVIATION.powi(2) * whitened, noise * whitened);
            output.push(of_x_0 * expected.0 + of_eps * expected.1);
            output.extend(learned.then_some(v));
            x_0.push(x);
            eps.push(sign_eps);
        }
        [x_0, eps, output]
    }

    /// The bound in bits, with the decoder's bins and L_T, of a variance that is fixed, and its derivatives by gamma of
    /// every timestep. The network stays as it is: since it is the best, its own change would change nothing.
    fn bound(&self) -> (f64, Vec<f64>) {
        let steps = self.schedule.len();
        let (mut bound, mut by_gamma) = (0.0, vec![0.0; steps]);
        let weight = 0.25 / std::f64::consts::LN_2; // four points
        for t in 0..steps as u32 {
            let all = self.elements(t, 0.0);
            bound += weight * all.iter().map(|e| e.nats).sum::<f64>();
            let (a, (signal, noise)) =
                (self.schedule.alpha_bar(t as usize), self.schedule.q_sample_coefficients(t as usize));
            let (of_x_0, of_eps) = self.objective.prediction().target(&self.schedule, t as usize);
            let by_x_t = (of_x_0 * signal * TOY_DEVIATION.powi(2) + of_eps * noise) / Toy::variance_at(a);
            let dx: Vec<f64> = all.iter().map(|e| weight * e.gradient[1] * by_x_t).collect();
            let [x_0, eps, output] = self.made(t, 0.0);
            let sums = loss::reference::of_schedule(&self.objective, t, [&x_0, &eps, &output, &dx], 1);
            for (place, slope) in (i64::from(t) - 1..).zip(slope(&self.objective, t, &sums, weight)) {
                if let Some(sum) = by_gamma.get_mut(place as usize) {
                    *sum += slope;
                }
            }
        }
        let (a, mean_square) = (self.schedule.alpha_bar(steps - 1), TOY_MEAN.powi(2) + TOY_DEVIATION.powi(2));
        bound += 0.5 * (a * mean_square - a - (-a).ln_1p()) / std::f64::consts::LN_2;
        by_gamma[steps - 1] += slope_of_prior(&self.schedule, mean_square);
        (bound, by_gamma)
    }

    fn mean(&self, t: u32, v: f64, f: impl Fn(&loss::reference::Element<f64>) -> f64) -> f64 {
        self.elements(t, v).iter().map(f).sum::<f64>() / 4.0
    }

    /// The variance of p that is exact.
    fn exact_variance(&self, t: usize) -> f64 {
        let (a, before) = (self.schedule.alpha_bar(t), self.schedule.alpha_bar_before(t));
        self.schedule.betas()[t] * Toy::variance_at(before) / Toy::variance_at(a)
    }
}

/// Sums and errors computed independently in f64. With the exact variance, the bound is the entropy of the data but for
/// the divergence of q(x_T) from N(0, 1): an identity, here with a density as decoder in place of bins.
#[test]
fn the_bound_of_a_gaussian_is_its_entropy() {
    for prediction in Prediction::ALL {
        let exact = Toy::new(prediction, Variance::Learned);
        let sum: f64 = (1..1000).map(|t| exact.mean(t, exact.exact_variance(t as usize).ln(), |e| e.nats)).sum();
        let fixed = Toy::new(prediction, Variance::FixedSmall);
        let fixed: f64 = (1..1000).map(|t| fixed.mean(t, 0.0, |e| e.nats)).sum();
        assert!((sum - 3.9121679380).abs() < 1e-9, "{prediction}: {sum}");
        assert!((fixed - 4.3685163512).abs() < 1e-9, "{prediction}, fixed_small: {fixed}");
        // L_0 as a density: the mean of -ln N(x_0; mean, variance).
        let variance = exact.exact_variance(0);
        let square = exact.mean(0, 0.0, |e| e.x_0_square);
        let first = 0.5 * ((2.0 * std::f64::consts::PI * variance).ln() + square / variance);
        let a = exact.schedule.alpha_bar(999);
        let x_0_square = TOY_MEAN.powi(2) + TOY_DEVIATION.powi(2);
        let prior = 0.5 * (a * x_0_square - a - (-a).ln_1p());
        let entropy = 0.5 * (2.0 * std::f64::consts::PI * std::f64::consts::E * TOY_DEVIATION.powi(2)).ln();
        let at_the_end = {
            let (mean, variance) = (a.sqrt() * TOY_MEAN, Toy::variance_at(a));
            0.5 * (mean * mean + variance - 1.0 - variance.ln())
        };
        let (bound, want) = (sum + first + prior, entropy + at_the_end);
        assert!((bound - want).abs() < 1e-10, "{prediction}: {bound}, expected {want}");
    }
    let toy = Toy::new(Prediction::Eps, Variance::FixedSmall);
    for (t, eps, x_0) in [
        (0, 0.99960012, 9.9970e-5),
        (100, 0.68093600, 0.07976600),
        (500, 0.02065429, 0.24483643),
        (999, 1.0090e-5, 0.24999748),
    ] {
        near("error of eps", toy.mean(t, 0.0, |e| e.square), eps, 5);
        near("error of x_0", toy.mean(t, 0.0, |e| e.x_0_square), x_0, 5);
    }
}

/// A learned schedule has a lower bound than those that are given, of a chain so short that its shape matters.
/// Independently computed: 8.6769 bits at the start, 7.2616 after as many steps, 8.1181 with the cosine schedule,
/// 8.1096 with the linear one.
#[test]
fn a_learned_schedule_lowers_the_bound() {
    const STEPS: usize = 25;
    let bound = |schedule| Toy::on(schedule, Prediction::Eps, Variance::FixedLarge).bound();
    let mut curve = Curve::new(STEPS);
    let (start, _) = bound(curve.schedule());
    for step in 1..=300 {
        let (_, by_gamma) = bound(curve.schedule());
        let by_theta: Vec<f32> = gradient(&curve.theta(), &by_gamma).into_iter().map(|g| g as f32).collect();
        let (beta1, beta2, eps, learning_rate) = (0.9, 0.999, 1e-8, 0.03);
        let update = Update { step, learning_rate, beta1, beta2, eps, weight_decay: 0.0, ema_decay: 0.9 };
        curve.change(|state| adam::reference::update(state, &by_theta, &update, 1.0));
    }
    let end = bound(curve.schedule()).0;
    near("at the start", start, 8.6769, 5);
    near("learned", end, 7.2616, 4);
    assert!((bound(curve.average()).0 - end).abs() < 0.01, "the average is another schedule");
    for (kind, want) in [(Kind::Cosine, 8.11814), (Kind::Linear, 8.10959)] {
        near(kind.name(), bound(Schedule::new(kind, STEPS).unwrap()).0, want, 5);
    }
}

/// gamma rises between the ends whatever the parameters are, and a schedule keeps the digits of small noise.
#[test]
fn a_curve_rises_and_keeps_its_digits() {
    for steps in [2, 3, 33, 34, 1000, 4000] {
        let mut theta = Curve::new(steps).theta();
        assert_eq!(theta.len(), 2 + (steps - 1).min(32));
        for (k, logit) in theta[2..].iter_mut().enumerate() {
            *logit = if k % 3 == 0 { 20.0 } else { -20.0 };
        }
        let gammas = learned::gammas(&theta, steps);
        assert!(gammas.is_sorted_by(|a, b| a < b), "{steps}: {gammas:?}");
        assert!((gammas[0], gammas[steps - 1]) == (theta[0], theta[1]), "{steps}: ends of {gammas:?}");
        let schedule = learned::schedule(&theta, steps);
        for (t, gamma) in gammas.iter().enumerate() {
            // Roundings of the product of t factors, and of a sum of up to 32 shares of the rise.
            let got = ((1.0 - schedule.alpha_bar(t)) / schedule.alpha_bar(t)).ln();
            let product = (t + 4) as f64 / (1.0 - schedule.alpha_bar(t)).min(schedule.alpha_bar(t));
            let budget = f64::EPSILON * (product + 32.0 * (theta[1] - theta[0]));
            assert!((got - gamma).abs() <= budget, "{steps} at {t}: {got}, expected {gamma} +- {budget:e}");
        }
    }
    // The published curve's ends, and betas with all their digits.
    let schedule = Schedule::new(Kind::Learned, 1000).unwrap();
    near("beta at 0", schedule.betas()[0], 1.67449041e-6, 7);
    near("beta at 1", schedule.betas()[1], 3.09565e-8, 5);
    near("beta at 999", schedule.betas()[999], 0.0180300721, 6);
    near("alpha_bar at the end", schedule.alpha_bar(999), 0.0066928509, 6);
}

/// A state that no training has is refused.
#[test]
fn damaged_curves_are_refused() {
    let curve = Curve::new(50);
    let with = |change: &dyn Fn(&mut [Vec<f32>; 4])| {
        let mut state = curve.state().map(<[f32]>::to_vec);
        change(&mut state);
        let mut read = Curve::new(50);
        let result = read.set_state(state.each_ref().map(Vec::as_slice));
        (result, read)
    };
    let (read, same) = with(&|_| {});
    assert_eq!((read, same), (Ok(()), curve.clone()));
    for (part, number, value, want) in [
        (0, 4, f32::NAN, "holds NaN; only finite numbers make a schedule"),
        (3, 0, f32::INFINITY, "holds inf; only finite"),
        (0, 1, -13.0, "does not rise between -30 and 30"),
        (1, 0, -31.0, "does not rise between -30 and 30"),
    ] {
        let (result, unchanged) = with(&|state| state[part][number] = value);
        let sentence = result.unwrap_err();
        assert!(sentence.contains(want), "{sentence}");
        assert_eq!(unchanged, curve);
    }
}

/// Where the expected gradient of the variance half vanishes, the variance is exact.
#[test]
fn the_variance_half_is_drawn_to_the_exact_variance() {
    let toy = Toy::new(Prediction::Eps, Variance::LearnedRange);
    for (t, fraction) in [(1, 0.99954374), (100, 0.76234044), (500, 0.26557435), (999, 0.25000764)] {
        let (small, large) = (toy.schedule.posterior_variance(t).ln(), toy.schedule.betas()[t].ln());
        let exact = (toy.exact_variance(t).ln() - small) / (large - small);
        near("the exact place", exact, fraction, 8);
        let slope = |fraction: f64| toy.mean(t as u32, 2.0 * fraction - 1.0, |e| e.gradient[2]);
        let scale = slope(exact + 0.1).abs();
        // The slope is made of exponentials of logarithms of order 10 and of a difference of means that is a hundredth
        // of them; the place is a share of large - small.
        let allowed = 1000.0 * f64::EPSILON / (large - small) * scale;
        assert!(slope(exact).abs() <= allowed, "at {t} the gradient is {:e} of {scale:e}", slope(exact));
        assert!(slope(exact + 0.1) > 0.0 && slope(exact - 0.1) < 0.0, "at {t} the bound is least there");
    }
}

/// A chain of fewer timesteps has the betas of IDDPM's equation 19; the network's mean is still that of its own chain.
#[test]
fn kept_chains_have_their_own_bound() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let kept = Spacing::Even.timesteps(1000, 10).unwrap();
    for prediction in Prediction::ALL {
        let objective = Objective::new(Loss::Vlb, prediction, Variance::FixedLarge, &s).over(&kept);
        assert_eq!(objective.row(1), None, "a timestep that is left out has no row");
        let chain = s.keep(&kept);
        for (i, &t) in kept.iter().enumerate() {
            let row = objective.row(t).expect("kept");
            // A network that is off by d in x_0.
            let x_0 = 0.25;
            let (signal, noise) = s.q_sample_coefficients(t as usize);
            let mix = prediction.x_0(&s, t as usize);
            let x_t = signal * x_0 + noise * -0.7;
            let output = (x_0 + 0.01 - mix.xt * x_t) / mix.output;
            let [element] = loss::reference::elements(&objective, t, [&[x_0], &[-0.7], &[output]], 1, &|x_0| x_0)[..]
            else {
                panic!("one element")
            };
            assert!((element.x_0_square - 1e-4).abs() < 1e-9, "{prediction} at {t}: {}", element.x_0_square);
            if i > 0 {
                let c_x0 = chain.posterior_mean_coefficients(i).0;
                let (q, p) = (chain.posterior_variance(i), chain.betas()[i]);
                let want = 0.5 * ((p / q).ln() - 1.0 + q / p + (c_x0 * 0.01).powi(2) / p);
                // The terms of the divergence cancel to as little as 1e-8.
                assert!((element.nats - want).abs() < 1e-9 * want + 1e-14, "{prediction} at {t}: {}", element.nats);
                assert_eq!(row.half_bin, 0.0);
            } else {
                assert!(row.half_bin > 0.0, "the first of the chain has the decoder");
            }
        }
    }
}

#[test]
fn objectives_that_cannot_work_are_refused() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let zero = s.with_zero_terminal_snr();
    let of = |loss, variance, s: &Schedule| Objective::new(loss, Prediction::V, variance, s);
    for loss in [Loss::Simple, Loss::MinSnr, Loss::Weighted] {
        for variance in [Variance::Learned, Variance::LearnedRange] {
            let error = of(loss, variance, &s).check().expect_err("nothing trains the variance");
            assert!(error.to_string().contains("would stay untrained"), "{error}");
        }
        of(loss, Variance::FixedSmall, &s).check().unwrap();
    }
    let refused = [
        ("trains the variance alone", of(Loss::Hybrid, Variance::FixedLarge, &s)),
        ("vlb_weight = 0 must", of(Loss::Hybrid, Variance::Learned, &s).with_weights(0.0, 5.0)),
        ("min_snr_gamma = -1 must", of(Loss::MinSnr, Variance::FixedLarge, &s).with_weights(0.001, -1.0)),
        ("has weight 0 and stays untrained; loss = simple", of(Loss::MinSnr, Variance::FixedLarge, &zero)),
        ("has next to no weight and stays untrained; loss = simple", of(Loss::Vlb, Variance::FixedSmall, &zero)),
        ("has next to no weight and stays untrained; loss = hybrid", of(Loss::Vlb, Variance::Learned, &zero)),
        ("has next to no weight and stays untrained", of(Loss::Weighted, Variance::FixedLarge, &zero)),
        (
            "prediction = mu: with zero terminal SNR",
            Objective::new(Loss::Simple, Prediction::Mu, Variance::FixedLarge, &zero),
        ),
    ];
    for (words, objective) in refused {
        let error = objective.check().expect_err(words);
        assert!(error.to_string().contains(words), "`{error}` does not say `{words}`");
    }
    for loss in [Loss::Vlb, Loss::Hybrid] {
        of(loss, Variance::LearnedRange, &s).check().unwrap();
    }
    of(Loss::Simple, Variance::FixedLarge, &zero).check().unwrap();
    of(Loss::Hybrid, Variance::LearnedRange, &zero).check().unwrap();
    // Why: the weight of x_0's error at the last timestep, beside that at the first which predicts from much noise.
    for prediction in [Prediction::V, Prediction::X0] {
        let row = Objective::new(Loss::Weighted, prediction, Variance::FixedSmall, &zero).row(999).unwrap();
        assert!(row.squared / row.x_0_error.powi(2) < 1e-8, "{prediction}: {row:?}");
    }
}

/// The strata of one u: one image in each, together they cover the chain; micro-batches draw what the whole batch does.
#[test]
fn stratified_timesteps_cover_the_chain() {
    let mut counts = [0u32; 1000];
    for step in 0..2000 {
        let whole = Batch::train(3, step, 0, (0..64).collect(), true, 1000).stratified(64);
        let t = whole.t();
        let piece = Batch::train(3, step, 16, (0..16).collect(), true, 1000).stratified(64);
        assert_eq!(piece.t(), t[16..32]);
        let mut sorted = t.clone();
        sorted.sort_unstable();
        // Neighbours are 1000/64 = 15.6 apart.
        assert!(sorted.windows(2).all(|w| (15..=16).contains(&(w[1] - w[0]))), "{sorted:?}");
        t.iter().for_each(|&t| counts[t as usize] += 1);
    }
    // Over all u every timestep is equally likely: 128 of 128,000 expected; a step gives a timestep 0 or 1 of the 64.
    // The count is binomial: 2000 times with probability 0.064, deviation 10.9.
    let worst = counts.iter().map(|&count| (f64::from(count) - 128.0).abs()).fold(0.0, f64::max);
    assert!(worst <= 5.0 * 10.95, "a timestep is {worst} from 128");
}

#[test]
fn labels_are_dropped_by_their_own_stream() {
    let n = 20_000;
    let labels: Vec<u32> = (0..n as u32).map(|i| i % 10).collect();
    let batch = Batch::train(3, 9, 0, (0..n).collect(), true, 1000).with_labels(Some(labels.clone()));
    assert_eq!(batch.clone().dropping(0.0, 10).labels(), Some(labels.clone()));
    let dropped = batch.dropping(0.1, 10);
    let seen = dropped.labels().unwrap();
    let null = seen.iter().filter(|&&label| label == 10).count() as f64;
    // Five deviations of sqrt(n p (1 - p)).
    assert!((null - 2000.0).abs() <= 5.0 * 1800f64.sqrt(), "{null} dropped");
    assert!(seen.iter().zip(&labels).all(|(seen, label)| seen == label || *seen == 10));
    let piece = Batch::train(3, 9, 700, (700..800).collect(), true, 1000);
    let piece = piece.with_labels(Some(labels[700..800].to_vec())).dropping(0.1, 10);
    assert_eq!(piece.labels().unwrap(), seen[700..800]);
}

/// The last losses of four timesteps, and what follows: the figures of the definition, an expectation that is exact.
#[test]
fn importance_sampling_is_unbiased() {
    let mut importance = Importance::new(4, 4);
    let batch = || Batch::train(3, 9, 0, (0..4).collect(), true, 4);
    for step in 0..=10 {
        // Losses of long ago do not count.
        importance.begin(0);
        assert!(
            !importance.is_warm(),
            "ten losses of each timestep are known at step 11, which leaves the last one out"
        );
        assert_eq!(importance.draw(batch()), batch().weighted(vec![1.0; 4]), "uniform, with weights");
        let loss = |t: u32| if step < 1 { 100.0 } else { t as f32 + 1.0 };
        importance.record((0..4).map(|t| (t, loss(t))).collect());
    }
    importance.begin(0);
    assert!(importance.is_warm(), "with the losses of steps 0 to 9");
    importance.record((0..4).map(|t| (t, t as f32 + 1.0)).collect());
    importance.begin(0);
    for (t, (p, weight)) in
        [(0.10015, 2.49625562), (0.20005, 1.24968758), (0.29995, 0.83347225), (0.39985, 0.62523446)].iter().enumerate()
    {
        let got = (importance.probability(t as u32), importance.weight(t as u32));
        // Probabilities are multiples of 2^-32.
        assert!((got.0 - p).abs() <= 2.4e-10 && (got.1 - weight).abs() <= 2e-8, "{t}: {got:?}");
    }
    let expectation = |f: &dyn Fn(u32) -> f64| (0..4).map(|t| importance.probability(t) * f(t)).sum::<f64>();
    let mean = expectation(&|t| importance.weight(t) * (f64::from(t) + 1.0));
    assert!((mean - 2.5).abs() <= 16.0 * f64::EPSILON, "{mean}");
    let second = expectation(&|t| (importance.weight(t) * (f64::from(t) + 1.0)).powi(2));
    assert!((second - mean * mean - 1.886e-6).abs() <= 1e-9, "variance {}", second - mean * mean);

    // What is drawn has these probabilities and weights: 40,000 images in five deviations.
    let n = 40_000;
    let drawn = importance.draw(Batch::train(3, 9, 0, (0..n).collect(), true, 4));
    let (t, weights) = (drawn.t(), drawn.weights.clone().unwrap());
    for timestep in 0..4 {
        let p = importance.probability(timestep);
        let count = t.iter().filter(|&&t| t == timestep).count() as f64;
        let deviation = (n as f64 * p * (1.0 - p)).sqrt();
        assert!((count - n as f64 * p).abs() <= 5.0 * deviation, "{timestep}: {count}");
    }
    assert!(t.iter().zip(&weights).all(|(&t, &weight)| weight == importance.weight(t) as f32));
    let piece = importance.draw(Batch::train(3, 9, 700, (700..800).collect(), true, 4));
    assert_eq!((&piece.t()[..], &piece.weights.unwrap()[..]), (&t[700..800], &weights[700..800]));

    // A device that does not know the losses of the last step yet uses the same.
    let (mut known, mut unknown) = (importance.clone(), importance.clone());
    known.record(vec![(1, 7.0); 4]);
    known.begin(0);
    unknown.begin(1);
    assert_eq!(known.probability(1), unknown.probability(1));
    unknown.record(vec![(1, 7.0); 4]);
    assert_eq!(known, unknown);

    // The state goes through numbers, with the losses that are not used yet.
    importance.record(vec![(3, 0.5); 4]);
    let numbers = importance.to_numbers();
    let mut again = Importance::new(4, 4);
    again.set_numbers(std::array::from_fn(|k| &numbers[k][..])).unwrap();
    importance.begin(0);
    again.begin(0);
    assert_eq!(again, importance);
    let mut wrong = numbers.clone();
    wrong[2][7] = 4.0;
    let refused = again.set_numbers(std::array::from_fn(|k| &wrong[k][..])).unwrap_err();
    assert!(refused.contains("timesteps that are not among 4"), "{refused}");
    wrong[1][0] = 11.0;
    assert!(again.set_numbers(std::array::from_fn(|k| &wrong[k][..])).unwrap_err().contains("from 0 to 10"));
}
