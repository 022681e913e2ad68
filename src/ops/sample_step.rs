//! One step of a reverse process in one pass: `x_0 = limit(x0_xt x_t + x0_output y)`, `x_{t-1} = c_x0 x_0 + c_xt x_t +
//! c_before before + sigma z`.
//!
//! y is what the network predicts; the factors are a [`Step`]. With guidance y is `y_2 + weight (y_1 - y_2)` of the
//! output's two halves, times a factor per image if it is rescaled; with a learned variance the output has twice the
//! channels, and sigma is formed per pixel. z is drawn in the same pass from the sample's own stream for this timestep,
//! and only if sigma is not 0. Shapes: all `(n, h, w, c)`. No gradient. Numerics: f32 with factors rounded from f64.
//! The prediction of x_0 amplifies errors by up to `1/sqrt(alpha_bar_T)` (157 for the linear schedule); clipping bounds
//! them.
//!
//! What needs all of an image first (dynamic thresholding, rescaled guidance, the norms of a Langevin correction) is a
//! pass of its own before the step, per image, so that no image depends on its batch.
//!
//! On a GPU what changes from step to step (factors, the streams' step, the timestep for the network) can be in device
//! memory, as a [`Turn`] that the handle of the device is bound to. Then every step launches the same kernels with the
//! same arguments.
//!
//! The chain is f32 on every device. A network with bf16 activations gets a rounded copy of x, and one that is asked
//! with and without classes gets it twice, written by the same kernel.

use crate::device::Device;
use crate::diffusion::sampler::{Correction, Corrector, Guidance, Limit, LogVariance, Samples, Step};
use crate::error::Result;
use crate::kernels::sample_step::{Factors, Turn};
use crate::rng::{Stream, Streams};
use crate::tensor::{DType, Shape, Tensor};

/// x_t, the state of the reverse process, `(n, h, w, c)`.
#[derive(Clone, Debug)]
pub struct State {
    /// x_t in f32.
    pub x: Tensor,
    /// x in the device's activation type, for the network, once or twice along n; if that is f32 and once, another
    /// handle to `x`.
    pub input: Tensor,
}

impl State {
    /// Allocates the tensors and lets `write` write x and, if it is a tensor of its own, the network's input.
    fn make(
        device: &Device,
        shape: Shape,
        copies: usize,
        write: impl FnOnce(&mut Tensor, Option<&mut Tensor>) -> Result<()>,
    ) -> Result<Self> {
        assert!(shape.len() / shape.n.max(1) <= u32::MAX as usize, "an image of {shape} has too many elements");
        let mut x = Tensor::uninit(device, DType::F32, shape)?;
        match device.activations() {
            DType::F32 if copies == 1 => {
                write(&mut x, None)?;
                Ok(State { input: x.clone(), x })
            }
            dtype => {
                let mut input = Tensor::uninit(device, dtype, Shape { n: copies * shape.n, ..shape })?;
                write(&mut x, Some(&mut input))?;
                if let Device::Cpu(_) = device {
                    input.data_mut().chunks_exact_mut(shape.len().max(1)).for_each(|to| to.copy_from_slice(x.data()));
                }
                Ok(State { x, input })
            }
        }
    }
}

/// Where the noise of a batch comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    /// A stream per image.
    pub streams: Streams,
    /// So many images, a row, draw from the stream of the first of them; [`Noise::ALL`]: all from stream 0.
    pub row: u32,
}

impl Noise {
    /// The [`row`](Self::row) of all images.
    pub const ALL: u32 = u32::MAX;

    /// Of each image's own.
    pub fn own(streams: Streams) -> Self {
        Noise { streams, row: 1 }
    }

    /// The stream of the batch's image `i`.
    pub fn image(&self, i: usize) -> Stream {
        let stream = self.streams.image(i);
        Stream { stream: stream.stream - stream.stream % self.row, ..stream }
    }
}

/// What a step or a correction reads.
#[derive(Clone, Copy)]
pub struct Given<'a> {
    /// x_t, f32.
    pub x: &'a Tensor,
    /// The network's output, of the device's activation type: for n images, or with `guidance` for 2n, the second half
    /// without classes; of c channels, or 2c, the second c for the variance.
    pub output: &'a Tensor,
    /// What the step calls `before`, f32.
    pub before: Option<&'a Tensor>,
    /// The gradient of log p(label | x_t), f32, and its scale.
    pub gradient: Option<(&'a Tensor, f64)>,
    /// How the two halves are combined.
    pub guidance: Option<Guidance>,
    /// Where the noise comes from.
    pub noise: Noise,
}

/// The turn of a step whose noise is `noise`, and whose gradient, if it has one, is scaled by `scale`.
pub fn turn_of(step: &Step, noise: Noise, scale: Option<f64>) -> Turn {
    Turn { step: noise.streams.step, time: step.time as f32, factors: factors(step, scale) }
}

/// The factors of a step in f32.
fn factors(step: &Step, scale: Option<f64>) -> Factors {
    let bound = if let Limit::Range(r) = step.limit { r as f32 } else { f32::INFINITY };
    let learned = step.learned.map_or([0.0; 2], |learned| [learned.offset as f32, learned.factor as f32]);
    let scale = scale.unwrap_or(0.0);
    Factors {
        x0_xt: step.x0_xt as f32,
        x0_output: step.x0_output as f32,
        c_x0: step.c_x0 as f32,
        c_xt: step.c_xt as f32,
        c_before: step.c_before as f32,
        sigma: step.sigma as f32,
        bound,
        log_offset: learned[0],
        log_factor: learned[1],
        variance: step.variance as f32,
        shift_x0: (step.shift_x0 * scale) as f32,
        shift_mean: (step.shift_mean * scale) as f32,
        shifted_bound: step.bound_of_shifted() as f32,
    }
}

