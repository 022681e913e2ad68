//! Words of 32 bits between a whole warp's registers and memory: the loads and stores that tiled kernels live on.
//!
//! Shared memory has 32-bit addresses and one range, so that bounds and alignment of 32 lanes are checked in vectors; what fails there
//! is left to the general path, which finds the lane and words the fault. Partial warps and checked or counted accesses never come here.

use super::interp::{AVX2, AVX512};

/// Loads 1, 2 or 4 words per lane (`operands`: destinations, then a 32-bit base) from shared memory of `size` bytes. False, with
/// nothing written, where there is no such code for the instruction set, or an address is outside or misaligned.
///
/// # Safety
/// `shared` has `size` readable bytes, the registers lie in the file, and the processor has the instruction set.
#[inline(always)]
pub unsafe fn load_shared<const ISA: usize>(
    shared: *const u8,
    size: u32,
    file: *mut u8,
    operands: &[u32],
    offset: u32,
) -> bool {
    // SAFETY: passed on.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        if ISA == AVX512 {
            return x86::load_avx512(shared, size, file, operands, offset);
        }
        if ISA == AVX2 {
            return x86::load_avx2(shared, size, file, operands, offset);
        }
    }
    let _ = (shared, size, file, operands, offset);
    false
}

/// `ldmatrix` without `.trans` from shared memory of `size` bytes (`operands`: destinations, then a 32-bit base): row r of matrix m is the
/// 16 bytes at the address in lane 8m + r. False, with nothing written, where there is no such code, or an address is outside or misaligned.
///
/// # Safety
/// As for [`load_shared`].
#[inline(always)]
pub unsafe fn load_rows<const ISA: usize>(
    shared: *const u8,
    size: u32,
    file: *mut u8,
    operands: &[u32],
    offset: u32,
) -> bool {
    if ISA != AVX512 && ISA != AVX2 {
        return false;
    }
    let matrices = operands.len() - 1;
    let mut at = [0u32; 32];
    let (mut highest, mut bits) = (0, 0);
    // SAFETY: the caller's registers are in the file; every row is checked before it is read.
    unsafe {
        let base = &*file.add(operands[matrices] as usize).cast::<[u32; 32]>();
        for l in 0..8 * matrices {
            at[l] = base[l].wrapping_add(offset);
            highest = at[l].max(highest);
            bits |= at[l];
        }
        if size < 16 || highest > size - 16 || bits & 15 != 0 {
            return false;
        }
        for m in 0..matrices {
            let to = file.add(operands[m] as usize).cast::<[u32; 4]>();
            for row in 0..8 {
                let from = shared.add(at[8 * m + row] as usize).cast::<[u32; 4]>();
                to.add(row).write(from.read_unaligned());
            }
        }
    }
    true
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// 4 x 4 words within each 128 bits: four rows of lanes become four registers of words.
    macro_rules! transpose {
        ($rows:expr, $low32:ident, $high32:ident, $low64:ident, $high64:ident) => {{
            let [a, b, c, d] = $rows;
            let (ab_low, ab_high) = ($low32(a, b), $high32(a, b));
            let (cd_low, cd_high) = ($low32(c, d), $high32(c, d));
            [
                $low64(ab_low, cd_low),
                $high64(ab_low, cd_low),
                $low64(ab_high, cd_high),
                $high64(ab_high, cd_high),
            ]
        }};
    }

    /// # Safety
    /// See [`super::load_shared`].
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2")]
    pub unsafe fn load_avx512(
        shared: *const u8,
        size: u32,
        file: *mut u8,
        operands: &[u32],
        offset: u32,
    ) -> bool {
        let elements = operands.len() - 1;
        let bytes = 4 * elements as u32;
        if size < bytes {
            return false;
        }
        let mut at = [0u32; 32];
        // SAFETY: the registers are in the file; every address is checked to have `bytes` bytes inside before it is read.
        unsafe {
            let base = file.add(operands[elements] as usize).cast::<__m512i>();
            let offset = _mm512_set1_epi32(offset as i32);
            let low = _mm512_add_epi32(_mm512_loadu_si512(base.cast()), offset);
            let high = _mm512_add_epi32(_mm512_loadu_si512(base.add(1).cast()), offset);
            let last = _mm512_set1_epi32((size - bytes) as i32);
            let outside = _mm512_cmpgt_epu32_mask(low, last) | _mm512_cmpgt_epu32_mask(high, last);
            let within = _mm512_set1_epi32(bytes as i32 - 1);
            if outside | _mm512_test_epi32_mask(_mm512_or_si512(low, high), within) != 0 {
                return false;
            }
            _mm512_storeu_si512(at.as_mut_ptr().cast(), low);
            _mm512_storeu_si512(at.as_mut_ptr().add(16).cast(), high);
            let register = |e: usize| file.add(operands[e] as usize);
            if elements == 4 {
                for half in [0, 16] {
                    let word = |i: usize| _mm_loadu_si128(shared.add(at[half + i] as usize).cast());
                    let row = |i: usize| {
                        let r = _mm512_castsi128_si512(word(i));
                        let r = _mm512_inserti32x4::<1>(r, word(i + 4));
                        let r = _mm512_inserti32x4::<2>(r, word(i + 8));
                        _mm512_inserti32x4::<3>(r, word(i + 12))
                    };
                    let columns = transpose!(
                        [row(0), row(1), row(2), row(3)],
                        _mm512_unpacklo_epi32,
                        _mm512_unpackhi_epi32,
                        _mm512_unpacklo_epi64,
                        _mm512_unpackhi_epi64
                    );
                    for (e, column) in columns.into_iter().enumerate() {
                        _mm512_storeu_si512(register(e).add(4 * half).cast(), column);
                    }
                }
                return true;
            }
            for e in 0..elements {
                let shared = shared.add(4 * e);
                let (a, b) = (
                    _mm512_i32gather_epi32::<1>(low, shared.cast()),
                    _mm512_i32gather_epi32::<1>(high, shared.cast()),
                );
                _mm512_storeu_si512(register(e).cast(), a);
                _mm512_storeu_si512(register(e).add(64).cast(), b);
            }
        }
        true
    }

    /// # Safety
    /// See [`super::load_shared`].
    #[target_feature(enable = "avx2")]
    pub unsafe fn load_avx2(
        shared: *const u8,
        size: u32,
        file: *mut u8,
        operands: &[u32],
        offset: u32,
    ) -> bool {
        let elements = operands.len() - 1;
        let bytes = 4 * elements as u32;
        if size < bytes {
            return false;
        }
        let mut at = [0u32; 32];
        // SAFETY: the registers are in the file; every address is checked to have `bytes` bytes inside before it is read.
        unsafe {
            let base = file.add(operands[elements] as usize).cast::<__m256i>();
            let offset = _mm256_set1_epi32(offset as i32);
            let (mut highest, mut bits) = (_mm256_setzero_si256(), _mm256_setzero_si256());
            for i in 0..4 {
                let a = _mm256_add_epi32(_mm256_loadu_si256(base.add(i)), offset);
                highest = _mm256_max_epu32(highest, a);
                bits = _mm256_or_si256(bits, a);
                _mm256_storeu_si256(at.as_mut_ptr().add(8 * i).cast(), a);
            }
            let last = _mm256_set1_epi32((size - bytes) as i32);
            let inside = _mm256_cmpeq_epi32(_mm256_max_epu32(highest, last), last);
            let within = _mm256_set1_epi32(bytes as i32 - 1);
            if _mm256_movemask_epi8(inside) != -1 || _mm256_testz_si256(bits, within) == 0 {
                return false;
            }
            let register = |e: usize| file.add(operands[e] as usize);
            if elements == 4 {
                for part in [0, 8, 16, 24] {
                    let word = |i: usize| _mm_loadu_si128(shared.add(at[part + i] as usize).cast());
                    let row = |i: usize| {
                        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(word(i)), word(i + 4))
                    };
                    let columns = transpose!(
                        [row(0), row(1), row(2), row(3)],
                        _mm256_unpacklo_epi32,
                        _mm256_unpackhi_epi32,
                        _mm256_unpacklo_epi64,
                        _mm256_unpackhi_epi64
                    );
                    for (e, column) in columns.into_iter().enumerate() {
                        _mm256_storeu_si256(register(e).add(4 * part).cast(), column);
                    }
                }
                return true;
            }
            for e in 0..elements {
                for part in [0, 8, 16, 24] {
                    let lanes = _mm256_loadu_si256(at.as_ptr().add(part).cast());
                    let words = _mm256_i32gather_epi32::<1>(shared.add(4 * e).cast(), lanes);
                    _mm256_storeu_si256(register(e).add(4 * part).cast(), words);
                }
            }
        }
        true
    }

    /// Stores four registers' words as 16 bytes per lane.
    ///
    /// # Safety
    /// The registers lie in the file; every address has 16 writable bytes.
    #[inline(always)]
    pub unsafe fn store_rows(file: *const u8, operands: &[u32], at: &[u64; 32]) {
        // SAFETY: SSE2 is part of x86-64; the rest is the caller's promise.
        unsafe {
            for l in (0..32).step_by(4) {
                let word =
                    |e: usize| _mm_loadu_si128(file.add(operands[e] as usize + 4 * l).cast());
                let rows = transpose!(
                    [word(0), word(1), word(2), word(3)],
                    _mm_unpacklo_epi32,
                    _mm_unpackhi_epi32,
                    _mm_unpacklo_epi64,
                    _mm_unpackhi_epi64
                );
                for (i, row) in rows.into_iter().enumerate() {
                    _mm_storeu_si128(at[l + i] as *mut __m128i, row);
                }
            }
        }
    }
}

/// Stores four registers' words as 16 bytes per lane, in the order of the lanes.
///
/// # Safety
/// The registers lie in the file; every address has 16 writable bytes.
#[inline(always)]
pub unsafe fn store_rows(file: *const u8, operands: &[u32], at: &[u64; 32]) {
    // SAFETY: passed on.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::store_rows(file, operands, at);
    }
    #[cfg(not(target_arch = "x86_64"))]
    for l in 0..32 {
        for e in 0..4 {
            // SAFETY: passed on.
            unsafe {
                let value = file.add(operands[e] as usize + 4 * l).cast::<u32>().read();
                (at[l] as *mut u32).add(e).write_unaligned(value);
            }
        }
    }
}
