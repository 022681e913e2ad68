//! Vector registers as a type, for code that must decide what stays in registers: matrix products and the transforms of
//! Winograd's convolution. Element-wise loops do not need it; see [`super::simd`].
//!
//! Most methods of a [`Vector`] compile to single instructions in a function with the target features of its level,
//! which [`kernel!`] defines. They may run only on a processor that has those features. A [`Vector::Token`] is the
//! proof: every function that [`kernel!`] defines takes one, and so do the safe functions that call it.
//! [`with_vector!`] chooses the type.

use super::simd::{Portable, Simd};

/// A vector register of f32.
///
/// # Safety
/// Every `unsafe` method requires a processor with the level of [`Vector::Token`]. Pointers must be valid for the
/// floats read or written; they need no alignment.
pub(crate) trait Vector: Copy + Send + Sync + 'static {
    /// Proof that the processor has the methods' instructions.
    type Token: Simd;
    /// Floats per register.
    const LANES: usize;
    /// Rows of a matrix product's register tile, which is two registers wide: sums, columns and a broadcast take 28 + 2
    /// + 1 of 32 registers, or 12 + 2 + 1 of 16.
    const ROWS: usize;
    /// `[Self; LANES]`.
    type Block: AsMut<[Self]> + Copy;

    /// Prefetches the cache line of `p`, which need not be valid.
    fn prefetch(p: *const f32);
    unsafe fn splat(x: f32) -> Self;
    unsafe fn zero_block() -> Self::Block;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// Loads the first `count < LANES` lanes; the others are zero.
    unsafe fn load_first(p: *const f32, count: usize) -> Self;
    /// Stores the first `count < LANES` lanes.
    unsafe fn store_first(self, p: *mut f32, count: usize);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// `self * b + c`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Transposes a square of `LANES` registers.
    unsafe fn transpose(rows: &mut Self::Block);
}

/// Four floats in whatever registers the target has.
#[derive(Clone, Copy)]
#[repr(align(16))]
pub(crate) struct Four([f32; 4]);

impl Vector for Four {
    type Token = Portable;
    const LANES: usize = 4;
    const ROWS: usize = 6;
    type Block = [Self; 4];

