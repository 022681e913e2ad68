//! Memory instructions: addresses, checks, and moving the bytes.
//!
//! An access first turns its lanes' addresses into host addresses ([`Machine::locate`]), which is where all checks are; lanes outside the mask
//! are given the address of the first lane inside, so that loads can read all 32 without asking. Where only bounds and alignment are checked
//! and all 32 addresses are good, [`Machine::direct`] finds that out faster.

// Loops over lanes and elements index several registers at once, and vectorise that way.
#![allow(clippy::needless_range_loop)]

use super::interp::PORTABLE;
use super::lanes as ask;
use super::races::Other;
use super::state::{Machine, Pending, Warp, lanes, name_thread};
use super::{Fault, FaultKind, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use crate::num::ops;
use crate::ptx::program::{Access, Op, Rmw, Space};
use half::{bf16, f16};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// One address per lane.
pub type Addresses = [u64; 32];

/// What an access does to memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Reads.
    Load,
    /// Writes; the values come with [`Machine::locate`]'s caller, which asks for races itself.
    Store,
    /// Reads and writes atomically.
    Atomic,
}

/// One memory instruction at hand.
#[derive(Clone, Copy)]
pub struct Site {
    /// Step.
    pub pc: u32,
    /// Lanes.
    pub mask: u32,
    /// Bytes per lane.
    pub bytes: u32,
    /// What it does.
    pub usage: Use,
    /// Threads may communicate by it.
    pub strong: bool,
}

/// The first word of every lane of a base register plus an offset.
///
/// # Safety
/// The register lies in the file.
#[inline(always)]
pub unsafe fn addresses(file: *const u8, register: u32, wide: bool, offset: i64) -> Addresses {
    let mut at = [0; 32];
    // SAFETY: the caller's promise; registers are aligned to 64.
    unsafe {
        if wide {
            let base = &*file.add(register as usize).cast::<[u64; 32]>();
            for l in 0..32 {
                at[l] = base[l].wrapping_add(offset as u64);
            }
        } else {
            let base = &*file.add(register as usize).cast::<[u32; 32]>();
            for l in 0..32 {
                at[l] = u64::from(base[l].wrapping_add(offset as u32));
            }
        }
    }
    at
}

/// Gives lanes outside the mask the address of the first lane inside.
#[inline(always)]
pub fn settle(at: &mut Addresses, mask: u32) {
    if mask != !0 {
        let first = at[mask.trailing_zeros() as usize & 31];
        for l in 0..32 {
            at[l] = if mask >> l & 1 != 0 { at[l] } else { first };
        }
    }
}

/// Smallest, largest and the disjunction of all addresses.
#[inline(always)]
fn extent(at: &Addresses) -> (u64, u64, u64) {
    let (mut low, mut high, mut bits) = (!0, 0, 0);
    for &a in at {
        low = a.min(low);
        high = a.max(high);
        bits |= a;
    }
    (low, high, bits)
}

/// Whether lane l's address is the first plus l times a step.
#[inline(always)]
pub fn progression(at: &Addresses, step: u64) -> bool {
    let mut wrong = 0;
    for l in 0..32 {
        wrong |= at[l] ^ at[0].wrapping_add(l as u64 * step);
    }
    wrong == 0
}

