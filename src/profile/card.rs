//! The GPUs for which times are modelled, and what their multiprocessors hold.
//!
//! Peaks are what well-made kernels sustain, not what a data sheet promises: each figure says where it is from.

use crate::device::Precision;
use crate::kernels::{self, Kernel};

/// What a multiprocessor holds.
///
/// By the table of compute capabilities in the CUDA programming guide.
#[derive(Clone, Copy, Debug)]
pub struct Multiprocessor {
    /// The compute capability, (major, minor).
    pub capability: (u32, u32),
    /// Bytes of shared memory, of which the driver keeps 1 KiB for each block.
    pub shared: usize,
    /// Warps.
    pub warps: usize,
    /// Blocks.
    pub blocks: usize,
}

impl Multiprocessor {
    /// A100, RTX 30, RTX 40, H100.
    pub const ALL: [Multiprocessor; 4] = [
        Multiprocessor { capability: (8, 0), shared: 164 << 10, warps: 64, blocks: 32 },
        Multiprocessor { capability: (8, 6), shared: 100 << 10, warps: 48, blocks: 16 },
        Multiprocessor { capability: (8, 9), shared: 100 << 10, warps: 48, blocks: 24 },
        Multiprocessor { capability: (9, 0), shared: 228 << 10, warps: 64, blocks: 32 },
    ];

    /// That of a compute capability.
    pub fn of(capability: (u32, u32)) -> Option<&'static Multiprocessor> {
        Multiprocessor::ALL.iter().find(|of| of.capability == capability)
    }

    /// Blocks of `threads` threads that it holds at once, with `registers` registers a thread and `shared` bytes a
    /// block. Registers are handed out 256 at a time to each warp, from the 16,384 of one of four schedulers; shared
    /// memory 128 bytes at a time.
    pub fn resident(&self, threads: usize, registers: usize, shared: usize) -> usize {
        let warps = threads.div_ceil(32);
        let of_scheduler = (16_384 / (32 * registers.max(1)).next_multiple_of(256)).min(self.warps / 4);
        let by_shared = self.shared / (shared.next_multiple_of(128) + 1024);
        (4 * of_scheduler / warps).min(by_shared).min(self.blocks)
    }
}

/// A GPU with its sustained peaks. "A cycle" is one of `clock`.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    /// Its name in the JSON.
    pub key: &'static str,
    /// Its name.
    pub name: &'static str,
    /// The compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Boost clock in Hz.
    pub clock: f64,
    /// FLOP a cycle of a multiprocessor's tensor cores in bf16 with f32 accumulators, by `mma.sync`; tf32 has half.
    pub tensor: f64,
    /// f32 lanes of a multiprocessor: each takes a multiply-add a cycle.
    pub lanes: f64,
    /// f64 lanes.
    pub double_lanes: f64,
    /// Bytes a cycle between the L2 cache and all multiprocessors.
    pub l2: f64,
    /// Bytes a second of the memory.
    pub memory: f64,
}

/// Bytes a cycle between a multiprocessor and the L2 cache (64 on all of them, as its L1 cache is filled).
pub const L2_OF_ONE: f64 = 64.0;

/// Lanes of a multiprocessor for special functions.
pub const SPECIAL_LANES: f64 = 16.0;

/// Instructions that a multiprocessor issues a cycle, one by each scheduler.
pub const ISSUED: f64 = 4.0;

/// Seconds from one kernel to the next in a graph: 1 to 1.5 microseconds are usual.
pub const GAP: f64 = 1.5e-6;

/// H100, A100 and RTX 4090, in the order of the JSON.
///
/// - Multiprocessors, boost clocks, lanes and FLOP a cycle: NVIDIA's whitepapers of the architectures (H100: 4,096 bf16
///   FLOP a cycle and multiprocessor, A100: 2,048, RTX 4090 with f32 accumulators: 512).
/// - Of these, `mma.sync` sustains 0.62 on an H100, whose other half belongs to `wgmma` (Luo et al. 2024, arXiv
///   2402.13499, tensor cores), and large products 0.85 on an A100 and 0.97 on an RTX 4090.
/// - Memory: 3.0 of 3.35 TB/s, measured on an H100 with HBM3; of the others taken 1.75 of 2.04 and 0.93 of 1.01 TB/s.
/// - L2: 5,120 bytes a cycle on A100 and H100, of which 0.7 are taken; about 5 TB/s on an RTX 4090.
pub const CARDS: [Card; 3] = [
    Card {
        key: "h100",
        name: "H100",
        capability: (9, 0),
        multiprocessors: 132,
        clock: 1.83e9,
        tensor: 0.62 * 4096.0,
        lanes: 128.0,
        double_lanes: 64.0,
        l2: 0.7 * 5120.0,
        memory: 3.0e12,
    },
    Card {
        key: "a100",
        name: "A100",
        capability: (8, 0),
        multiprocessors: 108,
        clock: 1.41e9,
        tensor: 0.85 * 2048.0,
        lanes: 64.0,
        double_lanes: 32.0,
        l2: 0.7 * 5120.0,
        memory: 1.75e12,
    },
    Card {
        key: "rtx4090",
        name: "RTX 4090",
        capability: (8, 9),
        multiprocessors: 128,
        clock: 2.52e9,
        tensor: 0.97 * 512.0,
        lanes: 128.0,
        double_lanes: 2.0,
        l2: 2000.0,
        memory: 0.93e12,
    },
];

/// What a launch of a kernel has on a card.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of shared memory of a block, static and dynamic.
    pub shared: usize,
    /// Blocks that a multiprocessor holds.
    pub resident: usize,
    /// Warps that it holds, of the most that it could.
    pub occupancy: f64,
}

impl Card {
    /// FLOP a second of the products of convolutions and linear layers.
    pub fn peak(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 => self.lanes_peak(),
            Precision::Tf32 => self.tensor_peak() / 2.0,
            Precision::Bf16 => self.tensor_peak(),
        }
    }

    /// FLOP a second of its tensor cores in bf16.
    pub fn tensor_peak(&self) -> f64 {
        self.tensor * self.multiprocessors as f64 * self.clock
    }

    /// FLOP a second of its f32 lanes.
    pub fn lanes_peak(&self) -> f64 {
        2.0 * self.lanes * self.multiprocessors as f64 * self.clock
    }

    /// What blocks of `threads` threads of a kernel with `shared` bytes of dynamic shared memory have; `None` if the
    /// build has no machine code for this card.
    pub fn fit(&self, kernel: &Kernel, threads: u32, shared: u32) -> Option<Fit> {
        let of = Multiprocessor::of(self.capability)?;
        let kernels::Resources { registers, shared: fixed, .. } = kernel.resources_on(self.capability)?;
        let shared = (shared + fixed) as usize;
        let resident = of.resident(threads as usize, registers as usize, shared);
        let warps = threads.div_ceil(32) as usize * resident;
        Some(Fit { registers, shared, resident, occupancy: warps as f64 / of.warps as f64 })
    }
}
