use ddpm_cuda::device::Device;
use ddpm_cuda::device::cuda::DeviceTurn;
use ddpm_cuda::diffusion::sampler::{Before, Corrector, Guidance, Limit, LogVariance, Samples, Step};
use ddpm_cuda::diffusion::{Kind, Method, Prediction, Sampler, Schedule, Spacing, Variance};
use ddpm_cuda::ops::sample_step::reference::Image;
use ddpm_cuda::ops::sample_step::{
    Given, Noise, State, Wanted, advance, correct, diffuse, reference, sample_step, start, turn_of,
};
use ddpm_cuda::rng::reference::normals;
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use num_traits::{Float, FloatConst};

use crate::support::{
    F32_ROUNDING, close, close_but_for, gpu, numbers, plant, same_bits, same_bits_at_any_number_of_threads, to_f32,
};

/// The CPU path draws 256 elements at a time; 4,096 are one task, 1,024 a block of the kernel.
const SHAPES: [Shape; 6] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(3, 5, 3, 2),
    Shape::new(2, 1, 1, 257),
    Shape::new(2, 28, 28, 1),
    Shape::new(2, 37, 41, 3),
    Shape::new(2, 1, 5, 205),
];

const SAMPLES: Samples = Samples { seed: 3, first: 40 };

fn steps() -> Vec<Step> {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let methods =
        [Method::Ancestral(Variance::FixedSmall), Method::Ancestral(Variance::FixedLarge), Method::Ddim { eta: 0.7 }];
    let of = |method| Sampler::new(&schedule, method, Spacing::Even, 5).unwrap().steps().to_vec();
    methods.into_iter().flat_map(of).collect()
}

fn by_reference<T: Float + FloatConst>(x: &[f64], output: &[f64], shape: Shape, step: &Step) -> Vec<T> {
    let cast = |x: &[f64]| x.iter().map(|&x| T::from(x).unwrap()).collect::<Vec<T>>();
    let streams = SAMPLES.noise(step.t);
    let z: Vec<T> = (0..shape.n).flat_map(|i| normals(&streams.image(i), 0, shape.len() / shape.n)).collect();
    reference::forward(&cast(x), &cast(output), &z, step)
}

/// All shapes are one case for the yardstick: on a single element the largest error of the f32 reference says little.
#[test]
fn cpu_follows_the_reference() {
    let device = Device::cpu_guarded();
    for step in steps() {
        for limit in [Limit::Range(1.0), Limit::None] {
            let step = Step { limit, ..step };
            let (mut got, mut oracle, mut yardstick) = (Vec::new(), Vec::new(), Vec::new());
            for shape in SHAPES {
                // Some are beyond [-1, 1], so that clipping happens at every noise level.
                let x: Vec<f64> = numbers(1, shape.len()).iter().map(|x| 2.0 * x).collect();
                let output = numbers(2, shape.len());
                let [x_t, y] = [&x, &output].map(|x| Tensor::from_slice(&device, shape, &to_f32(x)).unwrap());
                got.extend_from_slice(sample_step(&device, &x_t, &y, &step, SAMPLES).unwrap().x.data());
                oracle.extend(by_reference::<f64>(&x, &output, shape, &step));
                yardstick.extend(by_reference::<f32>(&x, &output, shape, &step));
            }
            let name = format!("t = {}, {limit:?}, sigma {:.3}", step.t, step.sigma);
            println!("{name}: {:.2} of the budget", close(&name, &got, &oracle, &yardstick));
        }
    }
}

