//! Matrix multiply-accumulate over a warp: `mma.sync` and `wmma.mma`, and where a `wmma` fragment's elements are held.
//!
//! # In fragment layout
//! With lane l = 4 g + t, the accumulators of m16n8 hold rows g and g + 8, columns 2t and 2t + 1. A's register holds, for each row g, four words along k in
//! the four lanes of a quad; B's holds, for each column g, four words along k in the quad g. So for one word j of the four, A's factor is lane
//! j of each quad broadcast over the quad, and B's factors for columns 2t and 2t + 1 are the lanes 8t + j and 8t + 4 + j, the same in every
//! quad: nothing has to be transposed but these eight small vectors. A register with 16-bit elements is two such planes, its lower halves
//! (even k) and its upper halves (odd k).
//!
//! # Numerics
//! Products of f16, bf16 and tf32 (whose 13 low bits are ignored) are exact in f32; they are added one by one in f32 with round to nearest, in
//! the same order on every host: plane by plane, word by word. The hardware's order and rounding are its own; PTX asks only for
//! f32's precision. f16 accumulators are f32 until the end. NaN results are canonical.
//!
//! `wmma` shapes are made of the same tiles. Which lane holds which element of a `wmma` fragment is for the implementation to choose:
//! here as in `mma`, and for m8n32k16 as in the transposed product.
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

/// A lane's accumulators of a tile.
type Accumulators = [[f32; 32]; 4];
/// One plane: A's rows 0 to 7, A's rows 8 to 15, B's columns.
type Plane = [[f32; 32]; 3];

/// Adds the product of one plane to the accumulators, as the module's documentation describes.
#[inline(always)]
fn multiply_plain(c: &mut Accumulators, [low, high, b]: &Plane) {
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

/// The same with AVX2: B's small vectors first, then eight accumulators at a time over all planes.
///
/// # Safety
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn multiply_avx2(c: &mut Accumulators, planes: &[Plane]) {
    use std::arch::x86_64::*;
    // Per plane and word: columns 2t in 8 lanes (twice 4), columns 2t + 1 in 8 lanes. At most 4 planes.
    let mut columns = [[[0f32; 16]; 4]; 4];
    // SAFETY: every pointer below is inside an array indexed here: 32 lanes are eight rows of four, or four vectors of eight.
    unsafe {
        for (columns, plane) in columns.iter_mut().zip(planes) {
            let row = |r: usize| _mm_loadu_ps(plane[2].as_ptr().add(4 * r));
            for parity in 0..2 {
                let (r0, r1, r2, r3) = (row(parity), row(2 + parity), row(4 + parity), row(6 + parity));
                let (t0, t1) = (_mm_unpacklo_ps(r0, r1), _mm_unpackhi_ps(r0, r1));
                let (t2, t3) = (_mm_unpacklo_ps(r2, r3), _mm_unpackhi_ps(r2, r3));
                let words =
                    [_mm_movelh_ps(t0, t2), _mm_movehl_ps(t2, t0), _mm_movelh_ps(t1, t3), _mm_movehl_ps(t3, t1)];
                for j in 0..4 {
                    _mm_storeu_ps(columns[j].as_mut_ptr().add(8 * parity), words[j]);
                    _mm_storeu_ps(columns[j].as_mut_ptr().add(8 * parity + 4), words[j]);
                }
            }
        }
        for q in [0, 16] {
            let mut sums = [[_mm256_setzero_ps(); 2]; 4];
            for i in 0..4 {
                for v in 0..2 {
                    sums[i][v] = _mm256_loadu_ps(c[i].as_ptr().add(q + 8 * v));
                }
            }
            for (columns, plane) in columns.iter().zip(planes) {
                macro_rules! word {
                    ($j:literal) => {
                        let even = _mm256_loadu_ps(columns[$j].as_ptr());
                        let odd = _mm256_loadu_ps(columns[$j].as_ptr().add(8));
                        for v in 0..2 {
                            for half in 0..2 {
                                let rows = _mm256_loadu_ps(plane[half].as_ptr().add(q + 8 * v));
                                let rows = _mm256_permute_ps::<{ $j * 0x55 }>(rows);
                                sums[2 * half][v] = _mm256_fmadd_ps(rows, even, sums[2 * half][v]);
                                sums[2 * half + 1][v] = _mm256_fmadd_ps(rows, odd, sums[2 * half + 1][v]);
                            }
                        }
                    };
                }
                word!(0);
                word!(1);
                word!(2);
                word!(3);
            }
            for i in 0..4 {
                for v in 0..2 {
                    _mm256_storeu_ps(c[i].as_mut_ptr().add(q + 8 * v), sums[i][v]);
                }
            }
        }
    }
}

/// f16 in the const parameters of the AVX-512 code; 1 is bf16, 2 is tf32.
#[cfg(target_arch = "x86_64")]
const F16: u8 = 0;
#[cfg(target_arch = "x86_64")]
const BF16: u8 = 1;
#[cfg(target_arch = "x86_64")]
const TF32: u8 = 2;

/// 16 words' lower or upper halves as f32, or 16 tf32.
///
/// # Safety
/// The processor has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn expand<const ELEMENT: u8>(words: std::arch::x86_64::__m512i, upper: bool) -> std::arch::x86_64::__m512 {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise.
    unsafe {
        match (ELEMENT, upper) {
            (BF16, false) => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)),
            (BF16, true) => _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x1_0000))),
            (F16, false) => _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)),
            (F16, true) => _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(words))),
            _ => _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x2000))),
        }
    }
}

