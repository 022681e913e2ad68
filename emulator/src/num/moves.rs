//! Moves: copies, packing, unpacking, extension. Forms like the arithmetic ones, but made for the decoder's own use.

use super::ops::{blend32, blend64};
use super::{Class, Detail, Form, Run, Type};

/// A register of 32 bits per lane.
type W32 = [u32; 32];
/// A register of 64 bits per lane.
type W64 = [u64; 32];

/// One instruction on a register file.
trait Move {
    /// Operands of one instruction.
    const ARITY: usize;
    /// Executes it.
    ///
    /// # Safety
    /// As for [`Run`], with `operands` those of one instruction.
    unsafe fn step(registers: *mut u8, operands: *const u32, mask: u32);
}

/// Executes `count` instructions.
///
/// # Safety
/// As for [`Run`].
#[inline(always)]
unsafe fn each<M: Move>(registers: *mut u8, operands: *const u32, count: usize, mask: u32) {
    for i in 0..count {
        // SAFETY: the caller passes `count` times ARITY operands, all inside the file.
        unsafe { M::step(registers, operands.add(i * M::ARITY), mask) };
    }
}

/// # Safety
/// As for [`Run`].
unsafe fn portable<M: Move>(_: &Form, registers: *mut u8, operands: *const u32, count: usize, mask: u32) {
    // SAFETY: guaranteed by the caller.
    unsafe { each::<M>(registers, operands, count, mask) }
}

/// # Safety
/// As for [`Run`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2<M: Move>(_: &Form, registers: *mut u8, operands: *const u32, count: usize, mask: u32) {
    // SAFETY: guaranteed by the caller.
    unsafe { each::<M>(registers, operands, count, mask) }
}

/// # Safety
/// As for [`Run`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq")]
unsafe fn avx512<M: Move>(_: &Form, registers: *mut u8, operands: *const u32, count: usize, mask: u32) {
    // SAFETY: guaranteed by the caller.
    unsafe { each::<M>(registers, operands, count, mask) }
}

#[cfg(target_arch = "x86_64")]
const fn runs<M: Move>() -> [Run; 3] {
    [portable::<M>, avx2::<M>, avx512::<M>]
}

#[cfg(not(target_arch = "x86_64"))]
const fn runs<M: Move>() -> [Run; 3] {
    [portable::<M>, portable::<M>, portable::<M>]
}

const fn form<M: Move>(dst: &'static [Type], src: &'static [Type]) -> Form {
    Form {
        dst,
        src,
        carry_in: false,
        carry_out: false,
        class: Class::Arithmetic,
        flops: None,
        detail: Detail::NONE,
        run: runs::<M>(),
    }
}

/// Pointer to operand `i`.
///
/// # Safety
/// `operands` has more than `i` offsets, and each is inside the file.
#[inline(always)]
unsafe fn at<T: Copy>(registers: *mut u8, operands: *const u32, i: usize) -> *mut T {
    // SAFETY: guaranteed by the caller.
    unsafe { registers.add(*operands.add(i) as usize).cast() }
}

