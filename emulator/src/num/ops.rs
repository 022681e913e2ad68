//! Every operation other than matrix products, over a warp: the meaning of one lane from [`super::float`],
//! [`super::half`], [`super::int`] and so on, looped over 32 lanes and compiled once per instruction set of the host.
//!
//! The loops are plain Rust that vectorises. Only packing 32 comparisons into a predicate is written by hand for each
//! set.

use super::form::{BoolOp, Decoded, Op, Relation, Round, Ty, flag};
use super::{Run, approx, float, half, int, soft};

/// One 32-bit value a lane.
pub type Lanes = [u32; 32];
/// One 64-bit value a lane.
pub type Lanes64 = [u64; 32];

/// An instruction set that loops are compiled for.
pub trait Isa {
    /// Whether `mul_add` is one instruction.
    const FMA: bool;
    /// Whether there are AVX-512 F, VL, BW and DQ.
    const AVX512: bool;
}

/// What every processor has.
#[derive(Debug)]
pub struct Portable;
/// AVX2, FMA, F16C and what comes with them.
#[derive(Debug)]
pub struct Avx2;
/// AVX-512 F, VL, BW and DQ, and all that [`Avx2`] has.
#[derive(Debug)]
pub struct Avx512;

impl Isa for Portable {
    const FMA: bool = false;
    const AVX512: bool = false;
}
impl Isa for Avx2 {
    const FMA: bool = true;
    const AVX512: bool = false;
}
impl Isa for Avx512 {
    const FMA: bool = true;
    const AVX512: bool = true;
}

/// Writes the lanes in the mask. With bit operations, because the compiler turns a choice between two values into a
/// choice between two addresses, lane by lane.
#[inline(always)]
pub fn blend32(to: &mut Lanes, from: &Lanes, mask: u32) {
    if mask == u32::MAX {
        *to = *from;
        return;
    }
    for lane in 0..32 {
        let keep = (mask >> lane & 1).wrapping_neg();
        to[lane] = (to[lane] & !keep) | (from[lane] & keep);
    }
}

/// The same for 64 bits.
#[inline(always)]
pub fn blend64(to: &mut Lanes64, from: &Lanes64, mask: u32) {
    if mask == u32::MAX {
        *to = *from;
        return;
    }
    for lane in 0..32 {
        let keep = ((mask >> lane & 1) as u64).wrapping_neg();
        to[lane] = (to[lane] & !keep) | (from[lane] & keep);
    }
}

/// The registers of one instruction: destinations, sources.
#[derive(Clone, Copy)]
pub struct Operands {
    /// The warp's register file.
    pub registers: *mut u8,
    /// This instruction's offsets.
    pub at: *const u32,
    /// Lanes that run.
    pub mask: u32,
}

// For every method: the offsets were made for this form, so each operand is inside the file, aligned and initialised. A
// source is borrowed only until its instruction writes.
impl Operands {
    #[inline(always)]
    unsafe fn pointer<T>(&self, i: usize) -> *mut T {
        // SAFETY: the caller guarantees that the offset is inside the register file.
        unsafe { self.registers.add(*self.at.add(i) as usize).cast() }
    }

    /// Operand `i` as 32-bit lanes.
    ///
    /// # Safety
    /// It has kind B32, and nothing writes it while the borrow lives.
    #[inline(always)]
    pub unsafe fn b32<'a>(&self, i: usize) -> &'a Lanes {
        // SAFETY: guaranteed by the caller.
        unsafe { &*self.pointer(i) }
    }

    /// Operand `i` as 64-bit lanes.
    ///
    /// # Safety
    /// It has kind B64, and nothing writes it while the borrow lives.
    #[inline(always)]
    pub unsafe fn b64<'a>(&self, i: usize) -> &'a Lanes64 {
        // SAFETY: guaranteed by the caller.
        unsafe { &*self.pointer(i) }
    }

    /// Pointer to the 32-bit lanes of operand `i`.
    ///
    /// # Safety
    /// It has kind B32.
    #[inline(always)]
    pub unsafe fn words(&self, i: usize) -> *mut u32 {
        // SAFETY: guaranteed by the caller.
        unsafe { self.pointer(i) }
    }

    /// Operand `i` as a predicate.
    ///
    /// # Safety
    /// It is a predicate.
    #[inline(always)]
    pub unsafe fn pred(&self, i: usize) -> u32 {
        // SAFETY: guaranteed by the caller.
        unsafe { *self.pointer(i) }
    }

    /// Writes 32-bit lanes where the mask is set.
    ///
    /// # Safety
    /// Operand `i` is a destination of kind B32.
    #[inline(always)]
    pub unsafe fn put32(&self, i: usize, r: &Lanes) {
        // SAFETY: guaranteed by the caller; no borrow of the register is used after this, and `r` is not in the file.
        let d: &mut Lanes = unsafe { &mut *self.pointer(i) };
        blend32(d, r, self.mask);
    }

    /// Writes 64-bit lanes where the mask is set.
    ///
    /// # Safety
    /// Operand `i` is a destination of kind B64.
    #[inline(always)]
    pub unsafe fn put64(&self, i: usize, r: &Lanes64) {
        // SAFETY: guaranteed by the caller; no borrow of the register is used after this, and `r` is not in the file.
        let d: &mut Lanes64 = unsafe { &mut *self.pointer(i) };
        blend64(d, r, self.mask);
    }

    /// Writes a predicate where the mask is set.
    ///
    /// # Safety
    /// Operand `i` is a destination predicate.
    #[inline(always)]
    pub unsafe fn put_pred(&self, i: usize, r: u32) {
        // SAFETY: guaranteed by the caller; no borrow of the register is used after this.
        let d: &mut u32 = unsafe { &mut *self.pointer(i) };
        *d = (*d & !self.mask) | (r & self.mask);
    }

    // The shapes of most operations: destination 0, sources from 1 on, of 32 or 64 bits. All need operands of the kinds
    // that their bodies name.

