//! Group normalisation (Wu and He 2018, eq. 1 to 3), with an optional scale and shift of each image's channels and an
//! optional SiLU after it.
//!
//! `x`, `y (n,h,w,c)`; `gamma`, `beta (1,1,1,c)`. The channels form `g` groups of `c/g` neighbours. For one image and
//! group, with `N = h w c/g` elements:
//!
//! ```text
//! mean = sum x / N      var = sum (x - mean)^2 / N      rstd = 1 / sqrt(var + eps)
//! xhat = (x - mean) rstd      z = gamma xhat + beta      y = z, or silu(z)
//! ```
//!
//! Gradient: `dz = dy`, or `dy silu'(z)` with `z` recomputed. `dgamma = sum dz xhat` and `dbeta = sum dz` over images
//! and pixels. `mean` and `rstd` depend on every `x` of the group, `d mean / dx = 1/N` and `d rstd / dx = -rstd^2 xhat
//! / N`, which gives
//!
//! ```text
//! dx = rstd (gamma dz - s1 - xhat s2),   s1 = sum gamma dz / N,   s2 = sum gamma dz xhat / N   over the group
//! ```
//!
//! With `scale_shift (n,1,1,2c)`, each image's scales before its shifts (OpenAI's `use_scale_shift_norm`, diffusers'
//! `resnet_time_scale_shift`), `z = (gamma xhat + beta) (1 + scale) + shift`. That is the `z` above with coefficients
//! of the image's own, `gamma (1 + scale)` and `beta (1 + scale) + shift`, so no pass over the image is added. With
//! sums over the pixels of one image,
//!
//! ```text
//! dshift = sum dz      dscale = gamma sum dz xhat + beta sum dz
//! dgamma = sum over images of (1 + scale) sum dz xhat      dbeta = sum over images of (1 + scale) sum dz
//! ```
//!
//! `x` may be two tensors whose channels follow one another ([`Joined`]); a group may have channels of both.
//!
//! [Dropout](super::dropout) may follow ([`Then`]): then `y` is `m scale` times the above and `dz` has `m scale dy` for
//! `dy`, where `m` is a function of the stream and is made again backward.
//!
//! Saved: `x`, per image and group `mean` (as the sum of two f32) and `rstd`, and `scale_shift`.
//!
//! On a GPU one launch does each pass where all pixels of some groups fit into a block's shared memory (slabs), and
//! several over strips of pixels otherwise. The one backward also adds gradients of `x` that wait to be added where it
//! stores `dx`: `round((first + second) + dx)` with both additions in f32, an error of at most `2^-24 (|first + second|
//! + |sum|)` besides the rounding to the stored type, where `add` would round to that type at each addition. And it
//! leaves the sums of the stored `dx` over the pixels to a convolution that made `x`
//! ([`PixelSums`](crate::tape::PixelSums)).
//!
//! Numerics: two passes, because `E[x^2] - E[x]^2` loses every digit when the mean is large compared with the
//! deviation. They run over strips of pixels, small enough that the second pass finds the strip in L1 (on a GPU, in
//! registers). The strips' means and squares are joined in f64 (Chan, Golub and LeVeque 1983). Strips depend on the
//! image's extent alone and are joined in order: the same bits for any batch and any number of threads.
//!
//! Least traffic in f32: forward reads `x` and writes `y`, 8 bytes per element; backward reads `x` and `dy` and writes
//! `dx` over `dy`, 12 bytes, and 4 for each gradient that it adds. Slabs take that. Strips do while an image (backward:
//! two) fits in L2. Beyond that, the pass after the statistics reads from memory again: 12 bytes forward and up to 24
//! backward (with SiLU the CPU's first pass also writes `dz`).

use std::sync::Arc;

use rayon::prelude::*;

use crate::device::Device;
use crate::device::cuda::Gpu;
use crate::error::Result;
use crate::kernels::group_norm_slab::Slab;
use crate::ops::concat::Joined;
use crate::ops::dropout::{self, Mask};
use crate::params::Param;
use crate::rng::Streams;
use crate::tape::{Backward, Grads, PixelSums, Tape, Var, VarId};
use crate::tensor::{DType, Shape, Tensor};

/// What follows the normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `z sigmoid(z)`.
    Silu,
}

/// What follows, with dropout in the end.
#[derive(Clone, Copy, Debug)]
pub struct Then {
    /// After the normalisation.
    pub activation: Activation,
    /// After that each element is dropped with this probability, in `[0, 1)`, as [`dropout`] does. Not on a
    /// tape that does not record.
    pub dropout: Option<(f32, Streams)>,
}

impl From<Activation> for Then {
    fn from(activation: Activation) -> Self {
        Then { activation, dropout: None }
    }
}

/// Normalises each image's groups of channels. `groups` must divide the channels of `x`, and `eps > 0`. `then` is an
/// [`Activation`], or a [`Then`].
pub fn group_norm(
    tape: &mut Tape<'_>,
    x: impl Into<Joined>,
    gamma: Param,
    beta: Param,
    groups: usize,
    eps: f32,
    then: impl Into<Then>,
) -> Result<Var> {
    let norm = Norm::new(tape, gamma, beta, groups, eps, then.into());
    normalised(tape, x.into(), norm, None)
}

/// The same, then `(1 + scale)` times it, plus `shift`, before the activation: `scale_shift` is (n, 1, 1, 2c), the
/// scales first.
#[allow(clippy::too_many_arguments)]
pub fn scale_shift_group_norm(
    tape: &mut Tape<'_>,
    x: impl Into<Joined>,
    scale_shift: &Var,
    gamma: Param,
    beta: Param,
    groups: usize,
    eps: f32,
    then: impl Into<Then>,
) -> Result<Var> {
    let x = x.into();
    let (want, got) = (Shape::new(x.shape().n, 1, 1, 2 * x.shape().c), scale_shift.shape());
    assert_eq!(got, want, "scale_shift_group_norm: scale and shift of {}", x.shape());
    let norm = Norm::new(tape, gamma, beta, groups, eps, then.into());
    normalised(tape, x, norm, Some(scale_shift))
}

/// The parameters of a normalisation.
#[derive(Clone, Copy)]
struct Norm {
    gamma: Param,
    beta: Param,
    groups: usize,
    eps: f32,
    activation: Activation,
    mask: Option<Mask>,
}

impl Norm {
    fn new(tape: &Tape<'_>, gamma: Param, beta: Param, groups: usize, eps: f32, then: Then) -> Self {
        let mask = then.dropout.map(|(rate, streams)| (rate, Mask::new(rate, streams)));
        let mask = mask.filter(|(rate, _)| *rate > 0.0 && tape.is_recording()).map(|(_, mask)| mask);
        Norm { gamma, beta, groups, eps, activation: then.activation, mask }
    }
}