/// What a step writes besides x_{t-1}.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// How often the network's input holds x_{t-1}: twice for guidance.
    pub copies: usize,
    /// Whether the predicted x_0 is wanted.
    pub x_0: bool,
}

impl Given<'_> {
    /// How the output is read: whether it has two halves, and whether its channels are doubled.
    fn halves(&self) -> (usize, bool) {
        let (x, y) = (self.x.shape(), self.output.shape());
        let halves = if self.guidance.is_some() { 2 } else { 1 };
        let doubled = y.c == 2 * x.c;
        let want = Shape { n: halves * x.n, c: if doubled { 2 * x.c } else { x.c }, ..x };
        assert_eq!(want, y, "sample_step: x is {x}, the network's output {y} with {halves} halves");
        (halves, doubled)
    }

    /// The gradient in a correction, and its factor in eps: its scale is that in the score.
    fn shift(&self, correction: &Correction) -> Option<(&Tensor, f32)> {
        self.gradient.map(|(gradient, scale)| (gradient, (-correction.noise * scale) as f32))
    }

    /// The factor of each image's output, (n, 1, 1, 1) f32, if guidance is rescaled.
    fn scale(&self, device: &Device) -> Result<Option<Tensor>> {
        let Some(guidance) = self.guidance.filter(|guidance| guidance.rescale != 0.0) else { return Ok(None) };
        let shape = Shape::new(self.x.shape().n, 1, 1, 1);
        let mut scale = Tensor::uninit(device, DType::F32, shape)?;
        match device {
            Device::Cpu(_) => cpu::rescale(scale.data_mut(), self, guidance),
            Device::Cuda(gpu) => cuda::rescale(gpu, &mut scale, self, guidance)?,
            Device::Meta(_) => {}
        }
        Ok(Some(scale))
    }
}

/// x_T: standard normals, `(n, h, w, c)`, each sample from its own stream.
///
/// # Errors
/// A GPU error.
pub fn start(device: &Device, shape: Shape, samples: Samples) -> Result<State> {
    start_from(device, shape, Noise::own(samples.start()), 1)
}

/// x_T from any noise, `copies` times for the network.
///
/// # Errors
/// A GPU error.
pub fn start_from(device: &Device, shape: Shape, noise: Noise, copies: usize) -> Result<State> {
    State::make(device, shape, copies, |x, input| match device {
        Device::Cpu(_) => {
            cpu::start(x.data_mut(), shape, noise);
            Ok(())
        }
        Device::Cuda(gpu) => cuda::start(gpu, x, input, noise, copies),
        Device::Meta(_) => Ok(()),
    })
}

/// x_{t-1} from x_t and the network's output, for a step that reads nothing else.
///
/// # Errors
/// A GPU error.
pub fn sample_step(device: &Device, x: &Tensor, output: &Tensor, step: &Step, samples: Samples) -> Result<State> {
    let noise = Noise::own(samples.noise(step.t));
    let given = Given { x, output, before: None, gradient: None, guidance: None, noise };
    Ok(advance(device, &given, step, Wanted { copies: 1, x_0: false })?.0)
}

/// x_{t-1} from x_t and all that the step reads, and the predicted x_0, f32, if it is wanted.
///
/// # Errors
/// A GPU error.
pub fn advance(device: &Device, given: &Given<'_>, step: &Step, wanted: Wanted) -> Result<(State, Option<Tensor>)> {
    let shape = given.x.shape();
    let (_, doubled) = given.halves();
    assert!(doubled || step.learned.is_none(), "sample_step: a learned variance, but {} channels", shape.c);
    assert_eq!(step.c_before != 0.0, given.before.is_some(), "sample_step: before, for {step:?}");
    let scale = given.scale(device)?;
    let limits = limits(device, given, scale.as_ref(), step)?;
    let mut x_0 = wanted.x_0.then(|| Tensor::uninit(device, DType::F32, shape)).transpose()?;
    let per_image = PerImage { scale: scale.as_ref(), limits: limits.as_ref() };
    let state = State::make(device, shape, wanted.copies, |next, input| match device {
        Device::Cpu(_) => {
            cpu::step(next.data_mut(), x_0.as_mut().map(Tensor::data_mut), given, per_image, step);
            Ok(())
        }
        Device::Cuda(gpu) => cuda::step(gpu, next, input, x_0.as_mut(), given, per_image, step, wanted.copies),
        Device::Meta(_) => Ok(()),
    })?;
    Ok((state, x_0))
}

/// What each image's |x_0| is limited to, and then divided by, at a step with [`Limit::Quantile`]: (n, 1, 1, 1), f32.
/// `None` at any other.
///
/// # Errors
/// A GPU error.
pub fn thresholds(device: &Device, given: &Given<'_>, step: &Step) -> Result<Option<Tensor>> {
    given.halves();
    limits(device, given, given.scale(device)?.as_ref(), step)
}

