//! The addresses of a warp's 32 lanes: predicates on all of them, and moves of four words per lane, written for each
//! instruction set: as plain loops they compile to scalar code. Repeated parts are macros, because a closure would not
//! inherit the target features of the loop it ends up in.

// Loops over lanes and granules index several arrays at once, and vectorise as written.
#![allow(clippy::needless_range_loop)]

use crate::num::{AVX2, AVX512};
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

/// One address per lane.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Addresses(pub [u64; 32]);

impl Deref for Addresses {
    type Target = [u64; 32];

    fn deref(&self) -> &[u64; 32] {
        &self.0
    }
}

impl DerefMut for Addresses {
    fn deref_mut(&mut self) -> &mut [u64; 32] {
        &mut self.0
    }
}

/// What an access does to memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Reads.
    Load,
    /// Writes. The caller of `Machine::locate` has the values, and checks for races itself.
    Store,
    /// Reads and writes atomically.
    Atomic,
}

/// One execution of a memory instruction.
#[derive(Clone, Copy)]
pub struct Site {
    /// Step of the program.
    pub pc: u32,
    /// Active lanes.
    pub mask: u32,
    /// Bytes per lane.
    pub bytes: u32,
    /// What it does.
    pub usage: Use,
    /// Loads: bytes per element, of which some may be structure padding; 0 if all must have been written.
    pub element: u8,
    /// Threads may communicate through it (volatile, relaxed, acquire, release).
    pub strong: bool,
    /// The lanes have the addresses of matrix rows (`ldmatrix`).
    pub rows: bool,
}

/// Lanes of a mask, lowest first.
pub fn lanes(mask: u32) -> impl Iterator<Item = u32> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros();
        (rest != 0).then(|| {
            rest &= rest - 1;
            lane
        })
    })
}

/// Gives lanes outside the mask the address of the first lane inside it.
#[inline(always)]
pub fn settle(at: &mut Addresses, mask: u32) {
    if mask != !0 {
        let first = at[mask.trailing_zeros() as usize & 31];
        for l in 0..32 {
            at[l] = if mask >> l & 1 != 0 { at[l] } else { first };
        }
    }
}

/// Minimum, maximum and bitwise OR of all addresses.
#[inline(always)]
pub fn extent(at: &Addresses) -> (u64, u64, u64) {
    let (mut low, mut high, mut bits) = (!0, 0, 0);
    for &a in &at.0 {
        low = a.min(low);
        high = a.max(high);
        bits |= a;
    }
    (low, high, bits)
}

/// Whether lane l's address is lane 0's plus l times `step`.
#[inline(always)]
pub fn progression(at: &Addresses, step: u64) -> bool {
    let mut wrong = 0;
    for l in 0..32 {
        wrong |= at[l] ^ at[0].wrapping_add(l as u64 * step);
    }
    wrong == 0
}

/// Whether `a[l] + offset`, wrapping, is in `start..=start + span` (here `start` is 0) and has none of the bits `low`,
/// for every lane l.
///
/// # Safety
/// `a` points to 32 values aligned to 64 bytes; the processor supports `ISA`.
#[inline(always)]
pub unsafe fn inside32<const ISA: usize>(a: *const u32, offset: u32, span: u32, low: u32) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: guaranteed by the caller.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            let (offset, span, low) =
                (_mm512_set1_epi32(offset as i32), _mm512_set1_epi32(span as i32), _mm512_set1_epi32(low as i32));
            macro_rules! wrong {
                ($i:expr) => {{
                    let at = _mm512_add_epi32(_mm512_load_si512(a.add($i).cast()), offset);
                    _mm512_cmpgt_epu32_mask(at, span) | _mm512_test_epi32_mask(at, low)
                }};
            }
            return wrong!(0) | wrong!(16) == 0;
        }
        if ISA == AVX2 {
            let (offset, span, low) =
                (_mm256_set1_epi32(offset as i32), _mm256_set1_epi32(span as i32), _mm256_set1_epi32(low as i32));
            macro_rules! right {
                ($i:expr) => {{
                    let at = _mm256_add_epi32(_mm256_load_si256(a.add($i).cast()), offset);
                    let inside = _mm256_cmpeq_epi32(_mm256_max_epu32(at, span), span);
                    _mm256_and_si256(inside, _mm256_cmpeq_epi32(_mm256_and_si256(at, low), _mm256_setzero_si256()))
                }};
            }
            let all =
                _mm256_and_si256(_mm256_and_si256(right!(0), right!(8)), _mm256_and_si256(right!(16), right!(24)));
            return _mm256_movemask_epi8(all) == -1;
        }
    }
    // SAFETY: guaranteed by the caller.
    unsafe { &*a.cast::<[u32; 32]>() }.iter().all(|a| {
        let at = a.wrapping_add(offset);
        at <= span && at & low == 0
    })
}

