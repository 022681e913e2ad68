//! Races: two accesses to a byte, at least one a write, that nothing orders.
//!
//! **Shared memory** (between the threads of a block). Every warp has a vector clock (Lamport; the bookkeeping is that of FastTrack, Flanagan
//! and Freund 2009, per warp instead of per thread). A barrier joins the clocks of those that meet. Inside a warp, an instruction by
//! which lanes wait for each other (`bar.warp.sync`, shuffles, votes, wmma loads and stores) orders what came before it. Atomics and volatile accesses
//! do not race with each other; where the program has fences, an atomic also acquires and releases what its address was last used to
//! release. A write of the value that is already there does not race with what came before: flags are set that way.
//!
//! **Global memory** (between blocks). A word remembers its last writer and reader, and how often that block had fenced. An atomic or volatile
//! access releases all that its block did before its last fence; one that sees the same address later acquires it.
//! Atomic and volatile accesses are not themselves recorded. A word whose bytes belong to different blocks remembers the last one
//! only: some races may be missed there, none is made up.

use crate::memory::Shadow;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

/// Bits of a stamp below its time in `writes`: warp and lane.
const WRITE_SHIFT: u32 = 10;
/// Bits below the time in `reads`: lane, or [`MANY`].
const READ_SHIFT: u32 = 6;
/// Several lanes of the warp.
const MANY: u32 = 32;
/// Times end here; then everything is forgotten.
const LAST_TIME: u32 = (1 << 22) - 1;

/// The other party of a race.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Other {
    /// "written", "read" or "changed by an atomic operation".
    pub what: &'static str,
    /// Its warp.
    pub warp: u32,
    /// Its lane; None when several lanes of the warp did it.
    pub lane: Option<u32>,
    /// The byte.
    pub at: u32,
}

/// Detector for one block's shared memory.
pub struct SharedRaces {
    warps: usize,
    bytes: usize,
    /// Time at which the block began; older stamps are of earlier blocks.
    base: u32,
    /// `clocks[w * warps + v]`: what warp w knows of warp v.
    clocks: Vec<u32>,
    /// Per byte: time, warp, lane of the last write.
    writes: Vec<u32>,
    /// Per warp and byte: time and lane of the last read.
    reads: Vec<u32>,
    /// Per warp and byte: time and lane of the last atomic operation; empty in programs without.
    atomics: Vec<u32>,
    /// Clocks released by atomics, by address.
    released: HashMap<u32, Vec<u32>>,
}

impl SharedRaces {
    /// For blocks of `warps` warps and `bytes` bytes.
    pub fn new(warps: usize, bytes: usize, atomics: bool) -> Self {
        let mut races = SharedRaces {
            warps,
            bytes,
            base: 0,
            clocks: vec![0; warps * warps],
            writes: vec![0; bytes],
            reads: vec![0; warps * bytes],
            atomics: if atomics {
                vec![0; warps * bytes]
            } else {
                vec![]
            },
            released: HashMap::new(),
        };
        races.restart();
        races
    }

    /// Begins another block.
    pub fn restart(&mut self) {
        let last = (0..self.warps)
            .map(|w| self.clocks[w * self.warps + w])
            .max()
            .unwrap_or(0);
        self.released.clear();
        self.begin(last + 1);
    }

    fn begin(&mut self, base: u32) {
        self.base = base;
        if base >= LAST_TIME / 2 {
            self.base = 1;
            self.writes.fill(0);
            self.reads.fill(0);
            self.atomics.fill(0);
        }
        for w in 0..self.warps {
            for v in 0..self.warps {
                self.clocks[w * self.warps + v] = self.base - u32::from(w != v);
            }
        }
    }

    /// The clock of a warp.
    pub fn clock(&self, warp: usize) -> &[u32] {
        &self.clocks[warp * self.warps..][..self.warps]
    }

    /// What the warp did is now ordered before what its lanes do next.
    pub fn tick(&mut self, warp: usize) {
        let clock = &mut self.clocks[warp * self.warps + warp];
        *clock += 1;
        if *clock == LAST_TIME {
            self.begin(LAST_TIME);
        }
    }

