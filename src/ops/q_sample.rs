//! The forward process in one pass: `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps` (DDPM, equation 4), from
//! stored bytes.
//!
//! Gathers the batch's images by index, mirrors some of them, scales bytes to [-1, 1] (`u/127.5 - 1`), draws eps and
//! writes x_t. Neither x_0 nor eps is stored: the loss redraws eps. No gradient: nothing before x_t is trained.
//!
//! Shapes: images `(count, h, w, c)` in bytes, x_t `(n, h, w, c)`. Noise is indexed by the elements of x_t, so
//! mirroring changes x_0 but not eps. Numerics: `2u - 255` is an exact integer, so x_0 is rounded once and keeps its
//! digits near 0, where `u/127.5 - 1` cancels.

use crate::conditioning::Conditioning;
use crate::device::Device;
use crate::device::cuda::Buffer;
use crate::diffusion::{Batch, Schedule, Timestep};
use crate::error::Result;
use crate::images::{Images, Numbers, Source};
use crate::tensor::{DType, Shape, Tensor};

/// `(timesteps, 1, 1, 2)`, f32: the factors of `2u - 255` and of eps at each timestep.
pub struct Coefficients(Tensor);

impl Coefficients {
    /// A schedule's coefficients, computed in f64.
    ///
    /// # Errors
    /// A GPU error.
    pub fn new(device: &Device, schedule: &Schedule) -> Result<Self> {
        Ok(Coefficients(Tensor::from_slice(device, Shape::new(schedule.len(), 1, 1, 2), &factors(schedule))?))
    }

    /// Takes those of another schedule of as many timesteps, in the same memory.
    ///
    /// # Errors
    /// A GPU error.
    pub fn follow(&mut self, schedule: &Schedule) -> Result<()> {
        self.0.write(&factors(schedule))
    }
}

fn factors(schedule: &Schedule) -> Vec<f32> {
    let pair = |t| {
        let (signal, noise) = schedule.q_sample_coefficients(t);
        [(signal / 255.0) as f32, noise as f32]
    };
    (0..schedule.len()).flat_map(pair).collect()
}

/// Noised images.
pub struct Noised {
    /// x_t, `(n, h, w, c)`, in the device's activation type.
    pub x_t: Tensor,
    /// The timesteps for the network, `(n, 1, 1, 1)`, f32.
    pub t: Tensor,
    /// The classes for the network.
    pub conditioning: Conditioning,
}

/// x_t of the batch's images at their timesteps; on a GPU the kernel draws timesteps and flips itself, with the same
/// bits as `batch`.
///
/// # Errors
/// A GPU error.
pub fn q_sample(device: &Device, source: Source<'_>, batch: &Batch, coefficients: &Coefficients) -> Result<Noised> {
    let (shape, n) = (source.shape(), batch.len());
    let chain = coefficients.0.shape().n;
    assert_eq!(batch.timesteps as usize, chain, "q_sample: timesteps of the batch and of the coefficients");
    let per_image = Shape::new(n, 1, 1, 1);
    match (device, source) {
        (Device::Cpu(_), Source::Host(images)) => {
            assert_eq!(images.pixels.len(), shape.len(), "q_sample: {} bytes for images {shape}", images.pixels.len());
            for &index in &batch.indices {
                assert!(index < shape.n, "q_sample: image {index} of {}", shape.n);
            }
            let mut x_t = Tensor::uninit(device, DType::F32, Shape { n, ..shape })?;
            let t = batch.t();
            cpu::forward(x_t.data_mut(), images, batch, &t, coefficients.0.data());
            let t: Vec<f32> = t.into_iter().map(|t| t as f32).collect();
            let t = Tensor::from_slice(device, per_image, &t)?;
            Ok(Noised { x_t, t, conditioning: Conditioning::from_labels(device, batch.labels().as_deref())? })
        }
        (Device::Cuda(gpu), Source::Cuda { pixels, shape, rows, classes }) => {
            let mut x_t = Tensor::uninit(device, device.activations(), Shape { n, ..shape })?;
            let mut t = match &batch.timestep {
                Timestep::Given(t) => {
                    let t: Vec<f32> = t.iter().map(|&t| t as f32).collect();
                    Tensor::from_slice(device, per_image, &t)?
                }
                _ => Tensor::uninit(device, DType::F32, per_image)?,
            };
            let mut labels = classes.map(|_| Tensor::uninit(device, DType::F32, per_image)).transpose()?;
            let to = (&mut x_t, &mut t, labels.as_mut());
            cuda::forward(gpu, to, pixels, (rows, classes), batch, &coefficients.0)?;
            let conditioning = labels.map_or(Conditioning::NONE, Conditioning::on_labels);
            Ok(Noised { x_t, t, conditioning })
        }
        (Device::Meta(_), source) => {
            let x_t = Tensor::uninit(device, device.activations(), Shape { n, ..source.shape() })?;
            let t = Tensor::uninit(device, DType::F32, per_image)?;
            Ok(Noised { x_t, t, conditioning: Conditioning::from_labels(device, batch.labels.as_deref())? })
        }
        (device, _) => panic!("q_sample: the images are not on {device}"),
    }
}

/// The definition.
pub mod reference {
    use num_traits::{Float, FloatConst};

    use crate::diffusion::{Batch, Schedule};
    use crate::images::Images;
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

