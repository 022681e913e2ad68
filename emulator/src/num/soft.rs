//! Exact arithmetic in integers, where the host's instructions do not round as PTX asks: directed rounding of f64, and
//! every conversion between number formats without a faster path. One definition serves all formats: a value is
//! unpacked to sign, integer significand and exponent, and packed with one rounding.
//!
//! Slow, and never in a hot loop. Functions take and return bits, since NaN is no number.

use super::form::{Round, Ty};

/// A binary floating-point format.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// Bits of the significand, the hidden one included.
    precision: i32,
    /// Exponent of the smallest subnormal's unit: the value is an integer times 2 to this power.
    min_exponent: i32,
    /// Largest exponent of a finite value's leading bit.
    max_exponent: i32,
    /// Low bits that the format leaves zero (13 in tf32, which lives in the upper bits of an f32).
    padding: i32,
    /// The NaN that PTX's instructions make.
    nan: u64,
    bits: i32,
}

/// The formats by the names of their types.
pub const F16: Format =
    Format { precision: 11, min_exponent: -24, max_exponent: 15, padding: 0, nan: 0x7fff, bits: 16 };
#[allow(missing_docs)]
pub const BF16: Format =
    Format { precision: 8, min_exponent: -133, max_exponent: 127, padding: 0, nan: 0x7fff, bits: 16 };
#[allow(missing_docs)]
pub const TF32: Format =
    Format { precision: 11, min_exponent: -136, max_exponent: 127, padding: 13, nan: 0x7fff_ffff, bits: 32 };
#[allow(missing_docs)]
pub const F32: Format =
    Format { precision: 24, min_exponent: -149, max_exponent: 127, padding: 0, nan: 0x7fff_ffff, bits: 32 };
#[allow(missing_docs)]
pub const F64: Format =
    Format { precision: 53, min_exponent: -1074, max_exponent: 1023, padding: 0, nan: 0x7fff_ffff_ffff_ffff, bits: 64 };

/// The NaN that conversions to f64 make.
pub const NAN_F64: u64 = F64.nan;

impl Format {
    /// The format of a floating-point type.
    pub fn of(ty: Ty) -> Option<Format> {
        Some(match ty {
            Ty::F16 | Ty::F16x2 => F16,
            Ty::Bf16 | Ty::Bf16x2 => BF16,
            Ty::Tf32 => TF32,
            Ty::F32 => F32,
            Ty::F64 => F64,
            _ => return None,
        })
    }

    fn infinity(self) -> u64 {
        let fraction = self.precision - 1;
        (((self.max_exponent as u64) << 1) + 1) << fraction << self.padding
    }
}

/// A number of any format.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value {
    /// Not a number.
    Nan,
    /// Infinity; `true` is minus.
    Infinite(bool),
    /// (-1)^sign * significand * 2^exponent; zero where the significand is.
    Finite {
        /// Minus.
        sign: bool,
        /// Integer significand; its lowest bit may stand for "and something below".
        significand: u128,
        /// Exponent of the significand's lowest bit.
        exponent: i32,
    },
}

/// The value that the low bits of `bits` hold in `format`.
pub fn unpack(format: Format, bits: u64) -> Value {
    let fraction_bits = format.precision - 1;
    let bits = (bits & (u64::MAX >> (64 - format.bits))) >> format.padding;
    let width = format.bits - format.padding;
    let sign = bits >> (width - 1) & 1 == 1;
    let fraction = bits & ((1 << fraction_bits) - 1);
    let biased = (bits >> fraction_bits & ((1 << (width - 1 - fraction_bits)) - 1)) as i32;
    if biased == format.max_exponent * 2 + 1 {
        return if fraction == 0 { Value::Infinite(sign) } else { Value::Nan };
    }
    let (significand, exponent) = if biased == 0 {
        (fraction, format.min_exponent)
    } else {
        (fraction | 1 << fraction_bits, format.min_exponent + biased - 1)
    };
    Value::Finite { sign, significand: significand as u128, exponent }
}

