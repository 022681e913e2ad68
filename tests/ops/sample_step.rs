use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::sampler::{Samples, Step};
use ddpm_cuda::diffusion::{Kind, Method, Sampler, Schedule, Spacing, Variance};
use ddpm_cuda::ops::sample_step::{State, reference, sample_step, start};
use ddpm_cuda::rng::reference::normals;
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use num_traits::{Float, FloatConst};

use crate::support::{close, gpu, numbers, plant, same_bits, same_bits_at_any_number_of_threads, to_f32};

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
        for clip in [true, false] {
            let step = Step { clip, ..step };
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
            let name = format!("t = {}, clip {clip}, sigma {:.3}", step.t, step.sigma);
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
    let steps = steps().into_iter().flat_map(|step| [true, false].map(|clip| Step { clip, ..step }));
    for (step, shape) in steps.zip(SHAPES.into_iter().cycle()).chain(SHAPES.map(|shape| (steps_of_ddim(), shape))) {
        let x: Vec<f64> = numbers(1, shape.len()).iter().map(|x| 2.0 * x).collect();
        let name = format!("x_t of {shape}, t = {}, clip {}, sigma {:.3}", step.t, step.clip, step.sigma);
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
    let test = "sample_step::gpu_steps_with_the_bits_of_the_cpu";
    plant::notices(test, "sample_step_step_f32", "setp.gt.f32", "setp.lt.f32");
    plant::notices(test, "sample_step_step_f32", "fma.rn.f32", "fma.rz.f32");
    plant::notices_wrong_parameter(test, "sample_step_step_bf16", "6+16", "6+12");
    plant::notices_lost_block(test, "sample_step_step_f32");
    plant::notices_lost_block(test, "sample_step_step_bf16");
}
