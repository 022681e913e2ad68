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

/// One row of `dim` (at least 2) elements per timestep.
///
/// `t` (n, 1, 1, 1) is f32; the result (n, 1, 1, dim) has the device's activation type.
///
/// # Errors
/// A GPU error.
pub fn time_embedding(device: &Device, t: &Tensor, dim: usize, form: Sinusoid) -> Result<Tensor> {
    assert!(dim >= 2, "time_embedding: dim is {dim}, a sine and a cosine need 2");
    assert_eq!(t.shape(), Shape::new(t.shape().n, 1, 1, 1), "time_embedding: t is {}", t.shape());
    let mut y = Tensor::uninit(device, device.activations(), Shape { c: dim, ..t.shape() })?;
    match device {
        Device::Cpu(_) => cpu::forward(y.data_mut(), t.data(), dim, form),
        Device::Cuda(gpu) => cuda::forward(gpu, &mut y, t, form)?,
        Device::Meta(_) => {}
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

    pub fn forward(gpu: &Gpu, y: &mut Tensor, t: &Tensor, form: Sinusoid) -> Result<()> {
        let Shape { n, c: dim, .. } = y.shape();
        let (sines, cosines) = form.places(dim / 2);
        // 128 threads: a batch's embedding is a few blocks, and smaller ones spread over more multiprocessors.
        let (grid, lane_bits) = over_rows(n, dim / 2, 128);
        let launch = gpu.launch(FWD.of(y.dtype()), grid, 128).write(y).read(t).u64(n);
        let launch = launch.u32(dim).f64(form.scale).f64((PERIOD as f64).ln()).f64(form.spread(dim / 2) as f64);
        launch.u32(sines).u32(cosines).u32(lane_bits).run()
    }
}