    #[inline(always)]
    unsafe fn map1(&self, f: impl Fn(u32) -> u32) {
        // SAFETY: the caller's form has operands of these kinds. The same holds for every method below.
        unsafe {
            let a = self.b32(1);
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i]);
            }
            self.put32(0, &r);
        }
    }

    #[inline(always)]
    unsafe fn map2(&self, f: impl Fn(u32, u32) -> u32) {
        // SAFETY: see `map1`.
        unsafe {
            let (a, b) = (self.b32(1), self.b32(2));
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i], b[i]);
            }
            self.put32(0, &r);
        }
    }

    #[inline(always)]
    unsafe fn map3(&self, f: impl Fn(u32, u32, u32) -> u32) {
        // SAFETY: see `map1`.
        unsafe {
            let (a, b, c) = (self.b32(1), self.b32(2), self.b32(3));
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i], b[i], c[i]);
            }
            self.put32(0, &r);
        }
    }

    #[inline(always)]
    unsafe fn map4(&self, f: impl Fn(u32, u32, u32, u32) -> u32) {
        // SAFETY: see `map1`.
        unsafe {
            let (a, b, c, d) = (self.b32(1), self.b32(2), self.b32(3), self.b32(4));
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i], b[i], c[i], d[i]);
            }
            self.put32(0, &r);
        }
    }

    #[inline(always)]
    unsafe fn wide1(&self, f: impl Fn(u64) -> u64) {
        // SAFETY: see `map1`.
        unsafe {
            let a = self.b64(1);
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i]);
            }
            self.put64(0, &r);
        }
    }

    #[inline(always)]
    unsafe fn wide2(&self, f: impl Fn(u64, u64) -> u64) {
        // SAFETY: see `map1`.
        unsafe {
            let (a, b) = (self.b64(1), self.b64(2));
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i], b[i]);
            }
            self.put64(0, &r);
        }
    }

    #[inline(always)]
    unsafe fn wide3(&self, f: impl Fn(u64, u64, u64) -> u64) {
        // SAFETY: see `map1`.
        unsafe {
            let (a, b, c) = (self.b64(1), self.b64(2), self.b64(3));
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i], b[i], c[i]);
            }
            self.put64(0, &r);
        }
    }

    /// 64-bit destination and source, 32-bit amount.
    #[inline(always)]
    unsafe fn wide_by(&self, f: impl Fn(u64, u32) -> u64) {
        // SAFETY: see `map1`.
        unsafe {
            let (a, b) = (self.b64(1), self.b32(2));
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i], b[i]);
            }
            self.put64(0, &r);
        }
    }

    /// 64-bit source, 32-bit destination.
    #[inline(always)]
    unsafe fn narrow1(&self, f: impl Fn(u64) -> u32) {
        // SAFETY: see `map1`.
        unsafe {
            let a = self.b64(1);
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i]);
            }
            self.put32(0, &r);
        }
    }

    // The same for rare operations, or those for which the host has no vector instructions: compiled once, with a call
    // per lane.

    #[inline(never)]
    unsafe fn each1(&self, f: &dyn Fn(u32) -> u32) {
        // SAFETY: see `map1`.
        unsafe { self.map1(f) }
    }

    #[inline(never)]
    unsafe fn each2(&self, f: &dyn Fn(u32, u32) -> u32) {
        // SAFETY: see `map1`.
        unsafe { self.map2(f) }
    }

    #[inline(never)]
    unsafe fn each3(&self, f: &dyn Fn(u32, u32, u32) -> u32) {
        // SAFETY: see `map1`.
        unsafe { self.map3(f) }
    }

    #[inline(never)]
    unsafe fn each4(&self, f: &dyn Fn(u32, u32, u32, u32) -> u32) {
        // SAFETY: see `map1`.
        unsafe { self.map4(f) }
    }

    #[inline(never)]
    unsafe fn each_wide1(&self, f: &dyn Fn(u64) -> u64) {
        // SAFETY: see `map1`.
        unsafe { self.wide1(f) }
    }

    #[inline(never)]
    unsafe fn each_wide2(&self, f: &dyn Fn(u64, u64) -> u64) {
        // SAFETY: see `map1`.
        unsafe { self.wide2(f) }
    }

    #[inline(never)]
    unsafe fn each_wide3(&self, f: &dyn Fn(u64, u64, u64) -> u64) {
        // SAFETY: see `map1`.
        unsafe { self.wide3(f) }
    }

    #[inline(never)]
    unsafe fn each_narrow1(&self, f: &dyn Fn(u64) -> u32) {
        // SAFETY: see `map1`.
        unsafe { self.narrow1(f) }
    }

    /// 32-bit source, 64-bit destination.
    #[inline(always)]
    unsafe fn widen1(&self, f: impl Fn(u32) -> u64) {
        // SAFETY: see `map1`.
        unsafe {
            let a = self.b32(1);
            let mut r = [0; 32];
            for i in 0..32 {
                r[i] = f(a[i]);
            }
            self.put64(0, &r);
        }
    }

    /// Operand `i`, of either width, as 64-bit lanes.
    #[inline(always)]
    unsafe fn any(&self, i: usize, ty: Ty) -> Lanes64 {
        // SAFETY: see `map1`.
        unsafe { if ty.bits() == 64 { *self.b64(i) } else { self.b32(i).map(|x| x as u64) } }
    }

    /// Writes 64-bit lanes, or their low halves, by the destination's width.
    #[inline(always)]
    unsafe fn put_any(&self, i: usize, ty: Ty, r: &Lanes64) {
        // SAFETY: see `map1`.
        unsafe { if ty.bits() == 64 { self.put64(i, r) } else { self.put32(i, &r.map(|x| held(ty, x as u32))) } }
    }
}

/// Bit l of the result says whether lane l of `on`, all ones or zero, is set.
///
/// # Safety
/// The processor supports `I`.
#[inline(always)]
unsafe fn pack<I: Isa>(on: &Lanes) -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        if I::AVX512 {
            // SAFETY: the caller guarantees AVX-512 DQ; `on` has 128 bytes.
            unsafe {
                let low = _mm512_movepi32_mask(_mm512_loadu_si512(on.as_ptr().cast()));
                let high = _mm512_movepi32_mask(_mm512_loadu_si512(on.as_ptr().add(16).cast()));
                low as u32 | (high as u32) << 16
            }
        } else if I::FMA {
            let mut bits = 0;
            for i in 0..4 {
                // SAFETY: the caller guarantees AVX2; `on` has 128 bytes.
                bits |= unsafe { _mm256_movemask_ps(_mm256_loadu_ps(on.as_ptr().add(8 * i).cast())) as u32 } << (8 * i);
            }
            bits
        } else {
            let mut bits = 0;
            for i in 0..8 {
                // SAFETY: SSE2 is part of x86-64; `on` has 128 bytes.
                bits |= unsafe { _mm_movemask_ps(_mm_loadu_ps(on.as_ptr().add(4 * i).cast())) as u32 } << (4 * i);
            }
            bits
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let mut bits = 0;
        for i in 0..32 {
            bits |= (on[i] & 1) << i;
        }
        bits
    }
}

/// The lanes of two vectors that satisfy `f`, as a predicate.
///
/// # Safety
/// The processor supports `I`.
#[inline(always)]
unsafe fn which<I: Isa, T: Copy>(a: &[T; 32], b: &[T; 32], f: impl Fn(T, T) -> bool) -> u32 {
    let mut on = [0; 32];
    for i in 0..32 {
        on[i] = (f(a[i], b[i]) as u32).wrapping_neg();
    }
    // SAFETY: guaranteed by the caller.
    unsafe { pack::<I>(&on) }
}

/// A comparison of integers.
///
/// # Safety
/// The processor supports `I`.
#[inline(always)]
unsafe fn compare_int<I: Isa, T: Copy + Ord>(f: &Decoded, a: &[T; 32], b: &[T; 32]) -> u32 {
    let (a, b) = if f.compare.swap { (b, a) } else { (a, b) };
    // SAFETY: guaranteed by the caller.
    let t = unsafe {
        match f.compare.relation {
            Relation::Equal => which::<I, T>(a, b, |a, b| a == b),
            _ => which::<I, T>(a, b, |a, b| a < b),
        }
    };
    if f.compare.negate { !t } else { t }
}

/// A comparison of floats.
///
/// # Safety
/// The processor supports `I`.
#[inline(always)]
unsafe fn compare_float<I: Isa, T: Copy + PartialOrd>(f: &Decoded, a: &[T; 32], b: &[T; 32]) -> u32 {
    let (a, b) = if f.compare.swap { (b, a) } else { (a, b) };
    // SAFETY: guaranteed by the caller.
    let t = unsafe {
        match f.compare.relation {
            Relation::Equal => which::<I, T>(a, b, |a, b| a == b),
            Relation::Less => which::<I, T>(a, b, |a, b| a < b),
            Relation::LessEqual => which::<I, T>(a, b, |a, b| a <= b),
            Relation::LessGreater => which::<I, T>(a, b, |a, b| a < b || a > b),
            Relation::Ordered => which::<I, T>(a, b, |a, b| a.partial_cmp(&b).is_some()),
        }
    };
    if f.compare.negate { !t } else { t }
}

/// The comparison of a `set` or `setp` whose first source is operand `at`. Two results for pairs of halves; otherwise
/// the same one twice.
///
/// # Safety
/// As for [`Operands::b32`]; the processor supports `I`.
#[inline(always)]
unsafe fn compare_any<I: Isa>(f: &Decoded, o: &Operands, at: usize) -> (u32, u32) {
    let ftz = f.has(flag::FTZ);
    let twice = |t| (t, t);
    // SAFETY: the caller guarantees the ISA, and that the sources have the form's kinds.
    unsafe {
        let both = |ty: fn(u32) -> u32| (o.b32(at).map(ty), o.b32(at + 1).map(ty));
        match f.from {
            Ty::S32 => {
                let (a, b) = (o.b32(at).map(|x| x as i32), o.b32(at + 1).map(|x| x as i32));
                twice(compare_int::<I, i32>(f, &a, &b))
            }
            Ty::U32 | Ty::B32 => twice(compare_int::<I, u32>(f, o.b32(at), o.b32(at + 1))),
            Ty::U16 | Ty::B16 => {
                let (a, b) = both(|x| x & 0xffff);
                twice(compare_int::<I, u32>(f, &a, &b))
            }
            Ty::S16 => {
                let (a, b) = both(int::sext16);
                twice(compare_int::<I, i32>(f, &a.map(|x| x as i32), &b.map(|x| x as i32)))
            }
            Ty::U64 | Ty::B64 => twice(compare_int::<I, u64>(f, o.b64(at), o.b64(at + 1))),
            Ty::S64 => {
                let (a, b) = (o.b64(at).map(|x| x as i64), o.b64(at + 1).map(|x| x as i64));
                twice(compare_int::<I, i64>(f, &a, &b))
            }
            Ty::F64 => {
                let (a, b) = (o.b64(at).map(f64::from_bits), o.b64(at + 1).map(f64::from_bits));
                twice(compare_float::<I, f64>(f, &a, &b))
            }
            Ty::F16 | Ty::F16x2 => {
                let low = |x: &u32| half::f16_to_f32(half::flush_if(ftz, *x));
                let high = |x: &u32| half::f16_to_f32(half::flush_if(ftz, *x >> 16));
                let (a, b) = (o.b32(at), o.b32(at + 1));
                let t = compare_float::<I, f32>(f, &a.each_ref().map(low), &b.each_ref().map(low));
                if f.from == Ty::F16 {
                    return twice(t);
                }
                (t, compare_float::<I, f32>(f, &a.each_ref().map(high), &b.each_ref().map(high)))
            }
            Ty::Bf16 | Ty::Bf16x2 => {
                let low = |x: &u32| half::bf16_to_f32(*x & 0xffff);
                let high = |x: &u32| half::bf16_to_f32(*x >> 16);
                let (a, b) = (o.b32(at), o.b32(at + 1));
                let t = compare_float::<I, f32>(f, &a.each_ref().map(low), &b.each_ref().map(low));
                if f.from == Ty::Bf16 {
                    return twice(t);
                }
                (t, compare_float::<I, f32>(f, &a.each_ref().map(high), &b.each_ref().map(high)))
            }
            _ => {
                let value = |x: u32| f32::from_bits(float::flush_if(ftz, x));
                let (a, b) = (o.b32(at).map(value), o.b32(at + 1).map(value));
                twice(compare_float::<I, f32>(f, &a, &b))
            }
        }
    }
}

