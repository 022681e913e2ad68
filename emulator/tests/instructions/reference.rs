//! The meaning of floating-point operations by a soft-float library, of integers by i128; nothing of the emulator's own
//! arithmetic.

use rustc_apfloat::ieee::{BFloat, Double, Half, Single};
use rustc_apfloat::{Float, FloatConvert, Round};

/// A floating-point format by its PTX name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    F16,
    Bf16,
    F32,
    F64,
}

impl Format {
    pub fn of(name: &str) -> Format {
        match name.trim_end_matches("x2") {
            "f16" => Format::F16,
            "bf16" => Format::Bf16,
            "f32" => Format::F32,
            "f64" => Format::F64,
            _ => panic!("no format {name}"),
        }
    }

    pub fn bits(self) -> u32 {
        match self {
            Format::F16 | Format::Bf16 => 16,
            Format::F32 => 32,
            Format::F64 => 64,
        }
    }

    pub fn fraction(self) -> u32 {
        match self {
            Format::F16 => 10,
            Format::Bf16 => 7,
            Format::F32 => 23,
            Format::F64 => 52,
        }
    }

    pub fn sign(self) -> u64 {
        1 << (self.bits() - 1)
    }

    pub fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    pub fn exponent_mask(self) -> u64 {
        (self.sign() - 1) & !((1 << self.fraction()) - 1)
    }

    pub fn is_nan(self, bits: u64) -> bool {
        bits & (self.sign() - 1) > self.exponent_mask()
    }

    pub fn is_subnormal(self, bits: u64) -> bool {
        bits & self.exponent_mask() == 0 && bits & (self.sign() - 1) != 0
    }

    /// The NaN of PTX's instructions; for f64 any NaN will do.
    pub fn nan(self) -> u64 {
        match self {
            Format::F16 | Format::Bf16 => 0x7fff,
            Format::F32 => 0x7fff_ffff,
            Format::F64 => 0x7fff_ffff_ffff_ffff,
        }
    }

    pub fn one(self) -> u64 {
        match self {
            Format::F16 => 0x3c00,
            Format::Bf16 => 0x3f80,
            Format::F32 => 0x3f80_0000,
            Format::F64 => 0x3ff0_0000_0000_0000,
        }
    }

    pub fn flush(self, bits: u64) -> u64 {
        if self.is_subnormal(bits) { bits & self.sign() } else { bits }
    }

    /// Exact for all four formats.
    pub fn value(self, bits: u64) -> f64 {
        f64::from_bits(convert(self, Format::F64, bits, "rn"))
    }

    /// Clamped to [0, 1], NaN to zero.
    pub fn saturate(self, bits: u64) -> u64 {
        if self.is_nan(bits) || bits & self.sign() != 0 { 0 } else { bits.min(self.one()) }
    }

    pub fn relu(self, bits: u64) -> u64 {
        if self.is_nan(bits) {
            self.nan()
        } else if bits & self.sign() != 0 {
            0
        } else {
            bits
        }
    }
}

pub fn round(name: &str) -> Round {
    match name {
        "rn" | "rni" => Round::NearestTiesToEven,
        "rz" | "rzi" => Round::TowardZero,
        "rm" | "rmi" => Round::TowardNegative,
        "rp" | "rpi" => Round::TowardPositive,
        _ => panic!("no rounding {name}"),
    }
}

fn operate<F: Float>(operation: &str, a: u64, b: u64, c: u64, by: Round) -> u64 {
    let [a, b, c] = [a, b, c].map(|x| F::from_bits(x as u128));
    let r = match operation {
        "add" => a.add_r(b, by),
        "sub" => a.sub_r(b, by),
        "mul" => a.mul_r(b, by),
        "div" => a.div_r(b, by),
        "fma" => a.mul_add_r(b, c, by),
        "integral" => a.round_to_integral(by),
        _ => panic!("no operation {operation}"),
    };
    r.value.to_bits() as u64
}

/// `operation` in `format`, rounded once, NaN canonical.
pub fn arithmetic(format: Format, operation: &str, a: u64, b: u64, c: u64, by: &str) -> u64 {
    let [a, b, c] = [a, b, c].map(|x| x & format.mask());
    let r = match format {
        Format::F16 => operate::<Half>(operation, a, b, c, round(by)),
        Format::Bf16 => operate::<BFloat>(operation, a, b, c, round(by)),
        Format::F32 => operate::<Single>(operation, a, b, c, round(by)),
        Format::F64 => operate::<Double>(operation, a, b, c, round(by)),
    };
    if format.is_nan(r) { format.nan() } else { r }
}

