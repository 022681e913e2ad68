//! Launching a kernel: arguments are collected in the order of its parameters, checked against them, and handed to the driver.

use std::fmt;
use std::marker::PhantomData;

use cudarc::driver::{LaunchConfig, PushKernelArg, sys};

use super::{Buffer, Gpu, driver_error};
use crate::error::Result;
use crate::kernels::{Kernel, Kind};
use crate::shape::{DType, Shape};

/// Dynamic shared memory that a kernel may use without being asked.
const SHARED_DEFAULT: u32 = 48 << 10;

/// A range of device memory, borrowed: a parameter's weights or gradient.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    address: sys::CUdeviceptr,
    bytes: usize,
    borrowed: PhantomData<&'a Buffer>,
}

impl<'a> View<'a> {
    /// Bytes `offset..offset + bytes` of `buffer`.
    pub fn new(buffer: &'a Buffer, offset: usize, bytes: usize) -> Self {
        assert!(offset + bytes <= buffer.bytes(), "bytes {offset}..{} of {}", offset + bytes, buffer.bytes());
        View { address: buffer.address() + offset as u64, bytes, borrowed: PhantomData }
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[derive(Clone, Copy)]
struct Argument {
    /// The value's bits, low end first.
    bits: u64,
    what: What,
}

/// What an argument is in messages, which are made only when they are needed: a step has a thousand launches.
#[derive(Clone, Copy)]
enum What {
    Tensor(Shape, DType),
    Bytes(usize),
    Null,
    U32,
    I32,
    U64,
    F32,
    F64,
}

impl Argument {
    fn kind(&self) -> Kind {
        match self.what {
            What::Tensor(..) | What::Bytes(_) | What::Null => Kind::Pointer,
            What::U32 | What::I32 => Kind::U32,
            What::U64 => Kind::U64,
            What::F32 => Kind::F32,
            What::F64 => Kind::F64,
        }
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            What::Tensor(shape, dtype) => write!(f, "{shape} {dtype:?}"),
            What::Bytes(bytes) => write!(f, "{bytes} bytes"),
            What::Null => f.write_str("null"),
            What::U32 | What::U64 => write!(f, "{}", self.bits),
            What::I32 => write!(f, "{}", self.bits as u32 as i32),
            What::F32 => write!(f, "{}", f32::from_bits(self.bits as u32)),
            What::F64 => write!(f, "{}", f64::from_bits(self.bits)),
        }
    }
}

/// A launch being put together.
#[must_use = "a launch happens in run()"]
pub struct Launch<'a> {
    gpu: &'a Gpu,
    kernel: &'static Kernel,
    grid: [usize; 3],
    block: [u32; 3],
    shared: u32,
    arguments: Vec<Argument>,
}

/// `threads` along x, or along x, y and z.
pub trait Block {
    /// Along x, y and z.
    fn extent(self) -> [u32; 3];
}

impl Block for u32 {
    fn extent(self) -> [u32; 3] {
        [self, 1, 1]
    }
}

impl Block for [u32; 3] {
    fn extent(self) -> [u32; 3] {
        self
    }
}

/// Grid of a kernel whose threads have four neighbouring elements each, in blocks of 256: large enough to hide latency, small enough
/// that a multiprocessor holds eight.
pub fn each_four(len: usize) -> [usize; 3] {
    [len.div_ceil(4 * 256), 1, 1]
}

/// Grid of a kernel whose threads have one element each, in blocks of 256.
pub fn each_one(len: usize) -> [usize; 3] {
    [len.div_ceil(256), 1, 1]
}

impl Gpu {
    /// A launch of `kernel` over `grid` blocks. A grid with nothing in it launches nothing.
    pub fn launch(&self, kernel: &'static Kernel, grid: [usize; 3], block: impl Block) -> Launch<'_> {
        let block = block.extent();
        let threads: u32 = block.iter().product();
        assert!(
            threads > 0 && threads <= kernel.max_threads,
            "{}: blocks of {threads} threads, its bound is {}",
            kernel.name,
            kernel.max_threads
        );
        Launch { gpu: self, kernel, grid, block, shared: 0, arguments: Vec::with_capacity(kernel.params.len()) }
    }
}

impl<'a> Launch<'a> {
    /// Dynamic shared memory in bytes.
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = u32::try_from(bytes).expect("shared memory is some kilobytes");
        self
    }

    /// An array that the kernel reads: `shape` elements of type `dtype` at the start of `buffer`.
    pub fn array(self, buffer: &'a Buffer, shape: Shape, dtype: DType) -> Self {
        self.argument(buffer.address(), What::Tensor(shape, dtype))
    }

