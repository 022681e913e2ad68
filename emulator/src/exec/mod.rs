//! Runs kernels: blocks over all cores, the 32 lanes of a warp in one step.
//!
//! The modules, each using only those below it:
//!
//! - `schedule`: blocks over worker threads, warps inside a block.
//! - `interp`: the interpreter loop, for one warp.
//! - `mbarrier`, `printf`: instructions and functions with their own state.
//! - `unwritten`: values from unwritten shared memory, tracked until they are used.
//! - `access`: memory instructions.
//! - `checks`: the checks of an access, before it touches memory.
//! - `state`: environment, worker, block, warp.
//! - `shapes`: recurring patterns of shared-memory addresses.
//! - `races`: the race detectors.
//! - `lanes`: the addresses of 32 lanes.
//!
//! Plain PTX accesses are plain loads and stores on the host. A program with a data race therefore gets whatever the
//! host makes of it; out-of-bounds accesses fault in any case.

mod access;
mod checks;
mod interp;
mod lanes;
mod mbarrier;
mod printf;
mod races;
mod schedule;
mod shapes;
mod state;
mod unwritten;

use crate::memory::Memory;
use crate::num::FlopType;
use crate::ptx::program::{FUNCTION_STRIDE, FUNCTION_WINDOW};
use crate::ptx::{Kernel, Module};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use crate::ptx::program::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
pub use schedule::{best_isa, launch, launch_noting};

/// A module whose variables have addresses.
#[derive(Debug)]
pub struct LoadedModule {
    /// The program.
    pub module: Arc<Module>,
    /// Address of each of `module.globals`.
    pub addresses: Vec<u64>,
    /// Address of the first device function; the others follow at [`FUNCTION_STRIDE`]. No other module of the process
    /// has it, so that a function of another module is told from a function of this one.
    pub functions: u64,
}

/// Bytes of [`FUNCTION_WINDOW`] that one module's functions have.
const FUNCTIONS_OF_MODULE: u64 = 1 << 32;

/// A module's share of [`FUNCTION_WINDOW`], which has room for 2^24 modules.
fn fresh_functions() -> u64 {
    static MODULES: AtomicU64 = AtomicU64::new(0);
    let module = MODULES.fetch_add(1, Ordering::Relaxed) & ((1 << 24) - 1);
    FUNCTION_WINDOW + module * FUNCTIONS_OF_MODULE
}

impl LoadedModule {
    /// Allocates and initialises the module's variables; None when memory is too small.
    pub fn load(memory: &Memory, module: Arc<Module>) -> Option<Self> {
        let mut loaded = LoadedModule { module, addresses: vec![], functions: fresh_functions() };
        for global in &loaded.module.globals {
            let Some(address) = memory.alloc(global.bytes.max(1)) else {
                loaded.unload(memory);
                return None;
            };
            loaded.addresses.push(address);
        }
        for (global, &address) in loaded.module.globals.iter().zip(&loaded.addresses) {
            let mut bytes = vec![0; global.bytes as usize];
            bytes[..global.init.len()].copy_from_slice(&global.init);
            for &(offset, target, addend) in &global.relocations {
                let value = loaded.addresses[target].wrapping_add(addend as u64);
                bytes[offset as usize..][..8].copy_from_slice(&value.to_le_bytes());
            }
            for &(offset, function) in &global.functions {
                let value = loaded.functions + u64::from(function) * FUNCTION_STRIDE;
                bytes[offset as usize..][..8].copy_from_slice(&value.to_le_bytes());
            }
            let copied = memory.copy_in(address, &bytes);
            assert!(
                copied.is_ok(),
                "variable {} of {} bytes at {address:#x} was just allocated",
                global.name,
                global.bytes
            );
        }
        Some(loaded)
    }
    /// Frees the variables.
    pub fn unload(&self, memory: &Memory) {
        for &address in &self.addresses {
            // Fails only where the program has freed the module's memory itself, which leaves nothing to do.
            let _ = memory.free(address);
        }
    }
    /// Address and size of a variable.
    pub fn global(&self, name: &str) -> Option<(u64, u64)> {
        let index = self.module.globals.iter().position(|global| global.name == name)?;
        Some((self.addresses[index], self.module.globals[index].bytes))
    }
}

/// One launch. The driver has checked shapes and sizes against the kernel and the device.
pub struct Launch<'a> {
    /// What to run.
    pub kernel: &'a Kernel,
    /// Its module.
    pub module: &'a LoadedModule,
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads per block in x, y, z.
    pub block: [u32; 3],
    /// Bytes of `extern __shared__` memory.
    pub dynamic_shared: u32,
    /// Parameter values laid out by the kernel's offsets, `kernel.param_bytes` long.
    pub params: &'a [u8],
    /// Streaming multiprocessors: %nsmid.
    pub multiprocessors: u32,
    /// All blocks must be able to wait for each other (cuLaunchCooperativeKernel).
    pub cooperative: bool,
}

