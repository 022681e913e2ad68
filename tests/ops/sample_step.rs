use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::sampler::{Samples, Step};
use ddpm_cuda::diffusion::{Kind, Method, Sampler, Schedule, Spacing, Variance};
use ddpm_cuda::ops::sample_step::{reference, sample_step, start};
use ddpm_cuda::rng::reference::normals;
use ddpm_cuda::tensor::{Shape, Tensor};
use num_traits::{Float, FloatConst};

use crate::support::{close, numbers, same_bits, same_bits_at_any_number_of_threads, to_f32};

/// 256 numbers are drawn at a time, 4,096 are one task.
const SHAPES: [Shape; 5] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(3, 5, 3, 2),
    Shape::new(2, 1, 1, 257),
    Shape::new(2, 28, 28, 1),
    Shape::new(2, 37, 41, 3),
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

/// All shapes count as one case for the yardstick: the largest error of the f32 reference over a single number says
/// little.
#[test]
fn cpu_follows_the_reference() {
    let device = Device::cpu_guarded();
    for step in steps() {
        for clip in [true, false] {
            let step = Step { clip, ..step };
            let (mut got, mut oracle, mut yardstick) = (Vec::new(), Vec::new(), Vec::new());
            for shape in SHAPES {
                // Some beyond [-1, 1], so that clipping happens at every level.
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