#[test]
fn noise_is_the_samples_own() {
    let device = Device::cpu();
    let shape = Shape::new(4, 6, 5, 3);
    let x = start(&device, shape, SAMPLES).unwrap().x;
    let y = Tensor::from_slice(&device, shape, &to_f32(&numbers(5, shape.len()))).unwrap();
    let step = steps()[1];
    let all = sample_step(&device, &x, &y, &step, SAMPLES).unwrap().x;
    for i in 0..4 {
        let own = i * 90..(i + 1) * 90;
        let alone = Samples { first: 40 + i as u32, ..SAMPLES };
        let one = Shape { n: 1, ..shape };
        let x_i = start(&device, one, alone).unwrap().x;
        same_bits("x_T", x_i.data(), &x.data()[own.clone()]);
        let y_i = Tensor::from_slice(&device, one, &y.data()[own.clone()]).unwrap();
        let next = sample_step(&device, &x_i, &y_i, &step, alone).unwrap();
        same_bits("x_{t-1}", next.x.data(), &all.data()[own.clone()]);
        same_bits("the network's input", next.input.data(), &all.data()[own]);
    }
    assert!((0..1000).all(|t| SAMPLES.noise(t).image(0) != SAMPLES.start().image(0)), "x_T is drawn apart");
    let other = sample_step(&device, &x, &y, &Step { t: step.t + 1, ..step }, SAMPLES).unwrap().x;
    assert!(other.data().iter().zip(all.data()).all(|(a, b)| a != b), "every timestep has its own noise");
}

/// A NaN from the network must not be clipped away.
#[test]
fn nan_stays_nan() {
    let shape = Shape::new(1, 1, 1, 3);
    let x = Tensor::zeros(&Device::cpu(), shape).unwrap();
    let output = Tensor::from_slice(&Device::cpu(), shape, &[0.0, f32::NAN, 1e30]).unwrap();
    let y = sample_step(&Device::cpu(), &x, &output, steps().last().unwrap(), SAMPLES).unwrap().x;
    assert!(y.data()[1].is_nan() && y.data()[0] == 0.0 && y.data()[2] == -1.0, "{:?}", y.data());
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let shape = Shape::new(3, 37, 41, 3);
    let output = Tensor::from_slice(&Device::cpu(), shape, &to_f32(&numbers(6, shape.len()))).unwrap();
    same_bits_at_any_number_of_threads("x_{t-1}", || {
        let x = start(&Device::cpu(), shape, SAMPLES).unwrap().x;
        sample_step(&Device::cpu(), &x, &output, &steps()[2], SAMPLES).unwrap().x.data().to_vec()
    });
}

/// Asserts that the network's input is x rounded to the activation type, and returns x.
fn state(device: &Device, name: &str, state: &State) -> Vec<f32> {
    assert_eq!((state.x.dtype(), state.input.dtype()), (DType::F32, device.activations()), "{name}");
    let x = state.x.to_vec().unwrap();
    same_bits(&format!("{name}, input"), &state.input.to_vec().unwrap(), &gpu::rounded_f32(device.activations(), &x));
    x
}

#[test]
fn gpu_starts_with_the_bits_of_the_cpu() {
    for shape in SHAPES {
        let want = start(&Device::cpu(), shape, SAMPLES).unwrap().x;
        gpu::each(&format!("x_T of {shape}"), |device| {
            let name = format!("x_T of {shape}");
            let x = state(device, &name, &start(device, shape, SAMPLES).unwrap());
            same_bits(&name, &x, want.data());
            x
        });
    }
}

