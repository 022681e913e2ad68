//! Sinusoidal embedding of timesteps, as in the DDPM code (`get_timestep_embedding` of hojonathanho/diffusion, after
//! Vaswani et al. 2017, section 3.5): `y[i] = [sin(t_i f_0), .., sin(t_i f_{m-1}), cos(t_i f_0), .., cos(t_i f_{m-1})]`
//! with `m = dim/2` and `f_k = exp(-ln(1e4) k / (m - 1))`; an odd `dim` ends with a zero. `t (n)`, `y (n,1,1,dim)`.
//! OpenAI's code and the defaults of diffusers divide by m instead and put the cosines first; [`Sinusoid`] selects the
//! form. A scale multiplies t first: OpenAI's `rescale_timesteps` gives the network 1000 t / T.
//!
//! No gradient: timesteps are data. Computed in f64 and rounded once, since at t = 1000 one rounding of `t f_k` in f32
//! already moves the sine by 3e-5. `n dim` sines cost nothing compared with the network.

use crate::device::Device;
use crate::error::Result;
use crate::tensor::{Shape, Tensor};

/// The form of the embedding, in diffusers' terms; the default is the paper's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sinusoid {
    /// s in `f_k = exp(-ln(1e4) k / (m - s))`.
    pub freq_shift: usize,
    /// Cosines before sines.
    pub flip_sin_to_cos: bool,
    /// Factor of t.
    pub scale: f64,
}

/// Ratio of the longest wavelength to the shortest.
const PERIOD: usize = 10_000;

impl Sinusoid {
    /// m - s, at least 1, so that a single frequency is f_0 = 1.
    fn spread(self, m: usize) -> usize {
        (m - self.freq_shift).max(1)
    }

    /// Offsets of the sines and the cosines in a row.
    fn places(self, m: usize) -> (usize, usize) {
        if self.flip_sin_to_cos { (m, 0) } else { (0, m) }
    }
}

impl Default for Sinusoid {
    fn default() -> Self {
        Sinusoid { freq_shift: 1, flip_sin_to_cos: false, scale: 1.0 }
    }
}

/// The timesteps of a batch.
#[derive(Clone, Copy)]
pub enum Times<'a> {
    /// Of each image its own, (n, 1, 1, 1), f32.
    Each(&'a Tensor),
    /// So many images that all have that of the turn which the device, a GPU, is bound to.
    OfTurn(usize),
}

impl<'a> From<&'a Tensor> for Times<'a> {
    fn from(t: &'a Tensor) -> Self {
        Times::Each(t)
    }
}

impl Times<'_> {
    /// Number of images.
    pub fn count(self) -> usize {
        match self {
            Times::Each(t) => t.shape().n,
            Times::OfTurn(n) => n,
        }
    }
}

/// One row of `dim` (at least 2) elements per timestep: (n, 1, 1, dim), of the device's activation type.
///
/// # Errors
/// A GPU error.
pub fn time_embedding<'a>(device: &Device, t: impl Into<Times<'a>>, dim: usize, form: Sinusoid) -> Result<Tensor> {
    assert!(dim >= 2, "time_embedding: dim is {dim}, a sine and a cosine need 2");
    let t = t.into();
    if let Times::Each(t) = t {
        assert_eq!(t.shape(), Shape::new(t.shape().n, 1, 1, 1), "time_embedding: t is {}", t.shape());
    }
    let mut y = Tensor::uninit(device, device.activations(), Shape::new(t.count(), 1, 1, dim))?;
    match (device, t) {
        (Device::Cpu(_), Times::Each(t)) => cpu::forward(y.data_mut(), t.data(), dim, form),
        (Device::Cpu(_), Times::OfTurn(_)) => panic!("time_embedding: only a GPU has a turn"),
        (Device::Cuda(gpu), t) => cuda::forward(gpu, &mut y, t, form)?,
        (Device::Meta(_), _) => {}
    }
    Ok(y)
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use super::{PERIOD, Sinusoid};

    /// Rows of `dim` elements, one per `t`.
    pub fn forward<T: Float>(t: &[T], dim: usize, form: Sinusoid) -> Vec<T> {
        let number = |v: usize| T::from(v).expect("a small integer");
        let m = dim / 2;
        let (sines, cosines) = form.places(m);
        let mut y = vec![T::zero(); t.len() * dim];
        for (y, &t) in y.chunks_exact_mut(dim).zip(t) {
            for k in 0..m {
                let f = (-number(PERIOD).ln() * number(k) / number(form.spread(m))).exp();
                let angle = t * T::from(form.scale).expect("a number") * f;
                y[sines + k] = angle.sin();
                y[cosines + k] = angle.cos();
            }
        }
        y
    }
}

mod cpu {
    use super::{Sinusoid, reference};

    pub fn forward(y: &mut [f32], t: &[f32], dim: usize, form: Sinusoid) {
        let t: Vec<f64> = t.iter().map(|&t| f64::from(t)).collect();
        for (y, exact) in y.iter_mut().zip(reference::forward(&t, dim, form)) {
            *y = exact as f32;
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::Gpu;
    use crate::device::cuda::tile::over_rows;
    use crate::kernels::time_embedding::FWD;

    pub fn forward(gpu: &Gpu, y: &mut Tensor, t: Times<'_>, form: Sinusoid) -> Result<()> {
        let Shape { n, c: dim, .. } = y.shape();
        let (sines, cosines) = form.places(dim / 2);
        // 128 threads: a batch's embedding is a few blocks, and smaller ones spread over more multiprocessors.
        let (grid, lane_bits) = over_rows(n, dim / 2, 128);
        let launch = gpu.launch(FWD.of(y.dtype()), grid, 128).write(y);
        let (launch, each) = match t {
            Times::Each(t) => (launch.read(t), 1),
            Times::OfTurn(_) => (launch.time_of_turn(), 0),
        };
        let launch = launch.u64(n).u32(dim).f64(form.scale).f64((PERIOD as f64).ln()).f64(form.spread(dim / 2) as f64);
        launch.u32(sines).u32(cosines).u32(lane_bits).u32(each).run()
    }
}
