//! A CUDA driver that runs PTX on the CPU.
//!
//! The shared library `libcuda_emu.so` exports the CUDA driver API. Modules are PTX text, as nvcc writes it; kernels run on
//! all cores, warp by warp, with checks that hardware does not make: see [`exec::Checks`].
//!
//! - [`ptx`]: text to a decoded program with allocated registers.
//! - [`num`]: the meaning of every arithmetic instruction, for a whole warp at a time.
//! - [`exec`]: blocks, warps, divergence, barriers, memory accesses, checks and counters.
//! - [`memory`]: the global memory of one device.
//! - [`driver`]: the exported functions.
//!
//! Made for Linux, whose loader finds it in place of a driver; elsewhere than on Unix the crate is empty.

#![cfg(unix)]
#![cfg_attr(not(target_arch = "x86_64"), allow(unused, reason = "some of what vector instructions of x86-64 share"))]

pub mod driver;
pub mod exec;
pub mod memory;
pub mod num;
pub mod ptx;