/// The same order of operations as on a CPU with fused multiply-adds, so the same bits.
#[test]
fn gpu_steps_with_the_bits_of_the_cpu() {
    // With and without noise, of every method.
    let steps =
        steps().into_iter().flat_map(|step| [Limit::Range(1.0), Limit::None].map(|limit| Step { limit, ..step }));
    for (step, shape) in steps.zip(SHAPES.into_iter().cycle()).chain(SHAPES.map(|shape| (steps_of_ddim(), shape))) {
        let x: Vec<f64> = numbers(1, shape.len()).iter().map(|x| 2.0 * x).collect();
        let name = format!("x_t of {shape}, t = {}, {:?}, sigma {:.3}", step.t, step.limit, step.sigma);
        gpu::each(&name, |device| {
            let dtype = device.activations();
            let output = gpu::rounded(dtype, &numbers(2, shape.len()));
            let [x_t, y] = [(DType::F32, &x), (dtype, &output)]
                .map(|(dtype, v)| Tensor::from_slice_as(device, dtype, shape, &to_f32(v)).unwrap());
            let got = state(device, &name, &sample_step(device, &x_t, &y, &step, SAMPLES).unwrap());
            if shape.len() > 100 {
                // On a few elements the reference's own error says little.
                let oracle = by_reference::<f64>(&x, &output, shape, &step);
                close(&name, &got, &oracle, &by_reference::<f32>(&x, &output, shape, &step));
            }
            let cpu = Device::cpu();
            let [x_t, y] = [&x, &output].map(|v| Tensor::from_slice(&cpu, shape, &to_f32(v)).unwrap());
            if gpu::cpu_fuses() {
                same_bits(&name, &got, sample_step(&cpu, &x_t, &y, &step, SAMPLES).unwrap().x.data());
            }
            got
        });
    }
}

fn steps_of_ddim() -> Step {
    let schedule = Schedule::new(Kind::Cosine, 1000).unwrap();
    Sampler::new(&schedule, Method::Ddim { eta: 0.0 }, Spacing::Even, 5).unwrap().steps()[2]
}

/// A NaN from the network must not be clipped away on a GPU either.
#[test]
fn gpu_keeps_nan() {
    gpu::each("NaN", |device| {
        let shape = Shape::new(1, 1, 1, 3);
        let x = Tensor::zeros(device, shape).unwrap();
        let output = Tensor::from_slice_as(device, device.activations(), shape, &[0.0, f32::NAN, 1e30]).unwrap();
        let y = sample_step(device, &x, &output, steps().last().unwrap(), SAMPLES).unwrap();
        let [x, input] = [y.x, y.input].map(|y| y.to_vec().unwrap());
        for y in [&x, &input] {
            assert!(y[1].is_nan() && y[0] == 0.0 && y[2] == -1.0, "{y:?}");
        }
        vec![x[0], x[2], input[0], input[2]]
    });
}

/// More images than the 65,535 blocks that a grid can have along y.
#[test]
fn gpu_loops_over_images() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let (device, shape, step) = (Device::Cuda(gpu), Shape::new(65_537, 1, 1, 3), steps()[1]);
    let got = start(&device, shape, SAMPLES).unwrap();
    let want = start(&Device::cpu(), shape, SAMPLES).unwrap();
    same_bits("x_T", &state(&device, "x_T", &got), want.x.data());
    let zeros = Tensor::from_slice_as(&device, DType::Bf16, shape, &vec![0.0; shape.len()]).unwrap();
    let got = sample_step(&device, &got.x, &zeros, &step, SAMPLES).unwrap();
    let zeros = Tensor::zeros(&Device::cpu(), shape).unwrap();
    let want = sample_step(&Device::cpu(), &want.x, &zeros, &step, SAMPLES).unwrap();
    let got = state(&device, "x_t", &got);
    if gpu::cpu_fuses() {
        same_bits("x_t", &got, want.x.data());
    }
}

/// A step that reads more than x_t and the output, and what it reads.
struct Kindly {
    name: &'static str,
    step: Step,
    guidance: Option<Guidance>,
    gradient: bool,
}

