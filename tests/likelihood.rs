//! The likelihood by the probability-flow ODE on data whose density is known: every pixel N(0.1, 0.5^2), for which the
//! exact network is known too. The numbers were computed once in float64 with another solver.

mod support;

use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::prediction::Mix;
use ddpm_cuda::diffusion::{Kind, Prediction, Schedule};
use ddpm_cuda::likelihood::{Answer, From, Level, Levels, Likelihood, Model, Options, Query, bits_per_dim, integrate};
use ddpm_cuda::params::Params;
use ddpm_cuda::rng::{Purpose, Stream};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::unet::UNet;

use support::gpu;

const MEAN: f64 = 0.1;
const STANDARD_DEVIATION: f64 = 0.5;

/// eps* = sqrt(1 - A) (x - sqrt(A) m) / V(A), V(A) = A s^2 + 1 - A, and its product with the probe.
fn exact(query: &Query<'_>) -> Answer {
    let one = |(x, (level, z)): (&Vec<f64>, (&Level, &&[f64]))| {
        let alpha_bar = 1.0 / (1.0 + level.sigma * level.sigma);
        let slope = (1.0 - alpha_bar).sqrt() / (alpha_bar * STANDARD_DEVIATION.powi(2) + 1.0 - alpha_bar);
        let eps = x.iter().map(|x| slope * (x - alpha_bar.sqrt() * MEAN)).collect();
        (eps, z.iter().map(|z| slope * z).collect())
    };
    query.x.iter().zip(query.levels.iter().zip(query.z)).map(one).collect()
}

fn linear() -> Levels {
    Levels::new(&Schedule::new(Kind::Linear, 1000).unwrap())
}

#[test]
fn the_density_of_a_gaussian() {
    let levels = linear();
    let image = vec![(vec![0.3], vec![1.0])];
    // Errors of some twenty steps, whose signs differ. The prior at T is not exactly that of the data, so the limit
    // differs from the true -0.3057913526.
    for (tolerance, budget) in [(1e-3, 1e-3), (1e-5, 1e-5), (1e-8, 1e-8)] {
        let got = integrate(&levels, From::Image, tolerance, &image, |query| Ok(exact(query))).unwrap()[0];
        assert!((got.log_p - -0.3060583766).abs() <= budget, "{got:?} at {tolerance}");
        println!("tolerance {tolerance}: {got:?}");
        assert!(got.evaluations < 500, "{got:?}");
    }
}

