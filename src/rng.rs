//! Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//!
//! Every random value is a pure function of `(seed, purpose, step, stream, element)`: the seed is the key, the rest is
//! the counter. So noise can be redrawn instead of stored, a sample does not depend on its batch, and a resumed run
//! draws what the uninterrupted one would have drawn. Element `i` of a stream comes from word `i % 4` of block `i / 4`;
//! normals use the words of a block in pairs (Box and Muller 1958). The integers are bit-identical on every device. The
//! normals are bit-identical on every CPU and at every SIMD level, because they use separate sums, products and square
//! roots, never fused multiply-adds; a device that fuses agrees to 1e-6.
//!
//! [`Generator`] walks a stream word by word through `rand`'s traits, for shuffles and for whatever `rand` offers.

use std::convert::Infallible;

use rayon::prelude::*;

use crate::device::cpu::simd;
use crate::device::cuda::Launch;
use crate::kernels::philox;

/// What a stream of random numbers is for; part of the counter, so streams for different purposes never overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial weights; stream = index of the parameter.
    Init = 0,
    /// Order of the training images; stream = epoch.
    Shuffle = 1,
    /// Timestep of each image of a training step; stream = position in the step's batch.
    Timestep = 2,
    /// Horizontal flip of each image of a training step; stream = position in the step's batch.
    Flip = 3,
    /// Noise eps of the forward process in training; stream = position in the step's batch.
    TrainNoise = 4,
    /// Dropout masks; stream = layer 2^20 + position in the step's batch.
    Dropout = 5,
    /// Noise of the validation loss; stream = position in the held-out split.
    Validation = 6,
    /// x_T of a sample; stream = index of the sample.
    SampleStart = 7,
    /// Noise added at each reverse step; step = timestep, stream = index of the sample.
    SampleNoise = 8,
    /// Timestep of each image of the validation loss; stream = position in the held-out split.
    ValidationTimestep = 9,
    /// Noise in which the bound is measured; step = draw T + timestep, stream = index of the image.
    Evaluation = 10,
    /// Which labels of a training step are dropped; stream = position in the step's batch.
    LabelDropout = 11,
    /// Uniform dequantisation of an image's bytes; step = probe, stream = index of the image.
    Dequantise = 12,
    /// Random signs that estimate a divergence; step = probe, stream = index of the image.
    Probe = 13,
    /// Noise of a Langevin correction; step = timestep corrections a step + correction, stream = index of the sample.
    SampleCorrection = 16,
    /// Noise of inpainting; step = number of the draw, stream = index of the image.
    Inpaint = 17,
    /// Noise of the two images that are interpolated.
    Interpolate = 18,
}

/// Identifies a stream: everything but the position within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The run's seed.
    pub seed: u64,
    /// What the numbers are for.
    pub purpose: Purpose,
    /// Training step, or timestep of the reverse process.
    pub step: u32,
    /// Image, layer or parameter, as [`Purpose`] says.
    pub stream: u32,
}

/// The streams of a batch, one per image: image `i` has stream `first + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streams {
    /// The run's seed.
    pub seed: u64,
    /// What the numbers are for.
    pub purpose: Purpose,
    /// Training step, or timestep of the reverse process.
    pub step: u32,
    /// Stream of the batch's first image.
    pub first: u32,
}

impl Streams {
    /// The stream of the batch's image `i`.
    pub fn image(&self, i: usize) -> Stream {
        let stream = u32::try_from(i).ok().and_then(|i| self.first.checked_add(i));
        let stream = stream.unwrap_or_else(|| panic!("image {i} from stream {} on: streams end at 2^32", self.first));
        Stream { seed: self.seed, purpose: self.purpose, step: self.step, stream }
    }
}

/// Streams as kernel arguments.
impl Launch<'_> {
    /// The streams of a batch.
    pub fn streams(self, s: Streams) -> Self {
        let (seed_lo, seed_hi) = (s.seed as u32, (s.seed >> 32) as u32);
        self.value(philox::Stream { seed_lo, seed_hi, step: s.step, purpose: s.purpose as u32, stream: s.first })
    }

    /// The same for a kernel that takes a clock. If there is one, the kernel uses the clock's step and 0 is passed
    /// here, so that the arguments are the same in every step.
    pub fn streams_of_step(self, s: Streams) -> Self {
        match self.now() {
            None => self.streams(s),
            Some(now) => {
                assert_eq!(now.step, s.step, "step of the clock and of {s:?}");
                self.streams(Streams { step: 0, ..s })
            }
        }
    }
}

/// Elements per task of a parallel fill; a multiple of [`GROUP`].
const CHUNK: usize = 1 << 14;

