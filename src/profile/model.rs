//! How long a launch takes by its counts: the time of the busiest unit, and a gap.
//!
//! `t = gap + max over units`. A multiprocessor's units (tensor cores, f32 and f64 lanes, special functions, issue,
//! shared memory, its port to the L2 cache) work for the blocks that the busiest multiprocessor gets, `ceil(B / M)` of
//! B blocks on M multiprocessors: this is the quantisation into waves. The L2 cache and the memory work for all.
//!
//! Deliberately absent: latency, as of a kernel with too few warps to hide it, and what one launch leaves in the L2
//! cache for the next.

use std::fmt;

use super::card::{Card, GAP, ISSUED, L2_OF_ONE, SPECIAL_LANES};

/// What a launch asks for, all its blocks together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Blocks.
    pub blocks: f64,
    /// FLOP on tensor cores in 16-bit types.
    pub tensor_flops: f64,
    /// FLOP on tensor cores in tf32.
    pub tf32_flops: f64,
    /// Warp instructions: multiply-adds outside the tensor cores.
    pub fma: f64,
    /// FLOP in f64.
    pub double_flops: f64,
    /// Warp instructions: special functions.
    pub special: f64,
    /// Warp instructions in all.
    pub instructions: f64,
    /// Cycles of the banks of shared memory.
    pub shared_cycles: f64,
    /// Bytes between the multiprocessors and the L2 cache, in sectors.
    pub moved: f64,
    /// Bytes between the L2 cache and the memory.
    pub touched: f64,
}

/// What a launch can be bound by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unit {
    /// Tensor cores.
    Tensor,
    /// f32 lanes.
    Lanes,
    /// f64 lanes.
    Double,
    /// Special functions.
    Special,
    /// Issue of instructions.
    Issue,
    /// Banks of shared memory.
    Shared,
    /// The L2 cache.
    L2,
    /// Memory.
    Memory,
    /// The gap before the launch, which is longer than all work.
    Gap,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::Tensor => "tensor",
            Unit::Lanes => "f32",
            Unit::Double => "f64",
            Unit::Special => "special",
            Unit::Issue => "issue",
            Unit::Shared => "shared",
            Unit::L2 => "L2",
            Unit::Memory => "memory",
            Unit::Gap => "launch",
        })
    }
}

/// Seconds that a launch takes on `card`, and what it is bound by.
pub fn time(card: &Card, work: &Work) -> (f64, Unit) {
    let count = card.multiprocessors as f64;
    // The share of the work that the busiest multiprocessor does.
    let share = if work.blocks > 0.0 { (work.blocks / count).ceil() / work.blocks } else { 0.0 };
    let cycles = |of_all: f64, a_cycle: f64| share * of_all / a_cycle / card.clock;
    let tensor = work.tensor_flops + 2.0 * work.tf32_flops;
    let units = [
        (cycles(tensor, card.tensor), Unit::Tensor),
        (cycles(32.0 * work.fma, card.lanes), Unit::Lanes),
        (cycles(work.double_flops, card.double_lanes), Unit::Double),
        (cycles(32.0 * work.special, SPECIAL_LANES), Unit::Special),
        (cycles(work.instructions, ISSUED), Unit::Issue),
        (cycles(work.shared_cycles, 1.0), Unit::Shared),
        (cycles(work.moved, L2_OF_ONE).max(work.moved / card.l2 / card.clock), Unit::L2),
        (work.touched / card.memory, Unit::Memory),
    ];
    let (busy, unit) = units.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are units");
    (GAP + busy, if busy < GAP { Unit::Gap } else { unit })
}

#[cfg(test)]
mod tests {
    use super::super::card::CARDS;
    use super::*;
    use crate::device::Precision;

    /// Each unit alone, by hand: on the H100 in one wave of 132 blocks.
    #[test]
    fn each_unit_takes_what_it_should() {
        let [h100, a100, rtx4090] = &CARDS;
        let blocks = Work { blocks: 132.0, ..Work::default() };
        let second = 1.83e9 * 132.0;
        let cases = [
            (Work { tensor_flops: 0.62 * 4096.0 * second, ..blocks }, Unit::Tensor),
            (Work { tf32_flops: 0.62 * 2048.0 * second, ..blocks }, Unit::Tensor),
            (Work { fma: 4.0 * second, ..blocks }, Unit::Lanes),
            (Work { double_flops: 64.0 * second, ..blocks }, Unit::Double),
            (Work { special: 0.5 * second, ..blocks }, Unit::Special),
            (Work { instructions: 4.0 * second, ..blocks }, Unit::Issue),
            (Work { shared_cycles: second, ..blocks }, Unit::Shared),
            (Work { moved: 0.7 * 5120.0 * 1.83e9, ..blocks }, Unit::L2),
            (Work { touched: 3e12, ..blocks }, Unit::Memory),
        ];
        for (work, unit) in cases {
            let (seconds, bound) = time(h100, &work);
            assert!(bound == unit && (seconds - 1.0 - GAP).abs() < 1e-9, "{unit:?}: {seconds} s by {bound:?}");
        }
        // Where they differ: half the lanes and, without tensor cores' `wgmma`, the A100's peak of 265 TFLOP/s.
        let fma = Work { blocks: 108.0, fma: 2.0 * 1.41e9 * 108.0, ..Work::default() };
        assert!((time(a100, &fma).0 - 1.0 - GAP).abs() < 1e-9);
        for (card, tflops, in_tf32) in [(h100, 613.0, 306.7), (a100, 265.0, 132.5), (rtx4090, 160.0, 80.0)] {
            assert!((card.tensor_peak() / 1e12 - tflops).abs() < 1.0, "{}: {}", card.name, card.tensor_peak());
            let peak = card.peak(Precision::Tf32);
            assert!((peak / 1e12 - in_tf32).abs() < 0.5, "{}: {peak} in tf32", card.name);
        }
        assert_eq!(time(h100, &Work::default()), (GAP, Unit::Gap));
    }

    /// One block more than there are multiprocessors takes twice as long, but not of the memory's time.
    #[test]
    fn the_last_wave_takes_as_long_as_a_full_one() {
        let card = &CARDS[0];
        let of = |blocks: f64| {
            let work = Work { blocks, shared_cycles: 1e6 * blocks, ..Work::default() };
            time(card, &work).0 - GAP
        };
        let one = 1e6 / 1.83e9;
        for (blocks, waves) in [(1.0, 1.0), (132.0, 1.0), (133.0, 2.0), (264.0, 2.0), (265.0, 3.0)] {
            assert!((of(blocks) / one - waves).abs() < 1e-9, "{blocks} blocks: {} waves", of(blocks) / one);
        }
        let memory = |blocks: f64| time(card, &Work { blocks, touched: 3e9, ..Work::default() });
        assert_eq!(memory(133.0), memory(132.0));
        assert_eq!(memory(133.0), (GAP + 1e-3, Unit::Memory));
        // One block alone has but its multiprocessor's port to the L2 cache.
        let (seconds, unit) = time(card, &Work { blocks: 1.0, moved: 64.0 * 1.83e6, ..Work::default() });
        assert!(unit == Unit::L2 && (seconds - GAP - 1e-3).abs() < 1e-12, "{seconds} by {unit:?}");
    }
}
