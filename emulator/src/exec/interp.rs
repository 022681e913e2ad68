//! The interpreter loop: runs one warp until it waits, ends, or has used up its turn.
//!
//! The loop is one function, compiled once per instruction set. Lanes at the same step form a [`Group`]. The group with
//! the smallest step runs, and groups that meet are merged (see [`crate::ptx`] for the order of steps). Groups can meet
//! only where a basic block begins, so the loop checks for that only when a block ends.

// Loops over lanes index several registers at once, and vectorise as written.
#![allow(clippy::needless_range_loop)]

use super::lanes::lanes;
use super::state::{Group, Machine, POLLS_OF_TURN, TURN, Wait, Warp};
use super::{Fault, FaultKind};
use crate::num::PORTABLE;
use crate::num::ops::{blend32, blend64};
#[cfg(target_arch = "x86_64")]
use crate::num::{AVX2, AVX512};
use crate::ptx::program::*;

/// Why the loop returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// All lanes have exited or wait.
    Blocked,
    /// The turn was used up.
    Used,
    /// The turn ended early, because the warp may be waiting for what other threads write.
    Polled,
}

/// Runs a warp for at most `turn` basic blocks. Compiled once per instruction set.
///
/// # Safety
/// The processor supports the instruction set.
pub type Runner = unsafe fn(&mut Machine, &mut Warp, u32) -> Result<Turn, Box<Fault>>;

/// The loop for any processor.
///
/// # Safety
/// None; unsafe only to be a [`Runner`].
pub unsafe fn run_portable(machine: &mut Machine, warp: &mut Warp, turn: u32) -> Result<Turn, Box<Fault>> {
    // SAFETY: PORTABLE runs everywhere.
    unsafe { run::<PORTABLE>(machine, warp, turn) }
}

/// The loop for AVX2.
///
/// # Safety
/// The processor supports AVX2, FMA, F16C, BMI1, BMI2, LZCNT and POPCNT.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
pub unsafe fn run_avx2(machine: &mut Machine, warp: &mut Warp, turn: u32) -> Result<Turn, Box<Fault>> {
    // SAFETY: guaranteed by the caller.
    unsafe { run::<AVX2>(machine, warp, turn) }
}

/// The loop for AVX-512.
///
/// # Safety
/// The processor supports AVX-512 F, VL, BW, DQ and what [`run_avx2`] needs.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
pub unsafe fn run_avx512(machine: &mut Machine, warp: &mut Warp, turn: u32) -> Result<Turn, Box<Fault>> {
    // SAFETY: guaranteed by the caller.
    unsafe { run::<AVX512>(machine, warp, turn) }
}

impl Warp {
    /// Picks the group to run: merges groups at the same step, then takes the favoured one or the one with the smallest
    /// step.
    fn select(&mut self, barriers: &[super::state::BarrierState]) -> Option<usize> {
        for i in (0..self.groups.len()).rev() {
            let group = self.groups[i];
            if group.mask == 0 {
                self.groups.swap_remove(i);
            }
        }
        if self.groups.len() > 1 {
            let mut i = 0;
            while i < self.groups.len() {
                let at = self.groups[i];
                let mut k = i + 1;
                while k < self.groups.len() {
                    let other = self.groups[k];
                    let free = |group: Group| !matches!(group.wait, Wait::Barrier(..));
                    if other.pc == at.pc && free(at) && free(other) {
                        self.groups[i].mask |= other.mask;
                        self.groups[i].wait = Wait::Nothing;
                        self.groups.swap_remove(k);
                    } else {
                        k += 1;
                    }
                }
                i += 1;
            }
        }
        let ready = |group: &Group| match group.wait {
            Wait::Nothing => true,
            Wait::Lanes => false,
            Wait::Barrier(id, generation) => barriers[id as usize].generation != generation,
        };
        if let Some(favoured) = self.groups.iter().position(|group| group.mask & self.favour != 0 && ready(group)) {
            return Some(favoured);
        }
        (0..self.groups.len()).filter(|&i| ready(&self.groups[i])).min_by_key(|&i| self.groups[i].pc)
    }

    /// Sends a lane to a step, with those of the groups from `first` on that go there too.
    fn send(&mut self, lane: u32, pc: u32, first: usize) {
        match self.groups[first..].iter_mut().find(|group| group.pc == pc) {
            Some(group) => group.mask |= 1 << lane,
            None => self.groups.push(Group { pc, mask: 1 << lane, wait: Wait::Nothing }),
        }
    }

    /// Whether a group could run.
    pub fn ready(&self, barriers: &[super::state::BarrierState]) -> bool {
        self.groups.iter().any(|group| match group.wait {
            Wait::Nothing => true,
            Wait::Lanes => false,
            Wait::Barrier(id, generation) => barriers[id as usize].generation != generation,
        })
    }
}

/// The lane, as a bit, whose group goes first in the next turn; 0 for the group with the smallest step. Rotates over
/// lanes, because groups merge and split all the time: to the next lane that was not in the favoured group, and after
/// the last to none.
fn next_favour(groups: &[Group], favour: u32) -> u32 {
    if groups.len() < 2 {
        return 0;
    }
    let ready = groups.iter().filter(|group| group.wait == Wait::Nothing).fold(0, |all, group| all | group.mask);
    let later = match groups.iter().find(|group| group.mask & favour != 0) {
        Some(last) => ready & !last.mask & !(favour | (favour - 1)),
        None => ready,
    };
    later & later.wrapping_neg()
}

