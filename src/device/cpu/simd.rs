//! SIMD levels, chosen at run time: AVX-512, AVX2 with FMA, or the target's baseline.
//!
//! An element-wise loop is written once, as the body of `dispatch!`. The macro compiles it three times with different
//! target features and picks one by [`Isa::best`]. The compiler vectorises the body, so keep it plain: slices of equal
//! length, no early exit, no call that is not `#[inline(always)]`. [`Simd::mul_add`] is a fused multiply-add where
//! there is one and a product and a sum elsewhere (never a library call), so results differ in the last bits between
//! machines but not between runs.
//!
//! ```ignore
//! simd::dispatch! {
//!     /// `y = silu(x)`.
//!     fn silu_row<S>(y: &mut [f32], x: &[f32]) {
//!         for (y, x) in y.iter_mut().zip(x) {
//!             *y = simd::silu::<S>(*x);
//!         }
//!     }
//! }
//! ```
//!
//! `DDPM_CUDA_SIMD=avx2` or `=portable` lowers the level, to test the other paths on a machine with AVX-512.
//!
//! # Soundness
//!
//! Executing an instruction that the processor lacks is undefined behaviour. So code compiled for a [`Level`] runs only
//! where a token exists ([`Avx512`], [`Avx2`], [`Portable`], or an [`Isa`], which is one of the three). Tokens of the
//! first two are made only by `new`, which asks the processor; each `unsafe` call of such code names its token as the
//! proof.
//!
//! Deliberately absent: a vector type. Code that decides what stays in registers (the matrix products, Winograd's
//! transforms) uses `Vector` of `vector.rs`.

use std::str::FromStr;
use std::sync::OnceLock;

/// Names a SIMD level, ordered by width. [`Isa::new`] says whether the processor has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the target has (SSE2 on x86-64, NEON on aarch64).
    Portable,
    /// AVX2 and FMA: 8 floats.
    Avx2,
    /// AVX-512 F, BW, DQ, VL, and AVX2 and FMA: 16 floats.
    Avx512,
}

impl FromStr for Level {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "portable" => Ok(Level::Portable),
            "avx2" => Ok(Level::Avx2),
            "avx512" => Ok(Level::Avx512),
            _ => Err(format!("'{s}' names no vector instructions: use portable, avx2 or avx512")),
        }
    }
}

/// The highest level to use, from `DDPM_CUDA_SIMD`; if it is unset or empty, the highest there is.
///
/// # Errors
/// A sentence if the variable is none of portable, avx2 and avx512.
pub fn limit() -> Result<Level, String> {
    match std::env::var_os("DDPM_CUDA_SIMD") {
        Some(value) if !value.is_empty() => {
            value.to_string_lossy().parse::<Level>().map_err(|error| format!("DDPM_CUDA_SIMD: {error}"))
        }
        _ => Ok(Level::Avx512),
    }
}

/// A [`Level`] as a type, for code compiled once per level.
///
/// # Safety
/// A value of the type must exist only on processors that have every instruction of `LEVEL`.
pub unsafe trait Simd: Copy + Send + Sync + 'static {
    /// The level.
    const LEVEL: Level;

    /// `a*b + c`, rounded once if the level has fused multiply-add, twice otherwise. Needs no token: it is correct on
    /// every processor, and fast in code compiled for the level.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
}

/// Proof that the processor has [`Level::Avx512`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

/// Proof that the processor has [`Level::Avx2`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

/// [`Level::Portable`], which needs no proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Portable;

impl Avx512 {
    /// The token, if this processor has the instructions; never under Miri, which emulates few of them.
    pub fn new() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if Avx2::new().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            return Some(Avx512(()));
        }
        None
    }
}

impl Avx2 {
    /// The token, if this processor has the instructions; never under Miri.
    pub fn new() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Some(Avx2(()));
        }
        None
    }
}

// SAFETY: the field is private, and `new`, the only constructor, has found every feature of the level.
unsafe impl Simd for Avx512 {
    const LEVEL: Level = Level::Avx512;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

// SAFETY: as for `Avx512`.
unsafe impl Simd for Avx2 {
    const LEVEL: Level = Level::Avx2;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

// SAFETY: every processor that can run the program has this level.
unsafe impl Simd for Portable {
    const LEVEL: Level = Level::Portable;

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        // On x86-64 without the FMA feature `mul_add` is a call into the C library, hundreds of times slower.
        if cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
    }
}

/// A SIMD level that this processor has: one of the three tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Isa {
    Portable(Portable),
    Avx2(Avx2),
    Avx512(Avx512),
}

impl Isa {
    /// The level's token, if this processor has its instructions.
    pub fn new(level: Level) -> Option<Self> {
        match level {
            Level::Portable => Some(Isa::Portable(Portable)),
            Level::Avx2 => Avx2::new().map(Isa::Avx2),
            Level::Avx512 => Avx512::new().map(Isa::Avx512),
        }
    }

