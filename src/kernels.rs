//! The compiled kernels. Each `kernels/S.cu` has a module `S` with a static per entry, named without the stem
//! (`silu_fwd_f32` and `silu_fwd_bf16` are the [`ByType`] `silu::FWD`), and with the [twins](Twin) of structs and
//! constants defined in CUDA. build.rs writes the table, so a wrong name does not compile, and a launch checks its
//! arguments against the entry's parameters. Without a CUDA compiler at build time the table is the same but has no
//! images, and [`COMPILER`] is `None`.

use std::fmt;

use crate::shape::DType;

/// One .cu file, compiled.
pub struct Module {
    /// The operation's stem.
    pub stem: &'static str,
    /// The same kernels compiled for different GPUs; empty without a compiler.
    pub images: &'static [Image],
}

/// A module compiled for one compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// The compute capability it was compiled for, (major, minor).
    pub capability: (u32, u32),
    /// What the driver is given.
    pub code: Code,
}

/// The two forms of an [`Image`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// PTX, which the driver compiles: runs on its capability and every newer one.
    Ptx(&'static str),
    /// Machine code: runs on GPUs of the same major number and at least its minor number.
    Cubin(&'static [u8]),
}

impl Module {
    /// The PTX of the lowest capability, which runs on all supported GPUs; empty without a compiler.
    pub fn ptx(&self) -> &'static str {
        let ptx = self.images.iter().filter_map(|image| match image.code {
            Code::Ptx(text) => Some((image.capability, text)),
            Code::Cubin(_) => None,
        });
        ptx.min_by_key(|(capability, _)| *capability).map_or("", |(_, text)| text)
    }
}

/// The best of `images` for a GPU of compute capability `device`: the newest machine code that runs on it; if there is
/// none, or with `ptx_only` (the emulator runs PTX alone), the newest PTX not above `device`. `None` if nothing runs on
/// it.
pub fn best_image(images: &[Image], device: (u32, u32), ptx_only: bool) -> Option<&Image> {
    let newest = |cubins: bool| {
        let runs = images.iter().filter(move |image| match image.code {
            Code::Ptx(_) => !cubins && image.capability <= device,
            Code::Cubin(_) => cubins && image.capability.0 == device.0 && image.capability.1 <= device.1,
        });
        runs.max_by_key(|image| image.capability)
    };
    if ptx_only { newest(false) } else { newest(true).or_else(|| newest(false)) }
}

/// One entry (a `__global__` function).
pub struct Kernel {
    /// Its symbol.
    pub name: &'static str,
    /// The module it is in.
    pub module: &'static Module,
    /// Kinds and names of its parameters, in order.
    pub params: &'static [(Kind, &'static str)],
    /// Its launch bound: the most threads in a block. 0 without a compiler.
    pub max_threads: u32,
    /// Rows and columns of a block's tile, for a tiled matrix product, whose name contains `_BMxBN_`.
    pub tile: Option<(u32, u32)>,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// What a parameter or argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An address read from: `const T*`.
    Pointer,
    /// An address written to: `T*`.
    PointerMut,
    /// A 64-bit integer.
    U64,
    /// A 32-bit integer.
    U32,
    /// A float.
    F32,
    /// A double.
    F64,
    /// A [`Twin`], by value: its name and its size in bytes.
    Struct(&'static str, usize),
}

/// A struct defined in CUDA under a comment that begins with `Host twin:`. build.rs writes the Rust definition, with
/// the same layout.
pub trait Twin: bytemuck::Pod + fmt::Debug {
    /// Its name in CUDA.
    const NAME: &'static str;
}

/// One entry per activation type.
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
