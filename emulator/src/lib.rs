//! A CUDA driver that runs PTX on the CPU.
//!
//! The shared library `libcuda_emu.so` exports the CUDA driver API. Modules are PTX text as nvcc writes it. Kernels run
//! on all cores, warp by warp, with checks that hardware does not make: see [`exec::Checks`].
//!
//! The modules, each using only those below it:
//!
//! - [`driver`]: the exported functions.
//! - [`exec`]: blocks, warps, divergence, barriers, memory accesses, checks and counters.
//! - [`ptx`]: from text to a decoded program with allocated registers.
//! - [`num`]: the meaning of every arithmetic instruction, for a whole warp at a time.
//! - [`memory`]: the global memory of one device.
//!
//! For Linux, whose loader finds the library in place of a driver. The crate is empty on systems that are not Unix.

#![cfg(unix)]
#![cfg_attr(not(target_arch = "x86_64"), allow(unused, reason = "some items serve x86-64 vector code only"))]

pub mod driver;
pub mod exec;
pub mod memory;
pub mod num;
pub mod ptx;
