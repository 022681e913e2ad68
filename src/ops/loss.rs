//! The training losses ([`Objective`]) and their gradients, in one pass; and the terms of the variational bound.
//!
//! L_simple of eps (DDPM, equation 14), [`loss`]: `L = 1/N sum_i L_i`, `L_i = 1/d sum_k (y_ik - eps_ik)^2` over the N
//! images of a step and the d elements of an image; `dL/dy_ik = 2 (y_ik - eps_ik) / (N d)`. eps is redrawn from the
//! batch's streams, so only the prediction is read.
//!
//! Every other loss, [`any`]: `L_i = 1/d sum_k (squared d_ik^2 + bound l_ik)`, d the distance from the target and l the
//! bound's term, with the factors of the image's timestep ([`Row`](crate::diffusion::objective::Row)), which are
//! uploaded once ([`Table`]). x_0 is made again from its bytes, as in q_sample. If the variance is learned, the output
//! has twice the channels: in each pixel first the prediction, then v. A schedule in training moves the factors and
//! x_t: [`of_schedule`] takes the sums of which the derivative of the bound by it is made ([`Sums`]).
//!
//! Shapes: prediction and gradient `(n, h, w, c)`, of a learned variance `(n, h, w, 2c)`; the n images may be one
//! micro-batch of the step's N. Numerics: differences and terms in f32, squares and sums in f64 over fixed chunks, so
//! per-image losses have the same bits for any number of threads.

use std::f64::consts::LN_2;

use bytemuck::Zeroable;

use crate::device::Device;
use crate::device::cuda::Buffer;
use crate::diffusion::learned::{SUMS, Sums};
use crate::diffusion::{Batch, Objective, Prediction, Schedule};
use crate::error::Result;
use crate::images::Source;
use crate::kernels::loss::Row;
use crate::meter::Meter;
use crate::tensor::{DType, Shape, Tensor};

/// The loss of a batch.
pub struct Loss {
    /// L_i of each image, without its weight in the batch. CPU only: a GPU just sums them by quarter into the meter.
    pub per_image: Option<Vec<f64>>,
    /// The same on a GPU in parts, if the batch has weights: for [`Table::losses`].
    pub partial: Option<Buffer>,
    /// Elements of an image.
    pub image: usize,
    /// dL/dy, shaped like the prediction, if requested.
    pub gradient: Option<Tensor>,
}

impl Loss {
    /// Mean over the batch's images, if they are known; not finite if any element of the prediction is not.
    pub fn mean(&self) -> Option<f64> {
        self.per_image.as_ref().map(|l| l.iter().sum::<f64>() / l.len() as f64)
    }
}

/// An objective with the factors of every timestep, rounded to f32, on a device.
pub struct Table {
    objective: Objective,
    /// A row for every timestep of the chain that the network was trained on. Those that the objective's chain leaves
    /// out are NaN: a loss there would not be finite.
    rows: Vec<Row>,
    on_gpu: Option<Buffer>,
}

impl Table {
    /// The table of an objective.
    ///
    /// # Errors
    /// A GPU error.
    pub fn new(device: &Device, objective: Objective) -> Result<Self> {
        let rows: Vec<Row> = (0..objective.schedule().len() as u32).map(|t| row(&objective, t)).collect();
        let on_gpu = match device {
            Device::Cuda(gpu) => {
                let mut buffer = gpu.alloc(size_of_val(&rows[..]))?;
                gpu.upload(&mut buffer, &rows)?;
                Some(buffer)
            }
            _ => None,
        };
        Ok(Table { objective, rows, on_gpu })
    }

    /// Takes the factors of the same objective on another schedule of as many timesteps, in the same memory.
    ///
    /// # Errors
    /// A GPU error.
    pub fn follow(&mut self, schedule: &Schedule) -> Result<()> {
        assert_eq!(schedule.len(), self.rows.len(), "timesteps of the schedule and of the table");
        self.objective = self.objective.clone().on(schedule);
        self.rows = (0..schedule.len() as u32).map(|t| row(&self.objective, t)).collect();
        match &mut self.on_gpu {
            Some(buffer) => buffer.gpu().clone().upload(buffer, &self.rows),
            None => Ok(()),
        }
    }

    /// L_i of each image, without its weight, at its timestep, from [`Loss::partial`] as it is downloaded; of images of
    /// `image` elements.
    pub fn losses(&self, t: &[u32], image: usize, partial: &[[f64; 2]]) -> Vec<f64> {
        let of_image = |(t, chunks): (&u32, &[[f64; 2]])| {
            let row = &self.rows[*t as usize];
            let [squares, nats] = [0, 1].map(|k| chunks.iter().map(|chunk| chunk[k]).sum::<f64>() / image as f64);
            f64::from(row.squared) * squares + f64::from(row.bound) * nats
        };
        t.iter().zip(partial.chunks(partial.len() / t.len())).map(of_image).collect()
    }

    /// Its objective.
    pub fn objective(&self) -> &Objective {
        &self.objective
    }
}

/// The factors of timestep `t` in f32.
fn row(objective: &Objective, t: u32) -> Row {
    let Some(row) = objective.row(t) else {
        let nan = f32::NAN;
        return Row {
            byte: nan,
            eps: nan,
            squared: nan,
            bound: nan,
            x_0_error: nan,
            mean_error: nan,
            ..Zeroable::zeroed()
        };
    };
    Row {
        byte: (row.target.0 / 255.0) as f32,
        eps: row.target.1 as f32,
        squared: row.squared as f32,
        bound: row.bound as f32,
        bound_mean: if objective.stops_mean() { 0.0 } else { row.bound as f32 },
        x_0_error: row.x_0_error as f32,
        mean_of_x_0: row.mean_of_x_0 as f32,
        mean_error: row.mean_error as f32,
        shift: row.shift as f32,
        scale: row.scale as f32,
        half_bin: row.half_bin as f32,
        unused: 0.0,
    }
}

/// What the predicted x_0 is confined to in [`terms`].
#[derive(Clone, Copy)]
pub enum Bounds<'a> {
    /// Nothing.
    None,
    /// [-r, r].
    Range(f64),
    /// [-s, s], then divided by s, with an s for each image: (n, 1, 1, 1), f32 (dynamic thresholding).
    PerImage(&'a Tensor),
}