/// The last A that the AVX-512 code spread out: neighbouring instructions often share it.
struct Spread {
    /// Offsets of A's registers; `u32::MAX` for nothing.
    registers: [[u32; 2]; 2],
    /// Per plane, word, half of the rows and half of the lanes: each row's word in all lanes of its quad.
    rows: std::mem::MaybeUninit<[[[[Vector; 2]; 2]; 4]; 4]>,
}

/// 16 floats.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Vector([f32; 16]);

impl Spread {
    /// Nothing yet.
    fn new() -> Self {
        Spread { registers: [[u32::MAX; 2]; 2], rows: std::mem::MaybeUninit::uninit() }
    }
}

/// A whole tile with AVX-512, in the same order of additions, without leaving registers between C and D. Shuffles are what it has most of, so
/// A's are kept for the next instruction, and B's small vectors are broadcast by loads.
///
/// # Safety
/// The operands are the form's; the processor has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn tile_avx512<const ELEMENT: u8, const DEPTH: usize>(
    m: &Matrix,
    o: &Operands,
    tile: &Tile,
    spread: &mut Spread,
) {
    use std::arch::x86_64::*;
    let parts = if ELEMENT == TF32 { 1 } else { 2 };
    // SAFETY: registers and accumulators are 32 lanes: two vectors of 16. Planes are at most 4.
    unsafe {
        // Macros and loops, no closures: those would be compiled without the instruction set.
        macro_rules! words {
            ($register:expr, $v:expr) => {
                _mm512_loadu_si512(o.b32($register as usize).as_ptr().add(16 * $v).cast())
            };
        }
        let rows: *mut [[[Vector; 2]; 2]; 4] = spread.rows.as_mut_ptr().cast();
        let mut registers = [[u32::MAX; 2]; 2];
        for k in 0..DEPTH {
            for x in 0..2 {
                registers[k][x] = o.at.add(tile.k[k][x] as usize).read();
            }
        }
        if spread.registers != registers {
            spread.registers = registers;
            for k in 0..DEPTH {
                for half in 0..2 {
                    for part in 0..parts {
                        for v in 0..2 {
                            let row = expand::<ELEMENT>(words!(tile.k[k][half], v), part == 1);
                            let to = rows.add(k * parts + part).cast::<Vector>().add(2 * half + v);
                            _mm512_store_ps(to.cast(), _mm512_permute_ps::<0x00>(row));
                            _mm512_store_ps(to.add(4).cast(), _mm512_permute_ps::<0x55>(row));
                            _mm512_store_ps(to.add(8).cast(), _mm512_permute_ps::<0xaa>(row));
                            _mm512_store_ps(to.add(12).cast(), _mm512_permute_ps::<0xff>(row));
                        }
                    }
                }
            }
        }
        // Per plane: for each word the columns 2t, four floats, and then the columns 2t + 1.
        let mut columns = [[Vector([0.0; 16]); 2]; 4];
        let even = _mm512_set_epi32(27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(4));
        for k in 0..DEPTH {
            for part in 0..parts {
                let low = expand::<ELEMENT>(words!(tile.k[k][2], 0), part == 1);
                let high = expand::<ELEMENT>(words!(tile.k[k][2], 1), part == 1);
                let to = &mut columns[k * parts + part];
                _mm512_store_ps(to[0].0.as_mut_ptr(), _mm512_permutex2var_ps(low, even, high));
                _mm512_store_ps(to[1].0.as_mut_ptr(), _mm512_permutex2var_ps(low, odd, high));
            }
        }
        let mut sums = [[_mm512_setzero_ps(); 2]; 4];
        if m.c_f16 {
            let c = accumulators(m, o, tile);
            for i in 0..4 {
                for v in 0..2 {
                    sums[i][v] = _mm512_loadu_ps(c[i].as_ptr().add(16 * v));
                }
            }
        } else {
            for i in 0..4 {
                for v in 0..2 {
                    let c = o.b32(tile.c[i] as usize).as_ptr().add(16 * v);
                    sums[i][v] = _mm512_loadu_ps(c.cast());
                }
            }
        }
        for plane in 0..DEPTH * parts {
            for j in 0..4 {
                let even = _mm512_broadcast_f32x4(_mm_load_ps(columns[plane][0].0.as_ptr().add(4 * j)));
                let odd = _mm512_broadcast_f32x4(_mm_load_ps(columns[plane][1].0.as_ptr().add(4 * j)));
                let row = rows.add(plane).cast::<Vector>().add(4 * j);
                for half in 0..2 {
                    for v in 0..2 {
                        let row = _mm512_load_ps(row.add(2 * half + v).cast());
                        sums[2 * half][v] = _mm512_fmadd_ps(row, even, sums[2 * half][v]);
                        sums[2 * half + 1][v] = _mm512_fmadd_ps(row, odd, sums[2 * half + 1][v]);
                    }
                }
            }
        }
        // D may take the place of what was spread.
        for i in 0..4 {
            let d = o.at.add(tile.d[i] as usize).read();
            if registers.as_flattened().contains(&d) {
                spread.registers = [[u32::MAX; 2]; 2];
            }
        }
        if !m.d_f16 && o.mask == u32::MAX {
            let canonical = _mm512_castsi512_ps(_mm512_set1_epi32(float::NAN_F32 as i32));
            for i in 0..4 {
                for v in 0..2 {
                    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(sums[i][v], sums[i][v]);
                    let d = _mm512_mask_mov_ps(sums[i][v], nan, canonical);
                    _mm512_storeu_ps(o.words(tile.d[i] as usize).add(16 * v).cast(), d);
                }
            }
            return;
        }
        let mut d = [[0.0; 32]; 4];
        for i in 0..4 {
            for v in 0..2 {
                _mm512_storeu_ps(d[i].as_mut_ptr().add(16 * v), sums[i][v]);
            }
        }
        put(m, o, tile, &d);
    }
}