    /// The warp learns of another clock.
    pub fn join(&mut self, warp: usize, other: &[u32]) {
        for (mine, &theirs) in self.clocks[warp * self.warps..][..self.warps]
            .iter_mut()
            .zip(other)
        {
            *mine = (*mine).max(theirs);
        }
    }

    fn unordered(&self, time: u32, warp: usize, other: usize, same_lane: bool) -> bool {
        let known = self.clocks[warp * self.warps + other];
        match warp == other {
            true => time == known && !same_lane,
            false => time > known && time >= self.base,
        }
    }

    fn against_write(&self, warp: usize, lane: u32, at: u32) -> Option<Other> {
        let stamp = self.writes[at as usize];
        let time = stamp >> WRITE_SHIFT;
        if time < self.base {
            return None;
        }
        let (other, other_lane) = ((stamp >> 5 & 31) as usize, stamp & 31);
        self.unordered(time, warp, other, lane == other_lane)
            .then_some(Other {
                what: "written",
                warp: other as u32,
                lane: Some(other_lane),
                at,
            })
    }

    fn against(
        &self,
        stamps: &[u32],
        what: &'static str,
        warp: usize,
        lane: u32,
        at: u32,
    ) -> Option<Other> {
        for other in 0..self.warps {
            let stamp = stamps[other * self.bytes + at as usize];
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
                    at,
                });
            }
        }
        None
    }

    fn stamp(stamps: &mut [u32], index: usize, time: u32, lane: u32) {
        let new = time << READ_SHIFT | lane;
        let old = stamps[index];
        stamps[index] = if old >> READ_SHIFT == time && old != new {
            time << READ_SHIFT | MANY
        } else {
            new
        };
    }

    /// Whether the 4 bytes from here on were last written together by an access that is ordered before the warp's, and not touched atomically: the
    /// usual case, decided at once.
    #[inline(always)]
    fn word_is_ordered(&self, warp: usize, lane: u32, at: usize) -> bool {
        let Some(&[a, b, c, d]) = self
            .writes
            .get(at..at + 4)
            .and_then(|word| word.first_chunk())
        else {
            return false;
        };
        if a != b || a != c || a != d || !self.atomics.is_empty() {
            return false;
        }
        let time = a >> WRITE_SHIFT;
        time < self.base || !self.unordered(time, warp, (a >> 5 & 31) as usize, lane == a & 31)
    }

    /// A lane reads bytes.
    pub fn read(&mut self, warp: usize, lane: u32, at: u32, bytes: u32) -> Option<Other> {
        let time = self.clocks[warp * self.warps + warp];
        let (mut at, end) = (at, at + bytes);
        while at < end {
            if end - at >= 4 && self.word_is_ordered(warp, lane, at as usize) {
                let first = warp * self.bytes + at as usize;
                let new = time << READ_SHIFT | lane;
                let many = time << READ_SHIFT | MANY;
                for stamp in &mut self.reads[first..first + 4] {
                    *stamp = if *stamp >> READ_SHIFT == time && *stamp != new {
                        many
                    } else {
                        new
                    };
                }
                at += 4;
                continue;
            }
            let mut other = self.against_write(warp, lane, at);
            if other.is_none() && !self.atomics.is_empty() {
                other = self.against(
                    &self.atomics,
                    "changed by an atomic operation",
                    warp,
                    lane,
                    at,
                );
            }
            if other.is_some() {
                return other;
            }
            Self::stamp(&mut self.reads, warp * self.bytes + at as usize, time, lane);
            at += 1;
        }
        None
    }

    /// A lane writes bytes; `same` says of each whether it already has the value, which makes no race with what came before.
    pub fn write(
        &mut self,
        warp: usize,
        lane: u32,
        at: u32,
        bytes: u32,
        same: impl Fn(u32) -> bool,
    ) -> Option<Other> {
        let time = self.clocks[warp * self.warps + warp];
        let stamp = time << WRITE_SHIFT | (warp as u32) << 5 | lane;
        let mut i = 0;
        while i < bytes {
            let byte = at + i;
            if bytes - i >= 4
                && self.word_is_ordered(warp, lane, byte as usize)
                && self.nobody_read(warp, lane, byte as usize)
            {
                self.writes[byte as usize..][..4].fill(stamp);
                i += 4;
                continue;
            }
            if !same(i)
                && let Some(other) = self.check_write(warp, lane, byte)
            {
                return Some(other);
            }
            self.writes[byte as usize] = stamp;
            i += 1;
        }
        None
    }

    /// Whether all reads of the 4 bytes are ordered before what the lane does now.
    #[inline(always)]
    fn nobody_read(&self, warp: usize, lane: u32, at: usize) -> bool {
        (0..self.warps).all(|other| {
            let known = self.clocks[warp * self.warps + other];
            self.reads[other * self.bytes + at..][..4]
                .iter()
                .all(|&stamp| {
                    let time = stamp >> READ_SHIFT;
                    let ordered = if other == warp {
                        time != known || stamp & 63 == lane
                    } else {
                        time <= known
                    };
                    time < self.base || ordered
                })
        })
    }

    /// Whether a write to the byte would race.
    pub fn check_write(&self, warp: usize, lane: u32, at: u32) -> Option<Other> {
        let other = self
            .against_write(warp, lane, at)
            .or_else(|| self.against(&self.reads, "read", warp, lane, at));
        if other.is_none() && !self.atomics.is_empty() {
            return self.against(
                &self.atomics,
                "changed by an atomic operation",
                warp,
                lane,
                at,
            );
        }
        other
    }

    /// A lane's atomic operation.
    pub fn atomic(&mut self, warp: usize, lane: u32, at: u32, bytes: u32) -> Option<Other> {
        let time = self.clocks[warp * self.warps + warp];
        for at in at..at + bytes {
            let other = self
                .against_write(warp, lane, at)
                .or_else(|| self.against(&self.reads, "read", warp, lane, at));
            if other.is_some() {
                return other;
            }
            if !self.atomics.is_empty() {
                Self::stamp(
                    &mut self.atomics,
                    warp * self.bytes + at as usize,
                    time,
                    lane,
                );
            }
        }
        None
    }

    /// Orders the warp with all that used this address to release, in programs with fences.
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