fn normalised(tape: &mut Tape<'_>, x: Joined, norm: Norm, scale_shift: Option<&Var>) -> Result<Var> {
    let Norm { gamma, beta, groups, eps, activation, mask } = norm;
    let shape = x.shape();
    for (name, p) in [("gamma", gamma), ("beta", beta)] {
        let p = tape.params().shape(p);
        assert_eq!(p, Shape::vector(shape.c), "group_norm: {name} is {p}, x is {shape}");
    }
    assert!(groups > 0 && shape.c.is_multiple_of(groups), "group_norm: {groups} groups of {} channels", shape.c);
    assert!(eps > 0.0, "group_norm: eps is {eps}");

    let mut y = Tensor::uninit(tape.device(), x.dtype(), shape)?;
    let mut stats = Tensor::uninit(tape.device(), DType::F32, Shape::new(shape.n, 1, groups, 3))?;
    match tape.device() {
        Device::Cpu(_) => {
            let (gamma, beta) = (tape.params().get(gamma), tape.params().get(beta));
            let own = scale_shift.map(|s| cpu::coefficients(s.data(), gamma, beta));
            let (gamma, beta) = own.as_ref().map_or((gamma, beta), |own| own.split_at(own.len() / 2));
            let mut partials =
                Tensor::uninit(tape.device(), DType::F32, Shape::new(shape.n, cpu::strips(shape), 3, shape.c))?;
            let job = cpu::Job { shape, groups, eps, activation, gamma, beta };
            let x = x.concatenated(tape.device())?;
            cpu::forward(&job, y.data_mut(), stats.data_mut(), partials.data_mut(), x.data());
            if let Some(mask) = mask {
                dropout::in_place(tape.device(), &mut y, mask)?;
            }
        }
        Device::Cuda(gpu) => {
            let [gamma, beta] = [gamma, beta].map(|p| tape.params().view(p, DType::F32));
            if let Some(slab) = cuda::slab(&x, groups, 1) {
                let scale_shift = scale_shift.map(Var::value);
                cuda::forward_slab(gpu, slab, norm, &mut y, &mut stats, &x, [gamma, beta], scale_shift)?;
            } else {
                let own = scale_shift.map(|s| cuda::coefficients(gpu, s.value(), gamma, beta)).transpose()?;
                let job = cuda::Job::new(gpu, shape, norm, gamma, beta, own.as_ref());
                cuda::forward(&job, &mut y, &mut stats, &x)?;
                if let Some(mask) = mask {
                    dropout::in_place(tape.device(), &mut y, mask)?;
                }
            }
        }
        Device::Meta(_) => {}
    }
    tape.push("group_norm", y, || GroupNormBackward {
        x,
        stats,
        norm,
        scale_shift: scale_shift.map(|s| (s.id(), s.value().clone())),
    })
}

struct GroupNormBackward {
    x: Joined,
    /// (n, 1, groups, 3): the mean, its rounding error, rstd.
    stats: Tensor,
    norm: Norm,
    scale_shift: Option<(Option<VarId>, Tensor)>,
}

impl Backward for GroupNormBackward {
    fn name(&self) -> &'static str {
        "group_norm"
    }

    fn saved(&self) -> Vec<&Tensor> {
        let scale_shift = self.scale_shift.as_ref().map(|(_, s)| s);
        self.x.tensors().into_iter().chain([&self.stats]).chain(scale_shift).collect()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let device = grads.device();
        let uninit = |s: &(_, Tensor)| Tensor::uninit(device, s.1.dtype(), s.1.shape());
        let mut dscale_shift = self.scale_shift.as_ref().map(uninit).transpose()?;
        let slab = cuda::slab(&self.x, self.norm.groups, 2);
        match (device, slab) {
            (Device::Cuda(gpu), Some(slab)) => self.by_slabs(gpu, slab, dy, dscale_shift.as_mut(), grads)?,
            _ => self.by_strips(dy, dscale_shift.as_mut(), grads)?,
        }
        match (dscale_shift, &self.scale_shift) {
            (Some(d), Some((Some(id), _))) => grads.add(*id, d),
            _ => Ok(()),
        }
    }
}

impl GroupNormBackward {
    /// In one launch, which adds what waits to be added to the gradients of both tensors, and sums them over the pixels
    /// for whoever made them.
    fn by_slabs(
        &self,
        gpu: &Gpu,
        slab: Slab,
        dy: Tensor,
        dscale_shift: Option<&mut Tensor>,
        grads: &mut Grads<'_>,
    ) -> Result<()> {
        let device = grads.device();
        let (mut dy, mut mask) = (dy, self.norm.mask);
        if let Some(mask) = mask.take_if(|_| !cuda::holds_all(&slab)) {
            dy = dy.into_unique(device)?;
            dropout::in_place(device, &mut dy, mask)?;
        }
        let (ids, tensors) = (self.x.ids(), [Some(self.x.first()), self.x.second()]);
        let waiting = ids.map(|id| id.map_or([None, None], |id| grads.waiting(id)));
        let mut sums = [None, None];
        for ((sums, id), x) in sums.iter_mut().zip(ids).zip(tensors) {
            if let (Some(x), true) = (x, id.is_some_and(|id| grads.wants_pixel_sums(id))) {
                let Shape { n, c, .. } = x.shape();
                *sums = Some((gpu.alloc(4 * n * c)?, Tensor::uninit(device, x.dtype(), Shape::new(n, 1, 1, c))?));
            }
        }
        // Over dy, but for two gradients.
        let over = self.x.second().is_none() && dy.is_unique();
        let apart = if over { None } else { Some(self.x.gradients(device)?) };
        let (mut first, mut second) = apart.map_or((None, None), |(first, second)| (Some(first), second));
        let scale_shift = self.scale_shift.as_ref().map(|(_, s)| s);
        let norm = Norm { mask, ..self.norm };
        let to = cuda::Gives { dx: [first.as_mut(), second.as_mut()], sums: &mut sums, dscale_shift };
        cuda::backward_slab(gpu, slab, norm, to, &mut dy, &waiting, &self.x, &self.stats, scale_shift, grads)?;
        let sums = sums.map(|sums| sums.map(|(sums, rounded)| PixelSums { sums: Arc::new(sums), rounded }));
        for ((id, dx), sums) in ids.into_iter().zip([Some(first.unwrap_or(dy)), second]).zip(sums) {
            if let (Some(id), Some(dx)) = (id, dx) {
                grads.add_with_sums(id, dx, sums)?;
            }
        }
        Ok(())
    }