/// As [`inside32`], for 64 bits: `a[l] + offset - start <= span`.
///
/// # Safety
/// As for [`inside32`].
#[inline(always)]
pub unsafe fn inside64<const ISA: usize>(a: *const u64, offset: u64, start: u64, span: u64, low: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: guaranteed by the caller.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            let (offset, start) = (_mm512_set1_epi64(offset as i64), _mm512_set1_epi64(start as i64));
            let (span, low) = (_mm512_set1_epi64(span as i64), _mm512_set1_epi64(low as i64));
            macro_rules! wrong {
                ($i:expr) => {{
                    let at = _mm512_add_epi64(_mm512_load_si512(a.add($i).cast()), offset);
                    _mm512_cmpgt_epu64_mask(_mm512_sub_epi64(at, start), span) | _mm512_test_epi64_mask(at, low)
                }};
            }
            return wrong!(0) | wrong!(8) | wrong!(16) | wrong!(24) == 0;
        }
        if ISA == AVX2 {
            // Unsigned comparison is signed comparison with the sign bit turned.
            let turn = _mm256_set1_epi64x(i64::MIN);
            let (offset, start) = (_mm256_set1_epi64x(offset as i64), _mm256_set1_epi64x(start as i64));
            let (span, low) = (_mm256_xor_si256(_mm256_set1_epi64x(span as i64), turn), _mm256_set1_epi64x(low as i64));
            macro_rules! wrong {
                ($i:expr) => {{
                    let at = _mm256_add_epi64(_mm256_load_si256(a.add($i).cast()), offset);
                    let outside = _mm256_cmpgt_epi64(_mm256_xor_si256(_mm256_sub_epi64(at, start), turn), span);
                    _mm256_or_si256(outside, _mm256_and_si256(at, low))
                }};
            }
            let mut any = wrong!(0);
            for i in 1..8 {
                any = _mm256_or_si256(any, wrong!(4 * i));
            }
            return _mm256_testz_si256(any, any) == 1;
        }
    }
    // SAFETY: guaranteed by the caller.
    unsafe { &*a.cast::<[u64; 32]>() }.iter().all(|a| {
        let at = a.wrapping_add(offset);
        at.wrapping_sub(start) <= span && at & low == 0
    })
}

/// Whether every value is its predecessor plus `step`.
///
/// # Safety
/// As for [`inside32`].
#[inline(always)]
pub unsafe fn steps32<const ISA: usize>(a: *const u32, step: u32) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: guaranteed by the caller.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            let ramp = _mm512_mullo_epi32(
                _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                _mm512_set1_epi32(step as i32),
            );
            let low = _mm512_add_epi32(_mm512_set1_epi32(a.read() as i32), ramp);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(16u32.wrapping_mul(step) as i32));
            return _mm512_cmpneq_epi32_mask(_mm512_load_si512(a.cast()), low)
                | _mm512_cmpneq_epi32_mask(_mm512_load_si512(a.add(16).cast()), high)
                == 0;
        }
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &*a.cast::<[u32; 32]>() };
    // Most other sequences differ at once.
    a[1] == a[0].wrapping_add(step) && a.iter().enumerate().all(|(l, &v)| v == a[0].wrapping_add(l as u32 * step))
}