    /// The widest level that this processor has and [`limit`] allows; decided once.
    ///
    /// # Panics
    /// If `DDPM_CUDA_SIMD` is invalid, with [`limit`]'s sentence. [`Device::open`](crate::device::Device::open) refuses
    /// it earlier.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Isa::widest(limit().unwrap_or_else(|error| panic!("{error}"))))
    }

    /// The widest level that this processor has, no wider than `limit`.
    fn widest(limit: Level) -> Self {
        let within = Isa::available().take_while(|isa| isa.level() <= limit);
        within.last().unwrap_or(Isa::Portable(Portable))
    }

    /// All levels this processor has, narrowest first.
    pub fn available() -> impl Iterator<Item = Self> {
        [Level::Portable, Level::Avx2, Level::Avx512].into_iter().filter_map(Isa::new)
    }

    /// Its level.
    pub fn level(self) -> Level {
        match self {
            Isa::Portable(_) => Level::Portable,
            Isa::Avx2(_) => Level::Avx2,
            Isa::Avx512(_) => Level::Avx512,
        }
    }
}

/// Defines a function whose body is compiled for every [`Level`](crate::device::cpu::simd::Level) and chosen at run
/// time by [`Isa::best`](crate::device::cpu::simd::Isa::best). The one type parameter is the level's
/// [`Simd`](crate::device::cpu::simd::Simd).
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$s:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_type_parameters)]
            fn body<$s: $crate::device::cpu::simd::Simd>($($arg: $ty),*) $(-> $ret)? $body

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

            match $crate::device::cpu::simd::Isa::best() {
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Isa::Avx512(_token) => {
                    // SAFETY: `_token` exists, so the processor has the features that the function is compiled with.
                    unsafe { avx512($($arg),*) }
                }
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Isa::Avx2(_token) => {
                    // SAFETY: as above.
                    unsafe { avx2($($arg),*) }
                }
                _ => body::<$crate::device::cpu::simd::Portable>($($arg),*),
            }
        }
    };
}
pub(crate) use dispatch;