impl Machine<'_> {
    /// Checks the accesses of a warp and turns their addresses into host addresses.
    #[inline(never)]
    pub fn locate(&mut self, warp: &mut Warp, space: Space, at: &mut Addresses, site: Site) -> Result<(), Box<Fault>> {
        match space {
            Space::Generic => self.locate_generic(warp, at, site),
            Space::Shared => self.locate_shared(warp, at, site),
            Space::Global => self.locate_global(warp, at, site),
            Space::Local | Space::Param => self.locate_private(warp, space, at, site),
        }
    }

    /// Lanes may point into different spaces; each is done on its own.
    fn locate_generic(&mut self, warp: &mut Warp, at: &mut Addresses, site: Site) -> Result<(), Box<Fault>> {
        let windows = [
            (SHARED_WINDOW, Space::Shared),
            (LOCAL_WINDOW, Space::Local),
            (PARAM_WINDOW, Space::Param),
            (0, Space::Global),
        ];
        let mut rest = site.mask;
        for (window, space) in windows {
            let mask = lanes(rest)
                .filter(|&l| window == 0 || at[l as usize] >> 56 == window >> 56)
                .fold(0, |mask, l| mask | 1 << l);
            if mask == 0 {
                continue;
            }
            rest &= !mask;
            if space == Space::Param && site.usage != Use::Load {
                let lane = mask.trailing_zeros();
                return Err(self.out_of_bounds(warp, site, lane, "kernel parameters cannot be written".into()));
            }
            let mut part = at.map(|a| a.wrapping_sub(window));
            settle(&mut part, mask);
            self.locate(warp, space, &mut part, Site { mask, ..site })?;
            for l in lanes(mask) {
                at[l as usize] = part[l as usize];
            }
        }
        settle(at, site.mask);
        Ok(())
    }

    fn verb(site: Site) -> &'static str {
        match site.usage {
            Use::Load => "read",
            Use::Store => "write",
            Use::Atomic => "atomic operation",
        }
    }

    fn out_of_bounds(&self, warp: &Warp, site: Site, lane: u32, detail: String) -> Box<Fault> {
        self.fault(FaultKind::OutOfBounds, warp, site.pc, lane, detail)
    }

    /// The first lane whose address is not a multiple of the size is a fault.
    fn check_alignment(&self, warp: &Warp, at: &Addresses, site: Site, what: &str) -> Result<(), Box<Fault>> {
        if !self.env.checks.bounds && site.usage != Use::Atomic {
            return Ok(());
        }
        match lanes(site.mask).find(|&l| !at[l as usize].is_multiple_of(u64::from(site.bytes))) {
            None => Ok(()),
            Some(lane) => {
                let detail = format!(
                    "{} of {} bytes at {what} {:#x}, which is not a multiple of {}",
                    Self::verb(site),
                    site.bytes,
                    at[lane as usize],
                    site.bytes
                );
                Err(self.fault(FaultKind::Misaligned, warp, site.pc, lane, detail))
            }
        }
    }

    fn locate_shared(&mut self, warp: &mut Warp, at: &mut Addresses, site: Site) -> Result<(), Box<Fault>> {
        let env = self.env;
        let size = u64::from(env.shared_bytes);
        for l in lanes(site.mask) {
            let a = at[l as usize];
            if a.checked_add(u64::from(site.bytes)).is_none_or(|end| end > size) {
                let detail = format!(
                    "{} of {} bytes at shared address {a:#x}, the block has {size} bytes of shared memory",
                    Self::verb(site),
                    site.bytes
                );
                return Err(self.out_of_bounds(warp, site, l, detail));
            }
        }
        self.check_alignment(warp, at, site, "shared address")?;
        if env.settings.counters {
            self.count_shared(at, site);
        }
        if env.checks.uninitialised {
            for l in lanes(site.mask) {
                let range = at[l as usize] as usize..at[l as usize] as usize + site.bytes as usize;
                if site.usage == Use::Store {
                    self.block.shared_written[range].fill(1);
                } else if let Some(first) = self.block.shared_written[range].iter().position(|&w| w == 0) {
                    let detail =
                        format!("reads shared memory at {:#x} that nothing has written", at[l as usize] + first as u64);
                    return Err(self.fault(FaultKind::Uninitialised, warp, site.pc, l, detail));
                }
            }
        }
        if let Some(races) = &mut self.block.races {
            let w = warp.index as usize;
            let mut found = None;
            if !site.strong || site.usage == Use::Atomic {
                for l in lanes(site.mask) {
                    let a = at[l as usize] as u32;
                    let other = match site.usage {
                        Use::Load => races.read(w, l, a, site.bytes),
                        Use::Atomic => races.atomic(w, l, a, site.bytes),
                        Use::Store => None,
                    };
                    if let Some(other) = other {
                        found = Some((l, other));
                        break;
                    }
                    let pending = &self.block.shared_pending[a as usize..(a + site.bytes) as usize];
                    if let Some(first) = pending.iter().position(|&p| p != 0) {
                        let detail = format!(
                            "{} of shared memory at {:#x} before the cp.async that fills it has been waited for",
                            Self::verb(site),
                            a + first as u32
                        );
                        return Err(self.fault(FaultKind::SharedRace, warp, site.pc, l, detail));
                    }
                }
            }
            if site.strong && env.program.fences {
                for l in lanes(site.mask) {
                    races.synchronise(w, at[l as usize] as u32);
                }
            }
            if let Some((lane, other)) = found {
                return Err(self.shared_race(warp, site, lane, other));
            }
        }
        let base = self.block.shared.as_mut_ptr() as u64;
        for a in at.iter_mut() {
            *a += base;
        }
        Ok(())
    }

    /// The races of a store, which needs its values: `values[l]` are the bytes of lane l.
    fn shared_store_races(
        &mut self,
        warp: &Warp,
        at: &Addresses,
        site: Site,
        values: &[[u8; 16]; 32],
    ) -> Result<(), Box<Fault>> {
        if site.strong {
            return Ok(());
        }
        let base = self.block.shared.as_mut_ptr() as u64;
        let bytes = u64::from(self.env.shared_bytes);
        let Some(races) = &mut self.block.races else {
            return Ok(());
        };
        for l in lanes(site.mask) {
            let a = at[l as usize].wrapping_sub(base);
            if a >= bytes {
                continue;
            }
            let value = &values[l as usize];
            // SAFETY: `locate` has found the bytes inside the block's shared memory.
            let now = unsafe { std::slice::from_raw_parts(at[l as usize] as *const u8, site.bytes as usize) };
            if let Some(other) =
                races.write(warp.index as usize, l, a as u32, site.bytes, |i| now[i as usize] == value[i as usize])
            {
                return Err(self.shared_race(warp, site, l, other));
            }
            // Written as it is checked, so that two lanes of one instruction see each other.
            // SAFETY: as above; the store proper writes the same bytes again.
            unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), at[l as usize] as *mut u8, site.bytes as usize) };
        }
        Ok(())
    }

    fn shared_race(&self, warp: &Warp, site: Site, lane: u32, other: Other) -> Box<Fault> {
        let who = match other.lane {
            Some(lane) => format!("thread {}", name_thread(self.env.thread(other.warp, lane))),
            None => format!("several threads of warp {}", other.warp),
        };
        let detail = format!(
            "{} of shared memory at {:#x}, which {who} has {} with no barrier between",
            Self::verb(site),
            other.at,
            other.what
        );
        self.fault(FaultKind::SharedRace, warp, site.pc, lane, detail)
    }

    fn locate_global(&mut self, warp: &mut Warp, at: &mut Addresses, site: Site) -> Result<(), Box<Fault>> {
        let env = self.env;
        let (low, high, _) = extent(at);
        let bytes = u64::from(site.bytes);
        let slot = site.pc as usize & 15;
        let (start, end) = self.cache[slot];
        if !(low >= start && high < end && end - high >= bytes) {
            match env.allocation(low, (high - low).saturating_add(bytes)) {
                Some(found) => self.cache[slot] = (found.address, found.address + found.bytes),
                None => self.check_lanes(warp, at, site)?,
            }
        }
        self.check_alignment(warp, at, site, "address")?;
        if env.settings.counters {
            self.count_global(at, site);
        }
        if env.checks.uninitialised {
            match site.usage {
                Use::Store => {
                    let dense = site.mask == !0 && progression(at, bytes);
                    if dense {
                        env.memory.mark(at[0], bytes * 32, true);
                    } else {
                        lanes(site.mask).for_each(|l| env.memory.mark(at[l as usize], bytes, true));
                    }
                }
                _ => self.check_written(warp, at, site)?,
            }
        }
        if let Some(races) = &env.global_races {
            let block = self.block.linear as u32;
            if site.strong {
                if env.program.fences {
                    for l in lanes(site.mask) {
                        races.synchronise(
                            at[l as usize],
                            block,
                            self.block.epoch,
                            site.usage != Use::Store,
                            site.usage != Use::Load,
                        );
                    }
                }
            } else if site.usage == Use::Load {
                self.global_races(warp, at, site, None)?;
            }
        }
        Ok(())
    }

    /// Lanes that are not all in one allocation: each must be in some.
    fn check_lanes(&self, warp: &Warp, at: &Addresses, site: Site) -> Result<(), Box<Fault>> {
        let env = self.env;
        let bytes = u64::from(site.bytes);
        for l in lanes(site.mask) {
            let a = at[l as usize];
            let inside = if env.checks.bounds {
                env.allocation(a, bytes).is_some()
            } else {
                a >= env.range.0 && a.saturating_add(bytes) <= env.range.0 + env.range.1
            };
            if !inside {
                let detail = format!(
                    "{} of {bytes} bytes at address {a:#x}, which is in no allocation: {}",
                    Self::verb(site),
                    env.memory.nearest(a)
                );
                return Err(self.out_of_bounds(warp, site, l, detail));
            }
        }
        Ok(())
    }

    fn check_written(&self, warp: &Warp, at: &Addresses, site: Site) -> Result<(), Box<Fault>> {
        let (low, high, _) = extent(at);
        let memory = self.env.memory;
        let bytes = u64::from(site.bytes);
        if high - low <= 4096 && memory.written(low, high - low + bytes) {
            return Ok(());
        }
        for l in lanes(site.mask) {
            let a = at[l as usize];
            if memory.written(a, bytes) {
                continue;
            }
            let first = (a..a + bytes).find(|&byte| !memory.written(byte, 1)).unwrap_or(a);
            let place = match self.env.allocation(a, 1) {
                Some(found) => {
                    format!("byte {} of allocation {} ({} bytes)", first - found.address, found.serial, found.bytes)
                }
                None => "outside every allocation".into(),
            };
            let detail = format!("reads address {first:#x}, {place}, that nothing has written");
            return Err(self.fault(FaultKind::Uninitialised, warp, site.pc, l, detail));
        }
        Ok(())
    }

    /// Races between blocks of a plain access; stores give their values.
    fn global_races(
        &self,
        warp: &Warp,
        at: &Addresses,
        site: Site,
        values: Option<&[[u8; 16]; 32]>,
    ) -> Result<(), Box<Fault>> {
        let env = self.env;
        let Some(races) = &env.global_races else {
            return Ok(());
        };
        if site.strong {
            return Ok(());
        }
        let block = self.block.linear as u32;
        let (base, size) = env.range;
        for l in lanes(site.mask) {
            let a = at[l as usize];
            if a.wrapping_sub(base) >= size {
                continue;
            }
            let end = a + u64::from(site.bytes);
            let mut word = a & !3;
            while word < end {
                let (from, upto) = (a.max(word), end.min(word + 4));
                let bytes = ((1 << (upto - word)) - 1) & !((1u64 << (from - word)) - 1);
                let conflict = match values {
                    None => races.read(word, bytes, block, self.block.epoch),
                    Some(values) => {
                        // SAFETY: the bytes lie in an allocation.
                        let now = unsafe { std::slice::from_raw_parts(from as *const u8, (upto - from) as usize) };
                        let same = now == &values[l as usize][(from - a) as usize..(upto - a) as usize];
                        races.write(word, bytes, block, self.block.epoch, same)
                    }
                };
                if let Some(conflict) = conflict {
                    let [gx, gy, _] = env.launch.grid;
                    let who = match conflict.block {
                        Some(other) => format!("block ({},{},{})", other % gx, other / gx % gy, other / gx / gy),
                        None => "several blocks".into(),
                    };
                    let place = env.allocation(a, 1).map_or(String::new(), |found| {
                        format!(" (byte {} of allocation {})", from - found.address, found.serial)
                    });
                    let detail = format!(
                        "{} of global memory at {from:#x}{place}, which {who} has {} in this launch with nothing to order them",
                        Self::verb(site),
                        conflict.what
                    );
                    return Err(self.fault(FaultKind::GlobalRace, warp, site.pc, l, detail));
                }
                word += 4;
            }
        }
        Ok(())
    }

    /// Local memory and parameters.
    fn locate_private(
        &mut self,
        warp: &mut Warp,
        space: Space,
        at: &mut Addresses,
        site: Site,
    ) -> Result<(), Box<Fault>> {
        let env = self.env;
        let (size, what) = match space {
            Space::Local => (u64::from(env.launch.kernel.local_bytes), "local address"),
            _ => (env.launch.params.len() as u64, "parameter address"),
        };
        for l in lanes(site.mask) {
            let a = at[l as usize];
            if a.checked_add(u64::from(site.bytes)).is_none_or(|end| end > size) {
                let detail = format!("{} of {} bytes at {what} {a:#x}, of {size} bytes", Self::verb(site), site.bytes);
                return Err(self.out_of_bounds(warp, site, l, detail));
            }
        }
        self.check_alignment(warp, at, site, what)?;
        let stride = u64::from(env.local_stride);
        if space == Space::Local {
            if env.settings.counters {
                self.counters.local += 1;
            }
            let base = warp.local.as_mut_ptr() as u64;
            for (l, a) in at.iter_mut().enumerate() {
                *a += base + l as u64 * stride;
            }
        } else {
            let base = env.launch.params.as_ptr() as u64;
            for a in at.iter_mut() {
                *a += base;
            }
        }
        Ok(())
    }

    fn count_global(&mut self, at: &Addresses, site: Site) {
        let counters = &mut self.counters;
        counters.global += 1;
        let asked = u64::from(site.bytes * site.mask.count_ones());
        match site.usage {
            Use::Load => counters.global_load_bytes += asked,
            Use::Store => counters.global_store_bytes += asked,
            Use::Atomic => counters.atomics += u64::from(site.mask.count_ones()),
        }
        let touched = self.env.touched.as_ref();
        if progression(at, u64::from(site.bytes)) {
            let (first, last) = (at[0] / 32, (at[31] + u64::from(site.bytes) - 1) / 32);
            counters.global_sectors += last - first + 1;
            if let Some(touched) = touched {
                touched.touch(first, last);
            }
            return;
        }
        // An access is aligned to its size of at most 16 bytes, so it touches one sector.
        let mut sectors = at.map(|a| a / 32);
        if !sectors.is_sorted() {
            sectors.sort_unstable();
        }
        let mut last = None;
        for sector in sectors {
            if last != Some(sector) {
                counters.global_sectors += 1;
                if let Some(touched) = touched {
                    touched.touch(sector, sector);
                }
                last = Some(sector);
            }
        }
    }

    /// Wavefronts: 32 banks of 4 bytes; accesses of 8 and 16 bytes go by half and quarter warps, as the hardware does.
    fn count_shared(&mut self, at: &Addresses, site: Site) {
        let counters = &mut self.counters;
        counters.shared += 1;
        if site.usage == Use::Atomic {
            counters.atomics += u64::from(site.mask.count_ones());
        }
        // An aligned access of 4, 8 or 16 bytes is one unit, and a pass has as many lanes as there are units in all banks.
        let unit = site.bytes.max(4);
        let lanes_per_pass = 128 / unit;
        for pass in 0..32 / lanes_per_pass {
            let part = site.mask & (((1u64 << lanes_per_pass) - 1) << (pass * lanes_per_pass)) as u32;
            if part == 0 {
                continue;
            }
            // The first unit seen in each place of the banks; others in the same place are further wavefronts.
            let mut first = [u64::MAX; 32];
            let (mut more, mut count) = ([0u64; 32], 0);
            for l in lanes(part) {
                let unit = at[l as usize] / u64::from(unit);
                let slot = &mut first[unit as usize % lanes_per_pass as usize];
                if *slot == u64::MAX {
                    *slot = unit;
                } else if *slot != unit {
                    more[count] = unit;
                    count += 1;
                }
            }
            let mut wavefronts = 1;
            if count > 0 {
                let mut places = [1u8; 32];
                more[..count].sort_unstable();
                let mut last = u64::MAX;
                for &unit in &more[..count] {
                    let place = &mut places[unit as usize % lanes_per_pass as usize];
                    *place += u8::from(unit != last);
                    wavefronts = wavefronts.max(*place);
                    last = unit;
                }
            }
            counters.shared_wavefronts += u64::from(wavefronts);
            counters.shared_ideal += 1;
        }
    }

    /// What a plain access needs where all lanes' addresses lie inside shared memory, or inside the allocation that the instruction used last, and no
    /// check is wanted that looks at single lanes: where lane 0's base stands and what is added to the bases to give host addresses.
    #[inline(always)]
    fn direct<const ISA: usize>(
        &mut self,
        file: *mut u8,
        register: u32,
        access: &Access,
        site: Site,
    ) -> Option<(*const u8, u64)> {
        let env = self.env;
        // SAFETY: the base is a register inside the file, of 64 or 32 bits as the access says; the loop runs on a processor with ISA.
        let (base, inside, added) = unsafe {
            let base = file.add(register as usize).cast_const();
            let low = site.bytes - 1;
            match access.space {
                Space::Shared if !env.checks.any_shared() && env.shared_bytes >= site.bytes => {
                    let span = env.shared_bytes - site.bytes;
                    let inside = if access.wide_base {
                        ask::inside64::<ISA>(base.cast(), access.offset as u64, 0, span.into(), low.into())
                    } else {
                        // A negative sum wraps to a large one, so what is inside needs no carry in 64 bits either.
                        ask::inside32::<ISA>(base.cast(), access.offset as u32, span, low)
                    };
                    (base, inside, self.block.shared.as_mut_ptr() as u64)
                }
                Space::Global | Space::Generic if access.wide_base && !env.checks.any_global() => {
                    let (start, end) = self.cache[site.pc as usize & 15];
                    let fits = end - start >= u64::from(site.bytes);
                    let span = end.wrapping_sub(start).wrapping_sub(site.bytes.into());
                    let inside =
                        fits && ask::inside64::<ISA>(base.cast(), access.offset as u64, start, span, low.into());
                    (base, inside, 0)
                }
                _ => return None,
            }
        };
        if !inside {
            return None;
        }
        if env.settings.counters {
            // SAFETY: as above.
            let mut at = unsafe { addresses(file, register, access.wide_base, access.offset) };
            settle(&mut at, site.mask);
            match access.space {
                Space::Shared => self.count_shared(&at, site),
                _ => self.count_global(&at, site),
            }
        }
        Some((base, added))
    }

    /// `ld`
    #[inline(always)]
    pub fn load<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        access: &Access,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> {
        let elements = access.elements as usize;
        let file = warp.file.as_mut_ptr();
        let bytes = u32::from(access.bytes) * access.elements as u32;
        let site = Site { pc, mask, bytes, usage: Use::Load, strong: access.strong };
        let register = operands[elements];
        let single = mask == !0 && bytes == 4;
        // SAFETY: `direct` and `locate` have checked `bytes` readable bytes at every lane's address (in `locate`, lanes outside the mask share one), and the
        // registers are in the file.
        unsafe {
            if let Some((base, added)) = self.direct::<ISA>(file, register, access, site) {
                if access.wide_base {
                    let base = base.cast::<u64>();
                    let added = added.wrapping_add(access.offset as u64);
                    let dense = single && ask::steps64::<ISA>(base, bytes.into());
                    let equal = [false; 2];
                    load_from::<ISA>(file, operands, access, mask, dense, equal, |l| {
                        base.add(l).read().wrapping_add(added) as *const u8
                    });
                } else {
                    let base = base.cast::<u32>();
                    let offset = access.offset as u32;
                    let dense = single && ask::steps32::<ISA>(base, bytes);
                    let at = |l: usize| (added + u64::from(base.add(l).read().wrapping_add(offset))) as *const u8;
                    let equal = match elements {
                        4 => [ask::equal32::<ISA>(base), ask::equal32::<ISA>(base.add(16))],
                        _ => [false; 2],
                    };
                    load_from::<ISA>(file, operands, access, mask, dense, equal, at);
                }
                return Ok(());
            }
        }
        self.load_slowly(warp, operands, access, site)
    }

    #[inline(never)]
    fn load_slowly(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        access: &Access,
        site: Site,
    ) -> Result<(), Box<Fault>> {
        let file = warp.file.as_mut_ptr();
        let register = operands[access.elements as usize];
        // SAFETY: the decoder gives a load its destinations and then its base; all are inside the file.
        let mut at = unsafe { addresses(file, register, access.wide_base, access.offset) };
        settle(&mut at, site.mask);
        self.locate(warp, access.space, &mut at, site)?;
        // SAFETY: `locate` has checked the bytes at every address, and the registers are in the file.
        unsafe {
            let dense = progression(&at, site.bytes.into());
            load_from::<PORTABLE>(file, operands, access, site.mask, dense, [false; 2], |l| at[l] as *const u8);
        }
        Ok(())
    }

    /// `st`
    #[inline(always)]
    pub fn store<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        access: &Access,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> {
        let file = warp.file.as_mut_ptr();
        let bytes = u32::from(access.bytes) * access.elements as u32;
        let site = Site { pc, mask, bytes, usage: Use::Store, strong: access.strong };
        let single = mask == !0 && bytes == 4;
        // SAFETY: `direct` has checked `bytes` writable bytes at every lane's address, and the registers are in the file.
        unsafe {
            if let Some((base, added)) = self.direct::<ISA>(file, operands[0], access, site) {
                if access.wide_base {
                    let base = base.cast::<u64>();
                    let added = added.wrapping_add(access.offset as u64);
                    let dense = single && ask::steps64::<ISA>(base, bytes.into());
                    store_to(file, operands, access, mask, dense, |l| {
                        base.add(l).read().wrapping_add(added) as *mut u8
                    });
                } else {
                    let base = base.cast::<u32>();
                    let offset = access.offset as u32;
                    let dense = single && ask::steps32::<ISA>(base, bytes);
                    let at = |l: usize| (added + u64::from(base.add(l).read().wrapping_add(offset))) as *mut u8;
                    store_to(file, operands, access, mask, dense, at);
                }
                return Ok(());
            }
        }
        self.store_slowly(warp, operands, access, site)
    }

    #[inline(never)]
    fn store_slowly(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        access: &Access,
        site: Site,
    ) -> Result<(), Box<Fault>> {
        let file = warp.file.as_mut_ptr();
        // SAFETY: the decoder gives a store its base and then its values; all are inside the file.
        let mut at = unsafe { addresses(file, operands[0], access.wide_base, access.offset) };
        settle(&mut at, site.mask);
        self.locate(warp, access.space, &mut at, site)?;
        if self.block.races.is_some() || self.env.global_races.is_some() {
            let mut values = [[0; 16]; 32];
            for l in lanes(site.mask) {
                // SAFETY: a lane's values are inside the file.
                unsafe { gather_lane(file, &operands[1..], access, l as usize, &mut values[l as usize]) };
            }
            self.global_races(warp, &at, site, Some(&values))?;
            self.shared_store_races(warp, &at, site, &values)?;
        }
        // SAFETY: `locate` has checked the bytes at every lane's address.
        unsafe {
            store_to(file, operands, access, site.mask, progression(&at, site.bytes.into()), |l| at[l] as *mut u8)
        };
        Ok(())
    }

    /// `atom` and `red`
    #[inline(never)]
    #[allow(clippy::too_many_arguments)]
    pub fn atom(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        rmw: Rmw,
        reduce: bool,
        access: &Access,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> {
        let skip = usize::from(!reduce);
        let file = warp.file.as_mut_ptr();
        // SAFETY: the decoder gives (destination,) base and operands, all inside the file.
        let mut at = unsafe { addresses(file, operands[skip], access.wide_base, access.offset) };
        settle(&mut at, mask);
        let site = Site { pc, mask, bytes: u32::from(access.bytes), usage: Use::Atomic, strong: true };
        self.locate(warp, access.space, &mut at, site)?;
        let shared = self.block.shared.as_mut_ptr() as u64;
        let in_shared = |a: u64| a.wrapping_sub(shared) < u64::from(self.env.shared_bytes);
        let wide = access.bytes == 8;
        for l in lanes(mask) {
            let l = l as usize;
            // SAFETY: registers are inside the file, 32 or 64 bits wide as the access says.
            let read = |operand: u32| unsafe {
                let register = file.add(operand as usize);
                if wide {
                    register.cast::<u64>().add(l).read()
                } else {
                    u64::from(register.cast::<u32>().add(l).read())
                }
            };
            let b = read(operands[skip + 1]);
            let c = if rmw == Rmw::Cas { read(operands[skip + 2]) } else { 0 };
            let flush = !in_shared(at[l]);
            // SAFETY: `locate` has found the address in memory that only the emulated program uses, aligned to its size.
            let old = unsafe { modify(at[l], rmw, access.bytes, b, c, flush) };
            if !reduce {
                // SAFETY: as for `read`.
                unsafe {
                    let register = file.add(operands[0] as usize);
                    if wide {
                        register.cast::<u64>().add(l).write(old)
                    } else {
                        register.cast::<u32>().add(l).write(old as u32)
                    }
                }
            }
        }
        Ok(())
    }

    /// `cp.async`: the data is read now and arrives when it is waited for.
    #[inline(never)]
    pub fn cp_async(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        op: &Op,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> {
        let Op::CpAsync { bytes, to, from, wide_to, ignore } = *op else { unreachable!("called for cp.async only") };
        let file = warp.file.as_mut_ptr();
        // SAFETY: the decoder gives destination, source and perhaps a third operand, all inside the file.
        let (mut target, source, sizes) = unsafe {
            let sizes = match operands.get(2) {
                None => [u32::from(bytes); 32],
                Some(&p) if ignore => {
                    let ignored = file.add(p as usize).cast::<u32>().read();
                    std::array::from_fn(|l| if ignored >> l & 1 != 0 { 0 } else { u32::from(bytes) })
                }
                Some(&size) => file.add(size as usize).cast::<[u32; 32]>().read(),
            };
            (addresses(file, operands[0], wide_to, to), addresses(file, operands[1], true, from), sizes)
        };
        if let Some(lane) = lanes(mask).find(|&l| sizes[l as usize] > u32::from(bytes)) {
            let detail = format!("a source of {} bytes for a copy of {bytes}", sizes[lane as usize]);
            return Err(self.fault(FaultKind::Illegal, warp, pc, lane, detail));
        }
        let offsets = target;
        settle(&mut target, mask);
        // Races and initialisation are looked at when the data arrives; bounds and alignment now.
        let checks = Site { pc, mask, bytes: u32::from(bytes), usage: Use::Store, strong: true };
        for l in lanes(mask) {
            let a = offsets[l as usize];
            if a + u64::from(bytes) > u64::from(self.env.shared_bytes) {
                let detail = format!(
                    "write of {bytes} bytes at shared address {a:#x}, the block has {} bytes of shared memory",
                    self.env.shared_bytes
                );
                return Err(self.out_of_bounds(warp, checks, l, detail));
            }
        }
        self.check_alignment(warp, &target, checks, "shared address")?;
        if self.env.settings.counters {
            self.count_shared(&target, checks);
        }
        for size in 1..=u32::from(bytes) {
            let part = lanes(mask).filter(|&l| sizes[l as usize] == size).fold(0, |part, l| part | 1 << l);
            if part == 0 {
                continue;
            }
            self.check_alignment(warp, &source, Site { mask: part, usage: Use::Load, ..checks }, "address")?;
            let mut at = source;
            settle(&mut at, part);
            if size.is_power_of_two() {
                self.locate(
                    warp,
                    Space::Global,
                    &mut at,
                    Site { pc, mask: part, bytes: size, usage: Use::Load, strong: false },
                )?;
            } else {
                for byte in 0..u64::from(size) {
                    let mut at = at.map(|a| a + byte);
                    self.locate(
                        warp,
                        Space::Global,
                        &mut at,
                        Site { pc, mask: part, bytes: 1, usage: Use::Load, strong: false },
                    )?;
                }
            }
        }
        for l in lanes(mask) {
            let at = offsets[l as usize] as u32;
            let mut data = [0; 16];
            // SAFETY: `locate` has found `sizes[l]` readable bytes, at most 16.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    source[l as usize] as *const u8,
                    data.as_mut_ptr(),
                    sizes[l as usize] as usize,
                )
            };
            let group = warp.committed[l as usize];
            if let Some(races) = &self.block.races {
                let other =
                    (at..at + u32::from(bytes)).find_map(|byte| races.check_write(warp.index as usize, l, byte));
                if let Some(other) = other {
                    return Err(self.shared_race(warp, checks, l, other));
                }
                for pending in &mut self.block.shared_pending[at as usize..at as usize + usize::from(bytes)] {
                    *pending = pending.saturating_add(1);
                }
            }
            warp.pending.push(Pending { lane: l as u8, bytes, group, to: at, data });
        }
        Ok(())
    }

    /// Completes the copies of the lanes in `mask` except their last `keep` groups; u32::MAX completes what is not committed too.
    #[inline(never)]
    pub fn cp_wait(&mut self, warp: &mut Warp, keep: u32, pc: u32, mask: u32) -> Result<(), Box<Fault>> {
        let pending = std::mem::take(&mut warp.pending);
        let shared = self.block.shared.as_mut_ptr();
        for copy in pending {
            let lane = u32::from(copy.lane);
            let done = mask >> lane & 1 != 0
                && (keep == u32::MAX || copy.group < warp.committed[lane as usize].saturating_sub(keep));
            if !done {
                warp.pending.push(copy);
                continue;
            }
            let bytes = usize::from(copy.bytes);
            // SAFETY: the destination was checked when the copy began.
            let target = unsafe { std::slice::from_raw_parts_mut(shared.add(copy.to as usize), bytes) };
            if let Some(races) = &mut self.block.races {
                for pending in &mut self.block.shared_pending[copy.to as usize..][..bytes] {
                    *pending -= 1;
                }
                let other = races.write(warp.index as usize, lane, copy.to, bytes as u32, |i| {
                    target[i as usize] == copy.data[i as usize]
                });
                if let Some(other) = other {
                    let site = Site { pc, mask, bytes: bytes as u32, usage: Use::Store, strong: false };
                    return Err(self.shared_race(warp, site, lane, other));
                }
            }
            target.copy_from_slice(&copy.data[..bytes]);
            if self.env.checks.uninitialised {
                self.block.shared_written[copy.to as usize..][..bytes].fill(1);
            }
        }
        Ok(())
    }

    /// `ldmatrix`: lanes 8m to 8m + 7 give the rows of matrix m.
    #[inline(always)]
    pub fn ldmatrix<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        trans: bool,
        access: &Access,
        pc: u32,
    ) -> Result<(), Box<Fault>> {
        let matrices = access.elements as usize;
        let file = warp.file.as_mut_ptr();
        let mask = (!0u64 >> (64 - 8 * matrices)) as u32;
        let site = Site { pc, mask, bytes: 16, usage: Use::Load, strong: false };
        // SAFETY: `direct` has checked 16 readable bytes at every lane's address, and the registers are in the file.
        unsafe {
            if !access.wide_base
                && let Some((base, added)) = self.direct::<ISA>(file, operands[matrices], access, site)
            {
                // Copied first: a destination may be the base.
                let base = base.cast::<[u32; 32]>().read();
                let offset = access.offset as u32;
                for m in 0..matrices {
                    let row = |row: usize| (added + u64::from(base[8 * m + row].wrapping_add(offset))) as *const u8;
                    load_matrix(file.add(operands[m] as usize), trans, row);
                }
                return Ok(());
            }
        }
        self.ldmatrix_slowly(warp, operands, trans, access, site)
    }

    #[inline(never)]
    fn ldmatrix_slowly(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        trans: bool,
        access: &Access,
        site: Site,
    ) -> Result<(), Box<Fault>> {
        let matrices = access.elements as usize;
        let file = warp.file.as_mut_ptr();
        // SAFETY: the decoder gives the destinations and then the base, all inside the file.
        let mut at = unsafe { addresses(file, operands[matrices], access.wide_base, access.offset) };
        settle(&mut at, site.mask);
        self.locate(warp, access.space, &mut at, site)?;
        for m in 0..matrices {
            // SAFETY: `locate` has found 16 readable bytes at every row, and the destination is inside the file.
            unsafe { load_matrix(file.add(operands[m] as usize), trans, |row| at[8 * m + row] as *const u8) };
        }
        Ok(())
    }

    /// `wmma.load` and `wmma.store`, element by element.
    #[inline(never)]
    pub fn wmma_memory(&mut self, warp: &mut Warp, operands: &[u32], op: &Op, pc: u32) -> Result<(), Box<Fault>> {
        let (fragment, column, access, store) = match *op {
            Op::WmmaLoad { fragment, column, access } => (fragment, column, access, false),
            Op::WmmaStore { fragment, column, access } => (fragment, column, access, true),
            _ => unreachable!("called for wmma.load and wmma.store only"),
        };
        let registers = fragment.registers as usize;
        let file = warp.file.as_mut_ptr();
        let (values, base) =
            if store { (&operands[1..=registers], operands[0]) } else { (&operands[..registers], operands[registers]) };
        // SAFETY: the decoder gives base, registers and stride, all inside the file.
        let (base, stride) = unsafe {
            let stride = file.add(operands[registers + 1] as usize).cast::<[u32; 32]>().read();
            (addresses(file, base, access.wide_base, access.offset), stride)
        };
        let bytes = fragment.element_bytes;
        let usage = if store { Use::Store } else { Use::Load };
        for (register, &operand) in values.iter().enumerate() {
            for part in 0..fragment.per_register {
                let mut at: Addresses = std::array::from_fn(|l| {
                    let (row, col) = (fragment.at)(l as u32, register as u32, part);
                    let (major, minor) = if column { (col, row) } else { (row, col) };
                    base[l]
                        .wrapping_add((u64::from(major) * u64::from(stride[l]) + u64::from(minor)) * u64::from(bytes))
                });
                let site = Site { pc, mask: !0, bytes, usage, strong: false };
                self.locate(warp, access.space, &mut at, site)?;
                let mut data = [[0u8; 16]; 32];
                let width = bytes as usize;
                let shift = (part * bytes) as usize;
                if store {
                    for (l, data) in data.iter_mut().enumerate() {
                        let lane_bytes = if bytes == 8 { 8 } else { 4 };
                        // SAFETY: the register is inside the file; the part is inside the lane's bytes.
                        unsafe {
                            std::ptr::copy_nonoverlapping(
                                file.add(operand as usize + l * lane_bytes + shift),
                                data.as_mut_ptr(),
                                width,
                            )
                        };
                    }
                    self.global_races(warp, &at, site, Some(&data))?;
                    self.shared_store_races(warp, &at, site, &data)?;
                }
                for l in 0..32 {
                    let lane_bytes = if bytes == 8 { 8 } else { 4 };
                    // SAFETY: `locate` has checked the address; the register is inside the file.
                    unsafe {
                        let register = file.add(operand as usize + l * lane_bytes + shift);
                        if store {
                            std::ptr::copy_nonoverlapping(data[l].as_ptr(), at[l] as *mut u8, width);
                        } else {
                            std::ptr::copy_nonoverlapping(at[l] as *const u8, register, width);
                        }
                    }
                }
            }
        }
        if let Some(races) = &mut self.block.races {
            races.tick(warp.index as usize);
        }
        Ok(())
    }

    /// Host address of a generic address with so many readable bytes, for the functions that the emulator itself provides.
    pub fn readable(
        &mut self,
        warp: &mut Warp,
        address: u64,
        lane: u32,
        bytes: u32,
        pc: u32,
    ) -> Result<*const u8, Box<Fault>> {
        let mut at = [address; 32];
        let counters = self.counters.clone();
        self.locate(
            warp,
            Space::Generic,
            &mut at,
            Site { pc, mask: 1 << lane, bytes, usage: Use::Load, strong: true },
        )?;
        self.counters = counters;
        Ok(at[lane as usize] as *const u8)
    }
}

