//! Matrix multiply-accumulate over a warp: `mma.sync` and `wmma.mma`, and which lane holds which element of a `wmma`
//! fragment.
//!
//! # In fragment layout
//! With lane l = 4 g + t, the accumulators of m16n8 hold rows g and g + 8, columns 2t and 2t + 1. A's register holds,
//! for each row g, four words along k in the four lanes of a quad; B's holds, for each column g, four words along k in
//! quad g. So for word j of the four, A's factor is lane j of each quad broadcast over the quad, and B's factors for
//! columns 2t and 2t + 1 are lanes 8t + j and 8t + 4 + j, the same in every quad: only these eight small vectors have
//! to be transposed. A register with 16-bit elements is two such planes, its lower halves (even k) and its upper halves
//! (odd k).
//!
//! # Numerics
//! Products of f16, bf16 and tf32 (whose 13 low bits are ignored) are exact in f32. They are added one by one in f32,
//! round to nearest, in the same order on every host: plane by plane, word by word. The hardware's order and rounding
//! differ; PTX only asks for f32's precision. f16 accumulators are f32 until the end. NaN results are canonical.
//!
//! `wmma` shapes are made of the same tiles. Which lane holds which element of a `wmma` fragment is up to the
//! implementation: here as in `mma`, and for m8n32k16 as in the transposed product.
//!
//! Refused: 4-bit and 1-bit integers, f16 m8n8k4 (Volta's), sparse products, and the f64 shapes of sm_90.

use super::form::{Ty, Unsupported};
use super::ops::{Isa, Lanes, Operands};
use super::{Fragment, Run, float, half, int};

/// What the elements are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Element {
    /// f16 pairs.
    F16,
    /// bf16 pairs.
    Bf16,
    /// tf32.
    Tf32,
    /// Bytes; whether A's and B's are signed, and whether sums saturate.
    Byte {
        /// A's bytes are signed.
        a: bool,
        /// B's bytes are signed.
        b: bool,
        /// The sum is limited to i32 rather than wrapped.
        saturate: bool,
    },
    /// f64.
    F64,
}

/// One m16n8 (or m8n8) tile: indices into the instruction's operands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tile {
    /// Destinations; of f16 accumulators two pairs, else four.
    d: [u8; 4],
    /// Accumulators.
    c: [u8; 4],
    /// For each register along k: A's for rows 0 to 7, A's for rows 8 to 15, B's.
    k: [[u8; 3]; 2],
}

/// A decoded `mma` or `wmma.mma`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Matrix {
    element: Element,
    /// Registers along k in a tile: 1 or 2.
    depth: usize,
    /// Whether there is a second half of rows.
    tall: bool,
    /// Whether C and D are f16.
    c_f16: bool,
    d_f16: bool,
    tiles: Vec<Tile>,
}

impl Matrix {
    /// See [`super::Form::spread`]: a row of A reaches its row of D, a column of B its column, an element of C itself.
    pub fn spread(&self, marked: impl Fn(usize) -> u32) -> Vec<(usize, u32)> {
        let mut result = vec![];
        for tile in &self.tiles {
            let depth = &tile.k[..self.depth];
            let quads = |which: usize| {
                let lanes = depth.iter().fold(0, |all, k| all | marked(k[which] as usize));
                (0..8).filter(|g| lanes >> (4 * g) & 15 != 0).fold(0u32, |all, g| all | 1 << g)
            };
            let spread = |quads: u32| (0..8).filter(|g| quads >> g & 1 != 0).fold(0u32, |all, g| all | 15 << (4 * g));
            let (low, high, columns) = (spread(quads(0)), if self.tall { spread(quads(1)) } else { 0 }, quads(2));
            let of_columns = |parity: u32| {
                (0..32).filter(|l| columns >> (2 * (l % 4) + parity) & 1 != 0).fold(0u32, |all, l| all | 1 << l)
            };
            // An f16 register holds both columns of a row, others one.
            let (d_rows, c_rows) = (if self.d_f16 { 1 } else { 2 }, if self.c_f16 { 1 } else { 2 });
            for rows in 0..if self.tall { 2 } else { 1 } {
                for column in 0..d_rows {
                    let mut lanes = if rows == 0 { low } else { high };
                    for parity in (0..2).filter(|parity| d_rows == 1 || *parity == column) {
                        lanes |= of_columns(parity as u32);
                        lanes |= marked(tile.c[rows * c_rows + parity.min(c_rows - 1)] as usize);
                    }
                    result.push((tile.d[rows * d_rows + column] as usize, lanes));
                }
            }
        }
        result
    }
}

/// Types of the operands and floating-point operations, for [`super::form()`].
pub struct Parsed {
    /// The decoded product.
    pub matrix: Matrix,
    /// Destinations.
    pub dst: Vec<Ty>,
    /// Sources.
    pub src: Vec<Ty>,
    /// 2 m n k.
    pub flops: u32,
    /// The elements' type, None for integers.
    pub element: Option<Ty>,
}

/// The lanes' accumulators of a tile.
type Accumulators = [[f32; 32]; 4];
/// One plane: A's rows 0 to 7, A's rows 8 to 15, B's columns.
type Plane = [[f32; 32]; 3];

