//! Integer instructions on bits, one lane at a time. Division by zero gives all ones for quotient and remainder, as
//! does the code that ptxas generates; the smallest integer divided by -1 wraps.

use super::form::flag::{A_SIGNED, ACCUMULATE, B_SIGNED, HI, SAT};
use super::form::{Decoded, Ty, VIDEO};

/// Sign extension of the low 16 bits.
#[inline(always)]
pub fn sext16(x: u32) -> u32 {
    x as u16 as i16 as i32 as u32
}

/// The low 16 bits, extended as `signed` says.
#[inline(always)]
pub fn ext16(signed: bool, x: u32) -> u32 {
    if signed { sext16(x) } else { x & 0xffff }
}

/// 24 low bits extended as `signed` says, multiplied: 48 bits.
#[inline(always)]
pub fn mul24(signed: bool, a: u32, b: u32) -> i64 {
    if signed {
        let extend = |x: u32| ((x << 8) as i32 >> 8) as i64;
        extend(a) * extend(b)
    } else {
        (a & 0xff_ffff) as i64 * (b & 0xff_ffff) as i64
    }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn mul_hi_u32(a: u32, b: u32) -> u32 {
    ((a as u64 * b as u64) >> 32) as u32
}

#[allow(missing_docs)]
#[inline(always)]
pub fn mul_hi_s32(a: u32, b: u32) -> u32 {
    ((a as i32 as i64 * b as i32 as i64) >> 32) as u32
}

#[allow(missing_docs)]
#[inline(always)]
pub fn mul_hi_64(signed: bool, a: u64, b: u64) -> u64 {
    if signed { ((a as i64 as i128 * b as i64 as i128) >> 64) as u64 } else { ((a as u128 * b as u128) >> 64) as u64 }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn div_u32(a: u32, b: u32) -> u32 {
    a.checked_div(b).unwrap_or(u32::MAX)
}

#[allow(missing_docs)]
#[inline(always)]
pub fn rem_u32(a: u32, b: u32) -> u32 {
    a.checked_rem(b).unwrap_or(u32::MAX)
}

#[allow(missing_docs)]
#[inline(always)]
pub fn div_s32(a: u32, b: u32) -> u32 {
    if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn rem_s32(a: u32, b: u32) -> u32 {
    if b == 0 { u32::MAX } else { (a as i32).wrapping_rem(b as i32) as u32 }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn div_u64(a: u64, b: u64) -> u64 {
    a.checked_div(b).unwrap_or(u64::MAX)
}

#[allow(missing_docs)]
#[inline(always)]
pub fn rem_u64(a: u64, b: u64) -> u64 {
    a.checked_rem(b).unwrap_or(u64::MAX)
}

#[allow(missing_docs)]
#[inline(always)]
pub fn div_s64(a: u64, b: u64) -> u64 {
    if b == 0 { u64::MAX } else { (a as i64).wrapping_div(b as i64) as u64 }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn rem_s64(a: u64, b: u64) -> u64 {
    if b == 0 { u64::MAX } else { (a as i64).wrapping_rem(b as i64) as u64 }
}

/// Shifts give zero (or the sign) from the width on, whatever the amount.
#[inline(always)]
pub fn shl_32(a: u32, n: u32) -> u32 {
    if n < 32 { a << (n & 31) } else { 0 }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn shr_32(a: u32, n: u32) -> u32 {
    if n < 32 { a >> (n & 31) } else { 0 }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn shr_s32(a: u32, n: u32) -> u32 {
    ((a as i32) >> n.min(31)) as u32
}

#[allow(missing_docs)]
#[inline(always)]
pub fn shl_64(a: u64, n: u32) -> u64 {
    if n < 64 { a << (n & 63) } else { 0 }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn shr_64(a: u64, n: u32) -> u64 {
    if n < 64 { a >> (n & 63) } else { 0 }
}

#[allow(missing_docs)]
#[inline(always)]
pub fn shr_s64(a: u64, n: u32) -> u64 {
    ((a as i64) >> n.min(63)) as u64
}

/// The upper word of {b, a} shifted left.
#[inline(always)]
pub fn shf_l(wrap: bool, a: u32, b: u32, c: u32) -> u32 {
    let n = if wrap { c & 31 } else { c.min(32) };
    let pair = (b as u64) << 32 | a as u64;
    ((pair << n) >> 32) as u32
}

/// The lower word of {b, a} shifted right.
#[inline(always)]
pub fn shf_r(wrap: bool, a: u32, b: u32, c: u32) -> u32 {
    let n = if wrap { c & 31 } else { c.min(32) };
    let pair = (b as u64) << 32 | a as u64;
    (pair >> n) as u32
}

/// Any function of three bits, by its truth table.
#[inline(always)]
pub fn lop3(a: u32, b: u32, c: u32, table: u32) -> u32 {
    let on = |i: u32| (table >> i & 1).wrapping_neg();
    (on(0) & !a & !b & !c)
        | (on(1) & !a & !b & c)
        | (on(2) & !a & b & !c)
        | (on(3) & !a & b & c)
        | (on(4) & a & !b & !c)
        | (on(5) & a & !b & c)
        | (on(6) & a & b & !c)
        | (on(7) & a & b & c)
}

/// Byte permutation; `mode` 0 is the generic form, then f4e, b4e, rc8, ecl, ecr, rc16.
#[inline(always)]
pub fn prmt(mode: u8, a: u32, b: u32, c: u32) -> u32 {
    let pair = (b as u64) << 32 | a as u64;
    let k = c & 3;
    let selectors = match mode {
        0 => [c & 15, c >> 4 & 15, c >> 8 & 15, c >> 12 & 15],
        1 => [k, k + 1, k + 2, k + 3],
        2 => [k, (k + 7) & 7, (k + 6) & 7, (k + 5) & 7],
        3 => [k; 4],
        4 => [k, k.max(1), k.max(2), 3],
        5 => [0, k.min(1), k.min(2), k],
        _ => {
            let low = (k & 1) * 2;
            [low, low + 1, low, low + 1]
        }
    };
    let byte = |s: u32| {
        let byte = (pair >> ((s & 7) * 8)) as u32 & 0xff;
        // Bit 3 asks for the byte's sign, eight times.
        if s & 8 != 0 { (byte >> 7).wrapping_neg() & 0xff } else { byte }
    };
    byte(selectors[0]) | byte(selectors[1]) << 8 | byte(selectors[2]) << 16 | byte(selectors[3]) << 24
}

/// Extracts a bit field of `c` bits from bit `b` on, as 64 bits; `width` is that of the type.
#[inline(always)]
pub fn bfe(signed: bool, width: u32, a: u64, b: u32, c: u32) -> u64 {
    let (position, length) = (b & 0xff, c & 0xff);
    if length == 0 {
        return 0;
    }
    // Bits above the type's are the fill: zeros, or copies of the sign.
    let fill = signed && a >> (width - 1) & 1 == 1;
    let above = if width == 64 { 0 } else { u64::MAX << width };
    let extended = if fill { a | above } else { a & !above };
    let moved = if signed { shr_s64(extended, position) } else { shr_64(extended, position) };
    if length >= 64 {
        return moved;
    }
    let keep = (1u64 << length) - 1;
    if signed {
        // The field's own top bit, or the type's where the field reaches beyond it.
        let top = (position + length - 1).min(width - 1);
        if a >> top & 1 == 1 { moved | !keep } else { moved & keep }
    } else {
        moved & keep
    }
}

/// Inserts the low `length` bits of a into b at `position`.
#[inline(always)]
pub fn bfi(width: u32, a: u64, b: u64, c: u32, d: u32) -> u64 {
    let (position, length) = (c & 0xff, d & 0xff);
    if position >= width {
        return b;
    }
    let keep = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
    let mask = keep << position;
    (b & !mask) | (a << position & mask)
}

/// The position of the most significant bit that is not a sign bit; all ones if there is none.
#[inline(always)]
pub fn bfind(signed: bool, shift_amount: bool, width: u32, a: u64) -> u32 {
    let a = if signed && a >> (width - 1) & 1 == 1 { !a } else { a };
    let a = if width == 64 { a } else { a & 0xffff_ffff };
    if a == 0 {
        return u32::MAX;
    }
    let position = 63 - a.leading_zeros();
    if shift_amount { width - 1 - position } else { position }
}

/// The n-th set bit of `mask` from bit `base` on.
pub fn fns(mask: u32, base: u32, offset: i32) -> u32 {
    let base = base & 31;
    if offset == 0 {
        return if mask >> base & 1 == 1 { base } else { u32::MAX };
    }
    let (mut at, mut left) = (base as i32, offset.unsigned_abs() - 1);
    while (0..32).contains(&at) {
        if mask >> at & 1 == 1 {
            if left == 0 {
                return at as u32;
            }
            left -= 1;
        }
        at += offset.signum();
    }
    u32::MAX
}

/// Extension from `b` bits.
#[inline(always)]
pub fn szext(signed: bool, wrap: bool, a: u32, b: u32) -> u32 {
    let n = if wrap { b & 31 } else { b.min(32) };
    if n == 0 {
        return 0;
    }
    let unused = 32 - n;
    if signed { ((a << unused) as i32 >> unused) as u32 } else { a << unused >> unused }
}

/// A mask of `b` ones from bit `a` on.
#[inline(always)]
pub fn bmsk(wrap: bool, a: u32, b: u32) -> u32 {
    let (a, b) = if wrap { (a & 31, b & 31) } else { (a.min(32), b.min(32)) };
    ((((1u64 << b) - 1) << a) & 0xffff_ffff) as u32
}

/// Dot product of four bytes, added to c.
#[inline(always)]
pub fn dp4a(a_signed: bool, b_signed: bool, a: u32, b: u32, c: u32) -> u32 {
    let byte = |signed: bool, x: u32, i: u32| {
        let x = x >> (8 * i) & 0xff;
        if signed { x as u8 as i8 as i32 as u32 } else { x }
    };
    let mut sum = c;
    for i in 0..4 {
        sum = sum.wrapping_add(byte(a_signed, a, i).wrapping_mul(byte(b_signed, b, i)));
    }
    sum
}

/// Dot product of a's two half words with two bytes of b, the lower two or the upper two, added to c.
#[inline(always)]
pub fn dp2a(a_signed: bool, b_signed: bool, hi: bool, a: u32, b: u32, c: u32) -> u32 {
    let b = if hi { b >> 16 } else { b };
    let mut sum = c;
    for i in 0..2 {
        let x = ext16(a_signed, a >> (16 * i));
        let y = b >> (8 * i) & 0xff;
        let y = if b_signed { y as u8 as i8 as i32 as u32 } else { y };
        sum = sum.wrapping_add(x.wrapping_mul(y));
    }
    sum
}

/// A video instruction on pairs or quads, see [`VIDEO`]: each part of `a` and `b` is extended by its type. The results
/// are wrapped or saturated to the part's width and packed, or all added to `c`.
pub fn video(f: &Decoded, a: u32, b: u32, c: u32) -> u32 {
    let bits = if f.has(HI) { 16 } else { 8 };
    let part = |signed: bool, x: u32, at: u32| {
        let high = x << (32 - bits - at);
        if signed { high as i32 >> (32 - bits) } else { (high >> (32 - bits)) as i32 }
    };
    let signed = f.ty == Ty::S32;
    let (least, most) = if signed { (-1 << (bits - 1), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) };
    let mut result = if f.has(ACCUMULATE) { c } else { 0 };
    for at in (0..32).step_by(bits as usize) {
        let (x, y) = (part(f.has(A_SIGNED), a, at), part(f.has(B_SIGNED), b, at));
        let mut d = match VIDEO[f.mode as usize] {
            "vadd" => x + y,
            "vsub" => x - y,
            "vavrg" => (x + y + i32::from(x + y >= 0)) >> 1,
            "vabsdiff" => (x - y).abs(),
            "vmin" => x.min(y),
            _ => x.max(y),
        };
        if f.has(SAT) {
            d = d.clamp(least, most);
        }
        if f.has(ACCUMULATE) {
            result = result.wrapping_add(d as u32);
        } else {
            result |= (d as u32 & (u32::MAX >> (32 - bits))) << at;
        }
    }
    result
}
