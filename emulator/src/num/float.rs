//! f32 and f64 arithmetic on bits, one lane at a time, for the loops of [`super::ops`].
//!
//! NaN results of f32 instructions are the canonical 0x7fffffff, as on the hardware. Those of f64 instructions are what
//! IEEE 754 hosts give (a quieted operand), since PTX does not say. Flushing keeps the sign and happens after rounding.

use super::form::Round;

/// The only NaN that f32 instructions produce.
pub const NAN_F32: u32 = 0x7fff_ffff;

/// A subnormal becomes a zero of its sign.
#[inline(always)]
pub fn flush(x: u32) -> u32 {
    if x & 0x7f80_0000 == 0 { x & 0x8000_0000 } else { x }
}

/// `flush` where asked.
#[inline(always)]
pub fn flush_if(ftz: bool, x: u32) -> u32 {
    if ftz { flush(x) } else { x }
}

/// Bits of a result, NaN made canonical.
#[inline(always)]
pub fn bits(x: f32) -> u32 {
    if x.is_nan() { NAN_F32 } else { x.to_bits() }
}

#[inline(always)]
fn f(x: u32) -> f32 {
    f32::from_bits(x)
}

/// Clamps to [0, 1]; NaN becomes +0, and so does -0.
#[inline(always)]
pub fn saturate(x: u32) -> u32 {
    let v = f(x);
    if v >= 1.0 {
        0x3f80_0000
    } else if v > 0.0 {
        x
    } else {
        0
    }
}

/// a + b, nearest.
#[inline(always)]
pub fn add<const FTZ: bool>(a: u32, b: u32) -> u32 {
    flush_if(FTZ, bits(f(flush_if(FTZ, a)) + f(flush_if(FTZ, b))))
}

/// a - b, nearest.
#[inline(always)]
pub fn sub<const FTZ: bool>(a: u32, b: u32) -> u32 {
    flush_if(FTZ, bits(f(flush_if(FTZ, a)) - f(flush_if(FTZ, b))))
}

/// a * b, nearest.
#[inline(always)]
pub fn mul<const FTZ: bool>(a: u32, b: u32) -> u32 {
    flush_if(FTZ, bits(f(flush_if(FTZ, a)) * f(flush_if(FTZ, b))))
}

/// a * b + c, nearest, rounded once. `host_fma`: the host has the instruction.
#[inline(always)]
pub fn fma<const FTZ: bool>(host_fma: bool, a: u32, b: u32, c: u32) -> u32 {
    let (a, b, c) = (f(flush_if(FTZ, a)), f(flush_if(FTZ, b)), f(flush_if(FTZ, c)));
    let r = if host_fma { a.mul_add(b, c) } else { fma_odd(a, b, c) as f32 };
    flush_if(FTZ, bits(r))
}

/// Rounds an exact sum to odd: `s`, its nearest f64, or the odd one of the two neighbours if the sum is inexact. `rest`
/// has the sign of exact - s. The result rounds correctly, in any mode, to any format at least two bits shorter.
#[inline(always)]
pub fn to_odd(s: f64, rest: f64) -> f64 {
    let b = s.to_bits();
    let up = (rest > 0.0) == (s > 0.0);
    let moved = if up { b.wrapping_add(1) } else { b.wrapping_sub(1) };
    // False for a NaN rest, which comes with an infinite or NaN sum.
    let inexact = rest > 0.0 || rest < 0.0;
    f64::from_bits(if inexact && b & 1 == 0 { moved } else { b })
}

/// a + b rounded to odd.
#[inline(always)]
pub fn add_odd(a: f64, b: f64) -> f64 {
    let s = a + b;
    let b_part = s - a;
    let a_part = s - b_part;
    to_odd(s, (a - a_part) + (b - b_part))
}

/// a * b + c rounded to odd in f64: the product of two f32 is exact there.
#[inline(always)]
pub fn fma_odd(a: f32, b: f32, c: f32) -> f64 {
    add_odd(a as f64 * b as f64, c as f64)
}

/// Rounds an f64 (exact, or rounded to odd) to f32 bits.
#[inline(always)]
pub fn narrow(x: f64, round: Round) -> u32 {
    let nearest = x as f32;
    let b = nearest.to_bits();
    let wide = nearest as f64;
    let (too_big, too_small) = (wide > x, wide < x);
    let negative = b >> 31 == 1;
    let (down, up) = match round {
        Round::Rn | Round::Rna => (false, false),
        Round::Rz => (too_big && !negative, too_small && negative),
        Round::Rm => (too_big, false),
        Round::Rp => (false, too_small),
    };
    // One step toward plus infinity is +1 on a positive pattern, -1 on a negative one.
    let step = if (up && !negative) || (down && negative) {
        1
    } else if up || down {
        u32::MAX
    } else {
        0
    };
    if nearest.is_nan() { NAN_F32 } else { b.wrapping_add(step) }
}