    /// By strips of pixels, and on the CPU.
    fn by_strips(&self, dy: Tensor, mut dscale_shift: Option<&mut Tensor>, grads: &mut Grads<'_>) -> Result<()> {
        let norm @ Norm { groups, eps, activation, mask, .. } = self.norm;
        let (shape, device) = (self.x.shape(), grads.device());
        // Over dy, but for two gradients; the CPU parts them in the end.
        let apart = self.x.second().is_some() && device.is_gpu();
        let mut dy = if apart && mask.is_none() { dy } else { dy.into_unique(device)? };
        if let Some(mask) = mask {
            dropout::in_place(device, &mut dy, mask)?;
        }
        let (mut dx, mut dx_second) = (None, None);
        if apart {
            let (first, second) = self.x.gradients(device)?;
            (dx, dx_second) = (Some(first), second);
        }
        match device {
            Device::Cpu(_) => {
                let (gamma, beta) = (grads.weight(norm.gamma), grads.weight(norm.beta));
                let own = self.scale_shift.as_ref().map(|(_, s)| cpu::coefficients(s.data(), gamma, beta));
                // The last row of each image holds its sums over all strips.
                let rows = cpu::strips(shape) + 1;
                let mut partials = Tensor::uninit(device, DType::F32, Shape::new(shape.n, rows, 2, shape.c))?;
                {
                    let (gamma, beta) = own.as_ref().map_or((gamma, beta), |own| own.split_at(own.len() / 2));
                    let job = cpu::Job { shape, groups, eps, activation, gamma, beta };
                    let x = self.x.concatenated(device)?;
                    cpu::backward(&job, dy.data_mut(), partials.data_mut(), x.data(), self.stats.data());
                }
                if let (Some(d), Some((_, s))) = (&mut dscale_shift, &self.scale_shift) {
                    cpu::scale_shift_gradient(d.data_mut(), partials.data_mut(), s.data(), gamma, beta);
                }
                for (p, part) in [(norm.gamma, 0), (norm.beta, 1)] {
                    if let Some(grad) = grads.param(p) {
                        cpu::sum_images(grad.data, grad.accumulate, partials.data(), rows, part);
                    }
                }
            }
            Device::Cuda(gpu) => {
                let [gamma, beta] = [norm.gamma, norm.beta].map(|p| grads.weight_view(p, DType::F32));
                let own = self.scale_shift.as_ref();
                let own = own.map(|(_, s)| cuda::coefficients(gpu, s, gamma, beta)).transpose()?;
                let job = cuda::Job::new(gpu, shape, norm, gamma, beta, own.as_ref());
                let to = [dx.as_mut(), dx_second.as_mut()];
                let mut sums = cuda::backward(&job, to, &mut dy, &self.x, &self.stats)?;
                if let (Some(d), Some((_, s))) = (&mut dscale_shift, &self.scale_shift) {
                    cuda::scale_shift_gradient(gpu, d, &mut sums, s, gamma, beta)?;
                }
                cuda::param_gradients(gpu, grads, norm, sums, shape)?;
            }
            Device::Meta(_) => {}
        }
        match (device, dx) {
            (_, Some(dx)) => self.x.add(grads, (dx, dx_second)),
            (Device::Cpu(_), None) => self.x.add_parts(grads, dy),
            (_, None) => self.x.add(grads, (dy, None)),
        }
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use super::Activation;
    use crate::ops::silu::reference::sigmoid;
    use crate::tensor::Shape;

    /// `x` with its parameters.
    pub struct Inputs<'a, T> {
        /// (n, h, w, c).
        pub x: &'a [T],
        /// The shape of `x`.
        pub shape: Shape,
        /// (c).
        pub gamma: &'a [T],
        /// (c).
        pub beta: &'a [T],
        /// (n, 1, 1, 2c), the scales of an image before its shifts; none: no scaling and no shift.
        pub scale_shift: Option<&'a [T]>,
        /// Number of groups.
        pub groups: usize,
        /// Added to the variance.
        pub eps: T,
        /// What follows.
        pub activation: Activation,
    }

    impl<T: Float> Inputs<'_, T> {
        /// `1 + scale` and `shift` of the image and channel of element `i`.
        fn scale_shift_at(&self, i: usize) -> (T, T) {
            let Shape { c, .. } = self.shape;
            let row = 2 * c * (i / (self.shape.pixels() * c)) + i % c;
            self.scale_shift.map_or((T::one(), T::zero()), |s| (T::one() + s[row], s[row + c]))
        }
    }

    /// `y`.
    pub fn forward<T: Float>(inputs: &Inputs<'_, T>) -> Vec<T> {
        let mut y = vec![T::nan(); inputs.x.len()];
        each_group(inputs, |at, mean, rstd| {
            for &(i, c) in at {
                let (scale, shift) = inputs.scale_shift_at(i);
                let z = (inputs.gamma[c] * (inputs.x[i] - mean) * rstd + inputs.beta[c]) * scale + shift;
                y[i] = match inputs.activation {
                    Activation::Identity => z,
                    Activation::Silu => z * sigmoid(z),
                };
            }
        });
        y
    }

    /// `[dx, dgamma, dbeta, dscale_shift]`, the last empty without `scale_shift`.
    pub fn backward<T: Float>(inputs: &Inputs<'_, T>, dy: &[T]) -> [Vec<T>; 4] {
        let Inputs { x, gamma, beta, shape, .. } = *inputs;
        let mut dx = vec![T::nan(); x.len()];
        let (mut dgamma, mut dbeta) = (vec![T::zero(); gamma.len()], vec![T::zero(); gamma.len()]);
        let mut dscale_shift = vec![T::zero(); inputs.scale_shift.map_or(0, <[T]>::len)];
        each_group(inputs, |at, mean, rstd| {
            let xhat = |i: usize| (x[i] - mean) * rstd;
            let dz = |i: usize, c: usize| {
                let (scale, shift) = inputs.scale_shift_at(i);
                let z = (gamma[c] * xhat(i) + beta[c]) * scale + shift;
                match inputs.activation {
                    Activation::Identity => dy[i],
                    Activation::Silu => dy[i] * sigmoid(z) * (T::one() + z * (T::one() - sigmoid(z))),
                }
            };
            let count = T::from(at.len()).expect("a count");
            let (mut s1, mut s2) = (T::zero(), T::zero());
            for &(i, c) in at {
                let (scale, _) = inputs.scale_shift_at(i);
                let dz = dz(i, c);
                dgamma[c] = dgamma[c] + scale * dz * xhat(i);
                dbeta[c] = dbeta[c] + scale * dz;
                if !dscale_shift.is_empty() {
                    let row = 2 * shape.c * (i / (shape.pixels() * shape.c)) + c;
                    dscale_shift[row] = dscale_shift[row] + dz * (gamma[c] * xhat(i) + beta[c]);
                    dscale_shift[row + shape.c] = dscale_shift[row + shape.c] + dz;
                }
                s1 = s1 + gamma[c] * scale * dz / count;
                s2 = s2 + gamma[c] * scale * dz * xhat(i) / count;
            }
            for &(i, c) in at {
                let (scale, _) = inputs.scale_shift_at(i);
                dx[i] = rstd * (gamma[c] * scale * dz(i, c) - s1 - xhat(i) * s2);
            }
        });
        [dx, dgamma, dbeta, dscale_shift]
    }

    /// Calls `f` with the indices and channels of each group's elements, their mean and `1 / sqrt(var + eps)`.
    fn each_group<T: Float>(inputs: &Inputs<'_, T>, mut f: impl FnMut(&[(usize, usize)], T, T)) {
        let Shape { n, c, .. } = inputs.shape;
        let (pixels, width) = (inputs.shape.pixels(), c / inputs.groups);
        for image in 0..n {
            for group in 0..inputs.groups {
                let channels = group * width..(group + 1) * width;
                let at: Vec<_> = (0..pixels)
                    .flat_map(|p| channels.clone().map(move |c_i| ((image * pixels + p) * c + c_i, c_i)))
                    .collect();
                let count = T::from(at.len()).expect("a count");
                let mean = at.iter().fold(T::zero(), |sum, &(i, _)| sum + inputs.x[i]) / count;
                let var = at.iter().fold(T::zero(), |sum, &(i, _)| sum + (inputs.x[i] - mean).powi(2)) / count;
                f(&at, mean, (var + inputs.eps).sqrt().recip());
            }
        }
    }
}

mod cpu {
    use super::*;
    use crate::device::cpu::simd;

    /// Pixels per strip: 64, so that 64 channels of it are 16 KiB, which the second pass finds in L1; with fewer than
    /// 64 channels, as many pixels as make 16 KiB.
    fn strip(shape: Shape) -> usize {
        (4096 / shape.c).max(64)
    }

    /// Elements worth a task of their own: 64 KiB, about 5 us.
    const TASK: usize = 1 << 14;