/// Every kind of step that `steps` does not have.
fn kinds() -> Vec<Kindly> {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let kept = Spacing::Even.timesteps(1000, 10).unwrap();
    let all: Vec<u32> = (0..1000).collect();
    let at = |prediction, method, k: usize| Sampler::over(&s, prediction, method, &kept).unwrap().steps()[k];
    let learned = Sampler::over(&s, Prediction::Eps, Method::Ancestral(Variance::Learned), &all).unwrap().steps()[300];
    let raw = Sampler::over(&s, Prediction::X0, Method::Ancestral(Variance::LearnedRaw), &all).unwrap().steps()[300];
    let range = at(Prediction::V, Method::Ancestral(Variance::LearnedRange), 4);
    let small = at(Prediction::X0, Method::Ancestral(Variance::FixedSmall), 4);
    let (ddim, dpm) = (at(Prediction::Eps, Method::Ddim { eta: 0.5 }, 3), at(Prediction::Eps, Method::DpmPp, 5));
    let guidance = Guidance::new(2.5).unwrap();
    let (plain, rescaled) = (Some(guidance), Some(guidance.rescaled(0.7).unwrap()));
    let quantile = |step: Step| Step { limit: Limit::quantile(0.9).unwrap(), ..step };
    let bounded = |step: Step| Step { limit: Limit::Quantile { p: 0.9, largest: 1.1 }, ..step };
    let kind = |name, step, guidance, gradient| Kindly { name, step, guidance, gradient };
    vec![
        kind("learned", learned, None, false),
        kind("learned, the variance itself", raw, None, false),
        kind(
            "its last step",
            Sampler::over(&s, Prediction::Eps, Method::Ancestral(Variance::LearnedRaw), &all).unwrap().steps()[999],
            None,
            false,
        ),
        kind("learned range, v", range, None, false),
        kind(
            "last step, learned range",
            at(Prediction::Eps, Method::Ancestral(Variance::LearnedRange), 9),
            None,
            false,
        ),
        kind("dpm++", dpm, None, false),
        kind("second half of heun", at(Prediction::Eps, Method::Heun, 5), None, false),
        kind("mu", at(Prediction::Mu, Method::Ancestral(Variance::FixedLarge), 3), None, false),
        kind("thresholded", quantile(ddim), None, false),
        kind("thresholded dpm++", quantile(dpm), None, false),
        kind("thresholded up to a largest", bounded(ddim), None, false),
        kind("guided", ddim, plain, false),
        kind("guided and rescaled", ddim, rescaled, false),
        kind("gradient, ddim", ddim, None, true),
        kind("gradient, ancestral", small, None, true),
        kind("gradient, learned range", range, None, true),
        kind("gradient, the variance itself", raw, None, true),
        kind("all at once", quantile(range), rescaled, true),
    ]
}

/// What a kind of step reads, of `shape`, rounded to the type of the output.
struct Numbers {
    shape: Shape,
    x: Vec<f64>,
    /// Halves, images, pixels, channels.
    output: Vec<f64>,
    channels: usize,
    before: Vec<f64>,
    gradient: Vec<f64>,
}

/// The scale of the gradient.
const SCALE: f64 = 1.5;

impl Numbers {
    fn of(kind: &Kindly, shape: Shape, dtype: DType) -> Self {
        let channels = if kind.step.learned.is_some() { 2 * shape.c } else { shape.c };
        let halves = if kind.guidance.is_some() { 2 } else { 1 };
        // Log variances around those of this step; variances above 0, but where none is asked for.
        let shift = match kind.step.learned {
            Some(LogVariance { raw: true, .. }) if kind.step.sigma == 0.0 => -2.0,
            Some(LogVariance { raw: true, .. }) => 2.0,
            Some(LogVariance { factor: 1.0, .. }) => -5.0,
            _ => 0.0,
        };
        let mut output = numbers(2, halves * shape.rows() * channels);
        output
            .chunks_exact_mut(channels)
            .for_each(|p| p[shape.c.min(channels - 1)..].iter_mut().for_each(|v| *v += shift));
        let x = numbers(1, shape.len()).iter().map(|x| 2.0 * x).collect();
        let output = gpu::rounded(dtype, &output);
        Numbers { shape, x, output, channels, before: numbers(3, shape.len()), gradient: numbers(4, shape.len()) }
    }

