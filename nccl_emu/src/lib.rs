//! A stand-in for NVIDIA's NCCL, for tests of programs that use it.
//!
//! The shared library `libnccl_emu.so` exports those functions of NCCL that move and add up buffers. Device memory is
//! reached through the CUDA driver that the program has loaded, so it runs on the emulator `cuda_emu` as on a GPU. The
//! ranks, threads or processes, meet over TCP on this machine alone: one thread compares their calls, moves the bytes,
//! and refuses what NCCL leaves undefined in a sentence that names both sides.
//!
//! The modules, each using only those below it:
//!
//! - `api`: the exported functions.
//! - `group`: calls that are one, and what runs them.
//! - `batch`: what one group asks of one communicator, as work of a stream.
//! - `comm`: communicators: their states, their end, and the exchange of one batch.
//! - `hub`: where the ranks meet.
//! - `matching`: which calls of the ranks belong together, and what comes of them.
//! - `sum`: reductions, in an order drawn from a seed.
//! - `wire`: messages between a rank and the hub.
//! - `call`: what a call asks for, in numbers and in words.
//! - `driver`: the CUDA driver of this process.
//! - `settings`: the variables that this library reads.
//! - `codes`: results, and refusals in a sentence.
//!
//! Deliberately absent: speed, other addresses than this machine's, and everything of NCCL that the functions exported
//! here do not need: communicators out of communicators, windows, registered buffers, operators of one's own.
//!
//! The crate is empty on systems that are not Unix.

#![cfg(unix)]

mod api;
mod batch;
mod call;
mod codes;
mod comm;
mod driver;
mod group;
mod hub;
mod matching;
mod settings;
mod sum;
mod wire;