/// From the first timestep on, the image is one of its x_t, and the density is by x_t, not by the flow's y, which is
/// sqrt(1 + sigma_0^2) times as large: without that factor it is -0.3062383314 for one number.
#[test]
fn the_density_of_a_gaussian_from_the_first_timestep() {
    // The flow moves every number by itself: of several they are added.
    for d in [1, 3] {
        let image = vec![(vec![0.3; d], vec![1.0; d])];
        let cut = integrate(&linear(), From::FirstTimestep, 1e-10, &image, |query| Ok(exact(query))).unwrap()[0].log_p;
        // In closed form, since the flow keeps (y - m) / sqrt(s^2 + sigma^2). Some hundred steps of 1e-10.
        let want = d as f64 * -0.3061883289;
        assert!((cut - want).abs() <= 1e-8 * d as f64, "{d}: {cut}, expected {want}");
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch_and_probes_of_a_diagonal_are_exact() {
    let levels = linear();
    let far = |seed: u64| -> (Vec<f64>, Vec<f64>) {
        let sign = |k: u64| if (seed + k).is_multiple_of(2) { 1.0 } else { -1.0 };
        ((0..5).map(|k| 0.3 * (seed as f64) * sign(k) - 0.2).collect(), (0..5).map(sign).collect())
    };
    let images: Vec<_> = (0..4).map(far).collect();
    let solve = |images: &[(Vec<f64>, Vec<f64>)]| {
        integrate(&levels, From::Image, 1e-6, images, |query| Ok(exact(query))).unwrap()
    };
    let together = solve(&images);
    for (k, image) in images.iter().enumerate() {
        assert_eq!(solve(std::slice::from_ref(image))[0], together[k], "image {k}");
        // A diagonal Jacobian: any signs give its trace.
        let other = (image.0.clone(), image.1.iter().map(|z| -z).collect());
        assert_eq!(solve(&[other])[0].log_p, together[k].log_p);
        // log p of independent pixels is a sum.
        let alone = |x: f64| solve(&[(vec![x], vec![1.0])])[0].log_p;
        let sum: f64 = image.0.iter().map(|&x| alone(x)).sum();
        assert!((sum - together[k].log_p).abs() < 5e-5, "{sum} {:?}", together[k]);
    }
}

#[test]
fn a_flow_that_cannot_be_followed_is_an_error() {
    let image = vec![(vec![0.3], vec![1.0])];
    let nowhere = |query: &Query<'_>| Ok(query.x.iter().map(|_| (vec![f64::NAN], vec![0.0])).collect());
    let error = integrate(&linear(), From::Image, 1e-3, &image, nowhere).unwrap_err().to_string();
    assert!(error.contains("the flow of image 0 cannot be followed beyond sigma = 0.0000"), "{error}");
}

#[test]
fn timesteps_are_interpolated_in_the_logarithm_of_sigma() {
    let cosine = Levels::new(&Schedule::new(Kind::Cosine, 1000).unwrap());
    let wanted = [(0.19, 54.31, 111.75), (1.02, 261.86, 501.40), (5.42, 578.80, 881.93), (80.0, 929.62, 990.98)];
    for (sigma, of_linear, of_cosine) in wanted {
        let (a, b) = (linear().at(sigma).t, cosine.at(sigma).t);
        assert!((a - of_linear).abs() < 0.006 && (b - of_cosine).abs() < 0.006, "{sigma}: {a} {b}");
    }
    assert_eq!(linear().at(1e-3).t, 0.0);
    assert_eq!(linear().at(1e9).t, 999.0);
    // Without the last timestep, where nothing is left of the image.
    let zero = Levels::new(&Schedule::new(Kind::Linear, 1000).unwrap().with_zero_terminal_snr());
    assert_eq!(zero.at(1e9).t, 998.0);
}

#[test]
fn bits_of_a_uniform_density_are_eight() {
    // A density of 1/2 on [-1, 1] and a step of 2/255 a byte: log2 255, and 256 half-steps wider.
    assert!((bits_per_dim(3.0 * 0.5f64.ln(), 3) - 255f64.log2()).abs() < 1e-12);
}

/// eps from x_t and the network's output at a level of noise.
fn eps_at(prediction: Prediction, sigma: f64) -> Mix {
    let signal = 1.0 / (1.0 + sigma * sigma).sqrt();
    prediction.at_level(signal, sigma * signal).expect("a prediction other than mu").eps
}

#[test]
fn eps_between_timesteps_is_that_at_timesteps() {
    let schedule = Schedule::new(Kind::Cosine, 100).unwrap();
    for prediction in [Prediction::Eps, Prediction::X0, Prediction::V] {
        for t in 0..100 {
            let sigma = ((1.0 - schedule.alpha_bar(t)) / schedule.alpha_bar(t)).sqrt();
            let (a, b) = (prediction.eps(&schedule, t), eps_at(prediction, sigma));
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs();
            assert!(near(a.xt, b.xt) && near(a.output, b.output), "{prediction} at {t}: {a:?} {b:?}");
        }
    }
}

const SIDE: usize = 4;
const OPTIONS: Options = Options { tolerance: 1e-4, probes: 2, seed: 5, from: From::Image };

/// A network whose last layer is not almost zero, so that its output matters; with a second half of channels if
/// `learned`.
fn network(learned: bool) -> (UNet, Vec<f32>) {
    let mut config = support::tiny(SIDE, SIDE, 2);
    config.model.learned_variance = learned;
    config.model.classes = 3;
    let (unet, specs) = UNet::new(&config.model).unwrap();
    let cpu = Params::init(&Device::cpu(), specs.clone(), 1).unwrap();
    let mut flat = cpu.host().unwrap().into_owned();
    for (p, spec) in specs.iter().filter(|(_, spec)| spec.name.contains("conv_out") || spec.name.contains("conv2")) {
        let numbers = support::numbers(specs.range(p).start as u64, spec.shape.len());
        flat[specs.range(p)].iter_mut().zip(numbers).for_each(|(w, n)| *w = 0.05 * n as f32);
    }
    (unet, flat)
}

/// Two images of the network's shape, and their classes.
fn images() -> (Vec<Vec<u8>>, [u32; 2]) {
    let byte = |i: usize, k: usize| ((37 * k + 101 * i) % 256) as u8;
    ((0..2).map(|i| (0..SIDE * SIDE * 2).map(|k| byte(i, k)).collect()).collect(), [2, 0])
}

/// What the network is and which flow is followed.
#[derive(Clone, Copy, Debug)]
struct Case {
    learned: bool,
    prediction: Prediction,
    from: From,
    zero_snr: bool,
}

impl Case {
    const fn new(learned: bool, prediction: Prediction) -> Self {
        Case { learned, prediction, from: From::Image, zero_snr: false }
    }

    fn schedule(self) -> Schedule {
        let schedule = Schedule::new(Kind::Cosine, 50).unwrap();
        if self.zero_snr { schedule.with_zero_terminal_snr() } else { schedule }
    }
}

fn likelihoods(device: &Device, case: Case) -> Vec<Likelihood> {
    likelihoods_with(device, case, Options { from: case.from, ..OPTIONS })
}

fn likelihoods_with(device: &Device, case: Case, options: Options) -> Vec<Likelihood> {
    let (unet, flat) = network(case.learned);
    let params = Params::from_host(device, UNet::new(unet.model()).unwrap().1, &flat).unwrap();
    let (schedule, prediction) = (case.schedule(), case.prediction);
    let model = Model { device, unet: &unet, params: &params, schedule: &schedule, prediction };
    let (images, labels) = images();
    let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    model.likelihoods(&images, Some(&labels), 7, options).unwrap()
}

/// The same with the probe's product by finite differences of the forward pass, `z . (eps(x + h z) - eps(x - h z)) /
/// 2h`.
fn by_differences(case: Case) -> Vec<Likelihood> {
    let device = Device::cpu();
    let (unet, flat) = network(case.learned);
    let params = Params::from_host(&device, UNet::new(unet.model()).unwrap().1, &flat).unwrap();
    let schedule = case.schedule();
    let (images, labels) = images();
    let draw = |purpose, image: u32, probe| {
        let mut u = vec![0.0; SIDE * SIDE * 2];
        Stream { seed: OPTIONS.seed, purpose, step: probe, stream: 7 + image }.uniforms(&mut u);
        u.into_iter().map(f64::from).collect::<Vec<f64>>()
    };
    let item = |k: u32| {
        let (image, probe) = (k / 2, k % 2);
        let u = draw(Purpose::Dequantise, image, probe);
        let x = images[image as usize].iter().zip(u).map(|(&byte, u)| (f64::from(byte) + u - 0.5) / 127.5 - 1.0);
        let z = draw(Purpose::Probe, image, probe).into_iter().map(|u| if u < 0.5 { -1.0 } else { 1.0 });
        (x.collect(), z.collect())
    };
    let items: Vec<(Vec<f64>, Vec<f64>)> = (0..4).map(item).collect();
    let eps = |x: &[f64], level: Level, label: u32| -> Vec<f64> {
        let input: Vec<f32> = x.iter().map(|&x| x as f32).collect();
        let input = Var::constant(Tensor::from_slice(&device, Shape::new(1, SIDE, SIDE, 2), &input).unwrap());
        let t = Tensor::full(&device, Shape::new(1, 1, 1, 1), level.t as f32).unwrap();
        let labels = Conditioning::from_labels(&device, Some(&[label])).unwrap();
        let y = unet.forward(&mut Tape::inference(&device, &params), &input, &t, &labels, None).unwrap();
        let mix = eps_at(case.prediction, level.sigma);
        let outputs = y.data().chunks(unet.model().out_channels()).flat_map(|pixel| &pixel[..2]);
        x.iter().zip(outputs).map(|(x, &y)| mix.xt * x + mix.output * f64::from(y)).collect()
    };
    integrate(&Levels::new(&schedule), case.from, OPTIONS.tolerance, &items, |query| {
        let one = |k: usize| {
            let (x, z, level) = (&query.x[k], query.z[k], query.levels[k]);
            let label = labels[query.items[k] / 2];
            const H: f64 = 1e-3;
            let moved = |h: f64| -> Vec<f64> { x.iter().zip(z).map(|(x, z)| x + h * z).collect() };
            let (above, below) = (eps(&moved(H), level, label), eps(&moved(-H), level, label));
            // z . (J z), the same number as (z J) . z.
            let product = above.iter().zip(&below).map(|(a, b)| (a - b) / (2.0 * H)).collect();
            (eps(x, level, label), product)
        };
        Ok((0..query.x.len()).map(one).collect())
    })
    .unwrap()
}

/// The third derivative times h^2 (measured: 25 times less for a fifth of h) and rounding over h, 6e-5, of 32 numbers
/// over ten units of ln sigma.
const DIFFERENCES: f64 = 0.05;

#[test]
fn the_tapes_product_is_that_of_finite_differences() {
    let (eps, v) = (Case::new(false, Prediction::Eps), Case::new(false, Prediction::V));
    let x0 = Case { from: From::FirstTimestep, ..Case::new(false, Prediction::X0) };
    let zero = Case { zero_snr: true, ..v };
    for case in [eps, Case { learned: true, ..eps }, v, x0, zero, Case { zero_snr: true, ..x0 }] {
        let (got, want) = (likelihoods(&Device::cpu(), case), by_differences(case));
        for (got, want) in got.iter().zip(&want) {
            println!("{case:?}: {got:?} {want:?}");
            assert!((got.log_p - want.log_p).abs() < DIFFERENCES, "{case:?}");
        }
        let [a, b, c, d] = [0, 1, 2, 3].map(|k| got[k].log_p);
        assert!(a != b && c != d && a != c, "probes and images differ: {got:?}");
    }
}

/// Every probe has noise of its own, which does not depend on how many there are, nor an image's on the others.
#[test]
fn probes_do_not_depend_on_how_many_there_are() {
    let case = Case::new(false, Prediction::Eps);
    let of = |probes: usize| likelihoods_with(&Device::cpu(), case, Options { probes, ..OPTIONS });
    let (one, two, three) = (of(1), of(2), of(3));
    for image in 0..2 {
        let probes = &three[3 * image..][..3];
        assert_eq!((&one[image], &two[2 * image..][..2]), (&probes[0], &probes[..2]), "image {image}");
        let [a, b, c] = [0, 1, 2].map(|k| probes[k].log_p);
        assert!(a != b && b != c && a != c, "image {image}: {probes:?}");
    }
}

#[test]
fn a_gpu_finds_the_cpus_likelihood() {
    let case = Case::new(true, Prediction::V);
    let want = likelihoods(&Device::cpu(), case);
    // A rounding of the network, 2e-5 and 4e-3 of values of order 1, over ten units of ln sigma, in 32 numbers whose
    // signs differ.
    for (dtype, budget) in [(DType::F32, 0.01), (DType::Bf16, 1.0)] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        let got = likelihoods(&Device::Cuda(gpu), case);
        for (got, want) in got.iter().zip(&want) {
            println!("{dtype:?}: {got:?} {want:?}");
            assert!((got.log_p - want.log_p).abs() < budget, "{dtype:?}: {got:?} for {want:?}");
        }
    }
}

#[test]
fn a_network_that_predicts_mu_is_refused() {
    let device = Device::cpu();
    let (unet, flat) = network(false);
    let params = Params::from_host(&device, UNet::new(unet.model()).unwrap().1, &flat).unwrap();
    let schedule = Schedule::new(Kind::Cosine, 50).unwrap();
    let model =
        Model { device: &device, unet: &unet, params: &params, schedule: &schedule, prediction: Prediction::Mu };
    let error = model.likelihoods(&[], None, 0, OPTIONS).unwrap_err().to_string();
    assert!(error.starts_with("prediction = mu: its factors have no meaning between timesteps"), "{error}");
}