fn convert_from<F>(to: Format, bits: u64, by: Round) -> u64
where
    F: Float + FloatConvert<Half> + FloatConvert<BFloat> + FloatConvert<Single> + FloatConvert<Double>,
{
    let x = F::from_bits(bits as u128);
    let mut lost = false;
    let r = match to {
        Format::F16 => FloatConvert::<Half>::convert_r(x, by, &mut lost).value.to_bits(),
        Format::Bf16 => FloatConvert::<BFloat>::convert_r(x, by, &mut lost).value.to_bits(),
        Format::F32 => FloatConvert::<Single>::convert_r(x, by, &mut lost).value.to_bits(),
        Format::F64 => FloatConvert::<Double>::convert_r(x, by, &mut lost).value.to_bits(),
    };
    if to.is_nan(r as u64) { to.nan() } else { r as u64 }
}

/// Between formats, rounded once, NaN canonical.
pub fn convert(from: Format, to: Format, bits: u64, by: &str) -> u64 {
    let bits = bits & from.mask();
    match from {
        Format::F16 => convert_from::<Half>(to, bits, round(by)),
        Format::Bf16 => convert_from::<BFloat>(to, bits, round(by)),
        Format::F32 => convert_from::<Single>(to, bits, round(by)),
        Format::F64 => convert_from::<Double>(to, bits, round(by)),
    }
}

/// From an integer.
pub fn from_integer(to: Format, x: i128, by: &str) -> u64 {
    let by = round(by);
    (match to {
        Format::F16 => Half::from_i128_r(x, by).value.to_bits(),
        Format::Bf16 => BFloat::from_i128_r(x, by).value.to_bits(),
        Format::F32 => Single::from_i128_r(x, by).value.to_bits(),
        Format::F64 => Double::from_i128_r(x, by).value.to_bits(),
    }) as u64
}

/// The integral value nearest in the direction `by`, as an f64 (exact: integral values of all four formats are f64).
pub fn integral(from: Format, bits: u64, by: &str) -> f64 {
    from.value(arithmetic(from, "integral", bits, 0, 0, by))
}

/// The square root, by search for the largest integer whose square is not above the operand.
pub fn sqrt(format: Format, bits: u64, by: &str) -> u64 {
    let fraction = format.fraction();
    if format.is_nan(bits) || (bits & format.sign() != 0 && bits != format.sign()) {
        return format.nan();
    }
    if bits & (format.sign() - 1) == 0 || bits == format.exponent_mask() {
        return bits;
    }
    // bits = m * 2^(e - bias), m odd or even as it comes.
    let bias = (1i32 << (format.bits() - 2 - fraction)) - 1 + fraction as i32;
    let field = (bits >> fraction) as i32;
    let (mut m, mut e) = if field == 0 {
        (bits as u128, 1 - bias)
    } else {
        ((bits & ((1 << fraction) - 1) | 1 << fraction) as u128, field - bias)
    };
    // Scale so that the root has fraction + 3 bits: two below the last place.
    while m < 1 << (2 * fraction + 4) || e & 1 != 0 {
        m <<= 1;
        e -= 1;
    }
    let mut root = 0u128;
    for i in (0..60).rev() {
        let candidate = root | 1 << i;
        if candidate * candidate <= m {
            root = candidate;
        }
    }
    let exact = root * root == m;
    // root * 2^(e/2), with a sticky bit for the remainder. A root is never exactly half a unit in the last place, so
    // the soft-float library rounds it from a significand one bit longer.
    let significand = (root << 1 | !exact as u128) as i128;
    let by = round(by);
    let scale = e / 2 - 1;
    (match format {
        Format::F32 => {
            let wide = Double::from_i128_r(significand, Round::NearestTiesToEven).value.scalbn_r(scale, by);
            FloatConvert::<Single>::convert_r(wide, by, &mut false).value.to_bits()
        }
        Format::F64 => {
            // More than 53 bits: rounded in the conversion, scaled exactly, as roots are never subnormal.
            Double::from_i128_r(significand, by).value.scalbn_r(scale, by).to_bits()
        }
        _ => panic!("PTX has no square root of {format:?}"),
    }) as u64
}

/// Sign or zero extension of the low bits, as an integer.
pub fn integer(ty: &str, bits: u64) -> i128 {
    let width: u32 = ty[1..].parse().expect("a width");
    let low = bits & (u64::MAX >> (64 - width));
    if ty.starts_with('s') && low >> (width - 1) == 1 { low as i128 - (1 << width) } else { low as i128 }
}

/// Smallest and largest value of an integer type.
pub fn range(ty: &str) -> (i128, i128) {
    let width: u32 = ty[1..].parse().expect("a width");
    if ty.starts_with('s') { (-(1 << (width - 1)), (1 << (width - 1)) - 1) } else { (0, (1 << width) - 1) }
}