    /// The same of image `i` alone.
    fn image(&self, i: usize) -> Self {
        let (image, n) = (self.shape.len() / self.shape.n, self.shape.n);
        let part = |x: &[f64], len: usize, i: usize| x[i * len..][..len].to_vec();
        let len = self.shape.pixels() * self.channels;
        let halves = self.output.len() / len / n;
        Numbers {
            shape: Shape { n: 1, ..self.shape },
            x: part(&self.x, image, i),
            output: (0..halves).flat_map(|half| part(&self.output, len, half * n + i)).collect(),
            channels: self.channels,
            before: part(&self.before, image, i),
            gradient: part(&self.gradient, image, i),
        }
    }

    fn by_reference<T: Float + FloatConst>(&self, kind: &Kindly, samples: Samples) -> (Vec<T>, Vec<T>) {
        let cast = |x: &[f64]| x.iter().map(|&x| T::from(x).unwrap()).collect::<Vec<T>>();
        let c = self.shape.c;
        let (mut next, mut images) = (Vec::new(), Vec::new());
        for i in 0..self.shape.n {
            let one = self.image(i);
            let half = |half: usize, first: usize| {
                let pixels = one.output.chunks_exact(self.channels).skip(half * self.shape.pixels());
                let numbers: Vec<f64> =
                    pixels.take(self.shape.pixels()).flat_map(|p| p[first..first + c].to_vec()).collect();
                cast(&numbers)
            };
            let output = match kind.guidance {
                Some(guidance) => reference::guided(&half(0, 0), &half(1, 0), guidance),
                None => half(0, 0),
            };
            let v = if self.channels > c { half(0, c) } else { Vec::new() };
            let scaled: Vec<f64> = one.gradient.iter().map(|g| SCALE * g).collect();
            let gradient = if kind.gradient { cast(&scaled) } else { Vec::new() };
            let z = normals(&samples.noise(kind.step.t).image(i), 0, one.x.len());
            let (x, before) = (cast(&one.x), cast(&one.before));
            let image = Image { x: &x, output: &output, v: &v, before: &before, gradient: &gradient, z: &z };
            let (x, x_0) = reference::step_of(image, &kind.step);
            next.extend(x);
            images.extend(x_0);
        }
        (next, images)
    }

    fn advance(&self, device: &Device, kind: &Kindly, samples: Samples, copies: usize) -> (State, Tensor) {
        let dtype = device.activations();
        let tensor = |x: &[f64]| Tensor::from_slice(device, self.shape, &to_f32(x)).unwrap();
        let [x, before, gradient] = [&self.x, &self.before, &self.gradient].map(|x| tensor(x));
        let n = self.output.len() / self.channels / self.shape.pixels();
        let shape = Shape { n, c: self.channels, ..self.shape };
        let output = Tensor::from_slice_as(device, dtype, shape, &to_f32(&self.output)).unwrap();
        let given = Given {
            x: &x,
            output: &output,
            before: (kind.step.before != Before::Nothing).then_some(&before),
            gradient: kind.gradient.then_some((&gradient, SCALE)),
            guidance: kind.guidance,
            noise: Noise::own(samples.noise(kind.step.t)),
        };
        let (state, x_0) = advance(device, &given, &kind.step, Wanted { copies, x_0: true }).unwrap();
        (state, x_0.unwrap())
    }

    /// Two exponentials of 2 ulp, four roundings, of the noise and of what multiplies the gradient.
    fn allowance(&self, kind: &Kindly) -> f64 {
        // A root and products of a variance itself are the reference's.
        let Some(learned) = kind.step.learned.filter(|learned| !learned.raw) else { return 0.0 };
        let largest = self.output.iter().fold(0.0f64, |m, v| m.max(learned.offset + learned.factor * v).max(-99.0));
        let largest = largest.max(learned.offset + learned.factor.abs());
        4.0 * F32_ROUNDING * (6.77 * (0.5 * largest).exp() + kind.step.shift_mean * SCALE * largest.exp())
    }
}

