//! Shapes of shared-memory accesses: the lanes' addresses relative to the first lane's.
//!
//! A memory instruction meets few shapes, each of them many times. What does not depend on the first lane's address
//! (granules touched and by which lane, bank conflicts, extent) is computed when a shape occurs for the second time, so
//! that patternless addresses cost no more than a comparison; an instruction's first two shapes are computed at once.

use super::lanes::{Addresses, Chunk, LINE, LanesOfLines, Lines, MANY, Reach, Site, Some16, Use, lanes};
#[cfg(target_arch = "x86_64")]
use crate::num::AVX512;
use std::rc::Rc;

/// Shapes remembered per instruction.
const MOST: usize = 16;
/// Unknown shapes in a row after which an instruction is taken to have no pattern.
const PATIENCE: u32 = 64;
/// Shapes of an instruction that are computed when they first occur.
const EAGER: usize = 2;
/// Places of the first address in its line for which a shape's lines are remembered.
const PLACES: usize = 32;

/// What an access touches, relative to its first lane's address.
pub struct Shape {
    /// Distances of the lanes; 0 for those outside the mask. Of 32 bits, so that fewer bytes are compared.
    distance: Distances,
    mask: u32,
    /// The first address modulo 4, on which the bank conflicts of narrow accesses depend.
    low: u64,
    /// Whether the fields below have been computed.
    ready: bool,
    /// All distances are multiples of the access size.
    pub aligned: bool,
    /// Distance from the first lane's address to the lowest byte, and to the end of the highest.
    pub extent: (i64, i64),
    /// Some granule is touched by several lanes.
    pub overlap: bool,
    /// The granules touched.
    chunks: Rc<[Chunk]>,
    /// The lines touched, by the place of the first address in its line.
    lines: Vec<Placed>,
    /// Which of these is meant.
    place: usize,
    /// What it costs.
    pub cost: Cost,
}

/// The lanes' distances from the first.
#[repr(C, align(64))]
struct Distances([i32; 32]);

/// The lines of a shape whose first address is at one place in its line.
struct Placed {
    place: u64,
    lines: Vec<Lines>,
    lanes: Vec<LanesOfLines>,
}

/// Cycles of the banks of shared memory; see [`cost()`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Passes over the banks.
    pub passes: u64,
    /// Passes that would do without bank conflicts.
    pub ideal: u64,
    /// Passes of 128 bytes each that would do for the distinct bytes.
    pub least: u64,
}

/// The shapes of one instruction.
#[derive(Default)]
struct Known {
    shapes: Vec<Shape>,
    last: usize,
    next: usize,
    unknown: u32,
}

/// The shapes of a program's instructions, by step.
pub struct Shapes(Vec<Option<Box<Known>>>);

impl Shapes {
    /// None known yet.
    pub fn new(steps: usize) -> Self {
        Shapes(std::iter::repeat_with(|| None).take(steps).collect())
    }

    /// The shape of an access, if it has been seen before. Accesses of one step have one size; lanes outside the mask
    /// have the first lane's address. `granule` is log2 of the bytes per granule.
    ///
    /// # Safety
    /// The processor supports `ISA`.
    #[inline(always)]
    pub unsafe fn recall<const ISA: usize>(&mut self, at: &Addresses, site: Site, granule: u32) -> Option<&Shape> {
        let known = &mut **self.0.get_mut(site.pc as usize)?.get_or_insert_default();
        let first = at.0[site.mask.trailing_zeros() as usize & 31];
        let low = if site.bytes < 4 { first & 3 } else { 0 };
        let count = known.shapes.len();
        let mut index = known.last;
        for _ in 0..count {
            let shape = &known.shapes[index];
            // SAFETY: guaranteed by the caller.
            if shape.mask == site.mask && shape.low == low && unsafe { same::<ISA>(&shape.distance, at, first) } {
                known.last = index;
                known.unknown = 0;
                if !shape.ready {
                    known.shapes[index].work_out(site, granule);
                }
                let shape = &mut known.shapes[index];
                shape.find_place(first % (1 << LINE), site);
                return Some(shape);
            }
            index = if index + 1 == count { 0 } else { index + 1 };
        }
        known.learn(at, first, low, site.mask);
        // It may not have been remembered.
        if count < EAGER && known.shapes.len() == count + 1 {
            let shape = known.shapes.last_mut()?;
            shape.work_out(site, granule);
            shape.find_place(first % (1 << LINE), site);
            return Some(shape);
        }
        None
    }
}

