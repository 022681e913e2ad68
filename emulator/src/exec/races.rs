//! Data races: two accesses to a byte, at least one of them a write, that nothing orders.
//!
//! **Shared memory** (between threads of a block). Each warp has a vector clock (Lamport; bookkeeping as in FastTrack,
//! Flanagan and Freund 2009, but per warp instead of per thread). A barrier joins the clocks of its participants.
//! Inside a warp, an instruction at which lanes wait for each other (`bar.warp.sync`, shuffles, votes, wmma loads and
//! stores) orders what came before it. Atomic and volatile accesses do not race with each other. In a program with
//! fences, an atomic also acquires and releases at its address. Writing the value that is already there does not race
//! with earlier accesses: flags are set that way.
//!
//! Per granule that is much to read and write for every access, and hardly ever needed: tiles are filled before a
//! barrier and read behind it. So per line of 64 bytes the latest time of a read and of a write is kept, and while all
//! of an access's lines were last used before a time that the warp has synchronised with, the access goes into a log.
//! A barrier of the whole block makes the log worthless, and it is dropped. What lines cannot decide is decided by
//! granules, once the log has been written to these.
//!
//! **Global memory** (between blocks). A word remembers its last writer and reader, and how often that block had fenced
//! (its epoch). An atomic or volatile access releases everything its block did before its last fence, and its reads
//! even without a fence; a later access to the same address acquires it. (PTX wants a fence there too, but published
//! code omits it: a block that announces its reads has made them.) A load past the L1 cache by a single thread acquires
//! too, because published code polls with it as if it were volatile. Atomics count as reads: they race with plain
//! writes only. Volatile accesses are not recorded.
//!
//! A word whose bytes belong to different blocks remembers only the last one, and so does a word read by several
//! blocks. Races may be missed there; none is reported falsely.
//!
//! While all words of a sector of 64 bytes have had the same accesses, one entry stands for all of them (see
//! [`crate::memory::Sector`]).

// Loops over lanes and granules index several arrays at once, and vectorise as written.
#![allow(clippy::needless_range_loop)]

use super::lanes::{self as ask, Chunk, LINE, MANY, Reach, Some16};
use crate::memory::{HELD, SECTOR, Shadow};
#[cfg(target_arch = "x86_64")]
use crate::num::AVX512;
use crate::num::PORTABLE;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Bits of a stamp below the time in `writes`: warp (5) and lane (5).
const WRITE_SHIFT: u32 = 10;
/// Bits below the time in `reads` and `atomics`: the lane, or [`MANY`].
const READ_SHIFT: u32 = 6;
/// Largest time; reaching it resets all stamps.
const LAST_TIME: u32 = (1 << 22) - 1;
/// Accesses in the log, at most.
const LOG: usize = 1 << 12;

/// The other party of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Other {
    /// "written", "read" or "changed by an atomic operation".
    pub what: &'static str,
    /// Its warp.
    pub warp: u32,
    /// Its lane; None if several lanes of the warp did it.
    pub lane: Option<u32>,
    /// The granule of shared memory.
    pub at: u32,
}

/// An access that is in the log and not yet in the rows.
struct Logged {
    chunks: Rc<[Chunk]>,
    /// The granule that the chunks are relative to.
    origin: i64,
    time: u32,
    warp: usize,
    write: bool,
}

/// Race detector for one block's shared memory. It works on granules: as many bytes as the program's smallest shared
/// access, to which all accesses are aligned.
pub struct SharedRaces {
    warps: usize,
    /// Granules per row of `reads` and `atomics`: all of them, plus room for a chunk that begins at the last.
    stride: usize,
    /// Time at which the block began; older stamps belong to earlier blocks.
    base: u32,
    /// `clocks[w * warps + v]`: the time of warp v that warp w has synchronised with.
    clocks: Vec<u32>,
    /// Per warp: the minimum of that over the other warps.
    least: Vec<u32>,
    /// Per granule: time, warp and lane of the last write.
    writes: Vec<u32>,
    /// Per warp and granule: time and lane of the last read.
    reads: Vec<u32>,
    /// Per granule: latest time of a read or atomic by any warp.
    latest: Vec<u32>,
    /// Per warp and granule: time and lane of the last atomic; empty in programs without shared atomics.
    atomics: Vec<u32>,
    /// Clocks released by atomics, by address.
    released: HashMap<u32, Vec<u32>>,
    /// log2 of the granules in a line.
    per_line: u32,
    /// Per line: latest time of a write by any warp, in rows or log.
    line_writes: Vec<u32>,
    /// Per line: latest time of a read or atomic.
    line_reads: Vec<u32>,
    /// Accesses that are not in the rows, in order.
    log: Vec<Logged>,
}

impl SharedRaces {
    /// For blocks of `warps` warps with `granules` granules of 2^`granule` bytes of shared memory.
    pub fn new(warps: usize, granules: usize, granule: u32, atomics: bool) -> Self {
        let stride = granules + 16;
        let per_line = LINE - granule;
        let lines = (granules >> per_line) + 1 + 16;
        let mut races = SharedRaces {
            warps,
            stride,
            base: 0,
            clocks: vec![0; warps * warps],
            least: vec![0; warps],
            writes: vec![0; stride],
            reads: vec![0; warps * stride],
            latest: vec![0; stride],
            atomics: if atomics { vec![0; warps * stride] } else { vec![] },
            released: HashMap::new(),
            per_line,
            line_writes: vec![0; lines],
            line_reads: vec![0; lines],
            log: vec![],
        };
        races.restart();
        races
    }

    /// Starts another block.
    pub fn restart(&mut self) {
        let last = (0..self.warps).map(|w| self.clocks[w * self.warps + w]).max().unwrap_or(0);
        self.released.clear();
        self.log.clear();
        self.begin(last + 1);
    }

    fn begin(&mut self, base: u32) {
        self.base = base;
        if base >= LAST_TIME / 2 {
            self.base = 1;
            self.writes.fill(0);
            self.reads.fill(0);
            self.latest.fill(0);
            self.atomics.fill(0);
            self.line_writes.fill(0);
            self.line_reads.fill(0);
            self.log.clear();
        }
        for w in 0..self.warps {
            for v in 0..self.warps {
                self.clocks[w * self.warps + v] = self.base - u32::from(w != v);
            }
        }
        self.least.fill(self.base - 1);
    }