/// As [`steps32`], for 64 bits.
///
/// # Safety
/// As for [`inside32`].
#[inline(always)]
pub unsafe fn steps64<const ISA: usize>(a: *const u64, step: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: guaranteed by the caller.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            let ramp = _mm512_mullo_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(step as i64));
            let first = _mm512_add_epi64(_mm512_set1_epi64(a.read() as i64), ramp);
            macro_rules! wrong {
                ($i:expr) => {{
                    let want = _mm512_add_epi64(first, _mm512_set1_epi64(($i as u64).wrapping_mul(step) as i64));
                    _mm512_cmpneq_epi64_mask(_mm512_load_si512(a.add($i).cast()), want)
                }};
            }
            return wrong!(0) | wrong!(8) | wrong!(16) | wrong!(24) == 0;
        }
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &*a.cast::<[u64; 32]>() };
    a[1] == a[0].wrapping_add(step) && a.iter().enumerate().all(|(l, &v)| v == a[0].wrapping_add(l as u64 * step))
}

/// Bit l says whether value l is value l - 1 plus `step`; bit 0 is 0.
///
/// # Safety
/// As for [`inside32`].
#[inline(always)]
pub unsafe fn joined64<const ISA: usize>(a: *const u64, step: u64) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller; the mask keeps the last load inside the values.
        return unsafe {
            let step = _mm512_set1_epi64(step as i64);
            macro_rules! joined {
                ($i:expr, $part:expr) => {{
                    let next = _mm512_add_epi64(_mm512_load_si512(a.add($i).cast()), step);
                    let at = _mm512_maskz_loadu_epi64($part, a.add($i + 1).cast());
                    u32::from(_mm512_mask_cmpeq_epi64_mask($part, at, next)) << $i
                }};
            }
            (joined!(0, 0xff) | joined!(8, 0xff) | joined!(16, 0xff) | joined!(24, 0x7f)) << 1
        };
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &*a.cast::<[u64; 32]>() };
    let mut joined = 0;
    for l in 1..32 {
        joined |= u32::from(a[l] == a[l - 1].wrapping_add(step)) << l;
    }
    joined
}

/// How 16 addresses of 16-byte accesses lie.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// All the same.
    Same,
    /// Each four contiguous. Recognised only with AVX-512, whose vectors hold four.
    Fours,
    /// Anything else.
    Any,
}

/// Classifies 16 addresses.
///
/// # Safety
/// `a` points to 16 values aligned to 64 bytes; the processor supports `ISA`.
#[inline(always)]
pub unsafe fn lie32<const ISA: usize>(a: *const u32) -> Lie {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        return unsafe {
            let at = _mm512_load_si512(a.cast());
            if _mm512_cmpneq_epi32_mask(at, _mm512_set1_epi32(a.read() as i32)) == 0 {
                return Lie::Same;
            }
            let ramp = _mm512_set4_epi32(48, 32, 16, 0);
            let fours = _mm512_add_epi32(_mm512_shuffle_epi32::<0>(at), ramp);
            if _mm512_cmpneq_epi32_mask(at, fours) == 0 { Lie::Fours } else { Lie::Any }
        };
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &*a.cast::<[u32; 16]>() };
    if a[15] == a[0] && a.iter().all(|&v| v == a[0]) { Lie::Same } else { Lie::Any }
}