const KINDS_SHAPES: [Shape; 3] = [Shape::new(3, 5, 3, 3), Shape::new(2, 1, 257, 1), Shape::new(2, 19, 41, 3)];

#[test]
fn every_kind_of_step_follows_the_reference() {
    let device = Device::cpu_guarded();
    for kind in kinds() {
        let (mut got, mut oracle, mut yardstick) = ([vec![], vec![]], [vec![], vec![]], [vec![], vec![]]);
        let mut allowance = 0.0f64;
        for shape in KINDS_SHAPES {
            let numbers = Numbers::of(&kind, shape, DType::F32);
            allowance = allowance.max(numbers.allowance(&kind));
            let (state, x_0) = numbers.advance(&device, &kind, SAMPLES, 2);
            assert_eq!(state.input.data(), [state.x.data(), state.x.data()].concat(), "{}: the input twice", kind.name);
            got[0].extend_from_slice(state.x.data());
            got[1].extend_from_slice(x_0.data());
            let (next, x_0) = numbers.by_reference::<f64>(&kind, SAMPLES);
            oracle[0].extend(next);
            oracle[1].extend(x_0);
            let (next, x_0) = numbers.by_reference::<f32>(&kind, SAMPLES);
            yardstick[0].extend(next);
            yardstick[1].extend(x_0);
        }
        let share = close_but_for(kind.name, &got[0], &oracle[0], &yardstick[0], allowance);
        println!("{}: {share:.2} of the budget", kind.name);
        close(&format!("{}, x_0", kind.name), &got[1], &oracle[1], &yardstick[1]);
    }
}

/// On every device an image's bits are its own: alone and among others.
fn alone(device: &Device, kind: &Kindly, numbers: &Numbers, together: &[f32]) {
    let image = numbers.shape.len() / numbers.shape.n;
    for i in 0..numbers.shape.n {
        let samples = Samples { first: SAMPLES.first + i as u32, ..SAMPLES };
        let (state, _) = numbers.image(i).advance(device, kind, samples, 1);
        let name = format!("{}: image {i} alone", kind.name);
        same_bits(&name, &state.x.to_vec().unwrap(), &together[i * image..(i + 1) * image]);
    }
}

/// A step that reads from device memory what changes from step to step.
fn by_its_turn(device: &Device, kind: &Kindly, numbers: &Numbers, want: &[f32]) {
    let Device::Cuda(gpu) = device else { unreachable!("on a GPU") };
    let noise = Noise::own(SAMPLES.noise(kind.step.t));
    let mut turn = DeviceTurn::new(gpu).unwrap();
    let bound = turn.set(turn_of(&kind.step, noise, kind.gradient.then_some(SCALE))).map(Device::Cuda).unwrap();
    let (state, _) = numbers.advance(&bound, kind, SAMPLES, 1);
    same_bits(&format!("{}, by its turn", kind.name), &state.x.to_vec().unwrap(), want);
}

#[test]
fn gpu_takes_every_kind_of_step_as_the_cpu_does() {
    for (kind, shape) in kinds().into_iter().zip(KINDS_SHAPES.into_iter().cycle()) {
        gpu::each(kind.name, |device| {
            let numbers = Numbers::of(&kind, shape, device.activations());
            let (state, x_0) = numbers.advance(device, &kind, SAMPLES, 2);
            let (x, x_0) = (state.x.to_vec().unwrap(), x_0.to_vec().unwrap());
            let input = gpu::rounded_f32(device.activations(), &x);
            same_bits("the input", &state.input.to_vec().unwrap(), &[&input[..], &input[..]].concat());
            let (oracle, yardstick) =
                (numbers.by_reference::<f64>(&kind, SAMPLES), numbers.by_reference(&kind, SAMPLES));
            close_but_for(kind.name, &x, &oracle.0, &yardstick.0, numbers.allowance(&kind));
            close(&format!("{}, x_0", kind.name), &x_0, &oracle.1, &yardstick.1);
            let (cpu, _) = numbers.advance(&Device::cpu(), &kind, SAMPLES, 1);
            // Exponentials and the sums of a deviation round in their own way on each device.
            let rescaled = kind.guidance.is_some_and(|guidance| guidance.rescale != 0.0);
            if gpu::cpu_fuses() && kind.step.learned.is_none() && !rescaled {
                same_bits(kind.name, &x, cpu.x.data());
            }
            alone(device, &kind, &numbers, &x);
            alone(&Device::cpu(), &kind, &numbers, cpu.x.data());
            by_its_turn(device, &kind, &numbers, &x);
            x
        });
    }
}