    /// The clock of a warp.
    pub fn clock(&self, warp: usize) -> &[u32] {
        &self.clocks[warp * self.warps..][..self.warps]
    }

    /// Orders what the warp did before what its lanes do next.
    pub fn tick(&mut self, warp: usize) {
        self.advance(warp, self.clocks[warp * self.warps + warp] + 1);
    }

    /// As [`tick`](Self::tick), to a time no earlier than the warp's own.
    pub fn advance(&mut self, warp: usize, time: u32) {
        let clock = &mut self.clocks[warp * self.warps + warp];
        *clock = time.max(*clock);
        if *clock >= LAST_TIME {
            self.begin(LAST_TIME);
        }
    }

    /// Joins another clock into the warp's.
    pub fn join(&mut self, warp: usize, other: &[u32]) {
        let clock = &mut self.clocks[warp * self.warps..][..self.warps];
        let mut least = u32::MAX;
        for (v, (mine, &theirs)) in clock.iter_mut().zip(other).enumerate() {
            *mine = (*mine).max(theirs);
            least = if v == warp { least } else { least.min(*mine) };
        }
        self.least[warp] = least;
    }

    /// Everything up to this time, by any warp, happened before what the warp does now.
    #[inline(always)]
    fn settled(&self, warp: usize) -> u32 {
        self.least[warp].min(self.clocks[warp * self.warps + warp] - 1)
    }

    fn unordered(&self, time: u32, warp: usize, other: usize, same_lane: bool) -> bool {
        let known = self.clocks[warp * self.warps + other];
        match warp == other {
            true => time == known && !same_lane,
            false => time > known && time >= self.base,
        }
    }

    fn against_write(&self, warp: usize, lane: u32, at: usize) -> Option<Other> {
        let stamp = self.writes[at];
        let time = stamp >> WRITE_SHIFT;
        if time < self.base {
            return None;
        }
        let (other, other_lane) = ((stamp >> 5 & 31) as usize, stamp & 31);
        self.unordered(time, warp, other, lane == other_lane).then_some(Other {
            what: "written",
            warp: other as u32,
            lane: Some(other_lane),
            at: at as u32,
        })
    }

    fn against(&self, stamps: &[u32], what: &'static str, warp: usize, lane: u32, at: usize) -> Option<Other> {
        for other in 0..self.warps {
            let stamp = stamps[other * self.stride + at];
            let time = stamp >> READ_SHIFT;
            if time < self.base {
                continue;
            }
            let other_lane = stamp & 63;
            if self.unordered(time, warp, other, lane == other_lane) {
                return Some(Other {
                    what,
                    warp: other as u32,
                    lane: (other_lane != MANY).then_some(other_lane),
                    at: at as u32,
                });
            }
        }
        None
    }

    fn against_atomics(&self, warp: usize, lane: u32, at: usize) -> Option<Other> {
        if self.atomics.is_empty() {
            return None;
        }
        self.against(&self.atomics, "changed by an atomic operation", warp, lane, at)
    }

    fn stamp(old: u32, time: u32, lane: u32) -> u32 {
        let new = time << READ_SHIFT | lane;
        if old >> READ_SHIFT == time && old != new { time << READ_SHIFT | MANY } else { new }
    }

    /// Everything up to this time, by any warp, happens before what any warp does from now on.
    pub fn forget(&mut self, time: u32) {
        self.log.retain(|logged| logged.time > time);
    }

    /// Writes the log to the rows.
    #[inline(always)]
    fn write_log<const ISA: usize>(&mut self) {
        if !self.log.is_empty() {
            let log = std::mem::take(&mut self.log);
            // No closure: it would not inherit the target features.
            for logged in &log {
                self.write_logged::<ISA>(logged);
            }
            self.log = log;
            self.log.clear();
        }
    }

    #[inline(always)]
    fn write_logged<const ISA: usize>(&mut self, logged: &Logged) {
        let Logged { ref chunks, origin, time, warp, write } = *logged;
        for chunk in chunks.iter() {
            let at = (origin + chunk.at) as usize;
            assert!(self.holds(at) && warp < self.warps, "a chunk at granule {at} of {}", self.stride);
            // SAFETY: `holds`: every row has 16 entries from `at` on, and `reads` has one for the warp. Only callers
            // whose processor supports ISA ask for it.
            unsafe {
                if write {
                    let stamp = time << WRITE_SHIFT | (warp as u32) << 5;
                    ask::put::<ISA>(self.writes.as_mut_ptr().add(at), stamp, &chunk.lanes, &chunk.some);
                } else {
                    ask::raise::<ISA>(self.latest.as_mut_ptr().add(at), time, &chunk.some);
                    let reads = self.reads.as_mut_ptr().add(warp * self.stride + at);
                    ask::put_or::<ISA>(reads, time << READ_SHIFT, READ_SHIFT, &chunk.lanes, MANY, &chunk.some);
                }
            }
        }
    }

    /// Logs a warp's accesses if everything that has happened to their lines, or with `WRITE` false every write, is
    /// older than what the warp does now. Otherwise, or if they are not to be noted, the rows now have everything that
    /// has been logged. False if the rows have to decide.
    ///
    /// # Safety
    /// The processor supports `ISA`; what is reached is inside shared memory.
    #[inline(always)]
    unsafe fn log_lines<const ISA: usize, const WRITE: bool, const NOTE: bool>(
        &mut self,
        warp: usize,
        reach: Reach<'_>,
    ) -> bool {
        let time = self.clocks[warp * self.warps + warp];
        let settled = self.settled(warp);
        let mut unsettled = false;
        for lines in reach.lines {
            let (at, some) = ((reach.line + i64::from(lines.at)) as usize, &Some16::new(lines.bits));
            debug_assert!(at + 16 <= self.line_writes.len());
            // SAFETY: a line that is reached is inside shared memory, and there is room for 16 lines from each on. The
            // caller guarantees the ISA.
            unsafe {
                let (writes, reads) = (self.line_writes.as_mut_ptr().add(at), self.line_reads.as_mut_ptr().add(at));
                unsettled |= ask::above::<ISA>(writes, settled, some);
                if WRITE || !self.atomics.is_empty() {
                    unsettled |= ask::above::<ISA>(reads, settled, some);
                }
                if NOTE {
                    ask::raise::<ISA>(if WRITE { writes } else { reads }, time, some);
                }
            }
        }
        if unsettled || (NOTE && self.log.len() >= LOG) {
            self.write_log::<ISA>();
        }
        if !unsettled && NOTE {
            self.log.push(Logged { chunks: reach.chunks.clone(), origin: reach.origin, time, warp, write: WRITE });
        }
        !unsettled
    }

