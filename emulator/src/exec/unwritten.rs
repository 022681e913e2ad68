//! Values loaded from shared memory that nothing has written, tracked until they are used.
//!
//! Pipelines read the stage after the last, merges the key after the last, and tiles at the edge of a matrix have rows
//! that nobody fills; the values are discarded. So the load alone is no fault. The registers it fills are marked, lane
//! by lane, and so is what is computed from them; storing such a value to shared memory makes the location unwritten
//! again. The fault comes when a lane uses the value: as an address or predicate, in a store to other memory, or in a
//! vote.
//!
//! Marks propagate through arithmetic, shuffles and shared memory. Only loads of integers or untyped bits, `ldmatrix`
//! and `wmma.load` from shared memory create them. Floats are loaded to be computed with, and an unfilled edge is then
//! usually a bug that shows up elsewhere as wrong results: such loads fault at once, as do atomics and loads of global
//! memory.

use super::access::addresses;
use super::lanes::lanes;
use super::state::{Machine, Warp};
use super::{Fault, FaultKind};
use crate::num::{Dependence, Form};
use crate::ptx::program::{Access, Barrier, NO_GUARD, Op, Space, Step};

/// Number of destinations of an operation that is neither arithmetic nor a load.
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
    /// A load found unwritten shared memory for a lane: a fault, or a value to mark.
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

    /// Marks the destinations of the load just made.
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

    /// The same for one register of `wmma.load`, which all lanes load; those in `lanes` loaded unwritten memory.
    pub(super) fn note_unwritten_fragment(&mut self, warp: &mut Warp, register: u32, lanes: u32) {
        warp.unwritten.set(register, u32::MAX, lanes);
    }

    /// Runs before a step of a warp with marked values: faults if it uses one, and propagates marks into its
    /// destinations. Arithmetic is left to [`Machine::follow_arithmetic`]. Returns the lanes that store a marked value
    /// to shared memory.
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
            // The passed value is followed in `pass`; lane index, clamp and member mask must not be marked.
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

    /// After the stores found by [`Machine::follow`]: makes their locations unwritten again.
    #[inline(never)]
    pub(super) fn unwrite(&mut self, warp: &mut Warp, operands: &[u32], access: &Access, stored: u32) {
        // SAFETY: a store's first operand is its base, a register inside the file.
        let at = unsafe { addresses(warp.file.as_mut_ptr(), operands[0], access.wide_base, access.offset) };
        let bytes = u32::from(access.bytes) * u32::from(access.elements);
        for l in lanes(stored) {
            let granules = self.env.granules(at[l as usize], bytes);
            self.block.mark_written(granules, self.env.granule, false);
        }
    }

    /// Propagates marks through one arithmetic instruction, before it executes.
    pub(super) fn follow_arithmetic(&self, warp: &mut Warp, form: &'static Form, operands: &[u32], active: u32) {
        let outputs = form.dst.len() + usize::from(form.carry_out);
        let (written, read) = operands.split_at(outputs);
        let file = warp.file.as_mut_ptr();
        let of = |register: u32| warp.unwritten.of(register);
        // SAFETY: called for predicates only, which are registers inside the file.
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
