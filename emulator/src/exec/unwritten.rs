//! Values read from shared memory that nothing has written, until they are used.
//!
//! Pipelines read the stage after the last one, merges the key behind the last one, and tiles at a matrix's edge have rows that nobody
//! fills: what comes of such reads is thrown away. So the read alone is no fault. The registers that it fills are remembered lane by lane,
//! and so is what is computed from them; a store to shared memory makes the place unwritten again. The read is refused once a lane uses
//! such a value: as an address or a predicate, stored to other memory, or voted on.
//!
//! They are followed through arithmetic, through shuffles from lane to lane, and into shared memory. But only loads of integers and bits, `ldmatrix`
//! and `wmma.load` from shared memory begin it. Floats are read to be computed with, and an edge of a tile that nobody has filled is mostly a mistake
//! that shows elsewhere as wrong results: they are refused at once, as are atomics and whatever reads global memory.

use super::access::addresses;
use super::state::{Machine, Warp, lanes};
use super::{Fault, FaultKind};
use crate::num::{Dependence, Form};
use crate::ptx::program::{Access, Barrier, NO_GUARD, Op, Space, Step};
use std::collections::HashMap;

/// What a warp holds of such values.
#[derive(Default)]
pub struct Unwritten {
    /// Lanes whose value in a register (by its offset in the file) depends on one.
    registers: HashMap<u32, u32>,
    /// The fault that the first such read is.
    read: Option<Box<Fault>>,
}

impl Unwritten {
    /// Whether there is none.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.registers.is_empty()
    }

    /// A shuffle gives each lane of `active` the value of another.
    pub fn pass(&mut self, to: u32, value: u32, from: &[u32; 32], active: u32) {
        let of = self.of(value);
        let passed = lanes(active).filter(|&l| of >> from[l as usize] & 1 != 0).fold(0, |all, l| all | 1 << l);
        self.set(to, active, passed);
    }

    /// Forgets all, for the next block.
    pub fn clear(&mut self) {
        self.registers.clear();
        self.read = None;
    }

    fn of(&self, register: u32) -> u32 {
        self.registers.get(&register).copied().unwrap_or(0)
    }

    /// Lanes of `active` of a register get values of which those of `lanes` depend on one.
    fn set(&mut self, register: u32, active: u32, lanes: u32) {
        let all = self.of(register) & !active | lanes & active;
        match all {
            0 => self.registers.remove(&register),
            _ => self.registers.insert(register, all),
        };
    }
}

/// Destinations of an operation that is neither arithmetic nor a load.
fn outputs(op: &Op) -> usize {
    match *op {
        Op::Atom { reduce, .. } => usize::from(!reduce),
        Op::Shuffle { with_predicate, .. } | Op::Match { with_predicate, .. } => 1 + usize::from(with_predicate),
        Op::WmmaLoad { fragment, .. } => fragment.registers as usize,
        Op::Barrier { mode, .. } => usize::from(!matches!(mode, Barrier::Sync | Barrier::Arrive)),
        Op::MovMatrix | Op::Special { .. } | Op::Vote { .. } | Op::Redux(_) | Op::ActiveMask | Op::IsSpace(_) => 1,
        Op::Printf => 1,
        _ => 0,
    }
}