#[inline(always)]
fn combine(f: &Decoded, t: u32, with: impl Fn() -> u32) -> u32 {
    match f.bool_op {
        BoolOp::None => t,
        BoolOp::And => t & with(),
        BoolOp::Or => t | with(),
        BoolOp::Xor => t ^ with(),
    }
}

/// The end of every `setp`: p from the comparison, q from its complement (or, for pairs, from the upper half).
///
/// # Safety
/// As for [`Operands::b32`].
#[inline(always)]
unsafe fn put_setp(f: &Decoded, o: &Operands, (low, high): (u32, u32)) {
    let sources = f.destinations as usize;
    // SAFETY: the third source is a predicate where there is a Boolean operator.
    unsafe {
        let with = || o.pred(sources + 2);
        let pair = matches!(f.from, Ty::F16x2 | Ty::Bf16x2);
        let p = combine(f, low, with);
        let q = combine(f, if pair { high } else { !low }, with);
        o.put_pred(0, p);
        if f.destinations == 2 {
            o.put_pred(1, q);
        }
    }
}

/// Applies `f` to both halves of each word where the type is a pair, else to the low half.
#[inline(always)]
fn halves1(pair: bool, a: u32, f: impl Fn(u32) -> u32) -> u32 {
    let low = f(a & 0xffff) & 0xffff;
    if pair { low | f(a >> 16) << 16 } else { low }
}

#[inline(always)]
fn halves2(pair: bool, a: u32, b: u32, f: impl Fn(u32, u32) -> u32) -> u32 {
    let low = f(a & 0xffff, b & 0xffff) & 0xffff;
    if pair { low | f(a >> 16, b >> 16) << 16 } else { low }
}

#[inline(always)]
fn halves3(pair: bool, a: u32, b: u32, c: u32, f: impl Fn(u32, u32, u32) -> u32) -> u32 {
    let low = f(a & 0xffff, b & 0xffff, c & 0xffff) & 0xffff;
    if pair { low | f(a >> 16, b >> 16, c >> 16) << 16 } else { low }
}

fn is_pair(ty: Ty) -> bool {
    matches!(ty, Ty::F16x2 | Ty::Bf16x2 | Ty::U16x2 | Ty::S16x2)
}

fn is_bf16(ty: Ty) -> bool {
    matches!(ty, Ty::Bf16 | Ty::Bf16x2)
}

/// Arithmetic of halves: flush, `op`, flush, saturate, as the form's modifiers say.
#[inline(always)]
fn half_result<const BF: bool>(f: &Decoded, h: u32) -> u32 {
    let h = half::flush_if(f.has(flag::FTZ), h);
    if f.has(flag::SAT) {
        half::saturate::<BF>(h)
    } else if f.has(flag::RELU) {
        half::relu::<BF>(h)
    } else {
        h
    }
}

/// An integer type's values extended to 32 bits.
#[inline(always)]
fn extend32(ty: Ty, x: u32) -> u32 {
    match ty {
        Ty::U8 => x & 0xff,
        Ty::S8 => x as u8 as i8 as i32 as u32,
        Ty::U16 => x & 0xffff,
        Ty::S16 => int::sext16(x),
        _ => x,
    }
}

/// An extended value as its register holds it: the high bits of registers of 16 bits are zero.
#[inline(always)]
fn held(ty: Ty, x: u32) -> u32 {
    if ty.bits() <= 16 { x & 0xffff } else { x }
}

/// Any conversion of one value, from and to registers' bits. Signed results fill 64 bits.
fn convert(f: &Decoded, x: u64) -> u64 {
    use soft::{Format, Value};
    let x = if f.has(flag::FTZ) && f.from == Ty::F32 { float::flush(x as u32) as u64 } else { x };
    let value = match Format::of(f.from) {
        Some(format) => soft::unpack(format, x),
        None => {
            let bits = f.from.bits();
            let integer = if f.from.is_signed() {
                (x << (64 - bits)) as i64 as i128 >> (64 - bits)
            } else {
                (x & (u64::MAX >> (64 - bits))) as i128
            };
            Value::Finite { sign: integer < 0, significand: integer.unsigned_abs(), exponent: 0 }
        }
    };
    let Some(format) = Format::of(f.ty) else {
        if Format::of(f.from).is_some() {
            return soft::to_integer(value, f.ty.is_signed(), f.ty.bits(), f.round, f.from == Ty::F64);
        }
        // Between integers: only `.sat` comes here.
        return soft::to_integer(value, f.ty.is_signed(), f.ty.bits(), Round::Rz, false);
    };
    let value = if f.has(flag::INTEGRAL) { soft::to_integral(value, f.round) } else { value };
    let mut r = soft::pack(format, value, f.round);
    let top = 1u64 << (f.ty.bits().min(32) - 1);
    if f.has(flag::FTZ) && f.ty == Ty::F32 {
        r = float::flush(r as u32) as u64;
    }
    if f.has(flag::SATFINITE) {
        r = soft::limit_finite(format, r);
    }
    if f.has(flag::RELU) && value != Value::Nan && r & top != 0 {
        r = 0;
    }
    if f.has(flag::SAT) {
        let one = soft::pack(format, Value::Finite { sign: false, significand: 1, exponent: 0 }, Round::Rn);
        let sign = 1u64 << (f.ty.bits() - 1);
        // Patterns of non-negative numbers are ordered as integers are.
        r = if value == Value::Nan || r & sign != 0 { 0 } else { r.min(one) };
    }
    r
}

/// The code of one operation, for any instruction set.
trait Body {
    /// Executes one instruction.
    ///
    /// # Safety
    /// The operands have the kinds of the form that this operation belongs to; the processor supports `I`.
    unsafe fn run<I: Isa>(f: &Decoded, o: Operands);
}

/// Executes `count` instructions with the crate's own target features.
unsafe fn portable<B: Body>(f: &super::Form, registers: *mut u8, operands: *const u32, count: usize, mask: u32) {
    for i in 0..count {
        // SAFETY: the caller passes `count` times the form's operands; every processor supports Portable.
        unsafe {
            B::run::<Portable>(&f.detail.decoded, Operands { registers, at: operands.add(i * f.detail.operands), mask })
        }
    }
}

/// The same for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn avx2<B: Body>(f: &super::Form, registers: *mut u8, operands: *const u32, count: usize, mask: u32) {
    for i in 0..count {
        // SAFETY: the caller passes `count` times the form's operands, and runs on a processor with these features.
        unsafe {
            B::run::<Avx2>(&f.detail.decoded, Operands { registers, at: operands.add(i * f.detail.operands), mask })
        }
    }
}