/// # Safety
/// The processor supports `ISA`.
#[inline(always)]
unsafe fn run<const ISA: usize>(machine: &mut Machine, warp: &mut Warp, turn: u32) -> Result<Turn, Box<Fault>> {
    let env = machine.env;
    let program = env.program;
    let file = warp.file.as_mut_ptr();
    let mut left = turn;
    'select: while let Some(index) = warp.select(&machine.block.barriers) {
        let Group { mut pc, mask, wait } = warp.groups[index];
        let mut mask = mask;
        let alone = warp.groups.len() == 1;
        if let Wait::Barrier(id, _) = wait {
            machine.leave_barrier(warp, id as usize, pc, mask);
            warp.groups[index].wait = Wait::Nothing;
            pc += 1;
        }
        loop {
            debug_assert!((pc as usize) < program.steps.len());
            // SAFETY: `pc` starts at 0 or at a step that a branch, jump or exit names, and grows by 1 inside a basic
            // block. `crate::ptx` ends every block with such a step and makes their targets valid; nothing outside the
            // crate can build a `Program`.
            let step = unsafe { program.steps.get_unchecked(pc as usize) };
            // SAFETY: `crate::ptx` puts every step's operands into the pool, from `first` on.
            let operands = unsafe { program.operands.get_unchecked(step.first as usize..) };
            let mut active = mask;
            if step.guard != NO_GUARD {
                // SAFETY: a guard is a predicate register inside the file.
                let guard = unsafe { file.add(step.guard as usize).cast::<u32>().read() };
                active &= if step.negate { !guard } else { guard };
            }
            let mut unwrite = 0;
            let followed = !warp.unwritten.is_empty();
            if followed {
                unwrite = machine.follow(warp, step, operands, pc, mask, active)?;
            }
            // Books a basic block when it ends.
            macro_rules! end_of_block {
                () => {
                    if env.settings.counters {
                        let runs = &mut machine.runs[step.block as usize];
                        runs.0 += 1;
                        runs.1 += u64::from(mask.count_ones());
                    }
                    let length = program.costs[step.block as usize].instructions;
                    machine.block.ticks += u64::from(length);
                    left = left.saturating_sub(1);
                };
            }
            // Continues at a step, after looking for other groups if there may be any.
            macro_rules! go {
                ($to:expr) => {{
                    pc = $to;
                    if alone && left != 0 {
                        continue;
                    }
                    warp.groups[index].pc = pc;
                    if left == 0 {
                        return Ok(machine.end_of_turn(warp, turn));
                    }
                    continue 'select;
                }};
            }
            // After too many polls, ends the turn with the basic block.
            macro_rules! poll {
                () => {
                    warp.polls_of_turn += 1;
                    if warp.polls_of_turn >= POLLS_OF_TURN {
                        left = left.min(1);
                    }
                };
            }
            // Parks the group until other lanes arrive or exit.
            macro_rules! wait_for_lanes {
                () => {{
                    warp.groups[index] = Group { pc, mask, wait: Wait::Lanes };
                    continue 'select;
                }};
            }
            match &step.op {
                Op::Run(form) | Op::Mma(form, _)
                    if followed && active != 0 && (active == !0 || matches!(step.op, Op::Run(_))) =>
                {
                    let arity = step.arity as usize;
                    for instruction in operands[..arity * step.count as usize].chunks_exact(arity) {
                        machine.follow_arithmetic(warp, form, instruction, active);
                        // SAFETY: as for `Op::Run` below.
                        unsafe { form.run[ISA](form, file, instruction.as_ptr(), 1, active) };
                    }
                    if step.guard != NO_GUARD {
                        machine.count_guarded(form, active);
                    }
                }
                Op::Run(form) => {
                    if active != 0 {
                        // SAFETY: `crate::ptx` made the operands for this form, `count` times its arity, all inside the
                        // file. The caller guarantees the ISA.
                        unsafe { form.run[ISA](form, file, operands.as_ptr(), step.count as usize, active) };
                        if step.guard != NO_GUARD {
                            machine.count_guarded(form, active);
                        }
                    }
                }
                Op::Mma(form, plan) => {
                    if active != !0 {
                        if active == mask && warp.alive == !0 && mask != !0 {
                            wait_for_lanes!();
                        }
                        return Err(machine.not_whole(warp, pc, active));
                    }
                    let plan = &program.plans[*plan as usize];
                    // SAFETY: as for `Op::Run` above; the plan was made from these operands.
                    unsafe {
                        match plan.run[ISA] {
                            Some(run) => run(plan, file),
                            None => form.run[ISA](form, file, operands.as_ptr(), step.count as usize, active),
                        }
                    }
                }
                Op::Load(access) => {
                    if active != 0 {
                        machine.load::<ISA>(warp, operands, access, pc, active)?;
                        if machine.unwritten != 0 {
                            machine.note_unwritten(warp, step, operands);
                        }
                        if access.polls(active) {
                            poll!();
                        }
                    }
                }
                Op::Store(access) => {
                    if active != 0 {
                        machine.store::<ISA>(warp, operands, access, pc, active)?;
                        if unwrite != 0 {
                            machine.unwrite(warp, operands, access, unwrite);
                        }
                    }
                }
                Op::LdMatrix { trans, access } => {
                    if active != !0 {
                        if active == mask && warp.alive == !0 {
                            wait_for_lanes!();
                        }
                        return Err(machine.not_whole(warp, pc, active));
                    }
                    machine.ldmatrix::<ISA>(warp, operands, *trans, access, pc)?;
                    if machine.unwritten != 0 {
                        machine.note_unwritten(warp, step, operands);
                    }
                }
                Op::Jump(target) => {
                    end_of_block!();
                    go!(*target);
                }
                Op::Branch { target, fall } => {
                    end_of_block!();
                    if active == mask {
                        go!(*target);
                    }
                    if active == 0 {
                        go!(*fall);
                    }
                    machine.counters.divergent_branches += 1;
                    warp.groups[index] = Group { pc: *target, mask: active, wait: Wait::Nothing };
                    warp.groups.push(Group { pc: *fall, mask: mask & !active, wait: Wait::Nothing });
                    if left == 0 {
                        return Ok(machine.end_of_turn(warp, turn));
                    }
                    continue 'select;
                }
                Op::Exit { fall } => {
                    end_of_block!();
                    if active != 0 {
                        machine.exit_lanes(warp, active, pc)?;
                    }
                    mask &= !active;
                    warp.groups[index] = Group { pc: *fall, mask, wait: Wait::Nothing };
                    if left == 0 {
                        return Ok(machine.end_of_turn(warp, turn));
                    }
                    continue 'select;
                }
                Op::BranchTable { table, fall } => {
                    end_of_block!();
                    warp.groups[index].mask = 0;
                    machine.branch_table(warp, operands[0], pc, *table, *fall, mask, active)?;
                    if left == 0 {
                        return Ok(machine.end_of_turn(warp, turn));
                    }
                    continue 'select;
                }
                Op::CallTable(call) => {
                    end_of_block!();
                    warp.groups[index].mask = 0;
                    machine.call_table(warp, operands[0], pc, *call, mask)?;
                    if left == 0 {
                        return Ok(machine.end_of_turn(warp, turn));
                    }
                    continue 'select;
                }
                Op::Barrier { mode, aligned, .. } => {
                    if active == 0 {
                        pc += 1;
                        continue;
                    }
                    if *aligned && active != warp.alive && env.checks.barrier_divergence {
                        if active == mask {
                            wait_for_lanes!();
                        }
                        let detail = "barrier that only some lanes of the warp execute, by its predicate".to_string();
                        return Err(machine.fault(
                            FaultKind::Barrier,
                            warp,
                            pc,
                            (warp.alive & !active).trailing_zeros() & 31,
                            detail,
                        ));
                    }
                    let generation = machine.arrive(warp, &step.op, operands, pc, active)?;
                    if *mode != Barrier::Arrive {
                        let id = generation.0;
                        warp.groups[index] = Group { pc, mask: active, wait: Wait::Barrier(id, generation.1) };
                        if mask != active {
                            warp.groups.push(Group { pc: pc + 1, mask: mask & !active, wait: Wait::Nothing });
                        }
                        continue 'select;
                    }
                }
                Op::WarpSync | Op::Shuffle { .. } | Op::Vote { .. } | Op::Match { .. } | Op::Redux(_) => {
                    let done = if active == 0 { 0 } else { machine.collective(warp, step, operands, pc, active)? };
                    if done != active {
                        // Finished lanes, and those that the guard excludes, go on.
                        let on = mask & !active | done;
                        warp.groups.push(Group { pc: pc + 1, mask: on, wait: Wait::Nothing });
                        warp.groups[index] = Group { pc, mask: mask & !on, wait: Wait::Lanes };
                        continue 'select;
                    }
                }
                other => {
                    if matches!(other, Op::WmmaLoad { .. } | Op::WmmaStore { .. } | Op::MovMatrix) && active != !0 {
                        if active == mask && warp.alive == !0 {
                            wait_for_lanes!();
                        }
                        return Err(machine.not_whole(warp, pc, active));
                    }
                    if active != 0 {
                        // Trimmed to the arity, because a step's last operand may be optional.
                        machine.seldom::<ISA>(warp, other, &operands[..usize::from(step.arity)], pc, active)?;
                        if matches!(other, Op::Atom { reduce: false, .. } | Op::Mbarrier { .. }) {
                            poll!();
                        }
                    }
                }
            }
            pc += 1;
        }
    }
    warp.unbroken = 0;
    Ok(Turn::Blocked)
}

