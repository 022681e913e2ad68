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

/// Generic addresses of shared memory begin here; the low 32 bits are the offset.
pub const SHARED_WINDOW: u64 = 1 << 56;
/// Generic addresses of local memory begin here.
pub const LOCAL_WINDOW: u64 = 2 << 56;
/// Generic addresses of kernel parameters begin here.
pub const PARAM_WINDOW: u64 = 3 << 56;
/// Addresses of functions begin here. No memory is there, so that reading code is out of bounds.
pub const FUNCTION_WINDOW: u64 = 4 << 56;
/// From the address of a module's function to that of the next.
pub const FUNCTION_STRIDE: u64 = 16;

/// What a load or store moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Where.
    pub space: Space,
    /// Bytes of one element: 1, 2, 4 or 8.
    pub bytes: u8,
    /// Elements: 1, 2 or 4.
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
    /// Loads: it bypasses the L1 cache (`.cg`, `.cv`). A hint only, says PTX, but programs poll other blocks with it.
    pub past_l1: bool,
    /// Added to the base.
    pub offset: i64,
}

impl Access {
    /// Whether a load by these lanes may be one by which a program waits for other threads. A load past the cache may
    /// as well be of plain data; code that polls with it does so from a single thread.
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

/// An operation on an `mbarrier` object. A base is the object's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mbarrier {
    /// base, arrivals expected in a phase.
    Init,
    /// base.
    Inval,
    /// destination for the previous state, base, arrivals. With `drop` they are not expected in later phases either;
    /// with `stay` they may not complete the phase.
    Arrive {
        /// `arrive_drop`
        drop: bool,
        /// `.noComplete`
        stay: bool,
    },
    /// destination predicate, base, state (with `parity`: the parity of a phase): whether that phase is complete.
    TestWait {
        /// `.parity`
        parity: bool,
    },
    /// destination, state; no base.
    PendingCount,
    /// base: arrives when the thread's copies have. With `counted` the arrival is one of those expected.
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

/// What a step does. Its registers are in `Program::operands`: destinations, then sources, in the order of the text.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// [`Step::count`] arithmetic instructions of one form.
    Run(&'static Form),
    /// As `Run`, for forms that all lanes of a warp must execute together. The number is an index into
    /// `Program::plans`.
    Mma(&'static Form, u32),
    /// destinations (one per element), base.
    Load(Access),
    /// base, values.
    Store(Access),
    /// destination unless `reduce`, base, operand, second operand for Cas.
    Atom {
        /// Operation.
        rmw: Rmw,
        /// The old value is not wanted.
        reduce: bool,
        /// Where; `elements` is 1.
        access: Access,
    },
    /// shared base, global base, and perhaps the number of bytes read (the rest are zeros).
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
    /// An `mbarrier` instruction; see [`Mbarrier`] for the operands.
    Mbarrier {
        /// What is done with it.
        mode: Mbarrier,
        /// Where; 8 bytes.
        access: Access,
    },
    /// No operands.
    CpCommit,
    /// All groups but the last `n`; u32::MAX includes what is not committed.
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
    /// Conditional on the guard: lanes that pass go to `target`, the others to `fall`.
    Branch {
        /// Step of the target.
        target: u32,
        /// Step of the next block.
        fall: u32,
    },
    /// Unconditional. Also ends a block that falls through.
    Jump(u32),
    /// index register; lanes that the guard excludes go to `fall`.
    BranchTable {
        /// Which table.
        table: u32,
        /// Step of the next block, for lanes that the guard excludes.
        fall: u32,
    },
    /// address of a function, 64 bits: a call through it. Each lane goes to that function's code for this call, an
    /// index into `Program::calls`. Never guarded.
    CallTable(u32),
    /// Lanes exit; those that the guard excludes go to `fall`.
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
    /// Number of operands (of one instruction of a run).
    pub arity: u8,
    /// First operand in `Program::operands`.
    pub first: u32,
    /// Instructions in a run; 1 for other steps.
    pub count: u32,
    /// Index of the first instruction in `Program::sources`; a run's follow it.
    pub source: u32,
    /// Basic block.
    pub block: u32,
}

/// See [`Step::guard`].
pub const NO_GUARD: u32 = u32::MAX;

/// Where an instruction is in the text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Source {
    /// Line, from 1.
    pub line: u32,
    /// First byte.
    pub start: u32,
    /// Length.
    pub length: u32,
}

/// A value that the register file holds from the start, in every lane.
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
    /// Address of a device function.
    Function(u32),
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

/// See `Program::reserved_shared`: the size on compute capability 8.0. Cooperative groups ask for it if compiled
/// without optimisation.
pub const RESERVED_SHARED: u32 = 1024;

/// Sizes in bytes of what a function returns and takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signature {
    /// Of the return parameters.
    pub returns: Vec<u32>,
    /// Of the parameters.
    pub takes: Vec<u32>,
}