/// The same for AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn avx512<B: Body>(f: &super::Form, registers: *mut u8, operands: *const u32, count: usize, mask: u32) {
    for i in 0..count {
        // SAFETY: the caller passes `count` times the form's operands, and runs on a processor with these features.
        unsafe {
            B::run::<Avx512>(&f.detail.decoded, Operands { registers, at: operands.add(i * f.detail.operands), mask })
        }
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! runs {
    (fast $name:ident) => {
        [portable::<$name>, avx2::<$name>, avx512::<$name>]
    };
    (slow $name:ident) => {
        [portable::<$name>; 3]
    };
}
#[cfg(not(target_arch = "x86_64"))]
macro_rules! runs {
    ($speed:ident $name:ident) => {
        [portable::<$name>; 3]
    };
}

/// One type per operation with its code, and the table of compiled functions. `slow` operations are compiled once, for
/// every processor: they are rare, or no instruction set speeds them up.
macro_rules! operations {
    ($($speed:ident $name:ident |$f:ident, $o:ident, $isa:ident| $body:expr;)*) => {
        $(
            struct $name;
            impl Body for $name {
                #[inline(always)]
                unsafe fn run<$isa: Isa>($f: &Decoded, $o: Operands) {
                    // SAFETY: guaranteed by the caller of `Body::run`.
                    unsafe { $body }
                }
            }
        )*

        /// The compiled functions of an operation: portable, AVX2, AVX-512.
        pub fn runs(op: Op) -> [Run; 3] {
            match op {
                $(Op::$name => runs!($speed $name),)*
            }
        }
    };
}

use flag::*;

operations! {
    fast FmaF32 |_f, o, I| o.map3(|a, b, c| float::fma::<false>(I::FMA, a, b, c));
    fast FmaF32Ftz |_f, o, I| o.map3(|a, b, c| float::fma::<true>(I::FMA, a, b, c));
    fast AddF32 |_f, o, I| o.map2(float::add::<false>);
    fast AddF32Ftz |_f, o, I| o.map2(float::add::<true>);
    fast SubF32 |_f, o, I| o.map2(float::sub::<false>);
    fast SubF32Ftz |_f, o, I| o.map2(float::sub::<true>);
    fast MulF32 |_f, o, I| o.map2(float::mul::<false>);
    fast MulF32Ftz |_f, o, I| o.map2(float::mul::<true>);
    fast DivF32 |_f, o, I| o.map2(|a, b| float::bits(f32::from_bits(a) / f32::from_bits(b)));
    fast MaxF32 |_f, o, I| o.map2(float::min_max::<true>);
    fast MinF32 |_f, o, I| o.map2(float::min_max::<false>);
    fast SqrtF32 |_f, o, I| o.map1(|a| float::bits(f32::from_bits(a).sqrt()));
    fast RcpF32 |_f, o, I| o.map1(|a| float::bits(1.0 / f32::from_bits(a)));
    fast Ex2F32 |_f, o, I| o.map1(approx::ex2::<false>);

    // A part of expf, as `cvt.sat.f32.f32` is.
    fast FmaF32Rm |_f, o, I| o.map3(|a, b, c| float::fma_any(a, b, c, Round::Rm));
    slow FmaF32Any |f, o, I| {
        let (ftz, sat) = (f.has(FTZ), f.has(SAT));
        o.each3(&|a, b, c| {
            let (a, b, c) = (float::flush_if(ftz, a), float::flush_if(ftz, b), float::flush_if(ftz, c));
            let r = float::flush_if(ftz, float::fma_any(a, b, c, f.round));
            if sat { float::saturate(r) } else { r }
        })
    };
    slow AddF32Any |f, o, I| {
        let (ftz, sat) = (f.has(FTZ), f.has(SAT));
        o.each2(&|a, b| {
            let (a, b) = (float::flush_if(ftz, a), float::flush_if(ftz, b));
            let r = float::flush_if(ftz, float::fma_any(a, 1f32.to_bits(), b, f.round));
            if sat { float::saturate(r) } else { r }
        })
    };
    slow SubF32Any |f, o, I| {
        let (ftz, sat) = (f.has(FTZ), f.has(SAT));
        o.each2(&|a, b| {
            let (a, b) = (float::flush_if(ftz, a), float::flush_if(ftz, b));
            let r = float::flush_if(ftz, float::fma_any(a, 1f32.to_bits(), b ^ 0x8000_0000, f.round));
            if sat { float::saturate(r) } else { r }
        })
    };
    slow MulF32Any |f, o, I| {
        let (ftz, sat) = (f.has(FTZ), f.has(SAT));
        o.each2(&|a, b| {
            let (a, b) = (float::flush_if(ftz, a), float::flush_if(ftz, b));
            let r = float::flush_if(ftz, float::mul_any(a, b, f.round));
            if sat { float::saturate(r) } else { r }
        })
    };
    slow DivF32Any |f, o, I| {
        let ftz = f.has(FTZ);
        o.each2(&|a, b| float::flush_if(ftz, float::div_any(float::flush_if(ftz, a), float::flush_if(ftz, b), f.round)))
    };
    slow RcpF32Any |f, o, I| {
        let ftz = f.has(FTZ);
        o.each1(&|a| float::flush_if(ftz, float::div_any(1f32.to_bits(), float::flush_if(ftz, a), f.round)))
    };
    slow SqrtF32Any |f, o, I| {
        let ftz = f.has(FTZ);
        o.each1(&|a| float::flush_if(ftz, float::sqrt_any(float::flush_if(ftz, a), f.round)))
    };
    fast MinMaxF32Any |f, o, I| {
        let (max, ftz, nan, xorsign) = (f.has(MAX), f.has(FTZ), f.has(NAN), f.has(XORSIGN));
        o.map2(|a, b| float::min_max_any(a, b, max, ftz, nan, xorsign))
    };
    fast NegF32 |f, o, I| {
        let ftz = f.has(FTZ);
        o.map1(|a| float::flush_if(ftz, a) ^ 0x8000_0000)
    };
    fast AbsF32 |f, o, I| {
        let ftz = f.has(FTZ);
        o.map1(|a| float::flush_if(ftz, a) & 0x7fff_ffff)
    };
    fast DivF32Approx |f, o, I| {
        let (full, ftz) = (f.mode == 1, f.has(FTZ));
        o.map2(|a, b| approx::div(full, ftz, a, b))
    };
    fast RcpF32Approx |f, o, I| {
        let ftz = f.has(FTZ);
        o.map1(|a| approx::rcp(ftz, a))
    };
    fast SqrtF32Approx |f, o, I| {
        let ftz = f.has(FTZ);
        o.map1(|a| approx::sqrt(ftz, a))
    };
    fast RsqrtF32 |f, o, I| {
        let ftz = f.has(FTZ);
        o.map1(|a| approx::rsqrt(ftz, a))
    };
    fast Lg2F32 |f, o, I| {
        let ftz = f.has(FTZ);
        o.map1(|a| approx::lg2(ftz, a))
    };
    fast SinF32 |f, o, I| sin_or_cos(f, o, 0);
    fast CosF32 |f, o, I| sin_or_cos(f, o, 1);
    fast TanhF32 |_f, o, I| o.map1(approx::tanh);
    fast Ex2F32Any |_f, o, I| o.map1(approx::ex2::<true>);
    fast CopysignF32 |_f, o, I| o.map2(|a, b| (a & 0x8000_0000) | (b & 0x7fff_ffff));
    slow TestpF32 |f, o, I| {
        let a = o.b32(1);
        let t = which::<I, u32>(a, a, |a, _| float::test(f.mode, a as u64, 23, 0xff));
        o.put_pred(0, t)
    };

    fast FmaF64 |_f, o, I| o.wide3(|a, b, c| f64::from_bits(a).mul_add(f64::from_bits(b), f64::from_bits(c)).to_bits());
    fast AddF64 |_f, o, I| o.wide2(|a, b| (f64::from_bits(a) + f64::from_bits(b)).to_bits());
    fast SubF64 |_f, o, I| o.wide2(|a, b| (f64::from_bits(a) - f64::from_bits(b)).to_bits());
    fast MulF64 |_f, o, I| o.wide2(|a, b| (f64::from_bits(a) * f64::from_bits(b)).to_bits());
    fast DivF64 |_f, o, I| o.wide2(|a, b| (f64::from_bits(a) / f64::from_bits(b)).to_bits());
    slow FmaF64Any |f, o, I| o.each_wide3(&|a, b, c| soft::fma_f64(a, b, c, f.round));
    slow AddF64Any |f, o, I| o.each_wide2(&|a, b| soft::fma_f64(a, 1f64.to_bits(), b, f.round));
    slow SubF64Any |f, o, I| o.each_wide2(&|a, b| soft::fma_f64(a, 1f64.to_bits(), b ^ 1 << 63, f.round));
    slow MulF64Any |f, o, I| o.each_wide2(&|a, b| soft::mul_f64(a, b, f.round));
    slow DivF64Any |f, o, I| o.each_wide2(&|a, b| soft::div_f64(a, b, f.round));
    slow RcpF64 |f, o, I| o.each_wide1(&|a| if f.round == Round::Rn {
        (1.0 / f64::from_bits(a)).to_bits()
    } else {
        soft::div_f64(1f64.to_bits(), a, f.round)
    });
    slow SqrtF64 |f, o, I| o.each_wide1(&|a| if f.round == Round::Rn {
        f64::from_bits(a).sqrt().to_bits()
    } else {
        soft::sqrt_f64(a, f.round)
    });
    slow RcpF64Approx |_f, o, I| o.each_wide1(&approx::rcp_f64);
    slow RsqrtF64 |f, o, I| {
        o.each_wide1(&|a| if f.has(FTZ) { approx::rsqrt_f64_upper(a) } else { approx::rsqrt_f64(a) })
    };
    slow MinF64 |_f, o, I| o.each_wide2(&float::min_max_f64::<false>);
    slow MaxF64 |_f, o, I| o.each_wide2(&float::min_max_f64::<true>);
    fast NegF64 |_f, o, I| o.wide1(|a| a ^ 1 << 63);
    fast AbsF64 |_f, o, I| o.wide1(|a| a & !(1 << 63));
    slow CopysignF64 |_f, o, I| o.each_wide2(&|a, b| (a & 1 << 63) | (b & !(1 << 63)));
    slow TestpF64 |f, o, I| {
        let a = o.b64(1);
        let t = which::<I, u64>(a, a, |a, _| float::test(f.mode, a, 52, 0x7ff));
        o.put_pred(0, t)
    };

    fast FmaHalf |f, o, I| {
        let pair = is_pair(f.ty);
        let ftz = f.has(FTZ);
        if is_bf16(f.ty) {
            o.map3(|a, b, c| halves3(pair, a, b, c, |a, b, c| half_result::<true>(f, half::fma::<true>(a, b, c))))
        } else {
            o.map3(|a, b, c| halves3(pair, a, b, c, |a, b, c| {
                let (a, b, c) = (half::flush_if(ftz, a), half::flush_if(ftz, b), half::flush_if(ftz, c));
                half_result::<false>(f, half::fma::<false>(a, b, c))
            }))
        }
    };
    fast AddHalf |f, o, I| half_sum(f, o, 0);
    fast SubHalf |f, o, I| half_sum(f, o, 0x8000);
    fast MulHalf |f, o, I| {
        let pair = is_pair(f.ty);
        let ftz = f.has(FTZ);
        if is_bf16(f.ty) {
            o.map2(|a, b| halves2(pair, a, b, |a, b| half_result::<true>(f, half::mul::<true>(a, b))))
        } else {
            o.map2(|a, b| halves2(pair, a, b, |a, b| {
                half_result::<false>(f, half::mul::<false>(half::flush_if(ftz, a), half::flush_if(ftz, b)))
            }))
        }
    };
    slow MinMaxHalf |f, o, I| {
        let pair = is_pair(f.ty);
        let (max, ftz, nan, xorsign) = (f.has(MAX), f.has(FTZ), f.has(NAN), f.has(XORSIGN));
        if is_bf16(f.ty) {
            o.each2(&|a, b| halves2(pair, a, b, |a, b| half::min_max::<true>(a, b, max, ftz, nan, xorsign)))
        } else {
            o.each2(&|a, b| halves2(pair, a, b, |a, b| half::min_max::<false>(a, b, max, ftz, nan, xorsign)))
        }
    };
    slow NegHalf |f, o, I| {
        let (pair, ftz) = (is_pair(f.ty), f.has(FTZ));
        o.each1(&|a| halves1(pair, a, |a| half::flush_if(ftz, a) ^ 0x8000))
    };
    slow AbsHalf |f, o, I| {
        let (pair, ftz) = (is_pair(f.ty), f.has(FTZ));
        o.each1(&|a| halves1(pair, a, |a| half::flush_if(ftz, a) & 0x7fff))
    };
    slow Ex2Half |f, o, I| {
        let (pair, bf, ftz) = (is_pair(f.ty), is_bf16(f.ty), f.has(FTZ));
        o.each1(&|a| halves1(pair, a, |a| if bf {
            let x = if ftz { float::flush(a << 16) } else { a << 16 };
            let r = half::bf16_from_f32(f32::from_bits(approx::ex2::<false>(x)));
            if ftz { float::flush(r << 16) >> 16 } else { r }
        } else {
            let x = half::f16_to_f32(half::flush_if(ftz, a)).to_bits();
            let r = half::f16_from_f32(f32::from_bits(approx::ex2::<false>(x)));
            half::flush_if(ftz, r)
        }))
    };
    slow TanhHalf |f, o, I| {
        let (pair, bf) = (is_pair(f.ty), is_bf16(f.ty));
        o.each1(&|a| halves1(pair, a, |a| if bf {
            half::bf16_from_f32(f32::from_bits(approx::tanh(a << 16)))
        } else {
            half::f16_from_f32(f32::from_bits(approx::tanh(half::f16_to_f32(a).to_bits())))
        }))
    };

    fast AddB32 |_f, o, I| o.map2(u32::wrapping_add);
    fast SubB32 |_f, o, I| o.map2(u32::wrapping_sub);
    fast MulB32 |_f, o, I| o.map2(u32::wrapping_mul);
    fast MadB32 |_f, o, I| o.map3(|a, b, c| a.wrapping_mul(b).wrapping_add(c));
    slow AddSatS32 |_f, o, I| o.each2(&|a, b| (a as i32).saturating_add(b as i32) as u32);
    slow SubSatS32 |_f, o, I| o.each2(&|a, b| (a as i32).saturating_sub(b as i32) as u32);
    fast MulHiU32 |_f, o, I| o.map2(int::mul_hi_u32);
    fast MulHiS32 |_f, o, I| o.map2(int::mul_hi_s32);
    slow MadHiU32 |_f, o, I| o.each3(&|a, b, c| int::mul_hi_u32(a, b).wrapping_add(c));
    slow MadHiS32 |_f, o, I| o.each3(&|a, b, c| int::mul_hi_s32(a, b).wrapping_add(c));
    slow MadHiSatS32 |_f, o, I| o.each3(&|a, b, c| (int::mul_hi_s32(a, b) as i32).saturating_add(c as i32) as u32);
    fast MulWideU32 |_f, o, I| {
        let (a, b) = (o.b32(1), o.b32(2));
        let mut r = [0; 32];
        for i in 0..32 {
            r[i] = a[i] as u64 * b[i] as u64;
        }
        o.put64(0, &r)
    };
    fast MulWideS32 |_f, o, I| {
        let (a, b) = (o.b32(1), o.b32(2));
        let mut r = [0; 32];
        for i in 0..32 {
            r[i] = (a[i] as i32 as i64).wrapping_mul(b[i] as i32 as i64) as u64;
        }
        o.put64(0, &r)
    };
    fast MadWideU32 |_f, o, I| {
        let (a, b, c) = (o.b32(1), o.b32(2), o.b64(3));
        let mut r = [0; 32];
        for i in 0..32 {
            r[i] = (a[i] as u64 * b[i] as u64).wrapping_add(c[i]);
        }
        o.put64(0, &r)
    };
    fast MadWideS32 |_f, o, I| {
        let (a, b, c) = (o.b32(1), o.b32(2), o.b64(3));
        let mut r = [0; 32];
        for i in 0..32 {
            r[i] = ((a[i] as i32 as i64).wrapping_mul(b[i] as i32 as i64) as u64).wrapping_add(c[i]);
        }
        o.put64(0, &r)
    };
    slow Mul24 |f, o, I| {
        let (signed, shift) = (f.has(A_SIGNED), if f.has(HI) { 16 } else { 0 });
        o.each2(&|a, b| (int::mul24(signed, a, b) >> shift) as u32)
    };
    slow Mad24 |f, o, I| {
        let (signed, shift) = (f.has(A_SIGNED), if f.has(HI) { 16 } else { 0 });
        o.each3(&|a, b, c| {
            let product = (int::mul24(signed, a, b) >> shift) as u32;
            if f.has(SAT) { (product as i32).saturating_add(c as i32) as u32 } else { product.wrapping_add(c) }
        })
    };
    slow DivU32 |_f, o, I| o.each2(&int::div_u32);
    slow DivS32 |_f, o, I| o.each2(&int::div_s32);
    slow RemU32 |_f, o, I| o.each2(&int::rem_u32);
    slow RemS32 |_f, o, I| o.each2(&int::rem_s32);
    fast MinU32 |_f, o, I| o.map2(u32::min);
    fast MaxU32 |_f, o, I| o.map2(u32::max);
    fast MinS32 |f, o, I| {
        let floor = if f.has(RELU) { 0 } else { i32::MIN };
        o.map2(|a, b| (a as i32).min(b as i32).max(floor) as u32)
    };
    fast MaxS32 |f, o, I| {
        let floor = if f.has(RELU) { 0 } else { i32::MIN };
        o.map2(|a, b| (a as i32).max(b as i32).max(floor) as u32)
    };
    fast AbsS32 |_f, o, I| o.map1(|a| (a as i32).wrapping_abs() as u32);
    fast NegB32 |_f, o, I| o.map1(u32::wrapping_neg);
    slow SadU32 |_f, o, I| o.each3(&|a, b, c| c.wrapping_add(a.abs_diff(b)));
    slow SadS32 |_f, o, I| o.each3(&|a, b, c| c.wrapping_add((a as i32).abs_diff(b as i32)));
    fast AndB32 |_f, o, I| o.map2(|a, b| a & b);
    fast OrB32 |_f, o, I| o.map2(|a, b| a | b);
    fast XorB32 |_f, o, I| o.map2(|a, b| a ^ b);
    fast NotB32 |_f, o, I| o.map1(|a| !a);
    slow CnotB32 |_f, o, I| o.each1(&|a| (a == 0) as u32);
    fast ShlB32 |_f, o, I| o.map2(int::shl_32);
    fast ShrB32 |_f, o, I| o.map2(int::shr_32);
    fast ShrS32 |_f, o, I| o.map2(int::shr_s32);
    fast ShfL |f, o, I| {
        let wrap = f.has(WRAP);
        o.map3(|a, b, c| int::shf_l(wrap, a, b, c))
    };
    fast ShfR |f, o, I| {
        let wrap = f.has(WRAP);
        o.map3(|a, b, c| int::shf_r(wrap, a, b, c))
    };
    fast Lop3 |_f, o, I| {
        // The table is an immediate: the same in all lanes.
        let table = o.b32(4)[0];
        o.map3(|a, b, c| int::lop3(a, b, c, table))
    };
    fast Lop3Bool |f, o, I| {
        let (a, b, c, table) = (o.b32(2), o.b32(3), o.b32(4), o.b32(5)[0]);
        let mut r = [0; 32];
        for i in 0..32 {
            r[i] = int::lop3(a[i], b[i], c[i], table);
        }
        let p = combine(f, which::<I, u32>(&r, &[0; 32], |r, _| r != 0), || o.pred(6));
        o.put32(0, &r);
        o.put_pred(1, p)
    };
    fast Prmt |f, o, I| o.map3(|a, b, c| int::prmt(f.mode, a, b, c));
    slow BfeU32 |_f, o, I| o.each3(&|a, b, c| int::bfe(false, 32, a as u64, b, c) as u32);
    slow BfeS32 |_f, o, I| o.each3(&|a, b, c| int::bfe(true, 32, a as u64, b, c) as u32);
    slow BfiB32 |_f, o, I| o.each4(&|a, b, c, d| int::bfi(32, a as u64, b as u64, c, d) as u32);
    slow BrevB32 |_f, o, I| o.each1(&u32::reverse_bits);
    fast PopcB32 |_f, o, I| o.map1(u32::count_ones);
    fast ClzB32 |_f, o, I| o.map1(u32::leading_zeros);
    slow Bfind32 |f, o, I| o.each1(&|a| int::bfind(f.has(A_SIGNED), f.has(SHIFTAMT), 32, a as u64));
    slow Fns |_f, o, I| o.each3(&|a, b, c| int::fns(a, b, c as i32));
    slow Szext |f, o, I| o.each2(&|a, b| int::szext(f.ty == Ty::S32, f.has(WRAP), a, b));
    slow Bmsk |f, o, I| o.each2(&|a, b| int::bmsk(f.has(WRAP), a, b));
    fast Dp4a |f, o, I| match (f.has(A_SIGNED), f.has(B_SIGNED)) {
        (true, true) => o.map3(|a, b, c| int::dp4a(true, true, a, b, c)),
        (false, false) => o.map3(|a, b, c| int::dp4a(false, false, a, b, c)),
        (a_signed, b_signed) => o.map3(|a, b, c| int::dp4a(a_signed, b_signed, a, b, c)),
    };
    slow Dp2a |f, o, I| o.each3(&|a, b, c| int::dp2a(f.has(A_SIGNED), f.has(B_SIGNED), f.has(HI), a, b, c));
    slow Video |f, o, I| o.each3(&|a, b, c| int::video(f, a, b, c));
    slow AddCarry32 |f, o, I| carry32(f, o, |a, b, _| a + b, 2);
    slow SubCarry32 |f, o, I| carry32(f, o, |a, b, _| a + (b ^ 0xffff_ffff), 2);
    slow MadCarry32 |f, o, I| {
        let signed = f.ty == Ty::S32;
        let hi = f.has(HI);
        carry32(f, o, |a, b, c| {
            let low = (a as u32).wrapping_mul(b as u32);
            let high = if signed { int::mul_hi_s32(a as u32, b as u32) } else { int::mul_hi_u32(a as u32, b as u32) };
            (if hi { high } else { low }) as u64 + c
        }, 3)
    };

    fast AddB64 |_f, o, I| o.wide2(u64::wrapping_add);
    fast SubB64 |_f, o, I| o.wide2(u64::wrapping_sub);
    fast MulB64 |_f, o, I| o.wide2(u64::wrapping_mul);
    slow MadB64 |_f, o, I| o.each_wide3(&|a, b, c| a.wrapping_mul(b).wrapping_add(c));
    slow MulHi64 |f, o, I| o.each_wide2(&|a, b| int::mul_hi_64(f.ty == Ty::S64, a, b));
    slow MadHi64 |f, o, I| o.each_wide3(&|a, b, c| int::mul_hi_64(f.ty == Ty::S64, a, b).wrapping_add(c));
    slow DivU64 |_f, o, I| o.each_wide2(&int::div_u64);
    slow DivS64 |_f, o, I| o.each_wide2(&int::div_s64);
    slow RemU64 |_f, o, I| o.each_wide2(&int::rem_u64);
    slow RemS64 |_f, o, I| o.each_wide2(&int::rem_s64);
    slow MinU64 |_f, o, I| o.each_wide2(&u64::min);
    slow MaxU64 |_f, o, I| o.each_wide2(&u64::max);
    slow MinS64 |_f, o, I| o.each_wide2(&|a, b| (a as i64).min(b as i64) as u64);
    slow MaxS64 |_f, o, I| o.each_wide2(&|a, b| (a as i64).max(b as i64) as u64);
    slow AbsS64 |_f, o, I| o.each_wide1(&|a| (a as i64).wrapping_abs() as u64);
    fast NegB64 |_f, o, I| o.wide1(u64::wrapping_neg);
    slow SadU64 |_f, o, I| o.each_wide3(&|a, b, c| c.wrapping_add(a.abs_diff(b)));
    slow SadS64 |_f, o, I| o.each_wide3(&|a, b, c| c.wrapping_add((a as i64).abs_diff(b as i64)));
    fast AndB64 |_f, o, I| o.wide2(|a, b| a & b);
    fast OrB64 |_f, o, I| o.wide2(|a, b| a | b);
    fast XorB64 |_f, o, I| o.wide2(|a, b| a ^ b);
    fast NotB64 |_f, o, I| o.wide1(|a| !a);
    slow CnotB64 |_f, o, I| o.each_wide1(&|a| (a == 0) as u64);
    fast ShlB64 |_f, o, I| o.wide_by(int::shl_64);
    fast ShrB64 |_f, o, I| o.wide_by(int::shr_64);
    fast ShrS64 |_f, o, I| o.wide_by(int::shr_s64);
    slow BfeU64 |_f, o, I| bfe_64(o, false);
    slow BfeS64 |_f, o, I| bfe_64(o, true);
    slow BfiB64 |_f, o, I| {
        let (a, b, c, d) = (o.b64(1), o.b64(2), o.b32(3), o.b32(4));
        let mut r = [0; 32];
        for i in 0..32 {
            r[i] = int::bfi(64, a[i], b[i], c[i], d[i]);
        }
        o.put64(0, &r)
    };
    slow BrevB64 |_f, o, I| o.each_wide1(&u64::reverse_bits);
    slow PopcB64 |_f, o, I| o.each_narrow1(&u64::count_ones);
    slow ClzB64 |_f, o, I| o.each_narrow1(&u64::leading_zeros);
    slow Bfind64 |f, o, I| o.each_narrow1(&|a| int::bfind(f.has(A_SIGNED), f.has(SHIFTAMT), 64, a));
    slow AddCarry64 |f, o, I| carry64(f, o, |a, b, _| a as u128 + b as u128, 2);
    slow SubCarry64 |f, o, I| carry64(f, o, |a, b, _| a as u128 + !b as u128, 2);
    slow MadCarry64 |f, o, I| {
        let signed = f.ty == Ty::S64;
        let hi = f.has(HI);
        carry64(f, o, |a, b, c| {
            let part = if hi { int::mul_hi_64(signed, a, b) } else { a.wrapping_mul(b) };
            part as u128 + c as u128
        }, 3)
    };

    fast AddB16 |_f, o, I| o.map2(|a, b| a.wrapping_add(b) & 0xffff);
    slow SubB16 |_f, o, I| o.each2(&|a, b| a.wrapping_sub(b) & 0xffff);
    slow MulB16 |_f, o, I| o.each2(&|a, b| a.wrapping_mul(b) & 0xffff);
    slow MadB16 |_f, o, I| o.each3(&|a, b, c| a.wrapping_mul(b).wrapping_add(c) & 0xffff);
    slow MulHi16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each2(&|a, b| int::ext16(signed, a).wrapping_mul(int::ext16(signed, b)) >> 16)
    };
    slow MadHi16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each3(&|a, b, c| (int::ext16(signed, a).wrapping_mul(int::ext16(signed, b)) >> 16).wrapping_add(c) & 0xffff)
    };
    slow MulWide16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each2(&|a, b| int::ext16(signed, a).wrapping_mul(int::ext16(signed, b)))
    };
    slow MadWide16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each3(&|a, b, c| int::ext16(signed, a).wrapping_mul(int::ext16(signed, b)).wrapping_add(c))
    };
    slow Div16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each2(&|a, b| {
            let (a, b) = (int::ext16(signed, a), int::ext16(signed, b));
            (if signed { int::div_s32(a, b) } else { int::div_u32(a, b) }) & 0xffff
        })
    };
    slow Rem16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each2(&|a, b| {
            let (a, b) = (int::ext16(signed, a), int::ext16(signed, b));
            (if signed { int::rem_s32(a, b) } else { int::rem_u32(a, b) }) & 0xffff
        })
    };
    slow Min16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each2(&|a, b| ((int::ext16(signed, a) as i32).min(int::ext16(signed, b) as i32) & 0xffff) as u32)
    };
    slow Max16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each2(&|a, b| ((int::ext16(signed, a) as i32).max(int::ext16(signed, b) as i32) & 0xffff) as u32)
    };
    slow AbsS16 |_f, o, I| o.each1(&|a| (int::sext16(a) as i32).wrapping_abs() as u32 & 0xffff);
    slow NegB16 |_f, o, I| o.each1(&|a| a.wrapping_neg() & 0xffff);
    slow Sad16 |f, o, I| {
        let signed = f.ty.is_signed();
        o.each3(&|a, b, c| {
            let difference = (int::ext16(signed, a) as i32).abs_diff(int::ext16(signed, b) as i32);
            c.wrapping_add(difference) & 0xffff
        })
    };
    fast AndB16 |_f, o, I| o.map2(|a, b| a & b & 0xffff);
    fast OrB16 |_f, o, I| o.map2(|a, b| (a | b) & 0xffff);
    slow XorB16 |_f, o, I| o.each2(&|a, b| (a ^ b) & 0xffff);
    slow NotB16 |_f, o, I| o.each1(&|a| !a & 0xffff);
    slow CnotB16 |_f, o, I| o.each1(&|a| (a & 0xffff == 0) as u32);
    slow ShlB16 |_f, o, I| o.each2(&|a, n| int::shl_32(a, n) & 0xffff);
    slow ShrB16 |_f, o, I| o.each2(&|a, n| int::shr_32(a & 0xffff, n));
    slow ShrS16 |_f, o, I| o.each2(&|a, n| int::shr_s32(int::sext16(a), n) & 0xffff);
    slow Add16x2 |_f, o, I| o.each2(&|a, b| halves2(true, a, b, u32::wrapping_add));
    slow MinMax16x2 |f, o, I| {
        let (signed, max, relu) = (f.ty.is_signed(), f.has(MAX), f.has(RELU));
        o.each2(&|a, b| halves2(true, a, b, |a, b| {
            let (a, b) = (int::ext16(signed, a) as i32, int::ext16(signed, b) as i32);
            let r = if max { a.max(b) } else { a.min(b) };
            (if relu { r.max(0) } else { r }) as u32 & 0xffff
        }))
    };

    fast AndPred |_f, o, I| o.put_pred(0, o.pred(1) & o.pred(2));
    fast OrPred |_f, o, I| o.put_pred(0, o.pred(1) | o.pred(2));
    fast XorPred |_f, o, I| o.put_pred(0, o.pred(1) ^ o.pred(2));
    fast NotPred |_f, o, I| o.put_pred(0, !o.pred(1));

    fast SetpI32 |f, o, I| {
        let at = f.destinations as usize;
        let (a, b) = (o.b32(at).map(|x| x as i32), o.b32(at + 1).map(|x| x as i32));
        let t = compare_int::<I, i32>(f, &a, &b);
        put_setp(f, &o, (t, t))
    };
    fast SetpU32 |f, o, I| {
        let at = f.destinations as usize;
        let t = compare_int::<I, u32>(f, o.b32(at), o.b32(at + 1));
        put_setp(f, &o, (t, t))
    };
    fast SetpF32 |f, o, I| {
        let at = f.destinations as usize;
        let ftz = f.has(FTZ);
        let value = |x: u32| f32::from_bits(float::flush_if(ftz, x));
        let t = compare_float::<I, f32>(f, &o.b32(at).map(value), &o.b32(at + 1).map(value));
        put_setp(f, &o, (t, t))
    };
    fast SetpOther |f, o, I| put_setp(f, &o, compare_any::<I>(f, &o, f.destinations as usize));
    slow SetOther |f, o, I| {
        let (low, high) = compare_any::<I>(f, &o, 1);
        let (low, high) = (combine(f, low, || o.pred(3)), combine(f, high, || o.pred(3)));
        let pair = is_pair(f.from);
        let yes = match f.ty {
            Ty::F32 => 0x3f80_0000,
            Ty::F16 | Ty::F16x2 => 0x3c00,
            Ty::Bf16 | Ty::Bf16x2 => 0x3f80,
            Ty::U16 | Ty::S16 => 0xffff,
            _ if pair => 0xffff,
            _ => u32::MAX,
        };
        let mut r = [0; 32];
        for i in 0..32 {
            let low = if low & 1 << i != 0 { yes } else { 0 };
            let high = if pair && high & 1 << i != 0 { yes << 16 } else { 0 };
            r[i] = low | high;
        }
        o.put32(0, &r)
    };
    fast Selp32 |f, o, I| {
        let (a, c) = (o.b32(1), o.pred(3));
        let keep = if f.ty.bits() == 16 { 0xffff } else { u32::MAX };
        let mut r = *o.b32(2);
        blend32(&mut r, a, c);
        for i in 0..32 {
            r[i] &= keep;
        }
        o.put32(0, &r)
    };
    fast Selp64 |_f, o, I| {
        let (a, c) = (o.b64(1), o.pred(3));
        let mut r = *o.b64(2);
        blend64(&mut r, a, c);
        o.put64(0, &r)
    };
    slow Slct32 |f, o, I| {
        let keep = if f.ty.bits() == 16 { 0xffff } else { u32::MAX };
        o.each3(&|a, b, c| (if slct_first(f, c) { a } else { b }) & keep)
    };
    slow Slct64 |f, o, I| {
        let (a, b, c) = (o.b64(1), o.b64(2), o.b32(3));
        let mut r = [0; 32];
        for i in 0..32 {
            r[i] = if slct_first(f, c[i]) { a[i] } else { b[i] };
        }
        o.put64(0, &r)
    };

    fast CvtInt32 |f, o, I| {
        // The narrower of the two types decides, and of two of one width the destination's.
        let (to, from) = (f.ty, if f.ty.bits() <= f.from.bits() { f.ty } else { f.from });
        match from {
            Ty::U8 => o.map1(|a| extend32(Ty::U8, a)),
            Ty::S8 => o.map1(|a| held(to, extend32(Ty::S8, a))),
            Ty::U16 => o.map1(|a| extend32(Ty::U16, a)),
            Ty::S16 => o.map1(|a| held(to, extend32(Ty::S16, a))),
            _ => o.map1(|a| a),
        }
    };
    fast CvtInt32To64 |f, o, I| match f.from {
        Ty::S32 => o.widen1(|a| a as i32 as i64 as u64),
        Ty::U32 => o.widen1(|a| a as u64),
        from if from.is_signed() => o.widen1(|a| extend32(from, a) as i32 as i64 as u64),
        from => o.widen1(|a| extend32(from, a) as u64),
    };
    fast CvtInt64To32 |f, o, I| {
        let ty = f.ty;
        o.narrow1(|a| held(ty, extend32(ty, a as u32)))
    };
    fast CvtInt64 |_f, o, I| o.wide1(|a| a);
    fast CvtF32S32 |_f, o, I| o.map1(|a| (a as i32 as f32).to_bits());
    fast CvtF32U32 |_f, o, I| o.map1(|a| (a as f32).to_bits());
    // Rust's conversion is PTX's: toward zero, limited to the type's range, zero for NaN.
    fast CvtS32F32 |_f, o, I| o.map1(|a| f32::from_bits(a) as i32 as u32);
    fast CvtU32F32 |_f, o, I| o.map1(|a| f32::from_bits(a) as u32);
    fast CvtF32F16 |_f, o, I| o.map1(|a| float::bits(half::f16_to_f32(a & 0xffff)));
    fast CvtF32Bf16 |_f, o, I| o.map1(|a| float::bits(half::bf16_to_f32(a & 0xffff)));
    fast CvtF16F32 |_f, o, I| o.map1(|a| half::f16_from_f32(f32::from_bits(a)));
    fast CvtBf16F32 |_f, o, I| o.map1(|a| half::bf16_from_f32(f32::from_bits(a)));
    fast CvtF16x2F32 |_f, o, I| o.map2(|a, b| {
        half::f16_from_f32(f32::from_bits(a)) << 16 | half::f16_from_f32(f32::from_bits(b))
    });
    fast CvtBf16x2F32 |_f, o, I| o.map2(|a, b| {
        half::bf16_from_f32(f32::from_bits(a)) << 16 | half::bf16_from_f32(f32::from_bits(b))
    });
    fast CvtF64F32 |_f, o, I| o.widen1(|a| {
        let x = f32::from_bits(a);
        if x.is_nan() { soft::NAN_F64 } else { (x as f64).to_bits() }
    });
    fast CvtF32F64 |_f, o, I| o.narrow1(|a| float::bits(f64::from_bits(a) as f32));
    fast CvtRoundF32 |f, o, I| match f.round {
        Round::Rn | Round::Rna => o.map1(|a| float::bits(f32::from_bits(a).round_ties_even())),
        Round::Rz => o.map1(|a| float::bits(f32::from_bits(a).trunc())),
        Round::Rm => o.map1(|a| float::bits(f32::from_bits(a).floor())),
        Round::Rp => o.map1(|a| float::bits(f32::from_bits(a).ceil())),
    };
    fast CvtSatF32 |_f, o, I| o.map1(float::saturate);
    slow Cvt |f, o, I| {
        let r = o.any(1, f.from).map(|x| convert(f, x));
        o.put_any(0, f.ty, &r)
    };
    slow CvtPair |f, o, I| {
        let one = Decoded { ty: if is_bf16(f.ty) { Ty::Bf16 } else { Ty::F16 }, ..*f };
        o.each2(&|a, b| (convert(&one, a as u64) as u32) << 16 | convert(&one, b as u64) as u32)
    };
    slow CvtPack |f, o, I| {
        let (min, max) = soft::integer_range(f.ty.is_signed(), f.ty.bits());
        let bits = f.ty.bits();
        let keep = (1u32 << bits) - 1;
        let limit = |x: u32| (x as i32 as i128).clamp(min, max) as u32 & keep;
        if bits == 16 {
            o.each2(&|a, b| limit(a) << 16 | limit(b))
        } else {
            o.each3(&|a, b, c| c << 16 | limit(a) << 8 | limit(b))
        }
    };
}