#[inline(always)]
unsafe fn blend32(file: *mut u8, register: u32, value: &[u32; 32], mask: u32) {
    // SAFETY: the caller's register is inside the file.
    let to = unsafe { &mut *file.add(register as usize).cast::<[u32; 32]>() };
    ops::blend32(to, value, mask);
}

#[inline(always)]
unsafe fn blend64(file: *mut u8, register: u32, value: &[u64; 32], mask: u32) {
    // SAFETY: the caller's register is inside the file.
    let to = unsafe { &mut *file.add(register as usize).cast::<[u64; 32]>() };
    ops::blend64(to, value, mask);
}

/// One matrix of `ldmatrix`: 8 rows of 16 bytes into one register.
#[inline(always)]
unsafe fn load_matrix(to: *mut u8, trans: bool, row: impl Fn(usize) -> *const u8) {
    // SAFETY: the caller has checked the rows and the destination.
    unsafe {
        if !trans {
            let to = to.cast::<[u32; 4]>();
            for r in 0..8 {
                to.add(r).write(row(r).cast::<[u32; 4]>().read_unaligned());
            }
            return;
        }
        let rows: [[u16; 8]; 8] = std::array::from_fn(|r| row(r).cast::<[u16; 8]>().read_unaligned());
        let to = to.cast::<[u16; 8]>();
        for r in 0..8 {
            to.add(r).write(std::array::from_fn(|c| rows[c][r]));
        }
    }
}