/// [`thresholds`], the factor of each image's output being known.
fn limits(device: &Device, given: &Given<'_>, scale: Option<&Tensor>, step: &Step) -> Result<Option<Tensor>> {
    let Limit::Quantile { p, largest } = step.limit else { return Ok(None) };
    let shape = given.x.shape();
    let mut limits = Tensor::uninit(device, DType::F32, Shape::new(shape.n, 1, 1, 1))?;
    let quantile = Quantile::of(p, shape.len() / shape.n.max(1), largest);
    match device {
        Device::Cpu(_) => cpu::threshold(limits.data_mut(), given, scale, step, quantile),
        Device::Cuda(gpu) => cuda::threshold(gpu, &mut limits, given, scale, step, quantile)?,
        Device::Meta(_) => {}
    }
    Ok(Some(limits))
}

/// A Langevin correction of x at the level it is at.
///
/// # Errors
/// A GPU error.
pub fn correct(
    device: &Device,
    given: &Given<'_>,
    correction: &Correction,
    corrector: Corrector,
    copies: usize,
) -> Result<State> {
    let shape = given.x.shape();
    given.halves();
    let scale = given.scale(device)?;
    let mut factors = Tensor::uninit(device, DType::F32, Shape::new(shape.n, 1, 1, 2))?;
    match device {
        Device::Cpu(_) => cpu::norms(factors.data_mut(), given, scale.as_ref(), correction, corrector),
        Device::Cuda(gpu) => cuda::norms(gpu, &mut factors, given, scale.as_ref(), correction, corrector)?,
        Device::Meta(_) => {}
    }
    State::make(device, shape, copies, |next, input| match device {
        Device::Cpu(_) => {
            cpu::correct(next.data_mut(), given, scale.as_ref(), factors.data(), correction);
            Ok(())
        }
        Device::Cuda(gpu) => cuda::correct(gpu, next, input, given, scale.as_ref(), &factors, correction, copies),
        Device::Meta(_) => Ok(()),
    })
}

/// The forward process within a reverse one, all f32: `signal from + noise z` (DDPM, equation 4, or one step of it,
/// equation 2), everywhere or only where `kept` has a 0, elsewhere x: `kept` is the mask and x.
///
/// # Errors
/// A GPU error.
pub fn diffuse(
    device: &Device,
    from: &Tensor,
    kept: Option<(&Tensor, &Tensor)>,
    (signal, noise): (f64, f64),
    streams: Noise,
    copies: usize,
) -> Result<State> {
    let shape = from.shape();
    for tensor in kept.iter().flat_map(|(mask, x)| [mask, x]) {
        assert_eq!(tensor.shape(), shape, "sample_step: {} beside {shape}", tensor.shape());
    }
    let factors = [signal as f32, noise as f32];
    State::make(device, shape, copies, |next, input| match device {
        Device::Cpu(_) => {
            cpu::diffuse(next.data_mut(), from, kept, factors, streams);
            Ok(())
        }
        Device::Cuda(gpu) => cuda::diffuse(gpu, next, input, from, kept, factors, streams, copies),
        Device::Meta(_) => Ok(()),
    })
}

/// The factors that were found per image, (n, 1, 1, 1) f32.
#[derive(Clone, Copy)]
struct PerImage<'a> {
    /// Of the output.
    scale: Option<&'a Tensor>,
    /// What |x_0| is limited to, and then divided by.
    limits: Option<&'a Tensor>,
}

/// A quantile with linear interpolation between two ranks, as NumPy's.
#[derive(Clone, Copy)]
struct Quantile {
    /// The lower rank, from 0.
    rank: usize,
    /// How far from it to the next.
    fraction: f64,
    /// The largest that counts.
    largest: f64,
}

impl Quantile {
    fn of(p: f64, len: usize, largest: f64) -> Self {
        let place = p * (len.max(1) - 1) as f64;
        Quantile { rank: place as usize, fraction: place.fract(), largest }
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use super::Quantile;
    use crate::diffusion::sampler::{Correction, Corrector, Guidance, Limit, LogVariance, Step};

    /// What a step reads of one image; slices that it does not read may be empty.
    #[derive(Clone, Copy)]
    pub struct Image<'a, T> {
        /// x_t.
        pub x: &'a [T],
        /// What the network predicts, combined by [`guided`] where there is guidance.
        pub output: &'a [T],
        /// Its second half of channels.
        pub v: &'a [T],
        /// What the step calls `before`.
        pub before: &'a [T],
        /// The gradient of log p(label | x_t), times its scale.
        pub gradient: &'a [T],
        /// Normals.
        pub z: &'a [T],
    }

    fn number<T: Float>(v: f64) -> T {
        T::from(v).expect("every f64 has a nearest number")
    }

    /// x_{t-1} of a step that reads x_t, the output and z alone; `z` is not read if sigma is 0.
    pub fn forward<T: Float>(x: &[T], output: &[T], z: &[T], step: &Step) -> Vec<T> {
        step_of(Image { x, output, v: &[], before: &[], gradient: &[], z }, step).0
    }