impl Machine<'_> {
    /// A load of shared memory has found nothing written for a lane: a fault, or a value to follow.
    pub(super) fn read_unwritten(
        &mut self,
        warp: &mut Warp,
        pc: u32,
        lane: u32,
        detail: String,
    ) -> Result<(), Box<Fault>> {
        let fault = self.fault(FaultKind::Uninitialised, warp, pc, lane, detail);
        match self.env.program.steps[pc as usize].op {
            Op::LdMatrix { .. } | Op::WmmaLoad { .. } => {}
            Op::Load(access) if !access.float => {}
            _ => return Err(fault),
        }
        warp.unwritten.read.get_or_insert(fault);
        self.unwritten |= 1 << lane;
        Ok(())
    }

    /// Notes what the load just made has left in its registers.
    #[inline(never)]
    pub(super) fn note_unwritten(&mut self, warp: &mut Warp, step: &Step, operands: &[u32]) {
        let read = std::mem::take(&mut self.unwritten);
        match step.op {
            Op::Load(access) => {
                for &register in &operands[..access.elements as usize] {
                    warp.unwritten.set(register, read, read);
                }
            }
            Op::LdMatrix { trans, access } => {
                for (matrix, &register) in operands[..access.elements as usize].iter().enumerate() {
                    let rows = read >> (8 * matrix) & 0xff;
                    let held = lanes(u32::MAX).filter(|l| match trans {
                        false => rows >> (l / 4) & 1 != 0,
                        true => rows >> (2 * (l % 4)) & 3 != 0,
                    });
                    warp.unwritten.set(register, u32::MAX, held.fold(0, |all, l| all | 1 << l));
                }
            }
            _ => {}
        }
    }

    /// The same for one register of `wmma.load`: all lanes read it, those in `lanes` what nothing has written.
    pub(super) fn note_unwritten_fragment(&mut self, warp: &mut Warp, register: u32, lanes: u32) {
        warp.unwritten.set(register, u32::MAX, lanes);
    }

    /// Before a step of a warp that holds such values: refuses their use, and follows them into the step's destinations. Arithmetic is followed
    /// by [`Machine::follow_arithmetic`]. Gives the lanes that store one to shared memory.
    #[inline(never)]
    pub(super) fn follow(
        &mut self,
        warp: &mut Warp,
        step: &Step,
        operands: &[u32],
        pc: u32,
        mask: u32,
        active: u32,
    ) -> Result<u32, Box<Fault>> {
        if step.guard != NO_GUARD {
            self.refuse_use(warp, step.guard, mask, pc)?;
        }
        let (outputs, stored) = match step.op {
            Op::Run(_) | Op::Mma(..) => return Ok(0),
            Op::Load(access) | Op::LdMatrix { access, .. } => (access.elements as usize, 0),
            Op::Store(access) if access.space == Space::Shared => (0, access.elements as usize),
            _ => (outputs(&step.op), 0),
        };
        let operands = &operands[..step.arity as usize];
        if matches!(step.op, Op::Shuffle { .. }) {
            // What it passes on is followed where it is passed on; whether it does depends on nothing unwritten.
            if outputs > 1 {
                warp.unwritten.set(operands[1], active, 0);
            }
            for &register in &operands[outputs + 1..] {
                self.refuse_use(warp, register, active, pc)?;
            }
            return Ok(0);
        }
        for &register in &operands[outputs.min(operands.len())..operands.len() - stored] {
            self.refuse_use(warp, register, active, pc)?;
        }
        for &register in &operands[..outputs.min(operands.len())] {
            warp.unwritten.set(register, active, 0);
        }
        let stored = &operands[operands.len() - stored..];
        Ok(stored.iter().fold(0, |all, &register| all | warp.unwritten.of(register)) & active)
    }

    fn refuse_use(&self, warp: &mut Warp, register: u32, active: u32, pc: u32) -> Result<(), Box<Fault>> {
        if warp.unwritten.of(register) & active == 0 {
            return Ok(());
        }
        let program = self.env.program;
        let line = program.sources[program.steps[pc as usize].source as usize].line;
        let mut fault = warp.unwritten.read.take().expect("values are followed from a first read");
        fault.detail += &format!(", and what comes of it is used on PTX line {line}");
        Err(fault)
    }

    /// The stores of [`Machine::follow`] have been made: their places are unwritten again.
    #[inline(never)]
    pub(super) fn unwrite(&mut self, warp: &mut Warp, operands: &[u32], access: &Access, stored: u32) {
        // SAFETY: the decoder gives the base, a register inside the file.
        let at = unsafe { addresses(warp.file.as_mut_ptr(), operands[0], access.wide_base, access.offset) };
        let bytes = u32::from(access.bytes) * u32::from(access.elements);
        for l in lanes(stored) {
            self.block.shared_written[self.env.granules(at[l as usize], bytes)].fill(0);
        }
    }

    /// One arithmetic instruction, before it is executed.
    pub(super) fn follow_arithmetic(&self, warp: &mut Warp, form: &'static Form, operands: &[u32], active: u32) {
        let outputs = form.dst.len() + usize::from(form.carry_out);
        let (written, read) = operands.split_at(outputs);
        let file = warp.file.as_mut_ptr();
        let of = |register: u32| warp.unwritten.of(register);
        // SAFETY: called for predicates, which are inside the file.
        let predicate = |register: u32| unsafe { file.add(register as usize).cast::<u32>().read() };
        let lanes = match (form.dependence(), read) {
            (Dependence::Matrix, _) => {
                for (operand, lanes) in form.spread(|operand| of(operands[operand])) {
                    warp.unwritten.set(operands[operand], active, lanes);
                }
                return;
            }
            (Dependence::Select, &[a, b, by]) => of(by) | of(a) & predicate(by) | of(b) & !predicate(by),
            (Dependence::And, &[a, b]) => (of(a) | of(b)) & !(!of(a) & !predicate(a)) & !(!of(b) & !predicate(b)),
            (Dependence::Or, &[a, b]) => (of(a) | of(b)) & !(!of(a) & predicate(a)) & !(!of(b) & predicate(b)),
            (Dependence::AndLast, &[a, b, last]) => (of(a) | of(b) | of(last)) & !(!of(last) & !predicate(last)),
            (Dependence::OrLast, &[a, b, last]) => (of(a) | of(b) | of(last)) & !(!of(last) & predicate(last)),
            (_, read) => read.iter().fold(0, |all, &register| all | of(register)),
        };
        for &register in written {
            warp.unwritten.set(register, active, lanes);
        }
    }
}