/// As [`lie32`], for 64 bits.
///
/// # Safety
/// As for [`lie32`].
#[inline(always)]
pub unsafe fn lie64<const ISA: usize>(a: *const u64) -> Lie {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        return unsafe {
            let (low, high) = (_mm512_load_si512(a.cast()), _mm512_load_si512(a.add(8).cast()));
            let first = _mm512_set1_epi64(a.read() as i64);
            if _mm512_cmpneq_epi64_mask(low, first) | _mm512_cmpneq_epi64_mask(high, first) == 0 {
                return Lie::Same;
            }
            let ramp = _mm512_set4_epi64(48, 32, 16, 0);
            let (low_fours, high_fours) = (
                _mm512_add_epi64(_mm512_permutex_epi64::<0>(low), ramp),
                _mm512_add_epi64(_mm512_permutex_epi64::<0>(high), ramp),
            );
            let wrong = _mm512_cmpneq_epi64_mask(low, low_fours) | _mm512_cmpneq_epi64_mask(high, high_fours);
            if wrong == 0 { Lie::Fours } else { Lie::Any }
        };
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &*a.cast::<[u64; 16]>() };
    if a[15] == a[0] && a.iter().all(|&v| v == a[0]) { Lie::Same } else { Lie::Any }
}

/// A subset of 16 neighbours, as bits and as words of all ones or zero.
pub struct Some16 {
    /// Bit i says whether i is in the subset.
    pub bits: u16,
    /// The same as words.
    pub words: [u32; 16],
}

/// In place of a lane: several lanes of the warp.
pub const MANY: u32 = 32;

/// Up to 16 consecutive granules of an access, possibly with gaps: which are touched, and by which lane.
pub struct Chunk {
    /// The first granule, relative to that of the first lane.
    pub at: i64,
    /// Those that are touched.
    pub some: Some16,
    /// The lane that touches each, or [`MANY`].
    pub lanes: [u32; 16],
}

/// log2 of the bytes of a line of shared memory, the unit in which its state is tracked first: as much as four lanes
/// copy at a time, or a warp stores of two bytes each. With longer lines an instruction would meet what the last one of
/// the same warp has just written beside.
pub const LINE: u32 = 6;

impl Some16 {
    /// The subset of these bits. Where only they are used, the words cost nothing.
    #[inline(always)]
    pub fn new(bits: u16) -> Self {
        let mut words = [0; 16];
        for i in 0..16 {
            words[i] = (u32::from(bits) >> i & 1).wrapping_neg();
        }
        Some16 { bits, words }
    }
}

/// Up to 16 consecutive lines of an access, possibly with gaps. Small, because every access reads its own.
pub struct Lines {
    /// The first line, relative to that of the first lane.
    pub at: i32,
    /// Those that are touched, as bits.
    pub bits: u16,
}

/// How many lanes touch each of some [`Lines`].
pub type LanesOfLines = [u32; 16];

/// What an access to shared memory touches.
#[derive(Clone, Copy)]
pub struct Reach<'a> {
    /// Its granules.
    pub chunks: &'a Rc<[Chunk]>,
    /// Its lines.
    pub lines: &'a [Lines],
    /// How many lanes touch them.
    pub lanes: &'a [LanesOfLines],
    /// The granule of the first lane.
    pub origin: i64,
    /// The line of the first lane.
    pub line: i64,
}

/// Whether any value of the subset is above a limit.
///
/// # Safety
/// 16 readable words; the processor supports `ISA`.
#[inline(always)]
pub unsafe fn above<const ISA: usize>(a: *const u32, limit: u32, some: &Some16) -> bool {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        return unsafe {
            let limit = _mm512_set1_epi32(limit as i32);
            _mm512_mask_cmpgt_epu32_mask(some.bits, _mm512_loadu_si512(a.cast()), limit) != 0
        };
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &*a.cast::<[u32; 16]>() };
    let mut above = 0;
    for i in 0..16 {
        above |= some.words[i] & u32::from(a[i] > limit).wrapping_neg();
    }
    above != 0
}

/// Raises the values of the subset to at least `least`.
///
/// # Safety
/// 16 writable words; the processor supports `ISA`.
#[inline(always)]
pub unsafe fn raise<const ISA: usize>(a: *mut u32, least: u32, some: &Some16) {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let raised = _mm512_max_epu32(_mm512_loadu_si512(a.cast()), _mm512_set1_epi32(least as i32));
            _mm512_mask_storeu_epi32(a.cast(), some.bits, raised);
        }
        return;
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &mut *a.cast::<[u32; 16]>() };
    for i in 0..16 {
        a[i] = a[i].max(least & some.words[i]);
    }
}