impl Known {
    #[inline(never)]
    fn learn(&mut self, at: &Addresses, first: u64, low: u64, mask: u32) {
        self.unknown = self.unknown.saturating_add(1);
        if self.unknown > PATIENCE {
            // Retried now and then: one of many accesses is remembered.
            if !self.unknown.is_multiple_of(PATIENCE) {
                return;
            }
            self.shapes.clear();
            self.last = 0;
        }
        let mut distance = Distances([0; 32]);
        let mut far = false;
        for l in 0..32 {
            let exact = at.0[l].wrapping_sub(first) as i64;
            distance.0[l] = exact as i32;
            far |= i64::from(distance.0[l]) != exact;
        }
        // Outside shared memory, and refused.
        if far {
            return;
        }
        let shape = Shape {
            distance,
            mask,
            low,
            ready: false,
            aligned: false,
            extent: (0, 0),
            overlap: false,
            chunks: Rc::new([]),
            lines: vec![],
            place: 0,
            cost: Cost::default(),
        };
        if self.shapes.len() < MOST {
            self.shapes.push(shape);
        } else {
            self.next = (self.next + 1) % MOST;
            self.shapes[self.next] = shape;
        }
    }
}

impl Shape {
    /// Whether the accesses are aligned and inside shared memory, given the first lane's address.
    #[inline(always)]
    pub fn fits(&self, first: u64, bytes: u32, shared: u32) -> bool {
        let (low, high) = self.extent;
        // Once it is compared with the size, the first address is small enough to be signed.
        self.aligned
            && first & u64::from(bytes - 1) == 0
            && first <= u64::from(shared)
            && first as i64 + low >= 0
            && first as i64 + high <= i64::from(shared)
    }

    #[inline(never)]
    fn work_out(&mut self, site: Site, granule: u32) {
        let bytes = i64::from(site.bytes);
        let distance = |l: u32| i64::from(self.distance.0[l as usize]);
        self.ready = true;
        self.aligned = lanes(site.mask).all(|l| distance(l) % bytes == 0);
        let low = lanes(site.mask).map(distance).min().unwrap_or(0);
        let high = lanes(site.mask).map(distance).max().unwrap_or(0);
        self.extent = (low, high.saturating_add(bytes));
        self.cost = cost(&Addresses(self.distance.0.map(|d| i64::from(d) as u64)), self.low, site);
        // Shared memory is smaller than that; what reaches further is refused.
        if !self.aligned || low < -(1 << 24) || high > 1 << 24 {
            self.aligned = false;
            return;
        }
        let per_lane = bytes >> granule;
        let mut touched: Vec<(i64, u32)> =
            lanes(site.mask).flat_map(|l| (0..per_lane).map(move |i| ((distance(l) >> granule) + i, l))).collect();
        touched.sort_unstable();
        let mut before = None;
        let mut chunks = Vec::<Chunk>::new();
        for (at, lane) in touched {
            if before == Some(at) {
                self.overlap = true;
                let chunk = chunks.last_mut().expect("there was a granule before");
                chunk.lanes[(at - chunk.at) as usize] = MANY;
                continue;
            }
            before = Some(at);
            if chunks.last().is_none_or(|chunk| at - chunk.at >= 16) {
                let some = Some16 { bits: 0, words: [0; 16] };
                chunks.push(Chunk { at, some, lanes: [0; 16] });
            }
            let chunk = chunks.last_mut().expect("one was just made");
            let i = (at - chunk.at) as usize;
            chunk.some.bits |= 1 << i;
            chunk.some.words[i] = !0;
            chunk.lanes[i] = lane;
        }
        self.chunks = chunks.into();
    }

    /// Makes `lines` those for a first address at this place in its line.
    #[inline(always)]
    fn find_place(&mut self, place: u64, site: Site) {
        if self.lines.get(self.place).is_none_or(|placed| placed.place != place) {
            self.look_for_place(place, site);
        }
    }

    #[inline(never)]
    fn look_for_place(&mut self, place: u64, site: Site) {
        if let Some(known) = self.lines.iter().position(|placed| placed.place == place) {
            self.place = known;
            return;
        }
        if self.lines.len() == PLACES {
            self.lines.clear();
        }
        let (mut lines, mut lanes_of) = (Vec::<Lines>::new(), Vec::<LanesOfLines>::new());
        if self.aligned {
            // An aligned access of at most 16 bytes is inside one line.
            let line = |l: u32| ((place as i64 + i64::from(self.distance.0[l as usize])) >> LINE) as i32;
            let mut touched: Vec<i32> = lanes(site.mask).map(line).collect();
            touched.sort_unstable();
            for at in touched {
                if lines.last().is_none_or(|last| at - last.at >= 16) {
                    lines.push(Lines { at, bits: 0 });
                    lanes_of.push([0; 16]);
                }
                let (last, lanes) = lines.last_mut().zip(lanes_of.last_mut()).expect("both were just made");
                let i = (at - last.at) as usize;
                last.bits |= 1 << i;
                lanes[i] += 1;
            }
        }
        self.place = self.lines.len();
        self.lines.push(Placed { place, lines, lanes: lanes_of });
    }