impl Bounds<'_> {
    /// The bound of image `i`, on the CPU.
    fn of_image(self, i: usize) -> f32 {
        match self {
            Bounds::None => f32::INFINITY,
            Bounds::Range(r) => r as f32,
            Bounds::PerImage(s) => s.data()[i],
        }
    }
}

/// What evaluation measures of each image, at its timestep.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Terms {
    /// The term of the bound, in bits per dimension.
    pub vlb: Vec<f64>,
    /// Mean squared error of the predicted x_0.
    pub mse_x0: Vec<f64>,
    /// Mean squared error of the eps that follows from the predicted x_0.
    pub mse_eps: Vec<f64>,
}

/// L_simple of eps: adds L_i of each image to the meter's row, in the quarter of its timestep. With `step_images` = N,
/// the number of images in the step (all its micro-batches), also computes dL/dy; `None`, for a validation loss,
/// computes no gradient. `t` (n, 1, 1, 1) holds the batch's timesteps on the device, from
/// [`q_sample`](crate::ops::q_sample::q_sample).
///
/// # Errors
/// A GPU error.
pub fn loss(
    device: &Device,
    prediction: &Tensor,
    batch: &Batch,
    t: &Tensor,
    step_images: Option<usize>,
    meter: &mut Meter,
) -> Result<Loss> {
    let shape = prediction.shape();
    assert_eq!(shape.n, batch.len(), "loss: prediction {shape} for {} images", batch.len());
    assert!(!shape.is_empty(), "loss: prediction {shape}");
    let image = shape.len() / shape.n;
    let dtype = prediction.dtype();
    let mut gradient = step_images.map(|_| Tensor::uninit(device, dtype, shape)).transpose()?;
    let factor = (2.0 / (step_images.unwrap_or(shape.n) as f64 * image as f64)) as f32;
    let per_image = match (device, meter) {
        (Device::Cpu(_), meter) => {
            let dy = gradient.as_mut().map(|dy| dy.data_mut());
            let per_image = cpu::forward(prediction.data(), batch, image, factor, dy);
            meter.add(&batch.t(), batch.timesteps, &per_image, None, None);
            Some(per_image)
        }
        (Device::Cuda(gpu), Meter::Cuda(meter)) => {
            cuda::forward(gpu, prediction, batch, t, factor, gradient.as_mut(), meter)?;
            None
        }
        (Device::Meta(_), _) => None,
        (Device::Cuda(gpu), Meter::Cpu(_)) => panic!("loss: the meter is not on {gpu}"),
    };
    Ok(Loss { per_image, partial: None, image, gradient })
}

/// The loss of a [`Table`]'s objective, with the batch's weights: as [`loss`], but for the `source` from which q_sample
/// made x_t. Adds the bound to the meter's row, too, if the objective has one.
///
/// # Errors
/// A GPU error.
#[allow(clippy::too_many_arguments)]
pub fn any(
    device: &Device,
    output: &Tensor,
    source: Source<'_>,
    batch: &Batch,
    t: &Tensor,
    table: &Table,
    step_images: Option<usize>,
    meter: &mut Meter,
) -> Result<Loss> {
    if table.objective.is_plain() && batch.weights.is_none() {
        return loss(device, output, batch, t, step_images, meter);
    }
    let extent = Extent::of(output, source, batch, table);
    let dtype = output.dtype();
    let mut gradient = step_images.map(|_| Tensor::uninit(device, dtype, output.shape())).transpose()?;
    let factor = (1.0 / (step_images.unwrap_or(batch.len()) as f64 * extent.image() as f64)) as f32;
    let (per_image, partial) = match (device, source, meter) {
        (Device::Cpu(_), Source::Host(images), meter) => {
            let dy = gradient.as_mut().map(|dy| dy.data_mut());
            let (per_image, vlb) = cpu::any(output.data(), images, batch, table, extent, factor, dy);
            let weight = |i: usize| batch.weights.as_ref().map_or(1.0, |w| f64::from(w[i]));
            let weighted: Vec<f64> = per_image.iter().enumerate().map(|(i, l)| weight(i) * l).collect();
            let vlb_sum = vlb.iter().enumerate().map(|(i, l)| weight(i) * l).sum();
            meter.add(&batch.t(), batch.timesteps, &weighted, None, Some(vlb_sum));
            (Some(per_image), None)
        }
        (Device::Cuda(gpu), source @ Source::Cuda { .. }, Meter::Cuda(meter)) => {
            let dy = gradient.as_mut();
            let partial = cuda::any(gpu, output, source, batch, t, table, extent, factor, dy, meter)?;
            (None, batch.weights.is_some().then_some(partial))
        }
        (Device::Meta(_), ..) => (None, None),
        (device, ..) => panic!("loss: the images or the meter are not on {device}"),
    };
    Ok(Loss { per_image, partial, image: extent.image(), gradient })
}

/// The terms of the bound and the errors of the predictions, of each image at its timestep, without a gradient. The
/// predicted x_0 is confined to `bounds`, and the mean is that of the confined x_0, but for a network that predicts the
/// mean itself; eps is always that of the x_0. An output of doubled channels goes with a fixed variance, too, which
/// then replaces the network's. Waits for a GPU.
///
/// # Errors
/// A GPU error.
pub fn terms(
    device: &Device,
    output: &Tensor,
    source: Source<'_>,
    batch: &Batch,
    t: &Tensor,
    table: &Table,
    bounds: Bounds<'_>,
) -> Result<Terms> {
    let extent = Extent::of(output, source, batch, table);
    if let Bounds::PerImage(s) = bounds {
        let wanted = Shape::new(batch.len(), 1, 1, 1);
        assert_eq!((s.shape(), s.dtype()), (wanted, DType::F32), "loss: the bounds of the images");
    }
    let [nats, squares] = match (device, source) {
        (Device::Cpu(_), Source::Host(images)) => cpu::terms(output.data(), images, batch, table, extent, bounds),
        (Device::Cuda(gpu), source @ Source::Cuda { .. }) => {
            cuda::terms(gpu, output, source, batch, t, table, extent, bounds)?
        }
        (device, _) => panic!("loss: the images are not on {device}"),
    };
    let snr = |t: &u32| table.objective.row(*t).map_or(f64::NAN, |row| row.snr);
    let mse_eps = batch.t().iter().zip(&squares).map(|(t, mse)| snr(t) * mse).collect();
    Ok(Terms { vlb: nats.into_iter().map(|nats| nats / LN_2).collect(), mse_x0: squares, mse_eps })
}