    /// x_{t-1} and the predicted x_0 of one image.
    pub fn step_of<T: Float>(image: Image<'_, T>, step: &Step) -> (Vec<T>, Vec<T>) {
        let Image { x, output, v, before, gradient, z } = image;
        let mut x_0: Vec<T> = x
            .iter()
            .zip(output)
            .map(|(&x, &y)| number::<T>(step.x0_xt) * x + number::<T>(step.x0_output) * y)
            .collect();
        let clip = |x_0: T, s: T| x_0.max(-s).min(s);
        match step.limit {
            Limit::None => {}
            Limit::Range(r) => x_0.iter_mut().for_each(|x_0| *x_0 = clip(*x_0, number(r))),
            Limit::Quantile { p, largest } => {
                let s = quantile(&x_0, p).max(T::one()).min(number(largest));
                x_0.iter_mut().for_each(|x_0| *x_0 = clip(*x_0, s) / s);
            }
        }
        let next = (0..x.len()).map(|i| {
            let (mut sigma, mut variance) = (number::<T>(step.sigma), number::<T>(step.variance));
            match step.learned {
                None => {}
                // Without noise its root is not asked for.
                Some(LogVariance { raw: true, .. }) if step.sigma == 0.0 => variance = v[i],
                Some(LogVariance { raw: true, .. }) => (sigma, variance) = (sigma * v[i].sqrt(), v[i]),
                Some(learned) => {
                    let log_variance = number::<T>(learned.offset) + number::<T>(learned.factor) * v[i];
                    (sigma, variance) = (sigma * (number::<T>(0.5) * log_variance).exp(), log_variance.exp());
                }
            }
            if !gradient.is_empty() {
                x_0[i] = clip(x_0[i] + number::<T>(step.shift_x0) * gradient[i], number(step.bound_of_shifted()));
            }
            let mut mean = number::<T>(step.c_x0) * x_0[i] + number::<T>(step.c_xt) * x[i];
            if step.c_before != 0.0 {
                mean = mean + number::<T>(step.c_before) * before[i];
            }
            if !gradient.is_empty() {
                mean = mean + number::<T>(step.shift_mean) * variance * gradient[i];
            }
            if step.sigma == 0.0 { mean } else { mean + sigma * z[i] }
        });
        let next = next.collect();
        (next, x_0)
    }

    /// The p-quantile of |x_0|, with linear interpolation.
    pub fn quantile<T: Float>(x_0: &[T], p: f64) -> T {
        let mut sizes: Vec<T> = x_0.iter().map(|x_0| x_0.abs()).collect();
        sizes.sort_by(|a, b| a.partial_cmp(b).expect("no NaN in an image"));
        let Quantile { rank, fraction, .. } = Quantile::of(p, sizes.len(), f64::INFINITY);
        let (low, high) = (sizes[rank], sizes[(rank + 1).min(sizes.len() - 1)]);
        low + number::<T>(fraction) * (high - low)
    }

    /// The outputs with and without the class of one image, combined (Ho and Salimans 2022; Lin et al. 2024, equations
    /// 15 and 16).
    pub fn guided<T: Float>(with: &[T], without: &[T], guidance: Guidance) -> Vec<T> {
        let weight = number::<T>(guidance.weight);
        let both: Vec<T> = with.iter().zip(without).map(|(&c, &u)| u + weight * (c - u)).collect();
        if guidance.rescale == 0.0 {
            return both;
        }
        let deviation = |y: &[T]| {
            let n = number::<T>(y.len() as f64);
            let mean = y.iter().fold(T::zero(), |sum, &y| sum + y) / n;
            (y.iter().fold(T::zero(), |sum, &y| sum + (y - mean) * (y - mean)) / n).sqrt()
        };
        if deviation(&both).is_zero() {
            return both;
        }
        let phi = number::<T>(guidance.rescale);
        let scale = phi * (deviation(with) / deviation(&both)) + (T::one() - phi);
        both.into_iter().map(|y| scale * y).collect()
    }