/// Moves a load's bytes into its registers. `at` gives a lane's address; `dense`: lane after lane follows in memory. `equal`: the first 16 lanes, the last
/// 16 lanes have the same address.
#[inline(always)]
unsafe fn load_from<const ISA: usize>(
    file: *mut u8,
    operands: &[u32],
    access: &Access,
    mask: u32,
    dense: bool,
    equal: [bool; 2],
    at: impl Fn(usize) -> *const u8,
) {
    // SAFETY: the caller has checked the addresses and registers.
    unsafe {
        match (access.bytes, access.elements, access.register_bits) {
            (4, 1, 32) => {
                if mask == !0 && dense {
                    // Through a copy: the destination may be the base.
                    let value = at(0).cast::<[u32; 32]>().read_unaligned();
                    file.add(operands[0] as usize).cast::<[u32; 32]>().write(value);
                    return;
                }
                let mut value = [0u32; 32];
                for l in 0..32 {
                    value[l] = at(l).cast::<u32>().read_unaligned();
                }
                blend32(file, operands[0], &value, mask);
            }
            (4, 2, 32) => {
                let mut value = [[0u32; 32]; 2];
                for l in 0..32 {
                    let words = at(l).cast::<[u32; 2]>().read_unaligned();
                    value[0][l] = words[0];
                    value[1][l] = words[1];
                }
                blend32(file, operands[0], &value[0], mask);
                blend32(file, operands[1], &value[1], mask);
            }
            (4, 4, 32) => {
                let mut value = [[0u32; 32]; 4];
                let [a, b, c, d] = value.each_mut().map(|to| to.as_mut_ptr());
                let to = if mask == !0 {
                    // With several destinations none is the base, so they can be written at once.
                    let register = |e: usize| file.add(operands[e] as usize).cast::<u32>();
                    [register(0), register(1), register(2), register(3)]
                } else {
                    [a, b, c, d]
                };
                ask::load_quads::<ISA>(&at, to, equal[0]);
                ask::load_quads::<ISA>(|l| at(l + 16), to.map(|to| to.add(16)), equal[1]);
                if mask != !0 {
                    for e in 0..4 {
                        blend32(file, operands[e], &value[e], mask);
                    }
                }
            }
            (8, _, 64) => {
                let mut value = [[0u64; 32]; 2];
                for l in 0..32 {
                    for e in 0..access.elements as usize {
                        value[e][l] = at(l).cast::<u64>().add(e).read_unaligned();
                    }
                }
                for e in 0..access.elements as usize {
                    blend64(file, operands[e], &value[e], mask);
                }
            }
            _ => {
                let at: [*const u8; 32] = std::array::from_fn(at);
                load_narrow(file, operands, access, &at, mask);
            }
        }
    }
}