/// Consecutive sectors of 32 bytes of global memory that a launch read or wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub first: u64,
    /// Behind the last byte.
    pub end: u64,
    /// Written, not read. What is both has a span for each.
    pub write: bool,
    /// Every byte is known to have been accessed; otherwise some of each sector.
    pub whole: bool,
    /// Some of the accesses were atomic, volatile or otherwise made for communication.
    pub strong: bool,
}

/// Which checks are made. Out-of-bounds accesses never reach host memory, whatever is chosen here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checks {
    /// Accesses are inside one allocation (without it: inside the device's memory) and aligned.
    pub bounds: bool,
    /// Reads of global or shared memory that nothing has written.
    pub uninitialised: bool,
    /// Shared-memory races between barriers.
    pub shared_races: bool,
    /// Barriers that not all threads reach.
    pub barrier_divergence: bool,
    /// Shuffles that read an inactive lane.
    pub inactive_shuffle: bool,
    /// Races between blocks on global memory.
    pub global_races: bool,
}

impl Checks {
    /// Every check.
    pub const ALL: Checks = Checks {
        bounds: true,
        uninitialised: true,
        shared_races: true,
        barrier_divergence: true,
        inactive_shuffle: true,
        global_races: true,
    };
    /// No check.
    pub const NONE: Checks = Checks {
        bounds: false,
        uninitialised: false,
        shared_races: false,
        barrier_divergence: false,
        inactive_shuffle: false,
        global_races: false,
    };
    /// Bounds, barriers and shuffles: what costs next to nothing.
    pub const FAST: Checks = Checks {
        bounds: true,
        uninitialised: false,
        shared_races: false,
        barrier_divergence: true,
        inactive_shuffle: true,
        global_races: false,
    };
}

impl Checks {
    fn any_shared(&self) -> bool {
        self.uninitialised || self.shared_races
    }

    fn any_global(&self) -> bool {
        self.uninitialised || self.global_races
    }
}

/// An instruction set for the interpreter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What every x86-64 processor (or any other) has.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, VL, BW, DQ.
    Avx512,
}

/// Where printf output goes.
pub type Output = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// How to run.
#[derive(Clone)]
pub struct Settings {
    /// Checks made.
    pub checks: Checks,
    /// Random order of blocks and warps from this seed; None is in order.
    pub schedule_seed: Option<u64>,
    /// Worker threads; 0 is one per core.
    pub threads: usize,
    /// Forces an instruction set; None takes the best.
    pub isa: Option<Isa>,
    /// Whether to count.
    pub counters: bool,
    /// Where printf goes; None is standard output.
    pub output: Option<Output>,
    /// Faults a launch when a warp has executed this many instructions (CUDA_ERROR_LAUNCH_TIMEOUT), which catches
    /// endless loops; 0 is no limit.
    pub instruction_limit: u64,
    /// Runs only so many blocks of a grid, spread over it, and leaves the rest of its results undone: for counting what
    /// a block does in grids too large to run. 0 is all, as in a cooperative launch, whose blocks wait for each other.
    pub blocks: u64,
    /// What such a sample is drawn from: so many blocks of one kind, then so many of the next. Some of each are run,
    /// and counts are weighted as if it were as many of all. Empty, or of a grid of another number of blocks: all are
    /// alike.
    pub kinds: Vec<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            checks: Checks::ALL,
            schedule_seed: None,
            threads: 0,
            isa: None,
            counters: true,
            output: None,
            instruction_limit: 0,
            blocks: 0,
            kinds: Vec::new(),
        }
    }
}

/// What one launch did. Deterministic where the program is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Warp instructions: mma.
    pub mma: u64,
    /// Warp instructions: fused multiply-add.
    pub fma: u64,
    /// Warp instructions: other arithmetic.
    pub arithmetic: u64,
    /// Warp instructions: special functions.
    pub special: u64,
    /// Warp instructions: global and constant memory, atomics and cp.async.
    pub global: u64,
    /// Warp instructions: shared memory.
    pub shared: u64,
    /// Warp instructions: local memory.
    pub local: u64,
    /// Warp instructions: branches, barriers, shuffles, votes.
    pub control: u64,
    /// Floating-point operations by type.
    pub flops_f16: u64,
    /// See `flops_f16`.
    pub flops_bf16: u64,
    /// See `flops_f16`.
    pub flops_tf32: u64,
    /// See `flops_f16`.
    pub flops_f32: u64,
    /// See `flops_f16`.
    pub flops_f64: u64,
    /// Bytes that lanes asked for in global loads.
    pub global_load_bytes: u64,
    /// Bytes that lanes asked for in global stores.
    pub global_store_bytes: u64,
    /// 32-byte sectors that those accesses touch, warp by warp.
    pub global_sectors: u64,
    /// Distinct bytes of global memory touched, in whole 32-byte sectors.
    pub distinct_bytes: u64,
    /// Those of `distinct_bytes` that are read.
    pub distinct_read_bytes: u64,
    /// Those of `distinct_bytes` that are written.
    pub distinct_written_bytes: u64,
    /// Passes over the banks, of one cycle each, that accesses to shared memory take.
    pub shared_wavefronts: u64,
    /// Passes they would take without bank conflicts.
    pub shared_ideal: u64,
    /// Those of `shared_wavefronts` that loads take, `ldmatrix` included.
    pub shared_load_cycles: u64,
    /// Cycles in which loads could get their distinct bytes, each its own, at 128 bytes a cycle.
    pub shared_load_ideal: u64,
    /// As `shared_load_cycles`, for stores and the arrival of `cp.async`. Atomics are in neither.
    pub shared_store_cycles: u64,
    /// As `shared_load_ideal`, for stores.
    pub shared_store_ideal: u64,
    /// Branches on which a warp's active lanes disagreed.
    pub divergent_branches: u64,
    /// Barriers that warps arrived at.
    pub barriers: u64,
    /// Lanes' atomic operations.
    pub atomics: u64,
    /// Blocks run: those of the grid, or of a sample of it.
    pub blocks: u64,
}

