//! The decoded program of a kernel: what the interpreter executes.

use crate::num::Form;
use crate::num::matrix::Plan;
use std::sync::Arc;

/// An address space of a memory instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// By address, at run time.
    Generic,
    /// Global memory, and constants.
    Global,
    /// The block's shared memory.
    Shared,
    /// The thread's local memory.
    Local,
    /// The kernel's parameters.
    Param,
}

/// What a load or store moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Where.
    pub space: Space,
    /// Bytes of one element: 1, 2, 4 or 8.
    pub bytes: u8,
    /// Elements: 1, 2 or 4 (8 for 16-bit mma fragments is written as 4 of 4 bytes).
    pub elements: u8,
    /// Whether the base register has 64 bits.
    pub wide_base: bool,
    /// Loads: whether elements are sign-extended to `register_bits`.
    pub signed: bool,
    /// Whether elements are floats by their type.
    pub float: bool,
    /// Bits of the destination or source registers: 16, 32 or 64.
    pub register_bits: u8,
    /// Whether threads may use it to communicate: volatile, relaxed, acquire, release.
    pub strong: bool,
    /// Loads: whether it passes the cache of its multiprocessor by (`.cg`, `.cv`). PTX calls that a hint, but programs wait for other blocks so.
    pub past_l1: bool,
    /// Added to the base.
    pub offset: i64,
}

impl Access {
    /// Whether a load by these lanes may be one by which a program waits for other threads. What goes past the cache may as well be plain data;
    /// those who wait by it are single threads.
    #[inline(always)]
    pub fn polls(&self, lanes: u32) -> bool {
        self.strong || self.past_l1 && lanes.is_power_of_two()
    }
}

/// A read-modify-write operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Rmw {
    AddInt,
    AddF16,
    AddBf16,
    AddF16x2,
    AddBf16x2,
    AddF32,
    AddF64,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// A special register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NWarpId,
    SmId,
    NSmId,
    GridId,
    LaneMaskEq,
    LaneMaskLe,
    LaneMaskLt,
    LaneMaskGe,
    LaneMaskGt,
    Clock,
    ClockHi,
    Clock64,
    GlobalTimer,
    GlobalTimerLo,
    GlobalTimerHi,
    DynamicShared,
    TotalShared,
    /// The part of shared memory that belongs to the system: its beginning, its end, its size.
    ReservedShared(u8),
    Environment(u8),
}

impl Special {
    /// Whether lanes see different values.
    pub fn differs(self) -> bool {
        use Special::*;
        matches!(self, Tid(_) | LaneId | LaneMaskEq | LaneMaskLe | LaneMaskLt | LaneMaskGe | LaneMaskGt)
    }
}

/// How a shuffle picks its source lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Shuffle {
    Up,
    Down,
    Bfly,
    Idx,
}

/// A vote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// What a barrier does besides waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Barrier {
    Sync,
    Arrive,
    Popc,
    And,
    Or,
}

/// What is done with an `mbarrier` object. A base is the object's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mbarrier {
    /// base, arrivals expected in a phase.
    Init,
    /// base.
    Inval,
    /// destination for the state before, base, arrivals; with `drop` they are not expected in later phases, with `stay` they may not
    /// end the phase.
    Arrive {
        /// `arrive_drop`
        drop: bool,
        /// `.noComplete`
        stay: bool,
    },
    /// destination predicate, base, state (or, with `parity`, the parity of a phase): whether that phase has ended.
    TestWait {
        /// `.parity`
        parity: bool,
    },
    /// destination, state; no base.
    PendingCount,
    /// base: arrives when the thread's copies have; with `counted`, the arrival is one of those expected.
    CopyArrive {
        /// `.noinc`
        counted: bool,
    },
}

/// A reduction over lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Redux {
    Add,
    MinU,
    MinS,
    MaxU,
    MaxS,
    And,
    Or,
    Xor,
}

