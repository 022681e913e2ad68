//! The whole parameter update in one pass: gradient clipping, Adam or AdamW, and the moving average of the weights.
//!
//! With the step's number k from 1:
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
//! eps stands outside the bias correction, where PyTorch has it. Buffers are flat and of one length; where all of w, g,
//! m, v and ema are zero (the gaps between parameters) they stay zero. Numerics: f32; the factors are computed in f64,
//! so `1 - beta2` and `1 - ema_decay` keep their digits. Bound by memory: 20 bytes read and 16 written per parameter.

use crate::device::Device;

/// Numbers of one update.
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
    /// Added to the root of the corrected mean of squares.
    pub eps: f64,
    /// AdamW's decoupled weight decay, 0 for Adam.
    pub weight_decay: f64,
    /// Factor of the gradient, from [`clip_factor`](crate::ops::grad_norm::clip_factor).
    pub clip: f64,
    /// Decay of the moving average of the weights, from [`ema_decay`].
    pub ema_decay: f64,
}

/// The buffers of one update, all of the length of the flat parameters.
#[derive(Debug)]
pub struct Buffers<'a> {
    /// Weights.
    pub w: &'a mut [f32],
    /// Their moving average.
    pub ema: &'a mut [f32],
    /// Mean of gradients.
    pub m: &'a mut [f32],
    /// Mean of squared gradients.
    pub v: &'a mut [f32],
    /// Gradient.
    pub g: &'a [f32],
}

/// Updates weights, moments and moving average in place.
pub fn adam(device: &Device, buffers: Buffers<'_>, update: &Update) {
    let len = buffers.w.len();
    let lengths = [buffers.ema.len(), buffers.m.len(), buffers.v.len(), buffers.g.len()];
    assert!(lengths == [len; 4], "adam: {len} weights, but ema, m, v, g have {lengths:?}");
    assert!(update.step >= 1, "adam: updates are numbered from 1");
    match device {
        Device::Cpu(_) => cpu::update(buffers, update),
    }
}

/// The moving average's decay at update `step` (from 1): `min(decay, (1 + step)/(10 + step))`. A short run averages
/// over its last tenth instead of remembering its random start; `decay` itself is reached at step `9/(1 - decay)`,
/// 90,000 for 0.9999.
pub fn ema_decay(decay: f64, step: u64) -> f64 {
    decay.min((1.0 + step as f64) / (10.0 + step as f64))
}

/// The factors of one update, rounded for a float type.
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
    fn new(u: &Update) -> Self {
        let number = |v: f64| T::from(v).expect("every f64 has a nearest number");
        // beta^k underflows to 0 for large k, as it should; powf because k is a u64.
        let correction = |beta: f64| 1.0 - beta.powf(u.step as f64);
        Factors {
            clip: number(u.clip),
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

    /// One update of `[w, ema, m, v]` with gradient `g`.
    pub fn update<T: Float>([w, ema, m, v]: [&mut [T]; 4], g: &[T], update: &Update) {
        let f = Factors::<T>::new(update);
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

    /// Elements per task: five pieces of 64 KiB, large against the cost of handing out a task.
    const CHUNK: usize = 1 << 14;

    pub fn update(buffers: Buffers<'_>, update: &Update) {
        let factors = Factors::<f32>::new(update);
        let Buffers { w, ema, m, v, g } = buffers;
        let weights = w.par_chunks_mut(CHUNK).zip(ema.par_chunks_mut(CHUNK));
        let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let chunks = weights.zip(moments).zip(g.par_chunks(CHUNK));
        chunks.for_each(|(((w, ema), (m, v)), g)| chunk(w, ema, m, v, g, &factors));
    }

    simd::dispatch! {
        fn chunk<I>(w: &mut [f32], ema: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], f: &Factors<f32>) {
            let len = g.len();
            let (w, ema, m, v) = (&mut w[..len], &mut ema[..len], &mut m[..len], &mut v[..len]);
            for i in 0..len {
                let g = f.clip * g[i];
                m[i] = I::mul_add(f.one_beta1, g - m[i], m[i]);
                v[i] = I::mul_add(f.one_beta2 * g, g, f.beta2 * v[i]);
                let denominator = I::mul_add(f.unbias, v[i].sqrt(), f.eps);
                w[i] = I::mul_add(f.keep, w[i], -(f.rate * m[i] / denominator));
                ema[i] = I::mul_add(f.one_ema, w[i] - ema[i], ema[i]);
            }
        }
    }
}
