//! f16 and bf16 arithmetic on bits, each result rounded once.
//!
//! Both convert to f32 exactly. A sum, difference or product of two f16 or bf16 computed in f32 and rounded again is
//! correctly rounded if f32 has twice their precision plus two bits (24 >= 2*11 + 2) and no range is lost. A fused
//! multiply-add needs more, so it goes through f64 and f32 rounded to odd.

use super::float;

/// The NaN that instructions make in either format.
pub const NAN_HALF: u32 = 0x7fff;

/// f16 to f32, exact, by integer and float operations that vectorise everywhere. NaN keeps its payload.
#[inline(always)]
pub fn f16_to_f32(h: u32) -> f32 {
    let magnitude = (h & 0x7fff) << 13;
    // As an f32 pattern this is the value times 2^-112, subnormals included.
    let scaled = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    let special = h & 0x7c00 == 0x7c00;
    let bits = if special { magnitude | 0x7f80_0000 } else { scaled.to_bits() };
    f32::from_bits(bits | (h & 0x8000) << 16)
}

/// bf16 to f32, exact.
#[inline(always)]
pub fn bf16_to_f32(h: u32) -> f32 {
    f32::from_bits(h << 16)
}

/// f32 to f16, nearest, NaN canonical.
#[inline(always)]
pub fn f16_from_f32(x: f32) -> u32 {
    let b = x.to_bits();
    let sign = b >> 16 & 0x8000;
    let magnitude = b & 0x7fff_ffff;
    // Normal results: re-bias and round to nearest even on the 13 bits that go; a carry moves into the exponent, up to
    // infinity.
    let odd = magnitude >> 13 & 1;
    let normal = magnitude.wrapping_add((15u32.wrapping_sub(127) << 23).wrapping_add(0xfff + odd)) >> 13;
    // Subnormal results: adding 0.5 aligns the unit of f16's subnormals, 2^-24, with the last place of f32 in [0.5, 1),
    // and rounds there.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0x3f00_0000);
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let limited = if magnitude >= (127 + 16) << 23 { 0x7c00 } else { finite };
    if magnitude > 0x7f80_0000 { NAN_HALF } else { sign | limited }
}

/// f32 to bf16, nearest, NaN canonical.
#[inline(always)]
pub fn bf16_from_f32(x: f32) -> u32 {
    let b = x.to_bits();
    let rounded = b.wrapping_add(0x7fff + (b >> 16 & 1)) >> 16;
    if b & 0x7fff_ffff > 0x7f80_0000 { NAN_HALF } else { rounded }
}

/// Rounds an f64 that is rounded to odd on to an f32 rounded to odd.
#[inline(always)]
fn odd_f32(x: f64) -> f32 {
    let nearest = x as f32;
    let b = nearest.to_bits();
    let wide = nearest as f64;
    // Toward zero first, then the mark; an overflow comes back to the largest finite value, which is odd.
    let truncated = if wide.abs() > x.abs() { b.wrapping_sub(1) } else { b };
    let inexact = wide > x || wide < x;
    f32::from_bits(if inexact { truncated | 1 } else { b })
}

/// Which of the two formats: `BF` is bf16.
#[inline(always)]
pub fn widen<const BF: bool>(h: u32) -> f32 {
    if BF { bf16_to_f32(h & 0xffff) } else { f16_to_f32(h & 0xffff) }
}

/// Rounds to the format.
#[inline(always)]
pub fn round<const BF: bool>(x: f32) -> u32 {
    if BF { bf16_from_f32(x) } else { f16_from_f32(x) }
}

/// A subnormal f16 becomes a zero of its sign.
#[inline(always)]
pub fn flush(h: u32) -> u32 {
    if h & 0x7c00 == 0 { h & 0x8000 } else { h & 0xffff }
}

/// `flush` where asked (only f16 has `.ftz`).
#[inline(always)]
pub fn flush_if(ftz: bool, h: u32) -> u32 {
    if ftz { flush(h) } else { h & 0xffff }
}

/// a * b + c, rounded once.
#[inline(always)]
pub fn fma<const BF: bool>(a: u32, b: u32, c: u32) -> u32 {
    round::<BF>(odd_f32(float::fma_odd(widen::<BF>(a), widen::<BF>(b), widen::<BF>(c))))
}

/// a + b, rounded once.
#[inline(always)]
pub fn add<const BF: bool>(a: u32, b: u32) -> u32 {
    // bf16's range is f32's own, and 24 >= 2*8 + 2; sums never underflow.
    round::<BF>(widen::<BF>(a) + widen::<BF>(b))
}

/// a * b, rounded once.
#[inline(always)]
pub fn mul<const BF: bool>(a: u32, b: u32) -> u32 {
    if BF {
        // A product of two small bf16 is below f32's range: the exact product is rounded to odd instead.
        round::<BF>(odd_f32(widen::<BF>(a) as f64 * widen::<BF>(b) as f64))
    } else {
        round::<BF>(widen::<BF>(a) * widen::<BF>(b))
    }
}

/// Clamps to [0, 1]; NaN becomes +0.
#[inline(always)]
pub fn saturate<const BF: bool>(h: u32) -> u32 {
    let v = widen::<BF>(h);
    if v >= 1.0 {
        if BF { 0x3f80 } else { 0x3c00 }
    } else if v > 0.0 {
        h
    } else {
        0
    }
}

/// Negative values become +0; NaN stays the canonical NaN.
#[inline(always)]
pub fn relu<const BF: bool>(h: u32) -> u32 {
    let v = widen::<BF>(h);
    if v.is_nan() {
        NAN_HALF
    } else if v > 0.0 {
        h
    } else {
        0
    }
}

/// Minimum or maximum with every modifier the formats have.
#[inline(always)]
pub fn min_max<const BF: bool>(a: u32, b: u32, max: bool, ftz: bool, nan: bool, xorsign: bool) -> u32 {
    let (a, b) = (flush_if(ftz, a), flush_if(ftz, b));
    let sign = (a ^ b) & 0x8000;
    let (a, b) = if xorsign { (a & 0x7fff, b & 0x7fff) } else { (a, b) };
    let (x, y) = (widen::<BF>(a), widen::<BF>(b));
    let r = if x.is_nan() || y.is_nan() {
        if nan || (x.is_nan() && y.is_nan()) {
            return NAN_HALF;
        }
        if x.is_nan() { b } else { a }
    } else if x == y {
        if max { a & b } else { a | b }
    } else if (x < y) != max {
        a
    } else {
        b
    };
    if xorsign { r | sign } else { r }
}
