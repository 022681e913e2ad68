//! `y[i] = m[i] x[i] / (1 - rate)` with `m[i]` 0 with probability `rate`, else 1 (Srivastava et al. 2014, scaled in
//! training so that sampling needs no dropout).
//!
//! Each image has its own stream, and `m[i]` of element `i` of an image is a pure function of it: `m[i]` is 1 if word
//! `i % 4` of block `i / 4`, as an integer, is at least `rate 2^32` (rounded). So no mask is stored: nothing is saved,
//! the backward pass makes the mask again, and micro-batches get the masks of the whole batch.
//!
//! Gradient: `dx[i] = m[i] dy[i] / (1 - rate)`. One rounding per element, besides that of the scale. Least traffic: 8
//! bytes per element in f32 forward, and 8 backward, where `dx` overwrites `dy`. Ten rounds of Philox per four elements
//! cost about as much. Behind a group norm it is part of that operation ([`Then`](super::group_norm::Then)), which on a
//! GPU takes no pass of its own for it.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::rng::{Stream, Streams};
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::Tensor;

/// Drops each element with probability `rate`, in `[0, 1)`. On a tape that does not record, or with rate 0, `y` is `x`.
pub fn dropout(tape: &mut Tape<'_>, x: &Var, rate: f32, streams: Streams) -> Result<Var> {
    let mask = Mask::new(rate, streams);
    if rate == 0.0 || !tape.is_recording() {
        return Ok(x.clone());
    }
    let mut y = Tensor::uninit(tape.device(), x.value().dtype(), x.shape())?;
    match tape.device() {
        Device::Cpu(_) => cpu::forward(y.data_mut(), x.data(), mask, x.shape().n),
        Device::Cuda(gpu) => cuda::forward(gpu, &mut y, x.value(), mask)?,
        Device::Meta(_) => {}
    }
    tape.push("dropout", y, || DropoutBackward { x: x.id(), mask })
}

/// What determines the mask.
#[derive(Clone, Copy)]
pub(super) struct Mask {
    pub streams: Streams,
    /// Elements whose word is at least this are kept.
    pub threshold: u32,
    /// `1 / (1 - rate)`.
    pub scale: f32,
}

impl Mask {
    pub fn new(rate: f32, streams: Streams) -> Self {
        assert!((0.0..1.0).contains(&rate), "dropout: rate {rate} is not in [0, 1)");
        let threshold = (f64::from(rate) * (1u64 << 32) as f64).round() as u32;
        Mask { streams, threshold, scale: 1.0 / (1.0 - rate) }
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
        let mut dx = dy.into_unique(grads.device())?;
        in_place(grads.device(), &mut dx, self.mask)?;
        grads.add(x, dx)
    }
}

/// Drops elements of `x`, which no other handle shares.
pub(super) fn in_place(device: &Device, x: &mut Tensor, mask: Mask) -> Result<()> {
    match device {
        Device::Cpu(_) => {
            let n = x.shape().n;
            cpu::in_place(x.data_mut(), mask, n);
            Ok(())
        }
        Device::Cuda(gpu) => cuda::in_place(gpu, x, mask),
        Device::Meta(_) => Ok(()),
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use crate::rng::Streams;

    /// `n` images dropped and scaled.
    pub fn forward<T: Float>(x: &[T], n: usize, rate: T, streams: Streams) -> Vec<T> {
        let number = |v: f64| T::from(v).expect("a float");
        let threshold = (rate * number(4_294_967_296.0)).to_f64().expect("a float").round();
        let image = x.len() / n;
        let keep = |i: usize| {
            let k = i % image;
            f64::from(streams.image(i / image).block((k / 4) as u32)[k % 4]) >= threshold
        };
        x.iter().enumerate().map(|(i, &x)| if keep(i) { x / (T::one() - rate) } else { T::zero() }).collect()
    }

    /// The same mask on the gradient: the operation is linear and its own transpose.
    pub fn backward<T: Float>(dy: &[T], n: usize, rate: T, streams: Streams) -> Vec<T> {
        forward(dy, n, rate, streams)
    }
}

mod cpu {
    use super::*;
    use crate::device::cpu::simd;

    /// Elements per task, of one image: 16 KiB, about 5 us of Philox. A multiple of 4, so that tasks start on blocks.
    const CHUNK: usize = 1 << 12;

    pub fn forward(y: &mut [f32], x: &[f32], mask: Mask, n: usize) {
        let image = y.len() / n;
        y.par_chunks_mut(image).zip(x.par_chunks(image)).enumerate().for_each(|(i, (y, x))| {
            let stream = mask.streams.image(i);
            let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate();
            chunks.for_each(|(k, (y, x))| {
                y.copy_from_slice(x);
                drop_some(y, mask, stream, k * CHUNK);
            });
        });
    }

    pub fn in_place(x: &mut [f32], mask: Mask, n: usize) {
        let image = x.len() / n;
        x.par_chunks_mut(image).enumerate().for_each(|(i, x)| {
            let stream = mask.streams.image(i);
            let chunks = x.par_chunks_mut(CHUNK).enumerate();
            chunks.for_each(|(k, x)| drop_some(x, mask, stream, k * CHUNK));
        });
    }

    simd::dispatch! {
        /// Multiplies elements `first..` of an image by 0 or the scale.
        fn drop_some<S>(x: &mut [f32], mask: Mask, stream: Stream, first: usize) {
            let factor = |word: u32| if word >= mask.threshold { mask.scale } else { 0.0 };
            let block = (first / 4) as u32;
            let (fours, rest) = x.as_chunks_mut::<4>();
            let last = block + fours.len() as u32;
            for (block, four) in (block..).zip(fours) {
                four.iter_mut().zip(stream.block(block)).for_each(|(x, word)| *x *= factor(word));
            }
            rest.iter_mut().zip(stream.block(last)).for_each(|(x, word)| *x *= factor(word));
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::{Gpu, Launch, each_four_of_images};
    use crate::kernels::dropout::MASK;
    use crate::kernels::philox::THREADS;
    use crate::tensor::Shape;

    pub fn forward(gpu: &Gpu, y: &mut Tensor, x: &Tensor, mask: Mask) -> Result<()> {
        let shape = x.shape();
        apply(gpu.launch(MASK.of(x.dtype()), grid(shape), THREADS).write(y).read(x), shape, mask)
    }

    pub fn in_place(gpu: &Gpu, x: &mut Tensor, mask: Mask) -> Result<()> {
        let shape = x.shape();
        apply(gpu.launch(MASK.of(x.dtype()), grid(shape), THREADS).write(x).first_again(), shape, mask)
    }

    fn grid(shape: Shape) -> [usize; 3] {
        each_four_of_images(shape.n, shape.len() / shape.n)
    }

    fn apply(launch: Launch<'_>, shape: Shape, mask: Mask) -> Result<()> {
        let launch = launch.u64(shape.n).u64(shape.len() / shape.n).streams_of_step(mask.streams);
        launch.u32(mask.threshold as usize).f32(mask.scale).clock().run()
    }
}
