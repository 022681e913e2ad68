//! The compiled kernels. Each `kernels/S.cu` has a module `S` with a static per entry, named without the stem
//! (`silu_fwd_f32` and `silu_fwd_bf16` are the [`ByType`] `silu::FWD`), and with the [twins](Twin) of structs and
//! constants defined in CUDA. build.rs writes the table, so a wrong name does not compile, and a launch checks its
//! arguments against the entry's parameters. Without a CUDA compiler at build time the table is the same but has no
//! images, and [`COMPILER`] is `None`.

use std::fmt;
use std::path::Path;

use twox_hash::XxHash3_128;

use crate::shape::DType;

/// One .cu file, compiled.
pub struct Module {
    /// The operation's stem.
    pub stem: &'static str,
    /// The same kernels as PTX for different GPUs; empty without a compiler.
    pub images: &'static [Image],
    /// The same as machine code for the compute capabilities [`MACHINE_CODE`], out of which the driver takes its GPU's:
    /// a fatbin of CUDA. Empty without a compiler.
    pub fatbin: &'static [u8],
}

/// A module as PTX for a compute capability, which runs on this and on every newer one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// The compute capability, (major, minor).
    pub capability: (u32, u32),
    /// The text.
    pub ptx: &'static str,
}

impl Module {
    /// The PTX of the lowest capability, which runs on all supported GPUs; empty without a compiler.
    pub fn ptx(&self) -> &'static str {
        self.images.iter().min_by_key(|image| image.capability).map_or("", |image| image.ptx)
    }
}

/// A hash of all kernels that a GPU of this process would run, those of the folder that `DDPM_KERNELS` names included:
/// ranks that train together compare it.
pub fn hash() -> String {
    let mut hash = XxHash3_128::new();
    let folder = std::env::var_os("DDPM_KERNELS").filter(|folder| !folder.is_empty());
    for module in MODULES {
        hash.write(module.stem.as_bytes());
        let replaced = folder.as_ref().map(|folder| Path::new(folder).join(format!("{}.ptx", module.stem)));
        // What cannot be read is refused when the GPU is opened.
        let replaced = replaced.and_then(|path| std::fs::read(path).ok());
        hash.write(replaced.as_deref().unwrap_or(module.ptx().as_bytes()));
    }
    format!("{:032x}", hash.finish_128())
}

/// The newest of `images` that runs on a GPU of compute capability `device`; `None` if none does.
pub fn best_image(images: &[Image], device: (u32, u32)) -> Option<&Image> {
    images.iter().filter(|image| image.capability <= device).max_by_key(|image| image.capability)
}

/// Where PTX declares an entry.
const ENTRY: &str = ".visible .entry ";

/// The module `ptx` without its entries other than `name`, for a driver that would compile all of them. What is not an
/// entry stays.
pub fn entry_alone(ptx: &str, name: &str) -> String {
    let (mut alone, mut rest) = (String::new(), ptx);
    while let Some((before, declared)) = rest.split_once(ENTRY) {
        let end = end_of_body(declared);
        alone += before;
        if declared.split_once('(').is_some_and(|(declared, _)| declared.trim() == name) {
            alone += ENTRY;
            alone += &declared[..end];
        }
        rest = &declared[end..];
    }
    alone + rest
}

/// Where the first body in braces ends. There are braces within it: scopes of calls and of inline assembly.
fn end_of_body(text: &str) -> usize {
    let mut depth = 0usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 1 => return at + 1,
            b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    text.len()
}

/// The sizes in bytes of the parameters of the entry `name`, in order; `None` if the module has no such entry.
pub fn parameters(ptx: &str, name: &str) -> Option<Vec<usize>> {
    let declared = ptx.split(ENTRY).skip(1).find_map(|entry| {
        let (declared, rest) = entry.split_once('(')?;
        (declared.trim() == name).then_some(rest)
    })?;
    let (params, _) = declared.split_once(')')?;
    let params = params.split(',').map(str::trim).filter(|param| !param.is_empty());
    // `.param .u32 NAME`, or `.param .align 4 .b8 NAME[BYTES]` for a struct.
    let size = |param: &str| match param.split_once('[') {
        Some((_, bytes)) => bytes.trim_end_matches(']').parse().unwrap_or(0),
        None => param
            .split_whitespace()
            .nth(1)
            .and_then(|kind| kind.get(2..)?.parse().ok())
            .map_or(0, |bits: usize| bits / 8),
    };
    Some(params.map(size).collect())
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
    /// What it takes on each of [`MACHINE_CODE`].
    pub resources: &'static [Resources],
}

/// What a kernel's machine code takes of a multiprocessor, as its assembler said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// Bytes of a thread's stack, and of what it spills and reads again, in local memory.
    pub local: u32,
}

impl Kernel {
    /// What it takes on a GPU of this compute capability; `None` if the build has no machine code for it.
    pub fn resources_on(&self, capability: (u32, u32)) -> Option<Resources> {
        let place = MACHINE_CODE.iter().position(|code| *code == capability)?;
        self.resources.get(place).copied()
    }
}

/// The entry of this name.
pub fn called(name: &str) -> Option<&'static Kernel> {
    ALL.iter().find(|kernel| kernel.name == name).copied()
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