/// Loads of elements narrower than their registers, or of 8 and 16 bits.
#[inline(never)]
unsafe fn load_narrow(file: *mut u8, operands: &[u32], access: &Access, at: &[*const u8; 32], mask: u32) {
    for e in 0..access.elements as usize {
        let mut value = [0u64; 32];
        // SAFETY: the caller has checked the addresses.
        unsafe {
            match access.bytes {
                1 => (0..32).for_each(|l| value[l] = at[l].add(e).read().into()),
                2 => (0..32).for_each(|l| value[l] = at[l].cast::<u16>().add(e).read_unaligned().into()),
                4 => (0..32).for_each(|l| value[l] = at[l].cast::<u32>().add(e).read_unaligned().into()),
                _ => (0..32).for_each(|l| value[l] = at[l].cast::<u64>().add(e).read_unaligned()),
            }
        }
        if access.signed {
            let shift = 64 - 8 * u32::from(access.bytes);
            for v in &mut value {
                *v = ((*v << shift) as i64 >> shift) as u64;
            }
        }
        // SAFETY: the caller's registers are inside the file.
        unsafe {
            if access.register_bits == 64 {
                blend64(file, operands[e], &value, mask);
            } else {
                let keep = if access.register_bits < 32 { (1 << access.register_bits) - 1 } else { !0 };
                blend32(file, operands[e], &value.map(|v| v as u32 & keep), mask);
            }
        }
    }
}