    /// Records a warp's reads. False if they need the exact check lane by lane, which may record the same again.
    ///
    /// # Safety
    /// The processor supports `ISA`; what is reached is inside shared memory.
    #[inline(always)]
    pub unsafe fn read_all<const ISA: usize>(&mut self, warp: usize, reach: Reach<'_>) -> bool {
        // SAFETY: guaranteed by the caller; the rows have room for a chunk that begins at any granule.
        unsafe {
            if self.log_lines::<ISA, false, true>(warp, reach) {
                return true;
            }
            for chunk in reach.chunks.iter() {
                if !self.read_chunk::<ISA>(warp, chunk, (reach.origin + chunk.at) as usize) {
                    return false;
                }
            }
        }
        true
    }

    /// As [`read_all`](Self::read_all), for writes, each granule by one lane. Without `NOTE` it only checks.
    ///
    /// # Safety
    /// As for [`read_all`](Self::read_all).
    #[inline(always)]
    pub unsafe fn write_all<const ISA: usize, const NOTE: bool>(&mut self, warp: usize, reach: Reach<'_>) -> bool {
        // SAFETY: as in `read_all`.
        unsafe {
            if self.log_lines::<ISA, true, NOTE>(warp, reach) {
                return true;
            }
            for chunk in reach.chunks.iter() {
                if !self.write_chunk::<ISA, NOTE>(warp, chunk, (reach.origin + chunk.at) as usize) {
                    return false;
                }
            }
        }
        true
    }

    /// A lane reads granules. Returns the access it races with.
    pub fn read(&mut self, warp: usize, lane: u32, granules: Range<usize>) -> Option<Other> {
        self.write_log::<PORTABLE>();
        let time = self.clocks[warp * self.warps + warp];
        for at in granules {
            let other = self.against_write(warp, lane, at).or_else(|| self.against_atomics(warp, lane, at));
            if other.is_some() {
                return other;
            }
            let stamp = &mut self.reads[warp * self.stride + at];
            *stamp = Self::stamp(*stamp, time, lane);
            self.note_read(at, time);
        }
        None
    }

    fn note_read(&mut self, at: usize, time: u32) {
        let line = at >> self.per_line;
        self.latest[at] = self.latest[at].max(time);
        self.line_reads[line] = self.line_reads[line].max(time);
    }

    /// A lane writes granules. `same(i)` says whether granule i already holds the value, which does not race with
    /// earlier accesses.
    pub fn write(
        &mut self,
        warp: usize,
        lane: u32,
        granules: Range<usize>,
        same: impl Fn(usize) -> bool,
    ) -> Option<Other> {
        self.write_log::<PORTABLE>();
        let time = self.clocks[warp * self.warps + warp];
        for (i, at) in granules.enumerate() {
            if !same(i)
                && let Some(other) = self.check_write(warp, lane, at)
            {
                return Some(other);
            }
            self.writes[at] = time << WRITE_SHIFT | (warp as u32) << 5 | lane;
            let line = at >> self.per_line;
            self.line_writes[line] = self.line_writes[line].max(time);
        }
        None
    }

    /// Whether a write to the granule would race.
    pub fn check_write(&mut self, warp: usize, lane: u32, at: usize) -> Option<Other> {
        self.write_log::<PORTABLE>();
        self.against_write(warp, lane, at)
            .or_else(|| self.against(&self.reads, "read", warp, lane, at))
            .or_else(|| self.against_atomics(warp, lane, at))
    }

    /// A lane performs an atomic on granules.
    pub fn atomic(&mut self, warp: usize, lane: u32, granules: Range<usize>) -> Option<Other> {
        self.write_log::<PORTABLE>();
        let time = self.clocks[warp * self.warps + warp];
        for at in granules {
            let other =
                self.against_write(warp, lane, at).or_else(|| self.against(&self.reads, "read", warp, lane, at));
            if other.is_some() {
                return other;
            }
            if !self.atomics.is_empty() {
                let stamp = &mut self.atomics[warp * self.stride + at];
                *stamp = Self::stamp(*stamp, time, lane);
                self.note_read(at, time);
            }
        }
        None
    }

    /// Whether the last writes of a chunk happened before what the warp does now, or were by the same lanes.
    /// Conservative: may say no where the answer is yes.
    #[inline(always)]
    fn after_writes(&self, warp: usize, chunk: &Chunk, writes: &[u32; 16]) -> bool {
        let time = self.clocks[warp * self.warps + warp];
        let least = self.least[warp];
        let mut bad = 0;
        for i in 0..16 {
            let at = writes[i] >> WRITE_SHIFT;
            let own = writes[i] >> 5 & 31 == warp as u32;
            // `least` covers the other warps only, not the warp's own time.
            let unordered = match own {
                true => (at == time) & (writes[i] & 31 != chunk.lanes[i]),
                false => at > least,
            };
            bad |= chunk.some.words[i] & u32::from(unordered).wrapping_neg();
        }
        bad == 0
    }

