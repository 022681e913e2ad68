//! What attention pooling adds to attention: the pixels of an image and their mean as tokens with a learned position
//! ([`tokens`]), and the first token alone ([`first`]). Attention from the first token over all tokens (CLIP; the
//! classifiers of guided-diffusion) pools the image into one vector.
//!
//! ```text
//! tokens   y_i0 = 1/P sum_p x_ip + e_0      y_i,1+p = x_ip + e_1+p      first   y_i = x_i0
//! ```
//!
//! Shapes: tokens: `x` (n, h, w, c) with P = h w pixels, the positional embedding `e` (P + 1, 1, 1, c), `y` (n, 1, P +
//! 1, c); first: `x` (n, 1, tokens, c), `y` (n, 1, 1, c).
//!
//! Gradient: `dx_ip = dy_i,1+p + dy_i0 / P`, `de_j = sum_i dy_ij`; of first, `dx_i0 = dy_i` and 0 for the other tokens.
//!
//! Saved: nothing. Numerics: f32 sums in the order of the pixels or images, one rounding a result. The coarsest level
//! of a network has few pixels, so the CPU path uses one core.

use crate::device::Device;
use crate::error::Result;
use crate::params::Param;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{DType, Shape, Tensor};

/// The mean of an image's pixels and then each pixel, with the embedding of its position added.
///
/// # Errors
/// A GPU error.
pub fn tokens(tape: &mut Tape<'_>, x: &Var, position: Param) -> Result<Var> {
    let (xs, ps) = (x.shape(), tape.params().shape(position));
    assert!(xs.pixels() > 0, "pool: the mean of no pixels, {xs}");
    assert_eq!(ps, Shape::new(xs.pixels() + 1, 1, 1, xs.c), "pool: positions {ps} for images {xs}");
    let ys = Shape::new(xs.n, 1, xs.pixels() + 1, xs.c);
    let mut y = Tensor::uninit(tape.device(), x.value().dtype(), ys)?;
    match tape.device() {
        Device::Cpu(_) => cpu::tokens(y.data_mut(), x.data(), tape.params().get(position), xs),
        Device::Cuda(gpu) => cuda::tokens(gpu, &mut y, x.value(), tape.params().view(position, DType::F32))?,
        Device::Meta(_) => {}
    }
    tape.push("pool", y, || TokensBackward { x: x.id(), shape: xs, position })
}

struct TokensBackward {
    x: Option<VarId>,
    /// Of x.
    shape: Shape,
    position: Param,
}

impl Backward for TokensBackward {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let device = grads.device();
        match device {
            Device::Cpu(_) => {
                if let Some(position) = grads.param(self.position) {
                    cpu::tokens_position(position.data, position.accumulate, dy.data());
                }
            }
            Device::Cuda(gpu) => {
                if let Some(position) = grads.param_view(self.position) {
                    cuda::tokens_position(gpu, position, &dy)?;
                }
            }
            Device::Meta(_) => {}
        }
        let Some(id) = self.x else { return Ok(()) };
        let mut dx = Tensor::uninit(device, dy.dtype(), self.shape)?;
        match device {
            Device::Cpu(_) => cpu::tokens_dx(dx.data_mut(), dy.data(), self.shape),
            Device::Cuda(gpu) => cuda::tokens_dx(gpu, &mut dx, &dy)?,
            Device::Meta(_) => {}
        }
        grads.add(id, dx)
    }
}

/// The first token of each image.
///
/// # Errors
/// A GPU error.
pub fn first(tape: &mut Tape<'_>, x: &Var) -> Result<Var> {
    let xs = x.shape();
    assert!(xs.h == 1 && xs.w > 0, "pool: tokens are (n, 1, tokens, c), not {xs}");
    let mut y = Tensor::uninit(tape.device(), x.value().dtype(), Shape { w: 1, ..xs })?;
    match tape.device() {
        Device::Cpu(_) => cpu::first(y.data_mut(), x.data(), xs),
        Device::Cuda(gpu) => cuda::first(gpu, &mut y, x.value())?,
        Device::Meta(_) => {}
    }
    tape.push("pool", y, || FirstBackward { x: x.id(), shape: xs })
}