/// How a block came to know of others: an object and how much of its log there was.
type Acquired = (u64, usize);

#[derive(Default)]
struct Orders {
    /// By address: blocks that released there, with their epoch, in order.
    logs: HashMap<u64, Vec<(u32, u32)>>,
    /// By block: what it acquired.
    acquired: HashMap<u32, Vec<Acquired>>,
}

/// Detector for global memory, for one launch.
pub struct GlobalRaces {
    shadow: Arc<Shadow>,
    generation: u64,
    orders: Mutex<Orders>,
}

/// What was found.
pub struct GlobalConflict {
    /// "written" or "read".
    pub what: &'static str,
    /// The other block, or None when there were several.
    pub block: Option<u32>,
}

const EPOCH_MASK: u64 = 0xfff;

/// A word of the shadow: generation (12 bits), epoch (12), block (32), several blocks (1), free (3), bytes (4).
#[derive(Clone, Copy)]
struct Entry {
    epoch: u64,
    block: u32,
    several: bool,
    bytes: u64,
}

impl GlobalRaces {
    /// For one launch.
    pub fn new(shadow: Arc<Shadow>) -> Self {
        let generation = shadow.next_generation();
        GlobalRaces {
            shadow,
            generation,
            orders: Mutex::default(),
        }
    }

    fn unpack(&self, word: u64) -> Option<Entry> {
        (word >> 52 == self.generation).then_some(Entry {
            epoch: word >> 40 & EPOCH_MASK,
            block: (word >> 8) as u32,
            several: word >> 7 & 1 != 0,
            bytes: word & 15,
        })
    }