    /// An array that the kernel writes.
    pub fn array_mut(self, buffer: &'a mut Buffer, shape: Shape, dtype: DType) -> Self {
        self.argument(buffer.address(), What::Tensor(shape, dtype))
    }

    /// A null pointer.
    pub fn null(self) -> Self {
        self.argument(0, What::Null)
    }

    /// The first pointer once more: a kernel that writes over what it reads.
    pub fn first_again(self) -> Self {
        let Argument { bits, what } = self.arguments[0];
        self.argument(bits, what)
    }

    /// A parameter's weights or gradient.
    pub fn view(self, view: View<'a>) -> Self {
        self.argument(view.address, What::Bytes(view.bytes))
    }

    /// The same, or a null pointer.
    pub fn view_opt(self, view: Option<View<'a>>) -> Self {
        match view {
            Some(view) => self.view(view),
            None => self.null(),
        }
    }

    /// Bytes that are no tensor.
    pub fn buffer(self, buffer: &'a Buffer) -> Self {
        self.argument(buffer.address(), What::Bytes(buffer.bytes()))
    }

    /// A 32-bit integer.
    pub fn u32(self, v: usize) -> Self {
        let value = u32::try_from(v).unwrap_or_else(|_| panic!("{}: {v} for a 32-bit parameter", self.kernel.name));
        self.argument(u64::from(value), What::U32)
    }

    /// A 32-bit integer with a sign.
    pub fn i32(self, v: isize) -> Self {
        let value = i32::try_from(v).unwrap_or_else(|_| panic!("{}: {v} for a 32-bit parameter", self.kernel.name));
        self.argument(u64::from(value as u32), What::I32)
    }

    /// A 64-bit integer.
    pub fn u64(self, v: usize) -> Self {
        self.argument(v as u64, What::U64)
    }

    /// A float.
    pub fn f32(self, v: f32) -> Self {
        self.argument(u64::from(v.to_bits()), What::F32)
    }

    /// A double.
    pub fn f64(self, v: f64) -> Self {
        self.argument(v.to_bits(), What::F64)
    }

    fn argument(mut self, bits: u64, what: What) -> Self {
        self.arguments.push(Argument { bits, what });
        self
    }

    /// Launches; does not wait.
    ///
    /// # Errors
    /// What the driver says, with kernel, grid and arguments. What the kernel itself does wrong is said by whichever call comes after.
    pub fn run(self) -> Result<()> {
        assert!(
            self.arguments.iter().map(Argument::kind).eq(self.kernel.params.iter().map(|&(kind, _)| kind)),
            "{} takes {:?}, but was launched with {:?}",
            self.kernel.name,
            self.kernel.params,
            self.arguments.iter().map(|a| (a.kind(), a.to_string())).collect::<Vec<_>>()
        );
        if self.grid.contains(&0) {
            return Ok(());
        }
        let [x, y, z] = self.grid;
        assert!(
            x <= i32::MAX as usize && y <= 65535 && z <= 65535,
            "{}: a grid of {x} x {y} x {z} blocks",
            self.kernel.name
        );
        if self.gpu.0.trace {
            eprintln!("{}", self.describe());
        }
        let function = self.gpu.function(self.kernel)?;
        let failed = |e| driver_error(&format!("launching {}", self.describe()), e);
        if self.shared > SHARED_DEFAULT {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(attribute, self.shared as i32).map_err(failed)?;
        }
        let mut launch = self.gpu.0.stream.launch_builder(&function);
        for argument in &self.arguments {
            // A 32-bit parameter is read from the first four bytes.
            launch.arg(&argument.bits);
        }
        let config = LaunchConfig {
            grid_dim: (x as u32, y as u32, z as u32),
            block_dim: self.block.into(),
            shared_mem_bytes: self.shared,
        };
        // SAFETY: number, kind and size of the arguments are those of the kernel's parameters (checked above; PTX is
        // little-endian like every host CUDA runs on). Tensors and buffers are alive and stay so until the stream has passed
        // this launch, since the pool hands memory out again in the stream's order; what is written is borrowed mutably. That a kernel
        // stays inside its arguments is its own contract, stated in its header and tested under the emulator's checks.
        unsafe { launch.launch(config) }.map(|_| ()).map_err(failed)
    }

    fn describe(&self) -> String {
        let ([x, y, z], [bx, by, bz]) = (self.grid, self.block);
        format!(
            "{} on {x}x{y}x{z} blocks of {bx}x{by}x{bz} threads, {} bytes of shared memory, ({})",
            self.kernel.name,
            self.shared,
            self.arguments.iter().map(Argument::to_string).collect::<Vec<_>>().join(", ")
        )
    }
}