struct FirstBackward {
    x: Option<VarId>,
    /// Of x.
    shape: Shape,
}

impl Backward for FirstBackward {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let Some(id) = self.x else { return Ok(()) };
        let mut dx = Tensor::uninit(grads.device(), dy.dtype(), self.shape)?;
        match grads.device() {
            Device::Cpu(_) => cpu::first_dx(dx.data_mut(), dy.data(), self.shape),
            Device::Cuda(gpu) => cuda::first_dx(gpu, &mut dx, &dy)?,
            Device::Meta(_) => {}
        }
        grads.add(id, dx)
    }
}

/// The definition; rows of `c`.
pub mod reference {
    use num_traits::Float;

    /// `y` of [`tokens`](super::tokens) for images of `pixels` pixels.
    pub fn tokens<T: Float>(x: &[T], position: &[T], pixels: usize, c: usize) -> Vec<T> {
        let mut y = Vec::new();
        for image in x.chunks_exact(pixels * c) {
            for k in 0..c {
                let sum = (0..pixels).fold(T::zero(), |sum, p| sum + image[p * c + k]);
                y.push(sum / T::from(pixels).expect("a count") + position[k]);
            }
            y.extend(image.iter().zip(&position[c..]).map(|(&x, &e)| x + e));
        }
        y
    }

    /// Its `dx` and `de`.
    pub fn tokens_backward<T: Float>(dy: &[T], pixels: usize, c: usize) -> [Vec<T>; 2] {
        let (mut dx, mut de) = (Vec::new(), vec![T::zero(); (pixels + 1) * c]);
        for dy in dy.chunks_exact((pixels + 1) * c) {
            dx.extend((c..dy.len()).map(|i| dy[i] + dy[i % c] / T::from(pixels).expect("a count")));
            de.iter_mut().zip(dy).for_each(|(de, &dy)| *de = *de + dy);
        }
        [dx, de]
    }

    /// `y` of [`first`](super::first).
    pub fn first<T: Float>(x: &[T], tokens: usize, c: usize) -> Vec<T> {
        x.chunks_exact(tokens * c).flat_map(|image| image[..c].to_vec()).collect()
    }

    /// Its `dx`.
    pub fn first_backward<T: Float>(dy: &[T], tokens: usize, c: usize) -> Vec<T> {
        let of_image = |dy: &[T]| [dy, &vec![T::zero(); (tokens - 1) * c]].concat();
        dy.chunks_exact(c).flat_map(of_image).collect()
    }
}

mod cpu {
    use crate::tensor::Shape;

    pub fn tokens(y: &mut [f32], x: &[f32], position: &[f32], xs: Shape) {
        let (image, c) = (xs.pixels() * xs.c, xs.c);
        for (y, x) in y.chunks_exact_mut(image + c).zip(x.chunks_exact(image)) {
            let (mean, pixels) = y.split_at_mut(c);
            mean.fill(0.0);
            for x in x.chunks_exact(c) {
                mean.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
            }
            mean.iter_mut().zip(position).for_each(|(mean, e)| *mean = *mean / xs.pixels() as f32 + e);
            pixels.iter_mut().zip(x).zip(&position[c..]).for_each(|((y, x), e)| *y = x + e);
        }
    }

    pub fn tokens_dx(dx: &mut [f32], dy: &[f32], xs: Shape) {
        let (image, c) = (xs.pixels() * xs.c, xs.c);
        for (dx, dy) in dx.chunks_exact_mut(image).zip(dy.chunks_exact(image + c)) {
            let (of_mean, of_pixels) = dy.split_at(c);
            for (dx, dy) in dx.chunks_exact_mut(c).zip(of_pixels.chunks_exact(c)) {
                for ((dx, dy), of_mean) in dx.iter_mut().zip(dy).zip(of_mean) {
                    *dx = dy + of_mean / xs.pixels() as f32;
                }
            }
        }
    }