/// Writes `base | low[i]` to the subset.
///
/// # Safety
/// As for [`raise`].
#[inline(always)]
pub unsafe fn put<const ISA: usize>(a: *mut u32, base: u32, low: &[u32; 16], some: &Some16) {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let new = _mm512_or_si512(_mm512_loadu_si512(low.as_ptr().cast()), _mm512_set1_epi32(base as i32));
            _mm512_mask_storeu_epi32(a.cast(), some.bits, new);
        }
        return;
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &mut *a.cast::<[u32; 16]>() };
    for i in 0..16 {
        a[i] = (a[i] & !some.words[i]) | ((base | low[i]) & some.words[i]);
    }
}

/// As [`put`], but `base | other` where the old value differs from the new one in the bits below `shift` only.
///
/// # Safety
/// As for [`raise`].
#[inline(always)]
pub unsafe fn put_or<const ISA: usize>(a: *mut u32, base: u32, shift: u32, low: &[u32; 16], other: u32, some: &Some16) {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let old = _mm512_loadu_si512(a.cast());
            let new = _mm512_or_si512(_mm512_loadu_si512(low.as_ptr().cast()), _mm512_set1_epi32(base as i32));
            let field = _mm512_set1_epi32((u32::MAX << shift) as i32);
            let change = _mm512_xor_si512(old, new);
            let both = _mm512_testn_epi32_mask(change, field) & _mm512_test_epi32_mask(change, change);
            let new = _mm512_mask_mov_epi32(new, both, _mm512_set1_epi32((base | other) as i32));
            _mm512_mask_storeu_epi32(a.cast(), some.bits, new);
        }
        return;
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &mut *a.cast::<[u32; 16]>() };
    for i in 0..16 {
        let new = base | low[i];
        let change = a[i] ^ new;
        let new = if (change >> shift == 0) & (change != 0) { base | other } else { new };
        a[i] = (a[i] & !some.words[i]) | (new & some.words[i]);
    }
}

/// Whether any byte of the subset is zero (with `SET`: nonzero).
///
/// # Safety
/// 16 readable bytes; the processor supports `ISA`.
#[inline(always)]
pub unsafe fn any_byte<const ISA: usize, const SET: bool>(a: *const u8, some: &Some16) -> bool {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        return unsafe {
            let a = _mm_loadu_si128(a.cast());
            let zero = _mm_setzero_si128();
            let found = match SET {
                true => _mm_mask_cmpneq_epi8_mask(some.bits, a, zero),
                false => _mm_mask_cmpeq_epi8_mask(some.bits, a, zero),
            };
            found != 0
        };
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &*a.cast::<[u8; 16]>() };
    let mut found = 0;
    for i in 0..16 {
        found |= some.words[i] as u8 & u8::from((a[i] != 0) == SET);
    }
    found != 0
}

/// Sets the bytes of the subset to 1.
///
/// # Safety
/// 16 writable bytes; the processor supports `ISA`.
#[inline(always)]
pub unsafe fn set_bytes<const ISA: usize>(a: *mut u8, some: &Some16) {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        unsafe { _mm_mask_storeu_epi8(a.cast(), some.bits, _mm_set1_epi8(1)) };
        return;
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &mut *a.cast::<[u8; 16]>() };
    for i in 0..16 {
        a[i] |= some.words[i] as u8 & 1;
    }
}

