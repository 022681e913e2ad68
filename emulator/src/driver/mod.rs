//! The exported CUDA driver API.
//!
//! Every exported function lives in the module of its subject, inside `call::exports!`, and explains a refusal in a
//! sentence. `state` holds the objects behind handles. Streams and graphs carry `work::Work`; `stream::submit` is the
//! one place where work is either captured or executed, and only `work` and `launch` touch device memory or run
//! kernels.
//!
//! The functions can only be reached by their C names; nothing here is Rust API.
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
mod order;
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
