//! The whole parameter update in one pass: gradient clipping, Adam or AdamW, and the moving average of the weights.
//!
//! With the update's number k, from 1:
//!
//! ```text
//! g   = clip g                                   clip: min(1, max_norm / |g|), see grad_norm
//! w   = (1 - lr decay) w                         decoupled weight decay (Loshchilov and Hutter 2019); Adam with 0
//! m   = m + (1 - beta1) (g - m)                  Kingma and Ba 2015, algorithm 1
//! v   = beta2 v + (1 - beta2) g^2
//! w   = w - lr/(1 - beta1^k) m / (sqrt(v)/sqrt(1 - beta2^k) + eps)
//! ema = ema + (1 - ema_decay) (w - ema)
//! ```
//!
//! eps is outside the bias correction, as in PyTorch. Buffers are flat and have the same length; where w, g, m, v and
//! ema are all zero (the gaps between parameters) they stay zero. Numerics: f32; the factors are computed in f64, so `1
//! - beta2` and `1 - ema_decay` keep their digits. Bound by memory: 20 bytes read and 16 written per parameter.
//!
//! Of several ranks each updates its shard of the weights, and has moments and average of that alone (ZeRO stage 1,
//! Rajbhandari et al. 2020). The weights are then exchanged, and their bf16 copies made anew by [`round`].

use std::ops::Range;

use crate::device::Device;
use crate::error::Result;
use crate::kernels::clock::AdamFactors;
use crate::meter::Meter;
use crate::params::Params;
use crate::tensor::Tensor;

/// Settings of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Number of this update, from 1.
    pub step: u64,
    /// Learning rate, warm-up included.
    pub learning_rate: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the square root of the bias-corrected mean of squares.
    pub eps: f64,
    /// AdamW's decoupled weight decay, 0 for Adam.
    pub weight_decay: f64,
    /// Decay of the moving average of the weights, from [`ema_decay`].
    pub ema_decay: f64,
}

impl Update {
    /// The factors the kernel multiplies by, except the clipping factor, which is on the device.
    pub(crate) fn factors(&self) -> AdamFactors {
        let f = Factors::<f32>::new(self, 1.0);
        AdamFactors {
            keep: f.keep,
            one_beta1: f.one_beta1,
            beta2: f.beta2,
            one_beta2: f.one_beta2,
            rate: f.rate,
            unbias: f.unbias,
            eps: f.eps,
            one_ema: f.one_ema,
        }
    }
}

/// What one update reads and writes: all weights, or a shard of them.
pub struct State<'a> {
    /// Weights, of which those of the shard are updated.
    pub w: &'a mut Params,
    /// The shard's elements of the flat buffer; the other fields have as many.
    pub shard: Range<usize>,
    /// The weights' moving average.
    pub ema: &'a mut Tensor,
    /// Mean of gradients.
    pub m: &'a mut Tensor,
    /// Mean of squared gradients.
    pub v: &'a mut Tensor,
    /// Gradient.
    pub g: &'a Tensor,
}

/// Updates weights, moments and moving average in place. The gradient is multiplied by the clipping factor that
/// [`grad_norm`](crate::ops::grad_norm::grad_norm) wrote to the meter's row. The weights' bf16 copies are updated if
/// the shard is all of them. On a GPU whose updates are halted nothing changes.
///
/// # Errors
/// A GPU error.
pub fn adam(device: &Device, state: State<'_>, update: &Update, meter: &mut Meter) -> Result<()> {
    let State { w, shard, ema, m, v, g } = state;
    let (w, rounded) = w.tensors_mut();
    let rounded = rounded.filter(|_| shard.len() == w.shape().len());
    let lengths = [&*ema, &*m, &*v, g].map(|x| x.shape().len());
    assert_eq!(lengths, [shard.len(); 4], "adam: lengths of ema, m, v and g, and elements of the shard");
    assert!(update.step >= 1, "adam: updates are numbered from 1");
    match (device, meter) {
        (Device::Cpu(_), meter) => {
            let buffers = [&mut w.data_mut()[shard], ema.data_mut(), m.data_mut(), v.data_mut()];
            cpu::update(buffers, g.data(), update, meter.host_row().clip);
            Ok(())
        }
        (Device::Cuda(gpu), Meter::Cuda(meter)) => {
            cuda::update(gpu, (w, shard), [ema, m, v], rounded, g, update, meter)
        }
        (Device::Meta(_), _) => Ok(()),
        (Device::Cuda(gpu), Meter::Cpu(_)) => panic!("adam: the meter is not on {gpu}"),
    }
}

/// Makes the weights' bf16 copies anew, where there are any.
///
/// # Errors
/// A GPU error.
pub fn round(device: &Device, w: &mut Params) -> Result<()> {
    match (device, w.tensors_mut()) {
        (Device::Cuda(gpu), (w, Some(rounded))) => cuda::round(gpu, rounded, w),
        _ => Ok(()),
    }
}

/// The moving average's decay at update `step` (from 1): `min(decay, (1 + step)/(10 + step))`. So a short run averages
/// over about its last tenth instead of remembering its random start. `decay` itself is reached at about step `9/(1 -
/// decay)`, 90,000 for 0.9999.
pub fn ema_decay(decay: f64, step: u64) -> f64 {
    decay.min((1.0 + step as f64) / (10.0 + step as f64))
}