/// Adds the product of one plane to the accumulators, as the module's documentation describes.
#[inline(always)]
fn multiply(c: &mut Accumulators, [low, high, b]: &Plane) {
    for j in 0..4 {
        for lane in 0..32 {
            let quad = lane & !3;
            let (even, odd) = (b[8 * (lane & 3) + j], b[8 * (lane & 3) + 4 + j]);
            c[0][lane] += low[quad + j] * even;
            c[1][lane] += low[quad + j] * odd;
            c[2][lane] += high[quad + j] * even;
            c[3][lane] += high[quad + j] * odd;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod wide {
    //! Products with AVX2 and AVX-512, in the order of additions that every host has. Written once, over vectors of 8
    //! or 16 words.

    use super::super::float;
    use super::super::ops::Operands;
    use super::{Accumulators, Element, Matrix, PLACES, Plan, Registers, RunPlan, Tile, accumulators, put};
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;

    /// f16 in const parameters of the code for vectors; 1 is bf16, 2 is tf32.
    pub const F16: u8 = 0;
    pub const BF16: u8 = 1;
    pub const TF32: u8 = 2;

    /// Planes per register along k.
    const fn parts(element: u8) -> usize {
        if element == TF32 { 1 } else { 2 }
    }

    /// A expanded, at most 4 planes: per plane, word and half of the rows, each row's word in all lanes of its quad.
    /// This and [`Columns`] are written and read through pointers from another function. As local variables the
    /// compiler would split them into registers that it does not have, unaligned stack slots, and shuffles.
    #[repr(C, align(64))]
    struct Rows([[[[f32; 32]; 2]; 4]; 4]);

    /// B expanded: per plane, for each word the columns 2t, then for each word the columns 2t + 1.
    #[repr(C, align(64))]
    struct Columns([[[[f32; 4]; 4]; 2]; 4]);

    /// Accumulators, aligned for vectors.
    #[repr(align(64))]
    struct Lines(Accumulators);

    /// Scratch space for the expanded operands.
    struct Room {
        rows: MaybeUninit<Rows>,
        columns: [MaybeUninit<Columns>; PLACES],
    }

    impl Room {
        #[inline(always)]
        fn new() -> Self {
            Room { rows: MaybeUninit::uninit(), columns: [const { MaybeUninit::uninit() }; PLACES] }
        }
    }

    /// What the rows are multiplied with: columns, and accumulators before and after.
    #[derive(Clone, Copy)]
    struct Factor {
        columns: *const Columns,
        c: [*const u32; 4],
        d: [*mut f32; 4],
    }

    impl Factor {
        /// # Safety
        /// The registers are inside the file.
        #[inline(always)]
        unsafe fn new(file: *mut u8, own: &Registers, columns: *const Columns) -> Self {
            let mut r = Factor { columns, c: [std::ptr::null(); 4], d: [std::ptr::null_mut(); 4] };
            for i in 0..4 {
                // SAFETY: guaranteed by the caller.
                unsafe {
                    r.c[i] = file.add(own.c[i] as usize).cast();
                    r.d[i] = file.add(own.d[i] as usize).cast();
                }
            }
            r
        }
    }

    /// Vectors of an instruction set.
    ///
    /// # Safety
    /// For every function: the processor supports the instruction set; pointers are to whole vectors, aligned to them.
    pub trait Wide {
        /// Words in a vector.
        const LANES: usize;
        /// Words.
        type Words: Copy;
        /// f32.
        type Floats: Copy;
        unsafe fn load(at: *const u32) -> Self::Words;
        unsafe fn zero() -> Self::Floats;
        unsafe fn floats(words: Self::Words) -> Self::Floats;
        unsafe fn load_floats(at: *const f32) -> Self::Floats;
        unsafe fn store(at: *mut f32, floats: Self::Floats);
        /// Word `J` of every four, in all four.
        unsafe fn quads<const J: i32>(floats: Self::Floats) -> Self::Floats;
        /// Four floats, repeated.
        unsafe fn repeat(four: *const f32) -> Self::Floats;
        unsafe fn multiply_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
        /// Lower or upper halves of words, or tf32, as f32.
        unsafe fn expand<const ELEMENT: u8>(words: Self::Words, upper: bool) -> Self::Floats;
        /// Vector `i` of B's words 8t + j (+ 4 where odd) of a register, with t counting faster than j.
        unsafe fn columns(register: *const u32, odd: usize, i: usize) -> Self::Words;
        unsafe fn any_nan(a: Self::Floats, b: Self::Floats) -> bool;
        unsafe fn canonical(floats: Self::Floats) -> Self::Floats;
    }

    /// Functions of [`Wide`] for an instruction set, each an `unsafe` block.
    macro_rules! vectors {
        ($set:ident, $lanes:literal, $words:ty, $floats:ty;
         $(fn $name:ident$(<const $g:ident: $gt:ty>)?($($arg:ident: $ty:ty),*) -> $ret:ty $body:block)*) => {
            pub struct $set;

            impl Wide for $set {
                const LANES: usize = $lanes;
                type Words = $words;
                type Floats = $floats;
                $(
                    #[inline(always)]
                    unsafe fn $name$(<const $g: $gt>)?($($arg: $ty),*) -> $ret {
                        // SAFETY: guaranteed by the caller, as the trait demands.
                        unsafe { $body }
                    }
                )*
            }
        };
    }

    vectors! {
        Avx512, 16, __m512i, __m512;
        fn load(at: *const u32) -> __m512i { _mm512_load_si512(at.cast()) }
        fn zero() -> __m512 { _mm512_setzero_ps() }
        fn floats(words: __m512i) -> __m512 { _mm512_castsi512_ps(words) }
        fn load_floats(at: *const f32) -> __m512 { _mm512_load_ps(at) }
        fn store(at: *mut f32, floats: __m512) -> () { _mm512_store_ps(at, floats) }
        fn quads<const J: i32>(floats: __m512) -> __m512 {
            match J {
                0 => _mm512_permute_ps::<0x00>(floats),
                1 => _mm512_permute_ps::<0x55>(floats),
                2 => _mm512_permute_ps::<0xaa>(floats),
                _ => _mm512_permute_ps::<0xff>(floats),
            }
        }
        fn repeat(four: *const f32) -> __m512 { _mm512_broadcast_f32x4(_mm_load_ps(four)) }
        fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn expand<const ELEMENT: u8>(words: __m512i, upper: bool) -> __m512 {
            match (ELEMENT, upper) {
                (BF16, false) => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)),
                (BF16, true) => _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x1_0000))),
                (F16, false) => _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)),
                (F16, true) => _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(words))),
                _ => _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x2000))),
            }
        }
        fn columns(register: *const u32, odd: usize, _i: usize) -> __m512i {
            let even = _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
            let pick = _mm512_add_epi32(even, _mm512_set1_epi32(4 * odd as i32));
            _mm512_permutex2var_epi32(Self::load(register), pick, Self::load(register.add(16)))
        }
        fn any_nan(a: __m512, b: __m512) -> bool { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, b) != 0 }
        fn canonical(floats: __m512) -> __m512 {
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(floats, floats);
            _mm512_mask_mov_ps(floats, nan, _mm512_castsi512_ps(_mm512_set1_epi32(float::NAN_F32 as i32)))
        }
    }

    vectors! {
        Avx2, 8, __m256i, __m256;
        fn load(at: *const u32) -> __m256i { _mm256_load_si256(at.cast()) }
        fn zero() -> __m256 { _mm256_setzero_ps() }
        fn floats(words: __m256i) -> __m256 { _mm256_castsi256_ps(words) }
        fn load_floats(at: *const f32) -> __m256 { _mm256_load_ps(at) }
        fn store(at: *mut f32, floats: __m256) -> () { _mm256_store_ps(at, floats) }
        fn quads<const J: i32>(floats: __m256) -> __m256 {
            match J {
                0 => _mm256_permute_ps::<0x00>(floats),
                1 => _mm256_permute_ps::<0x55>(floats),
                2 => _mm256_permute_ps::<0xaa>(floats),
                _ => _mm256_permute_ps::<0xff>(floats),
            }
        }
        fn repeat(four: *const f32) -> __m256 { _mm256_broadcast_ps(&*four.cast()) }
        fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        fn expand<const ELEMENT: u8>(words: __m256i, upper: bool) -> __m256 {
            let halves = match (ELEMENT, upper) {
                (BF16, false) => return _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)),
                (BF16, true) => return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-0x1_0000))),
                (F16, false) => _mm256_and_si256(words, _mm256_set1_epi32(0xffff)),
                (F16, true) => _mm256_srli_epi32::<16>(words),
                _ => return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-0x2000))),
            };
            let (low, high) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
            _mm256_cvtph_ps(_mm_packus_epi32(low, high))
        }
        fn columns(register: *const u32, odd: usize, i: usize) -> __m256i {
            let at = register.add(4 * odd).cast::<__m128i>();
            let (a, b) = (_mm_load_si128(at), _mm_load_si128(at.add(2)));
            let (c, d) = (_mm_load_si128(at.add(4)), _mm_load_si128(at.add(6)));
            let (ab, cd) = match i {
                0 => (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d)),
                _ => (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d)),
            };
            _mm256_set_m128i(_mm_unpackhi_epi64(ab, cd), _mm_unpacklo_epi64(ab, cd))
        }
        fn any_nan(a: __m256, b: __m256) -> bool { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, b)) != 0 }
        fn canonical(floats: __m256) -> __m256 {
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(floats, floats);
            _mm256_blendv_ps(floats, _mm256_castsi256_ps(_mm256_set1_epi32(float::NAN_F32 as i32)), nan)
        }
    }

    /// Compiles a body as a separate function for each instruction set.
    macro_rules! compiled {
        ($(#[$doc:meta])* fn $name:ident<$(const $g:ident: $gt:ty),*>($($arg:ident: $ty:ty),*) = $body:ident) => {
            $(#[$doc])*
            ///
            /// # Safety
            /// Registers are inside the file, pointers valid, those that are read point to initialised memory; the
            /// processor supports W's instruction set.
            #[inline(always)]
            unsafe fn $name<W: Wide, $(const $g: $gt),*>($($arg: $ty),*) {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
                #[inline(never)]
                unsafe fn avx512<$(const $g: $gt),*>($($arg: $ty),*) {
                    // SAFETY: guaranteed by the caller.
                    unsafe { $body::<Avx512, $($g),*>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
                #[inline(never)]
                unsafe fn avx2<$(const $g: $gt),*>($($arg: $ty),*) {
                    // SAFETY: guaranteed by the caller.
                    unsafe { $body::<Avx2, $($g),*>($($arg),*) }
                }
                // SAFETY: guaranteed by the caller; W's instruction set is the one selected.
                unsafe {
                    match W::LANES {
                        16 => avx512::<$($g),*>($($arg),*),
                        _ => avx2::<$($g),*>($($arg),*),
                    }
                }
            }
        };
    }

    compiled! {
        /// Expands A.
        fn spread_rows<const ELEMENT: u8, const DEPTH: usize>(file: *mut u8, a: [u32; 4], to: *mut Rows) = rows_body
    }

    #[inline(always)]
    unsafe fn rows_body<W: Wide, const ELEMENT: u8, const DEPTH: usize>(file: *mut u8, a: [u32; 4], to: *mut Rows) {
        for k in 0..DEPTH {
            for half in 0..2 {
                for at in (0..32).step_by(W::LANES) {
                    // SAFETY: guaranteed by the caller. A register is 32 words, and so is a row of `Rows`; `at` is
                    // below 32.
                    unsafe {
                        let words = W::load(file.add(a[2 * k + half] as usize).cast::<u32>().add(at));
                        for part in 0..parts(ELEMENT) {
                            let row = W::expand::<ELEMENT>(words, part == 1);
                            let word = &raw mut (*to).0[k * parts(ELEMENT) + part];
                            W::store((&raw mut (*word)[0][half][at]).cast(), W::quads::<0>(row));
                            W::store((&raw mut (*word)[1][half][at]).cast(), W::quads::<1>(row));
                            W::store((&raw mut (*word)[2][half][at]).cast(), W::quads::<2>(row));
                            W::store((&raw mut (*word)[3][half][at]).cast(), W::quads::<3>(row));
                        }
                    }
                }
            }
        }
    }

    compiled! {
        /// Expands B.
        fn spread_columns<const ELEMENT: u8, const DEPTH: usize>(
            file: *mut u8, b: [u32; 2], to: *mut Columns
        ) = columns_body
    }

    #[inline(always)]
    unsafe fn columns_body<W: Wide, const ELEMENT: u8, const DEPTH: usize>(
        file: *mut u8,
        b: [u32; 2],
        to: *mut Columns,
    ) {
        for k in 0..DEPTH {
            for odd in 0..2 {
                for i in 0..16 / W::LANES {
                    // SAFETY: guaranteed by the caller. A register is 32 words, of which 16 belong to one parity.
                    unsafe {
                        let words = W::columns(file.add(b[k] as usize).cast(), odd, i);
                        for part in 0..parts(ELEMENT) {
                            let column: *mut f32 = (&raw mut (*to).0[k * parts(ELEMENT) + part][odd]).cast();
                            W::store(column.add(W::LANES * i), W::expand::<ELEMENT>(words, part == 1));
                        }
                    }
                }
            }
        }
    }

    compiled! {
        /// Adds the products of the rows with N factors to their C. Every C is read before any D is written.
        fn multiply<const ELEMENT: u8, const DEPTH: usize, const N: usize>(
            rows: *const Rows, factors: [Factor; N]
        ) = multiply_body
    }

    /// Two vectors of lanes at a time: the eight sums of a factor stay in registers and suffice to keep the multipliers
    /// busy. With two factors each row is loaded once for four products, for which AVX-512 has enough registers.
    #[inline(always)]
    unsafe fn multiply_body<W: Wide, const ELEMENT: u8, const DEPTH: usize, const N: usize>(
        rows: *const Rows,
        factors: [Factor; N],
    ) {
        for first in (0..32).step_by(2 * W::LANES) {
            // SAFETY: guaranteed by the caller; `first` and the vectors after it are below 32 lanes.
            unsafe {
                let mut sums = [[[W::zero(); 2]; 4]; N];
                for n in 0..N {
                    for i in 0..4 {
                        for v in 0..2 {
                            sums[n][i][v] = W::floats(W::load(factors[n].c[i].add(first + W::LANES * v)));
                        }
                    }
                }
                for plane in 0..DEPTH * parts(ELEMENT) {
                    for j in 0..4 {
                        let words = &raw const (*rows).0[plane][j];
                        let mut row = [[W::zero(); 2]; 2];
                        for half in 0..2 {
                            for v in 0..2 {
                                row[half][v] = W::load_floats((&raw const (*words)[half][first + W::LANES * v]).cast());
                            }
                        }
                        for n in 0..N {
                            let columns = &raw const (*factors[n].columns).0[plane];
                            for odd in 0..2 {
                                let column = W::repeat((&raw const (*columns)[odd][j]).cast());
                                for half in 0..2 {
                                    for v in 0..2 {
                                        let sum = &mut sums[n][2 * half + odd][v];
                                        *sum = W::multiply_add(row[half][v], column, *sum);
                                    }
                                }
                            }
                        }
                    }
                }
                for n in 0..N {
                    let mut nan = false;
                    for i in 0..4 {
                        nan |= W::any_nan(sums[n][i][0], sums[n][i][1]);
                    }
                    if nan {
                        for i in 0..4 {
                            sums[n][i] = [W::canonical(sums[n][i][0]), W::canonical(sums[n][i][1])];
                        }
                    }
                }
                for n in 0..N {
                    for i in 0..4 {
                        W::store(factors[n].d[i].add(first), sums[n][i][0]);
                        W::store(factors[n].d[i].add(first + W::LANES), sums[n][i][1]);
                    }
                }
            }
        }
    }

    /// One tile on its own.
    ///
    /// # Safety
    /// The operands are those of the form; the processor supports W's instruction set.
    #[inline(always)]
    pub unsafe fn tile<W: Wide, const ELEMENT: u8, const DEPTH: usize>(m: &Matrix, o: &Operands, tile: &Tile) {
        let mut room = Room::new();
        // SAFETY: guaranteed by the caller. `rows` and `columns[0]` are filled before they are read; `lines` outlives
        // `factor`.
        unsafe {
            let own = Registers::new(tile, |i| o.at.add(i).read());
            spread_rows::<W, ELEMENT, DEPTH>(o.registers, own.a, room.rows.as_mut_ptr());
            spread_columns::<W, ELEMENT, DEPTH>(o.registers, own.b, room.columns[0].as_mut_ptr());
            let mut lines = Lines(accumulators(m, o, tile));
            let sums = &raw mut lines.0;
            let mut factor =
                Factor { columns: room.columns[0].as_ptr(), c: [std::ptr::null(); 4], d: [std::ptr::null_mut(); 4] };
            for i in 0..4 {
                factor.d[i] = (&raw mut (*sums)[i]).cast();
                factor.c[i] = factor.d[i].cast_const().cast();
            }
            multiply::<W, ELEMENT, DEPTH, 1>(room.rows.as_ptr(), [factor]);
            put(m, o, tile, &lines.0);
        }
    }

    /// Executes the tiles of a plan for all lanes, reading and writing registers in place.
    ///
    /// # Safety
    /// The registers are inside the file; the processor supports W's instruction set.
    #[inline(always)]
    unsafe fn planned<W: Wide, const ELEMENT: u8, const DEPTH: usize>(plan: &Plan, file: *mut u8) {
        let tiles = &plan.tiles[..];
        let mut room = Room::new();
        // Raw pointers throughout: a reference to a part of the room would end the validity of pointers made before.
        let rows = (&raw const room.rows).cast::<Rows>();
        let mut i = 0;
        // SAFETY: guaranteed by the caller. The plan sets `spread_a` and `spread_b` where a factor is first needed, so
        // everything read has been filled; `place` is below PLACES; a tile with `pair` has a successor.
        unsafe {
            while i < tiles.len() {
                let own = &tiles[i];
                if own.spread_a {
                    spread_rows::<W, ELEMENT, DEPTH>(file, own.registers.a, (&raw mut room.rows).cast());
                }
                let columns = (&raw mut room.columns).cast::<Columns>().add(own.place);
                if own.spread_b {
                    spread_columns::<W, ELEMENT, DEPTH>(file, own.registers.b, columns);
                }
                let factor = Factor::new(file, &own.registers, columns);
                i += 1;
                if W::LANES == 16 && own.pair {
                    let next = &tiles[i];
                    let columns = (&raw mut room.columns).cast::<Columns>().add(next.place);
                    if next.spread_b {
                        spread_columns::<W, ELEMENT, DEPTH>(file, next.registers.b, columns);
                    }
                    multiply::<W, ELEMENT, DEPTH, 2>(rows, [factor, Factor::new(file, &next.registers, columns)]);
                    i += 1;
                } else {
                    multiply::<W, ELEMENT, DEPTH, 1>(rows, [factor]);
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
    unsafe fn planned_avx512<const ELEMENT: u8, const DEPTH: usize>(plan: &Plan, file: *mut u8) {
        // SAFETY: guaranteed by the caller.
        unsafe { planned::<Avx512, ELEMENT, DEPTH>(plan, file) }
    }

    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
    unsafe fn planned_avx2<const ELEMENT: u8, const DEPTH: usize>(plan: &Plan, file: *mut u8) {
        // SAFETY: guaranteed by the caller.
        unsafe { planned::<Avx2, ELEMENT, DEPTH>(plan, file) }
    }

    /// The functions that execute the plans of a form; none on the portable path.
    pub fn runs(m: &Matrix) -> [Option<RunPlan>; 3] {
        macro_rules! runs {
            ($element:ident) => {
                match m.depth {
                    2 => [None, Some(planned_avx2::<$element, 2>), Some(planned_avx512::<$element, 2>)],
                    _ => [None, Some(planned_avx2::<$element, 1>), Some(planned_avx512::<$element, 1>)],
                }
            };
        }
        match m.element {
            Element::Bf16 => runs!(BF16),
            Element::F16 if !m.c_f16 && !m.d_f16 => runs!(F16),
            Element::Tf32 => runs!(TF32),
            _ => [None; 3],
        }
    }
}

/// Number of B factors that a plan remembers: those of 64 columns.
const PLACES: usize = 8;

/// The registers of a tile, as offsets. Tiles of half depth name A's and B's twice.
#[derive(Clone, Copy, Debug)]
struct Registers {
    d: [u32; 4],
    a: [u32; 4],
    b: [u32; 2],
    c: [u32; 4],
}

impl Registers {
    /// From a tile and the instruction's operands.
    #[inline(always)]
    fn new(tile: &Tile, operand: impl Fn(usize) -> u32) -> Self {
        let mut r = Registers { d: [0; 4], a: [0; 4], b: [0; 2], c: [0; 4] };
        for i in 0..4 {
            r.d[i] = operand(tile.d[i].into());
            r.c[i] = operand(tile.c[i].into());
            r.a[i] = operand(tile.k[i / 2][i % 2].into());
        }
        for k in 0..2 {
            r.b[k] = operand(tile.k[k][2].into());
        }
        r
    }
}

/// A tile in a [`Plan`].
#[derive(Clone, Copy, Debug)]
pub struct Planned {
    registers: Registers,
    /// A has not been expanded yet, or its registers have been written since.
    spread_a: bool,
    /// Likewise B.
    spread_b: bool,
    /// Slot of B's columns.
    place: usize,
    /// The next tile has the same A and does not read this one's D: both can be multiplied together.
    pair: bool,
}

/// Executes a plan on a warp's register file.
///
/// # Safety
/// The operands that the plan was made from are inside the file; the processor supports the instruction set.
pub type RunPlan = unsafe fn(plan: &Plan, file: *mut u8);

/// What is known of a run of products before it executes. The tiles of a warp's product share A and B factors, which
/// are expanded into vectors once; tiles with the same A are multiplied together.
#[derive(Debug)]
pub struct Plan {
    tiles: Vec<Planned>,
    /// Portable, AVX2, AVX-512; `None` where the instructions must be executed one by one.
    pub run: [Option<RunPlan>; 3],
}

impl Matrix {
    /// See [`super::Form::plan`].
    pub fn plan(&self, operands: &[u32], stride: usize) -> Plan {
        #[cfg(not(target_arch = "x86_64"))]
        let run = [None; 3];
        #[cfg(target_arch = "x86_64")]
        let run = wide::runs(self);
        let mut tiles = Vec::<Planned>::new();
        // What has been expanded, and the slot that is overwritten next.
        let (mut a, mut b, mut next) = (None, [None; PLACES], 0);
        for (operands, tile) in operands.chunks_exact(stride).flat_map(|o| self.tiles.iter().map(move |tile| (o, tile)))
        {
            let registers = Registers::new(tile, |i| operands[i]);
            let known = b.iter().position(|b| *b == Some(registers.b));
            let place = known.unwrap_or_else(|| {
                // Not the slot of the previous tile, which may be multiplied together with this one.
                next = (next + 1) % PLACES;
                if tiles.last().is_some_and(|last| last.place == next) {
                    next = (next + 1) % PLACES;
                }
                next
            });
            let spread_a = a != Some(registers.a);
            if let Some(last) = tiles.last_mut() {
                let d = last.registers.d;
                let needs = |of: &[u32]| of.iter().any(|register| d.contains(register));
                let free = !needs(&registers.a) && !needs(&registers.b) && !needs(&registers.c);
                last.pair = !spread_a && free;
            }
            tiles.push(Planned { registers, spread_a, spread_b: known.is_none(), place, pair: false });
            a = Some(registers.a);
            b[place] = Some(registers.b);
            // D may overwrite what was expanded.
            let lost = |of: &[u32]| of.iter().any(|register| registers.d.contains(register));
            a = a.filter(|a| !lost(a));
            b = b.map(|b| b.filter(|b| !lost(b)));
        }
        Plan { tiles, run }
    }
}

/// Lower and upper halves of a register of 16-bit floats, or a register of tf32.
#[inline(always)]
fn halves<const BF: bool>(words: &Lanes) -> [[f32; 32]; 2] {
    let mut r = [[0.0; 32]; 2];
    for i in 0..32 {
        r[0][i] = half::widen::<BF>(words[i] & 0xffff);
        r[1][i] = if BF { f32::from_bits(words[i] & 0xffff_0000) } else { half::f16_to_f32(words[i] >> 16) };
    }
    r
}

/// The two planes of a register along k: even k, odd k.
///
/// # Safety
/// The operands are those of the form.
#[inline(always)]
unsafe fn planes<const BF: bool>(o: &Operands, registers: [u8; 3]) -> [Plane; 2] {
    let mut planes = [[[0.0; 32]; 3]; 2];
    for (x, register) in registers.into_iter().enumerate() {
        // SAFETY: guaranteed by the caller.
        let words = unsafe { o.b32(register as usize) };
        let [even, odd] = halves::<BF>(words);
        planes[0][x] = even;
        planes[1][x] = odd;
    }
    planes
}

/// Reads a tile's accumulators as f32.
///
/// # Safety
/// The operands are those of the form.
#[inline(always)]
unsafe fn accumulators(m: &Matrix, o: &Operands, tile: &Tile) -> Accumulators {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if m.c_f16 {
            let (top, bottom) =
                (halves::<false>(o.b32(tile.c[0] as usize)), halves::<false>(o.b32(tile.c[1] as usize)));
            [top[0], top[1], bottom[0], bottom[1]]
        } else {
            tile.c.map(|i| {
                let words = o.b32(i as usize);
                let mut r = [0.0; 32];
                for lane in 0..32 {
                    r[lane] = f32::from_bits(words[lane]);
                }
                r
            })
        }
    }
}

/// Writes a tile's accumulators.
///
/// # Safety
/// The operands are those of the form.
#[inline(always)]
unsafe fn put(m: &Matrix, o: &Operands, tile: &Tile, c: &Accumulators) {
    let mut r = [0; 32];
    // SAFETY: guaranteed by the caller.
    unsafe {
        if m.d_f16 {
            for i in 0..2 {
                for lane in 0..32 {
                    r[lane] = half::f16_from_f32(c[2 * i][lane]) | half::f16_from_f32(c[2 * i + 1][lane]) << 16;
                }
                o.put32(tile.d[i] as usize, &r);
            }
        } else {
            for i in 0..4 {
                for lane in 0..32 {
                    r[lane] = float::bits(c[i][lane]);
                }
                o.put32(tile.d[i] as usize, &r);
            }
        }
    }
}

/// A product of 16-bit floats, `DEPTH` registers deep. All of a tile's C is read before any of its D is written, since
/// they may share registers.
///
/// # Safety
/// The operands are those of the form.
#[inline(always)]
unsafe fn halves_product<const BF: bool, const DEPTH: usize>(m: &Matrix, o: &Operands) {
    for tile in &m.tiles {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut c = accumulators(m, o, tile);
            let planes = std::array::from_fn::<_, DEPTH, _>(|k| planes::<BF>(o, tile.k[k]));
            planes.as_flattened().iter().for_each(|plane| multiply(&mut c, plane));
            put(m, o, tile, &c);
        }
    }
}

/// A product of tf32.
///
/// # Safety
/// The operands are those of the form.
#[inline(always)]
unsafe fn tf32_product<const DEPTH: usize>(m: &Matrix, o: &Operands) {
    for tile in &m.tiles {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let mut c = accumulators(m, o, tile);
            let mut planes = [[[0.0; 32]; 3]; 2];
            for k in 0..DEPTH {
                for x in 0..3 {
                    let words = o.b32(tile.k[k][x] as usize);
                    for lane in 0..32 {
                        planes[k][x][lane] = f32::from_bits(words[lane] & 0xffff_e000);
                    }
                }
            }
            planes[..DEPTH].iter().for_each(|plane| multiply(&mut c, plane));
            put(m, o, tile, &c);
        }
    }
}

/// A product of bytes.
///
/// # Safety
/// The operands are those of the form.
#[inline(always)]
unsafe fn bytes_product(m: &Matrix, o: &Operands, a_signed: bool, b_signed: bool, saturate: bool) {
    for tile in &m.tiles {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let rows = if m.tall { 2 } else { 1 };
            let mut sums = [[0u32; 32]; 4];
            for k in 0..m.depth {
                let b = o.b32(tile.k[k][2] as usize);
                for half in 0..rows {
                    let a = o.b32(tile.k[k][half] as usize);
                    for j in 0..4 {
                        for lane in 0..32 {
                            let (quad, column) = (lane & !3, 8 * (lane & 3));
                            for odd in 0..2 {
                                let sum = &mut sums[2 * half + odd][lane];
                                *sum = int::dp4a(a_signed, b_signed, a[quad + j], b[column + 4 * odd + j], *sum);
                            }
                        }
                    }
                }
            }
            for i in 0..2 * rows {
                let c = o.b32(tile.c[i] as usize);
                for lane in 0..32 {
                    let (sum, c) = (sums[i][lane] as i32, c[lane] as i32);
                    sums[i][lane] = if saturate { sum.saturating_add(c) } else { sum.wrapping_add(c) } as u32;
                }
            }
            for i in 0..2 * rows {
                o.put32(tile.d[i] as usize, &sums[i]);
            }
        }
    }
}

/// m8n8k4 of f64.
///
/// # Safety
/// The operands are those of the form.
#[inline(always)]
unsafe fn f64_product(m: &Matrix, o: &Operands) {
    for tile in &m.tiles {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let (a, b) = (o.b64(tile.k[0][0] as usize), o.b64(tile.k[0][2] as usize));
            let mut sums = [*o.b64(tile.c[0] as usize), *o.b64(tile.c[1] as usize)];
            for j in 0..4 {
                for lane in 0..32 {
                    for odd in 0..2 {
                        let sum = &mut sums[odd][lane];
                        let factor = f64::from_bits(b[8 * (lane & 3) + 4 * odd + j]);
                        *sum = f64::from_bits(a[(lane & !3) + j]).mul_add(factor, f64::from_bits(*sum)).to_bits();
                    }
                }
            }
            o.put64(tile.d[0] as usize, &sums[0]);
            o.put64(tile.d[1] as usize, &sums[1]);
        }
    }
}

/// A product of floats of at most 32 bits with vector instructions. False if the processor or the form has none.
///
/// # Safety
/// The operands are those of the form; the processor supports I.
#[inline(always)]
unsafe fn by_vectors<I: Isa>(m: &Matrix, o: &Operands) -> bool {
    #[cfg(target_arch = "x86_64")]
    if I::FMA {
        use wide::{Avx2, Avx512, BF16, F16, TF32};
        for tile in &m.tiles {
            // SAFETY: guaranteed by the caller.
            unsafe {
                match (m.element, m.depth, I::AVX512) {
                    (Element::Bf16, 2, true) => wide::tile::<Avx512, BF16, 2>(m, o, tile),
                    (Element::Bf16, 2, false) => wide::tile::<Avx2, BF16, 2>(m, o, tile),
                    (Element::Bf16, _, true) => wide::tile::<Avx512, BF16, 1>(m, o, tile),
                    (Element::Bf16, _, false) => wide::tile::<Avx2, BF16, 1>(m, o, tile),
                    (Element::F16, 2, true) => wide::tile::<Avx512, F16, 2>(m, o, tile),
                    (Element::F16, 2, false) => wide::tile::<Avx2, F16, 2>(m, o, tile),
                    (Element::F16, _, true) => wide::tile::<Avx512, F16, 1>(m, o, tile),
                    (Element::F16, _, false) => wide::tile::<Avx2, F16, 1>(m, o, tile),
                    (Element::Tf32, 2, true) => wide::tile::<Avx512, TF32, 2>(m, o, tile),
                    (Element::Tf32, 2, false) => wide::tile::<Avx2, TF32, 2>(m, o, tile),
                    (Element::Tf32, _, true) => wide::tile::<Avx512, TF32, 1>(m, o, tile),
                    (Element::Tf32, _, false) => wide::tile::<Avx2, TF32, 1>(m, o, tile),
                    _ => return false,
                }
            }
        }
        return true;
    }
    false
}

/// Any product.
///
/// # Safety
/// The operands are those of the form; the processor supports I.
#[inline(always)]
unsafe fn product<I: Isa>(m: &Matrix, o: &Operands) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if by_vectors::<I>(m, o) {
            return;
        }
        match (m.element, m.depth) {
            (Element::Bf16, 2) => halves_product::<true, 2>(m, o),
            (Element::Bf16, _) => halves_product::<true, 1>(m, o),
            (Element::F16, 2) => halves_product::<false, 2>(m, o),
            (Element::F16, _) => halves_product::<false, 1>(m, o),
            (Element::Tf32, 2) => tf32_product::<2>(m, o),
            (Element::Tf32, _) => tf32_product::<1>(m, o),
            (Element::Byte { a, b, saturate }, _) => bytes_product(m, o, a, b, saturate),
            (Element::F64, _) => f64_product(m, o),
        }
    }
}