impl Machine<'_> {
    fn not_whole(&self, warp: &Warp, pc: u32, active: u32) -> Box<Fault> {
        let detail = format!("all 32 lanes of a warp must execute this together; here only {} do", active.count_ones());
        self.fault(FaultKind::InactiveShuffle, warp, pc, active.trailing_zeros() & 31, detail)
    }

    #[inline(never)]
    fn count_guarded(&mut self, form: &crate::num::Form, active: u32) {
        if let (true, Some((ty, flops))) = (self.env.settings.counters, form.flops) {
            self.counters.add_flops(ty, u64::from(flops) * u64::from(active.count_ones()));
        }
    }

    /// Ends the warp's turn. If its lanes have not waited for long, another group goes first next time, so that
    /// spinning lanes cannot starve the ones they spin on.
    #[inline(never)]
    fn end_of_turn(&mut self, warp: &mut Warp, turn: u32) -> Turn {
        warp.unbroken += turn;
        let polled = warp.polls_of_turn >= POLLS_OF_TURN;
        if !polled && warp.unbroken < TURN {
            return Turn::Used;
        }
        warp.unbroken = 0;
        warp.polls_of_turn = 0;
        warp.favour = next_favour(&warp.groups, warp.favour);
        if polled { Turn::Polled } else { Turn::Used }
    }

    /// Lanes exit. Barriers do not wait for exited threads, so an early return is fine; but a thread that exits in code
    /// behind a barrier where others still wait has bypassed it.
    #[inline(never)]
    fn exit_lanes(&mut self, warp: &mut Warp, lanes: u32, pc: u32) -> Result<(), Box<Fault>> {
        let program = self.env.program;
        let only_exit = program.costs[program.steps[pc as usize].block as usize].instructions <= 1;
        if !only_exit {
            self.check_left_behind(warp, lanes, pc)?;
        }
        warp.alive &= !lanes;
        self.block.alive -= lanes.count_ones();
        for group in &mut warp.groups {
            if group.wait == Wait::Lanes {
                group.wait = Wait::Nothing;
            }
        }
        for id in 0..self.block.barriers.len() {
            self.complete(id);
        }
        Ok(())
    }

    /// Faults if lanes exit having bypassed a barrier or a warp-level exchange at which others wait for them.
    fn check_left_behind(&self, warp: &mut Warp, lanes: u32, pc: u32) -> Result<(), Box<Fault>> {
        let program = self.env.program;
        let file = warp.file.as_mut_ptr();
        let waits_for_them = |group: &&Group| {
            let step = &program.steps[group.pc as usize];
            if group.wait != Wait::Lanes || matches!(step.op, Op::Barrier { .. }) {
                return group.wait == Wait::Lanes;
            }
            if !matches!(step.op, Op::WarpSync | Op::Shuffle { .. } | Op::Vote { .. } | Op::Match { .. } | Op::Redux(_))
            {
                return false;
            }
            let member = program.operands[step.first as usize + step.arity as usize - 1] as usize;
            // SAFETY: the member mask is the last operand, a 32-bit register inside the file.
            let named = unsafe { file.add(member).cast::<u32>().add(group.mask.trailing_zeros() as usize & 31).read() };
            named & lanes != 0
        };
        let here = warp.groups.iter().filter(waits_for_them).map(|group| group.pc);
        let elsewhere = self
            .block
            .barriers
            .iter()
            .filter(|barrier| barrier.expected == 0)
            .filter_map(|barrier| barrier.first.map(|(pc, _)| pc));
        for at in here.chain(elsewhere) {
            let barrier = matches!(program.steps[at as usize].op, Op::Barrier { .. });
            let checked = if barrier { self.env.checks.barrier_divergence } else { self.env.checks.inactive_shuffle };
            if !checked || !program.reaches(at, pc) {
                continue;
            }
            let line = program.sources[program.steps[at as usize].source as usize].line;
            let (kind, what) = match barrier {
                true => (FaultKind::Barrier, "barrier divergence: the thread ends without having reached the barrier"),
                false => (
                    FaultKind::InactiveShuffle,
                    "the thread ends without having taken part in the exchange between lanes",
                ),
            };
            let detail = format!("{what} on PTX line {line}, where others wait");
            return Err(self.fault(kind, warp, pc, lanes.trailing_zeros() & 31, detail));
        }
        Ok(())
    }

    #[inline(never)]
    #[allow(clippy::too_many_arguments)]
    fn branch_table(
        &mut self,
        warp: &mut Warp,
        register: u32,
        pc: u32,
        table: u32,
        fall: u32,
        mask: u32,
        active: u32,
    ) -> Result<(), Box<Fault>> {
        let targets = &self.env.program.tables[table as usize];
        // SAFETY: the index is a 32-bit register inside the file.
        let indices = unsafe { warp.file.as_mut_ptr().add(register as usize).cast::<[u32; 32]>().read() };
        let before = warp.groups.len();
        for l in lanes(active) {
            let Some(&target) = targets.get(indices[l as usize] as usize) else {
                let detail = format!("index {} into {} branch targets", indices[l as usize], targets.len());
                return Err(self.fault(FaultKind::Illegal, warp, pc, l, detail));
            };
            warp.send(l, target, before);
        }
        if mask != active {
            warp.groups.push(Group { pc: fall, mask: mask & !active, wait: Wait::Nothing });
        }
        if warp.groups.len() > before + 1 {
            self.counters.divergent_branches += 1;
        }
        Ok(())
    }

    /// Sends every lane to the function whose address it has.
    #[inline(never)]
    fn call_table(&mut self, warp: &mut Warp, register: u32, pc: u32, call: u32, mask: u32) -> Result<(), Box<Fault>> {
        let site = &self.env.program.calls[call as usize];
        // SAFETY: the address is a 64-bit register inside the file.
        let addresses = unsafe { warp.file.as_mut_ptr().add(register as usize).cast::<[u64; 32]>().read() };
        let before = warp.groups.len();
        for l in lanes(mask) {
            match self.callee(site, addresses[l as usize]) {
                Ok(target) => warp.send(l, target, before),
                Err(detail) => return Err(self.fault(FaultKind::Call, warp, pc, l, detail)),
            }
        }
        if warp.groups.len() > before + 1 {
            self.counters.divergent_branches += 1;
        }
        Ok(())
    }

    /// The step of the function that begins at an address, for a call; or what is wrong with it.
    fn callee(&self, site: &CallSite, address: u64) -> Result<u32, String> {
        let functions = &self.env.program.functions;
        let offset = address.wrapping_sub(self.env.launch.module.functions);
        let index = offset / FUNCTION_STRIDE;
        if address == 0 {
            return Err("calls a function through a null pointer".into());
        }
        if !offset.is_multiple_of(FUNCTION_STRIDE) || index >= functions.len() as u64 {
            let what = match address & !(FUNCTION_WINDOW - 1) {
                FUNCTION_WINDOW => "where no function of the kernel's module begins",
                _ => "where no function begins",
            };
            return Err(format!("calls address {address:#x}, {what}"));
        }
        let Callee { name, signature } = &functions[index as usize];
        match site.targets.iter().find(|(target, _)| u64::from(*target) == index) {
            Some((_, Ok(step))) => Ok(*step),
            Some((_, Err(why))) => Err(format!("calls {why}")),
            None if *signature != site.signature => {
                Err(format!("calls {name}, which {signature}, by a prototype that {}", site.signature))
            }
            None if site.listed => Err(format!("calls {name}, which is not among the call's .calltargets")),
            None => Err(format!("calls {name}, whose address nothing in the module takes")),
        }
    }

    /// Lanes arrive at a barrier. Returns its number and the generation whose end they wait for.
    #[inline(never)]
    fn arrive(
        &mut self,
        warp: &mut Warp,
        op: &Op,
        operands: &[u32],
        pc: u32,
        active: u32,
    ) -> Result<(u8, u32), Box<Fault>> {
        let Op::Barrier { mode, aligned, counted, negate } = *op else { unreachable!("called for barriers only") };
        let file = warp.file.as_mut_ptr();
        let red = matches!(mode, Barrier::Popc | Barrier::And | Barrier::Or);
        let lane = active.trailing_zeros() & 31;
        // SAFETY: the operands are (destination,) barrier, count and, for reductions, a predicate, all inside the file.
        let (id, count, votes) = unsafe {
            let read = |i: usize| file.add(operands[i] as usize).cast::<u32>().add(lane as usize).read();
            let skip = usize::from(red);
            let votes = if red { file.add(operands[3] as usize).cast::<u32>().read() } else { 0 };
            (read(skip), read(skip + 1), if negate { !votes } else { votes })
        };
        if id >= 16 {
            return Err(self.fault(FaultKind::Illegal, warp, pc, lane, format!("barrier {id}; there are 16")));
        }
        if counted && (count == 0 || !count.is_multiple_of(32)) {
            return Err(self.fault(
                FaultKind::Illegal,
                warp,
                pc,
                lane,
                format!("barrier of {count} threads, which is not a multiple of 32"),
            ));
        }
        self.counters.barriers += u64::from(self.env.settings.counters);
        let thread = warp.index * 32 + lane;
        let expected = if counted { count } else { 0 };
        let whole = active == warp.alive;
        let state = &mut self.block.barriers[id as usize];
        state.loose |= mode == Barrier::Arrive || !whole;
        let first = *state.first.get_or_insert((pc, thread));
        if state.arrived == 0 {
            state.expected = expected;
        }
        let different = if aligned && !counted && self.env.checks.barrier_divergence && first.0 != pc {
            Some("waits at another barrier instruction")
        } else if state.expected != expected {
            Some("waits at this barrier for another number of threads")
        } else {
            None
        };
        if let Some(different) = different {
            let line = self.env.program.sources[self.env.program.steps[first.0 as usize].source as usize].line;
            let other = super::state::name_thread(self.env.thread(first.1 / 32, first.1 % 32));
            let detail = format!("barrier divergence: thread {other} of the block {different}, on PTX line {line}");
            return Err(self.fault(FaultKind::Barrier, warp, pc, lane, detail));
        }
        // A counted barrier counts whole warps, even if the block's last warp is partial.
        state.arrived += if counted && whole { 32 } else { active.count_ones() };
        if red {
            state.votes += (votes & active).count_ones();
            state.voters += active.count_ones();
        }
        let generation = state.generation;
        if let Some(races) = &mut self.block.races {
            let clock = races.clock(warp.index as usize);
            let state = &mut self.block.barriers[id as usize];
            state.clock.resize(clock.len(), 0);
            for (joined, &mine) in state.clock.iter_mut().zip(clock) {
                *joined = (*joined).max(mine);
            }
            races.tick(warp.index as usize);
        }
        self.complete(id as usize);
        Ok((id as u8, generation))
    }

    /// Ends a barrier's generation when all have arrived.
    fn complete(&mut self, id: usize) {
        let state = &mut self.block.barriers[id];
        let expected = if state.expected == 0 { self.block.alive } else { state.expected };
        if state.arrived == 0 || state.arrived < expected {
            return;
        }
        state.result = (state.votes, state.voters);
        (state.arrived, state.votes, state.voters, state.first) = (0, 0, 0, None);
        state.completed_clock.clone_from(&state.clock);
        state.clock.clear();
        // Where the whole block meets and nobody goes on alone, all warps can agree on a time: everything earlier is
        // older, for everyone.
        let loose = std::mem::take(&mut state.loose);
        let together = state.expected == 0 && !loose;
        state.resume = 0;
        if together && let Some(&latest) = state.completed_clock.iter().max() {
            state.resume = latest + 1;
            state.completed_clock.fill(latest);
            if let Some(races) = &mut self.block.races {
                races.forget(latest);
            }
        }
        state.generation += 1;
    }

    /// Lanes continue behind a completed barrier.
    #[inline(never)]
    fn leave_barrier(&mut self, warp: &mut Warp, id: usize, pc: u32, mask: u32) {
        let step = &self.env.program.steps[pc as usize];
        let state = &self.block.barriers[id];
        if let Some(races) = &mut self.block.races {
            races.join(warp.index as usize, &state.completed_clock);
            races.advance(warp.index as usize, state.resume);
        }
        let Op::Barrier { mode, .. } = step.op else { unreachable!("only barriers are waited for") };
        let (votes, voters) = state.result;
        let to = self.env.program.operands[step.first as usize] as usize;
        // SAFETY: a reduction's destination is the first operand, inside the file; for others `to` is only an offset
        // inside it.
        unsafe {
            let register = warp.file.as_mut_ptr().add(to).cast::<u32>();
            let truth = match mode {
                Barrier::Sync | Barrier::Arrive => return,
                Barrier::Popc => {
                    lanes(mask).for_each(|l| register.add(l as usize).write(votes));
                    return;
                }
                Barrier::And => votes == voters,
                Barrier::Or => votes > 0,
            };
            register.write(register.read() & !mask | if truth { mask } else { 0 });
        }
    }

    /// Warp-level instructions by which lanes communicate. Returns the lanes that are done; the others wait for lanes
    /// they name.
    #[inline(always)]
    fn collective(
        &mut self,
        warp: &mut Warp,
        step: &Step,
        operands: &[u32],
        pc: u32,
        active: u32,
    ) -> Result<u32, Box<Fault>> {
        let file = warp.file.as_mut_ptr();
        let arity = step.arity as usize;
        // SAFETY: the member mask is the last operand of all of these, a 32-bit register inside the file. Nothing
        // writes to the file while `members` is in use.
        let members = unsafe { &*file.add(operands[arity - 1] as usize).cast::<[u32; 32]>() };
        let lane = active.trailing_zeros() & 31;
        let named = members[lane as usize];
        let mut same = true;
        for l in 0..32 {
            same &= members[l] == named || active >> l & 1 == 0;
        }
        if !same || active & !named != 0 {
            return self.split_masks(warp, step, pc, active, *members);
        }
        if named & warp.alive & !active != 0 {
            if matches!(step.op, Op::WarpSync) {
                return Ok(if self.meet(warp, named, active) { active } else { 0 });
            }
            return Ok(0);
        }
        if let Some(races) = &mut self.block.races {
            races.tick(warp.index as usize);
        }
        match step.op {
            Op::WarpSync => {}
            Op::Shuffle { mode, with_predicate } => self.shuffle(warp, operands, mode, with_predicate, pc, active)?,
            _ => self.vote(warp, step, operands, active),
        }
        Ok(active)
    }

    /// `bar.warp.sync` may be met at different instructions: true if the missing lanes wait at others that name the
    /// same lanes.
    #[inline(never)]
    fn meet(&mut self, warp: &mut Warp, named: u32, active: u32) -> bool {
        let program = self.env.program;
        let file = warp.file.as_mut_ptr();
        let waits_too = |group: &Group| {
            let step = &program.steps[group.pc as usize];
            if group.wait != Wait::Lanes || !matches!(step.op, Op::WarpSync) {
                return false;
            }
            let lane = group.mask.trailing_zeros() & 31;
            // SAFETY: the member mask is a 32-bit register inside the file.
            let theirs = unsafe {
                file.add(program.operands[step.first as usize] as usize).cast::<u32>().add(lane as usize).read()
            };
            theirs == named
        };
        let come = warp.groups.iter().filter(|group| waits_too(group)).fold(active, |come, group| come | group.mask);
        if named & warp.alive & !come != 0 {
            return false;
        }
        for group in &mut warp.groups {
            if waits_too(group) && group.mask & named != 0 {
                *group = Group { pc: group.pc + 1, mask: group.mask, wait: Wait::Nothing };
            }
        }
        if let Some(races) = &mut self.block.races {
            races.tick(warp.index as usize);
        }
        true
    }

    /// Lanes at one instruction that name different member masks: each set becomes a group of its own, and waits for
    /// the lanes it names.
    #[inline(never)]
    fn split_masks(
        &mut self,
        warp: &mut Warp,
        step: &Step,
        pc: u32,
        active: u32,
        members: [u32; 32],
    ) -> Result<u32, Box<Fault>> {
        for l in lanes(active) {
            if members[l as usize] >> l & 1 == 0 {
                let detail = format!("the lane is not in its own member mask {:#010x}", members[l as usize]);
                return Err(self.fault(FaultKind::InactiveShuffle, warp, pc, l, detail));
            }
        }
        // Complete sets can be executed at once, one after the other.
        let mut rest = active;
        let operands = &self.env.program.operands[step.first as usize..];
        let mut done = 0;
        while rest != 0 {
            let lane = rest.trailing_zeros();
            let named = members[lane as usize];
            let set = lanes(rest).filter(|&l| members[l as usize] == named).fold(0, |set, l| set | 1 << l);
            rest &= !set;
            if named & warp.alive & !set != 0 {
                continue;
            }
            match step.op {
                Op::WarpSync => {}
                Op::Shuffle { mode, with_predicate } => self.shuffle(warp, operands, mode, with_predicate, pc, set)?,
                _ => self.vote(warp, step, operands, set),
            }
            done |= set;
        }
        if let Some(races) = &mut self.block.races {
            races.tick(warp.index as usize);
        }
        Ok(done)
    }

    #[inline(always)]
    fn shuffle(
        &mut self,
        warp: &mut Warp,
        operands: &[u32],
        mode: Shuffle,
        with_predicate: bool,
        pc: u32,
        active: u32,
    ) -> Result<(), Box<Fault>> {
        let file = warp.file.as_mut_ptr();
        let skip = 1 + usize::from(with_predicate);
        // SAFETY: destination, (predicate,) value, lane, clamp and mask are registers inside the file; the sources are
        // copied out before anything is written.
        let (value, lane, clamp) = unsafe {
            let read = |i: usize| file.add(operands[i] as usize).cast::<[u32; 32]>().read();
            (read(skip), read(skip + 1), read(skip + 2))
        };
        let mut result = [0u32; 32];
        let mut from = [0u32; 32];
        let mut inside = 0u32;
        let mut source_lanes = 0u32;
        for l in 0..32u32 {
            let (b, c) = (lane[l as usize] & 31, clamp[l as usize]);
            let (bound, segment) = (c & 31, c >> 8 & 31);
            let top = (l & segment) | (bound & !segment);
            let bottom = l & segment;
            let (source, ok) = match mode {
                Shuffle::Up => (l.wrapping_sub(b), l as i32 - b as i32 >= top as i32),
                Shuffle::Down => (l + b, l + b <= top),
                Shuffle::Bfly => (l ^ b, l ^ b <= top),
                Shuffle::Idx => (bottom | (b & !segment), (bottom | (b & !segment)) <= top),
            };
            let source = if ok { source & 31 } else { l };
            from[l as usize] = source;
            inside |= u32::from(ok) << l;
            source_lanes |= (active >> l & 1) << source;
            result[l as usize] = value[source as usize];
        }
        if source_lanes & !active != 0 && self.env.checks.inactive_shuffle {
            let reader = lanes(active).find(|&l| active >> from[l as usize] & 1 == 0).unwrap_or(0);
            let source = from[reader as usize];
            let why = if warp.alive >> source & 1 == 0 { "has exited or does not exist" } else { "does not take part" };
            let detail = format!("reads lane {source}, which {why}");
            return Err(self.fault(FaultKind::InactiveShuffle, warp, pc, reader, detail));
        }
        if !warp.unwritten.is_empty() {
            warp.unwritten.pass(operands[0], operands[skip], &from, active);
        }
        // SAFETY: the destinations are registers inside the file, and no other reference into it is alive.
        unsafe {
            let to = &mut *file.add(operands[0] as usize).cast::<[u32; 32]>();
            for l in 0..32 {
                to[l] = if active >> l & 1 != 0 { result[l] } else { to[l] };
            }
            if with_predicate {
                let to = file.add(operands[1] as usize).cast::<u32>();
                to.write(to.read() & !active | inside & active);
            }
        }
        Ok(())
    }

    /// Votes, matches, reductions.
    #[inline(never)]
    fn vote(&mut self, warp: &mut Warp, step: &Step, operands: &[u32], active: u32) {
        let file = warp.file.as_mut_ptr();
        // SAFETY: the operands are registers inside the file, of the kinds that the decoder gave.
        unsafe {
            let word = |i: usize| file.add(operands[i] as usize).cast::<u32>();
            let set = |to: *mut u32, value: bool| to.write(to.read() & !active | if value { active } else { 0 });
            match step.op {
                Op::Vote { vote, negate } => {
                    let p = word(1).read();
                    let votes = if negate { !p } else { p } & active;
                    match vote {
                        Vote::All => set(word(0), votes == active),
                        Vote::Any => set(word(0), votes != 0),
                        Vote::Uni => set(word(0), votes == 0 || votes == active),
                        Vote::Ballot => lanes(active).for_each(|l| word(0).add(l as usize).write(votes)),
                    }
                }
                Op::Match { all, wide, with_predicate } => {
                    let source = 1 + usize::from(with_predicate);
                    let values: [u64; 32] = if wide {
                        file.add(operands[source] as usize).cast::<[u64; 32]>().read()
                    } else {
                        file.add(operands[source] as usize).cast::<[u32; 32]>().read().map(u64::from)
                    };
                    let equal = |l: u32| {
                        lanes(active)
                            .filter(|&k| values[k as usize] == values[l as usize])
                            .fold(0, |set, k| set | 1 << k)
                    };
                    let whole = equal(active.trailing_zeros() & 31) == active;
                    for l in lanes(active) {
                        let result = match (all, whole) {
                            (false, _) => equal(l),
                            (true, true) => active,
                            (true, false) => 0,
                        };
                        word(0).add(l as usize).write(result);
                    }
                    if with_predicate {
                        set(word(1), whole);
                    }
                }
                Op::Redux(redux) => {
                    let values = file.add(operands[1] as usize).cast::<[u32; 32]>().read();
                    let result = lanes(active)
                        .map(|l| values[l as usize])
                        .reduce(|a, b| match redux {
                            Redux::Add => a.wrapping_add(b),
                            Redux::MinU => a.min(b),
                            Redux::MinS => (a as i32).min(b as i32) as u32,
                            Redux::MaxU => a.max(b),
                            Redux::MaxS => (a as i32).max(b as i32) as u32,
                            Redux::And => a & b,
                            Redux::Or => a | b,
                            Redux::Xor => a ^ b,
                        })
                        .unwrap_or(0);
                    lanes(active).for_each(|l| word(0).add(l as usize).write(result));
                }
                _ => unreachable!("called for votes, matches and reductions only"),
            }
        }
    }

    /// Every operation too rare for the loop itself.
    #[inline(never)]
    fn seldom<const ISA: usize>(
        &mut self,
        warp: &mut Warp,
        op: &Op,
        operands: &[u32],
        pc: u32,
        active: u32,
    ) -> Result<(), Box<Fault>> {
        let file = warp.file.as_mut_ptr();
        match *op {
            Op::Atom { rmw, reduce, ref access } => {
                self.atom::<ISA>(warp, operands, rmw, reduce, access, pc, active)?
            }
            Op::CpAsync { .. } => self.cp_async::<ISA>(warp, operands, op, pc, active)?,
            Op::Mbarrier { mode, ref access } => self.mbarrier::<ISA>(warp, operands, mode, access, pc, active)?,
            Op::CpCommit => lanes(active).for_each(|l| warp.committed[l as usize] += 1),
            Op::CpWait(keep) => self.cp_wait::<ISA>(warp, keep, pc, active)?,
            Op::WmmaLoad { .. } | Op::WmmaStore { .. } => self.wmma_memory::<ISA>(warp, operands, op, pc)?,
            Op::MovMatrix => {
                // SAFETY: both are 32-bit registers inside the file: 128 bytes, an 8 x 8 matrix of 16 bits.
                unsafe {
                    let from = file.add(operands[1] as usize).cast::<[[u16; 8]; 8]>().read();
                    let to: [[u16; 8]; 8] = std::array::from_fn(|row| std::array::from_fn(|col| from[col][row]));
                    file.add(operands[0] as usize).cast::<[[u16; 8]; 8]>().write(to);
                }
            }
            Op::Special { register, bits } => {
                let keep = !0 >> (64 - bits);
                let mut values = [0; 32];
                match register {
                    Special::Tid(axis) => {
                        let threads = &warp.threads[axis as usize & 3];
                        for l in 0..32 {
                            values[l] = threads[l].into();
                        }
                    }
                    _ if register.differs() => {
                        for (l, value) in values.iter_mut().enumerate() {
                            *value = self.special(warp, register, l as u32) & keep;
                        }
                    }
                    _ => values = [self.special(warp, register, active.trailing_zeros() & 31) & keep; 32],
                }
                // SAFETY: the destination is a register of that width inside the file.
                unsafe {
                    let to = file.add(operands[0] as usize);
                    if bits == 64 {
                        blend64(&mut *to.cast(), &values, active);
                    } else {
                        let mut words = [0; 32];
                        for l in 0..32 {
                            words[l] = values[l] as u32;
                        }
                        blend32(&mut *to.cast(), &words, active);
                    }
                }
            }
            Op::ActiveMask => {
                // SAFETY: the destination is a 32-bit register inside the file.
                lanes(active).for_each(|l| unsafe {
                    file.add(operands[0] as usize).cast::<u32>().add(l as usize).write(active)
                });
            }
            Op::IsSpace(space) => {
                // SAFETY: the operands are a predicate and a 64-bit register inside the file.
                unsafe {
                    let addresses = &*file.add(operands[1] as usize).cast::<[u64; 32]>();
                    let inside = lanes(active)
                        .filter(|&l| window(addresses[l as usize]) == space)
                        .fold(0, |set, l| set | 1 << l);
                    let to = file.add(operands[0] as usize).cast::<u32>();
                    to.write(to.read() & !active | inside);
                }
            }
            Op::Fence(device) => {
                if device {
                    // Polling loops fence in every round: only a fence with something to order starts an epoch.
                    self.block.epoch += u32::from(std::mem::take(&mut self.block.unfenced));
                }
                if let Some(races) = &mut self.block.races {
                    races.tick(warp.index as usize);
                }
            }
            Op::Printf => self.printf(warp, operands, pc, active)?,
            Op::AssertFail => return Err(self.assert_fail(warp, operands, pc, active)),
            Op::Trap => {
                return Err(self.fault(
                    FaultKind::Trap,
                    warp,
                    pc,
                    active.trailing_zeros() & 31,
                    "the kernel stopped itself".into(),
                ));
            }
            Op::Nop => {}
            _ => unreachable!("{op:?} is done in the loop"),
        }
        Ok(())
    }

    fn special(&self, warp: &Warp, special: Special, lane: u32) -> u64 {
        let launch = self.env.launch;
        let axis = |values: [u32; 3], axis: u8| u64::from(values[axis as usize]);
        let multiprocessors = u64::from(launch.multiprocessors.max(1));
        let time = || std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_nanos() as u64);
        match special {
            Special::Tid(a) => warp.threads[a as usize & 3][lane as usize].into(),
            Special::Ntid(a) => axis(launch.block, a),
            Special::Ctaid(a) => axis(self.block.id, a),
            Special::Nctaid(a) => axis(launch.grid, a),
            Special::LaneId => lane.into(),
            Special::WarpId => warp.index.into(),
            Special::NWarpId => 64,
            Special::SmId => self.block.linear % multiprocessors,
            Special::NSmId => multiprocessors,
            Special::GridId => 0,
            // Cooperative groups look here for the workspace of a grid's barrier: the halves of its address.
            Special::Environment(1) => self.env.grid_workspace >> 32,
            Special::Environment(2) => self.env.grid_workspace & 0xffff_ffff,
            Special::Environment(_) => 0,
            Special::LaneMaskEq => 1 << lane,
            Special::LaneMaskLt => (1 << lane) - 1,
            Special::LaneMaskLe => (2 << lane) - 1,
            Special::LaneMaskGe => (!0u32 << lane).into(),
            Special::LaneMaskGt => u64::from(!0u32 << lane) & !(1 << lane),
            Special::Clock | Special::Clock64 => self.block.ticks,
            Special::ClockHi => self.block.ticks >> 32,
            Special::GlobalTimer | Special::GlobalTimerLo => time(),
            Special::GlobalTimerHi => time() >> 32,
            Special::DynamicShared => launch.dynamic_shared.into(),
            Special::TotalShared => (self.env.launch.kernel.static_shared + launch.dynamic_shared).into(),
            Special::ReservedShared(0) => (self.env.shared_bytes - self.env.program.reserved_shared).into(),
            Special::ReservedShared(1) => self.env.shared_bytes.into(),
            Special::ReservedShared(_) => RESERVED_SHARED.into(),
        }
    }
}

/// The space of a generic address.
fn window(address: u64) -> Space {
    match address {
        a if a >> 56 == super::SHARED_WINDOW >> 56 => Space::Shared,
        a if a >> 56 == super::LOCAL_WINDOW >> 56 => Space::Local,
        a if a >> 56 == super::PARAM_WINDOW >> 56 => Space::Param,
        _ => Space::Global,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lane_has_its_turn_however_others_meet() {
        let group = |mask| Group { pc: 0, mask, wait: Wait::Nothing };
        // Lanes 0 and 1 are apart when one turn ends and merged when the next does; lanes 2 and 3 stay together.
        let ends = [vec![group(1), group(2), group(12)], vec![group(3), group(12)]];
        let (mut favour, mut turns) = (0, [0; 3]);
        for groups in ends.iter().cycle().take(60) {
            favour = next_favour(groups, favour);
            turns[[3, 12, 0].iter().position(|lanes| lanes & favour != 0).unwrap_or(2)] += 1;
        }
        assert!(turns.iter().all(|&count| count >= 10), "lanes 0 and 1, lanes 2 and 3, the smallest step: {turns:?}");
    }
}