    /// What the access touches, given the first lane's address, for which the shape was recalled.
    #[inline(always)]
    pub fn reach(&self, first: u64, granule: u32) -> Reach<'_> {
        Reach {
            chunks: &self.chunks,
            lines: &self.lines[self.place].lines,
            lanes: &self.lines[self.place].lanes,
            origin: (first >> granule) as i64,
            line: (first >> LINE) as i64,
        }
    }
}

/// The cost of an access in passes over the banks, of one cycle each.
///
/// There are 32 banks of 4 bytes, and a pass reads or writes one word of each. Lanes that touch the same word share it;
/// every further word of a bank is a further pass. So says NVIDIA's programming guide (compute capability 5.x to 9.x,
/// shared memory), of accesses of up to 4 bytes, which all 32 lanes make together. It does not say what follows.
///
/// - Accesses of 8 bytes are made by one half warp after the other, those of 16 bytes by quarter warps, so that a pass
///   moves up to 128 bytes. Lanes of different parts neither conflict nor share. (Talk S9593 of NVIDIA's conference
///   GTC 2019, and what Nsight Compute counts: forums.developer.nvidia.com/t/359822.)
/// - Two parts of a load are made together, half as many passes at best, if every active lane l has the address of
///   lane l ^ 1, or every one that of lane l ^ 2; the other lane may also be inactive. With 8 bytes the parts are the
///   two half warps, with 16 bytes the two quarters of each half. An engineer of NVIDIA gives the rule for 7.0 to 7.5
///   (forums.developer.nvidia.com/t/77228); that halves stay apart with 16 bytes, that the same one of the two
///   conditions must hold for the whole warp, and the inactive lanes are measurements on an A100
///   (zhuanlan.zhihu.com/p/690052715).
/// - No other pattern saves a pass, however few words it touches: with lane l at 16-byte word l mod 4 a load takes four
///   (first forum thread of the rule).
/// - Assumed here: 8.6 to 9.0 are like 8.0; stores, `cp.async` and `ldmatrix`, whose eight rows of a matrix are one
///   part, are never made together; atomics cost what stores do.
///
/// Shifting all addresses by a multiple of 4 (of the access size, if larger) rotates the banks and changes nothing.
pub fn cost(at: &Addresses, add: u64, site: Site) -> Cost {
    // An aligned access of 4, 8 or 16 bytes is one unit; a pass has room for as many as all banks hold.
    let unit = site.bytes.max(4);
    let slots = 128 / unit;
    let alike = |with: u32| {
        let same = |l: u32| site.mask >> (l ^ with) & 1 == 0 || at.0[l as usize] == at.0[(l ^ with) as usize];
        lanes(site.mask).all(same)
    };
    let together = unit > 4 && site.usage == Use::Load && !site.rows && (alike(1) || alike(2));
    let part_lanes = if together { 2 * slots } else { slots };
    let mut cost = Cost::default();
    for part in 0..32 / part_lanes {
        let part = site.mask & (((1u64 << part_lanes) - 1) << (part * part_lanes)) as u32;
        if part == 0 {
            continue;
        }
        // The first unit seen in each slot; others in the same slot are further passes.
        let mut first = [None; 32];
        let (mut more, mut count) = ([0u64; 32], 0);
        for l in lanes(part) {
            let unit = at.0[l as usize].wrapping_add(add) >> unit.trailing_zeros();
            let slot = &mut first[unit as usize % slots as usize];
            match slot {
                None => *slot = Some(unit),
                Some(other) if *other == unit => {}
                Some(_) => {
                    more[count] = unit;
                    count += 1;
                }
            }
        }
        let mut passes = 1;
        if count > 0 {
            let mut places = [1u8; 32];
            more[..count].sort_unstable();
            let mut last = None;
            for &unit in &more[..count] {
                let place = &mut places[unit as usize % slots as usize];
                *place += u8::from(last != Some(unit));
                passes = passes.max(*place);
                last = Some(unit);
            }
        }
        cost.passes += u64::from(passes);
        cost.ideal += 1;
    }
    let mut distinct = at.0;
    // Lanes outside the mask have the address of one inside.
    distinct.sort_unstable();
    let changes = distinct.windows(2).filter(|pair| pair[0] != pair[1]).count() as u64;
    cost.least = ((changes + 1) * u64::from(site.bytes)).div_ceil(128);
    cost
}

