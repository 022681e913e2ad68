//! Vector instructions, chosen when the program runs: AVX-512, AVX2 with FMA, or whatever the target has anyway.
//!
//! A loop is written once, as the body of `dispatch!`; the macro compiles it three times with different target
//! features and picks one by [`level`]. The compiler vectorises the body, so it should be plain: slices of equal length,
//! no early exit, no call that is not `#[inline(always)]`. [`Isa::mul_add`] is a fused multiply-add where there is one and a product and a
//! sum elsewhere (never a library call), so results differ in the last bits between machines, not between runs.
//!
//! ```ignore
//! simd::dispatch! {
//!     /// `y = silu(x)`.
//!     fn silu_row<I>(y: &mut [f32], x: &[f32]) {
//!         for (y, x) in y.iter_mut().zip(x) {
//!             *y = simd::silu::<I>(*x);
//!         }
//!     }
//! }
//! ```
//!
//! `DDPM_CUDA_SIMD=avx2` or `=portable` lowers the level, to test the other paths on a machine that has the best.
//!
//! Deliberately absent: a vector type. Kernels that need to hold registers (the matrix products) use intrinsics in their
//! own file.

use std::sync::OnceLock;

/// A set of vector instructions; the order is by width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the target has (SSE2 on x86-64, NEON on aarch64).
    Portable,
    /// AVX2 and FMA: 8 floats.
    Avx2,
    /// AVX-512 F, BW, DQ, VL: 16 floats.
    Avx512,
}

/// The best level of this processor, or the lower one that `DDPM_CUDA_SIMD` asks for.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let wanted = match std::env::var("DDPM_CUDA_SIMD").as_deref() {
            Ok("portable") => Level::Portable,
            Ok("avx2") => Level::Avx2,
            _ => Level::Avx512,
        };
        wanted.min(detect())
    })
}

/// The levels this processor has, lowest first.
pub fn levels() -> impl Iterator<Item = Level> {
    let best = detect();
    [Level::Portable, Level::Avx2, Level::Avx512].into_iter().filter(move |l| *l <= best)
}

fn detect() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx2 && avx512 {
            return Level::Avx512;
        }
        if avx2 {
            return Level::Avx2;
        }
    }
    Level::Portable
}

/// A [`Level`] as a type, for code that is compiled once per level.
pub trait Isa: Copy + Send + Sync + 'static {
    /// Floats in a vector register.
    const LANES: usize;

    /// `a*b + c`, rounded once where the level has such an instruction, twice elsewhere.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// [`Level::Avx512`].
#[derive(Clone, Copy)]
pub struct Avx512;

/// [`Level::Avx2`].
#[derive(Clone, Copy)]
pub struct Avx2;

/// [`Level::Portable`].
#[derive(Clone, Copy)]
pub struct Portable;

impl Isa for Avx512 {
    const LANES: usize = 16;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Isa for Avx2 {
    const LANES: usize = 8;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Isa for Portable {
    const LANES: usize = 4;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        // On x86-64 without the FMA feature `mul_add` is a call into the C library, hundreds of times slower.
        if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
    }
}

/// Defines a function whose body is compiled for every [`Level`](crate::device::cpu::simd::Level) and chosen at run time.
/// The one type parameter is the level's [`Isa`](crate::device::cpu::simd::Isa).
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$isa:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_type_parameters)]
            fn body<$isa: $crate::device::cpu::simd::Isa>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::device::cpu::simd::Avx512>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::device::cpu::simd::Avx2>($($arg),*)
            }

            match $crate::device::cpu::simd::level() {
                // SAFETY: `level` returns this only where the processor has the features.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                _ => body::<$crate::device::cpu::simd::Portable>($($arg),*),
            }
        }
    };
}
pub(crate) use dispatch;