/// Adds 1 to the bytes of the subset, at most 255 in all, or subtracts 1, at least 0 in all.
///
/// # Safety
/// As for [`set_bytes`].
#[inline(always)]
pub unsafe fn count_bytes<const ISA: usize, const UP: bool>(a: *mut u8, some: &Some16) {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let old = _mm_loadu_si128(a.cast());
            let one = _mm_maskz_set1_epi8(some.bits, 1);
            let new = if UP { _mm_adds_epu8(old, one) } else { _mm_subs_epu8(old, one) };
            _mm_mask_storeu_epi8(a.cast(), some.bits, new);
        }
        return;
    }
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &mut *a.cast::<[u8; 16]>() };
    for i in 0..16 {
        let one = some.words[i] as u8 & 1;
        a[i] = if UP { a[i].saturating_add(one) } else { a[i].saturating_sub(one) };
    }
}

/// Adds to 16 words, or subtracts from them, at least 0 in all.
///
/// # Safety
/// As for [`raise`].
#[inline(always)]
pub unsafe fn count_words<const UP: bool>(a: *mut u32, by: &[u32; 16]) {
    // SAFETY: guaranteed by the caller.
    let a = unsafe { &mut *a.cast::<[u32; 16]>() };
    for i in 0..16 {
        a[i] = if UP { a[i].saturating_add(by[i]) } else { a[i].saturating_sub(by[i]) };
    }
}

/// Reads 4 words at each of 16 addresses; word e of address i goes to `to[e][i]`. `lie` classifies the addresses.
///
/// # Safety
/// 16 readable bytes at each address and 16 writable words at each destination; `lie` is right; the processor supports
/// `ISA`.
#[inline(always)]
pub unsafe fn load_quads<const ISA: usize>(at: impl Fn(usize) -> *const u8, to: [*mut u32; 4], lie: Lie) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: guaranteed by the caller; SSE2 is part of x86-64.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            if lie == Lie::Same {
                let quad = _mm_loadu_si128(at(0).cast());
                _mm512_storeu_si512(to[0].cast(), _mm512_broadcastd_epi32(quad));
                _mm512_storeu_si512(to[1].cast(), _mm512_broadcastd_epi32(_mm_shuffle_epi32::<0x55>(quad)));
                _mm512_storeu_si512(to[2].cast(), _mm512_broadcastd_epi32(_mm_shuffle_epi32::<0xaa>(quad)));
                _mm512_storeu_si512(to[3].cast(), _mm512_broadcastd_epi32(_mm_shuffle_epi32::<0xff>(quad)));
                return;
            }
            macro_rules! four {
                ($i:expr) => {{
                    let z = _mm512_castsi128_si512(_mm_loadu_si128(at($i).cast()));
                    let z = _mm512_inserti32x4::<1>(z, _mm_loadu_si128(at($i + 1).cast()));
                    let z = _mm512_inserti32x4::<2>(z, _mm_loadu_si128(at($i + 2).cast()));
                    _mm512_inserti32x4::<3>(z, _mm_loadu_si128(at($i + 3).cast()))
                }};
            }
            macro_rules! whole {
                ($i:expr) => {{ _mm512_loadu_si512(at($i).cast()) }};
            }
            let (a, b, c, d) = match lie {
                Lie::Fours => (whole!(0), whole!(4), whole!(8), whole!(12)),
                _ => (four!(0), four!(4), four!(8), four!(12)),
            };
            // Words 0 of eight addresses in the low half, words 1 in the high half; likewise words 2 and 3.
            let first = _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
            let second = _mm512_set_epi32(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2);
            for (pick, to) in [(first, [to[0], to[1]]), (second, [to[2], to[3]])] {
                let (low, high) = (_mm512_permutex2var_epi32(a, pick, b), _mm512_permutex2var_epi32(c, pick, d));
                _mm512_storeu_si512(to[0].cast(), _mm512_shuffle_i64x2::<0x44>(low, high));
                _mm512_storeu_si512(to[1].cast(), _mm512_shuffle_i64x2::<0xee>(low, high));
            }
            return;
        }
        for l in (0..16).step_by(4) {
            macro_rules! quad {
                ($i:expr) => {{ _mm_loadu_si128(at(l + $i).cast()) }};
            }
            let (a, b, c, d) = (quad!(0), quad!(1), quad!(2), quad!(3));
            let (ab_low, ab_high) = (_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
            _mm_storeu_si128(to[0].add(l).cast(), _mm_unpacklo_epi64(ab_low, cd_low));
            _mm_storeu_si128(to[1].add(l).cast(), _mm_unpackhi_epi64(ab_low, cd_low));
            _mm_storeu_si128(to[2].add(l).cast(), _mm_unpacklo_epi64(ab_high, cd_high));
            _mm_storeu_si128(to[3].add(l).cast(), _mm_unpackhi_epi64(ab_high, cd_high));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..16 {
        for (e, to) in to.into_iter().enumerate() {
            // SAFETY: guaranteed by the caller.
            unsafe { to.add(i).write(at(i).cast::<u32>().add(e).read_unaligned()) };
        }
    }
}

/// Writes eight rows of 16 bytes, contiguously, in stores as wide as the loads that will read them: a load that spans
/// several narrower stores misses store forwarding and waits for the cache.
///
/// # Safety
/// 128 writable bytes aligned to 64; the processor supports `ISA`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn write_rows<const ISA: usize>(rows: [std::arch::x86_64::__m128i; 8], to: *mut u8) {
    use std::arch::x86_64::*;
    // SAFETY: guaranteed by the caller.
    unsafe {
        for i in 0..4 {
            let (row, to) = (&rows[2 * i..], to.add(32 * i));
            if ISA == AVX512 && i % 2 == 0 {
                let low = _mm512_inserti32x4::<1>(_mm512_castsi128_si512(row[0]), row[1]);
                let whole = _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(low, row[2]), row[3]);
                _mm512_store_si512(to.cast(), whole);
            } else if ISA == AVX2 {
                _mm256_store_si256(to.cast(), _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row[0]), row[1]));
            } else if ISA != AVX512 {
                _mm_store_si128(to.cast(), row[0]);
                _mm_store_si128(to.add(16).cast(), row[1]);
            }
        }
    }
}

