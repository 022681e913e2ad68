//! The checks of a memory access, before it touches memory.
//!
//! [`Machine::locate`] is the exact check, lane by lane, with the error message. In front of it stands [`approve`],
//! which passes most accesses for all lanes at once. It may only pass what `locate` would pass, and must leave the same
//! records behind; whatever it cannot decide goes to `locate`.

// Loops over lanes and elements index several registers at once, and vectorise as written.
#![allow(clippy::needless_range_loop)]

use super::lanes::{self as ask, Addresses, Reach, Site, Some16, Use, extent, lanes, progression, settle};
use super::races::Other;
use super::shapes::{Cost, cost};
use super::state::{Block, Machine, Warp, name_thread};
use super::{Counters, Fault, FaultKind, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use crate::ptx::program::Space;

/// Compiles a generic body once per instruction set. The result is a function of the same signature, generic over the
/// instruction set, that dispatches to the copy for it.
macro_rules! per_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty = $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        #[inline(always)]
        $vis unsafe fn $name<const ISA: usize>($($arg: $ty),*) -> $ret {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
            unsafe fn avx512($($arg: $ty),*) -> $ret {
                // SAFETY: guaranteed by the caller.
                unsafe { $body::<{ crate::num::AVX512 }>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
            unsafe fn avx2($($arg: $ty),*) -> $ret {
                // SAFETY: guaranteed by the caller.
                unsafe { $body::<{ crate::num::AVX2 }>($($arg),*) }
            }
            #[inline(never)]
            unsafe fn portable($($arg: $ty),*) -> $ret {
                // SAFETY: guaranteed by the caller.
                unsafe { $body::<{ crate::num::PORTABLE }>($($arg),*) }
            }
            // SAFETY: guaranteed by the caller, which includes the target features of ISA.
            unsafe {
                match ISA {
                    #[cfg(target_arch = "x86_64")]
                    crate::num::AVX512 => avx512($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    crate::num::AVX2 => avx2($($arg),*),
                    _ => portable($($arg),*),
                }
            }
        }
    };
}
pub(super) use per_isa;

per_isa! {
    /// Checks the accesses of a warp for all lanes at once. If true, `at` now holds host addresses and the races of a
    /// store have been checked too. False decides nothing.
    ///
    /// # Safety
    /// The processor supports `ISA`. Lanes outside the mask have the address of the first lane inside.
    pub fn approve(
        machine: &mut Machine,
        warp: &mut Warp,
        space: Space,
        at: &mut Addresses,
        site: Site,
    ) -> bool = approve_body
}

#[inline(always)]
unsafe fn approve_body<const ISA: usize>(
    machine: &mut Machine,
    warp: &mut Warp,
    space: Space,
    at: &mut Addresses,
    site: Site,
) -> bool {
    // SAFETY: guaranteed by the caller.
    unsafe {
        match space {
            Space::Shared => approve_shared::<ISA>(machine, warp.index, at, site),
            Space::Local => approve_local::<ISA>(machine, warp, at, site),
            Space::Global => approve_global::<ISA>(machine, at, site),
            Space::Generic => match at.0[site.mask.trailing_zeros() as usize & 31] & WINDOW_BITS {
                0 => approve_global::<ISA>(machine, at, site),
                SHARED_WINDOW => {
                    let mut inside = *at;
                    inside.0.iter_mut().for_each(|a| *a = a.wrapping_sub(SHARED_WINDOW));
                    let good = approve_shared::<ISA>(machine, warp.index, &mut inside, site);
                    if good {
                        *at = inside;
                    }
                    good
                }
                _ => false,
            },
            Space::Param => false,
        }
    }
}

/// The bits of a generic address that select the space.
const WINDOW_BITS: u64 = !0 << 56;

/// # Safety
/// As for [`approve`].
#[inline(always)]
unsafe fn approve_shared<const ISA: usize>(machine: &mut Machine, warp: u32, at: &mut Addresses, site: Site) -> bool {
    let env = machine.env;
    if site.strong || site.usage == Use::Atomic {
        return false;
    }
    // SAFETY: guaranteed by the caller.
    let Some(shape) = (unsafe { machine.shapes.recall::<ISA>(at, site, env.granule) }) else {
        return false;
    };
    let first = at.0[site.mask.trailing_zeros() as usize & 31];
    let store = site.usage == Use::Store;
    if !shape.fits(first, site.bytes, env.shared_bytes) || (store && shape.overlap) {
        return false;
    }
    let reach = shape.reach(first, env.granule);
    let block = &mut machine.block;
    // SAFETY: the marks and race records have room for 16 granules from any granule of shared memory on, and for 16
    // lines from any line on; `fits` says that all that is reached is inside it. The caller guarantees the ISA.
    unsafe {
        if env.checks.uninitialised {
            match store {
                true => note_written::<ISA>(block, reach, env.granule),
                false if !is_written::<ISA>(block, reach) => return false,
                false => {}
            }
        }
        if !store && env.program.copies && is_pending::<ISA>(block, reach) {
            return false;
        }
        if let Some(races) = &mut block.races {
            let good = match store {
                true => races.write_all::<ISA, true>(warp as usize, reach),
                false => races.read_all::<ISA>(warp as usize, reach),
            };
            if !good {
                return false;
            }
        }
    }
    if env.settings.counters {
        machine.counters.count_cost(shape.cost, site.usage);
    }
    let base = machine.block.shared.as_mut_ptr() as u64;
    at.0.iter_mut().for_each(|a| *a = a.wrapping_add(base));
    true
}

/// Whether all that is reached has been written.
///
/// # Safety
/// The processor supports `ISA`; what is reached is inside shared memory, whose reads of unwritten bytes are checked.
#[inline(always)]
unsafe fn is_written<const ISA: usize>(block: &Block, reach: Reach<'_>) -> bool {
    let mut full = true;
    for lines in reach.lines {
        // SAFETY: there is room for 16 lines from any on. The caller guarantees the ISA.
        full &= unsafe {
            let marks = block.shared_full.as_ptr().add((reach.line + i64::from(lines.at)) as usize);
            !ask::any_byte::<ISA, false>(marks, &Some16::new(lines.bits))
        };
    }
    if !full {
        for chunk in reach.chunks.iter() {
            // SAFETY: there is room for 16 granules from any on. The caller guarantees the ISA.
            let missing = unsafe {
                let marks = block.shared_written.as_ptr().add((reach.origin + chunk.at) as usize);
                ask::any_byte::<ISA, false>(marks, &chunk.some)
            };
            if missing {
                return false;
            }
        }
    }
    true
}

/// Marks all that is reached as written.
///
/// # Safety
/// As for [`is_written`].
#[inline(always)]
unsafe fn note_written<const ISA: usize>(block: &mut Block, reach: Reach<'_>, granule: u32) {
    let mut full = true;
    for lines in reach.lines {
        // SAFETY: as in `is_written`.
        full &= unsafe {
            let marks = block.shared_full.as_ptr().add((reach.line + i64::from(lines.at)) as usize);
            !ask::any_byte::<ISA, false>(marks, &Some16::new(lines.bits))
        };
    }
    if !full {
        for chunk in reach.chunks.iter() {
            // SAFETY: as in `is_written`.
            unsafe {
                let marks = block.shared_written.as_mut_ptr().add((reach.origin + chunk.at) as usize);
                ask::set_bytes::<ISA>(marks, &chunk.some);
            }
        }
        block.find_full(reach, granule);
    }
}

/// Whether a `cp.async` that has not arrived will write some of what is reached.
///
/// # Safety
/// The processor supports `ISA`; what is reached is inside shared memory.
#[inline(always)]
unsafe fn is_pending<const ISA: usize>(block: &Block, reach: Reach<'_>) -> bool {
    if block.races.is_none() {
        return false;
    }
    let mut any = false;
    for lines in reach.lines {
        // SAFETY: there is room for 16 lines from any on. The caller guarantees the ISA.
        any |= unsafe {
            let counts = block.pending_lines.as_ptr().add((reach.line + i64::from(lines.at)) as usize);
            ask::above::<ISA>(counts, 0, &Some16::new(lines.bits))
        };
    }
    if any {
        for chunk in reach.chunks.iter() {
            // SAFETY: there is room for 16 granules from any on. The caller guarantees the ISA.
            let pending = unsafe {
                let counts = block.shared_pending.as_ptr().add((reach.origin + chunk.at) as usize);
                ask::any_byte::<ISA, true>(counts, &chunk.some)
            };
            if pending {
                return true;
            }
        }
    }
    false
}

/// Counts the copies of a `cp.async` as pending, or with `UP` false as arrived.
///
/// # Safety
/// The processor supports `ISA`; what is reached is inside shared memory, which is checked for races.
#[inline(always)]
unsafe fn count_pending<const ISA: usize, const UP: bool>(block: &mut Block, reach: Reach<'_>) {
    // SAFETY: there is room for 16 granules and lines from any on. The caller guarantees the ISA.
    unsafe {
        for chunk in reach.chunks.iter() {
            let counts = block.shared_pending.as_mut_ptr().add((reach.origin + chunk.at) as usize);
            ask::count_bytes::<ISA, UP>(counts, &chunk.some);
        }
        for (lines, lanes) in reach.lines.iter().zip(reach.lanes) {
            let counts = block.pending_lines.as_mut_ptr().add((reach.line + i64::from(lines.at)) as usize);
            ask::count_words::<UP>(counts, lanes);
        }
    }
}

per_isa! {
    /// [`approve`] for the destination of a `cp.async`, whose arrival is recorded as pending.
    ///
    /// # Safety
    /// As for [`approve`].
    pub fn approve_copy(machine: &mut Machine, warp: u32, to: &Addresses, site: Site) -> bool = approve_copy_body
}

#[inline(always)]
unsafe fn approve_copy_body<const ISA: usize>(machine: &mut Machine, warp: u32, to: &Addresses, site: Site) -> bool {
    let env = machine.env;
    // SAFETY: guaranteed by the caller.
    let Some(shape) = (unsafe { machine.shapes.recall::<ISA>(to, site, env.granule) }) else {
        return false;
    };
    let first = to.0[site.mask.trailing_zeros() as usize & 31];
    if !shape.fits(first, site.bytes, env.shared_bytes) || shape.overlap {
        return false;
    }
    let reach = shape.reach(first, env.granule);
    let block = &mut machine.block;
    if let Some(races) = &mut block.races {
        // SAFETY: `fits` says that all that is reached is inside shared memory. The caller guarantees the ISA.
        unsafe {
            if !races.write_all::<ISA, false>(warp as usize, reach) {
                return false;
            }
            count_pending::<ISA, true>(block, reach);
        }
    }
    if env.settings.counters {
        machine.counters.count_cost(shape.cost, site.usage);
    }
    true
}

per_isa! {
    /// [`approve`] for the same when it arrives.
    ///
    /// # Safety
    /// As for [`approve`].
    pub fn approve_arrival(machine: &mut Machine, warp: u32, to: &Addresses, site: Site) -> bool = approve_arrival_body
}

#[inline(always)]
unsafe fn approve_arrival_body<const ISA: usize>(machine: &mut Machine, warp: u32, to: &Addresses, site: Site) -> bool {
    let env = machine.env;
    // SAFETY: guaranteed by the caller.
    let Some(shape) = (unsafe { machine.shapes.recall::<ISA>(to, site, env.granule) }) else {
        return false;
    };
    let first = to.0[site.mask.trailing_zeros() as usize & 31];
    if shape.overlap || !shape.aligned || first & u64::from(site.bytes - 1) != 0 {
        return false;
    }
    let reach = shape.reach(first, env.granule);
    let block = &mut machine.block;
    // SAFETY: `cp_async` has checked that the destination is inside shared memory. The caller guarantees the ISA.
    unsafe {
        if let Some(races) = &mut block.races {
            if !races.write_all::<ISA, true>(warp as usize, reach) {
                return false;
            }
            count_pending::<ISA, false>(block, reach);
        }
        if env.checks.uninitialised {
            note_written::<ISA>(block, reach, env.granule);
        }
    }
    true
}

/// # Safety
/// As for [`approve`].
#[inline(always)]
unsafe fn approve_local<const ISA: usize>(
    machine: &mut Machine,
    warp: &mut Warp,
    at: &mut Addresses,
    site: Site,
) -> bool {
    let env = machine.env;
    let size = u64::from(env.launch.kernel.local_bytes);
    let (bytes, stride) = (u64::from(site.bytes), u64::from(env.local_stride));
    // SAFETY: the caller guarantees the ISA; `Addresses` are 32 values aligned to 64 bytes.
    if size < bytes || unsafe { !ask::inside64::<ISA>(at.0.as_ptr(), 0, 0, size - bytes, bytes - 1) } {
        return false;
    }
    machine.counters.local += u64::from(env.settings.counters);
    let base = warp.local.as_mut_ptr() as u64;
    for l in 0..32 {
        at.0[l] += base + l as u64 * stride;
    }
    true
}

/// # Safety
/// As for [`approve`].
#[inline(always)]
unsafe fn approve_global<const ISA: usize>(machine: &mut Machine, at: &mut Addresses, site: Site) -> bool {
    let env = machine.env;
    if site.strong && env.program.fences {
        return false;
    }
    let bytes = u64::from(site.bytes);
    let slot = site.pc as usize % machine.cache.len();
    // A macro, because a closure would not inherit the target features.
    macro_rules! inside {
        () => {{
            let (start, end) = machine.cache[slot];
            end - start >= bytes
                // SAFETY: the caller guarantees the ISA; `Addresses` are 32 values aligned to 64 bytes.
                && unsafe { ask::inside64::<ISA>(at.0.as_ptr(), 0, start, end - start - bytes, bytes - 1) }
        }};
    }
    if !inside!() {
        let first = at.0[site.mask.trailing_zeros() as usize & 31];
        let Some(found) = env.allocation(first, bytes) else {
            return false;
        };
        machine.cache[slot] = (found.address, found.address + found.bytes);
        if !inside!() {
            return false;
        }
    }
    // SAFETY: the caller guarantees the ISA; `Addresses` are 32 values aligned to 64 bytes.
    let (alike, joined) = unsafe {
        let joined = ask::joined64::<ISA>(at.0.as_ptr(), bytes);
        (joined == 0 && ask::steps64::<ISA>(at.0.as_ptr(), 0), joined)
    };
    // Lanes whose accesses are contiguous form one range.
    let joined = joined & site.mask & site.mask << 1;
    let starts = if alike { site.mask & site.mask.wrapping_neg() } else { site.mask & !joined };
    let range = |l: u32| (at.0[l as usize], bytes * u64::from(1 + (joined >> 1 >> l).trailing_ones()));
    if !env.checks.any_global() {
        if env.settings.counters {
            machine.count_ranges(starts, range, site);
        }
        return true;
    }
    let races = env.global_races.as_ref().filter(|_| !site.strong || site.usage == Use::Atomic);
    machine.block.unfenced = true;
    let (block, epoch) = (machine.block.linear as u32, machine.block.epoch);
    let mut rest = starts;
    while rest != 0 {
        let (first, length) = range(rest.trailing_zeros());
        rest &= rest - 1;
        if env.checks.uninitialised {
            if site.usage == Use::Store {
                env.memory.mark(first, length, true);
            } else if !env.memory.written(first, length) {
                return false;
            }
        }
        if let Some(races) = races
            && first.wrapping_sub(env.range.0) < env.range.1
        {
            // SAFETY: the range starts inside the device's and inside one allocation. The caller guarantees the ISA.
            let good = unsafe {
                match site.usage {
                    Use::Store => races.approve::<ISA, true>(first, length, block, epoch),
                    _ => races.approve::<ISA, false>(first, length, block, epoch),
                }
            };
            if !good {
                return false;
            }
        }
    }
    if env.settings.counters {
        machine.count_ranges(starts, range, site);
    }
    true
}

impl Counters {
    #[inline(always)]
    fn count_cost(&mut self, cost: Cost, usage: Use) {
        self.shared += 1;
        self.shared_wavefronts += cost.passes;
        self.shared_ideal += cost.ideal;
        match usage {
            Use::Load => {
                self.shared_load_cycles += cost.passes;
                self.shared_load_ideal += cost.least;
            }
            Use::Store => {
                self.shared_store_cycles += cost.passes;
                self.shared_store_ideal += cost.least;
            }
            Use::Atomic => {}
        }
    }
}

/// The first byte of a load that should have been written and was not. Structures are copied with their padding, which
/// nobody writes: by words that are partly padding, and by single bytes. So one written byte makes an integer element
/// good, and for single bytes any of the aligned eight around it.
fn unwritten(at: u64, site: Site, written: impl Fn(u64) -> bool) -> Option<u64> {
    let end = at + u64::from(site.bytes);
    let missing = |from: u64, to: u64| (from..to).find(|&byte| !written(byte));
    let size = match site.element {
        0 => return missing(at, end),
        size => u64::from(size),
    };
    (at..end).step_by(size as usize).find_map(|part| {
        let first = missing(part, part + size)?;
        let around = if size == 1 { part & !7..(part & !7) + 8 } else { part..part + size };
        (!{ around }.any(&written)).then_some(first)
    })
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

    /// Lanes may point into different spaces; each space is checked on its own.
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
            let mut part = Addresses(at.map(|a| a.wrapping_sub(window)));
            settle(&mut part, mask);
            self.locate(warp, space, &mut part, Site { mask, ..site })?;
            for l in lanes(mask) {
                at[l as usize] = part[l as usize];
            }
        }
        settle(at, site.mask);
        Ok(())
    }

    pub(super) fn verb(site: Site) -> &'static str {
        match site.usage {
            Use::Load => "read",
            Use::Store => "write",
            Use::Atomic => "atomic operation",
        }
    }

    pub(super) fn out_of_bounds(&self, warp: &Warp, site: Site, lane: u32, detail: String) -> Box<Fault> {
        self.fault(FaultKind::OutOfBounds, warp, site.pc, lane, detail)
    }

    /// Faults the first lane whose address is not a multiple of the access size.
    pub(super) fn check_alignment(
        &self,
        warp: &Warp,
        at: &Addresses,
        site: Site,
        what: &str,
    ) -> Result<(), Box<Fault>> {
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
                // The system's part of shared memory starts with unknown contents. Barriers of multi-warp groups are
                // set up there bit by bit with atomics, so atomics may come first.
                let reserved = at[l as usize] >= u64::from(env.shared_bytes - env.program.reserved_shared);
                if site.usage == Use::Store || site.usage == Use::Atomic && reserved {
                    self.block.mark_written(env.granules(at[l as usize], site.bytes), env.granule, true);
                    continue;
                }
                let marks = &self.block.shared_written;
                let written = |at: u64| marks.get((at >> env.granule) as usize).is_some_and(|&mark| mark != 0);
                if let Some(first) = unwritten(at[l as usize], site, written) {
                    let detail = format!("reads shared memory at {first:#x} that nothing has written");
                    self.read_unwritten(warp, site.pc, l, detail)?;
                }
            }
        }
        if let Some(races) = &mut self.block.races {
            let w = warp.index as usize;
            let mut found = None;
            if !site.strong || site.usage == Use::Atomic {
                for l in lanes(site.mask) {
                    let range = env.granules(at[l as usize], site.bytes);
                    let other = match site.usage {
                        Use::Load => races.read(w, l, range.clone()),
                        Use::Atomic => races.atomic(w, l, range.clone()),
                        Use::Store => None,
                    };
                    if let Some(other) = other {
                        found = Some((l, other));
                        break;
                    }
                    if let Some(first) = range.into_iter().find(|&at| self.block.shared_pending[at] != 0) {
                        let detail = format!(
                            "{} of shared memory at {:#x} before the cp.async that fills it has been waited for",
                            Self::verb(site),
                            first << env.granule
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

    /// Race check of a store to shared memory, which needs the values: `values[l]` are the bytes of lane l.
    pub(super) fn shared_store_races(
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
            // SAFETY: `locate` has found the bytes inside the block's shared memory, which only this worker uses.
            let now = unsafe { std::slice::from_raw_parts(at[l as usize] as *const u8, site.bytes as usize) };
            let range = self.env.granules(a, site.bytes);
            let bytes = 1 << self.env.granule;
            let same = |i: usize| now[i * bytes..][..bytes] == value[i * bytes..][..bytes];
            if let Some(other) = races.write(warp.index as usize, l, range, same) {
                return Err(self.shared_race(warp, site, l, other));
            }
            // Written while it is checked, so that two lanes of one instruction see each other.
            // SAFETY: as above, and `now` is not used any more; the store proper writes the same bytes again.
            unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), at[l as usize] as *mut u8, site.bytes as usize) };
        }
        Ok(())
    }

    pub(super) fn shared_race(&self, warp: &Warp, site: Site, lane: u32, other: Other) -> Box<Fault> {
        let who = match other.lane {
            Some(lane) => format!("thread {} has", name_thread(self.env.thread(other.warp, lane))),
            None => format!("several threads of warp {} have", other.warp),
        };
        let detail = format!(
            "{} of shared memory at {:#x}, which {who} {} with no barrier between",
            Self::verb(site),
            (other.at as usize) << self.env.granule,
            other.what
        );
        self.fault(FaultKind::SharedRace, warp, site.pc, lane, detail)
    }

    /// Acquires once more after the values of a strong load or atomic have been read. Another worker may have released
    /// and written between check and access, and what was seen must count as acquired.
    pub(super) fn acquire_seen(&self, at: &[u64; 32], mask: u32) {
        let env = self.env;
        let Some(races) = env.global_races.as_ref().filter(|_| env.program.fences) else { return };
        for address in lanes(mask).map(|l| at[l as usize]).filter(|at| at.wrapping_sub(env.range.0) < env.range.1) {
            races.synchronise(address, self.block.linear as u32, self.block.epoch, true, false);
        }
    }

    fn locate_global(&mut self, warp: &mut Warp, at: &mut Addresses, site: Site) -> Result<(), Box<Fault>> {
        let env = self.env;
        let (low, high, _) = extent(at);
        let bytes = u64::from(site.bytes);
        let slot = site.pc as usize % self.cache.len();
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
            if site.strong && env.program.fences {
                for l in lanes(site.mask) {
                    let (acquire, release) = (site.usage != Use::Store, site.usage != Use::Load);
                    races.synchronise(at[l as usize], block, self.block.epoch, acquire, release);
                }
            }
            self.block.unfenced |= !site.strong || site.usage != Use::Load;
            if site.usage == Use::Atomic || !site.strong && site.usage == Use::Load {
                self.global_races(warp, at, site, None)?;
            }
        }
        Ok(())
    }

    /// Lanes not all in one allocation: each must be in some.
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
            let Some(first) = unwritten(a, site, |byte| memory.written(byte, 1)) else {
                continue;
            };
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

    /// Race check between blocks, of a plain access or an atomic. Stores pass their values.
    pub(super) fn global_races(
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
        if site.strong && site.usage != Use::Atomic {
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
                        let (mut now, length) = ([0; 4], (upto - from) as usize);
                        // SAFETY: `locate` has found the bytes inside an allocation of the device. Copied, since other
                        // workers may write them meanwhile; at most 4.
                        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, now.as_mut_ptr(), length) };
                        let same = now[..length] == values[l as usize][(from - a) as usize..(upto - a) as usize];
                        races.write(word, bytes, block, self.block.epoch, same)
                    }
                };
                if let Some(conflict) = conflict {
                    let [gx, gy, _] = env.launch.grid;
                    let who = match conflict.block {
                        Some(other) => format!("block ({},{},{}) has", other % gx, other / gx % gy, other / gx / gy),
                        None => "several blocks have".into(),
                    };
                    let place = env.allocation(a, 1).map_or(String::new(), |found| {
                        format!(" (byte {} of allocation {})", from - found.address, found.serial)
                    });
                    let detail = format!(
                        "{} of global memory at {from:#x}{place}, which {who} {} in this launch with nothing to \
                         order them",
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

    #[inline(always)]
    fn count_asked(&mut self, site: Site) {
        let counters = &mut self.counters;
        counters.global += 1;
        let asked = u64::from(site.bytes * site.mask.count_ones());
        match site.usage {
            Use::Load => counters.global_load_bytes += asked,
            Use::Store => counters.global_store_bytes += asked,
            Use::Atomic => counters.atomics += u64::from(site.mask.count_ones()),
        }
    }

    /// Notes the sectors of `length` bytes from `first` on as read or written; an atomic does both. Returns the first
    /// and the last sector (addresses over 32).
    #[inline(always)]
    fn touch(&self, site: Site, first: u64, length: u64) -> (u64, u64) {
        if let Some(noted) = &self.env.noted {
            noted.note(site, first, length, self.cache[site.pc as usize % self.cache.len()].1);
        }
        let (usage, first, last) = (site.usage, first / 32, (first + length - 1) / 32);
        let Some([read, written]) = &self.env.touched else { return (first, last) };
        if usage != Use::Store {
            read.touch(first, last);
        }
        if usage != Use::Load {
            written.touch(first, last);
        }
        (first, last)
    }

    /// Counts accesses to ranges, which begin at the lanes in `starts`.
    #[inline(always)]
    fn count_ranges(&mut self, starts: u32, range: impl Fn(u32) -> (u64, u64), site: Site) {
        // In ascending order: they mostly are, or nearly.
        let mut ranges = [(0, 0); 32];
        let mut count = 0;
        let mut rest = starts;
        while rest != 0 {
            let (first, length) = range(rest.trailing_zeros());
            let (first, last) = self.touch(site, first, length);
            rest &= rest - 1;
            let mut place = count;
            while place > 0 && ranges[place - 1].0 > first {
                ranges[place] = ranges[place - 1];
                place -= 1;
            }
            ranges[place] = (first, last);
            count += 1;
        }
        let mut next = 0;
        for &(first, last) in &ranges[..count] {
            if last >= next {
                self.counters.global_sectors += last + 1 - first.max(next);
                next = last + 1;
            }
        }
        self.count_asked(site);
    }

    fn count_global(&mut self, at: &Addresses, site: Site) {
        self.count_asked(site);
        // An access is aligned to its size of at most 16 bytes, so it touches one sector.
        let mut sectors = at.map(|a| a / 32);
        if !sectors.is_sorted() {
            sectors.sort_unstable();
        }
        let mut last = None;
        for sector in sectors {
            if last != Some(sector) {
                self.counters.global_sectors += 1;
                self.touch(site, sector * 32, 1);
                last = Some(sector);
            }
        }
    }

    pub(super) fn count_shared(&mut self, at: &Addresses, site: Site) {
        if site.usage == Use::Atomic {
            self.counters.atomics += u64::from(site.mask.count_ones());
        }
        self.counters.count_cost(cost(at, 0, site), site.usage);
    }
}
