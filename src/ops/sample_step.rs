//! One step of the reverse process in one pass, ancestral or DDIM: `x_{t-1} = c_x0 clip(x0_xt x_t + x0_output y) + c_xt
//! x_t + sigma z`.
//!
//! y is the network's output, the predicted noise; the factors are a [`Step`]. z is drawn in the same pass from the
//! sample's own stream for this timestep, and only if sigma is not 0. Shapes: all `(n, h, w, c)`. No gradient.
//! Numerics: f32 with factors rounded from f64. The prediction of x_0 amplifies errors by up to `1/sqrt(alpha_bar_T)`
//! (157 for the linear schedule); clipping bounds them.
//!
//! The chain is f32 on every device. A network with bf16 activations gets a rounded copy of x, written by the same
//! kernel.

use crate::device::Device;
use crate::diffusion::sampler::{Samples, Step};
use crate::error::Result;
use crate::tensor::{DType, Shape, Tensor};

/// x_t, the state of the reverse process, `(n, h, w, c)`.
#[derive(Clone, Debug)]
pub struct State {
    /// x_t in f32.
    pub x: Tensor,
    /// x in the device's activation type, for the network; if that is f32, another handle to `x`.
    pub input: Tensor,
}

impl State {
    /// Allocates the tensors and lets `write` write x and, if it is a tensor of its own, the network's input.
    fn make(
        device: &Device,
        shape: Shape,
        write: impl FnOnce(&mut Tensor, Option<&mut Tensor>) -> Result<()>,
    ) -> Result<Self> {
        let mut x = Tensor::uninit(device, DType::F32, shape)?;
        match device.activations() {
            DType::F32 => {
                write(&mut x, None)?;
                Ok(State { input: x.clone(), x })
            }
            dtype => {
                let mut input = Tensor::uninit(device, dtype, shape)?;
                write(&mut x, Some(&mut input))?;
                Ok(State { x, input })
            }
        }
    }
}

/// x_T: standard normals, `(n, h, w, c)`, each sample from its own stream.
///
/// # Errors
/// A GPU error.
pub fn start(device: &Device, shape: Shape, samples: Samples) -> Result<State> {
    State::make(device, shape, |x, input| match device {
        Device::Cpu(_) => {
            cpu::start(x.data_mut(), shape, samples);
            Ok(())
        }
        Device::Cuda(gpu) => cuda::start(gpu, x, input, samples),
        Device::Meta(_) => Ok(()),
    })
}

