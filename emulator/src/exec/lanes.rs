//! Questions about the addresses of all 32 lanes, written for each instruction set: as plain loops they compile to scalar code.

use super::interp::{AVX2, AVX512};

/// Whether `a[l] + offset`, wrapping, lies in `start..=start + span` and has none of the bits `low`, for every lane.
///
/// # Safety
/// `a` points to 32 values aligned to 64 bytes; the processor has the instruction set of `ISA`.
#[inline(always)]
pub unsafe fn inside32<const ISA: usize>(a: *const u32, offset: u32, span: u32, low: u32) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            let (offset, span, low) = (_mm512_set1_epi32(offset as i32), _mm512_set1_epi32(span as i32), _mm512_set1_epi32(low as i32));
            let wrong = |i: usize| {
                let at = _mm512_add_epi32(_mm512_load_si512(a.add(i).cast()), offset);
                _mm512_cmpgt_epu32_mask(at, span) | _mm512_test_epi32_mask(at, low)
            };
            return wrong(0) | wrong(16) == 0;
        }
        if ISA == AVX2 {
            let (offset, span, low) = (_mm256_set1_epi32(offset as i32), _mm256_set1_epi32(span as i32), _mm256_set1_epi32(low as i32));
            let right = |i: usize| {
                let at = _mm256_add_epi32(_mm256_load_si256(a.add(i).cast()), offset);
                let inside = _mm256_cmpeq_epi32(_mm256_max_epu32(at, span), span);
                _mm256_and_si256(inside, _mm256_cmpeq_epi32(_mm256_and_si256(at, low), _mm256_setzero_si256()))
            };
            let all = _mm256_and_si256(_mm256_and_si256(right(0), right(8)), _mm256_and_si256(right(16), right(24)));
            return _mm256_movemask_epi8(all) == -1;
        }
    }
    // SAFETY: the caller's promise.
    unsafe { &*a.cast::<[u32; 32]>() }.iter().all(|a| {
        let at = a.wrapping_add(offset);
        at <= span && at & low == 0
    })
}

/// The same for 64 bits: `a[l] + offset - start <= span`.
///
/// # Safety
/// As for [`inside32`].
#[inline(always)]
pub unsafe fn inside64<const ISA: usize>(a: *const u64, offset: u64, start: u64, span: u64, low: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            let (offset, start) = (_mm512_set1_epi64(offset as i64), _mm512_set1_epi64(start as i64));
            let (span, low) = (_mm512_set1_epi64(span as i64), _mm512_set1_epi64(low as i64));
            let wrong = |i: usize| {
                let at = _mm512_add_epi64(_mm512_load_si512(a.add(i).cast()), offset);
                _mm512_cmpgt_epu64_mask(_mm512_sub_epi64(at, start), span) | _mm512_test_epi64_mask(at, low)
            };
            return wrong(0) | wrong(8) | wrong(16) | wrong(24) == 0;
        }
        if ISA == AVX2 {
            // Unsigned comparison is signed comparison with the sign bit turned.
            let turn = _mm256_set1_epi64x(i64::MIN);
            let (offset, start) = (_mm256_set1_epi64x(offset as i64), _mm256_set1_epi64x(start as i64));
            let (span, low) = (_mm256_xor_si256(_mm256_set1_epi64x(span as i64), turn), _mm256_set1_epi64x(low as i64));
            let wrong = |i: usize| {
                let at = _mm256_add_epi64(_mm256_load_si256(a.add(i).cast()), offset);
                let outside = _mm256_cmpgt_epi64(_mm256_xor_si256(_mm256_sub_epi64(at, start), turn), span);
                _mm256_or_si256(outside, _mm256_and_si256(at, low))
            };
            let mut any = wrong(0);
            for i in 1..8 {
                any = _mm256_or_si256(any, wrong(4 * i));
            }
            return _mm256_testz_si256(any, any) == 1;
        }
    }
    // SAFETY: the caller's promise.
    unsafe { &*a.cast::<[u64; 32]>() }.iter().all(|a| {
        let at = a.wrapping_add(offset);
        at.wrapping_sub(start) <= span && at & low == 0
    })
}

/// Whether every value is the one before plus `step`.
///
/// # Safety
/// As for [`inside32`].
#[inline(always)]
pub unsafe fn steps32<const ISA: usize>(a: *const u32, step: u32) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            let ramp = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(step as i32));
            let low = _mm512_add_epi32(_mm512_set1_epi32(a.read() as i32), ramp);
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(16u32.wrapping_mul(step) as i32));
            return _mm512_cmpneq_epi32_mask(_mm512_load_si512(a.cast()), low) | _mm512_cmpneq_epi32_mask(_mm512_load_si512(a.add(16).cast()), high) == 0;
        }
    }
    // SAFETY: the caller's promise.
    let a = unsafe { &*a.cast::<[u32; 32]>() };
    // Most that are no progression show it at once.
    a[1] == a[0].wrapping_add(step) && a.iter().enumerate().all(|(l, &v)| v == a[0].wrapping_add(l as u32 * step))
}

/// The same for 64 bits.
///
/// # Safety
/// As for [`inside32`].
#[inline(always)]
pub unsafe fn steps64<const ISA: usize>(a: *const u64, step: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller's promise.
    unsafe {
        use std::arch::x86_64::*;
        if ISA == AVX512 {
            let ramp = _mm512_mullo_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(step as i64));
            let first = _mm512_add_epi64(_mm512_set1_epi64(a.read() as i64), ramp);
            let wrong = |i: usize| {
                let want = _mm512_add_epi64(first, _mm512_set1_epi64((i as u64).wrapping_mul(step) as i64));
                _mm512_cmpneq_epi64_mask(_mm512_load_si512(a.add(i).cast()), want)
            };
            return wrong(0) | wrong(8) | wrong(16) | wrong(24) == 0;
        }
    }
    // SAFETY: the caller's promise.
    let a = unsafe { &*a.cast::<[u64; 32]>() };
    a[1] == a[0].wrapping_add(step) && a.iter().enumerate().all(|(l, &v)| v == a[0].wrapping_add(l as u64 * step))
}