/// [`Sums`] of each image, or on a GPU of parts of them.
pub enum OfSchedule {
    /// Of each image.
    Host(Vec<Sums<f64>>),
    /// (n, parts, [`SUMS`]), f64.
    Cuda(Buffer),
}

impl OfSchedule {
    /// [`Sums`] of each of `n` images, from [`OfSchedule::Cuda`] as it is downloaded.
    pub fn of_images(n: usize, parts: &[f64]) -> Vec<Sums<f64>> {
        let of_image = |parts: &[f64]| {
            let part = |sums: Sums<f64>, part: &[f64]| std::array::from_fn(|k| sums[k] + part[k]);
            parts.chunks(SUMS).fold([0.0; SUMS], part)
        };
        parts.chunks(parts.len() / n).map(of_image).collect()
    }
}

/// What the derivative of [`any`]'s loss by the schedule is made of, for a loss that is the bound. `dx` is the
/// derivative of the loss by x_t, shaped like x_t, from the tape.
///
/// # Errors
/// A GPU error.
pub fn of_schedule(
    device: &Device,
    (output, dx): (&Tensor, &Tensor),
    source: Source<'_>,
    batch: &Batch,
    t: &Tensor,
    table: &Table,
) -> Result<OfSchedule> {
    let extent = Extent::of(output, source, batch, table);
    let x_t = Shape { n: batch.len(), ..source.shape() };
    assert_eq!((dx.shape(), dx.dtype()), (x_t, output.dtype()), "loss: the derivative by x_t");
    match (device, source) {
        (Device::Cpu(_), Source::Host(images)) => {
            Ok(OfSchedule::Host(cpu::of_schedule((output.data(), dx.data()), images, batch, table, extent)))
        }
        (Device::Cuda(gpu), source @ Source::Cuda { .. }) => {
            Ok(OfSchedule::Cuda(cuda::of_schedule(gpu, (output, dx), source, batch, t, table, extent)?))
        }
        (device, _) => panic!("loss: the images are not on {device}"),
    }
}

/// Extent of the images of an output, and how it holds them.
#[derive(Clone, Copy)]
struct Extent {
    h: usize,
    w: usize,
    c: usize,
    /// The output has a second half of channels.
    doubled: bool,
}

impl Extent {
    fn of(output: &Tensor, source: Source<'_>, batch: &Batch, table: &Table) -> Self {
        let (shape, Shape { h, w, c, .. }) = (output.shape(), source.shape());
        // A network with a second half of channels may be asked for its prediction alone.
        let doubled = table.objective.variance().is_learned() || shape.c == 2 * c;
        let wanted = Shape::new(batch.len(), h, w, if doubled { 2 * c } else { c });
        assert_eq!(shape, wanted, "loss: the output of {} images", batch.len());
        assert_eq!(batch.timesteps as usize, table.rows.len(), "loss: timesteps of the batch and of the table");
        assert!(!shape.is_empty(), "loss: output {shape}");
        Extent { h, w, c, doubled }
    }

    /// Elements of an image.
    fn image(self) -> usize {
        self.h * self.w * self.c
    }

    /// Channels of the output.
    fn channels(self) -> usize {
        if self.doubled { 2 * self.c } else { self.c }
    }

    /// Elements of an image's output.
    fn output(self) -> usize {
        self.h * self.w * self.channels()
    }
}

/// The definition.
pub mod reference {
    use num_traits::{Float, FloatConst};

    use crate::diffusion::learned::{SUMS, Sums};
    use crate::diffusion::objective::LEAST_PROBABILITY;
    use crate::diffusion::{Batch, Objective, Prediction, Variance};
    use crate::images::Images;
    use crate::ops::q_sample;
    use crate::rng::reference::normals;

    /// L_i of each image.
    pub fn forward<T: Float + FloatConst>(prediction: &[T], batch: &Batch) -> Vec<T> {
        let image = prediction.len() / batch.len();
        let per_image = |(i, y): (usize, &[T])| {
            let eps = normals(&batch.noise.image(i), 0, image);
            let sum = y.iter().zip(&eps).fold(T::zero(), |sum, (&y, &eps)| sum + (y - eps) * (y - eps));
            sum / T::from(image).expect("a length is a number")
        };
        prediction.chunks(image).enumerate().map(per_image).collect()
    }

    /// dL/dy of the mean over `step_images` images.
    pub fn backward<T: Float + FloatConst>(prediction: &[T], batch: &Batch, step_images: usize) -> Vec<T> {
        let image = prediction.len() / batch.len();
        let factor = T::from(2.0 / (step_images as f64 * image as f64)).expect("every f64 has a nearest number");
        let of_image = |(i, y): (usize, &[T])| {
            let eps = normals::<T>(&batch.noise.image(i), 0, image);
            y.iter().zip(eps).map(|(&y, eps)| factor * (y - eps)).collect::<Vec<T>>()
        };
        prediction.chunks(image).enumerate().flat_map(of_image).collect()
    }

    /// What an element of an image contributes.
    #[derive(Clone, Copy, Debug)]
    pub struct Element<T> {
        /// Square of the output's distance from the target.
        pub square: T,
        /// The bound's term, in nats.
        pub nats: T,
        /// Square of the error of the predicted x_0.
        pub x_0_square: T,
        /// Derivatives of `square` and of `nats` by the prediction, and of `nats` by v.
        pub gradient: [T; 3],
        /// Derivative of `nats` by the logarithm of the variance of p.
        pub by_log_p: T,
    }

    fn number<T: Float>(v: f64) -> T {
        T::from(v).expect("every f64 has a nearest number")
    }