/// x_{t-1} from x_t and the network's output.
///
/// # Errors
/// A GPU error.
pub fn sample_step(device: &Device, x: &Tensor, output: &Tensor, step: &Step, samples: Samples) -> Result<State> {
    let shape = x.shape();
    assert_eq!(shape, output.shape(), "sample_step: x is {shape}, the network's output {}", output.shape());
    State::make(device, shape, |next, input| match device {
        Device::Cpu(_) => {
            cpu::step(next.data_mut(), x.data(), output.data(), shape, step, samples);
            Ok(())
        }
        Device::Cuda(gpu) => cuda::step(gpu, next, input, x, output, step, samples),
        Device::Meta(_) => Ok(()),
    })
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use crate::diffusion::sampler::Step;

    /// x_{t-1}; `z` is not read if sigma is 0.
    pub fn forward<T: Float>(x: &[T], output: &[T], z: &[T], step: &Step) -> Vec<T> {
        let number = |v: f64| T::from(v).expect("every f64 has a nearest number");
        let one = |i: usize| {
            let x_0 = number(step.x0_xt) * x[i] + number(step.x0_output) * output[i];
            let x_0 = if step.clip { x_0.max(-T::one()).min(T::one()) } else { x_0 };
            let mean = number(step.c_x0) * x_0 + number(step.c_xt) * x[i];
            if step.sigma == 0.0 { mean } else { mean + number(step.sigma) * z[i] }
        };
        (0..x.len()).map(one).collect()
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::*;
    use crate::device::cpu::simd;
    use crate::rng::{Stream, normals_from};

    /// Elements per task, of one image.
    const CHUNK: usize = 1 << 12;
    /// Normals drawn at a time, on the stack.
    const NOISE: usize = 256;

    pub fn start(x: &mut [f32], shape: Shape, samples: Samples) {
        let (image, streams) = ((shape.len() / shape.n.max(1)).max(1), samples.start());
        x.par_chunks_mut(image).enumerate().for_each(|(i, x)| streams.image(i).normals(x));
    }

    pub fn step(y: &mut [f32], x: &[f32], output: &[f32], shape: Shape, step: &Step, samples: Samples) {
        let (image, streams) = ((shape.len() / shape.n.max(1)).max(1), samples.noise(step.t));
        let images = y.par_chunks_mut(image).zip(x.par_chunks(image)).zip(output.par_chunks(image));
        images.enumerate().for_each(|(i, ((y, x), output))| {
            let stream = streams.image(i);
            let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).zip(output.par_chunks(CHUNK));
            chunks.enumerate().for_each(|(k, ((y, x), output))| chunk(y, x, output, step, &stream, k * CHUNK));
        });
    }

    simd::dispatch! {
        /// Elements `first..` of an image.
        fn chunk<S>(y: &mut [f32], x: &[f32], output: &[f32], step: &Step, stream: &Stream, first: usize) {
            let [x0_xt, x0_output, c_x0, c_xt, sigma] =
                [step.x0_xt, step.x0_output, step.c_x0, step.c_xt, step.sigma].map(|v| v as f32);
            let bound = if step.clip { 1.0 } else { f32::INFINITY };
            let mut z = [0.0; NOISE];
            let chunks = y.chunks_mut(NOISE).zip(x.chunks(NOISE)).zip(output.chunks(NOISE));
            for (k, ((y, x), output)) in chunks.enumerate() {
                if step.sigma != 0.0 {
                    normals_from(stream, first + k * NOISE, &mut z[..y.len()]);
                }
                for (((y, &x), &output), &z) in y.iter_mut().zip(x).zip(output).zip(&z) {
                    let x_0 = S::mul_add(x0_xt, x, x0_output * output);
                    // Two comparisons instead of `clamp`, so that a NaN stays one and the loop vectorises.
                    let x_0 = if x_0 < -bound { -bound } else { x_0 };
                    let x_0 = if x_0 > bound { bound } else { x_0 };
                    *y = S::mul_add(sigma, z, S::mul_add(c_x0, x_0, c_xt * x));
                }
            }
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::{Gpu, each_four_of_images};
    use crate::kernels::philox::THREADS;
    use crate::kernels::sample_step::{Factors, START, STEP};

    pub fn start(gpu: &Gpu, x: &mut Tensor, input: Option<&mut Tensor>, samples: Samples) -> Result<()> {
        let n = x.shape().n;
        let image = x.shape().len() / n.max(1);
        let launch = gpu.launch(START.of(gpu.activations()), each_four_of_images(n, image), THREADS);
        launch.write(x).write_opt(input).u64(n).u64(image).streams(samples.start()).run()
    }

    pub fn step(
        gpu: &Gpu,
        next: &mut Tensor,
        input: Option<&mut Tensor>,
        x: &Tensor,
        output: &Tensor,
        step: &Step,
        samples: Samples,
    ) -> Result<()> {
        let n = x.shape().n;
        let image = x.shape().len() / n.max(1);
        let factors = Factors {
            x0_xt: step.x0_xt as f32,
            x0_output: step.x0_output as f32,
            c_x0: step.c_x0 as f32,
            c_xt: step.c_xt as f32,
            sigma: step.sigma as f32,
            bound: if step.clip { 1.0 } else { f32::INFINITY },
        };
        let launch = gpu.launch(STEP.of(output.dtype()), each_four_of_images(n, image), THREADS);
        let launch = launch.write(next).write_opt(input).read(x).read(output).u64(n).u64(image);
        launch.value(factors).streams(samples.noise(step.t)).run()
    }
}