/// A Langevin step, guided or not, and the forward process under a mask.
#[test]
fn gpu_corrections_and_noise_follow_the_reference() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let kept = Spacing::Even.timesteps(1000, 10).unwrap();
    let corrector = Corrector { steps: 1, snr: 0.16 };
    let method = Method::Ancestral(Variance::FixedSmall);
    let sampler = Sampler::over(&s, Prediction::V, method, &kept).unwrap().corrected(corrector).unwrap();
    let (_, correction) = sampler.correction(4).unwrap();
    let streams = SAMPLES.correction(correction.t, 0, 1);
    let shape = Shape::new(2, 19, 41, 3);
    let image = shape.len() / 2;
    gpu::each("corrections", |device| {
        let dtype = device.activations();
        let (x, y) = (numbers(1, shape.len()), gpu::rounded(dtype, &numbers(2, shape.len())));
        let slope = numbers(3, shape.len());
        let mut corrected = Vec::new();
        for guided in [false, true] {
            let name = if guided { "corrected towards a class" } else { "corrected" };
            let slope = if guided { &slope[..] } else { &[] };
            let scaled: Vec<f64> = slope.iter().map(|g| SCALE * g).collect();
            let part = |v: &[f64], i: usize| v.chunks(image).nth(i).unwrap_or_default().to_vec();
            let oracle = |i: usize| {
                let z = normals::<f64>(&streams.image(i), 0, image);
                let [x, y, g] = [&x, &y, &scaled].map(|v| part(v, i));
                let own = Image { x: &x, output: &y, v: &[], before: &[], gradient: &g, z: &z };
                reference::correct(own, correction, corrector)
            };
            let yardstick = |i: usize| {
                let z = normals::<f32>(&streams.image(i), 0, image);
                let [x, y, g] = [&x, &y, &scaled].map(|v| to_f32(&part(v, i)));
                let own = Image { x: &x, output: &y, v: &[], before: &[], gradient: &g, z: &z };
                reference::correct(own, correction, corrector)
            };
            let of = |device: &Device| {
                let x = Tensor::from_slice(device, shape, &to_f32(&x)).unwrap();
                let output = Tensor::from_slice_as(device, device.activations(), shape, &to_f32(&y)).unwrap();
                let noise = Noise::own(streams);
                let slope = guided.then(|| Tensor::from_slice(device, shape, &to_f32(slope)).unwrap());
                let gradient = slope.as_ref().map(|slope| (slope, SCALE));
                let given = Given { x: &x, output: &output, before: None, gradient, guidance: None, noise };
                correct(device, &given, correction, corrector, 1).unwrap()
            };
            let got = state(device, name, &of(device));
            let (want, yardstick) = ([oracle(0), oracle(1)].concat(), [yardstick(0), yardstick(1)].concat());
            close(name, &got, &want, &yardstick);
            close(&format!("{name} on the CPU"), of(&Device::cpu()).x.data(), &want, &yardstick);
            corrected.push(got);
        }
        assert_ne!(corrected[0], corrected[1], "the gradient makes no difference");

        let mask: Vec<f64> = (0..shape.len()).map(|k| f64::from(u8::from(k % 3 == 0))).collect();
        let noised = |device: &Device, row: u32| {
            let [x, from, mask] = [&x, &y, &mask].map(|v| Tensor::from_slice(device, shape, &to_f32(v)).unwrap());
            diffuse(device, &from, Some((&mask, &x)), (0.8, 0.6), Noise { streams, row }, 1).unwrap()
        };
        for row in [1, 2, Noise::ALL] {
            let (got, cpu) = (state(device, "noised", &noised(device, row)), noised(&Device::cpu(), row));
            if gpu::cpu_fuses() {
                same_bits("noised", &got, cpu.x.data());
            }
            for (k, &v) in got.iter().enumerate() {
                let stream = Noise { streams, row }.image(k / image);
                let z = normals::<f64>(&stream, k % image, 1)[0];
                let want = if mask[k] == 0.0 { 0.8 * y[k] + 0.6 * z } else { x[k] };
                assert!((f64::from(v) - want).abs() <= 2e-6, "row {row}: element {k} is {v}, expected {want}");
            }
        }
        corrected.concat()
    });
    // Images 40 and 41 are a row of two, and all images share stream 0.
    let first = |row: u32, i: usize| Noise { streams, row }.image(i).stream;
    assert_eq!([first(1, 1), first(2, 1), first(2, 0), first(Noise::ALL, 1)], [41, 40, 40, 0]);
}