/// Reads 16 bytes at each of 8 addresses and writes them contiguously.
///
/// # Safety
/// 16 readable bytes at each address and 128 writable ones, aligned to 64; the processor supports `ISA`.
#[inline(always)]
pub unsafe fn load_rows<const ISA: usize>(at: impl Fn(usize) -> *const u8, to: *mut u8) {
    // SAFETY: guaranteed by the caller; SSE2 is part of x86-64.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::*;
            macro_rules! row {
                ($i:expr) => {{ _mm_loadu_si128(at($i).cast()) }};
            }
            let rows = [row!(0), row!(1), row!(2), row!(3), row!(4), row!(5), row!(6), row!(7)];
            write_rows::<ISA>(rows, to);
        }
        #[cfg(not(target_arch = "x86_64"))]
        for i in 0..8 {
            to.cast::<[u8; 16]>().add(i).write(at(i).cast::<[u8; 16]>().read_unaligned());
        }
    }
}

/// As [`load_rows`], transposed as an 8 x 8 matrix of 16 bits.
///
/// # Safety
/// As for [`load_rows`].
#[inline(always)]
pub unsafe fn transpose_rows<const ISA: usize>(at: impl Fn(usize) -> *const u8, to: *mut u8) {
    // SAFETY: guaranteed by the caller; SSE2 is part of x86-64.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::*;
            macro_rules! row {
                ($i:expr) => {{ _mm_loadu_si128(at($i).cast()) }};
            }
            // Interleaves pairs, then quads, then all eight elements of a column.
            macro_rules! pairs {
                ($a:expr, $b:expr) => {{
                    let (a, b) = ($a, $b);
                    (_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b))
                }};
            }
            macro_rules! quads {
                ($a:expr, $b:expr) => {{ (_mm_unpacklo_epi32($a, $b), _mm_unpackhi_epi32($a, $b)) }};
            }
            let (a_low, a_high) = pairs!(row!(0), row!(1));
            let (b_low, b_high) = pairs!(row!(2), row!(3));
            let (c_low, c_high) = pairs!(row!(4), row!(5));
            let (d_low, d_high) = pairs!(row!(6), row!(7));
            let ((ab_0, ab_2), (ab_4, ab_6)) = (quads!(a_low, b_low), quads!(a_high, b_high));
            let ((cd_0, cd_2), (cd_4, cd_6)) = (quads!(c_low, d_low), quads!(c_high, d_high));
            let columns = [
                _mm_unpacklo_epi64(ab_0, cd_0),
                _mm_unpackhi_epi64(ab_0, cd_0),
                _mm_unpacklo_epi64(ab_2, cd_2),
                _mm_unpackhi_epi64(ab_2, cd_2),
                _mm_unpacklo_epi64(ab_4, cd_4),
                _mm_unpackhi_epi64(ab_4, cd_4),
                _mm_unpacklo_epi64(ab_6, cd_6),
                _mm_unpackhi_epi64(ab_6, cd_6),
            ];
            write_rows::<ISA>(columns, to);
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let rows: [[u16; 8]; 8] = std::array::from_fn(|r| at(r).cast::<[u16; 8]>().read_unaligned());
            for r in 0..8 {
                to.cast::<[u16; 8]>().add(r).write(std::array::from_fn(|c| rows[c][r]));
            }
        }
    }
}