impl Stream {
    /// The four 32-bit words of block `block`: elements `4*block ..= 4*block + 3` of the stream.
    #[inline]
    pub fn block(&self, block: u32) -> [u32; 4] {
        philox([block, self.stream, self.step, self.purpose as u32], [self.seed as u32, (self.seed >> 32) as u32])
    }

    /// Fills `out` with the stream's first numbers, uniform on `[0, 1)`: multiples of 2^-24.
    pub fn uniforms(&self, out: &mut [f32]) {
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(k, out)| uniforms_from(self, k * CHUNK, out));
    }

    /// Fills `out` with the stream's first standard normals, all within +-6.77.
    pub fn normals(&self, out: &mut [f32]) {
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(k, out)| normals_from(self, k * CHUNK, out));
    }

    /// An unbiased integer, uniform on `0..n` (Lemire 2019): takes words of the stream until one is accepted, the first
    /// with probability at least `1 - n/2^32`. Panics if `n` is 0.
    pub fn below(&self, n: u32) -> u32 {
        assert!(n > 0, "an integer below 0 does not exist");
        // Of the 2^32 words, 2^32 mod n are rejected, so that every result has equally many words.
        let refused = n.wrapping_neg() % n;
        for block in 0..=u32::MAX {
            for word in self.block(block) {
                let product = u64::from(word) * u64::from(n);
                if product as u32 >= refused {
                    return (product >> 32) as u32;
                }
            }
        }
        unreachable!("2^34 words of a stream refused in a row")
    }

    /// A sequential generator over the stream's words.
    pub fn generator(self) -> Generator {
        Generator { stream: self, block: 0, words: [0; 4], left: 0 }
    }
}

/// Ten rounds of Philox 4x32.
#[inline(always)]
pub fn philox(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(c[0]) * 0xD251_1F53;
        let p1 = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(p1 >> 32) as u32 ^ c[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// A sequential generator over the words of a [`Stream`]: `rand::Rng` through `rand::TryRng`. Panics at the end of the
/// stream, after 2^34 words.
#[derive(Clone, Debug)]
pub struct Generator {
    stream: Stream,
    block: u32,
    words: [u32; 4],
    left: usize,
}

impl rand::TryRng for Generator {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        if self.left == 0 {
            self.words = self.stream.block(self.block);
            self.block = self.block.checked_add(1).expect("a stream has 2^34 words");
            self.left = 4;
        }
        self.left -= 1;
        Ok(self.words[3 - self.left])
    }

    /// Two words, the first in the low half.
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        let low = self.try_next_u32()?;
        Ok(u64::from(low) | u64::from(self.try_next_u32()?) << 32)
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        for out in out.chunks_mut(4) {
            out.copy_from_slice(&self.try_next_u32()?.to_le_bytes()[..out.len()]);
        }
        Ok(())
    }
}

/// Numbers per iteration of the vectorised loops: 16 blocks, one per lane of the widest vector.
const GROUP: usize = 64;

/// Index of the block that starts with element `first`. The last of the `len` elements must also lie in the stream.
fn first_block(first: usize, len: usize) -> u32 {
    assert!(first.is_multiple_of(4), "numbers are filled in from the start of a block, not from element {first}");
    assert!((first + len).div_ceil(4) <= 1 << 32, "element {} of a stream: streams end at 2^34", first + len);
    (first / 4) as u32
}

simd::dispatch! {
    /// Elements `first..` of the stream as standard normals; `first` is a multiple of 4.
    pub(crate) fn normals_from<S>(stream: &Stream, first: usize, out: &mut [f32]) {
        fill(stream, first, out, |words| {
            let (a, b) = box_muller(words[0], words[1]);
            let (c, d) = box_muller(words[2], words[3]);
            [a, b, c, d]
        });
    }
}

simd::dispatch! {
    fn uniforms_from<S>(stream: &Stream, first: usize, out: &mut [f32]) {
        fill(stream, first, out, |words| {
            let uniform = |word: u32| (word >> 8) as f32 * (1.0 / 16_777_216.0);
            [uniform(words[0]), uniform(words[1]), uniform(words[2]), uniform(words[3])]
        });
    }
}

