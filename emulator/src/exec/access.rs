//! Memory instructions: addresses, checks, and moving the bytes.
//!
//! An access first turns the addresses of its lanes into host addresses ([`super::checks`]); every check happens there.
//! Lanes outside the mask get the address of the first lane inside, so that a load can read all 32 unconditionally.
//! Where only bounds and alignment are checked and all 32 addresses pass, [`Machine::direct`] is the fast path.

// Loops over lanes and elements index several registers at once, and vectorise as written.
#![allow(clippy::needless_range_loop)]

use super::checks::{approve, approve_arrival, approve_copy, per_isa};
use super::lanes::{self as ask, Addresses, Lie, Site, Use, lanes, settle};
use super::state::{Machine, Pending, SPARE, Warp};
use super::{Fault, FaultKind};
use crate::num::{PORTABLE, ops};
use crate::ptx::program::{Access, Op, Rmw, Space};
use half::{bf16, f16};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Per-lane addresses: a base register plus an offset.
///
/// # Safety
/// The register is inside the file, with 64 bits per lane if `wide`, else 32.
#[inline(always)]
pub unsafe fn addresses(file: *const u8, register: u32, wide: bool, offset: i64) -> Addresses {
    let mut at = Addresses([0; 32]);
    // SAFETY: guaranteed by the caller; registers start at multiples of 64 bytes.
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

/// Reads one lane's address. Volatile, because the compiler turns plain reads into vector loads and then extracts 32
/// addresses from vectors, which costs more than the rest of the load.
///
/// # Safety
/// `base` is aligned and readable up to lane `l`.
#[inline(always)]
unsafe fn one<T>(base: *const T, l: usize) -> T {
    // SAFETY: guaranteed by the caller.
    unsafe { base.add(l).read_volatile() }
}

impl Machine<'_> {
    /// Fast path: all 32 addresses lie inside shared memory, or inside the allocation that this instruction used last,
    /// and no enabled check has to look at single lanes. Returns lane 0 of the base register, and what to add to each
    /// base to get a host address.
    #[inline(always)]
    fn direct<const ISA: usize>(
        &mut self,
        file: *mut u8,
        register: u32,
        access: &Access,
        site: Site,
    ) -> Option<(*const u8, u64)> {
        let env = self.env;
        if env.settings.counters {
            return None;
        }
        // SAFETY: the decoder guarantees that the base register is inside the file and as wide as the access says. The
        // interpreter runs only on processors that support ISA.
        let (base, inside, added) = unsafe {
            let base = file.add(register as usize).cast_const();
            let low = site.bytes - 1;
            match access.space {
                Space::Shared if !env.checks.any_shared() && env.shared_bytes >= site.bytes => {
                    let span = env.shared_bytes - site.bytes;
                    let inside = if access.wide_base {
                        ask::inside64::<ISA>(base.cast(), access.offset as u64, 0, span.into(), low.into())
                    } else {
                        // No carry into bit 32 is possible inside: a negative sum wraps to a large offset.
                        ask::inside32::<ISA>(base.cast(), access.offset as u32, span, low)
                    };
                    (base, inside, self.block.shared.as_mut_ptr() as u64)
                }
                Space::Global | Space::Generic if access.wide_base && !env.checks.any_global() => {
                    let (start, end) = self.cache[site.pc as usize % self.cache.len()];
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
        let element = if access.float { 0 } else { access.bytes };
        let site = Site { pc, mask, bytes, usage: Use::Load, element, strong: access.strong, rows: false };
        let register = operands[elements];
        let single = mask == !0 && bytes == 4;
        if access.space == Space::Param {
            return self.load_parameter(warp, operands, access, site);
        }
        if access.polls(mask) && access.space != Space::Shared {
            warp.polls += 1;
        }
        // SAFETY: `direct` and `locate` have checked `bytes` readable bytes at every lane's address (after `locate`,
        // lanes outside the mask share a checked one); the decoder's registers are inside the file.
        unsafe {
            if let Some((base, added)) = self.direct::<ISA>(file, register, access, site) {
                if access.wide_base {
                    let base = base.cast::<u64>();
                    let added = added.wrapping_add(access.offset as u64);
                    let dense = single && ask::steps64::<ISA>(base, bytes.into());
                    let lie = match elements {
                        4 => [ask::lie64::<ISA>(base), ask::lie64::<ISA>(base.add(16))],
                        _ => [Lie::Any; 2],
                    };
                    load_from::<ISA>(file, operands, access, mask, dense, lie, |l| {
                        one(base, l).wrapping_add(added) as *const u8
                    });
                } else {
                    let base = base.cast::<u32>();
                    let offset = access.offset as u32;
                    let dense = single && ask::steps32::<ISA>(base, bytes);
                    let at = |l: usize| (added + u64::from(one(base, l).wrapping_add(offset))) as *const u8;
                    let lie = match elements {
                        4 => [ask::lie32::<ISA>(base), ask::lie32::<ISA>(base.add(16))],
                        _ => [Lie::Any; 2],
                    };
                    load_from::<ISA>(file, operands, access, mask, dense, lie, at);
                }
                return Ok(());
            }
        }
        // SAFETY: the interpreter runs only on processors that support ISA; the operands are the step's.
        unsafe { load_checked::<ISA>(self, warp, operands, access, site) }
    }

    /// `ld.param`, whose address is a constant in ordinary programs.
    #[inline(never)]
    fn load_parameter(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        access: &Access,
        site: Site,
    ) -> Result<(), Box<Fault>> {
        let file = warp.file.as_mut_ptr();
        let register = operands[access.elements as usize];
        let params = self.env.launch.params;
        // SAFETY: a load's operands are its destinations, then its base, all inside the file. Parameter bytes are read
        // only where `inside` or `locate` has checked them.
        unsafe {
            let base = file.add(register as usize);
            let first = if access.wide_base { base.cast::<u64>().read() } else { base.cast::<u32>().read().into() };
            let first = first.wrapping_add(access.offset as u64);
            // A constant is the same in all lanes.
            let inside = register >= self.env.first_constant
                && first & u64::from(site.bytes - 1) == 0
                && first.checked_add(site.bytes.into()).is_some_and(|end| end <= params.len() as u64);
            if !inside || access.bytes < 4 || u32::from(access.register_bits) != 8 * u32::from(access.bytes) {
                let mut at = addresses(file, register, access.wide_base, access.offset);
                settle(&mut at, site.mask);
                self.locate(warp, Space::Param, &mut at, site)?;
                load_from::<PORTABLE>(file, operands, access, site.mask, false, [Lie::Any; 2], |l| at[l] as *const u8);
                return Ok(());
            }
            for e in 0..access.elements as usize {
                let value = params.as_ptr().add(first as usize + e * usize::from(access.bytes));
                if access.bytes == 8 {
                    blend64(file, operands[e], &[value.cast::<u64>().read_unaligned(); 32], site.mask);
                } else {
                    blend32(file, operands[e], &[value.cast::<u32>().read_unaligned(); 32], site.mask);
                }
            }
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
        let site = Site { pc, mask, bytes, usage: Use::Store, element: 0, strong: access.strong, rows: false };
        let single = mask == !0 && bytes == 4;
        // SAFETY: `direct` has checked `bytes` writable bytes at every lane's address; the decoder's registers are
        // inside the file.
        unsafe {
            if let Some((base, added)) = self.direct::<ISA>(file, operands[0], access, site) {
                if access.wide_base {
                    let base = base.cast::<u64>();
                    let added = added.wrapping_add(access.offset as u64);
                    let dense = single && ask::steps64::<ISA>(base, bytes.into());
                    store_to::<ISA>(file, operands, access, mask, dense, |l| {
                        one(base, l).wrapping_add(added) as *mut u8
                    });
                } else {
                    let base = base.cast::<u32>();
                    let offset = access.offset as u32;
                    let dense = single && ask::steps32::<ISA>(base, bytes);
                    let at = |l: usize| (added + u64::from(one(base, l).wrapping_add(offset))) as *mut u8;
                    store_to::<ISA>(file, operands, access, mask, dense, at);
                }
                return Ok(());
            }
        }
        // SAFETY: the interpreter runs only on processors that support ISA; the operands are the step's.
        unsafe { store_checked::<ISA>(self, warp, operands, access, site) }
    }

    /// `atom` and `red`
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub fn atom<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        rmw: Rmw,
        reduce: bool,
        access: &Access,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> {
        let site = Site {
            pc,
            mask,
            bytes: u32::from(access.bytes),
            usage: Use::Atomic,
            element: 0,
            strong: true,
            rows: false,
        };
        // SAFETY: the interpreter runs only on processors that support ISA; the operands, (destination,) base and
        // values, are the step's.
        unsafe { atom_checked::<ISA>(self, warp, operands, rmw, reduce, access, site) }
    }

    /// `cp.async`: reads the source now and delivers it when it is waited for.
    #[inline(always)]
    pub fn cp_async<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        op: &Op,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> {
        // SAFETY: the interpreter runs only on processors that support ISA; the operands are the step's.
        unsafe { begin_copies::<ISA>(self, warp, operands, op, pc, mask) }
    }

    /// Checks the sources of copies of different sizes, or those that [`approve`] did not pass, by size.
    #[inline(never)]
    fn check_sources<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        source: &Addresses,
        sizes: &[u32; 32],
        site: Site,
    ) -> Result<(), Box<Fault>> {
        for size in 1..=site.bytes {
            let part = lanes(site.mask).filter(|&l| sizes[l as usize] == size).fold(0, |part, l| part | 1 << l);
            if part == 0 {
                continue;
            }
            let site = Site { mask: part, usage: Use::Load, ..site };
            let mut at = *source;
            settle(&mut at, part);
            // SAFETY: the interpreter runs only on processors that support ISA; `settle` has run.
            if size == site.bytes && unsafe { approve::<ISA>(self, warp, Space::Global, &mut at, site) } {
                continue;
            }
            self.check_alignment(warp, source, site, "address")?;
            if size.is_power_of_two() {
                self.locate(warp, Space::Global, &mut at, Site { bytes: size, ..site })?;
            } else {
                for byte in 0..u64::from(size) {
                    let mut at = Addresses(at.map(|a| a.wrapping_add(byte)));
                    self.locate(warp, Space::Global, &mut at, Site { bytes: 1, ..site })?;
                }
            }
        }
        if let Some(lane) = lanes(site.mask).find(|&l| sizes[l as usize] > site.bytes) {
            let detail = format!("a source of {} bytes for a copy of {}", sizes[lane as usize], site.bytes);
            return Err(self.fault(FaultKind::Illegal, warp, site.pc, lane, detail));
        }
        Ok(())
    }

    /// Checks a copy's destination lane by lane. Whether it is initialised is decided when the data arrives.
    fn begin_copy(&mut self, warp: &Warp, target: &Addresses, site: Site) -> Result<(), Box<Fault>> {
        for l in lanes(site.mask) {
            let a = target[l as usize];
            if a.checked_add(u64::from(site.bytes)).is_none_or(|end| end > u64::from(self.env.shared_bytes)) {
                let detail = format!(
                    "write of {} bytes at shared address {a:#x}, the block has {} bytes of shared memory",
                    site.bytes, self.env.shared_bytes
                );
                return Err(self.out_of_bounds(warp, site, l, detail));
            }
        }
        self.check_alignment(warp, target, site, "shared address")?;
        if self.env.settings.counters {
            self.count_shared(target, site);
        }
        if let Some(races) = &mut self.block.races {
            for l in lanes(site.mask) {
                let mut range = self.env.granules(target[l as usize], site.bytes);
                if let Some(other) = range.find_map(|at| races.check_write(warp.index as usize, l, at)) {
                    return Err(self.shared_race(warp, site, l, other));
                }
            }
            for l in lanes(site.mask) {
                let range = self.env.granules(target[l as usize], site.bytes);
                self.block.shared_pending[range].iter_mut().for_each(|pending| *pending = pending.saturating_add(1));
                self.block.count_pending(target[l as usize], site.bytes, true);
            }
        }
        Ok(())
    }

    /// Completes the copies of the lanes in `mask`, except those of their last `keep` groups. u32::MAX completes
    /// uncommitted copies too.
    #[inline(always)]
    pub fn cp_wait<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        keep: u32,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> {
        // SAFETY: the interpreter runs only on processors that support ISA.
        unsafe { end_copies::<ISA>(self, warp, keep, pc, mask) }
    }

    /// Checks the arrival of a copy lane by lane.
    fn arrive_slowly(&mut self, warp: &Warp, copy: &Pending, done: u32, pc: u32) -> Result<(), Box<Fault>> {
        let bytes = copy.site.bytes as usize;
        for l in lanes(done) {
            let range = self.env.granules(copy.to[l as usize], copy.site.bytes);
            if self.block.races.is_some() {
                self.block.count_pending(copy.to[l as usize], copy.site.bytes, false);
            }
            if let Some(races) = &mut self.block.races {
                for pending in &mut self.block.shared_pending[range.clone()] {
                    *pending = pending.saturating_sub(1);
                }
                // SAFETY: `begin_copy` or `approve_copy` has checked that the destination is inside shared memory.
                let now = unsafe {
                    let at = self.block.shared.as_mut_ptr().add(copy.to[l as usize] as usize);
                    std::slice::from_raw_parts(at, bytes)
                };
                let size = 1 << self.env.granule;
                let same = |i: usize| now[i * size..][..size] == copy.data[l as usize][i * size..][..size];
                if let Some(other) = races.write(warp.index as usize, l, range.clone(), same) {
                    return Err(self.shared_race(warp, Site { pc, ..copy.site }, l, other));
                }
            }
            if self.env.checks.uninitialised {
                self.block.mark_written(range, self.env.granule, true);
            }
        }
        Ok(())
    }

    /// `ldmatrix`: lanes 8m to 8m + 7 hold the row addresses of matrix m.
    #[inline(always)]
    pub fn ldmatrix<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        trans: bool,
        access: &Access,
        pc: u32,
    ) -> Result<(), Box<Fault>> {
        let mask = (!0u64 >> (64 - 8 * u32::from(access.elements))) as u32;
        let site = Site { pc, mask, bytes: 16, usage: Use::Load, element: 0, strong: false, rows: true };
        // SAFETY: the interpreter runs only on processors that support ISA; the operands are the step's.
        unsafe { ldmatrix_checked::<ISA>(self, warp, operands, trans, access, site) }
    }

    /// `wmma.load` and `wmma.store`, element by element.
    #[inline(never)]
    pub fn wmma_memory<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        op: &Op,
        pc: u32,
    ) -> Result<(), Box<Fault>> {
        let (fragment, column, access, store) = match *op {
            Op::WmmaLoad { fragment, column, access } => (fragment, column, access, false),
            Op::WmmaStore { fragment, column, access } => (fragment, column, access, true),
            _ => unreachable!("called for wmma.load and wmma.store only"),
        };
        let registers = fragment.registers as usize;
        let file = warp.file.as_mut_ptr();
        let (values, base) =
            if store { (&operands[1..=registers], operands[0]) } else { (&operands[..registers], operands[registers]) };
        // SAFETY: the operands are base, registers and stride, all inside the file.
        let (base, stride) = unsafe {
            let stride = file.add(operands[registers + 1] as usize).cast::<[u32; 32]>().read();
            (addresses(file, base, access.wide_base, access.offset), stride)
        };
        let bytes = fragment.element_bytes;
        let usage = if store { Use::Store } else { Use::Load };
        let before = (self.counters.global, self.counters.shared);
        for (register, &operand) in values.iter().enumerate() {
            let mut unwritten = 0;
            for part in 0..fragment.per_register {
                let mut at = Addresses(std::array::from_fn(|l| {
                    let (row, col) = (fragment.at)(l as u32, register as u32, part);
                    let (major, minor) = if column { (col, row) } else { (row, col) };
                    base[l]
                        .wrapping_add((u64::from(major) * u64::from(stride[l]) + u64::from(minor)) * u64::from(bytes))
                }));
                let site = Site { pc, mask: !0, bytes, usage, element: 0, strong: false, rows: false };
                // SAFETY: the interpreter runs only on processors that support ISA; all lanes are in the mask.
                let approved = unsafe { approve::<ISA>(self, warp, access.space, &mut at, site) };
                if !approved {
                    self.locate(warp, access.space, &mut at, site)?;
                }
                unwritten |= std::mem::take(&mut self.unwritten);
                let mut data = [[0u8; 16]; 32];
                let width = bytes as usize;
                let shift = (part * bytes) as usize;
                if store {
                    for (l, data) in data.iter_mut().enumerate() {
                        let lane_bytes = if bytes == 8 { 8 } else { 4 };
                        // SAFETY: the register is inside the file, and `shift + width` is at most `lane_bytes`.
                        unsafe {
                            std::ptr::copy_nonoverlapping(
                                file.add(operand as usize + l * lane_bytes + shift),
                                data.as_mut_ptr(),
                                width,
                            )
                        };
                    }
                    if !approved {
                        self.global_races(warp, &at, site, Some(&data))?;
                        self.shared_store_races(warp, &at, site, &data)?;
                    }
                }
                for l in 0..32 {
                    let lane_bytes = if bytes == 8 { 8 } else { 4 };
                    // SAFETY: `approve` or `locate` has checked `width` bytes at the address; the register is inside
                    // the file.
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
            if unwritten != 0 {
                self.note_unwritten_fragment(warp, operand, unwritten);
            }
        }
        // Counted as one instruction, however many elements.
        let counters = &mut self.counters;
        (counters.global, counters.shared) = (counters.global.min(before.0 + 1), counters.shared.min(before.1 + 1));
        if let Some(races) = &mut self.block.races {
            races.tick(warp.index as usize);
        }
        Ok(())
    }

    /// Host address of `bytes` readable bytes at a generic address, for functions that the emulator implements itself.
    pub fn readable(
        &mut self,
        warp: &mut Warp,
        address: u64,
        lane: u32,
        bytes: u32,
        pc: u32,
    ) -> Result<*const u8, Box<Fault>> {
        let mut at = Addresses([address; 32]);
        let counters = self.counters.clone();
        self.locate(
            warp,
            Space::Generic,
            &mut at,
            Site { pc, mask: 1 << lane, bytes, usage: Use::Load, element: 0, strong: true, rows: false },
        )?;
        self.counters = counters;
        Ok(at[lane as usize] as *const u8)
    }
}

per_isa! {
    /// `ld` with all enabled checks.
    ///
    /// # Safety
    /// The processor supports `ISA`; the operands are those of the step, and its registers are inside the file.
    fn load_checked(
        machine: &mut Machine,
        warp: &mut Warp,
        operands: &[u32],
        access: &Access,
        site: Site,
    ) -> Result<(), Box<Fault>> = load_body
}

#[inline(always)]
unsafe fn load_body<const ISA: usize>(
    machine: &mut Machine,
    warp: &mut Warp,
    operands: &[u32],
    access: &Access,
    site: Site,
) -> Result<(), Box<Fault>> {
    let file = warp.file.as_mut_ptr();
    let register = operands[access.elements as usize];
    // SAFETY: a load's operands are its destinations, then its base, all inside the file. `approve` or `locate` has
    // checked the bytes at every address before they are read.
    unsafe {
        let mut at = addresses(file, register, access.wide_base, access.offset);
        settle(&mut at, site.mask);
        let asked = access.polls(site.mask).then_some(at.0);
        if !approve::<ISA>(machine, warp, access.space, &mut at, site) {
            machine.locate(warp, access.space, &mut at, site)?;
        }
        let dense = ask::steps64::<ISA>(at.as_ptr(), site.bytes.into());
        let lie = match access.elements {
            4 => [ask::lie64::<ISA>(at.as_ptr()), ask::lie64::<ISA>(at.as_ptr().add(16))],
            _ => [Lie::Any; 2],
        };
        load_from::<ISA>(file, operands, access, site.mask, dense, lie, |l| one(at.as_ptr(), l) as *const u8);
        if let Some(asked) = asked {
            machine.acquire_seen(&asked, site.mask);
        }
    }
    Ok(())
}

per_isa! {
    /// `st` with all enabled checks.
    ///
    /// # Safety
    /// As for [`load_checked`].
    fn store_checked(
        machine: &mut Machine,
        warp: &mut Warp,
        operands: &[u32],
        access: &Access,
        site: Site,
    ) -> Result<(), Box<Fault>> = store_body
}

#[inline(always)]
unsafe fn store_body<const ISA: usize>(
    machine: &mut Machine,
    warp: &mut Warp,
    operands: &[u32],
    access: &Access,
    site: Site,
) -> Result<(), Box<Fault>> {
    let file = warp.file.as_mut_ptr();
    // SAFETY: a store's operands are its base, then its values, all inside the file. `approve` or `locate` has checked
    // the bytes at the address of every lane in the mask before they are written.
    unsafe {
        let mut at = addresses(file, operands[0], access.wide_base, access.offset);
        settle(&mut at, site.mask);
        if !approve::<ISA>(machine, warp, access.space, &mut at, site) {
            machine.locate(warp, access.space, &mut at, site)?;
            if machine.block.races.is_some() || machine.env.global_races.is_some() {
                let mut values = [[0; 16]; 32];
                for l in lanes(site.mask) {
                    gather_lane(file, &operands[1..], access, l as usize, &mut values[l as usize]);
                }
                machine.global_races(warp, &at, site, Some(&values))?;
                machine.shared_store_races(warp, &at, site, &values)?;
            }
        }
        let dense = ask::steps64::<ISA>(at.as_ptr(), site.bytes.into());
        store_to::<ISA>(file, operands, access, site.mask, dense, |l| one(at.as_ptr(), l) as *mut u8)
    };
    Ok(())
}

per_isa! {
    /// `atom` and `red` with all enabled checks.
    ///
    /// # Safety
    /// As for [`load_checked`].
    fn atom_checked(
        machine: &mut Machine,
        warp: &mut Warp,
        operands: &[u32],
        rmw: Rmw,
        reduce: bool,
        access: &Access,
        site: Site,
    ) -> Result<(), Box<Fault>> = atom_body
}

#[inline(always)]
unsafe fn atom_body<const ISA: usize>(
    machine: &mut Machine,
    warp: &mut Warp,
    operands: &[u32],
    rmw: Rmw,
    reduce: bool,
    access: &Access,
    site: Site,
) -> Result<(), Box<Fault>> {
    let mask = site.mask;
    let skip = usize::from(!reduce);
    warp.polls += u64::from(!reduce && access.space != Space::Shared);
    let file = warp.file.as_mut_ptr();
    // SAFETY: the operands are (destination,) base and values, all inside the file.
    let mut at = unsafe { addresses(file, operands[skip], access.wide_base, access.offset) };
    settle(&mut at, mask);
    let asked = at.0;
    if let Some((_, added)) = machine.direct::<ISA>(file, operands[skip], access, site) {
        at.0.iter_mut().for_each(|a| *a = a.wrapping_add(added));
    } else {
        // SAFETY: the caller guarantees the ISA; `settle` has run.
        let approved = unsafe { approve::<ISA>(machine, warp, access.space, &mut at, site) };
        if !approved {
            machine.locate(warp, access.space, &mut at, site)?;
        }
    }
    let shared = machine.block.shared.as_mut_ptr() as u64;
    let in_shared = |a: u64| a.wrapping_sub(shared) < u64::from(machine.env.shared_bytes);
    let wide = access.bytes == 8;
    for l in lanes(mask) {
        let l = l as usize;
        // SAFETY: a value register is inside the file, with 64 bits per lane if the access has 8 bytes, else 32.
        let read = |operand: u32| unsafe {
            let register = file.add(operand as usize);
            if wide { register.cast::<u64>().add(l).read() } else { u64::from(register.cast::<u32>().add(l).read()) }
        };
        let b = read(operands[skip + 1]);
        let c = if rmw == Rmw::Cas { read(operands[skip + 2]) } else { 0 };
        // SAFETY: `direct`, `approve` or `locate` has found the bytes there, aligned (atomics always are checked for
        // that), in memory that lives through the launch. Shared memory belongs to the worker that runs the block.
        let old = unsafe { modify(at[l], rmw, access.bytes, b, c, in_shared(at[l])) };
        if !reduce {
            // SAFETY: as for `read`; the destination has the width of the values.
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
    machine.acquire_seen(&asked, mask);
    Ok(())
}

per_isa! {
    /// Begins the copies of a `cp.async`.
    ///
    /// # Safety
    /// As for [`load_checked`].
    fn begin_copies(
        machine: &mut Machine,
        warp: &mut Warp,
        operands: &[u32],
        op: &Op,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> = begin_body
}

#[inline(always)]
unsafe fn begin_body<const ISA: usize>(
    machine: &mut Machine,
    warp: &mut Warp,
    operands: &[u32],
    op: &Op,
    pc: u32,
    mask: u32,
) -> Result<(), Box<Fault>> {
    let Op::CpAsync { bytes, to, from, wide_to, ignore } = *op else { unreachable!("called for cp.async only") };
    let bytes = u32::from(bytes);
    let file = warp.file.as_mut_ptr();
    // SAFETY: the operands are destination, source and perhaps a third register, all inside the file.
    let (mut target, source, sizes) = unsafe {
        let sizes = match operands.get(2) {
            None => [bytes; 32],
            Some(&p) if ignore => {
                let ignored = file.add(p as usize).cast::<u32>().read();
                std::array::from_fn(|l| if ignored >> l & 1 != 0 { 0 } else { bytes })
            }
            Some(&size) => file.add(size as usize).cast::<[u32; 32]>().read(),
        };
        (addresses(file, operands[0], wide_to, to), addresses(file, operands[1], true, from), sizes)
    };
    settle(&mut target, mask);
    let site = Site { pc, mask, bytes, usage: Use::Store, element: 0, strong: false, rows: false };
    // SAFETY: the caller guarantees the ISA; `settle` has run.
    if unsafe { !approve_copy::<ISA>(machine, warp.index, &target, site) } {
        machine.begin_copy(warp, &target, site)?;
    }
    // Lanes that copy all bytes, and lanes that copy none.
    let (mut whole, mut none) = (0, 0);
    for l in 0..32 {
        whole |= u32::from(sizes[l] == bytes) << l;
        none |= u32::from(sizes[l] == 0) << l;
    }
    whole &= mask;
    if whole != 0 || mask & !none != 0 {
        let mut at = source;
        settle(&mut at, whole);
        let part = Site { mask: whole, usage: Use::Load, ..site };
        let good = whole | none & mask == mask
            // SAFETY: the caller guarantees the ISA; `settle` has run.
            && unsafe { approve::<ISA>(machine, warp, Space::Global, &mut at, part) };
        if !good {
            machine.check_sources::<ISA>(warp, &source, &sizes, site)?;
        }
    }
    let mut copy = warp.spare.pop().unwrap_or_default();
    copy.to = target;
    for l in 0..32 {
        let to = copy.data[l].as_mut_ptr();
        // SAFETY: `approve` or `locate` has found `sizes[l]` readable bytes at the source of every lane in the mask;
        // they are at most `bytes`, at most 16.
        unsafe {
            if bytes == 16 && whole >> l & 1 != 0 {
                to.cast::<[u8; 16]>().write((one(source.as_ptr(), l) as *const [u8; 16]).read_unaligned());
                continue;
            }
            to.cast::<[u8; 16]>().write([0; 16]);
            if mask >> l & 1 != 0 && sizes[l] != 0 {
                std::ptr::copy_nonoverlapping(source[l] as *const u8, to, sizes[l] as usize);
            }
        }
    }
    let group = warp.committed[mask.trailing_zeros() as usize & 31];
    let mut apart = 0;
    for l in 0..32 {
        apart |= (warp.committed[l] ^ group) & (mask >> l & 1).wrapping_neg();
    }
    if apart == 0 {
        (copy.site, copy.group) = (site, group);
        warp.pending.push(copy);
        return Ok(());
    }
    // One entry per commit group: lanes differ only where they diverged between commits.
    let mut rest = mask;
    while rest != 0 {
        let group = warp.committed[rest.trailing_zeros() as usize];
        let same = lanes(rest).filter(|&l| warp.committed[l as usize] == group).fold(0, |same, l| same | 1 << l);
        rest &= !same;
        warp.pending.push(Box::new(Pending { site: Site { mask: same, ..site }, group, ..*copy }));
    }
    Ok(())
}

per_isa! {
    /// Ends copies; see `Machine::cp_wait`.
    ///
    /// # Safety
    /// The processor supports `ISA`.
    fn end_copies(
        machine: &mut Machine,
        warp: &mut Warp,
        keep: u32,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> = end_body
}

#[inline(always)]
unsafe fn end_body<const ISA: usize>(
    machine: &mut Machine,
    warp: &mut Warp,
    keep: u32,
    pc: u32,
    mask: u32,
) -> Result<(), Box<Fault>> {
    // By lane: the first group that may stay under way.
    let mut stay = [u32::MAX; 32];
    let mut apart = 0;
    if keep != u32::MAX {
        for l in 0..32 {
            stay[l] = warp.committed[l].saturating_sub(keep);
            apart |= stay[l] ^ stay[0];
        }
    }
    let mut pending = std::mem::take(&mut warp.pending);
    let mut kept = 0;
    for i in 0..pending.len() {
        let copy = &pending[i];
        let mut done = copy.site.mask & mask;
        if keep != u32::MAX {
            done = match apart {
                0 if copy.group < stay[0] => done,
                0 => 0,
                _ => lanes(done).filter(|&l| copy.group < stay[l as usize]).fold(0, |done, l| done | 1 << l),
            };
        }
        if done != 0 {
            let good = done == copy.site.mask
                // SAFETY: the caller guarantees the ISA; `begin_copies` has settled `copy.to`.
                && unsafe { approve_arrival::<ISA>(machine, warp.index, &copy.to, copy.site) };
            if !good {
                machine.arrive_slowly(warp, copy, done, pc)?;
            }
            let bytes = copy.site.bytes as usize;
            let shared = machine.block.shared.as_mut_ptr();
            for l in lanes(done) {
                let l = l as usize;
                // SAFETY: `begin_copy` or `approve_copy` has checked that the destination is inside shared memory.
                unsafe {
                    let to = shared.add(copy.to[l] as usize);
                    match bytes {
                        16 => to.cast::<[u8; 16]>().write_unaligned(copy.data[l]),
                        _ => std::ptr::copy_nonoverlapping(copy.data[l].as_ptr(), to, bytes),
                    }
                }
            }
        }
        if done != copy.site.mask {
            pending[i].site.mask &= !done;
            pending.swap(kept, i);
            kept += 1;
        }
    }
    let spare = warp.spare.len();
    warp.spare.extend(pending.drain(kept..).take(SPARE.saturating_sub(spare)));
    warp.pending = pending;
    Ok(())
}

per_isa! {
    /// `ldmatrix` with all enabled checks. Kept out of the interpreter loop, which its transposition would slow down.
    ///
    /// # Safety
    /// As for [`load_checked`].
    fn ldmatrix_checked(
        machine: &mut Machine,
        warp: &mut Warp,
        operands: &[u32],
        trans: bool,
        access: &Access,
        site: Site,
    ) -> Result<(), Box<Fault>> = ldmatrix_body
}

#[inline(always)]
unsafe fn ldmatrix_body<const ISA: usize>(
    machine: &mut Machine,
    warp: &mut Warp,
    operands: &[u32],
    trans: bool,
    access: &Access,
    site: Site,
) -> Result<(), Box<Fault>> {
    let matrices = access.elements as usize;
    let file = warp.file.as_mut_ptr();
    // SAFETY: the operands are the destinations, then the base, all inside the file. `direct`, `approve` or `locate`
    // has checked 16 bytes at every row address before they are read.
    unsafe {
        if !access.wide_base
            && let Some((base, added)) = machine.direct::<ISA>(file, operands[matrices], access, site)
        {
            // Copied first: a destination may be the base register.
            let offsets = base.cast::<[u32; 32]>().read();
            for m in 0..matrices {
                let row = |row: usize| {
                    (added + u64::from(one(offsets.as_ptr(), 8 * m + row).wrapping_add(access.offset as u32)))
                        as *const u8
                };
                load_matrix::<ISA>(file.add(operands[m] as usize), trans, row);
            }
            return Ok(());
        }
        let mut at = addresses(file, operands[matrices], access.wide_base, access.offset);
        settle(&mut at, site.mask);
        if !approve::<ISA>(machine, warp, access.space, &mut at, site) {
            machine.locate(warp, access.space, &mut at, site)?;
        }
        for m in 0..matrices {
            let row = |row: usize| one(at.as_ptr(), 8 * m + row) as *const u8;
            load_matrix::<ISA>(file.add(operands[m] as usize), trans, row);
        }
    }
    Ok(())
}

/// # Safety
/// A 32-bit register inside the file.
#[inline(always)]
unsafe fn blend32(file: *mut u8, register: u32, value: &[u32; 32], mask: u32) {
    // SAFETY: guaranteed by the caller; registers are aligned and initialised, and `value` is not one.
    let to = unsafe { &mut *file.add(register as usize).cast::<[u32; 32]>() };
    ops::blend32(to, value, mask);
}

/// # Safety
/// A 64-bit register inside the file.
#[inline(always)]
unsafe fn blend64(file: *mut u8, register: u32, value: &[u64; 32], mask: u32) {
    // SAFETY: guaranteed by the caller; registers are aligned and initialised, and `value` is not one.
    let to = unsafe { &mut *file.add(register as usize).cast::<[u64; 32]>() };
    ops::blend64(to, value, mask);
}

/// One matrix of `ldmatrix`: 8 rows of 16 bytes into one register.
///
/// # Safety
/// Each row has 16 readable bytes; `to` is a 32-bit register inside the file; the processor supports `ISA`.
#[inline(always)]
unsafe fn load_matrix<const ISA: usize>(to: *mut u8, trans: bool, row: impl Fn(usize) -> *const u8) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        if trans {
            ask::transpose_rows::<ISA>(row, to);
        } else {
            ask::load_rows::<ISA>(row, to);
        }
    }
}

/// Moves a load's bytes into its registers. `at` gives a lane's address; `dense` says that the lanes follow each other
/// in memory; `lie` describes the addresses of the first and last 16 lanes, for accesses of 16 bytes.
///
/// # Safety
/// Every lane's address has the access's bytes, readable; the operands are the step's; the processor supports `ISA`.
#[inline(always)]
unsafe fn load_from<const ISA: usize>(
    file: *mut u8,
    operands: &[u32],
    access: &Access,
    mask: u32,
    dense: bool,
    lie: [Lie; 2],
    at: impl Fn(usize) -> *const u8,
) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        match (access.bytes, access.elements, access.register_bits) {
            (4, 1, 32) => {
                if mask == !0 && dense {
                    // Through a copy: the destination may be the base register.
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
                    // With several destinations none is the base, so they can be written directly.
                    let register = |e: usize| file.add(operands[e] as usize).cast::<u32>();
                    [register(0), register(1), register(2), register(3)]
                } else {
                    [a, b, c, d]
                };
                ask::load_quads::<ISA>(&at, to, lie[0]);
                ask::load_quads::<ISA>(|l| at(l + 16), to.map(|to| to.add(16)), lie[1]);
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

/// Loads into registers wider than the elements, and loads of 8 and 16 bits.
///
/// # Safety
/// As for [`load_from`].
#[inline(never)]
unsafe fn load_narrow(file: *mut u8, operands: &[u32], access: &Access, at: &[*const u8; 32], mask: u32) {
    for e in 0..access.elements as usize {
        let mut value = [0u64; 32];
        // SAFETY: the caller guarantees the bytes at every address.
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
        // SAFETY: the caller guarantees that the registers are inside the file, of `register_bits` bits.
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

/// Moves a store's registers into memory; parameters as in [`load_from`].
///
/// # Safety
/// The address of every lane in the mask has the access's bytes, writable; the operands are the step's; the processor
/// supports `ISA`.
#[inline(always)]
unsafe fn store_to<const ISA: usize>(
    file: *const u8,
    operands: &[u32],
    access: &Access,
    mask: u32,
    dense: bool,
    at: impl Fn(usize) -> *mut u8,
) {
    // SAFETY: guaranteed by the caller; with a full mask that covers all 32 lanes.
    unsafe {
        match (access.bytes, access.elements, access.register_bits) {
            (4, 1, 32) if mask == !0 && dense => {
                at(0).cast::<[u32; 32]>().write_unaligned(file.add(operands[1] as usize).cast::<[u32; 32]>().read());
            }
            (4, 1, 32) if mask == !0 => {
                let value = &*file.add(operands[1] as usize).cast::<[u32; 32]>();
                for l in 0..32 {
                    at(l).cast::<u32>().write_unaligned(value[l]);
                }
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
                ask::store_quads::<ISA>(&at, values);
                ask::store_quads::<ISA>(|l| at(l + 16), values.map(|value| value.add(16)));
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
///
/// # Safety
/// The values are registers inside the file, as wide as the access says.
#[inline(always)]
unsafe fn gather_lane(file: *const u8, values: &[u32], access: &Access, lane: usize, to: &mut [u8; 16]) {
    let bytes = access.bytes as usize;
    let lane_bytes = if access.register_bits == 64 { 8 } else { 4 };
    for e in 0..access.elements as usize {
        // SAFETY: guaranteed by the caller; an access has at most 16 bytes. Little-endian, so the low bytes come first.
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

/// Performs a read-modify-write and returns the old value. Shared memory needs no atomic instruction, since the warps
/// of its block run one at a time, and does not flush subnormal sums.
///
/// # Safety
/// `at` is aligned to `bytes` and valid for them, in memory that lives through the launch; with `shared`, no other
/// thread uses it. The 4-byte word around it is valid too.
#[inline(always)]
unsafe fn modify(at: u64, rmw: Rmw, bytes: u8, b: u64, c: u64, shared: bool) -> u64 {
    if shared && bytes == 4 {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let cell = at as *mut u32;
            let old = cell.read();
            cell.write(combine32(rmw, old, b as u32, c as u32, false));
            return old.into();
        }
    }
    let (relaxed, order, ftz) = (Ordering::Relaxed, Ordering::AcqRel, !shared);
    if bytes == 8 {
        // SAFETY: guaranteed by the caller.
        let cell = unsafe { AtomicU64::from_ptr(at as *mut u64) };
        return cell.fetch_update(order, relaxed, |old| Some(combine64(rmw, old, b, c))).unwrap_or_else(|old| old);
    }
    let (b, c) = (b as u32, c as u32);
    if bytes == 4 {
        // SAFETY: guaranteed by the caller.
        let cell = unsafe { AtomicU32::from_ptr(at as *mut u32) };
        return match rmw {
            Rmw::AddInt => cell.fetch_add(b, order),
            _ => {
                cell.fetch_update(order, relaxed, |old| Some(combine32(rmw, old, b, c, ftz))).unwrap_or_else(|old| old)
            }
        }
        .into();
    }
    // 16 bits: a compare-and-swap loop on the word around them.
    let shift = (at & 2) * 8;
    // SAFETY: guaranteed by the caller: global allocations are padded to 512 bytes, shared and local memory to 64.
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