/// Divides by 2^`shift` and rounds to an integer.
fn round_shift(sign: bool, significand: u128, shift: i32, round: Round) -> u128 {
    if shift <= 0 {
        return significand << -shift;
    }
    let (kept, rest, half) = match shift {
        1..=127 => (significand >> shift, significand & ((1 << shift) - 1), 1u128 << (shift - 1)),
        // All of it is below the unit, and below half of it, unless it is zero.
        _ => (0, (significand != 0) as u128, 2),
    };
    let up = match round {
        Round::Rn => rest > half || (rest == half && kept & 1 == 1),
        Round::Rna => rest >= half && rest != 0,
        Round::Rz => false,
        Round::Rm => sign && rest != 0,
        Round::Rp => !sign && rest != 0,
    };
    kept + up as u128
}

/// Rounds once into `format`.
pub fn pack(format: Format, value: Value, round: Round) -> u64 {
    let sign_bit = |sign: bool| (sign as u64) << (format.bits - 1);
    let (sign, significand, exponent) = match value {
        Value::Nan => return format.nan,
        Value::Infinite(sign) => return sign_bit(sign) | format.infinity(),
        Value::Finite { sign, significand, exponent } => (sign, significand, exponent),
    };
    if significand == 0 {
        return sign_bit(sign);
    }
    let length = 128 - significand.leading_zeros() as i32;
    let unit = (exponent + length - format.precision).max(format.min_exponent);
    let mut rounded = round_shift(sign, significand, unit - exponent, round) as u64;
    let mut unit = unit;
    if rounded == 1 << format.precision {
        rounded >>= 1;
        unit += 1;
    }
    if unit + format.precision - 1 > format.max_exponent {
        let away = match round {
            Round::Rn | Round::Rna => true,
            Round::Rz => false,
            Round::Rm => sign,
            Round::Rp => !sign,
        };
        // The largest finite value is the pattern just below infinity's.
        let magnitude = if away { format.infinity() } else { format.infinity() - (1 << format.padding) };
        return sign_bit(sign) | magnitude;
    }
    // A hidden bit in `rounded` adds one to the exponent field by itself.
    let field = ((unit - format.min_exponent) as u64) << (format.precision - 1);
    sign_bit(sign) | ((field + rounded) << format.padding)
}

/// Replaces an infinity by the largest finite value of its sign.
pub fn limit_finite(format: Format, bits: u64) -> u64 {
    let magnitude = bits & (u64::MAX >> (65 - format.bits));
    if magnitude == format.infinity() { bits - (1 << format.padding) } else { bits }
}

/// Rounds to an integer, and limits it to `bits` bits, as conversions from floating point do.
pub fn to_integer(value: Value, signed: bool, bits: u32, round: Round, from_f64: bool) -> u64 {
    let (min, max) = integer_range(signed, bits);
    let integer = match value {
        // The manual: zero, unless a 64-bit type is on either side; then the pattern with the top bit set.
        Value::Nan if bits == 64 || from_f64 => {
            return if signed { min as u64 } else { 1 << (bits - 1) };
        }
        Value::Nan => 0,
        Value::Infinite(sign) => {
            if sign {
                min
            } else {
                max
            }
        }
        Value::Finite { sign, significand, exponent } => {
            let length = 128 - significand.leading_zeros() as i32;
            let magnitude =
                if exponent + length > 70 { 1 << 70 } else { round_shift(sign, significand, -exponent, round) as i128 };
            if sign { -magnitude } else { magnitude }
        }
    };
    integer.clamp(min, max) as u64
}

/// Rounds to an integral value of the same format, the sign of zero kept.
pub fn to_integral(value: Value, round: Round) -> Value {
    match value {
        Value::Finite { sign, significand, exponent } if exponent < 0 => {
            Value::Finite { sign, significand: round_shift(sign, significand, -exponent, round), exponent: 0 }
        }
        other => other,
    }
}