macro_rules! moves {
    ($($(#[$doc:meta])* $form:ident, $name:ident: ($($d:ident),*) from ($($s:ident),*)
        by |$registers:ident, $operands:ident, $mask:ident| $body:block)*) => {$(
        struct $name;
        impl Move for $name {
            const ARITY: usize = [$(Type::$d,)* $(Type::$s),*].len();
            #[inline(always)]
            unsafe fn step($registers: *mut u8, $operands: *const u32, $mask: u32) {
                // SAFETY: the caller guarantees offsets that fit the form's types. Every source is copied out before a
                // destination is written, so no reference overlaps a write.
                unsafe { $body }
            }
        }
        $(#[$doc])*
        pub static $form: Form = form::<$name>(&[$(Type::$d),*], &[$(Type::$s),*]);
    )*};
}

/// `to = f(from)` on 32-bit lanes.
macro_rules! map {
    ($r:ident, $o:ident, $m:ident, $from:ty, $to:ty, $blend:ident, $f:expr) => {{
        let a: $from = *at::<$from>($r, $o, 1);
        let mut d: $to = [0; 32];
        for l in 0..32 {
            d[l] = $f(a[l]);
        }
        $blend(&mut *at::<$to>($r, $o, 0), &d, $m);
    }};
}

/// Unpacks a register into `n` parts of `bits` bits.
macro_rules! unpack {
    ($r:ident, $o:ident, $m:ident, $from:ty, $n:literal, $bits:literal) => {{
        let a: $from = *at::<$from>($r, $o, $n);
        for part in 0..$n {
            let mut d: W32 = [0; 32];
            for l in 0..32 {
                d[l] = (u64::from(a[l]) >> (part * $bits) & ((1u64 << $bits) - 1)) as u32;
            }
            blend32(&mut *at::<W32>($r, $o, part), &d, $m);
        }
    }};
}

/// Packs `n` parts of `bits` bits into a register.
macro_rules! pack {
    ($r:ident, $o:ident, $m:ident, $to:ty, $element:ty, $blend:ident, $n:literal, $bits:literal) => {{
        let mut d: $to = [0; 32];
        for part in 0..$n {
            let a: W32 = *at::<W32>($r, $o, 1 + part);
            for l in 0..32 {
                d[l] |= ((u64::from(a[l]) & ((1u64 << $bits) - 1)) << (part * $bits)) as $element;
            }
        }
        $blend(&mut *at::<$to>($r, $o, 0), &d, $m);
    }};
}

moves! {
    /// `mov.pred`
    COPY_PRED, CopyPred: (Pred) from (Pred) by |r, o, m| {
        let (d, a) = (at::<u32>(r, o, 0), at::<u32>(r, o, 1));
        *d = (*d & !m) | (*a & m);
    }
    /// `not.pred`, for operands written `!p`
    NOT_PRED, NotPred: (Pred) from (Pred) by |r, o, m| {
        let (d, a) = (at::<u32>(r, o, 0), at::<u32>(r, o, 1));
        *d = (*d & !m) | (!*a & m);
    }
    /// `mov` of at most 32 bits
    COPY32, Copy32: (B32) from (B32) by |r, o, m| {
        let a: W32 = *at::<W32>(r, o, 1);
        blend32(&mut *at::<W32>(r, o, 0), &a, m);
    }
    /// `mov` of 64 bits
    COPY64, Copy64: (B64) from (B64) by |r, o, m| {
        let a: W64 = *at::<W64>(r, o, 1);
        blend64(&mut *at::<W64>(r, o, 0), &a, m);
    }
    /// Wrapping addition, for `cvta`
    ADD64, Add64: (B64) from (B64, B64) by |r, o, m| {
        let (a, b): (W64, W64) = (*at::<W64>(r, o, 1), *at::<W64>(r, o, 2));
        let mut d: W64 = [0; 32];
        for l in 0..32 {
            d[l] = a[l].wrapping_add(b[l]);
        }
        blend64(&mut *at::<W64>(r, o, 0), &d, m);
    }
    /// `cvta.to.shared`, with where the window begins. Programs go on with the low half, which of an address in another
    /// space may be a good offset; so the offset of such an address is far beyond any shared memory, low half included.
    TO_WINDOW, ToWindow: (B64) from (B64, B64) by |r, o, m| {
        let (a, window): (W64, W64) = (*at::<W64>(r, o, 1), *at::<W64>(r, o, 2));
        let mut d: W64 = [0; 32];
        for l in 0..32 {
            let offset = a[l].wrapping_sub(window[l]);
            // A pointer may be before its array while it is computed.
            let near = offset.wrapping_add(1 << 31) < 1 << 33;
            d[l] = if near { offset } else { 1 << 63 | 1 << 31 };
        }
        blend64(&mut *at::<W64>(r, o, 0), &d, m);
    }
    /// The low half of 64 bits
    LOW_32, Low32: (B32) from (B64) by |r, o, m| { map!(r, o, m, W64, W32, blend32, |a: u64| a as u32) }
    /// The low 16 bits
    LOW_16, Low16: (B16) from (B32) by |r, o, m| { map!(r, o, m, W32, W32, blend32, |a: u32| a & 0xffff) }
    /// The low 8 bits
    LOW_8, Low8: (B8) from (B32) by |r, o, m| { map!(r, o, m, W32, W32, blend32, |a: u32| a & 0xff) }
    /// 32 to 64 bits with zeros
    ZERO_EXTEND_64, ZeroExtend64: (B64) from (B32) by |r, o, m| {
        map!(r, o, m, W32, W64, blend64, |a: u32| u64::from(a))
    }
    /// 16 to 32 bits with the sign
    EXTEND_16_32, Extend16To32: (B32) from (B16) by |r, o, m| {
        map!(r, o, m, W32, W32, blend32, |a: u32| a as i16 as u32)
    }
    /// 16 to 64 bits with the sign
    EXTEND_16_64, Extend16To64: (B64) from (B16) by |r, o, m| {
        map!(r, o, m, W32, W64, blend64, |a: u32| a as i16 as u64)
    }
    /// 32 to 64 bits with the sign
    EXTEND_32_64, Extend32To64: (B64) from (B32) by |r, o, m| {
        map!(r, o, m, W32, W64, blend64, |a: u32| a as i32 as u64)
    }
    /// `mov.b64 {a, b}, c`
    UNPACK_64_2, Unpack64To2: (B32, B32) from (B64) by |r, o, m| { unpack!(r, o, m, W64, 2, 32) }
    /// `mov.b64 {a, b, c, d}, e`
    UNPACK_64_4, Unpack64To4: (B16, B16, B16, B16) from (B64) by |r, o, m| { unpack!(r, o, m, W64, 4, 16) }
    /// `mov.b32 {a, b}, c`
    UNPACK_32_2, Unpack32To2: (B16, B16) from (B32) by |r, o, m| { unpack!(r, o, m, W32, 2, 16) }
    /// `mov.b32 {a, b, c, d}, e`
    UNPACK_32_4, Unpack32To4: (B8, B8, B8, B8) from (B32) by |r, o, m| { unpack!(r, o, m, W32, 4, 8) }
    /// `mov.b16 {a, b}, c`
    UNPACK_16_2, Unpack16To2: (B8, B8) from (B16) by |r, o, m| { unpack!(r, o, m, W32, 2, 8) }
    /// `mov.b64 a, {b, c}`
    PACK_64_2, Pack64From2: (B64) from (B32, B32) by |r, o, m| { pack!(r, o, m, W64, u64, blend64, 2, 32) }
    /// `mov.b64 a, {b, c, d, e}`
    PACK_64_4, Pack64From4: (B64) from (B16, B16, B16, B16) by |r, o, m| { pack!(r, o, m, W64, u64, blend64, 4, 16) }
    /// `mov.b32 a, {b, c}`
    PACK_32_2, Pack32From2: (B32) from (B16, B16) by |r, o, m| { pack!(r, o, m, W32, u32, blend32, 2, 16) }
    /// `mov.b32 a, {b, c, d, e}`
    PACK_32_4, Pack32From4: (B32) from (B8, B8, B8, B8) by |r, o, m| { pack!(r, o, m, W32, u32, blend32, 4, 8) }
    /// `mov.b16 a, {b, c}`
    PACK_16_2, Pack16From2: (B16) from (B8, B8) by |r, o, m| { pack!(r, o, m, W32, u32, blend32, 2, 8) }
}

/// The form that unpacks a type into `parts` parts, and the type of a part.
pub fn unpack(ty: Type, parts: usize) -> Option<(&'static Form, Type)> {
    Some(match (ty, parts) {
        (Type::B64 | Type::F64, 2) => (&UNPACK_64_2, Type::B32),
        (Type::B64 | Type::F64, 4) => (&UNPACK_64_4, Type::B16),
        (Type::B32 | Type::F32, 2) => (&UNPACK_32_2, Type::B16),
        (Type::B32 | Type::F32, 4) => (&UNPACK_32_4, Type::B8),
        (Type::B16, 2) => (&UNPACK_16_2, Type::B8),
        _ => return None,
    })
}

/// The form that packs `parts` parts into a type, and the type of a part.
pub fn pack(ty: Type, parts: usize) -> Option<(&'static Form, Type)> {
    Some(match (ty, parts) {
        (Type::B64 | Type::F64, 2) => (&PACK_64_2, Type::B32),
        (Type::B64 | Type::F64, 4) => (&PACK_64_4, Type::B16),
        (Type::B32 | Type::F32, 2) => (&PACK_32_2, Type::B16),
        (Type::B32 | Type::F32, 4) => (&PACK_32_4, Type::B8),
        (Type::B16, 2) => (&PACK_16_2, Type::B8),
        _ => return None,
    })
}