    /// Whether all stamps of a chunk (reads or atomics) happened before what the warp does now, or are by the same
    /// lanes.
    #[inline(always)]
    fn after_all(&self, stamps: &[u32], warp: usize, chunk: &Chunk, at: usize) -> bool {
        let mut bad = 0;
        for other in 0..self.warps {
            let known = self.clocks[warp * self.warps + other];
            let Some(row) = stamps.get(other * self.stride + at..).and_then(|row| row.first_chunk::<16>()) else {
                return false;
            };
            if other == warp {
                for i in 0..16 {
                    // MANY lanes are never "the same lane".
                    let same = (row[i] & 63 == chunk.lanes[i]) & (chunk.lanes[i] != MANY);
                    let unordered = (row[i] >> READ_SHIFT == known) & !same;
                    bad |= chunk.some.words[i] & u32::from(unordered).wrapping_neg();
                }
            } else {
                for i in 0..16 {
                    bad |= chunk.some.words[i] & u32::from(row[i] >> READ_SHIFT > known).wrapping_neg();
                }
            }
        }
        bad == 0
    }

    /// Whether a chunk at this granule fits the rows, on which the unsafe code below relies.
    #[inline(always)]
    fn holds(&self, at: usize) -> bool {
        at.checked_add(16).is_some_and(|end| end <= self.stride)
    }

    /// Records a warp's reads of a chunk in the rows, to which the log has been written. False if the chunk needs the
    /// exact check lane by lane, which may record the same again.
    ///
    /// # Safety
    /// The processor supports `ISA`; [`holds(at)`](Self::holds) is true.
    #[inline(always)]
    unsafe fn read_chunk<const ISA: usize>(&mut self, warp: usize, chunk: &Chunk, at: usize) -> bool {
        let time = self.clocks[warp * self.warps + warp];
        let limit = self.settled(warp) << WRITE_SHIFT | ((1 << WRITE_SHIFT) - 1);
        // SAFETY: `holds`: every row has 16 entries from `at` on, `writes` and `latest` included. `reads` has a row per
        // warp.
        unsafe {
            let writes = self.writes.as_ptr().add(at);
            if ask::above::<ISA>(writes, limit, &chunk.some) && !self.after_writes(warp, chunk, &*writes.cast()) {
                return false;
            }
            if !self.atomics.is_empty() && !self.after_all(&self.atomics, warp, chunk, at) {
                return false;
            }
            ask::raise::<ISA>(self.latest.as_mut_ptr().add(at), time, &chunk.some);
            let reads = self.reads.as_mut_ptr().add(warp * self.stride + at);
            ask::put_or::<ISA>(reads, time << READ_SHIFT, READ_SHIFT, &chunk.lanes, MANY, &chunk.some);
        }
        true
    }

    /// Records a warp's writes of a chunk, each granule by one lane; otherwise as [`read_chunk`](Self::read_chunk).
    /// Without `NOTE` it only checks.
    ///
    /// # Safety
    /// As for [`read_chunk`](Self::read_chunk).
    #[inline(always)]
    unsafe fn write_chunk<const ISA: usize, const NOTE: bool>(
        &mut self,
        warp: usize,
        chunk: &Chunk,
        at: usize,
    ) -> bool {
        let time = self.clocks[warp * self.warps + warp];
        let settled = self.settled(warp);
        let limit = settled << WRITE_SHIFT | ((1 << WRITE_SHIFT) - 1);
        // SAFETY: `holds`: `writes` and `latest` have 16 entries from `at` on.
        unsafe {
            let writes = self.writes.as_mut_ptr().add(at);
            if ask::above::<ISA>(writes, limit, &chunk.some) && !self.after_writes(warp, chunk, &*writes.cast()) {
                return false;
            }
            if ask::above::<ISA>(self.latest.as_ptr().add(at), settled, &chunk.some) {
                let after = self.after_all(&self.reads, warp, chunk, at)
                    && (self.atomics.is_empty() || self.after_all(&self.atomics, warp, chunk, at));
                if !after {
                    return false;
                }
            }
            if NOTE {
                let stamp = time << WRITE_SHIFT | (warp as u32) << 5;
                ask::put::<ISA>(self.writes.as_mut_ptr().add(at), stamp, &chunk.lanes, &chunk.some);
            }
        }
        true
    }

    /// Publishes the warp's clock at an address.
    pub fn release(&mut self, warp: usize, at: u32) {
        let mine = &self.clocks[warp * self.warps..][..self.warps];
        match self.released.entry(at) {
            Entry::Vacant(place) => {
                place.insert(mine.to_vec());
            }
            Entry::Occupied(mut place) => {
                for (joined, &mine) in place.get_mut().iter_mut().zip(mine) {
                    *joined = (*joined).max(mine);
                }
            }
        }
        self.tick(warp);
    }

    /// Joins the clock published at an address, if any, into the warp's.
    pub fn acquire(&mut self, warp: usize, at: u32) {
        if let Some(clock) = self.released.get(&at) {
            let clock = clock.clone();
            self.join(warp, &clock);
        }
    }

    /// Acquires and releases at an address, in programs with fences.
    pub fn synchronise(&mut self, warp: usize, at: u32) {
        if let Some(clock) = self.released.get(&at) {
            let clock = clock.clone();
            self.join(warp, &clock);
        }
        let clock = self.clock(warp).to_vec();
        self.released.insert(at, clock);
        self.tick(warp);
    }
}

/// How a block learned of others: an address and the length of its log at that time.
type Acquired = (u64, usize);

#[derive(Default)]
struct Orders {
    /// By address: the blocks that released there with their epoch, in order.
    logs: HashMap<u64, Vec<(u32, u32)>>,
    /// By block: what it has acquired.
    acquired: HashMap<u32, Vec<Acquired>>,
}

/// Race detector for global memory, for one launch.
pub struct GlobalRaces {
    shadow: Arc<Shadow>,
    generation: u64,
    orders: Mutex<Orders>,
    /// The barrier of a cooperative grid.
    barrier: Option<GridBarrier>,
}

/// The barrier of a cooperative grid. A block that looks late may see arrivals for the next round already, but those
/// are not what the barrier promises: only releases of completed rounds count.
pub struct GridBarrier {
    /// Addresses of its arrival counters.
    pub addresses: Range<u64>,
    /// Blocks of the grid.
    pub blocks: usize,
}