/// Sine or cosine, with the slow way for arguments far out.
#[inline(always)]
unsafe fn sin_or_cos(f: &Decoded, o: Operands, quarter: u64) {
    let ftz = f.has(FTZ);
    // SAFETY: both forms have one 32-bit source and destination.
    unsafe {
        let a = o.b32(1);
        let mut r = [0; 32];
        let mut far = 0;
        for i in 0..32 {
            r[i] = approx::sin(ftz, quarter, a[i]);
            far |= approx::sin_is_far(a[i]) as u32;
        }
        if far != 0 {
            for i in 0..32 {
                if approx::sin_is_far(a[i]) {
                    r[i] = approx::sin_far(quarter, a[i]);
                }
            }
        }
        o.put32(0, &r);
    }
}

/// Sum of halves, or difference: `flip` turns the second operand's sign.
#[inline(always)]
unsafe fn half_sum(f: &Decoded, o: Operands, flip: u32) {
    let pair = is_pair(f.ty);
    let ftz = f.has(FTZ);
    // SAFETY: the forms have two 32-bit sources and one destination.
    unsafe {
        if is_bf16(f.ty) {
            o.map2(|a, b| halves2(pair, a, b, |a, b| half_result::<true>(f, half::add::<true>(a, b ^ flip))))
        } else {
            o.map2(|a, b| {
                halves2(pair, a, b, |a, b| {
                    half_result::<false>(f, half::add::<false>(half::flush_if(ftz, a), half::flush_if(ftz, b) ^ flip))
                })
            })
        }
    }
}