#[test]
fn planted_bugs_in_every_kind_of_step_are_noticed() {
    let test = "sample_step::gpu_takes_every_kind_of_step_as_the_cpu_does";
    // c_before in place of c_xt; the factor of the learned log variance in place of its offset; the scale of another
    // tensor; barriers of the selection and of the sums; the limits in place of the turn.
    plant::notices_wrong_parameter(test, "sample_step_step_f32", "14+16", "14+12");
    plant::notices_wrong_parameter(test, "sample_step_step_bf16", "14+28", "14+32");
    plant::notices_wrong_parameter(test, "sample_step_threshold_f32", 8, 5);
    plant::notices_lost_barrier(test, "sample_step_threshold_f32", 1);
    plant::notices_lost_barrier(test, "sample_step_rescale_bf16", 0);
    plant::notices_wrong_parameter(test, "sample_step_step_f32", 17, 8);
    let test = "sample_step::gpu_corrections_and_noise_follow_the_reference";
    plant::notices_wrong_parameter(test, "sample_step_norms_f32", 10, 9);
    plant::notices_lost_block(test, "sample_step_correct_f32");
    plant::notices_lost_block(test, "sample_step_diffuse_bf16");
}

#[test]
fn planted_bugs_are_noticed() {
    // A constant of Philox; the number of images in place of the size of one; a comparison of the clipping; a rounding;
    // one factor in place of another.
    plant::notices(
        "sample_step::gpu_starts_with_the_bits_of_the_cpu",
        "sample_step_start_f32",
        "-845247145",
        "-845247144",
    );
    plant::notices_wrong_parameter("sample_step::gpu_starts_with_the_bits_of_the_cpu", "sample_step_start_bf16", 3, 2);
    // The compiler makes a loop for each kind of variance; the last of these places are not in that of a fixed one.
    let test = "sample_step::gpu_takes_every_kind_of_step_as_the_cpu_does";
    plant::notices(test, "sample_step_step_f32", "setp.gt.f32", "setp.lt.f32");
    plant::notices(test, "sample_step_step_f32", "fma.rn.f32", "fma.rz.f32");
    let test = "sample_step::gpu_steps_with_the_bits_of_the_cpu";
    plant::notices_wrong_parameter(test, "sample_step_step_bf16", "14+20", "14+12");
    plant::notices_lost_block(test, "sample_step_step_f32");
    plant::notices_lost_block(test, "sample_step_step_bf16");
}