/// The other side of a race between blocks.
pub struct GlobalConflict {
    /// "written" or "read or changed by an atomic operation".
    pub what: &'static str,
    /// The other block; None if there were several.
    pub block: Option<u32>,
}

const EPOCH_MASK: u64 = 0xfff;
/// Fields of a shadow entry: bytes of the word, "several blocks", block including that flag, generation (one per
/// launch).
const BYTES: u64 = 15;
const SEVERAL: u64 = 1 << 7;
const WHO: u64 = 0x1_ffff_ffff << 7;
const GENERATION: u64 = 0xfff << 52;
/// Set in a sector's writer where the words have entries of their own in this generation. Until then those of this
/// generation are in the sector alone.
const APART: u64 = 1 << 4;

/// A reader entry after `mine` has read the word too.
#[inline(always)]
fn next_reader(old: u64, mine: u64) -> u64 {
    let live = (old ^ mine) & GENERATION == 0;
    let own = (old ^ mine) & WHO == 0;
    let kept = if (old ^ mine) & !BYTES == 0 { old & BYTES } else { 0 };
    let common = old & mine & BYTES;
    // Another block, or several: bytes read by both were read by several.
    let joined = if common != 0 { (mine & !BYTES) | SEVERAL | common } else { mine };
    match (live, own) {
        (false, _) => mine,
        (true, true) => mine | kept,
        (true, false) => joined,
    }
}

/// Nonzero if the entry is of this launch, by a block other than `mine` (or by several), and shares bytes with it.
#[inline(always)]
fn against(other: u64, mine: u64) -> u64 {
    let live = (other ^ mine) & GENERATION == 0;
    let another = (other ^ mine) & WHO != 0;
    if live & another { other & mine & BYTES } else { 0 }
}

/// Broadcasts a word to eight lanes. A macro, because a closure would not inherit the target features.
#[cfg(target_arch = "x86_64")]
macro_rules! set {
    ($x:expr) => {
        std::arch::x86_64::_mm512_set1_epi64($x as i64)
    };
}

/// Records reads by `mine` in `count` entries. Returns whether no writer conflicts.
///
/// # Safety
/// `writers` and `readers` point to `count` entries whose lock is held; the processor supports `ISA`.
#[inline(always)]
unsafe fn read_words<const ISA: usize>(writers: *mut u64, readers: *mut u64, count: usize, mine: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller; the masks limit loads and stores to `count` entries.
        return unsafe {
            let (all, bytes, rest) = (set!(mine), set!(BYTES), set!(!BYTES));
            let (who, generation) = (set!(WHO), set!(GENERATION));
            let several = set!((mine & !BYTES) | SEVERAL);
            let mut bad = 0;
            for i in (0..count).step_by(8) {
                let part = (0xffu32 >> (8 - (count - i).min(8))) as u8;
                let old = _mm512_maskz_loadu_epi64(part, readers.add(i).cast());
                let change = _mm512_xor_si512(old, all);
                let live = _mm512_testn_epi64_mask(change, generation);
                let own = _mm512_testn_epi64_mask(change, who);
                let same = _mm512_testn_epi64_mask(change, rest);
                let common = _mm512_and_si512(_mm512_and_si512(old, all), bytes);
                let joins = live & !own & _mm512_test_epi64_mask(common, common);
                let mut new = _mm512_mask_or_epi64(all, live & same, all, _mm512_and_si512(old, bytes));
                new = _mm512_mask_or_epi64(new, joins, several, common);
                _mm512_mask_storeu_epi64(readers.add(i).cast(), part, new);
                let writer = _mm512_maskz_loadu_epi64(part, writers.add(i).cast());
                bad |= against_avx512(writer, mine);
            }
            bad == 0
        };
    }
    let mut bad = 0;
    for i in 0..count {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let reader = readers.add(i);
            reader.write(next_reader(reader.read(), mine));
            bad |= against(writers.add(i).read(), mine);
        }
    }
    bad == 0
}

/// Records writes by `mine` in `count` entries unless one conflicts. Returns whether none does.
///
/// # Safety
/// As for [`read_words`].
#[inline(always)]
unsafe fn write_words<const ISA: usize>(writers: *mut u64, readers: *mut u64, count: usize, mine: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    if ISA == AVX512 {
        use std::arch::x86_64::*;
        // SAFETY: guaranteed by the caller; the masks limit loads and stores to `count` entries.
        return unsafe {
            let part = |i: usize| (0xffu32 >> (8 - (count - i).min(8))) as u8;
            let mut bad = 0;
            for i in (0..count).step_by(8) {
                bad |= against_avx512(_mm512_maskz_loadu_epi64(part(i), writers.add(i).cast()), mine);
                bad |= against_avx512(_mm512_maskz_loadu_epi64(part(i), readers.add(i).cast()), mine);
            }
            if bad != 0 {
                return false;
            }
            for i in (0..count).step_by(8) {
                let old = _mm512_maskz_loadu_epi64(part(i), writers.add(i).cast());
                let same = _mm512_testn_epi64_mask(_mm512_xor_si512(old, set!(mine)), set!(!BYTES));
                let new = _mm512_mask_or_epi64(set!(mine), same, set!(mine), _mm512_and_si512(old, set!(BYTES)));
                _mm512_mask_storeu_epi64(writers.add(i).cast(), part(i), new);
            }
            true
        };
    }
    // SAFETY: guaranteed by the caller.
    unsafe {
        let mut bad = 0;
        for i in 0..count {
            bad |= against(writers.add(i).read(), mine) | against(readers.add(i).read(), mine);
        }
        if bad != 0 {
            return false;
        }
        for i in 0..count {
            let before = writers.add(i).read();
            let more = if (before ^ mine) & !BYTES == 0 { before & BYTES } else { 0 };
            writers.add(i).write(mine | more);
        }
    }
    true
}

/// [`against`] for eight entries.
///
/// # Safety
/// The processor supports AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn against_avx512(other: std::arch::x86_64::__m512i, mine: u64) -> u8 {
    use std::arch::x86_64::*;
    // SAFETY: guaranteed by the caller.
    unsafe {
        let change = _mm512_xor_si512(other, set!(mine));
        _mm512_testn_epi64_mask(change, set!(GENERATION))
            & _mm512_test_epi64_mask(change, set!(WHO))
            & _mm512_test_epi64_mask(other, set!(mine & BYTES))
    }
}