macro_rules! runner {
    ($name:ident, $isa:ident $(, $feature:literal)?) => {
        $(#[target_feature(enable = $feature)])?
        unsafe fn $name(f: &super::Form, registers: *mut u8, operands: *const u32, count: usize, mask: u32) {
            let Some(m) = &f.detail.matrix else { unreachable!("a form of this module") };
            for i in 0..count {
                // SAFETY: the caller passes `count` times the form's operands, and runs on a processor with these
                // features.
                unsafe {
                    let at = operands.add(i * f.detail.operands);
                    product::<super::ops::$isa>(m, &Operands { registers, at, mask })
                }
            }
        }
    };
}

runner!(portable, Portable);
#[cfg(target_arch = "x86_64")]
runner!(avx2, Avx2, "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt");
#[cfg(target_arch = "x86_64")]
runner!(avx512, Avx512, "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt");

/// The compiled functions: portable, AVX2, AVX-512.
#[cfg(target_arch = "x86_64")]
pub const RUNS: [Run; 3] = [portable, avx2, avx512];
/// The compiled function, three times.
#[cfg(not(target_arch = "x86_64"))]
pub const RUNS: [Run; 3] = [portable; 3];

/// Decodes `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32` or `wmma.mma.sync.aligned.row.col.m16n16k16.f32.f32`.
///
/// # Errors
/// Names what is not supported.
pub fn parse(text: &str) -> Result<Parsed, Unsupported> {
    let refuse = |why: &str| Unsupported(format!("instruction {text} {why}"));
    let mut words: Vec<&str> = text.split('.').collect();
    let wmma = words.first() == Some(&"wmma");
    words.drain(..if wmma { 2 } else { 1 });
    let mut take = |word: &str| words.iter().position(|w| *w == word).map(|i| words.remove(i)).is_some();
    if !take("sync") || !take("aligned") {
        return Err(refuse("needs .sync.aligned"));
    }
    let saturate = take("satfinite");
    take("rn");
    let (rows, columns) =
        (words.iter().filter(|w| **w == "row").count(), words.iter().filter(|w| **w == "col").count());
    if rows + columns != 2 || (!wmma && (rows, columns) != (1, 1)) {
        return Err(refuse("needs the layouts of both matrices, for mma .row.col"));
    }
    words.retain(|w| *w != "row" && *w != "col");
    let [shape, ref types @ ..] = words[..] else {
        return Err(refuse("needs a shape"));
    };
    let types: Option<Vec<Ty>> = types.iter().map(|t| Ty::parse(t)).collect();
    let types = types.ok_or_else(|| refuse("has a type that is not supported"))?;
    let (d, a, b, c) = match types[..] {
        [d, a, b, c] => (d, a, b, c),
        // wmma of f16 names the accumulators only.
        [d, c] if wmma => (d, Ty::F16, Ty::F16, c),
        _ => return Err(refuse("needs the types of all four matrices")),
    };
    let byte = |ty: Ty| matches!(ty, Ty::U8 | Ty::S8);
    let element = match (a, b) {
        (Ty::F16, Ty::F16) => Element::F16,
        (Ty::Bf16, Ty::Bf16) => Element::Bf16,
        (Ty::Tf32, Ty::Tf32) => Element::Tf32,
        (Ty::F64, Ty::F64) => Element::F64,
        (a, b) if byte(a) && byte(b) => Element::Byte { a: a == Ty::S8, b: b == Ty::S8, saturate },
        _ => return Err(refuse("has element types that are not supported")),
    };
    if saturate && !matches!(element, Element::Byte { .. }) {
        return Err(refuse("takes .satfinite with integers only"));
    }
    let accumulator = |ty: Ty| match element {
        Element::F16 => matches!(ty, Ty::F16 | Ty::F32),
        Element::Bf16 | Element::Tf32 => ty == Ty::F32,
        Element::F64 => ty == Ty::F64,
        Element::Byte { .. } => ty == Ty::S32,
    };
    if !accumulator(c) || !accumulator(d) {
        return Err(refuse("has accumulators of a type that is not supported"));
    }
    let (c_f16, d_f16) = (c == Ty::F16, d == Ty::F16);

    // Registers of A and of B; registers along k in a tile; whether a tile has 16 rows.
    let (a_registers, b_registers, depth, tall) = match (wmma, shape, element) {
        (false, "m16n8k16", Element::F16 | Element::Bf16) => (4, 2, 2, true),
        (false, "m16n8k8", Element::F16 | Element::Bf16) => (2, 1, 1, true),
        (false, "m16n8k8", Element::Tf32) => (4, 2, 2, true),
        (false, "m16n8k4", Element::Tf32) => (2, 1, 1, true),
        (false, "m16n8k32", Element::Byte { .. }) => (4, 2, 2, true),
        (false, "m16n8k16", Element::Byte { .. }) => (2, 1, 1, true),
        (false, "m8n8k16", Element::Byte { .. }) => (1, 1, 1, false),
        (_, "m8n8k4", Element::F64) => (1, 1, 1, false),
        (true, "m16n16k16" | "m32n8k16" | "m8n32k16", Element::F16) => (8, 8, 2, true),
        (true, "m16n16k16", Element::Bf16) => (4, 4, 2, true),
        (true, "m32n8k16", Element::Bf16) => (8, 2, 2, true),
        (true, "m8n32k16", Element::Bf16) => (2, 8, 2, true),
        (true, "m16n16k8", Element::Tf32) => (4, 4, 2, true),
        (true, "m16n16k16", Element::Byte { .. }) => (2, 2, 1, true),
        (true, "m32n8k16", Element::Byte { .. }) => (4, 1, 1, true),
        (true, "m8n32k16", Element::Byte { .. }) => (1, 4, 1, true),
        _ => return Err(refuse("has a shape that is not supported for these types")),
    };
    let per_tile = |f16: bool| if !tall || f16 { 2u8 } else { 4 };
    let tiles = if wmma && tall { 2 } else { 1 };
    let (d_registers, c_registers) = (tiles * per_tile(d_f16), tiles * per_tile(c_f16));
    let a_at = d_registers;
    let b_at = a_at + a_registers;
    let c_at = b_at + b_registers;
    let tiles = (0..tiles)
        .map(|tile| {
            let deep = depth as u8;
            // First registers of the tile's two factors: the tall one has 2 per register along k.
            let (tall_at, flat_at) = match shape {
                "m16n16k16" | "m16n16k8" => (a_at, b_at + tile * deep),
                "m32n8k16" => (a_at + tile * 2 * deep, b_at),
                // D^T = B^T A^T: the tall factor is B's.
                "m8n32k16" => (b_at + tile * 2 * deep, a_at),
                _ => (a_at, b_at),
            };
            let second = if tall { 1 } else { 0 };
            let step = if tall { 2 } else { 1 };
            let k = [0, if depth == 2 { 1 } else { 0 }]
                .map(|k| [tall_at + step * k, tall_at + step * k + second, flat_at + k]);
            let four = |at: u8, per: u8| [0, 1, 2, 3].map(|i| at + tile * per + if i < per { i } else { 0 });
            Tile { d: four(0, per_tile(d_f16)), c: four(c_at, per_tile(c_f16)), k }
        })
        .collect();
    let numbers: Vec<u32> = shape.split(['m', 'n', 'k']).filter_map(|n| n.parse().ok()).collect();
    let word = if element == Element::F64 { Ty::F64 } else { Ty::B32 };
    let accumulator = |ty: Ty| match ty {
        Ty::F64 | Ty::F32 => ty,
        _ => Ty::B32,
    };
    let mut src = vec![word; (a_registers + b_registers) as usize];
    src.extend(vec![accumulator(c); c_registers as usize]);
    // The bytes' signs follow the factors when the product is transposed.
    let element = match element {
        Element::Byte { a, b, saturate } if shape == "m8n32k16" => Element::Byte { a: b, b: a, saturate },
        other => other,
    };
    Ok(Parsed {
        matrix: Matrix { element, depth, tall, c_f16, d_f16, tiles },
        dst: vec![accumulator(d); d_registers as usize],
        src,
        flops: 2 * numbers.iter().product::<u32>(),
        element: (!byte(a)).then_some(a),
    })
}

// Where a fragment's elements are held: (lane, register, element of the register) -> (row, column), as in `mma`.

/// A tall factor with 16-bit elements: rows x 16 along k, four registers per 16 rows, and again from register 4 on.
fn tall_16(lane: u32, register: u32, element: u32) -> (u32, u32) {
    let (g, t) = (lane / 4, lane % 4);
    (g + 8 * (register & 1) + 16 * (register / 4), 2 * t + element + 8 * (register / 2 & 1))
}

/// The same for 16 rows, where registers from 4 on repeat the first four.
fn tall_16_repeated(lane: u32, register: u32, element: u32) -> (u32, u32) {
    tall_16(lane, register & 3, element)
}

/// A flat factor with 16-bit elements: 16 along k x columns, two registers per 8 columns.
fn flat_16(lane: u32, register: u32, element: u32) -> (u32, u32) {
    let (g, t) = (lane / 4, lane % 4);
    (2 * t + element + 8 * (register & 1), g + 8 * (register / 2))
}

/// The same for 16 columns, where registers from 4 on repeat the first four.
fn flat_16_repeated(lane: u32, register: u32, element: u32) -> (u32, u32) {
    flat_16(lane, register & 3, element)
}

/// The same for 8 columns, where registers from 2 on repeat the first two.
fn flat_16_single(lane: u32, register: u32, element: u32) -> (u32, u32) {
    flat_16(lane, register & 1, element)
}

/// tf32: 16 rows x 8 along k.
fn tall_32(lane: u32, register: u32, _: u32) -> (u32, u32) {
    (lane / 4 + 8 * (register & 1), lane % 4 + 4 * (register / 2))
}

/// tf32: 8 along k x 16 columns.
fn flat_32(lane: u32, register: u32, _: u32) -> (u32, u32) {
    (lane % 4 + 4 * (register & 1), lane / 4 + 8 * (register / 2))
}

/// Bytes: rows x 16 along k, two registers per 16 rows.
fn tall_8(lane: u32, register: u32, element: u32) -> (u32, u32) {
    (lane / 4 + 8 * register, 4 * (lane % 4) + element)
}

/// Bytes: 16 along k x columns, one register per 8 columns.
fn flat_8(lane: u32, register: u32, element: u32) -> (u32, u32) {
    (4 * (lane % 4) + element, lane / 4 + 8 * register)
}

/// Accumulators, 32 bits: tiles beside each other.
fn sum_wide(lane: u32, register: u32, _: u32) -> (u32, u32) {
    (lane / 4 + 8 * (register / 2 & 1), 2 * (lane % 4) + (register & 1) + 8 * (register / 4))
}

/// Accumulators, 32 bits: tiles below each other.
fn sum_tall(lane: u32, register: u32, _: u32) -> (u32, u32) {
    (lane / 4 + 8 * (register / 2), 2 * (lane % 4) + (register & 1))
}

/// Accumulators, f16 pairs: tiles beside each other.
fn sum_16_wide(lane: u32, register: u32, element: u32) -> (u32, u32) {
    (lane / 4 + 8 * (register & 1), 2 * (lane % 4) + element + 8 * (register / 2))
}

/// Accumulators, f16 pairs: tiles below each other.
fn sum_16_tall(lane: u32, register: u32, element: u32) -> (u32, u32) {
    (lane / 4 + 8 * register, 2 * (lane % 4) + element)
}

/// Rows and columns exchanged: for m8n32k16, which is computed transposed.
fn exchanged<const WHICH: u8>(lane: u32, register: u32, element: u32) -> (u32, u32) {
    let (row, column) = match WHICH {
        0 => flat_16_single(lane, register, element),
        1 => tall_16(lane, register, element),
        2 => flat_8(lane, register, element),
        3 => tall_8(lane, register, element),
        4 => sum_tall(lane, register, element),
        _ => sum_16_tall(lane, register, element),
    };
    (column, row)
}

/// f64 m8n8k4.
fn f64_a(lane: u32, _: u32, _: u32) -> (u32, u32) {
    (lane / 4, lane % 4)
}

fn f64_b(lane: u32, _: u32, _: u32) -> (u32, u32) {
    (lane % 4, lane / 4)
}

fn f64_sum(lane: u32, register: u32, _: u32) -> (u32, u32) {
    (lane / 4, 2 * (lane % 4) + register)
}

/// See [`super::fragment`].
pub fn fragment(matrix: char, shape: &str, element: &str) -> Option<&'static Fragment> {
    macro_rules! fragments {
        ($($matrix:pat, $shape:pat, $element:pat => $registers:literal, $per:literal, $bytes:literal, $at:expr;)*) => {
            match (matrix, shape, element) {
                $(($matrix, $shape, $element) => {
                    static FRAGMENT: Fragment =
                        Fragment { registers: $registers, per_register: $per, element_bytes: $bytes, at: $at };
                    Some(&FRAGMENT)
                })*
                _ => None,
            }
        };
    }
    fragments! {
        'a', "m16n16k16", "f16" => 8, 2, 2, tall_16_repeated;
        'b', "m16n16k16", "f16" => 8, 2, 2, flat_16_repeated;
        'a', "m32n8k16", "f16" => 8, 2, 2, tall_16;
        'b', "m32n8k16", "f16" => 8, 2, 2, flat_16_single;
        'a', "m8n32k16", "f16" => 8, 2, 2, exchanged::<0>;
        'b', "m8n32k16", "f16" => 8, 2, 2, exchanged::<1>;
        'a', "m16n16k16", "bf16" => 4, 2, 2, tall_16;
        'b', "m16n16k16", "bf16" => 4, 2, 2, flat_16;
        'a', "m32n8k16", "bf16" => 8, 2, 2, tall_16;
        'b', "m32n8k16", "bf16" => 2, 2, 2, flat_16;
        'a', "m8n32k16", "bf16" => 2, 2, 2, exchanged::<0>;
        'b', "m8n32k16", "bf16" => 8, 2, 2, exchanged::<1>;
        'a', "m16n16k8", "tf32" => 4, 1, 4, tall_32;
        'b', "m16n16k8", "tf32" => 4, 1, 4, flat_32;
        'a', "m16n16k16", "s8" | "u8" => 2, 4, 1, tall_8;
        'b', "m16n16k16", "s8" | "u8" => 2, 4, 1, flat_8;
        'a', "m32n8k16", "s8" | "u8" => 4, 4, 1, tall_8;
        'b', "m32n8k16", "s8" | "u8" => 1, 4, 1, flat_8;
        'a', "m8n32k16", "s8" | "u8" => 1, 4, 1, exchanged::<2>;
        'b', "m8n32k16", "s8" | "u8" => 4, 4, 1, exchanged::<3>;
        'c' | 'd', "m16n16k16" | "m16n16k8", "f32" => 8, 1, 4, sum_wide;
        'c' | 'd', "m16n16k16", "s32" => 8, 1, 4, sum_wide;
        'c' | 'd', "m32n8k16", "f32" | "s32" => 8, 1, 4, sum_tall;
        'c' | 'd', "m8n32k16", "f32" | "s32" => 8, 1, 4, exchanged::<4>;
        'c' | 'd', "m16n16k16", "f16" => 4, 2, 2, sum_16_wide;
        'c' | 'd', "m32n8k16", "f16" => 4, 2, 2, sum_16_tall;
        'c' | 'd', "m8n32k16", "f16" => 4, 2, 2, exchanged::<5>;
        'a', "m8n8k4", "f64" => 1, 1, 8, f64_a;
        'b', "m8n8k4", "f64" => 1, 1, 8, f64_b;
        'c' | 'd', "m8n8k4", "f64" => 2, 1, 8, f64_sum;
    }
}