    /// x_0 of image `i` of a batch.
    pub fn x_0<T: Float>(images: Images<'_>, batch: &Batch, i: usize) -> Vec<T> {
        let (s, flip) = (images.shape, batch.flip()[i]);
        let mut x_0 = Vec::new();
        for y in 0..s.h {
            for x in 0..s.w {
                let x = if flip { s.w - 1 - x } else { x };
                let pixel = ((batch.indices[i] * s.h + y) * s.w + x) * s.c;
                x_0.extend(images.pixels[pixel..pixel + s.c].iter().map(|&u| scale::<T>(u)));
            }
        }
        x_0
    }

    /// The whole operation, image after image.
    pub fn batch<T: Float + FloatConst>(images: Images<'_>, batch: &Batch, schedule: &Schedule) -> Vec<T> {
        let mut x_t = Vec::new();
        for (i, t) in batch.t().into_iter().enumerate() {
            let x_0: Vec<T> = x_0(images, batch, i);
            let eps = normals(&batch.noise.image(i), 0, x_0.len());
            x_t.extend(forward(&x_0, &eps, t as usize, schedule));
        }
        x_t
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::*;
    use crate::device::cpu::simd;
    use crate::rng::{Stream, normals_from};

    /// Elements per task, of one image: noise and result (16 KiB) stay in L1 between the two loops.
    const CHUNK: usize = 1 << 12;

    /// `t` are the batch's timesteps; `table` holds the two factors of each.
    pub fn forward(x_t: &mut [f32], images: Images<'_>, batch: &Batch, t: &[u32], table: &[f32]) {
        let Shape { h, w, c, .. } = images.shape;
        let (len, flip) = (h * w * c, batch.flip());
        x_t.par_chunks_mut(len.max(1)).enumerate().for_each(|(i, x_t)| {
            let t = t[i] as usize;
            let factors = Factors { byte: table[2 * t], eps: table[2 * t + 1] };
            let image = &images.pixels[batch.indices[i] * len..][..len];
            let stream = batch.noise.image(i);
            x_t.par_chunks_mut(CHUNK).enumerate().for_each(|(k, x_t)| {
                let first = k * CHUNK;
                if flip[i] {
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

    /// The same for a mirrored image with rows of extent `(w, c)`.
    fn noised_mirrored(
        x_t: &mut [f32],
        image: &[u8],
        (w, c): (usize, usize),
        stream: &Stream,
        first: usize,
        factors: Factors,
    ) {
        // Walks along the mirrored rows; dividing at every element would cost more than the noise.
        let (mut x, mut channel) = (first / c % w, first % c);
        let mut source = (first / c / w * w + (w - 1 - x)) * c;
        let mut mirrored = [0; CHUNK];
        for u in &mut mirrored[..x_t.len()] {
            *u = image[source + channel];
            channel += 1;
            if channel == c {
                (channel, x) = (0, x + 1);
                if x == w {
                    // From the first pixel of a row to the last of the next.
                    (x, source) = (0, source + (2 * w - 1) * c);
                } else {
                    source -= c;
                }
            }
        }
        noised(x_t, &mirrored[..x_t.len()], stream, first, factors);
    }

    simd::dispatch! {
        fn add_pixels<S>(x_t: &mut [f32], pixels: &[u8], factors: Factors) {
            for (x_t, &u) in x_t.iter_mut().zip(pixels) {
                let centred = (2 * i32::from(u) - 255) as f32;
                *x_t = S::mul_add(factors.byte, centred, factors.eps * *x_t);
            }
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::{Gpu, each_four_of_images};
    use crate::kernels::philox::THREADS;
    use crate::kernels::q_sample::FWD;
    use crate::rng::Purpose;

    pub fn forward(
        gpu: &Gpu,
        (x_t, t, labels): (&mut Tensor, &mut Tensor, Option<&mut Tensor>),
        pixels: &Buffer,
        (rows, classes): (Numbers<'_>, Option<Numbers<'_>>),
        batch: &Batch,
        table: &Tensor,
    ) -> Result<()> {
        let Shape { n, h, w, c } = x_t.shape();
        let (image, kernel) = (h * w * c, FWD.of(x_t.dtype()));
        assert!(w * c < 1 << 31, "q_sample: rows of {w} x {c} numbers; the kernel counts to 2^31");
        // An image's streams (timestep, flip, label, noise) share seed, step and stream number.
        let s = batch.noise;
        let (drawn, strata) = match &batch.timestep {
            Timestep::Uniform(streams) => (*streams, 0),
            Timestep::Stratified { streams, images } => (*streams, *images as usize),
            Timestep::Given(_) => (s, 0),
        };
        assert_eq!((drawn.seed, drawn.step, drawn.first), (s.seed, s.step, s.first), "the streams of an image");
        let launch = gpu.launch(kernel, each_four_of_images(n, image), THREADS).write(x_t).write(t).write_opt(labels);
        let now = gpu.now();
        let launch = launch.buffer(pixels).view(rows.view(now)).view_opt(classes.map(|c| c.view(now))).read(table);
        let launch = launch.u32(n).u64(image).u32(w).u32(c).u32(batch.timesteps as usize).streams_of_step(s);
        let launch = launch.u32(drawn.purpose as usize).u32(Purpose::Flip as usize);
        let launch = launch.u32(batch.flips.is_some().into()).u32(strata);
        let launch = launch.u32(matches!(batch.timestep, Timestep::Given(_)).into());
        let (below, null) = batch.dropped.map_or((0, 0), |dropped| (dropped.below, dropped.null));
        launch.u32(Purpose::LabelDropout as usize).u32(below as usize).u32(null as usize).clock().run()
    }
}