/// A shadow entry unpacked. Layout from the top: generation (12 bits), epoch (12), block (32), several (1), unused (3),
/// bytes (4).
#[derive(Clone, Copy)]
struct Access {
    epoch: u64,
    block: u32,
    several: bool,
    bytes: u64,
}

impl GlobalRaces {
    /// Starts a new generation for one launch.
    pub fn new(shadow: Arc<Shadow>, barrier: Option<GridBarrier>) -> Self {
        let generation = shadow.next_generation();
        GlobalRaces { shadow, generation, orders: Mutex::default(), barrier }
    }

    fn unpack(&self, word: u64) -> Option<Access> {
        (word >> 52 == self.generation).then_some(Access {
            epoch: word >> 40 & EPOCH_MASK,
            block: (word >> 8) as u32,
            several: word >> 7 & 1 != 0,
            bytes: word & 15,
        })
    }

    fn pack(&self, entry: Access) -> u64 {
        self.generation << 52
            | (entry.epoch & EPOCH_MASK) << 40
            | u64::from(entry.block) << 8
            | u64::from(entry.several) << 7
            | entry.bytes
    }

    fn ordered(&self, block: u32, other: Access, read: bool) -> bool {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if other.several && other.block == block {
            // The earlier readers are forgotten. A block that has synchronised at all gets the benefit of the doubt.
            return orders.acquired.contains_key(&block);
        }
        // Follows acquisitions transitively. Everything a block ever acquired counts, even what it acquired after
        // releasing: this misses races but reports none falsely. Logs only grow, so each is scanned once, however many
        // blocks have acquired it.
        let mut known = vec![block];
        let mut met = HashSet::from([block]);
        let mut gone_through: HashMap<u64, usize> = HashMap::new();
        let mut at = 0;
        while let Some(&reader) = known.get(at) {
            at += 1;
            for &(object, length) in orders.acquired.get(&reader).into_iter().flatten() {
                let from = gone_through.entry(object).or_default();
                for &(released, epoch) in orders.logs[&object].get(*from..length).unwrap_or_default() {
                    if released == other.block && other.epoch < u64::from(epoch) + u64::from(read) {
                        return true;
                    }
                    if (read || epoch > 1) && met.insert(released) {
                        known.push(released);
                    }
                }
                *from = length.max(*from);
            }
        }
        false
    }

    /// The entry of a block that reads or writes `bytes`.
    fn mine(&self, bytes: u64, block: u32, epoch: u32) -> Access {
        Access { epoch: u64::from(epoch) & EPOCH_MASK, block, several: false, bytes }
    }

    /// Records an access of `mine` to a whole sector. Returns whether nothing conflicts, or None if its words have
    /// entries of their own. With `held` false only looks, and returns true if there is nothing to record.
    ///
    /// # Safety
    /// The address lies in the device's range; its lock is held unless `held` is false.
    #[inline(always)]
    unsafe fn note_sector<const WRITE: bool>(&self, address: u64, mine: u64, held: bool) -> Option<bool> {
        // SAFETY: guaranteed by the caller.
        let sector = unsafe { self.shadow.sector(address) };
        let (writer, reader) = (sector.writer.load(Ordering::Relaxed), sector.reader.load(Ordering::Relaxed));
        if writer & APART != 0 && (writer ^ mine) & GENERATION == 0 {
            return None;
        }
        if WRITE {
            let good = against(writer, mine) | against(reader, mine) == 0;
            if held && good {
                sector.writer.store(mine, Ordering::Relaxed);
            }
            return Some(good && (held || writer == mine));
        }
        let next = next_reader(reader, mine);
        if held {
            sector.reader.store(next, Ordering::Relaxed);
        }
        Some(against(writer, mine) == 0 && (held || reader == next))
    }

    /// Gives the words of the sector of an address entries of their own.
    ///
    /// # Safety
    /// The address lies in the device's range; its lock is held.
    unsafe fn take_apart(&self, address: u64) {
        // SAFETY: guaranteed by the caller; the entries of a sector's words follow each other.
        unsafe {
            let sector = self.shadow.sector(address);
            let (writer, reader) = (sector.writer.load(Ordering::Relaxed), sector.reader.load(Ordering::Relaxed));
            if writer & APART != 0 && writer >> 52 == self.generation {
                return;
            }
            let (writers, readers) = self.shadow.word(address & !(SECTOR - 1));
            for (entry, entries) in [(writer, writers), (reader, readers)] {
                if entry >> 52 == self.generation {
                    (0..SECTOR as usize / 4).for_each(|word| entries.add(word).write(entry));
                }
            }
            sector.writer.store(self.generation << 52 | APART, Ordering::Relaxed);
        }
    }

    /// A block reads `bytes` (a 4-bit mask) of the word at an address of the device's range, or changes them by an
    /// atomic.
    pub fn read(&self, address: u64, bytes: u64, block: u32, epoch: u32) -> Option<GlobalConflict> {
        let mine = self.pack(self.mine(bytes, block, epoch));
        let writer = {
            let _held = self.shadow.hold(address);
            // SAFETY: callers pass addresses inside an allocation, hence inside the device's range; the lock of the
            // entries is held.
            unsafe {
                self.take_apart(address);
                let (writer, reader) = self.shadow.word(address);
                reader.write(next_reader(reader.read(), mine));
                writer.read()
            }
        };
        let other = self.unpack(writer)?;
        let conflict = other.block != block && other.bytes & bytes != 0 && !self.ordered(block, other, false);
        conflict.then_some(GlobalConflict { what: "written", block: Some(other.block) })
    }