impl std::fmt::Display for Signature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |bytes: &[u32]| match bytes {
            [] => "nothing".to_string(),
            bytes => {
                let sizes: Vec<String> = bytes.iter().map(u32::to_string).collect();
                format!("{} bytes", sizes.join(" + "))
            }
        };
        write!(f, "takes {} and returns {}", list(&self.takes), list(&self.returns))
    }
}

/// A device function as a call through its address sees it.
#[derive(Clone, Debug)]
pub struct Callee {
    /// Its name in the text.
    pub name: String,
    /// What it returns and takes.
    pub signature: Signature,
}

/// A call through a function's address.
#[derive(Clone, Debug)]
pub struct CallSite {
    /// What the call passes and takes back.
    pub signature: Signature,
    /// Only the functions of a `.calltargets` list may be called.
    pub listed: bool,
    /// The functions that may be called, in ascending order, each with the step of its code in line, or why it has
    /// none.
    pub targets: Vec<(u32, Result<u32, String>)>,
}

/// A kernel's code. The interpreter trusts it without checks: only [`crate::ptx`] can make or change one.
#[derive(Debug, Default)]
pub struct Program {
    /// Steps; the first is the entry.
    pub(crate) steps: Vec<Step>,
    /// Register offsets.
    pub(crate) operands: Vec<u32>,
    /// How runs of matrix products are executed.
    pub(crate) plans: Vec<Plan>,
    /// Branch targets of `brx.idx`, as steps.
    pub(crate) tables: Vec<Vec<u32>>,
    /// Calls through functions' addresses.
    pub(crate) calls: Vec<CallSite>,
    /// The module's device functions.
    pub(crate) functions: Arc<[Callee]>,
    /// Constants and their offsets in the register file.
    pub(crate) constants: Vec<(u32, Constant)>,
    /// Offset in shared memory of each variable that a [`Constant::Shared`] names.
    pub(crate) shared: Vec<u32>,
    /// Size of a warp's register file.
    pub(crate) file_bytes: u32,
    /// Costs of basic blocks.
    pub(crate) costs: Vec<BlockCost>,
    /// One per instruction.
    pub(crate) sources: Vec<Source>,
    /// Blocks may order their accesses with fences.
    pub(crate) fences: bool,
    /// There are atomics on shared memory.
    pub(crate) atomics: bool,
    /// There are asynchronous copies.
    pub(crate) copies: bool,
    /// Bytes of shared memory that belong to the system, after the block's; 0 in programs that do not ask for them.
    pub(crate) reserved_shared: u32,
    /// Bytes of the smallest access to shared memory: a power of two, at most 16.
    pub(crate) smallest_shared: u32,
    /// The module's text.
    pub(crate) text: Arc<str>,
}

impl Program {
    /// Whether control can come from one step to another.
    pub(crate) fn reaches(&self, from: u32, to: u32) -> bool {
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
                Op::CallTable(call) => {
                    work.extend(self.calls[call as usize].targets.iter().filter_map(|(_, step)| step.as_ref().ok()));
                }
                Op::Exit { fall } if step.guard != NO_GUARD => work.push(fall),
                Op::Exit { .. } => {}
                _ => work.push(at + 1),
            }
        }
        false
    }
}