/// `e^x` to 1 ulp of the true value (2 without FMA): infinity above 88.73, down to the subnormals and 0 below -103.98, NaN for NaN. Branchless, so that loops over it
/// vectorise.
///
/// Cody and Waite's reduction: `x = n ln 2 + r`, `|r| <= ln 2 / 2`, ln 2 in two parts so that `n` times the first is exact; then
/// `e^r = 1 + r + r^2 q(r)` with q of degree 4 fitted for the smallest largest relative error (4e-9, well under the rounding 6e-8).
#[inline(always)]
pub fn exp<I: Isa>(x: f32) -> f32 {
    // `if` and not `min`/`max`, which would turn NaN into a number. Beyond these bounds the result is infinity or 0.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    let shifted = I::mul_add(x, std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = I::mul_add(n, -0.693_359_4, x); // 355/512: nine bits, so n * it is exact
    let r = I::mul_add(n, 2.121_944_4e-4, r);
    let q = I::mul_add(1.381_459_9e-3, r, 8.368_717e-3);
    let q = I::mul_add(q, r, 4.166_839e-2);
    let q = I::mul_add(q, r, 0.166_665_21);
    let q = I::mul_add(q, r, 0.499_999_94);
    let p = I::mul_add(q * r, r, r) + 1.0;
    // 2^n in two factors: n runs from -150 to 128, further than one exponent reaches.
    let n = shifted.to_bits().wrapping_sub(SHIFT.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

/// `1 / (1 + e^-x)`, to 2 ulp (4 without FMA) down to the subnormals; NaN for NaN.
#[inline(always)]
pub fn sigmoid<I: Isa>(x: f32) -> f32 {
    // e^-|x| never overflows, and for negative x the quotient keeps its digits: e^x / (1 + e^x).
    let e = exp::<I>(-x.abs());
    let one = 1.0 / (1.0 + e);
    if x < 0.0 { e * one } else { one }
}

/// `x sigmoid(x)`, Elfwing et al.'s SiLU (the paper's swish).
#[inline(always)]
pub fn silu<I: Isa>(x: f32) -> f32 {
    x * sigmoid::<I>(x)
}

/// Derivative of [`silu`]: `s (1 + x (1 - s))` with `s = sigmoid(x)`.
#[inline(always)]
pub fn silu_grad<I: Isa>(x: f32) -> f32 {
    let s = sigmoid::<I>(x);
    s * I::mul_add(x, 1.0 - s, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of `f` against `oracle` in units of the last place of the true value, over every 1009th bit pattern
    /// (1009 is prime, so all exponents and low bits occur) between -120 and 120.
    fn worst_ulp(f: impl Fn(f32) -> f32, oracle: impl Fn(f64) -> f64) -> f64 {
        let mut worst = 0.0f64;
        for bits in (0..=u32::MAX).step_by(1009) {
            let x = f32::from_bits(bits);
            if x.is_nan() || x.abs() > 120.0 {
                continue;
            }
            let (got, want) = (f(x), oracle(f64::from(x)));
            if want > f64::from(f32::MAX) {
                assert!(got == f32::INFINITY || got == f32::MAX, "at {x}: {got}, expected {want}");
                continue;
            }
            assert!(!got.is_nan(), "NaN at {x}");
            let ulp = f64::from(f32::EPSILON) * want.abs().log2().floor().max(-126.0).exp2();
            worst = worst.max((f64::from(got) - want).abs() / ulp);
        }
        worst
    }

    fn accuracy<I: Isa>(name: &str, bounds: [f64; 3]) {
        let sigmoid = |x: f64| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) };
        let found = [
            worst_ulp(exp::<I>, f64::exp),
            worst_ulp(super::sigmoid::<I>, sigmoid),
            // Below -87 the sigmoid is subnormal, and its absolute rounding 2^-150 times x is all that can be asked.
            worst_ulp(|x| silu::<I>(x.max(-87.0)), |x| x.max(-87.0) * sigmoid(x.max(-87.0))),
        ];
        for ((what, found), bound) in ["exp", "sigmoid", "silu"].iter().zip(found).zip(bounds) {
            assert!(found <= bound, "{what} on {name}: {found:.2} ulp, expected at most {bound}");
        }
    }

    /// Half an ulp for each rounding after the reduction: exp has p (which exceeds 1/2, so up to 2 roundings weigh double); sigmoid adds
    /// a sum, a quotient and a product; silu one more product.
    #[test]
    fn exp_sigmoid_silu_keep_their_digits() {
        accuracy::<Portable>("portable", [2.0, 4.0, 4.5]);
        // `f32::mul_add` is correctly rounded in software too, so this runs on every machine.
        accuracy::<Avx512>("fused", [1.1, 2.6, 3.1]);
    }

    #[test]
    fn exp_ends_where_it_should() {
        fn check<I: Isa>() {
            assert!(exp::<I>(f32::NAN).is_nan() && sigmoid::<I>(f32::NAN).is_nan());
            assert_eq!(exp::<I>(f32::INFINITY), f32::INFINITY);
            assert_eq!(exp::<I>(1e30), f32::INFINITY);
            assert!(exp::<I>(88.722_83).is_finite(), "the last argument with a finite result");
            assert_eq!(exp::<I>(f32::NEG_INFINITY), 0.0);
            assert_eq!(exp::<I>(-103.0), (-103f64).exp() as f32, "a subnormal");
            assert_eq!(exp::<I>(0.0), 1.0);
            assert_eq!(sigmoid::<I>(f32::INFINITY), 1.0);
            assert_eq!(sigmoid::<I>(f32::NEG_INFINITY), 0.0);
            assert_eq!(sigmoid::<I>(0.0), 0.5);
        }
        check::<Portable>();
        check::<Avx512>();
    }

    dispatch! {
        fn sum_of_squares<I>(x: &[f32]) -> f32 {
            x.iter().fold(0.0, |sum, x| I::mul_add(*x, *x, sum))
        }
    }

    #[test]
    fn a_dispatched_function_computes_its_body() {
        assert_eq!(sum_of_squares(&[1.0, 2.0, 3.0]), 14.0);
        assert!(levels().any(|l| l == level()) || std::env::var("DDPM_CUDA_SIMD").is_ok());
    }
}