    /// A block writes. `same` says whether the bytes already hold the value.
    pub fn write(&self, address: u64, bytes: u64, block: u32, epoch: u32, same: bool) -> Option<GlobalConflict> {
        let mine = self.pack(self.mine(bytes, block, epoch));
        let (writer, reader) = {
            let _held = self.shadow.hold(address);
            // SAFETY: as in `read`.
            unsafe {
                self.take_apart(address);
                let (writer, reader) = self.shadow.word(address);
                let before = writer.read();
                // Same block, same epoch: its earlier writes stay recorded.
                let more = if (before ^ mine) & !BYTES == 0 { before & BYTES } else { 0 };
                writer.write(mine | more);
                (before, reader.read())
            }
        };
        if same {
            return None;
        }
        for (what, other, read) in
            [("written", writer, false), ("read or changed by an atomic operation", reader, true)]
        {
            let Some(other) = self.unpack(other) else { continue };
            let another = other.several || other.block != block;
            if another && other.bytes & bytes != 0 && !self.ordered(block, other, read) {
                return Some(GlobalConflict { what, block: (!other.several).then_some(other.block) });
            }
        }
        None
    }

    /// Records a block's accesses to a range. False if it needs the exact check word by word, which may record the same
    /// again.
    ///
    /// # Safety
    /// The range is inside the device's; the processor supports `ISA`.
    #[inline(always)]
    pub unsafe fn approve<const ISA: usize, const WRITE: bool>(
        &self,
        first: u64,
        length: u64,
        block: u32,
        epoch: u32,
    ) -> bool {
        let mine = self.pack(self.mine(0, block, epoch));
        let end = first + length;
        let mut at = first;
        while at < end {
            let whole = |at: u64, stop: u64| at.is_multiple_of(SECTOR) && stop - at >= SECTOR;
            // What the block does again to a whole sector needs no lock: its entry stays as it is, and others that come
            // meanwhile meet that entry.
            // SAFETY: the range is inside the device's.
            if whole(at, end) && unsafe { self.note_sector::<WRITE>(at, mine | BYTES, false) } == Some(true) {
                at += SECTOR;
                continue;
            }
            let stop = end.min((at | (HELD - 1)) + 1);
            let _held = self.shadow.hold(at);
            // SAFETY: `at..stop` is inside the device's range and inside one stretch of HELD bytes, whose lock is held.
            unsafe {
                while at < stop {
                    if whole(at, stop) {
                        match self.note_sector::<WRITE>(at, mine | BYTES, true) {
                            Some(true) => {
                                at += SECTOR;
                                continue;
                            }
                            Some(false) => return false,
                            None => {}
                        }
                    }
                    self.take_apart(at);
                    let stop = stop.min((at | (SECTOR - 1)) + 1);
                    let (mut writers, mut readers) = self.shadow.word(at);
                    // Partial word, whole words, partial word.
                    while at < stop {
                        let (count, bytes) = match stop - at {
                            rest if at.is_multiple_of(4) && rest >= 4 => ((rest / 4) as usize, BYTES),
                            rest => (1, (((1 << rest.min(4 - at % 4)) - 1) << (at % 4)) & BYTES),
                        };
                        let good = match WRITE {
                            true => write_words::<ISA>(writers, readers, count, mine | bytes),
                            false => read_words::<ISA>(writers, readers, count, mine | bytes),
                        };
                        if !good {
                            return false;
                        }
                        (writers, readers) = (writers.add(count), readers.add(count));
                        at = stop.min((at & !3) + 4 * count as u64);
                    }
                }
            }
        }
        true
    }

