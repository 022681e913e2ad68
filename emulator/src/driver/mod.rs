//! The exported CUDA driver API.
//!
//! Shape: every exported function lives in the module of its subject, inside `call::exports!`, and answers with a sentence
//! where it refuses. `state` holds what handles stand for. What streams and graphs carry is a `work::Work`; `stream::submit` is
//! the one place where it is either captured or run, and `work` and `launch` are the only ones that touch device memory or
//! run kernels.
//!
//! The functions are reached by their C names only; nothing here is Rust API.
#![allow(non_snake_case, reason = "the exported functions have the names of the driver API")]

mod call;
mod codes;
mod context;
mod device;
mod emu;
mod event;
mod graph;
mod handles;
mod launch;
mod linker;
mod memory;
mod module;
mod occupancy;
mod pool;
mod profile;
mod registered;
mod settings;
mod staged;
mod state;
mod stream;
mod symbols;
mod user_object;
mod work;