/// Whether every lane's address is `first` plus its distance.
///
/// # Safety
/// The processor supports `ISA`.
#[inline(always)]
unsafe fn same<const ISA: usize>(distance: &Distances, at: &Addresses, first: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: both are 32 values aligned to 64 bytes; the caller guarantees the ISA.
        return unsafe {
            let first = _mm512_set1_epi64(first as i64);
            macro_rules! wrong {
                ($i:expr) => {{
                    let distance = _mm512_cvtepi32_epi64(_mm256_load_si256(distance.0.as_ptr().add($i).cast()));
                    let at = _mm512_load_si512(at.0.as_ptr().add($i).cast());
                    _mm512_cmpneq_epi64_mask(_mm512_add_epi64(distance, first), at)
                }};
            }
            wrong!(0) | wrong!(8) | wrong!(16) | wrong!(24) == 0
        };
    }
    let mut wrong = 0;
    for l in 0..32 {
        wrong |= (i64::from(distance.0[l]) as u64).wrapping_add(first) ^ at.0[l];
    }
    wrong == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pattern of addresses: what it is, bytes, lanes, address by lane, and (passes, without conflicts, least).
    type Row = (&'static str, u32, u32, fn(u64) -> u64, (u64, u64, u64));

    const ALL: u32 = !0;

    fn check(rows: &[Row], usage: Use, matrix: bool) {
        for &(name, bytes, mask, address, (passes, ideal, least)) in rows {
            // At any place, and with whatever the lanes outside the mask have.
            for base in [0, 16, 112, 4096] {
                let first = u64::from(mask.trailing_zeros());
                let lane = |l: u64| if mask >> l & 1 != 0 { l } else { first };
                let at = Addresses(std::array::from_fn(|l| base + address(lane(l as u64))));
                let site = Site { pc: 0, mask, bytes, usage, element: 0, strong: false, rows: matrix };
                assert_eq!(cost(&at, 0, site), Cost { passes, ideal, least }, "{bytes} bytes, {name}, at {base}");
            }
        }
    }

    #[test]
    fn narrow_accesses_go_by_whole_warps() {
        let rows: &[Row] = &[
            // 32 words in 32 banks.
            ("lane after lane", 4, ALL, |l| 4 * l, (1, 1, 1)),
            ("one word for all", 4, ALL, |_| 0, (1, 1, 1)),
            // Banks 0, 2, ... 30, two words each.
            ("every other word", 4, ALL, |l| 8 * l, (2, 1, 1)),
            ("every other word, 16 lanes", 4, 0xffff, |l| 8 * l, (1, 1, 1)),
            ("a column", 4, ALL, |l| 128 * l, (32, 1, 1)),
            ("a column of padded rows", 4, ALL, |l| 132 * l, (1, 1, 1)),
            // Lanes 0 to 15 and 16 to 31 read two words of bank 0.
            ("one word for each half", 4, ALL, |l| 128 * (l / 16), (2, 1, 1)),
            ("pairs share", 4, ALL, |l| 4 * (l / 2), (1, 1, 1)),
            ("half words, lane after lane", 2, ALL, |l| 2 * l, (1, 1, 1)),
            ("bytes, lane after lane", 1, ALL, |l| l, (1, 1, 1)),
            // Bytes of words 0, 32, 64, 96 of bank 0.
            ("bytes of four words of a bank", 1, ALL, |l| 128 * (l % 4) + l / 8, (4, 1, 1)),
        ];
        check(rows, Use::Load, false);
        check(rows, Use::Store, false);
    }

    #[test]
    fn loads_of_8_bytes_go_by_half_warps_unless_neighbours_share() {
        check(
            &[
                ("lane after lane", 8, ALL, |l| 8 * l, (2, 2, 2)),
                ("one place for all", 8, ALL, |_| 0, (1, 1, 1)),
                ("neighbours share", 8, ALL, |l| 8 * (l / 2), (1, 1, 1)),
                // Lanes 0 and 2, 1 and 3, 4 and 6, ...
                ("next but one share", 8, ALL, |l| 8 * (l / 4 * 2 + l % 2), (1, 1, 1)),
                // 16 places, each read by two lanes that are no neighbours: nothing is saved.
                ("both halves read the same", 8, ALL, |l| 8 * (l % 16), (2, 2, 1)),
                // Each half: 16 places in the even pairs of banks, two in each.
                ("every other place", 8, ALL, |l| 16 * l, (4, 2, 2)),
                // 16 places in banks 0 and 1.
                ("neighbours share a column", 8, ALL, |l| 128 * (l / 2), (16, 1, 1)),
                ("half a warp", 8, 0xffff, |l| 8 * l, (1, 1, 1)),
                ("two lanes of different halves", 8, 1 << 3 | 1 << 20, |l| 8 * l, (1, 1, 1)),
                // Lanes 0 and 1 differ, 0 and 2 have no partner.
                ("two neighbours that differ", 8, 0b11, |l| 8 * l, (1, 1, 1)),
            ],
            Use::Load,
            false,
        );
    }

    #[test]
    fn loads_of_16_bytes_go_by_quarter_warps_unless_neighbours_share() {
        check(
            &[
                ("lane after lane", 16, ALL, |l| 16 * l, (4, 4, 4)),
                // Halves stay apart.
                ("one place for all", 16, ALL, |_| 0, (2, 2, 1)),
                ("neighbours share", 16, ALL, |l| 16 * (l / 2), (2, 2, 2)),
                ("next but one share", 16, ALL, |l| 16 * (l / 4 * 2 + l % 2), (2, 2, 2)),
                ("neighbours share two places a quarter", 16, ALL, |l| 16 * (l / 8 * 2 + l % 8 / 2 % 2), (2, 2, 1)),
                // The first half by neighbours, the second by lanes next but one: neither holds for the warp.
                (
                    "each half shares in its own way",
                    16,
                    ALL,
                    |l| 16 * (l / 8 * 2 + if l < 16 { l % 8 / 2 % 2 } else { l % 2 }),
                    (4, 4, 1),
                ),
                // Four lanes at each of 0 and 8, 1 and 9 in the first half: banks 0 to 3 have two places, 4 to 7 too.
                (
                    "neighbours share, with a conflict",
                    16,
                    ALL,
                    |l| 16 * (l / 16 * 4 + l % 16 / 8 + l % 8 / 4 * 8),
                    (4, 2, 1),
                ),
                // Lanes 0, 4, 8, ... share, but no neighbours.
                ("four places, lane after lane", 16, ALL, |l| 16 * (l % 4), (4, 4, 1)),
                ("halves with the same eight places", 16, ALL, |l| 16 * (l % 8), (4, 4, 1)),
                // Each quarter: 8 places in banks 0 to 3, 8 to 11, 16 to 19, 24 to 27, two in each.
                ("every other place", 16, ALL, |l| 32 * l, (8, 4, 4)),
                ("a column", 16, ALL, |l| 128 * l, (32, 4, 4)),
                ("neighbours share a column", 16, ALL, |l| 128 * (l / 2), (16, 2, 2)),
                ("a quarter", 16, 0xff, |l| 16 * l, (1, 1, 1)),
                ("a quarter and a lane", 16, 0x1ff, |l| 16 * l, (2, 2, 2)),
                ("lanes 15 and 16 share", 16, 1 << 15 | 1 << 16, |_| 64, (2, 2, 1)),
                ("lanes 0 and 15 share", 16, 1 | 1 << 15, |_| 64, (1, 1, 1)),
                // Without partners the two quarters are made together, although their places differ.
                ("every fourth lane", 16, 0x1111_1111, |l| 16 * (l / 4), (2, 2, 1)),
            ],
            Use::Load,
            false,
        );
    }

    #[test]
    fn stores_and_matrix_rows_are_not_made_together() {
        let rows: &[Row] = &[
            ("lane after lane", 16, ALL, |l| 16 * l, (4, 4, 4)),
            ("neighbours share", 16, ALL, |l| 16 * (l / 2), (4, 4, 2)),
            ("one place for all", 16, ALL, |_| 0, (4, 4, 1)),
            // The rows of a matrix 64 bytes apart: even ones in banks 0 to 3, odd ones in 16 to 19.
            ("rows of 64 bytes", 16, ALL, |l| 64 * l, (16, 4, 4)),
            ("one matrix", 16, 0xff, |l| 16 * l, (1, 1, 1)),
        ];
        check(rows, Use::Store, false);
        check(rows, Use::Load, true);
        check(&[("neighbours share", 8, ALL, |l| 8 * (l / 2), (2, 2, 1))], Use::Store, false);
    }
}