    pub fn tokens_position(dposition: &mut [f32], accumulate: bool, dy: &[f32]) {
        if !accumulate {
            dposition.fill(0.0);
        }
        for dy in dy.chunks_exact(dposition.len()) {
            dposition.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
        }
    }

    pub fn first(y: &mut [f32], x: &[f32], xs: Shape) {
        for (y, x) in y.chunks_exact_mut(xs.c).zip(x.chunks_exact(xs.w * xs.c)) {
            y.copy_from_slice(&x[..xs.c]);
        }
    }

    pub fn first_dx(dx: &mut [f32], dy: &[f32], xs: Shape) {
        for (dx, dy) in dx.chunks_exact_mut(xs.w * xs.c).zip(dy.chunks_exact(xs.c)) {
            dx[..xs.c].copy_from_slice(dy);
            dx[xs.c..].fill(0.0);
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::tile::over_rows;
    use crate::device::cuda::{Gpu, View};
    use crate::kernels::pool::{FIRST_BWD, FIRST_FWD, TOKENS_BWD_DX, TOKENS_BWD_POSITION, TOKENS_FWD};
    use crate::params::ParamView;

    pub fn tokens(gpu: &Gpu, y: &mut Tensor, x: &Tensor, position: View<'_>) -> Result<()> {
        let Shape { n, c, .. } = x.shape();
        let (grid, lane_bits) = over_rows(n, c, 256);
        let launch = gpu.launch(TOKENS_FWD.of(x.dtype()), grid, 256).write(y).read(x).view(position);
        launch.u32(n).u32(x.shape().pixels()).u32(c).u32(lane_bits).run()
    }

    pub fn tokens_dx(gpu: &Gpu, dx: &mut Tensor, dy: &Tensor) -> Result<()> {
        let (Shape { n, c, .. }, pixels) = (dx.shape(), dx.shape().pixels());
        let (grid, lane_bits) = over_rows(n, c, 256);
        let launch = gpu.launch(TOKENS_BWD_DX.of(dy.dtype()), grid, 256).write(dx).read(dy);
        launch.u32(n).u32(pixels).u32(c).u32(lane_bits).run()
    }

    pub fn tokens_position(gpu: &Gpu, position: ParamView<'_>, dy: &Tensor) -> Result<()> {
        let Shape { n, w: tokens, c, .. } = dy.shape();
        let (grid, lane_bits) = over_rows(tokens, c, 256);
        let launch = gpu.launch(TOKENS_BWD_POSITION.of(dy.dtype()), grid, 256).view_mut(position.view).read(dy);
        launch.u32(n).u32(tokens).u32(c).u32(position.accumulate.into()).u32(lane_bits).run()
    }

    pub fn first(gpu: &Gpu, y: &mut Tensor, x: &Tensor) -> Result<()> {
        let Shape { n, w: tokens, c, .. } = x.shape();
        let (grid, lane_bits) = over_rows(n, c, 256);
        let launch = gpu.launch(FIRST_FWD.of(x.dtype()), grid, 256).write(y).read(x);
        launch.u32(n).u32(tokens).u32(c).u32(lane_bits).run()
    }

    pub fn first_dx(gpu: &Gpu, dx: &mut Tensor, dy: &Tensor) -> Result<()> {
        let Shape { n, w: tokens, c, .. } = dx.shape();
        let (grid, lane_bits) = over_rows(n * tokens, c, 256);
        let launch = gpu.launch(FIRST_BWD.of(dy.dtype()), grid, 256).write(dx).read(dy);
        launch.u32(n).u32(tokens).u32(c).u32(lane_bits).run()
    }
}
