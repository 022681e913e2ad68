//! The `.approx` functions, on f32 bits, each within the error that the PTX manual states. "Here" gives the largest
//! error that the tests find.
//!
//! PTX does not fix the result bits, so agreement with a GPU is to these errors and no further. Multiplications and
//! additions are rounded separately, so that every host gives the same bits, with or without FMA instructions.

use super::float::{NAN_F32, bits, flush_if};

#[inline(always)]
fn f(x: u32) -> f32 {
    f32::from_bits(x)
}

/// (2^t - 1) / t on [-0.5, 0.5], interpolated at Chebyshev nodes: 1 + t * this is 2^t to 2^-27.5.
const EXP2: [f64; 6] = [
    0.693_147_188_026_228_8,
    0.240_226_507_605_681_1,
    0.055_503_571_142_188_096,
    0.009_618_082_557_271_39,
    0.001_339_086_336_479_383_4,
    0.000_154_531_629_484_144_02,
];

/// 2^x. Manual: relative error 2^-22.
#[inline(always)]
pub fn ex2<const FTZ: bool>(x: u32) -> u32 {
    let v = f(flush_if(FTZ, x));
    // Outside these bounds the result is 0 or infinity anyway; NaN passes both comparisons.
    let v = if v > 200.0 { 200.0 } else { v };
    let v = if v < -200.0 { -200.0 } else { v };
    const TO_INTEGER: f32 = 12_582_912.0; // 1.5 * 2^23: an addend that leaves no fraction bits
    let n = (v + TO_INTEGER) - TO_INTEGER;
    let t = v - n;
    let c = EXP2.map(|c| c as f32);
    let q = c[0] + t * (c[1] + t * (c[2] + t * (c[3] + t * (c[4] + t * c[5]))));
    let p = 1.0 + t * q;
    // The scale is applied in two halves, so that a subnormal result is rounded once.
    let n = (v + TO_INTEGER).to_bits().wrapping_sub(TO_INTEGER.to_bits()) as i32;
    let half = n >> 1;
    let scale = |k: i32| f32::from_bits((k.wrapping_add(127) << 23) as u32);
    flush_if(FTZ, bits(p * scale(half) * scale(n.wrapping_sub(half))))
}

/// 2^x in f64 to 2^-27, for |x| < 1000.
#[inline(always)]
fn exp2_f64(x: f64) -> f64 {
    const TO_INTEGER: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    let shifted = x + TO_INTEGER;
    let t = x - (shifted - TO_INTEGER);
    let q = EXP2[0] + t * (EXP2[1] + t * (EXP2[2] + t * (EXP2[3] + t * (EXP2[4] + t * EXP2[5]))));
    let n = shifted.to_bits().wrapping_sub(TO_INTEGER.to_bits());
    (1.0 + t * q) * f64::from_bits(n.wrapping_add(1023) << 52)
}

/// 1 / x. Manual: 1 ulp. Here: the nearest value.
#[inline(always)]
pub fn rcp(ftz: bool, x: u32) -> u32 {
    flush_if(ftz, bits(1.0 / f(flush_if(ftz, x))))
}

/// The square root. Manual: relative error 2^-23. Here: the nearest value.
#[inline(always)]
pub fn sqrt(ftz: bool, x: u32) -> u32 {
    flush_if(ftz, bits(f(flush_if(ftz, x)).sqrt()))
}

/// 1 / sqrt(x). Manual: relative error 2^-22.9. Here: 2^-23.
#[inline(always)]
pub fn rsqrt(ftz: bool, x: u32) -> u32 {
    flush_if(ftz, bits(1.0 / f(flush_if(ftz, x)).sqrt()))
}

/// a / b. Manual: 2 ulp while 2^-126 <= |b| <= 2^126; for larger |b| zero, or NaN for an infinite a. `full`
/// (`div.full`) is 2 ulp everywhere.
#[inline(always)]
pub fn div(full: bool, ftz: bool, a: u32, b: u32) -> u32 {
    let (a, b) = (flush_if(ftz, a), flush_if(ftz, b));
    let magnitude = b & 0x7fff_ffff;
    if !full && magnitude > 0x7e80_0000 && magnitude < 0x7f80_0000 {
        let a_magnitude = a & 0x7fff_ffff;
        return if a_magnitude >= 0x7f80_0000 { NAN_F32 } else { (a ^ b) & 0x8000_0000 };
    }
    flush_if(ftz, bits(f(a) / f(b)))
}

/// log2(x). Manual: absolute error 2^-22 on (0.5, 2), relative error 2^-22 elsewhere. Here: 2^-24 relative.
#[inline(always)]
pub fn lg2(ftz: bool, x: u32) -> u32 {
    let x = flush_if(ftz, x);
    let v = f(x);
    // In f64 a subnormal f32 is normal: one path for all.
    let wide = (v as f64).to_bits();
    // The mantissa goes to [sqrt(1/2), sqrt(2)).
    let offset = wide.wrapping_sub(0x3fe6_a09e_667f_3bcd);
    let e = (offset as i64) >> 52;
    let m = f64::from_bits(wide.wrapping_sub((e as u64) << 52));
    // log2(m) = 2/ln 2 * atanh(s), s = (m - 1) / (m + 1), |s| < 0.172: the next term is 2^-36 of the first.
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let series = 1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0 + z * (1.0 / 11.0)))));
    let r = e as f64 + 2.0 * std::f64::consts::LOG2_E * s * series;
    let r = bits(r as f32);
    let r = if x == 0x7f80_0000 { x } else { r };
    let r = if v < 0.0 || v.is_nan() { NAN_F32 } else { r };
    let r = if v == 0.0 { 0xff80_0000 } else { r };
    flush_if(ftz, r)
}

