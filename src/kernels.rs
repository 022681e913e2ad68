//! The compiled kernels: for each `kernels/S.cu` a module `S` with one static for each entry, named without the stem:
//! `silu_fwd_f32` and `silu_fwd_bf16` are [`ByType`] `silu::FWD`. build.rs writes the table, so a wrong name does not compile, and a
//! launch checks its arguments against the entry's parameters. Without a CUDA compiler at build time the table is the same, the PTX
//! is empty and [`COMPILER`] is `None`.

use std::fmt;

use crate::shape::DType;

/// One .cu file's PTX.
pub struct Module {
    /// The operation's stem.
    pub stem: &'static str,
    /// Text for the driver's compiler.
    pub ptx: &'static str,
}

/// One entry.
pub struct Kernel {
    /// Its symbol.
    pub name: &'static str,
    /// Where it is.
    pub module: &'static Module,
    /// Kinds and names of its parameters, in order.
    pub params: &'static [(Kind, &'static str)],
    /// Its launch bound; 0 without a compiler.
    pub max_threads: u32,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// What a parameter or argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An address.
    Pointer,
    /// A 64-bit integer.
    U64,
    /// A 32-bit integer.
    U32,
    /// A float.
    F32,
    /// A double.
    F64,
}

/// An entry for each type of activations.
pub struct ByType {
    /// For f32.
    pub f32: Kernel,
    /// For bf16.
    pub bf16: Kernel,
}

impl ByType {
    /// The entry for `dtype`.
    pub fn of(&'static self, dtype: DType) -> &'static Kernel {
        match dtype {
            DType::F32 => &self.f32,
            DType::Bf16 => &self.bf16,
        }
    }
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