/// 64-bit `bfe`.
unsafe fn bfe_64(o: Operands, signed: bool) {
    // SAFETY: the form has a 64-bit source and two 32-bit ones.
    unsafe {
        let (a, b, c) = (o.b64(1), o.b32(2), o.b32(3));
        let mut r = [0; 32];
        for i in 0..32 {
            r[i] = int::bfe(signed, 64, a[i], b[i], c[i]);
        }
        o.put64(0, &r);
    }
}

/// Whether `slct` takes its first operand: c >= 0, false for NaN.
fn slct_first(f: &Decoded, c: u32) -> bool {
    if f.from == Ty::S32 { c as i32 >= 0 } else { f32::from_bits(float::flush_if(f.has(FTZ), c)) >= 0.0 }
}

/// Arithmetic with the carry flag: `g` returns the sum without the flag, which has 33 bits.
///
/// The flag is the adder's carry in subtractions too: a - b is a + !b + 1, so that a borrow leaves the flag clear.
/// Chains of one kind cannot tell, but nvcc's division of 128-bit integers reads the flag of a subtraction with `addc`.
/// The manual calls the flag of a subtraction its borrow; ptxas feeds one and the same predicate of `IADD3` to the
/// `IADD3.X` of either kind, and a GPU answers -1 to `add.cc 0, 0; subc 0, 0` (stackoverflow.com/questions/5818713).
unsafe fn carry32(f: &Decoded, o: Operands, g: impl Fn(u64, u64, u64) -> u64, sources: usize) {
    let out = f.has(CC_OUT) as usize;
    // SAFETY: destination, carry out, sources, carry in, as the form says.
    unsafe {
        let carry = if f.has(CC_IN) { o.pred(1 + out + sources) } else { first_carry(f) };
        let (a, b) = (o.b32(1 + out), o.b32(2 + out));
        let mut r = [0; 32];
        let mut carries = 0;
        for i in 0..32 {
            let c = if sources == 3 { o.b32(3 + out)[i] as u64 } else { 0 };
            let full = g(a[i] as u64, b[i] as u64, c) + (carry >> i & 1) as u64;
            r[i] = full as u32;
            carries |= ((full >> 32 & 1) as u32) << i;
        }
        o.put32(0, &r);
        if out == 1 {
            o.put_pred(1, carries);
        }
    }
}

/// The flag as an instruction that begins a chain takes it.
fn first_carry(f: &Decoded) -> u32 {
    if matches!(f.op, Op::SubCarry32 | Op::SubCarry64) { u32::MAX } else { 0 }
}

/// The same for 64 bits.
unsafe fn carry64(f: &Decoded, o: Operands, g: impl Fn(u64, u64, u64) -> u128, sources: usize) {
    let out = f.has(CC_OUT) as usize;
    // SAFETY: destination, carry out, sources, carry in, as the form says.
    unsafe {
        let carry = if f.has(CC_IN) { o.pred(1 + out + sources) } else { first_carry(f) };
        let (a, b) = (o.b64(1 + out), o.b64(2 + out));
        let mut r = [0; 32];
        let mut carries = 0;
        for i in 0..32 {
            let c = if sources == 3 { o.b64(3 + out)[i] } else { 0 };
            let full = g(a[i], b[i], c) + (carry >> i & 1) as u128;
            r[i] = full as u64;
            carries |= ((full >> 64 & 1) as u32) << i;
        }
        o.put64(0, &r);
        if out == 1 {
            o.put_pred(1, carries);
        }
    }
}