/// Sine, or cosine with `quarter` 1. Manual: absolute error 2^-20.5 on [-2 pi, 2 pi]. Here: 2^-24 for |x| <= 2^30;
/// beyond, the host's f64 function.
#[inline(always)]
pub fn sin(ftz: bool, quarter: u64, x: u32) -> u32 {
    let x = flush_if(ftz, x);
    let v = f(x) as f64;
    const TO_INTEGER: f64 = 6_755_399_441_055_744.0;
    let shifted = v * std::f64::consts::FRAC_2_PI + TO_INTEGER;
    let k = shifted - TO_INTEGER;
    // pi/2 in two parts. The first has 33 bits, so k times it is exact for k up to 2^20; beyond, the error is at most
    // 2^-53 * k.
    const HIGH: f64 = f64::from_bits(0x3ff9_21fb_5440_0000);
    const LOW: f64 = f64::from_bits(0x3dd0_b461_1a62_6331);
    let r = (v - k * HIGH) - k * LOW;
    let z = r * r;
    let sine = r
        * (1.0 + z * (-1.0 / 6.0 + z * (1.0 / 120.0 + z * (-1.0 / 5040.0 + z * (1.0 / 362_880.0 - z / 39_916_800.0)))));
    let cosine = 1.0 + z * (-0.5 + z * (1.0 / 24.0 + z * (-1.0 / 720.0 + z * (1.0 / 40320.0 - z / 3_628_800.0))));
    let quadrant = shifted.to_bits().wrapping_add(quarter);
    let picked = if quadrant & 1 == 0 { sine } else { cosine };
    let signed = if quadrant & 2 == 0 { picked } else { -picked };
    // -0.0 * anything keeps its sign through the sine's path, as the instruction does.
    let r = bits(signed as f32);
    let r = if f(x).is_finite() { r } else { NAN_F32 };
    flush_if(ftz, r)
}

/// Arguments for which the reduction in [`sin`] is not accurate enough.
#[inline(always)]
pub fn sin_is_far(x: u32) -> bool {
    let magnitude = x & 0x7fff_ffff;
    magnitude > (127 + 30) << 23 && magnitude < 0x7f80_0000
}

/// Sine or cosine of arguments beyond 2^30.
pub fn sin_far(quarter: u64, x: u32) -> u32 {
    let v = f(x) as f64;
    bits(if quarter == 0 { v.sin() } else { v.cos() } as f32)
}

/// Hyperbolic tangent. Manual: relative error 2^-11. Here: 2^-23.
#[inline(always)]
pub fn tanh(x: u32) -> u32 {
    let v = f(x);
    let wide = v as f64;
    // |tanh| is 1 to f32's precision from 9.02 on.
    let t = if wide > 20.0 { 20.0 } else { wide };
    let t = if t < -20.0 { -20.0 } else { t };
    let e = exp2_f64(t * (2.0 * std::f64::consts::LOG2_E));
    let far = (e - 1.0) / (e + 1.0);
    let z = wide * wide;
    let near = wide * (1.0 + z * (-1.0 / 3.0 + z * (2.0 / 15.0 - z * (17.0 / 315.0))));
    let r = if wide.abs() < 0.125 { near } else { far };
    if v.is_nan() { NAN_F32 } else { (r as f32).to_bits() }
}

/// 1 / x from the upper half of an f64, the lower half of the result zero. Manual: 20 bits of the mantissa.
#[inline(always)]
pub fn rcp_f64(x: u64) -> u64 {
    upper_half(1.0 / f64::from_bits(flush_f64(x & !0xffff_ffff)))
}

/// 1 / sqrt(x) from the upper half of an f64, the lower half of the result zero.
#[inline(always)]
pub fn rsqrt_f64_upper(x: u64) -> u64 {
    upper_half(1.0 / f64::from_bits(flush_f64(x & !0xffff_ffff)).sqrt())
}

/// 1 / sqrt(x) in f64.
#[inline(always)]
pub fn rsqrt_f64(x: u64) -> u64 {
    (1.0 / f64::from_bits(x).sqrt()).to_bits()
}

#[inline(always)]
fn flush_f64(x: u64) -> u64 {
    if x & 0x7ff0_0000_0000_0000 == 0 { x & 0x8000_0000_0000_0000 } else { x }
}

#[inline(always)]
fn upper_half(x: f64) -> u64 {
    if x.is_nan() {
        return 0x7fff_ffff_0000_0000;
    }
    flush_f64(x.to_bits() & !0xffff_ffff)
}
