//! From PTX text to a decoded program.
//!
//! [`parse()`] refuses by name and line what it does not know: recursion, textures and surfaces, and whatever PTX has
//! only for targets after sm_80. Debug information is skipped. [`link()`] makes one module of several.
//!
//! The modules, each using only those below it:
//!
//! - `link`: several modules to one, as text.
//! - `flow`: inlines calls, orders basic blocks so that the smallest step is always the right one to run when lanes
//!   have diverged, and allocates registers. The result is a [`Program`].
//! - `parse`: reads declarations and statements.
//! - `decode`: one instruction to one step on virtual registers. Asks [`crate::num::form()`] for arithmetic.
//! - [`program`]: the result.
//! - `lex`: tokens.

mod decode;
mod flow;
mod lex;
mod link;
mod parse;
pub mod program;

pub use link::{Image, link};
use program::Callee;
pub use program::Program;
use std::sync::Arc;

/// Why a module was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// Line of the text, from 1.
    pub line: u32,
    /// What was wrong, in one sentence without the line.
    pub message: String,
    /// Which of the driver's errors this is.
    pub kind: ParseErrorKind,
}

/// Which of the driver's errors a [`ParseError`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseErrorKind {
    /// CUDA_ERROR_INVALID_PTX: text that no assembler would take, or an instruction outside the subset.
    Invalid,
    /// CUDA_ERROR_UNSUPPORTED_PTX_VERSION.
    Version,
    /// CUDA_ERROR_NO_BINARY_FOR_GPU: the module asks for a newer device.
    Target,
}

impl ParseErrorKind {
    /// The CUresult.
    pub fn code(self) -> u32 {
        match self {
            ParseErrorKind::Invalid => 218,
            ParseErrorKind::Version => 222,
            ParseErrorKind::Target => 209,
        }
    }
}

impl std::fmt::Display for ParseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PTX line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for ParseError {}

/// What the emulated device and driver accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Newest `.version` accepted, (major, minor).
    pub version: (u32, u32),
    /// Compute capability: a `.target` above it is refused. 80 is 8.0.
    pub target: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { version: (9, 9), target: 80 }
    }
}

/// A parsed module.
#[derive(Debug, Default)]
pub struct Module {
    /// `.entry` functions in the order of the text.
    pub kernels: Vec<Arc<Kernel>>,
    /// `.global` and `.const` variables.
    pub globals: Vec<Global>,
    /// The `.version` line.
    pub version: (u32, u32),
    /// The `.target` line: 80 for sm_80.
    pub target: u32,
}

/// Where a module variable lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GlobalSpace {
    /// `.global`
    Global,
    /// `.const`
    Const,
}

/// A module variable.
#[derive(Clone, Debug)]
pub struct Global {
    /// Its name in the text.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// Alignment.
    pub align: u64,
    /// First bytes; the rest is zero, as the CUDA language says.
    pub init: Vec<u8>,
    /// Addresses of other variables inside the initialiser: (offset, index of the variable, addend).
    pub relocations: Vec<(u64, usize, i64)>,
    /// Addresses of functions inside the initialiser: (offset, index of the function).
    pub functions: Vec<(u64, u32)>,
    /// Space.
    pub space: GlobalSpace,
}

/// A parameter of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name in the text.
    pub name: String,
    /// Offset in the parameter buffer.
    pub offset: u32,
    /// Size.
    pub bytes: u32,
    /// Alignment.
    pub align: u32,
}

/// An entry function.
#[derive(Debug, Default)]
pub struct Kernel {
    /// Its name in the text (mangled for C++).
    pub name: String,
    /// Parameters in order.
    pub params: Vec<Param>,
    /// Size of the parameter buffer.
    pub param_bytes: u32,
    /// Bytes of shared memory of fixed size.
    pub static_shared: u32,
    /// `.maxntid`: the largest number of threads is the product.
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`: the block must have just this shape.
    pub required_threads: Option<[u32; 3]>,
    /// `.minnctapersm`.
    pub min_blocks: Option<u32>,
    /// Local memory per thread.
    pub local_bytes: u32,
    /// Registers of 32 bits per thread after allocation: what cuFuncGetAttribute(NUM_REGS) says.
    pub registers: u32,
    /// Bytes of `.const` variables in the module.
    pub const_bytes: u32,
    /// The code.
    pub program: Program,
}

/// Parses a module for the default [`Limits`].
pub fn parse(text: &str) -> Result<Module, ParseError> {
    parse_for(text, Limits::default())
}

/// Parses a module. Any text gives a module or an error with its line, never a panic.
pub fn parse_for(text: &str, limits: Limits) -> Result<Module, ParseError> {
    let unit = parse::read(text, limits)?;
    let text: Arc<str> = text.into();
    let callee = |function: &decode::Function| Callee { name: function.name.clone(), signature: function.signature() };
    let functions: Arc<[Callee]> = unit.functions.iter().map(callee).collect();
    let kernels: Result<Vec<_>, ParseError> =
        unit.entries.iter().map(|entry| flow::kernel(entry, &unit, &functions, &text).map(Arc::new)).collect();
    Ok(Module { kernels: kernels?, globals: unit.globals, version: unit.version, target: unit.target })
}