#[inline(always)]
fn multiply<I: Isa>(c: &mut Accumulators, planes: &[Plane]) {
    #[cfg(target_arch = "x86_64")]
    if I::FMA {
        // SAFETY: code for AVX2 runs where it is.
        return unsafe { multiply_avx2(c, planes) };
    }
    for plane in planes {
        multiply_plain(c, plane);
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
/// The operands are the form's.
#[inline(always)]
unsafe fn planes<const BF: bool>(o: &Operands, registers: [u8; 3]) -> [Plane; 2] {
    let mut planes = [[[0.0; 32]; 3]; 2];
    for (x, register) in registers.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        let words = unsafe { o.b32(register as usize) };
        let [even, odd] = halves::<BF>(words);
        planes[0][x] = even;
        planes[1][x] = odd;
    }
    planes
}

/// Reads a tile's accumulators as f32.
#[inline(always)]
unsafe fn accumulators(m: &Matrix, o: &Operands, tile: &Tile) -> Accumulators {
    // SAFETY: the operands are the form's.
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

#[inline(always)]
unsafe fn put(m: &Matrix, o: &Operands, tile: &Tile, c: &Accumulators) {
    let mut r = [0; 32];
    // SAFETY: the operands are the form's.
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

/// A product of 16-bit floats, `DEPTH` registers deep. All of C is read before any of D is written: they may share registers.
#[inline(always)]
unsafe fn halves_product<I: Isa, const BF: bool, const DEPTH: usize>(m: &Matrix, o: &Operands, spread: &mut Spread) {
    for tile in &m.tiles {
        // SAFETY: the operands are the form's.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if I::AVX512 {
                if BF {
                    tile_avx512::<BF16, DEPTH>(m, o, tile, spread);
                } else {
                    tile_avx512::<F16, DEPTH>(m, o, tile, spread);
                }
                continue;
            }
            let mut c = accumulators(m, o, tile);
            let planes = std::array::from_fn::<_, DEPTH, _>(|k| planes::<BF>(o, tile.k[k]));
            multiply::<I>(&mut c, planes.as_flattened());
            put(m, o, tile, &c);
        }
    }
}

/// A product of tf32.
#[inline(always)]
unsafe fn tf32_product<I: Isa, const DEPTH: usize>(m: &Matrix, o: &Operands, spread: &mut Spread) {
    for tile in &m.tiles {
        // SAFETY: the operands are the form's.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if I::AVX512 {
                tile_avx512::<TF32, DEPTH>(m, o, tile, spread);
                continue;
            }
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
            multiply::<I>(&mut c, &planes[..DEPTH]);
            put(m, o, tile, &c);
        }
    }
}