/// `e^x` to 1 ulp of the true value (2 without FMA): infinity above 88.73, down to the subnormals and 0 below -103.98,
/// NaN for NaN. Branchless, so loops over it vectorise.
///
/// Cody and Waite's reduction: `x = n ln 2 + r`, `|r| <= ln 2 / 2`, with ln 2 in two parts so that `n` times the first
/// is exact; then `e^r = 1 + r + r^2 q(r)` with q of degree 4, a minimax fit of the relative error (4e-9, well below
/// the rounding error 6e-8).
#[inline(always)]
pub fn exp<S: Simd>(x: f32) -> f32 {
    // `if`, not `min`/`max`, which would turn NaN into a number. Beyond these bounds the result is infinity or 0.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    const SHIFT: f32 = 12_582_912.0;
    let shifted = S::mul_add(x, std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = S::mul_add(n, -0.693_359_4, x); // 355/512: nine bits, so n * it is exact
    let r = S::mul_add(n, 2.121_944_4e-4, r);
    let q = S::mul_add(1.381_459_9e-3, r, 8.368_717e-3);
    let q = S::mul_add(q, r, 4.166_839e-2);
    let q = S::mul_add(q, r, 0.166_665_21);
    let q = S::mul_add(q, r, 0.499_999_94);
    let p = S::mul_add(q * r, r, r) + 1.0;
    // 2^n in two factors: n runs from -150 to 128, beyond the range of one exponent.
    let n = shifted.to_bits().wrapping_sub(SHIFT.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    p * power(half) * power(n.wrapping_sub(half))
}

/// `1 / (1 + e^-x)` to 2.6 ulp (4 without FMA), down to the subnormals; NaN for NaN.
#[inline(always)]
pub fn sigmoid<S: Simd>(x: f32) -> f32 {
    // e^-|x| never overflows, and for negative x the quotient e^x / (1 + e^x) keeps its digits.
    let e = exp::<S>(-x.abs());
    let one = 1.0 / (1.0 + e);
    if x < 0.0 { e * one } else { one }
}

/// `x sigmoid(x)`, Elfwing et al.'s SiLU (the paper's swish).
#[inline(always)]
pub fn silu<S: Simd>(x: f32) -> f32 {
    x * sigmoid::<S>(x)
}

/// Derivative of [`silu`]: `s (1 + x (1 - s))` with `s = sigmoid(x)`.
#[inline(always)]
pub fn silu_grad<S: Simd>(x: f32) -> f32 {
    let s = sigmoid::<S>(x);
    s * S::mul_add(x, 1.0 - s, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Largest error of `f` against `oracle` in ulps of the true value, over every 1009th bit pattern between -120 and
    /// 120. 1009 is prime, so all exponents and low bits occur; so is the larger step for Miri.
    fn worst_ulp(f: impl Fn(f32) -> f32, oracle: impl Fn(f64) -> f64) -> f64 {
        let step = if cfg!(miri) { 10_000_019 } else { 1009 };
        let mut worst = 0.0f64;
        for bits in (0..=u32::MAX).step_by(step) {
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

    fn accuracy<S: Simd>(name: &str, bounds: [f64; 3]) {
        let sigmoid = |x: f64| if x < 0.0 { x.exp() / (1.0 + x.exp()) } else { 1.0 / (1.0 + (-x).exp()) };
        let found = [
            worst_ulp(exp::<S>, f64::exp),
            worst_ulp(super::sigmoid::<S>, sigmoid),
            // Below -87 the sigmoid is subnormal, so its absolute rounding error, 2^-150 times x, is the best possible.
            worst_ulp(|x| silu::<S>(x.max(-87.0)), |x| x.max(-87.0) * sigmoid(x.max(-87.0))),
        ];
        for ((what, found), bound) in ["exp", "sigmoid", "silu"].iter().zip(found).zip(bounds) {
            assert!(found <= bound, "{what} on {name}: {found:.2} ulp, expected at most {bound}");
        }
    }

    /// Half an ulp per rounding after the reduction: exp has p (which exceeds 1/2, so up to 2 roundings weigh double);
    /// sigmoid adds a sum, a quotient and a product; silu one more product.
    #[test]
    fn exp_sigmoid_silu_keep_their_digits() {
        accuracy::<Portable>("portable", [2.0, 4.0, 4.5]);
        // `f32::mul_add` is correctly rounded in software too, so this test runs on every machine.
        accuracy::<Avx512>("fused", [1.1, 2.6, 3.1]);
    }

    #[test]
    fn exp_ends_where_it_should() {
        fn check<S: Simd>() {
            assert!(exp::<S>(f32::NAN).is_nan() && sigmoid::<S>(f32::NAN).is_nan());
            assert_eq!(exp::<S>(f32::INFINITY), f32::INFINITY);
            assert_eq!(exp::<S>(1e30), f32::INFINITY);
            assert!(exp::<S>(88.722_83).is_finite(), "the last argument with a finite result");
            assert_eq!(exp::<S>(f32::NEG_INFINITY), 0.0);
            assert_eq!(exp::<S>(-103.0), (-103f64).exp() as f32, "a subnormal");
            assert_eq!(exp::<S>(0.0), 1.0);
            assert_eq!(sigmoid::<S>(f32::INFINITY), 1.0);
            assert_eq!(sigmoid::<S>(f32::NEG_INFINITY), 0.0);
            assert_eq!(sigmoid::<S>(0.0), 0.5);
        }
        check::<Portable>();
        check::<Avx512>();
    }

    dispatch! {
        fn product_and_sum<S>(a: f32, b: f32, c: f32) -> f32 {
            S::mul_add(a, b, c)
        }
    }

    /// `(1 + 2^-12)^2 - 1 - 2^-11` is 2^-24 with a fused multiply-add and 0 without, because the product is rounded.
    #[test]
    fn a_dispatched_function_is_the_body_for_the_best_level() {
        let [a, c] = [1.0 + 2f32.powi(-12), -1.0 - 2f32.powi(-11)];
        let fused = Isa::best().level() != Level::Portable || cfg!(target_arch = "aarch64");
        assert_eq!(product_and_sum(a, a, c), if fused { 2f32.powi(-24) } else { 0.0 });
    }

    #[test]
    fn the_widest_instructions_within_the_limit_are_used() {
        let available: Vec<Level> = Isa::available().map(Isa::level).collect();
        assert_eq!(available[0], Level::Portable);
        for limit in [Level::Portable, Level::Avx2, Level::Avx512] {
            let want = available.iter().filter(|&&level| level <= limit).max();
            assert_eq!(Some(&Isa::widest(limit).level()), want, "within {limit:?} of {available:?}");
            assert!(Isa::new(limit).is_none_or(|isa| isa.level() == limit), "a token of another level than {limit:?}");
        }
    }

    #[test]
    fn levels_are_read_by_their_names_alone() {
        assert_eq!("portable".parse(), Ok(Level::Portable));
        assert_eq!("avx2".parse(), Ok(Level::Avx2));
        assert_eq!("avx512".parse(), Ok(Level::Avx512));
        let error = "AVX-2".parse::<Level>().expect_err("no level's name");
        assert_eq!(error, "'AVX-2' names no vector instructions: use portable, avx2 or avx512");
    }
}
