//! Occupancy: how many blocks of a kernel one multiprocessor holds at a time.
//!
//! The arithmetic is that of NVIDIA's occupancy calculator. The register count is the emulator's own, since only ptxas
//! knows the real one: results are close to the GPU's, not equal.

use super::call::{Answer, exports, give, refuse};
use super::codes::Code;
use super::device::{self, Figures};
use super::launch::Config;
use super::module::Function;
use super::state::{Handle, driver};
use crate::ptx::Kernel;
use std::ffi::{c_int, c_uint};
use std::sync::Arc;

/// Registers are allocated to warps in units of this size.
const REGISTER_UNIT: u32 = 256;
const WARP: u32 = 32;

/// Registers per thread as ptxas would limit them: at most 255, and no more than the declared block size allows.
pub fn registers_of(kernel: &Kernel) -> u32 {
    let declared = kernel.required_threads.or(kernel.max_threads);
    let product = |shape: [u32; 3]| shape.iter().fold(1, |product: u32, &count| product.saturating_mul(count));
    let threads = declared.map_or(1, |shape| product(shape).max(1));
    let warps = threads.div_ceil(WARP).saturating_mul(kernel.min_blocks.unwrap_or(1).max(1));
    // 64 K registers over the warps that must fit, in steps of 8 per thread.
    let fits = (65_536 / warps.saturating_mul(WARP)) & !7;
    kernel.registers.clamp(1, 255).min(fits.max(16))
}

/// Blocks of `threads` threads that are resident on one multiprocessor.
pub fn blocks_per_multiprocessor(function: &Function, figures: &Figures, threads: u32, dynamic_shared: u32) -> u32 {
    if threads == 0 || threads > function.max_threads() {
        return 0;
    }
    let kernel = &function.kernel;
    let warps = threads.div_ceil(WARP);
    let by_warps = figures.threads_per_multiprocessor / WARP / warps;
    let per_warp = (registers_of(kernel) * WARP).next_multiple_of(REGISTER_UNIT);
    let by_registers = figures.registers / per_warp / warps;
    let shared = kernel.static_shared.saturating_add(dynamic_shared);
    if shared > figures.shared_per_block_opt_in {
        return 0;
    }
    let shared = (shared + figures.shared_reserved).next_multiple_of(figures.shared_unit);
    let by_shared = figures.shared_per_multiprocessor / shared.max(1);
    by_warps.min(by_registers).min(by_shared).min(figures.blocks_per_multiprocessor)
}

fn look_up(function: Handle) -> Answer<(Arc<Function>, Figures)> {
    let driver = driver()?;
    let function = driver.functions.get(function)?;
    let context = driver.contexts.get(function.image.context as Handle)?;
    Ok((function, device::figures(context.device()?)))
}

fn max_active(function: Handle, threads: c_int, dynamic_shared: usize) -> Answer<c_int> {
    let (function, figures) = look_up(function)?;
    let Ok(threads) = u32::try_from(threads) else {
        return refuse(Code::INVALID_VALUE, format!("a block of {threads} threads is impossible"));
    };
    if threads == 0 {
        return refuse(Code::INVALID_VALUE, "a block of 0 threads is impossible");
    }
    let dynamic_shared = u32::try_from(dynamic_shared).unwrap_or(u32::MAX);
    Ok(blocks_per_multiprocessor(&function, &figures, threads, dynamic_shared) as c_int)
}

type SharedOfBlock = unsafe extern "C" fn(c_int) -> usize;