/// The factors of one update, rounded to a float type.
struct Factors<T> {
    clip: T,
    keep: T,
    one_beta1: T,
    beta2: T,
    one_beta2: T,
    /// `lr / (1 - beta1^k)`.
    rate: T,
    /// `1 / sqrt(1 - beta2^k)`.
    unbias: T,
    eps: T,
    one_ema: T,
}

impl<T: num_traits::Float> Factors<T> {
    fn new(u: &Update, clip: f64) -> Self {
        let number = |v: f64| T::from(v).expect("every f64 has a nearest number");
        // beta^k underflows to 0 for large k, as it should; powf because k is a u64.
        let correction = |beta: f64| 1.0 - beta.powf(u.step as f64);
        Factors {
            clip: number(clip),
            keep: number(1.0 - u.learning_rate * u.weight_decay),
            one_beta1: number(1.0 - u.beta1),
            beta2: number(u.beta2),
            one_beta2: number(1.0 - u.beta2),
            rate: number(u.learning_rate / correction(u.beta1)),
            unbias: number(1.0 / correction(u.beta2).sqrt()),
            eps: number(u.eps),
            one_ema: number(1.0 - u.ema_decay),
        }
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use super::{Factors, Update};

    /// One update of `[w, ema, m, v]` with gradient `clip g`.
    pub fn update<T: Float>([w, ema, m, v]: [&mut [T]; 4], g: &[T], update: &Update, clip: f64) {
        let f = Factors::<T>::new(update, clip);
        for i in 0..w.len() {
            let g = f.clip * g[i];
            m[i] = m[i] + f.one_beta1 * (g - m[i]);
            v[i] = f.beta2 * v[i] + f.one_beta2 * g * g;
            w[i] = f.keep * w[i] - f.rate * m[i] / (f.unbias * v[i].sqrt() + f.eps);
            ema[i] = ema[i] + f.one_ema * (w[i] - ema[i]);
        }
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::*;
    use crate::device::cpu::simd;

    /// Elements per task: five slices of 64 KiB, large compared with the cost of scheduling a task.
    const CHUNK: usize = 1 << 14;

    pub fn update([w, ema, m, v]: [&mut [f32]; 4], g: &[f32], update: &Update, clip: f64) {
        let factors = Factors::<f32>::new(update, clip);
        let weights = w.par_chunks_mut(CHUNK).zip(ema.par_chunks_mut(CHUNK));
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let chunks = weights.zip(moments).zip(g.par_chunks(CHUNK));
        chunks.for_each(|(((w, ema), (m, v)), g)| chunk(w, ema, m, v, g, &factors));
    }

    simd::dispatch! {
        fn chunk<S>(w: &mut [f32], ema: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], f: &Factors<f32>) {
            let len = g.len();
            let (w, ema, m, v) = (&mut w[..len], &mut ema[..len], &mut m[..len], &mut v[..len]);
            for i in 0..len {
                let g = f.clip * g[i];
                m[i] = S::mul_add(f.one_beta1, g - m[i], m[i]);
                v[i] = S::mul_add(f.one_beta2 * g, g, f.beta2 * v[i]);
                let denominator = S::mul_add(f.unbias, v[i].sqrt(), f.eps);
                w[i] = S::mul_add(f.keep, w[i], -(f.rate * m[i] / denominator));
                ema[i] = S::mul_add(f.one_ema, w[i] - ema[i], ema[i]);
            }
        }
    }
}

mod cuda {
    use bytemuck::Zeroable;

    use super::*;
    use crate::device::cuda::{Gpu, each_four};
    use crate::kernels::adam::{ROUND, UPDATE};
    use crate::kernels::philox::THREADS;
    use crate::meter::CudaMeter;

    pub fn update(
        gpu: &Gpu,
        (w, shard): (&mut Tensor, Range<usize>),
        [ema, m, v]: [&mut Tensor; 3],
        rounded: Option<&mut Tensor>,
        g: &Tensor,
        update: &Update,
        meter: &CudaMeter,
    ) -> Result<()> {
        let len = g.shape().len();
        assert!(len.is_multiple_of(4), "adam: {len} parameters, the flat buffer has a multiple of 4");
        let factors = match gpu.now() {
            None => update.factors(),
            Some(now) => {
                assert_eq!(now.adam, update.factors(), "adam: the clock and {update:?}");
                AdamFactors::zeroed()
            }
        };
        let launch = gpu.launch(&UPDATE, each_four(len), THREADS).view_mut(w.view_mut(shard));
        let launch = launch.write(ema).write(m).write(v).write_opt(rounded).read(g).view(meter.rows(gpu.now()));
        launch.buffer(meter.halt()).u64(len).value(factors).clock().run()
    }

    pub fn round(gpu: &Gpu, rounded: &mut Tensor, w: &Tensor) -> Result<()> {
        let len = w.shape().len();
        assert!(len.is_multiple_of(4), "adam: {len} parameters, the flat buffer has a multiple of 4");
        gpu.launch(&ROUND, each_four(len), THREADS).write(rounded).read(w).u64(len).run()
    }
}