#[inline(always)]
fn fill(stream: &Stream, first: usize, out: &mut [f32], make: impl Fn([u32; 4]) -> [f32; 4]) {
    let mut block = first_block(first, out.len());
    let (groups, rest) = out.as_chunks_mut::<GROUP>();
    for out in groups {
        fill_group(stream, block, out, &make);
        block = block.wrapping_add((GROUP / 4) as u32);
    }
    if !rest.is_empty() {
        let mut last = [0.0; GROUP];
        fill_group(stream, block, &mut last, &make);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// One lane per block. The compiler vectorises the loop and turns the four stores into shuffles.
#[inline(always)]
fn fill_group(stream: &Stream, block: u32, out: &mut [f32; GROUP], make: &impl Fn([u32; 4]) -> [f32; 4]) {
    for lane in 0..GROUP / 4 {
        let made = make(stream.block(block.wrapping_add(lane as u32)));
        out[4 * lane..4 * lane + 4].copy_from_slice(&made);
    }
}

/// The uniform number in `[2^-33, 1]` for the magnitude: `(word + 1/2) 2^-32`, rounded twice.
#[inline(always)]
fn open_uniform(word: u32) -> f32 {
    word as f32 * (1.0 / 4_294_967_296.0) + 1.0 / 8_589_934_592.0
}

/// The angle's offset within its quadrant, from -2^24 to 2^24 - 1 in units of 2^-24 of an eighth of a turn; exact in
/// f32.
#[inline(always)]
fn offset(word: u32) -> i32 {
    ((word << 2) as i32) >> 7
}

/// Two independent standard normals `sqrt(-2 ln u) (cos a, sin a)` from two words.
///
/// `u` is [`open_uniform`]; the angle `a` is the second word's upper two bits in quarter turns, plus [`offset`]. The
/// polynomials are minimax fits of the relative error: logarithm 6e-9, sine 4e-9, cosine 2e-10, all well below
/// rounding.
#[inline(always)]
fn box_muller(magnitude: u32, angle: u32) -> (f32, f32) {
    let r = (-2.0 * ln(open_uniform(magnitude))).sqrt();
    let x = offset(angle) as f32 * (std::f32::consts::FRAC_PI_4 / 16_777_216.0);
    let z = x * x;
    let sin = x + x * z * (-0.166_666_55 + z * (8.332_16e-3 + z * -1.951_528_2e-4));
    let cos = (1.0 - 0.5 * z) + z * z * (4.166_664_6e-2 + z * (-1.388_731_6e-3 + z * 2.443_315_7e-5));
    // (cos, sin) in the quadrants: (c, s), (-s, c), (-c, -s), (s, -c).
    let quadrant = angle >> 30;
    let odd = quadrant & 1 != 0;
    let (a, b) = if odd { (sin, cos) } else { (cos, sin) };
    let flip = |v: f32, sign: u32| f32::from_bits(v.to_bits() ^ (sign << 31));
    (r * flip(a, (quadrant ^ (quadrant >> 1)) & 1), r * flip(b, quadrant >> 1))
}

/// Natural logarithm of a positive normal number, to 2 ulp.
///
/// `u = 2^e m` with `m` in `[sqrt(1/2), sqrt(2))`, so `e = 0` around 1 and nothing cancels there; `ln m = f - f^2/2 +
/// f^3 p(f)` with `f = m - 1`.
#[inline(always)]
fn ln(u: f32) -> f32 {
    let e = u.to_bits().wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits()) as i32 >> 23;
    let f = f32::from_bits(u.to_bits().wrapping_sub((e << 23) as u32)) - 1.0;
    let p = 0.127_615_76 + f * -7.634_496e-2;
    let p = -0.131_601_83 + f * p;
    let p = 0.142_017_59 + f * p;
    let p = -0.166_233_57 + f * p;
    let p = 0.200_012_27 + f * p;
    let p = -0.250_008_2 + f * p;
    let p = 0.333_333_3 + f * p;
    e as f32 * std::f32::consts::LN_2 + (f - (0.5 * f) * f + (f * f) * (f * p))
}

/// The definition: one element at a time, logarithm, sine and cosine from the standard library, over any float type.
pub mod reference {
    use num_traits::{Float, FloatConst};

    use super::{Stream, offset, open_uniform};

    /// Standard normals `first..first + len` of a stream.
    pub fn normals<T: Float + FloatConst>(stream: &Stream, first: usize, len: usize) -> Vec<T> {
        (first..first + len).map(|i| normal(stream, i)).collect()
    }

    fn normal<T: Float + FloatConst>(stream: &Stream, i: usize) -> T {
        let number = |v: f64| T::from(v).expect("every f64 has a nearest number");
        let words = stream.block((i / 4) as u32);
        let (magnitude, angle) = if i % 4 < 2 { (words[0], words[1]) } else { (words[2], words[3]) };
        let r = (number(-2.0) * number(f64::from(open_uniform(magnitude))).ln()).sqrt();
        let quarters = number(f64::from(angle >> 30)) + number(f64::from(offset(angle)) / f64::from(1 << 25));
        let angle = T::FRAC_PI_2() * quarters;
        r * if i.is_multiple_of(2) { angle.cos() } else { angle.sin() }
    }
}

#[cfg(test)]
mod tests;