/// (smallest grid that fills the device, block size) at maximum occupancy.
fn best_block(
    function: Handle,
    shared_of: Option<SharedOfBlock>,
    dynamic_shared: usize,
    limit: c_int,
) -> Answer<(c_int, c_int)> {
    let (function, figures) = look_up(function)?;
    let most = match u32::try_from(limit) {
        Ok(limit) if limit > 0 => limit.min(function.max_threads()),
        _ => function.max_threads(),
    };
    let (mut best, mut best_threads, mut best_blocks) = (0, 0, 0);
    // From the largest block down by a warp at a time; ties go to the larger block.
    for threads in (1..=most).rev().filter(|&threads| threads == most || threads % WARP == 0) {
        let shared = match shared_of {
            // SAFETY: the caller of the exported function guarantees that its callback may be called.
            Some(callback) => unsafe { callback(threads as c_int) },
            None => dynamic_shared,
        };
        let shared = u32::try_from(shared).unwrap_or(u32::MAX);
        let blocks = blocks_per_multiprocessor(&function, &figures, threads, shared);
        if blocks * threads > best {
            (best, best_threads, best_blocks) = (blocks * threads, threads, blocks);
        }
    }
    if best == 0 {
        return refuse(
            Code::INVALID_VALUE,
            format!("no block of kernel {} fits a multiprocessor", function.kernel.name),
        );
    }
    Ok(((best_blocks * figures.multiprocessors) as c_int, best_threads as c_int))
}

fn check_flags(flags: c_uint) -> Answer {
    match flags {
        0 | 1 => Ok(()),
        _ => {
            refuse(Code::INVALID_VALUE, format!("the flags must be 0 or 1 (disable caching override), not {flags:#x}"))
        }
    }
}

exports! { OCCUPANCY:
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int, function: Handle, threads: c_int, dynamic_shared: usize,
    ) {
        give(blocks, max_active(function, threads, dynamic_shared)?, "the number of blocks")
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int, function: Handle, threads: c_int, dynamic_shared: usize, flags: c_uint,
    ) {
        check_flags(flags)?;
        give(blocks, max_active(function, threads, dynamic_shared)?, "the number of blocks")
    }

    fn cuOccupancyMaxPotentialBlockSize(
        grid: *mut c_int, block: *mut c_int, function: Handle, shared_of: Option<SharedOfBlock>,
        dynamic_shared: usize, limit: c_int,
    ) {
        let (smallest_grid, threads) = best_block(function, shared_of, dynamic_shared, limit)?;
        give(grid, smallest_grid, "the grid size")?;
        give(block, threads, "the block size")
    }

    fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: *mut c_int, block: *mut c_int, function: Handle, shared_of: Option<SharedOfBlock>,
        dynamic_shared: usize, limit: c_int, flags: c_uint,
    ) {
        check_flags(flags)?;
        let (smallest_grid, threads) = best_block(function, shared_of, dynamic_shared, limit)?;
        give(grid, smallest_grid, "the grid size")?;
        give(block, threads, "the block size")
    }

    fn cuOccupancyAvailableDynamicSMemPerBlock(bytes: *mut usize, function: Handle, blocks: c_int, threads: c_int) {
        let (function, figures) = look_up(function)?;
        let fitting = max_active(function.handle as Handle, threads, 0)?;
        if blocks < 1 || blocks > fitting {
            return refuse(
                Code::INVALID_VALUE,
                format!("{blocks} blocks of {threads} threads do not fit a multiprocessor, which holds {fitting}"),
            );
        }
        let share = figures.shared_per_multiprocessor / blocks as u32 / figures.shared_unit * figures.shared_unit;
        let own = figures.shared_reserved + function.kernel.static_shared;
        let most = figures.shared_per_block_opt_in.saturating_sub(function.kernel.static_shared);
        give(bytes, share.saturating_sub(own).min(most) as usize, "the bytes")
    }

    fn cuOccupancyMaxActiveClusters(clusters: *mut c_int, function: Handle, config: *const Config) {
        let _ = (clusters, config);
        look_up(function)?;
        refuse(Code::NOT_SUPPORTED, "clusters of blocks are not emulated")
    }

    fn cuOccupancyMaxPotentialClusterSize(size: *mut c_int, function: Handle, config: *const Config) {
        let _ = (size, config);
        look_up(function)?;
        refuse(Code::NOT_SUPPORTED, "clusters of blocks are not emulated")
    }
}
