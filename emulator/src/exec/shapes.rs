//! Shapes of shared-memory accesses: the lanes' addresses relative to the first lane's.
//!
//! A memory instruction meets few shapes, each of them many times. What does not depend on the first lane's address
//! (granules touched and by which lane, bank conflicts, extent) is computed when a shape occurs for the second time, so
//! that patternless addresses cost no more than a comparison.

use super::lanes::{Addresses, Chunk, MANY, Site, Some16, lanes};
#[cfg(target_arch = "x86_64")]
use crate::num::AVX512;

/// Shapes remembered per instruction.
const MOST: usize = 16;
/// Unknown shapes in a row after which an instruction is taken to have no pattern.
const PATIENCE: u32 = 64;

/// What an access touches, relative to its first lane's address.
pub struct Shape {
    /// Distances of the lanes; 0 for those outside the mask.
    distance: Addresses,
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
    pub chunks: Vec<Chunk>,
    /// Wavefronts, and how many there would be without bank conflicts.
    pub wavefronts: (u64, u64),
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
                return Some(&known.shapes[index]);
            }
            index = if index + 1 == count { 0 } else { index + 1 };
        }
        known.learn(at, first, low, site.mask);
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
        let shape = Shape {
            distance: Addresses(at.0.map(|a| a.wrapping_sub(first))),
            mask,
            low,
            ready: false,
            aligned: false,
            extent: (0, 0),
            overlap: false,
            chunks: vec![],
            wavefronts: (0, 0),
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
        let distance = |l: u32| self.distance.0[l as usize] as i64;
        self.ready = true;
        self.aligned = lanes(site.mask).all(|l| distance(l) % bytes == 0);
        let low = lanes(site.mask).map(distance).min().unwrap_or(0);
        let high = lanes(site.mask).map(distance).max().unwrap_or(0);
        self.extent = (low, high.saturating_add(bytes));
        self.wavefronts = wavefronts(&self.distance, self.low, site);
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
        for (at, lane) in touched {
            if before == Some(at) {
                self.overlap = true;
                let chunk = self.chunks.last_mut().expect("there was a granule before");
                chunk.lanes[(at - chunk.at) as usize] = MANY;
                continue;
            }
            before = Some(at);
            if self.chunks.last().is_none_or(|chunk| at - chunk.at >= 16) {
                let some = Some16 { bits: 0, words: [0; 16] };
                self.chunks.push(Chunk { at, some, lanes: [0; 16] });
            }
            let chunk = self.chunks.last_mut().expect("one was just made");
            let i = (at - chunk.at) as usize;
            chunk.some.bits |= 1 << i;
            chunk.some.words[i] = !0;
            chunk.lanes[i] = lane;
        }
    }
}

/// Wavefronts (passes through 32 banks of 4 bytes) of an access, and their number without conflicts. Accesses of 8 and
/// 16 bytes go by half and quarter warps, as on the hardware. Shifting all addresses by a multiple of 4 (of the access
/// size, if larger) rotates the banks and changes nothing.
pub fn wavefronts(at: &Addresses, add: u64, site: Site) -> (u64, u64) {
    let (mut all, mut ideal) = (0, 0);
    // An aligned access of 4, 8 or 16 bytes is one unit; a pass serves as many lanes as all banks hold units.
    let unit = site.bytes.max(4);
    let lanes_per_pass = 128 / unit;
    for pass in 0..32 / lanes_per_pass {
        let part = site.mask & (((1u64 << lanes_per_pass) - 1) << (pass * lanes_per_pass)) as u32;
        if part == 0 {
            continue;
        }
        // The first unit seen in each bank; others in the same bank are further wavefronts.
        let mut first = [None; 32];
        let (mut more, mut count) = ([0u64; 32], 0);
        for l in lanes(part) {
            let unit = at.0[l as usize].wrapping_add(add) >> unit.trailing_zeros();
            let slot = &mut first[unit as usize % lanes_per_pass as usize];
            match slot {
                None => *slot = Some(unit),
                Some(other) if *other == unit => {}
                Some(_) => {
                    more[count] = unit;
                    count += 1;
                }
            }
        }
        let mut wavefronts = 1;
        if count > 0 {
            let mut places = [1u8; 32];
            more[..count].sort_unstable();
            let mut last = None;
            for &unit in &more[..count] {
                let place = &mut places[unit as usize % lanes_per_pass as usize];
                *place += u8::from(last != Some(unit));
                wavefronts = wavefronts.max(*place);
                last = Some(unit);
            }
        }
        all += u64::from(wavefronts);
        ideal += 1;
    }
    (all, ideal)
}

/// Whether every lane's address is `first` plus its distance.
///
/// # Safety
/// The processor supports `ISA`.
#[inline(always)]
unsafe fn same<const ISA: usize>(distance: &Addresses, at: &Addresses, first: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: both are 32 values aligned to 64 bytes; the caller guarantees the ISA.
        return unsafe {
            let first = _mm512_set1_epi64(first as i64);
            macro_rules! wrong {
                ($i:expr) => {{
                    let distance = _mm512_load_si512(distance.0.as_ptr().add($i).cast());
                    let at = _mm512_load_si512(at.0.as_ptr().add($i).cast());
                    _mm512_cmpneq_epi64_mask(_mm512_add_epi64(distance, first), at)
                }};
            }
            wrong!(0) | wrong!(8) | wrong!(16) | wrong!(24) == 0
        };
    }
    let mut wrong = 0;
    for l in 0..32 {
        wrong |= distance.0[l].wrapping_add(first) ^ at.0[l];
    }
    wrong == 0
}