    /// A block synchronises through an address: a load acquires what others released there, a store releases what its
    /// block had done before its last fence, an atomic does both.
    pub fn synchronise(&self, address: u64, block: u32, epoch: u32, acquire: bool, release: bool) {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let log = orders.logs.entry(address).or_default();
        let length = match &self.barrier {
            Some(barrier) if barrier.addresses.contains(&address) => log.len() / barrier.blocks * barrier.blocks,
            _ => log.len(),
        };
        if release && log.last() != Some(&(block, epoch)) {
            log.push((block, epoch));
        }
        if acquire && length > 0 {
            let acquired = orders.acquired.entry(block).or_default();
            match acquired.iter_mut().find(|(object, _)| *object == address) {
                Some(known) => known.1 = length,
                None => acquired.push((address, length)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lanes::{Addresses, Site, Use, lanes, settle};
    use super::super::shapes::Shapes;
    use super::super::{Isa, best_isa};
    use super::*;
    use crate::memory::Memory;
    use crate::num::{AVX2, AVX512, PORTABLE};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const WARPS: usize = 3;
    const GRANULES: usize = 96;

    /// The exact check lane by lane, as `checks` falls back to it.
    fn by_lanes(races: &mut SharedRaces, warp: usize, at: &Addresses, site: Site) -> bool {
        lanes(site.mask).any(|l| {
            let first = at[l as usize] as usize / 4;
            let granules = first..first + site.bytes as usize / 4;
            match site.usage {
                Use::Load => races.read(warp, l, granules),
                Use::Store => races.write(warp, l, granules, |_| false),
                Use::Atomic => races.atomic(warp, l, granules),
            }
            .is_some()
        })
    }

    /// # Safety
    /// The processor supports `ISA`.
    unsafe fn chunks_agree_with_lanes<const ISA: usize>(seed: u64) -> (u32, u32) {
        let mut random = StdRng::seed_from_u64(seed);
        // Half of the programs have atomics, after which reads too need the rows.
        let atomics = seed.is_multiple_of(2);
        let new = || SharedRaces::new(WARPS, GRANULES, 2, atomics);
        let (mut quick, mut slow) = (new(), new());
        let mut shapes = Shapes::new(3);
        let (mut approved, mut raced) = (0, 0);
        for _ in 0..4000 {
            let warp = random.random_range(0..WARPS);
            match random.random_range(0..12) {
                0 => {
                    quick.tick(warp);
                    slow.tick(warp);
                }
                1 => {
                    // A barrier of the whole block.
                    for races in [&mut quick, &mut slow] {
                        let latest = (0..WARPS).map(|w| races.clock(w)[w]).max().unwrap();
                        races.forget(latest);
                        for w in 0..WARPS {
                            races.join(w, &[latest; WARPS]);
                            races.advance(w, latest + 1);
                        }
                    }
                }
                2 => {
                    for races in [&mut quick, &mut slow] {
                        races.release(warp, 0);
                        races.acquire((warp + 1) % WARPS, 0);
                    }
                }
                3 if random.random_range(0..20) == 0 => {
                    quick.restart();
                    slow.restart();
                }
                _ => {
                    let usage = [Use::Load, Use::Load, Use::Store, Use::Atomic];
                    let usage = usage[random.random_range(0..if atomics { 4 } else { 3 })];
                    let bytes = [4u32, 8, 16][random.random_range(0..3)];
                    let mask = [!0u32, 0xffff, 0x8421][random.random_range(0..3)];
                    // Consecutive, all the same, two addresses, or far apart.
                    let step = [bytes, 0, 4 * bytes % 48][random.random_range(0..3)] as usize;
                    let origin = random.random_range(0..8) * 16;
                    let mut at = Addresses(std::array::from_fn(|l| {
                        ((origin + l * step) % (GRANULES * 4 - 16)) as u64 / u64::from(bytes) * u64::from(bytes)
                    }));
                    settle(&mut at, mask);
                    // One size per instruction.
                    let site = Site {
                        pc: bytes.trailing_zeros() - 2,
                        mask,
                        bytes,
                        usage,
                        element: 0,
                        strong: false,
                        rows: false,
                    };
                    let expected = by_lanes(&mut slow, warp, &at, site);
                    // SAFETY: the caller guarantees the ISA; `holds` is asserted for every chunk.
                    let good = unsafe {
                        usage != Use::Atomic
                            && shapes.recall::<ISA>(&at, site, 2).is_some_and(|shape| {
                                let reach = shape.reach(at[mask.trailing_zeros() as usize & 31], 2);
                                for chunk in reach.chunks.iter() {
                                    assert!(quick.holds((reach.origin + chunk.at) as usize));
                                }
                                match usage {
                                    Use::Load => quick.read_all::<ISA>(warp, reach),
                                    _ => !shape.overlap && quick.write_all::<ISA, true>(warp, reach),
                                }
                            })
                    };
                    let found = !good && by_lanes(&mut quick, warp, &at, site);
                    assert_eq!(found, expected, "seed {seed}");
                    approved += u32::from(good);
                    if expected {
                        // A race ends a launch.
                        raced += 1;
                        (quick, slow) = (new(), new());
                    }
                }
            }
        }
        (approved, raced)
    }

    #[test]
    #[cfg_attr(miri, ignore = "80,000 accesses take too long")]
    fn chunks_find_the_races_that_lanes_find() {
        for seed in 0..20 {
            // SAFETY: `best_isa` says what this processor supports, and smaller sets are included.
            let counts = unsafe {
                match (best_isa(), seed % 3) {
                    (Isa::Avx512, 0) => chunks_agree_with_lanes::<AVX512>(seed),
                    (Isa::Avx512 | Isa::Avx2, 1) => chunks_agree_with_lanes::<AVX2>(seed),
                    _ => chunks_agree_with_lanes::<PORTABLE>(seed),
                }
            };
            assert!(counts.0 > 100 && counts.1 > 100, "{counts:?} approved and raced: too few to tell");
        }
    }

    /// # Safety
    /// The processor supports `ISA`.
    unsafe fn ranges_agree_with_words<const ISA: usize>(seed: u64) -> (u32, u32) {
        let mut random = StdRng::seed_from_u64(seed);
        let memories = [Memory::new(1 << 20), Memory::new(1 << 20)];
        let bases = [0, 1].map(|i| memories[i].alloc(4096).expect("memory"));
        let shadows = [0, 1].map(|i| memories[i].shadow().expect("address space"));
        let begin = || [0, 1].map(|i: usize| GlobalRaces::new(shadows[i].clone(), None));
        let mut races = begin();
        let (mut approved, mut raced) = (0, 0);
        for _ in 0..3000 {
            let (block, epoch) = (random.random_range(0..3), random.random_range(1..3));
            let first = random.random_range(0..600u64);
            // Half of the ranges begin with a sector.
            let first = if random.random() { first } else { first / SECTOR * SECTOR };
            let length = [1, 2, 4, 16, 64, 128, 700][random.random_range(0..7)];
            let write = random.random_range(0..4) == 0;
            let by_words = |races: &GlobalRaces, base: u64| {
                let (mut at, end) = (base + first, base + first + length);
                let mut found = false;
                while at < end && !found {
                    let upto = end.min((at & !3) + 4);
                    let bytes = ((1 << (upto - at)) - 1) << (at % 4);
                    found = match write {
                        true => races.write(at & !3, bytes, block, epoch, false).is_some(),
                        false => races.read(at & !3, bytes, block, epoch).is_some(),
                    };
                    at = upto;
                }
                found
            };
            let expected = by_words(&races[1], bases[1]);
            // SAFETY: the caller guarantees the ISA; first + length <= 1300 is inside the allocation of 4096 bytes.
            let good = unsafe {
                match write {
                    true => races[0].approve::<ISA, true>(bases[0] + first, length, block, epoch),
                    false => races[0].approve::<ISA, false>(bases[0] + first, length, block, epoch),
                }
            };
            let found = !good && by_words(&races[0], bases[0]);
            assert_eq!(found, expected, "seed {seed}");
            approved += u32::from(good);
            if expected || random.random_range(0..50) == 0 {
                raced += u32::from(expected);
                races = begin();
            }
        }
        (approved, raced)
    }

    #[test]
    #[cfg_attr(miri, ignore = "device memory is mapped at fixed addresses")]
    fn ranges_find_the_races_that_words_find() {
        for seed in 0..9 {
            // SAFETY: `best_isa` says what this processor supports; PORTABLE runs everywhere.
            let counts = unsafe {
                match best_isa() {
                    Isa::Avx512 if seed % 2 == 0 => ranges_agree_with_words::<AVX512>(seed),
                    _ => ranges_agree_with_words::<PORTABLE>(seed),
                }
            };
            assert!(counts.0 > 100 && counts.1 > 100, "{counts:?} approved and raced: too few to tell");
        }
    }
}