/// Moves a store's registers into memory; see [`load_from`].
#[inline(always)]
unsafe fn store_to(
    file: *const u8,
    operands: &[u32],
    access: &Access,
    mask: u32,
    dense: bool,
    at: impl Fn(usize) -> *mut u8,
) {
    // SAFETY: the caller has checked the addresses of the lanes in the mask, and the registers.
    unsafe {
        match (access.bytes, access.elements, access.register_bits) {
            (4, 1, 32) if mask == !0 && dense => {
                at(0).cast::<[u32; 32]>().write_unaligned(file.add(operands[1] as usize).cast::<[u32; 32]>().read());
            }
            (4, 1, 32) => {
                let value = &*file.add(operands[1] as usize).cast::<[u32; 32]>();
                for l in lanes(mask) {
                    at(l as usize).cast::<u32>().write_unaligned(value[l as usize]);
                }
            }
            (4, 4, 32) if mask == !0 => {
                let value = |e: usize| file.add(operands[1 + e] as usize).cast::<u32>();
                let values = [value(0), value(1), value(2), value(3)];
                for l in (0..32).step_by(4) {
                    ask::store_quads(|i| at(l + i), values.map(|value| value.add(l)));
                }
            }
            (4, _, 32) => {
                for e in 0..access.elements as usize {
                    let value = &*file.add(operands[1 + e] as usize).cast::<[u32; 32]>();
                    for l in lanes(mask) {
                        at(l as usize).cast::<u32>().add(e).write_unaligned(value[l as usize]);
                    }
                }
            }
            (2, 1, _) if access.register_bits < 64 => {
                let value = &*file.add(operands[1] as usize).cast::<[u32; 32]>();
                for l in lanes(mask) {
                    at(l as usize).cast::<u16>().write_unaligned(value[l as usize] as u16);
                }
            }
            _ => {
                let bytes = usize::from(access.bytes * access.elements);
                for l in lanes(mask) {
                    let mut value = [0; 16];
                    gather_lane(file, &operands[1..], access, l as usize, &mut value);
                    std::ptr::copy_nonoverlapping(value.as_ptr(), at(l as usize), bytes);
                }
            }
        }
    }
}