impl Counters {
    fn add_flops(&mut self, ty: FlopType, flops: u64) {
        *match ty {
            FlopType::F16 => &mut self.flops_f16,
            FlopType::Bf16 => &mut self.flops_bf16,
            FlopType::Tf32 => &mut self.flops_tf32,
            FlopType::F32 => &mut self.flops_f32,
            FlopType::F64 => &mut self.flops_f64,
        } += flops;
    }

    /// Adds another launch's counts (those of distinct bytes too: bytes touched by both count twice).
    pub fn add(&mut self, other: &Counters) {
        for (mine, theirs) in self.values_mut().into_iter().zip(other.clone().values_mut()) {
            *mine += *theirs;
        }
    }

    /// Multiplies every count by `by / of`, rounded to nearest.
    fn scale(&mut self, by: u64, of: u64) {
        for value in self.values_mut() {
            *value = ((u128::from(*value) * u128::from(by) + u128::from(of / 2)) / u128::from(of)) as u64;
        }
    }

    fn values_mut(&mut self) -> [&mut u64; 29] {
        let Counters {
            mma,
            fma,
            arithmetic,
            special,
            global,
            shared,
            local,
            control,
            flops_f16,
            flops_bf16,
            flops_tf32,
            flops_f32,
            flops_f64,
            global_load_bytes,
            global_store_bytes,
            global_sectors,
            distinct_bytes,
            distinct_read_bytes,
            distinct_written_bytes,
            shared_wavefronts,
            shared_ideal,
            shared_load_cycles,
            shared_load_ideal,
            shared_store_cycles,
            shared_store_ideal,
            divergent_branches,
            barriers,
            atomics,
            blocks,
        } = self;
        [
            mma,
            fma,
            arithmetic,
            special,
            global,
            shared,
            local,
            control,
            flops_f16,
            flops_bf16,
            flops_tf32,
            flops_f32,
            flops_f64,
            global_load_bytes,
            global_store_bytes,
            global_sectors,
            distinct_bytes,
            distinct_read_bytes,
            distinct_written_bytes,
            shared_wavefronts,
            shared_ideal,
            shared_load_cycles,
            shared_load_ideal,
            shared_store_cycles,
            shared_store_ideal,
            divergent_branches,
            barriers,
            atomics,
            blocks,
        ]
    }
}

/// Why a launch was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Outside every allocation.
    OutOfBounds,
    /// Address not a multiple of the access size.
    Misaligned,
    /// Read of bytes never written.
    Uninitialised,
    /// Shared-memory race.
    SharedRace,
    /// Race between blocks.
    GlobalRace,
    /// Barrier divergence or a barrier nobody completes.
    Barrier,
    /// Shuffle from an inactive lane.
    InactiveShuffle,
    /// assert() failed.
    Assert,
    /// trap.
    Trap,
    /// An instruction with operands that have no meaning.
    Illegal,
    /// A call through an address where no function begins that could be called there.
    Call,
    /// No progress.
    Timeout,
}

/// A fault with everything known about it; Display is the whole sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub kind: FaultKind,
    /// Name of the kernel.
    pub kernel: String,
    /// Block index.
    pub block: [u32; 3],
    /// Thread index in the block.
    pub thread: [u32; 3],
    /// The instruction as in the text.
    pub instruction: String,
    /// Its line in the PTX text.
    pub line: u32,
    /// What happened: address, size, nearest allocation, the other party of a race.
    pub detail: String,
}

impl Fault {
    /// The CUresult that the driver returns for it.
    pub fn code(&self) -> u32 {
        match self.kind {
            FaultKind::OutOfBounds => 700,
            FaultKind::Misaligned => 716,
            FaultKind::Assert => 710,
            FaultKind::Timeout => 702,
            FaultKind::Illegal => 715,
            FaultKind::Call => 718,
            _ => 719,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(
            f,
            "kernel {}, block ({bx},{by},{bz}), thread ({tx},{ty},{tz}), PTX line {}, `{}`: {}",
            self.kernel, self.line, self.instruction, self.detail
        )
    }
}

impl std::error::Error for Fault {}