/// Writes 4 words at each of 16 addresses, in order: word e of address i is `from[e][i]`.
///
/// # Safety
/// 16 writable bytes at each address and 16 readable words at each source; the processor supports `ISA`.
#[inline(always)]
pub unsafe fn store_quads<const ISA: usize>(at: impl Fn(usize) -> *mut u8, from: [*const u32; 4]) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: guaranteed by the caller; SSE2 is part of x86-64.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            macro_rules! column {
                ($e:expr) => {{ _mm512_loadu_si512(from[$e].cast()) }};
            }
            let (a, b, c, d) = (column!(0), column!(1), column!(2), column!(3));
            let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            // The first of each four addresses, the second, the third, the last.
            let (w, x) = (_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low));
            let (y, z) = (_mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high));
            macro_rules! four {
                ($i:literal) => {{
                    _mm_storeu_si128(at(4 * $i).cast(), _mm512_extracti32x4_epi32::<$i>(w));
                    _mm_storeu_si128(at(4 * $i + 1).cast(), _mm512_extracti32x4_epi32::<$i>(x));
                    _mm_storeu_si128(at(4 * $i + 2).cast(), _mm512_extracti32x4_epi32::<$i>(y));
                    _mm_storeu_si128(at(4 * $i + 3).cast(), _mm512_extracti32x4_epi32::<$i>(z));
                }};
            }
            four!(0);
            four!(1);
            four!(2);
            four!(3);
            return;
        }
        for l in (0..16).step_by(4) {
            macro_rules! column {
                ($e:expr) => {{ _mm_loadu_si128(from[$e].add(l).cast()) }};
            }
            let (a, b, c, d) = (column!(0), column!(1), column!(2), column!(3));
            let (ab_low, ab_high) = (_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
            let (cd_low, cd_high) = (_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
            _mm_storeu_si128(at(l).cast(), _mm_unpacklo_epi64(ab_low, cd_low));
            _mm_storeu_si128(at(l + 1).cast(), _mm_unpackhi_epi64(ab_low, cd_low));
            _mm_storeu_si128(at(l + 2).cast(), _mm_unpacklo_epi64(ab_high, cd_high));
            _mm_storeu_si128(at(l + 3).cast(), _mm_unpackhi_epi64(ab_high, cd_high));
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..16 {
        for (e, from) in from.into_iter().enumerate() {
            // SAFETY: guaranteed by the caller.
            unsafe { at(i).cast::<u32>().add(e).write_unaligned(from.add(i).read()) };
        }
    }
}