/// The bytes that a lane stores.
#[inline(always)]
unsafe fn gather_lane(file: *const u8, values: &[u32], access: &Access, lane: usize, to: &mut [u8; 16]) {
    let bytes = access.bytes as usize;
    let lane_bytes = if access.register_bits == 64 { 8 } else { 4 };
    for e in 0..access.elements as usize {
        // SAFETY: the caller's registers are inside the file; little-endian, so the low bytes come first.
        unsafe {
            std::ptr::copy_nonoverlapping(
                file.add(values[e] as usize + lane * lane_bytes),
                to.as_mut_ptr().add(e * bytes),
                bytes,
            );
        }
    }
}

fn flush(bits: u32) -> u32 {
    if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits }
}

/// The new value of a read-modify-write on 32 bits.
fn combine32(rmw: Rmw, old: u32, b: u32, c: u32, ftz: bool) -> u32 {
    match rmw {
        Rmw::AddInt => old.wrapping_add(b),
        Rmw::AddF32 if ftz => flush((f32::from_bits(flush(old)) + f32::from_bits(flush(b))).to_bits()),
        Rmw::AddF32 => (f32::from_bits(old) + f32::from_bits(b)).to_bits(),
        Rmw::AddF16x2 => {
            let add = |x: u32, y: u32| {
                let sum = f16::from_bits(x as u16).to_f32() + f16::from_bits(y as u16).to_f32();
                u32::from(f16::from_f32(sum).to_bits())
            };
            add(old, b) | add(old >> 16, b >> 16) << 16
        }
        Rmw::AddBf16x2 => {
            let add = |x: u32, y: u32| {
                let sum = bf16::from_bits(x as u16).to_f32() + bf16::from_bits(y as u16).to_f32();
                u32::from(bf16::from_f32(sum).to_bits())
            };
            add(old, b) | add(old >> 16, b >> 16) << 16
        }
        Rmw::MinU => old.min(b),
        Rmw::MinS => (old as i32).min(b as i32) as u32,
        Rmw::MaxU => old.max(b),
        Rmw::MaxS => (old as i32).max(b as i32) as u32,
        Rmw::And => old & b,
        Rmw::Or => old | b,
        Rmw::Xor => old ^ b,
        Rmw::Exch => b,
        Rmw::Cas => {
            if old == b {
                c
            } else {
                old
            }
        }
        Rmw::Inc => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        Rmw::Dec => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        Rmw::AddF16 | Rmw::AddBf16 | Rmw::AddF64 => {
            unreachable!("{rmw:?} is no operation on 32 bits")
        }
    }
}

