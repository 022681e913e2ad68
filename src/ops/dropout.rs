//! `y[i] = m[i] x[i] / (1 - rate)` with `m[i]` 0 with probability `rate`, else 1 (Srivastava et al. 2014, scaled in training so that
//! nothing is to be done when sampling).
//!
//! `m[i]` is a pure function of the stream: word `i % 4` of its block `i / 4`, kept if the word, as an integer, is at least
//! `rate 2^32` (rounded). So no mask is stored: nothing is saved, and the backward pass makes the mask again.
//!
//! Gradient: `dx[i] = m[i] dy[i] / (1 - rate)`. One rounding per element, beside that of the scale. Least traffic: 8 bytes a number forward,
//! 8 backward, where `dx` is written over `dy`; ten rounds of Philox for four numbers cost about as much.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::rng::Stream;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::Tensor;

/// Drops each element with probability `rate` (in `[0, 1)`). On a tape that does not record, and with rate 0, `y` is `x`.
pub fn dropout(tape: &mut Tape<'_>, x: &Var, rate: f32, stream: Stream) -> Result<Var> {
    assert!((0.0..1.0).contains(&rate), "dropout: rate {rate} is not in [0, 1)");
    if rate == 0.0 || !tape.is_recording() {
        return Ok(x.clone());
    }
    let mut y = Tensor::uninit(tape.device(), x.shape());
    let mask = Mask::new(rate, stream);
    match tape.device() {
        Device::Cpu(_) => cpu::forward(y.data_mut(), x.data(), mask),
    }
    tape.push("dropout", y, || DropoutBackward { x: x.id(), mask })
}

/// What the mask is made from.
#[derive(Clone, Copy)]
struct Mask {
    stream: Stream,
    /// Words from here on keep their element.
    threshold: u32,
    /// `1 / (1 - rate)`.
    scale: f32,
}

impl Mask {
    fn new(rate: f32, stream: Stream) -> Self {
        let threshold = (f64::from(rate) * (1u64 << 32) as f64).round() as u32;
        Mask { stream, threshold, scale: 1.0 / (1.0 - rate) }
    }
}

struct DropoutBackward {
    x: Option<VarId>,
    mask: Mask,
}

impl Backward for DropoutBackward {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Some(x) = self.x else { return Ok(()) };
        let mut dx = dy.into_unique(grads.device());
        match grads.device() {
            Device::Cpu(_) => cpu::backward(dx.data_mut(), self.mask),
        }
        grads.add(x, dx);
        Ok(())
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use crate::rng::Stream;

    /// `x` dropped and scaled.
    pub fn forward<T: Float>(x: &[T], rate: T, stream: Stream) -> Vec<T> {
        let number = |v: f64| T::from(v).expect("a float");
        let keep = |i: usize| {
            f64::from(stream.block((i / 4) as u32)[i % 4])
                >= (rate * number(4_294_967_296.0)).to_f64().expect("a float").round()
        };
        x.iter().enumerate().map(|(i, &x)| if keep(i) { x / (T::one() - rate) } else { T::zero() }).collect()
    }

    /// The same mask on the gradient: the operation is linear and its own transpose.
    pub fn backward<T: Float>(dy: &[T], rate: T, stream: Stream) -> Vec<T> {
        forward(dy, rate, stream)
    }
}

mod cpu {
    use super::*;
    use crate::device::cpu::simd;

    /// Elements per task: 16 KiB, some 5 us of Philox. A multiple of 4, so that tasks start on blocks.
    const CHUNK: usize = 1 << 12;

    pub fn forward(y: &mut [f32], x: &[f32], mask: Mask) {
        let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate();
        chunks.for_each(|(i, (y, x))| {
            let factors = factors(mask, i);
            y.iter_mut().zip(x).zip(&factors).for_each(|((y, x), factor)| *y = x * factor);
        });
    }

    /// `dx` comes in as `dy`.
    pub fn backward(dx: &mut [f32], mask: Mask) {
        dx.par_chunks_mut(CHUNK).enumerate().for_each(|(i, dx)| {
            let factors = factors(mask, i);
            dx.iter_mut().zip(&factors).for_each(|(dx, factor)| *dx *= factor);
        });
    }

    simd::dispatch! {
        /// 0 or the scale for each element of chunk `chunk`.
        fn factors<I>(mask: Mask, chunk: usize) -> [f32; CHUNK] {
            let first = (chunk * (CHUNK / 4)) as u32;
            let mut factors = [0.0; CHUNK];
            for (block, four) in (first..).zip(factors.as_chunks_mut::<4>().0) {
                for (factor, word) in four.iter_mut().zip(mask.stream.block(block)) {
                    *factor = if word >= mask.threshold { mask.scale } else { 0.0 };
                }
            }
            factors
        }
    }
}