    /// What each element of an image of `c` channels contributes at timestep `t`, from x_0, eps and the network's
    /// output; the predicted x_0 is `confined` as in [`terms`](super::terms), without the gradients through that.
    pub fn elements<T: Float + FloatConst>(
        objective: &Objective,
        t: u32,
        [x_0, eps, output]: [&[T]; 3],
        c: usize,
        confined: &dyn Fn(T) -> T,
    ) -> Vec<Element<T>> {
        let (prediction, variance, chain) = (objective.prediction(), objective.variance(), objective.chain());
        let i = objective.kept().binary_search(&t).expect("a timestep that is kept");
        let (schedule, t) = (objective.schedule(), t as usize);
        let (of_x_0, of_eps) = prediction.target(schedule, t);
        let (c_x0, c_xt) = chain.posterior_mean_coefficients(i);
        let to_x_0 = prediction.x_0(schedule, t);
        let small: T = number(chain.log_variance(Variance::FixedSmall, i));
        let large: T = number(chain.betas()[i].ln());
        let x_t = q_sample::reference::forward(x_0, eps, t, schedule);
        let doubled = output.len() > x_0.len();
        let element = |k: usize| {
            let (x_0, eps, x_t) = (x_0[k], eps[k], x_t[k]);
            let at = if doubled { k / c * 2 * c + k % c } else { k };
            let y = output[at];
            let half: T = number(0.5);
            // ln of the variance of p, and its derivative by v.
            let (log_p, by_v) = match variance {
                Variance::Learned => (output[at + c], T::one()),
                Variance::LearnedRaw => (output[at + c].ln(), output[at + c].recip()),
                Variance::LearnedRange => {
                    let share = (output[at + c] + T::one()) * half;
                    (share * large + (T::one() - share) * small, half * (large - small))
                }
                fixed => (number(chain.log_variance(fixed, i)), T::zero()),
            };
            let distance = y - (number::<T>(of_x_0) * x_0 + number::<T>(of_eps) * eps);
            let free = number::<T>(to_x_0.xt) * x_t + number::<T>(to_x_0.output) * y;
            let clipped = confined(free);
            let mean = |x_0: T| number::<T>(c_x0) * x_0 + number::<T>(c_xt) * x_t;
            let mean_p = mean(if prediction == Prediction::Mu { free } else { clipped });
            let (nats, by_mean, by_log_p) = match i {
                0 => decoder(x_0, mean_p, log_p),
                _ => divergence(mean(x_0), small, mean_p, log_p),
            };
            let by_y = by_mean * number(c_x0 * to_x_0.output);
            Element {
                square: distance * distance,
                nats,
                x_0_square: (clipped - x_0) * (clipped - x_0),
                gradient: [distance + distance, by_y, by_log_p * by_v],
                by_log_p,
            }
        };
        (0..x_0.len()).map(element).collect()
    }

    /// KL(N(mean_q, exp log_q) || N(mean_p, exp log_p)) in nats, and its derivatives by `mean_p` and `log_p`.
    fn divergence<T: Float>(mean_q: T, log_q: T, mean_p: T, log_p: T) -> (T, T, T) {
        let (half, difference) = (number::<T>(0.5), mean_q - mean_p);
        let (ratio, square) = ((log_q - log_p).exp(), difference * difference * (-log_p).exp());
        let nats = half * (log_p - log_q - T::one() + ratio + square);
        (nats, -difference * (-log_p).exp(), half * (T::one() - ratio - square))
    }

    /// -ln of the probability of a byte whose value is `x_0` (DDPM, equation 13), and its derivatives by the mean and
    /// the log variance. The normal distribution is `(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2`, as in the paper's
    /// code, and the probability at least 1e-12.
    pub fn decoder<T: Float + FloatConst>(x_0: T, mean: T, log_p: T) -> (T, T, T) {
        let (half, one) = (number::<T>(0.5), T::one());
        let root = (number::<T>(2.0) / T::PI()).sqrt();
        let cube = number::<T>(0.044715);
        let below = |x: T| half * (one + (root * (x + cube * x * x * x)).tanh());
        let density = |x: T| {
            let tanh = (root * (x + cube * x * x * x)).tanh();
            half * (one - tanh * tanh) * root * (one + number::<T>(3.0) * cube * x * x)
        };
        let scale = (-half * log_p).exp();
        let bin = number::<T>(1.0 / 255.0);
        let (upper, lower) = (scale * (x_0 - mean + bin), scale * (x_0 - mean - bin));
        // The ends of the scale take all that is beyond them.
        let (first, last) = (x_0 < number(-0.999), x_0 > number(0.999));
        let or = |end: bool, value: T, of_end: T| if end { of_end } else { value };
        let probability = match (first, last) {
            (true, _) => below(upper),
            (_, true) => one - below(lower),
            _ => below(upper) - below(lower),
        };
        let (by_upper, by_lower) = (or(last, density(upper), T::zero()), or(first, density(lower), T::zero()));
        let least = number(LEAST_PROBABILITY);
        if probability < least {
            return (-least.ln(), T::zero(), T::zero());
        }
        let by_mean = -scale * (by_upper - by_lower);
        let by_log_p = -half * (by_upper * upper - by_lower * lower);
        (-probability.ln(), -by_mean / probability, -by_log_p / probability)
    }

    /// The sums over an image of `c` channels at timestep `t`, from x_0, eps, the network's output, and `dx`, the
    /// derivative of the training loss by x_t.
    pub fn of_schedule<T: Float + FloatConst>(
        objective: &Objective,
        t: u32,
        [x_0, eps, output, dx]: [&[T]; 4],
        c: usize,
    ) -> Sums<T> {
        let row = objective.row(t).expect("a timestep that is kept");
        let doubled = objective.variance().is_learned();
        let (of_x_0, of_eps) = row.target;
        let mut sums = [T::zero(); SUMS];
        for (k, element) in elements(objective, t, [x_0, eps, output], c, &|x_0| x_0).into_iter().enumerate() {
            let at = if doubled { k / c * 2 * c + k % c } else { k };
            let d = output[at] - (number::<T>(of_x_0) * x_0[k] + number::<T>(of_eps) * eps[k]);
            let v = if doubled { output[at + c] } else { T::zero() };
            // z is mean_error d, and delta is ln of the variance of q minus that of p.
            let (dz, ddelta) = (element.gradient[1] / number(row.mean_error), -element.by_log_p);
            let parts = [dz * d, dz * x_0[k], dz * eps[k], ddelta, ddelta * v, dx[k] * x_0[k], dx[k] * eps[k]];
            sums = std::array::from_fn(|j| sums[j] + parts[j]);
        }
        sums
    }

