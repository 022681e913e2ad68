//! `mbarrier`: objects in shared memory at which threads arrive, phase by phase.
//!
//! The layout of the 8-byte object is up to the implementation. From the lowest bit: 20 bits of arrivals still pending
//! in this phase, 20 bits of arrivals expected per phase, and the phase number. The state that `arrive` returns is the
//! object before the arrival.
//!
//! An arrival releases what its warp did before; a test that finds the phase complete acquires it.
//! `cp.async.mbarrier.arrive` completes the thread's copies at once: later would be just as correct, but nothing after
//! it marks the latest moment.

use super::access::addresses;
use super::lanes::{Site, Use, lanes, settle};
use super::state::{Machine, POLLS_OF_TURN, Warp};
use super::{Fault, FaultKind};
use crate::ptx::program::{Access, Mbarrier};

const COUNT: u64 = (1 << 20) - 1;
const EXPECTED: u32 = 20;
const PHASE: u32 = 40;

impl Machine<'_> {
    /// Executes one of the instructions, lane by lane.
    #[inline(never)]
    pub fn mbarrier<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        mode: Mbarrier,
        access: &Access,
        pc: u32,
        mask: u32,
    ) -> Result<(), Box<Fault>> {
        let file = warp.file.as_mut_ptr();
        // SAFETY: each mode's operands are inside the file, with the widths that are read below.
        let (wide, narrow) = unsafe {
            let wide = |i: usize| file.add(operands[i] as usize).cast::<u64>();
            let narrow = |i: usize| file.add(operands[i] as usize).cast::<u32>();
            (wide, narrow)
        };
        if mode == Mbarrier::PendingCount {
            for l in lanes(mask) {
                // SAFETY: as above.
                unsafe { narrow(0).add(l as usize).write((wide(1).add(l as usize).read() & COUNT) as u32) };
            }
            return Ok(());
        }
        if let Mbarrier::CopyArrive { .. } = mode {
            self.cp_wait::<ISA>(warp, u32::MAX, pc, mask)?;
        }
        let base = match mode {
            Mbarrier::Arrive { .. } | Mbarrier::TestWait { .. } => 1,
            _ => 0,
        };
        // SAFETY: as above.
        let mut at = unsafe { addresses(file, operands[base], access.wide_base, access.offset) };
        settle(&mut at, mask);
        // Arrivals and tests do not race with each other, so they count as reads: of the initialisation, from which a
        // barrier has to separate them.
        let sets = matches!(mode, Mbarrier::Init | Mbarrier::Inval);
        let usage = if sets { Use::Store } else { Use::Load };
        let site = Site { pc, mask, bytes: 8, usage, element: 0, strong: false, rows: false };
        self.locate(warp, access.space, &mut at, site)?;
        let shared = self.block.shared.as_mut_ptr() as u64;
        let size = u64::from(self.env.shared_bytes);
        if let Some(races) = self.block.races.as_mut().filter(|_| sets) {
            let mut inside = lanes(mask).filter(|&l| at[l as usize].wrapping_sub(shared) < size);
            let found = inside.find_map(|l| {
                let granules = self.env.granules(at[l as usize] - shared, 8);
                Some((l, races.write(warp.index as usize, l, granules, |_| false)?))
            });
            if let Some((lane, other)) = found {
                return Err(self.shared_race(warp, site, lane, other));
            }
        }
        for l in lanes(mask) {
            let offset = at[l as usize].wrapping_sub(shared);
            let illegal = |machine: &Self, warp: &Warp, detail: String| {
                Err(machine.fault(FaultKind::Illegal, warp, pc, l, detail))
            };
            if offset >= size {
                return illegal(self, warp, "an mbarrier is in shared memory".into());
            }
            let object = at[l as usize] as *mut u64;
            let lane = l as usize;
            // SAFETY: `locate` has found 8 bytes there, in the shared memory of the block that only this worker runs.
            let old = unsafe { object.read_unaligned() };
            let (pending, expected, phase) = (old & COUNT, old >> EXPECTED & COUNT, old >> PHASE);
            if !matches!(mode, Mbarrier::Init | Mbarrier::Inval) && expected == 0 && pending == 0 {
                return illegal(self, warp, format!("the mbarrier at shared address {offset:#x} is not initialised"));
            }
            let mut new = old;
            let mut arrivals = 0;
            match mode {
                Mbarrier::Init => {
                    // SAFETY: as above.
                    let count = u64::from(unsafe { narrow(1).add(lane).read() });
                    if count == 0 || count > COUNT {
                        return illegal(self, warp, format!("an mbarrier of {count} arrivals, they are 1 to {COUNT}"));
                    }
                    new = count << EXPECTED | count;
                }
                Mbarrier::Inval => new = 0,
                Mbarrier::Arrive { drop, stay } => {
                    // SAFETY: as above.
                    unsafe {
                        arrivals = u64::from(narrow(2).add(lane).read());
                        wide(0).add(lane).write(old);
                    }
                    if drop && arrivals <= expected {
                        new -= arrivals << EXPECTED;
                    }
                    if arrivals == 0 || arrivals > pending || (stay && arrivals == pending) {
                        let detail = format!("{arrivals} arrivals where the phase waits for {pending}");
                        return illegal(self, warp, detail);
                    }
                }
                Mbarrier::CopyArrive { counted } => arrivals = u64::from(counted),
                Mbarrier::TestWait { parity } => {
                    // SAFETY: as above.
                    unsafe {
                        let ended = match parity {
                            true => phase & 1 != u64::from(narrow(2).add(lane).read()) & 1,
                            false => wide(2).add(lane).read() >> PHASE != phase,
                        };
                        let to = narrow(0);
                        to.write(to.read() & !(1 << l) | u32::from(ended) << l);
                        if !ended {
                            // Only others can end the phase, so they have their turns at once.
                            warp.polls_of_turn = POLLS_OF_TURN;
                        } else if let Some(races) = &mut self.block.races {
                            races.acquire(warp.index as usize, offset as u32);
                        }
                    }
                    continue;
                }
                Mbarrier::PendingCount => unreachable!("done above"),
            }
            if arrivals > pending {
                return illegal(self, warp, format!("{arrivals} arrivals where the phase waits for {pending}"));
            }
            if let (Mbarrier::Arrive { .. } | Mbarrier::CopyArrive { .. }, Some(races)) = (mode, &mut self.block.races)
            {
                races.release(warp.index as usize, offset as u32);
            }
            if arrivals > 0 {
                new -= arrivals;
                if new & COUNT == 0 {
                    let expected = new >> EXPECTED & COUNT;
                    new = (phase + 1) << PHASE | expected << EXPECTED | expected;
                }
            }
            // SAFETY: as above.
            unsafe { object.write_unaligned(new) };
        }
        Ok(())
    }
}