/// What a step does. Its registers stand in [`Program::operands`]: destinations, then sources, in the order of the text.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Arithmetic instructions of one form, as many as [`Step::count`].
    Run(&'static Form),
    /// The same for forms of a whole warp: all lanes must take part. The number is the plan's in [`Program::plans`].
    Mma(&'static Form, u32),
    /// destinations (one per element), base.
    Load(Access),
    /// base, values.
    Store(Access),
    /// destination unless `reduce`, base, operand, second operand for Cas.
    Atom {
        /// Operation.
        rmw: Rmw,
        /// Whether the old value is not wanted.
        reduce: bool,
        /// Where; `elements` is 1.
        access: Access,
    },
    /// shared base, global base, then for 3 operands the number of bytes read (the rest are zeros).
    CpAsync {
        /// 4, 8 or 16.
        bytes: u8,
        /// Offset of the destination.
        to: i64,
        /// Offset of the source.
        from: i64,
        /// Whether the destination's base has 64 bits.
        wide_to: bool,
        /// Whether the third operand is a predicate that says to ignore the source.
        ignore: bool,
    },
    /// An object in shared memory at which threads arrive and for whose phases they look: see [`Mbarrier`] for the operands.
    Mbarrier {
        /// What is done with it.
        mode: Mbarrier,
        /// Where; 8 bytes.
        access: Access,
    },
    /// No operands.
    CpCommit,
    /// All groups but the last `n`; u32::MAX waits for what is not committed too.
    CpWait(u32),
    /// 1, 2 or 4 destinations, base.
    LdMatrix {
        /// Transposed.
        trans: bool,
        /// `bytes` is 16, space is shared or generic.
        access: Access,
    },
    /// destination, source.
    MovMatrix,
    /// destinations, base, and the stride in elements.
    WmmaLoad {
        /// Where element (row, column) is held.
        fragment: &'static crate::num::Fragment,
        /// Whether memory is column-major.
        column: bool,
        /// Where.
        access: Access,
    },
    /// base, values, and the stride in elements.
    WmmaStore {
        /// Where element (row, column) is held.
        fragment: &'static crate::num::Fragment,
        /// Whether memory is column-major.
        column: bool,
        /// Where.
        access: Access,
    },
    /// Conditional on the guard: lanes with it go to `target`, the others to `fall`.
    Branch {
        /// Step of the target.
        target: u32,
        /// Step of the next block.
        fall: u32,
    },
    /// Unconditional. Also ends blocks that run into the next.
    Jump(u32),
    /// index register; the targets are `tables[..]`, the next step's lanes are those not guarded.
    BranchTable {
        /// Which table.
        table: u32,
        /// Step of the next block, for lanes that the guard excludes.
        fall: u32,
    },
    /// Lanes end here; `fall` for lanes that the guard excludes.
    Exit {
        /// Step of the next block.
        fall: u32,
    },
    /// destination.
    Special {
        /// Which.
        register: Special,
        /// Bits of the destination: 16, 32 or 64.
        bits: u8,
    },
    /// destination, optionally predicate destination; source, lane or delta, clamp, member mask.
    Shuffle {
        /// Mode.
        mode: Shuffle,
        /// Whether the second destination is there.
        with_predicate: bool,
    },
    /// destination, predicate source, member mask.
    Vote {
        /// Mode.
        vote: Vote,
        /// Whether the source is negated.
        negate: bool,
    },
    /// destination, optionally predicate destination; source, member mask.
    Match {
        /// match.all.
        all: bool,
        /// The value has 64 bits.
        wide: bool,
        /// Whether the second destination is there.
        with_predicate: bool,
    },
    /// destination, source, member mask.
    Redux(Redux),
    /// destination.
    ActiveMask,
    /// destination predicate, source.
    IsSpace(Space),
    /// (destination,) barrier, thread count or the constant 0 for all, (predicate).
    Barrier {
        /// Mode.
        mode: Barrier,
        /// Whether all lanes of the warp must come together.
        aligned: bool,
        /// Whether a thread count was given.
        counted: bool,
        /// Whether the predicate is negated.
        negate: bool,
    },
    /// member mask.
    WarpSync,
    /// A fence; true: at least device scope.
    Fence(bool),
    /// destination, format, arguments.
    Printf,
    /// message, file, line, function.
    AssertFail,
    /// Stops the launch.
    Trap,
    /// Nothing to do: prefetch, nanosleep, pragma.
    Nop,
}

/// One step.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What.
    pub op: Op,
    /// Offset of the guard predicate, or [`NO_GUARD`].
    pub guard: u32,
    /// Whether the guard is `@!`.
    pub negate: bool,
    /// How many operands there are (of one instruction of a run).
    pub arity: u8,
    /// First of [`Program::operands`].
    pub first: u32,
    /// Instructions in a run, 1 for the rest.
    pub count: u32,
    /// Index of the first instruction in [`Program::sources`]; a run's follow it.
    pub source: u32,
    /// Basic block.
    pub block: u32,
}

