//! The forward process in one pass: `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` (DDPM, equation 4), from
//! stored bytes.
//!
//! Gathers the batch's images by index, mirrors those to be mirrored, scales bytes to [-1, 1] (`u8/127.5 - 1`), draws
//! eps and writes x_t. Neither x_0 nor eps is stored: the loss draws eps again. No gradient: nothing before x_t is
//! trained.
//!
//! Shapes: images `(count, h, w, c)` in bytes, x_t `(n, h, w, c)`. Noise is element by element of the written, mirrored
//! image, so mirroring changes x_0 and not eps. Numerics: `2u - 255` is a whole number, so x_0 carries one rounding and
//! keeps its digits around 0, where `u/127.5 - 1` cancels.

use crate::device::Device;
use crate::diffusion::{Batch, Schedule};
use crate::tensor::{Shape, Tensor};

/// Images as a data set holds them: `(count, h, w, c)` bytes.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// `shape.len()` bytes.
    pub pixels: &'a [u8],
    /// Extent; `n` is the number of images.
    pub shape: Shape,
}

/// x_t of the batch's images, `(batch.len(), h, w, c)`, at their timesteps.
pub fn q_sample(device: &Device, images: Images<'_>, batch: &Batch, schedule: &Schedule) -> Tensor {
    let Images { pixels, shape } = images;
    assert_eq!(pixels.len(), shape.len(), "q_sample: {} bytes for images {shape}", pixels.len());
    assert_eq!(batch.len(), batch.t.len(), "q_sample: {} images, {} timesteps", batch.len(), batch.t.len());
    assert_eq!(batch.len(), batch.flip.len(), "q_sample: {} images, {} flips", batch.len(), batch.flip.len());
    for (&index, &t) in batch.indices.iter().zip(&batch.t) {
        assert!(index < shape.n, "q_sample: image {index} of {}", shape.n);
        assert!((t as usize) < schedule.len(), "q_sample: timestep {t} of {}", schedule.len());
    }
    match device {
        Device::Cpu(_) => {
            let mut x_t = Tensor::uninit(device, Shape { n: batch.len(), ..shape });
            cpu::forward(x_t.data_mut(), images, batch, schedule);
            x_t
        }
    }
}

/// The definition.
pub mod reference {
    use num_traits::{Float, FloatConst};

    use super::Images;
    use crate::diffusion::{Batch, Schedule};
    use crate::rng::reference::normals;

    /// `u/127.5 - 1`.
    pub fn scale<T: Float>(pixel: u8) -> T {
        let number = |v: i16| T::from(v).expect("small whole numbers are exact");
        number(2 * i16::from(pixel) - 255) / number(255)
    }

    /// Equation 4 for one timestep.
    pub fn forward<T: Float>(x_0: &[T], eps: &[T], t: usize, schedule: &Schedule) -> Vec<T> {
        let (signal, noise) = schedule.q_sample_coefficients(t);
        let [signal, noise] = [signal, noise].map(|v| T::from(v).expect("every f64 has a nearest number"));
        x_0.iter().zip(eps).map(|(&x_0, &eps)| signal * x_0 + noise * eps).collect()
    }

    /// The whole operation, image after image.
    pub fn batch<T: Float + FloatConst>(images: Images<'_>, batch: &Batch, schedule: &Schedule) -> Vec<T> {
        let s = images.shape;
        let mut x_t = Vec::new();
        for i in 0..batch.len() {
            let mut x_0 = Vec::new();
            for y in 0..s.h {
                for x in 0..s.w {
                    let x = if batch.flip[i] { s.w - 1 - x } else { x };
                    let pixel = ((batch.indices[i] * s.h + y) * s.w + x) * s.c;
                    x_0.extend(images.pixels[pixel..pixel + s.c].iter().map(|&u| scale::<T>(u)));
                }
            }
            let eps = normals(&batch.noise.image(i), 0, x_0.len());
            x_t.extend(forward(&x_0, &eps, batch.t[i] as usize, schedule));
        }
        x_t
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::*;
    use crate::device::cpu::simd;
    use crate::rng::{Stream, normals_from};

    /// Elements per task, of one image: noise and result (16 KiB) stay in the first-level cache between the two loops.
    const CHUNK: usize = 1 << 12;

    pub fn forward(x_t: &mut [f32], images: Images<'_>, batch: &Batch, schedule: &Schedule) {
        let Shape { h, w, c, .. } = images.shape;
        let len = h * w * c;
        x_t.par_chunks_mut(len.max(1)).enumerate().for_each(|(i, x_t)| {
            let (signal, noise) = schedule.q_sample_coefficients(batch.t[i] as usize);
            let factors = Factors { byte: (signal / 255.0) as f32, eps: noise as f32 };
            let image = &images.pixels[batch.indices[i] * len..][..len];
            let stream = batch.noise.image(i);
            x_t.par_chunks_mut(CHUNK).enumerate().for_each(|(k, x_t)| {
                let first = k * CHUNK;
                if batch.flip[i] {
                    noised_mirrored(x_t, image, (w, c), &stream, first, factors);
                } else {
                    noised(x_t, &image[first..first + x_t.len()], &stream, first, factors);
                }
            });
        });
    }

    /// `x_t = byte (2u - 255) + eps z`.
    #[derive(Clone, Copy)]
    struct Factors {
        byte: f32,
        eps: f32,
    }

    /// Elements `first..` of an image; `x_t` holds the noise between the two loops.
    fn noised(x_t: &mut [f32], pixels: &[u8], stream: &Stream, first: usize, factors: Factors) {
        normals_from(stream, first, x_t);
        add_pixels(x_t, pixels, factors);
    }

    /// The same for an image whose rows run backwards, `(w, c)` their extent.
    fn noised_mirrored(
        x_t: &mut [f32],
        image: &[u8],
        (w, c): (usize, usize),
        stream: &Stream,
        first: usize,
        factors: Factors,
    ) {
        // Walks along the mirrored rows: dividing at every element would cost more than the noise.
        let (mut x, mut channel) = (first / c % w, first % c);
        let mut source = (first / c / w * w + (w - 1 - x)) * c;
        let mut mirrored = [0; CHUNK];
        for u in &mut mirrored[..x_t.len()] {
            *u = image[source + channel];
            channel += 1;
            if channel == c {
                (channel, x) = (0, x + 1);
                if x == w {
                    // From the start of a row to the last pixel of the next.
                    (x, source) = (0, source + (2 * w - 1) * c);
                } else {
                    source -= c;
                }
            }
        }
        noised(x_t, &mirrored[..x_t.len()], stream, first, factors);
    }

    simd::dispatch! {
        fn add_pixels<I>(x_t: &mut [f32], pixels: &[u8], factors: Factors) {
            for (x_t, &u) in x_t.iter_mut().zip(pixels) {
                let centred = (2 * i32::from(u) - 255) as f32;
                *x_t = I::mul_add(factors.byte, centred, factors.eps * *x_t);
            }
        }
    }
}