    /// A correction of one image, of which x, the output, the gradient and z are read.
    pub fn correct<T: Float>(image: Image<'_, T>, correction: &Correction, corrector: Corrector) -> Vec<T> {
        let Image { x, output, gradient, z, .. } = image;
        let mut eps: Vec<T> = x
            .iter()
            .zip(output)
            .map(|(&x, &y)| number::<T>(correction.eps.xt) * x + number::<T>(correction.eps.output) * y)
            .collect();
        let squares = |v: &[T]| v.iter().fold(T::zero(), |sum, &v| sum + v * v);
        let noise = number::<T>(correction.noise);
        eps.iter_mut().zip(gradient).for_each(|(eps, &g)| *eps = *eps - noise * g);
        let ratio = number::<T>(corrector.snr) * noise;
        let e = number::<T>(2.0 * correction.alpha) * ratio * ratio * squares(z) / squares(&eps);
        let root = (e + e).sqrt();
        (0..x.len()).map(|i| x[i] - e / noise * eps[i] + root * z[i]).collect()
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::*;
    use crate::device::cpu::simd;
    use crate::rng::normals_from;

    /// Elements per task, of one image.
    const CHUNK: usize = 1 << 12;
    /// Elements at a time, on the stack.
    const PART: usize = 256;

    /// Elements of an image.
    fn image(shape: Shape) -> usize {
        (shape.len() / shape.n.max(1)).max(1)
    }

    pub fn start(x: &mut [f32], shape: Shape, noise: Noise) {
        x.par_chunks_mut(image(shape)).enumerate().for_each(|(i, x)| noise.image(i).normals(x));
    }

    /// The output of one image, as a step reads it.
    #[derive(Clone, Copy)]
    struct Output<'a> {
        with: &'a [f32],
        /// Without the class, and the weight of the other.
        without: Option<(&'a [f32], f32)>,
        /// c, if there are 2c channels.
        doubled: Option<usize>,
        scale: f32,
    }

    impl<'a> Output<'a> {
        fn of(given: &'a Given<'_>, scale: Option<&Tensor>, i: usize) -> Self {
            let (shape, (_, doubled)) = (given.x.shape(), given.halves());
            let len = image(shape) * if doubled { 2 } else { 1 };
            let of = |i: usize| &given.output.data()[i * len..][..len];
            Output {
                with: of(i),
                without: given.guidance.map(|guidance| (of(shape.n + i), guidance.weight as f32)),
                doubled: doubled.then_some(shape.c),
                scale: scale.map_or(1.0, |scale| scale.data()[i]),
            }
        }

        /// The prediction, combined and scaled, and the variance's half, of elements `first..`.
        fn read(&self, y: &mut [f32], v: &mut [f32], first: usize) {
            read(y, v, self, first);
        }
    }

    simd::dispatch! {
        fn read<S>(y: &mut [f32], v: &mut [f32], output: &Output<'_>, first: usize) {
            let place = |c: usize, j: usize| 2 * (j - j % c) + j % c;
            let len = y.len();
            let take = |from: &[f32], to: &mut [f32], shift: usize| match output.doubled {
                None => to.copy_from_slice(&from[first..first + len]),
                Some(c) => to.iter_mut().enumerate().for_each(|(j, to)| *to = from[place(c, first + j) + shift * c]),
            };
            take(output.with, y, 0);
            if output.doubled.is_some() {
                take(output.with, v, 1);
            }
            if let Some((without, weight)) = output.without {
                let mut other = [0.0; PART];
                let other = &mut other[..len];
                take(without, other, 0);
                for (y, &other) in y.iter_mut().zip(other.iter()) {
                    *y = S::mul_add(weight, *y - other, other);
                }
            }
            if output.scale != 1.0 {
                y.iter_mut().for_each(|y| *y *= output.scale);
            }
        }
    }

    simd::dispatch! {
        /// `factors[0] x + factors[1] y`, in place of y.
        fn mix<S>(y: &mut [f32], x: &[f32], factors: [f32; 2]) {
            for (y, &x) in y.iter_mut().zip(x) {
                *y = S::mul_add(factors[0], x, factors[1] * *y);
            }
        }
    }

    simd::dispatch! {
        /// `y + factor g`, in place of y.
        fn shift<S>(y: &mut [f32], g: &[f32], factor: f32) {
            for (y, &g) in y.iter_mut().zip(g) {
                *y = S::mul_add(factor, g, *y);
            }
        }
    }

    /// Calls `each` with `factors[0] x + factors[1] y` of image `i`, part by part from the first element on, or with
    /// that and a factor times a gradient.
    fn mixed(
        given: &Given<'_>,
        scale: Option<&Tensor>,
        i: usize,
        factors: [f64; 2],
        gradient: Option<(&Tensor, f32)>,
        mut each: impl FnMut(usize, &[f32]),
    ) {
        let (output, len) = (Output::of(given, scale, i), image(given.x.shape()));
        let (mut y, mut v) = ([0.0; PART], [0.0; PART]);
        for (k, x) in given.x.data()[i * len..][..len].chunks(PART).enumerate() {
            let (y, v) = (&mut y[..x.len()], &mut v[..x.len()]);
            output.read(y, v, k * PART);
            mix(y, x, factors.map(|f| f as f32));
            if let Some((gradient, factor)) = gradient {
                shift(y, &gradient.data()[i * len + k * PART..][..x.len()], factor);
            }
            each(k * PART, y);
        }
    }

    pub fn rescale(scale: &mut [f32], given: &Given<'_>, guidance: Guidance) {
        let len = image(given.x.shape());
        let sums = |output: Output<'_>| {
            let (mut y, mut v) = ([0.0; PART], [0.0; PART]);
            let (mut sum, mut squares) = (0.0, 0.0);
            for first in (0..len).step_by(PART) {
                let (y, v) = (&mut y[..PART.min(len - first)], &mut v[..PART.min(len - first)]);
                output.read(y, v, first);
                for &y in y.iter() {
                    (sum, squares) = (sum + f64::from(y), squares + f64::from(y) * f64::from(y));
                }
            }
            (squares - sum * sum / len as f64).max(0.0).sqrt()
        };
        scale.par_iter_mut().enumerate().for_each(|(i, scale)| {
            let output = Output::of(given, None, i);
            let (of_both, of_one) = (sums(output), sums(Output { without: None, ..output }));
            let phi = guidance.rescale;
            *scale = if of_both == 0.0 { 1.0 } else { (phi * (of_one / of_both) + (1.0 - phi)) as f32 };
        });
    }

    pub fn threshold(limits: &mut [f32], given: &Given<'_>, scale: Option<&Tensor>, step: &Step, quantile: Quantile) {
        limits.par_iter_mut().enumerate().for_each(|(i, limit)| {
            let mut sizes = Vec::with_capacity(image(given.x.shape()));
            mixed(given, scale, i, [step.x0_xt, step.x0_output], None, |_, x_0| {
                sizes.extend(x_0.iter().map(|x| x.abs()));
            });
            let (_, &mut low, above) = sizes.select_nth_unstable_by(quantile.rank, f32::total_cmp);
            let high = above.iter().copied().min_by(f32::total_cmp).unwrap_or(low);
            let [low, high] = [low, high].map(f64::from);
            let s = (low + quantile.fraction * (high - low)) as f32;
            *limit = if s > 1.0 { s.min(quantile.largest as f32) } else { 1.0 };
        });
    }