/// See [`Step::guard`].
pub const NO_GUARD: u32 = u32::MAX;

/// Where an instruction stands in the text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Source {
    /// Line, from 1.
    pub line: u32,
    /// First byte.
    pub start: u32,
    /// Length.
    pub length: u32,
}

/// A value that the register file holds before the first step, in every lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Constant {
    /// A predicate.
    Pred(bool),
    /// 32 bits.
    B32(u32),
    /// 64 bits.
    B64(u64),
    /// Address of a module variable plus an addend.
    Global(u32, i64),
    /// Offset in shared memory: variable, addend; the bool is whether the register has 64 bits.
    Shared(u32, i64, bool),
    /// Offset in local memory.
    Local(u64, bool),
    /// Offset in the kernel's parameters.
    Param(u64, bool),
}

/// What a basic block adds to the counters each time a warp runs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCost {
    /// Warp instructions: mma, fma, arithmetic, special, control.
    pub class: [u32; 5],
    /// Floating-point operations per active lane: f16, bf16, tf32, f32, f64.
    pub flops: [u32; 5],
    /// Floating-point operations per warp: f16, bf16, tf32, f32, f64.
    pub warp_flops: [u32; 5],
    /// Instructions in all.
    pub instructions: u32,
}

/// See [`Program::reserved_shared`]: what a device of capability 8.0 has. Cooperative groups compiled without optimisation ask for it.
pub const RESERVED_SHARED: u32 = 1024;

/// A kernel's code.
#[derive(Debug, Default)]
pub struct Program {
    /// Steps; the first is the entry.
    pub steps: Vec<Step>,
    /// Register offsets.
    pub operands: Vec<u32>,
    /// How runs of matrix products are computed.
    pub plans: Vec<Plan>,
    /// Branch targets of `brx.idx`, as steps.
    pub tables: Vec<Vec<u32>>,
    /// Constants and where they stand.
    pub constants: Vec<(u32, Constant)>,
    /// Offset in shared memory of each variable a [`Constant::Shared`] names.
    pub shared: Vec<u32>,
    /// Size of a warp's register file.
    pub file_bytes: u32,
    /// Costs of basic blocks.
    pub costs: Vec<BlockCost>,
    /// One per instruction.
    pub sources: Vec<Source>,
    /// Whether blocks may order their accesses with fences.
    pub fences: bool,
    /// Whether there are atomic operations on shared memory.
    pub atomics: bool,
    /// Whether there are asynchronous copies.
    pub copies: bool,
    /// Bytes of shared memory that belong to the system, behind the block's; 0 in programs that do not ask where they are.
    pub reserved_shared: u32,
    /// Bytes of the smallest access to shared memory: a power of two, at most 16.
    pub smallest_shared: u32,
    /// The module's text.
    pub text: Arc<str>,
}

impl Program {
    /// Whether control can come from one step to another.
    pub fn reaches(&self, from: u32, to: u32) -> bool {
        let mut seen = vec![false; self.steps.len()];
        let mut work = vec![from];
        while let Some(at) = work.pop() {
            if at == to {
                return true;
            }
            if std::mem::replace(&mut seen[at as usize], true) {
                continue;
            }
            let step = &self.steps[at as usize];
            match step.op {
                Op::Jump(target) => work.push(target),
                Op::Branch { target, fall } => work.extend([target, fall]),
                Op::BranchTable { table, fall } => {
                    work.extend(&self.tables[table as usize]);
                    work.push(fall);
                }
                Op::Exit { fall } if step.guard != NO_GUARD => work.push(fall),
                Op::Exit { .. } => {}
                _ => work.push(at + 1),
            }
        }
        false
    }
}
