//! The compiled kernels: for each `kernels/S.cu` a module `S` with one static for each entry, named without the stem:
//! `silu_fwd_f32` and `silu_fwd_bf16` are [`ByType`] `silu::FWD`; and the [twins](Twin) of structs and constants that
//! are defined in CUDA. build.rs writes the table, so a wrong name does not compile, and a launch checks its arguments
//! against the entry's parameters. Without a CUDA compiler at build time the table is the same, without images, and
//! [`COMPILER`] is `None`.

use std::fmt;

use crate::shape::DType;

/// One .cu file, compiled.
pub struct Module {
    /// The operation's stem.
    pub stem: &'static str,
    /// The same kernels for different GPUs; none without a compiler.
    pub images: &'static [Image],
}

/// A module as compiled for one kind of GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// Compute capability, major and minor, that it is compiled for.
    pub capability: (u32, u32),
    /// What the driver is given.
    pub code: Code,
}

/// The two forms of an [`Image`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Text for the driver's own compiler: runs on its capability and every newer one.
    Ptx(&'static str),
    /// Machine code: runs on its capability's major number, from its minor number on.
    Cubin(&'static [u8]),
}

impl Module {
    /// The text of the oldest PTX image, which runs everywhere; empty without a compiler.
    pub fn ptx(&self) -> &'static str {
        let ptx = self.images.iter().filter_map(|image| match image.code {
            Code::Ptx(text) => Some((image.capability, text)),
            Code::Cubin(_) => None,
        });
        ptx.min_by_key(|(capability, _)| *capability).map_or("", |(_, text)| text)
    }
}

/// The best of `images` for a GPU of compute capability `device`: machine code of its major and at most its minor
/// number, the newest there is; without any, or where `ptx_only` (the emulator has no machine code), the newest PTX
/// that is not above the GPU. `None` if nothing runs on it.
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
    /// BM and BN of a kernel that computes a product by tiles and is named `..._BMxBN_...`: rows and columns of a
    /// block.
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
    /// An address from which is read: `const T*`.
    Pointer,
    /// An address to which is written: `T*`.
    PointerMut,
    /// A 64-bit integer.
    U64,
    /// A 32-bit integer.
    U32,
    /// A float.
    F32,
    /// A double.
    F64,
    /// A [`Twin`] of this name and size in bytes, by value.
    Struct(&'static str, usize),
}

/// A struct that is defined in CUDA behind a comment `Host twin:`. build.rs writes the definition here, with the same
/// layout.
pub trait Twin: bytemuck::Pod + fmt::Debug {
    /// Its name in CUDA.
    const NAME: &'static str;
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