fn combine64(rmw: Rmw, old: u64, b: u64, c: u64) -> u64 {
    match rmw {
        Rmw::AddInt => old.wrapping_add(b),
        Rmw::AddF64 => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        Rmw::MinU => old.min(b),
        Rmw::MinS => (old as i64).min(b as i64) as u64,
        Rmw::MaxU => old.max(b),
        Rmw::MaxS => (old as i64).max(b as i64) as u64,
        Rmw::And => old & b,
        Rmw::Or => old | b,
        Rmw::Xor => old ^ b,
        Rmw::Exch => b,
        Rmw::Cas => {
            if old == b {
                c
            } else {
                old
            }
        }
        _ => unreachable!("{rmw:?} is no operation on 64 bits"),
    }
}

/// Does a read-modify-write and returns the old value.
///
/// # Safety
/// `at` is valid for `bytes` bytes of memory that lives through the launch, aligned to them.
unsafe fn modify(at: u64, rmw: Rmw, bytes: u8, b: u64, c: u64, ftz: bool) -> u64 {
    let (relaxed, order) = (Ordering::Relaxed, Ordering::AcqRel);
    if bytes == 8 {
        // SAFETY: the caller's promise.
        let cell = unsafe { AtomicU64::from_ptr(at as *mut u64) };
        return cell.fetch_update(order, relaxed, |old| Some(combine64(rmw, old, b, c))).unwrap_or_else(|old| old);
    }
    let (b, c) = (b as u32, c as u32);
    if bytes == 4 {
        // SAFETY: the caller's promise.
        let cell = unsafe { AtomicU32::from_ptr(at as *mut u32) };
        return match rmw {
            Rmw::AddInt => cell.fetch_add(b, order),
            _ => {
                cell.fetch_update(order, relaxed, |old| Some(combine32(rmw, old, b, c, ftz))).unwrap_or_else(|old| old)
            }
        }
        .into();
    }
    // 16 bits: through the word they are in, which an allocation of multiples of 512 bytes always holds.
    let shift = (at & 2) * 8;
    // SAFETY: the word that holds two aligned bytes lies in the same memory.
    let cell = unsafe { AtomicU32::from_ptr((at & !3) as *mut u32) };
    let old = cell
        .fetch_update(order, relaxed, |word| {
            let old = word >> shift & 0xffff;
            let new = match rmw {
                Rmw::AddF16 => combine32(Rmw::AddF16x2, old, b & 0xffff, 0, false),
                Rmw::AddBf16 => combine32(Rmw::AddBf16x2, old, b & 0xffff, 0, false),
                _ => combine32(rmw, old, b & 0xffff, c & 0xffff, false),
            };
            Some(word & !(0xffff << shift) | (new & 0xffff) << shift)
        })
        .unwrap_or_else(|old| old);
    u64::from(old >> shift & 0xffff)
}