    /// What both passes need.
    pub struct Job<'a> {
        pub shape: Shape,
        pub groups: usize,
        pub eps: f32,
        pub activation: Activation,
        /// (c), or (n, c) with coefficients of each image's own; so is `beta`.
        pub gamma: &'a [f32],
        pub beta: &'a [f32],
    }

    impl<'a> Job<'a> {
        /// `gamma` and `beta` of an image, (c).
        fn of_image(&self, image: usize) -> (&'a [f32], &'a [f32]) {
            let c = self.shape.c;
            let first = if self.gamma.len() == c { 0 } else { image * c };
            (&self.gamma[first..][..c], &self.beta[first..][..c])
        }
    }

    /// `gamma (1 + scale)`, (n, c), then `beta (1 + scale) + shift`, (n, c).
    pub fn coefficients(scale_shift: &[f32], gamma: &[f32], beta: &[f32]) -> Vec<f32> {
        let rows = || scale_shift.chunks_exact(2 * gamma.len()).map(|row| row.split_at(gamma.len()));
        let gammas = rows().flat_map(|(scale, _)| gamma.iter().zip(scale).map(|(gamma, scale)| gamma * (1.0 + scale)));
        let betas = rows().flat_map(|(scale, shift)| {
            beta.iter().zip(scale).zip(shift).map(|((beta, scale), shift)| beta * (1.0 + scale) + shift)
        });
        gammas.chain(betas).collect()
    }

    /// `dscale_shift` (n, 1, 1, 2c) from each image's sums, the last row of its `partials` (n, rows, 2, c), which then
    /// become its share of `dgamma` and `dbeta`.
    pub fn scale_shift_gradient(
        dscale_shift: &mut [f32],
        partials: &mut [f32],
        scale_shift: &[f32],
        gamma: &[f32],
        beta: &[f32],
    ) {
        let c = gamma.len();
        let of_image = partials.len() / (scale_shift.len() / (2 * c));
        let images = dscale_shift.chunks_exact_mut(2 * c).zip(scale_shift.chunks_exact(2 * c));
        for ((d, scale), partials) in images.zip(partials.chunks_exact_mut(of_image)) {
            let (dscale, dshift) = d.split_at_mut(c);
            let (by_xhat, plain) = partials[of_image - 2 * c..].split_at_mut(c);
            for i in 0..c {
                dscale[i] = gamma[i] * by_xhat[i] + beta[i] * plain[i];
                dshift[i] = plain[i];
                by_xhat[i] *= 1.0 + scale[i];
                plain[i] *= 1.0 + scale[i];
            }
        }
    }

    /// Strips per image.
    pub fn strips(shape: Shape) -> usize {
        shape.pixels().div_ceil(strip(shape))
    }

    /// `partials` is (n, strips, 3, c), `stats` (n, 1, groups, 3).
    pub fn forward(job: &Job<'_>, y: &mut [f32], stats: &mut [f32], partials: &mut [f32], x: &[f32]) {
        let (c, pixels, strip) = (job.shape.c, job.shape.pixels(), strip(job.shape));
        let together = TASK.div_ceil(strip * c);
        let images = (y.par_chunks_mut(pixels * c).zip(x.par_chunks(pixels * c)))
            .zip(stats.par_chunks_mut(job.groups * 3).zip(partials.par_chunks_mut(strips(job.shape) * 3 * c)));
        images.enumerate().for_each(|(image, ((y, x), (stats, partials)))| {
            let parts = partials.par_chunks_mut(3 * c).zip(x.par_chunks(strip * c)).with_min_len(together);
            parts.for_each(|(part, x)| strip_moments(part, x));
            join_moments(job, stats, partials);
            let affine = Affine::new(job, image, stats);
            let strips = y.par_chunks_mut(strip * c).zip(x.par_chunks(strip * c)).with_min_len(together);
            strips.for_each(|(y, x)| match job.activation {
                Activation::Identity => normalise(y, x, &affine),
                Activation::Silu => normalise_silu(y, x, &affine),
            });
        });
    }

    /// `dx` holds `dy` on entry. `partials` is (n, strips + 1, 2, c); the last row becomes the image's share of
    /// `dgamma` and `dbeta`.
    pub fn backward(job: &Job<'_>, dx: &mut [f32], partials: &mut [f32], x: &[f32], stats: &[f32]) {
        let (c, pixels, strip) = (job.shape.c, job.shape.pixels(), strip(job.shape));
        let together = TASK.div_ceil(strip * c);
        let images = (dx.par_chunks_mut(pixels * c).zip(x.par_chunks(pixels * c)))
            .zip(stats.par_chunks(job.groups * 3).zip(partials.par_chunks_mut((strips(job.shape) + 1) * 2 * c)));
        images.enumerate().for_each(|(image, ((dx, x), (stats, partials)))| {
            let affine = Affine::new(job, image, stats);
            let (partials, sums) = partials.split_at_mut(strips(job.shape) * 2 * c);
            let parts = (partials.par_chunks_mut(2 * c))
                .zip(dx.par_chunks_mut(strip * c).zip(x.par_chunks(strip * c)))
                .with_min_len(together);
            parts.for_each(|(part, (dx, x))| match job.activation {
                Activation::Identity => strip_sums(part, dx, x, &affine),
                Activation::Silu => strip_sums_silu(part, dx, x, &affine),
            });
            let slopes = Slopes::new(job, image, sums, partials, stats);
            let strips = dx.par_chunks_mut(strip * c).zip(x.par_chunks(strip * c)).with_min_len(together);
            strips.for_each(|(dx, x)| finish_dx(dx, x, &slopes));
        });
    }

    /// Sums part `part` of each image's last row of `partials` (n, rows, 2, c), in the order of the images.
    pub fn sum_images(grad: &mut [f32], accumulate: bool, partials: &[f32], rows: usize, part: usize) {
        let c = grad.len();
        let mut total = vec![0.0f64; c];
        for image in partials.chunks_exact(rows * 2 * c) {
            let row = &image[(2 * (rows - 1) + part) * c..][..c];
            total.iter_mut().zip(row).for_each(|(total, v)| *total += f64::from(*v));
        }
        for (grad, total) in grad.iter_mut().zip(total) {
            *grad = if accumulate { *grad + total as f32 } else { total as f32 };
        }
    }

    simd::dispatch! {
        /// Each channel's mean `m` over a strip `x (pixels, c)`, and the sums of `x - m` (which corrects the rounding
        /// of the mean) and of `(x - m)^2`.
        fn strip_moments<S>(part: &mut [f32], x: &[f32]) {
            let c = part.len() / 3;
            let (mean, rest) = part.split_at_mut(c);
            let (first, second) = rest.split_at_mut(c);
            let mut done = 0;
            while done < c {
                done += match c - done {
                    64.. => moments_of::<S, 64, 1>(mean, first, second, x, c, done),
                    32.. => moments_of::<S, 32, 2>(mean, first, second, x, c, done),
                    16.. => moments_of::<S, 16, 4>(mean, first, second, x, c, done),
                    4.. => moments_of::<S, 4, 4>(mean, first, second, x, c, done),
                    _ => moments_of::<S, 1, 4>(mean, first, second, x, c, done),
                };
            }
        }
    }

    /// Channels `at .. at + W` of a strip, with the sums in registers: one per channel and per each of `R` neighbouring
    /// pixels, four AVX-512 vectors in all (fewer for narrow `W`), so that an addition does not wait for the one
    /// before. Returns `W`.
    #[inline(always)]
    fn moments_of<S: simd::Simd, const W: usize, const R: usize>(
        mean: &mut [f32],
        first: &mut [f32],
        second: &mut [f32],
        x: &[f32],
        c: usize,
        at: usize,
    ) -> usize {
        let row = |x: &[f32]| -> [f32; W] { *x[at..].first_chunk().expect("W channels from here") };
        let fold = |sums: [[f32; W]; R]| {
            let mut total = sums[0];
            for sums in &sums[1..] {
                total.iter_mut().zip(sums).for_each(|(total, v)| *total += v);
            }
            total
        };
        let together = x.chunks_exact(R * c);
        let rest = together.remainder();

        let mut sums = [[0.0; W]; R];
        for rows in together.clone() {
            for r in 0..R {
                let x = row(&rows[r * c..]);
                for i in 0..W {
                    sums[r][i] += x[i];
                }
            }
        }
        for rows in rest.chunks_exact(c) {
            let x = row(rows);
            for i in 0..W {
                sums[0][i] += x[i];
            }
        }
        let per_pixel = 1.0 / (x.len() / c) as f32;
        let m = fold(sums).map(|sum| sum * per_pixel);

        let (mut d1, mut d2) = ([[0.0; W]; R], [[0.0; W]; R]);
        for rows in together {
            for r in 0..R {
                let x = row(&rows[r * c..]);
                for i in 0..W {
                    let d = x[i] - m[i];
                    d1[r][i] += d;
                    d2[r][i] = S::mul_add(d, d, d2[r][i]);
                }
            }
        }
        for rows in rest.chunks_exact(c) {
            let x = row(rows);
            for i in 0..W {
                let d = x[i] - m[i];
                d1[0][i] += d;
                d2[0][i] = S::mul_add(d, d, d2[0][i]);
            }
        }
        mean[at..at + W].copy_from_slice(&m);
        first[at..at + W].copy_from_slice(&fold(d1));
        second[at..at + W].copy_from_slice(&fold(d2));
        W
    }

    /// Reduces an image's `partials` (strips, 3, c) to `stats` (groups, 3), in f64: first each channel over the strips,
    /// then each group over its channels.
    fn join_moments(job: &Job<'_>, stats: &mut [f32], partials: &[f32]) {
        let (c, pixels) = (job.shape.c, job.shape.pixels());
        let mut means = vec![0.0; c];
        let mut squares = vec![0.0; c];
        join_strips(&mut means, &mut squares, partials, pixels, strip(job.shape));
        let width = c / job.groups;
        for ((stats, means), squares) in
            stats.chunks_exact_mut(3).zip(means.chunks_exact(width)).zip(squares.chunks_exact(width))
        {
            let mean = means.iter().sum::<f64>() / width as f64;
            let between: f64 = means.iter().map(|m| (m - mean) * (m - mean)).sum::<f64>() * pixels as f64;
            let var = (squares.iter().sum::<f64>() + between) / (width * pixels) as f64;
            stats[0] = mean as f32;
            stats[1] = (mean - f64::from(stats[0])) as f32;
            stats[2] = (var + f64::from(job.eps)).sqrt().recip() as f32;
        }
    }

    simd::dispatch! {
        /// Each channel's mean over `pixels` pixels and its sum of squares about that mean, from `partials` (strips, 3,
        /// c).
        fn join_strips<S>(means: &mut [f64], squares: &mut [f64], partials: &[f32], pixels: usize, strip: usize) {
            let c = means.len();
            let count = |i: usize| (pixels - i * strip).min(strip) as f64;
            for (i, part) in partials.chunks_exact(3 * c).enumerate() {
                let (m, d1, n) = (&part[..c], &part[c..2 * c], count(i));
                for ((total, m), d1) in means.iter_mut().zip(m).zip(d1) {
                    *total += f64::from(*m) * n + f64::from(*d1);
                }
            }
            let per_pixel = 1.0 / pixels as f64;
            means.iter_mut().for_each(|total| *total *= per_pixel);
            for (i, part) in partials.chunks_exact(3 * c).enumerate() {
                let (m, d1, d2, n) = (&part[..c], &part[c..2 * c], &part[2 * c..], count(i));
                for ((((total, mean), m), d1), d2) in squares.iter_mut().zip(&*means).zip(m).zip(d1).zip(d2) {
                    // About the channel's mean instead of m: sum (x - m)^2 + 2 (m - mean) sum (x - m) + n (m - mean)^2.
                    let shift = f64::from(*m) - mean;
                    *total += f64::from(*d2) + shift * (2.0 * f64::from(*d1) + n * shift);
                }
            }
        }
    }

    /// `z = (x - mean) a + b` for one image: three rows of coefficients, repeated as [`wide`] says.
    struct Affine {
        mean: Vec<f32>,
        a: Vec<f32>,
        b: Vec<f32>,
    }

    impl Affine {
        fn new(job: &Job<'_>, image: usize, stats: &[f32]) -> Self {
            let (gamma, beta) = job.of_image(image);
            let a = wide(job, |group, c| stats[3 * group + 2] * gamma[c]);
            // The rounding error of the mean goes into the shift.
            let b = wide(job, |group, c| beta[c] - stats[3 * group + 1] * (stats[3 * group + 2] * gamma[c]));
            Affine { mean: wide(job, |group, _| stats[3 * group]), a, b }
        }
    }

    /// `f(group, channel)` for the channels of a pixel, repeated until there are 512 numbers or more, so that loops
    /// over a row are long enough to vectorise well.
    fn wide(job: &Job<'_>, f: impl Fn(usize, usize) -> f32) -> Vec<f32> {
        let (c, width) = (job.shape.c, job.shape.c / job.groups);
        let repeats = 512usize.div_ceil(c);
        let mut row = Vec::with_capacity(repeats * c);
        for group in 0..job.groups {
            row.extend((group * width..(group + 1) * width).map(|c| f(group, c)));
        }
        for _ in 1..repeats {
            row.extend_from_within(..c);
        }
        row
    }

    simd::dispatch! {
        /// `y = (x - mean) a + b`.
        fn normalise<S>(y: &mut [f32], x: &[f32], affine: &Affine) {
            let Affine { mean, a, b } = affine;
            for (y, x) in y.chunks_mut(mean.len()).zip(x.chunks(mean.len())) {
                for ((((y, x), mean), a), b) in y.iter_mut().zip(x).zip(mean).zip(a).zip(b) {
                    *y = S::mul_add(x - mean, *a, *b);
                }
            }
        }
    }

    simd::dispatch! {
        /// `y = silu((x - mean) a + b)`.
        fn normalise_silu<S>(y: &mut [f32], x: &[f32], affine: &Affine) {
            let Affine { mean, a, b } = affine;
            for (y, x) in y.chunks_mut(mean.len()).zip(x.chunks(mean.len())) {
                for ((((y, x), mean), a), b) in y.iter_mut().zip(x).zip(mean).zip(a).zip(b) {
                    *y = simd::silu::<S>(S::mul_add(x - mean, *a, *b));
                }
            }
        }
    }

    simd::dispatch! {
        /// Each channel's sums of `dz (x - mean)` and of `dz` over a strip; `dx` holds `dy`, which is `dz`.
        fn strip_sums<S>(part: &mut [f32], dx: &mut [f32], x: &[f32], affine: &Affine) {
            sums_of::<S, false>(part, dx, x, affine)
        }
    }

    simd::dispatch! {
        /// Each channel's sums of `dz (x - mean)` and of `dz` over a strip; `dx` holds `dy` and becomes `dz`.
        fn strip_sums_silu<S>(part: &mut [f32], dx: &mut [f32], x: &[f32], affine: &Affine) {
            sums_of::<S, true>(part, dx, x, affine)
        }
    }

    #[inline(always)]
    fn sums_of<S: simd::Simd, const SILU: bool>(part: &mut [f32], dx: &mut [f32], x: &[f32], affine: &Affine) {
        let Affine { mean, a, b } = affine;
        let (c, width) = (part.len() / 2, mean.len());
        // One sum per element of a wide row, folded to channels at the end.
        let mut sums = vec![0.0; 2 * width];
        let (by_x, plain) = sums.split_at_mut(width);
        for (dx, x) in dx.chunks_mut(width).zip(x.chunks(width)) {
            let rows = dx.iter_mut().zip(x).zip(mean).zip(a).zip(b).zip(&mut *by_x).zip(&mut *plain);
            for ((((((dx, x), mean), a), b), by_x), plain) in rows {
                let d = x - mean;
                if SILU {
                    *dx *= simd::silu_grad::<S>(S::mul_add(d, *a, *b));
                }
                *by_x = S::mul_add(*dx, d, *by_x);
                *plain += *dx;
            }
        }
        for (part, sums) in part.chunks_exact_mut(c).zip([by_x, plain]) {
            part.copy_from_slice(&sums[..c]);
            for row in sums[c..].chunks_exact(c) {
                part.iter_mut().zip(row).for_each(|(part, v)| *part += v);
            }
        }
    }

    /// `dx = rstd (gamma dz - (s1 + (x - mean) s2))`, where `s2` includes a factor `rstd` and `s1` the rounding error
    /// of the mean. Wide rows, as in [`Affine`].
    struct Slopes {
        mean: Vec<f32>,
        gamma: Vec<f32>,
        s1: Vec<f32>,
        s2: Vec<f32>,
        rstd: Vec<f32>,
    }

    impl Slopes {
        /// From an image's `partials` (strips, 2, c). Writes the image's share of `dgamma` and `dbeta` to `sums` (2,
        /// c).
        fn new(job: &Job<'_>, image: usize, sums: &mut [f32], partials: &[f32], stats: &[f32]) -> Self {
            let (c, (gamma, _)) = (job.shape.c, job.of_image(image));
            let (by_x, plain) = join_sums(partials, c);
            let (dgamma, dbeta) = sums.split_at_mut(c);
            let width = c / job.groups;
            let count = (width * job.shape.pixels()) as f64;
            let mut slopes = vec![(0.0, 0.0); job.groups];
            for (group, (stats, slopes)) in stats.chunks_exact(3).zip(&mut slopes).enumerate() {
                let [lost, rstd] = [f64::from(stats[1]), f64::from(stats[2])];
                let (mut s1, mut s2) = (0.0, 0.0);
                for c in group * width..(group + 1) * width {
                    let by_xhat = (by_x[c] - lost * plain[c]) * rstd;
                    s1 += f64::from(gamma[c]) * plain[c];
                    s2 += f64::from(gamma[c]) * by_xhat;
                    (dgamma[c], dbeta[c]) = (by_xhat as f32, plain[c] as f32);
                }
                // xhat s2 = (x - mean - lost) rstd s2.
                let s2 = s2 / count * rstd;
                *slopes = ((s1 / count - lost * s2) as f32, s2 as f32);
            }
            Slopes {
                mean: wide(job, |group, _| stats[3 * group]),
                gamma: wide(job, |_, c| gamma[c]),
                s1: wide(job, |group, _| slopes[group].0),
                s2: wide(job, |group, _| slopes[group].1),
                rstd: wide(job, |group, _| stats[3 * group + 2]),
            }
        }
    }

    simd::dispatch! {
        /// The two rows of `partials` (strips, 2, c), each summed over the strips.
        fn join_sums<S>(partials: &[f32], c: usize) -> (Vec<f64>, Vec<f64>) {
            let (mut by_x, mut plain) = (vec![0.0; c], vec![0.0; c]);
            for part in partials.chunks_exact(2 * c) {
                let (p, q) = part.split_at(c);
                by_x.iter_mut().zip(p).for_each(|(sum, v)| *sum += f64::from(*v));
                plain.iter_mut().zip(q).for_each(|(sum, v)| *sum += f64::from(*v));
            }
            (by_x, plain)
        }
    }

    simd::dispatch! {
        /// `dx` holds `dz` on entry.
        fn finish_dx<S>(dx: &mut [f32], x: &[f32], slopes: &Slopes) {
            let Slopes { mean, gamma, s1, s2, rstd } = slopes;
            for (dx, x) in dx.chunks_mut(mean.len()).zip(x.chunks(mean.len())) {
                let rows = dx.iter_mut().zip(x).zip(mean).zip(gamma).zip(s1).zip(s2).zip(rstd);
                for ((((((dx, x), mean), gamma), s1), s2), rstd) in rows {
                    *dx = (*dx * gamma - S::mul_add(x - mean, *s2, *s1)) * rstd;
                }
            }
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::tile::Parts;
    use crate::device::cuda::{Buffer, Gpu, Launch, View};
    use crate::kernels::Kernel;
    use crate::kernels::group_norm::{
        BWD_DX, BWD_JOIN, BWD_SCALE_SHIFT, BWD_SLAB, BWD_SUMS, FWD_APPLY, FWD_JOIN, FWD_MOMENTS, FWD_SCALE_SHIFT,
        FWD_SLAB, PIXELS,
    };
    use crate::kernels::group_norm_slab::{BLOCK, SLAB_CHANNELS};
    use crate::rng::Purpose;

    /// Warps per block in the passes over the image.
    const WARPS: usize = BLOCK as usize / 32;

    /// Bytes of a column of a slab: an access.
    const COLUMN: usize = 16;

    /// Bytes that move together between memory and a multiprocessor.
    const SECTOR: usize = 32;

    /// Bytes of one tensor's slab, at most: 32x32 pixels of the paper's 384 channels in bf16, whose smallest slab is 48
    /// channels wide. A larger image goes by strips, which fill a GPU with fewer images.
    const LARGEST: usize = 96 << 10;

    /// Bytes of shared memory for what is read more than once: beside the sums an RTX 4090 has room for so much.
    const HELD: usize = 84 << 10;

    /// The slabs of `x`, of which the kernel reads `tensors` more than once; `None` if it goes by strips: if its groups
    /// are no quads or its pixels no columns, or if a slab would be too large. Depends on the image's extent alone.
    pub fn slab(x: &Joined, groups: usize, tensors: usize) -> Option<Slab> {
        let (shape, size, pixels) = (x.shape(), x.dtype().size(), x.shape().pixels());
        let (wide, width) = (COLUMN / size, shape.c / groups);
        let whole = width.is_multiple_of(4) && x.widths().iter().all(|c| c.is_multiple_of(wide));
        let (row, most) = (shape.c / wide, SLAB_CHANNELS as usize / wide);
        // Whole groups in whole sectors; then twice as wide while it is no 64 bytes, or no two columns a thread.
        let mut columns = (lcm(width * size, SECTOR) / COLUMN).min(row);
        let few = |columns: usize| columns < 4 || pixels * columns < 2 * BLOCK as usize;
        while few(columns) && columns < row && 2 * columns <= most && 2 * columns * pixels * COLUMN <= LARGEST / 3 {
            columns *= 2;
        }
        let columns = columns.min(row);
        let fits = columns <= most && pixels * columns * COLUMN <= LARGEST && pixels * shape.c < 1 << 32;
        let slabs = row.div_ceil(columns.max(1));
        if !whole || !fits {
            return None;
        }
        let of_thread = pixels.div_ceil(BLOCK as usize / columns);
        let kept = of_thread.min(HELD / (tensors * BLOCK as usize * COLUMN));
        let number = |v: usize| u32::try_from(v).ok();
        Some(Slab {
            n: number(shape.n)?,
            pixels: number(pixels)?,
            c: number(shape.c)?,
            groups: number(groups)?,
            c_first: number(x.first().shape().c)?,
            columns: number(columns)?,
            slabs: number(slabs)?,
            kept: number(kept)?,
            silu: 0,
        })
    }

    fn lcm(a: usize, b: usize) -> usize {
        let (mut x, mut y) = (a, b);
        while y > 0 {
            (x, y) = (y, x % y);
        }
        a / x * b
    }

    /// True if a thread holds all its pixels, so that dropout takes no pass of its own backward.
    pub fn holds_all(slab: &Slab) -> bool {
        slab.pixels.div_ceil(BLOCK / slab.columns) <= slab.kept
    }

    /// A launch of one of the kernels for `tensors` tensors in slabs.
    fn launch_slab<'a>(gpu: &'a Gpu, kernel: &'static Kernel, slab: &Slab, tensors: usize) -> Launch<'a> {
        let held = tensors * (slab.kept * BLOCK) as usize * COLUMN;
        gpu.launch(kernel, [(slab.n * slab.slabs) as usize, 1, 1], BLOCK).shared(held)
    }

    /// Dropout's parameters, which are the last.
    fn masked<'a>(launch: Launch<'a>, mask: Option<Mask>) -> Launch<'a> {
        match mask {
            Some(Mask { streams, threshold, scale }) => {
                launch.streams_of_step(streams).u32(threshold as usize).f32(scale).clock()
            }
            None => {
                let none = Streams { seed: 0, purpose: Purpose::Dropout, step: 0, first: 0 };
                launch.streams(none).u32(0).f32(1.0).null()
            }
        }
    }

    /// In one launch.
    #[allow(clippy::too_many_arguments)]
    pub fn forward_slab(
        gpu: &Gpu,
        slab: Slab,
        norm: Norm,
        y: &mut Tensor,
        stats: &mut Tensor,
        x: &Joined,
        [gamma, beta]: [View<'_>; 2],
        scale_shift: Option<&Tensor>,
    ) -> Result<()> {
        let slab = Slab { silu: (norm.activation == Activation::Silu).into(), ..slab };
        let launch = launch_slab(gpu, FWD_SLAB.of(x.dtype()), &slab, 1).write(y).write(stats);
        let launch = launch.read(x.first()).read_opt(x.second()).view(gamma).view(beta).read_opt(scale_shift);
        masked(launch.value(slab).f32(norm.eps), norm.mask).run()
    }

    /// Where a backward pass writes, besides the gradients of parameters: dx, or over dy if there is none; its
    /// sums over the pixels, in f32, (n, c), and rounded.
    pub struct Gives<'a> {
        pub dx: [Option<&'a mut Tensor>; 2],
        pub sums: &'a mut [Option<(Buffer, Tensor)>; 2],
        pub dscale_shift: Option<&'a mut Tensor>,
    }

    /// In one launch. Adds what is `waiting` for both tensors of `x`.
    #[allow(clippy::too_many_arguments)]
    pub fn backward_slab(
        gpu: &Gpu,
        slab: Slab,
        norm: Norm,
        Gives { dx: [dx, dx_second], sums, dscale_shift }: Gives<'_>,
        dy: &mut Tensor,
        [of_first, of_second]: &[[Option<Tensor>; 2]; 2],
        x: &Joined,
        stats: &Tensor,
        scale_shift: Option<&Tensor>,
        grads: &mut Grads<'_>,
    ) -> Result<()> {
        let slab = Slab { silu: (norm.activation == Activation::Silu).into(), ..slab };
        let [gamma, beta] = [norm.gamma, norm.beta].map(|p| grads.weight_view(p, DType::F32));
        let shares = grads.wants_params().then(|| gpu.alloc(4 * 2 * (slab.n * slab.c) as usize));
        let mut shares = shares.transpose()?; // (n, 2, c)
        let over = dx.is_none();
        let launch = launch_slab(gpu, BWD_SLAB.of(x.dtype()), &slab, 2);
        let (launch, dy) = match dx {
            Some(dx) => (launch.write(dx).write_opt(dx_second), Some(&*dy)),
            None => (launch.write(dy).null(), None),
        };
        let [sums, sums_second] = sums
            .each_mut()
            .map(|sums| sums.as_mut().map_or((None, None), |(sums, rounded)| (Some(sums), Some(rounded))));
        let launch = launch.buffer_mut_opt(sums.0).buffer_mut_opt(sums_second.0);
        let launch = launch.write_opt(sums.1).write_opt(sums_second.1).buffer_mut_opt(shares.as_mut());
        let launch = launch.write_opt(dscale_shift);
        let launch = if over { launch.first_again() } else { launch.read_opt(dy) };
        let launch = launch.read_opt(of_first[0].as_ref()).read_opt(of_second[0].as_ref());
        let launch = launch.read_opt(of_first[1].as_ref()).read_opt(of_second[1].as_ref());
        let launch = launch.read(x.first()).read_opt(x.second()).read(stats).view(gamma).view(beta);
        masked(launch.read_opt(scale_shift).value(slab), norm.mask).run()?;
        match shares {
            Some(shares) => param_gradients(gpu, grads, norm, shares, x.shape()),
            None => Ok(()),
        }
    }

    /// The gradients of gamma and beta, if they are wanted, from each image's part of them, (n, 2, c).
    pub fn param_gradients(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        norm: Norm,
        shares: Buffer,
        Shape { n, c, .. }: Shape,
    ) -> Result<()> {
        let buffer = Arc::new(shares);
        for (p, from) in [(norm.gamma, 0), (norm.beta, c)] {
            grads.sum_later(gpu, p, Parts { buffer: buffer.clone(), size: 4, from, count: n, pitch: 2 * c })?;
        }
        Ok(())
    }

    /// What both passes need.
    pub struct Job<'a> {
        pub gpu: &'a Gpu,
        pub shape: Shape,
        pub groups: usize,
        pub eps: f32,
        pub activation: Activation,
        pub gamma: View<'a>,
        pub beta: View<'a>,
        /// Numbers of `gamma` from one image to the next: c with coefficients of each image's own, otherwise 0.
        pub per_image: usize,
    }

    /// How blocks and warps are laid out over channels and pixels, in the kernels' terms.
    struct Tiling {
        /// A warp has 2^lane_bits lanes across the channels, and a block 2^warp_bits warps.
        lane_bits: usize,
        warp_bits: usize,
        /// Pixels per strip, and strips per image.
        strip: usize,
        strips: usize,
        /// Tiles of channels.
        tiles: usize,
    }

    impl Tiling {
        /// Depends on the image's extent alone, so that an image's bits do not depend on its batch.
        fn new(shape: Shape) -> Self {
            // Lanes across: the largest power of two that divides the number of quads (groups of four channels), if
            // that is 8 lanes (128 bytes of f32) or more, so that none is idle; otherwise the number of quads rounded
            // up to a power of two. At most 32.
            let fours = shape.c.div_ceil(4);
            let factor = fours.trailing_zeros() as usize;
            let lane_bits = if factor >= 3 { factor } else { bits(fours) }.min(5);
            // Warps across: doubled while there are channels for them and the remaining warps along the pixels still
            // cover the image.
            let warp_pixels = (32 >> lane_bits) * PIXELS as usize;
            let mut warp_bits = 0;
            while 1 << warp_bits < WARPS
                && fours > 1 << (lane_bits + warp_bits)
                && ((WARPS / 2) >> warp_bits) * warp_pixels >= shape.pixels()
            {
                warp_bits += 1;
            }
            let strip = (WARPS >> warp_bits) * warp_pixels;
            let tiles = fours.div_ceil(1 << (lane_bits + warp_bits));
            Tiling { lane_bits, warp_bits, strip, strips: shape.pixels().div_ceil(strip), tiles }
        }
    }

    /// The smallest b with `2^b >= n`.
    fn bits(n: usize) -> usize {
        n.next_power_of_two().trailing_zeros() as usize
    }

    impl<'a> Job<'a> {
        /// With the coefficients `own` of each image, if there are such, in place of `gamma` and `beta`.
        pub fn new(
            gpu: &'a Gpu,
            shape: Shape,
            norm: Norm,
            gamma: View<'a>,
            beta: View<'a>,
            own: Option<&'a Tensor>,
        ) -> Self {
            let rows = shape.n * shape.c;
            let (gamma, beta) = own.map_or((gamma, beta), |own| (own.view(0..rows), own.view(rows..2 * rows)));
            let Norm { groups, eps, activation, .. } = norm;
            Job { gpu, shape, groups, eps, activation, gamma, beta, per_image: own.map_or(0, |_| shape.c) }
        }

        fn width(&self) -> usize {
            self.shape.c / self.groups
        }

        fn scratch(&self, shape: Shape) -> Result<Tensor> {
            Tensor::uninit(&Device::Cuda(self.gpu.clone()), DType::F32, shape)
        }

        /// log2 of the lanes across a group's channels in the joins; and threads per block, so that each lane has about
        /// four numbers.
        fn join(&self, strips: usize) -> (usize, u32) {
            let lane_bits = bits(self.width()).min(5);
            (lane_bits, 32 * ((strips << lane_bits) / 128).clamp(1, 8) as u32)
        }

        /// The parameters shared by all passes over the image, which follow their own.
        fn tiling(&self, launch: Launch<'a>, tiling: &Tiling, x: &Joined) -> Launch<'a> {
            // Groups of 4 channels start on multiples of 4 elements if and only if 4 divides those of each tensor.
            let vec = x.widths().iter().all(|c| c.is_multiple_of(4));
            launch.u32(tiling.strips).u32(tiling.lane_bits).u32(tiling.warp_bits).u32(vec.into())
        }

        fn grid(&self, tiling: &Tiling) -> [usize; 3] {
            [self.shape.n * tiling.strips, tiling.tiles, 1]
        }

        fn silu(&self) -> usize {
            (self.activation == Activation::Silu).into()
        }
    }

    /// Both tensors of `x`, and the channels of the first.
    fn read<'a>(launch: Launch<'a>, x: &'a Joined) -> Launch<'a> {
        launch.read(x.first()).read_opt(x.second()).u32(x.first().shape().c)
    }

    pub fn forward(job: &Job<'_>, y: &mut Tensor, stats: &mut Tensor, x: &Joined) -> Result<()> {
        let (shape, tiling) = (job.shape, Tiling::new(job.shape));
        let (pixels, grid) = (shape.pixels(), job.grid(&tiling));
        let mut partials = job.scratch(Shape::new(shape.n, tiling.strips, 3, shape.c))?;
        let launch = job.gpu.launch(FWD_MOMENTS.of(x.dtype()), grid, BLOCK).write(&mut partials);
        job.tiling(read(launch, x).u32(pixels).u32(shape.c), &tiling, x).run()?;

        let (lane_bits, threads) = job.join(tiling.strips);
        let launch = job.gpu.launch(&FWD_JOIN, [shape.n * job.groups, 1, 1], threads).write(stats).read(&partials);
        let launch = launch.u32(pixels).u32(tiling.strip).u32(tiling.strips).u32(shape.c).u32(job.groups);
        launch.u32(lane_bits).f32(job.eps).run()?;

        let launch = read(job.gpu.launch(FWD_APPLY.of(x.dtype()), grid, BLOCK).write(y), x).read(stats);
        let launch = launch.view(job.gamma).view(job.beta).u32(job.per_image).u32(pixels).u32(shape.c);
        job.tiling(launch.u32(job.groups), &tiling, x).u32(job.silu()).run()
    }

    /// `gamma (1 + scale)` and `beta (1 + scale) + shift` of each image, (2, n, 1, c).
    pub fn coefficients(gpu: &Gpu, scale_shift: &Tensor, gamma: View<'_>, beta: View<'_>) -> Result<Tensor> {
        let Shape { n, c, .. } = scale_shift.shape();
        let mut own = Tensor::uninit(&Device::Cuda(gpu.clone()), DType::F32, Shape::new(2, n, 1, c / 2))?;
        let launch = gpu.launch(FWD_SCALE_SHIFT.of(scale_shift.dtype()), per_channel(n, c / 2), BLOCK);
        launch.write(&mut own).read(scale_shift).view(gamma).view(beta).u32(n).u32(c / 2).run()?;
        Ok(own)
    }

    /// `dscale_shift` (n, 1, 1, 2c) from each image's sums (n, 2, c), which become its share of `dgamma` and `dbeta`.
    pub fn scale_shift_gradient(
        gpu: &Gpu,
        dscale_shift: &mut Tensor,
        sums: &mut Buffer,
        scale_shift: &Tensor,
        gamma: View<'_>,
        beta: View<'_>,
    ) -> Result<()> {
        let Shape { n, c, .. } = scale_shift.shape();
        let c = c / 2;
        let launch = gpu.launch(BWD_SCALE_SHIFT.of(scale_shift.dtype()), per_channel(n, c), BLOCK);
        launch.write(dscale_shift).buffer_mut(sums).read(scale_shift).view(gamma).view(beta).u32(n).u32(c).run()
    }

    /// A grid with a thread for each channel of each image.
    fn per_channel(n: usize, c: usize) -> [usize; 3] {
        [(n * c).div_ceil(BLOCK as usize), 1, 1]
    }

    /// Writes to the tensors `dx`, or over `dy` if there are none. Returns each image's share of `dgamma` and `dbeta`,
    /// (n, 2, c).
    pub fn backward(
        job: &Job<'_>,
        [dx, dx_second]: [Option<&mut Tensor>; 2],
        dy: &mut Tensor,
        x: &Joined,
        stats: &Tensor,
    ) -> Result<Buffer> {
        let (shape, tiling) = (job.shape, Tiling::new(job.shape));
        let (pixels, grid) = (shape.pixels(), job.grid(&tiling));
        let mut partials = job.scratch(Shape::new(shape.n, tiling.strips, 2, shape.c))?;
        let mut sums = job.gpu.alloc(4 * shape.n * 2 * shape.c)?;
        let mut slopes = job.scratch(Shape::new(shape.n, 1, job.groups, 2))?;
        let launch = read(job.gpu.launch(BWD_SUMS.of(x.dtype()), grid, BLOCK).write(&mut partials), x).read(dy);
        let launch = launch.read(stats).view(job.gamma).view(job.beta).u32(job.per_image).u32(pixels).u32(shape.c);
        job.tiling(launch.u32(job.groups), &tiling, x).u32(job.silu()).run()?;

        let (lane_bits, threads) = job.join(tiling.strips);
        let launch = job.gpu.launch(&BWD_JOIN, [shape.n * job.groups, 1, 1], threads);
        let launch = launch.buffer_mut(&mut sums).write(&mut slopes).read(&partials).read(stats).view(job.gamma);
        let launch = launch.u32(job.per_image).u32(pixels).u32(tiling.strips).u32(shape.c);
        launch.u32(job.groups).u32(lane_bits).run()?;

        let launch = job.gpu.launch(BWD_DX.of(x.dtype()), grid, BLOCK);
        let launch = match dx {
            Some(dx) => launch.write(dx).write_opt(dx_second).read(dy),
            None => launch.write(dy).null().first_again(),
        };
        let launch = read(launch, x).read(stats).read(&slopes).view(job.gamma).view(job.beta);
        let launch = launch.u32(job.per_image).u32(pixels).u32(shape.c).u32(job.groups);
        job.tiling(launch, &tiling, x).u32(job.silu()).run()?;
        Ok(sums)
    }
}
