//! Vector registers as a type, for the kernels that must decide what stays in them: matrix products and the transforms of
//! Winograd's convolution. Element-wise loops need none of this; see [`super::simd`].
//!
//! Everything here is `unsafe` for one reason: the methods of a type may only run on a processor that has its
//! [`Level`]. [`kernel!`] compiles a function with that level's features, so that the methods become single
//! instructions in it; [`with_vector!`] chooses the type.

use super::simd::Level;

/// A vector register of f32.
///
/// # Safety
/// Every method requires a processor with [`Vector::LEVEL`]; pointers must be valid for the floats read or written and need no alignment.
pub(crate) trait Vector: Copy + Send + Sync + 'static {
    /// What the processor must have.
    const LEVEL: Level;
    /// Floats in one register.
    const LANES: usize;
    /// Rows of the register tile of a matrix product that is two registers wide: 28 + 2 + 1 of 32 registers, or 12 + 2 + 1 of 16.
    const ROWS: usize;
    /// `[Self; LANES]`.
    type Block: AsMut<[Self]> + Copy;

    /// Asks for the cache line of `p`, which need not be valid, ahead of its use.
    fn prefetch(p: *const f32);
    unsafe fn splat(x: f32) -> Self;
    unsafe fn zero_block() -> Self::Block;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// The first `count < LANES` lanes from memory, the others zero.
    unsafe fn load_first(p: *const f32, count: usize) -> Self;
    /// The first `count < LANES` lanes to memory.
    unsafe fn store_first(self, p: *mut f32, count: usize);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// `self * b + c`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Rows become columns; `rows` holds `LANES` registers.
    unsafe fn transpose(rows: &mut Self::Block);
}

/// Four floats in whatever registers the target has.
#[derive(Clone, Copy)]
#[repr(align(16))]
pub(crate) struct Four([f32; 4]);

impl Vector for Four {
    const LEVEL: Level = Level::Portable;
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
        // SAFETY: four floats are readable, says the caller.
        Four(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: four floats are writable, says the caller.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, count: usize) -> Self {
        let mut x = [0.0; 4];
        // SAFETY: `count < 4` floats are readable, says the caller.
        unsafe { std::ptr::copy_nonoverlapping(p, x.as_mut_ptr(), count) };
        Four(x)
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, count: usize) {
        // SAFETY: `count < 4` floats are writable, says the caller.
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
        use super::simd::{Isa, Portable};
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

    use super::{Level, Vector};

    /// Lanes below `count` are all ones.
    #[inline(always)]
    unsafe fn mask8(count: usize) -> __m256i {
        // SAFETY: AVX2 is there, says the caller.
        unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
    }

    // SAFETY, for both types: each method is the instruction of its name; the caller vouches for the processor and the
    // pointers, as the trait demands.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for __m256 {
        const LEVEL: Level = Level::Avx2;
        const LANES: usize = 8;
        const ROWS: usize = 6;
        type Block = [Self; 8];

        #[inline(always)]
        fn prefetch(p: *const f32) {
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

    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Vector for __m512 {
        const LEVEL: Level = Level::Avx512;
        const LANES: usize = 16;
        const ROWS: usize = 14;
        type Block = [Self; 16];

        #[inline(always)]
        fn prefetch(p: *const f32) {
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

/// Defines an `unsafe fn` whose first type parameter is a [`Vector`]; its body is compiled with that level's features.
/// The caller promises a processor that has them, and what the function itself demands.
macro_rules! kernel {
    (
        $(#[$meta:meta])*
        $vis:vis unsafe fn $name:ident<$v:ident $(, $t:ident: $bound:path)* $(; const $n:ident: $nt:ty)*>
        ($($arg:ident: $ty:ty),* $(,)?) $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name<$v: $crate::device::cpu::vector::Vector $(, $t: $bound)* $(, const $n: $nt)*>($($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            unsafe fn body<$v: $crate::device::cpu::vector::Vector $(, $t: $bound)* $(, const $n: $nt)*>($($arg: $ty),*) {
                // SAFETY: the caller's promise, as documented at the function.
                unsafe { $body }
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx512<$v: $crate::device::cpu::vector::Vector $(, $t: $bound)* $(, const $n: $nt)*>($($arg: $ty),*) {
                // SAFETY: as above.
                unsafe { body::<$v $(, $t)* $(, $n)*>($($arg),*) }
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            unsafe fn avx2<$v: $crate::device::cpu::vector::Vector $(, $t: $bound)* $(, const $n: $nt)*>($($arg: $ty),*) {
                // SAFETY: as above.
                unsafe { body::<$v $(, $t)* $(, $n)*>($($arg),*) }
            }

            match $v::LEVEL {
                // SAFETY: the caller promises a processor with `V::LEVEL`.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Level::Avx512 => unsafe { avx512::<$v $(, $t)* $(, $n)*>($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Level::Avx2 => unsafe { avx2::<$v $(, $t)* $(, $n)*>($($arg),*) },
                // SAFETY: as above.
                _ => unsafe { body::<$v $(, $t)* $(, $n)*>($($arg),*) },
            }
        }
    };
}
pub(crate) use kernel;

/// `with_vector!(level, V => expression)`: the expression with `V` the vector type of `level`, which the processor must have
/// (asserted).
macro_rules! with_vector {
    ($level:expr, $v:ident => $body:expr) => {{
        let level: $crate::device::cpu::simd::Level = $level;
        assert!($crate::device::cpu::simd::levels().any(|l| l == level), "this processor lacks {level:?}");
        match level {
            #[cfg(target_arch = "x86_64")]
            $crate::device::cpu::simd::Level::Avx512 => {
                type $v = std::arch::x86_64::__m512;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            $crate::device::cpu::simd::Level::Avx2 => {
                type $v = std::arch::x86_64::__m256;
                $body
            }
            _ => {
                type $v = $crate::device::cpu::vector::Four;
                $body
            }
        }
    }};
}
pub(crate) use with_vector;