/// a * b + c in any rounding mode.
#[inline(always)]
pub fn fma_any(a: u32, b: u32, c: u32, round: Round) -> u32 {
    let r = fma_odd(f(a), f(b), f(c));
    // An exact zero from unlike signs is -0 when rounding down, +0 otherwise.
    if round == Round::Rm && r == 0.0 && (a ^ b ^ c) >> 31 == 1 {
        return 0x8000_0000;
    }
    narrow(r, round)
}

/// a * b in any rounding mode.
#[inline(always)]
pub fn mul_any(a: u32, b: u32, round: Round) -> u32 {
    narrow(f(a) as f64 * f(b) as f64, round)
}

/// a / b in any rounding mode.
#[inline(always)]
pub fn div_any(a: u32, b: u32, round: Round) -> u32 {
    let (x, y) = (f(a) as f64, f(b) as f64);
    let q = x / y;
    // The remainder of a nearest quotient is exact; it has no meaning where the quotient is not finite.
    let rest = if q.is_finite() && y.is_finite() { (-q).mul_add(y, x) } else { 0.0 };
    let rest = if y < 0.0 { -rest } else { rest };
    narrow(if q == 0.0 { q } else { to_odd(q, rest) }, round)
}

/// The square root in any rounding mode.
#[inline(always)]
pub fn sqrt_any(a: u32, round: Round) -> u32 {
    let x = f(a) as f64;
    let s = x.sqrt();
    let rest = if s.is_finite() { (-s).mul_add(s, x) } else { 0.0 };
    narrow(if s == 0.0 { s } else { to_odd(s, rest) }, round)
}

/// Minimum or maximum with PTX's rules: NaN loses unless `.NaN`, -0 is below +0.
#[inline(always)]
pub fn min_max<const MAX: bool>(a: u32, b: u32) -> u32 {
    let (x, y) = (f(a), f(b));
    // On a tie the patterns differ only as zeros do: `and` of the signs for a maximum, `or` for a minimum.
    let tie = if MAX { a & b } else { a | b };
    let below = x < y;
    let picked = if x == y {
        tie
    } else if below != MAX {
        a
    } else {
        b
    };
    if x.is_nan() {
        if y.is_nan() { NAN_F32 } else { b }
    } else if y.is_nan() {
        a
    } else {
        picked
    }
}

/// Minimum or maximum with every modifier that f32 has.
#[inline(always)]
pub fn min_max_any(a: u32, b: u32, max: bool, ftz: bool, nan: bool, xorsign: bool) -> u32 {
    let (a, b) = (flush_if(ftz, a), flush_if(ftz, b));
    let sign = (a ^ b) & 0x8000_0000;
    let (a, b) = if xorsign { (a & 0x7fff_ffff, b & 0x7fff_ffff) } else { (a, b) };
    if nan && (f(a).is_nan() || f(b).is_nan()) {
        return NAN_F32;
    }
    let r = if max { min_max::<true>(a, b) } else { min_max::<false>(a, b) };
    if xorsign && !f(r).is_nan() { r | sign } else { r }
}

/// Minimum or maximum of f64, NaN loses, -0 is below +0.
#[inline(always)]
pub fn min_max_f64<const MAX: bool>(a: u64, b: u64) -> u64 {
    let (x, y) = (f64::from_bits(a), f64::from_bits(b));
    if x.is_nan() {
        return if y.is_nan() { 0x7fff_ffff_ffff_ffff } else { b };
    }
    if y.is_nan() {
        return a;
    }
    if x == y {
        return if MAX { a & b } else { a | b };
    }
    if (x < y) != MAX { a } else { b }
}

/// `testp` on a pattern with `fraction` fraction bits and all-ones exponent `top`.
#[inline(always)]
pub fn test(mode: u8, bits: u64, fraction: u32, top: u64) -> bool {
    let exponent = bits >> fraction & top;
    let rest = bits & ((1 << fraction) - 1);
    match mode {
        0 => exponent != top,
        1 => exponent == top && rest == 0,
        2 => exponent != top || rest == 0,
        3 => exponent == top && rest != 0,
        // Zeros count as normal.
        4 => exponent != top && (exponent != 0 || rest == 0),
        _ => exponent == 0 && rest != 0,
    }
}