    #[inline(always)]
    fn prefetch(_: *const f32) {}
    #[inline(always)]
    unsafe fn zero_block() -> Self::Block {
        [Four([0.0; 4]); 4]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Four([x; 4])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller promises four readable floats; the read needs no alignment.
        Four(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller promises four writable floats; the write needs no alignment.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, count: usize) -> Self {
        let mut x = [0.0; 4];
        // SAFETY: the caller promises `count < 4` readable floats, so they fit in `x`, a local that nothing overlaps.
        unsafe { std::ptr::copy_nonoverlapping(p, x.as_mut_ptr(), count) };
        Four(x)
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, count: usize) {
        // SAFETY: the caller promises `count < 4` writable floats; `self` is a copy that they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.0.as_ptr(), p, count) };
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        Four(std::array::from_fn(|i| self.0[i] + b.0[i]))
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        Four(std::array::from_fn(|i| self.0[i] - b.0[i]))
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        Four(std::array::from_fn(|i| self.0[i] * b.0[i]))
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        Four(std::array::from_fn(|i| Portable::mul_add(self.0[i], b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn transpose(rows: &mut Self::Block) {
        *rows = std::array::from_fn(|i| Four(std::array::from_fn(|j| rows[j].0[i])));
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Vector;
    use crate::device::cpu::simd::{Avx2, Avx512};

    /// A mask with the lanes below `count` all ones.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn mask8(count: usize) -> __m256i {
        // SAFETY: the intrinsics touch no memory and need AVX2, which the caller promises.
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    // SAFETY: each block but `prefetch`'s consists of intrinsics that need AVX2 and FMA at most, which the trait
    // demands of the caller. Those of loads and stores touch the 8 floats at `p`, or by their mask the first `count`,
    // which the caller promises are valid; they need no alignment. The others touch no memory.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for __m256 {
        type Token = Avx2;
        const LANES: usize = 8;
        const ROWS: usize = 6;
        type Block = [Self; 8];

        #[inline(always)]
        fn prefetch(p: *const f32) {
            // SAFETY: every x86-64 processor has SSE; a prefetch from an invalid address does nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn zero_block() -> Self::Block {
            unsafe { [_mm256_setzero_ps(); 8] }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm256_storeu_ps(p, self) }
        }
        #[inline(always)]
        unsafe fn load_first(p: *const f32, count: usize) -> Self {
            unsafe { _mm256_maskload_ps(p, mask8(count)) }
        }
        #[inline(always)]
        unsafe fn store_first(self, p: *mut f32, count: usize) {
            unsafe { _mm256_maskstore_ps(p, mask8(count), self) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { _mm256_add_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            unsafe { _mm256_sub_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            unsafe { _mm256_mul_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, b, c) }
        }
        /// Pairs, then pairs of pairs within each 128-bit half, then the halves.
        #[inline(always)]
        unsafe fn transpose(r: &mut Self::Block) {
            unsafe {
                let (mut lo, mut hi) = ([r[0]; 4], [r[0]; 4]);
                for i in 0..4 {
                    lo[i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    hi[i] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                // quad[g][j]: column 4 l + j of rows 4 g .. 4 g + 4 in half l.
                let mut quad = [[r[0]; 4]; 2];
                for g in 0..2 {
                    let (a, b, c, d) = (lo[2 * g], lo[2 * g + 1], hi[2 * g], hi[2 * g + 1]);
                    quad[g] = [
                        _mm256_shuffle_ps(a, b, 0x44),
                        _mm256_shuffle_ps(a, b, 0xEE),
                        _mm256_shuffle_ps(c, d, 0x44),
                        _mm256_shuffle_ps(c, d, 0xEE),
                    ];
                }
                for j in 0..4 {
                    r[j] = _mm256_permute2f128_ps(quad[0][j], quad[1][j], 0x20);
                    r[4 + j] = _mm256_permute2f128_ps(quad[0][j], quad[1][j], 0x31);
                }
            }
        }
    }

    // SAFETY: as for `__m256`, with AVX-512 F and 16 floats.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for __m512 {
        type Token = Avx512;
        const LANES: usize = 16;
        const ROWS: usize = 14;
        type Block = [Self; 16];

        #[inline(always)]
        fn prefetch(p: *const f32) {
            // SAFETY: every x86-64 processor has SSE; a prefetch from an invalid address does nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn zero_block() -> Self::Block {
            unsafe { [_mm512_setzero_ps(); 16] }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self) }
        }
        #[inline(always)]
        unsafe fn load_first(p: *const f32, count: usize) -> Self {
            unsafe { _mm512_maskz_loadu_ps((1u16 << count) - 1, p) }
        }
        #[inline(always)]
        unsafe fn store_first(self, p: *mut f32, count: usize) {
            unsafe { _mm512_mask_storeu_ps(p, (1u16 << count) - 1, self) }
        }
        #[inline(always)]
        unsafe fn add(self, b: Self) -> Self {
            unsafe { _mm512_add_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn sub(self, b: Self) -> Self {
            unsafe { _mm512_sub_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul(self, b: Self) -> Self {
            unsafe { _mm512_mul_ps(self, b) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, b: Self, c: Self) -> Self {
            unsafe { _mm512_fmadd_ps(self, b, c) }
        }
        /// Pairs, then pairs of pairs within each 128-bit quarter, then the quarters.
        #[inline(always)]
        unsafe fn transpose(r: &mut Self::Block) {
            unsafe {
                let (mut lo, mut hi) = ([r[0]; 8], [r[0]; 8]);
                for i in 0..8 {
                    lo[i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    hi[i] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                // quad[g][j]: column 4 l + j of rows 4 g .. 4 g + 4 in quarter l.
                let mut quad = [[r[0]; 4]; 4];
                for g in 0..4 {
                    let (a, b, c, d) = (lo[2 * g], lo[2 * g + 1], hi[2 * g], hi[2 * g + 1]);
                    quad[g] = [
                        _mm512_shuffle_ps(a, b, 0x44),
                        _mm512_shuffle_ps(a, b, 0xEE),
                        _mm512_shuffle_ps(c, d, 0x44),
                        _mm512_shuffle_ps(c, d, 0xEE),
                    ];
                }
                for j in 0..4 {
                    let even_01 = _mm512_shuffle_f32x4(quad[0][j], quad[1][j], 0x88);
                    let odd_01 = _mm512_shuffle_f32x4(quad[0][j], quad[1][j], 0xDD);
                    let even_23 = _mm512_shuffle_f32x4(quad[2][j], quad[3][j], 0x88);
                    let odd_23 = _mm512_shuffle_f32x4(quad[2][j], quad[3][j], 0xDD);
                    r[j] = _mm512_shuffle_f32x4(even_01, even_23, 0x88);
                    r[4 + j] = _mm512_shuffle_f32x4(odd_01, odd_23, 0x88);
                    r[8 + j] = _mm512_shuffle_f32x4(even_01, even_23, 0xDD);
                    r[12 + j] = _mm512_shuffle_f32x4(odd_01, odd_23, 0xDD);
                }
            }
        }
    }
}

/// Defines an `unsafe fn` whose first type parameter is a [`Vector`], `V`. The macro prepends an argument of type
/// `V::Token`. The body is compiled with the target features of that token's level. It is an unsafe block in which
/// `V`'s methods may be called, since a token exists; everything else the function demands is the caller's promise.
macro_rules! kernel {
    (
        $(#[$meta:meta])*
        $vis:vis unsafe fn $name:ident<$v:ident $(, $t:ident: $bound:path)* $(; const $n:ident: $nt:ty)*>
        ($($arg:ident: $ty:ty),* $(,)?) $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name<$v: $crate::device::cpu::vector::Vector $(, $t: $bound)* $(, const $n: $nt)*>(
            _token: $v::Token,
            $($arg: $ty),*
        ) {
            use $crate::device::cpu::vector::Vector;

            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            unsafe fn body<$v: Vector $(, $t: $bound)* $(, const $n: $nt)*>($($arg: $ty),*) {
                // SAFETY: the caller's promise, as documented at the function; `_token` below for V's methods.
                unsafe { $body }
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512<$v: Vector $(, $t: $bound)* $(, const $n: $nt)*>($($arg: $ty),*) {
                // SAFETY: as in `body`.
                unsafe { body::<$v $(, $t)* $(, $n)*>($($arg),*) }
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2<$v: Vector $(, $t: $bound)* $(, const $n: $nt)*>($($arg: $ty),*) {
                // SAFETY: as in `body`.
                unsafe { body::<$v $(, $t)* $(, $n)*>($($arg),*) }
            }

            match <$v::Token as $crate::device::cpu::simd::Simd>::LEVEL {
                // SAFETY: `_token` exists, so the processor has the level (`Simd`'s contract) and with it the features
                // that the function is compiled with; the rest is the caller's promise.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Level::Avx512 => unsafe { avx512::<$v $(, $t)* $(, $n)*>($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Level::Avx2 => unsafe { avx2::<$v $(, $t)* $(, $n)*>($($arg),*) },
                // SAFETY: as above; nothing is enabled.
                _ => unsafe { body::<$v $(, $t)* $(, $n)*>($($arg),*) },
            }
        }
    };
}
pub(crate) use kernel;

/// `with_vector!(isa, V, token => expression)`: the expression with `V` the vector type of `isa`, an
/// [`Isa`](super::simd::Isa), and `token` its `V::Token`.
macro_rules! with_vector {
    ($isa:expr, $v:ident, $token:ident => $body:expr) => {
        match $isa {
            #[cfg(target_arch = "x86_64")]
            $crate::device::cpu::simd::Isa::Avx512($token) => {
                type $v = std::arch::x86_64::__m512;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::device::cpu::simd::Isa::Avx2($token) => {
                type $v = std::arch::x86_64::__m256;
                $body
            }
            _ => {
                type $v = $crate::device::cpu::vector::Four;
                let $token = $crate::device::cpu::simd::Portable;
                $body
            }
        }
    };
}
pub(crate) use with_vector;