    /// x_0, eps and the output of image `i` of a batch.
    fn of_image<'a, T: Float + FloatConst>(
        images: Images<'_>,
        batch: &Batch,
        output: &'a [T],
        i: usize,
    ) -> (Vec<T>, Vec<T>, &'a [T]) {
        let x_0 = q_sample::reference::x_0(images, batch, i);
        let eps = normals(&batch.noise.image(i), 0, x_0.len());
        let len = output.len() / batch.len();
        (x_0, eps, &output[i * len..][..len])
    }

    /// L_i of each image, without its weight.
    pub fn any<T: Float + FloatConst>(
        objective: &Objective,
        images: Images<'_>,
        batch: &Batch,
        output: &[T],
    ) -> Vec<T> {
        let per_image = |(i, t): (usize, u32)| {
            let row = objective.row(t).expect("a timestep that is kept");
            let (x_0, eps, y) = of_image(images, batch, output, i);
            let all = elements(objective, t, [&x_0, &eps, y], images.shape.c, &|x_0| x_0);
            let (squared, bound) = (number::<T>(row.squared), number::<T>(row.bound));
            // 0 times what is infinite is no number.
            let bound_of = |nats: T| if row.bound == 0.0 { T::zero() } else { bound * nats };
            let sum = all.iter().fold(T::zero(), |sum, e| sum + squared * e.square + bound_of(e.nats));
            sum / number(x_0.len() as f64)
        };
        batch.t().into_iter().enumerate().map(per_image).collect()
    }

    /// The gradient of the mean over `step_images` images, with the weights of the batch.
    pub fn any_backward<T: Float + FloatConst>(
        objective: &Objective,
        images: Images<'_>,
        batch: &Batch,
        output: &[T],
        step_images: usize,
    ) -> Vec<T> {
        let (c, doubled) = (images.shape.c, objective.variance().is_learned());
        let of_batch = |(i, t): (usize, u32)| {
            let row = objective.row(t).expect("a timestep that is kept");
            let (x_0, eps, y) = of_image(images, batch, output, i);
            let weight = batch.weights.as_ref().map_or(1.0, |w| f64::from(w[i]));
            let factor = weight / (step_images as f64 * x_0.len() as f64);
            let (squared, bound) = (number::<T>(factor * row.squared), number::<T>(factor * row.bound));
            let bound_mean = if objective.stops_mean() { T::zero() } else { bound };
            let all = elements(objective, t, [&x_0, &eps, y], c, &|x_0| x_0);
            let mut dy = vec![T::zero(); y.len()];
            for (k, Element { gradient: [by_y, bound_by_y, bound_by_v], .. }) in all.into_iter().enumerate() {
                let at = if doubled { k / c * 2 * c + k % c } else { k };
                dy[at] = squared * by_y + if bound_mean == T::zero() { T::zero() } else { bound_mean * bound_by_y };
                if doubled {
                    dy[at + c] = bound * bound_by_v;
                }
            }
            dy
        };
        batch.t().into_iter().enumerate().flat_map(of_batch).collect()
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::*;
    use crate::device::cpu::simd;
    use crate::images::Images;
    use crate::rng::{Stream, normals_from};

    /// Elements per task, of one image.
    const CHUNK: usize = 1 << 12;
    /// Normals drawn at a time, on the stack.
    const NOISE: usize = 256;

    /// L_i of each image of `len` elements; writes `factor (y - eps)` to `dy` if given.
    pub fn forward(y: &[f32], batch: &Batch, len: usize, factor: f32, dy: Option<&mut [f32]>) -> Vec<f64> {
        // The images' chunks in order, each with its slice of dy, which is empty if no gradient is wanted.
        let mut tasks: Vec<(Stream, usize, &[f32], &mut [f32])> = Vec::new();
        let mut left = dy.unwrap_or_default();
        let wanted = !left.is_empty();
        for (i, image) in y.chunks(len).enumerate() {
            for (k, y) in image.chunks(CHUNK).enumerate() {
                let (dy, rest) = left.split_at_mut(if wanted { y.len() } else { 0 });
                left = rest;
                tasks.push((batch.noise.image(i), k * CHUNK, y, dy));
            }
        }
        let sum = |(stream, first, y, dy): (Stream, usize, &[f32], &mut [f32])| chunk(&stream, first, y, dy, factor);
        let sums: Vec<f64> = tasks.into_par_iter().map(sum).collect();
        sums.chunks(len.div_ceil(CHUNK)).map(|image| image.iter().sum::<f64>() / len as f64).collect()
    }

    simd::dispatch! {
        /// Sum of the squared differences of elements `first..` of an image, and their gradient.
        fn chunk<S>(stream: &Stream, first: usize, y: &[f32], dy: &mut [f32], factor: f32) -> f64 {
            let mut eps = [0.0; NOISE];
            // Sixteen running sums, so that the additions do not wait for each other; joined in a fixed order.
            let mut sums = [0.0f64; 16];
            for (k, y) in y.chunks(NOISE).enumerate() {
                let eps = &mut eps[..y.len()];
                normals_from(stream, first + k * NOISE, eps);
                eps.iter_mut().zip(y).for_each(|(eps, y)| *eps = y - *eps);
                let (lanes, rest) = eps.as_chunks::<16>();
                for d in lanes {
                    sums.iter_mut().zip(d).for_each(|(sum, &d)| *sum += f64::from(d) * f64::from(d));
                }
                sums.iter_mut().zip(rest).for_each(|(sum, &d)| *sum += f64::from(d) * f64::from(d));
                if !dy.is_empty() {
                    dy[k * NOISE..][..y.len()].iter_mut().zip(&*eps).for_each(|(dy, d)| *dy = factor * d);
                }
            }
            sums.iter().sum()
        }
    }

    /// A term of the bound in nats and its derivatives by z and delta.
    #[derive(Clone, Copy, Default)]
    struct Term {
        nats: f32,
        dz: f32,
        ddelta: f32,
    }

    /// The divergence of q from p, whose means differ by z standard deviations of q and log variances by delta.
    fn divergence(z: f32, delta: f32) -> Term {
        let expm1 = delta.exp_m1();
        let square = z * z * (expm1 + 1.0);
        Term { nats: 0.5 * ((expm1 - delta) + square), dz: z * (expm1 + 1.0), ddelta: 0.5 * (expm1 + square) }
    }

    fn softplus(x: f32) -> f32 {
        // `if`, not `max`, which would turn NaN into a number.
        let positive = if x < 0.0 { 0.0 } else { x };
        positive + (-x.abs()).exp().ln_1p()
    }

    fn sigmoid(x: f32) -> f32 {
        1.0 / (1.0 + (-x).exp())
    }

    /// The decoder: -ln of the probability of byte `u`, whose bin is `half_bin` around x_0, z beside the mean. With the
    /// normal distribution approximated by `sigmoid(g(x))`, `g(x) = C (x + CUBE x^3)`, the difference of two of its
    /// values is `sigmoid(a) sigmoid(-b) (1 - exp(b - a))`, which cancels nowhere.
    fn decoder(z: f32, delta: f32, half_bin: f32, u: u8) -> Term {
        const C: f32 = 1.595_769_2; // 2 sqrt(2 / pi)
        const CUBE: f32 = 0.044715;
        const LEAST: f32 = 27.631_021; // -ln of LEAST_PROBABILITY
        let r = (0.5 * delta).exp();
        let (upper, lower) = (r * (half_bin - z), r * (-half_bin - z));
        let g = |x: f32| C * x * (1.0 + CUBE * x * x);
        let slope = |x: f32| C * (1.0 + 3.0 * CUBE * x * x);
        let (a, b, width) = (g(upper), g(lower), 2.0 * r * half_bin);
        let squares = upper * upper + upper * lower + lower * lower;
        let apart = C * width * (1.0 + CUBE * squares); // a - b
        let (first, last) = (u == 0, u == 255);
        let (mut nats, mut dupper, mut dlower) = (0.0, 0.0, 0.0);
        if !last {
            nats += softplus(-a);
            dupper = -sigmoid(-a) * slope(upper);
        }
        if !first {
            nats += softplus(b);
            dlower = sigmoid(b) * slope(lower);
        }
        let (mut dz, mut ddelta) = (-r * (dupper + dlower), 0.5 * (dupper * upper + dlower * lower));
        if !first && !last {
            nats -= (-(-apart).exp_m1()).ln();
            let rest = C * width / apart.exp_m1();
            dz += r * rest * 3.0 * CUBE * (upper + lower);
            ddelta -= 0.5 * rest * (1.0 + 3.0 * CUBE * squares);
        }
        // The floor has no slope. What is not a number stays that.
        if nats > LEAST { Term { nats: LEAST, dz: 0.0, ddelta: 0.0 } } else { Term { nats, dz, ddelta } }
    }

    /// What an element is compared by.
    #[derive(Clone, Copy)]
    struct Difference {
        /// Its index in the image.
        k: usize,
        /// Its index in the image's output.
        at: usize,
        /// Distance of the output from the target.
        d: f32,
        /// ln of the variance of q minus that of p.
        delta: f32,
        eps: f32,
        byte: u8,
    }

    impl Difference {
        fn x_0(&self) -> f32 {
            (2 * i32::from(self.byte) - 255) as f32 / 255.0
        }
    }

    /// Calls `f` for elements `first..first + len` of image `i`, whose output is `y`.
    fn each_difference(
        (y, first, len): (&[f32], usize, usize),
        (images, batch, i, mirrored): (Images<'_>, &Batch, usize, bool),
        row: &Row,
        Extent { w, c, doubled, .. }: Extent,
        mut f: impl FnMut(Difference),
    ) {
        let shape = images.shape;
        let image = &images.pixels[batch.indices[i] * (shape.len() / shape.n)..];
        let stream = batch.noise.image(i);
        let mut eps = [0.0; NOISE];
        for begin in (first..first + len).step_by(NOISE) {
            let eps = &mut eps[..NOISE.min(first + len - begin)];
            normals_from(&stream, begin, eps);
            for (k, eps) in (begin..).zip(eps) {
                let (pixel, channel) = (k / c, k % c);
                let at = if doubled { pixel * 2 * c + channel } else { k };
                let byte = image[if mirrored { (pixel / w * w + w - 1 - pixel % w) * c + channel } else { k }];
                let centred = (2 * i32::from(byte) - 255) as f32;
                let d = y[at] - row.byte.mul_add(centred, row.eps * *eps);
                let delta = -if doubled { row.scale.mul_add(y[at + c], row.shift) } else { row.shift };
                f(Difference { k, at, d, delta, eps: *eps, byte });
            }
        }
    }

    /// L_i of each image without its weight, and T times its term of the bound in bits per dimension; writes the
    /// gradient with the weights to `dy` if given.
    pub fn any(
        y: &[f32],
        images: Images<'_>,
        batch: &Batch,
        table: &Table,
        extent: Extent,
        factor: f32,
        dy: Option<&mut [f32]>,
    ) -> (Vec<f64>, Vec<f64>) {
        let (t, flip) = (batch.t(), batch.flip());
        let row = |i: usize| &table.rows[t[i] as usize];
        let mut left = dy.unwrap_or_default();
        let wanted = !left.is_empty();
        let sum = |(i, first, count, dy): (usize, usize, usize, &mut [f32])| {
            let (row, weight) = (row(i), batch.weights.as_ref().map_or(1.0, |weights| weights[i]));
            let (has_bound, factor) = (row.bound != 0.0, weight * factor);
            let y = &y[i * extent.output()..][..extent.output()];
            let begin = first / extent.c * extent.channels();
            let (mut squares, mut nats) = (0.0, 0.0);
            each_difference(
                (y, first, count),
                (images, batch, i, flip[i]),
                row,
                extent,
                |Difference { at, d, delta, byte, .. }| {
                    squares += f64::from(d) * f64::from(d);
                    let z = row.mean_error * d;
                    let term = match has_bound {
                        false => Term::default(),
                        true if row.half_bin != 0.0 => decoder(z, delta, row.half_bin, byte),
                        true => divergence(z, delta),
                    };
                    nats += f64::from(term.nats);
                    if !dy.is_empty() {
                        let by_mean = row.bound_mean * term.dz * row.mean_error;
                        dy[at - begin] = factor * (2.0 * row.squared * d + by_mean);
                        if extent.doubled {
                            dy[at - begin + extent.c] = -factor * row.bound * term.ddelta * row.scale;
                        }
                    }
                },
            );
            [squares, nats]
        };
        let mut tasks = Vec::new();
        for (i, first, count) in extent.tasks(batch.len()) {
            let (dy, rest) = left.split_at_mut(if wanted { count / extent.c * extent.channels() } else { 0 });
            left = rest;
            tasks.push((i, first, count, dy));
        }
        let sums: Vec<[f64; 2]> = tasks.into_par_iter().map(sum).collect();
        let bits = table.objective.chain().len() as f64 / LN_2;
        let per_image = |(i, sums): (usize, [f64; 2])| {
            let [squares, nats] = sums.map(|sum| sum / extent.image() as f64);
            (f64::from(row(i).squared) * squares + f64::from(row(i).bound) * nats, bits * nats)
        };
        joined(&sums, batch.len()).into_iter().enumerate().map(per_image).unzip()
    }

    /// Mean over each image of the bound's term in nats, and of the squared error of x_0.
    pub fn terms(
        y: &[f32],
        images: Images<'_>,
        batch: &Batch,
        table: &Table,
        extent: Extent,
        bounds: Bounds<'_>,
    ) -> [Vec<f64>; 2] {
        let (t, flip) = (batch.t(), batch.flip());
        let (clip, divide) = (!matches!(bounds, Bounds::None), matches!(bounds, Bounds::PerImage(_)));
        let keep_mean = table.objective.prediction() == Prediction::Mu;
        let sum = |(i, first, count): (usize, usize, usize)| {
            let row = &table.rows[t[i] as usize];
            let (y, bound) = (&y[i * extent.output()..][..extent.output()], bounds.of_image(i));
            let (mut nats, mut squares) = (0.0, 0.0);
            each_difference(
                (y, first, count),
                (images, batch, i, flip[i]),
                row,
                extent,
                |difference @ Difference { d, delta, byte, .. }| {
                    let (mut error, mut z) = (row.x_0_error * d, row.mean_error * d);
                    if clip {
                        let x_0 = difference.x_0();
                        // Comparisons keep what is not a number.
                        if x_0 + error > bound {
                            error = bound - x_0;
                        }
                        if x_0 + error < -bound {
                            error = -bound - x_0;
                        }
                        if divide {
                            error = (x_0 + error) / bound - x_0;
                        }
                        if !keep_mean {
                            z = row.mean_of_x_0 * error;
                        }
                    }
                    let decodes = row.half_bin != 0.0;
                    let term = if decodes { decoder(z, delta, row.half_bin, byte) } else { divergence(z, delta) };
                    nats += f64::from(term.nats);
                    squares += f64::from(error) * f64::from(error);
                },
            );
            [nats, squares]
        };
        let tasks: Vec<(usize, usize, usize)> = extent.tasks(batch.len()).collect();
        let sums: Vec<[f64; 2]> = tasks.into_par_iter().map(sum).collect();
        let mean = |sums: [f64; 2]| sums.map(|sum| sum / extent.image() as f64);
        let (nats, squares) = joined(&sums, batch.len()).into_iter().map(mean).map(<(f64, f64)>::from).unzip();
        [nats, squares]
    }

    /// What the derivative by the schedule is made of, of each image.
    pub fn of_schedule(
        (y, dx): (&[f32], &[f32]),
        images: Images<'_>,
        batch: &Batch,
        table: &Table,
        extent: Extent,
    ) -> Vec<Sums<f64>> {
        let (t, flip) = (batch.t(), batch.flip());
        let sum = |(i, first, count): (usize, usize, usize)| {
            let row = &table.rows[t[i] as usize];
            let (y, dx) = (&y[i * extent.output()..][..extent.output()], &dx[i * extent.image()..][..extent.image()]);
            let mut sums = [0.0; SUMS];
            each_difference((y, first, count), (images, batch, i, flip[i]), row, extent, |difference| {
                let Difference { k, at, d, delta, eps, byte } = difference;
                let (z, x_0) = (row.mean_error * d, difference.x_0());
                let decodes = row.half_bin != 0.0;
                let Term { dz, ddelta, .. } =
                    if decodes { decoder(z, delta, row.half_bin, byte) } else { divergence(z, delta) };
                let v = if extent.doubled { y[at + extent.c] } else { 0.0 };
                let factors = [(dz, d), (dz, x_0), (dz, eps), (ddelta, 1.0), (ddelta, v), (dx[k], x_0), (dx[k], eps)];
                for (sum, (a, b)) in sums.iter_mut().zip(factors) {
                    *sum += f64::from(a) * f64::from(b);
                }
            });
            sums
        };
        let tasks: Vec<(usize, usize, usize)> = extent.tasks(batch.len()).collect();
        let sums: Vec<Sums<f64>> = tasks.into_par_iter().map(sum).collect();
        OfSchedule::of_images(batch.len(), sums.as_flattened())
    }

    impl Extent {
        /// Tasks over whole pixels: the image, its first element and how many.
        fn tasks(self, images: usize) -> impl Iterator<Item = (usize, usize, usize)> {
            let (image, size) = (self.image(), CHUNK * self.c);
            (0..images)
                .flat_map(move |i| (0..image).step_by(size).map(move |first| (i, first, size.min(image - first))))
        }
    }

    /// The sums of all tasks of each image, in order.
    fn joined(sums: &[[f64; 2]], images: usize) -> Vec<[f64; 2]> {
        let add = |[a, b]: [f64; 2], [c, d]: &[f64; 2]| [a + c, b + d];
        sums.chunks(sums.len() / images).map(|image| image.iter().fold([0.0; 2], add)).collect()
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::Gpu;
    use crate::kernels::loss::{self as kernel, ANY, CHUNK, CLIP, FWD, KEEP_MEAN, SCHEDULE, TERMS};
    use crate::kernels::philox::THREADS;
    use crate::meter::CudaMeter;
    use crate::rng::Purpose;

    pub fn forward(
        gpu: &Gpu,
        y: &Tensor,
        batch: &Batch,
        t: &Tensor,
        factor: f32,
        dy: Option<&mut Tensor>,
        meter: &mut CudaMeter,
    ) -> Result<()> {
        let shape = y.shape();
        assert!(shape.n <= 65535, "loss: {} images at once", shape.n);
        let image = shape.len() / shape.n;
        let chunks = image.div_ceil(CHUNK);
        assert!(shape.n * chunks < 1 << 31, "loss: {} chunks; the kernel counts to 2^31", shape.n * chunks);
        let mut partial = gpu.alloc(8 * shape.n * chunks)?; // (n, chunks), f64
        let row = meter.for_writing(gpu.now());
        let launch = gpu.launch(FWD.of(y.dtype()), [chunks, shape.n, 1], THREADS).write_opt(dy).view_mut(row.rows);
        let launch = launch.buffer_mut(&mut partial).buffer_mut(row.done).read(y).read(t).u64(image);
        let launch = launch.u32(batch.timesteps as usize).f32(factor).streams_of_step(batch.noise);
        launch.u32(row.has_losses.into()).clock().run()?;
        *row.fresh = false;
        Ok(())
    }

    /// Blocks along an image. The kernels find its elements with 32 bits.
    fn chunks(extent: Extent, n: usize) -> usize {
        let chunks = extent.image().div_ceil(CHUNK);
        assert!(n <= 65535, "loss: {n} images at once");
        assert!(extent.image() < 1 << 31, "loss: {} elements of an image; the kernel counts to 2^31", extent.image());
        assert!(n * chunks < 1 << 31, "loss: {} chunks; the kernel counts to 2^31", n * chunks);
        chunks
    }

    /// The table's rows; without them on this device there is no launch.
    fn rows(table: &Table) -> &Buffer {
        table.on_gpu.as_ref().expect("a table made for this GPU")
    }

    #[allow(clippy::too_many_arguments)]
    pub fn any(
        gpu: &Gpu,
        y: &Tensor,
        source: Source<'_>,
        batch: &Batch,
        t: &Tensor,
        table: &Table,
        extent: Extent,
        factor: f32,
        dy: Option<&mut Tensor>,
        meter: &mut CudaMeter,
    ) -> Result<Buffer> {
        let Source::Cuda { pixels, rows: indices, .. } = source else { unreachable!("checked by the caller") };
        let n = batch.len();
        let chunks = chunks(extent, n);
        let mut partial = gpu.alloc(2 * 8 * n * chunks)?; // (n, chunks, 2), f64
        let weights = match &batch.weights {
            None => None,
            Some(weights) => Some(Tensor::from_slice(&Device::Cuda(gpu.clone()), Shape::new(n, 1, 1, 1), weights)?),
        };
        let row = meter.for_writing(gpu.now());
        let launch = gpu.launch(ANY.of(y.dtype()), [chunks, n, 1], THREADS).write_opt(dy).view_mut(row.rows);
        let launch = launch.buffer_mut(&mut partial).buffer_mut(row.done).read(y).read(t).buffer(pixels);
        let launch = launch.view(indices.view(gpu.now())).buffer(rows(table)).read_opt(weights.as_ref());
        let launch = launch
            .u32(extent.image())
            .u32(extent.w)
            .u32(extent.c)
            .u32(extent.doubled.into())
            .u32(batch.timesteps as usize);
        let launch = launch.f64(table.objective.chain().len() as f64 / LN_2).f32(factor);
        let launch = launch.streams_of_step(batch.noise).u32(Purpose::Flip as usize).u32(batch.flips.is_some().into());
        launch.u32(row.has_losses.into()).clock().run()?;
        *row.fresh = false;
        Ok(partial)
    }

    #[allow(clippy::too_many_arguments)]
    pub fn terms(
        gpu: &Gpu,
        y: &Tensor,
        source: Source<'_>,
        batch: &Batch,
        t: &Tensor,
        table: &Table,
        extent: Extent,
        bounds: Bounds<'_>,
    ) -> Result<[Vec<f64>; 2]> {
        let Source::Cuda { pixels, rows: indices, .. } = source else { unreachable!("checked by the caller") };
        let n = batch.len();
        let chunks = chunks(extent, n);
        let clip = match (bounds, table.objective.prediction()) {
            (Bounds::None, _) => 0,
            (_, Prediction::Mu) => KEEP_MEAN,
            _ => CLIP,
        };
        let (range, limits) = match bounds {
            Bounds::None => (f32::INFINITY, None),
            Bounds::Range(r) => (r as f32, None),
            Bounds::PerImage(s) => (f32::INFINITY, Some(s)),
        };
        let mut partial = gpu.alloc(2 * 8 * n * chunks)?; // (n, chunks, 2), f64
        let launch = gpu.launch(TERMS.of(y.dtype()), [chunks, n, 1], THREADS).buffer_mut(&mut partial).read(y).read(t);
        let launch = launch.buffer(pixels).view(indices.view(None)).buffer(rows(table)).read_opt(limits);
        let launch = launch.u32(extent.image()).u32(extent.w).u32(extent.c).u32(extent.doubled.into());
        let launch = launch.streams(batch.noise).u32(Purpose::Flip as usize).u32(batch.flips.is_some().into());
        launch.u32(clip as usize).f32(range).run()?;
        let mut sums = vec![[0.0f64; 2]; n * chunks];
        gpu.download(&mut sums, &partial)?;
        let mean = |image: &[[f64; 2]], k: usize| image.iter().map(|s| s[k]).sum::<f64>() / extent.image() as f64;
        Ok([0, 1].map(|k| sums.chunks(chunks).map(|image| mean(image, k)).collect()))
    }

    const _: () = assert!(SUMS == kernel::SUMS, "numbers that the kernel writes");

    pub fn of_schedule(
        gpu: &Gpu,
        (y, dx): (&Tensor, &Tensor),
        source: Source<'_>,
        batch: &Batch,
        t: &Tensor,
        table: &Table,
        extent: Extent,
    ) -> Result<Buffer> {
        let Source::Cuda { pixels, rows: indices, .. } = source else { unreachable!("checked by the caller") };
        let n = batch.len();
        let chunks = chunks(extent, n);
        let mut partial = gpu.alloc(SUMS * 8 * n * chunks)?; // (n, chunks, SUMS), f64
        let launch = gpu.launch(SCHEDULE.of(y.dtype()), [chunks, n, 1], THREADS).buffer_mut(&mut partial).read(y);
        let launch = launch
            .read(dx)
            .read(t)
            .buffer(pixels)
            .view(indices.view(gpu.now()))
            .buffer(rows(table))
            .u32(extent.image());
        let launch = launch.u32(extent.w).u32(extent.c).u32(extent.doubled.into()).streams_of_step(batch.noise);
        launch.u32(Purpose::Flip as usize).u32(batch.flips.is_some().into()).clock().run()?;
        Ok(partial)
    }
}