/// Smallest and largest integer of a width.
pub fn integer_range(signed: bool, bits: u32) -> (i128, i128) {
    if signed { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

/// Shifts right, and leaves a mark in the lowest bit where bits were lost.
fn shift_sticky(significand: u128, shift: i32) -> u128 {
    match shift {
        0 => significand,
        1..=127 => significand >> shift | ((significand & ((1 << shift) - 1)) != 0) as u128,
        _ => (significand != 0) as u128,
    }
}

/// a * b + c on f64 bits, rounded once.
pub fn fma_f64(a: u64, b: u64, c: u64, round: Round) -> u64 {
    use Value::*;
    let (Finite { sign: sa, significand: ma, exponent: ea }, Finite { sign: sb, significand: mb, exponent: eb }, vc) =
        (unpack(F64, a), unpack(F64, b), unpack(F64, c))
    else {
        // Infinities and NaN do not round: the host's result is the result.
        return f64::from_bits(a).mul_add(f64::from_bits(b), f64::from_bits(c)).to_bits();
    };
    let Finite { sign: sc, significand: mc, exponent: ec } = vc else {
        return f64::from_bits(a).mul_add(f64::from_bits(b), f64::from_bits(c)).to_bits();
    };
    let (sp, mp, ep) = (sa ^ sb, ma * mb, ea + eb);
    let exact_zero = |s1: bool, s2: bool| {
        let sign = if s1 == s2 { s1 } else { round == Round::Rm };
        (sign as u64) << 63
    };
    if mp == 0 && mc == 0 {
        return exact_zero(sp, sc);
    }
    if mp == 0 {
        return pack(F64, vc, round);
    }
    if mc == 0 {
        return pack(F64, Finite { sign: sp, significand: mp, exponent: ep }, round);
    }
    // Both get their leading bit at 125. A product has 106 bits, so a shift by up to 19 loses nothing; after a longer
    // one the sum still has at least 124 bits, far above the lost ones.
    let up = |m: u128, e: i32| {
        let shift = m.leading_zeros() as i32 - 2;
        (m << shift, e - shift)
    };
    let ((mp, ep), (mc, ec)) = (up(mp, ep), up(mc, ec));
    let exponent = ep.max(ec);
    let (mp, mc) = (shift_sticky(mp, exponent - ep), shift_sticky(mc, exponent - ec));
    let (sign, significand) = if sp == sc {
        (sp, mp + mc)
    } else if mp == mc {
        return exact_zero(sp, sc);
    } else if mp > mc {
        (sp, mp - mc)
    } else {
        (sc, mc - mp)
    };
    pack(F64, Finite { sign, significand, exponent }, round)
}

/// a * b on f64 bits, rounded once.
pub fn mul_f64(a: u64, b: u64, round: Round) -> u64 {
    match (unpack(F64, a), unpack(F64, b)) {
        (
            Value::Finite { sign: sa, significand: ma, exponent: ea },
            Value::Finite { sign: sb, significand: mb, exponent: eb },
        ) => pack(F64, Value::Finite { sign: sa ^ sb, significand: ma * mb, exponent: ea + eb }, round),
        _ => (f64::from_bits(a) * f64::from_bits(b)).to_bits(),
    }
}

/// a / b on f64 bits, rounded once.
pub fn div_f64(a: u64, b: u64, round: Round) -> u64 {
    match (unpack(F64, a), unpack(F64, b)) {
        (
            Value::Finite { sign: sa, significand: ma, exponent: ea },
            Value::Finite { sign: sb, significand: mb, exponent: eb },
        ) if ma != 0 && mb != 0 => {
            // The quotient's leading bit is at 62 or above: nine bits and a mark below the last place.
            let (na, nb) = (ma.leading_zeros() as i32 - 1, mb.leading_zeros() as i32 - 64);
            let (dividend, divisor) = (ma << na, mb << nb);
            let (quotient, rest) = (dividend / divisor, dividend % divisor);
            pack(
                F64,
                Value::Finite {
                    sign: sa ^ sb,
                    significand: quotient << 1 | (rest != 0) as u128,
                    exponent: ea - na - eb + nb - 1,
                },
                round,
            )
        }
        _ => (f64::from_bits(a) / f64::from_bits(b)).to_bits(),
    }
}

/// The square root of f64 bits, rounded once.
pub fn sqrt_f64(a: u64, round: Round) -> u64 {
    match unpack(F64, a) {
        Value::Finite { sign: false, significand, exponent } if significand != 0 => {
            let mut shift = significand.leading_zeros() as i32 - 1;
            shift -= (exponent - shift) & 1;
            let square = significand << shift;
            let root = square.isqrt();
            let mark = (root * root != square) as u128;
            pack(
                F64,
                Value::Finite { sign: false, significand: root << 1 | mark, exponent: (exponent - shift) / 2 - 1 },
                round,
            )
        }
        _ => f64::from_bits(a).sqrt().to_bits(),
    }
}