/// A product of bytes.
#[inline(always)]
unsafe fn bytes_product(m: &Matrix, o: &Operands, a_signed: bool, b_signed: bool, saturate: bool) {
    for tile in &m.tiles {
        // SAFETY: the operands are the form's.
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
#[inline(always)]
unsafe fn f64_product(m: &Matrix, o: &Operands) {
    for tile in &m.tiles {
        // SAFETY: the operands are the form's.
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

#[inline(always)]
unsafe fn product<I: Isa>(m: &Matrix, o: &Operands, spread: &mut Spread) {
    // SAFETY: the operands are the form's.
    unsafe {
        match (m.element, m.depth) {
            (Element::Bf16, 2) => halves_product::<I, true, 2>(m, o, spread),
            (Element::Bf16, _) => halves_product::<I, true, 1>(m, o, spread),
            (Element::F16, 2) => halves_product::<I, false, 2>(m, o, spread),
            (Element::F16, _) => halves_product::<I, false, 1>(m, o, spread),
            (Element::Tf32, 2) => tf32_product::<I, 2>(m, o, spread),
            (Element::Tf32, _) => tf32_product::<I, 1>(m, o, spread),
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
            let mut spread = Spread::new();
            for i in 0..count {
                // SAFETY: the caller's operands are `count` times the form's.
                unsafe {
                    let at = operands.add(i * f.detail.operands);
                    product::<super::ops::$isa>(m, &Operands { registers, at, mask }, &mut spread)
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

    // Registers of A, of B, along k; the tiles as (first A register, first B register) with C's and D's following on; whether the
    // product is computed transposed.
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

// Where a fragment's elements are held: (lane, register, element of the register) -> (row, column), as `mma` has them.

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