    fn pack(&self, entry: Entry) -> u64 {
        self.generation << 52
            | (entry.epoch & EPOCH_MASK) << 40
            | u64::from(entry.block) << 8
            | u64::from(entry.several) << 7
            | entry.bytes
    }

    fn ordered(&self, block: u32, other: Entry) -> bool {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if other.several {
            // Who read is not known any more: a block that has synchronised at all is believed.
            return orders.acquired.contains_key(&block);
        }
        // Everything a block ever acquired counts, also what it acquired after releasing: that misses races, and makes none up.
        let mut known = vec![block];
        let mut at = 0;
        while let Some(&reader) = known.get(at) {
            at += 1;
            for (object, length) in orders.acquired.get(&reader).into_iter().flatten() {
                for &(released, epoch) in &orders.logs[object][..*length] {
                    if released == other.block && other.epoch < u64::from(epoch) {
                        return true;
                    }
                    if !known.contains(&released) {
                        known.push(released);
                    }
                }
            }
        }
        false
    }

    /// A block reads `bytes` (a mask of 4) of the word at an address of the device's range.
    pub fn read(&self, address: u64, bytes: u64, block: u32, epoch: u32) -> Option<GlobalConflict> {
        // SAFETY: callers have found the address in an allocation.
        let (writer, reader) = unsafe { self.shadow.word(address) };
        let mine = Entry {
            epoch: u64::from(epoch) & EPOCH_MASK,
            block,
            several: false,
            bytes,
        };
        let new = match self.unpack(reader.load(Ordering::Relaxed)) {
            Some(old) if old.block == block && !old.several => {
                let kept = if old.epoch == mine.epoch {
                    old.bytes
                } else {
                    0
                };
                Entry {
                    bytes: bytes | kept,
                    ..mine
                }
            }
            Some(old) if old.bytes & bytes != 0 => Entry {
                several: true,
                bytes: old.bytes & bytes,
                ..mine
            },
            _ => mine,
        };
        // Sequentially consistent: of a read and a write at the same time, one sees the other.
        reader.swap(self.pack(new), Ordering::SeqCst);
        let other = self.unpack(writer.load(Ordering::SeqCst))?;
        let conflict =
            other.block != block && other.bytes & bytes != 0 && !self.ordered(block, other);
        conflict.then_some(GlobalConflict {
            what: "written",
            block: Some(other.block),
        })
    }

    /// A block writes; `same` says whether the bytes already have the value.
    pub fn write(
        &self,
        address: u64,
        bytes: u64,
        block: u32,
        epoch: u32,
        same: bool,
    ) -> Option<GlobalConflict> {
        // SAFETY: callers have found the address in an allocation.
        let (writer, reader) = unsafe { self.shadow.word(address) };
        let mine = Entry {
            epoch: u64::from(epoch) & EPOCH_MASK,
            block,
            several: false,
            bytes,
        };
        let old = self.unpack(writer.load(Ordering::Relaxed));
        let new = match old {
            Some(old) if old.block == block && old.epoch == mine.epoch => Entry {
                bytes: bytes | old.bytes,
                ..mine
            },
            _ => mine,
        };
        let old = self.unpack(writer.swap(self.pack(new), Ordering::SeqCst));
        if same {
            return None;
        }
        for (what, other) in [
            ("written", old),
            ("read", self.unpack(reader.load(Ordering::SeqCst))),
        ] {
            let Some(other) = other else { continue };
            let another = other.several || other.block != block;
            if another && other.bytes & bytes != 0 && !self.ordered(block, other) {
                return Some(GlobalConflict {
                    what,
                    block: (!other.several).then_some(other.block),
                });
            }
        }
        None
    }

    /// A block uses an address to synchronise: by a load it acquires what others released there, by a store it releases what it fenced, by an
    /// atomic operation both.
    pub fn synchronise(&self, address: u64, block: u32, epoch: u32, acquire: bool, release: bool) {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let log = orders.logs.entry(address).or_default();
        let length = log.len();
        if release && epoch > 1 && log.last() != Some(&(block, epoch)) {
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