    /// A task: `CHUNK` elements of an image.
    struct Task<'a> {
        next: &'a mut [f32],
        x_0: Option<&'a mut [f32]>,
        image: usize,
        first: usize,
    }

    pub fn step(next: &mut [f32], x_0: Option<&mut [f32]>, given: &Given<'_>, per_image: PerImage<'_>, step: &Step) {
        let len = image(given.x.shape());
        let pieces = |x| <[f32]>::chunks_mut(x, len).flat_map(|x| x.chunks_mut(CHUNK));
        let mut x_0 = x_0.map(pieces);
        let per = len.div_ceil(CHUNK);
        let task = |(k, next)| {
            let x_0 = x_0.as_mut().map(|x_0| x_0.next().expect("x_0 is as long as x"));
            Task { next, x_0, image: k / per, first: k % per * CHUNK }
        };
        let tasks: Vec<Task<'_>> = pieces(next).enumerate().map(task).collect();
        tasks.into_par_iter().for_each(|Task { next, mut x_0, image: i, first }| {
            let output = Output::of(given, per_image.scale, i);
            let limit = match (per_image.limits, step.limit) {
                (Some(limits), _) => limits.data()[i],
                (None, Limit::Range(r)) => r as f32,
                (None, _) => f32::INFINITY,
            };
            let stream = given.noise.image(i);
            let part = |x: &Tensor, at: usize, n: usize| -> [f32; PART] {
                let mut part = [0.0; PART];
                part[..n].copy_from_slice(&x.data()[i * len + at..][..n]);
                part
            };
            for (k, next) in next.chunks_mut(PART).enumerate() {
                let (at, n) = (first + k * PART, next.len());
                let (mut y, mut v, mut z) = ([0.0; PART], [0.0; PART], [0.0; PART]);
                output.read(&mut y[..n], &mut v[..n], at);
                if step.sigma != 0.0 {
                    normals_from(&stream, at, &mut z[..n]);
                }
                let own = Own {
                    x: part(given.x, at, n),
                    before: given.before.map(|before| part(before, at, n)),
                    gradient: given.gradient.map(|(gradient, scale)| (part(gradient, at, n), scale)),
                    v,
                    z,
                    limit,
                    divided: per_image.limits.is_some(),
                };
                one(next, &mut y, &own, step);
                if let Some(x_0) = &mut x_0 {
                    x_0[k * PART..][..n].copy_from_slice(&y[..n]);
                }
            }
        });
    }

    /// What `PART` elements of a step read besides the prediction.
    struct Own {
        x: [f32; PART],
        before: Option<[f32; PART]>,
        gradient: Option<([f32; PART], f64)>,
        v: [f32; PART],
        z: [f32; PART],
        limit: f32,
        /// Whether x_0 is divided by the limit.
        divided: bool,
    }

    simd::dispatch! {
        /// The next x, and in place of the prediction y the x_0.
        fn one<S>(next: &mut [f32], y: &mut [f32; PART], own: &Own, step: &Step) {
            let [x0_xt, x0_output, c_x0, c_xt, c_before, sigma, variance] =
                [step.x0_xt, step.x0_output, step.c_x0, step.c_xt, step.c_before, step.sigma, step.variance]
                    .map(|v| v as f32);
            // Two comparisons instead of `clamp`, so that a NaN stays one and the loop vectorises.
            let clip = |x_0: f32, limit: f32| {
                let x_0 = if x_0 < -limit { -limit } else { x_0 };
                if x_0 > limit { limit } else { x_0 }
            };
            let limit = own.limit;
            for (y, &x) in y.iter_mut().zip(&own.x) {
                *y = clip(S::mul_add(x0_xt, x, x0_output * *y), limit);
            }
            if own.divided {
                y.iter_mut().for_each(|x_0| *x_0 /= limit);
            }
            let (mut sigmas, mut variances) = ([sigma; PART], [variance; PART]);
            if let Some(LogVariance { raw: true, .. }) = step.learned {
                variances = own.v;
                for (sigma, &v) in sigmas.iter_mut().zip(&own.v).filter(|(sigma, _)| **sigma != 0.0) {
                    *sigma *= v.sqrt();
                }
            } else if let Some(learned) = step.learned {
                let [offset, factor] = [learned.offset, learned.factor].map(|v| v as f32);
                for ((sigma, variance), &v) in sigmas.iter_mut().zip(&mut variances).zip(&own.v) {
                    let log_variance = S::mul_add(factor, v, offset);
                    (*sigma, *variance) = (*sigma * simd::exp::<S>(0.5 * log_variance), simd::exp::<S>(log_variance));
                }
            }
            let mut mean = [0.0; PART];
            if let Some((gradient, scale)) = &own.gradient {
                let [shift_x0, shift_mean] = [step.shift_x0 * scale, step.shift_mean * scale].map(|v| v as f32);
                let limit = step.bound_of_shifted() as f32;
                for (x_0, &g) in y.iter_mut().zip(gradient) {
                    *x_0 = clip(S::mul_add(shift_x0, g, *x_0), limit);
                }
                variances.iter_mut().for_each(|variance| *variance *= shift_mean);
            }
            for ((mean, &x_0), &x) in mean.iter_mut().zip(y.iter()).zip(&own.x) {
                *mean = S::mul_add(c_x0, x_0, c_xt * x);
            }
            if let Some(before) = &own.before {
                for (mean, &before) in mean.iter_mut().zip(before) {
                    *mean = S::mul_add(c_before, before, *mean);
                }
            }
            if let Some((gradient, _)) = &own.gradient {
                for ((mean, &g), &variance) in mean.iter_mut().zip(gradient).zip(&variances) {
                    *mean = S::mul_add(variance, g, *mean);
                }
            }
            for (((next, &mean), &sigma), &z) in next.iter_mut().zip(&mean).zip(&sigmas).zip(&own.z) {
                *next = S::mul_add(sigma, z, mean);
            }
        }
    }

    /// Calls `each` with eps and the noise of image `i` in a correction, part by part from the first element on.
    fn eps_and_z(
        given: &Given<'_>,
        scale: Option<&Tensor>,
        i: usize,
        correction: &Correction,
        mut each: impl FnMut(usize, &[f32], &[f32]),
    ) {
        let (stream, factors) = (given.noise.image(i), [correction.eps.xt, correction.eps.output]);
        let mut z = [0.0; PART];
        mixed(given, scale, i, factors, given.shift(correction), |first, eps| {
            let z = &mut z[..eps.len()];
            normals_from(&stream, first, z);
            each(first, eps, z);
        });
    }

    pub fn norms(
        factors: &mut [f32],
        given: &Given<'_>,
        scale: Option<&Tensor>,
        correction: &Correction,
        corrector: Corrector,
    ) {
        factors.par_chunks_exact_mut(2).enumerate().for_each(|(i, factors)| {
            let (mut of_eps, mut of_z) = (0.0, 0.0);
            let squares = |v: &[f32]| v.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
            eps_and_z(given, scale, i, correction, |_, eps, z| {
                of_eps += squares(eps);
                of_z += squares(z);
            });
            let ratio = corrector.snr * correction.noise;
            let e = if of_eps == 0.0 { 0.0 } else { 2.0 * correction.alpha * ratio * ratio * (of_z / of_eps) };
            (factors[0], factors[1]) = ((-e / correction.noise) as f32, (2.0 * e).sqrt() as f32);
        });
    }

    pub fn correct(
        next: &mut [f32],
        given: &Given<'_>,
        scale: Option<&Tensor>,
        factors: &[f32],
        correction: &Correction,
    ) {
        let len = image(given.x.shape());
        next.par_chunks_mut(len).zip(factors.par_chunks_exact(2)).enumerate().for_each(|(i, (next, factors))| {
            let x = &given.x.data()[i * len..][..len];
            eps_and_z(given, scale, i, correction, |first, eps, z| {
                let range = first..first + eps.len();
                corrected(&mut next[range.clone()], &x[range], eps, z, factors);
            });
        });
    }

    simd::dispatch! {
        fn corrected<S>(next: &mut [f32], x: &[f32], eps: &[f32], z: &[f32], factors: &[f32]) {
            for (((next, &x), &eps), &z) in next.iter_mut().zip(x).zip(eps).zip(z) {
                *next = S::mul_add(factors[1], z, S::mul_add(factors[0], eps, x));
            }
        }
    }

    pub fn diffuse(next: &mut [f32], from: &Tensor, kept: Option<(&Tensor, &Tensor)>, factors: [f32; 2], noise: Noise) {
        let len = image(from.shape());
        next.par_chunks_mut(len).enumerate().for_each(|(i, next)| {
            let stream = noise.image(i);
            let mut z = [0.0; PART];
            for (k, next) in next.chunks_mut(PART).enumerate() {
                let at = i * len + k * PART;
                let of = |x: &'_ Tensor| at..(at + next.len()).min(x.shape().len());
                if factors[1] != 0.0 {
                    normals_from(&stream, k * PART, &mut z[..next.len()]);
                }
                let range = of(from);
                noised(next, &from.data()[range.clone()], &z, factors);
                if let Some((mask, x)) = kept {
                    let own = mask.data()[range.clone()].iter().zip(&x.data()[range]);
                    next.iter_mut()
                        .zip(own)
                        .filter(|(_, (mask, _))| **mask != 0.0)
                        .for_each(|(next, (_, x))| *next = *x);
                }
            }
        });
    }

    simd::dispatch! {
        fn noised<S>(next: &mut [f32], from: &[f32], z: &[f32], factors: [f32; 2]) {
            for ((next, &from), &z) in next.iter_mut().zip(from).zip(z) {
                *next = S::mul_add(factors[1], z, factors[0] * from);
            }
        }
    }
}

mod cuda {
    use bytemuck::Zeroable;

    use super::*;
    use crate::device::cuda::{Gpu, Launch, each_four_of_images};
    use crate::kernels::philox::THREADS;
    use crate::kernels::sample_step::{
        CORRECT, DIFFUSE, LOGARITHM, NORMS, RAW, RESCALE, Reading, START, STEP, THRESHOLD,
    };

    impl Given<'_> {
        fn reading(&self) -> Reading {
            let (halves, doubled) = self.halves();
            let weight = self.guidance.map_or(1.0, |guidance| guidance.weight as f32);
            Reading { weight, halves: halves as u32, doubled: if doubled { self.x.shape().c as u32 } else { 0 } }
        }
    }

    impl<'a> Launch<'a> {
        /// What a gradient adds to the eps of a correction.
        fn gradient(self, given: &'a Given<'_>, correction: &Correction) -> Self {
            let (gradient, factor) = given.shift(correction).unzip();
            self.read_opt(gradient).f32(factor.unwrap_or(0.0))
        }

        fn noise(self, noise: Noise) -> Self {
            self.streams(noise.streams).u32(noise.row as usize)
        }
    }

    /// Images, and elements of one.
    fn extent(x: &Tensor) -> (usize, usize) {
        (x.shape().n, x.shape().len() / x.shape().n.max(1))
    }

    pub fn start(gpu: &Gpu, x: &mut Tensor, input: Option<&mut Tensor>, noise: Noise, copies: usize) -> Result<()> {
        let (n, image) = extent(x);
        let launch = gpu.launch(START.of(gpu.activations()), each_four_of_images(n, image), THREADS);
        launch.write(x).write_opt(input).u64(n).u64(image).u32(copies).noise(noise).run()
    }

    #[expect(clippy::too_many_arguments, reason = "a kernel's results and what it reads")]
    pub fn step(
        gpu: &Gpu,
        next: &mut Tensor,
        input: Option<&mut Tensor>,
        x_0: Option<&mut Tensor>,
        given: &Given<'_>,
        per_image: PerImage<'_>,
        step: &Step,
        copies: usize,
    ) -> Result<()> {
        let (n, image) = extent(given.x);
        let own = turn_of(step, given.noise, given.gradient.map(|(_, scale)| scale));
        let Turn { factors, step: number, .. } = by_value(gpu, own);
        let streams = Streams { step: number, ..given.noise.streams };
        let launch = gpu.launch(STEP.of(given.output.dtype()), each_four_of_images(n, image), THREADS);
        let launch = launch.write(next).write_opt(input).write_opt(x_0).read(given.x).read(given.output);
        let launch = launch.read_opt(given.before).read_opt(given.gradient.map(|(gradient, _)| gradient));
        let launch = launch.read_opt(per_image.scale).read_opt(per_image.limits).u64(n).u64(image).u32(copies);
        let learned = step.learned.map_or(0, |learned| if learned.raw { RAW } else { LOGARITHM });
        let launch = launch.u32(learned as usize).value(given.reading()).value(factors);
        launch.noise(Noise { streams, ..given.noise }).turn().run()
    }

    /// What of a step's turn is passed by value: all without a turn in device memory, otherwise nothing.
    fn by_value(gpu: &Gpu, own: Turn) -> Turn {
        match gpu.this_turn() {
            None => own,
            Some(turn) => {
                assert_eq!(*turn, own, "turn of the device and of the step");
                Turn::zeroed()
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a kernel's results and what it reads")]
    pub fn correct(
        gpu: &Gpu,
        next: &mut Tensor,
        input: Option<&mut Tensor>,
        given: &Given<'_>,
        scale: Option<&Tensor>,
        factors: &Tensor,
        correction: &Correction,
        copies: usize,
    ) -> Result<()> {
        let (n, image) = extent(given.x);
        let launch = gpu.launch(CORRECT.of(given.output.dtype()), each_four_of_images(n, image), THREADS);
        let launch = launch.write(next).write_opt(input).read(given.x).read(given.output).read_opt(scale).read(factors);
        let launch = launch.u64(n).u64(image).u32(copies);
        let launch = launch.f32(correction.eps.xt as f32).f32(correction.eps.output as f32);
        launch.value(given.reading()).noise(given.noise).gradient(given, correction).run()
    }

    #[expect(clippy::too_many_arguments, reason = "a kernel's results and what it reads")]
    pub fn diffuse(
        gpu: &Gpu,
        next: &mut Tensor,
        input: Option<&mut Tensor>,
        from: &Tensor,
        kept: Option<(&Tensor, &Tensor)>,
        [signal, noise]: [f32; 2],
        streams: Noise,
        copies: usize,
    ) -> Result<()> {
        let (n, image) = extent(from);
        let launch = gpu.launch(DIFFUSE.of(gpu.activations()), each_four_of_images(n, image), THREADS);
        let launch = launch.write(next).write_opt(input).read_opt(kept.map(|(_, x)| x)).read(from);
        let launch = launch.read_opt(kept.map(|(mask, _)| mask)).u64(n).u64(image).u32(copies);
        launch.f32(signal).f32(noise).noise(streams).run()
    }

    pub fn rescale(gpu: &Gpu, scale: &mut Tensor, given: &Given<'_>, guidance: Guidance) -> Result<()> {
        let (n, image) = extent(given.x);
        let launch = gpu.launch(RESCALE.of(given.output.dtype()), [n, 1, 1], THREADS);
        launch.write(scale).read(given.output).u64(n).u32(image).f64(guidance.rescale).value(given.reading()).run()
    }

    pub fn threshold(
        gpu: &Gpu,
        limits: &mut Tensor,
        given: &Given<'_>,
        scale: Option<&Tensor>,
        step: &Step,
        quantile: Quantile,
    ) -> Result<()> {
        let (n, image) = extent(given.x);
        let launch = gpu.launch(THRESHOLD.of(given.output.dtype()), [n, 1, 1], THREADS);
        let launch = launch.write(limits).read(given.x).read(given.output).read_opt(scale).u64(n).u32(image);
        let own = turn_of(step, given.noise, given.gradient.map(|(_, scale)| scale));
        let Factors { x0_xt, x0_output, .. } = by_value(gpu, own).factors;
        let launch = launch.f32(x0_xt).f32(x0_output).u32(quantile.rank);
        launch.f64(quantile.fraction).f32(quantile.largest as f32).value(given.reading()).turn().run()
    }

    pub fn norms(
        gpu: &Gpu,
        factors: &mut Tensor,
        given: &Given<'_>,
        scale: Option<&Tensor>,
        correction: &Correction,
        corrector: Corrector,
    ) -> Result<()> {
        let (n, image) = extent(given.x);
        let launch = gpu.launch(NORMS.of(given.output.dtype()), [n, 1, 1], THREADS);
        let launch = launch.write(factors).read(given.x).read(given.output).read_opt(scale).u64(n).u32(image);
        let launch = launch.f32(correction.eps.xt as f32).f32(correction.eps.output as f32).f64(correction.noise);
        let launch = launch.f64(2.0 * correction.alpha).f64(corrector.snr).value(given.reading());
        launch.noise(given.noise).gradient(given, correction).run()
    }
}
